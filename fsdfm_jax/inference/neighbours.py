"""Draws that heed the tokens beside them: a copula for what one step draws at once.

A step draws many positions from their own posteriors p_i, as if they knew nothing of each other.
Neighbours know most of each other: halves of different words end up side by side, and no number of
training steps mends that (total correlation, arXiv:2507.15897). A copula keeps the marginals and
adds the dependence (Discrete Copula Diffusion, arXiv:2410.01949, which takes it from a language
model). Here it comes from counts of which token follows what in the training text, so that no
network is called:

    log q_i(x) = log p_i(x) + b (log B(x | c) - log m_{i-1}(x))
                            + b (log B(r | x) - log sum_z p_{i+1}(z) B(z | x) / m_i(z)) + const
    m_i(x) = sum_z p_i(z) B(x | z)

The first bracket is there where the token to the left is drawn in the same step, or given. The
context c is that token with up to two more to its left that are so as well: the longest one that
the text has often enough. The second bracket is there where the token r to the right is given; one
that is drawn comes later and heeds x itself. What is subtracted is what the neighbour's own
posterior already leads one to expect: where the network knows the neighbour, what one neighbour
says cancels, and where it knows nothing, what is left is the text's. Strength b = 1 is the copula,
more of it weighs what the text is like over the posteriors. Positions are drawn from left to right,
so that a draw costs L products of sizes [B, D] x [D, V] and [B, V] x [V, V], one after the other,
each with a search among the contexts; where something is given another L of the latter.

Counts and their table are those of `ngrams`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fsdfm_jax.inference.ngrams import LONGEST, Table
from fsdfm_jax.ops import categorical
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.ops.logits import Logits


class Neighbours(NamedTuple):
    """What a draw heeds.

    Attributes:
      table: of the training text.
      strength: b >= 0, scalar; 0 draws each position from its own posterior.
    """

    table: Table
    strength: jax.Array | float


def draw(
    key: jax.Array,
    logits: Logits,
    x_BL: jax.Array,
    drawn_BL: jax.Array,
    given_BL: jax.Array,
    neighbours: Neighbours,
    *,
    temperature: jax.Array | float = 1.0,
) -> jax.Array:
    """Draws positions of each row from left to right, see the module.

    Args:
      key: typed PRNG key.
      logits: of the posteriors, [B, L, V], divided by the temperature.
      x_BL: the tokens so far, int.
      drawn_BL: bool, the positions to draw.
      given_BL: bool, positions that aren't drawn but whose token is sure, as that of a prompt is.
      neighbours: table and strength.
      temperature: what the logits were divided by. It divides all of log q; what neighbours lead
        one to expect is taken from the posteriors without it.

    Returns:
      Tokens like x_BL.
    """
    batch, length, vocab_size = logits.shape
    table = jax.tree.map(jnp.asarray, neighbours.table)
    follow_VV = table.follow_CV[:vocab_size]
    weight = neighbours.strength / temperature
    logits = logits_lib.gathered(logits)
    # Drawn by rows: the noise of a row doesn't depend on how many there are.
    u_LBU = jnp.swapaxes(categorical.uniform(key, (batch, length, categorical.NUMBERS)), 0, 1)
    # The position to the right of each one: its token, and whether that is heeded.
    right_BL = jnp.roll(x_BL, -1, axis=1)
    heeds_BL = drawn_BL & jnp.roll(given_BL & ~drawn_BL, -1, axis=1).at[:, -1].set(False)
    any_heeds = jnp.any(heeds_BL)

    def posterior(index):
        index = jnp.minimum(index, length - 1)
        own_BV = logits_lib.dense(logits_lib.position(logits, index))[:, 0]
        return own_BV, jax.nn.softmax(own_BV * temperature, axis=-1)

    def step(left, inputs):
        context_B, sure_B, expected_BV, own_BV, p_BV = left
        index, u_BU, drawn_B, given_B, here_B, right_B, heeds_B = inputs
        next_BV, next_p_BV = posterior(index + 1)
        follows_BV = p_BV @ follow_VV

        def towards_right():
            expected_BV = (next_p_BV / follows_BV) @ follow_VV.T
            more_BV = weight * (jnp.log(follow_VV[:, right_B].T) - jnp.log(expected_BV))
            return jnp.where(heeds_B[:, None], more_BV, 0.0)

        more_BV = weight * (jnp.log(table.follow_CV[context_B]) - jnp.log(expected_BV))
        heeding_BV = own_BV + jnp.where(sure_B[:, None], more_BV, 0.0)
        heeding_BV += jax.lax.cond(any_heeds, towards_right, lambda: jnp.zeros_like(own_BV))
        new_B = categorical.pick(u_BU, heeding_BV).astype(here_B.dtype)
        token_B = jnp.where(drawn_B, new_B, here_B)
        context_B = _extend(table, vocab_size, context_B, sure_B, token_B)
        return (context_B, drawn_B | given_B, follows_BV, next_BV, next_p_BV), token_B

    nobody = (jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), bool))
    unexpected_BV = jnp.ones((batch, vocab_size), jnp.float32)
    inputs = (jnp.arange(length), u_LBU, drawn_BL.T, given_BL.T, x_BL.T, right_BL.T, heeds_BL.T)
    _, tokens_LB = jax.lax.scan(step, (*nobody, unexpected_BV, *posterior(0)), inputs)
    return tokens_LB.T


def _extend(table: Table, vocab_size: int, context_B, sure_B, token_B) -> jax.Array:
    """The longest context of the table that ends with the tokens, int32 [B].

    context_B, sure_B: that before them, and whether its last token is drawn or given.
    """
    token_B = token_B.astype(jnp.int32)
    if not len(table.keys_N):
        return token_B
    at_B, ats = jnp.where(sure_B, context_B, -1), []
    for _ in range(LONGEST):  # from the longest one on, until one can be extended
        ats.append(at_B)
        at_B = jnp.where(at_B < 0, -1, table.shorter_C[at_B])
    at_KB = jnp.stack(ats)
    keys_KB = jnp.where(at_KB < 0, -1, at_KB * vocab_size + token_B[None])
    # Unrolled, so that all of it is one kernel: this is done L times in a row.
    place_KB = jnp.searchsorted(table.keys_N, keys_KB, method="scan_unrolled").astype(jnp.int32)
    place_KB = jnp.minimum(place_KB, len(table.keys_N) - 1)
    hits_KB = table.keys_N[place_KB] == keys_KB
    first_1B = jnp.argmax(hits_KB, axis=0, keepdims=True)
    longer_B = vocab_size + jnp.take_along_axis(place_KB, first_1B, axis=0)[0]
    return jnp.where(jnp.any(hits_KB, axis=0), longer_B, token_B)
