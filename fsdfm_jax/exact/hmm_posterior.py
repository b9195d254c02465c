"""p(x1 | xt) of a known law in closed form: a denoiser without training error.

The noise is known too. Position i of xt shows x1 with probability kappa(t), otherwise noise. Given
its state s it shows the token y with probability

    e_i(s) = kappa E(s, y) + (1 - kappa) / V          uniform source
    e_i(s) = E(s, y), or 1 if y is the mask           mask source, up to a factor

so xt is the output of a hidden Markov model with the same states. With the forward message
a_i(s) = P(s | all before i) and the backward message b_i(s) = P(all after i | s), both excluding
position i,

    L_i(v) = sum over s of a_i(s) b_i(s) E(s, v)      leave-one-out: from all other positions
    p(x1_i = v | xt)  ~  L_i(v) [kappa 1{v = y} + (1 - kappa) / V]

(with a mask: L_i if y is the mask, otherwise y itself). `make_denoiser` can replace a network in
the sampler and the teachers; few-step errors are then due to the sampler alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.exact.hmm import Law, forward
from fsdfm_jax.flow.schedules import Schedule
from fsdfm_jax.flow.sources import Source

Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Minimum of 1 - kappa: at t=1 exactly, a text that the law excludes would have no posterior.
_FLOOR = 1e-8
# Added to the likelihood of a revealed token with a mask source.
_TINY_EVIDENCE = 1e-12
# Minimum probability; smaller ones get its logit.
_TINY = 1e-30


def make_denoiser(law: Law, schedule: Schedule, source: Source) -> Denoise:
    """Make the exact posterior of blocks of the law under a noising process.

    Args:
      law: of x1; blocks start in its stationary distribution.
      schedule: kappa.
      source: noise over the tokens of the law, uniform or mask (with the next id).

    Returns:
      `denoise(xt_BL, t_B, h_B) -> logits_BLV`, float32, V including the mask; ignores the width h.
      Tokens with zero probability have logits of -69 (1e-30).

    Raises:
      ValueError: for a source with another vocabulary.
    """
    _check_source(law, source)
    transition_KK, emission_VK, initial_K = _arrays(law)
    tokens = law.vocab_size

    def denoise(xt_BL, t_B, h_B):
        del h_B
        kappa_B11, noise_B11 = _noise(schedule, source, t_B)
        evidence_LBK = _evidence(emission_VK, source, xt_BL, kappa_B11, noise_B11)
        others_BLV = _others(transition_KK, emission_VK, initial_K, evidence_LBK)
        shown_BLV = xt_BL[..., None] == jnp.arange(tokens)[None, None]
        if source.mask_id is None:
            p_BLV = others_BLV * (kappa_B11 * shown_BLV + noise_B11)
            return _logits(p_BLV)
        hidden_BL1 = (xt_BL == source.mask_id)[..., None]
        p_BLV = jnp.where(hidden_BL1, others_BLV, shown_BLV)
        return _logits(jnp.pad(p_BLV, ((0, 0), (0, 0), (0, 1))))

    return denoise


def make_leave_one_out(law: Law, schedule: Schedule, source: Source) -> Denoise:
    """As `make_denoiser`, for L: the logits of p(x1_i | xt without position i)."""
    _check_source(law, source)
    transition_KK, emission_VK, initial_K = _arrays(law)

    def leave_one_out(xt_BL, t_B, h_B):
        del h_B
        evidence_LBK = _evidence(emission_VK, source, xt_BL, *_noise(schedule, source, t_B))
        others_BLV = _others(transition_KK, emission_VK, initial_K, evidence_LBK)
        if source.mask_id is not None:
            others_BLV = jnp.pad(others_BLV, ((0, 0), (0, 0), (0, 1)))
        return _logits(others_BLV)

    return leave_one_out


def _check_source(law: Law, source: Source) -> None:
    expected = law.vocab_size + (source.mask_id is not None)
    if source.vocab_size != expected or source.mask_id not in (None, law.vocab_size):
        raise ValueError(
            f"a law of {law.vocab_size} tokens needs a uniform source of the same size, or a mask "
            f"with id {law.vocab_size}; got vocab_size={source.vocab_size} and "
            f"mask_id={source.mask_id}"
        )


def _arrays(law: Law) -> tuple[jax.Array, jax.Array, jax.Array]:
    values = law.transition_KK, law.emission_KV.T, law.initial_K
    return tuple(jnp.asarray(np.float32(value)) for value in values)


def _noise(schedule: Schedule, source: Source, t_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """kappa and the probability of each noise token, [B, 1, 1]."""
    column = lambda value_B: jnp.asarray(value_B, jnp.float32)[:, None, None]
    noise_B = jnp.maximum(schedule.remaining(t_B), _FLOOR) / source.vocab_size
    return column(schedule.kappa(t_B)), column(noise_B)


def _evidence(emission_VK, source, xt_BL, kappa_B11, noise_B11) -> jax.Array:
    """P(token shown | state), up to a factor for each position, [L, B, K]."""
    xt_LB, kappa_1B1, noise_1B1 = xt_BL.T, kappa_B11.swapaxes(0, 1), noise_B11.swapaxes(0, 1)
    if source.mask_id is None:
        return kappa_1B1 * emission_VK[xt_LB] + noise_1B1
    hidden_LB = xt_LB == source.mask_id
    # Independently drawn revealed tokens may contradict each other.
    shown_LBK = emission_VK[jnp.where(hidden_LB, 0, xt_LB)] + _TINY_EVIDENCE
    return jnp.where(hidden_LB[..., None], 1.0, shown_LBK)


def _others(transition_KK, emission_VK, initial_K, evidence_LBK) -> jax.Array:
    """L, normalised, [B, L, V]."""
    _, batch, states = evidence_LBK.shape
    initial_BK = jnp.broadcast_to(initial_K, (batch, states))
    before_LBK, _ = forward(transition_KK, initial_BK, evidence_LBK)

    def step(after_BK, inputs):
        before_BK, evidence_BK = inputs
        state_BK = before_BK * after_BK
        seen_BK = (after_BK * evidence_BK) @ transition_KK.T
        return seen_BK / seen_BK.max(-1, keepdims=True), state_BK

    last_BK = jnp.ones((batch, states))
    _, state_LBK = jax.lax.scan(step, last_BK, (before_LBK, evidence_LBK), reverse=True)
    state_LBK = state_LBK / state_LBK.sum(-1, keepdims=True)
    return state_LBK.swapaxes(0, 1) @ emission_VK.T


def _logits(p_BLV: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(p_BLV, _TINY))
