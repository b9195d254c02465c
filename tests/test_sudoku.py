"""Puzzles as text, the rules, the solver, puzzles with one solution, one error for each fault."""

import itertools

import numpy as np
import pytest

from fsdfm_jax.data import tokenizer
from fsdfm_jax.exact import documents, grids, sudoku
from fsdfm_jax.inference import prompts

FOUR, SIX, NINE = sudoku.SIZES.values()
EACH = pytest.mark.parametrize("size", [FOUR, SIX, NINE], ids=lambda size: size.name)
PUZZLE = "134. ..1. 2..4 ...."
SOLVED = np.array([1, 3, 4, 2, 4, 2, 1, 3, 2, 1, 3, 4, 3, 4, 2, 1]) - 1  # of it


def _grid(size, seed=0):
    return grids.sample(size, np.random.default_rng(seed), 1)[0]


def test_sizes():
    assert [size.name for size in (FOUR, SIX, NINE)] == ["4x4", "6x6", "9x9"]
    assert [size.block_length for size in (FOUR, SIX, NINE)] == [17, 37, 82]
    assert sudoku.get_size("6x6") is SIX
    with pytest.raises(ValueError, match="'8x8'; expected one of 4x4, 6x6, 9x9"):
        sudoku.get_size("8x8")


def test_boxes_of_six_have_two_rows_and_three_columns():
    assert SIX.groups[12].tolist() == [0, 1, 2, 6, 7, 8]
    assert SIX.groups[15].tolist() == [15, 16, 17, 21, 22, 23]
    assert [SIX.group_name(i) for i in (0, 7, 17)] == ["row 1", "column 2", "box 6"]


@EACH
def test_each_cell_is_in_three_groups_of_each_digit(size):
    assert (np.bincount(size.groups.ravel()) == 3).all()
    assert sudoku.satisfied(size, _grid(size)[None]).all()


def test_broken_rules_are_seen_where_they_are():
    grid = _grid(SIX).reshape(6, 6)
    swapped = grid.copy()
    swapped[[0, 1]] = grid[[1, 0]]  # within a band: still valid
    assert sudoku.satisfied(SIX, swapped.reshape(1, -1)).all()
    swapped[[0, 2]] = swapped[[2, 0]]  # across bands: only boxes break
    wrong = np.flatnonzero(~sudoku.satisfied(SIX, swapped.reshape(1, -1))[0])
    assert len(wrong)
    assert (wrong >= 12).all()
    ids = grid.reshape(1, -1).copy()
    ids[0, 0] = SIX.eos_id
    wrong = np.flatnonzero(~sudoku.satisfied(SIX, ids)[0])
    assert [SIX.group_name(i) for i in wrong] == ["row 1", "column 1", "box 1"]


# --------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "text",
    [
        PUZZLE,
        "134...1.2..4....",
        "1340001_2004____",
        "1 3 | 4 .\n. . | 1 .\n----+----\n2 . | . 4\n. . | . .",
        "134[3]1[1]2[2]4[4]",
    ],
)
def test_puzzles_are_read_in_all_spellings(text):
    puzzle = sudoku.parse_puzzle(FOUR, text)
    assert sudoku.to_text(puzzle) == "134...1.2..4...."
    assert puzzle[:4].tolist() == [0, 2, 3, sudoku.BLANK]
    np.testing.assert_array_equal(sudoku.solve(FOUR, puzzle), [SOLVED])


@EACH
def test_printed_grids_and_infill_texts_are_read_back(size):
    grid = _grid(size)
    puzzle = np.where(np.arange(size.num_cells) % 3 == 0, sudoku.BLANK, grid)
    for cells in (grid, puzzle):
        np.testing.assert_array_equal(
            sudoku.parse_puzzle(size, sudoku.format_grid(size, cells)), cells
        )
    np.testing.assert_array_equal(sudoku.parse_puzzle(size, sudoku.to_infill(puzzle)), puzzle)


def test_a_grid_is_printed_in_boxes():
    cells = np.tile(np.arange(6), 6)
    lines = sudoku.format_grid(SIX, cells).split("\n")
    assert lines[:3] == ["1 2 3 | 4 5 6", "1 2 3 | 4 5 6", "------+------"]
    assert len(lines) == 8


def test_an_infill_text_is_the_puzzle_to_generate():
    tokens = tokenizer.from_json(documents.sudoku_tokenizer(FOUR), "tokenizer.json")
    puzzle = sudoku.parse_puzzle(FOUR, PUZZLE)
    template = prompts.infill(sudoku.to_infill(puzzle), tokens, FOUR.block_length)
    assert template.shown == FOUR.num_cells
    np.testing.assert_array_equal(template.frozen_L[:-1], puzzle != sudoku.BLANK)
    np.testing.assert_array_equal(template.given_L[template.frozen_L], puzzle[puzzle >= 0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1234", "has 16 cells, got 4"),
        ("." * 17, "has 16 cells, got 17"),
        ("5" + "." * 15, "digit out of range in a 4x4 puzzle: '5' in cell 1"),
        ("...x" + "." * 12, "unexpected character in a 4x4 puzzle: 'x' in cell 4"),
        ("²" + "." * 15, "unexpected character"),
        ("1..1" + "." * 12, "digit 1 occurs more than once in row 1"),
        ("1..." + "1..." + "." * 8, "digit 1 occurs more than once in column 1"),
        ("2..." + ".2.." + "." * 8, "digit 2 occurs more than once in box 1"),
        ("12.." + "..3." + "...." + "...4", "contradictory givens: the puzzle has no solution"),
    ],
)
def test_one_clear_error_for_each_fault(text, message):
    with pytest.raises(ValueError, match=message):
        sudoku.parse_puzzle(FOUR, text)


@EACH
def test_a_model_is_recognised_by_its_tokenizer_and_length(size):
    tokens = tokenizer.from_json(documents.sudoku_tokenizer(size), "tokenizer.json")
    assert sudoku.recognise(tokens.vocabulary, size.block_length) is size
    with pytest.raises(ValueError, match=rf"{size.name} Sudoku.*{size.block_length} tokens, got 8"):
        sudoku.recognise(tokens.vocabulary, 8)
    assert sudoku.recognise(tokens.vocabulary | {"10": size.n + 1}, size.block_length) is None


# ----------------------------------------------------------------------------- solver and puzzles


def test_solver_finds_what_trying_all_grids_finds():
    known, rng = grids.all_grids(FOUR), np.random.default_rng(0)
    for givens, _ in itertools.product((3, 4, 6), range(20)):
        puzzle = np.full(16, sudoku.BLANK)
        cells = rng.choice(16, givens, replace=False)
        puzzle[cells] = known[rng.integers(288)][cells]
        fitting = known[((known == puzzle) | (puzzle == sudoku.BLANK)).all(1)]
        found = sudoku.solve(FOUR, puzzle, limit=1000)
        assert {g.tobytes() for g in found} == {g.tobytes() for g in fitting}
        assert len(sudoku.solve(FOUR, puzzle, limit=2)) == min(2, len(fitting))


@EACH
def test_puzzles_have_one_solution_and_the_givens_asked_for(size):
    rng, givens = np.random.default_rng(0), sudoku.DEFAULT_GIVENS[size.name]
    solutions = grids.sample(size, rng, 5)
    puzzles = sudoku.make_puzzles(size, rng, solutions, givens)
    assert ((puzzles != sudoku.BLANK).sum(1) == givens).all()
    for puzzle, solution in zip(puzzles, solutions, strict=True):
        np.testing.assert_array_equal(sudoku.solve(size, puzzle), [solution])
    assert len({tuple(np.flatnonzero(p == sudoku.BLANK)) for p in puzzles}) > 1


@pytest.mark.parametrize(("size", "givens"), [(FOUR, 3), (SIX, 7), (NINE, 16), (FOUR, 16)])
def test_impossible_numbers_of_givens_are_refused(size, givens):
    with pytest.raises(ValueError, match=f"givens, got {givens}"):
        sudoku.make_puzzles(size, np.random.default_rng(0), _grid(size)[None], givens)


def test_givens_that_are_not_found_are_said(monkeypatch):
    monkeypatch.setattr(sudoku, "_TRIES", 1)
    with pytest.raises(ValueError, match="no puzzle with 17 givens found in 1 tries.*as 32"):
        sudoku.make_puzzles(NINE, np.random.default_rng(0), _grid(NINE)[None], 17)
