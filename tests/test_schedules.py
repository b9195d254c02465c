"""Schedules and their rates against closed forms, automatic differentiation and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsdfm_jax.flow import schedules
from fsdfm_jax.flow.schedules import Cosine, Polynomial, make_schedule

ALL = [Polynomial(1.0), Polynomial(2.0), Polynomial(0.5), Polynomial(3.0), Cosine()]
KAPPA64 = {
    Polynomial(1.0): lambda t: t,
    Polynomial(2.0): lambda t: t**2,
    Polynomial(0.5): np.sqrt,
    Polynomial(3.0): lambda t: t**3,
    Cosine(): lambda t: 1 - np.cos(np.pi * t / 2),
}
TIMES = np.array([0.0, 2**-10, 0.01, 0.125, 0.3, 0.5, 0.75, 0.9, 1 - 2**-10])

every_schedule = pytest.mark.parametrize("schedule", ALL, ids=repr)


@every_schedule
def test_kappa_and_its_ends(schedule):
    np.testing.assert_allclose(schedule.kappa(TIMES), KAPPA64[schedule](TIMES), rtol=1e-5)
    assert schedule.kappa(0.0) == 0
    assert schedule.kappa(1.0) == pytest.approx(1, abs=1e-6)
    assert schedule.remaining(0.0) == pytest.approx(1, abs=1e-6)
    assert schedule.remaining(1.0) == 0
    assert np.all(np.diff(schedule.kappa(np.linspace(0, 1, 257))) > 0)


@every_schedule
def test_remaining_does_not_cancel_near_data(schedule):
    # t as float32 sees it; 1 - kappa in float64 keeps 10 digits there.
    t = np.float32([0.25, 0.9, 0.99, 0.9999, 1 - 2**-20])
    exact = 1 - KAPPA64[schedule](t.astype(np.float64))
    np.testing.assert_allclose(schedule.remaining(t), exact, rtol=1e-5)


@every_schedule
def test_inverse(schedule):
    k = np.linspace(0, 1, 33)
    # Of kappa's slope at worst 3, so a few float32 roundings of t.
    np.testing.assert_allclose(schedule.kappa(schedule.inverse(k)), k, atol=2e-6)
    np.testing.assert_allclose(schedule.inverse(schedule.kappa(TIMES)), TIMES, atol=2e-6)


@every_schedule
def test_derivative_is_that_of_kappa(schedule):
    t = jnp.asarray(TIMES[1:], jnp.float32)
    expected = jax.vmap(jax.grad(schedule.kappa))(t)
    np.testing.assert_allclose(schedule.derivative(t), expected, rtol=1e-5)


def test_derivative_stays_finite_where_the_slope_is_infinite():
    assert np.isfinite(Polynomial(0.5).derivative(0.0))


@every_schedule
def test_rate_in_closed_form(schedule):
    t = TIMES[1:].astype(np.float32).astype(np.float64)
    step = 1e-6
    slope = (KAPPA64[schedule](t + step) - KAPPA64[schedule](t - step)) / (2 * step)
    np.testing.assert_allclose(
        schedules.rate(schedule, t), slope / (1 - KAPPA64[schedule](t)), rtol=1e-4
    )


def test_rates_of_the_linear_schedule():
    t, h = np.float32([0.0, 0.25, 0.5]), np.float32([0.5, 0.5, 0.25])
    np.testing.assert_allclose(schedules.rate(Polynomial(), t), [1, 4 / 3, 2], rtol=1e-6)
    np.testing.assert_allclose(
        schedules.cumulative_rate(Polynomial(), t, h),
        [2 * np.log(2), 2 * np.log(3), 4 * np.log(2)],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        schedules.redraw_fraction(Polynomial(), t, h), [1 / 2, 2 / 3, 1 / 2], rtol=1e-6
    )


@every_schedule
def test_cumulative_rate_in_closed_form(schedule):
    t, h = np.float64([0.0, 0.125, 0.5, 0.75]), np.float64([0.5, 0.125, 0.25, 0.125])
    kappa = KAPPA64[schedule]
    expected = np.log((1 - kappa(t)) / (1 - kappa(t + h))) / h
    np.testing.assert_allclose(schedules.cumulative_rate(schedule, t, h), expected, rtol=1e-5)


@every_schedule
def test_cumulative_rate_adds_up_over_adjoining_steps(schedule):
    t = np.float32([0.0, 0.125, 0.5, 0.25])
    first, second = np.float32([0.5, 0.25, 0.125, 0.5]), np.float32([0.25, 0.5, 0.25, 0.25])
    parts = first * schedules.cumulative_rate(schedule, t, first)
    parts += second * schedules.cumulative_rate(schedule, t + first, second)
    whole = (first + second) * schedules.cumulative_rate(schedule, t, first + second)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


@every_schedule
def test_cumulative_rate_tends_to_the_rate(schedule):
    t = np.float32([0.25, 0.5, 0.75])
    gap = [
        np.max(np.abs(schedules.cumulative_rate(schedule, t, h) / schedules.rate(schedule, t) - 1))
        for h in np.float32([2**-5, 2**-7, 2**-9])
    ]
    # The error is of first order: h quartered, error quartered (float32 rounding adds about 2^-24 /
    # h).
    assert gap[0] > 3 * gap[1] > 8 * gap[2]
    assert gap[2] < 0.01


@every_schedule
def test_rates_are_finite_at_the_end(schedule):
    t, h = np.float32([0.0, 0.5, 1 - 2**-10, 1.0]), np.float32([1.0, 0.5, 2**-10, 2**-10])
    for value in (
        schedules.rate(schedule, t + h),
        schedules.cumulative_rate(schedule, t, h),
        schedules.log_survival(schedule, t, h),
    ):
        assert np.all(np.isfinite(value))
        assert np.all(value >= 0)
    # The floor of the official code: h gbar(0, 1) = ln 1e8.
    np.testing.assert_allclose(schedules.log_survival(schedule, 0.0, 1.0), np.log(1e8), rtol=1e-5)
    np.testing.assert_allclose(schedules.redraw_fraction(schedule, t[:3], h[:3]), 1, atol=1e-6)


def test_floor_is_an_option():
    value = schedules.log_survival(Polynomial(), 0.0, 1.0, floor=1e-3)
    np.testing.assert_allclose(value, np.log(1e3), rtol=1e-6)
    assert schedules.rate(Polynomial(), 1.0, floor=1e-3) == pytest.approx(1e3)


def test_a_step_beyond_the_end_counts_as_one_to_the_end():
    t = np.float32(0.5)
    beyond = schedules.log_survival(Polynomial(), t, np.float32(0.75))
    assert beyond == schedules.log_survival(Polynomial(), t, np.float32(0.5))
    assert schedules.redraw_fraction(Polynomial(), t, np.float32(0.75)) == 1


@every_schedule
def test_redraw_fractions_compose(schedule):
    t, first, second = np.float32([[0.0, 0.25, 0.5], [0.25, 0.5, 0.25], [0.5, 0.125, 0.25]])
    keep = (1 - schedules.redraw_fraction(schedule, t, first)) * (
        1 - schedules.redraw_fraction(schedule, t + first, second)
    )
    np.testing.assert_allclose(
        keep, 1 - schedules.redraw_fraction(schedule, t, first + second), rtol=1e-5
    )


@every_schedule
def test_redraw_fraction_is_the_survival_of_the_rate(schedule):
    t, h = np.float32([0.0, 0.25, 0.5]), np.float32([0.25, 0.5, 0.25])
    np.testing.assert_allclose(
        schedules.redraw_fraction(schedule, t, h),
        -np.expm1(-schedules.log_survival(schedule, t, h)),
        rtol=1e-5,
    )


@every_schedule
def test_half_precision_times_do_not_collapse_the_arithmetic(schedule):
    # 0.75 and 1/1024 are exact in bfloat16, their sum is not: it rounds back to 0.75.
    t, h = jnp.bfloat16(0.75), jnp.bfloat16(2**-10)
    assert t + h == t
    for function in (schedules.cumulative_rate, schedules.log_survival, schedules.redraw_fraction):
        value = function(schedule, t, h)
        assert value.dtype == jnp.float32
        assert value == function(schedule, np.float32(t), np.float32(h))
        assert value > 0
    for function in (schedule.kappa, schedule.remaining, schedule.derivative, schedule.inverse):
        assert function(t).dtype == jnp.float32


@pytest.mark.parametrize("power", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_powers(power):
    with pytest.raises(ValueError, match="positive and finite"):
        Polynomial(power)
    with pytest.raises(ValueError, match="positive and finite"):
        make_schedule("polynomial", power=power)


def test_schedules_by_name():
    assert make_schedule("polynomial") == Polynomial(1.0)
    assert make_schedule("polynomial", power=2.0) == Polynomial(2.0)
    assert make_schedule("cosine") == Cosine()
    with pytest.raises(ValueError, match="'linear'.*'polynomial' or 'cosine'"):
        make_schedule("linear")


@pytest.mark.parametrize("schedule", [Polynomial(1.0), Polynomial(2.0), Cosine()])
def test_bounded_weight_is_the_mean_of_the_floored_rate(schedule):
    floor = 0.05
    for t, h in [(0.0, 1.0), (0.2, 0.5), (0.9, 0.1), (0.97, 2.0**-10), (1 - 2.0**-10, 2.0**-10)]:
        s = t + h * (np.arange(20_000) + 0.5) / 20_000
        expected = np.mean(schedules.rate(schedule, s, floor=floor))
        weight = schedules.bounded_cumulative_rate(schedule, t, h, floor=floor)
        # Float32: the difference of two remainders of about 1e-3 keeps 4 digits.
        np.testing.assert_allclose(weight, expected, rtol=2e-3)


def test_no_step_that_training_draws_goes_without_weight():
    h = 2.0 ** -np.arange(11)
    t = np.arange(1024) / 1024
    t, h = (grid.ravel() for grid in np.meshgrid(t, h))
    inside = t + h <= 1
    for floor in (1e-8, 1e-3, 0.05):
        weight = schedules.bounded_cumulative_rate(Polynomial(), t[inside], h[inside], floor=floor)
        assert np.all(weight > 0.9)
        assert np.all(weight <= 1.001 / floor)
    # Above the floor it is gbar of the paper.
    np.testing.assert_allclose(
        schedules.bounded_cumulative_rate(Polynomial(), 0.3, 0.25, floor=1e-3),
        schedules.cumulative_rate(Polynomial(), 0.3, 0.25),
        rtol=1e-6,
    )
