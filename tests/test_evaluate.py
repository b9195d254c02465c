"""The whole evaluation: numbers recomputed from saved data, reuse of rows, stamps.

Networks are random and tiny; the tests check that the right samples are drawn, counted, scored and
stored.
"""

import collections
import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies

from configs import base
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.evaluate import draw, ngrams, stamps
from fsdfm_jax.evaluate import plan as plan_lib
from fsdfm_jax.evaluate.draw import Given
from fsdfm_jax.evaluate.engine import Evaluation
from fsdfm_jax.evaluate.judges import base as judges_base
from fsdfm_jax.evaluate.judges.scoring import Scores
from fsdfm_jax.evaluate.models import Subject
from fsdfm_jax.evaluate.plan import Point, Settings
from fsdfm_jax.evaluate.references import HeldOut
from fsdfm_jax.evaluate.report import reading
from fsdfm_jax.evaluate.results import Store
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.flow.schedules import Polynomial
from fsdfm_jax.flow.sources import Source
from fsdfm_jax.inference import bundle
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.stages import autoregressive

L = 6
TOKENIZER = tokenizer_lib.train_bpe(["the people of the united states"] * 9, 260)
V = TOKENIZER.vocab_size
PROCESS = Process(Polynomial(), Source(V), TOKENIZER.eos_id)


def _subject(label, stage, seed=0, process=PROCESS, **changes):
    fields = {"width": 8, "num_blocks": 1, "num_heads": 2, "cond_width": 4}
    model = ModelConfig(vocab_size=process.source.vocab_size, **(fields | changes))
    shapes = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), model))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), shapes
    )
    facts = {"run": label, "weights": "ema", "sha256": bundle.content_hash(params)}
    return Subject(label, stage, params, model, process, TOKENIZER, facts)


SUBJECTS = {
    "autoregressive": _subject("autoregressive", "autoregressive", causal=True),
    "pretrain": _subject("pretrain", "pretrain", 1),
    "distill": _subject("distill", "distill", 2, conditioning="additive"),
}
STAGES = {label: subject.stage for label, subject in SUBJECTS.items()}


class Models:
    """A catalogue of `SUBJECTS`."""

    tokenizer = TOKENIZER

    def __init__(self, **facts):
        self._facts = facts

    def facts(self, label, weights):
        return SUBJECTS[label].facts | self._facts

    def open(self, label, weights):
        return SUBJECTS[label]


@pytest.fixture(scope="module")
def judge():
    causal = SUBJECTS["autoregressive"]
    return judges_base.AutoregressiveJudge(
        causal.params, causal.model, TOKENIZER, metadata=causal.facts, batch_size=3
    )


class Words:
    """A judge with another tokenizer: each scored word costs its number of letters in nats."""

    name, tokenizer = "words", None

    def describe(self):
        return {"kind": "words"}

    def score_text(self, texts):
        kept = [
            text.text if text.spans is None else "".join(text.text[a:b] for a, b in text.spans)
            for text in texts
        ]
        words = [text.split() for text in kept]
        return Scores(
            np.asarray([sum(map(len, row)) for row in words], np.float64),
            np.asarray([len(row) for row in words]),
            np.asarray([len(text.encode()) for text in kept]),
            np.zeros(len(texts), np.int64),
        )


def _settings(**changes):
    config = base.get_config()
    small = {"num_samples": 5, "batch_size": 3, "steps": (1, 2), "many_steps": 4, "watched": 2}
    small |= {"resamples": 50, "bound_samples": 0, "jumps": ("cumulative",)}
    config.update_from_flattened_dict({f"eval.{k}": v for k, v in (small | changes).items()})
    return Settings.from_config(config.eval)


def _text(num_samples=5):
    rng = np.random.default_rng(5)
    blocks_NL = rng.integers(257, V, size=(2 * num_samples, L)).astype(np.int32)
    unigram_V = np.bincount(blocks_NL.ravel(), minlength=V) / blocks_NL.size
    parts = (blocks_NL[::2], blocks_NL[1::2], None, unigram_V, blocks_NL[0, :2])
    return HeldOut(*parts, "text", lambda: ngrams.fit(blocks_NL, V))


def _evaluation(folder, judges_, *, text=None, models_=None, **changes):
    settings = _settings(**changes)
    plan = plan_lib.plan(settings, STAGES, L)
    evaluation = Evaluation(
        settings,
        models_ or Models(),
        judges_,
        length=L,
        text=text or _text(),
        store=Store(folder),
    )
    return evaluation, plan


def _counting(monkeypatch):
    """How often each point's samples are drawn."""
    drawn = collections.Counter()
    plain = draw.draw

    def counted(point, *arguments, **options):
        drawn[point.slug] += 1
        return plain(point, *arguments, **options)

    monkeypatch.setattr(draw, "draw", counted)
    return drawn


def _without_times(rows):
    rows = json.loads(json.dumps(rows))
    for row in rows:
        del row["milliseconds_per_sample"], row["compile_seconds"]
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory, judge):
    """(folder, rows, plan) of an evaluation of everything."""
    folder = tmp_path_factory.mktemp("report")
    evaluation, plan = _evaluation(folder, [judge, Words()])
    return folder, evaluation.run(plan), plan


# ----------------------------------------------------------------------- numbers from what is saved
def _literal_nll(ids):
    causal = SUBJECTS["autoregressive"]
    losses = autoregressive.token_losses(
        causal.params, causal.model, TOKENIZER.eos_id, jnp.asarray([ids])
    )
    return np.asarray(losses, np.float64).sum()


def test_stamped_numbers_can_be_recomputed_from_the_saved_samples(finished):
    """With NumPy from the tokens and the judge's saved log-likelihoods."""
    folder, rows, plan = finished
    # Text, controls, autoregressive; the base model, its many steps among them; the few-step one.
    assert len(rows) == len(plan) == 1 + 4 + 1 + 3 + 2
    for row in rows:
        tokens_NL = np.load(folder / row["samples_file"])["tokens"]
        saved = np.load(folder / row["scores_file"])
        assert tokens_NL.shape == (5, L)
        assert tokens_NL.dtype == np.int32
        value = lambda name, row=row: row["figures"][name]["value"]
        shares = [np.unique(t, return_counts=True)[1] / L for t in tokens_NL]
        entropy = np.mean([-(p * np.log(p)).sum() for p in shares])
        assert value("entropy_nats") == pytest.approx(entropy, rel=1e-6, abs=1e-12)
        assert value("entropy_bits") == pytest.approx(entropy / np.log(2), rel=1e-6, abs=1e-12)
        for n in (1, 2, 3):
            grams = [{tuple(t[i : i + n]) for i in range(L - n + 1)} for t in tokens_NL]
            distinct = np.mean([len(found) / (L - n + 1) for found in grams])
            assert value(f"distinct_{n}") == pytest.approx(distinct, rel=1e-6)
        for form in ("ids", "text"):
            nll, tokens, num_bytes = (
                saved[f"autoregressive.{form}.{field}"] for field in ("nll", "tokens", "num_bytes")
            )
            found = row["judges"]["autoregressive"][form]
            assert found["tokens"] == tokens.sum()
            found = {k: v["value"] for k, v in found.items() if isinstance(v, dict)}
            each = nll[tokens > 0] / tokens[tokens > 0]
            assert found["perplexity_a"] == pytest.approx(np.exp(each).mean(), rel=1e-6)
            assert found["perplexity_c"] == pytest.approx(np.exp(each.mean()), rel=1e-6)
            pooled = np.exp(nll.sum() / tokens.sum())
            assert found["perplexity_b"] == pytest.approx(pooled, rel=1e-6)
            assert found["nats_per_byte"] == pytest.approx(nll.sum() / num_bytes.sum(), rel=1e-6)


def test_saved_log_likelihoods_are_the_judges_own(finished):
    folder, rows, _ = finished
    for row in (rows[0], rows[-1]):
        saved = np.load(folder / row["scores_file"])
        nll = [_literal_nll(ids) for ids in np.load(folder / row["samples_file"])["tokens"]]
        # float32 sums of six losses in another order
        np.testing.assert_allclose(saved["autoregressive.ids.nll"], nll, rtol=1e-5)
        assert (saved["autoregressive.ids.tokens"] == L).all()


def test_a_judge_of_another_tokenizer_reads_text(finished):
    folder, rows, _ = finished
    for row in rows:
        tokens_NL = np.load(folder / row["samples_file"])["tokens"]
        words = [TOKENIZER.decode(t.tolist()).split() for t in tokens_NL]
        pooled = sum(len(w) for row in words for w in row) / sum(map(len, words))
        found = row["judges"]["words"]
        assert found["ids"] is None
        assert found["text"]["perplexity_b"]["value"] == pytest.approx(math.exp(pooled), rel=1e-6)
    assert list(rows[0]["judges"]) == ["autoregressive", "words"]


def test_intervals_hold_their_values_between(finished):
    _, rows, _ = finished
    for row in rows:
        for name in ("entropy_nats", "distinct_1"):
            found = row["figures"][name]
            assert found["low"] <= found["value"] <= found["high"]
        found = row["judges"]["autoregressive"]["ids"]["perplexity_b"]
        assert found["low"] < found["value"] < found["high"] or row["run"] is None


def test_two_runs_give_the_same_numbers(finished, tmp_path, judge):
    _, rows, _ = finished
    evaluation, plan = _evaluation(tmp_path, [judge, Words()])
    assert _without_times(evaluation.run(plan)) == _without_times(rows)


# -------------------------------------------------------------------------- what is computed again
def test_a_finished_point_is_not_computed_again(finished, judge, monkeypatch):
    folder, rows, _ = finished
    drawn = _counting(monkeypatch)
    evaluation, plan = _evaluation(folder, [judge, Words()])
    before = (folder / "points.jsonl").read_bytes()
    assert json.dumps(evaluation.run(plan)) == json.dumps(rows)
    assert not drawn
    assert (folder / "points.jsonl").read_bytes() == before


def test_an_interrupted_evaluation_goes_on_with_the_next_point(
    finished, tmp_path, judge, monkeypatch
):
    _, rows, _ = finished
    evaluation, plan = _evaluation(tmp_path, [judge, Words()])
    evaluation.run(plan[:6])
    drawn = _counting(monkeypatch)
    evaluation, plan = _evaluation(tmp_path, [judge, Words()])
    assert _without_times(evaluation.run(plan)) == _without_times(rows)
    assert drawn == {point.slug: 1 for point in plan[6:]}


def test_a_further_judge_scores_the_samples_that_are_there(tmp_path, judge, monkeypatch):
    evaluation, plan = _evaluation(tmp_path, [judge])
    first = evaluation.run(plan)
    drawn = _counting(monkeypatch)
    evaluation, plan = _evaluation(tmp_path, [judge, Words()])
    second = evaluation.run(plan)
    assert not drawn
    for old, new in zip(first, second, strict=True):
        assert new["judges"]["autoregressive"] == old["judges"]["autoregressive"]
        assert new["milliseconds_per_sample"] == old["milliseconds_per_sample"]
        assert "words" in new["judges"]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 5},
        {"sampling.temperature": 0.5},
        {"sampling.top_p": 0.5},
        {"sampling.grid": "cosine"},
        {"num_samples": 4},
        {"batch_size": 2},
        {"task": "prefix:2"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_way_of_sampling_is_drawn_anew_beside_the_first(
    finished, judge, monkeypatch, changes
):
    folder, rows, plan = finished
    drawn = _counting(monkeypatch)
    text = _text(changes.get("num_samples", 5))
    evaluation, others = _evaluation(folder, [judge, Words()], text=text, **changes)
    assert evaluation.protocol(others[-1])["samples"] != rows[-1]["protocol"]["samples"]
    (row,) = evaluation.run(others[-1:])
    assert drawn == {others[-1].slug: 1}
    assert row["protocol"] == evaluation.protocol(others[-1])
    # The first ones are still there, and still found.
    plain, _ = _evaluation(folder, [judge, Words()])
    assert [row["slug"] for row in plain.finished(plan)] == [row["slug"] for row in rows]
    assert (folder / rows[-1]["samples_file"]).is_file()


def test_watching_more_samples_draws_none_anew(tmp_path, judge, monkeypatch):
    evaluation, plan = _evaluation(tmp_path, [judge], watched=0)
    (first,) = evaluation.run(plan[-1:])
    assert first["per_step"] is None
    assert first["figures"]["predictive_entropy_nats"] is None
    drawn = _counting(monkeypatch)
    evaluation, plan = _evaluation(tmp_path, [judge], watched=2)
    (second,) = evaluation.run(plan[-1:])
    assert not drawn
    assert len(second["per_step"]["entropy_nats"]) == 2
    assert second["figures"]["predictive_entropy_nats"]["count"] == 2
    assert second["judges"] == first["judges"]


def test_what_is_known_of_the_same_samples_is_taken_over(tmp_path, judge, monkeypatch):
    """With other resamples, then with the same traces: nothing is recomputed."""

    class Once(Words):
        asked = 0

        def score_text(self, texts):
            Once.asked += 1
            return super().score_text(texts)

    watched = collections.Counter()
    plain = draw.watch

    def counted(point, *arguments, count, **options):
        watched[count] += 1
        return plain(point, *arguments, count=count, **options)

    monkeypatch.setattr(draw, "watch", counted)
    rows = {}
    for changes in ({}, {"resamples": 60}, {"watched": 0}, {"watched": 1}, {"resamples": 70}):
        evaluation, plan = _evaluation(tmp_path, [Once()], **changes)
        (rows[str(changes)],) = evaluation.run(plan[-1:])
    assert Once.asked == 1
    assert watched == {2: 1, 1: 1}
    # All of them are still found, each with its own numbers.
    for changes in ({}, {"watched": 0}, {"watched": 1}):
        evaluation, plan = _evaluation(tmp_path, [Once()], **changes)
        (row,) = evaluation.finished(plan[-1:])
        assert json.dumps(row) == json.dumps(rows[str(changes)])
    assert len({row["scores_file"] for row in rows.values()}) == 5
    assert len({row["samples_file"] for row in rows.values()}) == 1


def test_a_point_killed_between_batches_goes_on_with_the_next_one(tmp_path, judge, monkeypatch):
    evaluation, plan = _evaluation(tmp_path, [judge], batch_size=1)
    plain = draw._inputs
    seen = []

    def dies_at_the_fourth(point, subject, given, batch_size, index):
        seen.append(index)
        if index == 3:
            raise KeyboardInterrupt
        return plain(point, subject, given, batch_size, index)

    with monkeypatch.context() as patch:
        patch.setattr(draw, "_inputs", dies_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            evaluation.run(plan[-1:])
    seen.clear()

    def watches(point, subject, given, batch_size, index):
        if batch_size == 1:
            seen.append(index)
        return plain(point, subject, given, batch_size, index)

    monkeypatch.setattr(draw, "_inputs", watches)
    evaluation, plan = _evaluation(tmp_path, [judge], batch_size=1, watched=0)
    (row,) = evaluation.run(plan[-1:])
    assert seen == [3, 4]
    whole, _ = _evaluation(tmp_path / "whole", [judge], batch_size=1, watched=0)
    (other,) = whole.run(plan[-1:])
    np.testing.assert_array_equal(
        *(np.load(f / row["samples_file"])["tokens"] for f in (tmp_path, tmp_path / "whole"))
    )
    assert row["figures"] == other["figures"]


def test_samples_are_kept_when_the_judge_fails(tmp_path, judge, monkeypatch):
    class Broken(Words):
        def score_text(self, texts):
            raise MemoryError

    evaluation, plan = _evaluation(tmp_path, [Broken()])
    with pytest.raises(MemoryError):
        evaluation.run(plan[-1:])
    drawn = _counting(monkeypatch)
    evaluation, plan = _evaluation(tmp_path, [judge])
    assert len(evaluation.run(plan[-1:])) == 1
    assert not drawn


def test_another_model_or_judge_is_another_protocol(tmp_path, judge):
    evaluation, plan = _evaluation(tmp_path, [judge])
    stamp = evaluation.protocol(plan[-1])
    other, _ = _evaluation(tmp_path, [judge], models_=Models(sha256="other"))
    assert other.protocol(plan[-1])["samples"] != stamp["samples"]
    other, _ = _evaluation(tmp_path, [])
    assert other.protocol(plan[-1])["samples"] == stamp["samples"]
    assert other.protocol(plan[-1]) != stamp
    # Real text doesn't depend on how models are sampled.
    cold, _ = _evaluation(tmp_path, [judge], **{"sampling.temperature": 0.5}, steps=(1,))
    assert cold.protocol(plan[0]) == evaluation.protocol(plan[0])


def test_the_stamp_says_what_the_number_depends_on(finished):
    _, rows, _ = finished
    stamp = rows[-1]["protocol"]
    samples = stamp["samples"]
    assert samples["sampling"]["draws"].startswith("two-level inverse CDF")
    names = {"steps", "jump", "grid", "temperature", "top_p", "seed", "weights", "batch_size"}
    assert names <= samples["sampling"].keys()
    assert samples["model"]["sha256"] == SUBJECTS["distill"].facts["sha256"]
    assert samples["num_samples"] == 5
    assert {"jax", "platform", "matmul_precision"} <= samples["numerics"].keys()
    assert [judge["kind"] for judge in stamp["scoring"]["judges"]][1] == "words"
    assert "bootstrap" in stamp["scoring"]["intervals"]
    assert samples["protocol"] == stamp["scoring"]["protocol"] == stamps.PROTOCOL_VERSION
    assert json.loads(json.dumps(stamp)) == stamp


# -------------------------------------------------------------------------------------------- seeds
def test_repeats_are_pooled_over_their_samples(tmp_path, judge):
    evaluation, plan = _evaluation(tmp_path, [judge])
    repeats = [dataclasses.replace(plan[-1], seed=seed) for seed in (1, 2, 3)]
    rows = evaluation.run([plan[0], *repeats])
    pooled = evaluation._pool(rows[1:])
    assert pooled["num_seeds"] == 3
    assert pooled["seeds"] == [1, 2, 3]
    assert pooled["protocol"].keys() == {point.slug for point in repeats}
    saved = [np.load(tmp_path / row["scores_file"]) for row in rows[1:]]
    nll = np.concatenate([one["autoregressive.ids.nll"] for one in saved]) / L
    found = pooled["judges"]["autoregressive"]["ids"]["perplexity_a"]
    assert found["value"] == pytest.approx(np.exp(nll).mean(), rel=1e-6)
    assert found["count"] == 15
    one = rows[1]["judges"]["autoregressive"]["ids"]["perplexity_a"]
    assert found["high"] - found["low"] < one["high"] - one["low"]
    assert pooled["per_step"]["entropy_nats"] == pytest.approx(
        np.mean([row["per_step"]["entropy_nats"] for row in rows[1:]], axis=0)
    )
    table = evaluation.report(tmp_path / "report", rows, {})
    assert len([line for line in table.splitlines() if line.startswith("distill")]) == 1
    assert len(json.loads((tmp_path / "report" / "results.json").read_text())["rows"]) == 4


# ----------------------------------------------------------------------------------------- controls
def test_controls():
    rng = np.random.default_rng(0)
    real_NL = rng.integers(5, 9, size=(30, 40)).astype(np.int32)
    frozen_NL = np.zeros(real_NL.shape, bool)
    frozen_NL[:, :10] = True
    unigram_V = np.float64([0, 0.5, 0.25, 0.25])
    sentence = np.int32([3, 4, 5])
    fitted = lambda: ngrams.fit(real_NL, 9)
    text = HeldOut(real_NL, None, None, unigram_V, sentence, "text", fitted)

    def make(name, frozen_NL=frozen_NL):
        return draw.control(name, text, frozen_NL, 1)

    for name in ("unigram", "shuffled", "repeated", "ngram"):
        np.testing.assert_array_equal(make(name)[:, :10], real_NL[:, :10])
        assert make(name).dtype == np.int32
    counts = np.bincount(make("unigram")[:, 10:].ravel(), minlength=4)
    assert_frequencies(counts, unigram_V)
    shuffled_NL = make("shuffled")
    assert (shuffled_NL != real_NL).any(1).all()
    np.testing.assert_array_equal(np.sort(shuffled_NL[:, 10:]), np.sort(real_NL[:, 10:]))
    repeated_NL = make("repeated", np.zeros(real_NL.shape, bool))
    assert (repeated_NL == np.resize([3, 4, 5], 40)).all()


def test_collapse_is_exposed_by_the_report(finished):
    """A repeated sentence and shuffled tokens against real text."""
    _, rows, _ = finished
    real = rows[0]
    controls = {row["setting"]: row for row in rows if row["kind"] == "control"}
    repeated, shuffled = controls["control-repeated"], controls["control-shuffled"]
    assert repeated["figures"]["self_bleu"]["value"] == pytest.approx(1.0)
    assert repeated["figures"]["entropy_bits"]["value"] < real["figures"]["entropy_bits"]["value"]
    for name in ("entropy_bits", "distinct_1"):
        assert shuffled["figures"][name]["value"] == pytest.approx(real["figures"][name]["value"])
    words = {row["group"]: {f.word for f in reading.findings(row, real)} for row in rows}
    assert {"control", "repeats"} <= words["repeated control"]
    assert "own judge" in words["autoregressive"]
    assert not any("own judge" in found for group, found in words.items() if group == "distill")


# ---------------------------------------------------------------------------------------- sampling
def _draw(point, *, count=5, batch_size=3, given=None):
    given = given or Given(np.zeros((count, L), np.int32), np.zeros((count, L), bool))
    return draw.draw(point, SUBJECTS[point.source], given, batch_size=batch_size)


def _point(**changes):
    fields = {"kind": "model", "group": "g", "source": "distill", "stage": "distill"}
    fields |= {"weights": "ema", "seed": 1}
    own = {field.name for field in dataclasses.fields(Point)}
    sampling = Sampling(**{"steps": 2} | {k: v for k, v in changes.items() if k not in own})
    return Point(**fields | {k: v for k, v in changes.items() if k in own}, sampling=sampling)


def test_one_program_for_all_temperatures_and_seeds():
    draw._compile.cache_clear()
    for temperature, cooling, seed in ((1.0, 0.0, 0), (0.7, 0.5, 1), (1.1, 0.2, 2)):
        _draw(_point(temperature=temperature, cooling=cooling, seed=seed))
    assert draw._compile.cache_info().misses == 1
    for changes in ({"steps": 1}, {"grid": "cosine"}, {"jump": "euler"}, {"top_p": 0.9}):
        before = draw._compile.cache_info().misses
        _draw(_point(**changes))
        assert draw._compile.cache_info().misses == before + 1


def test_samples_are_those_of_the_sampler():
    """The compiled sampler of the evaluation equals the plain sampler from the same noise."""
    point, subject = _point(steps=3), SUBJECTS["distill"]
    drawn = _draw(point, count=3)
    noise_key, sample_key = jax.random.split(jax.random.fold_in(jax.random.key(1), 0))
    x0_BL = PROCESS.source.sample(noise_key, (3, L))
    run = generate_lib.make_sampler(subject.model, PROCESS)
    wanted = run(subject.params, sample_key, x0_BL, np.zeros((3, L), bool), Sampling(3))
    np.testing.assert_array_equal(drawn.tokens_NL, wanted)


def test_the_remainder_is_kept_and_no_batch_comes_twice():
    hot = _point(temperature=2.0, steps=1)
    tokens_NL = _draw(hot, count=7).tokens_NL
    assert tokens_NL.shape == (7, L)
    assert len({tuple(row) for row in tokens_NL}) == 7
    np.testing.assert_array_equal(_draw(hot, count=5).tokens_NL, tokens_NL[:5])
    assert (_draw(_point(temperature=2.0, steps=1, seed=2)).tokens_NL != tokens_NL[:5]).any()


@pytest.mark.parametrize("source", ["distill", "autoregressive"])
def test_given_tokens_stay(source):
    frozen_NL = np.arange(L) < 3
    given = Given(np.full((5, L), 7, np.int32), np.broadcast_to(frozen_NL, (5, L)).copy())
    changes = {}
    if source == "autoregressive":
        changes = {"steps": L, "memory": "cache"}
    point = _point(source=source, stage=source, temperature=2.0, **changes)
    tokens_NL = _draw(point, given=given).tokens_NL
    assert (tokens_NL[:, :3] == 7).all()
    assert not (tokens_NL[:, 3:] == 7).all()


def test_watched_samples_end_as_the_samples_do():
    point, subject = _point(steps=3), SUBJECTS["distill"]
    given = Given(np.zeros((5, L), np.int32), np.zeros((5, L), bool))
    drawn_NL = _draw(point).tokens_NL
    watched = draw.watch(point, subject, given, drawn_NL, count=2)
    assert watched.entropy_RS.shape == watched.changed_RS.shape == (2, 3)
    assert (watched.entropy_RS > 0).all()
    np.testing.assert_allclose(watched.times_S, [0, 1 / 3, 2 / 3], rtol=1e-6)
    for row, path in enumerate(watched.trajectories):
        assert path.steps == (0, 1, 2, 3)
        np.testing.assert_allclose(path.times, [0, 1 / 3, 2 / 3, 1], rtol=1e-6)
        np.testing.assert_array_equal(path.tokens_TL[-1], drawn_NL[row])
        moved = (path.tokens_TL[1:] != path.tokens_TL[:-1]).mean(1)
        np.testing.assert_allclose(watched.changed_RS[row], moved, rtol=1e-6)


def test_many_steps_are_thinned_but_begin_and_end():
    point, subject = _point(steps=200), SUBJECTS["distill"]
    given = Given(np.zeros((1, L), np.int32), np.zeros((1, L), bool))
    watched = draw.watch(point, subject, given, given.tokens_NL, count=1)
    (path,) = watched.trajectories
    assert (path.steps[0], path.steps[-1]) == (0, 200)
    assert len(path.steps) == len(path.tokens_TL) == 65
    assert watched.entropy_RS.shape == (1, 200)


def test_what_an_autoregressive_model_drew_from():
    causal = SUBJECTS["autoregressive"]
    how = {"memory": "cache", "temperature": 0.5, "stage": "autoregressive"}
    point = _point(source="autoregressive", steps=L, **how)
    given = Given(np.zeros((2, L), np.int32), np.zeros((2, L), bool))
    given.frozen_NL[:, :2] = True
    drawn_NL = _draw(point, given=given).tokens_NL
    watched = draw.watch(point, causal, given, drawn_NL, count=2)
    logits = autoregressive.predict_next(
        causal.params, causal.model, TOKENIZER.eos_id, jnp.asarray(drawn_NL)
    )
    logits = np.asarray(model_lib.logits_lib.dense(logits), np.float64) / 0.5
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(watched.entropy_RS[:, 2:], entropy[:, 2:], rtol=1e-4)
    assert np.isnan(watched.entropy_RS[:, :2]).all()


def test_samples_are_not_drawn_with_truncated_noise(monkeypatch):
    """The far tail of the vocabulary comes up in an evaluation's samples as often as it should.

    65,535 tokens of probability 6e-8 each, together 0.4%: JAX's default Gumbel noise ends at 15.94
    and would draw a third of them, 6 standard errors too few (seen with it in place of ours).
    """
    size, rows, length = 65_536, 450, 40
    logits = np.r_[0.0, np.full(size - 1, -16.6)].astype(np.float32)
    constant = lambda params, model, x_BL, *times, frozen_BL: jnp.broadcast_to(
        jnp.asarray(logits)[None, None], (*x_BL.shape, size)
    )
    monkeypatch.setattr(model_lib, "predict", constant)
    # Its length gives a distinct program, which no other test has put into the cache.
    process = Process(Polynomial(), Source(size), TOKENIZER.eos_id)
    subject = SUBJECTS["distill"]._replace(process=process)
    given = Given(np.zeros((rows, length), np.int32), np.zeros((rows, length), bool))
    tokens_NL = draw.draw(_point(steps=1), subject, given, batch_size=10).tokens_NL
    found, total = int((tokens_NL > 0).sum()), rows * length
    tail = 1.0 - 1.0 / np.exp(logits.astype(np.float64)).sum()
    assert total * tail > 60
    assert_frequencies([total - found, found], [1 - tail, tail])


# ----------------------------------------------------------------------------------------- its time
def test_it_says_first_how_long_it_takes(tmp_path, judge, capsys, monkeypatch):
    """On stderr, after one point of each network and a second one of the first one's program."""
    drawn = _counting(monkeypatch)
    evaluation, plan = _evaluation(tmp_path, [judge], steps=(1, 2, 4))
    evaluation.run(plan[:3])
    capsys.readouterr()
    evaluation.run(plan)
    out, err = capsys.readouterr()
    lines, waiting = err.splitlines(), len(plan) - 3
    assert out == ""
    assert lines[0] == f"evaluating {len(plan)} points: 3 stored, {waiting} to compute"
    (told,) = [line for line in lines if "more points take about" in line]
    before = [line for line in lines[: lines.index(told)] if re.match("sampling .* took", line)]
    left = int(told.split()[0])
    assert left + len(before) == waiting
    assert [line.split()[1] for line in before] == list(drawn)[: len(before)]
    assert lines[-1].startswith(f"evaluating, points {waiting}/{waiting} took ")
    evaluation.run(plan)
    assert "to compute" not in capsys.readouterr().err
