"""The sampler: its calls, its scan against a Python loop, frozen positions, grids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies

from fsdfm_jax.flow import jumps
from fsdfm_jax.flow.grids import uniform_grid
from fsdfm_jax.flow.sampler import make_step_fn, make_steps, sample, sample_trajectory
from fsdfm_jax.flow.sampling import annealed
from fsdfm_jax.flow.schedules import Polynomial
from fsdfm_jax.flow.sources import Source
from fsdfm_jax.ops import categorical
from fsdfm_jax.ops.logits import Factored

B, L, V = 64, 5, 7
UNIFORM, MASK = Source(V), Source(V, mask_id=V - 1)
SOURCES = pytest.mark.parametrize("source", [UNIFORM, MASK], ids=["uniform", "mask"])
UNEVEN = np.float32([0, 0.125, 0.5, 0.75, 1])
LOOSE = np.zeros((B, L), bool)
TABLE = np.random.default_rng(0).normal(size=(3, V, V)).astype(np.float32) * 2
JUMP = jumps.make_jump(jumps.CUMULATIVE, Polynomial())


@jax.jit
def denoise(x_BL, t_B, h_B):
    one, two, three = jnp.asarray(TABLE)
    h_B11 = h_B[:, None, None]
    return one[x_BL] + t_B[:, None, None] * two[jnp.roll(x_BL, 1, 1)] + h_B11 * three[x_BL]


@functools.cache
def setting(source):
    """(jump, finalize, x0) for a source."""
    jump = JUMP if source.mask_id is None else jumps.keep_revealed(JUMP, source.mask_id)
    finalize = jumps.make_finalize(source)
    return jax.jit(jump), jax.jit(finalize), source.sample(jax.random.key(0), (B, L))


@functools.partial(jax.jit, static_argnums=0)
def trajectory(source, key, x0_BL, grid_S1, frozen_BL=LOOSE, temperature=1.0):
    """Compiled once for each source and number of steps, and shared by the tests."""
    jump, finalize, _ = setting(source)
    cooled = annealed(denoise, temperature)
    parts = (cooled, jump, finalize, x0_BL, grid_S1, frozen_BL)
    return sample_trajectory(key, *parts, observe=tokens_after)


def tokens_after(logits, x_BL, new_BL):
    return new_BL


@SOURCES
@pytest.mark.parametrize(
    "grid", [uniform_grid(1), uniform_grid(4), UNEVEN], ids=["1", "4", "uneven"]
)
def test_scan_is_a_python_loop_bitwise(source, grid):
    jump, finalize, x0_BL = setting(source)
    frozen_BL = LOOSE.copy()
    frozen_BL[:, 1] = True
    tokens_BL, steps_SBL = trajectory(source, jax.random.key(1), x0_BL, grid, frozen_BL, 0.5)

    x_BL, last = x0_BL, len(grid) - 2
    for i, key in enumerate(jax.random.split(jax.random.key(1), last + 1)):
        t_B, h_B = np.full(B, grid[i]), np.full(B, grid[i + 1] - grid[i])
        logits_BLV = denoise(x_BL, t_B, h_B) / 0.5
        if i < last:
            x_BL = jump(key, logits_BLV, x_BL, t_B, h_B)
        else:
            x_BL = finalize(key, logits_BLV, x_BL)
        x_BL = jnp.where(frozen_BL, x0_BL, x_BL)
        np.testing.assert_array_equal(steps_SBL[i], x_BL)
    np.testing.assert_array_equal(tokens_BL, x_BL)


def test_one_step_is_one_posterior_draw():
    _, finalize, x0_BL = setting(UNIFORM)
    never = lambda key, logits_BLV, x_BL, t_B, h_B: jnp.full_like(x_BL, -1)
    result_BL = sample(jax.random.key(1), denoise, never, finalize, x0_BL, uniform_grid(1))
    logits_BLV = denoise(x0_BL, jnp.zeros(B), jnp.ones(B))
    key = jax.random.split(jax.random.key(1), 1)[0]
    np.testing.assert_array_equal(result_BL, categorical.draw(key, logits_BLV))


@pytest.mark.parametrize("grid", [uniform_grid(1), UNEVEN], ids=["1", "uneven"])
def test_calls_of_the_network(grid):
    calls, jumped = [], []

    def spy_denoise(x_BL, t_B, h_B):
        jax.debug.callback(lambda *a: calls.append(a), x_BL, t_B, h_B, ordered=True)
        return denoise(x_BL, t_B, h_B)

    def spy_jump(key, logits_BLV, x_BL, t_B, h_B):
        jax.debug.callback(lambda *a: jumped.append(a), t_B, h_B, ordered=True)
        return JUMP(key, logits_BLV, x_BL, t_B, h_B)

    _, finalize, x0_BL = setting(UNIFORM)
    _, steps_SBL = sample_trajectory(
        jax.random.key(1), spy_denoise, spy_jump, finalize, x0_BL, grid, observe=tokens_after
    )
    jax.effects_barrier()
    # S evaluations, S-1 jumps, each at its own time and width.
    assert len(calls) == len(grid) - 1
    assert len(jumped) == len(grid) - 2
    states = [x0_BL, *steps_SBL]
    for i, (x_BL, t_B, h_B) in enumerate(calls):
        np.testing.assert_array_equal(x_BL, states[i])
        np.testing.assert_array_equal(t_B, np.full(B, grid[i]))
        np.testing.assert_array_equal(h_B, np.full(B, grid[i + 1] - grid[i]))
    for call, (t_B, h_B) in zip(calls, jumped, strict=False):
        np.testing.assert_array_equal(call[1], t_B)
        np.testing.assert_array_equal(call[2], h_B)


@pytest.mark.parametrize("source", ["uniform", "mask"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_constant_posterior_gives_a_product_of_categoricals(source, steps):
    rows = 30_000
    p_LV = np.random.default_rng(1).dirichlet(np.ones(4), size=2)
    if source == "uniform":
        chosen, jump = Source(4), JUMP
    else:
        # The mask has no share of the posterior, and revealed tokens stay.
        chosen, jump = Source(5, mask_id=4), jumps.keep_revealed(JUMP, 4)
        p_LV = np.pad(p_LV, [(0, 0), (0, 1)])
    with np.errstate(divide="ignore"):
        logits_LV = np.log(p_LV).astype(np.float32)
    constant = lambda x_BL, t_B, h_B: jnp.broadcast_to(logits_LV[None], (*x_BL.shape, len(p_LV[0])))
    x0_BL = chosen.sample(jax.random.key(0), (rows, 2))
    x_BL = sample(
        jax.random.key(2), constant, jump, jumps.make_finalize(chosen), x0_BL, uniform_grid(steps)
    )
    pairs = np.bincount(np.asarray(x_BL) @ [len(p_LV[0]), 1], minlength=p_LV[0].size ** 2)
    assert_frequencies(pairs, np.outer(*p_LV))


@SOURCES
def test_frozen_positions_never_move(source):
    # Any pattern of positions, any value, the mask id included: only the mask of positions counts.
    frozen_BL = np.asarray(jax.random.bernoulli(jax.random.key(0), 0.5, (B, L)))
    given_BL = jax.random.randint(jax.random.key(1), (B, L), 0, V)
    x0_BL = np.where(frozen_BL, given_BL, setting(source)[2])
    x_BL, steps_SBL = trajectory(source, jax.random.key(3), x0_BL, UNEVEN, frozen_BL)
    for state_BL in (*np.asarray(steps_SBL), np.asarray(x_BL)):
        np.testing.assert_array_equal(state_BL[frozen_BL], x0_BL[frozen_BL])
    assert np.mean(np.asarray(x_BL)[~frozen_BL] != x0_BL[~frozen_BL]) > 0.5


def test_the_network_sees_frozen_tokens():
    # Every position copies the first one.
    copy = lambda x_BL, t_B, h_B: 50.0 * jax.nn.one_hot(jnp.tile(x_BL[:, :1], (1, L)), V)
    frozen_BL = LOOSE.copy()
    frozen_BL[:, 0] = True
    x_BL = sample(
        jax.random.key(0), copy, *setting(UNIFORM)[:2], 3 * frozen_BL.astype(int), UNEVEN, frozen_BL
    )
    np.testing.assert_array_equal(x_BL, np.full((B, L), 3))


def test_a_small_temperature_takes_the_most_likely_token():
    x0_BL = setting(UNIFORM)[2]
    _, steps_SBL = trajectory(UNIFORM, jax.random.key(1), x0_BL, UNEVEN, LOOSE, 1e-4)
    logits_BLV = denoise(steps_SBL[2], np.full(B, UNEVEN[3]), np.full(B, 1 - UNEVEN[3]))
    np.testing.assert_array_equal(steps_SBL[3], jnp.argmax(logits_BLV, axis=-1))


def test_temperature_divides_the_logits():
    jump, finalize, x0_BL = setting(UNIFORM)
    cooled = lambda x_BL, t_B, h_B: denoise(x_BL, t_B, h_B) / 0.5
    # Without a mask of frozen positions nothing is frozen.
    one_BL = sample(jax.random.key(1), cooled, jump, finalize, x0_BL, UNEVEN)
    two_BL, _ = trajectory(UNIFORM, jax.random.key(1), x0_BL, UNEVEN, LOOSE, 0.5)
    np.testing.assert_array_equal(one_BL, two_BL)


def test_factored_logits_are_divided_and_drawn_from():
    # The table of tokens as a head of one-hot features: each product has one term, and is exact.
    table_VV = jnp.asarray(TABLE[0])
    arrays = lambda x_BL, t_B, h_B: table_VV[x_BL]

    def factors(x_BL, t_B, h_B):
        features_BLD = jax.nn.one_hot(x_BL, V)
        return Factored(features_BLD, table_VV, jnp.zeros(V), chunk_size=8 * B * V)

    jump, finalize, x0_BL = setting(UNIFORM)
    tokens = [
        sample(
            jax.random.key(1),
            annealed(denoise, jnp.float32(0.5)),
            jump,
            finalize,
            x0_BL,
            UNEVEN,
        )
        for denoise in (arrays, factors)
    ]
    np.testing.assert_array_equal(*tokens)


def test_the_trajectory_ends_in_the_sample():
    jump, finalize, x0_BL = setting(UNIFORM)
    x_BL, steps_SBL = trajectory(UNIFORM, jax.random.key(1), x0_BL, UNEVEN)
    assert steps_SBL.shape == (4, B, L)
    np.testing.assert_array_equal(steps_SBL[-1], x_BL)
    np.testing.assert_array_equal(
        sample(jax.random.key(1), denoise, jump, finalize, x0_BL, UNEVEN), x_BL
    )


def test_a_sweep_over_grids_and_temperatures_compiles_once():
    jump, finalize, x0_BL = setting(UNIFORM)
    traces = []

    def counted(x_BL, t_B, h_B):
        traces.append(x_BL.shape)
        return denoise(x_BL, t_B, h_B)

    @jax.jit
    def run(grid_S1, temperature):
        traces.append("run")
        cooled = annealed(counted, temperature)
        return sample(jax.random.key(1), cooled, jump, finalize, x0_BL, grid_S1)

    first = run(uniform_grid(4), 1.0)
    before = len(traces)
    others = [run(UNEVEN, 1.0), run(uniform_grid(4), 0.3)]
    assert len(traces) == before
    # The network appears once in the program, not once a step.
    assert traces.count("run") == 1
    assert traces.count((B, L)) == 1
    assert all(np.any(first != other) for other in others)


def test_dtype_is_kept():
    x0_BL = setting(UNIFORM)[2].astype(jnp.uint16)
    x_BL, steps_SBL = jax.eval_shape(
        functools.partial(trajectory, UNIFORM), jax.random.key(1), x0_BL, UNEVEN
    )
    assert x_BL.dtype == steps_SBL.dtype == jnp.uint16


@pytest.mark.parametrize(
    "grid",
    [
        [0, 0.5, 0.5, 1],
        [0, 0.6, 0.4, 1],
        [0.1, 0.5, 1],
        [0, 0.5, 0.9],
        [0.25, 0.25, 0.25, 0.25],
        [1, 0.5, 0],
        [0, float("nan"), 1],
    ],
    ids=["repeated", "falling", "late", "early", "sizes", "reversed", "nan"],
)
def test_bad_grids(grid):
    jump, finalize, x0_BL = setting(UNIFORM)
    for values in (grid, jnp.asarray(grid)):
        with pytest.raises(ValueError, match="from 0 to 1 .cumulative times, not step sizes"):
            sample(jax.random.key(1), denoise, jump, finalize, x0_BL, values)


def test_observing_sees_the_logits_before_and_the_tokens_around_a_step():
    jump, finalize, x0_BL = setting(UNIFORM)
    observe = lambda logits, x_BL, new_BL: (logits[:, 0, 0], x_BL, new_BL)
    x_BL, (logit_SB, before_SBL, after_SBL) = sample_trajectory(
        jax.random.key(5), annealed(denoise, 0.5), jump, finalize, x0_BL, UNEVEN, observe=observe
    )
    np.testing.assert_array_equal(before_SBL[0], x0_BL)
    np.testing.assert_array_equal(before_SBL[1:], after_SBL[:-1])
    np.testing.assert_array_equal(after_SBL[-1], x_BL)
    for i, (t, h) in enumerate(zip(UNEVEN[:-1], np.diff(UNEVEN), strict=True)):
        logits_BLV = denoise(before_SBL[i], jnp.full(B, t), jnp.full(B, h)) / 0.5
        np.testing.assert_allclose(logit_SB[i], logits_BLV[:, 0, 0], rtol=1e-6, atol=1e-6)


def test_a_python_loop_over_one_jitted_step_draws_the_same():
    """How text is streamed: the body of the scan, called from Python."""
    jump, finalize, x0_BL = setting(UNIFORM)
    frozen_BL = LOOSE.copy()
    frozen_BL[:, 1] = True
    step = jax.jit(make_step_fn(denoise, jump, finalize, x0_BL, frozen_BL))
    x_BL, steps = x0_BL, make_steps(jax.random.key(1), jnp.asarray(UNEVEN))
    for i in range(len(UNEVEN) - 1):
        x_BL, _ = step(x_BL, jax.tree.map(lambda leaf, i=i: leaf[i], steps))
    wanted_BL, _ = trajectory(UNIFORM, jax.random.key(1), x0_BL, UNEVEN, frozen_BL)
    np.testing.assert_array_equal(x_BL, wanted_BL)
