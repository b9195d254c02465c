"""Meshes, and the shardings that the tables of `layout` give on them.

The same tables serve the parameters, their average and the optimiser's moments, at initialisation,
in the step, in sampling and when a checkpoint is restored.
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
    """A mesh over the axes of `layout.AXES`, laid out by how the devices are connected.

    Args:
      config: `config.mesh`: sizes of the axes, of which one may be -1 ("what is left"), and the
        number of `slices`, over which only rows of the batch are spread (the outermost part of
        `data`), since the network between slices is slow.
      devices: all of the job by default.

    Raises:
      ValueError: if the sizes don't multiply to the number of devices, or the slices are others.
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
            f"The mesh sizes ({asked}) must multiply to the {count} device(s) present, "
            "with at most one axis given as -1."
        )
    shape = [count // known if size == -1 else size for size in sizes]
    # Auto: Linen's modules predate explicit sharding types.
    types = (AxisType.Auto,) * len(shape)
    there = {getattr(device, "slice_index", None) for device in devices}
    # Without coordinates in a torus, slices are but hosts: their network may be as fast.
    if slices == 1 and len(there) > 1 and getattr(devices[0], "coords", None):
        raise ValueError(
            f"The devices are in {len(there)} slices, with a slow network between them, and "
            f"mesh.slices=1; set mesh.slices={len(there)}."
        )
    if slices == 1:
        # An axis may take a part of an axis of the torus, which `jax.make_mesh` refuses.
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        placed = _over_slices(shape, slices, devices)
    return Mesh(placed, rules.AXES, axis_types=types)


def _over_slices(shape: list[int], slices: int, devices: list[jax.Device]) -> np.ndarray:
    """The devices in the shape of the mesh, each slice a contiguous part of the `data` axis."""
    # Where there are no slices, or all is one, hosts take their place.
    by_process = len({getattr(device, "slice_index", None) for device in devices}) == 1
    found = {d.process_index if by_process else d.slice_index for d in devices}
    if slices < 1 or len(found) != slices or shape[0] % slices:
        what = "processes" if by_process else "slices"
        raise ValueError(
            f"mesh.slices={slices} must be the number of {what} ({len(found)}) and divide "
            f"mesh.data={shape[0]}; only rows of a batch are spread over slices."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, *shape[1:]),
        (slices, *[1] * (len(shape) - 1)),
        devices=devices,
        process_is_granule=by_process,
        allow_split_physical_axes=True,
    )


def use(mesh: Mesh):
    """A context in which arrays are spread over the mesh, if it has more than one device."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def local_mesh() -> Mesh:
    """A mesh of this process's devices for sampling: rows spread, parameters as well.

    Tokens are those of one device, so that samples stored by any number of them may be used.
    """
    devices = jax.local_devices()
    sizes = {axis: 1 for axis in rules.AXES} | {"fsdp": len(devices)}
    return make_mesh(ConfigDict(sizes | {"slices": 1}), devices)


def leaf_sharding(mesh: Mesh, path: str, leaf) -> NamedSharding:
    """The sharding of one array or shape of the state, as `state_shardings`."""
    return NamedSharding(mesh, _checked_spec(mesh, path, leaf.shape))


def state_shardings(mesh: Mesh, abstract_state):
    """A sharding for each leaf of a tree of shapes (state, parameters), by `layout.RULES`.

    Raises:
      ValueError: naming the first leaf whose shape a rule doesn't fit, the axis and the remedy.
    """

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf_sharding(mesh, name, leaf)

    return jax.tree_util.tree_map_with_path(one, abstract_state)


def _checked_spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    spec = rules.spec_for(name)
    if len(spec) > len(shape):
        raise ValueError(
            f"The sharding rule {spec} doesn't fit {name}, which has the shape {shape}: it names "
            "more dimensions than there are; mend layout.RULES."
        )
    named = [axes if isinstance(axes, tuple) else (axes,) for axes in spec if axes is not None]
    flat = [axis for axes in named for axis in axes]
    if len(set(flat)) < len(flat) or not set(flat) <= set(mesh.shape):
        raise ValueError(
            f"The sharding rule {spec} of {name} names an axis twice, or one that the mesh "
            f"{dict(mesh.shape)} lacks; mend layout.RULES."
        )
    for dimension, axes in enumerate(spec):
        if shape[dimension] % _parts(mesh, axes):
            axes = axes if isinstance(axes, tuple) else (axes,)
            sizes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes)
            raise ValueError(
                f"{name} can't be spread: dimension {dimension} of its shape {shape} doesn't "
                f"divide by {sizes}. Choose a smaller {' or '.join(f'mesh.{a}' for a in axes)} "
                "and a larger mesh.data, or another model.width."
            )
    return spec


def put(path: str, leaf: jax.Array | np.ndarray | jax.ShapeDtypeStruct):
    """A parameter where sampling wants it, on the mesh of `jax.set_mesh` or the default device.

    Args:
      path: of the parameter, which the rules go by.
      leaf: its values, which are put there, or its shape, which gets that sharding.

    A dimension that doesn't divide is whole on each device, where `state_shardings` refuses it: any
    model can be sampled on any number of devices.
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
    """`put` of all parameters in a tree."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: put(name(path), leaf), params)


def _parts(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """How many parts a dimension over these axes is in."""
    axes = axes if isinstance(axes, tuple) else (axes,) if axes else ()
    return math.prod(mesh.shape[axis] for axis in axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch spread over the axes that share them."""
    return NamedSharding(mesh, rules.activation_spec("rows"))


def whole(mesh: Mesh) -> NamedSharding:
    """All of an array on each device."""
    return NamedSharding(mesh, P())


def row_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are in."""
    return math.prod(mesh.shape[axis] for axis in rules.ACTIVATIONS["rows"])


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that this process's devices hold, in order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for (part,) in places.values() for row in range(batch_size)[part]})


def place_rows(mesh: Mesh, batch_size: int, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The whole batch as arrays spread over the mesh, from this process's `local_rows` of it."""
    spread, rows = batch_sharding(mesh), local_rows(mesh, batch_size)
    at = {row: i for i, row in enumerate(rows)}

    def place(own):
        def part(index):
            wanted = range(batch_size)[index[0]]
            return own[at[wanted[0]] : at[wanted[0]] + len(wanted)]

        return jax.make_array_from_callback((batch_size, *own.shape[1:]), spread, part)

    return jax.tree.map(place, batch)


def check_batch_size(mesh: Mesh, batch_size: int, key: str) -> None:
    """ValueError naming the config `key` unless rows spread evenly over the mesh."""
    shards = row_shards(mesh)
    if batch_size < 1 or batch_size % shards:
        sizes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in rules.ACTIVATIONS["rows"])
        raise ValueError(
            f"{key}={batch_size} must be a positive multiple of the {shards} data shard(s) of "
            f"the mesh ({sizes})."
        )


def check_heads(mesh: Mesh, num_heads: int) -> None:
    """ValueError unless the heads of attention spread evenly over the `tensor` axis."""
    if num_heads % mesh.shape["tensor"]:
        raise ValueError(
            f"model.num_heads={num_heads} must be a multiple of mesh.tensor="
            f"{mesh.shape['tensor']}: each device of that axis computes some of the heads."
        )


# ------------------------------------------------------------------------------------------ report


_LINE_WIDTH = 100


class Placed(NamedTuple):
    """Where a leaf of the state lies: its path, shape, dtype, spec, and bytes in all and on each
    device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: P
    total_bytes: int
    device_bytes: int


def describe(mesh: Mesh, abstract_state) -> list[Placed]:
    """Where each leaf of a tree of shapes lies on a mesh, by `state_shardings`."""
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
