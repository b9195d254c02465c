"""Shards: writing and reading, reported damage, failing writers."""

import dataclasses
import hashlib
import threading

import numpy as np
import pytest

from fsdfm_jax.data import shards

LENGTH = 64


def _write(folder, name="train-0", blocks=40, vocab_size=50_257, seed=0):
    dtype = shards.token_dtype(vocab_size)
    blocks_NL = np.random.default_rng(seed).integers(0, vocab_size, (blocks, LENGTH), np.int32)
    writer = shards.ShardWriter(folder, name, "train", dtype)
    writer.write(blocks_NL[:7])
    writer.write(blocks_NL[7:])
    return blocks_NL, writer.close(), dtype


@pytest.fixture
def folder(tmp_path):
    """Three shards: (their blocks, their files)."""
    parts = [_write(tmp_path, f"train-{i}", 300 + i, seed=i) for i in range(3)]
    return np.concatenate([p[0] for p in parts]), [file for p in parts for file in p[1]]


def _open(tmp_path, files):
    return shards.Shards(tmp_path, files, LENGTH, shards.token_dtype(50_257))


def test_blocks_come_back_in_order(tmp_path, folder):
    blocks_NL, files = folder
    source = _open(tmp_path, files)
    assert len(source) == len(blocks_NL) == 903
    np.testing.assert_array_equal([source[i] for i in range(903)], blocks_NL)
    assert source[0].dtype == np.int32
    for index in (-1, 903):
        with pytest.raises(IndexError):
            source[index]


@pytest.mark.parametrize(("vocab_size", "name"), [(65_536, "uint16"), (65_537, "int32")])
def test_tokens_are_stored_in_the_smallest_type_that_holds_them(tmp_path, vocab_size, name):
    assert shards.token_dtype(vocab_size) == np.dtype(name)
    blocks_NL, files, dtype = _write(tmp_path, vocab_size=vocab_size)
    blocks_NL[0, 0] = vocab_size - 1
    writer = shards.ShardWriter(tmp_path, "last", "train", dtype)
    writer.write(blocks_NL)
    source = shards.Shards(tmp_path, [*files, *writer.close()], LENGTH, dtype)
    np.testing.assert_array_equal(source[len(blocks_NL)], blocks_NL[0])


def test_a_file_is_described_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_CHUNK", 100)
    _, (file,), _ = _write(tmp_path)
    data = (tmp_path / file.name).read_bytes()
    assert file.bytes == len(data)
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert (file.split, file.blocks) == ("train", 40)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_nothing_is_seen_before_close_nor_of_what_is_discarded(tmp_path):
    writer = shards.ShardWriter(tmp_path, "train-0", "train", np.dtype("<u2"))
    writer.write(np.zeros((3, LENGTH), np.int32))
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 1
    assert names[0].startswith(".train-0.")
    writer.discard()
    assert not list(tmp_path.iterdir())
    empty = shards.ShardWriter(tmp_path, "train-1", "train", np.dtype("<u2"))
    empty.write(np.zeros((0, LENGTH), np.int32))
    assert empty.close() == []
    assert not list(tmp_path.iterdir())


def test_what_killed_writers_left_is_removed(tmp_path):
    (tmp_path / "shards").mkdir()
    killed = shards.ShardWriter(tmp_path / "shards", "train-0", "train", np.dtype("<u2"))
    killed.write(np.zeros((3, LENGTH), np.int32))
    (tmp_path / "shards" / "train-1").write_text("whole")
    shards.remove_partial(tmp_path)
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["train-1"]


def test_a_shard_that_cannot_be_written(tmp_path):
    writer = shards.ShardWriter(tmp_path / "nowhere", "train-0", "train", np.dtype("<u2"))
    with pytest.raises(OSError, match=r"cannot write .*nowhere/train-0: .*No such file"):
        writer.write(np.zeros((3, LENGTH), np.int32))
    writer.discard()


def test_sizes_and_sums(tmp_path, folder):
    _, files = folder
    shards.check_sizes(tmp_path, files)
    shards.check_sums(tmp_path, files)
    path = tmp_path / "train-1"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    shards.check_sizes(tmp_path, files)
    with pytest.raises(
        ValueError, match=r"damaged: train-1 has sha256 \w+ instead of \w+; restore"
    ):
        shards.check_sums(tmp_path, files)
    path.write_bytes(data[:-1])
    (tmp_path / "train-2").unlink()
    for check in (shards.check_sizes, shards.check_sums):
        with pytest.raises(ValueError, match=r"train-1 has \d+ bytes instead of \d+, train-2 is m"):
            check(tmp_path, files)
    absent = [dataclasses.replace(files[0], name=f"x{i}") for i in range(9)]
    with pytest.raises(ValueError, match=r"x0 is missing, .*, x4 is missing, and 4 more; "):
        shards.check_sizes(tmp_path, absent)


def test_damage_found_while_reading_names_the_shard(tmp_path, folder):
    _, files = folder
    path = tmp_path / "train-1"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    source, wrong = _open(tmp_path, files), 0
    for index in range(len(source)):
        try:
            source[index]
        except ValueError as error:
            wrong += 1
            message = str(error)
    assert wrong >= 1  # only the chunk that holds the byte
    assert message.startswith(f"{path} cannot be read (Corrupted")
    assert "--verify" in message
    assert "restore the files" in message
    path.unlink()
    source = _open(tmp_path, files)
    source[0]
    with pytest.raises(FileNotFoundError, match=r"train-1 has disappeared; restore the files"):
        source[300]
    # What is open already can still be read where the system keeps it, or else is named.
    source[0]


def test_a_shard_of_other_blocks_is_named(tmp_path, folder):
    _, files = folder
    source = shards.Shards(tmp_path, files, LENGTH // 2, shards.token_dtype(50_257))
    with pytest.raises(ValueError, match=r"train-2 is damaged: expected blocks of 32 tokens, got"):
        source[700]


def test_threads_read_the_same(tmp_path, folder):
    blocks_NL, files = folder
    source, found = _open(tmp_path, files), {}

    def read(seed):
        order = np.random.default_rng(seed).permutation(len(blocks_NL))
        found[seed] = all(np.array_equal(source[int(i)], blocks_NL[i]) for i in order)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)
