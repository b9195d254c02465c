"""Objectives for few-step students, minimised with exact sums on a small chain.

    python -m benchmarks.step_laws --steps=1,2 --seeds=0 --output=step_laws.json

The chains are those of `benchmarks.exact_lab`. A student of S uniform steps is one table of logits
per step; its law p_j at time j/S is a product of matrices. Adam minimises each objective from the
base model's table, with gradients through exact sums: no training noise, no sampling noise, and a
perfect auxiliary network if the method needs one. The rows show the optimum of an objective, not
how hard it is to learn.

    end_to_end   KL(p_S || data): the best possible for steps that factorise over positions
    step         KL(p_{j+1} || q_{j+1}) of each step from the student's states; q: the path's law
    step_noised  as `step`, after further noise, which keeps the ratios of its gradient finite
    step_real    as `step`, from the path's states
    posterior    KL of the student's posterior of its answer to the base's, inside a step: D-MMD
                 (arXiv:2603.20155)
    posterior_drop   its usual gradient, which ignores that the state depends on the student

`coordinate_gradient` makes `step` trainable: it writes the gradient of a KL between joint laws as a
sum over single positions. Stage `refine` uses it to train `step_noised`. Letters: N states, L, V, S
as in `benchmarks.chains`.
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import chains, exact_lab, measure
from benchmarks.chains import Chain
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.schedules import Polynomial
from fsdfm_jax.flow.sources import Source

# --seeds, --recipes and --data_kind are flags of the exact lab.
_UPDATES = flags.DEFINE_integer("updates", 1000, "Updates per student.", lower_bound=1)

Loss = Callable[[jax.Array], jax.Array]

_LEARNING_RATE = 0.05
_FURTHER_NOISE = (0.2, 0.5, 0.8, 0.95)  # shares of tokens kept in `step_noised`
_LEVELS = 3  # times inside a step in `posterior`


def make_chain(kind: str, seed: int) -> Chain:
    """Make a chain of the exact lab with uniform noise and kappa(t) = t."""
    process = Process(Polynomial(), Source(exact_lab.NUM_TOKENS))
    return chains.make_chain(process, exact_lab.make_data(kind, seed))


def path_law(chain: Chain, t: float) -> np.ndarray:
    """Return the law q_t of the path's states, [N]."""
    return chain.data_N @ _noise(chain, t)


def _noise(chain, kept):
    """Return P(state | state) if each position keeps its token with `kept`, else becomes noise."""
    size = chain.shown_NLV.shape[-1]
    return chains.transition(chain, kept * chain.shown_NLV + (1 - kept) / size)


def step_matrix(chain: Chain, answers_NLV: jax.Array, share: float) -> jax.Array:
    """Return P(next state | state), [N, N]: a position redraws from its answer with `share`."""
    return chains.transition(chain, (1 - share) * chain.shown_NLV + share * answers_NLV)


def student_laws(chain: Chain, logits_SNLV: jax.Array, *, apart: bool = False) -> list[jax.Array]:
    """Return the laws [N] of a student's states at times 0, 1/S .. 1.

    With `apart`, no gradient flows across steps.
    """
    steps = len(logits_SNLV)
    laws = [jnp.asarray(chain.noise_N)]
    for j, logits_NLV in enumerate(logits_SNLV):
        start_N = jax.lax.stop_gradient(laws[-1]) if apart else laws[-1]
        answers_NLV = jax.nn.softmax(logits_NLV, axis=-1)
        laws.append(start_N @ step_matrix(chain, answers_NLV, 1 / (steps - j)))
    return laws


def base_logits(chain: Chain, steps: int) -> jax.Array:
    """Return the exact posterior of the path at the times of S steps, as logits [S, N, L, V]."""
    posterior = lambda t: chains.posterior_at(chain, chain.independent_NN, t)
    answers = np.stack([posterior(j / steps) for j in range(steps)])
    return jnp.log(jnp.maximum(answers, chains.FLOOR))


def _kl(p_N, q_N):
    return jnp.sum(p_N * (jnp.log(p_N + 1e-300) - jnp.log(q_N)))


def end_to_end(chain: Chain, steps: int) -> Loss:
    """KL of the student's output law to the data."""
    del steps
    return lambda logits_SNLV: _kl(student_laws(chain, logits_SNLV)[-1], chain.data_N)


def step(chain: Chain, steps: int, *, real: bool = False, further=(1.0,)) -> Loss:
    """KL of each step's law to the path's, after noise that keeps a share `further` of tokens."""
    wanted = [path_law(chain, j / steps) for j in range(steps + 1)]
    noises = [_noise(chain, kept) for kept in further]

    def loss(logits_SNLV):
        total = 0.0
        for j, start_N in enumerate(student_laws(chain, logits_SNLV, apart=True)[:-1]):
            start_N = wanted[j] if real else jax.lax.stop_gradient(start_N)
            answers_NLV = jax.nn.softmax(logits_SNLV[j], axis=-1)
            law_N = start_N @ step_matrix(chain, answers_NLV, 1 / (steps - j))
            total += sum(_kl(law_N @ noise, wanted[j + 1] @ noise) for noise in noises)
        return total / len(noises)

    return loss


def posterior(chain: Chain, steps: int, *, drop: bool = False) -> Loss:
    """KL of the student's posterior of its answer x1 to the path's, at states inside each step."""
    shown_NLV, length = jnp.asarray(chain.shown_NLV), chain.states_NL.shape[1]
    times_S = [[(j + (k + 0.5) / _LEVELS) / steps for k in range(_LEVELS)] for j in range(steps)]
    wanted = {
        s: chains.posterior_at(chain, chain.independent_NN, s) for times in times_S for s in times
    }

    def inside(start_N, answers_NLV, t, s):
        share, wanted_NLV = (s - t) / (1 - t), wanted[s]
        moved_NLV = (1 - share) * shown_NLV + share * answers_NLV
        single_LNN = jnp.stack([moved_NLV[:, i] @ shown_NLV[:, i].T for i in range(length)])
        total = 0.0
        for i in range(length):
            others_NN = jnp.prod(single_LNN[np.arange(length) != i], axis=0)
            # P(state at s, answer of position i | state at t).
            stayed_NN = (1 - share) * shown_NLV[:, i] @ shown_NLV[:, i].T
            seen_NNV = stayed_NN[..., None] + share * shown_NLV[None, :, i]
            joint_NNV = others_NN[..., None] * answers_NLV[:, None, i] * seen_NNV
            law_NV = jnp.einsum("n,nmv->mv", start_N, joint_NNV)
            own_NV = law_NV / law_NV.sum(-1, keepdims=True)
            gap_NV = jnp.log(own_NV + 1e-300) - jnp.log(wanted_NLV[:, i])
            if drop:
                reach_N = jax.lax.stop_gradient(jnp.prod(single_LNN, axis=0)) * start_N[:, None]
                gap_NV = jax.lax.stop_gradient(gap_NV)
                total += jnp.einsum("nm,nv,mv->", reach_N, answers_NLV[:, i], gap_NV)
            else:
                total += jnp.sum(law_NV * gap_NV)
        return total

    def loss(logits_SNLV):
        total = 0.0
        for j, start_N in enumerate(student_laws(chain, logits_SNLV, apart=True)[:-1]):
            answers_NLV = jax.nn.softmax(logits_SNLV[j], axis=-1)
            start_N, t = jax.lax.stop_gradient(start_N), j / steps
            total += sum(inside(start_N, answers_NLV, t, s) for s in times_S[j]) / _LEVELS
        return total

    return loss


RECIPES: dict[str, Callable[[Chain, int], Loss]] = {
    "end_to_end": end_to_end,
    "step": step,
    "step_noised": functools.partial(step, further=_FURTHER_NOISE),
    "step_real": functools.partial(step, real=True),
    "posterior": posterior,
    "posterior_drop": functools.partial(posterior, drop=True),
}


def coordinate_gradient(
    chain: Chain, answers_NLV: jax.Array, share: float, start_N: jax.Array, wanted_N: jax.Array
) -> jax.Array:
    """Return the gradient of KL(p || q) with respect to the answers of one step.

    With K_i(v|z) = (1 - share) [v = z_i] + share G_i(v|z), the step's kernel at position i, every
    sum_v dK_i(v|z) is 0, and so

        dKL(p || q) = E_z sum_i E_{z'_-i} sum_v dK_i(v|z) [log p(v | z'_-i) - log q(v | z'_-i)]

    exactly, without score functions or omitted terms. A denoiser of a uniform path gives the
    conditional given all other positions after dividing out the evidence of the position's own
    token, so both logarithms can be networks. The bracket vanishes everywhere only if p = q.

    Args:
      answers_NLV: G.
      share: h / (1 - t).
      start_N: law of the states z at the start of the step.
      wanted_N: q.

    Returns:
      [N, L, V], up to a constant for each (z, i).
    """
    step_NN = step_matrix(chain, answers_NLV, share)
    law_N = start_N @ step_NN
    length, size = chain.states_NL.shape[1], chain.shown_NLV.shape[-1]
    parts = []
    for i in range(length):
        place = size ** (length - 1 - i)
        others_N = np.arange(len(law_N)) - chain.states_NL[:, i] * place
        siblings_NV = others_N[:, None] + np.arange(size) * place
        own_NV, path_NV = jnp.log(law_N[siblings_NV]), jnp.log(jnp.asarray(wanted_N)[siblings_NV])
        gap_NV = jax.nn.log_softmax(own_NV, axis=-1) - jax.nn.log_softmax(path_NV, axis=-1)
        parts.append(share * start_N[:, None] * (step_NN @ gap_NV))
    return jnp.stack(parts, axis=1)


def minimise(loss: Loss, start: jax.Array, *, updates: int) -> jax.Array:
    """Minimise with Adam, at a learning rate that falls to 0 in the second half."""
    schedule = lambda i: _LEARNING_RATE * jnp.minimum(1.0, 2.0 * (1.0 - i / updates))
    optimiser = optax.adam(schedule, b2=0.99)

    @jax.jit
    def run(params):
        def body(carry, _):
            params, state = carry
            changes, state = optimiser.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, changes), state), None

        return jax.lax.scan(body, (params, optimiser.init(params)), length=updates)[0][0]

    return run(start)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    jax.config.update("jax_enable_x64", True)
    names = flags.FLAGS.recipes or list(RECIPES)
    if unknown := [name for name in names if name not in RECIPES]:
        raise app.UsageError(f"--recipes has unknown {unknown}; expected some of {list(RECIPES)}.")
    rows = []
    for seed in map(int, flags.FLAGS.seeds):
        chain = make_chain(flags.FLAGS.data_kind, seed)
        for steps in measure.numbers(measure.STEPS, least=1):
            base = base_logits(chain, steps)
            # Leave saddle points, such as those of identical modes.
            start = base + 0.01 * jax.random.normal(jax.random.key(0), base.shape)
            for name in ("base", *names):
                began, logits = time.perf_counter(), base
                if name != "base":
                    logits = minimise(RECIPES[name](chain, steps), start, updates=_UPDATES.value)
                p_N = np.asarray(student_laws(chain, logits)[-1])
                row = {"seed": seed, "steps": steps, "recipe": name}
                row |= {"tv": chains.total_variation(p_N, chain.data_N)}
                row |= {"kl": chains.kl(p_N, chain.data_N), "entropy": chains.entropy(p_N)}
                row |= {"data": chains.entropy(chain.data_N)}
                rows.append(row | {"seconds": time.perf_counter() - began})
                print(f"seed {seed}, {steps} steps: {name} TV {row['tv']:.5f}", flush=True)
    measure.print_table(rows)
    measure.write({"machine": measure.machine(), "updates": _UPDATES.value, "rows": rows})


if __name__ == "__main__":
    app.run(main)
