"""The main job: `python -m fsdfm_jax.main --config=configs/tiny.py --workdir=DIR`.

Prepares the text, trains every stage of `config.pipeline`, and ends with a table of quality against
steps in WORKDIR/report. Killed at any moment, the same command goes on where it was.
"""

import contextlib
import pathlib
import time

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from fsdfm_jax import cli, extras
from fsdfm_jax.data.prepared import PreparedData
from fsdfm_jax.evaluate import models as models_lib
from fsdfm_jax.evaluate import plan as plan_lib
from fsdfm_jax.evaluate import references
from fsdfm_jax.evaluate import run as run_lib
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import processes
from fsdfm_jax.training import lock, pipeline
from fsdfm_jax.training.pipeline import Plan

_CONFIG = cli.define_config("Configuration, configs/tiny.py.")
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


def check(config: ConfigDict, folder: pathlib.Path) -> Plan:
    """Everything that can be refused before any work is done.

    Raises:
      ValueError: for a config that can't be run, or can't go on in this folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--workdir={folder} is a file; expected a folder, or a new name.")
    if config.train.wandb:
        extras.check("wandb", "config.train.wandb")
    runs = [run for run, _ in pipeline.runs(config)]
    settings = plan_lib.Settings.from_config(config.eval)
    run_lib.check_inputs(settings, config.data.block_length)
    models_lib.join(dict.fromkeys(runs), models_lib.parse_models(settings.models))
    return pipeline.check(config, folder)


def with_places(config: ConfigDict) -> ConfigDict:
    """The same, with the folder of the text as it holds wherever it is read."""
    if config.data.directory:
        config.data.directory = str(pathlib.Path(config.data.directory).expanduser().absolute())
    return config


def evaluate(config: ConfigDict, plan: Plan, folder: pathlib.Path, prepared: PreparedData) -> str:
    """Write WORKDIR/report, return its table as text; by one process, on its own devices."""
    settings = plan_lib.Settings.from_config(config.eval)
    trained = {entry.run: entry.stage for entry in plan.entries}
    catalogue = models_lib.catalogue(folder, trained, settings.models)
    header = {"run": folder.absolute().name, "config": config.to_dict()}
    header["data"] = prepared.manifest
    with mesh_lib.use(mesh_lib.local_mesh()):
        return run_lib.evaluate(settings, catalogue, prepared, folder / "report", header=header)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    began = time.monotonic()
    if _DISTRIBUTED.value:
        processes.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    config, folder = _CONFIG.value, pathlib.Path(_WORKDIR.value).expanduser()
    config = with_places(config)
    plan = check(config, folder)
    if _PRINT_SHARDING.value:
        if processes.is_first():
            for report in pipeline.sharding_report(config, plan):
                print(f"{report}\n")
        return
    logging.info(
        "Devices: %d x %s in %d process(es).",
        jax.device_count(),
        jax.devices()[0].device_kind,
        jax.process_count(),
    )
    extras.check("train", "Training")
    with contextlib.ExitStack() as stack:

        def take() -> list[int]:
            stack.enter_context(lock.only_writer(folder))
            return []

        processes.from_first(take)
        run(config, plan, folder)
        if processes.is_first():
            print(f"Done in {(time.monotonic() - began) / 60:.1f} minutes.")
        processes.barrier("done")


def run(config: ConfigDict, plan: Plan, folder: pathlib.Path) -> None:
    """Everything from the text to the report, in a folder that no other job writes into."""
    prepared = pipeline.prepare(config, folder)
    if _EVALUATE.value:
        references.check(
            prepared.num_blocks("validation"), plan_lib.Settings.from_config(config.eval)
        )
    if processes.is_first():
        pipeline.save_config(folder, config)
    pipeline.train_all(config, plan, prepared, folder)
    if processes.is_first() and _EVALUATE.value:
        print(evaluate(config, plan, folder, prepared))
        print(f"\nReport: {folder / 'report' / 'report.html'}, with its data beside it.")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(
        main, kept="checkpoints and finished points are kept; the same command goes on from there"
    )
