"""Weighted mixtures of several sources of blocks.

The block at position k of the infinite mixture is a pure function of k. `Mixture.pick` computes its
source and the number of earlier blocks of that source, in exact integer arithmetic.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np


def parse(text: str) -> list[tuple[str, Fraction]]:
    """Parse data.mixture, "DIR=WEIGHT,DIR=WEIGHT", into (folder, weight) pairs.

    Raises:
      ValueError: it doesn't have that form, a weight is not a positive decimal number, or a folder
        occurs twice.
    """
    result: dict[str, Fraction] = {}
    for part in (part.strip() for part in text.split(",") if part.strip()):
        folder, sign, number = part.rpartition("=")
        try:
            weight = Fraction(number.strip())
        except (ValueError, ZeroDivisionError):
            weight = Fraction(0)
        if not sign or not folder.strip() or weight <= 0:
            raise ValueError(
                f"data.mixture: expected DIR=WEIGHT with a weight above 0, got {part!r}"
            )
        if folder.strip() in result:
            raise ValueError(
                f"data.mixture has {folder.strip()} twice; give it once with the sum of the weights"
            )
        result[folder.strip()] = weight
    if not result:
        raise ValueError(f"data.mixture has no DIR=WEIGHT, got {text!r}")
    return list(result.items())


class Mixture:
    """Blocks of several sources, in proportion to weights.

    Training draws from it without end (`data.Batches`). As a sequence it is the largest selection
    without repetition, with the blocks of each source spread evenly over it.

    Args:
      parts: sources of blocks, each with at least one.
      weights: one per source, above 0.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[Fraction]):
        denominator = math.lcm(*(weight.denominator for weight in weights))
        whole = [int(weight * denominator) for weight in weights]
        divisor = math.gcd(*whole)
        self.parts = tuple(parts)
        self._weights = [weight // divisor for weight in whole]
        self._lengths = [len(part) for part in parts]
        self._length = self._most()
        self._counts = self.counts(self._length)

    def pick(self, position: int) -> tuple[int, int]:
        """Return (source, number of its earlier blocks) at a position of the infinite mixture.

        Each source in turn takes floor(k w / W) of the first k positions left by earlier sources,
        where w is its weight and W the sum of its weight and all later ones.
        """
        total = sum(self._weights)
        for i, weight in enumerate(self._weights[:-1]):
            before = position * weight // total
            if (position + 1) * weight // total > before:
                return i, before
            position -= before
            total -= weight
        return len(self._weights) - 1, position

    def counts(self, positions: int) -> list[int]:
        """Number of blocks of each source in the first positions."""
        total, result = sum(self._weights), []
        for weight in self._weights:
            result.append(positions * weight // total)
            positions -= result[-1]
            total -= weight
        return result

    def _most(self) -> int:
        total = sum(self._weights)
        most = min(n * total // w for n, w in zip(self._lengths, self._weights, strict=True))
        # Rounding may give a source one block more than it has.
        while any(c > n for c, n in zip(self.counts(most), self._lengths, strict=True)):
            most -= 1
        return most

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < self._length:
            raise IndexError(f"block {index} of {self._length}")
        part, place = self.pick(index)
        return self.parts[part][place * self._lengths[part] // self._counts[part]]
