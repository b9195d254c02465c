"""Base model: the path loss at the instantaneous rate (arXiv:2509.20624 eq. 3.8), t ~ U[0, 1 -
eps).
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fsdfm_jax import losses, models, paths, schedules
from fsdfm_jax.models import ModelConfig
from fsdfm_jax.stages import Process, Stage, start_fresh


def stratified_times(key: jax.Array, rows: int, *, time_eps: float) -> jax.Array:
    """One time in each of `rows` equal strata of [0, 1 - time_eps), float32 [rows], in random
    order.

    Each row's time is uniform, as with independent draws; their mean loss varies less.
    """
    order_key, offset_key = jax.random.split(key)
    strata = jax.random.permutation(order_key, rows)
    return (strata + jax.random.uniform(offset_key, (rows,))) / rows * (1.0 - time_eps)


def make(config: ConfigDict, model: ModelConfig, process: Process) -> Stage:
    """The stage; reads `time_eps`."""
    time_eps = config.time_eps
    if not 0 < time_eps < 1:
        raise ValueError(
            f"pretrain.time_eps must lie in (0, 1), got {time_eps}: the rate g(t) is "
            "unbounded at t=1."
        )

    def loss(params, frozen, key, batch):
        del frozen
        noise_key, time_key, path_key, dropout_key = jax.random.split(key, 4)
        x1_BL = batch["x1"]
        x0_BL = process.source.sample(noise_key, x1_BL.shape)
        t_B = stratified_times(time_key, x1_BL.shape[0], time_eps=time_eps)
        xt_BL = paths.sample_path(path_key, process.schedule, x0_BL, x1_BL, t_B)
        logits_BLV = models.apply(params, model, xt_BL, t_B, key=dropout_key)
        weight_B = schedules.rate(process.schedule, t_B)
        value = jnp.mean(losses.path_loss(logits_BLV, xt_BL, x1_BL, weight_B))
        return value, {"loss": value}

    return Stage("pretrain", model, start_fresh(model), loss)
