"""Samplers of trained weights: what goes in, what stays, what is compiled, and how it is drawn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies

from fsdfm_jax import inference, models, sampler
from fsdfm_jax.models import ModelConfig
from fsdfm_jax.schedules import Polynomial
from fsdfm_jax.sources import Source
from fsdfm_jax.stages import Process
from fsdfm_jax.workdir import Weights

# One shape and three steps almost everywhere: what costs time here is compiling.
B, V, L = 16, 6, 5
MASK = V - 1
UNIFORM_PROCESS = Process(Polynomial(), Source(V), eos_id=0)
MASK_PROCESS = Process(Polynomial(), Source(V, mask_id=MASK), eos_id=0)


def _weights(*, vocab_size=V, seed=0, scale=0.7, **changes):
    """Random weights everywhere: fresh ones have a head of zeros, which hides every mistake."""
    fields = {"width": 8, "num_blocks": 1, "num_heads": 2, "cond_width": 4, "mlp_ratio": 2}
    model = ModelConfig(vocab_size=vocab_size, **(fields | changes))
    shapes = jax.eval_shape(lambda: models.init_params(jax.random.key(0), model))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype), shapes
    )
    return Weights(params, model, {"stage": "distill", "run": "distill", "weights": "ema"}, 7)


FEW_STEP = _weights(conditioning="additive")
CAUSAL = _weights(causal=True)


def _generate(weights=FEW_STEP, process=UNIFORM_PROCESS, **changes):
    wanted = {"num_samples": B, "length": L, "steps": 3, "seed": 0} | changes
    return inference.generate(weights, process, **wanted)


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
        ({"steps": 0}, "at least 1 step"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"temperature": -1.0}, "temperature must be greater than 0"),
        ({"temperature": float("nan")}, "temperature must be greater than 0"),
        ({"prompt": (1,) * L}, f"prompt has {L} tokens"),
        ({"jump_rule": "leap"}, "Unknown jump rule 'leap'"),
        ({"weights": CAUSAL, "prompt": (1,)}, "few-step and base stages only"),
        ({"weights": CAUSAL, "num_samples": 0}, "num_samples"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        _generate(**changes)


@pytest.mark.parametrize("process", [UNIFORM_PROCESS, MASK_PROCESS], ids=["uniform", "mask"])
@pytest.mark.parametrize("prompt", [(3,), (1, 4, 2)])
def test_the_prompt_stays(process, prompt):
    tokens = _generate(process=process, prompt=prompt)
    np.testing.assert_array_equal(tokens[:, : len(prompt)], [prompt] * B)
    assert len({tuple(row) for row in tokens[:, len(prompt) :]}) > 1


def test_the_prompt_is_seen():
    """The tokens after it are drawn given it, not given the noise in its place."""
    one, other = _generate(prompt=(1, 1, 1)), _generate(prompt=(4, 4, 4))
    assert (one[:, 3:] != other[:, 3:]).any()


@pytest.mark.parametrize(
    ("steps", "rule"), [(1, "cumulative"), (3, "cumulative"), (3, "euler"), (3, "mixture")]
)
def test_mask_source_never_emits_the_mask(steps, rule):
    for seed in range(4):
        tokens = _generate(process=MASK_PROCESS, steps=steps, jump_rule=rule, seed=seed)
        assert tokens.max() < MASK


@pytest.mark.parametrize("process", [UNIFORM_PROCESS, MASK_PROCESS], ids=["uniform", "mask"])
def test_revealed_tokens_stay_with_a_mask_source_only(process):
    run = inference.make_sampler(FEW_STEP.model, process, "cumulative")
    x0_BL = np.full((B, L), MASK, np.int32)
    x0_BL[:, ::2] = 2  # shown, not frozen
    frozen_BL = np.zeros((B, L), bool)
    grid = sampler.uniform_grid(3)
    tokens = np.asarray(
        run(FEW_STEP.params, jax.random.key(0), x0_BL, frozen_BL, grid, np.float32(1))
    )
    assert (tokens[:, ::2] == 2).all() == (process is MASK_PROCESS)


@pytest.mark.parametrize("weights", [FEW_STEP, CAUSAL], ids=["few-step", "causal"])
def test_low_temperature_is_the_mode(weights):
    """At 1e-4 the draws of one prefix or one noise agree, whatever the key."""
    if weights is CAUSAL:
        tokens = _generate(weights, temperature=1e-4)
        assert len({tuple(row) for row in tokens}) == 1
        return
    tokens = _generate(weights, MASK_PROCESS, temperature=1e-4, steps=1)
    assert len({tuple(row) for row in tokens}) == 1


# --------------------------------------------------------------------------------------- compiling
def test_one_program_for_all_grids_of_a_length_and_all_temperatures():
    run = inference.make_sampler(FEW_STEP.model, UNIFORM_PROCESS, "mixture")
    assert inference.make_sampler(FEW_STEP.model, UNIFORM_PROCESS, "mixture") is run
    assert inference.make_sampler(FEW_STEP.model, MASK_PROCESS, "mixture") is not run
    assert inference.make_sampler(FEW_STEP.model, UNIFORM_PROCESS, "euler") is not run
    x0_BL, frozen_BL = np.ones((B, L), np.int32), np.zeros((B, L), bool)
    results = [
        np.asarray(run(FEW_STEP.params, jax.random.key(0), x0_BL, frozen_BL, grid, temperature))
        for grid in (np.float32([0, 0.5, 1]), np.float32([0, 0.9, 1]))
        for temperature in (np.float32(1.0), np.float32(0.2))
    ]
    assert run._cache_size() == 1
    assert len({result.tobytes() for result in results}) > 1


def test_generate_compiles_once_for_seeds_prompts_and_temperatures():
    run = inference.make_sampler(FEW_STEP.model, UNIFORM_PROCESS, "cumulative")
    _generate()
    compiled = run._cache_size()
    for seed, prompt, temperature in ((1, (2,), 0.5), (2, (2, 3), 0.7)):
        _generate(seed=seed, prompt=prompt, temperature=temperature)
    assert run._cache_size() == compiled


# ---------------------------------------------------------------------------------- left to right
def test_autoregressive_samples_have_the_networks_distribution():
    """All 27 texts of three tokens, from 20,000 draws, against the exact product of posteriors."""
    weights = _weights(vocab_size=3, causal=True, width=4, num_heads=1, num_blocks=2, scale=1.0)
    process, temperature = Process(Polynomial(), Source(3), eos_id=2), 0.6
    texts = np.asarray(list(itertools.product(range(3), repeat=3)), np.int32)
    inputs = np.concatenate([np.full((27, 1), 2, np.int32), texts[:, :-1]], axis=1)
    # Without the cache: the whole text at once.
    apply = jax.jit(models.apply, static_argnums=1)
    logits = np.asarray(apply(weights.params, weights.model, inputs), np.float64)
    logits = logits / temperature
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    exact = np.exp(np.take_along_axis(logp, texts[..., None], axis=2)[..., 0].sum(1))
    assert exact.max() / exact.min() > 5  # not flat: a mistake would show

    drawn = inference.generate(
        weights,
        process,
        num_samples=20_000,
        length=3,
        steps=1,
        seed=0,
        temperature=temperature,
    )
    counts = np.bincount(drawn @ np.asarray([9, 3, 1]), minlength=27)
    assert_frequencies(counts, exact)


def test_the_cache_gives_the_logits_of_the_whole_text():
    weights = _weights(causal=True, num_blocks=2)
    tokens_BL = np.random.default_rng(0).integers(V, size=(3, L)).astype(np.int32)
    whole = jax.jit(models.apply, static_argnums=1)(weights.params, weights.model, tokens_BL)
    decode = jax.jit(models.decode_step, static_argnums=1)
    cache = models.empty_cache(weights.model, 3, L)
    for position in range(L):
        logits_BV, cache = decode(
            weights.params, weights.model, tokens_BL[:, position], jnp.int32(position), cache
        )
        # Same sums in another order: a few float32 roundings of values around 1.
        np.testing.assert_allclose(logits_BV, whole[:, position], atol=2e-5, rtol=2e-5)


def test_autoregressive_sampler_takes_the_token_before_the_text():
    run = inference.make_autoregressive_sampler(CAUSAL.model, L)
    temperature = jnp.float32(1)
    first, other = (
        np.asarray(run(CAUSAL.params, jax.random.key(0), jnp.full((B,), token), temperature))
        for token in (0, 3)
    )
    assert (first[:, 0] != other[:, 0]).any()
