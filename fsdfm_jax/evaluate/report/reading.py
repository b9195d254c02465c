"""Interpretation of rows: titles, displayed figures and findings against them.

A low perplexity alone proves nothing: repetitive text gets one for free, and a judge that can't
tell shuffled text from real text is useless. So the judge is checked first, then each row is
compared with real text, and anything that could be mistaken for quality is reported in words.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fsdfm_jax.evaluate import exact_judges

Row = dict[str, Any]

AGGREGATIONS = ("perplexity_a", "perplexity_b", "perplexity_c", "nats_per_byte")

# Thresholds for significant differences from real text. At temperature 1, good models are within
# 0.2 bits and a few percent of real text. Sampling error, which grows with few samples, is handled
# separately: the intervals must not overlap either.
# Half a bit less is like a vocabulary with 30% fewer words (1 - 2**-0.5).
ENTROPY_BITS = 0.5
# A fifth of the different n-grams is missing: a loop in each paragraph.
DISTINCT_SHARE = 0.8
# Self-BLEU; for real text it varies by about 0.02 between draws.
SELF_BLEU = 0.15
# Without information from the token order, only token frequencies remain: about 7 nats per token in
# English against 3 to 3.5 in context, and exp(3.5) is 33.
UNORDERED_TIMES = 30.0
# A judge skipped 10 percentage points more words than in real text, so its perplexity is of the
# words it knows, the easier ones.
SKIPPED_SHARE = 0.1

FEW_STEPS = 16  # maximum network calls per sample that count as "few"
MATCHED_BITS = 0.2  # rows with entropies within this range can be compared by perplexity

NO_BETTER, COLD = "n-grams", "T<1"  # words of a `Finding`


class Finding(NamedTuple):
    """A finding against a row.

    Attributes:
      word: for a narrow column, "repeats".
      sentence: the same with numbers.
      columns: keys of the figures it is based on.
    """

    word: str
    sentence: str
    columns: tuple[str, ...]


# --------------------------------------------------------------------------------------- one figure
def figure(row: Row, key: str) -> dict[str, float] | None:
    """Return an estimate of `row["figures"]`, None if not computed."""
    return (row.get("figures") or {}).get(key)


def perplexity(row: Row, judge: str | None, key: str = "perplexity_a") -> dict[str, float] | None:
    """Return a judge's estimate for display: B of texts, the others of ids if available."""
    scores = (row.get("judges") or {}).get(judge) or {}
    ids, text = scores.get("ids"), scores.get("text")
    chosen = text if key == "perplexity_b" else (ids or text)
    return chosen.get(key) if chosen else None


def headline(row: Row, judge: str) -> dict[str, float] | None:
    """Return a judge's main perplexity: A of ids if it reads them, otherwise B of the text."""
    has_ids = bool(row["judges"][judge].get("ids"))
    return perplexity(row, judge, "perplexity_a" if has_ids else "perplexity_b")


def value(estimate: dict[str, float] | None) -> float:
    """Return the value of an estimate; nan if there is none."""
    return math.nan if estimate is None else float(estimate["value"])


def bounds(estimate: dict[str, float]) -> tuple[float, float]:
    """Return (low, high) of an estimate, which may be nan."""
    return float(estimate.get("low", math.nan)), float(estimate.get("high", math.nan))


def show(number: float | None) -> str:
    """Format a number: two decimals below 100, none above, "-" for None."""
    if number is None:
        return "-"
    if isinstance(number, int):
        return f"{number:,}"
    return f"{number:.2f}" if not abs(number) >= 99.995 else f"{number:,.0f}"


def show_interval(estimate: dict[str, float] | None) -> str:
    """Format an interval, "29.4–33.2", with about three digits; "" if unknown."""
    low, high = bounds(estimate) if estimate else (math.nan, math.nan)
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    digits = [0 if abs(end) >= 99.95 else 1 if abs(end) >= 9.995 else 2 for end in (low, high)]
    return f"{low:,.{digits[0]}f}–{high:,.{digits[1]}f}"


class Quality(NamedTuple):
    """What rows are ranked by.

    Attributes:
      name: of the figure, in a sentence.
      axis: the same in a picture.
      read: its estimate for a row, None where it has none.
      rising: whether more is better.
      exact: whether it comes from a judge that knows the truth.
    """

    name: str
    axis: str
    read: Callable[[Row], dict[str, float] | None]
    rising: bool = False
    exact: bool = False


def quality(rows: Sequence[Row]) -> Quality:
    """The figure of an exact judge where there is one, else perplexity A of the main judge."""
    key = exact_judges.ranked_by(rows)
    if key is not None:
        (axis, rising), head = exact_judges.RANKED[key], exact_judges.COLUMNS[key].head
        return Quality(head, axis, lambda row: exact_judges.figure(row, key), rising, exact=True)
    main = next(iter(judges(rows)), None)
    return Quality("perplexity", "perplexity (A)", lambda row: perplexity(row, main))


# ------------------------------------------------------------------------------------ what rows are
def judges(rows: Iterable[Row]) -> list[str]:
    """Return the names of all judges; the first one is the main judge."""
    return list(dict.fromkeys(name for row in rows for name in row.get("judges") or {}))


def main_task(rows: Sequence[Row]) -> str | None:
    """Return the most frequent task among the models' rows, shown in the pictures."""
    tasks = [row.get("task") for row in rows if row["kind"] == "model"]
    tasks = tasks or [row.get("task") for row in rows]
    return max(dict.fromkeys(tasks), key=tasks.count) if tasks else None


def real_row(rows: Iterable[Row], task: str | None) -> Row | None:
    """Return the row of real text for a task; figures of other tasks count other tokens."""
    return next((r for r in rows if r["kind"] == "real" and r.get("task") == task), None)


def control_row(rows: Iterable[Row], name: str, task: str | None) -> Row | None:
    """Return the row of a control (a name in `eval.controls`, see `draw.control`) for a task."""
    return next((r for r in rows if _is_control(r, name) and r.get("task") == task), None)


def is_ngrams(row: Row) -> bool:
    """Return whether a row is the n-gram control, for any task."""
    return _is_control(row, "ngram")


def _is_control(row: Row, name: str) -> bool:
    return row["kind"] == "control" and row["setting"].startswith(f"control-{name}")


def title(row: Row) -> str:
    """Title of a row: "distill, 8 steps, T=0.9"."""
    parts = [row["group"]]
    if row.get("steps") is not None:
        parts.append(f"{row['steps']} step{'' if row['steps'] == 1 else 's'}")
    if row.get("temperature") not in (None, 1.0):
        parts.append(f"T={row['temperature']:g}")
    return ", ".join(parts)


def at_usual_temperature(rows: Iterable[Row]) -> list[Row]:
    """Of each group and step count, keep the row with the temperature nearest to 1."""

    def distance(row):
        return abs(math.log(row.get("temperature") or 1.0))

    best: dict[tuple, Row] = {}
    for row in rows:
        key = (row["kind"], row["group"], row.get("steps"), row.get("task"))
        if key not in best or distance(row) < distance(best[key]):
            best[key] = row
    return list(best.values())


def many_steps(rows: Sequence[Row]) -> Row | None:
    """Return the reference for few steps: the base model, else any model, with most steps."""
    task = main_task(rows)
    models = [row for row in rows if row["kind"] == "model" and row.get("task") == task]
    usual = at_usual_temperature(models)
    stepped = [r for r in usual if r.get("stage") != "autoregressive" and r.get("steps")]
    base = [row for row in stepped if row.get("stage") == "pretrain"]
    return max(base or stepped, key=lambda row: row["steps"], default=None)


# Settings that may be common to the models' rows: key -> (name, function that formats it).
_SETTINGS = {
    "jump": ("jump", lambda row: row.get("jump")),
    "grid": ("grid", lambda row: row.get("grid")),
    "temperature": ("temperature", lambda row: _plain(row.get("temperature"))),
    "top_p": ("top-p", lambda row: _plain(row.get("top_p"))),
    "cooling": ("cooling", lambda row: _plain(row.get("cooling"))),
    "look_ahead": ("look-ahead", lambda row: _plain(row.get("look_ahead"))),
    "weights": ("weights", lambda row: row.get("weights")),
    "task": ("task", lambda row: row.get("task")),
    "num_samples": ("samples", lambda row: _plain(row.get("num_samples"))),
    "seeds": ("seeds", lambda row: _plain(row.get("num_seeds", 1))),
    "device": ("device", lambda row: row.get("device")),
}


# Settings of the published sampler; they aren't repeated in every row.
_USUAL = {
    "jump": "cumulative",
    "grid": "uniform",
    "temperature": "1",
    "top_p": "1",
    "cooling": "0",
    "look_ahead": "0",
    "weights": "ema",
}
_SHORT = {"temperature": "T={}", "top_p": "top-p {}", "cooling": "cooling {}"}
_SHORT |= {"look_ahead": "look-ahead {}", "num_samples": "{} samples", "seeds": "{} seeds"}


def _plain(number: float | None) -> str | None:
    return None if number is None else f"{number:g}"


def settings(rows: Iterable[Row]) -> tuple[dict[str, str], dict[str, str]]:
    """Common settings of the models' rows, name -> value, and varying ones, key -> name.

    Settings that no row has are in neither. Rows without a setting, such as the grid of an
    autoregressive model, are ignored.
    """
    models = [row for row in rows if row["kind"] == "model"]
    common, varied = {}, {}
    for key, (name, read) in _SETTINGS.items():
        values = {read(row) for row in models} - {None}
        if len(values) == 1:
            common[name] = values.pop()
        elif values:
            varied[key] = name
    return common, varied


def samplers(rows: Sequence[Row]) -> dict[str, str]:
    """Slug -> the distinguishing sampler settings of a row: "euler, T=0.8".

    Lists the settings that vary between rows, except values of the published sampler. It is "" for
    texts, and for all rows if their samplers are the same.
    """
    varied = settings(rows)[1]
    told = {row["slug"]: _sampler(row, varied) for row in rows}
    models = {told[row["slug"]] for row in rows if row["kind"] == "model"}
    return told if len(models) > 1 else dict.fromkeys(told, "")


def _sampler(row: Row, varied: Iterable[str]) -> str:
    if row["kind"] != "model":
        return ""
    own = {key: shown(row) for key, (_, shown) in _SETTINGS.items()}
    own = {key: shown for key, shown in own.items() if shown is not None}
    hidden = _USUAL | {"seeds": "1"}
    named = [key for key in varied if key in own and own[key] != hidden.get(key)]
    ways = [key for key in varied if key in _USUAL and key in own]
    if "jump" in own and ways and not set(named) & set(_USUAL):
        if all(own.get(key, usual) == usual for key, usual in _USUAL.items()):
            named = ["published", *named]
        else:  # a common setting differs from the published one
            named = [*ways, *named]
    parts = [_SHORT.get(key, "{}").format(own.get(key, key)) for key in named]
    return ", ".join(parts + ["no cache"] * (row.get("memory") == "none"))


def common_line(rows: Iterable[Row]) -> str:
    """List the common settings of all models' rows in a sentence; "" without models."""
    common, _ = settings(rows)
    common = {k: v for k, v in common.items() if (k, v) != ("seeds", "1")}
    told = [f"{k} {v}" if k not in ("samples", "seeds") else f"{v} {k}" for k, v in common.items()]
    return f"Common to all models: {', '.join(told)}." if told else ""


def best_few_step(rows: Sequence[Row], findings_of: Mapping[str, list[Finding]]) -> Row | None:
    """The best row of few steps that nothing speaks against; None if there is none.

    By an exact judge's figure where there is one, see `quality`; then only what that judge found
    speaks against a row. Else the lowest perplexity, and none where the judge can't tell text from
    shuffled text: it ranks nothing. That n-grams do as well only says that a row is weak. At the
    entropy of real text where a row has it: a lower temperature would always win.

    Args:
      rows: of one report.
      findings_of: slug of a row -> `findings`.
    """
    task, names, ranked = main_task(rows), judges(rows), quality(rows)
    if not ranked.exact and names and tells_text(rows, names[0]) is False:
        return None
    candidates = [
        row
        for row in rows
        if row["kind"] == "model"
        and row.get("stage") != "autoregressive"
        and (row.get("steps") or math.inf) <= FEW_STEPS
        and row.get("task") == task
        and not misleading(against(row, findings_of, exact=ranked.exact))
        and math.isfinite(value(ranked.read(row)))
    ]
    real = real_row(rows, task)
    if real is not None and not ranked.exact:
        entropy = value(figure(real, "entropy_bits"))
        off = lambda row: abs(value(figure(row, "entropy_bits")) - entropy)
        candidates = [row for row in candidates if off(row) <= MATCHED_BITS] or candidates
    order = lambda row: value(ranked.read(row)) * (-1 if ranked.rising else 1)
    return min(candidates, key=order, default=None)


def stamps(row: Row) -> list[dict[str, Any]]:
    """Return the protocols of a row: its own, or those of the points pooled into it."""
    protocol = row.get("protocol") or {}
    if "scoring" in protocol:
        return [protocol]
    return [stamp for stamp in protocol.values() if isinstance(stamp, Mapping)]


def own_judges(row: Row) -> set[str]:
    """Return the names of the judges that have the same weights as the row's model."""
    names = set()
    for stamp in stamps(row):
        sha256 = ((stamp.get("samples") or {}).get("model") or {}).get("sha256")
        listed = (stamp.get("scoring") or {}).get("judges") or ()
        names |= {judge["name"] for judge in listed if sha256 and judge.get("sha256") == sha256}
    return names


def fair_judge(row: Row, names: Iterable[str]) -> str | None:
    """Return the first judge that scored a row and isn't its own model, or None."""
    own, scored = own_judges(row), row.get("judges") or {}
    return next((name for name in names if scored.get(name) and name not in own), None)


def sample_count(row: Row) -> int:
    """Samples of a row over all its seeds."""
    return row["num_samples"] * row.get("num_seeds", 1)


# --------------------------------------------------------------------------------------- the judge
def tells_text(rows: Sequence[Row], judge: str) -> bool | None:
    """Return whether a judge tells held-out from shuffled text, with disjoint intervals.

    None if one of the two is missing or has no perplexity.
    """
    real, shuffled = _checked(rows, judge)
    if math.isnan(value(real)) or math.isnan(value(shuffled)):
        return None
    return _below(real, shuffled, 0.0)


def judge_check(rows: Sequence[Row], judge: str) -> str:
    """Describe the result of `tells_text` in a sentence."""
    told = tells_text(rows, judge)
    if told is None:
        return (
            f"Whether {judge} can tell text from shuffled text was not checked: this needs "
            "held-out text and the control 'shuffled'."
        )
    real, shuffled = (_with_interval(estimate) for estimate in _checked(rows, judge))
    if told:
        return f"{judge} tells held-out text ({real}) from shuffled text ({shuffled})."
    return (
        f"{judge} can't tell text from shuffled text: held-out text has perplexity {real}, "
        f"shuffled text {shuffled}. Its perplexities are meaningless; nothing is ranked or flagged."
    )


def _checked(rows: Sequence[Row], judge: str) -> list[dict[str, float] | None]:
    """Return the judge's perplexities of held-out and shuffled text."""
    task = main_task(rows)
    found = (real_row(rows, task), control_row(rows, "shuffled", task))
    return [None if row is None else perplexity(row, judge) for row in found]


def _with_interval(estimate: dict[str, float] | None) -> str:
    interval = show_interval(estimate)
    return show(value(estimate)) + (f", interval {interval}" if interval else "")


def same_entropy(row: Row, other: Row) -> bool:
    """Return whether perplexities are comparable: close entropies, overlapping intervals."""
    one, two = (figure(each, "entropy_bits") for each in (row, other))
    if not one or not two:
        return False
    (low, high), (lower, upper) = bounds(one), bounds(two)
    overlap = low <= upper and lower <= high  # False if an interval is unknown
    return overlap and abs(value(one) - value(two)) <= MATCHED_BITS


# --------------------------------------------------------------------------------------- findings
def all_findings(rows: Sequence[Row]) -> dict[str, list[Finding]]:
    """Slug -> `findings` of a report's rows; only exact findings if the main judge is unusable."""
    names = judges(rows)
    if names and tells_text(rows, names[0]) is False:
        return {row["slug"]: exposed(row) for row in rows}
    tasks = {row.get("task") for row in rows}
    beside = {task: (real_row(rows, task), control_row(rows, "ngram", task)) for task in tasks}
    return {row["slug"]: findings(row, *beside[row.get("task")]) + exposed(row) for row in rows}


def exposed(row: Row) -> list[Finding]:
    """Findings of an exact judge, and of a temperature below 1."""
    verdict = row.get("exact") or {}
    found = [
        Finding(one["word"], one["sentence"], tuple(one["figures"]))
        for one in verdict.get("findings") or ()
    ]
    temperature = row.get("temperature") or 1.0
    if verdict and temperature < 1:
        sentence = f"sampled at temperature {temperature:g}: compare it with rows at the best one"
        found.append(Finding(COLD, sentence, ()))
    return found


def findings(row: Row, real: Row | None, ngrams: Row | None = None) -> list[Finding]:
    """Find everything in a row that could be mistaken for quality, relative to real text.

    With the n-gram control of the same task, also find whether a model is no better than it.
    """
    if row["kind"] == "real":
        return []
    found = []
    if row["kind"] == "control":
        found.append(Finding("control", "a naive control, not a model", ()))
    elif ngrams is not None:
        found += _no_better(row, ngrams)
    if math.isnan(value(figure(row, "entropy_bits"))):
        found.append(Finding("no figures", "its samples have no figures", ("entropy_bits",)))
    main = next(iter(row.get("judges") or {}), None)
    if main in own_judges(row):
        found.append(own_judge())
    found += _left_out(row, real)
    if real is None:
        return found
    found += _skipped(row, real)
    judge = next((name for name in real.get("judges") or {} if name in row["judges"]), None)
    own, reals = perplexity(row, judge), perplexity(real, judge)
    times = value(own) / value(reals) if value(reals) else math.nan
    repetition = _repetition(row, real)
    if repetition:
        bought = "low perplexity by repetition" if times < UNORDERED_TIMES else "repetition"
        sentence = f"{bought}: {', '.join(words for _, words in repetition if words)}"
        found.append(Finding("repeats", sentence, tuple(key for key, _ in repetition)))
    elif times > UNORDERED_TIMES:
        above = value(figure(row, "entropy_bits")) - value(figure(real, "entropy_bits"))
        how = f"perplexity {times:,.0f} times that of real text"
        if above > ENTROPY_BITS:
            sentence = f"{how}, entropy {above:.1f} bits above it: closer to noise than to text"
            found.append(Finding("noise", sentence, ("perplexity_a", "entropy_bits")))
        else:
            at = " at its entropy" if same_entropy(row, real) else ""
            sentence = f"{how}{at}: like real text with shuffled tokens"
            found.append(Finding("unordered", sentence, ("perplexity_a",)))
    if own and reals and _below(own, reals, 0.0):
        sentence = (
            f"perplexity {show(value(own))} below the {show(value(reals))} of real text: easier to "
            "predict than human text"
        )
        found.append(Finding("too easy", sentence, ("perplexity_a",)))
    return found


def against(
    row: Row, findings_of: Mapping[str, list[Finding]], *, exact: bool
) -> Sequence[Finding]:
    """What speaks against ranking a row: of an exact ranking, only what its judge found."""
    return exposed(row) if exact else findings_of[row["slug"]]


def misleading(found: Iterable[Finding]) -> bool:
    """Return whether a finding says more than that a row is weak or cold."""
    return any(finding.word not in (NO_BETTER, COLD) for finding in found)


def flags(row: Row, real: Row | None) -> list[str]:
    """Return the sentences of `findings`."""
    return [finding.sentence for finding in findings(row, real)]


def _no_better(row: Row, ngrams: Row) -> list[Finding]:
    """Find whether n-gram counts of the training text are as good as the model."""
    judge = next((name for name in ngrams.get("judges") or {} if name in row["judges"]), None)
    own, alone = perplexity(row, judge), perplexity(ngrams, judge)
    if not value(own) >= value(alone):  # better, if only by a little, or unknown
        return []
    sentence = (
        f"perplexity {show(value(own))}, n-grams {show(value(alone))}: no better than counts of "
        "the training text without a network"
    )
    return [Finding(NO_BETTER, sentence, ("perplexity_a",))]


def own_judge() -> Finding:
    """Return the finding for a model that scores itself."""
    sentence = "this model is its own judge: its perplexity measures confidence, not quality"
    return Finding("own judge", sentence, ("perplexity_a", "perplexity_b"))


def _left_out(row: Row, real: Row | None) -> list[Finding]:
    """Find samples excluded from a figure, beyond the fraction excluded for real text."""
    total = sample_count(row)
    missing = {}
    for key, estimate in _counted(row).items():
        count = estimate.get("count", total)
        reals = _counted(real).get(key) if real else None
        share = 1 - reals.get("count", math.inf) / sample_count(real) if reals else 0.0
        if count < total and 1 - count / total > share:
            missing[key] = total - int(count)
    told = []
    scored = [lost for (judge, _), lost in missing.items() if judge]
    if scored:
        told.append(f"{max(scored)} of {total} samples had no text to score")
    for (judge, key), lost in missing.items():
        if not judge:
            name = key.replace("entropy_bits", "entropy").replace("_", "-")
            told.append(f"{lost} of {total} samples have no {name}")
    shown = next(iter(row.get("judges") or {}), None)
    columns = tuple(dict.fromkeys(key for judge, key in missing if judge in ("", shown)))
    return [Finding("left out", "; ".join(told), columns)] if told else []


def _counted(row: Row) -> dict[tuple[str, str], dict[str, float]]:
    """Return (judge or "", key) -> estimate, for figures that may be missing for a sample."""
    keys = ("entropy_bits", "distinct_1", "distinct_2", "distinct_3")
    found = {("", key): figure(row, key) for key in keys}
    for judge in row.get("judges") or {}:
        found |= {(judge, key): perplexity(row, judge, key) for key in AGGREGATIONS[:3]}
    return {name: estimate for name, estimate in found.items() if estimate}


def _skipped(row: Row, real: Row) -> list[Finding]:
    """Find judges that skipped much more of a row than of real text."""
    told, columns = [], ()
    for i, judge in enumerate(row.get("judges") or {}):
        own, reals = _skipped_share(row, judge), _skipped_share(real, judge)
        if own > reals + SKIPPED_SHARE:
            told.append(f"{judge} could not score {own:.0%} of it, {reals:.0%} of real text")
            columns = columns or (("perplexity_a", "perplexity_b") if i == 0 else ())
    return (
        [Finding("skipped", f"{', '.join(told)}: a perplexity of the rest", columns)]
        if told
        else []
    )


def _skipped_share(row: Row, judge: str) -> float:
    """Fraction of a row's tokens or words that a judge could not score; nan without any."""
    scores = ((row.get("judges") or {}).get(judge) or {}).get("text") or {}
    total = scores.get("tokens", 0) + scores.get("skipped", 0)
    return scores["skipped"] / total if total else math.nan


def _repetition(row: Row, real: Row) -> list[tuple[str, str]]:
    """Find signs of repeated words, phrases or samples: (figure, words).

    Only the strongest of the distinct-n figures has words.
    """
    told = []
    own, reals = figure(row, "entropy_bits"), figure(real, "entropy_bits")
    if own and reals and _below(own, reals, ENTROPY_BITS):
        gap = value(reals) - value(own)
        told.append(("entropy_bits", f"entropy {gap:.1f} bits below real text"))
    fewest = []
    for n in (1, 2, 3):
        own, reals = figure(row, f"distinct_{n}"), figure(real, f"distinct_{n}")
        if own and reals and _below(own, reals, (1 - DISTINCT_SHARE) * value(reals)):
            words = f"distinct-{n} {value(own):.2f} against {value(reals):.2f}"
            fewest.append((value(own) / value(reals), f"distinct_{n}", words))
    told += [(key, "" if i else words) for i, (_, key, words) in enumerate(sorted(fewest))]
    own, reals = figure(row, "self_bleu"), figure(real, "self_bleu")
    if own and reals and _below(reals, own, SELF_BLEU):
        told.append(("self_bleu", f"self-BLEU {value(own):.2f} against {value(reals):.2f}"))
    return told


def _below(lower: dict[str, float], upper: dict[str, float], gap: float) -> bool:
    """Return whether one estimate is below another by more than `gap`, with disjoint intervals."""
    apart = not bounds(lower)[1] >= bounds(upper)[0]  # unknown intervals count as disjoint
    return value(lower) < value(upper) - gap and apart
