"""Run an evaluation from its settings to its report."""

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


# ----------------------------------------------------------------------------- a whole evaluation
def check_inputs(settings: Settings, length: int) -> None:
    """Check the inputs named in `config.eval` before any work.

    Args:
      settings: `config.eval`.
      length: tokens of a block.

    Raises:
      ValueError: for a task that doesn't fit a block, a missing model, or an invalid judge or law.
    """
    try:
        tasks.parse(settings.task).frozen(1, length)
    except ValueError as error:
        raise ValueError(f"eval.task: {error}") from None
    for label, (path, _) in parse_models(settings.models).items():
        if not path.exists():
            raise ValueError(f"eval.models: {path} ({label!r}) doesn't exist.")
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
    """Compute the missing points and write the report.

    Args:
      settings: `config.eval`.
      catalogue: of the models.
      prepared: text with the models' tokenizer; None omits everything that needs it.
      directory: for the report and the finished points.
      make_plan: (settings, stage of each label, length) -> points, `plan.plan` or a sweep.
      header: JSON dict of facts for the report, see `report.write.write`; the date is added.
      index, count: index of this machine and number of machines. Each computes its share of the
        points and reports all finished ones.

    Returns:
      The table as text.

    Raises:
      ValueError: for incompatible models, judges, text or task.
    """
    length = prepared.block_length if prepared else catalogue.block_length or _DEFAULT_LENGTH
    check_inputs(settings, length)
    plan = make_plan(settings, catalogue.stage_of, length)
    if prepared is None:
        plan = _without_text(plan, settings)
    slugs = [point.slug for point in plan]
    if twice := [slug for slug in slugs if slugs.count(slug) > 1]:
        raise ValueError(f"Two points have the name {twice[0]!r}; choose more distinct labels.")
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
        logging.warning("%d of %d points are finished so far.", len(rows), len(plan))
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
    """Open models, judges and text, and make an `Evaluation`.

    Args:
      settings, catalogue, prepared: as in `evaluate`.
      store: of finished points.
      length: tokens per sample.

    Raises:
      ValueError: for incompatible models, judges and text.
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
            f"The models have tokenizer {tokenizer.fingerprint}, but the text in "
            f"{prepared.directory} has {prepared.tokenizer.fingerprint}; give text prepared with "
            "their tokenizer."
        )
    references.check(prepared.num_blocks("validation"), settings)
    return references.read(prepared, settings.num_samples, settings.bound_samples)


def _without_text(plan: list[Point], settings: Settings) -> list[Point]:
    """Remove the points that need text from the plan, with a warning."""
    if settings.task != tasks.UNCONDITIONAL:
        raise ValueError(
            f"The task {settings.task!r} needs held-out text, but there is no prepared text; give "
            "a prepared folder with --data."
        )
    logging.warning(
        "There is no prepared text: the report has no held-out text, controls or bounds. Give a "
        "prepared folder with --data to get them."
    )
    return [point for point in plan if point.kind == "model"]


def open_judges(settings: Settings, catalogue: Catalogue) -> list[Judge]:
    """Open the judges of `eval.judges`; "autoregressive" is the catalogue's judge.

    Raises:
      ValueError: see `judges.open_judge`; also for two judges with the same name.
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
        raise ValueError(f"Judges must have different names, got {', '.join(names)}.")
    return found
