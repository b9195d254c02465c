"""Convert models between formats: `python -m fsdfm_jax.convert SOURCE TARGET`.

    python -m fsdfm_jax.convert checkpoint.pth model.safetensors --check
    python -m fsdfm_jax.convert checkpoint.pth runs/published --to=orbax --tokenizer=gpt2
    python -m fsdfm_jax.convert runs/mine model.safetensors --stage=distill
    python -m fsdfm_jax.convert runs/mine exported --to=sampler --steps=8
    python -m fsdfm_jax.convert runs/mine mine-8-steps --to=hub --check

fsdfm_jax/convert/formats.py lists the formats. Targets are written atomically.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
from absl import app, flags

from fsdfm_jax import cli
from fsdfm_jax.convert import formats, official, parity
from fsdfm_jax.convert import safetensors as safetensors_lib
from fsdfm_jax.convert.formats import Target
from fsdfm_jax.flow import jumps
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference.bundle import Bundle, Leaf
from fsdfm_jax.training import metrics, recipe


def define_flags() -> None:
    """Define the flags of the program; called only when it runs as one."""
    flags.DEFINE_enum("to", "", ["", *formats.FORMATS], "Format of TARGET; default: by suffix.")
    flags.DEFINE_enum("which", "ema", list(official.WHICH), "Set of weights in SOURCE.")
    flags.DEFINE_string("stage", "", "Run of a working directory; default: the last trained one.")
    flags.DEFINE_integer(
        "num_heads", None, "Heads of an official network; default: width 64 each.", lower_bound=1
    )
    flags.DEFINE_string("tokenizer", "", '"gpt2" or a tokenizer.json, if SOURCE has none.')
    flags.DEFINE_enum(
        "source", "", ["", "uniform", "mask"], "Noise of an official network; default: by size."
    )
    flags.DEFINE_enum("layout", "ours", safetensors_lib.LAYOUTS, "Names in safetensors.")
    flags.DEFINE_enum("dtype", "float32", list(bundle_lib.DTYPES), "Of the weights in TARGET.")
    flags.DEFINE_list("steps", [], "Programs of an exported sampler; default: the model's steps.")
    flags.DEFINE_integer("length", None, "Tokens of an exported sampler.", lower_bound=1)
    flags.DEFINE_enum(
        "jump", None, list(jumps.RULES), "Jump rule of an exported sampler; default: the model's."
    )
    flags.DEFINE_string("report", None, "Report with the figures for the card of --to=hub.")
    flags.DEFINE_bool("check", False, "Compare SOURCE and TARGET: parameters and logits.")
    flags.DEFINE_float(
        "tolerance", None, "Of the logits in --check; default: rounding.", lower_bound=0.0
    )
    flags.DEFINE_bool("overwrite", False, "Replace TARGET if it is a model of the same format.")


def with_progress(bundle: Bundle, progress: metrics.Progress) -> Bundle:
    """Return the same bundle, counting megabytes as its parameters are read."""

    done = 0

    def counted(leaf: Leaf) -> np.ndarray:
        nonlocal done
        array = leaf.read()
        progress.advance(_megabytes(done + array.size) - _megabytes(done))
        done += array.size
        return array

    leaves = {
        path: Leaf(leaf.shape, lambda leaf=leaf: counted(leaf))
        for path, leaf in bundle.leaves.items()
    }
    return dataclasses.replace(bundle, leaves=leaves)


def _megabytes(size: int) -> int:
    return -(-4 * size // 10**6)


def convert(
    source: Bundle,
    target: Target,
    *,
    place: pathlib.Path | None = None,
    overwrite: bool = False,
    check: bool = False,
    tolerance: float | None = None,
) -> Iterator[str]:
    """Convert with progress on stderr, and yield lines to print.

    Args:
      source: from `formats.open_bundle`.
      target: what to write.
      place: path of `source`.
      overwrite: replace a model of the same format.
      check: compare both before renaming the target to its final name.
      tolerance: maximum difference of logits; None for the rounding tolerance.

    Raises:
      ValueError: see `formats.write`; also if the two differ.
    """
    if tolerance is not None and not check:
        raise ValueError("--tolerance needs --check.")
    provenance = dict(source.provenance) | {"converted_by": recipe.code_version()}
    source = dataclasses.replace(source, provenance=provenance)
    formats.check_target(source, target, source=place, overwrite=overwrite)
    lines = []

    def compare(path: pathlib.Path) -> None:
        inputs = parity.random_inputs(source)
        # Sequentially: a large model may fit into memory only once.
        expected_BLV = parity.logits_of(source, inputs)
        written = formats.open_bundle(path)
        parity.check_parameters(source, written, target.dtype)
        found = parity.compare(expected_BLV, parity.logits_of(written, inputs))
        bound = parity.TOLERANCE[target.dtype] if tolerance is None else tolerance
        lines.append(
            f"Largest difference of two logits {found.max_deviation:.3g} (allowed {bound:g}), "
            f"largest KL {found.max_kl:.3g} nats."
        )
        parity.check(found, bound)
        if target.format == "sampler":
            parity.check_program(source, path, sampling=target.sampling)
            lines.append("The exported program draws the same tokens as the library.")

    total = _megabytes(source.num_params())
    with metrics.Progress(f"MB read for {target.path.name}", total=total) as progress:
        formats.write(
            with_progress(source, progress),
            target,
            source=place,
            overwrite=overwrite,
            before_publishing=compare if check else None,
        )
    yield from lines
    said = source.provenance
    yield (
        f"{target.path}: {target.format}, {source.num_params() / 1e6:.2f}M parameters, "
        f"conditioning {source.model.conditioning}, weights {said.get('weights')}, "
        f"step {said.get('step')}."
    )
    if said.get("source_is_assumed"):
        yield (
            "The file doesn't record whether its noise is uniform or a mask token; assuming "
            f"{source.path['source']}. Give --source or --tokenizer if that is wrong."
        )


def _whole_numbers(words: list[str]) -> tuple[int, ...]:
    """Parse the numbers of --steps=1,2,4."""
    try:
        return tuple(int(word) for word in words)
    except ValueError:
        raise ValueError(f"--steps must be integers, got {','.join(words)!r}.") from None


def _report(source: pathlib.Path, named: str | None, to: str) -> pathlib.Path | None:
    """Return the report for the card: the given one, or that of a working directory."""
    if named is not None:
        return pathlib.Path(named).expanduser()
    own = source / "report"
    return own if to == "hub" and (own / "results.json").is_file() else None


def main(argv: list[str]) -> None:
    if len(argv) != 3:
        raise app.UsageError("Expected SOURCE and TARGET.")
    values = flags.FLAGS
    source = formats.open_bundle(
        argv[1],
        which=values.which,
        num_heads=values.num_heads,
        tokenizer=values.tokenizer,
        stage=values.stage,
        source=values.source,
    )
    known = source.provenance.get("tokenizer")
    if source.tokenizer is None and known:
        raise ValueError(
            f"{argv[1]} was trained with tokenizer {known}, which is no longer with its prepared "
            "text; give it with --tokenizer=PATH of its tokenizer.json."
        )
    target = Target(
        pathlib.Path(argv[2]).expanduser(),
        to=values.to,
        layout=values.layout,
        dtype=values.dtype,
        steps=_whole_numbers(values.steps),
        length=values.length,
        sampling=source.sampling().replace(jump=values.jump) if values.jump else None,
        report=_report(pathlib.Path(argv[1]).expanduser(), values.report, values.to),
    )
    for line in convert(
        source,
        target,
        place=pathlib.Path(argv[1]).expanduser(),
        overwrite=values.overwrite,
        check=values.check,
        tolerance=values.tolerance,
    ):
        print(line)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
