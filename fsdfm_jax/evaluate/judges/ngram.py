"""Word n-gram models as judges, in formats of pocketsphinx, including its bundled model.

The bundled one is a trigram model of 72,544 lower-case English words, 27 MB. A word model ignores
punctuation, case and layout. It is a second opinion, independent of all networks.
"""

import importlib.metadata
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.evaluate.judges import scoring
from fsdfm_jax.evaluate.judges.scoring import Scores, Text

# Letters and digits, with apostrophes inside; everything else separates words.
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_REMEDY = "install what it needs with `pip install 'fsdfm_jax[ngram]'`"
_SHIPPED = "model/en-us/en-us.lm.bin"
_SUFFIXES = (".gz", ".bin", ".lm", ".arpa", ".dmp")


class NGramJudge:
    """An n-gram model over lower-case words.

    The context of a word is the n - 1 words before it, fewer at the start of a text and after an
    unknown word. Unknown words are skipped and counted. The bytes of a text are those of its scored
    words, without separators.

    Args:
      path: .lm.bin, .lm, .arpa or .dmp, also .gz.
      name: see `Judge`; "" for the file name without suffixes.

    Raises:
      ValueError: pocketsphinx is missing, or can't read the file.
    """

    tokenizer = None

    def __init__(self, path: pathlib.Path, *, name: str = ""):
        check_library()
        import pocketsphinx

        pocketsphinx.set_loglevel("FATAL")  # it logs each format that doesn't match
        # Its logarithms are integers to a base b (1.0001 by default): ln p = i ln b.
        self._math = pocketsphinx.LogMath()
        self._zero = self._math.get_zero()  # log of 0, returned for unknown words
        try:
            self._model = pocketsphinx.NGramModel(pocketsphinx.Config(), self._math, str(path))
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} can't be read as an n-gram model ({error}); expected .lm.bin, .lm or "
                ".arpa, also .gz."
            ) from error
        self.name = name or _stem(path)
        self._sha256 = scoring.hash_files([path])
        self._given = self._model.size() - 1

    def describe(self) -> dict[str, Any]:
        """See `Judge`."""
        return {
            "kind": "ngram",
            "name": self.name,
            "sha256": self._sha256,
            "tokenizer": None,
            "words": f"lower-case matches of {WORD.pattern}",
            "bytes": "of scored words",
            "first_token": "given nothing",
            "context": self._given,
            "dtype": None,
            "versions": {"pocketsphinx": importlib.metadata.version("pocketsphinx")},
        }

    def score_ids(self, tokens_NL: np.ndarray, counted_NL: np.ndarray | None = None) -> Scores:
        """Raise ValueError: a word model takes text."""
        raise ValueError(
            f"The judge {self.name!r} scores words; decode the samples and score the text."
        )

    def score_text(self, texts: Sequence[Text]) -> Scores:
        """See `Judge`; `num_bytes` includes neither skipped words nor separators."""
        results = [self._score(text) for text in texts]
        columns = zip(*results, strict=True) if results else ((),) * 4
        nll, *counts = columns
        return Scores(np.asarray(nll, np.float64), *(np.asarray(c, np.int64) for c in counts))

    def _score(self, text: Text) -> tuple[float, int, int, int]:
        counted_C = scoring.counted_characters(text)
        nll, tokens, num_bytes, skipped, before = 0.0, 0, 0, 0, []
        for match in WORD.finditer(text.text):
            word = match.group().lower().replace("’", "'")
            counts = counted_C[match.end() - 1]
            log = self._model.prob([word, *before])  # the word, then its context backwards
            if log <= self._zero:
                before = []
                skipped += counts
                continue
            if counts:
                nll -= self._math.log_to_ln(log)
                tokens += 1
                num_bytes += len(match.group().encode())
            before = [word, *before][: self._given]
        return nll, tokens, num_bytes, int(skipped)


def check_library() -> None:
    """Raise ValueError if pocketsphinx isn't installed, without importing it."""
    tokenizer_lib.package_folder("pocketsphinx", _REMEDY)


def open_pocketsphinx() -> NGramJudge:
    """Open the English model of the package pocketsphinx.

    Raises:
      ValueError: it is not installed.
    """
    folder = tokenizer_lib.package_folder("pocketsphinx", _REMEDY)
    return NGramJudge(folder / _SHIPPED, name="pocketsphinx")


def _stem(path: pathlib.Path) -> str:
    name = path.name
    while pathlib.Path(name).suffix in _SUFFIXES:
        name = pathlib.Path(name).stem
    return name
