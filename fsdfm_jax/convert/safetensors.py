"""Models as safetensors: one self-contained file, or a folder of shards with a config.json.

    model.safetensors                                  everything; config, tokenizer as metadata
    FOLDER/model.safetensors, config.json, tokenizer.json
    FOLDER/model-00001-of-00002.safetensors .., model.safetensors.index.json, config.json, ..

Names depend on the layout:

    ours      paths with "/" ("blocks/q_proj/kernel"), blocks stacked, kernels [in, out]
    official  names of the published checkpoints ("blocks.0.qw.weight"), kernels [out, in]
    hub       as official, for every network and without the rotary buffer; marked as PyTorch's
              for `transformers`

Each file contains the checksums of its tensors, which are verified on reading.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from fsdfm_jax import io
from fsdfm_jax.convert import official
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference.bundle import BadFile, Bundle, Leaf

LAYOUTS = ("ours", "official")  # of the format "safetensors"
HUB = "hub"
MAX_SHARD_BYTES = 5 * 10**9
SUFFIX = ".safetensors"
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"
# Prefix of n-gram counts in files of the first version; ignored.
_FORMER = "neighbours/"
_FLOATS = {"F32", "BF16", "F16"}


def write_file(path: pathlib.Path, bundle: Bundle, *, layout: str, dtype: str) -> None:
    """Write one self-contained file.

    Args:
      path: the exact path; the caller renames it.
      bundle: the model.
      layout: "ours" | "official" | "hub".
      dtype: of the weights in the file, "float32" | "bfloat16".

    Raises:
      ValueError: for a model above `MAX_SHARD_BYTES`, which needs a folder, or one that the layout
        doesn't support.
    """
    size = sum(_sizes(bundle, layout, dtype).values())
    if size > MAX_SHARD_BYTES:
        raise ValueError(
            f"The weights take {size / 1e9:.1f} GB, more than the limit of "
            f"{MAX_SHARD_BYTES / 1e9:.0f} GB per file; use a folder (--to=safetensors)."
        )
    metadata = {"fsdfm_jax": json.dumps(bundle_lib.describe(bundle))}
    if bundle.tokenizer is not None:
        metadata["tokenizer"] = bundle.tokenizer.to_json()
    _write_shard(path, _stream(bundle, layout, dtype), metadata)


def write_folder(folder: pathlib.Path, bundle: Bundle, *, layout: str, dtype: str) -> None:
    """Write a folder, with equal shards if one file would exceed `MAX_SHARD_BYTES`.

    The tensors of one shard are in memory at a time. Arguments and errors as in `write_file`.
    """
    total = sum(_sizes(bundle, layout, dtype).values())
    count = -(-total // MAX_SHARD_BYTES)
    description = bundle_lib.describe(bundle)
    metadata = {"fsdfm_jax": json.dumps(description)} | ({"format": "pt"} if layout == HUB else {})
    folder.mkdir(parents=True)
    stream = _stream(bundle, layout, dtype)
    if count == 1:
        _write_shard(folder / f"model{SUFFIX}", stream, metadata)
    else:
        _write_shards(folder, stream, metadata, total=total, count=count)
    io.write_json(folder / _CONFIG, description)
    if bundle.tokenizer is not None:
        bundle.tokenizer.save(folder / _TOKENIZER)


def _write_shards(folder, stream, metadata: Mapping[str, str], *, total: int, count: int) -> None:
    """Divide the stream into shards; rename at the end, because names contain the total count."""
    files: list[tuple[pathlib.Path, list[str]]] = []
    shard: dict[str, np.ndarray] = {}

    def flush():
        path = folder / f"model-{len(files) + 1:05d}.partial"
        names = list(shard)
        _write_shard(path, iter(list(shard.items())), metadata)
        files.append((path, names))
        shard.clear()

    held = 0
    for name, array in stream:
        if shard and held + array.nbytes > max(total / count, MAX_SHARD_BYTES / 2):
            flush()
            held = 0
        shard[name] = array
        held += array.nbytes
        del array
    flush()
    weight_map = {}
    for i, (path, names) in enumerate(files):
        target = folder / f"model-{i + 1:05d}-of-{len(files):05d}{SUFFIX}"
        os.replace(path, target)
        weight_map |= {name: target.name for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    io.write_json(folder / _INDEX, index)


def _sizes(bundle: Bundle, layout: str, dtype: str) -> dict[str, int]:
    """Bytes of each tensor of `_stream`."""
    if layout not in (*LAYOUTS, HUB):
        raise ValueError(f"Unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}.")
    if dtype not in bundle_lib.DTYPES:
        raise ValueError(f"Unknown dtype {dtype!r}; expected one of {', '.join(bundle_lib.DTYPES)}")
    shapes = {path: leaf.shape for path, leaf in bundle.leaves.items()}
    if layout == "official":
        official.check_layout(bundle.model)
    if layout != "ours":
        shapes = dict(official.state_shapes(bundle))
    if layout == HUB:
        del shapes[official.BUFFER]
    each = bundle_lib.DTYPES[dtype].itemsize
    return {name: int(np.prod(shape)) * each for name, shape in shapes.items()}


def _stream(bundle: Bundle, layout: str, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    if layout != "ours":
        state = official.stream(bundle, dtype)
        yield from (item for item in state if layout != HUB or item[0] != official.BUFFER)
        return
    for path, array in bundle.arrays():
        yield path, array.astype(bundle_lib.DTYPES[dtype], copy=False)


def _write_shard(path: pathlib.Path, stream, about: Mapping[str, str]) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in stream}
    checksums = {name: bundle_lib.checksum(array) for name, array in arrays.items()}
    metadata = dict(about) | {"checksums": json.dumps(checksums)}
    metadata["checksum"] = _metadata_checksum(metadata)
    try:
        path.touch()
        usual_rights = path.stat().st_mode
        safetensors.numpy.save_file(arrays, path, metadata=metadata)
        path.chmod(usual_rights)  # the library makes files that only the owner can read
    except safetensors.SafetensorError as error:  # raised on a full disk
        path.unlink(missing_ok=True)
        raise OSError(
            f"{path} can't be written: {bundle_lib.first_line(error)}; free space or make its "
            "folder writable"
        ) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _metadata_checksum(metadata: Mapping[str, str]) -> str:
    texts = {name: text for name, text in metadata.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------- reading


def is_safetensors(path: pathlib.Path) -> bool:
    """Return whether a file looks like safetensors, or a folder has such files."""
    if path.is_dir():
        return any(path.glob(f"*{SUFFIX}"))
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(9)
    return path.suffix.lower() == SUFFIX or (
        len(head) == 9 and head[8:] == b"{" and not any(head[4:8])
    )


def read(path: pathlib.Path) -> tuple[dict[str, Leaf], dict[str, Any] | None, str]:
    """Open a file or folder: unread tensors, and our description and tokenizer if present.

    Returns:
      (name -> tensor, output of `bundle.describe` or None, tokenizer.json or "").

    Raises:
      BadFile: damaged, incomplete or malicious.
    """
    files = _files(path)
    tensors: dict[str, Leaf] = {}
    description, tokenizer = None, ""
    for file in files:
        shard, metadata = _open(file)
        if twice := sorted(set(shard) & set(tensors)):
            raise BadFile(f"{file}: {twice[0][:80]!r} is also in another shard.")
        tensors |= shard if "fsdfm_jax" in metadata else official.plain_names(shard, str(file))
        if "fsdfm_jax" in metadata:
            description = bundle_lib.parse_json(metadata["fsdfm_jax"], f"the metadata of {file}")
        tokenizer = metadata.get("tokenizer", "") or tokenizer
    beside = path / _CONFIG
    if path.is_dir() and beside.is_file():
        read_config = bundle_lib.parse_json(bundle_lib.read_text(beside), str(beside))
        if description is None and "fsdfm_jax" in read_config:
            description = read_config
    if path.is_dir() and (path / _TOKENIZER).is_file():
        tokenizer = bundle_lib.read_text(path / _TOKENIZER)
    return tensors, description, tokenizer


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        return [path]
    index = path / _INDEX
    if not index.is_file():
        files = sorted(path.glob(f"*{SUFFIX}"))
        if len(files) > 1:
            raise BadFile(
                f"{path} has {len(files)} safetensors files but no {_INDEX}; give one of them."
            )
        return files
    weight_map = bundle_lib.parse_json(bundle_lib.read_text(index), str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile(f"{index} has no weight_map from tensor names to files.")
    names = set(weight_map.values()) if all(map(_is_name, weight_map.values())) else {None}
    if None in names:
        raise BadFile(f"{index} names files outside its folder; expected plain file names.")
    missing = sorted(name for name in names if not (path / name).is_file())
    if missing:
        raise BadFile(f"{path} is incomplete: {', '.join(missing)[:500]} missing.")
    return [path / name for name in sorted(names)]


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name == os.path.basename(name) and name.endswith(SUFFIX)


def _open(path: pathlib.Path) -> tuple[dict[str, Leaf], Mapping[str, str]]:
    try:
        with _reader(path) as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            specs = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # the library raises several types
        raise BadFile(f"{path} isn't a safetensors file: {str(error)[:300]}") from error
    former = [name for name in specs if name.startswith(_FORMER)]
    if wrong := [
        f"{n[:80]}: {d}" for n, (_, d) in specs.items() if d not in _FLOATS and n not in former
    ]:
        raise BadFile(f"{path} has tensors that aren't weights ({', '.join(wrong[:20])}).")
    if "fsdfm_jax" in metadata and metadata.get("checksum") != _metadata_checksum(metadata):
        raise BadFile(f"{path} is damaged (the checksum of its metadata differs); copy it again.")
    checksums = bundle_lib.parse_json(metadata.get("checksums", "{}"), f"the metadata of {path}")
    if "checksums" in metadata and set(checksums) != set(specs):
        raise BadFile(f"{path}: its checksums are of other tensors.")
    if former:
        logging.warning(
            "%s has n-gram counts from an earlier version (neighbours); they are ignored in "
            "sampling.",
            path,
        )
    return {
        name: Leaf(shape, lambda name=name: _read(path, name, checksums.get(name)))
        for name, (shape, _) in specs.items()
        if name not in former
    }, metadata


def _reader(path: pathlib.Path):
    # pread: a memory map would count towards our memory, and crash if the file were truncated.
    return safetensors.safe_open(path, framework="np", backend="pread")


def _read(path: pathlib.Path, name: str, expected: str | None) -> np.ndarray:
    try:
        with _reader(path) as file:
            array = file.get_tensor(name)
    except Exception as error:
        raise BadFile(f"{path}: {name[:80]} can't be read: {str(error)[:300]}") from error
    if expected is not None and bundle_lib.checksum(array) != expected:
        raise BadFile(
            f"{path}: {name[:80]} is damaged (its checksum differs); copy or convert it again."
        )
    return np.asarray(array, np.float32)
