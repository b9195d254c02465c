"""Recipes for few steps at equal compute, all from one base model; see benchmarks/quality.py.

`configs/quality.py:RECIPE` or `:RECIPE,SIZE` is the configuration of one training run; `base` is
that of the base model and its judge, and the others start from it (STAGE.init_from). A recipe takes
the steps that its budget pays for, in network evaluations of one row of tokens: a forward pass is
one, a training step three a row, and teachers and pairs count.
"""

import functools
from typing import NamedTuple

import ml_collections

from configs import base, tiny

_TRAINING = 3  # evaluations: forward, and backward at twice its cost
_TEACHER = {"heun": 2, "rk4": 4}


class Size(NamedTuple):
    """How much of everything.

    Attributes:
      judge_steps, base_steps: of training.
      evaluations: that a recipe may use, from the base model on.
      samples: of a figure of one training.
      many_steps: of the base model's reference.
    """

    judge_steps: int
    base_steps: int
    evaluations: int
    samples: int
    many_steps: int


SAMPLERS = ("plain", "tuned", "neighbours")


def sampler(name: str, steps: int) -> dict[str, float | str]:
    """The keys of `eval` of a way to sample a model.

    Args:
      name: "plain", as the path says, by the rule of the recipe; "tuned", as configs/base.py has
        it; or "neighbours", the same with draws that heed what follows what in the text.
      steps: so many of them. The first of few steps is wide, and half of it ahead is far from the
        noise that the network is shown: the entropy rises beyond what a temperature takes back.
        With more steps the last ones needn't be as cold.

    Raises:
      ValueError: for another name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"Unknown sampler {name!r}; expected one of {', '.join(SAMPLERS)}.")
    if name == "plain":
        return {}
    names = ("few_step_jump", "grid", "cooling", "look_ahead")
    tuned = base.get_config().eval
    found = {key: tuned[key] for key in names}
    if name == "neighbours":
        found |= {"neighbours": 1.0}
        found |= {"look_ahead": 0.3} if steps < 8 else {"cooling": 0.5}
    return found


SIZES = {
    "cpu": Size(3_000, 8_000, 160_000, 64, 1024),
    "gpu": Size(4_000, 16_000, 3_000_000, 512, 1024),
    "smoke": Size(40, 40, 30_000, 16, 32),
}


def row_evaluations(config: ml_collections.ConfigDict, stage: str) -> float:
    """Network evaluations that a training step of a stage takes for each row."""
    own = config[stage]
    if stage == "pretrain":
        return _TRAINING
    if stage == "step_aware":
        return _TRAINING
    weight = {"log_uniform": lambda k: 1, "official": lambda k: 2**k}[own.width_weights]
    weights = [weight(k) for k in range(own.max_log2_steps + 1)]
    on_data = sum(w for k, w in enumerate(weights) if 2.0**-k < own.tau) / sum(weights)
    taught = own.batch_size - round(own.batch_size * on_data)  # rows are whole
    share = taught / own.batch_size
    return _TRAINING + _TEACHER[own.teacher_rule] * share


def evaluations(config: ml_collections.ConfigDict) -> float:
    """Network evaluations, in rows, of all runs of a pipeline, the judge's left out."""
    total = 0.0
    for stage in config.pipeline.split(","):
        if stage != "autoregressive":
            own = config[stage]
            total += own.num_steps * own.batch_size * row_evaluations(config, stage)
            total += _before_steps(config, stage)
    return total


def _before_steps(config: ml_collections.ConfigDict, stage: str) -> float:
    """Evaluations that a run takes before its first step: for pairs."""
    own = config[stage]
    return own.num_pairs * own.pair_steps if stage == "refine" else 0


def _base(config, size):
    config.pipeline = "autoregressive,pretrain"


def _continued(config, size):
    """The base model trained on: what the budget buys without step budgets."""
    config.pipeline = "pretrain"
    config.pretrain.learning_rate = config.distill.learning_rate
    config.pretrain.warmup_steps = config.distill.warmup_steps
    config.pretrain.ema_decay = config.distill.ema_decay


def _step_aware(config, size):
    """Step budgets without a teacher or pairs."""
    config.pipeline = "step_aware"


def _paper(config, size):
    """The published recipe to the letter, but for learning rate, average and length."""
    revealed = config.path.revealed
    base.use_paper_recipe(config)
    config.path.revealed = revealed  # without effect here, but the base model's
    config.pipeline = "distill"
    config.distill.rate_floor = 1e-3


def _rk4(config, size):
    """The published teacher in better surroundings: additive conditioning, widths equally often."""
    config.pipeline = "distill"
    config.distill.teacher_rule = "rk4"
    config.distill.teacher_jump = "cumulative"
    config.distill.teacher_end = "literal"
    config.eval.few_step_jump = "cumulative"


def _heun(config, size):
    """The mild teacher alone, as configs/base.py has it."""
    config.pipeline = "distill"


def _rectified(config, size, rounds):
    """Rounds of pairs; half of what a round may cost makes them."""
    config.pipeline = ",".join(["refine"] * rounds)
    refine = config.refine
    pairs = size.evaluations / rounds / 2 / refine.pair_steps
    refine.num_pairs = max(int(pairs / refine.pair_batch_size), 1) * refine.pair_batch_size


RECIPES = {
    "base": _base,
    "continued": _continued,
    "step_aware": _step_aware,
    "paper": _paper,
    "rk4": _rk4,
    "heun": _heun,
    "rect1": functools.partial(_rectified, rounds=1),
    "rect3": functools.partial(_rectified, rounds=3),
}


def _spend(config: ml_collections.ConfigDict, budget: int) -> None:
    """Sets the steps of a recipe to what the budget pays for, as much for each of its runs."""
    runs = config.pipeline.split(",")
    for stage in set(runs):
        own = config[stage]
        left = budget / len(runs) - _before_steps(config, stage)
        own.num_steps = int(left / (own.batch_size * row_evaluations(config, stage)))


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    recipe, _, name = arg.partition(",")
    recipe, name = recipe or "base", name or "cpu"
    if recipe not in RECIPES or name not in SIZES:
        raise ValueError(
            f"configs/quality.py takes RECIPE or RECIPE,SIZE with a recipe of "
            f"{', '.join(RECIPES)} and a size of {', '.join(SIZES)}, got {arg!r}"
        )
    size = SIZES[name]
    config = tiny.get_config("smoke" if name == "smoke" else "")
    if name == "gpu":
        # 11.7 million parameters and counts of neighbours: less than 30 MB in bfloat16.
        config.model.width, config.model.num_blocks, config.model.num_heads = 384, 5, 6
        config.model.cond_width, config.model.dropout = 128, 0.1
        config.model.dtype = "bfloat16"
        config.data.vocab_size = 1536
        config.data.block_length = 256
        for stage in ("autoregressive", "pretrain", "step_aware", "distill", "refine"):
            config[stage].batch_size = 128
            config[stage].learning_rate = 1e-3
        config.refine.pair_batch_size = 256
    # Also where another run's base model is started from, so that what is stored says how it came.
    config.autoregressive.num_steps = size.judge_steps
    config.pretrain.num_steps = size.base_steps
    for stage in ("autoregressive", "pretrain"):
        config[stage].warmup_steps = min(config[stage].warmup_steps, config[stage].num_steps // 4)
    for stage in ("step_aware", "distill", "refine"):
        config[stage].ema_decay = 0.99
        config[stage].learning_rate = 3e-4  # a tenth of the base model's: it has been annealed
    refine = config.refine
    refine.max_log2_steps = 6
    refine.pair_steps = 8 if name == "smoke" else 64
    refine.loss = "cross_entropy"
    base.use_plain_sampler(config)
    config.eval.num_samples = size.samples
    config.eval.many_steps = size.many_steps
    config.eval.few_step_jump = "mixture"
    config.eval.jumps = ("mixture",)
    config.eval.steps = (1, 2, 4, 8, 16)
    config.eval.watched = 0
    RECIPES[recipe](config, size)
    if recipe != "base":
        _spend(config, size.evaluations)
    return config
