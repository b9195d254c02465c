"""Samples of a point: what a model writes, the naive controls, and how a model came to its text.

One program serves all numbers of steps, grids, temperatures and seeds of a model and jump rule;
only whether there is a nucleus at all, or neighbours and how many contexts, makes it another one.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.evaluate.models import Subject
from fsdfm_jax.evaluate.plan import Point
from fsdfm_jax.flow import sampler
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference import neighbours as neighbours_lib
from fsdfm_jax.inference import ngrams
from fsdfm_jax.inference.neighbours import Neighbours
from fsdfm_jax.inference.ngrams import Counts, Table
from fsdfm_jax.inference.stream import Trajectory
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.ops import logits as logits_lib
from fsdfm_jax.ops.logits import Factored
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.stages import autoregressive
from fsdfm_jax.training.metrics import Progress

# Seconds after which a call needn't be repeated to be timed: what the first call of a program pays
# for besides its work is small beside that.
_LONG_CALL = 2.0
# Steps of a trajectory that are kept, the first and the last among them.
_FRAMES = 64
_TRAJECTORIES = 2


class Given(NamedTuple):
    """What the samples are made around.

    Attributes:
      tokens_NL: int32 [N, L], of no meaning where nothing is frozen.
      frozen_NL: bool [N, L].
    """

    tokens_NL: np.ndarray
    frozen_NL: np.ndarray


class Drawn(NamedTuple):
    """Samples int32 [N, L]; seconds per sample of the fastest batch; seconds of compilation."""

    tokens_NL: np.ndarray
    seconds_per_sample: float
    compile_seconds: float


class Batches(Protocol):
    """Where batches are kept until a point's samples are whole."""

    def load(self, index: int) -> np.ndarray | None:
        """A batch that was drawn before, None if it wasn't."""

    def save(self, index: int, tokens_BL: np.ndarray) -> None:
        """Keeps a batch."""


class Watched(NamedTuple):
    """How the first samples of a point came about.

    Attributes:
      times_S: time at which each step begins (an autoregressive model's: its position / L).
      entropy_RS: nats, mean entropy of what the step drew from, of each watched sample; NaN where
        nothing was left to draw.
      changed_RS: share of the positions that moved.
      trajectories: of the first ones; none for an autoregressive model, which never goes back.
    """

    times_S: np.ndarray
    entropy_RS: np.ndarray
    changed_RS: np.ndarray
    trajectories: list[Trajectory]


def capacity(points: list[Point]) -> int:
    """Steps that one program must have room for to serve all points: a power of two."""
    most = max((point.steps for point in points if point.steps and point.jump), default=1)
    return 1 << (most - 1).bit_length()


def draw(
    point: Point,
    subject: Subject,
    given: Given,
    *,
    batch_size: int,
    room: int,
    kept: Batches | None = None,
) -> Drawn:
    """Draws a point's samples, batch after batch; the last batch is computed whole and cut.

    The noise of a row depends on seed, batch and row only, so that points are compared on the same
    noise. A batch is timed once the program has run before, unless it takes seconds.

    Args:
      point: of kind "model".
      subject: its model.
      given: N samples' worth.
      batch_size: samples drawn at once, at most N of them.
      room: from `capacity`.
      kept: batches that needn't be drawn again; where there are several only.
    """
    num_samples, length = given.tokens_NL.shape
    batch_size = min(batch_size, num_samples)
    batches = -(-num_samples // batch_size)
    table = _table(point, subject)
    compiled, compile_seconds = _compile(
        subject.model,
        subject.process,
        (point.jump, point.memory),
        (batch_size, length, room),
        point.top_p < 1,
        None if table is None else len(table.keys_N),
    )
    drawn: list[np.ndarray] = []
    seconds: list[float] = []

    def timed(index: int) -> np.ndarray:
        inputs = jax.block_until_ready(_inputs(point, subject, given, batch_size, index, room))
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


def _table(point: Point, subject: Subject) -> Table | None:
    """What the draws of a point heed, where they do and it is known."""
    return subject.read_table() if point.neighbours and subject.read_table else None


def _inputs(point, subject, given, batch_size, index, room) -> tuple:
    """The arguments of a batch's sampler after the parameters."""
    rows = slice(index * batch_size, (index + 1) * batch_size)
    missing = batch_size - len(given.tokens_NL[rows])
    padding = [(0, missing), (0, 0)]
    frozen_BL = np.pad(given.frozen_NL[rows], padding)
    given_BL = np.where(frozen_BL, np.pad(given.tokens_NL[rows], padding), 0).astype(np.int32)
    temperature = jnp.float32(point.temperature)
    top_p = jnp.float32(point.top_p) if point.top_p < 1 else None
    key = jax.random.fold_in(jax.random.key(point.seed), index)
    if subject.model.causal:
        first_B = jnp.full((batch_size,), subject.process.eos_id, jnp.int32)
        return key, first_B, temperature, jnp.asarray(given_BL), jnp.asarray(frozen_BL), top_p
    noise_key, sample_key = jax.random.split(key)
    x0_BL = subject.process.source.sample(noise_key, given_BL.shape).astype(jnp.int32)
    x0_BL = jnp.where(frozen_BL, given_BL, x0_BL)
    grid = sampler.pad_grid(sampler.make_grid(point.grid, point.steps), room)
    steps = jnp.int32(point.steps)
    how = (temperature, top_p, steps, jnp.float32(point.cooling), jnp.float32(point.look_ahead))
    heeded = generate_lib.make_neighbours(
        point.neighbours or 0.0, _table(point, subject), point.jump
    )
    how += (heeded,)
    return sample_key, x0_BL, jnp.asarray(frozen_BL), jnp.asarray(grid), *how


@functools.lru_cache(maxsize=64)
def _compile(model, process, rule, size, has_nucleus, num_longer):
    """A shape's compiled sampler, shared by all models of one network, and seconds of compiling."""
    (jump, memory), (batch_size, length, room) = rule, size
    shape, key = (batch_size, length), jax.random.key(0)
    scalar = jnp.float32(1.0)
    top_p = scalar if has_nucleus else None
    tokens, frozen = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
    if model.causal:
        mask_id = process.source.mask_id
        run = generate_lib.make_autoregressive_sampler(model, length, mask_id, memory=memory)
        inputs = (key, tokens[:, 0], scalar, tokens, frozen, top_p)
    else:
        run = generate_lib.make_sampler(model, process, jump)
        grid = jnp.zeros((room + 1,), jnp.float32)
        heeded = None
        if num_longer is not None:
            contexts = model.vocab_size + num_longer
            follow = jax.ShapeDtypeStruct((contexts, model.vocab_size), jnp.float32)
            keys = jax.ShapeDtypeStruct((num_longer,), jnp.int32)
            shorter = jax.ShapeDtypeStruct((contexts,), jnp.int32)
            heeded = Neighbours(Table(follow, keys, shorter), scalar)
        inputs = (key, tokens, frozen, grid, scalar, top_p, jnp.int32(1), scalar, scalar, heeded)
    params = jax.eval_shape(lambda: model_lib.init_params(key, model))
    params = mesh_lib.spread(params)
    began = time.perf_counter()
    compiled = run.lower(params, *inputs).compile()
    return compiled, time.perf_counter() - began


def watch(
    point: Point, subject: Subject, given: Given, drawn_NL: np.ndarray, *, count: int, room: int
) -> Watched:
    """Samples the first rows of a point once more, watching.

    They are the first of the point's samples up to rounding: their noise is the same.

    Args:
      point, subject, given, room: as in `draw`.
      drawn_NL: the point's samples, which tell what an autoregressive model drew from.
      count: how many rows, of the first batch.
    """
    if subject.model.causal:
        return _watch_autoregressive(point, subject, given.frozen_NL[:count], drawn_NL[:count])
    first = Given(given.tokens_NL[:count], given.frozen_NL[:count])
    inputs = _inputs(point, subject, first, count, 0, room)
    run = generate_lib.make_observer(subject.model, subject.process, point.jump)
    _, observed = run(subject.params, *inputs)
    steps = point.steps
    grid = sampler.make_grid(point.grid, steps)
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
        np.asarray(x_SB, np.float64)[:steps].T
        for x_SB in (observed.entropy_SB, observed.changed_SB)
    )
    return Watched(grid[:-1].astype(np.float64), entropy_RS, changed_RS, trajectories)


def _watch_autoregressive(point, subject, frozen_RL, drawn_RL) -> Watched:
    """What each token was drawn from, by reading the text that was written."""
    entropy_RL = np.asarray(
        _entropies(
            subject.params,
            subject.model,
            subject.process.eos_id,
            subject.process.source.mask_id,
            jnp.asarray(drawn_RL),
            jnp.float32(point.temperature),
            jnp.float32(point.top_p) if point.top_p < 1 else None,
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
    logits = logits_lib.divide(logits, temperature)
    if mask_id is not None:
        logits = logits_lib.exclude(logits, mask_id)
    if top_p is not None:
        logits = logits_lib.nucleus(logits, top_p)
    return logits_lib.map_positions(generate_lib.entropy, logits)


def control(
    name: str,
    real_NL: np.ndarray,
    frozen_NL: np.ndarray,
    unigram_V: np.ndarray,
    sentence: np.ndarray,
    seed: int,
    *,
    count: Callable[[], Counts] | None = None,
) -> np.ndarray:
    """A naive control around what is given, int32 [N, L].

    Args:
      name: "unigram", tokens drawn one by one from the frequencies of the training text; "ngram",
        from left to right from what follows those before them there, all that `neighbours.draw`
        knows of it; "shuffled", each held-out block with its own tokens in random order;
        "repeated", one sentence over and over, the same in all samples.
      real_NL: held-out blocks.
      frozen_NL: their positions that are given and stay.
      unigram_V: frequencies of the training text, they add up to 1.
      sentence: ids of the sentence.
      seed: of the draws.
      count: counts what follows what in the training text; for "ngram" only.

    Raises:
      ValueError: "ngram" of a vocabulary that is too large (`ngrams.check_vocab`).
    """
    rng = np.random.default_rng(seed)
    if name == "unigram":
        made_NL = rng.choice(len(unigram_V), real_NL.shape, p=unigram_V)
    elif name == "ngram":
        made_NL = _write_ngrams(real_NL, frozen_NL, unigram_V, seed, count())
    elif name == "shuffled":
        made_NL = real_NL.copy()
        for tokens_L, free_L in zip(made_NL, ~frozen_NL, strict=True):
            tokens_L[free_L] = rng.permutation(tokens_L[free_L])
    else:
        made_NL = np.broadcast_to(np.resize(sentence, real_NL.shape[1]), real_NL.shape)
    return np.where(frozen_NL, real_NL, made_NL).astype(np.int32)


def _write_ngrams(real_NL, frozen_NL, unigram_V, seed, counts) -> np.ndarray:
    """Texts of the n-grams alone.

    They are what `neighbours.draw` makes of posteriors that know nothing but the frequencies of a
    text where B(x | y) follows y: then these cancel, and each token is drawn from B(x | c). Just
    before a given token, that is heeded too.
    """
    vocab_size = len(unigram_V)
    table = ngrams.table(counts, vocab_size)
    share_V, follow_VV = np.asarray(unigram_V), table.follow_CV[:vocab_size].astype(np.float64)
    for _ in range(100):
        share_V = share_V @ follow_VV
    features_NL1 = jnp.zeros((*real_NL.shape, 1))
    bias_V = jnp.log(jnp.asarray(share_V, jnp.float32))
    logits = Factored(features_NL1, jnp.zeros((1, vocab_size)), bias_V)
    heeded = Neighbours(table, jnp.float32(1.0))
    tokens_NL, frozen_NL = jnp.asarray(real_NL, jnp.int32), jnp.asarray(frozen_NL)
    draw_all = jax.jit(neighbours_lib.draw)
    return np.asarray(
        draw_all(jax.random.key(seed), logits, tokens_NL, ~frozen_NL, frozen_NL, heeded)
    )
