"""First few-step stage: the step budget becomes an input of the network.

Source: arXiv:2509.20624 eq. 4.4, over all budgets.

All rows are trained on data, with the path loss at the cumulative rate of their step. Its minimiser
is the clean posterior at every width. The stage therefore keeps the predictions of the base model
and prepares the width conditioning for `distill`.
"""

from ml_collections import ConfigDict

from fsdfm_jax.flow.process import Process
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.stages import few_step
from fsdfm_jax.stages.base import Stage, start_from_base


def make(config: ConfigDict, model: ModelConfig, process: Process) -> Stage:
    """Make the stage; read the budget keys of its config."""
    path = few_step.read_path_term(config, few_step.read_budgets(config))
    loss = few_step.make_loss(model, process, path, None)
    return Stage("step_aware", model, start_from_base("step_aware", model), loss)
