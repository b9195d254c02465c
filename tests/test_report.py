"""The report: its files, findings about rows, the page as data."""

import base64
import copy
import csv
import hashlib
import html
import html.parser
import json
import math
import pathlib
import re

import numpy as np
import pytest

from fsdfm_jax.data import tokenizer
from fsdfm_jax.evaluate.report import page as page_lib
from fsdfm_jax.evaluate.report import pictures, reading
from fsdfm_jax.evaluate.report import write as report
from fsdfm_jax.inference import stream
from fsdfm_jax.inference.stream import Piece, Trajectory

L = 6
TOKENIZER = tokenizer.train_bpe(["the people of the united states </script><img>"] * 9, 280)
MASK = TOKENIZER.vocab_size
HOSTILE = "</script><img src=x onerror=alert(1)> \" ' &amp; $x_1$"
ORDER = ("perplexity_a", "perplexity_b", "perplexity_c", "nats_per_byte")
PICTURES = ("frontier.png", "steps.png", "time.png")
ROOT = pathlib.Path(__file__).parents[1]


def _estimate(value, spread=0.05):
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def _scores(perplexity):
    values = (perplexity, perplexity * 0.97, perplexity * 0.95, math.log(perplexity) / 4)
    estimates = {key: _estimate(value) for key, value in zip(ORDER, values, strict=True)}
    return estimates | {"tokens": 60, "skipped": 1}


def _stamp(model, judges):
    listed = [{"name": name, "sha256": sha256} for name, sha256 in judges.items()]
    sha256 = model and {"sha256": f"of {model}"}
    return {"samples": {"model": sha256}, "scoring": {"judges": listed}}


def _row(group, steps=None, *, kind="model", perplexity=50.0, bits=6.3, **changes):
    seed, temperature = changes.pop("seed", 0), changes.pop("temperature", 1.0)
    model = kind == "model"
    setting = f"{group}-{steps}-{temperature}"
    row = {
        "slug": f"{setting}-s{seed}",
        "setting": setting,
        "kind": kind,
        "group": group,
        "run": group if model else None,
        "stage": "distill" if model else None,
        "steps": steps,
        "jump": "cumulative" if model else None,
        "grid": "uniform" if model else None,
        "temperature": temperature if model else None,
        "top_p": 1.0 if model else None,
        **dict.fromkeys(("cooling", "look_ahead"), 0.0 if model else None),
        "seed": seed,
        "task": "unconditional",
        "num_samples": 5,
        "milliseconds_per_sample": 1.25 * steps if steps else None,
        "compile_seconds": 1.0 if steps else None,
        "figures": {
            "entropy_nats": _estimate(bits * math.log(2), 0.01),
            "entropy_bits": _estimate(bits, 0.01),
            "predictive_entropy_nats": _estimate(2.0) if model else None,
            "distinct_1": _estimate(0.6, 0.01),
            "distinct_2": _estimate(0.93, 0.01),
            "distinct_3": _estimate(0.98, 0.01),
            "self_bleu": _estimate(0.21, 0.01),
            "mauve": None,
            "bound_nats_per_token": None,
        },
        "judges": {"own": {"ids": _scores(perplexity), "text": _scores(perplexity * 1.1)}},
        "per_step": None,
        "notes": [],
        "weights": "ema" if model else None,
        "device": "1 x test",
        "protocol": _stamp(group if model else None, {"own": "0a"}),
    }
    if model:
        times = [k / steps for k in range(steps)]
        entropies = [5.0 * (1 - t) for t in times]
        row["per_step"] = {"times": times, "entropy_nats": entropies, "changed": [0.5] * steps}
    row["figures"] |= changes.pop("figures", {})
    return row | changes


REAL = _row("held-out text", kind="real", perplexity=30.0)
SHUFFLED = _row("shuffled", kind="control", perplexity=2000.0, setting="control-shuffled")
COLLAPSED = _row(
    "one phrase",
    kind="control",
    perplexity=2.5,
    bits=4.2,
    figures={"distinct_2": _estimate(0.1), "self_bleu": _estimate(1.0)},
)
GOOD = _row("distill", 8, perplexity=120.0)
ROWS = [REAL, SHUFFLED, COLLAPSED, _row("distill", 2, perplexity=900.0), GOOD]


def _tokens(text, rows=1):
    return np.tile(np.resize(TOKENIZER.encode(text), L), (rows, 1))


def _write(path, rows=None, text="the people of", trajectories=None, **changes):
    rows = ROWS if rows is None else rows
    samples = {row["slug"]: _tokens(text, 5) for row in rows}
    header = {"device": "1 x test", "code_version": "v", "parameters": {"distill": 1_300_000}}
    header |= {"run": "mine", "data": {"spec": {"corpus": "letters"}}, "date": "2026-03-01"}
    arguments = {
        "rows": rows,
        "pooled": rows,
        "frozen": {},
        "samples": samples,
        "trajectories": trajectories or {},
        "tokenizer": TOKENIZER,
        "header": header,
    }
    report.write(path, **(arguments | changes))
    return path


def _lines(rows):
    """The lines of a table without the text above it."""
    lines = report.table(rows).splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("model  ")) :]


def _page(path, rows=None, **changes):
    return (_write(path, rows, **changes) / "report.html").read_text()


@pytest.fixture
def no_png(monkeypatch):
    """For tests of the page: PNGs take half of a report's time."""
    monkeypatch.setattr(pictures, "png", lambda figure: b"")


@pytest.fixture
def no_pictures(no_png, monkeypatch):
    """For other tests: plots take nearly all of a report's time."""
    drawn = dict.fromkeys(pictures.PICTURES, lambda rows, exposed: None)
    monkeypatch.setattr(pictures, "PICTURES", drawn)
    monkeypatch.setattr(pictures, "svg", lambda figure, name: "<svg></svg>")


def _trajectory(text="the people of the united states", masked=True):
    end_L = _tokens(text)[0]
    start_L = np.full(L, MASK) if masked else end_L[::-1].copy()
    start_L[0] = end_L[0]
    middle_L = np.where(np.arange(L) < 3, end_L, start_L)
    tokens_TL = np.stack([start_L, middle_L, end_L])
    return Trajectory(tokens_TL, (0, 1, 4), (0.0, 0.25, 1.0), np.arange(L) == 0)


# ------------------------------------------------------------------------------------ trajectories
def test_frames_show_exactly_what_changed():
    one = _trajectory()
    cut = stream.frames(one, MASK, TOKENIZER)
    end_L = one.tokens_TL[-1]
    word = lambda part: TOKENIZER.decode(end_L[part].tolist())
    first = Piece(word(slice(0, 1)), "given")
    assert cut[0] == [first, Piece(stream.MASKED * 5, "masked")]
    assert cut[1] == [
        first,
        Piece(word(slice(1, 3)), "changed"),
        Piece(stream.MASKED * 3, "masked"),
    ]
    assert cut[2] == [
        first,
        Piece(word(slice(1, 3)), "kept"),
        Piece(word(slice(3, 6)), "changed"),
    ]
    assert "".join(piece.text for piece in cut[2]) == TOKENIZER.decode(end_L.tolist())


def test_lines_of_a_trajectory_survive_a_log():
    lines = stream.text_lines(_trajectory(), MASK, TOKENIZER)
    assert lines[0] == "step 0 of 4, t=0, noise"
    assert lines[2] == "step 1 of 4, t=0.25, 2 tokens changed"
    assert lines[4] == "step 4 of 4, t=1, 3 tokens differ from step 1"
    plain = lines[5].replace("{+", "").replace("+}", "")
    end = TOKENIZER.decode(_trajectory().tokens_TL[-1].tolist())
    assert plain == "  " + end
    changed = re.findall(r"\{\+(.*?)\+\}", lines[5])
    assert changed == [TOKENIZER.decode(_trajectory().tokens_TL[-1, 3:].tolist())]
    assert all(line.isprintable() for line in lines)


def test_a_long_trajectory_is_thinned_evenly():
    end_L = np.arange(65)
    tokens_TL = np.where(end_L < np.arange(65)[:, None], end_L, 999)
    tokens_TL[20:40, 64] = 7  # changes and changes back between two frames
    whole = Trajectory(tokens_TL, tuple(range(65)), tuple(np.arange(65) / 64), end_L < 0)
    one = stream.thin(whole, 3)
    assert (one.steps, one.times) == ((0, 32, 64), (0.0, 0.5, 1.0))
    np.testing.assert_array_equal(one.tokens_TL, tokens_TL[[0, 32, 64]])
    assert stream.captions(one) == [
        "step 0 of 64, t=0, noise",
        "step 32 of 64, t=0.5, 33 tokens differ from the noise",
        "step 64 of 64, t=1, 33 tokens differ from step 32",
    ]
    assert stream.thin(whole, 65) is whole
    assert len(set(stream.thin(whole, 17).steps)) == 17


def test_a_trajectory_of_other_lengths_is_refused():
    with pytest.raises(ValueError, match="T steps, T times"):
        stream.frames(_trajectory()._replace(steps=(0, 4)), MASK, TOKENIZER)


# ------------------------------------------------------------------------------------------- files
def test_files_parse(tmp_path):
    paths = {GOOD["slug"]: [_trajectory()]}
    folder = _write(tmp_path / "report", trajectories=paths, mask_id=MASK)
    names = [*PICTURES, "report.html", "results.csv", "results.json", "samples.txt"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "trajectories.txt"])
    results = json.loads((folder / "results.json").read_text())
    assert results["device"] == "1 x test"
    assert results["rows"] == json.loads(json.dumps(ROWS))
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    text = (folder / "samples.txt").read_text()
    assert text.count("[1] ") == len(ROWS)
    assert text.count(TOKENIZER.decode(_tokens("the people of")[0].tolist())) >= 3 * len(ROWS)
    assert "distill, 8 steps, seed 0" in text
    assert "step 4 of 4, t=1" in (folder / "trajectories.txt").read_text()


@pytest.mark.usefixtures("no_pictures")
def test_csv_is_flat(tmp_path):
    folder = _write(tmp_path)
    with open(folder / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    columns = list(lines[0])
    assert columns[:4] == ["slug", "setting", "kind", "group"]
    assert {"weights", "top_p", "num_samples", "device"} <= set(columns[:21])
    ends = ("", "_low", "_high", "_count")
    assert columns[21:25] == [f"entropy_nats{end}" for end in ends]
    assert {f"{form}_{key}_low" for form in ("ids", "text") for key in ORDER} <= set(columns)
    assert columns[-2:] == ["notes", "flags"]
    assert [line["group"] for line in lines] == [row["group"] for row in ROWS]
    assert [line["steps"] for line in lines] == ["", "", "", "2", "8"]
    good = lines[-1]
    assert (good["judge"], good["judge_tells_text"]) == ("own", "True")
    assert float(good["text_perplexity_b"]) == pytest.approx(120 * 1.1 * 0.97)
    assert float(good["ids_perplexity_a_low"]) == pytest.approx(120 * 0.95)
    assert (good["ids_tokens"], good["mauve"], good["mauve_high"]) == ("60", "", "")
    assert good["flags"] == ""
    assert "low perplexity by repetition" in lines[2]["flags"]


@pytest.mark.usefixtures("no_pictures")
def test_csv_is_tidy_and_described(tmp_path):
    """A line per point and judge with a unique identity; the docs list all columns."""
    rows = [
        row | {"judges": row["judges"] | {"other": {"ids": None, "text": _scores(9.0)}}}
        for seed in (1, 2)
        for row in (REAL, *(_row(name, 4, seed=seed) for name in ("distill", "refine")))
    ][:1] + [
        _row(name, steps, temperature=T, seed=seed)
        for name in ("distill", "refine")
        for steps in (1, 8)
        for T in (0.8, 1.0)
        for seed in (1, 2)
    ]
    rows[1]["judges"]["other"] = {"ids": None, "text": _scores(9.0)}
    folder = _write(tmp_path, rows, pooled=rows[:1] + rows[1::2])
    with open(folder / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["judge"] for line in lines[:4]] == ["own", "other"] * 2
    named = {
        tuple(line[key] for key in ("group", "steps", "temperature", "seed", "task", "judge"))
        for line in lines
    }
    assert len(named) == len(lines) == 2 * len(rows)
    ends = "|".join(end for end in ("_low", "_high", "_count"))
    columns = {re.sub(f"({ends})$", "", name) for name in lines[0]}
    document = (ROOT / "docs" / "concepts" / "evaluation.md").read_text()
    described = document.split("## results.csv")[1]
    names = set(re.findall(r"`(\w+)`", described.split("\n## ")[0]))
    assert columns <= names, columns - names


def test_equal_rows_give_equal_bytes(tmp_path):
    paths = {GOOD["slug"]: [_trajectory()]}
    first = _write(tmp_path / "a", trajectories=paths, mask_id=MASK)
    second = _write(tmp_path / "b", copy.deepcopy(ROWS), trajectories=paths, mask_id=MASK)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def _with_nan(row):
    nan = {"value": math.nan, "low": math.nan, "high": math.nan}
    scores = {key: nan for key in ORDER} | {"tokens": 0, "skipped": 0}
    judges = {"own": {"ids": None, "text": scores}}
    return row | {"figures": {key: nan for key in row["figures"]}, "judges": judges}


ODD = {
    "nothing": [],
    "real text only": [REAL],
    "no real text": [SHUFFLED, GOOD],
    "no judge": [row | {"judges": {}} for row in ROWS],
    "nan": [REAL, _with_nan(GOOD)],
    "all nan": [_with_nan(row) for row in ROWS],
    "infinite": [REAL, _row("distill", 1, perplexity=math.inf)],
    "another task": [REAL, GOOD | {"task": "prefix:512"}],
    "no time": [REAL, GOOD | {"milliseconds_per_sample": None, "per_step": None}],
}


@pytest.mark.usefixtures("no_png")
@pytest.mark.parametrize("rows", list(ODD.values()), ids=list(ODD))
def test_odd_rows_give_a_report(tmp_path, rows):
    folder = _write(tmp_path, rows, samples={})
    for table in re.findall(r"<tbody>.*?</tbody>", (folder / "report.html").read_text(), re.DOTALL):
        assert table.count("<tr") <= len(rows)
    assert "None were recorded." in (folder / "trajectories.txt").read_text()
    assert len(_lines(rows)) == 1 + len(rows)


def test_a_figure_that_is_nan_is_seen():
    rows = [REAL, _with_nan(GOOD)]
    assert _lines(rows)[-1].split()[2:4] == ["nan", "nan"]
    assert report.flags(rows[1], REAL) == ["its samples have no figures"]


@pytest.mark.usefixtures("no_pictures")
def test_a_sweep_is_one_row_a_setting(tmp_path):
    rows = [REAL] + [
        _row("distill", steps, perplexity=100.0 + 900 / steps, temperature=T, seed=seed)
        for steps in (1, 2, 4, 8)
        for T in (0.8, 1.0, 1.2)
        for seed in (1, 2)
    ]
    pooled = [row | {"num_seeds": 2, "seeds": [1, 2]} for row in rows[1::2]]
    page = _page(tmp_path, rows, pooled=[REAL, *pooled])
    body = re.search(r'id="table".*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    assert body.count("<tr") == 1 + 4 * 3
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)


# ------------------------------------------------------------------------------------- exposure
def test_flags_expose_controls_and_spare_a_good_row():
    assert report.flags(REAL, REAL) == []
    assert report.flags(GOOD, REAL) == []
    assert report.flags(SHUFFLED, REAL) == [
        "a naive control, not a model",
        "perplexity 67 times that of real text at its entropy: like real text with shuffled tokens",
    ]
    assert report.flags(COLLAPSED, REAL) == [
        "a naive control, not a model",
        "low perplexity by repetition: entropy 2.1 bits below real text, distinct-2 0.10 "
        "against 0.93, self-BLEU 1.00 against 0.21",
        "perplexity 2.50 below the 30.00 of real text: easier to predict than human text",
    ]


def test_flags_expose_a_model_as_they_do_a_control():
    for control in (SHUFFLED, COLLAPSED):
        assert report.flags(control | {"kind": "model"}, REAL) == report.flags(control, REAL)[1:]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"bits": 5.9}, None),  # within what sound models differ
        ({"bits": 5.5}, "repeats"),
        ({"bits": 7.5, "perplexity": 3000.0}, "noise"),
        ({"perplexity": 29.0}, None),  # the intervals overlap
        ({"perplexity": 20.0}, "too easy"),
        ({"perplexity": 800.0}, None),
        ({"perplexity": 1000.0}, "unordered"),
        ({"figures": {"distinct_3": _estimate(0.7, 0.01)}}, "repeats"),
        ({"figures": {"distinct_3": _estimate(0.7, 0.5)}}, None),
        ({"figures": {"distinct_1": _estimate(0.55, 0.01)}}, None),
        ({"figures": {"self_bleu": _estimate(0.3, 0.01)}}, None),
        ({"figures": {"self_bleu": _estimate(0.4, 0.01)}}, "repeats"),
    ],
)
def test_where_flags_begin(changes, word):
    found = reading.findings(_row("distill", 8, **changes), REAL)
    assert [finding.word for finding in found] == ([word] if word else [])


def test_flags_compare_like_with_like():
    other = COLLAPSED | {"task": "prefix:512"}
    rows = [REAL, other]
    assert report.flags(other, reading.real_row(rows, other["task"])) == [
        "a naive control, not a model"
    ]
    assert "control, repeats" not in report.table(rows)
    assert "control, repeats" in report.table([REAL, COLLAPSED])


def _words(row, real=REAL):
    return [finding.word for finding in reading.findings(row, real)]


def _counts(row, **counts):
    """The row with counts of samples in its figures and its judge's scores."""
    row = copy.deepcopy(row)
    for key, count in counts.items():
        place = row["judges"]["own"]["ids"] if key in ORDER else row["figures"]
        place[key]["count"] = count
    return row


def test_samples_that_are_left_out_are_seen():
    row = _counts(GOOD, perplexity_a=3, perplexity_c=4, entropy_bits=5, distinct_3=4)
    (found,) = reading.findings(row, REAL)
    sentence = "2 of 5 samples had no text to score; 1 of 5 samples have no distinct-3"
    assert found == ("left out", sentence, ("distinct_3", "perplexity_a", "perplexity_c"))
    assert _words(_counts(GOOD, perplexity_a=5, self_bleu=2)) == []
    assert _words(_counts(GOOD, perplexity_a=10) | {"num_seeds": 2}) == []
    assert _words(_counts(GOOD, perplexity_a=9) | {"num_seeds": 2}) == ["left out"]
    # Where stretches are too short for trigrams real text has none either.
    assert _words(_counts(GOOD, distinct_3=0), _counts(REAL, distinct_3=0)) == []
    assert _words(_counts(GOOD, distinct_3=0), _counts(REAL, distinct_3=1)) == ["left out"]
    assert _words(_counts(GOOD, distinct_3=4), None) == ["left out"]


@pytest.mark.usefixtures("no_pictures")
def test_a_cell_says_how_many_samples_it_has(tmp_path):
    rows = [_counts(REAL, perplexity_a=5), _counts(GOOD, perplexity_a=3)]
    page = (_write(tmp_path, rows) / "report.html").read_text()
    assert page.count("<small>3 of 5 samples</small>") == 2  # perplexity, and among all columns
    assert "5 of 5 samples" not in page
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["ids_perplexity_a_count"] for line in lines] == ["5", "3"]
    assert lines[0]["ids_perplexity_b_count"] == ""


def _skipping(row, skipped):
    row = copy.deepcopy(row)
    row["judges"]["words"] = {"ids": None, "text": _scores(40.0) | {"skipped": skipped}}
    return row


def test_words_that_a_judge_can_not_read_are_seen():
    real = _skipping(REAL, 4)  # and 60 that it can: 6%
    assert _words(_skipping(GOOD, 10), real) == []
    (found,) = reading.findings(_skipping(GOOD, 20), real)
    assert found.word == "skipped"
    assert found.sentence == (
        "words could not score 25% of it, 6% of real text: a perplexity of the rest"
    )
    assert found.columns == ()  # the main judge read it
    only = lambda row: row | {"judges": {"words": row["judges"]["words"]}}
    (found,) = reading.findings(only(_skipping(GOOD, 20)), only(real))
    assert found.columns == ("perplexity_a", "perplexity_b")


AUTOREGRESSIVE = _row("autoregressive", 128, perplexity=35.0, stage="autoregressive")
AUTOREGRESSIVE["protocol"] = _stamp("autoregressive", {"own": "of autoregressive", "other": "7f"})


def test_a_model_that_judges_itself_is_seen():
    assert _words(AUTOREGRESSIVE) == ["own judge"]
    pooled = {"num_seeds": 2, "protocol": dict.fromkeys("ab", AUTOREGRESSIVE["protocol"])}
    assert _words(AUTOREGRESSIVE | pooled) == ["own judge"]
    assert _words(AUTOREGRESSIVE | {"protocol": _stamp("autoregressive", {"own": "0a"})}) == []
    # As a further judge it spoils no figure but its own.
    judges = {"other": AUTOREGRESSIVE["judges"]["own"], **AUTOREGRESSIVE["judges"]}
    assert _words(AUTOREGRESSIVE | {"judges": judges}) == []


def _key(page):
    return html.unescape(re.search(r'<section id="key">(.*?)</section>', page, re.DOTALL)[1])


@pytest.mark.usefixtures("no_pictures")
def test_a_model_that_judges_itself_heads_nothing(tmp_path):
    rows = [*ROWS, AUTOREGRESSIVE]
    page = _page(tmp_path / "one", rows)
    assert "<h3>Left to right</h3>" not in _key(page)
    assert "the latter's perplexity is not compared because it is its own judge" in _key(page)
    assert '<span class="flag">! own judge</span>' in page
    rows = [copy.deepcopy(row) for row in rows]
    for i, row in enumerate(rows):
        perplexity = 8000.0 if row["group"] == "shuffled" else 400.0 + i
        row["judges"]["other"] = {"ids": None, "text": _scores(perplexity)}
    page = _page(tmp_path / "two", rows)
    card = _key(page).split("<h3>Left to right</h3>")[1].split("</div>")[0]
    assert "by other, since the main judge is this model" in card
    assert '<p class="big">405 ' in card
    assert "own judge" not in card
    assert "perplexity 404 against 405 by other at the same entropy" in _key(page)


@pytest.mark.usefixtures("no_pictures")
def test_the_claim_is_of_the_base_model(tmp_path):
    base = _row("pretrain", 1024, perplexity=80.0, stage="pretrain", bits=6.35)
    long = _row("distill", 2048, perplexity=70.0)
    cool = _row("pretrain", 1024, perplexity=60.0, stage="pretrain", bits=5.9, temperature=0.8)
    page = _page(tmp_path / "a", [*ROWS, cool, base, long])
    claim = "8 network calls instead of 1,024: 128 times the speed; perplexity 120 against 80.00"
    assert f"{claim} at the same entropy.</p>" in _key(page)
    base = base | {"device": "1 x other"}
    page = _page(tmp_path / "b", [*ROWS, base])
    assert "instead of 1,024, timed on different devices; " in _key(page)
    assert "times the speed" not in page
    assert "several: compare times only within one" in page.split('<section id="time">')[1]
    assert _cells(page, "pretrain", "sampler") == ["1 x other"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("bits", "spread", "same"),
    [(6.35, 0.01, True), (6.35, 0.001, False), (6.6, 0.05, False), (6.35, math.nan, False)],
    ids=["alike", "intervals apart", "values apart", "unknown interval"],
)
def test_the_same_entropy_is_one_that_can_not_be_told_apart(tmp_path, bits, spread, same):
    best, base = (
        _row(*name, bits=entropy, figures={"entropy_bits": _estimate(entropy, spread)}, **more)
        for name, entropy, more in (
            (("distill", 8), 6.3, {"perplexity": 120.0}),
            (("pretrain", 64), bits, {"perplexity": 80.0, "stage": "pretrain"}),
        )
    )
    page = _key(_page(tmp_path, [REAL, SHUFFLED, best, base]))
    assert ("at the same entropy" in page) == same
    assert (f"entropy 6.30 against {bits:.2f} bits" in page) == (not same)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("times", "told"),
    [
        ((1.0, 64.0), "4 network calls instead of 64: 64 times the speed"),
        ((1.0, 1.02), "4 network calls instead of 64, but no faster: 1 against 1.02 ms per sample"),
        ((2.0, 1.0), "4 network calls instead of 64, but no faster: 2 against 1 ms per sample"),
        ((None, 1.0), "4 network calls instead of 64; perplexity"),
    ],
)
def test_a_speed_is_claimed_where_there_is_one(tmp_path, times, told):
    few = _row("distill", 4) | {"milliseconds_per_sample": times[0]}
    many = _row("pretrain", 64, stage="pretrain") | {"milliseconds_per_sample": times[1]}
    page = _key(_page(tmp_path, [REAL, SHUFFLED, few, many]))
    assert told in page
    assert "1 times" not in page


def _table(page):
    """Heads of the main table and its rows: name, flags and cells by head."""
    part = re.search(r'<section id="table">.*?</table>', page, re.DOTALL)[0]
    heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', part)
    rows = []
    for line in re.findall(r"<tr class=.*?</tr>", part, re.DOTALL):
        cells = re.findall(r"<td[^>]*>(.*?)</td>", line, re.DOTALL)
        name = re.search(r'<th scope="row">(.*?)</th>', line)[1]
        rows.append(dict(zip(heads, [name, *cells], strict=True)))
    more = re.findall(r'<th scope="col" class="[^"]* more">(.*?)</th>', part)
    return [head for head in heads if head not in more], rows


def _cells(page, model, head):
    return [row[head] for row in _table(page)[1] if row["model"] == model]


@pytest.mark.usefixtures("no_pictures")
def test_flagged_are_the_rows_that_are_marked(tmp_path):
    ngrams = _row("n-gram control", kind="control", perplexity=500.0, setting="control-ngram")
    rows = [*ROWS, ngrams, AUTOREGRESSIVE, _row("distill", 1, perplexity=700.0)]
    page = _page(tmp_path, rows)
    marked = [row["model"] for row in _table(page)[1] if "! " in row["flags"]]
    assert len(marked) == 6
    assert f'<p class="big">{len(marked)} <span>of {len(rows)} rows</span>' in _key(page)
    listed = re.search(r'<details id="remarks".*?</details>', page, re.DOTALL)[0]
    assert listed.count("<li>") == len(marked)
    assert sum("! " in line for line in _lines(rows)) == len(marked)


# ----------------------------------------------------------------------------------- the judge
def _blind(factor, spread=0.05):
    """Rows by a judge that gives shuffled text `factor` times real text's perplexity."""
    rows = copy.deepcopy([REAL, SHUFFLED, COLLAPSED, GOOD, _row("distill", 2, perplexity=5e4)])
    scores = {"ids": {key: _estimate(30.0 * factor, spread) for key in ORDER}, "text": None}
    rows[1]["judges"]["own"] = scores
    return rows


SENTENCE = "own can't tell text from shuffled text: held-out text has perplexity 30.00, interval "


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("factor", "spread", "sound"),
    [
        (70.0, 0.05, True),
        (1.3, 0.05, True),
        (1.05, 0.05, False),
        (1.3, 0.3, False),
        (0.5, 0.05, False),
    ],
)
def test_a_judge_that_takes_shuffled_text_for_text_ranks_nothing(tmp_path, factor, spread, sound):
    rows = _blind(factor, spread)
    assert reading.tells_text(rows, "own") is sound
    page, terminal = _page(tmp_path, rows), report.table(rows).replace("\n", " ")
    found = reading.all_findings(rows)
    assert (SENTENCE in _key(page)) == (SENTENCE in terminal) == (not sound)
    for text in (_key(page), terminal):
        assert ("own tells held-out text (30.00, interval 28.5–31.5) from" in text) == sound
        assert ("Its perplexities are meaningless; nothing is ranked or flagged" in text) != sound
    assert ("! " in terminal) == any(found.values()) == ('class="flag"' in page) == sound
    assert (
        ("Best of few steps" in page) == (reading.best_few_step(rows, found) is not None) == sound
    )
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["judge_tells_text"] for line in lines} == {str(sound)}
    assert any(line["flags"] for line in lines) == sound
    assert ('<table class="void">' in page) != sound
    assert ("<h3>Flagged</h3>" in page) == sound == ("<h3>Real text</h3>" in page)
    assert ("No row is flagged: there is no usable judge" in page) != sound
    assert page.count("these heights are meaningless") == 3 * (not sound)


@pytest.mark.usefixtures("no_pictures")
def test_a_further_judge_that_is_blind_is_compared_by_nowhere(tmp_path):
    rows = [copy.deepcopy(row) for row in (*ROWS, AUTOREGRESSIVE)]
    for row in rows:
        row["judges"]["other"] = {"ids": None, "text": _scores(400.0)}
    page = _key(_page(tmp_path, rows))
    assert "own tells held-out text" in page
    assert "other can't tell text from shuffled text" in page
    assert "by other" not in page


def test_a_judge_is_checked_where_there_is_something_to_check_it_by():
    for rows in ([REAL, GOOD], [SHUFFLED, GOOD], [REAL, _with_nan(SHUFFLED), GOOD]):
        assert reading.tells_text(rows, "own") is None
        assert "was not checked" in report.table(rows)
        assert reading.best_few_step(rows, reading.all_findings(rows)) is GOOD


@pytest.mark.usefixtures("no_pictures")
def test_cells_sort_as_numbers(tmp_path):
    odd = ("inf", "-inf", "nan")
    rows = [REAL, *(_row(name, 4, perplexity=50.0) for name in odd)]
    for row in rows[1:]:
        row["figures"]["mauve"] = {"value": float(row["group"])}
    page = _page(tmp_path, rows)
    for name, key in zip(odd, ("Infinity", "-Infinity", ""), strict=True):
        assert f'<td class="n more" data-v="{key}">{name}</td>' in page
    numbers = re.findall(r'<td class="n[^"]*" data-v="([^"]*)"', page)
    assert all(re.fullmatch(r"|-?Infinity|-?\d[\d.]*(e[-+]\d+)?", n) for n in numbers)


@pytest.mark.parametrize(
    ("kind", "perplexity", "words"),
    [
        ("model", 900.0, ["n-grams"]),
        ("model", 500.0, ["n-grams"]),
        ("model", 499.0, []),  # better, if not by much
        ("model", 200.0, []),
        ("control", 900.0, ["control"]),
    ],
)
def test_models_that_are_no_better_than_ngrams(kind, perplexity, words):
    ngrams = _row("n-gram control", kind="control", perplexity=500.0, setting="control-ngram")
    elsewhere = ngrams | {"task": "infill:1x4"}
    row = _row("distill", 8, kind=kind, perplexity=perplexity)
    rows = [REAL, elsewhere, ngrams, row]
    assert reading.control_row(rows, "ngram", row["task"]) is ngrams
    assert reading.control_row([REAL, elsewhere], "ngram", row["task"]) is None
    found = reading.findings(row, REAL, ngrams)
    assert [finding.word for finding in found] == words
    if words == ["n-grams"]:
        assert found[0].sentence == (
            f"perplexity {perplexity:.0f}, n-grams 500: no better than counts of the training text "
            "without a network"
        )
    if kind == "model":
        assert [f.word for f in reading.findings(row, REAL)] == []
        # Weak as it is, it is the best there is.
        known = {r["slug"]: reading.findings(r, REAL, ngrams) for r in rows}
        assert reading.best_few_step(rows, known) is row
    assert ("! n-grams" in report.table(rows)) == (words == ["n-grams"])


def test_columns_of_a_finding_are_those_it_rests_on():
    by_word = {finding.word: finding for finding in reading.findings(COLLAPSED, REAL)}
    assert by_word["repeats"].columns == ("entropy_bits", "distinct_2", "self_bleu")
    assert by_word["too easy"].columns == ("perplexity_a",)


def test_the_best_of_few_steps_is_at_the_entropy_of_text():
    cool = _row("distill", 8, perplexity=60.0, bits=5.9, temperature=0.8)
    long = _row("distill", 512, perplexity=40.0)
    alike = _row("alike", 8, perplexity=50.0, figures={"self_bleu": _estimate(0.9)})
    rows = [REAL, COLLAPSED | {"kind": "model", "steps": 1}, alike, cool, GOOD, long]
    known = {row["slug"]: reading.findings(row, REAL) for row in rows}
    assert not known[cool["slug"]]
    assert reading.best_few_step(rows, known) is GOOD
    assert reading.best_few_step([REAL, cool], known) is cool
    assert reading.best_few_step([REAL, long], known) is None


# ------------------------------------------------------------------------------------------- table
def test_table_has_every_row_aligned():
    lines = _lines(ROWS)
    assert len(lines) == 1 + len(ROWS)
    heads = ["model", "steps", "perplexity", "entropy", "distinct-2", "ms/sample", "flags"]
    assert lines[0].split() == heads
    assert lines[1].split()[-1] == "-"  # real text costs nothing and has no flag
    assert lines[3].endswith("! control, repeats, too easy")
    assert lines[-1].split() == ["distill", "8", "120", "6.30", "0.93", "10.00"]
    ends = [line.index(cell) + len(cell) for line, cell in zip(lines, heads[2:3], strict=False)]
    assert all(line[: ends[0]].rstrip() == line[: ends[0]] for line in lines)


def test_table_fits_a_terminal():
    named = {"run": "pretrain with a very long name", "jump": "dispersed", "grid": "power:0.7"}
    long = _row("long", 1024, perplexity=123456.0, bits=4.0) | named | {"look_ahead": 0.5}
    rows = [*ROWS, long, long | {"slug": "b", "temperature": 0.8, "num_seeds": 3}]
    lines = report.table(rows).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(_lines(rows)[0].split()) == 8
    text = " ".join(" ".join(_lines(rows)).split())
    for part in ("dispersed,", "power:0.7,", "look-ahead 0.5", "T=0.8", "3 seeds", "! repeats"):
        assert part in text  # long cells take further lines; nothing is cut
    assert "…" not in text


def test_names_are_no_markup():
    hostile = GOOD | {"run": "[red]x[/red] :smile: \x1b[31m"}
    assert "[red]x[/red] :smile: \\x1b[31m" in report.table([REAL, hostile])


def test_a_table_says_what_is_the_same():
    other = {"slug": "b", "weights": "student", "grid": "cosine", "top_p": 0.9, "jump": "euler"}
    rows = [*ROWS, GOOD | other]
    text = report.table(rows)
    assert "Common to all models: temperature 1, cooling 0, look-ahead 0, task" in text
    lines = _lines(rows)
    assert lines[0].split()[2] == "sampler"
    cells = [line.split() for line in lines]
    assert cells[1][2] == "30.00"  # real text has no sampler
    assert [line[2] for line in cells if line[0] == "distill"] == ["published"] * 2 + ["euler,"]
    named = " ".join(" ".join(line) for line in cells[-3:])
    assert named.replace(" 120 6.30 0.93 10.00", "") == (
        "distill 8 euler, cosine, top-p 0.9, student"
    )
    assert "device other" in report.table([REAL, GOOD | {"device": "other"}])
    rows = [REAL, GOOD, GOOD | {"slug": "b", "device": "other"}]
    assert _lines(rows)[-1].split()[2] == "other"
    assert report.table([REAL | {"judges": {}}]).startswith("There was no judge")


def test_a_sampler_is_called_published_where_it_is():
    annealed = {"jump": "dispersed", "grid": "power:0.7", "cooling": 0.7, "look_ahead": 0.5}
    rows = [GOOD | {"slug": "a"}, GOOD | annealed | {"slug": "b"}]
    told = "dispersed, power:0.7, cooling 0.7, look-ahead 0.5"
    assert reading.samplers(rows) == {"a": "published", "b": told}
    rows = [row | {"cooling": 0.7} for row in rows]  # now none of them is
    assert reading.samplers(rows) == {
        "a": "cumulative, uniform, look-ahead 0",
        "b": "dispersed, power:0.7, look-ahead 0.5",
    }
    cached = [AUTOREGRESSIVE | {"slug": name, "memory": name} for name in ("cache", "none")]
    assert list(reading.samplers(cached).values()) == ["", "no cache"]
    assert list(reading.samplers(rows[:1]).values()) == [""]


# -------------------------------------------------------------------------------------------- page
class _Parser(html.parser.HTMLParser):
    """All elements with the names of their attributes, and all text by element."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.attributes, self.texts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def _without_pictures(text):
    return re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)


def _hostile(text):
    rows = copy.deepcopy(ROWS)
    for row in rows:
        row["group"] = f"{row['group']}{text}"
        row["judges"] = {f"own{text}": row["judges"]["own"]}
        row["notes"] = [f"note{text}"]
        row["run"] = row["run"] and f"run{text}"
        row["task"] = f"task{text}"
        row["protocol"] = {f"key{text}": text}
    return rows


@pytest.mark.usefixtures("no_png")
def test_hostile_data_is_text_only(tmp_path):
    plain, hostile = "made", HOSTILE + "\x1b\u2028\u202e\x00"
    pages = []
    for i, text in enumerate((plain, hostile)):
        rows = _hostile(text)
        words = ("xyzabc", "xyz<b>")[i]  # a token a letter: "<b>" is one piece of the last frame
        paths = {rows[-1]["slug"]: [_trajectory(words, masked=False)]}
        header = {"device": text, "code_version": text, f"x{text}": text, "run": text, "date": text}
        header |= {"data": {"spec": {"corpus": text}}, "parameters": {text: 5}}
        _write(tmp_path / str(i), rows, text=words, trajectories=paths, header=header)
        pages.append((tmp_path / str(i) / "report.html").read_text())
    harmless, harmful = (_Parser(_without_pictures(page)) for page in pages)
    assert harmful.elements == harmless.elements
    seen = "".join(harmful.texts)
    assert f"distill{HOSTILE}" in seen  # whole, as text
    assert f"run{HOSTILE}" in seen
    assert html.unescape(re.search("<title>(.*?)</title>", pages[1])[1]).count("<img src=x") == 3
    # In the pictures too: elements of matplotlib's only, and nothing that acts.
    everything = _Parser(pages[1])
    tags = {tag for tag, _ in everything.elements}
    assert not tags & {"img", "iframe", "object", "foreignobject", "image", "base", "link"}
    assert not [name for name, _ in everything.attributes if name.startswith("on")]
    assert pages[1].count("</script>") == pages[0].count("</script>") == 1
    assert not set(pages[1]) & set("\x00\x1b")


def _frames(page):
    """Of each trajectory of the page its title and its frames: a caption and the text's HTML."""
    player = page.split('id="player"')[1].split("</section>")[0]
    frame = (
        r'<div class="frame"[^>]*><p class="caption">(.*?)</p>\s*<p class="sample">(.*?)</p></div>'
    )
    return [
        (html.unescape(re.search("<h3>(.*?)</h3>", part)[1]), re.findall(frame, part, re.DOTALL))
        for part in player.split('<div class="path"')[1:]
    ]


_TAGS = {"changed": "mark", "given": "b", "masked": "i"}


def _marked(pieces):
    """Pieces as the page has them."""
    texts = [(html.escape(stream.printable(text)), _TAGS.get(kind)) for text, kind in pieces]
    joined = "".join(f"<{tag}>{text}</{tag}>" if tag else text for text, tag in texts)
    return joined.replace("&quot;", "&#34;").replace("&#x27;", "&#39;")


@pytest.mark.usefixtures("no_pictures")
def test_the_slider_goes_from_noise_to_text(tmp_path):
    rows = [*ROWS, _row("distill", 4, perplexity=130.0)]
    paths = {rows[-1]["slug"]: [_trajectory(HOSTILE)], GOOD["slug"]: [_trajectory()]}
    page = _page(tmp_path, rows, trajectories=paths, mask_id=MASK)
    (best, _), (title, frames) = _frames(page)
    assert best == "distill, 8 steps: sample 1"
    assert title == "distill, 4 steps: sample 1"
    cut = stream.frames(_trajectory(HOSTILE), MASK, TOKENIZER)
    assert [text for _, text in frames] == [_marked(pieces) for pieces in cut]
    captions = [caption for caption, _ in frames]
    assert "predictive" not in captions[0]
    assert captions[1].endswith("predictive entropy 5.00 nats")  # step 1, from noise
    assert captions[2].endswith("predictive entropy 1.25 nats")  # step 4 of 4, from t = 0.75
    # Shown without the script: the last frame of the first one.
    shown = page.split('id="player"')[1].split("</section>")[0]
    assert shown.count('<div class="frame">') == 2
    assert shown.count('<div class="path">') == 1


@pytest.mark.usefixtures("no_pictures")
def test_the_page_is_headed_by_run_corpus_and_date(tmp_path):
    page = _page(tmp_path / "a")
    assert "<title>Evaluation · mine · letters · 2026-03-01</title>" in page
    assert "<h1>mine · letters · 2026-03-01</h1>" in page
    mixture = {"run": "b", "data": {"spec": {"corpus": "", "mixture": "x=1,y=2"}}}
    assert "<h1>b · x=1,y=2</h1>" in _page(tmp_path / "b", header=mixture)
    assert "<title>Evaluation</title>" in _page(tmp_path / "c", header={})


@pytest.mark.usefixtures("no_pictures")
def test_the_main_table_has_eight_columns_and_all_of_them_on_demand(tmp_path):
    rows = [*ROWS, GOOD | {"slug": "b", "jump": "euler", "temperature": 0.8}]
    page = _page(tmp_path, rows)
    heads, lines = _table(page)
    assert heads == ["model", *page_lib.COLUMNS, "flags"]
    assert len(heads) == 8
    assert len(lines) == len(rows)
    assert {"self-BLEU", "distinct-3", "own: A, ids", "own: nats/byte, text"} <= set(lines[0])
    assert lines[-1]["sampler"] == "euler, T=0.8"
    assert 'name="viewport" content="width=device-width' in page
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "#all:not(:checked) ~ .scroll .more { display: none; }" in style
    assert page.index('<input type="checkbox" id="all">') < page.index('<div class="scroll"')


@pytest.mark.usefixtures("no_png")
def test_the_page_forbids_itself_all_but_its_script(tmp_path):
    page = (_write(tmp_path) / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)[1]
    assert not re.search(r"url\(|@import", style)
    assert "://" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    links = [
        value
        for name, value in _Parser(page).attributes
        if name in ("src", "href", "xlink:href", "action", "data")
    ]
    assert links
    assert all(link.startswith("#") for link in links)


@pytest.mark.usefixtures("no_png")
def test_the_page_is_whole_without_its_script(tmp_path):
    paths = {GOOD["slug"]: [_trajectory()]}
    folder = _write(tmp_path, text="the people of", trajectories=paths, mask_id=MASK)
    page = (folder / "report.html").read_text()
    page = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    texts = _Parser(page).texts
    assert texts.count(TOKENIZER.decode(_tokens("the people of")[0].tolist())) == 3 * len(ROWS)
    assert page.count('<details class="card" open>') == 3
    assert any("step 4 of 4, t=1" in text for text in texts)
    assert page.count("<svg") == 3
    for row in ROWS:
        for sentence in report.flags(row, REAL):
            assert sentence.split(":")[0] in page
    # The cells that a finding rests on are marked.
    collapsed = re.search(r'<tr class="control"><th[^>]*>one phrase.*?</tr>', page, re.DOTALL)[0]
    assert collapsed.count('class="n bad"') == 3  # perplexity, entropy, distinct-2
    assert collapsed.count('class="n more bad"') == 1  # self-BLEU


@pytest.mark.usefixtures("no_pictures")
def test_what_was_given_is_marked(tmp_path):
    text = "the <b>\x1b[31mpeople"
    tokens = np.array([TOKENIZER.encode(text)])
    given = np.arange(tokens.shape[1]) < 5
    folder = _write(
        tmp_path,
        samples={GOOD["slug"]: tokens, REAL["slug"]: tokens},
        frozen={GOOD["slug"]: given[None]},
    )
    first, rest = (TOKENIZER.decode(tokens[0, part].tolist()) for part in (given, ~given))
    lines = (folder / "samples.txt").read_text()
    assert "between [[ and ]]." in lines.splitlines()[0]
    whole = text.replace("\x1b", r"\x1b")
    shown = f"[[{first}]]{rest}".replace("\x1b", r"\x1b")
    assert f"[1] {shown}\n" in lines
    assert f"[1] {whole}\n" in lines
    page = (folder / "report.html").read_text()
    escaped = lambda text: text.replace("\x1b", r"\x1b")
    shown = _marked([(escaped(first), "given"), (escaped(rest), "kept")])
    assert page.count(f'<p class="sample">{shown}</p>') == 1
    whole = _marked([(escaped(text), "kept")])
    assert page.count(f'<p class="sample">{whole}</p>') == 1  # of real text
    plain = _write(tmp_path / "plain")
    assert "[[" not in (plain / "samples.txt").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("no_png")
def test_the_page_of_a_large_sweep_stays_small(tmp_path):
    """165 settings at 1,024 tokens, every one watched at 65 frames that change everywhere."""
    rng = np.random.default_rng(0)
    length, steps = 1024, 64
    rows = [REAL] + [
        _row("distill", 2**k, perplexity=100.0, temperature=T, top_p=p)
        | {"slug": f"{k}-{T}-{p}", "group": f"distill (top-p {p})"}
        for k in range(11)
        for T in (0.8, 0.9, 1.0, 1.1, 1.2)
        for p in (0.8, 0.9, 1.0)
    ]
    best = rows[1 + 3 * 15 + 2 * 3]  # 8 steps at temperature 1
    best["judges"]["own"]["ids"]["perplexity_a"] = _estimate(99.0)
    widths = [len(TOKENIZER.decode([i])) for i in range(TOKENIZER.vocab_size)]
    ids = np.flatnonzero(np.array(widths) >= 4)
    tokens_TL = rng.choice(ids, (steps + 1, length))
    half_TL = rng.random(tokens_TL.shape) < 0.5
    half_TL[0] = True
    tokens_TL = np.where(half_TL, tokens_TL, tokens_TL[0])
    times = tuple((np.arange(steps + 1) / steps).tolist())
    one = Trajectory(tokens_TL, tuple(range(steps + 1)), times, np.zeros(length, bool))
    folder = _write(
        tmp_path,
        rows,
        samples={row["slug"]: rng.choice(ids, (3, length)) for row in rows},
        trajectories={row["slug"]: [one] * 2 for row in rows[1:]},
    )
    size = (folder / "report.html").stat().st_size
    assert size < 3_000_000, size
    page = (folder / "report.html").read_text()
    shown = page.count('<details class="card"')
    assert 50 <= shown < 166  # as many as there is room for, one sample of each
    assert page.count('<p class="sample">') - sum(len(f) for _, f in _frames(page)) == shown
    paths = _frames(page)
    assert 2 <= len(paths) <= 12
    assert paths[0][0].startswith("distill (top-p 0.8), 8 steps")
    for title, frames in paths:
        assert [int(caption.split()[1]) for caption, _ in frames] == list(range(0, 65, 4))
        assert "T=" not in title
        assert "differ from step 60" in frames[-1][0]
    lines = (folder / "trajectories.txt").read_text()
    assert lines.count("step 64 of 64") == 2 * 165
    assert lines.count("\nstep ") == 17 * 2 * 165


@pytest.mark.usefixtures("no_pictures")
def test_watched_samples_are_spread_over_steps(tmp_path):
    rows = [REAL, *(_row("distill", 2**k, temperature=T) for k in range(7) for T in (1.0, 0.8))]
    paths = {row["slug"]: [_trajectory()] * 2 for row in rows[1:]}
    titles = [
        title for title, _ in _frames(_page(tmp_path, rows, trajectories=paths, mask_id=MASK))
    ]
    assert len(titles) == 12
    assert "T=" not in "".join(titles)
    assert {title.split(": ")[0] for title in titles} == {reading.title(row) for row in rows[1::2]}


@pytest.mark.usefixtures("no_png")
def test_ids_of_the_page_are_unique(tmp_path):
    parser = _Parser((_write(tmp_path) / "report.html").read_text())
    ids = [value for name, value in parser.attributes if name == "id"]
    assert len(ids) == len(set(ids))


# ---------------------------------------------------------------------------------------- pictures
def _joined(axis):
    """Curves of a picture: lines that join points."""
    return [
        line
        for line in axis.lines
        if line.get_linestyle() != "None" and line.get_transform() == axis.transData
    ]


def test_frontier_joins_temperatures_where_they_vary():
    rows = [REAL] + [
        _row("distill", steps, perplexity=100 * T / steps, bits=6 + T / 3, temperature=T)
        for steps in (2, 8)
        for T in (1.2, 0.8, 1.0)
    ]
    axis = pictures.frontier(rows, set()).axes[0]
    assert [len(line.get_xdata()) for line in _joined(axis)] == [3, 3]
    for line in _joined(axis):
        assert list(line.get_xdata()) == sorted(line.get_xdata())  # by temperature
    axis = pictures.frontier([row for row in rows if row["temperature"] in (None, 1.0)], ()).axes[0]
    assert [len(line.get_xdata()) for line in _joined(axis)] == [2]  # over steps


def test_a_group_has_one_colour_everywhere():
    rows = [REAL, *(_row(name, s, perplexity=99.0 / s) for name in ("a", "b") for s in (1, 4, 8))]
    colors = [
        [line.get_color() for line in _joined(draw(rows, set()).axes[0])]
        for draw in (pictures.frontier, pictures.steps, pictures.time)
    ]
    assert len(set(colors[0])) == 2
    assert all(color[:2] == colors[0] for color in colors[1:])


def test_exposed_rows_are_hollow_crosses():
    rows = [REAL, GOOD, _row("distill", 1, perplexity=2000.0)]
    exposed = {rows[2]["slug"]}
    for draw in (pictures.frontier, pictures.steps, pictures.time):
        axis = draw(rows, exposed).axes[0]
        crosses = [
            line
            for line in axis.lines
            if line.get_marker() == "X" and line.get_markerfacecolor() == "#FFFFFF"
        ]
        assert [list(line.get_ydata()) for line in crosses] == [[2000.0]]
        axis = draw(rows, set()).axes[0]
        assert not [line for line in axis.lines if line.get_markerfacecolor() == "#FFFFFF"]


def test_pictures_can_be_read_on_a_phone():
    names = [f"model number {i} (cumulative)" for i in range(9)]
    rows = [REAL, *(_row(name, s, perplexity=99.0 * s) for name in names for s in (1, 4))]
    for name, draw in pictures.PICTURES.items():
        text = pictures.svg(draw(rows, set()), name)
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)]
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])
        assert width == pytest.approx(6.4 * 72)
        assert sizes
        assert min(sizes) >= 13
        assert not re.search("<metadata|<dc:date|Matplotlib v", text)
        assert all(name in text for name in names[:6])


def test_pictures_are_light_or_dark_as_the_page_is():
    rows = [*ROWS, AUTOREGRESSIVE, *(_row(f"model {i}", 4, perplexity=2e3) for i in range(7))]
    style = (ROOT / "fsdfm_jax/evaluate/report/report.css").read_text()
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for name, draw in pictures.PICTURES.items():
        text = pictures.svg(draw(rows, {rows[-1]["slug"]}), name)
        assert not re.findall(r"#[0-9a-fA-F]{3,6}\b", re.sub(r'"#\w+"|url\(#\w+\)', "", text))
        assert "fill: currentColor" in text
        used = set(re.findall(r"var\((--\w+)\)", text))
        assert {"--curve0", "--curve5", "--card", "--line"} <= used
        for variable in used:
            assert f"{variable}:" in light
            assert f"{variable}:" in dark.split("\n}")[0]


def test_names_are_no_formulas():
    name = r"_$\frac{1}{2$ $x^2$ & <b>"
    rows = [REAL | {"group": name}, _row(name, 1), _row(name, 2)]
    for key, draw in pictures.PICTURES.items():
        text = pictures.svg(draw(rows, set()), key)
        assert r"_$\frac{1}{2$ $x^2$ &amp; &lt;b&gt;" in text


def test_the_perplexity_told_first_is_of_ids_where_they_are_read():
    text = {"perplexity_a": {"value": 1.0}, "perplexity_b": {"value": 2.0}}
    ids = {"perplexity_a": {"value": 3.0}, "perplexity_b": {"value": 4.0}}
    row = {"judges": {"in-house": {"ids": ids, "text": text}, "other": {"ids": None, "text": text}}}
    assert reading.headline(row, "in-house") == {"value": 3.0}
    assert reading.headline(row, "other") == {"value": 2.0}
