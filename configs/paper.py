r"""The networks of arXiv:2509.20624, by default with its recipe: pre-training, then distillation.

python -m fsdfm_jax.main --config=configs/paper.py:0.17B --workdir=DIR --config.data.corpus=GLOB
python -m fsdfm_jax.main --config=configs/paper.py:1.3B,refine --workdir=DIR \
    --config.refine.init_from=OTHER/stages/distill --config.refine.teacher=OTHER/stages/pretrain

The argument is SIZE or SIZE,STAGE; the sizes are 0.17B, 1.3B and 1.7B. With a stage, only that
stage is trained, with the defaults of configs/base.py.
"""

from configs import base


def get_config(arg: str = "0.17B"):
    size, _, stage = arg.partition(",")
    if size not in base.SIZES or (stage and stage not in base.STAGES):
        raise ValueError(
            f"configs/paper.py takes SIZE or SIZE,STAGE; sizes: {', '.join(base.SIZES)}; stages: "
            f"{', '.join(base.STAGES)}; got {arg!r}"
        )
    config = base.get_config()
    base.use_paper_values(config, size)
    if stage:
        config.pipeline = stage
    else:
        base.use_paper_recipe(config)
        config.path.revealed = "jump"  # no effect with the paper's uniform source
    return config
