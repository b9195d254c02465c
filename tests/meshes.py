"""Tiny runs of every stage on meshes of simulated devices, for tests/test_mesh*.py."""

import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from configs import base as base_config
from fsdfm_jax import io, stages
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.flow.process import Process
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import rules
from fsdfm_jax.stages.base import Stage
from fsdfm_jax.training import checkpoint, optim
from fsdfm_jax.training import loop as loop_lib

# Sizes of data, fsdp and tensor.
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))
_DECAY = 0.9


class Case(NamedTuple):
    """A training case: stage, noise, gradient accumulation, and array sizes."""

    stage: str
    source: str = "uniform"
    accumulate: int = 1
    moment_dtype: str = "float32"
    remat: str = "none"
    max_skipped: int = 0
    rows: int = 16
    length: int = 12
    vocab_size: int = 11
    positions: str = "rotary"
    given: str = "unmarked"

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
    Case("distill", positions="learned", given="marked"),
    Case("refine", accumulate=2, max_skipped=2),
    Case("refine", given="marked"),
    # Samples of 1, 2 and 4 steps: six are walked at once, which don't divide over eight devices.
    Case("refine", rows=24),
    # Logits in several chunks.
    Case("distill", length=192, vocab_size=1031),
)


class Trained(NamedTuple):
    """Losses and gradient norms of each step [S], and the final parameters.

    `auxiliary` are those of the second network, if any.
    """

    losses: np.ndarray
    grad_norms: np.ndarray
    params: model_lib.Params
    auxiliary: model_lib.Params | None = None


def make_config(case: Case) -> ConfigDict:
    """The configuration of a case."""
    config = base_config.get_config()
    model, config.path.source = config.model, case.source
    model.width, model.num_blocks, model.num_heads, model.cond_width = 16, 2, 4, 8
    model.mlp_ratio, model.logits_mib, model.remat = 2, 1, case.remat
    model.positions, config.data.block_length = case.positions, case.length
    model.given = case.given
    # Adam divides by the size of the gradient: below eps, where it is rounding, it no longer does.
    config.optim.eps = 1e-3
    config.optim.moment_dtype = case.moment_dtype
    own = config[case.stage]
    own.learning_rate, own.num_steps, own.ema_decay = 1e-2, 100, _DECAY
    if case.stage in stages.FEW_STEP:
        own.max_log2_steps = 4
    if case.stage == "distill":
        own.tau = 0.25
    if case.stage == "refine":  # rows of a sample: 2 x 2 or 3 x 4
        own.max_log2_steps = 1 if case.rows % 12 else 2
    return config


def make_stage(case: Case) -> tuple[Stage, Process, ConfigDict]:
    """The stage of a case, its noising process and configuration."""
    config = make_config(case)
    eos_id, num_tokens = 2, case.vocab_size - (case.source == "mask")
    process = process_lib.make_process(**config.path, num_tokens=num_tokens, eos_id=eos_id)
    return stages.make_stage(case.stage, config, process), process, config


def base_params(case: Case) -> model_lib.Params:
    """Initial weights with noise: with their zeros all stages would give the same output."""
    name = "autoregressive" if case.stage == "autoregressive" else "pretrain"
    stage, _, _ = make_stage(case._replace(stage=name))
    fresh = jax.eval_shape(stage.init_params, jax.random.key(0), None)
    rng = np.random.default_rng(0)
    noise = lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32)
    return jax.tree.map(noise, fresh)


def batches(case: Case, rows: Sequence[int], start: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches from step `start`, restricted to the rows of this process."""
    shape = (case.rows, case.length)
    for step in range(start, sys.maxsize):
        rng = np.random.default_rng([7, step])
        yield {"x1": rng.integers(case.vocab_size - 1, size=shape)[list(rows)].astype(np.int32)}


def make_mesh(sizes: Sequence[int]) -> Mesh:
    """A mesh over all devices, or over the first one if one is enough."""
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
    """Train a case on a mesh of this process's devices without writing files."""
    stage, _, config = make_stage(case)
    optimizer = optim.make_optimizer(config.optim, config[case.stage])
    turns = optim.make_turns(config.optim, config[case.stage], stage)
    mesh, settings = make_mesh(sizes), _settings(case, num_steps)
    init_key, step_key = jax.random.split(jax.random.key(0))
    with jax.set_mesh(mesh):
        base = base_params(case)
        init = loop_lib.make_init(stage, optimizer, settings, turns)
        places = mesh_lib.state_shardings(mesh, jax.eval_shape(init, init_key, base))
        base = jax.device_put(base, mesh_lib.state_shardings(mesh, base))
        state = jax.jit(init, out_shardings=places)(init_key, base)
        step = loop_lib.make_step(stage, optimizer, settings, mesh, places, turns)
        needed = dict.fromkeys(stage.needs, base)
        stream = batches(case, mesh_lib.local_rows(mesh, case.rows), 0)
        seen = []
        for _ in range(num_steps):
            rows = mesh_lib.place_rows(mesh, case.rows, next(stream))
            state, metrics = step(state, rows, step_key, needed)
            seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    losses, grad_norms = np.asarray(seen).T
    auxiliary = None if turns is None else jax.device_get(state.auxiliary.params)
    return Trained(losses, grad_norms, jax.device_get(state.params), auxiliary)


def run(case: Case, sizes: Sequence[int], num_steps: int, directory: pathlib.Path) -> None:
    """Train a case in a folder, from its newest checkpoint if there is one."""
    stage, _, config = make_stage(case)
    mesh, base = make_mesh(sizes), base_params(case)
    needed = dict.fromkeys(stage.needs, base)
    loop_lib.train(
        stage,
        _settings(case, num_steps),
        name=str(case),
        optimizer=optim.make_optimizer(config.optim, config[case.stage]),
        batches=functools.partial(batches, case, mesh_lib.local_rows(mesh, case.rows)),
        base=base,
        needed=jax.device_put(needed, mesh_lib.state_shardings(mesh, needed)),
        turns=optim.make_turns(config.optim, config[case.stage], stage),
        key=jax.random.key(0),
        mesh=mesh,
        directory=directory,
        metadata={},
    )


def read(directory: pathlib.Path) -> Trained:
    """Read the results of `run` from a folder."""
    lines = io.read_jsonl(directory / "metrics.jsonl")
    saved = checkpoint.restore_part(directory / "checkpoints", ("params",))
    losses, norms = (np.asarray([line[name] for line in lines]) for name in ("loss", "grad_norm"))
    return Trained(losses, norms, jax.device_get(saved["params"]))


def difference(got: Trained, want: Trained) -> dict[str, float]:
    """The worst relative differences of losses, norms of gradients and parameters."""
    worst = lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    each = lambda a, b: float(np.max(np.abs(a / b - 1.0)))
    networks = [(one.params, one.auxiliary) for one in (got, want)]
    return {
        "losses": each(got.losses, want.losses),
        "grad_norms": each(got.grad_norms, want.grad_norms),
        "parameters": max(jax.tree.leaves(jax.tree.map(worst, *networks))),
    }
