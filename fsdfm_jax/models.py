"""The network: a diffusion transformer over tokens, behind `init_params` and `apply`.

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
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

Params = dict[str, Any]

CONDITIONINGS = ("none", "official", "additive")
ATTENTIONS = ("manual", "xla", "cudnn")
REMATS = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
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
      attention: "manual", or an `implementation` of `jax.nn.dot_product_attention` ("xla" |
        "cudnn").
      remat: what the backward pass recomputes, "none" | "full" | "dots" (matmul outputs are kept).
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
    attention: str = "manual"
    remat: str = "none"

    def __post_init__(self):
        for field in ("vocab_size", "width", "num_blocks", "num_heads", "cond_width", "mlp_ratio"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} must be at least 1, got {getattr(self, field)}.")
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"model.width={self.width} must split into num_heads={self.num_heads} heads of "
                "even width (rotary attention turns pairs of channels)."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout must lie in [0, 1), got {self.dropout}.")
        choices = {
            "conditioning": CONDITIONINGS,
            "attention": ATTENTIONS,
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


def init_params(key: jax.Array, cfg: ModelConfig) -> Params:
    """Fresh parameters, float32; blocks are stacked along a leading axis of N."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    time = None if cfg.causal else jnp.zeros((1,), jnp.float32)
    width = None if cfg.conditioning == "none" else jnp.ones((1,), jnp.float32)
    return _Transformer(cfg).init({"params": key}, tokens, time, width)["params"]


def apply(
    params: Params,
    cfg: ModelConfig,
    xt_BL: jax.Array,
    t_B: jax.Array | None = None,
    h_B: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
) -> jax.Array:
    """Logits of the posterior over x1 at each position.

    Args:
      params: from `init_params` or a checkpoint.
      cfg: the network those parameters belong to.
      xt_BL: tokens, int [B, L].
      t_B: time per row, float32 [B] in [0, 1]; None only for causal networks.
      h_B: step width per row, float32 [B]; needed by h-conditioned networks, ignored by the others.
      key: typed PRNG key that switches dropout on; None is evaluation mode.

    Returns:
      float32 [B, L, V].

    Raises:
      ValueError: if a time or width the network needs is missing, or isn't one per row.
    """
    if t_B is None and not cfg.causal:
        raise ValueError("A diffusion network needs the time t_B of each row, got None.")
    if h_B is None and cfg.conditioning != "none":
        raise ValueError(
            f"A network with conditioning={cfg.conditioning!r} needs the step width h_B of "
            "each row, got None."
        )
    for name, value in (("t_B", t_B), ("h_B", h_B)):
        if value is not None and jnp.shape(value) != xt_BL.shape[:1]:
            raise ValueError(
                f"{name} must hold one number per row, shape {xt_BL.shape[:1]}, got shape "
                f"{jnp.shape(value)}."
            )
    t_B = None if cfg.causal else t_B
    h_B = None if cfg.conditioning == "none" else h_B
    rngs = {} if key is None else {"dropout": key}
    return _Transformer(cfg, train=key is not None).apply(
        {"params": params}, xt_BL, t_B, h_B, rngs=rngs
    )


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
    logits, cache = _Transformer(cfg).apply(
        {"params": params}, token_B[:, None], None, None, position, cache
    )
    return logits[:, 0], cache


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


def _attend(q_BHLK, k_BHMK, v_BHMK, mask_LM, implementation: str) -> jax.Array:
    """Softmax attention, [B, H, L, K]; mask_LM is bool (True attends) or None."""
    if implementation != "manual":
        swap = lambda x: jnp.swapaxes(x, 1, 2)
        mask = None if mask_LM is None else mask_LM[None, None]
        return swap(
            jax.nn.dot_product_attention(
                swap(q_BHLK), swap(k_BHMK), swap(v_BHMK), mask=mask, implementation=implementation
            )
        )
    # Heads before positions: the layout in which CPU matmuls run at full speed.
    scores = jnp.einsum("bhlk,bhmk->bhlm", q_BHLK, k_BHMK, preferred_element_type=jnp.float32)
    scores = scores * (q_BHLK.shape[-1] ** -0.5)
    if mask_LM is not None:
        scores = jnp.where(mask_LM[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BHMK.dtype)
    return jnp.einsum("bhlm,bhmk->bhlk", weights, v_BHMK)


def _modulate(x_BLD, shift_BD, scale_BD):
    return x_BLD * (1.0 + scale_BD[:, None]) + shift_BD[:, None]


class _Linear(nn.Dense):
    """`nn.Dense` on all rows as one matrix: the backward pass on a CPU takes half as long."""

    def __call__(self, inputs):
        rows = super().__call__(inputs.reshape(-1, inputs.shape[-1]))
        return rows.reshape(*inputs.shape[:-1], self.features)


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
        return jnp.split(modulation(cond).astype(jnp.float32), self.parts, axis=-1)


class _Block(nn.Module):
    """x + gate * dropout(branch(LN(x) (1 + scale) + shift)), for attention and MLP in turn."""

    cfg: ModelConfig
    train: bool

    @nn.compact
    def __call__(self, x_BLD, cache, cond_BC, rotary, mask_LM, position):
        cfg = self.cfg
        if cond_BC is None:
            zeros = jnp.zeros((1, cfg.width), jnp.float32)
            shift1 = scale1 = shift2 = scale2 = zeros
            gate1 = gate2 = zeros + 1.0
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = _AdaLN(cfg, 6, name="adaln")(cond_BC)
        drop = nn.Dropout(cfg.dropout, deterministic=not self.train)

        branch = _modulate(_Norm(name="norm1")(x_BLD), shift1, scale1).astype(cfg.dtype)
        branch, cache = self._attention(branch, cache, rotary, mask_LM, position)
        x_BLD = x_BLD + gate1[:, None] * drop(branch).astype(jnp.float32)

        branch = _modulate(_Norm(name="norm2")(x_BLD), shift2, scale2).astype(cfg.dtype)
        branch = self._mlp(branch)
        x_BLD = x_BLD + gate2[:, None] * drop(branch).astype(jnp.float32)
        return x_BLD, cache

    def _attention(self, x_BLD, cache, rotary, mask_LM, position):
        cfg = self.cfg
        batch, length, _ = x_BLD.shape
        dense = functools.partial(
            _Linear, cfg.width, use_bias=False, dtype=cfg.dtype, kernel_init=_linear_init
        )

        def heads(name):
            projected = dense(name=name)(x_BLD).reshape(
                batch, length, cfg.num_heads, cfg.head_width
            )
            return jnp.swapaxes(projected, 1, 2)

        q_BHLK, k_BHLK = _rotate(heads("q_proj"), rotary), _rotate(heads("k_proj"), rotary)
        v_BHLK = heads("v_proj")
        if cache is not None:
            at = (0, 0, position, 0)
            cache = KeyValueCache(
                jax.lax.dynamic_update_slice(cache.keys, k_BHLK, at),
                jax.lax.dynamic_update_slice(cache.values, v_BHLK, at),
            )
            k_BHLK, v_BHLK = cache
        mixed_BHLK = _attend(q_BHLK, k_BHLK, v_BHLK, mask_LM, cfg.attention)
        merged_BLD = jnp.swapaxes(mixed_BHLK, 1, 2).reshape(batch, length, cfg.width)
        return dense(name="out_proj")(merged_BLD), cache

    def _mlp(self, x_BLD):
        cfg = self.cfg
        dense = functools.partial(_Linear, dtype=cfg.dtype, kernel_init=_linear_init)
        hidden_BLF = nn.gelu(
            dense(cfg.mlp_ratio * cfg.width, name="mlp_in")(x_BLD), approximate=True
        )
        return dense(cfg.width, name="mlp_out")(hidden_BLF)


class _Transformer(nn.Module):
    """The whole network. `position` and `cache` are given only when a causal network decodes."""

    cfg: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(self, tokens_BL, t_B, h_B, position=None, cache=None):
        cfg = self.cfg
        length = tokens_BL.shape[1]
        embed = nn.Embed(cfg.vocab_size, cfg.width, embedding_init=_small_init, name="vocab_embed")
        x_BLD = embed(tokens_BL).astype(jnp.float32)
        cond_BC = None if cfg.causal else self._condition(t_B, h_B)

        if cache is None:
            rotary = _rotary(jnp.arange(length), cfg.head_width)
            mask_LM = jnp.tril(jnp.ones((length, length), bool)) if cfg.causal else None
        else:
            rotary = _rotary(position[None], cfg.head_width)
            mask_LM = (jnp.arange(cache.keys.shape[3]) <= position)[None]

        block = _Block
        if cfg.remat != "none":
            block = nn.remat(_Block, prevent_cse=False, policy=REMATS[cfg.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=cfg.num_blocks,
        )
        x_BLD, cache = blocks(cfg, self.train, name="blocks")(
            x_BLD, cache, cond_BC, rotary, mask_LM, position
        )
        logits_BLV = self._head(x_BLD, cond_BC)
        return logits_BLV if position is None else (logits_BLV, cache)

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

    def _head(self, x_BLD, cond_BC):
        cfg = self.cfg
        x_BLD = _Norm(name="final_norm")(x_BLD)
        if cond_BC is not None:
            x_BLD = _modulate(x_BLD, *_AdaLN(cfg, 2, name="final_adaln")(cond_BC))
        head = _Linear(
            cfg.vocab_size,
            dtype=cfg.dtype,
            kernel_init=nn.initializers.zeros,
            dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
            name="head",
        )
        return head(x_BLD.astype(cfg.dtype)).astype(jnp.float32)
