"""Static description of a network: `ModelConfig` and the constants of the published layout."""

import dataclasses

import jax

from fsdfm_jax.ops import attention

CONDITIONINGS = ("none", "official", "additive")
POSITIONS = ("rotary", "learned")
GIVEN = ("unmarked", "marked")
# What the backward pass recomputes.
REMATS = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        attention.saved,
    ),
}
DTYPES = ("float32", "bfloat16")

NUM_FREQUENCIES = 128
ROTARY_BASE = 10_000.0
NORM_EPS = 1e-5
# Minimum width: smaller ones count as infinitesimal. Keeps log2 finite for h=0.
SMALLEST_WIDTH = 2.0**-20


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a network.

    >>> import fsdfm_jax as fs
    >>> fs.ModelConfig(vocab_size=8, width=16, num_blocks=1, num_heads=2, cond_width=8).head_width
    8

    Attributes:
      vocab_size: V, including the mask token if there is one.
      width, num_blocks, num_heads, cond_width: D, N, H, C.
      mlp_ratio: F = mlp_ratio * D.
      dropout: rate on the output of each branch, in training only.
      conditioning: "none" | "official" | "additive".
      positions: "rotary" (the published layout) | "learned" (rotary plus a learned vector per
        position added to the token embedding, for data in which positions have a meaning).
      num_positions: number of learned positions, the maximum input length; 0 with "rotary", which
        has no limit.
      given: tokens that are given (a prompt, the digits of a puzzle) are "unmarked" (the published
        layout) | "marked" (by a learned vector added to their embedding, zero at init).
      causal: autoregressive baseline; needs conditioning "none" and given "unmarked".
      dtype: of activations, "float32" | "bfloat16".
      attention: one of `attention.IMPLEMENTATIONS`.
      remat: what the backward pass recomputes, "none" | "full" | "dots" (saves the outputs of
        matrix products and of "blocked" and "cudnn" attention, which recompute their scores).
      logits_mib: MiB of a chunk of float32 logits on each device; affects only rounding. 0
        materialises all logits, the reference for the other values.

    Raises:
      ValueError: for inconsistent sizes or an unknown name.
    """

    vocab_size: int
    width: int
    num_blocks: int
    num_heads: int
    cond_width: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    conditioning: str = "none"
    positions: str = "rotary"
    num_positions: int = 0
    given: str = "unmarked"
    causal: bool = False
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    logits_mib: int = 128

    def __post_init__(self):
        for field in ("vocab_size", "width", "num_blocks", "num_heads", "cond_width", "mlp_ratio"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} must be at least 1, got {getattr(self, field)}.")
        if self.width % self.num_heads or (self.width // self.num_heads) % 2:
            raise ValueError(
                f"model.width={self.width} must split into num_heads={self.num_heads} heads of "
                "even width (rotary attention rotates pairs of channels)."
            )
        if self.logits_mib < 0:
            raise ValueError(f"model.logits_mib must be at least 0, got {self.logits_mib}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout must be in [0, 1), got {self.dropout}.")
        choices = {
            "conditioning": CONDITIONINGS,
            "positions": POSITIONS,
            "given": GIVEN,
            "attention": attention.IMPLEMENTATIONS,
            "remat": tuple(REMATS),
            "dtype": DTYPES,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"model.{field}={getattr(self, field)!r} is unknown; expected one of "
                    f"{', '.join(allowed)}."
                )
        if self.causal and (self.conditioning != "none" or self.given != "unmarked"):
            raise ValueError(
                "A causal (autoregressive) network needs conditioning='none' and given='unmarked'."
            )
        if (self.positions == "learned") != (self.num_positions > 0) or self.num_positions < 0:
            raise ValueError(
                "model.num_positions is the number of learned positions, at least 1 with "
                f"positions='learned' and 0 with 'rotary'; got {self.num_positions} with "
                f"{self.positions!r}."
            )

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    def check_length(self, length: int) -> None:
        """Raise ValueError for an input longer than the learned positions of the network."""
        if self.num_positions and length > self.num_positions:
            raise ValueError(
                f"The network has {self.num_positions} learned positions, got a block of {length} "
                f"tokens; use blocks of at most {self.num_positions}, or train with "
                "model.positions='rotary', which takes any length."
            )
