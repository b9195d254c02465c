"""The optimiser, checked by its updates of a scalar."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base as base_config
from fsdfm_jax import stages
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.network import model as model_lib
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


@pytest.mark.parametrize("warmup", [0, 4])
def test_a_constant_rate_then_a_linear_decay(warmup):
    """By hand: constant after the warm-up, linear in the last 5 of 20 steps."""
    got = learning_rates(make(warmup_steps=warmup, num_steps=20, decay_steps=5), 23)
    expected = np.full(23, 0.5)
    expected[:warmup] = 0.5 * np.arange(warmup) / max(warmup, 1)
    expected[15:20] = 0.5 - 0.45 * np.arange(5) / 5
    expected[20:] = 0.05
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 5])
def test_a_stage_may_be_all_warm_up(steps):
    got = learning_rates(make(warmup_steps=steps, num_steps=steps), steps)
    np.testing.assert_allclose(got, 0.5 * np.arange(steps) / steps, rtol=1e-5)


def test_the_global_gradient_is_clipped():
    """With eps as large as the clipped gradient, Adam's step depends on the gradient's size."""
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


@pytest.mark.parametrize("decay_steps", [0, 8])
def test_a_second_network_learns_at_the_same_share_of_the_training(decay_steps):
    """With 3 updates per student update, warm-up and decay are 3 times as long, the rate scaled."""
    config = base_config.get_config()
    config.optim.weight_decay = 0.0
    config.refine.update(learning_rate=0.5, num_steps=20, warmup_steps=4, decay_steps=decay_steps)
    config.refine.update(auxiliary_updates=3, auxiliary_rate=2.0)
    process = process_lib.make_process(**config.path, num_tokens=5, eos_id=0)
    make_turns = lambda name: optim.make_turns(
        config.optim, config[name], stages.make_stage(name, config, process)
    )
    turns = make_turns("refine")
    assert turns.auxiliary.updates == 3
    own = learning_rates(turns.optimizer, 60)
    student = learning_rates(optim.make_optimizer(config.optim, config.refine), 20)
    np.testing.assert_allclose(own[::3], 2 * student, rtol=1e-5)
    assert config.refine.num_steps == 20
    assert make_turns("distill") is None


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
        ({"warmup_steps": 11}, "warmup_steps must be between 0 and num_steps=10, got 11"),
        ({"warmup_steps": -1}, "warmup_steps .* got -1"),
        ({"warmup_steps": 4, "decay_steps": 7}, "decay_steps .* = 10 - 4, got 7"),
        ({"decay_steps": -1}, "decay_steps .* got -1"),
    ],
)
def test_wrong_lengths_are_refused(stage, message):
    with pytest.raises(ValueError, match=message):
        make(**stage)


def test_the_first_moment_may_have_half_the_size():
    """Rounding by 2^-9 per step with a memory of 10 steps gives an error of at most 2%."""
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


# ------------------------------------------------------------------------------------------- Muon
def muon(**values):
    return make(optimizer={"name": "muon", "clip_norm": 1e3} | values, final_lr_fraction=1.0)


def network(conditioning="additive", causal=False):
    """Shapes of a small network's parameters, and random arrays of them."""
    cfg = model_lib.ModelConfig(7, 8, 3, 2, 4, conditioning=conditioning, causal=causal)
    params = model_lib.init_params(jax.random.key(0), cfg)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return params, jax.tree.unflatten(tree, drawn)


def named(tree):
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in found}


MATRICES = {
    f"blocks/{name}/kernel"
    for name in ("q_proj", "k_proj", "v_proj", "out_proj", "mlp_in", "mlp_out")
}


@pytest.mark.slow
def test_muon_makes_the_blocks_matrices_orthogonal():
    """Of a first gradient G = U S V' the momentum has its direction; the update is near U V'."""
    params, grads = network()
    transformation = muon()
    updates, _ = transformation.update(grads, transformation.init(params), params)
    updates, grads = named(updates), named(grads)
    for name in MATRICES:
        for update, grad in zip(updates[name], grads[name], strict=True):
            u, _, vt = np.linalg.svd(grad, full_matrices=False)
            sizes = np.linalg.svd(update, compute_uv=False)
            # The iteration leaves singular values between about 0.7 and 1.2.
            scale = 0.5 * 0.2 * np.sqrt(max(grad.shape))
            assert np.all((0.3 * scale < sizes) & (sizes < 1.3 * scale)), name
            cosine = -np.sum(update * (u @ vt)) / np.linalg.norm(update) / np.sqrt(len(sizes))
            assert cosine > 0.95, name


def test_muon_leaves_the_rest_to_adamw():
    params, grads = network()
    transformation = muon(weight_decay=0.1)
    adamw = optax.adamw(0.5, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, nesterov=True)
    opt_state, adam_state = transformation.init(params), adamw.init(params)
    for grad in (grads, jax.tree.map(lambda x: -0.5 * x, grads)):
        updates, opt_state = transformation.update(grad, opt_state, params)
        expected, adam_state = adamw.update(grad, adam_state, params)
    updates, expected = named(updates), named(expected)
    assert updates.keys() > MATRICES
    for name in updates.keys() - MATRICES:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("conditioning", ["none", "official", "additive"])
def test_muon_has_one_moment_for_matrices_and_two_for_the_rest(conditioning):
    params, _ = network(conditioning, causal=conditioning == "none")
    opt_state = muon(moment_dtype="bfloat16").init(params)
    sizes = {name: x.size for name, x in named(params).items()}
    matrices = sum(sizes[name] for name in MATRICES)
    held = [x for x in jax.tree.leaves(opt_state) if x.size > 3]
    assert sum(x.size for x in held if x.dtype == jnp.bfloat16) == sum(
        size for size in sizes.values() if size > 3
    )
    assert sum(x.size for x in held if x.dtype == jnp.float32) == sum(
        size for name, size in sizes.items() if name not in MATRICES and size > 3
    )
    assert matrices > sum(sizes.values()) / 3


def test_muon_decays_weights_apart_from_the_gradient():
    params, grads = network()
    without, with_decay = muon(), muon(weight_decay=0.1)
    plain, _ = without.update(grads, without.init(params), params)
    decayed, _ = with_decay.update(grads, with_decay.init(params), params)
    expected = jax.tree.map(lambda u, w: u - 0.5 * 0.1 * w, plain, params)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7),
        decayed,
        expected,
    )
