"""Metrics of a training run, and progress of long work.

Metrics go to `metrics.jsonl` (one JSON object per line and step), to TensorBoard events and,
optionally, to Weights & Biases. With several processes the caller chooses the one that writes.
"""

import contextlib
import datetime
import json
import math
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fsdfm_jax import extras, io

_LOG_SECONDS = 5.0  # minimum time between lines of a Progress that isn't on a terminal


class MetricWriter:
    """Writes metrics of one training stage to files, and progress to stderr.

    A step is the number of optimiser steps completed, so `start_step` is the step of the restored
    checkpoint and the next line is later. Lines that a killed run wrote after `start_step` are
    removed from metrics.jsonl and hidden in TensorBoard; with 0 the file is emptied.

    Progress is a live bar on a terminal, otherwise one line per `write`. Rates count from the first
    `write` or `tick`, which excludes compilation.

    Args:
      directory: Gets `metrics.jsonl` and the folder `tensorboard`; made if needed.
      name: Of the stage; starts each line of progress.
      total_steps: Total steps of the stage, including those before `start_step`.
      tokens_per_step: Tokens per step, over all devices.
      start_step: Steps completed before this process.
      wandb: Weights & Biases project that also gets the metrics; "" for none.

    Raises:
      ValueError: `start_step` is not in 0 .. total_steps, or Weights & Biases can't be used.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        name: str,
        total_steps: int,
        tokens_per_step: int,
        start_step: int = 0,
        wandb: str = "",
    ):
        if not 0 <= start_step <= total_steps:
            raise ValueError(
                f"start_step must be 0 .. {total_steps} (total_steps), got {start_step}"
            )
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "metrics.jsonl"
        _keep_steps(self.path, start_step)
        self._events = _Events(directory / "tensorboard", start_step)
        self._wandb = _Wandb(directory, wandb, name, anew=not start_step) if wandb else None
        self._name, self._total, self._tokens = name, total_steps, tokens_per_step
        self._last_written = start_step if start_step else -1
        self._rate = _Rate(total_steps)
        self._loss = ""
        self._bar = _bar(name, total_steps, start_step) if sys.stderr.isatty() else None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, exc_type, *exc_info) -> None:
        # On a full disk this fails too; let the first exception propagate.
        with contextlib.suppress(OSError) if exc_type else contextlib.nullcontext():
            self.close()

    @property
    def steps_per_second(self) -> float:
        """Mean since the first `write` or `tick`; NaN before the second one."""
        return self._rate.per_second

    def write(
        self, step: int, metrics: Mapping[str, Any], *, timing: Mapping[str, float] | None = None
    ) -> None:
        """Write one line {"step", "time" (Unix seconds), name: value, ...} and show progress.

        Args:
          step: Steps completed; must increase from line to line.
          metrics: Name -> number (anything `float` accepts, including jax arrays). "loss" is shown.
          timing: Name -> number, for values that differ between runs; under the key "timing".

        Raises:
          ValueError: The step doesn't increase, or a metric is called "step", "time" or "timing".
        """
        step = int(step)
        if step <= self._last_written:
            raise ValueError(
                f"metrics must be written once per step, in order: got step {step} after "
                f"{self._last_written}; put all metrics of a step into one call"
            )
        if taken := {"step", "time", "timing"} & set(metrics):
            raise ValueError(f"metrics can't be named {sorted(taken)}: these keys are reserved")
        values = {key: float(value) for key, value in metrics.items()}
        now = time.time()
        io.append_jsonl(
            self.path,
            {"step": step, "time": round(now, 3)}
            | values
            | ({"timing": dict(timing)} if timing else {}),
        )
        self._events.add(step, values, now)
        if self._wandb is not None:
            self._wandb.add(step, values)
        self._last_written = step
        if "loss" in values:
            self._loss = f"loss {values['loss']:.4g}"
        self.tick(step)
        if self._bar is None:
            _log(f"{self._name} step {step}/{self._total} {self._speed()}")

    def tick(self, step: int) -> None:
        """Update the live bar and the rates; cheap enough for every step."""
        self._rate.update(step)
        if self._bar is not None:
            self._bar.update(completed=step, speed=self._speed())

    def close(self) -> None:
        """Flush the events and remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._events.close()
        if self._wandb is not None:
            self._wandb.close()

    def _speed(self) -> str:
        rate = self._rate.per_second
        speed = [f"{_short(rate)} steps/s", f"{_short(rate * self._tokens)} tokens/s"]
        parts = [self._loss, *speed, f"ETA {duration(self._rate.remaining)}"]
        return " ".join(part for part in parts if part)


class _Events:
    """TensorBoard scalars, on disk when `add` returns.

    `tensorboardX.SummaryWriter` uses a thread that dies on a full disk; training would soon block
    on it for ever.
    """

    def __init__(self, directory: pathlib.Path, start_step: int):
        # imported here: not every user of this module writes events
        with extras.needed("train", "Writing TensorBoard's events"):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._directory = directory
        directory.mkdir(exist_ok=True)
        # Hides older events from this step on.
        first = start_step + 1 if start_step else 0
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        with io.naming(directory):
            # File names have a resolution of a second; the suffix avoids collisions.
            self._file = EventsWriter(f"{directory}/events", filename_suffix=f".{start_step}")
            self._write(step=first, wall_time=time.time(), session_log=start)

    def add(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        value = self._summary.Value
        scalars = [value(tag=key, simple_value=number) for key, number in values.items()]
        self._write(step=step, wall_time=wall_time, summary=self._summary(value=scalars))

    def _write(self, **fields: Any) -> None:
        with io.naming(self._directory):
            self._file.write_event(self._event(**fields))
            self._file.flush()

    def close(self) -> None:
        with io.naming(self._directory):
            self._file.close()


class _Wandb:
    """A Weights & Biases run that a resumed training continues.

    Its id is stored in `directory`. The service drops steps that a killed run logged already; they
    are identical, since resuming repeats them bit for bit.
    """

    def __init__(self, directory: pathlib.Path, project: str, name: str, *, anew: bool):
        with extras.needed("wandb", "config.train.wandb"):
            import wandb
        path = directory / "wandb_id.txt"
        if anew or not path.is_file():
            io.write_text(path, uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=project, name=name, id=path.read_text(), resume="allow", dir=directory
            )
        except Exception as error:  # the library raises many types
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"Weights & Biases can't be used ({said[0][:200]}); run `wandb login`, set "
                "WANDB_MODE=offline, or leave config.train.wandb empty"
            ) from error

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Progress:
    """Progress of a long evaluation: a live bar on a terminal, otherwise a line every 5 seconds.

        with Progress("sampling base 1024 steps", total=64) as progress:
            progress.advance(32)

    Args:
      name: What is counted; starts each line.
      total: The final count.
    """

    def __init__(self, name: str, *, total: int):
        self._name, self._total, self._done = name, total, 0
        self._start = time.monotonic()
        self._logged = -math.inf
        self._rate = _Rate(total)
        self._bar = _bar(name, total, 0) if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, exc_type, *exc_info) -> None:
        elapsed = duration(time.monotonic() - self._start)
        if self._bar is not None:
            self._bar.stop()
        else:
            end = "took" if exc_type is None else f"stopped by {exc_type.__name__} after"
            _log(f"{self._name} {self._done}/{self._total} {end} {elapsed}")

    def advance(self, count: int = 1, *, remaining: float | None = None) -> None:
        """Counts `count` more as done.

        Args:
          count: How many.
          remaining: Seconds left, where the caller knows better than the mean speed so far.
        """
        self._done += count
        self._rate.update(self._done)
        speed = f"{_short(self._rate.per_second)}/s ETA {duration(self._rate.remaining)}"
        if remaining is not None:
            speed = f"ETA {duration(remaining)}"
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(completed=self._done, speed=speed)
        elif now - self._logged >= _LOG_SECONDS and self._done < self._total:
            self._logged = now
            _log(f"{self._name} {self._done}/{self._total} {speed}")


class _Rate:
    """Mean speed since the first update, which excludes compilation."""

    def __init__(self, total: int):
        self._total = total
        self._first: tuple[float, int] | None = None
        self._latest: tuple[float, int] = (0.0, 0)

    def update(self, done: int) -> None:
        self._latest = (time.monotonic(), done)
        self._first = self._first or self._latest

    @property
    def per_second(self) -> float:
        if self._first is None or self._latest[1] <= self._first[1]:
            return math.nan
        return (self._latest[1] - self._first[1]) / max(self._latest[0] - self._first[0], 1e-9)

    @property
    def remaining(self) -> float:
        """Seconds."""
        return max(self._total - self._latest[1], 0) / self.per_second


class _Bar:
    """A rich progress bar on stderr with a speed column; nested bars share one display."""

    def __init__(self, display, task):
        self._display, self._task = display, task

    def update(self, *, completed: int, speed: str) -> None:
        self._display.update(self._task, completed=completed, speed=speed)

    def stop(self) -> None:
        _bars.remove(self)
        if not _bars:
            self._display.stop()
        else:  # outer bars stay on the terminal
            self._display.remove_task(self._task)


_bars: list[_Bar] = []  # bars on the terminal, outermost first


def _bar(name: str, total: int, completed: int) -> _Bar:
    display = _bars[0]._display if _bars else _display()
    task = display.add_task(name, total=total, completed=completed, speed="")
    _bars.append(_Bar(display, task))
    return _bars[-1]


def _display():
    import rich.console
    import rich.progress

    display = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[speed]}", markup=False),
        console=rich.console.Console(file=sys.stderr),
        expand=True,
        refresh_per_second=4,
    )
    display.start()
    return display


def _log(line: str) -> None:
    # not absl.logging, whose default level hides this outside absl programs
    print(line, file=sys.stderr, flush=True)


def _short(value: float) -> str:
    """Three digits: 0.0123, 1.23, 12.3, 123, 45.1k, 1.2M; "-" for NaN."""
    if math.isnan(value):
        return "-"
    suffixes = ["", "k", "M", "G"]
    while value >= 999.5 and len(suffixes) > 1:
        value /= 1000
        suffixes.pop(0)
    return f"{value:.3g}{suffixes[0]}"


def duration(seconds: float) -> str:
    """0:01:20, or "-" where unknown."""
    return str(datetime.timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "-"


def _keep_steps(path: pathlib.Path, start_step: int) -> None:
    """Atomically remove lines after `start_step` (all for 0) and any incomplete line."""
    if not path.exists():
        return
    lines = [
        json.dumps(record) + "\n"
        for record in io.read_jsonl(path)
        if start_step and record["step"] <= start_step
    ]
    if (text := "".join(lines)) != path.read_text(encoding="utf-8", errors="replace"):
        io.write_text(path, text)
