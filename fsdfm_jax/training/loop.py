"""The training loop, shared by all stages; resumable, with metrics read one step late."""

import contextlib
import faulthandler
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fsdfm_jax.network.model import Params
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import processes
from fsdfm_jax.stages.base import Stage
from fsdfm_jax.training import recipe, state
from fsdfm_jax.training.checkpoint import Checkpoints, Retention
from fsdfm_jax.training.metrics import MetricWriter
from fsdfm_jax.training.optim import Turns


class Diverged(FloatingPointError):  # noqa: N818 - a state, not an error name
    """A loss or gradient is not finite; the message names the stage and step."""


class Settings(NamedTuple):
    """Static settings of a run.

    Attributes:
      num_steps: total optimiser steps.
      batch_size: rows per batch, over all processes.
      log_every, checkpoint_every: steps between metrics lines and between checkpoints.
      retention: which checkpoints to keep.
      ema_decay: weight of the old average; 0 disables the EMA.
      accumulate: number of micro-batches per batch.
      max_skipped: maximum consecutive steps to skip because of non-finite values.
      watchdog_minutes: time without a finished step after which the process dumps its threads'
        stacks to stderr and exits with code 1. Before the first step, which includes compilation,
        it is three times as long and at least 30 minutes. 0 disables it.
      wandb: Weights & Biases project that also gets the metrics; "" for none.
    """

    num_steps: int
    batch_size: int
    log_every: int
    checkpoint_every: int
    ema_decay: float
    retention: Retention = Retention()
    accumulate: int = 1
    max_skipped: int = 0
    watchdog_minutes: float = 0.0
    wandb: str = ""


def check_settings(settings: Settings) -> None:
    """Raise ValueError naming the first invalid value."""
    for field in ("num_steps", "batch_size", "log_every", "checkpoint_every", "accumulate"):
        if getattr(settings, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(settings, field)}.")
    if not 0 <= settings.ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {settings.ema_decay}.")
    if settings.batch_size % settings.accumulate:
        raise ValueError(
            f"batch_size={settings.batch_size} must be a multiple of "
            f"accumulate={settings.accumulate}: micro-batches have equal numbers of rows."
        )
    for field in ("max_skipped", "watchdog_minutes"):
        if getattr(settings, field) < 0:
            raise ValueError(f"{field} must not be negative, got {getattr(settings, field)}.")


def make_init(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    turns: Turns | None = None,
):
    """Make a function (key, base weights or None) -> `state.TrainState`, to be jitted."""

    def init(key, base):
        params = stage.init_params(key, base)
        return state.init_state(params, optimizer, ema_decay=settings.ema_decay, turns=turns)

    return init


def make_step(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    mesh: Mesh,
    shardings: state.TrainState,
    turns: Turns | None = None,
):
    """Make a stage's jitted (state, batch, key, needed) -> (state, metrics); donates the state.

    Trace it within `jax.set_mesh(mesh)`. `needed`, see `state.train_step`, keeps its sharding.

    Args:
      shardings: of the state, from `mesh.state_shardings`.
    """
    step = functools.partial(
        state.train_step,
        loss=stage.loss,
        optimizer=optimizer,
        ema_decay=settings.ema_decay,
        accumulate=settings.accumulate,
        max_skipped=settings.max_skipped,
        turns=turns,
    )
    whole = NamedSharding(mesh, P())
    return jax.jit(
        step,
        in_shardings=(shardings, mesh_lib.batch_sharding(mesh), whole, None),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )


def train(
    stage: Stage,
    settings: Settings,
    *,
    name: str,
    optimizer: optax.GradientTransformation,
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
    base: Params | None,
    needed: Any = None,
    key: jax.Array,
    mesh: Mesh,
    directory: pathlib.Path,
    metadata: dict[str, Any],
    turns: Turns | None = None,
) -> None:
    """Train a stage up to `settings.num_steps`, resuming from its newest checkpoint.

    The state after a step depends only on the arguments and the step. A run that is killed at any
    moment and restarted ends with the same parameters, bit for bit; on another mesh or number of
    processes, up to rounding. A metrics line is the mean since the previous line, or since the
    start of the process.

    Args:
      stage: what to train.
      settings: static settings.
      name: of the run, for progress.
      optimizer: from `optim.make_optimizer`.
      batches: start_step -> iterator over batches from that step on; each process yields its rows
        `mesh.local_rows`.
      base: weights of the run this one starts from, or None; shapes suffice when resuming.
      needed: weights of the runs in `stage.needs`, on the mesh.
      key: root key of the run's randomness.
      mesh: of the devices of all processes.
      directory: gets checkpoints/, metrics.jsonl and tensorboard/; shared by all processes.
      metadata: stored inside each checkpoint.
      turns: from `optim.make_turns`.

    A finished run is restored once more before this returns: a damaged last checkpoint can still be
    replaced here, whereas later readers can only fail.

    Raises:
      Diverged: at the first non-finite loss or gradient, or after more than `settings.max_skipped`
        in a row; that step is not saved.
      processes.Stopped: after SIGTERM during training, once the current step is saved. Before
        training, SIGTERM ends the process as usual.
      checkpoint.SaveFailed: if a checkpoint can't be written.
      checkpoint.DamagedCheckpoint: if there are checkpoints but none is intact.
      ValueError: if the stage can't start from `base`, lacks the metric for choosing checkpoints,
        or would resume from a checkpoint of another recipe.
    """
    check_settings(settings)
    init_key, step_key = jax.random.split(key)
    with (
        jax.set_mesh(mesh),
        Checkpoints(directory / "checkpoints", retention=settings.retention) as checkpoints,
        _Watchdog(settings.watchdog_minutes) as watchdog,
    ):
        init = make_init(stage, optimizer, settings, turns)
        shapes = jax.eval_shape(init, init_key, base)
        shardings = mesh_lib.state_shardings(mesh, shapes)
        found = checkpoints.restore_latest(_sharded(shapes, shardings))
        if found is not None:
            if "recipe" in metadata:  # the newest intact one may be older than the one checked
                recipe.check_recipe(directory, metadata["recipe"])
            logging.info("%s resumes from the checkpoint of step %d.", name, found[0])
        elif _is_abstract(base):
            raise ValueError(
                f"The checkpoints of {name} in {directory} are gone; run the same command "
                "again to start from the beginning."
            )
        else:
            base = jax.device_put(base, mesh_lib.state_shardings(mesh, base))
            found = 0, jax.jit(init, out_shardings=shardings)(init_key, base)
        start, train_state = found
        del base, found  # free the memory
        if start >= settings.num_steps:
            return
        step_fn = make_step(stage, optimizer, settings, mesh, shardings, turns)
        _take_steps(
            train_state,
            lambda train_state, rows: step_fn(train_state, rows, step_key, needed),
            batches(start),
            settings,
            start=start,
            name=name,
            mesh=mesh,
            directory=directory,
            checkpoints=checkpoints,
            metadata=metadata,
            watchdog=watchdog,
        )


def _take_steps(
    train_state: state.TrainState,
    step_fn: Callable[..., tuple[state.TrainState, dict[str, jax.Array]]],
    stream: Iterator[dict[str, np.ndarray]],
    settings: Settings,
    *,
    start: int,
    name: str,
    mesh: Mesh,
    directory: pathlib.Path,
    checkpoints: Checkpoints,
    metadata: dict[str, Any],
    watchdog: "_Watchdog",
) -> None:
    """Take the steps after `start`; the metrics of a step are read while the next one runs."""
    batch = next(stream)
    with (
        _open_writer(
            directory,
            name=name,
            total_steps=settings.num_steps,
            tokens_per_step=settings.batch_size * batch["x1"].shape[1],
            start_step=start,
            wandb=settings.wandb,
        ) as metric_writer,
        processes.StopRequest(mesh) as stop,
    ):
        report = _Reporter(name, metric_writer, settings, start)
        agreed: bool | jax.Array = False
        for step in range(start + 1, settings.num_steps + 1):
            rows = mesh_lib.place_rows(mesh, settings.batch_size, batch)
            train_state, metrics = step_fn(train_state, rows)
            report.finish()  # the previous step, while this one runs
            watchdog.pat(step - start)
            report.begin(step, metrics)
            stopping = stop.granted(agreed)
            agreed = stop.ask()
            if stopping or step % settings.checkpoint_every == 0 or step == settings.num_steps:
                report.finish()
                checkpoints.save(step, train_state, metadata, report.since_checkpoint() or None)
            if stopping:
                break
            if step < settings.num_steps:
                began = time.perf_counter()
                batch = next(stream)
                report.waited(time.perf_counter() - began)
        stream.close()
        checkpoints.wait()
        _end_if_asked(stop, name, step, settings)


def _end_if_asked(stop: processes.StopRequest, name: str, step: int, settings: Settings) -> None:
    """Raise Stopped in all processes if one of them got a signal."""
    if not stop.granted(stop.ask()):
        return
    processes.barrier(f"{name} stopped")
    raise processes.Stopped(
        f"{name}: stopped by {stop.name} at step {step} of {settings.num_steps}, which is saved; "
        "run the same command to resume."
    )


def _sharded(shapes, shardings):
    """Combine the shapes of a tree with the shardings of another, for restoring."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _is_abstract(tree) -> bool:
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def _open_writer(directory: pathlib.Path, **options):
    """Open the metrics writer in the first process, and a silent one in the others."""
    return MetricWriter(directory, **options) if processes.is_first() else _Silent()


class _Silent(contextlib.nullcontext):
    """A `MetricWriter` that writes nothing."""

    def __enter__(self) -> "_Silent":
        return self

    def write(self, step: int, metrics: dict[str, float], timing: dict[str, float]) -> None:
        """Write nothing."""

    def tick(self, step: int) -> None:
        """Show nothing."""


class _Watchdog:
    """Ends a process that hangs, for example because another host is gone."""

    def __init__(self, minutes: float):
        self._seconds = 60.0 * minutes

    def __enter__(self) -> "_Watchdog":
        if self._seconds:  # allow for restoring a checkpoint and compiling
            self._wait(max(3 * self._seconds, 1800.0))
        return self

    def pat(self, steps: int) -> None:
        """Reset the timer: `steps` steps have started, and all but the last have ended."""
        if self._seconds and steps > 1:
            self._wait(self._seconds)

    def _wait(self, seconds: float) -> None:
        # Uses a C thread, which runs even if Python is blocked.
        faulthandler.dump_traceback_later(seconds, exit=True)

    def __exit__(self, *exc_info) -> None:
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()


class _Reporter:
    """Checks every step's metrics and writes their mean every `log_every` steps."""

    def __init__(self, name: str, writer: MetricWriter | _Silent, settings: Settings, start: int):
        self._name, self._writer, self._settings, self._kept = name, writer, settings, start
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._line, self._checkpoint = _Means(), _Means()
        self._skipped = 0
        self._waited, self._since = 0.0, time.perf_counter()

    def begin(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self._pending = (step, metrics)

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for input."""
        self._waited += seconds

    def since_checkpoint(self) -> dict[str, float]:
        """Means of the metrics since the last call."""
        means, self._checkpoint = self._checkpoint.values(), _Means()
        return means

    def finish(self) -> None:
        """Wait for the pending step; raise Diverged if it is non-finite and can't be skipped."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {key: float(value) for key, value in metrics.items()}
        in_a_row = values.pop("skipped", 0)
        retention = self._settings.retention
        if retention.keep_best and retention.metric not in values:
            raise ValueError(
                f"train.best_metric={retention.metric!r} is not a metric of {self._name}; "
                f"it has {', '.join(sorted(values))}."
            )
        bad = {key: value for key, value in values.items() if not math.isfinite(value)}
        if bad:
            self._check_bad(step, values, bad, in_a_row)
            self._skipped += 1
        else:
            self._line.add(values)
            self._checkpoint.add(values)
        if step % self._settings.log_every == 0 or step == self._settings.num_steps:
            now = time.perf_counter()
            line = self._line.values()
            if self._settings.max_skipped:
                line["skipped"] = self._skipped
            # An upper bound on the cost of reading: devices work meanwhile.
            share = self._waited / max(now - self._since, 1e-9)
            self._writer.write(step, line, timing={"input_wait": round(share, 4)})
            self._line, self._skipped, self._waited, self._since = _Means(), 0, 0.0, now
        else:
            self._writer.tick(step)

    def _check_bad(self, step, values, bad, in_a_row) -> None:
        what = ", ".join(f"{key} is {value}" for key, value in bad.items())
        allowed = self._settings.max_skipped
        if allowed and in_a_row <= allowed:
            logging.warning("%s: %s at step %d, which is skipped.", self._name, what, step)
            return
        self._writer.write(step, values, timing={})
        every = self._settings.checkpoint_every
        kept = max(self._kept, (step - 1) // every * every)
        after = f" ({int(in_a_row)} steps in a row, optim.max_skipped={allowed})" if allowed else ""
        raise Diverged(
            f"{self._name}: {what} at step {step}{after}. Checkpoints up to step {kept} are kept; "
            f"look at the text of that batch, skip such steps with optim.max_skipped, or start "
            f"over in another folder with a lower learning_rate or longer warmup_steps for "
            f"{self._name}."
        )


class _Means:
    """Means of named numbers."""

    def __init__(self):
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._count += 1

    def values(self) -> dict[str, float]:
        return {key: total / self._count for key, total in self._sums.items()}
