"""The runs of `config.pipeline`: dependencies, checks before training, and training.

The only training module that reads a whole configuration.
"""

import dataclasses
import functools
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fsdfm_jax import io, stages
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data.prepared import PreparedData
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.flow.process import Process
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.ops import attention
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import processes
from fsdfm_jax.stages.base import Stage
from fsdfm_jax.training import checkpoint, optim
from fsdfm_jax.training import recipe as recipe_lib
from fsdfm_jax.training import workdir as workdir_lib
from fsdfm_jax.training.checkpoint import Retention
from fsdfm_jax.training.loop import Settings, check_settings, make_init, train
from fsdfm_jax.training.state import TrainState
from fsdfm_jax.training.workdir import stage_directory


class Entry(NamedTuple):
    """One training run of a pipeline.

    Attributes:
      run: name of the run and its folder; "refine_2" for the second "refine" of the pipeline.
      stage: one of `stages.NAMES`.
      base: folder of the run it starts from, or None for random weights.
    """

    run: str
    stage: str
    base: pathlib.Path | None


class Plan(NamedTuple):
    """A checked pipeline.

    Attributes:
      entries: its runs, in order.
      recipes: run -> recipe, see `recipe.make_recipe`.
      mesh: of the devices of all processes.
    """

    entries: list[Entry]
    recipes: dict[str, dict[str, Any]]
    mesh: Mesh


# --------------------------------------------------------------------------- a working directory
def data_directory(workdir: pathlib.Path, config: ConfigDict) -> pathlib.Path:
    """Folder of the prepared data: `data.directory`, or WORKDIR/data if that is empty."""
    return pathlib.Path(config.data.directory or workdir / "data").expanduser()


def save_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Write config.json."""
    said = {"format": recipe_lib.FORMAT, "code_version": recipe_lib.code_version()}
    io.write_json(workdir / "config.json", said | {"config": config.to_dict()})


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """Read the configuration of a working directory.

    Raises:
      ValueError: if there is none, or it is of another version.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{workdir} is not a working directory of this project (no config.json); "
            "make one with python -m fsdfm_jax.main --config=configs/tiny.py --workdir=DIR."
        )
    stored = io.read_object(path)
    if "format" not in stored:  # before format 3 it was the configuration alone
        runs_there = sorted((workdir / "stages").glob("*"))
        stored = next(filter(None, map(workdir_lib.saved_metadata, runs_there)), {})
    recipe_lib.check_format(workdir, stored)
    config = stored.get("config")
    whole = isinstance(config, dict) and {"pipeline", "data", "model", "eval"} <= config.keys()
    if not whole:
        raise ValueError(
            f"{path} is damaged: it has no configuration. Run the training command again to "
            "rewrite it."
        )
    return ConfigDict(config)


# ----------------------------------------------------------------------- dependencies between runs
def runs(config: ConfigDict) -> list[tuple[str, str]]:
    """Return (run, stage) of each entry of `config.pipeline`, in order.

    Raises:
      ValueError: for an empty pipeline or an unknown stage.
    """
    names = [name.strip() for name in config.pipeline.split(",") if name.strip()]
    if not names:
        raise ValueError(
            f"config.pipeline is empty, got {config.pipeline!r}; expected a comma-separated "
            f"list of {', '.join(stages.NAMES)}."
        )
    result = []
    for i, name in enumerate(names):
        if name not in stages.NAMES:
            raise ValueError(
                f"config.pipeline has the unknown stage {name!r}; expected "
                f"{', '.join(stages.NAMES)}."
            )
        earlier = names[:i].count(name)
        result.append((f"{name}_{earlier + 1}" if earlier else name, name))
    return result


def entries(config: ConfigDict, workdir: pathlib.Path) -> list[Entry]:
    """Return the training runs of `config.pipeline` in order, each with the run it starts from.

    Raises:
      ValueError: for an empty pipeline, an unknown stage, or a few-step stage without base weights.
    """
    result: list[Entry] = []
    for run, name in runs(config):
        result.append(Entry(run, name, _base(run, name, config, workdir, result)))
    return result


def _base(
    run: str, name: str, config: ConfigDict, workdir: pathlib.Path, earlier: Sequence[Entry]
) -> pathlib.Path | None:
    given = config[name].init_from
    if given and run == name:
        return find_run(given, f"{name}.init_from", workdir, earlier)
    flow = [entry for entry in earlier if entry.stage != "autoregressive"]
    if name in stages.FEW_STEP and not flow:
        raise ValueError(
            f"Stage {run!r} needs trained base weights, but no stage comes before it in the "
            f"pipeline ({config.pipeline!r}); put 'pretrain' first, or set {name}.init_from."
        )
    if name in stages.FEW_STEP:
        return stage_directory(workdir, flow[-1].run)
    same = [entry for entry in earlier if entry.stage == name]
    return stage_directory(workdir, same[-1].run) if same else None


def find_run(given: str, key: str, workdir: pathlib.Path, earlier: Sequence[Entry]) -> pathlib.Path:
    """Find the folder of a run named in a configuration.

    Args:
      given: name of a run in this working directory, or the folder of any run.
      key: its config key, for errors.
      workdir: the working directory.
      earlier: earlier entries of the pipeline.

    Raises:
      ValueError: if the run is neither trained nor among `earlier`.
    """
    folder = pathlib.Path(given).expanduser() if "/" in given else stage_directory(workdir, given)
    trained_before = any(stage_directory(workdir, entry.run) == folder for entry in earlier)
    if not trained_before and not workdir_lib.is_trained(folder):
        raise ValueError(
            f"{key}={given!r} is not a trained run: there is no checkpoint in {folder}. Give an "
            "earlier stage of the pipeline, or the folder WORKDIR/stages/RUN of another run."
        )
    return folder


def needed_runs(
    stage: Stage, entry: Entry, workdir: pathlib.Path, earlier: Sequence[Entry]
) -> dict[str, pathlib.Path]:
    """`stage.needs` with folders instead of names.

    Raises:
      ValueError: if a run is neither trained nor among `earlier`.
    """
    folders = {}
    for key, run in stage.needs.items():
        if run == stages.BASE and entry.base is not None:
            folders[key] = entry.base
        else:
            folders[key] = find_run(run, f"{entry.stage}.{key}", workdir, earlier)
    return folders


# ------------------------------------------------------------------------ checks before any work
# The vocabulary doesn't affect the checks or the sharding; it is known only once the text is
# prepared.
_ANY_VOCABULARY = 2


def check(config: ConfigDict, workdir: pathlib.Path) -> Plan:
    """Check everything about the training that can be checked before any work.

    Raises:
      ValueError: if the pipeline can't be trained, or can't resume in this folder.
    """
    if config.model.attention == "cudnn" and not attention.has_cudnn():
        raise ValueError(
            "config.model.attention='cudnn' needs a device with that kernel (NVIDIA, compute "
            "capability 8 or later), and this process has none; set 'auto'."
        )
    pipeline = entries(config, workdir)
    mesh = mesh_lib.make_mesh(config.mesh)
    process = make_process(config, _ANY_VOCABULARY)
    models: dict[pathlib.Path, ModelConfig] = {}
    recipes: dict[pathlib.Path, dict[str, Any]] = {}

    def recipe_of(folder: pathlib.Path) -> dict[str, Any]:
        return recipes.get(folder) or workdir_lib.saved_metadata(folder)["recipe"]

    for i, entry in enumerate(pipeline):
        check_batch(mesh, config, entry.stage)
        try:
            optim.make_optimizer(config.optim, config[entry.stage])
        except ValueError as error:
            raise ValueError(f"config.{entry.stage}.{error}") from None
        check_settings(train_settings(config, entry.stage))
        stage = stages.make_stage(entry.stage, config, process)
        mesh_lib.check_heads(mesh, stage.model.num_heads)
        if mesh.size > 1:
            mesh_lib.state_shardings(mesh, abstract_state(config, entry.stage, _ANY_VOCABULARY))
        if entry.base is not None:
            recipe_lib.check_base(entry.base, stage.model, config.path.to_dict())
        needs = needed_runs(stage, entry, workdir, pipeline[:i])
        for key, folder in needs.items():
            check_needed(folder, models.get(folder), f"{entry.stage}.{key}", stage, config)
        directory = stage_directory(workdir, entry.run)
        models[directory] = stage.model
        recipes[directory] = recipe_lib.make_recipe(
            config.to_dict(),
            entry.stage,
            None if entry.base is None else recipe_of(entry.base),
            [recipe_of(folder) for folder in needs.values()],
        )
        recipe_lib.check_recipe(directory, recipes[directory])
    return Plan(pipeline, {path.name: recipe for path, recipe in recipes.items()}, mesh)


def check_needed(
    folder: pathlib.Path,
    model: ModelConfig | None,
    key: str,
    stage: Stage,
    config: ConfigDict,
) -> None:
    """Check that a run in `stage.needs` is a base model with the same network and process.

    Args:
      folder: of the needed run.
      model: its network if this pipeline trains it; None if it is already trained.
      key: its config key, for errors.
      stage, config: of the run that needs it.

    Raises:
      ValueError: naming the mismatch.
    """
    model = model or ModelConfig(**workdir_lib.saved_metadata(folder)["model"])
    if model.causal or model.conditioning != "none":
        kind = "an autoregressive" if model.causal else "a few-step"
        raise ValueError(
            f"{key} must be a base model, a run of 'pretrain'; {folder} has {kind} model."
        )
    base_model = dataclasses.replace(stage.model, conditioning="none")
    recipe_lib.check_base(folder, base_model, config.path.to_dict())


def check_batch(mesh: Mesh, config: ConfigDict, stage: str) -> None:
    """Raise ValueError unless the micro-batches of a stage shard evenly over the mesh."""
    own = config[stage]
    if own.accumulate < 1 or own.batch_size % own.accumulate:
        raise ValueError(
            f"{stage}.batch_size={own.batch_size} must be a multiple of "
            f"{stage}.accumulate={own.accumulate}: micro-batches have equal numbers of rows."
        )
    part = "" if own.accumulate == 1 else f" / {stage}.accumulate ({own.accumulate})"
    rows = own.batch_size // own.accumulate
    mesh_lib.check_batch_size(mesh, rows, f"{stage}.batch_size{part}")


# -------------------------------------------------------------------------------- parts of a run
def run_seed(config: ConfigDict, run: str) -> int:
    """Seed of all randomness in a run, in [0, 2^32)."""
    return zlib.crc32(f"{config.seed}/{run}".encode())


def make_process(config: ConfigDict, num_tokens: int, eos_id: int = 0) -> Process:
    """Make the noising process over the tokens of a text."""
    return process_lib.make_process(**config.path, num_tokens=num_tokens, eos_id=eos_id)


def train_settings(config: ConfigDict, stage: str) -> Settings:
    """Return the static settings of a stage's training."""
    retention = Retention(
        keep=config.train.keep_checkpoints,
        keep_every=config.train.keep_every,
        keep_best=config.train.keep_best,
        metric=config.train.best_metric,
    )
    return Settings(
        num_steps=config[stage].num_steps,
        batch_size=config[stage].batch_size,
        log_every=config.train.log_every,
        checkpoint_every=config.train.checkpoint_every,
        retention=retention,
        ema_decay=config[stage].ema_decay,
        accumulate=config[stage].accumulate,
        max_skipped=config.optim.max_skipped,
        watchdog_minutes=config.train.watchdog_minutes,
        wandb=config.train.wandb,
    )


def abstract_state(config: ConfigDict, stage: str, num_tokens: int) -> TrainState:
    """Return the shapes of the training state of a stage."""
    made = stages.make_stage(stage, config, make_process(config, num_tokens))
    optimizer = optim.make_optimizer(config.optim, config[stage])
    turns = optim.make_turns(config.optim, config[stage], made)
    init = make_init(made, optimizer, train_settings(config, stage), turns)
    base = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), made.model))
    return jax.eval_shape(init, jax.random.key(0), base)


def sharding_report(config: ConfigDict, plan: Plan) -> Iterator[str]:
    """Yield a report of how the state of each run is sharded over the mesh."""
    num_tokens = prepared_lib.vocab_size(prepared_lib.DataSpec.from_config(config.data))
    for entry in plan.entries:
        state = abstract_state(config, entry.stage, num_tokens)
        yield f"{entry.run}: {mesh_lib.report(plan.mesh, state)}"


# ----------------------------------------------------------------------------------------- training
def prepare(config: ConfigDict, workdir: pathlib.Path) -> PreparedData:
    """Prepare the text in the first process and open it in all."""
    place = data_directory(workdir, config)
    if processes.is_first():
        prepared = prepared_lib.prepare(prepared_lib.DataSpec.from_config(config.data), place)
        processes.barrier("data")
        return prepared
    processes.barrier("data")
    return prepared_lib.load(place)


def train_all(
    config: ConfigDict, plan: Plan, prepared: PreparedData, workdir: pathlib.Path
) -> None:
    """Train the runs of a pipeline to completion; finished ones take a moment."""
    tokenizer = prepared.tokenizer
    process = make_process(config, tokenizer.vocab_size, tokenizer.eos_id)
    for i, entry in enumerate(plan.entries):
        stage = stages.make_stage(entry.stage, config, process)
        needs = needed_runs(stage, entry, workdir, plan.entries[:i])
        train_run(
            entry,
            stage,
            needs,
            plan.recipes[entry.run],
            config,
            prepared=prepared,
            mesh=plan.mesh,
            directory=stage_directory(workdir, entry.run),
        )


def train_run(
    entry: Entry,
    stage: Stage,
    needs: Mapping[str, pathlib.Path],
    recipe: Mapping[str, Any],
    config: ConfigDict,
    *,
    prepared: PreparedData,
    mesh: Mesh,
    directory: pathlib.Path,
) -> None:
    """Train one run of a pipeline to completion, resuming from its newest checkpoint.

    `needs` are the folders from `needed_runs`; their weights are read only if steps remain.
    """
    own = config[entry.stage]
    if not config.optim.clip_norm:
        logging.info("%s: no gradient clipping (config.optim.clip_norm=0).", entry.run)
    tokenizer = prepared.tokenizer.fingerprint
    recipe_lib.check_data(directory, tokenizer=tokenizer, data=prepared.fingerprint)
    checkpoints = directory / "checkpoints"
    (saved,) = processes.from_first(lambda: [checkpoint.latest_step(checkpoints) or 0])
    finished = saved >= own.num_steps

    def load(folder: pathlib.Path) -> model_lib.Params:
        return workdir_lib.load_weights(folder, tokenizer=tokenizer, mesh=mesh).params

    def load_base() -> model_lib.Params | None:
        if entry.base is None:
            return None
        # When resuming, the base isn't used: its shapes are enough.
        return workdir_lib.weight_shapes(entry.base) if saved else load(entry.base)

    needed = {} if finished else {key: load(folder) for key, folder in needs.items()}
    train(
        stage,
        train_settings(config, entry.stage),
        name=entry.run,
        optimizer=optim.make_optimizer(config.optim, own),
        turns=optim.make_turns(config.optim, own, stage),
        batches=functools.partial(_text_batches, config, entry, prepared, mesh),
        base=load_base(),
        needed=needed,
        key=jax.random.key(run_seed(config, entry.run)),
        mesh=mesh,
        directory=directory,
        metadata=recipe_lib.make_metadata(
            config.to_dict(),
            stage.model,
            recipe,
            run=entry.run,
            stage=entry.stage,
            tokenizer=tokenizer,
            data=prepared.fingerprint,
        ),
    )


def _text_batches(
    config: ConfigDict, entry: Entry, prepared: PreparedData, mesh: Mesh, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield this process's rows of a run's batches from step `start` on."""
    batch_size = config[entry.stage].batch_size
    batches = prepared_lib.Batches(
        prepared.source("train"),
        batch_size=batch_size,
        seed=run_seed(config, entry.run),
        rows=mesh_lib.local_rows(mesh, batch_size),
    )
    for x1_BL in batches.iterate(start):
        yield {"x1": x1_BL}
