"""Checksums of arrays that don't depend on how an array is spread over devices.

The sum over all elements of a hash of (position, bits) does not care where an element lies or in
which order the sum is taken, and in integers modulo 2^32 it is exact. So it is computed where the
array is: element by element and one reduction, nothing is gathered.

    checksums({"w": w})  ->  {"w": "1f0c5a9e77d2b340"}

Two such sums with different hashes give 64 bits. A change of one element always changes the first
(for elements of up to 32 bits), any other change is missed with probability about 2^-64. They are
against accidents, not against forgery. Mixing function: the finaliser of MurmurHash3 (Appleby 2011,
public domain).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(leaves: Mapping[str, Any]) -> dict[str, str]:
    """{name: 16 hexadecimal digits} of arrays; equal bits of equal shapes give equal checksums.

    Args:
      leaves: {name: array} of any shape and dtype, jax (with several processes each of them calls
        this with its part of the same global arrays) or numpy (hashed on this process alone).
    """
    return {name: "".join(f"{word:08x}" for word in _sums_of(x)) for name, x in leaves.items()}


def _sums_of(leaf: Any) -> np.ndarray:
    """Both sums; one leaf after the other.

    Several programs at once that exchange something and don't depend on each other can wait for
    each other's threads for ever where devices are simulated, and copies of a whole numpy state
    would be its size again.
    """
    if isinstance(leaf, jax.Array):
        return _fetch(_sums_where_it_is(leaf, leaf.ndim))
    leaf = np.asarray(leaf, order="C")
    ndim = leaf.ndim
    if leaf.dtype.itemsize > 4:  # JAX may have no such dtype: words along one axis more
        leaf = leaf[..., None].view(np.uint32)
    return _fetch(_sums_where_it_is(jax.device_put(leaf, jax.local_devices()[0]), ndim))


def _sums_where_it_is(leaf: jax.Array, ndim: int) -> jax.Array:
    mesh = getattr(leaf.sharding, "mesh", None)
    if mesh is None:
        mesh = jax.sharding.Mesh(np.array(list(leaf.sharding.device_set)), ("devices",))
    with jax.set_mesh(mesh):  # the caller's mesh may be another one than this leaf's
        return _sums(leaf, ndim=ndim)


def _fetch(sums: jax.Array) -> np.ndarray:
    return np.asarray(sums.addressable_data(0))  # every device has both sums


def _checksum(leaf: jax.Array, *, ndim: int) -> jax.Array:
    """Two sums, uint32[2]; a leaf with more than `ndim` axes has its words along the last one."""
    words = _words(leaf) if leaf.ndim == ndim else [leaf[..., i] for i in range(leaf.shape[-1])]
    inner, outer = _position(leaf.shape[:ndim])
    first = _mix(inner * _ODD + _mix(outer + _ODD))
    second = _mix(first ^ _SALT)
    for word in words:
        first = _mix(first ^ word)
        second = _mix(second + word * _ODD)
    # One reduction of both: with two of them the compiler keeps `first`, as large as the leaf.
    zero, add = np.uint32(0), lambda a, b: (a[0] + b[0], a[1] + b[1])
    return jnp.stack(jax.lax.reduce((first, second), (zero, zero), add, range(ndim)))


_sums = jax.jit(_checksum, static_argnames="ndim")


def _words(leaf: jax.Array) -> list[jax.Array]:
    """The bits of each element as one or more uint32, the lowest first."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return _words(leaf.real) + _words(leaf.imag)
    if leaf.dtype == jnp.bool_:
        return [leaf.astype(jnp.uint32)]
    info = jnp.iinfo if jnp.issubdtype(leaf.dtype, jnp.integer) else jnp.finfo
    bits = info(leaf.dtype).bits
    if bits == 64:
        pair = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        return [pair[..., 0], pair[..., 1]]
    return [jax.lax.bitcast_convert_type(leaf, f"uint{bits}").astype(jnp.uint32)]


def _position(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Two uint32 that together are different for all elements.

    The flat index within the last axes, as many as one word can count, and that of the axes before:
    one flat index would wrap round in arrays of more than 2^32 elements.
    """
    first, size = len(shape), 1
    while first and size * shape[first - 1] <= _COUNTED:
        first -= 1
        size *= shape[first]
    return _flat_index(shape, range(first, len(shape))), _flat_index(shape, range(first))


def _flat_index(shape: tuple[int, ...], axes: range) -> jax.Array:
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(axes):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which each bit of the input reaches each of the output."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


_COUNTED = 2**32  # positions that one word tells apart
_ODD = np.uint32(0x9E3779B9)
_SALT = np.uint32(0x5BD1E995)
