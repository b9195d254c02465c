"""The report as a self-contained page: no other files, no network, readable without its script.

This module collects the data of the template report.html in plain dicts and lists. Everything from
a run (names, texts, numbers) is escaped by the template; control characters are made visible. The
page's security policy allows only its own styles and the script with the right hash.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fsdfm_jax import extras
from fsdfm_jax.evaluate import exact_judges
from fsdfm_jax.evaluate.report import reading
from fsdfm_jax.evaluate.report.reading import Finding, Quality, Row
from fsdfm_jax.inference.stream import Piece, printable

# Columns of the main table, between model and flags; the others are under "all columns".
COLUMNS = ("steps", "sampler", "perplexity", "entropy", "distinct-2", "ms/sample")
_FIGURES = {
    "entropy_nats": "entropy, nats",
    "predictive_entropy_nats": "predictive entropy, nats",
    "distinct_1": "distinct-1",
    "distinct_3": "distinct-3",
    "self_bleu": "self-BLEU",
    "mauve": "MAUVE",
    "bound_nats_per_token": "bound, nats/token",
}
_SCORES = dict(zip(reading.AGGREGATIONS, ("A", "B", "C", "nats/byte"), strict=True))
_NAMED_ROWS = 4  # rows that a note names


def page(
    rows: Sequence[Row],
    findings: Mapping[str, list[Finding]],
    *,
    texts: Mapping[str, list[list[Piece]]],
    paths: Sequence[dict[str, Any]],
    pictures: Mapping[str, str],
    header: Mapping[str, Any],
) -> str:
    """Render the whole page, deterministically.

    Args:
      rows: one per setting.
      findings: slug of a row -> its findings.
      texts: slug of a row -> its first samples, split at the boundaries of given parts.
      paths: trajectories in order: dicts with "title" and "frames", each with "caption" and
        "pieces".
      pictures: name in `pictures.PICTURES` -> <svg> element.
      header: facts about the run, see `write.write`.
    """
    with extras.needed("train", "The report"):
        import jinja2
        from markupsafe import Markup
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fsdfm_jax.evaluate", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda shown: printable(shown) if type(shown) is str else shown,
    )
    source = lambda name: Markup(environment.loader.get_source(environment, name)[0])
    style, script = source("report.css"), source("report.js")
    digest = hashlib.sha256(script.encode()).digest()
    return environment.get_template("report.html").render(
        collect(rows, findings, texts, header),
        paths=paths,
        pictures={name: Markup(svg) for name, svg in pictures.items()},
        style=style,
        script=script,
        script_hash=base64.b64encode(digest).decode(),
    )


def collect(
    rows: Sequence[Row],
    findings: Mapping[str, list[Finding]],
    texts: Mapping[str, list[list[Piece]]],
    header: Mapping[str, Any],
) -> dict[str, Any]:
    """Collect the template's data, except pictures and trajectories; arguments as in `page`."""
    judges, best = reading.judges(rows), reading.best_few_step(rows, findings)
    ranked = reading.quality(rows)
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row.get("notes") or ():
            notes.setdefault(note, []).append(reading.title(row))
    rest = {key: value for key, value in header.items() if key not in _FACTS}
    model = next((row for row in rows if row["kind"] == "model"), None)
    stamps = {"The run": rest, "The first row of a model": model and model.get("protocol")}
    checked = [_judge(rows, name) for name in judges]
    return {
        "names": headings(header),
        "facts": _facts(rows, header),
        "judges": checked,
        "blind": any(judge["blind"] for judge in checked[:1]) and not ranked.exact,
        "exact": exact_judges.describe(rows),
        "ranked": ranked,
        "cards": _cards(rows, findings, best),
        "claims": _claims(rows, best),
        "flagged": sum(map(bool, findings.values())),
        "total": len(rows),
        "few_steps": reading.FEW_STEPS,
        "common": reading.common_line(rows),
        "table": _table(rows, findings),
        "remarks": [
            (reading.title(row), "; ".join(one.sentence for one in findings[row["slug"]]))
            for row in rows
            if findings[row["slug"]]
        ],
        "notes": [(note, _some(titles)) for note, titles in notes.items()],
        "devices": _devices(rows),
        "samples": _samples(rows, findings, texts, best),
        "protocols": {name: _json(stamp) for name, stamp in stamps.items() if stamp},
    }


# -------------------------------------------------------------------------------------------- tops
_FACTS = ("device", "code_version", "parameters", "run", "date")  # at the top of the page


def headings(header: Mapping[str, Any]) -> list[str]:
    """Name of the run, its corpus and the date, if the header has them."""
    spec = (header.get("data") or {}).get("spec") or {}
    names = (header.get("run"), spec.get("mixture") or spec.get("corpus"), header.get("date"))
    return [str(name) for name in names if name]


def _facts(rows: Sequence[Row], header: Mapping[str, Any]) -> dict[str, str]:
    models = [row for row in rows if row["kind"] == "model"]
    runs = dict.fromkeys(str(row.get("run") or row["group"]) for row in models)
    counts = sorted({row["num_samples"] for row in models or rows})
    seeds = max((row.get("num_seeds", 1) for row in rows), default=1)
    facts = {
        "rows": f"{len(models)} of {', '.join(runs) or 'no model'}",
        "samples a row": " or ".join(map(str, counts)) + (f", {seeds} seeds" if seeds > 1 else ""),
        "task": ", ".join(dict.fromkeys(str(row.get("task")) for row in rows)),
        "device": _devices(rows) or header.get("device"),
        "code version": header.get("code_version"),
        "parameters": _parameters(header.get("parameters")),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _parameters(counts: Any) -> str:
    """Format parameter counts, grouping equal ones: "1.32 M (distill, refine)"."""
    models: dict[str, list[str]] = {}
    for run, count in (counts or {}).items():
        models.setdefault(f"{count / 1e6:.3g} M", []).append(str(run))
    return ", ".join(f"{count} ({', '.join(runs)})" for count, runs in models.items())


def _devices(rows: Sequence[Row]) -> str:
    """Return the devices of the times."""
    common, varied = reading.settings(rows)
    if "device" in varied:
        return "several: compare times only within one"
    return common.get("device", "")


def _judge(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """Return the check of a judge, and whether it failed."""
    blind = reading.tells_text(rows, name) is False
    return {"name": name, "check": reading.judge_check(rows, name), "blind": blind}


def _cards(
    rows: Sequence[Row], findings: Mapping[str, list[Finding]], best: Row | None
) -> list[dict[str, Any]]:
    """Return the key rows, if the main judge is usable."""
    main, many, sighted = reading.judges(rows)[:1], reading.many_steps(rows), _sighted(rows)
    heads = {
        "Real text": reading.real_row(rows, reading.main_task(rows)),
        "Best of few steps": best,
        "Most steps": None if many is best else many,
        "Left to right": _left_to_right(rows),
    }
    ranked = reading.quality(rows)
    if ranked.exact:
        return [
            _exact_card(head, row, ranked, row is best)
            for head, row in heads.items()
            if row is not None and ranked.read(row)
        ]
    if main != sighted[:1]:
        return []
    cards = []
    for head, row in heads.items():
        judge = row and reading.fair_judge(row, sighted)
        if not judge:
            continue
        judged, real = (reading.perplexity(each or {}, judge) for each in (row, heads["Real text"]))
        ratio = reading.value(judged) / reading.value(real) if real else math.nan
        compared = head != "Real text" and math.isfinite(ratio)
        # A finding about the main judge's perplexity doesn't apply to another judge.
        found = [f for f in findings[row["slug"]] if judge in main or f.word != "own judge"]
        card = _card(head, row, row is best, found, _cell(judged, row), ranked.name)
        card["beside"] = f"{_times(ratio)} real text" if compared else ""
        card["judge"] = "" if judge in main else judge
        cards.append(card)
    return cards


def _exact_card(head: str, row: Row, ranked: Quality, best: bool) -> dict[str, Any]:
    """Make a card with the figure of an exact judge; its findings are the flags."""
    estimate = ranked.read(row)
    figure = _cell(estimate, row) | {"text": exact_judges.show(estimate)}
    return _card(head, row, best, reading.exposed(row), figure, ranked.name)


def _card(
    head: str,
    row: Row,
    best: bool,
    found: Iterable[Finding],
    figure: Mapping[str, Any],
    unit: str,
) -> dict[str, Any]:
    return {
        "head": head,
        "best": best,
        "title": reading.title(row),
        "flags": [finding.word for finding in found],
        "figure": figure,
        "unit": unit,
        "beside": "",
        "judge": "",
        "entropy": _cell(reading.figure(row, "entropy_bits"), row),
        "milliseconds": _cell(row.get("milliseconds_per_sample"), row),
    }


def _left_to_right(rows: Sequence[Row]) -> Row | None:
    task = reading.main_task(rows)
    causal = [row for row in rows if row.get("stage") == "autoregressive"]
    return next(iter(reading.at_usual_temperature(r for r in causal if r["task"] == task)), None)


def _sighted(rows: Sequence[Row]) -> list[str]:
    """Return the judges, except those that can't tell text from shuffled text."""
    return [name for name in reading.judges(rows) if reading.tells_text(rows, name) is not False]


def _claims(rows: Sequence[Row], best: Row | None) -> list[dict[str, str]]:
    """Describe the cost and quality of few steps relative to other rows, from measured figures."""
    if best is None:
        return []
    others = [row for row in (reading.many_steps(rows), _left_to_right(rows)) if row]
    return [
        {
            "row": reading.title(best),
            "other": reading.title(other),
            "text": "; ".join(filter(None, (_price(best, other), _quality(rows, best, other)))),
        }
        for other in others
        if other is not best
    ]


def _price(best: Row, other: Row) -> str:
    calls = f"{best['steps']:,} network call{'' if best['steps'] == 1 else 's'}"
    calls += f" instead of {other['steps']:,}" if other.get("steps") else ""
    if best.get("device") != other.get("device"):
        return f"{calls}, timed on different devices"
    times = [row.get("milliseconds_per_sample") or math.nan for row in (best, other)]
    ratio = times[1] / times[0]
    if math.isnan(ratio):
        return calls
    if ratio >= 1.05:
        return f"{calls}: {_times(ratio)} the speed"
    return f"{calls}, but no faster: {times[0]:.3g} against {times[1]:.3g} ms per sample"


def _quality(rows: Sequence[Row], best: Row, other: Row) -> str:
    ranked = reading.quality(rows)
    if ranked.exact:
        shown = [exact_judges.show(ranked.read(row)) or "-" for row in (best, other)]
        return f"{ranked.name} {shown[0]} against {shown[1]}"
    own, names = reading.own_judges(other), _sighted(rows)
    finite = lambda row, name: math.isfinite(reading.value(reading.perplexity(row, name)))
    fair = [n for n in names if n not in own and finite(best, n) and finite(other, n)]
    if not fair:
        because = "the latter's perplexity is not compared because it is its own judge"
        return because if own else ""
    numbers = [reading.show(reading.value(reading.perplexity(r, fair[0]))) for r in (best, other)]
    by = "" if fair[0] == reading.judges(rows)[0] else f" by {fair[0]}"
    at = " at the same entropy"
    if not reading.same_entropy(best, other):
        bits = [reading.value(reading.figure(row, "entropy_bits")) for row in (best, other)]
        at = f", entropy {bits[0]:.2f} against {bits[1]:.2f} bits"
    return f"perplexity {numbers[0]} against {numbers[1]}{by}{at}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 9.95 else f"{ratio:.2g} times"


def _some(titles: Sequence[str]) -> str:
    names = list(dict.fromkeys(titles))
    more = len(names) - _NAMED_ROWS
    return "; ".join(names[:_NAMED_ROWS]) + (f" and {more} more" if more > 0 else "")


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, default=str)


# ------------------------------------------------------------------------------------------- table
def _table(rows: Sequence[Row], findings: Mapping[str, list[Finding]]) -> dict[str, Any]:
    """Return the main table: columns (head, whether secondary, whether numeric) and rows of cells.

    Empty columns are omitted.
    """
    samplers = reading.samplers(rows)
    values = [_values(row, rows, findings[row["slug"]], samplers[row["slug"]]) for row in rows]
    heads = values[0] if values else ()
    used = [head for head in heads if any(line[head]["text"] for line in values)]
    exact = [column for column in exact_judges.columns(rows).values() if column.main]
    short = (*COLUMNS, *(f"exact: {column.head}" for column in exact))
    columns = [
        {"head": head, "more": head not in short, "numeric": head != "sampler"} for head in used
    ]
    lines = [
        {
            "kind": row["kind"],
            "name": row["group"] if row["kind"] != "model" else row.get("run") or row["group"],
            "flags": [finding.word for finding in findings[row["slug"]]],
            "cells": [line[head] for head in used],
        }
        for row, line in zip(rows, values, strict=True)
    ]
    return {"columns": columns, "lines": lines}


def _values(
    row: Row, rows: Sequence[Row], found: Sequence[Finding], sampler: str
) -> dict[str, dict[str, Any]]:
    """Return the cells of a row, by column head."""
    judges = reading.judges(rows)
    main = judges[0] if judges else None
    bad = {key for finding in found for key in finding.columns}
    cells = {
        "steps": _cell(row.get("steps"), row),
        "sampler": _EMPTY | {"text": sampler, "sort": sampler},
        "perplexity": _cell(reading.perplexity(row, main), row, "perplexity_a" in bad),
        "entropy": _cell(reading.figure(row, "entropy_bits"), row, "entropy_bits" in bad),
        "distinct-2": _cell(reading.figure(row, "distinct_2"), row, "distinct_2" in bad),
        "ms/sample": _cell(row.get("milliseconds_per_sample"), row),
    }
    for key, column in exact_judges.columns(rows).items():
        estimate = exact_judges.figure(row, key)
        cells[f"exact: {column.head}"] = _cell(estimate, row, key in bad) | {
            "text": exact_judges.show(estimate)
        }
    for key, head in _FIGURES.items():
        cells[head] = _cell(reading.figure(row, key), row, key in bad)
    for judge in judges:
        for form in ("ids", "text"):
            scores = ((row.get("judges") or {}).get(judge) or {}).get(form) or {}
            for key, head in (_SCORES | {"tokens": "tokens", "skipped": "skipped"}).items():
                cells[f"{judge}: {head}, {form}"] = _cell(scores.get(key), row)
    return cells


_EMPTY = {"text": "", "sort": "", "interval": "", "count": "", "bad": False}


def _cell(shown: Any, row: Row, bad: bool = False) -> dict[str, Any]:
    """Return a cell for a number or estimate, with its interval and sort key."""
    if shown is None:
        return _EMPTY
    if not isinstance(shown, Mapping):
        return _EMPTY | {"text": reading.show(shown), "sort": _sort_key(shown)}
    number, total = reading.value(shown), reading.sample_count(row)
    count = shown.get("count", total)
    return {
        "text": reading.show(number),
        "sort": _sort_key(number),
        "interval": reading.show_interval(shown),
        "count": f"{count:.0f} of {total} samples" if count != total else "",
        "bad": bad,
    }


def _sort_key(number: float) -> str:
    """Format a number for JavaScript's Number; "" for nan, which sorts last."""
    if math.isnan(number):
        return ""
    return repr(float(number)).replace("inf", "Infinity")


# ----------------------------------------------------------------------------------------- samples
def _samples(
    rows: Sequence[Row],
    findings: Mapping[str, list[Finding]],
    texts: Mapping[str, list[list[Piece]]],
    best: Row | None,
) -> list[dict[str, Any]]:
    """Samples by row; initially open: real text, best of few steps and a repeating control."""
    known = [row for row in rows if texts.get(row["slug"])]
    models = [row for row in known if row["kind"] == "model"]
    controls = [row for row in known if row["kind"] == "control"]
    repeats = lambda row: any(found.word == "repeats" for found in findings[row["slug"]])
    chosen = [row for row in known if row["kind"] == "real"][:1]
    chosen += [best] if best in known else models[:1]
    chosen += [*filter(repeats, controls), *controls][:1]
    first = [row["slug"] for row in chosen]
    order = [*chosen, *(row for row in known if row["slug"] not in first)]
    return [
        {
            "title": reading.title(row),
            "open": row["slug"] in first,
            "texts": texts[row["slug"]],
        }
        for row in order
    ]
