"""Base model: the posterior over data tokens, trained on noised text with t ~ U[0, 1 - eps).

Three losses with the same minimiser, the clean posterior:

    path                 generalised KL with rate g(t), eq. 3.8 of arXiv:2509.20624
    cross_entropy        -log p(x1 | xt) at all positions, arXiv:2407.15595 section 3
    rate_cross_entropy   the same, weighted by g(t) as in the path loss

Where xt already equals the data, the path loss is g(t) (1 - p(xt)), whose gradient vanishes with
p(xt). A fresh network stays on a plateau until it learns to copy correct tokens. The cross-entropy
has no plateau, which matters for runs of minutes. But few tokens are noise at late times, so its
plain mean gives them little weight. The rate compensates: every noised token has equal weight.

Rows at late times have large weights and few noised tokens. `time_power` above 1 draws more of them
at smaller weights: same expectation, lower variance.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fsdfm_jax.flow import losses, paths, schedules
from fsdfm_jax.flow.process import Process
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.stages.base import Stage, draw_frozen, mean_loss, start_fresh


def stratified_times(
    key: jax.Array, rows: int, *, time_eps: float, power: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Draw one time in each of `rows` strata of [0, 1 - time_eps), in random order, and weights.

    The marginal density of each time is proportional to (1 - t)^(1/power - 1), but the mean loss
    has lower variance than with independent draws. A weight is the ratio of the uniform density to
    this one; its mean is 1.

    Returns:
      (t_B, weight_B), float32.
    """
    order_key, offset_key = jax.random.split(key)
    strata = jax.random.permutation(order_key, rows)
    share_B = (strata + jax.random.uniform(offset_key, (rows,))) / rows
    if power == 1:
        return share_B * (1.0 - time_eps), jnp.ones(rows)
    # 1 - t = s^power with s uniform in (last, 1].
    last = time_eps ** (1.0 / power)
    s_B = 1.0 - share_B * (1.0 - last)
    return 1.0 - s_B**power, power * s_B ** (power - 1.0) * (1.0 - last) / (1.0 - time_eps)


def make(config: ConfigDict, model: ModelConfig, process: Process) -> Stage:
    """Make the stage; read `loss`, `time_eps`, `time_power` and `rate_floor`."""
    time_eps, time_power, rate_floor = config.time_eps, config.time_power, config.rate_floor
    position_loss, has_rate = _LOSSES[config.loss]

    def loss(params, frozen, key, batch):
        del frozen
        noise_key, time_key, path_key, dropout_key, given_key = jax.random.split(key, 5)
        x1_BL = batch["x1"]
        x0_BL = process.source.sample(noise_key, x1_BL.shape)
        t_B, weight_B = stratified_times(
            time_key, x1_BL.shape[0], time_eps=time_eps, power=time_power
        )
        if has_rate:
            weight_B *= schedules.rate(process.schedule, t_B, floor=rate_floor)
        frozen_BL = draw_frozen(given_key, model, x1_BL)
        xt_BL = paths.sample_path(path_key, process.schedule, x0_BL, x1_BL, t_B, frozen_BL)
        logits = model_lib.predict(params, model, xt_BL, t_B, None, frozen_BL, key=dropout_key)
        weight_BL = jnp.broadcast_to(weight_B[:, None], xt_BL.shape)
        value = mean_loss(position_loss, logits, xt_BL, x1_BL, weight_BL, frozen_BL=frozen_BL)
        return value, {"loss": value}

    return Stage("pretrain", model, start_fresh(model), loss)


def _weighted_cross_entropy(logits_BLV, xt_BL, x1_BL, weight_BL):
    del xt_BL
    return weight_BL * losses.cross_entropy(logits_BLV, x1_BL)


# Loss per position, and whether it is weighted by the rate g(t).
_LOSSES = {
    "path": (losses.path_loss, True),
    "cross_entropy": (_weighted_cross_entropy, False),
    "rate_cross_entropy": (_weighted_cross_entropy, True),
}
