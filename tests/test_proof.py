"""benchmarks/proof.py: which rows win, and that sharpening and repetition don't."""

import numpy as np
import pytest

from benchmarks import proof
from configs import sudoku as config
from fsdfm_jax.exact import grids, sudoku


def row(seed=0, temperature=1.0, grid="uniform", valid=0.5, flags=""):
    given = {"recipe": "ours", "seed": seed, "steps": 8, "temperature": temperature, "grid": grid}
    return given | {"valid": valid, "flags": flags, "distinct": 1.0}


def test_the_best_row_is_one_whose_grids_look_uniform():
    rows = [
        row(valid=0.5),
        row(valid=0.55, grid="geometric:0.01"),
        row(valid=0.7, temperature=0.8, grid="geometric:0.01"),
        row(valid=0.99, temperature=0.4, flags="3 of 990 valid grids are distinct"),
        row(valid=0.6, seed=1),
        row(valid=0.4, seed=1, temperature=0.8),
    ]
    (summary,) = proof.summarise(rows)
    assert summary["published"] == pytest.approx(0.55)
    assert summary["plain"] == pytest.approx(0.575)
    assert (summary["least"], summary["most"]) == (0.6, 0.7)
    assert summary["best"] == pytest.approx(0.65)
    assert summary["temperature"] == [0.8, 1.0]
    assert summary["grid"] == ["geometric:0.01", "uniform"]
    assert (summary["seeds"], summary["flagged"]) == (2, 0)


def test_where_all_are_flagged_the_row_says_so():
    rows = [row(valid=0.9, flags="few"), row(valid=0.8, temperature=0.8, flags="few")]
    (summary,) = proof.summarise(rows)
    assert (summary["best"], summary["flagged"]) == (0.9, 1)


def test_a_handful_of_grids_is_flagged_and_uniform_ones_are_not():
    size, rng = sudoku.get_size("6x6"), np.random.default_rng(0)
    real = grids.sample(size, rng, 400).reshape(400, -1)
    tokens = lambda cells: np.concatenate([cells, np.full((len(cells), 1), size.n)], axis=1)
    verdict = proof._verdict(size, tokens(real))
    assert (verdict["valid"], verdict["flags"]) == (1.0, "")
    few = proof._verdict(size, tokens(np.tile(real[:4], (100, 1))))
    assert few["valid"] == 1.0
    assert few["flags"]


def test_all_recipes_take_as_many_network_evaluations():
    steps = config.get_config("4x4").refine.num_steps
    for recipe in ("heun", "paper"):
        own = proof._equal_steps("4x4", recipe) * proof._COSTS[recipe]
        assert own == pytest.approx(steps * proof._COSTS["ours"], rel=0.01)
