r"""Compile the training step and the sampler ahead of time and report their needs.

    python -m launch.aot_compile --config=configs/paper.py:1.3B --topology=v5e:4x4 \
        --config.mesh.fsdp=16
    python -m launch.aot_compile --config=configs/tiny.py --topology=local
    python -m launch.aot_compile --cases=docs/reference/scaling.csv \
        --markdown=docs/reference/scaling.md

No TPU is needed: its compiler comes with the extra `tpu` (package libtpu) and runs on any machine.
"local" means the devices of this machine. For each program, it prints the memory needed and
available per chip, the required operations and their minimum time, the compiler's operation count
and the collectives. `--largest_batch` finds the batch that fills the memory.

The last form compiles the rows of a CSV file that this compiler version hasn't compiled yet. The
first columns are the input, the others are filled in. In the document, it replaces the table
between "<!-- NAME -->" and "<!-- /NAME -->" by the rows whose `table` is NAME.
docs/reference/scaling.md explains the numbers.
"""

import csv
import importlib.metadata
import io as streams
import pathlib
import re
import sys
from typing import Any

import jax
from absl import app, flags

from configs import base
from fsdfm_jax import cli, io, stages
from launch import aot


def define_flags() -> None:
    """Define the flags of the command."""
    cli.define_config("Configuration, configs/paper.py:1.3B.")
    flags.DEFINE_string("topology", None, "TPUs to compile for, e.g. v5e:8x8, or local.")
    flags.DEFINE_enum(
        "stage",
        None,
        stages.NAMES,
        "Stage. Default: distill if in the pipeline, else the last one.",
    )
    flags.DEFINE_list("what", list(aot.KINDS), "Programs: train, sampler.")
    flags.DEFINE_integer(
        "batch", None, "Rows per batch over all chips. Default: the stage's.", lower_bound=1
    )
    flags.DEFINE_integer("steps", 8, "Number of sampling steps.", lower_bound=1)
    flags.DEFINE_bool("largest_batch", False, "Find the batch that fills the memory.")
    flags.DEFINE_string("cases", None, "CSV file with rows to compile and fill in.")
    flags.DEFINE_string("markdown", None, "Document whose tables --cases replaces.")


# Input columns of --cases; `changes` are KEY=VALUE, separated by spaces.
GIVEN = ("table", "size", "stage", "topology", "data", "fsdp", "tensor", "rows", "changes")
FOUND = (
    *("memory", "total", "arguments", "temporaries", "fits", "flops", "least_s"),
    *("counted_flops", "counted_bytes"),
    *(f"{kind}{part}" for kind in aot.COLLECTIVES for part in ("", "_bytes")),
    "compiler",
)


def summary(row: dict[str, Any]) -> str:
    """Format the result of `aot.describe` as a few lines of text."""
    gb = lambda key: "?" if row.get(key) is None else f"{row[key] / 1e9:.3g}"
    fits = {True: "fits", False: "too large", None: "may fit"}[row["fits"]]
    least = f", at least {1e3 * row['least_s']:.3g} ms" if row["least_s"] else ""
    lines = [
        f"{row['program']}, {row['rows']} rows",
        f"  memory of a chip  {gb('total')} of {gb('memory')} GB: {fits} "
        f"(arguments {gb('arguments')}, temporaries {gb('temporaries')})",
        f"  operations        {row['flops'] / 1e12:.3g} TFLOP needed of each chip{least}",
    ]
    if row.get("counted_flops") is not None:
        lines += [
            f"  compiler's count  {row['counted_flops'] / 1e12:.3g} TFLOP, "
            f"{gb('counted_bytes')} GB moved; the body of a loop counts once, below too",
            *(
                f"  {kind:18}{row[kind]}, {gb(f'{kind}_bytes')} GB"
                for kind in aot.COLLECTIVES
                if kind in row
            ),
        ]
    return "\n".join(lines)


def compile_case(case: dict[str, str]) -> dict[str, Any]:
    """Compile a row of --cases: a training step of the paper's recipe at some size."""
    config, rows = base.get_config(), int(case["rows"])
    base.use_paper_values(config, case["size"])
    base.use_paper_recipe(config)
    changes = dict(change.split("=") for change in case["changes"].split())
    changes |= {f"mesh.{axis}": case[axis] for axis in ("data", "fsdp", "tensor")}
    for key, value in changes.items():
        section, _, leaf = key.rpartition(".")
        config[section][leaf] = type(config[section][leaf])(value)
    _progress("compiling " + " ".join(case[key] for key in GIVEN if case[key]))
    target = aot.find_target(case["topology"])
    _, (program,) = aot.make_programs(["train"], case["stage"], config, target, rows=rows, steps=1)
    return aot.describe(program, rows, target)


def compile_cases(path: pathlib.Path) -> list[dict[str, str]]:
    """Compile the rows of a CSV file, fill them in one by one, and return all of them."""
    compiler = f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
    cases = list(csv.DictReader(path.read_text().splitlines()))
    for number, case in enumerate(cases):
        if case.get("compiler") == compiler:
            continue
        given = {key: case[key] for key in GIVEN}
        cases[number] = given | compile_case(given) | {"compiler": compiler}
        stream = streams.StringIO()
        writer = csv.DictWriter(stream, GIVEN + FOUND, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(cases)
        io.write_text(path, stream.getvalue())
    return list(csv.DictReader(path.read_text().splitlines()))


def replace_tables(text: str, rows: list[dict[str, str]]) -> str:
    """Replace the table of each name in `rows` between its markers in a document."""
    for name in dict.fromkeys(row["table"] for row in rows):
        table = markdown([row for row in rows if row["table"] == name])
        between = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        text, count = between.subn(lambda match, new=table: match[1] + new + match[2], text)
        if count != 1:
            raise ValueError(f'Expected "<!-- {name} -->" .. "<!-- /{name} -->" once, got {count}.')
    return text


def markdown(rows: list[dict[str, str]]) -> str:
    """Format the finished rows of --cases as a Markdown table."""
    lines = ["| training step | chips, mesh | rows | GB of a chip | fits | at least, ms |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for row in (row for row in rows if row["compiler"]):
        gb = [f"{float(row[key]) / 1e9:.1f}" if row[key] else "?" for key in ("total", "memory")]
        cells = [
            " ".join([row["size"], row["stage"], *(f"`{one}`" for one in row["changes"].split())]),
            f"{row['topology']}, {row['data']} x {row['fsdp']} x {row['tensor']}",
            row["rows"],
            " of ".join(gb),
            {"True": "yes", "False": "no"}[row["fits"]],
            f"{1e3 * float(row['least_s']):,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    if values.cases:
        rows = compile_cases(pathlib.Path(values.cases))
        if values.markdown:
            document = pathlib.Path(values.markdown)
            io.write_text(document, replace_tables(document.read_text(), rows))
        return
    config = values.config
    if config is None or values.topology is None:
        raise ValueError("Give --config and --topology, or --cases.")
    pipeline = [name.strip() for name in config.pipeline.split(",")]
    name = values.stage or ("distill" if "distill" in pipeline else pipeline[-1])
    target, rows = aot.find_target(values.topology), values.batch or config[name].batch_size
    wanted = None if values.largest_batch else rows
    mesh, programs = aot.make_programs(
        values.what, name, config, target, rows=wanted, steps=values.steps
    )
    sizes = " x ".join(map(str, mesh.devices.shape))
    print(f"{name} on {target.name}, mesh {sizes}, blocks of {config.data.block_length} tokens")
    for program in programs:
        _progress(f"compiling {program.kind}")
        if not values.largest_batch:
            print(summary(aot.describe(program, rows, target)), flush=True)
        elif row := aot.find_largest(program, target, _progress):
            print(f"largest that fits, {summary(row)}", flush=True)
        else:
            print(f"{program.kind}: two rows per shard don't fit", flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(
        main, kept="finished rows of --cases are kept; run the same command to compile the others"
    )
