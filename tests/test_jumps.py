"""One jump: recorded probabilities, and frequencies against the analytic categorical."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies

from fsdfm_jax.flow import jumps, schedules
from fsdfm_jax.flow.jumps import CUMULATIVE, DISPERSED, EULER, MIXTURE, make_finalize, make_jump
from fsdfm_jax.flow.schedules import Polynomial
from fsdfm_jax.flow.sources import Source
from fsdfm_jax.ops import categorical
from fsdfm_jax.ops.logits import Factored, dense, rows

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "losses.npz")
N = 50_000
RULES = [CUMULATIVE, EULER, MIXTURE]


def jump_probability(rule, schedule, logits_BLV, xt_BL, t_B, h_B):
    """P(jump) per position, from the mass in `make_jump`; its frequencies are tested below."""
    u_BLU = jnp.zeros((*xt_BL.shape, categorical.NUMBERS))
    _, m_BL = categorical.pick_other(u_BLU, jnp.asarray(logits_BLV), xt_BL)
    t_B1, h_B1 = (jnp.reshape(jnp.float32(x), (-1, 1)) for x in (t_B, h_B))
    return rule.probability(schedule, t_B1, h_B1, m_BL)


@pytest.mark.optimised
@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_probability_against_recorded_numbers(power):
    xt_BL, t_B, h_B = GOLDEN["xt"].astype(np.int32), GOLDEN["t"], GOLDEN["h"]
    probability_BL = jump_probability(
        CUMULATIVE, Polynomial(power), GOLDEN["logits"], xt_BL, t_B, h_B
    )
    assert probability_BL.dtype == jnp.float32
    np.testing.assert_allclose(probability_BL, GOLDEN[f"pjump_n{power}"], rtol=1e-5)


@pytest.mark.optimised
@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_off_diagonal_rates_against_recorded_numbers(power):
    gbar_B = schedules.cumulative_rate(Polynomial(power), GOLDEN["t"], GOLDEN["h"])
    u_BLV = np.asarray(gbar_B)[:, None, None] * np.asarray(jax.nn.softmax(GOLDEN["logits"]))
    np.put_along_axis(u_BLV, GOLDEN["xt"][..., None], 0.0, axis=-1)
    np.testing.assert_allclose(u_BLV, GOLDEN[f"u_n{power}"], rtol=1e-5)


# (posterior, current token, t, h): ordinary ones, one nearly sure of the current token, one sure of
# another, one where the step reaches t=1, one of both, and steps at t=0.
CASES = [
    ([0.1, 0.2, 0.3, 0.4], 0, 0.25, 0.5),
    ([0.1, 0.2, 0.3, 0.4], 3, 0.0, 0.25),
    ([0.05, 0.9, 0.03, 0.02], 1, 0.75, 0.125),
    ([1e-9, 1.0, 2e-9, 0.0], 1, 0.5, 0.25),
    ([1e-9, 1.0, 2e-9, 0.0], 2, 0.5, 0.25),
    ([0.05, 0.9, 0.03, 0.02], 1, 0.5, 0.5),
    ([0.25, 0.25, 0.5, 0.0], 2, 0.0, 1.0),
    ([0.0, 0.0, 0.0, 1.0], 3, 0.5, 0.5),
]


def case_probabilities(rule_name, posterior_end, p, z, t, h):
    """P(new token) from the update rule for kappa(t) = t^2, written out; 1 - kappa >= 1e-8."""
    p = np.asarray(p) / np.sum(p)
    left, left_after = 1 - t**2, max(1 - (t + h) ** 2, 1e-8)
    m = 1 - p[z]
    if posterior_end and t + h == 1:
        return p
    if rule_name == "cumulative":
        moves = 1 - (left_after / left) ** m
    elif rule_name == "euler":
        moves = 1 - np.exp(-h * 2 * t / left * m)
    else:
        moves = (left - (1 - (t + h) ** 2)) / left * m
    new = np.where(np.arange(4) == z, 0, p)
    new = moves * new / new.sum() if new.any() else 0 * new
    new[z] = 1 - moves if p[z] < 1 else 1
    return new


@pytest.mark.parametrize("posterior_end", [False, True], ids=["literal", "posterior_end"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_frequencies_of_one_jump(rule, posterior_end):
    p, z, t, h = zip(*CASES, strict=True)
    with np.errstate(divide="ignore"):
        logits_BLV = np.broadcast_to(np.log(np.float32(p))[:, None], (len(CASES), N, 4)) + 3
    xt_BL = np.broadcast_to(np.int32(z)[:, None], (len(CASES), N))
    used = jumps.with_posterior_end(rule) if posterior_end else rule
    jump = jax.jit(make_jump(used, Polynomial(2.0)))
    x_BL = jump(jax.random.key(0), logits_BLV, xt_BL, np.float32(t), np.float32(h))
    for row, case in enumerate(CASES):
        expected = case_probabilities(rule.name, posterior_end, *case)
        assert_frequencies(np.bincount(x_BL[row], minlength=4), expected)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_jump_has_the_probability_it_reports(rule):
    logits_BLV = jnp.tile(jax.random.normal(jax.random.key(0), (3, 1, 7)), (1, N, 1))
    xt_BL = jnp.tile(jnp.int32([[0], [3], [6]]), (1, N))
    t_B, h_B = np.float32([0.25, 0.5, 0.75]), np.float32([0.5, 0.25, 0.125])
    p_B = jump_probability(rule, Polynomial(), logits_BLV, xt_BL, t_B, h_B)[:, 0]
    x_BL = _jump(rule)(jax.random.key(1), logits_BLV, xt_BL, t_B, h_B)
    moved_B = np.mean(x_BL != xt_BL, axis=1)
    assert np.all(np.abs(moved_B - p_B) <= 5 * np.sqrt(p_B * (1 - p_B) / N))


@pytest.mark.parametrize("posterior_end", [False, True], ids=["literal", "posterior_end"])
def test_frequencies_of_a_dispersed_jump_are_those_of_mixture(posterior_end):
    # One position of each of many rows: those of one row are not independent.
    for case in CASES:
        p, z, t, h = case
        with np.errstate(divide="ignore"):
            logits_BLV = np.broadcast_to(np.log(np.float32(p)), (N, 3, 4))
        used = jumps.with_posterior_end(DISPERSED) if posterior_end else DISPERSED
        xt_BL = np.full((N, 3), z, np.int32)
        jump = jax.jit(make_jump(used, Polynomial(2.0)))
        x_BL = jump(jax.random.key(0), logits_BLV, xt_BL, np.float32(t), np.float32(h))
        for position in range(3):
            expected = case_probabilities("mixture", posterior_end, *case)
            assert_frequencies(np.bincount(x_BL[:, position], minlength=4), expected)


def test_a_dispersed_jump_moves_few_neighbours_and_as_many_positions_in_every_row():
    rows, length, vocab = 500, 128, 1000
    xt_BL = jnp.zeros((rows, length), jnp.int32)
    logits_BLV = jnp.zeros((rows, length, vocab))  # m = 0.999
    moved = {}
    for rule in (MIXTURE, DISPERSED):
        key = jax.random.key(0)
        x_BL = jax.jit(make_jump(rule, Polynomial()))(key, logits_BLV, xt_BL, 0.5, 0.125)
        moved[rule] = np.asarray(x_BL != xt_BL)
    both = {rule: np.mean(m_BL[:, 1:] & m_BL[:, :-1]) for rule, m_BL in moved.items()}
    assert both[DISPERSED] == 0
    assert abs(both[MIXTURE] - 1 / 16) < 0.005
    counts_B = moved[DISPERSED].sum(axis=1)
    assert np.all(np.abs(counts_B - 0.25 * 0.999 * length) < 3)  # independently 4.9 is usual
    assert moved[MIXTURE].sum(axis=1).std() > 3
    for m_BL in moved.values():
        assert abs(m_BL.mean() - 0.25 * 0.999) < 0.01


def test_rules_agree_on_short_steps():
    logits_BLV = jax.random.normal(jax.random.key(0), (4, 9, 6))
    xt_BL = jax.random.randint(jax.random.key(1), (4, 9), 0, 6)
    t_B, h_B = np.float32([0.1, 0.3, 0.5, 0.7]), np.full(4, 2**-12, np.float32)
    one, two, three = (
        jump_probability(rule, Polynomial(), logits_BLV, xt_BL, t_B, h_B) for rule in RULES
    )
    # They differ at second order in g h < 1e-3; float32 rounds 1 - t in the end of the step by 6e-8
    # of 2e-4.
    np.testing.assert_allclose(one, two, rtol=2e-3)
    np.testing.assert_allclose(one, three, rtol=2e-3)


def test_mass_off_a_nearly_certain_token_does_not_cancel():
    # p(z) rounds to 1 in float32; what is left is 3 e^-30.
    logits_BLV = np.float32([[[0, 30, 0, 0]]])
    value = jump_probability(MIXTURE, Polynomial(), logits_BLV, np.int32([[1]]), 0.0, 0.5)
    np.testing.assert_allclose(value, [[0.5 * 3 * np.exp(-30.0)]], rtol=1e-5)


def test_posterior_end_only_concerns_steps_that_reach_the_end():
    logits_BLV = jax.random.normal(jax.random.key(0), (3, 5, 6))
    xt_BL = jax.random.randint(jax.random.key(1), (3, 5), 0, 6)
    # The last but one row misses the end by the finest step, the last by the rounding of its grid.
    t_B = np.float32([0.25, 0.5 - 2**-10, 0.9])
    h_B = np.float32([0.5, 0.5, 0.1 - 2**-24])
    for rule in RULES:
        plain = jump_probability(rule, Polynomial(), logits_BLV, xt_BL, t_B, h_B)
        ended = jump_probability(
            jumps.with_posterior_end(rule), Polynomial(), logits_BLV, xt_BL, t_B, h_B
        )
        np.testing.assert_array_equal(plain[:2], ended[:2])
        p_z = np.take_along_axis(np.asarray(jax.nn.softmax(logits_BLV)), xt_BL[..., None], -1)
        np.testing.assert_allclose(ended[2], 1 - p_z[2, :, 0], rtol=1e-5)


def test_the_literal_end_evicts_a_confident_token():
    # Method, section 5: p(z) = 0.9 is evicted with probability 0.83.
    logits_BLV = np.log(np.float32([[[0.9, 0.05, 0.05]]]))
    value = jump_probability(CUMULATIVE, Polynomial(), logits_BLV, np.int32([[0]]), 0.5, 0.5)
    assert value[0, 0] == pytest.approx(0.83, abs=0.005)


@functools.lru_cache
def _jump(rule):
    return jax.jit(make_jump(rule, Polynomial()))


def test_new_tokens_reach_into_the_far_tail():
    # Token 0 is current, the rest split 1 : 4e-8 (see test_draws: truncated noise finds a sixth of
    # the tail).
    rows, size, chunks = 1024, 4096, 512
    logits_V = np.full(size, -17.0, np.float32)
    logits_V[[0, 2000]] = 0

    @jax.jit
    def run(keys, logits_V):
        def one(key):
            logits_BLV = jnp.tile(logits_V[None, None], (rows, 1, 1))
            x_BL = _jump(jumps.with_posterior_end(CUMULATIVE))(
                key, logits_BLV, jnp.zeros((rows, 1), jnp.int32), 0.5, 0.5
            )
            return jnp.sum((x_BL != 2000) & (x_BL != 0))

        return jnp.sum(jax.lax.map(one, keys))

    events = run(jax.random.split(jax.random.key(0), chunks), jnp.asarray(logits_V))
    tail = (size - 2) * np.exp(-17.0)
    expected = rows * chunks * tail / (2 + tail)
    assert abs(events - expected) <= 5 * np.sqrt(expected)


def test_keep_revealed():
    mask_id = 3
    logits_BLV = jnp.tile(jnp.log(jnp.float32([0.2, 0.3, 0.4, 0.1]))[None, None], (1, 4 * N, 1))
    xt_BL = jnp.repeat(jnp.arange(4), N)[None]
    jump = jumps.keep_revealed(_jump(CUMULATIVE), mask_id)
    x_L = np.asarray(jump(jax.random.key(0), logits_BLV, xt_BL, 0.25, 0.5))[0]
    np.testing.assert_array_equal(x_L[: 3 * N], xt_BL[0, : 3 * N])
    # kappa(t) = t: 1 - kappa falls from 3/4 to 1/4, and the mask keeps 0.1 of the posterior.
    stays = (1 / 3) ** 0.9
    expected = np.append((1 - stays) * np.array([0.2, 0.3, 0.4]) / 0.9, stays)
    assert_frequencies(np.bincount(x_L[3 * N :], minlength=4), expected)
    # Without the wrapper revealed tokens move again.
    bare_L = np.asarray(_jump(CUMULATIVE)(jax.random.key(0), logits_BLV, xt_BL, 0.25, 0.5))[0]
    assert np.mean(bare_L[: 3 * N] != xt_BL[0, : 3 * N]) > 0.1
    np.testing.assert_array_equal(bare_L[3 * N :], x_L[3 * N :])


def test_the_jump_of_a_process():
    logits_BLV = jax.random.normal(jax.random.key(0), (2, 200, 4))
    xt_BL = jax.random.randint(jax.random.key(1), (2, 200), 0, 4)
    bare = make_jump(CUMULATIVE, Polynomial())

    def moved(*args):
        jump = jumps.make_process_jump(CUMULATIVE, Polynomial(), *args)
        return jump(jax.random.key(2), logits_BLV, xt_BL, 0.25, 0.5)

    literal = bare(jax.random.key(2), logits_BLV, xt_BL, 0.25, 0.5)
    kept = jnp.where(xt_BL == 3, literal, xt_BL)
    assert (kept != literal).any()
    for source, revealed, expected in (
        (Source(4), "stay", literal),
        (Source(4), "jump", literal),
        (Source(4, mask_id=3), "stay", kept),
        (Source(4, mask_id=3), "jump", literal),
    ):
        np.testing.assert_array_equal(moved(source, revealed), expected)
    np.testing.assert_array_equal(moved(Source(4, mask_id=3)), kept)  # the default
    with pytest.raises(ValueError, match="revealed='leap'; expected one of stay, jump"):
        jumps.make_process_jump(CUMULATIVE, Polynomial(), Source(4), "leap")


def test_finalize_with_uniform_noise_draws_every_position():
    p = np.array([0.1, 0.2, 0.3, 0.4])
    logits_BLV = jnp.tile(jnp.asarray(np.log(p), jnp.float32)[None, None], (4, N, 1))
    xt_BL = jnp.tile(jnp.arange(4)[:, None], (1, N))
    x_BL = np.asarray(make_finalize(Source(4))(jax.random.key(0), logits_BLV, xt_BL))
    for row in x_BL:
        assert_frequencies(np.bincount(row, minlength=4), p)


@pytest.mark.parametrize("mask_id", [0, 3])
def test_finalize_with_mask_noise_draws_the_masked_positions(mask_id):
    p = np.array([0.1, 0.2, 0.3, 0.4])
    logits_BLV = jnp.tile(jnp.asarray(np.log(p), jnp.float32)[None, None], (4, N, 1))
    xt_BL = jnp.tile(jnp.arange(4)[:, None], (1, N))
    finalize = make_finalize(Source(4, mask_id=mask_id))
    x_BL = np.asarray(finalize(jax.random.key(0), logits_BLV, xt_BL))
    assert not np.any(x_BL == mask_id)
    revealed = [token for token in range(4) if token != mask_id]
    np.testing.assert_array_equal(x_BL[revealed], xt_BL[np.array(revealed)])
    without = np.where(np.arange(4) == mask_id, 0, p)
    assert_frequencies(np.bincount(x_BL[mask_id], minlength=4), without / without.sum())


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint16, jnp.int8])
def test_shape_and_dtype_are_kept(dtype):
    logits_BLV = jax.random.normal(jax.random.key(0), (2, 3, 5))
    xt_BL = jnp.asarray([[0, 1, 2], [3, 4, 4]], dtype)
    t_B, h_B = np.float32([0.0, 0.5]), np.float32([0.5, 0.25])
    jump = make_jump(CUMULATIVE, Polynomial())
    finalizes = make_finalize(Source(5)), make_finalize(Source(5, mask_id=4))
    for draw, args in (
        (jump, (t_B, h_B)),
        (jumps.keep_revealed(jump, 4), (t_B, h_B)),
        *((finalize, ()) for finalize in finalizes),
    ):
        x_BL = jax.eval_shape(draw, jax.random.key(1), logits_BLV, xt_BL, *args)
        assert x_BL.shape == xt_BL.shape
        assert x_BL.dtype == dtype


def test_tokens_of_a_small_dtype_jump_alike():
    logits_BLV = jax.random.normal(jax.random.key(0), (2, 3, 5))
    xt_BL = jnp.int32([[0, 1, 2], [3, 4, 4]])
    jump = jax.jit(make_jump(CUMULATIVE, Polynomial()))
    results = [
        jump(jax.random.key(1), logits_BLV, xt_BL.astype(dtype), np.float32([0, 0.5]), 0.5)
        for dtype in (jnp.int32, jnp.uint16)
    ]
    np.testing.assert_array_equal(*results)


def test_half_precision_logits_do_not_touch_the_schedule():
    logits_BLV = jax.random.normal(jax.random.key(0), (4, 64, 33)).astype(jnp.bfloat16)
    xt_BL = jax.random.randint(jax.random.key(1), (4, 64), 0, 33)
    # In bfloat16 neither t + h nor 1 - t of these rows could be told apart.
    t_B = np.float32([1 - 2**-9, 1 - 2**-8, 0.5, 0.75])
    h_B = np.full(4, 2**-10, np.float32)
    full_BLV = logits_BLV.astype(jnp.float32)
    for rule in RULES:
        p_BL, expected_BL = (
            jump_probability(rule, Polynomial(), logits, xt_BL, t_B, h_B)
            for logits in (logits_BLV, full_BLV)
        )
        assert p_BL.dtype == jnp.float32
        np.testing.assert_array_equal(p_BL, expected_BL)
    finalize = jax.jit(make_finalize(Source(33, mask_id=32)))
    for draw, args in ((_jump(CUMULATIVE), (t_B, h_B)), (finalize, ())):
        np.testing.assert_array_equal(
            draw(jax.random.key(2), logits_BLV, xt_BL, *args),
            draw(jax.random.key(2), full_BLV, xt_BL, *args),
        )


def test_rules_by_name():
    assert [jumps.get_rule(name) for name in ("cumulative", "euler", "mixture")] == RULES
    with pytest.raises(ValueError, match="'mixture_euler'.*cumulative, euler, mixture"):
        jumps.get_rule("mixture_euler")


# ------------------------------------------------------------------------------- factored logits


def exact_logits(batch, length, size):
    """Factors of small integers: products are exact in any order of summation."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)
    return Factored(draw(batch, length, 3), draw(3, size), draw(size), temperature=2.0)


def every_draw(size):
    """(jump or finalize, its times) of both sources."""
    t_B, h_B = np.float32([0.0, 0.25, 0.5, 0.5, 0.75]), np.float32([0.5, 0.5, 0.25, 0.5, 0.125])
    for mask_id in (None, size - 1):
        source = Source(size, mask_id=mask_id)
        rule = jumps.with_posterior_end(CUMULATIVE)
        yield jumps.make_process_jump(rule, Polynomial(), source), (t_B, h_B)
        yield make_finalize(source), ()


@pytest.mark.parametrize(
    ("size", "chunks"), [(7, (1, 2, 5, 13, 0)), (50, (4,))], ids=["small", "large"]
)
def test_factored_logits_are_drawn_from_as_if_written_down(size, chunks):
    logits = exact_logits(5, 13, size)
    xt_BL = jax.random.randint(jax.random.key(1), (5, 13), 0, size).at[:, ::2].set(size - 1)
    for draw, times in every_draw(size):
        used = jax.jit(draw)
        want_BL = used(jax.random.key(2), dense(logits), xt_BL, *times)
        assert np.any(want_BL != xt_BL)
        for positions in chunks:  # held at once, of 13; 0 for all
            chunked = dataclasses.replace(logits, chunk_size=4 * positions * 5 * size)
            got_BL = used(jax.random.key(2), chunked, xt_BL, *times)
            np.testing.assert_array_equal(got_BL, want_BL)


@pytest.mark.optimised
def test_a_row_does_not_depend_on_the_number_of_rows():
    logits = exact_logits(5, 13, 7)
    xt_BL = jax.random.randint(jax.random.key(1), (5, 13), 0, 7).at[:, ::2].set(6)
    for draw, times in every_draw(7):
        draw = jax.jit(draw)
        every_BL = draw(jax.random.key(2), logits, xt_BL, *times)
        for count in (1, 4):
            some = (rows(logits, 0, count), xt_BL[:count], *(x[:count] for x in times))
            some_BL = draw(jax.random.key(2), *some)
            np.testing.assert_array_equal(some_BL, every_BL[:count])


def test_whether_and_whither_are_independent():
    # Of the positions that jump, and of all others, the tokens follow the same posterior: a number
    # used for both would tie the token to the smallness of P(jump).
    p = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    with np.errstate(divide="ignore"):
        logits_BLV = jnp.tile(jnp.asarray(np.log(p), jnp.float32)[None, None], (1, N, 1))
    xt_BL = jnp.zeros((1, N), jnp.int32)
    for h in (0.05, 0.5):  # 1 in 20 and 1 in 2 move from t = 0, as m = 1
        x_L = np.asarray(_jump(CUMULATIVE)(jax.random.key(3), logits_BLV, xt_BL, 0.0, h))[0]
        assert_frequencies(np.bincount(x_L, minlength=5), np.append(1 - h, h * p[1:]))
