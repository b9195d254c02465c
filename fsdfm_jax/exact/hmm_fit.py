"""A hidden Markov model fitted to text: tokens of plain prose, then EM (Baum-Welch).

The text is reduced to lower-case letters, "0" for each digit and a little punctuation, so that a
BPE of as few as 64 tokens can spell it; a paragraph is a document. The transitions, emissions and
the first state of windows of the token stream are fitted to the likelihood of the windows. The
first state is only a device of the fit: the law starts in the stationary distribution.
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
_TOKENS_AT_ONCE = 2**17  # of an E-step, about 100 MiB at 64 states
_SHORTEST = 40  # characters of a paragraph that counts
_CHARACTERS_PER_TOKEN = 4  # more than any BPE of this size packs into one on average
# Tokens of text for each free probability of the law: fewer don't support them.
TOKENS_PER_PROBABILITY = 10


@dataclasses.dataclass(frozen=True)
class FitSpec:
    """What is fitted, and how.

    Attributes:
      vocab_size: V, tokens with the end of the text.
      num_states: K, with the state that ends documents.
      max_tokens: of the text that are used.
      iterations: of EM.
      window: tokens of a window.
      smoothing: added to each expected count that may be above 0; it keeps every text possible.
      seed: of the first guess.
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
                f"num_states must be at least 2, one of which ends documents, got {self.num_states}"
            )
        if self.iterations < 1 or self.window < 2 or self.max_tokens < self.window:
            raise ValueError(
                "expected at least one iteration, windows of at least 2 tokens and at least one "
                f"window, got iterations={self.iterations}, window={self.window}, "
                f"max_tokens={self.max_tokens}"
            )
        if not self.smoothing > 0:
            raise ValueError(f"smoothing must be above 0, got {self.smoothing}")


# --------------------------------------------------------------------------------------------- text


def paragraphs(texts: Iterable[str]) -> list[str]:
    """The paragraphs of texts, reduced to `LETTERS` and single spaces; short ones are left out."""
    found = []
    for text in texts:
        for part in _PARAGRAPH.split(text):
            plain = " ".join(_OTHER.sub(" ", part.lower().translate(_SAME)).split())
            if len(plain) >= _SHORTEST:
                found.append(plain)
    return found


def choose(documents: Sequence[str], spec: FitSpec) -> list[str]:
    """Documents in random order, as many as surely give `spec.max_tokens` tokens."""
    order = np.random.default_rng(spec.seed).permutation(len(documents))
    chosen, characters = [], 0
    for i in order:
        if characters >= _CHARACTERS_PER_TOKEN * spec.max_tokens:
            break
        chosen.append(documents[i])
        characters += len(documents[i])
    return chosen


def tokenise(documents: Sequence[str], vocab_size: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Train a BPE on documents and encodes them.

    Returns:
      (int32 [T], all documents one after another, each with the end of the text; the name of each
      token, "▁" for a space, the end of the text last).

    Raises:
      ValueError: the documents are too small for so many tokens.
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
            f"the text is too small for {vocab_size} tokens: it gave {len(vocabulary) + 1}; give "
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
      stream: int [T], the documents with the end of the text after each.
      tokens: names, the end of the text last.
      spec: how; its vocab_size must be len(tokens).
      report: called with the number of each iteration and the log-likelihood before it, nats a
        token; it grows (but for the smoothing).

    Raises:
      ValueError: ids outside the vocabulary, or a text that doesn't support so many states.
    """
    if len(tokens) != spec.vocab_size:
        raise ValueError(f"expected {spec.vocab_size} tokens as in the spec, got {len(tokens)}")
    if stream.size and not 0 <= stream.min() <= stream.max() < len(tokens):
        wrong = stream[(stream < 0) | (stream >= len(tokens))][0]
        raise ValueError(
            f"the text holds token id {wrong}, outside the vocabulary of {len(tokens)} tokens; "
            "encode it with the tokenizer that the tokens are of"
        )
    used = stream[: spec.max_tokens]
    check_support(len(used), spec)
    if not (used == len(tokens) - 1).any():
        raise ValueError("the text holds no end of a document; put its token after each of them")
    count = len(used) // spec.window
    if not count:
        raise ValueError(f"the text has {len(used)} tokens, less than a window of {spec.window}")
    windows_WT = used[: count * spec.window].reshape(count, spec.window)
    guess = _first_guess(windows_WT, spec)
    for iteration in range(spec.iterations):
        guess, log_likelihood = improve(guess, windows_WT, spec.smoothing)
        report(iteration, log_likelihood)
    return Law(guess.transition_KK, guess.emission_KV, tokens)


def check_support(num_tokens: int, spec: FitSpec) -> None:
    """Refuse more states than a text supports.

    Raises:
      ValueError: saying how many it does support.
    """
    free = lambda states: states * (states + spec.vocab_size - 2)
    supported = num_tokens // TOKENS_PER_PROBABILITY
    if free(spec.num_states) > supported:
        most = max((k for k in range(spec.num_states) if free(k) <= supported), default=0)
        raise ValueError(
            f"{spec.num_states} states over {spec.vocab_size} tokens are {free(spec.num_states)} "
            f"free probabilities, but {num_tokens} tokens of text support {supported}, "
            f"{TOKENS_PER_PROBABILITY} tokens for each; take at most {most} states, fewer tokens "
            "or more text"
        )


def _first_guess(windows_WT: np.ndarray, spec: FitSpec) -> Parameters:
    """Each state prefers some tokens and some states at random; the last one ends documents."""
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
    """One iteration of EM.

    Args:
      guess: before.
      windows_WT: int [W, T].
      smoothing: added to expected counts, except of emissions that the guess excludes.

    Returns:
      (after, the log-likelihood before it in nats a token).
    """
    states, vocabulary = guess.emission_KV.shape
    pairs_KK, emitted_VK = np.zeros((states, states)), np.zeros((vocabulary, states))
    first_K, total = np.zeros(states), 0.0
    rows = max(1, min(len(windows_WT), _TOKENS_AT_ONCE // windows_WT.shape[1]))
    arrays = [np.float32(a) for a in guess]
    for start in range(0, len(windows_WT), rows):
        part = np.arange(start, start + rows)
        weight_W = np.float32(part < len(windows_WT))  # all parts of one shape
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
    """Counts given the tokens: pairs of states, (token, state), first states; log-likelihood."""
    states = len(first_K)
    first_WK = jnp.broadcast_to(first_K, (len(tokens_WT), states))
    evidence_TWK = emission_KV.T[tokens_WT.T]
    predicted_TWK, log_TW = forward(transition_KK, first_WK, evidence_TWK)
    scale_TW1 = jnp.exp(-log_TW)[..., None]

    def step(later_WK, inputs):
        # later: P(all after t | state at t) over P(all after t | all until t).
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
