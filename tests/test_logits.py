"""Factored logits: operations in chunks equal operations on full logits."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fsdfm_jax.flow import jumps, losses
from fsdfm_jax.flow.schedules import Polynomial
from fsdfm_jax.flow.sources import Source
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.ops.logits import Factored, average, dense, divide, map_positions, mean_loss

D = 6


def factored(seed, batch, length, size, *, positions=0, **changes):
    """Random factored logits of order 1, with a given chunk size."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return Factored(
        draw(batch, length, D),
        draw(D, size),
        draw(size),
        **({"chunk_size": positions * batch * size} | changes),
    )


def whole_numbers(seed, batch, length, size, **changes):
    """Factors of small integers: products and sums are exact in any order."""
    logits = factored(seed, batch, length, size, **changes)
    rounded = {
        name: jnp.round(getattr(logits, name)) for name in ("features_BLD", "kernel_DV", "bias_V")
    }
    return dataclasses.replace(logits, **rounded)


def trainable(logits):
    return logits.features_BLD, logits.kernel_DV, logits.bias_V


def put(logits, parts):
    return dataclasses.replace(logits, features_BLD=parts[0], kernel_DV=parts[1], bias_V=parts[2])


def assert_close(got, want, tolerance=1e-5):
    """The largest difference, relative to the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.abs(want).max() > 1e-4  # the comparison is not of zeros
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def path_case(batch, length, size):
    xt, x1 = jax.random.randint(jax.random.key(1), (2, batch, length), 0, size)
    xt = jnp.where(jnp.arange(length) % 3 == 0, x1, xt[:, :])  # shown ones among them
    weight = jax.random.uniform(jax.random.key(2), (batch, length)) + 0.5
    return losses.path_loss, (xt, x1, weight)


def distillation_case(divergence, temperature, batch, length, size):
    def match(student, teacher):
        return losses.distillation_loss(divergence, teacher, student, temperature=temperature)

    return match, (factored(9, batch, length, size),)


CASES = {
    "path_loss": path_case,
    "cross_entropy": lambda *shape: (losses.cross_entropy, path_case(*shape)[1][1:2]),
    "forward_kl": functools.partial(distillation_case, losses.forward_kl, 1.0),
    "forward_kl_2": functools.partial(distillation_case, losses.forward_kl, 2.0),
    "jsd": functools.partial(distillation_case, losses.jensen_shannon, 1.0),
    "jsd_2": functools.partial(distillation_case, losses.jensen_shannon, 2.0),
}


@functools.partial(jax.jit, static_argnums=0)
def fused(loss, logits, args):
    """(value, gradients of features, kernel and bias)."""
    of = lambda parts: mean_loss(loss, put(logits, parts), *args)
    return jax.value_and_grad(of)(trainable(logits))


@functools.partial(jax.jit, static_argnums=0)
def unfused(loss, logits, args):
    args = [dense(x) if isinstance(x, Factored) else x for x in args]
    of = lambda parts: jnp.mean(loss(dense(put(logits, parts)), *args))
    return jax.value_and_grad(of)(trainable(logits))


def assert_fused_is_unfused(loss, logits, args, tolerance=1e-5):
    got, want = fused(loss, logits, args), unfused(loss, logits, args)
    assert got[0].dtype == jnp.float32
    assert got[0].shape == ()
    assert_close(got[0], want[0])
    for part, expected in zip(got[1], want[1], strict=True):
        assert part.dtype == jnp.float32
        assert_close(part, expected, tolerance)


# ------------------------------------------------------------------------------------- mean_loss


@pytest.mark.parametrize("shape", [(3, 13, 50), (1, 7, 257)], ids=str)
@pytest.mark.parametrize("case", list(CASES))
def test_fused_is_unfused(case, shape):
    # 13 = 4 + 4 + 4 + 1 and 7 = 4 + 3 positions: the last chunk is filled up.
    assert_fused_is_unfused(*_arranged(case, shape, positions=4))


def _arranged(case, shape, **changes):
    loss, args = CASES[case](*shape)
    return loss, factored(0, *shape, **changes), args


@pytest.mark.parametrize("chunk_size", [0, 1, 15, 16, 45, 90, 195, 10**9])
def test_any_chunk_size(chunk_size):
    # 15 entries a position: less than one, one, three, six of 13 positions, all of them.
    loss, logits, args = _arranged("cross_entropy", (3, 13, 5), chunk_size=chunk_size)
    assert_fused_is_unfused(loss, logits, args)
    # Without a gradient the value goes another way.
    value = jax.jit(functools.partial(mean_loss, loss))(logits, *args)
    assert_close(value, unfused(loss, logits, args)[0])


@pytest.mark.parametrize("temperature", [0.5, 3])
def test_the_temperature_of_the_logits(temperature):
    loss, logits, args = _arranged("forward_kl", (3, 7, 5), positions=3)
    args = tuple(divide(x, 2.0) for x in args)
    # As a number, and as data.
    for value in (float(temperature), jnp.float32(temperature)):
        assert_fused_is_unfused(loss, divide(logits, value), args)
    of = lambda value: mean_loss(loss, dataclasses.replace(logits, temperature=value), *args)
    assert jax.jit(jax.grad(of))(jnp.float32(temperature)) == 0


@pytest.mark.parametrize("case", ["path_loss", "forward_kl_2"])
def test_products_in_half_precision(case):
    loss, logits, args = _arranged(case, (3, 13, 50), positions=4, dtype="bfloat16")
    # The logits are the same, the products of their gradient round its factors at 2^-9: a few 2^-9
    # of the largest entry.
    assert_fused_is_unfused(loss, logits, args, tolerance=2**-7)
    # And it is bfloat16 that multiplies.
    full = fused(loss, dataclasses.replace(logits, dtype="float32"), args)
    half = fused(loss, logits, args)
    assert 1e-4 < np.abs(full[1][1] - half[1][1]).max() / np.abs(full[1][1]).max() < 2**-5


def test_gradients_have_the_dtype_of_what_they_belong_to():
    loss, logits, args = _arranged("cross_entropy", (3, 7, 5), positions=3)
    halved = dataclasses.replace(logits, features_BLD=logits.features_BLD.astype(jnp.bfloat16))
    of_features, of_kernel, _ = fused(loss, halved, args)[1]
    assert of_features.dtype == jnp.bfloat16
    assert of_kernel.dtype == jnp.float32


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_the_cotangent_scales_the_gradient(jit):
    loss, logits, args = _arranged("path_loss", (3, 7, 5), positions=3)
    value, plain = fused(loss, logits, args)
    # d sin(7 loss) = 7 cos(7 loss) d loss; the value beside another loss of the same features.
    total = lambda parts: (
        jnp.sin(7 * mean_loss(loss, put(logits, parts), *args)) + jnp.sum(parts[1])
    )
    got = jit(jax.grad(total))(trainable(logits))
    factor = 7 * np.cos(7 * value)
    for i, (part, expected) in enumerate(zip(got, plain, strict=True)):
        assert_close(part, factor * expected + (i == 1))


def test_no_gradient_flows_into_arguments():
    loss, logits, args = _arranged("path_loss", (3, 7, 5), positions=3)
    match, student, (teacher,) = _arranged("jsd", (3, 7, 5), positions=3)
    for student_logits, path_logits in ((student, logits), (dense(student), dense(logits))):
        of_weight = jax.grad(lambda w, x=path_logits: mean_loss(loss, x, *args[:2], w))
        assert not np.any(of_weight(args[2]))
        of_teacher = jax.grad(lambda t, x=student_logits: mean_loss(match, x, t))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher(teacher)))


def test_an_array_is_taken_as_it_is():
    loss, logits, args = _arranged("forward_kl", (3, 7, 5))
    for given in (dense(logits), dense(logits).astype(jnp.bfloat16)):
        for teacher in (args[0], dense(args[0])):
            value = mean_loss(loss, given, teacher)
            assert_close(value, jnp.mean(loss(given, dense(args[0]))), 1e-6)
    # Factored logits take a target that is an array, too.
    assert_close(mean_loss(loss, logits, dense(args[0])), fused(loss, logits, args)[0])


# --------------------------------------------------------------------------------- map_positions


def summary(logits_BLV, offset_BL):
    """The largest and the smallest logit and their indices, which don't round."""
    numbers = (jnp.max(logits_BLV, -1), jnp.argmax(logits_BLV, -1), jnp.min(logits_BLV, -1))
    return jnp.stack([offset_BL * n for n in numbers], axis=-1)


@pytest.mark.parametrize("shape", [(3, 13, 5), (1, 7, 257), (2, 1, 50)], ids=str)
def test_map_positions_is_the_function_of_all_of_them(shape):
    logits = whole_numbers(0, *shape)
    offset_BL = jnp.arange(float(shape[0] * shape[1])).reshape(shape[:2])
    want = summary(dense(logits), offset_BL)
    assert want.shape == (*shape[:2], 3)
    np.testing.assert_array_equal(map_positions(summary, dense(logits), offset_BL), want)
    entries = shape[0] * shape[2]
    # A quarter of what may be held is held: 1, 2, 3, 5 positions, all.
    for chunk_size in (1, 8 * entries, 12 * entries, 20 * entries, 1000 * entries, 0):
        chunked = dataclasses.replace(logits, chunk_size=chunk_size)
        got = map_positions(summary, chunked, offset_BL)
        np.testing.assert_array_equal(got, want)


# ------------------------------------------------------------------------------------- arithmetic


def test_dense():
    logits = factored(0, 3, 7, 5)
    want = np.einsum("bld,dv->blv", *(np.asarray(x, np.float64) for x in trainable(logits)[:2]))
    want = want + np.asarray(logits.bias_V)
    assert logits.shape == want.shape == (3, 7, 5)
    assert_close(dense(logits), want, 1e-6)
    assert_close(dense(dataclasses.replace(logits, temperature=4.0)), want / 4, 1e-6)
    half = dense(dataclasses.replace(logits, dtype="bfloat16"))
    assert half.dtype == jnp.float32
    # Both factors round at 2^-9, their sums don't.
    assert_close(half, want, 2**-7)
    assert np.abs(half - want).max() > 1e-3
    assert np.mean(half == half.astype(jnp.bfloat16).astype(jnp.float32)) < 0.05
    array = jnp.ones((1, 2, 3), jnp.bfloat16)
    assert dense(array).dtype == jnp.float32


def test_average():
    weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
    first = factored(0, 3, 7, 5, temperature=2.0)
    parts = [
        dataclasses.replace(first, features_BLD=factored(seed, 3, 7, 5).features_BLD)
        for seed in range(4)
    ]
    want = sum(
        w * np.asarray(dense(part), np.float64) for w, part in zip(weights, parts, strict=True)
    )
    got = average(parts, weights)
    assert isinstance(got, Factored)
    assert_close(dense(got), want, 1e-6)
    assert_close(average([dense(part) for part in parts], weights), want, 1e-6)
    # In float32 for any dtype of the parts.
    halved = [
        dataclasses.replace(p, features_BLD=p.features_BLD.astype(jnp.bfloat16)) for p in parts
    ]
    assert average(halved, weights).features_BLD.dtype == jnp.float32


@pytest.mark.parametrize("weights", [(0.5, 0.4), (1.0, 1.0), (0.0, 0.0)])
def test_an_average_has_weights_that_add_up_to_1(weights):
    logits = factored(0, 1, 2, 3)
    for pair in ((logits, logits), (dense(logits), dense(logits))):
        with pytest.raises(ValueError, match=r"must sum to 1, got \(.*\)"):
            average(pair, weights)
    with pytest.raises(ValueError, match="shorter|longer"):
        average((logits, logits), (1.0,))


def test_divide_twice_multiplies():
    logits = factored(0, 3, 7, 5)
    for given in (logits, dense(logits)):
        once = divide(divide(given, 2.0), jnp.float32(4))  # powers of two: exact
        np.testing.assert_array_equal(dense(once), dense(given) / 8)
    assert divide(dense(logits).astype(jnp.bfloat16), 2.0).dtype == jnp.float32


def test_rows():
    logits = factored(0, 5, 7, 50, positions=2, temperature=2.0)
    some = logits_lib.rows(logits, 1, 3)
    assert some.shape == (2, 7, 50)
    assert_close(dense(some), dense(logits)[1:3], 1e-6)
    assert some.chunk_size == logits.chunk_size
    array = logits_lib.rows(dense(logits), 1, 3)
    np.testing.assert_array_equal(array, dense(logits)[1:3])


def test_a_factored_is_a_tree():
    logits = factored(0, 3, 7, 5, positions=2, dtype="bfloat16")
    for changed in (logits, divide(logits, 2.0), divide(logits, jnp.float32(2))):
        same = jax.jit(jax.lax.stop_gradient)(changed)
        assert isinstance(same, Factored)
        assert (same.dtype, same.chunk_size) == (logits.dtype, logits.chunk_size)
        assert (same.temperature is None) == (changed.temperature is None)
        for one, two in zip(trainable(same), trainable(changed), strict=True):
            np.testing.assert_array_equal(one, two)
    stopped = lambda parts: jnp.sum(dense(jax.lax.stop_gradient(put(logits, parts))))
    assert not any(np.any(part) for part in jax.grad(stopped)(trainable(logits)))


# ----------------------------------------------------------------------------------------- memory


def temporary_bytes(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("case", ["path_loss", "forward_kl"])
def test_a_loss_and_its_gradient_hold_a_chunk_of_logits(case):
    shape = (2, 256, 512)
    loss, logits, args = _arranged(case, shape, positions=16)
    array = 4 * int(np.prod(shape))
    # A handful of arrays of a sixteenth, with features and head, which are small here.
    assert temporary_bytes(functools.partial(fused, loss), logits, args) < array / 2
    everything = dataclasses.replace(logits, chunk_size=0)
    assert temporary_bytes(functools.partial(fused, loss), everything, args) >= array


@pytest.mark.parametrize("mask_id", [None, 511], ids=["uniform", "mask"])
def test_a_step_holds_a_chunk_of_logits(mask_id):
    shape = (2, 256, 512)
    logits = factored(0, *shape, positions=16)
    everything = dataclasses.replace(logits, chunk_size=0)
    xt_BL = jnp.full(shape[:2], 511)
    array = 4 * int(np.prod(shape))
    jump = jumps.make_jump(jumps.CUMULATIVE, Polynomial())
    finalize = jumps.make_finalize(Source(512, mask_id=mask_id))
    for draw, args in ((jump, (0.25, 0.5)), (finalize, ())):
        chunked = temporary_bytes(draw, jax.random.key(0), logits, xt_BL, *args)
        assert chunked < array / 2
        assert temporary_bytes(draw, jax.random.key(0), everything, xt_BL, *args) >= array


# ---------------------------------------------------------------------------------- many devices


@pytest.mark.optimised
@pytest.mark.parametrize("rows", [8, 16, 12], ids=["1 a device", "2 a device", "uneven"])
def test_rows_over_eight_devices_are_rows_on_one(rows):
    shape = (rows, 12, 50)
    loss, logits, args = _arranged("cross_entropy", shape, positions=4)
    want = fused(loss, logits, args)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("data") if rows % 8 == 0 else P())
    whole = NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, spread if x.shape[:1] == (rows,) else whole)
        compiled = fused.lower(loss, *jax.tree.map(place, (logits, args))).compile()
        got = compiled(*jax.tree.map(place, (logits, args)))
    jax.tree.map(functools.partial(assert_close, tolerance=1e-5), got, want)
    if rows % 8 == 0:
        # Gradients are exchanged once, not at each chunk: no collective within the loop.
        bodies = re.split(r"\n(?=\S)", compiled.as_text())
        exchanging = [
            body.split()[0] for body in bodies if re.search(r"all-(reduce|gather)\(", body)
        ]
        assert exchanging == ["ENTRY"]


# ------------------------------------------------------------------------------------------ nucleus
def _sorted_nucleus(logits, top_p):
    """Kept ids of one row, by sorting in float64."""
    p = np.exp(logits.astype(np.float64) - logits.max())
    order = np.argsort(-p, kind="stable")
    mass = np.cumsum(p[order] / p.sum())
    return set(order[: np.searchsorted(mass, top_p) + 1].tolist())


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
def test_a_nucleus_is_the_fewest_likeliest_tokens_of_that_mass(top_p):
    rows = np.random.default_rng(0).normal(size=(40, 2, 97)).astype(np.float32) * 3
    cut = np.asarray(logits_lib.nucleus(jnp.asarray(rows), top_p))
    for before, after in zip(rows.reshape(-1, 97), cut.reshape(-1, 97), strict=True):
        kept = np.flatnonzero(after > -np.inf)
        assert set(kept.tolist()) == _sorted_nucleus(before, top_p)
        np.testing.assert_array_equal(after[kept], before[kept])


def test_a_whole_nucleus_is_everything_and_ties_stay_together():
    row = jnp.log(jnp.float32([[0.25, 0.25, 0.25, 0.25], [0.5, 0.2, 0.2, 0.1]]))
    assert (logits_lib.nucleus(row, 1.0) > -jnp.inf).all()
    np.testing.assert_array_equal(
        logits_lib.nucleus(row, 0.6) > -jnp.inf,
        [[True] * 4, [True, True, True, False]],
    )


def test_factored_logits_are_cut_after_the_temperature():
    logits = factored(0, 2, 3, 11, positions=1)
    wanted = logits_lib.nucleus(dense(logits) / 0.5, 0.7)
    cut = logits_lib.nucleus(divide(logits, 0.5), 0.7)
    assert isinstance(cut, Factored)
    np.testing.assert_allclose(dense(cut), wanted, rtol=1e-5)
    got = map_positions(lambda logits_BLV: (logits_BLV > -jnp.inf).sum(-1), cut)
    np.testing.assert_array_equal(got, (wanted > -jnp.inf).sum(-1))
    assert 1 < float(got.mean()) < 11


def test_one_position():
    logits = factored(1, 2, 5, 7)
    for given in (logits, dense(logits)):
        got = jax.jit(logits_lib.position)(given, 3)
        assert got.shape == (2, 1, 7)
        np.testing.assert_allclose(dense(got)[:, 0], dense(logits)[:, 3], rtol=1e-5, atol=1e-6)
