"""The mesh and the one table of rules, on the eight CPU devices of conftest.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import base as base_config
from fsdfm_jax import models, sharding, state


def mesh_of(size):
    return sharding.make_mesh(ConfigDict({"data": size}))


@pytest.mark.parametrize("size", [8, -1])
def test_the_mesh_takes_all_devices(size):
    mesh = mesh_of(size)
    assert dict(mesh.shape) == {"data": 8}
    assert set(mesh.devices.flat) == set(jax.devices())
    # Linen's modules don't run under explicit sharding types.
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)


def test_the_default_config_makes_a_mesh():
    config = base_config.get_config().mesh
    assert set(config) == set(sharding.AXES)
    assert sharding.make_mesh(config).size == jax.device_count()


@pytest.mark.parametrize("size", [4, 16, 3, 0, -2, -8])
def test_a_mesh_that_does_not_fit_is_refused(size):
    with pytest.raises(ValueError, match=rf"\(data={size}\) must multiply to the 8 device"):
        mesh_of(size)


def test_with_more_axes_one_may_be_left_open(monkeypatch):
    monkeypatch.setattr(sharding, "AXES", ("data", "model"))
    make = lambda data, model: sharding.make_mesh(ConfigDict({"data": data, "model": model}))
    assert dict(make(-1, 2).shape) == {"data": 4, "model": 2}
    assert dict(make(2, -1).shape) == {"data": 2, "model": 4}
    assert dict(make(2, 4).shape) == {"data": 2, "model": 4}
    for sizes in [(-1, -1), (-1, 3), (2, 2), (16, -1)]:
        with pytest.raises(ValueError, match="at most one axis given as -1"):
            make(*sizes)


def abstract_state(ema_decay=0.9):
    model = models.ModelConfig(vocab_size=11, width=8, num_blocks=2, num_heads=2, cond_width=4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1)))

    def init(key):
        params = models.init_params(key, model)
        return state.init_state(params, optimizer, ema_decay=ema_decay)

    return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_every_leaf_of_the_state_gets_a_place(ema_decay):
    mesh, abstract = mesh_of(-1), abstract_state(ema_decay)
    placed = sharding.state_shardings(mesh, abstract)
    assert jax.tree.structure(placed) == jax.tree.structure(abstract)
    leaves = jax.tree.leaves(placed)
    weights = len(jax.tree.leaves(abstract.params))
    # weights, average, two moments; counts of the step, of Adam and of the schedule
    assert len(leaves) == (3 + bool(ema_decay)) * weights + 3
    assert all(leaf == NamedSharding(mesh, P()) for leaf in leaves)


def test_rules_reach_the_average_and_the_moments(monkeypatch):
    """A rule written for a parameter holds for whatever mirrors it; the first match counts."""
    rules = ((r"vocab_embed/embedding", P(None, "data")), (r"vocab_embed", P("data")), (r".*", P()))
    monkeypatch.setattr(sharding, "RULES", rules)
    placed = sharding.state_shardings(mesh_of(-1), abstract_state())
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
    }
    split = {path for path, spec in by_path.items() if spec != P()}
    assert split == {
        f"{where}/vocab_embed/embedding"
        for where in ("params", "ema", "opt_state/1/0/mu", "opt_state/1/0/nu")
    }
    assert {by_path[path] for path in split} == {P(None, "data")}
    assert sharding.spec_for("step") == P()


def test_rows_of_a_batch_are_spread_over_the_devices():
    mesh = mesh_of(-1)
    rows = np.arange(48).reshape(16, 3)
    placed = jax.make_array_from_process_local_data(sharding.batch_sharding(mesh), rows)
    assert placed.shape == (16, 3)
    for i, device in enumerate(mesh.devices.flat):
        (shard,) = (s for s in placed.addressable_shards if s.device == device)
        np.testing.assert_array_equal(shard.data, rows[2 * i : 2 * i + 2])
    np.testing.assert_array_equal(jnp.sum(placed), rows.sum())


def test_batch_sizes():
    mesh = mesh_of(-1)
    for size in (8, 96):
        sharding.check_batch_size(mesh, size, "distill.batch_size")
    for size in (0, -8, 4, 12):
        with pytest.raises(ValueError, match=rf"distill.batch_size={size} must be .* the 8 data"):
            sharding.check_batch_size(mesh, size, "distill.batch_size")
