"""Losses per position, in float32. The stages take the mean over a batch.

Source: arXiv:2509.20624 eq. 3.8 and 4.4 (path loss), section 4.2 (distillation).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def path_loss(
    logits_BLV: jax.Array, xt_BL: jax.Array, x1_BL: jax.Array, weight_BL: jax.Array
) -> jax.Array:
    """Generalised KL (Bregman) loss of the mixture path.

        l = -w [ p(xt) - 1{xt = x1} + 1{xt != x1} log p(x1) ]

    with w = g(t) in eq. 3.8 and w = gbar(t, h) in the step-aware loss, eq. 4.4. The loss is
    non-negative and its minimiser is the clean posterior p(x1 | xt). Where xt = x1 the log term
    vanishes.

    >>> import fsdfm_jax as fs, jax.numpy as jnp
    >>> logits_BLV = jnp.log(jnp.array([[[0.25, 0.75]]]))
    >>> xt_BL, x1_BL = jnp.array([[0]]), jnp.array([[1]])
    >>> loss = lambda *tokens: round(fs.path_loss(logits_BLV, *tokens, jnp.ones((1, 1))).item(), 3)
    >>> loss(x1_BL, x1_BL), loss(xt_BL, x1_BL)
    (0.25, 0.038)

    Args:
      logits_BLV: float [B, L, V], p = softmax over V.
      xt_BL, x1_BL: current and data tokens, int [B, L].
      weight_BL: rate of each position or row, float32 [B, L] or [B, 1], 1/time.

    Returns:
      float32 [B, L], nats per position and unit time.
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    log_z = _log_normaliser(logits_BLV)
    p_xt_BL = jnp.exp(_log_p_at(logits_BLV, log_z, xt_BL))
    log_p_x1_BL = _log_p_at(logits_BLV, log_z, x1_BL)
    bracket_BL = jnp.where(xt_BL == x1_BL, p_xt_BL - 1.0, p_xt_BL + log_p_x1_BL)
    return -weight_BL.astype(jnp.float32) * bracket_BL


def distillation_loss(
    divergence: Divergence,
    teacher_logits_BLV: jax.Array,
    student_logits_BLV: jax.Array,
    *,
    temperature: float = 1.0,
) -> jax.Array:
    """temp^2 D(softmax(teacher/temp), softmax(student/temp)); arXiv:2509.20624 section 4.2.

    No gradient flows into the teacher. The factor temp^2 keeps the scale of the gradient when the
    temperature changes.

    >>> import fsdfm_jax as fs, jax.numpy as jnp
    >>> teacher = jnp.log(jnp.array([[[0.5, 0.5]]]))
    >>> student = jnp.log(jnp.array([[[0.25, 0.75]]]))
    >>> loss_BL = fs.distillation_loss(fs.forward_kl, teacher, student)
    >>> round(float(loss_BL[0, 0]), 4)
    0.1438

    Args:
      divergence: `forward_kl` or `jensen_shannon`.
      teacher_logits_BLV, student_logits_BLV: float [B, L, V].
      temperature: of both distributions.

    Returns:
      float32 [B, L], nats.
    """
    teacher = jax.lax.stop_gradient(teacher_logits_BLV).astype(jnp.float32)
    student = student_logits_BLV.astype(jnp.float32)
    if temperature != 1.0:
        teacher, student = teacher / temperature, student / temperature
    return temperature**2 * divergence(teacher, student)


# Both divergences have hand-written gradients: differentiating log_softmax costs several passes
# over the vocabulary, one of which XLA compiles to slow vector products on CPUs.


@jax.custom_vjp
def forward_kl(teacher_logits: jax.Array, student_logits: jax.Array) -> jax.Array:
    """KL(teacher || student) over the last axis, as in the paper (arXiv:2509.20624 section 4.2).

    Differentiable in the student. Tokens with teacher logit -inf contribute 0.

    >>> import fsdfm_jax as fs, jax.numpy as jnp
    >>> teacher = jnp.array([0.0, -jnp.inf])
    >>> round(float(fs.forward_kl(teacher, jnp.zeros(2))), 4)
    0.6931

    Args:
      teacher_logits, student_logits: float32 [.., V].

    Returns:
      float32 [..], nats.
    """
    return _forward_kl(teacher_logits, student_logits)[0]


def _forward_kl(teacher_logits, student_logits):
    log_z, log_w = _log_normaliser(teacher_logits), _log_normaliser(student_logits)
    teacher, student = _log_p(teacher_logits, log_z), _log_p(student_logits, log_w)
    return _mean_under(teacher, teacher - student), (teacher_logits, student_logits, log_z, log_w)


def _forward_kl_backward(residuals, cotangent):
    teacher_logits, student_logits, log_z, log_w = residuals
    difference = jnp.exp(_log_p(student_logits, log_w)) - jnp.exp(_log_p(teacher_logits, log_z))
    return None, cotangent[..., None] * difference


forward_kl.defvjp(_forward_kl, _forward_kl_backward)


@jax.custom_vjp
def jensen_shannon(teacher_logits: jax.Array, student_logits: jax.Array) -> jax.Array:
    """Jensen-Shannon divergence over the last axis: the mean KL of both to their mixture.

    Bounded by ln 2. Differentiable in the student.

    >>> import fsdfm_jax as fs, jax.numpy as jnp
    >>> apart = fs.jensen_shannon(jnp.array([0.0, -jnp.inf]), jnp.array([-jnp.inf, 0.0]))
    >>> round(float(apart), 4)
    0.6931

    Args:
      teacher_logits, student_logits: float32 [.., V]; -inf is allowed.

    Returns:
      float32 [..], nats.
    """
    return _jensen_shannon(teacher_logits, student_logits)[0]


def _jensen_shannon(teacher_logits, student_logits):
    teacher = _log_p(teacher_logits, _log_normaliser(teacher_logits))
    student = _log_p(student_logits, _log_normaliser(student_logits))
    midpoint = _log_midpoint(teacher, student)
    student_kl = _mean_under(student, student - midpoint)
    value = 0.5 * (_mean_under(teacher, teacher - midpoint) + student_kl)
    return value, (teacher, student, student_kl)


def _jensen_shannon_backward(residuals, cotangent):
    teacher, student, student_kl = residuals
    log_ratio = jnp.where(student > -jnp.inf, student - _log_midpoint(teacher, student), 0.0)
    gradient = jnp.exp(student) * (log_ratio - student_kl[..., None])
    return None, 0.5 * cotangent[..., None] * gradient


jensen_shannon.defvjp(_jensen_shannon, _jensen_shannon_backward)


def _log_midpoint(log_p, log_q):
    mean = 0.5 * (jnp.exp(log_p) + jnp.exp(log_q))
    return jnp.log(jnp.where(mean > 0, mean, 1.0))


def _log_normaliser(logits):
    """Return (max logit, log sum exp(logit - max)), each [..., 1].

    They are kept separate: their sum would be rounded at the scale of the logits.
    """
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return top, jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))


def _log_p(logits, log_normaliser):
    top, log_sum = log_normaliser
    return (logits - top) - log_sum


def _mean_under(log_p, values):
    """Sum of p * values over the last axis; entries with p = 0 contribute 0, not nan."""
    return jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * values, 0.0), axis=-1)


DIVERGENCES: dict[str, Divergence] = {"forward_kl": forward_kl, "jsd": jensen_shannon}


def get_divergence(name: str) -> Divergence:
    """Return the divergence of this name; ValueError if unknown."""
    if name not in DIVERGENCES:
        raise ValueError(f"Unknown divergence {name!r}; expected one of {', '.join(DIVERGENCES)}.")
    return DIVERGENCES[name]


def cross_entropy(logits_BLV: jax.Array, x1_BL: jax.Array) -> jax.Array:
    """-log p(x1): logits at position i predict x1 at position i (arXiv:2407.15595 section 3).

    >>> import fsdfm_jax as fs, jax.numpy as jnp
    >>> loss_BL = fs.cross_entropy(jnp.zeros((1, 2, 8)), jnp.array([[3, 5]]))
    >>> [round(nats, 3) for nats in loss_BL[0].tolist()]
    [2.079, 2.079]

    Args:
      logits_BLV: float [B, L, V].
      x1_BL: data tokens, int [B, L].

    Returns:
      float32 [B, L], nats.
    """
    logits_BLV = logits_BLV.astype(jnp.float32)
    return -_log_p_at(logits_BLV, _log_normaliser(logits_BLV), x1_BL)


def _log_p_at(logits_BLV: jax.Array, log_normaliser, index_BL: jax.Array) -> jax.Array:
    at_BL1 = _take(logits_BLV.shape[-1], logits_BLV, index_BL)[..., None]
    return _log_p(at_BL1, log_normaliser)[..., 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(size, values_BLV, index_BL):
    del size
    return jnp.take_along_axis(values_BLV, index_BL[..., None], axis=-1)[..., 0]


def _take_backward(size, index_BL, cotangent_BL):
    # A comparison fuses with the surrounding gradient; a scatter would be a separate pass.
    is_it_BLV = jnp.arange(size, dtype=index_BL.dtype)[None, None] == index_BL[..., None]
    return jnp.where(is_it_BLV, cotangent_BL[..., None], 0.0), None


_take.defvjp(lambda size, values, index: (_take(size, values, index), index), _take_backward)
