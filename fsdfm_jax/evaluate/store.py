"""Finished points on disk: one line of JSON each, and their samples; nothing is computed twice.

DIR/points.jsonl             a row per line; of a point computed again, the last one counts
DIR/points-2-of-8.jsonl      those of machine 2 of 8; all of them are read
DIR/samples/SLUG.npz         tokens, what was given, what each figure was aggregated from
"""

import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from fsdfm_jax import workdir, writer

Row = dict[str, Any]
Arrays = dict[str, np.ndarray]


class Store:
    """The finished points of one report.

    Args:
      directory: made where needed.
      index, count: which of several machines this is; each appends to a file of its own.

    Raises:
      ValueError: for an index outside [0, count), or a damaged line in the files.
    """

    def __init__(self, directory: pathlib.Path, *, index: int = 0, count: int = 1):
        if not 0 <= index < count:
            raise ValueError(f"Expected machine 0 <= index < count, got {index} of {count}.")
        self._directory = directory
        name = "points.jsonl" if count == 1 else f"points-{index}-of-{count}.jsonl"
        self._path = directory / name
        self._rows: dict[str, Row] = {}
        self.refresh()

    def refresh(self) -> None:
        """Reads what any machine has finished by now."""
        for path in sorted(self._directory.glob("points*.jsonl")):
            for line in writer.read_jsonl(path):
                if not isinstance(line, dict) or "slug" not in line or "protocol" not in line:
                    raise ValueError(f"{path} holds a line that is no result; remove the line.")
                row = {k: _numbers(v) if k in _NUMERIC else v for k, v in line.items()}
                self._rows[line["slug"], workdir.digest(line["protocol"])] = row

    def finished(self, slug: str, protocol: dict[str, Any]) -> Row | None:
        """The row of a point computed under exactly this protocol, with its samples there."""
        row = self._rows.get((slug, workdir.digest(protocol)))
        return row if row is not None and self._samples(slug).is_file() else None

    def arrays(self, slug: str, stamp: dict[str, Any]) -> Arrays | None:
        """The samples of a point drawn under exactly this stamp, and what was kept with them."""
        try:
            with np.load(self._samples(slug), allow_pickle=False) as file:
                arrays = dict(file)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
            return None  # not there or damaged: drawn again
        return arrays if str(arrays.pop("stamp", "")) == workdir.digest(stamp) else None

    def save_arrays(self, slug: str, stamp: dict[str, Any], arrays: Arrays) -> None:
        """Writes a point's samples, whole or not at all."""
        writer.write_arrays(
            self._samples(slug), arrays | {"stamp": np.asarray(workdir.digest(stamp))}
        )

    def add(self, row: Row) -> None:
        """Appends a finished row; its samples have to be there."""
        writer.append_jsonl(self._path, row)
        self._rows[row["slug"], workdir.digest(row["protocol"])] = row

    def _samples(self, slug: str) -> pathlib.Path:
        return self._directory / "samples" / f"{slug}.npz"


# Where numbers stand in a row.
_NUMERIC = ("figures", "judges", "per_step", "milliseconds_per_sample", "compile_seconds")


def _numbers(value: Any) -> Any:
    """JSON has no nan and inf; the writer stores them as strings."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
