"""How long an evaluation takes: what is learnt from each point, and which are computed first."""

import doctest
import math

import pytest

from fsdfm_jax.evaluate import estimate
from fsdfm_jax.evaluate.estimate import Clock, Cost, Work


def _cost(work, *, call, fixed, compilation, new):
    """What a point takes where calls, compilation and the rest take just these seconds."""
    return Cost(work.calls * call + fixed + new * compilation, call, compilation)


def test_the_example():
    assert doctest.testmod(estimate).failed == 0


def test_nothing_is_known_at_first_and_nothing_takes_no_time():
    assert Clock().seconds([]) == 0
    assert math.isnan(Clock().seconds([Work()]))
    assert math.isnan(Clock().seconds([Work(8, "net", "8 steps")]))


def test_three_points_tell_the_time_of_all():
    """Exact where calls, programs and points each take a time of their own."""
    works = {
        (steps, seed): Work(16 * steps, "net", f"{steps} steps")
        for steps in (1, 2, 4, 1024)
        for seed in range(3)
    }
    takes = {"call": 0.01, "fixed": 0.7, "compilation": 5.0}
    first = estimate.pilots(works)
    assert first == [(1, 0), (1, 1), (4, 0)]
    clock = Clock()
    for key in first:
        clock.count(works[key], _cost(works[key], new=key[1] == 0, **takes))
    rest = [work for key, work in works.items() if key not in first]
    truth = sum(work.calls for work in rest) * 0.01 + len(rest) * 0.7 + 2 * 5.0
    assert clock.seconds(rest) == pytest.approx(truth)


def test_what_is_done_once_is_not_taken_for_what_each_point_takes():
    clock, work = Clock(), Work(10, "net", "a")
    clock.count(work, Cost(60.0, 0.1, 9.0))  # reads the model
    assert clock.fixed == pytest.approx(50.0)
    clock.count(work, Cost(1.5, 0.1, 9.0))
    assert clock.fixed == pytest.approx(0.5)


def test_what_comes_with_a_new_program_counts_as_its_compilation():
    clock = Clock()
    for total in (60.0, 2.0):  # the first reads the model
        clock.count(Work(10, "net", "a"), Cost(total, 0.1, 4.0))
    clock.count(Work(10, "net", "b"), Cost(12.0, 0.1, 4.0))
    assert clock.fixed == pytest.approx(1.0)
    new = clock.seconds([Work(10, "net", "c")]) - clock.seconds([Work(10, "net", "a")])
    assert new == pytest.approx((4.0 + 10.0) / 2)


def test_a_program_is_compiled_once():
    clock = Clock()
    clock.count(Work(10, "net", "a"), Cost(5.0, 0.1, 4.0))
    clock.count(Work(10, "net", "a"), Cost(1.0, 0.1, 4.0))
    more = [Work(10, "net", name) for name in ("a", "b", "b", "c")]
    assert clock.seconds(more) == pytest.approx(4 * 1.0 + 2 * 4.0)
    assert clock.compilation(more) == pytest.approx(2 * 4.0)


def test_networks_have_speeds_of_their_own_and_stored_points_tell_them():
    clock = Clock()
    clock.know(Work(1000, "slow", "a"), 0.2)
    clock.know(Work(1000, "fast", "a"), 0.1)
    clock.know(Work(), math.nan)
    assert (clock.call("slow"), clock.call("fast")) == (0.2, 0.1)
    assert clock.call("other") == pytest.approx(0.15)
    assert clock.seconds([Work(10, "slow", "a")]) != clock.seconds([])


def test_each_network_is_tried_at_its_fewest_calls():
    works = {
        "text": Work(),
        "a8": Work(80, "a", "a 8"),
        "a1": Work(10, "a", "a 1"),
        "b": Work(50, "b", "b 5"),
        "a1 again": Work(10, "a", "a 1"),
    }
    assert estimate.pilots(works) == ["a1", "a1 again", "b"]
    assert estimate.pilots({"text": Work()}) == []
