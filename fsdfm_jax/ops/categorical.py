"""Random draws that stay exact far into the tail, at a few random numbers a position.

`jax.random.categorical` adds float32 Gumbel noise whose largest value is about 15.94: tokens under
roughly 1e-7 never win. With a large vocabulary their joint mass is not small, so truncating it
lowers the effective temperature and flatters generative perplexity (arXiv:2409.02908). Its
`mode="high"` mends that at twice the random bits for each of the V entries.

Here random bits don't grow with V: the inverse CDF is walked as a tree. A block of the vocabulary
is drawn by its total weight, then a token inside the block by a fresh number; in both draws it is
first settled whether the likeliest entry wins, whose weight would drown small ones in a float32
sum. What rounding can move is below (blocks + block size) * 2^-23 of the mass, a few 1e-5 of it at
V=50,257.
"""

import math

import jax
import jax.numpy as jnp

# Uniform numbers that one draw takes.
NUMBERS = 4

GOLDEN = 2654435769  # 2^32 (sqrt(5) - 1) / 2, see `dispersed`


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform float32 numbers in [0, 1) with steps of 2^-32 near 0.

    `jax.random.uniform` has steps of 2^-23 everywhere, so that u < 1e-9 happens once in 8 million.
    """
    return _to_unit(jax.random.bits(key, shape, jnp.uint32))


def _to_unit(bits: jax.Array) -> jax.Array:
    # Rounding to float32 could reach 1.
    return jnp.minimum(bits.astype(jnp.float32) * 2.0**-32, 1.0 - 2.0**-24)


def dispersed(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Uniform numbers that are alike only at positions far from each other, float32 [B, L].

    Each of them is uniform in [0, 1), and rows are independent; along a row they are the multiples
    of the golden ratio, modulo 1, from a random start. Of the positions below any threshold no two
    are neighbours unless it exceeds 0.38: they are as far apart as so many can be, up to a small
    factor (three-distance theorem).
    """
    batch, length = shape
    start_B1 = jax.random.bits(key, (batch, 1), jnp.uint32)
    # Wraps modulo 2^32: exact, and the same for however long a row.
    steps_L = jax.lax.iota(jnp.uint32, length) * jnp.uint32(GOLDEN)
    return _to_unit(start_B1 + steps_L[None])


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Logits of the likeliest tokens alone, the fewest whose probabilities add up to `top_p`.

    All others become -inf; tokens as likely as the last one kept are kept too. What is drawn from
    is the rest renormalised (nucleus sampling, arXiv:1904.09751).

    Args:
      logits: [..., V].
      top_p: scalar in (0, 1]; 1 keeps everything, up to rounding of the sum.
    """
    p = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    # Numbers that aren't negative are ordered as their bits are: the bits of the threshold are
    # found by halving, which reads the vocabulary 30 times but sorts nothing.
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
    """Draw ids from softmax(logits); logits float [..., V], may hold -inf; return int32 [...]."""
    return pick(uniform(key, (*logits.shape[:-1], NUMBERS)), logits)


def pick(u: jax.Array, logits: jax.Array) -> jax.Array:
    """The ids that given numbers draw from softmax(logits).

    Args:
      u: float32 [..., NUMBERS] from `uniform`.
      logits: float [..., V], may hold -inf; a row of nothing else yields an arbitrary id.

    Returns:
      int32 [...], ids in [0, V).
    """
    return _descend(u, logits.astype(jnp.float32), None)[0]


def pick_other(u: jax.Array, logits: jax.Array, current: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `pick`, of all ids but the current one.

    The mass is a sum over the other ids, not 1 - p(current): where the network is nearly sure, the
    difference would cancel.

    Args:
      u: float32 [..., NUMBERS] from `uniform`.
      logits: float [..., V].
      current: int [...], the ids left out.

    Returns:
      (ids int32 [...], mass float32 [...]): mass = 1 - p(current); where it is 0, the id is
      arbitrary.
    """
    logits = logits.astype(jnp.float32)
    ids, top, off = _descend(u, logits, current)
    held = jnp.exp(jnp.take_along_axis(logits, current[..., None], axis=-1)[..., 0] - top)
    return ids, off / (off + held)


def _descend(u, logits, left_out):
    """(ids, the largest logit, sum of exp(logit - it) over all ids that are not left out)."""
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
    # Weighed anew: reading one block again is cheaper than keeping the weights of all.
    ids = outer[..., None] * block + _ids((*rows, block))
    inside = weigh(jnp.take_along_axis(logits, jnp.minimum(ids, size - 1), axis=-1), ids)
    inner = _pick(u[..., 2], u[..., 3], jnp.where(ids < size, inside, 0.0))
    return jnp.minimum(outer * block + inner, size - 1), top, jnp.sum(totals, axis=-1)


def _ids(shape):
    return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)


def _pick(u: jax.Array, v: jax.Array, weights: jax.Array) -> jax.Array:
    """Index drawn in proportion to `weights` [..., n] by u and v [...] in [0, 1).

    u settles whether it is the likeliest entry, v which of the others.
    """
    size = weights.shape[-1]
    likeliest = jnp.argmax(weights, axis=-1).astype(jnp.int32)
    others = jnp.where(jax.nn.one_hot(likeliest, size, dtype=bool), 0.0, weights)
    cumulative = jnp.cumsum(others, axis=-1)
    rest = cumulative[..., -1]
    # Entries of weight zero have cumulative == that of their left neighbour: <= steps over them.
    index = jnp.sum(cumulative <= (v * rest)[..., None], axis=-1, dtype=jnp.int32)
    # v * rest may round up to rest: fall back to the last entry that has weight.
    last = jnp.argmax(cumulative >= rest[..., None], axis=-1).astype(jnp.int32)
    is_other = u * (jnp.max(weights, axis=-1) + rest) < rest
    return jnp.where(is_other, jnp.minimum(index, last), likeliest)
