"""flow/matching.py against sums over all states of a chain of two positions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsdfm_jax.flow import matching

V, L = 3, 2
STATES_NL = np.asarray(list(itertools.product(range(V), repeat=L)))
N = len(STATES_NL)
SHOWN_NLV = np.eye(V)[STATES_NL]


@pytest.fixture(autouse=True)
def exact():
    with jax.enable_x64(True):
        yield


def transition(kernel_NLV):
    """P(state | state) where positions move by themselves."""
    parts = [kernel_NLV[:, i] @ SHOWN_NLV[:, i].T for i in range(L)]
    return parts[0] * parts[1]


def noise(kept):
    return transition(kept * SHOWN_NLV + (1 - kept) / V)


def given_others(law_N, kept):
    """P(token i before noise | the other position after it), [N, L, V] by the state after it."""
    table = np.asarray(law_N).reshape(V, V)
    keeps = kept * np.eye(V) + (1 - kept) / V
    joint = [table @ keeps, table.T @ keeps]  # [token i, other position after noise]
    answers = [part / part.sum(0) for part in joint]
    return np.stack([answers[i][:, STATES_NL[:, 1 - i]].T for i in range(L)], axis=1)


def with_evidence(answers_NLV, kept):
    """Logits whose leave-one-out law is `answers`."""
    return np.log(answers_NLV) + np.log1p(V * kept / (1 - kept)) * SHOWN_NLV


class Step:
    """A step from t = 0.4 to u = 0.7 on data of a random law, and what compares its outcomes."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.t, self.u, self.r = 0.4, 0.7, 0.6
        self.s, self.share = self.r * self.u, (self.u - self.t) / (1 - self.t)
        data_N = rng.dirichlet(np.ones(N))
        self.start_N = data_N @ noise(self.t)
        self.wanted_N = data_N @ noise(self.s)
        self.answers = rng.normal(size=(N, L, V))  # logits of the student, by the state at t
        law_N = self.start_N @ transition(np.asarray(self.kernel(self.answers)))
        conditional_NLV = given_others(law_N, self.r)  # M
        self.own = with_evidence((conditional_NLV - (1 - self.u) / V) / self.u, self.s)
        self.base = with_evidence(given_others(data_N, self.s), self.s)

    def kernel(self, answers):
        return (1 - self.share) * SHOWN_NLV + self.share * jax.nn.softmax(answers, axis=-1)

    def outcomes(self):
        """P(state at t, noised outcome), [N, N]."""
        moved_NN = transition(np.asarray(self.kernel(self.answers)))
        return self.start_N[:, None] * (moved_NN @ noise(self.r))

    def kl(self, answers):
        """KL of the law of noised outcomes to the path's."""
        law_N = self.start_N @ transition(self.kernel(answers)) @ noise(self.r)
        return jnp.sum(law_N * (jnp.log(law_N) - jnp.log(self.wanted_N)))

    def pairs(self, loss):
        """E over (z, z_s) of the sum over positions of loss(rows of z, rows of z_s)."""
        z, zs = (np.repeat(np.arange(N), N), np.tile(np.arange(N), N))
        return jnp.sum(self.outcomes().reshape(-1, 1) * loss(z, zs))

    def full(self, value):
        return np.full((N * N, L), value)


def test_leave_one_out_is_the_law_given_the_other_positions():
    """Against Bayes: a posterior given all positions, the evidence of its own taken out."""
    data_N, kept = np.random.default_rng(1).dirichlet(np.ones(N)), 0.35
    joint_NN = data_N[:, None] * noise(kept)  # [x1, z]
    posterior_NN = joint_NN / joint_NN.sum(0)
    posterior_NLV = np.einsum("xz,xlv->zlv", posterior_NN, SHOWN_NLV)
    got = matching.log_leave_one_out(
        jnp.log(posterior_NLV), jnp.asarray(STATES_NL), np.full((N, L), kept)
    )
    np.testing.assert_allclose(jnp.exp(got), given_others(data_N, kept), rtol=1e-9)
    law_N = data_N @ noise(kept)
    want = given_others(law_N, 1.0)
    np.testing.assert_allclose(
        jnp.exp(matching.log_conditional(got, np.full((N, L), kept))), want, rtol=1e-9
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_student_follows_the_gradient_of_the_joint_kl(seed):
    step = Step(seed)

    def expected(answers):
        def loss(z, zs):
            return matching.student_loss(
                jnp.asarray(answers)[z],
                jnp.asarray(step.own)[zs],
                jnp.asarray(step.base)[zs],
                jnp.asarray(STATES_NL)[zs],
                step.full(step.s),
            )

        return step.pairs(loss)

    got = jax.grad(expected)(jnp.asarray(step.answers)) * step.share * step.r
    want = jax.grad(step.kl)(jnp.asarray(step.answers))
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(got, want, atol=1e-12)


def auxiliary_gradient(step, own):
    def expected(own):
        def loss(z, zs):
            return matching.auxiliary_loss(
                own[zs],
                jnp.asarray(step.answers)[z],
                jnp.asarray(STATES_NL)[z],
                jnp.asarray(STATES_NL)[zs],
                step.full(step.share),
                step.full(step.u),
                step.full(step.r),
            )

        return step.pairs(loss)

    return jax.value_and_grad(expected)(jnp.asarray(own))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_auxiliary_network_learns_the_conditionals_of_the_outcomes(seed):
    step = Step(seed)
    value, gradient = auxiliary_gradient(step, step.own)
    assert np.abs(gradient).max() < 1e-12
    rng = np.random.default_rng(seed)
    for _ in range(5):
        worse, gradient = auxiliary_gradient(step, step.own + 0.3 * rng.normal(size=(N, L, V)))
        assert worse > value
        assert np.abs(gradient).max() > 1e-4


def test_where_both_networks_agree_nothing_is_asked_of_the_student():
    step = Step()
    rows = jnp.asarray(STATES_NL)
    gradient = jax.grad(
        lambda answers: jnp.sum(
            matching.student_loss(answers, step.base, step.base, rows, np.full((N, L), step.s))
        )
    )(jnp.asarray(step.answers))
    assert np.abs(gradient).max() < 1e-15


def test_a_last_step_draws_all_positions():
    """b = 1 and kappa(u) = 1: every logarithm stays finite."""
    step = Step()
    step.share, step.u, step.s = 1.0, 1.0, step.r
    sure = 60.0 * SHOWN_NLV  # probabilities of 0 in float64
    value, gradient = auxiliary_gradient(step, sure)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
