"""One jump of width h: the update rule of the sampler and the teacher.

Let z be the current token, p the network's posterior and m = 1 - p(z) the off-diagonal mass. Every
rule jumps with some probability, and then draws the new token from p restricted to tokens other
than z:

    cumulative   P(jump) = 1 - exp(-h gbar(t,h) m)     FS-DFM, arXiv:2509.20624 eq. 4.3
    euler        P(jump) = 1 - exp(-h g(t) m)          plain discrete flow matching
    mixture      P(jump) = beta(t,h) m                 exact kernel of the path for fixed p:
                                                       resample from the full p with probability
                                                       beta
    dispersed    P(jump) = beta(t,h) m                 mixture, with the positions that jump in
                                                       the same step spaced apart

Tokens drawn in one step are independent, so neighbours that jump together may not fit. `dispersed`
decides all jumps of a row from one random number, and neighbours rarely jump together
(`categorical.dispersed`).

    >>> import fsdfm_jax as fs
    >>> rules = (fs.CUMULATIVE, fs.EULER, fs.MIXTURE, fs.DISPERSED)
    >>> t, h, m = 0.5, 0.25, 0.5
    >>> [round(float(rule.probability(fs.Polynomial(), t, h, m)), 3) for rule in rules]
    [0.293, 0.221, 0.25, 0.25]

A rule is the function P(jump). `make_jump` turns it into the `jump(key, logits, x, t, h)` that the
sampler and the teacher call. The official code's `mixture_euler` is omitted: its rate (p - 1{z})/h
ignores t and kappa, so at most 63% of the positions can move in a step.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fsdfm_jax.flow import schedules
from fsdfm_jax.flow.schedules import Schedule
from fsdfm_jax.flow.sources import Source
from fsdfm_jax.ops import categorical
from fsdfm_jax.ops.logits import Logits, map_positions

Jump = Callable[[jax.Array, Logits, jax.Array, jax.Array, jax.Array], jax.Array]
Finalize = Callable[[jax.Array, Logits, jax.Array], jax.Array]

REVEALED = ("stay", "jump")

# Tolerance for t + h = 1: the times of a grid are rounded.
_END = 1.0 - 1e-6


class JumpRule(NamedTuple):
    """A jump rule: P(jump) as a function of schedule, step and off-diagonal mass m.

    >>> import fsdfm_jax as fs
    >>> never = fs.JumpRule("never", lambda schedule, t, h, m: 0.0 * m)
    >>> never.probability(fs.Polynomial(), 0.5, 0.25, 1.0)
    0.0

    Attributes:
      name: its name in configs and messages.
      probability: (schedule, t, h, m) -> P(jump), float32, shape of m.
      dispersed: whether positions that jump in the same step are spaced apart; otherwise positions
        jump independently.
    """

    name: str
    probability: Callable[[Schedule, jax.Array, jax.Array, jax.Array], jax.Array]
    dispersed: bool = False


CUMULATIVE = JumpRule(
    "cumulative", lambda schedule, t, h, m: -jnp.expm1(-schedules.log_survival(schedule, t, h) * m)
)
EULER = JumpRule(
    "euler", lambda schedule, t, h, m: -jnp.expm1(-h * schedules.rate(schedule, t) * m)
)
MIXTURE = JumpRule(
    "mixture", lambda schedule, t, h, m: schedules.redraw_fraction(schedule, t, h) * m
)

DISPERSED = JumpRule("dispersed", MIXTURE.probability, dispersed=True)

RULES = {rule.name: rule for rule in (CUMULATIVE, EULER, MIXTURE, DISPERSED)}


def get_rule(name: str) -> JumpRule:
    """Return the rule of this name; ValueError if unknown."""
    if name not in RULES:
        raise ValueError(f"Unknown jump rule {name!r}; expected one of {', '.join(RULES)}.")
    return RULES[name]


def with_posterior_end(rule: JumpRule) -> JumpRule:
    """Change a rule so that a step that reaches t=1 draws from the full posterior.

    >>> import fsdfm_jax as fs
    >>> rule = fs.with_posterior_end(fs.CUMULATIVE)
    >>> t, h, m = 0.75, 0.25, 0.125
    >>> float(rule.probability(fs.Polynomial(), t, h, m))
    0.125
    >>> round(float(fs.CUMULATIVE.probability(fs.Polynomial(), t, h, m)), 3)
    0.881

    At t=1 the closed form of `cumulative` almost surely leaves the current token. It replaces a
    token with p=0.9 with probability 0.83, although the exact kernel of the path keeps it with
    probability 0.9.

    Args:
      rule: for the steps that end before t=1.

    Returns:
      A rule with the same name.
    """

    def probability(schedule, t, h, m):
        return jnp.where(t + h >= _END, m, rule.probability(schedule, t, h, m))

    return rule._replace(probability=probability)


def hold(jump: Jump, frozen_BL: jax.Array | None) -> Jump:
    """Change a jump so that frozen positions, bool [B, L], keep their token; None: none is."""
    if frozen_BL is None:
        return jump

    def held(key, logits, xt_BL, t_B, h_B):
        return jnp.where(frozen_BL, xt_BL, jump(key, logits, xt_BL, t_B, h_B))

    return held


def make_jump(rule: JumpRule, schedule: Schedule) -> Jump:
    """Make the jump of a rule on a schedule.

    Returns:
      `jump(key, logits, xt_BL, t_B, h_B) -> x_BL`: typed key; logits of the posterior over x1,
      float [B, L, V] or factored; current tokens, int; time and width of the step, float32 with
      t + h <= 1. The result has the shape and dtype of xt. A row's noise depends on the key and the
      row's index, not on the number of rows.
    """

    def jump(key, logits, xt_BL, t_B, h_B):
        t_B1, h_B1 = _column(t_B), _column(h_B)

        def move(logits_BLV, xt_BL, u_BLU):
            others_BL, m_BL = categorical.pick_other(u_BLU[..., 1:], logits_BLV, xt_BL)
            moves_BL = u_BLU[..., 0] < rule.probability(schedule, t_B1, h_B1, m_BL)
            return jnp.where(moves_BL, others_BL.astype(xt_BL.dtype), xt_BL)

        return map_positions(move, logits, xt_BL, numbers(key, xt_BL.shape))

    def numbers(key, shape):
        if not rule.dispersed:
            return categorical.uniform(key, (*shape, 1 + categorical.NUMBERS))
        place_key, token_key = jax.random.split(key)
        u_BL1 = categorical.dispersed(place_key, shape)[..., None]
        return jnp.concatenate(
            [u_BL1, categorical.uniform(token_key, (*shape, categorical.NUMBERS))], axis=-1
        )

    return jump


def keep_revealed(jump: Jump, mask_id: int) -> Jump:
    """Keep revealed tokens fixed, as in masked diffusion (mask source only).

    Without this wrapper revealed tokens may jump again, as in the official solver.
    """

    def absorbing_jump(key, logits, xt_BL, t_B, h_B):
        return jnp.where(xt_BL == mask_id, jump(key, logits, xt_BL, t_B, h_B), xt_BL)

    return absorbing_jump


def make_process_jump(
    rule: JumpRule, schedule: Schedule, source: Source, revealed: str = "stay"
) -> Jump:
    """Make the jump of a rule for a given process.

    Args:
      rule: the jump rule.
      schedule, source: of the process.
      revealed: with a mask source, whether revealed tokens "stay" (`keep_revealed`) or may "jump"
        again, as in the official solver. No effect with a uniform source.

    Raises:
      ValueError: for another value of `revealed`.
    """
    if revealed not in REVEALED:
        raise ValueError(f"Unknown revealed={revealed!r}; expected one of {', '.join(REVEALED)}.")
    jump = make_jump(rule, schedule)
    if source.mask_id is None or revealed == "jump":
        return jump
    return keep_revealed(jump, source.mask_id)


def make_finalize(source: Source) -> Finalize:
    """Make the last step of the sampler (arXiv:2509.20624 App. B.1).

    Returns:
      `finalize(key, logits, xt_BL) -> x_BL`. With a uniform source it draws every position from
      the full posterior. With a mask source it draws the positions still masked, excluding the mask
      token. Logits as in `make_jump`.
    """

    def draw(logits_BLV, xt_BL, u_BLU):
        if source.mask_id is None:
            return categorical.pick(u_BLU, logits_BLV).astype(xt_BL.dtype)
        is_mask_V = jnp.arange(logits_BLV.shape[-1]) == source.mask_id
        drawn_BL = categorical.pick(u_BLU, jnp.where(is_mask_V[None, None], -jnp.inf, logits_BLV))
        return jnp.where(xt_BL == source.mask_id, drawn_BL.astype(xt_BL.dtype), xt_BL)

    def finalize(key, logits, xt_BL):
        u_BLU = categorical.uniform(key, (*xt_BL.shape, categorical.NUMBERS))
        return map_positions(draw, logits, xt_BL, u_BLU)

    return finalize


def _column(t_B) -> jax.Array:
    """Reshape one number per row to a float32 column [B, 1] (a scalar to [1, 1])."""
    return jnp.reshape(jnp.asarray(t_B, jnp.float32), (-1, 1))
