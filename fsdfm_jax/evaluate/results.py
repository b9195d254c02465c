"""Finished points on disk: one line of JSON each, and their samples; nothing is computed twice.

    DIR/points.jsonl                a row per line; of a point computed again, the last one counts
    DIR/points-2-of-8.jsonl         those of machine 2 of 8; all of them are read
    DIR/samples/SLUG-S.npz          tokens, what was given, what they cost
    DIR/samples/SLUG-S-F.npz        what each figure is aggregated from
    DIR/samples/.SLUG-S/            batches of a point that isn't drawn to its end yet

S is the digest of everything the samples depend on, F that of what is made of them (the two parts
of a protocol), so that no file ever takes the place of another.
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
        """Reads what any machine has finished by now; rows of earlier versions are passed over."""
        for path in sorted(self._directory.glob("points*.jsonl")):
            for line in io.read_jsonl(path):
                if not isinstance(line, dict):
                    raise ValueError(f"{path} holds a line that is no result; remove the line.")
                if line.keys() >= _NEEDED:
                    row = {k: _numbers(v) if k in _NUMERIC else v for k, v in line.items()}
                    self._rows[row["slug"], recipe.digest(row["protocol"])] = row

    def finished(self, slug: str, protocol: dict[str, Any]) -> Row | None:
        """The row of a point computed under exactly this protocol, with its files there."""
        row = self._rows.get((slug, recipe.digest(protocol)))
        if row is None:
            return None
        files = (row["samples_file"], row["scores_file"])
        return row if all((self._directory / name).is_file() for name in files) else None

    def arrays(self, slug: str, stamp: Any) -> Arrays | None:
        """The samples of a point drawn under exactly this stamp."""
        return _load(self._directory / self.samples_file(slug, stamp))

    def has_arrays(self, slug: str, stamp: Any) -> bool:
        """Whether there is a file of just these samples; it isn't opened."""
        return (self._directory / self.samples_file(slug, stamp)).is_file()

    def scores(self, slug: str, protocol: dict[str, Any]) -> Arrays | None:
        """What the figures of a point under exactly this protocol are aggregated from."""
        return _load(self._directory / self.scores_file(slug, protocol))

    def earlier_scores(self, slug: str, stamp: Any, version: int) -> list[Arrays]:
        """What other evaluations by the same version made of the same samples."""
        pattern = self.samples_file(slug, stamp).removesuffix(".npz") + "-*.npz"
        found = map(_load, sorted(self._directory.glob(pattern)))
        return [arrays for arrays in found if arrays and arrays.get("version") == version]

    def save_scores(
        self, slug: str, protocol: dict[str, Any], version: int, arrays: Arrays
    ) -> None:
        """Writes what a point's figures are aggregated from; `version`: of the protocol."""
        path = self._directory / self.scores_file(slug, protocol)
        io.write_arrays(path, arrays | {"version": np.asarray(version)})

    def save_arrays(self, slug: str, stamp: Any, arrays: Arrays) -> None:
        """Writes a point's samples, whole or not at all; its batches aren't needed any more."""
        io.write_arrays(self._directory / self.samples_file(slug, stamp), arrays)
        shutil.rmtree(self._batches(slug, stamp), ignore_errors=True)

    def samples_file(self, slug: str, stamp: Any) -> str:
        """The file of a point's samples, relative to the directory."""
        return f"samples/{slug}-{recipe.digest(stamp)[:8]}.npz"

    def scores_file(self, slug: str, protocol: dict[str, Any]) -> str:
        """The file of what is made of them."""
        samples = self.samples_file(slug, protocol["samples"]).removesuffix(".npz")
        return f"{samples}-{recipe.digest(protocol['scoring'])[:8]}.npz"

    def batch(self, slug: str, stamp: Any, index: int) -> np.ndarray | None:
        """A batch of a point that wasn't drawn to its end, None if it is missing or damaged."""
        try:
            return np.load(self._batches(slug, stamp) / f"{index:05d}.npy", allow_pickle=False)
        except (OSError, EOFError, ValueError):
            return None

    def save_batch(self, slug: str, stamp: Any, index: int, tokens_BL: np.ndarray) -> None:
        """Keeps a batch until the samples are whole."""
        io.write_array(self._batches(slug, stamp) / f"{index:05d}.npy", tokens_BL)

    def _batches(self, slug: str, stamp: Any) -> pathlib.Path:
        return self._directory / "samples" / f".{slug}-{recipe.digest(stamp)[:8]}"

    def add(self, row: Row) -> None:
        """Appends a finished row; its samples have to be there."""
        io.append_jsonl(self._path, row)
        self._rows[row["slug"], recipe.digest(row["protocol"])] = row


_NEEDED = {"slug", "protocol", "samples_file", "scores_file"}
# Where numbers stand in a row.
_NUMERIC = ("figures", "judges", "exact", "per_step", "milliseconds_per_sample", "compile_seconds")


def _load(path: pathlib.Path) -> Arrays | None:
    """All arrays of a file, None if it isn't there or is damaged: then they are made again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        return None


def _numbers(value: Any) -> Any:
    """JSON has no nan and inf; the writer stores them as strings."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
