"""Samplers of trained weights: inputs, frozen tokens, compilation and draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies

from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.flow.schedules import Polynomial
from fsdfm_jax.flow.sources import Source
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference.autoregressive import make_autoregressive_sampler
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.training.workdir import Weights

# One shape and three steps almost everywhere: what costs time here is compiling.
B, V, L = 16, 6, 5
MASK = V - 1
UNIFORM_PROCESS = Process(Polynomial(), Source(V), eos_id=0)
MASK_PROCESS = Process(Polynomial(), Source(V, mask_id=MASK), eos_id=0)


def _weights(*, vocab_size=V, seed=0, scale=0.7, **changes):
    """Random weights everywhere: the initial zeros of the head would hide errors."""
    fields = {"width": 8, "num_blocks": 1, "num_heads": 2, "cond_width": 4, "mlp_ratio": 2}
    model = ModelConfig(vocab_size=vocab_size, **(fields | changes))
    shapes = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), model))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype), shapes
    )
    return Weights(params, model, {"stage": "distill", "run": "distill", "weights": "ema"}, 7)


FEW_STEP = _weights(conditioning="additive")
CAUSAL = _weights(causal=True)


def _given(tokens=(), num_samples=B, length=L):
    """(given_BL, frozen_BL) of rows that all begin so; None leaves a gap."""
    given_BL, frozen_BL = np.zeros((num_samples, length), np.int32), np.zeros((1, length), bool)
    for i, token in enumerate(tokens):
        if token is not None:
            given_BL[:, i], frozen_BL[:, i] = token, True
    return given_BL, np.repeat(frozen_BL, num_samples, axis=0)


def _generate(weights=FEW_STEP, process=UNIFORM_PROCESS, *, given=(), num_samples=B, **changes):
    given_BL, frozen_BL = _given(given, num_samples)
    rows = {"given_BL": given_BL, "frozen_BL": frozen_BL, "seed": 0}
    rows |= {name: changes.pop(name) for name in rows if name in changes}
    sampling = Sampling(**{"steps": 3} | changes)
    return generate_lib.generate(weights.params, weights.model, process, sampling, **rows)


def _stream(weights=FEW_STEP, process=UNIFORM_PROCESS, *, given=(), num_samples=B, **changes):
    """The noise and the tokens after each step, [S+1, B, L]."""
    given_BL, frozen_BL = _given(given, num_samples)
    rows = {"given_BL": given_BL, "frozen_BL": frozen_BL, "seed": 0}
    sampling = Sampling(**{"steps": 3} | changes)
    frames = generate_lib.stream(weights.params, weights.model, process, sampling, **rows)
    return np.stack(list(frames))


# ----------------------------------------------------------------------------------------- generate
@pytest.mark.parametrize("weights", [FEW_STEP, CAUSAL], ids=["few-step", "causal"])
def test_shape_and_seed(weights):
    tokens = _generate(weights)
    assert tokens.shape == (B, L)
    assert tokens.dtype == np.int32
    assert tokens.min() >= 0
    assert tokens.max() < V
    np.testing.assert_array_equal(tokens, _generate(weights))
    assert (tokens != _generate(weights, seed=1)).any()
    assert len({tuple(row) for row in tokens}) > 1  # rows are different draws


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"Sampling.steps must be an integer in \[1, "),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\^32\), got -1"),
        ({"seed": 2**32}, "seed must be an integer"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"temperature": -1.0}, "temperature must be in"),
        ({"jump": "leap"}, "Sampling.jump must be one of .*'leap'"),
        ({"num_samples": 0}, "at least one row"),
        ({"frozen_BL": np.zeros((B, L + 1), bool)}, r"\(16, 5\) and \(16, 6\)"),
        ({"frozen_BL": np.zeros((B, L), np.int32)}, "frozen_BL bool"),
        ({"given_BL": np.zeros((B, L))}, "given_BL must be integer"),
        ({"given": (V,)}, r"in \[0, 6\), got 6"),
        ({"given": (-1,)}, r"in \[0, 6\), got -1"),
        ({"given": (MASK,), "process": MASK_PROCESS}, "other than the mask token 5, got 5"),
        ({"weights": CAUSAL, "given": (1, None, 2)}, "can't see text after a gap"),
        ({"weights": CAUSAL, "given": (None, 2)}, "can't see text after a gap"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        _generate(**changes)


@pytest.mark.parametrize("process", [UNIFORM_PROCESS, MASK_PROCESS], ids=["uniform", "mask"])
@pytest.mark.parametrize("given", [(3,), (1, 4, 2), (2, None, None, 1), (None, 3, None, None, 0)])
def test_given_tokens_stay(process, given):
    tokens = _generate(process=process, given=given)
    given_BL, frozen_BL = _given(given)
    np.testing.assert_array_equal(tokens[frozen_BL], given_BL[frozen_BL])
    assert len({tuple(row) for row in tokens}) > 1


def test_given_tokens_are_seen():
    """The other tokens depend on them, not on the noise at their positions."""
    for one, other in (((1, 1, 1), (4, 4, 4)), ((None, None, 1, 1), (None, None, 4, 4))):
        first, second = _generate(given=one), _generate(given=other)
        free_BL = ~_given(one)[1]
        assert (first[free_BL] != second[free_BL]).any()


def test_a_network_is_told_what_is_given():
    """By all samplers; the mark has no effect where nothing is given."""
    told = _weights(conditioning="additive", given="marked")
    embed = told.params["vocab_embed"]
    unmarked = told.params | {"vocab_embed": embed | {"given": 0 * embed["given"]}}
    untold = told._replace(params=unmarked)
    for given in ((), (1, None, 2)):
        tokens = _generate(told, given=given)
        assert (tokens != _generate(untold, given=given)).any() == bool(given)
        np.testing.assert_array_equal(tokens, _stream(told, given=given)[-1])
        given_BL, frozen_BL = _given(given)
        for make in (generate_lib.make_sampler, generate_lib.make_observer):
            noise = generate_lib.draw_noise(UNIFORM_PROCESS, np.uint32(0), given_BL, frozen_BL)
            x0_BL, key = noise
            drawn = make(told.model, UNIFORM_PROCESS)(
                told.params, key, x0_BL, frozen_BL, Sampling(steps=3)
            )
            drawn = drawn[0] if make is generate_lib.make_observer else drawn
            np.testing.assert_array_equal(tokens, drawn)


def test_the_tokens_are_those_of_the_generator_that_is_exported():
    given_BL, frozen_BL = _given((1, None, 2))
    run = generate_lib.make_generator(FEW_STEP.model, MASK_PROCESS)
    sampling = Sampling(steps=3, temperature=0.8)
    wanted = run(FEW_STEP.params, np.uint32(5), given_BL, frozen_BL, sampling)
    tokens = _generate(process=MASK_PROCESS, given=(1, None, 2), seed=5, temperature=0.8)
    np.testing.assert_array_equal(tokens, wanted)


def test_what_stands_where_nothing_is_frozen_has_no_meaning():
    given_BL, frozen_BL = _given((1, 4))
    scribbled = np.where(frozen_BL, given_BL, 10**6)
    np.testing.assert_array_equal(
        _generate(given=(1, 4)), _generate(given_BL=scribbled, frozen_BL=frozen_BL)
    )


def test_batches_have_seeds_of_their_own():
    seeds = [
        generate_lib.batch_seed(seed, index) for seed in (0, 1, 2**32 - 1) for index in range(50)
    ]
    assert seeds[::50] == [0, 1, 2**32 - 1]  # the first batch is the plain call
    assert len(set(seeds)) == len(seeds)
    assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    assert generate_lib.batch_seed(1, 3) == seeds[53]


# -------------------------------------------------------------------------------- sizes of batches
def test_buckets():
    sizes = [generate_lib.bucket(rows) for rows in range(1, 1001)]
    first = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert sorted(set(sizes)) == first
    for rows, size in enumerate(sizes, start=1):
        # The next one, of which at most a third is thrown away.
        assert size == min(bucket for bucket in first if bucket >= rows)
        assert 3 * (size - rows) <= size


@pytest.mark.optimised
@pytest.mark.parametrize(
    ("weights", "process", "how"),
    [
        (FEW_STEP, UNIFORM_PROCESS, {}),
        pytest.param(FEW_STEP, MASK_PROCESS, {}, marks=pytest.mark.slow),
        pytest.param(CAUSAL, UNIFORM_PROCESS, {}, marks=pytest.mark.slow),
        pytest.param(FEW_STEP, UNIFORM_PROCESS, {"jump": "dispersed"}, marks=pytest.mark.slow),
    ],
    ids=["uniform", "mask", "causal", "dispersed"],
)
def test_a_row_does_not_depend_on_the_number_of_rows(weights, process, how):
    # 3 and 4 fill their batches, 5 are drawn as 6, of which the last is thrown away.
    every = _generate(weights, process, given=(1, 4), num_samples=16, **how)
    for rows in (3, 4, 5):
        tokens = _generate(weights, process, given=(1, 4), num_samples=rows, **how)
        assert tokens.shape == (rows, L)
        np.testing.assert_array_equal(tokens, every[:rows])


def test_sizes_of_one_bucket_share_a_program():
    run = generate_lib._jit_generator(FEW_STEP.model, UNIFORM_PROCESS)
    _generate(num_samples=6, jump="mixture")
    compiled = run._cache_size()
    _generate(num_samples=5, jump="mixture")
    # Rows of their own stay with their templates.
    given_BL = np.arange(5 * L, dtype=np.int32).reshape(5, L) % V
    frozen_BL = np.random.default_rng(0).random((5, L)) < 0.5
    tokens = _generate(given_BL=given_BL, frozen_BL=frozen_BL, jump="mixture")
    np.testing.assert_array_equal(tokens[frozen_BL], given_BL[frozen_BL])
    assert run._cache_size() == compiled


# ---------------------------------------------------------------------------------------- watching
@pytest.mark.parametrize("process", [UNIFORM_PROCESS, MASK_PROCESS], ids=["uniform", "mask"])
def test_streaming_draws_the_same_tokens_step_by_step(process):
    frames = _stream(process=process, given=(1, None, 2))
    tokens = _generate(process=process, given=(1, None, 2))
    assert frames.shape == (4, B, L)
    np.testing.assert_array_equal(frames[-1], tokens)
    np.testing.assert_array_equal(frames[:, :, [0, 2]], np.broadcast_to([1, 2], (4, B, 2)))
    noise_BL, _ = generate_lib.draw_noise(process, np.uint32(0), *_given((1, None, 2)))
    np.testing.assert_array_equal(frames[0], noise_BL)
    if process is MASK_PROCESS:  # the states are in between: masks go, step by step
        masks = [int((x_BL == MASK).sum()) for x_BL in frames]
        assert masks[0] == B * (L - 2) > masks[1] > masks[2] > masks[3] == 0
    # The rows asked for and no others.
    assert _stream(process=process, num_samples=5).shape == (4, 5, L)


def test_left_to_right_text_cannot_be_streamed():
    with pytest.raises(ValueError, match="writes each token once"):
        _stream(CAUSAL)


@pytest.mark.parametrize(
    ("steps", "rule"), [(1, "cumulative"), (3, "cumulative"), (3, "euler"), (3, "mixture")]
)
def test_mask_source_never_emits_the_mask(steps, rule):
    for seed in range(4):
        tokens = _generate(process=MASK_PROCESS, steps=steps, jump=rule, seed=seed)
        assert tokens.max() < MASK


@pytest.mark.parametrize("process", [UNIFORM_PROCESS, MASK_PROCESS], ids=["uniform", "mask"])
def test_revealed_tokens_stay_with_a_mask_source_only(process):
    run = generate_lib.make_sampler(FEW_STEP.model, process)
    x0_BL = np.full((B, L), MASK, np.int32)
    x0_BL[:, ::2] = 2  # shown, not frozen
    frozen_BL = np.zeros((B, L), bool)
    sampling = Sampling(steps=3)
    tokens = np.asarray(run(FEW_STEP.params, jax.random.key(0), x0_BL, frozen_BL, sampling))
    assert (tokens[:, ::2] == 2).all() == (process is MASK_PROCESS)


@pytest.mark.parametrize("weights", [FEW_STEP, CAUSAL], ids=["few-step", "causal"])
def test_low_temperature_is_the_mode(weights):
    """At 1e-4 the draws of one prefix or one noise agree for all keys."""
    if weights is CAUSAL:
        tokens = _generate(weights, temperature=1e-4)
        assert len({tuple(row) for row in tokens}) == 1
        return
    tokens = _generate(weights, MASK_PROCESS, temperature=1e-4, steps=1)
    assert len({tuple(row) for row in tokens}) == 1


# --------------------------------------------------------------------------------------- compiling
def test_one_program_for_all_numbers_of_a_sampling():
    run = generate_lib.make_sampler(FEW_STEP.model, UNIFORM_PROCESS)
    assert generate_lib.make_sampler(FEW_STEP.model, UNIFORM_PROCESS) is run
    assert generate_lib.make_sampler(FEW_STEP.model, MASK_PROCESS) is not run
    x0_BL, frozen_BL = np.ones((B, L), np.int32), np.zeros((B, L), bool)
    before = run._cache_size()
    results = [
        np.asarray(run(FEW_STEP.params, jax.random.key(0), x0_BL, frozen_BL, sampling))
        for sampling in (
            Sampling(2, "mixture"),
            Sampling(2, "mixture", temperature=0.2),
            Sampling(2, "mixture", cooling=0.9, look_ahead=0.5),
        )
    ]
    assert run._cache_size() == before + 1
    assert len({result.tobytes() for result in results}) == 3


def test_generate_compiles_once_for_seeds_templates_and_temperatures():
    run = generate_lib._jit_generator(FEW_STEP.model, UNIFORM_PROCESS)
    _generate()
    compiled = run._cache_size()
    for seed, given, temperature in ((1, (2,), 0.5), (2**32 - 1, (2, None, 3), 0.7)):
        _generate(seed=seed, given=given, temperature=temperature)
    assert run._cache_size() == compiled > 0


# ---------------------------------------------------------------------------------- left to right
@pytest.mark.parametrize("given", [(), (1,), (0, 2)])
def test_autoregressive_samples_have_the_networks_distribution(given):
    """All 27 texts of three tokens, from 20,000 draws, against the exact product of posteriors.

    After given tokens: those of the texts that begin so, in the same proportions.
    """
    weights = _weights(vocab_size=3, causal=True, width=4, num_heads=1, num_blocks=2, scale=1.0)
    process, temperature = Process(Polynomial(), Source(3), eos_id=2), 0.6
    texts = np.asarray(list(itertools.product(range(3), repeat=3)), np.int32)
    inputs = np.concatenate([np.full((27, 1), 2, np.int32), texts[:, :-1]], axis=1)
    # Without the cache: the whole text at once.
    apply = jax.jit(model_lib.apply, static_argnums=1)
    logits = np.asarray(apply(weights.params, weights.model, inputs), np.float64)
    logits = logits / temperature
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    exact = np.exp(np.take_along_axis(logp, texts[..., None], axis=2)[..., 0].sum(1))
    possible = (texts[:, : len(given)] == np.asarray(given, np.int32)).all(1)
    exact = np.where(possible, exact, 0) / exact[possible].sum()
    assert exact.max() / exact[possible].min() > 1.5  # not flat: a mistake would show

    given_BL, frozen_BL = _given(given, 20_000, 3)
    drawn = _generate(
        weights, process, given_BL=given_BL, frozen_BL=frozen_BL, temperature=temperature
    )
    counts = np.bincount(drawn @ np.asarray([9, 3, 1]), minlength=27)
    assert_frequencies(counts, exact)


def test_autoregressive_samples_never_hold_the_mask():
    """Its network has a logit for it, although no text it learns from holds one."""
    assert (_generate(CAUSAL, UNIFORM_PROCESS) == MASK).any()
    assert not (_generate(CAUSAL, MASK_PROCESS) == MASK).any()


def test_the_cache_gives_the_logits_of_the_whole_text():
    weights = _weights(causal=True, num_blocks=2)
    tokens_BL = np.random.default_rng(0).integers(V, size=(3, L)).astype(np.int32)
    whole = jax.jit(model_lib.apply, static_argnums=1)(weights.params, weights.model, tokens_BL)
    decode = jax.jit(model_lib.decode_step, static_argnums=1)
    cache = model_lib.empty_cache(weights.model, 3, L)
    for position in range(L):
        logits_BV, cache = decode(
            weights.params, weights.model, tokens_BL[:, position], jnp.int32(position), cache
        )
        # Same sums in another order: a few float32 roundings of values around 1.
        np.testing.assert_allclose(logits_BV, whole[:, position], atol=2e-5, rtol=2e-5)


def test_autoregressive_tokens_of_a_seed_are_those_of_its_sampler():
    run = make_autoregressive_sampler(CAUSAL.model, L)
    _, key = jax.random.split(jax.random.key(5))  # the first is that of the noise
    first_B = jnp.full((B,), UNIFORM_PROCESS.eos_id)
    wanted = run(CAUSAL.params, key, first_B, jnp.float32(1))
    np.testing.assert_array_equal(_generate(CAUSAL, seed=5), wanted)


def test_autoregressive_sampler_takes_the_token_before_the_text():
    run = make_autoregressive_sampler(CAUSAL.model, L)
    temperature = jnp.float32(1)
    first, other = (
        np.asarray(run(CAUSAL.params, jax.random.key(0), jnp.full((B,), token), temperature))
        for token in (0, 3)
    )
    assert (first[:, 0] != other[:, 0]).any()


# ---------------------------------------------------------------------------------------- observing
@pytest.mark.parametrize("process", [UNIFORM_PROCESS, MASK_PROCESS], ids=["uniform", "mask"])
def test_the_observer_draws_the_same_and_says_how_sure_it_was(process):
    steps, temperature, top_p = 3, 0.7, 0.9
    given_BL, frozen_BL = _given([2], num_samples=4)
    x0_BL, key = generate_lib.draw_noise(process, jnp.uint32(3), given_BL, frozen_BL)
    sampling = Sampling(steps, temperature=temperature, top_p=top_p)
    grid_S1 = sampling.times()

    def run(make):
        arguments = (jax.random.clone(key), x0_BL, frozen_BL, sampling)
        return make(FEW_STEP.model, process)(FEW_STEP.params, *arguments)

    plain_BL = run(generate_lib.make_sampler)
    x_BL, seen = run(generate_lib.make_observer)
    np.testing.assert_array_equal(x_BL, plain_BL)
    np.testing.assert_array_equal(seen.tokens_SBL[-1], plain_BL)

    before_BL = np.asarray(x0_BL)
    for i in range(steps):
        t_B, h_B = np.full(4, grid_S1[i]), np.full(4, 1 / 3, np.float32)
        logits = np.array(model_lib.apply(FEW_STEP.params, FEW_STEP.model, before_BL, t_B, h_B))
        if process is MASK_PROCESS:  # no step draws it
            logits[..., MASK] = -np.inf
        cut = np.asarray(logits_lib.nucleus(jnp.asarray(logits / temperature), top_p), np.float64)
        p = np.exp(cut - cut.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        entropy_BL = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0), -1)
        open_BL = ~frozen_BL if process is UNIFORM_PROCESS else ~frozen_BL & (before_BL == MASK)
        after_BL = np.asarray(seen.tokens_SBL[i])
        for row in range(4):
            chosen = open_BL[row]
            wanted = entropy_BL[row, chosen].mean() if chosen.any() else np.nan
            np.testing.assert_allclose(seen.entropy_SB[i, row], wanted, rtol=1e-4)
            moved = (after_BL != before_BL)[row, chosen]
            share = moved.mean() if chosen.any() else 0.0
            np.testing.assert_allclose(seen.changed_SB[i, row], share, atol=1e-6)
        before_BL = after_BL


# ------------------------------------------------------------------------ left to right, no memory
def test_without_cache_the_same_tokens_are_drawn():
    first_B = jnp.zeros((4,), jnp.int32)
    given_BL, frozen_BL = _given([3, 1], num_samples=4)

    def run(memory):
        draw = make_autoregressive_sampler(CAUSAL.model, L, memory=memory)
        return draw(CAUSAL.params, jax.random.key(1), first_B, 0.8, given_BL, frozen_BL)

    cached, anew = run("cache"), run("none")
    np.testing.assert_array_equal(cached, anew)
    assert (np.asarray(cached)[:, :2] == [3, 1]).all()
    with pytest.raises(ValueError, match="Unknown memory='some'"):
        make_autoregressive_sampler(CAUSAL.model, L, memory="some")
