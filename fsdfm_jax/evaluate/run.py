"""An evaluation from its settings to its report: the models, judges and text that go together."""

import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from fsdfm_jax.data.prepared import PreparedData
from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.evaluate import exact_judges, references, tasks
from fsdfm_jax.evaluate import plan as plan_lib
from fsdfm_jax.evaluate.engine import Evaluation
from fsdfm_jax.evaluate.judges import base as judges_base
from fsdfm_jax.evaluate.judges.scoring import Judge
from fsdfm_jax.evaluate.models import Catalogue, parse_models
from fsdfm_jax.evaluate.plan import Point, Settings
from fsdfm_jax.evaluate.references import HeldOut
from fsdfm_jax.evaluate.results import Store
from fsdfm_jax.training import recipe

IN_HOUSE = "autoregressive"  # of `eval.judges`
_DEFAULT_LENGTH = 1024  # tokens; the block of the paper


# --------------------------------------------------------------------------- the whole of a program
def check_inputs(settings: Settings, length: int) -> None:
    """Refuse what `config.eval` names and isn't there, before any work is done.

    Args:
      settings: `config.eval`.
      length: tokens of a block.

    Raises:
      ValueError: for a task without room, a model that isn't there, or a judge or law that can't
        be.
    """
    try:
        tasks.parse(settings.task).frozen(1, length)
    except ValueError as error:
        raise ValueError(f"eval.task: {error}") from None
    for label, (path, _) in parse_models(settings.models).items():
        if not path.exists():
            raise ValueError(f"eval.models: there is nothing at {path}, named {label!r}.")
    for spec in settings.judges:
        try:
            if spec != IN_HOUSE:
                judges_base.check_spec(spec)
        except ValueError as error:
            raise ValueError(f"eval.judges: {error}") from None
    if settings.law:
        exact_judges.open_law(settings.law)


def evaluate(
    settings: Settings,
    catalogue: Catalogue,
    prepared: PreparedData | None,
    directory: pathlib.Path,
    *,
    make_plan: Callable[..., list[Point]] = plan_lib.plan,
    header: Mapping[str, Any] | None = None,
    index: int = 0,
    count: int = 1,
) -> str:
    """Compute the points that are missing and write the report.

    Args:
      settings: `config.eval`.
      catalogue: of the models.
      prepared: text of the models' tokenizer; None leaves out what needs it.
      directory: for the report and the finished points.
      make_plan: (settings, stage of each label, length) -> points, `points.plan` or a sweep.
      header: JSON dict of facts for the report, see `report.write.write`; the date is added.
      index, count: which of several machines this is; each computes its share of the points and
        reports all that are finished.

    Returns:
      The table as text.

    Raises:
      ValueError: for models, judges, text or a task that don't go together.
    """
    length = prepared.block_length if prepared else catalogue.block_length or _DEFAULT_LENGTH
    check_inputs(settings, length)
    plan = make_plan(settings, catalogue.stage_of, length)
    if prepared is None:
        plan = _without_text(plan, settings)
    slugs = [point.slug for point in plan]
    if twice := [slug for slug in slugs if slugs.count(slug) > 1]:
        raise ValueError(f"Two points are named {twice[0]!r}; choose labels that differ more.")
    evaluation = make_evaluation(
        settings,
        catalogue,
        prepared,
        Store(directory, index=index, count=count),
        length=length,
    )
    evaluation.run(plan_lib.share(plan, index, count))
    rows = evaluation.finished(plan)
    if len(rows) < len(plan):
        logging.warning("%d of %d points are finished by now.", len(rows), len(plan))
    labels = dict.fromkeys(point.source for point in plan if point.kind == "model")
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "code_version": recipe.code_version(),
        "points": {"finished": len(rows), "planned": len(plan)},
        "parameters": {label: catalogue.num_params[label] for label in labels},
    }
    return evaluation.report(directory, rows, facts | dict(header or {}))


def make_evaluation(
    settings: Settings,
    catalogue: Catalogue,
    prepared: PreparedData | None,
    store: Store,
    *,
    length: int,
) -> Evaluation:
    """What points are computed with: models, judges and text opened.

    Args:
      settings, catalogue, prepared: as in `evaluate`.
      store: of finished points.
      length: tokens of a sample.

    Raises:
      ValueError: for models, judges and text that don't go together.
    """
    text = None if prepared is None else _read_text(prepared, catalogue.tokenizer, settings)
    judges = open_judges(settings, catalogue)
    exact = exact_judges.find(catalogue.tokenizer, length, settings.law)
    return Evaluation(
        settings, catalogue, judges, length=length, text=text, store=store, exact=exact
    )


def _read_text(prepared: PreparedData, tokenizer: Tokenizer, settings: Settings) -> HeldOut:
    if prepared.tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"The models have tokenizer {tokenizer.fingerprint}, the text in {prepared.directory} "
            f"has {prepared.tokenizer.fingerprint}; give text that was prepared with their "
            "tokenizer."
        )
    references.check(prepared.num_blocks("validation"), settings)
    return references.read(prepared, settings.num_samples, settings.bound_samples)


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


def open_judges(settings: Settings, catalogue: Catalogue) -> list[Judge]:
    """The judges that `eval.judges` names; "autoregressive" is the catalogue's own.

    Raises:
      ValueError: see `judges.open_judge`, or for two judges of one name.
    """
    found: list[Judge] = []
    for spec in settings.judges:
        if spec != IN_HOUSE:
            tokenizer, size = catalogue.tokenizer, settings.batch_size
            found.append(judges_base.open_judge(spec, batch_size=size, ids_tokenizer=tokenizer))
        elif catalogue.judge is None:
            logging.warning(
                "There is no autoregressive model to judge the samples: the report has no "
                "perplexity. Train one ('autoregressive' in config.pipeline), or name another "
                "judge in eval.judges."
            )
        else:
            subject = catalogue.open(catalogue.judge, "ema")
            found.append(
                judges_base.AutoregressiveJudge(
                    subject.params,
                    subject.model,
                    subject.tokenizer,
                    metadata=subject.facts,
                    batch_size=settings.batch_size,
                )
            )
    names = [judge.name for judge in found]
    if len(set(names)) < len(names):
        raise ValueError(f"Each judge needs a name of its own, got {', '.join(names)}.")
    return found
