"""The figures of a set of samples, each with its interval, and all that they were made from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fsdfm_jax.evaluate import mauve, metrics, tasks
from fsdfm_jax.evaluate.metrics import Estimate
from fsdfm_jax.evaluate.scoring import Judge, Scores
from fsdfm_jax.tokenizer import Tokenizer

# Of distinct-n.
_ORDERS = (1, 2, 3)
LEVEL = 0.95


class Summary(NamedTuple):
    """What `summarise` finds.

    Attributes:
      figures, judges: as in a report's row, see `report`.
      arrays: name -> array [N], what the figures are aggregated from.
    """

    figures: dict[str, Any]
    judges: dict[str, Any]
    arrays: dict[str, np.ndarray]


def interval(estimate: Estimate) -> dict[str, float]:
    """An estimate as JSON."""
    return {name: float(value) for name, value in estimate._asdict().items()}


def summarise(
    tokens_NL: np.ndarray,
    counted_NL: np.ndarray,
    tokenizer: Tokenizer,
    judges: Sequence[Judge],
    *,
    reference_ND: np.ndarray | None,
    resamples: int,
    seed: int = 0,
) -> Summary:
    """All figures that depend on the samples alone.

    Args:
      tokens_NL: int [N, L].
      counted_NL: bool [N, L], the positions that were written and not given; nothing else counts.
      tokenizer: of the samples.
      judges: the first one's features are those of MAUVE. A judge of the same tokenizer scores ids
        and text, any other only text.
      reference_ND: the first judge's features of real text; None leaves MAUVE out.
      resamples: of the bootstrap over samples.
      seed: of the bootstrap.
    """

    def estimate(statistic, *arrays):
        found = metrics.bootstrap(statistic, *arrays, resamples=resamples, level=LEVEL, seed=seed)
        return interval(found)

    mean = lambda values: np.mean(values, axis=-1)
    entropy_N = metrics.unigram_entropy(tokens_NL, counted_NL)
    arrays = {"entropy_nats": entropy_N}
    arrays |= {f"distinct_{n}": metrics.distinct(tokens_NL, n, counted_NL) for n in _ORDERS}
    arrays["self_bleu"] = metrics.self_bleu(tokens_NL, counted_NL)
    figures = {name: estimate(mean, values) for name, values in arrays.items()}
    bits = estimate(lambda values: mean(values) * metrics.BITS_PER_NAT, entropy_N)
    figures["entropy_bits"] = bits

    texts = tasks.texts(tokens_NL, counted_NL, tokenizer)
    judged = {}
    for judge in judges:
        forms = {"ids": None, "text": judge.score_text(texts)}
        if judge.tokenizer == tokenizer.fingerprint:
            forms["ids"] = judge.score_ids(tokens_NL, counted_NL)
        judged[judge.name] = {
            form: None if scores is None else _perplexities(scores, estimate)
            for form, scores in forms.items()
        }
        for form, scores in forms.items():
            if scores is not None:
                names = (f"{judge.name}.{form}.{field}" for field in Scores._fields)
                arrays |= dict(zip(names, scores, strict=True))
    figures["mauve"] = None
    if judges and reference_ND is not None:
        found = mauve.score(judges[0].features(texts), reference_ND, seed=seed)
        figures["mauve"] = interval(found)
    return Summary(figures, judged, arrays)


def _perplexities(scores: Scores, estimate) -> dict[str, Any]:
    return {
        "perplexity_a": estimate(metrics.perplexity_a, scores.nll, scores.tokens),
        "perplexity_b": estimate(metrics.perplexity_b, scores.nll, scores.tokens),
        "perplexity_c": estimate(metrics.perplexity_c, scores.nll, scores.tokens),
        "nats_per_byte": estimate(metrics.nats_per_byte, scores.nll, scores.num_bytes),
        "tokens": int(np.sum(scores.tokens)),
        "skipped": int(np.sum(scores.skipped)),
    }
