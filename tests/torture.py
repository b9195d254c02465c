"""A training run that is killed repeatedly must give the results of an undisturbed run.

Runs a program once undisturbed, and once in a separate working directory whose processes are killed
(SIGKILL, with all their children): at any time after their start, during training, or as soon as
the temporary folder of a checkpoint appears. The same command then resumes. After each kill, and at
the end, these conditions are checked:

- the next process starts from the newest complete checkpoint, and no complete one is lost;
- only the steps since the last save are lost: the save before the current one is complete;
- parameters, average and optimiser match the undisturbed run bit for bit, the metrics have each
  step once with the same values, and the same checkpoints are kept;
- no temporary folder is left, and no checkpoint is damaged.

If a run ends before all kills are used, another one starts. Times are drawn from a seed; the
progress of a process at that time depends on the machine.
"""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from fsdfm_jax import io
from fsdfm_jax.training import checkpoint

SAVED = ("step", "params", "ema", "opt_state")
KINDS = ("any moment", "training", "a save")
_WEIGHTS = (20, 40, 40)  # how often each kind is drawn
_TEMPORARY = ".orbax-checkpoint-tmp"
_GOES_ON = re.compile(r"resumes from the checkpoint of step (\d+)")
_LONGEST = 600.0  # seconds of a life, after which something is wrong


class Victim(NamedTuple):
    """A program that trains one stage and exits.

    Attributes:
      command: working directory -> arguments; the same ones resume.
      directory: working directory -> folder of the stage, with checkpoints/ and metrics.jsonl.
      checkpoint_every: steps between two saves. A line of metrics is written every step.
      environment: additions to that of this process.
      start_seconds: approximate time to the first step.
      train_seconds, train_steps: at most so long after so many new steps a kill in training comes.
    """

    command: Callable[[pathlib.Path], list[str]]
    directory: Callable[[pathlib.Path], pathlib.Path]
    checkpoint_every: int
    environment: dict[str, str]
    start_seconds: float = 5.0
    train_seconds: float = 3.0
    train_steps: int = 1


class Life(NamedTuple):
    """One process, from its start to its kill.

    Attributes:
      kind: intended time of the kill, one of `KINDS`, or "none".
      ended: it exited before the kill.
      resumed: step that it reported to resume from, 0 if it trained without a report, None if it
        was killed before.
      reached: last step in the metrics.
      newest: step of the newest complete checkpoint.
      found: temporary folders after the kill.
    """

    kind: str
    ended: bool
    resumed: int | None
    reached: int
    newest: int
    found: list[str]

    @property
    def in_save(self) -> bool:
        """Whether a checkpoint was being written."""
        return any(_TEMPORARY in name and ".old." not in name for name in self.found)

    @property
    def in_removal(self) -> bool:
        """Whether an old checkpoint was being removed."""
        return any(".old." in name for name in self.found)


def steps_of(directory: pathlib.Path) -> list[int]:
    """Steps of a stage's checkpoints with final names."""
    folder = directory / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def lines_of(directory: pathlib.Path) -> list[dict]:
    """The lines of metrics of a stage, without what differs from run to run."""
    path = directory / "metrics.jsonl"
    kept = io.read_jsonl(path) if path.exists() else []
    return [{k: v for k, v in line.items() if k not in ("time", "timing")} for line in kept]


def last_step(metrics: pathlib.Path) -> int:
    """Step of the last complete line of a file of metrics, 0 before there is one."""
    with open(metrics, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def temporary(folder: pathlib.Path) -> list[str]:
    """Names of the folders below `folder` that are being written or removed."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_dir() and (_TEMPORARY in path.name or path.name.endswith((".partial", ".tmp")))
    )


def live(victim: Victim, workdir: pathlib.Path, kind: str, draw: random.Random) -> Life:
    """Start the program and kill it at a time of this kind; "none" lets it finish."""
    directory = victim.directory(workdir)
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            victim.command(workdir),
            env=os.environ | victim.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        began = time.monotonic()
        try:
            for _ in _moments(kind, victim, directory, draw):
                if process.poll() is not None:
                    break
                if time.monotonic() - began > _LONGEST:
                    raise RuntimeError(f"A process lives for more than {_LONGEST} s ({kind}).")
        finally:
            ended = process.poll() is not None
            if not ended:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        log.seek(0)
        text = log.read()
    if code != (0 if ended else -signal.SIGKILL):
        raise RuntimeError(f"A process ended with {code} by itself:\n{text[-3000:]}")
    said = _GOES_ON.search(text)
    trained = re.search(r"step \d+/\d+", text)
    resumed = int(said[1]) if said else 0 if trained else None
    metrics, steps = directory / "metrics.jsonl", steps_of(directory)
    reached = last_step(metrics) if metrics.exists() else 0
    found = temporary(directory) if directory.is_dir() else []
    return Life(kind, ended, resumed, reached, steps[-1] if steps else 0, found)


def _moments(
    kind: str, victim: Victim, directory: pathlib.Path, draw: random.Random
) -> Iterator[None]:
    """Stop iterating at the time of the kill."""
    if kind == "none":
        while True:
            time.sleep(0.05)
            yield
    if kind == "any moment":
        yield from _sleep((victim.start_seconds + victim.train_seconds) * draw.random())
        return
    metrics = directory / "metrics.jsonl"
    newest = max(steps_of(directory), default=0)
    changed = lambda: metrics.stat().st_mtime_ns if metrics.exists() else 0
    before = changed()
    # Lines of steps that are to be done again go first: a step is done when the last is a new one.
    while changed() == before or last_step(metrics) < newest + victim.train_steps:
        time.sleep(0.002)
        yield
    yield from _sleep(victim.train_seconds * draw.random() ** 2)
    if kind == "a save":
        folder = directory / "checkpoints"
        while not any(_TEMPORARY in path.name for path in folder.iterdir()):
            time.sleep(0.0005)
            yield
        yield from _sleep(0.05 * draw.random() ** 2)


def _sleep(seconds: float) -> Iterator[None]:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.01))
        yield


def faults_of_life(life: Life, before: int, every: int) -> list[str]:
    """The faults of one life, given the newest checkpoint at its start."""
    faults = []
    if life.resumed is not None and life.resumed != before:
        faults.append(f"resumed from step {life.resumed}, step {before} was complete")
    if life.newest < before:
        faults.append(f"the checkpoint of step {before} is gone, the newest is {life.newest}")
    # The line of a step is written after the save of the step before it began, which waited for
    # the one before.
    due = (life.reached - 1) // every * every - every
    if life.newest < due:
        faults.append(f"at step {life.reached} the newest checkpoint is {life.newest}, not {due}")
    return faults


def differences(directory: pathlib.Path, whole: pathlib.Path) -> list[str]:
    """The differences between a disturbed and an undisturbed stage."""
    faults = []
    if (ours := steps_of(directory)) != (theirs := steps_of(whole)):
        return [f"checkpoints {ours} are kept, expected {theirs}"]
    for part in SAVED:
        pair = []
        for folder in (directory, whole):
            tree = checkpoint.restore_part(folder / "checkpoints", (part,))
            pair.append({str(k): np.asarray(v) for k, v in _leaves(tree)})
        if pair[0].keys() != pair[1].keys():
            faults.append(f"{part} has other leaves")
            continue
        wrong = [k for k in pair[0] if pair[0][k].tobytes() != pair[1][k].tobytes()]
        if wrong:
            faults.append(f"{len(wrong)} of {len(pair[0])} arrays of {part} differ, as {wrong[0]}")
    ours, theirs = lines_of(directory), lines_of(whole)
    steps = [line["step"] for line in ours]
    if steps != [line["step"] for line in theirs]:
        faults.append(f"metrics have other steps: {len(steps)} lines, {len(set(steps))} steps")
    elif wrong := [a["step"] for a, b in zip(ours, theirs, strict=True) if a != b]:
        faults.append(f"metrics differ at {len(wrong)} steps, the first is {wrong[0]}")
    if left := temporary(directory.parent):
        faults.append(f"temporary folders are left: {left}")
    if (directory / "damaged").exists():
        faults.append("a checkpoint was found damaged")
    return faults


def _leaves(tree):
    import jax

    return jax.tree_util.tree_leaves_with_path(tree)


def torture(victim: Victim, folder: pathlib.Path, *, kills: int, seed: int) -> dict:
    """Kill processes of a program and compare its results with an undisturbed run.

    Args:
      victim: the program.
      folder: gets the working directories "whole", "run_1", "run_2" ..
      kills: number of kills.
      seed: seed of their times.

    Returns:
      Counts, and "faults": a list of sentences, empty if nothing was lost.
    """
    began, draw = time.monotonic(), random.Random(seed)
    live(victim, folder / "whole", "none", draw)
    whole = victim.directory(folder / "whole")
    every, lives, faults, runs = victim.checkpoint_every, [], [], 0
    redone = gone_on = 0
    while len(lives) < kills:
        runs += 1
        workdir, newest, ended = folder / f"run_{runs}", 0, False
        while not ended:
            (kind,) = draw.choices(KINDS, _WEIGHTS) if len(lives) < kills else ("none",)
            life = live(victim, workdir, kind, draw)
            faults += [f"run {runs}: {text}" for text in faults_of_life(life, newest, every)]
            newest, ended = life.newest, life.ended
            gone_on += bool(life.resumed)
            if not ended:
                lives.append(life)
                redone += max(0, life.reached - life.newest)
                print(f"kill {len(lives)}/{kills}: {life}", file=sys.stderr, flush=True)
        faults += [f"run {runs}: {text}" for text in differences(victim.directory(workdir), whole)]
    return {
        "seed": seed,
        "kills": len(lives),
        "runs": runs,
        "gone_on": gone_on,
        "before_the_first_step": sum(life.resumed is None for life in lives),
        "inside_a_save": sum(life.in_save for life in lives),
        "inside_a_removal": sum(life.in_removal for life in lives),
        "steps_of_a_run": lines_of(whole)[-1]["step"],
        "steps_redone": redone,
        "most_steps_redone": max(life.reached - life.newest for life in lives),
        "temporary_files_left": sum(path.name.endswith(".tmp") for path in folder.rglob(".*")),
        "seconds": round(time.monotonic() - began, 1),
        "faults": faults,
    }
