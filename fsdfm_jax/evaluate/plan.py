"""Plan an evaluation: each point is a model with sampler settings, or a reference text."""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fsdfm_jax import schema
from fsdfm_jax.evaluate import models as models_lib
from fsdfm_jax.evaluate import tasks
from fsdfm_jax.flow.sampling import Sampling

REAL = "held-out text"
# Controls: texts with some qualities of good samples but not others.
CONTROLS = {
    "unigram": "unigram control",
    "ngram": "n-gram control",
    "shuffled": "shuffled control",
    "repeated": "repeated control",
    "one": "one block control",
    "few": "few blocks control",
}
# Also in `eval.controls`: the base model at this temperature, a sharpened sampler.
COLD, COLD_TEMPERATURE = "cold", 0.5
SAMPLING_FIELDS = tuple(Sampling().to_dict())


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of a report.

    Attributes:
      kind: "real" | "control" | "model".
      group: points of one curve in the pictures, "pretrain (euler)", see `label`.
      source: label of the model, or name of the control; "real" for held-out text.
      task: see `tasks`.
      stage: of the model. This and all following attributes are None for texts not from a model.
      sampling: settings; for an autoregressive model only temperature and top_p apply, and steps is
        the block length.
      weights: "ema" (or the student's if the stage has no EMA) | "student".
      memory: of an autoregressive model, "cache" | "none"; None for other models.
      seed: for all randomness.
    """

    kind: str
    group: str
    source: str
    task: str = tasks.UNCONDITIONAL
    stage: str | None = None
    sampling: Sampling | None = None
    weights: str | None = None
    memory: str | None = None
    seed: int | None = None

    @property
    def causal(self) -> bool:
        """Whether it is from an autoregressive model."""
        return self.stage == "autoregressive"

    def described(self) -> dict[str, Any]:
        """Return the sampler settings as fields of a row; None for those that don't apply."""
        if self.sampling is None:
            return dict.fromkeys(SAMPLING_FIELDS)
        values = self.sampling.to_dict()
        unused = ("jump", "grid", "cooling", "look_ahead") if self.causal else ()
        return values | dict.fromkeys(unused)

    @property
    def setting(self) -> str:
        """Name of everything except the seed; points with equal settings are repeats."""
        parts = [self.source if self.kind != "control" else f"control-{self.source}"]
        if self.kind == "model":
            values = self.described()
            parts += [f"{values['steps']}steps", values["jump"], values["grid"]]
            parts += [f"T{values['temperature']:.9g}"]
            parts += [f"p{values['top_p']:.9g}" if values["top_p"] < 1 else None]
            parts += [f"c{values['cooling']:.9g}" if values["cooling"] else None]
            parts += [f"a{values['look_ahead']:.9g}" if values["look_ahead"] else None]
            parts += [self.weights if self.weights != "ema" else None]
            parts += ["anew" if self.memory == "none" else None]
        parts += [self.task if self.task != tasks.UNCONDITIONAL else None]
        return re.sub(r"[^\w.]+", "-", "-".join(part for part in parts if part))

    @property
    def slug(self) -> str:
        """Base name of the point's sample files."""
        return self.setting if self.seed is None else f"{self.setting}-s{self.seed}"


def label(source: str, sampling: Sampling, weights: str = "ema", memory: str | None = None) -> str:
    """Label of a model and its sampler, without steps and temperature.

    It names all differences from the published sampler, so a label identifies a sampler:

    >>> label("distill", Sampling(steps=4)), label("distill", Sampling(jump="euler", cooling=0.5))
    ('distill', 'distill (euler, cooling 0.5)')

    Args:
      source: label of the model.
      sampling: settings.
      weights, memory: as in `Point`.
    """
    plain = Sampling()
    details = [getattr(sampling, key) for key in ("jump", "grid")]
    details = [v for v, usual in zip(details, (plain.jump, plain.grid), strict=True) if v != usual]
    details += [f"cooling {sampling.cooling:g}"] if sampling.cooling else []
    details += [f"look-ahead {sampling.look_ahead:g}"] if sampling.look_ahead else []
    details += [] if sampling.top_p is None else [f"top-p {sampling.top_p:g}"]
    details += [weights] if weights != "ema" else []
    details += ["no cache"] if memory == "none" else []
    return source + (f" ({', '.join(details)})" if details else "")


class Settings(NamedTuple):
    """`config.eval`, checked; configs/base.py documents the keys."""

    num_samples: int
    batch_size: int
    steps: tuple[int, ...]
    many_steps: int
    jumps: tuple[str, ...]
    sampling: Sampling
    weights: str
    seed: int
    task: str
    memories: tuple[str, ...]
    controls: tuple[str, ...]
    models: str
    judges: tuple[str, ...]
    law: str
    watched: int
    bound_samples: int
    bound_times: int
    resamples: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Read the fields from `config.eval`.

        Raises:
          ValueError: for an invalid value, naming the key.
        """
        schema.check_section("eval", config)
        values = {name: config[name] for name in cls._fields}
        for name in ("steps", "jumps", "memories", "controls"):
            values[name] = tuple(values[name])
        values["judges"] = tuple(j.strip() for j in values["judges"].split(",") if j.strip())
        with _named("eval.sampling"):
            values["sampling"] = Sampling.from_dict(values["sampling"])
        settings = cls(**values)
        for steps in (*settings.steps, settings.many_steps):
            with _named("eval.steps"):  # a grid may have too many for float32
                settings.sampling.replace(steps=steps)
        tasks.parse(settings.task)
        models_lib.parse_models(settings.models)
        return settings


def check_names(key: str, allowed: Iterable[str], values: Iterable[str]) -> None:
    """Raise ValueError naming the first value that isn't allowed."""
    unknown = [value for value in values if value not in allowed]
    if unknown:
        raise ValueError(
            f"{key} has the unknown {unknown[0]!r}; expected one of {', '.join(allowed)}."
        )


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """Put a config key before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def texts_to_compare(settings: Settings) -> list[Point]:
    """Points for held-out text and the naive controls."""
    real = Point("real", REAL, "real", settings.task)
    controls = [
        Point("control", CONTROLS[name], name, settings.task, seed=settings.seed)
        for name in dict.fromkeys(settings.controls)
        if name != COLD
    ]
    return [real, *controls]


def plan(settings: Settings, stage_of: Mapping[str, str], length: int) -> list[Point]:
    """Plan all points of a report, references first.

    The base model is sampled with each rule of `eval.jumps` on a uniform grid at the temperature
    and nucleus of all rows, and with `eval.sampling`. This separates the effect of the sampler from
    that of training. The control "cold" is the base model too.

    Args:
      settings: of the evaluation.
      stage_of: label -> stage of the models, in order.
      length: tokens of a block, the number of network calls of an autoregressive model.
    """
    result = texts_to_compare(settings)
    how = {"weights": settings.weights, "seed": settings.seed, "task": settings.task}
    left_to_right = tasks.parse(settings.task).left_to_right
    plain = Sampling(temperature=settings.sampling.temperature, top_p=settings.sampling.top_p)

    def add(source, sampling, memory=None):
        group = label(source, sampling, settings.weights, memory)
        own = {"stage": stage_of[source], "sampling": sampling, "memory": memory}
        result.append(Point("model", group, source, **own, **how))

    for source, stage in stage_of.items():
        few_step = [settings.sampling.replace(steps=steps) for steps in settings.steps]
        if stage == "autoregressive":
            for memory in settings.memories * left_to_right:
                add(source, plain.replace(steps=length), memory)
            continue
        if stage == "pretrain":
            by_rule = [plain.replace(jump=jump) for jump in settings.jumps]
            add(source, by_rule[0].replace(steps=settings.many_steps))
            for rule, steps in itertools.product(by_rule, settings.steps):
                add(source, rule.replace(steps=steps))
            if COLD in settings.controls:
                most = max(settings.steps, default=settings.many_steps)
                add(source, by_rule[0].replace(steps=most, temperature=COLD_TEMPERATURE))
        for sampling in few_step:
            add(source, sampling)
    return list(dict.fromkeys(result))


_AROUND = {
    "jumps": "jump",
    "grids": "grid",
    "top_ps": "top_p",
    "coolings": "cooling",
    "look_aheads": "look_ahead",
}  # axes that may be empty -> their default, a field of `settings.sampling`


class Axes(NamedTuple):
    """The axes of a sweep, each a list of values, see configs/sweep.py.

    Empty `models` means all models. Other empty axes (those of `_AROUND`) take the value of the
    base sampler.
    """

    models: tuple[str, ...]
    steps: tuple[int, ...]
    jumps: tuple[str, ...]
    grids: tuple[str, ...]
    temperatures: tuple[float, ...]
    top_ps: tuple[float, ...]
    coolings: tuple[float, ...]
    look_aheads: tuple[float, ...]
    weights: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Axes":
        """Read the axes from a sweep's `config.axes`.

        Raises:
          ValueError: for an empty axis or an invalid value, naming the axis.
        """
        schema.check_section("axes", config)
        axes = cls(**{name: tuple(config[name]) for name in cls._fields})
        with _named("axes"):
            axes.samplings(Sampling())
        return axes

    def samplings(self, around: Sampling) -> list[Sampling]:
        """The product of the sampling axes, grouped by everything except steps and temperature;
        empty axes take the values of `around`."""
        axes = {name: getattr(self, axis) for axis, name in _AROUND.items()}
        values = {name: axis or (getattr(around, name),) for name, axis in axes.items()}
        values |= {"steps": self.steps, "temperature": self.temperatures}
        product = itertools.product(*values.values())
        return [Sampling(**dict(zip(values, chosen, strict=True))) for chosen in product]


def sweep(axes: Axes, settings: Settings, stage_of: Mapping[str, str], length: int) -> list[Point]:
    """Plan a sweep: reference texts, then the product of the axes.

    An autoregressive model has no choice of steps, jumps or grids, so it occurs once for each
    combination of the other axes. Empty axes default to `settings.sampling`.

    Raises:
      ValueError: if an axis names a model that doesn't exist.
    """
    chosen = axes.models or tuple(stage_of)
    check_names("axes.models", tuple(stage_of), chosen)
    left_to_right = tasks.parse(settings.task).left_to_right
    result = texts_to_compare(settings)
    for source, weights, sampling, seed in itertools.product(
        chosen, axes.weights, axes.samplings(settings.sampling), axes.seeds
    ):
        stage, memory = stage_of[source], None
        if stage == "autoregressive":
            if not left_to_right:
                continue
            sampling = Sampling(length, temperature=sampling.temperature, top_p=sampling.top_p)
            memory = "cache"
        group = label(source, sampling, weights, memory)
        how = {"weights": weights, "memory": memory, "seed": seed, "task": settings.task}
        result.append(Point("model", group, source, stage=stage, sampling=sampling, **how))
    return list(dict.fromkeys(result))


def share(points: Sequence[Point], index: int, count: int) -> list[Point]:
    """Return the points for machine `index` of `count`: every `count`-th."""
    return list(points[index::count])
