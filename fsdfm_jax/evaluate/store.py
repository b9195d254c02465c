"""Finished points on disk: one line of JSON each, and their samples; nothing is computed twice.

    DIR/points.jsonl               a row per line; of a point computed again, the last one counts
    DIR/points-2-of-8.jsonl        those of machine 2 of 8; all of them are read
    DIR/samples/SLUG-DIGEST.npz    tokens, what was given, what each figure was aggregated from
    DIR/samples/.SLUG-DIGEST/      batches of a point that isn't drawn to its end yet

DIGEST is that of everything the samples depend on, so that no samples take the place of others.
"""

import pathlib
import shutil
import zipfile
import zlib
from collections.abc import Sequence
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
                if not isinstance(line, dict) or not line.keys() >= _NEEDED:
                    raise ValueError(f"{path} holds a line that is no result; remove the line.")
                row = {k: _numbers(v) if k in _NUMERIC else v for k, v in line.items()}
                self._rows[line["slug"], workdir.digest(line["protocol"])] = row

    def finished(self, slug: str, protocol: dict[str, Any]) -> Row | None:
        """The row of a point computed under exactly this protocol, with its samples there."""
        row = self._rows.get((slug, workdir.digest(protocol)))
        return row if row is not None and (self._directory / row["samples"]).is_file() else None

    def arrays(self, slug: str, stamp: Any, names: Sequence[str] | None = None) -> Arrays | None:
        """The samples of a point drawn under exactly this stamp, and what was kept with them.

        Args:
          slug, stamp: of the point.
          names: which arrays, where they are there; all by default.
        """
        try:
            with np.load(self._directory / self.place(slug, stamp), allow_pickle=False) as file:
                return {name: file[name] for name in file.files if names is None or name in names}
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
            return None  # not there or damaged: drawn again

    def save_arrays(self, slug: str, stamp: Any, arrays: Arrays) -> None:
        """Writes a point's samples, whole or not at all; its batches aren't needed any more."""
        writer.write_arrays(self._directory / self.place(slug, stamp), arrays)
        shutil.rmtree(self._batches(slug, stamp), ignore_errors=True)

    def place(self, slug: str, stamp: Any) -> str:
        """The file of a point's samples, relative to the directory."""
        return f"samples/{slug}-{workdir.digest(stamp)[:8]}.npz"

    def batch(self, slug: str, stamp: Any, index: int) -> np.ndarray | None:
        """A batch of a point that wasn't drawn to its end, None if it is missing or damaged."""
        try:
            return np.load(self._batches(slug, stamp) / f"{index:05d}.npy", allow_pickle=False)
        except (OSError, EOFError, ValueError):
            return None

    def save_batch(self, slug: str, stamp: Any, index: int, tokens_BL: np.ndarray) -> None:
        """Keeps a batch until the samples are whole."""
        writer.write_array(self._batches(slug, stamp) / f"{index:05d}.npy", tokens_BL)

    def _batches(self, slug: str, stamp: Any) -> pathlib.Path:
        return self._directory / "samples" / f".{slug}-{workdir.digest(stamp)[:8]}"

    def add(self, row: Row) -> None:
        """Appends a finished row; its samples have to be there."""
        writer.append_jsonl(self._path, row)
        self._rows[row["slug"], workdir.digest(row["protocol"])] = row


_NEEDED = {"slug", "protocol", "samples"}
# Where numbers stand in a row.
_NUMERIC = ("figures", "judges", "per_step", "milliseconds_per_sample", "compile_seconds")


def _numbers(value: Any) -> Any:
    """JSON has no nan and inf; the writer stores them as strings."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
