"""Blocked attention against all scores at once, and the choice of "auto"."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsdfm_jax.ops import attention
from fsdfm_jax.ops.attention import attend

CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def arrays(batch, heads, length, width, *, dtype=jnp.float32, seed=0):
    """q, k, v and a cotangent; scores of order 3, so that weights differ."""
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(rng.standard_normal((batch, heads, length, width)), dtype)
    q, k, v, cotangent = (draw() for _ in range(4))
    return 3 * q, k, v, cotangent


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def output_and_gradients(implementation, causal, q, k, v, cotangent, block_scores=None):
    """(output, dq, dk, dv); the block size, set by the caller, is part of the cache key."""
    del block_scores
    of = functools.partial(attend, causal=causal, implementation=implementation)
    out, pull = jax.vjp(of, q, k, v)
    return out, *pull(cotangent)


def assert_close(got, want, tolerance):
    """The largest difference, relative to the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


# (heads, blocks, queries) at a time, of 2 x 6 heads and 13 positions, 169 scores a head: all heads;
# 4 of them; 4 where 5 fit, as they don't divide 12; one; blocks that don't divide 13.
SIZES = {
    2**20: (12, 1, 13),
    4 * 169: (4, 1, 13),
    5 * 169 + 8: (4, 1, 13),
    169: (1, 1, 13),
    100: (1, 2, 7),
    65: (1, 3, 5),
    30: (1, 5, 3),
    1: (1, 13, 1),
}


@CAUSAL
@pytest.mark.parametrize("block_scores", list(SIZES))
def test_blocked_is_manual(monkeypatch, block_scores, causal):
    args = arrays(2, 6, 13, 4)
    want = output_and_gradients("manual", causal, *args)
    monkeypatch.setattr(attention, "_BLOCK_SCORES", block_scores)
    blocks = attention._Blocks(args[0], args[1])
    assert blocks.split(args[0]).shape[1:4] == (SIZES[block_scores][1], *SIZES[block_scores][::2])
    got = output_and_gradients("blocked", causal, *args, block_scores)
    for one, two in zip(got, want, strict=True):
        assert one.dtype == jnp.float32
        assert_close(one, two, 1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 1, 64, 8), (1, 5, 31, 6)], ids=str)
def test_blocked_is_manual_with_other_shapes(monkeypatch, shape):
    monkeypatch.setattr(attention, "_BLOCK_SCORES", 500)
    args = arrays(*shape, seed=1)
    for one, two in zip(
        output_and_gradients("blocked", True, *args, 500),
        output_and_gradients("manual", True, *args),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 9])
def test_more_or_fewer_keys_than_queries(monkeypatch, length):
    monkeypatch.setattr(attention, "_BLOCK_SCORES", 12)
    q, _, _, cotangent = arrays(2, 3, 5, 4)
    _, k, v, _ = arrays(2, 3, length, 4, seed=2)
    for one, two in zip(
        output_and_gradients("blocked", False, q, k, v, cotangent, 12),
        output_and_gradients("manual", False, q, k, v, cotangent),
        strict=True,
    ):
        np.testing.assert_allclose(one, two, atol=1e-5, rtol=1e-5)


@CAUSAL
def test_blocked_in_half_precision(monkeypatch, causal):
    args = arrays(2, 3, 13, 8, dtype=jnp.bfloat16)
    exact = output_and_gradients("manual", causal, *(x.astype(jnp.float32) for x in args))
    monkeypatch.setattr(attention, "_BLOCK_SCORES", 65)
    got = output_and_gradients("blocked", causal, *args, 65)
    for one, two in zip(got, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        # Weights, their gradients and the results are rounded at 2^-9 each, the sums are not.
        assert_close(one, two, 2**-6)


def test_large_scores_neither_overflow_nor_vanish(monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK_SCORES", 65)
    q, k, v, cotangent = arrays(1, 2, 13, 4)
    for causal in (False, True):
        got = output_and_gradients("blocked", causal, 300 * q, k, v, cotangent, 65)
        want = output_and_gradients("manual", causal, 300 * q, k, v, cotangent)
        for one, two in zip(got, want, strict=True):
            assert np.all(np.isfinite(one))
            # Scores of 1,000 and more round at 1e-4; gradients are differences that nearly vanish.
            np.testing.assert_allclose(one, two, atol=2e-3)


@CAUSAL
def test_implementations_have_the_same_gradients(causal):
    args = arrays(2, 3, 5, 4)
    manual = output_and_gradients("manual", causal, *args)
    for name in ("xla", "blocked", "auto"):
        for one, two in zip(output_and_gradients(name, causal, *args), manual, strict=True):
            assert jnp.isfinite(two).all()  # masked scores are -inf
            np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("name", ["manual", "blocked", "xla"])
def test_scores_and_softmax_are_float32(name):
    # Scores 512 and 514, halved: float32 tells them apart, bfloat16 (spacing 4) doesn't.
    q = jnp.asarray([[16.0, 1.0, 0.0, 0.0]], jnp.bfloat16)[None, None]
    k = jnp.asarray([[32.0, 0.0, 0.0, 0.0], [32.0, 2.0, 0.0, 0.0]], jnp.bfloat16)[None, None]
    v = jnp.asarray([[0.0] * 4, [1.0] * 4], jnp.bfloat16)[None, None]
    out = attend(q, k, v, implementation=name)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), 1 / (1 + math.exp(-1)), atol=4e-3)


@pytest.mark.parametrize("name", ["auto", "manual", "blocked", "xla"])
def test_a_mask_says_who_is_seen(name):
    q, k, v, _ = arrays(2, 3, 5, 4)
    mask_LM = np.random.default_rng(0).random((5, 5)) < 0.5
    mask_LM[:, 0] = True  # everyone sees someone
    out = np.asarray(attend(q, k, v, mask_LM=jnp.asarray(mask_LM), implementation=name))
    scores = np.einsum("bhlk,bhmk->bhlm", *(np.asarray(x, np.float64) for x in (q, k))) / 2
    weights = np.where(mask_LM, np.exp(scores), 0)
    want = weights / weights.sum(-1, keepdims=True) @ np.asarray(v, np.float64)
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_a_mask_is_left_to_the_manual_form():
    q, k, v, _ = arrays(2, 3, 5, 4)
    mask_LM = jnp.tril(jnp.ones((5, 5), bool))
    np.testing.assert_array_equal(
        attend(q, k, v, mask_LM=mask_LM, implementation="blocked"),
        attend(q, k, v, mask_LM=mask_LM, implementation="manual"),
    )


class Device:
    def __init__(self, capability):
        if capability is not None:
            self.compute_capability = capability


@pytest.mark.parametrize(
    ("backend", "capability", "dtype", "width", "expected"),
    [
        ("cpu", None, "float32", 64, "blocked"),
        ("cpu", None, "bfloat16", 64, "blocked"),
        ("gpu", "9.0", "bfloat16", 64, "cudnn"),
        ("gpu", "8.0", "bfloat16", 128, "cudnn"),
        ("gpu", "9.0", "bfloat16", 256, "xla"),
        ("gpu", "9.0", "bfloat16", 12, "xla"),
        ("gpu", "9.0", "float32", 64, "xla"),
        ("gpu", "7.5", "bfloat16", 64, "xla"),
        ("gpu", "gfx90a", "bfloat16", 64, "xla"),  # AMD's
        ("tpu", None, "bfloat16", 64, "xla"),
    ],
)
def test_auto(monkeypatch, backend, capability, dtype, width, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [Device(capability)])
    q_BHLK = jax.ShapeDtypeStruct((1, 1, 4, width), jnp.dtype(dtype))
    assert attention.resolve("auto", q_BHLK) == expected
    for name in ("manual", "blocked", "xla", "cudnn"):
        assert attention.resolve(name, q_BHLK) == name


def test_auto_runs_in_one_piece_where_rows_are_spread():
    q_BHLK = jax.ShapeDtypeStruct((8, 1, 4, 8), jnp.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert attention.resolve("auto", q_BHLK) == "manual"
    assert attention.resolve("auto", q_BHLK) == "blocked"


def test_nothing_of_all_scores_is_kept(monkeypatch):
    """Neither the forward nor the backward pass stores [L, M] of every head."""
    monkeypatch.setattr(attention, "_BLOCK_SCORES", 2**14)
    q, k, v, cotangent = arrays(2, 4, 256, 8)
    scores = 4 * 2 * 4 * 256 * 256
    held = {}
    for name in ("blocked", "manual"):
        program = output_and_gradients.lower(name, False, q, k, v, cotangent, 2**14)
        held[name] = program.compile().memory_analysis().temp_size_in_bytes
    assert held["blocked"] < scores / 2
    assert held["manual"] >= scores
