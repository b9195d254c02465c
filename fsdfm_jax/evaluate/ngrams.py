"""An n-gram model of the training text: a control that shows what counts alone can write.

    P(x | c) = max(n(c x) - d, 0) / n(c) + d N(c) / n(c) P(x | c without its first token)

with n how often, N how many different tokens follow the context c, and the discount d = 3/4
(absolute discounting). Text is drawn by the same sum: a draw keeps the counts of the context or,
with the discounted share, backs off to the shorter one.

A few-step model whose text such counts match has not learnt what it is there for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ORDER = 4  # tokens of an n-gram: contexts of up to three
DISCOUNT = 0.75
# Of the training text, spread over it evenly; more would change no digit that matters.
_MOST_BLOCKS = 2**15


class _Table(NamedTuple):
    """Contexts of one length, increasing, and what follows them.

    Attributes:
      contexts_C: tokens as a number of base V, int64.
      starts_C1: context i is followed by the entries [starts_C1[i], starts_C1[i+1]).
      tokens_Z: the tokens that follow.
      cumulative_Z1: running sum over all entries of their counts, less the discount.
      totals_C: occurrences n(c).
    """

    contexts_C: np.ndarray
    starts_C1: np.ndarray
    tokens_Z: np.ndarray
    cumulative_Z1: np.ndarray
    totals_C: np.ndarray


class NgramModel(NamedTuple):
    """Counts of a text.

    Attributes:
      vocab_size: V.
      unigram_V: frequency of each token, float64, adds up to 1.
      tables: of contexts of 1, 2 .. tokens.
    """

    vocab_size: int
    unigram_V: np.ndarray
    tables: tuple[_Table, ...]


def fit(source: Sequence[np.ndarray], vocab_size: int, *, order: int = ORDER) -> NgramModel:
    """Count the n-grams of a text; none reaches from one block into the next.

    Args:
      source: blocks of token ids; of more than 32,768 that many are read, spread evenly.
      vocab_size: V.
      order: tokens of the longest n-grams.

    Raises:
      ValueError: for an empty text, an id outside [0, V), or n-grams that 63 bits can't number.
    """
    if order * np.log2(vocab_size) >= 63:
        raise ValueError(f"n-grams of {order} of {vocab_size} tokens are too many to be numbered.")
    chosen = np.unique(np.linspace(0, len(source) - 1, min(len(source), _MOST_BLOCKS)).round())
    blocks = [np.asarray(source[int(i)], np.int64) for i in chosen]
    every_T = np.concatenate([*blocks, []]).astype(np.int64)
    if not every_T.size or every_T.min() < 0 or every_T.max() >= vocab_size:
        raise ValueError(f"Expected blocks of token ids in [0, {vocab_size}), and at least one.")
    tokens_T = np.concatenate([part for block in blocks for part in (block, [-1])])
    unigram_V = np.bincount(every_T, minlength=vocab_size).astype(np.float64)
    tables = tuple(_count(tokens_T, n, vocab_size) for n in range(1, order))
    return NgramModel(vocab_size, unigram_V / unigram_V.sum(), tables)


def _count(tokens_T: np.ndarray, length: int, vocab_size: int) -> _Table:
    """The table of contexts of `length` tokens."""
    size = max(len(tokens_T) - length, 0)
    runs, inside = np.zeros(size, np.int64), np.ones(size, bool)
    for i in range(length + 1):
        tokens = tokens_T[i : i + size]
        runs, inside = runs * vocab_size + tokens, inside & (tokens >= 0)
    runs_Z, counts_Z = np.unique(runs[inside], return_counts=True)
    contexts_C, starts_C = np.unique(runs_Z // vocab_size, return_index=True)
    totals_C = np.add.reduceat(counts_Z, starts_C) if len(starts_C) else counts_Z
    return _Table(
        contexts_C,
        np.append(starts_C, len(runs_Z)),
        runs_Z % vocab_size,
        np.concatenate([[0.0], np.cumsum(counts_Z - DISCOUNT)]),
        totals_C,
    )


def write(
    model: NgramModel,
    given_NL: np.ndarray,
    frozen_NL: np.ndarray,
    *,
    seed: int,
) -> np.ndarray:
    """Draw text from left to right.

    Args:
      model: from `fit`.
      given_NL: int [N, L], of no meaning where nothing is frozen.
      frozen_NL: bool [N, L], positions that hold the given token.
      seed: of the draws.

    Returns:
      int32 [N, L].
    """
    generator = np.random.default_rng(seed)
    tokens_NL = np.array(given_NL, np.int64)
    unigram_V1 = np.concatenate([[0.0], np.cumsum(model.unigram_V)])
    for position in range(tokens_NL.shape[1]):
        u_N = generator.random(len(tokens_NL))
        drawn_N = np.clip(
            np.searchsorted(unigram_V1, u_N * unigram_V1[-1], side="right") - 1,
            0,
            model.vocab_size - 1,
        )
        # From the shortest context to the longest: each one keeps its draw or leaves the shorter's.
        for length in range(1, min(position, len(model.tables)) + 1):
            before_NK = tokens_NL[:, position - length : position]
            drawn_N = _draw(model, before_NK, drawn_N, generator)
        tokens_NL[:, position] = np.where(frozen_NL[:, position], tokens_NL[:, position], drawn_N)
    return tokens_NL.astype(np.int32)


def _draw(model: NgramModel, before_NK, shorter_N, generator) -> np.ndarray:
    """A draw from the context's discounted counts, or what the shorter context gave."""
    table = model.tables[before_NK.shape[1] - 1]
    u_N = generator.random(len(before_NK))
    if not len(table.contexts_C):
        return shorter_N
    keys_N = np.zeros(len(before_NK), np.int64)
    for tokens_N in before_NK.T:
        keys_N = keys_N * model.vocab_size + tokens_N
    row_N = np.minimum(np.searchsorted(table.contexts_C, keys_N), len(table.contexts_C) - 1)
    first_N, last_N = table.starts_C1[row_N], table.starts_C1[row_N + 1]
    start_N = table.cumulative_Z1[first_N]
    target_N = start_N + u_N * table.totals_C[row_N]
    entry_N = np.searchsorted(table.cumulative_Z1, target_N, side="right") - 1
    # What lies beyond the context's discounted counts is the share of the shorter context.
    keeps_N = (table.contexts_C[row_N] == keys_N) & (entry_N < last_N)
    return np.where(keeps_N, table.tokens_Z[np.minimum(entry_N, last_N - 1)], shorter_N)
