"""All readers of user files: any damage gives one line with the file's name."""

import json

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from tokenizers import models

import fsdfm_jax as fs
from fsdfm_jax import io
from fsdfm_jax.convert import formats
from fsdfm_jax.convert.formats import Target
from fsdfm_jax.data import corpus as corpus_lib
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference import prompts
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.training import pipeline

BPE = tokenizer_lib.train_bpe(["we the people of the united states"], 270)
MODEL = ModelConfig(BPE.vocab_size, 16, 1, 2, 8, mlp_ratio=1, conditioning="official")


def _model():
    params = jax.tree.map(np.asarray, fs.init_params(jax.random.key(0), MODEL))
    return bundle_lib.from_params(params, MODEL, tokenizer=BPE, block_length=6)


def _open(path):
    return formats.open_bundle(path).params()


def _write_model(path, **options):
    formats.write(_model(), Target(path, **options))


def _write_npz(path):
    from fsdfm_jax.convert import official

    bundle = _model()
    np.savez(path, **official.to_state_dict(bundle.params(), MODEL))


def _write_folder(path):
    _write_model(path.parent, to="safetensors")


def _write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["we the people"] * 9}), path)


TEXT = lambda content: lambda path: path.write_text(content)
DOCUMENTS = lambda path: list(corpus_lib.documents(str(path)))
# Kind of file -> (its name, what makes a good one, what reads it).
READERS = {
    "json": ("a.json", TEXT('{"a": 1}'), io.read_object),
    "jsonl": ("a.jsonl", TEXT('{"a": 1}\n'), io.read_jsonl),
    "config": ("config.json", TEXT("{}"), lambda path: pipeline.load_config(path.parent)),
    "manifest": ("manifest.json", TEXT("{}"), lambda path: prepared_lib.load(path.parent)),
    "tokenizer": ("tokenizer.json", BPE.save, tokenizer_lib.load),
    "text": ("a.txt", TEXT("we the people"), DOCUMENTS),
    "records": ("a.jsonl", TEXT('{"text": "we"}\n{"text": "the people"}\n'), DOCUMENTS),
    "parquet": ("a.parquet", _write_parquet, DOCUMENTS),
    "prompts": (
        "p.jsonl",
        TEXT('{"prompt": "we"}\n'),
        lambda path: prompts.read_requests(path, BPE, 8),
    ),
    "pth": ("m.pth", _write_model, _open),
    "npz": ("m.npz", _write_npz, _open),
    "safetensors": ("m.safetensors", _write_model, _open),
    "description": ("f/config.json", _write_folder, lambda path: _open(path.parent)),
    "tokenizer of a folder": (
        "f/tokenizer.json",
        _write_folder,
        lambda path: _open(path.parent),
    ),
}
BINARY = ("parquet", "pth", "npz", "safetensors")
DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeroed": lambda content: bytes(len(content)),
    "not UTF-8": lambda content: b'{"text": "\xff\xfe"}\n',
    "UTF-16": lambda content: '{"text": "we"}\n'.encode("utf-16"),
    "nested": lambda content: b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
    "digits": lambda content: b'{"text": ' + b"9" * 4301 + b"}\n",
    "an empty object": lambda content: b"{}\n",
    "a list": lambda content: b"[1]\n",
    "null": lambda content: b"null\n",
}
# What isn't a fault of that kind of file.
FINE = {
    *(("text", damage) for damage in DAMAGES if damage not in ("not UTF-8", "UTF-16", "empty")),
    *(
        ("jsonl", damage)
        for damage in ("empty", "an empty object", "a list", "null", "cut", "zeroed")
    ),
    ("json", "an empty object"),
    # A folder's config.json is ours to read only where the weights say nothing of themselves.
    ("description", "an empty object"),
    ("tokenizer of a folder", "empty"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """{kind: the folder that holds a good file}, made once."""
    folders = {}
    for kind, (name, make, _) in READERS.items():
        folders[kind] = tmp_path_factory.mktemp(kind.replace(" ", "_"))
        path = folders[kind] / name
        if "/" not in name:
            path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
    return folders


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_named(good, kind, damage):
    name, _, read = READERS[kind]
    path = good[kind] / name
    whole = path.read_bytes()
    try:
        path.write_bytes(DAMAGES[damage](whole))
        if (kind, damage) in FINE:
            read(path)
            return
        with pytest.raises((ValueError, OSError)) as error:
            read(path)
    finally:
        path.write_bytes(whole)
    said = str(error.value)
    assert str(good[kind]) in said
    assert len(said) < 600
    assert len(said.splitlines()) == 1, said


def test_a_tokenizer_without_unknown_token_names_the_word(tmp_path):
    made = tokenizers.Tokenizer(models.WordLevel({"<|endoftext|>": 0, "we": 1}))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer_lib.load(tmp_path)
    for encode in (loaded.encode, lambda text: loaded.encode_batch([text])):
        with pytest.raises(ValueError, match="'people' is not in the vocabulary"):
            encode("we people")


def test_depth_is_told_by_its_line(tmp_path):
    path = tmp_path / "deep.jsonl"
    deep = "[" * 100_000 + "]" * 100_000
    path.write_text(json.dumps({"text": "fine"}) + '\n{"text": "x", "more": ' + deep + "}\n")
    with pytest.raises(ValueError, match=r"deep\.jsonl:2 isn't valid JSON: .*nested"):
        list(corpus_lib.documents(str(path)))
