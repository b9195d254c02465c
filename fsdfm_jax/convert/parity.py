"""Compare two models.

Compares parameters (bit for bit, after rounding to the target's dtype), logits on random inputs,
and for an exported sampler its tokens with the library's.
"""

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.convert import exported
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference.bundle import Bundle
from fsdfm_jax.network import model as model_lib

# Maximum difference of logits due to rounding, by dtype of the weights in the file.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}


class Parity(NamedTuple):
    """Distance of two models.

    Attributes:
      max_deviation: maximum absolute difference of logits.
      max_kl: maximum KL(source || target) of the posterior of a position, nats.
    """

    max_deviation: float
    max_kl: float


def random_inputs(
    bundle: Bundle, *, rows: int = 4, length: int = 32, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw tokens int32 [B, L], times and step widths float32 [B]; the first row has t=0, h=1."""
    rng = np.random.default_rng(seed)
    xt_BL = rng.integers(0, bundle.model.vocab_size, (rows, length), dtype=np.int32)
    h_B = np.float32(2.0) ** -rng.integers(0, 11, rows).astype(np.float32)
    h_B[0] = 1.0
    t_B = (rng.random(rows) * (1.0 - h_B)).astype(np.float32)
    return xt_BL, t_B, h_B


def logits_of(bundle: Bundle, inputs: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    """Compute logits, float32 [B, L, V], keeping the parameters in memory only during the call."""
    run = jax.jit(model_lib.apply, static_argnums=1)
    model = generate_lib.portable(bundle.model)
    return np.asarray(run(bundle.device_params(), model, *inputs))


def compare(source_BLV: np.ndarray, target_BLV: np.ndarray) -> Parity:
    """Compare the logits of two models; NaN if either has a NaN."""
    deviation = np.max(np.abs(source_BLV - target_BLV))
    log_p = jax.nn.log_softmax(jnp.asarray(source_BLV))
    log_q = jax.nn.log_softmax(jnp.asarray(target_BLV))
    kl_BL = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return Parity(float(deviation), max(float(jnp.max(kl_BL)), 0.0))


def check(parity: Parity, tolerance: float) -> None:
    """Raise ValueError if logits differ by more than `tolerance`."""
    if not parity.max_deviation <= tolerance:  # also catches NaN
        raise ValueError(
            f"The target doesn't compute the same as the source: logits differ by up to "
            f"{parity.max_deviation:.3g} (KL {parity.max_kl:.3g} nats), more than {tolerance:g}. "
            "No target was written; --tolerance sets the bound."
        )


def check_parameters(source: Bundle, target: Bundle, dtype: str) -> None:
    """Raise ValueError naming parameters of `target` that differ from the source, after rounding.

    Logits alone don't distinguish small models. One parameter of each is in memory at a time.
    """
    different = []
    for path, array in source.arrays():
        expected = array.astype(bundle_lib.DTYPES[dtype]).astype(np.float32)
        if not np.array_equal(expected.view(np.int32), target.leaves[path].read().view(np.int32)):
            different.append(path)
    if different:
        raise ValueError(
            "The parameters of the target differ from the source: " + bundle_lib.listed(different)
        )


def check_program(
    source: Bundle, folder: pathlib.Path, *, sampling: Sampling | None = None, rows: int = 1
) -> None:
    """Raise ValueError unless an exported sampler draws the library's tokens, half of a row given.

    Args:
      source: the exported model.
      folder: the exported sampler; all its programs are checked.
      sampling: as in `exported.write`.
      rows: number of samples to compare.
    """
    config = exported.check(folder)
    length = config["length"]
    rng = np.random.default_rng(0)
    given_BL = rng.integers(0, source.num_tokens, (rows, length)).astype(np.int32)
    frozen_BL = (np.arange(length) < length // 2) & (np.arange(rows) == 0)[:, None]
    inputs = {"seed": 7, "given_BL": given_BL, "frozen_BL": frozen_BL}
    params, model = source.device_params(), exported.portable(source.model)
    for steps in config["steps"]:
        each = (sampling or source.sampling()).replace(steps=steps)
        found_BL = exported.call(folder, params, each, **inputs)
        expected_BL = generate_lib.generate(params, model, source.process(), each, **inputs)
        if not np.array_equal(expected_BL, found_BL):
            share = float(np.mean(expected_BL != found_BL))
            raise ValueError(
                f"The exported program for {steps} steps draws other tokens than the library "
                f"({share:.1%} of them)."
            )
