"""What follows what in a text: counts of n-grams, and the probabilities made of them.

Exported samplers take this file along as it is: NumPy and the standard library, no more.

Suffixes, besides those of the package: N longer contexts, C = V + N contexts in all, Z pairs of a
context and a token that was seen after it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Contexts of one token have V^2 entries: 256 MiB in float32 at this size.
MAX_VOCAB = 8192
# Tokens of a context at most.
LONGEST = 3
# Longer contexts take so many entries together, 32 MiB in float32, the most frequent ones first; a
# rarer one than that says little that is worth its row.
_MOST_ENTRIES = 2**23
_LEAST_SEEN = 32
# Of the training text, spread over it evenly; more would change no digit that matters.
_MOST_BLOCKS = 2**15
_DISCOUNT = 0.75


class Counts(NamedTuple):
    """What follows what in a text, sparse; NumPy arrays, int32.

    Context i < V is token i. Context V + n is that of keys_N[n] // V with the token keys_N[n] % V
    to its right, so that a context stands after what it begins with.

    Attributes:
      keys_N: increasing.
      sizes_C: how many different tokens follow each context.
      tokens_Z: those, context by context, increasing in each.
      counts_Z: how often, at least 1.
    """

    keys_N: np.ndarray
    sizes_C: np.ndarray
    tokens_Z: np.ndarray
    counts_Z: np.ndarray


class Table(NamedTuple):
    """`Counts` as `neighbours.draw` takes them; arrays of NumPy or JAX.

    Attributes:
      follow_CV: float32, P(next token | context), above 0 everywhere; contexts as in `Counts`.
      keys_N: int32, those of `Counts`; with none of them a context is one token.
      shorter_C: int32, each context without its first token (or the first few, if that isn't in the
        table); -1 where it has one only.
    """

    follow_CV: Any
    keys_N: Any
    shorter_C: Any


def check_vocab(vocab_size: int) -> None:
    """Refuses a vocabulary whose single tokens alone would make too large a table.

    Raises:
      ValueError: above `MAX_VOCAB`.
    """
    if vocab_size > MAX_VOCAB:
        raise ValueError(
            f"neighbours needs a table of {vocab_size} x {vocab_size} tokens, and vocabularies up "
            f"to {MAX_VOCAB} only have one; set neighbours to 0 and leave out the control ngram, "
            "or train a smaller vocabulary."
        )


def most_contexts(vocab_size: int) -> int:
    """The largest number of contexts C that a vocabulary's counts have."""
    return vocab_size + _MOST_ENTRIES // vocab_size


def count(source: Sequence[np.ndarray], vocab_size: int) -> Counts:
    """Counts what follows each token, and the most frequent contexts of two and three.

    A context is taken if something follows it at least 32 times in what is read; there are at most
    2^23 / V of the longer ones.

    Args:
      source: blocks of token ids; of more than 32,768 that many are read, spread evenly. No context
        reaches from one into another.
      vocab_size: V, that of the network; ids that the text hasn't have counts of 0.

    Raises:
      ValueError: see `check_vocab`, or for an id outside [0, V).
    """
    check_vocab(vocab_size)
    tokens_T = _read(source, vocab_size)
    # Runs of n + 1 tokens: contexts of n, each with one that follows it.
    seen = {
        n: np.unique(_runs(tokens_T, n + 1, vocab_size), return_counts=True)
        for n in range(1, LONGEST + 1)
    }
    longer = _most_frequent(seen, vocab_size)

    contexts, keys, rows, followers, counts = np.arange(vocab_size), [], [], [], []
    first = 0
    for n, (runs, number) in seen.items():
        if n > 1:
            before, contexts = contexts, longer[n]
            prefix = np.searchsorted(before, contexts // vocab_size) + first
            keys.append(prefix * vocab_size + contexts % vocab_size)
            first += len(before)
        place = np.searchsorted(contexts, runs // vocab_size)
        known = np.append(contexts, -1)[place] == runs // vocab_size
        rows.append(first + place[known])
        followers.append(runs[known] % vocab_size)
        counts.append(number[known])
    size = first + len(contexts)
    join = lambda parts: np.concatenate(parts).astype(np.int32)
    sizes_C = np.bincount(np.concatenate(rows), minlength=size).astype(np.int32)
    return Counts(join(keys), sizes_C, join(followers), join(counts))


def _read(source, vocab_size) -> np.ndarray:
    """The tokens of blocks in a row, each block followed by -1; int64 [T]."""
    parts = []
    for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), _MOST_BLOCKS)).round()):
        tokens_L = np.asarray(source[int(index)], np.int64)
        wrong_L = (tokens_L < 0) | (tokens_L >= vocab_size)
        if wrong_L.any():
            raise ValueError(
                f"Token ids must lie in [0, {vocab_size}), got {tokens_L[wrong_L][0]}."
            )
        parts += [tokens_L, [-1]]
    return np.concatenate([*parts, []]).astype(np.int64)


def _runs(tokens_T, length, vocab_size) -> np.ndarray:
    """All runs of so many tokens within a block, as numbers of base V."""
    number = max(len(tokens_T) - length + 1, 0)
    runs, inside = np.zeros(number, np.int64), np.ones(number, bool)
    for i in range(length):
        tokens = tokens_T[i : i + number]
        runs *= vocab_size
        runs += tokens
        inside &= tokens >= 0
    return runs[inside]


def _most_frequent(seen, vocab_size) -> dict[int, np.ndarray]:
    """The contexts of n > 1 tokens that get a row, increasing; `seen`: n -> (runs, how often)."""
    found, times, tokens = [], [], []
    for n, (runs, number) in seen.items():
        if n > 1:
            contexts, start = np.unique(runs // vocab_size, return_index=True)
            found.append(contexts)
            times.append(np.add.reduceat(number, start) if len(start) else number)
            tokens.append(np.full(len(contexts), n))
    found, times, tokens = map(np.concatenate, (found, times, tokens))
    # A context is followed at least as often as each longer one that begins or ends with it; where
    # just as often, the shorter one comes first. So what is taken has its parts beside it.
    taken = np.lexsort((found, tokens, -times))[: _MOST_ENTRIES // vocab_size]
    taken = taken[times[taken] >= _LEAST_SEEN]
    return {n: np.sort(found[taken[tokens[taken] == n]]) for n in seen if n > 1}


def check_counts(counts: Counts, vocab_size: int) -> None:
    """Refuses arrays that are no counts of a vocabulary.

    Raises:
      ValueError: saying what is wrong.
    """
    check_vocab(vocab_size)
    if any(getattr(a, "dtype", None) != np.int32 or a.ndim != 1 for a in counts):
        raise ValueError("expected four arrays of int32 in one dimension")
    num_longer, most = len(counts.keys_N), most_contexts(vocab_size) - vocab_size
    if len(counts.sizes_C) != vocab_size + num_longer:
        raise ValueError(
            f"expected the sizes of {vocab_size} + {num_longer} contexts, got {len(counts.sizes_C)}"
        )
    if num_longer > most:
        raise ValueError(f"expected at most {most} longer contexts, got {num_longer}")
    if counts.sizes_C.min(initial=0) < 0 or not (
        counts.sizes_C.sum(dtype=np.int64) == len(counts.tokens_Z) == len(counts.counts_Z)
    ):
        raise ValueError("its sizes aren't those of what follows")
    if (
        counts.tokens_Z.size
        and not 0 <= counts.tokens_Z.min() <= counts.tokens_Z.max() < vocab_size
    ):
        raise ValueError(f"expected tokens in [0, {vocab_size})")
    if counts.counts_Z.min(initial=1) < 1 or counts.sizes_C[vocab_size:].min(initial=1) < 1:
        raise ValueError(
            "expected counts of at least 1, and longer contexts that something follows"
        )
    rows_Z = np.repeat(np.arange(len(counts.sizes_C)), counts.sizes_C)
    if np.any(np.diff(rows_Z * vocab_size + counts.tokens_Z) <= 0):
        raise ValueError("what follows a context doesn't increase")
    keys_N = counts.keys_N.astype(np.int64)
    before_N = np.arange(vocab_size, vocab_size + num_longer)
    if np.any(np.diff(keys_N) <= 0) or np.any((keys_N < 0) | (keys_N // vocab_size >= before_N)):
        raise ValueError("its longer contexts don't come after what they begin with")
    if (longest := max(_contexts(counts.keys_N, vocab_size)[1], default=0)) > LONGEST:
        raise ValueError(f"expected contexts of up to {LONGEST} tokens, got one of {longest}")


def table(counts: Counts, vocab_size: int) -> Table:
    """Probabilities from counts, by absolute discounting; NumPy arrays.

    Each token that was seen after a context gives 3/4 of a count to the shorter context's
    probabilities, or with one token to the right tokens' frequencies, to which half a count each is
    added; a token after which nothing was seen has these alone.
    """
    num_contexts = len(counts.sizes_C)
    shorter_C, lengths_C = _contexts(counts.keys_N, vocab_size)
    follow_CV = np.zeros((num_contexts, vocab_size))  # float64
    rows_Z = np.repeat(np.arange(num_contexts), counts.sizes_C)
    follow_CV[rows_Z, counts.tokens_Z] = counts.counts_Z
    right_V = follow_CV[:vocab_size].sum(axis=0) + 0.5
    right_V /= right_V.sum()
    total_C1 = follow_CV.sum(axis=1, keepdims=True)
    seen_C1 = total_C1 > 0
    total_C1 = np.where(seen_C1, total_C1, 1.0)
    given_up_C1 = np.where(seen_C1, _DISCOUNT * counts.sizes_C[:, None] / total_C1, 1.0)
    follow_CV -= _DISCOUNT
    np.maximum(follow_CV, 0.0, out=follow_CV)
    follow_CV /= total_C1
    follow_CV[:vocab_size] += given_up_C1[:vocab_size] * right_V
    for length in range(2, LONGEST + 1):
        rows = np.flatnonzero(lengths_C == length)
        follow_CV[rows] += given_up_C1[rows] * follow_CV[shorter_C[rows]]
    return Table(follow_CV.astype(np.float32), counts.keys_N, shorter_C)


def _contexts(keys_N: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(`Table.shorter_C`, number of tokens of each context), of contexts as in `Counts`."""
    shorter, lengths = [-1] * vocab_size, [1] * vocab_size
    rows = {key: vocab_size + n for n, key in enumerate(keys_N.tolist())}
    for key in rows:
        prefix, last = divmod(key, vocab_size)
        # Of up to three tokens: that without the first one, or else the last.
        shorter.append(rows.get(shorter[prefix] * vocab_size + last, last))
        lengths.append(lengths[prefix] + 1)
    return np.asarray(shorter, np.int32), np.asarray(lengths, np.int32)
