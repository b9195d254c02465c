"""Factored logits, which are never materialised.

Float32 logits of 1,024 tokens over a vocabulary of 50,257 take 196 MiB, and their gradient at least
as much. The vocabulary head is affine, so logits are stored as factors,

    logits_BLV = features_BLD kernel_DV + bias_V,

and processed position by position: `map_positions` (jumps, draws) and `mean_loss` (losses with
their gradients) compute the logits of a chunk of positions, use them and discard them. An average
of logits with weights that sum to 1 is the average of the features, so the teacher's target costs
one product and no sum of large arrays.

Both functions also accept a dense array [B, L, V], the reference.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from fsdfm_jax.ops import categorical, loops
from fsdfm_jax.parallel import rules


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["features_BLD", "kernel_DV", "bias_V", "temperature", "top_p"],
    meta_fields=["dtype", "chunk_size"],
)
@dataclasses.dataclass(frozen=True)
class Factored:
    """Logits as factors, with an optional temperature and nucleus.

    Attributes:
      features_BLD: float [B, L, D].
      kernel_DV, bias_V: the head, float32.
      temperature: scalar, or None for 1.
      top_p: scalar, or None for 1, see `nucleus`.
      dtype: of the factors in the product, which accumulates in float32.
      chunk_size: maximum entries per device of an array [B, chunk, V]; 0 for a single chunk. A loss
        with its gradient holds about three such arrays at once, a distillation loss five.
    """

    features_BLD: jax.Array
    kernel_DV: jax.Array
    bias_V: jax.Array
    temperature: jax.Array | float | None = None
    top_p: jax.Array | float | None = None
    dtype: str = "float32"
    chunk_size: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, L, V)."""
        return (*self.features_BLD.shape[:-1], self.kernel_DV.shape[-1])


Logits: TypeAlias = jax.Array | Factored
AnyLogits = TypeVar("AnyLogits")

# Chunks of `map_positions` are smaller than those of `mean_loss` by this factor: it accumulates no
# gradient of the head over chunks, and small chunks fit the caches better.
_MAP_FRACTION = 4


def dense(logits: Logits) -> jax.Array:
    """Materialise logits as float32 [B, L, V]."""
    if not isinstance(logits, Factored):
        return logits.astype(jnp.float32)
    return _multiply(gathered(logits), logits.features_BLD)


def rows(logits: Logits, start: int, stop: int) -> Logits:
    """Return the rows [start, stop) of the batch."""
    if not isinstance(logits, Factored):
        return logits[start:stop]
    return dataclasses.replace(logits, features_BLD=logits.features_BLD[start:stop])


def pad_rows(logits: Logits) -> Logits:
    """See `rules.pad_rows`."""
    if not isinstance(logits, Factored):
        return rules.pad_rows(logits)
    return dataclasses.replace(logits, features_BLD=rules.pad_rows(logits.features_BLD))


def position(logits: Logits, index: jax.Array | int) -> Logits:
    """Return the logits at one position of each row, [B, 1, V]; the index is data."""
    if not isinstance(logits, Factored):
        return jax.lax.dynamic_slice_in_dim(logits, index, 1, axis=1)
    features_B1D = jax.lax.dynamic_slice_in_dim(logits.features_BLD, index, 1, axis=1)
    return dataclasses.replace(logits, features_BLD=features_B1D)


def divide(logits: Logits, temperature: jax.Array | float) -> Logits:
    """Divide logits by a temperature; applied before any `nucleus`."""
    if not isinstance(logits, Factored):
        return logits.astype(jnp.float32) / temperature
    if logits.temperature is not None:
        temperature = temperature * logits.temperature
    return dataclasses.replace(logits, temperature=temperature)


def exclude(logits: Logits, token: int) -> Logits:
    """Set the logit of one token to -inf."""
    if isinstance(logits, Factored):
        bias_V = logits.bias_V.at[token].set(-jnp.inf)
        return dataclasses.replace(logits, bias_V=bias_V)
    return logits.at[..., token].set(-jnp.inf)


def nucleus(logits: Logits, top_p: jax.Array | float) -> Logits:
    """`categorical.nucleus` for dense or factored logits."""
    if isinstance(logits, Factored):
        return dataclasses.replace(logits, top_p=top_p)
    return categorical.nucleus(logits, top_p)


def entropy(logits_BLV: jax.Array) -> jax.Array:
    """Entropy of softmax(logits), nats, float32 [B, L]; -inf logits are allowed."""
    logp_BLV = jax.nn.log_softmax(logits_BLV.astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.where(logp_BLV > -jnp.inf, jnp.exp(logp_BLV) * logp_BLV, 0.0), axis=-1)


def average(logits: Sequence[Logits], weights: Sequence[float]) -> Logits:
    """Return the weighted average of logits, in float32.

    Args:
      logits: all arrays, or all factored with the same head and temperature.
      weights: must sum to 1, as averaging affine functions requires.

    Raises:
      ValueError: if the weights don't sum to 1.
    """
    if abs(sum(weights) - 1.0) > 1e-6:
        raise ValueError(f"The weights of an average must sum to 1, got {tuple(weights)}.")
    first = logits[0]
    parts = [each.features_BLD if isinstance(each, Factored) else each for each in logits]
    terms = [w * part.astype(jnp.float32) for w, part in zip(weights, parts, strict=True)]
    mean = functools.reduce(operator.add, terms)
    return dataclasses.replace(first, features_BLD=mean) if isinstance(first, Factored) else mean


def gathered(x: AnyLogits) -> AnyLogits:
    """All-gather the head of factored logits once, before a loop; return anything else unchanged.

    The head is cast before the all-gather to halve the traffic in bfloat16.
    """
    if not isinstance(x, Factored):
        return x
    kernel_DV = rules.gather(x.kernel_DV.astype(x.dtype), _HEAD)
    return dataclasses.replace(x, kernel_DV=kernel_DV)


def map_positions(fn: Callable[..., jax.Array], logits: Logits, *args: jax.Array) -> jax.Array:
    """Compute fn(logits_BLV, *args) in chunks of positions.

    Args:
      fn: maps float32 logits [B, c, V] and the same positions [B, c, ..] of each argument to an
        array [B, c, ..]; positions must be independent of each other.
      logits: [B, L, V].
      *args: arrays [B, L, ..].

    Returns:
      [B, L, ..].
    """
    if not isinstance(logits, Factored):
        return fn(dense(logits), *args)
    held = -(-logits.chunk_size // _MAP_FRACTION)
    factored = dataclasses.replace(gathered(logits), chunk_size=held)
    chunks = _Chunks(factored)

    def one(inputs):
        features_BcD, *parts = inputs
        return fn(_multiply(factored, features_BcD), *parts)

    inputs = [chunks.split(x) for x in (factored.features_BLD, *args)]
    return chunks.join(loops.map_over(one, inputs))


def mean_loss(
    position_loss: Callable[..., jax.Array],
    logits: Logits,
    *args: jax.Array | Factored,
    num_rows: int | None = None,
) -> jax.Array:
    """Return the mean of position_loss(logits_BLV, *args) over rows and positions.

    Differentiable in the features and head of factored logits. The gradient is computed in the
    forward pass, chunk by chunk: no product is repeated, and residuals have the size of the
    features and the head. No gradient flows into `args` or the temperature.

    Args:
      position_loss: maps float32 logits [B, c, V] and the same positions of each argument (factored
        ones materialised) to float32 [B, c]. It must not close over traced values.
      logits: [B, L, V].
      *args: arrays [B, L, ..] or logits.
      num_rows: number of leading rows that count, the others being padding; all rows by default.

    Returns:
      float32 scalar.
    """
    args = jax.lax.stop_gradient(args)
    if not isinstance(logits, Factored):
        arrays = [dense(x) if isinstance(x, Factored) else x for x in args]
        return jnp.mean(position_loss(dense(logits), *arrays)[:num_rows])
    return _fused_mean(position_loss, num_rows or logits.shape[0], logits, args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused_mean(position_loss, num_rows, logits, args):
    logits, args = gathered(logits), [gathered(x) for x in args]

    def chunk(total, inputs):
        features_BcD, counts_Bc, parts = inputs
        values_Bc = position_loss(_multiply(logits, features_BcD), *_written_down(args, parts))
        return total + jnp.sum(jnp.where(counts_Bc, values_Bc, 0.0)), None

    total, _ = _scan_chunks(chunk, jnp.zeros(()), num_rows, logits, args)
    return total / (num_rows * logits.shape[1])


def _fused_mean_forward(position_loss, num_rows, logits, args):
    given, logits, args = logits, gathered(logits), [gathered(x) for x in args]
    kernel_DV, shards = logits.kernel_DV, _Shards(logits.shape[0])

    def chunk(carry, inputs):
        total_P, dkernel_PDV, dbias_PV = carry
        features_BcD, counts_Bc, parts = inputs
        features_BcD = rules.constrain(features_BcD.astype(logits.dtype), "rows", "positions", None)

        def summed(logits_BcV):
            values_Bc = position_loss(logits_BcV, *_written_down(args, parts))
            values_Bc = jnp.where(counts_Bc, values_Bc, 0.0)
            return jnp.sum(values_Bc), jnp.sum(shards.split(values_Bc[..., None]), axis=(1, 2))

        logits_BcV = _multiply(logits, features_BcD)
        dlogits_BcV, values_P = jax.grad(summed, has_aux=True)(logits_BcV)
        if logits.temperature is not None:
            dlogits_BcV = dlogits_BcV / logits.temperature
        # Sum over positions as a matrix product: on CPUs, XLA's own reduction is 30 times slower.
        dlogits_PRV = shards.split(dlogits_BcV)
        ones_P1R = jnp.ones((shards.count, 1, dlogits_PRV.shape[1]))
        dbias_P1V = jnp.matmul(ones_P1R, dlogits_PRV, precision=jax.lax.Precision.HIGHEST)
        dlogits_BcV = dlogits_BcV.astype(logits.dtype)
        dfeatures_BcD = _contract(dlogits_BcV, kernel_DV, (2,), (1,))
        # Transpose the narrow factor so that the product reads the wide one in memory order.
        features_PDR = jnp.swapaxes(shards.split(features_BcD), 1, 2)
        dkernel_PDV += jnp.matmul(
            features_PDR, shards.split(dlogits_BcV), preferred_element_type=jnp.float32
        )
        sums = (total_P + values_P, dkernel_PDV, dbias_PV + dbias_P1V[:, 0])
        return shards.constrain(sums), dfeatures_BcD

    zeros = [jnp.zeros((shards.count, *x.shape)) for x in (jnp.zeros(()), kernel_DV, logits.bias_V)]
    sums, dfeatures = _scan_chunks(chunk, shards.constrain(tuple(zeros)), num_rows, logits, args)
    total_P, dkernel_PDV, dbias_PV = sums
    # Reduce-scatter over D: communicates the size of one part; an all-reduce would take two.
    dkernel_PDV = rules.constrain(dkernel_PDV, "replicas", "spread", None)
    total, dkernel_DV, dbias_V = (jnp.sum(x, axis=0) for x in (total_P, dkernel_PDV, dbias_PV))
    gradients = (_Chunks(logits).join(dfeatures), rules.stored(dkernel_DV, _HEAD), dbias_V)
    return total / (num_rows * logits.shape[1]), (given, *gradients)


class _Shards:
    """Partial sums per shard of rows and positions, combined after the last chunk.

    On a mesh, a single sum would need communication for every chunk.
    """

    def __init__(self, num_rows: int):
        self._rows = math.gcd(num_rows, rules.shards("rows"))
        self._positions = rules.shards("positions")
        self.count = self._rows * self._positions

    def split(self, x_BcD: jax.Array) -> jax.Array:
        """[parts, B/rows c/positions, D]."""
        batch, length, width = x_BcD.shape
        x = x_BcD.reshape(
            self._rows, batch // self._rows, self._positions, length // self._positions, width
        )
        return jnp.swapaxes(x, 1, 2).reshape(self.count, -1, width)

    def constrain(self, sums_P):
        """Shard the sums like their parts."""
        return jax.tree.map(lambda x: rules.constrain(x, "parts"), sums_P)


def _fused_mean_backward(position_loss, num_rows, residuals, cotangent):
    del position_loss
    logits, *gradients = residuals
    scale = cotangent / (num_rows * logits.shape[1])
    primals = (logits.features_BLD, logits.kernel_DV, logits.bias_V)
    scaled = [(scale * g).astype(x.dtype) for g, x in zip(gradients, primals, strict=True)]
    return dataclasses.replace(
        logits,
        features_BLD=scaled[0],
        kernel_DV=scaled[1],
        bias_V=scaled[2],
        temperature=jax.tree.map(jnp.zeros_like, logits.temperature),
    ), None


_fused_mean.defvjp(_fused_mean_forward, _fused_mean_backward)


# ----------------------------------------------------------------------------------------- chunks


class _Chunks:
    """Splits [B, L, ..] into chunks of positions [chunks, B, L/chunks, ..].

    Chunks are along the length because rows may be sharded: each device has its share of every
    chunk.
    """

    def __init__(self, logits: Factored):
        self._batch, self.length, vocab_size = logits.shape
        # An exported program has a symbolic batch size; use the chunks for one row.
        num_rows = self._batch if isinstance(self._batch, int) else 1
        held = self.length
        if logits.chunk_size:
            devices = math.gcd(num_rows, rules.shards("rows")) * rules.shards("positions")
            held = logits.chunk_size * devices // (num_rows * vocab_size)
        self.count = -(-self.length // max(1, held))
        self.size = -(-self.length // self.count)
        self.size += -self.size % rules.shards("positions")
        self.count = -(-self.length // self.size)

    def split(self, x_BL):
        padding = [(0, 0), (0, self.count * self.size - self.length)]
        x = jnp.pad(x_BL, padding + [(0, 0)] * (x_BL.ndim - 2))
        x = x.reshape(x.shape[0], self.count, self.size, *x_BL.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def join(self, x_NBc):
        x = jnp.moveaxis(x_NBc, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.length]


def _scan_chunks(step, carry, num_rows, logits, args):
    """Scan step(carry, (features, mask of positions that count, parts of args)) over chunks."""
    chunks = _Chunks(logits)
    rows_B1 = (jnp.arange(logits.shape[0]) < num_rows)[:, None]
    counts_NBc = chunks.split(jnp.broadcast_to(rows_B1, logits.shape[:2]))
    parts = [chunks.split(x.features_BLD if isinstance(x, Factored) else x) for x in args]
    return loops.scan(step, carry, (chunks.split(logits.features_BLD), counts_NBc, parts))


def _written_down(args, parts):
    """Return the chunk `parts` of the arguments, with factored logits materialised."""
    return [
        _multiply(x, part) if isinstance(x, Factored) else part
        for x, part in zip(args, parts, strict=True)
    ]


_HEAD = "head/kernel"


def _multiply(logits: Factored, features_BcD: jax.Array) -> jax.Array:
    """Return the logits of some features, float32 [B, c, V]; `logits` comes from `gathered`."""
    features_BcD = rules.constrain(features_BcD.astype(logits.dtype), "rows", "positions", None)
    logits_BcV = _contract(features_BcD, logits.kernel_DV, (2,), (0,))
    logits_BcV = logits_BcV + logits.bias_V.astype(jnp.float32)[None, None]
    if logits.temperature is not None:
        logits_BcV = logits_BcV / logits.temperature
    return logits_BcV if logits.top_p is None else categorical.nucleus(logits_BcV, logits.top_p)


def _contract(
    a: jax.Array, b: jax.Array, axes_a: Sequence[int], axes_b: Sequence[int]
) -> jax.Array:
    """Contract the given axes in one matrix product, accumulated in float32."""
    return jax.lax.dot_general(
        a, b, ((axes_a, axes_b), ((), ())), preferred_element_type=jnp.float32
    )
