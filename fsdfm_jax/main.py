"""The main job: `python -m fsdfm_jax.main --config=configs/tiny.py --workdir=DIR`.

Prepares the text, trains every stage of `config.pipeline`, and ends with a table of quality against
steps in WORKDIR/report. Killed at any moment, the same command goes on where it was.
"""

import contextlib
import functools
import pathlib
import shutil
import time
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from fsdfm_jax import cli, io, stages
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data.prepared import PreparedData
from fsdfm_jax.evaluate import models as models_lib
from fsdfm_jax.evaluate import plan as plan_lib
from fsdfm_jax.evaluate import references
from fsdfm_jax.evaluate import run as run_lib
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.flow.process import Process
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import processes
from fsdfm_jax.stages import refine
from fsdfm_jax.training import checkpoint, optim
from fsdfm_jax.training import recipe as recipe_lib
from fsdfm_jax.training.checkpoint import Retention
from fsdfm_jax.training.loop import Settings, check_settings, make_init, train
from fsdfm_jax.training.metrics import Progress
from fsdfm_jax.training.recipe import Entry
from fsdfm_jax.training.state import TrainState

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, configs/tiny.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for data, checkpoints and report.")
_EVALUATE = flags.DEFINE_bool("evaluate", True, "End with the result table.")
_PRINT_SHARDING = flags.DEFINE_bool(
    "print_sharding", False, "Say where each array of the training state would lie, and end."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, each started with this command."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where JAX doesn't know the cluster itself."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the job; as --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process; as --coordinator.")


def run_seed(config: ConfigDict, run: str) -> int:
    """Seed of everything random in a run, in [0, 2^32)."""
    return zlib.crc32(f"{config.seed}/{run}".encode())


def batch_stream(
    entry: Entry,
    config: ConfigDict,
    process: Process,
    prepared: PreparedData,
    mesh: Mesh,
    pairs: Callable[[], tuple[np.ndarray, np.ndarray]],
    start: int,
) -> Iterator[dict[str, np.ndarray]]:
    """A run's batches from step `start` on, this process's rows of them.

    `pairs` gives those of `make_pairs`, where the stage is `refine`.
    """
    own = config[entry.stage]
    seed = run_seed(config, entry.run)
    rows = mesh_lib.local_rows(mesh, own.batch_size)
    coupled = entry.stage == "refine"
    real = prepared_lib.Batches(
        prepared.source("train"),
        batch_size=own.batch_size,
        seed=seed,
        # Coupled rows are put in random order, which needs all of them.
        rows=None if coupled else rows,
    )
    if not coupled:
        for x1_BL in real.iterate(start):
            yield {"x1": x1_BL}
        return
    made = pairs()
    for step, x1_BL in enumerate(real.iterate(start), start):
        batch = refine.mix_real(
            made,
            x1_BL,
            source_size=process.source.vocab_size,
            real_fraction=own.real_fraction,
            seed=seed,
            step=step,
        )
        yield {name: tokens_BL[rows] for name, tokens_BL in batch.items()}


def make_pairs(
    entry: Entry,
    config: ConfigDict,
    process: Process,
    prepared: PreparedData,
    mesh: Mesh,
    folder: pathlib.Path,
) -> tuple[np.ndarray, np.ndarray]:
    """The (x0, x1) pairs of a run of `refine`, int [N, L] each, made by the run it starts from.

    They are written part by part, so that a killed run loses one part at most; pairs made by other
    weights or settings are made anew.
    """
    settings = refine.read_pair_settings(config.refine)
    place = recipe_lib.stage_directory(folder, entry.run) / "pairs"
    step, metadata = recipe_lib.weights_metadata(entry.base, together=True)
    made_from = {
        "seed": config.seed,
        "settings": settings._asdict() | {"sampling": settings.sampling.to_dict()},
        "generator": [recipe_lib.digest(metadata["recipe"]), step],
        "data": prepared.fingerprint,
    }
    stamp = place / "made_from.json"
    parts = [place / f"{part:05d}.npy" for part in range(settings.num_pairs // settings.batch_size)]

    def look() -> list[int]:
        if not (stamp.is_file() and io.read_json(stamp) == made_from):
            if place.exists():
                shutil.rmtree(place)  # all of it, or it would pass for what is made now
            io.write_json(stamp, made_from)
        return [number for number, part in enumerate(parts) if not part.is_file()]

    if missing := processes.from_first(look):
        fingerprint = prepared.tokenizer.fingerprint
        generator = recipe_lib.load_weights(entry.base, tokenizer=fingerprint, mesh=mesh, step=step)
        run = refine.make_pair_sampler(
            generator.model,
            process,
            settings,
            length=prepared.block_length,
            sharding=mesh_lib.whole(mesh),
        )
        key = jax.random.key(run_seed(config, f"{entry.run}/pairs"))
        with (
            jax.set_mesh(mesh),
            Progress(f"{entry.run}: making pairs", total=settings.num_pairs)
            if processes.is_first()
            else contextlib.nullcontext() as progress,
        ):
            if progress:
                progress.advance((len(parts) - len(missing)) * settings.batch_size)
            for part in missing:
                pair = run(generator.params, jax.random.fold_in(key, part))
                if progress:
                    io.write_array(parts[part], np.stack(pair).astype(np.int32))
                    progress.advance(settings.batch_size)
    processes.barrier(f"{entry.run}/pairs")
    made = [np.load(part) for part in parts]
    return tuple(np.concatenate(side) for side in zip(*made, strict=True))


def train_settings(config: ConfigDict, stage: str) -> Settings:
    """The static numbers of a stage's training.

    Raises:
      ValueError: for checkpoints that can't be chosen so.
    """
    try:
        retention = Retention(
            keep=config.train.keep_checkpoints,
            keep_every=config.train.keep_every,
            keep_best=config.train.keep_best,
            metric=config.train.best_metric,
        )
    except ValueError as error:
        raise ValueError(
            f"train.keep_checkpoints, keep_every, keep_best, best_metric: {error}."
        ) from None
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
    )


def train_run(
    entry: Entry,
    recipe: dict,
    config: ConfigDict,
    process: Process,
    prepared: PreparedData,
    mesh: Mesh,
    folder: pathlib.Path,
) -> None:
    """Trains one entry of the pipeline, or finds that it is finished."""
    own = config[entry.stage]
    directory = recipe_lib.stage_directory(folder, entry.run)
    recipe_lib.check_data(
        directory, tokenizer=prepared.tokenizer.fingerprint, data=prepared.fingerprint
    )
    stage = stages.make_stage(entry.stage, config, process)
    checkpoints = directory / "checkpoints"
    (saved,) = processes.from_first(lambda: [checkpoint.latest_step(checkpoints) or 0])
    # Made before there is a training state beside what makes them; a finished run needs none.
    pairs = functools.cache(lambda: make_pairs(entry, config, process, prepared, mesh, folder))
    if entry.stage == "refine" and saved < own.num_steps:
        pairs()

    def load_base():
        if entry.base is None:
            return None
        if saved:  # its weights hold all that mattered of the base; don't read it again
            return recipe_lib.weight_shapes(entry.base)
        fingerprint = prepared.tokenizer.fingerprint
        return recipe_lib.load_weights(entry.base, tokenizer=fingerprint, mesh=mesh).params

    def load_guide():
        if not stage.guided or saved >= own.num_steps:
            return None
        guide, guide_config = recipe_lib.guide_run(entry, config)
        guide_recipe = recipe_lib.recipe(guide_config, guide, None)
        train_run(guide, guide_recipe, guide_config, process, prepared, mesh, folder)
        load = functools.partial(
            recipe_lib.load_weights, tokenizer=prepared.tokenizer.fingerprint, mesh=mesh
        )
        weak = load(recipe_lib.stage_directory(folder, guide.run)).params
        return stages.Guide(load(entry.base).params, weak)

    def batches(start: int) -> Iterator[dict[str, np.ndarray]]:
        return batch_stream(entry, config, process, prepared, mesh, pairs, start)

    train(
        stage,
        train_settings(config, entry.stage),
        name=entry.run,
        optimizer=optim.make_optimizer(config.optim, own),
        batches=batches,
        guide=load_guide(),  # which may train, before there is anything else
        base=load_base(),
        key=jax.random.key(run_seed(config, entry.run)),
        mesh=mesh,
        directory=directory,
        metadata=recipe_lib.make_metadata(
            config,
            entry,
            stage.model,
            the_recipe=recipe,
            tokenizer=prepared.tokenizer.fingerprint,
            data=prepared.fingerprint,
        ),
    )


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


def abstract_state(config: ConfigDict, stage: str, num_tokens: int) -> TrainState:
    """Shapes of the training state of a stage."""
    process = process_lib.make_process(**config.path, num_tokens=num_tokens, eos_id=0)
    made = stages.make_stage(stage, config, process)
    optimizer = optim.make_optimizer(config.optim, config[stage])
    init = make_init(made, optimizer, train_settings(config, stage))
    base = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), made.model))
    return jax.eval_shape(init, jax.random.key(0), base)


def print_sharding(config: ConfigDict, pipeline: list[Entry], mesh: Mesh) -> None:
    """Prints where the state of each stage would lie on the mesh."""
    num_tokens = prepared_lib.vocab_size(prepared_lib.DataSpec.from_config(config.data))
    for entry in pipeline:
        report = mesh_lib.report(mesh, abstract_state(config, entry.stage, num_tokens))
        print(f"{entry.run}: {report}\n")


# Token ids don't matter to what is checked, nor to what is spread; the tokenizer is only known once
# the text is prepared.
_ANY_VOCABULARY = 2


def check(config: ConfigDict, folder: pathlib.Path) -> tuple[list[Entry], dict[str, dict], Mesh]:
    """Everything that can be refused before any work is done.

    Returns:
      The entries of the pipeline, the recipe of each run, and the mesh.

    Raises:
      ValueError: for a config that can't be run, or can't go on in this folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--workdir={folder} is a file; expected a folder, or a new name.")
    pipeline = recipe_lib.entries(config, folder)
    settings = plan_lib.Settings.from_config(config.eval)
    run_lib.check_inputs(settings, config.data.block_length)
    models_lib.join(
        {entry.run: entry for entry in pipeline}, models_lib.parse_models(settings.models)
    )
    mesh = mesh_lib.make_mesh(config.mesh)
    process = process_lib.make_process(**config.path, num_tokens=_ANY_VOCABULARY, eos_id=0)
    recipes: dict[pathlib.Path, dict] = {}
    trained_here = {recipe_lib.stage_directory(folder, e.run): e.stage for e in pipeline}
    for entry in pipeline:
        check_run(entry, config, mesh)
        stage = stages.make_stage(entry.stage, config, process)
        mesh_lib.check_heads(mesh, stage.model.num_heads)
        if mesh.size > 1:
            mesh_lib.state_shardings(mesh, abstract_state(config, entry.stage, _ANY_VOCABULARY))
        base = None
        if entry.base is not None:
            base = recipes.get(entry.base) or recipe_lib.saved_metadata(entry.base)["recipe"]
            recipe_lib.check_base(entry.base, stage.model, config)
        if stage.guided:
            recipe_lib.check_guided(entry, trained_here.get(entry.base))
            check_guide(entry, config, mesh, folder)
        directory = recipe_lib.stage_directory(folder, entry.run)
        recipes[directory] = recipe_lib.recipe(config, entry, base)
        recipe_lib.check_recipe(directory, recipes[directory])
    return pipeline, {path.name: recipe for path, recipe in recipes.items()}, mesh


def check_run(entry: Entry, config: ConfigDict, mesh: Mesh) -> None:
    """The part of `check` that is the same for runs of the pipeline and their guides."""
    check_batch(mesh, config, entry.stage)
    optim.make_optimizer(config.optim, config[entry.stage])
    check_settings(train_settings(config, entry.stage))


def check_guide(entry: Entry, config: ConfigDict, mesh: Mesh, folder: pathlib.Path) -> None:
    """As `check`, of the run that a guided one needs besides its base."""
    guide, own = recipe_lib.guide_run(entry, config)
    check_run(guide, own, mesh)
    recipe_lib.check_recipe(
        recipe_lib.stage_directory(folder, guide.run), recipe_lib.recipe(own, guide, None)
    )


def evaluate(
    config: ConfigDict,
    pipeline: list[Entry],
    folder: pathlib.Path,
    prepared: PreparedData,
) -> str:
    """Writes WORKDIR/report, returns its table as text; by one process, on its own devices."""
    settings = plan_lib.Settings.from_config(config.eval)
    trained = {entry.run: entry.stage for entry in pipeline}
    catalogue = models_lib.catalogue(folder, trained, settings.models)
    header = {"config": config.to_dict(), "data": prepared.manifest}
    with mesh_lib.use(mesh_lib.local_mesh()):
        return run_lib.evaluate(settings, catalogue, prepared, folder / "report", header=header)


def prepare(config: ConfigDict, folder: pathlib.Path) -> PreparedData:
    """The prepared text, made by the first process and read by all."""
    spec = prepared_lib.DataSpec.from_config(config.data)
    place = recipe_lib.data_directory(folder, config)
    if processes.is_first():
        prepared = prepared_lib.prepare(spec, place)
        processes.barrier("data")
        return prepared
    processes.barrier("data")
    return prepared_lib.load(place)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    began = time.monotonic()
    if _DISTRIBUTED.value:
        processes.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    config, folder = _CONFIG.value, pathlib.Path(_WORKDIR.value).expanduser()
    pipeline, recipes, mesh = check(config, folder)
    if _PRINT_SHARDING.value:
        if processes.is_first():
            print_sharding(config, pipeline, mesh)
        return
    logging.info(
        "Devices: %d x %s in %d process(es).",
        jax.device_count(),
        jax.devices()[0].device_kind,
        jax.process_count(),
    )
    prepared = prepare(config, folder)
    if _EVALUATE.value:
        references.check(
            prepared.num_blocks("validation"), plan_lib.Settings.from_config(config.eval)
        )
    if processes.is_first():
        recipe_lib.save_config(folder, config)
    process = process_lib.make_process(
        **config.path, num_tokens=prepared.tokenizer.vocab_size, eos_id=prepared.tokenizer.eos_id
    )
    for entry in pipeline:
        train_run(entry, recipes[entry.run], config, process, prepared, mesh, folder)
    if processes.is_first():
        if _EVALUATE.value:
            print(evaluate(config, pipeline, folder, prepared))
            print(f"\nReport: {folder / 'report' / 'report.html'}, with its data beside it.")
        print(f"Done in {(time.monotonic() - began) / 60:.1f} minutes.")
    processes.barrier("done")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
