r"""First few-step stage alone, from weights trained elsewhere, at one of the paper's sizes.

    python -m fsdfm_jax.main --config=configs/step_aware.py:0.17B --workdir=DIR \
        --config.step_aware.init_from=OTHER_DIR/stages/pretrain
"""

from configs import base


def get_config(arg: str = "0.17B"):
    config = base.get_config()
    base.use_paper_values(config, arg)
    config.pipeline = "step_aware"
    return config
