"""The training stages; see `fsdfm_jax.stages.base`."""

from fsdfm_jax.stages.base import (
    FEW_STEP,
    NAMES,
    Batch,
    Guide,
    Stage,
    make_stage,
    model_config,
    start_fresh,
    start_from_base,
)

__all__ = [
    "FEW_STEP",
    "NAMES",
    "Batch",
    "Guide",
    "Stage",
    "make_stage",
    "model_config",
    "start_fresh",
    "start_from_base",
]
