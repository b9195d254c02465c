"""Run the code cells of the tutorials, two notebooks at a time, each in its own process and folder.

    python docs/site/run_tutorials.py                     # with the quick settings, as CI does
    python docs/site/run_tutorials.py --full sudoku       # one notebook, with the full settings

A notebook has one cell tagged "parameters"; the quick settings, "quick" in the notebook's metadata,
override its values. The notebooks are not modified.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "tutorials"
LIMIT = 900  # seconds


def script(path: pathlib.Path, *, full: bool) -> str:
    """Join the code cells of a notebook into one program."""
    notebook = json.loads(path.read_text())
    quick = {} if full else notebook["metadata"]["quick"]
    parts = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            parts.append("".join(cell["source"]))
            if "parameters" in cell["metadata"].get("tags", ()):
                parts += [f"{name} = {value!r}" for name, value in quick.items()]
    return "\n\n".join(parts) + "\n"


def run(path: pathlib.Path, *, full: bool) -> bool:
    """Run a notebook, show its output at the end, and return whether it succeeded."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / f"{path.stem}.py"
        program.write_text(script(path, full=full))
        places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, program.name],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
            timeout=LIMIT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    seconds = time.monotonic() - began
    print(f"{done.stdout}\n{path.stem}: exit code {done.returncode}, {seconds:.0f} s", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="notebooks, without .ipynb (default: all)")
    parser.add_argument("--full", action="store_true", help="use the settings in the notebook")
    args = parser.parse_args()
    names = args.names or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        paths = [FOLDER / f"{name}.ipynb" for name in names]
        worked = list(pool.map(functools.partial(run, full=args.full), paths))
    failed = [name for name, well in zip(names, worked, strict=True) if not well]
    if failed:
        sys.exit(f"these tutorials failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
