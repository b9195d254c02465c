"""Write one of the exactly judged tasks as documents with a tokenizer.

    python -m fsdfm_jax.exact --task=sudoku:6x6 --directory=runs/data/sudoku_6x6
    python -m fsdfm_jax.exact --task=hmm --directory=runs/data/hmm

The configurations configs/sudoku.py and configs/hmm.py read these folders. An existing folder with
the same settings is not changed.
"""

import functools
import time

from absl import app, flags

from fsdfm_jax import cli
from fsdfm_jax.exact import documents, hmm_fit, sudoku

_FIT, _HMM, _SUDOKU = hmm_fit.FitSpec(), documents.HmmSpec(), documents.SudokuSpec()


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags of the program; importing this file doesn't."""
    number = functools.partial(flags.DEFINE_integer, flag_values=values)
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    tasks = ", ".join(f"sudoku:{name}" for name in sudoku.SIZES)
    text("task", None, f"{tasks}, or hmm.", required=True)
    text("directory", "", "Folder to make; default: a folder in runs/data.")
    number("train", None, "Documents for training: grids, or texts of an HMM.")
    number("validation", None, "Documents for validation.")
    number("seed", 0, "Seed of the samples.")
    number("puzzles", _SUDOKU.puzzles, "Sudoku: puzzles with one solution.")
    number("givens", 0, "Sudoku: given digits per puzzle; 0 for the default of the size.")
    text("corpus", _HMM.corpus, "HMM: text to fit.")
    number("vocab_size", _FIT.vocab_size, "HMM: tokens, including end-of-text.")
    number("num_states", _FIT.num_states, "HMM: hidden states.")
    number("max_tokens", _FIT.max_tokens, "HMM: maximum tokens of the text to use.")
    number("iterations", _FIT.iterations, "HMM: iterations of EM.")


def make_spec(values: flags.FlagValues) -> documents.Spec:
    """Make a spec from the flags.

    Raises:
      ValueError: for an unknown task or invalid values.
    """
    task, _, argument = values.task.partition(":")
    counts = {name: values[name].value for name in ("train", "validation")}
    common = {name: count for name, count in counts.items() if count is not None}
    common["seed"] = values.seed
    if task == "sudoku":
        size = sudoku.get_size(argument or _SUDOKU.size)
        if size.n == 4:
            common.setdefault("train", 288 * 70)
        return documents.SudokuSpec(
            size=size.name, puzzles=values.puzzles, givens=values.givens, **common
        )
    if values.task == "hmm":
        names = ("vocab_size", "num_states", "max_tokens", "iterations")
        fit = hmm_fit.FitSpec(**{name: values[name].value for name in names})
        return documents.HmmSpec(corpus=values.corpus, fit=fit, **common)
    raise ValueError(
        f"unknown task {values.task!r}; expected hmm, or sudoku: with {', '.join(sudoku.SIZES)}"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    start = time.monotonic()
    spec = make_spec(flags.FLAGS)
    name = flags.FLAGS.task.replace(":", "_")
    directory = documents.write(flags.FLAGS.directory or f"runs/data/{name}", spec, print)
    print(f"{directory} is complete, {time.monotonic() - start:.0f} seconds")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
