"""The pairs of noise and text that `refine` is trained on, made by the run it starts from."""

import contextlib
import hashlib
import pathlib
import shutil
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from fsdfm_jax import io
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data.prepared import PreparedData
from fsdfm_jax.flow.process import Process
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.parallel import processes
from fsdfm_jax.stages import refine
from fsdfm_jax.stages.refine import PairSettings
from fsdfm_jax.training import recipe, workdir
from fsdfm_jax.training.metrics import Progress

Pairs = tuple[np.ndarray, np.ndarray]


def make_pairs(
    directory: pathlib.Path,
    settings: PairSettings,
    *,
    base: pathlib.Path,
    seed: int,
    process: Process,
    prepared: PreparedData,
    mesh: Mesh,
) -> Pairs:
    """The (x0, x1) pairs of a run, int [N, L] each; reads those that are there.

    They are written part by part, each with a checksum, so that a killed run loses one part at
    most; damaged parts are made again, pairs of other weights or settings are deleted first.

    Args:
      directory: WORKDIR/stages/RUN, gets pairs/.
      settings: how they are made.
      base: folder of the run whose newest weights make them.
      seed: of all their randomness.
      process: the noising process.
      prepared: gives length, tokenizer and fingerprint of the text.
      mesh: where they are made.
    """
    place = directory / "pairs"
    step, metadata = workdir.weights_metadata(base, together=True)
    made_from = {
        "seed": seed,
        "settings": settings._asdict() | {"sampling": settings.sampling.to_dict()},
        "generator": [recipe.digest(metadata["recipe"]), step],
        "data": prepared.fingerprint,
    }
    num_parts = settings.num_pairs // settings.batch_size
    parts = [place / f"{part:05d}.npy" for part in range(num_parts)]
    if missing := processes.from_first(lambda: _missing(place, parts, made_from)):
        generator = workdir.load_weights(
            base, tokenizer=prepared.tokenizer.fingerprint, mesh=mesh, step=step
        )
        run = refine.make_pair_sampler(
            generator.model,
            process,
            settings,
            length=prepared.block_length,
            sharding=mesh_lib.whole(mesh),
        )
        done, key = (num_parts - len(missing)) * settings.batch_size, jax.random.key(seed)
        with (
            jax.set_mesh(mesh),
            _progress(directory.name, total=settings.num_pairs, done=done) as progress,
        ):
            for part in missing:
                pair = run(generator.params, jax.random.fold_in(key, part))
                if progress:
                    _write(parts[part], np.stack(pair).astype(np.int32))
                    progress.advance(settings.batch_size)
    processes.barrier(f"{directory.name}/pairs")
    made = [_read(part) for part in parts]
    x0_NL, x1_NL = (np.concatenate(side) for side in zip(*made, strict=True))
    return x0_NL, x1_NL


def _missing(place: pathlib.Path, parts: list[pathlib.Path], made_from: dict) -> list[int]:
    """Numbers of the parts to be made; all of them where those that are there are of others."""
    stamp = place / "made_from.json"
    if not _is_stamp(stamp, made_from):
        if place.exists():
            shutil.rmtree(place)
        io.write_json(stamp, made_from)
    return [number for number, part in enumerate(parts) if not _is_whole(part)]


def _is_stamp(stamp: pathlib.Path, made_from: dict) -> bool:
    try:
        return io.read_json(stamp) == made_from
    except (OSError, ValueError):
        return False


def _write(part: pathlib.Path, pair_2BL: np.ndarray) -> None:
    """Writes a part, then its checksum, as the sign that it is whole."""
    io.write_array(part, pair_2BL)
    io.write_text(_sum_of(part), _digest(part))


def _read(part: pathlib.Path) -> np.ndarray:
    if not _is_whole(part):
        raise ValueError(f"{part} is damaged; run the same command again, which makes it anew")
    return np.load(part, allow_pickle=False)


def _is_whole(part: pathlib.Path) -> bool:
    """Whether a part is what was written, with a warning where it is something else."""
    if not (part.is_file() and _sum_of(part).is_file()):
        return False
    if io.read_text(_sum_of(part)) == _digest(part):
        return True
    logging.warning("%s is damaged: its pairs are made again.", part)
    return False


def _sum_of(part: pathlib.Path) -> pathlib.Path:
    return part.with_suffix(".sha256")


def _digest(part: pathlib.Path) -> str:
    with open(part, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _progress(run: str, *, total: int, done: int) -> Iterator[Progress | None]:
    """Progress in the first process, None in the others."""
    if not processes.is_first():
        yield None
        return
    with Progress(f"{run}: making pairs", total=total) as progress:
        progress.advance(done)
        yield progress


def text_batches(
    prepared: PreparedData, start: int, *, batch_size: int, seed: int, mesh: Mesh
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of text from step `start` on, this process's rows of them."""
    rows = mesh_lib.local_rows(mesh, batch_size)
    source = prepared.source("train")
    for x1_BL in prepared_lib.Batches(source, batch_size=batch_size, seed=seed, rows=rows).iterate(
        start
    ):
        yield {"x1": x1_BL}


def pair_batches(
    pairs: Pairs,
    prepared: PreparedData,
    start: int,
    *,
    batch_size: int,
    real_fraction: float,
    source_size: int,
    seed: int,
    mesh: Mesh,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of pairs and real text from step `start` on, this process's rows of them.

    All of a batch is read and its own rows are kept: rows are put in random order.
    """
    rows = mesh_lib.local_rows(mesh, batch_size)
    text = prepared_lib.Batches(prepared.source("train"), batch_size=batch_size, seed=seed)
    for step, x1_BL in enumerate(text.iterate(start), start):
        batch = refine.mix_real(
            pairs,
            x1_BL,
            source_size=source_size,
            real_fraction=real_fraction,
            seed=seed,
            step=step,
        )
        yield {name: tokens_BL[rows] for name, tokens_BL in batch.items()}
