"""The optimiser as an optax chain: clipping, then AdamW on a warm-up and cosine schedule."""

import optax
from ml_collections import ConfigDict


def make_optimizer(optim: ConfigDict, stage: ConfigDict) -> optax.GradientTransformation:
    """AdamW with the values of arXiv:2509.20624 App. B where the config keeps them.

    Args:
      optim: `config.optim` (betas, eps, weight decay, clipping, dtype of the first moment). The
        second moment stays float32: at a decay near 1 its changes are below what bfloat16 holds.
      stage: the stage's config (`num_steps`, `learning_rate`, `warmup_steps`, `final_lr_fraction`).

    Raises:
      ValueError: if the warm-up is longer than the stage, the stage has no step, or the dtype is
        another.
    """
    if optim.moment_dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"Unknown optim.moment_dtype={optim.moment_dtype!r}; expected float32 or bfloat16."
        )
    if stage.num_steps < 1:
        raise ValueError(f"A stage needs num_steps >= 1, got {stage.num_steps}.")
    if not 0 <= stage.warmup_steps <= stage.num_steps:
        raise ValueError(
            f"warmup_steps must lie between 0 and num_steps={stage.num_steps}, "
            f"got {stage.warmup_steps}."
        )
    learning_rate = optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0 if stage.warmup_steps else stage.learning_rate,
        peak_value=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
        # optax divides by decay_steps - warmup_steps.
        decay_steps=max(stage.num_steps, stage.warmup_steps + 1),
        end_value=stage.learning_rate * stage.final_lr_fraction,
    )
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.adamw(
            learning_rate,
            b1=optim.b1,
            b2=optim.b2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            mu_dtype=optim.moment_dtype,
        ),
    )
