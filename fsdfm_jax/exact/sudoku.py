"""Sudoku in three sizes: grids and puzzles as text, a solver, puzzles with one solution.

    size   boxes (rows x columns)   grids
    4x4    2x2                      288
    6x6    2x3                      28,200,960
    9x9    3x3                      6,670,903,752,021,072,936,960

Arrays store digits as token ids: digit d is id d-1, and a blank cell of a puzzle is -1. A grid is a
document of n² digits, row by row; with the end-of-text token (id n) it fills a block of n²+1
tokens. A puzzle has the same order with "." (or 0, _) for a blank cell. White space, "|" and lines
of "-" and "+" are ignored, so that printed grids can be parsed.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable

import numpy as np

BLANK = -1
_BLANKS = ".0_"
_GAP = re.compile(r"\[(\d{1,4})\]")  # n blank cells, as in infill texts
_RULE = re.compile(r"^[\s|]*-[-+|\s]*$", re.MULTILINE)
# Minimum givens of a puzzle with one solution (9x9: arXiv:1201.0749).
_FEWEST_GIVENS = {"4x4": 4, "6x6": 8, "9x9": 17}
# Givens of evaluation puzzles: few enough to be hard, many enough to be found quickly.
DEFAULT_GIVENS = {"4x4": 5, "6x6": 12, "9x9": 32}
_TRIES = 200  # maximum attempts per puzzle


@dataclasses.dataclass(frozen=True)
class Sudoku:
    """A size of Sudoku.

    Attributes:
      box_rows, box_cols: of a box; their product is n, the number of digits.
      num_grids: number of valid grids.
    """

    box_rows: int
    box_cols: int
    num_grids: int

    @property
    def n(self) -> int:
        """Number of digits, rows, columns and boxes."""
        return self.box_rows * self.box_cols

    @property
    def name(self) -> str:
        """Name, such as "6x6"."""
        return f"{self.n}x{self.n}"

    @property
    def num_cells(self) -> int:
        """n²."""
        return self.n**2

    @property
    def block_length(self) -> int:
        """Tokens of a document: its cells and end-of-text."""
        return self.num_cells + 1

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token, after the digits."""
        return self.n

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """Cells of each row, column and box, in this order: int [3n, n]."""
        cells = np.arange(self.num_cells).reshape(self.n, self.n)
        boxes = cells.reshape(self.n // self.box_rows, self.box_rows, -1, self.box_cols)
        return np.concatenate([cells, cells.T, boxes.swapaxes(1, 2).reshape(self.n, self.n)])

    def group_name(self, index: int) -> str:
        """Name of a row of `groups`, such as "row 1"."""
        return f"{('row', 'column', 'box')[index // self.n]} {index % self.n + 1}"


SIZES = {
    size.name: size
    for size in (
        Sudoku(2, 2, 288),
        Sudoku(2, 3, 28_200_960),
        Sudoku(3, 3, 6_670_903_752_021_072_936_960),
    )
}


def get_size(name: str) -> Sudoku:
    """Get the size "4x4", "6x6" or "9x9"; ValueError for another name."""
    if name not in SIZES:
        raise ValueError(f"unknown Sudoku size {name!r}; expected one of {', '.join(SIZES)}")
    return SIZES[name]


def recognise(vocabulary: dict[str, int], length: int) -> Sudoku | None:
    """Recognise a size by its tokenizer and block length; None for other tasks.

    Args:
      vocabulary: token -> id.
      length: tokens per block.

    Raises:
      ValueError: if the block length doesn't match the grid size of the tokenizer.
    """
    for size in SIZES.values():
        digits = {str(d + 1): d for d in range(size.n)}
        if vocabulary == {**digits, "<|endoftext|>": size.eos_id}:
            if length != size.block_length:
                raise ValueError(
                    f"the tokenizer is for {size.name} Sudoku, which needs blocks of "
                    f"{size.block_length} tokens, got {length}; use that length, or the tokenizer "
                    f"of another size ({', '.join(SIZES)})"
                )
            return size
    return None


# ------------------------------------------------------------------------------------ grids as text


def parse_puzzle(size: Sudoku, text: str) -> np.ndarray:
    """Parse a puzzle, see the module; "[k]" stands for k blank cells.

    Returns:
      int8 [n²], ids 0..n-1, or -1 for blank cells.

    Raises:
      ValueError: for a wrong length, a digit out of range, another character, or contradictory
        givens, naming the location.
    """
    marks = _GAP.sub(lambda match: "." * int(match.group(1)), _RULE.sub("", text))
    marks = re.sub(r"[\s|]", "", marks)
    for place, mark in enumerate(marks):
        if mark in _BLANKS or ("1" <= mark <= "9" and int(mark) <= size.n):
            continue
        what = "digit out of range" if "1" <= mark <= "9" else "unexpected character"
        raise ValueError(
            f"{what} in a {size.name} puzzle: {mark!r} in cell {place + 1}; write digits 1 to "
            f"{size.n}, and '.' for a blank cell"
        )
    if len(marks) != size.num_cells:
        raise ValueError(
            f"a {size.name} puzzle has {size.num_cells} cells, got {len(marks)}; write "
            f"{size.n} rows of {size.n} digits, with '.' for a blank cell"
        )
    puzzle = np.array([BLANK if m in _BLANKS else int(m) - 1 for m in marks], np.int8)
    check_givens(size, puzzle)
    return puzzle


def check_givens(size: Sudoku, puzzle: np.ndarray) -> None:
    """Check that the givens of a puzzle are consistent.

    Args:
      size: of the puzzle.
      puzzle: int [n²], -1 for blank cells.

    Raises:
      ValueError: a digit occurs twice in a row, column or box, or there is no solution.
    """
    for index, cells in enumerate(size.groups):
        digits, counts = np.unique(puzzle[cells][puzzle[cells] != BLANK], return_counts=True)
        if (counts > 1).any():
            digit = int(digits[counts > 1][0]) + 1
            raise ValueError(
                f"contradictory givens: digit {digit} occurs more than once in "
                f"{size.group_name(index)}; change one of them"
            )
    if not solve(size, puzzle, limit=1):
        raise ValueError("contradictory givens: the puzzle has no solution; change some of them")


def to_text(cells: Iterable[int]) -> str:
    """Format a grid or puzzle as n² digits in one line, "." for blank cells."""
    return "".join("." if c == BLANK else str(int(c) + 1) for c in cells)


def to_infill(puzzle: np.ndarray) -> str:
    """Format a puzzle as an infill text, with [k] for gaps of k tokens."""
    return re.sub(r"\.+", lambda match: f"[{len(match.group())}]", to_text(puzzle))


def format_grid(size: Sudoku, cells: np.ndarray) -> str:
    """Format a grid or puzzle for display, one line per row; "?" for tokens that aren't digits."""
    marks = "".join("?" if c >= size.n else to_text([c]) for c in cells)
    rule = "+".join("-" * (2 * size.box_cols + 1) for _ in range(size.box_rows))[1:-1]
    lines = []
    for row in range(size.n):
        if row and row % size.box_rows == 0:
            lines.append(rule)
        line = marks[row * size.n : (row + 1) * size.n]
        parts = [line[i : i + size.box_cols] for i in range(0, size.n, size.box_cols)]
        lines.append(" | ".join(" ".join(part) for part in parts))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- validity


def satisfied(size: Sudoku, cells_NC: np.ndarray) -> np.ndarray:
    """Return whether each of `Sudoku.groups` has every digit once, bool [N, 3n], in order.

    Args:
      size: of the grids.
      cells_NC: int [N, n²]; groups with ids that aren't digits are not satisfied.
    """
    grouped = np.sort(cells_NC[:, size.groups], axis=-1)
    return (grouped == np.arange(size.n)).all(-1)


def solve(size: Sudoku, puzzle: np.ndarray, limit: int = 2) -> list[np.ndarray]:
    """Find up to `limit` solutions: depth first, the cell with the fewest choices first.

    Args:
      size: of the puzzle.
      puzzle: int [n²], -1 for blank cells; givens must not repeat in a group.
      limit: maximum number of solutions.

    Returns:
      Solutions, int8 [n²] each; may be empty.
    """
    places = _places(size)
    cells = [int(c) for c in puzzle]
    free = [(1 << size.n) - 1] * (3 * size.n)  # bits of the missing digits of each group
    for cell, digit in enumerate(cells):
        if digit != BLANK:
            for group in places[cell]:
                free[group] &= ~(1 << digit)
    blanks = {cell for cell, digit in enumerate(cells) if digit == BLANK}
    found: list[np.ndarray] = []

    def search() -> bool:
        """Search on; return whether enough solutions are found."""
        if not blanks:
            found.append(np.array(cells, np.int8))
            return len(found) >= limit
        best, choices, fewest = -1, 0, size.n + 1
        for cell in blanks:
            a, b, c = places[cell]
            bits = free[a] & free[b] & free[c]
            count = bits.bit_count()
            if count < fewest:
                best, choices, fewest = cell, bits, count
                if count <= 1:
                    break
        blanks.discard(best)
        for digit in range(size.n):
            bit = 1 << digit
            if choices & bit:
                for group in places[best]:
                    free[group] ^= bit
                cells[best] = digit
                done = search()
                for group in places[best]:
                    free[group] ^= bit
                if done:
                    return True
        cells[best] = BLANK
        blanks.add(best)
        return False

    search()
    return found


@functools.lru_cache
def _places(size: Sudoku) -> tuple[tuple[int, ...], ...]:
    """Return the row, column and box of each cell, as indices of `Sudoku.groups`."""
    groups = range(3 * size.n)
    return tuple(tuple(g for g in groups if c in size.groups[g]) for c in range(size.num_cells))


# ------------------------------------------------------------------------------------------ puzzles


def make_puzzle(
    size: Sudoku, rng: np.random.Generator, grid: np.ndarray, givens: int
) -> np.ndarray | None:
    """Clear cells of a grid in random order while it remains the only solution.

    Returns:
      int8 [n²] with `givens` cells left; None if this order doesn't lead to such a puzzle. The
      distribution over puzzles with this number of givens is not uniform.
    """
    puzzle, left = grid.astype(np.int8), size.num_cells
    for cell in rng.permutation(size.num_cells):
        if left == givens:
            break
        digit, puzzle[cell] = puzzle[cell], BLANK
        if len(solve(size, puzzle)) == 1:
            left -= 1
        else:
            puzzle[cell] = digit
    return puzzle if left == givens else None


def check_num_givens(size: Sudoku, givens: int) -> None:
    """Raise ValueError for a number of givens that no puzzle with one solution has."""
    if not _FEWEST_GIVENS[size.name] <= givens < size.num_cells:
        raise ValueError(
            f"a {size.name} puzzle with one solution and a blank cell has "
            f"{_FEWEST_GIVENS[size.name]} to {size.num_cells - 1} givens, got {givens}"
        )


def make_puzzles(
    size: Sudoku, rng: np.random.Generator, grids_NC: np.ndarray, givens: int
) -> np.ndarray:
    """Make a puzzle with one solution from each grid.

    Args:
      size: of the grids.
      rng: random order of clearing cells.
      grids_NC: int [N, n²], the solutions.
      givens: number of cells to keep.

    Returns:
      int8 [N, n²], -1 for blank cells.

    Raises:
      ValueError: for an impossible number of givens, or if no puzzle is found.
    """
    check_num_givens(size, givens)
    puzzles = []
    for grid in grids_NC:
        tries = (make_puzzle(size, rng, grid, givens) for _ in range(_TRIES))
        puzzle = next((p for p in tries if p is not None), None)
        if puzzle is None:
            raise ValueError(
                f"no puzzle with {givens} givens found in {_TRIES} tries; use more givens, such as "
                f"{DEFAULT_GIVENS[size.name]}"
            )
        puzzles.append(puzzle)
    return np.array(puzzles, np.int8).reshape(-1, size.num_cells)
