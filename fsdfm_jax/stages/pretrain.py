"""Base model: the posterior over data tokens, learnt from noised text, t ~ U[0, 1 - eps).

Two losses with the same minimiser, the clean posterior:

    path            generalised KL at the rate g(t), eq. 3.8 of arXiv:2509.20624
    cross_entropy   -log p(x1 | xt) at all positions, arXiv:2407.15595 section 3

Where xt already shows the data, the path loss is g(t) (1 - p(xt)), whose gradient vanishes with
p(xt): a fresh network sits on a plateau until it finds out that shown tokens can be copied. The
logarithm of the cross-entropy has no plateau, which is what a run of minutes needs.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fsdfm_jax.flow import losses, paths, schedules
from fsdfm_jax.flow.process import Process
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.stages import few_step
from fsdfm_jax.stages.base import Stage, start_fresh


def stratified_times(key: jax.Array, rows: int, *, time_eps: float) -> jax.Array:
    """A time in each of `rows` equal strata of [0, 1 - time_eps), float32, in random order.

    Each row's time is uniform, as with independent draws; their mean loss varies less.
    """
    order_key, offset_key = jax.random.split(key)
    strata = jax.random.permutation(order_key, rows)
    return (strata + jax.random.uniform(offset_key, (rows,))) / rows * (1.0 - time_eps)


def make(config: ConfigDict, model: ModelConfig, process: Process) -> Stage:
    """The stage; reads `loss`, `time_eps` and `rate_floor`.

    Raises:
      ValueError: for an unknown loss, or values outside their range.
    """
    time_eps, rate_floor = config.time_eps, few_step.check_rate_floor(config.rate_floor)
    if not 0 < time_eps < 1:
        raise ValueError(
            f"pretrain.time_eps must lie in (0, 1), got {time_eps}: the rate g(t) is "
            "unbounded at t=1."
        )

    def path(logits, xt_BL, x1_BL, t_B):
        weight_B = schedules.rate(process.schedule, t_B, floor=rate_floor)
        weight_BL = jnp.broadcast_to(weight_B[:, None], xt_BL.shape)
        return logits_lib.mean_loss(losses.path_loss, logits, xt_BL, x1_BL, weight_BL)

    def cross_entropy(logits, xt_BL, x1_BL, t_B):
        del xt_BL, t_B
        return logits_lib.mean_loss(losses.cross_entropy, logits, x1_BL)

    by_name = {"path": path, "cross_entropy": cross_entropy}
    if config.loss not in by_name:
        raise ValueError(
            f"Unknown pretrain.loss {config.loss!r}; expected one of {', '.join(by_name)}."
        )
    data_loss = by_name[config.loss]

    def loss(params, frozen, key, batch):
        del frozen
        noise_key, time_key, path_key, dropout_key = jax.random.split(key, 4)
        x1_BL = batch["x1"]
        x0_BL = process.source.sample(noise_key, x1_BL.shape)
        t_B = stratified_times(time_key, x1_BL.shape[0], time_eps=time_eps)
        xt_BL = paths.sample_path(path_key, process.schedule, x0_BL, x1_BL, t_B)
        logits = model_lib.predict(params, model, xt_BL, t_B, key=dropout_key)
        value = data_loss(logits, xt_BL, x1_BL, t_B)
        return value, {"loss": value}

    return Stage("pretrain", model, start_fresh(model), loss)
