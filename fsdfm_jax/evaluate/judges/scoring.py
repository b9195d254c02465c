"""Common parts of all judges: interface, texts with counted spans, ids, batches, hashes.

A judge is a language model that scores samples. Its scores depend on the context of the first
token, on its tokenizer and on which tokens count; `Judge.describe` records all of these.
"""

import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Text(NamedTuple):
    """A text to score.

    Attributes:
      text: the whole text, including given parts.
      spans: character ranges [start, end) that count; None: everything.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None = None


class Scores(NamedTuple):
    """A judge's scores of N texts.

    Attributes:
      nll: negative log-likelihood of the counted tokens, float64 [N], nats.
      tokens: number of counted tokens (or words) of the judge, int64 [N].
      num_bytes: bytes of the text of these tokens, int64 [N], so nll / num_bytes is nats per byte.
        Excludes skipped ones.
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
        """Describe the judge as JSON: kind, name, sha256 of its weights (16 hex digits), tokenizer,
        treatment of the first token, context, dtype, versions of libraries."""

    def score_ids(self, tokens_NL: np.ndarray, counted_NL: np.ndarray | None = None) -> Scores:
        """Score token ids directly.

        Args:
          tokens_NL: int [N, L].
          counted_NL: bool, the positions that count; None: all. The others are only context.

        Raises:
          ValueError: the judge takes only text, or an id is out of range.
        """

    def score_text(self, texts: Sequence[Text]) -> Scores:
        """Tokenise and score texts; a token counts if its last character does.

        A text in which nothing counts has 0 tokens and 0 nats.
        """

    def features(self, texts: Sequence[Text]) -> np.ndarray:
        """The network's features at the last token of each text, float32 [N, D]; for MAUVE.

        Raises:
          ValueError: the judge has no features.
        """


def counted_characters(text: Text) -> np.ndarray:
    """Mask of the characters that count, bool [characters].

    Raises:
      ValueError: a span is outside the text.
    """
    length = len(text.text)
    if text.spans is None:
        return np.ones(length, bool)
    counted_C = np.zeros(length, bool)
    for start, end in text.spans:
        if not 0 <= start <= end <= length:
            raise ValueError(
                f"The span ({start}, {end}) is outside a text of {length} characters; expected "
                "0 <= start <= end <= length."
            )
        counted_C[start:end] = True
    return counted_C


def counted_tokens(
    texts: Sequence[Text], ends: Sequence[Sequence[int]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Masks of the tokens that count (those whose last character counts), and their sizes.

    A token owns the characters from the end of the previous token to its own end, so no character
    is counted twice. If several tokens make up one character, the first one owns it.

    Args:
      texts: N texts.
      ends: for each text, the index after the last character of each token.

    Returns:
      (masks bool [tokens], UTF-8 bytes of the owned characters int64 [tokens]), each a list of N.
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
    """Sum sizes over the counted tokens of each of N texts, int64 [N]."""
    pairs = zip(sizes, counted, strict=True)
    return np.asarray([part[counts].sum() for part, counts in pairs], np.int64)


def check_ids(
    tokens_NL: np.ndarray, counted_NL: np.ndarray | None, num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Check and convert ids and mask; return (int64 [N, L], bool [N, L]).

    Raises:
      ValueError: a shape is wrong, or an id is not in [0, num_tokens).
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
    """Yield batches of indices of the non-empty sequences, longest first.

    Sequences in a batch have similar lengths, which limits padding. Out-of-memory errors occur at
    the start.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    order = [i for i in order if lengths[i]]
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def hash_files(paths: Iterable[pathlib.Path]) -> str:
    """First 16 hex digits of the sha256 of the files' contents, in order of name."""
    content = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            while part := file.read(2**20):
                content.update(part)
    return content.hexdigest()[:16]
