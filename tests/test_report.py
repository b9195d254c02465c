"""The report: its files, seeds put together, what is held against rows, the page as data."""

import base64
import copy
import csv
import hashlib
import html.parser
import json
import math
import re

import numpy as np
import pytest

from fsdfm_jax import tokenizer, trajectory
from fsdfm_jax.evaluate import figures, reading, report
from fsdfm_jax.evaluate import page as page_lib
from fsdfm_jax.trajectory import Piece, Trajectory

L = 6
TOKENIZER = tokenizer.train_bpe(["the people of the united states </script><img>"] * 9, 280)
MASK = TOKENIZER.vocab_size
HOSTILE = "</script><img src=x onerror=alert(1)> \" ' &amp; $x_1$"
ORDER = ("perplexity_a", "perplexity_b", "perplexity_c", "nats_per_byte")
PICTURES = ("frontier.png", "results.png", "steps.png", "time.png")


def _estimate(value, spread=0.05):
    return {"value": value, "low": value * (1 - spread), "high": value * (1 + spread)}


def _scores(perplexity):
    values = (perplexity, perplexity * 0.97, perplexity * 0.95, math.log(perplexity) / 4)
    estimates = {key: _estimate(value) for key, value in zip(ORDER, values, strict=True)}
    return estimates | {"tokens": 60, "skipped": 1}


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
        "protocol": {"seed": seed, "judge": {"name": "own"}},
    }
    if model:
        times = [k / steps for k in range(steps)]
        entropies = [5.0 * (1 - t) for t in times]
        row["per_step"] = {"times": times, "entropy_nats": entropies, "changed": [0.5] * steps}
    row["figures"] |= changes.pop("figures", {})
    return row | changes


REAL = _row("held-out text", kind="real", perplexity=30.0)
SHUFFLED = _row("shuffled", kind="control", perplexity=2000.0)
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
    arguments = {
        "rows": rows,
        "samples": samples,
        "trajectories": trajectories or {},
        "tokenizer": TOKENIZER,
        "header": header,
    }
    report.write(path, **(arguments | changes))
    return path


@pytest.fixture
def no_png(monkeypatch):
    """For tests of other files: half of the time of a report goes into these."""
    monkeypatch.setattr(figures, "png", lambda figure: b"")


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
    cut = trajectory.frames(one, MASK, TOKENIZER)
    end_L = one.tokens_TL[-1]
    word = lambda part: TOKENIZER.decode(end_L[part].tolist())
    first = Piece(word(slice(0, 1)), "given")
    assert cut[0] == [first, Piece(trajectory.MASKED * 5, "masked")]
    assert cut[1] == [
        first,
        Piece(word(slice(1, 3)), "changed"),
        Piece(trajectory.MASKED * 3, "masked"),
    ]
    assert cut[2] == [
        first,
        Piece(word(slice(1, 3)), "kept"),
        Piece(word(slice(3, 6)), "changed"),
    ]
    assert "".join(piece.text for piece in cut[2]) == TOKENIZER.decode(end_L.tolist())


def test_lines_of_a_trajectory_survive_a_log():
    lines = trajectory.text_lines(_trajectory(), MASK, TOKENIZER)
    assert lines[0] == "step 0 of 4, t=0, noise"
    assert lines[2] == "step 1 of 4, t=0.25, 2 tokens changed"
    assert lines[4] == "step 4 of 4, t=1, 3 tokens changed in 3 steps"
    plain = lines[5].replace("{+", "").replace("+}", "")
    end = TOKENIZER.decode(_trajectory().tokens_TL[-1].tolist())
    assert plain == "  " + end
    changed = re.findall(r"\{\+(.*?)\+\}", lines[5])
    assert changed == [TOKENIZER.decode(_trajectory().tokens_TL[-1, 3:].tolist())]
    assert all(line.isprintable() for line in lines)


def test_a_trajectory_of_other_lengths_is_refused():
    with pytest.raises(ValueError, match="T steps, T times"):
        trajectory.frames(_trajectory()._replace(steps=(0, 4)), MASK, TOKENIZER)


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


@pytest.mark.usefixtures("no_png")
def test_csv_is_flat(tmp_path):
    folder = _write(tmp_path)
    with open(folder / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    columns = list(lines[0])
    assert columns[:4] == ["slug", "setting", "kind", "group"]
    assert columns[16:19] == ["entropy_nats", "entropy_nats_low", "entropy_nats_high"]
    assert {f"own/{way}/{key}_low" for way in ("ids", "text") for key in ORDER} <= set(columns)
    assert columns[-2:] == ["notes", "flags"]
    assert [line["group"] for line in lines] == [row["group"] for row in ROWS]
    assert [line["steps"] for line in lines] == ["", "", "", "2", "8"]
    good = lines[-1]
    assert float(good["own/text/perplexity_b"]) == pytest.approx(120 * 1.1 * 0.97)
    assert float(good["own/ids/perplexity_a_low"]) == pytest.approx(120 * 0.95)
    assert (good["own/ids/tokens"], good["mauve"], good["mauve_high"]) == ("60", "", "")
    assert good["flags"] == ""
    assert "bought with repetition" in lines[2]["flags"]


def test_equal_rows_give_equal_bytes(tmp_path):
    paths = {GOOD["slug"]: [_trajectory()]}
    first = _write(tmp_path / "a", trajectories=paths, mask_id=MASK)
    second = _write(tmp_path / "b", copy.deepcopy(ROWS), trajectories=paths, mask_id=MASK)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def _with_nan(row):
    nan = {"value": math.nan, "low": math.nan, "high": math.nan}
    scores = {key: nan for key in ORDER} | {"tokens": 0, "skipped": 9}
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
    assert "None was recorded." in (folder / "trajectories.txt").read_text()
    assert len(report.table(rows).splitlines()) == 2 + len(rows)


def test_a_figure_that_is_nan_is_seen():
    rows = [REAL, _with_nan(GOOD)]
    assert report.table(rows).splitlines()[-1].split()[2:4] == ["nan", "nan"]
    assert report.flags(rows[1], REAL) == ["its samples gave no figures"]


@pytest.mark.usefixtures("no_png")
def test_a_sweep_is_one_row_a_setting(tmp_path):
    rows = [REAL] + [
        _row("distill", steps, perplexity=100.0 + 900 / steps, temperature=T, seed=seed)
        for steps in (1, 2, 4, 8)
        for T in (0.8, 1.0, 1.2)
        for seed in (1, 2)
    ]
    page = (_write(tmp_path, rows) / "report.html").read_text()
    body = re.search(r'id="table".*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    assert body.count("<tr") == 1 + 4 * 3
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)


# ------------------------------------------------------------------------------------------- seeds
def test_aggregate_by_hand():
    rows = [
        REAL,
        _row("distill", 4, perplexity=100.0, seed=1, milliseconds_per_sample=4.0, notes=["x"]),
        GOOD,
        _row("distill", 4, perplexity=160.0, seed=2, milliseconds_per_sample=5.0, notes=["x"]),
        _row("distill", 4, perplexity=133.0, seed=3, milliseconds_per_sample=6.0, notes=["y"]),
    ]
    before = copy.deepcopy(rows)
    merged = report.aggregate(rows)
    assert rows == before
    assert [row["setting"] for row in merged] == [row["setting"] for row in rows[:3]]
    assert merged[0] is rows[0]
    assert merged[2] is rows[2]
    one = merged[1]
    assert (one["num_seeds"], one["seed"], one["slug"]) == (3, None, rows[1]["slug"])
    scores = one["judges"]["own"]["ids"]
    assert scores["perplexity_a"] == {"value": 131.0, "low": 100.0, "high": 160.0}
    assert (scores["tokens"], scores["skipped"]) == (180, 3)
    assert one["milliseconds_per_sample"] == 5.0
    assert one["figures"]["mauve"] is None
    assert one["figures"]["self_bleu"]["low"] == one["figures"]["self_bleu"]["high"]
    assert one["notes"] == ["x", "y"]
    assert list(one["protocol"]) == [rows[i]["slug"] for i in (1, 3, 4)]
    assert one["per_step"]["times"] == [0, 0.25, 0.5, 0.75]


def test_aggregate_hides_no_nan():
    rows = [_row("distill", 2, seed=1), _with_nan(_row("distill", 2, seed=2))]
    merged = report.aggregate(rows)[0]
    assert math.isnan(merged["figures"]["entropy_bits"]["value"])
    assert merged["judges"]["own"]["ids"]["perplexity_a"]["value"] == 50.0  # one seed has them


# ------------------------------------------------------------------------------------- exposure
def test_flags_expose_controls_and_spare_a_good_row():
    assert report.flags(REAL, REAL) == []
    assert report.flags(GOOD, REAL) == []
    assert report.flags(SHUFFLED, REAL) == [
        "a naive control, not a model",
        "perplexity 67 times that of real text at its entropy: like tokens of real text without "
        "their order",
    ]
    assert report.flags(COLLAPSED, REAL) == [
        "a naive control, not a model",
        "perplexity bought with repetition: entropy 2.1 bits below real text, distinct-2 0.10 "
        "against 0.93, self-BLEU 1.00 against 0.21",
        "perplexity 2.50 below the 30.00 of real text: easier to predict than what people write",
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
    lines = report.table(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert len({len(line) for line in lines}) == 1
    heads = ["model", "steps", "ppl", "A", "ppl", "B", "H", "bits", "H", "nats"]
    assert lines[0].split() == [*heads, "dist-2", "s-BLEU", "ms/sample", "flag"]
    assert lines[2].split()[-2:] == ["-", "-"]  # real text costs nothing and has no flag
    assert lines[4].rstrip().endswith("! control, repeats, too easy")
    cells = ["distill", "8", "120", "128", "6.30", "4.37", "0.93", "0.21", "10.00", "-"]
    assert lines[-1].split() == cells


def test_table_fits_a_terminal():
    long = _row("pretrain with a very long name (cumulative)", 1024, perplexity=123456.0)
    rows = [*ROWS, long, long | {"temperature": 0.8, "num_seeds": 3}]
    lines = report.table(rows).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].split()[1:4] == ["steps", "T", "seeds"]
    assert lines[-1].split("…")[1].split()[:3] == ["1024", "0.8", "3"]


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
        header = {"device": text, "code_version": text, f"x{text}": text}
        _write(tmp_path / str(i), rows, text=words, trajectories=paths, header=header)
        pages.append((tmp_path / str(i) / "report.html").read_text())
    harmless, harmful = (_Parser(_without_pictures(page)) for page in pages)
    assert harmful.elements == harmless.elements
    seen = "".join(harmful.texts)
    assert f"distill{HOSTILE}" in seen  # whole, as text
    # In the pictures too: elements of matplotlib's only, and nothing that acts.
    everything = _Parser(pages[1])
    tags = {tag for tag, _ in everything.elements}
    assert not tags & {"img", "iframe", "object", "foreignobject", "image", "base", "link"}
    assert not [name for name, _ in everything.attributes if name.startswith("on")]
    assert pages[1].count("</script>") == pages[0].count("</script>") == 2
    assert not set(pages[1]) & set("\x00\x1b")


@pytest.mark.usefixtures("no_png")
def test_the_data_of_the_page_parse_back(tmp_path):
    text = "<img src=x onerror=a>"
    rows = [*ROWS, _row("distill", 4, perplexity=120.0)]
    paths = {rows[-1]["slug"]: [_trajectory(HOSTILE, masked=False)]}
    page = (_write(tmp_path, rows, text=text, trajectories=paths) / "report.html").read_text()
    raw = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    assert not set(raw) & set("<>&\u2028\u2029")
    data = json.loads(raw)
    shown = TOKENIZER.decode(_tokens(text)[0].tolist())
    assert data["rows"] == [
        {"title": reading.title(row), "texts": [shown] * 3} for row in report.aggregate(rows)
    ]
    cut = trajectory.frames(_trajectory(HOSTILE, masked=False), None, TOKENIZER)
    assert [frame["pieces"] for frame in data["paths"][0]["frames"]] == [
        [list(piece) for piece in frame] for frame in cut
    ]
    captions = [frame["caption"] for frame in data["paths"][0]["frames"]]
    assert "predictive" not in captions[0]
    assert captions[1].endswith("predictive entropy 5.00 nats")  # step 1, from noise
    assert captions[2].endswith("predictive entropy 1.25 nats")  # step 4 of 4, from t = 0.75


@pytest.mark.usefixtures("no_png")
def test_the_page_forbids_itself_all_but_its_script(tmp_path):
    page = (_write(tmp_path) / "report.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "url(" not in page_lib.STYLE
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
    assert texts.count(TOKENIZER.decode(_tokens("the people of")[0].tolist())) == 3
    assert any("step 4 of 4, t=1" in text for text in texts)
    assert page.count("<svg") == 4
    for row in ROWS:
        for sentence in report.flags(row, REAL):
            assert sentence.split(":")[0] in page
    # The cells that a finding rests on are marked.
    collapsed = re.search(r'<tr class="control"><th[^>]*>one phrase.*?</tr>', page, re.DOTALL)[0]
    assert collapsed.count('class="n bad"') == 4  # perplexity, entropy, distinct-2, self-BLEU


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
    axis = figures.frontier(rows, set()).axes[0]
    assert [len(line.get_xdata()) for line in _joined(axis)] == [3, 3]
    for line in _joined(axis):
        assert list(line.get_xdata()) == sorted(line.get_xdata())  # by temperature
    axis = figures.frontier([row for row in rows if row["temperature"] in (None, 1.0)], ()).axes[0]
    assert [len(line.get_xdata()) for line in _joined(axis)] == [2]  # over steps


def test_a_group_has_one_colour_everywhere():
    rows = [REAL, *(_row(name, s, perplexity=99.0 / s) for name in ("a", "b") for s in (1, 4, 8))]
    colors = [
        [line.get_color() for line in _joined(draw(rows, set()).axes[0])]
        for draw in (figures.frontier, figures.steps, figures.time, figures.predictive)
    ]
    assert len(set(colors[0])) == 2
    assert all(color[:2] == colors[0] for color in colors[1:])


def test_exposed_rows_are_hollow_crosses():
    rows = [REAL, GOOD, _row("distill", 1, perplexity=2000.0)]
    exposed = {rows[2]["slug"]}
    for draw in (figures.frontier, figures.steps, figures.time):
        axis = draw(rows, exposed).axes[0]
        crosses = [
            line
            for line in axis.lines
            if line.get_marker() == "X" and line.get_markerfacecolor() == "white"
        ]
        assert [list(line.get_ydata()) for line in crosses] == [[2000.0]]
        axis = draw(rows, set()).axes[0]
        assert not [line for line in axis.lines if line.get_markerfacecolor() == "white"]


def test_pictures_can_be_read_on_a_phone():
    names = [f"model number {i} (cumulative)" for i in range(9)]
    rows = [REAL, *(_row(name, s, perplexity=99.0 * s) for name in names for s in (1, 4))]
    for name, draw in figures.PICTURES.items():
        text = figures.svg(draw(rows, set()), name)
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)]
        width = float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1])
        columns = 2 if name == "results" else 1
        assert width == pytest.approx(6.4 * 72 * columns)
        assert sizes
        assert min(sizes) >= 13
        assert not re.search("<metadata|<dc:date|Matplotlib v", text)
        assert all(name in text for name in names[:6])


def test_names_are_no_formulas():
    name = r"_$\frac{1}{2$ $x^2$ & <b>"
    rows = [REAL | {"group": name}, _row(name, 1), _row(name, 2)]
    for key, draw in figures.PICTURES.items():
        text = figures.svg(draw(rows, set()), key)
        assert r"_$\frac{1}{2$ $x^2$ &amp; &lt;b&gt;" in text
