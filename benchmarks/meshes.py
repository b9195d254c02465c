"""Does the mesh change what is trained? Every stage on simulated devices, against one device.

    python -m benchmarks.meshes --output=meshes.json

Trains a tiny network for --num_steps steps of each case on one device, on meshes of eight and on
two processes of four, and goes on elsewhere from checkpoints. Prints the worst relative difference
of the losses, of the norms of gradients and of the parameters (in units of the largest entry of
their array). Moments in bfloat16 are rounded either way where two sums differ by rounding, which
parameters show. The compiler optimises little here: nothing is timed.
"""

import functools
import itertools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from benchmarks import measure
from configs import base as base_config
from fsdfm_jax import io, stages
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.flow.process import Process
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import processes, rules
from fsdfm_jax.stages.base import Stage
from fsdfm_jax.training import checkpoint, optim
from fsdfm_jax.training import loop as loop_lib

_NUM_STEPS = flags.DEFINE_integer("num_steps", 20, "Steps of each case.", lower_bound=1)
_STAGES = flags.DEFINE_list("stages", list(stages.NAMES), "Stages, comma-separated.")
_JOINED = flags.DEFINE_list(
    "joined", None, "HOST:PORT,PROCESS: one of the processes that this program starts itself."
)

# Sizes of data, fsdp and tensor.
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))
JOINED_MESHES = ((1, 8, 1), (2, 2, 2))  # of two processes
_PROCESSES = 2
_DECAY = 0.9


class Case(NamedTuple):
    """What is trained: a stage, the noise, how the batch is cut, and the sizes of its arrays."""

    stage: str
    source: str = "uniform"
    accumulate: int = 1
    moment_dtype: str = "float32"
    remat: str = "none"
    max_skipped: int = 0
    rows: int = 16
    length: int = 12
    vocab_size: int = 11

    def __str__(self) -> str:
        defaults = self._field_defaults.items()
        changed = [f"{k}={getattr(self, k)}" for k, v in defaults if getattr(self, k) != v]
        return " ".join([self.stage, *changed])


# 16 rows: their parts with a path loss and with a teacher don't divide over eight devices.
CASES = (
    *(Case(stage) for stage in stages.NAMES),
    *(Case(stage, source="mask") for stage in stages.NAMES if stage != "refine"),
    Case("distill", accumulate=2, max_skipped=2, remat="dots"),
    Case("distill", moment_dtype="bfloat16"),
    # Logits in several chunks.
    Case("distill", length=192, vocab_size=1031),
)


class Trained(NamedTuple):
    """Losses and norms of gradients of each step [S], and the parameters at the end."""

    losses: np.ndarray
    grad_norms: np.ndarray
    params: model_lib.Params


def make_config(case: Case) -> ConfigDict:
    """The configuration of a case."""
    config = base_config.get_config()
    model, config.path.source = config.model, case.source
    model.width, model.num_blocks, model.num_heads, model.cond_width = 16, 2, 4, 8
    model.mlp_ratio, model.logits_mib, model.remat = 2, 1, case.remat
    # Adam divides by the size of the gradient: below eps, where it is rounding, it no longer does.
    config.optim.eps = 1e-3
    config.optim.moment_dtype = case.moment_dtype
    own = config[case.stage]
    own.learning_rate, own.num_steps, own.ema_decay = 1e-2, 100, _DECAY
    if case.stage in stages.FEW_STEP:
        own.max_log2_steps = 4
    if case.stage in ("distill", "refine"):
        own.tau = 0.25
    return config


def make_stage(case: Case) -> tuple[Stage, Process, ConfigDict]:
    """The stage of a case, its noising process and configuration."""
    config = make_config(case)
    eos_id, num_tokens = 2, case.vocab_size - (case.source == "mask")
    process = process_lib.make_process(**config.path, num_tokens=num_tokens, eos_id=eos_id)
    return stages.make_stage(case.stage, config, process), process, config


def base_params(case: Case) -> model_lib.Params:
    """Weights to start from: fresh ones with noise, behind whose zeros all stages look alike."""
    name = "autoregressive" if case.stage == "autoregressive" else "pretrain"
    stage, _, _ = make_stage(case._replace(stage=name))
    fresh = jax.eval_shape(stage.init_params, jax.random.key(0), None)
    rng = np.random.default_rng(0)
    noise = lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)
    return jax.tree.map(noise, fresh)


def batches(case: Case, rows: Sequence[int], start: int) -> Iterator[dict[str, np.ndarray]]:
    """The rows that a process reads of the batches from step `start` on."""
    names = ("x1", "x0") if case.stage == "refine" else ("x1",)
    shape = (case.rows, case.length)
    for step in range(start, sys.maxsize):
        rng = np.random.default_rng([7, step])
        batch = {name: rng.integers(case.vocab_size - 1, size=shape) for name in names}
        yield {name: tokens[list(rows)].astype(np.int32) for name, tokens in batch.items()}


def make_mesh(sizes: Sequence[int]) -> Mesh:
    """A mesh over all devices, or over the first where it needs one."""
    config = ConfigDict(dict(zip(rules.AXES, sizes, strict=True)) | {"slices": 1})
    return mesh_lib.make_mesh(config, jax.devices()[:1] if max(sizes) == 1 else None)


def _settings(case: Case, num_steps: int) -> loop_lib.Settings:
    return loop_lib.Settings(
        num_steps=num_steps,
        batch_size=case.rows,
        log_every=1,
        checkpoint_every=num_steps,
        ema_decay=_DECAY,
        accumulate=case.accumulate,
        max_skipped=case.max_skipped,
    )


def trained(case: Case, sizes: Sequence[int], num_steps: int) -> Trained:
    """Trains a case on a mesh of this process's devices; nothing is written."""
    stage, _, config = make_stage(case)
    optimizer = optim.make_optimizer(config.optim, config[case.stage])
    mesh, settings = make_mesh(sizes), _settings(case, num_steps)
    init_key, step_key = jax.random.split(jax.random.key(0))
    with jax.set_mesh(mesh):
        base = base_params(case)
        init = loop_lib.make_init(stage, optimizer, settings)
        places = mesh_lib.state_shardings(mesh, jax.eval_shape(init, init_key, base))
        base = jax.device_put(base, mesh_lib.state_shardings(mesh, base))
        state = jax.jit(init, out_shardings=places)(init_key, base)
        step = loop_lib.make_step(stage, optimizer, settings, mesh, places)
        stream = batches(case, mesh_lib.local_rows(mesh, case.rows), 0)
        seen = []
        for _ in range(num_steps):
            rows = mesh_lib.place_rows(mesh, case.rows, next(stream))
            state, metrics = step(state, rows, step_key, None)
            seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    losses, grad_norms = np.asarray(seen).T
    return Trained(losses, grad_norms, jax.device_get(state.params))


def run(case: Case, sizes: Sequence[int], num_steps: int, directory: pathlib.Path) -> None:
    """Trains a case in a folder, from its newest checkpoint if there is one.

    Over all processes that are joined.
    """
    stage, _, config = make_stage(case)
    mesh = make_mesh(sizes)
    loop_lib.train(
        stage,
        _settings(case, num_steps),
        name=str(case),
        optimizer=optim.make_optimizer(config.optim, config[case.stage]),
        batches=functools.partial(batches, case, mesh_lib.local_rows(mesh, case.rows)),
        base=base_params(case),
        key=jax.random.key(0),
        mesh=mesh,
        directory=directory,
        metadata={},
    )


def read(directory: pathlib.Path) -> Trained:
    """What `run` left in a folder."""
    lines = io.read_jsonl(directory / "metrics.jsonl")
    saved = checkpoint.restore_part(directory / "checkpoints", ("params",))
    losses, norms = (np.asarray([line[name] for line in lines]) for name in ("loss", "grad_norm"))
    return Trained(losses, norms, jax.device_get(saved["params"]))


def difference(got: Trained, want: Trained) -> dict[str, float]:
    """The worst relative differences of losses, norms of gradients and parameters."""
    worst = lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    each = lambda a, b: float(np.max(np.abs(a / b - 1.0)))
    return {
        "losses": each(got.losses, want.losses),
        "grad_norms": each(got.grad_norms, want.grad_norms),
        "parameters": max(jax.tree.leaves(jax.tree.map(worst, got.params, want.params))),
    }


# --------------------------------------------------------------------------------- two processes


def run_joined(jobs: Sequence[tuple[Case, Sequence[int], int, pathlib.Path]]) -> None:
    """`run` of each job's arguments, in order, on two processes of four devices.

    Raises:
      RuntimeError: where a process ends with another code than 0.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    root = str(pathlib.Path(__file__).parents[1])
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": root}
    given = json.dumps([(*job[:3], str(job[3])) for job in jobs])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.meshes", f"--joined={coordinator},{process}"],
            env=environment,
            stdin=subprocess.PIPE,
            text=True,
        )
        for process in range(_PROCESSES)
    ]
    for process in started:
        process.stdin.write(given)
        process.stdin.close()
    if any(codes := [process.wait() for process in started]):
        raise RuntimeError(f"The processes ended with {codes}.")


def _work(coordinator: str, process: str) -> None:
    """One of the processes: does what standard input asks for."""
    processes.initialize(coordinator, _PROCESSES, int(process))
    try:
        for case, sizes, num_steps, directory in json.load(sys.stdin):
            run(Case(*case), sizes, num_steps, pathlib.Path(directory))
        processes.barrier("done")
    except Exception:
        traceback.print_exc()
        processes.leave(1)


# ----------------------------------------------------------------------------------------- tables


def compare(cases: Sequence[Case], num_steps: int) -> Iterator[dict[str, Any]]:
    """Differences from one device, of each case on each mesh and of each stage on two processes."""
    with tempfile.TemporaryDirectory() as folder:
        references = {}
        for case in cases:
            references[case] = trained(case, (1, 1, 1), num_steps)
            for sizes in MESHES:
                got = trained(case, sizes, num_steps)
                yield _row(case, _name(sizes), difference(got, references[case]))
        plain = [case for case in cases if case == Case(case.stage)]
        pairs = list(itertools.product(plain, JOINED_MESHES))
        places = [pathlib.Path(folder) / str(number) for number in range(len(pairs))]
        run_joined([(*pair, num_steps, at) for pair, at in zip(pairs, places, strict=True)])
        for (case, sizes), place in zip(pairs, places, strict=True):
            name = f"{_name(sizes)}, {_PROCESSES} processes"
            yield _row(case, name, difference(read(place), references[case]))


def compare_resumed(case: Case, num_steps: int) -> Iterator[dict[str, Any]]:
    """Saved on 2x2x2 after a few steps, then `num_steps` more there and elsewhere."""
    begun, end = 3, 3 + num_steps
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        run(case, (2, 2, 2), begun, folder / "begun")
        elsewhere = [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 2, 4), (1, 1, 1)]
        places = {_name(sizes): sizes for sizes in elsewhere}
        joined = {f"{_name(sizes)}, {_PROCESSES} processes": sizes for sizes in JOINED_MESHES}
        for place in places | joined:
            shutil.copytree(folder / "begun", folder / place)
        for place, sizes in places.items():
            run(case, sizes, end, folder / place)
        run_joined([(case, sizes, end, folder / place) for place, sizes in joined.items()])
        # One run to the end is what all of them should have been.
        run(case, (2, 2, 2), end, folder / "whole")
        for place in places | joined:
            compared = difference(read(folder / place), read(folder / "whole"))
            yield _row(case, f"2x2x2, then {place}", compared)


def _name(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _row(case: Case, where: str, compared: dict[str, float]) -> dict[str, Any]:
    row = {"case": str(case), "mesh": where, **compared}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    logging.set_verbosity(logging.WARNING)
    if _JOINED.value:
        _work(*_JOINED.value)
        return
    jax.config.update("jax_num_cpu_devices", 8)
    cases = [case for case in CASES if case.stage in _STAGES.value]
    rows = list(compare(cases, _NUM_STEPS.value))
    if "distill" in _STAGES.value:
        rows += compare_resumed(Case("distill"), _NUM_STEPS.value)
    measure.print_table(rows)
    worst = {key: max(row[key] for row in rows) for key in ("losses", "grad_norms", "parameters")}
    print(f"worst: {worst}")
    measure.write({"machine": measure.machine(), "num_steps": _NUM_STEPS.value, "runs": rows})


if __name__ == "__main__":
    app.run(main)
