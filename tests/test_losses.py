"""Losses against recorded numbers, and their minimiser on a joint small enough to enumerate."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsdfm_jax.flow import losses, schedules
from fsdfm_jax.flow.losses import distillation_loss, forward_kl, jensen_shannon, path_loss
from fsdfm_jax.flow.schedules import Polynomial

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "losses.npz")
XT, X1 = GOLDEN["xt"].astype(np.int32), GOLDEN["x1"].astype(np.int32)
DIVERGENCES = [forward_kl, jensen_shannon]


def random_logits(seed, *shape, scale=2.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.optimised
@pytest.mark.parametrize("power", [1.0, 2.0, 0.5])
def test_path_loss_against_recorded_numbers(power):
    weight_B = schedules.rate(Polynomial(power), GOLDEN["t"])
    loss_BL = path_loss(GOLDEN["logits"], XT, X1, weight_B[:, None])
    assert loss_BL.dtype == jnp.float32
    np.testing.assert_allclose(loss_BL, GOLDEN[f"gkl_n{power}"], rtol=1e-5)
    assert np.any(XT == X1)
    assert np.any(XT != X1)


@pytest.mark.optimised
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_against_recorded_numbers(temperature):
    loss_BL = distillation_loss(
        forward_kl, GOLDEN["teacher"], GOLDEN["logits"], temperature=temperature
    )
    np.testing.assert_allclose(loss_BL, GOLDEN[f"kl_tau{temperature}"], rtol=1e-5)


def test_path_loss_by_hand():
    p = np.array([0.5, 0.3, 0.2])
    logits_BLV = np.log(np.float32(p))[None, None].repeat(2, axis=1) + 7
    loss_BL = path_loss(logits_BLV, np.int32([[0, 1]]), np.int32([[0, 2]]), np.float32([[3.0]]))
    np.testing.assert_allclose(loss_BL, [[-3 * (0.5 - 1), -3 * (0.3 + np.log(0.2))]], rtol=1e-5)


def test_path_loss_is_never_negative():
    for seed, scale in ((0, 0.1), (1, 2.0), (2, 30.0)):
        logits_BLV = random_logits(seed, 16, 32, 6, scale=scale)
        xt_BL, x1_BL = jax.random.randint(jax.random.key(seed), (2, 16, 32), 0, 6)
        loss_BL = path_loss(logits_BLV, xt_BL, x1_BL, jnp.ones((16, 1)))
        # p(xt) - 1 and p(xt) + log p(x1) round at 2^-24 of 1.
        assert np.all(loss_BL >= -2e-7)


def test_the_weight_of_each_row_multiplies_the_whole_bracket():
    logits_BLV = random_logits(0, 3, 5, 7)
    xt_BL, x1_BL = jax.random.randint(jax.random.key(1), (2, 3, 5), 0, 7)
    one_BL = path_loss(logits_BLV, xt_BL, x1_BL, jnp.ones((3, 1)))
    weight_B1 = jnp.float32([[0.5], [2], [4]])
    # As a column, and written out for each position.
    for weight in (weight_B1, jnp.tile(weight_B1, (1, 5))):
        loss_BL = path_loss(logits_BLV, xt_BL, x1_BL, weight)
        assert loss_BL.shape == (3, 5)
        np.testing.assert_allclose(loss_BL, one_BL * weight_B1, rtol=1e-6)


class Joint:
    """Every (x1, xt) of a random joint: 2 positions of 3 tokens, uniform noise, kappa = 0.6."""

    V, L, kappa = 3, 2, 0.6

    def __init__(self):
        self.states = np.array(list(itertools.product(range(self.V), repeat=self.L)))
        p_x1 = np.random.default_rng(0).dirichlet(np.ones(len(self.states)))
        match = self.states[:, None] == self.states[None]
        path = np.prod(self.kappa * match + (1 - self.kappa) / self.V, axis=-1)
        self.p_joint = p_x1[:, None] * path
        # P(x1 at position l is a | xt), by summation over the whole joint.
        clean = np.zeros((len(self.states), self.L, self.V))
        for (i, j), p in np.ndenumerate(self.p_joint):
            for position in range(self.L):
                clean[j, position, self.states[i, position]] += p
        self.clean_posterior = clean / self.p_joint.sum(0)[:, None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def expected_loss(self, logits_XLV):
        i, j = np.indices(self.p_joint.shape).reshape(2, -1)
        loss_BL = path_loss(logits_XLV[j], self.states[j], self.states[i], jnp.ones((len(i), 1)))
        return jnp.sum(loss_BL * jnp.asarray(self.p_joint.ravel(), jnp.float32)[:, None])


def test_the_clean_posterior_minimises_the_path_loss():
    joint = Joint()
    best_XLV = jnp.asarray(np.log(joint.clean_posterior), jnp.float32)
    loss_and_gradient = jax.jit(jax.value_and_grad(joint.expected_loss))
    value, gradient_XLV = loss_and_gradient(best_XLV)
    np.testing.assert_allclose(gradient_XLV, 0, atol=1e-6)
    for seed in range(5):
        # A step of size s costs order s^2; 0.1 leaves it well above float32 rounding.
        direction_XLV = random_logits(seed, *best_XLV.shape, scale=0.1)
        assert joint.expected_loss(best_XLV + direction_XLV) > value + 1e-5
    # And from elsewhere the gradient does not vanish.
    assert np.max(np.abs(loss_and_gradient(0 * best_XLV)[1])) > 1e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_vanish_only_between_equals(divergence):
    teacher, student = random_logits(0, 4, 5, 9), random_logits(1, 4, 5, 9)
    np.testing.assert_allclose(distillation_loss(divergence, teacher, teacher + 3), 0, atol=1e-6)
    assert np.all(distillation_loss(divergence, teacher, student) > 1e-3)
    gradient = jax.grad(lambda s: jnp.sum(distillation_loss(divergence, teacher, s)))(teacher)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_jensen_shannon_is_symmetric_and_bounded():
    for scale in (1.0, 5.0, 100.0):
        one, two = random_logits(0, 8, 16, 9, scale=scale), random_logits(1, 8, 16, 9, scale=scale)
        value = distillation_loss(jensen_shannon, one, two)
        np.testing.assert_allclose(value, distillation_loss(jensen_shannon, two, one), atol=1e-6)
        assert np.all(value >= -1e-6)
        assert np.all(value <= np.log(2) + 1e-6)
    apart = distillation_loss(jensen_shannon, *np.float32([[[[60, 0]]], [[[0, 60]]]]))
    np.testing.assert_allclose(apart, np.log(2), rtol=1e-5)


def test_jensen_shannon_by_definition():
    p, q = (np.asarray(jax.nn.softmax(random_logits(s, 1, 1, 6))[0, 0], np.float64) for s in (0, 1))
    m = (p + q) / 2
    expected = (np.sum(p * np.log(p / m)) + np.sum(q * np.log(q / m))) / 2
    value = distillation_loss(jensen_shannon, random_logits(0, 1, 1, 6), random_logits(1, 1, 1, 6))
    np.testing.assert_allclose(value, [[expected]], rtol=1e-5)


def test_forward_kl_has_its_direction():
    p, q = np.array([0.9, 0.1]), np.array([0.5, 0.5])
    logits = [np.log(np.float32(a))[None, None] for a in (p, q)]
    expected = np.sum(p * np.log(p / q))
    np.testing.assert_allclose(distillation_loss(forward_kl, *logits), [[expected]], rtol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_divides_both_logits_and_squares(divergence):
    teacher, student = random_logits(0, 2, 3, 9), random_logits(1, 2, 3, 9)
    np.testing.assert_allclose(
        distillation_loss(divergence, teacher, student, temperature=2.0),
        4 * distillation_loss(divergence, teacher / 2, student / 2),
        rtol=1e-6,
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_teacher_gets_no_gradient(divergence):
    loss = lambda teacher, student: jnp.sum(distillation_loss(divergence, teacher, student))
    to_teacher, to_student = jax.grad(loss, (0, 1))(
        random_logits(0, 2, 3, 9), random_logits(1, 2, 3, 9)
    )
    assert not np.any(to_teacher)
    assert np.any(to_student)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_the_teacher_excludes(divergence):
    teacher = jnp.array([[[0.0, 1.0, -jnp.inf]]])
    student = jnp.array([[[0.5, 0.5, -1.0]]])
    loss = lambda s: jnp.sum(distillation_loss(divergence, teacher, s))
    value, gradient = jax.value_and_grad(loss)(student)
    limit = distillation_loss(divergence, teacher.at[..., 2].set(-80.0), student)
    np.testing.assert_allclose(value, limit[0, 0], rtol=1e-6)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_both_exclude(divergence):
    # As where a mask logit is removed from teacher and student alike.
    teacher = jnp.array([[[0.0, 1.0, -jnp.inf]]])
    student = jnp.array([[[0.5, 0.5, -jnp.inf]]])
    loss = lambda s: jnp.sum(distillation_loss(divergence, teacher, s))
    value, gradient = jax.value_and_grad(loss)(student)
    two = distillation_loss(divergence, teacher[..., :2], student[..., :2])
    np.testing.assert_allclose(value, two[0, 0], rtol=1e-6)
    expected = jax.grad(lambda s: jnp.sum(distillation_loss(divergence, teacher[..., :2], s)))(
        student[..., :2]
    )
    np.testing.assert_allclose(gradient[..., :2], expected, rtol=1e-5)
    assert gradient[0, 0, 2] == 0


def test_half_precision_logits_are_taken_in_float32():
    logits = random_logits(0, 2, 3, 9).astype(jnp.bfloat16)
    teacher = random_logits(1, 2, 3, 9).astype(jnp.bfloat16)
    xt_BL, x1_BL = jax.random.randint(jax.random.key(2), (2, 2, 3), 0, 9)
    f32 = lambda x: x.astype(jnp.float32)
    weight_B1 = jnp.float32([[1.001], [2.003]])
    for half, full in (
        (
            path_loss(logits, xt_BL, x1_BL, weight_B1),
            path_loss(f32(logits), xt_BL, x1_BL, weight_B1),
        ),
        (
            distillation_loss(forward_kl, teacher, logits),
            distillation_loss(forward_kl, f32(teacher), f32(logits)),
        ),
        (losses.cross_entropy(logits, x1_BL), losses.cross_entropy(f32(logits), x1_BL)),
    ):
        assert half.dtype == jnp.float32
        np.testing.assert_array_equal(half, full)


# The gradients are written out by hand: each against that of the formula, step by step as JAX
# derives it.


def formula_kl(teacher, student):
    p, log_p = jax.nn.softmax(teacher), jax.nn.log_softmax(teacher)
    return jnp.sum(p * (log_p - jax.nn.log_softmax(student)), axis=-1)


def formula_js(teacher, student):
    p, q = jax.nn.softmax(teacher), jax.nn.softmax(student)
    log_m = jnp.log(0.5 * (p + q))
    to = lambda p, logits: jnp.sum(p * (jax.nn.log_softmax(logits) - log_m), axis=-1)
    return 0.5 * (to(p, teacher) + to(q, student))


def formula_path_loss(logits, xt, x1, weight):
    log_p = jax.nn.log_softmax(logits)
    at = lambda ids: jnp.sum(jax.nn.one_hot(ids, logits.shape[-1]) * log_p, axis=-1)
    return -weight * (jnp.exp(at(xt)) - (xt == x1) + (xt != x1) * at(x1))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "path_loss", "cross_entropy"])
def test_gradients_are_those_of_the_formulas(name, temperature):
    teacher, student = random_logits(0, 3, 7, 11), random_logits(1, 3, 7, 11)
    xt_BL, x1_BL = jax.random.randint(jax.random.key(2), (2, 3, 7), 0, 11)
    weight_B1 = jnp.float32([[0.5], [2], [4]])
    cotangent_BL = random_logits(3, 3, 7)  # every position counts differently

    def divergence(function, s):
        return temperature**2 * function(teacher / temperature, s / temperature)

    losses_and_formulas = {
        "forward_kl": (
            lambda s: distillation_loss(forward_kl, teacher, s, temperature=temperature),
            lambda s: divergence(formula_kl, s),
        ),
        "jensen_shannon": (
            lambda s: distillation_loss(jensen_shannon, teacher, s, temperature=temperature),
            lambda s: divergence(formula_js, s),
        ),
        "path_loss": (
            lambda s: path_loss(s / temperature, xt_BL, x1_BL, weight_B1),
            lambda s: formula_path_loss(s / temperature, xt_BL, x1_BL, weight_B1),
        ),
        "cross_entropy": (
            lambda s: losses.cross_entropy(s / temperature, x1_BL),
            lambda s: -jnp.sum(jax.nn.one_hot(x1_BL, 11) * jax.nn.log_softmax(s / temperature), -1),
        ),
    }
    gradient, expected = (
        jax.jit(jax.grad(lambda s, f=function: jnp.sum(cotangent_BL * f(s))))(student)
        for function in losses_and_formulas[name]
    )
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_cross_entropy():
    logits_BLV = random_logits(0, 2, 3, 5)
    x1_BL = np.int32([[0, 1, 4], [2, 2, 3]])
    p_BLV = np.asarray(jax.nn.softmax(logits_BLV), np.float64)
    expected = -np.log(np.take_along_axis(p_BLV, x1_BL[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(losses.cross_entropy(logits_BLV, x1_BL), expected, rtol=1e-5)


def test_divergences_by_name():
    assert losses.get_divergence("forward_kl") is forward_kl
    assert losses.get_divergence("jsd") is jensen_shannon
    with pytest.raises(ValueError, match="'kl'.*forward_kl, jsd"):
        losses.get_divergence("kl")
