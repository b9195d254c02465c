"""Templates: positions of tokens and gaps, literal text, rejected input and its messages."""

import json

import numpy as np
import pytest

from fsdfm_jax.data import tokenizer
from fsdfm_jax.inference import prompts

L = 16
# Merges of whole words, with their spaces, so that a lost or doubled space changes the ids.
TEXTS = ["The state of the Union. The people of the Union and the state."] * 4


@pytest.fixture(scope="module")
def bpe():
    return tokenizer.train_bpe(TEXTS, 280)


def _tokens(template):
    """Given tokens up to what is shown, None in gaps; nothing is given after that."""
    given = [
        int(token) if frozen else None
        for token, frozen in zip(template.given_L, template.frozen_L, strict=True)
    ]
    assert given[template.shown :] == [None] * (len(given) - template.shown)
    assert not template.given_L[~template.frozen_L].any()
    assert template.given_L.dtype == np.int32
    assert template.frozen_L.dtype == bool
    return given[: template.shown]


# ---------------------------------------------------------------------------------------- templates
def test_blank():
    assert _tokens(prompts.blank(L)) == [None] * L


def test_prefix_shows_the_whole_block(bpe):
    template = prompts.prefix("The state of", bpe, L)
    ids = bpe.encode("The state of")
    assert 1 < len(ids) < L
    assert template.shown == L
    assert _tokens(template) == ids + [None] * (L - len(ids))


def test_brackets_of_a_prompt_are_text(bpe):
    assert _tokens(prompts.prefix("a [2]", bpe, L))[: len(bpe.encode("a [2]"))] == bpe.encode(
        "a [2]"
    )


# Text -> its stretches, encoded each on its own, and its gaps.
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("The [3] of the", ["The", 3, " of the"]),
        ("The[3]of", ["The", 3, "of"]),
        ("The   [3]", ["The", 3]),
        ("The\n [3]", ["The\n", 3]),  # a line break is no part of the next word
        ("The\t[3]", ["The\t", 3]),
        ("[2] of the", [2, " of the"]),
        ("[4]", [4]),
        ("[1] [2]", [3]),
        ("of [1][2] the [03]", ["of", 3, " the", 3]),
        (r"of \[8] [2]", ["of [8]", 2]),
        (r"\[1]\[2][1]", ["[1][2]", 1]),
        (r"of [1] \[2]", ["of", 1, " [2]"]),
        (r"\\[2] [1]", [r"\[2]", 1]),
        (r"\[x] [1]", [r"\[x]", 1]),
        ("a [i] [1.5] [-1] [] [ 2 ] [1", None),
        ("a [i] [1] [", ["a [i]", 1, " ["]),
        ("a [[2]]", ["a [", 2, "]"]),
        ("a [٣] [1]", ["a [٣]", 1]),  # digits of other scripts are text
    ],
)
def test_infill(bpe, text, parts):
    if parts is None:
        with pytest.raises(ValueError, match="has no gap"):
            prompts.infill(text, bpe, 64)
        return
    expected = []
    for part in parts:
        expected += [None] * part if isinstance(part, int) else bpe.encode(part)
    template = prompts.infill(text, bpe, 64)
    assert _tokens(template) == expected
    assert template.shown == len(expected)
    assert template.given_L.shape == template.frozen_L.shape == (64,)


def test_infill_may_fill_the_block(bpe):
    assert prompts.infill(f"[{L}]", bpe, L).shown == L
    with pytest.raises(ValueError, match=f"needs {L + 1} tokens, but a block has {L}"):
        prompts.infill(f"[{L + 1}]", bpe, L)


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (prompts.prefix, "", "prompt is empty"),
        (prompts.prefix, "q" * L, "has 16 tokens and fills the length of 16; .*least 17"),
        (prompts.prefix, "q" * 40, "has 40 tokens"),
        (prompts.prefix, "a\ud800", "not Unicode"),
        (prompts.infill, "", "infill text is empty"),
        (prompts.infill, "  \n", "infill text is empty"),
        (prompts.infill, "The Union", "'The Union' has no gap"),
        (prompts.infill, r"The \[3] Union", "has no gap"),
        (prompts.infill, "The [0] Union", r"at least 1 token, got \[0\]"),
        (prompts.infill, "The [2] [00]", r"at least 1 token, got \[00\]"),
        (prompts.infill, "qqqq [8] qqqq", "needs 17 tokens, but a block has 16"),
        (prompts.infill, "[999999999999]", "needs 999999999999 tokens"),  # and never makes them
        (prompts.infill, "a\udfff [1]", "not Unicode"),
    ],
)
def test_texts_that_make_no_template(bpe, make, text, message):
    with pytest.raises(ValueError, match=message):
        make(text, bpe, L)


# -------------------------------------------------------------------------------------- batch files
def _write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_lines_of_json(tmp_path, bpe):
    lines = [
        {"prompt": "The state"},
        {"infill": "The [2]", "id": "gap"},
        {"prompt": "of\u2028the\r", "id": -7},
    ]
    content = "\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    requests = prompts.read_requests(_write(tmp_path / "a.jsonl", content), bpe, L)
    assert [(r.id, r.kind, r.text) for r in requests] == [
        (1, "prompt", "The state"),
        ("gap", "infill", "The [2]"),
        (-7, "prompt", "of\u2028the\r"),
    ]
    assert _tokens(requests[1].template) == _tokens(prompts.infill("The [2]", bpe, L))
    assert _tokens(requests[0].template) == _tokens(prompts.prefix("The state", bpe, L))


def test_lines_of_text(tmp_path, bpe):
    requests = prompts.read_requests(_write(tmp_path / "a.txt", "The [2]\r\n of\n"), bpe, L)
    assert [(r.id, r.kind, r.text) for r in requests] == [
        (1, "prompt", "The [2]"),
        (2, "prompt", " of"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "this isn't JSON"),
        (b'{"prompt": "a"', "this isn't JSON"),
        (b'"a"', "expected .*prompt.*infill"),
        (b"[1]", "expected .*prompt.*infill"),
        (b"{}", "expected .*prompt.*infill"),
        (b'{"id": 3}', "expected .*prompt.*infill"),
        (b'{"prompt": "a", "infill": "[1]"}', "expected either"),
        (b'{"prompt": "a", "promt": "b"}', "unknown key 'promt'"),
        (b'{"prompt": 5}', "'prompt' must be a string, got 5"),
        (b'{"prompt": "a", "id": 1.5}', "'id' must be a string, got 1.5"),
        (b'{"prompt": "a", "id": true}', "'id' must be a string, got True"),
        (b'{"prompt": "a", "id": null}', "'id' must be a string, got None"),
        (b'{"prompt": "a", "id": "x"}', "line 1 has the same id 'x'"),
        (b'{"prompt": "a", "id": 2}', "line 2 has the same id 2"),
        (b'{"infill": "a"}', "has no gap"),
        (b'{"prompt": ""}', "prompt is empty"),
        (b'{"prompt": "\\ud800"}', "not Unicode"),
        (b'{"prompt": "\xff"}', "can't decode"),
        (b'{"prompt": "no"}', "not this one"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path, bpe, line, message):
    def check(template):
        if template.given_L[0] == bpe.encode("no")[0]:
            raise ValueError("not this one")

    good = b'{"prompt": "The", "id": "x"}\n{"prompt": "of"}\n'
    path = _write(tmp_path / "a.jsonl", good + line + b'\n{"prompt": ""}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl line 3: .*{message}"):
        prompts.read_requests(path, bpe, L, check)


def test_blank_lines_are_skipped(tmp_path, bpe):
    requests = prompts.read_requests(_write(tmp_path / "a.txt", "\nThe\n \nof\n\n"), bpe, L)
    assert [(r.id, r.text) for r in requests] == [(2, "The"), (4, "of")]
    path = _write(tmp_path / "a.jsonl", '{"prompt": "The"}\n\n{"prompt": "of"}\n\n')
    assert [r.id for r in prompts.read_requests(path, bpe, L)] == [1, 3]


def test_files_without_prompts(tmp_path, bpe):
    for name in ("a.jsonl", "a.txt"):
        with pytest.raises(ValueError, match="has no prompts"):
            prompts.read_requests(_write(tmp_path / name, ""), bpe, L)
    with pytest.raises(ValueError, match="must be a .jsonl or .txt file"):
        prompts.read_requests(_write(tmp_path / "a.csv", "The\n"), bpe, L)
    with pytest.raises(FileNotFoundError):
        prompts.read_requests(tmp_path / "none.txt", bpe, L)
