"""Fit a hidden Markov model to text: simplified text to tokens, then EM (Baum-Welch).

Text is reduced to lower-case letters, "0" for each digit and some punctuation, so that a BPE with
as few as 64 tokens can encode it. Each paragraph is a document. Transitions, emissions and the
first state are fitted to the likelihood of windows of the token stream. The first state is used
only in the fit: the law starts from the stationary distribution.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.exact.hmm import EOS, Law, forward

LETTERS = "abcdefghijklmnopqrstuvwxyz0.,;:?!'()$%-"
_SAME = str.maketrans({"’": "'", "‘": "'", "—": "-", "–": "-"} | dict.fromkeys("123456789", "0"))
_OTHER = re.compile(f"[^{re.escape(LETTERS)}]+")
_PARAGRAPH = re.compile(r"\n\s*\n")
_TOKENS_AT_ONCE = 2**17  # per E-step, about 100 MiB with 64 states
_SHORTEST = 40  # minimum characters of a paragraph
_CHARACTERS_PER_TOKEN = 4  # an upper bound on the average for a BPE of this size
# Minimum tokens of text per free probability of the law.
TOKENS_PER_PROBABILITY = 10


@dataclasses.dataclass(frozen=True)
class FitSpec:
    """Settings of a fit.

    Attributes:
      vocab_size: V, tokens including end-of-text.
      num_states: K, including the state that ends documents.
      max_tokens: maximum tokens of the text to use.
      iterations: of EM.
      window: tokens per window.
      smoothing: added to each expected count that may be above 0, so that every text is possible.
      seed: of the initial guess.
    """

    vocab_size: int = 256
    num_states: int = 64
    max_tokens: int = 1_000_000
    iterations: int = 60
    window: int = 256
    smoothing: float = 0.01
    seed: int = 0

    def __post_init__(self):
        least = len(LETTERS) + 2 + 8
        if not least <= self.vocab_size <= 2**15:
            raise ValueError(f"vocab_size must be in {least} .. {2**15}, got {self.vocab_size}")
        if self.num_states < 2:
            raise ValueError(
                f"num_states must be at least 2 (one ends documents), got {self.num_states}"
            )
        if self.iterations < 1 or self.window < 2 or self.max_tokens < self.window:
            raise ValueError(
                "expected at least one iteration, a window of at least 2 tokens and at least one "
                f"window, got iterations={self.iterations}, window={self.window}, "
                f"max_tokens={self.max_tokens}"
            )
        if not self.smoothing > 0:
            raise ValueError(f"smoothing must be above 0, got {self.smoothing}")


# --------------------------------------------------------------------------------------------- text


def paragraphs(texts: Iterable[str]) -> list[str]:
    """Split texts into paragraphs, reduced to `LETTERS` and single spaces; skip short ones."""
    found = []
    for text in texts:
        for part in _PARAGRAPH.split(text):
            plain = " ".join(_OTHER.sub(" ", part.lower().translate(_SAME)).split())
            if len(plain) >= _SHORTEST:
                found.append(plain)
    return found


def choose(documents: Sequence[str], spec: FitSpec) -> list[str]:
    """Select documents in random order, enough for `spec.max_tokens` tokens."""
    order = np.random.default_rng(spec.seed).permutation(len(documents))
    chosen, characters = [], 0
    for i in order:
        if characters >= _CHARACTERS_PER_TOKEN * spec.max_tokens:
            break
        chosen.append(documents[i])
        characters += len(documents[i])
    return chosen


def tokenise(documents: Sequence[str], vocab_size: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Train a BPE on documents and encode them.

    Returns:
      (int32 [T], all documents concatenated, each with end-of-text; the name of each token, "▁" for
      a space, end-of-text last).

    Raises:
      ValueError: the documents are too small for this vocabulary.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, show_progress=False)
    backend.train_from_iterator(documents, trainer)
    vocabulary = backend.get_vocab()
    if len(vocabulary) != vocab_size - 1:
        raise ValueError(
            f"the text is too small for {vocab_size} tokens: it gives {len(vocabulary) + 1}; give "
            "more text or lower vocab_size"
        )
    tokens = (*sorted(vocabulary, key=vocabulary.__getitem__), EOS)
    encodings = backend.encode_batch_fast(list(documents))
    parts = [np.array([*encoding.ids, vocab_size - 1], np.int32) for encoding in encodings]
    return np.concatenate(parts), tokens


# ----------------------------------------------------------------------------------------------- EM


class Parameters(NamedTuple):
    """Transitions [K, K], emissions [K, V] and the first state of a window [K], float64."""

    transition_KK: np.ndarray
    emission_KV: np.ndarray
    first_K: np.ndarray


def fit(
    stream: np.ndarray,
    tokens: tuple[str, ...],
    spec: FitSpec,
    report: Callable[[int, float], None] = lambda iteration, log_likelihood: None,
) -> Law:
    """Fit a law to a stream of tokens.

    Args:
      stream: int [T], the documents with end-of-text after each.
      tokens: names, end-of-text last.
      spec: settings; vocab_size must be len(tokens).
      report: called with the index of each iteration and the log-likelihood before it, nats per
        token, which increases (except for the smoothing).

    Raises:
      ValueError: ids outside the vocabulary, or too little text for the states.
    """
    if len(tokens) != spec.vocab_size:
        raise ValueError(f"expected {spec.vocab_size} tokens as in the spec, got {len(tokens)}")
    if stream.size and not 0 <= stream.min() <= stream.max() < len(tokens):
        wrong = stream[(stream < 0) | (stream >= len(tokens))][0]
        raise ValueError(
            f"the text has token id {wrong}, outside the vocabulary of {len(tokens)} tokens; "
            "encode it with the right tokenizer"
        )
    used = stream[: spec.max_tokens]
    check_support(len(used), spec)
    if not (used == len(tokens) - 1).any():
        raise ValueError("the text has no end of a document; append its token to each document")
    count = len(used) // spec.window
    if not count:
        raise ValueError(f"the text has {len(used)} tokens, fewer than a window of {spec.window}")
    windows_WT = used[: count * spec.window].reshape(count, spec.window)
    guess = _first_guess(windows_WT, spec)
    for iteration in range(spec.iterations):
        guess, log_likelihood = improve(guess, windows_WT, spec.smoothing)
        report(iteration, log_likelihood)
    return Law(guess.transition_KK, guess.emission_KV, tokens)


def check_support(num_tokens: int, spec: FitSpec) -> None:
    """Raise ValueError, with the possible number, for more states than the text supports."""
    free = lambda states: states * (states + spec.vocab_size - 2)
    supported = num_tokens // TOKENS_PER_PROBABILITY
    if free(spec.num_states) > supported:
        most = max((k for k in range(spec.num_states) if free(k) <= supported), default=0)
        raise ValueError(
            f"{spec.num_states} states over {spec.vocab_size} tokens are {free(spec.num_states)} "
            f"free probabilities, but {num_tokens} tokens of text support {supported}, "
            f"{TOKENS_PER_PROBABILITY} tokens for each; use at most {most} states, fewer tokens "
            "or more text"
        )


def _first_guess(windows_WT: np.ndarray, spec: FitSpec) -> Parameters:
    """Make a random guess with preferred tokens and next states; the last state ends documents."""
    rng = np.random.default_rng(spec.seed)
    states, vocabulary = spec.num_states, spec.vocab_size
    often_V = np.bincount(windows_WT.ravel(), minlength=vocabulary) + 1.0
    emission_KV = often_V * np.exp(2.0 * rng.standard_normal((states, vocabulary)))
    emission_KV[:-1, -1], emission_KV[-1] = 0.0, np.eye(vocabulary)[-1]
    transition_KK = np.exp(rng.standard_normal((states, states)))
    return Parameters(
        _normalised(transition_KK), _normalised(emission_KV), np.full(states, 1 / states)
    )


def improve(
    guess: Parameters, windows_WT: np.ndarray, smoothing: float
) -> tuple[Parameters, float]:
    """Do one iteration of EM.

    Args:
      guess: the current parameters.
      windows_WT: int [W, T].
      smoothing: added to expected counts, except for emissions that the guess excludes.

    Returns:
      (new parameters, log-likelihood of the guess in nats per token).
    """
    states, vocabulary = guess.emission_KV.shape
    pairs_KK, emitted_VK = np.zeros((states, states)), np.zeros((vocabulary, states))
    first_K, total = np.zeros(states), 0.0
    rows = max(1, min(len(windows_WT), _TOKENS_AT_ONCE // windows_WT.shape[1]))
    arrays = [np.float32(a) for a in guess]
    for start in range(0, len(windows_WT), rows):
        part = np.arange(start, start + rows)
        weight_W = np.float32(part < len(windows_WT))  # masks the padding of the last part
        counts = _expected_counts(*arrays, windows_WT[part % len(windows_WT)], weight_W)
        pairs, emitted, first, log = (np.asarray(count, np.float64) for count in counts)
        pairs_KK, emitted_VK, first_K = pairs_KK + pairs, emitted_VK + emitted, first_K + first
        total += float(log)
    emission_KV = np.where(guess.emission_KV > 0, emitted_VK.T + smoothing, 0.0)
    after = Parameters(
        _normalised(pairs_KK + smoothing),
        _normalised(emission_KV),
        _normalised(first_K + smoothing),
    )
    return after, total / windows_WT.size


@jax.jit
def _expected_counts(transition_KK, emission_KV, first_K, tokens_WT, weight_W):
    """Expected counts given the tokens (state pairs, (token, state), first states), and log p."""
    states = len(first_K)
    first_WK = jnp.broadcast_to(first_K, (len(tokens_WT), states))
    evidence_TWK = emission_KV.T[tokens_WT.T]
    predicted_TWK, log_TW = forward(transition_KK, first_WK, evidence_TWK)
    scale_TW1 = jnp.exp(-log_TW)[..., None]

    def step(later_WK, inputs):
        # later: P(all after t | state at t) / P(all after t | all until t).
        predicted_WK, evidence_WK, scale_W1 = inputs
        seen_WK = evidence_WK * scale_W1 * later_WK
        filtered_WK = predicted_WK * evidence_WK * scale_W1
        return seen_WK @ transition_KK.T, (filtered_WK, seen_WK, filtered_WK * later_WK)

    inputs = predicted_TWK, evidence_TWK, scale_TW1
    _, outputs = jax.lax.scan(step, jnp.ones_like(first_WK), inputs, reverse=True)
    filtered, seen, posterior = (output * weight_W[None, :, None] for output in outputs)
    flat = lambda part_TWK: part_TWK.reshape(-1, states)
    pairs_KK = transition_KK * (flat(filtered[:-1]).T @ flat(seen[1:]))
    emitted_VK = jax.ops.segment_sum(flat(posterior), tokens_WT.T.ravel(), emission_KV.shape[1])
    return pairs_KK, emitted_VK, posterior[0].sum(0), (log_TW * weight_W[None]).sum()


def _normalised(rows: np.ndarray) -> np.ndarray:
    return rows / rows.sum(-1, keepdims=True)
