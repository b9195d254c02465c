"""A sampler as a folder that runs without this package: program, weights, example.

    sampler.jaxexport  the S-step sampler as `jax.export` serialises it, for all of `PLATFORMS`:
                       (weights, seed, given_BL, frozen_BL, grid_S1, temperature, cooling,
                       look_ahead, ..) -> tokens_BL; weights are an argument, the batch is free,
                       S and L are fixed
    weights.npz        path -> float32 array
    tokenizer.json     if there is one
    neighbours.npz     counts of the training text, of a sampler whose draws heed their neighbours
    ngrams.py          makes them the table that its program takes (fsdfm_jax/inference/ngrams.py)
    signature.json     inputs with their defaults, outputs, network, noising process, provenance,
                       sha256 of all files
    flatbuffers.zip    the package flatbuffers, with which `jax.export` reads programs and which
                       `pip install jax` doesn't bring
    run.py             how to call it all (convert/run_exported.py)

It samples as the model is sampled unless one says otherwise (`Bundle.sampling`), and the same seed
gives the tokens of `inference.generate`. All of it but the jump rule are inputs, nucleus and
neighbours only where the model has them. The program holds attention "manual" and remat "none"
whatever the network was trained with: fused kernels belong to one kind of device. bfloat16
activations stay.

Reading checks sizes and checksums before anything is allocated or trusted. What no checksum can
tell is who made the folder: a program is code, so run only what comes from where you trust.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export

from fsdfm_jax import io
from fsdfm_jax.data import tokenizer
from fsdfm_jax.flow import jumps, sampler
from fsdfm_jax.flow.process import Process
from fsdfm_jax.inference import bundle as bundles
from fsdfm_jax.inference import generate as generate_lib
from fsdfm_jax.inference import ngrams
from fsdfm_jax.inference.bundle import BadFile, Bundle, Leaf
from fsdfm_jax.inference.neighbours import Neighbours
from fsdfm_jax.inference.ngrams import Counts, Table
from fsdfm_jax.network.config import ModelConfig
from fsdfm_jax.network.model import Params

FORMAT = "fsdfm_jax.exported_sampler"
VERSION = 3
PLATFORMS = ("cpu", "cuda", "tpu")

_SIGNATURE, _WEIGHTS, _PROGRAM = "signature.json", "weights.npz", "sampler.jaxexport"
_TOKENIZER, _RUN, _FLATBUFFERS = "tokenizer.json", "run.py", "flatbuffers.zip"
_COUNTS, _NGRAMS = "neighbours.npz", "ngrams.py"
_MAX_SIGNATURE = 1 << 26  # bytes, of a grid of the most steps; usual ones have some thousands
_MAX_STEPS = _MAX_LENGTH = 1 << 20
_CHUNK = 1 << 20  # bytes
_NPY_MAGIC = b"\x93NUMPY\x01\x00"


# -------------------------------------------------------------------------------- how it is sampled


class How(NamedTuple):
    """How an exported sampler draws.

    Attributes:
      jump_rule: of the first S-1 steps.
      defaults: of the inputs that have one, JSON: "grid" (S+1 times), "temperature", "cooling",
        "look_ahead"; "top_p" if that isn't 1, or else the program draws from all tokens;
        "neighbours" if it heeds them.
      contexts: C of the table of neighbours, None without one.
    """

    jump_rule: str
    defaults: dict[str, Any]
    contexts: int | None


def sampled_by(bundle: Bundle, **changes: Any) -> Bundle:
    """A model whose configuration says otherwise how it is sampled.

    Args:
      **changes: keys of `inference.PUBLISHED`; None leaves what it says.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    if not changes:
        return bundle
    config = dict(bundle.provenance.get("config") or {})
    config["eval"] = dict(config.get("eval") or {}) | changes
    return dataclasses.replace(bundle, provenance=dict(bundle.provenance) | {"config": config})


def how_of(bundle: Bundle, steps: int) -> How:
    """How a model is exported: as it is sampled.

    Raises:
      ValueError: for values outside their range, or neighbours that can't be heeded
        (`inference.check_neighbours`).
    """
    numbers = bundle.sampling()
    jump_rule, shape = numbers.pop("few_step_jump"), numbers.pop("grid")
    generate_lib.check_settings(steps=steps, **numbers)
    jumps.get_rule(jump_rule)
    generate_lib.check_neighbours(
        numbers["neighbours"], jump_rule, has_table=bundle.counts is not None
    )
    left_out = {"top_p": 1, "neighbours": 0}
    used = {key: float(x) for key, x in numbers.items() if x != left_out.get(key)}
    grid = [float(time) for time in sampler.make_grid(shape, steps)]
    contexts = len(bundle.counts().sizes_C) if "neighbours" in used else None
    return How(jump_rule, {"grid": grid} | used, contexts)


def _check_how(how: How, steps: int) -> None:
    """ValueError for a `How` out of a file by which nothing can be drawn."""
    numbers = {key: value for key, value in how.defaults.items() if key != "grid"}
    if any(type(time) is not float for time in how.defaults["grid"]):
        raise ValueError("its default grid holds other things than times")
    generate_lib.check_settings(**numbers)
    jumps.get_rule(how.jump_rule)
    if len(sampler.check_grid(how.defaults["grid"])) != steps + 1:
        raise ValueError(f"the default grid isn't one of {steps} steps")
    strength = numbers.get("neighbours", 0.0)
    if (how.contexts is not None) != bool(strength):
        raise ValueError("it has a table of neighbours and doesn't heed them, or the reverse")
    generate_lib.check_neighbours(strength, how.jump_rule, has_table=True)


def make_sampler(model: ModelConfig, process: Process, how: How) -> Callable[..., jax.Array]:
    """What is exported: the arguments are the inputs of the signature, in their order."""
    generate = generate_lib.make_generator(model, process, how.jump_rule)
    names = [name for name, *_ in _rows(model, how, steps=1, length=1)]

    def sample(*arguments):
        given = dict(zip(names, arguments, strict=True))
        if "table" in given:
            given["neighbours"] = Neighbours(Table(**given.pop("table")), given["neighbours"])
        params = bundles.unflatten(given.pop("weights"))
        first = [given.pop(name) for name in ("seed", "given", "frozen", "grid", "temperature")]
        return generate(params, *first, **given)

    return sample


# ---------------------------------------------------------------------------------------- writing


def write(
    folder: pathlib.Path,
    bundle: Bundle,
    *,
    steps: int,
    length: int | None = None,
    jump_rule: str | None = None,
    neighbours: float | None = None,
) -> None:
    """Exports a few-step sampler. Parameters are written one by one, none is held twice.

    Args:
      folder: made here; what an error leaves of it is for the caller to remove.
      bundle: the model; not autoregressive.
      steps: S, network calls of a sample.
      length: L, tokens of a sample; None for the block length it was trained on.
      jump_rule: "cumulative" | "euler" | "mixture" | "dispersed", of the first S-1 steps; None for
        that of the model.
      neighbours: strength by which draws heed their neighbours unless the caller says otherwise, 0
        for a program that can't; None for that of the model.

    Raises:
      ValueError: for an autoregressive network, parameters that aren't the network's, a tokenizer
        larger than its vocabulary, an unknown length, or what `how_of` refuses.
      FileExistsError: there is such a folder.
    """
    length = _check_request(bundle, steps, length)
    bundle = dataclasses.replace(bundle, model=portable(bundle.model))
    # Whoever reads the folder samples as its program does.
    bundle = sampled_by(bundle, few_step_jump=jump_rule, neighbours=neighbours)
    how = how_of(bundle, steps)
    description = _describe(bundle, how, steps=steps, length=length)
    folder.mkdir(parents=True)
    program = _export(bundle, how, steps=steps, length=length)
    (folder / _PROGRAM).write_bytes(program.serialize())
    _write_weights(folder / _WEIGHTS, bundle)
    if bundle.tokenizer is not None:
        bundle.tokenizer.save(folder / _TOKENIZER)
    _write_flatbuffers(folder / _FLATBUFFERS)
    if how.contexts is not None:
        bundles.write_counts(folder / _COUNTS, bundle.counts())
        (folder / _NGRAMS).write_bytes(pathlib.Path(ngrams.__file__).read_bytes())
    example = pathlib.Path(__file__).with_name("run_exported.py")
    (folder / _RUN).write_bytes(example.read_bytes())
    signature = description | {
        "block_length": bundle.block_length,
        "provenance": dict(bundle.provenance),
        "jax": jax.__version__,
        "calling_convention": program.calling_convention_version,
        "sha256": {name: _sha256(folder / name) for name in _files(bundle, how)},
    }
    io.write_json(folder / _SIGNATURE, signature)
    signature = io.read_json(folder / _SIGNATURE)  # as plain JSON, as a reader has it
    signature["sha256"][_SIGNATURE] = _own_sha256(signature)
    io.write_json(folder / _SIGNATURE, signature)


def portable(model: ModelConfig) -> ModelConfig:
    """The network as it is exported: for any device, in small chunks, whose batch is a symbol."""
    mib = min(model.logits_mib, ModelConfig.logits_mib)
    return dataclasses.replace(model, attention="manual", remat="none", logits_mib=mib)


def _check_request(bundle: Bundle, steps: int, length: int | None) -> int:
    """Length of the exported sampler; ValueError for what can't be exported."""
    if bundle.model.causal:
        raise ValueError(
            "An autoregressive network has no few-step sampler to export; expected weights of a "
            "base or few-step stage."
        )
    length = bundle.block_length if length is None else length
    if length is None:
        raise ValueError(
            "The file doesn't say on which block length the model was trained; name the length of "
            "the samples to export."
        )
    for name, value, most in (("steps", steps, _MAX_STEPS), ("length", length, _MAX_LENGTH)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must lie in 1 .. {most}, got {value}.")
    found = {path: tuple(leaf.shape) for path, leaf in bundle.leaves.items()}
    if problem := _difference(found, bundles.expected_shapes(bundle.model)):
        raise ValueError(f"The parameters don't fit the network: {problem}.")
    _check_tokenizer(bundle)
    return length


def _check_tokenizer(bundle: Bundle) -> None:
    if bundle.tokenizer is not None and bundle.tokenizer.vocab_size > bundle.num_tokens:
        raise ValueError(
            f"The tokenizer has {bundle.tokenizer.vocab_size} tokens, the network knows "
            f"{bundle.num_tokens}; use the tokenizer it was trained with."
        )


def _export(bundle: Bundle, how: How, *, steps: int, length: int) -> export.Exported:
    """The program. Only shapes of the parameters are needed."""
    (batch,) = export.symbolic_shape("b")

    def argument(shape, dtype):
        if isinstance(shape, Mapping):
            types = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shape, dtype)
            return {name: argument(shape[name], types[name]) for name in shape}
        return jax.ShapeDtypeStruct([batch if n == "b" else n for n in shape], dtype)

    inputs = _inputs(bundle.model, how, steps, length)
    arguments = [argument(entry["shape"], entry["dtype"]) for entry in inputs]
    sample = make_sampler(bundle.model, bundle.process(), how)
    with _no_locations():
        return export.export(jax.jit(sample), platforms=PLATFORMS)(*arguments)


@contextlib.contextmanager
def _no_locations():
    """Programs name the source line and the callers of each operation, paths of this machine: left
    out, so that the same model gives the same bytes."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _write_weights(path: pathlib.Path, bundle: Bundle) -> None:
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        for name, shape in bundles.expected_shapes(bundle.model).items():
            array = np.asarray(bundle.leaves[name].read(), np.float32, order="C")
            if array.shape != shape:
                raise ValueError(
                    f"Parameter {name} was announced with shape {shape} and has {array.shape}; "
                    "the file it comes from contradicts itself."
                )
            with archive.open(_zip_info(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


def _write_flatbuffers(path: pathlib.Path) -> None:
    """The installed package flatbuffers (pure Python) with what says its licence."""
    package = importlib.metadata.distribution("flatbuffers")
    content = {}
    for file in package.files or ():
        is_code = file.parts[0] == "flatbuffers" and file.suffix == ".py"
        is_legal = file.name == "METADATA" or file.name.startswith(("LICENSE", "NOTICE"))
        if is_code or is_legal:
            content[file.as_posix()] = file.read_binary()
    if "flatbuffers/__init__.py" not in content:
        raise ValueError(
            "The files of the package flatbuffers can't be listed; install it with pip to export."
        )
    if not any("LICENSE" in name for name in content):
        # Its wheels name the Apache License 2.0 without its text; jax stands under the same.
        for file in importlib.metadata.distribution("jax").files or ():
            if file.name == "LICENSE":
                content["flatbuffers/LICENSE"] = file.read_binary()
    with zipfile.ZipFile(path, "x", zipfile.ZIP_STORED) as archive:
        for name in sorted(content):
            archive.writestr(_zip_info(name), content[name])


def _zip_info(name: str) -> zipfile.ZipInfo:
    """A member whose header is the same on every day and machine."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3
    info.external_attr = 0o644 << 16
    return info


# -------------------------------------------------------------------------------------- signature


def _inputs(model: ModelConfig, how: How, steps: int, length: int) -> list[dict[str, Any]]:
    names = ("name", "dtype", "shape", "what")
    return [dict(zip(names, row, strict=True)) for row in _rows(model, how, steps, length)]


def _rows(model: ModelConfig, how: How, steps: int, length: int) -> list[tuple]:
    shapes = {path: list(shape) for path, shape in bundles.expected_shapes(model).items()}
    rows = [
        ("weights", "float32", shapes, "the arrays of weights.npz, as a dict"),
        ("seed", "uint32", [], "of everything random"),
        ("given", "int32", ["b", length], "tokens of the frozen positions, elsewhere anything"),
        ("frozen", "bool", ["b", length], "positions that keep the given token"),
        ("grid", "float32", [steps + 1], "times, increasing from 0 (noise) to 1 (text)"),
        ("temperature", "float32", [], "divides the logits, > 0"),
        ("cooling", "float32", [], "the temperature falls to 1 - cooling of itself, in [0, 1)"),
        (
            "look_ahead",
            "float32",
            [],
            "share of a step by which it asks ahead, in [0, 1]",
        ),
    ]
    if "top_p" in how.defaults:
        rows.append(("top_p", "float32", [], "share of the mass that is drawn from, in (0, 1]"))
    if how.contexts is not None:
        longer = how.contexts - model.vocab_size
        sizes = [[how.contexts, model.vocab_size], [longer], [how.contexts]]
        table = dict(zip(Table._fields, sizes, strict=True))
        types = dict(zip(Table._fields, ("float32", "int32", "int32"), strict=True))
        rows += [
            ("neighbours", "float32", [], "strength by which draws heed their neighbours, >= 0"),
            ("table", types, table, "of ngrams.table of the counts in neighbours.npz, as a dict"),
        ]
    return rows


def _describe(bundle: Bundle, how: How, *, steps: int, length: int) -> dict[str, Any]:
    """The part of a signature that follows from a model and how it is sampled; JSON."""
    tokens = {"name": "tokens", "dtype": "int32", "shape": ["b", length]}
    return {
        "format": FORMAT,
        "version": VERSION,
        "inputs": _inputs(bundle.model, how, steps, length),
        "outputs": [tokens],
        "steps": steps,
        "length": length,
        **how._asdict(),
        "platforms": list(PLATFORMS),
        "model": dataclasses.asdict(bundle.model),
        "path": dict(bundle.path),
        "mask_id": bundle.process().source.mask_id,
        "eos_id": None if bundle.tokenizer is None else bundle.tokenizer.eos_id,
    }


def _files(bundle: Bundle, how: How) -> list[str]:
    named = [] if bundle.tokenizer is None else [_TOKENIZER]
    heeded = [] if how.contexts is None else [_COUNTS, _NGRAMS]
    return [_PROGRAM, _WEIGHTS, _FLATBUFFERS, _RUN, *named, *heeded]


def _own_sha256(signature: Mapping[str, Any]) -> str:
    """Of all of a signature but this checksum itself, however it is spaced and ordered."""
    files = {name: s for name, s in signature["sha256"].items() if name != _SIGNATURE}
    canonical = json.dumps(dict(signature) | {"sha256": files}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------- reading


def is_exported(folder: pathlib.Path) -> bool:
    """Whether a folder says of itself that it holds an exported sampler; never raises."""
    try:
        return _load_json(folder / _SIGNATURE).get("format") == FORMAT
    except BadFile:
        return False


def read(folder: pathlib.Path) -> Bundle:
    """The model of an exported sampler; its parameters are read from weights.npz when asked for.

    All files are checked against the signature's checksums but weights.npz: of it the list of
    arrays is checked here, each array's header and CRC when it is read.

    Raises:
      BadFile: anything is missing, damaged or not what `write` writes; later, by `Leaf.read`, for
        an array.
    """
    folder = pathlib.Path(folder)
    signature = _read_signature(folder)
    try:
        steps = _whole(signature["steps"], _MAX_STEPS)
        how = _read_how(folder, signature, steps)
        bundle = _make_bundle(folder, signature, how)
        length = _whole(signature["length"], _MAX_LENGTH)
        expected = _describe(bundle, how, steps=steps, length=length)
    except BadFile:
        raise
    except Exception as error:
        # Values of the right type may still be refused by any part of the library.
        raise BadFile(f"{folder / _SIGNATURE} describes no usable model: {error}") from error
    for key, value in expected.items():
        # as text: to Python 1, 1.0 and True are equal
        if json.dumps(signature[key], sort_keys=True) != json.dumps(value, sort_keys=True):
            raise BadFile(
                f"{folder / _SIGNATURE} contradicts itself in {key!r}: expected "
                f"{_short(value)}, got {_short(signature[key])}; export the model again."
            )
    # How the program attends is no property of the network that goes on from here.
    return dataclasses.replace(bundle, model=dataclasses.replace(bundle.model, attention="auto"))


def sizes(folder: pathlib.Path) -> tuple[int, int]:
    """(S, L) of an exported sampler; BadFile if the folder isn't one."""
    signature = _read_signature(folder)
    return signature["steps"], signature["length"]


def call(
    folder: pathlib.Path,
    params: Params,
    table: Table | None,
    *,
    seed: int,
    given_BL: np.ndarray,
    frozen_BL: np.ndarray,
) -> np.ndarray:
    """Tokens of the program in a folder, as run.py draws them.

    Args:
      folder: of an exported sampler.
      params: of the model it was made of.
      table: of its text, None for a program without neighbours.
      seed, given_BL, frozen_BL: as in `inference.generate`.

    Returns:
      int32 [B, L].

    Raises:
      BadFile: see `load_program`.
    """
    signature = _read_signature(folder)
    values = {name: np.float32(value) for name, value in signature["defaults"].items()}
    values |= {"seed": np.uint32(seed), "given": given_BL, "frozen": frozen_BL}
    values["weights"] = bundles.flatten(params)
    if table is not None:
        values["table"] = table._asdict()
    arguments = [values[entry["name"]] for entry in signature["inputs"]]
    return np.asarray(load_program(folder).call(*arguments))


def load_program(folder: pathlib.Path) -> export.Exported:
    """The program of an exported sampler, after its checksum; `.call` runs it, as run.py does.

    Raises:
      BadFile: it is missing, damaged or no program.
    """
    folder = pathlib.Path(folder)
    signature = _read_signature(folder)
    try:
        program = export.deserialize(bytearray((folder / _PROGRAM).read_bytes()))
    except Exception as error:  # of jax and flatbuffers there is any kind
        raise BadFile(
            f"{folder / _PROGRAM} can't be read as a program of jax {jax.__version__} (it was "
            f"written by jax {signature['jax']}): {type(error).__name__}: {error}."
        ) from error
    if program.platforms != PLATFORMS:
        raise BadFile(
            f"{folder / _PROGRAM} is for {program.platforms}, expected {PLATFORMS}; export again."
        )
    return program


_KEYS = {
    "format": str,
    "version": int,
    "inputs": list,
    "outputs": list,
    "steps": int,
    "length": int,
    "jump_rule": str,
    "defaults": dict,
    "contexts": int | None,
    "platforms": list,
    "model": dict,
    "path": dict,
    "mask_id": int | None,
    "eos_id": int | None,
    "block_length": int | None,
    "provenance": dict,
    "jax": str,
    "calling_convention": int,
    "sha256": dict,
}
_DEFAULTS = {"grid": list, "temperature": float, "cooling": float, "look_ahead": float}
_PATH_KEYS = {"schedule": str, "power": int | float, "source": str, "revealed": str}


def _read_signature(folder: pathlib.Path) -> dict[str, Any]:
    """signature.json, its types, and the checksums of all files but the weights."""
    path = folder / _SIGNATURE
    signature = _load_json(path)
    if signature.get("format") != FORMAT:
        raise BadFile(
            f'{path} has format {_short(signature.get("format"))}, expected "{FORMAT}"; this is '
            "no exported sampler."
        )
    if signature.get("version") != VERSION:
        raise BadFile(
            f"{path} has version {_short(signature.get('version'))}, expected {VERSION}; read it "
            "with the version of fsdfm_jax that wrote it."
        )
    _check_types(signature, _KEYS, f"{path}")
    sums = signature["sha256"]
    optional = {_TOKENIZER} & sums.keys()
    optional |= set() if signature["contexts"] is None else {_COUNTS, _NGRAMS}
    expected = dict.fromkeys({_PROGRAM, _WEIGHTS, _FLATBUFFERS, _RUN, _SIGNATURE} | optional, str)
    _check_types(sums, expected, f"{path}, sha256")
    for name in expected.keys() - {_WEIGHTS}:  # of gigabytes each array's CRC is checked instead
        try:
            is_own = name == _SIGNATURE
            found = _own_sha256(signature) if is_own else _sha256(folder / name)
        except (OSError, ValueError) as error:
            raise BadFile(f"{folder / name} can't be read: {error}.") from error
        if found != sums[name]:
            raise BadFile(
                f"{folder / name} is damaged: expected sha256 {_short(sums[name])}, got {found}; "
                "copy or export the folder again."
            )
    return signature


def _load_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; strict: no key twice, no NaN."""

    def unique(pairs):
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice in one object")
        return dict(pairs)

    def number(text):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:20]} is no finite number")
        return value

    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_SIGNATURE + 1)
        if len(content) > _MAX_SIGNATURE:
            raise ValueError(f"more than {_MAX_SIGNATURE} bytes")
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=unique,
            parse_float=number,
            parse_constant=number,
        )
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"{path} can't be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise BadFile(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def _check_types(values: Mapping[str, Any], types: Mapping[str, Any], where: str) -> None:
    """BadFile unless the keys are those of `types`, with values of theirs; True is no number."""
    if problem := _difference(dict.fromkeys(values), dict.fromkeys(types)):
        raise BadFile(f"{where}: {problem}; export the model again.")
    for key, kind in types.items():
        value = values[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadFile(
                f"{where}: {key!r} must be {getattr(kind, '__name__', kind)}, got {_short(value)}."
            )


def _read_how(folder: pathlib.Path, signature: Mapping[str, Any], steps: int) -> How:
    how = How(*(signature[name] for name in How._fields))
    optional = {"top_p", "neighbours"} & how.defaults.keys()
    types = _DEFAULTS | dict.fromkeys(optional, float)
    _check_types(how.defaults, types, f"{folder / _SIGNATURE}, defaults")
    if how.contexts is not None:
        _whole(how.contexts, 1 << 30)
    _check_how(how, steps)
    return how


def _make_bundle(folder: pathlib.Path, signature: Mapping[str, Any], how: How) -> Bundle:
    model = _make_model(folder, signature["model"])
    _check_types(signature["path"], _PATH_KEYS, f"{folder / _SIGNATURE}, path")
    if signature["block_length"] is not None:
        _whole(signature["block_length"], _MAX_LENGTH)
    bundles.check_provenance(signature["provenance"])
    if how.contexts is not None and how.contexts < model.vocab_size:
        raise ValueError(f"a table of {how.contexts} contexts for {model.vocab_size} tokens")
    read_counts = functools.cache(functools.partial(_counts, folder, model, how))
    bundle = Bundle(
        model=model,
        leaves=_leaves(folder / _WEIGHTS, model),
        path=signature["path"],
        tokenizer=tokenizer.load(folder / _TOKENIZER)
        if _TOKENIZER in signature["sha256"]
        else None,
        block_length=signature["block_length"],
        provenance=signature["provenance"],
        counts=None if how.contexts is None else read_counts,
    )
    _check_tokenizer(bundle)
    return bundle


def _counts(folder: pathlib.Path, model: ModelConfig, how: How) -> Counts:
    path = folder / _COUNTS
    counts = bundles.read_counts(path, model.vocab_size)
    counts = bundles.checked_counts(counts, model.vocab_size, str(path))
    if len(counts.sizes_C) != how.contexts:
        raise BadFile(
            f"{path} has {len(counts.sizes_C)} contexts, the program takes {how.contexts}; export "
            "the model again."
        )
    return counts


def _make_model(folder: pathlib.Path, fields: Mapping[str, Any]) -> ModelConfig:
    types = {f.name: f.type for f in dataclasses.fields(ModelConfig)} | {"dropout": int | float}
    _check_types(fields, types, f"{folder / _SIGNATURE}, model")
    model = ModelConfig(**fields)
    if model.causal or model.attention != "manual" or model.remat != "none":
        raise ValueError("expected causal=false, attention='manual' and remat='none'.")
    # Some of its matrices alone, before the network is built: absurd sizes would take long.
    widths = (model.vocab_size, model.num_blocks * model.width, model.mlp_ratio, model.cond_width)
    size = (folder / _WEIGHTS).stat().st_size
    if 4 * model.width * max(widths) > size:
        raise ValueError(f"such a network has more parameters than the {size} bytes of {_WEIGHTS}")
    return model


def _leaves(path: pathlib.Path, model: ModelConfig) -> dict[str, Leaf]:
    """The parameters of weights.npz, which must be exactly the network's."""
    shapes = bundles.expected_shapes(model)
    with _opened(path) as archive:
        names = [info.filename for info in archive.infolist()]
        expected = {f"{name}.npy" for name in shapes}
        if problem := _difference(dict.fromkeys(names), dict.fromkeys(expected)):
            raise BadFile(f"{path}: {problem}; export the model again.")
        if len(names) != len(expected):
            raise BadFile(f"{path} holds an array twice; export the model again.")
        for name, shape in shapes.items():
            _check_size(path, archive.getinfo(f"{name}.npy"), shape)
    return {
        name: Leaf(shape, functools.partial(_read_leaf, path, name, shape))
        for name, shape in shapes.items()
    }


@contextlib.contextmanager
def _opened(path: pathlib.Path):
    """An open zip file; BadFile for whatever goes wrong in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except BadFile:
        raise
    except Exception as error:  # zipfile meets damage with a dozen types of exception
        raise BadFile(f"{path} is damaged: {type(error).__name__}: {error}.") from error


def _check_size(path: pathlib.Path, info: zipfile.ZipInfo, shape: tuple[int, ...]) -> None:
    """BadFile unless a member holds these float32, uncompressed, within the file."""
    stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
    payload = 4 * math.prod(shape)
    header = info.file_size - payload
    fits = info.compress_size == info.file_size <= path.stat().st_size
    if not (stored and fits and len(_NPY_MAGIC) <= header <= 1 << 16):
        raise BadFile(
            f"{path}: {info.filename} has {info.file_size} bytes ({info.compress_size} stored), "
            f"expected a header and {payload} uncompressed for shape {shape}; export again."
        )


def _read_leaf(path: pathlib.Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    with _opened(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        _check_size(path, info, shape)
        with archive.open(info) as member:
            # NumPy would evaluate the header as Python; here it is only compared with the one it
            # must be, whatever number of spaces follows.
            start = member.read(len(_NPY_MAGIC) + 2)
            length = int.from_bytes(start[-2:], "little")
            header = member.read(length)
            size_fits = len(start) + length + 4 * math.prod(shape) == info.file_size
            matches = header.endswith(b"\n") and header.rstrip(b" \n") == _npy_header(shape)
            if not (start.startswith(_NPY_MAGIC) and size_fits and matches):
                raise BadFile(
                    f"{path}: {info.filename} isn't a float32 array of shape {shape} in NumPy's "
                    f"format 1.0 (its header: {_short(header)}); export the model again."
                )
            array = np.empty(shape, "<f4")
            view = memoryview(array).cast("B") if array.size else memoryview(b"")
            for begin in range(0, len(view), _CHUNK):
                _fill(member, view[begin : begin + _CHUNK])
            member.read(1)  # the end of the member, where its CRC is compared
    return array.astype(np.float32, copy=False)


def _fill(member, view: memoryview) -> None:
    while len(view):
        count = member.readinto(view)
        if not count:
            raise EOFError("an array ends early")
        view = view[count:]


def _npy_header(shape: tuple[int, ...]) -> bytes:
    buffer = BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()[len(_NPY_MAGIC) + 2 :].rstrip(b" \n")


def _whole(value: int, most: int) -> int:
    if not 1 <= value <= most:
        raise ValueError(f"expected a whole number in 1 .. {most}, got {_short(value)}")
    return value


def _difference(found: Mapping, expected: Mapping) -> str:
    """What is missing, unexpected or different in `found`; empty if nothing."""
    problems = [f"{_short(key)} is missing" for key in expected if key not in found]
    problems += [f"{_short(key)} is unexpected" for key in found if key not in expected]
    problems += [
        f"{_short(key)} has {found[key]}, expected {expected[key]}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def _short(value: Any) -> str:
    """A value of a file, fit for a message."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 64:
        return "a huge number"  # printing it may take long, or be refused
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
