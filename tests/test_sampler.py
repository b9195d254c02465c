"""The sampler: its calls, its scan against a Python loop, frozen positions, grids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies
from tables import pairs

from fsdfm_jax.flow import jumps
from fsdfm_jax.flow.sampler import (
    check_grid,
    make_grid,
    pad_grid,
    sample,
    sample_autoregressive,
    sample_trajectory,
    uniform_grid,
)
from fsdfm_jax.flow.schedules import Polynomial
from fsdfm_jax.flow.sources import Source
from fsdfm_jax.inference.neighbours import Neighbours
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
    return sample_trajectory(
        key, denoise, jump, finalize, x0_BL, grid_S1, frozen_BL, temperature=temperature
    )


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
        jax.random.key(1), spy_denoise, spy_jump, finalize, x0_BL, grid
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


@SOURCES
def test_what_is_computed_ahead_changes_nothing(source):
    """`condition` is asked once, for all steps; each step is given its own part of the answer."""
    jump, finalize, x0_BL = setting(source)
    frozen_BL = LOOSE.copy()
    frozen_BL[:, 1] = True
    asked = []

    def condition(t_S, h_S):
        asked.append(t_S.shape)
        return {"time": t_S, "width": jnp.stack([h_S, -h_S], axis=1)}

    def denoise_ahead(x_BL, ahead):
        assert ahead["width"].shape == (2,)
        ones_B = jnp.ones(x_BL.shape[0])
        return denoise(x_BL, ahead["time"] * ones_B, -ahead["width"][1] * ones_B)

    for grid in (uniform_grid(1), UNEVEN):
        wanted = trajectory(source, jax.random.key(1), x0_BL, grid, frozen_BL, 0.5)
        got = sample_trajectory(
            jax.random.key(1),
            denoise_ahead,
            jump,
            finalize,
            x0_BL,
            grid,
            frozen_BL,
            temperature=0.5,
            condition=condition,
        )
        for one, two in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(one, two)
    assert asked == [(1,), (4,)]
    # And it is what the network goes by: other times, other tokens.
    late = lambda t_S, h_S: condition(0 * t_S + 1, h_S)
    other = sample(jax.random.key(1), denoise_ahead, jump, finalize, x0_BL, UNEVEN, condition=late)
    assert np.any(other != sample(jax.random.key(1), denoise, jump, finalize, x0_BL, UNEVEN))


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
            jax.random.key(1), denoise, jump, finalize, x0_BL, UNEVEN, temperature=jnp.float32(0.5)
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
        return sample(
            jax.random.key(1), counted, jump, finalize, x0_BL, grid_S1, temperature=temperature
        )

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


def test_uniform_grid():
    np.testing.assert_array_equal(uniform_grid(4), np.float32([0, 0.25, 0.5, 0.75, 1]))
    for steps in (1, 2, 3, 7, 10, 100, 1000, 1024):
        grid = check_grid(uniform_grid(steps))
        assert grid.dtype == np.float32
        assert len(grid) == steps + 1
    for steps in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1 step, got steps={steps}"):
            uniform_grid(steps)


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


@pytest.mark.parametrize("grid", [[], [0.0], [[0.0, 1.0]]])
def test_grids_of_another_shape(grid):
    with pytest.raises(ValueError, match=r"cumulative times in one dimension"):
        check_grid(grid)


def test_steps_can_be_watched():
    """on_step is told every state in order, also from within jit, and changes nothing."""
    jump, finalize, x0_BL = setting(UNIFORM)
    seen = []

    @jax.jit
    def watched(key, x0_BL, grid_S1):
        return sample_trajectory(
            key,
            denoise,
            jump,
            finalize,
            x0_BL,
            grid_S1,
            on_step=lambda index, x_BL: seen.append((int(index), np.asarray(x_BL))),
        )

    tokens_BL, _ = watched(jax.random.key(1), x0_BL, UNEVEN)
    jax.effects_barrier()
    expected_BL, steps_SBL = trajectory(UNIFORM, jax.random.key(1), x0_BL, UNEVEN)
    np.testing.assert_array_equal(tokens_BL, expected_BL)
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    np.testing.assert_array_equal(np.stack([x_BL for _, x_BL in seen]), steps_SBL)


# ---------------------------------------------------------------------- the number of steps as data
@SOURCES
def test_steps_as_data_draw_what_the_grid_of_that_length_draws(source):
    jump, finalize, x0_BL = setting(source)
    traces = []

    @jax.jit
    def padded(key, x0_BL, grid_S1, num_steps):
        traces.append(1)
        return sample_trajectory(
            key, denoise, jump, finalize, x0_BL, grid_S1, LOOSE, num_steps=num_steps
        )

    for grid in (uniform_grid(1), uniform_grid(4), UNEVEN):
        steps = len(grid) - 1
        tokens_BL, steps_SBL = trajectory(source, jax.random.key(3), x0_BL, grid)
        got_BL, got_SBL = padded(jax.random.key(3), x0_BL, pad_grid(grid, 6), steps)
        np.testing.assert_array_equal(got_BL, tokens_BL)
        np.testing.assert_array_equal(got_SBL[:steps], steps_SBL)
        assert not got_SBL[steps:].any()
    assert len(traces) == 1  # of all numbers of steps


@SOURCES
def test_steps_as_data_heed_neighbours_alike(source):
    jump, finalize, x0_BL = setting(source)
    follow_VV = jax.nn.softmax(jnp.asarray(TABLE[2]) * 2, axis=-1)
    frozen_BL = np.tile(np.arange(L) == 2, (B, 1))
    x0_BL = jnp.where(frozen_BL, 1, x0_BL)

    @jax.jit
    def run(grid_S1, strength, num_steps=None):
        return sample_trajectory(
            jax.random.key(3),
            denoise,
            jump,
            finalize,
            x0_BL,
            grid_S1,
            frozen_BL,
            num_steps=num_steps,
            neighbours=Neighbours(pairs(follow_VV), strength),
            redraw=jumps.make_redraw(jumps.DISPERSED, Polynomial(), source, "jump"),
        )

    tokens_BL, steps_SBL = run(UNEVEN, 1.5)
    got_BL, got_SBL = run(pad_grid(UNEVEN, 6), 1.5, 4)
    np.testing.assert_array_equal(got_BL, tokens_BL)
    np.testing.assert_array_equal(got_SBL[:4], steps_SBL)
    assert np.all(np.asarray(steps_SBL)[:, :, 2] == 1)
    # The strength is data, and matters.
    assert np.mean(run(UNEVEN, 0.0)[0] != tokens_BL) > 0.1
    assert run._cache_size() == 2


def test_steps_as_data_compute_the_conditioning_of_each_step():
    condition = lambda t_S, h_S: jnp.stack([t_S, h_S], axis=1)

    def conditioned(x_BL, th):
        return denoise(x_BL, jnp.full(B, th[0]), jnp.full(B, th[1]))

    jump, finalize, x0_BL = setting(UNIFORM)
    wanted_BL, _ = trajectory(UNIFORM, jax.random.key(4), x0_BL, UNEVEN)
    got_BL = jax.jit(
        lambda grid_S1, steps: sample(
            jax.random.key(4),
            conditioned,
            jump,
            finalize,
            x0_BL,
            grid_S1,
            condition=condition,
            num_steps=steps,
        )
    )(pad_grid(UNEVEN, 8), 4)
    np.testing.assert_array_equal(got_BL, wanted_BL)


def test_observing_sees_the_logits_before_and_the_tokens_around_a_step():
    jump, finalize, x0_BL = setting(UNIFORM)
    observe = lambda logits, x_BL, new_BL: (logits[:, 0, 0], x_BL, new_BL)
    x_BL, (logit_SB, before_SBL, after_SBL) = sample_trajectory(
        jax.random.key(5), denoise, jump, finalize, x0_BL, UNEVEN, temperature=0.5, observe=observe
    )
    np.testing.assert_array_equal(before_SBL[0], x0_BL)
    np.testing.assert_array_equal(before_SBL[1:], after_SBL[:-1])
    np.testing.assert_array_equal(after_SBL[-1], x_BL)
    for i, (t, h) in enumerate(zip(UNEVEN[:-1], np.diff(UNEVEN), strict=True)):
        logits_BLV = denoise(before_SBL[i], jnp.full(B, t), jnp.full(B, h)) / 0.5
        np.testing.assert_allclose(logit_SB[i], logits_BLV[:, 0, 0], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------- shapes of grids
def test_grids_by_name():
    np.testing.assert_array_equal(make_grid("uniform", 3), uniform_grid(3))
    thirds = np.arange(4) / 3
    np.testing.assert_allclose(make_grid("power:2", 3), thirds**2, rtol=1e-6)
    np.testing.assert_allclose(make_grid("power:0.5", 3), thirds**0.5, rtol=1e-6)
    cosine = [0, 1 - np.cos(np.pi / 6), 1 - np.cos(np.pi / 3), 1]
    np.testing.assert_allclose(make_grid("cosine", 3), cosine, rtol=1e-6)
    for shape in ("uniform", "power:3", "cosine"):
        assert make_grid(shape, 1).tolist() == [0, 1]
        assert len(make_grid(shape, 1024)) == 1025
        assert make_grid(shape, 1024).dtype == np.float32


@pytest.mark.parametrize("shape", ["power", "power:0", "power:x", "power:inf", "linear", ""])
def test_unknown_grids_are_refused(shape):
    with pytest.raises(ValueError, match=f"Unknown grid '{shape}'"):
        make_grid(shape, 4)


def test_a_grid_that_float32_cannot_hold_is_refused():
    with pytest.raises(ValueError, match="increase strictly"):
        make_grid("power:40", 1024)


def test_padding():
    padded = pad_grid(UNEVEN, 6)
    assert padded.dtype == np.float32
    assert padded.tolist() == [*UNEVEN.tolist(), 1, 1]
    with pytest.raises(ValueError, match="4 steps doesn't fit into 3"):
        pad_grid(UNEVEN, 3)


# ------------------------------------------------------------------------------------------ nucleus
POSTERIOR = np.float32([0.4, 0.3, 0.2, 0.1])
# Of top-p 0.65 the first two are enough.
CUT = np.float64([4 / 7, 3 / 7, 0, 0])


def test_a_nucleus_is_drawn_from_renormalised():
    rows, length = 400, 50
    constant = lambda x_BL, t_B, h_B: jnp.broadcast_to(
        jnp.log(POSTERIOR)[None, None], (rows, length, 4)
    )
    source = Source(4)
    jump = jumps.make_jump(jumps.MIXTURE, Polynomial())
    finalize = jumps.make_finalize(source)
    x0_BL = source.sample(jax.random.key(0), (rows, length))

    @jax.jit
    def run(key, top_p):
        return sample(key, constant, jump, finalize, x0_BL, uniform_grid(2), top_p=top_p)

    counts = np.bincount(np.asarray(run(jax.random.key(1), 0.65)).ravel(), minlength=4)
    assert_frequencies(counts, CUT)
    counts = np.bincount(np.asarray(run(jax.random.key(2), 1.0)).ravel(), minlength=4)
    assert_frequencies(counts, POSTERIOR.astype(np.float64) / POSTERIOR.sum(dtype=np.float64))


def test_left_to_right_draws_from_a_nucleus_too():
    decode = lambda token_B, position, cache: (
        jnp.broadcast_to(jnp.log(POSTERIOR)[None], (400, 4)),
        cache,
    )
    tokens_BL = sample_autoregressive(
        jax.random.key(0), decode, (), jnp.zeros(400, jnp.int32), 50, top_p=0.65
    )
    assert_frequencies(np.bincount(np.asarray(tokens_BL).ravel(), minlength=4), CUT)


# ----------------------------------------------------------------------- cooling and looking ahead
def _watch(ahead, **options):
    """(times asked for, temperatures) of the steps of a sampler whose logits tell them."""
    jump, finalize, x0_BL = setting(UNIFORM)
    asked = []

    def telling(x_BL, t_B, h_B):
        jax.debug.callback(lambda t, h: asked.append((float(t), float(h))), t_B[0], h_B[0])
        return jnp.ones((*x_BL.shape, V))

    network = {"condition": lambda t_S, h_S: (t_S, h_S)} if ahead else {}
    told = (
        (lambda x_BL, th: telling(x_BL, jnp.full(B, th[0]), jnp.full(B, th[1]))) if ahead else None
    )
    _, logit_S = jax.jit(
        lambda grid_S1, key: sample_trajectory(
            key,
            told or telling,
            jump,
            finalize,
            x0_BL,
            grid_S1,
            observe=lambda logits, x_BL, new_BL: logits[0, 0, 0],
            **network,
            **options,
        )
    )(pad_grid(UNEVEN, 6) if "num_steps" in options else UNEVEN, jax.random.key(0))
    jax.effects_barrier()
    return np.float32(sorted(asked)), 1 / np.asarray(logit_S)[: len(UNEVEN) - 1]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_steps_look_ahead_and_cool_down(ahead, padded):
    times_S, widths_S = UNEVEN[:-1], np.diff(UNEVEN)
    count = {"num_steps": len(times_S)} if padded else {}
    asked, temperature_S = _watch(ahead, **count)
    np.testing.assert_allclose(asked, np.stack([times_S, widths_S], 1), atol=1e-6)
    np.testing.assert_allclose(temperature_S, 1.0)
    asked, temperature_S = _watch(ahead, look_ahead=0.25, temperature=2.0, cooling=0.6, **count)
    np.testing.assert_allclose(asked, np.stack([times_S + widths_S / 4, widths_S], 1), atol=1e-6)
    np.testing.assert_allclose(temperature_S, 2 * (1 - 0.6 * times_S), rtol=1e-6)


def test_a_sampler_that_neither_cools_nor_looks_ahead_is_the_plain_one():
    jump, finalize, x0_BL = setting(UNIFORM)
    run = jax.jit(
        lambda **options: sample(
            jax.random.key(5), denoise, jump, finalize, x0_BL, UNEVEN, **options
        )
    )
    zero = jnp.float32(0.0)
    np.testing.assert_array_equal(run(), run(cooling=zero, look_ahead=zero))
    assert np.any(run() != run(cooling=jnp.float32(0.9), look_ahead=zero))
