"""The mixture path: exact at its ends, kappa(t) of the data in between."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsdfm_jax.flow.paths import sample_frozen, sample_path
from fsdfm_jax.flow.schedules import Cosine, Polynomial

SCHEDULES = [Polynomial(1.0), Polynomial(2.0), Cosine()]
L = 20_000


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_share_of_data(schedule):
    t_B = np.float32([0.0, 0.1, 0.5, 0.9, 1.0])
    x0_BL = jnp.zeros((5, L), jnp.int32)
    xt_BL = np.asarray(sample_path(jax.random.key(0), schedule, x0_BL, x0_BL + 1, t_B))
    share_B = xt_BL.mean(axis=1)
    # Both ends are exact, not nearly so.
    assert share_B[0] == 0
    assert share_B[-1] == 1
    kappa_B = np.asarray(schedule.kappa(t_B), np.float64)
    error_B = np.sqrt(kappa_B * (1 - kappa_B) / L)
    assert np.all(np.abs(share_B - kappa_B)[1:-1] <= 5 * error_B[1:-1])


def test_positions_and_rows_move_independently():
    x0_BL = jnp.zeros((2, L), jnp.int32)
    xt_BL = np.asarray(
        sample_path(jax.random.key(1), Polynomial(), x0_BL, x0_BL + 1, np.float32([0.5, 0.5]))
    )
    # Of L pairs of fair coins half agree, with a standard error of sqrt(1/4 / L).
    for one, other in ((xt_BL[0], xt_BL[1]), (xt_BL[0, 1:], xt_BL[0, :-1])):
        assert abs(np.mean(one == other) - 0.5) <= 5 * np.sqrt(0.25 / (L - 1))


def test_every_token_comes_from_one_of_the_ends():
    key0, key1, key = jax.random.split(jax.random.key(2), 3)
    x0_BL = jax.random.randint(key0, (8, 64), 0, 100)
    x1_BL = jax.random.randint(key1, (8, 64), 0, 100)
    xt_BL = sample_path(key, Polynomial(), x0_BL, x1_BL, np.linspace(0, 1, 8, dtype=np.float32))
    assert xt_BL.shape == (8, 64)
    assert xt_BL.dtype == x1_BL.dtype
    assert np.all((xt_BL == x0_BL) | (xt_BL == x1_BL))
    np.testing.assert_array_equal(xt_BL[0], x0_BL[0])
    np.testing.assert_array_equal(xt_BL[-1], x1_BL[-1])


def test_frozen_positions_show_the_data():
    x0_BL = jnp.zeros((2, L), jnp.int32)
    frozen_BL = np.arange(L)[None] % 3 == np.array([[0], [1]])
    arguments = (Polynomial(), x0_BL, x0_BL + 1, np.float32([0.0, 0.5]))
    xt_BL = np.asarray(sample_path(jax.random.key(1), *arguments, frozen_BL))
    plain_BL = np.asarray(sample_path(jax.random.key(1), *arguments))
    np.testing.assert_array_equal(xt_BL, np.where(frozen_BL, 1, plain_BL))


def test_which_tokens_of_training_rows_are_given():
    """None in half of the rows; at random places or at the start in a quarter each."""
    rows, length = 40_000, 8
    frozen_BL = np.asarray(sample_frozen(jax.random.key(0), (rows, length)))
    counts = np.bincount(frozen_BL @ (1 << np.arange(length)), minlength=2**length) / rows
    want = np.zeros(2**length)
    want[0] = 1 / 2
    for subset in range(2**length):  # of k: the integral of s^k (1-s)^(length-k)
        k = subset.bit_count()
        want[subset] += 1 / 4 / ((length + 1) * math.comb(length, k))
    for k in range(length):  # k tokens at the start, of k = 0 .. length - 1
        want[2**k - 1] += 1 / 4 / length
    assert want.sum() == pytest.approx(1)
    assert np.all(np.abs(counts - want) <= 5 * np.sqrt(want * (1 - want) / rows))
