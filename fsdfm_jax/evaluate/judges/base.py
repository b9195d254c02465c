"""Language models that score samples: the in-house judge, and `open_judge` for all others."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.convert import formats
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.evaluate.judges import huggingface, ngram, scoring
from fsdfm_jax.evaluate.judges.scoring import Judge, Scores, Text
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params
from fsdfm_jax.stages import autoregressive

__all__ = ["SPECS", "AutoregressiveJudge", "Judge", "Scores", "Text", "check_spec", "open_judge"]

SPECS = (
    '"hf:FOLDER" (a causal language model in Hugging Face\'s format), "gguf:FILE", '
    '"package:NAME/PATH.gguf" (a file in an installed package), "ngram:pocketsphinx", '
    '"ngram:FILE" (.lm.bin, .lm or .arpa, also .gz) or "bundle:PATH", "bundle:PATH#RUN" (an '
    "autoregressive model of this project)"
)
# Batch widths are rounded up to a multiple of this, and of a quarter of the next lower power of
# two: few shapes are compiled, and at most a fifth of a long row is padding.
_WIDTH = 64
_LOGITS_MIB = ModelConfig.logits_mib


class AutoregressiveJudge:
    """The in-house judge, a network of the stage `autoregressive`.

    Every token is scored; the context of the first is the end-of-document token, as in training. A
    mask token is excluded and the probabilities renormalised.

    Args:
      params, model: of the network.
      tokenizer: of its training.
      name: see `Judge`.
      metadata: JSON dict with the origin of the parameters, for `describe`.
      batch_size: texts per batch.

    Raises:
      ValueError: the network isn't causal, or its vocabulary doesn't match the tokenizer.
    """

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        tokenizer: Tokenizer,
        *,
        name: str = "autoregressive",
        metadata: dict[str, Any],
        batch_size: int = 32,
    ):
        if not model.causal:
            raise ValueError(
                "The in-house judge must be an autoregressive model; these weights are of stage "
                f"{metadata.get('stage')!r}."
            )
        if not tokenizer.vocab_size <= model.vocab_size:
            raise ValueError(
                f"The tokenizer has {tokenizer.vocab_size} tokens, but the judge has "
                f"{model.vocab_size}; give the tokenizer of its training."
            )
        self.name, self.tokenizer = name, tokenizer.fingerprint
        self._params, self._tokenizer, self._batch_size = params, tokenizer, batch_size
        # Features are available only for factored logits.
        self._model = dataclasses.replace(model, logits_mib=model.logits_mib or _LOGITS_MIB)
        self._sha256 = bundle_lib.content_hash(params)
        self._metadata = metadata
        self._losses = jax.jit(self._token_losses)
        self._last_features = jax.jit(self._features_at)

    def describe(self) -> dict[str, Any]:
        """See `Judge`; "source" is the metadata given."""
        return {
            "kind": "autoregressive",
            "name": self.name,
            "sha256": self._sha256,
            "tokenizer": self.tokenizer,
            "first_token": "given end of document",
            "context": None,  # the whole text
            "dtype": self._model.dtype,
            # These can't be inferred from the weights.
            "network": {"num_heads": self._model.num_heads, "attention": self._model.attention},
            "tokens": self._tokenizer.vocab_size,
            "source": self._metadata,
            "versions": {"jax": jax.__version__},
        }

    def score_ids(self, tokens_NL: np.ndarray, counted_NL: np.ndarray | None = None) -> Scores:
        """See `Judge`."""
        tokens_NL, counted_NL = scoring.check_ids(tokens_NL, counted_NL, self._tokenizer.vocab_size)
        sizes_NL = self._tokenizer.num_bytes(tokens_NL)
        return self._score(list(tokens_NL), list(counted_NL), list(sizes_NL))

    def score_text(self, texts: Sequence[Text]) -> Scores:
        """See `Judge`."""
        encoded = self._tokenizer.encode_with_offsets([text.text for text in texts])
        counted, sizes = scoring.counted_tokens(
            texts, [[end for _, end in offsets] for _, offsets in encoded]
        )
        return self._score([ids for ids, _ in encoded], counted, sizes)

    def features(self, texts: Sequence[Text]) -> np.ndarray:
        """See `Judge`: the input of the head after the last token."""
        sequences = self._tokenizer.encode_batch([text.text for text in texts])
        features_ND = np.zeros((len(texts), self._model.width), np.float32)
        # Inputs are shifted right, so the last token is read at one more position.
        lengths = [len(ids) + 1 for ids in sequences]
        for indices in scoring.batches(lengths, self._batch_size):
            tokens_BL = self._padded([sequences[i] for i in indices], lengths[indices[0]])
            last_B = np.zeros(self._batch_size, np.int32)
            last_B[: len(indices)] = [len(sequences[i]) for i in indices]
            values_BD = self._last_features(self._params, tokens_BL, last_B)
            features_ND[indices] = np.asarray(values_BD)[: len(indices)]
        return features_ND

    def _score(self, sequences, counted, sizes) -> Scores:
        nll_N = np.zeros(len(sequences))
        # Nothing after the last token that counts needs the network.
        ends = [int(np.flatnonzero(part)[-1]) + 1 if part.any() else 0 for part in counted]
        for indices in scoring.batches(ends, self._batch_size):
            tokens_BL = self._padded([sequences[i][: ends[i]] for i in indices], ends[indices[0]])
            losses_BL = np.asarray(self._losses(self._params, tokens_BL), np.float64)
            for row, i in enumerate(indices):
                nll_N[i] = losses_BL[row, : ends[i]][counted[i][: ends[i]]].sum()
        tokens_N = np.asarray([part.sum() for part in counted], np.int64)
        num_bytes_N = scoring.sum_counted(sizes, counted)
        return Scores(nll_N, tokens_N, num_bytes_N, np.zeros_like(tokens_N))

    def _padded(self, sequences, longest: int) -> np.ndarray:
        # Pad the last batch with empty rows to avoid a new shape.
        unit = max(_WIDTH, 2 ** (longest.bit_length() - 3))
        tokens_BL = np.zeros((self._batch_size, -(-longest // unit) * unit), np.int32)
        for row, ids in enumerate(sequences):
            tokens_BL[row, : len(ids)] = ids
        return tokens_BL

    def _token_losses(self, params, tokens_BL):
        eos_id, num_tokens = self._tokenizer.eos_id, self._tokenizer.vocab_size
        return autoregressive.token_losses(
            params, self._model, eos_id, tokens_BL, num_tokens=num_tokens
        )

    def _features_at(self, params, tokens_BL, last_B):
        logits = autoregressive.predict_next(params, self._model, self._tokenizer.eos_id, tokens_BL)
        features_BLD = logits.features_BLD
        return jnp.take_along_axis(features_BLD, last_B[:, None, None], axis=1)[:, 0].astype(
            jnp.float32
        )


class _Located(NamedTuple):
    """A judge that has been located but not opened.

    Attributes:
      open: (place, batch_size, ids_tokenizer) -> the judge.
      place: argument of `open`, depending on the kind.
    """

    open: Callable[[Any, int, Tokenizer | None], Judge]
    place: Any


def check_spec(spec: str) -> None:
    """Check a judge spec early, without loading anything.

    Raises:
      ValueError: the form is unknown, or a file, folder, package or library is missing. The content
        of files isn't checked.
    """
    _locate(spec)


def open_judge(spec: str, *, batch_size: int = 32, ids_tokenizer: Tokenizer | None = None) -> Judge:
    """Open a judge that isn't a run of the pipeline.

    Args:
      spec: one of `SPECS`.
      batch_size: texts per batch.
      ids_tokenizer: of the samples; a Hugging Face model with the same vocabulary scores their ids
        as well as their text.

    Raises:
      ValueError: the form is unknown, a file or library is missing, or it isn't a language model.
    """
    located = _locate(spec)
    return located.open(located.place, batch_size, ids_tokenizer)


def _locate(spec: str) -> _Located:
    kind, colon, rest = spec.partition(":")
    if kind not in _KINDS or not colon or not rest:
        raise ValueError(
            f'Unknown judge {spec!r}; expected "autoregressive" (the run of that stage), {SPECS}.'
        )
    return _KINDS[kind](rest)


def _locate_folder(rest: str) -> _Located:
    path = _existing(rest, f"hf:{rest}")
    huggingface.check_folder(path)
    return _Located(_open_folder, path)


def _open_folder(path: pathlib.Path, batch_size: int, ids_tokenizer: Tokenizer | None) -> Judge:
    return huggingface.open_folder(path, batch_size=batch_size, ids_tokenizer=ids_tokenizer)


def _locate_gguf(rest: str) -> _Located:
    path = _existing(rest, f"gguf:{rest}")
    huggingface.check_gguf(path)
    return _Located(_open_gguf, path)


def _open_gguf(path: pathlib.Path, batch_size: int, ids_tokenizer: Tokenizer | None) -> Judge:
    return huggingface.open_gguf(path, batch_size=batch_size, ids_tokenizer=ids_tokenizer)


def _locate_package(rest: str) -> _Located:
    name, _, relative = rest.partition("/")
    remedy = f'install it to use the judge "package:{rest}"'
    folder = tokenizer_lib.package_folder(name, remedy)
    if not relative.lower().endswith(".gguf"):
        raise ValueError(f'Expected the judge as "package:NAME/PATH.gguf", got "package:{rest}".')
    return _locate_gguf(str(folder / relative))


def _locate_ngram(rest: str) -> _Located:
    ngram.check_library()
    path = None if rest == "pocketsphinx" else _existing(rest, f"ngram:{rest}")
    return _Located(_open_ngram, path)


def _open_ngram(
    path: pathlib.Path | None, batch_size: int, ids_tokenizer: Tokenizer | None
) -> Judge:
    del batch_size, ids_tokenizer  # it reads words, not ids
    return ngram.open_pocketsphinx() if path is None else ngram.NGramJudge(path)


def _locate_bundle(rest: str) -> _Located:
    path, run = pathlib.Path(rest).expanduser(), ""
    if not path.exists():
        before, _, run = rest.rpartition("#")
        path = _existing(before or rest, f"bundle:{rest}")
    return _Located(_open_bundle, (path, run))


def _open_bundle(
    place: tuple[pathlib.Path, str], batch_size: int, ids_tokenizer: Tokenizer | None
) -> Judge:
    del ids_tokenizer  # it has its own tokenizer
    path, run = place
    bundle = formats.open_bundle(path, stage=run)
    if bundle.tokenizer is None:
        raise ValueError(
            f"{path} has no tokenizer, so it can't judge text; convert it with the tokenizer of "
            "its training (python -m fsdfm_jax.convert --tokenizer=..)."
        )
    if not bundle.model.causal:
        raise ValueError(
            f"A judge must be an autoregressive model; {path} has a model of stage "
            f"{bundle.provenance.get('stage')!r}. For a run of a working directory use "
            '"bundle:PATH#RUN".'
        )
    known = ("run", "stage", "weights", "step", "data", "code_version")
    return AutoregressiveJudge(
        bundle.device_params(),
        generate_lib.portable(bundle.model),
        bundle.tokenizer,
        name=f"{path.resolve().name}#{run}" if run else path.resolve().name,
        metadata={key: bundle.provenance.get(key) for key in known},
        batch_size=batch_size,
    )


_KINDS = {
    "hf": _locate_folder,
    "gguf": _locate_gguf,
    "package": _locate_package,
    "ngram": _locate_ngram,
    "bundle": _locate_bundle,
}


def _existing(text: str, spec: str) -> pathlib.Path:
    path = pathlib.Path(text).expanduser()
    if not path.exists():
        raise ValueError(f"{path} (judge {spec!r}) doesn't exist; expected {SPECS}.")
    return path
