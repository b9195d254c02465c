"""The evaluation: every point of a plan drawn, scored, stored with its stamp, and the report.

A point is finished when its row is stored; a killed evaluation goes on with the next one. Where the
samples of a point are there but not the figures asked for (another judge, say), they are scored
again and not drawn again.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from fsdfm_jax import data as data_lib
from fsdfm_jax import trajectory, workdir
from fsdfm_jax.data import PreparedData
from fsdfm_jax.evaluate import bound, draw, mauve, metrics, points, report, summary, tasks
from fsdfm_jax.evaluate import judges as judges_lib
from fsdfm_jax.evaluate.draw import Given
from fsdfm_jax.evaluate.points import Point, Settings
from fsdfm_jax.evaluate.scoring import Judge
from fsdfm_jax.evaluate.store import Arrays, Row, Store
from fsdfm_jax.evaluate.subjects import Catalogue, Subject
from fsdfm_jax.tokenizer import Tokenizer
from fsdfm_jax.writer import Progress

# Training blocks that the unigram control's frequencies and the repeated sentence come from.
_UNIGRAM_BLOCKS = 1024
_SENTENCE = 24  # tokens
_BOUND_EPS = 1e-3
_DEFAULT_LENGTH = 1024  # the block of the paper
NO_BOUND = (
    "No bound on the likelihood: a few-step network answers for whole steps and was taught by a "
    "teacher, so that it is no model of the process at infinitesimal ones. Ask for it of the base "
    "model."
)


class Text(NamedTuple):
    """Real text to compare with.

    Attributes:
      real_NL: held-out blocks, int32 [N, L].
      reference_NL: other held-out blocks for MAUVE, [N, L]; None if there are too few.
      unigram_V: frequencies of tokens in the training text.
      sentence: ids of a stretch of held-out text, to be repeated.
      fingerprint: of the prepared data.
    """

    real_NL: np.ndarray
    reference_NL: np.ndarray | None
    unigram_V: np.ndarray
    sentence: np.ndarray
    fingerprint: str


def read_text(prepared: PreparedData, num_samples: int) -> Text:
    """What the evaluation needs of a prepared folder.

    Raises:
      ValueError: if it holds out fewer blocks than samples are asked for.
    """
    held_out, train = prepared.source("validation"), prepared.source("train")
    if len(held_out) >= 2 * num_samples:  # real text is then compared with other real text
        both = data_lib.validation_blocks(held_out, 2 * num_samples)
        real_NL, reference_NL = both[::2], both[1::2]
    else:
        real_NL, reference_NL = data_lib.validation_blocks(held_out, num_samples), None
    blocks = data_lib.validation_blocks(train, min(len(train), _UNIGRAM_BLOCKS))
    counts_V = np.bincount(blocks.ravel(), minlength=prepared.tokenizer.vocab_size)
    return Text(
        real_NL,
        reference_NL,
        counts_V / counts_V.sum(),
        real_NL[0, : min(_SENTENCE, prepared.block_length)],
        prepared.fingerprint,
    )


def check_task(task: str, length: int) -> None:
    """ValueError for a task that blocks of so many tokens have no room for."""
    try:
        tasks.parse(task).frozen(1, length)
    except ValueError as error:
        raise ValueError(f"eval.task: {error}") from None


def evaluate(
    settings: Settings,
    catalogue: Catalogue,
    prepared: PreparedData | None,
    directory: pathlib.Path,
    *,
    make_plan: Callable[..., list[Point]] = points.plan,
    header: Mapping[str, Any] | None = None,
    index: int = 0,
    count: int = 1,
) -> str:
    """Computes the points that are missing and writes the report; the whole of a program.

    Args:
      settings: `config.eval`.
      catalogue: of the models.
      prepared: text of the models' tokenizer; None leaves out what needs it.
      directory: for the report and the finished points.
      make_plan: (settings, stage of each label, length) -> points, `points.plan` or a sweep.
      header: JSON dict of facts for the report.
      index, count: which of several machines this is; each computes its share of the points and
        reports all that are finished.

    Returns:
      The table as text.

    Raises:
      ValueError: for models, judges, text or a task that don't go together.
    """
    tokenizer = catalogue.tokenizer
    length = prepared.block_length if prepared else catalogue.block_length or _DEFAULT_LENGTH
    check_task(settings.task, length)
    plan = make_plan(settings, catalogue.stage_of, length)
    text = None
    if prepared is not None:
        if prepared.tokenizer.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"The models have tokenizer {tokenizer.fingerprint}, the text in "
                f"{prepared.directory} has {prepared.tokenizer.fingerprint}; give text that was "
                "prepared with their tokenizer."
            )
        text = read_text(prepared, settings.num_samples)
    else:
        plan = _without_text(plan, settings)
    store = Store(directory, index=index, count=count)
    evaluation = Evaluation(
        settings,
        catalogue.open,
        open_judges(settings, catalogue),
        tokenizer,
        length=length,
        text=text,
        room=draw.capacity(plan),
        store=store,
    )
    rows = evaluation.run(points.share(plan, index, count))
    if count > 1:
        store.refresh()
        rows = evaluation.finished(plan)
    return write_report(directory, rows, store, tokenizer, header or {})


def _without_text(plan: list[Point], settings: Settings) -> list[Point]:
    """The plan without what needs text, with a warning."""
    if settings.task != tasks.UNCONDITIONAL:
        raise ValueError(
            f"The task {settings.task!r} gives the model parts of held-out text, and there is no "
            "prepared text; give a prepared folder with --data."
        )
    logging.warning(
        "There is no prepared text: the report has neither held-out text nor controls to compare "
        "with, and no bounds. Give a prepared folder with --data to get them."
    )
    return [point for point in plan if point.kind == "model"]


class Evaluation:
    """All that points are computed with.

    Args:
      settings: `config.eval`.
      open_subject: (label, weights) -> that model.
      judges: the first is the main one; there may be none.
      tokenizer: of all subjects and of the text.
      length: L, tokens of a sample.
      text: None where there is no prepared data; the plan then has models only.
      room: see `draw.capacity`.
      store: of finished points.
    """

    def __init__(
        self,
        settings: Settings,
        open_subject: Callable[[str, str], Subject],
        judges: Sequence[Judge],
        tokenizer: Tokenizer,
        *,
        length: int,
        text: Text | None,
        room: int,
        store: Store,
    ):
        names = [judge.name for judge in judges]
        if len(set(names)) < len(names):
            raise ValueError(f"Each judge needs a name of its own, got {', '.join(names)}.")
        self._settings, self._judges, self._tokenizer = settings, judges, tokenizer
        self._length, self._text, self._room, self._store = length, text, room, store
        self._open = open_subject

    def run(self, plan: Sequence[Point]) -> list[Row]:
        """The rows of all points, in order; those that are stored are not computed again."""
        rows = []
        with Progress("evaluating", total=len(plan)) as progress:
            for point in plan:
                rows.append(self.row(point))
                progress.advance()
        return rows

    def row(self, point: Point) -> Row:
        """The row of a point, stored when this returns."""
        subject = self._subject_of(point)
        stamp = self.protocol(point, subject)
        row = self._store.finished(point.slug, stamp)
        return self._compute(point, subject, stamp) if row is None else row

    def finished(self, plan: Sequence[Point]) -> list[Row]:
        """The rows of those points that are stored, in order."""
        stamps = [self.protocol(point, self._subject_of(point)) for point in plan]
        rows = [
            self._store.finished(point.slug, stamp)
            for point, stamp in zip(plan, stamps, strict=True)
        ]
        return [row for row in rows if row is not None]

    def _subject_of(self, point: Point) -> Subject | None:
        return self._open(point.source, point.weights) if point.kind == "model" else None

    def _compute(self, point: Point, subject: Subject | None, stamp: dict[str, Any]) -> Row:
        drawn_from = {key: stamp[key] for key in _SAMPLES_DEPEND_ON}
        arrays = self._store.arrays(point.slug, drawn_from)
        if arrays is None:
            arrays = self._sample(point, subject)
        found = summary.summarise(
            arrays["tokens"],
            ~arrays["frozen"],
            self._tokenizer,
            self._judges,
            reference_ND=self._reference_features,
            resamples=self._settings.resamples,
        )
        own = _entropy_of_choice(arrays, self._settings.resamples)
        figures = found.figures | {
            "predictive_entropy_nats": own and own["mean"],
            "bound_nats_per_token": self._bound(subject),
        }
        fields = ("kind", "group", "stage", "steps", "jump", "grid")
        fields += ("temperature", "top_p", "weights", "seed", "task")
        row = {
            "slug": point.slug,
            "setting": point.setting,
            **{name: getattr(point, name) for name in fields},
            "run": point.source if point.kind == "model" else None,
            "num_samples": len(arrays["tokens"]),
            "milliseconds_per_sample": _scalar(arrays, "seconds_per_sample", 1e3),
            "compile_seconds": _scalar(arrays, "compile_seconds", 1.0),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "figures": figures,
            "judges": found.judges,
            "per_step": own and own["per_step"],
            "notes": _notes(subject),
            "protocol": stamp,
        }
        self._store.save_arrays(point.slug, drawn_from, arrays | found.arrays)
        self._store.add(row)
        return row

    # ---------------------------------------------------------------------------------- the samples
    def _sample(self, point: Point, subject: Subject | None) -> Arrays:
        """A point's samples and how they came about, by the names they are stored under."""
        given = self._given(point)
        if subject is None:
            return {"tokens": self._text_of(point, given), "frozen": given.frozen_NL}
        settings = self._settings
        drawn = draw.draw(point, subject, given, batch_size=settings.batch_size, room=self._room)
        arrays = {
            "tokens": drawn.tokens_NL,
            "frozen": given.frozen_NL,
            "seconds_per_sample": np.asarray(drawn.seconds_per_sample),
            "compile_seconds": np.asarray(drawn.compile_seconds),
        }
        watched = draw.watch(
            point, subject, given, drawn.tokens_NL, count=settings.watched, room=self._room
        )
        if watched is None:
            return arrays
        for i, path in enumerate(watched.trajectories):
            parts = path._asdict().items()
            arrays |= {f"trajectory{i}.{name}": np.asarray(part) for name, part in parts}
        return arrays | {
            "step_times": watched.times_S,
            "step_entropy_nats": watched.entropy_RS,
            "step_changed": watched.changed_RS,
        }

    def _given(self, point: Point) -> Given:
        """What the point's samples are made around."""
        shape = (self._settings.num_samples, self._length)
        frozen_NL = tasks.parse(point.task).frozen(*shape)
        if not frozen_NL.any():
            return Given(np.zeros(shape, np.int32), frozen_NL)
        return Given(self._text.real_NL, frozen_NL)

    def _text_of(self, point: Point, given: Given) -> np.ndarray:
        """Held-out text, or a control around what is given of it; int32 [N, L]."""
        text = self._text
        if point.kind == "real":
            return text.real_NL
        made_NL = draw.control(
            point.source, text.real_NL, text.unigram_V, text.sentence, seed=point.seed
        )
        return np.where(given.frozen_NL, given.tokens_NL, made_NL)

    # ---------------------------------------------------------------------------------- the stamp
    def protocol(self, point: Point, subject: Subject | None) -> dict[str, Any]:
        """Everything a row's figures depend on, stored beside them."""
        settings = self._settings
        text = None if self._text is None else self._text.fingerprint
        stamp = {
            "samples": {
                "source": point.source,
                "num_samples": settings.num_samples,
                "length": self._length,
                "task": point.task,
                "text": text if subject is None or point.task != tasks.UNCONDITIONAL else None,
                "tokenizer": self._tokenizer.fingerprint,
            },
            "model": None if subject is None else subject.facts,
            "sampling": None if subject is None else self._sampling(point, subject),
            "scoring": {
                "judges": [judge.describe() for judge in self._judges],
                "positions": "all" if point.task == tasks.UNCONDITIONAL else "written, not given",
                "intervals": f"{summary.LEVEL:.0%} percentile bootstrap over samples, "
                f"{settings.resamples} resamples, seed 0",
                "mauve": self._mauve_facts(),
            },
            "code": {"version": workdir.code_version(), "sha256": workdir.code_digest(_PICTURES)},
            "jax": jax.__version__,
        }
        if subject is not None and subject.stage == "pretrain":
            stamp["scoring"]["bound"] = self._bound_facts()
        return stamp

    def _sampling(self, point: Point, subject: Subject) -> dict[str, Any]:
        names = ("steps", "jump", "grid", "temperature", "top_p", "seed")
        return {name: getattr(point, name) for name in names} | {
            "weights": subject.facts["weights"],
            "batch_size": min(self._settings.batch_size, self._settings.num_samples),
            "watched": self._settings.watched,
            "draws": "two-level inverse CDF, float32 with 32-bit uniforms",
            "key_value_cache": subject.model.causal,
        }

    def _mauve_facts(self) -> dict[str, Any] | None:
        if self._reference_NL is None:
            return None
        return {
            "features": f"{self._judges[0].name}, last hidden state at the last token",
            "reference": f"{len(self._reference_NL)} other held-out blocks",
            "text": self._text.fingerprint,
        }

    def _bound_facts(self) -> dict[str, Any] | None:
        if self._text is None or not self._settings.bound_samples:
            return None
        return {
            "samples": min(self._settings.bound_samples, len(self._text.real_NL)),
            "times": self._settings.bound_times,
            "time_eps": _BOUND_EPS,
            "text": self._text.fingerprint,
        }

    # ------------------------------------------------------------------------- once per evaluation
    @functools.cached_property
    def _reference_NL(self) -> np.ndarray | None:
        """Other real text for MAUVE; None where MAUVE can't be computed."""
        has_features = self._judges and hasattr(self._judges[0], "features")
        enough = self._settings.num_samples >= mauve.MIN_SAMPLES
        if not (has_features and enough and self._text is not None and mauve.available()):
            return None
        return self._text.reference_NL

    @functools.cached_property
    def _reference_features(self) -> np.ndarray | None:
        if self._reference_NL is None:
            return None
        everything_NL = np.ones(self._reference_NL.shape, bool)
        texts = tasks.texts(self._reference_NL, everything_NL, self._tokenizer)
        return self._judges[0].features(texts)

    def _bound(self, subject: Subject | None) -> dict[str, float] | None:
        """The bound on a base model's likelihood, estimated once for all of its points."""
        facts = self._bound_facts()
        if subject is None or subject.stage != "pretrain" or facts is None:
            return None
        name = f"bound-{subject.label}-{subject.facts['weights']}".replace("/", "-")
        stamp = {"model": subject.facts, "bound": facts, "code": workdir.code_digest(_PICTURES)}
        arrays = self._store.arrays(name, stamp)
        if arrays is None:
            with Progress(f"bounding {subject.label}", total=facts["times"]) as progress:
                nats_N = bound.nats_per_token(
                    subject.params,
                    subject.model,
                    subject.process,
                    self._text.real_NL[: facts["samples"]],
                    num_times=facts["times"],
                    time_eps=facts["time_eps"],
                    seed=0,
                    batch_size=self._settings.batch_size,
                    progress=progress.advance,
                )
            arrays = {"nats_per_token": nats_N}
            self._store.save_arrays(name, stamp, arrays)
        mean = lambda values: np.mean(values, axis=-1)
        resamples = self._settings.resamples
        found = metrics.bootstrap(mean, arrays["nats_per_token"], resamples=resamples)
        return summary.interval(found)


# Of a protocol: what the samples depend on, whatever is then asked of them.
_SAMPLES_DEPEND_ON = ("samples", "model", "sampling", "code", "jax")
# Files that no number depends on.
_PICTURES = (
    *(f"evaluate/{name}.py" for name in ("report", "html", "page", "figures", "reading")),
    *("trajectory.py", "generate.py", "cli.py"),
)


def trajectories(arrays: Arrays) -> list[trajectory.Trajectory]:
    """The trajectories among a point's stored arrays."""
    found = []
    while f"trajectory{len(found)}.tokens_TL" in arrays:
        tokens_TL, steps, times, frozen_L = (
            arrays[f"trajectory{len(found)}.{name}"] for name in trajectory.Trajectory._fields
        )
        shown = (tuple(steps.tolist()), tuple(times.tolist()))
        found.append(trajectory.Trajectory(tokens_TL, *shown, frozen_L))
    return found


def _entropy_of_choice(arrays: Arrays, resamples: int) -> dict[str, Any] | None:
    """The model's own entropy: mean over steps with its interval, and step by step."""
    if "step_entropy_nats" not in arrays:
        return None
    # A step at which nothing was left to draw has no entropy.
    free_S = np.isfinite(arrays["step_entropy_nats"]).any(axis=0)
    entropy_RS, changed_RS = (
        arrays[name][:, free_S] for name in ("step_entropy_nats", "step_changed")
    )
    mean = lambda values: np.mean(values, axis=-1)
    return {
        "mean": summary.interval(
            metrics.bootstrap(mean, np.nanmean(entropy_RS, axis=1), resamples=resamples)
        ),
        "per_step": {
            "times": arrays["step_times"][free_S].tolist(),
            "entropy_nats": np.nanmean(entropy_RS, axis=0).tolist(),
            "changed": np.mean(changed_RS, axis=0).tolist(),
        },
    }


def _scalar(arrays: Arrays, name: str, factor: float) -> float | None:
    return factor * float(arrays[name]) if name in arrays else None


def _notes(subject: Subject | None) -> list[str]:
    is_few_step = subject is not None and subject.stage not in ("pretrain", "autoregressive")
    return [NO_BOUND] if is_few_step else []


def write_report(
    directory: pathlib.Path,
    rows: Sequence[Row],
    store: Store,
    tokenizer: Tokenizer,
    header: Mapping[str, Any],
) -> str:
    """Writes the report of stored rows; returns its table as text.

    Args:
      directory: made where needed.
      rows: to report, in order.
      store: holds their samples.
      tokenizer: to print them.
      header: JSON dict of facts about the whole.
    """
    samples, paths = {}, {}
    for row in rows:
        stamp = {key: row["protocol"][key] for key in _SAMPLES_DEPEND_ON}
        arrays = store.arrays(row["slug"], stamp)
        if arrays is None:  # removed, or drawn anew by another evaluation of this directory
            continue
        samples[row["slug"]], paths[row["slug"]] = arrays["tokens"], trajectories(arrays)
    facts = {
        "code_version": workdir.code_version(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        **header,
    }
    report.write(directory, rows, samples, paths, tokenizer, facts, mask_id=tokenizer.vocab_size)
    return report.table(report.aggregate(rows))


def open_judges(settings: Settings, catalogue: Catalogue) -> list[Judge]:
    """The judges that `eval.judges` names; "autoregressive" is the last such model there is.

    Raises:
      ValueError: see `judges.open_judge`.
    """
    found = []
    for spec in settings.judges:
        if spec != _IN_HOUSE:
            found.append(
                judges_lib.open_judge(
                    spec, batch_size=settings.batch_size, ids_tokenizer=catalogue.tokenizer
                )
            )
            continue
        if catalogue.judge is None:
            logging.warning(
                "There is no autoregressive model to judge the samples: the report has no "
                "perplexity. Train one ('autoregressive' in config.pipeline), or name another "
                "judge in eval.judges."
            )
            continue
        subject = catalogue.open(catalogue.judge, "ema")
        found.append(
            judges_lib.AutoregressiveJudge(
                subject.params,
                subject.model,
                subject.tokenizer,
                metadata=subject.facts,
                batch_size=settings.batch_size,
            )
        )
    return found


_IN_HOUSE = "autoregressive"
