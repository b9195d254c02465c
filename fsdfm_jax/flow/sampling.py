"""`Sampling`: all settings of the sampler in one value.

    denoise = sampling.wrap(denoise)                       transforms the network's posterior
    jump    = process.make_jump(sampling.rule)             moves positions
    x1      = sample(key, denoise, jump, process.finalize, x0, sampling.times())

The defaults are the published sampler (arXiv:2509.20624 App. B.1): eq. 4.3 on a uniform grid. The
other settings are wrappers denoise -> denoise: `annealed`, `midpoint`, `nucleus`.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.flow import grids, jumps
from fsdfm_jax.flow.jumps import JumpRule
from fsdfm_jax.flow.teacher import Denoise
from fsdfm_jax.ops import logits as logits_lib

# Lowest temperature: dividing by it makes every draw the argmax.
GREEDY = 1e-6
MAX_STEPS = 2**20


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "cooling", "top_p", "look_ahead"],
    meta_fields=["steps", "jump", "grid"],
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the sampler of a few-step model.

    A pytree: steps, jump and grid are static under jit; the numbers are data and don't recompile.
    An autoregressive model uses only `temperature` and `top_p`.

    >>> import fsdfm_jax as fs
    >>> fs.Sampling(steps=4).times().tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    >>> fs.Sampling(steps=4, temperature=0.9).to_dict()["temperature"]
    0.9
    >>> fs.Sampling(cooling=2.0)
    Traceback (most recent call last):
    ...
    ValueError: Sampling.cooling must be in [0, 1), got 2.0.

    Attributes:
      steps: S, network calls per sample.
      jump: rule of the first S-1 steps, a key of `jumps.RULES`.
      grid: name of the time grid, see `grids.make_grid`.
      temperature: divides the logits; 0 is greedy (argmax).
      cooling: temperature annealing, c in [0, 1): a step that starts at time t uses
        temperature (1 - c t), see `annealed`.
      top_p: nucleus mass in (0, 1], see `logits.nucleus`; None or 1 disables it at no cost.
      look_ahead: midpoint evaluation, a in [0, 1], see `midpoint`.

    Raises:
      ValueError: for a value of the wrong type or out of range.
    """

    steps: int = 8
    jump: str = jumps.CUMULATIVE.name
    grid: str = "uniform"
    temperature: jax.Array | float = 1.0
    cooling: jax.Array | float = 0.0
    top_p: jax.Array | float | None = None
    look_ahead: jax.Array | float = 0.0

    def __post_init__(self):
        if isinstance(self.top_p, int | float) and self.top_p == 1:
            object.__setattr__(self, "top_p", None)
        _check_whole("steps", self.steps)
        if not isinstance(self.jump, str) or self.jump not in jumps.RULES:
            known = ", ".join(jumps.RULES)
            raise ValueError(f"Sampling.jump must be one of {known}; got {self.jump!r}.")
        try:
            self.times()
        except ValueError as error:
            raise ValueError(f"Sampling.grid: {error}") from None
        _check_number("temperature", self.temperature, "[0, inf)", lambda v: 0 <= v < np.inf)
        _check_number("cooling", self.cooling, "[0, 1)", lambda v: 0 <= v < 1)
        _check_number("look_ahead", self.look_ahead, "[0, 1]", lambda v: 0 <= v <= 1)
        if self.top_p is not None:
            _check_number("top_p", self.top_p, "(0, 1]", lambda v: 0 < v <= 1)

    @property
    def rule(self) -> JumpRule:
        """The jump rule."""
        return jumps.get_rule(self.jump)

    def times(self) -> np.ndarray:
        """Return the time grid, float32 [S+1]."""
        return grids.make_grid(self.grid, self.steps)

    def wrap(self, denoise: Denoise, *, mask_id: int | None = None) -> Denoise:
        """Wrap the network for the sampler: midpoint, then annealing, then nucleus.

        Args:
          denoise: (x_BL, t_B, h_B) -> logits.
          mask_id: of a mask source. No step draws it, so it is excluded before the nucleus.
        """
        denoise = annealed(midpoint(denoise, self.look_ahead), self.temperature, self.cooling)
        if self.top_p is None:
            return denoise
        return nucleus(denoise, self.top_p, mask_id=mask_id)

    def replace(self, **changes: Any) -> "Sampling":
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values; the inverse of `from_dict`."""
        values = dataclasses.asdict(self)
        return values | {"top_p": 1.0 if self.top_p is None else self.top_p}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Sampling":
        """Read fields by name; missing ones take the published values.

        Raises:
          ValueError: for a bad value or an unknown name; suggests the nearest known one.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}."
                raise ValueError(f"Sampling has no field {name!r}{hint}")
        return cls(**values)

    @classmethod
    def published(cls, steps: int = 8) -> "Sampling":
        """Return the sampler of arXiv:2509.20624: cumulative, uniform grid, temperature 1."""
        return cls(steps=steps)


def annealed(
    denoise: Denoise, temperature: jax.Array | float = 1.0, cooling: jax.Array | float = 0.0
) -> Denoise:
    """Divide the logits by temperature (1 - cooling t), with t the start time of the step.

    Early draws set the topic; late draws have to agree with the existing text.

    >>> import fsdfm_jax as fs, jax.numpy as jnp
    >>> ones = lambda x_BL, t_B, h_B: jnp.ones((*x_BL.shape, 3))
    >>> denoise = fs.annealed(ones, temperature=0.5, cooling=0.75)
    >>> x_BL, h_B = jnp.zeros((1, 1), int), jnp.full((1,), 0.5)
    >>> [float(denoise(x_BL, jnp.full((1,), t), h_B)[0, 0, 0]) for t in (0.0, 1.0)]
    [2.0, 8.0]

    Args:
      denoise: (x_BL, t_B, h_B) -> logits; all rows have the same time.
      temperature: at t=0; 0 is greedy.
      cooling: in [0, 1). The temperature at t=1 is (1 - cooling) times that at t=0.

    Returns:
      A function like `denoise`.
    """

    def divided(x_BL, t_B, h_B):
        # All rows of a step have the same time.
        step_temperature = jnp.maximum(temperature * (1.0 - cooling * t_B[0]), GREEDY)
        return logits_lib.divide(denoise(x_BL, t_B, h_B), step_temperature)

    return divided


def midpoint(denoise: Denoise, look_ahead: jax.Array | float) -> Denoise:
    """Evaluate the network at time t + a h instead of t; a = 1/2 is the midpoint of the step.

    >>> import fsdfm_jax as fs, jax.numpy as jnp
    >>> shows_time = lambda x_BL, t_B, h_B: t_B
    >>> fs.midpoint(shows_time, 0.5)(None, jnp.array([0.25]), jnp.array([0.5])).tolist()
    [0.5]

    Args:
      denoise: (x_BL, t_B, h_B) -> logits.
      look_ahead: a in [0, 1]; 0 disables it.

    Returns:
      A function like `denoise`.
    """
    return lambda x_BL, t_B, h_B: denoise(x_BL, t_B + look_ahead * h_B, h_B)


def nucleus(denoise: Denoise, top_p: jax.Array | float, *, mask_id: int | None = None) -> Denoise:
    """Keep only the most likely tokens of each posterior (nucleus sampling, arXiv:1904.09751).

    >>> import fsdfm_jax as fs, jax, jax.numpy as jnp
    >>> denoise = lambda x_BL, t_B, h_B: jnp.log(jnp.array([[[0.5, 0.25, 0.125, 0.125]]]))
    >>> logits_BLV = fs.nucleus(denoise, top_p=0.75)(None, None, None)
    >>> jnp.round(jax.nn.softmax(logits_BLV), 2)[0, 0].tolist()[2:]
    [0.0, 0.0]

    Args:
      denoise: (x_BL, t_B, h_B) -> logits.
      top_p: probability mass to keep, in (0, 1].
      mask_id: token of a mask source; excluded first because no step draws it.

    Returns:
      A function like `denoise`.
    """

    def cut(x_BL, t_B, h_B):
        logits = denoise(x_BL, t_B, h_B)
        if mask_id is not None:
            logits = logits_lib.exclude(logits, mask_id)
        return logits_lib.nucleus(logits, top_p)

    return cut


def _check_whole(name: str, value: Any) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not 1 <= value <= MAX_STEPS:
        raise ValueError(f"Sampling.{name} must be an integer in [1, {MAX_STEPS}], got {value!r}.")


def _check_number(name: str, value: Any, interval: str, is_inside: Callable[[Any], bool]) -> None:
    # Under jit a field is a tracer; while a pytree is rebuilt it can be any object.
    if value is not None and not isinstance(value, bool | int | float | str | np.generic):
        return
    inside = False
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        with np.errstate(over="ignore"):
            # Check the float32 value too: rounding may reach the open end of the interval.
            inside = is_inside(float(value)) and is_inside(np.float32(value))
    if not inside:
        raise ValueError(f"Sampling.{name} must be in {interval}, got {value!r}.")
