"""Upper bound on the negative log-likelihood of text under a base model.

Let T = 1 - eps. A base model is a Markov chain P. It starts from the source, moves position i at
time t < T to a token y != x_i with rate g(t) p(y | x, t), and at T draws the text with
`jumps.make_finalize`, with probability p_fin(x1 | x_T). Let Q be the law of the mixture path
conditioned on the text x1: the same start, and position i jumps from x0_i to x1_i with rate g(t).
The path x_[0,T] is a latent variable, so Jensen's inequality gives

    -log p(x1) = -log E_P[ p_fin(x1 | x_T) ] <= KL(Q || P) + E_Q[ -log p_fin(x1 | x_T) ].

The KL divergence of two jump processes with the same start and rates q and p is the time integral
of the mean of sum_i sum_{y != x_i} [q log(q/p) - q + p]. With q = g 1{y = x1_i} this is, for each
position,

    xt != x1    g [-log p(x1) - 1 + (1 - p(xt))]    = -g [p(xt) + log p(x1)]
    xt == x1    g (1 - p(xt))                         = -g [p(xt) - 1]

which is the path loss (arXiv:2509.20624 eq. 3.8) with rate g. All jump rules have these rates in
the limit of small steps. The bound holds for many small steps, then one of width eps, at
temperature 1 and without nucleus. The second term makes the truncated integral a valid bound;
without it, errors in the last step would be free.

The positions that count depend on the sampler:

    source, `revealed`    path loss                            last term
    uniform               all positions                        all positions, full posterior
    mask, "stay"          masked ones; revealed ones have      masked ones, mask excluded;
                          rate 0 under P and Q                 revealed ones stay
    mask, "jump"          all; revealed ones move under P      masked ones, mask excluded
                          but not under Q

Compare bounds only for the same source. With masks, the exact posterior attains the entropy of the
data (up to O(eps^2) from the last step). With uniform noise the bound is larger: Q knows which
tokens have jumped, and a chain that sees only tokens does not.

The integral is over kappa instead of t, with g dt = d kappa / (1 - kappa). The value is the same,
without the infinite slope of some schedules at t = 0.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.flow import losses, paths
from fsdfm_jax.flow.process import Process
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params
from fsdfm_jax.ops import logits as logits_lib

# Minimum number of times per sample, so that each has an estimate for the bootstrap.
_FEWEST_TIMES = 8


def nats_per_token(
    params: Params,
    model: ModelConfig,
    process: Process,
    x1_NL: np.ndarray,
    *,
    num_times: int = 1024,
    time_eps: float = 1e-3,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Estimate the module's bound for a base model, unbiased for each sample.

    The exponential of the mean is an upper bound on the perplexity per token.

    Args:
      params, model: of the base model.
      process: that it was trained on, including `revealed`.
      x1_NL, num_times, time_eps, seed, batch_size, progress: as in `estimate`.

    Returns:
      float64 [N], nats per token.

    Raises:
      ValueError: for a network without such a bound, or as `estimate` does.
    """
    if model.causal:
        raise ValueError(
            "The bound is for flow-matching models; a causal network has an exact log-likelihood, "
            "the sum of its token losses."
        )
    if model.conditioning != "none":
        raise ValueError(
            f"A few-step network (conditioning={model.conditioning!r}) has no valid bound: it "
            "learns large steps from a teacher and defines no process of infinitesimal steps. Use "
            "its base model."
        )
    if model.vocab_size != process.source.vocab_size:
        raise ValueError(
            f"The network has {model.vocab_size} tokens, but the process has "
            f"{process.source.vocab_size}."
        )
    return estimate(
        jax.tree_util.Partial(_predictor(model), params),
        process,
        x1_NL,
        num_times=num_times,
        time_eps=time_eps,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )


def estimate(
    denoise: jax.tree_util.Partial,
    process: Process,
    x1_NL: np.ndarray,
    *,
    num_times: int = 1024,
    time_eps: float = 1e-3,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Estimate the module's bound for any network.

    Each sample gets K = max(8, ceil(num_times / N)) times, one in each of K equal parts of
    [0, kappa(T)], and one draw at T for the last term. Each part is divided into N strata, which
    are assigned to the samples at random: over the data set each of the N K strata is used exactly
    once. A sample's times are uniform in their parts, so its estimate is unbiased too.

    Args:
      denoise: (x_BL, t_B) -> logits [B, L, V], as an array or factored; its bound arguments become
        arguments of the compiled program.
      process: schedule, source and `revealed`.
      x1_NL: text, int [N, L], without mask tokens.
      num_times: number of times over all samples.
      time_eps: width eps of the last step, in (0, 1).
      seed: of times and noise. A row's noise depends on the seed, its sample and its part, so
        `batch_size` affects only rounding.
      batch_size: rows per network call; the last batch is padded.
      progress: called after each batch with the number of `num_times` completed since the last
        call.

    Returns:
      float64 [N], nats per token.

    Raises:
      ValueError: for arguments out of range, or token ids that aren't text.
    """
    x1_NL = _checked(x1_NL, process)
    for name, value in (("num_times", num_times), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not 0 < time_eps < 1:
        raise ValueError(
            f"time_eps must be in (0, 1), got {time_eps}: the rate g(t) is unbounded at t=1."
        )
    num_samples = len(x1_NL)
    parts = max(_FEWEST_TIMES, math.ceil(num_times / num_samples))
    # The last column is the draw at T, which has no time.
    share_NP = np.pad(_strata(seed, num_samples, parts), [(0, 0), (0, 1)])
    per_sample = parts + 1
    program, key = _program(process, time_eps), jax.random.key(seed)

    values, rows = [], num_samples * per_sample
    for start in range(0, rows, batch_size):
        # Pad with the last row; the padding is dropped below.
        row_B = np.minimum(np.arange(start, start + batch_size), rows - 1)
        sample_B, part_B = np.divmod(row_B, per_sample)
        inputs = (sample_B, part_B, share_NP[sample_B, part_B].astype(np.float32), part_B == parts)
        values.append(np.asarray(program(denoise, key, x1_NL[sample_B], *inputs)))
        if progress is not None:
            stop = min(start + batch_size, rows)
            progress(num_times * stop // rows - num_times * start // rows)
    value_NP = np.concatenate(values)[:rows].astype(np.float64).reshape(num_samples, per_sample)
    return value_NP[:, :parts].mean(axis=1) + value_NP[:, parts]


def _checked(x1_NL, process):
    x1_NL = np.asarray(x1_NL)
    if x1_NL.ndim != 2 or not x1_NL.size or not np.issubdtype(x1_NL.dtype, np.integer):
        raise ValueError(
            f"The bound needs token ids [N, L] with N, L >= 1, got {x1_NL.dtype} {x1_NL.shape}."
        )
    source = process.source
    if x1_NL.min() < 0 or x1_NL.max() >= source.vocab_size or np.any(x1_NL == source.mask_id):
        raise ValueError(
            f"Text ids must be in [0, {source.vocab_size}) and not the mask ({source.mask_id}); "
            f"got ids from {x1_NL.min()} to {x1_NL.max()}."
        )
    return x1_NL.astype(np.int32)


def _strata(seed, num_samples, parts):
    """Numbers in [0, 1), float64 [N, parts]: column k is in part k, in a different stratum for
    each row."""
    rng = np.random.default_rng(seed)
    order_NP = rng.permuted(np.tile(np.arange(num_samples)[:, None], parts), axis=0)
    within_NP = (order_NP + rng.random(order_NP.shape)) / num_samples
    return (np.arange(parts) + within_NP) / parts


@functools.lru_cache(maxsize=8)
def _predictor(model):
    return lambda params, x_BL, t_B: model_lib.predict(params, model, x_BL, t_B)


@functools.lru_cache(maxsize=8)
def _program(process, time_eps):
    return jax.jit(functools.partial(_row_nats, process, time_eps))


def _row_nats(
    process, time_eps, denoise, key, x1_BL, sample_B, part_B, share_B, is_last_B
) -> jax.Array:
    """Draw each row's integrand times kappa(T), or its last term; nats/token, [B]."""
    schedule, source = process.schedule, process.source
    end = 1.0 - time_eps
    kappa_end = schedule.kappa(end)
    t_B = jnp.where(is_last_B, end, schedule.inverse(share_B * kappa_end))
    weight_B = kappa_end / schedule.remaining(t_B)

    def noised(x1_L, sample, part, t):
        row_key = jax.random.fold_in(jax.random.fold_in(key, sample), part)
        noise_key, path_key = jax.random.split(row_key)
        x0_1L = source.sample(noise_key, (1, len(x1_L)))
        return paths.sample_path(path_key, schedule, x0_1L, x1_L[None], t[None])[0]

    xt_BL = jax.vmap(noised)(x1_BL, sample_B, part_B, t_B)
    weight_BL, is_last_BL = (
        jnp.broadcast_to(x_B[:, None], xt_BL.shape) for x_B in (weight_B, is_last_B)
    )

    def terms(logits_BLV, xt_BL, x1_BL, weight_BL, is_last_BL):
        path_BL = losses.path_loss(logits_BLV, xt_BL, x1_BL, weight_BL)
        if source.mask_id is not None:
            is_mask_V = jnp.arange(source.vocab_size) == source.mask_id
            logits_BLV = jnp.where(is_mask_V[None, None], -jnp.inf, logits_BLV)
        last_BL = losses.cross_entropy(logits_BLV, x1_BL)
        if source.mask_id is not None:
            is_masked_BL = xt_BL == source.mask_id
            last_BL = jnp.where(is_masked_BL, last_BL, 0.0)
            if process.revealed == "stay":
                path_BL = jnp.where(is_masked_BL, path_BL, 0.0)
        return jnp.where(is_last_BL, last_BL, path_BL)

    logits = denoise(xt_BL, t_B)
    terms_BL = logits_lib.map_positions(terms, logits, xt_BL, x1_BL, weight_BL, is_last_BL)
    return jnp.mean(terms_BL, axis=1)
