"""Draws that heed their neighbours: counts, tables, and draws against their exact distribution."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from chance import assert_frequencies

from fsdfm_jax.flow import jumps, sampler
from fsdfm_jax.flow.schedules import Polynomial
from fsdfm_jax.flow.sources import Source
from fsdfm_jax.inference import neighbours, ngrams
from fsdfm_jax.inference.neighbours import Neighbours
from fsdfm_jax.inference.ngrams import Counts, Table
from fsdfm_jax.ops import categorical
from fsdfm_jax.ops.logits import Factored, dense, rows

L, V = 3, 3
TEXTS = np.asarray(list(itertools.product(range(V), repeat=L)))


# In what is compared to, contexts are tuples of tokens, and what follows them dictionaries.
def _ordered(contexts):
    """Contexts as in `Counts`."""
    return sorted(contexts, key=lambda context: (len(context), context))


def _keys(contexts, vocab_size):
    """`Counts.keys_N`."""
    row = {context: index for index, context in enumerate(_ordered(contexts))}
    return np.int32([row[c[:-1]] * vocab_size + c[-1] for c in _ordered(contexts) if len(c) > 1])


def _shorter(contexts):
    """`Table.shorter_C`: the first token dropped, and more where the rest is no context."""
    row = {context: index for index, context in enumerate(_ordered(contexts))}
    suffixes = lambda context: (context[first:] for first in range(1, len(context)))
    return np.int32([next((row[s] for s in suffixes(c) if s in row), -1) for c in row])


# --------------------------------------------------------------------------------------- the counts
class Text(list):
    """Blocks that remember which of them were read."""

    def __init__(self, blocks):
        super().__init__(blocks)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def _blocks(lengths, seed=0):
    """Blocks of ids below 4, some of them more frequent than others."""
    rng = np.random.default_rng(seed)
    return Text(rng.choice(4, size=n, p=[0.5, 0.3, 0.1, 0.1]).astype(np.uint16) for n in lengths)


def _followed(blocks):
    """{context: how often each token follows it}, by a loop over blocks."""
    follow = collections.defaultdict(collections.Counter)
    for block in blocks:
        tokens = np.asarray(block).tolist()
        for size in (1, 2, 3):
            for start in range(len(tokens) - size):
                follow[tuple(tokens[start : start + size])][tokens[start + size]] += 1
    return follow


def _taken(follow, vocab_size, most=0, least=1):
    """That of all contexts of one token and of the longer ones that `count` takes."""
    often = lambda context: follow[context].total()
    longer = [context for context in follow if len(context) > 1 and often(context) >= least]
    longer.sort(key=lambda context: (-often(context), len(context), context))
    return {c: follow[c] for c in [*((v,) for v in range(vocab_size)), *longer[:most]]}


def _counts(follow, vocab_size):
    contexts = _ordered(follow)
    pairs = [(token, follow[c][token]) for c in contexts for token in sorted(follow[c])]
    tokens, times = np.int32(pairs).reshape(-1, 2).T
    sizes_C = np.int32([len(follow[context]) for context in contexts])
    return Counts(_keys(contexts, vocab_size), sizes_C, tokens, times)


def _assert_same(found, wanted):
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, two, strict=True)


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("most", [0, 1, 9, 20, 1000])
@pytest.mark.parametrize(
    "lengths",
    [(30, 3, 0, 50, 1, 2, 4, 17), (1, 0, 2, 1), (1,), (0, 0), ()],
    ids=["blocks", "short", "one token", "empty", "no block"],
)
def test_counts_are_those_of_a_loop_over_blocks(monkeypatch, lengths, most, least):
    monkeypatch.setattr(ngrams, "_MOST_ENTRIES", most * 6 + 5)
    monkeypatch.setattr(ngrams, "_LEAST_SEEN", least)
    blocks = _blocks(lengths)
    found = ngrams.count(blocks, 6)  # two ids more than the text has
    follow = _followed(list(blocks))
    wanted = _taken(follow, 6, most, least)
    _assert_same(found, _counts(wanted, 6))
    ngrams.check_counts(found, 6)
    longer = [context for context in wanted if len(context) > 1]
    assert {*(c[1:] for c in longer), *(c[:-1] for c in longer)} <= {*wanted}
    if sum(lengths) > 100:
        # Some of both lengths where more than one is taken, and not all of them where few are.
        assert {*map(len, longer)} == ({2, 3} if most > 1 else {2} if most else set())
        everything = sum(len(context) > 1 for context in follow)
        assert len(longer) < everything or (most, least) == (1000, 1)


def test_contexts_are_as_frequent_and_as_many_as_promised():
    enough, too_few = [np.int32([0, 1, 2])] * 32, [np.int32([3, 1, 2])] * 31
    assert ngrams.count([*enough, *too_few], 4).keys_N.tolist() == [1]  # (0, 1) alone
    # Here all are as frequent: then those of two tokens are taken first, of which there are 1498.
    for vocab_size, most in ((8192, 1024), (4096, 2048)):
        keys_N = ngrams.count([np.arange(1500)] * 32, vocab_size).keys_N
        assert len(keys_N) == most
        assert np.sum(keys_N < vocab_size**2) == min(most, 1498)


@pytest.mark.parametrize(("most", "read"), [(100, range(7)), (3, [0, 3, 6]), (1, [0])])
def test_blocks_are_read_spread_evenly(monkeypatch, most, read):
    monkeypatch.setattr(ngrams, "_MOST_BLOCKS", most)
    text = _blocks([20] * 7)
    found = ngrams.count(text, 6)
    assert text.read == list(read)
    _assert_same(found, _counts(_taken(_followed([list(text)[i] for i in read]), 6, 9, 32), 6))


def test_no_more_blocks_are_read_than_change_the_table():
    class Long:
        def __len__(self):
            return 10**9

        def __getitem__(self, index):
            asked.append(index)
            return np.zeros(2, np.int32)

    asked = []
    assert ngrams.count(Long(), 1).counts_Z.tolist() == [len(asked)] == [2**15]
    assert (asked[0], asked[-1]) == (0, 10**9 - 1)
    assert np.ptp(np.diff(asked)) <= 1


@pytest.mark.parametrize("wrong", [-1, 7])
def test_ids_outside_of_the_vocabulary_are_refused(wrong):
    blocks = [np.int32([1, 2, 3]), np.int32([4, wrong, 5])]
    with pytest.raises(ValueError, match=rf"Token ids must lie in \[0, 7\), got {wrong}\."):
        ngrams.count(blocks, 7)


def test_a_vocabulary_without_a_table_is_refused_before_any_text_is_read():
    ngrams.check_vocab(8192)
    text = _blocks([20] * 2)
    for refuse in (ngrams.check_vocab, functools.partial(ngrams.count, text)):
        with pytest.raises(ValueError, match="table of 8193 x 8193 tokens.*up to 8192 only"):
            refuse(8193)
    assert not text.read


# Of 0110 and 0111, V=3: contexts 0, 1, 2, 01, 11, 011.
SMALL = Counts(
    keys_N=np.int32([1, 4, 10]),
    sizes_C=np.int32([1, 2, 0, 1, 2, 2]),
    tokens_Z=np.int32([1, 0, 1, 1, 0, 1, 0, 1]),
    counts_Z=np.int32([2, 1, 3, 2, 1, 1, 1, 1]),
)


def test_counts_written_out_by_hand(monkeypatch):
    monkeypatch.setattr(ngrams, "_LEAST_SEEN", 1)
    _assert_same(ngrams.count([[0, 1, 1, 0], [0, 1, 1, 1]], 3), SMALL)
    ngrams.check_counts(SMALL, 3)


@pytest.mark.parametrize(
    ("message", "damage"),
    [
        ("four arrays of int32", {"counts_Z": SMALL.counts_Z.astype(np.int64)}),
        ("four arrays of int32", {"keys_N": np.float32([1, 4, 10])}),
        ("four arrays of int32 in one dimension", {"keys_N": SMALL.keys_N[None]}),
        (r"sizes of 3 \+ 3 contexts, got 5", {"sizes_C": SMALL.sizes_C[:-1]}),
        (r"sizes of 3 \+ 2 contexts, got 6", {"keys_N": SMALL.keys_N[:-1]}),
        ("sizes aren't those of what follows", {"sizes_C": [1, 2, -1, 1, 3, 2]}),
        ("sizes aren't those of what follows", {"sizes_C": [1, 2, 0, 1, 2, 1]}),
        ("sizes aren't those of what follows", {"tokens_Z": SMALL.tokens_Z[:-1]}),
        ("sizes aren't those of what follows", {"counts_Z": SMALL.counts_Z[:-1]}),
        (r"tokens in \[0, 3\)", {"tokens_Z": [1, 0, 1, 1, 0, 1, 0, 3]}),
        (r"tokens in \[0, 3\)", {"tokens_Z": [1, -1, 1, 1, 0, 1, 0, 1]}),
        ("counts of at least 1", {"counts_Z": [2, 1, 3, 2, 1, 1, 0, 1]}),
        ("contexts that something follows", {"sizes_C": [1, 2, 1, 0, 2, 2]}),
        ("what follows a context doesn't increase", {"tokens_Z": [1, 1, 0, 1, 0, 1, 0, 1]}),
        ("what follows a context doesn't increase", {"tokens_Z": [1, 0, 1, 1, 0, 0, 0, 1]}),
        ("don't come after what they begin with", {"keys_N": [4, 1, 10]}),
        ("don't come after what they begin with", {"keys_N": [1, 1, 10]}),
        ("don't come after what they begin with", {"keys_N": [-1, 4, 10]}),
        ("don't come after what they begin with", {"keys_N": [1, 4, 15]}),  # begins with itself
        ("don't come after what they begin with", {"keys_N": [1, 13, 14]}),
        ("up to 3 tokens, got one of 4", {"keys_N": [1, 10, 13]}),  # 01, 011, 0111
    ],
)
def test_damaged_counts_are_refused(message, damage):
    arrays = {name: np.int32(a) if isinstance(a, list) else a for name, a in damage.items()}
    with pytest.raises(ValueError, match=message):
        ngrams.check_counts(SMALL._replace(**arrays), 3)


# ---------------------------------------------------------------------------------------- the table
def test_a_table_of_pairs_written_out_by_hand():
    # The right tokens' shares are (1 + 1/2) / 4 and (2 + 1/2) / 4. Of token 0 a pair was seen
    # twice: it keeps 5/4 of 2, and 3/8 go to the shares; of token 1 one: 1/4 of 1, and 3/4.
    found = ngrams.table(_counts({(0,): {1: 2}, (1,): {0: 1}}, 2), 2)
    share_V = np.float64([0.375, 0.625])
    wanted_VV = [[0.0, 0.625] + 0.375 * share_V, [0.25, 0.0] + 0.75 * share_V]
    np.testing.assert_allclose(found.follow_CV, wanted_VV, rtol=1e-6)
    assert found.follow_CV.dtype == np.float32
    assert (found.keys_N.tolist(), found.shorter_C.tolist()) == ([], [-1, -1])


def test_a_table_with_a_longer_context_written_out_by_hand():
    # Of 010, 010, 011 and 11. After token 1 two tokens were seen twice each: 6/4 of 4 are given
    # up; after 01 two tokens, 2 and 1 times: 6/4 of 3, to the row of token 1.
    follow = {(0,): {1: 3}, (1,): {0: 2, 1: 2}, (0, 1): {0: 2, 1: 1}}
    found = ngrams.table(_counts(follow, 2), 2)
    share_V = np.float64([2.5, 5.5]) / 8
    one_V = [1.25 / 4, 1.25 / 4] + 0.375 * share_V
    wanted_CV = [[0.0, 0.75] + 0.25 * share_V, one_V, [1.25 / 3, 0.25 / 3] + 0.5 * one_V]
    np.testing.assert_allclose(found.follow_CV, wanted_CV, rtol=1e-6)
    assert (found.keys_N.tolist(), found.shorter_C.tolist()) == ([1], [-1, -1, 1])


def _row(follow, context, vocab_size):
    """P(next token | context), float64."""
    if not context:
        seen = [pair for c, after in follow.items() if len(c) == 1 for pair in after.items()]
        times_V = [0.5 + sum(n for token, n in seen if token == v) for v in range(vocab_size)]
        return np.float64(times_V) / sum(times_V)
    shorter_V = _row(follow, context[1:], vocab_size)
    if not follow.get(context):
        return shorter_V
    times_V = np.float64([follow[context].get(v, 0) for v in range(vocab_size)])
    kept_V = np.where(times_V > 0, times_V - 0.75, 0.0)
    return (kept_V + 0.75 * np.sum(times_V > 0) * shorter_V) / times_V.sum()


@pytest.mark.parametrize("gap", [(), [(0, 0)], [(0, 0), (1, 0), (0, 1)]])
def test_a_table_is_smoothed_by_the_shorter_contexts(gap):
    follow = _taken(_followed(list(_blocks([40] * 5))), 6, 40, 3)  # 4 and 5 are in no text
    follow[3,] = {}  # nothing follows 3
    # A file may lack the end of a context: then the next shorter one is taken.
    follow = {c: after for c, after in follow.items() if c not in gap and c[:-1] not in gap}
    counts = _counts(follow, 6)
    ngrams.check_counts(counts, 6)
    contexts = _ordered(follow)
    assert any(c[1:] in gap for c in contexts) == bool(gap)
    assert {*map(len, contexts)} == {1, 2, 3}
    found = ngrams.table(counts, 6)
    wanted_CV = [_row(follow, context, 6) for context in contexts]
    np.testing.assert_allclose(found.follow_CV, wanted_CV, rtol=1e-6)
    assert np.all(found.follow_CV > 0)
    np.testing.assert_allclose(found.follow_CV.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(found.keys_N, counts.keys_N, strict=True)
    np.testing.assert_array_equal(found.shorter_C, _shorter(contexts), strict=True)
    if not gap:
        assert [contexts[at] for at in found.shorter_C[6:]] == [c[1:] for c in contexts[6:]]
    frequency_V = _row(follow, (), 6)
    for token in (3, 4, 5):
        np.testing.assert_allclose(found.follow_CV[token], frequency_V, rtol=1e-6)


def test_no_text_gives_flat_rows():
    found = ngrams.table(ngrams.count([], 4), 4)
    np.testing.assert_allclose(found.follow_CV, np.full((4, 4), 0.25))


# ----------------------------------------------------------------------------------------- one draw
def exact(logits_LV, x_L, drawn_L, given_L, follow, strength, temperature):
    """P(text) of all texts, float64: the formula of the module, position by position.

    logits_LV: divided by the temperature.
    follow: {context: P(next token | it)}.
    """
    normal = lambda w_XV: w_XV / w_XV.sum(axis=-1, keepdims=True)
    weights_LV = np.exp(logits_LV - logits_LV.max(axis=-1, keepdims=True))
    posterior_LV = normal(weights_LV**temperature)
    pairs_VV = np.stack([follow[token,] for token in range(V)])
    power, sure_L = strength / temperature, np.logical_or(drawn_L, given_L)
    p = {(): 1.0}
    for i, token in enumerate(x_L):
        known_V = weights_LV[i]
        if i and sure_L[i - 1]:
            known_V = known_V / (posterior_LV[i - 1] @ pairs_VV) ** power
        if i + 1 < len(x_L) and given_L[i + 1] and not drawn_L[i + 1]:
            expected_V = posterior_LV[i + 1] / (posterior_LV[i] @ pairs_VV)
            ratio_V = pairs_VV[:, x_L[i + 1]] / (pairs_VV @ expected_V)
            known_V = known_V * ratio_V**power
        before, p = p, {}
        for text, p_text in before.items():
            ends = [text[n:] for n in range(max(i - 3, 0), i) if all(sure_L[n:i])]
            found = [follow[end] for end in ends if end in follow]  # the longest one is first
            q_V = normal(known_V * found[0] ** power if found else known_V)
            if not drawn_L[i]:
                q_V = np.arange(V) == token
            p |= {(*text, v): p_text * q_V[v] for v in range(V)}
    return np.asarray([*p.values()])


def _follow(longer=(), vocab_size=V, seed=4):
    """A row for each context of one token and for these longer ones."""
    contexts = [*((v,) for v in range(vocab_size)), *longer]
    rows_CV = np.random.default_rng(seed).dirichlet(np.full(vocab_size, 0.5), size=len(contexts))
    return dict(zip(contexts, rows_CV, strict=True))


def _table(follow):
    follow_CV = np.stack([follow[context] for context in _ordered(follow)])
    keys_N = _keys(follow, follow_CV.shape[1])
    return Table(jnp.float32(follow_CV), jnp.asarray(keys_N), jnp.asarray(_shorter(follow)))


def _logits(length=L, seed=2):
    return np.random.default_rng(seed).normal(size=(length, V))


def _numbers(x_BL):
    """How often each text stands in the rows."""
    length = x_BL.shape[1]
    return np.bincount(np.asarray(x_BL) @ V ** np.arange(length)[::-1], minlength=V**length)


ROWS = 40_000
RUN = jax.jit(neighbours.draw)  # one program for all draws of one shape


def _every(x, dtype):
    return jnp.tile(jnp.asarray(x, dtype)[None], (ROWS, *[1] * np.ndim(x)))


def _draw(
    logits_LV,
    table,
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
            Neighbours(table, jnp.float32(strength)),
            temperature=jnp.float32(temperature),
        )
    )


def _draw_alone(logits_LV):
    """The same noise without neighbours."""
    return np.asarray(categorical.draw(jax.random.key(5), _every(logits_LV, jnp.float32)))


def _assert_drawn_by_the_formula(x_L, drawn_L, given_L, follow, temperature, others):
    """And not by it with `others` in place of what was asked for."""
    logits_LV = _logits(len(x_L)) / temperature
    where = {"x_L": x_L, "drawn_L": drawn_L, "given_L": given_L, "temperature": temperature}
    asked = where | {"follow": follow, "strength": 1.5}
    found = _draw(logits_LV, _table(follow), 1.5, **where)
    wanted = exact(logits_LV, **asked)
    assert_frequencies(_numbers(found), wanted)
    stay_L = ~np.asarray(drawn_L, bool)
    assert np.all(found[:, stay_L] == np.asarray(x_L)[stay_L])
    for other in others:
        assert np.abs(wanted - exact(logits_LV, **asked | other)).sum() > 0.05, other


ALONE = {"strength": 0.0}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    ("drawn_L", "given_L", "others"),
    [
        ((1, 1, 1), (0, 0, 0), [ALONE]),
        ((0, 1, 1), (1, 0, 0), [{"given_L": (0, 0, 0)}]),
        ((1, 1, 0), (0, 0, 1), [{"given_L": (0, 0, 0)}]),
        ((1, 0, 1), (0, 1, 0), [{"given_L": (0, 0, 0)}]),
        ((0, 1, 0), (1, 0, 1), [{"given_L": (1, 0, 0)}, {"given_L": (0, 0, 1)}]),
        ((1, 0, 1), (0, 0, 0), [{"given_L": (0, 1, 0)}]),  # what stands beside it doesn't heed it
        ((0, 1, 0), (0, 0, 1), [ALONE, {"given_L": (1, 0, 1)}]),
        ((1, 1, 1), (0, 1, 1), [ALONE]),  # what is drawn anew isn't heeded before
        ((1, 1, 0), (0, 1, 1), [{"given_L": (0, 0, 0)}]),
    ],
    ids=[
        "all",
        "after a prompt",
        "before a token",
        "around a token",
        "between tokens",
        "a token that stays",
        "one",
        "all anew",
        "one anew before a token",
    ],
)
def test_draws_have_the_distribution_of_the_formula(drawn_L, given_L, others, temperature):
    x_L = (2, 0, 1)
    _assert_drawn_by_the_formula(x_L, drawn_L, given_L, _follow(), temperature, others)


# 202 has an end that is no context.
TWO, THREE = [(0, 0), (0, 1), (1, 2), (2, 0)], [(0, 1, 2), (1, 2, 0), (2, 0, 0), (2, 0, 2)]
LONGER = _follow([*TWO, *THREE], seed=17)
ONLY = {size: {"follow": {c: LONGER[c] for c in LONGER if len(c) <= size}} for size in (1, 2)}


@pytest.mark.parametrize(
    ("x_L", "drawn_L", "given_L", "others"),
    [
        ((0,) * 5, (1, 1, 1, 1, 1), (0,) * 5, [ONLY[1], ONLY[2]]),
        ((2, 0, 1, 2, 0), (0, 0, 0, 0, 1), (1, 1, 1, 1, 0), [ONLY[1], ONLY[2]]),  # 012
        ((2, 0, 1, 2, 0), (0, 0, 0, 0, 1), (1, 0, 1, 1, 0), [ONLY[1]]),  # 12: 0 isn't sure
        ((2, 0, 1, 2, 0), (0, 0, 0, 0, 1), (1, 1, 0, 1, 0), [{"given_L": (1, 1, 1, 1, 0)}]),  # 2
        ((1, 2, 0, 1, 0), (0, 0, 0, 0, 1), (1, 1, 1, 1, 0), [ONLY[1]]),  # 01, after 120
        ((0, 1, 2, 1, 0), (0, 0, 0, 0, 1), (1, 1, 1, 1, 0), [ALONE]),  # 1, after 012
        ((0, 1, 0, 0, 2), (0, 0, 1, 1, 0), (1, 1, 0, 0, 1), [ONLY[1], ONLY[2], ALONE]),
        ((1, 2, 0, 0, 0), (1, 0, 1, 0, 1), (0, 1, 0, 1, 0), [ONLY[1], ONLY[2], ALONE]),
        ((1, 2, 0, 0, 0), (1, 0, 1, 0, 1), (0, 1, 0, 0, 0), [ONLY[1]]),
    ],
    ids=["all", "three", "two", "one", "a shorter one", "the last alone", "inside", "mixed", "gap"],
)
def test_draws_heed_the_longest_context_of_sure_tokens(x_L, drawn_L, given_L, others):
    _assert_drawn_by_the_formula(x_L, drawn_L, given_L, LONGER, 0.8, others)


def test_draws_heed_what_was_counted(monkeypatch):
    monkeypatch.setattr(ngrams, "_MOST_ENTRIES", 12 * V)
    text = [block % V for block in _blocks([40] * 30)]
    table = ngrams.table(ngrams.count(text, V), V)
    counts = _taken(_followed(text), V, 12, 32)
    assert {*map(len, counts)} == {1, 2, 3}
    where = {"x_L": (1, 0, 0, 0, 2), "drawn_L": (0, 1, 1, 1, 0), "given_L": (1, 0, 0, 0, 1)}
    follow = {context: _row(counts, context, V) for context in counts}
    pairs = {context: follow[context] for context in follow if len(context) == 1}
    wanted = exact(_logits(5), *where.values(), follow, 3.0, 1.0)
    assert_frequencies(_numbers(_draw(_logits(5), table, 3.0, **where)), wanted)
    other = exact(_logits(5), *where.values(), pairs, 3.0, 1.0)
    assert np.abs(wanted - other).sum() > 0.05


def test_tokens_that_cannot_be_are_not_drawn():
    logits_LV = _logits()
    logits_LV[:, 1] = -np.inf  # as the mask's is
    wanted = exact(logits_LV, [0] * L, [1] * L, [0] * L, _follow(), 2.0, 1.0)
    assert_frequencies(_numbers(_draw(logits_LV, _table(_follow()), 2.0)), wanted)


@pytest.mark.parametrize(
    ("table", "strength"),
    [("any", 0.0), ("independent", 1.0), ("independent", 3.0)],
)
@pytest.mark.parametrize("given", [False, True])
def test_draws_are_independent_where_there_is_nothing_to_heed(table, strength, given):
    """Then they are those of the same noise without neighbours, token by token."""
    follow = _follow([(0, 1), (1, 2), (0, 1, 2)])
    if table == "independent":
        follow = dict.fromkeys(follow, follow[0,])
    logits_LV = _logits()
    where = {"x_L": (2, 0, 1), "drawn_L": (1, 1, 0), "given_L": (0, 0, 1)} if given else {}
    drawn = L - given
    found_BL, alone_BL = _draw(logits_LV, _table(follow), strength, **where), _draw_alone(logits_LV)
    np.testing.assert_array_equal(found_BL[:, :drawn], alone_BL[:, :drawn])


def test_a_neighbour_that_the_network_knows_adds_nothing():
    logits_LV = _logits()
    logits_LV[:2] = [0.0, 60.0, 0.0]
    alone_BL = _draw_alone(logits_LV)
    np.testing.assert_array_equal(_draw(logits_LV, _table(_follow()), 2.0), alone_BL)
    # Of one that it doesn't know the same token, given, does.
    logits_LV[:2] = 0.0
    where = {"x_L": (1, 1, 0), "drawn_L": (0, 0, 1), "given_L": (1, 1, 0)}
    other_BL = _draw(logits_LV, _table(_follow()), 2.0, **where)
    assert np.mean(other_BL[:, 2] != alone_BL[:, 2]) > 0.1


@pytest.mark.parametrize("given", [0, 1], ids=["left", "right"])
def test_around_a_given_token_a_network_that_knows_frequencies_writes_the_text(given):
    """Two tokens of a stationary chain, of which one is known: the other's conditional."""
    follow_VV = np.random.default_rng(4).dirichlet(np.full(V, 0.4), size=V)
    share_V = np.linalg.matrix_power(follow_VV, 500)[0]
    joint_VV = share_V[:, None] * follow_VV
    for token in range(V):
        wanted_V = joint_VV[token] if given == 0 else joint_VV[:, token]
        x_L, given_L = np.full(2, token), np.arange(2) == given
        found = RUN(
            jax.random.key(8),
            _every(np.log([share_V] * 2), jnp.float32),
            _every(x_L, jnp.int32),
            _every(~given_L, bool),
            _every(given_L, bool),
            Neighbours(tables.pairs(follow_VV), jnp.float32(1.0)),
            temperature=jnp.float32(1.0),
        )
        counts_V = np.bincount(np.asarray(found)[:, 1 - given], minlength=V)
        assert_frequencies(counts_V, wanted_V / wanted_V.sum())


def test_a_neighbour_to_the_right_that_the_network_knows_adds_nothing():
    logits_LV = _logits()
    where = {"x_L": (0, 0, 1), "drawn_L": (0, 1, 0), "given_L": (0, 0, 1)}
    alone_BL = _draw_alone(logits_LV)
    logits_LV[2] = [0.0, 60.0, 0.0]
    found_BL = _draw(logits_LV, _table(_follow()), 2.0, **where)
    np.testing.assert_array_equal(found_BL[:, 1], alone_BL[:, 1])
    logits_LV[2] = 0.0
    found_BL = _draw(logits_LV, _table(_follow()), 2.0, **where)
    assert np.mean(found_BL[:, 1] != alone_BL[:, 1]) > 0.1


def _many(batch=5, length=13, vocab_size=50):
    """(factored logits of small integers, whose products are exact; the other arguments)."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)
    features, kernel, bias = draw(batch, length, 3), draw(3, vocab_size), draw(vocab_size)
    bias = bias.at[vocab_size - 1].set(-jnp.inf)
    given_BL = jnp.asarray(rng.random((batch, length)) < 0.2)
    given_BL = given_BL.at[0].set(False)  # so that nothing stays to the right of anything there
    drawn_BL = jnp.asarray(rng.random((batch, length)) < 0.8) & ~given_BL
    x_BL = jnp.asarray(rng.integers(vocab_size, size=(batch, length)), jnp.int32)
    two = [pair for pair in itertools.product(range(vocab_size), repeat=2) if sum(pair) % 2]
    heeded = Neighbours(_table(_follow(two, vocab_size)), 1.5)
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
HEEDED = _follow([(0, 1), (1, 0), (1, 1)], seed=3)
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
    begun = np.asarray(x0_BL) @ V ** np.arange(L)[::-1]
    p_X = np.bincount(begun, minlength=len(TEXTS)) / len(begun)
    for step, (t, h) in enumerate(zip(GRID[:-1], np.diff(GRID), strict=True)):
        heat = temperature * (1 - cooling * t)
        beta = 1.0 if step == len(GRID) - 2 else h / (1 - t)
        with np.errstate(invalid="ignore"):
            logits = _network(mask_id, np, TEXTS, t, h) / heat

        after_X = np.zeros(len(TEXTS))
        for text in np.flatnonzero(p_X):
            may_L = ~frozen_L & ((TEXTS[text] == mask_id) if mask_id is not None else True)
            for drawn in itertools.product((False, True), repeat=L):
                drawn_L = np.asarray(drawn)
                if np.any(drawn_L & ~may_L):
                    continue
                weight = beta ** drawn_L.sum() * (1 - beta) ** (may_L & ~drawn_L).sum()
                if weight:
                    asked = (logits[text], TEXTS[text], drawn_L, frozen_L, HEEDED)
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
    frozen_L = np.isin(np.arange(L), (0, L - 1)) & frozen
    x0_BL = Source(V, mask_id=mask_id).sample(jax.random.key(1), (number, L))
    x0_BL = jnp.where(frozen_L[None], 1, x0_BL)
    frozen_BL = jnp.tile(jnp.asarray(frozen_L)[None], (number, 1))
    heeded = None
    if strength is not None:
        heeded = Neighbours(_table(HEEDED), jnp.float32(strength))
    how = {"temperature": temperature, "cooling": cooling, "neighbours": heeded}
    x_BL = _sampler(mask_id)(jax.random.key(2), x0_BL, frozen_BL, **how)
    wanted = _exact_end(x0_BL, frozen_L, mask_id, strength or 0.0, temperature, cooling)
    assert_frequencies(_numbers(x_BL), wanted)
    if frozen:
        assert np.all(np.asarray(x_BL)[:, frozen_L] == 1)
    if strength:
        alone = _exact_end(x0_BL, frozen_L, mask_id, 0.0, temperature, cooling)
        assert np.abs(wanted - alone).sum() > 0.1
