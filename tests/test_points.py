"""Points of an evaluation: rejected settings, the points of a report and of a sweep."""

import pytest

from configs import base, sweep
from fsdfm_jax.evaluate import plan as plan_lib
from fsdfm_jax.evaluate.plan import Axes, Point, Settings
from fsdfm_jax.flow.sampling import Sampling

STAGES = {
    "autoregressive": "autoregressive",
    "pretrain": "pretrain",
    "distill": "distill",
    "refine_2": "refine",
}


def _settings(**changes):
    config = base.get_config()
    config.update_from_flattened_dict({f"eval.{key}": value for key, value in changes.items()})
    return Settings.from_config(config.eval)


def _how(point, *names):
    return tuple(point.described()[name] for name in names)


def _axes(**changes):
    config = sweep.get_config()
    config.update_from_flattened_dict({f"axes.{key}": value for key, value in changes.items()})
    return Axes.from_config(config.axes)


def test_plan_in_full():
    settings = _settings(
        steps=(1, 4),
        many_steps=64,
        jumps=("cumulative", "euler"),
        controls=("shuffled",),
        seed=3,
        **{"sampling.jump": "mixture", "sampling.temperature": 0.5},
    )
    plan = plan_lib.plan(settings, STAGES, 128)
    assert [(p.kind, p.group, p.source, *_how(p, "steps", "jump")) for p in plan] == [
        ("real", "held-out text", "real", None, None),
        ("control", "shuffled control", "shuffled", None, None),
        ("model", "autoregressive", "autoregressive", 128, None),
        ("model", "pretrain", "pretrain", 64, "cumulative"),
        ("model", "pretrain", "pretrain", 1, "cumulative"),
        ("model", "pretrain", "pretrain", 4, "cumulative"),
        ("model", "pretrain (euler)", "pretrain", 1, "euler"),
        ("model", "pretrain (euler)", "pretrain", 4, "euler"),
        ("model", "pretrain (mixture)", "pretrain", 1, "mixture"),
        ("model", "pretrain (mixture)", "pretrain", 4, "mixture"),
        ("model", "distill (mixture)", "distill", 1, "mixture"),
        ("model", "distill (mixture)", "distill", 4, "mixture"),
        ("model", "refine_2 (mixture)", "refine_2", 1, "mixture"),
        ("model", "refine_2 (mixture)", "refine_2", 4, "mixture"),
    ]
    models = [p for p in plan if p.kind == "model"]
    assert {(*_how(p, "temperature", "top_p"), p.weights, p.seed, p.task) for p in models} == {
        (0.5, 1.0, "ema", 3, "unconditional")
    }
    assert len({p.slug for p in plan}) == len(plan)
    assert (plan[0].slug, plan[1].slug) == ("real", "control-shuffled-s3")
    assert plan[2].slug == "autoregressive-128steps-T0.5-s3"
    assert plan[4].slug == "pretrain-1steps-cumulative-uniform-T0.5-s3"
    assert plan[4].setting == "pretrain-1steps-cumulative-uniform-T0.5"


def test_the_base_model_is_sampled_plainly_and_by_eval_sampling():
    options = {"grid": "power:0.5", "cooling": 0.25, "look_ahead": 0.75}
    settings = _settings(**{f"sampling.{name}": value for name, value in options.items()})
    for point in plan_lib.plan(settings, STAGES, 9):
        if point.sampling is None or point.causal:
            continue
        own = "(power:0.5, cooling 0.25, look-ahead 0.75)" in point.group
        assert own or point.source == "pretrain"
        expected = options if own else {"grid": "uniform", "cooling": 0.0, "look_ahead": 0.0}
        assert _how(point, *options) == tuple(expected.values())


def test_a_base_model_is_not_sampled_twice_in_one_way():
    for jump, count in (("mixture", 3), ("dispersed", 4)):  # among eval.jumps or not
        plan = plan_lib.plan(_settings(**{"sampling.jump": jump}), STAGES, 9)
        points = [p for p in plan if p.source == "pretrain"]
        assert len({p.group for p in points}) == count
        assert len({p.sampling for p in points}) == len(points)


def test_an_autoregressive_model_with_and_without_memory():
    plan = plan_lib.plan(_settings(memories=("cache", "none")), {"ar": "autoregressive"}, 9)
    models = [(p.group, p.memory, p.sampling.steps, p.slug) for p in plan if p.kind == "model"]
    assert models == [
        ("ar", "cache", 9, "ar-9steps-T1-s1"),
        ("ar (no cache)", "none", 9, "ar-9steps-T1-anew-s1"),
    ]


def test_the_reference_row_goes_by_the_first_rule():
    plan = plan_lib.plan(_settings(jumps=("mixture", "euler"), many_steps=99), STAGES, 9)
    assert [p.sampling.jump for p in plan if _how(p, "steps") == (99,)] == ["mixture"]


def test_equal_points_are_one():
    plan = plan_lib.plan(_settings(steps=(1, 8, 1), many_steps=8, jumps=("cumulative",)), STAGES, 9)
    models = [_how(p, "steps", "jump") for p in plan if p.source == "pretrain"]
    assert models == [(8, "cumulative"), (1, "cumulative")]


@pytest.mark.parametrize("task", ["random:0.5", "infill:2x3"])
def test_a_left_to_right_model_is_not_asked_to_fill_gaps(task):
    for plan in (
        plan_lib.plan(_settings(task=task), STAGES, 128),
        plan_lib.sweep(_axes(models=()), _settings(task=task), STAGES, 128),
    ):
        assert "autoregressive" not in {p.source for p in plan}
        assert {p.task for p in plan} == {task}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, r"eval.num_samples must be .* in \[1, 1e7\], got 0"),
        ({"batch_size": 0}, "eval.batch_size must be"),
        ({"many_steps": 0}, "eval.many_steps must be"),
        ({"watched": -1}, "eval.watched must be"),
        ({"bound_times": 1}, "eval.bound_times must be"),
        ({"resamples": 1}, "eval.resamples must be"),
        ({"jumps": ()}, "eval.jumps must be a tuple of at least one"),
        ({"memories": ("all",)}, "eval.memories must be each one of .*'all'"),
        ({"sampling.grid": "power:30"}, "eval.steps: Sampling.grid: .*increase strictly"),
        ({"steps": (1, 0)}, "eval.steps must be each an integer"),
        ({"steps": ("1",)}, "eval.steps must be each an integer"),
        ({"steps": (1, 2.0)}, "eval.steps must be each an integer"),
        ({"steps": (None,)}, "eval.steps must be each an integer"),
        ({"jumps": ("leap",)}, "eval.jumps must be each one of .*'leap'"),
        ({"sampling.jump": "leap"}, "eval.sampling.jump must be one of"),
        ({"controls": ("random",)}, "eval.controls must be each one of .*'random'"),
        ({"weights": "teacher"}, "eval.weights must be one of ema, student, got 'teacher'"),
        ({"sampling.temperature": -1.0}, "eval.sampling.temperature must be"),
        ({"sampling.top_p": 0.0}, r"eval.sampling.top_p must be .* in \(0, 1\], got 0.0"),
        ({"sampling.grid": "linear"}, "eval.sampling.grid must be uniform, .*'linear'"),
        ({"seed": -1}, "eval.seed must"),
        ({"task": "suffix:3"}, "Unknown task 'suffix:3'"),
        ({"models": "runs/other"}, "expected comma-separated LABEL=PATH"),
        ({"models": "a=x,a=y"}, "unique labels"),
        ({"models": "a/b=x"}, "of letters, digits"),
    ],
)
def test_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _settings(**changes)


def test_judges_are_a_list_in_order():
    assert _settings(judges="autoregressive, gguf:a.gguf,").judges == (
        "autoregressive",
        "gguf:a.gguf",
    )
    assert _settings(judges="").judges == ()


# -------------------------------------------------------------------------------------------- sweep
def test_the_sweep_of_the_config_file_is_165_points_and_what_they_are_compared_with():
    plan = plan_lib.sweep(_axes(), _settings(), STAGES, 128)
    models = [p for p in plan if p.kind == "model"]
    assert len(models) == 11 * 5 * 3 == len(set(models)) == len({p.slug for p in models})
    assert len({p.setting for p in models}) == 11 * 5
    assert [p.kind for p in plan[:5]] == ["real", *["control"] * 4]
    assert {p.group for p in models} == {"distill"}


OTHER = {"jump": "dispersed", "grid": "power:0.7", "cooling": 0.7, "look_ahead": 0.5}


def test_a_sweep_is_made_around_the_sampler_of_generate():
    settings = _settings(**{f"sampling.{name}": value for name, value in OTHER.items()})
    for axes in ({}, {"grids": ("uniform", "cosine")}):
        plan = plan_lib.sweep(_axes(**axes), settings, STAGES, 128)
        for point in plan[5:]:
            expected = OTHER | ({} if not axes else {"grid": point.sampling.grid})
            assert _how(point, *OTHER) == tuple(expected.values())
        grids = {point.sampling.grid for point in plan[5:]}
        assert grids == set(axes.get("grids", ("power:0.7",)))


def test_one_label_is_one_sampler_in_reports_and_sweeps():
    """In every plan, label, steps and temperature describe the sampler of a point."""
    plans = []
    each_alone = ({name: value} for name, value in (OTHER | {"top_p": 0.9}).items())
    for sampling in ({}, OTHER, *each_alone, {"grid": "cosine", "temperature": 0.8}):
        settings = _settings(**{f"sampling.{name}": value for name, value in sampling.items()})
        student = settings._replace(weights="student", memories=("cache", "none"))
        axes = (_axes(models=()), _axes(models=(), jumps=("euler", "cumulative")))
        plans += [plan_lib.plan(each, STAGES, 128) for each in (settings, student)]
        plans += [plan_lib.sweep(each, settings, STAGES, 128) for each in axes]
    found = {}
    for point in (p for plan in plans for p in plan if p.kind == "model"):
        named = (point.group, point.sampling.steps, point.sampling.temperature)
        how = (point.source, tuple(point.described().items()), point.weights, point.memory)
        assert found.setdefault(named, how) == how
    assert len(found) == len(set(found.values())) > 400


def test_axes_that_vary_are_named_in_the_group():
    axes = _axes(
        models=("pretrain", "distill"),
        steps=(2,),
        jumps=("euler", "mixture"),
        grids=("uniform", "cosine"),
        temperatures=(1.0,),
        top_ps=(0.9, 1.0),
        weights=("ema", "student"),
        seeds=(0,),
    )
    plan = [p for p in plan_lib.sweep(axes, _settings(), STAGES, 128) if p.kind == "model"]
    assert len(plan) == 2 * 2 * 2 * 2 * 2
    assert len({p.group for p in plan}) == len(plan)
    point = next(
        p for p in plan if (p.source, *_how(p, "jump", "grid")) == ("distill", "euler", "cosine")
    )
    assert point.group == "distill (euler, cosine, top-p 0.9)"
    assert point.slug == "distill-2steps-euler-cosine-T1-p0.9-s0"


def test_a_left_to_right_model_takes_no_steps_jumps_or_grids():
    axes = _axes(
        models=("autoregressive",), jumps=("euler", "mixture"), grids=("uniform", "cosine")
    )
    plan = [p for p in plan_lib.sweep(axes, _settings(), STAGES, 128) if p.kind == "model"]
    assert len(plan) == 5 * 3  # temperatures and seeds
    assert {(*_how(p, "steps", "jump", "grid"), p.group) for p in plan} == {
        (128, None, None, "autoregressive")
    }


def test_no_models_named_is_all_of_them():
    plan = plan_lib.sweep(_axes(models=()), _settings(), STAGES, 128)
    assert {p.source for p in plan if p.kind == "model"} == set(STAGES)
    with pytest.raises(ValueError, match=r"axes\.models has the unknown 'refine'"):
        plan_lib.sweep(_axes(models=("refine",)), _settings(), STAGES, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": ()}, "axes.steps must be a tuple of at least one"),
        ({"seeds": ()}, "axes.seeds must be a tuple of at least one"),
        ({"steps": (0, 1)}, "axes.steps must be each"),
        ({"steps": (1.0,)}, "axes.steps must be each"),
        ({"jumps": ("leap",)}, "axes.jumps must be each"),
        ({"weights": ("teacher",)}, "axes.weights must be each"),
        ({"grids": ("uniform", "linear")}, "axes.grids must be each"),
        ({"temperatures": (1.0, -1.0)}, "axes.temperatures must be"),
        ({"top_ps": (0.0,)}, "axes.top_ps must"),
        ({"seeds": (0, -1)}, "axes.seeds must"),
    ],
)
def test_axes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _axes(**changes)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_machines_share_all_points(count):
    plan = plan_lib.sweep(_axes(), _settings(), STAGES, 128)
    shares = [plan_lib.share(plan, i, count) for i in range(count)]
    assert sorted(repr(p) for part in shares for p in part) == sorted(map(repr, plan))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_slugs_are_file_names():
    how = {"sampling": Sampling(2, "euler", "power:2", top_p=0.95), "seed": 0}
    point = Point("model", "g", "other/run 1", "prefix:5", "distill", weights="student", **how)
    assert point.slug == "other-run-1-2steps-euler-power-2-T1-p0.95-student-prefix-5-s0"
