"""Files of a prepared folder: written atomically, listed with checksums, read block by block.

A shard is an array_record file whose records are blocks of tokens, little-endian, as uint16 if the
vocabulary fits and otherwise int32.
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

# One record per chunk, for random access. zstd level 1 is the fastest, and higher levels gain
# nothing on tokens.
_OPTIONS = "group_size:1,zstd:1"
_PARTIAL = ".partial"  # suffix of files being written
_CHUNK = 1 << 22  # bytes hashed at once
_NAMED = 5  # files named in an error
REMEDY = (
    "restore the files, or remove the folder and prepare it again (with --engine=beam it is enough "
    "to remove these files and manifest.json: the same command makes the missing ones)"
)


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a prepared folder.

    Attributes:
      name: its path inside the folder.
      bytes: its size.
      sha256: of its bytes, in hex.
      split: the split it is a shard of; "" for other files.
      blocks: number of blocks; 0 for other files.
    """

    name: str
    bytes: int
    sha256: str
    split: str = ""
    blocks: int = 0


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the storage dtype for tokens of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<i4")


def describe(folder: pathlib.Path, name: str, split: str = "", blocks: int = 0) -> File:
    """Read a file of a folder to get its size and checksum."""
    digest = hashlib.sha256()
    with open(folder / name, "rb") as stream:
        while data := stream.read(_CHUNK):
            digest.update(data)
        return File(name, stream.tell(), digest.hexdigest(), split, blocks)


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Write a file atomically and durably."""
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
        """Add int [N, L] blocks; OSError if they can't be written, e.g. on a full disk."""
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
        """Rename the shard to its final name; return it, or nothing if it is empty."""
        if self._writer is None:
            return []
        with self._errors():
            self._writer.close()
        self._writer = None
        found = describe(self._folder, self._partial.relative_to(self._folder).as_posix())
        _publish(self._partial, self._folder / self._name)
        return [dataclasses.replace(found, name=self._name, split=self._split, blocks=self._blocks)]

    def discard(self) -> None:
        """Remove an unfinished shard."""
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):
                self._writer.close()
        self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # raised by array_record
            raise OSError(f"cannot write {self._folder / self._name}: {error}") from error


def remove_partial(folder: pathlib.Path) -> None:
    """Remove the partial files of killed writers in a folder and its subfolders."""
    for path in folder.rglob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def check_sizes(folder: pathlib.Path, files: Iterable[File]) -> None:
    """Check that all files exist with the right size.

    Raises:
      ValueError: naming the first ones that don't.
    """
    _refuse(folder, files, _wrong_size)


def check_sums(folder: pathlib.Path, files: Iterable[File]) -> None:
    """Read all files and check their sizes and checksums.

    Raises:
      ValueError: naming the first ones that differ.
    """
    _refuse(folder, files, lambda path, file: _wrong_size(path, file) or _wrong_sum(path, file))


class Shards:
    """Random access to the int32 [L] blocks of shards; thread-safe.

    Shards are opened on first use.

    Args:
      folder: the prepared folder.
      files: its shards, in order.
      length: tokens per block (L).
      dtype: of the stored tokens.
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
    """A sequence of records whose errors name the bad file.

    Args:
      records: the sequence; may raise any exception.
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
                raise FileNotFoundError(f"{path} has disappeared; {REMEDY}") from error
            if isinstance(error, OSError):  # from the file system, not from the file's content
                raise
            first = str(error).split(";")[0]
            raise ValueError(
                f"{path} cannot be read ({first}); `python -m launch.prepare_data --verify "
                f"--directory=DIR` finds all damaged files; {REMEDY}"
            ) from error

    def path(self, index: int) -> pathlib.Path:
        """Return the file of a record."""
        return self._paths[min(bisect.bisect_right(self._ends, index), len(self._paths) - 1)]


@dataclasses.dataclass(frozen=True)
class _Whole:
    """File description that lets ArrayRecordDataSource skip opening the file."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


def _partial(path: pathlib.Path) -> pathlib.Path:
    # Two workers may write the same file if an engine runs a task twice.
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
