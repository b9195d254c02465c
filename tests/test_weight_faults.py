"""Weights that are unusable (reported) or wrapped by another tool (loaded)."""

import dataclasses
import tarfile

import jax
import numpy as np
import pytest
from marks import slow_except

import fsdfm_jax as fs
from fsdfm_jax.convert import formats, run_folder
from fsdfm_jax.convert import safetensors as safetensors_lib
from fsdfm_jax.convert.formats import Target
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.evaluate import models as models_lib
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference.bundle import BadFile
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.training import checkpoint, workdir

TARGETS = {"m.pth": {}, "m.safetensors": {}, "o.safetensors": {"layout": "official"}}
TARGETS |= {"folder": {"to": "safetensors"}, "run [1]": {"to": "orbax"}}
BPE = tokenizer_lib.train_bpe(["we the people of the united states"], 270)
MODEL = ModelConfig(BPE.vocab_size, 16, 1, 2, 8, mlp_ratio=1, conditioning="official")


def _bundle(spoil=None, value=np.nan):
    params = jax.tree.map(np.array, fs.init_params(jax.random.key(0), MODEL))
    if spoil:
        *groups, leaf = spoil.split("/")
        node = params
        for group in groups:
            node = node[group]
        node[leaf].flat[3] = value
    said = {"tokenizer": BPE.fingerprint, "stage": "distill", "run": "distill"}
    return bundle_lib.from_params(params, MODEL, tokenizer=BPE, block_length=6, provenance=said)


PARAMETERS = list(bundle_lib.expected_shapes(MODEL))
FIRST_AND_LAST = (PARAMETERS[0], PARAMETERS[-1])


@pytest.mark.parametrize("name", slow_except(FIRST_AND_LAST, PARAMETERS))
def test_each_parameter_that_is_not_finite_is_named(name):
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(BadFile, match=rf"1 of the \d+ values of {name} are NaN or infinite"):
            _bundle(name, value).params()
    with pytest.raises(BadFile, match=name):
        fs.generate(_bundle(name))


def test_large_values_are_finite():
    array = np.full(1000, np.finfo(np.float32).max)
    assert bundle_lib.check_finite("a", array, "m") is array


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_not_blamed_for_its_source(tmp_path, name):
    with pytest.raises(BadFile, match=r"head/kernel are NaN"):
        formats.write(_bundle("head/kernel"), Target(tmp_path / name, **TARGETS[name]))
    assert list(tmp_path.iterdir()) == []


def test_weights_of_a_run_that_are_not_finite_are_named(tmp_path):
    params = {"a": np.ones(3, np.float32), "b": {"c": np.array([1, np.inf], np.float32)}}
    metadata = {"weights": "params", "model": dataclasses.asdict(MODEL), "tokenizer": "t"}
    checkpoint.save_once(tmp_path / "checkpoints", 7, {"params": params}, metadata)
    with pytest.raises(ValueError, match="weights of step 7 in .* b/c has values that are NaN"):
        workdir.load_weights(tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_what_we_write_can_be_sampled(tmp_path, name):
    bundle = _bundle()
    formats.write(bundle, Target(tmp_path / name, **TARGETS[name]))
    how = {"sampling": fs.Sampling(steps=2, temperature=0), "num_samples": 2}
    assert fs.generate(fs.load(tmp_path / name), **how) == fs.generate(bundle, **how)


# ---------------------------------------------------------------------------------------- wrappers
PREFIXES = (
    *("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."),
    "_fsdp_wrapped_module._checkpoint_wrapped_module.",
    "module._orig_mod.",
)


def _tensors(torch):
    state = torch.load("m.pth", weights_only=True)["student_model"]
    return {name: tensor.contiguous() for name, tensor in state.items()}


@pytest.fixture
def torch_state(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    formats.write(_bundle(), Target(tmp_path / "m.pth"))
    BPE.save(tmp_path / "tokenizer.json")
    return torch, _tensors(torch)


def _wrap(state, prefix):
    """At the top and inside each block, as frameworks do."""
    return {
        prefix + name.replace("blocks.0.", f"blocks.0.{prefix}"): t for name, t in state.items()
    }


def _same(path):
    found = fs.load(path, tokenizer="tokenizer.json").params()
    jax.tree.map(np.testing.assert_array_equal, found, _bundle().params())


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_of_wrappers_load_in_both_formats(torch_state, prefix):
    torch, state = torch_state
    wrapped = _wrap(state, prefix)
    torch.save(wrapped, "bare.pth")
    torch.save({"state_dict": wrapped, "epoch": 3}, "wrapped.pth")
    torch.save({"model": {"state_dict": wrapped}}, "inner.pth")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(wrapped, "wrapped.safetensors")
    for name in ("bare.pth", "wrapped.pth", "inner.pth", "wrapped.safetensors"):
        _same(name)


def test_a_name_under_two_prefixes_is_refused_in_both_formats(torch_state):
    torch, state = torch_state
    state["module.vocab_embed.weight"] = state["vocab_embed.weight"] + 1
    torch.save(state, "twice.pth")
    pytest.importorskip("safetensors.torch").save_file(state, "twice.safetensors")
    for name in ("twice.pth", "twice.safetensors"):
        with pytest.raises(
            BadFile, match=r"vocab_embed.weight.*occurs twice, with different prefixes"
        ):
            fs.load(name)


def test_other_names_are_listed(torch_state):
    torch, state = torch_state
    torch.save({f"encoder.{name}": tensor for name, tensor in state.items()}, "other.pth")
    with pytest.raises(BadFile, match=r"keys: encoder\.vocab_embed\.weight"):
        fs.load("other.pth")


def test_files_from_before_torch_1_6_are_told_apart(torch_state):
    torch, state = torch_state
    torch.save(state, "legacy.pth", _use_new_zipfile_serialization=False)
    with tarfile.open("older.pth", "w") as archive:
        archive.add("tokenizer.json")
    for name in ("legacy.pth", "older.pth"):
        with pytest.raises(BadFile, match="format from before torch 1.6, .*torch.save it again"):
            fs.load(name)


# ---------------------------------------------------------------------------- runs that are trained
@pytest.fixture
def run(tmp_path):
    """A run folder in a working directory, and a function that saves a further step."""
    config = {"data": {"block_length": 6}, "distill": {"ema_decay": 0.0}, "eval": {}}
    metadata = {
        **{"format": 3, "code_version": "x", "run": "distill", "stage": "distill"},
        **{"weights": "params", "model": dataclasses.asdict(MODEL), "tokenizer": BPE.fingerprint},
        **{"data": "d", "config": config},
        "recipe": {"path": dict(bundle_lib.DEFAULT_PATH)},
    }
    folder = tmp_path / "work" / "stages" / "distill"
    BPE.save(tmp_path / "tokenizer.json")
    folder.mkdir(parents=True)
    (tmp_path / "work" / "config.json").write_text("{}")
    BPE.save(folder / "tokenizer.json")

    def save(step, keep=1):
        params = jax.tree.map(lambda a: np.asarray(a) + step, _bundle().params())
        places = folder / "checkpoints"
        with checkpoint.Checkpoints(places, retention=checkpoint.Retention(keep)) as checkpoints:
            checkpoints.save(step, {"params": params}, metadata)

    save(10)
    return folder, save


def test_an_evaluation_keeps_to_the_step_that_it_opened(run):
    folder, save = run
    catalogue = models_lib.Catalogue(
        {"a": (folder, {}), "b": (folder.parents[1], {"stage": "distill"})}
    )
    facts = {label: catalogue.facts(label, "ema") for label in ("a", "b")}
    save(20, keep=2)
    for label in ("a", "b"):
        subject = catalogue.open(label, "ema")
        assert subject.facts == facts[label]
        assert subject.facts["step"] == 10
        assert bundle_lib.content_hash(subject.params) == subject.facts["sha256"]


def test_a_checkpoint_that_is_gone_is_not_damaged(run):
    folder, save = run
    bundle = formats.open_bundle(folder)
    save(20)  # which removes step 10
    with pytest.raises(OSError, match="step 10 was removed while reading it.*again") as error:
        bundle.params()
    assert error.value.errno  # one that a restart may cure
    assert formats.open_bundle(folder).provenance["step"] == 20


def test_the_newest_is_read_where_a_training_replaces_it(run, monkeypatch):
    folder, save = run
    whole = checkpoint.read_record

    def slow(directory, step=None):
        if step == 10:
            save(20)
        return whole(directory, step)

    monkeypatch.setattr(checkpoint, "read_record", slow)
    assert formats.open_bundle(folder).provenance["step"] == 20


def test_another_stage_lists_those_that_are_trained(run):
    folder, _ = run
    with pytest.raises(ValueError, match=r"no trained run 'foo' .*; trained runs: distill\."):
        run_folder.read(folder.parents[1], which="ema", stage="foo")


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise safetensors_lib.safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(safetensors_lib.safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="m.safetensors can't be written: No space left"):
        formats.write(_bundle(), Target(tmp_path / "m.safetensors"))
    assert list(tmp_path.iterdir()) == []
