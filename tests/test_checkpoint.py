"""Checkpoints: bit-exact across shardings, safe against donation and SIGKILL, clear when wrong."""

import functools
import logging
import os
import pathlib
import signal
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

from fsdfm_jax import checkpoint
from fsdfm_jax.checkpoint import Checkpoints, NotACheckpoint, restore_part

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
    """Rows over eight devices where they divide, else a copy on each."""
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
    with Checkpoints(tmp_path) as checkpoints:
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
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, placed, {})
        restored = checkpoints.restore(target)
    assert_same_bits(restored, state)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)


def test_only_the_newest_survive_and_nothing_temporary_is_left(tmp_path):
    with Checkpoints(tmp_path / "a" / "b", keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 3, 10, 11):
            checkpoints.save(step, make_state(seed=step), {"step": step})
        assert checkpoints.latest_step() == 11
        assert checkpoints.metadata(10) == {"step": 10}
        want = make_state(seed=10)
        assert_same_bits(checkpoints.restore(abstract(want), 10), want)
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["10", "11"]
    with Checkpoints(tmp_path / "a" / "b") as checkpoints:
        assert checkpoints.latest_step() == 11
    assert checkpoint.latest_step(tmp_path / "a" / "b") == 11


def test_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("runs/x") as checkpoints:
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
        with Checkpoints(tmp_path / name) as checkpoints:
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
    with Checkpoints(tmp_path) as checkpoints:
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
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.ones(1000)}, "moments": jnp.ones(4_000_000)}, {})
    loaded = []
    load = checkpoint.ocp.training.Checkpointer.load

    def spy(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, "load", spy)
    restore_part(tmp_path, ("params",))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(loaded)) == 4000


def test_errors_name_the_leaves(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
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
    with pytest.raises(NotACheckpoint, match=r"step 3 in .* cannot be read"):
        restore_part(tmp_path, ("ema",))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        Checkpoints(tmp_path / "file")
    with Checkpoints(tmp_path / "run") as checkpoints:
        ones = jnp.ones(2)
        for state, complaint in [
            ({"a.b": ones}, "cannot be named"),
            ({"a/b": ones}, "cannot be named"),
            (ones, "cannot be named"),
            ({"a": 1.0}, "arrays only, but 'a' is float"),
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
        with Checkpoints(tmp_path) as checkpoints:
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
    from fsdfm_jax.checkpoint import Checkpoints

    directory, moment = sys.argv[1:]
    state = lambda step: {f"w{i}": jnp.full(100_000, 100.0 * step + i) for i in range(30)}

    def files():
        return [name for _, _, names in os.walk(directory) for name in names]

    def kill_when(condition):
        while not condition():
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoints = Checkpoints(directory, keep=1)
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
    from fsdfm_jax.checkpoint import restore_part

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
    for moment in ("returned", "writing"):  # else the kill came too late to test anything
        assert any("tmp" in name for name in os.listdir(tmp_path / moment))
    for moment, step in steps.items():
        with Checkpoints(tmp_path / moment, keep=1) as checkpoints:
            assert checkpoints.latest_step() == step
            assert checkpoints.metadata() == {"step": step}
            want = {f"w{i}": jnp.full(100_000, 100.0 * step + i) for i in range(30)}
            # written by a process with one device, read onto eight
            restored = checkpoints.restore(abstract(want, mesh_sharding))
            assert_same_bits(restored, want)
            checkpoints.save(3, restored, {"step": 3})  # the run goes on
        assert os.listdir(tmp_path / moment) == ["3"]


def test_one_device_process_reads_what_eight_devices_saved(tmp_path):
    state = make_state()
    placed = jax.tree.map(lambda x: jax.device_put(x, mesh_sharding(x)), state)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(7, placed, {})
    assert run_python(READER, tmp_path / "run", tmp_path / "read.npz").wait(timeout=60) == 0
    read = np.load(tmp_path / "read.npz")
    assert read["step"] == 7
    np.testing.assert_array_equal(read["embed"], state.ema["embed"])


def test_saving_once(tmp_path):
    tree = {"params": {"kernel": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)}}
    checkpoint.save_once(tmp_path / "new", 7, tree, {"a": [1]})
    assert checkpoint.latest_step(tmp_path / "new") == 7
    assert checkpoint.read_metadata(tmp_path / "new") == {"a": [1]}
    read = restore_part(tmp_path / "new", ("params",))["params"]
    np.testing.assert_array_equal(read["kernel"], tree["params"]["kernel"])
    with pytest.raises(ValueError, match="exists already"):
        checkpoint.save_once(tmp_path / "new", 8, tree, {})
    with pytest.raises(ValueError, match="arrays only, but 'params/kernel' is float"):
        checkpoint.save_once(tmp_path / "other", 7, {"params": {"kernel": 1.0}}, {})
    with pytest.raises(ValueError, match="must be a JSON dict"):
        checkpoint.save_once(tmp_path / "other", 7, tree, {"a": np.nan})
    assert not (tmp_path / "other").exists()


def test_shapes_of_a_part(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path / "run") as checkpoints:
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
