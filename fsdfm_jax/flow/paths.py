"""The mixture path: each position shows x1 with probability kappa(t), else x0.

Source: arXiv:2407.15595 eq. 8; arXiv:2509.20624 section 3.
"""

import jax
import jax.numpy as jnp

from fsdfm_jax.flow.schedules import Schedule
from fsdfm_jax.ops import categorical


def sample_path(
    key: jax.Array,
    schedule: Schedule,
    x0_BL: jax.Array,
    x1_BL: jax.Array,
    t_B: jax.Array,
    frozen_BL: jax.Array | None = None,
) -> jax.Array:
    """Draw xt given both endpoints.

    Args:
      key: typed PRNG key.
      schedule: kappa.
      x0_BL: noise tokens, int [B, L].
      x1_BL: data tokens, int [B, L].
      t_B: one time per row, in [0, 1]; t=0 returns x0 and t=1 returns x1 exactly.
      frozen_BL: bool [B, L], positions that always show x1; None: none.

    Returns:
      xt, int [B, L].
    """
    # u is in [0, 1): never below kappa=0, always below kappa=1.
    u_BL = categorical.uniform(key, x1_BL.shape)
    shown_BL = u_BL < schedule.kappa(t_B)[:, None]
    return jnp.where(shown_BL if frozen_BL is None else shown_BL | frozen_BL, x1_BL, x0_BL)


def sample_frozen(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw which tokens of training rows are given, bool [B, L] of this shape.

    In half of the rows none; in a quarter a share that is uniform in [0, 1), at random places; in
    a quarter as large a part at the start, like a prompt.
    """
    kind_key, share_key, place_key = jax.random.split(key, 3)
    rows, length = shape
    kind_B1 = jax.random.randint(kind_key, (rows, 1), 0, 4)
    share_B1 = jax.random.uniform(share_key, (rows, 1))
    scattered_BL = jax.random.uniform(place_key, shape) < share_B1
    begun_BL = jnp.arange(length)[None] < jnp.floor(share_B1 * length)
    return ((kind_B1 == 2) & scattered_BL) | ((kind_B1 == 3) & begun_BL)
