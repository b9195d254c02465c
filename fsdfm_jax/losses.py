"""Losses per position, in float32; the mean over a batch is taken by the stages.

Source: arXiv:2509.20624 eq. 3.8 and 4.4 (path loss), section 4.2 (distillation).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def path_loss(
    logits_BLV: jax.Array, xt_BL: jax.Array, x1_BL: jax.Array, weight_B: jax.Array
) -> jax.Array:
    """Generalised KL (Bregman) loss of the mixture path.

        l = -w [ p(xt) - 1{xt = x1} + 1{xt != x1} log p(x1) ]

    with w = g(t) in eq. 3.8 and w = gbar(t, h) in the step-aware loss, eq. 4.4. It is at least 0
    and its minimiser is the clean posterior p(x1 | xt); where xt = x1 the log term vanishes.

    Args:
      logits_BLV: float [B, L, V], p = softmax over V.
      xt_BL, x1_BL: current and data tokens, int [B, L].
      weight_B: rate of each row, float32 [B], 1/time.

    Returns:
      float32 [B, L], nats per position and unit of time.
    """
    log_p_BLV = jax.nn.log_softmax(logits_BLV.astype(jnp.float32), axis=-1)
    p_xt_BL = jnp.exp(_at(log_p_BLV, xt_BL))
    shown_BL = xt_BL == x1_BL
    bracket_BL = jnp.where(shown_BL, p_xt_BL - 1.0, p_xt_BL + _at(log_p_BLV, x1_BL))
    return -weight_B.astype(jnp.float32)[:, None] * bracket_BL


def distillation_loss(
    divergence: Divergence,
    teacher_logits_BLV: jax.Array,
    student_logits_BLV: jax.Array,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """temp^2 D(softmax(teacher/temp), softmax(student/temp)), float32 [B, L], nats.

    No gradient flows into the teacher. The square keeps the size of the gradient when the
    temperature changes.
    """
    teacher = jax.lax.stop_gradient(teacher_logits_BLV).astype(jnp.float32) / temperature
    student = student_logits_BLV.astype(jnp.float32) / temperature
    value = divergence(jax.nn.log_softmax(teacher, axis=-1), jax.nn.log_softmax(student, axis=-1))
    return temperature**2 * value


def forward_kl(teacher_log_p: jax.Array, student_log_p: jax.Array) -> jax.Array:
    """KL(teacher || student) over the last axis, of log-probabilities; the paper's choice."""
    return _kl(teacher_log_p, student_log_p)


def jensen_shannon(teacher_log_p: jax.Array, student_log_p: jax.Array) -> jax.Array:
    """Jensen-Shannon divergence, the mean KL of both to their midpoint; bounded by ln 2."""
    # Not logaddexp: its gradient is nan where both exclude a token.
    mean = 0.5 * (jnp.exp(teacher_log_p) + jnp.exp(student_log_p))
    midpoint = jnp.log(jnp.where(mean > 0, mean, 1.0))
    return 0.5 * (_kl(teacher_log_p, midpoint) + _kl(student_log_p, midpoint))


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "jsd": jensen_shannon}


def get_divergence(name: str) -> Divergence:
    """The divergence that a config names; ValueError for an unknown one."""
    if name not in DIVERGENCES:
        raise ValueError(f"Unknown divergence {name!r}; expected one of {', '.join(DIVERGENCES)}.")
    return DIVERGENCES[name]


def cross_entropy(logits_BLV: jax.Array, x1_BL: jax.Array) -> jax.Array:
    """-log p(x1), float32 [B, L], nats; logits at position i predict x1 at position i."""
    return -_at(jax.nn.log_softmax(logits_BLV.astype(jnp.float32), axis=-1), x1_BL)


def _at(values_BLV: jax.Array, index_BL: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_BLV, index_BL[..., None], axis=-1)[..., 0]


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    # A token the first distribution excludes (-inf) contributes 0, not nan.
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * (jnp.where(p > 0, log_p, 0.0) - log_q), 0.0), axis=-1)
