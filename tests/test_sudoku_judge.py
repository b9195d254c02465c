"""Exact probabilities, calibrated statistics, and controls that game the share of valid grids."""

import json
import math

import numpy as np
import pytest

from fsdfm_jax.exact import grids, sudoku, sudoku_judge

FOUR, SIX, NINE = sudoku.SIZES.values()


def _tokens(size, cells_NC):
    return np.concatenate([cells_NC, np.full((len(cells_NC), 1), size.eos_id)], axis=1)


def _uniform(size, count, seed=0):
    return grids.sample(size, np.random.default_rng(seed), count)


@pytest.mark.parametrize("size", [FOUR, SIX, NINE], ids=lambda size: size.name)
def test_uniform_grids_pass(size):
    report = sudoku_judge.judge(size, _tokens(size, _uniform(size, 600)), resamples=50)
    assert report.flags == {}
    for name in ("valid", "well_formed", "rows", "columns", "boxes", "groups"):
        assert report.figures[name].value == 1.0
    for test in report.uniformity.values():
        assert abs(test.z) < 5
        assert test.ratio == pytest.approx(1, abs=1.5)
    json.dumps(report.to_dict())


def test_same_digit_is_that_of_all_grids():
    for size, known in ((FOUR, grids.all_grids(FOUR)), (SIX, grids._with_first_row(SIX))):
        same = np.mean([(g[:, None] == g[None]) for g in known], axis=0)
        np.testing.assert_allclose(sudoku_judge.same_digit(size), same, atol=1e-12)
    drawn = _uniform(NINE, 4000)
    same = np.mean([(g[:, None] == g[None]) for g in drawn], axis=0)
    law = sudoku_judge.same_digit(NINE)
    assert (same[law == 0] == 0).all()
    # 5 standard errors.
    assert (np.abs(same - law) <= 5 * np.sqrt(law * (1 - law) / 4000) + 1e-12).all()


@pytest.mark.parametrize("size", [FOUR, SIX, NINE], ids=lambda size: size.name)
def test_statistics_have_the_mean_and_spread_that_are_assumed(size):
    """Over sets of uniform grids; the spread of n sets has a relative error of 1/sqrt(2n)."""
    count, sets = 64, 400 if size.n < 9 else 60
    drawn = _uniform(size, count * sets).reshape(sets, count, -1)
    for name, statistic in sudoku_judge.STATISTICS.items():
        ratios = [chi / degrees for chi, degrees in (statistic(size, cells) for cells in drawn)]
        assert abs(np.mean(ratios) - 1) < 5 * np.std(ratios) / math.sqrt(sets), name
        spread = sudoku_judge._SPREAD[size.name][name]
        assert np.std(ratios) == pytest.approx(spread, rel=0.05 + 5 / math.sqrt(2 * sets)), name


# ------------------------------------------------------------------------------------------ gaming


def test_one_valid_grid_repeated_is_exposed():
    report = sudoku_judge.judge(SIX, _tokens(SIX, np.repeat(_uniform(SIX, 1), 500, 0)))
    assert report.figures["valid"].value == 1
    assert report.figures["distinct"].value == 1 / 500
    assert report.expected["distinct"] > 0.999
    assert report.most_frequent == 500
    assert len(report.flags) == 3


@pytest.mark.parametrize("size", [FOUR, SIX, NINE], ids=lambda size: size.name)
def test_a_handful_of_grids_is_exposed(size):
    few = _uniform(size, 30)[np.random.default_rng(1).integers(30, size=400)]
    report = sudoku_judge.judge(size, _tokens(size, few), resamples=20)
    assert any("distinct" in flag for flag in report.flags)
    assert any("pairs" in flag for flag in report.flags)


def test_all_distinct_but_of_one_kind_is_exposed():
    """Grids whose first row ends in 6: all valid, all distinct."""
    drawn = _uniform(SIX, 3000)
    report = sudoku_judge.judge(SIX, _tokens(SIX, drawn[drawn[:, 5] == 5]))
    assert report.figures["distinct"].value > 0.999
    assert any("digits" in flag for flag in report.flags)


def test_pairs_expose_what_digits_do_not():
    """Cyclic relabellings of grids whose first two digits are neighbours."""
    drawn = _uniform(SIX, 6000)
    drawn = drawn[(drawn[:, 1] - drawn[:, 0]) % 6 == 1]
    report = sudoku_judge.judge(SIX, _tokens(SIX, drawn), resamples=20)
    assert report.uniformity["digits"].z < 5
    assert report.uniformity["pairs"].z > 8


# ------------------------------------------------------------------------------------------- shares


def test_invalid_and_malformed_samples():
    drawn = _tokens(SIX, _uniform(SIX, 8))
    drawn[0, :2] = drawn[0, 1::-1]  # the row holds, two columns break
    drawn[1, -1] = 0  # no end of the text
    drawn[2, 5] = SIX.eos_id  # no digit
    report = sudoku_judge.judge(SIX, drawn)
    assert report.figures["valid"].value == 5 / 8
    assert report.figures["well_formed"].value == 6 / 8
    assert report.figures["rows"].value == pytest.approx(1 - 1 / 48)
    assert report.figures["columns"].value == pytest.approx(1 - 3 / 48)
    assert report.figures["distinct"].count == 5
    nothing = sudoku_judge.judge(SIX, np.zeros((3, 37), int))
    assert nothing.figures["valid"].value == 0
    assert nothing.uniformity == {}


def test_distinct_grids_expected():
    mean, spread = sudoku_judge.expected_distinct(FOUR, 500)
    rng = np.random.default_rng(0)
    found = [len(np.unique(rng.integers(288, size=500))) for _ in range(4000)]
    assert abs(np.mean(found) - mean) < 5 * spread / math.sqrt(4000)
    assert np.std(found) == pytest.approx(spread, rel=0.06)
    mean, spread = sudoku_judge.expected_distinct(SIX, 10_000)
    assert 10_000 - mean == pytest.approx(10_000 * 9_999 / 2 / 28_200_960)
    # Where the two formulas meet.
    exact = SIX.num_grids * -math.expm1(28_000 * math.log1p(-1 / SIX.num_grids))
    assert sudoku_judge.expected_distinct(SIX, 28_000)[0] == pytest.approx(exact, abs=0.01)


def test_total_variation_of_four():
    known = grids.all_grids(FOUR)
    exact = sudoku_judge.judge(FOUR, _tokens(FOUR, np.tile(known, (3, 1))), resamples=20)
    assert exact.figures["total_variation"].value == pytest.approx(0, abs=1e-12)
    half = _tokens(FOUR, np.tile(known, (2, 1)))
    half[288:, 0] = FOUR.eos_id
    report = sudoku_judge.judge(FOUR, half, resamples=200)
    figure = report.figures["total_variation"]
    assert figure.value == pytest.approx(0.5)
    assert figure.low < 0.5 < figure.high
    only = sudoku_judge.judge(FOUR, _tokens(FOUR, np.repeat(known[:1], 10, 0)), resamples=20)
    assert only.figures["total_variation"].value == pytest.approx(287 / 288)
    assert "total_variation" not in sudoku_judge.judge(SIX, _tokens(SIX, _uniform(SIX, 5))).figures


def test_total_variation_expected_of_uniform_grids():
    rng = np.random.default_rng(0)
    for count in (100, 1000, 20_000):
        drawn = rng.multinomial(count, np.full(288, 1 / 288), size=300) / count
        found = np.abs(drawn - 1 / 288).sum(1) / 2
        expected = sudoku_judge.expected_total_variation(288, count)
        assert abs(found.mean() - expected) < 5 * found.std() / math.sqrt(300)


def test_solved_puzzles():
    solutions = _uniform(SIX, 6)
    puzzles = np.where(np.random.default_rng(0).random(solutions.shape) < 0.6, -1, solutions)
    answers = _tokens(SIX, solutions)
    assert sudoku_judge.solved(SIX, answers, puzzles).value == 1
    answers[0] = answers[1]  # valid, but of another puzzle
    answers[2, :2] = answers[2, 1::-1]  # invalid
    figure = sudoku_judge.solved(SIX, answers, puzzles)
    assert figure.value == 4 / 6
    assert 0 < figure.low < 4 / 6 < figure.high < 1


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"samples of 6x6 must have 37 tokens.*\(5, 36\)"):
        sudoku_judge.judge(SIX, np.zeros((5, 36), int))
    with pytest.raises(ValueError, match="a puzzle of 36 cells for each of 5 samples"):
        sudoku_judge.solved(SIX, np.zeros((5, 37), int), np.zeros((4, 36), int))
