"""The training state and one optimiser step, pure functions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fsdfm_jax.models import Params


class TrainState(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      step: int32 scalar, optimiser steps taken.
      params: weights being trained.
      ema: their exponential average, or None where the stage keeps none.
      opt_state: optax state.
    """

    step: jax.Array
    params: Params
    ema: Params | None
    opt_state: Any


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, ema_decay: float
) -> TrainState:
    """The state before the first step. Build it under jit: the average needs its own buffers."""
    ema = jax.tree.map(jnp.copy, params) if ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def averaged(state: TrainState) -> Params:
    """The weights to sample with and to teach with: the average where there is one."""
    return state.params if state.ema is None else state.ema


def train_step(state: TrainState, batch, root_key, *, loss, optimizer, ema_decay: float):
    """One optimiser step.

    Args:
      state: donated by the caller.
      batch: dict of arrays with B rows, see `stages.Stage`.
      root_key: the stage's key; the step's own key is `fold_in(root_key, step)`, so that a resumed
        run draws the same noise.
      loss: `Stage.loss`.
      optimizer: optax transformation.
      ema_decay: weight of the old average, 0 for none.

    Returns:
      (state, metrics): metrics are float32 scalars, among them `loss` and `grad_norm`.
    """
    key = jax.random.fold_in(root_key, state.step)
    frozen = jax.lax.stop_gradient(averaged(state))
    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.params, frozen, key, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1.0 - ema_decay)
    metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, ema, opt_state), metrics
