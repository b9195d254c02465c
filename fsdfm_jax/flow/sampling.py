"""`Sampling`: how samples are drawn from a model, as one value from a config to the scan.

    denoise = sampling.wrap(denoise)                       what the network's posterior becomes
    jump    = process.make_jump(sampling.rule)             how positions move
    x1      = sample(key, denoise, jump, process.finalize, x0, sampling.times())

The defaults are the published sampler (arXiv:2509.20624 App. B.1): eq. 4.3 on a uniform grid. What
else a `Sampling` can say are wrappers, denoise -> denoise: `annealed`, `midpoint`, `nucleus`.
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

# At temperatures below this every draw takes the likeliest token.
GREEDY = 1e-6
MAX_STEPS = 2**20


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "cooling", "top_p", "look_ahead"],
    meta_fields=["steps", "jump", "grid"],
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How samples are drawn from a few-step model.

    A pytree: steps, jump and grid are static under jit, the numbers are data and don't recompile.
    An autoregressive model uses `temperature` and `top_p` alone.

    >>> import fsdfm_jax as fs
    >>> fs.Sampling(steps=4).times().tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    >>> fs.Sampling(steps=4, temperature=0.9).to_dict()["temperature"]
    0.9
    >>> fs.Sampling(cooling=2.0)
    Traceback (most recent call last):
    ...
    ValueError: Sampling.cooling must lie in [0, 1), got 2.0.

    Attributes:
      steps: S, network calls of a sample.
      jump: rule of the first S-1 steps, a name of `jumps.RULES`.
      grid: name of the time grid, see `grids.make_grid`.
      temperature: divides the logits; 0 takes the likeliest token in every draw.
      cooling: c in [0, 1), temperature annealing: a step that begins at time t draws at
        temperature (1 - c t), see `annealed`.
      top_p: share of the posterior's mass that is drawn from, in (0, 1], see `logits.nucleus`;
        None, as 1, keeps all of it and costs nothing.
      look_ahead: a in [0, 1], see `midpoint`.

    Raises:
      ValueError: for a value of another type or outside its range.
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
        """The jump rule by its name."""
        return jumps.get_rule(self.jump)

    def times(self) -> np.ndarray:
        """The time grid, float32 [S+1]."""
        return grids.make_grid(self.grid, self.steps)

    def wrap(self, denoise: Denoise, *, mask_id: int | None = None) -> Denoise:
        """The network as the sampler asks it: at the midpoint, annealed, cut to the nucleus.

        Args:
          denoise: (x_BL, t_B, h_B) -> logits.
          mask_id: of a mask source, which no step draws: it is excluded before the nucleus.
        """
        denoise = annealed(midpoint(denoise, self.look_ahead), self.temperature, self.cooling)
        if self.top_p is None:
            return denoise
        return nucleus(denoise, self.top_p, mask_id=mask_id)

    def replace(self, **changes: Any) -> "Sampling":
        """A copy with other values."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `from_dict` reads them."""
        values = dataclasses.asdict(self)
        return values | {"top_p": 1.0 if self.top_p is None else self.top_p}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Sampling":
        """Reads fields by name; what is missing is as published.

        Raises:
          ValueError: for an unknown name, with the nearest known one, or a bad value.
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
        """The sampler of arXiv:2509.20624: cumulative scalar, uniform grid, temperature 1."""
        return cls(steps=steps)


def annealed(
    denoise: Denoise, temperature: jax.Array | float = 1.0, cooling: jax.Array | float = 0.0
) -> Denoise:
    """Divides the logits by temperature (1 - cooling t), t the time at which the step begins.

    Early draws decide what the text is about; late draws have to agree with what is there.

    >>> import fsdfm_jax as fs, jax.numpy as jnp
    >>> ones = lambda x_BL, t_B, h_B: jnp.ones((*x_BL.shape, 3))
    >>> denoise = fs.annealed(ones, temperature=0.5, cooling=0.75)
    >>> x_BL, h_B = jnp.zeros((1, 1), int), jnp.full((1,), 0.5)
    >>> [float(denoise(x_BL, jnp.full((1,), t), h_B)[0, 0, 0]) for t in (0.0, 1.0)]
    [2.0, 8.0]

    Args:
      denoise: (x_BL, t_B, h_B) -> logits; all rows are at one time.
      temperature: at t=0; 0 takes the likeliest token.
      cooling: in [0, 1): the temperature at t=1 is (1 - cooling) of that at t=0.

    Returns:
      A function like `denoise`.
    """

    def divided(x_BL, t_B, h_B):
        # All rows of a step share its time.
        step_temperature = jnp.maximum(temperature * (1.0 - cooling * t_B[0]), GREEDY)
        return logits_lib.divide(denoise(x_BL, t_B, h_B), step_temperature)

    return divided


def midpoint(denoise: Denoise, look_ahead: jax.Array | float) -> Denoise:
    """Evaluates a step from t to t+h at the time t + a h in place of t; 1/2 is the midpoint.

    >>> import fsdfm_jax as fs, jax.numpy as jnp
    >>> shows_time = lambda x_BL, t_B, h_B: t_B
    >>> fs.midpoint(shows_time, 0.5)(None, jnp.array([0.25]), jnp.array([0.5])).tolist()
    [0.5]

    Args:
      denoise: (x_BL, t_B, h_B) -> logits.
      look_ahead: a, in [0, 1]; 0 changes nothing.

    Returns:
      A function like `denoise`.
    """
    return lambda x_BL, t_B, h_B: denoise(x_BL, t_B + look_ahead * h_B, h_B)


def nucleus(denoise: Denoise, top_p: jax.Array | float, *, mask_id: int | None = None) -> Denoise:
    """Keeps the likeliest tokens of each posterior (nucleus sampling, arXiv:1904.09751).

    >>> import fsdfm_jax as fs, jax, jax.numpy as jnp
    >>> denoise = lambda x_BL, t_B, h_B: jnp.log(jnp.array([[[0.5, 0.25, 0.125, 0.125]]]))
    >>> logits_BLV = fs.nucleus(denoise, top_p=0.75)(None, None, None)
    >>> jnp.round(jax.nn.softmax(logits_BLV), 2)[0, 0].tolist()[2:]
    [0.0, 0.0]

    Args:
      denoise: (x_BL, t_B, h_B) -> logits.
      top_p: share of the mass to keep, in (0, 1].
      mask_id: token of a mask source, excluded first: no step draws it.

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
        raise ValueError(
            f"Sampling.{name} must be a whole number in [1, {MAX_STEPS}], got {value!r}."
        )


def _check_number(name: str, value: Any, interval: str, is_inside: Callable[[Any], bool]) -> None:
    # Under jit a field is a tracer, and any object at all while a tree is rebuilt.
    if value is not None and not isinstance(value, bool | int | float | str | np.generic):
        return
    inside = False
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        with np.errstate(over="ignore"):
            # As it is computed with: float32 may round into the interval's open end.
            inside = is_inside(float(value)) and is_inside(np.float32(value))
    if not inside:
        raise ValueError(f"Sampling.{name} must lie in {interval}, got {value!r}.")
