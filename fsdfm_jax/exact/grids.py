"""Exactly uniform Sudoku grids of all three sizes.

4x4 and 6x6. Relabelling digits maps grids to grids, and exactly one relabelling gives the first row
1 2 .. n. So a uniform grid is a uniform one with that first row (12 for 4x4, 39,168 for 6x6, all
enumerated) under a uniform relabelling.

9x9, by rejection. Relabelled so that the upper left box is 1 2 3 / 4 5 6 / 7 8 9, a grid is

    B1 B2 B3        A box is two partitions of the nine digits into three triples, by rows and by
    B4 B5 B6        columns. They must cross: each triple of one meets each of the other once.
    B7 B8 B9

The upper band (B2, B3) and the left stack (B4, B7) have 56·216² = 2,612,736 possibilities each and
are drawn uniformly and independently. The number N of their completions is counted exactly. The
rows of B5 are one of 56 partitions, given those of B4, and determine those of B6. Likewise the
columns of B5, given B2, determine those of B8. The same holds for the rows of B8 and the columns of
B6. With indices a, b, e, f for these,

    N = sum over a, b, e, f of X5(a,b) X6(a,f) X8(e,b) X9(e,f)
      = sum over a, e of #{b: X5(a,b) X8(e,b)} #{f: X6(a,f) X9(e,f)},    X = 1 if they cross.

Band and stack are accepted with probability N / `MOST_COMPLETIONS`, and one of the N completions is
drawn, so every grid has the same probability. The sum of N over all bands and stacks is the number
of grids over 9!. `count_all` computes it, and the largest N.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from fsdfm_jax.exact.sudoku import Sudoku

# The largest N, from `count_all`; N is 2,693 on average and at least 1,152.
MOST_COMPLETIONS = 11_664
_CHUNK = 512  # 9x9: bands and stacks per batch


def sample(size: Sudoku, rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw independent grids, each uniform over all valid ones.

    Returns:
      int8 [N, n²], ids 0..n-1.
    """
    if count < 0:
        raise ValueError(f"the number of grids must be at least 0, got {count}")
    if size.n == 9:
        drawn = _draw_nine(rng, count)
    else:
        listed = _with_first_row(size)
        drawn = listed[rng.integers(len(listed), size=count)]
    labels = rng.permuted(np.tile(np.arange(size.n, dtype=np.int8), (count, 1)), axis=1)
    return np.take_along_axis(labels, drawn.astype(np.intp), axis=1)


def all_grids(size: Sudoku) -> np.ndarray:
    """Return all 4x4 grids, int8 [288, 16].

    Raises:
      ValueError: for other sizes, which have too many grids.
    """
    if size.n != 4:
        raise ValueError(f"only 4x4 grids can be enumerated, got {size.name}; use sample()")
    labels = np.array(list(itertools.permutations(range(4))), np.int8)
    return labels[:, _with_first_row(size)].reshape(size.num_grids, size.num_cells)


@functools.lru_cache
def _with_first_row(size: Sudoku) -> np.ndarray:
    """Return all grids with first row 0..n-1, int8 [num_grids / n!, n²]."""
    rows = np.array(list(itertools.permutations(range(size.n))), np.int8)
    same_column = (rows[:, None] == rows[None]).any(-1)
    boxes = rows.reshape(len(rows), -1, size.box_cols)
    bits = np.bitwise_or.reduce(1 << boxes.astype(np.int64), axis=-1)
    same_box = ((bits[:, None] & bits[None]) != 0).any(-1)
    grids = np.zeros((1, 1), np.intp)  # indices of rows
    for row in range(1, size.n):
        first = row - row % size.box_rows  # of its band
        clash = np.zeros((len(grids), len(rows)), bool)
        for above in range(row):
            clash |= (same_box | same_column if above >= first else same_column)[grids[:, above]]
        which, following = np.nonzero(~clash)
        grids = np.concatenate([grids[which], following[:, None]], axis=1)
    return rows[grids].reshape(-1, size.num_cells)


# ---------------------------------------------------------------------------------------------- 9x9


class Partitions(NamedTuple):
    """The 1,680 ordered partitions of nine digits into triples, and their relations.

    Attributes:
      triple: int8 [1680, 9], the triple (0, 1, 2) of each digit.
      index: int [3^9], sum(triple * 3^digit) -> partition, or -1.
      crosses: bool [1680, 1680], whether each triple of one meets each of the other in one digit.
      crossing: int [1680, 216], the partitions that cross each partition.
      second: int [1680, 56], the partitions that share no digit with it, triple by triple.
      third: int [1680, 56], the remaining digits of each triple for each `second`.
      crosses_second: uint64 [1680, 1680], bit j of [p, q]: p crosses second[q, j].
      crosses_third: the same for third[q, j].
    """

    triple: np.ndarray
    index: np.ndarray
    crosses: np.ndarray
    crossing: np.ndarray
    second: np.ndarray
    third: np.ndarray
    crosses_second: np.ndarray
    crosses_third: np.ndarray


@functools.lru_cache
def partitions() -> Partitions:
    """Make the tables, once (22 MiB for each of the last two)."""
    orders = set(itertools.permutations([0, 0, 0, 1, 1, 1, 2, 2, 2]))
    triple = np.array(sorted(orders), np.int8)
    index = np.full(3**9, -1)
    index[_code(triple)] = np.arange(len(triple))
    met = np.zeros((len(triple), len(triple)), np.int64)
    apart = np.ones(met.shape, bool)
    for column in triple.T.astype(np.int64):
        met |= 1 << (3 * column[:, None] + column)
        apart &= column[:, None] != column
    crosses = met == 2**9 - 1
    second = np.nonzero(apart)[1].reshape(len(triple), 56)
    third = index[_code(3 - triple[:, None] - triple[second])]
    return Partitions(
        triple=triple,
        index=index,
        crosses=crosses,
        crossing=np.nonzero(crosses)[1].reshape(len(triple), 216),
        second=second,
        third=third,
        crosses_second=_pack(crosses, second),
        crosses_third=_pack(crosses, third),
    )


def _code(triple: np.ndarray) -> np.ndarray:
    return triple @ 3 ** np.arange(9)


def _pack(crosses: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bit j of [p, q] is crosses[p, columns[q, j]], uint64."""
    packed = np.empty(crosses.shape, np.uint64)
    bits = np.zeros((len(crosses), 64), np.uint8)
    for q, chosen in enumerate(columns):
        bits[:, : columns.shape[1]] = crosses[:, chosen]
        packed[:, q] = np.packbits(bits, axis=1, bitorder="little").view("<u8")[:, 0]
    return packed


class Frame(NamedTuple):
    """Upper bands and left stacks for the box 123/456/789, as indices of partitions, int [M].

    Attributes:
      rows2, columns2: of B2; rows3, columns3: of B3.
      columns4, rows4: of B4; columns7, rows7: of B7.
    """

    rows2: np.ndarray
    columns2: np.ndarray
    rows3: np.ndarray
    columns3: np.ndarray
    columns4: np.ndarray
    rows4: np.ndarray
    columns7: np.ndarray
    rows7: np.ndarray


def first_box() -> tuple[int, int]:
    """Return the partitions of 123/456/789 by rows and by columns."""
    digits = np.arange(9)
    rows, columns = partitions().index[_code(np.stack([digits // 3, digits % 3]))]
    return int(rows), int(columns)


def draw_frames(rng: np.random.Generator, count: int) -> Frame:
    """Draw independent frames, uniform over all 2,612,736²."""
    table = partitions()
    fields: list[np.ndarray] = []
    for start in first_box():  # the band continues its rows, the stack its columns
        choice = rng.integers(56, size=count)
        for along in (table.second[start, choice], table.third[start, choice]):
            fields += [along, table.crossing[along, rng.integers(216, size=count)]]
    return Frame(*fields)


def _crossings(frame: Frame) -> tuple[np.ndarray, ...]:
    """X5 [M, a] over b, X6 [M, a] over f, X8 [M, e] over b, X9 [M, e] over f, as uint64 bits."""
    table = partitions()
    columns2, columns3 = frame.columns2[:, None], frame.columns3[:, None]
    return (
        table.crosses_second[table.second[frame.rows4], columns2],
        table.crosses_second[table.third[frame.rows4], columns3],
        table.crosses_third[table.second[frame.rows7], columns2],
        table.crosses_third[table.third[frame.rows7], columns3],
    )


def completions(frame: Frame) -> np.ndarray:
    """Number of completions of each frame with rows a of B5 and e of B8: [M, a, e]."""
    x5, x6, x8, x9 = _crossings(frame)
    left = np.bitwise_count(x5[:, :, None] & x8[:, None])
    return left.astype(np.uint16) * np.bitwise_count(x6[:, :, None] & x9[:, None])


def _draw_nine(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw uniform grids with first box 123/456/789, int8 [N, 81]."""
    kept = [np.empty((0, 81), np.int8)]
    while (missing := count - sum(map(len, kept))) > 0:
        frame = draw_frames(rng, _CHUNK)
        ways = completions(frame)
        total = ways.sum((1, 2), dtype=np.int64)
        if total.max() > MOST_COMPLETIONS:
            raise RuntimeError(f"{total.max()} completions; the bound {MOST_COMPLETIONS} is wrong")
        accepted = rng.random(_CHUNK) * MOST_COMPLETIONS < total
        u_M3 = rng.random((_CHUNK, 3))
        frame = Frame(*(field[accepted] for field in frame))
        kept.append(_complete(frame, ways[accepted], u_M3[accepted])[:missing])
    return np.concatenate(kept)


def _complete(frame: Frame, ways: np.ndarray, u_M3: np.ndarray) -> np.ndarray:
    """Draw one of the completions of each frame uniformly, with three numbers in [0, 1)."""
    table, each = partitions(), np.arange(len(ways))
    flat = ways.reshape(len(ways), -1).cumsum(1, dtype=np.int64)
    a, e = np.divmod((flat <= u_M3[:, :1] * flat[:, -1:]).sum(1), ways.shape[2])
    x5, x6, x8, x9 = _crossings(frame)
    b = _pick_bit(x5[each, a] & x8[each, e], u_M3[:, 1])
    f = _pick_bit(x6[each, a] & x9[each, e], u_M3[:, 2])
    second, third = table.second, table.third
    first_rows, first_columns = (np.full(len(each), p) for p in first_box())
    boxes = (  # (rows, columns) of B1 .. B9
        (first_rows, first_columns),
        (frame.rows2, frame.columns2),
        (frame.rows3, frame.columns3),
        (frame.rows4, frame.columns4),
        (second[frame.rows4, a], second[frame.columns2, b]),
        (third[frame.rows4, a], second[frame.columns3, f]),
        (frame.rows7, frame.columns7),
        (second[frame.rows7, e], third[frame.columns2, b]),
        (third[frame.rows7, e], third[frame.columns3, f]),
    )
    grids = np.full((len(each), 9, 9), -1, np.int8)
    for box, (rows, columns) in enumerate(boxes):
        down = 3 * (box // 3) + table.triple[rows]
        across = 3 * (box % 3) + table.triple[columns]
        grids[each[:, None], down, across] = np.arange(9)
    return grids.reshape(-1, 81)


def _pick_bit(bits: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Draw one of the set bits of each number, with u in [0, 1)."""
    places = np.arange(64, dtype=np.uint64)
    is_set = (bits[:, None] >> places) & np.uint64(1)
    wanted = np.floor(u * np.bitwise_count(bits))
    return (is_set.cumsum(1) <= wanted[:, None]).sum(1)


def count_all() -> tuple[int, int, int]:
    """Count the completions of all frames, in 10 to 15 minutes on one core.

    Frames that are equivalent by symmetry are counted once: N doesn't depend on the order of the
    columns in B2 and B3, or on the order of B2 and B3, or (summed over all stacks) on the order of
    rows and columns in B1; likewise for stacks.

    Returns:
      (number of grids, the smallest N, the largest N).
    """
    table = partitions()
    first_rows, _ = first_box()
    orders = list(itertools.permutations(range(3)))
    alike = table.index[_code(np.array([np.array(o)[table.triple] for o in orders]))].min(0)
    # Frequency of each pair (columns2, columns3), over rows2.
    often = np.zeros(table.crosses.shape, np.int64)
    for p, q in zip(table.second[first_rows], table.third[first_rows], strict=True):
        often[np.ix_(table.crossing[p], table.crossing[q])] += 1
    names = np.unique(alike)
    pairs = [(p, q) for p in names for q in names if p <= q and often[p, q]]
    weights = np.array([often[p, q] * 36 * (1 + (p != q)) for p, q in pairs])

    moves = []  # maps of partitions under reordering of rows and columns of B1
    for down, across in itertools.product(orders, orders):
        digits = [3 * down[d // 3] + across[d % 3] for d in range(9)]
        moves.append(alike[table.index[_code(table.triple[:, np.argsort(digits)])]])
    bands: dict[tuple[int, int], int] = {}
    for (p, q), weight in zip(pairs, weights, strict=True):
        name = min(tuple(sorted((int(move[p]), int(move[q])))) for move in moves)
        bands[name] = bands.get(name, 0) + int(weight)

    turned = table.index[_code(table.triple[:, [3 * (d % 3) + d // 3 for d in range(9)]])]
    rows4, rows7 = turned[np.array(pairs)].T
    total, fewest, most = 0, 2**62, 0
    for (p, q), weight in bands.items():
        for start in range(0, len(pairs), 256):
            part = slice(start, start + 256)
            none = np.zeros(len(rows4[part]), np.int64)
            frame = Frame(none, none + p, none, none + q, none, rows4[part], none, rows7[part])
            found = completions(frame).sum((1, 2), dtype=np.int64)
            total += weight * int(found @ weights[part])
            fewest, most = min(fewest, int(found.min())), max(most, int(found.max()))
    return total * 362_880, fewest, most
