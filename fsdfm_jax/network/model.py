"""The network as pure functions: a diffusion transformer over tokens.

    params = init_params(key, cfg)
    logits = predict(params, cfg, xt_BL, t_B, h_B)

Token embedding (untied from the head), N blocks of rotary bidirectional attention and a tanh-GELU
MLP, each branch modulated by the time through adaLN, then a modulated linear head. The layout is
that of the published FS-DFM weights (arXiv:2509.20624 App. A). `conditioning` selects how the step
width h enters:

    none       not at all: cond = SiLU(temb)                                      base models
    official   embedder of raw h, fused with the time, and again in each block    published weights
    additive   cond = SiLU(temb + P hemb), hemb of -log2 h, P zero at init        our default

With `additive`, a network initialised from base weights computes exactly the same function as the
base model. Sinusoids of raw h barely separate 2^-10 from 2^-9; those of -log2 h, the number of
halvings, separate all widths equally well.

`positions="learned"` adds a learned vector per position to the token embedding, for data in which
positions have a meaning (cells of a grid). `given="marked"` adds one to tokens that are given (a
prompt, the digits of a puzzle), which otherwise look like any others. The published layout has
neither.

`causal=True` is the autoregressive baseline: the same blocks without time conditioning.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fsdfm_jax.network import blocks
from fsdfm_jax.network.blocks import KeyValueCache, Modulation
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.ops.logits import Factored, Logits

Params = dict[str, Any]


def init_params(key: jax.Array, cfg: ModelConfig) -> Params:
    """Initialise the parameters of a network.

    >>> import fsdfm_jax as fs, jax
    >>> cfg = fs.ModelConfig(vocab_size=8, width=16, num_blocks=2, num_heads=2, cond_width=8)
    >>> params = fs.init_params(jax.random.key(0), cfg)
    >>> params["blocks"]["q_proj"]["kernel"].shape, params["head"]["kernel"].shape
    ((2, 16, 16), (16, 8))

    Args:
      key: typed PRNG key.
      cfg: the network.

    Returns:
      Nested dicts of float32 arrays; parameters of the blocks are stacked along a leading axis N.
    """
    rngs, tokens_BL = {"params": key}, jnp.zeros((1, 1), jnp.int32)
    head = {
        "kernel": jnp.zeros((cfg.width, cfg.vocab_size), jnp.float32),
        "bias": jnp.zeros((cfg.vocab_size,), jnp.float32),
    }
    if cfg.causal:
        return {"head": head} | blocks.Trunk(cfg).init(rngs, tokens_BL, None)["params"]
    h_B = None if cfg.conditioning == "none" else jnp.ones((1,))
    modulation, variables = blocks.Conditioner(cfg).init_with_output(rngs, jnp.zeros((1,)), h_B)
    conditioner = variables["params"]
    trunk = blocks.Trunk(cfg).init(rngs, tokens_BL, modulation)["params"]
    # The adaLN of a block is stored with the block's parameters.
    stacked = trunk["blocks"] | conditioner["blocks"]
    return {"head": head} | conditioner | trunk | {"blocks": stacked}


def predict(
    params: Params,
    cfg: ModelConfig,
    xt_BL: jax.Array,
    t_B: jax.Array | None = None,
    h_B: jax.Array | None = None,
    frozen_BL: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
) -> Logits:
    """Logits of the posterior over x1 at each position.

    >>> import fsdfm_jax as fs, jax, jax.numpy as jnp
    >>> cfg = fs.ModelConfig(vocab_size=8, width=16, num_blocks=1, num_heads=2, cond_width=8)
    >>> params = fs.init_params(jax.random.key(0), cfg)
    >>> logits = fs.predict(params, cfg, jnp.zeros((2, 4), int), jnp.array([0.0, 0.5]))
    >>> logits.shape, logits.features_BLD.shape
    ((2, 4, 8), (2, 4, 16))

    Args:
      params: from `init_params` or a checkpoint.
      cfg: the network of these parameters.
      xt_BL: tokens, int [B, L].
      t_B: time of each row, float32 [B] in [0, 1]; None only for causal networks.
      h_B: step width of each row, float32 [B]; required by networks conditioned on it, ignored by
        others.
      frozen_BL: which tokens are given, bool [B, L]; None: none. Only networks with
        given="marked" see it.
      key: typed PRNG key that enables dropout; None is evaluation mode.

    Returns:
      [B, L, V], factored into features and head unless cfg.logits_mib is 0, see `ops.logits`.

    Raises:
      ValueError: if a required time or width is missing or isn't one per row, if `frozen_BL` has
        another shape than the tokens, or if there are more tokens than learned positions.
    """
    if frozen_BL is not None and jnp.shape(frozen_BL) != xt_BL.shape:
        raise ValueError(
            f"frozen_BL must hold one flag per token, shape {xt_BL.shape}, got shape "
            f"{jnp.shape(frozen_BL)}."
        )
    for name, value in (("t_B", t_B), ("h_B", h_B)):
        if value is not None and jnp.shape(value) != xt_BL.shape[:1]:
            raise ValueError(
                f"{name} must hold one number per row, shape {xt_BL.shape[:1]}, got shape "
                f"{jnp.shape(value)}."
            )
    rngs = {} if key is None else {"dropout": key}
    modulation = _modulation(params, cfg, t_B, h_B)
    trunk = blocks.Trunk(cfg, train=key is not None)
    inputs = (xt_BL, modulation, None, None, frozen_BL)
    features_BLD, _ = blocks.run(trunk, params, *inputs, rngs=rngs)
    logits = _factored(params, cfg, features_BLD)
    return logits if cfg.logits_mib else logits_lib.dense(logits)


def apply(
    params: Params,
    cfg: ModelConfig,
    xt_BL: jax.Array,
    t_B: jax.Array | None = None,
    h_B: jax.Array | None = None,
    frozen_BL: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
) -> jax.Array:
    """As `predict`, with the logits as one array.

    >>> import fsdfm_jax as fs, jax, jax.numpy as jnp
    >>> cfg = fs.ModelConfig(vocab_size=8, width=16, num_blocks=1, num_heads=2, cond_width=8)
    >>> params = fs.init_params(jax.random.key(0), cfg)
    >>> fs.apply(params, cfg, jnp.zeros((2, 4), int), jnp.array([0.0, 0.5])).shape
    (2, 4, 8)

    Args:
      params, cfg, xt_BL, t_B, h_B, frozen_BL, key: as in `predict`.

    Returns:
      float32 [B, L, V].

    Raises:
      ValueError: as in `predict`.
    """
    return logits_lib.dense(predict(params, cfg, xt_BL, t_B, h_B, frozen_BL, key=key))


def empty_cache(cfg: ModelConfig, batch: int, length: int) -> KeyValueCache:
    """Return an empty cache for a causal network.

    Raises:
      ValueError: if `length` exceeds the learned positions of the network.
    """
    cfg.check_length(length)
    shape = (cfg.num_blocks, batch, cfg.num_heads, length, cfg.head_width)
    return KeyValueCache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))


def decode_step(
    params: Params,
    cfg: ModelConfig,
    token_B: jax.Array,
    position: jax.Array,
    cache: KeyValueCache,
) -> tuple[jax.Array, KeyValueCache]:
    """One autoregressive step: logits after `token_B` at `position`, and the updated cache.

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
    features_B1D, cache = blocks.run(
        blocks.Trunk(cfg), params, token_B[:, None], None, position, cache
    )
    return logits_lib.dense(_factored(params, cfg, features_B1D))[:, 0], cache


def add_conditioning(base: Params, fresh: Params) -> Params:
    """Initialise a few-step network from base weights; only step conditioning stays `fresh`.

    Raises:
      ValueError: naming parameters whose shapes differ, that only `base` has, or that `base` lacks
        although they don't belong to the step conditioning.
    """
    problems = []

    def merge(base_node, fresh_node, path):
        if isinstance(fresh_node, dict) != isinstance(base_node, dict):
            problems.append(f"{path}: a group of parameters in one tree, an array in the other")
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


# Parameter groups that exist only in networks conditioned on the step width.
_STEP_CONDITIONING = frozenset(
    ("dt_embedding", "dt_proj", "time_condition_fuser", "condition_fuser")
)


def count_params(params: Params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _modulation(
    params: Params, cfg: ModelConfig, t_B: jax.Array | None, h_B: jax.Array | None
) -> Modulation | None:
    """Return the modulations for given times and widths; None for a causal network."""
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
    return blocks.run(blocks.Conditioner(cfg), params, t_B, h_B)


def _factored(params: Params, cfg: ModelConfig, features_BLD: jax.Array) -> Factored:
    head, chunk_size = params["head"], cfg.logits_mib * 2**18  # entries of 4 bytes
    return Factored(
        features_BLD, head["kernel"], head["bias"], dtype=cfg.dtype, chunk_size=chunk_size
    )
