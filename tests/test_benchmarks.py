"""The speed benchmarks: that they count right, and that their reference computes the same thing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies

from benchmarks import autoregressive, literal, measure, sample, scaling, train, waterfall
from fsdfm_jax.flow import schedules
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from launch import model_flops

MODEL = ModelConfig(vocab_size=11, width=8, num_blocks=3, num_heads=2, cond_width=4)
SMALL = {"width": 8, "num_blocks": 2, "num_heads": 2, "cond_width": 4, "remat": "dots"}


def test_operations_of_a_forward_pass_are_those_of_its_program():
    # One block, so that the loop over blocks hides nothing from the compiler's own count. Attention
    # in one piece has no loop either; the rest of the program (norms, softmax) is not counted.
    model = ModelConfig(256, 64, 1, 2, 4, attention="manual")
    batch, length = 2, 128
    params = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), model))
    arguments = (params, jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch,)))
    run = jax.jit(lambda p, x, t: model_lib.apply(p, model, x, t))
    counted = run.lower(*arguments).compile().cost_analysis()["flops"]
    ours = model_flops.forward_flops(model, batch, length)
    assert ours == model_flops.trunk_flops(model, batch, length) + model_flops.head_flops(
        model, batch, length
    )
    assert ours <= counted <= 1.1 * ours


def test_a_step_counts_student_and_teacher():
    once = model_flops.forward_flops(MODEL, 1, 16)
    assert train.step_flops(MODEL, "pretrain", 4, 16) == pytest.approx(12 * once)
    assert train.step_flops(MODEL, "distill", 4, 16) == pytest.approx((12 + 8) * once)


def test_cases_are_timed_in_turn_and_compared_within_a_round():
    calls = []
    cases = {name: functools.partial(calls.append, name) for name in "ab"}
    seconds = measure.in_turn(cases, rounds=2)
    assert calls == list("ababab")  # the first round is not counted
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    drifting = {"a": [1.0, 10.0, 100.0], "b": [2.0, 20.0, 200.0]}
    assert measure.ratio(drifting, "b", "a") == 2.0


def test_growth_is_measured_against_half_the_value():
    rows = [
        {"axis": "batch", "what": "train", "value": value, "seconds": seconds}
        for value, seconds in ((2, 1.0), (4, 3.0), (8, 6.0))
    ]
    assert [row["growth"] for row in scaling.with_growth(rows)] == [None, 3.0, 2.0]


def test_a_waterfall_adds_up():
    parts = {
        "teacher: trunk": (None, 4, 8.0),
        "student: trunk forward": (None, 1, 10.0),
        "student: trunk, both ways": (None, 1, 30.0),
    }
    seconds = {
        "teacher: trunk": [1.0],
        "student: trunk forward": [2.0],
        "student: trunk, both ways": [7.0],
        "optimiser and average": [3.0],
        waterfall.STEP: [17.0],
    }
    rows = waterfall.table_of(seconds, parts, ceiling=10.0, optimiser_floor=1.0)
    spent = {row["part"]: row["seconds"] for row in rows}
    assert spent.pop(waterfall.STEP) == pytest.approx(sum(spent.values()))
    assert spent["student: trunk backward"] == 5.0
    assert spent["not explained"] == pytest.approx(17.0 - (4 + 2 + 5 + 3))
    assert rows[0]["floor_s"] == pytest.approx(4 * 8.0 / 10.0)


def test_the_literal_jump_is_the_rule():
    schedule = schedules.make_schedule("polynomial", power=1.0)
    logits_V = np.array([0.5, -1.0, 2.0, 0.0, -0.5])
    rows, length, current, t, h = 64, 500, 2, 0.3, 0.25
    jump = jax.jit(literal.make_jump(schedule))
    tokens = jump(
        jax.random.key(0),
        jnp.broadcast_to(jnp.float32(logits_V)[None, None], (rows, length, 5)),
        jnp.full((rows, length), current),
        jnp.full((rows,), t),
        jnp.full((rows,), h),
    )
    p = np.exp(logits_V) / np.exp(logits_V).sum()
    moves = 1 - np.exp(-(1 - p[current]) * np.log((1 - t) / (1 - t - h)))
    want = moves * np.where(np.arange(5) == current, 0.0, p) / (1 - p[current])
    want[current] = 1 - moves
    assert_frequencies(np.bincount(np.ravel(tokens), minlength=5), want)


def small_case(name):
    shape = {"stage": "distill", "size": "tiny", "length": 12, "dtype": "float32"}
    return train.make_case(name, **shape, overrides=SMALL | {"dropout": 0.0})


def test_all_forms_of_the_loss_are_one_loss():
    # Heads without weights: what student and teacher say depends on no draw, and the forms share
    # the keys of times, so that all of them have the same value.
    names = [name for name, (how, _) in train.CASES.items() if how is not None]
    assert len(names) == 3
    cases = {name: small_case(name) for name in names}
    params = model_lib.init_params(jax.random.key(0), cases["literal"][2])
    size = len(params["head"]["bias"])
    noise = jax.random.normal(jax.random.key(1), (2, size))
    student, teacher = (params | {"head": params["head"] | {"bias": bias}} for bias in noise)
    x1_BL = jax.random.randint(jax.random.key(2), (4, 12), 0, size)
    values = [
        step.keywords["loss"](student, teacher, jax.random.key(3), {"x1": x1_BL})[0]
        for step, _, _ in cases.values()
    ]
    np.testing.assert_allclose(values, values[0], rtol=1e-5)
    # Half of it is the teacher's part, which these two biases alone determine.
    p, q = (jax.nn.log_softmax(bias) for bias in (noise[1], noise[0]))
    taught = jnp.sum(jnp.exp(p) * (p - q))
    same = [
        step.keywords["loss"](student, student, jax.random.key(3), {"x1": x1_BL})[0]
        for step, _, _ in cases.values()
    ]
    np.testing.assert_allclose(np.subtract(values, same), taught / 2, rtol=1e-4)


def test_every_case_switches_something():
    plain = small_case("ours")[2]
    for name, (how, changes) in train.CASES.items():
        changed = small_case(name)[2]
        assert (name == "ours") == (how is None and changed == plain), name
        assert all(getattr(changed, key) == value for key, value in changes.items()), name


def test_sampler_cases_draw_the_same_tokens():
    library, model = sample.make_case("ours", size="tiny", length=8, dtype="float32")
    name = "times embedded in each step"
    run, _ = sample.make_case(name, size="tiny", length=8, dtype="float32")
    params = model_lib.init_params(jax.random.key(0), model)
    params["head"]["kernel"] = jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)
    x0_BL = jnp.zeros((2, 8), jnp.int32)
    grid_S1 = jnp.array([0.0, 0.4, 1.0])
    np.testing.assert_array_equal(
        run(params, jax.random.key(2), x0_BL, grid_S1),
        library(params, jax.random.key(2), x0_BL, grid_S1),
    )


def test_left_to_right_draws_the_same_with_and_without_cache():
    config = measure.make_config("tiny", dtype="float32", overrides=SMALL)
    names = [autoregressive.FEW_STEP, *autoregressive.CAUSAL]
    cases = autoregressive.make_cases(config, 11, batch=3, length=6, steps=[1, 2], names=names)
    assert list(cases) == [
        ("few-step", 1),
        ("few-step", 2),
        ("autoregressive", 6),
        ("autoregressive, no cache", 6),
    ]
    tokens = {}
    for name, (run, model) in cases.items():
        assert model.causal == (name[0] != "few-step")
        params = measure.filled(model_lib.init_params(jax.random.key(1), model))
        tokens[name] = run(params, jax.random.key(0))
        assert tokens[name].shape == (3, 6)
    np.testing.assert_array_equal(*list(tokens.values())[2:])
    assert (tokens["few-step", 1] != tokens["few-step", 2]).any()
