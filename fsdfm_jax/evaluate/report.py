"""The report of a run: results.json and .csv, results.png, samples.txt, and a text table."""

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from fsdfm_jax import writer
from fsdfm_jax.tokenizer import Tokenizer

COLUMNS = (
    "group",
    "run",
    "steps",
    "jump",
    "perplexity_a",
    "perplexity_b",
    "entropy_bits",
    "entropy_nats",
    "milliseconds_per_sample",
    "compile_seconds",
)
_SHOWN = {
    "group": "model",
    "steps": "steps",
    "perplexity_a": "ppl A",
    "perplexity_b": "ppl B",
    "entropy_bits": "H bits",
    "entropy_nats": "H nats",
    "milliseconds_per_sample": "ms/sample",
}
_SAMPLES_SHOWN = 3

Row = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """A plain text table of the rows."""
    lines = [list(_SHOWN.values())]
    for row in rows:
        lines.append([_cell(key, row[key]) for key in _SHOWN])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if key == "group" or isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def write(
    directory: pathlib.Path,
    rows: Sequence[Row],
    samples: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    header: dict[str, Any],
) -> None:
    """Writes all files of the report.

    Args:
      directory: made where needed.
      rows: figures and protocol of each row.
      samples: row's slug -> its tokens, int [N, L].
      tokenizer: to print them.
      header: facts about the run as a whole (parameters, device, times).
    """
    directory.mkdir(parents=True, exist_ok=True)
    writer.write_json(directory / "results.json", header | {"rows": list(rows)})
    buffer = io.StringIO()
    out = csv.DictWriter(buffer, COLUMNS, extrasaction="ignore", lineterminator="\n")
    out.writeheader()
    out.writerows(rows)
    writer.write_text(directory / "results.csv", buffer.getvalue())
    writer.write_text(directory / "samples.txt", _samples_text(rows, samples, tokenizer))
    _picture(directory / "results.png", rows)


def _samples_text(rows, samples, tokenizer) -> str:
    parts = ["The first samples of each row, unselected.\n"]
    for row in rows:
        title = row["group"] + (f", {row['steps']} steps" if row["steps"] else "")
        parts.append(f"\n{'=' * 100}\n{title}\n{'=' * 100}\n")
        for i, tokens in enumerate(samples[row["slug"]][:_SAMPLES_SHOWN]):
            parts.append(f"\n[{i + 1}] {tokenizer.decode(tokens.tolist())}\n")
    return "".join(parts)


def _picture(path: pathlib.Path, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8))
    for axis, key, label in (
        (axes[0], "perplexity_a", "generative perplexity (A)"),
        (axes[1], "entropy_bits", "unigram entropy of a sample, bits"),
    ):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row[key] is None:  # no judge
                continue
            groups.setdefault(row["group"], []).append(row)
        for group, members in groups.items():
            members = sorted(members, key=lambda row: row["steps"] or 0)
            if members[0]["steps"] is None:
                axis.axhline(members[0][key], color="black", linestyle=":", label=group)
                continue
            steps = [row["steps"] for row in members]
            axis.plot(steps, [row[key] for row in members], marker="o", markersize=4, label=group)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("network calls per sample")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=130)
    pyplot.close(figure)
    temporary.replace(path)
