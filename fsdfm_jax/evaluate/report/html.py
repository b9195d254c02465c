"""The report as one page: no other file, no network, readable without its script.

Everything that comes from a run (names, texts, numbers) is data: escaped where it stands in the
page, and for the script a JSON block without "<", ">" and "&", of which it sets text only. The
page forbids itself everything but its own styles and the one script with the right hash.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from fsdfm_jax.evaluate.report import page as page_lib
from fsdfm_jax.evaluate.report import reading
from fsdfm_jax.evaluate.report.reading import Finding, Row
from fsdfm_jax.inference.stream import Piece, printable

# Names of the pictures that the page shows, with heading and what to look for.
PICTURES = {
    "frontier": (
        "Perplexity against entropy",
        "Down is easier to predict, left is less varied. Only points of equal entropy can be "
        "compared: look along the grey band, where real text lies. A point below and to the left "
        "of it has bought its perplexity with repetition. Numbers are network calls per sample; "
        "where temperatures vary, a curve joins them, the careful ones on the left.",
    ),
    "steps": (
        "Quality against steps",
        "The promise of few-step models is a flat curve. Bars are 95% intervals. Hollow crosses "
        "are flagged: their perplexity is not to be trusted.",
    ),
    "time": (
        "Quality against time",
        "The price of a sample in batches, after compilation. Left and down is better; numbers "
        "are network calls.",
    ),
    "predictive": (
        "How sure the model is, step by step",
        "The model's own entropy at each step, averaged over the tokens. It should fall as the "
        "text takes shape; a curve that starts near zero has nothing left to decide.",
    ),
}

_DEFINITIONS = {
    "Perplexity": "How surprised another model, the judge, is by a sample: exp of its negative log "
    "likelihood a token. Low is not good in itself; repetition is the easiest text to predict.",
    "A, B, C": "Three ways to average it. A: the mean over samples of each one's perplexity, on "
    "raw token ids where the judge shares them. B: exp of all nats over all tokens, after decoding "
    "and tokenising anew. C: exp of the mean over samples of the nats a token. A is never below C.",
    "Nats per byte": "The judge's negative log likelihood over the UTF-8 bytes of the text; it can "
    "be compared between judges whose tokens differ.",
    "Entropy": "Unigram entropy: how evenly a sample spreads over the different tokens in it, "
    "averaged over samples. 1 nat is 1.44 bits. The value of real text is the one to match.",
    "Predictive entropy": "The entropy of the model's own prediction, averaged over tokens and "
    "steps: how much it leaves open.",
    "Distinct-n": "Different n-grams over all n-grams of a sample; 1 where nothing is repeated.",
    "Self-BLEU": "How much of a sample's phrases occur in the other samples (BLEU-4): near 1, the "
    "model writes the same text again and again.",
    "MAUVE": "How much the distributions of samples and of real text overlap in a judge's "
    "features; 1 is best.",
    "Bound": "An upper bound of the model's own negative log likelihood of held-out text, in nats "
    "a token. Few-step students have none.",
    "ms/sample": "Milliseconds of the sampler for one sample, of the fastest batch after "
    "compilation.",
    "Flag": "What speaks against a row. It compares with real text: entropy, distinct-n and "
    "self-BLEU for repetition, perplexity far above for lost order, perplexity below for text "
    "that is easier than what people write.",
}
_FACTS = ("device", "code_version", "parameters")  # of the header, at the top of the page
_KINDS = ("kept", "changed", "given", "masked")  # of pieces; classes of the page's styles
_NAMED_ROWS = 4  # rows that a note lists by name
_REMARKS_SHOWN = 6  # without unfolding


class _Column(NamedTuple):
    """A column: its head, the key by which findings name it, and what it shows of a row."""

    head: str
    key: str
    read: Callable[[Row], Any]


def page(
    rows: Sequence[Row],
    findings: Mapping[str, list[Finding]],
    *,
    texts: Mapping[str, list[list[Piece]]],
    paths: Sequence[dict[str, Any]],
    pictures: Mapping[str, str],
    header: Mapping[str, Any],
) -> str:
    """The whole page; equal arguments give equal text.

    Args:
      rows: each setting once.
      findings: row's slug -> what speaks against it.
      texts: row's slug -> its first samples, cut where given stretches begin and end.
      paths: trajectories: "slug" of the row, "title", and "frames" of a "caption" and "pieces"
        [[text, kind], ..] each; the best row's first one is shown first.
      pictures: name in `PICTURES` -> <svg> element.
      header: facts about the run.
    """
    shown = _panels(rows, findings, texts)
    sections = {
        "key": ("Key figures", _key_figures(rows, findings)),
        **{
            name: (heading, _picture(pictures[name], heading, hint + _where(name, rows)))
            for name, (heading, hint) in PICTURES.items()
            if name != "predictive"
        },
        "table": ("All rows", _main_table(rows, findings) + _remarks(rows, findings)),
        "diversity": ("Diversity", _diversity_table(rows, findings)),
        "judges": ("Judges", _judge_tables(rows, findings)),
        "samples": ("Samples side by side", _samples(rows, shown, texts)),
        "steps-seen": (
            "From noise to text",
            _player(paths, reading.best_few_step(rows, findings))
            + f"\n<h3>{PICTURES['predictive'][0]}</h3>\n"
            + _picture(pictures["predictive"], *PICTURES["predictive"]),
        ),
        "protocol": ("Protocol", _protocols(rows, header)),
        "definitions": ("What the figures mean", _definitions()),
    }
    body = "\n".join(
        f'<section id="{name}">\n<h2>{heading}</h2>\n{content}\n</section>'
        for name, (heading, content) in sections.items()
    )
    links = "".join(f'<a href="#{name}">{text}</a>' for name, (text, _) in sections.items())
    data = {
        "rows": [
            {"title": _clean(reading.title(row)), "texts": [*map(_data, texts[row["slug"]])]}
            for row in rows
            if texts.get(row["slug"])
        ],
        "kinds": _KINDS,
        "paths": [_path_data(path) for path in paths],
    }
    return _PAGE.format(
        hash=base64.b64encode(hashlib.sha256(page_lib.SCRIPT.encode()).digest()).decode(),
        style=page_lib.STYLE,
        headline=_headline(rows, header),
        links=links,
        body=body,
        data=_embedded(data),
        script=page_lib.SCRIPT,
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none'; \
form-action 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hash}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Evaluation report</title>
<style>{style}</style>
</head>
<body>
<header>
{headline}
</header>
<nav aria-label="Sections">{links}</nav>
<main>
{body}
</main>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


# ----------------------------------------------------------------------------------------- escaping
def _clean(text: Any) -> str:
    return printable(str(text), keep="")


def _text(text: Any) -> str:
    """A name or sentence on one line, to stand in the page or in an attribute."""
    return escape(_clean(text))


def _embedded(data: Any) -> str:
    """JSON that can't end its <script>: ASCII, "<", ">" and "&" as escapes of JSON itself."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def _data(pieces: Iterable[Piece]) -> list[list[Any]]:
    """Pieces for the script; a kind is its place in _KINDS, as there are thousands."""
    return [[printable(text), _KINDS.index(kind)] for text, kind in pieces]


def _spans(pieces: Iterable[Piece]) -> str:
    return "".join(
        f'<span class="{escape(kind)}">{escape(printable(text))}</span>' for text, kind in pieces
    )


def _path_data(path: Mapping[str, Any]) -> dict[str, Any]:
    frames = [
        {"caption": _clean(frame["caption"]), "pieces": _data(frame["pieces"])}
        for frame in path["frames"]
    ]
    return {"title": _clean(path["title"]), "frames": frames}


def _json(data: Any) -> str:
    return escape(printable(json.dumps(data, indent=2, ensure_ascii=False, default=str)))


# -------------------------------------------------------------------------------------------- tops
def _headline(rows: Sequence[Row], header: Mapping[str, Any]) -> str:
    models = [row for row in rows if row["kind"] == "model"]
    runs = dict.fromkeys(row.get("run") or row["group"] for row in models)
    counts = sorted({row["num_samples"] for row in models or rows})
    seeds = max((row.get("num_seeds", 1) for row in rows), default=1)
    names = reading.judges(rows)
    common, varied = reading.settings(rows)
    device = "several, named in the table" if "device" in varied else common.get("device")
    facts = {
        "rows": f"{len(models)} settings of {_many(runs, 'model')}: {', '.join(runs) or 'none'}",
        "main judge": names[0] if names else "none: there is no perplexity",
        "further judges": ", ".join(names[1:]),
        "samples a row": " or ".join(map(str, counts)) + (f", {seeds} seeds" if seeds > 1 else ""),
        "task": ", ".join(map(str, dict.fromkeys(row.get("task") for row in rows))),
        "device": device or header.get("device"),
        "code version": header.get("code_version"),
        "parameters": _short(header.get("parameters")),
    }
    items = "".join(
        f"<div><dt>{name}</dt><dd>{_text(fact)}</dd></div>" for name, fact in facts.items() if fact
    )
    return f'<h1>Evaluation report</h1>\n<dl class="facts">{items}</dl>'


def _short(parameters: Any) -> str:
    """Counts of parameters, those of equal models together: "1.32 M (distill, refine)"."""
    if isinstance(parameters, Mapping):
        models: dict[str, list[str]] = {}
        for run, count in parameters.items():
            models.setdefault(_short(count), []).append(str(run))
        return ", ".join(f"{count} ({', '.join(runs)})" for count, runs in models.items())
    return f"{parameters / 1e6:.3g} M" if isinstance(parameters, int) else str(parameters or "")


def _picture(svg: str, heading: str, hint: str) -> str:
    figure = f'<figure class="card" role="img" aria-label="{heading}">{svg}</figure>'
    return f'<div class="pair">{figure}<p>{hint}</p></div>'


def _many(things: Iterable, name: str) -> str:
    count = len(list(things))
    return f"{count} {name}{'' if count == 1 else 's'}"


def _where(name: str, rows: Sequence[Row]) -> str:
    """Whose time a picture of times shows."""
    if name != "time":
        return ""
    common, varied = reading.settings(rows)
    if "device" in varied:
        return (
            " The rows were timed on different devices, which the table names: compare times of "
            "one device only."
        )
    return f" Timed on {_text(common['device'])}." if "device" in common else ""


def _key_figures(rows: Sequence[Row], findings: Mapping[str, list[Finding]]) -> str:
    task = reading.main_task(rows)
    models = [row for row in rows if row["kind"] == "model" and row.get("task") == task]
    causal = [row for row in models if row.get("stage") == "autoregressive"]
    real, best = reading.real_row(rows, task), reading.best_few_step(rows, findings)
    many = reading.many_steps(rows)
    many = None if many is best else many
    left_to_right = next(iter(reading.at_usual_temperature(causal)), None)
    heads = {
        "Real text": real,
        "Best of few steps": best,
        "Most steps": many,
        "Left to right": left_to_right,
    }
    names = reading.judges(rows)
    cards = [
        _card(head, row, rows, findings, "best" if row is best else "")
        for head, row in heads.items()
        # A perplexity by itself is no figure to hold others against.
        if row and (reading.fair_judge(row, names) or not reading.own_judges(row))
    ]
    flagged = sum(reading.misleading(findings[row["slug"]]) for row in rows)
    cards.append(
        f'<div class="card"><h3>Flagged</h3><p class="big">{flagged} <span>of {len(rows)} rows'
        "</span></p><p>something speaks against taking their perplexity for quality; "
        '<a href="#flagged">the reasons</a></p></div>'
    )
    if best is None:
        claims = [
            f"No row of at most {reading.FEW_STEPS} steps has a perplexity that nothing speaks "
            "against."
        ]
    else:
        claims = [_claim(best, row, names) for row in (many, left_to_right) if row]
    sentences = "".join(f"<p>{claim}</p>" for claim in claims)
    return f'<div class="cards">{"".join(cards)}</div>{sentences}'


def _claim(best: Row, other: Row, names: Sequence[str]) -> str:
    """What few steps save and cost against another row, in words from their measured figures."""
    parts = [f"{_calls(best)} instead of {other['steps']:,}" if other.get("steps") else ""]
    times = [row.get("milliseconds_per_sample") or math.nan for row in (best, other)]
    if best.get("device") != other.get("device"):
        parts.append("timed on different devices")
    elif math.isfinite(times[1] / times[0]):
        parts.append(f"{_times(times[1] / times[0])} the speed")
    told = [": ".join(part for part in parts if part)]
    own = reading.own_judges(other)
    judge = next((n for n in names if n not in own and _judged(best, other, n)), None)
    if judge:
        by = "" if judge == names[0] else f" by {_text(judge)}"
        numbers = [_number(reading.perplexity(row, judge)) for row in (best, other)]
        entropies = [reading.figure(row, "entropy_bits") for row in (best, other)]
        apart = abs(reading.value(entropies[0]) - reading.value(entropies[1]))
        at = (
            "at the same entropy"
            if apart <= reading.MATCHED_BITS
            else (f"entropy {_number(entropies[0])} against {_number(entropies[1])} bits")
        )
        link = " " if apart <= reading.MATCHED_BITS else ", "
        told.append(f"perplexity {numbers[0]} against {numbers[1]}{by}{link}{at}")
    elif own:
        told.append("the latter's perplexity is not compared, because it is its own judge")
    names_of = [f"<b>{_text(reading.title(row))}</b>" for row in (best, other)]
    return f"{names_of[0]} against {names_of[1]}: {'; '.join(part for part in told if part)}."


def _judged(row: Row, other: Row, judge: str) -> bool:
    return all(math.isfinite(reading.value(reading.perplexity(r, judge))) for r in (row, other))


def _calls(row: Row) -> str:
    return f"{row['steps']:,} network call{'' if row['steps'] == 1 else 's'}"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 9.95 else f"{ratio:.2g} times"


def _card(head: str, row: Row, rows, findings, style: str = "") -> str:
    names = reading.judges(rows)
    judge = reading.fair_judge(row, names)
    judged = reading.perplexity(row, judge)
    entropy = reading.figure(row, "entropy_bits")
    lines = [f"entropy {_number(entropy)} bits"] if entropy else []
    if row.get("milliseconds_per_sample") is not None:
        lines.append(f"{reading.show(row['milliseconds_per_sample'])} ms a sample")
    other = judge is not None and judge != names[0]
    by = f"by {_text(judge)}, the main judge being this model" if other else ""
    # By another judge, what is said of the main judge's perplexity isn't said of this one.
    found = [f for f in findings[row["slug"]] if not (other and f.word == "own judge")]
    real = reading.real_row(rows, row.get("task"))
    ratio = reading.value(judged) / reading.value(real and reading.perplexity(real, judge))
    beside = f" · {_times(ratio)} real text" if row is not real and math.isfinite(ratio) else ""
    return (
        f'<div class="card {style}"><h3>{head}</h3><p class="name">{_text(reading.title(row))} '
        f'{_badges(found)}</p><p class="big">{_number(judged)} <span>perplexity</span></p>'
        f"<p>{_interval(judged)}<small>{beside}</small></p>"
        + (f"<p><small>{by}</small></p>" if by else "")
        + f"<p>{' · '.join(lines)}</p></div>"
    )


def _number(estimate: Mapping[str, float] | None) -> str:
    return reading.show(None if estimate is None else reading.value(estimate))


def _interval(estimate: Mapping[str, float] | None) -> str:
    shown = reading.show_interval(estimate)
    return f"<small>{shown}</small>" if shown else ""


def _badges(found: Sequence[Finding]) -> str:
    return " ".join(f'<span class="flag">! {_text(finding.word)}</span>' for finding in found)


# ------------------------------------------------------------------------------------------ tables
def _table(
    caption: str,
    rows: Sequence[Row],
    columns: Sequence[_Column],
    findings: Mapping[str, list[Finding]],
) -> str:
    """A table that the script makes sortable; columns in which no row has anything are left out."""
    columns = [c for c in columns if any(c.read(row) is not None for row in rows)]
    style_of = lambda c: "" if any(isinstance(c.read(row), str) for row in rows) else ' class="n"'
    heads = "".join(f'<th scope="col"{style_of(c)}>{_text(c.head)}</th>' for c in columns)
    lines = []
    for row in rows:
        found = findings[row["slug"]]
        suspect = {key for finding in found for key in finding.columns}
        total = reading.sample_count(row)
        cells = "".join(_cell(c.read(row), c.key in suspect, total) for c in columns)
        style = row["kind"] if row["kind"] in ("real", "control") else "model"
        name = _text(row["group"])
        badges = f"<div>{_badges(found)}</div>" if found else ""
        lines.append(
            f'<tr class="{style}"><th scope="row" data-v="{name}">{name}{badges}</th>{cells}</tr>'
        )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}">'
        '<table class="sortable"><thead><tr><th scope="col">model</th>'
        f"{heads}</tr></thead>\n<tbody>\n{chr(10).join(lines)}\n</tbody></table></div>"
    )


def _cell(shown: Any, suspect: bool, total: int) -> str:
    style = "n bad" if suspect else "n"
    if isinstance(shown, Mapping):
        number = reading.value(shown)
        mark = "! " if suspect else ""
        count = shown.get("count", total)
        few = f"<small>{count:.0f} of {total} samples</small>" if count != total else ""
        return (
            f'<td class="{style}" data-v="{_sort_key(number)}">{mark}{_number(shown)}'
            f"{_interval(shown)}{few}</td>"
        )
    if isinstance(shown, int | float):
        return f'<td class="{style}" data-v="{_sort_key(shown)}">{reading.show(shown)}</td>'
    if isinstance(shown, str):
        return f'<td data-v="{_text(shown)}">{_text(shown)}</td>'
    return f'<td class="{style}" data-v="">-</td>'


def _sort_key(number: float) -> str:
    """A number as JavaScript's Number reads it; "", which sorts last, for nan."""
    if math.isnan(number):
        return ""
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return repr(float(number))


def _setting_columns(rows: Sequence[Row]) -> list[_Column]:
    """Steps, and what else of the settings differs between the rows of models."""
    numbers = {
        "temperature": lambda row: row.get("temperature"),
        "top_p": lambda row: row.get("top_p"),
        "cooling": lambda row: row.get("cooling"),
        "look_ahead": lambda row: row.get("look_ahead"),
        "num_samples": lambda row: row.get("num_samples"),
        "seeds": lambda row: row.get("num_seeds", 1),
    }
    heads = {"temperature": "T", "num_samples": "n"}
    columns = [_Column("steps", "steps", lambda row: row.get("steps"))]
    for key, name in reading.settings(rows)[1].items():
        read = numbers.get(key) or (lambda row, key=key: reading.setting(row, key))
        columns.append(_Column(heads.get(key, name), key, read))
    return columns


def _figure_column(head: str, key: str) -> _Column:
    return _Column(head, key, lambda row: reading.figure(row, key))


def _main_table(rows: Sequence[Row], findings: Mapping[str, list[Finding]]) -> str:
    names = reading.judges(rows)
    judge = names[0] if names else None
    columns = [
        *_setting_columns(rows),
        _Column("perplexity A", "perplexity_a", lambda row: reading.perplexity(row, judge)),
        _Column("B", "perplexity_b", lambda row: reading.perplexity(row, judge, "perplexity_b")),
        _figure_column("entropy, bits", "entropy_bits"),
        _figure_column("distinct-2", "distinct_2"),
        _figure_column("self-BLEU", "self_bleu"),
        _figure_column("MAUVE", "mauve"),
        _Column("ms/sample", "ms", lambda row: row.get("milliseconds_per_sample")),
    ]
    by = f"Perplexity by {_text(judge)}. " if judge else "There was no judge, so no perplexity. "
    hint = "Small numbers are 95% intervals, over the samples of all seeds."
    common = _text(reading.common_line(rows))
    return f"<p>{common}</p><p>{by}{hint}</p>" + _table("All rows", rows, columns, findings)


def _remarks(rows: Sequence[Row], findings: Mapping[str, list[Finding]]) -> str:
    """What speaks against rows, and the rows' notes, in sentences."""
    flagged = [
        f"<li><b>{_text(reading.title(row))}</b>: "
        f"{_text('; '.join(finding.sentence for finding in findings[row['slug']]))}.</li>"
        for row in rows
        if findings[row["slug"]]
    ]
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row.get("notes") or ():
            notes.setdefault(note, []).append(reading.title(row))
    listed = [
        f"<li>{_text(note)} <small>{_rows(names)}</small></li>" for note, names in notes.items()
    ]
    shown = '<h3 id="flagged">What speaks against rows</h3>'
    shown += _list(flagged) if flagged else "<p>Nothing was found.</p>"
    return shown + (f"<h3>Notes</h3>{_list(listed)}" if listed else "")


def _list(items: Sequence[str]) -> str:
    """A list whose later items have to be asked for."""
    first, rest = items[:_REMARKS_SHOWN], items[_REMARKS_SHOWN:]
    more = (
        f'<details class="more"><summary>{len(rest)} more</summary>'
        f'<ul class="remarks">{"".join(rest)}</ul></details>'
    )
    return f'<ul class="remarks">{"".join(first)}</ul>' + (more if rest else "")


def _rows(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    more = len(names) - _NAMED_ROWS
    return _text("; ".join(names[:_NAMED_ROWS])) + (f" and {more} more" if more > 0 else "")


def _diversity_table(rows: Sequence[Row], findings: Mapping[str, list[Finding]]) -> str:
    heads = {
        "entropy_bits": "entropy, bits",
        "entropy_nats": "entropy, nats",
        "predictive_entropy_nats": "predictive, nats",
        "distinct_1": "distinct-1",
        "distinct_2": "distinct-2",
        "distinct_3": "distinct-3",
        "self_bleu": "self-BLEU",
        "mauve": "MAUVE",
        "bound_nats_per_token": "bound, nats/token",
    }
    columns = [_figure_column(head, key) for key, head in heads.items()]
    return _table("Diversity", rows, _setting_columns(rows) + columns, findings)


def _judge_tables(rows: Sequence[Row], findings: Mapping[str, list[Finding]]) -> str:
    names = reading.judges(rows)
    if not names:
        return "<p>No judge scored these rows.</p>"
    parts = []
    for i, name in enumerate(names):
        columns = _setting_columns(rows)
        for way in ("ids", "text"):
            for key, head in zip(reading.AGGREGATIONS, ("A", "B", "C", "nats/byte"), strict=True):
                columns.append(_Column(f"{head}, {way}", "", _score(name, way, key)))
            columns.append(_Column(f"tokens, {way}", "", _score(name, way, "tokens")))
            columns.append(_Column(f"skipped, {way}", "", _score(name, way, "skipped")))
        parts.append(f"<h3>{_text(name)}{' (main judge)' if i == 0 else ''}</h3>")
        judged = [row for row in rows if (row.get("judges") or {}).get(name)]
        parts.append(_table(f"Judge {name}", judged, columns, _findings_of(name, judged, findings)))
    return "<p>On raw token ids, and on the text decoded and tokenised anew.</p>" + "".join(parts)


def _findings_of(
    judge: str, rows: Sequence[Row], findings: Mapping[str, list[Finding]]
) -> dict[str, list[Finding]]:
    """The findings, but "own judge" where this one is the row's own model."""
    own = reading.own_judge()
    return {
        row["slug"]: [f for f in findings[row["slug"]] if f.word != own.word]
        + ([own] if judge in reading.own_judges(row) else [])
        for row in rows
    }


def _score(judge: str, way: str, key: str) -> Callable[[Row], Any]:
    return lambda row: (((row.get("judges") or {}).get(judge) or {}).get(way) or {}).get(key)


# ----------------------------------------------------------------------------------- samples, steps
def _panels(rows, findings, texts) -> list[Row]:
    """Rows to begin with: real text, the best of few steps, a collapsed control."""
    known = [row for row in rows if texts.get(row["slug"])]
    real = [row for row in known if row["kind"] == "real"]
    best = reading.best_few_step(known, findings)
    plain = [row for row in known if row["kind"] == "model"]
    repeats = lambda row: any(found.word == "repeats" for found in findings[row["slug"]])
    worst = [row for row in known if row["kind"] == "control" and repeats(row)]
    worst = worst or [row for row in known if row["kind"] == "control"]
    worst = worst or [row for row in plain if repeats(row)]
    chosen = [*real[:1], *([best] if best else plain[:1]), *worst[:1], *known]
    return list({row["slug"]: row for row in chosen}.values())[:3]


def _samples(
    rows: Sequence[Row], shown: Sequence[Row], texts: Mapping[str, list[list[Piece]]]
) -> str:
    if not shown:
        return "<p>There are no samples.</p>"
    order = [row["slug"] for row in rows if texts.get(row["slug"])]
    panels = "".join(
        f'<article class="card panel" data-row="{order.index(row["slug"])}">'
        f"<h3>{_text(reading.title(row))}</h3>"
        f'<p class="sample">{_spans(texts[row["slug"]][0])}</p></article>'
        for row in shown
    )
    everything = (piece for some in texts.values() for text in some for piece in text)
    given = any(piece.kind == "given" for piece in everything)
    bold = " What the model was given is <b>bold</b>." if given else ""
    return (
        "<p>The first samples of each row, unselected; samples.txt has those of every seed, whole."
        f"{bold}</p>"
        f'<div id="compare"><div class="controls"></div><div class="panels">{panels}</div></div>'
    )


def _player(paths: Sequence[dict[str, Any]], best: Row | None) -> str:
    if not paths:
        return "<p>No sample was recorded on its way.</p>"
    wanted = [i for i, path in enumerate(paths) if best and path["slug"] == best["slug"]]
    index = wanted[0] if wanted else 0
    first = paths[index]
    last = first["frames"][-1]
    return (
        f'<div id="player" class="card" data-path="{index}"><div class="controls"></div>'
        f'<p class="name">{_text(first["title"])}</p>'
        f'<p class="caption" role="status">{_text(last["caption"])}</p>'
        f'<p class="sample">{_spans(last["pieces"])}</p>'
        '<p class="key"><span class="changed">differs from the frame before</span> '
        '<span class="given">given</span> <span class="masked">░ still masked</span> '
        "<span>kept</span></p></div>"
    )


# -------------------------------------------------------------------------------------------- ends
def _protocols(rows: Sequence[Row], header: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in header.items() if key not in _FACTS}
    parts = (
        [f"<details><summary>The run</summary><pre>{_json(rest)}</pre></details>"] if rest else []
    )
    for models in (True, False):
        chosen = [row for row in rows if (row["kind"] == "model") == models]
        stamps = [stamp for row in chosen for stamp in _stamps(row).values()]
        common = _common(stamps) if len(stamps) > 1 else {}
        if common:
            of = "models" if models else "texts to compare with"
            summary = f"The same for all rows of {of}"
            parts.append(
                f"<details><summary>{summary}</summary><pre>{_json(common)}</pre></details>"
            )
        for row in chosen:
            rests = {slug: _without(stamp, common) for slug, stamp in _stamps(row).items()}
            rest = rests if len(rests) > 1 else next(iter(rests.values()))
            parts.append(
                f"<details><summary>{_text(reading.title(row))}</summary>"
                f"<pre>{_json(rest)}</pre></details>"
            )
    hint = (
        "Everything that the figures of a row depend on; equal stamps give equal figures. A row "
        "shows what it doesn't share with all others; results.json has each stamp whole."
    )
    return f'<p>{hint}</p><div class="stamps">{"".join(parts)}</div>'


def _stamps(row: Row) -> dict[str, Any]:
    """Slug -> protocol of the points of a row."""
    protocol = row.get("protocol") or {}
    pooled = len(reading.stamps(row)) > 1
    return dict(protocol) if pooled else {row["slug"]: protocol}


def _common(stamps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries that are equal in all, at any depth."""
    found = {}
    for key, value in stamps[0].items():
        others = [stamp.get(key) for stamp in stamps]
        if all(other == value for other in others):
            found[key] = value
        elif all(isinstance(other, Mapping) for other in others) and (part := _common(others)):
            found[key] = part
    return found


def _without(stamp: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a stamp that are not in `common`."""
    rest = {}
    for key, value in stamp.items():
        if key not in common:
            rest[key] = value
        elif value != common[key]:  # a part of it is common
            rest[key] = _without(value, common[key])
    return rest


def _definitions() -> str:
    items = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in _DEFINITIONS.items())
    return f'<dl class="definitions">{items}</dl>'
