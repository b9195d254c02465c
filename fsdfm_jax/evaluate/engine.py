"""Compute points: draw, score, store with their stamps, pool over seeds and report.

A point is finished when its row is stored. A killed evaluation resumes with the next point, or
within a point with the next batch. Stored samples aren't drawn again: new figures are computed from
them, and only new judges score them.
"""

import functools
import itertools
import math
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fsdfm_jax.evaluate import bound as bound_lib
from fsdfm_jax.evaluate import draw, mauve, metrics, stamps, summary, tasks
from fsdfm_jax.evaluate import estimate as estimate_lib
from fsdfm_jax.evaluate.draw import Given
from fsdfm_jax.evaluate.estimate import Clock, Cost, Work
from fsdfm_jax.evaluate.exact_judges import ExactJudge
from fsdfm_jax.evaluate.judges.scoring import Judge
from fsdfm_jax.evaluate.models import Catalogue
from fsdfm_jax.evaluate.plan import Point, Settings
from fsdfm_jax.evaluate.references import HeldOut
from fsdfm_jax.evaluate.report import write as report
from fsdfm_jax.evaluate.results import Arrays, Row, Store
from fsdfm_jax.inference import stream
from fsdfm_jax.training import recipe
from fsdfm_jax.training.metrics import Progress, duration

NO_BOUND = (
    "No bound on the likelihood: a few-step network learns large steps from a teacher and doesn't "
    "model the process at infinitesimal steps. The base model has a bound."
)
PROMPT_BY_TOKEN = (
    "The given tokens are read one by one, without prefill; the time per sample includes them."
)
_BOUND_EPS = 1e-3
_SHOWN = 3  # samples per point in a report


class Evaluation:
    """Computes points.

    Args:
      settings: `config.eval`.
      catalogue: of the models.
      judges: the first is the main judge; may be empty.
      length: L, tokens per sample.
      text: None without prepared data; the plan must then have only models.
      store: of finished points.
      exact: a judge that knows the truth, or None.
    """

    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        judges: Sequence[Judge],
        *,
        length: int,
        text: HeldOut | None,
        store: Store,
        exact: ExactJudge | None = None,
    ):
        self._settings, self._catalogue, self._judges = settings, catalogue, judges
        self._tokenizer, self._length = catalogue.tokenizer, length
        self._text, self._store, self._exact = text, store, exact

    def run(self, plan: Sequence[Point]) -> list[Row]:
        """Compute all points that aren't stored; return the rows of all, in order.

        Computes a few points first, from which it estimates the time of the others, and prints the
        estimate on stderr.
        """
        rows = {point: self._stored(point) for point in plan}
        work = {point: self._work(point) for point, row in rows.items() if row is None}
        clock, first = self._clock(rows), estimate_lib.pilots(work)
        if work:
            stored = len(plan) - len(work)
            _say(f"evaluating {len(plan)} points: {stored} stored, {len(work)} to compute")
        for point in first:
            self._count(clock, point, work.pop(point))
        if first and work:
            _say(_describe_estimate(clock, work.values()))
        with Progress("evaluating, points", total=len(first) + len(work)) as progress:
            progress.advance(len(first), remaining=clock.seconds(work.values()))
            while work:
                point = next(iter(work))
                self._count(clock, point, work.pop(point))
                progress.advance(remaining=clock.seconds(work.values()))
        return self.finished(plan)

    def _count(self, clock: Clock, point: Point, work: Work) -> None:
        """Compute a point and record its time on the clock."""
        began = time.monotonic()
        row = self._compute(point)
        watched = self._settings.watched > 0 and not point.causal
        compilation = (row["compile_seconds"] or 0.0) * (1 + watched)
        clock.count(work, Cost(time.monotonic() - began, _seconds_per_call(row), compilation))

    def _clock(self, rows: Mapping[Point, Row | None]) -> Clock:
        """Return a clock that has the times of stored points from the same device."""
        clock = Clock()
        for point, row in rows.items():
            if row is not None and row.get("device") == _devices():
                clock.know(self._drawing(point), _seconds_per_call(row))
        return clock

    def _work(self, point: Point) -> Work:
        stamp = self.protocol(point)["samples"]
        if point.kind != "model" or self._store.has_arrays(point.slug, stamp):
            return Work()
        return self._drawing(point)

    def _drawing(self, point: Point) -> Work:
        """Return the work of drawing and watching a model's point; none for texts."""
        if point.kind != "model":
            return Work()
        facts = self._catalogue.facts(point.source, point.weights)
        network = f"{recipe.digest(facts.get('network'))} {point.memory}"
        size = min(self._settings.batch_size, self._num_samples(point))
        rows = -(-self._num_samples(point) // size) * size  # the last batch is computed whole
        watched = 0 if point.causal else min(self._settings.watched, size)
        program = f"{network} {jax.tree.structure(point.sampling)}"
        return Work(point.sampling.steps * (rows + watched), network, program)

    def finished(self, plan: Sequence[Point]) -> list[Row]:
        """Return the rows of the points stored by any machine, in order."""
        self._store.refresh()
        return [row for row in map(self._stored, plan) if row is not None]

    def _stored(self, point: Point) -> Row | None:
        return self._store.finished(point.slug, self.protocol(point))

    def _compute(self, point: Point) -> Row:
        """Draw and score a point; store and return its row."""
        protocol = self.protocol(point)
        stamp = protocol["samples"]
        arrays = self._store.arrays(point.slug, stamp)
        if arrays is None:
            arrays = self._sample(point, stamp)
            self._store.save_arrays(point.slug, stamp, arrays)
        known = self._store.earlier_scores(point.slug, stamp, stamps.PROTOCOL_VERSION)
        judged: Arrays = {}
        for judge, facts in zip(self._judges, self._judge_facts, strict=True):
            judged |= _part_with(known, f"{judge.name}.digest", recipe.digest(facts))
        scores = summary.measure(
            arrays["tokens"], ~arrays["frozen"], self._tokenizer, self._judges, known=judged
        )
        scores |= self._steps(point, arrays["tokens"], known)
        scores |= self._mauve(point, arrays["tokens"], known)
        self._store.save_scores(point.slug, protocol, stamps.PROTOCOL_VERSION, scores)
        figures, judges = self._figures(scores)
        own = _entropy_of_choice([scores], self._settings.resamples)
        figures |= {
            "predictive_entropy_nats": own and own["mean"],
            "mauve": _mauve_estimate(scores),
            "bound_nats_per_token": self._bound(point),
        }
        fields = ("kind", "group", "stage", "memory", "seed", "task")
        row = {
            "slug": point.slug,
            "setting": point.setting,
            **{name: getattr(point, name) for name in fields},
            **point.described(),
            "run": point.source if point.kind == "model" else None,
            # Those actually used: a run without an EMA has only one set of weights.
            "weights": stamp["model"] and stamp["model"]["weights"],
            "num_samples": len(arrays["tokens"]),
            "milliseconds_per_sample": _scalar(arrays, "seconds_per_sample", 1e3),
            "compile_seconds": _scalar(arrays, "compile_seconds", 1.0),
            "device": str(arrays["device"]) if "device" in arrays else None,
            "figures": figures,
            "judges": judges,
            "exact": self._exact_verdict([arrays]),
            "per_step": own and own["per_step"],
            "notes": _notes(point),
            "samples_file": self._store.samples_file(point.slug, stamp),
            "scores_file": self._store.scores_file(point.slug, protocol),
            "code_version": recipe.code_version(),
            "protocol": protocol,
        }
        self._store.add(row)
        return row

    def _figures(self, measured: Mapping[str, np.ndarray]) -> tuple[dict, dict]:
        names = [judge.name for judge in self._judges]
        return summary.aggregate(measured, names, resamples=self._settings.resamples)

    def _exact_verdict(self, parts: Sequence[Arrays]) -> dict[str, Any] | None:
        """Return the exact judge's verdict on the samples of all seeds."""
        if self._exact is None:
            return None
        tokens_NL, frozen_NL = (
            np.concatenate([part[name] for part in parts]) for name in ("tokens", "frozen")
        )
        return self._exact.judge(tokens_NL, frozen_NL, resamples=self._settings.resamples)

    # ---------------------------------------------------------------------------------- the samples
    def _num_samples(self, point: Point) -> int:
        asked = self._settings.num_samples
        return asked if point.kind == "model" else min(asked, len(self._text.real_NL))

    def _sample(self, point: Point, stamp: dict[str, Any]) -> Arrays:
        given = self._given(point)
        if point.kind == "real":
            return {"tokens": self._text.real_NL, "frozen": given.frozen_NL}
        if point.kind == "control":
            text = self._text
            tokens_NL = draw.control(point.source, text, given.frozen_NL, point.seed)
            return {"tokens": tokens_NL, "frozen": given.frozen_NL}
        drawn = draw.draw(
            point,
            self._catalogue.open(point.source, point.weights),
            given,
            batch_size=self._settings.batch_size,
            kept=_Kept(self._store, point.slug, stamp),
        )
        return {
            "tokens": drawn.tokens_NL,
            "frozen": given.frozen_NL,
            "seconds_per_sample": np.asarray(drawn.seconds_per_sample),
            "compile_seconds": np.asarray(drawn.compile_seconds),
            "device": np.asarray(_devices()),
        }

    def _steps(self, point: Point, tokens_NL: np.ndarray, known: Sequence[Arrays]) -> Arrays:
        """Observe the steps of the first samples; return arrays by storage name."""
        count = min(self._settings.watched, self._settings.batch_size, len(tokens_NL))
        if point.kind != "model" or not count:
            return {}
        if part := _part_with(known, "step_samples", count):
            is_ours = lambda name: name in _STEPS or name.startswith(_PATH)
            return {name: array for name, array in part.items() if is_ours(name)}
        watched = draw.watch(
            point,
            self._catalogue.open(point.source, point.weights),
            self._given(point),
            tokens_NL,
            count=count,
        )
        parts = (count, watched.times_S, watched.entropy_RS, watched.changed_RS)
        arrays = {name: np.asarray(part) for name, part in zip(_STEPS, parts, strict=True)}
        for i, path in enumerate(watched.trajectories):
            named = path._asdict().items()
            arrays |= {f"{_PATH}{i}.{name}": np.asarray(part) for name, part in named}
        return arrays

    def _given(self, point: Point) -> Given:
        """Return the given tokens of a point."""
        shape = (self._num_samples(point), self._length)
        frozen_NL = tasks.parse(point.task).frozen(*shape)
        if not frozen_NL.any():
            return Given(np.zeros(shape, np.int32), frozen_NL)
        return Given(self._text.real_NL, frozen_NL)

    # ---------------------------------------------------------------------------------- the stamp
    def protocol(self, point: Point) -> dict[str, Any]:
        """Everything that a row's figures depend on, stored with them."""
        settings, facts = self._settings, None
        if point.kind == "model":
            facts = self._catalogue.facts(point.source, point.weights)
        of_text = facts is None or point.task != tasks.UNCONDITIONAL
        return {
            "samples": stamps.samples(
                point,
                facts,
                num_samples=self._num_samples(point),
                batch_size=settings.batch_size,
                length=self._length,
                tokenizer=self._tokenizer.fingerprint,
                text=self._text.fingerprint if of_text else None,
            ),
            "scoring": stamps.scoring(
                judges=self._judge_facts,
                positions="all" if point.task == tasks.UNCONDITIONAL else "written, not given",
                intervals=_describe_intervals(settings.resamples),
                watched=settings.watched if facts else None,
                mauve=self._mauve_facts(point),
                bound=self._bound_facts(point),
                # Omitted without such a judge, so that older stamps stay valid.
                **({} if self._exact is None else {"exact": self._exact.describe()}),
            ),
        }

    @functools.cached_property
    def _judge_facts(self) -> list[dict[str, Any]]:
        return [judge.describe() for judge in self._judges]

    # ---------------------------------------------------------------------------------------- MAUVE
    def _reference_ML(self, point: Point) -> np.ndarray | None:
        """Other real text for MAUVE; None if MAUVE can't be computed."""
        has_features = self._judges and hasattr(self._judges[0], "features")
        if not (has_features and self._text is not None and mauve.available()):
            return None
        enough = self._num_samples(point) >= mauve.MIN_SAMPLES
        return self._text.reference_ML if enough and point.task == tasks.UNCONDITIONAL else None

    def _mauve_facts(self, point: Point) -> dict[str, Any] | None:
        reference_ML = self._reference_ML(point)
        if reference_ML is None:
            return None
        return mauve.facts() | {
            "features": f"{self._judges[0].name}: last hidden state at the last token",
            "reference": f"{len(reference_ML)} other held-out blocks",
            "text": self._text.fingerprint,
        }

    def _mauve(self, point: Point, tokens_NL: np.ndarray, known: Sequence[Arrays]) -> Arrays:
        """Compute MAUVE; return arrays by storage name, {} if it can't be computed."""
        facts = self._mauve_facts(point)
        if facts is None:
            return {}
        digest = recipe.digest([facts, self._judge_facts[0]])
        if part := _part_with(known, "mauve_digest", digest):
            return {name: part[name] for name in ("mauve", "mauve_digest")}
        judge, reference_ND = self._judges[0], self._reference_features
        found = summary.mauve_score(tokens_NL, self._tokenizer, judge, reference_ND)
        return {
            "mauve": np.asarray([found[name] for name in _ESTIMATE], np.float64),
            "mauve_digest": np.asarray(digest),
        }

    @functools.cached_property
    def _reference_features(self) -> np.ndarray:
        reference_ML = self._text.reference_ML
        everything_ML = np.ones(reference_ML.shape, bool)
        texts = tasks.texts(reference_ML, everything_ML, self._tokenizer)
        return self._judges[0].features(texts)

    # ------------------------------------------------------------------------------------ the bound
    def _bound_facts(self, point: Point) -> dict[str, Any] | None:
        if point.stage != "pretrain" or self._text is None or self._text.bounded_KL is None:
            return None
        return {
            "samples": len(self._text.bounded_KL),
            "times": self._settings.bound_times,
            "time_eps": _BOUND_EPS,
            "text": self._text.fingerprint,
        }

    def _bound(self, point: Point) -> dict[str, float] | None:
        """Return the bound on a base model's likelihood, estimated once for all its points."""
        facts = self._bound_facts(point)
        if facts is None:
            return None
        model = self._catalogue.facts(point.source, point.weights)
        name = f"bound-{point.source}-{point.weights}".replace("/", "-")
        stamp = {"model": model, "bound": facts, "numerics": stamps.numerics()}
        stamp["protocol"] = stamps.PROTOCOL_VERSION
        arrays = self._store.arrays(name, stamp)
        if arrays is None:
            subject = self._catalogue.open(point.source, point.weights)
            with Progress(f"bounding {subject.label}", total=facts["times"]) as progress:
                nats_K = bound_lib.nats_per_token(
                    subject.params,
                    subject.model,
                    subject.process,
                    self._text.bounded_KL,
                    num_times=facts["times"],
                    time_eps=facts["time_eps"],
                    seed=0,
                    batch_size=self._settings.batch_size,
                    progress=progress.advance,
                )
            arrays = {"nats_per_token": nats_K}
            self._store.save_arrays(name, stamp, arrays)
        return _mean(arrays["nats_per_token"], self._settings.resamples)

    # ---------------------------------------------------------------------------------- the report
    def report(
        self, directory: pathlib.Path, rows: Sequence[Row], header: Mapping[str, Any]
    ) -> str:
        """Write the report of stored rows; return its table as text, followed by a few samples.

        Args:
          directory: made if needed.
          rows: to report, in order.
          header: JSON dict of facts about the whole report.
        """
        samples, frozen, paths = {}, {}, {}
        for row in rows:
            arrays = self._store.arrays(row["slug"], row["protocol"]["samples"])
            scores = self._store.scores(row["slug"], row["protocol"])
            if arrays is not None and scores is not None:
                slug = row["slug"]
                samples[slug], frozen[slug] = (arrays[k][:_SHOWN] for k in ("tokens", "frozen"))
                paths[slug] = _trajectories(scores)
        by_setting = itertools.groupby(
            sorted(rows, key=lambda row: row["setting"]), key=lambda row: row["setting"]
        )
        pooled = {setting: self._pool(list(repeats)) for setting, repeats in by_setting}
        merged = [pooled[setting] for setting in dict.fromkeys(row["setting"] for row in rows)]
        mask_id = self._tokenizer.vocab_size
        report.write(
            directory, rows, merged, samples, frozen, paths, self._tokenizer, dict(header), mask_id
        )
        shown = report.few_samples(merged, samples, self._tokenizer, mask_id)
        return "\n\n".join(filter(None, (report.table(merged), shown)))

    def _pool(self, rows: list[Row]) -> Row:
        """Pool repeats over seeds into one row, with intervals over all samples.

        MAUVE compares sets, so it is the mean over the seeds, without an interval.
        """
        first, resamples = rows[0], self._settings.resamples
        if len(rows) == 1:
            return first
        parts = [self._store.scores(row["slug"], row["protocol"]) for row in rows]
        if any(part is None for part in parts):
            return first
        figures, judged = self._figures(summary.pool(parts))
        own = _entropy_of_choice(parts, resamples)
        scores = [row["figures"]["mauve"] for row in rows]
        figures |= {
            "predictive_entropy_nats": own and own["mean"],
            "mauve": None if None in scores else _mean_without_interval(scores),
            "bound_nats_per_token": first["figures"]["bound_nats_per_token"],
        }
        drawn = [self._store.arrays(row["slug"], row["protocol"]["samples"]) for row in rows]
        times = [row["milliseconds_per_sample"] for row in rows]
        return first | {
            "figures": figures,
            "judges": judged,
            "exact": first.get("exact") if None in drawn else self._exact_verdict(drawn),
            "per_step": own and own["per_step"],
            "milliseconds_per_sample": None if None in times else min(times),
            "num_seeds": len(rows),
            "seeds": [row["seed"] for row in rows],
            "protocol": {row["slug"]: row["protocol"] for row in rows},
        }


def _devices() -> str:
    """Return the devices used for sampling, "8 x KIND"."""
    mesh = jax.sharding.get_mesh()
    return f"{max(1, mesh.size)} x {jax.devices()[0].device_kind}"


class _Kept:
    """Stored batches of one point, see `draw.Batches`."""

    def __init__(self, store: Store, slug: str, stamp: dict[str, Any]):
        self._store, self._place = store, (slug, stamp)

    def load(self, index: int) -> np.ndarray | None:
        return self._store.batch(*self._place, index)

    def save(self, index: int, tokens_BL: np.ndarray) -> None:
        self._store.save_batch(*self._place, index, tokens_BL)


# Storage names of observed steps, and the prefix of trajectories.
_STEPS = ("step_samples", "step_times", "step_entropy_nats", "step_changed")
_PATH = "step_path"
_ESTIMATE = ("value", "low", "high", "count")


def _part_with(parts: Sequence[Arrays], name: str, value: Any) -> Arrays:
    """Return the first set of arrays in which a scalar has this value, or {}."""
    return next((part for part in parts if name in part and part[name].item() == value), {})


def _mauve_estimate(scores: Arrays) -> dict[str, Any] | None:
    if "mauve" not in scores:
        return None
    found = dict(zip(_ESTIMATE, scores["mauve"].tolist(), strict=True))
    return found | {"count": int(found["count"])}


def _trajectories(arrays: Arrays) -> list[stream.Trajectory]:
    """Read the trajectories from a point's stored arrays."""
    found = []
    while f"{_PATH}{len(found)}.tokens_TL" in arrays:
        tokens_TL, steps, times, frozen_L = (
            arrays[f"{_PATH}{len(found)}.{name}"] for name in stream.Trajectory._fields
        )
        shown = (tuple(steps.tolist()), tuple(times.tolist()))
        found.append(stream.Trajectory(tokens_TL, *shown, frozen_L))
    return found


def _entropy_of_choice(parts: Sequence[Arrays], resamples: int) -> dict[str, Any] | None:
    """Return the predictive entropy over all seeds: mean over steps, and per step."""
    if not all("step_entropy_nats" in part for part in parts):
        return None
    entropy_RS, changed_RS = (
        np.concatenate([part[name] for part in parts])
        for name in ("step_entropy_nats", "step_changed")
    )
    # A step that draws nothing has no entropy.
    free_S = np.isfinite(entropy_RS).any(axis=0)
    return {
        "mean": _mean(np.nanmean(entropy_RS[:, free_S], axis=1), resamples),
        "per_step": {
            "times": parts[0]["step_times"][free_S].tolist(),
            "entropy_nats": np.nanmean(entropy_RS[:, free_S], axis=0).tolist(),
            "changed": np.mean(changed_RS[:, free_S], axis=0).tolist(),
        },
    }


def _mean(values: np.ndarray, resamples: int) -> dict[str, Any]:
    mean = lambda values: np.mean(values, axis=-1)
    return summary.interval(metrics.bootstrap(mean, values, resamples=resamples))


def _mean_without_interval(estimates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    value = float(np.mean([estimate["value"] for estimate in estimates]))
    count = sum(estimate["count"] for estimate in estimates)
    return {"value": value, "low": np.nan, "high": np.nan, "count": count}


def _describe_intervals(resamples: int) -> str:
    return summary.INTERVALS.format(level=summary.LEVEL, resamples=resamples)


def _seconds_per_call(row: Row) -> float:
    """Of one network call for one sample; nan where nothing was drawn."""
    milliseconds, steps = row.get("milliseconds_per_sample"), row.get("steps")
    return milliseconds / 1e3 / steps if milliseconds and steps else math.nan


def _describe_estimate(clock: Clock, works: Iterable[Work]) -> str:
    works = list(works)
    calls = sum(work.calls for work in works)
    called = sum(work.calls * clock.call(work.network) for work in works if work.network)
    parts = [f"{calls:,} network calls take {duration(called)}"] if calls else []
    if compilation := clock.compilation(works):
        parts.append(f"compilation {duration(compilation)}")
    parts.append(f"each point {clock.fixed:.2g} s besides")
    left = f"{len(works)} more points take about {duration(clock.seconds(works))}"
    return f"{left} ({', '.join(parts)})"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _scalar(arrays: Arrays, name: str, factor: float) -> float | None:
    return factor * float(arrays[name]) if name in arrays else None


def _notes(point: Point) -> list[str]:
    notes = []
    if point.kind == "model" and point.stage not in ("pretrain", "autoregressive"):
        notes.append(NO_BOUND)
    if point.stage == "autoregressive" and point.task != tasks.UNCONDITIONAL:
        notes.append(PROMPT_BY_TOKEN)
    return notes
