"""Write either task as documents, the input of the normal data path.

A folder has

    train.jsonl, validation.jsonl    one document per line, {"text": ..}
    tokenizer.json                   one token per word of the text (WordLevel)
    facts.json                       the settings; written last
    puzzles.jsonl                    Sudoku: puzzles with one solution, a batch file of `generate`
    law.npz                          HMM: the law, see `hmm.load`

A Sudoku document is the digits of a grid. An HMM document is token names separated by spaces, such
as "▁the ▁un it ed". Both encode to exactly the sampled ids. The same settings give the same files:
on every machine for Sudoku, and on machines with the same rounding for an HMM.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from fsdfm_jax.exact import grids, hmm, hmm_fit, sudoku
from fsdfm_jax.exact.hmm import EOS
from fsdfm_jax.exact.hmm_fit import FitSpec

FACTS = "facts.json"
TOKENIZER = "tokenizer.json"
PUZZLES = "puzzles.jsonl"
LAW = "law.npz"
_FORMAT = 1
_GRIDS_AT_ONCE = 100_000


@dataclasses.dataclass(frozen=True)
class SudokuSpec:
    """Settings of a Sudoku folder.

    Attributes:
      size: "4x4", "6x6" or "9x9".
      train: number of training grids. For 4x4 each of the 288 grids occurs equally often, so that
        the data has no sampling error, and `train` must be a multiple of 288. Otherwise they are
        independent and uniform.
      validation: number of independent uniform grids. For 6x6 a fraction train / 28,200,960 of them
        is also in `train`, for 4x4 all are.
      puzzles: number of puzzles with one solution.
      givens: per puzzle; 0 for `sudoku.DEFAULT_GIVENS`.
      seed: of all randomness.
    """

    size: str = "6x6"
    train: int = 200_000
    validation: int = 4_096
    puzzles: int = 1_000
    givens: int = 0
    seed: int = 0

    def __post_init__(self):
        size = sudoku.get_size(self.size)
        if not self.givens:
            object.__setattr__(self, "givens", sudoku.DEFAULT_GIVENS[self.size])
        sudoku.check_num_givens(size, self.givens)
        _check_counts(train=self.train, validation=self.validation, puzzles=self.puzzles)
        if size.n == 4 and self.train % size.num_grids:
            raise ValueError(
                f"4x4 has each of its {size.num_grids} grids equally often: train must be a "
                f"multiple of that, got {self.train}; use {self.train // 288 * 288 or 288}"
            )


@dataclasses.dataclass(frozen=True)
class HmmSpec:
    """Settings of an HMM folder.

    Attributes:
      corpus: text to fit, see `corpus.documents`.
      fit: settings of the fit.
      train, validation: number of documents, about 220 tokens each with the default settings.
      seed: of the samples.
    """

    corpus: str = "sotu"
    fit: FitSpec = dataclasses.field(default_factory=FitSpec)
    train: int = 40_000
    validation: int = 1_000
    seed: int = 0

    def __post_init__(self):
        _check_counts(train=self.train, validation=self.validation)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")


Spec = SudokuSpec | HmmSpec


def write(
    directory: str | os.PathLike, spec: Spec, report: Callable[[str], None] = lambda line: None
) -> pathlib.Path:
    """Make a folder of documents atomically; do nothing if it exists.

    Args:
      directory: the folder.
      spec: its settings.
      report: called with lines of progress.

    Returns:
      The folder.

    Raises:
      ValueError: the folder has other content, or the spec is invalid.
    """
    directory = pathlib.Path(directory).expanduser().resolve()
    wanted = {"format": _FORMAT, "kind": type(spec).__name__, **dataclasses.asdict(spec)}
    if directory.exists():
        _check_same(directory, wanted)
        return directory
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed call
    partial.mkdir(parents=True)
    try:
        found = (
            _write_sudoku(partial, spec, report)
            if isinstance(spec, SudokuSpec)
            else (_write_hmm(partial, spec, report))
        )
        text = json.dumps({**wanted, "found": found}, indent=2) + "\n"
        (partial / FACTS).write_text(text, encoding="utf-8")
        os.rename(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return directory


def _check_same(directory: pathlib.Path, wanted: dict[str, Any]) -> None:
    path = directory / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in wanted if facts.get(key) != wanted[key]]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{directory} exists but has no documents of an exact task ({error}); choose another "
            "folder, or remove this one"
        ) from None
    if different:
        changes = ", ".join(f"{k} is {wanted[k]!r} but was {facts.get(k)!r}" for k in different)
        raise ValueError(
            f"{directory} was made with other settings: {changes}; choose another folder, or "
            "remove this one"
        )


def _write_jsonl(path: pathlib.Path, records: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------------------- Sudoku


def _write_sudoku(directory: pathlib.Path, spec: SudokuSpec, report) -> dict[str, Any]:
    size = sudoku.get_size(spec.size)
    streams = [np.random.default_rng([spec.seed, number]) for number in range(3)]
    for split, count, rng in (
        ("train", spec.train, streams[0]),
        ("validation", spec.validation, streams[1]),
    ):
        report(f"{count} {size.name} grids for {split}")
        balanced = split == "train" and size.n == 4
        parts = [_each_equally(size, rng, count)] if balanced else _sampled(size, rng, count)
        texts = (text for part in parts for text in _texts(part))
        _write_jsonl(directory / f"{split}.jsonl", ({"text": text} for text in texts))
    report(f"{spec.puzzles} puzzles with {spec.givens} givens")
    rng = streams[2]
    solutions = grids.sample(size, rng, spec.puzzles)
    puzzles = sudoku.make_puzzles(size, rng, solutions, spec.givens)
    requests = ({"id": i + 1, "infill": sudoku.to_infill(p)} for i, p in enumerate(puzzles))
    _write_jsonl(directory / PUZZLES, requests)
    (directory / TOKENIZER).write_text(sudoku_tokenizer(size), encoding="utf-8")
    return {"block_length": size.block_length, "num_grids": size.num_grids}


def _sampled(size: sudoku.Sudoku, rng: np.random.Generator, count: int) -> Iterator[np.ndarray]:
    for start in range(0, count, _GRIDS_AT_ONCE):
        yield grids.sample(size, rng, min(_GRIDS_AT_ONCE, count - start))


def _each_equally(size: sudoku.Sudoku, rng: np.random.Generator, count: int) -> np.ndarray:
    known = grids.all_grids(size)
    return rng.permutation(np.tile(known, (count // len(known), 1)), axis=0)


def _texts(cells_NC: np.ndarray) -> list[str]:
    """Convert grids without blank cells to digits."""
    letters = np.frombuffer(b"123456789", np.uint8)[cells_NC]
    return [row.tobytes().decode("ascii") for row in letters]


def read_puzzles(directory: str | os.PathLike, size: sudoku.Sudoku) -> np.ndarray:
    """Read the puzzles of a folder, int8 [N, n²], -1 for blank cells.

    Raises:
      FileNotFoundError: there are none.
      ValueError: naming the first invalid line.
    """
    path = pathlib.Path(directory) / PUZZLES
    puzzles = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            puzzles.append(sudoku.parse_puzzle(size, json.loads(line)["infill"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number}: {error}") from None
    return np.array(puzzles, np.int8).reshape(-1, size.num_cells)


def sudoku_tokenizer(size: sudoku.Sudoku) -> str:
    """Make the tokenizer.json: digit d is id d-1, then end-of-text; no other characters."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {str(digit + 1): digit for digit in range(size.n)} | {EOS: size.eos_id}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([EOS])
    return backend.to_str(pretty=True)


# ---------------------------------------------------------------------------------------------- HMM


def _write_hmm(directory: pathlib.Path, spec: HmmSpec, report) -> dict[str, Any]:
    law = fit_law(spec, report)
    law.save(directory / LAW)
    for number, (split, count) in enumerate(
        (("train", spec.train), ("validation", spec.validation))
    ):
        report(f"{count} documents for {split}")
        documents = hmm.sample_documents(law, np.random.default_rng([spec.seed, number]), count)
        texts = (law.decode(document) for document in documents)
        # The law allows empty documents, with a probability of about 1e-6; skip them.
        _write_jsonl(directory / f"{split}.jsonl", ({"text": text} for text in texts if text))
    (directory / TOKENIZER).write_text(hmm_tokenizer(law), encoding="utf-8")
    return {"law": law.fingerprint, "tokens_per_document": 1 / float(law.initial_K[-1])}


def fit_law(spec: HmmSpec, report: Callable[[str], None] = lambda line: None) -> hmm.Law:
    """Fit the law of a spec to its corpus."""
    from fsdfm_jax.data import corpus

    texts = (document.text for document in corpus.documents(spec.corpus))
    documents = hmm_fit.choose(hmm_fit.paragraphs(texts), spec.fit)
    stream, tokens = hmm_fit.tokenise(documents, spec.fit.vocab_size)
    used = min(len(stream), spec.fit.max_tokens)
    report(f"fitting {spec.fit.num_states} states to {used} tokens of {len(documents)} paragraphs")

    def progress(iteration: int, log_likelihood: float) -> None:
        if iteration % 10 == 0:
            report(f"iteration {iteration}: {-log_likelihood:.4f} nats per token")

    return hmm_fit.fit(stream, tokens, spec.fit, progress)


def hmm_tokenizer(law: hmm.Law) -> str:
    """Make the tokenizer.json: each token of the law is one word; no other words."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    vocabulary = {name: i for i, name in enumerate(law.tokens)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([EOS])
    return backend.to_str(pretty=True)
