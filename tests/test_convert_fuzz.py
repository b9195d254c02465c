"""Broken copies of every kind of file: rejected with one message, or read exactly."""

import dataclasses
import functools
import json
import pathlib
import pickle
import random
import shutil
import time
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from fsdfm_jax.convert import formats, official
from fsdfm_jax.convert import safetensors as safetensors_lib
from fsdfm_jax.convert.formats import Target
from fsdfm_jax.data import tokenizer as tokenizer_lib
from fsdfm_jax.inference import bundle as bundle_lib
from fsdfm_jax.network.config import ModelConfig

pytestmark = pytest.mark.slow

MODEL = ModelConfig(
    vocab_size=11,
    width=8,
    num_blocks=1,
    num_heads=2,
    cond_width=4,
    mlp_ratio=1,
    conditioning="official",
)
SECONDS = 10.0  # of one broken file


@pytest.fixture(autouse=True)
def shapes_are_remembered(monkeypatch):
    # Tracing the network takes most of the time of opening such small files.
    cached = functools.lru_cache(1000)(bundle_lib.expected_shapes)
    monkeypatch.setattr(bundle_lib, "expected_shapes", cached)


def _bundle(model=MODEL):
    rng = np.random.default_rng(0)
    shapes = bundle_lib.expected_shapes(model)
    flat = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    words = {f"w{i}": i for i in range(1, model.vocab_size)} | {"<|endoftext|>": 0}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    return bundle_lib.from_params(
        bundle_lib.unflatten(flat),
        model,
        tokenizer=tokenizer_lib.Tokenizer(backend),
        block_length=6,
        provenance={"stage": "distill", "step": 7, "data": "d", "config": {"distill": {"a": 0.5}}},
    )


class Outcomes:
    """Opens broken copies and counts the outcomes."""

    def __init__(self, path, original):
        self.path = path
        self.expected = dict(original.arrays())
        self.read = self.refused = self.changed = 0
        self.slowest = 0.0

    def open(self, case, names=None):
        """Read the named parameters, all by default."""
        began = time.perf_counter()
        try:
            bundle = formats.open_bundle(self.path)
            arrays = {name: bundle.leaves[name].read() for name in names or bundle.leaves}
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
            assert message.strip(), case
            assert len(message) < 8000, (case, message)  # sixty problems, each named
            self.refused += 1
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
        else:
            self.read += 1
            equal = set(arrays) == set(names or self.expected) and all(
                array.dtype == np.float32 and array.tobytes() == self.expected[name].tobytes()
                for name, array in arrays.items()
            )
            self.changed += not equal
            assert equal, f"{case}: other parameters were read"
        self.slowest = max(self.slowest, time.perf_counter() - began)
        assert self.slowest < SECONDS, case

    def done(self, *, least, most):
        """Check the fraction of copies that were read: mutations break many, but not all."""
        fraction = self.read / (self.read + self.refused)
        assert least <= fraction <= most, fraction


# ----------------------------------------------------------------------------------- mutations


def _mutated(raw, rng):
    """A copy with one to three things wrong."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if len(raw) < 16:
            break
        a, b = sorted(rng.sample(range(len(raw)), 2))
        length = rng.choice((1, 4, 8, 30, 100, 1000))
        kind = rng.randrange(8)
        if kind == 0:
            raw[a] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[a : a + length] = rng.randbytes(len(raw[a : a + length]))
        elif kind == 2:
            del raw[rng.choice((a, b)) :]
        elif kind == 3:
            raw[a : a + length] = bytes(len(raw[a : a + length]))
        elif kind == 4:
            raw[a:a] = raw[b : b + length]
        elif kind == 5:
            length = min(length, b - a, len(raw) - b)
            raw[a : a + length], raw[b : b + length] = raw[b : b + length], raw[a : a + length]
        elif kind == 6:
            del raw[a : a + length]
        else:
            raw += rng.randbytes(length)
    return bytes(raw)


ODD = (
    None, True, False, -1, 0, 1, 2, 3, 7, 10**4, 2**30, 2**31, 2**40, 2**63, 2**64, 10**30, 0.5,
    -0.0, 1e308, float("inf"), float("nan"), "", "x", "mask", "uniform", "../x", "/etc/passwd",
    "model.safetensors", "a\nb", "\ud800", "x" * 5000, [], [[]], [1, 2], {}, {"a": {}}, ["x"],
)  # fmt: skip


def _edited(value, rng):
    """A copy of a JSON value with one to three edits somewhere inside."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = []

        def walk(node, places=places):
            items = node.items() if isinstance(node, dict) else enumerate(node)
            for key, child in list(items):
                places.append((node, key))
                if isinstance(child, dict | list):
                    walk(child)

        walk(value)
        if not places:
            break
        node, key = rng.choice(places)
        kind = rng.randrange(7)
        if kind == 0:
            del node[key]
        elif kind == 1:
            other, place = rng.choice(places)
            first, second = json.loads(json.dumps([node[key], other[place]]))
            node[key], other[place] = second, first
        elif kind == 2 and isinstance(node, dict):
            node[rng.choice(("x", "", key + " ", "shape", "tokenizer"))] = node.pop(key)
        elif kind == 3 and type(node[key]) in (int, float):
            node[key] = node[key] * rng.choice((-1, 2, 1.0, 1000)) + rng.choice((0, 1, -1))
        else:
            node[key] = rng.choice(ODD)
    return value


def _with_header(raw, edit):
    """A safetensors file with another header, lengths made right."""
    size = int.from_bytes(raw[:8], "little")
    header = edit(json.loads(raw[8 : 8 + size]))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def _edited_description(raw, rng):
    """A changed description of the network with a valid checksum, like an attacker's."""

    def edit(header):
        metadata = header["__metadata__"]
        field = rng.choice(("fsdfm_jax", "fsdfm_jax", "fsdfm_jax", "checksums", "tokenizer"))
        if field in metadata:
            metadata[field] = json.dumps(_edited(json.loads(metadata[field]), rng))
        metadata["checksum"] = safetensors_lib._metadata_checksum(metadata)
        return header

    return _with_header(raw, edit)


def _lying_length(raw, rng):
    size = int.from_bytes(raw[:8], "little")
    near = [0, 1, 2, 7, 8, size - 1, size + 1, size - 8, size + 8, size * 2]
    far = [len(raw), len(raw) - 8, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, 100_000_000]
    lie = rng.choice([*near, *far, rng.randrange(2**64), rng.randrange(len(raw))])
    return (lie % 2**64).to_bytes(8, "little") + raw[8:]


def _edited_tensors(raw, rng):
    """Other types, shapes and offsets, huge ones too."""

    def edit(header):
        names = [name for name in header if name != "__metadata__"]
        for _ in range(rng.choice((1, 1, 2))):
            entry = header[rng.choice(names)]
            other = header[rng.choice(names)]
            kind = rng.randrange(6)
            if kind == 0:
                entry["dtype"] = rng.choice(("F16", "BF16", "F64", "I32", "F8_E4M3", "BOOL", "x"))
            elif kind == 1:
                entry["shape"] = rng.choice(
                    ([], [0], [2**62], [2**32, 2**32], [-1], [2**64], [0, 2**63], other["shape"])
                )
            elif kind == 2:
                entry["data_offsets"] = rng.choice(
                    ([0, 0], [0, 2**63], [2**64 - 4, 4], [8, 0], other["data_offsets"], [0])
                )
            elif kind == 3:
                entry["shape"] = entry["shape"][::-1]
            elif kind == 4:  # the tensors change places
                for key in ("dtype", "shape", "data_offsets"):
                    entry[key], other[key] = other[key], entry[key]
            else:
                entry["shape"] = [int(np.prod(entry["shape"]))]
        return header

    return _with_header(raw, edit)


# --------------------------------------------------------------------------------- safetensors


BYTES = {
    "bytes": (_mutated, 800, 0.0, 0.3),
    "lengths": (_lying_length, 200, 0.0, 0.3),
    "header": (lambda raw, rng: _with_header(raw, lambda h: _edited(h, rng)), 400, 0.0, 0.6),
    "tensors": (_edited_tensors, 400, 0.0, 0.6),
    "description": (_edited_description, 700, 0.05, 0.9),
}


@pytest.mark.parametrize("layout", safetensors_lib.LAYOUTS)
@pytest.mark.parametrize("what", BYTES)
def test_a_safetensors_file(tmp_path, what, layout):
    mutate, count, least, most = BYTES[what]
    path = tmp_path / "model.safetensors"
    bundle = _bundle()
    formats.write(bundle, Target(path, layout=layout))
    raw = path.read_bytes()
    outcomes = Outcomes(path, bundle)
    for seed in range(count // 2):
        path.write_bytes(mutate(raw, random.Random(f"{what} {layout} {seed}")))
        outcomes.open(seed)
    outcomes.done(least=least, most=most)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of several shards with its bundle."""
    bundle = _bundle()
    monkeypatch.setattr(safetensors_lib, "MAX_SHARD_BYTES", 1500)
    formats.write(bundle, Target(tmp_path / "original", to="safetensors"))
    assert len(list((tmp_path / "original").glob("*.safetensors"))) >= 3
    return tmp_path / "original", bundle


def _break_folder(path, rng):
    files = sorted(path.iterdir())
    shards = [file for file in files if file.suffix == ".safetensors"]
    kind = rng.randrange(6)
    if kind == 0:
        rng.choice(files).unlink()
    elif kind == 1:
        a, b = rng.sample(shards, 2)
        content = a.read_bytes()
        a.write_bytes(b.read_bytes())
        if rng.random() < 0.5:
            b.write_bytes(content)
    elif kind == 2:
        content = rng.choice(files).read_bytes()
        (path / rng.choice(("x.safetensors", "config.json", "y"))).write_bytes(content)
    elif kind == 3:
        file = rng.choice(files)
        file.write_bytes(_mutated(file.read_bytes(), rng))
    else:
        file = rng.choice([file for file in files if file.suffix == ".json"])
        file.write_text(json.dumps(_edited(json.loads(file.read_text()), rng)))


def test_a_folder_of_shards(tmp_path, folder):
    original, bundle = folder
    outcomes = Outcomes(tmp_path / "broken", bundle)
    for seed in range(600):
        shutil.copytree(original, outcomes.path)
        _break_folder(outcomes.path, random.Random(f"folder {seed}"))
        outcomes.open(seed)
        shutil.rmtree(outcomes.path)
    outcomes.done(least=0.1, most=0.8)


def test_a_folder_that_only_config_json_describes(tmp_path):
    bundle = _bundle()
    path = tmp_path / "model"
    formats.write(bundle, Target(path, to="safetensors"))
    safetensors.numpy.save_file(dict(bundle.arrays()), path / "model.safetensors")
    config = path / "config.json"
    right = json.loads(config.read_text())
    outcomes = Outcomes(path, bundle)
    outcomes.open("as it was")
    assert outcomes.read == 1
    for seed in range(300):
        rng = random.Random(f"config {seed}")
        text = json.dumps(_edited(right, rng))
        if rng.random() < 0.2:
            text = rng.choice(("[" * 10**5, "1" * 10**4, "{" * 100, "null", "\0", text + text))
        config.write_text(text)
        outcomes.open(seed)
    outcomes.done(least=0.05, most=0.9)


# ------------------------------------------------------------------------------- state dicts


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_an_npz_of_a_state_dict(tmp_path):
    bundle = _bundle()
    path, canary = tmp_path / "state.npz", tmp_path / "canary"
    state = official.to_state_dict(bundle.params(), MODEL)
    sleeping = np.array([Canary(canary)], dtype=object)
    outcomes = Outcomes(path, bundle)
    for save in (np.savez, np.savez_compressed):
        save(path, **{f"sd/{name}": array for name, array in state.items()})
        raw = path.read_bytes()
        outcomes.open("as it was")
        for seed in range(350):
            path.write_bytes(_mutated(raw, random.Random(f"{save.__name__} {seed}")))
            outcomes.open(seed)
        start = raw.index(b"PK\1\2")
        for seed in range(100):  # what the archive says of its members
            mutated = _mutated(raw[start:], random.Random(f"directory {save.__name__} {seed}"))
            path.write_bytes(raw[:start] + mutated)
            outcomes.open(seed)
    outcomes.done(least=0.01, most=0.6)
    names = sorted(state)
    for seed in range(20):
        rng = random.Random(f"pickle {seed}")
        broken = state | {rng.choice([*names, "z"]): sleeping}
        np.savez(path, **broken)
        outcomes.open(seed)
    assert not canary.exists()
    with np.load(path, allow_pickle=True) as file:  # it would have sung
        for name in file:
            file[name]
    assert canary.exists()


def _repacked(raw, path, content):
    """The same checkpoint with another pickle, its checksums right."""
    with zipfile.ZipFile(raw) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            inside = old.read(info)
            new.writestr(info, content(inside) if info.filename.endswith("data.pkl") else inside)


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
def test_a_torch_file(tmp_path):
    bundle = _bundle()
    path, right, canary = tmp_path / "broken.pth", tmp_path / "right.pth", tmp_path / "canary"
    formats.write(bundle, Target(right))
    raw = right.read_bytes()
    outcomes = Outcomes(path, bundle)
    for seed in range(300):
        path.write_bytes(_mutated(raw, random.Random(f"pth {seed}")))
        outcomes.open(seed)
    outcomes.done(least=0.01, most=0.6)
    song = pickle.dumps(Canary(canary), protocol=2)
    # A pickle says which tensor is which: where it is edited well, other weights are right.
    outcomes = Outcomes(path, bundle)
    for seed in range(200):
        rng = random.Random(f"pickle {seed}")
        _repacked(right, path, lambda inside, rng=rng: _mutated(inside, rng))
        outcomes.open(seed)
        _repacked(right, path, lambda inside, rng=rng: _mutated(song, rng))
        outcomes.open(seed)
    assert outcomes.refused > 150
    assert not canary.exists()
    pickle.loads(song)
    assert canary.exists(), "it would have sung"


def test_a_torch_file_that_describes_itself_wrongly(tmp_path):
    bundle = _bundle()
    path = tmp_path / "broken.pth"
    description = bundle_lib.describe(bundle) | {"tokenizer": bundle.tokenizer.to_json()}
    outcomes = Outcomes(path, bundle)
    for seed in range(300):
        text = json.dumps(_edited(description, random.Random(f"description {seed}")))
        official.write_file(path, bundle, step=7, extra={"fsdfm_jax": text})
        outcomes.open(seed)
        path.unlink()
    outcomes.done(least=0.05, most=0.9)


def test_a_tokenizer_with_a_huge_id_is_refused_soon(tmp_path):
    # The library writes such a vocabulary id by id, which takes it a minute.
    bundle = _bundle()
    path = tmp_path / "model"
    formats.write(bundle, Target(path, to="safetensors"))
    words = json.loads((path / "tokenizer.json").read_text())
    words["model"]["vocab"]["w5"] = 2**32 - 2
    (path / "tokenizer.json").write_text(json.dumps(words))
    outcomes = Outcomes(path, bundle)
    outcomes.open("huge id")
    assert outcomes.refused


# ------------------------------------------------------------------------------------- Orbax


def test_a_run_folder(tmp_path):
    # Orbax keeps no checksum of the values; those that conversion adds are what is held here.
    bundle = _bundle(dataclasses.replace(MODEL, conditioning="none"))
    right, path = tmp_path / "right", tmp_path / "broken"
    formats.write(bundle, Target(right, to="orbax"))
    outcomes = Outcomes(path, bundle)
    for seed in range(60):
        rng = random.Random(f"orbax {seed}")
        shutil.copytree(right, path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        file = rng.choice(files)
        content = _mutated(file.read_bytes(), rng)
        file.unlink()
        if rng.random() < 0.9:
            file.write_bytes(content)
        outcomes.open(f"{seed} {file.relative_to(path)}", rng.sample(sorted(bundle.leaves), 2))
        shutil.rmtree(path)
    outcomes.done(least=0.1, most=0.9)
