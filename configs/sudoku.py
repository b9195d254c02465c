"""Sudoku, scored by its rules: 6x6 by default, or :4x4, :9x9.

python -m fsdfm_jax.exact --task=sudoku:6x6
python -m fsdfm_jax.main --config=configs/sudoku.py --workdir=runs/sudoku_6x6

The first command writes grids and puzzles to runs/data/sudoku_6x6. A block is one grid and the end
token; the vocabulary is the digits and that token. :SIZE,paper trains the published recipe instead
of ours.
"""

from configs import base

# Tokens per block: the cells and the end token.
BLOCK_LENGTHS = {"4x4": 17, "6x6": 37, "9x9": 82}
# Width, blocks, heads; steps of `pretrain`.
SIZES = {
    "4x4": ((64, 3, 4), 3_000),
    "6x6": ((128, 4, 4), 7_000),
    "9x9": ((192, 6, 6), 40_000),
}


def get_config(arg: str = "6x6"):
    size, _, recipe = arg.partition(",")
    if size not in SIZES or recipe not in ("", "paper"):
        raise ValueError(
            f"configs/sudoku.py takes one of {', '.join(SIZES)}, optionally with ',paper' for the "
            f"published recipe, got {arg!r}"
        )
    config = base.get_config()
    network, pretrain_steps = SIZES[size]
    data = config.data
    data.corpus = f"runs/data/sudoku_{size}/train.jsonl"
    data.validation = f"runs/data/sudoku_{size}/validation.jsonl"
    data.tokenizer = f"runs/data/sudoku_{size}/tokenizer.json"
    data.block_length = BLOCK_LENGTHS[size]
    model = config.model
    model.width, model.num_blocks, model.num_heads = network
    model.dropout = 0.0
    model.positions = "learned"  # a position is a cell of the grid

    config.optim.name = "muon"
    config.optim.muon_rms = 1.25
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.0
    pretrain = config.pretrain
    pretrain.loss = "rate_cross_entropy"
    pretrain.rate_floor = 0.02
    pretrain.time_power = 2.0
    pretrain.num_steps = pretrain_steps
    pretrain.batch_size = 64
    pretrain.learning_rate = 2e-3
    pretrain.warmup_steps = 100
    pretrain.decay_steps = pretrain_steps * 7 // 10
    pretrain.final_lr_fraction = 0.02
    pretrain.ema_decay = 0.995

    small = size == "4x4"
    for stage in (config.distill, config.refine):
        stage.num_steps, stage.decay_steps = (500, 100) if small else (1_000, 800)
        stage.batch_size = 80 if small else 96
        stage.learning_rate = 1e-3
        stage.warmup_steps = 50
        stage.final_lr_fraction = 0.02
        stage.ema_decay = 0.995
    refine = config.refine
    refine.max_log2_steps = 4 if small else 3
    if small:
        # Digits of 4x4 grids drift where it decays; the average smooths enough.
        refine.final_lr_fraction = 1.0
    refine.grid = "geometric:0.0001"
    if recipe == "paper":
        base.use_paper_recipe(config)
    else:
        # Solves puzzles too: half of the training rows have given digits, marked for the network.
        model.given = "marked"
        config.pipeline = "pretrain,refine"
        config.eval.sampling.grid = refine.grid

    config.train.log_every = 50
    config.train.checkpoint_every = 500
    evaluation = config.eval
    evaluation.judges = ""  # scored by the rules, see fsdfm_jax/evaluate/exact_judges.py
    evaluation.controls = ("unigram", "ngram", "one", "few", "cold")
    evaluation.num_samples, evaluation.batch_size = 512, 128
    evaluation.steps = (1, 2, 4, 8, 16)
    evaluation.jumps = ("mixture",)
    evaluation.sampling.jump = "mixture"  # the rule that `refine` trains
    return config
