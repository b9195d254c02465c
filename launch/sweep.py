"""Evaluate all combinations of models, steps, temperatures, jump rules, grids and seeds.

    python -m launch.sweep --config=configs/sweep.py --workdir=runs/tiny
    python -m launch.sweep --config=configs/sweep.py --workdir=runs/tiny --host=2/8

Settings without an axis, or with the axis (), are those that `generate` uses for these runs:
`eval.sampling` of their configuration.

Writes to WORKDIR/sweeps/NAME: for each finished point a line of JSON in points.jsonl and its
samples; at the end, the report of all finished points. After a kill, the same command resumes, and
no finished point is lost. With --host=I/N this machine computes every N-th point, starting at I
(from 0). All machines write to the same folder, and each reports all finished points.
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

_CONFIG = cli.define_config("Configuration file, e.g. configs/sweep.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Working directory of trained runs.")
_HOST = flags.DEFINE_string("host", "0/1", "Index of this machine / number of machines, e.g. 2/8.")


def parse_host(text: str) -> tuple[int, int]:
    """Parse "2/8" into (index, count).

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
    print(f"\nReport: {directory / 'report.html'}, with data files beside it.")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main, kept="finished points are kept; run the same command to resume")
