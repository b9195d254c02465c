"""A language with a known law: a hidden Markov model fitted to the text.

python -m fsdfm_jax.exact --task=hmm
python -m fsdfm_jax.main --config=configs/hmm.py --workdir=runs/hmm --noevaluate

The first command fits the law and writes documents sampled from it to runs/data/hmm. The law
itself, runs/data/hmm/law.npz, gives the probability of each sample and the exact posterior.
configs/hmm.py:paper trains the published recipe instead of ours.
"""

from configs import base


def get_config(arg: str = ""):
    if arg not in ("", "paper"):
        raise ValueError(
            f"configs/hmm.py takes no argument, or 'paper' for the published recipe, got {arg!r}"
        )
    config = base.get_config()
    config.pipeline = "pretrain,refine"
    data = config.data
    data.corpus = "runs/data/hmm/train.jsonl"
    data.validation = "runs/data/hmm/validation.jsonl"
    data.tokenizer = "runs/data/hmm/tokenizer.json"
    data.block_length = 128
    evaluation = config.eval
    evaluation.judges = ""
    evaluation.law = "runs/data/hmm/law.npz"
    evaluation.controls = ("unigram", "ngram", "shuffled", "one", "few", "cold")
    evaluation.num_samples, evaluation.batch_size = 512, 128
    evaluation.steps = (1, 2, 4, 8, 16, 32, 64)
    evaluation.jumps = ("mixture",)
    config.model.dropout = 0.0
    config.optim.name = "muon"
    config.optim.muon_rms = 1.0
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.0
    pretrain = config.pretrain
    pretrain.loss = "rate_cross_entropy"
    pretrain.rate_floor = 0.05
    pretrain.time_power = 2.0
    pretrain.num_steps = 3_000
    pretrain.batch_size = 32
    pretrain.learning_rate = 3e-3
    pretrain.warmup_steps = 100
    pretrain.decay_steps = 2_000
    pretrain.final_lr_fraction = 0.02
    pretrain.ema_decay = 0.995
    base.use_short_refine(config, num_steps=246, decay_steps=215)
    config.refine.auxiliary_updates = 4  # two sharpen: docs/findings.md
    distill = config.distill
    distill.num_steps = 900  # with the published teacher as many network evaluations as `refine`
    distill.batch_size = 32
    distill.learning_rate = 1e-3
    distill.warmup_steps = 50
    distill.decay_steps = 200
    distill.final_lr_fraction = 0.02
    distill.ema_decay = 0.99
    if arg == "paper":
        base.use_paper_recipe(config)
    return config
