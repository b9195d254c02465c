"""Second few-step stage: big steps learn from a shortcut teacher.

Source: arXiv:2509.20624 eq. 4.5 and Algorithm 1.

The teacher is the running average of the student itself, taking two (Heun) or four (RK-4)
evaluations at half the width. Only widths below tau see data; every other width is anchored to them
through the chain of halvings.
"""

from ml_collections import ConfigDict

from fsdfm_jax.flow.process import Process
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.stages import few_step
from fsdfm_jax.stages.base import Stage, start_from_base


def make(config: ConfigDict, model: ModelConfig, process: Process) -> Stage:
    """The stage; reads the budget and teacher keys of its config."""
    below, above = few_step.split_budgets(config, "distill")
    path = few_step.read_path_term(config, below)
    taught = few_step.read_teacher_term(config, above, process) if above.log2_steps else None
    loss = few_step.make_loss(model, process, path, taught)
    return Stage("distill", model, start_from_base("distill", model), loss, config.guidance > 0)
