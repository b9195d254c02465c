"""The tables of `launch.aot_compile`: memory, work and time of programs, and their exchanges."""

from typing import Any

_GB = 1e9


def tables(rows: list[dict[str, Any]]) -> str:
    """The rows as two aligned tables: memory, work and time; and the exchanges by kind."""
    first = ["topology", "mesh", "case", "program", "batch"]
    memory = ["arguments", "temporaries", "total", "of", "free", "fits"]
    work = ["TFLOP", "moved", "sent", "products", "memory", "links", "step", "MFU", "tokens/s"]
    lines = [first + memory + work]
    lines += [[*_first(row), *_memory(row), *_work(row)] for row in rows]
    kinds = sorted({kind for row in rows for kind in row.get("exchanges", {})})
    texts = [
        "For each chip: GB (10^9 bytes) of memory, operations, GB moved in its memory and sent to "
        "others, and ms.",
        _aligned(lines, len(first)),
    ]
    if kinds:
        exchanged = [first + kinds]
        exchanged += [[*_first(row), *_exchanges(row, kinds)] for row in rows]
        texts += [
            "\nSent by each chip, GB, and in how many exchanges:",
            _aligned(exchanged, len(first)),
        ]
    unknown = [row for row in rows if row.get("unknown_loops")]
    if unknown:
        texts.append("Some loops don't say how often they run and are counted once.")
    return "\n".join(texts)


def _first(row: dict[str, Any]) -> list[str]:
    batch = str(row["batch"]) + (f" ({row['search']})" if row["search"] else "")
    return [row["topology"], row["mesh"], row["case"], row["program"], batch]


def _memory(row: dict[str, Any]) -> list[str]:
    total, hbm = row["total"], row["hbm"]
    free = None if total is None or hbm is None else hbm - total
    sizes = [row["arguments"], row["temporaries"], total, hbm, free]
    fits = {True: "yes", False: "no", None: "-"}[row["fits"]]
    return [*("-" if size is None else f"{size / _GB:.2f}" for size in sizes), fits]


def _work(row: dict[str, Any]) -> list[str]:
    if "flops" not in row:
        return ["-"] * 9
    cells = [f"{row['flops'] / 1e12:.3g}"]
    cells += [f"{row[name] / _GB:.3g}" for name in ("hbm_traffic", "sent")]
    if "seconds" not in row:
        return cells + ["-"] * 6
    seconds = row["seconds"]
    cells += [f"{1e3 * seconds[name]:.3g}" for name in ("compute", "memory", "exchange")]
    bounds = [1e3 * seconds[name] for name in ("at_best", "one_by_one")]
    cells.append(f"{bounds[0]:.3g}..{bounds[1]:.3g}")
    cells.append(f"{row['mfu'][0]:.0%}..{row['mfu'][1]:.0%}")
    return [*cells, f"{row['tokens_per_s']:,.0f}"]


def _exchanges(row: dict[str, Any], kinds: list[str]) -> list[str]:
    found = row.get("exchanges")
    if found is None:
        return ["-"] * len(kinds)
    none = {"sent_bytes": 0.0, "count": 0}
    cells = [found.get(kind, none) for kind in kinds]
    return [f"{cell['sent_bytes'] / _GB:.3g} ({cell['count']:.0f})" for cell in cells]


def _aligned(lines: list[list[str]], left: int) -> str:
    """Columns in line; the first ones to the left, those that are empty everywhere left out."""
    kept = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in kept}
    return "\n".join(
        "  ".join(
            line[i].ljust(widths[i]) if i < left else line[i].rjust(widths[i]) for i in kept
        ).rstrip()
        for line in lines
    )
