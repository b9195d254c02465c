"""Files of a prepared folder: written whole or not at all, listed with their sums, read by block.

A shard is an array_record file whose records are blocks of tokens, little-endian, in the smallest
of uint16 and int32 that holds the vocabulary.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fsdfm_jax import extras

# One record a chunk, for random access. Of zstd's levels the first reads and writes fastest, and
# the higher ones gain nothing on tokens.
_OPTIONS = "group_size:1,zstd:1"
_PARTIAL = ".partial"  # suffix of files that are being written
_CHUNK = 1 << 22  # bytes hashed at once
_NAMED = 5  # files named in an error
REMEDY = (
    "put the files back, or remove the folder and prepare it again (after --engine=beam it is "
    "enough to remove these files and manifest.json: the same command makes what is missing)"
)


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a prepared folder.

    Attributes:
      name: its path inside the folder.
      bytes: its size.
      sha256: of its bytes, in hex.
      split: the split it is a shard of; "" for other files.
      blocks: number of its blocks; 0 for other files.
    """

    name: str
    bytes: int
    sha256: str
    split: str = ""
    blocks: int = 0


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that tokens of a vocabulary are stored in."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<i4")


def describe(folder: pathlib.Path, name: str, split: str = "", blocks: int = 0) -> File:
    """Read a file of a folder for its size and sum."""
    digest = hashlib.sha256()
    with open(folder / name, "rb") as stream:
        while data := stream.read(_CHUNK):
            digest.update(data)
        return File(name, stream.tell(), digest.hexdigest(), split, blocks)


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Write a file, whole or not at all, also if the machine stops."""
    partial = _partial(path)
    partial.write_bytes(data)
    _publish(partial, path)


class ShardWriter:
    """Writes a shard under a temporary name until `close`; without a block there is no file."""

    def __init__(self, folder: pathlib.Path, name: str, split: str, dtype: np.dtype):
        self._folder, self._name, self._split, self._dtype = folder, name, split, dtype
        self._partial = _partial(folder / name)
        self._writer = None
        self._blocks = 0

    def write(self, blocks_NL: np.ndarray) -> None:
        """Add int [N, L] blocks; OSError if they can't be written, as on a full disk."""
        if self._writer is None and len(blocks_NL):
            with extras.needed("train", "Preparing text"):
                from array_record.python.array_record_module import ArrayRecordWriter

            with self._errors():
                self._writer = ArrayRecordWriter(str(self._partial), _OPTIONS)
        with self._errors():
            for block_L in blocks_NL.astype(self._dtype):
                self._writer.write(block_L.tobytes())
        self._blocks += len(blocks_NL)

    def close(self) -> list[File]:
        """Give the shard its name; return it, or nothing if it would be empty."""
        if self._writer is None:
            return []
        with self._errors():
            self._writer.close()
        self._writer = None
        found = describe(self._folder, self._partial.relative_to(self._folder).as_posix())
        _publish(self._partial, self._folder / self._name)
        return [dataclasses.replace(found, name=self._name, split=self._split, blocks=self._blocks)]

    def discard(self) -> None:
        """Remove what is left of an unfinished shard."""
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):
                self._writer.close()
        self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what array_record raises
            raise OSError(f"cannot write {self._folder / self._name}: {error}") from error


def remove_partial(folder: pathlib.Path) -> None:
    """Remove what killed writers left in a folder, those below it included."""
    for path in folder.rglob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def check_sizes(folder: pathlib.Path, files: Iterable[File]) -> None:
    """Check that all files are there in their full size.

    Raises:
      ValueError: naming the first that are not.
    """
    _refuse(folder, files, _wrong_size)


def check_sums(folder: pathlib.Path, files: Iterable[File]) -> None:
    """Read all files and check their sizes and sums.

    Raises:
      ValueError: naming the first that differ.
    """
    _refuse(folder, files, lambda path, file: _wrong_size(path, file) or _wrong_sum(path, file))


class Shards:
    """Random access to the int32 [L] blocks of shards; safe to read from several threads.

    Shards are opened when they are first read.

    Args:
      folder: the prepared folder.
      files: its shards, in order.
      length: tokens of a block (L).
      dtype: that they are stored in.
    """

    def __init__(self, folder: pathlib.Path, files: Sequence[File], length: int, dtype: np.dtype):
        with extras.needed("train", "Prepared text"):
            from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._length, self._dtype = length, dtype
        paths = [folder / file.name for file in files]
        lengths = [file.blocks for file in files]
        instructions = [_Whole(str(p), n) for p, n in zip(paths, lengths, strict=True)]
        self._records = Guarded(ArrayRecordDataSource(instructions), paths, lengths)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        block_L = np.frombuffer(self._records[index], self._dtype).astype(np.int32)
        if len(block_L) != self._length:
            raise ValueError(
                f"{self._records.path(index)} is damaged: expected blocks of {self._length} "
                f"tokens, got one of {len(block_L)}; {REMEDY}"
            )
        return block_L


class Guarded:
    """A sequence of records whose errors name the file at fault.

    Args:
      records: sequence that fails in whatever way.
      paths: its files, in order.
      lengths: number of records of each.
    """

    def __init__(self, records: Any, paths: Sequence[pathlib.Path], lengths: Sequence[int]):
        self._records, self._paths = records, paths
        self._ends = list(itertools.accumulate(lengths))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self._records):
            raise IndexError(f"block {index} of {len(self._records)}")
        try:
            return self._records[index]
        except Exception as error:  # array_record raises RuntimeError, and others for bad indices
            path = self.path(index)
            if not path.exists():
                raise FileNotFoundError(f"{path} has vanished; {REMEDY}") from error
            if isinstance(error, OSError):  # of the file system, not of what is in the file
                raise
            first = str(error).split(";")[0]
            raise ValueError(
                f"{path} cannot be read ({first}); `python -m launch.prepare_data --verify "
                f"--directory=DIR` finds all damaged files; {REMEDY}"
            ) from error

    def path(self, index: int) -> pathlib.Path:
        """The file of a record."""
        return self._paths[min(bisect.bisect_right(self._ends, index), len(self._paths) - 1)]


@dataclasses.dataclass(frozen=True)
class _Whole:
    """What ArrayRecordDataSource asks about a file so as not to open it."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


def _partial(path: pathlib.Path) -> pathlib.Path:
    # Two workers may make the same file, where an engine runs a task twice.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")


def _publish(partial: pathlib.Path, path: pathlib.Path) -> None:
    with open(partial, "rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, path)


def _refuse(
    folder: pathlib.Path,
    files: Iterable[File],
    fault: Callable[[pathlib.Path, File], str],
) -> None:
    wrong = _faults(folder, files, fault)
    named = list(itertools.islice(wrong, _NAMED))
    if named:
        more = sum(1 for _ in wrong)
        rest = f", and {more} more" if more else ""
        raise ValueError(f"{folder} is damaged: {', '.join(named)}{rest}; {REMEDY}")


def _faults(folder, files, fault) -> Iterator[str]:
    for file in files:
        found = fault(folder / file.name, file)
        if found:
            yield f"{file.name} {found}"


def _wrong_size(path: pathlib.Path, file: File) -> str:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "is missing"
    return "" if size == file.bytes else f"has {size} bytes instead of {file.bytes}"


def _wrong_sum(path: pathlib.Path, file: File) -> str:
    found = describe(path.parent, path.name).sha256
    return "" if found == file.sha256 else f"has sha256 {found} instead of {file.sha256}"
