"""Sampling with trained weights: jitted samplers for any stage, compiled once per shape."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.flow import sampler
from fsdfm_jax.flow.jumps import Finalize, Jump
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.flow.teacher import Denoise
from fsdfm_jax.inference.autoregressive import make_autoregressive_sampler
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params
from fsdfm_jax.ops import attention
from fsdfm_jax.ops import logits as logits_lib


def sampler_parts(
    params: Params, model: ModelConfig, process: Process, sampling: Sampling, frozen_BL: jax.Array
) -> tuple[Denoise, Jump, Finalize]:
    """Return (denoise, jump, finalize) of a network, the arguments of `flow.sampler.sample`."""
    denoise = functools.partial(model_lib.predict, params, model, frozen_BL=frozen_BL)
    wrapped = sampling.wrap(denoise, mask_id=process.source.mask_id)
    return wrapped, process.make_jump(sampling.rule), process.finalize


@functools.lru_cache(maxsize=64)
def make_sampler(model: ModelConfig, process: Process) -> Callable[..., jax.Array]:
    """Make a jitted few-step sampler.

    Args:
      model, process: of the run. Equal arguments return the same function, with its compiled code.

    Returns:
      `(params, key, x0_BL, frozen_BL, sampling) -> x_BL`. The numbers of a `Sampling` are data:
      only a new shape, number of steps, jump rule or grid recompiles.
    """

    def run(params: Params, key, x0_BL, frozen_BL, sampling: Sampling):
        parts = sampler_parts(params, model, process, sampling, frozen_BL)
        return sampler.sample(key, *parts, x0_BL, sampling.times(), frozen_BL)

    return jax.jit(run)


class Observed(NamedTuple):
    """Observations at each step of a sampler.

    Attributes:
      tokens_SBL: int, the tokens after the step.
      entropy_SB: float32, nats: mean entropy of the distributions that the step draws from, with
        temperature and nucleus and without the mask token. The mean is over open positions: those
        not frozen and, if revealed tokens stay, still masked. NaN if there are none.
      changed_SB: float32 in [0, 1], fraction of the open positions that changed.
    """

    tokens_SBL: jax.Array
    entropy_SB: jax.Array
    changed_SB: jax.Array


@functools.lru_cache(maxsize=64)
def make_observer(model: ModelConfig, process: Process) -> Callable[..., Any]:
    """As `make_sampler`, but the sampler returns (x_BL, `Observed`).

    It computes the vocabulary product twice per step, so don't measure speed with it.
    """
    mask_id = process.source.mask_id

    def observe(frozen_BL, logits, x_BL, new_BL):
        open_BL = ~frozen_BL
        if mask_id is not None:
            logits = logits_lib.exclude(logits, mask_id)
            if process.revealed == "stay":
                open_BL = open_BL & (x_BL == mask_id)
        count_B = jnp.sum(open_BL, axis=1)
        entropy_BL = logits_lib.map_positions(logits_lib.entropy, logits)
        return Observed(
            new_BL,
            jnp.sum(jnp.where(open_BL, entropy_BL, 0.0), axis=1) / count_B,  # 0 / 0 is NaN
            jnp.sum(open_BL & (new_BL != x_BL), axis=1) / jnp.maximum(count_B, 1),
        )

    def run(params: Params, key, x0_BL, frozen_BL, sampling: Sampling):
        parts = sampler_parts(params, model, process, sampling, frozen_BL)
        watch, times = functools.partial(observe, frozen_BL), sampling.times()
        return sampler.sample_trajectory(key, *parts, x0_BL, times, frozen_BL, observe=watch)

    return jax.jit(run)


def draw_noise(process: Process, seed, given_BL, frozen_BL) -> tuple[jax.Array, jax.Array]:
    """Draw noise around given tokens, and a key for the steps.

    Args:
      process: its source gives the noise.
      seed: uint32 scalar, for all randomness.
      given_BL: int [B, L], used only at frozen positions.
      frozen_BL: bool [B, L].

    Returns:
      (x0_BL int32, typed key).
    """
    noise_key, sample_key = jax.random.split(jax.random.key(seed))
    x0_BL = process.source.sample(noise_key, given_BL.shape)
    return jnp.where(frozen_BL, given_BL, x0_BL).astype(jnp.int32), sample_key


def make_generator(model: ModelConfig, process: Process) -> Callable[..., jax.Array]:
    """Make few-step generation, including the noise, as one pure function to jit or export.

    Returns:
      `(params, seed, given_BL, frozen_BL, sampling) -> x_BL`; arguments as in `draw_noise` and
      `make_sampler`.
    """

    def run(params: Params, seed, given_BL, frozen_BL, sampling: Sampling):
        x0_BL, key = draw_noise(process, seed, given_BL, frozen_BL)
        parts = sampler_parts(params, model, process, sampling, frozen_BL)
        return sampler.sample(key, *parts, x0_BL, sampling.times(), frozen_BL)

    return run


@functools.lru_cache(maxsize=64)
def _jit_generator(model: ModelConfig, process: Process) -> Callable[..., jax.Array]:
    return jax.jit(make_generator(model, process))


@functools.lru_cache(maxsize=64)
def _jit_step(model: ModelConfig, process: Process) -> Callable[..., jax.Array]:
    def step(params, x_BL, inputs, x0_BL, frozen_BL, sampling: Sampling):
        parts = sampler_parts(params, model, process, sampling, frozen_BL)
        return sampler.make_step_fn(*parts, x0_BL, frozen_BL)(x_BL, inputs)[0]

    return jax.jit(step)


def generate(
    params: Params,
    model: ModelConfig,
    process: Process,
    sampling: Sampling,
    *,
    given_BL: np.ndarray,
    frozen_BL: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Sample token ids from any network, around given tokens.

    Args:
      params, model: of any stage; an autoregressive network samples left to right.
      process: the noising process it was trained on.
      sampling: settings; an autoregressive network uses only temperature and top_p.
      given_BL: int [B, L], used only at frozen positions.
      frozen_BL: bool [B, L], positions fixed to the given token.
      seed: for all randomness, in [0, 2^32); see `batch_seed` for more than one batch.

    Returns:
      int32 [B, L].

    Raises:
      ValueError: for a seed out of range or invalid given tokens (`check_given`).
    """
    check_seed(seed)
    check_given(model, process, given_BL, frozen_BL)
    num_rows = len(given_BL)
    added = bucket(num_rows) - num_rows
    padded_BL = np.pad(frozen_BL, [(0, added), (0, 0)])
    given = np.where(padded_BL, np.pad(given_BL, [(0, added), (0, 0)]), 0)
    around = (jnp.asarray(given, jnp.int32), jnp.asarray(padded_BL))
    if model.causal:
        first_B = jnp.full((len(padded_BL),), process.eos_id, jnp.int32)
        _, sample_key = jax.random.split(jax.random.key(jnp.uint32(seed)))
        run = make_autoregressive_sampler(model, given_BL.shape[1], process.source.mask_id)
        how = (jnp.float32(sampling.temperature), *around, sampling.top_p)
        return np.asarray(run(params, sample_key, first_B, *how))[:num_rows]
    run = _jit_generator(model, process)
    return np.asarray(run(params, jnp.uint32(seed), *around, sampling))[:num_rows]


def stream(
    params: Params,
    model: ModelConfig,
    process: Process,
    sampling: Sampling,
    *,
    given_BL: np.ndarray,
    frozen_BL: np.ndarray,
    seed: int,
) -> Iterator[np.ndarray]:
    """As `generate`, step by step: yield the noise, then the tokens after each step.

    Arguments and errors as in `generate`; the last tokens are its result.

    Yields:
      int32 [B, L], S+1 times.

    Raises:
      ValueError: also for an autoregressive network.
    """
    check_seed(seed)
    check_given(model, process, given_BL, frozen_BL)
    if model.causal:
        raise ValueError(
            "Streaming needs a network that refines a block; an autoregressive network writes each "
            "token once."
        )
    held_BL = jnp.asarray(frozen_BL)
    x0_BL, key = jax.jit(draw_noise, static_argnums=0)(
        process, jnp.uint32(seed), jnp.asarray(given_BL, jnp.int32), held_BL
    )
    steps = sampler.make_steps(key, jnp.asarray(sampling.times()))
    step, x_BL = _jit_step(model, process), x0_BL
    yield np.asarray(x_BL)
    for index in range(sampling.steps):
        inputs = jax.tree.map(lambda leaf, index=index: leaf[index], steps)
        x_BL = step(params, x_BL, inputs, x0_BL, held_BL, sampling)
        yield np.asarray(x_BL)


def bucket(num_rows: int) -> int:
    """Round a batch size up to 1, 2, 3, 4, 6, 8, 12, 16 ..

    A few compiled programs then serve all batch sizes, and at most a third of a batch is discarded.
    A row's noise doesn't depend on the number of rows.
    """
    power = 1 << (num_rows - 1).bit_length()
    return power * 3 // 4 if power >= 4 and num_rows <= power * 3 // 4 else power


def batch_seed(seed: int, index: int) -> int:
    """Seed of a job's batch `index` = 0, 1, ..: the job's seed for the first, then derived from it.

    The first batch thus equals one call with `seed`. A job's tokens depend on its seed and batch
    size, not on interruptions.
    """
    if index == 0:
        return seed
    return int(jax.random.bits(jax.random.fold_in(jax.random.key(jnp.uint32(seed)), index)))


def portable(model: ModelConfig) -> ModelConfig:
    """Replace an attention kernel that this process's devices don't have.

    A model trained on one kind of device can thus be sampled on any.
    """
    if model.attention == "cudnn" and not attention.has_cudnn():
        return dataclasses.replace(model, attention="auto")
    return model


def check_seed(seed: int) -> None:
    """Raise ValueError unless the seed is an integer in [0, 2^32)."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in [0, 2^32), got {seed!r}.")


def check_given(
    model: ModelConfig, process: Process, given_BL: np.ndarray, frozen_BL: np.ndarray
) -> None:
    """Check that the network can be conditioned on the given tokens.

    Raises:
      ValueError: if the arrays don't have the same shape [B, L] with B, L >= 1, exceed the learned
        positions of the network, or have an id that isn't a text token; for a causal network, also
        if the frozen positions aren't a prefix of their row.
    """
    given_BL, frozen_BL = np.asarray(given_BL), np.asarray(frozen_BL)
    if given_BL.ndim != 2 or given_BL.shape != frozen_BL.shape or not given_BL.size:
        raise ValueError(
            "given_BL and frozen_BL must have the same shape [B, L] with at least one row and one "
            f"position, got {given_BL.shape} and {frozen_BL.shape}."
        )
    model.check_length(given_BL.shape[1])
    if frozen_BL.dtype != bool or not np.issubdtype(given_BL.dtype, np.integer):
        raise ValueError(
            f"given_BL must be integer and frozen_BL bool, got {given_BL.dtype} and "
            f"{frozen_BL.dtype}."
        )
    vocab_size, mask_id = process.source.vocab_size, process.source.mask_id
    held = given_BL[frozen_BL]
    wrong = held[(held < 0) | (held >= vocab_size) | (held == mask_id)]
    if wrong.size:
        masked = "" if mask_id is None else f" other than the mask token {mask_id}"
        raise ValueError(f"Given tokens must be in [0, {vocab_size}){masked}, got {wrong[0]}.")
    if model.causal and (frozen_BL[:, 1:] & ~frozen_BL[:, :-1]).any():
        raise ValueError(
            "An autoregressive network writes from left to right and can't see text after a gap: "
            "give it a prompt at the start of the text, or fill gaps with a few-step or base model."
        )
