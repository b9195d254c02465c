"""Prepare a corpus of any size with Apache Beam, in groups, resumable.

The corpus is split into groups (`corpus.groups`). A worker reads the documents of a group, assigns
them to splits, tokenises and packs them, and writes one shard per split. It then writes a small
JSON of counts and checksums, which marks the group as finished. The content of a group doesn't
depend on the worker or the order.

  DIR/plan.json                         the groups and their inputs
  DIR/tokenizer.json
  DIR/shards/train-00000.array_record   of the first group; none if it has no full block
  DIR/shards/validation-00000.array_record
  DIR/shards/00000.npy                  digests of its texts, where validation has files of its own;
                                        removed once the texts in both splits are counted
  DIR/shards/00000.json
  DIR/manifest.json                     written last: without it the folder is unfinished

All workers must see the corpus and the folder under the same paths. Only this module imports
apache_beam.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging as absl_logging

from fsdfm_jax import io
from fsdfm_jax.data import corpus as corpus_lib
from fsdfm_jax.data import packing, shards
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.data.prepared import DataSpec, PreparedData

_PLAN = "plan.json"
_SHARDS = "shards"
_FORMAT = 1  # of the plan and the groups' files
_SAMPLE_GROUPS = 64  # maximum groups in the tokenizer's training sample

# Calls a function for each item, in any process; see `run_on_beam`.
Run = Callable[[Callable[[int], None], Sequence[int]], None]


def prepare(
    spec: DataSpec,
    directory: str | os.PathLike,
    run: Run,
    *,
    group_bytes: int = 1 << 28,
    sample_characters: int = 1 << 26,
) -> PreparedData:
    """Make a prepared folder, resume an unfinished one, or open a finished one.

    The same arguments give the same blocks, files and fingerprint for any `run`. Finished groups
    are not changed. Only one call at a time may use a folder.

    Args:
      spec: what to make; not a mixture.
      directory: the folder to make, with its parents. An empty folder may exist.
      run: see `run_on_beam`.
      group_bytes: approximate stored bytes of the corpus per group. Tokens after the last full
        block of a group are dropped. A killed worker loses its current group.
      sample_characters: maximum characters of training documents to train a tokenizer on, from the
        beginnings of up to 64 groups spread evenly over the corpus.

    Raises:
      ValueError: the folder is something else, or unfinished with another spec, corpus or group
        size; a split has no full block; or the corpus or tokenizer is bad. Bad groups don't prevent
        the others from finishing.
      FileNotFoundError: a file of the corpus or tokenizer is missing.
    """
    if spec.mixture:
        raise ValueError("data.mixture mixes folders that are already prepared; omit --engine")
    if group_bytes < 1 or sample_characters < 1:
        raise ValueError("group_bytes and sample_characters must be at least 1")
    directory = pathlib.Path(directory).resolve()
    if (directory / prepared_lib.MANIFEST).exists():
        data = prepared_lib.load(directory)
        prepared_lib.check_same_spec(spec, data)
        return data
    plan = _make_plan(spec, group_bytes, sample_characters)
    _begin(plan, spec, directory)
    missing = [number for number, group in enumerate(_finished(directory, plan)) if group is None]
    if missing:
        absl_logging.info(
            "Making %d of %d groups; each writes a .json to %s when it is finished.",
            len(missing),
            len(plan["groups"]),
            directory / _SHARDS,
        )
        run(functools.partial(make_group, str(directory)), missing)
    _finish(spec, directory, plan)
    return prepared_lib.load(directory)


def run_on_beam(function: Callable[[int], None], items: Sequence[int], options: list[str]) -> None:
    """Call `function` with each item on a Beam runner, in any order, some perhaps twice.

    Args:
      function: must be picklable.
      items: the arguments.
      options: of the Beam pipeline, as on its command line: ["--runner=FlinkRunner", ...].

    Raises:
      ValueError: apache-beam is not installed.
    """
    logging.disable(logging.WARNING)  # about missing client libraries that aren't needed
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError(
            f"--engine=beam needs apache-beam ({error}); run `pip install fsdfm_jax[beam]`"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
        # Without the reshuffle a runner may fuse all items into one task.
        _ = pipeline | beam.Create(list(items)) | beam.Reshuffle() | beam.Map(function)


def make_group(directory: str, number: int) -> None:
    """Make the files of a group; write an error in its documents to a file beside them.

    Args:
      directory: an unfinished folder, with its plan.
      number: of the group.
    """
    folder = pathlib.Path(directory)
    spec, plan, tokenizer = _open_plan(directory, _digest_file(folder / _PLAN))
    try:
        result = _write_group(spec, plan["groups"][number], tokenizer, folder, number)
        (folder / _name(number, "error")).unlink(missing_ok=True)
        shards.write_bytes(folder / _name(number, "json"), _to_json(result))
    except (ValueError, OSError) as error:
        # Raising would make the engine retry, and end in pages of its own tracebacks.
        report = {"kind": type(error).__name__, "message": str(error)}
        report["trace"] = traceback.format_exc()
        shards.write_bytes(folder / _name(number, "error"), _to_json(report))


def _make_plan(spec: DataSpec, group_bytes: int, sample_characters: int) -> dict[str, Any]:
    """Make the plan: the groups, each with the split of its documents ("": by their hash)."""
    sources = [(spec.corpus, "train" if spec.validation else "", spec.validation)]
    if spec.validation:
        sources.append((spec.validation, "validation", ""))
    groups = [
        {"split": split, "pieces": [list(piece) for piece in pieces]}
        for corpus, split, without in sources
        for pieces in corpus_lib.groups(corpus, spec.documents, group_bytes, without)
    ]
    files = sorted({piece[0] for group in groups for piece in group["pieces"]})
    return {
        "format": _FORMAT,
        "spec": dataclasses.asdict(spec),
        "group_bytes": group_bytes,
        "sample_characters": sample_characters if spec.tokenizer == "bpe" else 0,
        "files": {file: os.path.getsize(file) for file in files},
        "groups": groups,
    }


def _begin(plan: dict[str, Any], spec: DataSpec, directory: pathlib.Path) -> None:
    """Make an unfinished folder with plan and tokenizer, or check that its plan is the same."""
    path = directory / _PLAN
    if path.is_file():
        _check_plan(plan, io.read_object(path), directory)
        shards.remove_partial(directory)
        return
    # A call that was killed before writing the plan leaves these, and no shards.
    known = {directory / prepared_lib.TOKENIZER, directory / _SHARDS}
    if directory.exists() and (
        not directory.is_dir()
        or {path for path in directory.iterdir() if not path.name.startswith(".")} - known
        or any((directory / _SHARDS).glob("*"))
    ):
        raise ValueError(
            f"{directory} exists but is not prepared data; set --directory to another folder"
        )
    (directory / _SHARDS).mkdir(parents=True, exist_ok=True)
    shards.remove_partial(directory)
    if spec.tokenizer == "bpe":
        tokenizer, trained_on = _train_tokenizer(spec, plan)
    else:
        tokenizer, trained_on = tokenizer_lib.load(spec.tokenizer), None
    tokenizer.save(directory / prepared_lib.TOKENIZER)
    shards.write_bytes(path, _to_json(plan | {"trained_on": trained_on}))


def _check_plan(plan: dict[str, Any], begun: dict[str, Any], directory: pathlib.Path) -> None:
    for key in ("format", "spec", "group_bytes", "sample_characters", "files", "groups"):
        ours, theirs = plan[key], begun.get(key)
        if ours == theirs:
            continue
        what = f"{key}: {theirs!r} before, {ours!r} now"
        if key in ("spec", "files") and isinstance(theirs, dict):
            names = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k)]
            what = "; ".join(
                f"{name}: {theirs.get(name, 'absent')!r} before, {ours.get(name, 'absent')!r} now"
                for name in names[:3]
            )
        raise ValueError(
            f"the unfinished preparation in {directory} was started with another corpus or other "
            f"settings ({what}); resume with those, or remove the folder"
        )


def _train_tokenizer(spec: DataSpec, plan: dict[str, Any]):
    """Train a tokenizer; return it with the size of its sample."""
    groups = [group for group in plan["groups"] if group["split"] != "validation"]
    count = min(len(groups), _SAMPLE_GROUPS)
    each = -(-plan["sample_characters"] // count)
    sample = {"groups": count, "documents": 0, "characters": 0}

    def texts() -> Iterator[str]:
        for i in range(count):
            left = each
            group = groups[i * len(groups) // count]
            for document in _documents(spec, group):
                if _split(spec, group, document) == "train":
                    text = document.text[:left]
                    sample["documents"] += 1
                    sample["characters"] += len(text)
                    left -= len(text)
                    yield text
                    if not left:
                        break

    tokenizer = tokenizer_lib.train_bpe(texts(), spec.vocab_size)
    return tokenizer, sample


def _documents(
    spec: DataSpec, group: dict[str, Any], blank: corpus_lib.Blank | None = None
) -> Iterator[corpus_lib.Document]:
    pieces = [corpus_lib.Piece(*piece) for piece in group["pieces"]]
    return corpus_lib.read(pieces, spec.text_field, spec.documents, blank)


def _split(spec: DataSpec, group: dict[str, Any], document: corpus_lib.Document) -> str:
    if group["split"]:
        return group["split"]
    return "validation" if corpus_lib.is_held_out(document, spec.holdout) else "train"


def _write_group(
    spec: DataSpec,
    group: dict[str, Any],
    tokenizer: tokenizer_lib.Tokenizer,
    folder: pathlib.Path,
    number: int,
) -> dict[str, Any]:
    dtype = shards.token_dtype(tokenizer.vocab_size)
    packers = {s: packing.Packer(tokenizer, spec.block_length) for s in prepared_lib.SPLITS}
    writers = {
        split: shards.ShardWriter(folder, _name(number, "array_record", split), split, dtype)
        for split in prepared_lib.SPLITS
    }
    blank = corpus_lib.Blank()
    digests: list[int] = []
    try:
        for batch in packing.batches(_documents(spec, group, blank)):
            digests += map(_digest_text, batch) if spec.validation else ()
            places = [_split(spec, group, document) for document in batch]
            for split, packer in packers.items():
                own = [d for d, place in zip(batch, places, strict=True) if place == split]
                writers[split].write(packer.pack(own))
        files = [file for writer in writers.values() for file in writer.close()]
    finally:
        for writer in writers.values():
            writer.discard()
    if spec.validation:
        io.write_array(folder / _name(number, "npy"), np.asarray(digests, np.uint64))
    return {
        "plan": _digest_file(folder / _PLAN),
        "splits": {split: dataclasses.asdict(p.counts) for split, p in packers.items()},
        "files": [dataclasses.asdict(file) for file in files],
        "characters": sum(packer.characters for packer in packers.values()),
        "lost": sum(packer.lost for packer in packers.values()),
        "blank": blank.count,
        "digests": bool(spec.validation),
    }


def _digest_text(document: corpus_lib.Document) -> int:
    """64 bits, of which equal texts have the same and two different ones as good as never."""
    return int.from_bytes(corpus_lib.digest(document)[:8], "little")


def _finished(directory: pathlib.Path, plan: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Read the JSON of each group; None if it isn't of this plan or shards are missing."""
    digest = _digest_file(directory / _PLAN)
    return [_read_group(directory, number, digest) for number in range(len(plan["groups"]))]


def _read_group(directory: pathlib.Path, number: int, digest: str) -> dict[str, Any] | None:
    try:
        found = io.read_object(directory / _name(number, "json"))
        if found["plan"] != digest:
            return None
        shards.check_sizes(directory, [shards.File(**file) for file in found["files"]])
        if found.get("digests") and not (directory / _name(number, "npy")).is_file():
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return found


def _finish(spec: DataSpec, directory: pathlib.Path, plan: dict[str, Any]) -> None:
    """Write the manifest; raise if a group isn't finished."""
    groups = _finished(directory, plan)
    missing = [number for number, group in enumerate(groups) if group is None]
    if missing:
        raise _failure(directory, missing)
    splits = {}
    for split in prepared_lib.SPLITS:
        counts = _total([packing.SplitCounts(**group["splits"][split]) for group in groups])
        documents = sum(g["splits"][s]["documents"] for g in groups for s in prepared_lib.SPLITS)
        if not counts.documents:
            raise ValueError(prepared_lib.no_documents(spec, split, documents))
        packing.check_blocks(split, counts, spec.block_length)
        splits[split] = dataclasses.asdict(counts)
    tokenizer = tokenizer_lib.load(directory / prepared_lib.TOKENIZER)
    begun = io.read_object(directory / _PLAN)
    manifest = prepared_lib.make_manifest(
        spec,
        tokenizer,
        splits,
        storage="shards",
        groups={"count": len(groups), "bytes": plan["group_bytes"]},
        trained_on=begun["trained_on"],
        read=_read_facts(groups) | {"documents_in_both": _count_in_both(directory, plan, groups)},
    )
    files = [shards.File(**file) for group in groups for file in group["files"]]
    shards.remove_partial(directory)
    prepared_lib.write_manifest(directory, manifest, files)
    for number in range(len(groups)):
        (directory / _name(number, "npy")).unlink(missing_ok=True)


def _read_facts(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the facts from reading the groups; missing for groups of earlier versions."""
    characters, lost, blank = (
        sum(group.get(key, 0) for group in groups) for key in ("characters", "lost", "blank")
    )
    if blank:
        absl_logging.warning("Skipped %d document(s) without text.", blank)
    return {"blank_documents": blank, "lost_share": packing.check_lost(characters, lost)}


def _count_in_both(
    directory: pathlib.Path, plan: dict[str, Any], groups: Sequence[dict[str, Any]]
) -> int:
    """How many training texts are held out too; groups of earlier versions don't tell."""
    digests: dict[str, list[pathlib.Path]] = {split: [] for split in prepared_lib.SPLITS}
    for number, (planned, found) in enumerate(zip(plan["groups"], groups, strict=True)):
        if found.get("digests"):
            digests[planned["split"]].append(directory / _name(number, "npy"))
    held_out = np.unique(np.concatenate([_NONE, *map(np.load, digests["validation"])]))
    count = sum(int(np.isin(np.load(path), held_out).sum()) for path in digests["train"])
    prepared_lib.warn_of_texts_in_both(count)
    return count


_NONE = np.zeros(0, np.uint64)


def _total(parts: Iterable[packing.SplitCounts]) -> packing.SplitCounts:
    """Total the counts of all groups; the sha256 is over theirs, in order."""
    parts = list(parts)
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    names = ("documents", "tokens", "blocks", "dropped_tokens")
    return packing.SplitCounts(
        **{name: sum(getattr(part, name) for part in parts) for name in names}, sha256=digest
    )


def _failure(directory: pathlib.Path, missing: list[int]) -> Exception:
    """Return the first error that workers reported for a missing group."""
    again = "run the same command to make the missing ones"
    for number in missing:
        path = directory / _name(number, "error")
        if path.is_file():
            report = io.read_object(path)
            kind = FileNotFoundError if report["kind"] == "FileNotFoundError" else ValueError
            return kind(f"{report['message']} ({len(missing)} group(s) not made; {again})")
    return ValueError(f"{len(missing)} group(s) were not made, the first is {missing[0]}; {again}")


@functools.lru_cache(maxsize=1)
def _open_plan(directory: str, digest: str):
    """Read spec, plan and tokenizer of an unfinished folder; `digest` is the plan's."""
    del digest  # part of the cache key: a changed plan is read again
    plan = io.read_object(pathlib.Path(directory) / _PLAN)
    tokenizer = tokenizer_lib.load(pathlib.Path(directory) / prepared_lib.TOKENIZER)
    return DataSpec(**plan["spec"]), plan, tokenizer


def _name(number: int, suffix: str, split: str = "") -> str:
    return f"{_SHARDS}/{split}{'-' if split else ''}{number:05d}.{suffix}"


def _digest_file(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _to_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
