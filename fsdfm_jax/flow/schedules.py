"""Noise schedules kappa(t) of the mixture path, and their rates.

    g(t)       = kappa'(t) / (1 - kappa(t))                     instantaneous rate
    gbar(t, h) = (1/h) ln[(1 - kappa(t)) / (1 - kappa(t+h))]    cumulative scalar, eq. 4.3
    beta(t, h) = (kappa(t+h) - kappa(t)) / (1 - kappa(t))       fraction resampled by the exact
                                                                kernel

gbar is the mean of g over [t, t+h]: h gbar is additive over consecutive steps, and gbar -> g as
h -> 0. All arithmetic is float32. 1 - kappa is floored (at 1e-8 by default, as in the official
code) so that a step ending at t=1 has a finite rate.

Source: arXiv:2509.20624 section 4 and eq. 4.3; arXiv:2407.15595 section 3.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

FLOOR = 1e-8


class Schedule(Protocol):
    """A monotone kappa with kappa(0)=0 and kappa(1)=1; methods map float arrays elementwise."""

    def kappa(self, t: jax.Array) -> jax.Array:
        """Probability that a position already shows data at time t."""

    def remaining(self, t: jax.Array) -> jax.Array:
        """1 - kappa(t), without cancellation."""

    def derivative(self, t: jax.Array) -> jax.Array:
        """kappa'(t)."""

    def inverse(self, k: jax.Array) -> jax.Array:
        """The time t at which kappa(t) = k."""


def _f32(t) -> jax.Array:
    return jnp.asarray(t, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Polynomial:
    """kappa(t) = t^n, n > 0. The paper uses n = 1 (arXiv:2509.20624 section 3).

    >>> import fsdfm_jax as fs
    >>> schedule = fs.Polynomial(power=2.0)
    >>> float(schedule.kappa(0.5)), float(schedule.inverse(0.25))
    (0.25, 0.5)

    Attributes:
      power: n.

    Raises:
      ValueError: unless the power is positive and finite.
    """

    power: float = 1.0

    def __post_init__(self):
        if not self.power > 0 or not math.isfinite(self.power):
            raise ValueError(
                f"The power of a polynomial schedule must be positive and finite, got "
                f"{self.power}; kappa(t) = t is power 1."
            )

    def kappa(self, t):
        return _f32(t) ** self.power

    def remaining(self, t):
        if self.power == 1:
            return 1.0 - _f32(t)
        # 1 - t^n cancels near t=1.
        return -jnp.expm1(self.power * jnp.log(_f32(t)))

    def derivative(self, t):
        t = _f32(t)
        if self.power < 1:
            # The slope is infinite at t=0; a loss weight must not be.
            t = jnp.maximum(t, 1e-6)
        return self.power * t ** (self.power - 1.0)

    def inverse(self, k):
        return _f32(k) ** (1.0 / self.power)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """kappa(t) = 1 - cos(pi t / 2): slow near noise, fast near data (MaskGIT, arXiv:2202.04200).

    >>> import fsdfm_jax as fs
    >>> [round(float(fs.Cosine().kappa(t)), 3) for t in (0.0, 0.5, 1.0)]
    [0.0, 0.293, 1.0]
    """

    def kappa(self, t):
        # 1 - cos(2a) = 2 sin(a)^2 keeps precision near t=0.
        return 2.0 * jnp.sin(_f32(t) * (jnp.pi / 4)) ** 2

    def remaining(self, t):
        # cos(pi t / 2) as a sine about t=1, where the rounded cosine would be negative.
        return jnp.sin((1.0 - _f32(t)) * (jnp.pi / 2))

    def derivative(self, t):
        return (jnp.pi / 2) * jnp.sin(_f32(t) * (jnp.pi / 2))

    def inverse(self, k):
        return jnp.arcsin(jnp.sqrt(_f32(k) / 2.0)) * (4 / jnp.pi)


def make_schedule(name: str, *, power: float = 1.0) -> Schedule:
    """Make a schedule by name: "polynomial" (kappa = t^power) or "cosine".

    Raises:
      ValueError: for an unknown name or a non-positive power.
    """
    if name == "polynomial":
        return Polynomial(power)
    if name == "cosine":
        return Cosine()
    raise ValueError(f"Unknown schedule {name!r}; expected 'polynomial' or 'cosine'.")


def rate(schedule: Schedule, t: jax.Array, *, floor: float = FLOOR) -> jax.Array:
    """g(t) = kappa'(t) / (1 - kappa(t)), the rate of the path (arXiv:2407.15595 section 3).

    >>> import fsdfm_jax as fs, jax.numpy as jnp
    >>> fs.rate(fs.Polynomial(), jnp.array([0.0, 0.5, 0.75])).tolist()
    [1.0, 2.0, 4.0]

    Args:
      schedule: kappa.
      t: times in [0, 1].
      floor: minimum of 1 - kappa, which keeps the rate finite at t=1.

    Returns:
      float32, shape of t, 1/time.
    """
    return schedule.derivative(t) / jnp.maximum(schedule.remaining(t), floor)


def log_survival(
    schedule: Schedule, t: jax.Array, h: jax.Array, *, floor: float = FLOOR
) -> jax.Array:
    """h gbar(t,h) = ln[(1-kappa(t)) / (1-kappa(t+h))], the integral of g; t+h is capped at 1."""
    end = jnp.minimum(_f32(t) + _f32(h), 1.0)
    start_left = jnp.maximum(schedule.remaining(t), floor)
    end_left = jnp.maximum(schedule.remaining(end), floor)
    return jnp.log(start_left / end_left)


def cumulative_rate(
    schedule: Schedule, t: jax.Array, h: jax.Array, *, floor: float = FLOOR
) -> jax.Array:
    """gbar(t,h), the mean rate over a step: the cumulative scalar of arXiv:2509.20624 eq. 4.3.

    >>> import fsdfm_jax as fs
    >>> gbar = lambda t, h: round(float(fs.cumulative_rate(fs.Polynomial(), t, h)), 3)
    >>> gbar(0.5, 0.25), gbar(0.5, 0.01)
    (2.773, 2.02)

    Args:
      schedule: kappa.
      t, h: times and widths that broadcast against each other, h > 0; t+h is capped at 1.
      floor: minimum of 1 - kappa, which keeps the rate finite when a step reaches t=1.

    Returns:
      float32, 1/time.
    """
    return log_survival(schedule, t, h, floor=floor) / _f32(h)


def bounded_cumulative_rate(
    schedule: Schedule, t: jax.Array, h: jax.Array, *, floor: float
) -> jax.Array:
    """gbar(t,h) of the rate kappa' / max(1-kappa, floor), for bounded loss weights.

    This is the exact integral over the step, divided by h. It is additive like gbar, at most
    kappa' / floor, and equals gbar if the step ends before 1-kappa reaches the floor. (Flooring
    both terms of gbar's logarithm would give zero weight to steps beyond that point.)
    """
    end = jnp.minimum(_f32(t) + _f32(h), 1.0)
    start_left, end_left = schedule.remaining(t), schedule.remaining(end)
    above = jnp.log(jnp.maximum(start_left, floor) / jnp.maximum(end_left, floor))
    below = (jnp.minimum(start_left, floor) - jnp.minimum(end_left, floor)) / floor
    return (above + below) / _f32(h)


def redraw_fraction(
    schedule: Schedule, t: jax.Array, h: jax.Array, *, floor: float = FLOOR
) -> jax.Array:
    """beta(t,h), the probability that the exact kernel of the path resamples a position.

    beta = (kappa(t+h) - kappa(t)) / (1 - kappa(t)), arXiv:2407.15595 section 3.

    >>> import fsdfm_jax as fs
    >>> float(fs.redraw_fraction(fs.Polynomial(), 0.5, 0.25))
    0.5

    Args:
      schedule: kappa.
      t, h: times and widths that broadcast against each other; t+h is capped at 1.
      floor: minimum of 1 - kappa(t).

    Returns:
      float32 in [0, 1].
    """
    end = jnp.minimum(_f32(t) + _f32(h), 1.0)
    left = jnp.maximum(schedule.remaining(t), floor)
    return jnp.clip(1.0 - schedule.remaining(end) / left, 0.0, 1.0)
