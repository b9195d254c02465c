"""Atomic reading and writing of small files.

JSON has no NaN or infinity: they are written as the strings "nan", "inf" and "-inf", which
`float()` parses.
"""

import contextlib
import json
import math
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace a UTF-8 file atomically; make folders if needed. The content is on disk on return."""
    _replace(path, lambda file: file.write(text.encode()))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """As `write_text`, for bytes."""
    _replace(path, lambda file: file.write(content))


def write_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """As `write_text`, for an array in NumPy's .npy format."""
    _replace(path, lambda file: np.save(file, array))


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """As `write_text`, for named arrays in NumPy's compressed .npz format."""
    _replace(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def _replace(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so on the same file system. Process ids aren't unique across hosts.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Add the file name to an OSError without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """As `write_text`, for indented JSON; NaN and infinities become strings (see the module)."""
    write_text(path, json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n")


def parse_json(text: str | bytes, name: str) -> Any:
    """Parse JSON; ValueError, with `name` as location, for anything else."""
    try:  # decode here, because the library would guess the encoding of bytes
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"{name} isn't valid JSON: it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(f"{name} isn't valid JSON: {str(error)[:200]}") from None


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file; ValueError naming the file if it isn't valid."""
    return parse_json(pathlib.Path(path).read_bytes(), str(path))


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Read an object from a JSON file; ValueError naming the file for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is a JSON {type(value).__name__}, expected an object")
    return value


def read_text(path: str | os.PathLike) -> str:
    """Read a UTF-8 file; ValueError naming the file for another encoding."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}; convert it to UTF-8"
        ) from None


def append_jsonl(path: str | os.PathLike, obj: Any) -> None:
    """Append a line of JSON; first remove an incomplete last line from a killed process."""
    path = pathlib.Path(path)
    line = json.dumps(_plain(obj), allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "a+b") as file:
        _drop_torn_line(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """Read all complete lines of a file; ignore an incomplete last line.

    Raises:
      FileNotFoundError: The file doesn't exist.
      ValueError: A complete line isn't valid JSON.
    """
    lines = pathlib.Path(path).read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(parse_json(line, f"{path} line {number}"))
        except ValueError as error:
            raise ValueError(f"{error}; remove the line") from None
    return records


def _plain(obj: Any) -> Any:
    """Convert non-finite floats to strings and numpy or jax scalars to numbers, recursively."""
    if getattr(obj, "ndim", None) == 0 and hasattr(obj, "item"):
        obj = obj.item()
    if isinstance(obj, float) and not math.isfinite(obj):
        return str(obj)
    if isinstance(obj, Mapping):
        return {key: _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    return obj


def _drop_torn_line(file) -> None:
    """Truncate an open binary file after its last newline."""
    end = size = file.seek(0, os.SEEK_END)
    while end:
        start = max(end - 4096, 0)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)
