"""Trained weights to samples: jitted samplers for any stage, compiled once per shape."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.flow import jumps, sampler
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sampler import OnStep
from fsdfm_jax.inference.neighbours import Neighbours
from fsdfm_jax.inference.ngrams import MAX_VOCAB, Table
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.model import ModelConfig, Params
from fsdfm_jax.ops import attention
from fsdfm_jax.ops import logits as logits_lib

# The keys of `eval` that say how a few-step model is sampled, for files that don't say it: as
# published (arXiv:2509.20624).
PUBLISHED = {
    "few_step_jump": jumps.CUMULATIVE.name,
    "grid": "uniform",
    "temperature": 1.0,
    "top_p": 1.0,
    "cooling": 0.0,
    "look_ahead": 0.0,
    "neighbours": 0.0,
}


def sampling(evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """How a few-step model is sampled unless one says otherwise.

    Args:
      evaluation: the section `eval` of its configuration, None where nothing is known of it.

    Returns:
      Values of the keys of `PUBLISHED`: what is said, or as published.
    """
    said = {key: value for key, value in (evaluation or {}).items() if value not in (None, "")}
    return {key: said.get(key, value) for key, value in PUBLISHED.items()}


@functools.lru_cache(maxsize=64)
def make_sampler(model: ModelConfig, process: Process, jump_rule: str) -> Callable[..., jax.Array]:
    """A jitted few-step sampler.

    Args:
      model, process: of the run; equal arguments return the same function, with what it has
        compiled.
      jump_rule: "cumulative" | "euler" | "mixture" | "dispersed".

    Returns:
      `(params, key, x0_BL, frozen_BL, grid_S1, temperature, top_p=None, num_steps=None, cooling=0,
      look_ahead=0, neighbours=None) -> x_BL`, everything in it data: only another shape (batch,
      length, number of steps) compiles again, or an argument that is None in one call and a number
      in another; neighbours are those of `make_neighbours`. With
      `num_steps` the grid is padded to any length that is enough, and one program serves all
      numbers of steps. The grid is not checked inside jit: use `sampler.check_grid`.
    """
    return jax.jit(_make_steps(model, process, jump_rule))


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
def make_observer(model: ModelConfig, process: Process, jump_rule: str) -> Callable[..., Any]:
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
        entropy_BL = logits_lib.map_positions(entropy, logits)
        return Observed(
            new_BL,
            jnp.sum(jnp.where(open_BL, entropy_BL, 0.0), axis=1) / count_B,  # 0 / 0 is NaN
            jnp.sum(open_BL & (new_BL != x_BL), axis=1) / jnp.maximum(count_B, 1),
        )

    return jax.jit(_make_steps(model, process, jump_rule, observe=observe))


def entropy(logits_BLV: jax.Array) -> jax.Array:
    """Entropy of softmax(logits), nats, float32 [B, L]; logits may hold -inf."""
    logp_BLV = jax.nn.log_softmax(logits_BLV.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.where(logp_BLV > -jnp.inf, jnp.exp(logp_BLV) * logp_BLV, 0.0), axis=-1)


def _make_steps(
    model: ModelConfig,
    process: Process,
    jump_rule: str,
    on_step: OnStep | None = None,
    observe: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """What `make_sampler` and `make_observer` jit: the S steps from given noise."""
    rule = jumps.get_rule(jump_rule)
    jump = process.make_jump(rule)
    finalize = jumps.make_finalize(process.source)

    def run(
        params: Params,
        key,
        x0_BL,
        frozen_BL,
        grid_S1,
        temperature,
        top_p=None,
        num_steps=None,
        cooling=0.0,
        look_ahead=0.0,
        neighbours=None,
    ):
        denoise = functools.partial(model_lib.predict, params, model)
        without_mask = top_p is not None or neighbours is not None
        if without_mask and process.source.mask_id is not None:
            # No step draws the mask: it may not fill the nucleus, nor what neighbours expect.
            denoise = _without(denoise, process.source.mask_id)
        options = {"temperature": temperature, "cooling": cooling, "top_p": top_p}
        options |= {"look_ahead": look_ahead, "num_steps": num_steps, "on_step": on_step}
        if neighbours is not None:
            options |= {"neighbours": neighbours, "redraw": process.make_redraw(rule)}
        arguments = (key, denoise, jump, finalize, x0_BL, grid_S1, frozen_BL)
        if observe is None:
            return sampler.sample(*arguments, **options)
        watch = functools.partial(observe, frozen_BL)
        return sampler.sample_trajectory(*arguments, observe=watch, **options)

    return run


def _without(denoise, token: int):
    return lambda *arguments: logits_lib.exclude(denoise(*arguments), token)


def draw_noise(process: Process, seed, given_BL, frozen_BL) -> tuple[jax.Array, jax.Array]:
    """What `make_generator` starts from: noise around the given tokens, and the key of the steps.

    Returns:
      (x0_BL int32, typed key).
    """
    noise_key, sample_key = jax.random.split(jax.random.key(seed))
    x0_BL = process.source.sample(noise_key, given_BL.shape)
    return jnp.where(frozen_BL, given_BL, x0_BL).astype(jnp.int32), sample_key


def make_generator(
    model: ModelConfig, process: Process, jump_rule: str, on_step: OnStep | None = None
) -> Callable[..., jax.Array]:
    """All of a few-step generation, noise included, as one pure function to jit or to export.

    Args:
      model, process: of the run.
      jump_rule: "cumulative" | "euler" | "mixture" | "dispersed".
      on_step: told the tokens after each step, see `sampler.sample`.

    Returns:
      `(params, seed, given_BL, frozen_BL, grid_S1, temperature, top_p=None, cooling=0,
      look_ahead=0, neighbours=None) -> x_BL`: seed is a uint32 scalar; frozen positions (bool)
      hold the tokens of given_BL (int32, of no meaning elsewhere); the rest as in `make_sampler`.
    """
    run = _make_steps(model, process, jump_rule, on_step)

    def generate_tokens(
        params: Params, seed, given_BL, frozen_BL, grid_S1, temperature, top_p=None, **how
    ):
        x0_BL, sample_key = draw_noise(process, seed, given_BL, frozen_BL)
        return run(params, sample_key, x0_BL, frozen_BL, grid_S1, temperature, top_p, **how)

    return generate_tokens


@functools.lru_cache(maxsize=64)
def jit_generator(
    model: ModelConfig, process: Process, jump_rule: str, on_step: OnStep | None
) -> Callable[..., jax.Array]:
    """`make_generator`, jitted; equal arguments return the same function, with what it compiled."""
    return jax.jit(make_generator(model, process, jump_rule, on_step))


@functools.lru_cache(maxsize=8)
def make_autoregressive_sampler(
    model: ModelConfig, length: int, mask_id: int | None = None, *, memory: str = "cache"
) -> Callable[..., jax.Array]:
    """A jitted left-to-right sampler.

    Args:
      model: causal network.
      length: L.
      mask_id: a token that is never drawn, that of a mask source's vocabulary.
      memory: "cache", keys and values of the tokens so far are kept, one token is computed at a
        time; or "none", the whole block is computed anew for each token, as a baseline of speed.

    Returns:
      `(params, key, first_B, temperature, given_BL=None, frozen_BL=None, top_p=None) -> int
      [B, length]`; `first_B` is the token before the text, the end-of-document token to start a
      block as the network was trained to; the others as in `sampler.sample_autoregressive`.

    Raises:
      ValueError: for another `memory`.
    """
    if memory not in MEMORIES:
        raise ValueError(f"Unknown memory={memory!r}; expected one of {', '.join(MEMORIES)}.")

    @jax.jit
    def run(params: Params, key, first_B, temperature, given_BL=None, frozen_BL=None, top_p=None):
        step, state = MEMORIES[memory](params, model, first_B.shape[0], length)

        def decode(token_B, position, state):
            logits_BV, state = step(token_B, position, state)
            if mask_id is not None:
                logits_BV = logits_BV.at[:, mask_id].set(-jnp.inf)
            return logits_BV, state

        return sampler.sample_autoregressive(
            key,
            decode,
            state,
            first_B,
            length,
            given_BL=given_BL,
            frozen_BL=frozen_BL,
            temperature=temperature,
            top_p=top_p,
        )

    return run


def _decode_with_cache(params, model, batch, length):
    return functools.partial(model_lib.decode_step, params, model), model_lib.empty_cache(
        model, batch, length
    )


def _decode_anew(params, model, batch, length):
    def decode(token_B, position, tokens_BL):
        tokens_BL = jax.lax.dynamic_update_slice(tokens_BL, token_B[:, None], (0, position))
        logits = model_lib.predict(params, model, tokens_BL)
        return logits_lib.dense(logits_lib.position(logits, position))[:, 0], tokens_BL

    return decode, jnp.zeros((batch, length), jnp.int32)


# (params, model, batch, length) -> the arguments `decode` and `cache` of
# `sampler.sample_autoregressive`, by what is kept of the tokens so far.
MEMORIES = {"cache": _decode_with_cache, "none": _decode_anew}


def generate(
    params: Params,
    model: ModelConfig,
    process: Process,
    *,
    given_BL: np.ndarray,
    frozen_BL: np.ndarray,
    steps: int,
    seed: int,
    jump_rule: str = "cumulative",
    grid: str = "uniform",
    temperature: float = 1.0,
    cooling: float = 0.0,
    top_p: float = 1.0,
    look_ahead: float = 0.0,
    neighbours: float = 0.0,
    table: Table | None = None,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Samples token ids from any network, around given tokens.

    The tokens are those of `make_generator` with `sampler.make_grid(grid, steps)`; an
    autoregressive network draws them left to right.

    Args:
      params, model: of any stage.
      process: the noising process it was trained on.
      given_BL: int [B, L], of no meaning where nothing is frozen.
      frozen_BL: bool [B, L], positions that hold the given token and never move.
      steps: S, network calls; an autoregressive network always takes L.
      seed: of everything random, in [0, 2^32); see `batch_seed` for more than one batch.
      jump_rule, grid: of the first S-1 steps, and of all; unused by an autoregressive network, as
        cooling and look_ahead are.
      temperature: divides the logits, > 0.
      top_p: share of the posterior's mass that is drawn from, in (0, 1].
      cooling, look_ahead: see `sampler.sample`.
      neighbours: strength by which tokens heed those beside them, see `neighbours.draw`.
      table: of the text, which this takes, see `ngrams.table`.
      on_step: called on the host with (index of the step, x_BL after it), in order, S times before
        this returns. The same function object shares one compiled program.

    Returns:
      int32 [B, L].

    Raises:
      ValueError: for values outside their range (`check_settings`), tokens that can't be given
        (`check_given`), an unknown jump rule, `on_step` with an autoregressive network, or
        neighbours that can't be heeded (`make_neighbours`).
    """
    check_settings(
        steps=steps,
        seed=seed,
        temperature=temperature,
        cooling=cooling,
        top_p=top_p,
        look_ahead=look_ahead,
        neighbours=neighbours,
    )
    check_given(model, process, given_BL, frozen_BL)
    num_rows = len(given_BL)
    # Who watches is shown the rows that were asked for, and no others.
    added = 0 if on_step is not None else bucket(num_rows) - num_rows
    frozen_BL = np.pad(frozen_BL, [(0, added), (0, 0)])
    given_BL = np.where(frozen_BL, np.pad(given_BL, [(0, added), (0, 0)]), 0)
    given_BL, frozen_BL = jnp.asarray(given_BL, jnp.int32), jnp.asarray(frozen_BL)
    seed, temperature = jnp.uint32(seed), jnp.float32(temperature)
    nucleus = None if top_p == 1 else jnp.float32(top_p)
    if model.causal:
        if on_step is not None:
            raise ValueError(
                "on_step watches a block being refined; an autoregressive network writes each "
                "token once, so there is nothing to watch."
            )
        first_B = jnp.full(given_BL.shape[:1], process.eos_id, jnp.int32)
        _, sample_key = jax.random.split(jax.random.key(seed))
        run = make_autoregressive_sampler(model, given_BL.shape[1], process.source.mask_id)
        tokens_BL = run(params, sample_key, first_B, temperature, given_BL, frozen_BL, nucleus)
        return np.asarray(tokens_BL)[:num_rows]
    grid_S1 = jnp.asarray(sampler.make_grid(grid, steps))
    run = jit_generator(model, process, jump_rule, on_step)
    how = {"cooling": jnp.float32(cooling), "look_ahead": jnp.float32(look_ahead)}
    how |= {"neighbours": make_neighbours(neighbours, table, jump_rule)}
    tokens_BL = np.asarray(
        run(params, seed, given_BL, frozen_BL, grid_S1, temperature, nucleus, **how)
    )
    if on_step is not None:
        jax.effects_barrier()  # the result may be there before the last call is
    return tokens_BL[:num_rows]


def make_neighbours(strength: float, table: Table | None, jump_rule: str) -> Neighbours | None:
    """What a sampler takes as `neighbours`; None for a strength of 0.

    Args:
      strength: at least 0.
      table: of `ngrams.table`; None where a model came without its text's.
      jump_rule: how the sampler jumps.

    Raises:
      ValueError: there is no table, or the rule can't heed it (`jumps.check_redraw`).
    """
    check_neighbours(strength, jump_rule, has_table=table is not None)
    if not strength:
        return None
    return Neighbours(table, jnp.float32(strength))


def check_neighbours(strength: float, jump_rule: str, *, has_table: bool) -> None:
    """The errors of `make_neighbours`, without a table at hand."""
    if not strength:
        return
    jumps.check_redraw(jumps.get_rule(jump_rule))
    if not has_table:
        raise ValueError(
            f"neighbours={strength:g} needs to know which tokens follow which, and the model came "
            "without its text's table: sample from the working directory that has its prepared "
            "text (data/), convert the model from there, or set neighbours to 0. Vocabularies "
            f"above {MAX_VOCAB} tokens have none."
        )


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


def check_settings(*, steps: int = 1, seed: int = 0, **options: float) -> None:
    """Refuses what no sample can be drawn with.

    Args:
      **options: of `sampler.check_options`.

    Raises:
      ValueError: steps < 1, a seed outside [0, 2^32), or an option outside its range.
    """
    sampler.uniform_grid(steps)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}.")
    sampler.check_options(**options)


def check_given(
    model: ModelConfig, process: Process, given_BL: np.ndarray, frozen_BL: np.ndarray
) -> None:
    """Refuses given tokens that the network can't be conditioned on.

    Raises:
      ValueError: for arrays that aren't [B, L] of one shape with B, L >= 1, an id that is no text
        token, or a causal network and frozen positions that are not the head of their row.
    """
    given_BL, frozen_BL = np.asarray(given_BL), np.asarray(frozen_BL)
    if given_BL.ndim != 2 or given_BL.shape != frozen_BL.shape or not given_BL.size:
        raise ValueError(
            "given_BL and frozen_BL must have one shape [B, L] with at least one row and one "
            f"position, got {given_BL.shape} and {frozen_BL.shape}."
        )
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
