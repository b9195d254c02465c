"""What a compiled program costs one device, read from its optimised HLO.

`compiled.cost_analysis()` counts the body of a loop once, however often it runs, and says nothing
of what devices exchange. Here the text of the program is walked: a loop counts as often as it runs,
a fusion as what it reads, computes and writes, and each exchange between devices by its kind, once,
however many steps its start, its progress and its end are spread over.

    cost = measure(compiled.as_text())
    cost.flops, cost.hbm_bytes, cost.by_kind()

Operations are those of matrix products and convolutions. Bytes are those of arrays in the device's
main memory (memory space 0), which a kernel reads and writes; slices count as what they take.
Conventions are XLA's own (`HloCostAnalysis`).
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
# These name values or lay out what is there; no kernel runs for them.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "optimization-barrier",
    "add-dependency",
    "domain",
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_PASSES = {"bitcast", "copy", "convert", "reshape", "get-tuple-element", "broadcast"}
# Custom calls of TPU programs that name buffers and places, not work.
_MARKS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}


class Shape(NamedTuple):
    """An array: its element type, dimensions, and memory space (0 is the main memory)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes without padding."""
        return self.size * _bits(self.dtype) / 8


class Instruction(NamedTuple):
    """A line of a computation.

    Attributes:
      shapes: of the result, one for each leaf of a tuple.
      operands: names of instructions of the same computation.
      attributes: all that follows the operands, as text.
      argument: the text between the parentheses.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    argument: str


class Computation(NamedTuple):
    """Instructions by name, in order, the name of the last one (its result), and its parameters."""

    instructions: dict[str, Instruction]
    root: str
    parameters: tuple[str, ...]


class Module(NamedTuple):
    """Computations by name; the program starts at `entry` and runs on so many devices."""

    computations: dict[str, Computation]
    entry: str
    num_devices: int


class Kernel(NamedTuple):
    """One kernel: operations, bytes of main memory, and how often it runs.

    `hidden` is a copy that runs beside other kernels.
    """

    name: str
    flops: float
    hbm_bytes: float
    times: float
    hidden: bool = False


class Exchange(NamedTuple):
    """One exchange between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      num_bytes: of the whole array, as it is before a reduction or after a gathering.
      sent: bytes that each device sends, by the algorithms of a ring: of n devices (n - 1)/n of the
        array, twice for an all-reduce.
      group: n.
      times: how often it runs.
      source: where in the traced program it comes from, as XLA names it.
    """

    kind: str
    num_bytes: float
    sent: float
    group: int
    times: float
    source: str
    dtype: str


class Cost(NamedTuple):
    """A program's kernels and exchanges, and loops whose number of rounds isn't known.

    Those are counted as if they ran once.
    """

    kernels: list[Kernel]
    exchanges: list[Exchange]
    unknown_loops: list[str]

    @property
    def flops(self) -> float:
        """Operations of matrix products, on one device."""
        return sum(kernel.flops * kernel.times for kernel in self.kernels)

    @property
    def hbm_bytes(self) -> float:
        """Bytes read and written in the main memory of one device."""
        return sum(kernel.hbm_bytes * kernel.times for kernel in self.kernels)

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends to others."""
        return sum(exchange.sent * exchange.times for exchange in self.exchanges)

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Of each kind of exchange: how many, the bytes of their arrays, the bytes sent."""
        table: dict[str, dict[str, float]] = {}
        for one in self.exchanges:
            row = table.setdefault(one.kind, {"count": 0, "bytes": 0.0, "sent_bytes": 0.0})
            row["count"] += one.times
            row["bytes"] += one.num_bytes * one.times
            row["sent_bytes"] += one.sent * one.times
        return table


def measure(text: str) -> Cost:
    """The cost of a compiled program, of its text as `compiled.as_text()` gives it.

    Raises:
      ValueError: if the text is not that of an HLO module.
    """
    module = parse(text)
    cost = Cost([], [], [])
    _Walk(module, cost).computation(module.entry, 1.0)
    return cost


# ----------------------------------------------------------------------------------------- parsing


def parse(text: str) -> Module:
    """The module that a text describes.

    Raises:
      ValueError: if there is no entry computation.
    """
    header = text.partition("\n")[0]
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None:
            opened = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if opened and "=" not in line.split("(")[0]:
                current, lines = opened[2], []
                entry = current if opened[1] else entry
        elif line.startswith("}"):
            computations[current] = _computation(lines)
            current = None
        elif line.strip():
            lines.append(line)
    if entry is None:
        raise ValueError("This text holds no entry computation: it is not that of an HLO module.")
    return Module(computations, entry, math.prod(map(int, counts)))


def _computation(lines: list[str]) -> Computation:
    instructions, parameters, root = {}, {}, ""
    for line in lines:
        one = _instruction(line)
        instructions[one.name] = one
        if line.lstrip().startswith("ROOT "):
            root = one.name
        if one.opcode == "parameter":
            parameters[int(one.argument)] = one.name
    return Computation(instructions, root, tuple(parameters[i] for i in sorted(parameters)))


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = _shapes(rest[:end]), rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    argument = rest[opening + 1 : closing]
    operands = () if rest.startswith("constant(") else tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(
        name.lstrip("%"), rest[:opening], shapes, operands, rest[closing + 1 :], argument
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.start()
    raise ValueError(f"A parenthesis doesn't close in {text[:80]!r}.")


@functools.lru_cache(maxsize=65536)
def _shapes(text: str) -> tuple[Shape, ...]:
    found = re.findall(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?", text)
    return tuple(
        Shape(dtype, tuple(int(d) for d in re.findall(r"\d+", dims)), _space(layout))
        for dtype, dims, layout in found
    )


def _space(layout: str) -> int:
    space = re.search(r"S\((\d+)\)", layout)
    return int(space[1]) if space else 0


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 0


# ----------------------------------------------------------------------------------------- walking


class _Walk:
    """Follows a program from its entry and adds what it finds to a `Cost`."""

    def __init__(self, module: Module, cost: Cost):
        self._module, self._cost = module, cost
        self._begun = _chains_with_start(module)

    def computation(self, name: str, times: float) -> None:
        """Adds what a computation costs that runs so often, apart from fusions."""
        computation = self._module.computations[name]
        for one in computation.instructions.values():
            self._one(computation, one, times)

    def _one(self, computation, one: Instruction, times: float) -> None:
        if one.opcode == "while":
            body, condition = _called(one, "body"), _called(one, "condition")
            rounds = _rounds(self._module, computation, one)
            if rounds is None:
                self._cost.unknown_loops.append(one.name)
                rounds = 1
            self.computation(body, times * rounds)
            self.computation(condition, times * rounds)
        elif one.opcode == "conditional":
            # One branch runs; the dearest stands for all.
            self._dearest(one, times)
        elif one.opcode in ("call", "async-start"):
            for name in _all_called(one):
                self.computation(name, times)
        elif one.opcode == "fusion":
            (name,) = _all_called(one)
            self._collect_exchanges(name, times)
            self._add_kernel(computation, one, times)
        elif _kind(one.opcode):
            self._add_exchange(computation, one, times)
        elif one.opcode not in _FREE and not one.opcode.endswith(("-done", "-update")):
            self._add_kernel(computation, one, times)

    def _dearest(self, one: Instruction, times: float) -> None:
        branches = []
        for name in _all_called(one):
            cost = Cost([], [], [])
            _Walk(self._module, cost).computation(name, times)
            branches.append(cost)
        dearest = max(branches, key=lambda cost: (cost.flops, cost.sent_bytes, cost.hbm_bytes))
        for ours, theirs in zip(self._cost, dearest, strict=True):
            ours.extend(theirs)

    def _add_kernel(self, computation, one: Instruction, times: float) -> None:
        target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
        if target and target[1] in _MARKS:
            return
        flops = _flops(self._module, computation, one)
        hidden = one.opcode.endswith("-start")
        if hidden:  # a copy: what it reads, and the same again where it goes
            (source,) = (computation.instructions[name] for name in one.operands[:1])
            places = [s for s in one.shapes if s.dtype not in ("u32", "token")][:2]
            moved = min((s.bytes for s in places), default=0.0)
            if one.opcode == "copy-start":
                moved = sum(s.bytes for s in source.shapes)
            hbm = moved * sum(not s.space for s in places)
        else:
            hbm = _hbm_bytes(self._module, computation, one)
        if flops or hbm:
            self._cost.kernels.append(Kernel(one.name, flops, hbm, times, hidden))

    def _collect_exchanges(self, name: str, times: float) -> None:
        computation = self._module.computations[name]
        for one in computation.instructions.values():
            if one.opcode == "fusion":
                for inner in _all_called(one):
                    self._collect_exchanges(inner, times)
            elif _kind(one.opcode):
                self._add_exchange(computation, one, times)

    def _add_exchange(self, computation, one: Instruction, times: float) -> None:
        chain = _chain(one)
        if chain in self._begun and not _starts(computation, one):
            return  # its progress or its end, beside other work
        group = _group_size(one.attributes, self._module.num_devices)
        arrays = [s for name in one.operands for s in computation.instructions[name].shapes]
        held = sum(s.bytes for s in arrays)
        kind, share = _kind(one.opcode), (group - 1) / group
        if kind == "all-reduce" and _is_scattered(computation, one):
            kind = "reduce-scatter"
        if kind == "all-gather":
            held *= group
        if group == 1 and kind != "collective-permute":
            return
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
        source = re.search(r'op_name="([^"]*)"', one.attributes)
        self._cost.exchanges.append(
            Exchange(
                kind,
                held,
                held * factor.get(kind, share),
                group,
                times,
                source[1] if source else one.name,
                max(arrays, key=lambda s: s.bytes).dtype if arrays else "",
            )
        )


def _chain(one: Instruction) -> str | None:
    """What names all steps of an exchange that the TPU compiler runs inside other kernels."""
    chain = re.search(r'chain_id="(\d+)"', one.attributes) if _kind(one.opcode) else None
    return chain[1] if chain else None


def _chains_with_start(module: Module) -> set[str | None]:
    return {
        _chain(one)
        for computation in module.computations.values()
        for one in computation.instructions.values()
        if _chain(one) is not None and _starts(computation, one)
    }


def _starts(computation: Computation, one: Instruction) -> bool:
    """Whether a step of an exchange is its first."""
    users = _users(computation, one.name)
    return any('="AsyncCollectiveStart"' in user.attributes for user in users)


def _kind(opcode: str) -> str | None:
    """The kind of exchange that begins with an instruction, None for others."""
    name = opcode.removesuffix("-start")
    return name if name in COLLECTIVES else None


def _is_scattered(computation: Computation, one: Instruction) -> bool:
    """Whether a fusion keeps only this device's part of a sum: a reduce-scatter under its name."""
    parts = {one.name}
    for other in computation.instructions.values():
        if parts & set(other.operands):
            if other.opcode == "dynamic-slice":
                return computation.instructions[computation.root].opcode != "while"
            if other.opcode in ("get-tuple-element", "bitcast"):
                parts.add(other.name)
    return False


def _called(one: Instruction, attribute: str) -> str:
    return re.search(rf"\b{attribute}=%?([\w.\-]+)", one.attributes)[1]


def _all_called(one: Instruction) -> list[str]:
    """Computations that an instruction runs: a fusion's, a call's, or the branches."""
    single = re.findall(
        r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", one.attributes
    )
    several = re.search(r"\bbranch_computations=\{([^}]*)\}", one.attributes)
    return single + (re.findall(r"%([\w.\-]+)", several[1]) if several else [])


def _group_size(attributes: str, num_devices: int) -> int:
    """Devices of one group, of any of the forms in which groups are written."""
    if "replica_groups=" not in attributes or "replica_groups={}" in attributes:
        return num_devices
    # A mesh may name its devices in another order: mesh['a'=4,'b'=2], device_ids=(..) {'a'}.
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    text = attributes.partition("replica_groups=")[2][:80]
    raise ValueError(f"The groups of an exchange are written in a form that isn't known: {text}")


# ------------------------------------------------------------------------------------------- loops


def _rounds(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop's body runs, None where the text doesn't tell.

    By the compiler's own word, or by a counter that starts at a constant, grows by a constant and
    is compared with one.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = module.computations[_called(loop, "condition")]
    compared = _inlined(module, condition, condition.root)
    if compared is None or compared[0].opcode != "compare":
        return None
    one, (left, right) = compared
    direction = re.search(r"direction=(\w\w)", one.attributes)[1]
    if _constant(condition, left) is not None:
        left, right = right, left
        direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    limit, index = _constant(condition, right), _tuple_index(condition, left)
    if limit is None or index is None or direction not in ("LT", "LE", "NE"):
        return None
    body = module.computations[_called(loop, "body")]
    step = _step(module, body, index)
    start = _start(computation, loop, index)
    if start is None or not step:
        return None
    return max(0, math.ceil((limit - start + (direction == "LE")) / step))


def _inlined(module, computation, name) -> tuple[Instruction, list[str]] | None:
    """An instruction, or the root of the fusion it is, with operands by their names outside."""
    one = computation.instructions[name]
    while one.opcode in ("bitcast", "copy"):
        one = computation.instructions[one.operands[0]]
    if one.opcode != "fusion":
        return one, list(one.operands)
    inner = module.computations[_all_called(one)[0]]
    root = inner.instructions[inner.root]
    outside = dict(zip(inner.parameters, one.operands, strict=True))
    names = []
    for operand in root.operands:
        if operand in outside:
            names.append(outside[operand])
        elif (value := _constant(inner, operand)) is not None:
            names.append(str(value))
        else:
            return None
    return root, names


def _constant(computation: Computation, name: str) -> int | None:
    """The value of a constant integer, by the name of its instruction or written down."""
    if re.fullmatch(r"-?\d+", name):
        return int(name)
    one = computation.instructions[name]
    while one.opcode in ("copy", "bitcast", "convert", "reshape"):
        one = computation.instructions[one.operands[0]]
    number = re.fullmatch(r"-?\d+", one.argument) if one.opcode == "constant" else None
    return int(number[0]) if number else None


def _tuple_index(computation: Computation, name: str) -> int | None:
    """Which part of the loop's state an instruction is."""
    one = computation.instructions.get(name)
    while one is not None and one.opcode in ("copy", "bitcast"):
        one = computation.instructions[one.operands[0]]
    if one is None or one.opcode != "get-tuple-element":
        return None
    if one.operands[0] not in computation.parameters:
        return None
    return int(re.search(r"index=(\d+)", one.attributes)[1])


def _step(module: Module, body: Computation, index: int) -> int | None:
    """What a round adds to a counter."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return None
    found = _inlined(module, body, root.operands[index])
    if found is None or found[0].opcode != "add":
        return None
    values = [_constant(body, name) for name in found[1]]
    return next((value for value in values if value is not None), None)


def _start(computation: Computation, loop: Instruction, index: int) -> int | None:
    """Where a counter starts."""
    state = computation.instructions[loop.operands[0]]
    while state.opcode in ("copy", "opt-barrier", "optimization-barrier"):
        state = computation.instructions[state.operands[0]]
    return _constant(computation, state.operands[index]) if state.opcode == "tuple" else None


# -------------------------------------------------------------------------------------- operations


def _flops(module: Module, computation: Computation, one: Instruction) -> float:
    """Operations of the matrix products of an instruction, those of a fusion included."""
    if one.opcode == "fusion":
        inner = module.computations[_all_called(one)[0]]
        return sum(_flops(module, inner, part) for part in inner.instructions.values())
    if one.opcode == "dot":
        left = computation.instructions[one.operands[0]].shapes[0]
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        over = [left.dims[int(d)] for d in re.findall(r"\d+", dims[1])] if dims else []
        return 2.0 * one.shapes[0].size * math.prod(over)
    if one.opcode == "convolution":
        return _convolution_flops(computation, one)
    if one.opcode == "custom-call" and re.search(r'="[^"]*(matmul|gemm|\bdot)', one.attributes):
        return _call_flops(computation, one)
    return 0.0


def _call_flops(computation: Computation, one: Instruction) -> float:
    """Operations of a library's product [.., m, k] x [.., k, n] -> [.., m, n]."""
    left, right = (computation.instructions[name].shapes[0] for name in one.operands[:2])
    out = one.shapes[0]
    batch = math.prod(out.dims[:-2])
    # Whatever is transposed: (m k) (k n) (m n) = (m k n)^2.
    return 2.0 * batch * math.sqrt(left.size * right.size * out.size / batch**3)


def _convolution_flops(computation: Computation, one: Instruction) -> float:
    """Products of a convolution that meet neither padding nor holes, as XLA counts them."""
    left, right = (computation.instructions[name].shapes[0].dims for name in one.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    lhs, rhs, out = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", one.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    spatial = sorted(c for c in out if c.isdigit())
    pairs = 1
    for axis, label in enumerate(spatial):

        def get(name, default, axis=axis):
            return fields[name].split("x")[axis] if name in fields else default

        low, _ = map(int, get("pad", "0_0").split("_"))
        pairs *= _pairs(
            left[lhs.index(label)],
            right[rhs.index(label)],
            one.shapes[0].dims[out.index(label)],
            stride=int(get("stride", "1")),
            low=low,
            left_gap=int(get("lhs_dilate", "1")),
            right_gap=int(get("rhs_dilate", "1")),
        )
    shape = one.shapes[0].dims
    groups = re.search(r"batch_group_count=(\d+)", one.attributes)
    rows = shape[out.index("b")] * shape[out.index("f")]
    return 2.0 * rows * right[rhs.index("i")] * pairs / (int(groups[1]) if groups else 1)


@functools.lru_cache(maxsize=4096)
def _pairs(left, right, out, *, stride, low, left_gap, right_gap) -> int:
    """How often a place of the window meets an entry of the input."""
    reach = (left - 1) * left_gap
    met = 0
    for place in range(right):
        first = place * right_gap - low
        met += sum(
            0 <= at <= reach and at % left_gap == 0
            for at in range(first, first + out * stride, stride)
        )
    return met


# ------------------------------------------------------------------------------------------- bytes


def _hbm_bytes(module: Module, computation: Computation, one: Instruction) -> float:
    """Bytes of main memory that a kernel reads and writes."""
    if one.opcode == "fusion":
        inner = module.computations[_all_called(one)[0]]
        reads = zip(inner.parameters, one.operands, strict=True)
        read = sum(
            _read(module, inner, parameter, computation.instructions[operand])
            for parameter, operand in reads
        )
        return read + _written(inner, one)
    arrays = [s for name in one.operands for s in computation.instructions[name].shapes]
    if one.opcode in ("slice", "dynamic-slice", "gather"):
        # As much as it takes is read of the operand, if that is in the main memory.
        taken = sum(s.bytes for s in one.shapes)
        return taken * (not arrays[0].space) + _main(one.shapes)
    if one.opcode in ("dynamic-update-slice", "scatter"):
        update = arrays[1 if one.opcode == "dynamic-update-slice" else 2]
        return update.bytes * ((not update.space) + (not one.shapes[0].space))
    if one.opcode in ("broadcast", "iota", "rng-bit-generator"):
        return _main(one.shapes)
    return _main(arrays) + _main(one.shapes)


def _main(shapes) -> float:
    return sum(s.bytes for s in shapes if not s.space)


def _read(module: Module, inner: Computation, parameter: str, given: Instruction) -> float:
    """Bytes that a fusion reads of one operand."""
    if not given.shapes or all(s.space for s in given.shapes):
        return 0.0
    total, whole = 0.0, _main(given.shapes)
    for user in _users(inner, parameter):
        if user.opcode in _SLICES and user.operands[0] == parameter:
            total += sum(s.bytes for s in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter:
            continue  # written in place
        elif user.opcode == "fusion":
            within = module.computations[_all_called(user)[0]]
            at = [i for i, name in enumerate(user.operands) if name == parameter]
            total += sum(_read(module, within, within.parameters[i], given) for i in at)
        elif user.opcode == "bitcast":
            total += _read(module, inner, user.name, given)
        elif _kind(user.opcode) or user.opcode in ("tuple", "custom-call"):
            continue  # passed on; an exchange is counted as one
        else:
            return whole
    return min(total, whole)


def _written(inner: Computation, one: Instruction) -> float:
    """Bytes that a fusion writes: of what it updates in place, the part that is new."""
    root = inner.instructions[inner.root]
    outs = root.operands if root.opcode == "tuple" else (root.name,)
    if len(outs) != len(one.shapes):
        return _main(one.shapes)
    total = 0.0
    for name, shape in zip(outs, one.shapes, strict=True):
        made = inner.instructions[name]
        while made.opcode == "bitcast":
            made = inner.instructions[made.operands[0]]
        if made.opcode == "dynamic-update-slice":
            shape = inner.instructions[made.operands[1]].shapes[0]._replace(space=shape.space)
        if made.opcode == "parameter" or _kind(made.opcode):
            continue  # passed on
        total += shape.bytes * (not shape.space)
    return total


def _users(computation: Computation, name: str) -> Iterator[Instruction]:
    return (one for one in computation.instructions.values() if name in one.operands)
