"""The three pictures of a report, as PNG files and as SVG for the page.

They show the rows of the report's main task by the figure that ranks them, see `reading.quality`. A
group has the same colour in all pictures; hollow crosses are rows flagged by reading.py. Text is
readable at the width of a phone. In the page, colours are variables of its style (report.css), for
light and dark mode. Equal rows give equal bytes.
"""

import contextlib
import io
import math
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fsdfm_jax import extras
from fsdfm_jax.evaluate.report import reading
from fsdfm_jax.evaluate.report.reading import Quality, Row
from fsdfm_jax.inference.stream import printable

_WIDTH, _HEIGHT = 6.4, 4.7  # inches of the picture without its legend
_FONT = 13  # points
_LINE = 0.27  # inches per line of the legend
_DPI = 130
_NAME_WIDTH = 46  # maximum characters of a name in a legend
_LABEL_WIDTH = 20  # maximum characters of a name beside a point
_TWO_COLUMNS = 25  # maximum characters of names for two columns in the legend
# The colour-blind safe palette of Okabe and Ito, without its pale yellow.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _SOFT, _LINE_COLOR, _PAPER = "#1B1F24", "#6A7280", "#E4E4E4", "#FFFFFF"
# Colours -> style variables of the page.
_VARIABLES = {_INK: "currentColor", _SOFT: "var(--soft)", _LINE_COLOR: "var(--line)"}
_VARIABLES |= {_PAPER: "var(--card)"} | {c: f"var(--curve{i})" for i, c in enumerate(_PALETTE)}
_FLAGGED = "flagged, see the table"
_MARKERS, _LINES = "os^Dv", ("-", "--", ":", "-.")
_AUTOREGRESSIVE, _REAL, _CONTROL = _INK, _INK, _SOFT
_IN_SIGHT_BITS = 1.5  # rows with entropy further below real text are drawn at the edge
_OUTSIDE_NAMED = 4  # number of those drawn, lowest perplexities first
_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": _FONT,
    "axes.titlesize": _FONT,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE_COLOR,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), _INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), _INK),
    "legend.frameon": False,
    "legend.fontsize": _FONT,
    "svg.fonttype": "none",
}


class _Style(NamedTuple):
    color: str
    line: str
    marker: str


class _Label(NamedTuple):
    """A text to show beside a point if there is room."""

    x: float
    y: float
    text: str
    color: str


# --------------------------------------------------------------------------------------- to a file
def png(figure: Any) -> bytes:
    """Return the content of a PNG file."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Any, name: str) -> str:
    """Make an <svg> element for a page that defines the variables in `_VARIABLES`.

    Args:
      figure: of this module.
      name: unique in the page; makes the picture's ids unique.
    """
    buffer = io.StringIO()
    with _style(name):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    text = buffer.getvalue()
    for part in ("metadata", "style"):  # a global style would apply to the whole page
        text = re.sub(rf"\s*<{part}\b.*?</{part}>", "", text, count=1, flags=re.DOTALL)
    # Nothing refers to the ids of groups, and several pictures would share them.
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])
    for color, variable in _VARIABLES.items():
        text = text.replace(f": {color.lower()}", f": {variable}")
    start, mark, rest = text.partition(">")
    return re.sub(r' (width|height)="[^"]*"', "", start) + mark + rest  # the page sets the size


@contextlib.contextmanager
def _style(salt: str = "fsdfm_jax") -> Iterator[None]:
    """Our settings on top of the library's defaults, ignoring the user's."""
    with extras.needed("train", "A picture"):
        import matplotlib.style

    with matplotlib.style.context(_STYLE | {"svg.hashsalt": salt}, after_reset=True):
        yield


# ------------------------------------------------------------------------------------ the pictures
def frontier(rows: Sequence[Row], exposed: Collection[str]) -> Any:
    """Plot quality against unigram entropy: only perplexities of equal entropy can be compared.

    If temperatures vary, a curve is a group with fixed steps over temperatures; otherwise a group
    over its steps.

    Args:
      rows: of the report, one per setting.
      exposed: slugs of the flagged rows.
    """
    with _canvas() as (figure, axis, legend, labels):
        ranked, x_of = reading.quality(rows), _value_of(_entropy_bits)
        y_of = _value_of(ranked.read)
        rows = _finite(_finite(rows, x_of), y_of, positive=not ranked.exact)
        styles = _styles(rows)
        rows, outside = _in_sight(rows, x_of)
        for row in rows:
            if row["kind"] == "real":
                low, high = reading.bounds(_entropy_bits(row))
                band = (np.fmin(low, x_of(row) - 0.02), np.fmax(high, x_of(row) + 0.02))
                axis.axvspan(*band, color=_LINE_COLOR, lw=0, zorder=0)
            if row["kind"] != "model":
                marker, color = ("*", _REAL) if row["kind"] == "real" else ("X", _CONTROL)
                _points(axis, [x_of(row)], [y_of(row)], _Style(color, "", marker), hollow=False)
                name = _name(row["group"], _LABEL_WIDTH)
                labels.append(_Label(x_of(row), y_of(row), name, color))
        models = [row for row in rows if row["kind"] == "model"]
        settings = {(r["group"], r.get("steps"), r.get("temperature")) for r in models}
        varied = len(settings) > len({setting[:2] for setting in settings})
        curves: dict[tuple, list[Row]] = {}
        for row in models:
            key = (row["group"], row.get("steps") if varied else None)
            curves.setdefault(key, []).append(row)
        for (group, steps), members in curves.items():
            order = "temperature" if varied else "steps"
            members.sort(key=lambda row: row.get(order) or 0)
            style, calls = styles[group], sorted({g[1] or 0 for g in curves if g[0] == group})
            shade = calls.index(steps or 0) / (len(calls) - 1) if len(calls) > 1 else 1.0
            _curve(axis, members, x_of, y_of, style, exposed, 0.35 + 0.65 * shade)
            legend.setdefault(group, _handle(style))
            ends = members[-1:] if varied else members[:: max(len(members) - 1, 1)]
            labels += _row_labels(ends, x_of, y_of, style.color)
        if outside:
            _points_outside(axis, outside, min(map(x_of, rows)), x_of, y_of, labels)
        axis.set_xlabel("unigram entropy of a sample, bits")
        _quality_axis(axis, ranked, rows + outside)
    return figure


def steps(rows: Sequence[Row], exposed: Collection[str]) -> Any:
    """Plot quality against network calls per sample, with intervals; see `frontier`."""
    with _canvas() as (figure, axis, legend, _):
        ranked = reading.quality(rows)
        rows = _finite(rows, _value_of(ranked.read), positive=not ranked.exact)
        rows = reading.at_usual_temperature(rows)
        _against_steps(axis, rows, exposed, ranked, legend)
        _quality_axis(axis, ranked, rows)
    return figure


def time(rows: Sequence[Row], exposed: Collection[str]) -> Any:
    """Plot quality against milliseconds per sample; see `frontier`."""
    with _canvas() as (figure, axis, legend, labels):
        ranked, x_of = reading.quality(rows), lambda row: row["milliseconds_per_sample"]
        y_of = _value_of(ranked.read)
        rows = reading.at_usual_temperature(_finite(rows, y_of, positive=not ranked.exact))
        timed = [r for r in rows if r["kind"] == "model" and (x_of(r) or 0) > 0]
        styles = _styles(rows)
        for group, members in _groups(timed).items():
            members.sort(key=lambda row: row["steps"] or 0)
            _curve(axis, members, x_of, y_of, styles[group], exposed)
            legend.setdefault(group, _handle(styles[group]))
            ends = members[:: max(len(members) - 1, 1)]
            labels += _row_labels(ends, x_of, y_of, styles[group].color)
        _real_line(axis, rows, y_of)
        axis.set_xlabel("milliseconds per sample")
        _log_axis(axis, "x", [x_of(row) for row in timed])
        _quality_axis(axis, ranked, rows)
    return figure


PICTURES: dict[str, Callable[[Sequence[Row], Collection[str]], Any]] = {
    "frontier": frontier,
    "steps": steps,
    "time": time,
}


# ------------------------------------------------------------------------------------------- parts
@contextlib.contextmanager
def _canvas() -> Iterator[tuple[Any, Any, dict[str, Any], list[_Label]]]:
    """Yield (figure, axis, legend to fill, labels to fill); lay out both at the end."""
    with _style():
        from matplotlib.figure import Figure  # without pyplot: no state, no window

        figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.09, w_pad=0.09)
        axis = figure.subplots()
        legend: dict[str, Any] = {}
        labels: list[_Label] = []
        yield figure, axis, legend, labels
        if not axis.has_data():
            axis.set_axis_off()
            axis.text(0.5, 0.5, "no figures to draw", ha="center", transform=axis.transAxes)
            return
        if any(line.get_gid() == _FLAGGED for line in axis.lines):
            legend[_FLAGGED] = _handle(_Style(_SOFT, "", "X"), hollow=True)
        if legend:
            names = ["\n".join(map(_name, textwrap.wrap(name, _NAME_WIDTH))) for name in legend]
            per_line = 2 if max(map(len, names)) <= _TWO_COLUMNS else 1
            figure.legend(
                list(legend.values()),
                names,
                loc="outside lower left",
                ncols=per_line,
                columnspacing=1.2,
                handlelength=1.8,
                borderpad=0,
            )
            lines = sum(name.count("\n") + 1 for name in names)
            figure.set_figheight(_HEIGHT + _LINE * math.ceil(lines / per_line))
        figure.draw_without_rendering()  # fixes the position of the axes
        figure.set_layout_engine("none")
        _write_labels(axis, labels)


def _main(rows: Sequence[Row]) -> list[Row]:
    task = reading.main_task(rows)
    return [row for row in rows if row.get("task") == task]


def _finite(
    rows: Sequence[Row], read: Callable[[Row], float], *, positive: bool = True
) -> list[Row]:
    """Rows of the main task with a finite figure; `positive` for logarithmic axes."""
    fits = lambda number: math.isfinite(number) and (number > 0 or not positive)
    return [row for row in _main(rows) if fits(read(row))]


def _entropy_bits(row: Row) -> dict[str, float] | None:
    return reading.figure(row, "entropy_bits")


def _value_of(estimate: Callable[[Row], dict[str, float] | None]) -> Callable[[Row], float]:
    return lambda row: reading.value(estimate(row))


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return groups


def _styles(rows: Sequence[Row]) -> dict[str, _Style]:
    """Return the style of each group, by its index among the models' groups."""
    styles, taken = {}, 0
    for row in rows:
        if row["group"] in styles or row["kind"] != "model":
            continue
        if row.get("stage") == "autoregressive":
            styles[row["group"]] = _Style(_AUTOREGRESSIVE, "-", "P")
            continue
        turn = taken // len(_PALETTE)
        line = _LINES[turn % len(_LINES)]
        marker = _MARKERS[(taken + turn) % len(_MARKERS)]
        styles[row["group"]] = _Style(_PALETTE[taken % len(_PALETTE)], line, marker)
        taken += 1
    return styles


def _name(text: str, width: int = _NAME_WIDTH) -> str:
    """Sanitise a name as a label: no formulas or control characters, not hidden, not long."""
    text = printable(text, keep="")
    text = text if len(text) <= width else text[: width - 1] + "…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _handle(style: _Style, *, hollow: bool = False) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        color=style.color,
        linestyle=style.line,
        marker=style.marker,
        markersize=7,
        markerfacecolor=_PAPER if hollow else style.color,
    )


def _points(axis, xs, ys, style: _Style, *, hollow: bool, gid: str | None = None) -> None:
    axis.plot(
        xs,
        ys,
        linestyle="",
        marker=style.marker,
        markersize={"*": 14, "X": 9, "P": 9}.get(style.marker, 5.5),
        markerfacecolor=_PAPER if hollow else style.color,
        markeredgecolor=style.color,
        markeredgewidth=1.4 if hollow else 0.6,
        zorder=3,
        gid=gid,
    )


def _curve(
    axis, rows, x_of, y_of, style: _Style, exposed: Collection[str], alpha: float = 1.0
) -> None:
    """Draw rows as a curve: full markers, and hollow crosses for flagged ones."""
    xs, ys = [x_of(row) for row in rows], [y_of(row) for row in rows]
    line = {"color": style.color, "linestyle": style.line, "alpha": alpha}
    axis.plot(xs, ys, linewidth=1.6, zorder=2, **line)
    flagged = np.array([row["slug"] in exposed for row in rows], bool)
    xs, ys = np.array(xs), np.array(ys)
    _points(axis, xs[~flagged], ys[~flagged], style, hollow=False)
    if flagged.any():
        crosses = style._replace(marker="X")
        _points(axis, xs[flagged], ys[flagged], crosses, hollow=True, gid=_FLAGGED)


def _row_labels(rows, x_of, y_of, color: str) -> list[_Label]:
    """Label rows with their steps; an autoregressive model, which has none, with its name."""
    labels = []
    for row in rows:
        text = str(row.get("steps") or "")
        if row.get("stage") == "autoregressive":
            text = _name(row["group"], _LABEL_WIDTH)
        labels.append(_Label(x_of(row), y_of(row), text, color))
    return labels[-1:] if any(r.get("stage") == "autoregressive" for r in rows) else labels


def _in_sight(rows: Sequence[Row], x_of: Callable[[Row], float]) -> tuple[list[Row], list[Row]]:
    """Split rows into those near real text in entropy, and those far below."""
    reals = [x_of(row) for row in rows if row["kind"] == "real"]
    left = min(reals) - _IN_SIGHT_BITS if reals else -math.inf
    near = [row for row in rows if x_of(row) >= left]
    return near, [row for row in rows if x_of(row) < left]


def _points_outside(axis, rows, edge: float, x_of, y_of, labels: list[_Label]) -> None:
    """Draw rows left of the picture as labelled arrows at its edge."""
    edge -= 0.15
    style = _Style(_CONTROL, "", "<")
    for row in sorted(rows, key=y_of)[:_OUTSIDE_NAMED]:
        _points(axis, [edge], [y_of(row)], style, hollow=True)
        text = f"{_name(reading.title(row), _LABEL_WIDTH)}: {x_of(row):.1f} bits"
        labels.insert(0, _Label(edge, y_of(row), text, _CONTROL))


def _against_steps(axis, rows, exposed, ranked: Quality, legend) -> None:
    styles, y_of = _styles(rows), _value_of(ranked.read)
    models = [row for row in rows if row["kind"] == "model" and row.get("steps")]
    for group, members in _groups(models).items():
        members.sort(key=lambda row: row["steps"])
        style = styles[group]
        _curve(axis, members, lambda row: row["steps"], y_of, style, exposed)
        for row in members:
            low, high = reading.bounds(ranked.read(row))
            if math.isfinite(low) and math.isfinite(high) and (low > 0 or ranked.exact):
                axis.vlines(row["steps"], low, high, color=style.color, linewidth=1.2, zorder=1)
        legend.setdefault(group, _handle(style))
    _real_line(axis, rows, y_of)
    axis.set_xlabel("network calls per sample")
    axis.set_xscale("log", base=2)
    counts = [row["steps"] for row in models] or [1]
    exponents = range(int(math.log2(min(counts))), math.ceil(math.log2(max(counts))) + 1)
    every = exponents[:: 1 if len(exponents) <= 7 else 2]
    axis.set_xticks([2**k for k in every], [f"{2**k}" for k in every])
    axis.minorticks_off()


def _real_line(axis, rows, y_of) -> None:
    """Draw real text as a labelled horizontal line."""
    for row in rows:
        if row["kind"] == "real":
            y = y_of(row)
            axis.axhline(y, color=_REAL, linestyle=(0, (1, 2)), linewidth=1.6, zorder=1)
            axis.annotate(
                _name(row["group"]),
                (1.0, y),
                xycoords=("axes fraction", "data"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="right",
                color=_REAL,
            )


def _quality_axis(axes, ranked: Quality, rows: Sequence[Row]) -> None:
    """The y axis: logarithmic for perplexities, linear for what an exact judge says."""
    axes.set_ylabel(ranked.axis)
    if not ranked.exact:
        _log_axis(axes, "y", [reading.value(ranked.read(row)) for row in rows])


def _log_axis(axes, which: str, values: Sequence[float]) -> None:
    """Make an axis logarithmic with plain numbers, and extra ticks if it spans few decades."""
    from matplotlib import ticker

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    decades = math.log10(max(values) / min(values)) if values else 1.0
    subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.4 else (1.0, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(ticker.LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _write_labels(axis, labels: list[_Label]) -> None:
    """Draw each label beside its point, on the first side without overlap, or not at all."""
    points_P2, room = _covered(axis), axis.get_window_extent()
    taken = [text.get_window_extent() for text in axis.texts]
    for label in labels:
        for dx, dy in ((7, 0), (-7, 0), (0, 6), (0, -6), (6, 6), (6, -6), (-6, 6), (-6, -6)):
            text = axis.annotate(
                label.text,
                (label.x, label.y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=("center", "left", "right")[np.sign(dx)],
                va=("center", "bottom", "top")[np.sign(dy)],
                color=label.color,
            )
            box = text.get_window_extent()
            inside = (box.min >= room.min).all() and (box.max <= room.max).all()
            hit = ((points_P2 > box.min) & (points_P2 < box.max)).all(axis=1).any()
            if inside and not hit and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _covered(axis) -> np.ndarray:
    """Pixels [P, 2] on all curves and points, dense enough to detect overlaps with text."""
    parts = [np.zeros((0, 2))]
    for line in axis.lines:
        count = len(line.get_xdata())
        if line.get_transform() != axis.transData or not count:
            continue
        corners_N2 = axis.transData.transform(np.column_stack(line.get_data()))
        dense = 60 if line.get_linestyle() != "None" else 1
        at_P = np.linspace(0, count - 1, (count - 1) * dense + 1)
        along = [np.interp(at_P, np.arange(count), corners_N) for corners_N in corners_N2.T]
        parts.append(np.stack(along, axis=1))
    return np.concatenate(parts)
