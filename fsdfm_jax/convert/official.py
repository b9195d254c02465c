"""The official PyTorch layout: state-dict names and [out, in] matrices to and from ours.

The names are those of the published checkpoints of arXiv:2509.20624. Blocks are stacked along a
leading axis here and numbered there; `rotary_emb.inv_freq` is a buffer that follows from the head
width and has no counterpart. Only conditioning "none" and "official" have an official layout.
"""

from collections.abc import Mapping

import jax
import numpy as np

from fsdfm_jax import models
from fsdfm_jax.models import ModelConfig, Params

# Ours -> official, of one linear or norm; kernels are transposed.
_TOP = {
    "time_embedding/in_proj": "time_embedding.mlp.0",
    "time_embedding/out_proj": "time_embedding.mlp.2",
    "dt_embedding/in_proj": "dt_embedding.mlp.0",
    "dt_embedding/out_proj": "dt_embedding.mlp.2",
    "time_condition_fuser": "time_condition_fuser",
    "final_norm/LayerNorm_0": "output_layer.norm_final",
    "final_adaln/condition_fuser": "output_layer.condition_fuser",
    "final_adaln/modulation": "output_layer.adaLN_modulation",
    "head": "output_layer.linear",
}
_BLOCK = {
    "norm1/LayerNorm_0": "norm1",
    "norm2/LayerNorm_0": "norm2",
    "q_proj": "qw",
    "k_proj": "kw",
    "v_proj": "vw",
    "out_proj": "attn_out",
    "mlp_in": "mlp.0",
    "mlp_out": "mlp.2",
    "adaln/condition_fuser": "condition_fuser",
    "adaln/modulation": "adaLN_modulation",
}
_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def _flatten(tree: Mapping, prefix: str = "") -> dict[str, np.ndarray]:
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        flat |= _flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def _official_name(path: str) -> tuple[str, bool]:
    """Official name of our parameter ({} for the block number); whether to transpose it."""
    group, leaf = path.rsplit("/", 1)
    suffix = _LEAF[leaf]
    if group == "vocab_embed":
        return f"vocab_embed.{suffix}", False
    if group.startswith("blocks/"):
        return f"blocks.{{}}.{_BLOCK[group.removeprefix('blocks/')]}.{suffix}", leaf == "kernel"
    return f"{_TOP[group]}.{suffix}", leaf == "kernel"


def from_state_dict(state: Mapping[str, np.ndarray], cfg: ModelConfig) -> Params:
    """Our parameters out of an official state dict.

    Args:
      state: official name -> array, prefixes already removed.
      cfg: the network they are for.

    Returns:
      Parameters as float32 numpy arrays.

    Raises:
      ValueError: naming every missing, unexpected or misshapen key; for additive conditioning and
        causal networks, which have no official layout.
    """
    _check_layout(cfg)
    shapes = jax.eval_shape(lambda key: models.init_params(key, cfg), jax.random.key(0))
    problems, used, flat = [], {"rotary_emb.inv_freq"}, {}
    for path, shape in _flatten(shapes).items():
        name, transpose = _official_name(path)
        stacked = "{}" in name
        names = [name.format(i) for i in range(shape.shape[0])] if stacked else [name]
        expected = shape.shape[1:] if stacked else shape.shape
        used.update(names)
        arrays = []
        for one in names:
            if one not in state:
                problems.append(f"{one}: missing")
                continue
            array = np.asarray(state[one], np.float32)
            array = array.T if transpose else array
            if array.shape != expected:
                flip = reversed if transpose else tuple
                problems.append(
                    f"{one}: shape {tuple(flip(array.shape))}, expected {tuple(flip(expected))}"
                )
            arrays.append(array)
        if not problems:
            flat[path] = np.stack(arrays) if stacked else arrays[0]
    problems += [f"{name}: unexpected" for name in sorted(set(state) - used)]
    if problems:
        raise ValueError("The state dict doesn't fit the network: " + "; ".join(problems))
    return _unflatten(flat)


def to_state_dict(params: Params, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Official state dict (numpy, float32, `rotary_emb.inv_freq` included) out of our parameters.

    Raises:
      ValueError: for additive conditioning and causal networks, which have no official layout.
    """
    _check_layout(cfg)
    state = {}
    for path, value in _flatten(params).items():
        name, transpose = _official_name(path)
        array = np.asarray(value, np.float32)
        rows = enumerate(array) if "{}" in name else [(0, array)]
        for i, one in rows:
            state[name.format(i)] = np.ascontiguousarray(one.T if transpose else one)
    exponents = np.arange(0, cfg.head_width, 2, dtype=np.float32) / cfg.head_width
    state["rotary_emb.inv_freq"] = (1.0 / 10_000.0**exponents).astype(np.float32)
    return state


def _check_layout(cfg: ModelConfig) -> None:
    if cfg.conditioning == "additive" or cfg.causal:
        what = "autoregressive networks" if cfg.causal else "conditioning='additive'"
        raise ValueError(
            f"The official layout has no place for {what}; use model.conditioning='official'."
        )


def _unflatten(flat: Mapping[str, np.ndarray]) -> Params:
    tree: Params = {}
    for path, value in flat.items():
        *groups, leaf = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree
