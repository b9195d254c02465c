r"""Compiles the training step and the sampler for chips that aren't there, and says what they take.

    python -m launch.aot_compile --config=configs/paper_1b3.py --topology=v5e:4x4 \
        --config.mesh.fsdp=16
    python -m launch.aot_compile --config=configs/paper_1b3.py --topology=v5e:8x8,v6e:8x8 \
        --config.mesh.fsdp=64 --what=train --batch=128,512
    python -m launch.aot_compile --config=configs/tiny.py --topology=local --largest_batch

For TPUs the compiler comes with the extra `tpu` (package libtpu) and runs on any machine; "local"
stands for the devices of this one. Printed for each program: the memory of each chip against what
it has, operations, bytes moved in its memory, bytes sent to other chips by kind of exchange, all
with loops counted as often as they run, and the bounds of a roofline on the time and on the share
of the peak that goes into useful operations (see docs/scaling.md for what these numbers are).
`--vary` compares values of a key, `--largest_batch` searches the largest batch that fits,
`--output` writes everything as JSON.
"""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from fsdfm_jax import cli, io, stages
from launch import ahead, ahead_table
from launch.ahead import Target

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, configs/paper_1b3.py.")
_TOPOLOGY = flags.DEFINE_list(
    "topology", None, "TPUs to compile for, as v5e:8x8, or local; several separated by commas."
)
_STAGE = flags.DEFINE_enum(
    "stage", None, stages.NAMES, "Stage; distill, if it is in the pipeline, or the last one of it."
)
_WHAT = flags.DEFINE_list("what", list(ahead.KINDS), "Programs: train, sampler.")
_BATCH = flags.DEFINE_list(
    "batch", None, "Rows of a batch, over all chips; several by commas. The stage's by default."
)
_STEPS = flags.DEFINE_integer("steps", 8, "Steps of the sampler.", lower_bound=1)
_VARY = flags.DEFINE_multi_string(
    "vary", [], "KEY=VALUE|VALUE..: a row for each value of a key, as model.remat=none|dots|full."
)
_LARGEST = flags.DEFINE_bool("largest_batch", False, "Search the largest batch that fits.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the result.")


def rows_of_target(
    target: Target, config: ConfigDict, name: str, label: str
) -> Iterator[dict[str, Any]]:
    """The rows of one target and one configuration, as they are finished."""
    config = ahead.fit_config(config, target)
    mesh = ahead.make_mesh(config, target)
    head = {"topology": target.name, "mesh": "x".join(str(n) for n in mesh.devices.shape)}
    head |= {"case": label}
    batches = read_batches(_BATCH.value) or [config[name].batch_size]
    key = "--batch" if _BATCH.value else f"{name}.batch_size"
    kinds = _WHAT.value
    for kind, rows in itertools.product(kinds, batches):
        ahead.check_rows(kind, name, config, mesh, rows, key)
    for program in ahead.make_programs(kinds, name, config, mesh, steps=_STEPS.value):
        known: dict[int, dict[str, Any]] = {}
        for rows in batches:
            where = " ".join(part for part in (target.name, label, program.kind) if part)
            _progress(f"compiling {where}, {rows} rows on {mesh.size} device(s)")
            known[rows] = ahead.judge(program, rows, target)
            yield head | {"search": ""} | known[rows]
        if _LARGEST.value:
            unit = ahead.unit_of_rows(program.kind, name, config, mesh)
            # A part of a batch holds rows of both losses.
            fewest = 2 * config[name].accumulate if program.kind == "train" else 1
            row = ahead.find_largest(
                program, target, unit=unit, smallest=fewest, known=known, report=_progress
            )
            if row is None:
                _progress(f"largest batch, {program.kind}: not even one row for each shard fits")
            else:
                yield head | {"search": "largest"} | row


def read_batches(asked: list[str] | None) -> list[int]:
    """Rows of each batch of --batch; ValueError for what is no number."""
    wrong = [text for text in asked or [] if not text.isdecimal() or int(text) < 1]
    if wrong:
        raise ValueError(f"--batch takes numbers of rows above 0, got {wrong[0]!r}.")
    return [int(text) for text in asked or []]


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    config = _CONFIG.value
    name = ahead.choose_stage(config, _STAGE.value)
    cases = list(ahead.variations(config, _VARY.value))
    targets = [ahead.find_target(topology) for topology in _TOPOLOGY.value]
    if _LARGEST.value:
        for target in targets:
            ahead.check_memory_known(target)
    result = {"jax": jax.__version__, "stage": name, "config": config.to_dict(), "rows": []}
    for target in targets:
        for label, changed in cases:
            for row in rows_of_target(target, changed, name, label):
                result["rows"].append(row)
                if _OUTPUT.value:  # at once: what is compiled is not lost
                    io.write_json(_OUTPUT.value, result)
    print(f"stage {name}, blocks of {config.data.block_length} tokens")
    print(ahead_table.tables(result["rows"]))
    if _OUTPUT.value:
        print(f"written to {_OUTPUT.value}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    cli.run(main)
