"""What is evaluated: settings that are refused, the points of a report and of a sweep."""

import pytest

from configs import base, sweep
from fsdfm_jax.evaluate import plan as plan_lib
from fsdfm_jax.evaluate.plan import Axes, Point, Settings

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


def _axes(**changes):
    config = sweep.get_config()
    config.update_from_flattened_dict({f"axes.{key}": value for key, value in changes.items()})
    return Axes.from_config(config.axes)


def test_plan_in_full():
    settings = _settings(
        steps=(1, 4),
        many_steps=64,
        jumps=("cumulative", "euler"),
        few_step_jump="mixture",
        controls=("shuffled",),
        temperature=0.5,
        seed=3,
    )
    plan = plan_lib.plan(settings, STAGES, 128)
    assert [(p.kind, p.group, p.source, p.steps, p.jump) for p in plan] == [
        ("real", "held-out text", "real", None, None),
        ("control", "shuffled control", "shuffled", None, None),
        ("model", "autoregressive", "autoregressive", 128, None),
        ("model", "pretrain (cumulative)", "pretrain", 64, "cumulative"),
        ("model", "pretrain (cumulative)", "pretrain", 1, "cumulative"),
        ("model", "pretrain (cumulative)", "pretrain", 4, "cumulative"),
        ("model", "pretrain (euler)", "pretrain", 1, "euler"),
        ("model", "pretrain (euler)", "pretrain", 4, "euler"),
        ("model", "pretrain (few-step sampler)", "pretrain", 1, "mixture"),
        ("model", "pretrain (few-step sampler)", "pretrain", 4, "mixture"),
        ("model", "distill", "distill", 1, "mixture"),
        ("model", "distill", "distill", 4, "mixture"),
        ("model", "refine_2", "refine_2", 1, "mixture"),
        ("model", "refine_2", "refine_2", 4, "mixture"),
    ]
    models = [p for p in plan if p.kind == "model"]
    assert {(p.temperature, p.top_p, p.weights, p.seed, p.task) for p in models} == {
        (0.5, 1.0, "ema", 3, "unconditional")
    }
    assert len({p.slug for p in plan}) == len(plan)
    assert (plan[0].slug, plan[1].slug) == ("real", "control-shuffled-s3")
    assert plan[2].slug == "autoregressive-128steps-T0.5-s3"
    assert plan[4].slug == "pretrain-1steps-cumulative-uniform-T0.5-s3"
    assert plan[4].setting == "pretrain-1steps-cumulative-uniform-T0.5"


def test_only_the_few_step_sampler_has_its_options():
    options = {"grid": "power:0.5", "cooling": 0.25, "look_ahead": 0.75, "neighbours": 1.5}
    plan = plan_lib.plan(_settings(few_step_jump="mixture", **options), STAGES, 9)
    for point in [p for p in plan if p.jump]:
        few_step = point.source != "pretrain" or "few-step" in point.group
        expected = options if few_step else dict.fromkeys(options, 0.0) | {"grid": "uniform"}
        assert {name: getattr(point, name) for name in options} == expected


def test_a_base_model_is_not_sampled_twice_in_one_way():
    config = base.get_config()
    base.use_plain_sampler(config)
    for jump, has_own in (("mixture", False), ("dispersed", True)):  # among eval.jumps or not
        config.eval.few_step_jump = jump
        groups = {p.group for p in plan_lib.plan(Settings.from_config(config.eval), STAGES, 9)}
        assert any("few-step" in group for group in groups) == has_own


def test_an_autoregressive_model_with_and_without_memory():
    plan = plan_lib.plan(_settings(memories=("cache", "none")), {"ar": "autoregressive"}, 9)
    models = [(p.group, p.memory, p.steps, p.slug) for p in plan if p.kind == "model"]
    assert models == [
        ("ar", "cache", 9, "ar-9steps-T1-s1"),
        ("ar (no cache)", "none", 9, "ar-9steps-T1-anew-s1"),
    ]


def test_the_reference_row_goes_by_the_first_rule():
    plan = plan_lib.plan(_settings(jumps=("mixture", "euler"), many_steps=99), STAGES, 9)
    assert [p.jump for p in plan if p.steps == 99] == ["mixture"]


def test_equal_points_are_one():
    plan = plan_lib.plan(_settings(steps=(1, 8, 1), many_steps=8, jumps=("cumulative",)), STAGES, 9)
    models = [(p.steps, p.jump) for p in plan if p.source == "pretrain"]
    few_step = [(1, "dispersed"), (8, "dispersed")]
    assert models == [(8, "cumulative"), (1, "cumulative"), *few_step]


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
        ({"num_samples": 0}, "eval.num_samples must be at least 1, got 0"),
        ({"batch_size": 0}, "eval.batch_size must be at least 1"),
        ({"many_steps": 0}, "eval.many_steps must be at least 1"),
        ({"watched": -1}, "eval.watched must be at least 0"),
        ({"bound_times": 1}, "eval.bound_times must be at least 2"),
        ({"resamples": 1}, "eval.resamples must be at least 2"),
        ({"jumps": ()}, "eval.jumps is empty"),
        ({"memories": ("all",)}, "eval.memories names the unknown 'all'"),
        ({"grid": "power:30"}, "eval: grid 'power:30' with 1024 steps"),
        ({"steps": (1, 0)}, "eval.steps must be at least 1"),
        ({"jumps": ("leap",)}, "eval.jumps names the unknown 'leap'"),
        ({"few_step_jump": "leap"}, "eval.few_step_jump names the unknown 'leap'"),
        ({"controls": ("random",)}, "eval.controls names the unknown 'random'"),
        ({"weights": "teacher"}, "eval.weights names the unknown 'teacher'"),
        ({"temperature": 0.0}, "eval: temperature must be greater than 0"),
        ({"top_p": 0.0}, r"eval: top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "eval: top_p"),
        ({"neighbours": -0.5}, "eval: neighbours must be at least 0 and finite, got -0.5"),
        (
            {"neighbours": 0.5, "few_step_jump": "cumulative"},
            "eval: .*mixture and dispersed do; the rule 'cumulative'",
        ),
        ({"grid": "linear"}, "eval: grid 'linear' with 1 steps: Unknown grid 'linear'"),
        ({"seed": -1}, "eval: seed"),
        ({"task": "suffix:3"}, "Unknown task 'suffix:3'"),
        ({"models": "runs/other"}, "expected LABEL=PATH"),
        ({"models": "a=x,a=y"}, "each label once"),
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
    assert [p.kind for p in plan[:4]] == ["real", "control", "control", "control"]
    assert {p.group for p in models} == {"distill"}


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
    point = next(p for p in plan if (p.source, p.jump, p.grid) == ("distill", "euler", "cosine"))
    assert point.group == "distill (euler, cosine, top-p 0.9, ema)"
    assert point.slug == "distill-2steps-euler-cosine-T1-p0.9-s0"


def test_neighbours_are_an_axis_and_a_setting_of_all_but_left_to_right_models():
    axes = _axes(
        models=("distill", "autoregressive"),
        steps=(2,),
        jumps=("dispersed",),
        neighbours=(0.0, 0.5),
        temperatures=(1.0,),
        seeds=(0,),
    )
    swept = [p for p in plan_lib.sweep(axes, _settings(), STAGES, 128) if p.kind == "model"]
    assert [(p.neighbours, p.group, p.slug) for p in swept] == [
        (0.0, "distill (neighbours 0)", "distill-2steps-dispersed-uniform-T1-s0"),
        (0.5, "distill (neighbours 0.5)", "distill-2steps-dispersed-uniform-T1-n0.5-s0"),
        (None, "autoregressive", "autoregressive-128steps-T1-s0"),
    ]
    settings = _settings(neighbours=0.5, jumps=("mixture",), few_step_jump="dispersed")
    plan = plan_lib.plan(settings, STAGES, 128)
    found = {(p.stage, p.neighbours) for p in plan}
    assert found == {(None, None), ("autoregressive", None), ("pretrain", 0.0)} | {
        (stage, 0.5) for stage in ("pretrain", "distill", "refine")
    }


def test_a_left_to_right_model_takes_no_steps_jumps_or_grids():
    axes = _axes(
        models=("autoregressive",), jumps=("euler", "mixture"), grids=("uniform", "cosine")
    )
    plan = [p for p in plan_lib.sweep(axes, _settings(), STAGES, 128) if p.kind == "model"]
    assert len(plan) == 5 * 3  # temperatures and seeds
    assert {(p.steps, p.jump, p.grid, p.group) for p in plan} == {
        (128, None, None, "autoregressive")
    }


def test_no_models_named_is_all_of_them():
    plan = plan_lib.sweep(_axes(models=()), _settings(), STAGES, 128)
    assert {p.source for p in plan if p.kind == "model"} == set(STAGES)
    with pytest.raises(ValueError, match=r"axes\.models names the unknown 'refine'"):
        plan_lib.sweep(_axes(models=("refine",)), _settings(), STAGES, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": ()}, "axes.steps is empty"),
        ({"seeds": ()}, "axes.seeds is empty"),
        ({"steps": (0, 1)}, "axes.steps must be at least 1"),
        ({"jumps": ("leap",)}, "axes.jumps names the unknown"),
        ({"weights": ("teacher",)}, "axes.weights names the unknown"),
        ({"grids": ("uniform", "linear")}, "axes: grid 'linear'"),
        ({"temperatures": (1.0, 0.0)}, "axes: temperature"),
        ({"top_ps": (0.0,)}, "axes: top_p"),
        ({"neighbours": ()}, "axes.neighbours is empty"),
        ({"neighbours": (0.0, -1.0)}, "axes: neighbours must be at least 0"),
        ({"neighbours": (0.0, 1.0), "jumps": ("mixture", "euler")}, "axes: .*the rule 'euler'"),
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
    how = {"jump": "euler", "grid": "power:2", "temperature": 1.0, "top_p": 0.95, "seed": 0}
    point = Point("model", "g", "other/run 1", "prefix:5", "distill", 2, weights="student", **how)
    assert point.slug == "other-run-1-2steps-euler-power-2-T1-p0.95-student-prefix-5-s0"
