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

    Args:
      name: "uniform", k/S; "cosine", 1 - cos(pi k / 2S), whose first steps are the smallest; or
        "power:R" with R > 0, (k/S)^R, whose first steps are the smallest for R > 1 and the largest
        for R < 1.
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
    try:
        power = float(number) if kind == "power" else 0.0
    except ValueError:
        power = 0.0
    if not 0 < power < np.inf:
        raise ValueError(
            f"Unknown grid {name!r}; expected 'uniform', 'cosine' or 'power:R' with R > 0."
        )
    try:
        return check_grid(shares**power)
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
