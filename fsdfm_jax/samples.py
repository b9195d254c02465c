"""The logic of the program `fsdfm_jax.generate`: flags, job, output."""

import dataclasses
import functools
import json
import pathlib
import sys
from typing import TextIO

from absl import app, flags, logging

from fsdfm_jax import io
from fsdfm_jax.convert import formats
from fsdfm_jax.flow import jumps
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference import job as job_lib
from fsdfm_jax.inference.bundle import Bundle
from fsdfm_jax.inference.job import Job
from fsdfm_jax.inference.stream import printable
from fsdfm_jax.inference.view import LiveView, View
from fsdfm_jax.training import pipeline

_MOST = 2**20  # limit for rows, and for tokens per row
_SAMPLING = ("steps", "jump", "grid", "temperature", "cooling", "top_p", "look_ahead")


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, see `define_flags`; None means the model's default."""

    workdir: str | None = None
    checkpoint: str | None = None
    stage: str = ""
    which: str = "ema"
    num_heads: int | None = None
    tokenizer: str = ""
    source: str = ""
    prompt: str | None = None
    infill: str | None = None
    batch_file: str | None = None
    length: int | None = None
    num_samples: int = 4
    batch_size: int | None = None
    seed: int = 0
    steps: int | None = None
    jump: str | None = None
    grid: str | None = None
    temperature: float | None = None
    cooling: float | None = None
    top_p: float | None = None
    look_ahead: float | None = None
    output: str | None = None
    stream: bool = False

    def sampling(self, default: Sampling) -> Sampling:
        """Return the model's sampler, overridden by the flags; ValueError for a bad value."""
        given = {name: getattr(self, name) for name in _SAMPLING}
        return default.replace(**{k: value for k, value in given.items() if value is not None})


def define_flags() -> None:
    """Define a flag for each field of `Options`; importing this file doesn't."""
    default = Options()
    text = lambda name, help_: flags.DEFINE_string(name, getattr(default, name), help_)
    number = lambda name, help_: flags.DEFINE_integer(name, getattr(default, name), help_)
    real = lambda name, help_: flags.DEFINE_float(name, getattr(default, name), help_)
    choice = lambda name, values, help_: flags.DEFINE_enum(
        name, getattr(default, name), values, help_
    )
    text("workdir", "Working directory of a trained run.")
    text("checkpoint", "Any supported model file or folder, instead of --workdir.")
    text("stage", "Run of a working directory; default: the last trained one.")
    choice("which", ["ema", "student", "teacher", "model"], "Set of weights in the checkpoint.")
    number("num_heads", "Attention heads, if the checkpoint doesn't record them.")
    text("tokenizer", '"gpt2" or a tokenizer.json, if the checkpoint has none.')
    choice("source", ["", "uniform", "mask"], "Noise, if the checkpoint doesn't record it.")
    text("prompt", "Text at the start of every sample.")
    text("infill", 'Text with gaps: "The [8] of the Union"; for a Sudoku model, a puzzle.')
    text("batch_file", 'Prompts: .jsonl of {"prompt" or "infill": .., "id": ..}, or .txt lines.')
    number("length", "Tokens of a block; default: the training block length, or 1024.")
    number("num_samples", "Samples per prompt.")
    number("batch_size", "Rows per sampler call; default: all, at most 32.")
    number("seed", "Seed of the samples.")
    number("steps", "Network calls per sample; autoregressive models use one per token.")
    choice("jump", list(jumps.RULES), "Jump rule. All sampler flags default to the model's values.")
    text("grid", "Time grid: uniform, cosine, power:R or geometric:E.")
    real("temperature", "Divides the logits; 0 is greedy.")
    real("cooling", "C in [0, 1): temperature annealing, by a factor of 1 - C at the end.")
    real("top_p", "Nucleus mass.")
    real("look_ahead", "A in [0, 1]: a step of width h evaluates the network at t + A h.")
    text("output", "Write lines of JSON to this .jsonl file, or resume it.")
    flags.DEFINE_bool("stream", default.stream, "Show the text during refinement.")


def check_options(options: Options) -> None:
    """Raise ValueError, naming the flags, for incompatible or invalid flags."""
    if options.workdir is not None and options.checkpoint is not None:
        raise ValueError("Give either --workdir=DIR or --checkpoint=PATH, and not both.")
    names = ("prompt", "infill", "batch_file")
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other; give only one of them.")
    for name in ("length", "num_samples", "batch_size"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= _MOST:
            raise ValueError(f"--{name} must be in 1 .. {_MOST}, got {value}.")
    generate_lib.check_seed(options.seed)
    options.sampling(Sampling())
    if options.stream and (options.batch_file or options.output):
        raise ValueError("--stream displays texts; omit --batch_file and --output.")
    if options.output and options.output == options.batch_file:
        raise ValueError(f"--output and --batch_file are the same file, {options.output!r}.")
    if options.output and pathlib.Path(options.output).suffix != ".jsonl":
        raise ValueError(f"--output must be a .jsonl file, got {options.output!r}.")


def open_model(options: Options) -> Bundle:
    """Open the model of the flags, with its tokenizer.

    Raises:
      ValueError: if there is no tokenizer, or it doesn't match; see `formats.open_bundle`.
    """
    if options.workdir is not None:
        pipeline.load_config(pathlib.Path(options.workdir).expanduser())  # raises for other folders
    path = pathlib.Path(options.workdir or options.checkpoint or formats.BUNDLED).expanduser()
    passed_on = ("which", "num_heads", "tokenizer", "stage", "source")
    bundle = formats.open_bundle(path, **{name: getattr(options, name) for name in passed_on})
    if bundle.tokenizer is None:
        raise ValueError(
            f"{path} has no tokenizer; give that of its training with --tokenizer=gpt2, or "
            "--tokenizer=PATH of a tokenizer.json."
        )
    return bundle


def make_job(options: Options, bundle: Bundle) -> Job:
    """Make the job of the flags.

    Raises:
      ValueError: for an invalid prompt (with its line in a file), or --stream with an
        autoregressive model.
    """
    if options.stream and bundle.model.causal:
        raise ValueError(
            "--stream shows the refinement of a block; an autoregressive model writes each token "
            "once. Omit it."
        )
    requests = job_lib.requests_of(
        bundle.tokenizer,
        prompt=options.prompt,
        infill=options.infill,
        batch_file=options.batch_file,
    )
    return job_lib.make_job(
        bundle,
        requests,
        sampling=options.sampling(bundle.sampling()),
        num_samples=options.num_samples,
        length=options.length,
        batch_size=options.batch_size,
        seed=options.seed,
        stamped=bool(options.batch_file or options.output),
    )


def print_samples(job: Job, out: TextIO, view: View | None = None) -> None:
    """Draw a job and print its texts, each below a header line."""
    clean = printable if out.isatty() else lambda text: text
    for batch in job_lib.draw(job, on_step=view.on_step if view else None):
        for i, row, tokens_L in batch:
            calls = job.sampling.steps
            head = f"--- sample {i + 1} of {len(job.rows)}: {job.name}, {calls} network calls"
            print(head, file=out)
            print(clean(job.text(row, tokens_L)), file=out, flush=True)


def _print_line(line: dict, out: TextIO) -> None:
    print(json.dumps(line), file=out, flush=True)


def run(options: Options, out: TextIO) -> None:
    """Run the program; `out` gets only the texts, or lines of JSON.

    Raises:
      ValueError, OSError: for errors that the user can fix, before anything is written.
    """
    check_options(options)
    job = make_job(options, open_model(options))
    logging.info("Sampling %d rows from %s.", len(job.rows), job.name)
    if options.output:
        path = pathlib.Path(options.output).expanduser()
        start = job_lib.rows_written(path, job)
        if start:
            print(f"{path} already has {start} of {len(job.rows)} samples.", file=sys.stderr)
        emit = functools.partial(io.append_jsonl, path)
        job_lib.write_lines(job, emit, start=start, progress=True)
    elif options.batch_file:
        # A bar and lines on the same terminal would overwrite each other. `out` is bound here
        # because the bar redirects sys.stdout.
        emit = functools.partial(_print_line, out=out)
        job_lib.write_lines(job, emit, start=0, progress=not out.isatty())
    elif options.stream:
        view = (LiveView if out.isatty() else View)(job, out)
        with view.closing():
            print_samples(job, out, view)
    else:
        print_samples(job, out)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    names = [field.name for field in dataclasses.fields(Options)]
    run(Options(**{name: flags.FLAGS[name].value for name in names}), sys.stdout)
