"""Stage `refine`: where steps begin and end, both losses against their equations, what is refused.

Numbers are checked with a network of one table in place of `model.predict`, whose every call is
recorded; what the losses must be follows from the record by the equations of `flow.matching`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies
from test_stages import (
    Calls,
    L,
    V,
    base_params,
    flat,
    literal_log_p,
    literal_logits,
    make_batch,
    make_config,
    make_process,
    make_stage,
    noised,
    table,
)

from fsdfm_jax import stages
from fsdfm_jax.flow import jumps, matching
from fsdfm_jax.flow.grids import make_grid
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.ops.logits import dense
from fsdfm_jax.stages import refine

PROCESS = make_process(make_config())


# ------------------------------------------------------------------------------------------- starts


def nothing(chains):
    return jnp.zeros((chains, L), jnp.int32)


def by_budget(starts, samples, max_log2_steps):
    """Rows as (number of steps) -> (z [samples, 2^K, L], t, h [samples, 2^K])."""
    count = 2**max_log2_steps
    chains = [np.asarray(x).reshape(count, max_log2_steps + 1, samples, -1) for x in starts[:3]]
    return {2**k: [np.swapaxes(x[:, k], 0, 1) for x in chains] for k in range(max_log2_steps + 1)}


@pytest.mark.parametrize("grid", ["uniform", "geometric:0.05"])
@pytest.mark.parametrize("max_log2_steps", [0, 1, 3])
def test_every_budget_has_as_many_rows_and_its_own_grid(max_log2_steps, grid):
    """2^K rows of each sample: all steps of S, as often as they take to fill 2^K."""
    samples, count = 3, 2**max_log2_steps
    chains = samples * (max_log2_steps + 1)
    asked = []

    def denoise(z_CL, t_C, h_C):
        asked.append((z_CL.shape, t_C.shape, h_C.shape))
        return z_CL

    starts = refine.walk(
        jax.random.key(0),
        denoise,
        lambda key, logits, z_CL, t_C, h_C: z_CL,
        PROCESS,
        max_log2_steps=max_log2_steps,
        grid=grid,
        samples=samples,
        given_CL=nothing(chains),
    )
    assert asked == [((chains, L), (chains,), (chains,))]  # a step of all of them is one call
    assert starts.z_BL.shape == (chains * count, L)
    assert starts.z_BL.dtype == jnp.int32
    assert starts.t_B.dtype == starts.h_B.dtype == jnp.float32
    for steps, (_, t, h) in by_budget(starts, samples, max_log2_steps).items():
        times = make_grid(grid, steps)
        for found, expected in ((t, times[:-1]), (h, np.diff(times))):
            expected = np.tile(expected, (samples, count // steps))
            np.testing.assert_array_equal(found[..., 0], expected)


def test_states_follow_the_jump_and_start_again_from_noise():
    """A jump that says what it was given: (logits + 2t/h + 1) modulo V, of logits = 3z + 1/h."""
    samples, K = 200, 3
    starts = refine.walk(
        jax.random.key(1),
        lambda z_CL, t_C, h_C: 3 * z_CL + (1 / h_C).astype(int)[:, None],
        lambda key, logits, z_CL, t_C, h_C: (logits + (2 * t_C / h_C).astype(int)[:, None] + 1) % V,
        PROCESS,
        max_log2_steps=K,
        grid="uniform",
        samples=samples,
        given_CL=nothing(samples * (K + 1)),
    )
    noise = []
    for steps, (z, _, _) in by_budget(starts, samples, K).items():
        for n in range(2**K):
            if n % steps:
                step = (n - 1) % steps
                np.testing.assert_array_equal(z[:, n], (3 * z[:, n - 1] + steps + 2 * step + 1) % V)
            else:
                noise.append(z[:, n])
    assert_frequencies(np.bincount(np.ravel(noise), minlength=V), np.full(V, 1 / V))
    # 8 + 4 + 2 + 1 starts of each sample, all drawn anew.
    drawn = np.concatenate(noise)
    assert drawn.shape == (15 * samples, L)
    both = drawn[:-samples] * V + drawn[samples:]  # from one start to the next
    assert_frequencies(np.bincount(both.ravel(), minlength=V * V), np.full(V * V, 1 / V**2))


def test_given_tokens_stay_in_all_states():
    samples, K = 200, 2
    chains = samples * (K + 1)
    rng = np.random.default_rng(0)
    given, frozen = rng.integers(0, V, (chains, L)), rng.random((chains, L)) < 0.4
    starts = refine.walk(
        jax.random.key(1),
        lambda z_CL, t_C, h_C: z_CL,
        lambda key, logits, z_CL, t_C, h_C: (z_CL + 1) % V,
        PROCESS,
        max_log2_steps=K,
        grid="uniform",
        samples=samples,
        given_CL=jnp.asarray(given),
        frozen_CL=jnp.asarray(frozen),
    )
    z = np.asarray(starts.z_BL).reshape(4, chains, L)
    np.testing.assert_array_equal(starts.frozen_BL, np.tile(frozen, (4, 1)))
    np.testing.assert_array_equal(z[:, frozen], np.tile(given[frozen], (4, 1)))
    assert_frequencies(np.bincount(z[0, ~frozen], minlength=V), np.full(V, 1 / V))
    of_four, free = z[:, 2 * samples :], ~frozen[2 * samples :]
    np.testing.assert_array_equal(of_four[1:, free], (of_four[:-1, free] + 1) % V)


def test_states_have_the_law_of_the_rule():
    """At step j of S a share j/S of the positions has been drawn from the student's answer."""
    samples, K = 4000, 2
    p = np.arange(1, V + 1) / np.arange(1, V + 1).sum()
    logits_V = jnp.log(jnp.asarray(p, jnp.float32))
    denoise = lambda z_CL, t_C, h_C: jnp.broadcast_to(logits_V, (*z_CL.shape, V))
    walk = functools.partial(
        refine.walk,
        denoise=denoise,
        jump=PROCESS.make_jump(jumps.MIXTURE),
        process=PROCESS,
        max_log2_steps=K,
        grid="uniform",
        samples=samples,
        given_CL=nothing(samples * (K + 1))[:, :2],
    )
    starts = jax.jit(walk)(jax.random.key(2))
    for steps, (z, t, _) in by_budget(starts, samples, K).items():
        for n in range(2**K):
            share = float(t[0, n, 0])
            assert share == (n % steps) / steps
            both = np.bincount(z[:, n] @ [V, 1], minlength=V * V)
            one = share * p + (1 - share) / V
            assert_frequencies(both, np.outer(one, one))


def test_a_step_is_named_to_the_auxiliary_network():
    """Widths that all differ, also as float32, each within its octave."""
    h = np.concatenate([np.full(2**k, 2.0**-k) for k in range(11)]).astype(np.float32)
    t = np.concatenate([np.arange(2**k) / 2**k for k in range(11)]).astype(np.float32)
    width = np.asarray(refine.auxiliary_width(t, h))
    assert len(np.unique(width)) == len(h) == 2**11 - 1
    assert np.all((h / 2 < width) & (width <= h))
    assert width[0] == 1.0


@pytest.mark.parametrize(("rows", "K", "samples"), [(32, 3, 1), (96, 3, 3), (1, 0, 1), (12, 2, 1)])
def test_samples_fill_a_batch(rows, K, samples):
    assert refine.count_samples(rows, K) == samples


@pytest.mark.parametrize(("rows", "K"), [(33, 3), (16, 3), (0, 0), (4, 2)])
def test_a_batch_that_samples_do_not_fill_is_refused(rows, K):
    message = f"batch of {rows} rows must be a multiple of {(K + 1) * 2**K}: .* {2**K} steps"
    with pytest.raises(ValueError, match=message):
        refine.count_samples(rows, K)


# ------------------------------------------------------------------------------------------- losses


@pytest.fixture
def calls(monkeypatch):
    """The calls of a network of one table; steps begin where `any_starts` says."""
    recorded = Calls()
    monkeypatch.setattr(model_lib, "predict", recorded)
    monkeypatch.setattr(refine, "walk", any_starts)
    return recorded


def any_starts(key, denoise, jump, process, *, max_log2_steps, grid, samples, given_CL, frozen_CL):
    """In place of `walk`: any states on the grids of all budgets; the network is asked once."""
    del jump
    assert grid == "uniform"
    assert process.source.vocab_size == V
    keys = jax.random.split(key)
    rows = samples * (max_log2_steps + 1) * 2**max_log2_steps
    steps_B = 2 ** (jnp.arange(rows) % (max_log2_steps + 1))
    t_B = jnp.floor(jax.random.uniform(keys[0], (rows,)) * steps_B) / steps_B
    z_BL, frozen_BL = jax.random.randint(keys[1], (rows, L), 0, V), None
    if frozen_CL is not None:
        frozen_BL, given_BL = (jnp.tile(x, (2**max_log2_steps, 1)) for x in (frozen_CL, given_CL))
        z_BL = jnp.where(frozen_BL, given_BL, z_BL)
        denoise.keywords["frozen_BL"] = frozen_BL  # here rows are asked, not samples
    denoise(z_BL, t_B, 1.0 / steps_B)
    return refine.Starts(z_BL, t_B, 1.0 / steps_B, frozen_BL)


def setting(max_log2_steps, power=1.0, given="unmarked", **values):
    config = make_config()
    config.path.power, config.model.given = power, given
    config.refine.update({"max_log2_steps": max_log2_steps, "batch_size": 96} | values)
    return make_stage("refine", config)


def frozen_of(partner, teacher):
    return stages.Frozen(table(9), {"teacher": teacher}, partner)


def asked(calls, loss, params, frozen, rows):
    """(value, gradients to params and frozen, calls with "who" was asked)."""
    who = []

    def run(params, frozen):
        calls.clear()
        value, metrics = loss(params, frozen, jax.random.key(5), make_batch(rows=rows))
        networks = {"own": params, "partner": frozen.partner, "teacher": frozen.needed["teacher"]}
        for call in calls:
            who.extend(name for name, each in networks.items() if each is call["params"])
        assert [call["key"] for call in calls] == [None] * len(calls)  # nothing is dropped
        numbers = [{name: c[name] for name in "xthf" if c[name] is not None} for c in calls]
        return value, (metrics, jax.lax.stop_gradient(numbers))

    run = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (value, (metrics, numbers)), gradients = run(params, frozen)
    assert metrics == {"loss": value}
    made = [{name: np.asarray(x) for name, x in call.items()} for call in numbers]
    return value, gradients, [call | {"who": name} for call, name in zip(made, who, strict=True)]


def logits_of(params, call):
    return literal_logits(params, *(call.get(name) for name in "xth"))


def leave_one_out(logits, z, kept):
    """log L [B, L, V] by its definition, float64."""
    shown = kept[:, None, None] * np.eye(V)[z] + (1 - kept[:, None, None]) / V
    return literal_log_p(literal_log_p(logits) - np.log(shown))


def conditional(log_L, kept):
    return kept[:, None, None] * np.exp(log_L) + (1 - kept[:, None, None]) / V


def free_of(made, given):
    """bool [B, L]: which tokens count; those that don't are the same in all calls."""
    last = made[-1]
    assert ("f" in last) == (given == "marked")
    frozen = last.get("f", np.zeros(last["x"].shape, bool))
    assert frozen.any() == (given == "marked")
    for call in made:
        np.testing.assert_array_equal(call.get("f", frozen), frozen)
        np.testing.assert_array_equal(call["x"][frozen], last["x"][frozen])
    return ~frozen


LOSSES = [(0, 1.0, "unmarked"), (1, 2.0, "unmarked"), (2, 1.0, "unmarked"), (1, 1.0, "marked")]


@pytest.mark.parametrize(("K", "power", "given"), LOSSES)
def test_the_students_loss_and_gradient_equal_their_equation(calls, K, power, given):
    stage, rows = setting(K, power, given, noise=(0.3, 0.8)), (K + 1) * 2**K * 8
    student, partner, teacher = table(1), table(2), table(3)
    value, (got, others), made = asked(
        calls, stage.loss, student, frozen_of(partner, teacher), rows
    )
    assert [call["who"] for call in made] == ["own", "own", "partner", "teacher"]
    walked, answers, own, base = made
    assert answers["x"].shape == (rows, L)
    for name in "xth":  # steps begin where the walk was
        np.testing.assert_array_equal(answers[name], walked[name])
    t, h = answers["t"].astype(np.float64), answers["h"]
    # Both others are asked at the noised end of the step; the base model knows no widths.
    for name in "xt":
        np.testing.assert_array_equal(own[name], base[name])
    np.testing.assert_allclose(own["h"], refine.auxiliary_width(t, h), rtol=1e-6)
    assert "h" not in base
    kept = own["t"].astype(np.float64) ** power
    again = kept / (t + h) ** power
    assert np.all((again >= 0.3 - 1e-6) & (again < 0.8 + 1e-6))
    assert len(np.unique(again.round(6))) == rows

    log_q = [
        np.log(conditional(leave_one_out(logits_of(params, call), own["x"], kept), kept))
        for params, call in ((partner, own), (teacher, base))
    ]
    gap = log_q[0] - log_q[1]
    gap = (gap - gap.mean(-1, keepdims=True)) * free_of(made, given)[..., None]
    log_G = literal_log_p(logits_of(student, answers))
    np.testing.assert_allclose(value, (np.exp(log_G) * gap).sum(-1).mean(), rtol=1e-4, atol=1e-6)

    # Nothing but the student's answers to where it was is differentiated.
    def literal(params):
        logits = dense(Calls()(params, None, *(jnp.asarray(answers[name]) for name in "xth")))
        return jnp.mean(jnp.sum(jax.nn.softmax(logits) * jnp.asarray(gap, jnp.float32), axis=-1))

    want = jax.jit(jax.grad(literal))(student)
    for name, leaf in flat(got).items():
        np.testing.assert_allclose(leaf, want[name], rtol=1e-3, atol=1e-6, err_msg=name)
    assert not any(leaf.any() for leaf in flat(others).values())


@pytest.mark.parametrize(("K", "power", "given"), LOSSES)
def test_the_auxiliary_loss_and_gradient_equal_their_equation(calls, K, power, given):
    stage, rows = setting(K, power, given, noise=(0.3, 0.8)), (K + 1) * 2**K * 8
    own, student = table(2), table(1)
    value, (got, others), made = asked(
        calls, stage.auxiliary.loss, own, frozen_of(student, table(3)), rows
    )
    assert [call["who"] for call in made] == ["partner", "partner", "own"]
    walked, answers, last = made
    for name in "xth":
        np.testing.assert_array_equal(answers[name], walked[name])
    t, h, z, z_s = answers["t"].astype(np.float64), answers["h"], answers["x"], last["x"]
    np.testing.assert_allclose(last["h"], refine.auxiliary_width(t, h), rtol=1e-6)
    kept, end = last["t"].astype(np.float64) ** power, (t + h) ** power
    again, share = kept / end, ((end - t**power) / (1 - t**power))[:, None, None]
    assert np.all((again >= 0.3 - 1e-6) & (again < 0.8 + 1e-6))

    seen = again[:, None, None] * np.eye(V)[z_s] + (1 - again[:, None, None]) / V
    answer = np.exp(literal_log_p(logits_of(student, answers)))
    target = ((1 - share) * np.eye(V)[z] + share * answer) * seen
    target /= target.sum(-1, keepdims=True)
    free = free_of(made, given)
    shown = kept[:, None, None] * np.eye(V)[z_s] + (1 - kept[:, None, None]) / V

    def literal(params):
        logits = dense(Calls()(params, None, *(jnp.asarray(last[name]) for name in "xth")))
        L_BLV = jax.nn.softmax(jax.nn.log_softmax(logits) - np.log(shown).astype("f4"))
        M_BLV = (end[:, None, None] * L_BLV + (1 - end[:, None, None]) / V) * seen
        M_BLV = M_BLV / jnp.sum(M_BLV, axis=-1, keepdims=True)
        gap_BLV = np.log(np.maximum(target, 1e-30)).astype("f4") - jnp.log(M_BLV)
        return jnp.mean(jnp.sum(target.astype("f4") * gap_BLV, axis=-1) * free)

    want, slope = jax.jit(jax.value_and_grad(literal))(own)
    np.testing.assert_allclose(value, want, rtol=1e-4)
    for name, leaf in flat(got).items():
        np.testing.assert_allclose(leaf, slope[name], rtol=1e-3, atol=1e-5, err_msg=name)
    assert not any(leaf.any() for leaf in flat(others).values())


def sure_of(token):
    zeros = jnp.zeros(V)
    return {"table": jnp.zeros((V, V)).at[:, token].set(100.0), "slope": zeros, "bend": zeros}


@pytest.mark.parametrize("which", ["student", "auxiliary"])
def test_the_noised_end_shows_the_outcome(calls, which):
    """A student sure of token 3: one step from noise writes it, further noise hides 1 - r of it."""
    stage, sure = setting(0, noise=(0.2, 0.9)), sure_of(3)
    if which == "student":
        loss, params, frozen = stage.loss, sure, frozen_of(table(2), table(3))
    else:
        loss, params, frozen = stage.auxiliary.loss, table(2), frozen_of(sure, table(3))
    _, _, made = asked(calls, loss, params, frozen, 400)
    last = made[2]
    shown, again = last["x"] == 3, last["t"].astype(np.float64)
    p = again + (1 - again) / V
    assert abs(shown.mean() - p.mean()) <= 5 * np.sqrt((p * (1 - p)).mean() / shown.size)
    # Row by row too: r is that of the row.
    slope = np.polyfit(p, shown.mean(1), 1)[0]
    assert slope == pytest.approx(1.0, abs=0.15)
    noise = np.bincount(last["x"][~shown], minlength=V)
    assert_frequencies(noise, (np.arange(V) != 3) / (V - 1))


def test_steps_are_taken_by_the_exact_kernel(monkeypatch):
    """From 3 under an answer that knows nothing: what jumps is b m of the positions (`mixture`)."""
    seen = []

    def watching(key, denoise, jump, process, **sizes):
        seen.append(jump)
        return any_starts(key, denoise, jump, process, **sizes)

    monkeypatch.setattr(model_lib, "predict", Calls())
    monkeypatch.setattr(refine, "walk", watching)
    args = (table(1), frozen_of(table(2), table(3)), jax.random.key(0), make_batch(rows=4))
    jax.eval_shape(setting(1).loss, *args)
    rows = 4000
    t_B, h_B = jnp.full((rows,), 0.5), jnp.full((rows,), 0.45)
    z_BL = jnp.full((rows, L), 3)
    after = jax.jit(seen[0])(jax.random.key(1), jnp.zeros((rows, L, V)), z_BL, t_B, h_B)
    want = np.full(V, 0.9 / V)
    want[3] += 0.1
    assert_frequencies(np.bincount(np.ravel(after), minlength=V), want)


def test_a_student_with_the_path_s_law_has_nothing_to_learn(calls):
    """One position, K = 0: where both networks say the same, and where both laws are uniform."""
    stage, teacher = setting(0), table(3)
    teacher["bend"] = jnp.zeros(V)
    run = lambda params, partner: stage.loss(
        params, frozen_of(partner, teacher), jax.random.key(0), make_batch(rows=8)
    )[0]
    value, gradient = jax.value_and_grad(run)(table(1), teacher)
    assert abs(value) < 1e-6
    assert all(np.abs(leaf).max() < 1e-6 for leaf in flat(gradient).values())
    assert abs(run(table(1), table(4))) > 1e-3


@pytest.mark.parametrize("size", [30.0, 200.0])
@pytest.mark.parametrize(
    ("share", "end", "again"), [(1.0, 1.0, 0.97), (0.5, 1.0, 0.3), (0.5, 0.5, 0.97)]
)
def test_networks_that_are_sure_leave_the_losses_finite(size, share, end, again):
    """At the end of the path nothing is mixed in: what is said to be impossible is, in float32."""
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(size * rng.standard_normal((4, L, V)), jnp.float32)
    own, student, base = draw(), draw(), draw()
    z, zs = (jnp.asarray(rng.integers(V, size=(4, L))) for _ in range(2))
    share, end, again = (jnp.full((4, L), number) for number in (share, end, again))
    learn = lambda own: jnp.mean(matching.auxiliary_loss(own, student, z, zs, share, end, again))
    move = lambda student: jnp.mean(matching.student_loss(student, own, base, zs, end * again))
    for loss, logits in ((learn, own), (move, student)):
        value, gradient = jax.value_and_grad(loss)(logits)
        assert math.isfinite(value)
        assert np.isfinite(gradient).all()


def test_the_auxiliary_loss_reaches_all_of_a_network_and_nothing_else():
    stage = setting(1)
    fresh = jax.jit(stage.init_params)(jax.random.key(1), base_params())
    params, partner = noised(fresh, 1), noised(fresh, 2)
    frozen = stages.Frozen(fresh, {"teacher": base_params()}, partner)
    run = jax.jit(jax.value_and_grad(stage.auxiliary.loss, argnums=(0, 1), has_aux=True))
    (value, _), (grads, others) = run(params, frozen, jax.random.key(2), make_batch())
    assert value > 0
    for path, grad in flat(grads).items():
        assert grad.any(), f"no gradient reaches {path}"
    assert not any(grad.any() for grad in flat(others).values())


# ------------------------------------------------------------------------------------------ refused


def test_the_stage_names_its_teacher_and_its_turns():
    stage = setting(1, teacher="elsewhere", auxiliary_updates=3, auxiliary_rate=0.5)
    assert stage.needs == {"teacher": "elsewhere"}
    assert stage.auxiliary[1:] == (3, 0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path.source": "mask"}, "needs path.source='uniform'; .*Leave 'refine' out"),
        ({"refine.noise": (0.0, 0.5)}, r"refine\.noise must be .*, got \(0\.0, 0\.5\)"),
        ({"refine.noise": (0.5, 1.0)}, r"refine\.noise must be .*, got \(0\.5, 1\.0\)"),
        ({"refine.noise": (0.6, 0.5)}, r"refine\.noise must be .*, got \(0\.6, 0\.5\)"),
        ({"refine.noise": (float("nan"), 0.5)}, r"refine\.noise must be .*, got \(nan, 0\.5\)"),
        ({"refine.max_log2_steps": -1}, r"refine\.max_log2_steps must be .*, got -1"),
        ({"refine.auxiliary_updates": 0}, r"auxiliary_updates must be .*, got 0"),
        ({"refine.auxiliary_rate": 0.0}, r"refine\.auxiliary_rate must be .*, got 0\.0"),
        ({"refine.batch_size": 98}, r"batch of 98 rows must be a multiple of 4: .*refine\.acc"),
        ({"refine.accumulate": 48}, "batch of 2 rows must be a multiple of 4"),
        ({"refine.max_log2_steps": 5}, "batch of 96 rows must be a multiple of 192"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_values_are_refused(values, message):
    config = make_config()
    config.update_from_flattened_dict(values)
    with pytest.raises(ValueError, match=message):
        make_stage("refine", config)
