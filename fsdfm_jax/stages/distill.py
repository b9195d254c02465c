"""Second few-step stage: large steps learn from a shortcut teacher.

Source: arXiv:2509.20624 eq. 4.5 and Algorithm 1.

The teacher is the EMA of the student, evaluated two (Heun) or four (RK-4) times at half the width.
Only widths below tau are trained on data; larger widths depend on them through repeated halving.
With guidance, the fine widths learn from two base models instead of data, see `few_step.guided`.
"""

from ml_collections import ConfigDict

from fsdfm_jax.flow.process import Process
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.stages import few_step
from fsdfm_jax.stages.base import BASE, Stage, start_from_base


def make(config: ConfigDict, model: ModelConfig, process: Process) -> Stage:
    """Make the stage; read the budget, teacher and guidance keys of its config.

    Raises:
      ValueError: if only one of `guidance` and `guide` is set.
    """
    if bool(config.guidance) != bool(config.guide):
        raise ValueError(
            f"Set both distill.guidance={config.guidance} (the weight) and "
            f"distill.guide={config.guide!r} (the weaker base model), or neither (0 and '')."
        )
    below, above = few_step.split_budgets(config, "distill")
    few_step.rows_of_path(config.batch_size // config.accumulate, below, above)
    path = few_step.read_path_term(config, below)._replace(guidance=config.guidance)
    taught = few_step.read_teacher_term(config, above, process) if above.log2_steps else None
    return Stage(
        "distill",
        model,
        start_from_base("distill", model),
        few_step.make_loss(model, process, path, taught),
        needs={"init_from": BASE, "guide": config.guide} if config.guidance else {},
    )
