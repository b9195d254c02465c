"""The main job: `python -m fsdfm_jax.main --config=configs/tiny.py --workdir=DIR`.

Prepares the text, trains every stage of `config.pipeline`, and evaluates quality against steps in
WORKDIR/report. After a kill at any moment, run the same command to resume.
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
_EVALUATE = flags.DEFINE_bool("evaluate", True, "Evaluate after training.")
_PRINT_SHARDING = flags.DEFINE_bool(
    "print_sharding", False, "Print the sharding of each array of the training state, and exit."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Multi-process job; start every process with this command."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, if JAX doesn't detect the cluster."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes; with --coordinator."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Index of this process; with --coordinator.")


def check(config: ConfigDict, folder: pathlib.Path) -> Plan:
    """Check everything that can be checked before any work.

    Raises:
      ValueError: for a config that can't run, or can't resume in this folder.
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
    """Make the folder of the text absolute, for use from other directories."""
    if config.data.directory:
        config.data.directory = str(pathlib.Path(config.data.directory).expanduser().absolute())
    return config


def evaluate(config: ConfigDict, plan: Plan, folder: pathlib.Path, prepared: PreparedData) -> str:
    """Write WORKDIR/report and return its table as text; in one process, on its devices."""
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
    """Do everything from text to report, in a locked folder."""
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
        print(f"\nReport: {folder / 'report' / 'report.html'}, with data files beside it.")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main, kept="checkpoints and finished points are kept; run the same command to resume")
