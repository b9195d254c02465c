"""A small law and its exact distributions by enumeration."""

import itertools

import numpy as np

from fsdfm_jax.exact import hmm

LENGTH = 4


def make(num_states=3, num_words=2, seed=0, **options):
    """A law with `num_states` states, the last of which ends documents, over `num_words` words."""
    rng = np.random.default_rng(seed)
    transition_KK = rng.dirichlet(np.full(num_states, 0.7), size=num_states) + 0.02
    emission_KV = np.zeros((num_states, num_words + 1))
    emission_KV[:-1, :-1] = rng.dirichlet(np.full(num_words, 0.5), size=num_states - 1) + 0.02
    emission_KV[-1, -1] = 1
    normalised = lambda rows: rows / rows.sum(1, keepdims=True)
    names = (*(f"▁w{i}" for i in range(num_words)), hmm.EOS)
    return hmm.Law(normalised(transition_KK), normalised(emission_KV), names, **options)


def sharpened(law):
    """A law whose probabilities are squared: likelier texts, less entropy."""
    sharp = lambda rows: rows**2 / (rows**2).sum(1, keepdims=True)
    return hmm.Law(sharp(law.transition_KK), sharp(law.emission_KV), law.tokens)


def sequences(law, length=LENGTH):
    """All texts of a length, int [V^L, L]."""
    return np.array(list(itertools.product(range(law.vocab_size), repeat=length)))


def probabilities(law, length=LENGTH):
    """P of each of `sequences`, a sum over all paths of states, float64 [V^L]."""
    texts = sequences(law, length)
    total = np.zeros(len(texts))
    for path in itertools.product(range(law.num_states), repeat=length):
        weight = law.initial_K[path[0]]
        for before, after in itertools.pairwise(path):
            weight *= law.transition_KK[before, after]
        emitted = [law.emission_KV[state, texts[:, i]] for i, state in enumerate(path)]
        total += weight * np.prod(emitted, axis=0)
    return total


def entropy(p):
    """Of a distribution, nats."""
    p = p[p > 0]
    return -float(p @ np.log(p))
