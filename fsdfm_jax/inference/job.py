"""`Job`: all samples to draw from a model, drawn batch by batch."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fsdfm_jax import io
from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.exact import sudoku
from fsdfm_jax.exact.sudoku import Sudoku
from fsdfm_jax.flow.process import Process
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference import prompts, puzzles
from fsdfm_jax.inference.bundle import Bundle
from fsdfm_jax.inference.prompts import Request
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params
from fsdfm_jax.training import metrics

DEFAULT_LENGTH = 1024  # tokens; the block of the paper
DEFAULT_BATCH = 32  # rows

# (rows of the batch, frozen positions [B, L], step 0 .. S, tokens [B, L] after it).
OnStep = Callable[[list["Row"], np.ndarray, int, np.ndarray], None]


class Row(NamedTuple):
    """One sample to draw: number `sample` (from 0) of a request."""

    request: Request
    sample: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A model and all samples to draw from it.

    Attributes:
      name: of the model, for display.
      rows: in the order they are drawn.
      length: tokens per row.
      batch_size: rows per batch.
      sampling: settings; for an autoregressive model `steps` is the length.
      seed: for all randomness.
      stamp: JSON dict of everything that a row's tokens depend on, except the rows.
    """

    name: str
    params: Params
    model: ModelConfig
    process: Process
    tokenizer: Tokenizer
    rows: list[Row]
    length: int
    batch_size: int
    sampling: Sampling
    seed: int
    stamp: dict[str, Any]

    @functools.cached_property
    def sudoku(self) -> Sudoku | None:
        """The grid size if this is a Sudoku model, otherwise None."""
        return sudoku.recognise(self.tokenizer.vocabulary, self.length)

    def text(self, row: Row, tokens_L: np.ndarray) -> str:
        """Format a sample for display."""
        if self.sudoku is not None:
            return puzzles.format_sample(self.sudoku, tokens_L)
        return self.tokenizer.decode(tokens_L[: row.request.template.shown].tolist())

    def line(self, row: Row, tokens_L: np.ndarray) -> dict[str, Any]:
        """Return the entry of a sample in an output file."""
        tokens = tokens_L[: row.request.template.shown].tolist()
        text = {"text": self.tokenizer.decode(tokens), "tokens": tokens}
        return _line_head(row) | text | self.stamp


def make_job(
    bundle: Bundle,
    requests: Callable[[int, Callable], list[Request]],
    *,
    sampling: Sampling | None = None,
    num_samples: int = 1,
    length: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    stamped: bool = False,
) -> Job:
    """Make a job, checking every prompt.

    Args:
      bundle: the model, with its tokenizer.
      requests: (length, check) -> the prompts, see `prompts`. `check` raises ValueError for a
        template that the network can't be conditioned on.
      sampling: settings; None for the model's default.
      num_samples: per request.
      length: tokens of a block; None for the model's, or 1,024 if unknown.
      batch_size: rows per batch; None for all rows, at most 32.
      seed: in [0, 2^32).
      stamped: whether to compute the stamp, which reads all parameters.

    Raises:
      ValueError: for a seed out of range, an invalid prompt, or a model without tokenizer.
    """
    generate_lib.check_seed(seed)
    tokenizer = tokenizer_of(bundle)
    process, model = bundle.process(), generate_lib.portable(bundle.model)
    length = length or bundle.block_length or DEFAULT_LENGTH

    def check(template):
        given_1L, frozen_1L = template.given_L[None], template.frozen_L[None]
        generate_lib.check_given(model, process, given_1L, frozen_1L)

    rows = [Row(request, i) for request in requests(length, check) for i in range(num_samples)]
    sampling = sampling or bundle.sampling()
    job = Job(
        name=bundle.provenance.get("run") or bundle.provenance.get("stage") or "model",
        params=bundle.device_params(),
        model=model,
        process=process,
        tokenizer=tokenizer,
        rows=rows,
        length=length,
        batch_size=batch_size or min(len(rows), DEFAULT_BATCH),
        sampling=sampling.replace(steps=length) if model.causal else sampling,
        seed=seed,
        stamp={},
    )
    return dataclasses.replace(job, stamp=_stamp(job, bundle)) if stamped else job


def _stamp(job: Job, bundle: Bundle) -> dict[str, Any]:
    known = {key: bundle.provenance.get(key) for key in ("run", "stage", "weights", "step")}
    sampling = job.sampling.to_dict()
    unused = ("jump", "grid", "cooling", "look_ahead") if job.model.causal else ()
    return {
        "seed": job.seed,
        "batch_size": job.batch_size,
        "sampling": sampling | dict.fromkeys(unused),
        "length": job.length,
        "model": {key: value for key, value in known.items() if value is not None}
        | {
            "sha256": bundle_lib.content_hash(job.params),
            "tokenizer": job.tokenizer.fingerprint,
            "path": dict(bundle.path),
        },
    }


def _line_head(row: Row) -> dict[str, Any]:
    head = {"id": row.request.id, "sample": row.sample}
    return head | ({row.request.kind: row.request.text} if row.request.kind else {})


def draw(
    job: Job, *, start: int = 0, on_step: OnStep | None = None
) -> Iterator[list[tuple[int, Row, np.ndarray]]]:
    """Draw the batches of a job.

    Args:
      job: what to draw.
      start: index of the first row to return; earlier batches are skipped.
      on_step: called with the tokens of each step; doesn't change the samples.

    Yields:
      (index, row, int32 [L]) for the rows of one batch, in order, from `start`.
    """
    for index in range(start // job.batch_size, -(-len(job.rows) // job.batch_size)):
        first = index * job.batch_size
        rows = job.rows[first : first + job.batch_size]
        # Pad the last batch with copies of its last row: another shape would recompile.
        padded = rows + rows[-1:] * (job.batch_size - len(rows))
        frozen_BL = np.stack([row.request.template.frozen_L for row in padded])
        how: dict[str, Any] = {
            "given_BL": np.stack([row.request.template.given_L for row in padded]),
            "frozen_BL": frozen_BL,
            "seed": generate_lib.batch_seed(job.seed, index),
        }
        arguments = (job.params, job.model, job.process, job.sampling)
        if on_step is None:
            tokens_BL = generate_lib.generate(*arguments, **how)
        else:
            for step, tokens_BL in enumerate(generate_lib.stream(*arguments, **how)):
                on_step(rows, frozen_BL, step, tokens_BL)
        drawn = [(first + i, row, tokens_BL[i]) for i, row in enumerate(rows)]
        yield [part for part in drawn if part[0] >= start]


def generate(
    model: Bundle,
    *,
    prompt: str | None = None,
    infill: str | None = None,
    sampling: Sampling | None = None,
    num_samples: int = 1,
    length: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Generate texts: unconditionally, after a prompt, or in the gaps of a text.

    >>> import fsdfm_jax as fs
    >>> texts = fs.generate(fs.load(), prompt="My fellow citizens", sampling=fs.Sampling(steps=2))
    >>> texts[0].startswith("My fellow citizens")
    True

    Args:
      model: from `fsdfm_jax.load`.
      prompt: text at the start of each sample.
      infill: text with gaps of n tokens, "The [8] of the Union"; for a Sudoku model a puzzle,
        digits with "." for a blank cell.
      sampling: settings; None for the model's default.
      num_samples: number of texts.
      length: tokens of a text; None for the model's training block.
      seed: for all randomness; the same arguments give the same texts.

    Returns:
      num_samples texts. A Sudoku model returns grids with one line per row, and a last line that
      tells whether the grid is valid.

    Raises:
      ValueError: for a model without tokenizer, both prompt and infill, an invalid puzzle, or a
        value out of range.
    """
    if prompt is not None and infill is not None:
        raise ValueError("prompt and infill exclude each other; give only one of them.")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}.")
    requests = requests_of(tokenizer_of(model), prompt=prompt, infill=infill)
    job = make_job(
        model, requests, sampling=sampling, num_samples=num_samples, length=length, seed=seed
    )
    return [job.text(row, tokens_L) for batch in draw(job) for _, row, tokens_L in batch]


def tokenizer_of(model: Bundle) -> Tokenizer:
    """Return the model's tokenizer; ValueError if it has none."""
    if model.tokenizer is None:
        raise ValueError("The model has no tokenizer; load it with tokenizer='gpt2' or a path.")
    return model.tokenizer


def requests_of(
    tokenizer: Tokenizer,
    *,
    prompt: str | None = None,
    infill: str | None = None,
    batch_file: str | None = None,
) -> Callable[[int, Callable], list[Request]]:
    """Make the `requests` of `make_job` from a prompt, an infill text, a batch file or nothing."""

    def read(length: int, check) -> list[Request]:
        size, how = sudoku.recognise(tokenizer.vocabulary, length), dict[str, Any]()
        if size is not None:
            how["to_infill"] = functools.partial(puzzles.to_infill, size)
        if batch_file is not None:
            return prompts.read_requests(batch_file, tokenizer, length, check, **how)
        given = {"prompt": prompt, "infill": infill}
        kind = next((kind for kind, text in given.items() if text is not None), "")
        request = prompts.make_request(kind, given.get(kind) or "", tokenizer, length, **how)
        check(request.template)
        return [request]

    return read


# ------------------------------------------------------------------------------------ lines of JSON
def rows_written(path: pathlib.Path, job: Job) -> int:
    """Count the rows of a job in an output file, checking that all are of this job.

    Raises:
      ValueError: if the file has anything else; it is not changed.
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
            f"{path} has {len(lines)} samples, more than the {len(job.rows)} requested; {remedy}."
        )
    for number, (line, row) in enumerate(zip(lines, job.rows, strict=False), start=1):
        wanted = _line_head(row) | job.stamp
        found = line if isinstance(line, dict) else {}
        different = [
            f"{key}: {found.get(key, 'absent')!r} before, {value!r} now"
            for key, value in wanted.items()
            if key not in found or found[key] != value
        ]
        if different:
            raise ValueError(
                f"{path} line {number} is of another job ({'; '.join(different)}); {remedy}."
            )
    return len(lines)


def write_lines(job: Job, emit: Callable[[dict], None], *, start: int, progress: bool) -> None:
    """Draw a job from row `start` on and pass each line to `emit` after its batch."""
    total = len(job.rows) - start
    if not total:
        return
    shown = metrics.Progress("sampling", total=total) if progress else contextlib.nullcontext()
    with shown as counter:
        for batch in draw(job, start=start):
            for _, row, tokens_L in batch:
                emit(job.line(row, tokens_L))
            if counter is not None:
                counter.advance(len(batch))
