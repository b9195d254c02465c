"""The reading benchmark: its measurements and counts."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import reading
from fsdfm_jax.data import prepared as prepared_lib


class Slow:
    """Batches that take a given time."""

    def iterate(self, *, num_threads, prefetch):
        import time

        while True:
            time.sleep(0.01)
            yield np.zeros((8, 4), np.int32)


def test_blocks_per_second():
    # No more than 100 batches of 8 a second; a sleep may be longer, on a busy machine much.
    assert 8 <= reading.blocks_per_second(Slow(), threads=2, rows=8, seconds=0.3) <= 800


def test_table_has_medians_tokens_and_the_ratio():
    values = [{"blocks": blocks, "cached": 0.5} for blocks in (10.0, 30.0, 20.0)]
    (row,) = reading.table_of({(2, "warm"): values}, length=100, consumed=500.0)
    assert row == {
        "threads": 2,
        "cache": "warm",
        "cached": 0.5,
        "blocks/s": 20.0,
        "tokens/s": 2000.0,
        "times what is consumed": 4.0,
    }
    (row,) = reading.table_of({(2, "warm"): [{"blocks": 1.0, "cached": None}]}, 100, None)
    assert row["cached"] is None
    assert "times what is consumed" not in row


def test_the_cache_is_what_it_says(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    reading.read_through([str(path)])
    share = reading.cached_share([str(path)])
    if share is None:
        pytest.skip("this system doesn't tell what is in memory")
    assert share == 1
    reading.drop_from_cache([str(path)])
    assert 0 <= reading.cached_share([str(path)]) <= 1


def test_the_program(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(200))
    )
    spec = prepared_lib.DataSpec(f"{tmp_path}/x.jsonl", "text", "bpe", 257, 8, 0.2)
    prepared = prepared_lib.prepare(spec, tmp_path / "data")
    assert len(reading.files_of(prepared, "train")) == 1
    command = [sys.executable, "-m", "benchmarks.reading", f"--directory={prepared.directory}"]
    command += ["--threads=1,2", "--seconds=0.05", "--rounds=1", "--tokens_per_second=1"]
    command += [f"--output={tmp_path}/result.json"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["threads"], row["cache"]) for row in rows] == [
        *((1, "cold"), (1, "warm"), (2, "cold"), (2, "warm"))
    ]
    assert all(row["tokens/s"] == 8 * row["blocks/s"] > 0 for row in rows)
