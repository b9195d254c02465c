"""Quality over all combinations of steps, temperatures, jump rules, grids, seeds, models.

    python -m launch.sweep --config=configs/sweep.py --workdir=runs/tiny
    python -m launch.sweep --config=configs/sweep.py --workdir=runs/tiny --host=2/8

Sweeps around the sampler that `generate` uses for these runs, `eval.sampling` of their
configuration: an axis that is () has its value.

Writes WORKDIR/sweeps/NAME: a line of JSON in points.jsonl as each point is finished, its samples
beside it, and the report of all that is finished at the end. Run again, it goes on where it was
killed; what is finished is never lost. With --host=I/N this machine takes every N-th point, from
I = 0 on; all of them write to the same folder and each reports what all have finished.
"""

import pathlib

from absl import app, flags

from fsdfm_jax import cli, extras
from fsdfm_jax.evaluate import models as models_lib
from fsdfm_jax.evaluate import plan as plan_lib
from fsdfm_jax.evaluate import run as run_lib
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.training import pipeline

_CONFIG = cli.define_config("Configuration, configs/sweep.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Working directory of trained runs.")
_HOST = flags.DEFINE_string("host", "0/1", "Which of how many machines this is, as 2/8.")


def parse_host(text: str) -> tuple[int, int]:
    """(index, count) out of "2/8".

    Raises:
      ValueError: unless 0 <= index < count.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--host must be I/N with 0 <= I < N, got {text!r}.")
    return int(index), int(count)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    extras.check("train", "A sweep")
    config, folder = _CONFIG.value, pathlib.Path(_WORKDIR.value).expanduser()
    index, count = parse_host(_HOST.value)
    axes = plan_lib.Axes.from_config(config.axes)
    stored = pipeline.load_config(folder).to_dict()
    around = bundle_lib.read_sampling(stored.get("eval") or {})
    settings = plan_lib.Settings.from_config(config.eval)._replace(sampling=around)
    catalogue = models_lib.open_workdir(folder, settings.models)
    prepared = models_lib.prepared_text(folder)
    directory = folder / "sweeps" / config.name
    with mesh_lib.use(mesh_lib.local_mesh()):
        table = run_lib.evaluate(
            settings,
            catalogue,
            prepared,
            directory,
            make_plan=lambda *rest: plan_lib.sweep(axes, *rest),
            header={
                "run": f"{folder.absolute().name}/{config.name}",
                "config": config.to_dict() | {"around": around.to_dict()},
                "data": prepared.manifest,
            },
            index=index,
            count=count,
        )
    print(table)
    print(f"\nReport: {directory / 'report.html'}, with its data beside it.")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main, kept="finished points are kept; the same command goes on from there")
