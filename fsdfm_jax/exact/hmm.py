"""A language with a known law: a hidden Markov model over tokens.

    p(x_1 .. x_L) = sum over states of pi(s_1) E(s_1, x_1) A(s_1, s_2) E(s_2, x_2) ...

The last state ends a document: it emits the end-of-text token, and no other state does. Documents
are therefore independent, and a stream of them cut into blocks is the stationary process: pi is the
stationary distribution, and every block has the law above.

Dimension letters, besides those of the package: K hidden states, N samples.
"""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import zipfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.exact import intervals
from fsdfm_jax.exact.intervals import Figure

EOS = "<|endoftext|>"
_FORMAT = 1
_HELD_BYTES = 2**28  # maximum size of an array
_SUM_ERROR = 1e-9  # tolerance for the sum of a row of probabilities


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
    """A hidden Markov model.

    Attributes:
      transition_KK: A(i, j) = P(next state j | state i), float64.
      emission_KV: E(i, v) = P(token v | state i), float64.
      tokens: name of each token; the last one is end-of-text, emitted by the last state.

    Raises:
      ValueError: rows aren't distributions, shapes don't match, or end-of-text is not as above.
    """

    transition_KK: np.ndarray
    emission_KV: np.ndarray
    tokens: tuple[str, ...]

    def __post_init__(self):
        states, vocabulary = self.emission_KV.shape
        if self.transition_KK.shape != (states, states) or vocabulary != len(self.tokens):
            raise ValueError(
                f"a law of {states} states and {len(self.tokens)} tokens needs transitions "
                f"[{states}, {states}] and emissions [{states}, {len(self.tokens)}], got "
                f"{list(self.transition_KK.shape)} and {list(self.emission_KV.shape)}"
            )
        for name, rows in (("transitions", self.transition_KK), ("emissions", self.emission_KV)):
            # NaN fails this test.
            if not ((rows >= 0).all() and (np.abs(rows.sum(1) - 1) < _SUM_ERROR).all()):
                raise ValueError(f"every row of {name} must be a distribution; normalise them")
        if (
            self.tokens[-1] != EOS
            or self.emission_KV[-1, -1] != 1
            or self.emission_KV[:-1, -1].any()
        ):
            raise ValueError(f"the last token must be {EOS!r}, emitted only by the last state")

    @property
    def num_states(self) -> int:
        """K."""
        return len(self.transition_KK)

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.tokens)

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token."""
        return len(self.tokens) - 1

    @functools.cached_property
    def initial_K(self) -> np.ndarray:
        """The stationary distribution pi = pi A, float64."""
        system = np.vstack(
            [self.transition_KK.T - np.eye(self.num_states), np.ones(self.num_states)]
        )
        target = np.append(np.zeros(self.num_states), 1.0)
        pi_K, _, rank, _ = np.linalg.lstsq(system, target)
        if rank < self.num_states:
            raise ValueError("the law has states that don't reach each other; fit it again")
        pi_K = np.maximum(pi_K, 0.0)
        return pi_K / pi_K.sum()

    @functools.cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the sha256 of its probabilities and tokens."""
        digest = hashlib.sha256("\n".join(self.tokens).encode())
        for rows in (self.transition_KK, self.emission_KV):
            digest.update(rows.astype("<f8").tobytes())
        return digest.hexdigest()[:16]

    # ------------------------------------------------------------------------------------- text

    def encode(self, text: str) -> np.ndarray:
        """Encode a document, token names separated by white space, as int32 ids.

        Raises:
          ValueError: naming the first word that isn't a token.
        """
        ids = {name: i for i, name in enumerate(self.tokens)}
        unknown = next((word for word in text.split() if word not in ids), None)
        if unknown is not None:
            raise ValueError(
                f"{unknown!r} is not in the vocabulary of the law ({self.vocab_size} tokens, like "
                f"{self.tokens[0]!r}); use tokens of its tokenizer.json, separated by spaces"
            )
        return np.array([ids[word] for word in text.split()], np.int32)

    def decode(self, tokens_L: Sequence[int]) -> str:
        """Decode ids to the text of a document; the inverse of `encode`."""
        check_tokens(self, np.asarray(tokens_L))
        return " ".join(self.tokens[int(i)] for i in tokens_L)

    def to_prose(self, tokens_L: Sequence[int]) -> str:
        """Decode ids to readable text, with joined words and one line per document."""
        text = "".join(self.tokens[int(i)] for i in tokens_L)
        return text.replace(EOS, "\n").replace("▁", " ").strip()

    # ------------------------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike) -> None:
        """Write the law to a .npz file, atomically."""
        path = pathlib.Path(path)
        content = io.BytesIO()
        np.savez_compressed(
            content,
            format=_FORMAT,
            transition=self.transition_KK,
            emission=self.emission_KV,
            tokens=np.array(self.tokens),
        )
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(content.getvalue())
        os.replace(partial, path)


def load(path: str | os.PathLike) -> Law:
    """Read a law from a .npz file.

    Raises:
      FileNotFoundError: the file doesn't exist.
      ValueError: the file isn't a law.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no law in {path}; make it with `python -m fsdfm_jax.exact`")
    try:
        with np.load(path, allow_pickle=False) as content:
            written = int(content["format"])
            law = content["transition"], content["emission"], tuple(map(str, content["tokens"]))
    except (KeyError, ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} isn't a law ({error}); make it again") from None
    if written != _FORMAT:
        raise ValueError(f"{path} has format {written}, expected {_FORMAT}; make it again")
    return Law(*law)


def check_tokens(law: Law, tokens: np.ndarray) -> None:
    """Raise ValueError for ids that aren't tokens of the law, naming one."""
    wrong = tokens[(tokens < 0) | (tokens >= law.vocab_size)]
    if wrong.size:
        raise ValueError(
            f"token id {int(wrong.flat[0])} is not in the vocabulary of the law, whose ids are 0 "
            f"to {law.vocab_size - 1}; use its tokenizer.json"
        )


# ------------------------------------------------------------------------------------------ samples


def sample(
    law: Law, rng: np.random.Generator, count: int, length: int, states_N: np.ndarray | None = None
) -> np.ndarray:
    """Draw independent blocks, int32 [N, L], from given first states or from stationarity."""
    if states_N is None:
        states_N = sample_states(law, rng, count)
    tokens_NL = np.empty((count, length), np.int32)
    for i in range(length):
        tokens_NL[:, i] = _draw(law.emission_KV, rng, states_N)
        states_N = _draw(law.transition_KK, rng, states_N)
    return tokens_NL


def sample_states(law: Law, rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw independent states of the stationary process, int [N]."""
    return _draw(law.initial_K[None], rng, np.zeros(count, np.intp))


def sample_documents(law: Law, rng: np.random.Generator, count: int) -> list[np.ndarray]:
    """Draw independent documents of random lengths, int32 each, without end-of-text."""
    drawn: list[list[np.ndarray]] = []  # for each step: the continuing documents, their tokens
    active = np.arange(count)
    states = np.full(count, law.num_states - 1)
    while len(active):
        states = _draw(law.transition_KK, rng, states)
        goes_on = states != law.num_states - 1
        active, states = active[goes_on], states[goes_on]
        drawn.append([active, _draw(law.emission_KV, rng, states)])
    which = np.concatenate([step[0] for step in drawn]) if drawn else np.zeros(0, np.intp)
    tokens = np.concatenate([step[1] for step in drawn]) if drawn else np.zeros(0, np.intp)
    tokens = tokens[np.argsort(which, kind="stable")].astype(np.int32)
    return np.split(tokens, np.bincount(which, minlength=count).cumsum()[:-1]) if count else []


def _draw(rows: np.ndarray, rng: np.random.Generator, which: np.ndarray) -> np.ndarray:
    """Draw an index from the distribution in each of the given rows."""
    size = rows.shape[1]
    # One sorted list for all rows: the values of row i are in (i, i+1].
    cumulative = rows.cumsum(1)
    cumulative = (cumulative / cumulative[:, -1:] + np.arange(len(rows))[:, None]).ravel()
    found = np.searchsorted(cumulative, which + rng.random(len(which)), side="right")
    return np.minimum(found - which * size, size - 1)


# ----------------------------------------------------------------------------------- exact figures


def forward(
    transition_KK: jax.Array, initial_BK: jax.Array, evidence_LBK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the forward algorithm, normalised at each position.

    Args:
      transition_KK: A.
      initial_BK: distribution of the first state, for each block.
      evidence_LBK: P(observation | state) at each position, up to a factor.

    Returns:
      (predicted_LBK: P(state | earlier observations), log_LB: log P(observation | earlier ones)).
    """

    def step(predicted_BK, evidence_BK):
        joint_BK = predicted_BK * evidence_BK
        seen_B1 = joint_BK.sum(-1, keepdims=True)
        return joint_BK / seen_B1 @ transition_KK, (predicted_BK, jnp.log(seen_B1[:, 0]))

    return jax.lax.scan(step, initial_BK, evidence_LBK)[1]


@jax.jit
def _token_logs(transition_KK, emission_KV, initial_BK, tokens_BL):
    return forward(transition_KK, initial_BK, emission_KV.T[tokens_BL.T])[1].T


@jax.jit
def _predictive_entropies(transition_KK, emission_KV, initial_BK, tokens_BL):
    predicted_LBK, _ = forward(transition_KK, initial_BK, emission_KV.T[tokens_BL.T])
    p_LBV = predicted_LBK @ emission_KV
    return -jax.scipy.special.xlogy(p_LBV, p_LBV).sum(-1).T


def _by_rows(function, law: Law, initial_NK: np.ndarray, tokens_NL: np.ndarray) -> np.ndarray:
    """Apply a jitted function to blocks in batches that fit into memory, float64 [N, L]."""
    tokens_NL = np.asarray(tokens_NL)
    check_tokens(law, tokens_NL)
    count, length = tokens_NL.shape
    entries = max(length, 1) * max(law.num_states, law.vocab_size)
    rows = max(1, min(count, _HELD_BYTES // (4 * entries)))
    matrices = np.float32(law.transition_KK), np.float32(law.emission_KV)
    parts = []
    for start in range(0, count, rows):
        part = np.arange(start, start + rows) % count  # equal shapes; padding is dropped
        parts.append(function(*matrices, np.float32(initial_NK[part]), tokens_NL[part]))
    return np.concatenate([np.asarray(part, np.float64) for part in parts])[:count]


def _stationary_NK(law: Law, count: int) -> np.ndarray:
    return np.broadcast_to(law.initial_K, (count, law.num_states))


def token_log_likelihoods(law: Law, tokens_NL: np.ndarray) -> np.ndarray:
    """log p(x_i | x_1 .. x_(i-1)) of stationary blocks, nats, float64 [N, L].

    Exact up to float32 arithmetic, about 1e-6 nats per token.

    Raises:
      ValueError: for ids that aren't tokens of the law.
    """
    return _by_rows(_token_logs, law, _stationary_NK(law, len(tokens_NL)), tokens_NL)


def log_likelihoods(law: Law, tokens_NL: np.ndarray) -> np.ndarray:
    """log p(x_1 .. x_L) of each block, nats, float64 [N]; raises as `token_log_likelihoods`."""
    return token_log_likelihoods(law, tokens_NL).sum(1)


def block_entropy(law: Law, rng: np.random.Generator, count: int, length: int) -> Figure:
    """Estimate H(x_1 .. x_L) of a block, nats, with an interval.

    No closed form is known. By the chain rule it is the sum of the mean entropies of
    p(. | x_1 .. x_(i-1)). These are computed exactly and averaged over `count` samples of the law,
    which has a fraction of the variance of -log p.
    """
    tokens_NL = sample(law, rng, count, length)
    entropies_NL = _by_rows(_predictive_entropies, law, _stationary_NK(law, count), tokens_NL)
    return intervals.normal(entropies_NL.sum(1))


def entropy_rate_bounds(
    law: Law, rng: np.random.Generator, count: int, length: int
) -> tuple[Figure, Figure]:
    """Lower and upper bound on the entropy rate, nats per token, each with an interval.

        H(x_L | x_1 .. x_(L-1), s_1)  <=  rate  <=  H(x_L | x_1 .. x_(L-1))

    (Cover & Thomas, Elements of Information Theory, section 4.5.) Both are averages of exactly
    computed entropies over `count` samples of the law.
    """
    states_N = sample_states(law, rng, count)
    tokens_NL = sample(law, rng, count, length, states_N)
    bounds = []
    for initial_NK in (np.eye(law.num_states)[states_N], _stationary_NK(law, count)):
        entropies_NL = _by_rows(_predictive_entropies, law, initial_NK, tokens_NL)
        bounds.append(intervals.normal(entropies_NL[:, -1]))
    return bounds[0], bounds[1]


def xlogx(x: np.ndarray) -> np.ndarray:
    """x log x, 0 at 0. Importing SciPy for it would cost a fifth of a second."""
    return x * np.log(np.where(x == 0, 1, x))


def conditional_entropy(law: Law, k: int) -> float:
    """H(x_k | x_1 .. x_(k-1)), nats, exactly, as a sum over all (k-1)-grams, for k in 1, 2, 3.

    Raises:
      ValueError: for another k.
    """
    if k not in (1, 2, 3):
        raise ValueError(f"exact conditional entropies need k = 1, 2 or 3, got {k}")
    joint_GK = law.initial_K[None]  # P((j-1)-gram, state), a row for each (j-1)-gram
    for _ in range(k - 1):
        joint_GK = np.concatenate(
            [joint_GK * emission_K @ law.transition_KK for emission_K in law.emission_KV.T]
        )
    total = 0.0
    for start in range(0, len(joint_GK), 4096):
        p_GV = joint_GK[start : start + 4096] @ law.emission_KV  # of the k-gram
        gram_G1 = p_GV.sum(1, keepdims=True)
        total -= xlogx(p_GV).sum() - xlogx(gram_G1).sum()
    return float(total)
