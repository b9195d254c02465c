"""Figures with 95% intervals: proportions (Wilson), means over samples (bootstrap)."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054  # of a two-sided 95% interval


class Figure(NamedTuple):
    """A figure, its 95% interval and the number of samples; nan if unknown."""

    value: float
    low: float
    high: float
    count: int


UNKNOWN = Figure(math.nan, math.nan, math.nan, 0)


def share(hits: int, count: int) -> Figure:
    """Return hits / count with Wilson's score interval, which is also valid near 0 and 1.

    (p + z²/2n ± z sqrt(p (1-p)/n + z²/4n²)) / (1 + z²/n)

    Raises:
      ValueError: unless 0 <= hits <= count.
    """
    if not 0 <= hits <= count:
        raise ValueError(f"expected 0 <= hits <= count, got hits={hits} and count={count}")
    if count == 0:
        return UNKNOWN
    p, z2 = hits / count, _Z**2 / count
    centre, spread = p + z2 / 2, _Z * math.sqrt(p * (1 - p) / count + z2 / (4 * count))
    low, high = (centre - spread) / (1 + z2), (centre + spread) / (1 + z2)
    # At 0 and 1 the end is exact; avoid rounding errors.
    return Figure(p, 0.0 if hits == 0 else low, 1.0 if hits == count else high, count)


def normal(values_N: np.ndarray) -> Figure:
    """Return the mean of many independent values, +- 1.96 standard errors."""
    count = len(values_N)
    if count < 2:
        return Figure(float(values_N.mean()) if count else math.nan, math.nan, math.nan, count)
    value, error = float(values_N.mean()), float(values_N.std(ddof=1)) / math.sqrt(count)
    return Figure(value, value - _Z * error, value + _Z * error, count)


def mean(values_N: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Figure:
    """Return the mean of independent values with its percentile bootstrap interval."""
    count = len(values_N)
    if count < 2:
        return normal(values_N)
    means_R = [values_N[rows].mean() for rows in _resamples(count, resamples, seed)]
    low, high = np.quantile(means_R, [0.025, 0.975])
    return Figure(float(values_N.mean()), float(low), float(high), count)


def centred_bootstrap(
    statistics: Callable[[np.ndarray], dict[str, float]],
    count: int,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Figure]:
    """Statistics of samples with bootstrap intervals centred on the values.

    For distances and entropies of frequencies: resampling adds a bias, because resampled
    frequencies are further from a law than those of the samples. The intervals are shifted by it.

    Args:
      statistics: rows int [N] -> statistics of the samples in these rows, by name.
      count: number of samples, N.
      resamples: number of resamples, at least 2.
      seed: of the draws.
    """
    values = statistics(np.arange(count))
    if count < 2:
        return {name: Figure(value, math.nan, math.nan, count) for name, value in values.items()}
    drawn = [statistics(rows) for rows in _resamples(count, resamples, seed)]
    figures = {}
    for name, value in values.items():
        values_R = np.array([each[name] for each in drawn])
        low, high = np.quantile(values_R, [0.025, 0.975]) - values_R.mean() + value
        figures[name] = Figure(value, float(low), float(high), count)
    return figures


def _resamples(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    if resamples < 2:
        raise ValueError(f"the bootstrap needs at least 2 resamples, got {resamples}")
    rng = np.random.default_rng(seed)
    return (rng.integers(count, size=count) for _ in range(resamples))
