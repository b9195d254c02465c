"""PyTorch checkpoints: recorded files, round trips, torch as reference, hostile files."""

import itertools
import os
import pathlib
import pickle
import pickletools
import random
import struct
import time
import tracemalloc
import weakref
import zipfile

import ml_dtypes
import numpy as np
import pytest

from fsdfm_jax.convert import torch_pickle
from fsdfm_jax.convert.torch_pickle import Pending, TorchFile, TorchTensor, is_torch_file, write
from fsdfm_jax.inference.bundle import BadFile

GOLDENS = pathlib.Path(__file__).parent / "goldens"
DICT = b"ccollections\nOrderedDict\n)R"


def loaded(path):
    """The whole file as plain values; tensors as (dtype, shape, bytes)."""

    def plain(node):
        if isinstance(node, TorchTensor):
            array = file.read(node)
            assert (array.dtype, array.shape) == (node.dtype, node.shape)
            assert array.flags.c_contiguous
            return str(array.dtype), array.shape, array.tobytes()
        if isinstance(node, dict):
            return {key: plain(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(map(plain, node))
        return node

    with TorchFile(path) as file:
        return plain(file.tree)


def same(array, other):
    assert (array.dtype, array.shape) == (other.dtype, other.shape)
    assert array.tobytes() == other.tobytes()


def zip_of(path, content, storages=(), *, top="m", extra=(), **how):
    """A checkpoint with this pickle, storages by their keys and further entries."""
    with zipfile.ZipFile(path, "w") as archive:
        entries = [("data.pkl", content)]
        entries += [(f"data/{key}", value) for key, value in dict(storages).items()]
        entries += [("version", b"3\n"), *extra]
        for name, value in entries:
            archive.writestr(zipfile.ZipInfo(f"{top}/{name}", (1980, 1, 1, 0, 0, 0)), value, **how)
    return path


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(shape, strides, offset=0, *, numel=6, key="0", storage=b"torch\nFloatStorage\n"):
    """Pickle of a tensor, as torch.save has it."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + (text("storage") + b"c" + storage + text(key) + text("cpu") + number(numel) + b"tQ")
        + (number(offset) + numbers(shape) + numbers(strides) + b"\x89" + DICT + b"tR")
    )


SIX = np.arange(6, dtype=np.float32)


def pickled(path, body, storages=None, **how):
    """A checkpoint of a pickle's body and a storage "0" of the floats 0 to 5."""
    storages = {"0": SIX.tobytes()} if storages is None else storages
    return zip_of(path, b"\x80\x02" + body + b".", storages, **how)


def refused(path, *words):
    """Open and read the file, which must fail; return the message."""
    with pytest.raises(BadFile) as caught:
        loaded(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith(".")
    assert len(message) < len(str(path)) + 500, "quotes too much of the file"
    for word in words:
        assert word in message, message
    return message


# Files as they are.


@pytest.mark.parametrize(
    ("name", "group"), [("dfm", "model"), ("fs", "student_ema_model"), ("fs", "student_model")]
)
def test_recorded_checkpoints_hold_the_recorded_weights(name, group):
    with np.load(GOLDENS / f"shared_{name}_uniform.npz") as arrays:
        expected = {key[3:]: arrays[key] for key in arrays if key.startswith("sd/")}
    path = GOLDENS / f"shared_{name}_uniform.pth"
    assert is_torch_file(path)
    with TorchFile(path) as file:
        state = {
            key.removeprefix("module.").removeprefix("_orig_mod."): file.read(value)
            for key, value in file.tree[group].items()
        }
    # Their inv_freq is a buffer that may be on one side only.
    assert set(expected) - set(state) <= {"rotary_emb.inv_freq"}
    assert len(state) > 30
    for key, array in state.items():
        if group != "student_model":
            same(array, expected[key])
        else:
            assert array.shape == expected[key].shape, key


ARRAYS = {
    "float32": SIX.reshape(2, 3),
    "float64": np.array([np.pi, -0.0, np.inf]),
    "float16": np.array([[1.5], [-65504]], np.float16),
    "bfloat16": np.arange(5).astype(ml_dtypes.bfloat16),
    "int64": np.array([-(2**63), 2**63 - 1]),
    "int8": np.arange(-3, 3, dtype=np.int8),
    "bool": np.array([True, False]),
    "scalar": np.array(7, np.int32),
    "empty": np.zeros((0, 4), np.float32),
    "nan": np.array([0x7FC00001, 0xFFC00002], np.uint32).view(np.float32),
    "complex": np.array([1 + 2j], np.complex64),
}


def pending(name):
    return Pending(name, ARRAYS[name].dtype, ARRAYS[name].shape)


TREE = {
    "model": {name: pending(name) for name in ARRAYS},
    "again": {"tied": pending("float32"), 7: [pending("scalar"), pending("bfloat16")]},
    "step": 190_000,
    "plain": [None, True, False, -1, 2**31, -(2**70), 1.5, float("inf"), "ä\U0001f600\n", [], {}],
}


def test_what_was_written_is_read_bit_by_bit(tmp_path):
    path = tmp_path / "file.pth"
    write(path, TREE, reversed(ARRAYS.items()))
    with TorchFile(path) as file:
        assert list(file.tree) == list(TREE)
        assert file.tree["plain"] == TREE["plain"]
        assert [type(value) for value in file.tree["plain"]] == list(map(type, TREE["plain"]))
        assert file.tree["step"] == 190_000
        for name, array in ARRAYS.items():
            leaf = file.tree["model"][name]
            assert isinstance(leaf, TorchTensor)
            assert (leaf.dtype, leaf.shape) == (array.dtype, array.shape)
            same(file.read(leaf), array)
        assert file.tree["again"]["tied"] == file.tree["model"]["float32"]
        first, second = (file.read(file.tree["model"]["float32"]) for _ in range(2))
        first[:] = 9  # its own memory
        same(second, ARRAYS["float32"])
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert len([name for name in names if "/data/" in name]) == len(ARRAYS)
        assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="closed"):
        file.read(leaf)


def test_equal_input_gives_equal_bytes_wherever_it_goes(tmp_path):
    paths = [tmp_path / name for name in ("a.pth", "other.tmp")]
    for path in paths:
        write(path, TREE, ARRAYS.items())
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with zipfile.ZipFile(paths[0]) as archive:  # nor does it matter when
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("zip64_from", [-1, 1 << 30])
def test_storages_are_aligned_and_large_entries_have_large_headers(
    tmp_path, monkeypatch, zip64_from
):
    monkeypatch.setattr(torch_pickle, "_ZIP64_FROM", zip64_from)
    path = tmp_path / "file.pth"
    write(path, TREE, ARRAYS.items())
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            at = info.header_offset
            start = at + 30 + sum(struct.unpack("<HH", raw[at + 26 : at + 30]))
            assert start % 64 == 0
            assert raw[start : start + info.file_size] == archive.read(info)
            assert (raw[at + 4] == 45) == (zip64_from == -1)  # the zip version it takes
    model = loaded(path)["model"]
    assert model["nan"][2] == ARRAYS["nan"].tobytes()


def test_writing_holds_one_array_at_a_time(tmp_path):
    alive = []

    def stream():
        for i in range(4):
            assert [ref for ref in alive if ref() is not None] == []
            array = np.full(100, i, np.float32)
            alive.append(weakref.ref(array))
            yield str(i), array
            del array

    tree = {str(i): Pending(str(i), np.dtype(np.float32), (100,)) for i in range(4)}
    write(tmp_path / "file.pth", tree, stream())
    assert len(alive) == 4


def test_reading_holds_no_more_than_the_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "_CHUNK", 1 << 16)
    size = 4 << 20
    body = b"}(" + text("part") + tensor((10,), (1,), 99, numel=size)
    body += text("all") + tensor((size,), (1,), numel=size) + b"u"
    content = np.arange(size, dtype=np.float32)
    path = pickled(tmp_path / "file.pth", body, {"0": content.tobytes()})
    tracemalloc.start()
    try:
        with TorchFile(path) as file:
            same(file.read(file.tree["part"]), content[99:109])
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
            tracemalloc.reset_peak()
            same_ends = file.read(file.tree["all"])[[0, -1]]
            assert tracemalloc.get_traced_memory()[1] < 4 * size + (1 << 20)
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(same_ends, content[[0, -1]])


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (lambda a: list(a.items())[1:], "never came"),
        (lambda a: [*a.items(), ("int8", a["int8"])], "came twice"),
        (lambda a: [*a.items(), ("new", a["int8"])], "isn't in the tree"),
        (lambda a: (a | {"int8": a["int8"][1:]}).items(), "announced"),
        (lambda a: (a | {"int8": a["int8"].astype(np.int16)}).items(), "announced"),
        (lambda a: (a | {"int64": a["int64"].astype(">i8")}).items(), "announced"),
    ],
)
def test_wrong_streams_leave_no_file(tmp_path, stream, message):
    path = tmp_path / "file.pth"
    with pytest.raises(ValueError, match=message):
        write(path, TREE, stream(ARRAYS))
    assert not path.exists()


def test_a_failing_stream_leaves_no_file(tmp_path):
    def stream():
        yield "float32", ARRAYS["float32"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "file.pth", TREE, stream())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": object()}, "object"),
        ({("a",): 1}, "keys"),
        ({"a": 1 << 5000}, "255 bytes"),
        ({"a": Pending("a", np.dtype("U3"), ())}, "expected one of"),
        ([Pending("a", np.dtype("f4"), (2,)), Pending("a", np.dtype("f4"), (3,))], "different"),
    ],
)
def test_what_cannot_be_written_is_said_before_there_is_a_file(tmp_path, tree, message):
    path = tmp_path / "file.pth"
    path.write_text("the last one")
    with pytest.raises(ValueError, match=message):
        write(path, tree, [])
    assert path.read_text() == "the last one"
    circle = []
    circle.append(circle)
    with pytest.raises(ValueError, match="contains itself"):
        write(path, circle, [])


# Views, and values that stand beside tensors.


def test_views_are_read_through_their_strides(tmp_path):
    views = {
        "transposed": (tensor((3, 2), (1, 3)), SIX.reshape(2, 3).T),
        "column": (tensor((2,), (3,), 1), SIX[1::3]),
        "diagonal": (tensor((2,), (4,)), SIX[::4][:2]),
        "tail": (tensor((2, 1), (1, 77), 4), SIX[4:, None]),
        "point": (tensor((), (), 5), SIX[5]),
        "nothing": (tensor((0, 9), (9, 1), 6), SIX[:0].reshape(0, 1)[:, :0].reshape(0, 9)),
        "flags": (
            tensor((3,), (1,), numel=3, key="1", storage=b"torch\nBoolStorage\n"),
            np.array([False, True, True]),
        ),
    }
    body = b"}(" + b"".join(text(name) + value for name, (value, _) in views.items()) + b"u"
    path = pickled(tmp_path / "file.pth", body, {"0": SIX.tobytes(), "1": b"\0\1\2"})
    with TorchFile(path) as file:
        for name, (_, expected) in views.items():
            array = file.read(file.tree[name])
            same(array, np.ascontiguousarray(expected).reshape(array.shape))
            assert array.flags.c_contiguous
            assert array.shape == expected.shape
            array[...] = 0  # writable, its own


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_of_every_protocol(tmp_path, protocol):
    value = {
        "numbers": [1, -1, 255, 65536, 2**40, -(2**200), 1.5, 1 + 2j, True, None],
        "text": ["", "ä" * 300, b"", b"\x00\xff" * 200],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "sets": [{1, "a"}, frozenset({2}), set(), frozenset(), {(1, "b")}],
        (1, "b"): {3: {None: {2.5: {}}}},
        "numpy": [np.float64(1.5), np.float32(0.25), np.int64(-4), np.bool_(True), np.float16(2)],
    }
    same_twice = [5]
    value["shared"] = [same_twice, same_twice]
    path = zip_of(tmp_path / "file.pth", pickle.dumps(value, protocol))
    with TorchFile(path) as file:
        assert file.tree == value
        assert [type(one) for one in file.tree["numpy"]] == [float, float, int, bool, float]


def test_random_states_and_old_numpy_names(tmp_path):
    state = np.random.RandomState(3).get_state()
    content = pickle.dumps(state, 2)
    path = tmp_path / "file.pth"
    for old in (content, content.replace(b"numpy._core.", b"numpy.core.")):
        with TorchFile(zip_of(path, old)) as file:
            assert file.tree[0] == "MT19937"
            np.testing.assert_array_equal(file.tree[1], state[1])
            assert file.tree[2:] == state[2:]
    refused(zip_of(path, pickle.dumps(np.float64(1).astype(">f8"), 2).replace(b"<", b">")), "state")
    refused(zip_of(path, pickle.dumps(np.array(["a"]), 2)), "dtype")
    refused(zip_of(path, pickle.dumps(np.array([None]), 2)), "dtype")


def test_a_tree_as_deep_as_can_be_written_is_read(tmp_path):
    tree = {"w": Pending("w", np.dtype("f4"), (6,))}
    for _ in range(torch_pickle._MAX_DEPTH - 1):
        tree = [tree]
    path = tmp_path / "file.pth"
    write(path, tree, [("w", SIX)])
    assert str(loaded(path)).count("[") == torch_pickle._MAX_DEPTH - 1
    with pytest.raises(ValueError, match="levels"):
        write(path, [tree], [("w", SIX)])


# Pickles that are programs.


class Evil:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def hostile(canary):
    """name -> (pickle, part of the message); each would write the canary file if unpickled."""
    command = f"touch {canary}"
    source = f"open({str(canary)!r}, 'w')"
    short = text(command)
    inner = b"cos\nsystem\n" + short[:200] + b"\x85R."
    system = Evil(os.system, (command,))
    nested = Evil(dict, (), {"a": system})
    return {
        "global": (b"\x80\x02cos\nsystem\n" + short + b"\x85R.", "os.system"),
        "posix": (pickle.dumps(system, 2), "posix.system"),
        "stack_global": (pickle.dumps(system, 4), "posix.system"),
        "protocol 5": (pickle.dumps({"model": [system]}, 5), "posix.system"),
        "build": (pickle.dumps(nested, 2), ""),
        "build of a dict": (
            b"\x80\x02" + DICT + b"}" + text("a") + b"cos\nsystem\n" + short + b"\x85RsbJ\0\0\0\0.",
            "os.system",
        ),
        "eval": (pickle.dumps(Evil(eval, (source,)), 2), "__builtin__.eval"),
        "exec": (pickle.dumps(Evil(exec, (source,)), 4), "builtins.exec"),
        "getattr": (
            b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n" + text("x") + b"\x86R.",
            "getattr",
        ),
        "inst": (b"(" + short + b"ios\nsystem\n.", "os.system"),
        "obj": (b"\x80\x02(cos\nsystem\n" + short + b"o.", "os.system"),
        "obj of a known name": (b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ"),
        "newobj": (b"\x80\x02csubprocess\nPopen\n" + short + b"\x85\x81.", "subprocess.Popen"),
        "newobj_ex": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
        "ext1": (b"\x80\x02\x82\x01)R.", "EXT1"),
        "ext2": (b"\x80\x02\x83\x01\x00)R.", "EXT2"),
        "ext4": (b"\x80\x02\x84\x01\x00\x00\x00)R.", "EXT4"),
        "persid": (b"\x80\x02Pos.system\n.", "PERSID"),
        "namespace": (b"\x80\x02cargparse\nNamespace\n)\x81.", "argparse.Namespace"),
        "dotted": (
            b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys") + b"\x93)R.",
            "OrderedDict.fromkeys",
        ),
        "space": (b"\x80\x04" + text("os system") + text("x") + b"\x93)R.", "os.system"),
        "the text of a known name": (
            b"\x80\x02" + text("collections.OrderedDict") + b")R.",
            "call",
        ),
        "a value's name": (b"\x80\x02ctorch\nFloatStorage\n)R.", "torch.FloatStorage"),
        "load_from_bytes": (b"\x80\x02ctorch.storage\n_load_from_bytes\n)R.", "_load_from_bytes"),
        "any module": (b"\x80\x02cno_such_module_at_all\nx\n.", "no_such_module_at_all.x"),
        "long name": (b"\x80\x02c" + b"a" * 100_000 + b"\nb\n.", "..."),
        "factory": (b"\x80\x02ccollections\ndefaultdict\ncos\nsystem\n\x85R.", "os.system"),
        "factory of text": (
            b"\x80\x02ccollections\ndefaultdict\n" + short + b"\x85R.",
            "collections.defaultdict",
        ),
        "dict of items": (b"\x80\x02ccollections\nOrderedDict\n](]e\x85R.", "OrderedDict"),
        "a pickle in a pickle": (
            b"\x80\x03cpickle\nloads\nC" + bytes([len(inner)]) + inner + b"\x85R.",
            "pickle.loads",
        ),
        "an unpickler": (b"\x80\x02c_pickle\nUnpickler\n)R.", "_pickle.Unpickler"),
        "codec": (
            b"\x80\x02c_codecs\nencode\n" + short + text("unicode_escape") + b"\x86R.",
            "_codecs.encode",
        ),
        "persistent call": (b"\x80\x02(cos\nsystem\n" + short + b"\x85tQ.", "os.system"),
        "persistent text": (b"\x80\x02" + short + b"Q.", ""),
        "no arguments": (b"\x80\x02ctorch\nSize\nNR.", ""),
        "call of a call": (b"\x80\x02" + DICT + b")R.", "call"),
        "class of a dict": (
            b"\x80\x02" + DICT + b"(N}" + text("__class__") + b"ctorch\nSize\nstb.",
            "collections.OrderedDict",
        ),
        "slots of a set": (
            b"\x80\x02c__builtin__\nset\n)R(N}" + text("add") + b"ctorch\nSize\nstb.",
            "builtins.set",
        ),
        "slots of a name": (
            b"\x80\x02ctorch\nSize\n(N}" + text("__call__") + b"ctorch\ndevice\nstb.",
            "",
        ),
        "attributes of a name": (b"\x80\x02ctorch\nSize\n}" + text("a") + b"Nsb.", ""),
        "attributes of a list": (b"\x80\x02]}" + text("append") + b"Nsb.", ""),
        "items of a device": (
            b"\x80\x02ctorch\ndevice\n" + short + b"\x85R" + short + b"Ns.",
            "torch.device",
        ),
        "sparse": (b"\x80\x02ctorch._utils\n_rebuild_sparse_tensor\n)R.", "_rebuild_sparse_tensor"),
        "quantized": (b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R.", "_rebuild_qtensor"),
    }


@pytest.mark.parametrize("name", list(hostile("c")))
def test_nothing_that_a_pickle_names_is_run(tmp_path, name):
    canary = tmp_path / "canary"
    content, words = hostile(canary)[name]
    message = refused(zip_of(tmp_path / "file.pth", content), words)
    assert not canary.exists()
    assert "re-save only the weights" in message


CALLING = {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "EXT1", "EXT2", "EXT4", "PERSID"}
HASHING = {"EMPTY_DICT", "DICT", "EMPTY_SET", "FROZENSET"}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_is_unpickled_neither_calls_nor_hashes(protocol):
    value = [{1: {2}}, frozenset({3}), 1j, np.float64(1), b"\xff", {"a": np.zeros(2)}]
    content = pickle.dumps(value, protocol)
    assert {op.name for op, *_ in pickletools.genops(content)} & (CALLING | HASHING)
    inert = torch_pickle._inert(content)
    assert not {op.name for op, *_ in pickletools.genops(inert)} & (CALLING | HASHING)
    inert = torch_pickle._inert(b"\x80\x02ccollections\nOrderedDict\n)\x81.")  # NEWOBJ
    assert not {op.name for op, *_ in pickletools.genops(inert)} & CALLING


def test_the_canary_would_have_sung(tmp_path):
    canary = tmp_path / "canary"
    pickle.loads(hostile(canary)["stack_global"][0])
    assert canary.exists()


# Pickles that waste time and memory. Each is small; what it asks for is not.


def dag(leaf, wrap, levels=60):
    """Each level holds the one before twice."""
    body = b"\x80\x02(" + leaf + b"q\x00"
    for i in range(levels):
        body += wrap(b"h" + bytes([i])) + b"q" + bytes([i + 1])
    return body


def numbers_as_keys(count):
    # All multiples of the modulus of hashes of numbers, were they of any size.
    items = b"".join(number(i) + b"N" for i in range(count))
    return b"\x80\x02}(" + items + b"u."


BOMBS = {
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "sparse memo": b"\x80\x02Nq\x00q\x02.",
    "text": b"\x80\x02X\xff\xff\xff\xffa.",
    "bytes": b"\x80\x03B\xff\xff\xff\xffa.",
    "persistent text": b"\x80\x02" + text("a" * (16 << 20)) + b"Q.",
    "frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.",
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"a.",
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", (1 << 64) - 1) + b"a.",
    "long bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"a.",
    "long4": b"\x80\x02\x8b" + struct.pack("<i", 1_000_000) + b"\x7f" * 1_000_000 + b".",
    "long1 key": b"\x80\x02}\x8a\xff" + b"\x7f" * 255 + b"Ns.",
    "decimal": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "tuple of tuples": dag(b")", lambda get: get + get + b"\x86") + b"t.",
    "list of lists": dag(b"]", lambda get: b"](" + get + get + b"e") + b"t.",
    "dict of dicts": dag(b"}", lambda get: b"}(Nh\x00\x88" + get + b"\x89" + get + b"u") + b"t.",
    "hash of tuples": dag(b")", lambda get: get + get + b"\x86") + b"}h\x3cNst.",
    "key of tuples": b"\x80\x02})\x85\x85Ns.",
    "deep lists": b"\x80\x02" + b"]" * 60_000 + b"a" * 59_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 60_000 + b".",
    "deep marks": b"\x80\x02" + b"(" * 60_000 + b"t" * 59_999 + b".",
    "only marks": b"\x80\x02" + b"(" * 60_000 + b"N.",
    "itself": b"\x80\x02]q\x00h\x00a.",
    "itself by a tuple": b"\x80\x02]q\x00h\x00\x85a.",
    "itself by a dict": b"\x80\x02}q\x00" + text("a") + b"]h\x00as.",
    "many number keys": numbers_as_keys(70_000),
    "copies of bytes": b"\x80\x02" + text("a" * 50_000) + b"q\x00c_codecs\nencode\nq\x01"
    + text("latin1") + b"q\x02" + b"h\x01h\x00h\x02\x86R" * 20_000 + b".",
    "copies of sets": b"\x80\x02](" + text("a") * 20_000 + b"eq\x00c__builtin__\nset\nq\x01"
    + b"h\x01h\x00\x85R" * 20_000 + b".",
    "the same arguments": b"\x80\x02((" + text("a") + b"K\x01" * 20_000 + b"tq\x00"
    + b"ctorch\ndevice\nq\x01" + b"h\x01h\x00R" * 20_000 + b"t.",
    "copies of arrays": b"\x80\x03cnumpy\ndtype\n" + text("u1") + b"\x85Rq\x00"
    b"cnumpy.core.multiarray\n_reconstruct\nq\x01(NJ\xa0\x86\x01\x00\x85h\x00\x89"
    + b"B\xa0\x86\x01\x00" + b"a" * 100_000 + b"tq\x02(" + b"h\x01)Rh\x02b" * 20_000 + b"t.",
    "many number keys in sets": b"\x80\x02(" + b"".join(
        b"c__builtin__\nset\n](" + b"".join(number(i) for i in range(1000)) + b"e\x85R"
        for _ in range(70)
    ) + b"t.",
    "key of huge numbers": b"\x80\x02}" + number(1 << 63) + b"\x85Ns.",
    "key of many numbers": b"\x80\x02}(" + b"N" * 17 + b"tNs.",
    "shape": b"\x80\x02ctorch\nSize\n(" + b"K\x01" * 100_000 + b"t\x85R.",
    "protocol 0": pickle.dumps([1], 0),
    "protocol 9": b"\x80\x09N.",
    "empty": b"",
    "no end": b"\x80\x02N",
    "nothing": b"\x80\x02.",
    "two": b"\x80\x02NN.",
    "odd items": b"\x80\x02}(NNNu.",
    "items of nothing": b"\x80\x02NNNs.",
    "unhashable": b"\x80\x02}]Ns.",
    "unhashable in a set": b"\x80\x02c__builtin__\nset\n](]e\x85R.",
    "short tuple": b"\x80\x02N\x87.",
    "no memo": b"\x80\x02h\x05.",
    "bad text": b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
    "unknown opcode": b"\x80\x02\xf0.",
    "an array of nothing": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(NNNNNtb.",
    "an array of more": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01"
    + numbers([1 << 40]) + b"cnumpy\ndtype\n" + text("f4") + b"\x85R\x89C\x04aaaatb.",
}  # fmt: skip


@pytest.mark.parametrize("name", list(BOMBS))
def test_bombs_are_refused_soon_and_small(tmp_path, name):
    path = zip_of(tmp_path / "file.pth", BOMBS[name])
    began = time.process_time()
    tracemalloc.start()
    try:
        refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 << 20
    assert time.process_time() - began < 10  # tracemalloc makes it several times as long


def test_endless_pickles_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_pickle, "_MAX_OPCODES", 1000)
    refused(zip_of(tmp_path / "file.pth", b"\x80\x02](" + b"N" * 2000 + b"e."), "steps")
    monkeypatch.setattr(torch_pickle, "_MAX_PICKLE", 100)
    refused(zip_of(tmp_path / "file.pth", b"\x80\x02" + text("a" * 200) + b"."), "at most 100")


def test_trees_that_share_are_walked_as_trees(tmp_path):
    body = dag(b"]", lambda get: b"](" + get + get + b"e", levels=10) + b"t."
    with TorchFile(zip_of(tmp_path / "file.pth", body)) as file:
        assert len(str(file.tree)) > 2**10


# Tensors that are not there.

BAD_TENSORS = {
    "beyond the end": (tensor((7,), (1,)), "reaches to element 7"),
    "by its offset": (tensor((6,), (1,), 1), "reaches to element 7"),
    "by its stride": (tensor((2,), (6,)), "reaches to element 7"),
    "by its offset, empty": (tensor((0,), (1,), 7), "reaches to element 7"),
    "negative offset": (tensor((1,), (1,), -1), "sensible shape"),
    "negative shape": (tensor((-1,), (1,)), "sensible shape"),
    "negative stride": (tensor((2,), (-1,), 3), "sensible shape"),
    "huge shape": (tensor((2**62, 4), (0, 1)), "sensible shape"),
    "huge empty": (tensor((0, 2**62, 2**62), (0, 0, 0)), "sensible shape"),
    "huge stride": (tensor((2,), (2**62,)), "reaches to"),
    "expanded": (tensor((4, 3), (0, 1)), "expanded view"),
    "too many strides": (tensor((2,), (1, 1)), "sensible shape"),
    "too many dimensions": (tensor((1,) * 40, (1,) * 40), "sensible shape"),
    "of no ints": (tensor((), ()).replace(b"(t(t", b"(NtNt"), ""),
    "of lists": (tensor((), ()).replace(b"(t(t", b"]]"), "sensible shape"),
    "of bools": (tensor((), ()).replace(b"(t(t", b"\x88\x85\x88\x85"), "sensible shape"),
    "another numel": (tensor((5,), (1,), numel=5), "24 bytes in storage '0'"),
    "a negative numel": (tensor((5,), (1,), numel=-6), "24 bytes in storage '0'"),
    "another type": (tensor((6,), (1,), storage=b"torch\nDoubleStorage\n"), "24 bytes"),
    "untyped": (tensor((6,), (1,), storage=b"torch.storage\nUntypedStorage\n", numel=24), "typed"),
    "no storage": (tensor((6,), (1,), storage=b"torch\nfloat32\n"), "names no storage"),
    "a missing entry": (tensor((6,), (1,), key="5"), "lacks the storage '5'"),
    "an entry elsewhere": (tensor((6,), (1,), key="../data.pkl"), "lacks the storage"),
    "another kind": (tensor((6,), (1,)).replace(b"storage", b"starage"), ""),
    "conjugated": (
        tensor((6,), (1,))[:-2] + b"}" + text("conj") + b"\x88stR",
        "conjugated",
    ),
    "filled": (tensor((6,), (1,)) + text("a") + b"Ns", "torch._utils._rebuild_tensor_v2"),
    "a bare storage": (
        b"(" + tensor((6,), (1,)).partition(b"\n((")[2].partition(b"Q")[0] + b"Q",
        "without a tensor",
    ),
}


@pytest.mark.parametrize("name", list(BAD_TENSORS))
def test_tensors_that_are_not_in_their_storage_are_refused(tmp_path, name):
    body, words = BAD_TENSORS[name]
    refused(pickled(tmp_path / "file.pth", body), words)


def test_a_changed_leaf_cannot_reach_beyond_its_storage(tmp_path):
    with TorchFile(pickled(tmp_path / "file.pth", tensor((6,), (1,)))) as file:
        with pytest.raises(BadFile, match="reaches to element"):
            file.read(file.tree._replace(offset=1))
        with pytest.raises(BadFile, match="lacks the storage"):
            file.read(file.tree._replace(storage="9"))


# Zips that lie.


def test_content_is_checked_when_it_is_read(tmp_path):
    body = b"}(" + text("all") + tensor((6,), (1,)) + text("part") + tensor((1,), (1,), 5) + b"u"
    path = pickled(tmp_path / "file.pth", body)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(SIX.tobytes(), (SIX + (SIX == 3)).tobytes()))
    with TorchFile(path) as file:
        for name in ("all", "part"):  # the part itself is unharmed, but who knows
            with pytest.raises(BadFile, match="checksum"):
                file.read(file.tree[name])
    large = np.zeros(1 << 20, np.float32)  # more than anybody buffers
    body = body.replace(number(6), number(large.size))
    path = pickled(path, body, {"0": large.tobytes()})
    with TorchFile(path) as file:
        os.truncate(path, large.nbytes // 2)
        part = file.tree["all"]._replace(offset=large.size - 1, shape=(1,))
        for leaf in (file.tree["all"], part):
            with pytest.raises(BadFile, match="ends .* bytes before"):
                file.read(leaf)


def test_files_that_were_cut_off(tmp_path):
    path = tmp_path / "file.pth"
    write(path, TREE, ARRAYS.items())
    raw = path.read_bytes()
    for size in (len(raw) - 1, len(raw) // 2, 700):
        path.write_bytes(raw[:size])
        assert is_torch_file(path), "or who would say that it was cut off?"
        refused(path, "cut off", "download it again")


@pytest.mark.parametrize("content", [b"", b"PK", b"hello", b"\x08" * 600, b"PK\3\4" + b"a" * 50])
def test_other_files_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert not is_torch_file(path)
    refused(path)


def test_files_that_are_not_there(tmp_path):
    assert not is_torch_file(tmp_path / "none")
    assert not is_torch_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        TorchFile(tmp_path / "none")


def test_other_zips_are_no_checkpoints(tmp_path):
    path = tmp_path / "file.npz"
    np.savez(path, a=SIX, b=SIX)
    assert not is_torch_file(path)
    refused(path, "not a PyTorch checkpoint")
    zip_of(path, b"N.", top="a/b")
    assert not is_torch_file(path)
    refused(path, "one top folder")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/version", b"3\n")
        archive.writestr("a/data.pkl", b"\x80\x02N.")
        archive.writestr("b/data/0", b"N.")
    assert not is_torch_file(path)
    refused(path, "one top folder")


def test_files_from_before_the_zip_format_are_told_so(tmp_path):
    path = tmp_path / "file.pth"
    for protocol in (2, 3, 4):
        magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol)
        path.write_bytes(magic + pickle.dumps(1001, protocol) + b"x" * 600)
        assert is_torch_file(path), "or who would say that it is old?"
        refused(path, "before torch 1.6", "torch.save it again")
    path.write_bytes(b"\0" * 257 + b"ustar" + b"\0" * 1000)
    assert is_torch_file(path)
    refused(path, "before torch 1.6")
    path.write_bytes(b"\0" * 2000)
    assert not is_torch_file(path)


def test_zips_that_are_not_as_torch_has_them(tmp_path):
    path, body = tmp_path / "file.pth", tensor((6,), (1,))
    refused(pickled(path, body, compress_type=zipfile.ZIP_DEFLATED), "compressed or encrypted")
    bomb = zip_of(path, b"\x80\x02" + text("a" * (8 << 20)) + b".", compress_type=zipfile.ZIP_LZMA)
    refused(bomb, "compressed or encrypted")
    for name in ("../../x", "data/../y", "./z", "a\\b"):
        refused(pickled(path, body, extra=[(name, b"")]), "has an entry named")
    with pytest.warns(UserWarning, match="Duplicate"):
        pickled(path, body, extra=[("data/0", b"a" * 24)])
    refused(path, "twice")
    refused(pickled(path, body, extra=[("byteorder", b"big")]), "byte order")
    refused(pickled(path, body, extra=[("byteorder", b"little" * 9)]), "at most 16")
    assert loaded(pickled(path, body, extra=[("byteorder", b"little"), ("data/", b"")]))


def test_directories_that_lie(tmp_path):
    path = pickled(tmp_path / "file.pth", b"}(" + text("a") + tensor((6,), (1,)) + b"u")
    raw = path.read_bytes()
    at = {}
    position = -1
    while (position := raw.find(b"PK\1\2", position + 1)) >= 0:
        size = struct.unpack_from("<H", raw, position + 28)[0]
        at[raw[position + 46 : position + 46 + size]] = position
    first, storage = at[b"m/data.pkl"], at[b"m/data/0"]

    def changed(position, layout, value):
        copy = bytearray(raw)
        struct.pack_into(layout, copy, position, value)
        path.write_bytes(copy)

    encrypted = struct.unpack_from("<H", raw, storage + 8)[0] | 1
    start = struct.unpack_from("<I", raw, first + 42)[0]
    for layout, position, value, words in (
        ("<H", storage + 8, encrypted, "encrypted"),
        ("<I", storage + 42, start, "isn't so"),  # of another entry
        ("<I", storage + 42, 1 << 30, "damaged"),
        ("<I", storage + 42, 7, "isn't so"),
        ("<I", first + 24, 1 << 30, "compressed"),
        ("<I", first + 16, 0, "checksum"),
    ):
        changed(position, layout, value)
        refused(path, words)
    for size in (25, 1 << 30, 0xFFFFFFFE):
        copy = bytearray(raw)
        struct.pack_into("<II", copy, storage + 20, size, size)
        path.write_bytes(copy)
        refused(path)
    # Two entries that are one place: the name is right for the first only.
    copy = bytearray(raw)
    copy[storage + 46 : storage + 54] = b"m/data/1"
    path.write_bytes(copy)
    refused(path, "isn't so")


def test_overlapping_entries_are_refused(tmp_path):
    # The second entry's header is inside the content of the first, as in overlapping zip bombs.
    inner = (
        struct.pack("<4s5HIIIHH", b"PK\3\4", 20, 0, 0, 0, 33, 0, 6, 6, 5, 0) + b"m/two" + b"inside"
    )
    path = pickled(tmp_path / "file.pth", b"N", {}, extra=[("one", inner), ("two", b"inside")])
    assert loaded(path) is None
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"PK\1\2")
    struct.pack_into("<I", raw, entry + 42, raw.index(inner))
    path.write_bytes(raw)
    refused(path, "overlaps")


def test_huge_directories_are_not_read(tmp_path, monkeypatch):
    path = pickled(tmp_path / "file.pth", b"N", {}, extra=[(f"{i:0100}", b"") for i in range(50)])
    assert loaded(path) is None
    monkeypatch.setattr(torch_pickle, "_MAX_DIRECTORY", 3000)
    refused(path, "zip directory of")


# Broken files of every kind: 3 x 1,200 copies, each with a different seed.


def small_file(path):
    arrays = {"w": SIX.reshape(2, 3), "b": np.arange(4).astype(ml_dtypes.bfloat16)}
    arrays["n"] = np.array(5, np.int64)
    leaf = {name: Pending(name, array.dtype, array.shape) for name, array in arrays.items()}
    tree = {"model": leaf, "optimizer": {"state": {0: {"step": leaf["n"], "avg": leaf["w"]}}}}
    write(
        path, tree | {"epoch": 3, "lr": [0.1, 1e-3], "name": "small", "done": None}, arrays.items()
    )


def mutated(raw, rng):
    """A copy with one to three things wrong."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = len(raw)
        if size < 8:
            break
        a, b = sorted(rng.sample(range(size), 2))
        length = rng.choice((1, 2, 4, 8, 30, 100))
        kind = rng.randrange(9)
        if kind == 0:
            raw[a] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[a] = rng.randrange(256)
        elif kind == 2:
            del raw[rng.choice((a, b)) :]
        elif kind == 3:
            raw[a : a + length] = bytes(len(raw[a : a + length]))
        elif kind == 4:
            raw[a:a] = raw[b : b + length]
        elif kind == 5:
            raw[a : a + length], raw[b : b + length] = raw[b : b + length], raw[a : a + length]
        elif kind == 6:
            del raw[a : a + length]
        elif kind == 7:
            raw[a : a + length] = rng.randbytes(length)
        else:  # the beginning of one thing, the end of another
            raw = raw[:a] + raw[b:]
    return bytes(raw)


def mutated_directory(raw, rng):
    """A copy with extreme or wrong numbers in offsets and sizes."""
    raw = bytearray(raw)
    places = []  # (position, layout)
    for magic, fields in (
        (b"PK\1\2", {4: "H", 6: "H", 8: "H", 10: "H", 16: "I", 20: "I", 24: "I", 28: "H", 30: "H",
                     32: "H", 34: "H", 42: "I"}),
        (b"PK\3\4", {4: "H", 6: "H", 8: "H", 14: "I", 18: "I", 22: "I", 26: "H", 28: "H"}),
        (b"PK\5\6", {4: "H", 6: "H", 8: "H", 10: "H", 12: "I", 16: "I", 20: "H"}),
    ):  # fmt: skip
        position = -1
        while (position := raw.find(magic, position + 1)) >= 0:
            places += [(position + at, "<" + layout) for at, layout in fields.items()]
    for _ in range(rng.choice((1, 1, 2, 3))):
        position, layout = rng.choice(places)
        (old,) = struct.unpack_from(layout, raw, position)
        top = (1 << 8 * struct.calcsize(layout)) - 1
        other = struct.unpack_from(layout, raw, rng.choice(places)[0] % (len(raw) - 4))[0]
        choices = (
            0,
            1,
            old + 1,
            old - 1,
            old ^ 1,
            top,
            top - 1,
            top // 2,
            rng.randrange(top),
            other,
        )
        struct.pack_into(layout, raw, position, rng.choice(choices) & top)
    return bytes(raw)


# Of the standard library's, about strings of protocol 0.
@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
@pytest.mark.parametrize("what", ["bytes", "pickle", "directory"])
def test_broken_files_are_refused_or_read_right(tmp_path, what):
    path = tmp_path / "file.pth"
    small_file(path)
    raw, expected = path.read_bytes(), loaded(path)
    with zipfile.ZipFile(path) as archive:
        content = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    inside = content.pop("data.pkl")
    storages = {key[5:]: value for key, value in content.items() if key.startswith("data/")}
    read, slowest, longest = 0, 0.0, 0
    tracemalloc.start()
    try:
        for seed in range(1200):
            rng = random.Random(f"{what} {seed}")
            if what == "pickle":  # in a zip that is right
                zip_of(path, mutated(inside, rng), storages)
            else:
                path.write_bytes((mutated if what == "bytes" else mutated_directory)(raw, rng))
            began = time.process_time()
            try:
                is_torch_file(path)
                result = loaded(path)
            except BadFile as error:
                longest = max(longest, len(str(error)))
            else:
                read += 1
                # Content is below checksums: where the pickle is right, so are the values.
                assert what == "pickle" or result == expected, seed
            slowest = max(slowest, time.process_time() - began)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
    assert slowest < 2
    assert longest < len(str(path)) + 500
    assert 10 < read < 1100, "mutations that break nothing, or everything, test nothing"


# What torch says.


def torch_file_of(value, path):
    torch = pytest.importorskip("torch")
    torch.save(value, path)
    return torch


def agree(mine, theirs):
    """Our plain values (see `loaded`) are torch's."""
    torch = pytest.importorskip("torch")
    if isinstance(theirs, torch.Tensor):
        dtype, shape, content = mine
        assert f"torch.{dtype}" == str(theirs.dtype)
        assert shape == tuple(theirs.shape)
        flat = theirs.detach().contiguous().reshape(-1)
        # Through a storage: numpy knows no bfloat16.
        assert content == bytes(flat.clone().untyped_storage())
    elif isinstance(theirs, dict):
        assert list(mine) == list(theirs)
        for key, value in theirs.items():
            agree(mine[key], value)
    elif isinstance(theirs, list | tuple):
        assert type(mine) is (tuple if isinstance(theirs, tuple) else list)
        for one, other in itertools.zip_longest(mine, theirs):
            agree(one, other)
    else:
        assert mine == theirs
        assert type(mine) is type(theirs)


@pytest.mark.parametrize("zip64_from", [-1, 1 << 30])
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_was_written(tmp_path, monkeypatch, mmap, zip64_from):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch_pickle, "_ZIP64_FROM", zip64_from)
    path = tmp_path / "file.pth"
    write(path, TREE, ARRAYS.items())
    theirs = torch.load(path, weights_only=True, mmap=mmap)
    agree(loaded(path), theirs)
    assert type(theirs["model"]).__name__ == "OrderedDict"
    tied, first = theirs["again"]["tied"], theirs["model"]["float32"]
    assert tied.data_ptr() == first.data_ptr()
    assert all(value.data_ptr() % 64 == 0 for value in theirs["model"].values())


def odd_things(torch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=False)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    big = torch.arange(24.0).reshape(4, 6)
    with_attribute = torch.nn.Parameter(torch.ones(2))
    with_attribute.tag = "head"
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": [big.T, big[1:3, ::2], big[:, 1], big[2, 3], big[:0], big.reshape(2, 2, 6).mT],
        "parameters": [torch.nn.Parameter(big), with_attribute, model[0].weight],
        "bf16": torch.randn(3).bfloat16(),
        "f16": torch.randn(3).half(),
        "others": [torch.tensor([1, 255], dtype=getattr(torch, name)) for name in UNTYPED],
        "complex": torch.randn(2, dtype=torch.complex64),
        "bool": torch.tensor([True, False]),
        3: {4: (5, 6.5), True: None},
        "random": torch.get_rng_state(),
        "numpy": [np.float64(0.1), np.int64(3), np.bool_(False)],
        "set": {1, 2},
    }


UNTYPED = ("uint16", "uint32", "uint64", "uint8", "int16")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves_is_read_as_torch_reads_it(tmp_path, protocol):
    torch = pytest.importorskip("torch")
    path = tmp_path / "file.pth"
    torch.save(odd_things(torch), path, pickle_protocol=protocol)
    theirs = torch.load(path, weights_only=False)
    theirs["numpy"] = [value.item() for value in theirs["numpy"]]
    assert is_torch_file(path)
    mine = loaded(path)
    agree(mine, theirs)
    assert mine["optimizer"]["state"][0]["step"] == ("float32", (), np.float32(1).tobytes())


def test_torch_names_that_are_no_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "file.pth"
    value = {"device": torch.device("meta", 1), "dtype": torch.bfloat16, "size": torch.Size([1, 2])}
    torch.save(value, path)
    assert loaded(path) == {"device": "meta:1", "dtype": "torch.bfloat16", "size": (1, 2)}
    torch.save(torch.ones(2), path)
    assert loaded(path) == ("float32", (2,), np.ones(2, np.float32).tobytes())


def test_what_torch_saves_but_is_no_plain_tensor_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "file.pth"
    for value, words in (
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (torch.zeros(1).expand(10), "expanded view"),
        (torch.ones(2, dtype=torch.complex64).conj(), "conjugated"),
        (torch.eye(2).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (torch.device, "torch.device"),
    ):
        torch.save({"a": value}, path)
        if value is torch.device:
            assert loaded(path) == {"a": "torch.device"}
        else:
            refused(path, words)
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    refused(path, "before torch 1.6")
