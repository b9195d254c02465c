"""All formats behind two functions: `open_bundle` detects the format, `write` takes its name.

    official      X.pth                    the published layout, PyTorch's file format
    safetensors   X.safetensors, a folder  see safetensors.py
    orbax         a folder                 our checkpoints, see run_folder.py
    sampler       a folder                 an exported program with its weights, see exported.py
    hub           a folder                 the layout of the Hugging Face Hub, see hub.py

`.npz` files with an official state dict can be read too.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from fsdfm_jax.convert import exported, hub, official, run_folder
from fsdfm_jax.convert import safetensors as safetensors_lib
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.data.tokenizer import Tokenizer
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference.bundle import BadFile, Bundle, Leaf
from fsdfm_jax.training import checkpoint

# The bundled few-step model and its base model, made by `python -m launch.bundle`.
BUNDLED = pathlib.Path(__file__).parents[1] / "bundled" / "model.safetensors"
BUNDLED_BASE = BUNDLED.with_name("base.safetensors")
FORMATS = ("official", "safetensors", "orbax", "sampler", "hub")
_SUFFIXES = {".pth": "official", ".pt": "official", ".safetensors": "safetensors"}
_GPT2_TOKENS = 50_257


def open_bundle(
    path: str | os.PathLike,
    *,
    which: str = "ema",
    num_heads: int | None = None,
    tokenizer: str = "",
    stage: str = "",
    source: str = "",
) -> Bundle:
    """Open a model of any format; its parameters are read on demand.

    Args:
      path: file or folder.
      which: set of weights, "ema" | "student" | "teacher" | "model", if the file has several.
      num_heads: H, for an official file that doesn't record it; None for heads of width 64.
      tokenizer: "gpt2" or the path of a tokenizer.json, if the file has none. If the file records
        its tokenizer, it must be the same.
      stage: run of a working directory; "" for the last trained one.
      source: noise, for an official file that doesn't record it, "uniform" | "mask"; "" infers it
        from the vocabulary and the tokenizer.

    Returns:
      The bundle. A file with GPT-2's vocabulary gets GPT-2's tokenizer if that is installed.

    Raises:
      ValueError: the file is damaged, malicious or of an unknown format.
      FileNotFoundError: `path` doesn't exist.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}.")
    if source not in ("", "uniform", "mask"):
        raise ValueError(f"Unknown source {source!r}; expected 'uniform' or 'mask'.")
    given = tokenizer_lib.load(tokenizer) if tokenizer else None
    name = _format_of(path)
    if stage and name != "orbax":
        raise ValueError(f"stage={stage!r} selects a run of a working directory; {path} isn't one.")
    if which != "ema" and name in ("sampler", "safetensors", "hub"):
        raise ValueError(f"{path} has one set of weights; omit which={which!r}.")
    if name == "sampler":
        exported.check(path)
        bundle = _read_safetensors(path / exported.MODEL, num_heads, given, source)
    elif name == "orbax":
        bundle = run_folder.read(path, which=which, stage=stage)
    elif name == "safetensors":
        bundle = _read_safetensors(path, num_heads, given, source)
    elif name == "hub":
        bundle = hub.with_sampling(_read_safetensors(path, num_heads, given, source), path)
    else:
        bundle = _read_official(path, which, num_heads, given, source)
    bundle = _with_source(_with_tokenizer(bundle, given, path), source, path)
    _check_vocabulary(bundle, path)
    if num_heads is not None and num_heads != bundle.model.num_heads:
        raise ValueError(f"{path} has {bundle.model.num_heads} heads, got num_heads={num_heads}.")
    provenance = dict(bundle.provenance)
    provenance.setdefault("source", {"file": path.name, "format": name})
    if bundle.tokenizer is not None:
        provenance["tokenizer"] = bundle.tokenizer.fingerprint
    return dataclasses.replace(bundle, provenance=provenance)


def _format_of(path: pathlib.Path) -> str:
    """Detect the format of `path`, one of `FORMATS`; BadFile for an unknown folder."""
    if exported.is_exported(path):
        return "sampler"
    if run_folder.is_run_folder(path):
        return "orbax"
    if safetensors_lib.is_safetensors(path):
        return "hub" if hub.is_hub(path) else "safetensors"
    if path.is_file():
        return "official"
    raise BadFile(
        f"{path} is a folder of unknown format; expected a working directory, a run with "
        "checkpoints/, a folder with .safetensors files (as on the Hub) or an exported sampler."
    )


def _read_safetensors(path, num_heads, given, source) -> Bundle:
    tensors, description, text = safetensors_lib.read(path)
    own = bundle_lib.read_tokenizer(text, f"the tokenizer of {path}")
    tensors_are_official = "vocab_embed.weight" in tensors
    if description is None:
        if not tensors_are_official:
            raise BadFile(
                f"{path} doesn't describe its network: expected this project's metadata, a "
                "config.json beside it, or the names of the official layout."
            )
        return _describe_official(tensors, path, num_heads, given or own, source, {})
    if tensors_are_official:
        try:
            model = bundle_lib.make_model(description["model"])
            tensors = official.to_leaves(tensors, model)
        except BadFile:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(f"{path} doesn't describe a model: {str(error)[:300]}") from error
    return bundle_lib.from_parts(tensors, description, own, str(path))


def _read_official(path, which, num_heads, given, source) -> Bundle:
    file = official.StateFile(path)
    tensors, found = file.state_dict(which)
    text = file.tree.get("fsdfm_jax") if isinstance(file.tree, dict) else None
    if isinstance(text, str):
        description = bundle_lib.parse_json(text, f"the description in {path}")
        own = bundle_lib.read_tokenizer(
            str(description.pop("tokenizer", "")), f"the tokenizer in {path}"
        )
        cfg = official.infer_config(tensors, num_heads)
        leaves = official.to_leaves(tensors, cfg)
        bundle = bundle_lib.from_parts(leaves, description, own, str(path))
        shapes = ("vocab_size", "width", "num_blocks", "num_heads", "cond_width", "mlp_ratio")
        for field in (*shapes, "conditioning"):
            ours, theirs = getattr(cfg, field), getattr(bundle.model, field)
            if ours != theirs:
                raise BadFile(f"{path} describes {field}={theirs}, but its tensors have {ours}.")
        return bundle
    said = {"weights": found, "step": file.step}
    return _describe_official(tensors, path, num_heads, given, source, said)


def _describe_official(
    tensors: dict[str, Leaf],
    path: pathlib.Path,
    num_heads: int | None,
    tokenizer: Tokenizer | None,
    source: str,
    said: dict[str, Any],
) -> Bundle:
    """Make a bundle of weights without our metadata."""
    cfg = official.infer_config(tensors, num_heads)
    leaves = official.to_leaves(tensors, cfg)
    if tokenizer is None and cfg.vocab_size in (_GPT2_TOKENS, _GPT2_TOKENS + 1):
        try:
            tokenizer = tokenizer_lib.load("gpt2")
        except ValueError:  # not installed; weights can be converted without it
            tokenizer = None
    assumed = not source and tokenizer is None and cfg.vocab_size != _GPT2_TOKENS + 1
    if not source:
        plain = _GPT2_TOKENS if tokenizer is None else tokenizer.vocab_size
        source = "mask" if cfg.vocab_size == plain + 1 else "uniform"
    path_keys = bundle_lib.DEFAULT_PATH | {"source": source}
    said = said | ({"source_is_assumed": True} if assumed else {})
    return Bundle(cfg, leaves, path_keys, tokenizer, None, _PROVENANCE | said)


_PROVENANCE = dict.fromkeys(
    ("run", "stage", "weights", "step", "ema_decay", "data", "tokenizer", "code_version")
)


def _with_tokenizer(bundle: Bundle, given: Tokenizer | None, path: pathlib.Path) -> Bundle:
    if given is None:
        return bundle
    trained_with = bundle.provenance.get("tokenizer")
    if trained_with not in (None, given.fingerprint):
        raise ValueError(
            f"{path} was trained with tokenizer {trained_with}, but the given one is "
            f"{given.fingerprint}: their token ids mean different text."
        )
    return dataclasses.replace(bundle, tokenizer=given)


def _with_source(bundle: Bundle, source: str, path: pathlib.Path) -> Bundle:
    if not source or bundle.path.get("source") == source:
        return bundle
    if not bundle.provenance.get("source_is_assumed"):
        raise ValueError(
            f"{path} records the noise {bundle.path['source']!r}, got source={source!r}."
        )
    said = {k: v for k, v in bundle.provenance.items() if k != "source_is_assumed"}
    return dataclasses.replace(bundle, path=dict(bundle.path) | {"source": source}, provenance=said)


def _check_vocabulary(bundle: Bundle, path: pathlib.Path) -> None:
    tokenizer = bundle.tokenizer
    if tokenizer is None:
        return
    if tokenizer.vocab_size != bundle.num_tokens:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, but the network in {path} has "
            f"{bundle.num_tokens} without its mask token ({bundle.path['source']} noise); give the "
            "tokenizer (and source) of its training."
        )


# ---------------------------------------------------------------------------------------- writing


@dataclasses.dataclass(frozen=True)
class Target:
    """What to write.

    Attributes:
      path: file or folder.
      to: one of `FORMATS`; "" infers it from the suffix.
      layout: names in safetensors, "ours" | "official".
      dtype: of the weights in official, safetensors and hub files, "float32" | "bfloat16".
      steps, length, sampling: of an exported sampler, see `exported.write`.
      report: folder of a report, for the model card of "hub", see `hub.write`.
    """

    path: pathlib.Path
    to: str = ""
    layout: str = "ours"
    dtype: str = "float32"
    steps: tuple[int, ...] = ()
    length: int | None = None
    sampling: Sampling | None = None
    report: pathlib.Path | None = None

    @property
    def format(self) -> str:
        """The format; ValueError if neither `to` nor the suffix gives one."""
        by_suffix = _SUFFIXES.get(self.path.suffix.lower(), "")
        if self.to and self.to not in FORMATS:
            raise ValueError(f"Unknown format {self.to!r}; expected one of {', '.join(FORMATS)}.")
        if self.to and by_suffix and self.to != by_suffix:
            raise ValueError(
                f"{self.path.name} has the suffix of the format {by_suffix!r}, got to={self.to!r}."
            )
        if not (self.to or by_suffix):
            raise ValueError(
                f"{self.path.name} has no known suffix; give --to={'|'.join(FORMATS)} for a "
                f"folder, or one of the suffixes {', '.join(_SUFFIXES)}."
            )
        if self.to == "official" and not by_suffix:
            raise ValueError(f"An official checkpoint must be named X.pth, got {self.path.name!r}.")
        return self.to or by_suffix


def check_target(
    bundle: Bundle,
    target: Target,
    *,
    source: pathlib.Path | None = None,
    overwrite: bool = False,
) -> None:
    """Check a target before any work.

    Args:
      bundle: the bundle to write.
      target: where and how.
      source: path of the bundle's source, which the target must not replace.
      overwrite: whether to replace an existing model of the same format.

    Raises:
      ValueError: the format is unknown or can't store this network, or the target exists.
    """
    if target.dtype not in bundle_lib.DTYPES:
        known = ", ".join(bundle_lib.DTYPES)
        raise ValueError(f"Unknown dtype {target.dtype!r}; expected one of {known}.")
    if target.format in ("orbax", "sampler") and target.dtype != "float32":
        raise ValueError(
            f"The format {target.format!r} has float32 weights, got dtype={target.dtype!r}."
        )
    if target.format != "safetensors" and target.layout != "ours":
        raise ValueError("layout is an option only of safetensors.")
    options = ("steps", "length", "sampling")
    given = [name for name in options if getattr(target, name)]
    if given and target.format != "sampler":
        raise ValueError(f"{', '.join(given)}: only for an exported sampler (--to=sampler).")
    if target.report is not None:
        if target.format != "hub":
            raise ValueError("report: only for the card of --to=hub; omit it.")
        hub.read_report(target.report)
    if target.format == "official" or target.layout == "official":
        official.check_layout(bundle.model)
    if target.format == "orbax":
        checkpoint.absolute(target.path.resolve())  # raises if the path can't hold a checkpoint
    _check_place(target, source, overwrite)


def _check_place(target: Target, source: pathlib.Path | None, overwrite: bool) -> None:
    path = target.path.resolve()
    if source is not None:
        source = source.resolve()
        if path == source or path in source.parents:
            raise ValueError(f"The target {target.path} is the source, or contains it.")
    parents = [parent for parent in path.parents if parent.exists()]
    if not parents or not parents[0].is_dir():
        raise ValueError(f"{target.path} can't be made: one of its parents is a file.")
    if not path.exists():
        return
    if not overwrite:
        raise ValueError(f"{target.path} already exists; choose another name or give --overwrite.")
    if not _replaceable(path, target.format):
        raise ValueError(
            f"{target.path} isn't just a model of the format {target.format!r}, so it is not "
            "overwritten. Choose another name."
        )


# Patterns of the files in a folder of each format.
_CONTENTS = {
    "orbax": ("checkpoints", "tokenizer.json"),
    "safetensors": ("model*.safetensors", "model.safetensors.index.json", "*.json"),
    "hub": hub.CONTENTS,
}


def _replaceable(path: pathlib.Path, name: str) -> bool:
    if path.is_file():
        return _SUFFIXES.get(path.suffix.lower()) == name
    if name == "sampler":
        return exported.is_exported(path)
    patterns = _CONTENTS.get(name, ())
    return all(any(child.match(p) for p in patterns) for child in path.iterdir())


def write(
    bundle: Bundle,
    target: Target,
    *,
    source: pathlib.Path | None = None,
    overwrite: bool = False,
    before_publishing: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Write a bundle atomically: under a temporary name that is renamed at the end.

    Args:
      bundle, target, source, overwrite: see `check_target`. Links are followed.
      before_publishing: called with the finished file or folder under its temporary name; if it
        raises, nothing is left behind.

    Raises:
      ValueError: as `check_target`.
    """
    check_target(bundle, target, source=source, overwrite=overwrite)
    path = target.path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keep the suffix, which determines the format.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    _remove(temporary)
    try:
        _write(bundle, dataclasses.replace(target, path=temporary))
        if before_publishing is not None:
            before_publishing(temporary)
        _publish(temporary, path)
    finally:
        _remove(temporary)


def _publish(temporary: pathlib.Path, path: pathlib.Path) -> None:
    if not path.is_dir():
        os.replace(temporary, path)
        return
    aside = path.with_name(
        f".{os.getpid()}.old.{path.name}"
    )  # folders can't be replaced atomically
    os.replace(path, aside)
    try:
        os.replace(temporary, path)
    except OSError:
        os.replace(aside, path)
        raise
    _remove(aside)


def _write(bundle: Bundle, target: Target) -> None:
    path, name = target.path, target.format
    if name == "official":
        tokenizer = "" if bundle.tokenizer is None else bundle.tokenizer.to_json()
        description = bundle_lib.describe(bundle) | {"tokenizer": tokenizer}
        official.write_file(
            path,
            bundle,
            step=bundle.provenance.get("step") or 0,
            dtype=target.dtype,
            extra={"fsdfm_jax": json.dumps(description)},
        )
    elif name == "safetensors":
        one_file = path.suffix.lower() == safetensors_lib.SUFFIX
        write_it = safetensors_lib.write_file if one_file else safetensors_lib.write_folder
        write_it(path, bundle, layout=target.layout, dtype=target.dtype)
    elif name == "orbax":
        run_folder.write(path, bundle)
    elif name == "hub":
        hub.write(path, bundle, dtype=target.dtype, report=target.report)
    else:
        exported.write(
            path,
            bundle,
            steps=target.steps,
            length=target.length,
            sampling=target.sampling,
        )


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
