"""Tables of neighbours for tests."""

import jax.numpy as jnp
import numpy as np

from fsdfm_jax.inference import ngrams
from fsdfm_jax.inference.ngrams import Counts, Table


def pairs(follow_VV) -> Table:
    """A table without longer contexts; P(right | left) [V, V]."""
    size = len(follow_VV)
    return Table(
        jnp.asarray(follow_VV, jnp.float32),
        jnp.zeros((0,), jnp.int32),
        jnp.asarray(np.full(size, -1), jnp.int32),
    )


def counts(vocab_size, seed=3) -> Counts:
    """Of a random text: six ids, each of which hangs on the two before it, and now and then any."""
    rng, size = np.random.default_rng(seed), min(vocab_size, 6)
    follow_KKK = rng.dirichlet(np.full(size, 0.3), size=(size, size))
    tokens_BL = rng.integers(size, size=(1000, 30))
    for i in range(2, 30):
        next_BK = np.cumsum(follow_KKK[tokens_BL[:, i - 2], tokens_BL[:, i - 1]], axis=1)
        tokens_BL[:, i] = np.minimum((next_BK < rng.random((1000, 1))).sum(1), size - 1)
    any_BL = rng.integers(vocab_size, size=tokens_BL.shape)
    tokens_BL = np.where(rng.random(tokens_BL.shape) < 0.2, any_BL, tokens_BL)
    found = ngrams.count(tokens_BL, vocab_size)
    assert len(found.keys_N) > size**2
    return found
