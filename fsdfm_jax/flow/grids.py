"""Time grids: S+1 cumulative times from 0 (noise) to 1 (data)."""

import numpy as np


def uniform_grid(steps: int) -> np.ndarray:
    """Return the times 0, 1/S .. 1 of the published sampler (arXiv:2509.20624 App. B.1).

    >>> import fsdfm_jax as fs
    >>> fs.uniform_grid(4).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]

    Args:
      steps: S, the number of network calls.

    Returns:
      float32 [S+1].

    Raises:
      ValueError: if steps is not an integer >= 1.
    """
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"The number of steps must be an integer >= 1, got steps={steps!r}.")
    return (np.arange(steps + 1) / steps).astype(np.float32)


def make_grid(name: str, steps: int) -> np.ndarray:
    """Make a time grid by name.

    >>> import fsdfm_jax as fs
    >>> fs.make_grid("power:2", 2).tolist()
    [0.0, 0.25, 1.0]
    >>> fs.make_grid("geometric:0.125", 4).tolist()
    [0.0, 0.5, 0.75, 0.875, 1.0]

    Args:
      name: "uniform", k/S; "cosine", 1 - cos(pi k / 2S), smallest steps first; "power:R" with
        R > 0, (k/S)^R, smallest steps first for R > 1 and largest first for R < 1; or
        "geometric:E" with 0 < E < 1, 1 - E^(k/(S-1)) for k < S, then 1: under a linear schedule
        each step redraws the same share of the positions, and the last one starts at 1 - E.
      steps: S.

    Returns:
      float32 [S+1].

    Raises:
      ValueError: for an unknown name, or if two times coincide in float32.
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
    """Check a grid of cumulative times on the host and return it as float32 [S+1].

    Raises:
      ValueError: unless it is one-dimensional, has at least two times and increases strictly from
        0 to 1.
    """
    grid = np.asarray(grid_S1, np.float32)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(
            "A time grid must be one-dimensional with S+1 >= 2 cumulative times, "
            f"got an array of shape {grid.shape}."
        )
    if grid[0] != 0 or grid[-1] != 1 or not np.all(np.diff(grid) > 0):
        raise ValueError(
            "A time grid must increase strictly from 0 to 1 (cumulative times, not step sizes), "
            f"got {np.array2string(grid, threshold=12)}."
        )
    return grid
