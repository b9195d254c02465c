"""PyTorch's zip checkpoints, read and written without torch and without running what they hold.

A checkpoint is a zip of stored entries below one folder: `data.pkl`, a pickle of the structure,
and `data/<key>`, the raw bytes of one storage each. A pickle is a program: unpickling calls
whatever functions it names. Here a small interpreter of its opcodes knows a table of names and
builds inert values for them; any other name is refused. The structure is read at once, tensors
when they are asked for, so that of a large file only the wanted tensors are ever in memory.

Files are taken to be hostile: work and memory are bounded by the size of the file, and every way
in which one can be wrong ends in a `BadFile`.
"""

import contextlib
import io
import math
import os
import pathlib
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fsdfm_jax.inference.bundle import BadFile

# Names of the torch dtypes and of the storages of those that have a class of their own.
_DTYPES = {
    name: np.dtype(getattr(np, name + "_" * (name == "bool"), None) or getattr(ml_dtypes, name))
    for name in (
        *("float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("bool", "complex64", "complex128"),
    )
}
_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_STORAGE_OF = {_DTYPES[dtype]: storage for storage, dtype in _STORAGES.items()}
_NUMPY_DTYPES = {f"{kind}{size}" for kind in "iuf" for size in (1, 2, 4, 8)} - {"f1"}
_NUMPY_DTYPES |= {"b1", "c8", "c16"}

# Far above what checkpoints need, low enough that a hostile one costs seconds, not the machine.
_MAX_DIRECTORY = 8 << 20  # bytes of the zip's directory
_MAX_PICKLE = 64 << 20  # bytes of data.pkl
_MAX_OPCODES = 4 << 20
_MAX_NUMBER_KEYS = 1 << 16  # keys other than str: hashes of numbers can be made to collide
_MAX_KEY_ITEMS = 16  # of a tuple as key
_MAX_INT_BITS = 2048
_MAX_DEPTH = 100
_MAX_NODES = 4 << 20  # of the tree, shared parts counted each time
_MAX_DIMS = 32  # as numpy 1 has it
_CHUNK = 16 << 20  # bytes read or written at a time

_LOCAL_HEADER = struct.Struct("<4s5HIIIHH")
_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # what torch < 1.6 began with


class TorchTensor(NamedTuple):
    """A tensor that is still in its file.

    Attributes:
      storage: key of the storage it is a view of.
      dtype: of its elements; bfloat16 is that of ml_dtypes.
      shape: of the tensor.
      strides: of the view, in elements.
      offset: of its first element in the storage, in elements.
    """

    storage: str
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Pending(NamedTuple):
    """A tensor that will be written; leaves of the same name are one storage in the file.

    Attributes:
      name: that its content comes under.
      dtype: of its elements.
      shape: of the tensor.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]


class TorchFile:
    """An open checkpoint.

    Attributes:
      tree: what was saved: dicts, lists and tuples of str, bytes, numbers, None, small numpy arrays
        and `TorchTensor` (itself a tuple: look for it first). OrderedDict and defaultdict come as
        dicts, torch.Size as a tuple, parameters as their tensors, numpy scalars as Python's,
        devices and dtypes as str. It is safe to walk: without circles, at most 100 levels deep and
        4 million nodes large.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads the structure, but no tensor.

        Raises:
          BadFile: if the file is damaged, or no checkpoint, or would run code when unpickled.
          OSError: if it can't be opened.
        """
        self._path = os.fspath(path)
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._checked: set[str] = set()
        try:
            with _parsing(self._path):
                self._entries = _checkpoint_entries(self._file)
                order = self._entries.get("byteorder")
                if order is not None and (value := self._bytes(order, 16)) != b"little":
                    raise BadFile(
                        f"holds tensors in byte order {_quote(value)}, expected b'little'; re-save "
                        "it on a little-endian machine"
                    )
                pickle = self._bytes(self._entries["data.pkl"], _MAX_PICKLE)
                self.tree = _Interpreter(pickle, self._entries).run()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; `tree` stays, but `read` no longer works."""
        self._file.close()

    def read(self, tensor: TorchTensor) -> np.ndarray:
        """Content of one tensor of `tree`.

        A storage's checksum covers all of it: the first tensor that is a part of a storage costs
        reading the whole, though never holding more than the part.

        Args:
          tensor: a leaf of `tree`.

        Returns:
          Array of the tensor's dtype and shape, contiguous and in memory of its own.

        Raises:
          BadFile: if the content was cut off or doesn't match its checksum.
          ValueError: if the file was closed.
        """
        if self._file.closed:
            raise ValueError(f"{self._path} was closed; read its tensors before closing it.")
        with _parsing(self._path):
            tensor = TorchTensor(*tensor)
            entry = _storage_entry(self._entries, tensor.storage)
            extent = _extent(tensor, entry.size // tensor.dtype.itemsize)
            size = tensor.dtype.itemsize
            raw = np.empty(extent * size, np.uint8)
            self._read_into(raw, entry, tensor.offset * size, tensor.storage)
            # Any byte but 0 is True to torch; numpy would take it at its word.
            flat = raw != 0 if tensor.dtype == np.bool_ else raw.view(tensor.dtype)
            if tensor.strides == _row_major(tensor.shape) or not flat.size:
                return flat.reshape(tensor.shape)
            strides = tuple(stride * size for stride in tensor.strides)
            view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
            return np.array(view, order="C")

    def _read_into(self, target: np.ndarray, entry: "_Entry", start: int, key: str) -> None:
        """Fills `target` [bytes] with an entry from byte `start` on, checking the checksum."""
        whole = target.size == entry.size
        if not whole and key not in self._checked:
            crc, scratch = 0, np.empty(min(_CHUNK, entry.size), np.uint8)
            for at in range(0, entry.size, _CHUNK):
                chunk = scratch[: entry.size - at]
                self._fill(chunk, entry.start + at)
                crc = zlib.crc32(chunk, crc)
            _check_crc(crc, entry)
            self._checked.add(key)
        crc = 0
        for at in range(0, target.size, _CHUNK):
            chunk = target[at : at + _CHUNK]
            self._fill(chunk, entry.start + start + at)
            crc = zlib.crc32(chunk, crc) if whole else 0
        if whole:
            _check_crc(crc, entry)

    def _fill(self, target: np.ndarray, start: int) -> None:
        self._file.seek(start)
        view = memoryview(target)
        while view:
            count = self._file.readinto(view)
            if not count:
                raise BadFile(
                    f"ends {len(view)} bytes before the content of a tensor does; copy or download "
                    "it again"
                )
            view = view[count:]

    def _bytes(self, entry: "_Entry", limit: int) -> bytes:
        if entry.size > limit:
            raise BadFile(
                f"has {entry.size} bytes in {_quote(entry.name)}, expected at most {limit}; "
                "re-save only the weights (torch.save of the state dicts)"
            )
        content = np.empty(entry.size, np.uint8)
        self._read_into(content, entry, 0, "")
        return content.tobytes()


def is_torch_file(path: str | os.PathLike) -> bool:
    """Whether a file is a PyTorch zip checkpoint, judged by its content.

    That is: a zip with a single top folder that holds `data.pkl`. One that begins as torch.save
    begins them counts as well, so that a file which was cut off is told so by `TorchFile`.
    """
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            return False
        name = file.read(_LOCAL_HEADER.unpack(header)[9])
        if name.count(b"/") == 1 and name.endswith(b"/data.pkl"):
            return True
        try:
            with _parsing(path):
                _checkpoint_entries(file)
        except BadFile:
            return False
    return True


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _parsing(path: str | os.PathLike) -> Iterator[None]:
    """Turns whatever fails while a file is parsed into one `BadFile` that names the file."""
    try:
        yield
    except BadFile as error:
        raise BadFile(f"{os.fspath(path)} {error}.") from None
    except Exception as error:  # which of them a damaged file provokes is anybody's guess
        raise BadFile(
            f"{os.fspath(path)} is damaged: expected a PyTorch checkpoint, but parsing it failed "
            f"({type(error).__name__}: {str(error)[:100]}); copy or download it again."
        ) from None


def _quote(value: Any) -> str:
    """A value from a file, for a message: never long, never walked into."""
    if type(value) in (str, bytes):
        text = repr(value[:80])
        return text[:80] + "..." * (len(value) > 80 or len(text) > 82)
    if value is None or type(value) in (bool, int, float):
        return repr(value)[:80]
    return f"a {type(value).__name__}"


# ---------------------------------------------------------------------------------------------
# The zip
# ---------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    name: str
    start: int  # of its content in the file
    size: int
    crc: int


class _DirectoryReader(io.RawIOBase):
    """The file as `zipfile` sees it: it would read a directory of any size, here it can't."""

    def __init__(self, file: io.BufferedReader):
        self._inner = file

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_DIRECTORY:
            raise BadFile(
                f"has a zip directory of {size} bytes, expected at most {_MAX_DIRECTORY}; re-save "
                "only the weights (torch.save of the state dicts)"
            )
        return self._inner.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._inner.seek(offset, whence)

    def tell(self) -> int:
        return self._inner.tell()

    def seekable(self) -> bool:
        return True


def _checkpoint_entries(file: io.BufferedReader) -> dict[str, _Entry]:
    """Entries by their names below the top folder, all checked to lie in the file as told."""
    file.seek(0)
    head = file.read(512)
    if head.startswith(_LEGACY) or head[257:262] == b"ustar":
        raise BadFile(
            "is a PyTorch checkpoint in the format from before torch 1.6, expected the zip format; "
            "load it with a current torch and torch.save it again"
        )
    if not head.startswith(b"PK"):
        raise BadFile(
            f"is not a PyTorch checkpoint: expected a zip, but it begins with {_quote(head[:8])}; "
            "name a file that torch.save has written"
        )
    try:
        with zipfile.ZipFile(_DirectoryReader(file)) as archive:
            infos, end = archive.infolist(), archive.start_dir
    except zipfile.BadZipFile as error:
        raise BadFile(
            f"is damaged or cut off: expected a zip directory at its end, but {str(error)[:100]}; "
            "copy or download it again"
        ) from None
    entries, after = {}, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        entry = _located(file, info, after, end)
        after = entry.start + entry.size
        if entry.name in entries:
            raise BadFile(
                f"has the entry {_quote(entry.name)} twice, expected each once; don't trust it"
            )
        entries[entry.name] = entry
    tops = {name.partition("/")[0] for name in entries}
    entries = {name.partition("/")[2]: entry for name, entry in entries.items()}
    if len(tops) != 1 or "data.pkl" not in entries:
        raise BadFile(
            "is a zip, but not a PyTorch checkpoint: expected one top folder with data.pkl in it; "
            "name a file that torch.save has written"
        )
    return entries


def _located(file: io.BufferedReader, info: zipfile.ZipInfo, after: int, end: int) -> _Entry:
    """Where an entry's content lies, which has to be in [after, end) of the file."""
    name = info.orig_filename
    if name.startswith("/") or {"..", "."} & set(name.split("/")) or "\\" in name or "\0" in name:
        raise BadFile(
            f"has an entry named {_quote(name)}, expected names below one folder; don't trust it"
        )
    if info.compress_type or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise BadFile(
            f"has a compressed or encrypted entry {_quote(name)}, expected stored ones as "
            "torch.save writes them; load it with torch and torch.save it again"
        )
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    fields = _LOCAL_HEADER.unpack(header)
    flags, method, name_size, extra_size = fields[2], fields[3], fields[9], fields[10]
    local_name = file.read(name_size)
    start = info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    if (
        fields[0] != b"PK\x03\x04"
        or method
        or flags & 1
        or local_name != name.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        or info.header_offset < after
        or start + info.file_size > end
    ):
        raise BadFile(
            f"is damaged: its zip directory says that {_quote(name)} is {info.file_size} bytes at "
            f"{info.header_offset}, which isn't so or overlaps another entry; copy or download it "
            "again"
        )
    return _Entry(name, start, info.file_size, info.CRC)


def _check_crc(crc: int, entry: _Entry) -> None:
    if crc != entry.crc:
        raise BadFile(
            f"is damaged: {_quote(entry.name)} has checksum {crc:08x}, expected {entry.crc:08x}; "
            "copy or download it again"
        )


# ---------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype | None  # None: untyped, `numel` counts bytes
    numel: int


def _storage_entry(entries: Mapping[str, _Entry], key: str) -> _Entry:
    entry = entries.get("/".join(("data", key)))
    if entry is None:
        raise BadFile(
            f"lacks the storage {_quote(key)} of a tensor; copy, download or save it again"
        )
    return entry


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous array, in elements."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def _extent(tensor: TorchTensor, numel: int) -> int:
    """Number of elements from a tensor's first to its last, which are all in its storage."""
    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    if (
        not type(shape) is type(strides) is tuple
        or not len(shape) == len(strides) <= _MAX_DIMS
        or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, *strides, offset))
        # Empty ones have no elements, but numpy wants the product of the other dimensions small.
        or math.prod(max(length, 1) for length in shape) > max(numel, 1 << 40)
    ):
        raise BadFile(
            "has a tensor without a sensible shape, strides and offset: expected at most "
            f"{_MAX_DIMS} small numbers >= 0; save it again"
        )
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    count = math.prod(shape)
    extent = last + 1 if count else 0
    if offset + extent > numel:
        raise BadFile(
            f"has a tensor that reaches to element {offset + extent} of storage "
            f"{_quote(tensor.storage)}, expected at most the {numel} that are there; save it again"
        )
    if count > numel:
        raise BadFile(
            f"has a tensor of {count} elements on a storage of {numel}: an expanded view, expected "
            "one element of storage each; save its .clone() or .contiguous()"
        )
    return extent


# ---------------------------------------------------------------------------------------------
# The pickle
# ---------------------------------------------------------------------------------------------


class _Global(str):
    """A known name from the pickle; as a value in the tree it stands for itself."""

    __slots__ = ()


class _Interpreter:
    """Runs the opcodes of data.pkl over inert values.

    Not `pickle.Unpickler` with a `find_class` of ours: that one can be made to allocate gigabytes
    by a single opcode, and to hash what takes forever to hash.
    """

    def __init__(self, pickle: bytes, entries: Mapping[str, _Entry]):
        self._pickle = pickle
        self._entries = entries
        self._stack: list = []
        self._below: list[list] = []  # the stacks below each mark
        self._memo: list = []
        self._number_keys = 0
        # Copies may be asked for again and again with a byte each; honest files copy a thing once
        # or twice.
        self._copies = 4 * len(pickle)

    def run(self) -> Any:
        """The saved object. Raises `BadFile` and whatever damaged pickles provoke."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self._pickle)):
            name = opcode.name
            if count > _MAX_OPCODES:
                raise BadFile(
                    f"has more than {_MAX_OPCODES} steps in its data.pkl; re-save only the weights "
                    "(torch.save of the state dicts)"
                )
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name](argument))
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name == "INST":
                raise _runs_code(argument)
            else:
                raise BadFile(
                    f"has the opcode {name} in its data.pkl, expected what torch.save writes; "
                    "don't trust it, or re-save only the weights (torch.save of the state dicts)"
                )
        (tree,) = self._stack
        if self._below:
            raise BadFile("is damaged: its data.pkl ends within a tuple; copy or download it again")
        _check_tree(tree)
        return tree

    # What the opcodes do; `argument` is that of the opcode.

    def proto(self, argument: int) -> None:
        if not 2 <= argument <= 5:
            raise BadFile(
                f"is pickled in protocol {argument}, expected 2 to 5; save it again with torch.save"
            )

    def frame(self, argument: int) -> None:
        if argument > len(self._pickle):
            raise BadFile("is damaged: its data.pkl is cut off; copy or download it again")

    def stop(self, argument: None) -> None:
        pass

    def mark(self, argument: None) -> None:
        self._below.append(self._stack)
        self._stack = []

    def to_mark(self) -> list:
        """Takes all above the last mark."""
        items, self._stack = self._stack, self._below.pop()
        return items

    def take(self, count: int) -> tuple:
        """Takes the last `count` of the stack."""
        if len(self._stack) < count:
            raise BadFile("is damaged: its data.pkl takes what isn't there; download it again")
        items = tuple(self._stack[-count:])
        del self._stack[-count:]
        return items

    def top(self, kind: type) -> Any:
        """The object that is being filled."""
        if type(self._stack[-1]) is not kind:
            raise BadFile(
                f"is damaged: its data.pkl fills {_quote(self._stack[-1])}, expected a "
                f"{kind.__name__}; copy or download it again"
            )
        return self._stack[-1]

    def put(self, argument: int) -> None:
        # Picklers number what they remember from 0 on: a list will do, of no more than is there.
        if argument > len(self._memo):
            raise BadFile(f"is damaged: its data.pkl skips to memo {argument}; download it again")
        self._memo[argument : argument + 1] = [self._stack[-1]]

    def memoize(self, argument: None) -> None:
        self._memo.append(self._stack[-1])

    def get(self, argument: int) -> None:
        self._stack.append(self._memo[argument])

    def tuple_to_mark(self, argument: None) -> None:
        items = tuple(self.to_mark())
        self._stack.append(items)

    def append(self, argument: None) -> None:
        (item,) = self.take(1)
        self.top(list).append(item)

    def appends(self, argument: None) -> None:
        items = self.to_mark()
        self.top(list).extend(items)

    def set_item(self, argument: None) -> None:
        self.set_pairs(self.take(2))

    def set_items(self, argument: None) -> None:
        self.set_pairs(self.to_mark())

    def set_pairs(self, items: Iterable) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key)] = value

    def add_items(self, argument: None) -> None:
        items = self.to_mark()
        self.top(set).update(map(self.key, items))

    def frozen_set(self, argument: None) -> None:
        items = frozenset(map(self.key, self.to_mark()))
        self._stack.append(items)

    def key(self, key: Any) -> Any:
        """A key, or element of a set, that is cheap to hash."""
        if type(key) is str:
            return key
        items = key if type(key) is tuple else (key,)
        self._number_keys += 1
        if (
            self._number_keys > _MAX_NUMBER_KEYS
            or len(items) > _MAX_KEY_ITEMS
            or not all(item is None or type(item) in (str, int, float, bool) for item in items)
            or any(type(item) is int and abs(item) >= 1 << 63 for item in items)
        ):
            raise BadFile(
                f"has {_quote(key)} as a dict's key, expected a str or one of at most "
                f"{_MAX_NUMBER_KEYS} plain numbers; re-save only the weights (torch.save of the "
                "state dicts)"
            )
        return key

    def spend(self, count: int) -> None:
        """Counts what is copied."""
        self._copies -= count
        if self._copies < 0:
            raise BadFile(
                "copies the same content again and again in its data.pkl; don't trust it, or "
                "re-save only the weights (torch.save of the state dicts)"
            )

    def known_global(self, argument: str) -> None:
        # "module name", which is how GLOBAL has it in its argument.
        module, _, name = argument.partition(" ")
        if module == "__builtin__":  # Python 2's, as protocol 2 has it
            module = "builtins"
        if module.startswith("numpy.core."):  # numpy 1's
            module = module.replace("core", "_core", 1)
        full = f"{module}.{name}"
        if full not in _CALLS and full not in _NAMES:
            raise _runs_code(argument)
        self._stack.append(_Global(full))

    def stack_global(self, argument: None) -> None:
        module, name = self.take(2)
        if type(module) is not str or type(name) is not str:
            raise BadFile("is damaged: its data.pkl names a function by no str; download it again")
        self.known_global(f"{module} {name}")

    def call(self, argument: None) -> None:
        function, arguments = self.take(2)
        if type(function) is not _Global or function not in _CALLS or type(arguments) is not tuple:
            raise BadFile(
                f"would call {_quote(str(function) if type(function) is _Global else function)} "
                "when unpickled, expected what torch.save writes; re-save only the weights "
                "(torch.save of the state dicts)"
            )
        self._stack.append(_CALLS[function](self, arguments))

    def build(self, argument: None) -> None:
        target, state = self.take(2)
        self._stack.append(target)
        if type(target) is dict and (type(state) is dict or state is None):
            return  # attributes of a state dict: versions of its modules
        if isinstance(target, np.dtype) and type(state) is tuple and len(state) >= 5:
            if state[1] in ("<", "|", "=") and state[2] is state[3] is state[4] is None:
                return
        elif type(target) is np.ndarray and type(state) is tuple and len(state) == 5:
            _, shape, dtype, fortran, content = state
            if isinstance(dtype, np.dtype) and type(content) is bytes and type(shape) is tuple:
                fake = TorchTensor("", dtype, shape, _row_major(_checked_ints(shape)), 0)
                if _extent(fake, len(content) // dtype.itemsize) * dtype.itemsize == len(content):
                    self.spend(len(content))
                    target.__setstate__((1, shape, dtype, bool(fortran), content))
                    return
        raise BadFile(
            f"would set the state of {_quote(target)} when unpickled, expected what torch.save "
            "writes; re-save only the weights (torch.save of the state dicts)"
        )

    def persistent(self, argument: None) -> None:
        (ident,) = self.take(1)
        kind, token, key, location, numel = ident
        if (
            kind != "storage"
            or type(token) is not _Global
            or token not in _NAMES
            or not token.endswith("Storage")
            or type(key) is not str
            or type(location) is not str
            or type(numel) is not int
        ):
            raise BadFile("is damaged: a tensor of it names no storage; copy or download it again")
        dtype = _NAMES[token]
        entry = _storage_entry(self._entries, key)
        if numel * (dtype.itemsize if dtype else 1) != entry.size:
            raise BadFile(
                f"has {entry.size} bytes in storage {_quote(key)}, expected {_quote(numel)} "
                f"elements of {dtype or 'a byte'}; copy or download it again"
            )
        self._stack.append(_Storage(key, dtype, numel))


def _checked_ints(values: tuple) -> tuple[int, ...]:
    if len(values) > _MAX_DIMS or not all(type(value) is int for value in values):
        raise BadFile("is damaged: it has an array without a shape; copy or download it again")
    return values


def _runs_code(argument: str) -> BadFile:
    name = argument.replace(" ", ".", 1)
    return BadFile(
        f"would call {_quote(name)} when unpickled, which may run any code (nothing was run); "
        "expected tensors and plain values: re-save only the weights (torch.save of the state "
        "dicts) where you trust it"
    )


# What a call of a known name gives: (interpreter, arguments) -> value. An argument too many or
# too few is a ValueError of the unpacking.


def _make_dict(machine: _Interpreter, arguments: tuple) -> dict:
    if len(arguments) > 1 or (arguments and type(arguments[0]) is not _Global):  # defaultdict's
        raise BadFile("is damaged: it has a dict made of something; copy or download it again")
    return {}


def _make_set(machine: _Interpreter, arguments: tuple) -> set:
    (items,) = arguments or ((),)
    if type(items) not in (list, tuple):
        raise BadFile("is damaged: it has a set made of no list; copy or download it again")
    machine.spend(len(items))
    return set(map(machine.key, items))


def _make_bytes(machine: _Interpreter, arguments: tuple) -> bytes:
    """How protocol 2 has bytes: text, encoded."""
    text, codec = arguments or ("", "latin1")
    if type(text) is not str or codec not in ("latin1", "latin-1"):
        raise BadFile("is damaged: it has bytes of no latin1; copy or download it again")
    machine.spend(len(text))
    return text.encode("latin1")


def _make_complex(machine: _Interpreter, arguments: tuple) -> complex:
    real, imaginary = arguments
    if type(real) is not float or type(imaginary) is not float:
        raise BadFile("is damaged: it has a complex number of no floats; download it again")
    return complex(real, imaginary)


def _make_device(machine: _Interpreter, arguments: tuple) -> str:
    kind, *index = arguments
    if type(kind) is not str or not all(type(number) is int for number in index):
        raise BadFile("is damaged: it has a device without a name; copy or download it again")
    return kind if not index else f"{kind}:{index[0]}"


def _make_size(machine: _Interpreter, arguments: tuple) -> tuple[int, ...]:
    (shape,) = arguments
    return _checked_ints(tuple(shape) if type(shape) is tuple else (None,))


def _make_dtype(machine: _Interpreter, arguments: tuple) -> np.dtype:
    name, *_ = arguments
    if type(name) is not str or name not in _NUMPY_DTYPES:
        raise BadFile(
            f"has numpy values of dtype {_quote(name)}, expected numbers; re-save only the weights "
            "(torch.save of the state dicts)"
        )
    return np.dtype(name).newbyteorder("<")


def _make_scalar(machine: _Interpreter, arguments: tuple) -> Any:
    dtype, content = arguments
    if not isinstance(dtype, np.dtype) or type(content) is not bytes:
        raise BadFile("is damaged: it has a numpy scalar of no bytes; copy or download it again")
    if len(content) != dtype.itemsize:
        raise BadFile("is damaged: it has a numpy scalar of another size; download it again")
    return np.frombuffer(content, dtype)[0].item()


def _make_array(machine: _Interpreter, arguments: tuple) -> np.ndarray:
    """An array that BUILD fills."""
    return np.empty(0, np.uint8)


def _make_tensor(machine: _Interpreter, arguments: tuple) -> TorchTensor:
    """Of (storage, offset, shape, strides, requires_grad, hooks[, metadata])."""
    storage, offset, shape, strides, _, _, *metadata = arguments
    return _tensor(storage, None, offset, shape, strides, metadata)


def _make_untyped_tensor(machine: _Interpreter, arguments: tuple) -> TorchTensor:
    """Of (storage, offset, shape, strides, requires_grad, hooks, dtype[, metadata])."""
    storage, offset, shape, strides, _, _, dtype, *metadata = arguments
    if type(dtype) is not _Global or dtype.removeprefix("torch.") not in _DTYPES:
        raise BadFile("is damaged: it has a tensor of no dtype; copy or download it again")
    return _tensor(storage, _DTYPES[dtype.removeprefix("torch.")], offset, shape, strides, metadata)


def _tensor(storage, dtype, offset, shape, strides, metadata) -> TorchTensor:
    if type(storage) is not _Storage or (storage.dtype is None) == (dtype is None):
        raise BadFile("is damaged: a tensor of it has no typed storage; copy or download it again")
    if any(metadata) and metadata != [{}]:
        raise BadFile(
            "has a tensor that is stored conjugated or negated, expected plain values; save its "
            ".resolve_conj().resolve_neg()"
        )
    numel = storage.numel if dtype is None else storage.numel // dtype.itemsize
    tensor = TorchTensor(storage.key, dtype or storage.dtype, shape, strides, offset)
    _extent(tensor, numel)
    return tensor


def _make_parameter(machine: _Interpreter, arguments: tuple) -> TorchTensor:
    """Of (tensor, requires_grad, hooks[, attributes])."""
    if len(arguments) not in (3, 4) or type(arguments[0]) is not TorchTensor:
        raise BadFile("is damaged: it has a parameter of no tensor; copy or download it again")
    return arguments[0]


_CALLS: dict[str, Callable[[_Interpreter, tuple], Any]] = {
    "collections.OrderedDict": _make_dict,
    "collections.defaultdict": _make_dict,
    "builtins.set": _make_set,
    "builtins.frozenset": lambda machine, arguments: frozenset(_make_set(machine, arguments)),
    "builtins.bytes": _make_bytes,
    "builtins.complex": _make_complex,
    "_codecs.encode": _make_bytes,
    "numpy.dtype": _make_dtype,
    "numpy._core.multiarray.scalar": _make_scalar,
    "numpy._core.multiarray._reconstruct": _make_array,
    "torch.Size": _make_size,
    "torch.device": _make_device,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_tensor_v3": _make_untyped_tensor,
    "torch._utils._rebuild_parameter": _make_parameter,
    "torch._utils._rebuild_parameter_with_state": _make_parameter,
}
# Names that are values only; those of storages give their dtype.
_NAMES: dict[str, np.dtype | None] = {
    **{f"torch.{storage}": _DTYPES[dtype] for storage, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": None,
    **{f"torch.{dtype}": None for dtype in _DTYPES},
    **dict.fromkeys(("builtins.list", "builtins.dict", "builtins.int", "builtins.float")),
    "numpy.ndarray": None,
}


def _small_int(value: int) -> int:
    if value.bit_length() > _MAX_INT_BITS:
        raise BadFile(
            f"has a number of {value.bit_length()} bits in its data.pkl, expected at most "
            f"{_MAX_INT_BITS}; re-save only the weights (torch.save of the state dicts)"
        )
    return value


_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda argument: None,
    "NEWTRUE": lambda argument: True,
    "NEWFALSE": lambda argument: False,
    "EMPTY_DICT": lambda argument: {},
    "EMPTY_LIST": lambda argument: [],
    "EMPTY_TUPLE": lambda argument: (),
    "EMPTY_SET": lambda argument: set(),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4"), _small_int),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINFLOAT"), lambda a: a),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), bytes),
}
_STEPS: dict[str, Callable[[_Interpreter, Any], None]] = {
    "PROTO": _Interpreter.proto,
    "FRAME": _Interpreter.frame,
    "STOP": _Interpreter.stop,
    "MARK": _Interpreter.mark,
    "BINPUT": _Interpreter.put,
    "LONG_BINPUT": _Interpreter.put,
    "MEMOIZE": _Interpreter.memoize,
    "BINGET": _Interpreter.get,
    "LONG_BINGET": _Interpreter.get,
    "TUPLE": _Interpreter.tuple_to_mark,
    "TUPLE1": lambda machine, argument: machine._stack.append(machine.take(1)),
    "TUPLE2": lambda machine, argument: machine._stack.append(machine.take(2)),
    "TUPLE3": lambda machine, argument: machine._stack.append(machine.take(3)),
    "APPEND": _Interpreter.append,
    "APPENDS": _Interpreter.appends,
    "SETITEM": _Interpreter.set_item,
    "SETITEMS": _Interpreter.set_items,
    "ADDITEMS": _Interpreter.add_items,
    "FROZENSET": _Interpreter.frozen_set,
    "GLOBAL": _Interpreter.known_global,
    "STACK_GLOBAL": _Interpreter.stack_global,
    "REDUCE": _Interpreter.call,
    "NEWOBJ": _Interpreter.call,
    "BUILD": _Interpreter.build,
    "BINPERSID": _Interpreter.persistent,
}
_CONTAINERS = (dict, list, tuple)
_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, set, frozenset),
    *(TorchTensor, _Global, np.ndarray),
)


def _check_tree(root: Any) -> None:
    """Refuses what can't be walked: circles, and shared parts that multiply (no recursion here)."""
    nodes: dict[int, int] = {}  # id -> nodes from there on, for containers that are done
    depths: dict[int, int] = {}
    path: set[int] = set()  # ids of those that are being walked
    stack = [root]
    while stack:
        node = stack[-1]
        children = node.values() if type(node) is dict else node
        if type(node) not in _CONTAINERS:
            if type(node) not in _LEAVES and not isinstance(node, np.dtype):
                raise BadFile(
                    f"holds {_quote(node)} without a tensor around it, expected tensors and plain "
                    "values; re-save only the weights (torch.save of the state dicts)"
                )
            stack.pop()
        elif id(node) in nodes:
            stack.pop()
        elif id(node) not in path:
            path.add(id(node))
            todo = [child for child in children if id(child) not in nodes]
            if any(id(child) in path for child in todo):
                raise BadFile("holds a list or dict that contains itself; save it without")
            stack.extend(todo)
        else:
            stack.pop()
            path.discard(id(node))
            nodes[id(node)] = 1 + sum(nodes.get(id(child), 1) for child in children)
            depths[id(node)] = 1 + max((depths.get(id(child), 0) for child in children), default=0)
            if nodes[id(node)] > _MAX_NODES or depths[id(node)] > _MAX_DEPTH:
                raise BadFile(
                    f"holds a tree of more than {_MAX_DEPTH} levels or {_MAX_NODES} values; "
                    "re-save only the weights (torch.save of the state dicts)"
                )


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------

# Always this one, as torch.save has it without a file name: equal content gives equal files,
# whatever they are called while they are written.
_TOP = "archive"
_ALIGNMENT = 64  # of storages in the file, as torch has it, for reading them by mmap
_ZIP64_FROM = 1 << 30  # below the limit of old zips, where zipfile needn't be asked


def write(path: str | os.PathLike, tree: Any, stream: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a checkpoint that torch.load(path, weights_only=True) reads, also with mmap=True.

    Arrays go to the file as they come, one in memory at a time. Equal arguments in equal order
    give equal bytes. Dicts with tensors in them are OrderedDicts in the file, as state dicts are.

    Args:
      path: of the file; if writing fails, there is none afterwards.
      tree: nested dicts and lists of str, int, float, bool, None and `Pending`.
      stream: (name, content) of every pending tensor, once each, in any order.

    Raises:
      ValueError: if the tree holds anything else, or a name of the stream is missing, unknown or
        there twice, or an array has another dtype or shape than announced.
    """
    pickle = _Emitter()
    pickle.emit(tree, 0)
    waiting = dict(pickle.pending)
    with open(path, "wb") as file:
        try:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                _write_entry(archive, file, "data.pkl", b"\x80\x02" + pickle.out + b".")
                _write_entry(archive, file, "byteorder", b"little")
                for name, array in stream:
                    array = np.asarray(array)
                    _check_announced(name, array, waiting.pop(name, None), pickle.keys)
                    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    _write_entry(archive, file, "/".join(("data", pickle.keys[name])), raw)
                    del array, raw  # or they would stay while the next one is made
                if waiting:
                    raise ValueError(
                        f"Expected the content of every tensor, but {sorted(waiting)[:5]} never "
                        "came; add them to the stream."
                    )
                _write_entry(archive, file, "version", b"3\n")
        except BaseException:
            pathlib.Path(path).unlink(missing_ok=True)
            raise


def _check_announced(
    name: str, array: np.ndarray, pending: Pending | None, keys: Mapping[str, str]
) -> None:
    if pending is None:
        what = "came twice" if name in keys else "isn't in the tree"
        raise ValueError(f"Expected each tensor of the tree once, but {name!r} {what}.")
    if (array.dtype, array.shape) != (pending.dtype, pending.shape):
        raise ValueError(
            f"{name!r} was announced as {pending.dtype} {pending.shape}, but {array.dtype} "
            f"{array.shape} came; announce what the stream gives."
        )


def _write_entry(
    archive: zipfile.ZipFile, file: io.BufferedWriter, name: str, content: bytes | np.ndarray
) -> None:
    content = memoryview(content)
    info = zipfile.ZipInfo(f"{_TOP}/{name}", (1980, 1, 1, 0, 0, 0))
    info.create_system = 3  # or the bytes would depend on the machine
    zip64 = content.nbytes > _ZIP64_FROM
    # An extra field that says its alignment and is as long as that takes.
    start = file.tell() + _LOCAL_HEADER.size + len(info.filename) + 20 * zip64 + 6
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<HHH", 0xD935, 2 + padding, _ALIGNMENT) + bytes(padding)
    with archive.open(info, "w", force_zip64=zip64) as entry:
        for at in range(0, content.nbytes, _CHUNK):
            entry.write(content[at : at + _CHUNK])


class _Emitter:
    """Pickles a tree in protocol 2: `pickle` would import the classes it only has to name."""

    def __init__(self):
        self.out = bytearray()
        self.pending: dict[str, Pending] = {}
        self.keys: dict[str, str] = {}  # of their storages

    def emit(self, value: Any, depth: int) -> None:
        out = self.out
        if depth > _MAX_DEPTH:
            raise ValueError(
                f"Expected a tree of at most {_MAX_DEPTH} levels, but this one is deeper or "
                "contains itself."
            )
        if isinstance(value, Pending):
            self.tensor(value)
        elif value is None or isinstance(value, bool):
            out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self.integer(int(value))
        elif isinstance(value, float):
            out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            out += b"X" + struct.pack("<I", len(text)) + text
        elif isinstance(value, Mapping):
            ordered = any(isinstance(child, Pending) for child in value.values())
            out += b"ccollections\nOrderedDict\n)R(" if ordered else b"}("
            for key, child in value.items():
                if not isinstance(key, str | int | float | None):
                    raise ValueError(f"Expected str or numbers as keys, got {type(key).__name__}.")
                self.emit(key, depth + 1)
                self.emit(child, depth + 1)
            out += b"u"
        elif isinstance(value, list):
            out += b"]("
            for child in value:
                self.emit(child, depth + 1)
            out += b"e"
        else:
            raise ValueError(
                "Expected dicts, lists, str, int, float, bool, None and Pending in the tree, got "
                f"{type(value).__name__}; convert it."
            )

    def integer(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
            return
        size = value.bit_length() // 8 + 1
        if size > 255:
            raise ValueError(f"Expected integers of at most 255 bytes, got one of {size}.")
        self.out += b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)

    def tensor(self, value: Pending) -> None:
        value = Pending(value.name, np.dtype(value.dtype), tuple(map(int, value.shape)))
        if value.dtype not in _STORAGE_OF:
            raise ValueError(
                f"{value.name!r} is {value.dtype}, expected one of "
                f"{', '.join(map(str, _STORAGE_OF))}; convert it."
            )
        first = self.pending.setdefault(value.name, value)
        if first != value:
            raise ValueError(
                f"{value.name!r} occurs as {first.dtype} {first.shape} and as {value.dtype} "
                f"{value.shape}; give different tensors different names."
            )
        key = self.keys.setdefault(value.name, str(len(self.keys)))
        self.out += b"ctorch._utils\n_rebuild_tensor_v2\n(("
        self.emit("storage", 0)
        self.out += b"ctorch\n" + _STORAGE_OF[value.dtype].encode() + b"\n"
        self.emit(key, 0)
        # Where torch puts it unless told otherwise: a word of the format.
        self.out += b"X\x03\x00\x00\x00cpu"
        self.emit(math.prod(value.shape), 0)
        self.out += b"tQ"
        self.integer(0)
        for numbers in (value.shape, _row_major(value.shape)):
            self.out += b"("
            for number in numbers:
                self.integer(number)
            self.out += b"t"
        self.out += b"\x89ccollections\nOrderedDict\n)RtR"
