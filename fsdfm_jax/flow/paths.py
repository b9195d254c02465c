"""The mixture path: each position shows x1 with probability kappa(t), else x0.

Source: arXiv:2407.15595 eq. 8; arXiv:2509.20624 section 3.
"""

import jax
import jax.numpy as jnp

from fsdfm_jax.flow.schedules import Schedule
from fsdfm_jax.ops import categorical


def sample_path(
    key: jax.Array, schedule: Schedule, x0_BL: jax.Array, x1_BL: jax.Array, t_B: jax.Array
) -> jax.Array:
    """Draw xt given both endpoints.

    Args:
      key: typed PRNG key.
      schedule: kappa.
      x0_BL: noise tokens, int [B, L].
      x1_BL: data tokens, int [B, L].
      t_B: one time per row, in [0, 1]; t=0 returns x0 and t=1 returns x1 exactly.

    Returns:
      xt, int [B, L].
    """
    # u is in [0, 1): never below kappa=0, always below kappa=1.
    u_BL = categorical.uniform(key, x1_BL.shape)
    return jnp.where(u_BL < schedule.kappa(t_B)[:, None], x1_BL, x0_BL)
