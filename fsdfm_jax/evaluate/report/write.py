"""The report of a run: tables, pictures, samples and a page that shows them all.

Every point is written as it is; the tables, the pictures and the page show repeats over seeds as
one row. What gives a row away (report/reading.py) stands beside its figures everywhere.

results.csv has a line for each point and judge, and always the same columns, but for those of an
exact judge, which are there if it is; docs/concepts/evaluation.md describes them.
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
# Bytes of the page, so that one of many long rows still opens on a phone.
_PATHS_ROOM = 1_200_000
_TEXTS_ROOM = 600_000
_GIVEN = ("[[", "]]")
_LINE_WIDTH = 100  # letters of the text table
_FEW_SAMPLES = 3  # below the text table,
_FEW_STEPS = 8  # of a row with about so many steps,
_FEW_LINES = 2  # each on as many lines at most


# ------------------------------------------------------------------------------------ all the files
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
    """Writes all files of the report; equal arguments give equal bytes.

    results.json (header and rows), results.csv, samples.txt, trajectories.txt, the pictures
    frontier.png, steps.png and time.png, and report.html, which needs no other file.

    Args:
      directory: made where needed.
      rows: figures and protocol of each point, as fsdfm_jax/evaluate/engine.py makes them.
      pooled: the same with one row a setting, which is what tables, pictures and the page show.
        Where it has several seeds, "num_seeds" and "seeds" say so, "protocol" has the stamp of each
        point by its slug, and the row's own slug is that of one of them; "num_samples" stays the
        count of one seed.
      samples: slug of a point -> its first tokens, int [N, L], of which three are shown; may lack
        points.
      frozen: the same for the positions that were given, bool [N, L]; a point that isn't there was
        given none.
      trajectories: slug of a point -> some of its samples on their way; may lack points.
      tokenizer: to print them.
      header: JSON dict of facts about the run as a whole; the page shows "run" (its name), "data"
        (the manifest of its text), "date", "device", "code_version" and "parameters" by model.
      mask_id: token that the tokenizer doesn't know, shown as a block.
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
    """A plain text table of rows, one a setting, at most `_LINE_WIDTH` letters wide.

    Above it stand what the check of the main judge found and what all models have in common. What
    gives a row away is marked "!" at its end; long cells take several lines.
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
    found["flags"] = found.pop("flags")  # the last column
    if not any(found["sampler"]):  # nothing to tell apart
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
    """A line for each row and judge: who it is, its figures, its scores, what gives it away."""
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
    """The samples that are shown, cut where what was given begins and ends."""
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
    """The texts of as many rows as the page has room for; one of each where there are many."""
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
    """About what a text takes in the page."""
    return sum(len(piece.text.encode(errors="replace")) + 13 for piece in text)


def _samples_text(rows: Sequence[Row], texts: Mapping[str, list[list[Piece]]]) -> str:
    first = "The first samples of each row, unselected."
    if any(piece.kind == "given" for some in texts.values() for text in some for piece in text):
        first += f" What the model was given stands between {_GIVEN[0]} and {_GIVEN[1]}."
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
    marks = "What differs from the frame before stands between {+ and +}; ░ is a masked token."
    lines = [f"Samples on their way from noise to text. {marks}"]
    for row in rows:
        if trajectories.get(row["slug"]):
            lines += _banner(row).rstrip("\n").split("\n")
        for i, one in enumerate(trajectories.get(row["slug"], ())):
            lines += ["", f"sample {i + 1}"]
            thinned = trajectory_lib.thin(one, _FRAMES_SHOWN)
            lines += trajectory_lib.text_lines(thinned, mask_id, tokenizer)
    if len(lines) == 1:
        lines.append("None was recorded.")
    return lines


def _watched(
    rows: Sequence[Row], best: Row | None, trajectories: Mapping[str, Sequence[Trajectory]]
) -> list[tuple[Row, int, Trajectory]]:
    """Trajectories for the page, (row, number of the sample, trajectory), the best row's first.

    Besides rows at the usual temperature, spread over the numbers of steps; first one sample of
    each, then further ones while there are too few.
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
    """What the page shows of trajectories: title and frames, each a caption and pieces."""
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
            # Steps at which nothing was left to draw may be missing; then their places are not
            # their numbers.
            complete = len(entropies) == one.steps[-1]
            if step and complete and math.isfinite(entropies[step - 1]):
                caption += f", predictive entropy {entropies[step - 1]:.2f} nats"
            shown.append({"caption": caption, "pieces": cut})
        title = f"{reading.title(row)}: sample {i + 1}"
        paths.append({"title": title, "frames": shown})
    return paths
