"""Metrics, progress and small files that a killed process never leaves half-written.

A run's metrics are `metrics.jsonl` (one JSON object a line, each step once) and TensorBoard events.
JSON has no NaN and no infinity: they are written as the strings "nan", "inf" and "-inf", which
`float()` reads back like any number.

With several processes only one of them writes; callers choose it.
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
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

_LOG_SECONDS = 5.0  # shortest time between two lines of a Progress that is not on a terminal


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replaces the file at once (UTF-8): readers and a kill see the old content or the new one.

    Folders are made where needed; the content is on the disk when this returns.
    """
    _replace(path, lambda file: file.write(text.encode()))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """`write_text` for content that is no text."""
    _replace(path, lambda file: file.write(content))


def write_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """`write_text` for an array in NumPy's .npy format."""
    _replace(path, lambda file: np.save(file, array))


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """`write_text` for named arrays in NumPy's .npz format, compressed."""
    _replace(path, lambda file: np.savez_compressed(file, **arrays))


def _replace(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, hence on one file system; other hosts may have a process of this number.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _naming(path), open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """Lets the errors of a file that is open say which it is, as a full disk doesn't."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """`write_text` of indented JSON; NaN and infinities become strings (see the module)."""
    write_text(path, json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """The value in a file that `write_json` wrote."""
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def append_jsonl(path: str | os.PathLike, obj: Any) -> None:
    """Adds one line of JSON; first cuts off a last line that a killed process left unfinished."""
    path = pathlib.Path(path)
    line = json.dumps(_plain(obj), allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path), open(path, "a+b") as file:
        _drop_torn_line(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: str | os.PathLike) -> list[Any]:
    """All complete lines of a file; one without its newline, at the end, was torn and is ignored.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: A complete line is no JSON.
    """
    lines = pathlib.Path(path).read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(
                f"{path} line {number} is no JSON: {error}; remove the line"
            ) from error
    return records


class MetricWriter:
    """Metrics of one training stage, to files and as progress on stderr.

    A step is the number of optimiser steps completed, so `start_step` is the step of the restored
    checkpoint and the next line is later than it. Lines that a killed run wrote after `start_step`
    are removed from metrics.jsonl and hidden in TensorBoard; with 0 the file starts anew.

    On a terminal progress is a live bar, elsewhere one line for each `write`. Rates count from the
    first `write` or `tick`, which leaves compilation out.

    Args:
      directory: Gets `metrics.jsonl` and the folder `tensorboard`; made where needed.
      name: Of the stage, in front of the progress.
      total_steps: Steps of the finished stage, those before `start_step` included.
      tokens_per_step: Tokens of one step, over all devices.
      start_step: Steps completed before this process.

    Raises:
      ValueError: `start_step` is not within 0 .. total_steps.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        name: str,
        total_steps: int,
        tokens_per_step: int,
        start_step: int = 0,
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
        self._name, self._total, self._tokens = name, total_steps, tokens_per_step
        self._last_written = start_step if start_step else -1
        self._rate = _Rate(total_steps)
        self._loss = ""
        self._bar = _bar(name, total_steps, start_step) if sys.stderr.isatty() else None

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, exc_type, *exc_info) -> None:
        # On a full disk this fails too; what went wrong first is what must be told.
        with contextlib.suppress(OSError) if exc_type else contextlib.nullcontext():
            self.close()

    @property
    def steps_per_second(self) -> float:
        """Mean since the first `write` or `tick`; NaN before there is a second one."""
        return self._rate.per_second

    def write(
        self, step: int, metrics: Mapping[str, Any], *, timing: Mapping[str, float] | None = None
    ) -> None:
        """Writes one line {"step", "time" (Unix seconds), name: value, ...} and shows progress.

        Args:
          step: Steps completed, larger than in any line before.
          metrics: Name -> number (anything `float` takes; a jax array is waited for). "loss" is
            shown.
          timing: Name -> number of what differs from run to run, under the key "timing".

        Raises:
          ValueError: The step is not larger, or a metric is called "step", "time" or "timing".
        """
        step = int(step)
        if step <= self._last_written:
            raise ValueError(
                f"metrics are written once a step, in order: got step {step} after "
                f"{self._last_written}; put all metrics of a step into one call"
            )
        if taken := {"step", "time", "timing"} & set(metrics):
            raise ValueError(f"metrics may not be called {sorted(taken)}: the line has these keys")
        values = {key: float(value) for key, value in metrics.items()}
        now = time.time()
        append_jsonl(
            self.path,
            {"step": step, "time": round(now, 3)}
            | values
            | ({"timing": dict(timing)} if timing else {}),
        )
        self._events.add(step, values, now)
        self._last_written = step
        if "loss" in values:
            self._loss = f"loss {values['loss']:.4g}"
        self.tick(step)
        if self._bar is None:
            _log(f"{self._name} step {step}/{self._total} {self._speed()}")

    def tick(self, step: int) -> None:
        """Moves the live bar and counts towards the rates; cheap, for every step."""
        self._rate.update(step)
        if self._bar is not None:
            self._bar.update(completed=step, speed=self._speed())

    def close(self) -> None:
        """Flushes the events and takes the bar off the terminal's last line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._events.close()

    def _speed(self) -> str:
        rate = self._rate.per_second
        speed = [f"{_short(rate)} steps/s", f"{_short(rate * self._tokens)} tokens/s"]
        parts = [self._loss, *speed, f"ETA {_duration(self._rate.remaining)}"]
        return " ".join(part for part in parts if part)


class _Events:
    """Scalars for TensorBoard, on the disk when `add` returns.

    `tensorboardX.SummaryWriter` has a thread for that, which ends on a full disk: after a few more
    lines training would wait for it for ever.
    """

    def __init__(self, directory: pathlib.Path, start_step: int):
        # imported late: not every user of this file writes events
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._directory = directory
        directory.mkdir(exist_ok=True)
        # From this step on, older events are hidden.
        first = start_step + 1 if start_step else 0
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        with _naming(directory):
            # Names have only seconds: quick restarts collided.
            self._file = EventsWriter(f"{directory}/events", filename_suffix=f".{start_step}")
            self._write(step=first, wall_time=time.time(), session_log=start)

    def add(self, step: int, values: Mapping[str, float], wall_time: float) -> None:
        value = self._summary.Value
        scalars = [value(tag=key, simple_value=number) for key, number in values.items()]
        self._write(step=step, wall_time=wall_time, summary=self._summary(value=scalars))

    def _write(self, **fields: Any) -> None:
        with _naming(self._directory):
            self._file.write_event(self._event(**fields))
            self._file.flush()

    def close(self) -> None:
        with _naming(self._directory):
            self._file.close()


class Progress:
    """Counter of a long evaluation: a live bar on a terminal, else a line every five seconds.

        with Progress("sampling base 1024 steps", total=64) as progress:
            progress.advance(32)

    Args:
      name: What is counted, in front of the numbers.
      total: Count of the finished work.
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
        elapsed = _duration(time.monotonic() - self._start)
        if self._bar is not None:
            self._bar.stop()
        else:
            end = "took" if exc_type is None else f"stopped by {exc_type.__name__} after"
            _log(f"{self._name} {self._done}/{self._total} {end} {elapsed}")

    def advance(self, count: int = 1) -> None:
        """Counts `count` more as done."""
        self._done += count
        self._rate.update(self._done)
        speed = f"{_short(self._rate.per_second)}/s ETA {_duration(self._rate.remaining)}"
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(completed=self._done, speed=speed)
        elif now - self._logged >= _LOG_SECONDS and self._done < self._total:
            self._logged = now
            _log(f"{self._name} {self._done}/{self._total} {speed}")


class _Rate:
    """Mean speed since the first update: what came before it is compilation, not speed."""

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
    """One rich bar on stderr, with one text of speeds; bars inside others share one display."""

    def __init__(self, display, task):
        self._display, self._task = display, task

    def update(self, *, completed: int, speed: str) -> None:
        self._display.update(self._task, completed=completed, speed=speed)

    def stop(self) -> None:
        _bars.remove(self)
        if not _bars:
            self._display.stop()
        else:  # the bars around it stay on the terminal
            self._display.remove_task(self._task)


_bars: list[_Bar] = []  # those on the terminal, the outermost first


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
    # not absl: its default level hides this outside of absl programs
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


def _duration(seconds: float) -> str:
    """0:01:20, or "-" where unknown."""
    return str(datetime.timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "-"


def _plain(obj: Any) -> Any:
    """Floats that JSON lacks as strings and numpy or jax scalars as numbers, at any depth."""
    if getattr(obj, "ndim", None) == 0 and hasattr(obj, "item"):
        obj = obj.item()
    if isinstance(obj, float) and not math.isfinite(obj):
        return str(obj)
    if isinstance(obj, Mapping):
        return {key: _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    return obj


def _drop_torn_line(file) -> None:
    """Truncates an open binary file after its last newline."""
    end = size = file.seek(0, os.SEEK_END)
    while end:
        start = max(end - 4096, 0)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)


def _keep_steps(path: pathlib.Path, start_step: int) -> None:
    """Removes the lines of steps after `start_step` (all for 0) and a torn one, atomically."""
    if not path.exists():
        return
    lines = [
        json.dumps(record) + "\n"
        for record in read_jsonl(path)
        if start_step and record["step"] <= start_step
    ]
    if (text := "".join(lines)) != path.read_text(encoding="utf-8", errors="replace"):
        write_text(path, text)
