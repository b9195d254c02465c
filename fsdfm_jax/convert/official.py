"""Conversion from and to the official PyTorch layout: files, state-dict names, [out, in] matrices.

    params, cfg = official.load("checkpoint.pth")
    logits_BLV = models.apply(params, cfg, xt_BL, t_B, h_B)      # h_B ignored by base networks
    official.save("mine.pth", params, cfg)

The names are those of the published checkpoints of arXiv:2509.20624. Here blocks are stacked along
a leading axis; there they are numbered. `rotary_emb.inv_freq` is a buffer determined by the head
width, with no counterpart here. The official layout covers conditioning "none" and "official"
without learned positions or a mark of given tokens. `dt_proj`, `position_embed` and `given_embed`
are our names in the same style for other networks, used in the Hub's files (see hub.py).

PyTorch is not needed, and pickled code is never run (see torch_pickle.py).
"""

import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fsdfm_jax.convert import torch_pickle
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference.bundle import BadFile, Leaf
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params

# Set of weights -> its key in the file.
WHICH = {
    "ema": "student_ema_model",
    "student": "student_model",
    "teacher": "teacher_model",
    "model": "model",
}
DEFAULT_HEAD_WIDTH = 64  # of all published networks

# Our name -> official name of a linear layer or norm; kernels are transposed.
_TOP = {
    "time_embedding/in_proj": "time_embedding.mlp.0",
    "time_embedding/out_proj": "time_embedding.mlp.2",
    "dt_embedding/in_proj": "dt_embedding.mlp.0",
    "dt_embedding/out_proj": "dt_embedding.mlp.2",
    "time_condition_fuser": "time_condition_fuser",
    "dt_proj": "dt_proj",
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
# Parameters that only our layout has.
_OURS = {
    "vocab_embed/positions": "position_embed.weight",
    "vocab_embed/given": "given_embed.weight",
}
_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
BUFFER = "rotary_emb.inv_freq"
# Name parts added by wrappers: DistributedDataParallel, torch.compile, FSDP and activation
# checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_FLOATS = ("float32", "bfloat16", "float16")


# ---------------------------------------------------------------------------------------- files


def load(
    path: str | os.PathLike, which: str = "ema", num_heads: int | None = None
) -> tuple[Params, ModelConfig]:
    """Load weights and network of an official checkpoint.

    Args:
      path: a `.pth` file, or an `.npz` of its state dict (names may start with "sd/").
      which: "ema" (or the only weights of a base run) | "student" | "teacher" | "model".
      num_heads: H; None infers it from the rotary buffer, or uses heads of width 64 without one.

    Returns:
      (parameters as nested dicts of float32 numpy arrays, their network).

    Raises:
      ValueError: the file is damaged, malicious or of another kind, doesn't have the weights, or
        they don't form a network; names each missing, unexpected or misshapen key.
      OSError: the file can't be opened.
    """
    path = pathlib.Path(path).expanduser()
    with StateFile(path) as file:
        tensors, _ = file.state_dict(which)
        cfg = infer_config(tensors, num_heads)
        leaves = to_leaves(tensors, cfg)
        params = {
            name: bundle_lib.check_finite(name, leaf.read(), str(path))
            for name, leaf in leaves.items()
        }
        return bundle_lib.unflatten(params), cfg


def save(
    path: str | os.PathLike,
    params: Params,
    cfg: ModelConfig,
    *,
    step: int = 0,
    dtype: str = "float32",
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write an official checkpoint atomically.

    A base network's weights are under "model". An h-conditioned one's are under "student_ema_model"
    and "student_model" (the same tensors).

    Args:
      path: of the file; replaced if it exists.
      params, cfg: weights and network.
      step: optimiser steps completed.
      dtype: of the weights in the file, "float32" | "bfloat16".
      extra: further strings to store with the weights.

    Raises:
      ValueError: for a network without official layout, or parameters that don't match it.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a file name, X.pth.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        bundle = bundle_lib.from_params(params, cfg)
        write_file(temporary, bundle, step=step, dtype=dtype, extra=extra)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(
    path: pathlib.Path,
    bundle: bundle_lib.Bundle,
    *,
    step: int,
    dtype: str = "float32",
    extra: Mapping[str, str] | None = None,
) -> None:
    """As `save`, for a bundle and exactly this path, with one stacked parameter in memory.

    Raises:
      ValueError: as `save`.
    """
    check_layout(bundle.model)
    pending = {
        name: torch_pickle.Pending(
            name, np.dtype(np.float32) if name == BUFFER else bundle_lib.DTYPES[dtype], shape
        )
        for name, shape in state_shapes(bundle).items()
    }
    groups = ("model",) if bundle.model.conditioning == "none" else (WHICH["ema"], WHICH["student"])
    tree = {group: pending for group in groups} | {"step": step} | dict(extra or {})
    torch_pickle.write(path, tree, stream(bundle, dtype))


class StateFile:
    """An opened `.pth` or `.npz` file with unread state dicts.

    The format is detected from the content. A `.pth` stays open so that its tensors can be read.

    Raises:
      BadFile: it is neither, or damaged.
      OSError: it can't be opened.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._torch = None
        if torch_pickle.is_torch_file(path):
            self._torch = torch_pickle.TorchFile(path)
            self.tree = self._torch.tree
        else:
            self.tree = _open_npz(path)

    def __enter__(self) -> "StateFile":
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._torch is not None:
            self._torch.close()

    def state_dict(self, which: str) -> tuple[dict[str, Leaf], str]:
        """Return the tensors of a state dict, without name prefixes, and the kind of weights.

        Raises:
          BadFile: there is no such state dict, or it has anything but float tensors.
          ValueError: for an unknown `which`.
        """
        if which not in WHICH:
            raise ValueError(f"Unknown which={which!r}; expected one of {', '.join(WHICH)}.")
        tree = _unwrapped(self.tree)
        if not isinstance(tree, dict):
            raise BadFile(f"{self.path} has a {type(tree).__name__}, expected a dict of weights.")
        if any(_plain_name(name) == "vocab_embed.weight" for name in tree):
            present = {"model": tree}  # a bare state dict
        else:
            present = {name: tree[key] for name, key in WHICH.items() if key in tree}
        found, usual = which, [name for name in present if name != "teacher"]
        if which == "ema" and which not in present and len(usual) == 1:
            found = usual[0]  # a base run has no EMA
        if found not in present:
            has = ", ".join(f"{name!r}" for name in present) or "no known ones"
            keys = ", ".join(str(key)[:40] for key in list(tree)[:10])
            raise BadFile(
                f"{self.path} has no weights {which!r} (key {WHICH[which]!r}); it has {has} "
                f"(keys: {keys}). Select with `which`."
            )
        state = _unwrapped(present[found])
        if not isinstance(state, dict):
            raise BadFile(f"{self.path}: the weights {found!r} aren't a dict of tensors.")
        return self._tensors(state), found

    def _tensors(self, state: dict) -> dict[str, Leaf]:
        tensors: dict[str, Leaf] = {}
        problems = []
        for name, value in state.items():
            plain = _plain_name(name)
            if isinstance(value, torch_pickle.TorchTensor):
                dtype = value.dtype
                leaf = Leaf(value.shape, lambda value=value: self._torch.read(value))
            elif isinstance(value, _NpzLeaf):
                dtype, leaf = value.dtype, Leaf(value.shape, value.read)
            else:
                problems.append(f"{str(name)[:80]}: a {type(value).__name__}, expected a tensor")
                continue
            if dtype.name not in _FLOATS:
                problems.append(f"{plain[:80]}: {dtype.name}, expected {' or '.join(_FLOATS)}")
            if plain in tensors:
                problems.append(f"{plain[:80]}: occurs twice, with different prefixes")
            tensors[plain] = leaf
        if problems:
            raise BadFile(
                f"{self.path} isn't a state dict of weights: {bundle_lib.listed(problems)}"
            )
        return tensors

    @property
    def step(self) -> int | None:
        """Optimiser steps, or None if not recorded."""
        step = self.tree.get("step") if isinstance(self.tree, dict) else None
        return step if isinstance(step, int) and not isinstance(step, bool) else None


def _unwrapped(tree: Any) -> Any:
    """Unwrap "state_dict", where some trainers store the weights."""
    while isinstance(tree, dict) and not tree.keys() & WHICH.values() and "state_dict" in tree:
        tree = tree["state_dict"]
    return tree


def plain_names(tensors: Mapping[str, Leaf], name: str) -> dict[str, Leaf]:
    """Remove the prefixes of wrappers from tensor names; `name` is the file.

    Raises:
      BadFile: naming a tensor that occurs twice.
    """
    plain: dict[str, Leaf] = {}
    for wrapped, leaf in tensors.items():
        if (short := _plain_name(wrapped)) in plain:
            raise BadFile(f"{name}: {short[:80]} occurs twice, with different prefixes.")
        plain[short] = leaf
    return plain


def _plain_name(name: Any) -> str:
    return ".".join(part for part in str(name).split(".") if part not in _WRAPPERS)


class _NpzLeaf:
    """One array of an `.npz`."""

    def __init__(self, array: np.ndarray):
        self.dtype, self.shape, self.read = array.dtype, array.shape, lambda: array


def _open_npz(path: pathlib.Path) -> dict[str, Any]:
    """Read the arrays under "sd/", or all of them; such files are small."""
    with open(path, "rb") as opened:  # errors below this line are due to the content
        try:
            arrays = _read_arrays(opened)
        except Exception as error:  # zipfile and numpy raise many types for damaged files
            raise BadFile(
                f"{path} is neither a readable PyTorch checkpoint nor an .npz of one "
                f"({str(error)[:200]}); python -m fsdfm_jax.convert reads the other formats."
            ) from error
    return {name: _NpzLeaf(array) for name, array in arrays.items()}


_MOST_NPZ = 2**31


def _read_arrays(opened) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(opened) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if sum(info.file_size for info in members.values()) > _MOST_NPZ:
            raise ValueError(f"more than {_MOST_NPZ} bytes of arrays")
        wanted = {name for name in members if name.startswith("sd/")} or set(members)
        arrays = {}
        for name in sorted(wanted):
            with archive.open(members[name]) as file:
                arrays[name.removeprefix("sd/")] = _read_npy(file)
    return arrays


def _read_npy(file) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, column_major, dtype = read_header(file)
    content = file.read()
    if dtype.hasobject or len(content) != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise ValueError("an array's header doesn't match its size")
    array = np.frombuffer(content, dtype)
    return array.reshape(shape[::-1]).T if column_major else array.reshape(shape)


# ---------------------------------------------------------------------------------------- networks


def infer_config(tensors: Mapping[str, Leaf], num_heads: int | None = None) -> ModelConfig:
    """Infer the network of a state dict from its shapes.

    Args:
      tensors: official name -> tensor, without prefixes.
      num_heads: H, if the file doesn't determine it; see `load`.

    Raises:
      ValueError: naming tensors that are missing or have the wrong rank, or an invalid number of
        heads.
    """
    needed = {"vocab_embed.weight": 2, "time_embedding.mlp.0.weight": 2, "blocks.0.mlp.0.weight": 2}
    problems = [
        f"{name}: missing"
        if name not in tensors
        else f"{name}: shape {tensors[name].shape}, expected {rank} axes"
        for name, rank in needed.items()
        if name not in tensors or len(tensors[name].shape) != rank
    ]
    if problems:
        found = ", ".join(name[:60] for name in list(tensors)[:5]) or "nothing"
        raise BadFile(
            f"This isn't an official state dict: {bundle_lib.listed(problems)}; it has {found}."
        )
    vocab_size, width = tensors["vocab_embed.weight"].shape
    cond_width = tensors["time_embedding.mlp.0.weight"].shape[0]
    hidden = tensors["blocks.0.mlp.0.weight"].shape[0]
    if not width or hidden % width or not hidden:
        raise BadFile(
            f"blocks.0.mlp.0.weight: {hidden} rows, expected a multiple of the width {width}."
        )
    blocks = {match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    conditioned = any(name.startswith("dt_embedding.") for name in tensors)
    try:
        return ModelConfig(
            vocab_size=vocab_size,
            width=width,
            num_blocks=len(blocks),
            num_heads=_heads(tensors, width, num_heads),
            cond_width=cond_width,
            mlp_ratio=hidden // width,
            conditioning="official" if conditioned else "none",
        )
    except ValueError as error:
        raise BadFile(f"The state dict doesn't form a network: {error}") from None


def _heads(tensors: Mapping[str, Leaf], width: int, num_heads: int | None) -> int:
    if num_heads is not None and not isinstance(num_heads, int):
        raise ValueError(f"num_heads must be an int or None, got {num_heads!r}.")
    if num_heads is not None and (num_heads < 1 or width % num_heads):
        raise BadFile(f"num_heads={num_heads} doesn't divide the width {width}.")
    buffer = tensors.get(BUFFER)
    if buffer is not None:
        head_width = 2 * buffer.shape[0] if len(buffer.shape) == 1 else 0
        if not head_width or width % head_width:
            raise BadFile(
                f"{BUFFER}: shape {buffer.shape}, expected half a head's width, a divisor of "
                f"the width {width}."
            )
        if num_heads is not None and num_heads != width // head_width:
            raise BadFile(
                f"num_heads={num_heads}, but {BUFFER} has {buffer.shape[0]} frequencies, for "
                f"{width // head_width} heads; omit num_heads."
            )
        return width // head_width
    if num_heads is not None:
        return num_heads
    if width % DEFAULT_HEAD_WIDTH:
        raise BadFile(
            f"The state dict doesn't determine the number of heads, and its width {width} doesn't "
            f"divide into heads of {DEFAULT_HEAD_WIDTH}; give num_heads."
        )
    return width // DEFAULT_HEAD_WIDTH


# ---------------------------------------------------------------------------------------- layout


def _official_name(path: str) -> tuple[str, bool]:
    """Official name of our parameter ({} for the block index), and whether to transpose it."""
    if path in _OURS:
        return _OURS[path], False
    group, leaf = path.rsplit("/", 1)
    suffix = _LEAF[leaf]
    if group == "vocab_embed":
        return f"vocab_embed.{suffix}", False
    if group.startswith("blocks/"):
        return f"blocks.{{}}.{_BLOCK[group.removeprefix('blocks/')]}.{suffix}", leaf == "kernel"
    return f"{_TOP[group]}.{suffix}", leaf == "kernel"


def to_leaves(tensors: Mapping[str, Leaf], cfg: ModelConfig) -> dict[str, Leaf]:
    """Our parameters, stacked and transposed from an official state dict on reading.

    Args:
      tensors: official name -> tensor, without prefixes.
      cfg: their network.

    Raises:
      ValueError: naming every missing, unexpected or misshapen key.
    """
    problems, used, leaves = [], {BUFFER}, {}
    for path, shape in bundle_lib.expected_shapes(cfg).items():
        name, transpose = _official_name(path)
        stacked = "{}" in name
        names = [name.format(i) for i in range(shape[0])] if stacked else [name]
        expected = shape[1:] if stacked else shape
        expected = expected[::-1] if transpose else expected
        used.update(names)
        for one in names:
            if one not in tensors:
                problems.append(f"{one}: missing")
            elif tuple(tensors[one].shape) != expected:
                problems.append(f"{one}: shape {tuple(tensors[one].shape)}, expected {expected}")
        parts = [tensors.get(one) for one in names]
        leaves[path] = Leaf(shape, lambda p=parts, s=shape, t=transpose: _stack(p, s, t))
    problems += [f"{name[:80]}: unexpected" for name in sorted(set(tensors) - used)]
    problems += _buffer_problems(tensors, cfg)
    if problems:
        raise BadFile("The state dict doesn't match the network: " + bundle_lib.listed(problems))
    return leaves


def _buffer_problems(tensors: Mapping[str, Leaf], cfg: ModelConfig) -> list[str]:
    """Check that the file's rotary frequencies, if any, equal ours: they aren't parameters here."""
    buffer, expected = tensors.get(BUFFER), _frequencies(cfg.head_width)
    if buffer is None:
        return []
    if tuple(buffer.shape) != expected.shape:
        return [f"{BUFFER}: shape {tuple(buffer.shape)}, expected {expected.shape}"]
    # Tolerance for a buffer stored in bfloat16.
    if not np.allclose(np.asarray(buffer.read(), np.float32), expected, rtol=1e-2, atol=0):
        return [f"{BUFFER}: other frequencies than 10000^(-2i/{cfg.head_width})"]
    return []


def _frequencies(head_width: int) -> np.ndarray:
    """`rotary_emb.inv_freq`, float32; the power is rounded from float64, as in the original."""
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    powers = (10_000.0 ** exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1.0) / powers


def _stack(parts: list[Leaf], shape: tuple[int, ...], transpose: bool) -> np.ndarray:
    out = np.empty(shape, np.float32)
    rows = out if len(shape) > len(parts[0].shape) else out[None]
    for row, part in zip(rows, parts, strict=True):
        array = np.asarray(part.read())
        row[...] = array.T if transpose else array
    return out


def from_state_dict(state: Mapping[str, np.ndarray], cfg: ModelConfig) -> Params:
    """Convert an official state dict in memory to our parameters, float32; see `to_leaves`."""
    tensors = {
        name: Leaf(np.shape(array), lambda array=array: np.asarray(array, np.float32))
        for name, array in state.items()
    }
    leaves = to_leaves(tensors, cfg)
    return bundle_lib.unflatten({path: leaf.read() for path, leaf in leaves.items()})


def state_shapes(bundle: bundle_lib.Bundle) -> dict[str, tuple[int, ...]]:
    """Official name -> shape, for a network's state dict in the official order.

    Raises:
      ValueError: for parameters that don't match the network.
    """
    cfg = bundle.model
    expected = bundle_lib.expected_shapes(cfg)
    found = {path: tuple(leaf.shape) for path, leaf in bundle.leaves.items()}
    if found != expected:
        wrong = sorted(path for path, _ in found.items() ^ expected.items())
        raise ValueError("The parameters don't match the network: " + bundle_lib.listed(wrong))
    shapes = {}
    for path, shape in expected.items():
        name, transpose = _official_name(path)
        stacked = "{}" in name
        one = shape[1:] if stacked else shape
        one = one[::-1] if transpose else one
        shapes |= {name.format(i): one for i in range(shape[0] if stacked else 1)}
    shapes[BUFFER] = (cfg.head_width // 2,)
    return {name: shapes[name] for name in sorted(shapes, key=_official_order)}


def _official_order(name: str) -> tuple:
    head, _, rest = name.partition(".")
    groups = ("vocab_embed", "position_embed", "given_embed", "time_embedding", "dt_embedding")
    groups += ("time_condition_fuser", "dt_proj", "rotary_emb", "blocks", "output_layer")
    number, _, rest = rest.partition(".") if head == "blocks" else ("0", "", rest)
    return groups.index(head), int(number), rest


def stream(bundle: bundle_lib.Bundle, dtype: str = "float32") -> Iterator[tuple[str, np.ndarray]]:
    """Yield (official name, array) of a bundle's state dict, with one stacked parameter in memory.

    Weights have `dtype`; the rotary buffer is float32.
    """
    for path, array in bundle.arrays():
        name, transpose = _official_name(path)
        rows = enumerate(array) if "{}" in name else [(0, array)]
        for i, one in rows:
            one = np.ascontiguousarray(one.T if transpose else one)
            yield name.format(i), one.astype(bundle_lib.DTYPES[dtype], copy=False)
        del array, rows, one  # free them before reading the next parameter
    yield BUFFER, _frequencies(bundle.model.head_width)


def to_state_dict(params: Params, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Convert our parameters to an official state dict (numpy, float32, with the rotary buffer).

    Raises:
      ValueError: for a network without official layout, see `check_layout`.
    """
    check_layout(cfg)
    bundle = bundle_lib.from_params(params, cfg)
    names = state_shapes(bundle)
    state = dict(stream(bundle))
    return {name: state[name] for name in names}


def check_layout(cfg: ModelConfig) -> None:
    """Raise ValueError for a network without official layout."""
    what = {
        "autoregressive networks": cfg.causal,
        "positions='learned'": cfg.positions == "learned",
        "given='marked'": cfg.given == "marked",
        "conditioning='additive'": cfg.conditioning == "additive",
    }
    if found := [name for name, is_so in what.items() if is_so]:
        raise ValueError(
            f"The official layout doesn't support {' and '.join(found)}; convert to safetensors "
            "or orbax with our names, or to the Hub's layout (--to=hub). (It supports "
            "model.conditioning='official', model.positions='rotary' and model.given='unmarked'.)"
        )
