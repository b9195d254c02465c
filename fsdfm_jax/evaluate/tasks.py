"""Tasks: the tokens of a held-out block that are given to a model.

    unconditional     none
    continuation      the first 512 tokens, as in the paper with blocks of 1,024
    prefix:K          the first K tokens
    random:SHARE      this fraction of the tokens, at random positions
    infill:COUNTxN    all except COUNT gaps of N tokens each

The given positions depend only on the task and the sample index: they are the same for every model,
seed and number of steps. Only the other positions are scored.
"""

import codecs
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.evaluate.judges.scoring import Text

UNCONDITIONAL = "unconditional"
CONTINUATION = "continuation"
_CONTINUED = 512  # tokens given by the paper's protocol, arXiv:2509.20624
_FORMS = "'unconditional', 'continuation', 'prefix:K', 'random:SHARE' or 'infill:COUNTxN'"


class Task(NamedTuple):
    """A task.

    Attributes:
      name: as in the configuration.
      left_to_right: whether an autoregressive network can do it.
      freeze: (generator, length) -> bool [L], the positions given to one sample.
    """

    name: str
    left_to_right: bool
    freeze: Callable[[np.random.Generator, int], np.ndarray]

    def frozen(self, num_samples: int, length: int) -> np.ndarray:
        """Return the given positions of each sample, bool [N, L].

        Raises:
          ValueError: if the task doesn't fit the length.
        """
        rows = [self.freeze(np.random.default_rng([0, i]), length) for i in range(num_samples)]
        return np.stack(rows)


def parse(name: str) -> Task:
    """Parse the name of a task.

    Raises:
      ValueError: for another form or numbers out of range.
    """
    kind, _, argument = name.partition(":")
    try:
        if name == UNCONDITIONAL:
            return Task(name, True, lambda rng, length: np.zeros(length, bool))
        if name == CONTINUATION:
            return Task(name, True, _prefix(name, _CONTINUED))
        if kind == "prefix" and int(argument) >= 1:
            return Task(name, True, _prefix(name, int(argument)))
        if kind == "random" and 0 < float(argument) < 1:
            return Task(name, False, _random(float(argument)))
        if kind == "infill":
            count, size = map(int, argument.split("x"))
            if count >= 1 and size >= 1:
                return Task(name, False, _infill(count, size))
    except ValueError:
        pass
    raise ValueError(f"Unknown task {name!r}; expected {_FORMS}, all numbers above 0, SHARE < 1.")


def _prefix(name: str, count: int):
    def freeze(rng, length):
        if count >= length:
            raise ValueError(f"{name} gives {count} tokens, which fills blocks of {length}.")
        return np.arange(length) < count

    return freeze


def _random(share: float):
    def freeze(rng, length):
        given = min(max(round(share * length), 1), length - 1)
        return rng.permutation(length) < given

    return freeze


def _infill(count: int, size: int):
    def freeze(rng, length):
        spare = length - count * size - (count - 1)  # at least one given token between two gaps
        if spare < 0:
            raise ValueError(
                f"infill:{count}x{size} needs {count * size + count - 1} tokens, but blocks have "
                f"{length}."
            )
        # Distribute the spare given tokens before, between and after the gaps.
        cuts = np.sort(rng.integers(0, spare + 1, size=count))
        starts = cuts + np.arange(count) * (size + 1)
        frozen = np.ones(length, bool)
        for start in starts:
            frozen[start : start + size] = False
        return frozen

    return freeze


def texts(tokens_NL: np.ndarray, counted_NL: np.ndarray, tokenizer: Tokenizer) -> list[Text]:
    """Decode samples for a judge with another tokenizer, with the spans that count.

    A character with bytes on both sides of a boundary belongs to the span it ends in. A replacement
    character for invalid UTF-8 belongs to the span where the invalid bytes start.

    Args:
      tokens_NL: int [N, L].
      counted_NL: bool [N, L], the generated positions.
    """
    return [_text(*row, tokenizer) for row in zip(tokens_NL, counted_NL, strict=True)]


def _text(tokens_L: np.ndarray, counted_L: np.ndarray, tokenizer: Tokenizer) -> Text:
    ids = tokens_L.tolist()
    text = tokenizer.decode(ids)
    if counted_L.all():
        return Text(text)
    edges = np.flatnonzero(np.diff(counted_L.astype(np.int8), prepend=0, append=0)).tolist()
    if tokenizer.token_bytes is None:
        offsets = [_offset(text, tokenizer.decode(ids[:edge])) for edge in edges]
    else:
        each = _offsets(text, (tokenizer.token_bytes[i] for i in ids))
        offsets = [each[edge] for edge in edges]
    spans = zip(offsets[::2], offsets[1::2], strict=True)
    return Text(text, tuple((start, end) for start, end in spans if start < end))


def _offset(text: str, head: str) -> int:
    """Number of characters of the text that `head`, its first ids decoded, completes."""
    # An unfinished character decodes to a replacement character that isn't in the whole text.
    while not text.startswith(head):
        head = head[:-1]
    return len(head)


def _offsets(text: str, pieces: Iterable[bytes]) -> list[int]:
    """`_offset` before each piece of the text and at its end, in one pass."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    complete, offsets = 0, [0]
    for piece in pieces:
        complete += len(decoder.decode(piece))
        held_back, _ = decoder.getstate()  # at most a few bytes
        head = held_back.decode(errors="replace")
        offsets.append(complete + _offset(text[complete : complete + len(head)], head))
    return offsets
