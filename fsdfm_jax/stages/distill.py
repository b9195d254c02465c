"""Second few-step stage: big steps learn from a shortcut teacher.

Source: arXiv:2509.20624 eq. 4.5 and Algorithm 1.

The teacher is the running average of the student itself, taking two (Heun) or four (RK-4)
evaluations at half the width. Only widths below tau see data; every other width is anchored to them
through the chain of halvings. With guidance the fine widths learn from two base models in place of
data, see `few_step.guided`.
"""

from ml_collections import ConfigDict

from fsdfm_jax.flow.process import Process
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.stages import few_step
from fsdfm_jax.stages.base import BASE, Stage, start_from_base


def make(config: ConfigDict, model: ModelConfig, process: Process) -> Stage:
    """The stage; reads the budget, teacher and guidance keys of its config.

    Raises:
      ValueError: for a guidance without a weaker model, or the other way round.
    """
    if bool(config.guidance) != bool(config.guide):
        raise ValueError(
            f"distill.guidance={config.guidance} and distill.guide={config.guide!r} go together: "
            "the weight of the guidance, and the weaker base model that it leads away from; 0 and "
            "'' for none."
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
