"""Cases of a parametrised test that only `-m slow` runs."""

from collections.abc import Collection, Hashable, Iterable

import pytest


def slow_except(quick: Collection[Hashable], cases: Iterable[Hashable]) -> list:
    """Mark all cases but the `quick` ones as slow."""
    cases = list(cases)
    unknown = set(quick) - set(cases)
    assert not unknown, f"no such cases: {unknown}"
    return [c if c in quick else pytest.param(c, marks=pytest.mark.slow) for c in cases]
