"""Small files that a killed process never leaves half-written.

JSON has no NaN and no infinity: they are written as the strings "nan", "inf" and "-inf", which
`float()` reads back like any number.
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
    """Replace the file at once (UTF-8): readers and a kill see the old content or the new one.

    Folders are made where needed; the content is on the disk when this returns.
    """
    _replace(path, lambda file: file.write(text.encode()))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """`write_text` for content that is no text."""
    _replace(path, lambda file: file.write(content))


def write_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """`write_text` for an array in NumPy's .npy format."""
    _replace(path, lambda file: np.save(file, array))


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """`write_text` for named arrays in NumPy's .npz format, compressed."""
    _replace(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def _replace(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, hence on one file system; other hosts may have a process of this number.
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
    """Let the errors of a file that is open say which it is, as a full disk doesn't."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """`write_text` of indented JSON; NaN and infinities become strings (see the module)."""
    write_text(path, json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n")


def parse_json(text: str | bytes, name: str) -> Any:
    """The value of a JSON text; ValueError, with `name` as its place, for anything else."""
    try:  # of bytes the library would guess the encoding
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError(f"{name} is no JSON that can be meant: it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {str(error)[:200]}") from None


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file; ValueError naming the file if there is none in it."""
    return parse_json(pathlib.Path(path).read_bytes(), str(path))


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the file for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is a JSON {type(value).__name__}, expected an object")
    return value


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file; ValueError naming the file for another encoding."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}; convert it to UTF-8"
        ) from None


def append_jsonl(path: str | os.PathLike, obj: Any) -> None:
    """Add one line of JSON; first cuts off a last line that a killed process left unfinished."""
    path = pathlib.Path(path)
    line = json.dumps(_plain(obj), allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "a+b") as file:
        _drop_torn_line(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """All complete lines of a file; one without its newline, at the end, was torn and is ignored.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: A complete line is no JSON.
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
    """Floats that JSON lacks as strings and numpy or jax scalars as numbers, at any depth."""
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
