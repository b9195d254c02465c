"""The models that are evaluated, from any file, and what a protocol stamp says of each."""

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

# What `stage` says of a model whose file doesn't.
UNKNOWN_FEW_STEP = "few-step"


class Subject(NamedTuple):
    """A model to evaluate.

    Attributes:
      label: its name in tables.
      stage: one of `stages.NAMES`, or "few-step" where the file doesn't say which.
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
    """The models of a working directory, and further ones.

    Args:
      folder: the working directory.
      trained: run -> stage, all of them trained, in the order of the pipeline.
      further: `eval.models`.
      runs: which are to be evaluated; all by default.
      **options: of `formats.open_bundle`, for the further ones.

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
    """Both, if no label stands for two models.

    Raises:
      ValueError: naming the label.
    """
    if twice := sorted(places.keys() & further.keys()):
        raise ValueError(
            f"eval.models names {twice[0]!r}, which is a model of its own here; choose another "
            "label."
        )
    return {**places, **further}


def open_workdir(
    folder: pathlib.Path, further: str, runs: Sequence[str] | None = None, **options: Any
) -> "Catalogue":
    """The trained models of a working directory, and further ones.

    Args:
      folder: the working directory.
      further: `eval.models`.
      runs: which of its runs are to be evaluated; all that are trained by default.
      **options: of `formats.open_bundle`, for the further ones.

    Raises:
      ValueError: for runs that aren't there or weren't trained.
    """
    config = pipeline.load_config(folder)
    trained = {
        run: stage
        for run, stage in pipeline.runs(config)
        if workdir.is_trained(workdir.stage_directory(folder, run))
    }
    if unknown := sorted(set(runs or ()) - trained.keys()):
        raise ValueError(
            f"{folder} has no trained run {unknown[0]!r}; expected some of {', '.join(trained)}."
        )
    return catalogue(folder, trained, further, runs, **options)


def prepared_text(folder: pathlib.Path) -> PreparedData:
    """The text that a working directory was trained on."""
    return prepared_lib.load(pipeline.data_directory(folder, pipeline.load_config(folder)))


def further_places(text: str, **options: Any) -> dict[str, tuple[pathlib.Path, dict[str, Any]]]:
    """The models that `eval.models` names, as `Catalogue` takes them."""
    return {
        label: (path, options | ({"stage": run} if run else {}))
        for label, (path, run) in parse_models(text).items()
    }


class Catalogue:
    """The models that an evaluation may open, each when it is needed and once.

    Args:
      places: label -> (path, options of `formats.open_bundle`), in order.
      judge: label of the in-house judge; None for the last autoregressive model among them.
      unlisted: labels that may be opened and aren't to be evaluated, the judge's perhaps.

    Attributes:
      judge: label of the in-house judge, None if there is none.
      stage_of: label -> stage of those to be evaluated.
      tokenizer: of all of them.
      block_length: the greatest they were trained on, None if unknown.
      num_params: label -> number of parameters.

    Raises:
      ValueError: if there is no model, if one can't be opened, or if two have different tokenizers.
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
                    f"{label} has tokenizer {bundle.tokenizer.fingerprint}, {first[0]} has "
                    f"{self.tokenizer.fingerprint}: their samples have different tokens; evaluate "
                    "them one by one, with a judge that reads text."
                )
        lengths = [b.block_length for b in bundles.values() if b.block_length is not None]
        self.block_length = max(lengths, default=None)
        self.num_params = {label: bundle.num_params() for label, bundle in bundles.items()}

    def facts(self, label: str, weights: str) -> dict[str, Any]:
        """What identifies a model, see `Subject`; reads its parameters at the first call."""
        if (label, weights) not in self._facts:
            self.open(label, weights)
        return self._facts[label, weights]

    def open(self, label: str, weights: str) -> Subject:
        """A model with its parameters on the mesh that is set, or else the default device.

        weights: "ema" | "student".

        The latest one is kept, so that a machine needn't hold all of them.
        """
        name = (label, weights)
        if self._latest is None or self._latest[0] != name:
            self._latest = None  # dropped before the next one is read
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
    """A place that stands for the same weights later, also while they are trained."""
    if not run_folder.is_run_folder(path):
        return path, options
    return run_folder.pinned(path, options.get("stage", "")), {**options, "stage": ""}


def _open(path: pathlib.Path, **options: Any) -> Bundle:
    bundle = formats.open_bundle(path, **options)
    if bundle.tokenizer is None:
        raise ValueError(
            f"{path} holds no tokenizer; give the one it was trained with: --tokenizer=gpt2, or "
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
    """The stage that a model is of, by what its file says or else by its network."""
    said = bundle.provenance.get("stage")
    if said in stages.NAMES:
        return said
    if bundle.model.causal:
        return "autoregressive"
    return "pretrain" if bundle.model.conditioning == "none" else UNKNOWN_FEW_STEP


# Fields of a network that matter in training only.
_WITHOUT_EFFECT = ("dropout", "remat")


def _facts(bundle: Bundle, sha256: str) -> dict[str, Any]:
    known = {key: bundle.provenance.get(key) for key in ("run", "stage", "weights", "step")}
    # Weights don't show all of it: the number of heads leaves no trace in them.
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
    """label -> (path, run) of further models, "LABEL=PATH" or "LABEL=PATH#RUN" between commas.

    Raises:
      ValueError: for anything else, or two models of one label.
    """
    result: dict[str, tuple[pathlib.Path, str]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        label, is_there, rest = part.partition("=")
        path, _, run = rest.partition("#")
        if not (re.fullmatch(r"[\w.]+", label) and is_there and path) or label in result:
            raise ValueError(
                f"eval.models={text!r}: expected LABEL=PATH or LABEL=PATH#RUN between commas, each "
                f"label once and of letters, digits, '_' and '.', got {part!r}."
            )
        result[label] = pathlib.Path(path).expanduser(), run
    return result
