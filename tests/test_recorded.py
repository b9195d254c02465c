"""Recorded numbers: draws of each seed and results of each stage, fixed across refactorings.

Tokens must match exactly, losses and weights up to rounding. After an intended change, this updates
the record, with WORKDIR also that of the smoke run; the diff of goldens/recorded.json shows it:

    PYTHONPATH=. python tests/test_recorded.py [WORKDIR]
"""

import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_except

# The package, as this file sees it: where modules move or signatures change, only this part does.
from configs import base as base_config
from fsdfm_jax import stages
from fsdfm_jax.flow import grids, jumps, sampler
from fsdfm_jax.flow.process import make_process
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.training import workdir


def _weights(directory):
    return workdir.load_weights(directory).params


def _network(stage, config, vocab_size):
    """(model, fresh parameters)."""
    model = stages.model_config(stage, config.model, vocab_size=vocab_size)
    return model, model_lib.init_params(jax.random.key(0), model)


def _generate(params, model, process, given_BL, frozen_BL, **how):
    given = {"given_BL": given_BL, "frozen_BL": frozen_BL, "seed": SEED}
    return generate_lib.generate(params, model, process, Sampling(**how), **given)


def _watch(params, model, process, given_BL, frozen_BL, **how):
    """The tokens after each step, [S, B, L]."""
    given = {"given_BL": given_BL, "frozen_BL": frozen_BL, "seed": SEED}
    seen = generate_lib.stream(params, model, process, Sampling(**how), **given)
    return np.stack(list(seen)[1:])


def _sample(params, model, process, given_BL, frozen_BL):
    """The sampler itself, 4 steps on the bare network."""
    jump = process.make_jump(jumps.MIXTURE)
    denoise = lambda x_BL, t_B, h_B: model_lib.predict(params, model, x_BL, t_B, h_B)
    noise_key, key = jax.random.split(jax.random.key(SEED))
    x0_BL = jnp.where(frozen_BL, given_BL, process.source.sample(noise_key, frozen_BL.shape))
    grid_S1 = grids.uniform_grid(4)
    run = lambda key: sampler.sample(
        key, denoise, jump, process.finalize, x0_BL, grid_S1, frozen_BL
    )
    return jax.jit(run)(key)


def _stage_loss(stage, params, average, key, batch, guide):
    """(loss, metrics); `guide` is (strong, weak), the base weights that guidance compares."""
    needed = dict(zip(("init_from", "guide"), guide, strict=True)) if stage.needs else {}
    return stage.loss(params, stages.Frozen(average, needed), key, batch)


# ------------------------------------------------------------------------------------ what is drawn
ROOT = pathlib.Path(__file__).parents[1]
FILE = ROOT / "tests" / "goldens" / "recorded.json"
V, L, B, SEED = 37, 12, 5, 3_000_000_007
STAGES = ("autoregressive", "pretrain", "step_aware", "distill")
FEW_STEP, RULES = STAGES[2:], ("cumulative", "euler", "mixture", "dispersed")
SOURCES = {
    "uniform": {},
    "stay": {"path.source": "mask", "path.power": 2.0},
    "jump": {"path.source": "mask", "path.revealed": "jump"},
}
HOW = {"temperature": 0.7, "top_p": 0.9, "cooling": 0.7, "look_ahead": 0.5, "grid": "power:0.7"}
PRESET = HOW | {"jump": "dispersed"}
LITERAL = {"teacher_rule": "rk4", "teacher_jump": "cumulative", "teacher_end": "literal"}
LITERAL |= {"width_weights": "official", "time_eps": 1e-3, "rate_floor": 1e-8}
CHANGES = {name: {} for name in STAGES} | {
    **{f"{name} official": {"model.conditioning": "official"} for name in FEW_STEP},
    "pretrain cross_entropy": {"pretrain.loss": "cross_entropy"},
    "step_aware instantaneous": {"step_aware.rate": "instantaneous"},
    "distill literal": {f"distill.{key}": value for key, value in LITERAL.items()},
    "distill jsd": {"distill.divergence": "jsd"},
    "distill guided": {"distill.guidance": 0.5, "distill.guide": "short"},
    "distill masked": SOURCES["stay"],
}


def _config(**changes):
    config = base_config.get_config()
    config.model.update(width=16, num_blocks=2, num_heads=2, cond_width=8, mlp_ratio=2)
    for stage in FEW_STEP:
        config[stage].max_log2_steps = 4
    config.distill.tau = 0.25
    config.update_from_flattened_dict(changes)
    return config


def _flat(tree):
    """Name -> leaf, of parameters or a configuration."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _noised(params, seed=0):
    """Add noise everywhere, so that zeros hide nothing, and a preference for the input tokens."""
    noised = []
    for name, leaf in _flat(params).items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        scale = 1.0 if name == "vocab_embed.embedding" else 0.2
        noised.append(leaf + scale * rng.standard_normal(leaf.shape).astype(np.float32))
    noised = jax.tree.unflatten(jax.tree.structure(params), noised)
    noised["head"]["kernel"] += 0.5 * noised["vocab_embed"]["embedding"].T
    return noised


@functools.cache
def _drawing(source, stage="distill", conditioning="additive"):
    """(params, model, process) of a small network."""
    config = _config(**SOURCES[source], **{"model.conditioning": conditioning})
    process = make_process(**config.path, num_tokens=V, eos_id=2)
    model, params = _network(stage, config, process.source.vocab_size)
    return _noised(params), model, process


def _given(kind):
    """(given_BL, frozen_BL): nothing, parts of each row, or its head."""
    rng = np.random.default_rng(1)
    given_BL, any_BL = rng.integers(V, size=(B, L)).astype(np.int32), rng.random((B, L)) < 0.4
    head_BL = np.arange(L)[None] < np.full((B, 1), 4)
    return given_BL, {"free": any_BL & False, "frozen": any_BL, "head": head_BL}[kind]


def _token_cases():
    """Name -> a function without arguments that draws the tokens."""
    cases = {}

    def add(name, function, network, kind, **how):
        cases[name] = lambda: function(*_drawing(*network), *_given(kind), **how)

    for source, kind in itertools.product(SOURCES, ("free", "frozen")):
        for rule, steps in itertools.product(RULES, (1, 4)):
            how = {"steps": steps, "jump": rule}
            add(f"{rule} {source} {kind} S={steps}", _generate, (source,), kind, **how)
        add(f"preset {source} {kind}", _generate, (source,), kind, steps=4, **PRESET)
        add(f"sampler itself {source} {kind}", _sample, (source,), kind)
    for name, value in HOW.items():
        add(f"cumulative {name}", _generate, ("uniform",), "free", steps=2, **{name: value})
    add("steps watched", _watch, ("uniform",), "frozen", steps=4)
    add("official", _generate, ("uniform", "distill", "official"), "frozen", steps=4)
    add("base model", _generate, ("uniform", "pretrain"), "frozen", steps=4)
    for kind, value in itertools.product(("free", "head"), (1.0, 0.7)):
        how = {"steps": 1, "temperature": value, "top_p": value}
        network = ("stay", "autoregressive")
        add(f"autoregressive {kind} {value}", _generate, network, kind, **how)
    return cases


# --------------------------------------------------------------------------------- what is computed
def _metrics(case):
    """Metrics of a stage's loss and the norm of its gradient."""
    stage_name, config = case.split()[0], _config(**CHANGES[case])
    process = make_process(**config.path, num_tokens=V, eos_id=2)
    stage = stages.make_stage(stage_name, config, process)
    base = _network("pretrain", config, process.source.vocab_size)[1]
    fresh = stage.init_params(jax.random.key(1), base if stage_name in FEW_STEP else None)
    batch = {"x1": np.random.default_rng(2).integers(V, size=(8, L)).astype(np.int32)}
    guide = (_noised(base, 3), _noised(base, 4))

    def loss(params):
        return _stage_loss(stage, params, _noised(fresh, 2), jax.random.key(3), batch, guide)

    (_, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(_noised(fresh, 1))
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(grads)))
    return {name: float(metric) for name, metric in metrics.items()} | {"gradient": float(norm)}


def _smoke(folder):
    """Run -> its last line of metrics, and each array's sum of squares."""
    command = f"-m fsdfm_jax.main --config=configs/tiny.py:smoke --workdir={folder} --noevaluate"
    command += f" --config.pipeline={','.join(STAGES)}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *command.split()], check=True, cwd=ROOT, env=env)
    result = {}
    for run in STAGES:
        lines = (folder / "stages" / run / "metrics.jsonl").read_text().splitlines()
        result[run] = {key: json.loads(lines[-1])[key] for key in ("step", "loss", "grad_norm")}
        for name, leaf in _flat(_weights(folder / "stages" / run)).items():
            result[run][name] = float(np.sum(np.square(leaf, dtype=np.float64)))
    return result


# ---------------------------------------------------------------------------------------- the tests
TOKENS = _token_cases()
# Each rule, source and function once.
QUICK_TOKENS = [f"{rule} uniform frozen S=4" for rule in RULES]
QUICK_TOKENS += [f"{rule} stay free S=4" for rule in RULES]
QUICK_TOKENS += ["cumulative jump frozen S=4", "preset uniform free", "preset stay frozen"]
QUICK_TOKENS += ["sampler itself uniform frozen", "steps watched", "official", "base model"]
QUICK_TOKENS += ["autoregressive head 0.7"]
QUICK_LOSSES = [*STAGES, "distill literal", "distill guided"]


def record(folder):
    """Compute all current numbers, section -> name -> value, for comparison."""
    tokens = {name: np.asarray(draw()).tolist() for name, draw in TOKENS.items()}
    losses = {name: _metrics(name) for name in CHANGES}
    smoke = _smoke(folder) if folder else _recorded("smoke")
    return {"tokens": tokens, "losses": losses, "smoke": smoke, "config": _configuration()}


def _configuration():
    """Every key with its default."""
    return json.loads(json.dumps(_flat(base_config.get_config().to_dict())))


def _recorded(section):
    return json.loads(FILE.read_text())[section]


def test_every_case_is_recorded():
    for section, cases in (("tokens", TOKENS), ("losses", CHANGES), ("smoke", STAGES)):
        assert _recorded(section).keys() == set(cases)


@pytest.mark.parametrize("name", slow_except(QUICK_TOKENS, TOKENS))
def test_tokens(name):
    np.testing.assert_array_equal(TOKENS[name](), _recorded("tokens")[name])


@pytest.mark.parametrize("name", slow_except(QUICK_LOSSES, CHANGES))
def test_losses(name):
    assert _metrics(name) == pytest.approx(_recorded("losses")[name], rel=1e-5)


@pytest.mark.slow
@pytest.mark.optimised  # as users compile it
def test_the_smoke_run(tmp_path):
    for run, values in _smoke(tmp_path).items():
        assert values == pytest.approx(_recorded("smoke")[run], rel=1e-4), run


def test_configuration():
    assert _configuration() == _recorded("config")


if __name__ == "__main__":
    dump, parts = functools.partial(json.dumps, separators=(",", ":")), []
    for section, values in record(sys.argv[1:] and pathlib.Path(sys.argv[1])).items():
        entries = [f"{dump(name)}: {dump(value)}" for name, value in values.items()]
        parts.append(f"{dump(section)}: {{\n" + ",\n".join(entries))
    FILE.write_text("{" + "\n},\n".join(parts) + "\n}}\n")
