"""The network against a NumPy transcription, and its invariants."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from marks import slow_except

from fsdfm_jax.network import blocks
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import DTYPES, REMATS, SMALLEST_WIDTH, ModelConfig
from fsdfm_jax.ops import logits as logits_lib

SMALL = ModelConfig(vocab_size=19, width=16, num_blocks=2, num_heads=2, cond_width=8)
# Nothing divides anything else by accident: a wrong reshape or split order cannot cancel.
ODD = ModelConfig(vocab_size=29, width=24, num_blocks=3, num_heads=4, cond_width=10)
CONDITIONINGS = ("none", "official", "additive")

run = jax.jit(model_lib.apply, static_argnums=1)
init = jax.jit(model_lib.init_params, static_argnums=1)


def causal(cfg):
    return dataclasses.replace(cfg, causal=True)


def conditioned(cfg, conditioning):
    return dataclasses.replace(cfg, conditioning=conditioning)


def placed(cfg, num_positions=13):
    """With learned positions."""
    return dataclasses.replace(cfg, positions="learned", num_positions=num_positions)


def shapes(cfg):
    return jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), cfg))


def noise_params(cfg, seed=0):
    """Random values everywhere, including parts that are initially zero or one."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if "scale" in name:
            return jnp.asarray(1 + 0.3 * noise)
        fan_in = leaf.shape[-2] if "kernel" in name else 4
        return jnp.asarray(noise / math.sqrt(fan_in))

    return jax.tree_util.tree_map_with_path(fill, shapes(cfg))


def inputs(cfg, batch=5, length=13, seed=1):
    rng = np.random.default_rng(seed)
    x_BL = rng.integers(0, cfg.vocab_size, (batch, length)).astype(np.int32)
    t_B = rng.uniform(0, 1, batch).astype(np.float32)
    h_B = 2.0 ** -rng.integers(0, 11, batch).astype(np.float32)
    return x_BL, t_B, h_B


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))


# --------------------------------------------------------- the layout, from the paper, in float64


def np_silu(x):
    return x / (1 + np.exp(-x))


def np_dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def np_embed_number(p, values):
    i = np.arange(128)
    angles = values[:, None] * 10_000.0 ** (-i / 128)
    features = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    return np_dense(p["out_proj"], np_silu(np_dense(p["in_proj"], features)))


def np_condition(p, conditioning, t, h):
    t = np.asarray(t, np.float64)
    time = np_embed_number(p["time_embedding"], t)
    if conditioning == "none":
        return np_silu(time)
    h = np.asarray(h, np.float64)
    if conditioning == "official":
        both = np.concatenate([time, np_embed_number(p["dt_embedding"], h)], 1)
        return np_silu(np_dense(p["time_condition_fuser"], both))
    width = np_embed_number(p["dt_embedding"], -np.log2(h))
    return np_silu(time + np_dense(p["dt_proj"], width))


def np_modulations(p, cond, parts):
    if "condition_fuser" in p:
        cond = np_silu(np_dense(p["condition_fuser"], cond))
    return np.split(np_dense(p["modulation"], cond)[:, None], parts, -1)


def np_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * p["LayerNorm_0"]["scale"]


def np_rotate(x):
    """x is [L, K] of one head: pairs (j, j + K/2) turn by position * 10000^(-2j/K)."""
    length, head = x.shape
    out = np.empty_like(x)
    for position in range(length):
        for j in range(head // 2):
            angle = position * 10_000.0 ** (-2 * j / head)
            a, b = x[position, j], x[position, j + head // 2]
            out[position, j] = a * np.cos(angle) - b * np.sin(angle)
            out[position, j + head // 2] = b * np.cos(angle) + a * np.sin(angle)
    return out


def np_attention(p, x, heads, is_causal):
    batch, length, width = x.shape
    head = width // heads
    out = np.zeros_like(x)
    for row in range(batch):
        for n in range(heads):
            lanes = slice(n * head, (n + 1) * head)
            q, k, v = (np_dense(p[f"{name}_proj"], x[row])[:, lanes] for name in "qkv")
            scores = np_rotate(q) @ np_rotate(k).T / np.sqrt(head)
            if is_causal:
                scores = np.where(np.tril(np.ones((length, length))) > 0, scores, -1e30)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[row][:, lanes] = weights / weights.sum(1, keepdims=True) @ v
    return np_dense(p["out_proj"], out)


def np_mlp(p, x):
    x = np_dense(p["mlp_in"], x)
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return np_dense(p["mlp_out"], x)


def np_forward(params, cfg, x_BL, t_B=None, h_B=None):
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = p["vocab_embed"]["embedding"][x_BL]
    if cfg.positions == "learned":
        x = x + p["vocab_embed"]["positions"][: x_BL.shape[1]]
    cond = None if cfg.causal else np_condition(p, cfg.conditioning, t_B, h_B)
    for n in range(cfg.num_blocks):
        block = jax.tree.map(lambda leaf, n=n: leaf[n], p["blocks"])
        shift1 = scale1 = shift2 = scale2 = 0.0
        gate1 = gate2 = 1.0
        if cond is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = np_modulations(block["adaln"], cond, 6)
        branch = np_norm(block["norm1"], x) * (1 + scale1) + shift1
        x = x + gate1 * np_attention(block, branch, cfg.num_heads, cfg.causal)
        branch = np_norm(block["norm2"], x) * (1 + scale2) + shift2
        x = x + gate2 * np_mlp(block, branch)
    x = np_norm(p["final_norm"], x)
    if cond is not None:
        shift, scale = np_modulations(p["final_adaln"], cond, 2)
        x = x * (1 + scale) + shift
    return np_dense(p["head"], x)


@pytest.mark.parametrize("cfg", [SMALL, ODD], ids=["small", "odd"])
@pytest.mark.parametrize("kind", [*CONDITIONINGS, "causal"])
def test_network_is_the_published_layout(cfg, kind):
    cfg = causal(cfg) if kind == "causal" else conditioned(cfg, kind)
    params, (x_BL, t_B, h_B) = noise_params(cfg), inputs(cfg)
    logits_BLV = run(params, cfg, x_BL, t_B, h_B)
    assert logits_BLV.shape == (5, 13, cfg.vocab_size)
    assert logits_BLV.dtype == jnp.float32
    want = np_forward(params, cfg, x_BL, t_B, h_B)
    assert np.std(want) > 0.3  # the comparison is not of zeros
    np.testing.assert_allclose(logits_BLV, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["additive", "causal"])
def test_learned_positions_are_added_to_the_tokens(kind):
    cfg = placed(causal(SMALL) if kind == "causal" else conditioned(SMALL, kind))
    params = noise_params(cfg)
    for length in (13, 9):  # a shorter input has the first of them
        x_BL, t_B, h_B = inputs(cfg, length=length)
        want = np_forward(params, cfg, x_BL, t_B, h_B)
        np.testing.assert_allclose(run(params, cfg, x_BL, t_B, h_B), want, atol=1e-4, rtol=1e-4)
    x_BL, t_B, h_B = inputs(cfg, length=14)
    with pytest.raises(ValueError, match="has 13 learned positions, got a block of 14 tokens"):
        run(params, cfg, x_BL, t_B, h_B)


@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_given_tokens_are_marked(kind):
    """As tokens of their own, with an embedding that is moved by the mark."""
    cfg = dataclasses.replace(placed(conditioned(SMALL, kind)), given="marked")
    params, (x_BL, t_B, h_B) = noise_params(cfg), inputs(cfg)
    frozen_BL = np.random.default_rng(3).random(x_BL.shape) < 0.3
    embed = params["vocab_embed"]
    twice = {
        "embedding": jnp.concatenate(
            [embed["embedding"], embed["embedding"] + embed["given"][None]]
        )
    }
    head = {name: jnp.concatenate([leaf, leaf], -1) for name, leaf in params["head"].items()}
    larger = params | {"head": head, "vocab_embed": twice | {"positions": embed["positions"]}}
    plain = dataclasses.replace(cfg, given="unmarked", vocab_size=2 * cfg.vocab_size)
    want = run(larger, plain, x_BL + cfg.vocab_size * frozen_BL, t_B, h_B)[..., : cfg.vocab_size]
    got = run(params, cfg, x_BL, t_B, h_B, frozen_BL)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
    none = run(params, cfg, x_BL, t_B, h_B)
    assert np.abs(got - none).max() > 0.1
    np.testing.assert_array_equal(none, run(params, cfg, x_BL, t_B, h_B, np.zeros_like(frozen_BL)))
    with pytest.raises(ValueError, match=r"frozen_BL must hold one flag per token, .*got shape"):
        run(params, cfg, x_BL, t_B, h_B, frozen_BL[:, :-1])


def test_the_mark_starts_at_zero_and_learns():
    """All other parameters start as without it."""
    cfg = dataclasses.replace(SMALL, given="marked")
    x_BL, t_B, _ = inputs(cfg)
    frozen_BL = np.ones(x_BL.shape, bool)
    fresh = init(jax.random.key(5), cfg)
    mark_D = fresh["vocab_embed"].pop("given")
    assert mark_D.shape == (16,)
    assert not mark_D.any()
    jax.tree.map(np.testing.assert_array_equal, init(jax.random.key(5), SMALL), fresh)
    params = noise_params(SMALL)
    params["vocab_embed"]["given"] = mark_D
    loss = lambda p: jnp.sum(jnp.sin(model_lib.apply(p, cfg, x_BL, t_B, None, frozen_BL)))
    assert (jax.jit(jax.grad(loss))(params)["vocab_embed"]["given"] != 0).all()


def test_learned_positions_change_nothing_else():
    """The same seed gives equal other parameters, and equal logits without positions."""
    key = jax.random.key(5)
    rotary, learned = init(key, SMALL), init(key, placed(SMALL))
    table_LD = learned["vocab_embed"].pop("positions")
    assert table_LD.shape == (13, 16)
    assert 0.015 < table_LD.std() < 0.025
    jax.tree.map(np.testing.assert_array_equal, rotary, learned)
    params, (x_BL, t_B, _) = noise_params(SMALL), inputs(SMALL)
    none = params | {"vocab_embed": params["vocab_embed"] | {"positions": jnp.zeros((13, 16))}}
    np.testing.assert_array_equal(
        run(none, placed(SMALL), x_BL, t_B), run(params, SMALL, x_BL, t_B)
    )


@pytest.mark.parametrize("kind", ["official", "causal"])
def test_scan_is_a_loop_over_blocks(kind):
    cfg = causal(ODD) if kind == "causal" else conditioned(ODD, kind)
    params, (x_BL, t_B, h_B) = noise_params(cfg), inputs(cfg)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    cond = None if cfg.causal else np_condition(p, kind, t_B, h_B)
    adaln = p["blocks"].get("adaln")
    rotary = blocks.rotary_tables(jnp.arange(13), cfg.head_width)
    block = jax.jit(blocks.Block(cfg, train=False).apply)
    x = params["vocab_embed"]["embedding"][x_BL]
    for n in range(cfg.num_blocks):
        one = jax.tree.map(lambda leaf, n=n: leaf[n], params["blocks"])
        modulation = None
        if cond is not None:
            parts = np_modulations(jax.tree.map(lambda leaf, n=n: leaf[n], adaln), cond, 1)
            modulation = jnp.asarray(parts[0][:, 0], jnp.float32)
        x, _ = block({"params": one}, x, None, modulation, rotary, None)
    x = np_norm(p["final_norm"], np.asarray(x, np.float64))
    if cond is not None:
        shift, scale = np_modulations(p["final_adaln"], cond, 2)
        x = x * (1 + scale) + shift
    logits_BLV = run(params, cfg, x_BL, t_B, h_B)
    np.testing.assert_allclose(logits_BLV, np_dense(p["head"], x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("width", "num_blocks", "num_heads", "cond_width", "base", "official"),
    [
        (768, 12, 12, 128, "169.63", "170.17"),
        (2048, 21, 32, 256, "1330.67", "1333.96"),
        (2048, 28, 32, 256, "1705.20", "1709.40"),
    ],
    ids=["0.17B", "1.3B", "1.7B"],
)
def test_parameter_counts_of_the_paper(width, num_blocks, num_heads, cond_width, base, official):
    cfg = ModelConfig(50_257, width, num_blocks, num_heads, cond_width)
    counts = {
        kind: model_lib.count_params(shapes(conditioned(cfg, kind))) for kind in CONDITIONINGS
    }
    assert f"{counts['none'] / 1e6:.2f}" == base
    assert f"{counts['official'] / 1e6:.2f}" == official
    # One embedder of 256 sinusoids and P, nothing per block.
    extra = 256 * cond_width + cond_width + cond_width**2 + cond_width + cond_width**2
    assert counts["additive"] - counts["none"] == extra


# -------------------------------------------------------------------------- the start of training


@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_diffusion_networks_start_at_zero_logits(kind):
    cfg = conditioned(SMALL, kind)
    params = init(jax.random.key(0), cfg)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    zeros = [params["head"], params["final_adaln"]["modulation"]]
    zeros.append(params["blocks"]["adaln"]["modulation"])
    if kind == "additive":
        zeros.append(params["dt_proj"])
    assert all(not leaf.any() for leaf in jax.tree.leaves(zeros))
    kernels = params["blocks"]["q_proj"]["kernel"]
    assert kernels.any()
    assert not np.array_equal(kernels[0], kernels[1])  # each block has independent draws
    # Xavier-uniform over one block's (in, out), not over the stack: up to sqrt(6 / 2D).
    bound = math.sqrt(6 / (2 * cfg.width))
    assert 0.9 * bound < np.abs(kernels).max() <= bound
    # With a head that isn't zero: each block is the identity until its gates open.
    assert not run(params, cfg, *inputs(cfg)).any()
    params["head"] = noise_params(cfg)["head"]
    logits_BLV = run(params, cfg, *inputs(cfg))
    p = jax.tree.map(np.asarray, params)
    no_blocks = np_norm(p["final_norm"], p["vocab_embed"]["embedding"][inputs(cfg)[0]])
    np.testing.assert_allclose(logits_BLV, np_dense(p["head"], no_blocks), atol=1e-4)


@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_h_changes_the_output_only_when_conditioned(kind):
    cfg = conditioned(SMALL, kind)
    params, (x_BL, t_B, h_B) = noise_params(cfg), inputs(cfg)
    one = run(params, cfg, x_BL, t_B, h_B)
    other = run(params, cfg, x_BL, t_B, h_B / 2)
    if kind == "none":
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, run(params, cfg, x_BL, t_B))
    else:
        # Every row; a raw h (official) of 2^-10 moves logits by 1e-4 at best, log2 h by far more.
        assert np.abs(one - other).max((1, 2)).min() > (1e-2 if kind == "additive" else 1e-5)
    # Time always matters, and a row is moved by its own time and width alone.
    t_B = t_B + 0.1 * (np.arange(5) == 3)
    moved = np.abs(run(params, cfg, x_BL, t_B, h_B) - one).max((1, 2)) > 1e-4
    np.testing.assert_array_equal(moved, np.arange(5) == 3)


def test_additive_tells_small_widths_apart_and_takes_zero():
    cfg = conditioned(SMALL, "additive")
    params, (x_BL, t_B, _) = noise_params(cfg), inputs(cfg)
    at = lambda h: run(params, cfg, x_BL, t_B, jnp.full(5, h))
    separation = np.abs(at(2.0**-10) - at(2.0**-9)).mean()
    assert separation > 0.1 * np.abs(at(1.0) - at(0.5)).mean()
    assert jnp.isfinite(at(0.0)).all()
    np.testing.assert_array_equal(at(0.0), at(SMALLEST_WIDTH))


@pytest.mark.parametrize("dtype", DTYPES)
def test_added_conditioning_starts_as_the_base_model_bitwise(dtype):
    base_cfg = dataclasses.replace(SMALL, dtype=dtype)
    cfg = conditioned(base_cfg, "additive")
    base = noise_params(base_cfg)
    fresh = init(jax.random.key(0), cfg)
    params = model_lib.add_conditioning(base, fresh)
    assert jax.tree.structure(params) == jax.tree.structure(fresh)
    x_BL, t_B, h_B = inputs(cfg)
    want = run(base, base_cfg, x_BL, t_B)
    assert np.std(want) > 0.3
    for width in (h_B, np.zeros_like(h_B)):
        np.testing.assert_array_equal(run(params, cfg, x_BL, t_B, width), want)


def test_gradient_reaches_dt_proj_at_the_start():
    cfg = conditioned(SMALL, "additive")
    fresh = init(jax.random.key(0), cfg)
    params = model_lib.add_conditioning(noise_params(SMALL), fresh)
    x_BL, t_B, h_B = inputs(cfg)
    loss = lambda p: jnp.sum(jnp.sin(model_lib.apply(p, cfg, x_BL, t_B, h_B)))
    grads = jax.jit(jax.grad(loss))(params)
    assert jnp.linalg.norm(grads["dt_proj"]["kernel"]) > 1e-2
    assert (grads["dt_proj"]["kernel"] != 0).mean() > 0.9
    # P = 0 stands between the loss and the embedder, for this one step.
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads["dt_embedding"]))


def test_add_conditioning_names_what_does_not_fit():
    fresh = shapes(conditioned(SMALL, "additive"))
    with pytest.raises(ValueError, match="same model config") as error:
        model_lib.add_conditioning(shapes(dataclasses.replace(SMALL, vocab_size=20)), fresh)
    text = str(error.value)
    assert "/vocab_embed/embedding: (20, 16) in the base, (19, 16) expected" in text
    assert "/head/bias" in text
    assert "/head/kernel" in text
    assert "/blocks" not in text

    official = shapes(conditioned(SMALL, "official"))
    with pytest.raises(ValueError, match="only in the base") as error:
        model_lib.add_conditioning(official, fresh)
    text = str(error.value)
    assert "/time_condition_fuser: only in the base" in text
    assert "/blocks/adaln/condition_fuser: only in the base" in text

    base = shapes(SMALL)
    base["head"] = base["head"]["kernel"]
    with pytest.raises(ValueError, match=r"/head: a group of parameters in one tree, an array"):
        model_lib.add_conditioning(base, fresh)
    base = shapes(SMALL)
    base["final_norm"]["LayerNorm_0"]["scale"] = {"deeper": base["head"]["bias"]}
    with pytest.raises(ValueError, match=r"/final_norm/LayerNorm_0/scale: a group"):
        model_lib.add_conditioning(base, fresh)


@pytest.mark.parametrize("conditioning", ["additive", "official"])
def test_add_conditioning_takes_complete_diffusion_networks_only(conditioning):
    fresh = shapes(conditioned(SMALL, conditioning))
    with pytest.raises(ValueError, match="/time_embedding: missing in the base"):
        model_lib.add_conditioning(shapes(dataclasses.replace(SMALL, causal=True)), fresh)
    headless = shapes(SMALL)
    del headless["head"]
    with pytest.raises(ValueError, match="/head: missing in the base"):
        model_lib.add_conditioning(headless, fresh)


# -------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("attention", ["manual", "blocked", "xla"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_who_sees_whom(is_causal, attention):
    cfg = dataclasses.replace(SMALL, causal=is_causal, attention=attention)
    params, (x_BL, t_B, _) = noise_params(cfg), inputs(cfg, batch=1)
    logits = run(params, cfg, x_BL, t_B)
    for position in (0, 6, 12):
        other = x_BL.copy()
        other[0, position] = (other[0, position] + 1) % cfg.vocab_size
        moved_L = np.abs(run(params, cfg, other, t_B) - logits).max((0, 2)) > 1e-5
        first = position if is_causal else 0
        np.testing.assert_array_equal(moved_L, np.arange(13) >= first)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_attention_implementations_agree(is_causal):
    cfg = dataclasses.replace(ODD, causal=is_causal)
    params, args = noise_params(cfg), inputs(cfg)
    logits = run(params, dataclasses.replace(cfg, attention="manual"), *args)
    for name in ("auto", "blocked", "xla"):
        other = run(params, dataclasses.replace(cfg, attention=name), *args)
        np.testing.assert_allclose(logits, other, atol=2e-5, rtol=2e-5)


def test_rotary_scores_depend_on_distance_only():
    length, head = 300, 16
    rng = np.random.default_rng(0)
    same = lambda: jnp.broadcast_to(rng.standard_normal(head).astype(np.float32), (length, head))
    rotary = blocks.rotary_tables(jnp.arange(length), head)
    q, k = (blocks.rotate(same()[None, None], rotary)[0, 0] for _ in range(2))
    scores = np.asarray(q @ k.T)
    for distance in (-250, -7, 0, 1, 60):
        diagonal = np.diagonal(scores, distance)
        # Angles reach 300 rad, where float32 resolves 3e-5.
        np.testing.assert_allclose(diagonal, diagonal[0], atol=2e-3)
    assert np.std(scores[0]) > 0.3  # and on distance it does depend
    np.testing.assert_allclose(np.linalg.norm(q, axis=1), np.linalg.norm(q[0]), rtol=1e-5)
    shifted = blocks.rotary_tables(jnp.arange(length) + 40, head)
    for table, part in zip(shifted, blocks.rotary_tables(jnp.arange(40, 340), head), strict=True):
        np.testing.assert_array_equal(table, part)


# ------------------------------------------------------------------------- dropout, recomputation


def count_dots(jaxpr):
    """Matrix products of a jaxpr, including nested ones."""
    own = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)
    inner = (count_dots(x) for e in jaxpr.eqns for x in jaxprs_in_params(e.params))
    return own + sum(inner)


@pytest.mark.parametrize("attention", slow_except(["blocked"], ["manual", "blocked"]))
def test_remat_changes_nothing_but_memory(attention):
    cfg = dataclasses.replace(SMALL, dropout=0.3, attention=attention)
    params, args = noise_params(cfg), inputs(cfg, batch=2, length=6)

    def traced(cfg):
        loss = lambda p, key: jnp.sum(jnp.sin(model_lib.apply(p, cfg, *args, key=key)))
        return jax.jit(jax.value_and_grad(loss)).trace(params, jax.random.key(3))

    results, dots = {}, {}
    for remat in REMATS:
        program = traced(dataclasses.replace(cfg, remat=remat))
        dots[remat] = count_dots(program.jaxpr.jaxpr)
        results[remat] = program.lower().compile()(params, jax.random.key(3))
    for remat in ("full", "dots"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4),
            results[remat],
            results["none"],
        )
    # Recomputation is real: "full" repeats all eight products of a block, two of attention.
    assert dots["full"] == dots["none"] + 8
    # "dots" repeats only those that attention keeps to itself: the two where it is "manual", and
    # none where its output is kept by name.
    assert dots["dots"] == dots["none"] + {"manual": 2, "blocked": 0}[attention]


def test_the_share_dropped_is_exact():
    rate, size = 0.1, 2**22
    drop = jax.jit(lambda key, x: blocks.Dropout(rate, True).apply({}, x, rngs={"dropout": key}))
    for dtype in (jnp.float32, jnp.bfloat16):
        out = np.asarray(drop(jax.random.key(0), jnp.ones(size, dtype)), np.float64)
        kept = jnp.ones((), dtype) / (1 - rate)  # in the dtype of the activations
        assert set(np.unique(out)) == {0.0, float(kept)}
        # 5 standard errors are 7e-4; eight bits of random numbers would drop 25/256 or 26/256.
        assert abs(np.mean(out == 0) - rate) < 5 * math.sqrt(rate * (1 - rate) / size)


def test_dropout_only_with_a_key():
    cfg = dataclasses.replace(SMALL, dropout=0.3)
    params, (x_BL, t_B, _) = noise_params(cfg), inputs(cfg)
    train = lambda seed: run(params, cfg, x_BL, t_B, key=jax.random.key(seed))
    off = run(params, cfg, x_BL, t_B)
    np.testing.assert_array_equal(off, run(params, SMALL, x_BL, t_B))
    np.testing.assert_array_equal(train(0), train(0))
    assert np.abs(train(0) - off).max() > 0.1
    assert np.abs(train(0) - train(1)).max() > 0.1
    zero_rate = run(params, SMALL, x_BL, t_B, key=jax.random.key(0))
    np.testing.assert_array_equal(zero_rate, off)


@pytest.mark.parametrize(
    ("num_blocks", "branches"),
    [(2, ("attention",)), (2, ("mlp",)), (1, ("attention", "mlp"))],
    ids=["attention", "mlp", "both"],
)
def test_dropout_masks_are_independent_and_keep_the_mean(num_blocks, branches):
    """Each branch gives the constant 1, so the residual stream counts how often a channel was kept.

    Two channels are never written and hold 0 and 1: they undo the final LayerNorm.
    """
    rate, width, batch, length = 0.25, 64, 32, 8
    cfg = ModelConfig(width, width, num_blocks, 2, 4, dropout=rate)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes(cfg))
    norms = (params["blocks"]["norm1"], params["blocks"]["norm2"], params["final_norm"])
    for norm in norms:
        norm["LayerNorm_0"]["scale"] += 1
    params["vocab_embed"]["embedding"][:, 1] = 1
    params["head"]["kernel"] += np.eye(width)
    ones = 1.0 * (np.arange(width) > 1)
    block, zero = params["blocks"], np.zeros(width)
    gate1, gate2 = (np.ones(width) * (name in branches) for name in ("attention", "mlp"))
    # shift, scale, gate of attention, then of the MLP; scale -1 leaves the shift alone.
    modulation = np.concatenate([ones, zero - 1, gate1, zero, zero, gate2])
    block["adaln"]["modulation"]["bias"] += modulation
    block["v_proj"]["kernel"] += np.eye(width)
    block["out_proj"]["kernel"] += np.eye(width)
    block["mlp_out"]["bias"] += ones

    tokens, time = np.zeros((batch, length), np.int32), np.zeros(batch, np.float32)
    logits = np.asarray(run(params, cfg, tokens, time, key=jax.random.key(5)), np.float64)
    kept = (logits[..., 2:] - logits[..., :1]) / (logits[..., 1:2] - logits[..., :1]) * (1 - rate)
    count = np.rint(kept)
    np.testing.assert_allclose(kept, count, atol=1e-3)  # scaled by exactly 1 / (1 - rate)
    # Two independent masks: binomial. 15872 channels; 5 standard errors.
    size = count.size
    for successes, probability in enumerate((rate**2, 2 * rate * (1 - rate), (1 - rate) ** 2)):
        error = math.sqrt(probability * (1 - probability) / size)
        assert abs(np.mean(count == successes) - probability) < 5 * error, successes
    # And no axis shares a mask: the variance of a mean over one axis is that of independent draws.
    # Means of n draws, m of them: (estimate / truth) has a relative s.e. of sqrt(2 / m).
    variance = 2 * rate * (1 - rate)
    for axis in range(3):
        means = count.mean(axis)
        ratio = means.var() * count.shape[axis] / variance
        assert abs(ratio - 1) < 5 * math.sqrt(2 / means.size)


# --------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("attention", "dtype", "num_positions"),
    [
        ("manual", "float32", 0),
        ("manual", "float32", 12),
        ("blocked", "float32", 0),
        ("xla", "float32", 0),
        ("manual", "bfloat16", 0),
        ("auto", "bfloat16", 0),
    ],
)
def test_decoding_step_by_step_is_the_full_causal_network(attention, dtype, num_positions):
    cfg = dataclasses.replace(ODD, causal=True, attention=attention, dtype=dtype)
    if num_positions:
        cfg = placed(cfg, num_positions)
        with pytest.raises(ValueError, match="12 learned positions, got a block of 13"):
            model_lib.empty_cache(cfg, 2, 13)
    params, (x_BL, _, _) = noise_params(cfg), inputs(cfg, batch=2, length=9)
    full_BLV = run(params, cfg, x_BL)
    # Longer than the text, as in generation: the empty tail must not be attended to.
    cache = model_lib.empty_cache(cfg, 2, 12)
    assert cache.keys.shape == cache.values.shape == (3, 2, 4, 12, 6)
    assert cache.keys.dtype == jnp.dtype(dtype)
    step = jax.jit(model_lib.decode_step, static_argnums=1)
    steps = []
    for position in range(9):
        logits_BV, cache = step(params, cfg, x_BL[:, position], jnp.int32(position), cache)
        assert logits_BV.dtype == jnp.float32
        steps.append(logits_BV)
    assert not cache.keys[:, :, :, 9:].any()
    if dtype == "float32":
        np.testing.assert_allclose(np.stack(steps, 1), full_BLV, atol=2e-5, rtol=2e-5)
    else:
        # Same sums in another order, rounded to 8 bits: a few 2^-8 relative.
        assert relative_error(np.stack(steps, 1), full_BLV) < 0.02


# ---------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("kind", [*CONDITIONINGS, "causal"])
def test_logits_come_as_features_and_head(kind):
    cfg = causal(ODD) if kind == "causal" else conditioned(ODD, kind)
    params, (x_BL, t_B, h_B) = noise_params(cfg), inputs(cfg)
    logits = jax.jit(model_lib.predict, static_argnums=1)(params, cfg, x_BL, t_B, h_B)
    assert logits.shape == (5, 13, 29)
    assert logits.features_BLD.shape == (5, 13, 24)
    np.testing.assert_array_equal(logits.kernel_DV, params["head"]["kernel"])
    np.testing.assert_array_equal(run(params, cfg, x_BL, t_B, h_B), logits_lib.dense(logits))


def test_logits_held_at_once():
    params, args = noise_params(ODD), inputs(ODD)
    predict = jax.jit(model_lib.predict, static_argnums=1)
    logits = predict(params, dataclasses.replace(ODD, logits_mib=3), *args)
    assert logits.chunk_size == 3 * 2**20 // 4  # float32
    # None: they are written down at once.
    everything = predict(params, dataclasses.replace(ODD, logits_mib=0), *args)
    assert isinstance(everything, jax.Array)
    np.testing.assert_allclose(everything, logits_lib.dense(logits), atol=2e-5, rtol=2e-5)


# ----------------------------------------------------------------------------- dtypes and devices


@pytest.mark.parametrize("kind", ["official", "additive", "causal"])
def test_bfloat16_activations(kind):
    cfg = causal(ODD) if kind == "causal" else conditioned(ODD, kind)
    half = dataclasses.replace(cfg, dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes(half)))
    params, args = noise_params(cfg), inputs(cfg)
    logits = run(params, half, *args)
    assert logits.dtype == jnp.float32
    # Every matmul reads bfloat16.
    text = run.lower(params, half, *args).as_text()
    operands = re.findall(r"dot_general .*: \(tensor<(\S+)>, tensor<(\S+)>\)", text)
    assert len(operands) >= 8
    assert {shape.split("x")[-1] for pair in operands for shape in pair} == {"bf16"}
    # Not float32 by name only: the head's sums aren't rounded to bfloat16 on the way.
    assert np.mean(logits == logits.astype(jnp.bfloat16).astype(jnp.float32)) < 0.05
    # Unit roundoff is 2^-9; three blocks of a handful of roundings each gave 0.6-1.3 %.
    error = relative_error(logits, run(params, cfg, *args))
    assert 1e-4 < error < 0.03  # and it is really bfloat16 that computes


def test_residual_stream_is_float32():
    # A stream around 64 with deviations of order 1: there bfloat16 steps by 0.5 (0.14 rms).
    cfg = conditioned(ODD, "official")
    params, args = noise_params(cfg), inputs(cfg)
    params["vocab_embed"]["embedding"] += 64
    logits = run(params, dataclasses.replace(cfg, dtype="bfloat16"), *args)
    assert relative_error(logits, run(params, cfg, *args)) < 0.03


@pytest.mark.optimised
@pytest.mark.parametrize("kind", ["additive", "causal"])
def test_batch_over_eight_devices_is_one_device(kind):
    cfg = causal(SMALL) if kind == "causal" else conditioned(SMALL, kind)
    params, args = noise_params(cfg), inputs(cfg, batch=16)
    want = run(params, cfg, *args)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    sharded = jax.jit(
        lambda params, *args: model_lib.apply(params, cfg, *args),
        in_shardings=(everywhere, rows, rows, rows),
        out_shardings=rows,
    )
    logits = sharded(jax.device_put(params, everywhere), *jax.device_put(args, rows))
    assert len(logits.addressable_shards) == 8
    assert logits.addressable_shards[0].data.shape == (2, 13, cfg.vocab_size)
    np.testing.assert_allclose(logits, want, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({field: 0}, rf"model\.{field} must be at least 1, got 0")
            for field in (
                "vocab_size",
                "width",
                "num_blocks",
                "num_heads",
                "cond_width",
                "mlp_ratio",
            )
        ),
        ({"num_heads": 3}, r"width=16 must split into num_heads=3"),
        ({"width": 6, "num_heads": 2}, r"heads of even width"),
        ({"logits_mib": -1}, r"model\.logits_mib must be at least 0, got -1"),
        ({"dropout": 1.0}, r"model\.dropout must be in \[0, 1\), got 1\.0"),
        ({"dropout": -0.1}, r"model\.dropout .*got -0\.1"),
        ({"dropout": math.nan}, r"model\.dropout .*got nan"),
        ({"conditioning": "adaptive"}, r"model\.conditioning='adaptive'.*none, official, additive"),
        ({"attention": "flash"}, r"model\.attention='flash'.*auto, manual, blocked, xla, cudnn"),
        ({"positions": "sine"}, r"model\.positions='sine'.*rotary, learned"),
        ({"positions": "learned"}, r"model\.num_positions .*at least 1.* got 0 with 'learned'"),
        ({"num_positions": 4}, r"model\.num_positions .*0 with 'rotary'; got 4"),
        ({"given": "hidden"}, r"model\.given='hidden'.*unmarked, marked"),
        ({"causal": True, "given": "marked"}, r"causal.*given='unmarked'"),
        ({"remat": "all"}, r"model\.remat='all'.*none, full, dots"),
        ({"dtype": "float16"}, r"model\.dtype='float16'.*float32, bfloat16"),
        ({"causal": True, "conditioning": "official"}, r"causal.*conditioning='none'"),
        ({"causal": True, "conditioning": "additive"}, r"causal.*conditioning='none'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_missing_time_or_width():
    x_BL, t_B, h_B = inputs(SMALL)
    for kind in CONDITIONINGS:
        cfg = conditioned(SMALL, kind)
        with pytest.raises(ValueError, match="needs the time t_B"):
            model_lib.apply(shapes(cfg), cfg, x_BL, None, h_B)
    for kind in ("official", "additive"):
        cfg = conditioned(SMALL, kind)
        with pytest.raises(ValueError, match=f"conditioning='{kind}' needs the step width h_B"):
            model_lib.apply(shapes(cfg), cfg, x_BL, t_B)


def test_causal_network_ignores_time_and_has_no_conditioning():
    cfg = causal(SMALL)
    params, (x_BL, t_B, h_B) = noise_params(cfg), inputs(cfg)
    assert set(params) == {"vocab_embed", "blocks", "final_norm", "head"}
    assert "adaln" not in params["blocks"]
    np.testing.assert_array_equal(run(params, cfg, x_BL), run(params, cfg, x_BL, t_B, h_B))
