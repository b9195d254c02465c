"""The noise at t=0: uniform tokens, or [MASK] everywhere."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Source:
    """Distribution of x0, the tokens at t=0.

    >>> import fsdfm_jax as fs, jax
    >>> fs.Source(vocab_size=6, mask_id=5).sample(jax.random.key(0), (2, 3)).tolist()
    [[5, 5, 5], [5, 5, 5]]
    >>> bool((fs.Source(vocab_size=6).sample(jax.random.key(0), (2, 3)) < 6).all())
    True

    Attributes:
      vocab_size: V, the size of the network's vocabulary, including the mask id if there is one.
      mask_id: None for uniform noise; otherwise the id of [MASK], the token of every position at
        t=0.

    Raises:
      ValueError: for fewer than two tokens, or a mask id outside the vocabulary.
    """

    vocab_size: int
    mask_id: int | None = None

    def __post_init__(self):
        if self.vocab_size < 2:
            raise ValueError(f"A source needs at least 2 tokens, got vocab_size={self.vocab_size}.")
        if self.mask_id is not None and not 0 <= self.mask_id < self.vocab_size:
            raise ValueError(
                f"mask_id must be in [0, {self.vocab_size}), got {self.mask_id}; "
                "the vocabulary size includes the mask token."
            )

    def sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Draw x0, int32 of `shape` ([B, L])."""
        if self.mask_id is None:
            return jax.random.randint(key, shape, 0, self.vocab_size, jnp.int32)
        return jnp.full(shape, self.mask_id, jnp.int32)


def make_source(name: str, *, num_tokens: int) -> Source:
    """Make a source by name over `num_tokens` text tokens: "uniform", or "mask" (adds one id).

    Raises:
      ValueError: for an unknown name.
    """
    if name == "uniform":
        return Source(num_tokens)
    if name == "mask":
        return Source(num_tokens + 1, mask_id=num_tokens)
    raise ValueError(f"Unknown source {name!r}; expected 'uniform' or 'mask'.")
