"""Both exact tasks in the ordinary data path: documents, tokenizer, blocks."""

import json

import numpy as np
import pytest
from absl import flags

from fsdfm_jax.data import prepared, tokenizer
from fsdfm_jax.exact import __main__ as program
from fsdfm_jax.exact import documents, hmm, hmm_fit, sudoku, sudoku_judge
from fsdfm_jax.inference import prompts

SMALL = {"train": 60, "validation": 12, "puzzles": 4}
PROSE = "the senate and the people of the united states have agreed on a lasting peace. "


def _prepared(folder, block_length, out):
    spec = prepared.DataSpec(
        corpus=str(folder / "train.jsonl"),
        validation=str(folder / "validation.jsonl"),
        text_field="text",
        tokenizer=str(folder / documents.TOKENIZER),
        vocab_size=0,
        block_length=block_length,
        holdout=0.0,
    )
    return prepared.prepare(spec, out)


@pytest.mark.parametrize("name", ["4x4", "6x6", "9x9"])
def test_grids_become_blocks(name, tmp_path):
    counts = SMALL | ({"train": 288} if name == "4x4" else {})
    spec = documents.SudokuSpec(size=name, **counts)
    folder = documents.write(tmp_path / "docs", spec)
    size = sudoku.get_size(name)
    prepared = _prepared(folder, size.block_length, tmp_path / "data")
    for split, count in (("train", spec.train), ("validation", 12)):
        source = prepared.source(split)
        blocks = np.stack([source[i] for i in range(len(source))])
        assert len(blocks) == count
        assert sudoku_judge.validity(size, blocks).valid_N.all()
        lines = (folder / f"{split}.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["text"] for line in lines) == sorted(
            sudoku.to_text(block[:-1]) for block in blocks
        )
    assert sudoku.recognise(prepared.tokenizer.vocabulary, size.block_length) is size
    if name == "4x4":  # every grid equally often
        assert len(np.unique([prepared.source("train")[i] for i in range(288)], axis=0)) == 288


def test_puzzles_are_a_batch_file(tmp_path):
    folder = documents.write(tmp_path / "docs", documents.SudokuSpec(**SMALL))
    size = sudoku.get_size("6x6")
    puzzles = documents.read_puzzles(folder, size)
    assert puzzles.shape == (4, 36)
    tokens = tokenizer.load(folder)
    requests = prompts.read_requests(folder / documents.PUZZLES, tokens, size.block_length)
    for request, puzzle in zip(requests, puzzles, strict=True):
        np.testing.assert_array_equal(request.template.frozen_L[:-1], puzzle >= 0)
        np.testing.assert_array_equal(request.template.given_L[:-1], np.maximum(puzzle, 0))
    (folder / documents.PUZZLES).write_text('{"infill": "[35]"}\n')
    with pytest.raises(ValueError, match="puzzles.jsonl line 1: a 6x6 puzzle has 36 cells, got 35"):
        documents.read_puzzles(folder, size)


def test_other_text_is_not_silently_a_grid():
    tokens = tokenizer.from_json(documents.sudoku_tokenizer(sudoku.get_size("6x6")), "t")
    assert tokens.encode("1236") == [0, 1, 2, 5]
    assert tokens.decode([0, 1, 2, 5, 6]) == "1236"
    for encode in (tokens.encode_batch, tokens.encode_with_offsets):
        with pytest.raises(ValueError, match="'9' is not in the vocabulary of the tokenizer"):
            encode(["1236", "1239"])
    with pytest.raises(ValueError, match="' ' is not in the vocabulary.*7 tokens"):
        tokens.encode("12 x")


def _hmm_spec(tmp_path, **changes):
    (tmp_path / "text.jsonl").write_text(
        "".join(
            json.dumps({"text": PROSE * (2 + i % 5) + "\n\n" + PROSE[i % 9 :] * 2}) + "\n"
            for i in range(200)
        )
    )
    fit = hmm_fit.FitSpec(
        vocab_size=56, num_states=3, max_tokens=20_000, iterations=5, window=50, **changes
    )
    return documents.HmmSpec(corpus=str(tmp_path / "text.jsonl"), fit=fit, train=300, validation=40)


def test_texts_of_a_law_become_blocks_of_its_stream(tmp_path):
    folder = documents.write(tmp_path / "docs", _hmm_spec(tmp_path))
    law = hmm.load(folder / documents.LAW)
    prepared = _prepared(folder, 16, tmp_path / "data")
    assert prepared.tokenizer.vocab_size == law.vocab_size == 56
    assert prepared.tokenizer.eos_id == law.eos_id
    expected = hmm.sample_documents(law, np.random.default_rng([0, 0]), 300)
    stream = np.concatenate([part for d in expected for part in (d, [law.eos_id])])
    blocks = stream[: len(stream) // 16 * 16].reshape(-1, 16)
    assert prepared.manifest["splits"]["train"]["blocks"] == len(blocks)
    source = prepared.source("train")
    found = np.stack([source[i] for i in range(len(source))])
    np.testing.assert_array_equal(np.unique(found, axis=0), np.unique(blocks, axis=0))
    text = law.decode(expected[0])
    assert prepared.tokenizer.decode(expected[0]) == text
    assert prepared.tokenizer.encode(text) == expected[0].tolist() == law.encode(text).tolist()
    facts = json.loads((folder / documents.FACTS).read_text())
    assert facts["found"]["law"] == law.fingerprint


# ----------------------------------------------------------------------- folders that are there


def test_the_same_settings_give_the_same_files_and_nothing_to_do(tmp_path):
    spec = documents.SudokuSpec(**SMALL)
    folders = [documents.write(tmp_path / name, spec) for name in ("one", "two")]
    for path in sorted(folders[0].iterdir()):
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()
    before = (folders[0] / "train.jsonl").stat().st_mtime_ns
    assert documents.write(folders[0], spec) == folders[0]
    assert (folders[0] / "train.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="was made with other settings: seed is 1 but was 0"):
        documents.write(folders[0], documents.SudokuSpec(**SMALL, seed=1))
    other = documents.write(tmp_path / "three", documents.SudokuSpec(**SMALL, seed=1))
    assert (other / "train.jsonl").read_bytes() != (folders[0] / "train.jsonl").read_bytes()


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="has no documents of an exact task"):
        documents.write(tmp_path / "mine", documents.SudokuSpec(**SMALL))


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sudoku, "make_puzzles", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        documents.write(tmp_path / "docs", documents.SudokuSpec(**SMALL))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "5x5"}, "'5x5'; expected one of 4x4, 6x6, 9x9"),
        ({"train": 0}, "train must be at least 1, got 0"),
        ({"size": "4x4", "train": 300}, "a multiple of that, got 300; use 288"),
        ({"givens": 3}, "8 to 35 givens, got 3"),
    ],
)
def test_specs_that_can_not_be_made(values, message):
    with pytest.raises(ValueError, match=message):
        documents.SudokuSpec(**values)


def test_more_states_than_the_text_supports(tmp_path):
    spec = _hmm_spec(tmp_path)
    fit = hmm_fit.FitSpec(vocab_size=56, num_states=128, max_tokens=20_000)
    with pytest.raises(ValueError, match="128 states over 56 tokens.*use at most"):
        documents.write(tmp_path / "docs", documents.HmmSpec(corpus=spec.corpus, fit=fit))


# ---------------------------------------------------------------------------------------- program


def _flags(*arguments):
    values = flags.FlagValues()
    program.define_flags(values)
    values(["program", *arguments])
    return values


def test_flags_make_specs():
    spec = program.make_spec(_flags("--task=sudoku:4x4", "--puzzles=5", "--seed=3"))
    assert spec == documents.SudokuSpec(size="4x4", train=20_160, puzzles=5, seed=3)
    spec = program.make_spec(_flags("--task=sudoku", "--train=10"))
    assert spec == documents.SudokuSpec(train=10)
    spec = program.make_spec(_flags("--task=hmm", "--num_states=32", "--validation=7"))
    assert spec == documents.HmmSpec(fit=hmm_fit.FitSpec(num_states=32), validation=7)
    with pytest.raises(ValueError, match="unknown task 'chess'; expected hmm, or sudoku: with 4x4"):
        program.make_spec(_flags("--task=chess"))
    with pytest.raises(ValueError, match="'5x5'; expected one of"):
        program.make_spec(_flags("--task=sudoku:5x5"))
