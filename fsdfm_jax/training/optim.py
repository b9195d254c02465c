"""The optimiser as an optax chain: clipping, then AdamW or Muon with a warm-up schedule.

Muon (Jordan et al. 2024, arXiv:2502.16982) updates a matrix by its orthogonalised momentum, so all
directions get equal updates. It is used for the matrices of the blocks; embeddings, head, adaLN,
norms and biases use AdamW in its Nesterov form. `optim.muon_rms` is the RMS of Muon's update at
learning rate 1. At 0.2, about that of Adam (arXiv:2502.16982 section 2.2), both use the same
learning rate and values tuned for AdamW carry over. Small networks on small data need more.
"""

import re
from typing import NamedTuple

import jax
import optax
from ml_collections import ConfigDict
from optax import contrib

from fsdfm_jax.stages.base import Auxiliary, Stage

# Paths of the matrices that Muon updates, each [N, in, out] with one matrix per block.
_MUON = re.compile(r"(^|/)blocks/(q_proj|k_proj|v_proj|out_proj|mlp_in|mlp_out)/kernel$")
_MUON_MOMENTUM = 0.95


def make_optimizer(optim: ConfigDict, stage: ConfigDict) -> optax.GradientTransformation:
    """Make AdamW (default values from arXiv:2509.20624 App. B) or Muon.

    Args:
      optim: `config.optim` (name, betas, eps, weight decay, clipping, dtype of the first moment).
        The second moment stays float32: with a decay near 1 its changes are below the precision of
        bfloat16. Muon has no second moment, and a fixed momentum instead of the betas.
      stage: the stage's config (`num_steps`, `learning_rate`, `warmup_steps`, `decay_steps`,
        `final_lr_fraction`).

    Raises:
      ValueError: if warm-up and decay are longer than the stage.
    """
    if not 0 <= stage.warmup_steps <= stage.num_steps:
        raise ValueError(
            f"warmup_steps must be between 0 and num_steps={stage.num_steps}, "
            f"got {stage.warmup_steps}."
        )
    if not 0 <= stage.decay_steps <= stage.num_steps - stage.warmup_steps:
        raise ValueError(
            f"decay_steps must be between 0 and num_steps - warmup_steps = {stage.num_steps} - "
            f"{stage.warmup_steps}, got {stage.decay_steps}."
        )
    # The state tree is the same without clipping, so clipping can be changed on resuming.
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    return optax.chain(
        clip,
        _BY_NAME[optim.name](optim, _learning_rate(stage)),
    )


class Turns(NamedTuple):
    """Training of the second network of a stage.

    Attributes:
      auxiliary: from the stage.
      optimizer: of that network.
    """

    auxiliary: Auxiliary
    optimizer: optax.GradientTransformation


def make_turns(optim: ConfigDict, config: ConfigDict, stage: Stage) -> Turns | None:
    """Make the `Turns` of a stage's second network; None if the stage has none.

    Its learning rate is that of the stage at the same fraction of the training, scaled.

    Args:
      optim: `config.optim`.
      config: the stage's config, as for `make_optimizer`.
      stage: what is trained.
    """
    if (auxiliary := stage.auxiliary) is None:
        return None
    own = config.copy_and_resolve_references()
    for name in ("num_steps", "warmup_steps", "decay_steps"):
        own[name] *= auxiliary.updates
    own.learning_rate *= auxiliary.learning_rate
    return Turns(auxiliary, make_optimizer(optim, own))


def _learning_rate(stage: ConfigDict) -> optax.Schedule:
    """Linear warm-up, then cosine decay, or constant with a linear decay over `decay_steps`."""
    peak, final, warmup = stage.learning_rate, stage.final_lr_fraction, stage.warmup_steps
    # Omit pieces of length 0, for which optax logs a warning.
    starts, pieces = [], []
    if warmup:
        pieces.append(optax.schedules.linear_schedule(0.0, peak, warmup))
        starts.append(warmup)
    if stage.decay_steps:
        pieces.append(optax.schedules.constant_schedule(peak))
        starts.append(stage.num_steps - stage.decay_steps)
        pieces.append(optax.schedules.linear_schedule(peak, peak * final, stage.decay_steps))
    else:
        length = max(stage.num_steps - warmup, 1)
        pieces.append(optax.schedules.cosine_decay_schedule(peak, length, alpha=final))
    return optax.schedules.join_schedules(pieces, starts)


def _adamw(optim: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mu_dtype=optim.moment_dtype,
    )


def _muon(optim: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    return contrib.muon(
        learning_rate,
        beta=_MUON_MOMENTUM,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mu_dtype=optim.moment_dtype,
        adam_b1=optim.b1,
        adam_b2=optim.b2,
        adam_weight_decay=optim.weight_decay,
        muon_weight_dimension_numbers=_matrices,
        consistent_rms=optim.muon_rms,
    )


_BY_NAME = {"adamw": _adamw, "muon": _muon}


def _matrices(params):
    """Return the matrix axes of each parameter; None for those that AdamW updates."""

    def one(path, leaf):
        del leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return contrib.MuonDimensionNumbers(1, 2) if _MUON.search(name) else None

    return jax.tree_util.tree_map_with_path(one, params)
