"""The likelihood bound against exact enumeration.

Three positions of three tokens, with [MASK] four, are few enough states to compute the bound
and the sampler's likelihood of each text exactly. The reference below is float64 NumPy and calls no
code of the package.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_mean

from fsdfm_jax.evaluate import bound
from fsdfm_jax.flow import schedules
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sources import Source
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig

pytestmark = pytest.mark.slow

L, TOKENS = 3, 3
MASK = TOKENS
TEXTS = np.array(list(itertools.product(range(TOKENS), repeat=L)))
_rng = np.random.default_rng(11)
# How often each of the 27 texts occurs: few favourites, positions that depend on each other.
COUNTS = (_rng.gamma(0.3, 12.0, size=len(TEXTS)) + 1).astype(int)
DATA = COUNTS / COUNTS.sum()
ENTROPY = -np.sum(DATA * np.log(DATA))
EPS = 0.05
LINEAR = schedules.Polynomial()


@dataclasses.dataclass(frozen=True)
class Setting:
    """Noise, rule for revealed tokens, and schedule."""

    source: str
    revealed: str = "stay"
    schedule: schedules.Schedule = LINEAR

    def __str__(self):
        return f"{self.source}-{self.revealed}-{self.schedule}"

    @property
    def vocab_size(self):
        return TOKENS + (self.source == "mask")

    @property
    def process(self):
        source = Source(self.vocab_size, mask_id=MASK if self.source == "mask" else None)
        return Process(self.schedule, source, 0, self.revealed)

    @property
    def states(self):
        return np.array(list(itertools.product(range(self.vocab_size), repeat=L)))

    @property
    def noise(self):
        return np.eye(4)[MASK] if self.source == "mask" else np.full(TOKENS, 1 / TOKENS)


UNIFORM, STAY, JUMP = Setting("uniform"), Setting("mask"), Setting("mask", "jump")
SETTINGS = [
    UNIFORM,
    STAY,
    JUMP,
    Setting("uniform", schedule=schedules.Polynomial(2.0)),
    Setting("mask", schedule=schedules.Polynomial(0.5)),
    Setting("mask", "jump", schedule=schedules.Cosine()),
]
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


# ------------------------------------------------------------- networks, each for both sides


def _table(setting):
    """Logits that differ for every state and position and change with the time."""
    shape = (2, len(setting.states), L, setting.vocab_size)
    return np.random.default_rng(5).normal(size=shape) * 1.5


def _random_denoise(table, x_BL, t_B):
    places = jnp.asarray([table.shape[-1] ** i for i in reversed(range(L))])
    index_B = jnp.sum(x_BL * places[None], axis=-1)
    return table[0][index_B] + t_B[:, None, None] * table[1][index_B]


def random_network(setting):
    table = jnp.asarray(_table(setting), jnp.float32)
    return jax.tree_util.Partial(_random_denoise, table)


def random_posterior(setting, kappa):
    """p(y | state, position), [n, L, V]."""
    still, by_time = _table(setting)
    logits = still + _time(setting.schedule, kappa) * by_time
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def _time(schedule, kappa):
    if isinstance(schedule, schedules.Cosine):
        return math.acos(1 - kappa) * 2 / math.pi
    return kappa ** (1 / schedule.power)


def _kappa(schedule, t):
    if isinstance(schedule, schedules.Cosine):
        return 1 - math.cos(math.pi * t / 2)
    return t**schedule.power


@functools.lru_cache(maxsize=8)
def _exact_denoise(schedule):
    """The posterior itself, by Bayes over the 27 texts."""

    def denoise(data, noise, x_BL, t_B):
        kappa_B111 = schedule.kappa(t_B)[:, None, None]
        shows_BNL = x_BL[:, None] == jnp.asarray(TEXTS)[None]
        likelihood_BNL = kappa_B111 * shows_BNL + (1 - kappa_B111) * noise[x_BL][:, None]
        joint_BN = data[None] * jnp.prod(likelihood_BNL, axis=-1)
        is_token_NLV = jax.nn.one_hot(jnp.asarray(TEXTS), len(noise))
        p_BLV = jnp.einsum("bn,nlv->blv", joint_BN, is_token_NLV, precision="highest")
        return jnp.log(jnp.maximum(p_BLV, 1e-35))

    return denoise


def exact_network(setting):
    arrays = [jnp.asarray(x, jnp.float32) for x in (DATA, setting.noise)]
    return jax.tree_util.Partial(_exact_denoise(setting.schedule), *arrays)


def exact_posterior(setting, kappa):
    joint_SN = given_text(setting, kappa).T * DATA
    p_SLV = np.einsum("sn,nlv->slv", joint_SN, np.eye(setting.vocab_size)[TEXTS])
    total = p_SLV.sum(-1, keepdims=True)
    # States that never occur (total 0) get any distribution.
    return np.where(total > 0, p_SLV / np.where(total > 0, total, 1), 1 / setting.vocab_size)


# ------------------------------------------------------------------------------ the reference


def given_text(setting, kappa):
    """P(state | text) on the path, [texts, states]."""
    shows_NSL = TEXTS[:, None] == setting.states[None]
    return np.prod(kappa * shows_NSL + (1 - kappa) * setting.noise[setting.states][None], axis=-1)


def exact_bound(setting, posterior, eps=EPS):
    """The bound of each text, nats, by enumeration and quadrature over s = -ln(1 - kappa)."""
    kappa_end = _kappa(setting.schedule, 1 - eps)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    s_end = -math.log(1 - kappa_end)
    total = np.zeros(len(TEXTS))
    for node, weight in zip(nodes, weights, strict=True):
        kappa = 1 - math.exp(-s_end * (node + 1) / 2)
        total += weight * s_end / 2 * _mean_over_path(setting, posterior, kappa, _path_term)
    return total + _mean_over_path(setting, posterior, kappa_end, _last_term)


def _mean_over_path(setting, posterior, kappa, term):
    p_SLV = posterior(setting, kappa)
    probability_NS = given_text(setting, kappa)
    result = np.zeros(len(TEXTS))
    for n, text in enumerate(TEXTS):
        for s, state in enumerate(setting.states):
            if probability_NS[n, s] > 0:
                values = [term(setting, p_SLV[s, i], state[i], text[i]) for i in range(L)]
                result[n] += probability_NS[n, s] * sum(values)
    return result


def _path_term(setting, p, z, x1):
    """sum over y != z of [q ln(q/p) - q + p], for q = 1{y = x1} or no jump at all, and g = 1."""
    if setting.source == "mask" and setting.revealed == "stay" and z != MASK:
        return 0.0
    total = 0.0
    for y in range(len(p)):
        if y != z:
            total += (-math.log(p[y]) - 1 if y == x1 else 0.0) + p[y]
    return total


def _last_term(setting, p, z, x1):
    if setting.source == "uniform":
        return -math.log(p[x1])
    return -math.log(p[x1] / p[:MASK].sum()) if z == MASK else 0.0


def chain_nll(setting, posterior, eps=EPS, steps=2500):
    """-ln of the probability that the sampler draws each text: many small jumps, the last of eps.

    The steps are equal in s = -ln(1 - kappa), over which the rate is 1.
    """
    states, size = setting.states, setting.vocab_size
    h = -math.log(1 - _kappa(setting.schedule, 1 - eps)) / steps
    shown_SL = (states != MASK) & (setting.source == "mask")
    stays_SLV = np.eye(size)[states]
    distribution = np.prod(setting.noise[states], axis=-1)
    for step in range(steps):
        p_SLV = posterior(setting, 1 - math.exp(-h * (step + 0.5)))
        off_SL1 = 1 - np.take_along_axis(p_SLV, states[..., None], axis=-1)
        moves_SL1 = -np.expm1(-h * off_SL1)
        others_SLV = p_SLV * (1 - stays_SLV) / np.maximum(off_SL1, 1e-300)
        kernel_SLV = moves_SL1 * others_SLV + (1 - moves_SL1) * stays_SLV
        if setting.revealed == "stay":
            kernel_SLV = np.where(shown_SL[..., None], stays_SLV, kernel_SLV)
        distribution = _move(distribution, kernel_SLV)
    p_SLV = posterior(setting, _kappa(setting.schedule, 1 - eps))
    if setting.source == "mask":
        tokens_SLV = p_SLV * (np.arange(size) != MASK)
        tokens_SLV /= tokens_SLV.sum(-1, keepdims=True)
        p_SLV = np.where(shown_SL[..., None], stays_SLV, tokens_SLV)
    distribution = _move(distribution, p_SLV).reshape((size,) * L)
    return -np.log(distribution[tuple(TEXTS.T)])


def _move(distribution, kernel_SLV):
    a, b, c = (kernel_SLV[:, i] for i in range(L))
    return np.einsum("s,sa,sb,sc->abc", distribution, a, b, c, optimize=True).ravel()


# ------------------------------------------------------------------------------ the derivation


def near_posterior(setting, kappa):
    return 0.9 * exact_posterior(setting, kappa) + 0.1 * random_posterior(setting, kappa)


@pytest.mark.parametrize("posterior", [random_posterior, near_posterior])
@pytest.mark.parametrize("setting", [UNIFORM, STAY, JUMP, SETTINGS[3]], ids=str)
def test_the_bound_lies_above_the_likelihood_of_the_sampler(setting, posterior):
    """For networks that are wrong everywhere; the steps of the chain err by about 1 / 2500."""
    nll = chain_nll(setting, posterior)
    assert np.exp(-nll).sum() <= 1 + 1e-9
    assert np.all(exact_bound(setting, posterior) > nll - 2e-3)


def test_what_counts_depends_on_the_sampler():
    """Leaving out revealed tokens gives no bound if they may jump."""
    nll = chain_nll(JUMP, near_posterior)
    assert np.max(nll - exact_bound(STAY, near_posterior)) > 0.2


def test_the_last_term_makes_it_a_bound():
    """With a wide last step, that step determines most of the likelihood."""
    for setting in (UNIFORM, STAY, JUMP):
        nll = chain_nll(setting, random_posterior, eps=0.6)
        whole = exact_bound(setting, random_posterior, eps=0.6)
        last = _mean_over_path(setting, random_posterior, 0.4, _last_term)
        assert np.all(whole > nll - 2e-3)
        assert np.any(whole - last < nll)


def test_the_exact_posterior_attains_the_entropy():
    """Of masks: the only gap is two positions being drawn apart in the last step, O(eps^2).

    Where they are shown, "jump" charges for what the posterior never does: nothing. With uniform
    noise the path knows more than its state (a token that jumped is a token of the text), so that
    no chain follows it exactly and the bound stays above the entropy.
    """
    for setting in (STAY, JUMP):
        gaps = [
            DATA @ exact_bound(setting, exact_posterior, eps=eps) - ENTROPY for eps in (0.05, 0.005)
        ]
        assert 0 < gaps[0] < L * 0.05**2
        assert 0 < gaps[1] < L * 0.005**2
    uniform = DATA @ exact_bound(UNIFORM, exact_posterior, eps=0.005)
    assert uniform > ENTROPY + 0.05


# ------------------------------------------------------------------------------- the estimator


def _text(repeats):
    """Every text in proportion to the data, times `repeats`: [N, L], and the index of each."""
    which_N = np.repeat(np.arange(len(TEXTS)), COUNTS * repeats)
    which_N = np.random.default_rng(2).permutation(which_N)
    return TEXTS[which_N], which_N


@pytest.mark.parametrize("network", ["random", "exact"])
@each_setting
def test_estimate_is_unbiased_for_each_text(setting, network):
    """Mean of many estimates of one text against enumeration, 5 standard errors.

    eps is large, so that no single draw of weight 1 / (1 - kappa) <= 1 / eps outweighs hundreds of
    others and the standard error of the estimates themselves can be trusted.
    """
    denoise, posterior = {
        "random": (random_network, random_posterior),
        "exact": (exact_network, exact_posterior),
    }[network]
    expected = exact_bound(setting, posterior, eps=0.2)
    x1_NL, which_N = _text(repeats=max(1, 6000 // COUNTS.sum()))
    values = bound.estimate(
        denoise(setting), setting.process, x1_NL, time_eps=0.2, seed=3, batch_size=4096
    )
    assert values.shape == (len(x1_NL),)
    assert values.dtype == np.float64
    residual = L * values - expected[which_N]
    assert_mean(residual, 0.0)
    for text in np.flatnonzero(COUNTS >= 5):
        assert_mean(residual[which_N == text], 0.0)


@pytest.mark.parametrize("setting", [STAY, JUMP], ids=str)
def test_estimate_of_the_exact_posterior_is_the_entropy(setting):
    """The data set holds each text exactly in proportion, and eps is the default 1e-3.

    The spread between texts is no error, so that the standard error is that of what is left about
    each text's own exact bound. The gap of 3 eps^2 is far below it.
    """
    x1_NL, which_N = _text(repeats=max(1, 20_000 // COUNTS.sum()))
    values = L * bound.estimate(
        exact_network(setting), setting.process, x1_NL, seed=0, batch_size=8192
    )
    exact = exact_bound(setting, exact_posterior, eps=1e-3)
    error = np.std(values - exact[which_N]) / math.sqrt(len(values))
    assert error < 0.02
    assert abs(values.mean() - ENTROPY) < 5 * error


def test_strata_are_used_exactly_once():
    shares = bound._strata(4, 6, 10)
    assert shares.shape == (6, 10)
    np.testing.assert_array_equal(np.sort((shares * 60).astype(int).ravel()), np.arange(60))
    # One of each sample in each tenth, and not the same stratum of each.
    np.testing.assert_array_equal((shares * 10).astype(int), np.tile(np.arange(10), (6, 1)))
    within = (shares * 60).astype(int) % 6
    assert all(len(set(row)) > 1 for row in within)
    # Each sample is as likely in each stratum: chi-square of 10,000 draws over 6, 5 degrees.
    many = (bound._strata(5, 6, 10_000) * 60_000).astype(int) % 6
    for row in many:
        counts = np.bincount(row, minlength=6)
        assert np.sum((counts - 10_000 / 6) ** 2) / (10_000 / 6) < 36


def _count_rows(counts, x_BL, t_B):
    jax.debug.callback(lambda t: counts.append(np.asarray(t)), t_B)
    return jnp.zeros((*x_BL.shape, TOKENS))


@pytest.mark.parametrize(("num_samples", "num_times", "parts"), [(3, 64, 22), (5, 10, 8)])
def test_times_of_a_data_set(num_samples, num_times, parts):
    """The network sees every stratum once, the end once a sample, and a filled-up last batch."""
    seen = []
    process = Process(schedules.Polynomial(), Source(TOKENS), 0)
    bound.estimate(
        jax.tree_util.Partial(functools.partial(_count_rows, seen)),
        process,
        TEXTS[:num_samples],
        num_times=num_times,
        time_eps=0.25,
        seed=0,
        batch_size=7,
    )
    jax.effects_barrier()
    rows = num_samples * (parts + 1)
    assert {len(t) for t in seen} == {7}
    assert len(seen) == -(-rows // 7)
    times = np.sort(np.concatenate(seen))
    at_end = times == np.float32(0.75)
    assert num_samples <= at_end.sum() < num_samples + 7
    strata = (times[~at_end] / 0.75 * num_samples * parts).astype(int)
    np.testing.assert_array_equal(strata, np.arange(num_samples * parts))


def test_batch_size_and_order_do_not_matter():
    settings = {"num_times": 64, "seed": 1}
    network = random_network(STAY)
    x1_NL = TEXTS[4:9]
    one = bound.estimate(network, STAY.process, x1_NL, batch_size=7, **settings)
    for batch_size in (1, 200):
        again = bound.estimate(network, STAY.process, x1_NL, batch_size=batch_size, **settings)
        np.testing.assert_allclose(again, one, rtol=2e-6)
    other = bound.estimate(network, STAY.process, x1_NL, batch_size=7, num_times=64, seed=2)
    assert np.all(other != one)
    assert (
        len(
            np.unique(
                bound.estimate(network, STAY.process, x1_NL[[0] * 4], **settings, batch_size=8)
            )
        )
        == 4
    )


def test_one_program_for_all_batches_and_seeds():
    setting = Setting("mask", schedule=schedules.Polynomial(3.0))  # of this test alone
    network = random_network(setting)
    for seed, num_samples in ((0, 5), (1, 9)):
        bound.estimate(
            network, setting.process, TEXTS[:num_samples], seed=seed, batch_size=16, num_times=9
        )
    assert bound._program(setting.process, 1e-3)._cache_size() == 1


def test_progress_adds_up():
    """Nine rows of each of five samples, in batches of seven, with progress in tenths."""
    told = []
    settings = {"num_times": 10, "seed": 0, "batch_size": 7, "progress": told.append}
    bound.estimate(random_network(STAY), STAY.process, TEXTS[:5], **settings)
    assert told == [1, 2, 1, 2, 1, 2, 1]


# -------------------------------------------------------------------------------- real networks


def _model(vocab_size, **changes):
    model = ModelConfig(
        vocab_size=vocab_size, width=16, num_blocks=1, num_heads=2, cond_width=4, **changes
    )
    return jax.jit(model_lib.init_params, static_argnums=1)(jax.random.key(0), model), model


V = 7


@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_a_fresh_network_by_hand(source):
    """A head of zeros gives 1/V everywhere, which needs no enumeration."""
    params, model = _model(V)
    mask_id = V - 1 if source == "mask" else None
    process = Process(schedules.Polynomial(), Source(V, mask_id=mask_id), 0)
    x1_NL = np.random.default_rng(0).integers(0, V - 1, size=(200, 12))
    values = bound.nats_per_token(
        params, model, process, x1_NL, time_eps=0.1, seed=0, batch_size=128
    )
    hidden, kappa = math.log(V) - 1 / V, 0.9
    if source == "mask":
        expected = hidden * kappa + (1 - kappa) * math.log(V - 1)
    else:
        shown = 1 - 1 / V
        wrong = shown * hidden * kappa
        right = shown * (-math.log(1 - kappa) - kappa + kappa / V)
        expected = wrong + right + math.log(V)
    assert_mean(values, expected)


def test_logits_written_down_or_not():
    rng = np.random.default_rng(0)
    x1_NL = rng.integers(0, 300, size=(3, 64))
    process = Process(schedules.Cosine(), Source(301, mask_id=300), 0, "jump")
    results = []
    for logits_mib in (0, 1):  # of 16 x 64 x 301 entries a quarter MiB at once: several chunks
        params, model = _model(301, logits_mib=logits_mib)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(
                np.random.default_rng(leaf.size).normal(size=leaf.shape) * 0.3
            ).astype(leaf.dtype),
            params,
        )
        results.append(
            bound.nats_per_token(params, model, process, x1_NL, num_times=24, seed=0, batch_size=16)
        )
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)
    assert np.ptp(results[0]) > 1e-3


# ------------------------------------------------------------------------------------ refusals

PROCESS = Process(schedules.Polynomial(), Source(V, mask_id=V - 1), 0)
MODEL = ModelConfig(vocab_size=V, width=16, num_blocks=1, num_heads=2, cond_width=4)
GIVEN = {"seed": 0, "batch_size": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioning": "additive"}, "conditioning='additive'.* no valid bound"),
        ({"conditioning": "official"}, "conditioning='official'.* no valid bound"),
        ({"causal": True}, "exact log-likelihood"),
    ],
)
def test_networks_without_a_bound(changes, message):
    model = dataclasses.replace(MODEL, **changes)
    with pytest.raises(ValueError, match=message):
        bound.nats_per_token({}, model, PROCESS, np.zeros((2, 3), np.int32), **GIVEN)


def test_another_process():
    model = dataclasses.replace(MODEL, vocab_size=V + 1)
    with pytest.raises(ValueError, match="has 8 tokens, but the process has 7"):
        bound.nats_per_token({}, model, PROCESS, np.zeros((2, 3), np.int32), **GIVEN)


@pytest.mark.parametrize(
    ("x1_NL", "changes", "message"),
    [
        (np.zeros(3, np.int32), {}, r"token ids \[N, L\].*int32 \(3,\)"),
        (np.zeros((0, 3), np.int32), {}, "N, L >= 1"),
        (np.zeros((2, 3)), {}, "float64"),
        (np.full((2, 3), V - 1), {}, "and not the mask"),
        (np.full((2, 3), V), {}, "got ids from 7 to 7"),
        (np.full((2, 3), -1), {}, "got ids from -1"),
        (np.zeros((2, 3), np.int32), {"num_times": 0}, "num_times must be at least 1"),
        (np.zeros((2, 3), np.int32), {"batch_size": 0}, "batch_size must be at least 1"),
        (np.zeros((2, 3), np.int32), {"time_eps": 0.0}, "time_eps must be in"),
        (np.zeros((2, 3), np.int32), {"time_eps": 1.0}, "time_eps must be in"),
    ],
)
def test_arguments_that_are_refused(x1_NL, changes, message):
    with pytest.raises(ValueError, match=message):
        bound.nats_per_token({}, MODEL, PROCESS, x1_NL, **(GIVEN | changes))
