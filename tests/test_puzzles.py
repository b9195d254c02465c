"""Sudoku puzzles from text to grids: the command `generate` and the library."""

import io
import json

import numpy as np
import pytest

import fsdfm_jax as fs
from fsdfm_jax import samples
from fsdfm_jax.convert import formats
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.exact import documents, sudoku
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference import puzzles
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.samples import Options

FOUR = sudoku.get_size("4x4")
SOLVED = "1234341221434321"
PUZZLE = "12..3.1.2..34..1"
ROWS = "\n".join(PUZZLE[i : i + 4] for i in range(0, 16, 4))


@pytest.fixture(scope="module")
def model():
    """An untrained network."""
    cfg = ModelConfig(
        vocab_size=5,
        width=8,
        num_blocks=1,
        num_heads=2,
        cond_width=4,
        positions="learned",
        num_positions=17,
    )
    rng = np.random.default_rng(0)
    shapes = bundle_lib.expected_shapes(cfg)
    flat = {name: 0.3 * rng.normal(size=shape) for name, shape in shapes.items()}
    tokens = tokenizer_lib.from_json(documents.sudoku_tokenizer(FOUR), "digits")
    return bundle_lib.from_params(
        bundle_lib.unflatten(flat), cfg, tokenizer=tokens, block_length=17
    )


def _run(monkeypatch, model, **flags):
    out = io.StringIO()
    monkeypatch.setattr(formats, "open_bundle", lambda path, **_: model)
    samples.run(Options(checkpoint="x", steps=2, **flags), out)
    return out.getvalue()


def _grid(text):
    """The cells of a printed grid, "?" left as it is."""
    return "".join(mark for mark in text if mark in "1234?")


@pytest.mark.parametrize("text", [PUZZLE, ROWS, ROWS.replace(".", "0"), "12[2]3[1]1.2..34..1"])
def test_a_puzzle_is_answered_by_a_grid_around_its_digits(monkeypatch, model, text):
    printed = _run(monkeypatch, model, infill=text, num_samples=2)
    parts = printed.split("--- sample ")[1:]
    assert len(parts) == 2
    for part in parts:
        head, *lines, verdict = part.rstrip("\n").split("\n")
        assert head.endswith("network calls")
        assert [len(line) for line in lines] == [9] * 5  # 4 rows, and a line between the boxes
        cells = _grid("".join(lines))
        assert all(given in (".", cell) for given, cell in zip(PUZZLE, cells, strict=True))
        assert "valid" in verdict


def test_the_library_does_the_same(monkeypatch, model):
    printed = _run(monkeypatch, model, infill=ROWS, num_samples=2, seed=3)
    for text in fs.generate(model, infill=PUZZLE, num_samples=2, sampling=Sampling(2), seed=3):
        assert text in printed


def test_files_of_puzzles(monkeypatch, model, tmp_path):
    path = tmp_path / "puzzles.jsonl"
    path.write_text(json.dumps({"infill": PUZZLE}) + "\n" + json.dumps({"infill": ROWS}) + "\n")
    first, second = map(
        json.loads, _run(monkeypatch, model, batch_file=str(path)).splitlines()[::4]
    )
    assert (first["infill"], second["infill"]) == (PUZZLE, ROWS)
    assert len(first["tokens"]) == 16
    path.write_text(json.dumps({"infill": PUZZLE}) + "\n" + json.dumps({"infill": "12"}) + "\n")
    with pytest.raises(ValueError, match="line 2: a 4x4 puzzle has 16 cells, got 2"):
        _run(monkeypatch, model, batch_file=str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PUZZLE[:-1], "a 4x4 puzzle has 16 cells, got 15"),
        (PUZZLE + ".", "a 4x4 puzzle has 16 cells, got 17"),
        ("", "a 4x4 puzzle has 16 cells, got 0"),
        ("5" + PUZZLE[1:], "digit out of range in a 4x4 puzzle: '5' in cell 1"),
        ("x" + PUZZLE[1:], "unexpected character in a 4x4 puzzle: 'x' in cell 1"),
        ("11" + PUZZLE[2:], "contradictory givens: digit 1 occurs more than once in row 1"),
        ("123...4.........", "contradictory givens: the puzzle has no solution"),
        (SOLVED, "the 4x4 puzzle has no blank cell"),
    ],
)
def test_bad_puzzles_are_told_in_one_line(monkeypatch, model, text, message):
    with pytest.raises(ValueError, match=message) as told:
        _run(monkeypatch, model, infill=text)
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=message):
        fs.generate(model, infill=text)


def test_samples_say_whether_they_are_valid():
    tokens = np.array([int(digit) - 1 for digit in SOLVED] + [4])
    assert puzzles.format_sample(FOUR, tokens).endswith("\na valid grid")
    tokens[0] = 4  # the end of the text, in a cell
    shown = puzzles.format_sample(FOUR, tokens)
    assert shown.startswith("? 2 | 3 4\n")
    assert shown.endswith("not valid: 3 of 12 rows, columns and boxes are broken")


def test_a_longer_block_than_the_network_has_positions(monkeypatch, model):
    with pytest.raises(ValueError, match="4x4 Sudoku, which needs blocks of 17 tokens, got 18"):
        _run(monkeypatch, model, length=18)
