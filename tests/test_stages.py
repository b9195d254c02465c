"""The stages: one signature, the numbers of their equations, and rejected inputs.

A network of one table replaces `models.predict` and records its inputs; the expected loss follows
from the record by the literal equations.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies
from marks import slow_except

from configs import base as base_config
from fsdfm_jax import stages
from fsdfm_jax.flow import jumps, losses, teacher
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.ops.logits import Factored, dense
from fsdfm_jax.stages import autoregressive, few_step, pretrain

V, B, L = 11, 8, 6


def make_config():
    config = base_config.get_config()
    model = config.model
    model.width, model.num_blocks, model.num_heads, model.cond_width = 8, 2, 2, 4
    model.mlp_ratio = 2
    for name in stages.FEW_STEP:
        config[name].max_log2_steps = 4
    config.distill.tau = 0.25
    config.refine.max_log2_steps = 1  # rows of one step and of two
    return config


def make_process(config, num_tokens=V):
    return process_lib.make_process(**config.path, num_tokens=num_tokens, eos_id=2)


def make_stage(name, config=None):
    config = config or make_config()
    return stages.make_stage(name, config, make_process(config))


def make_batch(seed=0, rows=B):
    return {"x1": np.random.default_rng(seed).integers(0, V, (rows, L)).astype(np.int32)}


def noised(params, seed=0):
    """Parameters without the initial zeros, which block gradients."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + 0.3 * rng.standard_normal(p.shape).astype("f4"), params)


@functools.cache
def base_params():
    return jax.jit(lambda key: make_stage("pretrain").init_params(key, None))(jax.random.key(0))


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


# ------------------------------------------------------------------------------- one signature


@pytest.mark.parametrize("name", slow_except(("pretrain", "distill", "refine"), stages.NAMES))
def test_a_stage_has_one_signature_and_learns_everywhere_but_in_the_frozen_weights(name):
    stage = make_stage(name)
    assert stage.name == name
    base = base_params() if name in stages.FEW_STEP else None
    fresh = jax.jit(stage.init_params)(jax.random.key(1), base)
    params = noised(fresh, 1)
    needed = dict.fromkeys(stage.needs, noised(base_params(), 4))
    partner = None if stage.auxiliary is None else noised(fresh, 5)
    frozen = stages.Frozen(noised(fresh, 2), needed, partner)
    batch = make_batch()
    run = jax.jit(jax.value_and_grad(stage.loss, argnums=(0, 1), has_aux=True))
    (value, metrics), (grads, frozen_grads) = run(params, frozen, jax.random.key(2), batch)
    assert value.shape == ()
    assert np.isfinite(value)
    assert metrics["loss"] == value
    assert all(np.shape(metric) == () and np.isfinite(metric) for metric in metrics.values())
    for path, grad in flat(grads).items():
        assert np.isfinite(grad).all(), path
        assert grad.any(), f"no gradient reaches {path}"
    assert not any(grad.any() for grad in flat(frozen_grads).values())
    # The average teaches in `distill` and nowhere else.
    taught = name == "distill"
    assert ("distillation_loss" in metrics) == taught
    (other, _), _ = run(params, frozen._replace(average=noised(fresh, 3)), jax.random.key(2), batch)
    assert (other != value) == taught
    # Noise, times and dropout come from the key; the same key repeats them.
    (again, _), _ = run(params, frozen, jax.random.key(2), batch)
    (different, _), _ = run(params, frozen, jax.random.key(3), batch)
    assert again == value != different


@pytest.mark.parametrize("name", stages.FEW_STEP)
def test_a_few_step_stage_refuses_to_start_without_base_weights(name):
    with pytest.raises(ValueError, match=f"Stage '{name}' .*base weights.* {name}.init_from"):
        make_stage(name).init_params(jax.random.key(0), None)


@pytest.mark.parametrize("name", stages.FEW_STEP)
def test_a_few_step_stage_starts_from_the_base_weights(name):
    started = flat(jax.jit(make_stage(name).init_params)(jax.random.key(9), base_params()))
    base = flat(base_params())
    assert {path.split("/")[0] for path in started.keys() - base} == {"dt_embedding", "dt_proj"}
    for path, value in base.items():
        np.testing.assert_array_equal(started[path], value, err_msg=path)


def test_base_weights_of_another_shape_are_refused():
    config = make_config()
    config.model.width = 16
    with pytest.raises(ValueError, match="don't fit"):
        jax.eval_shape(make_stage("distill", config).init_params, jax.random.key(0), base_params())


def test_pretraining_starts_fresh_or_goes_on():
    stage = make_stage("pretrain")
    init = jax.jit(stage.init_params)
    fresh = flat(init(jax.random.key(1), None))
    assert any((fresh[path] != value).any() for path, value in flat(base_params()).items())
    went_on = flat(init(jax.random.key(1), base_params()))
    for path, value in flat(base_params()).items():
        np.testing.assert_array_equal(went_on[path], value)


def test_the_model_of_each_stage():
    for name in stages.NAMES:
        model = make_stage(name).model
        assert model.causal == (name == "autoregressive")
        assert model.conditioning == ("additive" if name in stages.FEW_STEP else "none")
        assert (model.vocab_size, model.width, model.dropout) == (V, 8, 0.1)


def test_the_papers_literal_recipe_makes_stages():
    config = make_config()
    base_config.use_paper_recipe(config)
    made = [make_stage(name, config) for name in config.pipeline.split(",")]
    assert [stage.name for stage in made] == ["pretrain", "distill"]
    stage = made[1]
    assert stage.model.conditioning == "official"
    params = jax.eval_shape(stage.init_params, jax.random.key(0), base_params())
    assert {"dt_embedding", "time_condition_fuser"} <= set(params)
    value, metrics = jax.eval_shape(
        stage.loss, params, stages.Frozen(params), jax.random.key(0), make_batch()
    )
    assert (value.shape, value.dtype) == ((), jnp.float32)
    assert set(metrics) == {"loss", "path_loss", "distillation_loss"}


def test_a_mask_source_serves_all_stages_but_refine():
    config = make_config()
    config.path.source = "mask"
    for name in ("autoregressive", "pretrain", "step_aware", "distill"):
        stage = make_stage(name, config)
        assert stage.model.vocab_size == V + 1
        base = jax.eval_shape(make_stage("pretrain", config).init_params, jax.random.key(0), None)
        base = base if name in stages.FEW_STEP else None
        params = jax.eval_shape(stage.init_params, jax.random.key(0), base)
        value, _ = jax.eval_shape(
            stage.loss, params, stages.Frozen(params), jax.random.key(0), make_batch()
        )
        assert value.shape == ()
    with pytest.raises(ValueError, match="path.source='uniform'"):
        make_stage("refine", config)


WRONG = [
    ("distil", {}, "Unknown stage 'distil'; expected one of autoregressive, pretrain"),
    *((name, {"model.conditioning": "none"}, "model.conditioning") for name in stages.FEW_STEP),
    (
        "pretrain",
        {"pretrain.loss": "elbo"},
        "pretrain.loss must be one of path, cross_entropy.*'elbo'",
    ),
    (
        "pretrain",
        {"pretrain.time_power": 0.5},
        r"pretrain.time_power must be .* in \[1, 100\], got 0.5",
    ),
    ("pretrain", {"pretrain.time_eps": 0.0}, r"pretrain.time_eps must be .* in \(0, 1\), got 0"),
    ("pretrain", {"pretrain.time_eps": 1.0}, "pretrain.time_eps"),
    ("pretrain", {"pretrain.rate_floor": 0.0}, "rate_floor must be .* in"),
    ("pretrain", {"path.schedule": "sine"}, "Unknown schedule 'sine'"),
    (
        "step_aware",
        {"step_aware.loss": "mse"},
        "step_aware.loss must be one of path, cross_entropy",
    ),
    ("step_aware", {"step_aware.rate": "exact"}, "rate must be one of cumulative, .*'exact'"),
    ("step_aware", {"step_aware.rate_floor": 1.0}, "rate_floor must be .* in"),
    ("step_aware", {"step_aware.width_weights": "even"}, "width_weights must be one of .*'even'"),
    ("step_aware", {"step_aware.max_log2_steps": -1}, "max_log2_steps"),
    ("step_aware", {"step_aware.time_eps": 1.0}, "time_eps"),
    ("distill", {"distill.guidance": 1.0}, r"guidance=1\.0 .* and distill\.guide='' .* or neither"),
    ("distill", {"distill.guide": "short"}, r"guidance=0\.0 .*'short' .* or neither"),
    ("distill", {"distill.guidance": -1.0}, r"distill.guidance must be .* in \[0, 100\], got -1"),
    ("distill", {"distill.divergence": "kl"}, "divergence must be one of forward_kl, jsd.*'kl'"),
    ("distill", {"distill.teacher_rule": "rk3"}, "teacher_rule must be one of heun, rk4"),
    ("distill", {"distill.teacher_end": "stop"}, "teacher_end must be one of .*literal.*'stop'"),
    ("distill", {"distill.teacher_jump": "leap"}, "teacher_jump must be one of"),
    ("distill", {"distill.temperature": 0.0}, "distill.temperature must be a finite number"),
    (
        "distill",
        {"distill.temperature": float("nan")},
        "distill.temperature must be a finite number",
    ),
]


@pytest.mark.parametrize(("name", "values", "message"), WRONG)
def test_wrong_values_are_refused_by_name(name, values, message):
    config = make_config()
    config.update_from_flattened_dict(values)
    with pytest.raises(ValueError, match=message):
        make_stage(name, config)


# ------------------------------------------------------------ a table in place of the network


class Calls(list):
    """Stands for `models.predict`: logits = table[x] + slope t + bend log2 h, each call recorded.

    Factored: the features of a position are its token as one of V, t and log2 h.
    """

    def __call__(self, params, model, x, t=None, h=None, frozen_BL=None, *, key=None):
        self.append({"params": params, "x": x, "t": t, "h": h, "f": frozen_BL, "key": key})
        size = len(params["slope"])
        numbers = [jnp.zeros(x.shape[0]) if t is None else t]
        numbers.append(jnp.zeros(x.shape[0]) if h is None else jnp.log2(h))
        features = [jax.nn.one_hot(x, size)]
        features += [jnp.broadcast_to(n[:, None, None], (*x.shape, 1)) for n in numbers]
        kernel = jnp.concatenate([params["table"], params["slope"][None], params["bend"][None]])
        features = jnp.concatenate(features, axis=-1)
        # Two positions at a time: the loss is a mean over chunks too.
        chunk_size = 2 * x.shape[0] * size
        return Factored(features, kernel, jnp.zeros(size), chunk_size=chunk_size)


@pytest.fixture
def calls(monkeypatch):
    recorded = Calls()
    monkeypatch.setattr(model_lib, "predict", recorded)
    return recorded


def table(seed=0, size=V):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return {"table": draw(size, size), "slope": draw(size), "bend": 0.3 * draw(size)}


def literal_logits(params, x, t=None, h=None):
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    logits = params["table"][x]
    if t is not None:
        logits = logits + np.asarray(t, np.float64)[:, None, None] * params["slope"]
    if h is not None:
        logits = logits + np.log2(np.asarray(h, np.float64))[:, None, None] * params["bend"]
    return logits


def literal_log_p(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def literal_path_loss(log_p, xt, x1, weight_B):
    """Eq. 3.8, position by position."""
    result = np.zeros(xt.shape)
    for b, i in np.ndindex(*xt.shape):
        z, y = xt[b, i], x1[b, i]
        shown = z == y
        bracket = np.exp(log_p[b, i, z]) - shown + (not shown) * log_p[b, i, y]
        result[b, i] = -weight_B[b] * bracket
    return result


# --------------------------------------------------------------------------------------- pretrain


def test_stratified_times_are_uniform_per_row_and_one_per_stratum():
    rows, keys, eps = 4, 6000, 0.25
    draw = jax.vmap(lambda key: pretrain.stratified_times(key, rows, time_eps=eps))
    times, weights = draw(jax.random.split(jax.random.key(0), keys))
    assert np.all(np.asarray(weights) == 1)
    times = np.asarray(times) / (1 - eps)
    assert times.min() >= 0
    assert times.max() < 1
    strata = np.sort(np.floor(times * rows), axis=1)
    np.testing.assert_array_equal(strata, np.tile(np.arange(rows), (keys, 1)))
    for row in times.T:
        assert_frequencies(np.histogram(row, 16, (0, 1))[0], np.full(16, 1 / 16))


def test_times_of_another_density_are_weighted_back():
    """Checked by their distribution 1 - (1 - t)^(1/2) and by weighted means of powers of t."""
    rows, keys, eps = 4, 20_000, 0.01
    draw = jax.vmap(lambda key: pretrain.stratified_times(key, rows, time_eps=eps, power=2.0))
    times, weights = map(np.asarray, draw(jax.random.split(jax.random.key(0), keys)))
    assert times.min() >= 0
    assert times.max() < 1 - eps
    share = (1 - np.sqrt(1 - times)) / (1 - np.sqrt(eps))
    np.testing.assert_array_equal(
        np.sort(np.floor(share * rows), axis=1), np.tile(np.arange(rows), (keys, 1))
    )
    for row in share.T:
        assert_frequencies(np.histogram(row, 16, (0, 1))[0], np.full(16, 1 / 16))
    for power in range(4):  # of a uniform time: (1 - eps)^n / (n + 1)
        got = (weights * times**power).mean()
        assert got == pytest.approx((1 - eps) ** power / (power + 1), rel=0.01)


@pytest.mark.parametrize("name", ["path", "cross_entropy", "rate_cross_entropy"])
@pytest.mark.parametrize(("power", "time_power"), [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0)])
def test_pretrain_losses_equal_their_equations(calls, name, power, time_power):
    config = make_config()
    config.pretrain.loss, config.path.power = name, power
    config.pretrain.time_power = time_power
    params, x1 = table(), make_batch()["x1"]
    value, _ = make_stage("pretrain", config).loss(params, None, jax.random.key(1), {"x1": x1})
    (call,) = calls
    assert call["key"] is not None
    assert call["h"] is None
    xt, t = np.asarray(call["x"]), np.asarray(call["t"], np.float64)
    log_p = literal_log_p(literal_logits(params, xt, t))
    g = power * t ** (power - 1) / (1 - t**power)
    want = {
        "path": literal_path_loss(log_p, xt, x1, g),
        "cross_entropy": -np.take_along_axis(log_p, x1[..., None], -1)[..., 0],
        "rate_cross_entropy": -np.take_along_axis(log_p, x1[..., None], -1)[..., 0] * g[:, None],
    }[name]
    if time_power == 2:  # the density is 1 / (2 sqrt(1 - t)), up to its norm
        end = np.sqrt(1e-3)
        want = want * (2 * np.sqrt(1 - t) * (1 - end) / (1 - 1e-3))[:, None]
    np.testing.assert_allclose(value, want.mean(), rtol=1e-5)


def test_pretrain_text_is_noised_along_the_path(calls):
    """At time t a position shows its data with probability t, or by chance 1/V."""
    stage, x1 = make_stage("pretrain"), np.full((512, 32), 3, np.int32)
    _, _, (call,), _ = recorded(calls, stage.loss, table(), None, jax.random.key(0), {"x1": x1})
    t, shown = np.asarray(call["t"]), (np.asarray(call["x"]) == 3).mean(1)
    assert t.max() < 1 - 1e-3
    # each row: 5 standard errors of 32 draws; together: of 512 * 32
    p = t + (1 - t) / V
    assert np.all(np.abs(shown - p) <= 5 * np.sqrt(p * (1 - p) / 32) + 0.04)
    assert abs((shown - p).mean()) <= 5 * np.sqrt((p * (1 - p)).mean() / shown.size / 32)


@pytest.mark.parametrize("name", ["path", "cross_entropy", "rate_cross_entropy"])
def test_given_tokens_are_never_noise_and_do_not_count(calls, name):
    """The loss is the mean of the unmarked network's terms with those of given tokens at 0."""
    config, rows = make_config(), 64
    config.pretrain.loss, config.model.given = name, "marked"
    params, x1 = table(), make_batch(rows=rows)["x1"]
    value, _ = make_stage("pretrain", config).loss(params, None, jax.random.key(1), {"x1": x1})
    (call,) = calls
    xt, t, frozen = (np.asarray(call[name]) for name in "xtf")
    assert frozen.any(axis=1).mean() > 0.2
    assert (~frozen).all(axis=1).mean() > 0.3
    np.testing.assert_array_equal(xt[frozen], x1[frozen])
    assert (xt != x1)[~frozen].mean() > 0.2
    log_p = literal_log_p(literal_logits(params, xt, t))
    g = 1 / (1 - t.astype(np.float64))
    terms = -np.take_along_axis(log_p, x1[..., None], -1)[..., 0]
    if name == "rate_cross_entropy":
        terms = terms * g[:, None]
    if name == "path":
        terms = literal_path_loss(log_p, xt, x1, g)
    np.testing.assert_allclose(value, np.where(frozen, 0, terms).mean(), rtol=1e-5)


# --------------------------------------------------------------------------------------- few_step


def recorded(calls, loss, student, average, key, batch):
    """loss under jit, with the calls for each set of weights: "key" tells whether there was one."""

    def run(student, average, key, batch):
        calls.clear()
        value, metrics = loss(student, stages.Frozen(average), key, batch)
        of = lambda params: [
            {name: call[name] for name in "xthf" if call[name] is not None}
            for call in calls
            if call["params"] is params
        ]
        return value, metrics, of(student), of(average)

    result = jax.jit(run)(student, average, key, batch)
    # the student is asked first
    for call, traced in zip(result[2] + result[3], calls, strict=True):
        call["key"] = traced["key"] is not None
    return result


def few_step_calls(calls, name, batch, **values):
    config = make_config()
    config[name].update(values)
    loss = make_stage(name, config).loss
    return recorded(calls, loss, table(1), table(2), jax.random.key(5), batch)


@pytest.mark.parametrize(("rule", "nodes"), [("heun", (0, 1 / 2)), ("rk4", (0, 1 / 2, 1 / 2, 1))])
def test_rows_below_tau_never_pay_for_a_teacher(calls, rule, nodes):
    batch = make_batch(rows=10)
    _, _, student, average = few_step_calls(calls, "distill", batch, teacher_rule=rule)
    # Widths 1 .. 1/16, tau = 1/4: two of five widths are below, 4 of 10 rows.
    (call,) = student
    assert call["x"].shape == (10, L)
    assert call["key"]  # the student drops out, the teacher doesn't
    t, h = np.asarray(call["t"]), np.asarray(call["h"])
    assert (h[:4] < 0.25).all()
    assert (h[4:] >= 0.25).all()
    assert len(average) == len(nodes)
    for teacher_call, node in zip(average, nodes, strict=True):
        assert teacher_call["x"].shape == (6, L)
        assert not teacher_call["key"]
        np.testing.assert_allclose(teacher_call["h"], h[4:] / 2)
        np.testing.assert_allclose(teacher_call["t"], t[4:] + node * h[4:])
    np.testing.assert_array_equal(average[0]["x"], call["x"][4:])


def test_without_a_teacher_part_there_is_no_teacher_call(calls):
    for name, values in [("step_aware", {}), ("distill", {"tau": 2.0})]:
        _, metrics, student, average = few_step_calls(calls, name, make_batch(), **values)
        assert ([c["x"].shape for c in student], average) == ([(B, L)], [])
        assert set(metrics) == {"loss", "path_loss"}
        assert metrics["loss"] == metrics["path_loss"]


def test_a_stage_without_any_width_on_data_is_refused():
    config = make_config()
    config.distill.tau = 2.0**-4  # the finest width, not below itself
    with pytest.raises(ValueError, match=r"distill\.tau=.* leaves no step width"):
        make_stage("distill", config)


def test_rows_of_path():
    budgets = few_step.make_budgets(max_log2_steps=10, weights="log_uniform", time_eps=0.0)
    rows = lambda batch, tau: few_step.rows_of_path(batch, *budgets.split(tau))
    assert rows(96, 2.0**-9) == 9  # 96/11 = 8.7
    assert rows(110, 2.0**-9) == 10
    assert rows(4, 2.0**-9) == 1  # 4/11, but no part goes without a row
    assert rows(4, 0.9) == 3  # 40/11 = 3.6, likewise
    assert rows(96, 1.0) == 87
    assert [rows(7, tau) for tau in (1.5, 1e-9, 2.0**-10)] == [7, 0, 0]
    assert rows(1, 2.0) == 1
    with pytest.raises(ValueError, match=r"batch of 1 row\(s\) is too small for 2 parts"):
        rows(1, 2.0**-9)


def test_few_step_text_is_noised_along_the_path(calls):
    """At time t a position shows its data with probability t, or by chance 1/V."""
    x1 = np.full((64, 32), 3, np.int32)
    _, _, (call,), _ = few_step_calls(calls, "step_aware", {"x1": x1})
    x, t = np.asarray(call["x"]), np.asarray(call["t"], np.float64)
    p = t + (1 - t) / V
    # within 5 standard errors
    assert abs(((x == 3).mean(1) - p).mean()) <= 5 * np.sqrt((p * (1 - p)).mean() / x.size)
    noise = np.bincount(x[x != 3], minlength=V)
    assert_frequencies(noise, (np.arange(V) != 3) / (V - 1))


def test_rows_on_data_can_learn_by_cross_entropy(calls):
    batch = make_batch(rows=22)
    _, metrics, (student, *_), _ = few_step_calls(calls, "distill", batch, loss="cross_entropy")
    below, above = few_step.split_budgets(make_config().distill, "distill")
    rows = few_step.rows_of_path(22, below, above)
    x, t, h = (np.asarray(student[name])[:rows] for name in "xth")
    log_p = literal_log_p(literal_logits(table(1), x, t, h))
    want = -np.take_along_axis(log_p, batch["x1"][:rows, :, None], -1)
    np.testing.assert_allclose(metrics["path_loss"], want.mean(), rtol=1e-5)


@pytest.mark.parametrize("rate", ["cumulative", "instantaneous"])
@pytest.mark.parametrize("floor", [1e-3, 0.2])
def test_the_weight_of_the_path_loss(calls, rate, floor):
    batch = make_batch(rows=32)
    values = {"rate": rate, "rate_floor": floor}
    _, metrics, (call,), _ = few_step_calls(calls, "step_aware", batch, **values)
    x, t, h = (np.asarray(call[name]) for name in "xth")
    left = lambda time: np.maximum(1 - time.astype(np.float64), floor)
    weight = 1 / left(t)
    if rate == "cumulative":  # the mean of the floored rate over the step, by the midpoint rule
        middles = (np.arange(20_000) + 0.5) / 20_000
        weight = np.mean(1 / left(t[:, None] + h[:, None] * middles), axis=1)
    assert (t + h == 1).any()  # a step that reaches t=1 needs the floor
    log_p = literal_log_p(literal_logits(table(1), x, t, h))
    want = literal_path_loss(log_p, x, batch["x1"], weight)
    np.testing.assert_allclose(metrics["path_loss"], want.mean(), rtol=1e-5)


def test_given_tokens_stay_with_the_teacher_and_do_not_count(calls):
    config, batch = make_config(), make_batch(rows=40)
    config.model.given = "marked"
    loss = make_stage("distill", config).loss
    run = recorded(calls, loss, table(1), table(2), jax.random.key(5), batch)
    _, metrics, (student,), teacher = jax.tree.map(np.asarray, run)
    frozen, taught = student["f"], slice(16, None)  # 2 of 5 widths are below tau
    np.testing.assert_array_equal(student["x"][frozen], batch["x1"][frozen])
    free = ~frozen[taught]
    assert len(teacher) == 2
    for call in teacher:
        np.testing.assert_array_equal(call["f"], frozen[taught])
        np.testing.assert_array_equal(call["x"][~free], batch["x1"][taught][~free])
    assert (teacher[0]["x"] != teacher[1]["x"])[free].any()
    log_p = literal_log_p(literal_logits(table(1), *(student[name][taught] for name in "xth")))
    asked = [literal_logits(table(2), *(call[name] for name in "xth")) for call in teacher]
    target = literal_log_p(np.mean(asked, 0))
    kl = (np.exp(target) * (target - log_p)).sum(-1)
    np.testing.assert_allclose(metrics["distillation_loss"], (kl * free).mean(), rtol=1e-5)


@pytest.mark.parametrize(("name", "temperature"), [("forward_kl", 2.0), ("jsd", 1.0)])
def test_the_distillation_part_equals_its_equation(calls, name, temperature):
    batch = make_batch(rows=10)
    values = {"divergence": name, "temperature": temperature}
    _, metrics, (call,), average = few_step_calls(calls, "distill", batch, **values)
    rows = slice(4, None)
    x, t, h = (np.asarray(call[name])[rows] for name in "xth")
    student = literal_log_p(literal_logits(table(1), x, t, h) / temperature)
    asked = [literal_logits(table(2), *(np.asarray(c[name]) for name in "xth")) for c in average]
    target = literal_log_p(np.mean(asked, 0) / temperature)
    kl = lambda p, q: (np.exp(p) * (p - q)).sum(-1)
    middle = np.log((np.exp(target) + np.exp(student)) / 2)
    want = {
        "forward_kl": kl(target, student),
        "jsd": (kl(target, middle) + kl(student, middle)) / 2,
    }[name]
    np.testing.assert_allclose(
        metrics["distillation_loss"], temperature**2 * want.mean(), rtol=1e-5
    )


# ---------------------------------------------------------------------------------------- guidance
def guided_calls(calls, name, batch, **values):
    """As `few_step_calls`, with the calls of (strong, weak, average) in place of the last."""
    config = make_config()
    config[name].update({"guidance": 1.5, "guide": "short"} | values)
    loss = make_stage(name, config).loss
    needed = {"init_from": table(3), "guide": table(4)}

    def run(student, average, needed, key, batch):
        calls.clear()
        value, metrics = loss(student, stages.Frozen(average, needed), key, batch)
        of = lambda params: [
            {name: call[name] for name in "xth" if call[name] is not None}
            for call in calls
            if call["params"] is params
        ]
        others = (needed["init_from"], needed["guide"], average)
        return value, metrics, of(student), [of(params) for params in others]

    return jax.jit(run)(table(1), table(2), needed, jax.random.key(5), batch)


def test_fine_steps_follow_the_guided_base_model(calls):
    batch = make_batch(rows=12)
    _, metrics, (student,), (strong, weak, average) = guided_calls(calls, "distill", batch)
    below, above = few_step.split_budgets(make_config().distill, "distill")
    rows = few_step.rows_of_path(12, below, above)
    assert set(metrics) == {"loss", "guidance_loss", "distillation_loss"}
    x, t, h = (np.asarray(student[name])[:rows] for name in "xth")
    (strong,), (weak,) = strong, weak
    for asked in (strong, weak):  # of the same states, as a base model is: without a width
        np.testing.assert_array_equal(asked["x"], x)
        np.testing.assert_array_equal(asked["t"], t)
        assert "h" not in asked
    assert len(average) == 2  # Heun's, for the other rows
    near, far = literal_logits(table(3), x, t), literal_logits(table(4), x, t)
    target = literal_log_p(near + 1.5 * (near - far))
    own = literal_log_p(literal_logits(table(1), x, t, h))
    want = (np.exp(target) * (target - own)).sum(-1).mean()
    np.testing.assert_allclose(metrics["guidance_loss"], want, rtol=1e-5)


def test_a_student_that_is_the_guided_model_has_nothing_to_learn(calls):
    config = make_config()
    # All widths are below tau: nothing is taught, as in `step_aware`.
    config.distill.update({"guidance": 0.5, "guide": "short", "tau": 2.0})
    stage = make_stage("distill", config)
    assert stage.needs == {"init_from": stages.BASE, "guide": "short"}
    strong, weak = table(3), table(4)
    student = jax.tree.map(lambda s, w: s + 0.5 * (s - w), strong, weak)
    student["bend"] = jnp.zeros(V)  # the base model doesn't know widths

    def value(student):
        frozen = stages.Frozen(student, {"init_from": strong, "guide": weak})
        return stage.loss(student, frozen, jax.random.key(0), make_batch())[0]

    found, gradient = jax.value_and_grad(value)(student)
    assert abs(found) < 1e-6
    assert all(np.abs(leaf).max() < 1e-6 for leaf in jax.tree.leaves(gradient))


def test_the_blend_is_unbiased(calls):
    """Against eq. 4.5 row by row: h from all budgets, then data below tau and the teacher above.

    Official weights and 5 rows, so that no count of rows is proportional to its probability (3 rows
    of path loss stand for 8/15 of the mean).
    """
    size, rows, length, finest, tau = 4, 5, 3, 3, 0.25
    config = make_config()
    config.distill.update(
        {"max_log2_steps": finest, "tau": tau, "width_weights": "official", "rate_floor": 0.01}
    )
    process = make_process(config, size)
    stage = stages.make_stage("distill", config, process)
    student, average = table(1, size), table(2, size)
    key, rows_key = jax.random.split(jax.random.key(0))

    def one_batch(key):
        key, text_key = jax.random.split(key)
        x1 = jax.random.randint(text_key, (rows, length), 0, 2)  # text is not uniform
        return stage.loss(student, stages.Frozen(average), key, {"x1": x1})[0]

    got = np.asarray(jax.jit(jax.vmap(one_batch))(jax.random.split(key, 8000)), np.float64)

    def row_by_row(key, count=60_000):
        keys = jax.random.split(key, 6)
        x1 = jax.random.randint(keys[0], (count, length), 0, 2)
        x0 = jax.random.randint(keys[1], (count, length), 0, size)
        weights = jnp.asarray([1, 2, 4, 8]) / 15  # of h = 1, 1/2, 1/4, 1/8
        h = 2.0 ** -jax.random.choice(keys[2], 4, (count,), p=weights)
        cells = 2**finest
        t = jnp.floor(jax.random.uniform(keys[3], (count,)) * ((1 - h) * cells + 1)) / cells
        shows = jax.random.uniform(keys[4], x1.shape) < t[:, None]
        xt = jnp.where(shows, x1, x0)
        network = lambda params: lambda x, t, h: dense(Calls()(params, None, x, t, h))
        logits = network(student)(xt, t, h)
        log_p = jax.nn.log_softmax(logits)
        at = lambda x: jnp.take_along_axis(log_p, x[..., None], -1)[..., 0]
        # t <= 7/8, so that only the end of a step falls below the floor.
        left = 1 - t - h
        gbar = jnp.log((1 - t) / jnp.maximum(left, 0.01)) + 1 - jnp.minimum(left, 0.01) / 0.01
        gbar = gbar / h
        bracket = jnp.exp(at(xt)) - (xt == x1) + (xt != x1) * at(x1)
        path = -gbar[:, None] * bracket
        jump = jumps.make_jump(jumps.with_posterior_end(jumps.MIXTURE), process.schedule)
        target = teacher.teacher_logits(keys[5], teacher.HEUN, network(average), jump, xt, t, h)
        target = jax.nn.log_softmax(target)
        distillation = jnp.sum(jnp.exp(target) * (target - log_p), -1)
        return jnp.where((h < tau)[:, None], path, distillation).mean(1)

    want = np.asarray(jax.jit(row_by_row)(rows_key), np.float64)
    error = np.sqrt(got.var(ddof=1) / len(got) + want.var(ddof=1) / len(want))
    assert error < 0.02 * want.mean()  # sharp enough to see 3/5 in place of 8/15
    assert abs(got.mean() - want.mean()) <= 5 * error
    # Strata vary less than rows drawn one by one.
    assert got.var() < want.var() / rows


# --------------------------------------------------------------------------------- autoregressive


def test_shift_right_puts_the_end_of_text_first():
    x1 = jnp.asarray([[3, 4, 5], [6, 7, 8]])
    np.testing.assert_array_equal(autoregressive.shift_right(x1, 2), [[2, 3, 4], [2, 6, 7]])


def test_token_losses_equal_a_cross_entropy_by_hand(calls):
    params, x1 = table(), make_batch()["x1"]
    got = autoregressive.token_losses(params, None, 2, jnp.asarray(x1))
    want = np.zeros(x1.shape)
    log_p = literal_log_p(np.asarray(params["table"], np.float64))
    for b, i in np.ndindex(*x1.shape):
        want[b, i] = -log_p[x1[b, i - 1] if i else 2, x1[b, i]]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    value, _ = make_stage("autoregressive").loss(params, None, jax.random.key(0), {"x1": x1})
    np.testing.assert_allclose(value, want.mean(), rtol=1e-5)
    assert [call["key"] is None for call in calls] == [True, False]  # dropout only in training


def test_a_token_is_predicted_without_seeing_itself():
    stage = make_stage("autoregressive")
    params = noised(jax.jit(stage.init_params)(jax.random.key(0), None))
    x1 = make_batch()["x1"]
    changed = x1.copy()
    changed[:, 3] = (changed[:, 3] + 1) % V
    run = jax.jit(lambda x: model_lib.apply(params, stage.model, autoregressive.shift_right(x, 2)))
    same = np.isclose(run(x1), run(changed)).all((0, 2))
    np.testing.assert_array_equal(same, [True] * 4 + [False] * 2)


def test_divergences_are_those_of_the_losses_module():
    config = make_config()
    below, above = few_step.read_budgets(config.distill).split(0.25)
    for name, divergence in losses.DIVERGENCES.items():
        config.distill.divergence = name
        term = few_step.read_teacher_term(config.distill, above, make_process(config))
        assert (term.divergence, term.budgets, term.rule) == (divergence, above, teacher.HEUN)
    term = few_step.read_path_term(config.distill, below)
    assert term == (below, "path", "cumulative", 1e-3, 0.0)
