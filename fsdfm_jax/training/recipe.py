"""Checks before resuming: a run must have the recipe and text that it was started with.

A recipe is everything that determines a run's weights up to rounding, as JSON. It is stored inside
each checkpoint. The mesh, the number of processes and the location of the prepared text are not
part of it.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import fsdfm_jax
from fsdfm_jax.data.prepared import DataSpec
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.training import checkpoint, workdir

# Format version of training state, recipe and configuration.
FORMAT = 3

# Model keys that affect only rounding; other devices may need other values.
_ROUNDING_KEYS = ("attention", "remat", "logits_mib")
# Keys omitted from recipes at these values, which are implied for runs older than the key.
_FORMER_MODEL = {"positions": "rotary", "given": "unmarked"}
# Keys that decide when a run fails; they don't change the steps before.
_PATIENCE_KEYS = ("max_skipped",)
# Keys that name runs which a stage starts from or reads; their recipes count, not their names.
_RUN_KEYS = ("init_from", "guide", "teacher")
# Keys that may differ between a network and the one it starts from.
_FREE_MODEL_KEYS = {"vocab_size", "conditioning", "dropout", "dtype", *_ROUNDING_KEYS}


def make_recipe(
    config: Mapping[str, Any],
    stage: str,
    base: Mapping[str, Any] | None,
    needs: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Make the recipe of a run.

    Args:
      config: the whole configuration, as JSON.
      stage: of the run.
      base: recipe of the run it starts from; None for random weights.
      needs: recipes of the runs in `Stage.needs`.
    """
    return _plain(
        {
            "seed": config["seed"],
            "data": DataSpec.from_config(config["data"]).to_recipe(),
            "path": config["path"],
            "model": _model_recipe(config["model"]),
            "optim": _without(config["optim"], _PATIENCE_KEYS),
            stage: _without(config[stage], _RUN_KEYS),
            "base": None if base is None else digest(base),
            "needs": [digest(recipe) for recipe in needs],
        }
    )


def make_metadata(
    config: Mapping[str, Any],
    model: ModelConfig,
    recipe: Mapping[str, Any],
    *,
    run: str,
    stage: str,
    tokenizer: str,
    data: str,
) -> dict[str, Any]:
    """Make the metadata that a run stores in its checkpoints, as JSON.

    Args:
      config: the whole configuration, as JSON.
      model: the network.
      recipe: from `make_recipe`.
      run, stage: names of the run and its stage.
      tokenizer, data: fingerprints of the prepared text.
    """
    return _plain(
        {
            "format": FORMAT,
            "code_version": code_version(),
            "run": run,
            "stage": stage,
            "weights": "ema" if config[stage]["ema_decay"] else "params",
            "model": dataclasses.asdict(model),
            "tokenizer": tokenizer,
            "data": data,
            "recipe": recipe,
            "config": config,
        }
    )


def check_format(place: pathlib.Path, stored: Mapping[str, Any]) -> None:
    """Refuse files written by an incompatible version of this code.

    Args:
      place: their path, for the message.
      stored: with "format", and "code_version" if known.

    Raises:
      ValueError: naming that version and the remedy.
    """
    if stored.get("format") != FORMAT:
        version = stored.get("code_version", "unknown")
        raise ValueError(
            f"{place} was written by another version of this code ({version}): finish it with that "
            "version or choose another --workdir. python -m fsdfm_jax.convert can read its weights "
            "from WORKDIR/stages/RUN, and STAGE.init_from can name them."
        )


def check_recipe(directory: pathlib.Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to resume the run in `directory` under another recipe.

    Raises:
      ValueError: naming each key that differs.
    """
    saved = workdir.saved_metadata(directory)
    if saved is None:
        return
    check_format(directory, saved)
    step = checkpoint.latest_step(directory / "checkpoints")
    saved_recipe = saved.get("recipe", {})
    free = _free_lengths(wanted, saved_recipe, saved.get("stage"), step)
    ours, theirs = _flat(wanted), _flat(saved_recipe)
    different = [
        f"{key}: {theirs.get(key, 'absent')!r} before, {ours.get(key, 'absent')!r} now"
        for key in sorted((ours.keys() | theirs.keys()) - free)
        if ours.get(key) != theirs.get(key)
    ]
    if different:
        raise ValueError(
            f"The run in {directory} was started with another configuration "
            f"({'; '.join(different)}). Give the old values to continue it, or choose "
            "another --workdir."
        )


def _free_lengths(ours: dict, theirs: dict, stage: str | None, step: int) -> set[str]:
    """Keys of the run's length that have not affected its weights up to `step`.

    They can change as long as the learning rate has been constant under both recipes.
    """
    for recipe in (ours, theirs):
        own = recipe.get(stage, {})
        if not own.get("decay_steps") or step > own["num_steps"] - own["decay_steps"]:
            return set()
    return {f"{stage}.num_steps", f"{stage}.decay_steps"}


def check_data(directory: pathlib.Path, *, tokenizer: str, data: str) -> None:
    """Refuse to resume the run in `directory` on different text.

    Args:
      directory: WORKDIR/stages/RUN; accepted if it has no checkpoint.
      tokenizer, data: fingerprints of the current text.

    Raises:
      ValueError: naming the one that differs.
    """
    saved = workdir.saved_metadata(directory)
    if saved is None:
        return
    for name, now in (("tokenizer", tokenizer), ("data", data)):
        if saved[name] != now:
            raise ValueError(
                f"The run in {directory} was trained on {name} {saved[name]}, but the prepared "
                f"text has {name} {now}: restore the text it was started with, or choose another "
                "--workdir."
            )


def check_base(directory: pathlib.Path, model: ModelConfig, path: Mapping[str, Any]) -> None:
    """Refuse weights whose network or noising process differs from that of the reading run.

    Shapes aren't enough: they don't depend on the number of heads or the schedule.

    Args:
      directory: folder of the run with the weights; accepted if it has no checkpoint yet.
      model, path: network and `config.path` of the run that reads them.

    Raises:
      ValueError: naming what differs.
    """
    saved = workdir.saved_metadata(directory)
    if saved is None:
        return
    theirs = dataclasses.asdict(ModelConfig(**saved["model"]))
    pairs = [("model", theirs, dataclasses.asdict(model))]
    pairs += [("path", saved["recipe"]["path"], path)]
    different = [
        f"{group}.{key}: {theirs.get(key)!r} there, {value!r} here"
        for group, theirs, ours in pairs
        for key, value in ours.items()
        if not (group == "model" and key in _FREE_MODEL_KEYS) and theirs.get(key) != value
    ]
    if different:
        raise ValueError(f"The weights in {directory} don't fit this run ({'; '.join(different)}).")


@functools.cache
def code_version() -> str:
    """Version of the package, with the commit when running from a git checkout."""
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


def _model_recipe(model: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` as part of a recipe; earlier versions had fewer keys."""
    silent = [key for key, value in _FORMER_MODEL.items() if model[key] == value]
    return _without(model, (*_ROUNDING_KEYS, *silent))


def _without(section: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
