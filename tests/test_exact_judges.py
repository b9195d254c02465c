"""Exact judges in the evaluation: good, bad and gamed samples."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_law

from configs import base
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.evaluate import exact_judges, ngrams
from fsdfm_jax.evaluate import plan as plan_lib
from fsdfm_jax.evaluate.engine import Evaluation
from fsdfm_jax.evaluate.models import Subject
from fsdfm_jax.evaluate.plan import Settings
from fsdfm_jax.evaluate.references import HeldOut
from fsdfm_jax.evaluate.results import Store
from fsdfm_jax.exact import documents, grids, hmm, hmm_judge, sudoku
from fsdfm_jax.exact.intervals import Figure
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.schedules import Polynomial
from fsdfm_jax.flow.sources import Source
from fsdfm_jax.inference import bundle
from fsdfm_jax.network.config import ModelConfig

FOUR, SIX = sudoku.get_size("4x4"), sudoku.get_size("6x6")
DIGITS = tokenizer_lib.from_json(documents.sudoku_tokenizer(FOUR), "digits")
LAW = tiny_law.make(num_states=6, num_words=12)
LENGTH = 48


def _grids(count, seed=0, size=FOUR):
    cells = grids.sample(size, np.random.default_rng(seed), count)
    return np.pad(cells.astype(np.int32), [(0, 0), (0, 1)], constant_values=size.eos_id)


def _texts(count, seed=0, law=LAW):
    return hmm.sample(law, np.random.default_rng(seed), count, LENGTH)


def _judge(judge, tokens_NL, frozen_NL=None):
    frozen_NL = np.zeros(tokens_NL.shape, bool) if frozen_NL is None else frozen_NL
    return judge.judge(tokens_NL, frozen_NL, resamples=20)


def _words(judge, tokens_NL):
    return [found["word"] for found in _judge(judge, tokens_NL)["findings"]]


# ------------------------------------------------------------------------------------------- Sudoku
def test_uniform_grids_are_valid_and_nothing_is_said_of_them():
    verdict = _judge(exact_judges.SudokuJudge(FOUR), _grids(400))
    assert verdict["judge"] == "4x4 Sudoku"
    assert verdict["findings"] == []
    assert verdict["figures"]["valid"]["value"] == verdict["figures"]["groups"]["value"] == 1.0
    assert verdict["figures"]["valid"]["low"] > 0.98
    assert abs(verdict["figures"]["pairs_z"]["value"]) < 5
    expected = verdict["expected"]["total_variation"]
    assert verdict["figures"]["total_variation"]["value"] == pytest.approx(expected, abs=0.1)
    assert "solved" not in verdict["figures"]


@pytest.mark.parametrize(("size", "kinds"), [(FOUR, 1), (FOUR, 8), (SIX, 1), (SIX, 8)])
def test_repeated_grids_are_exposed(size, kinds):
    tokens = np.resize(_grids(kinds, size=size), (200, size.block_length))
    judge = exact_judges.SudokuJudge(size)
    assert _judge(judge, tokens)["figures"]["valid"]["value"] == 1.0
    assert _words(judge, tokens) == ["copies", "not uniform"]


def test_invalid_grids_count_and_given_cells_make_puzzles():
    tokens = _grids(10)
    tokens[:4, 0] = (tokens[:4, 0] + 1) % 4
    frozen = np.zeros(tokens.shape, bool)
    frozen[:, 3:9] = True
    figures = _judge(exact_judges.SudokuJudge(FOUR), tokens, frozen)["figures"]
    assert figures["valid"]["value"] == figures["solved"]["value"] == 0.6
    # A cell is in a row, a column and a box.
    assert figures["groups"]["value"] == pytest.approx(1 - 4 * 3 / (10 * 12))


# ------------------------------------------------------------------------------------------ the law
def test_text_of_the_law_has_its_entropy_and_nothing_is_said_of_it():
    verdict = _judge(exact_judges.LawJudge(LAW), _texts(300))
    assert verdict["findings"] == []
    low, high = (verdict["figures"]["excess"][end] for end in ("low", "high"))
    assert low - 0.02 < 0 < high + 0.02
    assert verdict["figures"]["kl_2"]["value"] == pytest.approx(
        verdict["expected"]["kl_2"], abs=0.02
    )


@pytest.mark.parametrize("kinds", [1, 8])
def test_repeated_texts_are_exposed(kinds):
    tokens = np.resize(_texts(kinds), (200, LENGTH))
    assert "copies" in _words(exact_judges.LawJudge(LAW), tokens)


def test_sharpened_text_is_exposed_and_bad_text_is_only_bad():
    law = tiny_law.sharpened(LAW)
    judge = exact_judges.LawJudge(LAW)
    assert {"sharpened", "low entropy"} <= set(_words(judge, _texts(300, law=law)))
    noise = np.random.default_rng(0).integers(LAW.vocab_size, size=(300, LENGTH))
    verdict = _judge(judge, noise)
    assert verdict["findings"] == []
    assert verdict["figures"]["excess"]["low"] > 0.1


def test_errors_do_not_hide_that_text_is_sharpened():
    """As a few-step model's: unlikely as a whole, but its bigrams are likely and too uniform."""
    law = {"nll": (4.0, 0.01), "entropy_2": (3.2, 0.01), "kl_2": (1.0, 0.01)}
    law |= {f"{name}_{k}": (1.0, 1.0) for name in ("entropy", "kl") for k in (1, 3)}
    values = {name: mean for name, (mean, _) in law.items()} | {"nll": 4.1, "entropy_2": 3.1}
    flags = {"nll": "higher", "entropy_2": "lower"}

    def words(**changes):
        figures = {name: Figure(value, 0, 0, 64) for name, value in (values | changes).items()}
        more = {name: "" for name in changes}
        report = hmm_judge.Report(figures, law, flags | more)
        return [found["word"] for found in exact_judges._exposed(report)]

    assert words() == ["low entropy"]
    assert words(kl_2=1.2) == []  # merely bad: unlikely bigrams


def test_what_cannot_be_judged_is_left_out():
    judge, tokens = exact_judges.LawJudge(LAW), _texts(4)
    assert judge.judge(tokens, np.arange(LENGTH)[None] < np.full((4, 1), 5), resamples=5) is None
    assert _judge(judge, tokens[:1]) is None
    assert _judge(judge, tokens[:, :2]) is None


# ------------------------------------------------------------------------------ who the judge is
def test_the_judge_of_a_task(tmp_path):
    assert exact_judges.find(DIGITS, 17, "").name == "4x4 Sudoku"
    text = tokenizer_lib.train_bpe(["the people of the united states"] * 9, 260)
    assert exact_judges.find(text, 17, "") is None
    with pytest.raises(ValueError, match=r"4x4 Sudoku, which needs .* 17 tokens, got 37.*9x9"):
        exact_judges.find(DIGITS, 37, "")
    LAW.save(tmp_path / "law.npz")
    names = tokenizer_lib.from_json(documents.hmm_tokenizer(LAW), "names")
    found = exact_judges.find(names, LENGTH, str(tmp_path / "law.npz"))
    assert found.describe() == exact_judges.LawJudge(LAW).describe()
    with pytest.raises(ValueError, match=r"eval\.law: .*law of 13 tokens, but the models have 5"):
        exact_judges.find(DIGITS, 17, str(tmp_path / "law.npz"))
    with pytest.raises(ValueError, match=r"eval\.law: no law in .*fsdfm_jax\.exact"):
        exact_judges.find(names, LENGTH, str(tmp_path / "none.npz"))


# ------------------------------------------------------------------------------------- evaluations
class Models:
    """A single untrained base model."""

    tokenizer = DIGITS
    num_params = {"pretrain": 1}  # noqa: RUF012

    def __init__(self):
        model = ModelConfig(vocab_size=5, width=8, num_blocks=1, num_heads=2, cond_width=4)
        shapes = bundle.expected_shapes(model)
        rng = np.random.default_rng(0)
        params = bundle.unflatten({k: 0.3 * rng.normal(size=v) for k, v in shapes.items()})
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
        facts = {"run": "pretrain", "weights": "ema", "sha256": "x"}
        process = Process(Polynomial(), Source(5), FOUR.eos_id)
        self._subject = Subject("pretrain", "pretrain", params, model, process, DIGITS, facts)

    def facts(self, label, weights):
        return self._subject.facts

    def open(self, label, weights):
        return self._subject


def _settings(**changes):
    config = base.get_config()
    small = {"num_samples": 64, "batch_size": 64, "steps": (1,), "many_steps": 1, "watched": 0}
    small |= {"resamples": 20, "bound_samples": 0, "jumps": ("cumulative",)}
    small |= {"controls": ("one", "few", "cold")}
    config.update_from_flattened_dict({f"eval.{k}": v for k, v in (small | changes).items()})
    return Settings.from_config(config.eval)


def _evaluate(folder, exact=None, **changes):
    settings, blocks = _settings(**changes), _grids(64)
    text = HeldOut(
        blocks, None, None, np.full(5, 0.2), blocks[0, :4], "text", lambda: ngrams.fit(blocks, 5)
    )
    exact = exact or exact_judges.SudokuJudge(FOUR)
    plan = plan_lib.plan(settings, {"pretrain": "pretrain"}, 17)
    evaluation = Evaluation(
        settings, Models(), [], length=17, text=text, store=Store(folder), exact=exact
    )
    return evaluation, plan


def test_a_report_of_sudoku(tmp_path):
    evaluation, plan = _evaluate(tmp_path)
    rows = {row["slug"]: row for row in evaluation.run(plan)}
    table = evaluation.report(tmp_path, list(rows.values()), {})
    by_name = {row["setting"]: row["exact"] for row in rows.values()}
    assert by_name["real"]["findings"] == []
    for name in ("control-one", "control-few"):
        assert by_name[name]["figures"]["valid"]["value"] == 1.0
        assert [f["word"] for f in by_name[name]["findings"]] == ["copies", "not uniform"]
    assert by_name["control-one"]["figures"]["distinct"]["value"] == 1 / 64
    assert by_name["control-few"]["figures"]["distinct"]["value"] == 8 / 64
    (cold,) = (row for row in rows.values() if row["temperature"] == plan_lib.COLD_TEMPERATURE)
    assert cold["protocol"]["scoring"]["exact"] == {"kind": "sudoku", "size": "4x4", "version": 1}
    assert "Judged exactly, by 4x4 Sudoku." in table
    assert "\n\nThe first samples of pretrain, 1 step, seed " in table
    lines = table.splitlines()
    (head,) = (line.split() for line in lines if line.startswith("model "))
    assert {"valid", "groups", "TV", "distinct"} <= set(head)
    assert "perplexity" not in head
    assert any("T=0.5" in line and "T<1" in line for line in lines)
    with open(tmp_path / "results.csv") as file:
        lines = {line["setting"]: line for line in csv.DictReader(file)}
    assert float(lines["control-one"]["exact_valid"]) == 1.0
    assert float(lines["control-one"]["exact_valid_low"]) > 0.9
    assert "distinct; expected if uniform" in lines["control-few"]["flags"]
    assert "exact: valid" in (tmp_path / "report.html").read_text()
    # Nothing is computed again, and what isn't known comes back as it was.
    again, plan = _evaluate(tmp_path)
    stored = {row["slug"]: row for row in again.run(plan)}
    assert json.dumps(stored) == json.dumps(rows)


def test_another_judge_judges_the_samples_that_are_there(tmp_path):
    class Other(exact_judges.SudokuJudge):
        def describe(self):
            return super().describe() | {"version": 2}

    evaluation, plan = _evaluate(tmp_path)
    first = evaluation.run(plan)
    evaluation, plan = _evaluate(tmp_path, Other(FOUR))
    second = evaluation.run(plan)
    for one, two in zip(first, second, strict=True):
        assert one["protocol"]["samples"] == two["protocol"]["samples"]
        assert one["protocol"]["scoring"] != two["protocol"]["scoring"]
        assert one["samples_file"] == two["samples_file"]


def test_repeats_over_seeds_are_judged_together(tmp_path):
    evaluation, plan = _evaluate(tmp_path)
    points = [point for point in plan if point.kind == "model"][:1]
    rows = evaluation.run([dataclasses.replace(points[0], seed=seed) for seed in (1, 2)])
    pooled = evaluation._pool(rows)
    assert pooled["exact"]["figures"]["valid"]["count"] == 128
    each = [row["exact"]["figures"]["groups"]["value"] for row in rows]
    assert pooled["exact"]["figures"]["groups"]["value"] == pytest.approx(np.mean(each))
