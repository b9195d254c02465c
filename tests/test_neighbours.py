"""Draws that heed their left neighbour: the table, and draws against their exact distribution."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chance import assert_frequencies

from fsdfm_jax import draws, jumps, neighbours, sampler
from fsdfm_jax.logits import Factored, dense, rows
from fsdfm_jax.neighbours import Neighbours
from fsdfm_jax.schedules import Polynomial
from fsdfm_jax.sources import Source

L, V = 3, 3
TEXTS = np.asarray(list(itertools.product(range(V), repeat=L)))


# ---------------------------------------------------------------------------------------- the table
class Text(list):
    """Blocks that remember which of them were read."""

    def __init__(self, blocks):
        super().__init__(blocks)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def _blocks(number, vocab_size=7, length=20):
    rng = np.random.default_rng(0)
    return Text(rng.integers(vocab_size, size=(number, length)).astype(np.uint16))


@pytest.mark.parametrize(("most", "read"), [(100, range(7)), (3, [0, 3, 6]), (1, [0])])
def test_counts_are_those_of_a_loop_over_blocks_spread_evenly(monkeypatch, most, read):
    monkeypatch.setattr(neighbours, "_MOST_BLOCKS", most)
    text = _blocks(7)
    found_VV = neighbours.count(text, 9)  # two ids more than the text has
    assert text.read == list(read)
    wanted_VV = np.zeros((9, 9))
    for index in read:
        for left, right in itertools.pairwise(list(text)[index].tolist()):  # not across blocks
            wanted_VV[left, right] += 1
    np.testing.assert_array_equal(found_VV, wanted_VV)
    assert found_VV.dtype == np.float64


def test_no_more_blocks_are_read_than_change_the_table():
    class Long:
        def __len__(self):
            return 10**9

        def __getitem__(self, index):
            asked.append(index)
            return np.zeros(2, np.int32)

    asked = []
    assert neighbours.count(Long(), 1)[0, 0] == len(asked) == 2**15
    assert (asked[0], asked[-1]) == (0, 10**9 - 1)
    assert np.ptp(np.diff(asked)) <= 1


@pytest.mark.parametrize("wrong", [-1, 7])
def test_ids_outside_of_the_vocabulary_are_refused(wrong):
    blocks = [np.int32([1, 2, 3]), np.int32([4, wrong, 5])]
    with pytest.raises(ValueError, match=rf"Token ids must lie in \[0, 7\), got {wrong}\."):
        neighbours.count(blocks, 7)


def test_a_vocabulary_without_a_table_is_refused_before_any_text_is_read():
    neighbours.check_vocab(8192)
    text = _blocks(2)
    for refuse in (neighbours.check_vocab, functools.partial(neighbours.count, text)):
        with pytest.raises(ValueError, match="table of 8193 x 8193 tokens.*up to 8192 only"):
            refuse(8193)
    assert not text.read


def test_a_table_written_out_by_hand():
    # The right tokens' shares are (1 + 1/2) / 4 and (2 + 1/2) / 4. Of token 0 a pair was seen
    # twice: it keeps 5/4 of 2, and 3/8 go to the shares; of token 1 one: 1/4 of 1, and 3/4.
    found_VV = neighbours.follow(np.float64([[0, 2], [1, 0]]))
    share_V = np.float64([0.375, 0.625])
    wanted_VV = [[0.0, 0.625] + 0.375 * share_V, [0.25, 0.0] + 0.75 * share_V]
    np.testing.assert_allclose(found_VV, wanted_VV, rtol=1e-6)
    assert found_VV.dtype == np.float32


def test_a_table_holds_probabilities_above_0():
    counts_VV = neighbours.count(_blocks(5), 9)  # 7 and 8 are in no text
    counts_VV[3] = 0  # nothing follows 3
    follow_VV = neighbours.follow(counts_VV)
    assert np.all(follow_VV > 0)
    np.testing.assert_allclose(follow_VV.sum(axis=1), 1.0, rtol=1e-6)
    frequency_V = counts_VV.sum(axis=0) + 0.5
    for left in (3, 7, 8):
        np.testing.assert_allclose(follow_VV[left], frequency_V / frequency_V.sum(), rtol=1e-6)
    # What was seen more often stands higher in its row.
    left = counts_VV[0]
    assert np.all(np.diff(follow_VV[0][np.argsort(left, kind="stable")][np.sort(left) > 0]) > -0.02)
    assert follow_VV[0].argmax() == left.argmax()


def test_no_text_gives_flat_rows():
    np.testing.assert_allclose(neighbours.follow(np.zeros((4, 4))), np.full((4, 4), 0.25))


# ----------------------------------------------------------------------------------------- one draw
def exact(logits_LV, x_L, drawn_L, given_L, follow_VV, strength, temperature):
    """P(text) of all `TEXTS`, float64: the formula of the module, position by position.

    logits_LV: divided by the temperature.
    """
    normal = lambda w_V: w_V / w_V.sum()
    result = np.ones(len(TEXTS))
    for i in range(len(x_L)):
        own_V = np.exp(logits_LV[i] - logits_LV[i].max())
        for text, row_L in enumerate(TEXTS):
            if not drawn_L[i]:
                result[text] *= row_L[i] == x_L[i]
                continue
            q_V = own_V
            if i and (drawn_L[i - 1] or given_L[i - 1]):
                left_V = normal(np.exp(temperature * (logits_LV[i - 1] - logits_LV[i - 1].max())))
                expected_V = left_V @ follow_VV
                more_V = follow_VV[row_L[i - 1]] / expected_V
                q_V = own_V * more_V ** (strength / temperature)
            result[text] *= normal(q_V)[row_L[i]]
    return result


def _follow(vocab_size=V, seed=1):
    return np.random.default_rng(seed).dirichlet(np.full(vocab_size, 0.5), size=vocab_size)


def _logits(seed=2):
    return np.random.default_rng(seed).normal(size=(L, V))


def _numbers(x_BL):
    """How often each of `TEXTS` stands in the rows."""
    return np.bincount(np.asarray(x_BL) @ V ** np.arange(L)[::-1], minlength=V**L)


ROWS = 40_000
RUN = jax.jit(neighbours.draw)  # one program for all draws of one shape


def _every(x, dtype):
    return jnp.tile(jnp.asarray(x, dtype)[None], (ROWS, *[1] * np.ndim(x)))


def _draw(
    logits_LV,
    follow_VV,
    strength,
    *,
    x_L=(0,) * L,
    drawn_L=(1,) * L,
    given_L=(0,) * L,
    temperature=1.0,
):
    """Many rows of one and the same draw."""
    return np.asarray(
        RUN(
            jax.random.key(5),
            _every(logits_LV, jnp.float32),
            _every(x_L, jnp.int32),
            _every(drawn_L, bool),
            _every(given_L, bool),
            Neighbours(jnp.float32(follow_VV), jnp.float32(strength)),
            temperature=jnp.float32(temperature),
        )
    )


def _draw_alone(logits_LV):
    """The same noise without neighbours."""
    return np.asarray(draws.categorical(jax.random.key(5), _every(logits_LV, jnp.float32)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("drawn_L", "given_L"),
    [
        ((1, 1, 1), (0, 0, 0)),
        ((0, 1, 1), (1, 0, 0)),
        ((1, 0, 1), (0, 1, 0)),
        ((1, 0, 1), (0, 0, 0)),  # it stays, and what stands right of it doesn't heed it
        ((0, 1, 0), (0, 0, 1)),
    ],
    ids=["all", "after a prompt", "around a token", "a token that stays", "one"],
)
def test_draws_have_the_distribution_of_the_formula(drawn_L, given_L, temperature):
    follow_VV, x_L, strength = _follow(), (2, 0, 1), 1.5
    logits_LV = _logits() / temperature
    where = {"x_L": x_L, "drawn_L": drawn_L, "given_L": given_L}
    found = _draw(logits_LV, follow_VV, strength, **where, temperature=temperature)
    asked = (logits_LV, x_L, drawn_L, given_L, follow_VV)
    wanted = exact(*asked, strength, temperature)
    assert_frequencies(_numbers(found), wanted)
    alone = exact(*asked, 0.0, temperature)
    if sum(drawn_L) == 3:
        assert np.abs(wanted - alone).sum() > 0.2  # so that a draw that heeds nothing would show
    stay_L = ~np.asarray(drawn_L, bool)
    assert np.all(found[:, stay_L] == np.asarray(x_L)[stay_L])


def test_tokens_that_cannot_be_are_not_drawn():
    logits_LV = _logits()
    logits_LV[:, 1] = -np.inf  # as the mask's is
    wanted = exact(logits_LV, [0] * L, [1] * L, [0] * L, _follow(), 2.0, 1.0)
    assert_frequencies(_numbers(_draw(logits_LV, _follow(), 2.0)), wanted)


@pytest.mark.parametrize(
    ("table", "strength"),
    [("any", 0.0), ("independent", 1.0), ("independent", 3.0)],
)
def test_draws_are_independent_where_there_is_nothing_to_heed(table, strength):
    """Then they are those of the same noise without neighbours, token by token."""
    follow_VV = _follow()
    if table == "independent":
        follow_VV = np.tile(follow_VV[:1], (V, 1))
    logits_LV = _logits()
    found_BL = _draw(logits_LV, follow_VV, strength)
    np.testing.assert_array_equal(found_BL, _draw_alone(logits_LV))


def test_a_neighbour_that_the_network_knows_adds_nothing():
    logits_LV = _logits()
    logits_LV[:2] = [0.0, 60.0, 0.0]
    alone_BL = _draw_alone(logits_LV)
    np.testing.assert_array_equal(_draw(logits_LV, _follow(), 2.0), alone_BL)
    # Of one that it doesn't know the same token, given, does.
    logits_LV[:2] = 0.0
    where = {"x_L": (1, 1, 0), "drawn_L": (0, 0, 1), "given_L": (1, 1, 0)}
    other_BL = _draw(logits_LV, _follow(), 2.0, **where)
    assert np.mean(other_BL[:, 2] != alone_BL[:, 2]) > 0.1


def _many(batch=5, length=13, vocab_size=50):
    """(factored logits of small integers, whose products are exact; the other arguments)."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)
    features, kernel, bias = draw(batch, length, 3), draw(3, vocab_size), draw(vocab_size)
    bias = bias.at[vocab_size - 1].set(-jnp.inf)
    given_BL = jnp.asarray(rng.random((batch, length)) < 0.2)
    drawn_BL = jnp.asarray(rng.random((batch, length)) < 0.8) & ~given_BL
    x_BL = jnp.asarray(rng.integers(vocab_size, size=(batch, length)), jnp.int32)
    heeded = Neighbours(jnp.float32(_follow(vocab_size)), 1.5)
    return Factored(features, kernel, bias, temperature=2.0), (x_BL, drawn_BL, given_BL), heeded


def test_factored_logits_are_drawn_from_as_if_written_down():
    logits, tokens, heeded = _many()
    want_BL = RUN(jax.random.key(2), dense(logits), *tokens, heeded, temperature=2.0)
    got_BL = RUN(jax.random.key(2), logits, *tokens, heeded, temperature=2.0)
    np.testing.assert_array_equal(got_BL, want_BL)
    x_BL, drawn_BL, _ = map(np.asarray, tokens)
    got_BL = np.asarray(got_BL)
    np.testing.assert_array_equal(got_BL[~drawn_BL], x_BL[~drawn_BL])
    assert np.mean(got_BL[drawn_BL] != x_BL[drawn_BL]) > 0.8
    assert not np.any(got_BL[drawn_BL] == 49)
    # A row doesn't depend on the number of rows.
    for count in (1, 4):
        some = (rows(logits, 0, count), *(x[:count] for x in tokens))
        some_BL = RUN(jax.random.key(2), *some, heeded, temperature=2.0)
        np.testing.assert_array_equal(some_BL, got_BL[:count])


def test_dtype_is_kept():
    logits, (x_BL, *where), heeded = _many()
    small_BL = x_BL.astype(jnp.uint16)
    found = jax.eval_shape(neighbours.draw, jax.random.key(2), logits, small_BL, *where, heeded)
    assert (found.shape, found.dtype) == (x_BL.shape, jnp.uint16)


# ---------------------------------------------------------------------------------------- a sampler
GRID = np.float32([0, 0.25, 0.625, 1])
TABLES = np.random.default_rng(7).normal(size=(3, V, V)) * 1.5


def _network(mask_id, xp, x_BL, t, h):
    """Logits [B, L, V] of a table of the token and the one to its left, of NumPy or JAX."""
    one, two, three = xp.asarray(TABLES, xp.float32 if xp is jnp else xp.float64)
    logits = one[x_BL] + t * two[xp.roll(x_BL, 1, 1)] + h * three[x_BL]
    return (
        logits
        if mask_id is None
        else xp.where((xp.arange(V) == mask_id)[None, None], -xp.inf, logits)
    )


def _exact_end(x0_BL, frozen_L, mask_id, strength, temperature, cooling):
    """P(text) at t=1 of a sampler that redraws each position with probability beta."""
    follow_VV = _follow(seed=3)
    begun = np.asarray(x0_BL) @ V ** np.arange(L)[::-1]
    p_X = np.bincount(begun, minlength=len(TEXTS)) / len(begun)
    for step, (t, h) in enumerate(zip(GRID[:-1], np.diff(GRID), strict=True)):
        heat = temperature * (1 - cooling * t)
        beta = 1.0 if step == len(GRID) - 2 else h / (1 - t)
        with np.errstate(invalid="ignore"):
            logits = _network(mask_id, np, TEXTS, t, h) / heat
        after_X = np.zeros(len(TEXTS))
        for text, x_L in enumerate(TEXTS):
            if p_X[text] == 0:
                continue
            may_L = ~frozen_L & ((x_L == mask_id) if mask_id is not None else True)
            for drawn_L in itertools.product((False, True), repeat=L):
                drawn_L = np.asarray(drawn_L)
                if np.any(drawn_L & ~may_L):
                    continue
                weight = beta ** drawn_L.sum() * (1 - beta) ** (may_L & ~drawn_L).sum()
                if weight:
                    asked = (logits[text], x_L, drawn_L, frozen_L, follow_VV)
                    after_X += p_X[text] * weight * exact(*asked, strength, heat)
        p_X = after_X
    return p_X


@functools.cache
def _sampler(mask_id):
    source = Source(V, mask_id=mask_id)
    parts = (jumps.MIXTURE, Polynomial(), source)

    def denoise(x_BL, t_B, h_B):
        return _network(mask_id, jnp, x_BL, t_B[:, None, None], h_B[:, None, None])

    @jax.jit
    def run(key, x0_BL, frozen_BL, **how):
        if how["neighbours"] is not None:
            how["redraw"] = jumps.make_redraw(*parts, "stay")
        jump, finalize = jumps.make_process_jump(*parts), jumps.make_finalize(source)
        return sampler.sample(key, denoise, jump, finalize, x0_BL, GRID, frozen_BL, **how)

    return run


@pytest.mark.parametrize("strength", [None, 0.0, 1.5])
@pytest.mark.parametrize("frozen", [False, True], ids=["free", "frozen"])
@pytest.mark.parametrize("mask_id", [None, V - 1], ids=["uniform", "mask"])
def test_a_sampler_has_the_exact_distribution_of_its_chain(mask_id, frozen, strength):
    """With a strength of 0, and without neighbours, it is the same: that of the rule `mixture`."""
    temperature, cooling, number = 0.8, 0.5, 30_000
    frozen_L = np.arange(L) == (0 if frozen else L)
    x0_BL = Source(V, mask_id=mask_id).sample(jax.random.key(1), (number, L))
    x0_BL = jnp.where(frozen_L[None], 1, x0_BL)
    frozen_BL = jnp.tile(jnp.asarray(frozen_L)[None], (number, 1))
    heeded = None
    if strength is not None:
        heeded = Neighbours(jnp.float32(_follow(seed=3)), jnp.float32(strength))
    how = {"temperature": temperature, "cooling": cooling, "neighbours": heeded}
    x_BL = _sampler(mask_id)(jax.random.key(2), x0_BL, frozen_BL, **how)
    wanted = _exact_end(x0_BL, frozen_L, mask_id, strength or 0.0, temperature, cooling)
    assert_frequencies(_numbers(x_BL), wanted)
    if frozen:
        assert np.all(np.asarray(x_BL)[:, 0] == 1)
    if strength:
        alone = _exact_end(x0_BL, frozen_L, mask_id, 0.0, temperature, cooling)
        assert np.abs(wanted - alone).sum() > 0.1
