"""Step budgets: the widths h = 2^-k and times t that the few-step stages train on.

Times are on the grid of the finest budget, j 2^-K with K the largest k. Each step ends by
1 - time_eps (arXiv:2509.20624 App. B); a width too long for that bound starts at t=0.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Budgets(NamedTuple):
    """Widths and their probabilities, as plain numbers so that a batch can be split at trace time.

    Attributes:
      log2_steps: exponents k of the widths h = 2^-k, ascending.
      probabilities: one per width. They sum to 1 over the whole set, and to `share` after `split`.
      finest: K, the largest exponent of the whole set (the time grid is j 2^-K).
      time_eps: steps end by 1 - time_eps.
    """

    log2_steps: tuple[int, ...]
    probabilities: tuple[float, ...]
    finest: int
    time_eps: float

    @property
    def share(self) -> float:
        """Total probability of these budgets; 1 unless they are a part of a set."""
        return math.fsum(self.probabilities)

    def split(self, tau: float) -> tuple["Budgets", "Budgets"]:
        """Split into the budgets with h < tau and the rest (eq. 4.5)."""
        below = [2.0**-k < tau for k in self.log2_steps]
        return self._where(below), self._where([not b for b in below])

    def _where(self, keep: list[bool]) -> "Budgets":
        pick = lambda values: tuple(v for v, k in zip(values, keep, strict=True) if k)
        return self._replace(
            log2_steps=pick(self.log2_steps), probabilities=pick(self.probabilities)
        )


def make_budgets(*, max_log2_steps: int, weights: str, time_eps: float) -> Budgets:
    """Make the set of widths 1, 1/2, .. 2^-max_log2_steps (arXiv:2509.20624 App. B).

    >>> import fsdfm_jax as fs
    >>> budgets = fs.make_budgets(max_log2_steps=3, weights="official", time_eps=0.0)
    >>> [round(p, 3) for p in budgets.probabilities]
    [0.067, 0.133, 0.267, 0.533]
    >>> below, above = budgets.split(tau=0.25)
    >>> below.log2_steps, above.log2_steps
    ((3,), (0, 1, 2))

    Args:
      max_log2_steps: K >= 0; 10 covers 1 to 1,024 steps.
      weights: "log_uniform" (equal weights), or "official" (1, 2, 4 .. 2^K from the widest to the
        finest; at K=10, widths of 1/8 and more get 0.73% of the rows).
      time_eps: in [0, 1).

    Returns:
      The budgets, widest first.

    Raises:
      ValueError: for a value outside its range.
    """
    if max_log2_steps < 0:
        raise ValueError(f"max_log2_steps must be 0 or more, got {max_log2_steps}.")
    if not 0 <= time_eps < 1:
        raise ValueError(f"time_eps must be in [0, 1), got {time_eps}.")
    exponents = range(max_log2_steps + 1)
    by_name = {
        "log_uniform": [1.0] * len(exponents),
        "official": [2.0**k for k in exponents],
    }
    if weights not in by_name:
        raise ValueError(
            f"Unknown width_weights {weights!r}; expected one of {', '.join(by_name)}."
        )
    total = sum(by_name[weights])
    probabilities = tuple(w / total for w in by_name[weights])
    return Budgets(tuple(exponents), probabilities, max_log2_steps, time_eps)


def sample_budgets(key: jax.Array, budgets: Budgets, rows: int) -> tuple[jax.Array, jax.Array]:
    """Draw a start time and a width for each row.

    >>> import fsdfm_jax as fs, jax
    >>> budgets = fs.make_budgets(max_log2_steps=1, weights="log_uniform", time_eps=0.0)
    >>> t_R, h_R = fs.sample_budgets(jax.random.key(0), budgets, rows=4)
    >>> h_R.tolist()
    [1.0, 1.0, 0.5, 0.5]
    >>> bool((t_R + h_R <= 1).all())
    True

    Widths are stratified over the rows (systematic sampling): the expected count of each width is
    exact and the actual count differs from it by less than one. This lowers the variance of the
    loss.

    Args:
      key: typed PRNG key.
      budgets: from `make_budgets` or `Budgets.split`.
      rows: R.

    Returns:
      (t_R, h_R), float32 [R]: start times and widths.
    """
    offset_key, time_key = jax.random.split(key)
    u_R = (jax.random.uniform(offset_key, ()) + jnp.arange(rows)) / rows
    # Boundaries are computed in float64 on the host. The last one is dropped so that rounding can't
    # push a row past it.
    boundaries = np.cumsum(budgets.probabilities)[:-1] / budgets.share
    index_R = jnp.searchsorted(jnp.asarray(boundaries, jnp.float32), u_R, side="right")

    cells = 2**budgets.finest
    widths = 2.0 ** -np.asarray(budgets.log2_steps, np.float64)
    last_start = np.floor((1.0 - budgets.time_eps - widths) * cells)
    starts = np.maximum(last_start, 0).astype(np.int32) + 1
    starts_R = jnp.asarray(starts)[index_R]
    j_R = jnp.floor(jax.random.uniform(time_key, (rows,)) * starts_R)
    t_R = jnp.minimum(j_R, starts_R - 1) / cells
    return t_R.astype(jnp.float32), jnp.asarray(widths, jnp.float32)[index_R]
