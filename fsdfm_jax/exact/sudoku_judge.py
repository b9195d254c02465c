"""Judge samples of a Sudoku model by the rules and by the uniform distribution.

The fraction of valid grids alone can be gamed: by repeating one valid grid or a few, or by
preferring some. Valid grids are therefore also compared with the same number of uniform ones: the
number of distinct grids, the frequency of each digit in each cell, and that of each pair of digits
in each pair of cells. Under the uniform distribution, for cells i and j and digits v and w,

    P(x_i = v) = 1/n
    P(x_i = v, x_j = w) = same(i, j) / n  if v = w,  else  (1 - same(i, j)) / (n (n-1))

where same(i, j) = P(x_i = x_j) is 0 in a common row, column or box. With boxes of R rows and C
columns it is 1 / ((R-1) C) in the same band, 1 / (R (C-1)) in the same stack, and otherwise
1 / (R C), because reordering the rows of a band, or the digits, preserves uniformity.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from fsdfm_jax.exact import grids, intervals, sudoku
from fsdfm_jax.exact.intervals import Figure
from fsdfm_jax.exact.sudoku import Sudoku

# Standard deviation of chi-square over degrees of freedom, for sets of 512 uniform grids. It isn't
# that of independent chi-squares, because the cells of a grid are dependent. It is 2 to 3% larger
# for 64 grids; measured on 4,000 sets (4x4), 2,000 (6x6), and 600 of 64 with 200 of 512 (9x9).
_SPREAD = {
    "4x4": {"digits": 0.301, "pairs": 0.163},
    "6x6": {"digits": 0.137, "pairs": 0.0448},
    "9x9": {"digits": 0.068, "pairs": 0.0147},
}
# Statistics beyond this many standard deviations are flagged; for uniform grids the probability is
# below 0.1%.
FLAGGED = 5.0


class Validity(NamedTuple):
    """Validity of each sample.

    Attributes:
      well_formed_N: bool [N], n² digits and end-of-text.
      satisfied_N3n: bool [N, 3n], rows, columns and boxes that have each digit once.
      valid_N: bool [N], well formed, with all groups satisfied.
    """

    well_formed_N: np.ndarray
    satisfied_N3n: np.ndarray
    valid_N: np.ndarray


class Uniformity(NamedTuple):
    """A chi-square test of uniformity.

    Attributes:
      ratio: chi-square over its degrees of freedom; 1 is expected for uniform grids.
      z: deviation from 1 in standard deviations of uniform grids.
    """

    ratio: float
    z: float


class Report(NamedTuple):
    """The verdict on N samples.

    Attributes:
      figures: fractions of samples with intervals: valid, well_formed, rows, columns, boxes, groups
        (satisfied ones), distinct (among valid ones; the interval assumes rare repeats). For 4x4
        also total_variation, to be compared with its expected value, which is above 0.
      expected: values for the same number of uniform grids: distinct, total_variation.
      most_frequent: count of the most frequent valid grid.
      uniformity: tests on valid grids, digits and pairs.
      flags: figure ("distinct", "digits", "pairs") -> sentence, for significant deviations from
        uniformity.
    """

    figures: dict[str, Figure]
    expected: dict[str, float]
    most_frequent: int
    uniformity: dict[str, Uniformity]
    flags: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {
            "figures": {name: figure._asdict() for name, figure in self.figures.items()},
            "expected": self.expected,
            "most_frequent": self.most_frequent,
            "uniformity": {name: test._asdict() for name, test in self.uniformity.items()},
            "flags": self.flags,
        }


def validity(size: Sudoku, tokens_NL: np.ndarray) -> Validity:
    """Apply the rules to samples.

    Args:
      size: of the grids.
      tokens_NL: int [N, n²+1], ids of digits and end-of-text.

    Raises:
      ValueError: for samples of another length.
    """
    tokens_NL = np.asarray(tokens_NL)
    if tokens_NL.ndim != 2 or tokens_NL.shape[1] != size.block_length:
        raise ValueError(
            f"samples of {size.name} must have {size.block_length} tokens ({size.num_cells} digits "
            f"and end-of-text), got shape {tokens_NL.shape}; sample blocks of that length"
        )
    cells_NC = tokens_NL[:, :-1]
    satisfied_N3n = sudoku.satisfied(size, cells_NC)
    is_digit_NC = (cells_NC >= 0) & (cells_NC < size.n)
    well_formed_N = is_digit_NC.all(1) & (tokens_NL[:, -1] == size.eos_id)
    return Validity(well_formed_N, satisfied_N3n, well_formed_N & satisfied_N3n.all(1))


def judge(size: Sudoku, tokens_NL: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> Report:
    """Judge unconditional samples.

    Args:
      size: of the grids.
      tokens_NL: int [N, n²+1], independent samples.
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      ValueError: for samples of another length.
    """
    result = validity(size, tokens_NL)
    count, n = len(result.valid_N), size.n
    average = lambda values_N: intervals.mean(values_N, resamples=resamples, seed=seed)
    rows_N, columns_N, boxes_N = result.satisfied_N3n.reshape(count, 3, n).mean(2).T
    figures = {
        "valid": intervals.share(int(result.valid_N.sum()), count),
        "well_formed": intervals.share(int(result.well_formed_N.sum()), count),
        "rows": average(rows_N),
        "columns": average(columns_N),
        "boxes": average(boxes_N),
        "groups": average(result.satisfied_N3n.mean(1)),
    }
    valid_MC = np.asarray(tokens_NL)[result.valid_N, :-1]
    number = len(valid_MC)
    distinct, repeats = np.unique(valid_MC, axis=0, return_counts=True)
    figures["distinct"] = intervals.share(len(distinct), number)
    mean, spread = expected_distinct(size, number)
    expected = {"distinct": mean / number if number else math.nan}
    flags = {}
    if len(distinct) < mean - FLAGGED * spread - 1:
        flags["distinct"] = (
            f"{len(distinct)} of {number} valid grids are distinct; expected if uniform: {mean:.1f}"
        )
    uniformity = {}
    if number:
        for name, statistic in STATISTICS.items():
            uniformity[name] = test = _compare(size, name, statistic(size, valid_MC))
            if test.z > FLAGGED:
                flags[name] = (
                    f"{name} of valid grids are not uniform: chi-square {test.ratio:.2f} times "
                    f"that of uniform ones, z = {test.z:.1f}"
                )
    if size.n == 4:
        kinds_N = _kinds(size, np.asarray(tokens_NL), result.valid_N)
        distance = lambda rows: {"total_variation": _total_variation(size, kinds_N[rows])}
        figures |= intervals.centred_bootstrap(distance, count, resamples=resamples, seed=seed)
        expected["total_variation"] = expected_total_variation(size.num_grids, count)
    most_frequent = int(repeats.max(initial=0))
    return Report(figures, expected, most_frequent, uniformity, flags)


def solved(size: Sudoku, tokens_NL: np.ndarray, puzzles_NC: np.ndarray) -> Figure:
    """Return the fraction of puzzles that samples solve: valid, with all givens kept.

    Args:
      size: of the puzzles.
      tokens_NL: int [N, n²+1], one sample per puzzle.
      puzzles_NC: int [N, n²], -1 for blank cells.

    Raises:
      ValueError: if the number or length of samples doesn't match.
    """
    if puzzles_NC.shape != (len(tokens_NL), size.num_cells):
        raise ValueError(
            f"expected a puzzle of {size.num_cells} cells for each of {len(tokens_NL)} samples, "
            f"got shape {puzzles_NC.shape}"
        )
    valid_N = validity(size, tokens_NL).valid_N
    kept_N = ((puzzles_NC == sudoku.BLANK) | (puzzles_NC == tokens_NL[:, :-1])).all(1)
    return intervals.share(int((valid_N & kept_N).sum()), len(valid_N))


# ------------------------------------------------------------------------------------- distinctness


def expected_distinct(size: Sudoku, count: int) -> tuple[float, float]:
    """Return (mean, standard deviation) of the number of distinct grids among uniform ones."""
    kinds = size.num_grids
    pairs = count * (count - 1) / 2 / kinds  # expected number of equal pairs
    if count < kinds / 1000:  # rare, so Poisson; the formulas below would cancel
        return count - pairs, math.sqrt(pairs)
    one, two = (1 - 1 / kinds) ** count, (1 - 2 / kinds) ** count  # P(one, two kinds are missing)
    variance = kinds * one + kinds * (kinds - 1) * two - (kinds * one) ** 2
    return kinds * (1 - one), math.sqrt(max(variance, 0.0))


def expected_total_variation(kinds: int, count: int) -> float:
    """Mean total variation between a uniform distribution and the frequencies of `count` draws.

    The mean absolute deviation of a binomial variable is 2 (k+1) C(m, k+1) p^(k+1) (1-p)^(m-k),
    with k the integer part of m p (de Moivre).
    """
    p = 1 / kinds
    k = math.floor(count * p)
    if k >= count:
        return 0.0
    logarithm = (
        math.lgamma(count + 1)
        - math.lgamma(k + 2)
        - math.lgamma(count - k)
        + (k + 1) * math.log(p)
        + (count - k) * math.log1p(-p)
    )
    deviation = 2 * (k + 1) * math.exp(logarithm)
    return kinds * deviation / count / 2


def _kinds(size: Sudoku, tokens_NL: np.ndarray, valid_N: np.ndarray) -> np.ndarray:
    """Index of each sample among all grids, or the number of grids if invalid, int [N]."""
    code = lambda cells: cells.astype(np.int64) @ size.n ** np.arange(size.num_cells)
    known = np.sort(code(grids.all_grids(size)))
    return np.where(valid_N, np.searchsorted(known, code(tokens_NL[:, :-1])), len(known))


def _total_variation(size: Sudoku, kinds_N: np.ndarray) -> float:
    shares = np.bincount(kinds_N, minlength=size.num_grids + 1) / len(kinds_N)
    law = np.append(np.full(size.num_grids, 1 / size.num_grids), 0.0)
    return float(np.abs(shares - law).sum() / 2)


# --------------------------------------------------------------------------------------- uniformity


@functools.lru_cache
def same_digit(size: Sudoku) -> np.ndarray:
    """P(x_i = x_j) under the uniform distribution, float64 [n², n²]; see the module."""
    row, column = np.divmod(np.arange(size.num_cells), size.n)
    band, stack = row // size.box_rows, column // size.box_cols
    equal = lambda values: values[:, None] == values[None]
    rows, columns = size.box_rows, size.box_cols
    shared = np.full((size.num_cells, size.num_cells), 1 / (rows * columns))
    shared[equal(band)] = 1 / ((rows - 1) * columns)
    shared[equal(stack)] = 1 / (rows * (columns - 1))
    shared[equal(row) | equal(column) | (equal(band) & equal(stack))] = 0.0
    np.fill_diagonal(shared, 1.0)
    return shared


def digit_chi_square(size: Sudoku, cells_MC: np.ndarray) -> tuple[float, int]:
    """Return (chi-square of digits in cells, degrees of freedom), summed over cells."""
    expected = len(cells_MC) / size.n
    counts = _one_hot(size, cells_MC).sum(0)
    return float(((counts - expected) ** 2).sum() / expected), size.num_cells * (size.n - 1)


def pair_chi_square(size: Sudoku, cells_MC: np.ndarray) -> tuple[float, int]:
    """Return (chi-square of digit pairs, degrees of freedom), summed over cell pairs."""
    n, cells = size.n, size.num_cells
    hot = _one_hot(size, cells_MC).reshape(len(cells_MC), -1)
    counts = (
        (hot.T @ hot).reshape(cells, n, cells, n).transpose(0, 2, 1, 3)[np.triu_indices(cells, 1)]
    )
    shared = same_digit(size)[np.triu_indices(cells, 1)][:, None, None]
    law = np.where(np.eye(n, dtype=bool), shared / n, (1 - shared) / (n * (n - 1)))
    expected = len(cells_MC) * law
    possible = law > 0
    chi = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    return float(chi), int(possible.sum()) - len(law)


STATISTICS = {"digits": digit_chi_square, "pairs": pair_chi_square}


def _one_hot(size: Sudoku, cells_MC: np.ndarray) -> np.ndarray:
    return (cells_MC[..., None] == np.arange(size.n)).astype(np.float32)


def _compare(size: Sudoku, name: str, found: tuple[float, int]) -> Uniformity:
    ratio = found[0] / found[1]
    return Uniformity(ratio, (ratio - 1) / _SPREAD[size.name][name])
