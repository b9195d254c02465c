"""The training stages, as pure functions with one signature.

    pretrain        data, all times               eq. 3.8         trains the base model
    step_aware      data, all step budgets        eq. 4.4         conditions on the step width
    distill         data and shortcut teacher     eq. 4.5         makes steps larger
    refine          own samples and base model    flow/matching   tunes how each step moves
    autoregressive  data, left to right           cross-entropy   baseline and judge

Equations of arXiv:2509.20624. The entry point is `make_stage`; all stages share one training loop
(fsdfm_jax/training/loop.py).
"""

import importlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fsdfm_jax import schema
from fsdfm_jax.flow import paths
from fsdfm_jax.flow.process import Process
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params
from fsdfm_jax.ops import logits as logits_lib

NAMES = ("autoregressive", "pretrain", "step_aware", "distill", "refine")
FEW_STEP = ("step_aware", "distill", "refine")

# "x1": int [B, L] data tokens.
Batch = dict[str, jax.Array]


class Frozen(NamedTuple):
    """Weights that a loss reads but doesn't train.

    Attributes:
      average: the EMA of the weights in training, the teacher of `distill`.
      needed: `Stage.needs` with weights instead of names.
      partner: when two networks are trained alternately, the other one.
    """

    average: Params
    needed: Mapping[str, Params] = {}
    partner: Params | None = None


# In `Stage.needs`: the run that the stage is initialised from.
BASE = "base"


Loss = Callable[[Params, Frozen, jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]


class Auxiliary(NamedTuple):
    """A second network, trained alternately with the first and used only in training.

    It has the shape of the first and starts from the same weights.

    Attributes:
      loss: as `Stage.loss`; each of the two losses reads the other network as `Frozen.partner`.
      updates: its number of updates per update of the first network.
      learning_rate: as a multiple of the stage's learning rate.
    """

    loss: Loss
    updates: int
    learning_rate: float


class Stage(NamedTuple):
    """A stage.

    Attributes:
      name: one of `NAMES`.
      model: its network.
      init_params: (key, base) -> params; `base` is the weights that the stage starts from, or None.
      loss: (params, frozen, key, batch) -> (scalar, metrics). `frozen` is a `Frozen` and gets no
        gradient; metrics are scalars and include "loss".
      needs: base models whose weights the loss reads: config key -> run name, folder or `BASE`.
      auxiliary: a second network trained alongside, or None.
    """

    name: str
    model: ModelConfig
    init_params: Callable[[jax.Array, Params | None], Params]
    loss: Loss
    needs: Mapping[str, str] = {}
    auxiliary: Auxiliary | None = None


def model_config(
    name: str, model: ConfigDict, *, vocab_size: int, block_length: int = 0
) -> ModelConfig:
    """Return the network of a stage, from `config.model`.

    Args:
      name: of the stage.
      model: `config.model`.
      vocab_size: V, including the mask token if there is one.
      block_length: L, needed only for learned positions.
    """
    return ModelConfig(
        vocab_size=vocab_size,
        width=model.width,
        num_blocks=model.num_blocks,
        num_heads=model.num_heads,
        cond_width=model.cond_width,
        mlp_ratio=model.mlp_ratio,
        dropout=model.dropout,
        conditioning=model.conditioning if name in FEW_STEP else "none",
        positions=model.positions,
        given="unmarked" if name == "autoregressive" else model.given,
        num_positions=block_length if model.positions == "learned" else 0,
        causal=name == "autoregressive",
        dtype=model.dtype,
        attention=model.attention,
        logits_mib=model.logits_mib,
        remat=model.remat,
    )


def make_stage(name: str, config: ConfigDict, process: Process) -> Stage:
    """Make a stage by name.

    Args:
      name: one of `NAMES`.
      config: the whole configuration; the stage reads `config.model`, its own section and the
        block length.
      process: from `make_process`.

    Raises:
      ValueError: for an unknown name or invalid values.
    """
    if name not in NAMES:
        raise ValueError(f"Unknown stage {name!r}; expected one of {', '.join(NAMES)}.")
    if name in FEW_STEP and config.model.conditioning == "none":
        raise ValueError(
            f"Stage {name!r} conditions the network on the step width; set model.conditioning to "
            "'additive' or 'official', got 'none'."
        )
    model = model_config(
        name,
        config.model,
        vocab_size=process.source.vocab_size,
        block_length=config.data.block_length,
    )
    schema.check_section(name, config[name])
    module = importlib.import_module(f"fsdfm_jax.stages.{name}")
    return module.make(config[name], model, process)


def draw_frozen(key: jax.Array, model: ModelConfig, x1_BL: jax.Array) -> jax.Array | None:
    """Which tokens of a batch are given, bool [B, L]; None for a network that isn't told."""
    if model.given != "marked":
        return None
    return paths.sample_frozen(key, x1_BL.shape)


def mean_loss(
    position_loss: Callable[..., jax.Array],
    logits: logits_lib.Logits,
    *args: logits_lib.Logits,
    frozen_BL: jax.Array | None,
    num_rows: int | None = None,
) -> jax.Array:
    """As `logits.mean_loss`; given tokens count as 0."""
    if frozen_BL is None:
        return logits_lib.mean_loss(position_loss, logits, *args, num_rows=num_rows)

    def free_loss(logits_BLV, frozen_BL, *args):
        return jnp.where(frozen_BL, 0.0, position_loss(logits_BLV, *args))

    return logits_lib.mean_loss(free_loss, logits, frozen_BL, *args, num_rows=num_rows)


def start_fresh(model: ModelConfig) -> Callable[[jax.Array, Params | None], Params]:
    """`init_params` of a stage that starts from random weights or from given ones."""

    def init_params(key, base):
        fresh = model_lib.init_params(key, model)
        return fresh if base is None else model_lib.add_conditioning(base, fresh)

    return init_params


def start_from_base(name: str, model: ModelConfig) -> Callable[[jax.Array, Params | None], Params]:
    """`init_params` of a few-step stage: base weights plus fresh step conditioning.

    The returned function raises ValueError without base weights: distilling random weights gives
    random text, even if the loss decreases.
    """

    def init_params(key, base):
        if base is None:
            raise ValueError(
                f"Stage {name!r} needs trained base weights, got none; put 'pretrain' before it "
                f"in the pipeline, or set {name}.init_from to a trained stage."
            )
        return model_lib.add_conditioning(base, model_lib.init_params(key, model))

    return init_params
