"""Tokenizers: known GPT-2 ids, lossless text, special tokens as plain text, errors."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from fsdfm_jax.data import tokenizer as tokenizer_lib

TEXTS = [f"Line {i}: the people of the union, 100% naïve — 日本 {i * i}\n\n" for i in range(40)]


@pytest.fixture(scope="module")
def gpt2():
    return tokenizer_lib.load("gpt2")


@pytest.fixture(scope="module")
def bpe():
    return tokenizer_lib.train_bpe(TEXTS, 300)


def test_gpt2_known_ids(gpt2):
    assert gpt2.vocab_size == tokenizer_lib.SIZES["gpt2"] == 50257
    assert gpt2.eos_id == 50256
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" Hello world") == [18435, 995]
    assert gpt2.encode("") == []
    assert gpt2.decode([15496, 995]) == "Hello world"


def test_gpt2_refuses_files_with_other_hashes(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "encoder.json").write_text("{}")
    (tmp_path / "data" / "vocab.bpe").write_text("")
    monkeypatch.setattr(tokenizer_lib, "package_folder", lambda name, remedy: tmp_path)
    with pytest.raises(ValueError, match=r"is not GPT-2's encoder\.json: expected sha256 1961"):
        tokenizer_lib.load("gpt2")


def test_bpe_has_the_size_asked_for_and_loses_nothing(bpe):
    assert bpe.vocab_size == 300
    assert bpe.eos_id == 0
    for text in [*TEXTS, "never seen: Ωß\t\x00 \U0001f600"]:
        ids = bpe.encode(text)
        assert all(0 < i < 300 for i in ids)
        assert bpe.decode(ids) == text
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode())  # merges were learnt


def test_training_is_deterministic(bpe):
    again = tokenizer_lib.train_bpe(iter(TEXTS), 300)
    assert again.fingerprint == bpe.fingerprint
    assert tokenizer_lib.train_bpe(TEXTS, 299).fingerprint != bpe.fingerprint


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_special_tokens_in_text_are_text(name, request):
    tokenizer = request.getfixturevalue(name)
    text = "one<|endoftext|>two"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "", "b"]) == [ids, [], tokenizer.encode("b")]


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_offsets_are_those_of_characters(name, request):
    tokenizer = request.getfixturevalue(name)
    texts = ["Line: the people", "", "a 日 <|endoftext|>naïve\n\n"]
    pairs = tokenizer.encode_with_offsets(texts)
    assert [ids for ids, _ in pairs] == tokenizer.encode_batch(texts)
    for text, (ids, offsets) in zip(texts, pairs, strict=True):
        assert len(ids) == len(offsets)
        for token, (start, end) in zip(ids, offsets, strict=True):
            part = tokenizer.decode([token])
            assert text[start:end] == part or "\ufffd" in part
    ids, offsets = pairs[2]
    sign = [ids[i] for i, (start, end) in enumerate(offsets) if start <= 2 < end]
    assert tokenizer.decode(sign).strip() == "日"  # its tokens all have its place
    assert len(sign) > 1


def test_bytes_of_tokens(gpt2, bpe):
    for tokenizer in (gpt2, bpe):
        for text in [*TEXTS[:3], "never seen: Ωß\t\x00 \U0001f600\xad\x7f"]:
            ids = tokenizer.encode(text)
            assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
            sizes = tokenizer.num_bytes(ids)
            assert sizes.sum() == len(text.encode())
            np.testing.assert_array_equal(sizes, [len(tokenizer.token_bytes[i]) for i in ids])
        assert tokenizer.num_bytes([tokenizer.eos_id]).tolist() == [0]
        single = sorted(part for part in tokenizer.token_bytes if len(part) == 1)
        assert single == [bytes([i]) for i in range(256)]
    # A byte that is no character by itself is one byte, not the three of U+FFFD.
    (wrong,) = [i for i, part in enumerate(bpe.token_bytes) if part == b"\xe6"]
    assert bpe.decode([wrong]) == "\ufffd"
    sizes = bpe.num_bytes(np.full((2, 3), wrong))
    np.testing.assert_array_equal(sizes, np.ones((2, 3)))
    assert sizes.dtype == np.int64


def test_tokens_that_were_added_as_text(bpe):
    backend = tokenizers.Tokenizer.from_str(bpe.to_json())
    backend.add_tokens(["a 日"])
    tokenizer = tokenizer_lib.Tokenizer(backend)
    ids = tokenizer.encode("x a 日 y")
    assert ids.count(300) == 1
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == "x a 日 y".encode()
    assert tokenizer.decode(ids) == "x a 日 y"


def test_bytes_of_a_vocabulary_of_words():
    tokenizer = tokenizer_lib.Tokenizer(_word_level({"[UNK]": 0, "a": 1, "日b": 2, "</s>": 5}))
    assert tokenizer.token_bytes is None
    np.testing.assert_array_equal(tokenizer.num_bytes([1, 2, 5, 4]), [1, 4, 0, 0])


def test_vocabulary_names_each_id(gpt2, bpe):
    for tokenizer in (gpt2, bpe):
        assert sorted(tokenizer.vocabulary.values()) == list(range(tokenizer.vocab_size))
        assert tokenizer.vocabulary["<|endoftext|>"] == tokenizer.eos_id
    assert gpt2.vocabulary["Hello"] == 15496


def test_decode_leaves_out_end_of_text(gpt2):
    assert gpt2.decode([15496, gpt2.eos_id, 995]) == "Hello world"


@pytest.mark.parametrize("wrong", [-1, 300])
def test_decode_refuses_ids_outside_the_vocabulary(bpe, wrong):
    with pytest.raises(ValueError, match=rf"expected token ids in \[0, 300\), got {wrong}"):
        bpe.decode([5, wrong])


def test_save_and_load(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for spec in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        loaded = tokenizer_lib.load(spec)
        assert loaded.fingerprint == bpe.fingerprint
        assert (loaded.vocab_size, loaded.eos_id) == (300, 0)
        assert loaded.encode("a<|endoftext|>b") == bpe.encode("a<|endoftext|>b")


def test_load_from_a_package(bpe, tmp_path, monkeypatch):
    (tmp_path / "somepackage" / "files").mkdir(parents=True)
    (tmp_path / "somepackage" / "__init__.py").write_text("raise RuntimeError('imported')")
    bpe.save(tmp_path / "somepackage" / "files" / "tokenizer.json")
    monkeypatch.syspath_prepend(tmp_path)
    loaded = tokenizer_lib.load("package:somepackage/files/tokenizer.json")
    assert loaded.fingerprint == bpe.fingerprint


def _word_level(words):
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def test_a_foreign_tokenizer_is_made_safe(tmp_path):
    """One that is cut at 2 tokens, and whose end-of-text token is not marked as special."""
    backend = _word_level({"[UNK]": 0, "a": 1, "</s>": 2, "gap": 7})
    backend.add_tokens([tokenizers.AddedToken("</s>", special=False)])
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_lib.load(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (2, 8)
    assert tokenizer.encode("a a a a") == [1, 1, 1, 1]
    assert 2 not in tokenizer.encode("a </s> a")


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="at least 257"):
        tokenizer_lib.train_bpe(TEXTS, 256)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        tokenizer_lib.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="'no_such_package' is not installed"):
        tokenizer_lib.load("package:no_such_package/tokenizer.json")
    with pytest.raises(ValueError, match="nothing to load"):
        tokenizer_lib.load("bpe")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        tokenizer_lib.load(path)
    _word_level({"[UNK]": 0, "a": 1}).save(str(path))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokenizer has no end-of-text"):
        tokenizer_lib.load(path)
