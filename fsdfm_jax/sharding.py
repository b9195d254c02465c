"""Where arrays live: one mesh, one table of rules from parameter paths to partition specs.

The same table serves the parameters, their average and the optimiser's moments, at initialisation,
in the step and when a checkpoint is restored. Adding an axis means adding it to `AXES` and naming
it in `RULES`.
"""

import math
import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

AXES = ("data",)

# (pattern searched in the leaf's path, spec); the first match counts.
RULES: tuple[tuple[str, P], ...] = ((r".*", P()),)

BATCH_SPEC = P("data")


def make_mesh(config: ConfigDict) -> Mesh:
    """A mesh of all devices from `config.mesh`, whose axis sizes may hold one -1 ("what is left").

    Raises:
      ValueError: if the sizes don't multiply to the number of devices.
    """
    sizes = [config[axis] for axis in AXES]
    count = jax.device_count()
    known = math.prod(size for size in sizes if size != -1)
    wrong = (
        sizes.count(-1) > 1 or known < 1 or count % known or (-1 not in sizes and known != count)
    )
    if wrong:
        asked = ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"The mesh sizes ({asked}) must multiply to the {count} device(s) present, "
            "with at most one axis given as -1."
        )
    shape = tuple(count // known if size == -1 else size for size in sizes)
    # Auto: Linen's modules predate explicit sharding types.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_for(path: str) -> P:
    """The partition spec of the leaf at `path` ("params/blocks/q_proj/kernel")."""
    return next(spec for pattern, spec in RULES if re.search(pattern, path))


def state_shardings(mesh: Mesh, abstract_state):
    """A sharding for each leaf of a tree of shapes (state, parameters), by `RULES`."""

    def one(path, _leaf):
        return NamedSharding(mesh, spec_for(jax.tree_util.keystr(path, simple=True, separator="/")))

    return jax.tree_util.tree_map_with_path(one, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch spread over the data axis."""
    return NamedSharding(mesh, BATCH_SPEC)


def check_batch_size(mesh: Mesh, batch_size: int, key: str) -> None:
    """ValueError naming the config `key` unless rows spread evenly over the data axis."""
    shards = mesh.shape["data"]
    if batch_size < 1 or batch_size % shards:
        raise ValueError(
            f"{key}={batch_size} must be a positive multiple of the {shards} data shard(s) of "
            "the mesh."
        )
