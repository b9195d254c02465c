"""The exported sampler: the library's tokens without the library; damaged files do no harm."""

import ast
import dataclasses
import hashlib
import importlib.util
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import venv
import zipfile

import jax
import numpy as np
import pytest
import tables
from jax import export

from fsdfm_jax.convert import exported
from fsdfm_jax.data import tokenizer
from fsdfm_jax.flow import sampler
from fsdfm_jax.inference import bundle as bundles
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference import ngrams
from fsdfm_jax.inference.bundle import BadFile
from fsdfm_jax.network.config import CONDITIONINGS, ModelConfig
from fsdfm_jax.ops import logits

LENGTH, STEPS = 12, 3
TEXT = "the cat sat on the mat and the dog sat on the log by the fog "
MASK_PATH = bundles.DEFAULT_PATH | {"source": "mask", "schedule": "cosine"}
UNEVEN = np.array([0.0, 0.1, 0.75, 1.0], np.float32)
PLAIN = np.float32(0), np.float32(0)  # cooling, look_ahead


@pytest.fixture(scope="module")
def words():
    return tokenizer.train_bpe([TEXT * 3], 270)


def _model(**changes):
    fields = {"vocab_size": 20, "width": 4, "num_blocks": 2, "num_heads": 1, "cond_width": 4}
    return ModelConfig(**(fields | changes))


def _bundle(model, **fields):
    """Random weights, all of them far from 0: at init the network ignores its conditioning."""
    shapes = bundles.expected_shapes(model)
    rng = np.random.default_rng(3)
    flat = {name: 0.5 * rng.normal(size=shape) for name, shape in shapes.items()}
    fields = {"block_length": LENGTH, "provenance": {"stage": "distill", "step": 7}} | fields
    return bundles.from_params(bundles.unflatten(flat), model, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, words):
    """An export with a tokenizer and mask noise."""
    folder = tmp_path_factory.mktemp("exported") / "sampler"
    model = _model(vocab_size=words.vocab_size + 1, conditioning="additive")
    exported.write(folder, _bundle(model, tokenizer=words, path=MASK_PATH), steps=STEPS)
    return folder


HEEDING = {
    **{"few_step_jump": "dispersed", "grid": "power:0.7", "temperature": 0.9, "top_p": 0.8},
    **{"cooling": 0.6, "look_ahead": 0.4, "neighbours": 1.5},
}


def _heeding(words, **changes):
    """A model whose configuration says all of how it is sampled."""
    model = _model(vocab_size=words.vocab_size + 1, conditioning="additive")
    counts = tables.counts(model.vocab_size)
    said = {"stage": "distill", "config": {"eval": HEEDING | changes}}
    bundle = _bundle(model, tokenizer=words, path=MASK_PATH, provenance=said)
    return dataclasses.replace(bundle, counts=lambda: counts)


@pytest.fixture(scope="module")
def heeding_folder(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("heeding") / "sampler"
    exported.write(folder, _heeding(words), steps=STEPS)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def heeding_copy(heeding_folder, tmp_path):
    return pathlib.Path(shutil.copytree(heeding_folder, tmp_path / "copy"))


def _signature(folder):
    return json.loads((folder / "signature.json").read_text())


def _sign(folder, signature):
    """Writes a signature whose checksums are right, as an attacker would."""
    sums = signature.get("sha256")
    if isinstance(sums, dict):
        for name in set(sums) & {path.name for path in folder.iterdir()} - {"signature.json"}:
            sums[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        rest = {name: value for name, value in sums.items() if name != "signature.json"}
        text = json.dumps(signature | {"sha256": rest}, sort_keys=True)
        sums["signature.json"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "signature.json").write_text(json.dumps(signature))


def _inputs(batch, length, vocab_size, prompt_length, seed):
    rng = np.random.default_rng(seed)
    given = rng.integers(0, vocab_size, (batch, length)).astype(np.int32)
    frozen = np.broadcast_to(np.arange(length) < prompt_length, given.shape)
    return np.uint32(seed), given, frozen


def _library(bundle, jump_rule="cumulative"):
    run = jax.jit(generate_lib.make_generator(bundle.model, bundle.process(), jump_rule))
    return lambda *inputs: run(*inputs[:-2], cooling=inputs[-2], look_ahead=inputs[-1])


# ------------------------------------------------------------------------------------ same tokens


@pytest.mark.parametrize("path", [bundles.DEFAULT_PATH, MASK_PATH], ids=["uniform", "mask"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_program_gives_the_tokens_of_the_library(tmp_path, conditioning, path):
    model = _model(conditioning=conditioning, attention="xla", remat="full", dropout=0.1)
    bundle = _bundle(model, path=path)
    exported.write(tmp_path / "a", bundle, steps=STEPS)
    manual = dataclasses.replace(bundle, model=dataclasses.replace(model, attention="manual"))
    library = _library(manual)
    program = jax.jit(exported.load_program(tmp_path / "a").call)
    weights = dict(bundle.arrays())
    cases = [
        (1, 0, sampler.uniform_grid(STEPS), 1.0, 0),
        (3, 5, sampler.uniform_grid(STEPS), 0.7, 2**32 - 1),
        (3, 3, UNEVEN, 1.3, 11),
    ]
    for batch, prompt_length, grid, temperature, seed in cases:
        inputs = _inputs(batch, LENGTH, model.vocab_size - 1, prompt_length, seed)
        inputs += (grid, np.float32(temperature), *PLAIN)
        got = np.asarray(program(weights, *inputs))
        want = np.asarray(library(bundle.params(), *inputs))
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(got[:, :prompt_length], inputs[1][:, :prompt_length])


def test_a_batch_that_is_a_symbol_is_cut_into_chunks(tmp_path, monkeypatch):
    bundle = _bundle(_model(logits_mib=1))
    whole = _library(bundle)
    inputs = (*_inputs(3, LENGTH, 20, 0, 5), sampler.uniform_grid(STEPS), np.float32(1.0), *PLAIN)
    want = whole(bundle.params(), *inputs)
    monkeypatch.setattr(logits, "_MAP_FRACTION", 2**18 // 40)  # two positions of 20 tokens
    exported.write(tmp_path / "a", bundle, steps=STEPS)
    program = exported.load_program(tmp_path / "a")
    # The loops over steps and blocks, and one more each in the jump and in the last step.
    assert program.mlir_module().count("stablehlo.while") >= 4
    np.testing.assert_array_equal(program.call(dict(bundle.arrays()), *inputs), want)


@pytest.mark.parametrize("rule", ["euler", "mixture"])
def test_jump_rule_and_bfloat16_are_kept(tmp_path, rule):
    bundle = _bundle(_model(dtype="bfloat16"), path=MASK_PATH | {"revealed": "jump"})
    exported.write(tmp_path / "a", bundle, steps=2, length=9, jump_rule=rule)
    inputs = (*_inputs(4, 9, 19, 2, 5), sampler.uniform_grid(2), np.float32(0.9), *PLAIN)
    got = exported.load_program(tmp_path / "a").call(dict(bundle.arrays()), *inputs)
    np.testing.assert_array_equal(got, _library(bundle, rule)(bundle.params(), *inputs))


def _generated(bundle, inputs, steps=STEPS, **changes):
    """Tokens of the library by what the configuration of a bundle says."""
    seed, given, frozen = inputs
    how = bundle.provenance["config"]["eval"] | changes
    return generate_lib.generate(
        bundle.params(),
        bundle.model,
        bundle.process(),
        given_BL=given,
        frozen_BL=frozen,
        steps=steps,
        seed=int(seed),
        jump_rule=how.pop("few_step_jump"),
        table=ngrams.table(bundle.counts(), bundle.model.vocab_size),
        **how,
    )


def _called(folder, inputs, **changes):
    """Tokens of an exported program, its inputs by their names."""
    signature = _signature(folder)
    values = dict(zip(("seed", "given", "frozen"), inputs, strict=True))
    values |= {key: np.float32(value) for key, value in (signature["defaults"] | changes).items()}
    bundle = exported.read(folder)
    values["weights"] = dict(bundle.arrays())
    if bundle.counts is not None:
        values["table"] = ngrams.table(bundle.counts(), bundle.model.vocab_size)._asdict()
    program = exported.load_program(folder)
    return program.call(*(values[entry["name"]] for entry in signature["inputs"]))


@pytest.mark.optimised
def test_a_model_is_exported_as_it_is_sampled(heeding_folder, words):
    bundle = _heeding(words)
    inputs = _inputs(4, LENGTH, words.vocab_size, 4, 3)
    want = _generated(bundle, inputs)
    np.testing.assert_array_equal(_called(heeding_folder, inputs), want)
    # All of it makes a difference, and all but the jump rule is an input.
    changes = {"temperature": 1.4, "cooling": 0.0, "look_ahead": 0.0, "top_p": 0.3}
    for change in [*({key: value} for key, value in changes.items()), {"neighbours": 0.2}]:
        other = _generated(bundle, inputs, **change)
        assert not np.array_equal(other, want), change
        np.testing.assert_array_equal(_called(heeding_folder, inputs, **change), other)
    other = _generated(bundle, inputs, grid="uniform")
    found = _called(heeding_folder, inputs, grid=sampler.uniform_grid(STEPS))
    np.testing.assert_array_equal(found, other)


@pytest.mark.parametrize(
    ("strength", "rule"), [(0.0, None), (0.0, "euler"), (3.0, "mixture")], ids=str
)
def test_another_rule_or_strength_can_be_asked_for(tmp_path, words, strength, rule):
    bundle = _heeding(words, top_p=1.0)
    exported.write(tmp_path / "a", bundle, steps=2, jump_rule=rule, neighbours=strength)
    inputs = _inputs(4, LENGTH, words.vocab_size, 4, 3)
    changes = {"neighbours": strength, "few_step_jump": rule or HEEDING["few_step_jump"]}
    want = _generated(bundle, inputs, steps=2, **changes)
    np.testing.assert_array_equal(_called(tmp_path / "a", inputs), want)
    signature = _signature(tmp_path / "a")
    names = [entry["name"] for entry in signature["inputs"]]
    assert "top_p" not in names
    assert (tmp_path / "a" / "neighbours.npz").exists() == ("table" in names) == bool(strength)
    found = exported.read(tmp_path / "a")
    assert (found.counts is not None) == found.heeds_neighbours == bool(strength)
    # Who goes on from the folder samples as its program does.
    assert found.sampling() == bundle.sampling() | changes


def test_counts_come_along(heeding_folder, words):
    bundle = exported.read(heeding_folder)
    assert bundle.heeds_neighbours
    assert bundle.sampling() == HEEDING
    for found, want in zip(bundle.counts(), _heeding(words).counts(), strict=True):
        np.testing.assert_array_equal(found, want)


def test_neighbours_that_can_not_be_heeded_are_refused(tmp_path, words):
    bundle = _heeding(words)
    with pytest.raises(ValueError, match="needs to know which tokens follow which"):
        exported.write(tmp_path / "a", dataclasses.replace(bundle, counts=None), steps=2)
    with pytest.raises(ValueError, match="the rule 'euler' leaves out the current token"):
        exported.write(tmp_path / "a", bundle, steps=2, jump_rule="euler")
    with pytest.raises(ValueError, match="cooling must lie in"):
        exported.write(tmp_path / "a", _heeding(words, cooling=1.5), steps=2)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["folder", "heeding_folder"])
def test_program_lists_inputs_as_the_signature_does(request, name):
    folder = request.getfixturevalue(name)
    program = exported.load_program(folder)
    tree, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    signature = _signature(folder)
    for entry, aval in zip(signature["inputs"], tree, strict=True):
        found = jax.tree.map(lambda a: [n if isinstance(n, int) else str(n) for n in a.shape], aval)
        assert entry["shape"] == found, entry["name"]
        types = jax.tree.map(lambda a: str(a.dtype), aval)
        assert entry["dtype"] == types or set(jax.tree.leaves(types)) == {entry["dtype"]}
    (output,) = signature["outputs"]
    (aval,) = program.out_avals
    assert [str(aval.dtype), [str(n) for n in aval.shape]] == ["int32", ["b", str(LENGTH)]]
    assert output["shape"] == ["b", LENGTH]
    assert output["dtype"] == "int32"
    assert tuple(signature["platforms"]) == program.platforms


# --------------------------------------------------------------------------------------- a folder


def test_round_trip(folder, words):
    bundle = exported.read(folder)
    original = _bundle(bundle.model, tokenizer=words, path=MASK_PATH)
    assert bundle.model == original.model
    assert bundle.path == MASK_PATH
    assert bundle.block_length == LENGTH
    assert bundle.provenance == original.provenance
    assert bundle.tokenizer.fingerprint == words.fingerprint
    assert bundle.process() == original.process()
    assert list(bundle.leaves) == list(original.leaves)
    for name, array in bundle.arrays():
        assert array.dtype == np.float32
        assert array.flags.writeable
        np.testing.assert_array_equal(array, original.leaves[name].read())
    signature = _signature(folder)
    assert signature["mask_id"] == words.vocab_size
    assert signature["eos_id"] == words.eos_id


def test_signature_records_the_network_that_was_exported(tmp_path):
    model = _model(attention="xla", remat="dots", dtype="bfloat16", dropout=0.1)
    exported.write(tmp_path / "a", _bundle(model), steps=1)
    assert _signature(tmp_path / "a")["model"]["attention"] == "manual"
    recorded = exported.read(tmp_path / "a").model
    assert recorded == dataclasses.replace(model, attention="auto", remat="none")


@pytest.mark.parametrize("heeds", [False, True])
def test_same_bytes_every_time_and_no_folder_of_this_machine(
    folder, heeding_folder, tmp_path, words, heeds
):
    bundle = _bundle(exported.read(folder).model, tokenizer=words, path=MASK_PATH)
    if heeds:
        folder, bundle = heeding_folder, _heeding(words)
    exported.write(tmp_path / "again", bundle, steps=STEPS)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([*_signature(folder)["sha256"]])
    for name in names:
        content = (folder / name).read_bytes()
        assert content == (tmp_path / "again" / name).read_bytes(), name
    program = (folder / "sampler.jaxexport").read_bytes()
    assert not re.findall(rb"[\w./-]+\.py", program)


def test_numpy_reads_the_weights(folder):
    with np.load(folder / "weights.npz") as arrays:
        assert {name: a.shape for name, a in arrays.items()} == {
            name: leaf.shape for name, leaf in exported.read(folder).leaves.items()
        }
    with zipfile.ZipFile(folder / "weights.npz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_parameters_are_read_one_by_one(tmp_path):
    bundle = _bundle(_model())
    opened = []

    def leaf(name, old):
        return old._replace(read=lambda: opened.append(name) or old.read())

    lazy = {name: leaf(name, old) for name, old in bundle.leaves.items()}
    exported.write(tmp_path / "a", dataclasses.replace(bundle, leaves=lazy), steps=1)
    assert opened == list(bundle.leaves)


def test_flatbuffers_come_with_their_licence(folder):
    with zipfile.ZipFile(folder / "flatbuffers.zip") as archive:
        names = archive.namelist()
        licence = [name for name in names if "LICENSE" in name]
        assert b"Apache License" in archive.read(licence[0])
    assert "flatbuffers/__init__.py" in names
    assert any(name.endswith("METADATA") for name in names)
    assert not [name for name in names if "__pycache__" in name]


def test_is_exported(folder, tmp_path):
    assert exported.is_exported(folder)
    assert not exported.is_exported(tmp_path)
    assert not exported.is_exported(tmp_path / "missing")
    for text in ("[]", "{", '{"format": 1}', "[" * 100_000):
        (tmp_path / "signature.json").write_text(text)
        assert not exported.is_exported(tmp_path)


@pytest.mark.parametrize(
    ("changes", "request_", "message"),
    [
        ({"model": _model(causal=True)}, {}, "autoregressive"),
        ({"block_length": None}, {}, "name the length"),
        ({}, {"steps": 0}, "steps must lie in 1"),
        ({}, {"length": 0}, "length must lie in 1"),
        ({}, {"jump_rule": "leap"}, "Unknown jump rule 'leap'"),
        ({"leaves": {}}, {}, "don't fit the network: .* is missing.* more"),
        ({"model": _model(width=8)}, {}, r"has \(.*4.*\), expected \(.*8.*\)"),
    ],
)
def test_refuses_what_it_can_not_export(tmp_path, changes, request_, message):
    bundle = dataclasses.replace(_bundle(_model()), **changes)
    with pytest.raises(ValueError, match=message):
        exported.write(tmp_path / "a", bundle, **({"steps": 2} | request_))
    assert not (tmp_path / "a").exists()


def test_refuses_a_tokenizer_larger_than_the_vocabulary(tmp_path, words):
    bundle = _bundle(_model(vocab_size=words.vocab_size), tokenizer=words, path=MASK_PATH)
    with pytest.raises(ValueError, match="270 tokens, the network knows 269"):
        exported.write(tmp_path / "a", bundle, steps=2)


# ---------------------------------------------------------------------------------------- run.py

# All that `pip install jax numpy tokenizers` brings and their imports need.
_NEEDED = ("jax", "jaxlib", "ml_dtypes", "numpy", "opt_einsum", "scipy", "tokenizers")
_BARE = """
import runpy, sys
sys.path.append(sys.argv[1])
sys.argv[:2] = []
runpy.run_path(sys.argv[0], run_name="__main__")
import flatbuffers
if "flatbuffers.zip" not in flatbuffers.__file__:
    sys.exit(f"flatbuffers came from {flatbuffers.__file__}")
"""


def _run(folder, tmp_path, *arguments):
    """run.py's output in a process that can import `_NEEDED` and the standard library only."""
    site = tmp_path / "site"
    site.mkdir()
    for name in _NEEDED:
        package = pathlib.Path(importlib.util.find_spec(name).origin).parent
        for found in (package, package.with_name(f"{name}.libs")):
            if found.exists():
                (site / found.name).symlink_to(found)
    command = [sys.executable, "-I", "-S", "-c", _BARE, str(site), str(folder / "run.py")]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _prompted(prompt, num_samples, seed):
    given = np.zeros((num_samples, LENGTH), np.int32)
    given[:, : len(prompt)] = prompt
    frozen = np.broadcast_to(np.arange(LENGTH) < len(prompt), given.shape)
    return np.uint32(seed), given, frozen


def _expected_tokens(folder, prompt, *, num_samples, seed, temperature):
    bundle = exported.read(folder)
    inputs = _prompted(prompt, num_samples, seed)
    inputs += (sampler.uniform_grid(STEPS), np.float32(temperature), *PLAIN)
    return np.asarray(_library(bundle)(bundle.params(), *inputs))


def test_run_writes_the_librarys_text_without_the_library(folder, tmp_path, words):
    output = _run(
        *(folder, tmp_path, "--prompt", "the cat", "--num_samples", "2"),
        *("--seed", "4", "--temperature", "0.8"),
    )
    prompt = words.encode("the cat")
    tokens = _expected_tokens(folder, prompt, num_samples=2, seed=4, temperature=0.8)
    assert output == "\n----\n".join(words.decode(row) for row in tokens) + "\n"
    assert output.startswith("the cat")


def test_run_heeds_neighbours_without_the_library(heeding_folder, tmp_path, words):
    output = _run(
        *(heeding_folder, tmp_path, "--prompt", "the cat", "--num_samples", "3", "--seed", "4")
    )
    tokens = _generated(_heeding(words), _prompted(words.encode("the cat"), 3, 4))
    assert output == "\n----\n".join(words.decode(row) for row in tokens) + "\n"


def test_run_prints_ids_without_a_tokenizer(tmp_path):
    exported.write(tmp_path / "a", _bundle(_model()), steps=STEPS)
    output = _run(tmp_path / "a", tmp_path, "--num_samples", "3", "--seed", "9")
    tokens = _expected_tokens(tmp_path / "a", [], num_samples=3, seed=9, temperature=1.0)
    assert [json.loads(line) for line in output.splitlines()] == tokens.tolist()


def test_run_takes_special_names_in_a_prompt_as_text(folder, words, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("run", folder / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    seen = []
    monkeypatch.setattr(run, "sample", lambda ids, *rest: seen.append(ids) or np.zeros((1, 1), int))
    monkeypatch.setattr(sys, "argv", ["run.py", "--prompt", "a<|endoftext|>b"])
    run.main()
    capsys.readouterr()
    assert seen == [words.encode("a<|endoftext|>b")]
    assert words.eos_id not in seen[0]


@pytest.mark.parametrize(
    "arguments", [([0] * LENGTH, 1, 0, 1.0), ([], 0, 0, 1.0), ([], 1, 0, 0.0), ([], 1, 0, np.nan)]
)
def test_run_says_what_it_expects(folder, arguments):
    spec = importlib.util.spec_from_file_location("run", folder / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    with pytest.raises(SystemExit, match="num_samples >= 1 and temperature > 0"):
        run.sample(*arguments)


def test_run_is_a_short_read_and_imports_little(folder):
    source = (folder / "run.py").read_text()
    tree = ast.parse(source)
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    third = {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names)
    assert third == {"jax", "numpy", "tokenizers", "ngrams"}  # the last one lies beside it
    beside = ast.parse(pathlib.Path(ngrams.__file__).read_text())
    names = {n.module for n in ast.walk(beside) if isinstance(n, ast.ImportFrom)}
    names |= {a.name for n in ast.walk(beside) if isinstance(n, ast.Import) for a in n.names}
    assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == {"numpy"}
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    code = [
        line
        for number, line in enumerate(source.splitlines(), start=1)
        if line.strip() and number not in docstrings and not line.lstrip().startswith("#")
    ]
    code = [line for line in code if not line.startswith(("import ", "from ", "def ", "if __name"))]
    assert len(code) <= 45


@pytest.mark.slow
def test_run_in_a_fresh_environment(folder, tmp_path, words):
    """With what pip brings for `pip install jax numpy tokenizers`, nothing of this environment."""
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", f"jax=={jax.__version__}", "numpy"]
    subprocess.run([*install, "tokenizers"], check=True)
    options = ["--prompt", "the cat", "--num_samples", "2", "--seed", "4"]
    command = [python, "-I", folder / "run.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    tokens = _expected_tokens(
        folder, words.encode("the cat"), num_samples=2, seed=4, temperature=1.0
    )
    assert done.stdout == "\n----\n".join(words.decode(row) for row in tokens) + "\n"


# --------------------------------------------------------------------------------- damaged folders


@pytest.mark.parametrize(
    "name",
    [
        *("sampler.jaxexport", "weights.npz", "flatbuffers.zip", "run.py", "tokenizer.json"),
        *("neighbours.npz", "ngrams.py"),
    ],
)
def test_names_the_missing_or_changed_file(heeding_copy, name):
    content = (heeding_copy / name).read_bytes()
    (heeding_copy / name).write_bytes(content[:-30] + b"x" * 30)
    with pytest.raises(BadFile, match=name):
        exported.read(heeding_copy)
    (heeding_copy / name).unlink()
    with pytest.raises(BadFile, match=name):
        exported.read(heeding_copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": 0.0}, "doesn't heed them"),
        ({"neighbours": -1.0}, "neighbours must be at least 0"),
        ({"neighbours": 1}, "'neighbours' must be float"),
        ({"cooling": 1.0}, "cooling must lie in"),
        ({"top_p": None}, "'top_p' must be float"),
        ({"more": 1.0}, "'more' is unexpected"),
        ({"grid": [0.0, 0.5, 1.0]}, "isn't one of 3 steps"),
        ({"grid": [0.0, 0.6, 0.5, 1.0]}, "must increase"),
        ({"grid": [0.0, 0.6, "x", 1.0]}, "other things than times"),
    ],
    ids=str,
)
def test_defaults_that_nothing_can_be_drawn_with_are_refused(heeding_copy, changes, message):
    signature = _signature(heeding_copy)
    signature["defaults"] |= changes
    _sign(heeding_copy, signature)
    with pytest.raises(BadFile, match=message):
        exported.read(heeding_copy)


@pytest.mark.parametrize("contexts", [None, 0, True, 10, 2**40])
def test_a_number_of_contexts_that_no_table_has_is_refused(heeding_copy, contexts):
    signature = _signature(heeding_copy)
    table = {"follow_CV": [contexts, 271], "keys_N": [(contexts or 0) - 271]}
    signature["inputs"][-1]["shape"] = table | {"shorter_C": [contexts]}
    signature["contexts"] = contexts
    _sign(heeding_copy, signature)
    with pytest.raises(BadFile, match="signature.json"):
        exported.read(heeding_copy)


@pytest.mark.parametrize(
    "config",
    [
        *("x", [], {"eval": 3}),
        *({"eval": {key: value}} for key, value in (("temperature", "hot"), ("cooling", [0.1]))),
        *({"eval": {key: value}} for key, value in (("grid", 3), ("few_step_jump", ["a"]))),
        *({"eval": {"neighbours": value}} for value in ("NaN", True)),
    ],
    ids=str,
)
def test_a_configuration_that_says_no_sampler_is_refused(copy, config):
    signature = _signature(copy)
    signature["provenance"]["config"] = config
    _sign(copy, signature)
    with pytest.raises(BadFile, match="provenance.config"):
        exported.read(copy)


def test_counts_larger_than_any_table_are_not_read(heeding_copy, words, monkeypatch):
    size = words.vocab_size + 1
    most = ngrams.most_contexts(size)
    huge = np.zeros(2 * most * size + 2 * most + 2**14 + 1, np.int32)
    arrays = exported.read(heeding_copy).counts()._asdict()
    np.savez_compressed(heeding_copy / "neighbours.npz", **(arrays | {"counts_Z": huge}))
    _sign(heeding_copy, _signature(heeding_copy))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(BadFile, match="bytes of counts for 271 tokens"):
        exported.read(heeding_copy).counts()


def test_counts_of_another_table_are_refused(heeding_copy, words):
    size = words.vocab_size + 1
    bundles.write_counts(heeding_copy / "neighbours.npz", ngrams.count([np.arange(9)], size))
    _sign(heeding_copy, _signature(heeding_copy))
    with pytest.raises(BadFile, match=f"has {size} contexts, the program takes"):
        exported.read(heeding_copy).counts()
    (heeding_copy / "neighbours.npz").write_bytes(b"no zip")
    _sign(heeding_copy, _signature(heeding_copy))
    with pytest.raises(BadFile, match="neighbours.npz is damaged"):
        exported.read(heeding_copy).counts()


def test_names_a_changed_parameter(copy):
    content = bytearray((copy / "weights.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "weights.npz").write_bytes(content)
    bundle = exported.read(copy)
    with pytest.raises(BadFile, match="CRC-32"):
        dict(bundle.arrays())


def test_program_is_checked(copy):
    with pytest.raises(BadFile, match="signature.json"):
        exported.load_program(copy / "missing")
    (copy / "sampler.jaxexport").write_bytes(b"no program")
    with pytest.raises(BadFile, match="is damaged: expected sha256"):
        exported.load_program(copy)
    _sign(copy, _signature(copy))
    with pytest.raises(BadFile, match="can't be read as a program"):
        exported.load_program(copy)
    one = export.export(jax.jit(lambda x: x))(jax.ShapeDtypeStruct((), np.float32))
    (copy / "sampler.jaxexport").write_bytes(one.serialize())
    _sign(copy, _signature(copy))
    with pytest.raises(BadFile, match="is for"):
        exported.load_program(copy)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("model", "width"), 10**30, "more parameters than"),
        (("model", "num_blocks"), 10**9, "more parameters than"),
        (("model", "mlp_ratio"), 10**12, "more parameters than"),
        (("model", "num_heads"), True, "'num_heads' must be int, got True"),
        (("model", "width"), -4, "width must be at least 1"),
        (("model", "causal"), True, "takes conditioning='none'"),
        (("model", "remat"), "full", "remat='none'"),
        (("model", "attention"), "cudnn", "attention='manual'"),
        (("model", "conditioning"), "official", "is missing"),
        (("model", "dtype"), "float8", "float8"),
        (("model", "extra"), 1, "'extra' is unexpected"),
        (("path", "source"), "noise", "Unknown source 'noise'"),
        (("path", "power"), "1", "'power' must be"),
        (("path", "schedule"), "line", "Unknown schedule"),
        (("path", "revealed"), "go", "Unknown revealed"),
        (("steps",), 10**400, "a huge number"),
        (("steps",), -1, "whole number"),
        (("length",), LENGTH + 1, "contradicts itself in 'inputs'"),
        (("jump_rule",), "leap", "Unknown jump rule"),
        (("jump_rule",), ["leap"], "'jump_rule' must be str"),
        (("mask_id",), 0, "contradicts itself in 'mask_id'"),
        (("eos_id",), 5, "contradicts itself in 'eos_id'"),
        (("platforms",), [], "contradicts itself in 'platforms'"),
        (("block_length",), 0, "whole number"),
        (("version",), 1, "version 1, expected 3"),
        (("format",), "x", "no exported sampler"),
        (("provenance",), None, "'provenance' must be dict"),
        (("sha256", "../run.py"), "0", "'../run.py' is unexpected"),
        (("sha256", "tokenizer.json"), 1, "'tokenizer.json' must be str"),
    ],
)
def test_refuses_what_a_signature_may_not_say(copy, keys, value, message):
    signature = node = _signature(copy)
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    if message.startswith("'tokenizer"):
        (copy / "signature.json").write_text(json.dumps(signature))
    else:
        _sign(copy, signature)
    with pytest.raises(BadFile, match=re.escape(message)):
        exported.read(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "format": 2}', "stands twice"),
        ('{"format": NaN}', "no finite number"),
        ('{"format": 1e999}', "no finite number"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "can't be read as JSON"),
        ("1" * 5000, "can't be read as JSON"),
        ("[1]", "expected a JSON object"),
        ("\ufeff{}", "can't be read as JSON"),
        (" " * (1 << 26) + "{}", "more than 67108864 bytes"),
    ],
)
def test_refuses_what_is_no_plain_json(copy, text, message):
    (copy / "signature.json").write_text(text)
    with pytest.raises(BadFile, match=message):
        exported.read(copy)


def test_refuses_an_unsigned_change_of_the_signature(copy):
    signature = _signature(copy)
    signature["model"]["num_heads"] = 2  # the same shapes, another network
    (copy / "signature.json").write_text(json.dumps(signature))
    with pytest.raises(BadFile, match=r"signature.json is damaged: expected sha256"):
        exported.read(copy)


def _rewrite(path, change):
    """Writes weights.npz anew; change(name, content) -> [(name, content, compression)]."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            for new_name, new_content, compression in change(name, content):
                archive.writestr(new_name, new_content, compression)


_HEAD = "head/bias.npy"
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def _header(content, old, new):
    """Replaces text in an array's header, whose length stays."""
    assert old in content[:128]
    start = content[:128].replace(old, new)
    start = start[:127].rstrip(b"\n").ljust(127)[:127] + b"\n"
    return start + content[128:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, c: [(n, c, _DEFLATED)], "uncompressed"),
        (lambda n, c: [], "is missing"),
        (lambda n, c: [(n, c, _STORED), ("../x.npy", c, _STORED)], "'../x.npy' is unexpected"),
        (lambda n, c: [(n, c, _STORED), (n, c, _STORED)], "an array twice"),
        (lambda n, c: [(n, c + b"1234" * 1_000_000, _STORED)], "expected a header and"),
        (lambda n, c: [(n, c[:-4], _STORED)], "isn't a float32 array"),
        (lambda n, c: [(n, c[:40], _STORED)], "expected a header and"),
        (lambda n, c: [(n, _header(c, b"<f4", b"|O8"), _STORED)], "isn't a float32 array"),
        (lambda n, c: [(n, _header(c, b"<f4", b">f4"), _STORED)], "isn't a float32 array"),
        (lambda n, c: [(n, _header(c, b"(271,)", b"(1 << 40,)"), _STORED)], "isn't a float32"),
        (lambda n, c: [(n, _header(c, b"False", b"True"), _STORED)], "isn't a float32 array"),
        (lambda n, c: [(n, c[:8] + b"\xff\xff" + c[10:], _STORED)], "isn't a float32 array"),
        (lambda n, c: [(n, c[:6] + b"\x03\x00" + c[8:], _STORED)], "isn't a float32 array"),
    ],
)
def test_refuses_weights_that_are_not_the_networks(copy, change, message):
    keep = lambda name, content: [(name, content, _STORED)]
    with pytest.warns(UserWarning, match="Duplicate") if "twice" in message else _no_warning():
        _rewrite(copy / "weights.npz", lambda n, c: (change if n == _HEAD else keep)(n, c))
    with pytest.raises(BadFile, match=re.escape(message)):
        exported.read(copy).params()


class _no_warning:  # noqa: N801 - reads as a function
    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        return None


# ------------------------------------------------------------------------------------------- fuzz

_ODD = (
    *(0, -1, 1, 2**31, 2**63, 10**400, -(10**30), 0.5, 1e308, True, False, None, "", "x", "../x"),
    *("/", "\x00", "\ud800", [], {}, [[]], {"a": {}}, "float32", "mask", "cosine", 3, 4, 8),
)


def _damage(rng, content):
    """A file after something went wrong with it."""
    content = bytearray(content)
    kind = rng.randrange(5)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        for _ in range(rng.choice((1, 1, 3, 30))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        size = rng.randrange(1, max(len(content) // 3, 2))
        a, b = sorted(rng.sample(range(len(content)), 2))
        content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]
    elif kind == 3:
        at = rng.randrange(len(content))
        content[at : at + rng.randrange(9)] = rng.choice((b"\xff" * 8, bytes(8), b"", b"9" * 20))
    else:  # near the end: a zip file's directory
        at = max(len(content) - rng.randrange(1, 400), 0)
        content[at] = rng.randrange(256)
    return content


def _edit(rng, node):
    """Changes one value somewhere inside a JSON value, in place."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    key = rng.choice(keys)
    if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
        return _edit(rng, node[key])
    action = rng.randrange(4)
    if action == 0 and isinstance(node, dict):
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[rng.choice(("../../x", "", "model", key.upper() + "_"))] = node[key]
    else:
        node[key] = rng.choice(_ODD)


def _outcome(folder, original):
    """True if refused; False if read unchanged; fails for anything else."""
    try:
        arrays = dict(exported.read(folder).arrays())
    except BadFile:
        return True
    assert arrays.keys() == original.keys()
    for name, array in arrays.items():
        assert array.dtype == np.float32
        assert array.tobytes() == original[name].tobytes(), name
    return False


def _small(tmp_path, words):
    """The smallest folder: its files are most of all structure."""
    model = _model(vocab_size=words.vocab_size, width=2, num_blocks=1, cond_width=1, mlp_ratio=1)
    exported.write(tmp_path / "small", _bundle(model, tokenizer=words), steps=1)
    return tmp_path / "small"


def test_damage_is_refused_or_harmless(tmp_path, words):
    folder = _small(tmp_path, words)
    original = {name: array.copy() for name, array in exported.read(folder).arrays()}
    rng = random.Random(0)
    refused = dict.fromkeys(_signature(folder)["sha256"], 0)
    for name, count in (
        *(("weights.npz", 700), ("signature.json", 300)),
        *(("tokenizer.json", 60), ("sampler.jaxexport", 60), ("run.py", 60)),
    ):
        content = (folder / name).read_bytes()
        for _ in range(count):
            damaged = _damage(rng, content)
            (folder / name).write_bytes(damaged)
            was_refused = _outcome(folder, original)
            refused[name] += was_refused
            assert was_refused or name in ("weights.npz", "signature.json") or damaged == content
        (folder / name).write_bytes(content)
    # Of an archive much may change without an effect on its arrays: dates, modes, spare fields.
    assert refused["weights.npz"] > 400
    assert refused["signature.json"] > 250


def test_hostile_edits_under_right_checksums_are_refused_or_harmless(tmp_path, words):
    folder = _small(tmp_path, words)
    original = {name: array.copy() for name, array in exported.read(folder).arrays()}
    rng = random.Random(1)
    text = (folder / "signature.json").read_text()
    refused = 0
    for _ in range(500):
        signature = json.loads(text)
        for _ in range(rng.choice((1, 1, 1, 3))):
            _edit(rng, signature)
        _sign(folder, signature)
        refused += _outcome(folder, original)
    assert 250 < refused < 500  # provenance may say anything
    (folder / "signature.json").write_text(text)
    for name, count in (("tokenizer.json", 100), ("sampler.jaxexport", 20)):
        content = (folder / name).read_bytes()
        for _ in range(count):
            (folder / name).write_bytes(_damage(rng, content))
            _sign(folder, json.loads(text))
            _outcome(folder, original)
        (folder / name).write_bytes(content)
