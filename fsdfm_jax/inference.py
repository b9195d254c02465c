"""Trained weights to samples: jitted samplers for any stage, compiled once per shape."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax import jumps, models, sampler, workdir
from fsdfm_jax.models import ModelConfig, Params
from fsdfm_jax.sampler import OnStep
from fsdfm_jax.stages import Process


@functools.lru_cache(maxsize=64)
def make_sampler(model: ModelConfig, process: Process, jump_rule: str) -> Callable[..., jax.Array]:
    """A jitted few-step sampler.

    Args:
      model, process: of the run; equal arguments return the same function, with what it has
        compiled.
      jump_rule: "cumulative" | "euler" | "mixture".

    Returns:
      `(params, key, x0_BL, frozen_BL, grid_S1, temperature) -> x_BL`, everything in it data: only
      another shape (batch, length, number of steps) compiles again. The grid is not checked inside
      jit: use `sampler.check_grid`. With a mask source, revealed tokens stay.
    """
    jump = process.make_jump(jumps.get_rule(jump_rule))
    finalize = jumps.make_finalize(process.source)

    @jax.jit
    def run(params: Params, key, x0_BL, frozen_BL, grid_S1, temperature):
        denoise = lambda x, t, h: models.apply(params, model, x, t, h)
        return sampler.sample(
            key, denoise, jump, finalize, x0_BL, grid_S1, frozen_BL, temperature=temperature
        )

    return run


def make_generator(
    model: ModelConfig, process: Process, jump_rule: str, on_step: OnStep | None = None
) -> Callable[..., jax.Array]:
    """All of a few-step generation, noise included, as one pure function to jit or to export.

    Args:
      model, process: of the run.
      jump_rule: "cumulative" | "euler" | "mixture".
      on_step: told the tokens after each step, see `sampler.sample`.

    Returns:
      `(params, seed, given_BL, frozen_BL, grid_S1, temperature) -> x_BL`: seed is a uint32 scalar;
      frozen positions (bool) hold the tokens of given_BL (int32, of no meaning elsewhere); the rest
      as in `make_sampler`.
    """
    jump = process.make_jump(jumps.get_rule(jump_rule))
    finalize = jumps.make_finalize(process.source)

    def generate_tokens(params: Params, seed, given_BL, frozen_BL, grid_S1, temperature):
        noise_key, sample_key = jax.random.split(jax.random.key(seed))
        x0_BL = process.source.sample(noise_key, given_BL.shape)
        x0_BL = jnp.where(frozen_BL, given_BL, x0_BL).astype(jnp.int32)
        denoise = lambda x, t, h: models.apply(params, model, x, t, h)
        return sampler.sample(
            sample_key,
            denoise,
            jump,
            finalize,
            x0_BL,
            grid_S1,
            frozen_BL,
            temperature=temperature,
            on_step=on_step,
        )

    return generate_tokens


@functools.lru_cache(maxsize=8)
def make_autoregressive_sampler(model: ModelConfig, length: int) -> Callable[..., jax.Array]:
    """A jitted left-to-right sampler with key-value cache.

    Returns:
      `(params, key, first_B, temperature) -> int [B, length]`; `first_B` is the token before the
      text, the end-of-document token to start a block as the network was trained to.
    """

    @jax.jit
    def run(params: Params, key, first_B, temperature):
        decode = functools.partial(models.decode_step, params, model)
        cache = models.empty_cache(model, first_B.shape[0], length)
        return sampler.sample_autoregressive(
            key, decode, cache, first_B, length, temperature=temperature
        )

    return run


def generate(
    weights: workdir.Weights,
    process: Process,
    *,
    num_samples: int,
    length: int,
    steps: int,
    seed: int,
    jump_rule: str = "cumulative",
    temperature: float = 1.0,
    prompt: tuple[int, ...] = (),
) -> np.ndarray:
    """Samples token ids from any stage.

    Args:
      weights: from `workdir.load_weights`.
      process: from `stages.make_process`.
      num_samples, length: B and L.
      steps: S, network calls; an autoregressive network always takes L.
      seed: of everything random.
      jump_rule: of the first S-1 steps.
      temperature: divides the logits, > 0.
      prompt: token ids that every sample begins with; they never change.

    Returns:
      int32 [B, L].

    Raises:
      ValueError: for values outside their range, or a prompt for an autoregressive network.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}.")
    if len(prompt) >= length:
        raise ValueError(
            f"The prompt has {len(prompt)} tokens and leaves nothing to write in {length}."
        )
    noise_key, sample_key = jax.random.split(jax.random.key(seed))
    temperature = jnp.float32(temperature)
    if weights.model.causal:
        if prompt:
            raise ValueError("A prompt works with the few-step and base stages only.")
        first_B = jnp.full((num_samples,), process.eos_id, jnp.int32)
        run = make_autoregressive_sampler(weights.model, length)
        return np.asarray(run(weights.params, sample_key, first_B, temperature))
    grid_S1 = sampler.uniform_grid(steps)
    x0_BL = process.source.sample(noise_key, (num_samples, length))
    x0_BL = x0_BL.at[:, : len(prompt)].set(jnp.asarray(prompt, jnp.int32)[None])
    frozen_BL = jnp.broadcast_to(jnp.arange(length) < len(prompt), (num_samples, length))
    run = make_sampler(weights.model, process, jump_rule)
    tokens = run(weights.params, sample_key, x0_BL, frozen_BL, jnp.asarray(grid_S1), temperature)
    return np.asarray(tokens)
