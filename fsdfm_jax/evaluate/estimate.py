"""How long the points of a report take, from what the first of them took.

A point costs its network calls, the compilation of its program if no point before it had that
program, and a fixed time for judges, intervals and files. All three are measured while points are
computed, so that the estimate gets better with each of them.
"""

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Work(NamedTuple):
    """What is to be done for a point.

    Attributes:
      calls: network calls times the samples that they are for; 0 where nothing is drawn.
      network: calls of one network take equally long; None where nothing is drawn.
      program: what is compiled once for all points that share it; None where nothing is drawn.
    """

    calls: int = 0
    network: str | None = None
    program: str | None = None


class Cost(NamedTuple):
    """What a point took, in seconds.

    Attributes:
      total: from its beginning to its row.
      call: of one network call for one sample; nan where nothing was drawn.
      compilation: of its program, whether it was compiled for this point or for one before.
    """

    total: float
    call: float = math.nan
    compilation: float = 0.0


class Clock:
    """Estimates the time of points from the costs of others.

    >>> clock = Clock()
    >>> clock.count(Work(40, "net", "4 steps"), Cost(9.0, call=0.1, compilation=4.0))
    >>> clock.count(Work(40, "net", "4 steps"), Cost(5.0, call=0.1, compilation=4.0))
    >>> clock.seconds([Work(40, "net", "4 steps"), Work(80, "net", "8 steps")])
    18.0
    """

    def __init__(self) -> None:
        self._rates: dict[str, tuple[float, int]] = {}  # seconds, calls
        self._compilations: dict[str, float] = {}
        self._fixed: list[float] = []
        self._first: list[float] = []  # the same where things were done for the first time

    def know(self, work: Work, call: float) -> None:
        """Learns how long a network call takes from a point that was computed earlier."""
        if work.network is not None and math.isfinite(call):
            seconds, calls = self._rates.get(work.network, (0.0, 0))
            self._rates[work.network] = seconds + call * work.calls, calls + work.calls

    def count(self, work: Work, cost: Cost) -> None:
        """Learns from a point that was just computed."""
        self.know(work, cost.call)
        rest = cost.total - (work.calls * cost.call if work.calls else 0.0)
        if work.program is None or work.program in self._compilations:
            self._fixed.append(max(rest, 0.0))
            return
        self._first.append(max(rest - cost.compilation, 0.0))
        # The compiler's time and more, as tracing; in the first point reading the model is in it.
        others = rest - self.fixed if self._fixed else 0.0
        self._compilations[work.program] = max(cost.compilation, others)

    @property
    def fixed(self) -> float:
        """Seconds of a point besides its network calls and compilation; nan before any is known."""
        # What is done once in a process, as opening a model, is in the first ones.
        return _mean(self._fixed) if self._fixed else min(self._first, default=math.nan)

    def call(self, network: str) -> float:
        """Seconds of a network call for one sample; of all networks where this one is unknown."""
        known = self._rates
        rates = [known[network]] if network in known else [*known.values()]
        seconds, calls = (sum(part) for part in zip(*rates, strict=True)) if rates else (0.0, 0)
        return seconds / calls if calls else math.nan

    def seconds(self, works: Iterable[Work]) -> float:
        """Of points that aren't computed yet; nan where too little is known."""
        works = list(works)
        if not works:
            return 0.0
        calls = sum(work.calls * self.call(work.network) for work in works if work.network)
        return calls + self.compilation(works) + len(works) * self.fixed

    def compilation(self, works: Iterable[Work]) -> float:
        """Seconds to compile the programs that points need and that aren't compiled yet."""
        new = {work.program for work in works} - {None} - self._compilations.keys()
        return len(new) * _mean(list(self._compilations.values())) if new else 0.0


def pilots(works: Mapping[Key, Work]) -> list[Key]:
    """The points to compute first, in order: after them the time of all others can be estimated.

    The one with the fewest calls, and a second one of its program, which shows what a point costs
    that has nothing to compile. One of more calls, halfway in their logarithm to the most: a short
    call is no measure of a long one where the machine is busy. Then one of each other network.
    """
    drawn = sorted((key for key, work in works.items() if work.calls), key=lambda k: works[k].calls)
    if not drawn:
        return []
    of_network: dict[str | None, Key] = {}
    for key in drawn:
        of_network.setdefault(works[key].network, key)
    first, *others = of_network.values()
    own = [key for key in drawn[1:] if works[key].network == works[first].network and key != first]
    again = [key for key in own if works[key].program == works[first].program]
    halfway = math.sqrt(works[first].calls * works[own[-1]].calls) if own else 0.0
    more = [key for key in own if key not in again and works[key].calls <= halfway]
    most = max((works[key].calls for key in more), default=0)
    middle = [key for key in more if works[key].calls == most]
    return [first, *again[:1], *middle[:1], *others]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
