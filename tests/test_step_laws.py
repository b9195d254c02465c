"""Objectives of few-step students: the gradient identity, and their minimisers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import chains, exact_lab, step_laws

CHAIN = step_laws.make_chain("modes", 0)


def test_the_base_is_that_of_the_exact_lab():
    (one, two, *_), _ = exact_lab.REFERENCE["base"]
    for steps, expected in ((1, one), (2, two)):
        p_N = step_laws.student_laws(CHAIN, step_laws.base_logits(CHAIN, steps))[-1]
        assert chains.total_variation(np.asarray(p_N), CHAIN.data_N) == pytest.approx(
            expected, abs=6e-4
        )


@pytest.mark.parametrize(("steps", "j"), [(1, 0), (4, 2), (4, 3)])
def test_the_gradient_of_a_joint_law_is_a_sum_over_single_positions(steps, j):
    with jax.enable_x64(True):
        base = step_laws.base_logits(CHAIN, steps)
        logits = base + jax.random.normal(jax.random.key(1), base.shape)
        start_N = step_laws.student_laws(CHAIN, logits)[j]
        answers_NLV = jax.nn.softmax(logits[j], axis=-1)
        wanted_N, share = step_laws.path_law(CHAIN, (j + 1) / steps), 1 / (steps - j)

        def loss(answers_NLV):
            law_N = start_N @ step_laws.step_matrix(CHAIN, answers_NLV, share)
            return jnp.sum(law_N * (jnp.log(law_N) - jnp.log(wanted_N)))

        centred = lambda x: np.asarray(x - x.mean(-1, keepdims=True))
        expected = centred(jax.grad(loss)(answers_NLV))
        found = centred(step_laws.coordinate_gradient(CHAIN, answers_NLV, share, start_N, wanted_N))
    np.testing.assert_allclose(found, expected, atol=1e-12 * np.abs(expected).max())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [pytest.param("end_to_end", marks=SLOW), "step", pytest.param("step_noised", marks=SLOW)],
)
def test_one_step_finds_the_joint_law(name):
    with jax.enable_x64(True):
        base = step_laws.base_logits(CHAIN, 1)
        start = base + 0.01 * jax.random.normal(jax.random.key(0), base.shape)
        logits = step_laws.minimise(step_laws.RECIPES[name](CHAIN, 1), start, updates=300)
        p_N = np.asarray(step_laws.student_laws(CHAIN, logits)[-1])
    assert chains.total_variation(p_N, CHAIN.data_N) < 0.05  # the base: 0.618


@pytest.mark.parametrize("name", step_laws.RECIPES)
def test_every_objective_falls(name):
    with jax.enable_x64(True):
        start = 0.5 * step_laws.base_logits(CHAIN, 1)  # warmer than the data
        loss = step_laws.RECIPES[name](CHAIN, 1)
        if name != "posterior_drop":  # whose value isn't what its gradient is of
            assert loss(step_laws.minimise(loss, start, updates=20)) < loss(start)
        assert np.isfinite(jax.jit(jax.grad(loss))(start)).all()
