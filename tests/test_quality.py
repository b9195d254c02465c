"""Recipes at equal compute and equal entropy: what they cost, and how the table is made."""

import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import app
from absl.testing import flagsaver

from benchmarks import measure, quality
from configs import quality as recipes
from fsdfm_jax import stages
from fsdfm_jax.flow import process as process_lib
from fsdfm_jax.network import model as model_lib

TRAINED = [name for name in recipes.RECIPES if name != "base"]


# ------------------------------------------------------------------------------------------ compute
@pytest.mark.parametrize("size", recipes.SIZES)
@pytest.mark.parametrize("recipe", TRAINED)
def test_a_recipe_spends_its_budget_and_no_more(recipe, size):
    config = recipes.get_config(f"{recipe},{size}")
    spent, budget = recipes.evaluations(config), recipes.SIZES[size].evaluations
    assert spent <= budget
    assert spent > 0.95 * budget


@pytest.mark.parametrize("recipe", TRAINED)
def test_evaluations_of_a_training_step_are_those_that_are_made(recipe, monkeypatch):
    config = recipes.get_config(f"{recipe},smoke")
    stage_name = config.pipeline.split(",")[-1]
    process = process_lib.make_process(config.path, num_tokens=512, eos_id=0)
    stage = stages.make_stage(stage_name, config, process)
    own = config[stage_name]
    trained, frozen_rows = [], []
    predict = model_lib.predict

    def counting(params, cfg, x_BL, t_B, h_B=None, *, key=None):
        (frozen_rows if key is None else trained).append(len(x_BL))
        return predict(params, cfg, x_BL, t_B, h_B, key=key)

    monkeypatch.setattr(model_lib, "predict", counting)
    params = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), stage.model))
    x1 = jax.ShapeDtypeStruct((own.batch_size, 64), np.int32)
    frozen = stages.Frozen(params)
    jax.eval_shape(stage.loss, params, frozen, jax.random.key(0), {"x1": x1})
    # The backward pass is twice the forward pass.
    want = (3 * sum(trained) + sum(frozen_rows)) / own.batch_size
    assert recipes.row_evaluations(config, stage_name) == pytest.approx(want)


def test_pairs_count_with_the_steps_of_their_sampler():
    config = recipes.get_config("rect3")
    without = recipes.get_config("rect3")
    without.refine.num_pairs = 0
    pairs = 3 * config.refine.num_pairs * config.refine.pair_steps
    assert recipes.evaluations(config) - recipes.evaluations(without) == pairs
    assert 0.4 < pairs / recipes.SIZES["cpu"].evaluations < 0.6


def test_the_papers_recipe_differs_from_ours_where_it_says():
    paper, ours = recipes.get_config("paper").distill, recipes.get_config("heun").distill
    assert (paper.teacher_rule, paper.teacher_jump, paper.teacher_end) == (
        "rk4",
        "cumulative",
        "literal",
    )
    assert paper.width_weights == "official"
    assert recipes.get_config("paper").model.conditioning == "official"
    assert (ours.teacher_rule, ours.teacher_jump, ours.teacher_end) == (
        "heun",
        "mixture",
        "posterior_draw",
    )
    # What is scaled to minutes is the same for both.
    for key in ("batch_size", "learning_rate", "ema_decay", "max_log2_steps", "tau"):
        assert paper[key] == ours[key], key


# ------------------------------------------------------------------------------------ equal entropy
@pytest.mark.parametrize("exact", [0.31, 0.8, 0.995, 1.0, 1.3, 3.0])
def test_the_temperature_of_an_entropy_is_found(exact):
    asked = []

    def entropy(temperature):
        asked.append(temperature)
        return 6.0 + 0.5 * math.log(temperature / exact)

    found = quality.search(entropy, 6.0)
    assert entropy(found) == pytest.approx(6.0, rel=0.003)
    assert len(asked) < 20
    assert len(set(asked[:-1])) == len(asked) - 1  # no temperature is sampled at twice


@pytest.mark.parametrize("entropy", [lambda t: 5.0, lambda t: 7.0, lambda t: 5.0 + 0.1 * t])
def test_an_entropy_that_no_temperature_gives_is_said(entropy):
    assert quality.search(entropy, 6.0) is None


def test_a_temperature_is_searched_for_once(tmp_path):
    path, asked = tmp_path / "temperatures.json", []

    def search(value):
        asked.append(value)
        return value

    for depends_on, value in (["a", 0.5], ["b", None], ["a", 0.7], ["b", 0.9], ["c", 1.5]):
        quality.matched(path, lambda value=value: search(value), depends_on)
    assert asked == [0.5, None, 1.5]
    assert sorted(map(str, json.loads(path.read_text()).values())) == ["0.5", "1.5", "None"]


# -------------------------------------------------------------------------------------------- table
def record(recipe, steps, seed, entropy=6.0, **figures):
    values = {
        "sampler": "plain",
        "temperature": 1.0,
        "distinct_2": 0.9,
        "self_bleu": 0.1,
        "mauve": None,
    }
    return {"recipe": recipe, "steps": steps, "seed": seed, "entropy": entropy} | values | figures


def test_the_table_is_in_units_of_the_reference():
    records = [
        record("reference", 1024, 0, **{"ppl a": 100.0, "ppl b": 10.0}),
        record("reference", 1024, 1, **{"ppl a": 400.0, "ppl b": 10.0}),
        record("heun", 8, 0, 6.06, **{"ppl a": 100.0, "ppl b": 30.0, "distinct_2": 0.8}),
        record("heun", 8, 1, 6.06, **{"ppl a": 400.0, "ppl b": 30.0}),
        record("heun", 1, 0, **{"ppl a": 800.0, "ppl b": 10.0}),
        {"recipe": "heun", "sampler": "plain", "steps": 1, "seed": 1},
        {"recipe": "paper", "sampler": "plain", "steps": 8, "seed": 0},
    ]
    reference, heun, one, paper = quality.summarise(records)
    assert reference["ppl a"] == pytest.approx(1.0)
    assert reference["range a"] == "0.50-2.00"
    assert heun["ppl a"] == pytest.approx(1.0)
    assert heun["ppl b"] == pytest.approx(3.0)
    assert heun["H"] == pytest.approx(1.01)
    assert heun["distinct_2"] == pytest.approx(0.85)
    assert one["seeds"] == "1 of 2"
    assert one["ppl a"] == pytest.approx(4.0)
    assert paper["seeds"] == "0 of 1"
    assert paper["ppl a"] is paper["T"] is paper["H"] is None
    assert "| paper | plain | 8 | 0 of 1 | - | - |" in quality.markdown([heun, paper])


# -------------------------------------------------------------------------------------- the command
@pytest.mark.usefixtures("parsed_flags")
@pytest.mark.parametrize("given", ["2,x", "0", "-1,2", "1.5", "4,,8"])
def test_what_is_no_number_of_steps_is_said_before_anything_is_trained(given, monkeypatch):
    monkeypatch.setattr(quality, "train_all", lambda *_: pytest.fail("trained"))
    with (
        flagsaver.as_parsed(study="unused", few_steps=given),
        pytest.raises(app.UsageError, match="--few_steps takes whole numbers of at least 1"),
    ):
        quality.main(["quality"])


@pytest.mark.usefixtures("parsed_flags")
def test_numbers_of_a_flag():
    with flagsaver.as_parsed(few_steps="2, 8", trainings="0,2"):
        assert measure.numbers(quality._STEPS, least=1) == [2, 8]
        assert measure.numbers(quality._SEEDS, least=0) == [0, 2]
    assert measure.numbers(quality._STEPS, least=1) == []


@pytest.mark.slow
def test_the_whole_study_on_a_small_scale(tmp_path):
    command = [sys.executable, "-m", "benchmarks.quality", f"--study={tmp_path}", "--scale=smoke"]
    command += ["--trainings=0", "--compare=paper,rect3", "--samples=8", "--few_steps=2,8"]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    found = json.loads((tmp_path / "result/quality.json").read_text())
    assert {row["recipe"] for row in found["table"]} == {
        "reference",
        "held-out text",
        quality.NGRAMS,
        "pretrain",
        "paper",
        "rect3",
    }
    rows = [row for row in found["table"] if row["recipe"] == "paper"]
    assert [(row["sampler"], row["steps"]) for row in rows] == [
        (sampler, steps) for sampler in recipes.SAMPLERS for steps in (2, 8)
    ]
    assert all(abs(row["H"] - 1) < 0.05 for row in rows if row["H"])
    assert (tmp_path / "result/quality.png").stat().st_size > 5_000
    samples = (tmp_path / "result/samples.md").read_text()
    assert "## rect3, 8 steps" in samples
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "result/quality.json").read_text())["table"] == found["table"]
    assert "sampling" not in again.stderr
