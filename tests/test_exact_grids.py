"""Uniform grids: counts, an independent search, and chi-square tests."""

import numpy as np
import pytest
from chance import assert_frequencies
from scipy import stats

from fsdfm_jax.exact import grids, sudoku

FOUR, SIX, NINE = sudoku.SIZES.values()


def _sample(size, count, seed=0):
    return grids.sample(size, np.random.default_rng(seed), count)


def test_four_lists_what_a_search_finds():
    found = sudoku.solve(FOUR, np.full(16, sudoku.BLANK), limit=1000)
    known = grids.all_grids(FOUR)
    assert {g.tobytes() for g in found} == {g.tobytes() for g in known}
    assert len(found) == len(known) == FOUR.num_grids == 288


def test_six_counts_all_grids():
    assert len(grids._with_first_row(SIX)) * 720 == SIX.num_grids == 28_200_960
    assert sudoku.satisfied(SIX, grids._with_first_row(SIX)).all()
    assert len(np.unique(grids._with_first_row(SIX), axis=0)) == 39_168


@pytest.mark.parametrize("size", [FOUR, SIX, NINE], ids=lambda size: size.name)
def test_samples_are_valid_and_a_function_of_the_seed(size):
    drawn = _sample(size, 600)
    assert drawn.shape == (600, size.num_cells)
    assert drawn.dtype == np.int8
    assert sudoku.satisfied(size, drawn).all()
    np.testing.assert_array_equal(drawn, _sample(size, 600))
    assert (drawn != _sample(size, 600, seed=1)).any()
    assert _sample(size, 0).shape == (0, size.num_cells)


def test_four_is_uniform():
    known = [g.tobytes() for g in grids.all_grids(FOUR)]
    place = {name: i for i, name in enumerate(known)}
    drawn = [place[g.tobytes()] for g in _sample(FOUR, 100_000)]
    assert_frequencies(np.bincount(drawn, minlength=288), np.full(288, 1 / 288))


def test_six_is_uniform():
    drawn = _sample(SIX, 1_200_000).astype(np.int64)
    # The relabelling that was applied, and the grid under it.
    labels = drawn[:, :6]
    assert_frequencies(_counts(labels, 720), np.full(720, 1 / 720))
    back = np.argsort(labels, axis=1)
    normal = np.take_along_axis(back, drawn, axis=1)
    # Each of the 39,168 is expected 30.6 times; that one is missing has a probability of 2e-9.
    counts = _counts(normal, 39_168)
    assert counts.min() > 0
    expected = len(drawn) / 39_168
    chi = ((counts - expected) ** 2).sum() / expected
    assert stats.chi2.sf(chi, 39_167) > 1e-6
    assert stats.chi2.cdf(chi, 39_167) > 1e-6


def _counts(rows, size):
    _, counts = np.unique(rows @ 7 ** np.arange(rows.shape[1]), return_counts=True)
    return np.pad(np.sort(counts), (size - len(counts), 0))


# ---------------------------------------------------------------------------------------------- 9x9


def _frame_of(drawn):
    """The frames of grids, after relabelling the first box to 123/456/789."""
    square = drawn.reshape(-1, 9, 9).astype(np.int64)
    back = np.argsort(square[:, :3, :3].reshape(-1, 9), axis=1)
    square = np.take_along_axis(back, square.reshape(-1, 81), axis=1).reshape(-1, 9, 9)
    fields = {}
    for box, down, across in ((2, 0, 3), (3, 0, 6), (4, 3, 0), (7, 6, 0)):
        part = square[:, down : down + 3, across : across + 3]
        for name, axis in (("rows", 1), ("columns", 2)):
            triple = np.zeros((len(part), 9), np.int64)
            for i in range(3):
                np.put_along_axis(triple, np.take(part, i, axis=axis), i, axis=1)
            fields[f"{name}{box}"] = grids.partitions().index[grids._code(triple)]
    return grids.Frame(**fields)


def test_nine_completions_are_those_of_a_search():
    rng = np.random.default_rng(5)
    frames = grids.draw_frames(rng, 200)
    ways = grids.completions(frames).sum((1, 2), dtype=np.int64)
    fewest = int(ways.argmin())
    frame = grids.Frame(*(field[fewest : fewest + 1] for field in frames))
    grid = grids._complete(frame, grids.completions(frame), np.zeros((1, 3)))[0].reshape(9, 9)
    puzzle = grid.copy()
    puzzle[3:, 3:] = sudoku.BLANK
    found = sudoku.solve(NINE, puzzle.ravel(), limit=10_000)
    assert len(found) == ways[fewest]


def test_nine_every_completion_is_drawn_equally():
    frames = grids.draw_frames(np.random.default_rng(0), 1)
    ways = grids.completions(frames)
    total = int(ways.sum(dtype=np.int64))
    many = grids.Frame(*(np.repeat(field, 25_000) for field in frames))
    u_M3 = np.random.default_rng(1).random((25_000, 3))
    repeated = np.repeat(ways, 25_000, axis=0)
    parts = [
        grids._complete(
            grids.Frame(*(f[i : i + 1000] for f in many)),
            repeated[i : i + 1000],
            u_M3[i : i + 1000],
        )
        for i in range(0, 25_000, 1000)
    ]
    _, counts = np.unique(np.concatenate(parts), axis=0, return_counts=True)
    expected = 25_000 / total  # about 9
    counts = np.pad(counts, (0, total - len(counts)))
    chi = ((counts - expected) ** 2).sum() / expected
    assert stats.chi2.sf(chi, total - 1) > 1e-6


def test_nine_completions_add_up_to_all_grids():
    rng = np.random.default_rng(0)
    ways = np.concatenate(
        [grids.completions(grids.draw_frames(rng, 500)).sum((1, 2)) for _ in range(16)]
    )
    assert ways.max() <= grids.MOST_COMPLETIONS
    mean = NINE.num_grids / 362_880 / 2_612_736**2
    assert abs(ways.mean() - mean) < 5 * ways.std() / len(ways) ** 0.5


def test_nine_frames_are_kept_in_proportion_to_their_completions():
    """Over uniform grids, the mean of 1/N is one over the mean of N over all frames."""
    frames = _frame_of(_sample(NINE, 3000))
    inverse = 1 / grids.completions(frames).sum((1, 2), dtype=np.int64)
    mean = NINE.num_grids / 362_880 / 2_612_736**2
    # Frames drawn without rejection would be 0.012 above it.
    error = inverse.std() / len(inverse) ** 0.5
    assert abs(inverse.mean() - 1 / mean) < 5 * error
    assert 5 * error * mean < 0.012


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nine_count_all():
    """A quarter of an hour; the number of grids is that of Felgenhauer and Jarvis (2006)."""
    assert grids.count_all() == (NINE.num_grids, 1_152, grids.MOST_COMPLETIONS)


# ------------------------------------------------------------------------------------------- faults


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        _sample(FOUR, -1)
    with pytest.raises(ValueError, match="only 4x4 grids can be enumerated, got 6x6"):
        grids.all_grids(SIX)
