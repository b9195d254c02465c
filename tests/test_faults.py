"""Failures during training and their outcomes.

One or two stop signals, a damaged checkpoint, a full disk, missing permissions, a missing shard,
non-finite or endless steps, a changed configuration. Tests that end a process use a separate one
(tests/toy_job.py); its results must equal those of an undisturbed run.
"""

import contextlib
import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torture
from test_train import (
    EVERYTHING,
    B,
    Stream,
    assert_same_bits,
    lines,
    make_mesh,
    poisoned,
    saved,
    steep,
    toy_stage,
)

from configs import base as base_config
from fsdfm_jax import main, schema
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data import shards
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.training import checkpoint, pipeline, recipe, workdir
from fsdfm_jax.training import loop as loop_lib

ROOT = pathlib.Path(__file__).parents[1]
PROCESSES = []  # of the test that runs


class Job:
    """A training process and its output."""

    def __init__(self, directory, *flags):
        self.said = ""
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests" / "toy_job.py"),
                f"--directory={directory}",
                *("--num_steps=12", "--checkpoint_every=5"),
                *flags,
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell starts what it puts in the background with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        PROCESSES.append(self._process)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stdout:
            with self._news:
                self.said += line
                self._news.notify()
        self._process.wait()
        with self._news:
            self._news.notify()

    def until(self, text):
        """Wait until its output contains a text."""
        with self._news:
            done = lambda: text in self.said or self._process.poll() is not None
            assert self._news.wait_for(done, 120)
            assert text in self.said, self.said
        return self

    def stop(self, number=signal.SIGTERM):
        """Send a stop signal."""
        self._process.send_signal(number)
        return self

    def end(self, timeout=120):
        """Wait for its exit code, negative for a signal."""
        try:
            code = self._process.wait(timeout)
        finally:
            self._process.kill()
            self._reader.join()
        return code


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    for process in PROCESSES:
        process.kill()
        process.wait()
    PROCESSES.clear()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an undisturbed stage: checkpoints 10 and 12."""
    directory = tmp_path_factory.mktemp("whole") / "stage"
    job = Job(directory)
    assert job.end() == 0, job.said
    return directory


def ends_like(directory, whole):
    """The same command resumes, and the result shows no trace of the failure."""
    job = Job(directory)
    assert job.end() == 0, job.said
    assert torture.differences(directory, whole) == []
    return job.said


# ---------------------------------------------------------------------------------------- SIGTERM


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_a_signal_saves_the_step_at_hand(tmp_path, whole, number, name):
    directory = tmp_path / "stage"
    job = Job(directory, "--pause=0.1").until("step 6/12").stop(number)
    assert job.end() == 143
    (step,) = re.findall(
        rf"^toy: stopped by {name} at step (\d+) of 12, which is saved; run the same "
        r"command to resume\.$",
        job.said,
        re.M,
    )
    assert "Traceback" not in job.said
    assert torture.steps_of(directory) == [5, int(step)]
    assert torture.lines_of(directory)[-1]["step"] == int(step) >= 6
    assert f"resumes from the checkpoint of step {step}." in ends_like(directory, whole)


@pytest.mark.slow
def test_a_second_sigterm_ends_at_once(tmp_path, whole):
    directory = tmp_path / "stage"
    job = Job(directory, "--slow_save=300").until("saves 5").stop()
    job.until("SIGTERM: saving after this step, then exiting; repeat to exit at once.").stop()
    assert job.end() == 143
    assert job.said.endswith("Second SIGTERM: exiting at once.\n")
    assert torture.steps_of(directory) == []
    ends_like(directory, whole)


@pytest.mark.slow
def test_a_second_sigterm_ends_a_device_that_hangs(tmp_path):
    """The loop waits for a computation, during which Python runs no signal handlers."""
    job = Job(tmp_path / "stage", "--wait_in=4").until("step 2/12").stop()
    job.until("SIGTERM: saving").stop()
    assert job.end() == 143
    assert job.said.endswith("Second SIGTERM: exiting at once.\n")


def test_a_second_sigterm_ends_what_does_not_return_to_python(tmp_path):
    """In code that never checks signals: a library that waits for a lost host."""
    job = Job(tmp_path / "stage", "--count_at=4").until("counts").stop()
    job.until("SIGTERM: saving").stop()
    assert job.end() == 143
    assert job.said.endswith("Second SIGTERM: exiting at once.\n")


def test_sigterm_in_the_last_save_is_not_forgotten(tmp_path, whole):
    directory = tmp_path / "stage"
    job = Job(directory, "--stages=2", "--slow_save=1").until("saves 12").stop()
    assert job.end() == 143, job.said
    assert re.search(r"^toy: stopped by SIGTERM at step 12 of 12, which is saved", job.said, re.M)
    assert not (tmp_path / "stage_2").exists()
    ends_like(directory, whole)


@pytest.mark.parametrize(
    "where",
    [pytest.param("--wait_outside", marks=pytest.mark.slow), "--wait_at=1"],
    ids=["after", "before"],
)
def test_sigterm_outside_of_training_ends_as_always(tmp_path, where):
    """Also before the first step: preparing text may take hours."""
    job = Job(tmp_path / "stage", where).until("waits").stop()
    assert job.end() == -signal.SIGTERM


def test_ctrl_c_outside_of_training_ends_with_one_line(tmp_path):
    job = Job(tmp_path / "stage", "--wait_at=1").until("waits").stop(signal.SIGINT)
    assert job.end() == 143
    assert job.said.splitlines()[-1].startswith("stopped by Ctrl-C: ")
    assert "Traceback" not in job.said


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def at_ten(tmp_path, whole):
    """A run that was killed after step 10 was saved."""
    directory = tmp_path / "stage"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints" / "12")
    return directory


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(tmp_path, whole):
    directory = tmp_path / "stage"
    shutil.copytree(whole, directory)
    largest = max(
        (p for p in (directory / "checkpoints" / "12").rglob("*") if p.is_file()),
        key=lambda path: path.stat().st_size,
    )
    content = largest.read_bytes()
    largest.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    job = Job(directory)
    assert job.end() == 0
    (warning,) = [line for line in job.said.splitlines() if "; moved to" in line]
    assert "the checkpoint of step 12 in" in warning
    assert f"moved to {directory / 'damaged' / '12'}, resuming from step 10" in warning
    assert "resumes from the checkpoint of step 10." in job.said
    assert torture.differences(directory, whole) == ["a checkpoint was found damaged"]


def test_no_whole_checkpoint_is_an_error_and_changes_nothing(at_ten):
    (at_ten / "checkpoints" / "10" / "_CHECKPOINT_METADATA").unlink(missing_ok=True)
    for path in (at_ten / "checkpoints" / "10").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    before = sorted(at_ten.rglob("*"))
    job = Job(at_ten)
    assert job.end() == 2
    assert len(job.said.splitlines()) == 1
    assert re.match("error: no checkpoint in .* is intact: .*step 10.* from a backup", job.said)
    assert sorted(at_ten.rglob("*")) == before


def test_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_space(at_ten, whole):
    """Emulated by RLIMIT_FSIZE: the arrays of a checkpoint don't fit, lines of metrics do."""
    job = Job(at_ten, "--file_bytes=20000")
    assert job.end() == 2
    (error,) = [line for line in job.said.splitlines() if line.startswith("error:")]
    assert error.startswith(f"error: the checkpoint of step 12 could not be written to {at_ten}")
    assert "Complete checkpoints there: 10. Free space" in error
    assert "Traceback" not in job.said
    assert torture.steps_of(at_ten) == [10]
    ends_like(at_ten, whole)


def _mount(folder, *options):
    """Mount a separate file system if this machine allows it."""
    folder.mkdir(exist_ok=True)
    try:
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    _mount(folder, "-t", "tmpfs", "-o", "size=4m", "none")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up(small_disk, whole):
    job = Job(small_disk / "stage", "--pause=0.3").until("step 6/12")
    while not (small_disk / "stage" / "checkpoints" / "5").exists():
        time.sleep(0.01)
    with open(small_disk / "filler", "wb", buffering=0) as filler:
        for size in (1 << 16, 64):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(size))
    assert job.end() == 2, job.said
    (error,) = [line for line in job.said.splitlines() if line.startswith("error:")]
    assert "No space left on device" in error
    assert str(small_disk / "stage") in error
    assert 5 in torture.steps_of(small_disk / "stage")
    (small_disk / "filler").unlink()
    ends_like(small_disk / "stage", whole)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(tmp_path, small_disk, whole):
    shutil.copytree(whole, small_disk / "stage")
    shutil.rmtree(small_disk / "stage" / "checkpoints" / "12")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    job = Job(small_disk / "stage")
    assert job.end() == 2, job.said
    (error,) = [line for line in job.said.splitlines() if line.startswith("error:")]
    assert "Read-only file system" in error
    assert str(small_disk / "stage") in error
    assert "Traceback" not in job.said
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    ends_like(small_disk / "stage", whole)


# -------------------------------------------------------------------------------------------- text


def go(directory, num_steps, *, stage=None, batches=None, optimizer=None, **values):
    """The loop in this process, around a stage of two numbers."""
    defaults = {"log_every": 1, "checkpoint_every": 2, "ema_decay": 0.5, "batch_size": B}
    loop_lib.train(
        stage or toy_stage(),
        loop_lib.Settings(num_steps=num_steps, **(defaults | values)),
        name="toy",
        optimizer=optimizer or optax.adam(0.1),
        batches=batches or Stream(),
        base=None,
        key=jax.random.key(0),
        mesh=make_mesh(),
        directory=directory,
        metadata={},
    )


@pytest.fixture
def shard_folder(tmp_path):
    """64 shards of two blocks; a function that opens them and gives their batches."""
    folder, files = tmp_path / "text", []
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(64):
        shard = shards.ShardWriter(folder, f"{number:02}.array_record", "train", np.dtype("<u2"))
        shard.write(rng.integers(0, 100, (2, 5)))
        files += shard.close()

    def stream(start, after=None, happens=None):
        source = shards.Shards(folder, files, 5, np.dtype("<u2"))
        blocks = prepared_lib.Batches(source, batch_size=B, seed=0)
        for step, x1_BL in enumerate(blocks.iterate(start, prefetch=2), start + 1):
            if step == after:
                happens()
            yield {"x1": x1_BL}

    return folder, stream


def assert_saved_up_to_the_end(directory):
    """The number of steps depends on prefetching."""
    reached = torture.lines_of(directory)[-1]["step"]
    assert 4 <= reached < 12
    assert torture.steps_of(directory)[-1] == reached // 2 * 2


def test_a_shard_that_vanishes_is_named(tmp_path, shard_folder):
    folder, stream = shard_folder
    go(tmp_path / "whole", 12, batches=stream)
    away = tmp_path / "away"
    lose = functools.partial(os.rename, folder, away)
    with pytest.raises(FileNotFoundError, match=rf"{folder}/\d\d\.array_record has disappeared"):
        go(tmp_path / "run", 12, batches=functools.partial(stream, after=5, happens=lose))
    assert_saved_up_to_the_end(tmp_path / "run")
    os.rename(away, folder)
    go(tmp_path / "run", 12, batches=stream)
    assert torture.differences(tmp_path / "run", tmp_path / "whole") == []


def test_a_shard_that_is_cut_is_named(tmp_path, shard_folder):
    folder, stream = shard_folder

    def cut():
        for path in folder.iterdir():
            os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(
        ValueError, match=rf"{folder}/\d\d\.array_record (cannot be read|is damaged)"
    ):
        go(tmp_path / "run", 12, batches=functools.partial(stream, after=5, happens=cut))
    assert_saved_up_to_the_end(tmp_path / "run")


# ------------------------------------------------------------------- steps whose loss is not finite


def ones(loss):
    """A stage whose gradients aren't zero at the start."""
    return toy_stage(loss)._replace(init_params=lambda key, base: {"w": jnp.ones(2)})


class Poisoned(Stream):
    """Batches that are bad at some steps; `killed_at` simulates a power cut."""

    def __init__(self, *steps, killed_at=None):
        super().__init__(stop_at=killed_at)
        self._steps = steps

    def __call__(self, start):
        for n, batch in enumerate(super().__call__(start), start + 1):
            yield {"x1": np.full_like(batch["x1"], -1)} if n in self._steps else batch


@pytest.mark.parametrize("loss", [poisoned, steep])
def test_a_skipped_step_changes_nothing_but_counts(tmp_path, loss, caplog):
    given = {"stage": ones(loss), "checkpoint_every": 1, "max_skipped": 1}
    given["retention"] = checkpoint.Retention(keep=9)
    go(tmp_path, 6, batches=Poisoned(4), **given)
    parts = ("params", "ema", "opt_state")
    three, four, five = (saved(tmp_path, *parts, step=step) for step in (3, 4, 5))
    assert_same_bits(four, three)
    assert np.any(np.asarray(five["params"]["w"]) != np.asarray(four["params"]["w"]))
    counts = [saved(tmp_path, "step", "skipped", step=step) for step in (3, 4, 5)]
    assert [(int(c["step"]), int(c["skipped"])) for c in counts] == [(3, 0), (4, 1), (5, 0)]
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 0, 0, 1, 0, 0]
    assert "loss" not in lines(tmp_path)[3]
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path) if line["step"] != 4)
    (warning,) = [record.message for record in caplog.records if "skipped" in record.message]
    what = "loss is nan" if loss is poisoned else "grad_norm is nan"
    assert re.fullmatch(rf"toy: .*{what} at step 4, which is skipped\.", warning)


def test_a_run_stops_after_too_many_skipped_steps_in_a_row(tmp_path):
    given = {"stage": ones(poisoned), "max_skipped": 2, "checkpoint_every": 1}
    text = (
        r"loss is nan.* at step 6 \(3 steps in a row, optim\.max_skipped=2\)\. .* step 5 are kept"
    )
    with pytest.raises(loop_lib.Diverged, match=text):
        go(tmp_path / "whole", 12, batches=Poisoned(4, 5, 6), **given)
    assert checkpoint.latest_step(tmp_path / "whole" / "checkpoints") == 5
    # Two of them are in the checkpoint: the count continues.
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", 12, batches=Poisoned(4, 5, 6, killed_at=5), **given)
    assert checkpoint.latest_step(tmp_path / "run" / "checkpoints") == 5
    with pytest.raises(loop_lib.Diverged, match=text):
        go(tmp_path / "run", 12, batches=Poisoned(4, 5, 6), **given)


def test_a_good_step_resets_the_count(tmp_path):
    given = {"stage": ones(poisoned), "max_skipped": 2, "log_every": 4}
    go(tmp_path, 12, batches=Poisoned(1, 2, 4, 5, 9), **given)
    assert [(line["step"], line["skipped"]) for line in lines(tmp_path)] == [
        (4, 3),
        (8, 1),
        (12, 1),
    ]
    # Its mean is that of the steps that were taken: 3 of them after 4 steps less 3 skipped.
    each = tmp_path / "each"
    go(each, 12, batches=Poisoned(1, 2, 4, 5, 9), **(given | {"log_every": 1}))
    alone = {line["step"]: line["loss"] for line in lines(each) if "loss" in line}
    assert lines(tmp_path)[0]["loss"] == pytest.approx(alone[3])
    assert lines(tmp_path)[1]["loss"] == pytest.approx(np.mean([alone[n] for n in (6, 7, 8)]))


def test_without_a_bad_step_skipping_changes_no_bit(tmp_path):
    for name, allowed in (("never", 0), ("two", 2)):
        go(tmp_path / name, 5, max_skipped=allowed)
    assert_same_bits(*(saved(tmp_path / name, *EVERYTHING) for name in ("never", "two")))


# ---------------------------------------------------------------------------------------- watchdog


@pytest.mark.parametrize(
    "where", ["--wait_at=6", pytest.param("--wait_in=7", marks=pytest.mark.slow)]
)
def test_a_step_that_never_ends_is_ended_with_its_stacks(tmp_path, whole, where):
    directory = tmp_path / "stage"
    job = Job(directory, where, "--watchdog_minutes=0.05")
    assert job.end() == 1
    assert "Timeout (0:00:03)!" in job.said
    threads = job.said.count("(most recent call first):")
    assert threads >= 2
    frames = job.said.partition("Timeout (")[2]
    assert re.search(r'fsdfm_jax/training/loop\.py", line \d+ in train', frames)
    assert ("toy_job.py" in frames and "in batches" in frames) == (where == "--wait_at=6")
    assert torture.steps_of(directory) == [5]
    ends_like(directory, whole)


@pytest.mark.slow
def test_without_watchdog_nothing_is_ended(tmp_path):
    job = Job(tmp_path / "stage", "--wait_at=4").until("waits")
    with pytest.raises(subprocess.TimeoutExpired):
        job.end(timeout=1.0)
    assert "Timeout" not in job.said


# --------------------------------------------------------------- what else a checkpoint has to hold


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_moments_of_half_the_size_and_batches_in_parts_survive_a_kill(tmp_path, accumulate):
    values = {"optimizer": optax.adam(0.1, mu_dtype=jnp.bfloat16), "accumulate": accumulate}
    values |= {"batch_size": 16}
    text = lambda **given: (
        lambda start: ({"x1": np.tile(batch["x1"], (2, 1))} for batch in Stream(**given)(start))
    )
    go(tmp_path / "whole", 9, batches=text(), **values)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", 9, batches=text(stop_at=5), **values)
    assert torture.steps_of(tmp_path / "run")[-1] == 4
    go(tmp_path / "run", 9, batches=text(), **values)
    assert torture.differences(tmp_path / "run", tmp_path / "whole") == []
    moments = saved(tmp_path / "run", "opt_state")["opt_state"]["0"]
    assert (moments["mu"]["w"].dtype, moments["nu"]["w"].dtype) == (jnp.bfloat16, jnp.float32)


# --------------------------------------------------------------------------- another configuration


@pytest.fixture
def begun(tmp_path):
    """(config, folder) of a run with a checkpoint, as far as `main.check` looks at it."""
    config = base_config.get_config()
    config.pipeline = "pretrain"
    config.model.width, config.model.num_blocks, config.model.num_heads = 16, 1, 2
    config.pretrain.batch_size = 32
    _, recipes, _ = main.check(config, tmp_path)
    model = ModelConfig(vocab_size=300, width=16, num_blocks=1, num_heads=2, cond_width=8)
    metadata = recipe.make_metadata(
        config.to_dict(),
        model,
        recipes["pretrain"],
        run="pretrain",
        stage="pretrain",
        tokenizer="t",
        data="d",
    )
    directory = workdir.stage_directory(tmp_path, "pretrain") / "checkpoints"
    with checkpoint.Checkpoints(directory, retention=checkpoint.Retention()) as checkpoints:
        checkpoints.save(2, {"w": np.ones(2)}, metadata)
    return config, tmp_path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pretrain.batch_size", 16, r"pretrain\.batch_size: 32 before, 16 now"),
        ("pretrain.accumulate", 2, r"pretrain\.accumulate: 1 before, 2 now"),
        (
            "optim.moment_dtype",
            "bfloat16",
            r"optim\.moment_dtype: 'float32' before",
        ),
    ],
)
def test_what_changes_the_run_is_refused_by_name(begun, key, value, message):
    config, folder = begun
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        main.check(config, folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh.data": 4, "mesh.fsdp": 2},
        {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
        {"model.remat": "full"},
        {"model.attention": "manual"},
        {"model.logits_mib": 7},
        {"train.checkpoint_every": 7, "train.keep_every": 14, "train.keep_best": 1},
        {"train.watchdog_minutes": 5.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_rounding_at_most_is_accepted(begun, changes):
    config, folder = begun
    config.update_from_flattened_dict(changes)
    _, _, mesh = main.check(config, folder)
    assert mesh.size == 8
    assert mesh.shape["fsdp"] == changes.get("mesh.fsdp", 1)


# --------------------------------------------------------------------------------------- retention


def test_the_newest_the_regular_and_the_best_are_kept(tmp_path):
    values = {"retention": checkpoint.Retention(keep=1, keep_every=6, keep_best=2)}
    go(tmp_path / "whole", 16, **values)
    loss = {line["step"]: line["loss"] for line in lines(tmp_path / "whole")}
    means = {step: np.mean([loss[step - 1], loss[step]]) for step in range(2, 17, 2)}
    best = sorted(means, key=means.get)[:2]
    kept = sorted({16, 6, 12, *best})
    assert len(kept) > 3  # or the best would show nothing
    assert torture.steps_of(tmp_path / "whole") == kept
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", 16, batches=Stream(stop_at=9), **values)
    go(tmp_path / "run", 16, **values)
    assert torture.steps_of(tmp_path / "run") == kept


@pytest.mark.slow
def test_the_best_go_by_the_metric_that_is_named(tmp_path):
    for metric in ("loss", "grad_norm"):
        retention = checkpoint.Retention(keep=1, keep_best=1, metric=metric)
        go(tmp_path / metric, 16, checkpoint_every=1, retention=retention)
        values = {line["step"]: line[metric] for line in lines(tmp_path / metric)}
        best = min(values, key=values.get)
        assert torture.steps_of(tmp_path / metric) == sorted({16, best})


@pytest.mark.parametrize(
    ("key", "value"), [("keep_every", -1), ("keep_best", -1), ("best_metric", "")]
)
def test_retention_that_cannot_be_is_refused_by_name(key, value):
    config = base_config.get_config()
    config.pipeline = "pretrain"
    config.train[key] = value
    with pytest.raises(ValueError, match=rf"config\.train\.{key} must be .*, got {value!r}"):
        schema.check(config)


def test_retention_and_watchdog_come_from_the_config():
    config = base_config.get_config()
    values = {"keep_checkpoints": 3, "keep_every": 5, "keep_best": 7, "best_metric": "path_loss"}
    config.train.update(values | {"watchdog_minutes": 11.0})
    config.optim.max_skipped, config.pretrain.accumulate = 13, 17
    found = pipeline.train_settings(config, "pretrain")
    assert found.retention == checkpoint.Retention(3, 5, 7, "path_loss")
    assert (found.watchdog_minutes, found.max_skipped, found.accumulate) == (11.0, 13, 17)
