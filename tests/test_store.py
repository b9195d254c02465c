"""Finished points: reuse, its limits, and several machines in one folder."""

import json
import math
import pathlib

import numpy as np
import pytest

from fsdfm_jax.evaluate.results import Store

STAMP = {"seed": 1}
PROTOCOL = {"samples": STAMP, "scoring": {"judge": "a"}}
ARRAYS = {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3), "frozen": np.zeros((2, 3), bool)}
SCORES = {"nll": np.float64([0.5, np.nan])}


def _row(slug="point", **changes):
    value = {"value": 1.5, "low": math.nan, "high": math.inf}
    row = {"slug": slug, "figures": {"x": value}, "protocol": PROTOCOL}
    store = Store(pathlib.Path())
    files = {"samples_file": store.samples_file(slug, STAMP)}
    return row | files | {"scores_file": store.scores_file(slug, PROTOCOL)} | changes


def _save(store, slug="point"):
    store.save_arrays(slug, STAMP, ARRAYS)
    store.save_scores(slug, PROTOCOL, 1, SCORES)


def _same(row, other):
    return json.dumps(row, sort_keys=True) == json.dumps(other, sort_keys=True)


def test_a_finished_point_is_found_again(tmp_path):
    store = Store(tmp_path / "report")
    assert store.finished("point", PROTOCOL) is None
    _save(store)
    store.add(_row())
    for other in (store, Store(tmp_path / "report")):
        assert _same(other.finished("point", PROTOCOL), _row())
        arrays = other.arrays("point", STAMP)
        assert arrays.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(arrays[name], array)
            assert arrays[name].dtype == array.dtype


def test_another_protocol_is_another_point(tmp_path):
    store = Store(tmp_path)
    _save(store)
    store.add(_row())
    assert store.finished("point", PROTOCOL | {"scoring": {"judge": "b"}}) is None
    assert store.finished("other", PROTOCOL) is None
    assert store.arrays("point", {"seed": 2}) is None
    assert store.arrays("point", STAMP) is not None


def test_other_samples_take_no_ones_place(tmp_path):
    store = Store(tmp_path)
    other = {"tokens": np.zeros((1, 1), np.int32)}
    store.save_arrays("point", STAMP, ARRAYS)
    store.save_arrays("point", {"seed": 2}, other)
    assert store.arrays("point", STAMP)["tokens"].shape == (2, 3)
    assert store.arrays("point", {"seed": 2})["tokens"].shape == (1, 1)


def test_scores_of_the_same_samples_stand_beside_each_other(tmp_path):
    store = Store(tmp_path)
    _save(store)
    other = PROTOCOL | {"scoring": {"judge": "b"}}
    store.save_scores("point", other, 1, {"nll": np.float64([3.0])})
    store.save_scores("point", PROTOCOL | {"scoring": {"judge": "c"}}, 2, SCORES)
    np.testing.assert_array_equal(store.scores("point", PROTOCOL)["nll"], SCORES["nll"])
    assert store.scores("point", other)["nll"].tolist() == [3.0]
    assert store.scores("point", PROTOCOL | {"scoring": {"judge": "d"}}) is None
    earlier = store.earlier_scores("point", STAMP, 1)
    assert sorted(len(arrays["nll"]) for arrays in earlier) == [1, 2]
    assert store.earlier_scores("point", {"seed": 2}, 1) == []
    assert store.earlier_scores("poin", STAMP, 1) == []


def test_a_row_without_its_scores_is_none(tmp_path):
    store = Store(tmp_path)
    _save(store)
    store.add(_row())
    (tmp_path / store.scores_file("point", PROTOCOL)).unlink()
    assert store.finished("point", PROTOCOL) is None


def test_rows_of_an_earlier_version_are_passed_over(tmp_path):
    (tmp_path / "points.jsonl").write_text('{"slug": "x", "protocol": {}}\n')
    store = Store(tmp_path)
    assert store.finished("x", {}) is None
    _save(store)
    store.add(_row())
    assert Store(tmp_path).finished("point", PROTOCOL) is not None


def test_batches_are_kept_until_the_samples_are_whole(tmp_path):
    store = Store(tmp_path)
    assert store.batch("point", STAMP, 0) is None
    store.save_batch("point", STAMP, 0, ARRAYS["tokens"])
    store.save_batch("point", STAMP, 1, ARRAYS["tokens"] + 1)
    np.testing.assert_array_equal(Store(tmp_path).batch("point", STAMP, 1), ARRAYS["tokens"] + 1)
    assert store.batch("point", {"other": 1}, 0) is None
    (batch,) = (tmp_path / "samples").glob(".point-*/00000.npy")
    batch.write_bytes(batch.read_bytes()[:20])
    assert store.batch("point", STAMP, 0) is None
    store.save_arrays("point", STAMP, ARRAYS)
    assert [path.suffix for path in (tmp_path / "samples").rglob("*")] == [".npz"]


def test_a_row_without_its_samples_is_none(tmp_path):
    store = Store(tmp_path)
    store.add(_row())
    assert store.finished("point", PROTOCOL) is None


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_samples_are_drawn_anew(tmp_path, damage):
    store = Store(tmp_path)
    store.save_arrays("point", STAMP, ARRAYS)
    path = tmp_path / store.samples_file("point", STAMP)
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"x"}[damage])
    assert store.arrays("point", STAMP) is None


def test_a_line_cut_by_a_kill_is_no_row_and_is_written_over(tmp_path):
    store = Store(tmp_path)
    for slug in ("one", "two"):
        _save(store, slug)
        store.add(_row(slug))
    path = tmp_path / "points.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    store = Store(tmp_path)
    assert store.finished("one", PROTOCOL) is not None
    assert store.finished("two", PROTOCOL) is None
    store.add(_row("two"))
    assert [row["slug"] for row in map(json.loads, path.read_text().splitlines())] == ["one", "two"]


def test_the_last_row_of_a_point_counts(tmp_path):
    store = Store(tmp_path)
    _save(store)
    store.add(_row(notes=["first"]))
    store.add(_row(notes=["second"]))
    assert Store(tmp_path).finished("point", PROTOCOL)["notes"] == ["second"]


def test_machines_write_apart_and_read_together(tmp_path):
    stores = [Store(tmp_path, index=i, count=3) for i in range(3)]
    for i, store in enumerate(stores):
        _save(store, f"point{i}")
        store.add(_row(f"point{i}"))
    assert len(list(tmp_path.glob("points-*-of-3.jsonl"))) == 3
    assert stores[0].finished("point2", PROTOCOL) is None
    stores[0].refresh()
    assert stores[0].finished("point2", PROTOCOL) is not None
    # Gone on with alone, or with another number of machines: nothing is lost.
    assert Store(tmp_path).finished("point1", PROTOCOL) is not None


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got 2 of 2"):
        Store(tmp_path, index=2, count=2)
    (tmp_path / "points.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"points\.jsonl has a line that isn't a result"):
        Store(tmp_path)
    (tmp_path / "points.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1 isn't valid JSON"):
        Store(tmp_path)
