"""A TFDS dataset of packed text: documents, each with an end-of-text token, cut into blocks.

Nothing here imports TensorFlow or touches the network. Only this module imports tensorflow_datasets
at its top.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from fsdfm_jax.corpus import Document
from fsdfm_jax.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 20  # documents are encoded together up to this many characters
_BATCH_DOCUMENTS = 1024


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """What packing did to one split.

    Attributes:
      documents: number of documents.
      tokens: of all documents, with one end-of-text token each.
      blocks: number of blocks stored.
      dropped_tokens: tokens after the last full block; tokens = blocks * L + dropped_tokens.
      sha256: of the blocks in document order, as little-endian int32.
    """

    documents: int
    tokens: int
    blocks: int
    dropped_tokens: int
    sha256: str


class Packer:
    """Packs a stream of documents into blocks, and counts."""

    def __init__(self, tokenizer: Tokenizer, block_length: int):
        self._tokenizer = tokenizer
        self._block_length = block_length
        self._documents = self._tokens = self._blocks = 0
        self._digest = hashlib.sha256()

    def blocks(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        """Yields int32 [L] blocks; the tokens after the last full block are dropped."""
        rest = np.empty(0, np.int32)
        for batch in _batches(documents):
            ids = self._tokenizer.encode_batch([document.text for document in batch])
            ends = [self._tokenizer.eos_id]
            stream = np.concatenate([rest, *(np.array(i + ends, np.int32) for i in ids)])
            self._documents += len(batch)
            self._tokens += len(stream) - len(rest)
            full, rest = np.split(stream, [len(stream) - len(stream) % self._block_length])
            self._digest.update(full.astype("<i4").tobytes())
            blocks_NL = full.reshape(-1, self._block_length)
            self._blocks += len(blocks_NL)
            yield from blocks_NL

    @property
    def counts(self) -> SplitCounts:
        """Counts so far; final once `blocks` is exhausted."""
        return SplitCounts(
            documents=self._documents,
            tokens=self._tokens,
            blocks=self._blocks,
            dropped_tokens=self._tokens - self._blocks * self._block_length,
            sha256=self._digest.hexdigest(),
        )


class PackedText(tfds.core.GeneratorBasedBuilder):
    """Blocks of text: feature "tokens", int32 [L], for every split it is given documents for."""

    VERSION = tfds.core.Version("1.0.0")
    # Checksums of downloads: there are none. To look for them TFDS imports importlib_resources,
    # which it does not install.
    url_infos: ClassVar[dict] = {}

    def __init__(
        self,
        *,
        documents: Mapping[str, Callable[[], Iterable[Document]]],
        tokenizer: Tokenizer,
        block_length: int,
        **kwargs,
    ):
        """Makes a builder.

        Args:
          documents: for each split, a function that opens its documents.
          tokenizer: encodes them.
          block_length: tokens of a block (L).
          **kwargs: of TFDS; `data_dir` is the folder to write to.
        """
        self._documents = documents
        self._tokenizer = tokenizer
        self._block_length = block_length
        self.counts: dict[str, SplitCounts] = {}  # by split, once prepared
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(self._block_length,), dtype=np.int32)
        return _LocalInfo(builder=self, features=tfds.features.FeaturesDict({"tokens": tokens}))

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in self._documents}

    def _generate_examples(self, split: str):
        # TFDS stores examples in the order of the keys' hashes: fixed, but not the order they come
        # in. Keeping that order (disable_shuffling) would make it sort a whole split in memory once
        # the split exceeds 1 GB.
        packer = Packer(self._tokenizer, self._block_length)
        for key, block_L in enumerate(packer.blocks(self._documents[split]())):
            yield key, {"tokens": block_L}
        counts = self.counts[split] = packer.counts
        if counts.blocks == 0:
            raise ValueError(
                f"the {split} split has no full block of {self._block_length} tokens: its "
                f"{counts.documents} document(s) have {counts.tokens} tokens; lower "
                "data.block_length, give more text, or move documents between the splits by "
                "data.holdout"
            )


class _LocalInfo(tfds.core.DatasetInfo):
    """Information about a dataset that exists only here."""

    def initialize_from_bucket(self) -> None:
        """Does nothing.

        TFDS would look for published statistics, and leave an empty temporary folder behind.
        """


def build(builder: PackedText) -> dict[str, SplitCounts]:
    """Writes the dataset of a builder; prints nothing, and shows progress on a terminal only.

    Returns:
      The counts of each split.

    Raises:
      ValueError: a split has no full block; or what reading its documents raises.
    """
    with _quiet():
        builder.download_and_prepare()
    # It makes a folder for downloads whether or not there are any.
    shutil.rmtree(builder.data_dir_root / "downloads", ignore_errors=True)
    return dict(builder.counts)


def open_split(directory: str | os.PathLike, split: str) -> Sequence[Mapping[str, np.ndarray]]:
    """Opens a split for random access; `directory` is the `data_dir` it was built in.

    Returns:
      A sequence of {"tokens": int32 [L]}; safe to read from several threads.
    """
    folder = pathlib.Path(directory) / PackedText.name / str(PackedText.VERSION)
    with _quiet():
        return tfds.builder_from_directory(folder).as_data_source(split)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what TFDS prints and logs; its progress bars are left on a terminal only."""
    tfds.display_progress_bar(sys.stderr.isatty())
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
