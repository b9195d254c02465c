"""Prompts: templates of given tokens and gaps, and files of prompts.

A template covers the start of a block; the rest of the block is free, because the networks are
trained only on full blocks. Infill texts write a gap of n tokens as [n]:

    The [8] of the Union            "The", 8 tokens, " of the Union"
    see note \\[8], [3]              the literal "see note [8],", 3 tokens
    an array [i] or [1.5]           brackets around anything but an integer are text

Each stretch of text is encoded separately. Tokens of byte-level tokenizers include the space before
their word. Spaces before a gap are therefore dropped (line breaks stay), and the text after a gap
keeps its leading space.
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

if TYPE_CHECKING:  # exported samplers include this file without the package
    from fsdfm_jax.data.tokenizer import Tokenizer

_GAP = re.compile(r"(\\?)\[([0-9]+)\]")


class Template(NamedTuple):
    """Given tokens and gaps of one block.

    Attributes:
      given_L: int32 [L], 0 where no token is given.
      frozen_L: bool [L], the given positions.
      shown: number of leading tokens to show; the rest only fills the block.
    """

    given_L: np.ndarray
    frozen_L: np.ndarray
    shown: int


class Request(NamedTuple):
    """One requested text.

    Attributes:
      id: identifies it in the output; by default the line number.
      kind: "prompt", "infill", or "" for unconditional text.
      text: as given.
      template: made from the text.
    """

    id: str | int
    kind: str
    text: str
    template: Template


def blank(length: int) -> Template:
    """Template with no given tokens."""
    return Template(np.zeros(length, np.int32), np.zeros(length, bool), length)


def prefix(text: str, tokenizer: Tokenizer, length: int) -> Template:
    """Template with text at the start of the block; the whole block is shown.

    Raises:
      ValueError: for an empty text, or one that fills all `length` tokens.
    """
    tokens = _encode(text, tokenizer)
    if not tokens:
        raise ValueError("The prompt is empty; omit it for unconditional text.")
    if len(tokens) >= length:
        raise ValueError(
            f"The prompt has {len(tokens)} tokens and fills the length of {length}; shorten it, or "
            f"use a length of at least {len(tokens) + 1}."
        )
    return _template(tokens, length, shown=length)


def infill(text: str, tokenizer: Tokenizer, length: int) -> Template:
    """Template of a text with gaps [n], see the module; only the text and its gaps are shown.

    Raises:
      ValueError: for a text that is empty, has no gap, has a gap of 0 tokens, or needs more than
        `length` tokens.
    """
    if not text.strip():
        raise ValueError('The infill text is empty; write a text with gaps, like "The [8] of".')
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
            raise ValueError(f"A gap of {digits[:20]}.. tokens is too long for any block.")
        if int(digits) < 1:
            raise ValueError(f"A gap needs at least 1 token, got {match.group()} in {text!r}.")
        pieces += [_encode(literal.rstrip(" "), tokenizer), int(digits)]
        literal = ""
    if not pieces:
        raise ValueError(f"The infill text {text!r} has no gap; write [8] for 8 tokens to fill in.")
    pieces.append(_encode(literal + text[end:], tokenizer))
    needed = sum(piece if isinstance(piece, int) else len(piece) for piece in pieces)
    if needed > length:
        raise ValueError(
            f"The infill text needs {needed} tokens, but a block has {length}; shorten it or "
            "increase the length (--length)."
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
    """Make a request of `kind` "prompt", "infill" or "".

    Args:
      kind, text, request_id: of the request.
      tokenizer, length: of the template.
      to_infill: converts an infill, such as a puzzle, to text with gaps [n].

    Raises:
      ValueError: if the text is invalid.
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
    """Read and check all requests of a file.

    Args:
      path: .jsonl with {"prompt": text} or {"infill": text} and optionally "id" (string or integer)
        on each line, or .txt with one prompt per line; blank lines are skipped.
      tokenizer, length: of the templates.
      check: raises ValueError for a template that can't be used.
      to_infill: see `make_request`.

    Raises:
      ValueError: for another kind of file, an empty file, or the first bad line, with its number.
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
                raise ValueError(f"line {lines_of[request_id]} has the same id {request_id!r}")
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
        raise ValueError(f"{path} has no prompts.")
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
        raise ValueError(f"this isn't JSON: {str(error)[:200]}") from error
    if not isinstance(fields, dict) or len(fields.keys() & MAKERS.keys()) != 1:
        raise ValueError('expected either {"prompt": text} or {"infill": text}')
    if unknown := fields.keys() - MAKERS.keys() - {"id"}:
        raise ValueError(f'unknown key {min(unknown)!r}; expected "prompt", "infill" or "id"')
    for key, value in fields.items():
        # bool is a subclass of int
        if not isinstance(value, str) and (key != "id" or type(value) is not int):
            raise ValueError(f"{key!r} must be a string, got {value!r}")
    return fields


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"The text {text!r} has characters that are not Unicode; was it typed as UTF-8?"
        ) from None
    return tokenizer.encode(text)


def _template(tokens: Sequence[int | None], length: int, *, shown: int) -> Template:
    given_L, frozen_L, _ = blank(length)
    for i, token in enumerate(tokens):
        if token is not None:
            given_L[i], frozen_L[i] = token, True
    return Template(given_L, frozen_L, shown)
