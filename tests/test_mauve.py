"""MAUVE of features with known distributions, and messages if it can't be computed."""

import importlib.metadata
import importlib.util
import json
import os
import sys

import numpy as np
import pytest

from fsdfm_jax.evaluate import mauve

CENTRES = np.random.default_rng(0).normal(size=(6, 12)) * 3


def _features(seed, num_samples=120, centres=CENTRES, weights=None):
    rng = np.random.default_rng(seed)
    rows = centres[rng.choice(len(centres), size=num_samples, p=weights)]
    return (rows + rng.normal(size=rows.shape)).astype(np.float32)


@pytest.fixture
def installed():
    pytest.importorskip("mauve")


def test_available_tells_whether_it_is_installed(monkeypatch):
    assert mauve.available() == (importlib.util.find_spec("mauve") is not None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not mauve.available()


def test_facts_say_what_the_score_depends_on(monkeypatch):
    facts = mauve.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["half_samples"] == 100
    installed = importlib.util.find_spec("mauve") is not None
    assert facts["version"] == (importlib.metadata.version("mauve-text") if installed else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", {"mauve-text": "9.9"}.__getitem__)
    assert mauve.facts()["version"] == "9.9"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("sizes", "buckets"), [((90, 120), 9), ((52, 48), 5), ((40, 40), 4)])
def test_buckets_are_a_tenth_of_the_smaller_set(sizes, buckets):
    import mauve as package

    first, second = (_features(i, size) for i, size in enumerate(sizes))
    with mauve._quiet():
        found = package.compute_mauve(p_features=first, q_features=second, verbose=False)
    assert found.num_buckets == buckets


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)  # its import fails
    with pytest.raises(ValueError, match=r"pip install 'fsdfm_jax\[mauve\]'"):
        mauve.score(_features(1), _features(2), seed=0)


def _with(value):
    features = _features(1)
    features[3, 2] = value
    return features


@pytest.mark.parametrize(
    ("features", "reference", "message"),
    [
        (_features(1, 39), _features(2), r"features of at least 40 samples, got shape \(39, 12\)"),
        (_features(1), _features(2, 39), r"reference of at least 40 samples"),
        (_features(1)[:, 0], _features(2), r"got shape \(120,\)"),
        (_features(1)[:, :-1], _features(2), "widths 11 and 12"),
        (_with(np.nan), _features(2), "features have values that are not finite"),
        (_features(2), _with(np.inf), "reference have values that are not finite"),
    ],
)
def test_what_is_refused(features, reference, message):
    """Both with and without the package."""
    with pytest.raises(ValueError, match=message):
        mauve.score(features, reference, seed=0)


def test_half_samples_repeat_no_row():
    rows_ND = np.arange(82).reshape(41, 2)
    first, second = (mauve._half(np.random.default_rng(seed), rows_ND) for seed in (0, 1))
    assert first.shape == second.shape == (20, 2)
    assert len(np.unique(first, axis=0)) == 20
    assert np.isin(first, rows_ND).all()
    assert set(first[:, 0]) != set(second[:, 0])


@pytest.mark.usefixtures("installed")
def test_of_one_distribution():
    estimate = mauve.score(_features(1), _features(2), seed=0)
    assert estimate.value > 0.9
    assert estimate.count == 120
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert mauve.score(_features(1), _features(1), seed=0).value == pytest.approx(1.0, abs=1e-6)


@pytest.mark.usefixtures("installed")
def test_of_disjoint_distributions():
    # Four clusters, of which six buckets of a half-sample mix no two.
    one, other = _features(1, centres=-CENTRES[:2]), _features(2, centres=CENTRES[:2])
    apart = mauve.score(one, other, seed=0)
    # Of two histograms without a common bucket: the area under exp(-5 KL), about 0.004.
    assert apart.value < 0.01
    assert apart.high < 0.02


@pytest.mark.usefixtures("installed")
def test_in_between():
    one_of_six = mauve.score(_features(1, centres=CENTRES[:1]), _features(2), seed=0)
    half = mauve.score(_features(1, centres=CENTRES[:3]), _features(2), seed=0)
    assert 0.01 < one_of_six.value < half.low
    assert half.high < 0.9


@pytest.mark.usefixtures("installed")
def test_is_the_number_of_the_package():
    import mauve as package

    features, reference = _features(1, centres=CENTRES[:4]), _features(2, 90)
    seed = int(np.random.default_rng(3).integers(2**20, size=101)[0])
    expected = package.compute_mauve(p_features=features, q_features=reference, seed=seed).mauve
    assert mauve.score(features, reference, seed=3).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("installed")
def test_depends_on_the_seed_alone():
    features, reference = _features(1, centres=CENTRES[:4]), _features(2)
    one = mauve.score(features, reference, seed=0)
    assert mauve.score(features, reference, seed=0) == one
    assert mauve.score(features, reference, seed=1) != one


@pytest.mark.usefixtures("installed")
def test_the_interval_is_as_wide_as_fresh_samples_scatter():
    """Samples of four of the six centres, with different weights, drawn 40 times.

    A standard deviation of 40 scores is known to 1 / sqrt(78) = 11%, the mean width of 8 intervals
    with 2 of 100 half-samples outside either end to about as much: together to 16%, three of which
    are 48%. Width over deviation of a normal distribution is 2 x 1.96 = 3.9; the half-samples are
    wider by up to a quarter.
    """
    weights = [0.5, 0.3, 0.1, 0.1, 0.0, 0.0]
    fresh, widths = [], []
    for i in range(40):
        features, reference = _features(100 + i, weights=weights), _features(200 + i)
        if i < 8:
            estimate = mauve.score(features, reference, seed=i)
            widths.append(estimate.high - estimate.low)
            fresh.append(estimate.value)
        else:
            fresh.append(_value(features, reference, i))
    ratio = np.mean(widths) / np.std(fresh, ddof=1) / 3.92
    assert 1 - 0.48 < ratio < 1.25 + 0.48


def _value(features, reference, seed):
    import mauve as package
    import threadpoolctl

    with mauve._quiet(), threadpoolctl.threadpool_limits(1):
        return package.compute_mauve(p_features=features, q_features=reference, seed=seed).mauve


@pytest.mark.usefixtures("installed")
def test_is_silent(capfd):
    mauve.score(_features(1), _features(2), seed=0)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"
