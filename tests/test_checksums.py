"""Checksums: equal for every sharding, different after a change of any bit."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fsdfm_jax.training import checksums as module
from fsdfm_jax.training.checksums import checksums

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool", "complex64")


def one(leaf):
    return checksums({"x": leaf})["x"]


def make(dtype, shape, seed=0):
    values = np.random.default_rng(seed).integers(0, 2, (*shape, 8 * np.dtype(dtype).itemsize))
    if np.dtype(dtype) == bool:
        return values[..., 0].astype(bool)
    return np.packbits(values.astype(np.uint8), axis=-1).view(dtype)[..., 0]


def mix(x):
    """MurmurHash3's finaliser, from its description, in integers without a width."""
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def literal(array):
    """The definition, element by element."""
    sums = [0, 0]
    for index, value in enumerate(array.reshape(-1)):
        data = value.tobytes()
        words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
        first = mix((index * 0x9E3779B9 + mix(0x9E3779B9)) % 2**32)
        second = mix(first ^ 0x5BD1E995)
        for word in words:
            first = mix(first ^ word)
            second = mix((second + word * 0x9E3779B9) % 2**32)
        sums = [(sums[0] + first) % 2**32, (sums[1] + second) % 2**32]
    return f"{sums[0]:08x}{sums[1]:08x}"


@pytest.mark.parametrize("dtype", [*DTYPES, "float64", "int64", "complex128"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5)])
def test_the_definition(dtype, shape):
    array = make(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, shape)
    assert one(array) == literal(array)
    if dtype in DTYPES:
        assert one(jnp.asarray(array)) == literal(array)


def test_layouts_of_numpy_and_empty_arrays():
    array = make("float64", (4, 6))
    assert one(array.T) == one(np.ascontiguousarray(array.T)) != one(array)
    assert one(np.zeros((0, 3))) == one(jnp.zeros((0, 3))) == "0" * 16


MESHES = {
    "one": ((1,), "a", [P()]),
    "eight": ((8,), "a", [P(), P("a"), P(None, None, "a")]),
    "cube": ((2, 2, 2), "abc", [P("a", "b", "c"), P(("a", "b"), "c"), P(None, ("c", "a")), P()]),
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_sharding_gives_the_same(dtype):
    array = make(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, (8, 16, 8))
    found = {one(array), one(jnp.asarray(array)), one(jax.device_put(array, jax.devices()[5]))}
    for shape, names, specs in MESHES.values():
        axis_types = (jax.sharding.AxisType.Auto,) * len(names)
        mesh = jax.make_mesh(shape, tuple(names), axis_types=axis_types)
        for spec in specs:
            placed = jax.device_put(array, NamedSharding(mesh, spec))
            found.add(one(placed))
            with jax.set_mesh(jax.make_mesh((8,), ("other",))):
                found.add(one(placed))
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype):
    array = make(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, (2, 3))
    seen = {one(array)}
    raw = array.view(np.uint8)
    bits = 1 if dtype == "bool" else 8
    for index in np.ndindex(raw.shape):
        for bit in range(bits):
            changed = raw.copy()
            changed[index] ^= 1 << bit
            seen.add(one(changed.view(array.dtype)))
    assert len(seen) == 1 + raw.size * bits


def test_places_count():
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    others = [array[::-1], array[:, ::-1], array[[1, 0, 2]], np.roll(array, 1), array * 0]
    assert len({one(x) for x in (array, *others)}) == 6
    # Elements that are all alike are told apart from another number of them.
    assert one(np.zeros(3)) != one(np.zeros(4))


def test_places_beyond_one_word(monkeypatch):
    """As in an array of more than 2^32 elements, with a word that counts to 8."""
    monkeypatch.setattr(module, "_COUNTED", 8)
    inner, outer = (np.asarray(x) for x in module._position((3, 5, 2, 4)))
    assert (inner.max(), outer.max()) == (7, 14)
    assert len(set(zip(inner.flat, outer.flat, strict=True))) == 120


@pytest.mark.parametrize("dtype", ["float32", "bool", "complex128"])
def test_arrays_of_the_host_are_hashed_in_pieces(monkeypatch, dtype):
    array = make(dtype, (3, 5, 2, 4))
    whole = one(array)
    monkeypatch.setattr(module, "_PIECE", 7)
    assert one(array) == whole
    monkeypatch.setattr(module, "_COUNTED", 8)
    rows = one(array)
    assert rows != whole
    monkeypatch.setattr(module, "_PIECE", 3)
    assert one(array) == rows
    if dtype != "complex128":
        assert one(jnp.asarray(array)) == rows  # no other test compiles this shape


def test_nothing_is_gathered_and_little_memory_taken():
    names, specs = ("a", "b", "c"), (P("a", ("b", "c")), P(None, "b"), P(("c", "a")))
    mesh = jax.make_mesh((2, 2, 2), names, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    for dtype in ("float32", "bfloat16", "bool"):
        for spec in specs:
            sharding = NamedSharding(mesh, spec)
            leaf = jax.ShapeDtypeStruct((512, 1024), dtype, sharding=sharding)
            compiled = module._sums.lower(leaf).compile()
            # What the devices tell each other: sums, a word for each of them at most.
            moved = re.findall(
                r"= \w+\[([\d,]*)\]\S* (?:all-\w+|collective-\w+|reduce-scatter)",
                compiled.as_text(),
            )
            assert moved
            for shape in moved:
                assert np.prod([int(n) for n in shape.split(",") if n]) <= mesh.size
            assert compiled.memory_analysis().temp_size_in_bytes < 4096
