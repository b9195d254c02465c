"""The optimiser, read off the updates it makes of a scalar."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base as base_config
from fsdfm_jax.training import optim


def make(*, optimizer=None, **stage):
    config = base_config.get_config()
    config.optim.update({"weight_decay": 0.0} | (optimizer or {}))
    config.pretrain.update({"learning_rate": 0.5, "num_steps": 10} | stage)
    return optim.make_optimizer(config.optim, config.pretrain)


def learning_rates(transformation, count):
    """Under a constant gradient Adam moves by exactly the learning rate."""

    def step(opt_state, _):
        updates, opt_state = transformation.update(jnp.ones(()), opt_state, jnp.zeros(()))
        return opt_state, -updates

    return np.asarray(jax.lax.scan(step, transformation.init(jnp.zeros(())), length=count)[1])


def test_warm_up_then_cosine():
    """By hand: lr n/w, then from the peak to its final fraction along half a cosine."""
    got = learning_rates(make(warmup_steps=4, num_steps=12, final_lr_fraction=0.2), 15)
    steps = np.arange(15)
    progress = np.clip((steps - 4) / 8, 0, 1)
    cosine = 0.5 * (0.2 + 0.8 * (1 + np.cos(np.pi * progress)) / 2)
    np.testing.assert_allclose(got, np.where(steps < 4, 0.5 * steps / 4, cosine), rtol=1e-5)
    assert got[0] == 0
    assert got[4] == pytest.approx(0.5)
    assert got[8] == pytest.approx(0.5 * 0.6)
    assert got[12:] == pytest.approx([0.1] * 3)


def test_without_warm_up_the_first_step_is_at_the_peak():
    got = learning_rates(make(warmup_steps=0), 11)
    assert got[0] == pytest.approx(0.5)
    assert got[5] == pytest.approx(0.5 * 0.55)
    assert got[10] == pytest.approx(0.05)  # the default, a tenth


@pytest.mark.parametrize("steps", [1, 5])
def test_a_stage_may_be_all_warm_up(steps):
    got = learning_rates(make(warmup_steps=steps, num_steps=steps), steps)
    np.testing.assert_allclose(got, 0.5 * np.arange(steps) / steps, rtol=1e-5)


def test_the_global_gradient_is_clipped():
    """With eps as large as the clipped gradient, Adam's step shows the size it was given."""
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    transformation = make(optimizer={"clip_norm": 2.0, "eps": 1.0}, warmup_steps=0)

    def first_step(a, b):
        grads = {"a": jnp.float32(a), "b": jnp.float32(b)}
        updates, _ = transformation.update(grads, transformation.init(params), params)
        return [-float(updates[name]) for name in "ab"]

    step = lambda g: 0.5 * g / (abs(g) + 1.0)
    assert first_step(30, 40) == pytest.approx([step(1.2), step(1.6)])  # norm 50 -> 2
    assert first_step(0.3, -0.4) == pytest.approx([step(0.3), step(-0.4)])  # left alone


def test_adamw_equals_its_equations():
    """Three steps by hand, weight decay apart from the gradient (AdamW, arXiv:1711.05101)."""
    b1, b2, eps, decay, lr = 0.7, 0.8, 0.01, 0.1, 0.5
    values = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": decay, "clip_norm": 100.0}
    transformation = make(optimizer=values, final_lr_fraction=1.0)
    w, m, v = 3.0, 0.0, 0.0
    params = jnp.float32(w)
    opt_state = transformation.init(params)
    for n, grad in enumerate([2.0, -1.0, 0.5], start=1):
        updates, opt_state = transformation.update(jnp.float32(grad), opt_state, params)
        params = optax.apply_updates(params, updates)
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        m_hat, v_hat = m / (1 - b1**n), v / (1 - b2**n)
        w = w - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * w)
        assert float(params) == pytest.approx(w, rel=1e-5)


def test_the_papers_values_are_the_defaults():
    config = base_config.get_config()
    values = (config.optim.b1, config.optim.b2, config.optim.eps, config.optim.weight_decay)
    assert values == (0.9, 0.95, 1e-8, 0.03)
    assert config.optim.clip_norm == 1.0
    rates = [config[name].learning_rate for name in ("pretrain", "step_aware", "distill", "refine")]
    assert rates == [3e-4, 1e-5, 1e-5, 1e-5]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"num_steps": 0}, "num_steps >= 1, got 0"),
        ({"warmup_steps": 11}, "warmup_steps must lie between 0 and num_steps=10, got 11"),
        ({"warmup_steps": -1}, "warmup_steps .* got -1"),
    ],
)
def test_wrong_lengths_are_refused(stage, message):
    with pytest.raises(ValueError, match=message):
        make(**stage)


def test_the_first_moment_may_have_half_the_size():
    """Rounded by 2^-9 of itself a step and with a memory of 10 steps it is off by 2% at most."""
    params = {"w": jnp.linspace(-1.0, 1.0, 64)}
    found = {}
    for dtype in ("float32", "bfloat16"):
        transformation = make(optimizer={"moment_dtype": dtype}, num_steps=40, learning_rate=0.01)
        weights, opt_state = params, transformation.init(params)
        for n in range(40):
            grads = {"w": weights["w"] - 0.5 * jnp.cos(jnp.arange(64.0) + n)}
            updates, opt_state = transformation.update(grads, opt_state, weights)
            weights = optax.apply_updates(weights, updates)
        moments = optax.tree.get(opt_state, "mu"), optax.tree.get(opt_state, "nu")
        assert [str(moment["w"].dtype) for moment in moments] == [dtype, "float32"]
        assert weights["w"].dtype == jnp.float32
        found[dtype] = weights["w"]
    moved = float(jnp.abs(found["float32"] - params["w"]).max())
    difference = float(jnp.abs(found["bfloat16"] - found["float32"]).max())
    assert 0 < difference < 0.02 * moved


@pytest.mark.parametrize("dtype", ["float16", "bf16", "", "float64"])
def test_other_dtypes_of_the_moment_are_refused(dtype):
    message = f"Unknown optim.moment_dtype='{dtype}'; expected float32 or bfloat16"
    with pytest.raises(ValueError, match=message):
        make(optimizer={"moment_dtype": dtype})
