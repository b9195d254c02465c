"""Softmax attention, with one implementation per kind of device.

    manual    two products and a softmax, all scores at once; the reference, and used with a mask
    blocked   a few heads or a block of queries at a time: scores stay in the cache and nothing of
              size [L, M] is saved for the backward pass; for CPUs
    xla       `jax.nn.dot_product_attention`, compiled by XLA
    cudnn     the same with NVIDIA's kernel (bfloat16 activations)
    auto      blocked, cudnn or xla, depending on the devices of this process

Scores and sums are float32 for every dtype of the activations.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from fsdfm_jax.ops import loops

IMPLEMENTATIONS = ("auto", "manual", "blocked", "xla", "cudnn")

# What the backward pass reads from the forward pass: ours by name, JAX's by its primitive.
_SAVED_NAME = "attention"
_SAVED_PRIMITIVE = "dot_product_attention_fwd"

# Scores that `blocked` computes at once, 4 MiB; the backward pass holds a few such arrays.
_BLOCK_SCORES = 2**20


def attend(
    q_BHLK: jax.Array,
    k_BHMK: jax.Array,
    v_BHMK: jax.Array,
    *,
    mask_LM: jax.Array | None = None,
    causal: bool = False,
    implementation: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v.

    Args:
      q_BHLK, k_BHMK, v_BHMK: queries, keys and values of one dtype.
      mask_LM: bool, True attends; None attends everywhere.
      causal: position l attends to positions up to l; requires L = M and no mask.
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      [B, H, L, K], dtype of v.
    """
    implementation = resolve(implementation, q_BHLK)
    if causal and implementation in ("manual", "xla"):
        length = q_BHLK.shape[2]
        mask_LM = jnp.tril(jnp.ones((length, length), bool))
    # The kernels take whole blocks; a mask is used only for decoding one token.
    if implementation == "manual" or (mask_LM is not None and implementation != "xla"):
        return _manual(q_BHLK, k_BHMK, v_BHMK, mask_LM)
    if implementation == "blocked":
        return _blocked(causal, q_BHLK, k_BHMK, v_BHMK)
    swap = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    mask = None if mask_LM is None else mask_LM[None, None]
    return swap(
        jax.nn.dot_product_attention(
            swap(q_BHLK),
            swap(k_BHMK),
            swap(v_BHMK),
            mask=mask,
            is_causal=causal and mask is None,
            implementation="cudnn" if implementation == "cudnn" else "xla",
        )
    )


def saved(primitive, *args, **params) -> bool:
    """Rematerialisation policy that saves the residuals of `blocked` and `cudnn`."""
    named = jax.checkpoint_policies.save_only_these_names(_SAVED_NAME)
    return named(primitive, *args, **params) or primitive.name.startswith(_SAVED_PRIMITIVE)


def resolve(implementation: str, q_BHLK: jax.Array) -> str:
    """Resolve "auto" for these queries; return other names unchanged."""
    if implementation != "auto":
        return implementation
    if jax.default_backend() == "cpu":
        # A block spans rows and heads, which can't be sharded over devices.
        alone = jax.sharding.get_abstract_mesh().size <= 1
        return "blocked" if alone else "manual"
    head_width = q_BHLK.shape[-1]
    fits = q_BHLK.dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128
    return "cudnn" if fits and has_cudnn() else "xla"


def has_cudnn() -> bool:
    """Return whether the devices can run NVIDIA's kernel (compute capability 8 or later)."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return capability.replace(".", "").isdigit() and float(capability) >= 8.0


def _manual(q_BHLK, k_BHMK, v_BHMK, mask_LM):
    scores = jnp.einsum("bhlk,bhmk->bhlm", q_BHLK, k_BHMK, preferred_element_type=jnp.float32)
    scores = scores * (q_BHLK.shape[-1] ** -0.5)
    if mask_LM is not None:
        scores = jnp.where(mask_LM[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BHMK.dtype)
    return jnp.einsum("bhlm,bhmk->bhlk", weights, v_BHMK)


# ---------------------------------------------------------------------------------------- blocked


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(causal, q_BHLK, k_BHMK, v_BHMK):
    return _blocked_forward(causal, q_BHLK, k_BHMK, v_BHMK)[0]


def _blocked_forward(causal, q_BHLK, k_BHMK, v_BHMK):
    """Return (output, residuals); each query's weights are stored as their log-sum-exp."""
    blocks = _Blocks(q_BHLK, k_BHMK)

    def group(inputs):
        q_NGLK, k_GMK, v_GMK = inputs
        k_GKM = jnp.swapaxes(k_GMK, 1, 2)  # plain products run at three times the speed

        def block(inputs):
            first, q_GLK = inputs
            scores = _scores(causal, q_GLK, k_GKM, first)
            top_GL1 = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top_GL1)
            sum_GL1 = jnp.sum(weights, axis=-1, keepdims=True)
            mixed = _product(weights.astype(v_GMK.dtype), v_GMK) / sum_GL1
            return mixed.astype(v_GMK.dtype), (top_GL1 + jnp.log(sum_GL1))[..., 0]

        return loops.map_over(block, (blocks.first_N, q_NGLK))

    mixed, lse = loops.map_over(
        group, (blocks.split(q_BHLK), blocks.group(k_BHMK), blocks.group(v_BHMK))
    )
    # Named so that the remat policy saves them.
    mixed_BHLK = checkpoint_name(blocks.join(mixed), _SAVED_NAME)
    lse_BHL = checkpoint_name(blocks.join(lse), _SAVED_NAME)
    return mixed_BHLK, (q_BHLK, k_BHMK, v_BHMK, mixed_BHLK, lse_BHL)


def _blocked_backward(causal, residuals, dmixed_BHLK):
    q_BHLK, k_BHMK, v_BHMK, mixed_BHLK, lse_BHL = residuals
    dtype, scale = q_BHLK.dtype, q_BHLK.shape[-1] ** -0.5
    blocks = _Blocks(q_BHLK, k_BHMK)
    delta_BHL = jnp.sum(dmixed_BHLK.astype(jnp.float32) * mixed_BHLK.astype(jnp.float32), axis=-1)

    def group(inputs):
        of_queries, k_GMK, v_GMK = inputs
        k_GKM, v_GKM = jnp.swapaxes(k_GMK, 1, 2), jnp.swapaxes(v_GMK, 1, 2)

        def block(carry, inputs):
            dk_GKM, dv_GKM = carry
            first, (q_GLK, dmixed_GLK, lse_GL, delta_GL) = inputs
            weights = jnp.exp(_scores(causal, q_GLK, k_GKM, first) - lse_GL[..., None])
            dweights = _product(dmixed_GLK, v_GKM)
            dscores = (weights * (dweights - delta_GL[..., None]) * scale).astype(dtype)
            # Transpose the narrow factors so that the wide ones keep their memory layout.
            dv_GKM += _product(jnp.swapaxes(dmixed_GLK, 1, 2), weights.astype(dtype))
            dk_GKM += _product(jnp.swapaxes(q_GLK, 1, 2), dscores)
            return (dk_GKM, dv_GKM), _product(dscores, k_GMK).astype(dtype)

        zeros = jnp.zeros(k_GKM.shape, jnp.float32)
        (dk_GKM, dv_GKM), dq = loops.scan(block, (zeros, zeros), (blocks.first_N, of_queries))
        dk_dv = [jnp.swapaxes(x, 1, 2).astype(dtype) for x in (dk_GKM, dv_GKM)]
        return dq, *dk_dv

    of_queries = [blocks.split(x) for x in (q_BHLK, dmixed_BHLK, lse_BHL, delta_BHL)]
    dq, dk, dv = loops.map_over(group, (of_queries, blocks.group(k_BHMK), blocks.group(v_BHMK)))
    return blocks.join(dq), dk.reshape(k_BHMK.shape), dv.reshape(v_BHMK.shape)


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _product(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _scores(causal, q_GLK, k_GKM, first):
    """Scaled scores of a block of queries starting at position `first`, float32."""
    scores_GLM = _product(q_GLK, k_GKM) * (q_GLK.shape[-1] ** -0.5)
    if not causal:
        return scores_GLM
    at_L = first + jnp.arange(q_GLK.shape[1])
    attends_LM = at_L[:, None] >= jnp.arange(k_GKM.shape[-1])[None]
    return jnp.where(attends_LM[None], scores_GLM, -jnp.inf)


class _Blocks:
    """Splits the heads of all rows into groups, and long sequences of queries into blocks.

    Arrays [B, H, M, ..] become [groups, G, M, ..], those of queries [groups, blocks, G, L, ..].
    """

    def __init__(self, q_BHLK, k_BHMK):
        self._batch, self._heads, self._length, _ = q_BHLK.shape
        num_heads, keys = self._batch * self._heads, k_BHMK.shape[2]
        fit = max(1, _BLOCK_SCORES // (self._length * keys))
        self._group = max(g for g in range(1, min(fit, num_heads) + 1) if num_heads % g == 0)
        count = min(self._length, -(-self._length * keys // _BLOCK_SCORES))
        self._size = -(-self._length // count)
        self._count = -(-self._length // self._size)
        self.first_N = jnp.arange(self._count) * self._size

    def group(self, x_BHM):
        return x_BHM.reshape(-1, self._group, *x_BHM.shape[2:])

    def split(self, x_BHL):
        padding = [(0, 0), (0, 0), (0, self._count * self._size - self._length)]
        x = jnp.pad(x_BHL, padding + [(0, 0)] * (x_BHL.ndim - 3))
        x = x.reshape(-1, self._group, self._count, self._size, *x_BHL.shape[3:])
        return jnp.swapaxes(x, 1, 2)

    def join(self, x):
        x = jnp.swapaxes(x, 1, 2)
        x = x.reshape(self._batch, self._heads, self._count * self._size, *x.shape[4:])
        return x[:, :, : self._length]
