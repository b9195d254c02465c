"""benchmarks/proof.py: which rows win, and that sharpening and repetition don't."""

import numpy as np
import pytest
import tiny_law

from benchmarks import proof
from fsdfm_jax.exact import grids, hmm, sudoku

TASK = proof.make_task("sudoku:6x6")


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
    (summary,) = proof.summarise(TASK, rows)
    assert summary["published"] == pytest.approx(0.55)
    assert summary["plain"] == pytest.approx(0.575)
    assert (summary["least"], summary["most"]) == (0.6, 0.7)
    assert summary["best"] == pytest.approx(0.65)
    assert summary["temperature"] == [0.8, 1.0]
    assert summary["grid"] == ["geometric:0.01", "uniform"]
    assert (summary["seeds"], summary["flagged"]) == (2, 0)


def test_where_all_are_flagged_the_row_says_so():
    rows = [row(valid=0.9, flags="few"), row(valid=0.8, temperature=0.8, flags="few")]
    (summary,) = proof.summarise(TASK, rows)
    assert (summary["best"], summary["flagged"]) == (0.9, 1)


def test_a_handful_of_grids_is_flagged_and_uniform_ones_are_not():
    size, rng = sudoku.get_size("6x6"), np.random.default_rng(0)
    real = grids.sample(size, rng, 400).reshape(400, -1)
    tokens = lambda cells: np.concatenate([cells, np.full((len(cells), 1), size.n)], axis=1)
    verdict = TASK.judge(tokens(real))
    assert (verdict["valid"], verdict["flags"]) == (1.0, "")
    few = TASK.judge(tokens(np.tile(real[:4], (100, 1))))
    assert few["valid"] == 1.0
    assert few["flags"]


def test_text_of_less_entropy_is_flagged_and_the_law_itself_is_not():
    law, rng = tiny_law.make(num_states=6, num_words=12), np.random.default_rng(0)
    real = proof._judge_language(law, hmm.sample(law, rng, 1_000, 64))
    assert real["flags"] == ""
    assert real["excess"] == pytest.approx(0, abs=0.03)
    verdict = proof._judge_language(law, hmm.sample(tiny_law.sharpened(law), rng, 1_000, 64))
    assert verdict["excess"] < -0.1
    assert verdict["flags"] == "entropy_1; entropy_2"


def test_a_language_is_ranked_by_the_least_excess():
    task = TASK._replace(figure="excess")
    rows = [
        {**row(), "excess": 0.5},
        {**row(grid="geometric:0.01"), "excess": 0.3},
        {**row(temperature=0.9, flags="entropy_2"), "excess": 0.1},
    ]
    (summary,) = proof.summarise(task, rows)
    assert (summary["published"], summary["plain"], summary["best"]) == (0.5, 0.3, 0.3)


@pytest.mark.parametrize(("updates", "heun", "paper"), [(2, 16 / 5, 16 / 7), (4, 26 / 5, 26 / 7)])
def test_all_recipes_take_as_many_network_evaluations(updates, heun, paper):
    refine = TASK.refine.copy_and_resolve_references()
    refine.auxiliary_updates = updates
    task = TASK._replace(refine=refine)
    assert proof._equal_steps(task, "heun") == round(refine.num_steps * heun)
    assert proof._equal_steps(task, "paper") == round(refine.num_steps * paper)
