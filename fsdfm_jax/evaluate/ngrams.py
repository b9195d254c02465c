"""An n-gram model of the training text, as a control: text from counts, without a network.

    P(x | c) = max(n(c x) - d, 0) / n(c) + d N(c) / n(c) P(x | c without its first token)

where n counts occurrences, N(c) is the number of different tokens that follow the context c, and
the discount is d = 3/4 (absolute discounting). Text is sampled from the same mixture: a draw uses
the counts of the context or, with the discounted probability, backs off to the shorter context.

A few-step model that is no better than this control hasn't learnt much.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ORDER = 4  # tokens per n-gram: contexts of up to three tokens
DISCOUNT = 0.75
# Maximum training blocks to count, spread evenly; more would not change the figures.
_MOST_BLOCKS = 2**15


class _Table(NamedTuple):
    """Contexts of one length, in increasing order, and their following tokens.

    Attributes:
      contexts_C: contexts as numbers in base V, int64.
      starts_C1: context i has the entries [starts_C1[i], starts_C1[i+1]).
      tokens_Z: following tokens.
      cumulative_Z1: cumulative sum over all entries of their counts minus the discount.
      totals_C: occurrences n(c).
    """

    contexts_C: np.ndarray
    starts_C1: np.ndarray
    tokens_Z: np.ndarray
    cumulative_Z1: np.ndarray
    totals_C: np.ndarray


class NgramModel(NamedTuple):
    """The n-gram counts of a text.

    Attributes:
      vocab_size: V.
      unigram_V: frequency of each token, float64, sums to 1.
      tables: for contexts of 1, 2 .. tokens.
    """

    vocab_size: int
    unigram_V: np.ndarray
    tables: tuple[_Table, ...]


def fit(source: Sequence[np.ndarray], vocab_size: int, *, order: int = ORDER) -> NgramModel:
    """Count the n-grams of a text, within blocks.

    Args:
      source: blocks of token ids; at most 32,768 are read, spread evenly.
      vocab_size: V.
      order: tokens of the longest n-grams.

    Raises:
      ValueError: for an empty text, an id outside [0, V), or n-grams that don't fit 63 bits.
    """
    if order * np.log2(vocab_size) >= 63:
        raise ValueError(f"n-grams of {order} out of {vocab_size} tokens don't fit 63 bits.")
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
    """Make the table of contexts of `length` tokens."""
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
      given_NL: int [N, L], used only at frozen positions.
      frozen_NL: bool [N, L], positions fixed to the given token.
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
        # From the shortest to the longest context: each one replaces the draw or backs off to it.
        for length in range(1, min(position, len(model.tables)) + 1):
            before_NK = tokens_NL[:, position - length : position]
            drawn_N = _draw(model, before_NK, drawn_N, generator)
        tokens_NL[:, position] = np.where(frozen_NL[:, position], tokens_NL[:, position], drawn_N)
    return tokens_NL.astype(np.int32)


def _draw(model: NgramModel, before_NK, shorter_N, generator) -> np.ndarray:
    """Draw from the context's discounted counts, or keep the draw of the shorter context."""
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
    # Targets beyond the context's discounted counts back off to the shorter context.
    keeps_N = (table.contexts_C[row_N] == keys_N) & (entry_N < last_N)
    return np.where(keeps_N, table.tokens_Z[np.minimum(entry_N, last_N - 1)], shorter_N)
