"""Lookup of n-grams in the training text."""

import numpy as np
import pytest

from fsdfm_jax.evaluate.memorised import Ngrams

V = 7


def literal_share(text, row, n):
    known = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
    mine = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return sum(gram in known for gram in mine) / len(mine)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_shares_equal_those_of_a_set_of_tuples(n):
    rng = np.random.default_rng(n)
    text, rows = rng.integers(0, V, 500), rng.integers(0, V, (20, 30))
    rows[3, 5:25] = text[100:120]
    got = Ngrams(text, n, vocab_size=V).share(rows)
    np.testing.assert_allclose(got, [literal_share(text, row, n) for row in rows])
    assert got[3] >= (20 - n + 1) / (30 - n + 1)


def test_order_and_every_token_count():
    text = np.arange(1000) % 900
    ngrams = Ngrams(text, 20, vocab_size=900)
    row = text[40:60].copy()
    assert ngrams.share(row[None]) == 1
    assert ngrams.share(row[None, ::-1]) == 0
    for i in range(20):
        other = row.copy()
        other[i] = (other[i] + 1) % 900
        assert ngrams.share(other[None]) == 0
        other[i], other[i - 1] = row[i - 1], row[i]
        assert ngrams.share(other[None]) == 0


def test_large_ids_and_unsigned_arithmetic():
    text = np.full(50, 50_256)
    ngrams = Ngrams(text, 20, vocab_size=50_257)
    assert ngrams.share(np.full((1, 20), 50_256)) == 1
    assert ngrams.share(np.full((1, 20), 0)) == 0


def test_what_has_no_ngrams_is_refused():
    with pytest.raises(ValueError, match="n must be in 1 .. 10 .*, got 11"):
        Ngrams(np.zeros(10, int), 11, vocab_size=V)
    with pytest.raises(ValueError, match="Rows of 3 tokens have no 4-grams"):
        Ngrams(np.zeros(10, int), 4, vocab_size=V).share(np.zeros((2, 3), int))
