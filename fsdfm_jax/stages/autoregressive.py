"""The autoregressive baseline: same blocks as the diffusion network, also the in-house judge.

Blocks of text have no BOS. The end-of-document token is the first input instead, so that every
token of a block is predicted and counted.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fsdfm_jax.flow import losses
from fsdfm_jax.flow.process import Process
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.ops.logits import Logits
from fsdfm_jax.stages.base import Stage, start_fresh


def shift_right(x1_BL: jax.Array, eos_id: int) -> jax.Array:
    """Shift x1 right by one position, with `eos_id` first: the network's input, int [B, L]."""
    first_B1 = jnp.full_like(x1_BL[:, :1], eos_id)
    return jnp.concatenate([first_B1, x1_BL[:, :-1]], axis=1)


def predict_next(
    params: Params, model: ModelConfig, eos_id: int, x1_BL: jax.Array, *, key=None
) -> Logits:
    """Logits of each token given the preceding ones, [B, L, V]; `key` enables dropout."""
    return model_lib.predict(params, model, shift_right(x1_BL, eos_id), key=key)


def token_losses(
    params: Params,
    model: ModelConfig,
    eos_id: int,
    x1_BL: jax.Array,
    *,
    num_tokens: int | None = None,
) -> jax.Array:
    """-log p(token | preceding tokens), float32 [B, L], nats.

    Args:
      params, model: of a causal network.
      eos_id: input of the first position.
      x1_BL: int [B, L].
      num_tokens: number of text ids; excludes a mask token at the end of the vocabulary.
    """

    def loss(logits_BLV, x1_BL):
        return losses.cross_entropy(logits_BLV[..., :num_tokens], x1_BL)

    return logits_lib.map_positions(loss, predict_next(params, model, eos_id, x1_BL), x1_BL)


def make(config: ConfigDict, model: ModelConfig, process: Process) -> Stage:
    """Make the stage; `config` has only the keys of the optimiser."""
    del config

    def loss(params, frozen, key, batch):
        del frozen
        x1_BL = batch["x1"]
        logits = predict_next(params, model, process.eos_id, x1_BL, key=key)
        value = logits_lib.mean_loss(losses.cross_entropy, logits, x1_BL)
        return value, {"loss": value}

    return Stage("autoregressive", model, start_fresh(model), loss)
