"""Missing, duplicate, empty or lost parts of a corpus: reported, counted or rejected."""

import pathlib

import pytest
import tokenizers
from tokenizers import models

from fsdfm_jax.data import corpus as corpus_lib
from fsdfm_jax.data import packing
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data import tokenizer as tokenizer_lib

SENTENCE = "we the people of the united states, number {} of many; "


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(SENTENCE.format(i) * 3)
    return folder


def _spec(corpus, **changes):
    values = {"text_field": "text", "tokenizer": "bpe", "vocab_size": 280, "block_length": 8}
    return prepared_lib.DataSpec(corpus=str(corpus), **values | {"holdout": 0.3} | changes)


def _prepare(tmp_path, corpus, **changes):
    return prepared_lib.prepare(_spec(corpus, **changes), tmp_path / "data")


def _bpe(path, vocabulary, merges=(), **options):
    vocabulary = {piece: i for i, piece in enumerate(["<|endoftext|>", *vocabulary])}
    tokenizers.Tokenizer(models.BPE(vocabulary, list(merges), **options)).save(str(path))
    return path


# ------------------------------------------------------------------------------------------- files
def test_links_to_nothing_are_counted_and_named(texts):
    for i in (3, 7):
        (texts / f"{i:02}.txt").unlink()
        (texts / f"{i:02}.txt").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=r"2 of the 40 names .* broken links: .*03\.txt"):
        corpus_lib.files(f"{texts}/*.txt")


def test_a_file_of_several_names_is_read_once(texts, monkeypatch):
    monkeypatch.chdir(texts.parent)
    (texts / "link.txt").symlink_to("00.txt")
    found = corpus_lib.files(f"texts/*.txt,{texts}/0*.txt,./texts/00.txt")
    assert len(found) == 40
    assert len({path.resolve() for path in found}) == 40


def test_files_for_validation_are_not_trained_on(tmp_path, texts):
    for i in range(4):
        (texts / f"validation-{i}.txt").write_text(f"held out number {i} " * 9)
    data = _prepare(tmp_path, f"{texts}/*.txt", validation=f"{texts}/validation-*", holdout=0.0)
    assert data.manifest["splits"]["train"]["documents"] == 40
    assert data.manifest["splits"]["validation"]["documents"] == 4
    with pytest.raises(ValueError, match=r"the same 4 file\(s\); nothing is left for training"):
        corpus_lib.files(f"{texts}/validation-*", without=f"{texts}/*.txt")


def test_texts_in_both_splits_are_counted(tmp_path, texts):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(4):
        (other / f"{i}.txt").write_text((texts / f"{i:02}.txt").read_text())
    data = _prepare(tmp_path, f"{texts}/*.txt", validation=f"{other}/*.txt", holdout=0.0)
    assert data.manifest["read"]["documents_in_both"] == 4


def test_documents_without_text_are_counted_and_named(tmp_path, texts, caplog):
    for i in range(5):
        (texts / f"empty-{i}.txt").write_text(" \n" * i)
    data = _prepare(tmp_path, f"{texts}/*.txt")
    assert data.manifest["read"]["blank_documents"] == 5
    assert "Skipped 5 document(s) without text: " in caplog.text
    assert "empty-0.txt" in caplog.text
    assert "and 2 more" in caplog.text


def test_what_was_read_does_not_change_the_fingerprint(tmp_path, texts):
    plain = _prepare(tmp_path, f"{texts}/*.txt")
    (texts / "empty.txt").write_text("")
    again = prepared_lib.prepare(_spec(f"{texts}/*.txt"), tmp_path / "again")
    assert again.manifest["read"] != plain.manifest["read"]
    assert again.fingerprint == plain.fingerprint


# ----------------------------------------------------------------------------- one long, one small
def test_the_end_of_one_long_text_is_held_out(tmp_path, caplog):
    text = SENTENCE.format(1) * 200
    (tmp_path / "novel.txt").write_text(text)
    data = _prepare(tmp_path, tmp_path / "novel.txt", holdout=0.1)
    assert "too few documents to hold out whole ones; holding out the last 0.1" in caplog.text
    tokens = {split: counts["tokens"] for split, counts in data.manifest["splits"].items()}
    assert 0.08 < tokens["validation"] / sum(tokens.values()) < 0.12
    document = corpus_lib.Document("novel", text)
    head, tail = corpus_lib.cut_end(document, 0.1)
    assert head.text + tail.text == text.rstrip()
    assert head.text.endswith(" ")


def test_a_small_text_gets_a_small_vocabulary(tmp_path, texts, caplog):
    data = _prepare(tmp_path, f"{texts}/*.txt", vocab_size=20_000)
    assert 256 < data.tokenizer.vocab_size < 1000
    assert "too small for a BPE of data.vocab_size=20000 tokens; it gets" in caplog.text
    assert data.tokenizer.decode(data.tokenizer.encode("Ünïcode!")) == "Ünïcode!"


# --------------------------------------------------------------------------------------- tokenizers
def test_a_tokenizer_that_drops_letters_is_refused(tmp_path, texts):
    path = _bpe(tmp_path / "tokenizer.json", "we thpol")
    with pytest.raises(ValueError, match=r"loses \d\d\.\d% of the text's \d+ characters"):
        _prepare(tmp_path, f"{texts}/*.txt", tokenizer=str(path))
    assert not (tmp_path / "data").exists()


def test_a_few_lost_letters_are_in_the_manifest(tmp_path, texts):
    letters = sorted(set("".join(path.read_text() for path in texts.iterdir())) - {";"})
    path = _bpe(tmp_path / "tokenizer.json", letters)
    data = _prepare(tmp_path, f"{texts}/*.txt", tokenizer=str(path))
    whole = SENTENCE.format(10)
    assert data.manifest["read"]["lost_share"] == pytest.approx(1 / len(whole), rel=0.05)


@pytest.mark.parametrize("text", ["plain", "Ünïcode", "a  b\n\tc", "漢字 🙂"])
def test_byte_level_tokenizers_lose_nothing(text):
    made = tokenizer_lib.train_bpe(["the united states"], 300)
    assert made.lost([text], [made.encode(text)]) == 0


def test_dropout_of_a_tokenizer_is_off(tmp_path, caplog):
    path = _bpe(tmp_path / "t.json", ["w", "e", " ", "we"], [("w", "e")], dropout=0.5)
    loaded = tokenizer_lib.load(path)
    assert "BPE dropout of 0.5" in caplog.text
    assert {tuple(loaded.encode("we we we we")) for _ in range(8)} == {
        tuple(loaded.encode("we we we we"))
    }
    assert len(loaded.encode("we we we we")) == 7


def test_the_bound_on_what_is_lost():
    assert packing.check_lost(0, 0) == 0.0
    assert packing.check_lost(100, 5) == 0.05
    with pytest.raises(ValueError, match=r"loses 6\.0%"):
        packing.check_lost(100, 6)


# ------------------------------------------------------------------------------------------- places
@pytest.mark.parametrize("name", ["a [1]", "a\\b", "x?y", "é", "a b"])
def test_folders_of_odd_names_work(tmp_path, texts, name):
    data = prepared_lib.prepare(_spec(f"{texts}/*.txt"), tmp_path / name / "data")
    assert len(data.source("train")) == data.num_blocks("train")


def test_a_folder_that_is_a_pattern_is_refused_at_once(tmp_path, texts):
    with pytest.raises(ValueError, match=r"treats '\*\*' in a path as a pattern"):
        prepared_lib.prepare(_spec(f"{texts}/*.txt"), tmp_path / "a**b" / "data")
    assert pathlib.Path(tmp_path, "a**b").exists() is False
