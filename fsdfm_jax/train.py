"""The training loop, shared by all stages: straight-line, resumable, metrics one step late."""

import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fsdfm_jax import models, sharding, state
from fsdfm_jax.checkpoint import Checkpoints
from fsdfm_jax.stages import Stage
from fsdfm_jax.writer import MetricWriter


class Diverged(FloatingPointError):  # noqa: N818 - named after what happened
    """A loss or gradient is not finite; the message names stage and step."""


class Settings(NamedTuple):
    """Static numbers of a run.

    Attributes:
      num_steps: optimiser steps in all.
      batch_size: rows of a batch, over all processes.
      log_every, checkpoint_every: steps between lines of metrics and between checkpoints.
      keep_checkpoints: newest checkpoints that are kept.
      ema_decay: weight of the old average, 0 for none.
    """

    num_steps: int
    batch_size: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    ema_decay: float


def check_settings(settings: Settings) -> None:
    """ValueError naming the first value that no run can have."""
    for field in ("num_steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
        if getattr(settings, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(settings, field)}.")
    if not 0 <= settings.ema_decay < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got {settings.ema_decay}.")


def make_init(stage: Stage, optimizer: optax.GradientTransformation, settings: Settings):
    """A function (key, base weights or None) -> `state.TrainState`, to be jitted."""

    def init(key, base):
        params = stage.init_params(key, base)
        return state.init_state(params, optimizer, ema_decay=settings.ema_decay)

    return init


def make_step(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    mesh: Mesh,
    shardings: state.TrainState,
):
    """The jitted (state, batch, key) -> (state, metrics) of a stage; it donates the state.

    Trace it within `jax.set_mesh(mesh)`.

    Args:
      shardings: of the state, from `sharding.state_shardings`.
    """
    step = functools.partial(
        state.train_step, loss=stage.loss, optimizer=optimizer, ema_decay=settings.ema_decay
    )
    whole = NamedSharding(mesh, P())
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh), whole),
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
    base: models.Params | None,
    key: jax.Array,
    mesh: Mesh,
    directory: pathlib.Path,
    metadata: dict[str, Any],
) -> None:
    """Trains a stage up to `settings.num_steps`, from its newest checkpoint if there is one.

    The state after a step depends on nothing but the arguments and the step, so that a run killed
    at any moment and started again ends with the same parameters bit for bit.

    Args:
      stage: what to train.
      settings: how long, how often.
      name: of the run, for progress.
      optimizer: from `optim.make_optimizer`.
      batches: start_step -> iterator over batches from that step on.
      base: weights of the run this one starts from, or None; their shapes do where it goes on from
        a checkpoint of its own.
      key: root of the run's randomness.
      mesh: where to run.
      directory: gets checkpoints/, metrics.jsonl and tensorboard/.
      metadata: stored inside each checkpoint.

    Raises:
      Diverged: at the first loss or gradient that isn't finite; no checkpoint of that step is
        written.
      ValueError: if the stage can't start from `base`.
    """
    check_settings(settings)
    init_key, step_key = jax.random.split(key)
    with (
        jax.set_mesh(mesh),
        Checkpoints(directory / "checkpoints", keep=settings.keep_checkpoints) as checkpoints,
    ):
        # ------------------------------------------------------------------------------ state
        init = make_init(stage, optimizer, settings)
        abstract = jax.eval_shape(init, init_key, base)
        shardings = sharding.state_shardings(mesh, abstract)
        start = checkpoints.latest_step() or 0
        if start:
            placed = jax.tree.map(
                lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                abstract,
                shardings,
            )
            train_state = checkpoints.restore(placed)
            logging.info("%s goes on from the checkpoint of step %d.", name, start)
        else:
            # Weights read from a checkpoint sit on one device, which jit won't mix with a mesh.
            base = jax.device_put(base, sharding.state_shardings(mesh, base))
            train_state = jax.jit(init, out_shardings=shardings)(init_key, base)
        del base  # not to be kept beside the state
        if start >= settings.num_steps:
            return

        # ------------------------------------------------------------------------------- step
        step_fn = make_step(stage, optimizer, settings, mesh, shardings)

        # ------------------------------------------------------------------------------- loop
        stream = batches(start)
        first = next(stream)
        with MetricWriter(
            directory,
            name=name,
            total_steps=settings.num_steps,
            tokens_per_step=settings.batch_size * first["x1"].shape[1],
            start_step=start,
        ) as metric_writer:
            report = _Reporter(name, metric_writer, settings, start)
            batch = first
            for step in range(start + 1, settings.num_steps + 1):
                placed_batch = sharding.place_rows(mesh, settings.batch_size, batch)
                train_state, metrics = step_fn(train_state, placed_batch, step_key)
                report.finish()  # of the step before, while this one runs
                report.begin(step, metrics)
                if step % settings.checkpoint_every == 0 or step == settings.num_steps:
                    report.finish()
                    checkpoints.save(step, train_state, metadata)
                if step < settings.num_steps:
                    batch = next(stream)
        stream.close()
        checkpoints.wait()


class _Reporter:
    """Checks every step's metrics and writes their mean every `log_every` steps."""

    def __init__(self, name: str, writer: MetricWriter, settings: Settings, start: int):
        self._name, self._writer, self._settings, self._kept = name, writer, settings, start
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._sums: dict[str, float] = {}
        self._count = 0

    def begin(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self._pending = (step, metrics)

    def finish(self) -> None:
        """Waits for the pending step; raises Diverged unless it is finite."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {key: float(value) for key, value in metrics.items()}
        bad = {key: value for key, value in values.items() if not math.isfinite(value)}
        if bad:
            self._writer.write(step, values)
            every = self._settings.checkpoint_every
            kept = max(self._kept, (step - 1) // every * every)
            what = ", ".join(f"{key} is {value}" for key, value in bad.items())
            raise Diverged(
                f"{self._name}: {what} at step {step}. Checkpoints up to step {kept} are kept; "
                f"lower {self._name}'s learning_rate, lengthen its warmup_steps, or look at the "
                "text of that batch."
            )
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value
        self._count += 1
        if step % self._settings.log_every == 0 or step == self._settings.num_steps:
            self._writer.write(step, {k: v / self._count for k, v in self._sums.items()})
            self._sums, self._count = {}, 0
        else:
            self._writer.tick(step)
