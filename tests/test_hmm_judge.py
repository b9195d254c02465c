"""Exact figures, calibrated controls, and samples that game the likelihood."""

import json

import numpy as np
import pytest
import tiny_law

from fsdfm_jax.exact import hmm, hmm_judge

pytestmark = pytest.mark.slow

LAW = tiny_law.make(num_states=4, num_words=5, seed=2)


def _samples(count=800, length=24, law=LAW, seed=5):
    return hmm.sample(law, np.random.default_rng(seed), count, length)


def test_samples_of_the_law_pass():
    report = hmm_judge.judge(LAW, _samples(), resamples=50)
    assert report.flags == {}
    excess = report.figures["excess"]
    assert excess.low < 0.02
    assert excess.high > -0.02
    json.dumps(report.to_dict())


def test_figures_are_those_of_their_definitions():
    tokens = _samples(40, 6)
    figures = hmm_judge.judge(LAW, tokens, resamples=20).figures
    assert figures["nll"].value == pytest.approx(-hmm.log_likelihoods(LAW, tokens).mean() / 6)
    entropies = [0.0]
    for k in (1, 2, 3):
        counts = np.zeros(6**k)
        for row in tokens:
            for i in range(7 - k):
                counts[int("".join(map(str, row[i : i + k])), 6)] += 1
        share, law = counts / counts.sum(), tiny_law.probabilities(LAW, k)
        seen = share > 0
        kl = share[seen] @ np.log(share[seen] / law[seen])
        assert figures[f"kl_{k}"].value == pytest.approx(kl, abs=1e-5)
        entropies.append(tiny_law.entropy(share))
        gap = entropies[-1] - entropies[-2]
        assert figures[f"entropy_{k}"].value == pytest.approx(gap, abs=1e-9)


def test_many_samples_have_the_exact_entropies():
    figures = hmm_judge.judge(LAW, _samples(20_000, 12), resamples=20).figures
    for k in (1, 2, 3):
        assert figures[f"entropy_{k}"].value == pytest.approx(
            hmm.conditional_entropy(LAW, k), abs=0.01
        )
        assert figures[f"kl_{k}"].value < 0.002


def test_intervals_are_as_wide_as_sets_of_samples_differ():
    figures = hmm_judge.judge(LAW, _samples(), resamples=200).figures
    for name, (_, spread) in hmm_judge.law_figures(LAW, 800, 24).items():
        low, high = figures[name].low, figures[name].high
        assert low < figures[name].value < high
        # Eight sets know the spread to a quarter.
        assert 0.4 < (high - low) / (2 * 1.96) / spread < 2.5, name


# ------------------------------------------------------------------------------------------- gaming


def _flagged(tokens):
    return set(hmm_judge.judge(LAW, tokens, resamples=20).flags)


def test_sharpened_samples_are_exposed():
    """A likelihood above that of the law isn't good."""
    law = tiny_law.sharpened(LAW)
    tokens = _samples(law=law)
    assert hmm_judge.judge(LAW, tokens, resamples=20).figures["excess"].high < -0.05
    assert {"kl_2", "entropy_2", "nll"} <= _flagged(tokens)


def test_one_sample_repeated_is_exposed():
    tokens = np.repeat(_samples(1), 400, axis=0)
    assert {"kl_3", "entropy_3", "distinct"} <= _flagged(tokens)


def test_shuffled_samples_are_exposed():
    tokens = np.random.default_rng(0).permuted(_samples(), axis=1)
    found = _flagged(tokens)
    assert {"nll", "kl_2"} <= found
    assert "kl_1" not in found


def test_bad_samples_are_refused():
    with pytest.raises(ValueError, match="token id 6 is not in the vocabulary"):
        hmm_judge.judge(LAW, np.full((5, 5), 6))
    with pytest.raises(ValueError, match=r"at least 2 samples.*\(1, 5\)"):
        hmm_judge.judge(LAW, np.zeros((1, 5), int))
