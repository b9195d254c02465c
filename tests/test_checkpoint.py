"""Checkpoints: bit-exact across shardings, safe against donation and SIGKILL, never misread."""

import errno
import functools
import json
import logging
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from fsdfm_jax.training import checkpoint
from fsdfm_jax.training.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    NotACheckpoint,
    Retention,
    SaveFailed,
    restore_part,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]


class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    opt_state: Any


def make_state(seed=0, ema=True, width=16):
    rng = np.random.default_rng(seed)
    params = {
        "embed": jnp.asarray(rng.normal(size=(8, width)), jnp.float32),
        "block": {
            "kernel": jnp.asarray(rng.normal(size=(width, 8)), jnp.bfloat16),
            "bias": jnp.asarray([np.nan, -0.0, np.inf, 1e-45], jnp.float32),
        },
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))  # has empty states
    return State(
        step=jnp.int32(7),
        params=params,
        ema=jax.tree.map(lambda x: x + 1, params) if ema else None,
        opt_state=tx.init(params),
    )


def abstract(state, sharding=None):
    def leaf(x):
        place = x.sharding if sharding is None else sharding(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(leaf, state)


def mesh_sharding(x):
    """Rows over eight devices if divisible, else replicated."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, P("data") if x.ndim and x.shape[0] % 8 == 0 else P())


def on_one_device(x):
    return SingleDeviceSharding(jax.devices()[3])


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.dtype, g.shape) == (w.dtype, w.shape)
        assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


@pytest.mark.parametrize("ema", [True, False])
def test_round_trip_is_bit_exact_and_keeps_containers(tmp_path, ema):
    state = make_state(ema=ema)
    with Checkpoints(tmp_path, retention=Retention()) as checkpoints:
        checkpoints.save(7, state, {"stage": "pretrain", "steps": (1, 2), "rate": 0.5})
        restored = checkpoints.restore(abstract(state))
        assert checkpoints.metadata() == {"stage": "pretrain", "steps": [1, 2], "rate": 0.5}
    assert_same_bits(restored, state)
    assert restored.step.ndim == 0


@pytest.mark.parametrize(
    ("saved_on", "restored_on"), [(mesh_sharding, on_one_device), (on_one_device, mesh_sharding)]
)
def test_restores_onto_another_sharding(tmp_path, saved_on, restored_on):
    state = make_state()
    placed = jax.tree.map(lambda x: jax.device_put(x, saved_on(x)), state)
    target = abstract(state, restored_on)
    with Checkpoints(tmp_path, retention=Retention()) as checkpoints:
        checkpoints.save(1, placed, {})
        restored = checkpoints.restore(target)
    assert_same_bits(restored, state)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


def test_only_the_newest_survive_and_nothing_temporary_is_left(tmp_path):
    with Checkpoints(tmp_path / "a" / "b", retention=Retention(keep=2)) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 3, 10, 11):
            checkpoints.save(step, make_state(seed=step), {"step": step})
        assert checkpoints.latest_step() == 11
        assert checkpoints.metadata(10) == {"step": 10}
        want = make_state(seed=10)
        assert_same_bits(checkpoints.restore(abstract(want), 10), want)
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["10", "11"]
    with Checkpoints(tmp_path / "a" / "b", retention=Retention()) as checkpoints:
        assert checkpoints.latest_step() == 11
    assert checkpoint.latest_step(tmp_path / "a" / "b") == 11


def test_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("runs/x", retention=Retention()) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)}, {})
    assert restore_part("runs/x", ("w",))["w"].tolist() == [1, 1]


def test_the_state_may_be_donated_right_after_save(tmp_path):
    """On CPUs the save holds the buffers, so that JAX copies instead of reusing them: safe too."""

    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(state):
        return jax.tree.map(lambda x: x * 0 - 5, state)

    # 24 MB, so that the disk is still at work when the buffers are overwritten
    make = lambda: {f"w{i}": jnp.arange(1_000_000, dtype=jnp.float32) + i for i in range(6)}
    placed = jax.tree.map(lambda x: jax.device_put(x, mesh_sharding(x)), make())
    for name, state in {"one": make(), "eight": placed}.items():
        host = np.arange(1000)
        with Checkpoints(tmp_path / name, retention=Retention()) as checkpoints:
            checkpoints.save(1, state | {"host": host}, {})
            host[:] = -5
            for _ in range(4):
                state = overwrite(state)
            jax.block_until_ready(state)
        part = restore_part(tmp_path / name, (*make(), "host"))
        np.testing.assert_array_equal(part.pop("host"), np.arange(1000))
        assert_same_bits(part, make())


def test_part_without_the_tree(tmp_path):
    state = make_state()
    placed = jax.tree.map(lambda x: jax.device_put(x, mesh_sharding(x)), state)
    with Checkpoints(tmp_path, retention=Retention()) as checkpoints:
        checkpoints.save(1, placed, {"a": 1})
    part = restore_part(tmp_path, ("ema", "step", "params/block"))
    want = {"ema": state.ema, "step": state.step, "params/block": state.params["block"]}
    assert_same_bits(part, want)
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(part))
    rules = lambda name, leaf: mesh_sharding(leaf) if name == "ema/embed" else on_one_device(leaf)
    part = restore_part(tmp_path, ("ema",), sharding=rules)
    assert_same_bits(part["ema"], state.ema)
    assert len(part["ema"]["embed"].devices()) == 8
    assert part["ema"]["block"]["bias"].devices() == {jax.devices()[3]}
    moments = restore_part(tmp_path, ("opt_state",))["opt_state"]["1"]["0"]
    assert_same_bits(moments["mu"], state.opt_state[1][0].mu)
    assert checkpoint.read_metadata(tmp_path) == {"a": 1}


def test_part_reads_only_the_part(tmp_path, monkeypatch):
    """The moments are twice the weights; generation must not hold them."""
    with Checkpoints(tmp_path, retention=Retention()) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.ones(1000)}, "moments": jnp.ones(4_000_000)}, {})
    handler, asked = checkpoint.ocp.handlers.PyTreeHandler, []
    load = handler.load

    def spy(self, directory, abstract):
        asked.append(abstract)
        return load(self, directory, abstract)

    monkeypatch.setattr(handler, "load", spy)
    restore_part(tmp_path, ("params",))
    assert sum(leaf.size for leaf in jax.tree.leaves(asked)) == 1000


def test_errors_name_the_leaves(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path, retention=Retention()) as checkpoints:
        with pytest.raises(NotACheckpoint, match="no complete checkpoint"):
            checkpoints.restore(abstract(state))
        with pytest.raises(NotACheckpoint, match="no complete checkpoint"):
            checkpoints.metadata()
        checkpoints.save(5, state, {})
        other = state._replace(
            step=jnp.float32(0),
            params={"embed": jnp.zeros((8, 3)), "new": jnp.zeros(2), "block": {}},
            ema=None,
        )
        with pytest.raises(NotACheckpoint) as error:
            checkpoints.restore(abstract(other))
        message = str(error.value)
        assert "params/embed: saved float32[8, 16], expected float32[8, 3]" in message
        assert "step: saved int32[], expected float32[]" in message
        assert "missing in the checkpoint: params/new" in message
        assert "only in the checkpoint: params/block/kernel" in message
        assert "only in the checkpoint: ema/embed" in message
        assert "opt_state" not in message
        with pytest.raises(NotACheckpoint, match=r"no step 4 .* it has \[5\]"):
            checkpoints.restore(abstract(state), 4)
        with pytest.raises(ValueError, match="'step' has no sharding"):
            checkpoints.restore(jax.eval_shape(lambda: state))
    with pytest.raises(NotACheckpoint, match="no part 'emma'; it has ema, opt_state, params, step"):
        restore_part(tmp_path, ("emma",))
    with pytest.raises(NotACheckpoint, match="no step 4"):
        restore_part(tmp_path, ("ema",), 4)
    with pytest.raises(ValueError, match="tuple of subtree names"):
        restore_part(tmp_path, "ema")


def test_readers_create_nothing(tmp_path):
    for read in (lambda d: restore_part(d, ("ema",)), checkpoint.read_metadata):
        with pytest.raises(NotACheckpoint, match="no directory"):
            read(tmp_path / "typo")
        with pytest.raises(NotACheckpoint, match="no complete checkpoint"):
            read(tmp_path)
    assert checkpoint.latest_step(tmp_path / "typo") is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_one_clear_error(tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "notes.txt").write_text("not by us")
    with pytest.raises(DamagedCheckpoint, match=r"step 3 in .* its metadata cannot be read"):
        restore_part(tmp_path, ("ema",))


def test_bad_input(tmp_path):
    for wrong, complaint in [
        ({"keep": 0}, "keep must be an integer >= 1"),
        ({"keep": 2.0}, "keep must be an integer >= 1"),
        ({"keep_every": -1}, "keep_every must be an integer >= 0"),
        ({"keep_best": True}, "keep_best must be an integer >= 0"),
        ({"metric": ""}, "metric must be the name"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            Retention(**wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        Checkpoints(tmp_path / "file", retention=Retention())
    with Checkpoints(tmp_path / "run", retention=Retention()) as checkpoints:
        ones = jnp.ones(2)
        for state, complaint in [
            ({"a.b": ones}, "cannot be named"),
            ({"a/b": ones}, "cannot be named"),
            (ones, "cannot be named"),
            ({"a": 1.0}, "only arrays, but 'a' is float"),
            ({"a": jnp.zeros((0, 3))}, "'a' has no elements"),
        ]:
            with pytest.raises(ValueError, match=complaint):
                checkpoints.save(1, state, {})
        for metadata in ({"f": print}, {"x": float("nan")}):
            with pytest.raises(ValueError, match="must be a JSON dict"):
                checkpoints.save(1, {"a": ones}, metadata)
        checkpoints.save(2, {"a": ones}, {})
        for step in (1, 2):
            with pytest.raises(ValueError, match="already has step 2"):
                checkpoints.save(step, {"a": ones}, {})


def test_orbax_is_quiet_but_warnings_pass(tmp_path):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("absl")
    logger.addHandler(handler)
    level = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.INFO)
    try:
        with Checkpoints(tmp_path, retention=Retention()) as checkpoints:
            checkpoints.save(1, {"a": jnp.ones(2)}, {})
            restore_part(tmp_path, ("a",)) if checkpoints.latest_step() else None
        absl_logging.info("ours")
        path = os.path.join("site-packages", "orbax", "checkpoint", "x.py")
        for severity in (logging.INFO, logging.WARNING, logging.ERROR):
            name = logging.getLevelName(severity)
            logger.handle(logger.makeRecord("absl", severity, path, 1, name, (), None))
    finally:
        absl_logging.set_verbosity(level)
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == ["ours", "WARNING", "ERROR"]


CHILD = """
    import os, signal, sys, threading, time
    import jax.numpy as jnp
    from fsdfm_jax.training.checkpoint import Checkpoints, Retention

    directory, moment = sys.argv[1:]
    state = lambda step: {f"w{i}": jnp.full(100_000, 100.0 * step + i) for i in range(30)}

    def files():
        return [name for _, _, names in os.walk(directory) for name in names]

    def kill_when(condition):
        while not condition():
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = Checkpoints(directory, retention=Retention(keep=1))
    checkpoints.save(1, state(1), {"step": 1})
    checkpoints.wait()
    count = len(files())
    conditions = {
        "returned": lambda: True,
        "writing": lambda: len(files()) >= count + 4,
        "committed": lambda: os.path.exists(os.path.join(directory, "2")),
    }
    checkpoints.save(2, state(2), {"step": 2})
    kill_when(conditions[moment])
"""

READER = """
    import sys
    import jax, numpy as np
    from fsdfm_jax.training.checkpoint import restore_part

    assert jax.device_count() == 1
    part = restore_part(sys.argv[1], ("ema", "step"))
    np.savez(sys.argv[2], step=part["step"], embed=part["ema"]["embed"])
"""


def run_python(code, *args):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, args)], env=env)


def test_a_killed_save_leaves_a_usable_checkpoint(tmp_path):
    moments = ("returned", "writing", "committed")
    children = {moment: run_python(CHILD, tmp_path / moment, moment) for moment in moments}
    for child in children.values():
        assert child.wait(timeout=60) == -signal.SIGKILL
    steps = {moment: checkpoint.latest_step(tmp_path / moment) for moment in moments}
    assert steps == {"returned": 1, "writing": 1, "committed": 2}
    # Else the kill came too late to test anything.
    assert any("tmp" in name for name in os.listdir(tmp_path / "writing"))
    for moment, step in steps.items():
        with Checkpoints(tmp_path / moment, retention=Retention(keep=1)) as checkpoints:
            assert checkpoints.latest_step() == step
            assert checkpoints.metadata() == {"step": step}
            want = {f"w{i}": jnp.full(100_000, 100.0 * step + i) for i in range(30)}
            # written by a process with one device, read onto eight
            restored = checkpoints.restore(abstract(want, mesh_sharding))
            assert_same_bits(restored, want)
            checkpoints.save(3, restored, {"step": 3})  # the run continues
        assert os.listdir(tmp_path / moment) == ["3"]


def test_one_device_process_reads_what_eight_devices_saved(tmp_path):
    state = make_state()
    placed = jax.tree.map(lambda x: jax.device_put(x, mesh_sharding(x)), state)
    with Checkpoints(tmp_path / "run", retention=Retention()) as checkpoints:
        checkpoints.save(7, placed, {})
    assert run_python(READER, tmp_path / "run", tmp_path / "read.npz").wait(timeout=60) == 0
    read = np.load(tmp_path / "read.npz")
    assert read["step"] == 7
    np.testing.assert_array_equal(read["embed"], state.ema["embed"])


def test_saving_once(tmp_path):
    tree = {"params": {"kernel": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}}
    checkpoint.save_once(tmp_path / "new", 7, tree | {"step": np.int32(7)}, {"a": [1]})
    assert checkpoint.latest_step(tmp_path / "new") == 7
    assert checkpoint.read_metadata(tmp_path / "new") == {"a": [1]}
    read = restore_part(tmp_path / "new", ("params",))["params"]
    np.testing.assert_array_equal(read["kernel"], tree["params"]["kernel"])
    assert restore_part(tmp_path / "new", ("step",))["step"] == 7
    with pytest.raises(ValueError, match="exists already"):
        checkpoint.save_once(tmp_path / "new", 8, tree, {})
    with pytest.raises(ValueError, match="only arrays, but 'params/kernel' is float"):
        checkpoint.save_once(tmp_path / "other", 7, {"params": {"kernel": 1.0}}, {})
    with pytest.raises(ValueError, match="must be a JSON dict"):
        checkpoint.save_once(tmp_path / "other", 7, tree, {"a": np.nan})
    assert not (tmp_path / "other").exists()


def test_shapes_of_a_part(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path / "run", retention=Retention()) as checkpoints:
        checkpoints.save(3, state, {})
    shapes = checkpoint.leaf_shapes(tmp_path / "run", "ema")
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in shapes.items()} == {
        "embed": ((8, 16), jnp.float32),
        "block/kernel": ((16, 8), jnp.bfloat16),
        "block/bias": ((4,), jnp.float32),
    }
    with pytest.raises(NotACheckpoint, match="has no part 'teacher'; it has ema, opt_state"):
        checkpoint.leaf_shapes(tmp_path / "run", "teacher")
    with pytest.raises(NotACheckpoint):
        checkpoint.leaf_shapes(tmp_path / "run", "ema", 4)


def test_a_record_stands_for_its_step(tmp_path, monkeypatch):
    state = make_state()
    with Checkpoints(tmp_path, retention=Retention()) as checkpoints:
        checkpoints.save(3, state, {"a": 1})
        checkpoints.save(4, jax.tree.map(lambda x: x + 1, state), {"a": 2})
    record = checkpoint.read_record(tmp_path, 3)
    assert (record.step, record.metadata) == (3, {"a": 1})
    assert checkpoint.read_record(tmp_path).step == 4
    shapes = checkpoint.leaf_shapes(tmp_path, "ema", 3)
    want = restore_part(tmp_path, ("ema", "step"), 3)
    monkeypatch.setattr(checkpoint, "_read_record", lambda *_: pytest.fail("read again"))
    assert checkpoint.read_record(tmp_path, record) is record
    assert checkpoint.leaf_shapes(tmp_path, "ema", record) == shapes
    jax.tree.map(assert_same_bits, restore_part(tmp_path, ("ema", "step"), record), want)


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(keep=1), [8]),
        (Retention(keep=3), [6, 7, 8]),
        (Retention(keep=1, keep_every=3), [3, 6, 8]),
        (Retention(keep=1, keep_best=2), [2, 5, 8]),
        (Retention(keep=1, keep_best=9), [1, 2, 3, 5, 6, 8]),
        (Retention(keep=2, keep_every=4, keep_best=1, metric="error"), [1, 4, 7, 8]),
    ],
)
def test_retention(tmp_path, retention, kept):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: np.nan, 5: 1.0, 6: 9.0, 7: -np.inf, 8: 4.0}
    for steps in ((1, 2, 3, 4), (5, 6, 7, 8)):  # opened again: the metrics are read back
        with Checkpoints(tmp_path / "c", retention=retention) as checkpoints:
            for step in steps:
                metrics = {"loss": losses[step], "error": float(step)}
                checkpoints.save(step, {"a": jnp.ones(2)}, {"step": step}, metrics)
            found = checkpoints.steps()
    assert found == kept
    assert sorted(map(int, os.listdir(tmp_path / "c"))) == kept


def test_another_process_that_is_gone_is_no_failed_write(tmp_path, monkeypatch):
    """A launcher restarts the job after transient errors only."""

    def gone(*_, **__):
        raise jax.errors.JaxRuntimeError("Connection closed by peer")

    monkeypatch.setattr(checkpoint.ocp, "save_async", gone)
    checkpoints = Checkpoints(tmp_path, retention=Retention())
    with pytest.raises(jax.errors.JaxRuntimeError, match="closed by peer"):
        checkpoints.save(1, {"a": jnp.ones(2)}, {})


def test_a_save_that_fails_does_not_hide_what_went_wrong_first(tmp_path, monkeypatch, warnings):
    def full(*_, **__):
        class Response:
            def result(self):
                raise OSError(errno.ENOSPC, "No space left on device")

        return Response()

    monkeypatch.setattr(checkpoint.ocp, "save_async", full)

    def job():
        with Checkpoints(tmp_path, retention=Retention()) as checkpoints:
            checkpoints.save(1, {"a": jnp.ones(2)}, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        job()
    assert "the checkpoint of step 1 could not be written" in warnings[-1]


def test_metrics_that_are_not_there(tmp_path):
    with Checkpoints(tmp_path, retention=Retention(keep=1, keep_best=1)) as checkpoints:
        with pytest.raises(ValueError, match=r"chosen by 'loss', but the metrics are \['error'\]"):
            checkpoints.save(1, {"a": jnp.ones(2)}, {}, {"error": 1.0})
        checkpoints.save(1, {"a": jnp.ones(2)}, {}, {"loss": 5})
        checkpoints.save(2, {"a": jnp.ones(2)}, {})
        checkpoints.save(3, {"a": jnp.ones(2)}, {})
        assert checkpoints.steps() == [1, 3]


# What happens to one file: its new content, None if it is deleted.
MISHAPS = {
    "deleted": lambda data: None,
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "flipped": lambda data: flipped(data, len(data) // 2),
}


def flipped(data, index):
    """One bit changed; which one depends on the index."""
    byte = bytes([data[index] ^ (1 << index % 8)]) if data else b""
    return data[:index] + byte + data[index + 1 :]


@pytest.fixture
def warnings():
    """Texts of the warnings; JAX, Orbax and this project write them to the same log."""
    texts = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    logging.getLogger("absl").addHandler(handler)
    yield texts
    logging.getLogger("absl").removeHandler(handler)


def two_checkpoints(folder, steps=(1, 2)):
    """{step: state}; also of small leaves, which stand in other files, and of 64 bits."""
    states = {}
    with Checkpoints(folder / "checkpoints", retention=Retention(keep=9)) as checkpoints:
        for step in steps:
            big = np.random.default_rng(step).normal(size=(64, 33)).astype(np.float32)
            small = {"bias": jnp.full(8, step, jnp.bfloat16), "count": np.int64(2**40 + step)}
            states[step] = jax.tree.map(np.asarray, {"big": big, "small": small})
            placed = states[step] | {"big": jax.device_put(big, mesh_sharding(big))}
            checkpoints.save(step, placed, {"step": step, "of": "a run"}, {"loss": 1.0})
    return states


def check_mishap(folder, file, content, states, warnings):
    """Check that step 2 is restored unchanged, or step 1 with a report. Return which."""
    path = folder / "checkpoints" / "2" / file
    kept = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    warnings.clear()
    with Checkpoints(folder / "checkpoints", retention=Retention()) as checkpoints:
        step, state = checkpoints.restore_latest(abstract(states[1], on_one_device))
        assert_same_bits(state, states[step])
        assert checkpoints.metadata(step) == {"step": step, "of": "a run"}
    named = [text for text in warnings if "step 2" in text and "damaged" in text]
    if step == 1:
        assert len(named) == 1
        assert "resuming from step 1" in named[0]
        assert os.listdir(folder / "checkpoints") == ["1"]
        (folder / "damaged" / "2").rename(folder / "checkpoints" / "2")
    assert os.listdir(folder / "damaged") == [] if step == 1 else not named
    assert sorted(os.listdir(folder / "checkpoints")) == ["1", "2"]
    path.write_bytes(kept)
    return step


def files_of(folder):
    root = folder / "checkpoints" / "2"
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


# Orbax leaves the reads beside a failed one to themselves.
UNHEEDED = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


@UNHEEDED
def test_any_damaged_file_is_harmless_or_named(tmp_path, warnings):
    states = two_checkpoints(tmp_path)
    back_to = {}
    for number, file in enumerate(files_of(tmp_path)):
        data = (tmp_path / "checkpoints" / "2" / file).read_bytes()
        # Each file is deleted, cut and changed; of the other mishaps one.
        for name in ("deleted", "cut", "flipped", ("empty", "zeros")[number % 2]):
            step = check_mishap(tmp_path, file, MISHAPS[name](data), states, warnings)
            back_to.setdefault(step, set()).add(file.name)
    assert len(back_to[1]) >= 4  # at least: the metadata, the tree, the index, the data
    assert "_CHECKPOINT_METADATA" in back_to[1] - back_to.get(2, set())


@UNHEEDED
@pytest.mark.slow
def test_any_damaged_byte_is_harmless_or_named(tmp_path, warnings):
    states = two_checkpoints(tmp_path)
    for file in files_of(tmp_path):
        data = (tmp_path / "checkpoints" / "2" / file).read_bytes()
        for mishap in MISHAPS.values():
            check_mishap(tmp_path, file, mishap(data), states, warnings)
        for index in sorted({*np.linspace(0, len(data) - 1, 60).astype(int).tolist()} - {-1}):
            check_mishap(tmp_path, file, flipped(data, index), states, warnings)


def edit_metadata(folder, step, change):
    path = folder / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


EDITS = {
    "user": lambda content: content["custom_metadata"]["metadata"].update(of="another"),
    "metrics": lambda content: content["custom_metadata"]["metrics"].update(loss=0.5),
    "shape": lambda content: content["custom_metadata"]["leaves"]["big"].__setitem__(1, [33, 64]),
    "digest": lambda content: content["custom_metadata"].pop("sha256"),
    "all": lambda content: content.pop("custom_metadata"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_metadata(tmp_path, warnings, edit):
    states = two_checkpoints(tmp_path)
    edit_metadata(tmp_path, 2, EDITS[edit])
    directory = tmp_path / "checkpoints"
    for read in (checkpoint.read_metadata, lambda d: restore_part(d, ("big",))):
        with pytest.raises(
            DamagedCheckpoint, match=r"step 2 .* resumes from the previous checkpoint"
        ):
            read(directory)
    assert checkpoint.latest_step(directory) == 1
    assert "step 2" in warnings[-1]
    with Checkpoints(directory, retention=Retention()) as checkpoints:
        assert checkpoints.latest_step() == 1
        step, state = checkpoints.restore_latest(abstract(states[1], on_one_device))
    assert step == 1
    assert_same_bits(state, states[1])


def test_a_renamed_folder_is_damage(tmp_path, warnings):
    states = two_checkpoints(tmp_path, (1, 2))
    (tmp_path / "checkpoints" / "2").rename(tmp_path / "checkpoints" / "20")
    with Checkpoints(tmp_path / "checkpoints", retention=Retention()) as checkpoints:
        step, _ = checkpoints.restore_latest(abstract(states[1], on_one_device))
        assert step == 1
        assert "saved as step 2" in warnings[-1]
        # The run resumes from there and repeats the step that was moved away.
        checkpoints.save(2, states[2], {})
        assert checkpoints.steps() == [1, 2]
    # Nothing that was moved aside is overwritten later.
    shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "20")
    with Checkpoints(tmp_path / "checkpoints", retention=Retention()) as checkpoints:
        step, _ = checkpoints.restore_latest(abstract(states[1], on_one_device))
    assert step == 2
    assert sorted(os.listdir(tmp_path / "damaged")) == ["20", "20-2"]


def test_swapped_arrays_are_damage(tmp_path):
    """Each file is intact but belongs to another save."""
    two_checkpoints(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "checked_state")
    old, new = (tmp_path / "checkpoints" / step / "checked_state" for step in "12")
    shutil.copytree(old, new)
    with pytest.raises(DamagedCheckpoint, match="checksums of big are wrong"):
        restore_part(tmp_path / "checkpoints", ("big",))


def test_nothing_is_moved_when_nothing_is_intact(tmp_path):
    states = two_checkpoints(tmp_path)
    for step in (1, 2):
        edit_metadata(tmp_path, step, EDITS["user"])
    with Checkpoints(tmp_path / "checkpoints", retention=Retention()) as checkpoints:
        with pytest.raises(DamagedCheckpoint, match=r"no checkpoint in .* step 2 .* step 1 .*back"):
            checkpoints.restore_latest(abstract(states[1], on_one_device))
        assert checkpoints.latest_step() is None
        assert checkpoints.steps() == [1, 2]
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_another_structure_is_no_damage(tmp_path):
    states = two_checkpoints(tmp_path)
    other = abstract({"big": states[1]["big"]}, on_one_device)
    with Checkpoints(tmp_path / "checkpoints", retention=Retention()) as checkpoints:
        with pytest.raises(NotACheckpoint, match="only in the checkpoint: small/bias") as error:
            checkpoints.restore_latest(other)
        assert error.type is NotACheckpoint
        assert checkpoints.steps() == [1, 2]
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EPERM, "Operation not permitted"),
        MemoryError("no memory"),
        ValueError('PERMISSION_DENIED: Error reading "w"'),
        RuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ],
)
def test_lack_of_rights_or_memory_is_no_damage(tmp_path, monkeypatch, error):
    states = two_checkpoints(tmp_path)

    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoint.ocp.handlers.PyTreeHandler, "load", load)
    with Checkpoints(tmp_path / "checkpoints", retention=Retention()) as checkpoints:
        with pytest.raises(OSError, match="cannot be read now"):
            checkpoints.restore_latest(abstract(states[1], on_one_device))
        assert checkpoints.steps() == [1, 2]


def test_none_without_checkpoints(tmp_path):
    with Checkpoints(tmp_path, retention=Retention()) as checkpoints:
        assert checkpoints.restore_latest({"a": jnp.ones(2)}) is None


def test_checkpoints_from_before_the_checksums(tmp_path):
    """As written by the Orbax calls of that time."""
    state = {"w": jnp.arange(12.0), "n": jnp.int32(3)}
    with checkpoint.ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, state, force=True, custom_metadata={"of": "old"})
    assert checkpoint.latest_step(tmp_path) == 5
    assert checkpoint.read_metadata(tmp_path) == {"of": "old"}
    assert checkpoint.leaf_shapes(tmp_path, "w")["w"].shape == (12,)
    assert_same_bits(restore_part(tmp_path, ("w",))["w"], state["w"])
    with Checkpoints(tmp_path, retention=Retention()) as checkpoints:
        step, restored = checkpoints.restore_latest(abstract(state))
    assert step == 5
    assert_same_bits(restored, state)


def test_converted_checkpoints_have_checksums(tmp_path):
    checkpoint.save_once(tmp_path / "new", 7, {"w": np.arange(1000.0)}, {})
    assert restore_part(tmp_path / "new", ("w",))["w"].dtype == np.float64  # nothing is rounded
    for path in (tmp_path / "new" / "7" / "checked_state").glob("ocdbt.process_0/d/*"):
        data = path.read_bytes()
        at = data.find(np.float64(500.0).tobytes())
        if at >= 0:  # not compressed: the number itself
            path.write_bytes(data.replace(np.float64(500.0).tobytes(), np.float64(5e9).tobytes()))
            break
    else:
        raise AssertionError("no file has the number")
    with pytest.raises(DamagedCheckpoint, match="checksums of w are wrong"):
        restore_part(tmp_path / "new", ("w",))


@pytest.fixture
def file_size_limit():
    """Limit the size of files in bytes, to emulate a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [20_000, 100, 0])
def test_a_save_that_finds_no_space(tmp_path, file_size_limit, size):
    noise = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    with Checkpoints(tmp_path, retention=Retention()) as checkpoints:
        checkpoints.save(1, {"w": noise}, {})
        checkpoints.wait()
        file_size_limit(size)
        with pytest.raises(SaveFailed, match=r"step 2 .*too large.* there: 1\. Free space"):  # noqa: PT012
            checkpoints.save(2, {"w": noise}, {})  # here or there
            checkpoints.wait()
        file_size_limit(resource.RLIM_INFINITY)
        assert checkpoints.latest_step() == 1
        assert checkpoint.latest_step(tmp_path) == 1
        checkpoints.wait()  # said once
    with Checkpoints(tmp_path, retention=Retention()) as checkpoints:
        assert os.listdir(tmp_path) == ["1"]
        assert_same_bits(checkpoints.restore_latest({"w": jnp.asarray(noise)})[1]["w"], noise)
        checkpoints.save(2, {"w": noise}, {})
        assert checkpoints.steps() == [1, 2]


def test_close_says_that_the_save_failed(tmp_path, file_size_limit):
    checkpoints = Checkpoints(tmp_path, retention=Retention())
    checkpoints.save(1, {"w": np.ones(10)}, {})
    checkpoints.wait()
    file_size_limit(20_000)
    noise = np.random.default_rng(0).normal(size=100_000)
    checkpoints.save(2, {"w": noise}, {})
    with pytest.raises(SaveFailed, match="step 2"):
        checkpoints.close()
    with pytest.raises(SaveFailed, match="free space|Free space"):
        checkpoint.save_once(tmp_path / "once", 1, {"w": noise}, {})
    assert not (tmp_path / "once").exists()


def test_a_directory_that_cannot_be_written_any_more(tmp_path, monkeypatch):
    directory, state = tmp_path / "c", {"w": np.ones(10)}
    with Checkpoints(directory, retention=Retention()) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()

        def read_only(*args, **kwargs):
            raise OSError(errno.EROFS, "Read-only file system")

        with monkeypatch.context() as patched:
            patched.setattr(os, "mkdir", read_only)
            with pytest.raises(SaveFailed, match=r"Read-only file system\. .* there: 1\."):
                checkpoints.save(2, state, {})
        directory.rename(tmp_path / "away")
        with pytest.raises(SaveFailed, match="has vanished"):
            checkpoints.save(2, state, {})
        assert not directory.exists()
        (tmp_path / "away").rename(directory)
        checkpoints.save(2, state, {})
        assert checkpoints.steps() == [1, 2]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be made or cleaned up"):
        Checkpoints(tmp_path / "file" / "below", retention=Retention())


# ------------------------------------------------------------------------- names, reading back


@pytest.mark.parametrize("name", ["run[1]", "[!a]", "a*", "wh?t", "%20 #&", "ünï"])
def test_a_name_is_no_pattern(tmp_path, name, warnings):
    """Even if another folder matches it."""
    beside = tmp_path / "run1" / "checkpoints"
    two_checkpoints(beside.parent)
    before = sorted(beside.rglob("*"))
    states = two_checkpoints(tmp_path / name)
    directory = tmp_path / name / "checkpoints"
    with Checkpoints(directory, retention=Retention(keep=1)) as checkpoints:
        step, state = checkpoints.restore_latest(abstract(states[2], on_one_device))
        assert step == 2
        assert_same_bits(state, states[2])
        checkpoints.save(3, state, {})
        assert checkpoints.steps() == [3]
    assert_same_bits(restore_part(directory, ("small",))["small"], states[2]["small"])
    checkpoint.save_once(tmp_path / name / "once", 7, {"w": np.ones(4)}, {})
    assert restore_part(tmp_path / name / "once", ("w",))["w"].tolist() == [1, 1, 1, 1]
    assert sorted(beside.rglob("*")) == before
    assert warnings == []


@pytest.mark.parametrize("name", ["a\\b", "a\\", "\udcff"])
def test_a_name_that_would_be_another_one_is_refused(tmp_path, name):
    """TensorStore would write a\\b into a/b."""
    directory = tmp_path / name / "checkpoints"
    uses = (
        lambda: Checkpoints(directory, retention=Retention()),
        lambda: checkpoint.save_once(directory, 1, {"w": np.ones(4)}, {}),
        lambda: restore_part(directory, ("w",)),
        lambda: checkpoint.latest_step(directory),
        lambda: checkpoint.newest_step(directory),
    )
    for use in uses:
        with pytest.raises(ValueError, match=r"cannot be stored in .*(backslash|UTF-8).*another"):
            use()
    assert os.listdir(tmp_path) == []


@pytest.fixture
def once_written(monkeypatch):
    """Set an action for the folder of each written checkpoint."""
    save_async, happens = checkpoint.ocp.save_async, []

    class Response:
        def __init__(self, folder, response):
            self._folder, self._response = pathlib.Path(folder), response

        def result(self):
            self._response.result()
            for change in happens:
                change(self._folder)

    def spy(folder, *args, **kwargs):
        return Response(folder, save_async(folder, *args, **kwargs))

    monkeypatch.setattr(checkpoint.ocp, "save_async", spy)
    return happens.append


def spoil_arrays(folder):
    """One bit of the largest file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(MISHAPS["flipped"](largest.read_bytes()))


# As where the storage layer could not find what it had written.
LOST = {
    "index": lambda folder: (folder / "checked_state" / "manifest.ocdbt").unlink(),
    "metadata": lambda folder: (folder / "_CHECKPOINT_METADATA").write_text("{}"),
    "all": lambda folder: shutil.rmtree(folder),
}


@UNHEEDED
@pytest.mark.parametrize("lost", LOST)
def test_a_save_that_cannot_be_read_back_fails(tmp_path, once_written, lost):
    state = make_state()
    with Checkpoints(tmp_path / "c", retention=Retention(keep=1)) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        once_written(LOST[lost])
        checkpoints.save(2, state, {})
        with pytest.raises(SaveFailed, match=r"step 2 .* be read back .* there: 1\. .*resumes"):
            checkpoints.wait()
    assert (tmp_path / "c" / "1").exists()  # nothing was removed for it
    with Checkpoints(tmp_path / "c", retention=Retention()) as checkpoints:
        step, restored = checkpoints.restore_latest(abstract(state))
    assert step == 1
    assert_same_bits(restored, state)


@UNHEEDED
def test_the_arrays_of_the_first_save_are_read_back(tmp_path, once_written, monkeypatch):
    once_written(spoil_arrays)
    noise = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    state = {"w": noise, "n": np.asarray(3, np.int32), "wide": jnp.ones((8, 4), jnp.bfloat16)}
    with Checkpoints(tmp_path / "c", retention=Retention()) as checkpoints:
        checkpoints.save(1, state, {})
        with pytest.raises(SaveFailed, match=r"step 1 .* cannot be read back .* there: none\."):
            checkpoints.wait()
    with pytest.raises(SaveFailed, match="cannot be read back"):
        checkpoint.save_once(tmp_path / "once", 1, state, {})
    assert not (tmp_path / "once").exists()
    # The smallest ones only, where there are many.
    monkeypatch.setattr(checkpoint, "_READ_BACK", 4 + 2 * 8 * 4)
    handler, asked = checkpoint.ocp.handlers.PyTreeHandler, []
    load = handler.load
    spy = lambda self, folder, tree: asked.append(sorted(tree)) or load(self, folder, tree)
    monkeypatch.setattr(handler, "load", spy)
    with Checkpoints(tmp_path / "d", retention=Retention()) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {})
    assert asked == [["n", "wide"]]


TWO = """
    import os, pathlib, resource, sys, time
    import jax, jax.numpy as jnp, numpy as np

    folder, process, port = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    from jax.experimental import multihost_utils
    from jax.sharding import NamedSharding, PartitionSpec as P
    from fsdfm_jax.training import checkpoint
    from fsdfm_jax.training.checkpoint import Checkpoints, Retention, restore_part

    assert (jax.process_count(), jax.device_count()) == (2, 8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, copies = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def host(step):
        w = np.arange(80_000, dtype=np.float32).reshape(80, -1)
        return {"w": w * step, "n": np.int32(step)}

    def put(x):
        place = rows if x.ndim else copies
        return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

    def same(state, step):
        for name, want in host(step).items():
            for shard in state[name].addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), want[shard.index])

    state = lambda step: {name: put(np.asarray(x)) for name, x in host(step).items()}
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    like = jax.tree.map(abstract, state(1))

    with Checkpoints(folder / "of_one" / "checkpoints", retention=Retention()) as checkpoints:
        step, found = checkpoints.restore_latest(like)
        assert step == 4
        same(found, 4)

    directory = folder / "of_two" / "checkpoints"
    with Checkpoints(directory, retention=Retention(keep=1, keep_best=2)) as checkpoints:
        assert checkpoints.restore_latest(like) is None
        for step, loss in ((1, 0.1), (2, 0.2), (3, 0.3)):
            checkpoints.save(step, state(step), {"step": step}, {"loss": loss})
        assert checkpoints.steps() == [1, 2, 3]
        # The first process reads by itself, the other one does not know.
        if process == 0:
            assert checkpoint.latest_step(directory) == 3
            assert checkpoint.read_metadata(directory, 2) == {"step": 2}
            assert checkpoint.leaf_shapes(directory, "w")["w"].shape == (80, 1000)
            for step in (2, 3):
                part = restore_part(directory, ("w",), step)
                np.testing.assert_array_equal(part["w"], host(step)["w"])
        place = lambda name, leaf: rows if leaf.ndim else copies
        same(restore_part(directory, ("w", "n"), sharding=place, together=True), 3)
        try:
            restore_part(directory, ("w", "n"), sharding=place)
        except ValueError as error:
            assert "devices of other processes; use together=True in all" in str(error)
        else:
            raise AssertionError("read alone")
        checkpoints.save(4, state(4), {"step": 4}, {"loss": 0.4})  # they find each other again
        assert checkpoints.steps() == [1, 2, 4]
        # What the second process wrote, and only it reads, is damaged.
        if process == 0:
            files = [p for p in (directory / "4").rglob("ocdbt.process_1/d/*")]
            data = max(files, key=lambda path: path.stat().st_size)
            data.write_bytes(bytes(len(data.read_bytes())))
            assert restore_part(directory, ("n",), 4)["n"] == 4
        multihost_utils.sync_global_devices("damaged")
        parts = lambda: restore_part(directory, ("w",), 4, sharding=rows, together=True)
        for read in (parts, lambda: checkpoints.restore(like)):
            try:
                read()
            except checkpoint.DamagedCheckpoint as error:
                assert "step 4" in str(error)
            else:
                raise AssertionError("the damage went unseen")
        step, found = checkpoints.restore_latest(like)
        assert step == 2
        same(found, 2)
        assert checkpoints.steps() == [1, 2]
        other = like | {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=rows)}
        try:
            checkpoints.restore_latest(other)
        except checkpoint.DamagedCheckpoint:
            raise
        except checkpoint.NotACheckpoint as error:
            assert "w: saved float32[80, 1000]" in str(error)
        checkpoints.save(5, state(5), {"step": 5})
        checkpoints.wait()
        # One has no space for its part of the next.
        if process == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
        start = time.time()
        try:
            checkpoints.save(6, state(6), {"step": 6})
            checkpoints.wait()
        except checkpoint.SaveFailed as error:
            assert "step 6" in str(error) and "there: 1, 2, 5." in str(error)
        else:
            raise AssertionError("it was saved")
        assert time.time() - start < 30
    os._exit(0)
"""


def test_two_processes(tmp_path):
    """Two processes read a checkpoint of one and vice versa, and both see damage in one."""
    host = lambda step: {
        "w": np.arange(80_000, dtype=np.float32).reshape(80, -1) * step,
        "n": np.int32(step),
    }
    with Checkpoints(tmp_path / "of_one" / "checkpoints", retention=Retention()) as checkpoints:
        checkpoints.save(4, jax.tree.map(np.asarray, host(4)), {})
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [run_python(TWO, tmp_path, process, port) for process in (0, 1)]
    try:
        assert [child.wait(timeout=120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    with Checkpoints(tmp_path / "of_two" / "checkpoints", retention=Retention()) as checkpoints:
        like = abstract(jax.tree.map(jnp.asarray, host(5)), mesh_sharding)
        step, state = checkpoints.restore_latest(like)
    assert step == 5
    assert_same_bits(jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, host(5)))
    assert os.listdir(tmp_path / "of_two" / "damaged") == ["4"]
