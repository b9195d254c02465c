"""The layout of a working directory, and the rules by which a run may go on in one.

WORKDIR/config.json                    the configuration last used
WORKDIR/data/                          tokenizer, blocks, manifest (or config.data.directory)
WORKDIR/stages/NAME/checkpoints/       of each entry of the pipeline; repeated: NAME_2 ..
WORKDIR/stages/NAME/metrics.jsonl, tensorboard/, pairs/
WORKDIR/report/                        table, pictures, samples
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import subprocess
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import fsdfm_jax
from fsdfm_jax import io, stages
from fsdfm_jax.data.prepared import DataSpec
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import processes
from fsdfm_jax.training import checkpoint


class Entry(NamedTuple):
    """One training run of a pipeline.

    Attributes:
      run: its name and folder, "refine_2" for the second time the pipeline names "refine".
      stage: one of `stages.NAMES`.
      base: folder of the run it starts from, or None for random weights.
    """

    run: str
    stage: str
    base: pathlib.Path | None


class Weights(NamedTuple):
    """Weights as they are used: the average where the stage keeps one."""

    params: Params
    model: ModelConfig
    metadata: dict[str, Any]
    step: int


def stage_directory(workdir: pathlib.Path, run: str) -> pathlib.Path:
    """Folder of a run's checkpoints and metrics."""
    return workdir / "stages" / run


def data_directory(workdir: pathlib.Path, config: ConfigDict) -> pathlib.Path:
    """Folder of the prepared data: `data.directory`, or WORKDIR/data where that is empty."""
    return pathlib.Path(config.data.directory or workdir / "data").expanduser()


def runs(config: ConfigDict) -> list[tuple[str, str]]:
    """(run, stage) of each entry of `config.pipeline`, in order.

    Raises:
      ValueError: for an empty pipeline or an unknown stage.
    """
    names = [name.strip() for name in config.pipeline.split(",") if name.strip()]
    if not names:
        raise ValueError(
            f"config.pipeline names no stage, got {config.pipeline!r}; expected a comma-separated "
            f"choice of {', '.join(stages.NAMES)}."
        )
    result = []
    for i, name in enumerate(names):
        if name not in stages.NAMES:
            raise ValueError(
                f"config.pipeline names the unknown stage {name!r}; expected "
                f"{', '.join(stages.NAMES)}."
            )
        earlier = names[:i].count(name)
        result.append((f"{name}_{earlier + 1}" if earlier else name, name))
    return result


def entries(config: ConfigDict, workdir: pathlib.Path) -> list[Entry]:
    """The training runs of `config.pipeline` in order, each with the run it starts from.

    Raises:
      ValueError: for an empty pipeline, an unknown stage, or a few-step stage without base weights.
    """
    result: list[Entry] = []
    for run, name in runs(config):
        result.append(Entry(run, name, _base(run, name, config, workdir, result)))
    return result


def _base(run, name, config, workdir, earlier: list[Entry]) -> pathlib.Path | None:
    given = config[name].init_from
    if given and run == name:
        # A name is a run of this working directory; a path may point into another one.
        folder = (
            pathlib.Path(given).expanduser() if "/" in given else stage_directory(workdir, given)
        )
        trained_before = any(stage_directory(workdir, e.run) == folder for e in earlier)
        if not trained_before and not is_trained(folder):
            raise ValueError(
                f"{name}.init_from={given!r} names no trained run: there is no checkpoint in "
                f"{folder}. Give a stage that stands earlier in the pipeline, or the folder "
                "WORKDIR/stages/RUN of another run."
            )
        return folder
    flow = [entry for entry in earlier if entry.stage != "autoregressive"]
    if name in stages.FEW_STEP and not flow:
        raise ValueError(
            f"Stage {run!r} starts from trained base weights, but nothing stands before it in "
            f"the pipeline ({config.pipeline!r}); put 'pretrain' first, or set {name}.init_from."
        )
    if name in stages.FEW_STEP:
        return stage_directory(workdir, flow[-1].run)
    same = [entry for entry in earlier if entry.stage == name]
    return stage_directory(workdir, same[-1].run) if same else None


# What changes results by rounding only: a run may go on where other devices need other values.
_ROUNDING_KEYS = ("attention", "remat", "logits_mib")
# What says when a run is given up, and nothing about the steps before.
_PATIENCE_KEYS = ("max_skipped",)


def recipe(config: ConfigDict, entry: Entry, base_recipe: dict | None) -> dict[str, Any]:
    """All that determines a run's weights up to rounding, as JSON; it only goes on under the same.

    The mesh isn't part of it, nor the number of processes, nor where prepared text lies: the
    fingerprint of what is in it is checked by `check_data`.
    """
    data = DataSpec.from_config(config.data).to_recipe()
    optim = {k: v for k, v in config.optim.items() if k not in _PATIENCE_KEYS}
    model = {k: v for k, v in config.model.items() if k not in _ROUNDING_KEYS}
    own = config[entry.stage].to_dict()
    del own["init_from"]  # the base below says it, whatever way it was named
    guide = guide_run(entry, config)
    return _plain(
        {
            "seed": config.seed,
            "data": data,
            "path": config.path.to_dict(),
            "model": model,
            "optim": optim,
            entry.stage: own,
            "base": None if base_recipe is None else digest(base_recipe),
        }
        | ({} if guide is None else {"guide": digest(recipe(guide[1], guide[0], None))})
    )


def is_trained(directory: pathlib.Path) -> bool:
    """Whether the run in `directory` has a checkpoint, be it damaged."""
    return checkpoint.newest_step(directory / "checkpoints") is not None


def saved_metadata(directory: pathlib.Path) -> dict[str, Any] | None:
    """What the checkpoint says of itself that the run in `directory` goes on from; None without.

    One whose metadata is damaged is passed over, as the run does.
    """
    folder = directory / "checkpoints"
    step = checkpoint.latest_step(folder)
    return None if step is None else checkpoint.read_metadata(folder, step)


# What may differ between a network and the one it starts from.
_FREE_MODEL_KEYS = {"vocab_size", "conditioning", "dropout", "dtype", *_ROUNDING_KEYS}


def check_base(directory: pathlib.Path, model: ModelConfig, config: ConfigDict) -> None:
    """Refuses weights of another network or noising process than the run that starts from them.

    Shapes alone don't show it: the number of heads leaves none, nor does the schedule.

    Args:
      directory: folder of the base run; without a checkpoint there is nothing to refuse yet.
      model, config: of the run that starts from it.

    Raises:
      ValueError: naming what differs.
    """
    saved = saved_metadata(directory)
    if saved is None:
        return
    pairs = [("model", saved["model"], dataclasses.asdict(model))]
    pairs += [("path", saved["recipe"]["path"], config.path.to_dict())]
    different = [
        f"{group}.{key}: {theirs.get(key)!r} there, {value!r} here"
        for group, theirs, ours in pairs
        for key, value in ours.items()
        if not (group == "model" and key in _FREE_MODEL_KEYS) and theirs.get(key) != value
    ]
    if different:
        raise ValueError(
            f"The weights in {directory} can't be started from ({'; '.join(different)})."
        )


def guide_run(entry: Entry, config: ConfigDict) -> tuple[Entry, ConfigDict] | None:
    """The run that a guided one needs besides its base, and its configuration.

    It is `pretrain` with `guide_steps` steps; None for a run without guidance. It stands in no
    pipeline: the job trains it when it is needed.
    """
    if entry.stage not in stages.FEW_STEP or not config[entry.stage].guidance:
        return None
    steps = config[entry.stage].guide_steps
    own = ConfigDict(config.to_dict())
    own.pretrain.num_steps = steps
    own.pretrain.warmup_steps = min(own.pretrain.warmup_steps, steps // 4)
    return Entry(guide_name(steps), "pretrain", None), own


def guide_name(steps: int) -> str:
    """The run of a guide that is trained for so many steps."""
    return f"guide_{steps}"


def check_guided(entry: Entry, base_stage: str | None) -> None:
    """Refuses guidance for a run that doesn't start from a base model.

    Args:
      entry: a guided run.
      base_stage: stage of its base where this job trains it, None where it is there.

    Raises:
      ValueError: saying what it starts from.
    """
    stage = base_stage or saved_metadata(entry.base)["stage"]
    if stage != "pretrain":
        raise ValueError(
            f"{entry.stage}.guidance needs a base model to start from, a run of 'pretrain', and "
            f"{entry.base} is one of {stage!r}. Name one in {entry.stage}.init_from, or set "
            "guidance and guide_steps to 0."
        )


def check_recipe(directory: pathlib.Path, wanted: dict[str, Any]) -> None:
    """Refuses to go on in `directory` under another recipe.

    Raises:
      ValueError: naming each key that differs.
    """
    saved = saved_metadata(directory)
    if saved is None:
        return
    if saved["format"] != _FORMAT:
        raise ValueError(
            f"The run in {directory} was begun by another version of this code "
            f"({saved['code_version']}), whose training states are others. Finish it with that "
            "one, or choose another --workdir."
        )
    ours, theirs = _flat(wanted), _flat(saved.get("recipe", {}))
    different = [
        f"{key}: {theirs.get(key, 'absent')!r} there, {ours.get(key, 'absent')!r} now"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if different:
        raise ValueError(
            f"The run in {directory} was started with another configuration "
            f"({'; '.join(different)}). Give the old values to continue it, or choose "
            "another --workdir."
        )


def check_data(directory: pathlib.Path, *, tokenizer: str, data: str) -> None:
    """Refuses to go on in `directory` with other text than its checkpoint was trained on.

    Args:
      directory: WORKDIR/stages/RUN; without a checkpoint there is nothing to refuse.
      tokenizer, data: fingerprints of what the run would go on with.

    Raises:
      ValueError: saying which of the two differs.
    """
    saved = saved_metadata(directory)
    if saved is None:
        return
    for name, now in (("tokenizer", tokenizer), ("data", data)):
        if saved[name] != now:
            raise ValueError(
                f"The run in {directory} was trained on {name} {saved[name]}, but the prepared "
                f"text has {name} {now}: restore the text it was started with, or choose another "
                "--workdir."
            )


def load_weights(
    directory: pathlib.Path,
    *,
    tokenizer: str | None = None,
    mesh: Mesh | None = None,
    step: int | None = None,
) -> Weights:
    """Weights of a run.

    Args:
      directory: WORKDIR/stages/RUN.
      tokenizer: fingerprint the weights must have been trained with; None skips the check.
      mesh: where to put them, by the rules of `layout`, in which case all processes of a job call;
        this process's first device by default.
      step: of the checkpoint, by default the newest.

    Raises:
      ValueError: if there is no checkpoint, or it is damaged or belongs to another tokenizer.
    """
    together = mesh is not None and jax.process_count() > 1
    step, metadata = weights_metadata(directory, step, together=together)
    if tokenizer is not None and metadata["tokenizer"] != tokenizer:
        raise ValueError(
            f"The checkpoint in {directory} was trained with tokenizer "
            f"{metadata['tokenizer']}, the data has {tokenizer}: their token ids mean different "
            "text. Use the tokenizer.json the run was trained with."
        )
    part = metadata["weights"]
    place = None if mesh is None else functools.partial(mesh_lib.leaf_sharding, mesh)
    folder = directory / "checkpoints"
    restored = checkpoint.restore_part(folder, (part,), step, sharding=place, together=together)
    return Weights(restored[part], ModelConfig(**metadata["model"]), metadata, step)


def weights_metadata(
    directory: pathlib.Path, step: int | None = None, *, together: bool = False
) -> tuple[int, dict[str, Any]]:
    """Step of a run's checkpoint, the newest by default, and what it says of itself.

    With `together` all processes of a job call, and get those of the same one.

    Raises:
      ValueError: if there is no checkpoint, or it is damaged.
    """
    folder = directory / "checkpoints"
    newest = lambda: [found for found in [checkpoint.newest_step(folder)] if found is not None]
    if step is None:
        step = next(iter(processes.from_first(newest) if together else newest()), None)
    if step is None:
        raise ValueError(
            f"There is no checkpoint in {folder}; train that run first (python -m fsdfm_jax.main)."
        )
    return step, checkpoint.read_metadata(folder, step)


def weight_shapes(directory: pathlib.Path) -> Params:
    """Shapes of a run's weights, as `jax.ShapeDtypeStruct`s, without reading them."""
    saved = saved_metadata(directory) or weights_metadata(directory)[1]
    model = ModelConfig(**saved["model"])
    return jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), model))


# Of what a training state and a recipe consist of: a run goes on under the same one only.
_FORMAT = 2


def make_metadata(
    config: ConfigDict,
    entry: Entry,
    model: ModelConfig,
    *,
    the_recipe: dict[str, Any],
    tokenizer: str,
    data: str,
) -> dict[str, Any]:
    """What a checkpoint says about itself, as JSON."""
    return _plain(
        {
            "format": _FORMAT,
            "code_version": code_version(),
            "run": entry.run,
            "stage": entry.stage,
            "weights": "ema" if config[entry.stage].ema_decay else "params",
            "model": dataclasses.asdict(model),
            "tokenizer": tokenizer,
            "data": data,
            "recipe": the_recipe,
            "config": config.to_dict(),
        }
    )


def save_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes config.json."""
    io.write_json(workdir / "config.json", config.to_dict())


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """The configuration of a working directory.

    Raises:
      ValueError: if the directory holds none.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{workdir} is not a working directory of this project (no config.json); "
            "make one with python -m fsdfm_jax.main --config=configs/tiny.py --workdir=DIR."
        )
    return ConfigDict(json.loads(path.read_text()))


@functools.cache
def code_version() -> str:
    """Version of the package, with the commit where it runs from a git checkout."""
    package = pathlib.Path(fsdfm_jax.__file__).parent
    if not (package.parent / ".git").exists():  # installed, perhaps inside another checkout
        return fsdfm_jax.__version__
    command = ("git", "-C", str(package), "describe", "--always", "--dirty", "--exclude=*")
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return fsdfm_jax.__version__
    return f"{fsdfm_jax.__version__}+{described.stdout.strip()}"


def digest(obj: Any) -> str:
    """Short hash of a JSON value, for protocol stamps."""
    text = json.dumps(_plain(obj), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(obj: Any) -> Any:
    return json.loads(json.dumps(obj))


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
