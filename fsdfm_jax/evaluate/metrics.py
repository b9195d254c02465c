"""Figures out of token ids and log-likelihoods, in NumPy: recomputable from saved samples."""

import math

import numpy as np

BITS_PER_NAT = 1.0 / math.log(2.0)


def unigram_entropy(tokens_NL: np.ndarray) -> np.ndarray:
    """Entropy of each sample's own token frequencies, nats, float64 [N]; at most ln L."""
    result = []
    for tokens in np.asarray(tokens_NL):
        _, counts = np.unique(tokens, return_counts=True)
        p = counts / counts.sum()
        result.append(-np.sum(p * np.log(p)))
    return np.asarray(result)


def perplexity_a(nll_N: np.ndarray, tokens_N: np.ndarray) -> float:
    """Aggregation A (SEDD, FS-DFM): mean over samples of exp(mean NLL of the sample's tokens)."""
    return float(np.mean(np.exp(nll_N / tokens_N)))


def perplexity_b(nll_N: np.ndarray, tokens_N: np.ndarray) -> float:
    """Aggregation B (MDLM, DUO): exp(sum of NLL / number of tokens); nan without tokens."""
    if not np.sum(tokens_N):
        return math.nan
    return float(np.exp(np.sum(nll_N) / np.sum(tokens_N)))
