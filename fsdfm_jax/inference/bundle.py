"""`Bundle`: a stored model, the common representation of all file formats.

Readers make a `Bundle` and writers take one. Parameters are read leaf by leaf: converting a large
model needs memory for one stacked parameter, for one shard if the target is safetensors, and for
one copy of all parameters if it is Orbax.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from fsdfm_jax import io
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params

# Dtypes of weights in files; parameters in memory are float32.
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
DEFAULT_PATH = {"schedule": "polynomial", "power": 1.0, "source": "uniform", "revealed": "stay"}


class BadFile(ValueError):  # noqa: N818 - a state, not an error name
    """A file that is damaged, malicious or not in the format it claims; the message says which."""


class Leaf(NamedTuple):
    """A parameter that hasn't been read from its file yet.

    Attributes:
      shape: of the parameter in our layout.
      read: reads it, float32.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A stored model: returned by `load` and `train`; taken by `save`, `export` and `generate`.

    >>> import fsdfm_jax as fs
    >>> model = fs.load()
    >>> isinstance(model, fs.Bundle), model.path["schedule"]
    (True, 'polynomial')
    >>> model.params()["head"]["bias"].shape == (model.num_tokens,)
    True

    Attributes:
      model: its network.
      leaves: path ("blocks/q_proj/kernel") -> parameter, for all parameters of the network.
      path: the noising process, with the keys of `config.path`.
      tokenizer: None if the file has none and none was given.
      block_length: tokens of a training block, None if unknown.
      provenance: JSON dict: "stage", "weights" (which of the file's), "step", "ema_decay", "data"
        and "tokenizer" (fingerprints), "code_version", "config", "recipe", "source" (file and
        format); None where unknown.
    """

    model: ModelConfig
    leaves: Mapping[str, Leaf]
    path: Mapping[str, Any]
    tokenizer: Tokenizer | None
    block_length: int | None
    provenance: Mapping[str, Any]

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (path, float32 array) of each parameter, read one at a time.

        Raises:
          BadFile: naming the first one with a non-finite value.
        """
        file = (self.provenance.get("source") or {}).get("file", "the model")
        for path, leaf in self.leaves.items():
            yield path, check_finite(path, leaf.read(), file)

    def params(self) -> Params:
        """Read all parameters as nested dicts of float32 numpy arrays."""
        return unflatten(dict(self.arrays()))

    def device_params(self, put: Callable[[str, np.ndarray], jax.Array] | None = None) -> Params:
        """As `params`, on devices; at most one parameter at a time is also in host memory.

        Args:
          put: (path, array) -> array on its device; by default the default device.
        """
        put = put or (lambda path, array: jax.device_put(array))
        return unflatten({path: put(path, array) for path, array in self.arrays()})

    def num_params(self) -> int:
        """Total number of scalars."""
        return sum(int(np.prod(leaf.shape)) for leaf in self.leaves.values())

    @property
    def num_tokens(self) -> int:
        """Number of text ids: the vocabulary without a mask token."""
        return self.model.vocab_size - (self.path["source"] == "mask")

    def sampling(self) -> Sampling:
        """Default sampling settings: those of its config, or the published ones."""
        return read_sampling((self.provenance.get("config") or {}).get("eval") or {})

    def process(self) -> Process:
        """Its noising process over the network's vocabulary."""
        return process_lib.make_process(
            **self.path,
            num_tokens=self.num_tokens,
            eos_id=0 if self.tokenizer is None else self.tokenizer.eos_id,
        )


def check_finite(path: str, array: np.ndarray, name: str) -> np.ndarray:
    """Return the array; BadFile, naming file and parameter, if a value is NaN or infinite."""
    # One pass without a copy: NaN and infinity propagate, and finite values can't overflow float64.
    if not np.isfinite(np.sum(array, dtype=np.float64)):
        bad = int(np.sum(~np.isfinite(array)))
        raise BadFile(
            f"The weights of {name} are damaged: {bad} of the {array.size} values of {path} are "
            "NaN or infinite. Use an earlier checkpoint, or train again."
        )
    return array


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to {"a/b": leaf}, keeping the order."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        flat |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Inverse of `flatten`."""
    tree: Params = {}
    for path, value in flat.items():
        *groups, last = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return tree


def expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of a network, by path."""
    return dict(_expected_shapes(model))


@functools.lru_cache(maxsize=16)
def _expected_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), model))
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def from_params(params: Params, model: ModelConfig, **fields: Any) -> Bundle:
    """Make a bundle of parameters in memory; `fields` are fields of `Bundle`, with defaults."""
    leaves = {
        path: Leaf(tuple(np.shape(array)), functools.partial(np.asarray, array, np.float32))
        for path, array in flatten(params).items()
    }
    defaults: dict[str, Any] = {
        "path": DEFAULT_PATH,
        "tokenizer": None,
        "block_length": None,
        "provenance": {},
    }
    return Bundle(model, leaves, **(defaults | fields))


def checksum(array: np.ndarray) -> str:
    """First 16 hex digits of the sha256 of an array's bytes in row-major order."""
    contiguous = np.ascontiguousarray(array)
    # Arrays are buffers, but numpy's stubs declare it only from Python 3.12 on.
    return hashlib.sha256(contiguous).hexdigest()[:16]  # type: ignore[arg-type]


def content_hash(params: Params) -> str:
    """First 16 hex digits of the sha256 of all parameters with their paths, in order."""
    return combined((path, checksum(array)) for path, array in flatten(params).items())


def combined(checksums: Iterable[tuple[str, str]]) -> str:
    """Compute `content_hash` from the (path, checksum) of each parameter."""
    content = hashlib.sha256()
    for path, each in checksums:
        content.update(f"{path} {each}\n".encode())
    return content.hexdigest()[:16]


# ---------------------------------------------------------------------------------- descriptions

_MOST_JSON = 2**26  # bytes; tokenizers with large vocabularies take a few MB
FORMAT = 1


def describe(bundle: Bundle) -> dict[str, Any]:
    """Describe a bundle, except parameters and tokenizer, as JSON; see `from_parts`."""
    return {
        "fsdfm_jax": FORMAT,
        "model": dataclasses.asdict(bundle.model),
        "path": dict(bundle.path),
        "block_length": bundle.block_length,
        "provenance": dict(bundle.provenance),
    }


def from_parts(
    leaves: Mapping[str, Leaf],
    description: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    name: str,
) -> Bundle:
    """Make a bundle from parameters and the output of `describe`; `name` is the file, for errors.

    Raises:
      BadFile: the description is invalid, or the parameters don't match its network; names each
        missing, unexpected or misshapen one.
    """
    try:
        if description["fsdfm_jax"] != FORMAT:
            raise BadFile(
                f"{name} has format {str(description['fsdfm_jax'])[:40]}, but this version reads "
                f"{FORMAT}; convert it with the version that wrote it."
            )
        model = make_model(description["model"])
        length = description["block_length"]
        if length is not None and (type(length) is not int or not 0 < length < 2**31):
            raise ValueError(f"block_length {str(length)[:40]}")
        path, provenance = dict(description["path"]), dict(description["provenance"])
        if set(path) != set(DEFAULT_PATH):
            raise ValueError(f"path has the keys {', '.join(map(str, path))[:200]}")
        check_provenance(provenance)
        bundle = Bundle(model, dict(leaves), path, tokenizer, length, provenance)
        bundle.process()
    except BadFile:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise BadFile(f"{name} doesn't describe a model: {str(error)[:300]}.") from error
    check_leaves(leaves, model, name)
    trained_with = provenance.get("tokenizer")
    if tokenizer is not None and trained_with not in (None, tokenizer.fingerprint):
        raise BadFile(
            f"{name} was trained with tokenizer {str(trained_with)[:40]}, but the one beside it is "
            f"{tokenizer.fingerprint}: their token ids mean different text."
        )
    return bundle


def check_provenance(provenance: Mapping[str, Any]) -> None:
    """Raise ValueError unless the entries that programs read have the right types."""
    step, config = provenance.get("step"), provenance.get("config")
    if step is not None and (type(step) is not int or not 0 <= step < 2**53):
        raise ValueError(f"provenance.step is {str(step)[:40]!r}")
    for name in ("run", "stage", "weights", "tokenizer", "data", "code_version"):
        if not isinstance(provenance.get(name), str | None):
            raise ValueError(f"provenance.{name} is {str(provenance[name])[:40]!r}")
    sections = [config.get(key) for key in ("data", "eval")] if isinstance(config, dict) else []
    if not all(isinstance(section, dict | None) for section in (config, *sections)):
        raise ValueError("provenance.config isn't a configuration")
    read_sampling((config or {}).get("eval") or {})


# Keys of `eval` for sampling, before `eval.sampling` existed.
_FORMER_SAMPLING = {
    "few_step_jump": "jump",
    **{name: name for name in ("grid", "temperature", "cooling", "top_p", "look_ahead")},
}


def read_sampling(evaluation: Mapping[str, Any]) -> Sampling:
    """Read sampling settings from the section `eval` of a config; the default is the published one.

    Raises:
      ValueError: for a value that is invalid in `Sampling`.
    """
    said = evaluation.get("sampling")
    if said is None:
        said = {
            name: evaluation[former]
            for former, name in _FORMER_SAMPLING.items()
            if evaluation.get(former) not in (None, "")
        }
    return Sampling.from_dict(said)


def sampled_by(bundle: Bundle, sampling: Sampling) -> Bundle:
    """Return the same model with other default sampling settings in its config."""
    config = dict(bundle.provenance.get("config") or {})
    config["eval"] = dict(config.get("eval") or {}) | {"sampling": sampling.to_dict()}
    return dataclasses.replace(bundle, provenance=dict(bundle.provenance) | {"config": config})


# Fields that files of earlier versions don't have, with what their networks are.
_LATER: dict[str, Any] = {
    "logits_mib": ModelConfig.logits_mib,
    "positions": "rotary",
    "num_positions": 0,
    "given": "unmarked",
}


def make_model(fields: Mapping[str, Any]) -> ModelConfig:
    """Make a network configuration from JSON, checking the type of every field.

    Raises:
      ValueError, TypeError: it is none.
    """
    fields = _LATER | dict(fields)
    for field in dataclasses.fields(ModelConfig):
        if field.name not in fields:
            raise ValueError(f"model.{field.name} is missing")
        value = fields[field.name]
        wanted = (int, float) if field.type is float else (field.type,)
        if type(value) not in wanted or (type(value) is int and abs(value) >= 2**31):
            raise ValueError(f"model.{field.name} is {str(value)[:40]!r}")
    return ModelConfig(**fields)


def check_leaves(leaves: Mapping[str, Leaf], model: ModelConfig, name: str) -> None:
    """Raise BadFile naming each missing, unexpected or misshapen parameter."""
    if model.num_blocks > 10_000:
        raise BadFile(f"{name}: {model.num_blocks} blocks are too many for a network.")
    try:
        expected = expected_shapes(model)
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        raise BadFile(f"{name}: such a network can't be made: {str(error)[:200]}") from error
    problems = [f"{path}: missing" for path in expected if path not in leaves]
    problems += [f"{path[:80]}: unexpected" for path in leaves if path not in expected]
    problems += [
        f"{path}: shape {tuple(leaves[path].shape)}, expected {shape}"
        for path, shape in expected.items()
        if path in leaves and tuple(leaves[path].shape) != shape
    ]
    if problems:
        raise BadFile(f"{name} doesn't match its network: " + listed(problems))


def first_line(error: Exception) -> str:
    """First line of an error's message, truncated, for use in another message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def listed(problems: list[str]) -> str:
    """Join problems in one line, at most sixty."""
    return "; ".join(problems[:60] + [f"and {len(problems) - 60} more"] * (len(problems) > 60))


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Parse a JSON object; BadFile, naming `name`, for anything else."""
    try:
        value = io.parse_json(text, name)
    except (ValueError, TypeError) as error:
        raise BadFile(str(error)) from error
    if not isinstance(value, dict):
        raise BadFile(f"{name} is a JSON {type(value).__name__}; expected an object.")
    return value


def read_text(path: pathlib.Path) -> str:
    """Read a small text file; BadFile if it is too large or not UTF-8."""
    if path.stat().st_size > _MOST_JSON:
        raise BadFile(f"{path} has {path.stat().st_size} bytes; the limit is {_MOST_JSON}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} isn't UTF-8 text: {error}") from error


def read_tokenizer(text: str, name: str) -> Tokenizer | None:
    """Make a tokenizer from the content of a tokenizer.json; None if empty, BadFile if damaged."""
    if not text:
        return None
    try:
        return tokenizer_lib.from_json(text, name)
    except ValueError as error:
        raise BadFile(str(error)[:500]) from error
