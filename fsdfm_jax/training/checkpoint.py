"""Training checkpoints: saved in the background, restored bit for bit or not at all.

This is the only file that uses Orbax, through its public API. A checkpoint is a folder
`directory/<step>` with the leaves of a pytree under their path names
("opt_state/1/0/mu/block/kernel") and a JSON record: step, metadata, metrics, the shape, dtype and
checksum of each leaf, and a digest of the record. Containers (NamedTuples, tuples, None) come from
the abstract state given to `restore`; parts can be read without them.

    with Checkpoints(directory, retention=Retention(keep=2)) as checkpoints:
        found = checkpoints.restore_latest(abstract_state)  # (step, state) or None
        checkpoints.save(step, state, {"stage": "pretrain"})  # returns once the state is copied

Reading raises `DamagedCheckpoint` if the content isn't what was saved, `NotACheckpoint` if there is
no checkpoint or it is of another state, and OSError if permissions or memory are missing.
Checkpoints from before the checksums are read unchecked. All processes of a job call each method of
a `Checkpoints` on a shared folder, and get the same result or kind of error. The module's functions
read in one process.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import json
import logging
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from fsdfm_jax.parallel import processes
from fsdfm_jax.training.checksums import checksums

PyTree = Any
PathLike = str | os.PathLike
Leaves = dict[str, jax.ShapeDtypeStruct]
Sharding = jax.sharding.Sharding

_READ_BACK = 256 * 2**20  # bytes of arrays to read back after the first save
_MOST_IN_FLIGHT = 256 * 2**20  # bytes that `save_once` writes concurrently
_RUNNING, _BETWEEN_LOOKS = "running", 1.0  # seconds between polls of the other processes' saves
# Names of the arrays' part of a checkpoint, with and without checksums (older checkpoints).
_CHECKED, _UNCHECKED = "checked_state", "state"
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of folders being written or removed
_REMEDY = "; run the training command again: it resumes from the previous checkpoint"
_log = logging.getLogger("absl")


class NotACheckpoint(ValueError):  # noqa: N818
    """The checkpoint doesn't exist or is of another state; the message says which."""


class DamagedCheckpoint(NotACheckpoint):
    """The content isn't what was saved: files missing, truncated or changed, or folder renamed."""


class SaveFailed(OSError):  # noqa: N818
    """A checkpoint could not be written or read back; the message lists the complete ones."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep after a save; any one criterion is enough.

    Attributes:
      keep: Number of newest checkpoints, at least 1.
      keep_every: Keep steps that are a multiple of this; 0: none.
      keep_best: Number of checkpoints with the lowest finite `metric`, newer first; 0: none.
      metric: Key of the `metrics` of a save.

    Raises:
      ValueError: for other numbers.
    """

    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    metric: str = "loss"

    def __post_init__(self):
        for name, least in (("keep", 1), ("keep_every", 0), ("keep_best", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if not isinstance(self.metric, str) or not self.metric:
            raise ValueError(f"metric must be the name of a metric, got {self.metric!r}")

    def survivors(self, metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Return the steps to keep, given {step: metrics}."""
        steps = sorted(metrics)
        rank = lambda step: (metrics[step].get(self.metric, math.nan), -step)
        best = sorted((step for step in steps if math.isfinite(rank(step)[0])), key=rank)
        regular = {step for step in steps if self.keep_every and step % self.keep_every == 0}
        return regular.union(steps[-self.keep :], best[: self.keep_best])


class Checkpoints:
    """The checkpoints of one training run: `directory/<step>`, written in the background.

    Opening makes the directory and removes the remains of a killed save, so only the training job
    opens it.

    Args:
      directory: Folder of the checkpoints.
      retention: Which checkpoints to keep after a save.
      in_place: Save numpy arrays without copying or compressing them.

    Raises:
      ValueError: if the directory can't hold checkpoints.
      OSError: if it can't be made or cleaned up.
    """

    def __init__(self, directory: PathLike, *, retention: Retention, in_place: bool = False):
        self._directory, self._retention = absolute(directory), retention
        self._context = _context(everyone=True)
        if in_place:
            self._context.memory.deepcopy_host_arrays = False
            self._context.memory.write_concurrent_bytes = _MOST_IN_FLIGHT
            self._context.array.saving.use_compression = False
        # {step: metrics} of the intact ones; only in the first process, which removes old ones.
        self._metrics: dict[int, dict[str, float]] = {}
        self._newest = max(processes.from_first(self._open), default=None)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._unread = _READ_BACK  # bytes of the next save to read back
        if jax.process_count() > 1:
            self._check_place()

    def _open(self) -> list[int]:
        if self._directory.exists() and not self._directory.is_dir():
            raise ValueError(f"{self._directory} is a file; give the folder of the checkpoints")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for folder in self._directory.glob(f"*{_TEMPORARY}*"):
                folder.rmtree()
        except OSError as error:
            raise OSError(
                f"the checkpoint folder {self._directory} cannot be made or cleaned up: "
                f"{_short(error)}; make it writable and run the same command"
            ) from error
        steps = _steps(self._directory)
        for step in steps:  # damaged ones are never removed; `restore_latest` reports them
            with contextlib.suppress(DamagedCheckpoint):
                self._metrics[step] = _read_record(self._directory, step).metrics
        return steps

    def _check_place(self) -> None:
        """Check the folder before Orbax starts: processes wait minutes for one that can't write."""
        probe = lambda owner: self._directory / f"probe-{owner}{_TEMPORARY}"

        def put() -> list[int]:
            if not self._directory.is_dir():  # don't recreate it, perhaps on an unmounted volume
                raise FileNotFoundError(f"the folder {self._directory} has vanished")
            probe(os.getpid()).mkdir(exist_ok=True)
            return [os.getpid()]

        def look() -> None:
            if not probe(owner).exists():
                raise OSError(
                    f"{self._directory} is not the same folder for all processes; give a --workdir "
                    "that they share"
                )

        (owner,) = processes.from_first(put)
        try:
            processes.together(look)
        finally:
            if processes.is_first():
                probe(owner).rmdir()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, exc_type, *exc_info) -> None:
        if exc_type is None:
            self.wait()
        elif self._saving is not None:  # no collectives: other processes may not get here
            error = self._saving[1].exception()
            if error is not None:  # report it; the first exception propagates
                _log.warning("%s", error)

    def save(
        self,
        step: int,
        state: PyTree,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copy `state` and write it in the background; the caller may donate it right after.

        A checkpoint appears under its name once it is complete. It is then read back: its record
        and the list of its arrays, and after the first save also the smallest arrays, up to
        `_READ_BACK` bytes. Finally, checkpoints that `retention` doesn't keep are removed.

        Args:
          step: Optimiser steps completed; larger than any step in the directory.
          state: Non-empty JAX or NumPy arrays in nested containers.
          metadata: JSON dict to store.
          metrics: Must have `Retention.metric` if that is used; None: never among the best.

        Raises:
          ValueError: for an invalid argument.
          SaveFailed: if this save can't start or the previous one failed.
        """
        metric = self._retention.metric
        if self._retention.keep_best and metrics is not None and metric not in metrics:
            raise ValueError(
                f"the best checkpoints are chosen by {metric!r}, but the metrics are "
                f"{sorted(metrics)}; add it, or give None to exclude this checkpoint from the best"
            )
        leaves = _checked_leaves(state)
        self.wait()
        if self._newest is not None and step <= self._newest:
            raise ValueError(
                f"checkpoints must have increasing steps: got {step}, but {self._directory} "
                f"already has step {self._newest}"
            )
        record = _record(int(step), leaves, metadata, metrics or {})
        try:
            self._check_place()
            with self._context:
                response = ocp.save_async(
                    self._directory / str(int(step)),
                    _nest(leaves),
                    checkpointable_name=_CHECKED,
                    custom_metadata=record,
                )
        except jax.errors.JaxRuntimeError:  # another process is gone
            raise
        except Exception as error:  # Orbax and TensorStore raise many types
            raise self._failed(int(step), "could not be written to", error) from error
        self._saving = int(step), self._thread.submit(self._complete, response, record)

    def _complete(self, response: ocp.AsyncResponse, record: dict[str, Any]) -> str:
        """In the background: wait for the write, read it back, remove old checkpoints."""
        step, what = record["step"], "could not be written to"
        try:
            response.result()
            if not processes.is_first():
                return "saved"
            what = "was written but cannot be read back from"
            read = _read_back(self._directory, record, self._unread)
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types
            raise self._failed(step, what, error) from error
        self._unread = 0
        self._metrics[step] = read.metrics
        for old in sorted(self._metrics.keys() - self._retention.survivors(self._metrics)):
            try:  # rename first: if killed half-way, the rest doesn't look like a checkpoint
                going = self._directory / f"{old}.old{_TEMPORARY}"
                (self._directory / str(old)).rename(going).rmtree()
            except OSError as error:
                _log.warning("checkpoint %d could not be removed: %s", old, _short(error))
            del self._metrics[old]
        return "saved"

    def _failed(self, step: int, what: str, error: Exception) -> SaveFailed:
        try:
            complete = [str(other) for other in _steps(self._directory) if other != step]
        except OSError:
            complete = ["unknown, the folder can't be listed"]
        return SaveFailed(
            f"the checkpoint of step {step} {what} {self._directory}: {_short(error)}. Complete "
            f"checkpoints there: {', '.join(complete) or 'none'}. Free space or make it writable, "
            "then run the same command: it resumes from the newest"
        )

    def wait(self) -> None:
        """Wait for a running save; raise SaveFailed if it failed in any process.

        After a failure, Orbax's threads in the other processes wait for minutes: exit without
        joining them.
        """
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        states = [_RUNNING]
        while _RUNNING in states:
            concurrent.futures.wait([saving], _BETWEEN_LOOKS)
            state = saving.result if saving.done() else lambda: _RUNNING
            states = processes.everyone_says(processes.together(state, SaveFailed))
        self._newest = step

    def restore_latest(self, abstract_state: PyTree) -> tuple[int, PyTree] | None:
        """Restore (step, state) from the newest intact checkpoint; None if there are none at all.

        Newer, damaged checkpoints are reported in a warning and moved to the folder "damaged"
        beside `directory`. Raises, without moving anything, as `restore` does, or DamagedCheckpoint
        if no checkpoint is intact.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                state = self.restore(abstract_state, step)
            except DamagedCheckpoint as error:
                damaged[step] = str(error).removesuffix(_REMEDY)
                continue
            processes.from_first(lambda step=step: self._set_aside(damaged, step))
            self._newest = step
            return step, state
        if damaged:
            raise DamagedCheckpoint(
                f"no checkpoint in {self._directory} is intact: {'; '.join(damaged.values())}. "
                "Restore one from a backup, or move the folder away to start over"
            )
        return None

    def _set_aside(self, damaged: Mapping[int, str], step: int) -> list[int]:
        folder = self._directory.with_name("damaged")
        for bad, what in damaged.items():
            folder.mkdir(exist_ok=True)
            new, number = folder / str(bad), 1
            while new.exists():
                number += 1
                new = folder / f"{bad}-{number}"
            (self._directory / str(bad)).rename(new)
            self._metrics.pop(bad, None)
            _log.warning("%s; moved to %s, resuming from step %d", what, new, step)
        return []

    def restore(self, abstract_state: PyTree, step: int | None = None) -> PyTree:
        """Read a state with the shardings of `abstract_state`; the saved shardings don't matter.

        Args:
          abstract_state: Pytree of `jax.ShapeDtypeStruct` with shardings, or of arrays.
          step: Which checkpoint; None is the newest.

        Returns:
          The state, bit for bit as saved, in the containers of `abstract_state`. Leaves with 64-bit
          dtypes are numpy arrays unless JAX has x64 enabled.
        """
        self.wait()
        wanted = _named_leaves(abstract_state)
        for name, leaf in wanted.items():
            if getattr(leaf, "sharding", None) is None:
                raise ValueError(
                    f"abstract leaf {name!r} has no sharding; build it as "
                    "jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
                )
            wanted[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        record = _find(self._directory, step, together=True)
        _check_same(record.leaves, wanted, self._directory)
        leaves = _load(self._directory, record, wanted, together=True)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves.values())

    def steps(self) -> list[int]:
        """Steps of the checkpoints in the directory, damaged ones too; waits for a running save."""
        self.wait()
        return processes.from_first(lambda: _steps(self._directory))

    def latest_step(self) -> int | None:
        """As the function `latest_step`, in all processes; waits for a running save."""
        self.wait()
        latest = lambda: [step for step in [latest_step(self._directory)] if step is not None]
        return next(iter(processes.from_first(latest)), None)

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """As `read_metadata`, in all processes; waits for a running save."""
        self.wait()
        return _find(self._directory, step, together=True).metadata

    close = wait


def save_once(directory: PathLike, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
    """Write one checkpoint into a new directory, using almost no memory besides `state`.

    For conversion: it returns when everything is on disk, and neither copies nor compresses (float
    weights barely shrink). If it raises, as `Checkpoints.save` does, it leaves nothing behind.

    Args:
      directory: Folder of the checkpoints; must not exist.
      step, state, metadata: As in `Checkpoints.save`; numpy arrays, not to be changed meanwhile.
    """
    directory = absolute(directory)
    if directory.exists():
        raise ValueError(f"{directory} exists already; a new folder was expected")
    try:
        with Checkpoints(directory, retention=Retention(), in_place=True) as checkpoints:
            checkpoints.save(step, state, metadata)
    except BaseException:
        directory.rmtree(missing_ok=True)
        raise


@dataclasses.dataclass(frozen=True)
class Record:
    """The description of a checkpoint, without its arrays.

    Attributes:
      step, metadata, metrics: As given to `Checkpoints.save`.
      leaves: Name -> abstract leaf.
      checksums: Name -> checksum; None for checkpoints from before the checksums.
      digest: Digest of the above; "" without checksums.
    """

    step: int
    leaves: Leaves
    metadata: dict[str, Any]
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    checksums: dict[str, str] | None = None
    digest: str = ""


def restore_part(
    directory: PathLike,
    names: tuple[str, ...],
    step: int | Record | None = None,
    *,
    sharding: Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding] | None = None,
    together: bool = False,
) -> dict[str, Any]:
    """Read only the named subtrees of a checkpoint, without an abstract state.

    Args:
      directory: Folder that a `Checkpoints` wrote.
      names: Subtrees or leaves: "ema", "step", "params/embed".
      step: Which checkpoint; None is the newest. Passing a `Record` avoids reading it again, which
        takes longer than a small leaf.
      sharding: For all leaves, or a function (leaf name, abstract leaf) -> sharding; None puts them
        on this process's first device.
      together: All processes of a job call with the same step, and get the same result or kind of
        error. Required if the sharding spans processes.

    Returns:
      {name: subtree}: nested dicts of arrays (a tuple is a dict with keys "0", "1", ...), or the
      array of a leaf. Leaves with 64-bit dtypes are numpy arrays unless JAX has x64 enabled.
    """
    directory = absolute(directory)
    if isinstance(names, str):
        raise ValueError(f"names must be a tuple of subtree names, got the string {names!r}")
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    record = _find(directory, step, together=together)
    wanted: Leaves = {}
    for part in names:
        for name, leaf in _part(record.leaves, part, directory).items():
            place = sharding(name, leaf) if callable(sharding) else sharding
            wanted[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    if not (together or all(leaf.sharding.is_fully_addressable for leaf in wanted.values())):
        raise ValueError("the sharding has devices of other processes; use together=True in all")
    tree = _nest(_load(directory, record, wanted, together=together))
    return {part: functools.reduce(operator.getitem, part.split("/"), tree) for part in names}


def read_record(directory: PathLike, step: int | Record | None = None) -> Record:
    """Read the record of a checkpoint (None: the newest); return a given record unchanged."""
    return _find(absolute(directory), step)


def leaf_shapes(directory: PathLike, part: str, step: int | Record | None = None) -> Leaves:
    """{name within `part`: abstract leaf} of one subtree."""
    inside = _part(read_record(directory, step).leaves, part, directory)
    return {name.removeprefix(f"{part}/"): leaf for name, leaf in inside.items()}


def read_metadata(directory: PathLike, step: int | None = None) -> dict[str, Any]:
    """Read the JSON dict saved with a checkpoint (None: the newest)."""
    return read_record(directory, step).metadata


def newest_step(directory: PathLike) -> int | None:
    """Step of the newest checkpoint, damaged or not; the directory may be missing or empty.

    Used for reading weights, so that a damaged checkpoint is an error and isn't skipped.
    """
    return max(_steps(absolute(directory)), default=None)


def latest_step(directory: PathLike) -> int | None:
    """As `newest_step`, but skips damaged records with a warning, as training does."""
    directory = absolute(directory)
    for step in reversed(_steps(directory)):
        try:
            return _read_record(directory, step).step
        except DamagedCheckpoint as error:
            _log.warning("%s", error)
    return None


def absolute(directory: PathLike) -> epath.Path:
    """Absolute path of a checkpoint folder; ValueError if the storage layer can't handle it."""
    path = _Path(os.fspath(directory)).expanduser()
    if "://" not in os.fspath(directory):
        path = path.absolute()
    is_text = str(path) == str(path).encode(errors="replace").decode()
    if "\\" in str(path) or not is_text:
        backslash = "has a backslash, which the storage layer treats as a separator"
        raise ValueError(
            f"checkpoints cannot be stored in {str(path)!r}: the path "
            f"{backslash if is_text else 'is not valid UTF-8'}; choose another folder"
        )
    return path


# ------------------------------------------------------------------------------------- records


def _record(step: int, leaves, metadata, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return the JSON dict stored with a checkpoint; the inverse of `_parsed`."""
    sums = checksums(leaves)
    try:
        metadata = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint metadata must be a JSON dict: {error}") from error
    content = {
        "step": step,
        "metadata": metadata,
        "metrics": {name: repr(float(value)) for name, value in metrics.items()},  # may be NaN
        "leaves": {
            name: [str(leaf.dtype), list(leaf.shape), sums[name]] for name, leaf in leaves.items()
        },
    }
    return content | {"sha256": _digest(content)}


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _parsed(record: Mapping[str, Any]) -> Record:
    """Parse the output of `_record`; raise some exception for anything else."""
    content = {key: value for key, value in record.items() if key != "sha256"}
    if record["sha256"] != _digest(content):
        raise ValueError("its digest is wrong")
    leaves, sums = {}, {}
    for name, (dtype, shape, checksum) in content["leaves"].items():
        leaves[name] = jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype))
        sums[name] = checksum
    metrics = {name: float(value) for name, value in content["metrics"].items()}
    return Record(content["step"], leaves, content["metadata"], metrics, sums, record["sha256"])


def _read_record(directory: epath.Path, step: int, *, arrays: bool = False) -> Record:
    """Read a record; with `arrays`, also check that the storage layer lists all arrays."""
    folder = directory / str(step)
    # The name of a folder tells the two kinds apart, so that no change inside a file can turn a
    # checkpoint with checksums into one without.
    checked = (folder / _CHECKED).is_dir()
    with _reading(directory, step, "its metadata"), _context():
        found = ocp.metadata(folder, _CHECKED if checked else _UNCHECKED)
        listed = {
            name: jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype))
            for name, leaf in _named_leaves(found.metadata).items()
        }
        if not checked:
            return Record(step, listed, found.custom_metadata or {})
        record = _parsed(found.custom_metadata or {})
    if record.step != step:
        raise _damaged(directory, step, f"it was saved as step {record.step}")
    if arrays and listed != record.leaves:
        raise _damaged(directory, step, "not all of its arrays are there")
    return record


def _find(directory: epath.Path, step: int | Record | None, *, together: bool = False) -> Record:
    """Return the record of a checkpoint (None: the newest); `together`: in all processes."""

    def find() -> Record:
        if not directory.is_dir():
            raise NotACheckpoint(f"there is no directory {directory}; give the one of a run")
        number, steps = step.step if isinstance(step, Record) else step, _steps(directory)
        if not steps:
            raise NotACheckpoint(
                f"there is no complete checkpoint in {directory}; give the directory of a run "
                "whose subfolders are step numbers"
            )
        if number not in (None, *steps):
            raise NotACheckpoint(f"there is no step {number} in {directory}; it has {steps}")
        known = isinstance(step, Record)
        return step if known else _read_record(directory, steps[-1] if number is None else number)

    if not together:
        return find()
    record = processes.together(find, DamagedCheckpoint)
    if len(set(processes.everyone_says(f"{record.step} {record.digest}"))) > 1:
        raise OSError(
            f"the processes read different checkpoints in {directory}; give a folder that they "
            "all share"
        )
    return record


# -------------------------------------------------------------------------------------- arrays


def _read_back(directory: epath.Path, record: Mapping[str, Any], limit: int) -> Record:
    """Raise unless the checkpoint can be read; checks the smallest arrays, up to `limit` bytes."""
    found = _read_record(directory, record["step"], arrays=True)
    if found.digest != record["sha256"]:
        raise _damaged(directory, found.step, "its metadata is that of another save")
    nbytes = lambda name: found.leaves[name].size * found.leaves[name].dtype.itemsize
    wanted: Leaves = {}
    for name in sorted(found.leaves, key=nbytes):
        limit -= nbytes(name)
        if limit >= 0:
            wanted[name] = found.leaves[name]
    if wanted:
        _load(directory, found, wanted)
    return found


def _load(directory: epath.Path, record: Record, wanted, *, together=False) -> dict[str, Any]:
    """Read and check leaves, in the order of `wanted`; those without a sharding as numpy arrays.

    Uses Orbax's pytree handler: `ocp.load` counts its calls and derives the barrier names of the
    next save from the count, so processes with different numbers of reads would deadlock.
    """
    agree = lambda act: processes.together(act, DamagedCheckpoint) if together else act()
    kinds = lambda leaves: {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    folder = directory / str(record.step) / (_UNCHECKED if record.checksums is None else _CHECKED)
    abstract = {}
    for name, leaf in wanted.items():  # a JAX array would silently lose half of 64 bits
        as_jax = leaf.sharding and jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype
        abstract[name] = leaf if as_jax else np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)

    async def load() -> PyTree:
        return await (await ocp.handlers.PyTreeHandler().load(folder, _nest(abstract)))

    def run() -> PyTree:
        with _context():
            return asyncio.run(load())

    def read() -> dict[str, Any]:  # in a thread: a notebook's main thread already has a loop
        with (
            _reading(directory, record.step, "it"),
            concurrent.futures.ThreadPoolExecutor(1) as thread,
        ):
            leaves = jax.block_until_ready(_named_leaves(thread.submit(run).result()))
            if kinds(leaves) != kinds(wanted):
                raise ValueError("its arrays are not those that were saved")
            return leaves

    leaves = agree(read)
    sums = {} if record.checksums is None else checksums(leaves)

    def check() -> None:
        wrong = [name for name, value in sums.items() if value != record.checksums[name]]
        if wrong:
            shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if wrong[5:] else "")
            raise _damaged(directory, record.step, f"the checksums of {shown} are wrong")

    agree(check)
    return {name: leaves[name] for name in wanted}


def _context(*, everyone: bool = False) -> ocp.Context:
    """Orbax's settings; without `everyone` this process doesn't wait for others."""
    context = ocp.Context()
    context.file.path_class = _Path
    context.asynchronous.create_directories_asynchronously = False  # so that `save` raises
    context.pytree.loading.partial_load = True
    if not everyone:
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
    return context


# -------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def _reading(directory: epath.Path, step: int, what: str) -> Iterator[None]:
    """Convert any exception from a damaged file to DamagedCheckpoint.

    Missing permissions or memory, or a removed folder, are not damage: they raise OSError.
    """
    try:
        yield
    except Exception as error:
        codes = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "Permission denied")
        lacking = any(code in str(error) for code in codes)
        gone = not (directory / str(step)).is_dir()
        if gone or lacking or isinstance(error, MemoryError | PermissionError):
            reason = (
                "its folder doesn't exist (any more) for this process" if gone else _short(error)
            )
            raise OSError(
                f"the checkpoint of step {step} in {directory} cannot be read now: {reason}"
            ) from error
        raise _damaged(directory, step, f"{what} cannot be read ({_short(error)})") from error


def _damaged(directory: epath.Path, step: int, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"the checkpoint of step {step} in {directory} is damaged: {what}{_REMEDY}"
    )


def _short(error: BaseException) -> str:
    """Return the root cause of an error in one line, truncated: some messages are pages long."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).removesuffix(_REMEDY).split()) or type(error).__name__
    for details in (" [source locations=", " [tensorstore_spec"):
        text = text.partition(details)[0]
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-175:]}"


def _check_same(saved: Leaves, wanted: Mapping[str, Any], directory: epath.Path) -> None:
    """Raise NotACheckpoint listing the leaves that differ (at most 20)."""
    problems = [f"missing in the checkpoint: {name}" for name in wanted if name not in saved]
    problems += [f"only in the checkpoint: {name}" for name in saved if name not in wanted]
    for name, new in wanted.items():
        old = saved.get(name, new)
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            problems.append(
                f"{name}: saved {old.dtype}{list(old.shape)}, expected {new.dtype}{list(new.shape)}"
            )
    if problems:
        more = [f"... and {len(problems) - 20} more"] if problems[20:] else []
        raise NotACheckpoint(
            f"the checkpoint in {directory} doesn't match this state (another configuration?):\n  "
            + "\n  ".join(problems[:20] + more)
        )


def _keep_message(record: logging.LogRecord) -> bool:
    """Drop Orbax's progress reports and its threads' tracebacks, which are raised here anyway."""
    if os.path.join("orbax", "checkpoint", "") not in record.pathname:
        return True
    return record.levelno > logging.INFO and "_SignalingThread" not in str(record.msg)


_log.addFilter(_keep_message)


# --------------------------------------------------------------------------- folders and names


class _Path(type(epath.Path())):
    """A path that isn't itself a glob pattern: Orbax globs below the folder of a step."""

    def glob(self, pattern: str) -> Iterator["_Path"]:
        """Yield the paths in this folder that match."""
        first, _, rest = pattern.partition("/")
        for path in self.iterdir() if self.is_dir() else ():
            if fnmatch.fnmatchcase(path.name, first):
                yield from path.glob(rest) if rest else (path,)


def _steps(directory: epath.Path) -> list[int]:
    """Steps that have a folder, in order; empty if there is no directory."""
    folders = directory.iterdir() if directory.is_dir() else ()
    names = [folder.name for folder in folders if folder.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def _checked_leaves(state: PyTree) -> dict[str, Any]:
    leaves = _named_leaves(state)
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise ValueError(
                f"a state must have only arrays, but {name!r} is {type(leaf).__name__}; "
                "put numbers into arrays and everything else into the metadata"
            )
        if not leaf.size:
            raise ValueError(
                f"leaf {name!r} has no elements (shape {list(leaf.shape)}); leave it out"
            )
        if isinstance(leaf, np.generic):  # Orbax doesn't accept these
            leaves[name] = np.asarray(leaf)
    return leaves


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """{"params/block/kernel": leaf}, in the order of `jax.tree.leaves`.

    "/" and "." are not allowed in keys. "/" separates names here. "." separates them inside Orbax,
    where {"a.b": x, "a": {"b": y}} would silently be one name.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "." in name or "" in name.split("/") or name.count("/") != len(path) - 1:
            raise ValueError(
                f"leaf {jax.tree_util.keystr(path)!r} cannot be named in a checkpoint: a state "
                'must be a container with non-empty keys without "/" and "."'
            )
        leaves[name] = leaf
    return leaves


def _part(saved: Leaves, part: str, directory: PathLike) -> Leaves:
    """Return the leaves of a subtree, or a single leaf; NotACheckpoint if there is none."""
    inside = {name: leaf for name, leaf in saved.items() if f"{name}/".startswith(f"{part}/")}
    if not inside:
        tops = sorted({name.split("/")[0] for name in saved})
        raise NotACheckpoint(
            f"the checkpoint in {directory} has no part {part!r}; it has {', '.join(tops)}"
        )
    return inside


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return tree
