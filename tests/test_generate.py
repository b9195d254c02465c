"""The command `generate`: jobs and their output, resuming after a kill, the view, errors."""

import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import base
from fsdfm_jax import samples as generate
from fsdfm_jax.convert import formats
from fsdfm_jax.data import tokenizer
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference import job as job_lib
from fsdfm_jax.inference import prompts, stream, view
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.samples import Options
from fsdfm_jax.training import checkpoint, pipeline, recipe

ROOT = pathlib.Path(__file__).parents[1]
# One shape for all that is drawn: compiling is what costs time here.
B, L, STEPS, V = 3, 16, 3, 280
BPE = tokenizer.train_bpe(["The state of the Union. The people of the Union and the state."] * 4, V)
NETWORK = {"width": 8, "num_blocks": 1, "num_heads": 2, "cond_width": 4, "mlp_ratio": 2}
PROVENANCE = {"stage": "distill", "weights": "ema", "step": 7, "data": None}


def _params(model, seed=0):
    """Random weights everywhere: the initial zeros of the head would hide errors."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), model))
    draw = lambda leaf: rng.normal(size=leaf.shape) * 0.3  # more would make one token sure
    return jax.tree.map(lambda leaf: draw(leaf).astype(np.float32), shapes)


def _bundle(*, source="uniform", causal=False, seed=0, **fields):
    conditioning = "none" if causal else "additive"
    model = ModelConfig(
        vocab_size=V + (source == "mask"), causal=causal, conditioning=conditioning, **NETWORK
    )
    path = bundle_lib.DEFAULT_PATH | {"source": source}
    defaults = {"path": path, "tokenizer": BPE, "block_length": L, "provenance": PROVENANCE}
    return bundle_lib.from_params(_params(model, seed), model, **(defaults | fields))


UNIFORM, MASK, CAUSAL = _bundle(), _bundle(source="mask"), _bundle(causal=True)
NETWORKS = pytest.mark.parametrize("bundle", [UNIFORM, MASK], ids=["uniform", "mask"])


def _options(**changes):
    return Options(**({"checkpoint": "x", "steps": STEPS, "batch_size": B} | changes))


def _run(monkeypatch, bundle, out=None, **changes):
    """Run the command without its flags and return its output."""
    out = out or io.StringIO()
    monkeypatch.setattr(formats, "open_bundle", lambda path, **flags: bundle)
    generate.run(_options(**changes), out)
    return out.getvalue()


def _lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def batch_file(tmp_path):
    """Five requests of two kinds."""
    lines = [
        {"prompt": "The state", "id": "a"},
        {"infill": "The [3] of the [2]"},
        {"infill": "[2] state", "id": "c"},
        {"prompt": "The people of"},
        {"prompt": "and"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Terminal(io.StringIO):
    def isatty(self):
        return True


# ------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workdir": "y"}, "not both"),
        ({"prompt": "a", "infill": "[1]"}, "--prompt and --infill exclude each other"),
        ({"prompt": "a", "batch_file": "b.txt"}, "--prompt and --batch_file exclude"),
        ({"infill": "", "batch_file": ""}, "--infill and --batch_file exclude"),
        ({"length": 0}, "--length must be in 1 .. 1048576, got 0"),
        ({"num_samples": 0}, "--num_samples must be in 1 .. 1048576"),
        ({"batch_size": -1}, "--batch_size must be in 1 .. 1048576, got -1"),
        ({"steps": 0}, "steps must be an integer"),
        ({"seed": -1}, "seed must be an integer"),
        ({"temperature": -1.0}, "temperature must be in"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"cooling": 1.0}, r"cooling must be in \[0, 1\), got 1.0"),
        ({"look_ahead": -0.5}, r"look_ahead must be in \[0, 1\], got -0.5"),
        ({"jump": "leap"}, "jump must be one of .*'leap'"),
        ({"grid": "log"}, "Unknown grid 'log'"),
        ({"stream": True, "batch_file": "b.txt"}, "--stream displays texts"),
        ({"stream": True, "output": "o.jsonl"}, "--stream displays texts"),
        ({"output": "o.txt"}, "--output must be a .jsonl file, got 'o.txt'"),
    ],
)
def test_bad_flags_are_told_before_anything_is_read(monkeypatch, changes, message):
    monkeypatch.setattr(formats, "open_bundle", None)
    with pytest.raises(ValueError, match=message):
        generate.run(_options(**changes), io.StringIO())


def test_what_says_how_to_read_the_model_is_passed_on(monkeypatch):
    calls = []

    def open_bundle(path, **given):
        calls.append((path, given))
        return UNIFORM

    monkeypatch.setattr(formats, "open_bundle", open_bundle)
    given = {
        "which": "student",
        "num_heads": 3,
        "tokenizer": "gpt2",
        "stage": "refine",
        "source": "mask",
    }
    generate.open_model(_options(checkpoint="some/file", **given))
    assert calls == [(pathlib.Path("some/file"), given)]


def test_a_working_directory_has_a_config(monkeypatch, tmp_path):
    monkeypatch.setattr(formats, "open_bundle", lambda path, **given: UNIFORM)
    options = Options(workdir=str(tmp_path))
    with pytest.raises(ValueError, match="is not a working directory"):
        generate.open_model(options)
    pipeline.save_config(tmp_path, base.get_config())
    assert generate.open_model(options) is UNIFORM


def test_a_model_needs_a_tokenizer(monkeypatch):
    with pytest.raises(ValueError, match="has no tokenizer; .*--tokenizer=gpt2"):
        _run(monkeypatch, _bundle(tokenizer=None))


def test_lengths_and_jumps_by_default():
    job = lambda bundle, **changes: generate.make_job(_options(**changes), bundle)
    assert job(UNIFORM).length == L
    assert job(UNIFORM, length=9).length == 9
    assert job(_bundle(block_length=None)).length == 1024
    assert job(UNIFORM).sampling == Sampling(STEPS)
    assert job(UNIFORM, batch_size=None, num_samples=5).batch_size == 5
    assert job(UNIFORM, batch_size=None, num_samples=70).batch_size == 32


# ------------------------------------------------------------------------------------ what is drawn
def _call(bundle, templates, *, seed, steps=STEPS, **how):
    """The library's answer for one batch."""
    return generate_lib.generate(
        bundle.params(),
        bundle.model,
        bundle.process(),
        Sampling(steps, **how),
        given_BL=np.stack([t.given_L for t in templates]),
        frozen_BL=np.stack([t.frozen_L for t in templates]),
        seed=seed,
    )


@NETWORKS
def test_lines_are_the_librarys_calls_in_order(monkeypatch, batch_file, bundle):
    """Five rows in batches of three: two calls of one shape, each with its seed."""
    lines = _lines(_run(monkeypatch, bundle, batch_file=str(batch_file), num_samples=1, seed=9))
    requests = prompts.read_requests(batch_file, BPE, L)
    assert [line["id"] for line in lines] == ["a", 2, "c", 4, 5]
    templates = [request.template for request in requests]
    first = _call(bundle, templates[:B], seed=9)
    # What the last batch is filled up with doesn't matter.
    second = _call(bundle, [*templates[B:], prompts.blank(L)], seed=generate_lib.batch_seed(9, 1))
    for line, request, tokens_L in zip(lines, requests, [*first, *second[:2]], strict=True):
        template = request.template
        shown = tokens_L[: template.shown]
        assert line["tokens"] == shown.tolist()
        assert line["text"] == BPE.decode(shown)
        assert line[request.kind] == request.text
        frozen = template.frozen_L[: template.shown]
        np.testing.assert_array_equal(shown[frozen], template.given_L[: template.shown][frozen])
        assert not {"prompt", "infill"} - {request.kind} & line.keys()
    assert len(set(lines[0]["tokens"])) > 8  # a network that knows one token would show nothing
    assert len(lines[0]["tokens"]) == L  # all of a prompt's block, only the template of an infill
    assert len(lines[2]["tokens"]) == templates[2].shown < L


def test_samples_of_a_request_stand_together(monkeypatch, batch_file):
    lines = _lines(_run(monkeypatch, UNIFORM, batch_file=str(batch_file), num_samples=2))
    ids = ["a", 2, "c", 4, 5]
    assert [(line["id"], line["sample"]) for line in lines] == [(i, s) for i in ids for s in (0, 1)]
    assert lines[0]["tokens"] != lines[1]["tokens"]


def test_a_line_says_what_its_tokens_depend_on(monkeypatch, batch_file):
    line = _lines(_run(monkeypatch, MASK, batch_file=str(batch_file), seed=4, temperature=0.5))[0]
    model = line.pop("model")
    assert {key: line[key] for key in line.keys() - {"text", "tokens"}} == {
        "id": "a",
        "sample": 0,
        "prompt": "The state",
        "seed": 4,
        "batch_size": B,
        "sampling": Sampling(STEPS, temperature=0.5).to_dict(),
        "length": L,
    }
    assert re.fullmatch("[0-9a-f]{16}", model.pop("sha256"))
    assert model == {
        "stage": "distill",
        "weights": "ema",
        "step": 7,
        "tokenizer": BPE.fingerprint,
        "path": dict(MASK.path),
    }


def _sampled(**values):
    """The bundle as its run was configured to sample it."""
    provenance = PROVENANCE | {"config": {"eval": {"sampling": Sampling(**values).to_dict()}}}
    return dataclasses.replace(UNIFORM, provenance=provenance)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"temperature": 1.0, "top_p": 1.0},
        {"top_p": 0.5, "cooling": 0.0},
        {"look_ahead": 0.0, "grid": "uniform"},
        {"jump": "euler", "steps": None},
    ],
)
def test_samples_are_drawn_as_the_model_says_unless_told_otherwise(monkeypatch, flags):
    trained = {"temperature": 0.8, "top_p": 0.9, "cooling": 0.5, "look_ahead": 0.25}
    trained |= {"grid": "power:0.7", "jump": "mixture", "steps": 5}
    job = generate.make_job(_options(prompt="The state", **flags), _sampled(**trained))
    given = {"steps": STEPS} | flags
    expected = Sampling(**trained | {k: v for k, v in given.items() if v is not None})
    assert job.sampling == expected
    asked, draw = [], generate_lib.generate
    monkeypatch.setattr(
        generate_lib, "generate", lambda *a, **k: asked.append(a[3]) or draw(*a, **k)
    )
    list(job_lib.draw(job))
    assert asked == [expected] * len(asked)


def test_a_former_config_says_how_it_is_sampled_too():
    config = {"eval": {"few_step_jump": "mixture", "cooling": 0.5, "neighbours": 1.0, "seed": 1}}
    former = dataclasses.replace(UNIFORM, provenance=PROVENANCE | {"config": config})
    assert former.sampling() == Sampling(jump="mixture", cooling=0.5)


def test_without_a_model_it_is_the_bundled_one(monkeypatch):
    opened = []
    monkeypatch.setattr(formats, "open_bundle", lambda path, **k: opened.append(path) or UNIFORM)
    generate.run(_options(checkpoint=None, num_samples=1), io.StringIO())
    assert opened == [formats.BUNDLED]
    assert formats.BUNDLED.is_file()


@pytest.mark.parametrize("bundle", [UNIFORM, MASK, CAUSAL], ids=["uniform", "mask", "causal"])
def test_a_small_nucleus_leaves_the_likeliest(monkeypatch, bundle):
    """So small that it holds one token: the seed of the draws no longer matters."""
    template = prompts.prefix("The state", BPE, L)
    rows = np.stack([template.given_L] * 2), np.stack([template.frozen_L] * 2)
    given = {"given_BL": rows[0], "frozen_BL": rows[1], "seed": 3}
    params, model, process = bundle.device_params(), bundle.model, bundle.process()
    run = lambda **how: generate_lib.generate(params, model, process, Sampling(1, **how), **given)
    sure = run(top_p=1e-6)
    np.testing.assert_array_equal(sure, run(temperature=1e-4))
    np.testing.assert_array_equal(sure, run(temperature=0.0))
    assert (run() != sure).any()


def test_the_text_of_one_prompt(monkeypatch):
    out = _run(monkeypatch, UNIFORM, prompt="The state", num_samples=4, seed=2)
    blocks = re.split(r"--- sample (\d) of 4: distill, 3 network calls\n", out)
    assert blocks[1::2] == ["1", "2", "3", "4"]
    template = prompts.prefix("The state", BPE, L)
    tokens_BL = _call(UNIFORM, [template] * B, seed=2)
    for text, tokens_L in zip(blocks[2::2], tokens_BL, strict=False):
        assert text == BPE.decode(tokens_L) + "\n"
        assert text.startswith("The state")


def test_without_a_prompt(monkeypatch):
    out = _run(monkeypatch, MASK, num_samples=B, seed=2)
    for tokens_L in _call(MASK, [prompts.blank(L)] * B, seed=2):
        assert BPE.decode(tokens_L) in out


def test_left_to_right(monkeypatch, batch_file, tmp_path):
    out = _run(monkeypatch, CAUSAL, prompt="The state", num_samples=B)
    assert out.count("\nThe state") == B
    assert out.count(f"distill, {L} network calls") == B
    prompt_file = tmp_path / "a.txt"
    prompt_file.write_text("The\nof\nthe\n")
    line = _lines(_run(monkeypatch, CAUSAL, batch_file=str(prompt_file), num_samples=1))[2]
    assert (line["sampling"]["steps"], line["sampling"]["jump"]) == (L, None)
    assert line["text"].startswith("the")
    monkeypatch.setattr(generate_lib, "generate", None)
    for changes, message in (
        ({"infill": "The [2] of"}, "can't see text after a gap"),
        ({"batch_file": str(batch_file)}, "prompts.jsonl line 2: .*after a gap"),
        ({"stream": True}, "autoregressive model writes each token once"),
    ):
        with pytest.raises(ValueError, match=message):
            _run(monkeypatch, CAUSAL, **changes)


# ------------------------------------------------------------------------------------- output files
@pytest.fixture
def complete(monkeypatch, batch_file, tmp_path):
    """(flags, output) of an uninterrupted job of five rows in two batches."""
    flags = {
        "batch_file": str(batch_file),
        "output": str(tmp_path / "new" / "a.jsonl"),
        "num_samples": 1,
    }
    assert _run(monkeypatch, UNIFORM, **flags) == ""
    return flags, pathlib.Path(flags["output"])


def test_the_file_is_what_stdout_would_get(monkeypatch, complete):
    flags, path = complete
    assert path.read_text() == _run(monkeypatch, UNIFORM, **(flags | {"output": None}))


def test_an_interrupted_output_goes_on_to_the_same_bytes(monkeypatch, complete):
    flags, path = complete
    whole = path.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    assert len(ends) == 5
    # Nothing; torn early and late in a line; after a line within and between batches.
    for cut in (0, 1, 5, 40, ends[0], ends[0] + 100, ends[2] - 1, ends[2], ends[3], ends[4] - 1):
        path.write_bytes(whole[:cut])
        _run(monkeypatch, UNIFORM, **flags)
        assert path.read_bytes() == whole, cut


def test_a_complete_output_is_left_alone(monkeypatch, complete, capsys):
    flags, path = complete
    whole = path.read_bytes()
    monkeypatch.setattr(generate_lib, "generate", None)
    _run(monkeypatch, UNIFORM, **flags)
    assert path.read_bytes() == whole
    assert "already has 5 of 5 samples" in capsys.readouterr().err


def test_finished_batches_are_not_drawn_again(monkeypatch, complete):
    flags, path = complete
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    seeds, draw = [], generate_lib.generate
    monkeypatch.setattr(
        generate_lib, "generate", lambda *args, **k: seeds.append(k["seed"]) or draw(*args, **k)
    )
    _run(monkeypatch, UNIFORM, **flags)
    assert seeds == [generate_lib.batch_seed(0, 1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "line 1 is of another job .seed: 0 before, 1 now"),
        ({"steps": 2}, "'steps': 3.* before, .*'steps': 2"),
        ({"temperature": 0.5}, "'temperature': 1.0.* before, .*'temperature': 0.5"),
        ({"grid": "cosine"}, "'grid': 'uniform'.* before, .*'grid': 'cosine'"),
        ({"length": 15}, "length: 16 before, 15 now"),
        ({"batch_size": 2}, "batch_size: 3 before, 2 now"),
        ({"num_samples": 2}, "line 2 is of another job .id: 2 before, 'a' now"),
        ({"batch_file": None, "num_samples": 9}, "id: 'a' before, 1 now"),
        ({"batch_file": None}, "has 5 samples, more than the 1 requested"),
        ({"bundle": _bundle(seed=1)}, "sha256"),
        ({"bundle": _bundle(path=UNIFORM.path | {"power": 2.0})}, "'power': 2.0"),
    ],
)
def test_an_output_of_another_job_is_refused_and_kept(monkeypatch, complete, changes, message):
    flags, path = complete
    whole = path.read_bytes()
    changes = dict(changes)
    bundle = changes.pop("bundle", UNIFORM)
    monkeypatch.setattr(generate_lib, "generate", None)
    with pytest.raises(ValueError, match=message) as error:
        _run(monkeypatch, bundle, **(flags | changes))
    assert "remove" in str(error.value)
    assert path.read_bytes() == whole


def test_an_output_of_another_prompt_is_refused(monkeypatch, complete, batch_file):
    batch_file.write_text(batch_file.read_text().replace("The people of", "The people"))
    with pytest.raises(ValueError, match="line 4 .*prompt: 'The people of' before, 'The people'"):
        _run(monkeypatch, UNIFORM, **complete[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my only notes", "was not written by this program"),
        (b'{"id": 1}\nmy notes', "was not written by this program"),
        (b"my notes\n", "line 1 isn't valid JSON"),
        (b"[3]\n", "line 1 is of another job"),
    ],
)
def test_another_file_is_refused_and_kept(monkeypatch, complete, content, message):
    flags, path = complete
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _run(monkeypatch, UNIFORM, **flags)
    assert path.read_bytes() == content


def test_a_bad_line_stops_it_before_anything_is_drawn(monkeypatch, batch_file, tmp_path):
    batch_file.write_text(batch_file.read_text() + '{"infill": "no gap"}\n')
    monkeypatch.setattr(generate_lib, "generate", None)
    out = io.StringIO()
    for output in (None, str(tmp_path / "new" / "a.jsonl")):
        with pytest.raises(ValueError, match="prompts.jsonl line 6: .*has no gap"):
            _run(monkeypatch, UNIFORM, out, batch_file=str(batch_file), output=output)
    assert out.getvalue() == ""
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------- stdout
def test_lines_go_to_stdout_and_progress_to_the_terminal(monkeypatch, batch_file):
    """A live progress bar redirects sys.stdout to its terminal."""
    screen, out = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    _run(monkeypatch, UNIFORM, sys.stdout, batch_file=str(batch_file), num_samples=1)
    assert len(_lines(out.getvalue())) == 5
    assert "sampling" in screen.getvalue()
    assert '"tokens"' not in screen.getvalue()


HOSTILE = "\x1b]0;owned\x07[red]a\x9b2J\r\n\tb\x7f"


def test_printable():
    escaped = r"\x1b]0;owned\x07[red]a\x9b2J\r"
    assert stream.printable(HOSTILE) == escaped + "\n\tb\\x7f"
    assert stream.printable(HOSTILE, keep="") == escaped + r"\n\tb\x7f"
    assert stream.printable("naïve 日本 \U0001f600") == "naïve 日本 \U0001f600"
    assert stream.printable("\ud800") == r"\ud800"


def _always(text, monkeypatch, length=64):
    """Make the library always return `text`; return its tokens."""
    ids = BPE.encode(text)
    row = np.asarray(ids + BPE.encode("q") * (length - len(ids)), np.int32)
    monkeypatch.setattr(generate_lib, "generate", lambda *_, given_BL, **__: row[None].repeat(B, 0))
    return row


def test_control_characters_stay_off_a_terminal(monkeypatch):
    _always(HOSTILE, monkeypatch)
    flags = {"length": 64, "num_samples": 1}
    screen = _run(monkeypatch, UNIFORM, Terminal(), **flags)
    assert not set(screen) & {"\x1b", "\x07", "\x9b", "\r", "\x7f"}
    assert r"\x1b]0;owned\x07[red]a" in screen
    assert HOSTILE in _run(monkeypatch, UNIFORM, **flags)  # a file gets the text as it is
    line = _run(monkeypatch, UNIFORM, Terminal(), batch_file=_hostile_file(monkeypatch), **flags)
    assert not set(line) & {"\x1b", "\x07", "\x9b", "\r", "\x7f"}
    assert json.loads(line)["text"].startswith(HOSTILE)


def _hostile_file(monkeypatch):
    monkeypatch.setattr(
        prompts,
        "read_requests",
        lambda *_: [prompts.Request(1, "prompt", HOSTILE, prompts.blank(64))],
    )
    return "a.jsonl"


# --------------------------------------------------------------------------------------------- view
@NETWORKS
def test_streaming_changes_no_token_and_shows_each_step(monkeypatch, bundle):
    flags = {"infill": "The [3] of the [2]", "num_samples": 4}
    alone = _run(monkeypatch, bundle, **flags)
    out = _run(monkeypatch, bundle, stream=True, **flags)
    steps = re.findall("^(step .*\n(?:  .*\n)+)", out, re.M)
    assert re.sub("^step .*\n(?:  .*\n)+", "", out, flags=re.M) == alone
    texts = re.split(r"--- sample \d of 4: distill, 3 network calls\n", alone)[1:]
    shown = prompts.infill(flags["infill"], BPE, L).shown
    heads = [re.match(r"step (\d)/3, (\d+) of (\d+) tokens changed\n  The", line) for line in steps]
    assert [int(head[1]) for head in heads] == [1, 2, 3] * 2  # of two batches
    assert {int(head[3]) for head in heads} == {shown}
    for step, text in ((steps[2], texts[0]), (steps[5], texts[3])):  # the first of each batch
        lines = stream.readable(text[:-1]).split("\n")
        assert step.split("\n")[1:-1] == ["  " + line for line in lines]
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\ufffd]|\\x", step)
    if bundle is MASK:
        changed = [int(head[2]) for head in heads[:3]]
        assert sum(changed) == 5  # each gap token once
        for i, line in enumerate(steps[:3]):
            assert line.count("░") == 5 - sum(changed[: i + 1])


def _view(kind, out, bundle=MASK, rows=1, **changes):
    job = generate.make_job(_options(num_samples=rows, **changes), bundle)
    return kind(job, out), job


@pytest.mark.parametrize("kind", [view.View, view.LiveView])
def test_views_cope_with_masks_markup_and_control_characters(monkeypatch, kind):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    shown, job = _view(kind, out, rows=2, length=64)
    mask_id = job.process.source.mask_id
    ids = BPE.encode(HOSTILE)
    noise = np.full((2, 64), mask_id, np.int32)
    state = noise.copy()
    state[0, : len(ids)] = ids
    frozen = np.zeros((2, 64), bool)
    with shown.closing():
        shown.on_step(job.rows, frozen, 0, noise)
        shown.on_step(job.rows, frozen, 1, state)
    text = out.getvalue()
    assert f"step 1/3, {len(ids)} of {64 if kind is view.View else 128} tokens changed" in text
    assert "\x1b]0;" not in text
    assert "\x07" not in text
    assert "\x9b" not in text
    assert "\x7f" not in text
    escaped = "·]0;owned·[red]a·2J·" if kind is view.View else r"\x1b]0;owned\x07[red]a\x9b2J\r"
    assert escaped in text
    assert "░" * 20 in text
    assert ("noise" in text) == (kind is view.LiveView)


def test_pieces():
    tokens_L = np.asarray([*BPE.encode("The"), V, V, *BPE.encode(" of the"), 0], np.int32)
    given_L = tokens_L == tokens_L[0]
    changed_L = np.asarray([False, False, True, True, False, False])
    assert len(tokens_L) == 6
    pieces = stream.pieces(tokens_L, given_L, changed_L, V, BPE)
    assert pieces == [
        ("The", "given"),
        ("░░", "masked"),
        (" of", "changed"),
        (" the", "kept"),  # the end-of-text token has no text
    ]
    whole = stream.pieces(tokens_L[[0, 3, 4]], given_L[:3], given_L[:3], None, BPE)
    assert whole == [("The", "given"), (" of the", "kept")]


def test_a_closed_pipe_is_told_once_and_as_itself(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError("closed")

    with pytest.raises(BrokenPipeError, match="closed"):
        _run(monkeypatch, UNIFORM, Closed(), num_samples=B, stream=True)


# ------------------------------------------------------------------------------------ as a program
def test_importing_it_defines_no_flags():
    """Two programs of the package can be imported by one process, as the tests do."""
    from absl import flags

    assert "batch_file" not in flags.FLAGS
    assert {f.name for f in dataclasses.fields(Options)} >= {"workdir", "checkpoint", "stream"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(checkpoint, tokenizer.json) of a run of random weights."""
    folder = tmp_path_factory.mktemp("run")
    config = base.get_config()
    config.pipeline = "pretrain,distill"
    config.data.block_length = L
    model = MASK.model
    config.update_from_flattened_dict({f"model.{key}": value for key, value in NETWORK.items()})
    config.path.source = "mask"
    config.distill.ema_decay = 0.9
    metadata = recipe.make_metadata(
        config.to_dict(),
        model,
        recipe.make_recipe(config.to_dict(), "distill", None),
        run="distill",
        stage="distill",
        tokenizer=BPE.fingerprint,
        data="d" * 16,
    )
    run = folder / "stages" / "distill"
    with checkpoint.Checkpoints(
        run / "checkpoints", retention=checkpoint.Retention()
    ) as checkpoints:
        state = {"params": _params(model, 1), "ema": MASK.params(), "step": np.asarray(7)}
        checkpoints.save(7, state, metadata)
    BPE.save(folder / "tokenizer.json")
    return run, folder / "tokenizer.json"


def _program(*flags):
    return subprocess.run(
        [sys.executable, "-m", "fsdfm_jax.generate", *flags],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_from_a_checkpoint_to_lines_and_back(trained, batch_file):
    run, spec = trained
    flags = [
        f"--checkpoint={run}",
        f"--tokenizer={spec}",
        f"--steps={STEPS}",
        "--num_samples=1",
        "--batch_size=3",
        "--seed=9",
    ]
    done = _program(*flags, f"--batch_file={batch_file}")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = _lines(done.stdout)  # and nothing else
    assert [line["id"] for line in lines] == ["a", 2, "c", 4, 5]
    assert lines[0]["length"] == L
    assert lines[0]["model"]["weights"] == "ema"
    templates = [r.template for r in prompts.read_requests(batch_file, BPE, L)]
    wanted = _call(MASK, templates[:B], seed=9)[0]
    assert lines[0]["tokens"] == wanted.tolist()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--workdir=a", "--checkpoint=b"), "and not both"),
        (("--checkpoint=b", "--jump=leap"), "leap"),
    ],
)
def test_errors_are_one_line(flags, message):
    done = _program(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
