"""Judges loaded with Hugging Face transformers: a checkpoint folder or a GGUF file.

Text is scored as in the literature (SEDD, MDLM, FS-DFM with GPT-2 large): no beginning-of-text
token is added, so the first token of a text has no context and isn't scored, and its bytes aren't
counted. Nothing is downloaded.
"""

import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.evaluate.judges import scoring
from fsdfm_jax.evaluate.judges.scoring import Scores, Text

_LOGITS_MIB = 512  # float32 logits at once, unless a single row exceeds it
_POSITIONS = 256  # positions per log-softmax


class _Window(NamedTuple):
    """A part of a text for one model call: ids [start, stop); ids from `first` on are scored."""

    text: int
    start: int
    first: int
    stop: int


class HuggingFaceJudge:
    """A causal language model of transformers, on torch's accelerator if there is one.

    Texts longer than the model's context are read in windows that overlap by half. Each token is
    scored once, with at least half a context.

    Args:
      model, tokenizer: of transformers; a fast tokenizer.
      name, sha256: see `Judge`.
      batch_size: windows per batch; fewer if their logits are large.
      context: tokens per window; None for the model's limit.
      ids_tokenizer: of the samples. If all its ids have the same tokens in the model's tokenizer,
        ids are scored too.

    Raises:
      ValueError: the tokenizer isn't fast or doesn't match the model, or the context is below 2.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        sha256: str,
        batch_size: int = 32,
        context: int | None = None,
        ids_tokenizer: Tokenizer | None = None,
    ):
        if not tokenizer.is_fast:
            raise ValueError(
                f"The judge {name!r} has a tokenizer without character offsets; save the model "
                "with a fast one (a tokenizer.json)."
            )
        self._backend = tokenizer.backend_tokenizer
        # Special tokens in a text are text; never truncate or pad.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        content = self._backend.to_str().encode()
        self._own_tokenizer = hashlib.sha256(content).hexdigest()[:16]
        own = self._backend.get_vocab(with_added_tokens=True)
        if max(own.values()) >= model.get_input_embeddings().num_embeddings:
            raise ValueError(
                f"The tokenizer of the judge {name!r} has ids up to {max(own.values())}, but the "
                f"model embeds {model.get_input_embeddings().num_embeddings}; they aren't of the "
                "same checkpoint."
            )
        limit = getattr(model.config, "max_position_embeddings", None)
        self._context = min(filter(None, (context, limit)), default=None)
        if self._context is not None and self._context < 2:
            raise ValueError(f"The context must be at least 2 tokens, got {self._context}.")
        same = ids_tokenizer is not None and ids_tokenizer.vocabulary.items() <= own.items()
        self._ids_tokenizer = ids_tokenizer if same else None
        self.name, self.tokenizer = name, ids_tokenizer.fingerprint if same else None
        self._sha256, self._batch_size = sha256, batch_size
        self._model = model.eval().to(_device())

    def describe(self) -> dict[str, Any]:
        """See `Judge`."""
        import torch
        import transformers

        return {
            "kind": "huggingface",
            "name": self.name,
            "sha256": self._sha256,
            # Heads, rotary base and epsilons can't be inferred from the weights.
            "config": _hash_config(self._model.config),
            "tokenizer": self.tokenizer,
            "own_tokenizer": self._own_tokenizer,
            "first_token": "not scored",
            "context": self._context,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def score_ids(self, tokens_NL: np.ndarray, counted_NL: np.ndarray | None = None) -> Scores:
        """See `Judge`. The first token, if it counts, is in `skipped`."""
        if self._ids_tokenizer is None:
            raise ValueError(
                f"The judge {self.name!r} has a different vocabulary than the samples; decode them "
                "and score the text."
            )
        tokens_NL, counted_NL = scoring.check_ids(
            tokens_NL, counted_NL, self._ids_tokenizer.vocab_size
        )
        sizes_NL = self._ids_tokenizer.num_bytes(tokens_NL)
        return self._score(list(tokens_NL), list(counted_NL), list(sizes_NL))

    def score_text(self, texts: Sequence[Text]) -> Scores:
        """See `Judge`. The first token, if it counts, is in `skipped`."""
        encodings = self._encode(texts)
        counted, sizes = scoring.counted_tokens(
            texts, [[end for _, end in encoding.offsets] for encoding in encodings]
        )
        return self._score([np.asarray(e.ids, np.int64) for e in encodings], counted, sizes)

    def features(self, texts: Sequence[Text]) -> np.ndarray:
        """See `Judge`: the last hidden state with at most one context; 0 for an empty text."""
        sequences = [np.asarray(e.ids, np.int64) for e in self._encode(texts)]
        if self._context is not None:
            sequences = [ids[-self._context :] for ids in sequences]
        features_ND = np.zeros((len(texts), self._model.config.hidden_size), np.float32)
        for indices in scoring.batches([len(ids) for ids in sequences], self._batch_size):
            parts = [sequences[i] for i in indices]
            hidden_BLD = self._run(self._model.base_model, parts).last_hidden_state
            for row, i in enumerate(indices):
                features_ND[i] = hidden_BLD[row, len(parts[row]) - 1].float().numpy(force=True)
        return features_ND

    def _encode(self, texts: Sequence[Text]) -> list[Any]:
        return self._backend.encode_batch([text.text for text in texts], add_special_tokens=False)

    def _score(self, sequences, counted, sizes) -> Scores:
        nll_N = np.zeros(len(sequences))
        windows = [
            window
            for i, ids in enumerate(sequences)
            for window in _windows(i, len(ids), self._context)
            if counted[i][window.first : window.stop].any()
        ]
        lengths = [window.stop - window.start for window in windows]
        for indices in scoring.batches(lengths, self._rows(max(lengths, default=1))):
            batch = [windows[i] for i in indices]
            losses = self._losses([sequences[w.text][w.start : w.stop] for w in batch])
            for window, losses_L in zip(batch, losses, strict=True):
                counts = counted[window.text][window.first : window.stop]
                # Entry i is the loss of the window's token i + 1.
                own = losses_L[window.first - window.start - 1 :]
                nll_N[window.text] += own[counts].sum()
        first = np.asarray([part[:1].sum() for part in counted], np.int64)
        scored = [part[1:] for part in counted]
        tokens = np.asarray([part.sum() for part in scored], np.int64)
        num_bytes = scoring.sum_counted((part[1:] for part in sizes), scored)
        return Scores(nll_N, tokens, num_bytes, first)

    def _rows(self, longest: int) -> int:
        """Maximum number of windows of that length per batch, given the size of their logits."""
        bytes_each = longest * self._model.get_input_embeddings().num_embeddings * 4
        return max(1, min(self._batch_size, _LOGITS_MIB * 2**20 // bytes_each))

    def _losses(self, sequences: list[np.ndarray]) -> list[np.ndarray]:
        """-log p of each token but the first given its context, float64 [length - 1], nats."""
        import torch

        logits_BLV = self._run(self._model, sequences).logits
        losses = []
        for logits_LV, ids in zip(logits_BLV, sequences, strict=True):
            targets_L = torch.as_tensor(ids[1:], device=logits_LV.device)
            parts = [
                torch.nn.functional.cross_entropy(chunk_LV.float(), chunk_L, reduction="none")
                for chunk_LV, chunk_L in zip(
                    logits_LV[: len(targets_L)].split(_POSITIONS),
                    targets_L.split(_POSITIONS),
                    strict=True,
                )
            ]
            losses.append(torch.cat(parts).numpy(force=True).astype(np.float64))
        return losses

    def _run(self, network: Any, sequences: list[np.ndarray]) -> Any:
        """Run a network on sequences, padded on the right."""
        import torch

        shape = (len(sequences), max(map(len, sequences)))
        tokens_BL, mask_BL = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, ids in enumerate(sequences):
            tokens_BL[row, : len(ids)] = ids
            mask_BL[row, : len(ids)] = 1
        device = self._model.device
        with torch.inference_mode():
            return network(
                input_ids=torch.as_tensor(tokens_BL, device=device),
                attention_mask=torch.as_tensor(mask_BL, device=device),
                use_cache=False,
            )


def open_folder(path: pathlib.Path, **options: Any) -> HuggingFaceJudge:
    """Open the model of a folder with config.json, tokenizer and weights, in float32.

    Args:
      path: the folder; its name is the name of the judge.
      **options: batch_size, context, ids_tokenizer; see `HuggingFaceJudge`.

    Raises:
      ValueError: it has no causal language model, or transformers or torch is missing.
    """
    return _open(path, check_folder(path), path.resolve().name, {}, options)


def check_folder(path: pathlib.Path) -> list[pathlib.Path]:
    """Find the weight files of a folder, without loading them.

    Raises:
      ValueError: it isn't a model folder, or transformers or torch is missing.
    """
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not (path / "config.json").is_file() or not files:
        raise ValueError(
            f"{path} is not a folder of a Hugging Face model: expected config.json, tokenizer.json "
            "and .safetensors or .bin files, as written by save_pretrained."
        )
    _check_libraries(path.resolve().name, "torch", "transformers")
    return files


def open_gguf(path: pathlib.Path, **options: Any) -> HuggingFaceJudge:
    """Open the model of a GGUF file with dequantised weights; otherwise as `open_folder`."""
    check_gguf(path)
    return _open(path.parent, [path], path.stem, {"gguf_file": path.name}, options)


def check_gguf(path: pathlib.Path) -> None:
    """Raise ValueError if a library for reading GGUF files is missing; nothing is loaded."""
    _check_libraries(path.stem, "torch", "transformers", "gguf", "accelerate")


def _check_libraries(name: str, *needed: str) -> None:
    missing = [library for library in needed if importlib.util.find_spec(library) is None]
    if missing:
        raise ValueError(
            f"The judge {name!r} needs {', '.join(missing)}; install it with "
            "`pip install 'fsdfm_jax[judge]'`."
        )


def _open(folder, files, name, source, options) -> HuggingFaceJudge:
    import torch
    import transformers

    # Use neither the network nor code from the checkpoint.
    source = {"local_files_only": True, "trust_remote_code": False} | source
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **source
        )
    except Exception as error:  # the readers raise many types for bad files
        raise ValueError(
            f"{files[0]} can't be read as a causal language model: {type(error).__name__}: "
            f"{str(error)[:500]}"
        ) from error
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:  # transformers would initialise them at random
        raise ValueError(
            f"{files[0]} lacks weights of its model: {', '.join(absent)[:500]}; save the model "
            "with its language modelling head."
        )
    return HuggingFaceJudge(
        model, tokenizer, name=name, sha256=scoring.hash_files(files), **options
    )


def _hash_config(config: Any) -> str:
    """First 16 hex digits of the sha256 of the part of a configuration that affects the network."""
    facts = config.to_dict()
    # Origin and library version; the dtype is a separate entry of the description.
    for name in ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype"):
        facts.pop(name, None)
    canonical = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _windows(text: int, length: int, context: int | None) -> list[_Window]:
    """Divide a text into windows; tokens 1 .. length - 1 are scored once each."""
    size = length if context is None else context
    windows, start, first = [], 0, 1
    while first < length:
        stop = min(start + size, length)
        windows.append(_Window(text, start, first, stop))
        start, first = start + size // 2, stop
    return windows


def _device() -> Any:
    """Torch's accelerator, or its default device."""
    import torch

    return torch.accelerator.current_accelerator() or torch.get_default_device()
