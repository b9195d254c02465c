"""Autoregressive baseline alone, at one of the paper's sizes.

python -m fsdfm_jax.main --config=configs/autoregressive.py:0.17B --workdir=DIR
"""

from configs import base


def get_config(arg: str = "0.17B"):
    config = base.get_config()
    base.use_paper_values(config, arg)
    config.pipeline = "autoregressive"
    return config
