"""Categorical draws: frequencies, sizes, entries of weight zero, and the far tail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies

from fsdfm_jax.ops import categorical as categorical_lib

# Draws by the million take longer than compiling them.
pytestmark = [pytest.mark.optimised, pytest.mark.slow]

N = 50_000
categorical = jax.jit(categorical_lib.draw)


def others(key, logits, current):
    """As `categorical.draw`, of all ids but the current one."""
    return categorical_lib.pick_other(
        categorical_lib.uniform(key, (*logits.shape[:-1], 4)), logits, current
    )


def softmax64(logits):
    p = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return p / p.sum()


@functools.partial(jax.jit, static_argnums=(2, 3))
def counted(key, logits_V, draw, rows):
    tokens = draw(key, jnp.broadcast_to(logits_V[None], (rows, len(logits_V))))
    return jnp.bincount(tokens, length=len(logits_V))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 10, 17])
def test_frequencies(size):
    logits_V = np.random.default_rng(size).normal(size=size).astype(np.float32) * 2
    counts = counted(jax.random.key(size), logits_V, categorical_lib.draw, N)
    assert_frequencies(counts, softmax64(logits_V))


def test_frequencies_over_a_real_vocabulary():
    size, rows, chunks = 50_257, 256, 32
    rng = np.random.default_rng(0)
    # Half of the mass on 8 tokens, the last among them, half on all the others.
    head = np.append(rng.integers(0, size - 1, 7), size - 1)
    p = rng.dirichlet(np.ones(size)) / 2
    p[head] += 1 / 16
    p /= p.sum()

    @jax.jit
    def draw(keys, logits_V):
        one = lambda key: categorical_lib.draw(key, jnp.broadcast_to(logits_V[None], (rows, size)))
        return jax.lax.map(one, keys)

    keys = jax.random.split(jax.random.key(1), chunks)
    tokens = np.ravel(draw(keys, jnp.asarray(np.log(p), jnp.float32)))
    assert tokens.min() >= 0
    assert tokens.max() < size
    # Judged on the head, and on the rest in 50 stripes (about 80 draws each).
    stripe = np.arange(size) * 50 // size
    stripe[head] = 50 + np.arange(8)
    assert_frequencies(np.bincount(stripe[tokens], minlength=58), np.bincount(stripe, p))


@pytest.mark.parametrize("size", [5, 16, 50])
def test_entries_without_weight_are_never_drawn(size):
    rng = np.random.default_rng(size)
    weights_V = rng.random(size).astype(np.float32)
    weights_V[rng.permutation(size)[: size // 2]] = 0
    weights_V[[0, -1]] = 0
    with np.errstate(divide="ignore"):
        logits_V = np.log(weights_V)
    counts = counted(jax.random.key(1), logits_V, categorical_lib.draw, N)
    assert_frequencies(counts, softmax64(logits_V))
    # The current id has no weight either, whether it is the most likely one or has weight zero.
    for current in (int(np.argmax(logits_V)), 0):
        draw = lambda key, x_NV, z=current: others(key, x_NV, jnp.full(x_NV.shape[:1], z))[0]
        counts = counted(jax.random.key(2), logits_V, draw, N)
        left_V = np.where(np.arange(size) == current, 0, weights_V.astype(np.float64))
        assert_frequencies(counts, left_V / left_V.sum())


@pytest.mark.parametrize("size", [2, 5, 16, 17, 50_257])
def test_the_mass_of_the_others(size):
    # Rows that exclude the most likely, the first and the last id, and one of probability 1 - 1e-9.
    logits_V = np.random.default_rng(size).normal(size=size).astype(np.float32) * 3
    sure_V = np.full(size, np.float32(np.log(1e-9 / (size - 1))))
    sure_V[1] = 0
    rows = [(logits_V, int(np.argmax(logits_V))), (logits_V, 0), (logits_V, size - 1), (sure_V, 1)]
    logits_RV, current_R = (np.stack(part) for part in zip(*rows, strict=True))
    ids_R, mass_R = jax.jit(others)(jax.random.key(0), logits_RV, current_R)
    assert np.all(ids_R != current_R)
    p_RV = np.stack([softmax64(row) for row in logits_RV])
    np.put_along_axis(p_RV, current_R[:, None], 0.0, axis=-1)
    np.testing.assert_allclose(mass_R, p_RV.sum(-1), rtol=1e-5)
    # Where all mass is on the current id, none is left.
    alone_1V = np.where(np.arange(size) == 1, 0.0, -np.inf).astype(np.float32)[None]
    assert others(jax.random.key(0), alone_1V, np.int32([1]))[1] == 0


def test_a_single_possible_token_is_always_drawn():
    for size in (2, 7, 50_257):
        for index in (0, size // 2, size - 1):
            logits_1V = np.full((1, size), -np.inf, np.float32)
            logits_1V[0, index] = -3.0
            assert categorical(jax.random.key(index), jnp.asarray(logits_1V))[0] == index


def test_uniform_numbers_at_both_ends_of_their_range():
    weights_V = jnp.float32([0, 0.1, 0, 0.7, 0.2, 0, 0])
    zero, almost_one = jnp.float32(0), np.float32(1 - 2**-24)
    # u picks the most likely entry or one of the others, v which of them.
    assert categorical_lib._pick(almost_one, zero, weights_V) == 3
    assert categorical_lib._pick(zero, zero, weights_V) == 1
    assert categorical_lib._pick(zero, almost_one, weights_V) == 4
    # v * rest rounds up to the rest.
    rest = np.float32(1 + 2**-23)
    assert almost_one * rest >= 1
    assert categorical_lib._pick(zero, almost_one, jnp.float32([2, 1, 2**-23, 0])) <= 2


def test_uniform_numbers_reach_far_below_those_of_jax():
    u = np.asarray(categorical_lib.uniform(jax.random.key(0), (2**22,)), np.float64)
    assert u.min() >= 0
    assert u.max() < 1
    # Below 2^-9 the numbers are exact multiples of 2^-32: 8,192 of 2^22 are expected there (s.e.
    # its root), and one in 2^9 on the grid of 2^-23 that jax.random.uniform is confined to.
    small = u[u < 2.0**-9]
    assert abs(len(small) - 2**13) < 5 * 2**6.5
    assert np.mean(small * 2.0**23 % 1 == 0) < 0.02
    # Mean and variance of a uniform number, within 5 s.e.
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size)
    assert abs(u.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / u.size)


def test_rare_tokens_beside_a_dominant_one_share_a_block_fairly():
    # A block of V=4096: a token of weight 1 and 63 of 1e-8 each. Given that the dominant one
    # doesn't win, the others are equally likely; summed beside it, most would be out of reach.
    weights_V = jnp.full((64,), 1e-8, jnp.float32).at[0].set(1.0)
    v = (jnp.arange(2**12) + 0.5) / 2**12
    zero = jnp.zeros(v.shape)
    drawn = jax.vmap(lambda u, v: categorical_lib._pick(u, v, weights_V))(zero, v)
    counts = np.bincount(np.asarray(drawn), minlength=64)
    assert counts[0] == 0
    # 4096 equidistant numbers over 63 equal tokens: 65.02 each, one more or less by rounding.
    assert counts[1:].min() >= 64
    assert counts[1:].max() <= 67


def test_logits_need_no_normalisation():
    # Multiples of 1/64: shifted without rounding.
    logits = np.random.default_rng(0).integers(-200, 200, (500, 11)).astype(np.float32) / 64
    current = np.arange(500) % 11
    for shift in (1024, -4096):
        np.testing.assert_array_equal(
            categorical(jax.random.key(3), logits), categorical(jax.random.key(3), logits + shift)
        )
        for one, two in zip(
            others(jax.random.key(3), logits, current),
            others(jax.random.key(3), logits + shift, current),
            strict=True,
        ):
            np.testing.assert_array_equal(one, two)


def tail_z_score(count_tail, *, rows, chunks, tail_logit, size):
    """Standard errors between the number of tail events and its expectation.

    One token has logit 0, the `size - 1` others `tail_logit`; count_tail(key, logits_V, dominant,
    rows) draws and counts the others.
    """
    dominant = size // 2
    logits_V = np.full(size, tail_logit, np.float32)
    logits_V[dominant] = 0

    @jax.jit
    def run(keys, logits_V):
        one = lambda key: count_tail(key, logits_V, dominant, rows)
        return jnp.sum(jax.lax.map(one, keys))

    events = run(jax.random.split(jax.random.key(11), chunks), jnp.asarray(logits_V))
    p = 1 - softmax64(logits_V)[dominant]
    n = rows * chunks
    return (int(events) - n * p) / np.sqrt(n * p)


# 4,095 tokens of probability 4e-8 each: 17 nats below the first, where truncated noise ends at
# 15.94; together 1.7e-4.
TAIL = {"rows": 1024, "tail_logit": -17.0, "size": 4096}


def test_the_far_tail_is_drawn_as_often_as_it_should_be():
    def count(key, logits_V, dominant, rows):
        return jnp.sum(categorical_lib.draw(key, jnp.tile(logits_V[None], (rows, 1))) != dominant)

    # 2^19 draws expect 89 events: truncated noise, which finds a sixth of them, would be 7.8
    # standard errors off.
    assert abs(tail_z_score(count, chunks=512, **TAIL)) < 5


def test_truncated_gumbel_noise_would_fail_the_check_above():
    def count(key, logits_V, dominant, rows):
        noisy = logits_V[None] + jax.random.gumbel(key, (rows, len(logits_V)))
        others = noisy.at[:, dominant].set(-jnp.inf)
        # argmax(noisy) != dominant; the maximum is several times faster than the argmax on a CPU.
        return jnp.sum(jnp.max(others, axis=-1) > noisy[:, dominant])

    # 50 events are expected and, from the 23 bits of the noise, 8.5 +- 2.9 happen: 5.9 +- 0.4
    # standard errors off.
    assert tail_z_score(count, chunks=288, **TAIL) < -5


def test_rows_are_independent():
    tokens = np.asarray(categorical(jax.random.key(5), jnp.zeros((N, 2, 3))))
    assert tokens.shape == (N, 2)
    pairs = np.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9)
    assert_frequencies(pairs, np.full(9, 1 / 9))
    neighbours = np.bincount(tokens[1::2, 0] * 3 + tokens[::2, 0], minlength=9)
    assert_frequencies(neighbours, np.full(9, 1 / 9))


def test_each_row_follows_its_own_logits():
    logits = jnp.where(jnp.tile(jnp.eye(6, dtype=bool), (20, 1)), 0.0, -jnp.inf)
    ids = np.tile(np.arange(6), 20)
    np.testing.assert_array_equal(categorical(jax.random.key(0), logits), ids)
    # Two possible ids a row, one of them the current one.
    both = jnp.maximum(logits, jnp.roll(logits, 1, axis=1))
    np.testing.assert_array_equal(others(jax.random.key(0), both, ids)[0], (ids + 1) % 6)


def test_a_row_does_not_depend_on_the_number_of_rows():
    logits = jax.random.normal(jax.random.key(0), (64, 3, 33))
    every = categorical(jax.random.key(1), logits)
    for rows in (1, 2, 3, 5, 63):
        np.testing.assert_array_equal(categorical(jax.random.key(1), logits[:rows]), every[:rows])


def test_draws_are_a_function_of_the_key():
    logits = jax.random.normal(jax.random.key(0), (64, 33))
    first = categorical(jax.random.key(1), logits)
    assert first.dtype == jnp.int32
    np.testing.assert_array_equal(first, categorical(jax.random.key(1), logits))
    assert np.any(first != categorical(jax.random.key(2), logits))


def test_half_precision_logits_are_drawn_in_float32():
    logits = jax.random.normal(jax.random.key(0), (512, 33)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(
        categorical(jax.random.key(1), logits),
        categorical(jax.random.key(1), logits.astype(jnp.float32)),
    )


# ----------------------------------------------------------------------------------- numbers apart
def test_dispersed_numbers_are_uniform_at_every_position():
    u_BL = np.asarray(
        jax.jit(categorical_lib.dispersed, static_argnums=1)(jax.random.key(0), (N, 7))
    )
    assert u_BL.min() >= 0
    assert u_BL.max() < 1
    for u_B in u_BL.T:
        assert_frequencies(np.histogram(u_B, bins=20, range=(0, 1))[0], np.full(20, 1 / 20))
    assert abs(np.corrcoef(u_BL[:-1, 0], u_BL[1:, 0])[0, 1]) < 5 / np.sqrt(N)  # rows know nothing


@pytest.mark.parametrize("length", [128, 1024])
def test_positions_whose_dispersed_numbers_are_small_lie_apart(length):
    u_BL = np.asarray(categorical_lib.dispersed(jax.random.key(1), (64, length)))
    for share in (0.38, 0.25, 1 / 8, 1 / 16, 1 / 64):
        for u_L in u_BL:
            chosen = np.flatnonzero(u_L < share)
            assert abs(len(chosen) - share * length) < 3
            # Three-distance theorem: gaps are Fibonacci numbers around 1 / share.
            assert set(np.diff(chosen).tolist()) <= {2, 3, 5, 8, 13, 21, 34, 55, 89}
            assert np.diff(chosen).min(initial=length) > 0.44 / share - 1e-6


def test_dispersed_numbers_do_not_depend_on_how_long_a_row_is():
    short, long = (
        np.asarray(categorical_lib.dispersed(jax.random.key(2), (3, n))) for n in (16, 4096)
    )
    np.testing.assert_array_equal(short, long[:, :16])
