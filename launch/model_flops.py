"""Operations that a network needs, nothing counted twice: the numerator of a utilisation."""

from ml_collections import ConfigDict

from fsdfm_jax.flow.teacher import get_rule
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.stages import few_step
from fsdfm_jax.stages.base import FEW_STEP


def trunk_flops(model: ModelConfig, batch: int, length: int) -> float:
    """Operations of a forward pass up to the head: matrix products, attention included."""
    dense = model.num_blocks * (4 + 2 * model.mlp_ratio) * model.width**2
    attention = 2 * model.num_blocks * length * model.width
    return 2.0 * batch * length * (dense + attention)


def head_flops(model: ModelConfig, batch: int, length: int) -> float:
    """Operations of the product with the vocabulary."""
    return 2.0 * batch * length * model.width * model.vocab_size


def forward_flops(model: ModelConfig, batch: int, length: int) -> float:
    """Operations of a whole forward pass."""
    return trunk_flops(model, batch, length) + head_flops(model, batch, length)


def step_flops(name: str, config: ConfigDict, model: ModelConfig, batch: int) -> float:
    """Operations of a training step of a stage.

    The student three times (forward, and twice as much backward). Of the teacher, for the rows that
    it teaches, one pass for each node of its rule, the last head for the average. Of a guide two
    passes for the other rows.

    Args:
      name: of the stage, whose section `config` holds.
      batch: rows of the whole batch.
    """
    length, own = config.data.block_length, config[name]
    student = 3 * forward_flops(model, batch, length)
    if name not in FEW_STEP:
        return student
    fixed, taught = 0, 0  # passes of rows
    parts = batch // own.accumulate
    if "teacher_rule" in own:
        taught = parts - few_step.rows_of_path(parts, *few_step.split_budgets(own, name))
        fixed += len(get_rule(own.teacher_rule).nodes) * taught
    if own.get("guidance"):
        fixed += 2 * (parts - taught)
    return student + forward_flops(model, fixed * own.accumulate, length)
