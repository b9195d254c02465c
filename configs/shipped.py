"""The model that comes with the package: two hours on 2 CPU cores.

python -m fsdfm_jax.main --config=configs/shipped.py --workdir=runs/shipped
python -m launch.ship runs/shipped
"""

import ml_collections

from configs import tiny


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/shipped.py takes no argument, got {arg!r}")
    config = tiny.get_config()
    config.pipeline = "pretrain,autoregressive,distill"
    config.pretrain.num_steps = 8_000
    config.autoregressive.num_steps = 3_000
    distill = config.distill
    distill.num_steps = 2_000
    distill.learning_rate = 3e-4  # a tenth of the base model's: it has been annealed
    distill.warmup_steps = 50
    distill.ema_decay = 0.995
    config.eval.few_step_jump = "mixture"
    config.eval.jumps = ("mixture",)
    # A nucleus costs less perplexity than a temperature does at the same entropy.
    config.eval.top_p = 0.8
    return config
