"""The runs of `config.pipeline`: which starts from which, what each is refused for, its training.

The one module of the training that reads a whole configuration.
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
      run: its name and folder, "refine_2" for the second time the pipeline names "refine".
      stage: one of `stages.NAMES`.
      base: folder of the run it starts from, or None for random weights.
    """

    run: str
    stage: str
    base: pathlib.Path | None


class Plan(NamedTuple):
    """A pipeline that was checked.

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
    """Folder of the prepared data: `data.directory`, or WORKDIR/data where that is empty."""
    return pathlib.Path(config.data.directory or workdir / "data").expanduser()


def save_config(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Write config.json."""
    said = {"format": recipe_lib.FORMAT, "code_version": recipe_lib.code_version()}
    io.write_json(workdir / "config.json", said | {"config": config.to_dict()})


def load_config(workdir: pathlib.Path) -> ConfigDict:
    """The configuration of a working directory.

    Raises:
      ValueError: if the directory holds none, or that of another version.
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
            f"{path} is damaged: it holds no configuration. Run the training command again, which "
            "writes it anew."
        )
    return ConfigDict(config)


# ------------------------------------------------------------------------- which run follows which
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


def _base(
    run: str, name: str, config: ConfigDict, workdir: pathlib.Path, earlier: Sequence[Entry]
) -> pathlib.Path | None:
    given = config[name].init_from
    if given and run == name:
        return find_run(given, f"{name}.init_from", workdir, earlier)
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


def find_run(given: str, key: str, workdir: pathlib.Path, earlier: Sequence[Entry]) -> pathlib.Path:
    """Folder of a run that a configuration names.

    Args:
      given: a run of this working directory by its name, or the folder of any run.
      key: that gives it, for errors.
      workdir: the working directory.
      earlier: entries of the pipeline that will have been trained.

    Raises:
      ValueError: if it is neither trained nor among `earlier`.
    """
    folder = pathlib.Path(given).expanduser() if "/" in given else stage_directory(workdir, given)
    trained_before = any(stage_directory(workdir, entry.run) == folder for entry in earlier)
    if not trained_before and not workdir_lib.is_trained(folder):
        raise ValueError(
            f"{key}={given!r} names no trained run: there is no checkpoint in {folder}. Give a "
            "stage that stands earlier in the pipeline, or the folder WORKDIR/stages/RUN of "
            "another run."
        )
    return folder


def needed_runs(
    stage: Stage, entry: Entry, workdir: pathlib.Path, earlier: Sequence[Entry]
) -> dict[str, pathlib.Path]:
    """`stage.needs` with the folders of the runs in place of their names.

    Raises:
      ValueError: if one is neither trained nor among `earlier`.
    """
    folders = {}
    for key, run in stage.needs.items():
        if run == stages.BASE and entry.base is not None:
            folders[key] = entry.base
        else:
            folders[key] = find_run(run, f"{entry.stage}.{key}", workdir, earlier)
    return folders


# ------------------------------------------------------------------------ refused before any work
# Token ids don't matter to what is checked, nor to what is sharded; the tokenizer is only known
# once the text is prepared.
_ANY_VOCABULARY = 2


def check(config: ConfigDict, workdir: pathlib.Path) -> Plan:
    """Everything about the training that can be refused before any work is done.

    Raises:
      ValueError: for a pipeline that can't be trained, or can't be resumed in this folder.
    """
    if config.model.attention == "cudnn" and not attention.has_cudnn():
        raise ValueError(
            "config.model.attention='cudnn' needs a device with that kernel (NVIDIA's, of compute "
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
        optim.make_optimizer(config.optim, config[entry.stage])
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
    """Refuse what `stage.needs` names unless it is a base model of the same network and process.

    Args:
      folder: of the run that is needed.
      model: its network where this pipeline trains it; None where it is trained.
      key: that names it, for errors.
      stage, config: of the run that needs it.

    Raises:
      ValueError: saying what it is.
    """
    model = model or ModelConfig(**workdir_lib.saved_metadata(folder)["model"])
    if model.causal or model.conditioning != "none":
        kind = "an autoregressive" if model.causal else "a few-step"
        raise ValueError(
            f"{key} must name a base model, a run of 'pretrain'; {folder} holds {kind} model."
        )
    base_model = dataclasses.replace(stage.model, conditioning="none")
    recipe_lib.check_base(folder, base_model, config.path.to_dict())


def check_batch(mesh: Mesh, config: ConfigDict, stage: str) -> None:
    """ValueError unless the parts of a stage's batch spread evenly over the mesh."""
    own = config[stage]
    if own.accumulate < 1 or own.batch_size % own.accumulate:
        raise ValueError(
            f"{stage}.batch_size={own.batch_size} must be a multiple of "
            f"{stage}.accumulate={own.accumulate}: its parts have the same number of rows."
        )
    part = "" if own.accumulate == 1 else f" / {stage}.accumulate ({own.accumulate})"
    rows = own.batch_size // own.accumulate
    mesh_lib.check_batch_size(mesh, rows, f"{stage}.batch_size{part}")


# -------------------------------------------------------------------------------- what a run is of
def run_seed(config: ConfigDict, run: str) -> int:
    """Seed of everything random in a run, in [0, 2^32)."""
    return zlib.crc32(f"{config.seed}/{run}".encode())


def make_process(config: ConfigDict, num_tokens: int, eos_id: int = 0) -> Process:
    """The noising process over the tokens of a text."""
    return process_lib.make_process(**config.path, num_tokens=num_tokens, eos_id=eos_id)


def train_settings(config: ConfigDict, stage: str) -> Settings:
    """The static numbers of a stage's training."""
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
    """Shapes of the training state of a stage."""
    made = stages.make_stage(stage, config, make_process(config, num_tokens))
    optimizer = optim.make_optimizer(config.optim, config[stage])
    turns = optim.make_turns(config.optim, config[stage], made)
    init = make_init(made, optimizer, train_settings(config, stage), turns)
    base = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), made.model))
    return jax.eval_shape(init, jax.random.key(0), base)


def sharding_report(config: ConfigDict, plan: Plan) -> Iterator[str]:
    """Where the state of each run would be on the mesh, as text."""
    num_tokens = prepared_lib.vocab_size(prepared_lib.DataSpec.from_config(config.data))
    for entry in plan.entries:
        state = abstract_state(config, entry.stage, num_tokens)
        yield f"{entry.run}: {mesh_lib.report(plan.mesh, state)}"


# ----------------------------------------------------------------------------------------- training
def prepare(config: ConfigDict, workdir: pathlib.Path) -> PreparedData:
    """The prepared text, made by the first process and read by all."""
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
    """Train the runs of a pipeline, each up to its end; those that are finished take a moment."""
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
    """Train one run of a pipeline up to its end, from its newest checkpoint if there is one.

    `needs` are the folders of `needed_runs`; their weights are only read where steps are left.
    """
    own = config[entry.stage]
    if not config.optim.clip_norm:
        logging.info("%s: gradients aren't clipped (config.optim.clip_norm is off).", entry.run)
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
        # A saved state has all that mattered of the base: then its shapes are enough.
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
    """Batches of a run from step `start` on, this process's rows of them."""
    batch_size = config[entry.stage].batch_size
    batches = prepared_lib.Batches(
        prepared.source("train"),
        batch_size=batch_size,
        seed=run_seed(config, entry.run),
        rows=mesh_lib.local_rows(mesh, batch_size),
    )
    for x1_BL in batches.iterate(start):
        yield {"x1": x1_BL}
