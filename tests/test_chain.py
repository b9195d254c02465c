"""Sampler and teacher against exact enumeration.

Three positions of five tokens give 125 states, so the Markov chain of an algorithm can be computed
exactly: one 125 x 125 transition matrix per step. The reference below is float64 NumPy, written
from the equations (arXiv:2509.20624, eq. 4.3, Algorithm 1 and App. B.1), and calls no code of the
package. The network is a random table: logits that differ for every state and position and change
with t and h.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies, assert_mean
from marks import slow_except

from fsdfm_jax.flow import jumps, sampler, sampling, teacher
from fsdfm_jax.flow.schedules import Polynomial
from fsdfm_jax.flow.sources import Source

V, L, ROWS = 5, 3, 100_000
MASK = V - 1
STATES = np.array(list(itertools.product(range(V), repeat=L)))
PLACES = np.array([V**2, V, 1])
TABLE = np.random.default_rng(7).normal(size=(3, len(STATES), L, V)) * 2.5


# The package's side.


def denoise(x_BL, t_B, h_B):
    still, by_time, by_width = jnp.asarray(TABLE, jnp.float32)
    index_B = jnp.sum(x_BL * PLACES[None], axis=-1)
    t_B11, h_B11 = t_B[:, None, None], h_B[:, None, None]
    return still[index_B] + t_B11 * by_time[index_B] + jnp.sin(5 * h_B11) * by_width[index_B]


@dataclasses.dataclass(frozen=True)
class Program:
    """One combination of jump rule, noise and schedule t^power."""

    rule: str
    source: str
    keep: bool
    power: float

    def __str__(self):
        return f"{self.rule}-{self.source}" + "-keep" * self.keep


PROGRAMS = [
    Program(rule, source, keep, power)
    for rule in ("euler", "cumulative", "mixture")
    for source, keep, power in (("uniform", False, 1.0), ("mask", False, 1.0), ("mask", True, 2.0))
]


def package_jump(program):
    jump = jumps.make_jump(jumps.get_rule(program.rule), Polynomial(program.power))
    return jumps.keep_revealed(jump, MASK) if program.keep else jump


def package_source(program):
    return Source(V) if program.source == "uniform" else Source(V, mask_id=MASK)


@jax.jit
def run(which, key, x0_BL, grid_S1, frozen_BL, temperature):
    """The package's sampler; the program is data: one compilation for each number of steps."""
    jump_branches = [package_jump(p) for p in PROGRAMS]
    finalize_branches = [jumps.make_finalize(package_source(p)) for p in PROGRAMS]
    jump = lambda *args: jax.lax.switch(which, jump_branches, *args)
    finalize = lambda *args: jax.lax.switch(which, finalize_branches, *args)
    at_temperature = sampling.annealed(denoise, temperature)
    x_BL = sampler.sample(key, at_temperature, jump, finalize, x0_BL, grid_S1, frozen_BL)
    return jnp.bincount(jnp.sum(x_BL * PLACES[None], axis=-1), length=len(STATES))


def sampled_counts(program, grid, given, temperature):
    source_key, key = jax.random.split(jax.random.key(PROGRAMS.index(program) * 10 + len(grid)))
    x0_BL = package_source(program).sample(source_key, (ROWS, L))
    frozen_BL = np.zeros((ROWS, L), bool)
    for position, token in given.items():
        x0_BL, frozen_BL[:, position] = x0_BL.at[:, position].set(token), True
    return run(PROGRAMS.index(program), key, x0_BL, np.float32(grid), frozen_BL, temperature)


# The reference.


def exact_logits(t, h):
    return TABLE[0] + t * TABLE[1] + np.sin(5 * h) * TABLE[2]


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def jump_kernel(program, p, t, h, *, posterior_end=False):
    """P(new token y | state, position), [125, L, V], for the posteriors p of every state."""
    kappa = lambda time: time**program.power
    left, left_after = max(1 - kappa(t), 1e-8), max(1 - kappa(t + h), 1e-8)
    kernel = np.zeros_like(p)
    for s, state in enumerate(STATES):
        for position, z in enumerate(state):
            if program.keep and z != MASK:
                kernel[s, position, z] = 1
                continue
            p_y = p[s, position]
            m = 1 - p_y[z]
            if posterior_end and t + h >= 1:
                moves = m
            elif program.rule == "cumulative":
                gbar = np.log(left / left_after) / h
                moves = 1 - np.exp(-h * gbar * m)
            elif program.rule == "euler":
                g = program.power * t ** (program.power - 1) / left
                moves = 1 - np.exp(-h * g * m)
            else:
                moves = (kappa(t + h) - kappa(t)) / left * m
            kernel[s, position] = moves * p_y / m
            kernel[s, position, z] = 1 - moves
    return kernel


def final_kernel(program, p):
    """The last step: the whole posterior, or that of masked positions without the mask."""
    if program.source == "uniform":
        return p
    kernel = np.zeros_like(p)
    for s, state in enumerate(STATES):
        for position, z in enumerate(state):
            if z == MASK:
                kernel[s, position, :MASK] = p[s, position, :MASK] / p[s, position, :MASK].sum()
            else:
                kernel[s, position, z] = 1
    return kernel


def transition(kernel, frozen=()):
    """Positions move independently given the state: [125, L, V] to [125, 125]; frozen ones stay."""
    kernel = kernel.copy()
    for position in frozen:
        kernel[:, position] = np.eye(V)[STATES[:, position]]
    joint = np.einsum("sa,sb,sc->sabc", kernel[:, 0], kernel[:, 1], kernel[:, 2])
    return joint.reshape(len(STATES), len(STATES))


def exact_distribution(program, grid, given, temperature):
    noise = np.full(V, 1 / V) if program.source == "uniform" else np.eye(V)[MASK]
    start = [np.eye(V)[given[position]] if position in given else noise for position in range(L)]
    distribution = np.einsum("a,b,c->abc", *start).ravel()
    for i, t in enumerate(grid[:-1]):
        h = grid[i + 1] - t
        p = softmax(exact_logits(t, h) / temperature)
        last = i == len(grid) - 2
        kernel = final_kernel(program, p) if last else jump_kernel(program, p, t, h)
        distribution = distribution @ transition(kernel, given)
    return distribution


# The comparison.


def assert_same_distribution(counts, exact):
    """Besides each cell and the chi-square (see `chance`): the total variation.

    Of n draws it has a mean of at most sqrt(1/(2 pi n)) sum sqrt(p) (the mean absolute deviation of
    each cell, normal) and, its cells being nearly independent, a standard deviation of at most
    sqrt((1 - 2/pi) sum p / n) / 2.
    """
    counts = np.asarray(counts)
    assert counts.sum() == ROWS
    assert_frequencies(counts, exact)
    total_variation = np.abs(counts / ROWS - exact).sum() / 2
    mean = np.sqrt(exact).sum() / np.sqrt(2 * np.pi * ROWS)
    assert total_variation <= mean + 5 * np.sqrt((1 - 2 / np.pi) / ROWS) / 2


GRIDS = {
    "1": np.array([0.0, 1.0]),
    "2": np.linspace(0, 1, 3),
    "4": np.linspace(0, 1, 5),
    "4 uneven": np.array([0, 0.125, 0.25, 0.875, 1.0]),
    "8": np.linspace(0, 1, 9),
}


def compare(program, grid, given=None, temperature=1.0):
    settings = (program, GRIDS[grid], given or {}, temperature)
    assert_same_distribution(sampled_counts(*settings), exact_distribution(*settings))


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
@pytest.mark.parametrize("grid", slow_except(["1", "4 uneven"], GRIDS))
def test_sampler_follows_its_chain(program, grid):
    compare(program, grid)


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
@pytest.mark.parametrize("given", [{1: 2}, {0: 3, 2: MASK}], ids=["middle", "ends"])
def test_frozen_positions(program, given):
    # A frozen position may even hold the mask; it then stays masked.
    compare(program, "4", given)


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_temperature(program):
    compare(program, "4 uneven", temperature=0.7)


def test_the_settings_differ():
    """All programs differ enough for the chi-square, 125 +- 16 for equal ones, to separate them."""
    exact = [exact_distribution(p, GRIDS["4 uneven"], {}, 1.0) for p in PROGRAMS]
    for one, two in itertools.permutations(exact, 2):
        possible = two > 0
        shift = ROWS * np.sum((one - two)[possible] ** 2 / two[possible])
        assert shift > 150 or one[~possible].sum() > 1e-3


# The teacher.

LITERAL = {
    "heun": [(0.0, 1 / 2), (0.5, 1 / 2)],
    "rk4": [(0.0, 1 / 6), (0.5, 1 / 3), (0.5, 1 / 3), (1.0, 1 / 6)],
}
XT = np.array([3, 0, 2])
# A step over everything, one in the middle, and one that ends at t=1.
STEPS = [(0.0, 1.0), (0.25, 0.5), (0.5, 0.5)]


def exact_teacher(name, t, h, *, posterior_end):
    """Mean of the averaged logits over the jumps, [L, V]: Algorithm 1 on its distribution."""
    program = Program("cumulative", "uniform", False, 1.0)
    distribution = np.eye(len(STATES))[XT @ PLACES]
    total = np.zeros((L, V))
    for node, weight in LITERAL[name]:
        time = min(t + node * h, 1.0)
        logits = exact_logits(time, h / 2)
        total += weight * np.einsum("s,slv->lv", distribution, logits)
        if time < 1:
            kernel = jump_kernel(program, softmax(logits), time, h / 2, posterior_end=posterior_end)
            distribution = distribution @ transition(kernel)
    return total


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_teacher(name, posterior_end, key, t_B, h_B):
    rule = jumps.CUMULATIVE
    jump = jumps.make_jump(jumps.with_posterior_end(rule) if posterior_end else rule, Polynomial())
    xt_BL = jnp.tile(jnp.asarray(XT)[None], (len(t_B), 1))
    return teacher.teacher_logits(key, teacher.get_rule(name), denoise, jump, xt_BL, t_B, h_B)


@pytest.mark.parametrize("posterior_end", [False, True], ids=["literal", "posterior_end"])
@pytest.mark.parametrize("name", LITERAL)
def test_teacher_averages_over_its_jumps(name, posterior_end):
    t_B, h_B = np.float32(STEPS).repeat(ROWS, axis=0).T
    logits_BLV = np.asarray(run_teacher(name, posterior_end, jax.random.key(3), t_B, h_B))
    for row, (t, h) in enumerate(STEPS):
        expected_LV = exact_teacher(name, t, h, posterior_end=posterior_end)
        assert_mean(logits_BLV[row * ROWS : (row + 1) * ROWS], expected_LV)


def test_the_ends_of_the_teacher_differ():
    """Literal end and full draw are far apart against a standard error of about 4 / sqrt(n)."""
    for t, h in (STEPS[0], STEPS[2]):
        one, two = (exact_teacher("rk4", t, h, posterior_end=end) for end in (False, True))
        assert np.abs(one - two).max() > 10 * 4 / np.sqrt(ROWS)
