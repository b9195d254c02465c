"""Pack documents into blocks: append an end-of-text token to each, concatenate, cut equally."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fsdfm_jax.data.corpus import Document
from fsdfm_jax.data.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1 << 20  # characters to encode together
_BATCH_DOCUMENTS = 1024


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """Counts from packing one split.

    Attributes:
      documents: number of documents.
      tokens: of all documents, including one end-of-text token each.
      blocks: number of blocks stored.
      dropped_tokens: tokens after the last full block; tokens = blocks * L + dropped_tokens.
      sha256: of the blocks in document order, as little-endian int32.
    """

    documents: int
    tokens: int
    blocks: int
    dropped_tokens: int
    sha256: str


class Packer:
    """Packs a stream of documents into blocks and counts them.

    Attributes:
      characters: of the documents so far.
      lost: characters lost in tokenisation, see `Tokenizer.lost`.
    """

    def __init__(self, tokenizer: Tokenizer, block_length: int):
        self._tokenizer = tokenizer
        self._block_length = block_length
        self._rest = np.empty(0, np.int32)
        self._documents = self._tokens = self._blocks = 0
        self._digest = hashlib.sha256()
        self.characters = self.lost = 0

    def pack(self, documents: Sequence[Document]) -> np.ndarray:
        """Pack documents; return the full blocks, int32 [N, L], and keep the rest for later."""
        texts = [document.text for document in documents]
        ids = self._tokenizer.encode_batch(texts)
        self.characters += sum(map(len, texts))
        self.lost += self._tokenizer.lost(texts, ids)
        ends = [self._tokenizer.eos_id]
        stream = np.concatenate([self._rest, *(np.array(i + ends, np.int32) for i in ids)])
        self._documents += len(documents)
        self._tokens += len(stream) - len(self._rest)
        full, self._rest = np.split(stream, [len(stream) - len(stream) % self._block_length])
        self._digest.update(full.astype("<i4").tobytes())
        blocks_NL = full.reshape(-1, self._block_length)
        self._blocks += len(blocks_NL)
        return blocks_NL

    def blocks(self, documents: Iterable[Document]) -> Iterator[np.ndarray]:
        """Yield int32 [L] blocks; the tokens after the last full block are dropped."""
        for batch in batches(documents):
            yield from self.pack(batch)

    @property
    def counts(self) -> SplitCounts:
        """Counts so far; final once all documents are packed."""
        return SplitCounts(
            documents=self._documents,
            tokens=self._tokens,
            blocks=self._blocks,
            dropped_tokens=self._tokens - self._blocks * self._block_length,
            sha256=self._digest.hexdigest(),
        )


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group a stream into lists for encoding: large enough to be efficient, bounded in memory."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_MOST_LOST = 0.05  # of the characters


def check_lost(characters: int, lost: int) -> float:
    """Compute the fraction of characters lost in tokenisation.

    Raises:
      ValueError: if it is above 5%: the model would learn a different text.
    """
    share = lost / max(characters, 1)
    if share > _MOST_LOST:
        raise ValueError(
            f"the tokenizer loses {share:.1%} of the text's {characters} characters; at most "
            f"{_MOST_LOST:.0%} are allowed. It has no token for unknown words, or is for another "
            "language; choose another data.tokenizer"
        )
    return share


def check_blocks(split: str, counts: SplitCounts, block_length: int) -> None:
    """Raise ValueError, with counts and remedy, for a split without a full block."""
    if counts.blocks == 0:
        raise ValueError(
            f"the {split} split has no full block of {block_length} tokens: its "
            f"{counts.documents} document(s) have {counts.tokens} tokens; lower "
            "data.block_length, give more text, or change data.holdout to move documents between "
            "the splits"
        )
