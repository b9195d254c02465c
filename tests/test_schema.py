"""All configuration keys: declared and checked, with bad values rejected from any source."""

import math
import subprocess
import sys

import jax.numpy as jnp
import pytest

from configs import base, sweep
from fsdfm_jax import cli, schema
from fsdfm_jax.evaluate import plan as plan_lib
from fsdfm_jax.flow import jumps, losses, teacher
from fsdfm_jax.inference.autoregressive import MEMORIES
from fsdfm_jax.network import config as network_config
from fsdfm_jax.ops import attention
from fsdfm_jax.stages import pretrain
from fsdfm_jax.training import optim
from fsdfm_jax.training.optim import make_optimizer

DECLARED = {
    **{("base", key): kind for key, kind in schema.KEYS.items()},
    **{("sweep", key): kind for key, kind in schema.SWEEP_KEYS.items() if "eval." not in key},
}
CONFIGS = {"base": base.get_config, "sweep": sweep.get_config}
BAD = {
    schema.Whole: [None, "1", 1.5, math.nan, True, -2, 10**40, (1,)],
    schema.Number: [None, "1", math.nan, math.inf, -math.inf, -1.0, True, (1.0,), 1e300],
    schema.Choice: [None, "", "no such name", 1, ("a",)],
    schema.Text: [None, 3, "None", "a\0b"],
    schema.Several: [None, "text", 3, (None,), ((),), (math.nan,), (True,), (-2,)],
}


def _with(name, key, value):
    config = CONFIGS[name]()
    *sections, leaf = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    with section.ignore_type():
        section[leaf] = value
    return config


@pytest.mark.parametrize(("name", "make"), CONFIGS.items())
def test_the_declared_keys_are_those_of_the_files(name, make):
    declared = schema.KEYS if name == "base" else schema.SWEEP_KEYS
    assert sorted(declared) == sorted(schema.keys(make()))
    schema.check(make())


@pytest.mark.parametrize(("name", "key"), DECLARED)
def test_every_key_refuses_what_it_can_not_be(name, key):
    kind = DECLARED[name, key]
    for value in BAD[type(kind)]:
        if not (value is None and key == "optim.clip_norm"):
            assert kind.problem(value), value
    with pytest.raises(ValueError, match=rf"^config\.{key} must be ") as error:
        schema.check(_with(name, key, value))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(("name", "key"), DECLARED)
def test_every_key_has_a_lowest_and_a_highest_value(name, key):
    """Values just inside an interval are accepted, just outside rejected."""
    kind = DECLARED[name, key]
    inner = kind.kind if isinstance(kind, schema.Several) else kind
    if not isinstance(inner, schema.Whole | schema.Number):
        return
    interval = inner.interval
    low, high = map(float, interval[1:-1].split(","))
    step = 1 if isinstance(inner, schema.Whole) else (high - low) * 1e-3
    number = int if isinstance(inner, schema.Whole) else float
    several = isinstance(kind, schema.Several)
    wrap = lambda value: (value,) * max(kind.least, 1) if several else value
    for edge, inside, outward in ((low, interval[0] == "[", -1), (high, interval[-1] == "]", 1)):
        assert bool(kind.problem(wrap(number(edge)))) != inside, edge
        assert kind.problem(wrap(number(edge + outward * max(step, abs(edge) * 1e-3)))), edge
        assert not kind.problem(wrap(number(edge - outward * step))), edge


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.clip_norm", -1.0),
        ("optim.b1", 2.0),
        ("optim.eps", -1.0),
        ("optim.weight_decay", -10.0),
        ("pretrain.learning_rate", 0.0),
        ("pretrain.learning_rate", 1e-300),  # 0 as float32
        ("distill.final_lr_fraction", -5.0),
        ("train.watchdog_minutes", math.nan),
        ("eval.steps", ("1",)),
        ("eval.steps", (1, 2.0)),
        ("distill.max_log2_steps", 40),
        ("data.block_length", 10**12),
        ("model.width", 10**9),
        ("pretrain.num_steps", 10**12),
        ("pretrain.time_eps", 1 - 1e-12),  # 1 as float32
    ],
)
def test_values_that_were_believed(key, value):
    with pytest.raises(ValueError, match=rf"config\.{key} must be"):
        schema.check(_with("base", key, value))


@pytest.mark.parametrize("name", ["../../escape", "a/b", "..", ".", "", "a\nb"])
def test_the_name_of_a_sweep_stays_in_its_folder(name):
    with pytest.raises(ValueError, match=r"config\.name must be a folder name"):
        schema.check(_with("sweep", "name", name))


@pytest.mark.parametrize("off", [0, 0.0, None])
def test_gradients_are_not_clipped_where_that_is_off(off):
    config = _with("base", "optim.clip_norm", off)
    schema.check(config)
    optimizer = make_optimizer(config.optim, config.pretrain)
    large = {"w": jnp.full(3, 1e6)}
    update, _ = optimizer.update(large, optimizer.init(large), large)
    assert bool((update["w"] != 0).all())


@pytest.mark.parametrize("stage", ["autoregressive", "pretrain", "distill"])
@pytest.mark.parametrize("decay_steps", [0, 10])
def test_a_stage_without_warm_up_says_nothing(stage, decay_steps, caplog):
    config = base.get_config()
    config[stage].decay_steps = decay_steps
    make_optimizer(config.optim, config[stage])
    assert caplog.text == ""


# ------------------------------------------------------------------------------------------- names
def test_an_unknown_key_of_a_file_names_the_nearest():
    config = base.get_config()
    config.pretrain.num_step = 5
    with pytest.raises(ValueError, match=r"config\.pretrain\.num_step: the nearest are config\.pr"):
        schema.check(config)
    config = base.get_config()
    config.optimizer = config.copy_and_resolve_references().optim
    with pytest.raises(ValueError, match=r"unknown .* config\.optimizer\.b1: .*config\.optim\.b1"):
        schema.check(config)


@pytest.mark.parametrize("section", [key for key in base.get_config() if key not in ("seed",)])
def test_a_section_that_is_replaced_or_deleted_is_named(section):
    for value in ({}, {"a": 1}, None, 3):
        config = base.get_config()
        with config.ignore_type():
            config[section] = value
        with pytest.raises(ValueError, match=rf"config\.{section}"):
            schema.check(config)
    config = base.get_config()
    del config[section]
    with pytest.raises(ValueError, match=rf"missing: .*config\.{section}"):
        schema.check(config)


@pytest.mark.parametrize(("name", "key"), DECLARED)
def test_a_deleted_key_is_named(name, key):
    config = CONFIGS[name]()
    *sections, leaf = key.split(".")
    section = config
    for part in sections:
        section = section[part]
    del section[leaf]
    with pytest.raises(ValueError, match=rf"missing: config\.{key} "):
        schema.check(config, schema.SWEEP_KEYS if name == "sweep" else schema.KEYS)


def test_choices_are_those_of_the_code():
    names = lambda key: set(schema.KEYS[key].names)
    assert names("eval.sampling.jump") == set(jumps.RULES)
    assert names("model.attention") == set(attention.IMPLEMENTATIONS)
    assert names("model.remat") == set(network_config.REMATS)
    assert names("model.dtype") == set(network_config.DTYPES)
    assert names("model.conditioning") == set(network_config.CONDITIONINGS)
    assert names("optim.name") == set(optim._BY_NAME)
    assert names("pretrain.loss") == set(pretrain._LOSSES)
    assert set(schema.KEYS["eval.memories"].kind.names) == set(MEMORIES)
    assert set(schema.KEYS["eval.controls"].kind.names) == {*plan_lib.CONTROLS, plan_lib.COLD}
    for name in names("distill.divergence"):
        losses.get_divergence(name)
    for name in names("distill.teacher_rule"):
        teacher.get_rule(name)


# ------------------------------------------------------------------------- wherever it comes from
PROGRAMS = {
    "fsdfm_jax.main": ("base", ["--workdir=none"]),
    "fsdfm_jax.evaluate": ("base", ["--workdir=none"]),
    "launch.sweep": ("sweep", ["--workdir=none"]),
    "launch.prepare_data": ("base", ["--directory=none"]),
    "launch.aot_compile": ("base", ["--topology=local"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_checks_its_config_file(tmp_path, program):
    name, arguments = PROGRAMS[program]
    file = tmp_path / "own.py"
    file.write_text(
        f"from configs import {name}\n\n\ndef get_config():\n    config = {name}.get_config()\n"
        "    config.eval.stepz = 3\n    return config\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", program, f"--config={file}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == cli.EXIT_CODE, done.stderr[-2000:]
    assert "unknown configuration key config.eval.stepz: the nearest are" in done.stderr
    assert len(done.stderr.splitlines()) == 1
