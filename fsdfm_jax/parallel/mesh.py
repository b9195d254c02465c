"""Meshes, and the shardings that `rules` defines on them.

The same rules apply to parameters, their EMA and the optimiser's moments, at initialisation, in
the training step, in sampling and when a checkpoint is restored.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from fsdfm_jax.parallel import rules


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with the axes `rules.AXES` that follows the topology of the devices.

    Args:
      config: `config.mesh`: sizes of the axes, one of which may be -1 (inferred), and the number of
        `slices`. Only batch rows are sharded over slices (the outermost part of `data`), since the
        network between slices is slow.
      devices: by default, all devices of the job.

    Raises:
      ValueError: if the product of the sizes isn't the number of devices, or `slices` is wrong.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes, count, slices = [config[axis] for axis in rules.AXES], len(devices), config.slices
    known = math.prod(size for size in sizes if size != -1)
    wrong = (
        sizes.count(-1) > 1
        or min(sizes) < -1
        or known < 1
        or count % known
        or (-1 not in sizes and known != count)
    )
    if wrong:
        asked = ", ".join(f"mesh.{a}={s}" for a, s in zip(rules.AXES, sizes, strict=True))
        raise ValueError(
            f"The mesh sizes ({asked}) must multiply to the number of devices, {count}; at most "
            "one of them may be -1."
        )
    shape = [count // known if size == -1 else size for size in sizes]
    # Auto: Linen modules predate explicit sharding types.
    types = (AxisType.Auto,) * len(shape)
    there = {getattr(device, "slice_index", None) for device in devices}
    # Without torus coordinates, slices are just hosts, with a network that may be fast.
    if slices == 1 and len(there) > 1 and getattr(devices[0], "coords", None):
        raise ValueError(
            f"The devices form {len(there)} slices, with a slow network between them, but "
            f"mesh.slices=1; set mesh.slices={len(there)}."
        )
    if slices == 1:
        # A mesh axis may use a part of a torus axis, which `jax.make_mesh` doesn't allow.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        placed = _over_slices(shape, slices, devices)
    return Mesh(placed, rules.AXES, axis_types=types)


def _over_slices(shape: list[int], slices: int, devices: list[jax.Device]) -> np.ndarray:
    """Arrange the devices so that each slice is a contiguous part of the `data` axis."""
    # With no slices or only one, use the hosts instead.
    by_process = len({getattr(device, "slice_index", None) for device in devices}) == 1
    found = {d.process_index if by_process else d.slice_index for d in devices}
    if slices < 1 or len(found) != slices or shape[0] % slices:
        what = "processes" if by_process else "slices"
        raise ValueError(
            f"mesh.slices={slices} must be the number of {what} ({len(found)}) and divide "
            f"mesh.data={shape[0]}; only batch rows are sharded over slices."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, *shape[1:]),
        (slices, *[1] * (len(shape) - 1)),
        devices=devices,
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )


def use(mesh: Mesh):
    """Return a context that shards arrays over the mesh if it has more than one device."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def local_mesh() -> Mesh:
    """Return a mesh of this process's devices for sampling, with rows and parameters sharded.

    The tokens don't depend on the number of devices, so stored samples can be reused.
    """
    devices = jax.local_devices()
    sizes = {axis: 1 for axis in rules.AXES} | {"fsdp": len(devices)}
    return make_mesh(ConfigDict(sizes | {"slices": 1}), devices)


def leaf_sharding(mesh: Mesh, path: str, leaf) -> NamedSharding:
    """Return the sharding of one leaf of the state, as in `state_shardings`."""
    return NamedSharding(mesh, _checked_spec(mesh, path, leaf.shape))


def state_shardings(mesh: Mesh, abstract_state):
    """Return the sharding of each leaf of a tree of shapes (state, parameters), from `rules.RULES`.

    Raises:
      ValueError: naming the first leaf whose shape doesn't fit its rule, the axis and the remedy.
    """

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf_sharding(mesh, name, leaf)

    return jax.tree_util.tree_map_with_path(one, abstract_state)


def _checked_spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    spec = rules.spec_for(name)
    if len(spec) > len(shape):
        raise ValueError(
            f"The sharding rule {spec} doesn't fit {name} of shape {shape}: it has too many "
            "dimensions; correct rules.RULES."
        )
    named = [axes if isinstance(axes, tuple) else (axes,) for axes in spec if axes is not None]
    flat = [axis for axes in named for axis in axes]
    if len(set(flat)) < len(flat) or not set(flat) <= set(mesh.shape):
        raise ValueError(
            f"The sharding rule {spec} of {name} names an axis twice, or one that the mesh "
            f"{dict(mesh.shape)} doesn't have; correct rules.RULES."
        )
    for dimension, axes in enumerate(spec):
        if shape[dimension] % _parts(mesh, axes):
            axes = axes if isinstance(axes, tuple) else (axes,)
            sizes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
            raise ValueError(
                f"{name} can't be sharded: dimension {dimension} of its shape {shape} isn't "
                f"divisible by {sizes}. Choose a smaller {' or '.join(f'mesh.{a}' for a in axes)} "
                "and a larger mesh.data, or another model.width."
            )
    return spec


def put(path: str, leaf: jax.Array | np.ndarray | jax.ShapeDtypeStruct):
    """Place a parameter for sampling, on the mesh of `jax.set_mesh` or the default device.

    Args:
      path: of the parameter; selects the rule.
      leaf: its values, or its shape, which gets the sharding.

    A dimension that isn't divisible is replicated (`state_shardings` raises instead), so any model
    can be sampled on any number of devices.
    """
    mesh, place = jax.sharding.get_mesh(), None
    if not mesh.empty:
        fits = lambda size, axes: size % _parts(mesh, axes) == 0
        spec = zip(rules.spec_for(path), leaf.shape, strict=False)
        spec = P(*(axes if fits(size, axes) else None for axes, size in spec))
        place = NamedSharding(mesh, spec)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.device_put(leaf, place)


def spread(params):
    """Apply `put` to all parameters of a tree."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: put(name(path), leaf), params)


def _parts(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """Number of shards of a dimension over these axes."""
    axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    return math.prod(mesh.shape[axis] for axis in axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batch rows."""
    return NamedSharding(mesh, rules.activation_spec("rows"))


def whole(mesh: Mesh) -> NamedSharding:
    """Return the replicated sharding."""
    return NamedSharding(mesh, P())


def row_shards(mesh: Mesh) -> int:
    """Number of shards of the batch rows."""
    return math.prod(mesh.shape[axis] for axis in rules.ACTIVATIONS["rows"])


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Indices of the batch rows on this process's devices, in order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for (part,) in places.values() for row in range(batch_size)[part]})


def place_rows(mesh: Mesh, batch_size: int, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Make the global batch arrays from this process's `local_rows`."""
    spread, rows = batch_sharding(mesh), local_rows(mesh, batch_size)
    at = {row: i for i, row in enumerate(rows)}

    def place(own):
        def part(index):
            wanted = range(batch_size)[index[0]]
            return own[at[wanted[0]] : at[wanted[0]] + len(wanted)]

        return jax.make_array_from_callback((batch_size, *own.shape[1:]), spread, part)

    return jax.tree.map(place, batch)


def check_batch_size(mesh: Mesh, batch_size: int, key: str) -> None:
    """Raise ValueError naming the config `key` unless rows shard evenly over the mesh."""
    shards = row_shards(mesh)
    if batch_size < 1 or batch_size % shards:
        sizes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in rules.ACTIVATIONS["rows"])
        raise ValueError(
            f"{key}={batch_size} must be a positive multiple of the {shards} data shard(s) of "
            f"the mesh ({sizes})."
        )


def check_heads(mesh: Mesh, num_heads: int) -> None:
    """Raise ValueError unless the attention heads shard evenly over the `tensor` axis."""
    if num_heads % mesh.shape["tensor"]:
        raise ValueError(
            f"model.num_heads={num_heads} must be a multiple of mesh.tensor="
            f"{mesh.shape['tensor']}: the heads are sharded over that axis."
        )


# ------------------------------------------------------------------------------------------ report


_LINE_WIDTH = 100


class Placed(NamedTuple):
    """Sharding of a leaf of the state: path, shape, dtype, spec, total bytes, bytes per device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: P
    total_bytes: int
    device_bytes: int


def describe(mesh: Mesh, abstract_state) -> list[Placed]:
    """Describe the sharding of each leaf of a tree of shapes, from `state_shardings`."""
    shardings = jax.tree.leaves(state_shardings(mesh, abstract_state))
    leaves = jax.tree_util.tree_leaves_with_path(abstract_state)
    return [
        Placed(
            jax.tree_util.keystr(path, simple=True, separator="/"),
            tuple(leaf.shape),
            str(leaf.dtype),
            place.spec,
            leaf.size * leaf.dtype.itemsize,
            math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        )
        for (path, leaf), place in zip(leaves, shardings, strict=True)
    ]


def report(mesh: Mesh, abstract_state: Any) -> str:
    """A table of where each leaf lies, with bytes on each device, and what is held by all.

    At most `_LINE_WIDTH` letters wide: a long path has a line of its own.
    """
    placed = describe(mesh, abstract_state)
    shapes = ["x".join(map(str, leaf.shape)) or "scalar" for leaf in placed]
    told = [
        f"{leaf.dtype:8} {shape:>{max(map(len, shapes))}}  {_size(leaf.device_bytes):>9}"
        f" of {_size(leaf.total_bytes):>9}  {_axes(leaf.spec)}"
        for leaf, shape in zip(placed, shapes, strict=True)
    ]
    room = _LINE_WIDTH - max(map(len, told)) - 2
    width = max((len(leaf.path) for leaf in placed if len(leaf.path) <= room), default=0)
    lines = [f"mesh {dict(mesh.shape)}, {mesh.size} device(s)"]
    for leaf, rest in zip(placed, told, strict=True):
        lines += [leaf.path] if len(leaf.path) > width else []
        lines.append(f"{leaf.path if len(leaf.path) <= width else '':{width}}  {rest}")
    total = sum(leaf.total_bytes for leaf in placed)
    device = sum(leaf.device_bytes for leaf in placed)
    whole = sum(leaf.total_bytes for leaf in placed if leaf.device_bytes == leaf.total_bytes)
    lines.append(
        f"total {_size(total)}, on each device {_size(device)} (1/{total / device:.2f}); "
        f"held by every device: {_size(whole)}"
    )
    return "\n".join(lines)


def _axes(spec: P) -> str:
    """The mesh axes of each dimension: "-, tensor+fsdp"."""
    named = lambda axes: "-" if not axes else axes if isinstance(axes, str) else "+".join(axes)
    return ", ".join(map(named, spec)) or "on each device"


def _size(count: float) -> str:
    """Bytes in units of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
