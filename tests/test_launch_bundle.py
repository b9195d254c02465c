"""Packaging a model as the bundled one, or rejecting it."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest

import fsdfm_jax as fs
from fsdfm_jax import samples as generate
from fsdfm_jax import stages
from fsdfm_jax.convert import formats
from fsdfm_jax.evaluate.memorised import Ngrams
from launch import bundle as launch_bundle

TEXT = np.arange(1000) % 97


def stored(folder, slug, kind, run, tokens_NL):
    (folder / "samples").mkdir(exist_ok=True)
    name = f"samples/{slug}.npz"
    np.savez(folder / name, tokens=tokens_NL)
    line = {"slug": slug, "kind": kind, "run": run, "group": run or "held-out text"}
    setting = f"control-{slug}" if kind == "control" else kind
    stage, steps = (run, 8) if run else (None, None)
    line |= {"stage": stage, "steps": steps}
    return line | {"samples_file": name, "setting": setting}


@pytest.fixture
def report(tmp_path):
    """Held-out text, half memorised; two runs with a quarter memorised, and one with all."""
    unknown = np.full(60, 96)
    half = np.stack([TEXT[:60], unknown])
    quarter = np.stack([TEXT[:60], unknown, unknown, unknown])
    rows = [
        stored(tmp_path, "real", "real", None, half),
        stored(tmp_path, "old", "model", "refine", TEXT[None, :60]),
        stored(tmp_path, "base-8", "model", "pretrain", quarter),
        stored(tmp_path, "refine-8", "model", "refine", quarter),
        stored(tmp_path, "other", "model", "distill", TEXT[None, :60]),
        stored(tmp_path, "ngram", "control", None, TEXT[None, :60]),  # a control may know it all
        stored(tmp_path, "repeated", "control", None, TEXT[None, :60]),
    ]
    rows[1]["slug"] = "refine-8"  # computed again since
    rows = [rows[1], rows[0], *rows[2:]]
    (tmp_path / "points.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_bundled_models_are_small_and_their_card_says_so():
    few, base = fs.load(), fs.load("base")
    assert few.provenance["stage"] in stages.FEW_STEP
    assert base.provenance["stage"] == "pretrain"
    assert few.tokenizer.fingerprint == base.tokenizer.fingerprint
    sizes = [path.stat().st_size for path in (formats.BUNDLED, formats.BUNDLED_BASE)]
    assert sum(sizes) < launch_bundle.MAX_BYTES
    card = (formats.BUNDLED.parent / "README.md").read_text()
    assert all(f"{size / 1e6:.1f} MB" in card for size in sizes)


KNOWN = launch_bundle.TrainingText(
    Ngrams(TEXT, launch_bundle.NGRAM, vocab_size=97), {"of", "the"}, fs.load().tokenizer
)


def test_words_of_a_text():
    texts = ["xx The of zzz the", "", "only"]
    assert launch_bundle.known_share(texts, KNOWN.words) == 2 / 3  # without the ends
    assert launch_bundle.known_share([""], KNOWN.words) == 0


def test_rows_are_the_latest_of_the_runs_asked_for(report):
    rows = launch_bundle.read_rows(report, ["pretrain", "refine"], KNOWN)
    assert [(row.figures["slug"], row.copied) for row in rows] == [
        ("real", 0.5),
        ("ngram", 1.0),
        ("base-8", 0.25),
        ("refine-8", 0.25),
    ]
    launch_bundle.check_copied(rows)


def test_a_model_that_repeats_its_text_is_refused(report):
    rows = launch_bundle.read_rows(report, ["distill"], KNOWN)
    with pytest.raises(ValueError, match="other: 100.000% .* against 50.000% for held-out text"):
        launch_bundle.check_copied(rows)


@pytest.mark.parametrize("there", [True, False])
def test_a_report_that_lacks_the_run_is_refused(report, tmp_path, there):
    place = report if there else tmp_path / "nowhere"
    with pytest.raises(ValueError, match="has no row for .*step_aware.* its evaluation"):
        launch_bundle.read_rows(place, ["step_aware"], KNOWN)


def test_the_bundled_model_writes():
    out = io.StringIO()
    generate.run(generate.Options(num_samples=2), out)
    head, text, other = out.getvalue().split("--- sample ")
    assert (head, text[:7]) == ("", "1 of 2:")
    words = text.partition("\n")[2].split()
    assert len(words) > 20  # a block of 128 tokens, of which a word takes two or three
    assert text.partition("\n")[2] != other.partition("\n")[2]


@pytest.mark.slow
def test_a_run_is_bundled_and_writes(tmp_path):
    run = lambda *command: subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True
    )
    work, target = tmp_path / "run", tmp_path / "bundled"
    pipeline = "--config.pipeline=autoregressive,pretrain,refine"
    trained = run("fsdfm_jax.main", "--config=configs/tiny.py:smoke", f"--workdir={work}", pipeline)
    assert trained.returncode == 0, trained.stderr
    bundled = run("launch.bundle", work, f"--target={target}")
    assert bundled.returncode == 0, bundled.stderr
    for name, stage in (("model", "refine"), ("base", "pretrain")):
        bundle = formats.open_bundle(target / f"{name}.safetensors")
        assert bundle.provenance["run"] == stage
    text = (target / "README.md").read_text()
    assert "| `refine` | 8 | uniform |" in text
    assert "| `refine` | 20 | 16 |" in text
    model = f"--checkpoint={target / 'model.safetensors'}"
    written = run("fsdfm_jax.generate", model, "--steps=2", "--num_samples=2")
    assert written.returncode == 0, written.stderr
    assert "--- sample 2 of 2: refine, 2 network calls" in written.stdout


@pytest.mark.slow
def test_the_bundled_models_are_evaluated_as_in_their_card(tmp_path):
    small = ["num_samples=4", "steps=(1,)", "many_steps=2", "judges=", "controls=()", "watched=0"]
    command = [sys.executable, "-m", "fsdfm_jax.evaluate", "--bundled", f"--output={tmp_path}"]
    command += [f"--config.eval.{value}" for value in [*small, "bound_samples=0"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "points.jsonl").read_text().splitlines()]
    runs = {model.provenance["run"] for model in (fs.load(), fs.load("base"))}
    assert {row["run"] for row in rows} - {None} == runs
    assert {row["grid"] for row in rows} - {None} >= {fs.load().sampling().grid}
