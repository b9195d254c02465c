r"""Second few-step stage alone, from weights trained elsewhere, at one of the paper's sizes.

    python -m fsdfm_jax.main --config=configs/distill.py:0.17B --workdir=DIR \
        --config.distill.init_from=OTHER_DIR/stages/pretrain
"""

from configs import base


def get_config(arg: str = "0.17B"):
    config = base.get_config()
    base.use_paper_values(config, arg)
    config.pipeline = "distill"
    return config
