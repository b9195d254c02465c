"""The paper's 1.3B network and recipe (arXiv:2509.20624): pre-training, then distillation.

python -m fsdfm_jax.main --config=configs/paper_1b3.py --workdir=DIR --config.data.corpus=GLOB
"""

from configs import base


def get_config(arg: str = ""):
    config = base.get_config(arg)
    base.use_paper_values(config, "1.3B")
    base.use_paper_recipe(config)
    return config
