"""Exactly solvable small chains: each sequence is a state, each step a matrix.

A vocabulary of 3 and a length of 4 give 81 sequences (256 with a mask token). The output of a
perfectly trained network at any (x_t, t, h) is then a table, and so is the output law of a sampler:
no training noise, no sampling noise, no judge. Schedules, `JumpRule.probability`, teachers and step
budgets are those of the package, not reimplementations. Random draws of the package (jumps,
teachers) are replaced by an enumeration of all outcomes with their probabilities.

Tables and matrices are float64; the package's rules compute in float32.

Letters: N states, R rows of an enumeration, B, L, V, S as in the package.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fsdfm_jax.flow import schedules
from fsdfm_jax.flow.jumps import JumpRule
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.ops import categorical
from fsdfm_jax.ops import logits as logits_lib

# (t, h) -> p(x1 | x_t) at every state, float64 [N, L, V]: a network as a table.
Posterior = Callable[[float, float], np.ndarray]
# (key, denoise, jump, x_t, t, h) -> logits: `teacher.teacher_logits` with a rule, or another one.
Target = Callable[..., jax.Array]

# A network's logits are finite; impossible tokens get this probability.
FLOOR = 1e-12
# With several teacher jumps, the least likely outcomes up to this total mass are dropped.
_LEFT_OUT = 1e-3
_ROWS = 2**17  # rows enumerated at once


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """A data distribution and its noising process.

    Attributes:
      process: schedule, source and the rule for revealed tokens.
      states_NL: int32 [N, L], all sequences of the source's ids.
      data_N: float64 [N], data probability of each; 0 for sequences with a mask.
    """

    process: Process
    states_NL: np.ndarray
    data_N: np.ndarray

    @property
    def mask_id(self) -> int | None:
        return self.process.source.mask_id

    @functools.cached_property
    def noise_N(self) -> np.ndarray:
        """Probability of each state at t=0."""
        if self.mask_id is None:
            return np.full(len(self.states_NL), 1 / len(self.states_NL))
        return np.all(self.states_NL == self.mask_id, axis=1).astype(np.float64)

    @functools.cached_property
    def shown_NLV(self) -> np.ndarray:
        """One-hot tokens of the states."""
        return np.eye(self.process.source.vocab_size)[self.states_NL]

    @functools.cached_property
    def independent_NN(self) -> np.ndarray:
        """P(x0, x1) of independent noise and data."""
        return np.outer(self.noise_N, self.data_N)


def make_chain(process: Process, data: np.ndarray) -> Chain:
    """Make the chain of a data table.

    Args:
      process: its source may have a mask token, the last id.
      data: probability of each sequence of real tokens, float64 [tokens] * L, sums to 1.
    """
    size, length = process.source.vocab_size, data.ndim
    states_NL = np.array(list(itertools.product(range(size), repeat=length)), np.int32)
    padded = np.zeros((size,) * length)
    padded[tuple(slice(n) for n in data.shape)] = data
    return Chain(process, states_NL, padded.ravel())


def modes_data(modes: Sequence[Sequence[int]], *, num_tokens: int, noise: float) -> np.ndarray:
    """Make equally likely modes; each token is replaced by another one with probability `noise`."""
    keep = np.full((num_tokens, num_tokens), noise / (num_tokens - 1))
    np.fill_diagonal(keep, 1 - noise)
    return sum(functools.reduce(np.multiply.outer, keep[list(mode)]) for mode in modes) / len(modes)


def markov_data(first: np.ndarray, move: np.ndarray, *, length: int) -> np.ndarray:
    """Make the law of a Markov chain: `first` [tokens], rows of `move` [tokens, tokens]."""
    data = first
    for _ in range(length - 1):
        data = data[..., None] * move
    return data


def posterior_at(chain: Chain, coupling_NN: np.ndarray, t: float) -> np.ndarray:
    """Return p(x1 | x_t) per position on the path of a coupling, [N, L, V]: the losses' minimiser.

    States that the path doesn't reach keep their tokens, and masks get the data's marginals.
    """
    joint_MN, ends_M = _joint(chain, coupling_NN, t)
    total_N = joint_MN.sum(0)
    shown_MLV = chain.shown_NLV[ends_M]
    posterior_NLV = np.einsum("mn,mlv->nlv", joint_MN, shown_MLV)
    reached_N = total_N > 1e-200
    posterior_NLV[reached_N] /= total_N[reached_N, None, None]
    if not reached_N.all():
        marginal_LV = np.einsum("n,nlv->lv", chain.data_N, chain.shown_NLV)
        hidden_NL = chain.states_NL == (-1 if chain.mask_id is None else chain.mask_id)
        instead_NLV = np.where(hidden_NL[..., None], marginal_LV, chain.shown_NLV)
        posterior_NLV[~reached_N] = instead_NLV[~reached_N]
    return posterior_NLV


def _joint(chain, coupling_NN, t):
    """Return (P(x1, x_t) [M, N], the M possible states of x1)."""
    schedule = chain.process.schedule
    kappa, left = float(schedule.kappa(t)), float(schedule.remaining(t))
    begins, ends = (np.flatnonzero(coupling_NN.sum(axis)) for axis in (1, 0))
    likelihood = np.ones((len(begins), len(ends), len(chain.states_NL)))
    same = np.eye(chain.process.source.vocab_size)
    for tokens_N in chain.states_NL.T:
        from_noise = left * same[tokens_N[begins]][:, tokens_N]
        from_data = kappa * same[tokens_N[ends]][:, tokens_N]
        likelihood *= from_noise[:, None] + from_data[None]
    return np.einsum("am,amn->mn", coupling_NN[np.ix_(begins, ends)], likelihood), ends


def conditional_total_correlation(chain: Chain, coupling_NN: np.ndarray, t: float) -> float:
    """Return E over x_t of KL(p(x1 | x_t) || product of its marginals), nats.

    The loss of drawing all positions independently from the exact posterior at x_t
    (arXiv:2507.15897); at t=0, of a single step from noise.
    """
    joint_MN, ends = _joint(chain, coupling_NN, t)
    total_N = joint_MN.sum(0)
    shown_MLV = chain.shown_NLV[ends]
    marginal_NLV = np.einsum("mn,mlv->nlv", joint_MN, shown_MLV)
    # With unnormalised masses: H(joint) - H(x_t), and the same per position.
    single = sum(entropy(marginal_NLV[:, i]) for i in range(marginal_NLV.shape[1]))
    return single - entropy(joint_MN) - (marginal_NLV.shape[1] - 1) * entropy(total_N)


# Jumps.


@functools.partial(jax.jit, static_argnums=(0, 1))
def _probability(rule: JumpRule, schedule, t, h, m_NL):
    return jnp.broadcast_to(rule.probability(schedule, t, h, m_NL), m_NL.shape)


def kernel(chain: Chain, rule: JumpRule, p_NLV: np.ndarray, t: float, h: float) -> np.ndarray:
    """Return P(next token | state) per position under `jumps.make_process_jump`, [N, L, V]."""
    moves_NL, others_NLV = _moves(chain, rule, p_NLV, t, h)
    return moves_NL[..., None] * others_NLV + (1 - moves_NL)[..., None] * chain.shown_NLV


def _moves(chain, rule, p_NLV, t, h):
    """Return (P(position jumps | state) [N, L], P(token | state, jump) [N, L, V])."""
    off_NLV = np.where(chain.shown_NLV > 0, 0.0, p_NLV)
    m_NL = off_NLV.sum(-1)
    schedule = chain.process.schedule
    moves_NL = _probability(rule, schedule, np.float32(t), np.float32(h), np.float32(m_NL))
    moves_NL = np.clip(np.asarray(moves_NL, np.float64), 0.0, 1.0) * (m_NL > 0)
    if chain.mask_id is not None and chain.process.revealed == "stay":
        moves_NL = moves_NL * (chain.states_NL == chain.mask_id)
    return moves_NL, off_NLV / np.where(m_NL > 0, m_NL, 1.0)[..., None]


def jump(chain: Chain, rule: JumpRule, p_NLV: np.ndarray, t: float, h: float) -> np.ndarray:
    """Return P(next state | state) of one jump, [N, N]."""
    if not rule.dispersed:
        return transition(chain, kernel(chain, rule, p_NLV, t, h))
    moves_NL, others_NLV = _moves(chain, rule, p_NLV, t, h)
    result_NN = np.zeros((len(moves_NL),) * 2)
    for share_N, moved_NL in _dispersed(moves_NL):
        next_NLV = np.where(moved_NL[..., None], others_NLV, chain.shown_NLV)
        result_NN += share_N[:, None] * transition(chain, next_NLV)
    return result_NN


def _dispersed(moves_NL):
    """Yield (probability [N], moving positions [N, L]) of each `categorical.dispersed` outcome."""
    # A single number u determines which positions move; the outcome is piecewise constant in u.
    shift_L = np.arange(moves_NL.shape[1]) * categorical.GOLDEN / 2**32
    changes = np.concatenate([np.broadcast_to(-shift_L, moves_NL.shape), moves_NL - shift_L], 1) % 1
    ends = np.pad(np.sort(changes), [(0, 0), (1, 1)], constant_values=(0, 1))
    for low_N, high_N in itertools.pairwise(ends.T):
        u_NL = ((low_N + high_N)[:, None] / 2 + shift_L) % 1
        yield high_N - low_N, u_NL < moves_NL


def final_kernel(chain: Chain, p_NLV: np.ndarray) -> np.ndarray:
    """Return P(final token | state) per position under `jumps.make_finalize`, [N, L, V]."""
    if chain.mask_id is None:
        return p_NLV
    real_NLV = p_NLV * (np.arange(p_NLV.shape[-1]) != chain.mask_id)
    real_NLV = real_NLV / np.maximum(real_NLV.sum(-1, keepdims=True), 1e-300)
    is_mask_NL = chain.states_NL == chain.mask_id
    return np.where(is_mask_NL[..., None], real_NLV, chain.shown_NLV)


def transition(chain: Chain, kernel_NLV: np.ndarray) -> np.ndarray:
    """Multiply independent positions into a transition matrix: [N, L, V] to [N, N]."""
    parts = [kernel_NLV[:, i][:, tokens_N] for i, tokens_N in enumerate(chain.states_NL.T)]
    return functools.reduce(operator.mul, parts)


def run(chain: Chain, posterior: Posterior, sampling: Sampling, start: np.ndarray) -> np.ndarray:
    """Return the output law of `sampler.sample` for a law of x0, [N], or several, [.., N]."""
    grid_S1, top_p = sampling.times(), 1.0 if sampling.top_p is None else sampling.top_p
    distribution = start
    for i, t in enumerate(grid_S1[:-1]):
        h = np.float32(grid_S1[i + 1] - t)
        p_NLV = posterior(t + sampling.look_ahead * h, h)
        p_NLV = _sharpen(p_NLV, sampling.temperature * (1 - sampling.cooling * t), top_p)
        if i == len(grid_S1) - 2:
            step_NN = transition(chain, final_kernel(chain, p_NLV))
        else:
            step_NN = jump(chain, sampling.rule, p_NLV, t, h)
        distribution = distribution @ step_NN
    return distribution


# Jitted once: the temperature search makes hundreds of calls, which must not recompile.
_nucleus = jax.jit(logits_lib.nucleus)


def _sharpen(p_NLV, temperature, top_p):
    if temperature != 1:
        # In float64: the temperature search needs a smooth function.
        p_NLV = softmax(np.log(np.maximum(p_NLV, FLOOR)) / temperature)
    if top_p < 1:
        cut = _nucleus(jnp.log(jnp.asarray(p_NLV, jnp.float32)), top_p)
        p_NLV = softmax(np.asarray(cut, np.float64))
    return p_NLV


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


# Training.


class Taught(NamedTuple):
    """The teacher of a stage.

    Attributes:
      tau: widths below it learn from data.
      target: the teacher's logits.
      rule: jump rule of the teacher.
      divergence: name in `losses.DIVERGENCES`; `FIXED_POINTS` has the minimiser of its mean over
        the teacher's jumps.
      temperature: temperature of the distillation loss.
      finest: RK-4 evaluates at t=1, where no width is trained; 1 - finest, the last trained time,
        is used instead.
      best_of: the teacher's first jump is the best of this many draws, by a judge; 1: a plain draw.
    """

    tau: float
    target: Target
    rule: JumpRule
    divergence: str = "forward_kl"
    temperature: float = 1.0
    finest: float = 2.0**-6
    best_of: int = 1


def student(chain: Chain, coupling_NN: np.ndarray, taught: Taught | None) -> Posterior:
    """Return the fixed point of a stage's loss (eq. 4.5), as a table.

    Widths below tau have the posterior of the path. Any other width h has the teacher's answer,
    which uses the table itself at h/2.
    """

    @functools.cache
    def from_data(t):
        return posterior_at(chain, coupling_NN, t)

    @functools.cache
    def look_up(t, h):
        if taught is not None and t >= 1:
            return from_data(1 - taught.finest)
        if taught is None or h < taught.tau:
            return from_data(t)
        return teach(chain, look_up_f32, taught, t, h)

    def look_up_f32(t, h):
        return look_up(float(np.float32(t)), float(np.float32(h)))

    return look_up_f32


def teach(chain: Chain, posterior: Posterior, taught: Taught, t: float, h: float) -> np.ndarray:
    """Return what a student learns from a teacher at (t, h), over all its jumps, [N, L, V].

    The teacher runs twice: first on all states, with a jump that stays and records the transition
    matrix; then on all chains of states that these transitions allow, with a jump that follows the
    chain.
    """
    tables, transitions = [], []

    def denoise(x_BL, t_B, h_B):
        del x_BL  # all states, in order
        p_NLV = posterior(float(t_B[0]), float(h_B[0]))
        tables.append(np.log(np.maximum(p_NLV, FLOOR)).astype(np.float32))
        return jnp.asarray(tables[-1])

    def stay(key, logits_NLV, x_BL, t_B, h_B):
        del key
        p_NLV = softmax(np.asarray(logits_NLV, np.float64))
        moves = kernel(chain, taught.rule, p_NLV, float(t_B[0]), float(h_B[0]))
        matrix_NN = transition(chain, moves)
        if not transitions and taught.best_of > 1:
            matrix_NN = _best_of(matrix_NN, taught.best_of, chain.data_N)
        transitions.append(matrix_NN)
        return x_BL

    count = len(chain.states_NL)
    times = (np.full(count, t, np.float32), np.full(count, h, np.float32))
    taught.target(jax.random.key(0), denoise, stay, jnp.asarray(chain.states_NL), *times)

    tables_KNLV, states_NL = jnp.asarray(np.stack(tables)), jnp.asarray(chain.states_NL)
    t, h = jnp.float32(t), jnp.float32(h)
    follow = lambda chains_KR: np.asarray(
        _follow(taught.target, tables_KNLV, chains_KR, states_NL, t, h, taught.temperature)
    )
    find = FIXED_POINTS[taught.divergence]
    p_NLV = find(_blocks(transitions, follow), chain.shown_NLV.shape)
    if taught.temperature != 1:
        p_NLV = softmax(taught.temperature * np.log(np.maximum(p_NLV, FLOOR)))
    return p_NLV


@functools.partial(jax.jit, static_argnums=0)
def _follow(target, tables_KNLV, chains_KR, states_NL, t, h, temperature):
    """Return the teacher's probabilities at the loss's temperature along chains, [R, L, V]."""
    evaluations, jumped = iter(range(len(tables_KNLV))), iter(range(1, len(chains_KR)))

    places_L = tables_KNLV.shape[-1] ** jnp.arange(states_NL.shape[1])[::-1]

    def denoise(x_BL, t_B, h_B):
        del t_B, h_B  # as in the first run
        return tables_KNLV[next(evaluations)][jnp.sum(x_BL * places_L[None], axis=1)]

    def jump(key, logits, x_BL, t_B, h_B):
        del key, logits, x_BL, t_B, h_B
        return states_NL[chains_KR[next(jumped)]]

    t_R, h_R = (jnp.full(chains_KR.shape[1:], value) for value in (t, h))
    logits = target(jax.random.key(0), denoise, jump, states_NL[chains_KR[0]], t_R, h_R)
    return jax.nn.softmax(logits / temperature, axis=-1)


# Rows of an enumeration: (start state [R], probability given it [R], targets [R, L, V]); rows of a
# state are contiguous.
_Block = tuple[np.ndarray, np.ndarray, np.ndarray]


def _blocks(transitions: list[np.ndarray], follow) -> Iterator[_Block]:
    """Yield all chains along the transitions, in blocks of whole states and about `_ROWS` rows."""
    count = len(transitions[0])
    # A single jump has few outcomes: process all states at once.
    groups = np.array_split(np.arange(count), 1 if len(transitions) == 1 else count)
    waiting, rows = [], 0
    for group in groups:
        waiting.append(_chains_from(group, transitions))
        rows += len(waiting[-1][1])
        if rows < _ROWS and group[-1] < count - 1:
            continue
        chains_KR = np.concatenate([chains for chains, _ in waiting], axis=1)
        weights_R = np.concatenate([weights for _, weights in waiting])
        # Pad to powers of two to limit compilations.
        size = 2 ** int(np.ceil(np.log2(rows)))
        padded_KR = np.pad(chains_KR, [(0, 0), (0, size - rows)])
        yield chains_KR[0], weights_R, follow(padded_KR)[:rows]
        waiting, rows = [], 0


def _chains_from(states, transitions):
    """Return (chains [K, R], their mass [R]) from given states, in their order, mass 1 each."""
    chains_KR, mass_R = states[None], np.ones(len(states))
    for matrix_NN in transitions:
        # Prune after each jump: most chains are unlikely after their first jumps.
        mass_RN = mass_R[:, None] * matrix_NN[chains_KR[-1]]
        share = _LEFT_OUT / len(transitions) if len(transitions) > 1 else 0.0
        rows, ends = np.nonzero(mass_RN > _cutoff(mass_RN.ravel(), share))
        chains_KR = np.concatenate([chains_KR[:, rows], ends[None]])
        mass_R = mass_RN[rows, ends]
    return chains_KR, mass_R


def _cutoff(mass, share):
    """Return a power of 2 below which there is at most a share of the mass; 0 if there is none."""
    _, exponents = np.frexp(mass)
    lowest = exponents.min()
    below = np.cumsum(np.bincount(exponents - lowest, weights=mass))
    dropped = int(np.searchsorted(below, share * below[-1], side="right"))
    # frexp's exponent e means [2^(e-1), 2^e).
    return float(np.ldexp(0.5, lowest + dropped)) * (1 - 1e-9) if share and dropped else 0.0


def _best_of(matrix_NN, draws, score_N):
    """Return the transition to the highest-scoring state of several draws."""
    order = np.argsort(score_N, kind="stable")
    below = np.cumsum(matrix_NN[:, order], axis=1)
    reached = np.diff(below**draws, axis=1, prepend=0.0)
    chosen_NN = np.empty_like(matrix_NN)
    chosen_NN[:, order] = reached
    return chosen_NN


def mean_target(blocks: Iterator[_Block], shape: tuple[int, ...]) -> np.ndarray:
    """argmin over q of E[KL(target || q)]: the mean of the targets."""
    mean_NLV = np.zeros(shape)
    for states_R, weights_R, targets_RLV in blocks:
        at = np.flatnonzero(np.diff(states_R, prepend=-1))
        mean_NLV[states_R[at]] = np.add.reduceat(weights_R[:, None, None] * targets_RLV, at)
    return mean_NLV / mean_NLV.sum(-1, keepdims=True)


def jensen_shannon_centre(blocks: Iterator[_Block], shape: tuple[int, ...]) -> np.ndarray:
    """argmin over q of E[JSD(target, q)]: log q = E[log of (target + q) / 2] up to a constant."""
    centre_NLV = np.zeros(shape)
    for states_R, weights_R, targets_RLV in blocks:
        at = np.flatnonzero(np.diff(states_R, prepend=-1))
        row_R = np.cumsum(np.diff(states_R, prepend=states_R[0]) > 0)
        weights_R11 = weights_R[:, None, None]
        q = np.add.reduceat(weights_R11 * targets_RLV, at)
        for _ in range(100):
            middle_RLV = np.log(np.maximum(0.5 * (targets_RLV + q[row_R]), FLOOR))
            q = softmax(np.add.reduceat(weights_R11 * middle_RLV, at))
        centre_NLV[states_R[at]] = q
    return centre_NLV


FIXED_POINTS = {"forward_kl": mean_target, "jsd": jensen_shannon_centre}


def half_steps(schedule: schedules.Schedule, combine: Callable[..., jax.Array]) -> Target:
    """Make a teacher of two half steps with a custom combination of their logits.

    Args:
      schedule: kappa.
      combine: (logits at x_t, logits at the midpoint, (b1, b2, bh)) -> logits; b1, b2 and bh are
        the shares that the exact kernel redraws in the two halves and in the whole step.
    """

    def target(key, denoise, jump, xt_BL, t_B, h_B):
        half_B = h_B / 2
        first = denoise(xt_BL, t_B, half_B)
        middle_BL = jump(key, first, xt_BL, t_B, half_B)
        second = denoise(middle_BL, t_B + half_B, half_B)
        share = lambda t, h: schedules.redraw_fraction(schedule, t, h)[:, None, None]
        shares = (share(t_B, half_B), share(t_B + half_B, half_B), share(t_B, h_B))
        return combine(first, second, shares)

    return target


def compose(first: jax.Array, second: jax.Array, shares) -> jax.Array:
    """Compose two half steps in probability space: log of [b1 (1 - b2) p1 + b2 p2] / bh.

    Its mean over the midpoints gives each position the probabilities of two half steps of the exact
    kernel.
    """
    b1, b2, bh = shares
    p1, p2 = jax.nn.softmax(first, axis=-1), jax.nn.softmax(second, axis=-1)
    return jnp.log((b1 * (1 - b2) * p1 + b2 * p2) / bh)


def between(share: float) -> Callable[..., jax.Array]:
    """Mix the composition and Heun's rule geometrically, with a `share` of the latter."""

    def combine(first, second, shares):
        mean = jax.nn.log_softmax(logits_lib.average([first, second], (0.5, 0.5)), axis=-1)
        return (1 - share) * compose(first, second, shares) + share * mean

    return combine


# Couplings of noise and data.


def transport(chain: Chain) -> np.ndarray:
    """Return the P(x0, x1) [N, N] that moves noise to data with the fewest changed tokens.

    The limit of assigning noise to texts within a batch by the number of equal tokens. Solved as a
    linear program.
    """
    import scipy.optimize
    import scipy.sparse

    begins, ends = np.flatnonzero(chain.noise_N), np.flatnonzero(chain.data_N)
    states = chain.states_NL
    cost = np.sum(states[begins][:, None] != states[ends][None], axis=-1).astype(np.float64)
    rows = scipy.sparse.kron(scipy.sparse.eye(len(begins)), np.ones((1, len(ends))))
    columns = scipy.sparse.kron(np.ones((1, len(begins))), scipy.sparse.eye(len(ends)))
    found = scipy.optimize.linprog(
        cost.ravel(),
        A_eq=scipy.sparse.vstack([rows, columns]),
        b_eq=np.concatenate([chain.noise_N[begins], chain.data_N[ends]]),
        method="highs",
    )
    coupling_NN = np.zeros((len(states), len(states)))
    coupling_NN[np.ix_(begins, ends)] = np.maximum(found.x, 0).reshape(cost.shape)
    return coupling_NN / coupling_NN.sum()


# Measures.


def entropy(p: np.ndarray) -> float:
    """-sum p log p, nats; also for unnormalised masses."""
    p = p[p > 0]
    return float(-np.sum(p * np.log(p)))


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Half the sum of |p - q|, in [0, 1]."""
    return float(np.abs(p - q).sum() / 2)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q), nats."""
    where = p > 0
    return float(np.sum(p[where] * np.log(p[where] / np.maximum(q[where], 1e-300))))


def total_correlation(chain: Chain, p_N: np.ndarray) -> float:
    """KL of a distribution to the product of its marginals, nats."""
    marginal_LV = np.einsum("n,nlv->lv", p_N, chain.shown_NLV)
    return sum(entropy(p_V) for p_V in marginal_LV) - entropy(p_N)


def perplexity(chain: Chain, p_N: np.ndarray) -> float:
    """exp of the mean negative log-likelihood per token under the data, the perfect judge."""
    length = chain.states_NL.shape[1]
    possible = p_N > 1e-12
    with np.errstate(divide="ignore"):
        nll = -np.sum(p_N[possible] * np.log(chain.data_N[possible]))
    return float(np.exp(nll / length))


def matched_temperature(
    sample: Callable[[float], np.ndarray], wanted: float, *, tolerance: float = 1e-4
) -> float | None:
    """Find the temperature nearest to 1 at which `sample(temperature)` has the wanted entropy.

    Entropy may not increase with temperature: a cold posterior of coupled noise keeps the tokens of
    the noise. So the search starts at 1 and stops at the first crossing. None if there is no such
    temperature in [1/8, 8].
    """
    excess = lambda temperature: entropy(sample(temperature)) - wanted
    cooler = excess(1.0) > 0
    near, far = 1.0, 1.0
    while (excess(far) > 0) == cooler:
        near, far = far, far / 1.1 if cooler else far * 1.1
        if not 1 / 8 <= far <= 8:
            return None
    for _ in range(60):
        middle = float(np.sqrt(near * far))
        found = excess(middle)
        if abs(found) < tolerance:
            break
        near, far = (middle, far) if (found > 0) == cooler else (near, middle)
    return middle
