"""Metrics, progress lines and files under kills, resumes, terminals and pipes."""

import io
import json
import math
import os
import re
import sys
import time

import numpy as np
import pytest

from fsdfm_jax.io import append_jsonl, read_jsonl, write_bytes, write_json, write_text
from fsdfm_jax.training import metrics as metrics_lib
from fsdfm_jax.training.metrics import MetricWriter, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock controlled by the test: `clock.now += seconds`."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(metrics_lib.time, "monotonic", lambda: Clock.now)
    return Clock


def metric_writer(directory, **changes):
    values = {"name": "distill", "total_steps": 100, "tokens_per_step": 1000}
    return MetricWriter(directory, **values | changes)


def events(directory):
    """[(tag, step, value)] of all event files, and the purge steps."""
    from tensorboardX.proto.event_pb2 import Event

    scalars, purged = [], []
    for path in sorted((directory / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length u64, crc u32, payload, crc u32
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            if event.session_log.status:
                purged.append(event.step)
            scalars += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return scalars, purged


def test_text_and_json_replace_the_file(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"b": [1, float("nan")], "a": np.float32(0.5), "n": np.int64(3)})
    assert json.loads(path.read_text()) == {"b": [1, "nan"], "a": 0.5, "n": 3}
    write_text(path, "größer\n")
    assert path.read_text(encoding="utf-8") == "größer\n"
    write_bytes(path, b"\xff\n")
    assert path.read_bytes() == b"\xff\n"
    assert os.listdir(path.parent) == ["a.json"]


def test_a_failed_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fsync(_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(metrics_lib.os, "fsync", fsync)
        with pytest.raises(OSError, match="disk full"):
            write_text(path, "new")
    assert path.read_text() == "old"
    with pytest.raises(TypeError):
        write_json(path, {"f": print})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_torn_line_is_ignored_and_cut_by_the_next_append(tmp_path):
    path = tmp_path / "a.jsonl"
    for torn in ('{"x": 2', '{"x": 22}', "x" * 10_000, "ü"):
        path.write_bytes(b'{"x": 1}\n' + torn.encode())
        assert read_jsonl(path) == [{"x": 1}]
        append_jsonl(path, {"x": 3})
        assert path.read_text() == '{"x": 1}\n{"x": 3}\n'
    path.write_text('{"x"')  # torn in its only line
    append_jsonl(path, {"x": 3})
    assert path.read_text() == '{"x": 3}\n'


def test_bad_complete_line_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\nnope\n')
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 isn't valid JSON"):
        read_jsonl(path)
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "missing")


def test_metrics_go_to_jsonl_and_tensorboard(tmp_path, capsys):
    before = time.time()
    with metric_writer(tmp_path) as metrics:
        metrics.write(1, {"loss": np.float32(2.5), "grad_norm": 1})
        metrics.write(2, {"loss": float("nan"), "a": math.inf, "b": -math.inf})
    first, second = read_jsonl(tmp_path / "metrics.jsonl")
    assert before - 1 < first.pop("time") < time.time() + 1
    assert first == {"step": 1, "loss": 2.5, "grad_norm": 1.0}
    assert (second["loss"], second["a"], second["b"]) == ("nan", "inf", "-inf")
    assert math.isnan(float(second["loss"]))
    scalars, _ = events(tmp_path)
    assert scalars[:2] == [("loss", 1, 2.5), ("grad_norm", 1, 1.0)]
    assert scalars[3] == ("a", 2, math.inf)
    assert "distill step 1/100 loss 2.5" in capsys.readouterr().err


def test_resume_drops_later_and_torn_lines(tmp_path):
    with metric_writer(tmp_path) as metrics:
        for step in (10, 20, 30, 40):
            metrics.write(step, {"loss": step / 3})
    path = tmp_path / "metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)[:2]
    with open(path, "a") as file:
        file.write('{"step": 50, "lo')
    with metric_writer(tmp_path, start_step=20) as metrics:
        assert path.read_text() == "".join(kept)
        metrics.write(30, {"loss": 9.0})
    assert [line["step"] for line in read_jsonl(path)] == [10, 20, 30]
    assert read_jsonl(path)[-1]["loss"] == 9.0
    assert events(tmp_path)[1] == [0, 21]  # TensorBoard hides steps >= 21 of the first run
    with metric_writer(tmp_path) as metrics:  # from the start: nothing of the old run stays
        assert path.read_text() == ""
        metrics.write(0, {"loss": 1.0})
    assert [line["step"] for line in read_jsonl(path)] == [0]


def test_bad_use(tmp_path):
    with pytest.raises(ValueError, match=r"start_step must be 0 \.\. 100"):
        metric_writer(tmp_path, start_step=101)
    with metric_writer(tmp_path, start_step=5) as metrics:
        for step in (5, 4):
            with pytest.raises(ValueError, match=f"got step {step} after 5"):
                metrics.write(step, {})
        with pytest.raises(ValueError, match=r"can.t be named \['time'\]"):
            metrics.write(6, {"time": 1.0})


def test_rates_leave_compilation_out(tmp_path, clock, capsys):
    with metric_writer(tmp_path, start_step=10) as metrics:
        clock.now += 500  # compilation
        metrics.tick(11)
        assert math.isnan(metrics.steps_per_second)
        clock.now += 9
        metrics.write(29, {"loss": 3.21})
        clock.now += 1
        metrics.write(31, {"loss": 3.2})
        assert metrics.steps_per_second == 2.0
    first, second = capsys.readouterr().err.splitlines()
    assert first == "distill step 29/100 loss 3.21 2 steps/s 2k tokens/s ETA 0:00:36"
    assert second.endswith("step 31/100 loss 3.2 2 steps/s 2k tokens/s ETA 0:00:34")


def test_first_line_has_no_rate(tmp_path, clock, capsys):
    with metric_writer(tmp_path) as metrics:
        metrics.write(1, {"accuracy": 0.5})
    assert capsys.readouterr().err == "distill step 1/100 - steps/s - tokens/s ETA -\n"


def test_terminal_shows_one_live_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with metric_writer(tmp_path) as metrics:
        for step in range(1, 51):
            metrics.tick(step)
        metrics.write(51, {"loss": 1.25})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    last = text.strip().splitlines()[-1]
    for part in ("distill", "51/100", "loss 1.25", "steps/s", "tokens/s", "ETA"):
        assert part in last
    assert "\x1b[?25h" in terminal.getvalue()  # the cursor is back
    assert "step 51/100" not in text
    with Progress("sampling [base]", total=4) as progress:
        progress.advance(4)
    assert "sampling [base]" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()


def test_bars_inside_others_share_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("points", total=3) as points:
        for name in ("first", "second"):
            with Progress(name, total=2) as samples:
                samples.advance(2)
            points.advance()
    assert not metrics_lib._bars
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    for part in ("points", "2/3", "first", "second"):
        assert part in text
    assert text.strip().splitlines()[-1].startswith("points")


def test_progress_lines_are_rare(clock, capsys):
    with Progress("sampling base 1024 steps", total=100) as progress:
        clock.now += 60
        for _ in range(100):
            clock.now += 0.5
            progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11  # at 0.5, 5.5, ... 45.5 seconds, and the end
    assert lines[0] == "sampling base 1024 steps 1/100 -/s ETA -"
    assert lines[1] == "sampling base 1024 steps 11/100 2/s ETA 0:00:44"
    assert lines[-1] == "sampling base 1024 steps 100/100 took 0:01:50"


def test_progress_tells_when_it_was_stopped(capsys):
    def work():
        with Progress("x", total=4) as progress:
            progress.advance(2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert capsys.readouterr().err.splitlines()[-1] == "x 2/4 stopped by RuntimeError after 0:00:00"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (12.34, "12.3"), (999.7, "1k"), (45_100, "45.1k"), (1.2e6, "1.2M")],
)
def test_short_numbers(value, text):
    assert metrics_lib._short(value) == text


# ------------------------------------------------------------------------------- Weights & Biases
class FakeWandb:
    """Records calls of the library."""

    def __init__(self):
        self.runs, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.runs.append(options)
        return self

    def log(self, values, *, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_weights_and_biases_gets_the_metrics_too(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with metric_writer(tmp_path, wandb="fsdfm") as writer:
        writer.write(20, {"loss": np.float32(0.5)})
    with metric_writer(tmp_path, wandb="fsdfm", start_step=20) as writer:
        writer.write(40, {"loss": 0.25})
    assert fake.logged == [(20, {"loss": 0.5}), (40, {"loss": 0.25})]
    assert fake.finished == 2
    first, second = fake.runs
    assert first == second  # one run there: the id stays
    assert (first["project"], first["name"], first["resume"]) == ("fsdfm", "distill", "allow")
    assert [scalar[:2] for scalar in events(tmp_path)[0]] == [("loss", 20), ("loss", 40)]
    metric_writer(tmp_path, wandb="fsdfm").close()  # trained from scratch
    assert fake.runs[2]["id"] != first["id"]


def test_weights_and_biases_is_off_and_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    metric_writer(tmp_path).close()
    with pytest.raises(
        ValueError, match=r'wandb needs wandb; run: pip install "fsdfm_jax\[wandb\]'
    ):
        metric_writer(tmp_path, wandb="fsdfm")
    fake = FakeWandb()

    def refuse(**options):
        raise RuntimeError("api_key not configured\nmore")

    fake.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ValueError, match=r"\(api_key not configured\); run `wandb login`"):
        metric_writer(tmp_path, wandb="fsdfm")
