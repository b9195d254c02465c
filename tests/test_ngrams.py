"""The n-gram control: its draws against the formula, with and without given tokens."""

import numpy as np
import pytest
from chance import assert_frequencies

from fsdfm_jax.evaluate import ngrams

V = 4


@pytest.fixture(scope="module")
def text():
    """A chain of order two, so that contexts of two tokens matter."""
    rng = np.random.default_rng(0)
    follow = rng.dirichlet(np.full(V, 0.3), size=(V, V))
    tokens_NL = rng.integers(V, size=(400, 30))
    for i in range(2, 30):
        cumulative = np.cumsum(follow[tokens_NL[:, i - 2], tokens_NL[:, i - 1]], axis=1)
        tokens_NL[:, i] = np.minimum((cumulative < rng.random((400, 1))).sum(1), V - 1)
    return tokens_NL


def literal(text, context):
    """P(. | context) of the module's formula, by counting in plain Python."""
    if not context:
        return np.bincount(text.ravel(), minlength=V) / text.size
    counts = np.zeros(V)
    for row in text.tolist():
        for i in range(len(row) - len(context)):
            if tuple(row[i : i + len(context)]) == context:
                counts[row[i + len(context)]] += 1
    shorter = literal(text, context[1:])
    if not counts.sum():
        return shorter
    left = ngrams.DISCOUNT * (counts > 0).sum() / counts.sum()
    return np.maximum(counts - ngrams.DISCOUNT, 0) / counts.sum() + left * shorter


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_draws_follow_the_formula(text, order):
    model = ngrams.fit(text, V, order=order)
    rng, rows = np.random.default_rng(1), 40_000
    given_NL = rng.integers(V, size=(rows, 4))
    frozen_NL = np.tile(np.arange(4) < 3, (rows, 1))
    written_NL = ngrams.write(model, given_NL, frozen_NL, seed=2)
    assert written_NL.dtype == np.int32
    np.testing.assert_array_equal(written_NL[:, :3], given_NL[:, :3])
    for context in ((0, 1, 2), (3, 3, 3), (1, 0, 1)):
        here_N = np.all(given_NL[:, :3] == context, axis=1)
        wanted = literal(text, context[4 - order :])
        assert_frequencies(np.bincount(written_NL[here_N, 3], minlength=V), wanted)


def test_a_text_from_nothing_has_the_pairs_of_its_training(text):
    model = ngrams.fit(text, V)
    nothing = np.zeros((500, 30), np.int64), np.zeros((500, 30), bool)
    written_NL = ngrams.write(model, *nothing, seed=0)
    np.testing.assert_array_equal(ngrams.write(model, *nothing, seed=0), written_NL)
    assert (ngrams.write(model, *nothing, seed=1) != written_NL).any()
    pairs = lambda x: np.bincount((x[:, :-1] * V + x[:, 1:]).ravel(), minlength=V * V) / x.size
    # Rows of this chain hold long runs of one token, so their pairs are far from independent.
    assert np.abs(pairs(written_NL[:, 2:]) - pairs(text[:, 2:])).max() < 0.04


def test_an_unseen_context_backs_off():
    model = ngrams.fit(np.asarray([[0, 1, 2, 0, 1, 2]]), 4)
    given = np.full((200, 2), 3), np.tile([True, False], (200, 1))
    written = ngrams.write(model, *given, seed=0)[:, 1]
    assert_frequencies(np.bincount(written, minlength=3), np.full(3, 1 / 3))


@pytest.mark.parametrize(
    ("blocks", "size", "message"),
    [
        ([[0, 4]], 4, r"token ids in \[0, 4\)"),
        ([[-1, 0]], 4, r"token ids in \[0, 4\)"),
        ([[]], 4, "at least one"),
        ([[0]], 10**6, "don't fit 63 bits"),
    ],
)
def test_what_cannot_be_counted_is_refused(blocks, size, message):
    with pytest.raises(ValueError, match=message):
        ngrams.fit([np.asarray(block, np.int64) for block in blocks], size)
