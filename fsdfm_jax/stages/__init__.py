"""The training stages; see `fsdfm_jax.stages.base`."""

from fsdfm_jax.stages.base import (
    BASE,
    FEW_STEP,
    NAMES,
    Auxiliary,
    Batch,
    Frozen,
    Stage,
    make_stage,
    model_config,
    start_fresh,
    start_from_base,
)

__all__ = [
    "BASE",
    "FEW_STEP",
    "NAMES",
    "Auxiliary",
    "Batch",
    "Frozen",
    "Stage",
    "make_stage",
    "model_config",
    "start_fresh",
    "start_from_base",
]
