"""The Hub's layout: writing and reading, the network in PyTorch, the model card, Hub names."""

import dataclasses
import html
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import tokenizers

import fsdfm_jax as fs
from fsdfm_jax.convert import __main__ as program
from fsdfm_jax.convert import formats, hub, official
from fsdfm_jax.convert.formats import Target
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference.bundle import BadFile

ROOT = pathlib.Path(__file__).parents[1]
LENGTH = 6
NETWORKS = {
    "none": {},
    "official": {"conditioning": "official"},
    "additive": {"conditioning": "additive"},
    "learned positions": {"positions": "learned", "num_positions": LENGTH},
    "marked": {"given": "marked"},
    "autoregressive": {"causal": True},
}
PATH = {"schedule": "cosine", "power": 2.0, "source": "mask", "revealed": "jump"}
SAMPLING = fs.Sampling(steps=3, jump="mixture", temperature=0.5)


def _tokenizer(size=11):
    ids = {f"w{i}": i for i in range(1, size)} | {"<|endoftext|>": 0}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="w1"))
    return tokenizer_lib.Tokenizer(backend)


def _bundle(name="additive", provenance=None, **fields):
    model = fs.ModelConfig(
        vocab_size=12, width=8, num_blocks=2, num_heads=2, cond_width=4, **NETWORKS[name]
    )
    rng = np.random.default_rng(0)
    flat = {
        path: (rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1)).astype("f4")
        for path, shape in bundle_lib.expected_shapes(model).items()
    }
    known = {"run": "distill", "stage": "distill", "weights": "ema", "step": 7}
    known["config"] = {"eval": {"sampling": SAMPLING.to_dict()}}
    return bundle_lib.from_params(
        bundle_lib.unflatten(flat),
        model,
        path=PATH,
        tokenizer=_tokenizer(),
        block_length=LENGTH,
        provenance=known | (provenance or {}),
        **fields,
    )


def _same(found, expected):
    found, expected = found.params(), expected.params()
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, expected)))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_round_trip(tmp_path, name):
    bundle = _bundle(name)
    fs.save_pretrained(bundle, tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("modeling_fsdfm.py", "tokenizer.json", "tokenizer_config.json"),
    ]
    found = fs.load(tmp_path / "model")
    _same(found, bundle)
    assert found.model == bundle.model
    assert found.path == bundle.path
    assert found.block_length == LENGTH
    assert found.sampling() == SAMPLING
    assert found.tokenizer.fingerprint == bundle.tokenizer.fingerprint
    assert found.provenance["source"] == {"file": "model", "format": "hub"}
    assert found.provenance["step"] == 7


def test_config_is_what_other_programs_look_for(tmp_path):
    fs.save_pretrained(_bundle(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "fsdfm"
    assert config["auto_map"]["AutoModelForMaskedLM"] == "modeling_fsdfm.FSDFMModel"
    assert (config["vocab_size"], config["mask_token_id"], config["eos_token_id"]) == (12, 11, 0)
    fs.save_pretrained(_bundle("autoregressive"), tmp_path / "left")
    config = json.loads((tmp_path / "left" / "config.json").read_text())
    assert "AutoModelForCausalLM" in config["auto_map"]


def test_bfloat16_is_rounded_once(tmp_path):
    fs.save_pretrained(_bundle(), tmp_path / "model", dtype="bfloat16")
    found = fs.load(tmp_path / "model").params()
    expected = jax.tree.map(
        lambda array: array.astype(bundle_lib.DTYPES["bfloat16"]).astype(np.float32),
        _bundle().params(),
    )
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, found, expected)))


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.safetensors_lib, "MAX_SHARD_BYTES", 3000)
    fs.save_pretrained(_bundle(), tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    _same(fs.load(tmp_path / "model"), _bundle())


# ------------------------------------------------------------------------------- the sampler
def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_generation_config_says_how_to_sample(tmp_path):
    fs.save_pretrained(_bundle(), tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    assert json.loads(path.read_text())["sampling"] == SAMPLING.to_dict()
    _edit(path, sampling={"steps": 5})
    assert fs.load(tmp_path / "model").sampling() == fs.Sampling(steps=5)
    path.write_text("{}")
    assert fs.load(tmp_path / "model").sampling() == SAMPLING
    path.unlink()
    assert fs.load(tmp_path / "model").sampling() == SAMPLING


@pytest.mark.parametrize("sampling", [{"stepz": 5}, {"steps": 0}, 3, ["steps"], {"top_p": "x"}])
def test_a_sampler_that_there_is_not(tmp_path, sampling):
    fs.save_pretrained(_bundle(), tmp_path / "model")
    _edit(tmp_path / "model" / "generation_config.json", sampling=sampling)
    with pytest.raises(BadFile, match="generation_config.json"):
        fs.load(tmp_path / "model")


# ------------------------------------------------------------------------------- all or nothing
def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(hub, "card", fail)  # the last file
    with pytest.raises(OSError, match="disk full"):
        fs.save_pretrained(_bundle(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_only_such_a_folder_is_replaced(tmp_path):
    fs.save_pretrained(_bundle(), tmp_path / "model")
    with pytest.raises(ValueError, match="already exists"):
        fs.save_pretrained(_bundle("none"), tmp_path / "model")
    fs.save_pretrained(_bundle("none"), tmp_path / "model", overwrite=True)
    _same(fs.load(tmp_path / "model"), _bundle("none"))
    (tmp_path / "model" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="isn't just a model of the format 'hub'"):
        fs.save_pretrained(_bundle(), tmp_path / "model", overwrite=True)


def test_the_converter_writes_and_checks_it(tmp_path):
    source = _bundle()
    lines = program.convert(source, Target(tmp_path / "model", "hub"), check=True)
    assert any("Largest difference of two logits 0 " in line for line in lines)
    for to in ("safetensors", "orbax"):
        formats.write(fs.load(tmp_path / "model"), Target(tmp_path / to, to))
        _same(fs.load(tmp_path / to), source)


def test_the_card_of_a_working_directory_has_its_report(tmp_path):
    assert program._report(tmp_path, None, "hub") is None
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.json").write_text("{}")
    assert program._report(tmp_path, None, "hub") == tmp_path / "report"
    assert program._report(tmp_path, None, "orbax") is None
    assert program._report(tmp_path, "other", "hub") == pathlib.Path("other")
    with pytest.raises(ValueError, match="has no rows"):
        fs.save_pretrained(_bundle(), tmp_path / "model", report=tmp_path / "report")
    with pytest.raises(ValueError, match="no report"):
        fs.save_pretrained(_bundle(), tmp_path / "model", report=tmp_path)
    with pytest.raises(ValueError, match="report: only for the card"):
        formats.write(_bundle(), Target(tmp_path / "m.safetensors", report=tmp_path / "report"))


# ------------------------------------------------------------------------------- the model card
HOSTILE = (
    "</td><script>alert(1)</script> | [x](javascript:alert(1)) ![i](http://h/i.png)\n"
    "# Owned\n---\nlicense: mit\n`rm` www.example.com a@b.c \x1b[31m ``` <!-- &lt; \u202e"
)


def _card(tmp_path, bundle, **options):
    fs.save_pretrained(bundle, tmp_path / "model", **options)
    return (tmp_path / "model" / "README.md").read_text()


def test_what_a_file_says_stands_in_the_card_as_text(tmp_path):
    names = ("run", "stage", "weights", "data", "code_version")
    text = _card(tmp_path, _bundle(provenance=dict.fromkeys(names, HOSTILE)))
    _, front, rest = text.split("---\n", 2)
    assert front == hub._FRONT.split("---\n")[1]
    title = next(line for line in rest.splitlines() if line.startswith("# "))
    assert "script" in title
    for line in [title, *(line for line in rest.splitlines() if line.startswith("| run"))]:
        assert not re.search(r"[<>\x1b\u202e]|(?<!\\)[`\[\]]|www\.|(?<!\\)://", line)
        assert len(re.findall(r"(?<!\\)\|", line)) == (3 if line.startswith("|") else 0)
        shown = html.unescape(re.sub(r"\\(.)", r"\1", line))
        assert "<script>alert(1)</script> | [x](javascript:alert(1))" in shown
    assert [line for line in rest.splitlines() if line.startswith("# ")] == [title]


def _row(digest, **fields):
    estimate = lambda value: {"value": value, "low": value - 1, "high": value + 1, "count": 4}
    row = {"kind": "model", "group": "distill", "steps": 8, "temperature": 1.0, "num_samples": 4}
    row["figures"] = {"entropy_bits": estimate(6.5), "distinct_2": None}
    row["judges"] = {"gpt": {"text": {"perplexity_b": estimate(49.0)}, "ids": None}}
    row["protocol"] = {"samples": {"model": {"sha256": digest}}}
    return row | fields


def test_figures_are_of_exactly_these_weights(tmp_path):
    bundle = _bundle()
    digest = bundle_lib.content_hash(bundle.params())
    rows = [
        _row("0123456789abcdef", steps=2),
        _row(digest),
        _row(None, kind="real", group="held-out <b>", steps=None, protocol={}),
    ]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    text = _card(tmp_path, bundle, report=tmp_path)
    assert "| this model | 8 | 1 | 49 (48 .. 50) | 6.5 (5.5 .. 7.5) | - | 4 |" in text
    assert "| held-out &lt;b&gt; |" in text
    assert text.count("| this model |") == 1
    assert f"| sha256 of the parameters | {digest} |" in text
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows[:1]}))
    fs.save_pretrained(bundle, tmp_path / "model", report=tmp_path, overwrite=True)
    text = (tmp_path / "model" / "README.md").read_text()
    assert "None were measured on these weights." in text
    assert "this model |" not in text


# ------------------------------------------------------------------------------- PyTorch
@pytest.mark.parametrize("name", [*NETWORKS, "both"])
def test_pytorch_has_the_logits(name, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from fsdfm_jax.convert import modeling_fsdfm

    both = NETWORKS["additive"] | NETWORKS["learned positions"] | NETWORKS["marked"]
    monkeypatch.setitem(NETWORKS, "both", both)
    bundle = _bundle(name)
    network = modeling_fsdfm.FSDFMModel(
        modeling_fsdfm.FSDFMConfig(model=dataclasses.asdict(bundle.model))
    ).eval()
    state = {k: torch.tensor(np.array(v)) for k, v in official.stream(bundle)}
    del state[official.BUFFER]
    network.load_state_dict(state)
    rng = np.random.default_rng(1)
    x_BL = rng.integers(0, 12, (4, LENGTH))
    t_B = np.array([0.0, 0.25, 0.999, 1.0], np.float32)
    h_B = np.array([1.0, 0.25, 0.001, 0.0], np.float32)
    times = () if bundle.model.causal else (t_B, h_B)
    given_BL = rng.random(x_BL.shape) < 0.5
    for frozen_BL in (None, given_BL):
        ours_BLV = fs.apply(bundle.params(), bundle.model, x_BL, *times, frozen_BL=frozen_BL)
        given = {"given": None if frozen_BL is None else torch.tensor(frozen_BL)}
        inputs = dict(zip("th", times, strict=False)) | given
        with torch.no_grad():
            theirs_BLV = network(torch.tensor(x_BL), **inputs).logits
        np.testing.assert_allclose(theirs_BLV.numpy(), ours_BLV, atol=1e-4, rtol=0)


def test_pytorch_refuses_what_it_was_not_trained_on():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from fsdfm_jax.convert import modeling_fsdfm

    model = dataclasses.asdict(_bundle("learned positions").model) | {"conditioning": "additive"}
    network = modeling_fsdfm.FSDFMModel(modeling_fsdfm.FSDFMConfig(model=model)).eval()
    x_BL = torch.zeros((2, LENGTH), dtype=torch.long)
    for given, message in (
        ({}, "needs the time t"),
        ({"t": 0.5}, "needs the step width h"),
        ({"t": torch.zeros(3), "h": 0.5}, r"one number per row, shape \(2,\), got \(3,\)"),
        ({"t": 0.5, "h": 0.5, "labels": x_BL}, "computes no loss"),
        ({"t": 0.5, "h": 0.5, "attention_mask": torch.zeros(2, LENGTH)}, "full blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            network(x_BL, **given)
    with pytest.raises(ValueError, match="6 positions, got a block of 7"):
        network(torch.zeros((1, 7), dtype=torch.long), t=0.5, h=0.5)
    assert network(x_BL, t=0.5, h=0.5, attention_mask=torch.ones(2, LENGTH)).logits.shape[-1] == 12


AUTO = """
import sys, numpy as np, torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
folder, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("My fellow citizens", add_special_tokens=False)["input_ids"]
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
x = torch.arange(64).reshape(2, 32)
with torch.no_grad():
    logits = model(x, t=torch.tensor([0.25, 0.5]), h=torch.tensor([0.5, 0.125])).logits
model.save_pretrained(out + "/again")
np.savez(out + "/found.npz", ids=ids, logits=logits.numpy(), eos=tokenizer.eos_token_id)
"""


def test_transformers_loads_the_bundled_model(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    bundle = fs.load()
    fs.save_pretrained(bundle, tmp_path / "model", dtype="bfloat16")
    (tmp_path / "code.py").write_text(AUTO)
    own = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "code.py"), str(tmp_path / "model"), str(tmp_path)],
        env=os.environ | own,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    assert "not used" not in done.stderr
    with np.load(tmp_path / "found.npz") as file:
        found = dict(file)
    assert found["ids"].tolist() == bundle.tokenizer.encode("My fellow citizens")
    assert found["eos"] == bundle.tokenizer.eos_id
    x_BL = np.arange(64).reshape(2, 32)
    t_B, h_B = np.array([0.25, 0.5], np.float32), np.array([0.5, 0.125], np.float32)
    logits_BLV = fs.apply(bundle.params(), bundle.model, x_BL, t_B, h_B)
    np.testing.assert_allclose(found["logits"], logits_BLV, atol=1e-4, rtol=0)
    # And back: what transformers saved has its config, and none of our metadata.
    again = fs.load(tmp_path / "again")
    _same(again, bundle)
    assert again.model == bundle.model
    assert again.sampling() == bundle.sampling()


# ------------------------------------------------------------------------------- names of the Hub
def test_a_name_of_the_hub_is_downloaded(tmp_path, monkeypatch):
    fs.save_pretrained(_bundle(), tmp_path / "model")
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(tmp_path / "model")

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    _same(fs.load("someone/some-model", revision="v1"), _bundle())
    ((name, options),) = asked
    assert name == "someone/some-model"
    assert options["revision"] == "v1"
    assert not any(pattern.endswith(".py") for pattern in options["allow_patterns"])
    # What is at hand comes first, and nothing else is asked for.
    monkeypatch.chdir(tmp_path.parent)
    fs.load(f"{tmp_path.name}/model")
    slip = f"{tmp_path.name}/absent"  # of a path: there is such a folder
    for path in (tmp_path / "absent", slip, "a/b/c", "./absent", pathlib.Path("a/b")):
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            fs.load(path)
    with pytest.raises(ValueError, match="revision='v1' needs a model on the Hub"):
        fs.load(tmp_path / "model", revision="v1")
    assert len(asked) == 1

    def refuse(name, **options):
        raise RuntimeError("401 Client Error\nmore")

    fake.snapshot_download = refuse
    with pytest.raises(OSError, match="no file or folder someone/x.*401 Client Error$"):
        fs.load("someone/x")


def test_without_huggingface_hub_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r'pip install "fsdfm_jax\[hub\]"') as error:
        fs.load("someone/some-model")
    assert "There is no file or folder someone/some-model" in str(error.value)
    assert "\n" not in str(error.value)
