"""Figures against worked examples and naive implementations."""

import collections
import itertools
import math

import numpy as np
import pytest

from fsdfm_jax.evaluate import metrics

pytestmark = pytest.mark.filterwarnings("error")


def _mean(values):
    return np.mean(values, axis=-1)


# ---------------------------------------------------------------------------------------- bootstrap
def test_bootstrap_against_literal_resampling():
    rng = np.random.default_rng(3)
    nll, tokens = rng.gamma(3.0, 20.0, size=40), rng.integers(5, 30, size=40)
    estimate = metrics.bootstrap(metrics.perplexity_b, nll, tokens, resamples=200, seed=7)
    draws = np.random.default_rng(7)
    values = []
    for _ in range(200):
        rows = draws.integers(40, size=40)
        values.append(math.exp(nll[rows].sum() / tokens[rows].sum()))
    values.sort()
    expected = (math.exp(nll.sum() / tokens.sum()), values[4], values[-5], 40)
    np.testing.assert_allclose(estimate, expected, rtol=1e-12)


def test_bootstrap_does_not_depend_on_how_much_is_held(monkeypatch):
    values = np.random.default_rng(0).normal(size=30)
    whole = metrics.bootstrap(_mean, values)
    monkeypatch.setattr(metrics, "_HELD_INDICES", 70)
    assert metrics.bootstrap(_mean, values) == whole
    assert metrics.bootstrap(_mean, values, seed=1) != whole


def test_bootstrap_covers_a_known_mean():
    """Of 400 intervals of 95% for the mean of 60 normal numbers some 380 hold it.

    The percentile interval of N = 60 is short by sqrt(59/60) and by Student's t; its coverage is
    about 0.943, the standard error of 400 trials 0.0116: five of them either way.
    """
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(400):
        estimate = metrics.bootstrap(_mean, rng.normal(size=60), resamples=400, seed=seed)
        held += estimate.low <= 0 <= estimate.high
    assert abs(held / 400 - 0.943) < 5 * 0.0116


def test_bootstrap_leaves_nan_out_jointly():
    nll, tokens = np.asarray([4.0, math.nan, 6.0, 9.0]), np.asarray([2, 5, 3, 3])
    kept = [0, 2, 3]
    both = metrics.bootstrap(metrics.perplexity_b, nll, tokens)
    assert both == metrics.bootstrap(metrics.perplexity_b, nll[kept], tokens[kept])
    assert both.value == pytest.approx(math.exp(19 / 8), rel=1e-12)
    assert both.count == 3


def test_bootstrap_of_too_few():
    one = metrics.bootstrap(_mean, np.asarray([2.5, math.nan]))
    assert (one.value, one.count) == (2.5, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    for nothing in ([], [math.nan]):
        *numbers, count = metrics.bootstrap(_mean, np.asarray(nothing))
        assert all(math.isnan(x) for x in numbers)
        assert count == 0
    same = metrics.bootstrap(_mean, np.full(9, 2.5))
    assert same == (2.5, 2.5, 2.5, 9)


def test_bootstrap_of_an_overflowing_figure():
    nll, tokens = np.asarray([1e4, *np.ones(9)]), np.ones(10, np.int64)
    estimate = metrics.bootstrap(metrics.perplexity_a, nll, tokens)
    # A third of the resamples lack the first row.
    assert estimate.value == estimate.high == math.inf
    assert estimate.low == pytest.approx(math.e, rel=1e-12)


def test_bootstrap_leaves_out_resamples_without_the_figure():
    nll, tokens = np.asarray([2.0, 0.0, 0.0]), np.asarray([1, 0, 0])
    estimate = metrics.bootstrap(metrics.perplexity_c, nll, tokens)
    np.testing.assert_allclose(estimate, [*[math.exp(2)] * 3, 3], rtol=1e-12)


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        ((), {}, "at least one array"),
        ((np.ones(3), np.ones(4)), {}, r"shapes \[\(3,\), \(4,\)\]"),
        ((np.ones((3, 2)),), {}, "one number per sample"),
        ((np.ones(3),), {"resamples": 1}, "at least 2 resamples"),
        ((np.ones(3),), {"level": 1.0}, "level=1.0"),
    ],
)
def test_bootstrap_refuses(arrays, settings, message):
    with pytest.raises(ValueError, match=message):
        metrics.bootstrap(_mean, *arrays, **settings)


def test_bootstrap_refuses_a_statistic_of_all_axes():
    with pytest.raises(ValueError, match="only the last axis"):
        metrics.bootstrap(np.mean, np.arange(4.0))


# ------------------------------------------------------------------------------------------ entropy
def test_entropy_of_known_rows():
    rows_NL = np.asarray([[5, 5, 5, 5], [0, 1, 2, 3], [1, 1, 2, 2], [7, 7, 7, 9]])
    quarter = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    expected = [0.0, math.log(4), math.log(2), quarter]
    np.testing.assert_allclose(metrics.unigram_entropy(rows_NL), expected, rtol=1e-12, atol=1e-12)
    assert metrics.unigram_entropy(rows_NL).dtype == np.float64
    assert math.log(2) * metrics.BITS_PER_NAT == pytest.approx(1.0, abs=1e-15)


def test_given_positions_do_not_count():
    tokens_NL = np.asarray([[1, 2, 3, 1, 2, 3], [1, 2, 3, 1, 2, 3]])
    counted_NL = np.asarray([[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]], bool)
    entropy = metrics.unigram_entropy(tokens_NL, counted_NL)
    expected = 0.8 * math.log(5 / 2) + 0.2 * math.log(5)
    np.testing.assert_allclose(entropy, [expected, math.nan], rtol=1e-12)
    # 2-grams that count: 12, 12, 23. Over the given position there is none.
    two = metrics.distinct(tokens_NL, 2, counted_NL)
    np.testing.assert_allclose(two, [2 / 3, math.nan], rtol=1e-12)
    np.testing.assert_allclose(metrics.distinct(tokens_NL, 3, counted_NL), [1, math.nan])
    assert np.isnan(metrics.distinct(tokens_NL, 4, counted_NL)).all()


# --------------------------------------------------------------------------------------- distinct-n
def _literal_grams(tokens, counted, n):
    windows = [range(i, i + n) for i in range(len(tokens) - n + 1)]
    return [tuple(tokens[j] for j in w) for w in windows if all(counted[j] for j in w)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9])
def test_distinct_against_sets(n):
    rng = np.random.default_rng(n)
    tokens_NL = rng.integers(-3, 4, size=(20, 12)) * 1_000_003
    counted_NL = rng.random((20, 12)) < 0.8
    counted_NL[0] = True
    counted_NL[1] = False
    expected = []
    for tokens, counted in zip(tokens_NL.tolist(), counted_NL, strict=True):
        grams = _literal_grams(tokens, counted, n)
        expected.append(len(set(grams)) / len(grams) if grams else math.nan)
    assert np.isnan(expected).any()
    np.testing.assert_allclose(metrics.distinct(tokens_NL, n, counted_NL), expected, rtol=1e-12)


def test_distinct_is_a_figure_of_each_sample():
    """More samples or duplicates don't change it."""
    tokens_NL = np.random.default_rng(0).integers(0, 5, size=(8, 16))
    alone = [metrics.distinct(row[None], 2)[0] for row in tokens_NL]
    np.testing.assert_array_equal(metrics.distinct(tokens_NL, 2), alone)
    np.testing.assert_array_equal(metrics.distinct(tokens_NL[[3, 3, 3]], 2), [alone[3]] * 3)


# ---------------------------------------------------------------------------------------- self-BLEU
def _literal_self_bleu(tokens_NL, counted_NL):
    """BLEU of each row against all others, pair by pair."""
    rows = list(zip(tokens_NL.tolist(), counted_NL, strict=True))
    result = []
    for i, (tokens, counted) in enumerate(rows):
        others = [row for j, row in enumerate(rows) if j != i and row[1].any()]
        length = int(counted.sum())
        if not length or not others:
            result.append(math.nan)
            continue
        logs, misses, any_match = [], 0, False
        for n in range(1, 5):
            own = collections.Counter(_literal_grams(tokens, counted, n))
            if not own:
                break
            references = [collections.Counter(_literal_grams(*row, n)) for row in others]
            matches = sum(min(c, max(r[gram] for r in references)) for gram, c in own.items())
            any_match |= matches > 0
            if not matches:
                misses += 1
                matches = 0.5**misses
            logs.append(math.log(matches / sum(own.values())))
        closest = min((abs(int(c.sum()) - length), int(c.sum())) for _, c in others)[1]
        penalty = min(0.0, 1 - closest / length)
        result.append(math.exp(penalty + sum(logs) / len(logs)) if any_match else 0.0)
    return result


def _texts(seed, num_samples, vocab_size, length=14):
    rng = np.random.default_rng(seed)
    return rng.zipf(1.6, size=(num_samples, length)) % vocab_size


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_samples", "vocab_size"), [(2, 6), (5, 40), (12, 400)])
def test_self_bleu_against_the_literal_form(seed, num_samples, vocab_size):
    tokens_NL = _texts(seed, num_samples, vocab_size)
    everything_NL = np.ones(tokens_NL.shape, bool)
    expected = _literal_self_bleu(tokens_NL, everything_NL)
    np.testing.assert_allclose(metrics.self_bleu(tokens_NL), expected, rtol=1e-12)
    rng = np.random.default_rng(seed)
    counted_NL = rng.random(tokens_NL.shape) < rng.choice([0.2, 0.6, 0.95], size=(num_samples, 1))
    expected = _literal_self_bleu(tokens_NL, counted_NL)
    np.testing.assert_allclose(metrics.self_bleu(tokens_NL, counted_NL), expected, rtol=1e-12)


def test_self_bleu_by_hand():
    rows_NL = np.asarray([[1, 2, 3, 4, 5], [1, 2, 3, 9, 8], [1, 1, 7, 7, 7]])
    # The first: 3 of 5 tokens, 2 of 4 pairs, 1 of 3 triples, none of 2 fours (counts one half).
    first = (3 / 5 * 2 / 4 * 1 / 3 * 0.5 / 2) ** 0.25
    # The last: one of its two 1s is matched, then three orders without a match.
    last = (1 / 5 * (1 / 2 / 4) * (1 / 4 / 3) * (1 / 8 / 2)) ** 0.25
    np.testing.assert_allclose(metrics.self_bleu(rows_NL), [first, first, last], rtol=1e-12)


def test_brevity_goes_by_the_closest_length():
    """A prefix of length 4 matches in full; its references hold 6 and 6, or 3 and 5, tokens."""
    tokens_NL = np.tile(np.arange(6), (3, 1))
    counted_NL = np.arange(6) < np.asarray([[4], [6], [6]])
    assert metrics.self_bleu(tokens_NL, counted_NL)[0] == pytest.approx(math.exp(1 - 6 / 4))
    counted_NL = np.arange(6) < np.asarray([[4], [3], [5]])
    assert metrics.self_bleu(tokens_NL, counted_NL)[0] == pytest.approx(1.0)


def test_self_bleu_of_extremes():
    repeated = np.tile(np.arange(9), (5, 1))
    np.testing.assert_allclose(metrics.self_bleu(repeated), np.ones(5), rtol=1e-12)
    apart = np.arange(45).reshape(5, 9)
    np.testing.assert_array_equal(metrics.self_bleu(apart), np.zeros(5))
    for rows in (repeated[:1], repeated[:0]):
        np.testing.assert_array_equal(metrics.self_bleu(rows), np.full(len(rows), math.nan))
    # Samples that are empty are no references.
    counted_NL = np.zeros((5, 9), bool)
    counted_NL[2] = True
    assert np.isnan(metrics.self_bleu(repeated, counted_NL)).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vocab_size", [5, 60, 600])
def test_self_bleu_is_that_of_sacrebleu(seed, vocab_size):
    sacrebleu = pytest.importorskip("sacrebleu")
    tokens_NL = _texts(seed, 8, vocab_size)
    lengths = np.random.default_rng(seed).integers(1, 15, size=(8, 1))
    counted_NL = np.arange(14) < lengths
    texts = [" ".join(map(str, row[:n])) for row, n in zip(tokens_NL, lengths[:, 0], strict=True)]
    expected = [
        sacrebleu.sentence_bleu(
            text,
            texts[:i] + texts[i + 1 :],
            tokenize="none",
            smooth_method="exp",
            use_effective_order=True,
        ).score
        / 100
        for i, text in enumerate(texts)
    ]
    np.testing.assert_allclose(metrics.self_bleu(tokens_NL, counted_NL), expected, rtol=1e-9)


# ---------------------------------------------------------------------------------------- controls
def test_figures_of_controls():
    """A repeated sentence against shuffled text, by each figure."""
    rng = np.random.default_rng(8)
    text_NL = rng.zipf(1.5, size=(6, 40)) % 50
    shuffled_NL = rng.permuted(text_NL, axis=1)
    one_NL = np.tile(np.tile(np.asarray([3, 1, 4, 1, 5]), 8), (6, 1))
    assert metrics.unigram_entropy(one_NL) == pytest.approx(
        [0.6 * math.log(5) + 0.4 * math.log(2.5)] * 6, rel=1e-12
    )
    np.testing.assert_allclose(metrics.self_bleu(one_NL), np.ones(6), rtol=1e-12)
    np.testing.assert_allclose(metrics.distinct(one_NL, 1), np.full(6, 4 / 40), rtol=1e-12)
    np.testing.assert_allclose(metrics.distinct(one_NL, 2), np.full(6, 5 / 39), rtol=1e-12)
    np.testing.assert_array_equal(
        metrics.unigram_entropy(shuffled_NL), metrics.unigram_entropy(text_NL)
    )
    np.testing.assert_array_equal(metrics.distinct(shuffled_NL, 1), metrics.distinct(text_NL, 1))
    assert (metrics.distinct(shuffled_NL, 2) != metrics.distinct(text_NL, 2)).any()


@pytest.mark.parametrize(
    ("counted", "message"),
    [
        (np.ones((2, 4), bool), r"\(2, 3\) and bool \(2, 4\)"),
        (np.ones((2, 3), np.int32), "int32"),
    ],
)
def test_positions_that_count_are_checked(counted, message):
    tokens = np.zeros((2, 3), np.int32)
    for figure in (
        metrics.unigram_entropy,
        metrics.self_bleu,
        lambda tokens, counted: metrics.distinct(tokens, 2, counted),
    ):
        with pytest.raises(ValueError, match=message):
            figure(tokens, counted)


def test_the_order_of_an_n_gram_is_checked():
    with pytest.raises(ValueError, match="got n=0"):
        metrics.distinct(np.zeros((2, 3), np.int32), 0)


# -------------------------------------------------------------------------------------- perplexity
# Mean losses 1, 3 and 2 over 2, 1 and 5 tokens, and an empty sample.
NLL, TOKENS = np.asarray([2.0, 3.0, 10.0, 0.0]), np.asarray([2, 1, 5, 0])


def test_perplexities_of_known_numbers():
    a = (math.e + math.e**3 + math.e**2) / 3
    assert metrics.perplexity_a(NLL, TOKENS) == pytest.approx(a, rel=1e-12)
    assert metrics.perplexity_b(NLL, TOKENS) == pytest.approx(math.exp(15 / 8), rel=1e-12)
    assert metrics.perplexity_c(NLL, TOKENS) == pytest.approx(math.exp(2), rel=1e-12)
    assert metrics.nats_per_byte(NLL, np.asarray([9, 4, 17, 0])) == pytest.approx(0.5, rel=1e-12)


FIGURES = [
    metrics.perplexity_a,
    metrics.perplexity_b,
    metrics.perplexity_c,
    metrics.nats_per_byte,
]


@pytest.mark.parametrize("figure", FIGURES)
def test_leading_axes_are_kept(figure):
    rows_RN = np.asarray(list(itertools.permutations(range(4)))).reshape(4, 6, 4)[..., :2]
    values = figure(NLL[rows_RN], TOKENS[rows_RN])
    assert values.shape == (4, 6)
    assert values.dtype == np.float64
    for index in np.ndindex(4, 6):
        rows = rows_RN[index]
        assert values[index] == figure(NLL[rows], TOKENS[rows])
    assert len(np.unique(values)) >= 5


@pytest.mark.parametrize("figure", FIGURES)
def test_nothing_to_score(figure):
    assert math.isnan(figure(np.zeros(3), np.zeros(3, np.int64)))
    assert math.isnan(figure(np.zeros(0), np.zeros(0, np.int64)))


def test_a_judge_that_fails_is_not_hidden():
    nll = np.asarray([1.0, math.nan])
    for figure in FIGURES:
        assert math.isnan(figure(nll, np.asarray([1, 1])))


def test_an_overflowing_sample():
    nll, tokens = np.asarray([1.0, 5000.0]), np.asarray([1, 1])
    for figure in (metrics.perplexity_a, metrics.perplexity_b, metrics.perplexity_c):
        assert figure(nll, tokens) == math.inf
    # Each finite, their sum not.
    assert metrics.perplexity_a(np.full(2, 709.5), tokens) == math.inf


def test_a_is_never_below_c():
    """Jensen: the mean of exponentials is at least the exponential of the mean."""
    rng = np.random.default_rng(0)
    nll, tokens = rng.gamma(2.0, 5.0, size=(50, 7)), rng.integers(1, 9, size=(50, 7))
    assert (metrics.perplexity_a(nll, tokens) > metrics.perplexity_c(nll, tokens)).all()
    even = np.full((50, 7), 4)
    c = metrics.perplexity_c(nll, even)
    np.testing.assert_allclose(metrics.perplexity_b(nll, even), c, rtol=1e-12)
    same = np.full(7, 8.0)
    assert metrics.perplexity_a(same, even[0]) == pytest.approx(
        metrics.perplexity_c(same, even[0]), rel=1e-12
    )
