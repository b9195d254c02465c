"""EM: expected counts against all paths, monotonicity, recovery of a law; text; errors."""

import itertools

import numpy as np
import pytest
import tiny_law

from fsdfm_jax.exact import hmm, hmm_fit

pytestmark = pytest.mark.slow

LAW = tiny_law.make(num_states=3, num_words=4, seed=3)


def _spec(**changes):
    values = {"vocab_size": 60, "num_states": 3, "window": 20, "max_tokens": 20_000}
    return hmm_fit.FitSpec(**values | changes)


def _stream(count=1000):
    documents = hmm.sample_documents(LAW, np.random.default_rng(0), count)
    return np.concatenate([part for d in documents for part in (d, [LAW.eos_id])])


def _guess(seed=0):
    other = tiny_law.make(num_states=3, num_words=4, seed=seed)
    return hmm_fit.Parameters(other.transition_KK, other.emission_KV, np.array([0.5, 0.3, 0.2]))


def test_one_iteration_is_that_of_all_paths(monkeypatch):
    windows = hmm.sample(LAW, np.random.default_rng(0), 5, 4)
    guess, smoothing = _guess(), 0.01
    pairs, emitted, first = np.zeros((3, 3)), np.zeros((3, 5)), np.zeros(3)
    total = 0.0
    for text in windows:
        weights = {}
        for path in itertools.product(range(3), repeat=4):
            weight = guess.first_K[path[0]] * guess.emission_KV[path[0], text[0]]
            for i in (1, 2, 3):
                weight *= guess.transition_KK[path[i - 1], path[i]]
                weight *= guess.emission_KV[path[i], text[i]]
            weights[path] = weight
        evidence = sum(weights.values())
        total += np.log(evidence)
        for path, weight in weights.items():
            first[path[0]] += weight / evidence
            for i in range(4):
                emitted[path[i], text[i]] += weight / evidence
                if i:
                    pairs[path[i - 1], path[i]] += weight / evidence
    normalised = lambda rows: rows / rows.sum(-1, keepdims=True)
    for rows in (5, 2):  # at once, and in parts of which the last is padded
        monkeypatch.setattr(hmm_fit, "_TOKENS_AT_ONCE", 4 * rows)
        after, log_likelihood = hmm_fit.improve(guess, windows, smoothing)
        assert log_likelihood == pytest.approx(total / 20, abs=1e-6)
        np.testing.assert_allclose(after.transition_KK, normalised(pairs + smoothing), atol=1e-6)
        np.testing.assert_allclose(after.first_K, normalised(first + smoothing), atol=1e-6)
        allowed = np.where(guess.emission_KV > 0, emitted + smoothing, 0)
        np.testing.assert_allclose(after.emission_KV, normalised(allowed), atol=1e-6)


def test_likelihood_grows_to_that_of_the_truth():
    stream, logs = _stream(3000), []
    spec = _spec(vocab_size=60, iterations=150, smoothing=1e-6)
    # Names for ids that never come.
    tokens = (*(f"w{i}" for i in range(59)), hmm.EOS)
    stream = np.where(stream == LAW.eos_id, 59, stream)
    law = hmm_fit.fit(stream, tokens, spec, lambda _, log: logs.append(log))
    assert (np.diff(logs) > -1e-6).all()
    assert logs[-1] - logs[0] > 0.05
    fresh = hmm.sample(LAW, np.random.default_rng(9), 2000, 30)
    truth = hmm.log_likelihoods(LAW, fresh)
    found = hmm.log_likelihoods(law, np.where(fresh == LAW.eos_id, 59, fresh))
    # 20,000 tokens know 20 probabilities to 20 / 2 / 20,000 nats a token.
    assert (truth - found).mean() / 30 < 0.005
    assert law.initial_K[-1] == pytest.approx(LAW.initial_K[-1], rel=0.1)


def test_a_fit_is_a_function_of_its_spec():
    stream = np.where(_stream(300) == LAW.eos_id, 59, _stream(300))
    tokens = (*(f"w{i}" for i in range(59)), hmm.EOS)
    one, two, other = (
        hmm_fit.fit(stream, tokens, _spec(iterations=3, num_states=2, seed=seed))
        for seed in (0, 0, 1)
    )
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert (one.emission_KV[0, :-1] > 0).all()  # smoothing: no word is impossible


# --------------------------------------------------------------------------------------------- text

TEXT = "In 1862, the Senate’s vote — 37 to 5 — was «final»; the people agreed.\n\nShort.\n\n" * 3


def test_text_is_reduced_to_few_letters():
    found = hmm_fit.paragraphs([TEXT])
    assert len(found) == 3
    assert found[0] == "in 0000, the senate's vote - 00 to 0 - was final ; the people agreed."
    assert set("".join(found)) <= set(hmm_fit.LETTERS + " ")


def test_tokens_spell_the_text():
    words = ["the people of the states", "a union of the people", "the states agreed on peace"] * 20
    stream, tokens = hmm_fit.tokenise(words, 36)
    assert len(tokens) == 36
    assert tokens[-1] == hmm.EOS
    assert (stream == 35).sum() == 60
    first = [tokens[i] for i in stream[: np.flatnonzero(stream == 35)[0]]]
    assert "".join(first).replace("▁", " ").strip() == words[0]
    with pytest.raises(ValueError, match="too small for 300 tokens"):
        hmm_fit.tokenise(words[:3], 300)


def test_as_many_documents_are_chosen_as_are_needed():
    documents = [f"{i:03d}" * 10 for i in range(100)]
    chosen = hmm_fit.choose(documents, _spec(max_tokens=100))
    assert sum(map(len, chosen)) >= 400 > sum(map(len, chosen[:-1]))
    assert chosen == hmm_fit.choose(documents, _spec(max_tokens=100))
    assert chosen != documents[: len(chosen)]
    assert len(hmm_fit.choose(documents, _spec())) == 100


# ------------------------------------------------------------------------------------------- faults


def test_more_states_than_the_text_supports():
    stream = np.zeros(10_000, np.int32)
    tokens = (*(f"w{i}" for i in range(59)), hmm.EOS)
    # 15 * (15 + 58) = 1095 > 1000 >= 14 * (14 + 58)
    with pytest.raises(ValueError, match=r"15 states over 60 tokens .* at most 13 states"):
        hmm_fit.fit(stream, tokens, _spec(num_states=15))
    hmm_fit.check_support(10_000, _spec(num_states=13))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 20}, "vocab_size must be in"),
        ({"num_states": 1}, "num_states must be at least 2"),
        ({"iterations": 0}, "iterations=0"),
        ({"max_tokens": 10}, "max_tokens=10"),
        ({"smoothing": 0.0}, "smoothing must be above 0"),
    ],
)
def test_specs_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        _spec(**changes)


def test_texts_that_can_not_be_fitted():
    tokens = (*(f"w{i}" for i in range(59)), hmm.EOS)
    with pytest.raises(ValueError, match="token id 60, outside the vocabulary of 60"):
        hmm_fit.fit(np.full(9000, 60), tokens, _spec())
    with pytest.raises(ValueError, match="no end of a document"):
        hmm_fit.fit(np.zeros(9000, int), tokens, _spec())
    with pytest.raises(ValueError, match="expected 60 tokens as in the spec, got 3"):
        hmm_fit.fit(np.zeros(9000, int), tokens[:3], _spec())
