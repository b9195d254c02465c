"""Tasks: the given positions, and the stretches of text that are scored."""

import numpy as np
import pytest
import tokenizers

from fsdfm_jax.data import tokenizer
from fsdfm_jax.evaluate import tasks

TOKENIZER = tokenizer.train_bpe(["the people of the united states"] * 9, 260)


def _frozen(name, num_samples=50, length=40):
    return tasks.parse(name).frozen(num_samples, length)


def test_nothing_and_a_prefix():
    assert not _frozen("unconditional").any()
    frozen_NL = _frozen("prefix:7")
    assert frozen_NL[:, :7].all()
    assert not frozen_NL[:, 7:].any()
    assert tasks.parse("prefix:512").frozen(1, 1024).sum() == 512


def test_a_continuation_is_given_what_the_paper_gives():
    task = tasks.parse("continuation")
    assert (task.name, task.left_to_right) == ("continuation", True)
    np.testing.assert_array_equal(task.frozen(3, 1024), _frozen("prefix:512", 3, 1024))
    np.testing.assert_array_equal(task.frozen(2, 1024).sum(1), [512, 512])
    with pytest.raises(ValueError, match="continuation gives 512 tokens, .* blocks of 512"):
        task.frozen(1, 512)


def test_a_share_is_exact_in_each_sample_and_elsewhere_in_each():
    frozen_NL = _frozen("random:0.25")
    assert (frozen_NL.sum(1) == 10).all()
    assert len({tuple(row) for row in frozen_NL}) == 50
    # 50 draws of a quarter: every position is given now and then
    assert frozen_NL.any(0).all()
    assert (_frozen("random:0.001").sum(1) == 1).all()
    assert (_frozen("random:0.999").sum(1) == 39).all()


@pytest.mark.parametrize(("count", "size", "length"), [(3, 4, 40), (1, 40, 40), (4, 1, 7)])
def test_gaps_are_as_many_and_as_long_as_asked_for(count, size, length):
    frozen_NL = _frozen(f"infill:{count}x{size}", length=length)
    for frozen_L in frozen_NL:
        edges = np.flatnonzero(np.diff(np.pad(~frozen_L, 1).astype(int)))
        sizes = edges[1::2] - edges[::2]
        assert sizes.tolist() == [size] * count
    if (count, size, length) == (3, 4, 40):
        assert (~frozen_NL).any(0).all()  # a gap may stand anywhere, the ends included


@pytest.mark.parametrize("name", ["prefix:5", "random:0.5", "infill:2x3"])
def test_what_is_given_depends_on_the_number_of_the_sample_alone(name):
    np.testing.assert_array_equal(_frozen(name, 9), _frozen(name, 50)[:9])
    np.testing.assert_array_equal(_frozen(name), _frozen(name))


def test_only_what_stands_at_the_head_can_be_done_from_left_to_right():
    names = ("unconditional", "prefix:5", "random:0.5", "infill:2x3")
    assert [tasks.parse(name).left_to_right for name in names] == [True, True, False, False]


NO_TASKS = """
    prefix prefix:0 prefix:x random:0 random:1 random: infill:3 infill:0x3 infill:3x0 infill:axb
    suffix:3 unconditional:3 continuation:512 continuation:
"""


@pytest.mark.parametrize("name", ["", *NO_TASKS.split()])
def test_unknown_tasks_are_refused(name):
    with pytest.raises(ValueError, match="Unknown task"):
        tasks.parse(name)


@pytest.mark.parametrize("name", ["prefix:40", "infill:4x10", "infill:2x20"])
def test_tasks_without_room_are_refused(name):
    with pytest.raises(ValueError, match="40"):
        _frozen(name)


def test_stretches_that_count():
    ids = TOKENIZER.encode("the people of the united states")
    pieces = [TOKENIZER.decode([i]) for i in ids]
    counted_L = np.arange(len(ids)) % 3 == 1
    (text,) = tasks.texts(np.asarray([ids]), counted_L[None], TOKENIZER)
    assert text.text == "the people of the united states"
    kept = [piece for piece, counts in zip(pieces, counted_L, strict=True) if counts]
    assert [text.text[a:b] for a, b in text.spans] == kept
    (whole,) = tasks.texts(np.asarray([ids]), np.ones((1, len(ids)), bool), TOKENIZER)
    assert whole.spans is None


def test_a_character_across_a_boundary_belongs_to_where_it_ends():
    ids = TOKENIZER.encode("a é b")  # é takes two tokens of this tokenizer
    cut = next(i for i in range(len(ids)) if "\ufffd" in TOKENIZER.decode(ids[: i + 1])) + 1
    for first in (True, False):
        counted_L = (np.arange(len(ids)) < cut) == first
        (text,) = tasks.texts(np.asarray([ids]), counted_L[None], TOKENIZER)
        assert text.text == "a é b"
        ((start, end),) = text.spans
        assert text.text[start:end] == ("a " if first else "é b")


def test_the_end_of_a_document_is_no_text():
    ids = [*TOKENIZER.encode("the"), TOKENIZER.eos_id, *TOKENIZER.encode(" people")]
    counted_L = np.asarray([i == TOKENIZER.eos_id for i in ids])
    (text,) = tasks.texts(np.asarray([ids]), counted_L[None], TOKENIZER)
    assert text.text == "the people"
    assert text.spans == ()


def _slow_spans(ids, counted_L, spoken):
    """By its definition: the beginning up to each edge decoded by itself, character by character
    dropped until the text begins so."""
    text = spoken.decode(ids)

    def offset(position):
        head = spoken.decode(ids[:position])
        while not text.startswith(head):
            head = head[:-1]
        return len(head)

    edges = [i for i, each in enumerate(np.diff(np.pad(counted_L, 1).astype(int))) if each]
    spans = [(offset(a), offset(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return text, tuple((a, b) for a, b in spans if a < b)


# Random bytes are mostly broken; whole characters and pieces of them, U+FFFD itself among them.
PIECES = ["é", "日本", "\U0001f600", "\ufffd", "the people", "\ud55c a"]


@pytest.mark.parametrize("seed", range(40))
def test_one_pass_finds_what_decoding_every_beginning_finds(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    if seed % 2:
        ids = rng.integers(TOKENIZER.vocab_size, size=80)
    else:
        words = [TOKENIZER.encode(PIECES[i]) for i in rng.integers(len(PIECES), size=30)]
        # Some bytes of them are lost, and here and there a document ends.
        kept = [i for word in words for i in word if rng.random() < 0.9]
        ids = np.asarray([TOKENIZER.eos_id if rng.random() < 0.05 else i for i in kept])
    decoded, decode = [], TOKENIZER.decode

    def counting(ids):
        decoded.append(ids)
        return decode(ids)

    for share in (0.5, 0.1, 0.9):
        counted_L = rng.random(len(ids)) < share
        expected = _slow_spans(ids.tolist(), counted_L, TOKENIZER)
        with monkeypatch.context() as patched:
            patched.setattr(TOKENIZER, "decode", counting)
            (text,) = tasks.texts(ids[None], counted_L[None], TOKENIZER)
        assert text == expected
        if share == 0.5:
            assert len(expected[1]) > 5
    assert len(decoded) == 3  # once a text, however many edges it has


def test_offsets_where_a_character_is_never_finished():
    text = "a\ufffdb"
    pieces = [b"a\xe6", b"\x97", b"b"]
    assert b"".join(pieces).decode("utf-8", "replace") == text
    # It belongs to where it begins, being in the text.
    assert tasks._offsets(text, pieces) == [0, 2, 2, 3]
    # Two bytes that begin no character are two of them, as soon as the second one is there.
    pieces = [b"\xed", b"\xb4", b"b"]
    assert b"".join(pieces).decode("utf-8", "replace") == "\ufffd\ufffdb"
    assert tasks._offsets("\ufffd\ufffdb", pieces) == [0, 1, 2, 3]
    assert tasks._offsets("a日b", [b"a\xe6", b"\x97", b"\xa5b"]) == [0, 1, 1, 3]


def test_a_vocabulary_without_bytes_is_decoded_beginning_by_beginning():
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "bc": 2, "</s>": 3}, unk_token="[UNK]")
    )
    words = tokenizer.Tokenizer(backend)
    ids, counted_L = np.asarray([1, 2, 3, 2, 1]), np.asarray([0, 1, 1, 0, 1], bool)
    (text,) = tasks.texts(ids[None], counted_L[None], words)
    assert text == _slow_spans(ids.tolist(), counted_L, words)
    assert text.text == "a bc bc a"
    assert [text.text[a:b] for a, b in text.spans] == [" bc", " a"]
