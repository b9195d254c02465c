"""Sudoku models: puzzles as infill texts, and samples as grids.

A puzzle is written as digits with "." for a blank cell, with or without line breaks, see
`exact.sudoku.parse_puzzle`. The model gets its digits as given tokens, so a valid grid solves it.
Sudoku models are recognised by their tokenizer and block length.
"""

import numpy as np

from fsdfm_jax.exact import sudoku
from fsdfm_jax.exact.sudoku import Sudoku


def to_infill(size: Sudoku, text: str) -> str:
    """Convert a puzzle to an infill text.

    Raises:
      ValueError: for a wrong length, a digit out of range, conflicting givens or no blank cell.
    """
    puzzle = sudoku.parse_puzzle(size, text)
    if (puzzle != sudoku.BLANK).all():
        raise ValueError(
            f"the {size.name} puzzle has no blank cell to solve; write '.' for the cells to fill in"
        )
    return sudoku.to_infill(puzzle)


def format_sample(size: Sudoku, tokens_L: np.ndarray) -> str:
    """Format a sample for display: its grid, and whether it is valid.

    Args:
      size: of the grid.
      tokens_L: int [L], its cells first.
    """
    cells = tokens_L[: size.num_cells]
    broken = int((~sudoku.satisfied(size, cells[None])).sum())
    verdict = "a valid grid"
    if broken:
        verdict = f"not valid: {broken} of {3 * size.n} rows, columns and boxes are broken"
    return f"{sudoku.format_grid(size, cells)}\n{verdict}"
