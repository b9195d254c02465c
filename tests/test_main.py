"""The main job: early errors, a complete run, resuming after kills, generating from it.

The runs are subprocesses, so that kills are real.
"""

import csv
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from configs import base
from fsdfm_jax import main, schema
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.stages import autoregressive
from fsdfm_jax.training import checkpoint, pipeline, recipe, workdir

ROOT = pathlib.Path(__file__).parents[1]
STAGES = ("autoregressive", "pretrain", "step_aware", "distill", "refine")
# Text, four controls, autoregressive, pretrain at 4, 1, 2 steps, three stages at 1, 2.
ROWS = 1 + 4 + 1 + 3 + 3 * 2
TINY = {
    "data.vocab_size": 300,
    "data.block_length": 8,
    "data.holdout": 0.3,
    "model.width": 16,
    "model.num_blocks": 1,
    "model.num_heads": 2,
    "model.cond_width": 8,
    "model.mlp_ratio": 2,
    "refine.max_log2_steps": 1,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "eval.num_samples": 4,
    "eval.batch_size": 3,
    "eval.bound_times": 32,
    "eval.bound_samples": 4,
    "eval.resamples": 50,
    "eval.watched": 0,
    "eval.many_steps": 4,
    "eval.steps": (1, 2),
    "eval.jumps": ("cumulative",),
}
for _stage in STAGES:
    TINY |= {
        f"{_stage}.num_steps": 12 if _stage == "pretrain" else 3,
        f"{_stage}.batch_size": 8,
        f"{_stage}.learning_rate": 1e-2,
    }
TIMINGS = ("milliseconds_per_sample", "compile_seconds")


def _write_texts(folder, seed=0):
    folder.mkdir(exist_ok=True)
    text = "we the people of a more perfect union secure liberty and justice for all these "
    text += "united states in order to form establish ensure domestic tranquility provide"
    words = text.split()
    rng = random.Random(seed)
    for i in range(60):
        text = " ".join(rng.choices(words, k=rng.randint(5, 60)))
        (folder / f"{i:03}.txt").write_text(f"{text} {i}.\n")


def _config(corpus, **changes):
    config = base.get_config()
    config.update_from_flattened_dict(TINY | {"data.corpus": corpus})
    config.update_from_flattened_dict(changes)
    return config


class World:
    """Corpus and environment that the runs of this file share."""

    def __init__(self, folder):
        self.folder = folder
        _write_texts(folder / "texts")
        self.corpus = f"{folder}/texts/*.txt"
        self.flags = [f"--config={ROOT}/configs/base.py"]
        for key, value in (TINY | {"data.corpus": self.corpus}).items():
            self.flags.append(f"--config.{key}={value}")
        self.env = os.environ | {
            "PYTHONPATH": str(ROOT),
            # No commit in the stamps: one that comes between two runs would make them differ.
            "GIT_DIR": str(folder / "none"),
        }

    def start(self, module, *flags):
        return subprocess.Popen(
            [sys.executable, "-m", f"fsdfm_jax.{module}", *flags],
            cwd=self.folder,  # anywhere but the repository
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, module, *flags):
        process = self.start(module, *flags)
        out, err = process.communicate(timeout=500)
        assert process.returncode == 0, err[-3000:]
        return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world):
    """(folder, stdout) of one uninterrupted run."""
    folder = world.folder / "finished"
    return folder, world.run("main", *world.flags, f"--workdir={folder}")


def _results(folder):
    return json.loads((folder / "report" / "results.json").read_text())


def _samples(folder, row):
    return np.load(folder / "report" / row["samples_file"])["tokens"]


def _table(out):
    """The lines of the table in a program's output."""
    lines = out.splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("model ")]
    return lines[first : lines.index("", first)]


def _files(folder):
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ------------------------------------------------------------------ refused before any work is done


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # conftest's 8 devices
        ({"pretrain.batch_size": 12}, r"pretrain\.batch_size=12 .*multiple of the 8"),
        ({"refine.batch_size": 0}, r"refine\.batch_size=0"),
        ({"mesh.data": 3}, r"mesh sizes \(mesh.data=3, .*devices, 8"),
        (
            {"mesh.data": 1, "mesh.fsdp": 8, "model.width": 20, "model.num_heads": 2},
            r"kernel can't be sharded: dimension \d of its shape .* by mesh.*=8",
        ),
        ({"pipeline": "pretrain,distil"}, "unknown stage 'distil'"),
        ({"pipeline": "distill"}, "distill.init_from"),
        ({"pipeline": ""}, "pipeline is empty"),
        ({"path.source": "noise"}, "Unknown source 'noise'"),
        ({"path.source": "mask"}, "needs path.source='uniform'"),
        ({"path.schedule": "linear"}, "linear"),
        ({"model.num_heads": 3}, r"model\.width=16.*num_heads=3"),
        ({"model.conditioning": "none"}, "model.conditioning"),
        ({"pretrain.loss": "mse"}, r"pretrain\.loss must be one of .*'mse'"),
        ({"pretrain.time_eps": 0.0}, r"pretrain\.time_eps"),
        ({"distill.divergence": "kl"}, "kl"),
        ({"distill.teacher_rule": "midpoint"}, "midpoint"),
        ({"distill.teacher_end": "draw"}, "teacher_end must be one of .*'draw'"),
        ({"refine.max_log2_steps": 3}, "refine's batch of 8 rows must be a multiple of 32"),
        ({"refine.noise": (0.5, 1.0)}, r"refine\.noise must be .* in \(0, 1\)"),
        ({"refine.auxiliary_updates": 0}, r"refine\.auxiliary_updates"),
        ({"refine.teacher": "short"}, "refine.teacher='short' is not a trained run"),
        ({"refine.teacher": "base"}, "refine.teacher must be a base .*/distill has a few-step"),
        ({"step_aware.warmup_steps": 100}, r"config\.step_aware\.warmup_steps must be"),
        (
            {"distill.guidance": 1.0, "distill.guide": "pretrain"},
            "distill.init_from must be a base model.*/step_aware has a few-step model",
        ),
        (
            {"distill.guidance": 1.0, "distill.guide": "short"},
            "distill.guide='short' is not a trained run",
        ),
        (
            {
                "pipeline": "autoregressive,pretrain,distill",
                "distill.guidance": 1.0,
                "distill.guide": "autoregressive",
            },
            "distill.guide must be a base .*/autoregressive has an autoregressive model",
        ),
        ({"autoregressive.num_steps": 0}, "num_steps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_check_refuses(tmp_path, changes, message):
    config = _config("no/such/*.txt", **changes)
    with pytest.raises(ValueError, match=message):
        main.check(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"eval.num_samples": 0},
        {"eval.steps": (0,)},
        {"eval.many_steps": 0},
        {"eval.jumps": ("leap",)},
        {"eval.sampling.jump": "leap"},
        {"eval.sampling.temperature": -1.0},
        {"eval.sampling.top_p": 0.0},
        {"eval.sampling.grid": "linear"},
        {"eval.sampling.steps": 0},
        {"eval.task": "prefix:8"},
        {"eval.controls": ("random",)},
        {"eval.judges": "gguf:none.gguf"},
        {"eval.models": "other=none"},
        {"eval.resamples": 1},
        {"train.log_every": 0},
        {"train.checkpoint_every": 0},
        {"train.keep_checkpoints": 0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_check_refuses_what_only_the_end_of_a_run_would_notice(tmp_path, changes):
    (key,) = changes
    config = _config("no/such/*.txt", **changes)

    def start():
        schema.check(config)  # as every program does before it starts
        main.check(config, tmp_path / "run")

    with pytest.raises(ValueError, match=key.split(".")[1]):
        start()


def test_workdir_may_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        main.check(_config("no/such/*.txt"), tmp_path / "file")


def test_workdir_must_be_able_to_hold_checkpoints(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="backslash.*; choose another folder"):
        _run_here(monkeypatch, _config("no/such/*.txt"), tmp_path / "a\\b")
    assert list(tmp_path.iterdir()) == []


def test_check_gives_each_run_its_recipe(tmp_path):
    config = _config("texts", pipeline="pretrain,refine,refine")
    entries, recipes, mesh = main.check(config, tmp_path)
    assert [entry.run for entry in entries] == ["pretrain", "refine", "refine_2"]
    assert list(recipes) == ["pretrain", "refine", "refine_2"]
    assert recipes["pretrain"]["base"] is None
    assert recipes["refine"]["base"] == recipe.digest(recipes["pretrain"])
    assert recipes["refine_2"]["base"] == recipe.digest(recipes["refine"])
    teacher = [recipe.digest(recipes["pretrain"])]
    assert [recipes[run]["needs"] for run in recipes] == [[], teacher, teacher]
    assert mesh.shape["data"] == 8


def test_run_seeds_differ_between_runs_and_seeds():
    config = base.get_config()
    seeds = {pipeline.run_seed(config, run) for run in ("pretrain", "refine", "refine_2")}
    config.seed = 1
    seeds |= {pipeline.run_seed(config, run) for run in ("pretrain", "refine", "refine_2")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**32 for seed in seeds)


OTHER_FLAGS = {"_DISTRIBUTED": False, "_PRINT_SHARDING": False}


def _run_here(monkeypatch, config, folder):
    """main.main without its flags, in this process, without the evaluation."""
    given = {"_CONFIG": config, "_WORKDIR": str(folder), "_EVALUATE": False}
    for name, value in (given | OTHER_FLAGS).items():
        monkeypatch.setattr(main, name, types.SimpleNamespace(value=value))
    main.main(["main"])


def test_missing_corpus_is_refused_and_leaves_no_stage(tmp_path, monkeypatch):
    config = _config(f"{tmp_path}/none/*.txt")
    with pytest.raises(FileNotFoundError, match="none/"):
        _run_here(monkeypatch, config, tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()


# -------------------------------------------------------------------------------------- a whole run
def test_report_has_every_file_and_row(finished):
    folder, out = finished
    rows = _results(folder)["rows"]
    assert len(rows) == ROWS == len({row["slug"] for row in rows})
    assert max(map(len, _table(out))) <= 100
    whole = [line for line in _table(out) if not line.startswith(" ")]  # some take two lines
    assert len(whole) == ROWS + 1
    with open(folder / "report" / "results.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == ROWS
    for name in ("frontier", "steps", "time"):
        assert (folder / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for name in ("samples.txt", "trajectories.txt", "report.html"):
        assert (folder / "report" / name).stat().st_size > 0
    for row in rows:
        tokens_NL = _samples(folder, row)
        assert tokens_NL.shape == (4, 8)
        assert tokens_NL.dtype == np.int32
        for form in ("ids", "text"):
            assert row["judges"]["autoregressive"][form]["perplexity_a"]["value"] > 1
        if row["stage"] == "pretrain":  # bounded above the entropy of nothing at all
            assert row["figures"]["bound_nats_per_token"]["value"] > 0.5
        else:
            assert row["figures"]["bound_nats_per_token"] is None
    *_, shown, last = out.strip().split("\n\n")
    assert shown.startswith("The first samples of refine")
    assert ", 2 steps, seed 1" in shown.splitlines()[0]
    assert shown.count("\n  [") == 3
    assert max(map(len, shown.splitlines())) <= 100
    place, done = last.splitlines()
    assert place.startswith(f"Report: {folder / 'report'}")
    assert done.startswith("Done in")


def test_stages_are_trained_to_their_end(finished):
    folder, _ = finished
    for stage in STAGES:
        directory = folder / "stages" / stage
        steps = TINY[f"{stage}.num_steps"]
        assert checkpoint.latest_step(directory / "checkpoints") == steps
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert all(np.isfinite(line["loss"]) and np.isfinite(line["grad_norm"]) for line in lines)
    assert pipeline.load_config(folder).model.width == 16


def test_base_weights_reach_the_next_stage(finished):
    """One Adam step of learning rate 1e-2 moves no weight by more than 1e-2 (1 + decay)."""
    folder, _ = finished
    base_params = workdir.load_weights(folder / "stages" / "pretrain").params
    params = checkpoint.restore_part(folder / "stages" / "step_aware" / "checkpoints", ("params",))
    kernel, then = params["params"]["head"]["kernel"], base_params["head"]["kernel"]
    distance = float(np.abs(np.asarray(kernel) - np.asarray(then)).max())
    moved = float(np.abs(np.asarray(then)).max())
    assert 0 < distance <= 3 * 1e-2 * 1.1
    assert moved > 0.005  # the head of fresh weights is zero


def test_running_again_changes_nothing(world, finished):
    folder, out = finished
    finished_points = lambda: (
        _files(folder / "report" / "samples")
        | {"points": (folder / "report" / "points.jsonl").read_bytes()}
    )
    stages, points = _files(folder / "stages"), finished_points()
    results = _results(folder)
    again = world.run("main", *world.flags, f"--workdir={folder}")
    assert _files(folder / "stages") == stages
    assert finished_points() == points
    assert _results(folder) == results
    assert _table(again) == _table(out)


def test_figures_can_be_recomputed_from_the_saved_samples(finished):
    """Aggregation A and entropy, by the judge's own token losses and NumPy."""
    folder, _ = finished
    judge = workdir.load_weights(folder / "stages" / "autoregressive")
    eos_id = prepared_lib.load(folder / "data").tokenizer.eos_id
    losses = jax.jit(lambda x1: autoregressive.token_losses(judge.params, judge.model, eos_id, x1))
    for row in _results(folder)["rows"]:
        tokens_NL = _samples(folder, row)
        nll_NL = np.asarray(losses(tokens_NL), np.float64)
        perplexity = np.exp(nll_NL.mean(1)).mean()
        found = row["judges"]["autoregressive"]["ids"]["perplexity_a"]["value"]
        np.testing.assert_allclose(found, perplexity, rtol=1e-5)
        shares = [np.unique(t, return_counts=True)[1] / len(t) for t in tokens_NL]
        entropy = np.mean([-(p * np.log(p)).sum() for p in shares])
        figures = {name: found and found["value"] for name, found in row["figures"].items()}
        np.testing.assert_allclose(figures["entropy_nats"], entropy, rtol=1e-6)
        np.testing.assert_allclose(figures["entropy_bits"], entropy / np.log(2), rtol=1e-6)


def test_generate_prints_its_samples(world, finished):
    folder, _ = finished
    flags = [f"--workdir={folder}", "--steps=2", "--num_samples=3", "--prompt=we the people"]
    out = world.run("generate", *flags)
    heads = [line for line in out.splitlines() if line.startswith("--- sample ")]
    assert heads == [f"--- sample {i} of 3: refine, 2 network calls" for i in (1, 2, 3)]
    texts = out.split("--- sample ")[1:]
    assert all(text.split("\n", 1)[1].startswith("we the people") for text in texts)


# ------------------------------------------------------------------------------------------- kills
def _kill_when(process, happened):
    deadline = time.monotonic() + 300
    try:
        while not happened():
            assert process.poll() is None, process.stderr.read()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_three_times_ends_the_same_bit_for_bit(world, finished):
    whole, _ = finished
    folder = world.folder / "killed"
    command = ("main", *world.flags, f"--workdir={folder}")
    checkpoints = folder / "stages" / "pretrain" / "checkpoints"
    refined = folder / "stages" / "refine" / "checkpoints"
    report = folder / "report"

    # In the middle of a stage: its second checkpoint has begun, five are to come.
    _kill_when(world.start(*command), lambda: any(checkpoints.glob("4*")))
    assert 2 <= checkpoint.latest_step(checkpoints) < TINY["pretrain.num_steps"]
    _kill_when(world.start(*command), lambda: any(refined.glob("2*")))  # of 3 steps
    assert not report.exists()
    kept = _files(folder / "stages" / "distill" / "checkpoints")
    _kill_when(world.start(*command), lambda: (report / "points.jsonl").exists())
    assert not (report / "results.json").exists()
    world.run(*command)
    assert _files(folder / "stages" / "distill" / "checkpoints") == kept

    for stage in STAGES:
        ours, theirs = (f / "stages" / stage / "checkpoints" for f in (folder, whole))
        parts = ["params", "opt_state", "step"]
        parts += [] if stage in ("autoregressive", "pretrain") else ["ema"]
        parts += ["auxiliary"] if stage == "refine" else []
        ours, theirs = (checkpoint.restore_part(f, parts) for f in (ours, theirs))
        _assert_bitwise(ours, theirs)
        ours, theirs = (
            [
                {k: v for k, v in json.loads(line).items() if k not in ("time", "timing")}
                for line in (f / "stages" / stage / "metrics.jsonl").open()
            ]
            for f in (folder, whole)
        )
        assert ours == theirs
    ours, theirs = _results(folder), _results(whole)
    for row in ours["rows"] + theirs["rows"]:
        for key in TIMINGS:
            del row[key]
    # The header names the run by its folder, else nothing of it.
    assert [results.pop("run") for results in (ours, theirs)] == ["killed", "finished"]
    assert ours == theirs
    assert (report / "samples.txt").read_text() == (whole / "report" / "samples.txt").read_text()
    left = [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial"))]
    # A killed write may leave its temporary file, but never under a name that is read.
    assert all(path.name.startswith(".") for path in left)


def _assert_bitwise(ours, theirs):
    ours, theirs = (jax.tree_util.tree_leaves_with_path(tree) for tree in (ours, theirs))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype, path
        assert one.tobytes() == other.tobytes(), path


# ---------------------------------------------------------- a folder that belongs to something else
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.width", 32),
        ("pretrain.num_steps", 5),
        ("distill.tau", 2.0**-3),
        ("seed", 1),
        ("optim.b2", 0.99),
        ("data.block_length", 4),
        ("data.corpus", "other/*.txt"),
        ("data.tokenizer", "gpt2"),
    ],
)
def test_another_config_is_refused_naming_the_key(world, finished, key, value):
    folder, _ = finished
    with pytest.raises(ValueError, match=rf"\b{key}: .*before, .*now") as caught:
        main.check(_config(world.corpus, **{key: value}), folder)
    assert "another --workdir" in str(caught.value)


@pytest.mark.parametrize("key", ["eval.seed", "eval.num_samples", "train.log_every", "mesh.data"])
def test_keys_that_leave_the_weights_alone_are_accepted(world, finished, key):
    folder, _ = finished
    value = 8 if key == "mesh.data" else 7
    main.check(_config(world.corpus, **{key: value}), folder)


def test_prepared_data_of_another_spec_is_refused(world, finished, tmp_path, monkeypatch):
    folder, _ = finished
    shutil.copytree(folder / "data", tmp_path / "run" / "data")
    config = _config(world.corpus, **{"data.vocab_size": 310})
    with pytest.raises(ValueError, match=r"data\.vocab_size is 310, but the folder has 300"):
        _run_here(monkeypatch, config, tmp_path / "run")


def test_an_unfinished_run_does_not_go_on_with_other_tokens(world, finished, tmp_path, monkeypatch):
    """Same configuration, but the glob matches other files, which were prepared again."""
    shutil.copytree(finished[0] / "data", tmp_path / "run" / "data")
    config = _config(world.corpus, pipeline="pretrain")
    _, recipes, _ = main.check(config, tmp_path / "run")
    model = workdir.load_weights(finished[0] / "stages" / "pretrain").model
    metadata = recipe.make_metadata(
        config.to_dict(),
        model,
        recipes["pretrain"],
        run="pretrain",
        stage="pretrain",
        tokenizer="another",
        data="another",
    )
    directory = workdir.stage_directory(tmp_path / "run", "pretrain") / "checkpoints"
    with checkpoint.Checkpoints(directory, retention=checkpoint.Retention()) as checkpoints:
        checkpoints.save(2, {"params": {"w": np.zeros(2)}}, metadata)
    # This message takes precedence over other faults of that checkpoint.
    with pytest.raises(ValueError, match="tokenizer"):
        _run_here(monkeypatch, config, tmp_path / "run")


def test_too_little_held_out_text_for_a_task_is_told_before_training(
    world, finished, tmp_path, monkeypatch
):
    shutil.copytree(finished[0] / "data", tmp_path / "run" / "data")
    changes = {"eval.num_samples": 10_000, "eval.task": "prefix:4"}
    config = _config(world.corpus, **changes)
    given = {"_CONFIG": config, "_WORKDIR": str(tmp_path / "run"), "_EVALUATE": True}
    for name, value in (given | OTHER_FLAGS).items():
        monkeypatch.setattr(main, name, types.SimpleNamespace(value=value))
    with pytest.raises(ValueError, match=r"blocks, but eval\.task .*eval\.num_samples=10000"):
        main.main(["main"])
    assert not (tmp_path / "run" / "stages").exists()


# ----------------------------------------------------------------------------------------- guidance
@pytest.mark.slow
def test_a_guided_run_reads_the_runs_that_it_names(world, tmp_path, monkeypatch):
    """A run of another folder as the weak model; then an earlier run of the same pipeline."""
    given = []
    train = pipeline.train

    def watching(stage, settings, **others):
        given.append(others["needed"])
        return train(stage, settings, **others)

    monkeypatch.setattr(pipeline, "train", watching)
    short = _config(world.corpus, pipeline="pretrain", **{"pretrain.num_steps": 2})
    _run_here(monkeypatch, short, tmp_path / "short")
    weak = tmp_path / "short" / "stages" / "pretrain"
    changes = {"pipeline": "pretrain,distill", "distill.guidance": 1.0, "distill.guide": str(weak)}
    config, folder = _config(world.corpus, **changes), tmp_path / "run"
    _run_here(monkeypatch, config, folder)
    *others, needed = given
    assert others == [{}, {}]
    assert list(needed) == ["init_from", "guide"]
    for weights, run in zip(needed.values(), (folder / "stages" / "pretrain", weak), strict=True):
        jax.tree.map(np.testing.assert_array_equal, weights, workdir.load_weights(run).params)
    _run_here(monkeypatch, config, folder)
    assert given[3:] == [{}, {}]  # finished: nothing is read
    # Named otherwise, it is the same run; trained otherwise, another one.
    _run_here(monkeypatch, short, folder / "moved")
    config.distill.guide = str(folder / "moved" / "stages" / "pretrain")
    main.check(config, folder)
    config.distill.guide = "pretrain"
    with pytest.raises(ValueError, match=r"\(needs: \["):
        main.check(config, folder)
