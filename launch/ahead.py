"""Compiles the programs of a run for devices that needn't be there, and says what they would take.

The programs are those that a run compiles itself: the step of `train.make_step` with the shardings
of the state, and the sampler of `inference.make_sampler`, on a mesh of `sharding.make_mesh`.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from fsdfm_jax import cli, stages
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.flow import sampler
from fsdfm_jax.flow.process import Process
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.training import loop as loop_lib
from fsdfm_jax.training import optim
from launch import hlo_cost, model_flops, roofline
from launch.roofline import GIB, Chip

LOCAL = "local"
_INSTALL = "pip install 'fsdfm_jax[tpu]'"
KINDS = ("train", "sampler")

# The TPU library looks for chips and their hosts, and lets one process in at a time; a compiler
# that runs no chip needs none of it.
_NO_CHIPS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Target(NamedTuple):
    """Where programs are compiled for.

    Attributes:
      name: as asked for.
      devices: all of them, described or real.
      chip: what the data sheet says, None where it isn't known.
      hbm_bytes: memory of each device that programs get, None where it isn't known.
      described: whether the devices are only a description.
    """

    name: str
    devices: Sequence[Any]
    chip: Chip | None
    hbm_bytes: float | None
    described: bool


class Program(NamedTuple):
    """A program to compile, for any number of rows.

    Attributes:
      kind: one of `KINDS`.
      lower: rows -> what JAX has lowered.
      useful_flops: rows -> operations that the result needs, on all devices.
      tokens: rows -> tokens that one run works through or makes.
    """

    kind: str
    lower: Callable[[int], Any]
    useful_flops: Callable[[int], float]
    tokens: Callable[[int], int]


def find_target(name: str) -> Target:
    """The devices of a TPU topology ("v5e:4x4"), or those of this process ("local").

    Raises:
      ValueError: for a name that is no topology, one the compiler refuses, or where the compiler
        isn't installed.
    """
    if name == LOCAL:
        devices = jax.devices()
        found = [chip for part, chip in roofline.GPUS.items() if part in devices[0].device_kind]
        stats = devices[0].memory_stats() or {}
        chip = found[0] if found else None
        return Target(name, devices, chip, stats.get("bytes_limit"), False)
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if not match or match[1] not in roofline.TPUS:
        raise ValueError(
            f"Unknown --topology={name!r}; expected {LOCAL!r} or KIND:SHAPE, as v5e:4x4 or "
            f"v5p:2x2x1, with a kind of {', '.join(roofline.TPUS)}."
        )
    chip = roofline.TPUS[match[1]]
    for key, value in _NO_CHIPS.items():
        os.environ.setdefault(key, value)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        if "not installed" in message:
            raise ValueError(
                f"--topology={name} needs the TPU compiler, which isn't installed: {_INSTALL}"
            ) from error
        if "INVALID_ARGUMENT" not in message:
            raise
        reason = message.split("INVALID_ARGUMENT: ")[-1]
        raise ValueError(f"The compiler refuses --topology={name}: {reason}") from error
    return Target(name, description.devices, chip, chip.hbm_bytes, True)


def fit_config(config: ConfigDict, target: Target) -> ConfigDict:
    """A copy of a config in which nothing goes by the devices at hand if others are meant."""
    config = config.copy_and_resolve_references()
    if target.described and config.model.attention == "auto":
        config.model.attention = "xla"  # what "auto" takes there
    return config


def choose_stage(config: ConfigDict, asked: str | None) -> str:
    """The stage that is meant: the one asked for, else distill, else the last of the pipeline."""
    pipeline = [name.strip() for name in config.pipeline.split(",")]
    return asked or ("distill" if "distill" in pipeline else pipeline[-1])


def variations(config: ConfigDict, asked: list[str]) -> Iterator[tuple[str, ConfigDict]]:
    """(label, config): the config as it is, or with each value of each key of --vary.

    Raises:
      ValueError: for a key that no config has, or a value that isn't of its type.
    """
    if not asked:
        yield "", config
    for text in asked:
        key, _, values = text.partition("=")
        known = cli.keys(config)
        if key not in known:
            raise ValueError(cli.unknown_key(key, known))
        for value in values.split("|"):
            changed = config.copy_and_resolve_references()
            section, _, name = key.rpartition(".")
            place = changed[section] if section else changed
            kind = type(place[name])
            if kind not in (str, int, float):
                raise ValueError(f"--vary takes numbers and names, and {key} is a {kind.__name__}.")
            try:
                place[name] = kind(value)
            except ValueError as error:
                raise ValueError(
                    f"--vary={text}: {value!r} is no {kind.__name__}, as {key} is."
                ) from error
            yield f"{name}={value}", changed


def make_mesh(config: ConfigDict, target: Target) -> Mesh:
    """The mesh that a config asks for, of the target's devices; ValueError where there is none."""
    mesh = mesh_lib.make_mesh(config.mesh, devices=target.devices)
    mesh_lib.check_heads(mesh, config.model.num_heads)
    return mesh


def make_process(config: ConfigDict) -> Process:
    """The noising process of a config; which id ends documents doesn't matter to a program."""
    count = prepared_lib.vocab_size(prepared_lib.DataSpec.from_config(config.data))
    return process_lib.make_process(**config.path, num_tokens=count, eos_id=count - 1)


def train_program(name: str, config: ConfigDict, process: Process, mesh: Mesh) -> Program:
    """The training step of a stage.

    Raises:
      ValueError: for a config that no stage can be made of.
    """
    stage, own = stages.make_stage(name, config, process), config[name]
    optimizer = optim.make_optimizer(config.optim, own)

    def lower(rows: int):
        settings = _settings(config, own, rows)
        with jax.set_mesh(mesh):
            key = _key()
            base = _base_shapes(name, config, process, key)
            abstract = jax.eval_shape(loop_lib.make_init(stage, optimizer, settings), key, base)
            shardings = mesh_lib.state_shardings(mesh, abstract)
            step = loop_lib.make_step(stage, optimizer, settings, mesh, shardings)
            tokens_BL = jax.ShapeDtypeStruct((rows, config.data.block_length), jnp.int32)
            batch = {"x1": tokens_BL} | ({"x0": tokens_BL} if name == "refine" else {})
            return step.lower(abstract, batch, key, _guide_shapes(stage, config, process, mesh))

    return Program(
        "train",
        lower,
        lambda rows: model_flops.step_flops(name, config, stage.model, rows),
        lambda rows: rows * config.data.block_length,
    )


def _settings(config: ConfigDict, own: ConfigDict, rows: int) -> loop_lib.Settings:
    settings = loop_lib.Settings(
        num_steps=own.num_steps,
        batch_size=rows,
        log_every=config.train.log_every,
        checkpoint_every=config.train.checkpoint_every,
        ema_decay=own.ema_decay,
        accumulate=own.accumulate,
        max_skipped=config.optim.max_skipped,
    )
    loop_lib.check_settings(settings)
    return settings


def _base_shapes(name: str, config: ConfigDict, process: Process, key):
    """Shapes of the weights that a stage starts from, None where it needs none."""
    if name not in stages.FEW_STEP:
        return None
    model = stages.model_config("pretrain", config.model, vocab_size=process.source.vocab_size)
    return jax.eval_shape(lambda key: model_lib.init_params(key, model), key)


def _guide_shapes(stage: stages.Stage, config: ConfigDict, process: Process, mesh: Mesh):
    """Shapes of what `stage.needs` names, sharded as parameters are; None where it is None."""
    if stage.needs is None:
        return None
    base = _base_shapes(stage.name, config, process, _key())
    base = jax.tree.map(_placed, base, mesh_lib.state_shardings(mesh, base))
    return jax.tree.map(lambda run: base, stage.needs)


def sampler_program(
    name: str, config: ConfigDict, process: Process, mesh: Mesh, *, steps: int
) -> Program:
    """The sampler of a stage's network, of so many steps; its rows are spread over the mesh.

    Raises:
      ValueError: for an autoregressive network, or steps < 1.
    """
    model = stages.model_config(name, config.model, vocab_size=process.source.vocab_size)
    if model.causal:
        raise ValueError(f"Stage {name!r} has no few-step sampler; leave it out with --what=train.")
    grid_S1 = jnp.asarray(sampler.uniform_grid(steps))
    length = config.data.block_length

    def lower(rows: int):
        run = generate_lib.make_sampler(model, process, config.eval.few_step_jump)
        whole = NamedSharding(mesh, P())
        spread = mesh_lib.batch_sharding(mesh)
        with jax.set_mesh(mesh):
            key = _key()
            shapes = jax.eval_shape(lambda key: model_lib.init_params(key, model), key)
            places = mesh_lib.state_shardings(mesh, shapes)
            params = jax.tree.map(_placed, shapes, places)
            return run.lower(
                params,
                _placed(key, whole),
                jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=spread),
                jax.ShapeDtypeStruct((rows, length), bool, sharding=spread),
                jax.ShapeDtypeStruct(grid_S1.shape, grid_S1.dtype, sharding=whole),
                jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
            )

    return Program(
        "sampler",
        lower,
        lambda rows: steps * model_flops.forward_flops(model, rows, length),
        lambda rows: rows * length,
    )


def make_programs(
    kinds: Sequence[str], name: str, config: ConfigDict, mesh: Mesh, *, steps: int
) -> list[Program]:
    """The programs of these kinds for a stage; ValueError for an unknown kind."""
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f"--what takes some of {', '.join(KINDS)}, got {kinds}.")
    process = make_process(config)
    make = {
        "train": lambda: train_program(name, config, process, mesh),
        "sampler": lambda: sampler_program(name, config, process, mesh, steps=steps),
    }
    return [make[kind]() for kind in kinds]


def _key():
    return jax.eval_shape(lambda: jax.random.key(0))


def _placed(leaf, place):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


# --------------------------------------------------------------------------------------- compiling


def compile_program(lowered, target: Target) -> tuple[Any, dict[str, Any]]:
    """(compiled program or None, its memory on each device).

    Returns:
      None where the compiler finds it too large. Memory in bytes: `arguments`, `temporaries` (and
      results that take no argument's place), `code`, all together as `total`, and `hbm`, what there
      is, of which None is not known; `fits`, None where it can't be said; `compile_s`.
    """
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return None, {
            "arguments": None,
            "temporaries": None,
            "code": None,
            "total": needed_bytes(error),
            "hbm": target.hbm_bytes,
            "fits": False,
            "compile_s": time.perf_counter() - began,
        }
    memory = compiled.memory_analysis()
    arguments, code = memory.argument_size_in_bytes, memory.generated_code_size_in_bytes
    if target.described:
        # What is alive at once. The sum of the plan's parts is more than it is checked against: the
        # TPU compiler counts gaps between its temporaries.
        total = memory.peak_memory_in_bytes
    else:
        fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
        total = arguments + memory.temp_size_in_bytes + fresh + code
    return compiled, {
        "arguments": arguments,
        "temporaries": total - arguments - code,
        "code": code,
        "total": total,
        "hbm": target.hbm_bytes,
        "fits": None if target.hbm_bytes is None else total <= target.hbm_bytes,
        "compile_s": time.perf_counter() - began,
    }


def needed_bytes(error: Exception) -> float | None:
    """What a program that is too large would take, None where the compiler doesn't say.

    Raises:
      the error itself, if it is about anything else.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        raise error
    found = re.search(r"Used ([\d.]+)([MGT]) of|\(([\d.]+)([MGT])\) exceeds", text)
    if not found:
        return None
    number, unit = found[1] or found[3], found[2] or found[4]
    return float(number) * {"M": 2**20, "G": GIB, "T": 2**40}[unit]


def judge(program: Program, rows: int, target: Target) -> dict[str, Any]:
    """The row of a table: memory, operations, exchanges and the roofline of a program."""
    compiled, memory = compile_program(program.lower(rows), target)
    row = {"program": program.kind, "batch": rows} | memory
    row |= {"useful_flops": program.useful_flops(rows) / len(target.devices)}
    if compiled is None:
        return row
    cost = hlo_cost.measure(_text(compiled))
    row |= {
        "flops": cost.flops,
        "hbm_traffic": cost.hbm_bytes,
        "sent": cost.sent_bytes,
        "exchanges": cost.by_kind(),
        "unknown_loops": len(cost.unknown_loops),
    }
    if target.chip is not None:
        seconds = roofline.estimate(cost, target.chip)
        row |= {"seconds": seconds._asdict()}
        row |= {
            "mfu": [
                row["useful_flops"] / target.chip.peak_flops / bound
                for bound in (seconds.one_by_one, seconds.at_best)
            ]
        }
        row |= {"tokens_per_s": program.tokens(rows) / seconds.one_by_one}
    return row


def _text(compiled) -> str:
    """The optimised program; ValueError where JAX can't read what the compiler has made."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            "JAX can't read the compiled program, as happens where the compiler is newer than "
            f"jaxlib; install the one that goes with it: {_INSTALL}. It said: "
            f"{str(error).splitlines()[0]}"
        ) from error


def check_rows(kind: str, name: str, config: ConfigDict, mesh: Mesh, rows: int, key: str) -> None:
    """ValueError naming `key` unless each device gets as many rows in each part of the batch."""
    mesh_lib.check_batch_size(mesh, rows, key)
    if rows % unit_of_rows(kind, name, config, mesh):
        raise ValueError(
            f"{key}={rows} must be a multiple of {name}.accumulate={config[name].accumulate} times "
            f"the {mesh_lib.row_shards(mesh)} data shard(s) of the mesh."
        )


def unit_of_rows(kind: str, name: str, config: ConfigDict, mesh: Mesh) -> int:
    """Rows that a batch of a program has a multiple of, see `KINDS`."""
    return mesh_lib.row_shards(mesh) * (config[name].accumulate if kind == "train" else 1)


def search_largest(fits: Callable[[int], bool], *, smallest: int = 1) -> int | None:
    """The largest count that fits, None if the smallest doesn't; whatever is below one that fits
    is taken to fit.

    The count is doubled until it doesn't fit, then the bracket is halved; no count is asked twice.
    """
    if not fits(smallest):
        return None
    low, high = smallest, 2 * smallest
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def check_memory_known(target: Target) -> None:
    """ValueError where a device doesn't tell its memory."""
    if target.hbm_bytes is None:
        raise ValueError(
            f"--largest_batch needs to know the memory of a device, and {target.name} doesn't tell "
            "it; name a TPU topology, as v5e:4x4."
        )


def find_largest(
    program: Program,
    target: Target,
    *,
    unit: int,
    smallest: int,
    known: dict[int, dict[str, Any]],
    report: Callable[[str], None],
) -> dict[str, Any] | None:
    """The row of the largest batch that fits, of multiples of `unit` rows; None if none does.

    Args:
      unit, smallest: rows.
      known: table rows by batch of what is compiled already; what is compiled here is added.
      report: told of each batch that was tried.

    Raises:
      ValueError: where the memory of a device isn't known.
    """
    check_memory_known(target)

    def fits(count: int) -> bool:
        rows = count * unit
        if rows not in known:
            known[rows] = judge(program, rows, target)
        row = known[rows]
        total = f"{row['total'] / 1e9:.2f}" if row["total"] is not None else "?"
        report(
            f"largest batch, {program.kind}: {rows} rows take {total} of "
            f"{target.hbm_bytes / 1e9:.2f} GB: {'fits' if row['fits'] else 'too large'}"
        )
        return row["fits"]

    best = search_largest(fits, smallest=-(-smallest // unit))
    return None if best is None else known[best * unit]
