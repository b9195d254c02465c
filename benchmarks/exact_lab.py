"""Few-step recipes at their fixed points, on exactly solvable small chains.

    python -m benchmarks.exact_lab --recipes=reference --output=reference.json
    python -m benchmarks.exact_lab --seeds=0,1,2 --sources=uniform,mask --output=lab.json

A recipe is a set of config keys (configs/base.py), read by the code of the stages, plus options
that the package doesn't have. Its stages run as if training were perfect (benchmarks/chains.py),
and the sampler's output is compared with the data: total variation (TV), KL, entropy, perplexity
under the data as judge, total correlation. Perplexity trades off against entropy, so all figures
are given twice: at temperature 1, and at the temperature where the output has the entropy of the
data. benchmarks/step_laws.py studies the objective of `refine`.

Seed 0 is the data set of the table in `REFERENCE`; other seeds draw other modes.

--output also saves a plot next to the JSON.
"""

import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import app, flags

from benchmarks import chains, measure
from benchmarks.chains import Chain, Posterior, Target, Taught
from configs import base
from fsdfm_jax.flow import jumps, losses, schedules, sources, teacher
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.flow.jumps import JumpRule
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.stages import few_step

_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Data sets, comma-separated numbers.")
_SOURCES = flags.DEFINE_list("sources", ["uniform"], "Noise, comma-separated: uniform, mask.")
_RECIPES = flags.DEFINE_list("recipes", None, "Recipes or groups of recipes. Default: all.")
_DATA_KIND = flags.DEFINE_enum("data_kind", "modes", ["modes", "markov"], "Kind of data sets.")

NUM_TOKENS, LENGTH, NOISE = 3, 4, 0.08
SAMPLER_STEPS = (1, 2, 4, 8)

# The modes of seed 0, reconstructed from the table: of the 190 sets of four modes that differ up to
# renaming, the only one that matches all figures.
_MODES = ((0, 0, 0, 0), (0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 1, 2))

# Total variation at 1, 2, 4, 8 steps and entropy at 8, from an independent, earlier computation on
# one data set.
REFERENCE: dict[str, tuple[tuple[float, ...], float]] = {
    "base/cumulative": ((0.618, 0.403, 0.187, 0.072), 2.51),
    "base": ((0.618, 0.403, 0.188, 0.080), 2.56),
    "paper": ((0.567, 0.493, 0.314, 0.191), 1.64),
    "rk4": ((0.398, 0.257, 0.157, 0.168), 1.61),
    "heun": ((0.512, 0.262, 0.095, 0.040), 2.28),
    "compose": ((0.497, 0.297, 0.145, 0.066), 2.52),
}


class Recipe(NamedTuple):
    """A recipe.

    Attributes:
      keys: config keys that differ from `_LAB`.
      target: "" for the rule of the config, or a name in `_TARGETS`.
      coupling: coupling of noise and data: "noise" or "transport".
      best_of: see `chains.Taught`.
    """

    keys: dict[str, Any]
    target: str = ""
    coupling: str = "noise"
    best_of: int = 1


# The finest width has the exact posterior; all larger ones learn from the teacher.
_LAB = {
    "pipeline": "pretrain",
    "distill.max_log2_steps": 6,
    "distill.tau": 2.0**-5,
    "eval.sampling.jump": "mixture",
}

_TARGETS = {
    "compose": chains.compose,
    "between25": chains.between(0.25),
    "between50": chains.between(0.5),
    "between75": chains.between(0.75),
}

_DISTILL = {"pipeline": "pretrain,distill"}
_PAPER = _DISTILL | {
    "distill.teacher_rule": "rk4",
    "distill.teacher_jump": "cumulative",
    "distill.teacher_end": "literal",
    "eval.sampling.jump": "cumulative",
}


def _sampled(**keys: Any) -> dict[str, Any]:
    return {f"eval.sampling.{name}": value for name, value in keys.items()}


def _annealed() -> dict[str, Any]:
    """Return the keys of the preset `base.use_annealed_sampler`."""
    sampling = base.get_config().eval.sampling
    base.use_annealed_sampler(sampling)
    return {name: sampling[name] for name in ("jump", "grid", "cooling", "look_ahead")}


GROUPS: dict[str, dict[str, Recipe]] = {
    "reference": {
        "base/cumulative": Recipe(_sampled(jump="cumulative")),
        "base": Recipe({}),
        "paper": Recipe(_PAPER),
        "rk4": Recipe(_PAPER | {"distill.teacher_end": "posterior_draw"}),
        "heun": Recipe(_DISTILL),
        "compose": Recipe(_DISTILL, target="compose"),
    },
    "teachers": {
        "between25": Recipe(_DISTILL, target="between25"),
        "between50": Recipe(_DISTILL, target="between50"),
        "between75": Recipe(_DISTILL, target="between75"),
        "heun/jsd": Recipe(_DISTILL | {"distill.divergence": "jsd"}),
        "heun/temperature2": Recipe(_DISTILL | {"distill.temperature": 2.0}),
        "heun/tau16": Recipe(_DISTILL | {"distill.tau": 2.0**-4}),
        "heun/tau16/jsd": Recipe(_DISTILL | {"distill.tau": 2.0**-4, "distill.divergence": "jsd"}),
        "heun/tau8": Recipe(_DISTILL | {"distill.tau": 2.0**-3}),
    },
    "kernels": {
        "base/euler": Recipe(_sampled(jump="euler")),
        "heun/cumulative": Recipe(
            _DISTILL | {"distill.teacher_jump": "cumulative"} | _sampled(jump="cumulative")
        ),
        "heun/teacher-cumulative": Recipe(_DISTILL | {"distill.teacher_jump": "cumulative"}),
        "heun/sampler-cumulative": Recipe(_DISTILL | _sampled(jump="cumulative")),
    },
    "grids": {
        f"base/{grid}": Recipe(_sampled(grid=grid))
        for grid in (
            *("cosine", "power:0.7", "power:1.4", "power:2"),
            *("geometric:0.1", "geometric:0.01", "geometric:0.0001"),
        )
    },
    "schedules": {
        f"{name}/kappa-{kappa}": Recipe(keys | {"path.schedule": schedule, "path.power": power})
        for name, keys in (("base", {}), ("heun", _DISTILL))
        for kappa, schedule, power in (("cosine", "cosine", 1.0), ("square", "polynomial", 2.0))
    },
    "sampling": {
        "base/top_p0.9": Recipe(_sampled(top_p=0.9)),
        "heun/top_p0.9": Recipe(_DISTILL | _sampled(top_p=0.9)),
        **{
            f"{name}/{what}": Recipe(keys | _sampled(**values))
            for name, keys in (("base", {}), ("heun", _DISTILL))
            for what, values in {
                "dispersed": {"jump": "dispersed"},
                "cooled": {"cooling": 0.7},
                "ahead": {"look_ahead": 0.5},
                "annealed": _annealed(),
            }.items()
        },
        "base/revealed-jump": Recipe({"path.revealed": "jump"}),
    },
    "ideas": {
        "heun/best-of-2": Recipe(_DISTILL, best_of=2),
        "compose/best-of-2": Recipe(_DISTILL, target="compose", best_of=2),
        "compose/best-of-4": Recipe(_DISTILL, target="compose", best_of=4),
        "transport": Recipe({}, coupling="transport"),
        "transport+heun": Recipe(_DISTILL, coupling="transport"),
    },
}
RECIPES = {name: recipe for group in GROUPS.values() for name, recipe in group.items()}


def lab_config(recipe: Recipe, source: str) -> ml_collections.ConfigDict:
    """Return the full configuration of a recipe."""
    config = base.get_config()
    config.update_from_flattened_dict(_LAB | recipe.keys | {"path.source": source})
    return config


def make_data(kind: str, seed: int) -> np.ndarray:
    """Make a data set: the probability of each sequence, float64 [NUM_TOKENS] * LENGTH.

    Args:
      kind: "modes", four sequences with noise; or "markov", a chain whose rows have three quarters
        of their mass on one or two tokens.
      seed: 0 with "modes" is the data set of `REFERENCE`.
    """
    generator = np.random.default_rng(seed)
    if kind == "markov":
        first, *move = generator.dirichlet(np.full(NUM_TOKENS, 0.3), size=1 + NUM_TOKENS)
        # As in text, no sequence is impossible, so KL stays finite.
        soften = lambda p: (1 - NOISE) * p + NOISE / NUM_TOKENS
        return chains.markov_data(soften(first), soften(np.stack(move)), length=LENGTH)
    modes = generator.integers(NUM_TOKENS, size=(4, LENGTH)).tolist() if seed else _MODES
    return chains.modes_data(modes, num_tokens=NUM_TOKENS, noise=NOISE)


# Cached, so that equal settings share one object and its compiled programs.


@functools.cache
def _rule(name: str, end: str) -> JumpRule:
    rule = jumps.get_rule(name)
    return jumps.with_posterior_end(rule) if end == "posterior_draw" else rule


@functools.cache
def _target(name: str, rule: str, schedule: schedules.Schedule) -> Target:
    if name:
        return chains.half_steps(schedule, _TARGETS[name])
    quadrature = teacher.get_rule(rule)
    return lambda key, *args: teacher.teacher_logits(key, quadrature, *args)


def read_taught(config, name: str, process: Process, recipe: Recipe) -> Taught | None:
    """Read the teacher of a stage for `chains`; None if all widths learn from data."""
    section = config[name]
    below, above = few_step.split_budgets(section, name)
    if not above.log2_steps:
        return None
    term = few_step.read_teacher_term(section, above, process)
    (divergence,) = (key for key, value in losses.DIVERGENCES.items() if value is term.divergence)
    return Taught(
        section.tau,
        _target(recipe.target, section.teacher_rule, process.schedule),
        _rule(section.teacher_jump, section.teacher_end),
        divergence,
        term.temperature,
        2.0**-below.finest,
        recipe.best_of,
    )


def learn(chain: Chain, recipe: Recipe, config) -> tuple[Posterior, np.ndarray]:
    """Return the fixed point of a recipe's last stage, which is independent of earlier stages.

    Args:
      chain: its data and process.
      recipe, config: the recipe and its `lab_config`.

    Returns:
      (learnt posterior, coupling of noise and data used in training [N, N]).
    """
    last = config.pipeline.split(",")[-1]
    taught = read_taught(config, last, chain.process, recipe) if last == "distill" else None
    coupling_NN = chain.independent_NN
    if recipe.coupling == "transport":
        coupling_NN = chains.transport(chain)
    return chains.student(chain, coupling_NN, taught), coupling_NN


def measures(chain: Chain, p_N: np.ndarray) -> dict[str, float]:
    """Return all measures of an output law; nats, perplexity per token."""
    return {
        "tv": chains.total_variation(p_N, chain.data_N),
        "kl": chains.kl(chain.data_N, p_N),
        "entropy": chains.entropy(p_N),
        "perplexity": chains.perplexity(chain, p_N),
        "total_correlation": chains.total_correlation(chain, p_N),
    }


def evaluate(chain: Chain, posterior: Posterior, config, steps: int) -> dict[str, Any]:
    """Return `measures` of samples: with the config's sampler, and at the entropy of the data."""
    sampling = Sampling.from_dict(config.eval.sampling).replace(steps=steps)

    def sample(temperature):
        colder = sampling.replace(temperature=temperature)
        return chains.run(chain, posterior, colder, chain.noise_N)

    temperature = chains.matched_temperature(sample, chains.entropy(chain.data_N))
    matched = None
    if temperature is not None:
        matched = measures(chain, sample(temperature)) | {"temperature": temperature}
    return measures(chain, sample(sampling.temperature)) | {"matched": matched}


def study(
    recipes: Sequence[str], *, seeds: Sequence[int], source: str, kind: str = "modes"
) -> list[dict[str, Any]]:
    """Evaluate recipes; return a record for each recipe and data set."""
    records = []
    for seed in seeds:
        made: dict[Process, Chain] = {}
        for name in recipes:
            began = time.perf_counter()
            recipe = RECIPES[name]
            config = lab_config(recipe, source)
            process = process_lib.make_process(**config.path, num_tokens=NUM_TOKENS, eos_id=0)
            if process not in made:
                made[process] = chains.make_chain(process, make_data(kind, seed))
            chain = made[process]
            posterior, coupling_NN = learn(chain, recipe, config)
            by_steps = {s: evaluate(chain, posterior, config, s) for s in SAMPLER_STEPS}
            correlation = chains.conditional_total_correlation(chain, coupling_NN, 0.0)
            records.append(
                {
                    "recipe": name,
                    "seed": seed,
                    "source": source,
                    "data": measures(chain, chain.data_N),
                    "coupling_total_correlation": correlation,
                    "steps": by_steps,
                    "keys": recipe.keys,
                    "beside": {k: v for k, v in recipe._asdict().items() if k != "keys"},
                }
            )
            took = time.perf_counter() - began
            print(f"{source} {seed} {name}: {took:.1f} s", file=sys.stderr, flush=True)
    return records


def beside_reference(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make the rows of `REFERENCE`, next to our figures."""
    ours = {r["recipe"]: r["steps"] for r in records if r["seed"] == 0}
    rows = []
    for name, (reference, entropy) in REFERENCE.items():
        if name not in ours:
            continue
        row: dict[str, Any] = {"recipe": name}
        for steps, value in zip(SAMPLER_STEPS, reference, strict=True):
            row[f"S={steps}"] = f"{ours[name][steps]['tv']:.4f} ({value:.3f})"
        rows.append(row | {"H at S=8": f"{ours[name][8]['entropy']:.3f} ({entropy:.2f})"})
    return rows


def ranking(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make a row for each recipe, best first: geometric means over the data sets.

    "tv S": total variation at the entropy of the data, None if no temperature gives it; "ppl S":
    perplexity there, relative to the data's; "tv' S": total variation at temperature 1; "H' 8":
    entropy at 8 steps and temperature 1, relative to the data's; "ctc": the coupling's conditional
    total correlation at t=0, relative to the independent coupling's; "score": mean over the steps
    of "tv S" ("tv' S" where that is None), relative to the base model's.
    """
    base_of = {r["seed"]: r for r in records if r["recipe"] == "base"}
    rows = []
    for name in dict.fromkeys(r["recipe"] for r in records):
        mine = [r for r in records if r["recipe"] == name]
        rows.append({"recipe": name} | _row(mine, [base_of[r["seed"]] for r in mine]))
    return sorted(rows, key=lambda row: row["score"])


def _row(records, bases):
    mean = statistics.geometric_mean
    row = {}
    matched = {s: [r["steps"][s]["matched"] for r in records] for s in SAMPLER_STEPS}
    for s, found in matched.items():
        row[f"tv {s}"] = mean(each["tv"] for each in found) if all(found) else None
    for s, found in matched.items():
        ratios = zip(found, records, strict=True)
        row[f"ppl {s}"] = (
            mean(each["perplexity"] / r["data"]["perplexity"] for each, r in ratios)
            if all(found)
            else None
        )
    for s in SAMPLER_STEPS:
        row[f"tv' {s}"] = mean(r["steps"][s]["tv"] for r in records)
    row["H' 8"] = mean(r["steps"][8]["entropy"] / r["data"]["entropy"] for r in records)
    ctc = lambda those: mean(r["coupling_total_correlation"] for r in those)
    row["ctc"] = ctc(records) / ctc(bases)
    best_known = lambda r, s: (r["steps"][s]["matched"] or r["steps"][s])["tv"]
    row["score"] = mean(
        best_known(r, s) / best_known(b, s)
        for r, b in zip(records, bases, strict=True)
        for s in SAMPLER_STEPS
    )
    return row


def plot(tables: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
    """Plot total variation at matched entropy against steps, one panel per source."""
    from matplotlib import colormaps

    def draw(rows, panel):
        shown = rows[:4] + [row for row in rows[4:] if row["recipe"] in REFERENCE]
        for row, color in zip(shown, colormaps["tab20"].colors, strict=False):
            values = [row[f"tv {s}"] for s in SAMPLER_STEPS]
            panel.plot(SAMPLER_STEPS, values, marker="o", color=color, label=row["recipe"])

    measure.plot_over_steps(
        path,
        {f"{source} noise": functools.partial(draw, rows) for source, rows in tables.items()},
        steps=SAMPLER_STEPS,
        ylabel="total variation at the data's entropy",
        sharey=True,
    )


def _asked() -> list[str]:
    names = []
    for name in _RECIPES.value or list(GROUPS):
        if name not in GROUPS and name not in RECIPES:
            raise app.UsageError(
                f"Unknown recipe {name!r}; expected groups of {', '.join(GROUPS)}, or recipes of "
                f"{', '.join(RECIPES)}."
            )
        names += list(GROUPS.get(name, [name]))
    # Scores are relative to the base model.
    return list(dict.fromkeys(["base", *names]))


def _possible(name: str, source: str) -> bool:
    """Return whether a recipe applies: a mask source has constant noise and only one coupling."""
    return source == "uniform" or RECIPES[name].coupling == "noise"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    asked, seeds, kind = _asked(), measure.numbers(_SEEDS, least=0), _DATA_KIND.value
    tables, records = {}, []
    for source in _SOURCES.value:
        sources.make_source(source, num_tokens=NUM_TOKENS)  # rejects unknown ones
        names = [name for name in asked if _possible(name, source)]
        found = study(names, seeds=seeds, source=source, kind=kind)
        if source == "uniform" and kind == "modes" and (rows := beside_reference(found)):
            print("\nour total variation (reference), data set 0")
            measure.print_table(rows)
        tables[source], records = ranking(found), records + found
        print(f"\n{source} noise, {kind}, data sets {seeds}, at the entropy of the data")
        measure.print_table(tables[source])
    if measure.OUTPUT.value:
        measure.write({"data_kind": kind, "tables": tables, "records": records})
        plot(tables, pathlib.Path(measure.OUTPUT.value).expanduser().with_suffix(".png"))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the programs are too small for a GPU or TPU
    app.run(main)
