"""The report of a run: tables, pictures, samples and a page with all of them.

Data files have every point; tables, pictures and the page pool repeats over seeds into one row.
Findings (report/reading.py) are shown with the figures everywhere.

results.csv has a line for each point and judge. Its columns are always the same, plus those of an
exact judge if there is one; docs/concepts/evaluation.md documents them.
"""

import csv
import itertools
import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fsdfm_jax import io
from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.evaluate import exact_judges
from fsdfm_jax.evaluate.report import page, pictures, reading
from fsdfm_jax.evaluate.report.reading import Finding, Row, flags
from fsdfm_jax.inference import stream as trajectory_lib
from fsdfm_jax.inference.stream import Piece, Trajectory

__all__ = ["few_samples", "flags", "table", "write"]

_IDENTITY = (
    *("slug", "setting", "kind", "group", "run", "stage", "steps", "jump", "grid", "temperature"),
    *("top_p", "cooling", "look_ahead", "weights", "memory", "seed", "task", "num_samples"),
    *("milliseconds_per_sample", "compile_seconds", "device"),
)
_FIGURES = (
    *("entropy_nats", "entropy_bits", "predictive_entropy_nats"),
    *("distinct_1", "distinct_2", "distinct_3", "self_bleu", "mauve", "bound_nats_per_token"),
)
_ENDS = {"": "value", "_low": "low", "_high": "high", "_count": "count"}
_SAMPLES_SHOWN = 3
_FRAMES_SHOWN = 17  # of a trajectory
_PATHS_SHOWN = 12  # trajectories in the page
# Size limits in bytes, so that a page with many long rows still opens on a phone.
_PATHS_ROOM = 1_200_000
_TEXTS_ROOM = 600_000
_GIVEN = ("[[", "]]")
_LINE_WIDTH = 100  # letters of the text table
_FEW_SAMPLES = 3  # below the text table,
_FEW_STEPS = 8  # of a row with about so many steps,
_FEW_LINES = 2  # each on as many lines at most


# ---------------------------------------------------------------------------------------- all files
def write(
    directory: pathlib.Path,
    rows: Sequence[Row],
    pooled: Sequence[Row],
    samples: Mapping[str, np.ndarray],
    frozen: Mapping[str, np.ndarray],
    trajectories: Mapping[str, Sequence[Trajectory]],
    tokenizer: Tokenizer,
    header: dict[str, Any],
    mask_id: int | None = None,
) -> None:
    """Write all files of the report, deterministically.

    results.json (header and rows), results.csv, samples.txt, trajectories.txt, the pictures
    frontier.png, steps.png and time.png, and the self-contained report.html.

    Args:
      directory: made if needed.
      rows: figures and protocol of each point, from fsdfm_jax/evaluate/engine.py.
      pooled: the same with one row per setting, for tables, pictures and the page. With several
        seeds, "num_seeds" and "seeds" list them, "protocol" maps the slug of each point to its
        stamp, and the row's slug is that of one of them; "num_samples" is the count per seed.
      samples: slug of a point -> its first tokens, int [N, L], of which three are shown; points may
        be missing.
      frozen: the same for given positions, bool [N, L]; missing points have none.
      trajectories: slug of a point -> trajectories of some samples; points may be missing.
      tokenizer: to decode them.
      header: JSON dict of facts about the whole run; the page shows "run" (its name), "data" (the
        manifest of its text), "date", "device", "code_version" and "parameters" by model.
      mask_id: the mask token, shown as a block.
    """
    directory.mkdir(parents=True, exist_ok=True)
    known = reading.all_findings(pooled)
    texts = {
        row["slug"]: _texts(samples[row["slug"]], frozen.get(row["slug"]), mask_id, tokenizer)
        for row in rows
        if row["slug"] in samples
    }
    io.write_json(directory / "results.json", header | {"rows": list(rows)})
    io.write_text(directory / "results.csv", _csv(rows))
    io.write_text(directory / "samples.txt", _samples_text(rows, texts))
    lines = _trajectory_lines(rows, trajectories, tokenizer, mask_id)
    io.write_text(directory / "trajectories.txt", "\n".join(lines) + "\n")
    exact = reading.quality(pooled).exact
    exposed = {row["slug"] for row in pooled if reading.against(row, known, exact=exact)}
    drawn = {name: draw(pooled, exposed) for name, draw in pictures.PICTURES.items()}
    for name, figure in drawn.items():
        io.write_bytes(directory / f"{name}.png", pictures.png(figure))
    best = reading.best_few_step(pooled, known)
    html = page.page(
        pooled,
        known,
        texts=_within(texts, pooled, best),
        paths=_paths(_watched(pooled, best, trajectories), tokenizer, mask_id),
        pictures={name: pictures.svg(figure, name) for name, figure in drawn.items()},
        header=header,
    )
    io.write_text(directory / "report.html", html)


# ------------------------------------------------------------------------------------------ tables
def table(rows: Sequence[Row]) -> str:
    """Format a plain text table with one row per setting, at most `_LINE_WIDTH` wide.

    Above it are the check of the main judge and the common settings of all models. Flags are at the
    end of a row, after "!"; long cells are wrapped.
    """
    names, known = reading.judges(rows), reading.all_findings(rows)
    judge, samplers = names[0] if names else None, reading.samplers(rows)
    found = {
        "model": [row["group"] if row["kind"] != "model" else row["run"] for row in rows],
        "steps": ["" if row.get("steps") is None else str(row["steps"]) for row in rows],
        "sampler": [samplers[row["slug"]] for row in rows],
        "perplexity": [_cell(reading.perplexity(row, judge)) for row in rows],
        "entropy": [_cell(reading.figure(row, "entropy_bits")) for row in rows],
        "distinct-2": [_cell(reading.figure(row, "distinct_2")) for row in rows],
        "ms/sample": [reading.show(row["milliseconds_per_sample"]) for row in rows],
        "flags": [_flag(known[row["slug"]]) for row in rows],
    }
    exact = exact_judges.columns(rows)
    if exact:
        del found["perplexity"], found["entropy"], found["distinct-2"]
    for key, column in exact.items():
        if column.main:
            found[column.head] = [exact_judges.show(exact_judges.figure(row, key)) for row in rows]
    found["flags"] = found.pop("flags")  # move it to the end
    if not any(found["sampler"]):  # all the same
        del found["sampler"]
    long = ("model", "sampler", "flags")
    columns = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for name in found:
        justify = "left" if name in long else "right"
        columns.add_column(name, justify=justify, no_wrap=name not in long, overflow="fold")
    for cells in zip(*found.values(), strict=True):
        columns.add_row(*(Text(trajectory_lib.printable(cell, keep="")) for cell in cells))
    console = Console(
        file=StringIO(),
        width=_LINE_WIDTH,
        color_system=None,
        legacy_windows=False,
        force_jupyter=False,
    )
    above = [reading.judge_check(rows, judge)] if judge else ["There was no judge: no perplexity."]
    above = [exact_judges.describe(rows)] if exact else above
    for line in (*above, reading.common_line(rows)):
        if line:
            console.print(Text(trajectory_lib.printable(line, keep="")), end="\n\n")
    console.print(columns)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _flag(found: Sequence[Finding]) -> str:
    return "! " + ", ".join(finding.word for finding in found) if found else ""


def _cell(estimate: dict[str, float] | None) -> str:
    return reading.show(None if estimate is None else reading.value(estimate))


def _csv(rows: Sequence[Row]) -> str:
    """Return a line for each row and judge: identity, figures, scores, notes and flags."""
    known, names = reading.all_findings(rows), reading.judges(rows)
    tells = {name: reading.tells_text(rows, name) for name in names}
    exact, lines = exact_judges.columns(rows), []
    for row, judge in itertools.product(rows, names or [None]):
        line = {key: row.get(key) for key in _IDENTITY}
        for key in _FIGURES:
            line |= _flat(key, reading.figure(row, key))
        line |= {"judge": judge, "judge_tells_text": tells.get(judge)}
        for form in ("ids", "text"):
            scores = (row["judges"].get(judge) or {}).get(form) or {}
            for key in reading.AGGREGATIONS:
                line |= _flat(f"{form}_{key}", scores.get(key))
            line |= {f"{form}_{key}": scores.get(key) for key in ("tokens", "skipped")}
        for key in exact:
            line |= _flat(f"exact_{key}", exact_judges.figure(row, key))
        line["notes"] = " ".join(row.get("notes") or ())
        line["flags"] = "; ".join(finding.sentence for finding in known[row["slug"]])
        lines.append(line)
    buffer = StringIO()
    out = csv.DictWriter(buffer, list(lines[0]) if lines else _IDENTITY, lineterminator="\n")
    out.writeheader()
    out.writerows(lines)
    return buffer.getvalue()


def _flat(key: str, estimate: dict[str, float] | None) -> dict[str, float | None]:
    return {key + end: (estimate or {}).get(part) for end, part in _ENDS.items()}


# ------------------------------------------------------------------------------------------- texts
def _texts(
    tokens_NL: np.ndarray,
    frozen_NL: np.ndarray | None,
    mask_id: int | None,
    tokenizer: Tokenizer,
) -> list[list[Piece]]:
    """Return the samples to show, split at the boundaries of given parts."""
    tokens_NL = np.asarray(tokens_NL)[:_SAMPLES_SHOWN]
    none_NL = np.zeros(tokens_NL.shape, bool)
    given_NL = none_NL if frozen_NL is None else np.asarray(frozen_NL)[:_SAMPLES_SHOWN]
    return [
        trajectory_lib.pieces(tokens_L, given_L, none_L, mask_id, tokenizer)
        for tokens_L, given_L, none_L in zip(tokens_NL, given_NL, none_NL, strict=True)
    ]


def _within(
    texts: Mapping[str, list[list[Piece]]], rows: Sequence[Row], best: Row | None
) -> dict[str, list[list[Piece]]]:
    """Limit the texts to the size of the page: fewer texts per row, then fewer rows."""
    order = sorted(rows, key=lambda row: row is not best and row["kind"] == "model")
    shown: dict[str, list[list[Piece]]] = {}
    for count in range(_SAMPLES_SHOWN, 0, -1):
        shown, used = {}, 0
        for row in order:
            some = texts.get(row["slug"], [])[:count]
            used += sum(map(_bytes, some))
            if some and used <= _TEXTS_ROOM:
                shown[row["slug"]] = some
        if used <= _TEXTS_ROOM:
            break
    return shown


def _bytes(text: Sequence[Piece]) -> int:
    """Approximate size of a text in the page."""
    return sum(len(piece.text.encode(errors="replace")) + 13 for piece in text)


def _samples_text(rows: Sequence[Row], texts: Mapping[str, list[list[Piece]]]) -> str:
    first = "The first samples of each row, unselected."
    if any(piece.kind == "given" for some in texts.values() for text in some for piece in text):
        first += f" Given text is between {_GIVEN[0]} and {_GIVEN[1]}."
    parts = [first + "\n"]
    for row in rows:
        parts.append(_banner(row))
        for i, text in enumerate(texts.get(row["slug"], ())):
            shown = (p.text.join(_GIVEN) if p.kind == "given" else p.text for p in text)
            parts.append(f"\n[{i + 1}] {trajectory_lib.printable(''.join(shown))}\n")
    return "".join(parts)


def _name(row: Row) -> str:
    name = trajectory_lib.printable(reading.title(row), keep="")
    return name if row.get("seed") is None else f"{name}, seed {row['seed']}"


def _banner(row: Row) -> str:
    name = _name(row)
    return f"\n{'=' * 100}\n{name}\n{'=' * 100}\n"


def few_samples(
    rows: Sequence[Row],
    samples: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    mask_id: int | None = None,
) -> str:
    """The beginnings of a few samples at about 8 steps, for a terminal; "" where there are none.

    They are the first of the last run that isn't autoregressive, at the temperature nearest to 1.

    Args:
      rows: one a setting, in the order of the plan.
      samples, tokenizer, mask_id: as of `write`.
    """
    stepped = lambda row: row["kind"] == "model" and row.get("stage") != "autoregressive"
    models = [row for row in rows if stepped(row) and row["slug"] in samples]
    own = reading.at_usual_temperature(row for row in models if row["run"] == models[-1]["run"])
    if not own:
        return ""
    row = min(own, key=lambda row: abs(math.log2(row["steps"] / _FEW_STEPS)))
    lines = [f"The first samples of {_name(row)}, of samples.txt:"]
    texts = _texts(samples[row["slug"]], None, mask_id, tokenizer)[:_FEW_SAMPLES]
    for i, text in enumerate(texts):
        whole = trajectory_lib.readable("".join(piece.text for piece in text))
        lines += textwrap.wrap(
            trajectory_lib.printable(" ".join(whole.split()), keep=""),
            _LINE_WIDTH,
            initial_indent=f"  [{i + 1}] ",
            subsequent_indent="      ",
            max_lines=_FEW_LINES,
            placeholder=" ...",
        ) or [f"  [{i + 1}]"]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ trajectories
def _trajectory_lines(rows, trajectories, tokenizer, mask_id) -> list[str]:
    marks = "Changes from the previous frame are between {+ and +}; ░ is a masked token."
    lines = [f"Samples from noise to text, step by step. {marks}"]
    for row in rows:
        if trajectories.get(row["slug"]):
            lines += _banner(row).rstrip("\n").split("\n")
        for i, one in enumerate(trajectories.get(row["slug"], ())):
            lines += ["", f"sample {i + 1}"]
            thinned = trajectory_lib.thin(one, _FRAMES_SHOWN)
            lines += trajectory_lib.text_lines(thinned, mask_id, tokenizer)
    if len(lines) == 1:
        lines.append("None were recorded.")
    return lines


def _watched(
    rows: Sequence[Row], best: Row | None, trajectories: Mapping[str, Sequence[Trajectory]]
) -> list[tuple[Row, int, Trajectory]]:
    """Select trajectories for the page: (row, sample index, trajectory), the best row's first.

    The others are rows at the temperature nearest to 1, spread over the numbers of steps. One
    sample of each row comes first, then further ones if there are too few.
    """
    known = [row for row in rows if trajectories.get(row["slug"])]
    usual = reading.at_usual_temperature(known)
    others = sorted((r for r in usual if r is not best), key=lambda row: row.get("steps") or 0)
    first = [best] if best is not None and best in known else []
    room = _PATHS_SHOWN - len(first)
    if len(others) > room:
        others = [others[i] for i in np.linspace(0, len(others) - 1, room).round().astype(int)]
    chosen = [*first, *others]
    most = max((len(trajectories[row["slug"]]) for row in chosen), default=0)
    ordered = [
        (row, i, trajectories[row["slug"]][i])
        for i in range(most)
        for row in chosen
        if i < len(trajectories[row["slug"]])
    ]
    return ordered[:_PATHS_SHOWN]


def _paths(
    watched: Sequence[tuple[Row, int, Trajectory]], tokenizer: Tokenizer, mask_id: int | None
) -> list[dict[str, Any]]:
    """Convert trajectories for the page: title and frames, each with a caption and pieces."""
    paths, used = [], 0
    for row, i, whole in watched:
        entropies = (row.get("per_step") or {}).get("entropy_nats") or ()
        one = trajectory_lib.thin(whole, _FRAMES_SHOWN)
        shown = []
        cuts = trajectory_lib.frames(one, mask_id, tokenizer)
        used += sum(map(_bytes, cuts))
        if paths and used > _PATHS_ROOM:
            break
        for step, caption, cut in zip(one.steps, trajectory_lib.captions(one), cuts, strict=True):
            # Steps that draw nothing may be missing; then indices aren't step numbers.
            complete = len(entropies) == one.steps[-1]
            if step and complete and math.isfinite(entropies[step - 1]):
                caption += f", predictive entropy {entropies[step - 1]:.2f} nats"
            shown.append({"caption": caption, "pieces": cut})
        title = f"{reading.title(row)}: sample {i + 1}"
        paths.append({"title": title, "frames": shown})
    return paths
