"""Text out of any model, from nothing, after a prompt or in the gaps of a text.

    python -m fsdfm_jax.generate --steps=8
    python -m fsdfm_jax.generate --workdir=runs/tiny --steps=8 --prompt="My fellow citizens"
    python -m fsdfm_jax.generate --checkpoint=model.safetensors --tokenizer=gpt2 \\
        --infill="The [8] of the Union" --stream
    python -m fsdfm_jax.generate --workdir=runs/tiny --batch_file=prompts.jsonl --output=texts.jsonl

Without --workdir or --checkpoint it is the model that comes with the package.

The syntax of gaps and of batch files is that of inference/prompts.py. With a batch file or an
output, each sample is one line of JSON. The rows of all requests are drawn in batches of one shape;
the same arguments, --batch_size included, give the same tokens. An interrupted --output goes on
where it ended.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.live
import rich.panel
import rich.text
from absl import app, flags, logging

from fsdfm_jax import cli, io
from fsdfm_jax.convert import formats
from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.flow import jumps, sampler
from fsdfm_jax.flow.process import Process
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference import ngrams, prompts
from fsdfm_jax.inference.bundle import Bundle
from fsdfm_jax.inference.ngrams import Table
from fsdfm_jax.inference.prompts import Request
from fsdfm_jax.inference.stream import Piece, pieces, printable
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params
from fsdfm_jax.training import metrics, pipeline

# The model that came with the package, made by `python -m launch.ship`.
SHIPPED = pathlib.Path(__file__).parent / "shipped" / "model.safetensors"
_DEFAULT_LENGTH = 1024  # tokens; the block of the paper
_DEFAULT_BATCH = 32  # rows
_MOST = 2**20  # of rows, and of tokens in one: more is a slip
_LIVE_SAMPLES = 4  # rows that the live view shows
_MIN_FRAME, _MAX_SLOWDOWN = 0.15, 3.0  # seconds: small models are done before anyone has looked
_STYLES = {"given": "bold", "masked": "dim", "changed": "black on green", "kept": ""}


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags, see `define_flags`; None and "" leave a value to the model."""

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
    steps: int = 8
    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None
    cooling: float | None = None
    look_ahead: float | None = None
    neighbours: float | None = None
    jump: str = ""
    grid: str = ""
    output: str | None = None
    stream: bool = False


def define_flags() -> None:
    """Defines a flag for each of `Options`; the program does, importing this file doesn't."""
    default = Options()
    text = lambda name, help_: flags.DEFINE_string(name, getattr(default, name), help_)
    number = lambda name, help_: flags.DEFINE_integer(name, getattr(default, name), help_)
    choice = lambda name, values, help_: flags.DEFINE_enum(
        name, getattr(default, name), values, help_
    )
    text("workdir", "Working directory of a trained run.")
    text("checkpoint", "Any model file or folder that the package reads, in place of --workdir.")
    text("stage", "Run of a working directory to sample from; the last one trained by default.")
    choice("which", ["ema", "student", "teacher", "model"], "Which of the checkpoint's weights.")
    number("num_heads", "Attention heads, where the checkpoint doesn't say.")
    text("tokenizer", '"gpt2" or a tokenizer.json, where the checkpoint holds none.')
    choice("source", ["", "uniform", "mask"], "Noise, where the checkpoint doesn't say.")
    text("prompt", "Text that every sample begins with.")
    text("infill", 'Text with gaps of so many tokens to fill in: "The [8] of the Union".')
    text("batch_file", 'Prompts: .jsonl of {"prompt" or "infill": .., "id": ..}, or .txt lines.')
    number("length", "Tokens of a block; by default that of the training, else 1024.")
    number("num_samples", "Samples of each prompt.")
    number("batch_size", "Rows of one call of the sampler; by default all of them, at most 32.")
    number("steps", "Network calls per sample; an autoregressive model takes one a token.")
    number("seed", "Seed of the samples.")
    real = lambda name, help_: flags.DEFINE_float(name, getattr(default, name), help_)
    real("temperature", "Divides the logits; by default the run's eval.temperature.")
    real("top_p", "Share of the mass that is drawn from; by default the run's eval.top_p.")
    real("cooling", "How far the temperature falls; by default the run's eval.cooling.")
    real("look_ahead", "Of a step, where it asks; by default the run's eval.look_ahead.")
    real("neighbours", "How much a token heeds those beside it; by default eval.neighbours.")
    choice("jump", ["", *jumps.RULES], "Jump rule; by default the run's eval.few_step_jump.")
    text("grid", "uniform, cosine or power:R; by default the run's eval.grid.")
    text("output", "Writes lines of JSON to this .jsonl file, or continues it.")
    flags.DEFINE_bool("stream", default.stream, "Show the text as it is refined.")


# ------------------------------------------------------------------------------------------ the job
class Row(NamedTuple):
    """One sample to draw: number `sample` (from 0) of a request."""

    request: Request
    sample: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A model and all the samples to draw from it.

    Attributes:
      name: of the model, to show.
      stamp: JSON dict of everything that a row's tokens depend on, besides the rows.
      rows: in the order they are drawn.
    """

    name: str
    params: Params
    model: ModelConfig
    process: Process
    tokenizer: Tokenizer
    rows: list[Row]
    length: int
    batch_size: int
    steps: int
    jump: str
    grid: str
    seed: int
    temperature: float
    top_p: float
    cooling: float
    look_ahead: float
    neighbours: float
    table: Table | None
    stamp: dict[str, Any]

    @property
    def calls(self) -> int:
        """Network calls of a sample."""
        return self.length if self.model.causal else self.steps

    def line(self, row: Row, tokens_L: np.ndarray) -> dict[str, Any]:
        """What the output says of a sample."""
        tokens = tokens_L[: row.request.template.shown].tolist()
        return (
            _line_head(row) | {"text": self.tokenizer.decode(tokens), "tokens": tokens} | self.stamp
        )


def _line_head(row: Row) -> dict[str, Any]:
    head = {"id": row.request.id, "sample": row.sample}
    return head | ({row.request.kind: row.request.text} if row.request.kind else {})


def check_options(options: Options) -> None:
    """Refuses flags that can't work together, before anything is read.

    Raises:
      ValueError: naming the flags.
    """
    if options.workdir is not None and options.checkpoint is not None:
        raise ValueError("Give either --workdir=DIR or --checkpoint=PATH, and not both.")
    if options.workdir is None and options.checkpoint is None and not SHIPPED.exists():
        raise ValueError("Give --workdir=DIR or --checkpoint=PATH; no model came with the package.")
    names = ("prompt", "infill", "batch_file")
    given = [f"--{name}" for name in names if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other; give one of them.")
    for name in ("length", "num_samples", "batch_size"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= _MOST:
            raise ValueError(f"--{name} must lie in 1 .. {_MOST}, got {value}.")
    generate_lib.check_settings(
        steps=options.steps,
        seed=options.seed,
        temperature=1.0 if options.temperature is None else options.temperature,
        top_p=1.0 if options.top_p is None else options.top_p,
        cooling=options.cooling or 0.0,
        look_ahead=options.look_ahead or 0.0,
        neighbours=options.neighbours or 0.0,
    )
    if options.jump:
        jumps.get_rule(options.jump)
    if options.grid:
        sampler.make_grid(options.grid, options.steps)
    if options.stream and (options.batch_file or options.output):
        raise ValueError("--stream shows texts to you; leave out --batch_file and --output.")
    if options.output and options.output == options.batch_file:
        raise ValueError(f"--output and --batch_file are the same file, {options.output!r}.")
    if options.output and pathlib.Path(options.output).suffix != ".jsonl":
        raise ValueError(f"--output must be a .jsonl file, got {options.output!r}.")


def open_model(options: Options) -> Bundle:
    """The model that the flags name, with a tokenizer that fits it.

    Raises:
      ValueError: if there is no tokenizer, or one of another vocabulary; see `formats.open_bundle`.
    """
    if options.workdir is not None:
        pipeline.load_config(pathlib.Path(options.workdir).expanduser())  # refuses other folders
    path = pathlib.Path(options.workdir or options.checkpoint or SHIPPED).expanduser()
    passed_on = ("which", "num_heads", "tokenizer", "stage", "source")
    bundle = formats.open_bundle(path, **{name: getattr(options, name) for name in passed_on})
    if bundle.tokenizer is None:
        raise ValueError(
            f"{path} holds no tokenizer; give the one it was trained with: --tokenizer=gpt2, or "
            "--tokenizer=PATH of a tokenizer.json."
        )
    return bundle


def make_job(options: Options, bundle: Bundle) -> Job:
    """All that is to be drawn; every prompt is checked here.

    Raises:
      ValueError: for a prompt that can't be used, by its line if it is one of a file.
    """
    process, model = bundle.process(), generate_lib.portable(bundle.model)
    length = options.length or bundle.block_length or _DEFAULT_LENGTH
    if options.stream and model.causal:
        raise ValueError(
            "--stream shows a block being refined; an autoregressive model writes each token "
            "once. Leave it out."
        )

    def check(template):
        generate_lib.check_given(model, process, template.given_L[None], template.frozen_L[None])

    if options.batch_file:
        requests = prompts.read_requests(options.batch_file, bundle.tokenizer, length, check)
    else:
        kind = next((k for k in prompts.MAKERS if getattr(options, k) is not None), "")
        text = getattr(options, kind) if kind else ""
        requests = [prompts.make_request(kind, text, bundle.tokenizer, length)]
        check(requests[0].template)
    rows = [Row(request, i) for request in requests for i in range(options.num_samples)]
    params = bundle.device_params()
    how = bundle.sampling()
    strength = 0.0 if model.causal else _or(options.neighbours, how["neighbours"])
    jump = options.jump or how["few_step_jump"]
    generate_lib.check_neighbours(strength, jump, has_table=bundle.counts is not None)
    table = ngrams.table(bundle.counts(), model.vocab_size) if strength else None
    job = Job(
        name=bundle.provenance.get("run") or bundle.provenance.get("stage") or "model",
        params=params,
        model=model,
        process=process,
        tokenizer=bundle.tokenizer,
        rows=rows,
        length=length,
        batch_size=options.batch_size or min(len(rows), _DEFAULT_BATCH),
        steps=options.steps,
        jump=jump,
        grid=options.grid or how["grid"],
        seed=options.seed,
        temperature=_or(options.temperature, how["temperature"]),
        top_p=_or(options.top_p, how["top_p"]),
        cooling=_or(options.cooling, how["cooling"]),
        look_ahead=_or(options.look_ahead, how["look_ahead"]),
        neighbours=strength,
        # On the device once, not with each batch.
        table=jax.device_put(table),
        stamp={},
    )
    if not (options.batch_file or options.output):
        return job  # without lines nothing has to be stamped
    return dataclasses.replace(job, stamp=_stamp(job, bundle, params))


def _or(given: float | None, otherwise: float) -> float:
    return otherwise if given is None else given


def _stamp(job: Job, bundle: Bundle, params: Params) -> dict[str, Any]:
    known = {key: bundle.provenance.get(key) for key in ("run", "stage", "weights", "step")}
    return {
        "seed": job.seed,
        "batch_size": job.batch_size,
        "steps": job.calls,
        "temperature": job.temperature,
        "top_p": job.top_p,
        **{
            key: None if job.model.causal else getattr(job, key)
            for key in ("cooling", "look_ahead", "neighbours", "jump", "grid")
        },
        **({"follow_sha256": bundle_lib.counts_hash(bundle.counts())} if job.neighbours else {}),
        "length": job.length,
        "model": {key: value for key, value in known.items() if value is not None}
        | {
            "sha256": bundle_lib.content_hash(params),
            "tokenizer": job.tokenizer.fingerprint,
            "path": dict(bundle.path),
        },
    }


def draw(
    job: Job, *, start: int = 0, view: "View | None" = None
) -> Iterator[list[tuple[int, Row, np.ndarray]]]:
    """Draws the batches of a job.

    Args:
      job: what to draw.
      start: index of the first row wanted, of those there are; batches before its own are left
        out.
      view: watches each batch being refined.

    Yields:
      (index, row, int32 [L]) of the rows of one batch, in order, from `start`.
    """
    for index in range(start // job.batch_size, -(-len(job.rows) // job.batch_size)):
        first = index * job.batch_size
        rows = job.rows[first : first + job.batch_size]
        # The last batch is filled up with copies of its last row: another shape would compile anew.
        padded = rows + rows[-1:] * (job.batch_size - len(rows))
        given_BL = np.stack([row.request.template.given_L for row in padded])
        frozen_BL = np.stack([row.request.template.frozen_L for row in padded])
        seed = generate_lib.batch_seed(job.seed, index)
        with view.batch(rows, frozen_BL, _start(job, seed, given_BL, frozen_BL)) if view else _NONE:
            tokens_BL = generate_lib.generate(
                job.params,
                job.model,
                job.process,
                given_BL=given_BL,
                frozen_BL=frozen_BL,
                steps=job.steps,
                seed=seed,
                jump_rule=job.jump,
                grid=job.grid,
                temperature=job.temperature,
                cooling=job.cooling,
                top_p=job.top_p,
                look_ahead=job.look_ahead,
                neighbours=job.neighbours,
                table=job.table,
                on_step=view.on_step if view else None,
            )
        drawn = [(first + i, row, tokens_BL[i]) for i, row in enumerate(rows)]
        yield [part for part in drawn if part[0] >= start]


_NONE = contextlib.nullcontext()


def _start(job: Job, seed: int, given_BL: np.ndarray, frozen_BL: np.ndarray) -> np.ndarray:
    x0_BL, _ = generate_lib.draw_noise(
        job.process, jnp.uint32(seed), jnp.asarray(given_BL), jnp.asarray(frozen_BL)
    )
    return np.asarray(x0_BL)


# ------------------------------------------------------------------------------------ lines of JSON
def rows_written(path: pathlib.Path, job: Job) -> int:
    """How many of a job's rows an output holds, all of them checked to be of this job.

    Raises:
      ValueError: if the file holds anything else; it is left as it is.
    """
    if not path.exists():
        return 0
    remedy = f"remove {path} or choose another --output"
    torn = path.read_bytes().rpartition(b"\n")[2]
    head = b'{"id": '
    if not (torn.startswith(head) or head.startswith(torn)):
        raise ValueError(f"{path} was not written by this program; {remedy}.")
    lines = io.read_jsonl(path)
    if len(lines) > len(job.rows):
        raise ValueError(
            f"{path} has {len(lines)} samples, more than the {len(job.rows)} asked for; {remedy}."
        )
    for number, (line, row) in enumerate(zip(lines, job.rows, strict=False), start=1):
        wanted = _line_head(row) | job.stamp
        found = line if isinstance(line, dict) else {}
        different = [
            f"{key}: {found.get(key, 'absent')!r} there, {value!r} now"
            for key, value in wanted.items()
            if key not in found or found[key] != value
        ]
        if different:
            raise ValueError(
                f"{path} line {number} is of another job ({'; '.join(different)}); {remedy}."
            )
    return len(lines)


def write_lines(job: Job, emit: Callable[[dict], None], *, start: int, progress: bool) -> None:
    """Draws a job from row `start` on and hands each line to `emit` as its batch is done."""
    total = len(job.rows) - start
    if not total:
        return
    with metrics.Progress("sampling", total=total) if progress else _NONE as counter:
        for batch in draw(job, start=start):
            for _, row, tokens_L in batch:
                emit(job.line(row, tokens_L))
            if counter is not None:
                counter.advance(len(batch))


def _print_line(line: dict, out: TextIO) -> None:
    print(json.dumps(line), file=out, flush=True)


# -------------------------------------------------------------------------------------- for people
def print_samples(job: Job, out: TextIO, view: "View | None" = None) -> None:
    """Draws a job and prints its texts, each under a line that names it."""
    clean = printable if out.isatty() else lambda text: text
    for batch in draw(job, view=view):
        for i, row, tokens_L in batch:
            shown = tokens_L[: row.request.template.shown].tolist()
            head = f"--- sample {i + 1} of {len(job.rows)}: {job.name}, {job.calls} network calls"
            print(head, file=out)
            print(clean(job.tokenizer.decode(shown)), file=out, flush=True)


class View:
    """Watches batches being refined: plain lines for the first sample of each.

    Args:
      job: what is drawn.
      out: where to write.
    """

    def __init__(self, job: Job, out: TextIO):
        self._job, self._out = job, out
        self._error: Exception | None = None

    @contextlib.contextmanager
    def batch(self, rows: list[Row], frozen_BL: np.ndarray, x0_BL: np.ndarray) -> Iterator[None]:
        """Around the drawing of one batch that starts from `x0_BL`.

        Raises:
          OSError: if the view could not be written.
        """
        self._rows, self._frozen_BL, self._before_BL = rows, frozen_BL, x0_BL
        self.begin()
        try:
            yield
        finally:
            self.end()
        if self._error is not None:
            raise self._error

    def on_step(self, index: Any, x_BL: Any) -> None:
        """`sampler.OnStep`."""
        after_BL = np.asarray(x_BL)
        changed_BL = after_BL != self._before_BL
        self._before_BL = after_BL
        try:
            if self._error is None:
                self.show(int(index) + 1, changed_BL)
        except OSError as error:  # a closed pipe; raised here it would be an error of the runtime
            self._error = error

    def row_pieces(self, i: int, changed_BL: np.ndarray) -> list[Piece]:
        """Row `i` of the batch as it is now."""
        shown = slice(self._rows[i].request.template.shown)
        return pieces(
            self._before_BL[i, shown],
            self._frozen_BL[i, shown],
            changed_BL[i, shown],
            self._job.process.source.mask_id,
            self._job.tokenizer,
        )

    def summary(self, step: int, changed_BL: np.ndarray, rows: int) -> str:
        """How far it is and how much has moved, in the first `rows` rows."""
        if not step:
            return f"step 0/{self._job.calls}, noise"
        lengths = [row.request.template.shown for row in self._rows[:rows]]
        changed = sum(int(changed_BL[i, :length].sum()) for i, length in enumerate(lengths))
        return f"step {step}/{self._job.calls}, {changed} of {sum(lengths)} tokens changed"

    def begin(self) -> None:
        """Before the first step."""

    def end(self) -> None:
        """After the last one, whether it came or not."""

    def show(self, step: int, changed_BL: np.ndarray) -> None:
        """After step number `step` = 1 .. S."""
        none_changed_BL = np.zeros_like(changed_BL)  # in fewer pieces
        text = "".join(piece.text for piece in self.row_pieces(0, none_changed_BL))
        summary = self.summary(step, changed_BL, 1)
        print(f"{summary}: {printable(text, keep='')}", file=self._out, flush=True)


class LiveView(View):
    """The first samples of a batch in place on a terminal; gone when the batch is done."""

    def begin(self) -> None:
        """Shows the noise."""
        console = rich.console.Console(file=self._out)
        self._live = rich.live.Live(console=console, auto_refresh=False, transient=True)
        self._live.start()
        self._frame = min(_MIN_FRAME, _MAX_SLOWDOWN / self._job.calls)
        self._due = time.monotonic()
        self.show(0, np.zeros_like(self._frozen_BL))

    def end(self) -> None:
        """Leaves the last step up for a moment."""
        self._pause()
        self._live.stop()

    def show(self, step: int, changed_BL: np.ndarray) -> None:
        """Replaces the texts."""
        self._pause()
        rows = min(_LIVE_SAMPLES, len(self._rows))
        panels = []
        for i in range(rows):
            text = rich.text.Text()  # takes no markup
            for piece in self.row_pieces(i, changed_BL):
                text.append(printable(piece.text), _STYLES[piece.kind])
            panels.append(rich.panel.Panel(text, title=f"sample {self._rows[i].sample + 1}"))
        summary = rich.text.Text(self.summary(step, changed_BL, rows), "bold")
        self._live.update(rich.console.Group(summary, *panels), refresh=True)

    def _pause(self) -> None:
        time.sleep(max(self._due - time.monotonic(), 0))
        self._due = time.monotonic() + self._frame


# -------------------------------------------------------------------------------------- the program
def run(options: Options, out: TextIO) -> None:
    """Does what the flags say; `out` gets the texts, or lines of JSON and nothing else.

    Raises:
      ValueError, OSError: for what the user can mend; then nothing has been written.
    """
    check_options(options)
    job = make_job(options, open_model(options))
    logging.info("Sampling %d rows from %s.", len(job.rows), job.name)
    if options.output:
        path = pathlib.Path(options.output).expanduser()
        start = rows_written(path, job)
        if start:
            print(f"{path} holds {start} of {len(job.rows)} samples already.", file=sys.stderr)
        emit = functools.partial(io.append_jsonl, path)
        write_lines(job, emit, start=start, progress=True)
    elif options.batch_file:
        # A bar on stderr and lines on one terminal would overwrite each other. `out` is held
        # here because the bar redirects sys.stdout to itself.
        emit = functools.partial(_print_line, out=out)
        write_lines(job, emit, start=0, progress=not out.isatty())
    else:
        view = (LiveView if out.isatty() else View)(job, out) if options.stream else None
        print_samples(job, out, view)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}")
    names = [field.name for field in dataclasses.fields(Options)]
    run(Options(**{name: flags.FLAGS[name].value for name in names}), sys.stdout)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
