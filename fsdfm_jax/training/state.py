"""The training state and one optimiser step, as pure functions."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsdfm_jax.network.model import Params
from fsdfm_jax.ops import loops
from fsdfm_jax.parallel import rules
from fsdfm_jax.stages.base import Frozen
from fsdfm_jax.training.optim import Turns


class TrainState(NamedTuple):
    """The training state, as stored in checkpoints.

    Attributes:
      step: int32 scalar, optimiser steps taken, including skipped ones.
      params: weights being trained.
      ema: their exponential moving average, or None.
      opt_state: optax state.
      skipped: int32 scalar, number of steps skipped in a row up to now.
      auxiliary: the second network of the stage, or None.
    """

    step: jax.Array
    params: Params
    ema: Params | None
    opt_state: Any
    skipped: jax.Array
    auxiliary: "AuxiliaryState | None" = None


class AuxiliaryState(NamedTuple):
    """Weights and optimiser state of a second network, see `stages.Auxiliary`."""

    params: Params
    opt_state: Any


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    turns: Turns | None = None,
) -> TrainState:
    """Make the initial state. Call it under jit, so that every copy gets separate buffers."""
    ema = jax.tree.map(jnp.copy, params) if ema_decay else None
    zero = jnp.zeros((), jnp.int32)
    auxiliary = None
    if turns is not None:
        auxiliary = AuxiliaryState(jax.tree.map(jnp.copy, params), turns.optimizer.init(params))
    return TrainState(zero, params, ema, optimizer.init(params), zero, auxiliary)


def averaged(state: TrainState) -> Params:
    """Return the weights for sampling and for the teacher: the EMA if there is one."""
    return state.params if state.ema is None else state.ema


def train_step(
    state: TrainState,
    batch,
    root_key,
    needed=None,
    *,
    loss,
    optimizer,
    ema_decay: float,
    accumulate: int = 1,
    max_skipped: int = 0,
    turns: Turns | None = None,
):
    """One optimiser step.

    Args:
      state: donated by the caller.
      batch: dict of arrays with B rows, see `stages.Stage`.
      root_key: key of the run. The key of a step is `fold_in(root_key, step)`, so a resumed run
        draws the same noise.
      needed: weights of other runs that the loss reads, `Frozen.needed`; None if there are none.
      loss: `Stage.loss`.
      optimizer: optax transformation.
      ema_decay: weight of the old average; 0 disables the EMA.
      accumulate: number of micro-batches, processed in sequence with separate keys; the gradient is
        their mean.
      max_skipped: if above 0, a step with a non-finite loss or gradient leaves weights, EMA and
        optimiser unchanged. The caller stops when `skipped` exceeds it.
      turns: training of the stage's second network, which is updated first; None without one.

    Returns:
      (state, metrics): metrics are float32 scalars, including `loss`, `grad_norm` and, if
      `max_skipped` is set, `skipped`.
    """
    key = jax.random.fold_in(root_key, state.step)
    frozen = jax.lax.stop_gradient(Frozen(averaged(state), needed or {}))
    auxiliary, auxiliary_metrics = state.auxiliary, {}
    if turns is not None:
        # Separate from the student's key: `split` and `fold_in` of one key give the same keys.
        key, turns_key = jax.random.split(key)
        partner = jax.lax.stop_gradient(state.params)
        auxiliary, auxiliary_metrics = _train_auxiliary(
            auxiliary, frozen._replace(partner=partner), turns_key, batch, turns, accumulate
        )
        frozen = frozen._replace(partner=jax.lax.stop_gradient(auxiliary.params))
    params, opt_state, metrics = _update(
        state.params, state.opt_state, frozen, key, batch, loss, optimizer, accumulate
    )
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
    metrics = metrics | auxiliary_metrics
    new = (params, ema, opt_state, auxiliary)
    skipped = state.skipped
    if max_skipped:
        finite = functools.reduce(jnp.logical_and, map(jnp.isfinite, metrics.values()))
        old = (state.params, state.ema, state.opt_state, state.auxiliary)
        new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
        skipped = jnp.where(finite, 0, skipped + 1)
        metrics["skipped"] = skipped.astype(jnp.float32)
    params, ema, opt_state, auxiliary = new
    return TrainState(state.step + 1, params, ema, opt_state, skipped, auxiliary), metrics


def _update(params, opt_state, frozen, key, batch, loss, optimizer, accumulate: int):
    """Update a network once; return (params, opt_state, metrics)."""
    gradient = functools.partial(jax.grad(loss, has_aux=True), params, frozen)
    if accumulate == 1:
        grads, metrics = gradient(key, batch)
    else:
        grads, metrics = _accumulate(gradient, key, batch, accumulate)
    grads = rules.like_parameters(grads)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
    return optax.apply_updates(params, updates), opt_state, metrics


def _train_auxiliary(
    auxiliary: AuxiliaryState, frozen: Frozen, key, batch, turns: Turns, accumulate: int
):
    """Train the second network; return it and the means of its metrics as `auxiliary_..`."""

    def step(auxiliary: AuxiliaryState, turn):
        params, opt_state, metrics = _update(
            auxiliary.params,
            auxiliary.opt_state,
            frozen,
            jax.random.fold_in(key, turn),
            batch,
            turns.auxiliary.loss,
            turns.optimizer,
            accumulate,
        )
        return AuxiliaryState(params, opt_state), metrics

    auxiliary, metrics = loops.scan(step, auxiliary, jnp.arange(turns.auxiliary.updates))
    return auxiliary, {f"auxiliary_{name}": jnp.mean(x) for name, x in metrics.items()}


def _accumulate(gradient, key, batch, parts: int):
    """Return the mean gradient and metrics over the micro-batches.

    Micro-batch a has the rows a, a + parts, a + 2 parts .., so that rows stay on their devices.
    """

    def split(x_B):
        return jnp.swapaxes(x_B.reshape(-1, parts, *x_B.shape[1:]), 0, 1)

    def one(index, rows):
        rows = jax.tree.map(lambda x: rules.constrain(x, "rows"), rows)
        grads, metrics = gradient(jax.random.fold_in(key, index), rows)
        return rules.like_parameters(grads), metrics

    def step(total, inputs):
        return jax.tree.map(jnp.add, total, one(*inputs)), None

    inputs = (jnp.arange(parts), jax.tree.map(split, batch))
    shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    grads, metrics = loops.scan(step, (rules.like_parameters(zeros[0]), zeros[1]), inputs)[0]
    return jax.tree.map(lambda x: x / parts, (grads, metrics))
