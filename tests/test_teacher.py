"""The shortcut teacher against a literal transcription of Algorithm 1 (arXiv:2509.20624)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from fsdfm_jax.flow import jumps, teacher
from fsdfm_jax.flow.schedules import Polynomial
from fsdfm_jax.flow.teacher import HEUN, RK4, Quadrature, teacher_logits
from fsdfm_jax.ops import logits
from fsdfm_jax.ops.logits import Factored

B, L, V = 4, 6, 5
T = np.float32([0.0, 0.25, 0.5, 0.75])
H = np.float32([1.0, 0.5, 0.5, 0.125])
TABLE = np.random.default_rng(0).normal(size=(3, V, V)).astype(np.float32)
JUMP = jax.jit(jumps.make_jump(jumps.CUMULATIVE, Polynomial()))
BOTH = pytest.mark.parametrize("rule", [HEUN, RK4], ids=["heun", "rk4"])


@jax.jit
def denoise(x_BL, t_B, h_B):
    """Logits that depend on the token, its left neighbour, the time and the width."""
    t_B11, h_B11 = t_B[:, None, None], h_B[:, None, None]
    one, two, three = jnp.asarray(TABLE)
    return one[x_BL] + t_B11 * two[jnp.roll(x_BL, 1, axis=1)] + jnp.sin(9 * h_B11) * three[x_BL]


def tokens():
    return np.random.default_rng(1).integers(0, V, (B, L), np.int32)


def algorithm_1_heun(keys, xt, t, h):
    half = h / 2
    first = denoise(xt, t, half)
    x_mid = JUMP(keys[0], first, xt, t, half)
    second = denoise(x_mid, t + half, half)
    return (first + second) / 2


def algorithm_1_rk4(keys, xt, t, h):
    half = h / 2
    f1 = denoise(xt, t, half)
    x2 = JUMP(keys[0], f1, xt, t, half)
    f2 = denoise(x2, t + half, half)
    x3 = JUMP(keys[1], f2, x2, t + half, half)
    f3 = denoise(x3, t + half, half)
    x4 = JUMP(keys[2], f3, x3, t + half, half)
    f4 = denoise(x4, np.minimum(t + h, 1), half)
    return (f1 + 2 * f2 + 2 * f3 + f4) / 6


@pytest.mark.parametrize(
    ("rule", "literal", "evaluations"),
    [(HEUN, algorithm_1_heun, 2), (RK4, algorithm_1_rk4, 4)],
    ids=["heun", "rk4"],
)
def test_against_algorithm_1(rule, literal, evaluations):
    for seed in range(3):
        result_BLV = teacher_logits(jax.random.key(seed), rule, denoise, JUMP, tokens(), T, H)
        # The teacher documents one key an evaluation, the last one left unused.
        expected_BLV = literal(jax.random.split(jax.random.key(seed), evaluations), tokens(), T, H)
        assert result_BLV.dtype == jnp.float32
        np.testing.assert_allclose(result_BLV, expected_BLV, rtol=1e-5, atol=1e-6)


def spied(rule, t_B, h_B):
    """Calls in order: ("denoise", state, t, h) or ("jump", state, t, h, new state, key)."""
    calls = []

    def spy_denoise(x_BL, time_B, width_B):
        calls.append(("denoise", np.asarray(x_BL), np.asarray(time_B), np.asarray(width_B)))
        return denoise(x_BL, time_B, width_B)

    def spy_jump(key, logits_BLV, x_BL, time_B, width_B):
        np.testing.assert_array_equal(logits_BLV, denoise(x_BL, time_B, width_B))
        new_BL = (x_BL + 1) % V
        arrays = [np.asarray(a) for a in (x_BL, time_B, width_B, new_BL)]
        calls.append(("jump", *arrays, np.asarray(jax.random.key_data(key)).tobytes()))
        return jnp.asarray(new_BL)

    teacher_logits(jax.random.key(0), rule, spy_denoise, spy_jump, tokens(), t_B, h_B)
    return calls


@pytest.mark.parametrize(
    ("rule", "evaluated", "jumped"),
    [(HEUN, [0, 1 / 2], [0]), (RK4, [0, 1 / 2, 1 / 2, 1], [0, 1 / 2, 1 / 2])],
    ids=["heun", "rk4"],
)
def test_calls(rule, evaluated, jumped):
    calls = spied(rule, T, H)
    # Evaluation and jump alternate; no jump follows the last evaluation.
    names = [call[0] for call in calls]
    assert names == (["denoise", "jump"] * len(evaluated))[:-1]
    denoised, jumps_made = calls[::2], calls[1::2]
    for call, node in zip(denoised, evaluated, strict=True):
        np.testing.assert_array_equal(call[2], T + np.float32(node) * H)
    for call, node in zip(jumps_made, jumped, strict=True):
        np.testing.assert_array_equal(call[2], T + np.float32(node) * H)
    for call in calls:
        np.testing.assert_array_equal(call[3], H / 2)
    # The states chain: each step starts from the state that the one before made.
    state_BL = np.asarray(tokens())
    for evaluation, jump in zip(denoised, [*jumps_made, None], strict=True):
        np.testing.assert_array_equal(evaluation[1], state_BL)
        if jump is not None:
            np.testing.assert_array_equal(jump[1], state_BL)
            state_BL = jump[4]
    assert len({jump[5] for jump in jumps_made}) == len(jumps_made), "a key was used twice"


@BOTH
def test_times_are_clamped_at_the_end(rule):
    # t + h exceeds 1 by rounding or by the caller's choice.
    for call in spied(rule, np.full(B, 0.75, np.float32), np.full(B, 0.5, np.float32)):
        assert np.all(call[2] <= 1)
    # 0.1 + 0.9 in float32, and a step well beyond the end.
    t_B, h_B = np.float32([0.1, 0.3, 0.7, 0.9]), np.float32([0.9, 0.7, 0.3, 0.5])
    times = np.array([call[2] for call in spied(rule, t_B, h_B)])
    assert times.max() <= 1


@BOTH
def test_a_constant_denoiser_returns_itself(rule):
    logits_BLV = jax.random.normal(jax.random.key(1), (B, L, V))
    result_BLV = teacher_logits(
        jax.random.key(0), rule, lambda x, t, h: logits_BLV, JUMP, tokens(), T, H
    )
    np.testing.assert_allclose(result_BLV, logits_BLV, rtol=1e-6)


def test_weights():
    assert sum(HEUN.weights) == 1
    assert sum(RK4.weights) == pytest.approx(1, abs=1e-15)
    # Each evaluation alone, read through a denoiser that returns its index.
    for rule, expected in ((HEUN, [1, 1]), (RK4, [1, 2, 2, 1])):
        for index, weight in enumerate(expected):
            count = iter(range(4))
            one = lambda x, t, h, i=index, c=count: jnp.full((B, L, V), float(next(c) == i))
            result = teacher_logits(jax.random.key(0), rule, one, JUMP, tokens(), T, H)
            np.testing.assert_allclose(result, weight / sum(expected), rtol=1e-6)


def test_a_rule_is_data():
    euler = Quadrature(nodes=(0.0,), weights=(1.0,))
    never = lambda *_: pytest.fail("a single evaluation needs no jump")
    result_BLV = teacher_logits(jax.random.key(0), euler, denoise, never, tokens(), T, H)
    np.testing.assert_array_equal(result_BLV, denoise(tokens(), T, H / 2))


@BOTH
def test_no_gradient(rule):
    def total(scale, t_B):
        scaled = lambda x, t, h: scale * denoise(x, t, h)
        return jnp.sum(teacher_logits(jax.random.key(0), rule, scaled, JUMP, tokens(), t_B, H) ** 2)

    to_scale, to_time = jax.jit(jax.grad(total, (0, 1)))(1.0, jnp.asarray(T))
    assert to_scale == 0
    assert not np.any(to_time)


@BOTH
def test_half_precision_logits_are_averaged_in_float32(rule):
    half = lambda x, t, h: denoise(x, t, h).astype(jnp.bfloat16)
    full = lambda x, t, h: half(x, t, h).astype(jnp.float32)
    results = [
        teacher_logits(jax.random.key(0), rule, function, JUMP, tokens(), T, H)
        for function in (half, full)
    ]
    assert results[0].dtype == jnp.float32
    np.testing.assert_array_equal(*results)


@BOTH
def test_deterministic_in_its_key(rule):
    run = jax.jit(functools.partial(teacher_logits, rule=rule, denoise=denoise, jump=JUMP))
    one, same, other = (
        np.asarray(run(jax.random.key(seed), xt_BL=tokens(), t_B=T, h_B=H)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other)


WORDS = 16  # not a size of anything else: a product with the vocabulary shows by its shape


def factored(x_BL, t_B, h_B, *, chunk_size):
    """Features of token, neighbour, time and width, behind a head of small integers."""
    columns = [jax.nn.one_hot(x_BL % 4, 4), jax.nn.one_hot(jnp.roll(x_BL, 1, axis=1) % 4, 4)]
    columns += [jnp.broadcast_to(n[:, None, None], (*x_BL.shape, 1)) for n in (t_B, h_B)]
    features_BLD = jnp.concatenate(columns, axis=-1)
    rng = np.random.default_rng(3)
    kernel_DV, bias_V = rng.integers(-2, 3, (10, WORDS)), rng.integers(-2, 3, WORDS)
    head = (jnp.asarray(kernel_DV, jnp.float32), jnp.asarray(bias_V, jnp.float32))
    return Factored(features_BLD, *head, chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [0, 1], ids=["all", "chunks"])
@BOTH
def test_averaged_features_are_averaged_logits(rule, chunk_size):
    """Times and widths are small powers of two, so both draw the same states."""
    xt_BL = np.random.default_rng(1).integers(0, WORDS, (B, L), np.int32)
    give = functools.partial(factored, chunk_size=chunk_size)
    results = [
        jax.jit(functools.partial(teacher_logits, rule=rule, denoise=denoise, jump=JUMP))(
            jax.random.key(0), xt_BL=xt_BL, t_B=T, h_B=H
        )
        for denoise in (give, lambda *args: logits.dense(give(*args)))
    ]
    assert isinstance(results[0], Factored)
    assert results[0].features_BLD.shape == (B, L, 10)
    np.testing.assert_allclose(logits.dense(results[0]), results[1], rtol=1e-5, atol=1e-5)
    assert np.std(results[1]) > 0.5


@BOTH
def test_only_states_that_jump_pay_for_logits(rule):
    """One vocabulary product before each jump, none after the last evaluation."""
    give = functools.partial(factored, chunk_size=0)
    run = functools.partial(teacher_logits, rule=rule, denoise=give, jump=JUMP)
    program = jax.make_jaxpr(lambda key: run(key, xt_BL=tokens(), t_B=T, h_B=H))(jax.random.key(0))

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.outvars[0].aval.shape
            for inner in jaxprs_in_params(equation.params):
                yield from products(inner)

    assert list(products(program.jaxpr)) == [(B, L, WORDS)] * (len(rule.nodes) - 1)
    shapes = [aval.shape for aval in program.out_avals]
    assert (B, L, WORDS) not in shapes
    assert (B, L, 10) in shapes


def test_rules_by_name():
    assert teacher.get_rule("heun") == HEUN
    assert teacher.get_rule("rk4") == RK4
    with pytest.raises(ValueError, match="'rk2'.*heun, rk4"):
        teacher.get_rule("rk2")
