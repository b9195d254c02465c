r"""Third few-step stage alone, from weights trained elsewhere, at one of the paper's sizes.

    python -m fsdfm_jax.main --config=configs/refine.py:0.17B --workdir=DIR \
        --config.refine.init_from=OTHER_DIR/stages/pretrain
"""

from configs import base


def get_config(arg: str = "0.17B"):
    config = base.get_config()
    base.use_paper_values(config, arg)
    config.pipeline = "refine"
    return config
