"""Saving training states, and restoring them or nothing; the only file that knows Orbax.

A checkpoint is the leaves of one pytree under their path names ("params/block/kernel",
"opt_state/1/0/mu/block/kernel"), stored as nested dicts, plus one JSON dict of metadata. Containers
(NamedTuples, tuples, empty optimiser states, None) are not stored: they come back from the abstract
state that `Checkpoints.restore` is given, and a part can be read without knowing them.

    with Checkpoints(directory, retention=Retention(keep=2)) as checkpoints:
        found = checkpoints.restore_latest(abstract_state)  # (step, state) or None
        checkpoints.save(step, state, {"stage": "pretrain"})  # returns once the state is copied

Each leaf is stored with its checksum (`checksums`), and these, the names, shapes, dtypes,
the step, the metrics and the metadata with a digest of all of it. What is read is checked: a state
comes back bit for bit or not at all. A damaged checkpoint is a `DamagedCheckpoint`, an intact one
of another state a `NotACheckpoint`. Checkpoints from before the checksums are read unchecked.

With several processes each of them makes every call of a `Checkpoints`, and `directory` is one they
share; all come to the same result or the same kind of error. The functions below it read on their
own: any process may call them alone, unless the arrays it asks for lie on other processes too.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from fsdfm_jax.parallel import processes
from fsdfm_jax.training.checksums import checksums

PyTree = Any
Sharding = jax.sharding.Sharding
T = TypeVar("T")


class NotACheckpoint(ValueError):  # noqa: N818 - named after what it says
    """The directory holds no such checkpoint, or not one of this tree; the message says which."""


class DamagedCheckpoint(NotACheckpoint):
    """A checkpoint is not what was saved: files missing, cut or changed, or the folder renamed."""


class SaveFailed(OSError):  # noqa: N818
    """A checkpoint could not be written; the message says why and which complete ones there are."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints survive a save; any one reason is enough.

    Attributes:
      keep: The newest so many; at least 1.
      keep_every: Those whose step is a multiple of this; 0: none.
      keep_best: So many with the lowest value of `metric` (the newer of two equal ones); 0: none. A
        checkpoint without that metric, or where it is not finite, is never among them.
      metric: Name of an entry of the `metrics` of a save.

    Raises:
      ValueError: A number is too small or no integer, or `metric` is empty.
    """

    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    metric: str = "loss"

    def __post_init__(self):
        for name, least, meaning in (
            ("keep", 1, "how many of the newest checkpoints stay"),
            ("keep_every", 0, "a number of steps, 0 for none"),
            ("keep_best", 0, "a number of checkpoints, 0 for none"),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be at least {least} ({meaning}), got {value!r}")
        if not isinstance(self.metric, str) or not self.metric:
            raise ValueError(f"metric must be the name of a metric, got {self.metric!r}")

    def survivors(self, metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The steps that stay, of {step: its metrics}."""
        policies = ocp.training.preservation_policies
        found = [
            ocp.training.CheckpointMetadata(step, path="", metadata=None, metrics=metrics[step])
            for step in sorted(metrics)
        ]
        value = lambda values: values.get(self.metric, math.nan)
        ranked = [checkpoint for checkpoint in found if math.isfinite(value(checkpoint.metrics))]
        rules = [(policies.LatestN(self.keep), found)]
        if self.keep_every:
            rules.append((policies.EveryNSteps(self.keep_every), found))
        if self.keep_best:  # given only those that can be best: of few it keeps all
            best = policies.BestN(get_metric_fn=value, reverse=True, n=self.keep_best)
            rules.append((best, ranked))
        context = policies.PreservationContext()
        return {
            checkpoint.step
            for rule, candidates in rules
            for checkpoint, stays in zip(
                candidates, rule.should_preserve(candidates, context=context), strict=True
            )
            if stays
        }


class Checkpoints:
    """The checkpoints of one training run: `directory/<step>`, written in the background.

    Opening the directory creates it where needed and removes what a killed save left there, so only
    the job that trains opens it; readers use `restore_part` and `read_metadata`, which change
    nothing.

    Args:
      directory: Folder of the checkpoints.
      retention: Which checkpoints survive a save.

    Raises:
      ValueError: `directory` is a file.
      OSError: It cannot be made or cleaned.
    """

    def __init__(self, directory: str | os.PathLike, *, retention: Retention):
        self._directory = _absolute(directory)
        self._retention = retention
        # {step: metrics} of those with intact metadata, in the first process: it removes old ones.
        self._metrics: dict[int, dict[str, float]] = {}
        steps = processes.from_first(self._open)
        self._check_that_it_is_shared()
        self._newest = max(steps, default=None)
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._saves = 0

    def _open(self) -> list[int]:
        if self._directory.exists() and not self._directory.is_dir():
            raise ValueError(f"{self._directory} is a file; give the folder of the checkpoints")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for folder in self._directory.iterdir():
                if _TEMPORARY in folder.name:
                    folder.rmtree()
        except OSError as error:
            raise OSError(
                f"the folder of checkpoints {self._directory} cannot be made or cleaned up: "
                f"{_short(error)}; make it writable and run the same command"
            ) from error
        steps = _steps(self._directory)
        for step in steps:
            # A damaged one is neither counted nor removed; `restore_latest` names it.
            with contextlib.suppress(DamagedCheckpoint):
                self._metrics[step] = _read_record(self._directory, step).metrics
        return steps

    def _check_that_it_is_shared(self) -> None:
        """With a folder for each host, the first save would never be complete."""
        if jax.process_count() == 1:
            return
        probe = lambda number: self._directory / f"probe.{number}{_TEMPORARY}"

        def put() -> list[int]:
            number = random.SystemRandom().randrange(2**31)
            probe(number).mkdir()
            return [number]

        (number,) = processes.from_first(put)

        def look() -> None:
            if not probe(number).exists():
                raise OSError(
                    f"{self._directory} is not the same folder for all processes; give a --workdir "
                    "that they share"
                )

        try:
            _together(look)
        finally:
            if processes.is_first():
                probe(number).rmdir()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, exc_type, *exc_info) -> None:
        try:
            self.close()
        except SaveFailed as error:
            if exc_type is None:
                raise
            _log.warning("%s", error)  # what went wrong first is what must be told

    def save(
        self,
        step: int,
        state: PyTree,
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Copies `state` to the host and starts to write it; the caller may donate it right after.

        The checkpoint appears under its name only once it is complete; those that `retention` does
        not keep go after that. A save that is still running is waited for first.

        Args:
          step: Optimiser steps completed; larger than that of every checkpoint in the directory.
          state: Pytree of arrays (jax or numpy), none empty. Keys must not contain "/" or ".".
          metadata: JSON dict, returned by `metadata` (tuples come back as lists).
          metrics: {name: number}, for `retention`; None: this one is never among the best.

        Raises:
          ValueError: `step` does not increase, a leaf is no array or empty, a name is not usable,
            `metadata` is no JSON, or `metrics` has numbers but not the one `retention` goes by.
          SaveFailed: This save could not begin, or the one before could not be completed.
        """
        leaves, metadata = _checked_leaves(state), _checked_metadata(metadata)
        metrics = self._checked_metrics(metrics)
        self.wait()
        if self._newest is not None and step <= self._newest:
            raise ValueError(
                f"checkpoints must have increasing steps: got {step}, but {self._directory} "
                f"already has step {self._newest}"
            )
        record = _record(int(step), leaves, metadata, metrics)
        try:
            _together(self._check_that_it_can_be_written)
            _align_operations()
            context = ocp.Context()
            context.asynchronous.create_directories_asynchronously = False  # as above
            with context:
                response = ocp.save_async(
                    self._directory / str(int(step)),
                    _nest(leaves),
                    checkpointable_name=_CHECKED,
                    custom_metadata=record,
                )
        except jax.errors.JaxRuntimeError:  # another process is gone, nothing is to be mended here
            raise
        except Exception as error:  # whatever the layers below raise
            raise self._failed(int(step), error) from error
        self._saves += 1
        done: concurrent.futures.Future = concurrent.futures.Future()
        self._saving = int(step), done
        threading.Thread(
            target=self._complete, args=(done, response, int(step), metrics), daemon=True
        ).start()

    def _checked_metrics(self, metrics: Mapping[str, float] | None) -> dict[str, float]:
        if metrics is None:
            return {}
        if self._retention.keep_best and self._retention.metric not in metrics:
            raise ValueError(
                f"the best checkpoints go by {self._retention.metric!r}, but the metrics are "
                f"{sorted(metrics)}; give it, or None for a checkpoint that is never among the best"
            )
        return {str(name): float(value) for name, value in metrics.items()}

    def _check_that_it_can_be_written(self) -> None:
        """Before Orbax begins: of a folder it can't make, its threads wait for minutes."""
        if jax.process_index() != 0:
            return
        if not self._directory.is_dir():  # it would be made, perhaps below an unmounted volume
            raise FileNotFoundError(f"the folder {self._directory} has vanished")
        probe = self._directory / f"probe{_TEMPORARY}"
        probe.mkdir(exist_ok=True)
        probe.rmdir()

    def _complete(
        self, done: concurrent.futures.Future, response, step: int, metrics: dict[str, float]
    ) -> None:
        """In the background: waits until all is written, then removes what need not be kept."""
        try:
            try:
                response.result()
            except jax.errors.JaxRuntimeError:
                raise
            except Exception as error:  # whatever the layers below raise
                failed = self._failed(step, error)
                _tell_others(f"{self._directory}/{self._saves}", str(failed))
                raise failed from error
            if jax.process_index() == 0:
                self._metrics[step] = metrics
                self._remove_old()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def _remove_old(self) -> None:
        survivors = self._retention.survivors(self._metrics)
        for old in sorted(self._metrics.keys() - survivors):
            # Renamed first: killed half-way, it is not taken for a checkpoint.
            try:
                going = self._directory / f"{old}.old{_TEMPORARY}"
                (self._directory / str(old)).rename(going).rmtree()
            except OSError as error:
                _log.warning("checkpoint %d could not be removed: %s", old, _short(error))
            del self._metrics[old]

    def _failed(self, step: int, error: BaseException) -> SaveFailed:
        try:
            complete = ", ".join(map(str, _steps(self._directory))) or "none"
        except OSError:
            complete = "unknown, it can't be listed"
        return SaveFailed(
            f"the checkpoint of step {step} could not be written to {self._directory}: "
            f"{_short(error)}. Complete checkpoints there: {complete}. Free space or make it "
            "writable, and run the same command: it goes on from the newest"
        )

    def restore_latest(self, abstract_state: PyTree) -> tuple[int, PyTree] | None:
        """The newest checkpoint that is intact: (its step, the state), or None if there is none.

        Damaged ones that are newer are each named in a warning and moved to the folder "damaged"
        beside `directory`, once an intact one has been read.

        Args:
          abstract_state: As for `restore`.

        Raises:
          DamagedCheckpoint: There are checkpoints, but none is intact; nothing was moved.
          NotACheckpoint: The newest intact one is not of this state. Nothing was moved.
          ValueError: An abstract leaf has no sharding.
          OSError: A checkpoint can't be read for another reason, such as missing rights.
        """
        wanted, damaged = _wanted(abstract_state), {}
        for step in reversed(self.steps()):
            try:
                leaves = self._restore(wanted, step)
            except DamagedCheckpoint as error:
                damaged[step] = str(error).removesuffix(_REMEDY)
                continue
            processes.from_first(lambda damaged=damaged, step=step: self._set_aside(damaged, step))
            self._newest = step
            return step, _rebuilt(abstract_state, leaves)
        if damaged:
            raise DamagedCheckpoint(
                f"no checkpoint in {self._directory} is intact: {'; '.join(damaged.values())}. "
                "Bring one back from a backup, or move the folder away to begin anew"
            )
        return None

    def _set_aside(self, damaged: Mapping[int, str], step: int) -> list[int]:
        for bad, what in damaged.items():
            folder = self._directory.with_name("damaged")
            folder.mkdir(exist_ok=True)
            new, number = folder / str(bad), 1
            while new.exists():
                number += 1
                new = folder / f"{bad}-{number}"
            (self._directory / str(bad)).rename(new)
            self._metrics.pop(bad, None)
            _log.warning("%s; it was moved to %s, going back to step %d", what, new, step)
        return []

    def restore(self, abstract_state: PyTree, step: int | None = None) -> PyTree:
        """Reads a state onto the shardings of `abstract_state`, whatever it was saved from.

        Args:
          abstract_state: Pytree of `jax.ShapeDtypeStruct` with shardings (arrays do as well).
          step: Which checkpoint; None is the newest.

        Returns:
          The state, bit for bit as it was saved, in the containers of `abstract_state`. Leaves of
          64-bit dtypes that JAX is not configured for are numpy arrays.

        Raises:
          DamagedCheckpoint: It is not what was saved.
          NotACheckpoint: There is no such checkpoint, or its leaves have other names, shapes or
            dtypes; the message lists them.
          ValueError: An abstract leaf has no sharding.
        """
        steps, wanted = self.steps(), _wanted(abstract_state)
        leaves = self._restore(wanted, _chosen(steps, step, self._directory))
        return _rebuilt(abstract_state, leaves)

    def _restore(self, wanted: Mapping[str, jax.ShapeDtypeStruct], step: int) -> dict[str, Any]:
        """Every process reads its part without waiting for others; then they agree how it went."""
        directory = self._directory
        record = _read_record_together(directory, step)
        _check_same(record.leaves, wanted, directory)
        return _load_checked(directory, record, wanted, together=True)

    def steps(self) -> list[int]:
        """Steps of the checkpoints in the directory, damaged ones too; waits for a running save."""
        self.wait()
        return processes.from_first(lambda: _steps(self._directory))

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint with intact metadata; waits for a running save."""
        self.wait()
        latest = lambda: [] if (step := latest_step(self._directory)) is None else [step]
        return next(iter(processes.from_first(latest)), None)

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """The JSON dict saved with a checkpoint (None: the newest).

        Raises:
          DamagedCheckpoint: Its metadata is not what was saved.
          NotACheckpoint: There is no such checkpoint.
        """
        step = _chosen(self.steps(), step, self._directory)
        return _together(lambda: _read_record(self._directory, step).metadata)

    def wait(self) -> None:
        """Waits until a running save is complete.

        With several processes, all of them raise if one could not write its part. Orbax's threads
        of the others wait for that one for minutes, so the program should end without joining them.

        Raises:
          SaveFailed: It could not be completed (once: the save is over after that).
        """
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        while not concurrent.futures.wait([saving], _BETWEEN_LOOKS).done:
            if failed := _told_by_others(f"{self._directory}/{self._saves}"):
                raise SaveFailed(failed)
        saving.result()
        self._newest = step

    def close(self) -> None:
        """Waits for a running save; the object ends here.

        Raises:
          SaveFailed: As `wait`.
        """
        self.wait()


def save_once(
    directory: str | os.PathLike, step: int, state: PyTree, metadata: Mapping[str, Any]
) -> None:
    """Writes one checkpoint into a new directory, with next to no memory besides `state` itself.

    For conversion: unlike `Checkpoints.save` it returns when all is on the disk, copies nothing and
    doesn't compress (float weights hardly shrink).

    Args:
      directory: Folder of the checkpoints, made here.
      step, state, metadata: As in `Checkpoints.save`; numpy arrays, not changed meanwhile.

    Raises:
      ValueError: As `Checkpoints.save`, or the directory has checkpoints already.
      SaveFailed: It could not be written; what was is removed.
    """
    directory = _absolute(directory)
    if directory.exists():
        raise ValueError(f"{directory} exists already; a new folder was expected")
    leaves, metadata = _checked_leaves(state), _checked_metadata(metadata)
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = _MOST_IN_FLIGHT
    context.array.saving.use_compression = False
    record = _record(int(step), leaves, metadata, {})
    try:
        with context:
            ocp.save(
                directory / str(int(step)),
                _nest(leaves),
                checkpointable_name=_CHECKED,
                custom_metadata=record,
            )
    except Exception as error:  # whatever the layers below raise
        if directory.exists():
            directory.rmtree(missing_ok=True)
        raise SaveFailed(
            f"the checkpoint of step {step} could not be written to {directory}: {_short(error)}. "
            "Free space or make it writable, and run the same command"
        ) from error


_MOST_IN_FLIGHT = 256 * 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of a checkpoint before its arrays are read.

    Attributes:
      step: Under which it was saved.
      leaves: Name -> abstract leaf.
      checksums: Name -> checksum; None in checkpoints from before the checksums.
      metadata: The JSON dict that was saved with it.
      metrics: Those it was saved with.
      digest: Of all this, "" where there are no checksums.
    """

    step: int
    leaves: dict[str, jax.ShapeDtypeStruct]
    checksums: dict[str, str] | None
    metadata: dict[str, Any]
    metrics: dict[str, float]
    digest: str


def restore_part(
    directory: str | os.PathLike,
    names: tuple[str, ...],
    step: int | Record | None = None,
    *,
    sharding: Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding] | None = None,
    together: bool = False,
) -> dict[str, Any]:
    """Reads only the named subtrees of a checkpoint, without knowing the tree it was saved from.

    Args:
      directory: Folder that a `Checkpoints` wrote.
      names: Subtrees or leaves: "ema", "step", "params/embed".
      step: Which checkpoint; None is the newest. Its record in place of its number spares reading
        that anew, which takes longer than a small leaf; `together` reads it anew.
      sharding: Of all leaves, or a function (leaf name, abstract leaf) -> sharding; None puts all
        on this process's first device.
      together: All processes of a job call, with the same step, as they must where the sharding has
        devices of several; they come to the same result or the same kind of error.

    Returns:
      {name: subtree}: nested dicts of arrays (a tuple becomes a dict with keys "0", "1", ...; the
      name of a leaf gives the array). Leaves of 64-bit dtypes that JAX is not configured for are
      numpy arrays.

    Raises:
      DamagedCheckpoint: What was read is not what was saved; it never goes back by itself.
      NotACheckpoint: There is no such checkpoint, or it has no such subtree.
    """
    directory = _absolute(directory)
    if isinstance(names, str):
        raise ValueError(f"names is a tuple of subtree names, got the string {names!r}")
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if together:
        number = _together(lambda: _existing(directory, step))
        record = _read_record_together(directory, number)
    else:
        record = read_record(directory, step)
    wanted = {}
    for part in names:
        wanted |= _part(record.leaves, part, directory)
    for name, leaf in wanted.items():
        place = sharding(name, leaf) if callable(sharding) else sharding
        wanted[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    if not (together or all(leaf.sharding.is_fully_addressable for leaf in wanted.values())):
        raise ValueError("the sharding has devices of other processes; all of them read together")
    tree = _nest(_load_checked(directory, record, wanted, together=together))
    return {part: _lookup(tree, part) for part in names}


def read_record(directory: str | os.PathLike, step: int | Record | None = None) -> Record:
    """What is known of a checkpoint before its arrays are read.

    Args:
      directory: Folder that a `Checkpoints` wrote.
      step: Which checkpoint; None is the newest; a record of it is given back as it is.

    Raises:
      DamagedCheckpoint: It is not what was saved.
      NotACheckpoint: There is no such checkpoint.
    """
    directory = _absolute(directory)
    number = _existing(directory, step)
    return step if isinstance(step, Record) else _read_record(directory, number)


def leaf_shapes(
    directory: str | os.PathLike, part: str, step: int | Record | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """{name within `part`: abstract leaf} of one subtree of a checkpoint, without reading it.

    Raises:
      DamagedCheckpoint: Its metadata is not what was saved.
      NotACheckpoint: There is no such checkpoint, or it has no such subtree.
    """
    directory = _absolute(directory)
    inside = _part(read_record(directory, step).leaves, part, directory)
    return {name.removeprefix(f"{part}/"): leaf for name, leaf in inside.items()}


def read_metadata(directory: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
    """The JSON dict of a checkpoint, read without opening the directory for training.

    Raises:
      DamagedCheckpoint: It is not what was saved.
      NotACheckpoint: There is no such checkpoint.
    """
    return read_record(directory, step).metadata


def newest_step(directory: str | os.PathLike) -> int | None:
    """Step of the newest checkpoint, damaged or not; the directory may be missing or empty.

    What reads weights takes this one, so that a damaged checkpoint is refused and not passed over.
    """
    directory = _absolute(directory)
    return max(_steps(directory), default=None) if directory.is_dir() else None


def latest_step(directory: str | os.PathLike) -> int | None:
    """Step of the newest checkpoint with intact metadata; the directory may be missing or empty.

    Newer ones whose metadata is damaged are skipped with a warning, as a run does that goes on.
    """
    directory = _absolute(directory)
    if not directory.is_dir():
        return None
    for step in reversed(_steps(directory)):
        try:
            _read_record(directory, step)
        except DamagedCheckpoint as error:
            _log.warning("%s", error)
        else:
            return step
    return None


def _record(
    step: int, leaves: Mapping[str, Any], metadata: Mapping[str, Any], metrics: Mapping[str, float]
) -> dict[str, Any]:
    """The JSON dict stored with a checkpoint; `_read_record` is the way back."""
    sums = checksums(leaves)
    record = {
        "step": step,
        "metadata": metadata,
        # JSON has no NaN
        "metrics": {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()},
        "leaves": {
            name: [str(np.dtype(leaf.dtype)), list(leaf.shape), sums[name]]
            for name, leaf in leaves.items()
        },
    }
    return record | {"sha256": _digest(record)}


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read_record(directory: epath.Path, step: int) -> Record:
    """Raises DamagedCheckpoint unless the metadata is what was saved under this step."""
    folder = directory / str(step)
    # Which of the two it is stands in the name of a folder, so that a change within a file cannot
    # turn a checkpoint with checksums into one without.
    checked = (folder / _CHECKED).is_dir()
    try:
        with _alone():
            found = ocp.metadata(folder, _CHECKED if checked else _UNCHECKED)
        if not checked:
            leaves = _named_leaves(found.metadata)
            leaves = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in leaves.items()}
            return Record(step, leaves, None, found.custom_metadata or {}, {}, "")
        record = dict(found.custom_metadata or {})
        digest = record.pop("sha256", None)
        if digest != _digest(record):
            raise _damaged(directory, step, "its metadata is not what was saved")
        if record["step"] != step:
            raise _damaged(directory, step, f"it was saved as step {record['step']}")
        leaves, sums = {}, {}
        for name, (dtype, shape, checksum) in record["leaves"].items():
            leaves[name] = jax.ShapeDtypeStruct(tuple(shape), jax.numpy.dtype(dtype))
            sums[name] = checksum
        metrics = {name: float(value) for name, value in record["metrics"].items()}
    except DamagedCheckpoint:
        raise
    except Exception as error:  # a damaged file can raise anything
        _raise_unless_damage(error, directory, step)
        raise _damaged(directory, step, f"its metadata cannot be read ({_short(error)})") from error
    return Record(step, leaves, sums, record["metadata"], metrics, digest)


def _read_record_together(directory: epath.Path, step: int) -> Record:
    """`_read_record` in all processes; OSError in all of them unless all read the same one."""

    def look() -> None:
        if not (directory / str(step)).is_dir():
            raise OSError(
                f"the checkpoint of step {step} in {directory} is not there for this process, but "
                "for another one; give a folder that all of them share"
            )

    _together(look)
    record = _together(lambda: _read_record(directory, step))
    if len(set(processes.everyone_says(record.digest))) > 1:
        raise OSError(
            f"the processes read different metadata of step {step} in {directory}; give a folder "
            "that all of them share"
        )
    return record


def _load_checked(
    directory: epath.Path,
    record: Record,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    *,
    together: bool,
) -> dict[str, Any]:
    """Reads leaves (some or all) of a checkpoint and raises DamagedCheckpoint if one is not right.

    With `together` all processes call, and it raises in all of them or in none.
    """
    agree = _together if together else lambda action: action()
    leaves = agree(lambda: _load(directory, record, wanted))

    def check() -> None:
        for name, leaf in leaves.items():
            if (leaf.shape, leaf.dtype) != (wanted[name].shape, wanted[name].dtype):
                raise _damaged(directory, record.step, f"leaf {name!r} has another shape or dtype")
        if record.checksums is None:
            return
        wrong = [name for name, value in sums.items() if value != record.checksums[name]]
        if wrong:
            shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if wrong[5:] else "")
            raise _damaged(directory, record.step, f"the checksums of {shown} are wrong")

    sums = {} if record.checksums is None else checksums(leaves)
    agree(check)
    return {name: leaves[name] for name in wanted}


def _load(
    directory: epath.Path, record: Record, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Any]:
    """Reads this process's part of the leaves, without a word to the others."""
    abstract = {
        # An array of JAX would lose half of the bits without a word.
        name: leaf
        if jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype
        else np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
        for name, leaf in wanted.items()
    }
    try:
        with _alone(partial=len(wanted) < len(record.leaves)):
            tree = ocp.load(
                directory / str(record.step),
                _nest(abstract),
                checkpointable_name=_UNCHECKED if record.checksums is None else _CHECKED,
            )
            return jax.block_until_ready(_named_leaves(tree))
    except Exception as error:  # a damaged file can raise anything
        _raise_unless_damage(error, directory, record.step)
        raise _damaged(directory, record.step, f"it cannot be read ({_short(error)})") from error


def _damaged(directory: epath.Path, step: int, what: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"the checkpoint of step {step} in {directory} is damaged: {what}{_REMEDY}"
    )


_REMEDY = "; run the training command again: it goes back to the checkpoint before"


def _raise_unless_damage(error: Exception, directory: epath.Path, step: int) -> None:
    """Lack of rights or memory says nothing about the checkpoint, and going back loses work."""
    text = str(error)
    if isinstance(error, MemoryError | PermissionError) or any(
        code in text for code in ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "Permission denied")
    ):
        raise OSError(
            f"the checkpoint of step {step} in {directory} cannot be read now: {_short(error)}"
        ) from error


def _short(error: BaseException) -> str:
    """What was at the bottom of an error, in one line; some texts are pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    for details in (" [source locations=", " [tensorstore_spec"):
        text = text.partition(details)[0]
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-175:]}"


def _alone(partial: bool = False) -> ocp.Context:
    """Orbax's settings for reading by this process alone: it waits for no other one."""
    context = ocp.Context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    context.pytree.loading.partial_load = partial
    return context


def _together(action: Callable[[], T]) -> T:
    """`action()` in every process; it raises in all of them if it raised in one.

    All raise the same kind: DamagedCheckpoint if nothing worse came up anywhere.
    """
    if jax.process_count() == 1:
        return action()
    value, error = None, None
    try:
        value = action()
    except Exception as raised:
        error = raised
    kind = "" if error is None else "d" if isinstance(error, DamagedCheckpoint) else "w"
    said = processes.everyone_says(f"{kind}{error}" if kind else "")
    worst = next((k for k in ("w", "d") if any(text.startswith(k) for text in said)), "")
    if not worst:
        return value
    if error is not None and kind == worst:
        raise error
    process = next(i for i, text in enumerate(said) if text.startswith(worst))
    raise (DamagedCheckpoint if worst == "d" else OSError)(
        f"process {process}: {said[process][1:]}"
    )


def _tell_others(about: str, text: str) -> None:
    """Leaves a note for `_told_by_others`; unlike `_together` it needs nobody to listen."""
    if jax.process_count() > 1:
        from orbax.checkpoint._src.futures.signaling_client import get_signaling_client

        note = f"process {jax.process_index()}: {text}"
        get_signaling_client().key_value_set(f"{__name__}/{about}", note, allow_overwrite=True)


def _told_by_others(about: str) -> str | None:
    if jax.process_count() == 1:
        return None
    from orbax.checkpoint._src.futures.signaling_client import get_signaling_client

    return get_signaling_client().key_value_try_get(f"{__name__}/{about}")


def _align_operations() -> None:
    """Lets all processes number their next save alike.

    Orbax puts a counter of its operations into the names of its barriers, so processes that have
    read a different number of checkpoints would wait for each other in vain.
    """
    if jax.process_count() == 1:
        return
    from orbax.checkpoint._src.futures.synchronization import OperationIdGenerator

    numbers = processes.everyone_says(OperationIdGenerator.get_current_operation_id())
    reached = max(int(text) for text in numbers)
    while int(OperationIdGenerator.get_current_operation_id()) < reached:
        OperationIdGenerator.next_operation_id()


def _steps(directory: epath.Path) -> list[int]:
    """Steps that have a folder, in order."""
    names = [folder.name for folder in directory.iterdir() if folder.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def _existing(directory: epath.Path, step: int | Record | None) -> int:
    if not directory.is_dir():
        raise NotACheckpoint(f"there is no directory {directory}; give the one a run saved into")
    if isinstance(step, Record):
        step = step.step
    return _chosen(_steps(directory), step, directory)


def _chosen(steps: list[int], step: int | None, directory: epath.Path) -> int:
    if not steps:
        raise NotACheckpoint(
            f"there is no complete checkpoint in {directory}; give the directory that a run saved "
            "into, the one whose folders are step numbers"
        )
    if step is not None and step not in steps:
        raise NotACheckpoint(f"there is no step {step} in {directory}; it has {steps}")
    return steps[-1] if step is None else int(step)


def _wanted(abstract_state: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    wanted = _named_leaves(abstract_state)
    for name, leaf in wanted.items():
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(
                f"abstract leaf {name!r} has no sharding; build it as "
                "jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
            )
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in wanted.items()
    }


def _rebuilt(abstract_state: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    names = _named_leaves(abstract_state)
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[name] for name in names])


def _part(saved: Mapping[str, Any], part: str, directory) -> dict[str, Any]:
    """The leaves of one subtree, or the one leaf of that name; NotACheckpoint if there is none."""
    inside = {k: v for k, v in saved.items() if k == part or k.startswith(part + "/")}
    if not inside:
        tops = sorted({name.split("/")[0] for name in saved})
        raise NotACheckpoint(
            f"the checkpoint in {directory} has no part {part!r}; it has {', '.join(tops)}"
        )
    return inside


def _checked_leaves(state: PyTree) -> dict[str, Any]:
    leaves = _named_leaves(state)
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array) and not hasattr(leaf, "__array_interface__"):
            raise ValueError(
                f"a state holds arrays only, but {name!r} is {type(leaf).__name__}; "
                "put numbers into arrays and everything else into the metadata"
            )
        if not leaf.size:
            raise ValueError(
                f"leaf {name!r} has no elements (shape {list(leaf.shape)}); leave it out"
            )
    return leaves


def _checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint metadata must be a JSON dict: {error}") from error


def _absolute(directory) -> epath.Path:
    path = epath.Path(directory).expanduser()
    return (
        path if "://" in os.fspath(directory) else path.absolute()
    )  # Orbax refuses relative paths


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """{"params/block/kernel": leaf}, in the order of `jax.tree.leaves`.

    "/" and "." are kept out of keys: the first separates names here, the second inside Orbax, where
    {"a.b": x, "a": {"b": y}} silently are one name.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if not keys or any(not key or "/" in key or "." in key for key in keys):
            raise ValueError(
                f"leaf {jax.tree_util.keystr(path)!r} cannot be named in a checkpoint: a state is "
                'a container whose keys are not empty and have no "/" and no "."'
            )
        leaves["/".join(keys)] = leaf
    return leaves


def _nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def _lookup(tree: PyTree, name: str) -> PyTree:
    for key in name.split("/"):
        tree = tree[key]
    return tree


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], directory) -> None:
    """Raises NotACheckpoint with every leaf that differs (the first of many)."""
    problems = [f"missing in the checkpoint: {name}" for name in wanted if name not in saved]
    problems += [f"only in the checkpoint: {name}" for name in saved if name not in wanted]
    for name in wanted:
        if name not in saved:
            continue
        old, new = saved[name], wanted[name]
        if (tuple(old.shape), old.dtype) != (tuple(new.shape), new.dtype):
            problems.append(
                f"{name}: saved {old.dtype}{list(old.shape)}, expected {new.dtype}{list(new.shape)}"
            )
    if problems:
        shown = problems[:20] + [f"... and {len(problems) - 20} more"] * (len(problems) > 20)
        raise NotACheckpoint(
            f"the checkpoint in {directory} is not one of this state (another configuration?):\n  "
            + "\n  ".join(shown)
        )


def _keep_record(record: logging.LogRecord) -> bool:
    """False for Orbax's own progress reports, some 30 lines a save; warnings and errors stay.

    But for the tracebacks of its threads: what stopped them is raised here, in one sentence.
    """
    if _ORBAX_FOLDER not in record.pathname:
        return True
    return record.levelno > logging.INFO and "_SignalingThread" not in str(record.msg)


# Names of the part of a checkpoint that has the arrays: with checksums, and from before them.
_CHECKED, _UNCHECKED = "checked_state", "state"
_BETWEEN_LOOKS = 1.0  # seconds between looks whether another process has failed to save
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of folders that are being written or removed
_ORBAX_FOLDER = os.path.join("orbax", "checkpoint", "")
_log = logging.getLogger("absl")
_log.addFilter(_keep_record)
