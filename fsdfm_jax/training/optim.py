"""The optimiser as an optax chain: clipping, then AdamW or Muon on a schedule with warm-up.

Muon (Jordan et al. 2024, arXiv:2502.16982) moves a matrix by its momentum made orthogonal, so that
all directions move alike. It is for the matrices of the blocks; embeddings, head, adaLN, norms and
biases keep AdamW, in its Nesterov form. `optim.muon_rms` is the size of Muon's update at learning
rate 1: at 0.2, about Adam's (arXiv:2502.16982 section 2.2), both take one learning rate, and those
found for AdamW carry over; small networks on small data want more.
"""

import re
from typing import NamedTuple

import jax
import optax
from ml_collections import ConfigDict
from optax import contrib

from fsdfm_jax.stages.base import Auxiliary, Stage

# Of the matrices that Muon moves, [N, in, out] each: a stack of one matrix a block.
_MUON = re.compile(r"(^|/)blocks/(q_proj|k_proj|v_proj|out_proj|mlp_in|mlp_out)/kernel$")
_MUON_MOMENTUM = 0.95


def make_optimizer(optim: ConfigDict, stage: ConfigDict) -> optax.GradientTransformation:
    """AdamW with the values of arXiv:2509.20624 App. B where the config keeps them, or Muon.

    Args:
      optim: `config.optim` (name, betas, eps, weight decay, clipping, dtype of the first moment).
        The second moment stays float32: at a decay near 1 its changes are below what bfloat16
        holds. Muon has none, and a momentum of its own in place of the betas.
      stage: the stage's config (`num_steps`, `learning_rate`, `warmup_steps`, `decay_steps`,
        `final_lr_fraction`).

    Raises:
      ValueError: if warm-up and decay don't fit into the stage.
    """
    if not 0 <= stage.warmup_steps <= stage.num_steps:
        raise ValueError(
            f"warmup_steps must lie between 0 and num_steps={stage.num_steps}, "
            f"got {stage.warmup_steps}."
        )
    if not 0 <= stage.decay_steps <= stage.num_steps - stage.warmup_steps:
        raise ValueError(
            f"decay_steps must lie between 0 and num_steps - warmup_steps = {stage.num_steps} - "
            f"{stage.warmup_steps}, got {stage.decay_steps}."
        )
    # Without clipping the state is the same tree, so that it can be switched while a run resumes.
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    return optax.chain(
        clip,
        _BY_NAME[optim.name](optim, _learning_rate(stage)),
    )


class Turns(NamedTuple):
    """How the second network of a stage is trained.

    Attributes:
      auxiliary: from the stage.
      optimizer: of that network.
    """

    auxiliary: Auxiliary
    optimizer: optax.GradientTransformation


def make_turns(optim: ConfigDict, config: ConfigDict, stage: Stage) -> Turns | None:
    """The turns of a stage's second network; None where the stage has none.

    Its learning rate is that of the stage, scaled, at the same share of the training.

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
    """Linear warm-up; then half a cosine to the end, or constant and linear over `decay_steps`."""
    peak, final, warmup = stage.learning_rate, stage.final_lr_fraction, stage.warmup_steps
    # Pieces of no length are left out: optax warns of them.
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
    """Which axes of a parameter are those of a matrix, or None where AdamW moves it."""

    def one(path, leaf):
        del leaf
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return contrib.MuonDimensionNumbers(1, 2) if _MUON.search(name) else None

    return jax.tree_util.tree_map_with_path(one, params)
