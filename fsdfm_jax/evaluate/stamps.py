"""Protocol stamps: everything that a number depends on, and nothing that it doesn't.

A stamp has two parts that are compared: what the samples depend on, and what is then made of them.
So another judge scores the samples that are there, and a change in the training code redoes
nothing.
"""

from collections.abc import Mapping
from typing import Any

import jax

from fsdfm_jax.evaluate.plan import Point

# Raise it when a change of the code changes tokens or figures: results stored under another version
# are computed again.
PROTOCOL_VERSION = 1


def samples(
    point: Point,
    facts: Mapping[str, Any] | None,
    *,
    num_samples: int,
    batch_size: int,
    length: int,
    tokenizer: str,
    text: str | None,
) -> dict[str, Any]:
    """What the samples of a point depend on.

    Args:
      point: what is sampled.
      facts: of its model, see `Subject`; None for real text and controls.
      num_samples, batch_size, length: how much is drawn.
      tokenizer: fingerprint.
      text: fingerprint of the held-out text if the samples are made of it or around it.
    """
    return {
        "source": point.source,
        "num_samples": num_samples,
        "length": length,
        "task": point.task,
        "text": text,
        "tokenizer": tokenizer,
        "model": None if facts is None else dict(facts),
        "sampling": _sampling(point, facts, min(batch_size, num_samples)),
        "numerics": numerics(),
        "protocol": PROTOCOL_VERSION,
    }


def _sampling(point: Point, facts: Mapping[str, Any] | None, batch_size: int) -> dict | None:
    if facts is None:
        return None if point.seed is None else {"seed": point.seed}
    return point.described() | {
        "seed": point.seed,
        "memory": point.memory,
        "weights": facts["weights"],
        "batch_size": batch_size,
        "draws": "two-level inverse CDF, float32, 32-bit uniforms",
    }


def numerics() -> dict[str, Any]:
    """What rounding depends on, as far as this process knows it.

    The mesh is left out: what it spreads in sampling are rows and parameters, not sums.
    """
    return {
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "matmul_precision": jax.config.jax_default_matmul_precision,
    }


def scoring(**facts: Any) -> dict[str, Any]:
    """What is made of the samples: `facts`, and the version of the code."""
    return facts | {"protocol": PROTOCOL_VERSION}
