"""Display of a block at each step from noise to text, split into marked pieces.

The terminal (fsdfm_jax/generate.py), log files (`text_lines`) and the evaluation's page
(fsdfm_jax/evaluate/report/page.py) show the same pieces.
"""

import itertools
import unicodedata
from typing import NamedTuple

import numpy as np

from fsdfm_jax.data.tokenizer import Tokenizer

MASKED = "░"  # a masked token
# The marks of `git diff --word-diff` for new text: plain characters that survive in any log.
_MARKS = ("{+", "+}")


class Piece(NamedTuple):
    """A piece of intermediate text; `kind` is "given", "masked", "changed" or "kept"."""

    text: str
    kind: str


class Trajectory(NamedTuple):
    """One sample at some of its steps.

    Attributes:
      tokens_TL: int [T, L]; the noise, then the tokens after each shown step.
      steps: T step numbers, 0 for the noise and k after step k; the last is the sampler's S.
      times: T times t in [0, 1].
      frozen_L: bool [L], the given positions.
    """

    tokens_TL: np.ndarray
    steps: tuple[int, ...]
    times: tuple[float, ...]
    frozen_L: np.ndarray


def printable(text: str, keep: str = "\n\t") -> str:
    r"""Escape control characters: "\x1b" becomes four harmless characters."""
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ("Cc", "Cs") and char not in keep
        else char
        for char in text
    )


def readable(text: str) -> str:
    """Replace unprintable characters, which noise is full of, with dots."""
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
    """Split the text after a step into pieces of tokens with the same state.

    A character whose bytes are in two pieces shows as replacement characters.

    Args:
      tokens_L: int [L], may contain the mask id.
      given_L, changed_L: bool [L].
      mask_id: each mask token is shown as one block.
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
    """bool [T, L]: tokens that differ from the previous frame; all False for the noise."""
    tokens_TL = np.asarray(trajectory.tokens_TL)
    changed_TL = np.zeros(tokens_TL.shape, bool)
    changed_TL[1:] = tokens_TL[1:] != tokens_TL[:-1]
    return changed_TL


def frames(trajectory: Trajectory, mask_id: int | None, tokenizer: Tokenizer) -> list[list[Piece]]:
    """Split each of the T frames into pieces; "changed" is relative to the previous frame.

    Raises:
      ValueError: if the parts of the trajectory have different lengths.
    """
    tokens_TL, frozen_L = np.asarray(trajectory.tokens_TL), np.asarray(trajectory.frozen_L)
    lengths = (len(trajectory.steps), len(trajectory.times), *frozen_L.shape)
    if tokens_TL.ndim != 2 or lengths != (len(tokens_TL), *tokens_TL.shape):
        raise ValueError(
            "A trajectory must have tokens [T, L], T steps, T times and L flags of given tokens; "
            f"got tokens {list(tokens_TL.shape)}, {lengths[0]} steps, {lengths[1]} times and flags "
            f"{list(frozen_L.shape)}."
        )
    return [
        pieces(tokens_L, frozen_L, changed_L, mask_id, tokenizer)
        for tokens_L, changed_L in zip(tokens_TL, changes(trajectory), strict=True)
    ]


def thin(trajectory: Trajectory, count: int) -> Trajectory:
    """Keep at most `count` >= 2 frames: the first, the last and evenly spaced ones between."""
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
    """Return a caption for each frame: "step 3 of 8, t=0.375, 21 tokens changed".

    If steps are skipped: "step 8 of 8, t=1, 30 tokens differ from step 4". This counts a token that
    changed twice once, and one that changed back not at all.
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
    """Format the trajectory as plain text: for each frame, a caption and the indented text.

    Changed text is between {+ and +}.
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
