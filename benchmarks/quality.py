"""Recipes for few steps at equal compute, compared at equal entropy.

    python -m benchmarks.quality --study=runs/quality                 hours on 2 CPU cores
    python -m benchmarks.quality --study=runs/quality --scale=smoke   minutes
    python -m benchmarks.quality --study=runs/quality --scale=gpu     one large GPU

Trains the judge and the base model of configs/quality.py, then every recipe from that base model,
once for each seed and with the same number of network evaluations (teachers and pairs included).
Then samples each of them in --few_steps (1, 2, 4, 8 and 16) by each of --samplers, at the
temperature at which its samples have the entropy (unigram, mean over samples) of the base model's
in 1,024 steps at temperature 1: perplexity that was bought with entropy is given back. Those
temperatures are searched for on noise of their own, until the entropy there is known to 0.3%.
Beside them stand held-out text and what the counts of the sampler `neighbours` write alone, without
a network.

Everything lies in the folder and is done once; killed, the same command goes on. RESULT in it gets
quality.json (all figures of all trainings), quality.md (the table), quality.png (the curves) and
samples.md (the first samples of each row, as they come).
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
from absl import app, flags, logging

from benchmarks import measure
from configs import quality as recipes
from fsdfm_jax import cli, io
from fsdfm_jax.evaluate import draw, metrics, stamps
from fsdfm_jax.evaluate import models as models_lib
from fsdfm_jax.evaluate import run as run_lib
from fsdfm_jax.evaluate.draw import Given
from fsdfm_jax.evaluate.engine import Evaluation
from fsdfm_jax.evaluate.models import Catalogue
from fsdfm_jax.evaluate.plan import Point, Settings
from fsdfm_jax.evaluate.report import reading
from fsdfm_jax.evaluate.results import Row, Store
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.training import pipeline as pipeline_lib
from fsdfm_jax.training import recipe as recipe_lib

_STUDY = flags.DEFINE_string("study", None, "Folder for data, runs and results.")
_SCALE = flags.DEFINE_enum("scale", "cpu", list(recipes.SIZES), "Size of configs/quality.py.")
_COMPARED = flags.DEFINE_list(
    "compare", None, "Of configs/quality.py, comma-separated; all if not given."
)
_SEEDS = flags.DEFINE_list("trainings", ["0", "1", "2"], "Seeds, also of the base's samples.")
_JUDGES = flags.DEFINE_string("judges", None, "As eval.judges; the first is the main one.")
_SAMPLES = flags.DEFINE_integer("samples", None, "Of each figure.", lower_bound=1)
_STEPS = flags.DEFINE_list("few_steps", None, "Numbers of steps, comma-separated, as eval.steps.")
_RESULT = flags.DEFINE_string("result", "result", "Folder of the results, in that of the study.")
_SAMPLERS = flags.DEFINE_list(
    "samplers", list(recipes.SAMPLERS), "Of configs/quality.py, each a table's rows."
)

BASE, REAL = "pretrain", "held-out text"
NGRAMS = "n-grams alone"  # what the sampler `neighbours` knows, without a network
# Samples are drawn with seed 0, 1, ..; temperatures are found on other noise.
_SEARCH_SEED = 1_000
_SEARCH_SAMPLES = 128
_TOLERANCE = 0.003  # of the entropy, on that noise
_STRIDE, _FURTHEST = math.log(1.15), math.log(5.0)  # of the logarithm of the temperature


# ------------------------------------------------------------------------------------ the trainings
def train(folder: pathlib.Path, recipe: str, seed: int, changes: Mapping[str, Any]) -> None:
    """Trains a recipe by the main job, in a process of its own."""
    options = [f"--config.{key}={value}" for key, value in ({"seed": seed} | dict(changes)).items()]
    command = [sys.executable, "-m", "fsdfm_jax.main", f"--workdir={folder}", "--noevaluate"]
    command += [f"--config=configs/quality.py:{recipe},{_SCALE.value}", *options]
    logging.info("Training %s, seed %d.", recipe, seed)
    if code := subprocess.run(command).returncode:
        raise ValueError(f"Training {recipe}, seed {seed}, ended with {code}; see above.")


def train_all(folder: pathlib.Path, names: Sequence[str], seeds: Sequence[int]) -> dict[str, str]:
    """Label -> path#run of every recipe and seed; what is trained already takes a moment."""
    base = folder / "base"
    train(base, "base", 0, {})
    places = {}
    for seed in seeds:
        for name in names:
            config = recipes.get_config(f"{name},{_SCALE.value}")
            first, _ = pipeline_lib.runs(config)[0]
            place = folder / f"{name}.{seed}"
            changes = {
                "data.directory": base / "data",
                f"{first}.init_from": base / "stages" / BASE,
            }
            train(place, name, seed, changes)
            last, _ = pipeline_lib.runs(config)[-1]
            places[f"{name}.{seed}"] = f"{place}#{last}"
    return places


# --------------------------------------------------------------------------------- equal entropies
def search(
    entropy: Callable[[float], float], wanted: float, *, tolerance: float = _TOLERANCE
) -> float | None:
    """The temperature at which samples have an entropy; None if none between about 1/5 and 5 does.

    Args:
      entropy: of samples at a temperature; grows with it but for noise.
      wanted: the entropy.
      tolerance: relative, of the entropy.
    """
    excess = functools.cache(lambda log_t: entropy(math.exp(log_t)) / wanted - 1)
    low = high = 0.0
    while excess(low) > tolerance:
        high, low = low, low - _STRIDE
        if low < -_FURTHEST:
            return None
    while excess(high) < -tolerance:
        low, high = high, high + _STRIDE
        if high > _FURTHEST:
            return None
    for log_t in (low, high):
        if abs(excess(log_t)) <= tolerance:
            return math.exp(log_t)
    return math.exp(scipy.optimize.brentq(excess, low, high, xtol=0.005))


def match(
    catalogue: Catalogue, point: Point, wanted: float, *, length: int, room: int, batch_size: int
) -> float | None:
    """The temperature at which a point has an entropy in bits, on noise of its own."""
    shape = (_SEARCH_SAMPLES, length)
    given = Given(np.zeros(shape, np.int32), np.zeros(shape, bool))
    subject = catalogue.open(point.source, point.weights)

    def entropy(temperature):
        at = dataclasses.replace(point, temperature=temperature, seed=_SEARCH_SEED)
        drawn = draw.draw(at, subject, given, batch_size=batch_size, room=room)
        return float(np.mean(metrics.unigram_entropy(drawn.tokens_NL))) / math.log(2)

    return search(entropy, wanted)


def matched(path: pathlib.Path, find: Callable[[], float | None], depends_on: Any) -> float | None:
    """A temperature out of the file of those that were found, or else found now and kept there."""
    known = io.read_json(path) if path.exists() else {}
    key = recipe_lib.digest(depends_on)
    if key not in known:
        known[key] = find()
        io.write_json(path, known)
    return known[key]


# -------------------------------------------------------------------------------------- the figures
class Study:
    """Trained models, and the figures of their samples.

    Args:
      folder: the working directory.
      places: label -> path#run of the recipes' models.
      seeds: of the base model's samples.
      steps: of the few-step samplers; those of the configuration if there are none.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        places: Mapping[str, str],
        seeds: Sequence[int],
        steps: Sequence[int] = (),
    ):
        config = recipes.get_config(f"base,{_SCALE.value}")
        if _JUDGES.value:
            config.eval.judges = _JUDGES.value
        if _SAMPLES.value:
            config.eval.num_samples = _SAMPLES.value
        if steps:
            config.eval.steps = tuple(steps)
        config.eval.models = ",".join(f"{label}={place}" for label, place in places.items())
        config.eval.bound_samples = 0
        self._settings = Settings.from_config(config.eval)
        self._folder, self._seeds, self._labels = folder, seeds, list(places)
        self._catalogue = models_lib.open_workdir(folder / "base", self._settings.models)
        self._text = models_lib.prepared_text(folder / "base")

    def run(self) -> list[dict[str, Any]]:
        """The figures of all points, see `figures`, with recipe, steps and seed."""
        settings, length = self._settings, self._text.block_length
        run_lib.check_inputs(settings, length)
        evaluation = run_lib.make_evaluation(
            settings,
            self._catalogue,
            self._text,
            Store(self._folder / _RESULT.value),
            length=length,
            room=self._room,
        )
        references = [self._point(BASE, settings.many_steps, seed) for seed in self._seeds]
        records = _records(evaluation, [(point, "reference") for point in references])
        wanted = statistics.fmean(record["entropy"] for record in records)
        records += _records(evaluation, [(Point("real", REAL, "real"), REAL)])
        control = Point("control", NGRAMS, "ngram")
        alone = [dataclasses.replace(control, seed=seed) for seed in self._seeds]
        records += _records(evaluation, [(point, NGRAMS) for point in alone])
        for label in [BASE, *self._labels]:
            recipe, _, seed = label.partition(".")
            seeds = [int(seed)] if seed else self._seeds
            for name, steps, own in itertools.product(_SAMPLERS.value, settings.steps, seeds):
                point = self._point(label, steps, own, name)
                records += self._matched(evaluation, point, recipe, name, wanted)
        return records

    def decode(self, tokens_NL: np.ndarray) -> list[str]:
        """The text of samples."""
        return [self._catalogue.tokenizer.decode(row) for row in tokens_NL]

    def _matched(self, evaluation, point, recipe, name, wanted) -> list[dict[str, Any]]:
        """The record of a point at the entropy that is wanted."""
        settings, length = self._settings, self._text.block_length
        size = settings.batch_size
        facts = self._catalogue.facts(point.source, point.weights)
        how = [point.steps, point.jump, point.grid, point.top_p, point.cooling, point.look_ahead]
        how += [point.neighbours, size, length]
        temperature = matched(
            self._folder / _RESULT.value / "temperatures.json",
            lambda: match(
                self._catalogue, point, wanted, length=length, room=self._room, batch_size=size
            ),
            [facts["sha256"], how, wanted, stamps.numerics(), *self._drawing(point)],
        )
        if temperature is None:
            logging.warning("No temperature gives %s the entropy.", point.slug)
            return [_head(point, recipe, name)]
        point = dataclasses.replace(point, temperature=temperature)
        return _records(evaluation, [(point, recipe)], name)

    def _drawing(self, point: Point) -> list[str | None]:
        """What else the samples of a point hang on: the code, and what their draws heed."""
        heeded = self._catalogue.follow_sha256(point.source) if point.neighbours else None
        return [stamps.PROTOCOL_VERSION, heeded]

    @property
    def _room(self) -> int:
        return 1 << (self._settings.many_steps - 1).bit_length()

    def _point(self, label: str, steps: int, seed: int, sampler: str = "plain") -> Point:
        recipe = label.partition(".")[0]
        name = "base" if label == BASE else recipe
        own = recipes.get_config(f"{name},{_SCALE.value}").eval
        own.update(recipes.sampler(sampler, steps))
        return Point(
            "model",
            recipe,
            label,
            stage=self._catalogue.stage_of[label],
            steps=steps,
            jump=own.few_step_jump,
            grid=own.grid,
            temperature=1.0,
            top_p=own.top_p,
            cooling=own.cooling,
            look_ahead=own.look_ahead,
            neighbours=own.neighbours,
            weights="ema",
            seed=seed,
        )


def _head(point: Point, recipe: str, sampler: str | None) -> dict[str, Any]:
    head = {"recipe": recipe, "sampler": sampler, "steps": point.steps}
    return head | {"seed": point.seed or 0}


def _records(
    evaluation: Evaluation, plan: Sequence[tuple[Point, str]], sampler: str | None = None
) -> list[dict[str, Any]]:
    rows = evaluation.run([point for point, _ in plan])
    return [
        _head(point, recipe, sampler) | figures(row)
        for (point, recipe), row in zip(plan, rows, strict=True)
    ]


def figures(row: Row) -> dict[str, Any]:
    """What is told of a stored row; perplexities by "ppl JUDGE", A on ids where there are ids."""
    of = row["figures"]
    result = {
        "temperature": row["temperature"],
        "entropy": of["entropy_bits"]["value"],
        "distinct_2": of["distinct_2"]["value"],
        "self_bleu": of["self_bleu"]["value"],
        "mauve": of["mauve"] and of["mauve"]["value"],
        "samples_file": row["samples_file"],
    }
    for judge in row["judges"]:
        result[f"ppl {judge}"] = reading.headline(row, judge)["value"]
    return result


def mean_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of the figures of records, geometric ones of perplexities, without missing ones."""
    result = {}
    for key, value in records[0].items():
        if isinstance(value, float):
            mean = statistics.geometric_mean if key.startswith("ppl") else statistics.fmean
            result[key] = mean(r[key] for r in records)
    return result


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each recipe, sampler and number of steps, over its seeds.

    "ppl JUDGE" are in units of the reference, geometric means, with the range over the seeds; "H"
    the entropy in units of the reference's.
    """
    reference = mean_of([r for r in records if r["recipe"] == "reference"])
    judges = [key for key in reference if key.startswith("ppl ")]
    rows = []
    what = lambda record: tuple(record[key] for key in ("recipe", "sampler", "steps"))
    for recipe, sampler, steps in dict.fromkeys(map(what, records)):
        mine = [r for r in records if what(r) == (recipe, sampler, steps)]
        found = [r for r in mine if "entropy" in r]
        mean = mean_of(found) if found else {}
        row = {"recipe": recipe, "sampler": sampler, "steps": steps}
        row["seeds"] = f"{len(found)} of {len(mine)}"
        row["T"] = mean.get("temperature")
        row["H"] = mean["entropy"] / reference["entropy"] if found else None
        for judge in judges:
            ratios = [r[judge] / reference[judge] for r in found]
            row[judge] = statistics.geometric_mean(ratios) if found else None
            spread = f"{min(ratios):.2f}-{max(ratios):.2f}" if found else None
            row[judge.replace("ppl", "range")] = spread
        rows.append(row | {key: mean.get(key) for key in ("distinct_2", "self_bleu", "mauve")})
    return rows


# -------------------------------------------------------------------------------------- the results
def plot(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Perplexity at equal entropy against steps, a panel for each judge."""
    shown = [row for row in rows if row["recipe"] not in ("reference", REAL, NGRAMS) and row["T"]]
    number = lambda key, row: list(dict.fromkeys(r[key] for r in shown)).index(row[key])
    styles = ("-", ":", "--", "-.")

    def draw(judge, panel):
        for recipe, sampler in dict.fromkeys((row["recipe"], row["sampler"]) for row in shown):
            mine = [row for row in shown if (row["recipe"], row["sampler"]) == (recipe, sampler)]
            color = f"C{number('recipe', mine[0]) % 10}"
            style = styles[number("sampler", mine[0]) % len(styles)]
            steps, values = [row["steps"] for row in mine], [row[judge] for row in mine]
            panel.plot(steps, values, style, marker="o", color=color, label=f"{recipe}, {sampler}")
        panel.axhline(1.0, color="grey", linestyle=":")
        for row in rows:
            if row["recipe"] == NGRAMS:
                panel.axhline(row[judge], color="black", linestyle="-.", label=NGRAMS)

    judges = [key for key in rows[0] if key.startswith("ppl ")]
    measure.plot_over_steps(
        path,
        {judge.removeprefix("ppl "): functools.partial(draw, judge) for judge in judges},
        steps=sorted({row["steps"] for row in rows if row["recipe"] == BASE}),
        ylabel="perplexity / reference, at equal entropy",
    )


def write_samples(
    records: Sequence[Mapping[str, Any]], folder: pathlib.Path, decode: Callable, count: int = 5
) -> None:
    """The first samples of each row of seed 0, as they come."""
    lines = ["# Samples", "", f"The first {count} of seed 0 of each row, not chosen."]
    for record in records:
        if record["seed"] == 0 and "samples_file" in record:
            with np.load(folder / record["samples_file"]) as arrays:
                tokens_NL = arrays["tokens"][:count]
            steps = f", {record['steps']} steps" if record["steps"] else ""
            sampler = f", {record['sampler']}" if record["sampler"] else ""
            lines += ["", f"## {record['recipe']}{steps}{sampler}", ""]
            for i, text in enumerate(decode(tokens_NL), 1):
                lines.append(f"{i}. " + " ".join(text.split()))
    io.write_text(folder / "samples.md", "\n".join(lines) + "\n")


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as a table."""
    names = list(rows[0])
    cell = lambda v: "-" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v)
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    every = [name for name in recipes.RECIPES if name != "base"]
    names = every if _COMPARED.value is None else _COMPARED.value
    for given, known in ((names, every), (_SAMPLERS.value, recipes.SAMPLERS)):
        if unknown := [name for name in given if name not in known]:
            raise app.UsageError(f"Unknown {unknown[0]!r}; expected some of {', '.join(known)}.")
    folder = pathlib.Path(_STUDY.value).expanduser().resolve()
    seeds, steps = measure.numbers(_SEEDS, least=0), measure.numbers(_STEPS, least=1)
    result = folder / _RESULT.value
    places = train_all(folder, names, seeds)
    with mesh_lib.use(mesh_lib.local_mesh()):
        study = Study(folder, places, seeds, steps)
        records = study.run()
    rows = summarise(records)
    measure.print_table(rows)
    everything = {"machine": measure.machine(), "table": rows, "records": records}
    io.write_json(result / "quality.json", everything)
    io.write_text(result / "quality.md", markdown(rows))
    plot(rows, result / "quality.png")
    write_samples(records, result, study.decode)
    print(f"\nResults: {result}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["study"])
    cli.run(main)
