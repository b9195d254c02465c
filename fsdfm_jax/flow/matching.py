"""Matching the law of a step: what `refine` learns from, position by position.

A step from t to u = t+h moves each position by itself,

    K_i(v | z) = (1 - b) [v = z_i] + b G_i(v | z, t, h),    b = beta(t, h),                   (1)

with the student's answer G. Its joint law p over z' should be the path's law q_u. Because every
sum_v dK_i(v) is 0, the gradient of KL(p || q_u) is a sum over single positions, exactly:

    dKL = E_z sum_i E_{z'_-i} sum_v dK_i(v | z) [log p(v | z'_-i) - log q_u(v | z'_-i)].      (2)

The bracket needs conditionals of one token given all others, and a denoiser D of a uniform path
holds them. At a signal kept of s = kappa of its time, without the evidence of its own token,

    L_i(v) ~ softmax(D)_i(v) / (s [v = z_i] + (1-s)/V)         (leave-one-out, arXiv:2605.22765)
    q_s(v | z_-i) = s L_i(v) + (1-s)/V.                                                       (3)

For q, D is the base model. For p it is an auxiliary network that learns the student's law. Both are
compared after more noise, z_s from z' at a signal of s = r kappa(u), r < 1, which bounds the
logarithms by log(1 + V s/(1-s)) and keeps the fixed point: (2) vanishes only where the laws agree.
A target that is a product of marginals, as that of a shortcut teacher, has no such property.

The auxiliary network's answer at z_s, made leave-one-out, gives the conditional of z'_i,
M_i = kappa(u) L_i + (1 - kappa(u))/V. It learns a soft target, the posterior of z'_i under (1):

    M_i(w) (r [w = z_s,i] + (1-r)/V)   to   K_i(w | z) (r [w = z_s,i] + (1-r)/V).             (4)

All functions are made for `logits.mean_loss`: float32 logits [B, c, V], numbers and tokens [B, c].
"""

import jax
import jax.numpy as jnp


def log_leave_one_out(logits_BLV: jax.Array, z_BL: jax.Array, kept_BL: jax.Array) -> jax.Array:
    """log L: a posterior without the evidence of the position's own token (arXiv:2605.22765).

    >>> import jax.numpy as jnp
    >>> from fsdfm_jax.flow import matching
    >>> known_BLV = jnp.log(jnp.array([[[0.25, 0.75]]]))  # of x1, where L is (0.25, 0.75)
    >>> seen_BLV = known_BLV + jnp.log(jnp.array([0.8, 0.2]))  # token 0 is seen, s = 0.6
    >>> log_L_BLV = matching.log_leave_one_out(seen_BLV, jnp.array([[0]]), jnp.array([[0.6]]))
    >>> [round(p, 4) for p in jnp.exp(log_L_BLV)[0, 0].tolist()]
    [0.25, 0.75]

    Args:
      logits_BLV: of the posterior over x1 given z, float32 [B, L, V].
      z_BL: tokens of a uniform path, int [B, L].
      kept_BL: share of positions that show x1 there, kappa of their time, float32 in [0, 1).

    Returns:
      float32 [B, L, V], normalised.
    """
    size = logits_BLV.shape[-1]
    evidence_BL = jnp.log1p(size * kept_BL / (1.0 - kept_BL))
    shown_BLV = _is(z_BL, size)
    return jax.nn.log_softmax(logits_BLV - shown_BLV * evidence_BL[..., None], axis=-1)


def log_conditional(log_L_BLV: jax.Array, kept_BL: jax.Array) -> jax.Array:
    """log of eq. 3: the law of a token at a signal of `kept`, given all others; [B, L, V]."""
    kept_BL1, size = kept_BL[..., None], log_L_BLV.shape[-1]
    # Of logarithms: at kept = 1 a token that is nearly impossible would be log 0.
    return jnp.logaddexp(jnp.log(kept_BL1) + log_L_BLV, jnp.log1p(-kept_BL1) - jnp.log(size))


def student_loss(
    student_BLV: jax.Array,
    auxiliary_BLV: jax.Array,
    base_BLV: jax.Array,
    zs_BL: jax.Array,
    kept_BL: jax.Array,
) -> jax.Array:
    """sum_v G_i(v) [log p(v | z_s,-i) - log q_s(v | z_s,-i)]; its gradient is eq. 2 over b r.

    The scale b r is left out: all steps of a sample are asked alike.

    Args:
      student_BLV: logits of G at the step's start; the gradient goes here.
      auxiliary_BLV, base_BLV: logits at z_s.
      zs_BL: the noised end of the step, int [B, L].
      kept_BL: s.

    Returns:
      float32 [B, L], nats; the value itself means little, its mean is 0 where the laws agree.
    """
    own_BLV = log_conditional(log_leave_one_out(auxiliary_BLV, zs_BL, kept_BL), kept_BL)
    path_BLV = log_conditional(log_leave_one_out(base_BLV, zs_BL, kept_BL), kept_BL)
    gap_BLV = own_BLV - path_BLV
    gap_BLV = jax.lax.stop_gradient(gap_BLV - jnp.mean(gap_BLV, axis=-1, keepdims=True))
    return jnp.sum(jax.nn.softmax(student_BLV, axis=-1) * gap_BLV, axis=-1)


def auxiliary_loss(
    auxiliary_BLV: jax.Array,
    student_BLV: jax.Array,
    z_BL: jax.Array,
    zs_BL: jax.Array,
    share_BL: jax.Array,
    end_BL: jax.Array,
    again_BL: jax.Array,
) -> jax.Array:
    """KL from the known posterior of z' to the auxiliary network's, eq. 4.

    Args:
      auxiliary_BLV: logits at z_s; the gradient goes here.
      student_BLV: logits of G at z.
      z_BL, zs_BL: the step's start and its noised end, int [B, L].
      share_BL: b.
      end_BL: kappa(u).
      again_BL: r, the share of positions of z' that z_s shows.

    Returns:
      float32 [B, L], nats.
    """
    size = auxiliary_BLV.shape[-1]
    log_L_BLV = log_leave_one_out(auxiliary_BLV, zs_BL, end_BL * again_BL)
    seen_BLV = _is(zs_BL, size) * again_BL[..., None] + (1.0 - again_BL[..., None]) / size
    log_seen_BLV = jnp.log(seen_BLV)
    model_BLV = jax.nn.log_softmax(log_conditional(log_L_BLV, end_BL) + log_seen_BLV, axis=-1)
    moved_BLV = share_BL[..., None] * jax.nn.softmax(student_BLV, axis=-1)
    target_BLV = ((1.0 - share_BL[..., None]) * _is(z_BL, size) + moved_BLV) * seen_BLV
    target_BLV = target_BLV / jnp.sum(target_BLV, axis=-1, keepdims=True)
    gap_BLV = jnp.log(jnp.maximum(target_BLV, _TINY)) - model_BLV
    return jnp.sum(target_BLV * gap_BLV, axis=-1)


# Below it a probability adds nothing to a float32 sum.
_TINY = 1e-30


def _is(token_BL: jax.Array, size: int) -> jax.Array:
    """One-hot by comparison, float32 [B, L, V]: melts into the arithmetic around it."""
    return (jnp.arange(size, dtype=token_BL.dtype)[None, None] == token_BL[..., None]).astype(
        jnp.float32
    )
