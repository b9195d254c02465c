"""Exported samplers: a folder with programs, weights and an example, without this package.

    config.json           signature of the programs; `FORMAT`, steps, length, sampler, checksums
    model.safetensors     weights, with config and tokenizer as metadata
    sampler-S.jaxexport   the S-step sampler, serialised by `jax.export` for all of `PLATFORMS`:
                          (weights, seed, given_BL, frozen_BL, temperature, cooling, look_ahead
                          [, top_p]) -> tokens_BL; the batch size is free, S and L are fixed
    tokenizer.json        if there is one
    run.py, prompts.py    example program (convert/run_exported.py, inference/prompts.py)
    requirements.txt, README.md

The same seed gives the tokens of `inference.generate`. Jump rule and time grid are compiled in; the
numbers are inputs. Programs always use attention "manual" and remat "none", because fused kernels
are specific to a device. bfloat16 activations are kept.

Reading verifies the checksums. They don't tell who made the folder: a program is code, so run it
only if you trust its origin.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fsdfm_jax import io
from fsdfm_jax.convert import safetensors as safetensors_lib
from fsdfm_jax.flow.sampling import Sampling
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference import prompts
from fsdfm_jax.inference.bundle import BadFile, Bundle
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params

FORMAT = "fsdfm_jax.exported_sampler"
VERSION = 4
PLATFORMS = ("cpu", "cuda", "tpu")
MODEL, CONFIG = "model.safetensors", "config.json"
_PACKAGES = ("jax", "numpy", "flatbuffers", "safetensors", "tokenizers", "ml_dtypes")
_NUMBERS = ("temperature", "cooling", "look_ahead", "top_p")
_MOST_STEPS = _MOST_LENGTH = 2**20
_README = """# {name}: text in {steps} steps

    pip install -r requirements.txt
    python run.py{prompt}

`run.py --help` lists the options: the number of steps (one program each: {steps}), a seed, a
temperature{choices}. The same seed gives the same text. `config.json` describes the inputs.

A program (`.jaxexport`) is code: run it only if you trust its origin.
"""


# ---------------------------------------------------------------------------------------- writing
def write(
    folder: pathlib.Path,
    bundle: Bundle,
    *,
    steps: Sequence[int] = (),
    length: int | None = None,
    sampling: Sampling | None = None,
) -> None:
    """Export a few-step sampler.

    Args:
      folder: must not exist; after an error the caller removes it.
      bundle: the model; not autoregressive.
      steps: numbers of network calls, one program each; empty for the steps of `sampling`.
      length: L, tokens per sample; None for the model's training block length.
      sampling: settings; None for the model's default.

    Raises:
      ValueError: for an autoregressive network, an unknown or invalid length, or one that exceeds
        the network's learned positions.
      FileExistsError: the folder exists.
    """
    if bundle.model.causal:
        raise ValueError(
            "An autoregressive network has no few-step sampler to export; use weights of a base or "
            "few-step stage."
        )
    sampling = sampling or bundle.sampling()
    samplings = [sampling.replace(steps=s) for s in steps or (sampling.steps,)]
    length = bundle.block_length if length is None else length
    if length is None or not 1 <= length <= _MOST_LENGTH:
        raise ValueError(
            f"length must be in 1 .. {_MOST_LENGTH}, got {length}; the default is the training "
            f"block length, which is {bundle.block_length or 'unknown'} here."
        )
    bundle.model.check_length(length)
    folder.mkdir(parents=True)
    bundle = _sampled_by(bundle, samplings[0])
    safetensors_lib.write_file(folder / MODEL, bundle, layout="ours", dtype="float32")
    for each in samplings:
        program = _export(bundle, each, length)
        (folder / _program(each.steps)).write_bytes(program.serialize())
    if bundle.tokenizer is not None:
        bundle.tokenizer.save(folder / "tokenizer.json")
    for name, source in (
        ("run.py", pathlib.Path(__file__).with_name("run_exported.py")),
        ("prompts.py", pathlib.Path(prompts.__file__)),
    ):
        (folder / name).write_bytes(source.read_bytes())
    versions = [f"{name}=={importlib.metadata.version(name)}\n" for name in _PACKAGES]
    io.write_text(folder / "requirements.txt", "".join(versions))
    io.write_text(folder / "README.md", _readme(bundle, samplings))
    files = sorted(child.name for child in folder.iterdir())
    config = {
        "format": FORMAT,
        "version": VERSION,
        "steps": [each.steps for each in samplings],
        "length": length,
        "sampling": samplings[0].to_dict(),
        "mask_id": bundle.process().source.mask_id,
        "inputs": _input_names(sampling),
        "platforms": list(PLATFORMS),
        "sha256": {name: _sha256(folder / name) for name in files},
    }
    io.write_json(folder / CONFIG, config)


def portable(model: ModelConfig) -> ModelConfig:
    """Change the network for export: for any device, with small chunks (the batch is symbolic)."""
    mib = min(model.logits_mib, ModelConfig.logits_mib)
    return dataclasses.replace(model, attention="manual", remat="none", logits_mib=mib)


def _program(steps: int) -> str:
    return f"sampler-{steps}.jaxexport"


def _sampled_by(bundle: Bundle, sampling: Sampling) -> Bundle:
    """Return the model with these default sampling settings, ignoring the number of steps."""
    if bundle.sampling().replace(steps=sampling.steps) == sampling:
        return bundle
    return bundle_lib.sampled_by(bundle, sampling)


def _input_names(sampling: Sampling) -> list[str]:
    names = ["weights", "seed", "given", "frozen", *_NUMBERS]
    return names if sampling.top_p is not None else names[:-1]


def _export(bundle: Bundle, sampling: Sampling, length: int) -> export.Exported:
    """Export the program; needs only the shapes of the parameters."""
    generate = generate_lib.make_generator(portable(bundle.model), bundle.process())
    names = _input_names(sampling)

    def sample(weights, seed, given_BL, frozen_BL, *numbers):
        values = dict(zip(names[4:], numbers, strict=True))
        params = bundle_lib.unflatten(weights)
        return generate(params, seed, given_BL, frozen_BL, sampling.replace(**values))

    (batch,) = export.symbolic_shape("b")
    shapes = bundle_lib.expected_shapes(bundle.model)
    weights = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    tokens = [jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (jnp.int32, bool)]
    numbers = [jax.ShapeDtypeStruct((), jnp.float32) for _ in names[4:]]
    arguments = (weights, jax.ShapeDtypeStruct((), jnp.uint32), *tokens, *numbers)
    with _no_locations():
        return export.export(jax.jit(sample), platforms=PLATFORMS)(*arguments)


@contextlib.contextmanager
def _no_locations():
    """Omit source locations, which contain paths of this machine, from a program."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _readme(bundle: Bundle, samplings: Sequence[Sampling]) -> str:
    named = bundle.tokenizer is not None
    return _README.format(
        name=bundle.provenance.get("run") or "exported sampler",
        steps=", ".join(str(each.steps) for each in samplings),
        prompt=' --prompt "It was"' if named else "",
        choices=", a prompt or a text with gaps" if named else "",
    )


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------- reading
def is_exported(folder: pathlib.Path) -> bool:
    """Return whether a folder is marked as an exported sampler; never raises."""
    for name in (CONFIG, "signature.json"):  # the latter up to version 3
        try:
            config = bundle_lib.parse_json(bundle_lib.read_text(folder / name), name)
        except (BadFile, OSError):
            continue
        if config.get("format") == FORMAT:
            return True
    return False


def check(folder: pathlib.Path) -> dict[str, Any]:
    """Check an exported sampler and return its config.json.

    Raises:
      BadFile: the folder is of another version, incomplete or damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise BadFile(
            f"{folder} was exported by an earlier version; export it again with this one, or use "
            "its run.py."
        )
    config = bundle_lib.parse_json(bundle_lib.read_text(path), str(path))
    if config.get("version") != VERSION:
        raise BadFile(
            f"{path} has version {str(config.get('version'))[:40]}, but this package reads "
            f"{VERSION}; export the model again."
        )
    sums, steps = config.get("sha256"), config.get("steps")
    whole = lambda value, most: type(value) is int and 1 <= value <= most
    if (
        not isinstance(sums, dict)
        or not isinstance(steps, list)
        or not steps
        or not all(whole(each, _MOST_STEPS) for each in steps)
        or not whole(config.get("length"), _MOST_LENGTH)
        or not {MODEL, *map(_program, steps)} <= sums.keys()
    ):
        raise BadFile(f"{path} doesn't describe an exported sampler; export the model again.")
    for name, expected in sums.items():
        inside = isinstance(name, str) and pathlib.PurePath(name).name == name
        if not inside or not (folder / name).is_file() or _sha256(folder / name) != expected:
            raise BadFile(f"{folder / str(name)[:80]} is missing or damaged; export it again.")
    return config


def call(
    folder: pathlib.Path,
    params: Params,
    sampling: Sampling,
    *,
    seed: int,
    given_BL: np.ndarray,
    frozen_BL: np.ndarray,
) -> np.ndarray:
    """Draw tokens with the program in a folder, as run.py does.

    Args:
      folder: of an exported sampler.
      params: of its model.
      sampling: its steps select the program, its numbers are inputs.
      seed, given_BL, frozen_BL: as in `inference.generate`.

    Returns:
      int32 [B, L].

    Raises:
      BadFile: see `check`; also for a program that can't be read.
      ValueError: if there is no program with this number of steps.
    """
    config = check(folder)
    if sampling.steps not in config["steps"]:
        raise ValueError(
            f"{folder} has programs for {', '.join(map(str, config['steps']))} steps, got "
            f"steps={sampling.steps}."
        )
    try:
        program = export.deserialize(bytearray((folder / _program(sampling.steps)).read_bytes()))
    except Exception as error:  # the library raises many types for damaged files
        problem = bundle_lib.first_line(error)
        raise BadFile(f"{folder / _program(sampling.steps)} can't be read: {problem}") from error
    values = sampling.to_dict()
    numbers = [np.float32(values[name]) for name in config["inputs"][4:]]
    weights = bundle_lib.flatten(params)
    return np.asarray(program.call(weights, np.uint32(seed), given_BL, frozen_BL, *numbers))
