"""The figures of a set of samples: measured per sample, then aggregated from the stored values.

`measure` runs the judges and returns one number per sample. `aggregate` computes every figure and
its interval from these arrays alone. A report can thus be recomputed, pooled over seeds (`pool`) or
bootstrapped differently without a judge. MAUVE compares whole sets and is separate (`mauve_score`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.evaluate import mauve, metrics, tasks
from fsdfm_jax.evaluate.judges.scoring import Judge, Scores
from fsdfm_jax.evaluate.metrics import Estimate
from fsdfm_jax.training import recipe

LEVEL = 0.95
# Description of the intervals in stamps: INTERVALS.format(level=LEVEL, resamples=..).
INTERVALS = (
    "{level:.0%} percentile bootstrap over samples, {resamples} resamples, seed 0; "
    "MAUVE: half-samples"
)

_ORDERS = (1, 2, 3)  # of distinct-n
_OWN_FIGURES = ("entropy_nats", *(f"distinct_{n}" for n in _ORDERS), "self_bleu")
_FORMS = ("ids", "text")


def interval(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON: value, low, high, and the number of samples used."""
    value, low, high, count = estimate
    return {"value": float(value), "low": float(low), "high": float(high), "count": int(count)}


def measure(
    tokens_NL: np.ndarray,
    counted_NL: np.ndarray,
    tokenizer: Tokenizer,
    judges: Sequence[Judge],
    *,
    known: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Compute all per-sample values that figures need.

    Args:
      tokens_NL: int [N, L].
      counted_NL: bool [N, L], the generated positions; only these count.
      tokenizer: of the samples.
      judges: a judge with the same tokenizer scores ids and text, any other only text.
      known: arrays from an earlier call for the same samples (and possibly others). Scores of a
        judge with an unchanged description are reused.

    Returns:
      "entropy_nats", "distinct_1" to "distinct_3" and "self_bleu", float64 [N], nan if a sample has
      no such figure; for each judge and form "JUDGE.ids.nll", ".tokens", ".num_bytes" and
      ".skipped" (and ".text."), [N], see `Scores`; "JUDGE.digest", a scalar string, the digest of
      `Judge.describe`.
    """
    arrays = {"entropy_nats": metrics.unigram_entropy(tokens_NL, counted_NL)}
    arrays |= {f"distinct_{n}": metrics.distinct(tokens_NL, n, counted_NL) for n in _ORDERS}
    arrays["self_bleu"] = metrics.self_bleu(tokens_NL, counted_NL)

    texts = None
    for judge in judges:
        digest = recipe.digest(judge.describe())
        reads_ids = judge.tokenizer == tokenizer.fingerprint
        names = _names(judge.name, _FORMS if reads_ids else ("text",))
        if known is not None and _holds(known, judge.name, digest, names, len(tokens_NL)):
            arrays |= {name: np.asarray(known[name]) for name in names}
        else:
            if texts is None:
                texts = tasks.texts(tokens_NL, counted_NL, tokenizer)
            scores = [judge.score_ids(tokens_NL, counted_NL)] if reads_ids else []
            scores.append(judge.score_text(texts))
            arrays |= dict(zip(names, (part for each in scores for part in each), strict=True))
        arrays[f"{judge.name}.digest"] = np.asarray(digest)
    return arrays


def aggregate(
    arrays: Mapping[str, np.ndarray],
    judge_names: Sequence[str],
    *,
    resamples: int,
    seed: int = 0,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compute the figures of samples from the output of `measure` alone.

    Samples without a figure are excluded: those without tokens, with too few tokens for an n-gram,
    or without another sample for comparison. "count" is the number used. If a judge failed (a
    sample has tokens but a non-finite loss), all figures of that judge and form are nan, because
    excluding the sample would flatter; "count" is then the number of scored samples.

    Args:
      arrays: of `measure` or `pool`; other arrays are ignored.
      judge_names: in the order of the report.
      resamples, seed: of the bootstrap over samples.

    Returns:
      (figures, judges) as in a row of the report; a form that a judge doesn't read is None.

    Raises:
      ValueError: a figure or judge is missing in the arrays.
    """

    def estimate(statistic, *arrays_N) -> dict[str, Any]:
        found = metrics.bootstrap(statistic, *arrays_N, resamples=resamples, level=LEVEL, seed=seed)
        return interval(found)

    mean = lambda values: np.mean(values, axis=-1)
    bits = lambda values: mean(values) * metrics.BITS_PER_NAT
    missing = [name for name in _OWN_FIGURES if name not in arrays]
    if missing:
        raise ValueError(
            f"The arrays lack {', '.join(missing)}; measure the samples before aggregating their "
            "figures."
        )
    figures = {name: estimate(mean, arrays[name]) for name in _OWN_FIGURES}
    figures["entropy_bits"] = estimate(bits, arrays["entropy_nats"])

    judges = {}
    for judge in judge_names:
        found = {form: _scores(arrays, judge, form) for form in _FORMS}
        if all(scores is None for scores in found.values()):
            raise ValueError(
                f"The arrays have no scores of the judge {judge!r}; measure the samples with it."
            )
        judges[judge] = {
            form: None if scores is None else _perplexities(scores, estimate)
            for form, scores in found.items()
        }
    return figures, judges


def pool(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate the per-sample values of repeats over seeds.

    `aggregate` then gives intervals over the samples of all seeds. Self-BLEU remains that within
    each seed.

    Args:
      parts: outputs of `measure`, possibly with other arrays. Only per-sample arrays that all parts
        have are kept.

    Raises:
      ValueError: there are no parts, or scores with the same name are from different judges.
    """
    if not parts:
        raise ValueError("Expected the arrays of at least one set of samples, got none.")
    shared = [name for name in parts[0] if all(name in part for part in parts)]
    pooled = {}
    for name in shared:
        if name.endswith(".digest"):
            digests = sorted({str(part[name]) for part in parts})
            if len(digests) > 1:
                raise ValueError(
                    f"The judge {name.removesuffix('.digest')!r} differs between the parts, with "
                    f"digests {', '.join(digests)}; score all samples with the same judge before "
                    "pooling them."
                )
            pooled[name] = np.asarray(parts[0][name])
        elif name in _OWN_FIGURES or name.endswith(_SUFFIXES):
            pooled[name] = np.concatenate([part[name] for part in parts])
    return pooled


def mauve_score(
    tokens_NL: np.ndarray,
    tokenizer: Tokenizer,
    judge: Judge,
    reference_ND: np.ndarray | None,
    *,
    counted_NL: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Compute MAUVE of samples against real text, as JSON.

    None without a reference, or if not all positions count: the features depend on the whole text,
    so a model would get credit for given parts.

    Args:
      tokens_NL: int [N, L].
      tokenizer: of the samples.
      judge: provides the features.
      reference_ND: its features of real text.
      counted_NL: bool [N, L], the generated positions; None: all.
      seed: see `mauve.score`.

    Returns:
      The estimate. Its numbers are nan if the judge fails on a sample (non-finite features), and
      "count" is then the number of samples without failure.

    Raises:
      ValueError: see `mauve.score`.
    """
    if reference_ND is None or (counted_NL is not None and not np.all(counted_NL)):
        return None
    everything_NL = np.ones(np.shape(tokens_NL), bool)
    features_ND = judge.features(tasks.texts(tokens_NL, everything_NL, tokenizer))
    worked_N = np.all(np.isfinite(features_ND), axis=1)
    if not worked_N.all():
        return interval(metrics.failed(int(worked_N.sum())))
    return interval(mauve.score(features_ND, reference_ND, seed=seed))


_SUFFIXES = tuple(f".{form}.{field}" for form in _FORMS for field in Scores._fields)


def _names(judge: str, forms: Sequence[str]) -> list[str]:
    return [f"{judge}.{form}.{field}" for form in forms for field in Scores._fields]


def _holds(known, judge: str, digest: str, names: Sequence[str], num_samples: int) -> bool:
    """Return whether the arrays have all scores of this judge for this number of samples."""
    if str(known.get(f"{judge}.digest", "")) != digest:
        return False
    return all(name in known and np.shape(known[name]) == (num_samples,) for name in names)


def _scores(arrays: Mapping[str, np.ndarray], judge: str, form: str) -> Scores | None:
    names = _names(judge, (form,))
    if not all(name in arrays for name in names):
        return None
    return Scores(*(np.asarray(arrays[name]) for name in names))


def _perplexities(scores: Scores, estimate: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    has_tokens_N = scores.tokens > 0
    nll, tokens, num_bytes, _ = (part[has_tokens_N] for part in scores)
    worked_N = np.isfinite(nll)
    statistics = {
        "perplexity_a": (metrics.perplexity_a, tokens),
        "perplexity_b": (metrics.perplexity_b, tokens),
        "perplexity_c": (metrics.perplexity_c, tokens),
        "nats_per_byte": (metrics.nats_per_byte, num_bytes),
    }
    if worked_N.all():
        found = {name: estimate(one, nll, sizes) for name, (one, sizes) in statistics.items()}
    else:
        found = dict.fromkeys(statistics, interval(metrics.failed(int(worked_N.sum()))))
    return found | {
        "tokens": int(np.sum(scores.tokens)),
        "skipped": int(np.sum(scores.skipped)),
    }
