"""A sweep: every combination of the axes, sampled and scored.

python -m launch.sweep --config=configs/sweep.py --workdir=runs/tiny            11 x 5 x 3 points
python -m launch.sweep --config=configs/sweep.py:smoke --workdir=runs/smoke     about a minute

Change an axis on the command line, --config.axes.temperatures='(0.9,1.0)', or in a file like this
one. `eval` is as in configs/base.py, except that keys covered by the axes (steps, many_steps,
jumps, memories, sampling, weights) have no effect, and seed is that of the controls. Sampler
settings without an axis are those that `generate` uses for these runs.
"""

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"configs/sweep.py takes no argument or 'smoke', got {arg!r}")
    config = ml_collections.ConfigDict()
    config.name = "sweep"  # folder of the results, WORKDIR/sweeps/NAME

    config.axes = axes = ml_collections.ConfigDict()
    axes.models = ("distill",)  # runs in the working directory or labels of eval.models; (): all
    axes.steps = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # network calls per sample
    axes.temperatures = (0.7, 0.8, 0.9, 1.0, 1.1)
    # An empty axis takes its value from eval.sampling in the runs' configuration, like `generate`.
    axes.jumps = ()  # cumulative | euler | mixture | dispersed
    axes.grids = ()  # uniform | cosine | power:R | geometric:E
    axes.top_ps = ()
    axes.coolings = ()
    axes.look_aheads = ()
    axes.weights = ("ema",)  # ema | student
    axes.seeds = (0, 1, 2)

    config.eval = base.get_config().eval
    config.eval.num_samples = 16
    config.eval.batch_size = 16
    config.eval.watched = 2
    if arg == "smoke":
        axes.steps = (1, 2, 4)
        axes.temperatures = (0.8, 1.0)
        axes.seeds = (0, 1)
        config.eval.num_samples = config.eval.batch_size = 8
    return config
