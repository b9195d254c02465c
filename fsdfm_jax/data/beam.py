"""Preparing a corpus of any size on Apache Beam: group by group, resumable.

The corpus is cut into groups (`corpus.groups`). A worker reads the documents of a group, splits,
tokenises and packs them, and writes one shard for each split and then, as the sign that they are
whole, a small JSON of counts and sums. Which worker makes a group, and when, changes nothing in it.

  DIR/plan.json                         the groups, and what they are made from
  DIR/tokenizer.json
  DIR/shards/train-00000.array_record   of the first group; there is none without a full block
  DIR/shards/validation-00000.array_record
  DIR/shards/00000.npy                  digests of its texts, where validation has files of its own;
                                        removed once the texts in both splits are counted
  DIR/shards/00000.json
  DIR/manifest.json                     written last: until then the folder is unfinished

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
_FORMAT = 1  # of the plan and of the groups' files
_SAMPLE_GROUPS = 64  # groups that the tokenizer's sample is taken from, at most

# Runs a function for each item, wherever: `run_on_beam`'s form.
Run = Callable[[Callable[[int], None], Sequence[int]], None]


def prepare(
    spec: DataSpec,
    directory: str | os.PathLike,
    run: Run,
    *,
    group_bytes: int = 1 << 28,
    sample_characters: int = 1 << 26,
) -> PreparedData:
    """Makes a prepared folder, goes on with an unfinished one, or opens it if it is there already.

    The same arguments give the same blocks, files and fingerprint, whatever `run` does. Groups that
    are finished are not touched. One call at a time for a folder.

    Args:
      spec: what to make; no mixture.
      directory: the folder to make; its parents are made too. An empty folder may exist.
      run: see `run_on_beam`.
      group_bytes: stored bytes of the corpus in a group, about. What is after the last full block
        of a group is dropped, and a killed worker loses the group that it is at.
      sample_characters: of a trained tokenizer: characters of training documents that it is trained
        on, at most, taken from the beginnings of up to 64 groups spread evenly over the corpus.

    Raises:
      ValueError: the folder is something else, or unfinished from another spec, corpus or group
        size; a split has no full block; or the corpus or the tokenizer is at fault. Groups at fault
        don't keep the others from being finished.
      FileNotFoundError: a file of the corpus or of the tokenizer is missing.
    """
    if spec.mixture:
        raise ValueError("data.mixture mixes folders that are prepared already; leave out --engine")
    if group_bytes < 1 or sample_characters < 1:
        raise ValueError("expected a group and a sample of at least 1 byte or character")
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
            "Making %d of %d groups; each leaves a .json in %s when it is done.",
            len(missing),
            len(plan["groups"]),
            directory / _SHARDS,
        )
        run(functools.partial(make_group, str(directory)), missing)
    _finish(spec, directory, plan)
    return prepared_lib.load(directory)


def run_on_beam(function: Callable[[int], None], items: Sequence[int], options: list[str]) -> None:
    """Calls `function` with each item on a Beam runner, in any order, some perhaps twice.

    Args:
      function: can be pickled.
      items: what to call it with.
      options: of Beam's pipeline, as on its command line: ["--runner=FlinkRunner", ...].

    Raises:
      ValueError: apache-beam is not installed.
    """
    logging.disable(logging.WARNING)  # of client libraries that are missing and not needed
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
        # Without the reshuffle a runner may fuse all items into one piece of work.
        _ = pipeline | beam.Create(list(items)) | beam.Reshuffle() | beam.Map(function)


def make_group(directory: str, number: int) -> None:
    """Makes the files of a group; what goes wrong with its documents is left in a file beside them.

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
        # An engine would try again and again, and end in pages of traces of its own.
        report = {"kind": type(error).__name__, "message": str(error)}
        report["trace"] = traceback.format_exc()
        shards.write_bytes(folder / _name(number, "error"), _to_json(report))


def _make_plan(spec: DataSpec, group_bytes: int, sample_characters: int) -> dict[str, Any]:
    """The groups, each with the split its documents belong to ("" if by their hash)."""
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
    """Makes an unfinished folder with plan and tokenizer, or checks that it is the same one."""
    path = directory / _PLAN
    if path.is_file():
        _check_plan(plan, io.read_object(path), directory)
        shards.remove_partial(directory)
        return
    # A call that was killed before the plan has left these, and nothing in the folder.
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
        what = f"{key}: {theirs!r} there, {ours!r} now"
        if key in ("spec", "files") and isinstance(theirs, dict):
            names = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k)]
            what = "; ".join(
                f"{name}: {theirs.get(name, 'absent')!r} there, {ours.get(name, 'absent')!r} now"
                for name in names[:3]
            )
        raise ValueError(
            f"the unfinished preparation in {directory} was begun with another corpus or other "
            f"settings ({what}); go on with those, or remove the folder"
        )


def _train_tokenizer(spec: DataSpec, plan: dict[str, Any]):
    """A tokenizer and what it was trained on."""
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
    return int.from_bytes(hashlib.sha256(document.text.encode()).digest()[:8], "little")


def _finished(directory: pathlib.Path, plan: dict[str, Any]) -> list[dict[str, Any] | None]:
    """What the JSON of each group says; None if it isn't of this plan or lacks its shards."""
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
    """Writes the manifest, if all groups are finished."""
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
    """What the groups found while reading; those of earlier versions don't say."""
    characters, lost, blank = (
        sum(group.get(key, 0) for group in groups) for key in ("characters", "lost", "blank")
    )
    if blank:
        absl_logging.warning("%d document(s) without text are left out.", blank)
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
    """The counts of all groups; their sum is over the groups' own, in order."""
    parts = list(parts)
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    names = ("documents", "tokens", "blocks", "dropped_tokens")
    return packing.SplitCounts(
        **{name: sum(getattr(part, name) for part in parts) for name in names}, sha256=digest
    )


def _failure(directory: pathlib.Path, missing: list[int]) -> Exception:
    """The first error that workers left for a missing group."""
    again = "the same command goes on with what is missing"
    for number in missing:
        path = directory / _name(number, "error")
        if path.is_file():
            report = io.read_object(path)
            kind = FileNotFoundError if report["kind"] == "FileNotFoundError" else ValueError
            return kind(f"{report['message']} ({len(missing)} group(s) not made; {again})")
    return ValueError(f"{len(missing)} group(s) were not made, the first is {missing[0]}; {again}")


@functools.lru_cache(maxsize=1)
def _open_plan(directory: str, digest: str):
    """Spec, plan and tokenizer of an unfinished folder; `digest` is the plan's."""
    del digest  # so that another plan is read anew
    plan = io.read_object(pathlib.Path(directory) / _PLAN)
    tokenizer = tokenizer_lib.load(pathlib.Path(directory) / prepared_lib.TOKENIZER)
    return DataSpec(**plan["spec"]), plan, tokenizer


def _name(number: int, suffix: str, split: str = "") -> str:
    return f"{_SHARDS}/{split}{'-' if split else ''}{number:05d}.{suffix}"


def _digest_file(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _to_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
