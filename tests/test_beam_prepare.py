"""Preparation by groups: deterministic blocks, resuming, damage; on Beam if installed."""

import collections
import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fsdfm_jax.data import beam, shards
from fsdfm_jax.data import corpus as corpus_lib
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data import tokenizer as tokenizer_lib

LENGTH = 16
GROUP = 2048  # bytes


def in_turn(function, items):
    for item in items:
        function(item)


def backwards(function, items):
    for item in reversed(items):
        function(item)
        function(item)  # engines may run a task twice


def _texts(count, seed=0):
    rng = np.random.default_rng(seed)
    words = ["we", "the", "people", "of", "a", "more", "perfect", "union", "secure", "liberty"]
    return [f"{' '.join(rng.choice(words, rng.integers(3, 40)))} {i}." for i in range(count)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A corpus of all kinds of files, small and large, and a tokenizer."""
    root = tmp_path_factory.mktemp("root")
    (root / "texts").mkdir()
    texts = _texts(400)
    for i, text in enumerate(texts[:20]):
        (root / "texts" / f"{i:02}.txt").write_text(text)
    lines = [json.dumps({"text": text}) + "\n" for text in texts[20:200]]
    (root / "texts" / "lines.jsonl").write_text("".join(lines))
    table = pyarrow.table({"id": list(range(200)), "text": texts[200:]})
    pyarrow.parquet.write_table(table, root / "texts" / "rows.parquet", row_group_size=20)
    tokenizer_lib.train_bpe([], 257).save(root / "tokenizer.json")
    return root


def _spec(root, **changes):
    spec = prepared_lib.DataSpec(
        corpus=f"{root}/texts/*",
        text_field="text",
        tokenizer=f"{root}/tokenizer.json",
        vocab_size=0,
        block_length=LENGTH,
        holdout=0.2,
    )
    return dataclasses.replace(spec, **changes)


def _prepare(spec, directory, run=in_turn, **changes):
    options = {"group_bytes": GROUP, "sample_characters": 5000} | changes
    return beam.prepare(spec, directory, run, **options)


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    return _prepare(_spec(root), tmp_path_factory.mktemp("prepared") / "data")


def _content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _all(source):
    return np.stack([source[i] for i in range(len(source))])


# What is made.


def test_blocks_equal_a_literal_reimplementation(root, prepared):
    groups = corpus_lib.groups(f"{root}/texts/*", "record", GROUP)
    assert len(groups) == prepared.manifest["groups"]["count"] > 10
    for split in prepared_lib.SPLITS:
        expected, documents, tokens = [], 0, 0
        for pieces in groups:
            stream = []
            for document in corpus_lib.read(pieces, "text", "record"):
                if corpus_lib.is_held_out(document, 0.2) == (split == "validation"):
                    stream += [*prepared.tokenizer.encode(document.text), 0]
                    documents += 1
            tokens += len(stream)
            expected += [stream[i : i + LENGTH] for i in range(0, len(stream) - LENGTH + 1, LENGTH)]
        np.testing.assert_array_equal(_all(prepared.source(split)), expected)
        facts = prepared.manifest["splits"][split]
        assert facts["documents"] == documents
        assert facts["tokens"] == tokens
        assert facts["blocks"] == len(expected) == prepared.num_blocks(split)
        assert facts["dropped_tokens"] == tokens - LENGTH * len(expected)


def test_no_document_is_lost_or_doubled_by_cutting_the_corpus(root):
    whole = [d.text for d in corpus_lib.documents(f"{root}/texts/*")]
    assert len(whole) == 400
    for group_bytes in (1, 97, GROUP, 1 << 30):
        groups = corpus_lib.groups(f"{root}/texts/*", "record", group_bytes)
        cut = [d.text for pieces in groups for d in corpus_lib.read(pieces, "text", "record")]
        assert cut == whole
    assert len(groups) == 1
    assert [piece[1:] for piece in groups[0]] == [(0, None)] * 22


def test_the_folder_is_as_documented(prepared):
    names = set(_content(prepared.directory))
    count = prepared.manifest["groups"]["count"]
    assert {name for name in names if "/" not in name} == {
        "manifest.json",
        "plan.json",
        "tokenizer.json",
    }
    assert {f"shards/{i:05d}.json" for i in range(count)} <= names
    manifest = json.loads((prepared.directory / "manifest.json").read_text())
    assert {f"shards/{i:05d}.json" for i in range(count)} | {
        file["name"] for file in manifest["files"]
    } == {name for name in names if "/" in name}
    assert all(file["blocks"] > 0 for file in manifest["files"])
    assert prepared.verify() == len(manifest["files"])
    again = prepared_lib.load(prepared.directory)
    assert again.manifest == prepared.manifest
    assert (
        prepared_lib.prepare(_spec_of(again), prepared.directory).fingerprint
        == prepared.fingerprint
    )


def _spec_of(data):
    return prepared_lib.DataSpec(**data.manifest["spec"])


def test_order_and_repetition_of_the_work_change_nothing(root, prepared, tmp_path):
    _prepare(_spec(root), tmp_path / "other", backwards)
    assert _content(tmp_path / "other") == _content(prepared.directory)


def test_fingerprint(root, prepared, tmp_path):
    def fingerprint(name, spec, **options):
        return _prepare(spec, tmp_path / name, **options).fingerprint

    assert fingerprint("size", _spec(root), group_bytes=2 * GROUP) != prepared.fingerprint
    assert fingerprint("length", _spec(root, block_length=8)) != prepared.fingerprint
    # The same counts, but one letter; written to the same place as the corpus before.
    path = root / "texts" / "00.txt"
    text = path.read_text()
    changed = next(
        new
        for new in ("z" + text[1:], "y" + text[1:], "x" + text[1:], "v" + text[1:])
        if corpus_lib.is_held_out(corpus_lib.Document("", new), 0.2)
        == corpus_lib.is_held_out(corpus_lib.Document("", text), 0.2)
    )
    path.write_text(changed)
    try:
        other = _prepare(_spec(root), tmp_path / "letter")
    finally:
        path.write_text(text)
    assert other.num_blocks("train") == prepared.num_blocks("train")
    assert other.fingerprint != prepared.fingerprint


def test_the_tokenizer_learns_from_a_bounded_sample_of_training_documents(root, tmp_path):
    spec = _spec(root, tokenizer="bpe", vocab_size=270)
    data = _prepare(spec, tmp_path / "data", sample_characters=3000)
    sample = data.manifest["trained_on"]
    groups = corpus_lib.groups(spec.corpus, "record", GROUP)
    assert sample["groups"] == len(groups)
    assert 0 < sample["characters"] <= 3000 + len(groups)
    texts = []
    for pieces in groups:
        left = -(-3000 // len(groups))
        for document in corpus_lib.read(pieces, "text", "record"):
            if left and not corpus_lib.is_held_out(document, 0.2):
                texts.append(document.text[:left])
                left -= len(texts[-1])
    assert sample["characters"] == sum(map(len, texts))
    assert sample["documents"] == len(texts)
    expected = tokenizer_lib.train_bpe(texts, 270)
    assert data.tokenizer.fingerprint == expected.fingerprint


def test_validation_files_of_its_own(root, tmp_path):
    (tmp_path / "own.txt").write_text("held out by the makers of the corpus " * 9)
    spec = _spec(root, validation=f"{tmp_path}/own.txt", holdout=7.0)
    assert spec.holdout == 0
    for name, data in (
        ("a", _prepare(spec, tmp_path / "a")),
        ("b", prepared_lib.prepare(spec, tmp_path / "b")),
    ):
        blocks = [data.tokenizer.decode(block) for block in _all(data.source("validation"))]
        assert "held out by the " in blocks, name
        assert data.manifest["splits"]["validation"]["documents"] == 1
        assert data.manifest["splits"]["train"]["documents"] == 400
    (tmp_path / "own.txt").write_text("\n")
    with pytest.raises(ValueError, match="the files of the validation split have no text"):
        _prepare(spec, tmp_path / "c")


# Going on.


def test_texts_in_both_splits_are_counted_as_in_the_ordinary_way(root, tmp_path, caplog):
    (tmp_path / "texts").mkdir()
    texts = [f"text number {i} of the corpus " * 9 for i in range(12)]
    for i, text in enumerate([*texts, texts[3]]):  # one stands there twice
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    lines = [json.dumps({"text": text}) for text in [texts[3], texts[5], "another text " * 9]]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    spec = _spec(root, corpus=f"{tmp_path}/texts/*.txt", validation=f"{tmp_path}/own.jsonl")
    caplog.set_level("WARNING")
    for name, data in (
        ("groups", _prepare(spec, tmp_path / "groups", backwards, group_bytes=600)),
        ("ordinary", prepared_lib.prepare(spec, tmp_path / "ordinary")),
    ):
        assert data.manifest["read"]["documents_in_both"] == 3, name
    assert data.manifest["splits"]["train"]["documents"] == 13
    assert caplog.text.count("3 document(s) of data.corpus are identical") == 2
    assert not list((tmp_path / "groups").rglob("*.npy"))


def test_a_group_without_its_digests_is_made_again(root, tmp_path):
    (tmp_path / "own.txt").write_text("held out by the makers of the corpus " * 9)
    spec, folder, made = _spec(root, validation=f"{tmp_path}/own.txt"), tmp_path / "data", []

    def lost(function, items):
        in_turn(function, items)
        (folder / "shards" / "00001.npy").unlink()

    with pytest.raises(ValueError, match="1 group"):
        _prepare(spec, folder, lost)
    _prepare(spec, folder, lambda function, items: made.extend(items) or in_turn(function, items))
    assert made == [1]


def _inodes(folder):
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in (folder / "shards").iterdir()
        if path.is_file()
    }


KILLED = """
import os, signal, sys
from test_beam_prepare import _prepare, _spec
from fsdfm_jax.data import shards
place, countdown = sys.argv[3], int(sys.argv[4])

def deadly(name):
    original = getattr(shards, name)
    def call(*args, **kwargs):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(shards, name, call)

deadly(place)
_prepare(_spec(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize(
    ("place", "countdown"),
    [
        ("_publish", 1),  # before the plan
        ("_publish", 6),  # before a shard has its name
        ("write_bytes", 3),  # before a group's json, all its shards there
        ("describe", 9),
        ("remove_partial", 2),  # before the manifest
    ],
)
def test_killed_and_resumed(root, prepared, tmp_path, place, countdown):
    target = tmp_path / "data"
    arguments = [str(root), str(target), place, str(countdown)]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        cwd=pathlib.Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        prepared_lib.load(target)
    if (target / "plan.json").exists():
        with pytest.raises(ValueError, match="If --engine=beam was stopped there, run that"):
            prepared_lib.prepare(_spec(root), target)
    finished = {p.stem for p in (target / "shards").glob("*.json") if not p.name.startswith(".")}
    before = _inodes(target)
    made = []

    def run(function, items):
        assert not list(target.rglob(".*.partial"))
        made.extend(items)
        in_turn(function, items)

    data = _prepare(_spec(root), target, run)
    assert data.fingerprint == prepared.fingerprint
    assert _content(target) == _content(prepared.directory)
    assert {f"{number:05d}" for number in made}.isdisjoint(finished)
    after = _inodes(target)
    kept = [name for name in before if pathlib.Path(name).stem[-5:] in finished]
    assert len(kept) >= len(finished)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_only_damaged_groups_are_made_again(root, prepared, tmp_path):
    _prepare(_spec(root), tmp_path / "data")
    before = _inodes(tmp_path / "data")
    (tmp_path / "data" / "shards" / "train-00002.array_record").unlink()
    cut = tmp_path / "data" / "shards" / "train-00004.array_record"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-00002\S* is missing, \S*train-00004\S* has") as e:
        prepared_lib.load(tmp_path / "data")
    assert "remove these files and manifest.json" in str(e.value)
    cut.unlink()
    (tmp_path / "data" / "manifest.json").unlink()
    data = _prepare(_spec(root), tmp_path / "data")
    assert data.fingerprint == prepared.fingerprint
    after = _inodes(tmp_path / "data")
    changed = {name for name in after if after[name] != before[name]}
    assert {name[-18 if "-" in name else 0 :][:5] for name in changed} <= {"00002", "00004"}
    assert _content(tmp_path / "data") == _content(prepared.directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_length": 8}, "block_length: 16 before, 8 now"),
        ({"group_bytes": 2 * GROUP}, "group_bytes: 2048 before, 4096 now"),
        ("corpus", r"files .*new\.txt: 'absent' before, 4 now|new\.txt: 'absent' before, 4 now"),
    ],
)
def test_an_unfinished_folder_goes_on_with_the_same_only(root, tmp_path, change, message):
    with pytest.raises(RuntimeError, match="stopped"):
        _prepare(_spec(root), tmp_path / "data", _stopped)
    before = _content(tmp_path / "data")
    options = {}
    spec = _spec(root)
    if change == "corpus":
        (root / "texts" / "new.txt").write_text("more")
    elif "group_bytes" in change:
        options = change
    else:
        spec = _spec(root, **change)
    try:
        with pytest.raises(ValueError, match=f"started with another .*{message}.*; resume with"):
            _prepare(spec, tmp_path / "data", **options)
    finally:
        (root / "texts" / "new.txt").unlink(missing_ok=True)
    assert _content(tmp_path / "data") == before


def test_groups_of_another_plan_are_made_anew(root, prepared, tmp_path):
    _prepare(_spec(root, holdout=0.4), tmp_path / "other")
    with pytest.raises(RuntimeError, match="stopped"):
        _prepare(_spec(root), tmp_path / "data", _stopped)
    shutil.copytree(tmp_path / "other" / "shards", tmp_path / "data" / "shards", dirs_exist_ok=True)
    data = _prepare(_spec(root), tmp_path / "data")
    assert data.fingerprint == prepared.fingerprint
    assert data.verify() == len(prepared.files)


def _stopped(function, items):
    function(items[0])
    raise RuntimeError("stopped")


def test_faults_of_the_corpus_are_told_after_all_else_is_done(root, tmp_path):
    # The group has written blocks when it comes to the fault.
    fine = json.dumps({"text": "fine " * 100}) + "\n"
    (tmp_path / "bad.jsonl").write_text(fine * 1100 + '{"body": ""}\n')
    spec = _spec(root, corpus=f"{root}/texts/*,{tmp_path}/bad.jsonl")
    message = r"bad\.jsonl:1101 has no field 'text' .*\(1 group\(s\) not made; run the same command"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            _prepare(spec, tmp_path / "data", group_bytes=1 << 20)
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert not list(tmp_path.rglob(".*.partial"))
    # Repaired at the same size, as a plan knows files by.
    (tmp_path / "bad.jsonl").write_text(fine * 1100 + '{"text": ""}\n')
    data = _prepare(spec, tmp_path / "data", group_bytes=1 << 20)
    assert data.verify()
    assert not list(data.directory.rglob("*.error"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "nowhere/*.txt"}, "no file matches 'nowhere"),
        ({"block_length": 50_000}, "the validation split has no full block of 50000|train split"),
        ({"holdout": 1e-12}, r"none of the corpus's 400 document\(s\) is in the validation"),
        ({"mixture": "a=1"}, "mixes folders that are already prepared; omit --engine"),
        ({"tokenizer": "nowhere"}, "no tokenizer at nowhere"),
    ],
)
def test_errors_of_a_spec(root, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _prepare(_spec(root, **changes), tmp_path / "data")
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_folder_with_other_things_is_refused(root, tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(ValueError, match="exists but is not prepared data"):
        _prepare(_spec(root), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    (tmp_path / "own" / "shards").mkdir(parents=True)
    (tmp_path / "own" / "shards" / "precious").write_text("")
    with pytest.raises(ValueError, match="exists but is not prepared data"):
        _prepare(_spec(root), tmp_path / "own")
    assert (tmp_path / "own" / "shards" / "precious").exists()


def test_without_beam_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ValueError, match=r"needs apache-beam .*pip install fsdfm_jax\[beam\]"):
        beam.run_on_beam(print, [1], [])


# Reading while files go bad.


def test_a_shard_that_goes_bad_while_training_is_named(root, prepared, tmp_path):
    data = _prepare(_spec(root), tmp_path / "data")
    stream = prepared_lib.Batches(data.source("train"), batch_size=4, seed=0).iterate()
    next(stream)
    (bad,) = [file for file in data.files if file.name == "shards/train-00005.array_record"]
    path = data.directory / bad.name
    content = bytearray(path.read_bytes())
    content[4096 : len(content) // 2] = bytes(len(content) // 2 - 4096)
    path.write_bytes(content)
    message = r"train-00005\.array_record (cannot be read \(|is damaged: expected blocks of 16)"
    with pytest.raises(ValueError, match=message):
        collections.deque(stream, maxlen=0)
    with pytest.raises(ValueError, match=r"train-00005\.array_record has sha256 \w+ instead of"):
        data.verify()
    path.unlink()
    stream = prepared_lib.Batches(_unchecked(data), batch_size=4, seed=0).iterate()
    with pytest.raises(FileNotFoundError, match=r"train-00005\.array_record has disappeared"):
        collections.deque(stream, maxlen=0)


def _unchecked(data):
    return shards.Shards(
        data.directory,
        [file for file in data.files if file.split == "train"],
        LENGTH,
        shards.token_dtype(data.tokenizer.vocab_size),
    )


# On Beam.

PROGRAM = [sys.executable, "-m", "launch.prepare_data", "--config=configs/base.py"]
needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="apache-beam is not installed"
)


def _arguments(root, directory, workers):
    return [
        *PROGRAM,
        f"--directory={directory}",
        "--engine=beam",
        f"--workers={workers}",
        "--group_mib=1",
        f"--config.data.corpus={root}/large.jsonl",
        f"--config.data.tokenizer={root}/tokenizer.json",
        "--config.data.holdout=0.2",
    ]


@pytest.fixture(scope="module")
def large(root, tmp_path_factory):
    """The command's result for 7 MB, made without the command."""
    texts = _texts(7_000)
    lines = [json.dumps({"text": f"{i} {t}" * 8}) + "\n" for i, t in enumerate(texts)]
    (root / "large.jsonl").write_text("".join(lines))
    spec = _spec(root, corpus=f"{root}/large.jsonl", block_length=128)
    directory = tmp_path_factory.mktemp("large") / "data"
    return _prepare(spec, directory, group_bytes=1 << 20, sample_characters=1 << 26)


def _run(arguments):
    return subprocess.run(
        arguments, cwd=beam.__file__.rsplit("/", 2)[0], capture_output=True, text=True
    )


@needs_beam
def test_one_worker_on_beam_makes_the_same_files(root, large, tmp_path):
    done = _run(_arguments(root, tmp_path / "data", 1))
    assert done.returncode == 0, done.stderr
    assert f"fingerprint: {large.fingerprint}" in done.stdout
    assert _content(tmp_path / "data") == _content(large.directory)
    assert "tensorflow" not in done.stderr.lower()


@needs_beam
def test_two_workers_on_beam_are_killed_and_go_on(root, large, tmp_path):
    target = tmp_path / "data"
    process = subprocess.Popen(
        _arguments(root, target, 2),
        cwd=beam.__file__.rsplit("/", 2)[0],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list((target / "shards").glob("[0-9]*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)  # the driver and its workers
    process.wait()
    assert not (target / "manifest.json").exists()
    finished = {path.stem for path in (target / "shards").glob("[0-9]*.json")}
    assert 2 <= len(finished) < large.manifest["groups"]["count"]
    before = _inodes(target)
    done = _run(_arguments(root, target, 2))
    assert done.returncode == 0, done.stderr
    assert f"fingerprint: {large.fingerprint}" in done.stdout
    after = _inodes(target)
    kept = [name for name in before if pathlib.Path(name).stem[-5:] in finished]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert _content(target) == _content(large.directory)


@needs_beam
def test_errors_on_beam_are_one_line(root, tmp_path):
    (root / "large.jsonl").write_text('{"body": "x"}\n')
    done = _run(_arguments(root, tmp_path / "data", 2))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {root}/large.jsonl:1 has no field 'text' (found: body)")
    assert "Traceback" not in done.stderr
