"""The exact posterior against enumeration of all texts, for both sources and two schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_law

from fsdfm_jax.exact import hmm, hmm_posterior
from fsdfm_jax.flow import grids, jumps, sampler, schedules, sources

pytestmark = pytest.mark.slow

LAW = tiny_law.make()
SCHEDULES = pytest.mark.parametrize("schedule", [schedules.Polynomial(2.0), schedules.Cosine()])
UNIFORM, MASK = sources.Source(3), sources.Source(4, mask_id=3)


def _enumerated(xt_L, kappa, source, *, leave_out=None):
    """P(x1_i | xt) for all i, [L, V]; `leave_out` ignores what that position shows."""
    texts, weight = tiny_law.sequences(LAW), tiny_law.probabilities(LAW)
    for i, token in enumerate(xt_L):
        if i == leave_out:
            continue
        noise = 1 / 3 if source.mask_id is None else float(token == source.mask_id)
        weight = weight * (kappa * (texts[:, i] == token) + (1 - kappa) * noise)
    weight = weight / weight.sum()
    return np.array([[weight[texts[:, i] == v].sum() for v in range(3)] for i in range(4)])


def _softmax(logits):
    return np.asarray(jax.nn.softmax(logits), np.float64)


@SCHEDULES
def test_uniform_noise(schedule):
    xt_BL = tiny_law.sequences(LAW)  # all 81
    for time in (0.0, 0.3, 0.7, 0.95):
        denoise = hmm_posterior.make_denoiser(LAW, schedule, UNIFORM)
        t_B = jnp.full(len(xt_BL), time)
        p_BLV = _softmax(denoise(jnp.asarray(xt_BL), t_B, t_B))
        kappa = float(schedule.kappa(time))
        expected = [_enumerated(xt_L, kappa, UNIFORM) for xt_L in xt_BL]
        np.testing.assert_allclose(p_BLV, expected, atol=3e-6)


@SCHEDULES
def test_masks(schedule):
    xt_BL = np.array([[3, 3, 3, 3], [3, 0, 3, 1], [2, 3, 3, 0], [0, 1, 1, 0], [2, 3, 2, 3]])
    denoise = hmm_posterior.make_denoiser(LAW, schedule, MASK)
    t_B = jnp.full(len(xt_BL), 0.4)
    p_BLV = _softmax(denoise(jnp.asarray(xt_BL), t_B, t_B))
    assert p_BLV.shape == (5, 4, 4)
    expected = [_enumerated(xt_L, float(schedule.kappa(0.4)), MASK) for xt_L in xt_BL]
    np.testing.assert_allclose(p_BLV[..., :3], expected, atol=3e-6)
    assert (p_BLV[..., 3] < 1e-20).all()


def test_leave_one_out():
    xt_BL, schedule = tiny_law.sequences(LAW)[::5], schedules.Polynomial()
    leave_one_out = hmm_posterior.make_leave_one_out(LAW, schedule, UNIFORM)
    t_B = jnp.full(len(xt_BL), 0.6)
    p_BLV = _softmax(leave_one_out(jnp.asarray(xt_BL), t_B, t_B))
    for xt_L, p_LV in zip(xt_BL, p_BLV, strict=True):
        for i in range(4):
            expected = _enumerated(xt_L, 0.6, UNIFORM, leave_out=i)[i]
            np.testing.assert_allclose(p_LV[i], expected, atol=3e-6)


def test_times_differ_by_row_and_widths_do_not_matter():
    denoise = hmm_posterior.make_denoiser(LAW, schedules.Polynomial(), UNIFORM)
    xt_BL, t_B = jnp.array([[0, 1, 2, 0], [0, 1, 2, 0]]), jnp.array([0.2, 0.9])
    both = denoise(xt_BL, t_B, jnp.zeros(2))
    for i in range(2):
        alone = denoise(xt_BL[i : i + 1], t_B[i : i + 1], jnp.ones(1))
        np.testing.assert_allclose(both[i : i + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", [UNIFORM, MASK], ids=["uniform", "mask"])
def test_the_ends_of_time_are_finite(source):
    """Also at t=1, and for a text with almost no probability."""
    transition = np.array([[0.5, 0.5, 0], [0.5, 0.5 - 1e-13, 1e-13], [1.0, 0, 0]])
    law = hmm.Law(transition, LAW.emission_KV, LAW.tokens)
    xt_BL = jnp.array([[2, 2, 2, 2], [0, 1, 0, 1]])
    for time in (0.0, 1.0):
        denoise = hmm_posterior.make_denoiser(law, schedules.Polynomial(), source)
        logits_BLV = denoise(xt_BL, jnp.full(2, time), jnp.zeros(2))
        assert np.isfinite(logits_BLV).all()
    shown = _softmax(logits_BLV)[1][np.arange(4), np.array([0, 1, 0, 1])]
    np.testing.assert_allclose(shown, 1, atol=1e-5)


@pytest.mark.optimised
@pytest.mark.parametrize("source", [UNIFORM, MASK], ids=["uniform", "mask"])
def test_many_steps_with_it_give_the_law(source):
    schedule = schedules.Polynomial()
    denoise = hmm_posterior.make_denoiser(LAW, schedule, source)
    jump = jumps.make_process_jump(jumps.MIXTURE, schedule, source)
    finalize = jumps.make_finalize(source)

    @jax.jit
    def draw(key):
        start_key, key = jax.random.split(key)
        x0_BL = source.sample(start_key, (20_000, 4))
        return sampler.sample(key, denoise, jump, finalize, x0_BL, grids.uniform_grid(64))

    kinds = np.asarray(draw(jax.random.key(0))) @ 3 ** np.arange(4)[::-1]
    found = np.bincount(kinds, minlength=81) / 20_000
    law = tiny_law.probabilities(LAW)
    # 81 frequencies of 20,000 draws lie 0.02 from their law; a step's error is of order 1/64.
    assert np.abs(found - law).sum() / 2 < 0.035


def test_other_vocabularies_are_refused():
    for source in (sources.Source(4), sources.Source(3, mask_id=0), sources.Source(4, mask_id=0)):
        with pytest.raises(
            ValueError, match="a law of 3 tokens needs a uniform source of the same size"
        ):
            hmm_posterior.make_denoiser(LAW, schedules.Polynomial(), source)
