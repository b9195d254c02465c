"""benchmarks/time_grids.py: the exact posterior, and what its samples are worth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import time_grids
from fsdfm_jax.exact import sudoku, sudoku_judge
from fsdfm_jax.flow.sampling import Sampling


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_the_posterior_is_that_of_bayes(t):
    known = np.array([[0, 1, 2], [2, 1, 0], [1, 1, 1], [0, 0, 2]])
    xt = np.array([[0, 1, 1], [2, 2, 2]])
    logits = time_grids.enumerated(known, 3)(jnp.asarray(xt), jnp.full(2, t), None)
    for row, found in zip(xt, jax.nn.softmax(logits), strict=True):
        seen = np.where(known == row, t + (1 - t) / 3, (1 - t) / 3).prod(axis=1)
        expected = np.einsum("m,mlv->lv", seen / seen.sum(), np.eye(3)[known])
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_most_samples_are_valid_on_the_geometric_grid_and_fewer_on_the_uniform_one():
    denoise, process, length, judge = time_grids._sudoku()
    rows = {}
    for name in ("uniform", "geometric:0.001"):
        tokens = time_grids.draw(denoise, process, length, Sampling(8, "mixture", name), 512)
        assert tokens.shape == (512, 17)
        rows[name] = judge(tokens)
        found = sudoku_judge.judge(sudoku.get_size("4x4"), tokens).figures["valid"].value
        assert rows[name]["valid"] == found
    assert rows["geometric:0.001"]["valid"] > 0.97
    assert rows["uniform"]["valid"] < 0.92
