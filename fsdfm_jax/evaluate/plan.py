"""What is evaluated: one point is a model sampled in one way, or a text to compare with."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fsdfm_jax.evaluate import models as models_lib
from fsdfm_jax.evaluate import tasks
from fsdfm_jax.flow import jumps, sampler
from fsdfm_jax.inference import generate as generate_lib

REAL = "held-out text"
# Texts that have some of the virtues of good samples and not the others.
CONTROLS = {
    "unigram": "unigram control",
    "ngram": "n-gram control",
    "shuffled": "shuffled control",
    "repeated": "repeated control",
}
WEIGHTS = ("ema", "student")


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of a report.

    Attributes:
      kind: "real" | "control" | "model".
      group: what a curve in the pictures joins, "pretrain (cumulative)".
      source: label of the model, or name of the control; "real" for held-out text.
      task: see `tasks`.
      stage: of the model; None, as all that follow, for texts that no model writes.
      steps: network calls per sample.
      jump, grid: rule of the jumps and shape of the time grid; None for an autoregressive model.
      temperature, top_p: of the draws.
      cooling, look_ahead, neighbours: see `sampler.sample`, the last one by its strength; None for
        an autoregressive model.
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
    steps: int | None = None
    jump: str | None = None
    grid: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    cooling: float | None = None
    look_ahead: float | None = None
    neighbours: float | None = None
    weights: str | None = None
    memory: str | None = None
    seed: int | None = None

    @property
    def setting(self) -> str:
        """Name of all but the seed; points of one setting are repeats."""
        parts = [self.source if self.kind != "control" else f"control-{self.source}"]
        if self.kind == "model":
            parts += [f"{self.steps}steps", self.jump, self.grid, f"T{self.temperature:.9g}"]
            parts += [f"p{self.top_p:.9g}" if self.top_p < 1 else None]
            parts += [f"c{self.cooling:.9g}" if self.cooling else None]
            parts += [f"a{self.look_ahead:.9g}" if self.look_ahead else None]
            parts += [f"n{self.neighbours:.9g}" if self.neighbours else None]
            parts += [self.weights if self.weights != "ema" else None]
            parts += ["anew" if self.memory == "none" else None]
        parts += [self.task if self.task != tasks.UNCONDITIONAL else None]
        return re.sub(r"[^\w.]+", "-", "-".join(part for part in parts if part))

    @property
    def slug(self) -> str:
        """File name of the point's samples."""
        return self.setting if self.seed is None else f"{self.setting}-s{self.seed}"


class Settings(NamedTuple):
    """`config.eval`, checked; its keys are described in configs/base.py."""

    num_samples: int
    batch_size: int
    steps: tuple[int, ...]
    many_steps: int
    jumps: tuple[str, ...]
    few_step_jump: str
    grid: str
    temperature: float
    top_p: float
    cooling: float
    look_ahead: float
    neighbours: float
    weights: str
    seed: int
    task: str
    memories: tuple[str, ...]
    controls: tuple[str, ...]
    models: str
    judges: tuple[str, ...]
    watched: int
    bound_samples: int
    bound_times: int
    resamples: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Settings":
        """Takes the fields out of `config.eval`.

        Raises:
          ValueError: for values that can't be evaluated with, naming the key.
        """
        values = {name: config[name] for name in cls._fields}
        for name in ("steps", "jumps", "memories", "controls"):
            values[name] = tuple(values[name])
        values["judges"] = tuple(j.strip() for j in values["judges"].split(",") if j.strip())
        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        for name, least in {
            **dict.fromkeys(("num_samples", "batch_size", "many_steps"), 1),
            **dict.fromkeys(("watched", "bound_samples"), 0),
            **dict.fromkeys(("bound_times", "resamples"), 2),
        }.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"eval.{name} must be at least {least}, got {getattr(self, name)}."
                )
        if min(self.steps, default=1) < 1:
            raise ValueError(f"eval.steps must be at least 1, got {self.steps}.")
        for name, allowed, values in (
            ("jumps", jumps.RULES, self.jumps),
            ("few_step_jump", jumps.RULES, (self.few_step_jump,)),
            ("memories", generate_lib.MEMORIES, self.memories),
            ("controls", CONTROLS, self.controls),
            ("weights", WEIGHTS, (self.weights,)),
        ):
            check_names(f"eval.{name}", allowed, values)
        if not self.jumps:
            raise ValueError("eval.jumps is empty; give at least one rule for the base model.")
        names = ("seed", "temperature", "top_p", "cooling", "look_ahead", "neighbours")
        check_draws("eval", **{name: (getattr(self, name),) for name in names})
        check_grids("eval", (self.grid,), (*self.steps, self.many_steps))
        check_rules("eval", (self.neighbours,), (self.few_step_jump,))
        tasks.parse(self.task)
        models_lib.parse_models(self.models)


def check_names(key: str, allowed: Iterable[str], values: Iterable[str]) -> None:
    """ValueError naming the first value that isn't allowed."""
    unknown = [value for value in values if value not in allowed]
    if unknown:
        raise ValueError(
            f"{key} names the unknown {unknown[0]!r}; expected one of {', '.join(allowed)}."
        )


def check_draws(section: str, **values: Iterable[float]) -> None:
    """ValueError for the first value that no sample can be drawn with, naming the section.

    Args:
      section: of the config.
      **values: values by the arguments of `inference.check_settings`.
    """
    try:
        for name, listed in values.items():
            for value in listed:
                generate_lib.check_settings(**{name: value})
    except ValueError as error:
        raise ValueError(f"{section}: {error}") from None


def check_rules(key: str, strengths: Iterable[float], rules: Iterable[str]) -> None:
    """ValueError for the first jump rule that heeds no neighbours, where one is to."""
    try:
        for name in rules if any(strengths) else ():
            jumps.check_redraw(jumps.get_rule(name))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def check_grids(key: str, grids: Iterable[str], steps: Iterable[int]) -> None:
    """ValueError for the first grid that can't be made with one of the numbers of steps."""
    for grid, count in itertools.product(grids, steps):
        try:
            sampler.make_grid(grid, count)
        except ValueError as error:
            raise ValueError(f"{key}: grid {grid!r} with {count} steps: {error}") from None


def texts_to_compare(settings: Settings) -> list[Point]:
    """Held-out text and the naive controls."""
    real = Point("real", REAL, "real", settings.task)
    controls = [
        Point("control", CONTROLS[name], name, settings.task, seed=settings.seed)
        for name in dict.fromkeys(settings.controls)
    ]
    return [real, *controls]


def plan(settings: Settings, stage_of: Mapping[str, str], length: int) -> list[Point]:
    """All points of a report, best reference first.

    The base model is sampled by each rule of `eval.jumps` on a uniform grid, without `cooling`,
    `look_ahead` or `neighbours` (temperature and nucleus are those of all rows). If the few-step
    models are sampled otherwise, it is sampled so too: what the sampler brings is seen apart from
    what training does.

    Args:
      settings: what was asked for.
      stage_of: label -> stage of the models, in order.
      length: tokens of a block, which is what an autoregressive model takes network calls.
    """
    result = texts_to_compare(settings)
    how = {"temperature": settings.temperature, "top_p": settings.top_p}
    how |= {"weights": settings.weights, "seed": settings.seed, "task": settings.task}
    left_to_right = tasks.parse(settings.task).left_to_right
    for label, stage in stage_of.items():
        if stage == "autoregressive":
            for memory in settings.memories * left_to_right:
                group = label if memory == "cache" else f"{label} (no cache)"
                own = {"stage": stage, "steps": length, "memory": memory}
                result.append(Point("model", group, label, **own, **how))
            continue

        def add(group, steps, sampled, label=label, stage=stage):
            own = {"stage": stage, "steps": steps} | sampled
            result.append(Point("model", group, label, **own, **how))

        names = ("grid", "cooling", "look_ahead", "neighbours")
        few_step = {name: getattr(settings, name) for name in names}
        few_step |= {"jump": settings.few_step_jump}
        if stage == "pretrain":
            plain = dict.fromkeys(names, 0.0) | {"grid": "uniform"}
            first = settings.jumps[0]
            add(f"{label} ({first})", settings.many_steps, plain | {"jump": first})
            for jump, steps in itertools.product(settings.jumps, settings.steps):
                add(f"{label} ({jump})", steps, plain | {"jump": jump})
            if few_step not in [plain | {"jump": jump} for jump in settings.jumps]:
                for steps in settings.steps:
                    add(f"{label} (few-step sampler)", steps, few_step)
        else:
            for steps in settings.steps:
                add(label, steps, few_step)
    return list(dict.fromkeys(result))


class Axes(NamedTuple):
    """What a sweep varies; each a list of values, see configs/sweep.py."""

    models: tuple[str, ...]
    steps: tuple[int, ...]
    jumps: tuple[str, ...]
    grids: tuple[str, ...]
    temperatures: tuple[float, ...]
    top_ps: tuple[float, ...]
    coolings: tuple[float, ...]
    look_aheads: tuple[float, ...]
    neighbours: tuple[float, ...]
    weights: tuple[str, ...]
    seeds: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Axes":
        """Takes the axes out of a sweep's `config.axes`.

        Raises:
          ValueError: for an empty axis or a value that can't be sampled with, naming the axis.
        """
        axes = cls(**{name: tuple(config[name]) for name in cls._fields})
        for name, values in axes._asdict().items():
            if not values and name != "models":
                raise ValueError(f"axes.{name} is empty; give at least one value.")
        if min(axes.steps) < 1:
            raise ValueError(f"axes.steps must be at least 1, got {axes.steps}.")
        check_names("axes.jumps", jumps.RULES, axes.jumps)
        check_names("axes.weights", WEIGHTS, axes.weights)
        check_draws(
            "axes",
            seed=axes.seeds,
            temperature=axes.temperatures,
            top_p=axes.top_ps,
            cooling=axes.coolings,
            look_ahead=axes.look_aheads,
            neighbours=axes.neighbours,
        )
        check_rules("axes", axes.neighbours, axes.jumps)
        check_grids("axes", axes.grids, axes.steps)
        return axes


def sweep(axes: Axes, settings: Settings, stage_of: Mapping[str, str], length: int) -> list[Point]:
    """The product of the axes, after the texts to compare with.

    An autoregressive model has neither steps to choose nor jumps nor grids: it is there once for
    each of the other axes.

    Raises:
      ValueError: if an axis names a model that isn't there.
    """
    chosen = axes.models or tuple(stage_of)
    check_names("axes.models", tuple(stage_of), chosen)
    left_to_right = tasks.parse(settings.task).left_to_right
    result = texts_to_compare(settings)
    for label, grid, jump, cooling, look_ahead, neighbours, top_p, weights in itertools.product(
        chosen,
        axes.grids,
        axes.jumps,
        axes.coolings,
        axes.look_aheads,
        axes.neighbours,
        axes.top_ps,
        axes.weights,
    ):
        causal = stage_of[label] == "autoregressive"
        if causal and not left_to_right:
            continue
        details = [] if causal else [jump] * (len(axes.jumps) > 1 or stage_of[label] == "pretrain")
        details += [grid] * (not causal and len(axes.grids) > 1)
        details += [f"cooling {cooling:g}"] * (not causal and len(axes.coolings) > 1)
        details += [f"look-ahead {look_ahead:g}"] * (not causal and len(axes.look_aheads) > 1)
        details += [f"neighbours {neighbours:g}"] * (not causal and len(axes.neighbours) > 1)
        details += [f"top-p {top_p:g}"] * (len(axes.top_ps) > 1)
        details += [weights] * (len(axes.weights) > 1)
        group = label + (f" ({', '.join(details)})" if details else "")
        for steps, temperature, seed in itertools.product(
            axes.steps, axes.temperatures, axes.seeds
        ):
            how = {"temperature": temperature, "top_p": top_p, "weights": weights, "seed": seed}
            if causal:
                how |= {"steps": length, "memory": "cache"}
            else:
                how |= {"steps": steps, "jump": jump, "grid": grid}
                how |= {"cooling": cooling, "look_ahead": look_ahead, "neighbours": neighbours}
            how |= {"task": settings.task, "stage": stage_of[label]}
            result.append(Point("model", group, label, **how))
    return list(dict.fromkeys(result))


def share(points: Sequence[Point], index: int, count: int) -> list[Point]:
    """The points that machine `index` of `count` takes: every `count`-th."""
    return list(points[index::count])
