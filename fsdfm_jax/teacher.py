"""The shortcut teacher: small steps of the averaged student make the target of a big one.

A rule is data, nodes and weights, so that RK-2 and RK-4 are one loop. Unlike classical Runge-Kutta
the states chain: each evaluation sees the state that jumped from the *previous* state by h/2, and
the weights average logits.

Source: arXiv:2509.20624 Algorithm 1 and section 4.2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fsdfm_jax.jumps import Jump

Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Quadrature(NamedTuple):
    """Where the teacher evaluates, in units of h from t, and how it averages."""

    nodes: tuple[float, ...]
    weights: tuple[float, ...]


HEUN = Quadrature(nodes=(0.0, 0.5), weights=(0.5, 0.5))
RK4 = Quadrature(nodes=(0.0, 0.5, 0.5, 1.0), weights=(1 / 6, 1 / 3, 1 / 3, 1 / 6))

RULES = {"heun": HEUN, "rk4": RK4}


def get_rule(name: str) -> Quadrature:
    """The quadrature that a config names; ValueError for an unknown one."""
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
) -> jax.Array:
    """Averaged logits for the step from t to t+h, without gradient.

    Every evaluation is conditioned on the width h/2 and takes place at min(t + node h, 1). Between
    two evaluations the state jumps by h/2 at the rates of the time just evaluated; nothing is drawn
    after the last one.

    Args:
      key: typed PRNG key for the jumps.
      rule: `HEUN` or `RK4`, or any other nodes and weights.
      denoise: (x_BL, t_B, h_B) -> logits_BLV, the averaged student in evaluation mode.
      jump: see `jumps.make_jump`. To draw from the full posterior where a jump reaches t=1, build
        it from `jumps.with_posterior_end(rule)`; the bare rule is the paper's literal form.
      xt_BL: current tokens, int [B, L].
      t_B, h_B: float32 [B], t + h <= 1.

    Returns:
      float32 [B, L, V].
    """
    half_B = h_B / 2
    keys = jax.random.split(key, len(rule.nodes))
    last = len(rule.nodes) - 1
    state_BL, mean_BLV = xt_BL, None
    for i, (node, weight) in enumerate(zip(rule.nodes, rule.weights, strict=True)):
        time_B = jnp.minimum(t_B + node * h_B, 1.0)
        logits_BLV = denoise(state_BL, time_B, half_B).astype(jnp.float32)
        mean_BLV = weight * logits_BLV if mean_BLV is None else mean_BLV + weight * logits_BLV
        if i < last:
            state_BL = jump(keys[i], logits_BLV, state_BL, time_B, half_B)
    return jax.lax.stop_gradient(mean_BLV)
