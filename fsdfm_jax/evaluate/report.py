"""The report of a run: tables, pictures, samples and a page that shows them all.

Every row is written as it is; the pictures and the page show repeats over seeds as one row. What
gives a row away (fsdfm_jax/evaluate/reading.py) stands beside its figures everywhere.
"""

import csv
import io
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fsdfm_jax import trajectory as trajectory_lib
from fsdfm_jax import writer
from fsdfm_jax.evaluate import figures, html, reading
from fsdfm_jax.evaluate.reading import Finding, Row, flags
from fsdfm_jax.tokenizer import Tokenizer
from fsdfm_jax.trajectory import Trajectory

__all__ = ["aggregate", "flags", "table", "write"]

_IDENTITY = (
    "slug",
    "setting",
    "kind",
    "group",
    "run",
    "stage",
    "steps",
    "jump",
    "grid",
    "temperature",
    "top_p",
    "seed",
    "task",
    "num_samples",
    "milliseconds_per_sample",
    "compile_seconds",
)
_FIGURES = (
    "entropy_nats",
    "entropy_bits",
    "predictive_entropy_nats",
    "distinct_1",
    "distinct_2",
    "distinct_3",
    "self_bleu",
    "mauve",
    "bound_nats_per_token",
)
_ENDS = {"": "value", "_low": "low", "_high": "high"}
_SAMPLES_SHOWN = 3
_LINE_WIDTH = 120  # of the text table; long names are cut to it
_NAME_WIDTH = 16  # but not below this


# ------------------------------------------------------------------------------------ all the files
def write(
    directory: pathlib.Path,
    rows: Sequence[Row],
    samples: Mapping[str, np.ndarray],
    trajectories: Mapping[str, Sequence[Trajectory]],
    tokenizer: Tokenizer,
    header: dict[str, Any],
    mask_id: int | None = None,
) -> None:
    """Writes all files of the report; equal arguments give equal bytes.

    results.json (header and rows), results.csv, samples.txt, trajectories.txt, the pictures
    frontier.png, steps.png, time.png and results.png, and report.html, which needs no other file.

    Args:
      directory: made where needed.
      rows: figures and protocol of each row, as fsdfm_jax/evaluate/rows.py makes them.
      samples: row's slug -> its tokens, int [N, L]; may lack rows.
      trajectories: row's slug -> some of its samples on their way; may lack rows.
      tokenizer: to print them.
      header: facts about the run as a whole (parameters, device, code version), for JSON.
      mask_id: token that the tokenizer doesn't know, shown as a block.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shown = aggregate(rows)
    known = _findings(shown)
    texts = {
        row["slug"]: [
            _decode(tokens_L, mask_id, tokenizer)
            for tokens_L in samples[row["slug"]][:_SAMPLES_SHOWN]
        ]
        for row in rows
        if row["slug"] in samples
    }
    writer.write_json(directory / "results.json", header | {"rows": list(rows)})
    writer.write_text(directory / "results.csv", _csv(rows))
    writer.write_text(directory / "samples.txt", _samples_text(rows, texts))
    lines = _trajectory_lines(rows, trajectories, tokenizer, mask_id)
    writer.write_text(directory / "trajectories.txt", "\n".join(lines) + "\n")
    exposed = {slug for slug, found in known.items() if found}
    drawn = {name: draw(shown, exposed) for name, draw in figures.PICTURES.items()}
    for name in ("frontier", "steps", "time", "results"):
        _write_bytes(directory / f"{name}.png", figures.png(drawn[name]))
    page = html.page(
        shown,
        known,
        texts=texts,
        paths=_paths(shown, trajectories, tokenizer, mask_id),
        pictures={name: figures.svg(drawn[name], name) for name in html.PICTURES},
        header=header,
    )
    writer.write_text(directory / "report.html", page)


def _write_bytes(path: pathlib.Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _findings(rows: Sequence[Row]) -> dict[str, list[Finding]]:
    reals = {row.get("task"): reading.real_row(rows, row.get("task")) for row in rows}
    return {row["slug"]: reading.findings(row, reals[row.get("task")]) for row in rows}


def _decode(tokens_L: np.ndarray, mask_id: int | None, tokenizer: Tokenizer) -> str:
    none_L = np.zeros(len(tokens_L), bool)
    cut = trajectory_lib.pieces(np.asarray(tokens_L), none_L, none_L, mask_id, tokenizer)
    return "".join(piece.text for piece in cut)


# ------------------------------------------------------------------------------------------- seeds
def aggregate(rows: Sequence[Row]) -> list[Row]:
    """One row for all rows of equal "setting", in the order of their first ones.

    Its figures are means over the seeds, with the smallest and the largest as low and high; counts
    of scored and skipped tokens are sums. "num_seeds" says how many rows went in, "protocol" has
    the stamp of each; slug and the rest are those of the first. A single row stays as it is.
    """
    settings: dict[str, list[Row]] = {}
    for row in rows:
        settings.setdefault(row["setting"], []).append(row)
    return [m[0] if len(m) == 1 else _merge(m) for m in settings.values()]


def _merge(members: list[Row]) -> Row:
    first = members[0]
    names = reading.judges(members)
    return first | {
        "seed": None,
        "num_seeds": len(members),
        "milliseconds_per_sample": _mean(m["milliseconds_per_sample"] for m in members),
        "compile_seconds": _mean(m["compile_seconds"] for m in members),
        "figures": _merge_estimates([m["figures"] for m in members]),
        "judges": {
            name: {
                way: _merge_estimates([(m["judges"].get(name) or {}).get(way) for m in members])
                for way in ("ids", "text")
            }
            for name in names
        },
        "per_step": _merge_per_step([m.get("per_step") for m in members]),
        "notes": list(dict.fromkeys(note for m in members for note in m.get("notes") or ())),
        "protocol": {m["slug"]: m.get("protocol") for m in members},
    }


def _mean(values) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None


def _merge_estimates(dicts: list[dict | None]) -> dict[str, Any] | None:
    """Merges {"figure": estimate, "tokens": int}, dict by dict; None if all are None."""
    present = [d for d in dicts if d is not None]
    if not present:
        return None
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for d in present for key in d):
        parts = [d[key] for d in present if d.get(key) is not None]
        if not parts:
            merged[key] = None
        elif isinstance(parts[0], dict):
            values = [reading.value(part) for part in parts]
            ends = (np.mean(values), np.min(values), np.max(values))  # nan stays visible
            merged[key] = dict(zip(("value", "low", "high"), map(float, ends), strict=True))
        else:
            merged[key] = sum(parts)
    return merged


def _merge_per_step(parts: list[dict | None]) -> dict[str, list[float]] | None:
    present = [part for part in parts if part]
    if not present or len({len(part["times"]) for part in present}) > 1:
        return None
    return {
        key: np.mean([part[key] for part in present], axis=0).tolist()
        for key in ("times", "entropy_nats", "changed")
    }


# ------------------------------------------------------------------------------------------ tables
def table(rows: Sequence[Row]) -> str:
    """A plain text table of the rows, with what gives a row away marked "!" at its end."""
    names, known = reading.judges(rows), _findings(rows)
    judge = names[0] if names else None
    columns = {
        "model": lambda row: trajectory_lib.printable(row["group"], keep=""),
        "steps": lambda row: "-" if row.get("steps") is None else str(row["steps"]),
        "T": lambda row: "-" if row.get("temperature") is None else f"{row['temperature']:g}",
        "seeds": lambda row: str(row.get("num_seeds", 1)),
        "ppl A": lambda row: _cell(reading.perplexity(row, judge)),
        "ppl B": lambda row: _cell(reading.perplexity(row, judge, "perplexity_b")),
        "H bits": lambda row: _cell(reading.figure(row, "entropy_bits")),
        "H nats": lambda row: _cell(reading.figure(row, "entropy_nats")),
        "dist-2": lambda row: _cell(reading.figure(row, "distinct_2")),
        "s-BLEU": lambda row: _cell(reading.figure(row, "self_bleu")),
        "ms/sample": lambda row: reading.show(row["milliseconds_per_sample"]),
        "flag": lambda row: _flag(known[row["slug"]]),
    }
    if len({row.get("temperature") for row in rows} - {None}) < 2:
        del columns["T"]
    if all(row.get("num_seeds", 1) == 1 for row in rows):
        del columns["seeds"]
    if {"T", "seeds"} & set(columns):  # lines stay short enough for a terminal
        del columns["H nats"]
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    room = _LINE_WIDTH - sum(widths[1:]) - 2 * len(widths[1:])
    widths[0] = min(widths[0], max(room, _NAME_WIDTH))
    for line in lines:
        line[0] = line[0] if len(line[0]) <= widths[0] else line[0][: widths[0] - 1] + "…"
    left = (0, len(columns) - 1)
    aligned = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def _flag(found: Sequence[Finding]) -> str:
    return "! " + ", ".join(finding.word for finding in found) if found else "-"


def _cell(estimate: dict[str, float] | None) -> str:
    return reading.show(None if estimate is None else reading.value(estimate))


def _csv(rows: Sequence[Row]) -> str:
    """One line a row: who it is, its figures, each judge's, its notes and what gives it away."""
    known, names = _findings(rows), reading.judges(rows)
    lines = []
    for row in rows:
        line = {key: row.get(key) for key in _IDENTITY}
        for key in _FIGURES:
            line |= _flat(key, reading.figure(row, key))
        for name in names:
            for way in ("ids", "text"):
                scores = (row["judges"].get(name) or {}).get(way) or {}
                for key in reading.AGGREGATIONS:
                    line |= _flat(f"{name}/{way}/{key}", scores.get(key))
                for key in ("tokens", "skipped"):
                    line[f"{name}/{way}/{key}"] = scores.get(key)
        line["notes"] = " ".join(row.get("notes") or ())
        line["flags"] = "; ".join(finding.sentence for finding in known[row["slug"]])
        lines.append(line)
    buffer = io.StringIO()
    out = csv.DictWriter(buffer, list(lines[0]) if lines else _IDENTITY, lineterminator="\n")
    out.writeheader()
    out.writerows(lines)
    return buffer.getvalue()


def _flat(key: str, estimate: dict[str, float] | None) -> dict[str, float | None]:
    return {
        key + end: None if estimate is None else float(estimate.get(part, math.nan))
        for end, part in _ENDS.items()
    }


# ------------------------------------------------------------------------------------------- texts
def _samples_text(rows: Sequence[Row], texts: Mapping[str, list[str]]) -> str:
    parts = ["The first samples of each row, unselected.\n"]
    for row in rows:
        parts.append(_banner(row))
        for i, text in enumerate(texts.get(row["slug"], ())):
            parts.append(f"\n[{i + 1}] {text}\n")
    return "".join(parts)


def _banner(row: Row) -> str:
    name = trajectory_lib.printable(reading.title(row), keep="")
    if row.get("seed") is not None:
        name += f", seed {row['seed']}"
    return f"\n{'=' * 100}\n{name}\n{'=' * 100}\n"


def _trajectory_lines(rows, trajectories, tokenizer, mask_id) -> list[str]:
    marks = "What a step changed stands between {+ and +}; ░ is a masked token."
    lines = [f"Samples on their way from noise to text. {marks}"]
    for row in rows:
        if trajectories.get(row["slug"]):
            lines += _banner(row).rstrip("\n").split("\n")
        for i, one in enumerate(trajectories.get(row["slug"], ())):
            lines += ["", f"sample {i + 1}"]
            lines += trajectory_lib.text_lines(one, mask_id, tokenizer)
    if len(lines) == 1:
        lines.append("None was recorded.")
    return lines


def _paths(rows, trajectories, tokenizer, mask_id) -> list[dict[str, Any]]:
    """What the page shows of trajectories: title and frames, each a caption and pieces."""
    paths = []
    for row in rows:
        entropies = (row.get("per_step") or {}).get("entropy_nats") or ()
        for i, one in enumerate(trajectories.get(row["slug"], ())):
            shown = []
            cuts = trajectory_lib.frames(one, mask_id, tokenizer)
            lines = trajectory_lib.captions(one)
            for step, caption, cut in zip(one.steps, lines, cuts, strict=True):
                # Steps at which nothing was left to draw may be missing; then their places are not
                # their numbers.
                whole = len(entropies) == one.steps[-1]
                if step and whole and math.isfinite(entropies[step - 1]):
                    caption += f", predictive entropy {entropies[step - 1]:.2f} nats"
                shown.append({"caption": caption, "pieces": [list(piece) for piece in cut]})
            title = f"{reading.title(row)}: sample {i + 1}"
            paths.append({"slug": row["slug"], "title": title, "frames": shown})
    return paths
