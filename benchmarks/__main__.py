"""List the benchmarks: what each measures, and its default duration on two CPU cores."""

import ast
import pathlib

DURATIONS = {
    "proof": "25 min",
    "train": "5 min",
    "sample": "5 min",
    "autoregressive": "25 min",
    "scaling": "15 min",
    "accelerator.sh": "30 min",  # on a GPU or TPU
    "convert": "6 min",
    "reading": "3 min",
    "exact_lab": "20 min",
    "step_laws": "10 min",
    "time_grids": "1 min",
}


def summary(name: str) -> str:
    """Return the first line of a program's docstring or header."""
    path = pathlib.Path(__file__).with_name(name)
    if path.suffix == ".sh":
        return path.read_text().splitlines()[1].removeprefix("# ")
    return ast.get_docstring(ast.parse(path.with_suffix(".py").read_text())).splitlines()[0]


def main() -> None:
    print("python -m benchmarks.NAME, or benchmarks/accelerator.sh; --help prints the options.")
    for name, duration in DURATIONS.items():
        print(f"{name:15} {duration:>6}  {summary(name)}")


if __name__ == "__main__":
    main()
