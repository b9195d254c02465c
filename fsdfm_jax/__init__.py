"""Few-step discrete flow-matching language models in JAX/Flax.

    import fsdfm_jax as fs

    model = fs.load()                                  # the bundled model; or any file or folder
    texts = fs.generate(model, prompt="My fellow citizens", sampling=fs.Sampling(steps=8))
    fs.save(model, "model.safetensors")
    fs.export(model, "exported", steps=(1, 8))         # runs without this package installed

    process = fs.Process(fs.Polynomial(), fs.Source(vocab_size=V))
    x1_BL = fs.sample(key, denoise, process.make_jump(fs.MIXTURE), process.finalize, x0_BL,
                      fs.uniform_grid(8))

The names below are imported on first use.

Dimension letters, used as suffixes of array names throughout (`logits_BLV`):

  B batch rows            L positions of a text block      V vocabulary, including a mask token
  D residual width        H attention heads                K head width
  F hidden width of MLP   C conditioning width             N transformer blocks, or samples
  S sampling steps        R rows of one part of a batch

Time runs from t=0 (noise) to t=1 (data); h is the width of a step. Schedules, rates, softmax and
losses are float32 for any dtype of the network.

References are to FS-DFM (arXiv:2509.20624) and Discrete Flow Matching (arXiv:2407.15595).
"""

import importlib
from typing import Any

__version__ = "0.2.0"

# Public name -> module.
_PUBLIC = {
    # whole models
    "load": "library",
    "save": "library",
    "save_pretrained": "library",
    "export": "library",
    "generate": "inference.job",
    "train": "library",
    "Bundle": "inference.bundle",
    # sampling
    "Sampling": "flow.sampling",
    "annealed": "flow.sampling",
    "midpoint": "flow.sampling",
    "nucleus": "flow.sampling",
    "sample": "flow.sampler",
    "sample_trajectory": "flow.sampler",
    "uniform_grid": "flow.grids",
    "make_grid": "flow.grids",
    # the process
    "Process": "flow.process",
    "Source": "flow.sources",
    "Polynomial": "flow.schedules",
    "Cosine": "flow.schedules",
    "rate": "flow.schedules",
    "cumulative_rate": "flow.schedules",
    "redraw_fraction": "flow.schedules",
    "CUMULATIVE": "flow.jumps",
    "EULER": "flow.jumps",
    "MIXTURE": "flow.jumps",
    "DISPERSED": "flow.jumps",
    "JumpRule": "flow.jumps",
    "with_posterior_end": "flow.jumps",
    # losses and targets
    "path_loss": "flow.losses",
    "cross_entropy": "flow.losses",
    "distillation_loss": "flow.losses",
    "forward_kl": "flow.losses",
    "jensen_shannon": "flow.losses",
    "make_budgets": "flow.budgets",
    "sample_budgets": "flow.budgets",
    "HEUN": "flow.teacher",
    "RK4": "flow.teacher",
    "Quadrature": "flow.teacher",
    "teacher_logits": "flow.teacher",
    # the network
    "ModelConfig": "network.config",
    "init_params": "network.model",
    "apply": "network.model",
    "predict": "network.model",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fsdfm_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fsdfm_jax.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
