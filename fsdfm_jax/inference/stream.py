"""A block on its way from noise to text, cut into pieces that can be shown.

A terminal (fsdfm_jax/generate.py), a log file (`text_lines`) and the evaluation's page
(fsdfm_jax/evaluate/report/page.py) show the same pieces.
"""

import itertools
import unicodedata
from typing import NamedTuple

import numpy as np

from fsdfm_jax.data.tokenizer import Tokenizer

MASKED = "░"  # a masked token
# As `git diff --word-diff` marks what is new: plain characters, so that every log keeps them.
_MARKS = ("{+", "+}")


class Piece(NamedTuple):
    """A stretch of a text that is on its way; kind: "given", "masked", "changed" or "kept"."""

    text: str
    kind: str


class Trajectory(NamedTuple):
    """One sample at some of its steps.

    Attributes:
      tokens_TL: int [T, L]; the noise, then the tokens after each shown step.
      steps: T numbers of steps, 0 for the noise and k after step k; the last is the sampler's S.
      times: T times t in [0, 1].
      frozen_L: bool [L], the tokens that were given.
    """

    tokens_TL: np.ndarray
    steps: tuple[int, ...]
    times: tuple[float, ...]
    frozen_L: np.ndarray


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Text without characters that steer a terminal: "\x1b" becomes four harmless ones."""
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ("Cc", "Cs") and char not in keep
        else char
        for char in text
    )


def readable(text: str) -> str:
    """Text with a dot for each character that is none to a reader: noise is full of them."""
    return "".join(
        "·"
        if char == "\ufffd" or (unicodedata.category(char) in ("Cc", "Cs") and char != "\n")
        else char
        for char in text
    )


def pieces(
    tokens_L: np.ndarray,
    given_L: np.ndarray,
    changed_L: np.ndarray,
    mask_id: int | None,
    tokenizer: Tokenizer,
) -> list[Piece]:
    """Text between two steps, cut where the state of its tokens changes.

    A character whose bytes lie in two pieces shows as replacement characters.

    Args:
      tokens_L: int [L], may hold the mask id.
      given_L, changed_L: bool [L].
      mask_id: shown as a block a token.
      tokenizer: of the other tokens.
    """
    kinds_L = np.select(
        [given_L, tokens_L == (-1 if mask_id is None else mask_id), changed_L],
        ["given", "masked", "changed"],
        "kept",
    ).tolist()
    result = []
    for kind, group in itertools.groupby(range(len(tokens_L)), key=kinds_L.__getitem__):
        ids = tokens_L[list(group)].tolist()
        result.append(Piece(MASKED * len(ids) if kind == "masked" else tokenizer.decode(ids), kind))
    return result


def changes(trajectory: Trajectory) -> np.ndarray:
    """bool [T, L]: the tokens that differ from those of the frame before; none of the noise."""
    tokens_TL = np.asarray(trajectory.tokens_TL)
    changed_TL = np.zeros(tokens_TL.shape, bool)
    changed_TL[1:] = tokens_TL[1:] != tokens_TL[:-1]
    return changed_TL


def frames(trajectory: Trajectory, mask_id: int | None, tokenizer: Tokenizer) -> list[list[Piece]]:
    """The pieces of each of the T frames; "changed" is against the frame before.

    Raises:
      ValueError: if the parts of the trajectory are not of one length.
    """
    tokens_TL, frozen_L = np.asarray(trajectory.tokens_TL), np.asarray(trajectory.frozen_L)
    lengths = (len(trajectory.steps), len(trajectory.times), *frozen_L.shape)
    if tokens_TL.ndim != 2 or lengths != (len(tokens_TL), *tokens_TL.shape):
        raise ValueError(
            "A trajectory has tokens [T, L], T steps, T times and L flags of given tokens; got "
            f"tokens {list(tokens_TL.shape)}, {lengths[0]} steps, {lengths[1]} times and flags "
            f"{list(frozen_L.shape)}."
        )
    return [
        pieces(tokens_L, frozen_L, changed_L, mask_id, tokenizer)
        for tokens_L, changed_L in zip(tokens_TL, changes(trajectory), strict=True)
    ]


def thin(trajectory: Trajectory, count: int) -> Trajectory:
    """At most `count` >= 2 of the frames: the first, the last and others evenly between them."""
    total = len(trajectory.steps)
    if total <= count:
        return trajectory
    kept = np.linspace(0, total - 1, count).round().astype(int).tolist()
    return trajectory._replace(
        tokens_TL=np.asarray(trajectory.tokens_TL)[kept],
        steps=tuple(trajectory.steps[i] for i in kept),
        times=tuple(trajectory.times[i] for i in kept),
    )


def captions(trajectory: Trajectory) -> list[str]:
    """A line for each frame: "step 3 of 8, t=0.375, 21 tokens changed".

    Where steps are left out it says so: "step 8 of 8, t=1, 30 tokens differ from step 4" counts
    a token once that changed twice in between, and one that changed back not at all.
    """
    total = trajectory.steps[-1] if trajectory.steps else 0
    counts = changes(trajectory).sum(axis=1).tolist()
    lines, before = [], 0
    for step, time, count in zip(trajectory.steps, trajectory.times, counts, strict=True):
        line = f"step {step} of {total}, t={time:.3g}"
        if not step:
            line += ", noise"
        else:
            line += f", {count} token{'' if count == 1 else 's'} "
            line += "changed" if step - before == 1 else _difference(count, before)
        lines.append(line)
        before = step
    return lines


def _difference(count: int, before: int) -> str:
    return f"differ{'s' if count == 1 else ''} from " + (
        f"step {before}" if before else "the noise"
    )


def text_lines(trajectory: Trajectory, mask_id: int | None, tokenizer: Tokenizer) -> list[str]:
    """The trajectory as lines of plain text: a block for each frame, its caption first.

    What has changed stands between {+ and +}; the lines of the text are indented.
    """
    lines = []
    shown = zip(captions(trajectory), frames(trajectory, mask_id, tokenizer), strict=True)
    for caption, cut in shown:
        text = "".join(
            piece.text.join(_MARKS) if piece.kind == "changed" else piece.text for piece in cut
        )
        lines.append(caption)
        lines += ["  " + line for line in printable(text).split("\n")]
    return lines
