"""The whole road on a laptop: 12 MB of text, a million parameters, 2 CPU cores, minutes.

python -m fsdfm_jax.main --config=configs/tiny.py --workdir=runs/tiny          15 to 25 minutes
python -m fsdfm_jax.main --config=configs/tiny.py:smoke --workdir=runs/smoke   at most 3 minutes
python -m fsdfm_jax.main --config=configs/tiny.py:mask --workdir=runs/mask     a baseline: masks
"""

from configs import base


def get_config(arg: str = ""):
    if arg not in ("", "smoke", "mask"):
        raise ValueError(f"configs/tiny.py takes no argument, 'smoke' or 'mask', got {arg!r}")
    config = base.get_config()
    config.model.dropout = 0.0  # one pass over the text, a million parameters: nothing to overfit
    config.model.remat = "dots"  # CPU: computing the cheap parts again is faster than keeping them

    config.optim.name = "muon"
    config.optim.muon_rms = 1.0

    autoregressive = config.autoregressive
    autoregressive.num_steps = 600
    autoregressive.batch_size = 32
    autoregressive.learning_rate = 3e-3
    autoregressive.warmup_steps = 50

    pretrain = config.pretrain
    pretrain.loss = "rate_cross_entropy"
    pretrain.rate_floor = 0.1
    pretrain.time_power = 2.0
    pretrain.num_steps = 1000
    pretrain.batch_size = 32
    pretrain.learning_rate = 3e-3
    pretrain.warmup_steps = 50

    for name, num_steps in (("step_aware", 100), ("distill", 200), ("refine", 150)):
        stage = config[name]
        stage.num_steps = num_steps
        stage.batch_size = 32
        stage.learning_rate = 1e-3
        stage.warmup_steps = 10
        stage.ema_decay = 0.98
        if name != "refine":
            stage.rate_floor = 0.05  # small batches: a row near t=1 would drown the others

    if arg == "mask":  # masked diffusion, same backbone and budget
        config.path.source = "mask"
        config.pipeline = "pretrain"
        config.eval.jumps = ("mixture",)  # its exact kernel

    if arg == "smoke":
        config.model.width = 64
        config.model.num_blocks = 2
        config.model.num_heads = 2
        config.model.cond_width = 32
        config.data.vocab_size = 512
        config.data.block_length = 64
        autoregressive.num_steps = 60
        pretrain.num_steps = 60
        for name in ("step_aware", "distill", "refine"):
            config[name].num_steps = 20
            config[name].batch_size = 16
        config.refine.max_log2_steps = 1  # samples of eight steps take 32 rows
        autoregressive.batch_size = pretrain.batch_size = 16
        config.train.checkpoint_every = 20
        config.train.log_every = 10
        config.eval.num_samples = 16
        config.eval.batch_size = 16
        config.eval.many_steps = 32
    return config
