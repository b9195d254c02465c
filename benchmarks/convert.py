"""Time and peak memory of converting a checkpoint of the paper's size.

    python -m benchmarks.convert --size=1.3B --directory=/somewhere/with/space

Makes a synthetic few-step checkpoint in the official layout (random weights of student and average,
with the prefixes of real files), converts it to each format in a separate process, and prints one
line per format; results go to DIRECTORY/convert.json. Needs about four times the size of one set of
weights on disk. The files are removed at the end unless --keep is given.
"""

import json
import pathlib
import platform
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
from absl import app, flags, logging

from configs import base
from fsdfm_jax.convert import official, torch_pickle
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference.bundle import Leaf
from fsdfm_jax.network.config import ModelConfig

_SIZE = flags.DEFINE_enum("size", "1.3B", list(base.SIZES), "The paper's network.")
_DIRECTORY = flags.DEFINE_string("directory", None, "Working folder.")
_TARGETS = flags.DEFINE_list(
    "targets", ["safetensors", "official", "orbax", "sampler"], "Formats to convert to."
)
_CHECK = flags.DEFINE_bool(
    "check", True, "Also compare parameters and logits; not for samplers, which it would run."
)
_KEEP = flags.DEFINE_bool("keep", False, "Keep the files.")
_VOCAB_SIZE = 50_257
_PREFIX = "_orig_mod.module."


def make_source(path: pathlib.Path, size: str) -> int:
    """Write the synthetic checkpoint; return the number of parameters of one set of weights."""
    width, num_blocks, num_heads, cond_width = base.SIZES[size]
    model = ModelConfig(
        vocab_size=_VOCAB_SIZE,
        width=width,
        num_blocks=num_blocks,
        num_heads=num_heads,
        cond_width=cond_width,
        conditioning="official",
    )
    rng = np.random.default_rng(0)

    def random(shape):
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    leaves = {
        path: Leaf(shape, lambda shape=shape: random(shape))
        for path, shape in bundle_lib.expected_shapes(model).items()
    }
    bundle = bundle_lib.from_params({}, model)
    bundle = bundle_lib.Bundle(model, leaves, bundle.path, None, 1024, {})
    shapes = official.state_shapes(bundle)
    groups = ("student_model", "student_ema_model")
    tree = {
        group: {
            _PREFIX + name: torch_pickle.Pending(f"{group}/{name}", np.dtype(np.float32), shape)
            for name, shape in shapes.items()
        }
        for group in groups
    }
    stream = (
        (f"{group}/{name}", array) for group in groups for name, array in official.stream(bundle)
    )
    torch_pickle.write(path, tree | {"step": 190_000}, stream)
    return bundle.num_params()


_MEASURED = """
import json, resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module("fsdfm_jax.convert", run_name="__main__")
finally:
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def convert(source: pathlib.Path, target: pathlib.Path, to: str, check: bool) -> dict:
    """Convert in a new process; return seconds and peak memory in GB (10^9 bytes)."""
    arguments = [str(source), str(target), f"--to={to}"]
    arguments += ["--length=1024"] if to == "sampler" else []
    arguments += ["--check"] if check else []
    command = [sys.executable, "-c", _MEASURED, "convert", *arguments]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - began
    *lines, measured = done.stdout.strip().splitlines()
    logging.info("%s", "\n".join(lines))
    unit = 1 if platform.system() == "Darwin" else 1024
    return {
        "to": to,
        "seconds": round(seconds, 1),
        "peak_gb": round(json.loads(measured)["peak"] * unit / 1e9, 2),
    }


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    folder = pathlib.Path(_DIRECTORY.value).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"synthetic_{_SIZE.value}.pth"
    began = time.monotonic()
    num_params = make_source(source, _SIZE.value)
    print(
        f"{source.name}: {num_params / 1e6:.2f}M parameters, twice, "
        f"{source.stat().st_size / 1e9:.2f} GB, written in {time.monotonic() - began:.0f} s, "
        f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB"
    )
    results = []
    for to in _TARGETS.value:
        target = folder / ("converted.pth" if to == "official" else f"converted_{to}")
        check = _CHECK.value and to != "sampler"  # its steps would take longer than all the rest
        results.append(convert(source, target, to, check) | {"check": check})
        print("{to}: {seconds} s, peak {peak_gb} GB".format(**results[-1]), flush=True)
        if not _KEEP.value:
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    if not _KEEP.value:
        source.unlink()
    report = {"size": _SIZE.value, "num_params": num_params, "results": results}
    (folder / "convert.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    flags.mark_flag_as_required("directory")
    app.run(main)
