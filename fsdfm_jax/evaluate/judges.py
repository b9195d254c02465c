"""Language models that score samples: the in-house autoregressive model, on ids or text."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.stages import autoregressive
from fsdfm_jax.tokenizer import Tokenizer
from fsdfm_jax.workdir import Weights

# Lengths of re-tokenised texts are rounded up to a multiple of this, to compile a few shapes only.
_LENGTH_BUCKET = 64


class Scores(NamedTuple):
    """Negative log-likelihood in nats and number of tokens of each text, float64 / int64 [N]."""

    nll: np.ndarray
    tokens: np.ndarray


class AutoregressiveJudge:
    """Scores every token with a run of `autoregressive`; the first given the end of a document.

    Args:
      weights: of that run.
      tokenizer: the run's tokenizer.
      batch_size: texts scored at once.
    """

    def __init__(self, weights: Weights, tokenizer: Tokenizer, *, batch_size: int = 32):
        if not weights.model.causal:
            raise ValueError(
                "The in-house judge is an autoregressive model; the weights given belong to stage "
                f"{weights.metadata['stage']!r}."
            )
        self._weights, self._tokenizer, self._batch_size = weights, tokenizer, batch_size

        def score(params, tokens_BL, counted_BL):
            losses_BL = autoregressive.token_losses(
                params, weights.model, tokenizer.eos_id, tokens_BL
            )
            return jnp.sum(losses_BL * counted_BL, axis=1)

        self._score = jax.jit(score)

    def score_ids(self, tokens_NL: np.ndarray) -> Scores:
        """Scores raw ids, int [N, L], without a detour through text."""
        return self._score_lists([list(row) for row in np.asarray(tokens_NL)])

    def score_text(self, texts: Sequence[str]) -> Scores:
        """Scores texts after tokenising them anew; an empty text has 0 tokens and 0 nats."""
        return self._score_lists(self._tokenizer.encode_batch(list(texts)))

    def _score_lists(self, sequences: list[list[int]]) -> Scores:
        counts = np.asarray([len(s) for s in sequences], np.int64)
        width = max(-(-int(counts.max(initial=1)) // _LENGTH_BUCKET), 1) * _LENGTH_BUCKET
        nll = np.zeros(len(sequences))
        for start in range(0, len(sequences), self._batch_size):
            part = sequences[start : start + self._batch_size]
            # The last batch is filled up with empty rows: no remainder is dropped, no shape is new.
            tokens = np.zeros((self._batch_size, width), np.int32)
            counted = np.zeros((self._batch_size, width), np.float32)
            for row, sequence in enumerate(part):
                tokens[row, : len(sequence)] = sequence
                counted[row, : len(sequence)] = 1.0
            values = self._score(self._weights.params, tokens, counted)
            nll[start : start + len(part)] = np.asarray(values)[: len(part)]
        return Scores(nll, counts)
