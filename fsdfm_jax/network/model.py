"""The network: a diffusion transformer over tokens, behind `init_params`, `predict` and `apply`.

Token embedding (untied from the head), N blocks of rotary bidirectional attention and a tanh-GELU
MLP, each branch modulated by the time through adaLN, then a modulated linear head. The layout is
that of the published FS-DFM weights (arXiv:2509.20624 App. A); `conditioning` says how the step
width h enters:

    none       not at all: cond = SiLU(temb)                                     base models
    official   a second embedder of raw h, fused once and again in each block    published weights
    additive   cond = SiLU(temb + P hemb), of -log2 h, P zero at start           our default

With `additive` a network that starts from base weights computes exactly what the base model
computes. The sinusoids of a raw h barely separate 2^-10 from 2^-9; those of -log2 h, the number of
halvings, separate all widths alike.

`causal=True` makes the autoregressive baseline of the same blocks without time conditioning or
modulation.

Activations are `dtype`; parameters, residual stream, norms, softmax and logits are float32. The
only file that knows Flax.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fsdfm_jax.ops import attention
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.ops.logits import Factored, Logits
from fsdfm_jax.parallel import rules

Params = dict[str, Any]

CONDITIONINGS = ("none", "official", "additive")
REMATS = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        attention.saved,
    ),
}
DTYPES = ("float32", "bfloat16")

NUM_FREQUENCIES = 128
ROTARY_BASE = 10_000.0
NORM_EPS = 1e-5
# Widths below this are indistinguishable from an infinitesimal step; keeps log2 finite for h=0.
SMALLEST_WIDTH = 2.0**-20


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that is static about a network.

    Attributes:
      vocab_size: V, the mask token included where there is one.
      width, num_blocks, num_heads, cond_width: D, N, H, C.
      mlp_ratio: F = mlp_ratio * D.
      dropout: rate on the output of each branch, in training only.
      conditioning: "none" | "official" | "additive".
      causal: autoregressive baseline; needs conditioning "none".
      dtype: of activations, "float32" | "bfloat16".
      attention: see `attention`, one of its `IMPLEMENTATIONS`.
      remat: what the backward pass recomputes, "none" | "full" | "dots" (what matrix products give
        is kept, and what "blocked" and "cudnn" attention give, which recompute their scores).
      logits_mib: MiB of a chunk of float32 logits, on each device. Changes no result but by
        rounding. 0 writes all of them down, as arrays: the reference for the other values.
    """

    vocab_size: int
    width: int
    num_blocks: int
    num_heads: int
    cond_width: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    conditioning: str = "none"
    causal: bool = False
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    logits_mib: int = 128

    def __post_init__(self):
        for field in ("vocab_size", "width", "num_blocks", "num_heads", "cond_width", "mlp_ratio"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} must be at least 1, got {getattr(self, field)}.")
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"model.width={self.width} must split into num_heads={self.num_heads} heads of "
                "even width (rotary attention turns pairs of channels)."
            )
        if self.logits_mib < 0:
            raise ValueError(f"model.logits_mib must be at least 0, got {self.logits_mib}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout must lie in [0, 1), got {self.dropout}.")
        choices = {
            "conditioning": CONDITIONINGS,
            "attention": attention.IMPLEMENTATIONS,
            "remat": tuple(REMATS),
            "dtype": DTYPES,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"model.{field}={getattr(self, field)!r} is unknown; expected one of "
                    f"{', '.join(allowed)}."
                )
        if self.causal and self.conditioning != "none":
            raise ValueError("A causal (autoregressive) network takes conditioning='none'.")

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads


class KeyValueCache(NamedTuple):
    """Keys and values of the positions decoded so far, [N, B, H, L, K], in `dtype`."""

    keys: jax.Array
    values: jax.Array


class Modulation(NamedTuple):
    """All that a network computes from time and step width alone, float32.

    Attributes:
      blocks_NB6D: shift, scale, gate of attention, then of the MLP, of each block.
      final_B2D: shift and scale before the head.
    """

    blocks_NB6D: jax.Array
    final_B2D: jax.Array


def init_params(key: jax.Array, cfg: ModelConfig) -> Params:
    """Fresh parameters, float32; blocks are stacked along a leading axis of N."""
    rngs, tokens = {"params": key}, jnp.zeros((1, 1), jnp.int32)
    params = {
        "head": {
            "kernel": jnp.zeros((cfg.width, cfg.vocab_size), jnp.float32),
            "bias": jnp.zeros((cfg.vocab_size,), jnp.float32),
        }
    }
    modulation = None
    if not cfg.causal:
        width = None if cfg.conditioning == "none" else jnp.ones((1,), jnp.float32)
        modulation, variables = _Conditioner(cfg).init_with_output(rngs, jnp.zeros((1,)), width)
        params = _join(params, variables["params"])
    return _join(params, _Trunk(cfg).init(rngs, tokens, modulation)["params"])


def apply(
    params: Params,
    cfg: ModelConfig,
    xt_BL: jax.Array,
    t_B: jax.Array | None = None,
    h_B: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
) -> jax.Array:
    """Logits of the posterior over x1 at each position, written down: float32 [B, L, V].

    Arguments and errors as in `predict`.
    """
    return logits_lib.dense(predict(params, cfg, xt_BL, t_B, h_B, key=key))


def predict(
    params: Params,
    cfg: ModelConfig,
    xt_BL: jax.Array,
    t_B: jax.Array | None = None,
    h_B: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
) -> Logits:
    """Logits of the posterior over x1 at each position, not written down unless logits_mib is 0.

    Args:
      params: from `init_params` or a checkpoint.
      cfg: the network those parameters belong to.
      xt_BL: tokens, int [B, L].
      t_B: time per row, float32 [B] in [0, 1]; None only for causal networks.
      h_B: step width per row, float32 [B]; needed by h-conditioned networks, ignored by the others.
      key: typed PRNG key that switches dropout on; None is evaluation mode.

    Returns:
      [B, L, V], see `logits`.

    Raises:
      ValueError: if a time or width the network needs is missing, or isn't one per row.
    """
    for name, value in (("t_B", t_B), ("h_B", h_B)):
        if value is not None and jnp.shape(value) != xt_BL.shape[:1]:
            raise ValueError(
                f"{name} must hold one number per row, shape {xt_BL.shape[:1]}, got shape "
                f"{jnp.shape(value)}."
            )
    return predict_modulated(params, cfg, xt_BL, modulate(params, cfg, t_B, h_B), key=key)


def modulate(
    params: Params, cfg: ModelConfig, t_B: jax.Array | None, h_B: jax.Array | None
) -> Modulation | None:
    """What times and widths do to the network; None for a causal one, which knows neither.

    Raises:
      ValueError: if a time or width the network needs is missing.
    """
    if cfg.causal:
        return None
    if t_B is None:
        raise ValueError("A diffusion network needs the time t_B of each row, got None.")
    if h_B is None and cfg.conditioning != "none":
        raise ValueError(
            f"A network with conditioning={cfg.conditioning!r} needs the step width h_B of "
            "each row, got None."
        )
    h_B = None if cfg.conditioning == "none" else h_B
    return _Conditioner(cfg).apply({"params": params}, t_B, h_B)


def predict_modulated(
    params: Params,
    cfg: ModelConfig,
    xt_BL: jax.Array,
    modulation: Modulation | None,
    *,
    key: jax.Array | None = None,
) -> Logits:
    """As `predict`, from what `modulate` gave for the rows, or for one row in place of all."""
    rngs = {} if key is None else {"dropout": key}
    features_BLD, _ = _Trunk(cfg, train=key is not None).apply(
        {"params": params}, xt_BL, modulation, rngs=rngs
    )
    logits = _factored(params, cfg, features_BLD)
    return logits if cfg.logits_mib else logits_lib.dense(logits)


# MiB that the modulations of all steps of a sampler may take; beyond, each step computes its own.
_AHEAD_MIB = 256


def denoiser(params: Params, cfg: ModelConfig, steps: int) -> tuple[Callable, Callable | None]:
    """A network as `sampler.sample` takes it: its arguments `denoise` and `condition`.

    What depends on the times alone is left to `condition`, to be computed for all steps ahead and
    for one row in place of all, unless there are too many steps to keep that.
    """
    if steps * (6 * cfg.num_blocks + 2) * cfg.width * 4 > _AHEAD_MIB * 2**20:
        return functools.partial(predict, params, cfg), None

    def condition(t_S, h_S):
        blocks_NS6D, final_S2D = modulate(params, cfg, t_S, h_S)
        return Modulation(jnp.swapaxes(blocks_NS6D, 0, 1)[:, :, None], final_S2D[:, None])

    return functools.partial(predict_modulated, params, cfg), condition


def _factored(params: Params, cfg: ModelConfig, features_BLD: jax.Array) -> Factored:
    chunk_size = cfg.logits_mib * 2**18  # entries of 4 bytes
    head = params["head"]
    return Factored(
        features_BLD, head["kernel"], head["bias"], dtype=cfg.dtype, chunk_size=chunk_size
    )


def _join(tree: Params, other: Params) -> Params:
    """Both trees of parameters in one."""
    if not isinstance(tree, dict):
        return tree
    return {
        name: _join(tree[name], other[name])
        if name in tree and name in other
        else (tree | other)[name]
        for name in tree | other
    }


def empty_cache(cfg: ModelConfig, batch: int, length: int) -> KeyValueCache:
    """The cache of a causal network before its first token."""
    shape = (cfg.num_blocks, batch, cfg.num_heads, length, cfg.head_width)
    return KeyValueCache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))


def decode_step(
    params: Params,
    cfg: ModelConfig,
    token_B: jax.Array,
    position: jax.Array,
    cache: KeyValueCache,
) -> tuple[jax.Array, KeyValueCache]:
    """One autoregressive step: logits after `token_B` at `position`, and the cache with it added.

    Args:
      token_B: int [B].
      position: int scalar below the cache's length; positions are decoded in order from 0.

    Returns:
      (logits float32 [B, V], cache).

    Raises:
      ValueError: for a network that isn't causal.
    """
    if not cfg.causal:
        raise ValueError("Decoding token by token needs a causal network (causal=True).")
    position = jnp.asarray(position, jnp.int32)
    features_B1D, cache = _Trunk(cfg).apply(
        {"params": params}, token_B[:, None], None, position, cache
    )
    return logits_lib.dense(_factored(params, cfg, features_B1D))[:, 0], cache


def add_conditioning(base: Params, fresh: Params) -> Params:
    """Starts a few-step network from base weights: `fresh` with every parameter that `base` has.

    Raises:
      ValueError: naming parameters whose shapes differ, that only `base` has, or that `base` lacks
        although they have nothing to do with the step width.
    """
    problems = []

    def merge(base_node, fresh_node, path):
        if isinstance(fresh_node, dict) != isinstance(base_node, dict):
            problems.append(f"{path}: a group of parameters in one, an array in the other")
            return fresh_node
        if not isinstance(fresh_node, dict):
            if base_node.shape != fresh_node.shape:
                problems.append(
                    f"{path}: {base_node.shape} in the base, {fresh_node.shape} expected"
                )
            return base_node
        problems.extend(
            f"{path}/{name}: only in the base" for name in sorted(base_node.keys() - fresh_node)
        )
        problems.extend(
            f"{path}/{name}: missing in the base"
            for name in sorted(fresh_node.keys() - base_node - _STEP_CONDITIONING)
        )
        return {
            name: merge(base_node[name], value, f"{path}/{name}") if name in base_node else value
            for name, value in fresh_node.items()
        }

    merged = merge(base, fresh, "")
    if problems:
        raise ValueError(
            "The base weights don't fit the few-step network (same model config?): "
            + "; ".join(problems)
        )
    return merged


# Groups of parameters that only networks conditioned on the step width have.
_STEP_CONDITIONING = frozenset(
    ("dt_embedding", "dt_proj", "time_condition_fuser", "condition_fuser")
)


def count_params(params: Params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# ---------------------------------------------------------------------------------------- modules

_linear_init = nn.initializers.xavier_uniform()
_small_init = nn.initializers.normal(0.02)


def _sinusoids(values_B: jax.Array) -> jax.Array:
    """[cos(v f_i), sin(v f_i)] with f_i = 10000^(-i/128), float32 [B, 256]."""
    exponents = jnp.arange(NUM_FREQUENCIES, dtype=jnp.float32) / NUM_FREQUENCIES
    angles = values_B.astype(jnp.float32)[:, None] * (10_000.0**-exponents)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _rotary(positions_L: jax.Array, head_width: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, float32 [L, K]; both halves of a head share frequencies."""
    exponents = jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    angles = positions_L.astype(jnp.float32)[:, None] * (ROTARY_BASE**-exponents)[None]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x_BHLK: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = (table[None, None] for table in rotary)
    x = x_BHLK.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    turned = x * cos + jnp.concatenate([-second, first], axis=-1) * sin
    return turned.astype(x_BHLK.dtype)


def _modulate(x_BLD, shift_BD, scale_BD):
    return x_BLD * (1.0 + scale_BD[:, None]) + shift_BD[:, None]


class _Linear(nn.Module):
    """A dense layer whose weights lie where `layout` says.

    All rows are one matrix: the backward pass on a CPU takes half as long.
    """

    features: int
    use_bias: bool = True
    dtype: str = "float32"
    kernel_init: Callable[..., jax.Array] = _linear_init

    @nn.compact
    def __call__(self, inputs):
        def weight(name, init, shape):
            # Rounded before it is gathered: half the bytes of an exchange.
            rounded = self.param(name, init, shape, jnp.float32).astype(self.dtype)
            return rules.gather(rounded, "/".join((*self.path, name)))

        width = inputs.shape[-1]
        kernel = weight("kernel", self.kernel_init, (width, self.features))
        rows = jnp.matmul(inputs.reshape(-1, width).astype(self.dtype), kernel)
        if self.use_bias:
            rows += weight("bias", nn.initializers.zeros, (self.features,))[None]
        return rows.reshape(*inputs.shape[:-1], self.features)


class _Embed(nn.Module):
    """A float32 vector of width D for each token."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens_BL):
        shape = (self.cfg.vocab_size, self.cfg.width)
        table_VD = self.param("embedding", _small_init, shape, jnp.float32)
        x_BLD = jnp.take(table_VD, tokens_BL, axis=0)
        # Each device looks up its channels of all rows: vectors are exchanged, not the table.
        x_BLD = rules.constrain(x_BLD, "replicas", None, "spread")
        return rules.constrain(x_BLD, "rows", None, "hidden")


class _Norm(nn.Module):
    """LayerNorm with a scale and no bias, float32."""

    @nn.compact
    def __call__(self, x_BLD):
        return nn.LayerNorm(
            epsilon=NORM_EPS,
            use_bias=False,
            dtype=jnp.float32,
            # E[x^2] - E[x]^2 cancels where a token's mean is far from 0.
            use_fast_variance=False,
        )(x_BLD)


class _Embedder(nn.Module):
    """Sinusoids, linear, SiLU, linear: a number per row to C features."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, values_B):
        dense = functools.partial(
            _Linear, self.cfg.cond_width, dtype=self.cfg.dtype, kernel_init=_small_init
        )
        hidden = nn.silu(dense(name="in_proj")(_sinusoids(values_B).astype(self.cfg.dtype)))
        return dense(name="out_proj")(hidden)


class _AdaLN(nn.Module):
    """Linear from the conditioning to `parts` modulations of width D, zero at start."""

    cfg: ModelConfig
    parts: int

    @nn.compact
    def __call__(self, cond):
        cfg = self.cfg
        if cfg.conditioning == "official":
            fuser = _Linear(
                cfg.cond_width, dtype=cfg.dtype, kernel_init=_linear_init, name="condition_fuser"
            )
            cond = nn.silu(fuser(cond))
        modulation = _Linear(
            self.parts * cfg.width,
            dtype=cfg.dtype,
            kernel_init=nn.initializers.zeros,
            name="modulation",
        )
        return modulation(cond).astype(jnp.float32)


class _Dropout(nn.Module):
    """Sets a share `rate` of the entries to 0 in training and scales up the others.

    `nn.Dropout` turns the random bits into floats first, which on a CPU takes twice as long.
    """

    rate: float
    train: bool

    @nn.compact
    def __call__(self, x):
        if not self.train or self.rate == 0.0:
            return x
        bits = jax.random.bits(self.make_rng("dropout"), x.shape, jnp.uint32)
        dropped = bits < jnp.uint32(self.rate * 2**32)
        return jnp.where(dropped, jnp.zeros((), x.dtype), x / (1.0 - self.rate))


class _BlockModulation(nn.Module):
    """The adaLN of one block, in the place of the tree where the block's other parameters are."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, cond_BC):
        return _AdaLN(self.cfg, 6, name="adaln")(cond_BC)


class _Conditioner(nn.Module):
    """Time and step width to a `Modulation`."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, t_B, h_B):
        cfg = self.cfg
        cond_BC = self._condition(t_B, h_B)
        every_block = nn.vmap(
            _BlockModulation,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=cfg.num_blocks,
        )
        return Modulation(
            every_block(cfg, name="blocks")(cond_BC), _AdaLN(cfg, 2, name="final_adaln")(cond_BC)
        )

    def _condition(self, t_B, h_B):
        cfg = self.cfg
        time = _Embedder(cfg, name="time_embedding")(t_B)
        if cfg.conditioning == "none":
            return nn.silu(time)
        if cfg.conditioning == "official":
            width = _Embedder(cfg, name="dt_embedding")(h_B)
            fuser = _Linear(
                2 * cfg.cond_width,
                dtype=cfg.dtype,
                kernel_init=_linear_init,
                name="time_condition_fuser",
            )
            return nn.silu(fuser(jnp.concatenate([time, width], axis=-1)))
        halvings_B = -jnp.log2(jnp.maximum(h_B.astype(jnp.float32), SMALLEST_WIDTH))
        width = _Embedder(cfg, name="dt_embedding")(halvings_B)
        projected = _Linear(
            cfg.cond_width,
            use_bias=False,
            dtype=cfg.dtype,
            kernel_init=nn.initializers.zeros,
            name="dt_proj",
        )(width)
        return nn.silu(time + projected)


class _Block(nn.Module):
    """x + gate * dropout(branch(LN(x) (1 + scale) + shift)), for attention and MLP in turn."""

    cfg: ModelConfig
    train: bool

    @nn.compact
    def __call__(self, x_BLD, cache, modulation_B6D, rotary, position):
        cfg = self.cfg
        if modulation_B6D is None:
            zeros = jnp.zeros((1, cfg.width), jnp.float32)
            shift1 = scale1 = shift2 = scale2 = zeros
            gate1 = gate2 = zeros + 1.0
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation_B6D, 6, axis=-1)
        drop = _Dropout(cfg.dropout, self.train, name="dropout")

        branch = _modulate(_Norm(name="norm1")(x_BLD), shift1, scale1).astype(cfg.dtype)
        branch, cache = self._attention(branch, cache, rotary, position)
        x_BLD = x_BLD + gate1[:, None] * drop(branch).astype(jnp.float32)
        x_BLD = rules.constrain(x_BLD, "rows", None, None)

        branch = _modulate(_Norm(name="norm2")(x_BLD), shift2, scale2).astype(cfg.dtype)
        branch = self._mlp(branch)
        x_BLD = x_BLD + gate2[:, None] * drop(branch).astype(jnp.float32)
        return rules.constrain(x_BLD, "rows", None, None), cache

    def _attention(self, x_BLD, cache, rotary, position):
        cfg = self.cfg
        batch, length, _ = x_BLD.shape
        dense = functools.partial(
            _Linear, cfg.width, use_bias=False, dtype=cfg.dtype, kernel_init=_linear_init
        )

        def heads(name):
            projected = dense(name=name)(x_BLD).reshape(
                batch, length, cfg.num_heads, cfg.head_width
            )
            return rules.constrain(jnp.swapaxes(projected, 1, 2), "rows", "heads")

        q_BHLK, k_BHLK = _rotate(heads("q_proj"), rotary), _rotate(heads("k_proj"), rotary)
        v_BHLK = heads("v_proj")
        seen_LM = None
        if cache is not None:
            at = (0, 0, position, 0)
            cache = KeyValueCache(
                jax.lax.dynamic_update_slice(cache.keys, k_BHLK, at),
                jax.lax.dynamic_update_slice(cache.values, v_BHLK, at),
            )
            k_BHLK, v_BHLK = cache
            seen_LM = (jnp.arange(k_BHLK.shape[2]) <= position)[None]
        mixed_BHLK = attention.attend(
            q_BHLK,
            k_BHLK,
            v_BHLK,
            mask_LM=seen_LM,
            causal=cfg.causal and cache is None,
            implementation=cfg.attention,
        )
        merged_BLD = jnp.swapaxes(mixed_BHLK, 1, 2).reshape(batch, length, cfg.width)
        return dense(name="out_proj")(merged_BLD), cache

    def _mlp(self, x_BLD):
        cfg = self.cfg
        dense = functools.partial(_Linear, dtype=cfg.dtype, kernel_init=_linear_init)
        hidden_BLF = dense(cfg.mlp_ratio * cfg.width, name="mlp_in")(x_BLD)
        hidden_BLF = nn.gelu(rules.constrain(hidden_BLF, "rows", None, "hidden"), approximate=True)
        return dense(cfg.width, name="mlp_out")(hidden_BLF)


class _Trunk(nn.Module):
    """Tokens to the features before the head, float32 [B, L, D].

    `position` and `cache` are given only when a causal network decodes.
    """

    cfg: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(self, tokens_BL, modulation, position=None, cache=None):
        cfg = self.cfg
        x_BLD = _Embed(cfg, name="vocab_embed")(tokens_BL)
        x_BLD = rules.constrain(x_BLD, "rows", None, None)
        positions_L = jnp.arange(tokens_BL.shape[1]) if position is None else position[None]
        rotary = _rotary(positions_L, cfg.head_width)

        block = _Block
        if cfg.remat != "none":
            block = nn.remat(_Block, prevent_cse=False, policy=REMATS[cfg.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=cfg.num_blocks,
        )
        x_BLD, cache = blocks(cfg, self.train, name="blocks")(
            x_BLD, cache, None if modulation is None else modulation.blocks_NB6D, rotary, position
        )
        x_BLD = _Norm(name="final_norm")(x_BLD)
        if modulation is not None:
            x_BLD = _modulate(x_BLD, *jnp.split(modulation.final_B2D, 2, axis=-1))
        return x_BLD, cache
