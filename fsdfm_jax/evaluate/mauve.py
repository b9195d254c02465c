"""MAUVE, the similarity of two distributions of texts, with the package `mauve-text`.

Source: arXiv:2102.01454. The package is under the GPLv3 and optional: it is used only if it is
installed (`pip install 'fsdfm_jax[mauve]'`).
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

import numpy as np

from fsdfm_jax.evaluate.metrics import Estimate

# The score uses one bucket per ten samples; half of these samples must still give two buckets.
MIN_SAMPLES = 40

_HALVES = 100
_LEVEL = 0.95


def available() -> bool:
    """Return whether `mauve-text` is installed."""
    return importlib.util.find_spec("mauve") is not None


def facts() -> dict[str, Any]:
    """What the score and its interval depend on, besides features and reference, as JSON.

    "version" is that of `mauve-text`, None if it isn't installed.
    """
    return {
        "version": importlib.metadata.version("mauve-text") if available() else None,
        "half_samples": _HALVES,
        "level": _LEVEL,
        "seeds": "one generator gives all halves and a clustering seed for each score",
        "buckets": "a tenth of the smaller set, at least 2",
    }


def score(features_ND: np.ndarray, reference_ND: np.ndarray, *, seed: int) -> Estimate:
    """MAUVE of samples against reference texts, in [0, 1]; 1 is best.

    The value is that of the package on all rows, with its standard settings. It depends on the
    number of rows, which sets the number of buckets, and few rows lower it. Compare scores only at
    equal N.

    The interval estimates the spread over new sets of N samples. It comes from 100 pairs of
    half-samples, drawn without replacement. Each pair is quantised separately, since k-means on a
    few hundred points is a large part of the noise. The bootstrap doesn't work here: both copies of
    a row fall into the same bucket, so the sets look too far apart. Bootstrap resamples scatter 1.2
    to 2.8 times as much as new samples, around a centre that is 0.04 to 0.2 too low (measured on
    mixtures of Gaussians with 64 and 200 rows). Half-samples scatter like new samples of full size
    (exactly so for means) and have as many rows per bucket. The remaining bias, of N/2 rows against
    N, is removed: the 95% percentiles of the half-samples' scores about their mean are shifted to
    the value and clipped to [0, 1].

    Args:
      features_ND: float [N, D], a judge's features of the samples.
      reference_ND: float [M, D], its features of real text.
      seed: of the half-samples and the clustering; the same seed gives the same numbers.

    Raises:
      ValueError: the package is missing, there are fewer than `MIN_SAMPLES` rows, the widths
        differ, or a feature isn't finite.
    """
    features_ND, reference_ND = np.asarray(features_ND), np.asarray(reference_ND)
    _check(features_ND, reference_ND)
    try:
        import mauve
        import threadpoolctl
    except ImportError as error:
        raise ValueError(
            f"MAUVE can't be computed ({error}); install what it needs with "
            "`pip install 'fsdfm_jax[mauve]'`."
        ) from error

    def one(features, reference, clustering_seed):
        found = mauve.compute_mauve(
            p_features=features, q_features=reference, seed=clustering_seed, verbose=False
        )
        return float(found.mauve)

    rng = np.random.default_rng(seed)
    clustering_seeds = rng.integers(2**20, size=_HALVES + 1).tolist()
    # The problems are too small for threads, which would mostly wait for each other.
    with _quiet(), threadpoolctl.threadpool_limits(1):
        value = one(features_ND, reference_ND, clustering_seeds[0])
        halves = [
            one(_half(rng, features_ND), _half(rng, reference_ND), clustering_seed)
            for clustering_seed in clustering_seeds[1:]
        ]
    ordered = np.sort(halves) - np.mean(halves) + value
    outside = max(1, round(_HALVES * (1 - _LEVEL) / 2))
    low, high = np.clip([ordered[outside - 1], ordered[-outside]], 0.0, 1.0)
    return Estimate(value, float(low), float(high), len(features_ND))


def _check(features_ND, reference_ND):
    for name, rows in (("features", features_ND), ("reference", reference_ND)):
        if rows.ndim != 2 or len(rows) < MIN_SAMPLES:
            raise ValueError(
                f"MAUVE needs [N, D] {name} of at least {MIN_SAMPLES} samples, got shape "
                f"{rows.shape}; with fewer, its histograms are noise."
            )
        if not np.all(np.isfinite(rows)):
            raise ValueError(f"The {name} have values that are not finite.")
    if features_ND.shape[1] != reference_ND.shape[1]:
        raise ValueError(
            "Features and reference must come from the same judge, got widths "
            f"{features_ND.shape[1]} and {reference_ND.shape[1]}."
        )


def _half(rng, rows_ND):
    return rows_ND[rng.permutation(len(rows_ND))[: len(rows_ND) // 2]]


@contextlib.contextmanager
def _quiet():
    """Silence stderr, where the compiled clustering would print a hundred warnings.

    It recommends 39 points per bucket, but MAUVE by definition has 20.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
