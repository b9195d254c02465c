"""Judge samples of a model by a known law.

The law gives the probability of each sample. The mean negative log-likelihood alone can be gamed: a
model that always writes the most likely text is below the entropy of the law. Samples are therefore
also compared by their k-grams and their conditional entropies, which show at what entropy a
likelihood was reached:

    nll        mean of -log p(sample) / L, nats per token
    excess     nll minus the entropy of the law; 0 for the law, below 0 for sharpened samples
    kl_k       KL from the samples' k-gram frequencies to the law's k-grams, k = 1, 2, 3
    entropy_k  H(x_k | x_1 .. x_(k-1)) of the samples' k-gram frequencies

Frequencies of few samples are biased: further from the law and lower in entropy than the model. The
same figures are therefore computed for samples of the law of equal number and length.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fsdfm_jax.exact import hmm, intervals
from fsdfm_jax.exact.hmm import Law
from fsdfm_jax.exact.intervals import Figure

ORDERS = (1, 2, 3)
_CONTROLS = 8  # sets of samples of the law
FLAGGED = 4.0  # standard errors


class Report(NamedTuple):
    """The verdict on N samples.

    Attributes:
      figures: of the samples, see the module; also distinct, the fraction of distinct samples.
      law: mean and standard deviation of each figure over sets of samples of the law.
      flags: figure -> sentence, for significant differences from the law.
    """

    figures: dict[str, Figure]
    law: dict[str, tuple[float, float]]
    flags: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {
            "figures": {name: figure._asdict() for name, figure in self.figures.items()},
            "law": {name: {"mean": m, "spread": s} for name, (m, s) in self.law.items()},
            "flags": self.flags,
        }


def judge(law: Law, tokens_NL: np.ndarray, *, resamples: int = 200, seed: int = 0) -> Report:
    """Judge unconditional samples.

    Args:
      law: the true law.
      tokens_NL: int [N, L], independent samples, N >= 2.
      resamples: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      ValueError: for ids that aren't tokens of the law, or fewer than 2 samples.
    """
    tokens_NL = np.asarray(tokens_NL)
    if tokens_NL.ndim != 2 or len(tokens_NL) < 2 or tokens_NL.shape[1] < max(ORDERS):
        raise ValueError(
            f"expected at least 2 samples of at least {max(ORDERS)} tokens, got shape "
            f"{tokens_NL.shape}"
        )
    count, length = tokens_NL.shape
    figures = intervals.centred_bootstrap(
        _statistics(law, tokens_NL), count, resamples=resamples, seed=seed
    )
    entropy = block_entropy_per_token(law, length)
    nll = figures["nll"]
    figures["excess"] = Figure(*(value - entropy.value for value in nll[:3]), count)
    figures["distinct"] = intervals.share(len(np.unique(tokens_NL, axis=0)), count)
    expected = law_figures(law, count, length)
    return Report(figures, expected, _flags(figures, expected))


def _flags(figures: dict[str, Figure], expected: dict[str, tuple[float, float]]) -> dict[str, str]:
    flags = {}
    for name, (mean, spread) in expected.items():
        if abs(figures[name].value - mean) > FLAGGED * spread:
            flags[name] = (
                f"{name} is {figures[name].value:.4f}; samples of the law have {mean:.4f} "
                f"(standard deviation {spread:.4f})"
            )
    if figures["distinct"].value < 1:
        repeats = round((1 - figures["distinct"].value) * figures["distinct"].count)
        flags["distinct"] = f"{repeats} samples repeat another one"
    return flags


@functools.lru_cache
def block_entropy_per_token(law: Law, length: int) -> Figure:
    """Entropy of a block of the law, in nats per token; see `hmm.block_entropy`."""
    found = hmm.block_entropy(law, np.random.default_rng(1), 8192, length)
    return Figure(*(value / length for value in found[:3]), found.count)


@functools.lru_cache
def law_figures(law: Law, count: int, length: int) -> dict[str, tuple[float, float]]:
    """Return (mean, standard deviation) of each figure over sets of samples of the law.

    The standard deviation is from few sets and accurate to about 25%.
    """
    rng, everything = np.random.default_rng(2), np.arange(count)
    drawn = (hmm.sample(law, rng, count, length) for _ in range(_CONTROLS))
    values = [_statistics(law, tokens_NL)(everything) for tokens_NL in drawn]
    result = {}
    for name in values[0]:
        of_sets = np.array([each[name] for each in values])
        result[name] = float(of_sets.mean()), float(of_sets.std(ddof=1))
    return result


def _statistics(law: Law, tokens_NL: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    """Make a function from rows [N] to all figures of these samples."""
    nll_N = -hmm.log_likelihoods(law, tokens_NL) / tokens_NL.shape[1]
    grams = {k: _Grams(law, tokens_NL, k) for k in ORDERS}

    def statistics(rows):
        result = {"nll": float(nll_N[rows].mean())}
        times_N = np.bincount(rows, minlength=len(nll_N))
        shorter = 0.0
        for k in ORDERS:
            result[f"kl_{k}"], entropy = grams[k].figures(times_N)
            result[f"entropy_{k}"], shorter = entropy - shorter, entropy
        return result

    return statistics


class _Grams:
    """Counts the k-grams of any selection of samples."""

    def __init__(self, law: Law, tokens_NL: np.ndarray, k: int):
        place = law.vocab_size ** np.arange(k)[::-1]
        windows = np.lib.stride_tricks.sliding_window_view(tokens_NL, k, axis=1)
        kinds, kind = np.unique(windows.astype(np.int64) @ place, return_inverse=True)
        self._kind, self._per_sample = kind.ravel(), windows.shape[1]
        grams = kinds[:, None] // place % law.vocab_size
        self._log_p = hmm.log_likelihoods(law, grams.astype(np.int32))

    def figures(self, times_N: np.ndarray) -> tuple[float, float]:
        """Return (KL from the frequencies to the law, their entropy), nats, weighted by times."""
        weights = np.repeat(times_N.astype(np.float64), self._per_sample)
        share = np.bincount(self._kind, weights, len(self._log_p)) / weights.sum()
        entropy = -float(hmm.xlogx(share).sum())
        return -entropy - float(share @ self._log_p), entropy
