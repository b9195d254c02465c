"""Blocks read per second from a prepared folder, compared with what training consumes.

  python -m benchmarks.reading --directory=DIR --tokens_per_second=100000 --threads=1,2,4

Each case reads training batches (`Batches.iterate`), shuffled over the whole split, with a given
number of threads. "cold" first asks the system to drop the files from its cache. It may drop only
some, and caches of file servers are not affected. "warm" first reads all files. The column `cached`
is the share of the files in memory at the start of the case, if the system reports it.
"""

import mmap
import os
import statistics
import time
from typing import Any

from absl import app, flags

from benchmarks import measure
from fsdfm_jax.data import prepared as prepared_lib

_DIRECTORY = flags.DEFINE_string("directory", None, "Prepared folder.", required=True)
_SPLIT = flags.DEFINE_string("split", "train", "Split.")
_THREADS = flags.DEFINE_list("threads", ["1", "2", "4"], "Numbers of threads, comma-separated.")
_BATCH_SIZE = flags.DEFINE_integer("rows", 128, "Blocks per batch.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Seconds per measurement.", lower_bound=0.01)
_CONSUMED = flags.DEFINE_float(
    "tokens_per_second", None, "Tokens per second that training consumes per reading process."
)


def files_of(prepared: prepared_lib.PreparedData, split: str) -> list[str]:
    """Return the paths of a split's shards, including those of a mixture's members."""
    folders = prepared.members or (prepared,)
    return [
        str(folder.directory / file.name)
        for folder in folders
        for file in folder.files
        if file.split == split
    ]


def drop_from_cache(paths: list[str]) -> None:
    """Ask the system to drop files from its cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages can't be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_through(paths: list[str]) -> None:
    """Read files to bring them into the system's cache, as far as they fit."""
    for path in paths:
        with open(path, "rb") as stream:
            while stream.read(1 << 24):
                pass


def cached_share(paths: list[str]) -> float | None:
    """Return the share of the files' pages in memory; None if the system doesn't report it."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "mincore"):
        return None
    present = pages = 0
    for path in paths:
        size = os.path.getsize(path)
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), size, mmap.MAP_PRIVATE) as view:
            address = ctypes.addressof(anchor := ctypes.c_char.from_buffer(view))
            count = -(-size // mmap.PAGESIZE)
            states = (ctypes.c_ubyte * count)()
            failed = library.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states)
            del anchor  # so that the file can be closed
            if failed:
                return None
            present += sum(state & 1 for state in states)
            pages += count
    return present / pages


def blocks_per_second(
    batches: prepared_lib.Batches, *, threads: int, rows: int, seconds: float
) -> float:
    """Measure blocks per second over `seconds`, after the threads have started."""
    stream = batches.iterate(num_threads=threads, prefetch=2 * threads)
    next(stream)
    began = time.perf_counter()
    read = 0
    while (passed := time.perf_counter() - began) < seconds:
        next(stream)
        read += rows
    stream.close()
    return read / passed


def table_of(
    found: dict[tuple[int, str], list[dict[str, Any]]], length: int, consumed: float | None
) -> list[dict[str, Any]]:
    """Make one row per case: the medians over its rounds."""
    rows = []
    for (threads, cache), values in found.items():
        blocks = statistics.median(value["blocks"] for value in values)
        shares = [value["cached"] for value in values]
        row = {
            "threads": threads,
            "cache": cache,
            "cached": None if None in shares else statistics.median(shares),
            "blocks/s": blocks,
            "tokens/s": blocks * length,
        }
        if consumed:
            row["times what is consumed"] = blocks * length / consumed
        rows.append(row)
    return rows


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    prepared = prepared_lib.load(_DIRECTORY.value)
    paths, rows = files_of(prepared, _SPLIT.value), _BATCH_SIZE.value
    cases = [(int(threads), cache) for threads in _THREADS.value for cache in ("cold", "warm")]
    found: dict[tuple[int, str], list[dict[str, Any]]] = {case: [] for case in cases}
    for number in range(measure.ROUNDS.value + 1):
        for threads, cache in cases:
            drop_from_cache(paths) if cache == "cold" else read_through(paths)
            share = cached_share(paths)
            # Reopen, so that no reader has buffered data; one seed per round.
            source = prepared.source(_SPLIT.value)
            batches = prepared_lib.Batches(source, batch_size=rows, seed=number)
            blocks = blocks_per_second(batches, threads=threads, rows=rows, seconds=_SECONDS.value)
            if number:  # the first round isn't counted
                found[threads, cache].append({"blocks": blocks, "cached": share})
    table = table_of(found, prepared.block_length, _CONSUMED.value)
    measure.print_table(table)
    measure.write({"machine": measure.machine(), "rows": table})


if __name__ == "__main__":
    app.run(main)
