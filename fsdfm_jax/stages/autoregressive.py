"""The autoregressive baseline of the same blocks, also the in-house judge.

Blocks of text have no BOS; the end-of-document token stands before the first position instead, so
that every token of a block is predicted and counted.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fsdfm_jax import losses, models
from fsdfm_jax.models import ModelConfig, Params
from fsdfm_jax.stages import Process, Stage, start_fresh


def shift_right(x1_BL: jax.Array, eos_id: int) -> jax.Array:
    """The network's input: x1 moved by one position, `eos_id` first; int [B, L]."""
    first_B1 = jnp.full_like(x1_BL[:, :1], eos_id)
    return jnp.concatenate([first_B1, x1_BL[:, :-1]], axis=1)


def token_losses(
    params: Params, model: ModelConfig, eos_id: int, x1_BL: jax.Array, *, key=None
) -> jax.Array:
    """-log p(token | tokens before it), float32 [B, L], nats; `key` switches dropout on."""
    logits_BLV = models.apply(params, model, shift_right(x1_BL, eos_id), key=key)
    return losses.cross_entropy(logits_BLV, x1_BL)


def make(config: ConfigDict, model: ModelConfig, process: Process) -> Stage:
    """The stage; `config` holds only the optimiser's keys."""
    del config

    def loss(params, frozen, key, batch):
        del frozen
        value = jnp.mean(token_losses(params, model, process.eos_id, batch["x1"], key=key))
        return value, {"loss": value}

    return Stage("autoregressive", model, start_fresh(model), loss)
