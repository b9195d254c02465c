"""Sudoku, judged by its rules: 6x6 by default, or :4x4, :9x9.

python -m fsdfm_jax.exact --task=sudoku:6x6
python -m fsdfm_jax.main --config=configs/sudoku.py --workdir=runs/sudoku_6x6 --noevaluate

The first command writes grids and puzzles to runs/data/sudoku_6x6. A grid with the end of the text
fills a block, and the vocabulary is the digits and that token.
"""

from configs import base

# Tokens of a block: the cells and the end of the text.
BLOCK_LENGTHS = {"4x4": 17, "6x6": 37, "9x9": 82}


def get_config(arg: str = "6x6"):
    if arg not in BLOCK_LENGTHS:
        raise ValueError(f"configs/sudoku.py takes one of {', '.join(BLOCK_LENGTHS)}, got {arg!r}")
    config = base.get_config()
    config.pipeline = "pretrain"
    data = config.data
    data.corpus = f"runs/data/sudoku_{arg}/train.jsonl"
    data.validation = f"runs/data/sudoku_{arg}/validation.jsonl"
    data.tokenizer = f"runs/data/sudoku_{arg}/tokenizer.json"
    data.block_length = BLOCK_LENGTHS[arg]
    evaluation = config.eval
    evaluation.judges = ""  # the rules judge, see fsdfm_jax/evaluate/exact_judges.py
    evaluation.controls = ("unigram", "ngram", "one", "few", "cold")
    evaluation.num_samples, evaluation.batch_size = 512, 128
    evaluation.steps = (1, 2, 4, 8, 16, 32, 64)
    evaluation.jumps = ("cumulative",)
    config.model.dropout = 0.0
    config.model.positions = "learned"  # a cell is a place in the grid
    pretrain = config.pretrain
    pretrain.loss = "cross_entropy"
    pretrain.num_steps = 6_000
    pretrain.batch_size = 64
    pretrain.learning_rate = 2e-3
    pretrain.warmup_steps = 200
    pretrain.ema_decay = 0.999
    return config
