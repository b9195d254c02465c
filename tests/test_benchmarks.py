"""The speed benchmarks: their counts, and that all are listed."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as listing
from benchmarks import autoregressive, measure, sample, scaling, train
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.network import model as model_lib

SMALL = {"width": 8, "num_blocks": 2, "num_heads": 2, "cond_width": 4, "remat": "dots"}


def test_every_program_is_listed(capsys):
    folder = pathlib.Path(listing.__file__).parent
    modules = [path for path in folder.glob("*.py") if ".run(main)" in path.read_text()]
    programs = {path.stem for path in modules} | {path.name for path in folder.glob("*.sh")}
    assert set(listing.DURATIONS) == programs
    listing.main()
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(programs)
    assert max(map(len, lines)) <= 110


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


def small_case(name):
    shape = {"stage": "distill", "size": "tiny", "length": 12, "dtype": "float32"}
    return train.make_case(name, **shape, overrides=SMALL)[3]


def test_every_case_switches_something():
    plain = small_case("ours")
    for name, changes in train.CASES.items():
        changed = small_case(name)
        assert (name == "ours") == (changed == plain), name
        assert all(getattr(changed, key) == value for key, value in changes.items()), name


def test_sampler_cases_draw_the_same_tokens():
    tokens = []
    for name in ("ours", "logits written down"):
        run, model = sample.make_case(name, size="tiny", length=8, dtype="float32")
        params = model_lib.init_params(jax.random.key(0), model)
        kernel = params["head"]["kernel"]
        params["head"]["kernel"] = jax.random.normal(jax.random.key(1), kernel.shape)
        x0_BL = jnp.zeros((2, 8), jnp.int32)
        tokens.append(run(params, jax.random.key(2), x0_BL, Sampling(2, grid="power:0.5")))
    np.testing.assert_array_equal(*tokens)


@pytest.mark.slow
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
