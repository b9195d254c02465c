"""Do two models compute the same?

Parameter by parameter (equal bit for bit, after rounding to the dtype of the target), logits on
random inputs, and for an exported sampler its tokens against the library's.
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
    run = jax.jit(model_lib.apply, static_argnums=1)
    model = generate_lib.portable(bundle.model)
    return np.asarray(run(bundle.device_params(), model, *inputs))


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
            "No target was written; --tolerance sets the bound."
        )


def check_parameters(source: Bundle, target: Bundle, dtype: str) -> None:
    """ValueError naming the parameters of `target` that aren't the source's, rounded to `dtype`.

    Logits alone don't tell small models apart. One parameter of each is in memory at a time.
    """
    different = []
    for path, array in source.arrays():
        expected = array.astype(bundle_lib.DTYPES[dtype]).astype(np.float32)
        if not np.array_equal(expected.view(np.int32), target.leaves[path].read().view(np.int32)):
            different.append(path)
    if different:
        raise ValueError(
            "The target holds other parameters than the source: " + bundle_lib.listed(different)
        )


def check_program(
    source: Bundle, folder: pathlib.Path, *, sampling: Sampling | None = None, rows: int = 1
) -> None:
    """ValueError unless an exported sampler draws the library's tokens, half of a row given.

    Args:
      source: the model it was made of.
      folder: the exported sampler, of whose programs each is checked.
      sampling: that of `exported.write`.
      rows: samples that are compared.
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
                f"The exported program of {steps} steps draws other tokens than the library "
                f"({share:.1%} of them)."
            )
