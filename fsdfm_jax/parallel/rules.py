"""Sharding rules: one table for parameters, one for activations.

Axes of the mesh, outermost first:

    data     batch rows; parameters are replicated
    fsdp     batch rows; parameters are sharded, and all-gathered for use
    tensor   attention heads, hidden channels of the MLP, positions at the vocabulary head

`RULES` matches parameter paths, so it also covers everything that mirrors the parameters: their
EMA, the optimiser's moments, frozen weights. The network refers to activations by the names in
`ACTIVATIONS`. Without a mesh (`jax.set_mesh`) the rules have no effect.

The vocabulary is never sharded, since published vocabulary sizes have no small divisors. The head
works position by position, so the `tensor` axis shards positions there.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# (pattern searched in the leaf's path, spec); the first match applies. Stacked block parameters
# have a leading axis N. Everything else is small (norms, biases, embedders) and replicated.
_SPREAD = ("tensor", "fsdp")
RULES: tuple[tuple[str, P], ...] = (
    (r"vocab_embed/(embedding|positions)$", P(None, _SPREAD)),
    (r"head/kernel$", P(_SPREAD, None)),
    (r"blocks/(q_proj|k_proj|v_proj|mlp_in)/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/(out_proj|mlp_out)/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/mlp_in/bias$", P(None, "tensor")),
    (r"blocks/adaln/modulation/kernel$", P(None, None, _SPREAD)),
    (r"blocks/adaln/modulation/bias$", P(None, _SPREAD)),
    (r"blocks/adaln/condition_fuser/kernel$", P(None, None, _SPREAD)),
    (r"(final_adaln/modulation|condition_fuser)/kernel$", P(None, _SPREAD)),
    (r".*", P()),
)

# Names of activation dimensions, and the mesh axes they are sharded over.
ACTIVATIONS: dict[str | None, str | tuple[str, ...] | None] = {
    "rows": ("data", "fsdp"),
    "heads": "tensor",
    "hidden": "tensor",
    "positions": "tensor",
    "parts": AXES,  # partial sums over rows and positions
    "replicas": "data",  # rows or partial sums, when the other axes shard another dimension
    "spread": _SPREAD,
    None: None,
}


def spec_for(path: str) -> P:
    """Return the partition spec of the leaf at `path` ("params/blocks/q_proj/kernel")."""
    return next(spec for pattern, spec in RULES if re.search(pattern, path))


def activation_spec(*names: str | None) -> P:
    """Return the partition spec of an activation with these dimension names."""
    return P(*(ACTIVATIONS[name] for name in names))


def shards(name: str) -> int:
    """Number of shards of an activation dimension on the current mesh; 1 without a mesh."""
    mesh, axes = jax.sharding.get_abstract_mesh(), ACTIVATIONS[name] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.shape)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain the sharding of `x` by the names of its leading dimensions.

    A dimension that isn't divisible (a single row) is left to the compiler.
    """
    if not _is_spread():
        return x
    spec = [
        axes if size % shards(name) == 0 else P.UNCONSTRAINED
        for axes, size, name in zip(activation_spec(*names), x.shape, names, strict=False)
    ]
    return _constrain(x, P(*spec))


def pad_rows(x: jax.Array) -> jax.Array:
    """Pad a part of a batch by repeating its last row until rows shard evenly over the mesh."""
    missing = -x.shape[0] % shards("rows")
    if missing:
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode="edge")
    return constrain(x, "rows")


def gather(weight: jax.Array, path: str) -> jax.Array:
    """All-gather a parameter for use; only the `tensor` axis stays sharded.

    The gradient gets the sharding of the stored parameter: one reduce-scatter over rows.

    Args:
      weight: the parameter, or one block's part of a stacked one.
      path: of the parameter; selects the rule.
    """
    if not _is_spread():
        return weight
    stored = tuple(spec_for(path))
    stored = stored[max(0, len(stored) - weight.ndim) :]
    used = P(*(axis if axis == "tensor" else None for axis in stored))
    return _gather(used, P(*stored), weight)


def stored(gradient: jax.Array, path: str) -> jax.Array:
    """Shard the gradient of a whole parameter like the parameter."""
    return _constrain(gradient, spec_for(path)) if _is_spread() else gradient


def like_parameters(tree):
    """Shard a tree that mirrors the parameters, such as a gradient, like the parameters."""

    def one(path, leaf):
        return stored(leaf, jax.tree_util.keystr(path, simple=True, separator="/"))

    return jax.tree_util.tree_map_with_path(one, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(used, stored, weight):
    del stored
    return _constrain(weight, used)


def _gather_forward(used, stored, weight):
    return _gather(used, stored, weight), None


def _gather_backward(used, stored, _, gradient):
    del used
    return (_constrain(gradient, stored),)


_gather.defvjp(_gather_forward, _gather_backward)


def _is_spread() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and set(AXES) <= set(mesh.axis_names)


def _constrain(x, spec):
    return jax.lax.with_sharding_constraint(x, spec)
