"""The model that comes with the package: hours on 2 CPU cores, or minutes on one large GPU.

python -m fsdfm_jax.main --config=configs/shipped.py --workdir=runs/shipped
python -m launch.ship runs/shipped
python -m fsdfm_jax.main --config=configs/shipped.py:gpu --workdir=runs/shipped_gpu

The base model and its judge are those of configs/quality.py, the few steps its recipe `guided`,
trained for longer.
"""

import ml_collections

from configs import quality

_STEPS = {"cpu": 1_000, "gpu": 3_000, "smoke": 20}  # of `distill`


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    name = arg or "cpu"
    if name not in _STEPS:
        raise ValueError(f"configs/shipped.py takes one of {', '.join(_STEPS)}, got {arg!r}")
    base = quality.get_config(f"base,{name}")
    config = quality.get_config(f"guided,{name}")
    config.pipeline = f"{base.pipeline},{config.pipeline}"
    for stage in ("autoregressive", "pretrain"):
        config[stage] = base[stage]
    config.train = base.train
    config.distill.num_steps = _STEPS[name]
    config.distill.warmup_steps = _STEPS[name] // 40
    config.distill.ema_decay = 0.995
    config.eval.update(quality.SAMPLERS["tuned"])
    return config
