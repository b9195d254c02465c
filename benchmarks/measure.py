"""Shared code of the speed benchmarks: the paper's networks, matmul ceilings, timing.

Times drift on shared machines, so cases alternate, round after round, and are compared within a
round. Results are medians over rounds.
"""

import csv
import functools
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from configs import base
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.flow.process import Process
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import DTYPES
from fsdfm_jax.network.model import Params
from fsdfm_jax.stages.base import Stage
from fsdfm_jax.training import optim, state

VOCAB_SIZE = 50_257
SIZES = ("tiny", *base.SIZES)

SIZE = flags.DEFINE_enum("size", "0.17B", SIZES, "Network.")
BATCH = flags.DEFINE_integer("batch", None, "Rows; 2 in training and 1 in sampling.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens per row.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Type of activations.")
STEPS = flags.DEFINE_list("steps", ["8"], "Numbers of sampling steps, comma-separated.")
LOGITS_MIB = flags.DEFINE_integer("logits_mib", None, "MiB of logits per chunk.", lower_bound=0)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds, after one for warm-up.", lower_bound=1)
WANTED = flags.DEFINE_list("cases", None, "Cases to measure, comma-separated. Default: all.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the result.")

# Sizes of the square matrix products; the fastest is the ceiling.
_CEILING_SIDES = {"cpu": (1024, 2048, 4096), "gpu": (4096, 8192), "tpu": (4096, 8192)}


def make_config(size: str, *, dtype: str, overrides: Mapping[str, Any]):
    """Make a config with a network of `SIZES` and the paper's recipe; `overrides`: model keys."""
    config = base.get_config()
    if size in base.SIZES:
        base.use_paper_values(config, size)
    else:
        config.data.block_length = 128
    base.use_paper_recipe(config)
    config.model.conditioning = "additive"
    config.model.dtype = dtype
    if jax.default_backend() == "cpu":
        config.model.logits_mib = base.get_config().model.logits_mib
    for key, value in overrides.items():
        config.model[key] = type(config.model[key])(value)
    return config


def wanted(possible: list[str]) -> list[str]:
    """Return the cases in --cases, by default all; raise UsageError for unknown ones."""
    names = WANTED.value or possible
    if unknown := sorted(set(names) - set(possible)):
        raise app.UsageError(f"Unknown case(s) {unknown}; expected some of {possible}.")
    return names


def numbers(flag: flags.FlagHolder, least: int) -> list[int]:
    """Return the integers in a list flag; raise UsageError for other values."""
    given = flag.value or []
    for text in given:
        if not text.strip().isdecimal() or int(text) < least:
            raise app.UsageError(
                f"--{flag.name} takes integers >= {least}, comma-separated, got {text!r}."
            )
    return [int(text) for text in given]


def filled(params: Params) -> Params:
    """Add noise to initial parameters: products of zeros can be cheaper."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noise = [
        leaf + 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, noise)


def make_training(config, stage: Stage):
    """Return (train_step(state, batch, key), init(key) -> state) of a stage."""
    section = config[stage.name]
    optimizer = optim.make_optimizer(config.optim, section)

    def init(key):
        params = filled(model_lib.init_params(key, stage.model))
        return state.init_state(params, optimizer, ema_decay=section.ema_decay)

    step = functools.partial(
        state.train_step,
        loss=stage.loss,
        optimizer=optimizer,
        ema_decay=section.ema_decay,
    )
    return step, init


def vocab_size(size: str) -> int:
    """Return the vocabulary size: GPT-2's for the paper's networks, 1,024 for the tiny one."""
    return VOCAB_SIZE if size in base.SIZES else 1024


def make_process(config, vocab_size: int) -> Process:
    """Make the noising process of a config; the last token is the end-of-document token."""
    return process_lib.make_process(**config.path, num_tokens=vocab_size, eos_id=vocab_size - 1)


def matmul_ceiling(dtype: str, *, seconds: float = 2.0) -> float:
    """Measure operations per second of the fastest large square matrix product in `dtype`."""
    best = 0.0
    for side in _CEILING_SIDES[jax.default_backend()]:
        a, b = (
            jax.random.normal(jax.random.key(i), (side, side), jnp.float32).astype(dtype)
            for i in range(2)
        )
        # Several products per call, to hide the call overhead of fast devices.
        repeats = 1 if jax.default_backend() == "cpu" else 16

        def chain(a, b, repeats=repeats, side=side):
            return jax.lax.fori_loop(0, repeats, lambda _, x: (x @ b) * (1.0 / side), a)

        product = jax.jit(chain)
        jax.block_until_ready(product(a, b))
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            jax.block_until_ready(product(a, b))
            best = max(best, repeats * 2.0 * side**3 / (time.perf_counter() - began))
    return best


def compile_timed(jitted, *args) -> tuple[Any, float]:
    """Return (compiled function, seconds of tracing and compiling)."""
    began = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    return compiled, time.perf_counter() - began


def compiled_gb(compiled) -> dict[str, float]:
    """Return the compiler's memory plan, GB (10^9 bytes): arguments, temporaries, total."""
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "arguments_gb": round(arguments / 1e9, 3),
        "temporaries_gb": round(temporaries / 1e9, 3),
        "total_gb": round((arguments + temporaries + fresh) / 1e9, 3),
    }


def in_turn(cases: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, list[float]]:
    """Time each case in each round, in seconds, after an uncounted round 0."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            began = time.perf_counter()
            jax.block_until_ready(case())
            took = time.perf_counter() - began
            print(f"round {number}/{rounds}, {name}: {took:.3g} s", file=sys.stderr, flush=True)
            if number:
                seconds[name].append(took)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, unit: str) -> float:
    """Return the median over rounds of the ratio of a case's time to that of `unit`."""
    pairs = zip(seconds[name], seconds[unit], strict=True)
    return statistics.median(a / b for a, b in pairs)


def machine() -> dict[str, Any]:
    """Describe the machine and its software."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def peak_gb() -> float:
    """Return the peak memory in GB (10^9 bytes), of the device if reported, else the process."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e9
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows with equal keys as an aligned table."""
    names = list(rows[0])
    cells = [names] + [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        first, *others = [cell.rjust(w) for cell, w in zip(line, widths, strict=True)]
        print("  ".join([first.strip().ljust(widths[0]), *others]), flush=True)


def write_csv(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV, with the keys of all of them as columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:,.0f}" if isinstance(value, float | int) else str(value))
    )


def plot_over_steps(
    path: pathlib.Path,
    panels: Mapping[str, Callable[[Any], None]],
    *,
    steps: Sequence[int],
    ylabel: str,
    sharey: bool = False,
) -> None:
    """Plot figures against numbers of steps on logarithmic axes.

    Args:
      path: path of the PNG file.
      panels: title -> function that draws labelled curves into matplotlib axes.
      steps: values with ticks.
      ylabel: label of the first panel's y axis.
      sharey: whether all panels share the scale.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1 + 7 * len(panels), 4), squeeze=False, sharey=sharey
    )
    for panel, (title, draw) in zip(axes[0], panels.items(), strict=True):
        draw(panel)
        panel.set(xscale="log", yscale="log", xlabel="steps", title=title)
        panel.set_xticks(steps, [str(s) for s in steps])
        panel.set_xticks([], minor=True)
        panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    axes[0][0].set_ylabel(ylabel)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write(result: dict[str, Any]) -> None:
    """Write the result as JSON if --output is given."""
    if OUTPUT.value:
        target = pathlib.Path(OUTPUT.value).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {target}")
