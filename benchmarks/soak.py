"""Hours of training in one working directory, stopped and resumed: does anything grow or slow down?

    python -m benchmarks.soak --minutes=120 --segment_minutes=20 --output=soak.json

Runs a stage of the smoke configuration with no end in sight. Every segment is one process, ended by
SIGTERM and followed by the same command. While it runs, its resident memory and its step are noted;
printed are, of each segment, steps per second, memory a minute after its first steps and at the
end, and the slope between them in MiB an hour.
"""

import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks import measure

_MINUTES = flags.DEFINE_float("minutes", 120.0, "Of all segments together.", lower_bound=0.0)
_SEGMENT = flags.DEFINE_float("segment_minutes", 20.0, "Of one process.", lower_bound=0.0)
_STAGE = flags.DEFINE_string("stage", "pretrain", "Stage that is trained; needs no base weights.")
_EVERY = flags.DEFINE_float("every", 10.0, "Seconds between two looks at the process.")
# After its first new line of metrics, before its memory says something: caches fill up.
_WARM_SECONDS = 60.0
_PAGE_MIB = 4096 / 2**20


def command(workdir: pathlib.Path) -> list[str]:
    """The training command, the same for all segments."""
    stage = _STAGE.value
    changes = {
        "pipeline": stage,
        f"{stage}.num_steps": 100_000_000,
        f"{stage}.warmup_steps": 10,
        f"{stage}.ema_decay": 0.99,
        "train.checkpoint_every": 500,
        "train.log_every": 50,
    }
    return [
        *(sys.executable, "-m", "fsdfm_jax.main", "--config=configs/tiny.py:smoke", "--noevaluate"),
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in changes.items()),
    ]


def last_line(workdir: pathlib.Path) -> dict:
    """The newest complete line of the metrics, {} before there is one."""
    path = workdir / "stages" / _STAGE.value / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1]) if lines else {}


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_MIB


def segment(workdir: pathlib.Path, seconds: float) -> dict:
    """Runs one process for so long; what was seen of it."""
    before = last_line(workdir).get("step", 0)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command(workdir), stdout=log, stderr=log)
        began, seen = time.monotonic(), []
        while time.monotonic() - began < seconds and process.poll() is None:
            time.sleep(_EVERY.value)
            line = last_line(workdir)
            if process.poll() is None and line.get("step", 0) > before:
                now = time.monotonic() - began
                seen.append((now, resident_mib(process.pid), line["step"], line["loss"]))
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        if code != 143 and seen:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise RuntimeError(f"A segment ended with {code}, expected 143 after SIGTERM.")
    if not seen:
        raise RuntimeError(
            f"A segment of {seconds:.0f} s got nowhere; --segment_minutes is too short."
        )
    until_warm = seen[0][0] + min(_WARM_SECONDS, seconds / 4)
    warm = np.asarray([row for row in seen if row[0] >= until_warm])
    hours = (warm[:, 0] - warm[0, 0]) / 3600
    return {
        "first_step": int(seen[0][2]),
        "last_step": int(seen[-1][2]),
        "steps_per_s": float((warm[-1, 2] - warm[0, 2]) / (warm[-1, 0] - warm[0, 0])),
        "warm_mib": float(warm[0, 1]),
        "end_mib": float(warm[-1, 1]),
        "mib_per_hour": float(np.polyfit(hours, warm[:, 1], 1)[0]),
        "loss": float(seen[-1][3]),
        "seen": seen,
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    end, table = time.monotonic() + 60 * _MINUTES.value, []
    with tempfile.TemporaryDirectory() as folder:
        while (left := end - time.monotonic()) > 0.5 * 60 * _SEGMENT.value:
            table.append(segment(pathlib.Path(folder) / "run", min(left, 60 * _SEGMENT.value)))
            row = {key: value for key, value in table[-1].items() if key != "seen"}
            print(json.dumps(row), flush=True)
            measure.write({"machine": measure.machine(), "segments": table})
        kept = sorted(p.name for p in (pathlib.Path(folder) / "run").rglob("*tmp*"))
        print(f"temporary files left: {kept or 'none'}")


if __name__ == "__main__":
    app.run(main)
