"""Reference text: held-out blocks, and the data for the naive controls."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data.prepared import PreparedData
from fsdfm_jax.evaluate import ngrams, tasks
from fsdfm_jax.evaluate.ngrams import NgramModel
from fsdfm_jax.evaluate.plan import Settings

# Training blocks for the frequencies of the unigram control.
_UNIGRAM_BLOCKS = 1024
_SENTENCE = 24  # tokens of the repeated control's sentence


class HeldOut(NamedTuple):
    """Real text.

    Attributes:
      real_NL: held-out blocks, int32 [N, L].
      reference_ML: other held-out blocks, for MAUVE; None if there are too few.
      bounded_KL: held-out blocks for the bounds of base models, independent of N; None: no bounds.
      unigram_V: token frequencies of the training text; they sum to 1.
      sentence: ids from the start of a held-out block.
      fingerprint: of the prepared data.
      ngrams: fits the n-gram control to the training text.
    """

    real_NL: np.ndarray
    reference_ML: np.ndarray | None
    bounded_KL: np.ndarray | None
    unigram_V: np.ndarray
    sentence: np.ndarray
    fingerprint: str
    ngrams: Callable[[], NgramModel]


def read(prepared: PreparedData, num_samples: int, bound_samples: int = 0) -> HeldOut:
    """Read the reference text from a prepared folder.

    Args:
      prepared: the folder.
      num_samples: maximum blocks of real text.
      bound_samples: maximum blocks for bounds.
    """
    source, train = prepared.source("validation"), prepared.source("train")
    real_NL = prepared_lib.validation_blocks(source, min(num_samples, len(source)))
    reference_ML = None
    if len(source) >= 2 * num_samples:  # enough to compare real text with other real text
        both = prepared_lib.validation_blocks(source, 2 * num_samples)
        real_NL, reference_ML = both[::2], both[1::2]
    bounded_KL = None
    if bound_samples:
        bounded_KL = prepared_lib.validation_blocks(source, min(bound_samples, len(source)))
    blocks = prepared_lib.validation_blocks(train, min(len(train), _UNIGRAM_BLOCKS))
    vocab_size = prepared.tokenizer.vocab_size
    counts_V = np.bincount(blocks.ravel(), minlength=vocab_size)
    return HeldOut(
        real_NL,
        reference_ML,
        bounded_KL,
        counts_V / counts_V.sum(),
        real_NL[0, : min(_SENTENCE, prepared.block_length)],
        prepared.fingerprint,
        functools.cache(lambda: ngrams.fit(train, vocab_size)),
    )


def check(num_blocks: int, settings: Settings) -> None:
    """Raise ValueError for a conditional task with fewer held-out blocks than samples."""
    if settings.task != tasks.UNCONDITIONAL and num_blocks < settings.num_samples:
        raise ValueError(
            f"The held-out text has {num_blocks} blocks, but eval.task needs one for each of "
            f"eval.num_samples={settings.num_samples}: lower eval.num_samples or "
            "data.block_length, or raise data.holdout."
        )
