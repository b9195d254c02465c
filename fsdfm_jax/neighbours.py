"""Draws that heed the token drawn to their left: a copula for what one step draws at once.

A step draws many positions from their own posteriors p_i, as if they knew nothing of each other.
Neighbours know most of each other: halves of different words end up side by side, and no number of
training steps mends that (total correlation, arXiv:2507.15897). A copula keeps the marginals and
adds the dependence (Discrete Copula Diffusion, arXiv:2410.01949, which takes it from a language
model). Here it comes from a table of which token follows which in the training text, B(x | y), so
that no network is called:

    log q_i(x | y) = log p_i(x) + b (log B(x | y) - log sum_z p_{i-1}(z) B(x | z)) + const

for a position whose left neighbour is drawn in the same step, as y, or given. The last term is what
p_{i-1} already leads one to expect: where the network knows the neighbour, the two cancel and
nothing is added. Strength b = 1 is the copula, more of it weighs what the text is like over the
posteriors. Positions are drawn from left to right, so that a draw costs L products of sizes
[B, D] x [D, V] and [B, V] x [V, V], one after the other.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax import draws
from fsdfm_jax import logits as logits_lib
from fsdfm_jax.logits import Logits

# The table has V^2 entries: 256 MiB in float32 at this size.
MAX_VOCAB = 8192
# Of the training text, spread over it evenly; more would change no digit that matters.
_MOST_BLOCKS = 2**15
_DISCOUNT = 0.75


class Neighbours(NamedTuple):
    """What a draw heeds.

    Attributes:
      follow_VV: float32, P(right | left) of two tokens side by side, above 0 everywhere.
      strength: b >= 0, scalar; 0 draws each position from its own posterior.
    """

    follow_VV: jax.Array
    strength: jax.Array | float


def check_vocab(vocab_size: int) -> None:
    """Refuses a vocabulary whose table would be too large.

    Raises:
      ValueError: above `MAX_VOCAB`.
    """
    if vocab_size > MAX_VOCAB:
        raise ValueError(
            f"neighbours needs a table of {vocab_size} x {vocab_size} tokens, and vocabularies up "
            f"to {MAX_VOCAB} only have one; set neighbours to 0, or train a smaller vocabulary."
        )


def count(source: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """How often each token stands to the left of each other one, float64 [V, V].

    Args:
      source: blocks of token ids; of more than 32,768 that many are read, spread evenly.
      vocab_size: V, that of the network; ids that the text hasn't are 0.

    Raises:
      ValueError: see `check_vocab`, or for an id outside [0, V).
    """
    check_vocab(vocab_size)
    counts_VV = np.zeros((vocab_size, vocab_size))
    for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), _MOST_BLOCKS)).round()):
        tokens_L = np.asarray(source[int(index)], np.int64)
        wrong_L = (tokens_L < 0) | (tokens_L >= vocab_size)
        if wrong_L.any():
            raise ValueError(
                f"Token ids must lie in [0, {vocab_size}), got {tokens_L[wrong_L][0]}."
            )
        np.add.at(counts_VV, (tokens_L[:-1], tokens_L[1:]), 1.0)
    return counts_VV


def follow(counts_VV: np.ndarray) -> np.ndarray:
    """P(right | left) from counts, float32 [V, V].

    Absolute discounting: each pair that was seen gives 3/4 of a count to the right tokens'
    frequencies, to which half a count each is added; a left token that was never seen has these
    alone.
    """
    right_V = counts_VV.sum(axis=0) + 0.5
    right_V /= right_V.sum()
    total_V1 = counts_VV.sum(axis=1, keepdims=True)
    kinds_V1 = (counts_VV > 0).sum(axis=1, keepdims=True)
    seen_V1 = total_V1 > 0
    given_up_V1 = np.where(seen_V1, _DISCOUNT * kinds_V1 / np.where(seen_V1, total_V1, 1.0), 1.0)
    kept_VV = np.maximum(counts_VV - _DISCOUNT, 0.0) / np.where(seen_V1, total_V1, 1.0)
    return (kept_VV + given_up_V1 * right_V).astype(np.float32)


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
    log_follow_VV = jnp.log(neighbours.follow_VV.astype(jnp.float32))
    follow_VV = jnp.exp(log_follow_VV)
    weight = neighbours.strength / temperature
    logits = logits_lib.gathered(logits)
    # Drawn by rows: the noise of a row doesn't depend on how many there are.
    u_LBU = jnp.swapaxes(draws.uniform(key, (batch, length, draws.NUMBERS)), 0, 1)

    def step(left, inputs):
        token_B, sure_B, p_BV = left
        index, u_BU, drawn_B, given_B, here_B = inputs
        own_BV = logits_lib.dense(logits_lib.position(logits, index))[:, 0]
        expected_BV = p_BV @ follow_VV
        more_BV = weight * (log_follow_VV[token_B] - jnp.log(expected_BV))
        heeding_BV = jnp.where(sure_B[:, None], own_BV + more_BV, own_BV)
        new_B = draws.pick(u_BU, heeding_BV).astype(here_B.dtype)
        token_B = jnp.where(drawn_B, new_B, here_B)
        p_BV = jax.nn.softmax(own_BV * temperature, axis=-1)
        return (token_B, drawn_B | given_B, p_BV), token_B

    nobody = (
        jnp.zeros((batch,), x_BL.dtype),
        jnp.zeros((batch,), bool),
        jnp.full((batch, vocab_size), 1 / vocab_size, jnp.float32),
    )
    inputs = (jnp.arange(length), u_LBU, drawn_BL.T, given_BL.T, x_BL.T)
    _, tokens_LB = jax.lax.scan(step, nobody, inputs)
    return tokens_LB.T
