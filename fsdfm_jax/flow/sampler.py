"""The few-step sampler: S network calls, all of them in one `lax.scan`.

S-1 jumps along a grid 0 = t_0 < .. < t_S = 1, then one draw of every position from the posterior of
the last interval. At S=1 no jump happens at all. The grid is data: a sweep over grids of one length
compiles once. So is the number of steps where it is given as such, see `num_steps` and `pad_grid`.

Source: arXiv:2509.20624 App. B.1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.flow.jumps import Finalize, Jump, Redraw
from fsdfm_jax.flow.teacher import Denoise
from fsdfm_jax.inference import neighbours as neighbours_lib
from fsdfm_jax.inference.neighbours import Neighbours
from fsdfm_jax.ops import categorical
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.ops.logits import Logits

OnStep = Callable[[np.ndarray, np.ndarray], None]
Condition = Callable[[jax.Array, jax.Array], Any]
Observe = Callable[[Logits, jax.Array, jax.Array], Any]


def uniform_grid(steps: int) -> np.ndarray:
    """The times 0, 1/S .. 1, float32 [S+1].

    Raises:
      ValueError: if steps < 1.
    """
    if steps < 1:
        raise ValueError(f"A sampler needs at least 1 step, got steps={steps}.")
    return (np.arange(steps + 1) / steps).astype(np.float32)


def make_grid(shape: str, steps: int) -> np.ndarray:
    """A grid by name, float32 [S+1].

    Args:
      shape: "uniform", k/S; "cosine", 1 - cos(pi k / 2S), whose first steps are the smallest; or
        "power:R" with R > 0, (k/S)^R, whose first steps are the smallest for R > 1 and the largest
        for R < 1.
      steps: S.

    Raises:
      ValueError: for another shape, or one whose times float32 can't tell apart.
    """
    shares = uniform_grid(steps).astype(np.float64)
    name, _, number = shape.partition(":")
    if shape == "uniform":
        return uniform_grid(steps)
    if shape == "cosine":
        return check_grid([*(1.0 - np.cos(0.5 * np.pi * shares[:-1])), 1.0])
    try:
        power = float(number) if name == "power" else 0.0
    except ValueError:
        power = 0.0
    if not 0 < power < np.inf:
        raise ValueError(
            f"Unknown grid {shape!r}; expected 'uniform', 'cosine' or 'power:R' with R > 0."
        )
    return check_grid(shares**power)


def pad_grid(grid_S1, size: int) -> np.ndarray:
    """A grid filled up with ones to `size` steps, for `num_steps`; float32 [size + 1].

    Raises:
      ValueError: if the grid has more steps than that.
    """
    missing = size + 1 - len(grid_S1)
    if missing < 0:
        raise ValueError(f"A grid of {len(grid_S1) - 1} steps doesn't fit into {size}.")
    return np.pad(np.asarray(grid_S1, np.float32), (0, missing), constant_values=1.0)


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


def check_options(
    *,
    temperature: float = 1.0,
    cooling: float = 0.0,
    top_p: float = 1.0,
    look_ahead: float = 0.0,
    neighbours: float = 0.0,
) -> None:
    """Refuses options of `sample` that nothing can be drawn with, on the host.

    Raises:
      ValueError: a temperature that isn't above 0 and finite, a cooling outside [0, 1), a top_p
        outside (0, 1], a look_ahead outside [0, 1], or neighbours (their strength) below 0.
    """
    # As they are computed with: what float32 rounds to 0 would divide by it.
    with np.errstate(over="ignore"):
        rounded = map(np.float32, (temperature, cooling, top_p, look_ahead, neighbours))
        temperature, cooling, top_p, look_ahead, neighbours = rounded
    if not np.finfo(np.float32).tiny <= temperature < np.inf:
        raise ValueError(f"temperature must be greater than 0 and finite, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}.")
    if not 0 <= cooling < 1:
        raise ValueError(f"cooling must lie in [0, 1), got {cooling}.")
    if not 0 <= look_ahead <= 1:
        raise ValueError(f"look_ahead must lie in [0, 1], got {look_ahead}.")
    if not 0 <= neighbours < np.inf:
        raise ValueError(f"neighbours must be at least 0 and finite, got {neighbours}.")


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
    cooling: jax.Array | float = 0.0,
    top_p: jax.Array | float | None = None,
    look_ahead: jax.Array | float = 0.0,
    neighbours: Neighbours | None = None,
    redraw: Redraw | None = None,
    condition: Condition | None = None,
    on_step: OnStep | None = None,
    num_steps: jax.Array | int | None = None,
    observe: Observe = lambda logits, x_BL, new_BL: new_BL,
) -> tuple[jax.Array, Any]:
    """As `sample`; also returns what was observed of each step.

    Args:
      observe: (logits, x_BL, new_BL) -> a tree of arrays, from the logits that a step drew from
        and the tokens before and after it. By default the tokens after it.

    Returns:
      (int [B, L], the tree with a leading axis of S; rows from `num_steps` on are zeros).
    """
    if not isinstance(grid_S1, jax.core.Tracer) and num_steps is None:
        grid_S1 = check_grid(grid_S1)
    grid_S1 = jnp.asarray(grid_S1, jnp.float32)
    times_S, widths_S = grid_S1[:-1], grid_S1[1:] - grid_S1[:-1]
    batch, size = x0_BL.shape[0], len(times_S)
    asked_S = times_S + look_ahead * widths_S
    temperature_S = temperature * (1.0 - cooling * times_S)
    last = (size if num_steps is None else num_steps) - 1

    # What depends on the time alone doesn't wait for the tokens, unless it isn't known how many
    # times there are: then it would be computed for times that never come.
    ahead_S = None if condition is None or num_steps is not None else condition(asked_S, widths_S)

    def step(x_BL, inputs):
        step_key, t, h, asked, step_temperature, index, ahead = inputs
        t_B, h_B = jnp.full((batch,), t), jnp.full((batch,), h)
        if condition is None:
            logits = denoise(x_BL, jnp.full((batch,), asked), h_B)
        else:
            if num_steps is not None:
                ahead = jax.tree.map(lambda leaf: leaf[0], condition(asked[None], h[None]))
            logits = denoise(x_BL, ahead)
        logits = logits_lib.divide(logits, step_temperature)
        if top_p is not None:
            logits = logits_lib.nucleus(logits, top_p)
        if neighbours is None:
            new_BL = jax.lax.cond(
                index == last,
                lambda: finalize(step_key, logits, x_BL),
                lambda: jump(step_key, logits, x_BL, t_B, h_B),
            )
        else:
            place_key, token_key = jax.random.split(step_key)
            drawn_BL = redraw(place_key, x_BL, t_B, h_B, index == last)
            given_BL = jnp.zeros_like(drawn_BL) if frozen_BL is None else frozen_BL
            new_BL = neighbours_lib.draw(
                *(token_key, logits, x_BL, drawn_BL & ~given_BL, given_BL, neighbours),
                temperature=step_temperature,
            )
        if frozen_BL is not None:
            new_BL = jnp.where(frozen_BL, x0_BL, new_BL)
        if on_step is not None:
            jax.debug.callback(on_step, index, new_BL, ordered=True)
        return new_BL, observe(logits, x_BL, new_BL)

    # The first of many keys are the keys of few: padding a grid changes no noise.
    keys_S = jax.random.split(key, size)
    inputs_S = (times_S, widths_S, asked_S, temperature_S, jnp.arange(size), ahead_S)
    if num_steps is None:
        return jax.lax.scan(step, x0_BL, (keys_S, *inputs_S))
    # JAX's check that no key is used twice doesn't see that a loop takes another one each time.
    bits_S, kind = jax.random.key_data(keys_S), jax.random.key_impl(keys_S)

    def step_of_bits(x_BL, inputs):
        bits, *others = inputs
        return step(x_BL, (jax.random.wrap_key_data(bits, impl=kind), *others))

    return _scan_first(step_of_bits, x0_BL, (bits_S, *inputs_S), num_steps)


def _scan_first(step, carry, inputs_S, count):
    """`jax.lax.scan` over the first `count` inputs, a number that is data."""
    take = lambda index: jax.tree.map(lambda leaf: leaf[index], inputs_S)
    size = len(inputs_S[0])
    _, shapes = jax.eval_shape(step, carry, take(0))
    outputs_S = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), shapes)

    def body(index, state):
        carry, outputs_S = state
        carry, output = step(carry, take(index))
        put = lambda leaf_S, leaf: jax.lax.dynamic_update_index_in_dim(leaf_S, leaf, index, 0)
        return carry, jax.tree.map(put, outputs_S, output)

    return jax.lax.fori_loop(0, count, body, (carry, outputs_S))


def sample(
    key: jax.Array,
    denoise: Denoise,
    jump: Jump,
    finalize: Finalize,
    x0_BL: jax.Array,
    grid_S1: jax.Array,
    frozen_BL: jax.Array | None = None,
    **options: Any,
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
      **options: keyword arguments of `sample_trajectory`:
        temperature: divides the logits, > 0; data, so that changing it doesn't recompile.
        cooling: c in [0, 1), data as well: the temperature falls with the time t at which a step
          begins, to temperature (1 - c t). Early draws choose what the text is about, late ones
          have to agree with what is there.
        look_ahead: a in [0, 1], data as well: a step from t to t+h asks the network at the time
          t + a h in place of t, as a midpoint rule does.
        top_p: share of the posterior's mass that is kept, see `logits.nucleus`; data as well; None
          keeps all of it and costs nothing.
        neighbours, redraw: table and strength by which the tokens that a step draws heed each
          other and given ones, see `neighbours.draw`, and the positions that it draws, see
          `jumps.make_redraw`; they stand in for jump and finalize. None lets each position be drawn
          by itself.
        condition: (t_S, h_S) -> a tree of arrays with leading axis S, all that the network computes
          from times and widths alone; done for all steps at once, before the first.
        on_step: called on the host with (index of the step, x_BL after it) as each step ends, also
          from within jit; for watching, it can't change anything.
        num_steps: S as data, int scalar: one program for any number of steps up to the length of
          the grid, which is padded by `pad_grid`; the tokens are those of the unpadded grid up to
          rounding. None takes all of the grid.

    Returns:
      int [B, L].

    Raises:
      ValueError: if a concrete grid doesn't increase from 0 to 1.
    """
    nothing = lambda logits, x_BL, new_BL: ()
    tokens_BL, _ = sample_trajectory(
        key, denoise, jump, finalize, x0_BL, grid_S1, frozen_BL, observe=nothing, **options
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
    top_p: jax.Array | float | None = None,
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
      top_p: share of the mass that is kept, see `logits.nucleus`; None keeps all of it.

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
        logits_BV = logits_BV / temperature
        if top_p is not None:
            logits_BV = logits_lib.nucleus(logits_BV, top_p)
        drawn_B = categorical.draw(step_key, logits_BV).astype(token_B.dtype)
        token_B = jnp.where(frozen_B, given_B.astype(token_B.dtype), drawn_B)
        return (token_B, cache), token_B

    inputs = (jax.random.split(key, length), jnp.arange(length), given_BL.T, frozen_BL.T)
    _, tokens_LB = jax.lax.scan(step, (first_B, cache), inputs)
    return tokens_LB.T
