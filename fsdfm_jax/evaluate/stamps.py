"""Protocol stamps: everything that a figure depends on, and nothing else.

A stamp has two parts: what the samples depend on, and how they are scored. A new judge therefore
scores the stored samples, and a change of the training code recomputes nothing.
"""

from collections.abc import Mapping
from typing import Any

import jax

from fsdfm_jax.evaluate.plan import Point

# Increase it when a code change affects tokens or figures: results of other versions are then
# computed again.
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
    """Make the part of the stamp that the samples of a point depend on.

    Args:
      point: the point.
      facts: of its model, see `Subject`; None for real text and controls.
      num_samples, batch_size, length: of the samples.
      tokenizer: fingerprint.
      text: fingerprint of the held-out text if the samples depend on it.
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
    """Return the facts that rounding depends on, as far as this process knows them.

    The mesh is omitted: in sampling it shards rows and parameters, not sums.
    """
    return {
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "matmul_precision": jax.config.jax_default_matmul_precision,
    }


def scoring(**facts: Any) -> dict[str, Any]:
    """Make the scoring part of the stamp: `facts` and the protocol version."""
    return facts | {"protocol": PROTOCOL_VERSION}
