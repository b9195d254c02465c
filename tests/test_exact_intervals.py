"""Coverage of intervals, and their values by the formulas."""

import math

import numpy as np
import pytest

from fsdfm_jax.exact import intervals


def test_wilson_has_the_published_values():
    # Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for hits, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        figure = intervals.share(hits, count)
        assert figure.value == hits / count
        np.testing.assert_allclose(figure[1:3], (low, high), atol=6e-5)
    assert intervals.share(20, 20).high == 1.0
    assert math.isnan(intervals.share(0, 0).value)


@pytest.mark.parametrize(("hits", "count"), [(-1, 3), (4, 3)])
def test_impossible_shares_are_refused(hits, count):
    with pytest.raises(ValueError, match="0 <= hits <= count"):
        intervals.share(hits, count)


def test_means_and_their_intervals():
    values = np.random.default_rng(0).standard_normal(400)
    error = values.std() / 20
    for figure in (intervals.mean(values), intervals.normal(values)):
        assert figure.value == pytest.approx(values.mean())
        # A bootstrap of 1,000 knows its ends to about 5% of their distance.
        np.testing.assert_allclose(
            [figure.value - figure.low, figure.high - figure.value], 1.96 * error, rtol=0.15
        )
    assert math.isnan(intervals.mean(values[:1]).low)
    with pytest.raises(ValueError, match="at least 2 resamples"):
        intervals.mean(values, resamples=1)


def test_centred_bootstrap_stands_around_the_value():
    kinds = np.random.default_rng(0).integers(50, size=200)

    def entropy(rows):
        share = np.bincount(kinds[rows]) / len(rows)
        share = share[share > 0]
        return {"entropy": -float(share @ np.log(share))}

    figure = intervals.centred_bootstrap(entropy, 200)["entropy"]
    assert figure.value == entropy(np.arange(200))["entropy"]
    assert figure.low < figure.value < figure.high
    assert figure.high - figure.low < 0.2
