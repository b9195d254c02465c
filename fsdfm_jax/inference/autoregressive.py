"""Left-to-right sampling: the baseline for few-step models."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fsdfm_jax.flow.sampling import GREEDY
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params
from fsdfm_jax.ops import categorical
from fsdfm_jax.ops import logits as logits_lib


def sample_autoregressive(
    key: jax.Array,
    decode,
    cache,
    first_B: jax.Array,
    length: int,
    *,
    given_BL: jax.Array | None = None,
    frozen_BL: jax.Array | None = None,
    temperature: jax.Array | float = 1.0,
    top_p: jax.Array | float | None = None,
) -> jax.Array:
    """Sample token by token, with `length` network calls and a key-value cache.

    Args:
      key: typed PRNG key.
      decode: (token_B, position, cache) -> (logits_BV, cache).
      cache: the empty cache.
      first_B: int [B], the token before the first one; not part of the result.
      length: L, tokens in the result.
      given_BL, frozen_BL: int and bool [B, length]. Frozen positions get the given token instead of
        a draw. Tokens before a given one are drawn without knowledge of it, so only a frozen prefix
        gives conditional samples. None freezes nothing.
      temperature: divides the logits; 0 is greedy.
      top_p: nucleus mass, see `logits.nucleus`; None keeps everything.

    Returns:
      int [B, length].
    """
    if given_BL is None or frozen_BL is None:
        given_BL = jnp.zeros((first_B.shape[0], length), first_B.dtype)
        frozen_BL = jnp.zeros(given_BL.shape, bool)

    def step(carry, inputs):
        token_B, cache = carry
        step_key, position, given_B, frozen_B = inputs
        logits_BV, cache = decode(token_B, position, cache)
        logits_BV = logits_BV / jnp.maximum(temperature, GREEDY)
        if top_p is not None:
            logits_BV = logits_lib.nucleus(logits_BV, top_p)
        drawn_B = categorical.draw(step_key, logits_BV).astype(token_B.dtype)
        token_B = jnp.where(frozen_B, given_B.astype(token_B.dtype), drawn_B)
        return (token_B, cache), token_B

    inputs = (jax.random.split(key, length), jnp.arange(length), given_BL.T, frozen_BL.T)
    _, tokens_LB = jax.lax.scan(step, (first_B, cache), inputs)
    return tokens_LB.T


@functools.lru_cache(maxsize=8)
def make_autoregressive_sampler(
    model: ModelConfig, length: int, mask_id: int | None = None, *, memory: str = "cache"
) -> Callable[..., jax.Array]:
    """Make a jitted left-to-right sampler.

    Args:
      model: causal network.
      length: L.
      mask_id: the mask token of the vocabulary, which is never drawn; None if there is none.
      memory: "cache" keeps keys and values and computes one token at a time; "none" recomputes the
        whole block for each token, as a baseline for speed.

    Returns:
      `(params, key, first_B, temperature, given_BL=None, frozen_BL=None, top_p=None) -> int
      [B, length]`. `first_B` is the token before the text; in training it is the end-of-document
      token. The others are as in `sample_autoregressive`.

    Raises:
      ValueError: for another `memory`.
    """
    if memory not in MEMORIES:
        raise ValueError(f"Unknown memory={memory!r}; expected one of {', '.join(MEMORIES)}.")

    @jax.jit
    def run(params: Params, key, first_B, temperature, given_BL=None, frozen_BL=None, top_p=None):
        step, state = MEMORIES[memory](params, model, first_B.shape[0], length)

        def decode(token_B, position, state):
            logits_BV, state = step(token_B, position, state)
            if mask_id is not None:
                logits_BV = logits_BV.at[:, mask_id].set(-jnp.inf)
            return logits_BV, state

        return sample_autoregressive(
            key,
            decode,
            state,
            first_B,
            length,
            given_BL=given_BL,
            frozen_BL=frozen_BL,
            temperature=temperature,
            top_p=top_p,
        )

    return run


def _decode_with_cache(params, model, batch, length):
    return functools.partial(model_lib.decode_step, params, model), model_lib.empty_cache(
        model, batch, length
    )


def _decode_anew(params, model, batch, length):
    def decode(token_B, position, tokens_BL):
        tokens_BL = jax.lax.dynamic_update_slice(tokens_BL, token_B[:, None], (0, position))
        logits = model_lib.predict(params, model, tokens_BL)
        return logits_lib.dense(logits_lib.position(logits, position))[:, 0], tokens_BL

    return decode, jnp.zeros((batch, length), jnp.int32)


# memory -> a function (params, model, batch, length) -> the arguments `decode` and `cache` of
# `sample_autoregressive`.
MEMORIES = {"cache": _decode_with_cache, "none": _decode_anew}
