"""The layers of the network. This is the only file with Flax modules.

`Conditioner` maps time and step width to the modulations of all blocks. `Trunk` maps tokens and
modulations to the features before the head. `network.model` combines them.

Activations have `cfg.dtype`; parameters, residual stream, norms and softmax are float32.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fsdfm_jax.network.config import (
    NORM_EPS,
    NUM_FREQUENCIES,
    REMATS,
    ROTARY_BASE,
    SMALLEST_WIDTH,
    ModelConfig,
)
from fsdfm_jax.ops import attention
from fsdfm_jax.parallel import rules


class KeyValueCache(NamedTuple):
    """Keys and values of the positions decoded so far, [N, B, H, L, K], in `dtype`."""

    keys: jax.Array
    values: jax.Array


class Modulation(NamedTuple):
    """adaLN modulations computed from time and step width, float32.

    Attributes:
      blocks_NB6D: shift, scale and gate of attention, then of the MLP, for each block.
      final_B2D: shift and scale before the head.
    """

    blocks_NB6D: jax.Array
    final_B2D: jax.Array


def run(
    module: nn.Module,
    params: Mapping[str, Any],
    *inputs: Any,
    rngs: dict[str, jax.Array] | None = None,
) -> Any:
    """Apply a module with the given parameters."""
    return module.apply({"params": params}, *inputs, rngs=rngs)


linear_init = nn.initializers.xavier_uniform()
small_init = nn.initializers.normal(0.02)


def sinusoids(values_B: jax.Array) -> jax.Array:
    """[cos(v f_i), sin(v f_i)] with f_i = 10000^(-i/128), float32 [B, 256]."""
    exponents = jnp.arange(NUM_FREQUENCIES, dtype=jnp.float32) / NUM_FREQUENCIES
    angles = values_B.astype(jnp.float32)[:, None] * (10_000.0**-exponents)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rotary_tables(positions_L: jax.Array, head_width: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotary angles, float32 [L, K]; both halves of a head share frequencies."""
    exponents = jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    angles = positions_L.astype(jnp.float32)[:, None] * (ROTARY_BASE**-exponents)[None]
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BHLK: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Apply the rotary embedding from `rotary_tables` to queries or keys, [B, H, L, K]."""
    cos, sin = (table[None, None] for table in rotary)
    x = x_BHLK.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    turned = x * cos + jnp.concatenate([-second, first], axis=-1) * sin
    return turned.astype(x_BHLK.dtype)


def modulate(x_BLD: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """x (1 + scale) + shift, constant over the positions of a row."""
    return x_BLD * (1.0 + scale_BD[:, None]) + shift_BD[:, None]


class Linear(nn.Module):
    """A dense layer with weights sharded by `parallel.rules`.

    Inputs are flattened to one matrix, which halves the time of the backward pass on CPUs.
    """

    features: int
    use_bias: bool = True
    dtype: str = "float32"
    kernel_init: Callable[..., jax.Array] = linear_init

    @nn.compact
    def __call__(self, inputs):
        def weight(name, init, shape):
            # Cast before the all-gather to halve the traffic in bfloat16.
            rounded = self.param(name, init, shape, jnp.float32).astype(self.dtype)
            return rules.gather(rounded, "/".join((*self.path, name)))

        width = inputs.shape[-1]
        kernel = weight("kernel", self.kernel_init, (width, self.features))
        rows = jnp.matmul(inputs.reshape(-1, width).astype(self.dtype), kernel)
        if self.use_bias:
            rows += weight("bias", nn.initializers.zeros, (self.features,))[None]
        return rows.reshape(*inputs.shape[:-1], self.features)


class Embed(nn.Module):
    """Token embedding, float32 of width D, plus the learned positions and mark of the config.

    `start` is the position of the first token; `frozen_BL` marks the given tokens.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens_BL, start, frozen_BL=None):
        shape = (self.cfg.vocab_size, self.cfg.width)
        table_VD = self.param("embedding", small_init, shape, jnp.float32)
        x_BLD = jnp.take(table_VD, tokens_BL, axis=0)
        # Each device looks up its channels for all rows; communicates vectors, not the table.
        x_BLD = rules.constrain(x_BLD, "replicas", None, "spread")
        if self.cfg.positions == "learned":
            shape = (self.cfg.num_positions, self.cfg.width)
            table_LD = self.param("positions", small_init, shape, jnp.float32)
            x_BLD += jax.lax.dynamic_slice_in_dim(table_LD, start, tokens_BL.shape[1])[None]
        if self.cfg.given == "marked":
            mark_D = self.param("given", nn.initializers.zeros, (self.cfg.width,), jnp.float32)
            if frozen_BL is not None:
                x_BLD += jnp.where(frozen_BL[..., None], mark_D[None, None], 0.0)
        return rules.constrain(x_BLD, "rows", None, "hidden")


class Norm(nn.Module):
    """LayerNorm with a scale and no bias, float32."""

    @nn.compact
    def __call__(self, x_BLD):
        return nn.LayerNorm(
            epsilon=NORM_EPS,
            use_bias=False,
            dtype=jnp.float32,
            # E[x^2] - E[x]^2 cancels if a token's mean is far from 0.
            use_fast_variance=False,
        )(x_BLD)


class Embedder(nn.Module):
    """Sinusoids, linear, SiLU, linear: maps one number per row to C features."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, values_B):
        dense = functools.partial(
            Linear, self.cfg.cond_width, dtype=self.cfg.dtype, kernel_init=small_init
        )
        hidden = nn.silu(dense(name="in_proj")(sinusoids(values_B).astype(self.cfg.dtype)))
        return dense(name="out_proj")(hidden)


class AdaLN(nn.Module):
    """Linear map from the conditioning to `parts` modulations of width D, zero at init."""

    cfg: ModelConfig
    parts: int

    @nn.compact
    def __call__(self, cond):
        cfg = self.cfg
        if cfg.conditioning == "official":
            fuser = Linear(
                cfg.cond_width, dtype=cfg.dtype, kernel_init=linear_init, name="condition_fuser"
            )
            cond = nn.silu(fuser(cond))
        modulation = Linear(
            self.parts * cfg.width,
            dtype=cfg.dtype,
            kernel_init=nn.initializers.zeros,
            name="modulation",
        )
        return modulation(cond).astype(jnp.float32)


class Dropout(nn.Module):
    """Dropout on random bits.

    `nn.Dropout` converts the bits to floats first, which takes twice as long on a CPU.
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


class BlockModulation(nn.Module):
    """The adaLN of one block; it has the block's name so that they share a parameter group."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, cond_BC):
        return AdaLN(self.cfg, 6, name="adaln")(cond_BC)


class Conditioner(nn.Module):
    """Maps time t_B and step width h_B (or None), float32 [B], to a `Modulation`."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, t_B, h_B):
        cfg = self.cfg
        cond_BC = self._condition(t_B, h_B)
        every_block = nn.vmap(
            BlockModulation,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=cfg.num_blocks,
        )
        return Modulation(
            every_block(cfg, name="blocks")(cond_BC), AdaLN(cfg, 2, name="final_adaln")(cond_BC)
        )

    def _condition(self, t_B, h_B):
        cfg = self.cfg
        time = Embedder(cfg, name="time_embedding")(t_B)
        if cfg.conditioning == "none":
            return nn.silu(time)
        if cfg.conditioning == "official":
            width = Embedder(cfg, name="dt_embedding")(h_B)
            fuser = Linear(
                2 * cfg.cond_width,
                dtype=cfg.dtype,
                kernel_init=linear_init,
                name="time_condition_fuser",
            )
            return nn.silu(fuser(jnp.concatenate([time, width], axis=-1)))
        halvings_B = -jnp.log2(jnp.maximum(h_B.astype(jnp.float32), SMALLEST_WIDTH))
        width = Embedder(cfg, name="dt_embedding")(halvings_B)
        projected = Linear(
            cfg.cond_width,
            use_bias=False,
            dtype=cfg.dtype,
            kernel_init=nn.initializers.zeros,
            name="dt_proj",
        )(width)
        return nn.silu(time + projected)


class Block(nn.Module):
    """x + gate * dropout(branch(LN(x) (1 + scale) + shift)), for attention, then for the MLP."""

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
        drop = Dropout(cfg.dropout, self.train, name="dropout")

        branch = modulate(Norm(name="norm1")(x_BLD), shift1, scale1).astype(cfg.dtype)
        branch, cache = self._attention(branch, cache, rotary, position)
        x_BLD = x_BLD + gate1[:, None] * drop(branch).astype(jnp.float32)
        x_BLD = rules.constrain(x_BLD, "rows", None, None)

        branch = modulate(Norm(name="norm2")(x_BLD), shift2, scale2).astype(cfg.dtype)
        branch = self._mlp(branch)
        x_BLD = x_BLD + gate2[:, None] * drop(branch).astype(jnp.float32)
        return rules.constrain(x_BLD, "rows", None, None), cache

    def _attention(self, x_BLD, cache, rotary, position):
        cfg = self.cfg
        batch, length, _ = x_BLD.shape
        dense = functools.partial(
            Linear, cfg.width, use_bias=False, dtype=cfg.dtype, kernel_init=linear_init
        )

        def heads(name):
            projected = dense(name=name)(x_BLD).reshape(
                batch, length, cfg.num_heads, cfg.head_width
            )
            return rules.constrain(jnp.swapaxes(projected, 1, 2), "rows", "heads")

        q_BHLK, k_BHLK = rotate(heads("q_proj"), rotary), rotate(heads("k_proj"), rotary)
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
        dense = functools.partial(Linear, dtype=cfg.dtype, kernel_init=linear_init)
        hidden_BLF = dense(cfg.mlp_ratio * cfg.width, name="mlp_in")(x_BLD)
        hidden_BLF = nn.gelu(rules.constrain(hidden_BLF, "rows", None, "hidden"), approximate=True)
        return dense(cfg.width, name="mlp_out")(hidden_BLF)


class Trunk(nn.Module):
    """Maps tokens to the features before the head, float32 [B, L, D].

    `position` and `cache` are used only in decoding with a causal network.
    """

    cfg: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(self, tokens_BL, modulation, position=None, cache=None, frozen_BL=None):
        cfg = self.cfg
        cfg.check_length(tokens_BL.shape[1])
        start = 0 if position is None else position
        x_BLD = Embed(cfg, name="vocab_embed")(tokens_BL, start, frozen_BL)
        x_BLD = rules.constrain(x_BLD, "rows", None, None)
        positions_L = jnp.arange(tokens_BL.shape[1]) if position is None else position[None]
        rotary = rotary_tables(positions_L, cfg.head_width)

        block = Block
        if cfg.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMATS[cfg.remat])
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
        x_BLD = Norm(name="final_norm")(x_BLD)
        if modulation is not None:
            x_BLD = modulate(x_BLD, *jnp.split(modulation.final_B2D, 2, axis=-1))
        return x_BLD, cache
