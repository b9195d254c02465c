"""The result table: figures against literal NumPy, the judge, the rows, what is computed anew."""

import collections
import csv
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from fsdfm_jax import models, tokenizer, workdir
from fsdfm_jax.evaluate import judges, metrics, report, rows, suite
from fsdfm_jax.models import ModelConfig
from fsdfm_jax.schedules import Polynomial
from fsdfm_jax.sources import Source
from fsdfm_jax.stages import Process, autoregressive
from fsdfm_jax.workdir import Entry, Weights

L = 6
TOKENIZER = tokenizer.train_bpe(["the people of the united states"] * 9, 260)
V = TOKENIZER.vocab_size
PROCESS = Process(Polynomial(), Source(V), TOKENIZER.eos_id)


def _weights(stage, seed=0, **changes):
    model = ModelConfig(vocab_size=V, width=8, num_blocks=1, num_heads=2, cond_width=4, **changes)
    shapes = jax.eval_shape(lambda: models.init_params(jax.random.key(0), model))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), shapes
    )
    metadata = {"stage": stage, "run": stage, "weights": "params", "recipe": {"seed": 0}}
    return Weights(params, model, metadata, 10)


CAUSAL = _weights("autoregressive", causal=True)
FEW_STEP = _weights("distill", conditioning="additive")


@pytest.fixture(scope="module")
def judge():
    return judges.AutoregressiveJudge(CAUSAL, TOKENIZER, batch_size=3)


# ------------------------------------------------------------------------------------------ metrics
def test_entropy_of_known_rows():
    rows_NL = np.asarray([[5, 5, 5, 5], [0, 1, 2, 3], [1, 1, 2, 2], [7, 7, 7, 9]])
    quarter = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    expected = [0.0, math.log(4), math.log(2), quarter]
    np.testing.assert_allclose(metrics.unigram_entropy(rows_NL), expected, rtol=1e-12, atol=1e-12)
    assert metrics.unigram_entropy(rows_NL).dtype == np.float64
    assert math.log(2) * metrics.BITS_PER_NAT == pytest.approx(1.0, abs=1e-15)


def test_perplexities_of_known_numbers():
    nll, tokens = np.asarray([0.0, 4.0, 6.0]), np.asarray([2, 2, 3])
    assert metrics.perplexity_a(nll, tokens) == pytest.approx((1 + 2 * math.exp(2)) / 3, rel=1e-12)
    assert metrics.perplexity_b(nll, tokens) == pytest.approx(math.exp(10 / 7), rel=1e-12)


def test_a_is_never_below_b_for_texts_of_one_length():
    """Jensen: the mean of exponentials is at least the exponential of the mean."""
    nll = np.random.default_rng(0).gamma(2.0, 5.0, size=(50, 7))
    tokens = np.full(7, 4)
    for one in nll:
        assert metrics.perplexity_a(one, tokens) > metrics.perplexity_b(one, tokens)
    same = np.full(7, 8.0)
    assert metrics.perplexity_a(same, tokens) == pytest.approx(
        metrics.perplexity_b(same, tokens), rel=1e-12
    )


# -------------------------------------------------------------------------------------------- judge
_losses = jax.jit(
    lambda x1_BL: autoregressive.token_losses(CAUSAL.params, CAUSAL.model, TOKENIZER.eos_id, x1_BL)
)


def _literal_nll(ids):
    return np.asarray(_losses(np.asarray([ids], np.int32)), np.float64).sum()


# float32 sums of some ten losses of around 6 nats, in another order
CLOSE = {"rtol": 1e-5}


@pytest.mark.parametrize("count", [1, 3, 7])
def test_judge_sums_the_token_losses_of_every_row(judge, count):
    tokens_NL = np.random.default_rng(1).integers(V, size=(count, L))
    scores = judge.score_ids(tokens_NL)
    np.testing.assert_allclose(scores.nll, [_literal_nll(row) for row in tokens_NL], **CLOSE)
    np.testing.assert_array_equal(scores.tokens, np.full(count, L))
    assert scores.nll.dtype == np.float64


def test_judge_of_texts_ignores_padding_and_neighbours(judge):
    texts = ["the people", "", "of", "united states of the people of the united states"]
    scores = judge.score_text(texts)
    ids = TOKENIZER.encode_batch(texts)
    np.testing.assert_array_equal(scores.tokens, [len(i) for i in ids])
    assert scores.tokens[1] == 0
    assert scores.nll[1] == 0.0
    for nll, one in zip(scores.nll, ids, strict=True):
        if one:
            np.testing.assert_allclose(nll, _literal_nll(one), **CLOSE)
    # Longer than a bucket beside it: another width, the same scores.
    longer = judge.score_text([*texts, "people " * 100])
    np.testing.assert_allclose(longer.nll[:4], scores.nll, **CLOSE)


def test_judge_of_nothing(judge):
    scores = judge.score_text([])
    assert scores.nll.shape == scores.tokens.shape == (0,)


def test_only_left_to_right_networks_judge():
    with pytest.raises(ValueError, match="belong to stage 'distill'"):
        judges.AutoregressiveJudge(FEW_STEP, TOKENIZER)


# --------------------------------------------------------------------------------------------- plan
def _plan(pipeline, **changes):
    config = base.get_config()
    config.update_from_flattened_dict({f"eval.{key}": value for key, value in changes.items()})
    entries = [Entry(run, run.split("_2")[0], None) for run in pipeline]
    return rows.plan(config, entries, 128)


def test_plan_in_full():
    plan = _plan(
        ["autoregressive", "pretrain", "distill", "refine", "refine_2"],
        steps=(1, 4),
        many_steps=64,
        jumps=("cumulative", "euler"),
        few_step_jump="mixture",
    )
    assert plan == [
        ("held-out text", None, None, None),
        ("autoregressive", "autoregressive", 128, None),
        ("pretrain (cumulative)", "pretrain", 64, "cumulative"),
        ("pretrain (cumulative)", "pretrain", 1, "cumulative"),
        ("pretrain (cumulative)", "pretrain", 4, "cumulative"),
        ("pretrain (euler)", "pretrain", 1, "euler"),
        ("pretrain (euler)", "pretrain", 4, "euler"),
        ("distill", "distill", 1, "mixture"),
        ("distill", "distill", 4, "mixture"),
        ("refine", "refine", 1, "mixture"),
        ("refine", "refine", 4, "mixture"),
        ("refine_2", "refine_2", 1, "mixture"),
        ("refine_2", "refine_2", 4, "mixture"),
    ]
    assert [plan[0].slug, plan[1].slug, plan[2].slug] == [
        "real",
        "autoregressive-128steps",
        "pretrain-cumulative-64steps",
    ]
    assert len({spec.slug for spec in plan}) == len(plan)


def test_many_steps_among_the_steps_is_one_row():
    plan = _plan(["pretrain"], steps=(1, 8), many_steps=8, jumps=("cumulative", "cumulative"))
    assert [(spec.steps, spec.jump) for spec in plan[1:]] == [(8, "cumulative"), (1, "cumulative")]


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_repeated_steps_are_one_row(stage):
    plan = _plan([stage], steps=(1, 2, 1))
    assert len({spec.slug for spec in plan}) == len(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": (1, 0)}, "eval.steps must be at least 1"),
        ({"many_steps": 0}, "eval.many_steps must be at least 1"),
    ],
)
def test_plan_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        _plan(["pretrain"], **changes)


# --------------------------------------------------------------------------------------------- draw
SPEC = rows.RowSpec("distill", "distill", 2, "cumulative")


def _draw(spec=SPEC, weights=FEW_STEP, **changes):
    wanted = {"num_samples": 4, "batch_size": 3, "length": L, "seed": 1, "temperature": 1.0}
    return rows.draw(spec, weights, PROCESS, **(wanted | changes))


def test_draw_keeps_the_remainder_and_depends_on_the_seed():
    one = _draw()
    assert one.tokens.shape == (4, L)
    assert one.tokens.dtype == np.int32
    assert one.seconds_per_sample > 0
    np.testing.assert_array_equal(one.tokens, _draw().tokens)
    assert (one.tokens != _draw(seed=2).tokens).any()
    assert (one.tokens[:3] != _draw(temperature=0.1).tokens[:3]).any()
    hot = _draw(temperature=2.0)  # this network is rather sure of itself
    assert len({tuple(row) for row in hot.tokens}) == 4  # no batch is drawn twice
    assert _draw(num_samples=6).tokens.shape == (6, L)
    assert rows._compile.cache_info().misses == 1  # one program for all of these


def test_draw_of_the_same_noise_for_all_networks(monkeypatch):
    """The noise of a row is a matter of seed and batch, not of weights or jump."""
    seen = collections.defaultdict(list)

    def fake_compile(model, process, jump, steps, batch_size, length):
        def run(params, key, x0_BL, frozen_BL, grid_S1, temperature):
            seen[jump].append((jax.random.key_data(key), np.asarray(x0_BL)))
            return x0_BL

        return run, 0.0

    monkeypatch.setattr(rows, "_compile", fake_compile)
    for jump in ("euler", "mixture"):
        _draw(SPEC._replace(jump=jump), num_samples=5)
    assert len(seen["euler"]) == len(seen["mixture"]) == 2
    for (key, x0_BL), (other_key, other_BL) in zip(seen["euler"], seen["mixture"], strict=True):
        np.testing.assert_array_equal(key, other_key)
        np.testing.assert_array_equal(x0_BL, other_BL)
    assert (seen["euler"][0][1] != seen["euler"][1][1]).any()


def test_draw_of_an_autoregressive_run():
    spec = rows.RowSpec("autoregressive", "autoregressive", L, None)
    tokens = _draw(spec, CAUSAL, num_samples=2).tokens
    assert tokens.shape == (2, L)
    assert tokens.max() < V


# ------------------------------------------------------------------------------- figures and stamps
def test_figures_against_literal_numpy(judge, tmp_path):
    tokens_NL = np.random.default_rng(2).integers(1, V, size=(4, L)).astype(np.int32)
    rows.store(tmp_path, tokens_NL, {"protocol": {}} | rows.figures(tokens_NL, judge, TOKENIZER))
    saved = np.load(tmp_path / "samples.npy")
    row = json.loads((tmp_path / "row.json").read_text())
    nll = np.asarray([_literal_nll(ids) for ids in saved])
    texts = [TOKENIZER.encode(TOKENIZER.decode(ids.tolist())) for ids in saved]
    text_nll = sum(_literal_nll(ids) for ids in texts)
    assert row["perplexity_a"] == pytest.approx(np.exp(nll / L).mean(), rel=1e-6)
    b = math.exp(text_nll / sum(len(ids) for ids in texts))
    assert row["perplexity_b"] == pytest.approx(b, rel=1e-6)
    entropy = metrics.unigram_entropy(saved).mean()
    assert row["entropy_nats"] == pytest.approx(entropy, rel=1e-12)
    assert row["entropy_bits"] == pytest.approx(entropy / math.log(2), rel=1e-12)


def test_figures_without_judge():
    found = rows.figures(np.asarray([[1, 1], [1, 2]]), None, TOKENIZER)
    assert found["perplexity_a"] is None
    assert found["perplexity_b"] is None
    assert found["entropy_bits"] == pytest.approx(0.5)


def test_judge_is_the_last_autoregressive_run():
    entries = [Entry("autoregressive", "autoregressive", None), Entry("pretrain", "pretrain", None)]
    again = Entry("autoregressive_2", "autoregressive", None)
    assert suite.judge_run(entries) == "autoregressive"
    assert suite.judge_run([*entries, again]) == "autoregressive_2"
    assert suite.judge_run(entries[1:]) is None


def _stamp(spec=SPEC, weights=FEW_STEP, judge=CAUSAL, data="data", **changes):
    config = base.get_config()
    config.update_from_flattened_dict({f"eval.{key}": value for key, value in changes.items()})
    return rows.protocol(spec, config, weights, judge, data)


def _other(weights, metadata):
    return weights._replace(metadata=weights.metadata | metadata)


CHANGES = {
    "steps": {"spec": SPEC._replace(steps=4)},
    "jump": {"spec": SPEC._replace(jump="euler")},
    "seed": {"seed": 5},
    "temperature": {"temperature": 0.5},
    "num_samples": {"num_samples": 5},
    "batch_size": {"batch_size": 5},
    "weights": {"weights": FEW_STEP._replace(step=11)},
    "recipe": {"weights": _other(FEW_STEP, {"recipe": {"seed": 1}})},
    "average": {"weights": _other(FEW_STEP, {"weights": "ema"})},
    "judge": {"judge": CAUSAL._replace(step=11)},
    "judge's recipe": {"judge": _other(CAUSAL, {"recipe": {"seed": 1}})},
    "no judge": {"judge": None},
    "data": {"data": "other"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_row_is_computed_anew_under_another_protocol(tmp_path, change):
    stamp = _stamp()
    rows.store(tmp_path, np.zeros((2, L), np.int32), {"protocol": stamp, "value": 1})
    assert rows.load_finished(tmp_path, _stamp())["value"] == 1
    assert _stamp(**CHANGES[change]) != stamp
    assert rows.load_finished(tmp_path, _stamp(**CHANGES[change])) is None


def test_real_text_depends_on_little():
    spec = rows.RowSpec("held-out text", None, None, None)
    assert _stamp(spec, None) == _stamp(spec, None, temperature=0.5, seed=4, steps=(1,))
    assert _stamp(spec, None) != _stamp(spec, None, num_samples=5)
    assert _stamp(spec, None) != _stamp(spec, None, judge=None)


def test_half_a_row_is_no_row(tmp_path):
    assert rows.load_finished(tmp_path, {}) is None
    rows.store(tmp_path, np.zeros((2, L), np.int32), {"protocol": {}})
    (tmp_path / "samples.npy").unlink()
    assert rows.load_finished(tmp_path, {}) is None


# ------------------------------------------------------------------------------------------- report
def _row(spec, **figures):
    values = {
        "perplexity_a": 12.5,
        "perplexity_b": 1234.5,
        "entropy_nats": 2.0,
        "entropy_bits": 2.0 * metrics.BITS_PER_NAT,
        "milliseconds_per_sample": 3.25,
        "compile_seconds": 1.0,
    }
    return spec._asdict() | {"slug": spec.slug, "protocol": {"seed": 1}} | values | figures


TEXT = rows.RowSpec("held-out text", None, None, None)
NO_COST = {"milliseconds_per_sample": None, "compile_seconds": None}
NO_JUDGE = {"perplexity_a": None, "perplexity_b": None}


@pytest.mark.parametrize("figures", [{}, NO_JUDGE], ids=["judge", "no judge"])
def test_report_files_parse(tmp_path, figures):
    specs = [TEXT, SPEC, SPEC._replace(steps=4)]
    table_rows = [_row(TEXT, **NO_COST, **figures)] + [_row(s, **figures) for s in specs[1:]]
    samples = {s.slug: np.full((5, L), 10 + i, np.int32) for i, s in enumerate(specs)}
    report.write(tmp_path / "report", table_rows, samples, TOKENIZER, {"device": "1 x test"})

    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["device"] == "1 x test"
    assert results["rows"] == json.loads(json.dumps(table_rows))
    with open(tmp_path / "report" / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["group"] for line in lines] == [row["group"] for row in table_rows]
    assert list(lines[0]) == list(report.COLUMNS)
    assert [line["steps"] for line in lines] == ["", "2", "4"]
    assert (tmp_path / "report" / "results.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report" / "samples.txt").read_text()
    for spec, tokens_NL in zip(specs, samples.values(), strict=True):
        title = spec.group + (f", {spec.steps} steps" if spec.steps else "")
        assert title in text
        assert TOKENIZER.decode(tokens_NL[0].tolist()) in text
    assert text.count("[1] ") == 3
    assert not list((tmp_path / "report").glob(".*"))


def test_table_has_every_row_aligned():
    table_rows = [_row(TEXT, **NO_COST), _row(SPEC), _row(SPEC._replace(steps=16), **NO_JUDGE)]
    lines = report.table(table_rows).splitlines()
    assert len(lines) == 2 + 3
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:2] == ["model", "steps"]
    assert lines[2].split()[-1] == "-"  # text costs nothing
    assert lines[3].split() == ["distill", "2", "12.50", "1,234", "2.89", "2.00", "3.25"]
    assert lines[4].split()[1:4] == ["16", "-", "-"]
    assert workdir.digest(table_rows) == workdir.digest(table_rows)
