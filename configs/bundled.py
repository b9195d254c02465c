"""The model that comes with the package: a base model of presidential messages, and its judge.

python -m fsdfm_jax.main --config=configs/bundled.py --workdir=runs/bundled

Single-core days rather than minutes: the learning rate is constant, so that the run may be ended
early by another `num_steps`, of which the last `decay_steps` are a decay:

    --config.pretrain.num_steps=12000 --config.pretrain.decay_steps=1500

as long as it stands before step 10,500. The average of the weights is good to sample from before.
"""

from configs import base


def get_config(arg: str = ""):
    if arg:
        raise ValueError(f"configs/bundled.py takes no argument, got {arg!r}")
    config = base.get_config()
    config.pipeline = "pretrain,autoregressive"  # the model first, the judge can wait

    # 2.8 million parameters, 6 MB in bfloat16.
    config.model.width, config.model.num_blocks, config.model.num_heads = 192, 5, 3
    config.model.remat = "dots"
    config.model.dropout = 0.0

    config.optim.name = "muon"
    config.optim.muon_rms = 1.0  # a pilot: 0.6 nats per token better than 0.2, 0.8 than 2.5
    config.optim.weight_decay = 0.1

    pretrain = config.pretrain
    pretrain.loss = "rate_cross_entropy"
    pretrain.rate_floor = 0.1
    pretrain.time_power = 2.0
    for stage in (pretrain, config.autoregressive):
        stage.num_steps = 30_000
        stage.batch_size = 32
        stage.learning_rate = 3e-3
        stage.warmup_steps = 100
        stage.decay_steps = 4_000
        stage.final_lr_fraction = 0.0
        stage.ema_decay = 0.998
    config.autoregressive.num_steps = 4_000
    config.autoregressive.decay_steps = 2_000

    config.train.log_every = 10
    config.train.checkpoint_every = 50
    config.train.keep_every = 1_000  # for the curve of quality against hours
    return config
