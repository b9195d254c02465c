"""Prepared folders and batches: packing, atomicity, purity, threads, errors."""

import dataclasses
import itertools
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from configs import base
from fsdfm_jax.data import corpus as corpus_lib
from fsdfm_jax.data import packing
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data import tokenizer as tokenizer_lib

LENGTH = 16


def _write_corpus(folder, documents=60):
    folder.mkdir()
    words = ["we", "the", "people", "of", "a", "more", "perfect", "union", "secure", "liberty"]
    rng = random.Random(0)
    for i in range(documents):
        text = " ".join(rng.choices(words, k=rng.randint(1, 60)))
        (folder / f"{i:03}.txt").write_text(f"{text} {i}.\n")
    return f"{folder}/*.txt"


def _spec(corpus, **changes):
    spec = prepared_lib.DataSpec(
        corpus=corpus,
        text_field="text",
        tokenizer="bpe",
        vocab_size=280,
        block_length=LENGTH,
        holdout=0.2,
    )
    return dataclasses.replace(spec, **changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return _write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def prepared(corpus, tmp_path_factory):
    return prepared_lib.prepare(_spec(corpus), tmp_path_factory.mktemp("prepared") / "data")


def _rows(blocks):
    return sorted(tuple(int(i) for i in block) for block in blocks)


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


# Packing.


def test_packing_equals_a_literal_reimplementation(corpus, prepared):
    for split in prepared_lib.SPLITS:
        stream, count = [], 0
        for document in corpus_lib.documents(corpus):
            if corpus_lib.is_held_out(document, 0.2) == (split == "validation"):
                stream += [*prepared.tokenizer.encode(document.text), prepared.tokenizer.eos_id]
                count += 1
        expected = [stream[i : i + LENGTH] for i in range(0, len(stream) - LENGTH + 1, LENGTH)]
        source = prepared.source(split)
        assert _rows(source[i] for i in range(len(source))) == _rows(expected)
        assert source[0].dtype == np.int32
        facts = prepared.manifest["splits"][split]
        assert facts["documents"] == count > 0
        assert facts["tokens"] == len(stream)
        assert facts["blocks"] == prepared.num_blocks(split) == len(source) == len(expected)
        assert facts["dropped_tokens"] == len(stream) % LENGTH
        assert stream.count(prepared.tokenizer.eos_id) == count


def test_packing_does_not_depend_on_how_documents_are_grouped(corpus, prepared, monkeypatch):
    def pack():
        packer = packing.Packer(prepared.tokenizer, LENGTH)
        return np.stack(list(packer.blocks(corpus_lib.documents(corpus)))), packer.counts

    blocks, counts = pack()
    for limit, value in [("_BATCH_DOCUMENTS", 1), ("_BATCH_CHARACTERS", 500)]:
        with monkeypatch.context() as patch:
            patch.setattr(packing, limit, value)
            np.testing.assert_array_equal(pack()[0], blocks)
            assert pack()[1] == counts


def test_packing_streams(prepared):
    """Blocks come out before an endless corpus ends."""
    endless = (corpus_lib.Document(str(i), "we the people") for i in itertools.count())
    blocks = packing.Packer(prepared.tokenizer, LENGTH).blocks(endless)
    assert len(list(itertools.islice(blocks, 10))) == 10


def test_no_document_is_in_both_splits(tmp_path):
    """Each document is a different word, except one text that occurs many times."""
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": f"<{i % 50:03}>" * 9}) + "\n" for i in range(200))
    )
    data = prepared_lib.prepare(_spec(f"{tmp_path}/x.jsonl", vocab_size=257), tmp_path / "data")
    seen = {}
    for split in prepared_lib.SPLITS:
        source = data.source(split)
        texts = [data.tokenizer.decode(source[i]) for i in range(len(source))]
        seen[split] = {i for i in range(50) if any(f"<{i:03}>" in text for text in texts)}
    assert seen["train"]
    assert seen["validation"]
    assert not seen["train"] & seen["validation"]


# The prepared folder.


def test_prepared_folder(corpus, prepared):
    assert _names(prepared.directory) == ["manifest.json", "packed_text", "tokenizer.json"]
    assert _names(prepared.directory.parent) == ["data"]
    assert prepared.block_length == LENGTH
    assert prepared.tokenizer.vocab_size == 280
    reopened = prepared_lib.load(prepared.directory)
    assert reopened.fingerprint == prepared.fingerprint
    assert reopened.manifest == prepared.manifest


def test_the_tokenizer_learns_from_training_documents_only(corpus, prepared):
    texts = [d.text for d in corpus_lib.documents(corpus) if not corpus_lib.is_held_out(d, 0.2)]
    assert tokenizer_lib.train_bpe(texts, 280).fingerprint == prepared.tokenizer.fingerprint


def test_prepare_again_reuses_or_refuses(corpus, prepared, monkeypatch):
    def fail(*args):
        raise RuntimeError("built again")

    monkeypatch.setattr(prepared_lib, "_build", fail)
    again = prepared_lib.prepare(_spec(corpus), prepared.directory)
    assert again.fingerprint == prepared.fingerprint
    other = _spec(corpus, block_length=8, holdout=0.3)
    message = r"data\.block_length is 8, but the folder has 16, data\.holdout is 0\.3, .*; set data"
    with pytest.raises(ValueError, match=message):
        prepared_lib.prepare(other, prepared.directory)


def test_prepare_refuses_a_folder_with_other_things(corpus, tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(ValueError, match="exists but is not prepared data"):
        prepared_lib.prepare(_spec(corpus), tmp_path)
    assert _names(tmp_path) == ["precious"]


def test_fingerprint(corpus, prepared, tmp_path):
    def fingerprint(name, spec):
        return prepared_lib.prepare(spec, tmp_path / name).fingerprint

    assert fingerprint("same", _spec(corpus)) == prepared.fingerprint
    assert fingerprint("length", _spec(corpus, block_length=8)) != prepared.fingerprint
    # The same tokens, of another spec.
    assert fingerprint("field", _spec(corpus, text_field="body")) != prepared.fingerprint
    # One letter of one training document, with a tokenizer of bare bytes: no count changes.
    own = _spec(_write_corpus(tmp_path / "texts"), vocab_size=257)
    before = prepared_lib.prepare(own, tmp_path / "before")
    for path in sorted((tmp_path / "texts").iterdir()):
        text = path.read_text()
        versions = [corpus_lib.Document("", text), corpus_lib.Document("", "z" + text[1:])]
        if not any(corpus_lib.is_held_out(version, 0.2) for version in versions):
            path.write_text(versions[1].text)
            break
    after = prepared_lib.prepare(own, tmp_path / "after")
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert after.num_blocks("train") == before.num_blocks("train")
    assert after.fingerprint != before.fingerprint


def test_a_failed_or_killed_build_leaves_nothing(corpus, tmp_path, monkeypatch):
    target = tmp_path / "data"
    whole = corpus_lib.documents

    def interrupted(*args, **options):
        yield from itertools.islice(whole(*args, **options), 40)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_lib, "documents", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepared_lib.prepare(_spec(corpus, tokenizer="gpt2"), target)
    assert _names(tmp_path) == []
    # SIGKILL runs no clean-up: the half-made folder stays until the next call.
    with monkeypatch.context() as patch:
        patch.setattr(prepared_lib.shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(prepared_lib.os, "rename", _killed)
        with pytest.raises(SystemExit):
            prepared_lib.prepare(_spec(corpus), target)
    assert _names(tmp_path) == [".data.partial"]
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        prepared_lib.load(target)
    (tmp_path / ".data.partial" / "debris").write_text("")
    target.mkdir()  # an empty folder is taken
    data = prepared_lib.prepare(_spec(corpus), target)
    assert _names(tmp_path) == ["data"]
    assert _names(target) == ["manifest.json", "packed_text", "tokenizer.json"]
    assert len(data.source("train")) == data.num_blocks("train")


def _killed(*args):
    raise SystemExit


def test_damaged_folders(corpus, tmp_path):
    data = prepared_lib.prepare(_spec(corpus), tmp_path / "data")
    with pytest.raises(ValueError, match="expected one of the splits train, validation"):
        data.source("test")
    data.manifest["splits"]["train"]["blocks"] += 1
    with pytest.raises(ValueError, match=r"is damaged: expected \d+ blocks in its train split"):
        data.source("train")
    path = tmp_path / "data" / "manifest.json"
    manifest = path.read_text()
    path.write_text(manifest.replace('"format": 1', '"format": 99'))
    message = r"has format 99 \(dataset\), expected 1 \(dataset\), .*; remove the folder"
    with pytest.raises(ValueError, match=message):
        prepared_lib.load(tmp_path / "data")
    path.write_text(manifest[: len(manifest) // 2])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        prepared_lib.load(tmp_path / "data")
    path.write_text(manifest)
    tokenizer_lib.train_bpe(["other text " * 9], 260).save(tmp_path / "data" / "tokenizer.json")
    with pytest.raises(ValueError, match="is not the tokenizer of this data"):
        prepared_lib.load(tmp_path / "data")


def test_files_are_checked_when_opened_read_and_verified(corpus, tmp_path):
    data = prepared_lib.prepare(_spec(corpus), tmp_path / "data")
    assert {file.split for file in data.files} == set(prepared_lib.SPLITS)
    assert sum(file.blocks for file in data.files if file.split == "train") == len(
        data.source("train")
    )
    assert data.verify() == len(data.files) == 2
    shard = next(data.directory.rglob("*train.array_record*"))
    whole = shard.read_bytes()
    source = data.source("train")
    shard.write_bytes(whole[:8000] + bytes(len(whole) - 8000))  # the size stays
    prepared_lib.load(data.directory)
    with pytest.raises(
        ValueError, match=rf"{shard.name} has sha256 \w+ instead of \w+; restore the"
    ):
        data.verify()
    with pytest.raises(ValueError, match=rf"{shard.name} cannot be read \("):
        _ = [source[index] for index in range(len(source))]
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{shard.name} has \d+ bytes instead of {len(whole)}"):
        prepared_lib.load(data.directory)
    source = data.source("train")
    shard.unlink()
    with pytest.raises(ValueError, match=rf"is damaged: \S*{shard.name} is missing"):
        prepared_lib.load(data.directory)
    with pytest.raises(
        FileNotFoundError, match=rf"{shard.name} has disappeared; restore the files"
    ):
        _ = source[0]


def test_folders_of_older_versions_open_but_cannot_be_verified(corpus, prepared, tmp_path):
    """Format 1 had no list of files, and specs had six keys."""
    shutil.copytree(prepared.directory, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]
    assert set(manifest["spec"]) == {
        *("corpus", "text_field", "tokenizer", "vocab_size", "block_length", "holdout")
    }
    del manifest["read"]
    assert manifest.keys() == {"format", "spec", "tokenizer", "splits", "fingerprint"}
    path.write_text(json.dumps(manifest))
    data = prepared_lib.prepare(_spec(corpus), tmp_path / "data")
    assert data.fingerprint == prepared.fingerprint
    assert len(data.source("train")) == data.num_blocks("train")
    with pytest.raises(ValueError, match="without checksums; prepare it again"):
        data.verify()


def test_a_changed_manifest_is_noticed(prepared, tmp_path):
    shutil.copytree(prepared.directory, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    path.write_text(path.read_text().replace('"holdout": 0.2', '"holdout": 0.3'))
    with pytest.raises(ValueError, match="damaged \\(its fingerprint is wrong"):
        prepared_lib.load(tmp_path / "data")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_length": 0}, "data.block_length must be at least 1"),
        ({"documents": "page"}, "data.documents must be one of record, wikitext, got 'page'"),
        ({"holdout": 0.0}, "data.holdout must be between 0 and 1"),
        ({"block_length": 5000}, "the validation split has no full block of 5000 tokens: its 1"),
        (
            {"holdout": 1e-9},
            r"none of the corpus's 60 document\(s\) is in the validation split",
        ),
        ({"tokenizer": "nowhere"}, "no tokenizer at nowhere"),
    ],
)
def test_errors_of_a_spec(corpus, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepared_lib.prepare(_spec(corpus, **changes), tmp_path / "data")
    assert _names(tmp_path) == []


def test_errors_of_the_corpus_come_through_tokenizer_training(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n{"body": ""}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2 has no field 'text'"):
        prepared_lib.prepare(_spec(f"{tmp_path}/x.jsonl"), tmp_path / "data")


def test_spec_from_config():
    config = base.get_config()
    assert prepared_lib.DataSpec.from_config(config.data) == prepared_lib.DataSpec(
        corpus="sotu",
        text_field="text",
        tokenizer="bpe",
        vocab_size=1024,
        block_length=128,
        holdout=0.05,
    )
    config.data.tokenizer = "gpt2"
    assert prepared_lib.DataSpec.from_config(config.data).vocab_size == 0


def test_no_network_no_noise(corpus, tmp_path, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise RuntimeError("network access")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    data = prepared_lib.prepare(_spec(corpus), tmp_path / "data")
    assert len(data.source("train")[0]) == LENGTH
    assert capfd.readouterr() == ("", "")


def test_program_reads_without_tensorflow(corpus, tmp_path):
    """In a new process: run the command, then read its output."""
    arguments = [
        "--config=configs/base.py",
        f"--directory={tmp_path}/data",
        f"--config.data.corpus={corpus}",
        "--config.data.vocab_size=280",
        "--config.data.holdout=0.3",
        "--config.data.block_length=16",
    ]
    code = f"""
import sys
from absl import app
from launch import prepare_data
sys.argv = ["prepare_data", *{arguments!r}]
try:
    app.run(prepare_data.main)
except SystemExit as end:
    assert not end.code, end.code
from fsdfm_jax.data import prepared as data
next(data.Batches(data.load("{tmp_path}/data").source("train"), batch_size=4, seed=0).iterate())
for name in ("tensorflow", "pandas", "apache_beam"):
    assert name not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "validation: " in done.stdout
    assert "blocks of 16, " in done.stdout
    assert done.stderr == ""
    check = [
        sys.executable,
        "-m",
        "launch.prepare_data",
        "--verify",
        f"--directory={tmp_path}/data",
    ]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"verified {tmp_path}/data: the checksums of 2 files match\n")
    shard = next((tmp_path / "data").rglob("*train.array_record*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/data is damaged: packed_text/")
    assert done.stderr.count("\n") == 1


def test_importing_data_opens_nothing():
    code = (
        "import sys, fsdfm_jax.data\n"
        "assert not {'grain', 'tensorflow_datasets', 'pyarrow', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# Batches.

NUMBERS = np.repeat(np.arange(10, dtype=np.int32)[:, None], 3, axis=1)  # block i holds i, i, i


def _batches(**changes):
    return prepared_lib.Batches(NUMBERS, **({"batch_size": 4, "seed": 0} | changes))


def _order(batches, start, stop):
    return np.concatenate([batches.batch_at(step)[:, 0] for step in range(start, stop)])


def test_batches_shape_and_purity():
    batches = _batches()
    late = batches.batch_at(1_000_003)
    assert late.shape == (4, 3)
    assert late.dtype == np.int32
    for step in (7, 3, 7):
        np.testing.assert_array_equal(_batches().batch_at(step), batches.batch_at(step))
    np.testing.assert_array_equal(_batches().batch_at(1_000_003), late)


def test_each_epoch_has_every_block_once_in_an_order_of_its_own():
    # 5 steps of 4 are 2 epochs of 10: the third step straddles them.
    epochs = _order(_batches(), 0, 50).reshape(20, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (20, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 20
    assert not any((epoch == np.arange(10)).all() for epoch in epochs)


def test_seeds_differ_and_are_not_shifted_epochs():
    zero, one = (_order(_batches(seed=seed), 0, 50).reshape(20, 10) for seed in (0, 1))
    assert not {tuple(epoch) for epoch in zero} & {tuple(epoch) for epoch in one}


def test_a_batch_may_be_larger_than_the_source():
    batch = _batches(batch_size=25).batch_at(0)[:, 0]
    np.testing.assert_array_equal(np.sort(batch[:20]), np.repeat(np.arange(10), 2))


@pytest.mark.parametrize("start", [0, 3, 12345])
def test_iterate_equals_batch_at_from_any_start(prepared, start):
    batches = prepared_lib.Batches(prepared.source("train"), batch_size=5, seed=3)
    with_threads = batches.iterate(start)
    for step in range(start, start + 30):
        np.testing.assert_array_equal(next(with_threads), batches.batch_at(step))
    with_threads.close()


def _reading_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


@pytest.mark.parametrize("end", ["close", "drop"])
def test_iterate_ends_its_threads(end):
    iterator = _batches().iterate()
    next(iterator)
    assert _reading_threads()
    if end == "close":
        iterator.close()
    del iterator
    deadline = time.monotonic() + 10
    while _reading_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _reading_threads()


def test_errors_while_reading_ahead_reach_the_reader():
    class Torn:
        def __len__(self):
            return 10

        def __getitem__(self, index):
            if index == 7:
                raise OSError("torn record")
            return NUMBERS[index]

    batches = prepared_lib.Batches(Torn(), batch_size=1, seed=1)
    with pytest.raises(OSError, match="torn record"):
        list(itertools.islice(batches.iterate(), 10))


def test_rows_are_those_of_the_whole_batch():
    whole = _batches().batch_at(6)
    np.testing.assert_array_equal(_batches(rows=range(1, 3)).batch_at(6), whole[1:3])
    np.testing.assert_array_equal(next(_batches(rows=[3, 0]).iterate(6)), whole[[3, 0]])


def test_only_the_own_rows_are_read():
    class Counted:
        read = 0

        def __len__(self):
            return len(NUMBERS)

        def __getitem__(self, index):
            self.read += 1
            return NUMBERS[index]

    source = Counted()
    batches = prepared_lib.Batches(source, batch_size=8, seed=0, rows=np.array([1, 6]))
    source.read = 0
    assert batches.batch_at(3).shape == (2, 3)
    assert source.read == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _batches(batch_size=0), "positive batch size"),
        (lambda: prepared_lib.Batches(NUMBERS[:0], batch_size=1, seed=0), "at least one block"),
        (lambda: _batches(seed=-1), r"must be in \[0, 2\*\*32\), got -1"),
        (
            lambda: _batches(rows=range(4, 8)),
            r"must be indices in \[0, 4\), got range\(4, 8\)",
        ),
        (lambda: _batches(rows=[0, -1]), r"rows must be indices in \[0, 4\), got \[0, -1\]"),
        (lambda: _batches(rows=[]), r"rows must be indices in \[0, 4\), got \[\]"),
        (lambda: _batches().batch_at(-1), "must not be negative, got -1"),
        (lambda: _batches().iterate(-2), "must not be negative, got -2"),
        (lambda: prepared_lib.validation_blocks(NUMBERS, 11), "expected 1 to 10 .* got 11"),
        (lambda: prepared_lib.validation_blocks(NUMBERS, 0), "expected 1 to 10 .* got 0"),
    ],
)
def test_errors_of_batches(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_validation_blocks_are_spread_evenly():
    np.testing.assert_array_equal(prepared_lib.validation_blocks(NUMBERS, 10), NUMBERS)
    np.testing.assert_array_equal(prepared_lib.validation_blocks(NUMBERS, 4)[:, 0], [0, 2, 5, 7])
    assert prepared_lib.validation_blocks(NUMBERS, 1).dtype == np.int32
