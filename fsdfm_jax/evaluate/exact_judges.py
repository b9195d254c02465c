"""Judges that know the truth: the rules of Sudoku, the law of a language (`fsdfm_jax.exact`).

A Sudoku model is recognised by its tokenizer and block length. A language needs the law that its
text was sampled from, `eval.law`. The verdict on a row is JSON, `row["exact"]`:

    judge      "6x6 Sudoku"
    figures    key of `COLUMNS` -> value, low, high, count; both ends are nan without an interval
    expected   key -> value for equally many and long samples of the truth
    findings   evidence that a figure is better than it should be: word, sentence, figures
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.exact import hmm, hmm_judge, sudoku, sudoku_judge
from fsdfm_jax.exact.hmm import Law
from fsdfm_jax.exact.intervals import Figure
from fsdfm_jax.exact.sudoku import Sudoku

# Increase one when a code change affects its verdicts.
_SUDOKU_VERSION, _LAW_VERSION = 1, 2
_FEWEST = 2  # minimum samples of a language

Verdict = dict[str, Any]


class Column(NamedTuple):
    """Display of a figure.

    Attributes:
      head: of its column.
      main: whether it is in the short tables.
    """

    head: str
    main: bool = False


COLUMNS = {
    # of Sudoku
    "valid": Column("valid", True),
    "solved": Column("solved", True),
    "groups": Column("groups", True),
    "rows": Column("rows"),
    "columns": Column("columns"),
    "boxes": Column("boxes"),
    "well_formed": Column("well formed"),
    "digits_z": Column("digits z"),
    "pairs_z": Column("pairs z", True),
    "total_variation": Column("TV", True),
    # of a language with a known law
    "nll": Column("nats/token"),
    "excess": Column("excess", True),
    **{f"kl_{k}": Column(f"KL{k}", k == 2) for k in hmm_judge.ORDERS},  # of k-grams
    **{f"entropy_{k}": Column(f"H{k}", k == 3) for k in hmm_judge.ORDERS},
    # of both
    "distinct": Column("distinct", True),
}


class Ranked(NamedTuple):
    """A figure that tells how good a row is.

    Attributes:
      axis: what it is called in pictures.
      rising: whether more is better.
    """

    axis: str
    rising: bool


# The first of these that a report has is what its rows are ranked by.
RANKED = {
    "solved": Ranked("share of puzzles solved", True),
    "valid": Ranked("share of valid grids", True),
    "excess": Ranked("excess over the law, nats per token", False),
}


class ExactJudge(Protocol):
    """A judge that knows the truth."""

    name: str

    def describe(self) -> dict[str, Any]:
        """Describe what its figures depend on, for stamps."""

    def judge(
        self, tokens_NL: np.ndarray, frozen_NL: np.ndarray, *, resamples: int
    ) -> Verdict | None:
        """Judge samples, see the module; None if it can't.

        Args:
          tokens_NL: int [N, L].
          frozen_NL: bool [N, L], the given positions.
          resamples: of the bootstrap.
        """


class SudokuJudge:
    """Judges grids by the rules, and compares valid ones with uniform samples."""

    def __init__(self, size: Sudoku):
        self.name = f"{size.name} Sudoku"
        self._size = size

    def describe(self) -> dict[str, Any]:
        """See `ExactJudge`."""
        return {"kind": "sudoku", "size": self._size.name, "version": _SUDOKU_VERSION}

    def judge(
        self, tokens_NL: np.ndarray, frozen_NL: np.ndarray, *, resamples: int
    ) -> Verdict | None:
        """See `ExactJudge`; a sample with given cells solves its puzzle if its grid is valid."""
        report = sudoku_judge.judge(self._size, tokens_NL, resamples=resamples)
        figures = report.figures | {
            f"{name}_z": Figure(test.z, math.nan, math.nan, report.figures["distinct"].count)
            for name, test in report.uniformity.items()
        }
        if frozen_NL.any():
            # Samplers never change given cells, so a valid grid is a solution.
            figures["solved"] = figures["valid"]
        groups = {"copies": ["distinct"], "not uniform": ["digits", "pairs"]}
        findings = _findings(groups, report.flags)
        return _verdict(self.name, figures, report.expected, findings)


class LawJudge:
    """Judges text by the law of its language."""

    def __init__(self, law: Law):
        self.name = f"the law {law.fingerprint[:8]}"
        self._law = law

    def describe(self) -> dict[str, Any]:
        """See `ExactJudge`."""
        return {"kind": "hmm", "law": self._law.fingerprint, "version": _LAW_VERSION}

    def judge(
        self, tokens_NL: np.ndarray, frozen_NL: np.ndarray, *, resamples: int
    ) -> Verdict | None:
        """See `ExactJudge`; None for samples with given text, which comes from the law itself.

        None also for fewer than two samples, or samples shorter than the longest k-gram.
        """
        count, length = tokens_NL.shape
        if frozen_NL.any() or count < _FEWEST or length < max(hmm_judge.ORDERS):
            return None
        report = hmm_judge.judge(self._law, tokens_NL, resamples=resamples)
        expected = {name: mean for name, (mean, _) in report.law.items()}
        return _verdict(self.name, report.figures, expected, _exposed(report))


def _exposed(report: hmm_judge.Report) -> list[dict[str, Any]]:
    """Find reasons why the likelihood looks better than the samples are.

    A model that is merely worse than the law has a higher loss, which isn't reported. But errors
    can hide that it is sharpened as well: its k-grams have less entropy without being unlikely.
    """
    above = lambda name: report.figures[name].value > report.law[name][0]
    worse = lambda name: name in report.flags and above(name)
    orders, bad = hmm_judge.ORDERS, worse("nll")
    unlikely = {k for k in orders if bad and worse(f"kl_{k}")}
    groups = {
        "copies": ["distinct"],
        "sharpened": [] if bad else ["nll"],
        "low entropy": [
            f"entropy_{k}" for k in orders if not above(f"entropy_{k}") and k not in unlikely
        ],
        "k-grams": [] if bad else [f"kl_{k}" for k in orders if above(f"kl_{k}")],
    }
    return _findings(groups, report.flags)


def _findings(groups: Mapping[str, Sequence[str]], flags: Mapping[str, str]) -> list[dict]:
    """Make a finding for each word with a flagged figure."""
    found = {word: [name for name in names if name in flags] for word, names in groups.items()}
    return [
        {
            "word": word,
            "sentence": "; ".join(flags[name] for name in names),
            "figures": [name if name in COLUMNS else f"{name}_z" for name in names],
        }
        for word, names in found.items()
        if names
    ]


def _verdict(
    name: str,
    figures: Mapping[str, Figure],
    expected: Mapping[str, float],
    findings: Sequence[dict[str, Any]],
) -> Verdict:
    json_of = lambda figure: {
        key: int(part) if key == "count" else float(part) for key, part in figure._asdict().items()
    }
    return {
        "judge": name,
        "figures": {key: json_of(figures[key]) for key in COLUMNS if key in figures},
        "expected": {key: float(value) for key, value in expected.items()},
        "findings": list(findings),
    }


def find(tokenizer: Tokenizer, length: int, law: str) -> ExactJudge | None:
    """Find the exact judge for a task; None if the truth is unknown.

    Args:
      tokenizer: of the samples.
      length: tokens per sample.
      law: path of a law.npz, "" for none.

    Raises:
      ValueError: the law can't be read or has another vocabulary, or the block length doesn't match
        the tokenizer's grid.
    """
    if not law:
        size = sudoku.recognise(tokenizer.vocabulary, length)
        return None if size is None else SudokuJudge(size)
    found = open_law(law)
    ids = {name: i for i, name in enumerate(found.tokens)}
    if tokenizer.vocabulary != ids:
        other = min(tokenizer.vocabulary.items() ^ ids.items(), key=lambda item: item[1])
        raise ValueError(
            f"eval.law: {law} is a law of {len(ids)} tokens, but the models have "
            f"{tokenizer.vocab_size} tokens of another vocabulary ({other[0]!r} differs); give the "
            "law of their training text, or omit it"
        )
    return LawJudge(found)


def open_law(path: str) -> Law:
    """Read a law.npz; ValueError, naming the config key, if that fails."""
    try:
        return hmm.load(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"eval.law: {error}") from None


# -------------------------------------------------------------------------------------- for reports


def judges(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the exact judges of rows."""
    return list(dict.fromkeys(row["exact"]["judge"] for row in rows if row.get("exact")))


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Return the figures that any of the rows has, in the order of `COLUMNS`."""
    known = {key for row in rows for key in (row.get("exact") or {}).get("figures", ())}
    return {key: column for key, column in COLUMNS.items() if key in known}


def figure(row: Mapping[str, Any], key: str) -> dict[str, float] | None:
    """Return a figure of a row, or None."""
    return ((row.get("exact") or {}).get("figures") or {}).get(key)


def ranked_by(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The key of `RANKED` that rows are ranked by, None where no exact judge has judged them."""
    known = columns(rows)
    return next((key for key in RANKED if key in known), None)


def show(estimate: Mapping[str, float] | None) -> str:
    """Format a figure, with three decimals below 10; "" for none."""
    if estimate is None or math.isnan(estimate["value"]):
        return ""
    number = estimate["value"]
    return f"{number:.3f}" if abs(number) < 10 else f"{number:,.1f}"


def describe(rows: Sequence[Mapping[str, Any]]) -> str:
    """Name the exact judges in a sentence; "" if there are none."""
    names = judges(rows)
    return f"Judged exactly, by {' and '.join(names)}." if names else ""
