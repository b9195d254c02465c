"""Time grids by name, and rejected values."""

import numpy as np
import pytest

from fsdfm_jax.flow.grids import check_grid, make_grid, uniform_grid


def test_uniform_grid():
    np.testing.assert_array_equal(uniform_grid(4), np.float32([0, 0.25, 0.5, 0.75, 1]))
    for steps in (1, 2, 3, 7, 10, 100, 1000, 1024):
        grid = check_grid(uniform_grid(steps))
        assert grid.dtype == np.float32
        assert len(grid) == steps + 1
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"integer >= 1, got steps={steps}"):
            uniform_grid(steps)


@pytest.mark.parametrize("grid", [[], [0.0], [[0.0, 1.0]]])
def test_grids_of_another_shape(grid):
    with pytest.raises(ValueError, match=r"one-dimensional with S\+1 >= 2 cumulative times"):
        check_grid(grid)


def test_grids_by_name():
    np.testing.assert_array_equal(make_grid("uniform", 3), uniform_grid(3))
    thirds = np.arange(4) / 3
    np.testing.assert_allclose(make_grid("power:2", 3), thirds**2, rtol=1e-6)
    np.testing.assert_allclose(make_grid("power:0.5", 3), thirds**0.5, rtol=1e-6)
    cosine = [0, 1 - np.cos(np.pi / 6), 1 - np.cos(np.pi / 3), 1]
    np.testing.assert_allclose(make_grid("cosine", 3), cosine, rtol=1e-6)
    np.testing.assert_allclose(make_grid("geometric:0.25", 3), [0, 0.5, 0.75, 1], rtol=1e-6)
    np.testing.assert_allclose(make_grid("geometric:0.01", 2), [0, 0.99, 1], rtol=1e-6)
    np.testing.assert_allclose(make_grid("geometric:0.64", 3), [0, 0.2, 0.36, 1], rtol=1e-6)
    for shape in ("uniform", "power:3", "cosine", "geometric:0.01"):
        assert make_grid(shape, 1).tolist() == [0, 1]
        assert len(make_grid(shape, 1024)) == 1025
        assert make_grid(shape, 1024).dtype == np.float32


@pytest.mark.parametrize(
    "shape",
    ["power", "power:0", "power:x", "power:inf", "geometric:0", "geometric:1", "linear", ""],
)
def test_unknown_grids_are_refused(shape):
    with pytest.raises(ValueError, match=f"Unknown grid '{shape}'"):
        make_grid(shape, 4)


def test_a_grid_that_float32_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="increase strictly"):
        make_grid("power:40", 1024)
