"""Meshes and the sharding of arrays, on the eight CPU devices of conftest.py."""

import collections
import dataclasses
import itertools
import math
import types

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import base as base_config
from fsdfm_jax import main, stages
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import rules as rules_lib
from fsdfm_jax.training import loop as loop_lib
from fsdfm_jax.training import optim, pipeline, state


def mesh_of(data=-1, fsdp=1, tensor=1, *, slices=1, devices=None):
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "slices": slices}
    return mesh_lib.make_mesh(ConfigDict(sizes), devices)


# ------------------------------------------------------------------------------------------ meshes


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((1, -1, 1), (1, 8, 1)),
        ((2, 2, -1), (2, 2, 2)),
        ((-1, 2, 4), (1, 2, 4)),
        ((2, 1, 4), (2, 1, 4)),
    ],
)
def test_one_axis_may_be_left_open(asked, got):
    mesh = mesh_of(*asked)
    assert tuple(mesh.shape.items()) == tuple(zip(rules_lib.AXES, got, strict=True))
    assert set(mesh.devices.flat) == set(jax.devices())
    # Linen's modules don't run under explicit sharding types.
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_the_default_config_makes_a_mesh():
    config = base_config.get_config().mesh
    assert set(config) == {*rules_lib.AXES, "slices"}
    assert dict(mesh_lib.make_mesh(config).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    "sizes",
    [(4, 1, 1), (16, 1, 1), (3, -1, 1), (0, 1, 1), (-2, 1, 1), (-1, -1, 1), (2, 2, 1), (-1, 0, 8)],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    asked = ", ".join(
        f"mesh.{axis}={size}" for axis, size in zip(rules_lib.AXES, sizes, strict=True)
    )
    with pytest.raises(
        ValueError, match=rf"\({asked}\) must multiply to the number of devices, 8;"
    ):
        mesh_of(*sizes)


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that a mesh uses."""

    id: int
    process_index: int
    slice_index: int | None = None
    coords: tuple[int, ...] | None = None  # in a torus
    platform: str = "imagined"
    device_kind: str = "imagined"


def slices_of(count, size, *, known=True):
    """Devices of `count` slices, or of as many processes; in no order."""
    ids = np.random.default_rng(0).permutation(count * size).tolist()
    if known:  # two devices to a process
        return [Device(i, i // 2, i // size, (i, 0, 0)) for i in ids]
    return [Device(i, i // size) for i in ids]


@pytest.mark.parametrize("known", [True, False], ids=["slices", "processes"])
@pytest.mark.parametrize("sizes", [(-1, 4, 1), (4, 2, 2), (2, 4, 2), (16, 1, 1)])
def test_only_rows_are_spread_over_slices(known, sizes):
    mesh = mesh_of(*sizes, slices=2, devices=slices_of(2, 8, known=known))
    # Each slice is one part of the outermost axis: fsdp and tensor stay within it.
    parts = np.split(mesh.devices, 2)
    for part in parts:
        where = {d.slice_index if known else d.process_index for d in part.flat}
        assert len(where) == 1
    assert {d.id for d in mesh.devices.flat} == set(range(16))


@pytest.mark.parametrize(
    ("slices", "sizes"), [(4, (-1, 1, 1)), (3, (-1, 1, 1)), (2, (1, 16, 1)), (0, (-1, 1, 1))]
)
@pytest.mark.parametrize("known", [True, False], ids=["slices", "processes"])
def test_slices_that_are_not_there_are_refused(known, slices, sizes):
    what = "slices" if known else "processes"
    data = 1 if sizes[0] == 1 else 16
    match = rf"mesh\.slices={slices} must be the number of {what} \(2\).* mesh\.data={data};"
    with pytest.raises(ValueError, match=match):
        mesh_of(*sizes, slices=slices, devices=slices_of(2, 8, known=known))


def test_slices_that_are_not_named_are_refused():
    with pytest.raises(ValueError, match=r"2 slices, .*set mesh\.slices=2"):
        mesh_of(devices=slices_of(2, 8))
    # Processes on one fast network are no slices, nor are hosts that are numbered like them.
    assert mesh_of(devices=slices_of(2, 8, known=False)).size == 16
    hosts = [dataclasses.replace(d, coords=None) for d in slices_of(2, 8)]
    assert mesh_of(devices=hosts).size == 16
    # Several processes of one host have its number.
    one_host = [dataclasses.replace(d, slice_index=0) for d in slices_of(2, 8, known=False)]
    assert mesh_of(devices=one_host, slices=2).size == 16


def test_sampling_in_one_process_spreads_rows_and_parameters():
    assert dict(mesh_lib.local_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}


def test_a_mesh_is_only_used_where_there_is_something_to_spread():
    with mesh_lib.use(mesh_of(devices=jax.devices()[:1])):
        assert jax.sharding.get_mesh().empty
    with mesh_lib.use(mesh_of()):
        assert jax.sharding.get_mesh().size == 8


# ------------------------------------------------------------------------------------------- state


MODEL = ModelConfig(
    vocab_size=11, width=16, num_blocks=2, num_heads=4, cond_width=8, conditioning="official"
)


def init_small(key, ema_decay=0.9, model=MODEL):
    params = model_lib.init_params(key, model)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1)))
    return state.init_state(params, optimizer, ema_decay=ema_decay)


def abstract_state(ema_decay=0.9, model=MODEL):
    return jax.eval_shape(lambda key: init_small(key, ema_decay, model), jax.random.key(0))


def specs(placed):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(placed)
    }


MIRRORS = ("params", "ema", "opt_state/1/0/mu", "opt_state/1/0/nu")


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_what_mirrors_the_parameters_lies_where_they_lie(ema_decay):
    mesh, abstract = mesh_of(2, 2, 2), abstract_state(ema_decay)
    placed = mesh_lib.state_shardings(mesh, abstract)
    assert jax.tree.structure(placed) == jax.tree.structure(abstract)
    assert all(leaf.mesh == mesh for leaf in jax.tree.leaves(placed))
    found = specs(placed)
    weights = specs(mesh_lib.state_shardings(mesh, abstract.params))
    mirrors = [mirror for mirror in MIRRORS if ema_decay or mirror != "ema"]
    # And counts: of steps, of steps skipped in a row, of Adam and of the schedule.
    assert len(found) == len(mirrors) * len(weights) + 4
    for mirror, (path, spec) in itertools.product(mirrors, weights.items()):
        assert found[f"{mirror}/{path}"] == spec
    assert found["step"] == found["skipped"] == P()


def test_learned_positions_are_spread_as_the_tokens_are():
    model = dataclasses.replace(MODEL, positions="learned", num_positions=5)
    found = specs(mesh_lib.state_shardings(mesh_of(1, 2, 4), abstract_state(model=model)))
    for mirror in MIRRORS:
        group = f"{mirror}/vocab_embed"
        assert found[f"{group}/positions"] == found[f"{group}/embedding"] != P()


# What a device of a 1 x 2 x 4 mesh holds of each array that is spread at all.
SPREAD = {
    "vocab_embed/embedding": ((11, 16), (11, 2)),
    "head/kernel": ((16, 11), (2, 11)),
    **{f"blocks/{n}_proj/kernel": ((2, 16, 16), (2, 8, 4)) for n in "qkv"},
    "blocks/out_proj/kernel": ((2, 16, 16), (2, 4, 8)),
    "blocks/mlp_in/kernel": ((2, 16, 64), (2, 8, 16)),
    "blocks/mlp_in/bias": ((2, 64), (2, 16)),
    "blocks/mlp_out/kernel": ((2, 64, 16), (2, 16, 8)),
    "blocks/adaln/condition_fuser/kernel": ((2, 16, 8), (2, 16, 1)),
    "blocks/adaln/modulation/kernel": ((2, 8, 96), (2, 8, 12)),
    "blocks/adaln/modulation/bias": ((2, 96), (2, 12)),
    "final_adaln/condition_fuser/kernel": ((16, 8), (16, 1)),
    "final_adaln/modulation/kernel": ((8, 32), (8, 4)),
    "time_condition_fuser/kernel": ((16, 16), (16, 2)),
}


def test_what_a_device_holds():
    mesh = mesh_of(1, 2, 4)
    shapes = abstract_state().params
    placed = jax.tree.leaves(mesh_lib.state_shardings(mesh, shapes))
    found = {}
    for (path, leaf), place in zip(
        jax.tree_util.tree_leaves_with_path(shapes), placed, strict=True
    ):
        held = place.shard_shape(leaf.shape)
        if held != leaf.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found[name] = (leaf.shape, held)
    assert found == SPREAD


def test_the_first_rule_that_matches_counts(monkeypatch):
    rules = ((r"vocab_embed/embedding", P(None, "data")), (r"vocab_embed", P("data")), (r".*", P()))
    monkeypatch.setattr(rules_lib, "RULES", rules)
    found = specs(mesh_lib.state_shardings(mesh_of(), abstract_state()))
    split = {path: spec for path, spec in found.items() if spec != P()}
    assert split == {f"{mirror}/vocab_embed/embedding": P(None, "data") for mirror in MIRRORS}


@pytest.mark.parametrize(
    ("sizes", "changes", "name", "dimension", "asked"),
    [
        ((1, 8, 1), {"width": 12}, "blocks/k_proj/kernel", r"1 .*\(2, 12, 12\)", "mesh.fsdp=8"),
        ((2, 1, 4), {"width": 18}, "blocks/k_proj/kernel", r"2 .*\(2, 18, 18\)", "mesh.tensor=4"),
        (
            (1, 2, 4),
            {"width": 20},
            "head/kernel",
            r"0 .*\(20, 11\)",
            "mesh.tensor=4 x mesh.fsdp=2",
        ),
    ],
)
def test_a_width_that_does_not_divide_is_named(sizes, changes, name, dimension, asked):
    heads = {12: 2, 18: 1, 20: 2}[changes["width"]]
    model = dataclasses.replace(MODEL, num_heads=heads, **changes)
    shapes = abstract_state(model=model).params
    if "head" in name:
        shapes = {"head": shapes["head"]}
    else:
        shapes = {"blocks": {"k_proj": shapes["blocks"]["k_proj"]}}
    axes = " or ".join(f"mesh.{axis}" for axis in ("tensor", "fsdp") if f"{axis}=" in asked)
    match = (
        rf"{name} can't be sharded: dimension {dimension} isn't divisible by {asked}\. "
        rf"Choose a smaller {axes} and a larger mesh.data, or another model.width"
    )
    with pytest.raises(ValueError, match=match):
        mesh_lib.state_shardings(mesh_of(*sizes), {"params": shapes})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P("fsdp", "fsdp"), "names an axis twice"),
        (P(("fsdp", "tensor"), "tensor"), "names an axis twice"),
        (P("model"), r"the mesh \{'data': 8, 'fsdp': 1, 'tensor': 1\} doesn't have"),
        (P(None, None, "fsdp"), r"of shape \(16, 11\): it has too many dimensions"),
    ],
)
def test_a_rule_that_cannot_be_is_named(monkeypatch, spec, message):
    monkeypatch.setattr(rules_lib, "RULES", ((r"head/kernel$", spec), (r".*", P())))
    with pytest.raises(ValueError, match=rf"params/head/kernel.*{message}.*correct rules.RULES"):
        mesh_lib.state_shardings(mesh_of(), abstract_state())


# -------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_rows_are_spread_over_data_and_fsdp(sizes):
    mesh = mesh_of(*sizes)
    rows = np.arange(48).reshape(16, 3)
    assert mesh_lib.local_rows(mesh, 16) == list(range(16))
    placed = mesh_lib.place_rows(mesh, 16, {"x1": rows, "x0": -rows})
    for sign, name in ((1, "x1"), (-1, "x0")):
        assert placed[name].sharding.is_equivalent_to(mesh_lib.batch_sharding(mesh), 2)
        np.testing.assert_array_equal(placed[name], sign * rows)
    parts = sizes[0] * sizes[1]
    assert mesh_lib.row_shards(mesh) == parts
    held = collections.Counter(
        tuple(shard.data[:, 0].tolist()) for shard in placed["x1"].addressable_shards
    )
    each = rows[:, 0].reshape(parts, -1)
    assert held == {tuple(part.tolist()): 8 // parts for part in each}


class OneOfTwo:
    """A sharding of sixteen rows, of which the devices of this process hold some."""

    def __init__(self, parts):
        self._parts = parts

    def addressable_devices_indices_map(self, shape):
        return {i: (part, *[slice(None)] * (len(shape) - 1)) for i, part in enumerate(self._parts)}


def test_a_process_reads_the_rows_of_its_devices(monkeypatch):
    # Two devices of a `tensor` axis hold the same rows; the parts needn't be neighbours.
    parts = [slice(12, 16), slice(0, 4), slice(12, 16), slice(0, 4)]
    monkeypatch.setattr(mesh_lib, "batch_sharding", lambda mesh: OneOfTwo(parts))
    assert mesh_lib.local_rows(None, 16) == [0, 1, 2, 3, 12, 13, 14, 15]


def test_place_rows_takes_the_rows_that_are_asked_for(monkeypatch):
    """Each device gets its own rows, from a batch that has only this process's."""
    mesh = mesh_of(2, 2, 2)
    asked = []

    def make(shape, place, part):
        asked.append((shape, place))
        return [part((slice(start, start + 4), slice(None))) for start in (12, 0)]

    monkeypatch.setattr(mesh_lib, "local_rows", lambda mesh, size: [0, 1, 2, 3, 12, 13, 14, 15])
    monkeypatch.setattr(jax, "make_array_from_callback", make)
    own = 10 * np.asarray([0, 1, 2, 3, 12, 13, 14, 15])[:, None]
    (late, early) = mesh_lib.place_rows(mesh, 16, {"x1": own})["x1"]
    np.testing.assert_array_equal(late[:, 0], [120, 130, 140, 150])
    np.testing.assert_array_equal(early[:, 0], [0, 10, 20, 30])
    assert asked == [((16, 1), mesh_lib.batch_sharding(mesh))]


def test_batch_sizes():
    mesh = mesh_of(2, 2, 2)
    for size in (4, 96):
        mesh_lib.check_batch_size(mesh, size, "distill.batch_size")
    for size in (0, -4, 2, 6):
        match = (
            rf"distill.batch_size={size} must be a positive multiple of the 4 data shard\(s\) of "
            r"the mesh \(mesh.data=2 x mesh.fsdp=2\)"
        )
        with pytest.raises(ValueError, match=match):
            mesh_lib.check_batch_size(mesh, size, "distill.batch_size")


def test_each_device_of_the_tensor_axis_computes_some_heads():
    for heads in (4, 12):
        mesh_lib.check_heads(mesh_of(1, 2, 4), heads)
    with pytest.raises(ValueError, match=r"model.num_heads=6 must be a multiple of mesh.tensor=4"):
        mesh_lib.check_heads(mesh_of(1, 2, 4), 6)


# ------------------------------------------------------------------------------------------ report


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_bytes_are_those_of_real_arrays(sizes):
    mesh = mesh_of(*sizes)
    abstract = abstract_state()
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    leaves = jax.tree.leaves(jax.device_put(zeros, mesh_lib.state_shardings(mesh, abstract)))
    placed = mesh_lib.describe(mesh, abstract_state())
    assert [leaf.total_bytes for leaf in placed] == [leaf.nbytes for leaf in leaves]
    for device in jax.devices():
        held = [
            shard.data.nbytes
            for leaf in leaves
            for shard in leaf.addressable_shards
            if shard.device == device
        ]
        assert held == [leaf.device_bytes for leaf in placed]


def paper_state(size, conditioning):
    config = base_config.get_config()
    base_config.use_paper_values(config, size)
    config.model.conditioning = conditioning
    process = process_lib.make_process(**config.path, num_tokens=50_257, eos_id=0)
    stage = stages.make_stage("distill", config, process)
    optimizer = optim.make_optimizer(config.optim, config.distill)
    settings = loop_lib.Settings(10, 96, 1, 1, config.distill.ema_decay)
    shapes = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), stage.model))
    init = loop_lib.make_init(stage, optimizer, settings)
    return jax.eval_shape(init, jax.random.key(0), shapes)


@pytest.mark.parametrize("conditioning", ["official", "additive"])
@pytest.mark.parametrize("size", base_config.SIZES)
def test_a_device_holds_its_share_of_the_papers_states(size, conditioning):
    """Within 2% of bytes / (fsdp x tensor); replicated parts are small."""
    abstract = paper_state(size, conditioning)
    for sizes in itertools.product((1, 2, 4, 8), repeat=3):
        if math.prod(sizes) != 8:
            continue
        placed = mesh_lib.describe(mesh_of(*sizes), abstract)
        total = sum(leaf.total_bytes for leaf in placed)
        held = sum(leaf.device_bytes for leaf in placed)
        assert 1.0 <= held * sizes[1] * sizes[2] / total < 1.02, sizes


REPORT = """\
mesh {'data': 2, 'fsdp': 2, 'tensor': 2}, 8 device(s)
ema/blocks/mlp_in/bias    float32     4x64      512 B of     1 KiB  -, tensor
ema/blocks/q_proj/kernel  float32  4x16x16      1 KiB of     4 KiB  -, fsdp, tensor
ema/head/kernel           bfloat16   16x64      512 B of     2 KiB  tensor+fsdp, -
ema/norm                  float32       16       64 B of      64 B  on each device
step                      int32     scalar        4 B of       4 B  on each device
total 7.066 KiB, on each device 2.066 KiB (1/3.42); held by every device: 68 B"""


def test_the_report_says_where_everything_lies():
    shape = jax.ShapeDtypeStruct
    tree = {
        "ema": {
            "blocks": {
                "mlp_in": {"bias": shape((4, 64), np.float32)},
                "q_proj": {"kernel": shape((4, 16, 16), np.float32)},
            },
            "head": {"kernel": shape((16, 64), jax.numpy.bfloat16)},
            "norm": shape((16,), np.float32),
        },
        "step": shape((), np.int32),
    }
    assert mesh_lib.report(mesh_of(2, 2, 2), tree) == REPORT


def test_the_report_fits_a_terminal():
    abstract = paper_state("1.3B", "official")
    lines = mesh_lib.report(mesh_of(2, 2, 2), abstract).splitlines()
    assert max(map(len, lines)) <= 100
    for leaf in mesh_lib.describe(mesh_of(2, 2, 2), abstract):
        (at,) = (i for i, line in enumerate(lines) if line.split()[0] == leaf.path)
        whole = lines[at] if " " in lines[at] else lines[at] + lines[at + 1]
        assert whole.split()[1:3] == [leaf.dtype, "x".join(map(str, leaf.shape)) or "scalar"]


def test_large_sizes_are_readable():
    tree = {"params": jax.ShapeDtypeStruct((3 * 2**29,), np.float32)}
    assert "6 GiB of     6 GiB" in mesh_lib.report(mesh_of(), tree)


def test_the_program_prints_where_the_state_would_lie(monkeypatch, tmp_path, capsys):
    """For every stage, without text, reading and writing nothing."""
    config = base_config.get_config()
    config.model.width, config.model.num_heads = 32, 2
    config.mesh.fsdp, config.mesh.tensor = 2, 2
    config.data.corpus = "nowhere/*.txt"
    values = {"_CONFIG": config, "_WORKDIR": str(tmp_path / "run"), "_PRINT_SHARDING": True}
    for name, value in (values | {"_EVALUATE": True, "_DISTRIBUTED": False}).items():
        monkeypatch.setattr(main, name, types.SimpleNamespace(value=value))
    main.main(["main"])
    assert not (tmp_path / "run").exists()
    printed = capsys.readouterr().out
    tables = printed.strip().split("\n\n")
    assert [table.split(":")[0] for table in tables] == list(stages.NAMES)
    for table in tables:
        lines = table.splitlines()
        assert "{'data': 2, 'fsdp': 2, 'tensor': 2}, 8 device(s)" in lines[0]
        (embedding,) = (line for line in lines if line.startswith("params/vocab_embed/embedding"))
        assert "1024x32" in embedding
        assert embedding.endswith("-, tensor+fsdp")
        assert lines[-1].startswith("total ")
    # The last stages keep an average, the base models none.
    assert [("\nema/" in table) for table in tables] == [False, False, True, True, True]


def test_what_the_program_prints_is_what_it_trains(tmp_path):
    """The state that `print_sharding` describes has the shapes of a trained one."""
    config = base_config.get_config()
    config.pipeline = "pretrain"
    (entry,) = pipeline.entries(config, tmp_path)
    process = process_lib.make_process(**config.path, num_tokens=11, eos_id=0)
    stage = stages.make_stage(entry.stage, config, process)
    shapes = jax.eval_shape(stage.init_params, jax.random.key(0), None)
    fresh = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), stage.model))
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, fresh)


def test_parameters_go_where_the_mesh_wants_them():
    params = {"params": {"head": {"kernel": np.ones((16, 11), np.float32)}}}
    (on_one,) = jax.tree.leaves(mesh_lib.spread(params))
    assert on_one.devices() == {jax.devices()[0]}
    mesh = mesh_of(1, 2, 4)
    want = NamedSharding(mesh, P(("tensor", "fsdp"), None))
    with mesh_lib.use(mesh):
        (placed,) = jax.tree.leaves(mesh_lib.spread(params))
        (shape,) = jax.tree.leaves(mesh_lib.spread(jax.eval_shape(lambda: params)))
    np.testing.assert_array_equal(placed, params["params"]["head"]["kernel"])
    assert placed.sharding == shape.sharding == want
    assert (shape.shape, shape.dtype) == ((16, 11), np.float32)


def test_any_number_of_devices_samples():
    """Arrays that training would reject are replicated if they don't divide."""
    wide, narrow = np.zeros((12, 11), np.float32), np.zeros((16, 11), np.float32)
    mesh = mesh_of(1, 6, 1, devices=jax.devices()[:6])
    with pytest.raises(ValueError, match="head/kernel can't be sharded"):
        mesh_lib.leaf_sharding(mesh, "head/kernel", narrow)
    with mesh_lib.use(mesh):
        places = [mesh_lib.put("head/kernel", leaf).sharding for leaf in (wide, narrow)]
    assert places[0] == NamedSharding(mesh, P(("tensor", "fsdp"), None))
    assert places[1] == NamedSharding(mesh, P(None, None))
