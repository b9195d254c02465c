"""The evaluated models, from any file format, and their entries in protocol stamps."""

import dataclasses
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from fsdfm_jax import stages
from fsdfm_jax.convert import formats, run_folder
from fsdfm_jax.data import prepared as prepared_lib
from fsdfm_jax.data.prepared import PreparedData
from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.flow.process import Process
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference.bundle import Bundle
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params
from fsdfm_jax.parallel import mesh as mesh_lib
from fsdfm_jax.training import pipeline, recipe, workdir

# `stage` of a few-step model whose file doesn't record it.
UNKNOWN_FEW_STEP = "few-step"


class Subject(NamedTuple):
    """A model to evaluate.

    Attributes:
      label: its name in tables.
      stage: one of `stages.NAMES`, or "few-step" if the file doesn't record it.
      facts: JSON dict that identifies it, for stamps.
    """

    label: str
    stage: str
    params: Params
    model: ModelConfig
    process: Process
    tokenizer: Tokenizer
    facts: dict[str, Any]


def catalogue(
    folder: pathlib.Path,
    trained: Mapping[str, str],
    further: str,
    runs: Sequence[str] | None = None,
    **options: Any,
) -> "Catalogue":
    """Make a catalogue of the models of a working directory and further ones.

    Args:
      folder: the working directory.
      trained: run -> stage of all trained runs, in the order of the pipeline.
      further: `eval.models`.
      runs: which runs to evaluate; all by default.
      **options: of `formats.open_bundle`, for the further models.

    Raises:
      ValueError: see `Catalogue` and `parse_models`.
    """
    places: dict[str, Any] = {run: (folder, {"stage": run}) for run in trained}
    judges = [run for run, stage in trained.items() if stage == "autoregressive"]
    return Catalogue(
        join(places, further_places(further, **options)),
        next(reversed(judges), None),
        unlisted=set(trained) - set(runs or trained),
    )


def join(places: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """Merge both; raise ValueError if a label occurs twice."""
    if twice := sorted(places.keys() & further.keys()):
        raise ValueError(
            f"eval.models uses the label {twice[0]!r} of a model of this run; choose another one."
        )
    return {**places, **further}


def open_workdir(
    folder: pathlib.Path, further: str, runs: Sequence[str] | None = None, **options: Any
) -> "Catalogue":
    """Open the trained models of a working directory and further ones.

    Args:
      folder: the working directory.
      further: `eval.models`.
      runs: which of its runs to evaluate; all trained ones by default.
      **options: of `formats.open_bundle`, for the further models.

    Raises:
      ValueError: for runs that don't exist or aren't trained.
    """
    config = pipeline.load_config(folder)
    trained = {
        run: stage
        for run, stage in pipeline.runs(config)
        if workdir.is_trained(workdir.stage_directory(folder, run))
    }
    if unknown := sorted(set(runs or ()) - trained.keys()):
        raise ValueError(
            f"{folder} has no trained run {unknown[0]!r}; it has {', '.join(trained)}."
        )
    return catalogue(folder, trained, further, runs, **options)


def prepared_text(folder: pathlib.Path) -> PreparedData:
    """Open the training text of a working directory."""
    return prepared_lib.load(pipeline.data_directory(folder, pipeline.load_config(folder)))


def further_places(text: str, **options: Any) -> dict[str, tuple[pathlib.Path, dict[str, Any]]]:
    """Return the models of `eval.models`, as `places` of a `Catalogue`."""
    return {
        label: (path, options | ({"stage": run} if run else {}))
        for label, (path, run) in parse_models(text).items()
    }


class Catalogue:
    """The models of an evaluation, opened when needed.

    Args:
      places: label -> (path, options of `formats.open_bundle`), in order.
      judge: label of the in-house judge; None for the last autoregressive model.
      unlisted: labels that may be opened but aren't evaluated, for example the judge's.

    Attributes:
      judge: label of the in-house judge, None if there is none.
      stage_of: label -> stage of the models to evaluate.
      tokenizer: shared by all models.
      block_length: the longest training block, None if unknown.
      num_params: label -> number of parameters.

    Raises:
      ValueError: if there is no model, a model can't be opened, or tokenizers differ.
    """

    def __init__(
        self,
        places: Mapping[str, tuple[pathlib.Path, Mapping[str, Any]]],
        judge: str | None = None,
        unlisted: Collection[str] = (),
    ):
        if not places:
            raise ValueError("There is no model to evaluate.")
        places = {label: _pinned(*place) for label, place in places.items()}
        self._places = places
        self._facts: dict[tuple[str, str], dict[str, Any]] = {}
        self._latest: tuple[tuple[str, str], Subject] | None = None
        bundles = {label: _open(path, **options) for label, (path, options) in places.items()}
        stages_ = {label: _stage_of(bundle) for label, bundle in bundles.items()}
        left_to_right = [label for label, stage in stages_.items() if stage == "autoregressive"]
        self.stage_of = {k: stage for k, stage in stages_.items() if k not in unlisted}
        self.judge = judge or next(reversed(left_to_right), None)
        first, *others = bundles.items()
        self.tokenizer = first[1].tokenizer
        for label, bundle in others:
            if bundle.tokenizer.fingerprint != self.tokenizer.fingerprint:
                raise ValueError(
                    f"{label} has tokenizer {bundle.tokenizer.fingerprint}, but {first[0]} has "
                    f"{self.tokenizer.fingerprint}: their samples have different tokens; evaluate "
                    "them separately, with a judge that reads text."
                )
        lengths = [b.block_length for b in bundles.values() if b.block_length is not None]
        self.block_length = max(lengths, default=None)
        self.num_params = {label: bundle.num_params() for label, bundle in bundles.items()}

    def facts(self, label: str, weights: str) -> dict[str, Any]:
        """Return the identity of a model, see `Subject`; reads its parameters on the first call."""
        if (label, weights) not in self._facts:
            self.open(label, weights)
        return self._facts[label, weights]

    def open(self, label: str, weights: str) -> Subject:
        """Open a model with its parameters on the current mesh, or else the default device.

        weights: "ema" | "student".

        Only the latest model is kept in memory.
        """
        name = (label, weights)
        if self._latest is None or self._latest[0] != name:
            self._latest = None  # free it before reading the next one
            path, options = self._places[label]
            bundle = _open(path, which=weights, **options)
            params = bundle.device_params(mesh_lib.put)
            if name not in self._facts:
                self._facts[name] = _facts(bundle, bundle_lib.content_hash(params))
            self._latest = name, _subject(label, bundle, params, self._facts[name])
        return self._latest[1]


def _pinned(
    path: pathlib.Path, options: Mapping[str, Any]
) -> tuple[pathlib.Path, Mapping[str, Any]]:
    """Pin a run folder to its current checkpoint, in case it is still training."""
    if not run_folder.is_run_folder(path):
        return path, options
    return run_folder.pinned(path, options.get("stage", "")), {**options, "stage": ""}


def _open(path: pathlib.Path, **options: Any) -> Bundle:
    bundle = formats.open_bundle(path, **options)
    if bundle.tokenizer is None:
        raise ValueError(
            f"{path} has no tokenizer; give that of its training with --tokenizer=gpt2, or "
            "--tokenizer=PATH of a tokenizer.json."
        )
    return bundle


def _subject(label: str, bundle: Bundle, params: Params, facts: dict[str, Any]) -> Subject:
    return Subject(
        label,
        _stage_of(bundle),
        params,
        generate_lib.portable(bundle.model),
        bundle.process(),
        bundle.tokenizer,
        facts,
    )


def _stage_of(bundle: Bundle) -> str:
    """Return the stage of a model, from its file's record or else from its network."""
    said = bundle.provenance.get("stage")
    if said in stages.NAMES:
        return said
    if bundle.model.causal:
        return "autoregressive"
    return "pretrain" if bundle.model.conditioning == "none" else UNKNOWN_FEW_STEP


# Fields of a network that affect only training.
_WITHOUT_EFFECT = ("dropout", "remat")


def _facts(bundle: Bundle, sha256: str) -> dict[str, Any]:
    known = {key: bundle.provenance.get(key) for key in ("run", "stage", "weights", "step")}
    # Not everything can be inferred from the weights, for example the number of heads.
    network = dataclasses.asdict(bundle.model)
    digests = {
        key: recipe.digest(bundle.provenance[key])
        for key in ("config", "recipe")
        if bundle.provenance.get(key)
    }
    return (
        known
        | {
            "sha256": sha256,
            "tokenizer": bundle.tokenizer.fingerprint,
            "path": dict(bundle.path),
            "network": {k: v for k, v in network.items() if k not in _WITHOUT_EFFECT},
        }
        | {f"{key}_sha256": value for key, value in digests.items()}
    )


def parse_models(text: str) -> Mapping[str, tuple[pathlib.Path, str]]:
    """Parse comma-separated "LABEL=PATH" or "LABEL=PATH#RUN" into label -> (path, run).

    Raises:
      ValueError: for anything else, or a repeated label.
    """
    result: dict[str, tuple[pathlib.Path, str]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        label, is_there, rest = part.partition("=")
        path, _, run = rest.partition("#")
        if not (re.fullmatch(r"[\w.]+", label) and is_there and path) or label in result:
            raise ValueError(
                f"eval.models={text!r}: expected comma-separated LABEL=PATH or LABEL=PATH#RUN with "
                f"unique labels of letters, digits, '_' and '.', got {part!r}."
            )
        result[label] = pathlib.Path(path).expanduser(), run
    return result
