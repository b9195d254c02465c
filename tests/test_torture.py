"""Runs that are killed repeatedly: nothing is lost, and a loss would be detected."""

import json
import os
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest
import torture

from fsdfm_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
SEED = 3


def toy_victim(*flags):
    """A stage that compiles quickly: most of a life is the start of the process."""
    program = [sys.executable, str(ROOT / "tests" / "toy_job.py"), *flags]
    return torture.Victim(
        command=lambda workdir: [*program, f"--directory={workdir / 'stage'}"],
        directory=lambda workdir: workdir / "stage",
        checkpoint_every=3,
        environment={"PYTHONPATH": str(ROOT)},
        start_seconds=1.0,
        train_seconds=0.5,
        train_steps=8,
    )


@pytest.mark.parametrize(
    ("kills", "num_steps"), [(2, 30), pytest.param(20, 60, marks=pytest.mark.slow)]
)
def test_killed_again_and_again_nothing_is_lost(tmp_path, kills, num_steps):
    victim = toy_victim(f"--num_steps={num_steps}", "--pause=0.01")
    found = torture.torture(victim, tmp_path, kills=kills, seed=SEED)
    assert found["faults"] == []
    assert found["kills"] == kills
    assert found["steps_of_a_run"] == num_steps
    assert found["gone_on"] >= kills // 2
    assert found["inside_a_save"] + found["inside_a_removal"] >= kills // 10
    assert found["most_steps_redone"] <= 2 * victim.checkpoint_every


@pytest.mark.slow
def test_a_run_that_reads_on_at_another_batch_is_noticed(tmp_path):
    victim = toy_victim("--num_steps=60", "--pause=0.01", "--forgets=1")
    faults = torture.torture(victim, tmp_path, kills=2, seed=SEED)["faults"]
    text = "\n".join(faults)
    for what in ("of params differ", "of ema differ", "of opt_state differ", "metrics differ"):
        assert what in text


def test_a_program_that_fails_is_no_survivor(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with 2 by itself:\nerror: Unknown"):
        torture.torture(toy_victim("--num_stepz=3"), tmp_path, kills=1, seed=0)


def life(**values):
    defaults = {"kind": "training", "ended": False, "resumed": 6, "reached": 8, "newest": 6}
    return torture.Life(**(defaults | {"found": []} | values))


@pytest.mark.parametrize(
    ("values", "before", "fault"),
    [
        ({}, 6, None),
        ({"resumed": None}, 6, None),
        ({"newest": 9, "reached": 12}, 6, None),
        ({"newest": 6, "reached": 12}, 6, None),  # the save of step 9 was at hand
        ({"newest": 6, "reached": 13}, 6, "at step 13 the newest checkpoint is 6, not 9"),
        ({"resumed": 3}, 6, "resumed from step 3, step 6 was complete"),
        ({"resumed": 0}, 6, "resumed from step 0, step 6 was complete"),
        ({"resumed": None, "newest": 3}, 6, "the checkpoint of step 6 is gone, the newest is 3"),
        ({"resumed": 0, "reached": 3, "newest": 0}, 0, None),
    ],
)
def test_what_a_life_may_lose(values, before, fault):
    assert torture.faults_of_life(life(**values), before, 3) == ([fault] if fault else [])


def test_what_a_kill_hit():
    assert not life().in_save
    assert life(found=["checkpoints/9.orbax-checkpoint-tmp"]).in_save
    removed = life(found=["checkpoints/3.old.orbax-checkpoint-tmp"])
    assert (removed.in_save, removed.in_removal) == (False, True)


@pytest.fixture
def pair(tmp_path):
    """Two stages with equal results."""
    for name in ("ours", "whole"):
        directory = tmp_path / name / "stage"
        _save(directory, 6)
        _save(directory, 9)
        lines = [{"step": n, "time": os.getpid() + n, "loss": 1 / n} for n in range(1, 10)]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return tmp_path / "ours" / "stage", tmp_path / "whole" / "stage"


def _save(directory, step, **changes):
    state = {"step": np.asarray(step), "params": {"w": np.arange(4.0)}}
    state |= {"ema": {"w": np.ones(4)}, "opt_state": {"mu": np.zeros(4)}} | changes
    retention = checkpoint.Retention(keep=2)
    with checkpoint.Checkpoints(directory / "checkpoints", retention=retention) as checkpoints:
        checkpoints.save(step, state, {})


def _save_again(directory, **changes):
    shutil.rmtree(directory / "checkpoints" / "9")
    _save(directory, 9, **changes)


def _edit_lines(directory, edit):
    path = directory / "metrics.jsonl"
    path.write_text("".join(edit(path.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda d: None, None),
        (lambda d: _save_again(d), None),
        (
            lambda d: _save_again(d, ema={"w": np.nextafter(np.ones(4), 2)}),
            "1 of 1 arrays of ema differ",
        ),
        (lambda d: _save_again(d, opt_state={"nu": np.zeros(4)}), "opt_state has other leaves"),
        (lambda d: shutil.rmtree(d / "checkpoints" / "6"), r"checkpoints \[9\] are kept"),
        (lambda d: _edit_lines(d, lambda x: x + x[-1:]), "10 lines, 9 steps"),
        (lambda d: _edit_lines(d, lambda x: x[:-1]), "8 lines, 8 steps"),
        (
            lambda d: _edit_lines(d, lambda x: [x[0].replace("1.0", "1.1"), *x[1:]]),
            "metrics differ at 1 steps, the first is 1",
        ),
        (
            lambda d: (d / "checkpoints" / "3.old.orbax-checkpoint-tmp").mkdir(),
            r"temporary folders are left: \['stage/checkpoints/3\.old",
        ),
        (lambda d: (d / "damaged").mkdir(), "a checkpoint was found damaged"),
    ],
)
def test_every_difference_at_the_end_is_noticed(pair, spoil, fault):
    ours, whole = pair
    spoil(ours)
    found = torture.differences(ours, whole)
    if fault is None:
        assert found == []
    else:
        assert len(found) == 1
        assert re.search(fault, found[0])


def test_the_last_step_of_torn_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    assert torture.last_step(path) == 0
    lines = "".join(f'{{"step": {n}, "loss": 0.25}}\n' for n in range(1, 400))
    path.write_text(lines + '{"step": 400, "lo')
    assert torture.last_step(path) == 399
