"""Mixtures: the source of each position, prepared folders by weight, rejected inputs."""

import dataclasses
import itertools
import json
import pathlib
import shutil
from fractions import Fraction

import numpy as np
import pytest

from fsdfm_jax.data import mixture as mixture_lib
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data import tokenizer as tokenizer_lib

LENGTH = 8


def _numbers(first, count):
    """Blocks that encode their source."""
    return np.repeat(np.arange(first, first + count, dtype=np.int32)[:, None], 3, axis=1)


def _mixture(*weights, sizes=(50, 20, 10)):
    parts = [_numbers(1000 * i, size) for i, size in zip(range(len(weights)), sizes, strict=False)]
    return mixture_lib.Mixture(parts, [Fraction(weight) for weight in weights])


def test_parse():
    assert mixture_lib.parse("a=0.3, b/c=x=7 ,") == [("a", Fraction(3, 10)), ("b/c=x", Fraction(7))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "expected DIR=WEIGHT with a weight above 0, got 'a'"),
        ("=1", "got '=1'"),
        ("a=", "got 'a='"),
        ("a=0", "got 'a=0'"),
        ("a=-1", "got 'a=-1'"),
        ("a=nan", "got 'a=nan'"),
        ("a=inf", "got 'a=inf'"),
        ("a=1/0", "got 'a=1/0'"),
        ("a=1,b=2,a=3", "has a twice"),
        (" , ", "has no DIR=WEIGHT"),
    ],
)
def test_errors_of_weights(text, message):
    with pytest.raises(ValueError, match=message):
        mixture_lib.parse(text)


@pytest.mark.parametrize("weights", [("1",), ("0.7", "0.3"), ("1/3", "1/7", "1/100"), ("1", "999")])
def test_positions_are_shared_out_exactly(weights):
    mixed = _mixture(*weights)
    fractions = [Fraction(weight) for weight in weights]
    taken = [0] * len(weights)
    for position in range(5000):
        part, place = mixed.pick(position)
        assert place == taken[part]  # each source is read in its own order, without gaps
        taken[part] += 1
        assert mixed.counts(position + 1) == taken
        for count, weight in zip(taken, fractions, strict=True):
            # Less than one block off for each source before it and itself.
            assert abs(count - (position + 1) * weight / sum(fractions)) < len(weights)
    period = sum(mixed._weights)
    assert mixed.counts(7 * period) == [7 * weight for weight in mixed._weights]


def test_as_a_sequence_it_is_a_proportional_choice_without_repetition():
    mixed = _mixture("0.5", "0.3", "0.2")
    # The third source has 10 blocks for a fifth: 50 in all.
    assert len(mixed) == 50
    found = [int(mixed[i][0]) for i in range(len(mixed))]
    assert len(set(found)) == 50
    assert [sum(n // 1000 == i for n in found) for i in range(3)] == [25, 15, 10]
    # In the order of the draws, and spread over the whole of each source.
    assert [n // 1000 for n in found] == [mixed.pick(k)[0] for k in range(50)]
    assert [n for n in found if n < 1000] == list(range(0, 50, 2))
    with pytest.raises(IndexError):
        mixed[50]


@pytest.mark.parametrize(
    ("weights", "sizes"),
    [
        (("1", "1000000"), (3, 5)),
        (("1000000", "1"), (3, 5)),
        (("0.999", "0.0005", "3"), (3, 5, 7)),
        (("1", "1", "2"), (1, 1, 1)),  # where rounding gives the third source two of two blocks
    ],
)
def test_as_a_sequence_it_has_at_least_one_block_and_none_twice(weights, sizes):
    mixed = _mixture(*weights, sizes=sizes)
    assert len(mixed) >= 1
    found = [int(mixed[i][0]) for i in range(len(mixed))]
    assert len(set(found)) == len(found)


# Batches.


def _batches(mixed, **changes):
    return prepared_lib.Batches(mixed, **({"batch_size": 10, "seed": 4} | changes))


def test_batches_are_pure_and_have_the_shares_of_the_weights():
    mixed = _mixture("0.5", "0.3", "0.2")
    drawn = np.concatenate([_batches(mixed).batch_at(step)[:, 0] for step in range(50)])
    # 500 positions are 50 periods of 10: the shares are exact.
    assert np.bincount(drawn // 1000).tolist() == [250, 150, 100]
    # Each source has independent epochs, with every block once.
    second = drawn[drawn // 1000 == 1]
    for epoch in range(7):
        assert sorted(second[20 * epoch : 20 * epoch + 20] - 1000) == list(range(20))
    assert not np.array_equal(second[:20], second[20:40])
    with_threads = list(itertools.islice(_batches(mixed).iterate(7), 3))
    for step, batch in enumerate(with_threads, 7):
        np.testing.assert_array_equal(batch, _batches(mixed).batch_at(step))
    own = _batches(mixed, rows=range(3, 6)).batch_at(8)
    np.testing.assert_array_equal(own, _batches(mixed).batch_at(8)[3:6])
    assert not np.array_equal(_batches(mixed, seed=5).batch_at(0), _batches(mixed).batch_at(0))


def test_sources_of_one_size_are_shuffled_apart():
    drawn = _batches(_mixture("1", "1", sizes=(50, 50)), batch_size=100).batch_at(0)[:, 0]
    assert not np.array_equal(drawn[drawn < 1000], drawn[drawn >= 1000] - 1000)


# Prepared folders.


def _spec(corpus, **changes):
    spec = prepared_lib.DataSpec(
        corpus=str(corpus),
        text_field="text",
        tokenizer=str(pathlib.Path(corpus).with_name("tokenizer.json")),
        vocab_size=0,
        block_length=LENGTH,
        holdout=0.3,
    )
    return dataclasses.replace(spec, **changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two prepared folders, "a" of the larger corpus."""
    root = tmp_path_factory.mktemp("folders")
    tokenizer_lib.train_bpe([], 257).save(root / "tokenizer.json")
    for name, count in (("a", 120), ("b", 40)):
        texts = [f"this text has the number {i}" for i in range(count)]
        lines = [json.dumps({"text": text if name == "a" else text.upper()}) for text in texts]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
        prepared_lib.prepare(_spec(root / f"{name}.jsonl"), root / name)
    return root


def _mixed_spec(folders, weights="a=3,b=1", **changes):
    mixture = ",".join(f"{folders}/{part}" for part in weights.split(","))
    return _spec("not read", mixture=mixture, **changes)


def test_a_mixture_is_a_prepared_folder(folders, tmp_path):
    spec = _mixed_spec(folders)
    data = prepared_lib.prepare(spec, tmp_path / "mixed")
    members = [prepared_lib.load(folders / name) for name in "ab"]
    assert data.tokenizer.fingerprint == members[0].tokenizer.fingerprint
    assert data.block_length == LENGTH
    for split in prepared_lib.SPLITS:
        source = data.source(split)
        assert len(source) == data.num_blocks(split) > 0
        # Three of four blocks are of the first folder, up to what is there.
        rows = [{tuple(map(int, block)) for block in _all(m.source(split))} for m in members]
        found = [tuple(map(int, block)) for block in _all(source)]
        from_a = sum(row in rows[0] for row in found)
        assert from_a == len(source) * 3 // 4
        assert sum(row in rows[1] for row in found) >= len(found) - from_a
    again = prepared_lib.load(tmp_path / "mixed")
    assert (
        again.fingerprint
        == data.fingerprint
        == prepared_lib.prepare(spec, again.directory).fingerprint
    )
    assert again.verify() == sum(member.verify() for member in members) == 4
    np.testing.assert_array_equal(_all(again.source("train")), _all(data.source("train")))


def _all(source):
    return [source[i] for i in range(len(source))]


def test_fingerprint_of_a_mixture(folders, tmp_path):
    names = (f"m{i}" for i in itertools.count())

    def fingerprint(root, weights):
        return prepared_lib.prepare(_mixed_spec(root, weights), tmp_path / next(names)).fingerprint

    first = fingerprint(folders, "a=3,b=1")
    assert fingerprint(folders, "a=3,b=2") != first
    assert fingerprint(folders, "b=1,a=3") != first  # other batches
    assert fingerprint(folders, "a=3") != first
    shutil.copytree(folders, tmp_path / "elsewhere")
    assert fingerprint(tmp_path / "elsewhere", "a=3.0,b=1") == first


def test_a_mixture_follows_folders_that_were_moved(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "old")
    first = prepared_lib.prepare(_mixed_spec(tmp_path / "old"), tmp_path / "mixed")
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(
        FileNotFoundError, match="old/a .* if it was moved, give its new path in data.mixture"
    ):
        prepared_lib.load(tmp_path / "mixed")
    moved = prepared_lib.prepare(_mixed_spec(tmp_path / "new"), tmp_path / "mixed")
    assert moved.fingerprint == first.fingerprint
    assert [member.directory.parent.name for member in moved.members] == ["new", "new"]
    assert prepared_lib.vocab_size(_mixed_spec(tmp_path / "new")) == moved.tokenizer.vocab_size
    with pytest.raises(ValueError, match=r"data\.mixture is .*a=1.* but the folder has .*a=3"):
        prepared_lib.prepare(_mixed_spec(tmp_path / "old", "a=1,b=1"), tmp_path / "mixed")


def test_a_mixture_of_relative_folders_follows_them(folders, tmp_path, monkeypatch):
    shutil.copytree(folders, tmp_path / "old" / "folders")
    monkeypatch.chdir(tmp_path / "old")
    spec = _mixed_spec("folders")
    first = prepared_lib.prepare(spec, "mixed")
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    assert prepared_lib.prepare(spec, "mixed").fingerprint == first.fingerprint


def test_mixtures_that_are_refused(folders, tmp_path):
    def prepare(spec, name="mixed"):
        return prepared_lib.prepare(spec, tmp_path / name)

    with pytest.raises(FileNotFoundError, match="no prepared data in .*nowhere"):
        prepare(_mixed_spec(folders, "a=1,nowhere=1"))
    with pytest.raises(ValueError, match="a has blocks of 8 tokens, but data.block_length is 16"):
        prepare(_mixed_spec(folders, block_length=16))
    other = _spec(folders / "b.jsonl", tokenizer="bpe", vocab_size=258)
    prepared_lib.prepare(other, folders / "c")
    with pytest.raises(ValueError, match=r"c has tokenizer \w+, but .*a has \w+; prepare it with"):
        prepare(_mixed_spec(folders, "a=1,c=1"))
    data = prepare(_mixed_spec(folders))
    with pytest.raises(ValueError, match="is itself a mixture"):
        prepare(_spec("x", mixture=f"{data.directory}=1"), "other")
    with pytest.raises(ValueError, match=r"data\.mixture is .* but the folder has"):
        prepare(_mixed_spec(folders, "a=1,b=1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed"]


def test_a_member_that_changed_or_lost_a_file(folders, tmp_path):
    shutil.copytree(folders, tmp_path / "own")
    spec = _mixed_spec(tmp_path / "own")
    prepared_lib.prepare(spec, tmp_path / "mixed")
    shard = next((tmp_path / "own" / "b").rglob("*train.array_record*"))
    shard.rename(tmp_path / "away")
    with pytest.raises(
        ValueError, match=rf"b is damaged: .*{shard.name} is missing; restore the files"
    ):
        prepared_lib.load(tmp_path / "mixed")
    shutil.rmtree(tmp_path / "own" / "b")
    prepared_lib.prepare(_spec(tmp_path / "own" / "b.jsonl", holdout=0.4), tmp_path / "own" / "b")
    with pytest.raises(ValueError, match=r"mixture with data \w+, but .*b now has \w+; restore"):
        prepared_lib.load(tmp_path / "mixed")


def test_keys_without_effect_make_no_difference(folders):
    one = _mixed_spec(folders)
    assert dataclasses.replace(one, corpus="x", holdout=7.0, tokenizer="bpe", vocab_size=9) == one
