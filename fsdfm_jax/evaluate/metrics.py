"""Figures out of token ids and log-likelihoods, in NumPy: recomputable from saved samples.

Figures of samples are one number a sample, so that `bootstrap` can say how far their mean is known.
NaN stands for "this sample has no such figure" (it holds too few tokens that count).

    counted_NL    bool [N, L], the positions that were generated. Given ones never count, and an
                  n-gram that touches one doesn't exist. None: all positions count.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BITS_PER_NAT = 1.0 / math.log(2.0)

_BLEU_ORDER = 4
# Entries of the resampling indices held at once, 8 MiB.
_HELD_INDICES = 2**20


class Estimate(NamedTuple):
    """A figure and the ends of its bootstrap interval; both ends are nan where there is none.

    `count` is how many samples went into it.
    """

    value: float
    low: float
    high: float
    count: int


def failed(count: int) -> Estimate:
    """The estimate where what measures failed on a sample; it worked on `count` of them."""
    return Estimate(math.nan, math.nan, math.nan, count)


def bootstrap(
    statistic: Callable[..., np.ndarray],
    *arrays_N: np.ndarray,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """A statistic of N samples with the percentile interval of its bootstrap.

    Rows are drawn with replacement, the same ones of each array, from
    `numpy.random.default_rng(seed)`. The ends are order statistics, so that infinite values (an
    overflowing perplexity) need no arithmetic. The interval is that of the samples at hand: it
    doesn't know how seeds or training runs differ.

    Args:
      statistic: takes arrays [..., N] and reduces the last axis alone.
      *arrays_N: one number per sample, all of one length. A sample that is nan in any of them has
        no such figure and is left out of all; where nan means that something failed, don't ask.
      resamples: R, how often rows are drawn.
      level: of the interval, in (0, 1).
      seed: of the draws.

    Returns:
      The statistic of all rows, the ends of the interval and the number of rows that weren't left
      out. The ends are nan for a single row, and everything is nan without rows. Resamples whose
      statistic is nan are left out.

    Raises:
      ValueError: for arrays that are not one-dimensional and of one length, fewer than 2 resamples,
        a level outside (0, 1), or a statistic that doesn't reduce the last axis alone.
    """
    arrays = [np.asarray(array) for array in arrays_N]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1:
        raise ValueError(
            "The bootstrap takes at least one array, each with one number per sample; got shapes "
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
                "A statistic must reduce the last axis alone: of arrays of shape "
                f"{rows_RN.shape} it gave the shape {values_R.shape}."
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
    """Entropy of each sample's own token frequencies, nats, float64 [N]; at most ln L."""
    tokens_NL, counted_NL = _checked(tokens_NL, counted_NL)
    result = np.full(len(tokens_NL), math.nan)
    for row, (tokens, counted) in enumerate(zip(tokens_NL, counted_NL, strict=True)):
        _, counts = np.unique(tokens[counted], return_counts=True)
        if len(counts):
            p = counts / counts.sum()
            result[row] = -np.sum(p * np.log(p))
    return result


def distinct(tokens_NL: np.ndarray, n: int, counted_NL: np.ndarray | None = None) -> np.ndarray:
    """Different n-grams of each sample divided by all of its n-grams, float64 [N], in (0, 1].

    Taken per sample, not over the pool of all samples: the pooled share falls with every sample
    added, so that evaluations of different size could not be compared, and it falls again when the
    bootstrap draws a sample twice, so that its interval would lie beside the value. Sameness
    between samples, which this can't see, is what `self_bleu` shows.

    Samples with no n-gram that counts get nan.

    Raises:
      ValueError: for n < 1.
    """
    if n < 1:
        raise ValueError(f"The order of an n-gram is at least 1, got n={n}.")
    tokens_NL, counted_NL = _checked(tokens_NL, counted_NL)
    *_, grams = _grams(tokens_NL, counted_NL, n)
    sample, _, count = _count(*grams)
    different = np.bincount(sample, minlength=len(tokens_NL))
    total = np.bincount(sample, weights=count, minlength=len(tokens_NL))
    return _divide(different, total)


def self_bleu(tokens_NL: np.ndarray, counted_NL: np.ndarray | None = None) -> np.ndarray:
    """BLEU of each sample's ids against all other samples as references, float64 [N], in [0, 1].

    High where samples repeat each other (arXiv:1802.01886). BLEU-4 with uniform weights: clipped
    precisions of 1- to 4-grams, and a brevity penalty against the closest length of a reference,
    the shorter one of two equally close. The k-th order without a match counts 1 / 2^k matches
    (smoothing "exp" of sacrebleu, that of NIST); orders of which a sample has no n-gram are left
    out (its "effective order"); without a single match the score is 0.

    The largest and the second largest count of each n-gram over all samples tell what the other
    samples hold at most, so that the cost is that of sorting the n-grams, not quadratic in samples.

    Samples without tokens that count are no reference and get nan, as does a single sample. With
    more samples there are more references, and the score rises: compare at one N only.

    Scores of one set share their references, while `bootstrap` draws them as if they were
    independent: the interval of their mean can be too narrow, most of all where many samples
    repeat a few.
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
            "Tokens must be [N, L] and counted_NL bool of that shape (or None), got "
            f"{tokens_NL.shape} and {counted_NL.dtype} {counted_NL.shape}."
        )
    return tokens_NL, counted_NL


def _grams(tokens_NL, counted_NL, order):
    """For each n from 1 to `order` the n-grams that count: (their samples [G], their ids [G]).

    Ids are numbered from 0 and equal for equal n-grams of all samples.
    """
    _, token_NL = np.unique(tokens_NL, return_inverse=True)
    token_NL = token_NL.reshape(tokens_NL.shape).astype(np.int64)
    num_tokens = token_NL.max(initial=0) + 1
    gram_NL, counts_NL = token_NL, counted_NL
    for n in range(1, order + 1):
        if n > 1:
            # By numbers below N L, times a token: no overflow however long the n-gram.
            gram_NL = gram_NL[:, :-1] * num_tokens + token_NL[:, n - 1 :]
            counts_NL = counts_NL[:, :-1] & counted_NL[:, n - 1 :]
            _, inverse = np.unique(gram_NL, return_inverse=True)
            gram_NL = inverse.reshape(counts_NL.shape)
        yield np.nonzero(counts_NL)[0], gram_NL[counts_NL]


def _count(sample, gram):
    """Pairs (sample, n-gram) that occur, and how often: three int arrays of one length."""
    base = gram.max(initial=0) + 1
    pairs, counts = np.unique(sample * base + gram, return_counts=True)
    return pairs // base, pairs % base, counts


def _two_largest(gram, count):
    """Per n-gram id the largest and second largest of its counts; 0 where there is none."""
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
    """For each sample the closest length of another sample that isn't empty."""
    lengths, counts = np.unique(length_N[length_N > 0], return_counts=True)
    result = np.zeros_like(length_N)
    for length, count in zip(lengths, counts, strict=True):
        others = lengths if count > 1 else lengths[lengths != length]
        # The first of equally close ones: the shorter.
        result[length_N == length] = others[np.argmin(np.abs(others - length))]
    return result


# --------------------------------------------------------------------------------------- perplexity


def perplexity_a(nll: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Aggregation A (SEDD, FS-DFM): mean over samples of exp(mean NLL of the sample's tokens).

    Args:
      nll: float [..., N], nats of each sample.
      tokens: int [..., N], how many tokens they belong to; samples without any are left out.

    Returns:
      float64 [...]: inf where one sample's exponential overflows, nan if no sample has tokens.
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

    Never above A, by Jensen's inequality; equal to B where all samples hold as many tokens.
    Arguments and result as in `perplexity_a`.
    """
    has_tokens = np.asarray(tokens) > 0
    with np.errstate(over="ignore"):
        return np.exp(_mean(_divide(nll, tokens), has_tokens))


def nats_per_byte(nll: np.ndarray, num_bytes: np.ndarray) -> np.ndarray:
    """Sum of NLL / number of bytes of what was scored, [..., N] to float64 [...]; nan without any.

    The one figure of a judge that doesn't depend on how its tokenizer cuts the text.
    """
    return _divide(np.sum(nll, axis=-1), np.sum(num_bytes, axis=-1))


def _divide(numerator, denominator):
    """Quotient in float64, nan where the denominator is 0."""
    denominator = np.asarray(denominator, np.float64)
    is_zero = denominator == 0
    return np.where(is_zero, math.nan, numerator / np.where(is_zero, 1.0, denominator))[()]


def _mean(values, counts):
    """Mean over the last axis of the values that count."""
    return _divide(np.sum(np.where(counts, values, 0.0), axis=-1), np.sum(counts, axis=-1))
