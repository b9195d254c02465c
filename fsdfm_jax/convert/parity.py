"""Do two models compute the same? Logits on random inputs, compared position by position."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax import models
from fsdfm_jax.convert.bundle import Bundle

# Largest difference of two logits that rounding explains, by the dtype of the weights in the file.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}


class Parity(NamedTuple):
    """How far two models are apart.

    Attributes:
      max_deviation: largest absolute difference of two logits.
      max_kl: largest KL(source || target) of a position's posterior, nats.
    """

    max_deviation: float
    max_kl: float


def random_inputs(
    bundle: Bundle, *, rows: int = 4, length: int = 32, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int32 [B, L], times and step widths float32 [B], the first row at t=0, h=1."""
    rng = np.random.default_rng(seed)
    xt_BL = rng.integers(0, bundle.model.vocab_size, (rows, length), dtype=np.int32)
    h_B = np.float32(2.0) ** -rng.integers(0, 11, rows).astype(np.float32)
    h_B[0] = 1.0
    t_B = (rng.random(rows) * (1.0 - h_B)).astype(np.float32)
    return xt_BL, t_B, h_B


def logits_of(bundle: Bundle, inputs: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """Logits, float32 [B, L, V]; the parameters are in memory only meanwhile."""
    run = jax.jit(models.apply, static_argnums=1)
    return np.asarray(run(bundle.device_params(), bundle.model, *inputs))


def compare(source_BLV: np.ndarray, target_BLV: np.ndarray) -> Parity:
    """The distance of two models' logits; NaN where either has one."""
    deviation = np.max(np.abs(source_BLV - target_BLV))
    log_p = jax.nn.log_softmax(jnp.asarray(source_BLV))
    log_q = jax.nn.log_softmax(jnp.asarray(target_BLV))
    kl_BL = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return Parity(float(deviation), max(float(jnp.max(kl_BL)), 0.0))


def check(parity: Parity, tolerance: float) -> None:
    """ValueError unless no two logits differ by more than `tolerance`."""
    if not parity.max_deviation <= tolerance:  # also catches NaN
        raise ValueError(
            f"The target computes something else than the source: logits differ by up to "
            f"{parity.max_deviation:.3g} (KL {parity.max_kl:.3g} nats), allowed are {tolerance:g}. "
            "Nothing was written; --tolerance sets the bound."
        )
