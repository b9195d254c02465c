"""`Sampling`: its values, rejected values, and the wrappers that they enable."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies

from fsdfm_jax.flow import jumps, sampler
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sampling import Sampling, annealed, midpoint
from fsdfm_jax.flow.schedules import Polynomial
from fsdfm_jax.flow.sources import Source
from fsdfm_jax.inference.autoregressive import sample_autoregressive

PRESET = Sampling(4, "dispersed", "power:0.7", 0.9, 0.7, 0.8, 0.5)
POSTERIOR = np.float32([0.4, 0.3, 0.2, 0.1])
# Of top-p 0.65 the first two are enough.
CUT = np.float64([4 / 7, 3 / 7, 0, 0])


def test_the_default_is_the_published_sampler():
    default = Sampling()
    assert default == Sampling.published()
    assert (default.steps, default.jump, default.grid) == (8, "cumulative", "uniform")
    assert (default.temperature, default.cooling, default.look_ahead) == (1, 0, 0)
    assert default.top_p is None
    np.testing.assert_array_equal(Sampling(steps=2).times(), np.float32([0, 0.5, 1]))


def test_it_survives_json():
    for sampling in (Sampling(), PRESET):
        assert Sampling.from_dict(json.loads(json.dumps(sampling.to_dict()))) == sampling
    assert Sampling(top_p=1.0) == Sampling(top_p=None)
    assert Sampling().to_dict()["top_p"] == 1.0


NUMBERS = {
    "temperature": (-0.1, np.inf, np.nan, 1e300, "1", None, True),
    "cooling": (-0.1, 1.0, 1 - 1e-12, np.nan, "0", None),
    "top_p": (0.0, 1.1, 1e-300, np.nan, "1"),
    "look_ahead": (-0.1, 1.1, np.nan, "0", None),
}
BAD = [(name, value) for name, values in NUMBERS.items() for value in values]
BAD += [("steps", value) for value in (0, -1, 2.0, "8", None, True, 2**21)]
BAD += [("jump", value) for value in ("leap", None, 3)]
BAD += [("grid", value) for value in ("linear", "power:0", None, 3, "power:400")]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_each_bad_value_has_one_error_wherever_it_comes_from(name, value):
    with pytest.raises(ValueError, match=rf"^Sampling\.{name}"):
        Sampling(**{name: value})
    with pytest.raises(ValueError, match=rf"^Sampling\.{name}"):
        Sampling.from_dict({name: value})
    with pytest.raises(ValueError, match=rf"^Sampling\.{name}"):
        Sampling().replace(**{name: value})


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ValueError, match="no field 'temprature'; did you mean 'temperature'"):
        Sampling.from_dict({"temprature": 1.0})
    with pytest.raises(ValueError, match="no field 'x'; it has steps, jump"):
        Sampling.from_dict({"x": 1.0})


def test_numbers_are_data_and_the_rest_is_static():
    traces = []

    @jax.jit
    def run(sampling):
        traces.append(sampling)
        return sampling.temperature + sampling.cooling + jnp.sum(sampling.times())

    run(Sampling())
    run(Sampling(temperature=0.5, cooling=0.2, look_ahead=0.3))
    assert len(traces) == 1
    run(Sampling(steps=4))
    run(Sampling(jump="mixture"))
    run(Sampling(top_p=0.9))
    assert len(traces) == 4
    mapped = jax.tree.map(
        lambda leaf: 2 * leaf,
        PRESET.replace(look_ahead=0.25, cooling=0.1, top_p=0.25, temperature=1.0),
    )
    assert dataclasses.asdict(mapped)["look_ahead"] == 0.5


# ----------------------------------------------------------------------------------------- wrappers
def _spy(rows=2, length=3, vocab_size=5):
    asked = []

    def denoise(x_BL, t_B, h_B):
        asked.append((t_B, h_B))
        return jnp.ones((rows, length, vocab_size))

    return denoise, asked


def test_annealing_divides_by_the_temperature_of_the_time():
    denoise, _ = _spy()
    x_BL, t_B, h_B = jnp.zeros((2, 3), int), jnp.full(2, 0.5), jnp.full(2, 0.25)
    logits = annealed(denoise, 2.0, 0.6)(x_BL, t_B, h_B)
    np.testing.assert_allclose(logits, 1 / (2 * (1 - 0.6 * 0.5)), rtol=1e-6)
    np.testing.assert_array_equal(annealed(denoise)(x_BL, t_B, h_B), 1.0)


def test_midpoint_asks_ahead_and_keeps_the_width():
    denoise, asked = _spy()
    x_BL, t_B, h_B = jnp.zeros((2, 3), int), jnp.full(2, 0.5), jnp.full(2, 0.25)
    midpoint(denoise, 0.5)(x_BL, t_B, h_B)
    np.testing.assert_allclose(asked[0][0], 0.625)
    np.testing.assert_allclose(asked[0][1], 0.25)


def test_a_sampling_composes_them():
    """The network is evaluated ahead; the temperature is that of the step's start."""
    denoise, asked = _spy()
    x_BL, t_B, h_B = jnp.zeros((2, 3), int), jnp.full(2, 0.5), jnp.full(2, 0.25)
    sampling = Sampling(temperature=2.0, cooling=0.6, look_ahead=1.0)
    logits = sampling.wrap(denoise)(x_BL, t_B, h_B)
    np.testing.assert_allclose(asked[0][0], 0.75)
    np.testing.assert_allclose(logits, 1 / (2 * (1 - 0.6 * 0.5)), rtol=1e-6)


def _draw(sampling, *, mask=False, rows=400, length=50):
    source = Source(5, mask_id=4) if mask else Source(4)
    process = Process(Polynomial(), source)
    # The network gives the mask token more than half of its mass.
    logits_V = jnp.log(np.append(POSTERIOR / 2, 0.5) if mask else POSTERIOR)
    constant = lambda x_BL, t_B, h_B: jnp.broadcast_to(
        logits_V[None, None], (rows, length, source.vocab_size)
    )
    x0_BL = source.sample(jax.random.key(0), (rows, length))

    @jax.jit
    def run(key, sampling):
        denoise = sampling.wrap(constant, mask_id=source.mask_id)
        jump = process.make_jump(sampling.rule)
        return sampler.sample(key, denoise, jump, process.finalize, x0_BL, sampling.times())

    return np.bincount(np.asarray(run(jax.random.key(1), sampling)).ravel(), minlength=4)


@pytest.mark.optimised
@pytest.mark.parametrize("mask", [False, True])
def test_a_nucleus_is_drawn_from_renormalised(mask):
    """With a mask source the mask is excluded first, so that it can't fill the nucleus."""
    counts = _draw(Sampling(2, "mixture", top_p=0.65), mask=mask)
    assert_frequencies(counts, CUT)


@pytest.mark.optimised
def test_without_a_nucleus_all_of_the_posterior_is():
    expected = POSTERIOR.astype(np.float64) / POSTERIOR.sum(dtype=np.float64)
    assert_frequencies(_draw(Sampling(2, "mixture")), expected)


def test_temperature_zero_is_greedy():
    for rule in jumps.RULES:
        assert _draw(Sampling(3, rule, temperature=0.0), rows=8, length=4).tolist() == [32, 0, 0, 0]


def test_left_to_right_draws_from_a_nucleus_too():
    decode = lambda token_B, position, cache: (
        jnp.broadcast_to(jnp.log(POSTERIOR)[None], (400, 4)),
        cache,
    )
    start = (decode, (), jnp.zeros(400, jnp.int32), 50)
    tokens_BL = sample_autoregressive(jax.random.key(0), *start, top_p=0.65)
    assert_frequencies(np.bincount(np.asarray(tokens_BL).ravel(), minlength=4), CUT)
    greedy_BL = sample_autoregressive(jax.random.key(0), *start, temperature=0.0)
    assert not np.asarray(greedy_BL).any()
