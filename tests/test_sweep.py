"""The sweep and evaluation commands: kills and resumes, several machines, rejected input.

A working directory with two runs (of a step or two) is made once. The commands are subprocesses, so
that kills are real.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
TRAIN = {
    "pipeline": "autoregressive,pretrain,distill",
    "data.vocab_size": 300,
    "data.block_length": 8,
    "data.holdout": 0.3,
    "model.width": 16,
    "model.num_blocks": 1,
    "model.num_heads": 2,
    "model.cond_width": 8,
    "model.mlp_ratio": 2,
    "eval.num_samples": 4,
    "eval.batch_size": 3,
    "eval.bound_times": 32,
    "eval.bound_samples": 4,
    "eval.resamples": 50,
    "eval.steps": (1, 2),
    "eval.many_steps": 4,
    "eval.jumps": ("mixture",),
    "eval.sampling.cooling": 0.25,
} | {
    f"{stage}.{key}": value
    for stage in ("autoregressive", "pretrain", "distill")
    for key, value in (("num_steps", 2), ("batch_size", 8))
}
AXES = {
    "axes.models": ("distill", "autoregressive"),
    "axes.steps": (1, 2, 4),
    "axes.temperatures": (0.8, 1.0),
    "axes.seeds": (0, 1),
    "eval.num_samples": 4,
    "eval.batch_size": 4,
    "eval.bound_samples": 0,
    "eval.resamples": 50,
}
POINTS = 5 + 3 * 2 * 2 + 2 * 2  # text and controls, distill, autoregressive
TIMES = ("milliseconds_per_sample", "compile_seconds")


class World:
    """A trained working directory and the environment of the programs."""

    def __init__(self, folder):
        self.folder, self.run_folder = folder, folder / "run"
        text = "we the people of a more perfect union secure liberty and justice for all"
        words = text.split()
        rng = random.Random(0)
        (folder / "texts").mkdir()
        for i in range(60):
            text = " ".join(rng.choices(words, k=rng.randint(20, 60)))
            (folder / "texts" / f"{i:03}.txt").write_text(f"{text} {i}.\n")
        self.env = os.environ | {"PYTHONPATH": str(ROOT)}
        train = TRAIN | {"data.corpus": f"{folder}/texts/*.txt"}
        flags = ["--noevaluate", f"--workdir={self.run_folder}"]
        self.run("fsdfm_jax.main", "base", train, *flags)

    def start(self, module, config, changes, *flags):
        flags = [*flags, *(f"--config.{key}={value}" for key, value in changes.items())]
        if config:
            flags = [f"--config={ROOT}/configs/{config}.py", *flags]
        return subprocess.Popen(
            [sys.executable, "-m", module, *flags],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, code=0):
        process = self.start(*arguments)
        out, err = process.communicate(timeout=500)
        assert process.returncode == code, err[-3000:]
        return out if code == 0 else err

    def sweep(self, name, *flags, **changes):
        changes = AXES | {"name": name} | changes
        return ("launch.sweep", "sweep", changes, f"--workdir={self.run_folder}", *flags)

    def sweep_folder(self, name):
        return self.run_folder / "sweeps" / name


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world):
    """(folder, output) of an undisturbed sweep."""
    out = world.run(*world.sweep("whole"))
    return world.sweep_folder("whole"), out


def _rows(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    for row in rows:
        for key in TIMES:
            del row[key]
    return rows


def _lines(folder):
    return [json.loads(line) for path in folder.glob("points*.jsonl") for line in path.open()]


def test_a_sweep_writes_a_line_and_samples_of_each_point(whole):
    folder, out = whole
    lines = _lines(folder)
    assert len(lines) == len({line["slug"] for line in lines}) == POINTS
    assert {line["slug"] for line in lines} == {row["slug"] for row in _rows(folder)}
    for line in lines:
        with np.load(folder / line["samples_file"]) as arrays:
            assert arrays["tokens"].shape == (4, 8)
    for name in ("report.html", "results.csv", "frontier.png", "samples.txt"):
        assert (folder / name).stat().st_size > 0
    # Repeats over seeds are one line of the table.
    table = [line for line in out.splitlines() if line.startswith("distill ")]
    assert len(table) == 3 * 2
    # Around the sampler that `generate` uses for these runs, and named after it.
    distilled = [row for row in _rows(folder) if row["run"] == "distill"]
    assert {(row["group"], row["cooling"]) for row in distilled} == {
        ("distill (cooling 0.25)", 0.25)
    }
    page = (folder / "report.html").read_text()
    assert "<title>Evaluation · run/whole · " in page


def test_killed_twice_it_ends_with_the_same_points(world, whole):
    folder = world.sweep_folder("killed")
    for count in (3, 9):
        process = world.start(*world.sweep("killed"))
        deadline = time.monotonic() + 300
        path = folder / "points.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            assert process.poll() is None, process.stderr.read()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (folder / "report.html").exists()
        kept = path.read_bytes()
        assert kept.count(b"\n") < POINTS
    world.run(*world.sweep("killed"))
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])  # none computed again
    lines = _lines(folder)
    assert len(lines) == len({line["slug"] for line in lines}) == POINTS
    assert _rows(folder) == _rows(whole[0])
    for row in _rows(folder):
        ours, theirs = (np.load(f / row["samples_file"])["tokens"] for f in (folder, whole[0]))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_machines_share_a_sweep(world, whole):
    folder = world.sweep_folder("shared")
    world.run(*world.sweep("shared", "--host=1/2"))
    assert len(_lines(folder)) == POINTS // 2
    assert len(_rows(folder)) == POINTS // 2
    world.run(*world.sweep("shared", "--host=0/2"))
    assert len(list(folder.glob("points-*-of-2.jsonl"))) == 2
    assert _rows(folder) == _rows(whole[0])


def test_more_points_join_those_that_are_there(world, whole):
    folder = world.sweep_folder("more")
    shutil.copytree(whole[0], folder)
    before = (folder / "points.jsonl").read_bytes()
    world.run(*world.sweep("more", **{"axes.temperatures": (0.8, 1.0, 1.2)}))
    after = (folder / "points.jsonl").read_bytes()
    assert after.startswith(before)
    added = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert len(added) == 3 * 2 + 2
    assert {line["temperature"] for line in added} == {1.2}


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"axes.steps": (0,)}, (), "axes: Sampling.steps must be an integer in [1"),
        ({"axes.models": ("refine",)}, (), "axes.models has the unknown 'refine'"),
        ({}, ("--host=2/2",), "--host must be I/N with 0 <= I < N, got '2/2'"),
        ({"eval.num_samples": 1000, "eval.task": "prefix:4"}, (), "eval.num_samples=1000"),
        ({"eval.judges": "gguf:none.gguf"}, (), "none.gguf"),
        ({"eval.models": "distill=RUN#pretrain"}, (), "choose another one"),
        ({"axes.grids": ("power:30",)}, (), "Grid 'power:30' with 1024 steps"),
    ],
)
def test_sweeps_are_refused_in_one_line(world, changes, flags, message):
    changes = {
        k: v.replace("RUN", str(world.run_folder)) if k == "eval.models" else v
        for k, v in changes.items()
    }
    if "axes.grids" in changes:
        changes["axes.steps"] = (1024,)
    err = world.run(*world.sweep("refused", *flags, **changes), code=2)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in err
    assert not world.sweep_folder("refused").exists()


# --------------------------------------------------------------------- python -m fsdfm_jax.evaluate
def test_evaluating_a_working_directory(world):
    flags = (f"--workdir={world.run_folder}", f"--output={world.folder / 'evaluated'}")
    out = world.run("fsdfm_jax.evaluate", "", {"eval.sampling.temperature": 0.9}, *flags)
    rows = _rows(world.folder / "evaluated")
    # What isn't said on the command line is as the run had it.
    assert [row["num_samples"] for row in rows] == [4] * len(rows)
    models = [row for row in rows if row["kind"] == "model"]
    assert {row["temperature"] for row in models} == {0.9}
    assert [(row["run"], row["steps"]) for row in models] == [
        ("autoregressive", 8),
        *(("pretrain", steps) for steps in (4, 1, 2, 1, 2)),
        *(("distill", steps) for steps in (1, 2)),
    ]
    assert "report.html" in out


def test_evaluating_one_run_next_to_another_model(world):
    output = world.folder / "chosen"
    changes = {"eval.models": f"other={world.run_folder}#pretrain", "eval.controls": "()"}
    flags = (f"--workdir={world.run_folder}", "--runs=distill", f"--output={output}")
    world.run("fsdfm_jax.evaluate", "", changes, *flags)
    rows = _rows(output)
    # The autoregressive run judges and is no row, as it wasn't asked for.
    others = {"other (mixture)", "other (cooling 0.25)"}
    assert {row["group"] for row in rows} == {"held-out text", "distill (cooling 0.25)"} | others
    assert all("autoregressive" in row["judges"] for row in rows)


def test_evaluating_a_checkpoint_with_given_tokens(world):
    """Evaluate a file without working directory on continuations, with a run elsewhere as judge."""
    model = world.folder / "model.safetensors"
    world.run("fsdfm_jax.convert", "", {}, str(world.run_folder), str(model), "--stage=distill")
    flags = (f"--checkpoint={model}", f"--output={world.folder / 'file'}")
    changes = {"eval.task": "prefix:4", "eval.judges": f"bundle:{world.run_folder}#autoregressive"}
    err = world.run("fsdfm_jax.evaluate", "", changes, *flags, code=2)
    assert "give a prepared folder with --data" in err
    world.run("fsdfm_jax.evaluate", "", changes, *flags, f"--data={world.run_folder / 'data'}")
    rows = _rows(world.folder / "file")
    real = np.load(world.folder / "file" / rows[0]["samples_file"])["tokens"]
    for row in rows:
        with np.load(world.folder / "file" / row["samples_file"]) as arrays:
            np.testing.assert_array_equal(arrays["tokens"][:, :4], real[:, :4])
        (judge,) = row["judges"].values()
        # Only what was written is scored.
        assert judge["ids"]["tokens"] == 4 * 4
    models = [row for row in rows if row["kind"] == "model"]
    assert [row["run"] for row in models] == ["model.safetensors"] * 2
    assert all("No bound" in row["notes"][0] for row in models)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "one of --workdir=DIR, --checkpoint=PATH and --bundled"),
        (("--checkpoint=none.pth", "--workdir=none"), "one of --workdir=DIR"),
        (("--bundled", "--workdir=none"), "one of --workdir=DIR"),
        (("--checkpoint=none.pth",), "--output=DIR"),
        (("--checkpoint=none.pth", "--output=out"), "none.pth"),
        (("--workdir=none",), "not a working directory"),
        (("--workdir=RUN", "--runs=refine"), "has no trained run 'refine'"),
        (("--workdir=RUN", "--config.eval.stps=3"), "config.eval.steps"),
        (("--workdir=RUN", "--config.eval.task=prefix:8"), "eval.task: prefix:8 gives 8 tokens"),
    ],
)
def test_evaluations_are_refused_in_one_line(world, flags, message):
    flags = [flag.replace("RUN", str(world.run_folder)) for flag in flags]
    err = world.run("fsdfm_jax.evaluate", "", {}, *flags, code=2)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in err
