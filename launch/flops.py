"""Operations that a network requires: 2 per multiply-add of its matrix products.

Norms, softmax, GELU and the products of the conditioning (per row, not per token) are left out;
they are below 1% at the paper's sizes. Recomputation and padding don't count.
"""

from ml_collections import ConfigDict

from fsdfm_jax.flow import teacher
from fsdfm_jax.network.model import ModelConfig
from fsdfm_jax.stages import few_step
from fsdfm_jax.stages.base import FEW_STEP


def forward_flops(model: ModelConfig, batch: int, length: int) -> float:
    """Return the operations of a forward pass over `batch` rows of `length` tokens.

    Each token needs 2 per weight of the blocks and the head (the 2N of "6ND"), and 4 L D per block
    for attention. Causal attention counts in full.
    """
    block = (4 + 2 * model.mlp_ratio) * model.width**2 + 2 * length * model.width
    return 2.0 * batch * length * (model.num_blocks * block + model.width * model.vocab_size)


def step_flops(name: str, config: ConfigDict, model: ModelConfig, batch: int) -> float:
    """Return the operations of a stage's training step on `batch` rows.

    A trained network counts three times (forward, and twice that for backward). The teacher needs
    one pass per node of its rule for the rows that it teaches; guidance needs two passes for the
    other rows. With an auxiliary network, each update of either network first samples with the
    student; the auxiliary network and the base model are evaluated on the student's samples.

    Args:
      name: name of the stage and of its section in `config`.
    """
    length, own = config.data.block_length, config[name]
    student = 3 * forward_flops(model, batch, length)
    if "auxiliary_updates" in own:
        turns = own.auxiliary_updates
        trained, read = 1 + turns, (1 + 2) + (1 + 1) * turns
        return trained * student + read * forward_flops(model, batch, length)
    if name not in FEW_STEP:
        return student
    passes, taught = 0, 0  # rows per microbatch
    rows = batch // own.accumulate
    if "teacher_rule" in own:
        taught = rows - few_step.rows_of_path(rows, *few_step.split_budgets(own, name))
        passes += len(teacher.get_rule(own.teacher_rule).nodes) * taught
    if own.get("guidance"):
        passes += 2 * (rows - taught)
    return student + forward_flops(model, passes * own.accumulate, length)
