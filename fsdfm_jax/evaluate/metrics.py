"""Figures from token ids and log-likelihoods, in NumPy: recomputable from saved samples.

Most figures have one number per sample, for `bootstrap`. NaN means that a sample has no such figure
(too few tokens count).

    counted_NL    bool [N, L], the generated positions. Given ones don't count, nor do n-grams that
                  include one. None: all positions count.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BITS_PER_NAT = 1.0 / math.log(2.0)

_BLEU_ORDER = 4
# Resampling indices held at once, 8 MiB.
_HELD_INDICES = 2**20


class Estimate(NamedTuple):
    """A figure and its bootstrap interval; both ends are nan without an interval.

    `count` is the number of samples used.
    """

    value: float
    low: float
    high: float
    count: int


def failed(count: int) -> Estimate:
    """Return the estimate for a measurement that failed on some samples and worked on `count`."""
    return Estimate(math.nan, math.nan, math.nan, count)


def bootstrap(
    statistic: Callable[..., np.ndarray],
    *arrays_N: np.ndarray,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Compute a statistic of N samples with its percentile bootstrap interval.

    Rows are resampled with replacement, jointly for all arrays, with
    `numpy.random.default_rng(seed)`. The ends are order statistics, so infinite values (overflowing
    perplexities) are no problem. The interval covers the sampling error only, not the variation
    between seeds or training runs.

    Args:
      statistic: takes arrays [..., N] and reduces only the last axis.
      *arrays_N: one number per sample, all of the same length. Samples with nan in any array are
        excluded; don't use this if nan means a failure.
      resamples: R, number of resamples.
      level: of the interval, in (0, 1).
      seed: of the draws.

    Returns:
      The statistic of all rows, the interval and the number of rows used. The ends are nan for a
      single row, and everything is nan without rows. Resamples with a nan statistic are excluded.

    Raises:
      ValueError: for arrays that aren't one-dimensional or differ in length, fewer than 2
        resamples, a level outside (0, 1), or a statistic that doesn't reduce only the last axis.
    """
    arrays = [np.asarray(array) for array in arrays_N]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1:
        raise ValueError(
            "The bootstrap needs at least one array, each with one number per sample; got shapes "
            f"{[array.shape for array in arrays]}."
        )
    if resamples < 2 or not 0 < level < 1:
        raise ValueError(
            "The bootstrap needs at least 2 resamples and a level in (0, 1), got "
            f"resamples={resamples} and level={level}."
        )
    has_figure_N = ~np.any([np.isnan(array) for array in arrays], axis=0)
    arrays = [array[has_figure_N] for array in arrays]
    count = len(arrays[0])
    if not count:
        return failed(0)
    value = float(statistic(*arrays))
    if count == 1:
        return Estimate(value, math.nan, math.nan, count)

    rng = np.random.default_rng(seed)
    held = max(1, _HELD_INDICES // count)
    values = []
    for start in range(0, resamples, held):
        rows_RN = rng.integers(count, size=(min(held, resamples - start), count))
        values_R = np.asarray(statistic(*(array[rows_RN] for array in arrays)))
        if values_R.shape != rows_RN.shape[:1]:
            raise ValueError(
                "The statistic must reduce only the last axis: for arrays of shape "
                f"{rows_RN.shape} it returned the shape {values_R.shape}."
            )
        values.append(values_R)
    ordered = np.sort(np.concatenate(values).astype(np.float64))
    ordered = ordered[~np.isnan(ordered)]
    if not len(ordered):
        return Estimate(value, math.nan, math.nan, count)
    outside = max(1, round(len(ordered) * (1 - level) / 2))
    return Estimate(value, float(ordered[outside - 1]), float(ordered[-outside]), count)


# ---------------------------------------------------------------------------------------- diversity


def unigram_entropy(tokens_NL: np.ndarray, counted_NL: np.ndarray | None = None) -> np.ndarray:
    """Entropy of the token frequencies within each sample, nats, float64 [N]; at most ln L."""
    tokens_NL, counted_NL = _checked(tokens_NL, counted_NL)
    result = np.full(len(tokens_NL), math.nan)
    for row, (tokens, counted) in enumerate(zip(tokens_NL, counted_NL, strict=True)):
        _, counts = np.unique(tokens[counted], return_counts=True)
        if len(counts):
            p = counts / counts.sum()
            result[row] = -np.sum(p * np.log(p))
    return result


def distinct(tokens_NL: np.ndarray, n: int, counted_NL: np.ndarray | None = None) -> np.ndarray:
    """Number of different n-grams of each sample divided by its n-grams, float64 [N], in (0, 1].

    Computed per sample, not over all samples pooled. A pooled ratio falls with every added sample,
    so evaluations of different sizes couldn't be compared, and it falls in the bootstrap, so the
    interval wouldn't contain the value. Repetition between samples is measured by `self_bleu`.

    Samples without counted n-grams get nan.

    Raises:
      ValueError: for n < 1.
    """
    if n < 1:
        raise ValueError(f"The order of an n-gram must be at least 1, got n={n}.")
    tokens_NL, counted_NL = _checked(tokens_NL, counted_NL)
    *_, grams = _grams(tokens_NL, counted_NL, n)
    sample, _, count = _count(*grams)
    different = np.bincount(sample, minlength=len(tokens_NL))
    total = np.bincount(sample, weights=count, minlength=len(tokens_NL))
    return _divide(different, total)


def self_bleu(tokens_NL: np.ndarray, counted_NL: np.ndarray | None = None) -> np.ndarray:
    """BLEU of each sample's ids against all other samples as references, float64 [N], in [0, 1].

    It is high if samples repeat each other (arXiv:1802.01886). BLEU-4 with uniform weights: clipped
    precisions of 1- to 4-grams, and a brevity penalty relative to the closest reference length (the
    shorter one in a tie). The k-th order without a match counts as 1 / 2^k matches (smoothing "exp"
    of sacrebleu, as in NIST). Orders for which a sample has no n-gram are omitted ("effective
    order" in sacrebleu). Without any match the score is 0.

    The two largest counts of each n-gram over all samples give the maximum over the other samples.
    The cost is therefore that of sorting the n-grams, not quadratic in the number of samples.

    Samples without counted tokens aren't references and get nan, as does a single sample. The score
    rises with the number of references: compare only at equal N.

    Scores of one set share their references, but `bootstrap` treats them as independent. The
    interval of the mean can be too narrow, especially if many samples repeat a few.
    """
    tokens_NL, counted_NL = _checked(tokens_NL, counted_NL)
    num_samples = len(tokens_NL)
    length_N = counted_NL.sum(axis=1)
    if np.sum(length_N > 0) < 2:
        return np.full(num_samples, math.nan)
    log_sum, orders = np.zeros(num_samples), np.zeros(num_samples)
    halvings, matched = np.zeros(num_samples), np.zeros(num_samples, bool)
    for grams in _grams(tokens_NL, counted_NL, _BLEU_ORDER):
        sample, gram, count = _count(*grams)
        largest, second = _two_largest(gram, count)
        others = np.where(count == largest[gram], second[gram], largest[gram])
        clipped = np.minimum(count, others)
        matches = np.bincount(sample, weights=clipped, minlength=num_samples)
        total = np.bincount(sample, weights=count, minlength=num_samples)
        halvings += (total > 0) & (matches == 0)
        smoothed = np.where(matches > 0, matches, 0.5**halvings)
        log_sum += np.log(np.where(total > 0, smoothed / np.maximum(total, 1), 1.0))
        orders += total > 0
        matched |= matches > 0
    reference_N = _closest_other(length_N)
    brevity = np.minimum(0.0, 1 - _divide(reference_N, length_N))
    score = np.where(matched, np.exp(brevity + log_sum / np.maximum(orders, 1)), 0.0)
    return np.where(length_N > 0, score, math.nan)


def _checked(tokens_NL, counted_NL):
    tokens_NL = np.asarray(tokens_NL)
    counted_NL = np.ones(tokens_NL.shape, bool) if counted_NL is None else np.asarray(counted_NL)
    if tokens_NL.ndim != 2 or counted_NL.shape != tokens_NL.shape or counted_NL.dtype != bool:
        raise ValueError(
            "Tokens must be [N, L] and counted_NL bool of the same shape (or None), got "
            f"{tokens_NL.shape} and {counted_NL.dtype} {counted_NL.shape}."
        )
    return tokens_NL, counted_NL


def _grams(tokens_NL, counted_NL, order):
    """Yield, for n from 1 to `order`, the counted n-grams: (sample indices [G], n-gram ids [G]).

    Ids start at 0; equal n-grams have equal ids in all samples.
    """
    _, token_NL = np.unique(tokens_NL, return_inverse=True)
    token_NL = token_NL.reshape(tokens_NL.shape).astype(np.int64)
    num_tokens = token_NL.max(initial=0) + 1
    gram_NL, counts_NL = token_NL, counted_NL
    for n in range(1, order + 1):
        if n > 1:
            # Renumbering keeps ids below N L, so this doesn't overflow for any n.
            gram_NL = gram_NL[:, :-1] * num_tokens + token_NL[:, n - 1 :]
            counts_NL = counts_NL[:, :-1] & counted_NL[:, n - 1 :]
            _, inverse = np.unique(gram_NL, return_inverse=True)
            gram_NL = inverse.reshape(counts_NL.shape)
        yield np.nonzero(counts_NL)[0], gram_NL[counts_NL]


def _count(sample, gram):
    """Count (sample, n-gram) pairs: three int arrays (samples, n-grams, counts)."""
    base = gram.max(initial=0) + 1
    pairs, counts = np.unique(sample * base + gram, return_counts=True)
    return pairs // base, pairs % base, counts


def _two_largest(gram, count):
    """Return the largest and second largest count of each n-gram id; 0 if there is none."""
    largest = np.zeros(gram.max(initial=0) + 1, count.dtype)
    second = np.zeros_like(largest)
    ordered = np.lexsort((count, gram))  # by n-gram, then by count
    gram, count = gram[ordered], count[ordered]
    is_last = np.append(gram[1:] != gram[:-1], np.ones(min(1, len(gram)), bool))
    largest[gram[is_last]] = count[is_last]
    before = np.flatnonzero(is_last) - 1
    before = before[(before >= 0) & (gram[before] == gram[is_last])]
    second[gram[before]] = count[before]
    return largest, second


def _closest_other(length_N):
    """For each sample, the closest length of another non-empty sample."""
    lengths, counts = np.unique(length_N[length_N > 0], return_counts=True)
    result = np.zeros_like(length_N)
    for length, count in zip(lengths, counts, strict=True):
        others = lengths if count > 1 else lengths[lengths != length]
        # In a tie argmin takes the first: the shorter.
        result[length_N == length] = others[np.argmin(np.abs(others - length))]
    return result


# --------------------------------------------------------------------------------------- perplexity


def perplexity_a(nll: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Aggregation A (SEDD, FS-DFM): mean over samples of exp(mean NLL of the sample's tokens).

    Args:
      nll: float [..., N], nats per sample.
      tokens: int [..., N], number of tokens; samples without tokens are excluded.

    Returns:
      float64 [...]: inf if a sample's exponential overflows, nan if no sample has tokens.
    """
    has_tokens = np.asarray(tokens) > 0
    with np.errstate(over="ignore"):
        return _mean(np.exp(_divide(nll, tokens)), has_tokens)


def perplexity_b(nll: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Aggregation B (MDLM, DUO): exp(sum of NLL / number of tokens).

    Arguments and result as in `perplexity_a`.
    """
    with np.errstate(over="ignore"):
        return np.exp(_divide(np.sum(nll, axis=-1), np.sum(tokens, axis=-1)))


def perplexity_c(nll: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Aggregation C (SDTT): exp(mean over samples of the mean NLL of the sample's tokens).

    At most A, by Jensen's inequality; equal to B if all samples have the same number of tokens.
    Arguments and result as in `perplexity_a`.
    """
    has_tokens = np.asarray(tokens) > 0
    with np.errstate(over="ignore"):
        return np.exp(_mean(_divide(nll, tokens), has_tokens))


def nats_per_byte(nll: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
    """Sum of NLL / number of scored bytes, [..., N] to float64 [...]; nan without bytes.

    The only figure of a judge that doesn't depend on its tokenizer.
    """
    return _divide(np.sum(nll, axis=-1), np.sum(num_bytes, axis=-1))


def _divide(numerator, denominator):
    """Quotient in float64; nan if the denominator is 0."""
    denominator = np.asarray(denominator, np.float64)
    is_zero = denominator == 0
    return np.where(is_zero, math.nan, numerator / np.where(is_zero, 1.0, denominator))[()]


def _mean(values, counts):
    """Mean over the last axis of the counted values."""
    return _divide(np.sum(np.where(counts, values, 0.0), axis=-1), np.sum(counts, axis=-1))
