"""The exported sampler: the library's tokens without the library; damaged folders are rejected."""

import ast
import json
import pathlib
import shutil
import subprocess
import sys
import venv

import numpy as np
import pytest
from marks import slow_except

from fsdfm_jax.convert import exported, formats, parity
from fsdfm_jax.convert.formats import Target
from fsdfm_jax.data import tokenizer
from fsdfm_jax.flow import jumps
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference import job as job_lib
from fsdfm_jax.inference.bundle import BadFile
from fsdfm_jax.network.config import ModelConfig

LENGTH, STEPS = 12, (3, 1)
TEXT = "the cat sat on the mat and the dog sat on the log by the fog "
MASK_PATH = bundle_lib.DEFAULT_PATH | {"source": "mask", "schedule": "cosine"}
OPTIONS = Sampling(3, "dispersed", "power:0.7", 0.9, 0.6, 0.8, 0.4)


@pytest.fixture(scope="module")
def words():
    return tokenizer.train_bpe([TEXT * 3], 270)


def _model(**changes):
    fields = {"vocab_size": 20, "width": 4, "num_blocks": 2, "num_heads": 1, "cond_width": 4}
    return ModelConfig(**(fields | changes))


def _bundle(model, **fields):
    """Random weights, all of them far from 0: at init the network ignores its conditioning."""
    shapes = bundle_lib.expected_shapes(model)
    rng = np.random.default_rng(3)
    flat = {name: 0.5 * rng.normal(size=shape) for name, shape in shapes.items()}
    fields = {"block_length": LENGTH, "provenance": {"stage": "distill", "step": 7}} | fields
    return bundle_lib.from_params(bundle_lib.unflatten(flat), model, **fields)


@pytest.fixture(scope="module")
def source(words):
    model = _model(vocab_size=words.vocab_size + 1, conditioning="additive")
    return _bundle(model, tokenizer=words, path=MASK_PATH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, source):
    """An export of two numbers of steps, with a tokenizer and mask noise."""
    folder = tmp_path_factory.mktemp("exported") / "sampler"
    formats.write(source, Target(folder, to="sampler", steps=STEPS))
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


def _rows(bundle, batch=3, seed=0):
    rng = np.random.default_rng(seed)
    given_BL = rng.integers(0, bundle.num_tokens, (batch, LENGTH)).astype(np.int32)
    frozen_BL = np.broadcast_to(np.arange(LENGTH) < 4, given_BL.shape)
    return {"given_BL": given_BL, "frozen_BL": frozen_BL, "seed": 2**32 - 1}


def test_a_program_is_no_longer_than_its_network(tmp_path):
    bundle = _bundle(_model(positions="learned", num_positions=LENGTH))
    with pytest.raises(ValueError, match="12 learned positions, got a block of 13"):
        formats.write(bundle, Target(tmp_path / "x", to="sampler", length=13))
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ same tokens
@pytest.mark.parametrize("path", [bundle_lib.DEFAULT_PATH, MASK_PATH], ids=["uniform", "mask"])
@pytest.mark.parametrize(
    "conditioning", slow_except(["additive"], ["none", "official", "additive"])
)
def test_a_program_draws_the_tokens_of_the_library(tmp_path, conditioning, path):
    model = _model(conditioning=conditioning, attention="xla", remat="full", dropout=0.1)
    bundle = _bundle(model, path=path)
    exported.write(tmp_path / "a", bundle, steps=(3,))
    for seed, batch in ((0, 3), (1, 1)):
        rows = _rows(bundle, batch, seed)
        arguments = (exported.portable(model), bundle.process(), Sampling(3))
        wanted_BL = generate_lib.generate(bundle.params(), *arguments, **rows)
        found_BL = exported.call(tmp_path / "a", bundle.params(), Sampling(3), **rows)
        np.testing.assert_array_equal(found_BL, wanted_BL)


@pytest.mark.parametrize("rule", jumps.RULES)
def test_all_of_a_sampling_is_exported(tmp_path, rule, source):
    sampling = OPTIONS.replace(jump=rule)
    exported.write(tmp_path / "a", source, sampling=sampling)
    parity.check_program(source, tmp_path / "a", sampling=sampling, rows=3)
    # Numbers are inputs; what is compiled in stays.
    other = sampling.replace(temperature=0.5, cooling=0.1, look_ahead=0.9, top_p=0.5)
    rows, params = _rows(source), source.params()
    arguments = (exported.portable(source.model), source.process(), other)
    found_BL = exported.call(tmp_path / "a", params, other, **rows)
    np.testing.assert_array_equal(found_BL, generate_lib.generate(params, *arguments, **rows))
    assert formats.open_bundle(tmp_path / "a").sampling() == sampling


def test_a_check_that_finds_another_sampler_fails(folder, source):
    with pytest.raises(ValueError, match="draws other tokens than the library"):
        parity.check_program(source, folder, sampling=Sampling(jump="euler"), rows=16)


def test_bfloat16_stays(tmp_path):
    bundle = _bundle(_model(dtype="bfloat16", width=8, conditioning="additive"))
    exported.write(tmp_path / "a", bundle, steps=(2,))
    parity.check_program(bundle, tmp_path / "a", rows=2)


def test_the_model_comes_back(folder, source, words):
    found = formats.open_bundle(folder)
    assert found.model == source.model
    assert found.tokenizer.fingerprint == words.fingerprint
    assert found.path == source.path
    assert found.block_length == LENGTH
    for (name, array), (other, wanted) in zip(found.arrays(), source.arrays(), strict=True):
        assert name == other
        np.testing.assert_array_equal(array, wanted)


def test_the_same_model_gives_the_same_bytes(folder, source, tmp_path):
    formats.write(source, Target(tmp_path / "again", to="sampler", steps=STEPS))
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        content = (folder / name).read_bytes()
        assert str(pathlib.Path(exported.__file__).parents[2]).encode() not in content, name
        # safetensors writes the metadata of a file in any order.
        if name not in (exported.MODEL, exported.CONFIG):
            assert content == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("model", "request_", "message"),
    [
        ({"causal": True}, {}, "autoregressive network has no few-step sampler"),
        ({}, {"length": 0}, "length must be in 1 .. 1048576, got 0"),
        ({}, {"steps": (0,)}, "Sampling.steps must be"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, model, request_, message):
    with pytest.raises(ValueError, match=message):
        exported.write(tmp_path / "a", _bundle(_model(**model)), **request_)
    assert not (tmp_path / "a").exists()


# ----------------------------------------------------------------------------------- the example
def _run(folder, *arguments, python=sys.executable, **options):
    command = [python, str(folder / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_run_writes_the_librarys_text(folder, source, tmp_path):
    """In another folder, without the package on the path, and without leaving files."""
    before = sorted(path.name for path in folder.iterdir())
    asked = {"prompt": ("--prompt", "the cat"), "infill": ("--infill", "the [3] sat")}
    for steps, (kind, flags) in zip(STEPS, asked.items(), strict=True):
        done = _run(folder, *flags, f"--steps={steps}", "--num_samples=2", "--seed=3", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        given = {kind: flags[1], "num_samples": 2, "seed": 3, "sampling": Sampling(steps)}
        assert done.stdout == "\n----\n".join(job_lib.generate(source, **given)) + "\n"
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps=2",), "invalid choice: 2"),
        (("--seed=-1",), "--seed must be in"),
        (("--seed=4294967296",), "--seed must be in"),
        (("--temperature=inf",), "--temperature must be at least 0 and finite"),
        (("--temperature=nan",), "--temperature must be at least 0 and finite"),
        (("--num_samples=0",), "--num_samples must be at least 1"),
        (("--prompt=a", "--infill=[1]"), "exclude each other"),
        (("--infill=no gap",), "has no gap"),
        ((f"--prompt={TEXT * 5}",), "fills the length"),
    ],
)
def test_run_refuses_in_one_line(folder, flags, message):
    done = _run(folder, *flags)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert done.stdout == ""


def test_run_without_a_tokenizer_prints_ids(tmp_path):
    exported.write(tmp_path / "a", _bundle(_model()), steps=(2,))
    done = _run(tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == LENGTH
    assert "no tokenizer" in _run(tmp_path / "a", "--prompt=x").stderr


def test_run_and_what_it_takes_along_import_nothing_of_the_package(folder):
    for name in ("run.py", "prompts.py"):
        tree = ast.parse((folder / name).read_text())
        body = [node for node in tree.body if not isinstance(node, ast.If)]
        found = {
            ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert not [line for line in found if "fsdfm_jax" in line], name


@pytest.mark.slow
def test_run_in_a_fresh_environment(folder, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-r", folder / "requirements.txt"]
    subprocess.run(install, check=True, timeout=900)
    done = _run(folder, "--prompt=the cat", python=python, cwd=tmp_path, env={})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat")


# ---------------------------------------------------------------------------------------- damage
def test_each_missing_or_changed_file_is_named(copy):
    for path in sorted(copy.iterdir()):
        if path.name == exported.CONFIG:
            continue
        content = path.read_bytes()
        for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(BadFile, match=f"{path.name}.* is missing or damaged"):
                formats.open_bundle(copy)
            path.write_bytes(content)
    formats.open_bundle(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "has version 3, but this package reads 4"),
        ({"steps": []}, "doesn't describe an exported sampler"),
        ({"steps": [True]}, "doesn't describe an exported sampler"),
        ({"steps": [5]}, "doesn't describe an exported sampler"),
        ({"length": 2**40}, "doesn't describe an exported sampler"),
        ({"sha256": {}}, "doesn't describe an exported sampler"),
        ({"sha256": None}, "doesn't describe an exported sampler"),
    ],
)
def test_what_a_config_may_not_say(copy, changes, message):
    path = copy / exported.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BadFile, match=message):
        formats.open_bundle(copy)


def test_names_outside_the_folder_are_refused(copy):
    path = copy / exported.CONFIG
    config = json.loads(path.read_text())
    (copy.parent / "other").write_text("x")
    config["sha256"]["../other"] = exported._sha256(copy.parent / "other")
    path.write_text(json.dumps(config))
    with pytest.raises(BadFile, match="other is missing or damaged"):
        formats.open_bundle(copy)


def test_folders_of_earlier_versions_say_what_to_do(tmp_path):
    (tmp_path / "signature.json").write_text(json.dumps({"format": exported.FORMAT, "version": 3}))
    with pytest.raises(BadFile, match="exported by an earlier version; export it again"):
        formats.open_bundle(tmp_path)


def test_is_exported(folder, tmp_path):
    assert exported.is_exported(folder)
    assert not exported.is_exported(tmp_path)
    for content in (b"{}", b"[]", b"\xff", b'{"format": "other"}'):
        (tmp_path / exported.CONFIG).write_bytes(content)
        assert not exported.is_exported(tmp_path)


def test_a_program_of_other_steps_is_not_there(folder, source):
    with pytest.raises(ValueError, match="has programs for 3, 1 steps, got steps=2"):
        exported.call(folder, source.params(), Sampling(2), **_rows(source))
