"""Samples of a point: model samples, naive controls, and observations of the sampling steps.

One compiled program serves all temperatures and seeds of a model, number of steps, jump rule and
grid.
"""

import dataclasses
import functools
import time
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.evaluate import ngrams
from fsdfm_jax.evaluate.models import Subject
from fsdfm_jax.evaluate.plan import Point
from fsdfm_jax.evaluate.references import HeldOut
from fsdfm_jax.flow.sampling import GREEDY, Sampling
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference.autoregressive import make_autoregressive_sampler
from fsdfm_jax.inference.stream import Trajectory
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.stages import autoregressive
from fsdfm_jax.training.metrics import Progress

# Calls of at least this many seconds aren't repeated for timing: warm-up costs are then negligible.
_LONG_CALL = 2.0
# Steps kept of a trajectory, including the first and the last.
_FRAMES = 64
_TRAJECTORIES = 2
# Number of different held-out blocks in the controls of repeated blocks.
_BLOCKS = {"one": 1, "few": 8}


class Given(NamedTuple):
    """Given tokens of samples.

    Attributes:
      tokens_NL: int32 [N, L], used only at frozen positions.
      frozen_NL: bool [N, L].
    """

    tokens_NL: np.ndarray
    frozen_NL: np.ndarray


class Drawn(NamedTuple):
    """Samples int32 [N, L], seconds per sample of the fastest batch, seconds of compilation."""

    tokens_NL: np.ndarray
    seconds_per_sample: float
    compile_seconds: float


class Batches(Protocol):
    """Storage for batches until a point's samples are complete."""

    def load(self, index: int) -> np.ndarray | None:
        """Load a batch, None if it hasn't been drawn."""

    def save(self, index: int, tokens_BL: np.ndarray) -> None:
        """Store a batch."""


class Watched(NamedTuple):
    """Observations of the sampling steps of a point's first samples.

    Attributes:
      times_S: start time of each step (for an autoregressive model: position / L).
      entropy_RS: nats, mean entropy of the distributions that the step draws from, per sample; NaN
        if nothing is drawn.
      changed_RS: fraction of the positions that changed.
      trajectories: of the first samples; none for an autoregressive model.
    """

    times_S: np.ndarray
    entropy_RS: np.ndarray
    changed_RS: np.ndarray
    trajectories: list[Trajectory]


def draw(
    point: Point,
    subject: Subject,
    given: Given,
    *,
    batch_size: int,
    kept: Batches | None = None,
) -> Drawn:
    """Draw a point's samples in batches; the last one is padded and truncated.

    A row's noise depends only on seed, batch and row, so all points use the same noise. Timing
    excludes the first run of a program, unless it takes seconds.

    Args:
      point: of kind "model".
      subject: its model.
      given: given tokens of the N samples.
      batch_size: samples per batch, at most N.
      kept: storage for batches; used only if there are several.
    """
    num_samples, length = given.tokens_NL.shape
    batch_size = min(batch_size, num_samples)
    batches = -(-num_samples // batch_size)
    compiled, compile_seconds = _compile(
        subject.model, subject.process, point.memory, (batch_size, length), _Static(point.sampling)
    )
    drawn: list[np.ndarray] = []
    seconds: list[float] = []

    def timed(index: int) -> np.ndarray:
        inputs = jax.block_until_ready(_inputs(point, subject, given, batch_size, index))
        began = time.perf_counter()
        tokens_BL = np.asarray(compiled(subject.params, *inputs))
        seconds.append(time.perf_counter() - began)
        return tokens_BL

    with Progress(f"sampling {point.slug}", total=batches * batch_size) as progress:
        for index in range(batches):
            tokens_BL = kept.load(index) if kept is not None and batches > 1 else None
            if tokens_BL is None:
                tokens_BL = timed(index)
                if kept is not None and batches > 1:
                    kept.save(index, tokens_BL)
            drawn.append(tokens_BL)
            progress.advance(batch_size)
        if not seconds:
            timed(0)
        if len(seconds) == 1 and seconds[0] < _LONG_CALL:
            timed(0)
    tokens_NL = np.concatenate(drawn)[:num_samples].astype(np.int32)
    return Drawn(tokens_NL, min(seconds) / batch_size, compile_seconds)


def _inputs(point, subject, given, batch_size, index) -> tuple:
    """Return the sampler's arguments for a batch, after the parameters."""
    rows = slice(index * batch_size, (index + 1) * batch_size)
    missing = batch_size - len(given.tokens_NL[rows])
    padding = [(0, missing), (0, 0)]
    frozen_BL = np.pad(given.frozen_NL[rows], padding)
    given_BL = np.where(frozen_BL, np.pad(given.tokens_NL[rows], padding), 0).astype(np.int32)
    key = jax.random.fold_in(jax.random.key(point.seed), index)
    if subject.model.causal:
        first_B = jnp.full((batch_size,), subject.process.eos_id, jnp.int32)
        temperature, top_p = _floats(point.sampling)
        return key, first_B, temperature, jnp.asarray(given_BL), jnp.asarray(frozen_BL), top_p
    noise_key, sample_key = jax.random.split(key)
    x0_BL = subject.process.source.sample(noise_key, given_BL.shape).astype(jnp.int32)
    x0_BL = jnp.where(frozen_BL, given_BL, x0_BL)
    sampling = jax.tree.map(jnp.float32, point.sampling)
    return sample_key, x0_BL, jnp.asarray(frozen_BL), sampling


def _floats(sampling: Sampling) -> tuple[jax.Array, jax.Array | None]:
    """Temperature and top_p of an autoregressive draw."""
    return jax.tree.map(jnp.float32, (sampling.temperature, sampling.top_p))


@dataclasses.dataclass(frozen=True)
class _Static:
    """Cache key for the static part of a `Sampling`; ignores its numbers."""

    sampling: Sampling = dataclasses.field(compare=False)
    structure: jax.tree_util.PyTreeDef = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "structure", jax.tree.structure(self.sampling))


@functools.lru_cache(maxsize=64)
def _compile(model, process, memory, shape, static):
    """Compile the sampler for a shape; return it and the seconds of compilation.

    It is shared by all models with the same network.
    """
    key, tokens, frozen = jax.random.key(0), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
    if model.causal:
        run = make_autoregressive_sampler(model, shape[1], process.source.mask_id, memory=memory)
        temperature, top_p = _floats(static.sampling)
        inputs = (key, tokens[:, 0], temperature, tokens, frozen, top_p)
    else:
        run = generate_lib.make_sampler(model, process)
        inputs = (key, tokens, frozen, jax.tree.map(jnp.float32, static.sampling))
    params = jax.eval_shape(lambda: model_lib.init_params(key, model))
    params = mesh_lib.spread(params)
    began = time.perf_counter()
    compiled = run.lower(params, *inputs).compile()
    return compiled, time.perf_counter() - began


def watch(
    point: Point, subject: Subject, given: Given, drawn_NL: np.ndarray, *, count: int
) -> Watched:
    """Draw the first rows of a point again and observe the steps.

    They equal the point's first samples up to rounding, because their noise is the same.

    Args:
      point, subject, given: as in `draw`.
      drawn_NL: the point's samples, from which an autoregressive model's distributions follow.
      count: number of rows, within the first batch.
    """
    if subject.model.causal:
        return _watch_autoregressive(point, subject, given.frozen_NL[:count], drawn_NL[:count])
    first = Given(given.tokens_NL[:count], given.frozen_NL[:count])
    inputs = _inputs(point, subject, first, count, 0)
    run = generate_lib.make_observer(subject.model, subject.process)
    _, observed = run(subject.params, *inputs)
    steps, grid = point.sampling.steps, point.sampling.times()
    kept = np.unique(np.linspace(0, steps, min(steps, _FRAMES) + 1).round().astype(int))
    x0_BL = np.asarray(inputs[1])
    after_SBL = np.asarray(observed.tokens_SBL)
    trajectories = [
        Trajectory(
            np.stack([x0_BL[row] if k == 0 else after_SBL[k - 1, row] for k in kept.tolist()]),
            tuple(kept.tolist()),
            tuple(float(grid[k]) for k in kept),
            first.frozen_NL[row],
        )
        for row in range(min(count, _TRAJECTORIES))
    ]
    entropy_RS, changed_RS = (
        np.asarray(x_SB, np.float64).T for x_SB in (observed.entropy_SB, observed.changed_SB)
    )
    return Watched(grid[:-1].astype(np.float64), entropy_RS, changed_RS, trajectories)


def _watch_autoregressive(point, subject, frozen_RL, drawn_RL) -> Watched:
    """Compute the entropies of an autoregressive model's draws by reading its text."""
    entropy_RL = np.asarray(
        _entropies(
            subject.params,
            subject.model,
            subject.process.eos_id,
            subject.process.source.mask_id,
            jnp.asarray(drawn_RL),
            *_floats(point.sampling),
        ),
        np.float64,
    )
    length = drawn_RL.shape[1]
    free_RL = ~frozen_RL
    entropy_RL = np.where(free_RL, entropy_RL, np.nan)
    return Watched(np.arange(length) / length, entropy_RL, free_RL / 1.0, [])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _entropies(params, model, eos_id, mask_id, tokens_BL, temperature, top_p):
    logits = autoregressive.predict_next(params, model, eos_id, tokens_BL)
    logits = logits_lib.divide(logits, jnp.maximum(temperature, GREEDY))
    if mask_id is not None:
        logits = logits_lib.exclude(logits, mask_id)
    if top_p is not None:
        logits = logits_lib.nucleus(logits, top_p)
    return logits_lib.map_positions(logits_lib.entropy, logits)


def control(
    name: str,
    text: HeldOut,
    frozen_NL: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Make a naive control around given tokens, int32 [N, L].

    Args:
      name: "unigram", independent tokens with the frequencies of the training text; "ngram", left
        to right from its n-grams (see `ngrams`); "shuffled", held-out blocks with their tokens in
        random order; "repeated", one repeated sentence, the same in all samples; "one", the same
        held-out block in all samples; "few", one of eight held-out blocks in each.
      text: real text, N blocks.
      frozen_NL: given positions.
      seed: of the draws.
    """
    real_NL = text.real_NL
    rng = np.random.default_rng(seed)
    if name == "unigram":
        made_NL = rng.choice(len(text.unigram_V), real_NL.shape, p=text.unigram_V)
    elif name == "ngram":
        made_NL = ngrams.write(text.ngrams(), real_NL, frozen_NL, seed=seed)
    elif name == "shuffled":
        made_NL = real_NL.copy()
        for tokens_L, free_L in zip(made_NL, ~frozen_NL, strict=True):
            tokens_L[free_L] = rng.permutation(tokens_L[free_L])
    elif name in _BLOCKS:
        made_NL = real_NL[rng.integers(min(_BLOCKS[name], len(real_NL)), size=len(real_NL))]
    else:
        made_NL = np.broadcast_to(np.resize(text.sentence, real_NL.shape[1]), real_NL.shape)
    return np.where(frozen_NL, real_NL, made_NL).astype(np.int32)
