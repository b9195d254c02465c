"""Trained weights to samples: jitted samplers for any stage, compiled once per shape."""

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
    params: Params, model: ModelConfig, process: Process, sampling: Sampling
) -> tuple[Denoise, Jump, Finalize]:
    """(denoise, jump, finalize) of a network, as `flow.sampler.sample` takes them."""
    denoise = functools.partial(model_lib.predict, params, model)
    wrapped = sampling.wrap(denoise, mask_id=process.source.mask_id)
    return wrapped, process.make_jump(sampling.rule), process.finalize


@functools.lru_cache(maxsize=64)
def make_sampler(model: ModelConfig, process: Process) -> Callable[..., jax.Array]:
    """A jitted few-step sampler.

    Args:
      model, process: of the run; equal arguments return the same function, with what it has
        compiled.

    Returns:
      `(params, key, x0_BL, frozen_BL, sampling) -> x_BL`. The numbers of a `Sampling` are data:
      only another shape, number of steps, jump rule or grid compiles again.
    """

    def run(params: Params, key, x0_BL, frozen_BL, sampling: Sampling):
        parts = sampler_parts(params, model, process, sampling)
        return sampler.sample(key, *parts, x0_BL, sampling.times(), frozen_BL)

    return jax.jit(run)


class Observed(NamedTuple):
    """What happened at each step of a sampler.

    Attributes:
      tokens_SBL: int, the tokens after the step.
      entropy_SB: float32, nats: entropy of the distribution that the step draws a token from
        (temperature and nucleus included, a mask token excluded), mean over the positions that
        aren't frozen; of those still masked only where revealed tokens stay. NaN where there are
        none.
      changed_SB: float32 in [0, 1], share of those positions that moved.
    """

    tokens_SBL: jax.Array
    entropy_SB: jax.Array
    changed_SB: jax.Array


@functools.lru_cache(maxsize=64)
def make_observer(model: ModelConfig, process: Process) -> Callable[..., Any]:
    """A jitted sampler that is watched: as `make_sampler`, but it returns (x_BL, `Observed`).

    It multiplies by the vocabulary twice in each step, so it is no measure of speed.
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
        parts = sampler_parts(params, model, process, sampling)
        watch, times = functools.partial(observe, frozen_BL), sampling.times()
        return sampler.sample_trajectory(key, *parts, x0_BL, times, frozen_BL, observe=watch)

    return jax.jit(run)


def draw_noise(process: Process, seed, given_BL, frozen_BL) -> tuple[jax.Array, jax.Array]:
    """Noise around given tokens, and the key of the steps.

    Args:
      process: whose source is drawn from.
      seed: uint32 scalar, of everything random.
      given_BL: int [B, L], of no meaning where nothing is frozen.
      frozen_BL: bool [B, L].

    Returns:
      (x0_BL int32, typed key).
    """
    noise_key, sample_key = jax.random.split(jax.random.key(seed))
    x0_BL = process.source.sample(noise_key, given_BL.shape)
    return jnp.where(frozen_BL, given_BL, x0_BL).astype(jnp.int32), sample_key


def make_generator(model: ModelConfig, process: Process) -> Callable[..., jax.Array]:
    """All of few-step generation, noise included, as one pure function to jit or to export.

    Returns:
      `(params, seed, given_BL, frozen_BL, sampling) -> x_BL`; arguments as in `draw_noise` and
      `make_sampler`.
    """

    def run(params: Params, seed, given_BL, frozen_BL, sampling: Sampling):
        x0_BL, key = draw_noise(process, seed, given_BL, frozen_BL)
        parts = sampler_parts(params, model, process, sampling)
        return sampler.sample(key, *parts, x0_BL, sampling.times(), frozen_BL)

    return run


@functools.lru_cache(maxsize=64)
def _jit_generator(model: ModelConfig, process: Process) -> Callable[..., jax.Array]:
    return jax.jit(make_generator(model, process))


@functools.lru_cache(maxsize=64)
def _jit_step(model: ModelConfig, process: Process) -> Callable[..., jax.Array]:
    def step(params, x_BL, inputs, x0_BL, frozen_BL, sampling: Sampling):
        parts = sampler_parts(params, model, process, sampling)
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
    """Samples token ids from any network, around given tokens.

    Args:
      params, model: of any stage; an autoregressive network draws left to right.
      process: the noising process it was trained on.
      sampling: how; an autoregressive network reads temperature and top_p alone.
      given_BL: int [B, L], of no meaning where nothing is frozen.
      frozen_BL: bool [B, L], positions that hold the given token and never move.
      seed: of everything random, in [0, 2^32); see `batch_seed` for more than one batch.

    Returns:
      int32 [B, L].

    Raises:
      ValueError: for a seed outside its range, or tokens that can't be given (`check_given`).
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
    """`generate` step by step: the noise, then the tokens after each step, the last ones its own.

    Arguments and errors as in `generate`.

    Yields:
      int32 [B, L], S+1 times.

    Raises:
      ValueError: also for an autoregressive network, which writes each token once.
    """
    check_seed(seed)
    check_given(model, process, given_BL, frozen_BL)
    if model.causal:
        raise ValueError(
            "Only a block that is refined can be streamed; an autoregressive network writes each "
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
    """The batch size that `generate` computes for so many rows: 1, 2, 3, 4, 6, 8, 12, 16 ..

    So that a handful of programs serve all batches, at most a third of each thrown away. The noise
    of a row doesn't depend on how many stand below it.
    """
    power = 1 << (num_rows - 1).bit_length()
    return power * 3 // 4 if power >= 4 and num_rows <= power * 3 // 4 else power


def batch_seed(seed: int, index: int) -> int:
    """Seed of a job's batch `index` = 0, 1, ..: the job's own for the first, then derived from it.

    So the first batch is what one call with `seed` gives, and a job's tokens depend on its seed and
    its batch size, not on where it was interrupted.
    """
    if index == 0:
        return seed
    return int(jax.random.bits(jax.random.fold_in(jax.random.key(jnp.uint32(seed)), index)))


def portable(model: ModelConfig) -> ModelConfig:
    """The same network without a kernel that this process's devices lack.

    So that a model trained on one kind of device can be sampled on any.
    """
    if model.attention == "cudnn" and not attention.has_cudnn():
        return dataclasses.replace(model, attention="auto")
    return model


def check_seed(seed: int) -> None:
    """ValueError unless a seed is a whole number in [0, 2^32)."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number in [0, 2^32), got {seed!r}.")


def check_given(
    model: ModelConfig, process: Process, given_BL: np.ndarray, frozen_BL: np.ndarray
) -> None:
    """Refuse given tokens that the network can't be conditioned on.

    Raises:
      ValueError: for arrays that aren't [B, L] of one shape with B, L >= 1, more positions than the
        network has, an id that is no text token, or a causal network and frozen positions that are
        not the head of their row.
    """
    given_BL, frozen_BL = np.asarray(given_BL), np.asarray(frozen_BL)
    if given_BL.ndim != 2 or given_BL.shape != frozen_BL.shape or not given_BL.size:
        raise ValueError(
            "given_BL and frozen_BL must have one shape [B, L] with at least one row and one "
            f"position, got {given_BL.shape} and {frozen_BL.shape}."
        )
    model.check_length(given_BL.shape[1])
    if frozen_BL.dtype != bool or not np.issubdtype(given_BL.dtype, np.integer):
        raise ValueError(
            f"given_BL must hold integers and frozen_BL bools, got {given_BL.dtype} and "
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
            "An autoregressive network writes from left to right and can't see text that stands "
            "after a gap: give it a prompt that the text begins with, or fill gaps with a "
            "few-step or base model."
        )
