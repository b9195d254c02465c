"""Figures from stored arrays: measured once, reused, aggregated, pooled or left out."""

import json
import math

import numpy as np
import pytest

from fsdfm_jax.data import tokenizer
from fsdfm_jax.evaluate import mauve, metrics, summary, tasks
from fsdfm_jax.evaluate.judges.scoring import Scores
from fsdfm_jax.training import recipe

TOKENIZER = tokenizer.train_bpe(["the people of the united states"] * 9, 260)
N, L = 7, 12
TOKENS_NL = np.random.default_rng(0).integers(1, 12, size=(N, L))
COUNTED_NL = np.random.default_rng(1).random((N, L)) < 0.7
EVERYTHING_NL = np.ones((N, L), bool)


class _Judge:
    """Scores by length and records its inputs."""

    def __init__(self, name, *, reads_ids=True, version=1):
        self.name, self.version = name, version
        self.tokenizer = TOKENIZER.fingerprint if reads_ids else None
        self.asked = []

    def describe(self):
        return {"name": self.name, "version": self.version}

    def score_ids(self, tokens_NL, counted_NL):
        self.asked.append("ids")
        tokens_N = counted_NL.sum(axis=1)
        nll_N = (tokens_NL * counted_NL).sum(axis=1) / self.version
        return Scores(nll_N.astype(float), tokens_N, 2 * tokens_N, 0 * tokens_N)

    def score_text(self, texts):
        self.asked.append("text")
        sizes_N = np.asarray([len(text.text.encode()) for text in texts])
        return Scores(1.5 * sizes_N, sizes_N - 1, sizes_N, np.ones_like(sizes_N))

    def features(self, texts):
        self.asked.append("features")
        return np.asarray([[len(text.text), 1.0] for text in texts], np.float32)


def _measured(judges=(), counted_NL=COUNTED_NL, **options):
    return summary.measure(TOKENS_NL, counted_NL, TOKENIZER, judges, **options)


def _aggregate(arrays, names=(), **options):
    return summary.aggregate(arrays, names, **({"resamples": 50} | options))


# ---------------------------------------------------------------------------------------- measuring
def test_what_is_measured_of_each_sample():
    main, other = _Judge("main"), _Judge("Some.Judge-1.Q4", reads_ids=False)
    arrays = _measured([main, other])
    np.testing.assert_array_equal(
        arrays["entropy_nats"], metrics.unigram_entropy(TOKENS_NL, COUNTED_NL)
    )
    for n in (1, 2, 3):
        expected = metrics.distinct(TOKENS_NL, n, COUNTED_NL)
        np.testing.assert_array_equal(arrays[f"distinct_{n}"], expected)
    np.testing.assert_array_equal(arrays["self_bleu"], metrics.self_bleu(TOKENS_NL, COUNTED_NL))
    texts = tasks.texts(TOKENS_NL, COUNTED_NL, TOKENIZER)
    expected = {
        "main.ids": main.score_ids(TOKENS_NL, COUNTED_NL),
        "main.text": main.score_text(texts),
        "Some.Judge-1.Q4.text": other.score_text(texts),
    }
    for name, scores in expected.items():
        for field, values in scores._asdict().items():
            np.testing.assert_array_equal(arrays[f"{name}.{field}"], values)
    assert str(arrays["main.digest"]) == recipe.digest(main.describe())
    own = {"entropy_nats", "distinct_1", "distinct_2", "distinct_3", "self_bleu"}
    scored = {f"{name}.{field}" for name in expected for field in Scores._fields}
    assert set(arrays) == own | scored | {"main.digest", "Some.Judge-1.Q4.digest"}


def test_scores_are_taken_over_from_the_same_judge():
    judge, added = _Judge("main"), _Judge("added", reads_ids=False)
    # As they come back from a file, with what else is stored there.
    before = _measured([judge]) | {"tokens": TOKENS_NL, "entropy_nats": np.zeros(N)}
    before["main.ids.nll"] = before["main.ids.nll"] + 1000.0
    judge.asked.clear()
    again = _measured([judge, added], known=before)
    assert judge.asked == []
    assert added.asked == ["text"]
    np.testing.assert_array_equal(again["main.ids.nll"], before["main.ids.nll"])
    assert str(again["main.digest"]) == str(before["main.digest"])
    # Cheap figures are recomputed, and nothing else is taken over.
    fresh = _measured([judge, added])
    assert set(again) == set(fresh)
    np.testing.assert_array_equal(again["entropy_nats"], fresh["entropy_nats"])


def _without(arrays, name):
    return {key: value for key, value in arrays.items() if key != name}


@pytest.mark.parametrize(
    "known",
    [
        lambda arrays: None,
        lambda arrays: {},
        lambda arrays: arrays | {"main.digest": np.asarray("0123")},
        lambda arrays: _without(arrays, "main.digest"),
        lambda arrays: _without(arrays, "main.ids.skipped"),
        lambda arrays: _without(arrays, "main.text.nll"),
        lambda arrays: arrays | {"main.text.nll": np.zeros(N + 1)},
    ],
)
def test_scores_of_another_judge_or_incomplete_ones_are_not(known):
    judge = _Judge("main")
    before = _measured([judge])
    judge.asked.clear()
    again = _measured([judge], known=known(before))
    assert judge.asked == ["ids", "text"]
    np.testing.assert_array_equal(again["main.text.nll"], before["main.text.nll"])
    judge.asked.clear()
    judge.version = 2
    _measured([judge], known=before)
    assert judge.asked == ["ids", "text"]


# -------------------------------------------------------------------------------------- aggregating
def test_figures_from_the_arrays_alone(tmp_path):
    judges = [_Judge("main"), _Judge("Some.Judge", reads_ids=False)]
    arrays = _measured(judges, EVERYTHING_NL)
    names = [judge.name for judge in judges]
    figures, judged = _aggregate(arrays, names)
    np.savez(tmp_path / "stored.npz", **arrays)
    with np.load(tmp_path / "stored.npz") as file:
        assert _aggregate(dict(file), names) == (figures, judged)
    assert json.loads(json.dumps([figures, judged])) == [figures, judged]

    entropy_N = arrays["entropy_nats"]
    expected = metrics.bootstrap(lambda v: np.mean(v, axis=-1), entropy_N, resamples=50)
    assert figures["entropy_nats"] == expected._asdict()
    assert figures["entropy_bits"]["low"] == pytest.approx(expected.low / math.log(2), rel=1e-12)
    means = ("distinct_1", "distinct_2", "distinct_3", "self_bleu")
    for name in means:
        assert figures[name]["value"] == pytest.approx(np.mean(arrays[name]), rel=1e-12)
    assert set(figures) == {"entropy_nats", "entropy_bits", *means}

    assert list(judged) == names
    assert judged["Some.Judge"]["ids"] is None
    nll, tokens, num_bytes, skipped = (arrays[f"main.ids.{field}"] for field in Scores._fields)
    found = judged["main"]["ids"]
    assert found["perplexity_a"]["value"] == pytest.approx(np.exp(nll / tokens).mean())
    assert found["perplexity_b"]["value"] == pytest.approx(math.exp(nll.sum() / tokens.sum()))
    assert found["perplexity_c"]["value"] == pytest.approx(math.exp((nll / tokens).mean()))
    assert found["nats_per_byte"]["value"] == pytest.approx(nll.sum() / num_bytes.sum())
    assert (found["tokens"], found["skipped"]) == (tokens.sum(), skipped.sum())
    assert judged["main"]["text"]["skipped"] == N
    assert all(figures[name]["count"] == N for name in figures)
    other = _aggregate(arrays, names, seed=1)[0]["entropy_nats"]
    assert other["value"] == figures["entropy_nats"]["value"]
    assert other != figures["entropy_nats"]


def test_samples_without_a_figure_are_left_out_and_seen():
    counted_NL = EVERYTHING_NL.copy()
    counted_NL[0] = False  # nothing was written
    counted_NL[1] = np.arange(L) < 1  # too short for an n-gram
    judge = _Judge("main")
    arrays = _measured([judge], counted_NL)
    figures, judged = _aggregate(arrays, ["main"])
    counts = {name: figures[name]["count"] for name in figures}
    assert counts == {
        "entropy_nats": N - 1,
        "entropy_bits": N - 1,
        "distinct_1": N - 1,
        "distinct_2": N - 2,
        "distinct_3": N - 2,
        "self_bleu": N - 1,
    }
    assert figures["distinct_2"]["value"] == pytest.approx(arrays["distinct_2"][2:].mean())
    found = judged["main"]["ids"]
    assert found["perplexity_a"]["count"] == found["nats_per_byte"]["count"] == N - 1
    rows = slice(1, None)
    nll, tokens = arrays["main.ids.nll"][rows], arrays["main.ids.tokens"][rows]
    assert found["perplexity_c"] == _estimate(metrics.perplexity_c, nll, tokens)

    alone = summary.measure(TOKENS_NL[:1], EVERYTHING_NL[:1], TOKENIZER, [])
    figures, _ = _aggregate(alone)
    assert figures["self_bleu"]["count"] == 0
    assert math.isnan(figures["self_bleu"]["value"])
    assert figures["entropy_nats"]["count"] == 1


def _estimate(statistic, *arrays):
    return metrics.bootstrap(statistic, *arrays, resamples=50)._asdict()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_judge_that_fails_is_not_hidden(wrong):
    """A bad sample makes only the figures of that judge and form nan; the row remains."""
    arrays = _measured([_Judge("main"), _Judge("other")], EVERYTHING_NL)
    figures, good = _aggregate(arrays, ["main", "other"])
    arrays["main.text.nll"] = np.where(np.arange(N) == 2, wrong, arrays["main.text.nll"])
    still, judged = _aggregate(arrays, ["main", "other"])
    assert still == figures
    assert judged["other"] == good["other"]
    assert judged["main"]["ids"] == good["main"]["ids"]
    found = judged["main"]["text"]
    for name in ("perplexity_a", "perplexity_b", "perplexity_c", "nats_per_byte"):
        numbers = [found[name][key] for key in ("value", "low", "high")]
        assert all(math.isnan(number) for number in numbers)
        assert found[name]["count"] == N - 1
    assert found["tokens"] == good["main"]["text"]["tokens"]
    # Without tokens there was nothing to fail on.
    arrays["main.text.tokens"] = np.where(np.arange(N) == 2, 0, arrays["main.text.tokens"])
    found = _aggregate(arrays, ["main"])[1]["main"]["text"]
    assert found["perplexity_b"]["count"] == N - 1
    assert np.isfinite(found["perplexity_b"]["high"])


def test_a_perplexity_may_overflow():
    arrays = _measured([_Judge("main")])
    arrays["main.text.nll"] = np.full(N, 1e6)
    found = _aggregate(arrays, ["main"])[1]["main"]["text"]
    assert found["perplexity_a"] == {"value": math.inf, "low": math.inf, "high": math.inf} | {
        "count": N
    }


def test_what_cannot_be_aggregated():
    arrays = _measured([_Judge("main")])
    with pytest.raises(ValueError, match="no scores of the judge 'other'"):
        _aggregate(arrays, ["main", "other"])
    with pytest.raises(ValueError, match="lack distinct_2; measure"):
        _aggregate(_without(arrays, "distinct_2"))


# -------------------------------------------------------------------------------------------- seeds
def test_repeats_over_seeds_are_pooled_by_sample():
    judge = _Judge("Some.Judge.text")
    parts = []
    for seed in range(3):
        tokens_NL = np.random.default_rng(seed).integers(1, 12, size=(N - seed, L))
        part = summary.measure(tokens_NL, np.ones_like(tokens_NL, bool), TOKENIZER, [judge])
        parts.append(part | {"tokens": tokens_NL, "step_times": np.zeros(4)})
    pooled = summary.pool(parts)
    assert set(pooled) == set(parts[0]) - {"tokens", "step_times"}
    for name in pooled:
        if name != "Some.Judge.text.digest":
            expected = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(pooled[name], expected)
    figures, judged = _aggregate(pooled, [judge.name])
    assert figures["self_bleu"]["count"] == 3 * N - 3
    values = np.concatenate([part["self_bleu"] for part in parts])
    assert figures["self_bleu"]["value"] == pytest.approx(values.mean(), rel=1e-12)
    assert judged[judge.name]["ids"]["tokens"] == (3 * N - 3) * L

    alone = summary.pool(parts[:1])
    assert _aggregate(alone, [judge.name]) == _aggregate(parts[0], [judge.name])


def test_what_one_of_the_repeats_lacks_is_left_out():
    both = _measured([_Judge("main"), _Judge("other")])
    one = _measured([_Judge("main")])
    for parts in ([both, one], [one, both]):
        pooled = summary.pool(parts)
        assert set(pooled) == set(one)
        with pytest.raises(ValueError, match="judge 'other'"):
            _aggregate(pooled, ["main", "other"])


def test_what_is_not_pooled():
    with pytest.raises(ValueError, match="at least one set"):
        summary.pool([])
    parts = [_measured([_Judge("main", version=version)]) for version in (1, 2)]
    with pytest.raises(ValueError, match="'main' differs between the parts"):
        summary.pool(parts)


# -------------------------------------------------------------------------------------------- MAUVE
def test_mauve_is_that_of_the_judges_features(monkeypatch):
    asked = []

    def score(features_ND, reference_ND, *, seed):
        asked.append((features_ND, reference_ND, seed))
        return metrics.Estimate(0.5, 0.25, 0.75, len(features_ND))

    monkeypatch.setattr(mauve, "score", score)
    judge, reference_ND = _Judge("main"), np.ones((5, 2), np.float32)
    for options in ({}, {"counted_NL": EVERYTHING_NL}):
        found = summary.mauve_score(TOKENS_NL, TOKENIZER, judge, reference_ND, seed=3, **options)
        assert found == {"value": 0.5, "low": 0.25, "high": 0.75, "count": N}
        features_ND, given_ND, seed = asked.pop()
        texts = tasks.texts(TOKENS_NL, EVERYTHING_NL, TOKENIZER)
        np.testing.assert_array_equal(features_ND, judge.features(texts))
        assert given_ND is reference_ND
        assert seed == 3


def test_mauve_is_left_out_where_text_was_given():
    judge = _Judge("main")
    one_given_NL = EVERYTHING_NL.copy()
    one_given_NL[3, 0] = False
    reference_ND = np.ones((50, 2), np.float32)
    options = {"counted_NL": one_given_NL}
    assert summary.mauve_score(TOKENS_NL, TOKENIZER, judge, reference_ND, **options) is None
    assert summary.mauve_score(TOKENS_NL, TOKENIZER, judge, None) is None
    assert judge.asked == []


def test_mauve_of_a_judge_that_fails(monkeypatch):
    judge = _Judge("main")
    features = judge.features
    broken_N1 = np.where(np.arange(N) == 4, math.nan, 1.0)[:, None]
    monkeypatch.setattr(judge, "features", lambda texts: features(texts) * broken_N1)
    found = summary.mauve_score(TOKENS_NL, TOKENIZER, judge, np.ones((50, 2), np.float32))
    assert found.pop("count") == N - 1
    assert all(math.isnan(number) for number in found.values())
    assert len(found) == 3


def test_the_stamp_of_intervals():
    said = summary.INTERVALS.format(level=summary.LEVEL, resamples=1000)
    assert said.startswith("95% percentile bootstrap over samples, 1000 resamples")
    assert "half-samples" in said
