"""Models in the layout of the Hugging Face Hub, and downloads from the Hub.

    config.json             "model_type", "auto_map" and the output of `bundle.describe`
    model.safetensors       weights with PyTorch-style names (layout "hub"), in shards if large
    generation_config.json  default sampler: {"sampling": {"steps": 8, ..}, "length": 128}
    tokenizer.json, tokenizer_config.json
    modeling_fsdfm.py       the network in PyTorch
    README.md               model card: usage, figures, provenance

`fsdfm_jax.load` reads such folders, also after `transformers` has saved them again. It reads only
tensors and JSON and never runs code from a folder.

The card has the figures of a report if one is given: rows measured on exactly these weights, by
their hash, with held-out text and controls. Everything from a file is escaped.
"""

import dataclasses
import html
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fsdfm_jax import extras, io
from fsdfm_jax.convert import safetensors as safetensors_lib
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference.bundle import BadFile, Bundle, Leaf
from fsdfm_jax.training import recipe

MODEL_TYPE = "fsdfm"
MODELING = "modeling_fsdfm.py"
_CONFIG, _GENERATION = "config.json", "generation_config.json"
# Patterns of the files in a folder of this layout.
CONTENTS = ("model*.safetensors", "*.json", MODELING, "README.md", ".gitattributes")
_DOWNLOADED = ("*.safetensors", "*.json")
_MOST_ROWS = 12  # in the card's table


# ---------------------------------------------------------------------------------------- writing
def write(
    folder: pathlib.Path, bundle: Bundle, *, dtype: str, report: pathlib.Path | None = None
) -> None:
    """Write the folder, with one stacked parameter (or one shard of a large model) in memory.

    Args:
      folder: must not exist; after an error the caller removes it.
      bundle: the model.
      dtype: of the weights in the file, "float32" | "bfloat16".
      report: folder of a report with figures for the card.

    Raises:
      ValueError: for a report that can't be read.
    """
    rows = [] if report is None else read_report(report)
    sums: dict[str, str] = {}
    safetensors_lib.write_folder(
        folder, _summed(bundle, sums), layout=safetensors_lib.HUB, dtype=dtype
    )
    io.write_json(folder / _CONFIG, _config(bundle))
    generation = {"sampling": bundle.sampling().to_dict(), "length": bundle.block_length}
    io.write_json(folder / _GENERATION, generation)
    if bundle.tokenizer is not None:
        io.write_json(folder / "tokenizer_config.json", _tokenizer_config(bundle))
    source = pathlib.Path(__file__).with_name(MODELING)
    io.write_bytes(folder / MODELING, source.read_bytes())
    digest = bundle_lib.combined([(path, sums[path]) for path in _order(bundle)])
    io.write_text(folder / "README.md", card(bundle, digest=digest, dtype=dtype, rows=rows))


def _summed(bundle: Bundle, sums: dict[str, str]) -> Bundle:
    """Return the same bundle, storing the checksum of each parameter in `sums` when it is read."""

    def read(path: str, leaf: Leaf):
        array = leaf.read()
        sums[path] = bundle_lib.checksum(array)
        return array

    leaves = {
        path: Leaf(leaf.shape, lambda path=path, leaf=leaf: read(path, leaf))
        for path, leaf in bundle.leaves.items()
    }
    return dataclasses.replace(bundle, leaves=leaves)


def _order(bundle: Bundle) -> Iterable[str]:
    """Paths in the order of `bundle.content_hash`."""
    return bundle_lib.flatten(bundle_lib.unflatten({path: path for path in bundle.leaves}))


def _config(bundle: Bundle) -> dict[str, Any]:
    model = bundle.model
    name = MODELING.removesuffix(".py")
    auto = "AutoModelForCausalLM" if model.causal else "AutoModelForMaskedLM"
    known = {
        "architectures": ["FSDFMModel"],
        "auto_map": {
            "AutoConfig": f"{name}.FSDFMConfig",
            "AutoModel": f"{name}.FSDFMModel",
            auto: f"{name}.FSDFMModel",
        },
        "model_type": MODEL_TYPE,
        # In memory, for any dtype of the file: otherwise logits would be rounded.
        "dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_blocks,
        "num_attention_heads": model.num_heads,
        "tie_word_embeddings": False,
        "mask_token_id": bundle.process().source.mask_id,
        "eos_token_id": None if bundle.tokenizer is None else bundle.tokenizer.eos_id,
    }
    return {key: value for key, value in known.items() if value is not None} | bundle_lib.describe(
        bundle
    )


def _tokenizer_config(bundle: Bundle) -> dict[str, Any]:
    tokenizer = bundle.tokenizer
    names = {} if tokenizer is None else {i: name for name, i in tokenizer.vocabulary.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": None if tokenizer is None else names[tokenizer.eos_id],
        "model_max_length": bundle.block_length,
        "clean_up_tokenization_spaces": False,
        # "<|endoftext|>" in a text is text.
        "split_special_tokens": True,
    }
    return {key: value for key, value in config.items() if value is not None}


# ---------------------------------------------------------------------------------------- the card
_FRONT = """---
library_name: fsdfm_jax
tags:
- discrete-flow-matching
- diffusion-language-model
- custom_code
---
"""


def card(bundle: Bundle, *, digest: str, dtype: str, rows: Iterable[Mapping[str, Any]] = ()) -> str:
    """Make the model card, in Markdown; anything from files is escaped.

    Args:
      bundle: the model.
      digest: `bundle.content_hash` of its parameters.
      dtype: of the weights in the file.
      rows: of a report, see `read_report`.
    """
    said, model, sampling = bundle.provenance, bundle.model, bundle.sampling()
    name = plain(said.get("run") or said.get("stage") or "model")
    kind = "An autoregressive" if model.causal else "A discrete flow-matching"
    times = "" if model.causal else ", t=t_B" + (", h=h_B" * (model.conditioning != "none"))
    auto = "AutoModelForCausalLM" if model.causal else "AutoModelForMaskedLM"
    network = {
        "parameters": f"{bundle.num_params():,}",
        "width, blocks, heads": f"{model.width}, {model.num_blocks}, {model.num_heads}",
        "vocabulary": f"{model.vocab_size:,}",
        "block": "unknown" if bundle.block_length is None else f"{bundle.block_length:,} tokens",
        "conditioning, positions, given": f"{model.conditioning}, {model.positions}, {model.given}",
        "noise, schedule": f"{bundle.path['source']}, {bundle.path['schedule']}",
        "sampler": ", ".join(f"{key} {value}" for key, value in sampling.to_dict().items()),
    }
    stamp = {
        **{key: said.get(key) for key in ("run", "stage", "weights", "step", "ema_decay")},
        "training text": said.get("data"),
        "tokenizer": said.get("tokenizer"),
        "trained by": said.get("code_version"),
        "written by": recipe.code_version(),
        "weights in the file": dtype,
        "sha256 of the parameters": digest,
    }
    return f"""{_FRONT}
# {name}

{kind} language model of {bundle.num_params() / 1e6:.1f} million parameters, written by
`fsdfm_jax` (arXiv:2509.20624).

## Use

```python
import fsdfm_jax as fs

model = fs.load("path/of/this/folder")  # or the name of this repository
print(fs.generate(model)[0])
```

Logits in PyTorch, using the code in this repository; t runs from 0 (noise) to 1 (data), h is the
width of the next step:

```python
from transformers import {auto}

model = {auto}.from_pretrained("path/of/this/folder", trust_remote_code=True)
logits = model(input_ids{times}).logits
```

## Network

{_table(network)}

## Figures

{_figures(rows, digest)}

## Stamp

{_table({key: value for key, value in stamp.items() if value is not None})}
"""


def plain(text: Any) -> str:
    """Escape anything to one literal line of Markdown: no markup, HTML or links."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line[:200] + "…" * (len(line) > 200)
    # Characters that start markup, and those that GitHub renders as links: "www.", "://", "@".
    return re.sub(r"([\\`*_{}\[\]#!|~:@]|(?<=www)\.)", r"\\\1", html.escape(line, quote=False))


def _table(values: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {plain(value)} |" for key, value in values.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def read_report(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Read the rows of a report's results.json.

    Raises:
      ValueError: there is no report in the folder, or it can't be read.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"There is no report in {folder}: results.json is missing.")
    rows = io.read_object(path).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} has no rows; evaluate the model again.")
    return rows


def _figures(rows: Iterable[Mapping[str, Any]], digest: str) -> str:
    """Make a table of the rows measured on these weights, or a sentence if there are none.

    It includes real text and controls of the same report.
    """
    rows = list(rows)
    own = [row for row in rows if _at(row, "protocol", "samples", "model", "sha256") == digest]
    if not own:
        return "None were measured on these weights." if rows else "None are recorded."
    own.sort(key=lambda row: _at(row, "steps") or 0)
    beside = [row for row in rows if row.get("kind") in ("real", "control")]
    judge = next(iter(_at(own[0], "judges") or {}), None)
    head = ["", "steps", "temperature", "perplexity (B)", "entropy, bits", "distinct-2", "samples"]
    lines = [head, ["---"] * len(head)]
    for row in [*beside, *own][:_MOST_ROWS]:
        is_own = row.get("kind") == "model"
        lines.append(
            [
                "this model" if is_own else plain(row.get("group")),
                _show(row.get("steps")),
                _show(row.get("temperature")),
                _estimate(_at(row, "judges", judge, "text", "perplexity_b")),
                _estimate(_at(row, "figures", "entropy_bits")),
                _estimate(_at(row, "figures", "distinct_2")),
                _show(row.get("num_samples")),
            ]
        )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    left = max(len(beside) + len(own) - _MOST_ROWS, 0)
    more = f" The report has {left} more rows." if left else ""
    by = "" if judge is None else f" Perplexity is by {plain(judge)}, of the decoded text."
    return f"{table}\n\n95% intervals.{by}{more}"


def _at(value: Any, *keys: Any) -> Any:
    """Look up keys in nested dicts; None if any is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _show(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:,.4g}" if number else "" if value is None else plain(value)


def _estimate(value: Any) -> str:
    """Format an estimate: "49.4 (37.5 .. 64.3)"."""
    middle, low, high = (_show(_at(value, key)) for key in ("value", "low", "high"))
    return f"{middle} ({low} .. {high})" if low and high else middle or "-"


# ---------------------------------------------------------------------------------------- reading
def is_hub(folder: pathlib.Path) -> bool:
    """Return whether a folder is marked as being in this layout; never raises."""
    try:
        text = bundle_lib.read_text(folder / _CONFIG)
        return bundle_lib.parse_json(text, _CONFIG).get("model_type") == MODEL_TYPE
    except (BadFile, OSError):
        return False


def with_sampling(bundle: Bundle, folder: pathlib.Path) -> Bundle:
    """Set the default sampler from the folder's generation_config.json, if it has one.

    Raises:
      BadFile: for a file that can't be read, or invalid settings.
    """
    path = folder / _GENERATION
    if not path.is_file():
        return bundle
    values = bundle_lib.parse_json(bundle_lib.read_text(path), str(path)).get("sampling")
    if values is None:  # written by another program
        return bundle
    try:
        sampling = Sampling.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise BadFile(f"{path} doesn't describe a sampler: {str(error)[:300]}") from error
    if sampling == bundle.sampling():
        return bundle
    return bundle_lib.sampled_by(bundle, sampling)


def is_name(text: Any) -> bool:
    """Return whether a string may be the name of a Hub repository, "user/name"."""
    return isinstance(text, str) and bool(re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", text))


def download(name: str, revision: str | None = None) -> pathlib.Path:
    """Get the folder of a repository from the Hub or the local cache; only weights and JSON.

    Raises:
      FileNotFoundError: huggingface_hub isn't installed.
      OSError: there is no such repository, or the download fails.
    """
    try:
        extras.check("hub", "a download from the Hub")
    except ValueError as error:
        raise FileNotFoundError(f"There is no file or folder {name}, and {error}") from None
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(_DOWNLOADED)
        )
    except Exception as error:  # the library and its dependencies raise many types
        raise OSError(
            f"There is no file or folder {name}, and downloading it from the Hub failed: "
            f"{bundle_lib.first_line(error)}"
        ) from error
    return pathlib.Path(folder)
