"""Storage of finished points: a JSON line for each, and its samples. Nothing is computed twice.

    DIR/points.jsonl                one row per line; the last row of a point counts
    DIR/points-2-of-8.jsonl         rows of machine 2 of 8; all such files are read
    DIR/samples/SLUG-S.npz          tokens, given positions, times
    DIR/samples/SLUG-S-F.npz        per-sample values that figures are aggregated from
    DIR/samples/.SLUG-S/            batches of an unfinished point

S is the digest of everything the samples depend on, F that of the scoring (the two parts of a
protocol), so files are never overwritten by others.
"""

import pathlib
import shutil
import zipfile
import zlib
from typing import Any

import numpy as np

from fsdfm_jax import io
from fsdfm_jax.training import recipe

Row = dict[str, Any]
Arrays = dict[str, np.ndarray]


class Store:
    """The finished points of one report.

    Args:
      directory: made if needed.
      index, count: index of this machine and number of machines; each appends to a separate file.

    Raises:
      ValueError: for an index outside [0, count), or a damaged line in the files.
    """

    def __init__(self, directory: pathlib.Path, *, index: int = 0, count: int = 1):
        if not 0 <= index < count:
            raise ValueError(f"The machine index must be in [0, count), got {index} of {count}.")
        self._directory = directory
        name = "points.jsonl" if count == 1 else f"points-{index}-of-{count}.jsonl"
        self._path = directory / name
        self._rows: dict[str, Row] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the rows that any machine has finished; skip rows of earlier versions."""
        for path in sorted(self._directory.glob("points*.jsonl")):
            for line in io.read_jsonl(path):
                if not isinstance(line, dict):
                    raise ValueError(f"{path} has a line that isn't a result; remove the line.")
                if line.keys() >= _NEEDED:
                    row = {k: _numbers(v) if k in _NUMERIC else v for k, v in line.items()}
                    self._rows[row["slug"], recipe.digest(row["protocol"])] = row

    def finished(self, slug: str, protocol: dict[str, Any]) -> Row | None:
        """Return the row of a point with exactly this protocol if its files exist, else None."""
        row = self._rows.get((slug, recipe.digest(protocol)))
        if row is None:
            return None
        files = (row["samples_file"], row["scores_file"])
        return row if all((self._directory / name).is_file() for name in files) else None

    def arrays(self, slug: str, stamp: Any) -> Arrays | None:
        """Return the samples of a point with exactly this stamp."""
        return _load(self._directory / self.samples_file(slug, stamp))

    def has_arrays(self, slug: str, stamp: Any) -> bool:
        """Whether there is a file of just these samples; it isn't opened."""
        return (self._directory / self.samples_file(slug, stamp)).is_file()

    def scores(self, slug: str, protocol: dict[str, Any]) -> Arrays | None:
        """Return the per-sample values of a point with exactly this protocol."""
        return _load(self._directory / self.scores_file(slug, protocol))

    def earlier_scores(self, slug: str, stamp: Any, version: int) -> list[Arrays]:
        """Per-sample values of the same samples from other evaluations of the same version."""
        pattern = self.samples_file(slug, stamp).removesuffix(".npz") + "-*.npz"
        found = map(_load, sorted(self._directory.glob(pattern)))
        return [arrays for arrays in found if arrays and arrays.get("version") == version]

    def save_scores(
        self, slug: str, protocol: dict[str, Any], version: int, arrays: Arrays
    ) -> None:
        """Write a point's per-sample values; `version` is that of the protocol."""
        path = self._directory / self.scores_file(slug, protocol)
        io.write_arrays(path, arrays | {"version": np.asarray(version)})

    def save_arrays(self, slug: str, stamp: Any, arrays: Arrays) -> None:
        """Write a point's samples atomically, and remove its batches."""
        io.write_arrays(self._directory / self.samples_file(slug, stamp), arrays)
        shutil.rmtree(self._batches(slug, stamp), ignore_errors=True)

    def samples_file(self, slug: str, stamp: Any) -> str:
        """Return the file of a point's samples, relative to the directory."""
        return f"samples/{slug}-{recipe.digest(stamp)[:8]}.npz"

    def scores_file(self, slug: str, protocol: dict[str, Any]) -> str:
        """Return the file of a point's per-sample values, relative to the directory."""
        samples = self.samples_file(slug, protocol["samples"]).removesuffix(".npz")
        return f"{samples}-{recipe.digest(protocol['scoring'])[:8]}.npz"

    def batch(self, slug: str, stamp: Any, index: int) -> np.ndarray | None:
        """Return a batch of an unfinished point, None if it is missing or damaged."""
        try:
            return np.load(self._batches(slug, stamp) / f"{index:05d}.npy", allow_pickle=False)
        except (OSError, EOFError, ValueError):
            return None

    def save_batch(self, slug: str, stamp: Any, index: int, tokens_BL: np.ndarray) -> None:
        """Store a batch until the samples are complete."""
        io.write_array(self._batches(slug, stamp) / f"{index:05d}.npy", tokens_BL)

    def _batches(self, slug: str, stamp: Any) -> pathlib.Path:
        return self._directory / "samples" / f".{slug}-{recipe.digest(stamp)[:8]}"

    def add(self, row: Row) -> None:
        """Append a finished row; its samples must be stored already."""
        io.append_jsonl(self._path, row)
        self._rows[row["slug"], recipe.digest(row["protocol"])] = row


_NEEDED = {"slug", "protocol", "samples_file", "scores_file"}
# Entries of a row that contain numbers.
_NUMERIC = ("figures", "judges", "exact", "per_step", "milliseconds_per_sample", "compile_seconds")


def _load(path: pathlib.Path) -> Arrays | None:
    """Return all arrays of a file; None if it is missing or damaged, to make them again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        return None


def _numbers(value: Any) -> Any:
    """Convert "nan" and "inf" strings back to floats; JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
