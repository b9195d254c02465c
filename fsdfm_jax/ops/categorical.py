"""Categorical sampling that is exact far into the tail, with a few random numbers per position.

`jax.random.categorical` adds float32 Gumbel noise with a maximum of about 15.94, so tokens with
probability below roughly 1e-7 are never drawn. With a large vocabulary their total mass is not
small: truncating it lowers the effective temperature and flatters generative perplexity
(arXiv:2409.02908). Its `mode="high"` fixes this with twice the random bits per vocabulary entry.

Here the number of random bits doesn't depend on V. The inverse CDF is evaluated as a tree: draw a
block of the vocabulary by its total weight, then a token in the block with another number. Each
draw first decides whether the most likely entry wins, because its weight would swamp small ones in
a float32 sum. Rounding affects less than (blocks + block size) * 2^-23 of the mass, a few 1e-5 at
V=50,257.
"""

import math

import jax
import jax.numpy as jnp

# Uniform numbers per draw.
NUMBERS = 4

GOLDEN = 2654435769  # 2^32 (sqrt(5) - 1) / 2, see `dispersed`


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 numbers in [0, 1) with steps of 2^-32 near 0.

    `jax.random.uniform` has steps of 2^-23 everywhere, so u < 1e-9 occurs once in 8 million draws.
    """
    return _to_unit(jax.random.bits(key, shape, jnp.uint32))


def _to_unit(bits: jax.Array) -> jax.Array:
    # Rounding to float32 can give 1.
    return jnp.minimum(bits.astype(jnp.float32) * 2.0**-32, 1.0 - 2.0**-24)


def dispersed(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Uniform numbers with similar values only at distant positions, float32 [B, L].

    Each number is uniform in [0, 1), and rows are independent. Along a row they are multiples of
    the golden ratio modulo 1, with a random offset. Positions below a threshold are spaced nearly
    as far apart as possible (three-distance theorem); up to 0.38 no two are neighbours.
    """
    batch, length = shape
    start_B1 = jax.random.bits(key, (batch, 1), jnp.uint32)
    # Integer arithmetic modulo 2^32 is exact and independent of the row length.
    steps_L = jax.lax.iota(jnp.uint32, length) * jnp.uint32(GOLDEN)
    return _to_unit(start_B1 + steps_L[None])


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Keep the smallest set of most likely tokens with total probability >= `top_p`.

    Other logits become -inf; ties with the last kept token are kept. Nucleus sampling,
    arXiv:1904.09751.

    Args:
      logits: [..., V].
      top_p: scalar in (0, 1]; 1 keeps everything, up to rounding of the sum.
    """
    p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    # Non-negative floats are ordered like their bits. Bisect the bits of the threshold: this reads
    # the vocabulary 31 times but needs no sort.
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)
    above_one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits >= middle, p, 0.0), axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((*p.shape[:-1], 1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, above_one)))
    return jnp.where(bits >= low, logits, -jnp.inf)


def draw(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Draw ids from softmax(logits), int32 [...]; logits are float [..., V] and may have -inf."""
    return pick(uniform(key, (*logits.shape[:-1], NUMBERS)), logits)


def pick(u: jax.Array, logits: jax.Array) -> jax.Array:
    """Draw ids from softmax(logits) with given uniform numbers.

    Args:
      u: float32 [..., NUMBERS] from `uniform`.
      logits: float [..., V]; -inf is allowed, and a row of only -inf yields an arbitrary id.

    Returns:
      int32 [...], ids in [0, V).
    """
    return _descend(u, logits.astype(jnp.float32), None)[0]


def pick_other(u: jax.Array, logits: jax.Array, current: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `pick`, excluding the current id.

    The mass is a sum over the other ids rather than 1 - p(current), which cancels if p(current) is
    near 1.

    Args:
      u: float32 [..., NUMBERS] from `uniform`.
      logits: float [..., V].
      current: int [...], the ids to exclude.

    Returns:
      (ids int32 [...], mass float32 [...]): mass = 1 - p(current); if it is 0, the id is arbitrary.
    """
    logits = logits.astype(jnp.float32)
    ids, top, off = _descend(u, logits, current)
    held = jnp.exp(jnp.take_along_axis(logits, current[..., None], axis=-1)[..., 0] - top)
    return ids, off / (off + held)


def _descend(u, logits, left_out):
    """Return (ids, max logit, sum of exp(logit - max) over the ids that are not excluded)."""
    *rows, size = logits.shape
    block = max(1, math.isqrt(size))
    top = jnp.max(logits, axis=-1)

    def weigh(some_logits, ids):
        weights = jnp.exp(some_logits - top[..., None])
        return weights if left_out is None else jnp.where(ids == left_out[..., None], 0.0, weights)

    weights = weigh(logits, _ids(logits.shape))
    padded = jnp.pad(weights, [(0, 0)] * len(rows) + [(0, -size % block)])
    totals = jnp.sum(padded.reshape(*rows, -1, block), axis=-1)
    outer = _pick(u[..., 0], u[..., 1], totals)
    # Recompute the weights of the block: cheaper than keeping those of the whole vocabulary.
    ids = outer[..., None] * block + _ids((*rows, block))
    inside = weigh(jnp.take_along_axis(logits, jnp.minimum(ids, size - 1), axis=-1), ids)
    inner = _pick(u[..., 2], u[..., 3], jnp.where(ids < size, inside, 0.0))
    return jnp.minimum(outer * block + inner, size - 1), top, jnp.sum(totals, axis=-1)


def _ids(shape):
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def _pick(u: jax.Array, v: jax.Array, weights: jax.Array) -> jax.Array:
    """Draw an index in proportion to `weights` [..., n] with u and v [...] in [0, 1).

    u decides whether it is the most likely entry, v which of the others.
    """
    size = weights.shape[-1]
    likeliest = jnp.argmax(weights, axis=-1).astype(jnp.int32)
    others = jnp.where(jax.nn.one_hot(likeliest, size, dtype=bool), 0.0, weights)
    cumulative = jnp.cumsum(others, axis=-1)
    rest = cumulative[..., -1]
    # An entry with zero weight has the cumulative sum of its left neighbour: <= skips it.
    index = jnp.sum(cumulative <= (v * rest)[..., None], axis=-1, dtype=jnp.int32)
    # v * rest may round up to rest: fall back to the last entry with positive weight.
    last = jnp.argmax(cumulative >= rest[..., None], axis=-1).astype(jnp.int32)
    is_other = u * (jnp.max(weights, axis=-1) + rest) < rest
    return jnp.where(is_other, jnp.minimum(index, last), likeliest)
