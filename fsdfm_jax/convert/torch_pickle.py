"""Read and write PyTorch's zip checkpoints without torch and without running their code.

A checkpoint is a zip of uncompressed entries in one folder: `data.pkl`, a pickle of the structure,
and `data/<key>`, the raw bytes of one storage each. A pickle is a program that names functions and
calls them. It is read in three steps, none of which calls anything that the file names:

  1. `_inert` scans the opcodes. It rejects opcodes and names that torch.save doesn't write, and
     anything that needs more memory than the file has. Opcodes that call or hash something are
     replaced by ones that record the call.
  2. `_Unpickler` runs the result. Names become `_Name`s, calls become `_Call`s.
  3. `_Builder` makes the tree by interpreting about a dozen known calls.

Tensors are read one at a time, on demand, directly from the file.
"""

import contextlib
import io
import math
import os
import pathlib
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy
import numpy as np

from fsdfm_jax.inference.bundle import BadFile

_STORAGES = {
    "float32": "Float", "float64": "Double", "float16": "Half", "bfloat16": "BFloat16",
    "int8": "Char", "int16": "Short", "int32": "Int", "int64": "Long", "uint8": "Byte",
    "bool": "Bool", "complex64": "ComplexFloat", "complex128": "ComplexDouble",
}  # fmt: skip
_STORAGE_OF = {np.dtype(name): f"{kind}Storage" for name, kind in _STORAGES.items()}
_UNTYPED = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")  # without typed storage
_DTYPES = {name: np.dtype(name) for name in (*_STORAGES, *_UNTYPED)}
_NUMPY_DTYPES = {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)} - {"f1"}
_NUMPY_DTYPES |= {"b1", "c8", "c16"}

# Limits far above real checkpoints, but low enough that malicious ones cost only seconds.
_MAX_DIRECTORY = 8 << 20  # bytes of the zip's directory
_MAX_PICKLE = 64 << 20  # bytes of data.pkl
_MAX_OPCODES = 4 << 20
_MAX_VALUES = 4 << 20  # in the tree, counting shared ones each time
_MAX_DEPTH = 100
_MAX_NUMBER_KEYS = 1 << 16  # keys other than str, because hashes of numbers can collide by design
_MAX_KEY_ITEMS = 16  # in a tuple as key
_MAX_INT_BITS = 2048
_MAX_DIMS = 32
_CHUNK = 16 << 20  # bytes per read or write

_LOCAL_HEADER = struct.Struct("<4s5HIIIHH")
_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # a pickled number
_AGAIN = "copy or download it again"
_RESAVE = "re-save only the weights (torch.save of the state dicts)"


class TorchTensor(NamedTuple):
    """An unread tensor of a file; strides and offset are in elements of the storage."""

    storage: str
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Pending(NamedTuple):
    """A tensor to be written; leaves with the same name share a storage in the file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


class TorchFile:
    """An open checkpoint.

    Attributes:
      tree: the saved object: dicts, lists and tuples of str, bytes, numbers, None, small numpy
        arrays and `TorchTensor` (itself a tuple: test for it first). OrderedDict and defaultdict
        become dicts, torch.Size a tuple, parameters their tensors, numpy scalars Python scalars,
        devices and dtypes str. It is safe to walk: no cycles, at most 100 levels and 4 million
        values.

    Raises:
      BadFile: the file is damaged, isn't a checkpoint, or would run code when unpickled.
      OSError: it can't be opened.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = os.fspath(path)
        self._checked: set[_Entry] = set()
        self._file = _File(io.FileIO(path))
        try:
            with _parsing(self._path):
                self._entries = _checkpoint_entries(self._file)
                order = self._entries.get("byteorder")
                order = b"little" if order is None else self._whole(order, 16)
                _need(order == b"little", f"has byte order {order}, expected b'little'", _RESAVE)
                content = self._whole(self._entries["data.pkl"], _MAX_PICKLE)
                unpickled = _Unpickler(io.BytesIO(_inert(content))).load()
                (_, self.tree), *_ = _Builder(self._entries, 4 * len(content)).build(unpickled, -1)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; `tree` remains valid, but `read` no longer works."""
        self._file.close()

    def read(self, tensor: TorchTensor) -> np.ndarray:
        """Read a leaf of `tree` into a new contiguous array.

        The checksum covers a whole storage. The first read of a tensor that is only a part of its
        storage therefore reads the whole storage, but holds only that part in memory.

        Raises:
          BadFile: the content is truncated or doesn't match its checksum.
          ValueError: the file was closed.
        """
        if self._file.closed:
            raise ValueError(f"{self._path} was closed; read its tensors before closing it.")
        with _parsing(self._path):
            entry, size = _storage_entry(self._entries, tensor.storage), tensor.dtype.itemsize
            extent = _extent(tensor, entry.size // size)
            raw = self._content(entry, tensor.offset * size, extent * size)
            # To torch any non-zero byte is True; numpy expects 1.
            flat = raw != 0 if tensor.dtype == np.bool_ else raw.view(tensor.dtype)
            strides = [stride * size for stride in tensor.strides]
            view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)
            return np.asarray(view, order="C")

    def _content(self, entry: "_Entry", start: int, size: int) -> np.ndarray:
        """Read bytes [start, start + size) of an entry and verify its checksum."""
        whole = size == entry.size
        if not whole and entry not in self._checked:
            scratch, crc = np.empty(min(_CHUNK, entry.size), np.uint8), 0
            for at in range(0, entry.size, _CHUNK):
                crc = self._fill(scratch[: entry.size - at], entry.start + at, crc)
            _check_crc(crc, entry)
            self._checked.add(entry)
        content, crc = np.empty(size, np.uint8), 0
        for at in range(0, size, _CHUNK):
            crc = self._fill(content[at : at + _CHUNK], entry.start + start + at, crc)
        if whole:
            _check_crc(crc, entry)
        return content

    def _fill(self, target: np.ndarray, start: int, crc: int) -> int:
        self._file.seek(start)
        missing = target.size - self._file.readinto(memoryview(target))
        _need(not missing, f"ends {missing} bytes before the content of a tensor does")
        return zlib.crc32(target, crc)

    def _whole(self, entry: "_Entry", limit: int) -> bytes:
        large = f"has {entry.size} bytes in {_quote(entry.name)}, expected at most {limit}"
        _need(entry.size <= limit, large, _RESAVE)
        return self._content(entry, 0, entry.size).tobytes()


def is_torch_file(path: str | os.PathLike) -> bool:
    """Return whether a file is a PyTorch checkpoint, from its content.

    That is a zip with a single top folder that has `data.pkl`. Truncated files and those from
    before torch 1.6 count too: `TorchFile` reports what is wrong with them.
    """
    if not os.path.isfile(path):
        return False
    with _File(io.FileIO(path)) as file:
        head = file.read(512)
        name = head[30 : 30 + int.from_bytes(head[26:28], "little")]  # of the first entry
        if head.startswith(b"PK\x03\x04") and name.count(b"/") == 1 and name.endswith(b"/data.pkl"):
            return True
        try:
            with _parsing(path):
                return _is_legacy(head) or bool(_checkpoint_entries(file))
        except BadFile:
            return False


@contextlib.contextmanager
def _parsing(path: str | os.PathLike) -> Iterator[None]:
    """Convert any exception from parsing a file to a `BadFile` that names the file."""
    try:
        yield
    except BadFile as error:
        raise BadFile(f"{os.fspath(path)} {error}.") from None
    except Exception as error:  # damaged files can cause any type
        raise BadFile(
            f"{os.fspath(path)} is damaged: expected a PyTorch checkpoint, but parsing it failed "
            f"({type(error).__name__}: {str(error)[:100]}); {_AGAIN}, or {_RESAVE}."
        ) from None


def _need(condition: bool, problem: str, remedy: str = _AGAIN) -> None:
    if not condition:
        raise BadFile(f"{problem}; {remedy}")


def _quote(value: Any) -> str:
    """Format a value from a file for a message: short, and without recursion."""
    if isinstance(value, str | bytes):
        return repr(value[:80])[:80] + "..." * (len(value) > 80)
    plain = value is None or type(value) in (bool, int, float)
    return repr(value)[:80] if plain else f"a {type(value).__name__}"


# -------------------------------------------------------------------------------------------- zip


class _Entry(NamedTuple):
    name: str
    start: int  # of its content in the file
    size: int
    crc: int


class _File(io.BufferedReader):
    """A file that limits the size of the directory that `zipfile` reads."""

    def read(self, size: int | None = -1) -> bytes:
        large = f"has a zip directory of {size} bytes, expected at most {_MAX_DIRECTORY}"
        _need(size is None or size <= _MAX_DIRECTORY, large, _RESAVE)
        return super().read(size)


def _is_legacy(head: bytes) -> bool:
    return _LEGACY_MAGIC in head[:32] or head[257:262] == b"ustar"


def _checkpoint_entries(file: _File) -> dict[str, _Entry]:
    """Entries by name below the top folder, with checked locations."""
    file.seek(0)
    head = file.read(512)
    if _is_legacy(head):
        raise BadFile(
            "is a PyTorch checkpoint in the format from before torch 1.6, expected the zip format; "
            "load it with a current torch and torch.save it again"
        )
    other = "name a file that torch.save has written"
    no_zip = f"is not a PyTorch checkpoint: expected a zip, but it begins with {_quote(head[:8])}"
    _need(head.startswith(b"PK"), no_zip, other)
    try:
        with zipfile.ZipFile(file) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except zipfile.BadZipFile as error:
        problem = f"is damaged or cut off: its zip directory is wrong ({str(error)[:100]})"
        raise BadFile(f"{problem}; {_AGAIN}") from None
    entries, after = {}, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        entry = _located(file, info, after, end)
        after = entry.start + entry.size
        _need(entry.name not in entries, f"has {_quote(entry.name)} twice", "don't trust it")
        entries[entry.name] = entry
    tops = {name.partition("/")[0] for name in entries}
    entries = {name.partition("/")[2]: entry for name, entry in entries.items()}
    lacks = "is a zip, but not a PyTorch checkpoint: expected one top folder with data.pkl in it"
    _need(len(tops) == 1 and "data.pkl" in entries, lacks, other)
    return entries


def _located(file: _File, info: zipfile.ZipInfo, after: int, end: int) -> _Entry:
    """Locate an entry's content, which must be within [after, end) of the file."""
    name, size = info.orig_filename, info.file_size
    parts = set(name.split("/"))
    outside = name.startswith("/") or {"..", "."} & parts or {"\\", "\0"} & set(name)
    _need(not outside, f"has an entry named {_quote(name)}, below no folder", "don't trust it")
    stored = not info.compress_type and not info.flag_bits & 1 and info.compress_size == size
    compressed = f"has a compressed or encrypted entry {_quote(name)}, expected plain ones"
    _need(stored, compressed, "load it with torch and torch.save it again")
    file.seek(info.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = info.header_offset + _LOCAL_HEADER.size + header[9] + header[10]
    encoded = name.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    same = header[0] == b"PK\x03\x04" and not header[2] & 1 and not header[3]
    same = same and file.read(header[9]) == encoded
    _need(
        same and after <= info.header_offset and start + size <= end,
        f"is damaged: its zip directory says that {_quote(name)} is {size} bytes at "
        f"{info.header_offset}, which isn't so or overlaps another entry",
    )
    return _Entry(name, start, size, info.CRC)


def _check_crc(crc: int, entry: _Entry) -> None:
    problem = f"{_quote(entry.name)} has checksum {crc:08x}, expected {entry.crc:08x}"
    _need(crc == entry.crc, f"is damaged: {problem}")


def _storage_entry(entries: Mapping[str, _Entry], key: str) -> _Entry:
    _need(f"data/{key}" in entries, f"lacks the storage {_quote(key)} of a tensor")
    return entries[f"data/{key}"]


def _extent(tensor: TorchTensor, numel: int) -> int:
    """Number of elements from a tensor's first to its last; checks that they are in the storage."""
    _, _, shape, strides, offset = tensor
    again = "save it again"
    _need(
        type(shape) is type(strides) is tuple
        and len(shape) == len(strides) <= _MAX_DIMS
        and all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, *strides, offset))
        # numpy limits the product of the non-zero dimensions even for empty tensors.
        and math.prod(max(length, 1) for length in shape) <= max(numel, 1 << 40),
        f"has a tensor without a sensible shape, strides and offset (up to {_MAX_DIMS} numbers)",
        again,
    )
    count = math.prod(shape)
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    extent = last + 1 if count else 0
    beyond = f"has a tensor that reaches to element {offset + extent} of a storage of {numel}"
    _need(offset + extent <= numel, beyond, again)
    expanded = f"has a tensor of {count} elements on a storage of {numel}: an expanded view"
    _need(count <= numel, expanded, "save its .clone() or .contiguous()")
    return extent


# ----------------------------------------------------------------------------------------- pickle

# Names allowed in pickles; storage names map to their dtype.
_NAMES: dict[str, np.dtype | None] = dict.fromkeys(
    [
        *("collections.OrderedDict", "collections.defaultdict", "_codecs.encode", "numpy.dtype"),
        *("numpy.ndarray", "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"),
        *("builtins.set", "builtins.frozenset", "builtins.bytes", "builtins.complex"),
        *("builtins.list", "builtins.dict", "builtins.int", "builtins.float"),
        *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"),
        *("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
        *("torch.Size", "torch.device", "torch.storage.UntypedStorage"),
        *(f"torch.{name}" for name in _DTYPES),
    ]
)
_NAMES |= {f"torch.{storage}": dtype for dtype, storage in _STORAGE_OF.items()}

_KEPT = {
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8", "EMPTY_LIST", "EMPTY_TUPLE", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD", "BINPERSID", "GLOBAL",
    "STACK_GLOBAL", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET",
}  # fmt: skip
_CALL = b"\x86Q"  # TUPLE2 BINPERSID: persistent_load of (function, arguments)
_REPLACED = {
    **{"REDUCE": _CALL, "NEWOBJ": _CALL, "FROZENSET": b"t\x85Q"},
    **{"EMPTY_DICT": b"ccollections\nOrderedDict\n)\x86Q", "EMPTY_SET": b"cbuiltins\nset\n)\x86Q"},
    **{"PROTO": b"", "FRAME": b"", "STOP": b"t."},
}


def _inert(content: bytes) -> bytes:
    """Rewrite the pickle as one of (None, object) that calls and hashes nothing."""
    stream, inert, memo = io.BytesIO(content), bytearray(b"(N"), 0
    for count, (opcode, argument, start) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if count > _MAX_OPCODES:
            raise BadFile(f"has more than {_MAX_OPCODES} steps in its data.pkl; {_RESAVE}")
        if name in ("GLOBAL", "INST"):
            _known(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            # Picklers count from 0. The unpickler's memo is as long as the largest index.
            index = memo if argument is None else argument
            _need(index <= memo, "is damaged: its data.pkl skips a memo")
            memo = max(memo, index + 1)
        elif name in ("LONG1", "LONG4") and argument.bit_length() > _MAX_INT_BITS:
            raise BadFile(f"has a number of {argument.bit_length()} bits; {_RESAVE}")
        elif name == "PROTO":
            _need(2 <= argument <= 5, f"is pickled in protocol {argument}, expected 2 to 5")
        elif name == "FRAME":
            _need(argument <= len(content), "is damaged: its data.pkl is cut off")
        if name not in _KEPT and name not in _REPLACED:
            odd = f"has the opcode {name} in its data.pkl, expected what torch.save writes"
            raise BadFile(f"{odd}; don't trust it, or {_RESAVE}")
        inert += content[start : stream.tell()] if name in _KEPT else _REPLACED[name]
    return bytes(inert)


def _known(argument: str) -> str:
    """Return the full name for an opcode's argument "module name"; BadFile if not allowed."""
    module, _, name = argument.partition(" ")
    if module == "__builtin__":  # Python 2's name, used in protocol 2
        module = "builtins"
    if module.startswith("numpy.core."):  # numpy 1's name
        module = module.replace("core", "_core", 1)
    if f"{module}.{name}" not in _NAMES:
        call = f"would call {_quote(argument.replace(' ', '.', 1))} when unpickled, which may run"
        raise BadFile(f"{call} any code (nothing was run); where you trust it, {_RESAVE}")
    return f"{module}.{name}"


class _Name(str):
    """A known name from the pickle; in the tree it is a plain string."""

    __slots__ = ()


class _Call:
    """A recorded call of the pickle, with the items and state set on its result."""

    __slots__ = ("arguments", "function", "items", "state")

    def __init__(self, function: Any, arguments: tuple):
        self.function, self.arguments, self.items, self.state = function, arguments, [], None

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items += (key, value)

    def add(self, item: Any) -> None:
        self.items.append(item)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Unpickles the output of `_inert`: lists, tuples, plain values, `_Name`s and `_Call`s."""

    def find_class(self, module: str, name: str) -> _Name:
        return _Name(_known(f"{module} {name}"))

    def persistent_load(self, pid: Any) -> _Call:
        function, arguments = pid if len(pid) == 2 else (_Name(), pid)
        _need(type(arguments) is tuple, "is damaged: it calls something without arguments", _RESAVE)
        return _Call(function, arguments)


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype | None  # None if given by the tensors
    size: int  # bytes


class _Builder:
    """Makes the tree from the unpickled object.

    Args:
      entries: of the zip.
      budget: maximum number of values and bytes that calls may copy, counting shared arguments each
        time.
    """

    def __init__(self, entries: Mapping[str, _Entry], budget: int):
        self._entries, self._budget, self._number_keys = entries, budget, 0
        self._built: dict[int, tuple[Any, int, int]] = {}

    def build(self, node: Any, depth: int = 0) -> tuple[Any, int, int]:
        """Build (value, number of values counting shared ones each time, levels below it)."""
        if type(node) not in (list, tuple, _Call):
            return bytes(node) if type(node) is bytearray else node, 1, 0
        if id(node) in self._built:
            return self._built[id(node)]
        call = type(node) is _Call
        deepest = _MAX_DEPTH + 3  # the tuple around the root, and the levels below a tensor
        children = [*node.arguments, *node.items, node.state] if call else node
        parts = [self.build(child, depth + 1) for child in children] if depth <= deepest else ()
        values = [value for value, _, _ in parts]
        size = 1 + sum(size for _, size, _ in parts)
        height = 1 + max((height for _, _, height in parts), default=0)
        if size > _MAX_VALUES or max(depth, height) > deepest:
            large = f"holds a tree of more than {_MAX_DEPTH} levels or {_MAX_VALUES} values"
            raise BadFile(f"{large}, or one that contains itself; {_RESAVE}")
        if call:
            self._spend(len(values))
            end = len(node.arguments)
            value = self._called(node.function, values[:end], values[end:-1], values[-1])
        else:
            bare = any(type(value) is _Storage for value in values)
            _need(not bare, "holds a storage without a tensor around it", _RESAVE)
            value = type(node)(values)
        self._built[id(node)] = value, size, height
        return value, size, height

    def _spend(self, count: int) -> None:
        self._budget -= count
        if self._budget < 0:
            raise BadFile(f"copies the same content again and again in its data.pkl; {_RESAVE}")

    def _called(self, function: Any, arguments: list, items: list, state: Any) -> Any:
        """Interpret a call, including its `items` and `state`."""
        odd = f"would call {_quote(function)} in a way that torch.save doesn't"
        _need(type(function) is _Name, odd, _RESAVE)
        match (function, *arguments):
            case ("collections.OrderedDict",) | ("collections.defaultdict", _Name()) if (
                state is None or type(state) is dict  # versions of modules
            ):
                self._check_keys(items[::2])
                return dict(zip(items[::2], items[1::2], strict=True))
            case ("builtins.set" | "builtins.frozenset" | "", *sources) if state is None and all(
                type(source) in (list, tuple) for source in sources
            ):
                keys = [*items, *(key for source in sources for key in source)]
                self._spend(len(keys))
                self._check_keys(keys)
                return set(keys) if function == "builtins.set" else frozenset(keys)
            case "numpy.dtype", str(name), *_ if name in _NUMPY_DTYPES and not items:
                big = "would set the state of a dtype to that of another byte order"
                _need(state is None or state[1] in ("<", "|", "="), big, _RESAVE)
                return np.dtype(name).newbyteorder("<")
            case "numpy._core.multiarray._reconstruct", *_ if not items:
                _, shape, dtype, column_major, content = state
                _need(isinstance(dtype, np.dtype) and type(content) is bytes, odd, _RESAVE)
                self._spend(len(content))
                flat = np.frombuffer(bytearray(content), dtype)
                return flat.reshape(shape, order="F" if column_major else "C")
        _need(state is None and not items, f"would set the state of {_quote(function)}", _RESAVE)
        match (function, *arguments):
            case ("builtins.bytes",):
                return b""
            case "_codecs.encode", str(text), "latin1" | "latin-1":  # bytes in protocol 2
                self._spend(len(text))
                return text.encode("latin1")
            case "builtins.complex", float(real), float(imaginary):
                return complex(real, imaginary)
            case "numpy._core.multiarray.scalar", np.dtype() as dtype, bytes(content):
                (number,) = np.frombuffer(content, dtype)
                return number.item()
            case "torch.Size", tuple(shape) if len(shape) <= _MAX_DIMS:
                _need(all(type(n) is int for n in shape), odd, _RESAVE)
                return shape
            case "torch.device", str(kind), *index:
                return ":".join([kind, *(f"{number:d}" for number in index)])
            case "", "storage", token, key, str(), numel:
                return self._storage(token, key, numel)
            case "torch._utils._rebuild_tensor_v2", _Storage() as storage, *view:
                return _tensor(storage, storage.dtype, *view)
            case "torch._utils._rebuild_tensor_v3", _Storage(dtype=None) as storage, *view:
                dtype = _DTYPES[view.pop(5).removeprefix("torch.")]
                return _tensor(storage, dtype, *view)
            case _, TorchTensor() as tensor, *_ if function.startswith("torch._utils._rebuild_par"):
                return tensor
        raise BadFile(f"{odd}; {_RESAVE}")

    def _storage(self, token: Any, key: Any, numel: Any) -> _Storage:
        good = type(token) is _Name and token.endswith("Storage")
        good = good and type(key) is str and type(numel) is int
        _need(good, "is damaged: a tensor of it names no storage")
        dtype, size = _NAMES[token], _storage_entry(self._entries, key).size
        expected = f"expected {_quote(numel)} elements of {dtype or 'a byte'}"
        right = numel * (dtype.itemsize if dtype else 1) == size
        _need(right, f"has {size} bytes in storage {_quote(key)}, {expected}")
        return _Storage(key, dtype, size)

    def _check_keys(self, keys: list) -> None:
        """Check that keys and set elements are cheap to hash and too few for hash collisions."""
        odd = "has a key that is neither a str nor plain numbers, or too many of these"
        for key in (key for key in keys if type(key) is not str):
            parts = key if type(key) is tuple else (key,)
            self._number_keys += 1
            _need(self._number_keys <= _MAX_NUMBER_KEYS, odd, _RESAVE)
            _need(len(parts) <= _MAX_KEY_ITEMS, odd, _RESAVE)
            for part in parts:
                plain = part is None or type(part) in (str, bool, float)
                _need(plain or (type(part) is int and abs(part) < 1 << 63), odd, _RESAVE)


def _tensor(storage, dtype, offset, shape, strides, grad, hooks, metadata=None) -> TorchTensor:
    _need(dtype is not None, "is damaged: a tensor of it has no typed storage")
    lazy = "has a tensor that is stored conjugated or negated, expected plain values"
    _need(not metadata, lazy, "save its .resolve_conj().resolve_neg()")
    tensor = TorchTensor(storage.key, dtype, shape, strides, offset)
    _extent(tensor, storage.size // dtype.itemsize)
    return tensor


# ---------------------------------------------------------------------------------------- writing

# torch.save's default name: equal content gives equal files, independent of the file name.
_TOP = "archive"
_ALIGNMENT = 64  # of storages in the file, as in torch, for mmap
_ZIP64_FROM = 1 << 30  # bytes; below the limit of old zips
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def write(path: str | os.PathLike, tree: Any, stream: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write a checkpoint for torch.load(path, weights_only=True), also with mmap=True.

    Arrays are written one at a time. Equal arguments in equal order give equal bytes. Dicts with
    tensors become OrderedDicts in the file, like state dicts.

    Args:
      path: of the file; removed if writing fails.
      tree: nested dicts and lists of str, int, float, bool, None and `Pending`.
      stream: (name, content) of every pending tensor, once each, in any order.

    Raises:
      ValueError: the tree has anything else; a name of the stream is missing, unknown or repeated;
        or an array's dtype or shape differs from its `Pending`.
    """
    storages: dict[str, tuple[Pending, str]] = {}
    content = b"\x80\x02" + _pickled(tree, storages) + b"."
    waiting = dict(storages)
    with open(path, "wb") as file:
        try:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                _write_entry(archive, file, "data.pkl", content)
                _write_entry(archive, file, "byteorder", b"little")
                for name, array in stream:
                    if name not in waiting:
                        what = "came twice" if name in storages else "isn't in the tree"
                        raise ValueError(
                            f"Each tensor of the tree may come once, but {name!r} {what}."
                        )
                    announced, key = waiting.pop(name)
                    array = np.asarray(array)
                    came = Pending(name, array.dtype, array.shape)
                    if came != announced:
                        raise ValueError(
                            f"{announced} was announced, but {came} came; announce what comes."
                        )
                    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    _write_entry(archive, file, f"data/{key}", raw)
                    del array, raw  # free them before the next one is made
                if waiting:
                    raise ValueError(
                        f"The content of {sorted(waiting)[:5]} never came; add it to the stream."
                    )
                _write_entry(archive, file, "version", b"3\n")
        except BaseException:
            pathlib.Path(path).unlink(missing_ok=True)
            raise


def _write_entry(archive: zipfile.ZipFile, file: io.BufferedWriter, name: str, content) -> None:
    content = memoryview(content)
    info = zipfile.ZipInfo(f"{_TOP}/{name}", (1980, 1, 1, 0, 0, 0))
    info.create_system = 3  # makes the bytes independent of the machine
    zip64 = content.nbytes > _ZIP64_FROM
    # An extra field with the alignment, padded to achieve it.
    start = file.tell() + _LOCAL_HEADER.size + len(info.filename) + 20 * zip64 + 6
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<HHH", 0xD935, 2 + padding, _ALIGNMENT) + bytes(padding)
    with archive.open(info, "w", force_zip64=zip64) as entry:
        for at in range(0, content.nbytes, _CHUNK):
            entry.write(content[at : at + _CHUNK])


def _pickled(value: Any, storages: dict[str, tuple[Pending, str]], depth: int = 0) -> bytes:
    """Opcodes of protocol 2; `pickle` itself would import torch to name its functions.

    New tensors are added to `storages`, name -> (tensor, key of its storage).
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"Expected at most {_MAX_DEPTH} levels; this tree contains itself.")
    if isinstance(value, Pending):
        return _pickled_tensor(value, storages)
    if isinstance(value, Mapping):
        ordered = any(isinstance(child, Pending) for child in value.values())
        begin, end = _ORDERED_DICT if ordered else b"}", b"u"
        children = [part for item in value.items() for part in item]
    elif isinstance(value, list):
        begin, end, children = b"]", b"e", value
    else:
        return _pickled_leaf(value)
    parts = (_pickled(child, storages, depth + 1) for child in children)
    return b"".join([begin, b"(", *parts, end])


def _pickled_leaf(value: Any) -> bytes:
    kind = next((kind for kind in (bool, int, float, str) if isinstance(value, kind)), None)
    if kind is None and value is not None:
        raise ValueError(
            "Expected dicts, lists, str, int, float, bool, None and Pending in the tree, and str "
            f"and numbers as keys, got {type(value).__name__}; convert it."
        )
    if kind is int and value.bit_length() >= 8 * 255:
        raise ValueError(f"Expected integers below 255 bytes, got {value.bit_length()} bits.")
    return _dumped(kind(value) if kind else None)  # np.float64 is a float, but pickled as numpy's


def _dumped(value: Any) -> bytes:
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]


def _pickled_tensor(value: Pending, storages: dict[str, tuple[Pending, str]]) -> bytes:
    value = Pending(value.name, np.dtype(value.dtype), tuple(map(int, value.shape)))
    if value.dtype not in _STORAGE_OF:
        known = ", ".join(map(str, _STORAGE_OF))
        raise ValueError(f"{value.name!r} is {value.dtype}, expected one of {known}; convert it.")
    first, key = storages.setdefault(value.name, (value, str(len(storages))))
    if first != value:
        raise ValueError(f"{first} and {value} are different tensors; name them differently.")
    strides = tuple(math.prod(value.shape[i + 1 :]) for i in range(len(value.shape)))
    return b"".join(
        [
            *(b"ctorch._utils\n_rebuild_tensor_v2\n((", _dumped("storage")),
            *(f"ctorch\n{_STORAGE_OF[value.dtype]}\n".encode(), _dumped(key)),
            b"X\x03\x00\x00\x00cpu",  # torch's default location for it
            *(_dumped(math.prod(value.shape)), b"tQ", _dumped(0)),
            *(_dumped(value.shape), _dumped(strides), b"\x89", _ORDERED_DICT, b"tR"),
        ]
    )
