"""What is evaluated: one point is a model sampled in one way, or a text to compare with."""

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
# Texts that have some of the virtues of good samples and not the others.
CONTROLS = {
    "unigram": "unigram control",
    "ngram": "n-gram control",
    "shuffled": "shuffled control",
    "repeated": "repeated control",
    "one": "one block control",
    "few": "few blocks control",
}
# In `eval.controls` as well: the base model at this temperature, a sharpened sampler.
COLD, COLD_TEMPERATURE = "cold", 0.5
SAMPLING_FIELDS = tuple(Sampling().to_dict())


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of a report.

    Attributes:
      kind: "real" | "control" | "model".
      group: what a curve in the pictures joins, "pretrain (euler)", see `label`.
      source: label of the model, or name of the control; "real" for held-out text.
      task: see `tasks`.
      stage: of the model; None, as all that follow, for texts that no model writes.
      sampling: how it is sampled; of an autoregressive model temperature and top_p matter alone,
        and steps is the length of a block.
      weights: "ema" (as the stage uses them) | "student".
      memory: what an autoregressive model keeps of the tokens so far, "cache" | "none"; None for
        other models.
      seed: of everything random.
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
        """Whether an autoregressive model writes it."""
        return self.stage == "autoregressive"

    def described(self) -> dict[str, Any]:
        """The sampler as fields of a row; None for what a text or its model doesn't have."""
        if self.sampling is None:
            return dict.fromkeys(SAMPLING_FIELDS)
        values = self.sampling.to_dict()
        unused = ("jump", "grid", "cooling", "look_ahead") if self.causal else ()
        return values | dict.fromkeys(unused)

    @property
    def setting(self) -> str:
        """Name of all but the seed; points of one setting are repeats."""
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
        """File name of the point's samples."""
        return self.setting if self.seed is None else f"{self.setting}-s{self.seed}"


def label(source: str, sampling: Sampling, weights: str = "ema", memory: str | None = None) -> str:
    """A model and its sampler but for steps and temperature, the same in every report and sweep.

    What differs from the published sampler is named, so that one label means one sampler:

    >>> label("distill", Sampling(steps=4)), label("distill", Sampling(jump="euler", cooling=0.5))
    ('distill', 'distill (euler, cooling 0.5)')

    Args:
      source: label of the model.
      sampling: how it is sampled.
      weights, memory: as of a `Point`.
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
    """`config.eval`, checked; its keys are described in configs/base.py."""

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
        """Take the fields out of `config.eval`.

        Raises:
          ValueError: for values that can't be evaluated with, naming the key.
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
    """ValueError naming the first value that isn't allowed."""
    unknown = [value for value in values if value not in allowed]
    if unknown:
        raise ValueError(
            f"{key} names the unknown {unknown[0]!r}; expected one of {', '.join(allowed)}."
        )


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """Put a config key before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def texts_to_compare(settings: Settings) -> list[Point]:
    """Held-out text and the naive controls."""
    real = Point("real", REAL, "real", settings.task)
    controls = [
        Point("control", CONTROLS[name], name, settings.task, seed=settings.seed)
        for name in dict.fromkeys(settings.controls)
        if name != COLD
    ]
    return [real, *controls]


def plan(settings: Settings, stage_of: Mapping[str, str], length: int) -> list[Point]:
    """All points of a report, best reference first.

    The base model is sampled by each rule of `eval.jumps` on a uniform grid at a fixed temperature
    (which, with the nucleus, is that of all rows), and by `eval.sampling`: what the sampler brings
    is seen apart from what training does. The control "cold" is the base model as well.

    Args:
      settings: what was asked for.
      stage_of: label -> stage of the models, in order.
      length: tokens of a block, which is what an autoregressive model takes network calls.
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
}  # axes that may be empty -> the field of `settings.sampling` that they then take


class Axes(NamedTuple):
    """What a sweep varies; each a list of values, see configs/sweep.py.

    Empty `models` are all of them; the axes of `_AROUND`, where empty, have the value of the
    sampler that the sweep is made around.
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
        """Take the axes out of a sweep's `config.axes`.

        Raises:
          ValueError: for an empty axis or a value that can't be sampled with, naming the axis.
        """
        schema.check_section("axes", config)
        axes = cls(**{name: tuple(config[name]) for name in cls._fields})
        with _named("axes"):
            axes.samplings(Sampling())
        return axes

    def samplings(self, around: Sampling) -> list[Sampling]:
        """The product of the axes that say how to sample, grouped by all but steps and
        temperature; `around` has the values of those that are empty."""
        axes = {name: getattr(self, axis) for axis, name in _AROUND.items()}
        values = {name: axis or (getattr(around, name),) for name, axis in axes.items()}
        values |= {"steps": self.steps, "temperature": self.temperatures}
        product = itertools.product(*values.values())
        return [Sampling(**dict(zip(values, chosen, strict=True))) for chosen in product]


def sweep(axes: Axes, settings: Settings, stage_of: Mapping[str, str], length: int) -> list[Point]:
    """The product of the axes, after the texts to compare with.

    An autoregressive model has neither steps to choose nor jumps nor grids: it is there once for
    each of the other axes. Axes that are empty are as `settings.sampling` says.

    Raises:
      ValueError: if an axis names a model that isn't there.
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
    """The points that machine `index` of `count` takes: every `count`-th."""
    return list(points[index::count])
