"""Checksums of arrays, independent of sharding and computed without gathering.

A checksum is two sums over all elements of a hash of (position, bits), modulo 2^32. The order of
summation doesn't matter, so devices hash their own elements and exchange two words. NumPy arrays
are hashed on the host, in pieces.

    checksums({"w": w})  ->  {"w": "1f0c5a9e77d2b340"}

A change of one element of up to 32 bits always changes the first sum. Any other change goes
undetected with probability about 2^-64. Checksums detect accidents, not tampering. The mixing
function is the finaliser of MurmurHash3 (Appleby 2011, public domain).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


def checksums(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Compute {name: 16 hexadecimal digits}; equal bits and shapes give equal checksums.

    Args:
      leaves: {name: array} of any shape and dtype. JAX arrays that span processes need a call in
        every process. NumPy arrays are hashed by this process alone.
    """
    # One leaf at a time: simulated devices can deadlock on concurrent collectives.
    return {name: "{:08x}{:08x}".format(*_sums_of(leaf)) for name, leaf in leaves.items()}


def _sums_of(leaf: Any) -> tuple[int, int]:
    if not isinstance(leaf, jax.Array):
        return _host_sums(np.asarray(leaf, order="C"))
    mesh = getattr(leaf.sharding, "mesh", None)
    if mesh is None:
        mesh = jax.sharding.Mesh(np.array(list(leaf.sharding.device_set)), ("devices",))
    with jax.set_mesh(mesh):  # the caller's mesh may differ from this leaf's
        sums = _sums(leaf)
    first, second = np.asarray(sums.addressable_data(0)).tolist()  # every device has both
    return first, second


@jax.jit
def _sums(leaf: jax.Array) -> jax.Array:
    """Return both sums, uint32[2]."""
    pair = _hashes(_words(leaf), *_position(leaf.shape))
    # One joint reduction: with two, XLA materialises a hash array as large as the leaf.
    zero, add = np.uint32(0), lambda a, b: (a[0] + b[0], a[1] + b[1])
    return jnp.stack(jax.lax.reduce(pair, (zero, zero), add, range(leaf.ndim)))


def _host_sums(array: np.ndarray) -> tuple[int, int]:
    row = math.prod(array.shape[_counted_axes(array.shape) :])
    words = array.reshape(-1).view(f"u{min(array.itemsize, 4)}")
    words = words.reshape(array.size, max(array.itemsize // 4, 1))  # [elements, words of one]
    sums = [0, 0]
    for start in range(0, array.size, row or 1):
        for inner in range(0, row, _PIECE):
            piece = words[start + inner : start + min(inner + _PIECE, row)].astype(np.uint32)
            position = np.arange(len(piece), dtype=np.uint32) + np.uint32(inner)
            pair = _hashes(list(piece.T), position, np.array([start // row], np.uint32))
            sums = [
                (total + int(values.sum(dtype=np.uint64))) % 2**32
                for total, values in zip(sums, pair, strict=True)
            ]
    return sums[0], sums[1]


def _hashes(words: list[Array], inner: Array, outer: Array) -> tuple[Array, Array]:
    """Two hashes of each element from its words (lowest first) and position (outer, inner)."""
    first = _mix(inner * _ODD + _mix(outer + _ODD))
    second = _mix(first ^ _SALT)
    for word in words:
        first = _mix(first ^ word)
        second = _mix(second + word * _ODD)
    return first, second


def _words(leaf: jax.Array) -> list[jax.Array]:
    """Return the bits of each element as one or more uint32 words, lowest first."""
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
    """Two uint32 per element, (inner, outer), that identify its position.

    `inner` is the flat index within the last axes, as many as one word can count; `outer` is that
    of the axes before. A single index would overflow for more than 2^32 elements.
    """
    first = _counted_axes(shape)
    return _flat_index(shape, range(first, len(shape))), _flat_index(shape, range(first))


def _counted_axes(shape: tuple[int, ...]) -> int:
    """Index of the first axis of `inner`, see `_position`."""
    first, size = len(shape), 1
    while first and size * shape[first - 1] <= _COUNTED:
        first -= 1
        size *= shape[first]
    return first


def _flat_index(shape: tuple[int, ...], axes: range) -> jax.Array:
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(axes):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _mix(x: Array) -> Array:
    """Apply a bijection of 32-bit words in which each input bit affects every output bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


_COUNTED = 2**32  # positions that one word can index
_PIECE = 2**15  # elements per piece on the host, sized for the cache
_ODD = np.uint32(0x9E3779B9)
_SALT = np.uint32(0x5BD1E995)
