"""The few-step sampler: S network calls in one `lax.scan`.

S-1 jumps along a grid 0 = t_0 < .. < t_S = 1, then one draw of every position from the posterior of
the last interval. With S=1 there is no jump. The grid is data: another grid of the same length does
not recompile.

`sample` takes the network, the jump and the last draw as functions. Temperature, annealing, nucleus
and midpoint evaluation are wrappers around the network, see `sampling`.

Source: arXiv:2509.20624 App. B.1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.flow.grids import check_grid
from fsdfm_jax.flow.jumps import Finalize, Jump
from fsdfm_jax.flow.teacher import Denoise
from fsdfm_jax.ops.logits import Logits

# (logits [B, L, V], tokens before, tokens after) -> any tree of arrays.
Observe = Callable[[Logits, jax.Array, jax.Array], Any]
StepFn = Callable[[jax.Array, "Step"], tuple[jax.Array, Any]]


class Step(NamedTuple):
    """The inputs of one step, or of all steps stacked along a leading axis S.

    Attributes:
      key: typed PRNG key.
      t, h: start time and width, float32.
      is_last: whether this is the last step, which draws from the full posterior.
    """

    key: jax.Array
    t: jax.Array
    h: jax.Array
    is_last: jax.Array


def make_steps(key: jax.Array, grid_S1: jax.Array) -> Step:
    """Stack the S steps of a grid of S+1 times."""
    size = len(grid_S1) - 1
    is_last_S = jnp.arange(size) == size - 1
    return Step(jax.random.split(key, size), grid_S1[:-1], grid_S1[1:] - grid_S1[:-1], is_last_S)


def make_step_fn(
    denoise: Denoise,
    jump: Jump,
    finalize: Finalize,
    x0_BL: jax.Array,
    frozen_BL: jax.Array | None = None,
    *,
    observe: Observe = lambda logits, x_BL, new_BL: (),
) -> StepFn:
    """Make one step of the sampler; arguments as in `sample` and `sample_trajectory`.

    Returns:
      `step(x_BL, Step) -> (x_BL, observed)`, the body of the scan. Streaming calls it from a Python
      loop.
    """

    def step(x_BL, inputs: Step):
        t_B, h_B = (jnp.full(x_BL.shape[:1], value) for value in (inputs.t, inputs.h))
        logits = denoise(x_BL, t_B, h_B)
        new_BL = jax.lax.cond(
            inputs.is_last,
            lambda: finalize(inputs.key, logits, x_BL),
            lambda: jump(inputs.key, logits, x_BL, t_B, h_B),
        )
        if frozen_BL is not None:
            new_BL = jnp.where(frozen_BL, x0_BL, new_BL)
        return new_BL, observe(logits, x_BL, new_BL)

    return step


def sample(
    key: jax.Array,
    denoise: Denoise,
    jump: Jump,
    finalize: Finalize,
    x0_BL: jax.Array,
    grid_S1: jax.Array | np.ndarray,
    frozen_BL: jax.Array | None = None,
) -> jax.Array:
    """Draw samples in S steps.

    >>> import fsdfm_jax as fs, jax, jax.numpy as jnp
    >>> process = fs.Process(fs.Polynomial(), fs.Source(vocab_size=5))
    >>> knows = lambda x_BL, t_B, h_B: 50.0 * jax.nn.one_hot(jnp.full_like(x_BL, 3), 5)
    >>> noise_key, key = jax.random.split(jax.random.key(0))
    >>> x0_BL = process.source.sample(noise_key, (1, 4))
    >>> jump, grid = process.make_jump(fs.CUMULATIVE), fs.uniform_grid(2)
    >>> fs.sample(key, knows, jump, process.finalize, x0_BL, grid).tolist()
    [[3, 3, 3, 3]]

    Args:
      key: typed PRNG key.
      denoise: (x_BL, t_B, h_B) -> logits [B, L, V] of the posterior over x1, as an array or
        factored (see `ops.logits`). Called S times, with the width h of each step.
      jump: (key, logits, x, t, h) -> x for the first S-1 steps, see `jumps.make_jump`.
      finalize: (key, logits, x) -> x for the last step, see `jumps.make_finalize`.
      x0_BL: noise from the source, int [B, L], with the given tokens at frozen positions.
      grid_S1: S+1 cumulative times from 0 to 1; a traced array is not checked.
      frozen_BL: bool [B, L], positions that never change; None freezes nothing.

    Returns:
      int [B, L].

    Raises:
      ValueError: if a concrete grid doesn't increase from 0 to 1.
    """
    return sample_trajectory(key, denoise, jump, finalize, x0_BL, grid_S1, frozen_BL)[0]


def sample_trajectory(
    key: jax.Array,
    denoise: Denoise,
    jump: Jump,
    finalize: Finalize,
    x0_BL: jax.Array,
    grid_S1: jax.Array | np.ndarray,
    frozen_BL: jax.Array | None = None,
    *,
    observe: Observe = lambda logits, x_BL, new_BL: (),
) -> tuple[jax.Array, Any]:
    """As `sample`, and also return the output of `observe` for each step.

    >>> import fsdfm_jax as fs, jax, jax.numpy as jnp
    >>> process = fs.Process(fs.Polynomial(), fs.Source(vocab_size=5))
    >>> knows = lambda x_BL, t_B, h_B: 50.0 * jax.nn.one_hot(jnp.full_like(x_BL, 3), 5)
    >>> jump, x0_BL = process.make_jump(fs.CUMULATIVE), jnp.zeros((1, 4), int)
    >>> arguments = (jax.random.key(0), knows, jump, process.finalize, x0_BL, fs.uniform_grid(2))
    >>> changes = lambda logits, x_BL, new_BL: jnp.sum(x_BL != new_BL)
    >>> x1_BL, changes_S = fs.sample_trajectory(*arguments, observe=changes)
    >>> int(changes_S.sum())
    4

    Args:
      key, denoise, jump, finalize, x0_BL, grid_S1, frozen_BL: as in `sample`.
      observe: (logits, x_BL, new_BL) -> a tree of arrays; gets the logits of a step and the tokens
        before and after it.

    Returns:
      (int [B, L], the tree with a leading axis S).

    Raises:
      ValueError: if a concrete grid doesn't increase from 0 to 1.
    """
    if not isinstance(grid_S1, jax.core.Tracer):
        grid_S1 = check_grid(grid_S1)
    steps = make_steps(key, jnp.asarray(grid_S1, jnp.float32))
    step = make_step_fn(denoise, jump, finalize, x0_BL, frozen_BL, observe=observe)
    return jax.lax.scan(step, x0_BL, steps)
