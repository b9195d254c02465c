"""Step budgets: probabilities, the split of eq. 4.5, and times that leave room for the step."""

import functools

import jax
import numpy as np
import pytest
from chance import assert_frequencies

from fsdfm_jax.flow.budgets import make_budgets, sample_budgets

OFFICIAL = make_budgets(max_log2_steps=10, weights="official", time_eps=1e-3)
LOG_UNIFORM = make_budgets(max_log2_steps=10, weights="log_uniform", time_eps=1e-3)


@functools.lru_cache
def sampler(budgets, rows, keys):
    """Jitted: key -> (t, h), each [keys, rows]."""
    draw = lambda key: sample_budgets(key, budgets, rows)
    return jax.jit(lambda key: jax.vmap(draw)(jax.random.split(key, keys)))


def exponents(h):
    return np.round(-np.log2(np.asarray(h))).astype(int)


def test_log_uniform_widths_are_equally_likely():
    assert LOG_UNIFORM.log2_steps == tuple(range(11))
    assert LOG_UNIFORM.probabilities == pytest.approx([1 / 11] * 11)
    assert LOG_UNIFORM.share == pytest.approx(1)


def test_official_weights_neglect_wide_steps():
    assert OFFICIAL.probabilities == pytest.approx([2**k / 2047 for k in range(11)])
    # Method, section 6: h >= 1/8 gets 0.73% of the samples.
    assert sum(OFFICIAL.probabilities[:4]) == pytest.approx(0.0073, abs=5e-5)


@pytest.mark.parametrize(
    ("tau", "finest"), [(2**-9, (10,)), (2**-8, (9, 10)), (2.0**-10, ()), (2.0, range(11))]
)
def test_split(tau, finest):
    below, rest = LOG_UNIFORM.split(tau)
    assert below.log2_steps == tuple(finest)
    assert sorted(below.log2_steps + rest.log2_steps) == list(range(11))
    assert all(2.0**-k < tau for k in below.log2_steps)
    assert all(2.0**-k >= tau for k in rest.log2_steps)
    assert below.share == pytest.approx(len(below.log2_steps) / 11)
    assert below.share + rest.share == pytest.approx(1)
    # Both parts keep the grid of times of the whole.
    assert below.finest == rest.finest == 10
    assert below.time_eps == rest.time_eps == 1e-3


def test_split_keeps_each_width_with_its_probability():
    below, rest = OFFICIAL.split(2**-8)
    together = dict(
        [
            *zip(below.log2_steps, below.probabilities, strict=True),
            *zip(rest.log2_steps, rest.probabilities, strict=True),
        ]
    )
    assert [together[k] for k in range(11)] == list(OFFICIAL.probabilities)


@pytest.mark.parametrize("budgets", [OFFICIAL, LOG_UNIFORM], ids=["official", "log_uniform"])
def test_steps_end_in_time(budgets):
    t, h = (np.asarray(a, np.float64) for a in sampler(budgets, 64, 500)(jax.random.key(0)))
    assert np.all(t >= 0)
    assert np.all(t * 1024 == np.round(t * 1024)), "times lie on the grid j/1024"
    assert np.all(np.isin(h, 2.0 ** -np.arange(11)))
    assert np.all((t + h <= 1 - 1e-3) | (h == 1))
    # A width of 1 leaves no room: it starts at t=0.
    assert np.any(h == 1)
    assert np.all(t[h == 1] == 0)


def test_sampled_arrays():
    t_R, h_R = sample_budgets(jax.random.key(0), LOG_UNIFORM, 33)
    assert t_R.shape == h_R.shape == (33,)
    assert t_R.dtype == h_R.dtype == np.float32


def test_counts_are_stratified():
    rows = 50
    for budgets in (OFFICIAL, LOG_UNIFORM, LOG_UNIFORM.split(2**-8)[1]):
        _, h = sampler(budgets, rows, 200)(jax.random.key(1))
        share = np.array(budgets.probabilities) / budgets.share
        for k, p in zip(budgets.log2_steps, share, strict=True):
            counts = np.sum(exponents(h) == k, axis=1)
            # Systematic resampling: the floor or the ceiling of rows p (float32 boundaries: 1e-4
            # rows).
            assert np.all(np.abs(counts - rows * p) < 1 + 1e-4)


@pytest.mark.parametrize("budgets", [OFFICIAL, LOG_UNIFORM], ids=["official", "log_uniform"])
@pytest.mark.parametrize("rows", [1, 7])
def test_widths_have_their_probabilities_on_average(budgets, rows):
    keys = 20_000
    _, h = sampler(budgets, rows, keys)(jax.random.key(2))
    counts = np.bincount(exponents(h).ravel(), minlength=11)
    expected = keys * rows * np.array(budgets.probabilities)
    # One key's count takes two neighbouring values: a standard deviation of sqrt(f (1-f)), f the
    # fractional part.
    fraction = (rows * np.array(budgets.probabilities)) % 1
    assert np.all(np.abs(counts - expected) <= 5 * np.sqrt(keys * fraction * (1 - fraction)) + 3)


def test_times_are_uniform_on_their_grid():
    budgets = make_budgets(max_log2_steps=3, weights="log_uniform", time_eps=0.0)
    t, h = sampler(budgets, 8, 10_000)(jax.random.key(3))
    for k in range(4):
        starts = np.asarray(t)[exponents(h) == k] * 8
        places = 8 - 2 ** (3 - k) + 1
        assert_frequencies(
            np.bincount(starts.astype(int), minlength=places), np.full(places, 1 / places)
        )


def test_last_start_leaves_room_for_eps():
    # 1/2 + h + eps > 1 for h = 1/2: the last start is one cell of 1/4 earlier.
    budgets = make_budgets(max_log2_steps=2, weights="log_uniform", time_eps=1e-3)
    t, h = (np.asarray(a) for a in sampler(budgets, 9, 500)(jax.random.key(4)))
    assert set(np.unique(t[h == 0.5])) == {0, 0.25}
    assert set(np.unique(t[h == 0.25])) == {0, 0.25, 0.5}


def test_a_single_budget():
    budgets = make_budgets(max_log2_steps=0, weights="official", time_eps=1e-3)
    t_R, h_R = sample_budgets(jax.random.key(0), budgets, 5)
    np.testing.assert_array_equal(t_R, np.zeros(5))
    np.testing.assert_array_equal(h_R, np.ones(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_log2_steps": -1}, "max_log2_steps must be 0 or more, got -1"),
        ({"time_eps": 1.0}, r"time_eps must be in \[0, 1\), got 1.0"),
        ({"time_eps": -0.1}, r"time_eps must be in \[0, 1\), got -0.1"),
        ({"weights": "uniform"}, "'uniform'.*log_uniform, official"),
    ],
)
def test_bad_values(changes, message):
    values = {"max_log2_steps": 4, "weights": "official", "time_eps": 1e-3} | changes
    with pytest.raises(ValueError, match=message):
        make_budgets(**values)
