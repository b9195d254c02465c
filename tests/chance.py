"""Statistical tests of independent draws against exact probabilities."""

import numpy as np
from scipy import stats

# Cells below this expectation are pooled, so that the normal approximation holds in each that is
# judged.
_POOL = 25


def assert_frequencies(counts, probabilities):
    """Counts of n independent draws agree with a categorical distribution.

    Every cell is within 5 standard errors sqrt(n p (1-p)); chi-square is below the quantile that
    leaves the same 6e-7 of probability above it; cells of probability zero empty. Keys are fixed,
    so that a pass stays one.
    """
    counts = np.asarray(counts, np.float64).ravel()
    probabilities = np.asarray(probabilities, np.float64).ravel()
    assert counts.shape == probabilities.shape
    np.testing.assert_allclose(probabilities.sum(), 1.0, rtol=1e-9)
    assert not counts[probabilities == 0].any(), "an event of probability zero was drawn"
    total = counts.sum()
    small = total * probabilities < _POOL
    observed = np.append(counts[~small], counts[small].sum())
    share = np.append(probabilities[~small], probabilities[small].sum())
    observed, share = observed[share > 0], share[share > 0]
    expected = total * share
    error = np.sqrt(np.maximum(expected * (1 - share), 1e-9))
    # An event of tiny pooled probability may still happen once or twice.
    assert np.all(np.abs(observed - expected) <= 5 * error + 3), (observed, expected)
    judged = expected >= _POOL
    if judged.sum() > 1:
        chi_square = np.sum((observed - expected)[judged] ** 2 / expected[judged])
        assert chi_square < stats.chi2.isf(6e-7, judged.sum()), (observed, expected)


def assert_mean(values, expected, *, rounding=1e-5):
    """The mean over axis 0 is within 5 standard errors of the sample, plus float32 rounding."""
    values = np.asarray(values, np.float64)
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    assert np.all(np.abs(values.mean(0) - expected) <= 5 * error + rounding)
