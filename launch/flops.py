"""Operations that a network needs: 2 for each multiply-add of a matrix product, none counted twice.

What is left out, norms, softmax, GELU and the products of the conditioning (a row's, not a
token's), is below 1% at the paper's sizes. Recomputation and padding are no use and don't count.
"""

from ml_collections import ConfigDict

from fsdfm_jax.flow import teacher
from fsdfm_jax.network.model import ModelConfig
from fsdfm_jax.stages import few_step
from fsdfm_jax.stages.base import FEW_STEP


def forward_flops(model: ModelConfig, batch: int, length: int) -> float:
    """Operations of a forward pass over `batch` rows of `length` tokens.

    A token takes 2 for each weight of the blocks and of the head (the 2N of "6ND"), and 4 L D a
    block for its scores and their mix of values; a causal network computes them in full as well.
    """
    block = (4 + 2 * model.mlp_ratio) * model.width**2 + 2 * length * model.width
    return 2.0 * batch * length * (model.num_blocks * block + model.width * model.vocab_size)


def step_flops(name: str, config: ConfigDict, model: ModelConfig, batch: int) -> float:
    """Operations of a training step of a stage on `batch` rows.

    The student three times (forward, and twice as much backward). Of the teacher, for the rows that
    it teaches, one pass for each node of its rule. Of a guide two passes for the other rows. Where
    there is an auxiliary network, each turn of either walks the student through its steps and reads
    its answers; the auxiliary network and the base model read how the student's turn ends.

    Args:
      name: of the stage, whose section `config` holds.
    """
    length, own = config.data.block_length, config[name]
    student = 3 * forward_flops(model, batch, length)
    if "auxiliary_updates" in own:
        turns = own.auxiliary_updates
        trained, read = 1 + turns, (1 + 2) + (1 + 1) * turns
        return trained * student + read * forward_flops(model, batch, length)
    if name not in FEW_STEP:
        return student
    passes, taught = 0, 0  # of the rows of one part
    rows = batch // own.accumulate
    if "teacher_rule" in own:
        taught = rows - few_step.rows_of_path(rows, *few_step.split_budgets(own, name))
        passes += len(teacher.get_rule(own.teacher_rule).nodes) * taught
    if own.get("guidance"):
        passes += 2 * (rows - taught)
    return student + forward_flops(model, passes * own.accumulate, length)
