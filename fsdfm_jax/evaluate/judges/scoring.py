"""What all judges share: the interface, texts of which a part counts, ids, batches, hashes.

A judge is a language model that scores samples. Its numbers depend on what it is given before the
first token, on its tokenizer and on which tokens count; `Judge.describe` says each of them.
"""

import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Text(NamedTuple):
    """A text to score.

    Attributes:
      text: all of it, what is given included.
      spans: character ranges [start, end) that count; None: all of it.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None = None


class Scores(NamedTuple):
    """What a judge says of N texts.

    Attributes:
      nll: negative log-likelihood of the tokens that count, float64 [N], nats.
      tokens: how many those are, int64 [N]; tokens or words of the judge.
      num_bytes: bytes of the text of just those tokens, int64 [N], so that nll over them is nats a
        byte. What is skipped has none here.
      skipped: tokens or words that count but could not be scored, int64 [N].
    """

    nll: np.ndarray
    tokens: np.ndarray
    num_bytes: np.ndarray
    skipped: np.ndarray


class Judge(Protocol):
    """A language model that scores samples.

    Attributes:
      name: short and unique, shown in tables.
      tokenizer: fingerprint of the tokenizer whose ids `score_ids` takes; None: text only.
    """

    name: str
    tokenizer: str | None

    def describe(self) -> dict[str, Any]:
        """JSON: kind, name, sha256 of its weights (16 hex digits), tokenizer, what the first token
        is given, context, dtype, versions of libraries."""

    def score_ids(self, tokens_NL: np.ndarray, counted_NL: np.ndarray | None = None) -> Scores:
        """Score ids without a detour through text.

        Args:
          tokens_NL: int [N, L].
          counted_NL: bool, which positions count; None: all. The others are given.

        Raises:
          ValueError: the judge takes text only, or the ids are none of its tokenizer.
        """

    def score_text(self, texts: Sequence[Text]) -> Scores:
        """Score texts after tokenising them anew; a token counts if its last character does.

        A text in which nothing counts has 0 tokens and 0 nats.
        """

    def features(self, texts: Sequence[Text]) -> np.ndarray:
        """What the network computes at the last token of each text, float32 [N, D]; see MAUVE.

        Raises:
          ValueError: the judge has no features.
        """


def counted_characters(text: Text) -> np.ndarray:
    """Which characters count, bool [characters].

    Raises:
      ValueError: a span isn't one of the text.
    """
    length = len(text.text)
    if text.spans is None:
        return np.ones(length, bool)
    counted_C = np.zeros(length, bool)
    for start, end in text.spans:
        if not 0 <= start <= end <= length:
            raise ValueError(
                f"The span ({start}, {end}) isn't one of a text of {length} characters; expected "
                "0 <= start <= end <= length."
            )
        counted_C[start:end] = True
    return counted_C


def counted_tokens(
    texts: Sequence[Text], ends: Sequence[Sequence[int]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Which tokens of each text count, those whose last character does, and what they hold.

    A token holds the characters from the end of the one before it to its own end, so that nothing
    is held twice; of several tokens that make up one character, the first one holds it.

    Args:
      texts: N of them.
      ends: of each text, the index after the last character of each token.

    Returns:
      (bool [tokens], UTF-8 bytes of the characters that each token holds int64 [tokens]), each a
      list of N.
    """
    counted, sizes = [], []
    for text, each in zip(texts, ends, strict=True):
        end_T = np.asarray(each, np.int64)
        counted.append(counted_characters(text)[np.maximum(end_T - 1, 0)])
        bytes_C = [len(character.encode()) for character in text.text]
        before_C1 = np.cumsum([0, *bytes_C])
        sizes.append(np.diff(before_C1[np.maximum.accumulate(end_T)], prepend=0))
    return counted, sizes


def sum_counted(sizes: Iterable[np.ndarray], counted: Iterable[np.ndarray]) -> np.ndarray:
    """The sum over the tokens that count of each of N texts, int64 [N]."""
    pairs = zip(sizes, counted, strict=True)
    return np.asarray([part[counts].sum() for part, counts in pairs], np.int64)


def check_ids(
    tokens_NL: np.ndarray, counted_NL: np.ndarray | None, num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64 [N, L], which count bool [N, L]).

    Raises:
      ValueError: the shapes aren't those, or an id is outside [0, num_tokens).
    """
    tokens_NL = np.asarray(tokens_NL)
    if tokens_NL.ndim != 2 or not np.issubdtype(tokens_NL.dtype, np.integer):
        raise ValueError(
            f"Expected ids as an integer array [N, L], got {tokens_NL.dtype} {tokens_NL.shape}."
        )
    if tokens_NL.size and not (tokens_NL.min() >= 0 and tokens_NL.max() < num_tokens):
        raise ValueError(
            f"Expected ids in [0, {num_tokens}), got {tokens_NL.min()} to {tokens_NL.max()}; mask "
            "tokens can't be scored."
        )
    counted_NL = np.ones(tokens_NL.shape, bool) if counted_NL is None else np.asarray(counted_NL)
    if counted_NL.shape != tokens_NL.shape or counted_NL.dtype != bool:
        raise ValueError(
            f"Expected counted_NL as bool {tokens_NL.shape}, like the ids, got "
            f"{counted_NL.dtype} {counted_NL.shape}."
        )
    return tokens_NL.astype(np.int64), counted_NL


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of all sequences, `batch_size` at a time, the longest first, 0 long ones left out.

    Neighbours are of like length, so little is padding; and what doesn't fit fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    order = [i for i in order if lengths[i]]
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def hash_files(paths: Iterable[pathlib.Path]) -> str:
    """sha256 of the files' content, one after the other by name, first 16 hex digits."""
    content = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            while part := file.read(2**20):
                content.update(part)
    return content.hexdigest()[:16]
