"""Where arrays lie on a mesh: one table for parameters, one for activations.

Axes of the mesh, outermost first:

    data     rows of a batch; parameters are held by each
    fsdp     rows of a batch as well; parameters are spread, and gathered where they are used
    tensor   heads of attention, hidden channels of the MLP, positions before the vocabulary head

`RULES` goes by a parameter's path and so covers whatever mirrors the parameters: their average, the
optimiser's moments, frozen weights. The network names what it computes by `ACTIVATIONS`. Without a
mesh (`jax.set_mesh`) all of this is nothing.

The vocabulary is never split: the sizes of published ones have no small divisors, and the head
works position by position, so that positions are what the `tensor` axis shares there.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")

# (pattern searched in the leaf's path, spec); the first match counts. Stacked parameters of blocks
# have a leading axis of N. What no rule names is small (norms, biases, embedders) and held by each.
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

# Names of the dimensions of activations, and the axes they are spread over.
ACTIVATIONS: dict[str | None, str | tuple[str, ...] | None] = {
    "rows": ("data", "fsdp"),
    "heads": "tensor",
    "hidden": "tensor",
    "positions": "tensor",
    "parts": AXES,  # of sums over rows and positions
    "replicas": "data",  # rows, or such parts, where the other axes spread another dimension
    "spread": _SPREAD,
    None: None,
}


def spec_for(path: str) -> P:
    """The partition spec of the leaf at `path` ("params/blocks/q_proj/kernel")."""
    return next(spec for pattern, spec in RULES if re.search(pattern, path))


def activation_spec(*names: str | None) -> P:
    """The partition spec of an activation whose dimensions have these names."""
    return P(*(ACTIVATIONS[name] for name in names))


def shards(name: str) -> int:
    """How many parts a dimension of activations is in, on the mesh of this trace; 1 without one."""
    mesh, axes = jax.sharding.get_abstract_mesh(), ACTIVATIONS[name] or ()
    axes = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.shape)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out by the names of its first dimensions; values don't change.

    A dimension that doesn't divide (a single row) is left to the compiler.
    """
    if not _is_spread():
        return x
    spec = [
        axes if size % shards(name) == 0 else P.UNCONSTRAINED
        for axes, size, name in zip(activation_spec(*names), x.shape, names, strict=False)
    ]
    return _constrain(x, P(*spec))


def pad_rows(x: jax.Array) -> jax.Array:
    """A part of a batch with its last row repeated until the rows spread evenly over the mesh."""
    missing = -x.shape[0] % shards("rows")
    if missing:
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), mode="edge")
    return constrain(x, "rows")


def gather(weight: jax.Array, path: str) -> jax.Array:
    """A parameter as it is used: whole, but for what the `tensor` axis splits.

    Its gradient goes back to where the parameter lies, so that it is summed over rows and spread in
    one exchange.

    Args:
      weight: the parameter, or that of one block out of a stack.
      path: of the parameter, which the rules go by.
    """
    if not _is_spread():
        return weight
    stored = tuple(spec_for(path))
    stored = stored[max(0, len(stored) - weight.ndim) :]
    used = P(*(axis if axis == "tensor" else None for axis in stored))
    return _gather(used, P(*stored), weight)


def stored(gradient: jax.Array, path: str) -> jax.Array:
    """The gradient of a whole parameter, summed and spread as the parameter lies."""
    return _constrain(gradient, spec_for(path)) if _is_spread() else gradient


def like_parameters(tree):
    """A tree that mirrors the parameters, as a gradient does, spread as they lie."""

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
