"""Memorisation: the fraction of a text's token n-grams that occur in the training text.

A model that has memorised its training text has excellent perplexities. Compare its fraction with
that of held-out text, which shows how often phrases recur naturally.
"""

import numpy as np

_SEED = 0x5D_F3


class Ngrams:
    """The set of n-grams of a text, for lookup.

    Stored as 64-bit hashes: for a million lookups among ten million n-grams, the probability of any
    false match is below one in a million.

    Args:
      text_T: token ids in [0, vocab_size), all documents concatenated.
      n: tokens per n-gram.
      vocab_size: V.

    Raises:
      ValueError: for a text shorter than n.
    """

    def __init__(self, text_T: np.ndarray, n: int, *, vocab_size: int):
        if not 1 <= n <= len(text_T):
            raise ValueError(f"n must be in 1 .. {len(text_T)} (tokens of the text), got {n}.")
        self._n = n
        self._codes_V = np.random.default_rng(_SEED).integers(
            0, 2**64, vocab_size, np.uint64, endpoint=False
        )
        self._known = np.unique(self._hashes(text_T))

    def share(self, tokens_NL: np.ndarray) -> np.ndarray:
        """Return the fraction of each row's n-grams that occur in the text, float64 [N].

        Raises:
          ValueError: for rows shorter than n.
        """
        if tokens_NL.shape[-1] < self._n:
            raise ValueError(f"Rows of {tokens_NL.shape[-1]} tokens have no {self._n}-grams.")
        hashes_NG = self._hashes(tokens_NL)
        at = np.minimum(np.searchsorted(self._known, hashes_NG), len(self._known) - 1)
        return np.mean(self._known[at] == hashes_NG, axis=-1)

    def _hashes(self, tokens: np.ndarray) -> np.ndarray:
        """uint64 [.., L - n + 1]: sums of random codes times powers of an odd number."""
        count = tokens.shape[-1] - self._n + 1
        codes = self._codes_V[tokens]
        result = np.zeros((*tokens.shape[:-1], count), np.uint64)
        for i in range(self._n):
            result = result * np.uint64(_FACTOR) + codes[..., i : i + count]
        return result


_FACTOR = 0x9E3779B97F4A7C15  # odd, so invertible modulo 2^64
