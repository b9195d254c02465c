"""Official state dicts: recorded logits, bit-exact round trips, errors with every key."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsdfm_jax.convert import official
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig

GOLDENS = pathlib.Path(__file__).parent / "goldens"
NETWORKS = ("dfm", "fs")


def load(network):
    """Recorded arrays, state dict and config of one golden network."""
    with np.load(GOLDENS / f"shared_{network}_uniform.npz") as file:
        arrays = dict(file)
    state = {name[3:]: array for name, array in arrays.items() if name.startswith("sd/")}
    cfg = ModelConfig(
        vocab_size=int(arrays["vocab"]),
        width=32,
        num_blocks=2,
        num_heads=int(arrays["heads"]),
        cond_width=16,
        conditioning="official" if arrays["dt_conditioned"] else "none",
    )
    return arrays, state, cfg


def shapes(cfg):
    return jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), cfg))


@pytest.mark.optimised
@pytest.mark.parametrize("network", NETWORKS)
def test_logits_are_those_of_the_official_network(network):
    arrays, state, cfg = load(network)
    params = official.from_state_dict(state, cfg)
    run = jax.jit(model_lib.apply, static_argnums=1)
    x_BL = arrays["x"].astype(np.int32)
    logits_BLV = run(params, cfg, x_BL, arrays["t"], arrays["dt"])
    np.testing.assert_allclose(logits_BLV, arrays["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_round_trip_is_bit_exact(network):
    _, state, cfg = load(network)
    params = official.from_state_dict(state, cfg)
    assert jax.tree.structure(params) == jax.tree.structure(shapes(cfg))
    again = official.to_state_dict(params, cfg)
    assert set(again) == set(state)
    for name, array in state.items():
        assert again[name].dtype == np.float32
        if name == "rotary_emb.inv_freq":  # a buffer, computed: one rounding of a power may differ
            np.testing.assert_allclose(again[name], array, rtol=3e-7)
        else:
            np.testing.assert_array_equal(again[name], array, err_msg=name)


def test_round_trip_from_our_side_and_in_bfloat16():
    _, _, cfg = load("fs")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes(cfg)
    )
    state = official.to_state_dict(params, cfg)
    # torch.from_numpy and safetensors want it.
    assert all(array.flags.c_contiguous for array in state.values())
    jax.tree.map(np.testing.assert_array_equal, official.from_state_dict(state, cfg), params)
    halves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    state = official.to_state_dict(halves, cfg)
    assert all(array.dtype == np.float32 for array in state.values())
    again = official.from_state_dict(state, cfg)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float32(b)), again, halves)


def test_norms_go_to_their_own_places():
    # The recorded networks have scales of one, so their logits can't tell the norms apart.
    _, state, cfg = load("dfm")
    norms = [name for name in state if "norm" in name]
    assert len(norms) == 5
    state |= {name: np.full(32, i + 2.0, np.float32) for i, name in enumerate(norms)}
    params = official.from_state_dict(state, cfg)
    for i in range(cfg.num_blocks):
        for name in ("norm1", "norm2"):
            scale_ND = params["blocks"][name]["LayerNorm_0"]["scale"]
            np.testing.assert_array_equal(scale_ND[i], state[f"blocks.{i}.{name}.weight"])
    scale_D = params["final_norm"]["LayerNorm_0"]["scale"]
    np.testing.assert_array_equal(scale_D, state["output_layer.norm_final.weight"])


def test_missing_unexpected_and_misshapen_keys_are_named_together():
    _, state, cfg = load("fs")
    del state["blocks.1.kw.weight"], state["output_layer.linear.bias"]
    state["blocks.2.qw.weight"] = state["blocks.1.qw.weight"]
    state["teacher.weight"] = np.zeros(3)
    state["vocab_embed.weight"] = state["vocab_embed.weight"][:-1]
    state["blocks.0.mlp.0.weight"] = state["blocks.0.mlp.0.weight"].T
    with pytest.raises(ValueError, match="doesn't match the network") as error:
        official.from_state_dict(state, cfg)
    problems = str(error.value).split(": ", 1)[1].split("; ")
    assert sorted(problems) == [
        "blocks.0.mlp.0.weight: shape (32, 128), expected (128, 32)",
        "blocks.1.kw.weight: missing",
        "blocks.2.qw.weight: unexpected",
        "output_layer.linear.bias: missing",
        "teacher.weight: unexpected",
        "vocab_embed.weight: shape (60, 32), expected (61, 32)",
    ]


@pytest.mark.parametrize(
    "name", ["blocks.1.norm2.weight", "time_embedding.mlp.0.bias", "vocab_embed.weight"]
)
def test_one_problem_is_enough(name):
    _, state, cfg = load("dfm")
    missing = {key: array for key, array in state.items() if key != name}
    with pytest.raises(ValueError, match=f"network: {name}: missing$"):
        official.from_state_dict(missing, cfg)
    with pytest.raises(ValueError, match=f"network: module.{name}: unexpected$"):
        official.from_state_dict(state | {f"module.{name}": state[name]}, cfg)
    with pytest.raises(ValueError, match=rf"network: {name}: shape .*expected"):
        official.from_state_dict(state | {name: state[name][..., :-1]}, cfg)


def test_rotary_buffer_is_optional():
    _, state, cfg = load("dfm")
    del state["rotary_emb.inv_freq"]
    official.from_state_dict(state, cfg)


def test_base_weights_do_not_fit_a_conditioned_network():
    _, state, cfg = load("dfm")
    conditioned = dataclasses.replace(cfg, conditioning="official")
    with pytest.raises(ValueError, match="doesn't match the network") as error:
        official.from_state_dict(state, conditioned)
    for name in ("dt_embedding.mlp.0.weight", "blocks.1.condition_fuser.bias"):
        assert f"{name}: missing" in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"conditioning": "additive"}, "conditioning='additive'"), ({"causal": True}, "autoreg")],
    ids=["additive", "causal"],
)
def test_networks_without_an_official_layout_are_refused(change, message):
    _, _, cfg = load("dfm")
    cfg = dataclasses.replace(cfg, **change)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes(cfg))
    with pytest.raises(ValueError, match=f"doesn't support .*{message}"):
        official.to_state_dict(params, cfg)


@pytest.mark.parametrize("change", [{"causal": True}, {"conditioning": "additive"}])
def test_official_weights_are_not_read_as_a_network_without_official_layout(change):
    _, state, cfg = load("dfm")
    with pytest.raises(ValueError, match="doesn't match the network|doesn't support"):
        official.from_state_dict(state, dataclasses.replace(cfg, **change))
