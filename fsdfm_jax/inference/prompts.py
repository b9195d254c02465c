"""What a sample is made around: templates of given tokens and gaps, and files of many of them.

A template covers the head of a block; the rest of the block is free, because the networks have only
ever seen full blocks. Infill texts write a gap of n tokens as [n]:

    The [8] of the Union            "The", 8 tokens, " of the Union"
    see note \\[8], [3]              the literal "see note [8],", 3 tokens
    an array [i] or [1.5]           brackets that don't hold just a whole number are text

Each stretch of text is encoded on its own. The tokens of byte-level tokenizers carry the space
before their word, so spaces just before a gap are dropped (its first token brings its own; line
breaks stay), and the text after a gap keeps its leading space.
"""

from __future__ import annotations

import codecs
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # exported samplers take this file along without the package
    from fsdfm_jax.data.tokenizer import Tokenizer

_GAP = re.compile(r"(\\?)\[([0-9]+)\]")


class Template(NamedTuple):
    """Given tokens and gaps of one block.

    Attributes:
      given_L: int32 [L], 0 where nothing is given.
      frozen_L: bool [L], the given positions.
      shown: how many leading tokens are the answer; what follows only fills the block.
    """

    given_L: np.ndarray
    frozen_L: np.ndarray
    shown: int


class Request(NamedTuple):
    """One text asked for.

    Attributes:
      id: names it in the output; the line number where the file gives none.
      kind: "prompt", "infill", or "" for text out of nothing.
      text: as it was given.
      template: made of it.
    """

    id: str | int
    kind: str
    text: str
    template: Template


def blank(length: int) -> Template:
    """Nothing given, everything shown."""
    return Template(np.zeros(length, np.int32), np.zeros(length, bool), length)


def prefix(text: str, tokenizer: Tokenizer, length: int) -> Template:
    """Text that the block begins with; all of the block is shown.

    Raises:
      ValueError: for an empty text, or one that leaves nothing of `length` tokens to write.
    """
    tokens = _encode(text, tokenizer)
    if not tokens:
        raise ValueError("The prompt is empty; leave it out to write from nothing.")
    if len(tokens) >= length:
        raise ValueError(
            f"The prompt has {len(tokens)} tokens and leaves nothing to write in {length}; "
            f"shorten it, or ask for a length of at least {len(tokens) + 1}."
        )
    return _template(tokens, length, shown=length)


def infill(text: str, tokenizer: Tokenizer, length: int) -> Template:
    """Text with gaps [n], see the module; only the text and its gaps are shown.

    Raises:
      ValueError: for an empty text, one without a gap, a gap of no tokens, or one that needs more
        than `length` tokens.
    """
    if not text.strip():
        raise ValueError('The infill text is empty; write a text with gaps, as "The [8] of".')
    pieces: list[list[int] | int] = []  # tokens of a stretch of text, or the size of a gap
    literal, end = "", 0
    for match in _GAP.finditer(text):
        literal += text[end : match.start()]
        end = match.end()
        escaped, digits = match.groups()
        if escaped:
            literal += match.group()[1:]
            continue
        if len(digits) > 20:
            raise ValueError(f"A gap of {digits[:20]}.. tokens is longer than any block.")
        if int(digits) < 1:
            raise ValueError(f"A gap needs at least 1 token, got {match.group()} in {text!r}.")
        pieces += [_encode(literal.rstrip(" "), tokenizer), int(digits)]
        literal = ""
    if not pieces:
        raise ValueError(
            f"The infill text {text!r} has no gap; write [n] where n tokens shall be filled in."
        )
    pieces.append(_encode(literal + text[end:], tokenizer))
    needed = sum(piece if isinstance(piece, int) else len(piece) for piece in pieces)
    if needed > length:
        raise ValueError(
            f"The infill text needs {needed} tokens, but a block has {length}; shorten it, or ask "
            "for a greater length."
        )
    tokens: list[int | None] = []
    for piece in pieces:
        tokens += [None] * piece if isinstance(piece, int) else piece
    return _template(tokens, length, shown=needed)


def _as_it_is(text: str) -> str:
    return text


MAKERS: dict[str, Callable[[str, Tokenizer, int], Template]] = {"prompt": prefix, "infill": infill}


def make_request(
    kind: str,
    text: str,
    tokenizer: Tokenizer,
    length: int,
    *,
    request_id: str | int = 1,
    to_infill: Callable[[str], str] = _as_it_is,
) -> Request:
    """One request of `kind` "prompt", "infill" or "".

    Args:
      kind, text, request_id: of the request.
      tokenizer, length: of the template.
      to_infill: text of an infill -> the text with gaps [n] that it stands for, as of a puzzle.

    Raises:
      ValueError: if the text makes no template.
    """
    wanted = to_infill(text) if kind == "infill" else text
    template = MAKERS[kind](wanted, tokenizer, length) if kind else blank(length)
    return Request(request_id, kind, text, template)


def read_requests(
    path: str | os.PathLike,
    tokenizer: Tokenizer,
    length: int,
    check: Callable[[Template], None] = lambda template: None,
    *,
    to_infill: Callable[[str], str] = _as_it_is,
) -> list[Request]:
    """All requests of a file, every one of them checked.

    Args:
      path: .jsonl with {"prompt": text} or {"infill": text} and optionally "id" (text or whole
        number) in each line, or .txt with one prompt a line; blank lines are skipped.
      tokenizer, length: of the templates.
      check: raises ValueError for a template that can't be used.
      to_infill: see `make_request`.

    Raises:
      ValueError: for another kind of file, one without lines, or the first bad line, by its number.
      FileNotFoundError: no such file.
    """
    path = pathlib.Path(path).expanduser()
    readers = {".jsonl": _read_json_line, ".txt": lambda line: {"prompt": line}}
    if path.suffix not in readers:
        raise ValueError(f"{path} must be a .jsonl or .txt file of prompts, see --help.")
    lines_of: dict[str | int, int] = {}
    requests = []
    for number, line in _lines(path):
        try:
            fields = readers[path.suffix](line.decode("utf-8"))
            request_id = fields.pop("id", number)
            if request_id in lines_of:
                raise ValueError(f"its id {request_id!r} is that of line {lines_of[request_id]}")
            ((kind, text),) = fields.items()
            request = make_request(
                kind, text, tokenizer, length, request_id=request_id, to_infill=to_infill
            )
            check(request.template)
        except ValueError as error:
            raise ValueError(f"{path} line {number}: {error}") from error
        lines_of[request_id] = number
        requests.append(request)
    if not requests:
        raise ValueError(f"{path} holds no prompts.")
    return requests


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, line.removesuffix(b"\r")


def _read_json_line(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is no JSON: {str(error)[:200]}") from error
    if not isinstance(fields, dict) or len(fields.keys() & MAKERS.keys()) != 1:
        raise ValueError('expected {"prompt": text} or {"infill": text}, either of the two')
    if unknown := fields.keys() - MAKERS.keys() - {"id"}:
        raise ValueError(f'unknown key {min(unknown)!r}; expected "prompt", "infill" or "id"')
    for key, value in fields.items():
        # bool is an int to Python
        if not isinstance(value, str) and (key != "id" or type(value) is not int):
            raise ValueError(f"{key!r} must be a text, got {value!r}")
    return fields


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"The text {text!r} holds characters that are not Unicode.") from None
    return tokenizer.encode(text)


def _template(tokens: Sequence[int | None], length: int, *, shown: int) -> Template:
    given_L, frozen_L, _ = blank(length)
    for i, token in enumerate(tokens):
        if token is not None:
            given_L[i], frozen_L[i] = token, True
    return Template(given_L, frozen_L, shown)
