"""Training runs of this project as bundles: Orbax checkpoints, saved on any mesh.

    WORKDIR                        a working directory; run `stage`, or the last trained one
    WORKDIR/stages/RUN             one run, or a folder made by `write`
    WORKDIR/stages/RUN/checkpoints
    WORKDIR/stages/RUN/checkpoints/STEP

A folder made by `write` can initialise a run (`config.STAGE.init_from`), but training can't resume
from it: it has no optimiser state.
"""

import dataclasses
import errno
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference.bundle import BadFile, Bundle, Leaf
from fsdfm_jax.training import checkpoint
from fsdfm_jax.training import pipeline as pipeline_lib
from fsdfm_jax.training import recipe as recipe_lib
from fsdfm_jax.training import workdir as workdir_lib

# Set of weights -> part of the checkpoint; "ema" falls back to "params" in stages without an EMA.
_PARTS = {"ema": "ema", "student": "params", "model": "params"}
_TOKENIZER = "tokenizer.json"
_MOST_TRIES = 5  # to open the newest checkpoint while a training run replaces it


def is_run_folder(path: pathlib.Path) -> bool:
    """Return whether `path` is one of the folders listed in the module's docstring."""
    if not path.is_dir():
        return False
    if (path / "config.json").is_file() and (path / "stages").is_dir():
        return True
    return (path / "checkpoints").is_dir() or _step_folder(path) or _has_steps(path)


def _step_folder(path: pathlib.Path) -> bool:
    return path.name.isdecimal() and path.parent.name == "checkpoints"


def _has_steps(path: pathlib.Path) -> bool:
    return path.name == "checkpoints" and any(child.name.isdecimal() for child in path.iterdir())


def read(path: pathlib.Path, *, which: str, stage: str = "") -> Bundle:
    """Open a run; its parameters are read one by one, on this process's first device.

    Args:
      path: one of the folders listed in the module's docstring.
      which: "ema" (or the trained weights if the stage has no EMA) | "student" or "model" (the
        trained weights).
      stage: run of a working directory.

    Raises:
      ValueError: the run or weights don't exist, or the checkpoint is damaged.
    """
    if which not in _PARTS:
        raise ValueError(
            f"A training run has no weights which={which!r}; expected one of {', '.join(_PARTS)}."
        )
    path, step = _locate(path, stage)
    tried: list[int | None] = []
    while True:
        found = checkpoint.newest_step(path / "checkpoints") if step is None else step
        try:
            return _open(path, which, found)
        except (BadFile, checkpoint.NotACheckpoint, OSError) as error:
            tried.append(found)
            # A concurrent training run may have replaced it with a newer one.
            newer = step is None and checkpoint.newest_step(path / "checkpoints") not in tried
            if not newer or isinstance(error, BadFile) or len(tried) > _MOST_TRIES:
                raise
        except Exception as error:  # Orbax and TensorStore raise many types for damaged files
            raise BadFile(
                f"The checkpoint in {path} can't be read; it is damaged or not of this project: "
                f"{bundle_lib.first_line(error)}"
            ) from error


def pinned(path: pathlib.Path, stage: str = "") -> pathlib.Path:
    """Return the folder of the checkpoint that `read` uses now, independent of further training."""
    path, step = _locate(path, stage)
    if step is None:
        step = checkpoint.newest_step(path / "checkpoints")
    return path if step is None else path / "checkpoints" / str(step)


def _locate(path: pathlib.Path, stage: str) -> tuple[pathlib.Path, int | None]:
    """Folder of a run, and the step if the path has one."""
    path, step = path.absolute(), None
    if (path / "stages").is_dir():
        path = workdir_lib.stage_directory(path, _chosen(path, stage))
    elif stage:
        raise ValueError(f"stage={stage!r} selects a run of a working directory; {path} isn't one.")
    if _step_folder(path):
        step, path = int(path.name), path.parent
    return (path.parent if path.name == "checkpoints" else path), step


def _chosen(folder: pathlib.Path, stage: str) -> str:
    """Return the given run, or the last trained one of the pipeline."""
    is_trained = lambda run: workdir_lib.is_trained(workdir_lib.stage_directory(folder, run))
    if stage and is_trained(stage):
        return stage
    if stage:
        others = sorted(child.name for child in (folder / "stages").iterdir())
        trained = ", ".join(run for run in others if is_trained(run)) or "none"
        raise ValueError(
            f"There is no trained run {stage!r} in {folder} (stage={stage!r}); trained runs: "
            f"{trained}."
        )
    runs = [run for run, _ in pipeline_lib.runs(pipeline_lib.load_config(folder))]
    if not any(map(is_trained, runs)):
        raise ValueError(
            f"No stage of {folder} has been trained yet (expected one of {', '.join(runs)}); "
            "run python -m fsdfm_jax.main with this --workdir first."
        )
    return [run for run in runs if is_trained(run)][-1]


def _open(directory: pathlib.Path, which: str, step: int | None) -> Bundle:
    folder = directory / "checkpoints"
    if step is None:
        step = checkpoint.newest_step(folder)
        if step is None:
            raise checkpoint.NotACheckpoint(
                f"There is no checkpoint in {folder}; train that run first "
                "(python -m fsdfm_jax.main)."
            )
    record = checkpoint.read_record(folder, step)
    metadata = record.metadata
    part = metadata["weights"] if which == "ema" else _PARTS[which]
    kept = metadata.get("provenance", {}).get("weights")
    if kept and which not in ("ema", kept):
        raise ValueError(
            f"{directory} is a converted model with only the weights {kept!r}, got {which=}."
        )
    sums = metadata.get("checksums", {}) if part == "params" else {}
    leaves = {
        name: Leaf(tuple(leaf.shape), functools.partial(_read, folder, part, name, record, sums))
        for name, leaf in checkpoint.leaf_shapes(folder, part, record).items()
    }
    config, recipe = metadata["config"], metadata["recipe"]
    provenance = {
        "run": metadata["run"],
        "stage": metadata["stage"],
        "weights": "ema" if part == "ema" else "student",
        "step": step,
        "ema_decay": config.get(metadata["stage"], {}).get("ema_decay"),
        "tokenizer": metadata["tokenizer"] or None,
        "data": metadata["data"],
        "code_version": metadata["code_version"],
        "config": config,
        "recipe": recipe,
    }
    # A folder made by `write` keeps the provenance of its source.
    provenance |= metadata.get("provenance", {})
    description = {
        "fsdfm_jax": bundle_lib.FORMAT,
        "model": dict(metadata["model"]),
        "path": bundle_lib.DEFAULT_PATH | recipe["path"],
        "block_length": config["data"]["block_length"],
        "provenance": provenance,
    }
    text = _tokenizer_text(directory, config)
    tokenizer = bundle_lib.read_tokenizer(text, f"the tokenizer of {directory}")
    if tokenizer is not None and tokenizer.fingerprint != provenance["tokenizer"]:
        tokenizer = None  # of other text in the same folder; the caller may give the right one
    return bundle_lib.from_parts(leaves, description, tokenizer, str(directory))


def _read(
    folder: pathlib.Path, part: str, name: str, record: checkpoint.Record, sums: Mapping[str, str]
) -> np.ndarray:
    whole = f"{part}/{name}"
    try:
        array = np.asarray(checkpoint.restore_part(folder, (whole,), record)[whole], np.float32)
    except Exception as error:
        if not (folder / str(record.step)).is_dir():
            raise OSError(
                errno.ESTALE,
                f"the checkpoint of step {record.step} was removed while reading it, by a running "
                "training; run the same command again",
                str(folder),
            ) from error
        raise BadFile(
            f"{whole} of the checkpoint in {folder} can't be read: {bundle_lib.first_line(error)}"
        ) from error
    if name in sums and bundle_lib.checksum(array) != sums[name]:
        raise BadFile(
            f"{whole} of the checkpoint in {folder} is damaged (its checksum differs); convert "
            "it again."
        )
    return array


def _tokenizer_text(directory: pathlib.Path, config: dict[str, Any]) -> str:
    for place in [directory, *_data_places(directory, config)]:
        if (place / _TOKENIZER).is_file():
            return bundle_lib.read_text(place / _TOKENIZER)
    return ""


def _data_places(directory: pathlib.Path, config: dict[str, Any]) -> list[pathlib.Path]:
    """Possible folders of a run's prepared text."""
    places = [directory.parents[1] / "data"] if len(directory.parents) > 1 else []
    if given := config["data"].get("directory"):
        places.append(pathlib.Path(given).expanduser())
    return places


def write(directory: pathlib.Path, bundle: Bundle) -> None:
    """Write a run folder that can initialise a training run and that every program can sample.

    Unlike other formats, this needs all parameters in memory at once.

    Args:
      directory: must not exist.
      bundle: the model.
    """
    step = bundle.provenance.get("step") or 0
    config = dict(bundle.provenance.get("config") or {})
    config["data"] = dict(config.get("data") or {}) | {"block_length": bundle.block_length}
    fingerprint = None if bundle.tokenizer is None else bundle.tokenizer.fingerprint
    params = bundle.params()
    metadata = {
        "format": 1,
        "code_version": recipe_lib.code_version(),
        "run": bundle.provenance.get("run") or "converted",
        "stage": bundle.provenance.get("stage") or "converted",
        "weights": "params",
        "model": dataclasses.asdict(bundle.model),
        "tokenizer": fingerprint or bundle.provenance.get("tokenizer"),
        "data": bundle.provenance.get("data"),
        "recipe": {"path": dict(bundle.path), "converted": dict(bundle.provenance)},
        "config": config,
        "provenance": dict(bundle.provenance),
        "checksums": {
            path: bundle_lib.checksum(array) for path, array in bundle_lib.flatten(params).items()
        },
    }
    checkpoint.save_once(directory / "checkpoints", step, {"params": params}, metadata)
    if bundle.tokenizer is not None:
        bundle.tokenizer.save(directory / _TOKENIZER)
