"""The shortcut teacher: small steps of the averaged student are the target of one large step.

A rule is data (nodes and weights), so RK-2 and RK-4 share one loop. Unlike classical Runge-Kutta,
the states chain: each evaluation sees the *previous* state after a jump by h/2. The weights average
logits, or the features of factored logits (see `logits`), so the target costs one vocabulary
product.

    >>> import fsdfm_jax as fs
    >>> fs.HEUN
    Quadrature(nodes=(0.0, 0.5), weights=(0.5, 0.5))
    >>> fs.RK4.nodes
    (0.0, 0.5, 0.5, 1.0)

Source: arXiv:2509.20624 Algorithm 1 and section 4.2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fsdfm_jax.flow.jumps import Jump
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.ops.logits import Logits

Denoise = Callable[[jax.Array, jax.Array, jax.Array], Logits]


class Quadrature(NamedTuple):
    """Evaluation times of the teacher, and their weights.

    >>> import fsdfm_jax as fs
    >>> euler = fs.Quadrature(nodes=(0.0,), weights=(1.0,))
    >>> sum(euler.weights) == sum(fs.HEUN.weights)
    True

    Attributes:
      nodes: offsets from t, in units of h.
      weights: one per node; they sum to 1.
    """

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


HEUN = Quadrature(nodes=(0.0, 0.5), weights=(0.5, 0.5))
RK4 = Quadrature(nodes=(0.0, 0.5, 0.5, 1.0), weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6))

RULES = {"heun": HEUN, "rk4": RK4}


def get_rule(name: str) -> Quadrature:
    """Return the quadrature of this name; ValueError if unknown."""
    if name not in RULES:
        raise ValueError(f"Unknown teacher rule {name!r}; expected one of {', '.join(RULES)}.")
    return RULES[name]


def teacher_logits(
    key: jax.Array,
    rule: Quadrature,
    denoise: Denoise,
    jump: Jump,
    xt_BL: jax.Array,
    t_B: jax.Array,
    h_B: jax.Array,
) -> Logits:
    """Average the teacher's logits over the step from t to t+h, without gradient.

    >>> import fsdfm_jax as fs, jax, jax.numpy as jnp
    >>> process = fs.Process(fs.Polynomial(), fs.Source(vocab_size=3))
    >>> denoise = lambda x_BL, t_B, h_B: jnp.broadcast_to(t_B[:, None, None], (*x_BL.shape, 3))
    >>> jump = process.make_jump(fs.with_posterior_end(fs.MIXTURE))
    >>> xt_BL, t_B, h_B = jnp.zeros((1, 2), int), jnp.array([0.25]), jnp.array([0.5])
    >>> fs.teacher_logits(jax.random.key(0), fs.HEUN, denoise, jump, xt_BL, t_B, h_B)[0, 0].tolist()
    [0.375, 0.375, 0.375]

    Every evaluation has width h/2 and time min(t + node h, 1). Between two evaluations the state
    jumps by h/2 at the rates of the last evaluation; there is no jump after the final one.

    Args:
      key: typed PRNG key for the jumps.
      rule: `HEUN`, `RK4` or any other nodes and weights.
      denoise: (x_BL, t_B, h_B) -> logits [B, L, V], as an array or factored: the averaged student
        in evaluation mode.
      jump: see `jumps.make_jump`. To draw from the full posterior when a jump reaches t=1, build
        it from `jumps.with_posterior_end(rule)`; the bare rule is the paper's literal form.
      xt_BL: current tokens, int [B, L].
      t_B, h_B: float32 [B], t + h <= 1.

    Returns:
      [B, L, V]: a float32 array, or factored if `denoise` returns factored logits.

    Raises:
      ValueError: if the weights of the rule don't sum to 1.
    """
    half_B = h_B / 2
    keys = jax.random.split(key, len(rule.nodes))
    last = len(rule.nodes) - 1
    state_BL, evaluations = xt_BL, []
    for i, node in enumerate(rule.nodes):
        time_B = jnp.minimum(t_B + node * h_B, 1.0)
        evaluations.append(denoise(state_BL, time_B, half_B))
        if i < last:
            state_BL = jump(keys[i], evaluations[-1], state_BL, time_B, half_B)
    return jax.lax.stop_gradient(logits_lib.average(evaluations, rule.weights))
