"""Ahead-of-time compilation of the programs of a run, for real or described devices.

The programs are those of a run: a stage's training step, with the shardings of its state, and the
sampler. The figures are the compiler's memory plan and operation count (`memory_analysis`,
`cost_analysis`), the collectives in the compiled program's text, and the operations that the
network needs (`launch.flops`).
"""

import collections
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fsdfm_jax import stages
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.model import ModelConfig
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import rules
from fsdfm_jax.training import loop as loop_lib
from fsdfm_jax.training import optim
from launch import flops

KINDS = ("train", "sampler")
LOCAL = "local"
_GIB = 2**30
_INSTALL = "pip install 'fsdfm_jax[tpu]'"

# TPU -> (peak bfloat16 operations per second, from Google Cloud's "System architecture" pages;
# memory that the compiler makes available to programs, of 16, 95 and 32 GB).
TPUS = {
    "v5e": (197e12, 15.75 * _GIB),
    "v5p": (459e12, 95.73 * _GIB),
    "v6e": (918e12, 31.24 * _GIB),
}
# Part of the device name -> peak dense bfloat16 operations per second, from NVIDIA's data sheets.
GPUS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
# The TPU library looks for chips and admits one process at a time; compiling needs neither.
_NO_CHIPS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: as given by the user.
      devices: all devices, real or described.
      peak_flops: peak operations per second of a device; None if unknown.
      memory: bytes of device memory available to programs; None if unknown.
      described: whether the devices are only a description.
    """

    name: str
    devices: Sequence[Any]
    peak_flops: float | None
    memory: float | None
    described: bool


def find_target(name: str) -> Target:
    """Return the devices of a TPU topology ("v5e:4x4"), or those of this process ("local").

    Raises:
      ValueError: for an unknown topology, one that the compiler rejects, or if the compiler isn't
        installed.
    """
    if name == LOCAL:
        devices = jax.devices()
        peak = next((rate for part, rate in GPUS.items() if part in devices[0].device_kind), None)
        stats = devices[0].memory_stats() or {}
        return Target(name, devices, peak, stats.get("bytes_limit"), False)
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    if not match or match[1] not in TPUS:
        raise ValueError(
            f"Unknown --topology={name!r}; expected {LOCAL!r} or KIND:SHAPE, e.g. v5e:4x4 or "
            f"v5p:2x2x1. Kinds: {', '.join(TPUS)}."
        )
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
        raise ValueError(f"The compiler rejects --topology={name}: {reason}") from error
    return Target(name, description.devices, *TPUS[match[1]], True)


# ---------------------------------------------------------------------------------------- programs


class Program(NamedTuple):
    """A program to compile, for any number of rows.

    Attributes:
      kind: one of `KINDS`.
      unit: batch sizes are multiples of this.
      lower: rows -> the lowered program.
      flops: rows -> required operations, over all devices.
    """

    kind: str
    unit: int
    lower: Callable[[int], Any]
    flops: Callable[[int], float]


def make_programs(
    kinds: Sequence[str],
    name: str,
    config: ConfigDict,
    target: Target,
    *,
    rows: int | None,
    steps: int,
) -> tuple[Mesh, list[Program]]:
    """Return the mesh of a config and a stage's programs on it.

    Args:
      kinds: some of `KINDS`.
      name: name of the stage.
      rows: intended batch size; None for any.
      steps: number of sampling steps.

    Raises:
      ValueError: for an unknown kind, a stage without such a program, or a mesh that doesn't fit
        the devices, the network or the rows; the message names one that does.
    """
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"--what takes some of {', '.join(KINDS)}, got {list(kinds)}.")
    if target.described and config.model.attention == "auto":
        config = config.copy_and_resolve_references()
        config.model.attention = "xla"  # what "auto" selects on TPUs
    vocab_size = prepared_lib.vocab_size(prepared_lib.DataSpec.from_config(config.data))
    process = process_lib.make_process(**config.path, num_tokens=vocab_size, eos_id=vocab_size - 1)
    length = config.data.block_length
    model = _network(name, config, process)
    if "sampler" in kinds and model.causal:
        raise ValueError(f"Stage {name!r} has no few-step sampler; use --what=train.")
    parts = {"train": config[name].accumulate, "sampler": 1}
    rows_of_part = {"train": _rows_of_part(name, config[name]), "sampler": 1}
    sampling = Sampling.from_dict(config.eval.sampling).replace(steps=steps)

    def check(mesh: Mesh) -> Mesh:
        mesh_lib.check_heads(mesh, model.num_heads)
        mesh_lib.state_shardings(mesh, _param_shapes(model))
        if rows is None:
            return mesh
        mesh_lib.check_batch_size(mesh, rows, "--batch")
        most = max(parts[kind] for kind in kinds)
        if rows % (most * mesh_lib.row_shards(mesh)):
            raise ValueError(
                f"--batch={rows} must be a multiple of {name}.accumulate={most} times the "
                f"{mesh_lib.row_shards(mesh)} data shard(s) of the mesh."
            )
        return mesh

    mesh = find_mesh(config.mesh, target, check)
    lower = {
        "train": lambda count: lower_train(name, config, process, mesh, count),
        "sampler": lambda count: lower_sampler(model, process, sampling, mesh, (count, length)),
    }
    needed = {
        "train": lambda count: flops.step_flops(name, config, model, count),
        "sampler": lambda count: steps * flops.forward_flops(model, count, length),
    }
    shards = mesh_lib.row_shards(mesh)
    unit = {kind: math.lcm(shards, rows_of_part[kind]) * parts[kind] for kind in kinds}
    return mesh, [Program(kind, unit[kind], lower[kind], needed[kind]) for kind in kinds]


def _rows_of_part(name: str, own: ConfigDict) -> int:
    """Return the unit of a stage's microbatch size; see `refine.count_samples`."""
    return (own.max_log2_steps + 1) * 2**own.max_log2_steps if name == "refine" else 1


def find_mesh(asked: ConfigDict, target: Target, check: Callable[[Mesh], Mesh]) -> Mesh:
    """Make the mesh of `config.mesh`.

    Raises:
      ValueError: if it doesn't pass `check`; the message names the nearest mesh that does.
    """
    make = lambda sizes: check(mesh_lib.make_mesh(ConfigDict({**asked, **sizes}), target.devices))
    try:
        return make({})
    except ValueError as error:
        for sizes in _nearest(asked, len(target.devices)):
            try:
                make(sizes)
            except ValueError:
                continue
            found = " ".join(f"--config.mesh.{axis}={size}" for axis, size in sizes.items())
            raise ValueError(f"{error} This mesh fits: {found}") from error
        raise ValueError(
            f"{error} No mesh of the {len(target.devices)} devices fits this network and batch."
        ) from error


def _nearest(asked: ConfigDict, count: int) -> Iterator[dict[str, int]]:
    """Yield the sizes of all meshes of `count` devices, nearest to the requested ones first."""
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    wanted = max(asked.tensor, 1), asked.fsdp if asked.fsdp > 0 else count
    meshes = [(t, f) for t, f in itertools.product(sizes, sizes) if count % (t * f) == 0]
    distance = lambda mesh: [abs(math.log(a / b)) for a, b in zip(mesh, wanted, strict=True)]
    for tensor, fsdp in sorted(meshes, key=distance):
        yield dict(zip(rules.AXES, (count // (tensor * fsdp), fsdp, tensor), strict=True))


def lower_train(name: str, config: ConfigDict, process: Process, mesh: Mesh, rows: int):
    """Lower the training step of a stage for a batch of `rows`."""
    stage, own = stages.make_stage(name, config, process), config[name]
    optimizer = optim.make_optimizer(config.optim, own)
    turns = optim.make_turns(config.optim, own, stage)
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
    base = None
    if name in stages.FEW_STEP:
        base = _param_shapes(_network("pretrain", config, process))
    with jax.set_mesh(mesh):
        init = loop_lib.make_init(stage, optimizer, settings, turns)
        abstract = jax.eval_shape(init, _key(), base)
        shardings = mesh_lib.state_shardings(mesh, abstract)
        step = loop_lib.make_step(stage, optimizer, settings, mesh, shardings, turns)
        tokens_BL = jax.ShapeDtypeStruct((rows, config.data.block_length), jnp.int32)
        return step.lower(abstract, {"x1": tokens_BL}, _key(), _needed_shapes(stage, base, mesh))


def _network(name: str, config: ConfigDict, process: Process) -> ModelConfig:
    sizes = {"vocab_size": process.source.vocab_size, "block_length": config.data.block_length}
    return stages.model_config(name, config.model, **sizes)


def _needed_shapes(stage: stages.Stage, base, mesh: Mesh):
    """Return the weights that `stage.needs`, as shapes of base weights sharded like parameters."""
    if not stage.needs:
        return {}
    places = mesh_lib.state_shardings(mesh, base)
    placed = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    base = jax.tree.map(placed, base, places)
    return dict.fromkeys(stage.needs, base)


def lower_sampler(
    model: ModelConfig, process: Process, sampling: Sampling, mesh: Mesh, shape: tuple[int, int]
):
    """Lower the sampler for tokens of `shape` (B, L), with rows sharded over the mesh."""
    whole, spread = mesh_lib.whole(mesh), mesh_lib.batch_sharding(mesh)
    shaped = lambda shape, dtype, place: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    placed = lambda leaf, place: shaped(leaf.shape, leaf.dtype, place)
    params = _param_shapes(model)
    with jax.set_mesh(mesh):
        return generate_lib.make_sampler(model, process).lower(
            jax.tree.map(placed, params, mesh_lib.state_shardings(mesh, params)),
            placed(_key(), whole),
            shaped(shape, jnp.int32, spread),
            shaped(shape, bool, spread),
            jax.tree.map(lambda _: shaped((), jnp.float32, whole), sampling),
        )


def _key():
    return jax.eval_shape(lambda: jax.random.key(0))


def _param_shapes(model: ModelConfig):
    return jax.eval_shape(lambda key: model_lib.init_params(key, model), _key())


# --------------------------------------------------------------------------------------- compiling


def describe(program: Program, rows: int, target: Target) -> dict[str, Any]:
    """Compile a program and describe its needs per device.

    Returns:
      `arguments`, `temporaries`, their sum `total`, and `memory` of a device, in bytes; whether it
      `fits`; the required `flops` and `least_s`, their time in seconds at the peak rate;
      `counted_flops` and `counted_bytes` by the compiler, and collectives by kind, with their
      bytes. The compiler's counts and the collectives count a loop body once. Unknown values are
      None or missing.
    """
    row: dict[str, Any] = {"program": program.kind, "rows": rows, "memory": target.memory}
    row["flops"] = program.flops(rows) / len(target.devices)
    row["least_s"] = target.peak_flops and row["flops"] / target.peak_flops
    lowered = program.lower(rows)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return row | {"total": needed_bytes(error), "fits": False}
    plan, counted = compiled.memory_analysis(), compiled.cost_analysis() or {}
    arguments, total = plan.argument_size_in_bytes, plan.peak_memory_in_bytes
    if not target.described:  # for a TPU, the compiler's own limit applies to the peak
        fresh = plan.output_size_in_bytes - plan.alias_size_in_bytes
        total = arguments + plan.temp_size_in_bytes + fresh + plan.generated_code_size_in_bytes
    row |= {"arguments": arguments, "temporaries": total - arguments, "total": total}
    row["fits"] = None if target.memory is None else total <= target.memory
    row |= {"counted_flops": counted.get("flops"), "counted_bytes": counted.get("bytes accessed")}
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            "JAX can't read the compiled program; the compiler may be newer than jaxlib. Install "
            f"the matching version: {_INSTALL}. The error: {str(error).splitlines()[0]}"
        ) from error
    for kind, (count, num_bytes) in collectives(text).items():
        row |= {kind: count, f"{kind}_bytes": num_bytes}
    return row


def needed_bytes(error: Exception) -> float | None:
    """Return the memory that a too large program would need, from the compiler's error.

    Returns:
      Bytes, or None if the message doesn't contain them.

    Raises:
      error: if it isn't an out-of-memory error.
    """
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        raise error
    found = re.search(r"Used ([\d.]+)([MGT]) of|\(([\d.]+)([MGT])\) exceeds", text)
    if not found:
        return None
    number, unit = found[1] or found[3], found[2] or found[4]
    return float(number) * {"M": 2**20, "G": _GIB, "T": 2**40}[unit]


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(r"%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)")


def collectives(text: str) -> dict[str, tuple[int, float]]:
    """Return {kind: (number, bytes)} of the collectives in a compiled program's text.

    Each counts once, even in a loop body. The bytes are those of the full array: before a
    reduction, after a gather.
    """
    sizes: dict[str, float] = {}
    found: dict[str, dict[str, float]] = collections.defaultdict(dict)
    scattered = False  # inside an all-reduce-scatter computation of the TPU compiler
    for line in text.splitlines():
        if line.endswith("{") and " = " not in line:
            scattered = line.startswith("%all-reduce-scatter")
        if not (match := _LINE.search(line)):
            continue
        name, shape, opcode, operands = match.groups()
        sizes[name] = _bytes(shape)
        kind = opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        given = sum(sizes.get(operand, 0.0) for operand in re.findall(r"%([\w.\-]+)", operands))
        made = sizes[name] - (given if opcode == "all-gather-start" else 0.0)  # (operand, result)
        whole = given if kind == "collective-permute" else max(given, made)
        # The TPU compiler splits a collective into several kernels with one chain id.
        chain = re.search(r'chain_id="(\d+)"', line)
        kind = "reduce-scatter" if kind == "all-reduce" and scattered else kind
        found[kind][chain[0] if chain else name] = whole
    return {kind: (len(each), sum(each.values())) for kind, each in sorted(found.items())}


def _bytes(shape: str) -> float:
    """Return the bytes of an HLO shape; for a tuple, of all its arrays."""
    total = 0.0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape):
        bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or [0])[0])
        total += bits / 8 * math.prod(map(int, re.findall(r"\d+", dims)))
    return total


def find_largest(
    program: Program, target: Target, report: Callable[[str], None]
) -> dict[str, Any] | None:
    """Find a batch that nearly fills the memory.

    Memory is nearly linear in rows: two compilations predict the largest batch, and one or a few
    more check it. A slightly larger batch may fit if the compiler rematerialises more.

    Args:
      report: called with a line about each compiled batch.

    Returns:
      `describe` of that batch; None if the smallest one doesn't fit.

    Raises:
      ValueError: if the memory of a device isn't known.
    """
    if target.memory is None:
        raise ValueError(
            f"--largest_batch needs the memory of a device, which {target.name} doesn't report; "
            "give a TPU topology, e.g. v5e:4x4."
        )

    def compiled(count: int) -> dict[str, Any]:
        row = describe(program, count * program.unit, target)
        total = "?" if row["total"] is None else f"{row['total'] / 1e9:.2f}"
        report(f"{row['rows']} rows need {total} of {target.memory / 1e9:.2f} GB")
        return row

    first, count = 2, 8  # a microbatch may hold rows of two losses
    small = compiled(first)
    if not small["fits"]:
        return None
    row = compiled(count)
    while True:
        if row["total"] is None:
            full = (first + count) // 2
        else:
            each = max(1.0, (row["total"] - small["total"]) / (count - first))
            full = first + int((target.memory - small["total"]) // each)
        if row["fits"]:
            first, small = count, row
        if full <= first:
            return small
        count = min(full, 16 * count)  # limit the extrapolation
        row = compiled(count)
        if row["fits"] and count == full:
            return row
