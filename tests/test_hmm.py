"""The law: likelihood, entropy and samples against enumeration; files; one error for each fault."""

import numpy as np
import pytest
import tiny_law
from chance import assert_frequencies

from fsdfm_jax.exact import hmm

LAW = tiny_law.make()


def _rng(seed=0):
    return np.random.default_rng(seed)


def test_stationary_distribution():
    np.testing.assert_allclose(LAW.initial_K @ LAW.transition_KK, LAW.initial_K, atol=1e-14)
    assert LAW.initial_K.sum() == pytest.approx(1)
    assert LAW.eos_id == 2


def test_likelihoods_are_those_of_all_paths():
    texts = tiny_law.sequences(LAW)
    p = tiny_law.probabilities(LAW)
    assert p.sum() == pytest.approx(1)
    np.testing.assert_allclose(hmm.log_likelihoods(LAW, texts), np.log(p), atol=2e-5)
    # Each token's own: the first one is the marginal.
    first = hmm.token_log_likelihoods(LAW, texts)[:, 0]
    np.testing.assert_allclose(np.exp(first), (LAW.initial_K @ LAW.emission_KV)[texts[:, 0]], 1e-5)


def test_batches_of_any_size_give_the_same(monkeypatch):
    texts = tiny_law.sequences(LAW)[:37]
    whole = hmm.log_likelihoods(LAW, texts)
    monkeypatch.setattr(hmm, "_HELD_BYTES", 4 * 4 * 3 * 10)  # ten rows
    np.testing.assert_allclose(hmm.log_likelihoods(LAW, texts), whole, rtol=1e-6)


def test_samples_have_the_law():
    drawn = hmm.sample(LAW, _rng(), 60_000, 3)
    assert drawn.dtype == np.int32
    kinds = drawn @ 3 ** np.arange(3)[::-1]
    assert_frequencies(np.bincount(kinds, minlength=27), tiny_law.probabilities(LAW, 3))


def test_documents_in_a_stream_have_the_law_of_blocks():
    """Concatenated documents, each with an end token, cut into blocks."""
    documents = hmm.sample_documents(LAW, _rng(), 60_000)
    stream = np.concatenate([part for d in documents for part in (d, [LAW.eos_id])])
    # Blocks of 3 with 9 tokens between them are as good as independent.
    blocks = stream[100:][: (len(stream) - 100) // 12 * 12].reshape(-1, 12)[:, :3]
    kinds = blocks @ 3 ** np.arange(3)[::-1]
    assert_frequencies(np.bincount(kinds, minlength=27), tiny_law.probabilities(LAW, 3))


def test_documents_have_their_own_lengths():
    documents = hmm.sample_documents(LAW, _rng(), 30_000)
    assert len(documents) == 30_000
    assert not any((d == LAW.eos_id).any() for d in documents)
    # P(n tokens) = (row of the end) (transitions among the others)^n ... into the end
    inner = LAW.transition_KK[:-1, :-1]
    state, law = LAW.transition_KK[-1, :-1], [LAW.transition_KK[-1, -1]]
    for _ in range(8):
        law.append(state @ LAW.transition_KK[:-1, -1])
        state = state @ inner
    lengths = np.minimum([len(d) for d in documents], 9)
    assert_frequencies(np.bincount(lengths, minlength=10), [*law, 1 - sum(law)])
    assert hmm.sample_documents(LAW, _rng(), 0) == []


def test_entropies_are_exact():
    blocks = [tiny_law.entropy(tiny_law.probabilities(LAW, n)) for n in (1, 2, 3, 4)]
    for k, exact in enumerate(np.diff([0, *blocks[:3]]), start=1):
        assert hmm.conditional_entropy(LAW, k) == pytest.approx(exact, abs=1e-12)
    figure = hmm.block_entropy(LAW, _rng(), 4000, 4)
    error = (figure.high - figure.low) / (2 * 1.96)
    assert abs(figure.value - blocks[3]) < 5 * error
    # The spread of -log p would be three times that and more.
    assert error < 0.3 * np.std(np.log(tiny_law.probabilities(LAW))) / 4000**0.5 * 3


def test_entropy_rate_lies_between_its_bounds():
    low, high = hmm.entropy_rate_bounds(LAW, _rng(), 8000, 4)
    exact = tiny_law.entropy(tiny_law.probabilities(LAW, 4))
    exact -= tiny_law.entropy(tiny_law.probabilities(LAW, 3))
    assert abs(high.value - exact) < 5 * (high.high - high.low) / (2 * 1.96)
    assert low.value < high.value
    # Given the first state, by enumeration over it.
    given = 0.0
    for state, weight in enumerate(LAW.initial_K):
        law = tiny_law.make()
        object.__setattr__(law, "initial_K", np.eye(3)[state])
        longer, shorter = (tiny_law.entropy(tiny_law.probabilities(law, n)) for n in (4, 3))
        given += weight * (longer - shorter)
    assert abs(low.value - given) < 5 * (low.high - low.low) / (2 * 1.96)


# ------------------------------------------------------------------------------------------ files


def test_files_bring_the_law_back(tmp_path):
    LAW.save(tmp_path / "law.npz")
    loaded = hmm.load(tmp_path / "law.npz")
    np.testing.assert_array_equal(loaded.transition_KK, LAW.transition_KK)
    np.testing.assert_array_equal(loaded.emission_KV, LAW.emission_KV)
    assert loaded.tokens == LAW.tokens
    assert loaded.fingerprint == LAW.fingerprint != tiny_law.make(seed=1).fingerprint


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "law.npz"
    with pytest.raises(FileNotFoundError, match="no law in .*law.npz"):
        hmm.load(path)
    LAW.save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="isn't a law"):
        hmm.load(path)
    np.savez(path, something=1)
    with pytest.raises(ValueError, match="isn't a law"):
        hmm.load(path)
    np.savez(path, format=9, transition=1, emission=1, tokens=["a"])
    with pytest.raises(ValueError, match="format 9, expected 1"):
        hmm.load(path)


def test_text_goes_both_ways():
    ids = np.array([0, 1, 1, 0])
    assert LAW.decode(ids) == "▁w0 ▁w1 ▁w1 ▁w0"
    np.testing.assert_array_equal(LAW.encode("▁w0 ▁w1\n▁w1  ▁w0"), ids)
    assert LAW.to_prose([0, 1, 2, 1]) == "w0 w1\n w1"


# ------------------------------------------------------------------------------------------- faults


def test_text_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match="'walrus' is not in the vocabulary of the law"):
        LAW.encode("▁w0 walrus")
    with pytest.raises(ValueError, match="token id 3 is not in the vocabulary.*0 to 2"):
        hmm.log_likelihoods(LAW, np.array([[0, 3]]))
    with pytest.raises(ValueError, match="token id -1"):
        LAW.decode([-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, e, t: (a * 2, e, t), "every row of transitions must be a distribution"),
        (lambda a, e, t: (a, e * np.nan, t), "every row of emissions must be a distribution"),
        (lambda a, e, t: (a[:2], e, t), r"transitions \[3, 3\].*got \[2, 3\]"),
        (lambda a, e, t: (a, e, t[:2]), "3 states and 2 tokens"),
        (lambda a, e, t: (a, e, (*t[:2], "end")), "the last token must be"),
        (lambda a, e, t: (a, e[::-1], t), "emitted only by the last state"),
    ],
)
def test_no_law(change, message):
    with pytest.raises(ValueError, match=message):
        hmm.Law(*change(LAW.transition_KK, LAW.emission_KV, LAW.tokens))


def test_states_that_do_not_reach_each_other():
    with pytest.raises(ValueError, match="don't reach each other"):
        _ = hmm.Law(np.eye(3), LAW.emission_KV, LAW.tokens).initial_K
