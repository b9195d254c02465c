"""Time grids: S+1 cumulative times from 0 (noise) to 1 (data)."""

import numpy as np


def uniform_grid(steps: int) -> np.ndarray:
    """The times 0, 1/S .. 1 of the published sampler (arXiv:2509.20624 App. B.1).

    >>> import fsdfm_jax as fs
    >>> fs.uniform_grid(4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]

    Args:
      steps: S, network calls.

    Returns:
      float32 [S+1].

    Raises:
      ValueError: if steps is not a whole number of at least 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"A sampler needs a whole number of at least 1 step, got steps={steps!r}.")
    return (np.arange(steps + 1) / steps).astype(np.float32)


def make_grid(name: str, steps: int) -> np.ndarray:
    """A grid by name.

    >>> import fsdfm_jax as fs
    >>> fs.make_grid("power:2", 2).tolist()
    [0.0, 0.25, 1.0]
    >>> fs.make_grid("geometric:0.125", 4).tolist()
    [0.0, 0.5, 0.75, 0.875, 1.0]

    Args:
      name: one of

        uniform       k/S
        cosine        1 - cos(pi k / 2S): the first steps are the smallest
        power:R       (k/S)^R, R > 0: the first steps are the smallest for R > 1, the largest for
                      R < 1
        geometric:E   1 - E^(k/(S-1)), then 1, 0 < E < 1: each step redraws the same share of what
                      is left to draw, and the last one starts at 1 - E
      steps: S.

    Returns:
      float32 [S+1].

    Raises:
      ValueError: for another name, or if float32 can't tell two of the times apart.
    """
    shares = uniform_grid(steps).astype(np.float64)
    kind, _, number = str(name).partition(":")
    if name == "uniform":
        return uniform_grid(steps)
    if name == "cosine":
        return check_grid([*(1.0 - np.cos(0.5 * np.pi * shares[:-1])), 1.0])
    limit = {"power": np.inf, "geometric": 1.0}.get(kind, 0.0)
    try:
        parameter = float(number)
    except ValueError:
        parameter = 0.0
    if not 0 < parameter < limit:
        raise ValueError(
            f"Unknown grid {name!r}; expected 'uniform', 'cosine', 'power:R' with R > 0, or "
            "'geometric:E' with 0 < E < 1."
        )
    try:
        if kind == "power":
            return check_grid(shares**parameter)
        return check_grid([*(1.0 - parameter ** (np.arange(steps) / max(steps - 1, 1))), 1.0])
    except ValueError as error:
        raise ValueError(f"Grid {name!r} with {steps} steps: {error}") from None


def check_grid(grid_S1) -> np.ndarray:
    """A grid of cumulative times as float32 [S+1], checked on the host.

    Raises:
      ValueError: unless it is one-dimensional, holds at least two times, starts at 0, ends at 1 and
        increases.
    """
    grid = np.asarray(grid_S1, np.float32)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(
            "A time grid holds S+1 >= 2 cumulative times in one dimension, "
            f"got an array of shape {grid.shape}."
        )
    if grid[0] != 0 or grid[-1] != 1 or not np.all(np.diff(grid) > 0):
        raise ValueError(
            "A time grid must increase strictly from 0 to 1 (cumulative times, not step sizes), "
            f"got {np.array2string(grid, threshold=12)}."
        )
    return grid
