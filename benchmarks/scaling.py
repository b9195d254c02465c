"""Growth of time and memory with batch, length, vocabulary, depth and steps.

    python -m benchmarks.scaling --output=scaling.json

Doubles one number at a time and measures a distillation step and a sample at each value; the values
alternate. Prints the growth of the time from one value to the next, and saves a plot next to the
JSON. A growth of 2 is linear; below 2, something else dominates.
"""

import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from absl import app

from benchmarks import measure
from fsdfm_jax import stages
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import generate as generate_lib

START = {"batch": 4, "length": 256, "vocabulary": 16_384, "depth": 4, "steps": 4}
AXES = {
    "batch": (2, 4, 8, 16),
    "length": (128, 256, 512, 1024),
    "vocabulary": (8_192, 16_384, 32_768, 65_536),
    "depth": (2, 4, 8, 16),
    "steps": (2, 4, 8, 16),
}
_WIDTH, _HEADS, _COND_WIDTH = 256, 4, 64


def make(values: dict[str, int], dtype: str, *, train: bool) -> dict[str, Any]:
    """Make {"sample", and "train" if requested}: (function without arguments, compiled program)."""
    overrides = {"width": _WIDTH, "num_heads": _HEADS, "cond_width": _COND_WIDTH}
    overrides |= {"num_blocks": values["depth"], "remat": "dots", "logits_mib": 32}
    config = measure.make_config("tiny", dtype=dtype, overrides=overrides)
    process = process_lib.make_process(
        **config.path, num_tokens=values["vocabulary"], eos_id=values["vocabulary"] - 1
    )
    stage = stages.make_stage("distill", config, process)
    key = jax.random.key(0)
    shape = (values["batch"], values["length"])
    tokens_BL = jax.random.randint(key, shape, 0, values["vocabulary"])

    step, init = measure.make_training(config, stage)
    held = {"state": jax.jit(init)(key)}
    inputs = (key, tokens_BL, jnp.zeros(shape, bool), Sampling(values["steps"]))
    sample = generate_lib.make_sampler(stage.model, process)
    drawn = sample.lower(held["state"].params, *inputs).compile()
    made = {"sample": (lambda: drawn(held["state"].params, *inputs), drawn)}
    if not train:
        return made
    taken = jax.jit(step, donate_argnums=0).lower(held["state"], {"x1": tokens_BL}, key).compile()

    def take():
        held["state"], metrics = taken(held["state"], {"x1": tokens_BL}, key)
        return metrics["loss"]

    return made | {"train": (take, taken)}


def curve(axis: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Measure time and temporary memory of step and sample at each value of an axis."""
    points = {
        value: make(START | {axis: value}, dtype, train=axis != "steps") for value in AXES[axis]
    }
    what = ("sample",) if axis == "steps" else ("train", "sample")
    cases = {(value, each): points[value][each][0] for value in points for each in what}
    seconds = measure.in_turn(cases, rounds=rounds)
    return [
        {
            "axis": axis,
            "value": value,
            "what": each,
            "seconds": statistics.median(seconds[value, each]),
            "temporaries_gb": measure.compiled_gb(points[value][each][1])["temporaries_gb"],
        }
        for value, each in cases
    ]


def with_growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row its ratio to the row of half the value."""
    before = {(row["axis"], row["what"], 2 * row["value"]): row for row in rows}
    result = []
    for row in rows:
        half = before.get((row["axis"], row["what"], row["value"]))
        growth = None if half is None else row["seconds"] / half["seconds"]
        result.append(row | {"growth": growth})
    return result


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Plot time and memory against each axis on logarithmic axes, with a line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(AXES), figsize=(3.2 * len(AXES), 6), squeeze=False)
    for column, axis in enumerate(AXES):
        for line, key in enumerate(("seconds", "temporaries_gb")):
            panel = panels[line, column]
            for each, colour in (("train", "C0"), ("sample", "C1")):
                points = [r for r in rows if r["axis"] == axis and r["what"] == each]
                if not points:
                    continue
                x, y = [r["value"] for r in points], [r[key] for r in points]
                panel.loglog(x, y, "o-", label=each, color=colour, base=2)
                panel.loglog(x, [y[0] * v / x[0] for v in x], ":", color="gray", base=2)
            panel.set_xlabel(axis)
            panel.set_ylabel("seconds" if line == 0 else "GB of temporaries")
    panels[0, 0].legend()
    figure.suptitle("one number doubled at a time; dotted: linear from the first point")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    rows = []
    for axis in AXES:
        rows += curve(axis, measure.DTYPE.value, measure.ROUNDS.value)
    rows = with_growth(rows)
    measure.print_table(rows)
    if measure.OUTPUT.value:
        measure.write(
            {"machine": measure.machine(), "start": START, "width": _WIDTH, "points": rows}
        )
        plot(rows, pathlib.Path(measure.OUTPUT.value).expanduser().with_suffix(".png"))


if __name__ == "__main__":
    app.run(main)
