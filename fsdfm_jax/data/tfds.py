"""A TFDS dataset of packed text: blocks of tokens, made in this process.

This module doesn't import TensorFlow or use the network. Only this module imports
tensorflow_datasets at the top.
"""

import contextlib
import io
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from fsdfm_jax.data import packing
from fsdfm_jax.data.corpus import Document
from fsdfm_jax.data.tokenizer import Tokenizer


class PackedText(tfds.core.GeneratorBasedBuilder):
    """Blocks of text: feature "tokens", int32 [L], for each split in `documents`."""

    VERSION = tfds.core.Version("1.0.0")
    # No checksums of downloads. To look for them, TFDS would import importlib_resources, which it
    # doesn't install.
    url_infos: ClassVar[dict] = {}

    def __init__(
        self,
        *,
        documents: Mapping[str, Callable[[], Iterable[Document]]],
        tokenizer: Tokenizer,
        block_length: int,
        **kwargs,
    ):
        """Make a builder.

        Args:
          documents: for each split, a function that opens its documents.
          tokenizer: encodes them.
          block_length: tokens per block (L).
          **kwargs: for TFDS; `data_dir` is the output folder.
        """
        self._documents = documents
        self._tokenizer = tokenizer
        self._block_length = block_length
        self.counts: dict[str, packing.SplitCounts] = {}  # by split, once prepared
        self.characters = self.lost = 0  # of all splits, see `packing.Packer`
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(self._block_length,), dtype=np.int32)
        return _LocalInfo(builder=self, features=tfds.features.FeaturesDict({"tokens": tokens}))

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in self._documents}

    def _generate_examples(self, split: str):
        # TFDS stores examples in the order of their keys' hashes, which is fixed but not the input
        # order. Keeping the input order (disable_shuffling) would sort a whole split in memory if
        # it exceeds 1 GB.
        packer = packing.Packer(self._tokenizer, self._block_length)
        for key, block_L in enumerate(packer.blocks(self._documents[split]())):
            yield key, {"tokens": block_L}
        counts = self.counts[split] = packer.counts
        self.characters += packer.characters
        self.lost += packer.lost
        packing.check_blocks(split, counts, self._block_length)


class _LocalInfo(tfds.core.DatasetInfo):
    """Information about a local dataset."""

    def initialize_from_bucket(self) -> None:
        """Do nothing.

        TFDS would look for published statistics and leave an empty temporary folder behind.
        """


def build(builder: PackedText) -> dict[str, packing.SplitCounts]:
    """Write the dataset of a builder; show progress on a terminal and print nothing otherwise.

    Returns:
      The counts of each split.

    Raises:
      ValueError: a split has no full block; also anything that reading the documents raises.
    """
    with _quiet():
        try:
            builder.download_and_prepare()
        except RuntimeError as error:  # raised by the writer on a full disk
            raise OSError(
                f"the blocks can't be written to {builder.data_dir_root}: {str(error)[:200]}; free "
                "space or make it writable"
            ) from error
    # TFDS always makes a folder for downloads.
    shutil.rmtree(builder.data_dir_root / "downloads", ignore_errors=True)
    return dict(builder.counts)


class Split(NamedTuple):
    """A split on disk: records {"tokens": int32 [L]}, and files with their numbers of records."""

    records: Sequence[Mapping[str, np.ndarray]]
    files: list[pathlib.Path]
    lengths: list[int]


def open_split(directory: str | os.PathLike, split: str) -> Split:
    """Open a split for random access; `directory` is the builder's `data_dir`.

    Reading records is thread-safe.
    """
    folder = pathlib.Path(directory) / PackedText.name / str(PackedText.VERSION)
    with _quiet():
        builder = tfds.builder_from_directory(folder)
        info = builder.info.splits[split]
        files = [pathlib.Path(path) for path in info.filepaths]
        return Split(builder.as_data_source(split), files, list(info.shard_lengths))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence TFDS's prints and logs; keep progress bars on a terminal."""
    tfds.display_progress_bar(sys.stderr.isatty())
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
