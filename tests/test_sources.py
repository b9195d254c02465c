"""Noise at t=0: its distribution, and errors at construction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies

from fsdfm_jax.flow.sources import Source, make_source


def test_uniform_draws_every_token_equally_often():
    x0_BL = Source(7).sample(jax.random.key(0), (2000, 10))
    assert x0_BL.shape == (2000, 10)
    assert x0_BL.dtype == jnp.int32
    assert_frequencies(np.bincount(np.ravel(x0_BL), minlength=7), np.full(7, 1 / 7))


def test_uniform_positions_are_independent():
    x0_BL = np.asarray(Source(3).sample(jax.random.key(1), (20_000, 2)))
    pairs = np.bincount(x0_BL[:, 0] * 3 + x0_BL[:, 1], minlength=9)
    assert_frequencies(pairs, np.full(9, 1 / 9))


@pytest.mark.parametrize("mask_id", [0, 3, 4])
def test_mask_fills(mask_id):
    x0_BL = Source(5, mask_id=mask_id).sample(jax.random.key(0), (4, 6))
    assert x0_BL.dtype == jnp.int32
    np.testing.assert_array_equal(x0_BL, np.full((4, 6), mask_id))


def test_sources_by_name():
    assert make_source("uniform", num_tokens=9) == Source(9)
    assert make_source("mask", num_tokens=9) == Source(10, mask_id=9)
    with pytest.raises(ValueError, match="'gaussian'.*'uniform' or 'mask'"):
        make_source("gaussian", num_tokens=9)


@pytest.mark.parametrize("mask_id", [-1, 5])
def test_mask_outside_the_vocabulary(mask_id):
    with pytest.raises(ValueError, match=r"mask_id must be in \[0, 5\)"):
        Source(5, mask_id=mask_id)


def test_vocabulary_too_small():
    with pytest.raises(ValueError, match="at least 2 tokens"):
        Source(1)
