"""A model at rest, whatever file it lies in: the common form of all formats of this package.

Readers make a `Bundle`, writers take one. Its parameters are read leaf by leaf, so that converting
a large model never holds more than one stacked matrix in memory where the target allows it.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from fsdfm_jax import models, stages
from fsdfm_jax.models import ModelConfig, Params
from fsdfm_jax.stages import Process
from fsdfm_jax.tokenizer import Tokenizer

# Of weights in files; parameters in memory are float32.
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
DEFAULT_PATH = {"schedule": "polynomial", "power": 1.0, "source": "uniform", "revealed": "stay"}


class BadFile(ValueError):  # noqa: N818 - named after what it says
    """A file that is damaged, hostile or not of the format it claims; the message says which."""


class Leaf(NamedTuple):
    """One parameter that is still in its file.

    Attributes:
      shape: of the parameter in our layout.
      read: reads it, float32.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A model at rest.

    Attributes:
      model: its network.
      leaves: path ("blocks/q_proj/kernel") -> parameter, all that `models.apply` needs.
      path: the noising process, the keys of `config.path`.
      tokenizer: None where the file holds none and none was named.
      block_length: tokens of the blocks it was trained on, None if unknown.
      provenance: JSON dict: "stage", "weights" (which of the file's), "step", "ema_decay", "data"
        and "tokenizer" (fingerprints), "code_version", "config", "recipe", "source" (file and
        format); None for what the file doesn't say.
    """

    model: ModelConfig
    leaves: Mapping[str, Leaf]
    path: Mapping[str, Any]
    tokenizer: Tokenizer | None
    block_length: int | None
    provenance: Mapping[str, Any]

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """(path, float32 array) of each parameter, read as the iterator goes on."""
        for path, leaf in self.leaves.items():
            yield path, leaf.read()

    def params(self) -> Params:
        """All parameters, as nested dicts of float32 numpy arrays."""
        return unflatten(dict(self.arrays()))

    def num_params(self) -> int:
        """Number of scalars."""
        return sum(int(np.prod(leaf.shape)) for leaf in self.leaves.values())

    def process(self) -> Process:
        """Its noising process, over the network's vocabulary."""
        masked = self.path["source"] == "mask"
        return stages.make_process(
            ConfigDict(dict(self.path)),
            num_tokens=self.model.vocab_size - masked,
            eos_id=0 if self.tokenizer is None else self.tokenizer.eos_id,
        )


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as {"a/b": leaf}, in their order."""
    flat = {}
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
    """Shape of each parameter of a network, by its path."""
    tree = jax.eval_shape(lambda: models.init_params(jax.random.key(0), model))
    return {path: leaf.shape for path, leaf in flatten(tree).items()}


def from_params(params: Params, model: ModelConfig, **fields: Any) -> Bundle:
    """A bundle of parameters in memory; `fields` are those of `Bundle`, defaults where left out."""
    leaves = {
        path: Leaf(tuple(np.shape(array)), lambda array=array: np.asarray(array, np.float32))
        for path, array in flatten(params).items()
    }
    defaults = {"path": DEFAULT_PATH, "tokenizer": None, "block_length": None, "provenance": {}}
    return Bundle(model, leaves, **(defaults | fields))


def checksum(array: np.ndarray) -> str:
    """sha256 of an array's bytes in row-major order, first 16 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()[:16]
