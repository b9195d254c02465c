"""Show samples during refinement: in place on a terminal, as plain lines elsewhere."""

import contextlib
import time
from collections.abc import Iterator
from typing import TextIO

import numpy as np

from fsdfm_jax.inference.job import Job, Row
from fsdfm_jax.inference.stream import Piece, pieces, printable, readable

_LIVE_SAMPLES = 4  # rows in the live view
_MIN_FRAME, _MAX_SLOWDOWN = 0.15, 3.0  # seconds; without a delay small models finish unseen
_STYLES = {"given": "bold", "masked": "dim", "changed": "black on green", "kept": ""}


class View:
    """Prints the text of a batch's first sample after each step.

    Args:
      job: the job being drawn.
      out: the output stream.
    """

    def __init__(self, job: Job, out: TextIO):
        self._job, self._out = job, out
        self._rows: list[Row] = []
        self._frozen_BL = self._now_BL = np.zeros((0, 0), bool)

    def on_step(
        self, rows: list[Row], frozen_BL: np.ndarray, step: int, tokens_BL: np.ndarray
    ) -> None:
        """Show a step; a `job.OnStep`."""
        changed_BL = np.zeros_like(frozen_BL) if step == 0 else tokens_BL != self._now_BL
        self._rows, self._frozen_BL, self._now_BL = rows, frozen_BL, tokens_BL
        if step == 0:
            self.begin()
        else:
            self.show(step, changed_BL)
        if step == self._job.sampling.steps:
            self.end()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Context that restores the terminal at the end."""
        try:
            yield
        finally:
            self.end()

    def row_pieces(self, i: int, changed_BL: np.ndarray) -> list[Piece]:
        """Current pieces of row `i` of the batch."""
        shown = slice(self._rows[i].request.template.shown)
        return pieces(
            self._now_BL[i, shown],
            self._frozen_BL[i, shown],
            changed_BL[i, shown],
            self._job.process.source.mask_id,
            self._job.tokenizer,
        )

    def summary(self, step: int, changed_BL: np.ndarray, rows: int) -> str:
        """Return the step, and the number of tokens it changed in the first `rows` rows."""
        total = self._job.sampling.steps
        if not step:
            return f"step 0/{total}, noise"
        lengths = [row.request.template.shown for row in self._rows[:rows]]
        changed = sum(int(changed_BL[i, :length].sum()) for i, length in enumerate(lengths))
        return f"step {step}/{total}, {changed} of {sum(lengths)} tokens changed"

    def begin(self) -> None:
        """Called before the first step."""

    def end(self) -> None:
        """Called after the last step, or when drawing stops early."""

    def show(self, step: int, changed_BL: np.ndarray) -> None:
        """Called after step `step` = 1 .. S."""
        none_changed_BL = np.zeros_like(changed_BL)  # gives fewer pieces
        text = "".join(piece.text for piece in self.row_pieces(0, none_changed_BL))
        lines = [self.summary(step, changed_BL, 1)]
        lines += ["  " + line for line in readable(text).split("\n")]
        print("\n".join(lines), file=self._out, flush=True)


class LiveView(View):
    """Shows the first samples of a batch in place on a terminal, and clears them at the end."""

    _live = None

    def begin(self) -> None:
        """Show the noise."""
        import rich.console
        import rich.live

        console = rich.console.Console(file=self._out)
        self._live = rich.live.Live(console=console, auto_refresh=False, transient=True)
        self._live.start()
        self._frame = min(_MIN_FRAME, _MAX_SLOWDOWN / self._job.sampling.steps)
        self._due = time.monotonic()
        self.show(0, np.zeros_like(self._frozen_BL))

    def end(self) -> None:
        """Keep the last step on screen for a moment."""
        if self._live is not None:
            self._pause()
            self._live.stop()
            self._live = None

    def show(self, step: int, changed_BL: np.ndarray) -> None:
        """Replace the texts."""
        import rich.console
        import rich.panel
        import rich.text

        self._pause()
        rows = min(_LIVE_SAMPLES, len(self._rows))
        panels = []
        for i in range(rows):
            text = rich.text.Text()  # doesn't interpret markup
            for piece in self.row_pieces(i, changed_BL):
                text.append(printable(piece.text), _STYLES[piece.kind])
            panels.append(rich.panel.Panel(text, title=f"sample {self._rows[i].sample + 1}"))
        summary = rich.text.Text(self.summary(step, changed_BL, rows), "bold")
        if self._live is not None:
            self._live.update(rich.console.Group(summary, *panels), refresh=True)

    def _pause(self) -> None:
        time.sleep(max(self._due - time.monotonic(), 0))
        self._due = time.monotonic() + self._frame
