"""Saving and restoring training states; the only file that knows Orbax.

A checkpoint is the leaves of one pytree under their path names ("params/block/kernel",
"opt_state/1/0/mu/block/kernel"), stored as nested dicts, plus one JSON dict of metadata. Containers
(NamedTuples, tuples, empty optimiser states, None) are not stored: they come back from the abstract
state that `Checkpoints.restore` is given, and a part can be read without knowing them.

    with Checkpoints(directory, keep=2) as checkpoints:
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(abstract_state)
        checkpoints.save(step, state, {"stage": "pretrain"})  # returns once the state is copied

With several processes each of them makes every call, and `directory` is one they share.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

PyTree = Any
Sharding = jax.sharding.Sharding


class NotACheckpoint(ValueError):  # noqa: N818 - named after what it says
    """The directory holds no such checkpoint, or not one of this tree; the message says which."""


class Checkpoints:
    """The checkpoints of one training run: `directory/<step>`, written in the background.

    Opening the directory creates it where needed and removes what a killed save left there, so only
    the process that trains opens it; readers use `restore_part` and `read_metadata`, which change
    nothing.

    Args:
      directory: Folder of the checkpoints (a path, or a URL that Orbax can write).
      keep: How many of the newest checkpoints survive a save; at least 1.

    Raises:
      ValueError: `keep` is below 1, or `directory` is a file.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1 (the newest checkpoint), got {keep}")
        self._directory = _absolute(directory)
        if self._directory.exists() and not self._directory.is_dir():
            raise ValueError(f"{self._directory} is a file; give the folder of the checkpoints")
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
        """Copies `state` to the host and starts to write it; the caller may donate it right after.

        The checkpoint appears under its name only once it is complete. A save that is still running
        is waited for first, and its error, if it had one, is raised here.

        Args:
          step: Optimiser steps completed; larger than that of every checkpoint in the directory.
          state: Pytree of arrays (jax or numpy). Keys must not contain "/" or ".".
          metadata: JSON dict, returned by `metadata` (tuples come back as lists).

        Raises:
          ValueError: `step` does not increase, a leaf is no array, a name is not usable, or
            `metadata` is no JSON.
        """
        leaves, metadata = _checked_leaves(state), _checked_metadata(metadata)
        latest = self.latest_step()  # waits for the save before
        if latest is not None and step <= latest:
            raise ValueError(
                f"checkpoints must have increasing steps: got {step}, but {self._directory} "
                f"already has step {latest}"
            )
        self._checkpointer.save_async(
            int(step), _nest(leaves), force=True, custom_metadata=metadata
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None without one; waits for a running save."""
        self.wait()  # Orbax lists a checkpoint from the moment its save starts
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def restore(self, abstract_state: PyTree, step: int | None = None) -> PyTree:
        """Reads a state onto the shardings of `abstract_state`, whatever it was saved from.

        Args:
          abstract_state: Pytree of `jax.ShapeDtypeStruct` with shardings (arrays do as well).
          step: Which checkpoint; None is the newest.

        Returns:
          The state, bit for bit as it was saved, in the containers of `abstract_state`.

        Raises:
          NotACheckpoint: There is no such checkpoint, or its leaves have other names, shapes or
            dtypes; the message lists them.
          ValueError: An abstract leaf has no sharding.
        """
        self.wait()
        wanted = _named_leaves(abstract_state)
        saved = _saved_leaves(self._checkpointer, self._directory, step)
        _check_same(saved, wanted, self._directory)
        for name, leaf in wanted.items():
            if getattr(leaf, "sharding", None) is None:
                raise ValueError(
                    f"abstract leaf {name!r} has no sharding; build it as "
                    "jax.ShapeDtypeStruct(shape, dtype, sharding=...)"
                )
        wanted = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in wanted.items()
        }
        restored = _named_leaves(self._checkpointer.load(step, _nest(wanted)))
        return jax.tree.unflatten(
            jax.tree.structure(abstract_state), [restored[name] for name in wanted]
        )

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """The JSON dict saved with a checkpoint (None: the newest). Raises `NotACheckpoint`."""
        self.wait()
        return _metadata(self._checkpointer, self._directory, step).custom_metadata or {}

    def wait(self) -> None:
        """Waits until a running save is complete and raises its error, if it had one."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits for a running save and frees the writer's threads; the object ends here."""
        self._checkpointer.close()


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
    """
    directory = _absolute(directory)
    if directory.exists():
        raise ValueError(f"{directory} exists already; a new folder was expected")
    leaves, metadata = _checked_leaves(state), _checked_metadata(metadata)
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.memory.write_concurrent_bytes = _MOST_IN_FLIGHT
    context.array.saving.use_compression = False
    with ocp.training.Checkpointer(directory, context=context) as checkpointer:
        checkpointer.save(int(step), _nest(leaves), force=True, custom_metadata=metadata)


_MOST_IN_FLIGHT = 256 * 2**20  # bytes


def restore_part(
    directory: str | os.PathLike,
    names: tuple[str, ...],
    step: int | None = None,
    *,
    sharding: Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding] | None = None,
) -> dict[str, Any]:
    """Reads only the named subtrees of a checkpoint, without knowing the tree it was saved from.

    Args:
      directory: Folder that a `Checkpoints` wrote.
      names: Subtrees or leaves: "ema", "step", "params/embed".
      step: Which checkpoint; None is the newest.
      sharding: Of all leaves, or a function (leaf name, abstract leaf) -> sharding; None puts all
        on this process's first device.

    Returns:
      {name: subtree}: nested dicts of arrays (a tuple becomes a dict with keys "0", "1", ...; the
      name of a leaf gives the array).

    Raises:
      NotACheckpoint: There is no such checkpoint, or it has no such subtree.
    """
    directory = _absolute(directory)
    if isinstance(names, str):
        raise ValueError(f"names is a tuple of subtree names, got the string {names!r}")
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with _open_to_read(directory, partial=True) as checkpointer:
        saved = _saved_leaves(checkpointer, directory, step)
        wanted = {}
        for part in names:
            wanted |= _part(saved, part, directory)
        for name, leaf in wanted.items():
            place = sharding(name, leaf) if callable(sharding) else sharding
            wanted[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        tree = checkpointer.load(step, _nest(wanted))
    return {part: _lookup(tree, part) for part in names}


def leaf_shapes(
    directory: str | os.PathLike, part: str, step: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """{name within `part`: abstract leaf} of one subtree of a checkpoint, without reading it.

    Raises:
      NotACheckpoint: There is no such checkpoint, or it has no such subtree.
    """
    directory = _absolute(directory)
    with _open_to_read(directory, partial=True) as checkpointer:
        saved = _saved_leaves(checkpointer, directory, step)
    inside = _part(saved, part, directory)
    return {name.removeprefix(f"{part}/"): leaf for name, leaf in inside.items()}


def read_metadata(directory: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
    """The JSON dict of a checkpoint, read without opening the directory for training.

    Raises:
      NotACheckpoint: There is no such checkpoint.
    """
    directory = _absolute(directory)
    with _open_to_read(directory) as checkpointer:
        return _metadata(checkpointer, directory, step).custom_metadata or {}


def latest_step(directory: str | os.PathLike) -> int | None:
    """Step of the newest complete checkpoint in a directory that may be missing or empty."""
    directory = _absolute(directory)
    if not directory.is_dir():
        return None
    with _open_to_read(directory) as checkpointer:
        latest = checkpointer.latest
    return None if latest is None else latest.step


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


def _open_to_read(directory: epath.Path, partial: bool = False) -> ocp.training.Checkpointer:
    """A checkpointer that leaves the directory as it is: a training run may be writing to it."""
    if not directory.is_dir():  # Orbax would create it
        raise NotACheckpoint(f"there is no directory {directory}; give the one a run saved into")
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    return ocp.training.Checkpointer(directory, context=context, cleanup_tmp_directories=False)


def _metadata(checkpointer: ocp.training.Checkpointer, directory: epath.Path, step: int | None):
    steps = [checkpoint.step for checkpoint in checkpointer.checkpoints]
    if not steps:
        raise NotACheckpoint(
            f"there is no complete checkpoint in {directory}; give the directory that a run saved "
            "into, the one whose folders are step numbers"
        )
    if step is not None and step not in steps:
        raise NotACheckpoint(f"there is no step {step} in {directory}; it has {steps}")
    try:
        return checkpointer.metadata(step)
    except (ValueError, OSError, KeyError) as error:
        raise NotACheckpoint(
            f"step {steps[-1] if step is None else step} in {directory} cannot be read: {error}"
        ) from error


def _saved_leaves(checkpointer, directory, step) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: abstract leaf} of a checkpoint, without the shardings it was saved from."""
    leaves = _named_leaves(_metadata(checkpointer, directory, step).metadata)
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}


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
    """False for Orbax's own progress reports: some 30 lines a save. Warnings and errors stay."""
    return record.levelno > logging.INFO or _ORBAX_FOLDER not in record.pathname


_ORBAX_FOLDER = os.path.join("orbax", "checkpoint", "")
logging.getLogger("absl").addFilter(_keep_record)
