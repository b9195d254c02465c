"""Few steps against many where an exact judge decides: a picture and a table per task.

    python -m benchmarks.proof --task=sudoku:6x6 --workdir=runs/proof_6x6 --seeds=0,1,2
    python -m benchmarks.proof --task=hmm --workdir=runs/proof_hmm --seeds=0,1,2

One base model, and from it a few-step model for each recipe and seed, at equal numbers of network
evaluations, the auxiliary network's included:

    ours    `refine` of the task's configuration
    heun    `distill` with our defaults
    paper   `distill` as published: RK-4, cumulative jumps, the literal end of the path

Each is sampled at several numbers of steps, time grids and temperatures. Grids are ranked by the
share of valid ones, a language by its excess over the law. The summary has a row as published
(uniform times, temperature 1), at its best times, and at its best times and temperature. Rows that
don't look like the truth can't be best, so neither sharpening nor a handful of samples can win:
valid grids must look uniform, and the entropies of tokens and bigrams may be at most 1% below the
law's. A killed run resumes by the same command. WORKDIR gets results.csv (every point, also those
of earlier commands), summary.json (a row for each recipe and number of steps) and proof.png.
"""

import functools
import itertools
import json
import pathlib
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging

from benchmarks import measure
from configs import hmm as hmm_config
from configs import sudoku as sudoku_config
from fsdfm_jax import io
from fsdfm_jax.evaluate import exact_judges
from fsdfm_jax.exact import hmm, hmm_judge, sudoku, sudoku_judge
from fsdfm_jax.exact.hmm import Law
from fsdfm_jax.exact.sudoku import Sudoku
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import generate
from fsdfm_jax.training import workdir as workdir_lib


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags; the program does, importing this file doesn't."""
    tasks = (*(f"sudoku:{name}" for name in sudoku.SIZES), "hmm")
    flags.DEFINE_enum("task", tasks[0], tasks, "Data.", flag_values=values)
    flags.DEFINE_string("workdir", None, "Models and results.", required=True, flag_values=values)
    for name, default, text in (
        ("recipes", list(_RECIPES), "Few-step models."),
        ("seeds", ["0"], "Seeds of the few-step trainings."),
        ("few", ["1", "2", "4", "8", "16", "64"], "Steps of all models."),
        ("many", ["256", "1024"], "Further steps of the base model."),
        ("temperatures", None, "Temperatures; default: the task's."),
        ("many_temperatures", None, "Temperatures above 64 steps; default: the task's."),
        ("grids", None, "Time grids; default: the task's."),
    ):
        flags.DEFINE_list(name, default, text, flag_values=values)
    number = functools.partial(flags.DEFINE_integer, lower_bound=50, flag_values=values)
    number("samples", None, "Samples of a point; default: the task's.")
    number("many_samples", None, "Samples of a point above 64 steps; default: the task's.")


_BATCH = 250  # samples drawn at once
_TEACHER_CALLS = {"heun": 2, "paper": 4}
_RECIPES = ("ours", *_TEACHER_CALLS)


class Task(NamedTuple):
    """What is trained, and how samples of it are judged.

    Attributes:
      config: its configuration.
      length: tokens of a sample.
      refine: `refine` of its configuration.
      judge: int [N, L] -> keys of a row: the `figure` with its interval, "distinct", and "flags",
        "" where the samples look like the truth.
      figure: what rows are ranked by, a key of `exact_judges.RANKED`.
      defaults: of the flags that have none.
    """

    config: str
    length: int
    refine: ml_collections.ConfigDict
    judge: Callable[[np.ndarray], dict[str, Any]]
    figure: str
    defaults: dict[str, Any]

    @property
    def ranked(self) -> exact_judges.Ranked:
        """How the figure is ranked and shown."""
        return exact_judges.RANKED[self.figure]


def make_task(name: str) -> Task:
    """Make a task from its flag; the data of "hmm" have to exist."""
    if name == "hmm":
        path, config, figure = "configs/hmm.py", hmm_config.get_config(), "excess"
        judge = functools.partial(_judge_language, hmm.load(config.eval.law))
        temperatures = ["1.7", "1.6", "1.5", "1.4", "1.3", "1.2", "1.1", "1", "0.9"]
        many_temperatures = ["1", "0.9"]
        samples, many_samples = 128, 64
    else:
        size = sudoku.get_size(name.partition(":")[2])
        path, figure = f"configs/sudoku.py:{size.name}", "valid"
        config = sudoku_config.get_config(size.name)
        judge = functools.partial(_judge_grids, size)
        temperatures, many_temperatures = ["1", "0.8", "0.6", "0.4"], ["1", "0.8"]
        samples, many_samples = 1_000, 250
    defaults = {
        "temperatures": temperatures,
        "many_temperatures": many_temperatures,
        "grids": ["uniform", config.refine.grid],
        "samples": samples,
        "many_samples": many_samples,
    }
    return Task(path, config.data.block_length, config.refine, judge, figure, defaults)


class Trained(NamedTuple):
    """A model to be sampled: its recipe, seed and folder."""

    recipe: str
    seed: int
    folder: pathlib.Path


def train(task: Task, workdir: pathlib.Path, recipes: list[str], seeds: list[int]) -> list[Trained]:
    """Trains what isn't trained yet; every run resumes where it was killed."""
    base = workdir / "base"
    _run_main(task.config, base, "pretrain")
    start = base / "stages" / "pretrain"
    models = [Trained("base", 0, start)]
    for recipe in recipes:
        for seed in seeds:
            folder = workdir / f"{recipe}_{seed}"
            stage = "refine" if recipe == "ours" else "distill"
            options = [f"--config.{stage}.init_from={start.resolve()}", f"--config.seed={seed}"]
            if recipe == "ours":
                options.append(f"--config.refine.teacher={start.resolve()}")
            else:
                options.append(f"--config.distill.num_steps={_equal_steps(task, recipe)}")
            published = ("," if ":" in task.config else ":") + "paper"
            config = task.config + (published if recipe == "paper" else "")
            _run_main(config, folder, stage, *options)
            models.append(Trained(recipe, seed, folder / "stages" / stage))
    return models


def _equal_steps(task: Task, recipe: str) -> int:
    """Training steps that take as many network evaluations as ours."""
    return round(task.refine.num_steps * _cost(task, "ours") / _cost(task, recipe))


def _cost(task: Task, recipe: str) -> int:
    """Network evaluations of a row in a training step, a gradient counted as three.

    `refine` has the walk, the answers and the auxiliary network in each update of either network,
    and in the student's the base model.
    """
    if recipe == "ours":
        return (1 + 1 + 3) * task.refine.auxiliary_updates + (1 + 3 + 1 + 1)
    return 3 + _TEACHER_CALLS[recipe]


def _run_main(config: str, workdir: pathlib.Path, pipeline: str, *options: str) -> None:
    arguments = [f"--config={config}", f"--workdir={workdir}", f"--config.pipeline={pipeline}"]
    arguments.append("--config.model.given=unmarked")  # whole samples only
    _run("fsdfm_jax.main", *arguments, "--noevaluate", *options)


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def points(
    model: Trained, task: Task, given: dict[str, Any], done: dict[str, dict]
) -> Iterator[dict[str, Any]]:
    """A row for each number of steps, temperature and time grid; `done` ones aren't drawn again."""
    weights = workdir_lib.load_weights(model.folder)
    process = process_lib.make_process(
        **weights.metadata["recipe"]["path"],
        num_tokens=weights.model.vocab_size,
        eos_id=0,  # no part in drawing whole samples
    )
    run = jax.jit(generate.make_generator(weights.model, process))
    for steps in map(int, given["few"] + (given["many"] if model.recipe == "base" else [])):
        many = steps > 64
        count = given["many_samples" if many else "samples"]
        temperatures = given["many_temperatures" if many else "temperatures"]
        # One step has one time grid.
        own = itertools.product(temperatures, given["grids"] if steps > 1 else given["grids"][:1])
        for temperature, grid in own:
            row = {"recipe": model.recipe, "seed": model.seed, "steps": steps}
            row |= {"temperature": float(temperature), "samples": count, "trained": weights.step}
            seed = zlib.crc32(json.dumps(row).encode())  # the same noise on all time grids
            row["grid"] = grid
            key = json.dumps(row)
            if key in done:
                yield done[key]
                continue
            sampling = Sampling(steps, "mixture", grid, temperature=float(temperature))
            tokens_NL = _draw(run, weights.params, task.length, sampling, count, seed)
            yield row | task.judge(tokens_NL) | {"key": key}


def _draw(run, params, length: int, sampling: Sampling, count: int, seed: int) -> np.ndarray:
    """int [count, L]."""
    rows = min(_BATCH, count)
    free_BL = jnp.zeros((rows, length), jnp.int32)
    frozen_BL = jnp.zeros(free_BL.shape, bool)
    parts = []
    for index in range(-(-count // rows)):
        own = generate.batch_seed(seed, index)
        parts.append(np.asarray(run(params, jnp.uint32(own), free_BL, frozen_BL, sampling)))
    return np.concatenate(parts)[:count]


def _judge_grids(size: Sudoku, tokens_NL: np.ndarray) -> dict[str, Any]:
    report = sudoku_judge.judge(size, tokens_NL)
    figures = report.figures
    valid = figures["valid"]
    row = {"valid": valid.value, "valid_low": valid.low, "valid_high": valid.high}
    row |= {"groups": figures["groups"].value, "distinct": figures["distinct"].value}
    row |= {f"{name}_z": test.z for name, test in report.uniformity.items()}
    if "total_variation" in figures:
        row["total_variation"] = figures["total_variation"].value
        row["expected_total_variation"] = report.expected["total_variation"]
    return row | {"flags": "; ".join(report.flags)}


_TOLERANCE = 0.01  # of the entropies, as a share of the law's


def _judge_language(law: Law, tokens_NL: np.ndarray) -> dict[str, Any]:
    report = hmm_judge.judge(law, tokens_NL)
    figures, row = report.figures, {}
    for name in ("excess", "kl_1", "kl_2", "kl_3", "entropy_1", "entropy_2"):
        figure = figures[name]
        row |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
    row["distinct"] = figures["distinct"].value
    flagged = ["distinct"] if "distinct" in report.flags else []
    for name in ("entropy_1", "entropy_2"):
        row[f"law_{name}"], _ = report.law[name]
        if row[name] < (1 - _TOLERANCE) * row[f"law_{name}"]:
            flagged.append(name)
    return row | {"flags": "; ".join(flagged)}


def summarise(task: Task, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each recipe and number of steps the figure as published, on the best grid, at best.

    Means over seeds, each seed at its own best, with the least and the most.
    """
    result = []
    for recipe, steps in dict.fromkeys((row["recipe"], row["steps"]) for row in rows):
        chosen = [row for row in rows if (row["recipe"], row["steps"]) == (recipe, steps)]
        plain = [row for row in chosen if row["temperature"] == 1]
        published = [row for row in plain if row["grid"] == "uniform"]
        best = _best_of_each_seed(task, chosen)
        values = [row[task.figure] for row in best]
        entry = {"recipe": recipe, "steps": steps, "seeds": len(best)}
        mean = lambda rows: float(np.mean([r[task.figure] for r in rows])) if rows else None
        entry |= {"published": mean(published), "plain": mean(_best_of_each_seed(task, plain))}
        entry |= {"best": mean(best), "least": min(values), "most": max(values)}
        entry |= {name: [row[name] for row in best] for name in ("grid", "temperature")}
        entry |= {"distinct": min(float(row["distinct"]) for row in best)}  # "nan" when resumed
        result.append(entry | {"flagged": sum(bool(row["flags"]) for row in best)})
    return result


def _best_of_each_seed(task: Task, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    seeds = dict.fromkeys(row["seed"] for row in rows)
    by_seed = [[row for row in rows if row["seed"] == seed] for seed in seeds]
    sign = 1 if task.ranked.rising else -1
    return [max(own, key=lambda r: (not r["flags"], sign * r[task.figure])) for own in by_seed]


def draw(task: Task, summary: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """The picture: the figure against steps, where any samples look like the truth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    names = {"base": "base model", "ours": "ours (refine)", "heun": "Heun teacher"}
    names["paper"] = "published recipe"
    for number, (recipe, label) in enumerate(names.items()):
        own = (row for row in summary if row["recipe"] == recipe and not row["flagged"])
        rows = sorted(own, key=lambda row: row["steps"])
        if not rows:
            continue
        steps, color = [row["steps"] for row in rows], f"C{number}"
        axes.plot(
            steps, [row["best"] for row in rows], "o-", color=color, label=f"{label}, at best"
        )
        axes.fill_between(
            steps, [r["least"] for r in rows], [r["most"] for r in rows], color=color, alpha=0.2
        )
        if recipe == "base":
            published = [row["published"] for row in rows]
            name = f"{label}, uniform times, T = 1"
            axes.plot(steps, published, "--", color=color, label=name, linewidth=1)
    ticks = sorted({row["steps"] for row in summary})
    axes.set(xscale="log", xlabel="steps", ylabel=task.ranked.axis, title=title)
    if task.ranked.rising:
        axes.set_ylim(0, 1)
    else:
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter("{x:g}")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    given = flags.FLAGS
    if unknown := set(given.recipes) - set(_RECIPES):
        raise app.UsageError(f"--recipes has unknown {sorted(unknown)}; expected {_RECIPES}.")
    workdir = pathlib.Path(given.workdir)
    _run("fsdfm_jax.exact", f"--task={given.task}")
    task = make_task(given.task)
    names = ("few", "many", *task.defaults)
    chosen = {k: task.defaults[k] if given[k].value is None else given[k].value for k in names}
    models = train(task, workdir, given.recipes, [int(seed) for seed in given.seeds])
    store = workdir / "points.json"
    done = {row["key"]: row for row in io.read_json(store)} if store.is_file() else {}
    for model in models:
        for row in points(model, task, chosen, done):
            if row["key"] not in done:
                shown = {k: v for k, v in row.items() if k in (task.figure, "distinct", "flags")}
                logging.info("%s: %s", row["key"], shown)
                done[row["key"]] = row
                io.write_json(store, list(done.values()))
    rows = [{k: v for k, v in row.items() if k != "key"} for row in done.values()]
    summary = summarise(task, rows)
    measure.write_csv(workdir / "results.csv", rows)
    io.write_json(workdir / "summary.json", {"machine": measure.machine(), "rows": summary})
    draw(task, summary, workdir / "proof.png", f"{given.task}, few steps against many")
    names = ("recipe", "steps", "published", "plain", "best", "least", "most", "flagged")
    measure.print_table([{key: row[key] for key in names} for row in summary])


if __name__ == "__main__":
    define_flags()
    app.run(main)
