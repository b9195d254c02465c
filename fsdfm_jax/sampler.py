"""The few-step sampler: S network calls, all of them in one `lax.scan`.

S-1 jumps along a grid 0 = t_0 < .. < t_S = 1, then one draw of every position from the posterior of
the last interval. At S=1 no jump happens at all. The grid is data: a sweep over grids of one length
compiles once.

Source: arXiv:2509.20624 App. B.1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax import draws
from fsdfm_jax import logits as logits_lib
from fsdfm_jax.jumps import Finalize, Jump
from fsdfm_jax.teacher import Denoise

OnStep = Callable[[np.ndarray, np.ndarray], None]
Condition = Callable[[jax.Array, jax.Array], Any]


def uniform_grid(steps: int) -> np.ndarray:
    """The times 0, 1/S .. 1, float32 [S+1].

    Raises:
      ValueError: if steps < 1.
    """
    if steps < 1:
        raise ValueError(f"A sampler needs at least 1 step, got steps={steps}.")
    return (np.arange(steps + 1) / steps).astype(np.float32)


def check_grid(grid_S1) -> np.ndarray:
    """A grid of cumulative times as float32 [S+1], checked on the host.

    Raises:
      ValueError: unless it is one-dimensional, holds at least two times, starts at 0, ends at 1 and
        increases.
    """
    grid = np.asarray(grid_S1, np.float32)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(
            "A time grid holds S+1 >= 2 cumulative times in one dimension, "
            f"got an array of shape {grid.shape}."
        )
    if grid[0] != 0 or grid[-1] != 1 or not np.all(np.diff(grid) > 0):
        raise ValueError(
            "A time grid must increase strictly from 0 to 1 (cumulative times, not step sizes), "
            f"got {np.array2string(grid, threshold=12)}."
        )
    return grid


def sample_trajectory(
    key: jax.Array,
    denoise: Denoise,
    jump: Jump,
    finalize: Finalize,
    x0_BL: jax.Array,
    grid_S1: jax.Array,
    frozen_BL: jax.Array | None = None,
    *,
    temperature: jax.Array | float = 1.0,
    condition: Condition | None = None,
    on_step: OnStep | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `sample`; also returns the tokens after each step, int [S, B, L]."""
    if not isinstance(grid_S1, jax.core.Tracer):
        grid_S1 = check_grid(grid_S1)
    grid_S1 = jnp.asarray(grid_S1, jnp.float32)
    times_S, widths_S = grid_S1[:-1], grid_S1[1:] - grid_S1[:-1]
    steps, batch = len(times_S), x0_BL.shape[0]
    index_S = jnp.arange(steps)

    # What depends on the time alone doesn't wait for the tokens.
    ahead_S = None if condition is None else condition(times_S, widths_S)

    def step(x_BL, inputs):
        step_key, t, h, index, ahead = inputs
        is_last = index == steps - 1
        t_B, h_B = jnp.full((batch,), t), jnp.full((batch,), h)
        logits = denoise(x_BL, t_B, h_B) if condition is None else denoise(x_BL, ahead)
        logits = logits_lib.divide(logits, temperature)
        new_BL = jax.lax.cond(
            is_last,
            lambda: finalize(step_key, logits, x_BL),
            lambda: jump(step_key, logits, x_BL, t_B, h_B),
        )
        if frozen_BL is not None:
            new_BL = jnp.where(frozen_BL, x0_BL, new_BL)
        if on_step is not None:
            jax.debug.callback(on_step, index, new_BL, ordered=True)
        return new_BL, new_BL

    keys_S = jax.random.split(key, steps)
    return jax.lax.scan(step, x0_BL, (keys_S, times_S, widths_S, index_S, ahead_S))


def sample(
    key: jax.Array,
    denoise: Denoise,
    jump: Jump,
    finalize: Finalize,
    x0_BL: jax.Array,
    grid_S1: jax.Array,
    frozen_BL: jax.Array | None = None,
    *,
    temperature: jax.Array | float = 1.0,
    condition: Condition | None = None,
    on_step: OnStep | None = None,
) -> jax.Array:
    """Draws samples in S steps.

    Args:
      key: typed PRNG key.
      denoise: (x_BL, t_B, h_B) -> logits [B, L, V], as an array or factored; called S times, with
        the width h of each step. With `condition`, (x_BL, what it gave for the step) -> logits.
      jump: (key, logits, x, t, h) -> x for the first S-1 steps, see `jumps.make_jump`.
      finalize: (key, logits, x) -> x for the last one, see `jumps.make_finalize`.
      x0_BL: noise from the source, int [B, L]; frozen positions hold the given tokens.
      grid_S1: S+1 cumulative times from 0 to 1; a traced array is taken as checked.
      frozen_BL: bool [B, L], positions that never move, whatever their value; None freezes nothing.
      temperature: divides the logits, > 0; data, so that changing it doesn't recompile.
      condition: (t_S, h_S) -> a tree of arrays with leading axis S, all that the network computes
        from times and widths alone; done for all steps at once, before the first.
      on_step: called on the host with (index of the step, x_BL after it) as each step ends, also
        from within jit; for watching, it can't change anything.

    Returns:
      int [B, L].

    Raises:
      ValueError: if a concrete grid doesn't increase from 0 to 1.
    """
    tokens_BL, _ = sample_trajectory(
        key,
        denoise,
        jump,
        finalize,
        x0_BL,
        grid_S1,
        frozen_BL,
        temperature=temperature,
        condition=condition,
        on_step=on_step,
    )
    return tokens_BL


def sample_autoregressive(
    key: jax.Array,
    decode,
    cache,
    first_B: jax.Array,
    length: int,
    *,
    given_BL: jax.Array | None = None,
    frozen_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
) -> jax.Array:
    """The baseline: one token after the other, `length` network calls on a key-value cache.

    Args:
      key: typed PRNG key.
      decode: (token_B, position, cache) -> (logits_BV, cache).
      cache: the empty cache.
      first_B: int [B], the token that stands before the first one; not part of the result.
      length: L, tokens of the result.
      given_BL, frozen_BL: int and bool [B, length]; frozen positions hold the given token instead
        of a draw, and the network reads it from there on. What comes before a given token is drawn
        without knowing it: only frozen heads are conditional samples. None forces nothing.
      temperature: divides the logits, > 0.

    Returns:
      int [B, length].
    """
    if frozen_BL is None:
        given_BL = jnp.zeros((first_B.shape[0], length), first_B.dtype)
        frozen_BL = jnp.zeros(given_BL.shape, bool)

    def step(carry, inputs):
        token_B, cache = carry
        step_key, position, given_B, frozen_B = inputs
        logits_BV, cache = decode(token_B, position, cache)
        drawn_B = draws.categorical(step_key, logits_BV / temperature).astype(token_B.dtype)
        token_B = jnp.where(frozen_B, given_B.astype(token_B.dtype), drawn_B)
        return (token_B, cache), token_B

    inputs = (jax.random.split(key, length), jnp.arange(length), given_BL.T, frozen_BL.T)
    _, tokens_LB = jax.lax.scan(step, (first_B, cache), inputs)
    return tokens_LB.T
