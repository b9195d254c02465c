"""Judges that know the truth: Sudoku by its rules, a language by its law (`fsdfm_jax.exact`).

A model of Sudoku is recognised by its tokenizer and block; a language needs the law that its text
was sampled from, `eval.law`. The verdict on a row is JSON, `row["exact"]`:

    judge      "6x6 Sudoku"
    figures    key of `COLUMNS` -> value, low, high, count; without an interval both ends are nan
    expected   key -> what samples of the truth give, as many and as long
    findings   what shows that a figure is better than it should be: word, sentence, figures
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

# Raise it when a change of the code changes a figure.
_VERSION = 1
_FEWEST = 2  # samples of a language that are judged

Verdict = dict[str, Any]


class Column(NamedTuple):
    """How a figure is shown.

    Attributes:
      head: of its column.
      main: whether it stands in the short tables.
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
        """What its figures depend on, for stamps."""

    def judge(
        self, tokens_NL: np.ndarray, frozen_NL: np.ndarray, *, resamples: int
    ) -> Verdict | None:
        """The verdict on samples, see the module; None where it can't judge them.

        Args:
          tokens_NL: int [N, L].
          frozen_NL: bool [N, L], the positions that were given.
          resamples: of the bootstrap.
        """


class SudokuJudge:
    """Grids by the rules, and valid ones against uniform grids."""

    def __init__(self, size: Sudoku):
        self.name = f"{size.name} Sudoku"
        self._size = size

    def describe(self) -> dict[str, Any]:
        """See `ExactJudge`."""
        return {"kind": "sudoku", "size": self._size.name, "version": _VERSION}

    def judge(
        self, tokens_NL: np.ndarray, frozen_NL: np.ndarray, *, resamples: int
    ) -> Verdict | None:
        """See `ExactJudge`; a sample around given cells solves its puzzle if its grid is valid."""
        report = sudoku_judge.judge(self._size, tokens_NL, resamples=resamples)
        figures = report.figures | {
            f"{name}_z": Figure(test.z, math.nan, math.nan, report.figures["distinct"].count)
            for name, test in report.uniformity.items()
        }
        if frozen_NL.any():
            # What is given is never changed by a sampler, so that a valid grid is a solution.
            figures["solved"] = figures["valid"]
        groups = {"copies": ["distinct"], "not uniform": ["digits", "pairs"]}
        findings = _findings(groups, report.flags)
        return _verdict(self.name, figures, report.expected, findings)


class LawJudge:
    """Text by the law of its language."""

    def __init__(self, law: Law):
        self.name = f"the law {law.fingerprint[:8]}"
        self._law = law

    def describe(self) -> dict[str, Any]:
        """See `ExactJudge`."""
        return {"kind": "hmm", "law": self._law.fingerprint, "version": _VERSION}

    def judge(
        self, tokens_NL: np.ndarray, frozen_NL: np.ndarray, *, resamples: int
    ) -> Verdict | None:
        """See `ExactJudge`; None for samples around given text, which the law itself has written.

        Also for fewer than two samples, or ones shorter than the longest k-gram.
        """
        count, length = tokens_NL.shape
        if frozen_NL.any() or count < _FEWEST or length < max(hmm_judge.ORDERS):
            return None
        report = hmm_judge.judge(self._law, tokens_NL, resamples=resamples)
        expected = {name: mean for name, (mean, _) in report.law.items()}
        return _verdict(self.name, report.figures, expected, _exposed(report))


def _exposed(report: hmm_judge.Report) -> list[dict[str, Any]]:
    """What makes a likelihood look better than the samples are.

    A model that is merely worse than the law has a higher loss, which needs no remark.
    """
    above = lambda name: report.figures[name].value > report.law[name][0]
    groups = {"copies": ["distinct"]}
    if not ("nll" in report.flags and above("nll")):
        orders = hmm_judge.ORDERS
        groups["sharpened"] = ["nll"]
        groups["low entropy"] = [f"entropy_{k}" for k in orders if not above(f"entropy_{k}")]
        groups["k-grams"] = [f"kl_{k}" for k in orders if above(f"kl_{k}")]
    return _findings(groups, report.flags)


def _findings(groups: Mapping[str, Sequence[str]], flags: Mapping[str, str]) -> list[dict]:
    """A finding for each word of which a figure is flagged."""
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
    """The judge of a task whose truth is known, None for any other text.

    Args:
      tokenizer: of the samples.
      length: tokens of a sample.
      law: path of a law.npz, "" for none.

    Raises:
      ValueError: the law is of another vocabulary or can't be read, or blocks hold no grid of the
        tokenizer's size.
    """
    if not law:
        size = sudoku.recognise(tokenizer.vocabulary, length)
        return None if size is None else SudokuJudge(size)
    found = open_law(law)
    ids = {name: i for i, name in enumerate(found.tokens)}
    if tokenizer.vocabulary != ids:
        other = min(tokenizer.vocabulary.items() ^ ids.items(), key=lambda item: item[1])
        raise ValueError(
            f"eval.law: {law} is the law of {len(ids)} tokens, the models have "
            f"{tokenizer.vocab_size} of another vocabulary ({other[0]!r} differs); name the law of "
            "the text they were trained on, or leave it out"
        )
    return LawJudge(found)


def open_law(path: str) -> Law:
    """A law.npz; ValueError, naming the key, where there is none."""
    try:
        return hmm.load(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"eval.law: {error}") from None


# ------------------------------------------------------------------------------------ of the report


def judges(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of the exact judges of rows."""
    return list(dict.fromkeys(row["exact"]["judge"] for row in rows if row.get("exact")))


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """The figures that any of the rows has, in the order of `COLUMNS`."""
    known = {key for row in rows for key in (row.get("exact") or {}).get("figures", ())}
    return {key: column for key, column in COLUMNS.items() if key in known}


def figure(row: Mapping[str, Any], key: str) -> dict[str, float] | None:
    """A figure of a row, None where it has none."""
    return ((row.get("exact") or {}).get("figures") or {}).get(key)


def ranked_by(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The key of `RANKED` that rows are ranked by, None where no exact judge has judged them."""
    known = columns(rows)
    return next((key for key in RANKED if key in known), None)


def show(estimate: Mapping[str, float] | None) -> str:
    """A figure for people, with three decimals; "" for none."""
    if estimate is None or math.isnan(estimate["value"]):
        return ""
    number = estimate["value"]
    return f"{number:.3f}" if abs(number) < 10 else f"{number:,.1f}"


def describe(rows: Sequence[Mapping[str, Any]]) -> str:
    """Who judged exactly, in a sentence; "" if nobody did."""
    names = judges(rows)
    return f"Judged exactly, by {' and '.join(names)}." if names else ""
