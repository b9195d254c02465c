"""The paper's 1.7B network and recipe (arXiv:2509.20624): pre-training, then distillation.

python -m fsdfm_jax.main --config=configs/paper_1b7.py --workdir=DIR --config.data.corpus=GLOB
"""

from configs import base


def get_config(arg: str = ""):
    config = base.get_config(arg)
    base.use_paper_values(config, "1.7B")
    base.use_paper_recipe(config)
    return config
