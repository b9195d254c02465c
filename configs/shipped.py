"""The model that comes with the package: an hour and a half on 2 CPU cores, or one large GPU.

python -m fsdfm_jax.main --config=configs/shipped.py --workdir=runs/shipped
python -m launch.ship runs/shipped
python -m fsdfm_jax.main --config=configs/shipped.py:gpu --workdir=runs/shipped_gpu

Base model, judge and the recipe for few steps are those of configs/quality.py.
"""

import ml_collections

from configs import quality


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    name = arg or "cpu"
    if name not in quality.SIZES:
        raise ValueError(f"configs/shipped.py takes one of {', '.join(quality.SIZES)}, got {arg!r}")
    config = quality.get_config(f"heun,{name}")
    config.pipeline = f"autoregressive,pretrain,{config.pipeline}"
    config.eval.update(quality.sampler("neighbours", steps=8))
    if name == "cpu":  # where 8 steps have the entropy of the base model's 1,024
        config.eval.temperature = 0.42
    return config
