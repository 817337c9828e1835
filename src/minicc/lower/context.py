"""What lowering knows while it walks a graph: where each value lives, the kernels so far, the steps so far.

Values get an array when somebody needs one; a reshape of a contiguous array is the same array, and other views are
composed into their readers until something (a host node, a graph output, a template) asks for their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from mmap import mmap
from typing import TypeVar

import numpy as np

from minicc.errors import CodegenError
from minicc.ir.dims import Dim, product
from minicc.ir.expr import Expr, iteration
from minicc.ir.graph import Node, Value
from minicc.ir.opdef import Kind
from minicc.ir.types import DType, OpaqueType, TensorType, dtype_of
from minicc.kernels.packing import CACHE_LINE, aligned_empty
from minicc.lower.affine import affine, linearise
from minicc.lower.body import BodyWord, Write, normalise
from minicc.lower.compose import RESHAPES, VIEWS, Composer, broadcast_index
from minicc.lower.estimate import estimate
from minicc.lower.kernel import Kernel, LoopKernel
from minicc.lower.program import Buffer, KernelStep, Step, Word
from minicc.lower.split import split_reductions
from minicc.targets.cpu import CpuTarget
from minicc.targets.cuda import CudaTarget
from minicc.targets.parse import Target
from minicc.targets.rates import Rates

Way = TypeVar("Way")
HUGE_BYTES = 4 << 20  # numpy asks huge pages for arrays from this size on


@dataclass
class KernelTable:
    """Distinct kernels of a program and its bodies."""

    index: dict[Kernel, int] = field(default_factory=dict)

    def number(self, kernel: Kernel) -> int:
        return self.index.setdefault(kernel, len(self.index))


@dataclass(frozen=True)
class Choices:
    """Where lowering may go several ways, by the layers of a node.

    picked: names of the ways to go; elsewhere it is the first of them. open: the names found on the way. rates: says what
    their order is estimated with; asked where it matters, since an answer may take a measurement.
    """

    picked: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    open: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    rates: Callable[[], Rates] = Rates


class Lowering:
    """Buffers, steps and kernels of one graph being lowered."""

    def __init__(self, target: Target, kernels: KernelTable, winograd: bool = True, precision: str = "fp32",
                 choices: Choices | None = None, fft: bool = True, rounding: bool = True) -> None:  # fmt: skip
        self.target, self.kernels, self.winograd, self.fft, self.precision = target, kernels, winograd, fft, precision
        self.rounding = rounding
        self.choices = choices or Choices()
        self.buffers: list[Buffer] = []
        self.steps: list[Step] = []
        self.places: dict[Value, int] = {}
        self.constants: dict[Hashable, int] = {}
        self.derived: dict[Hashable, tuple[int, ...]] = {}  # arrays made of a value once for all that read them
        self.updated: dict[int, int] = {}  # of an array, the input whose contents it has but for what is written over them
        self.outputs: frozenset[Value] = frozenset()  # of the graph: they need arrays of their own
        self.computed: set[Value] = set()  # values whose step has been emitted or that are given

    @property
    def cpu(self) -> CpuTarget:
        """The target, for templates that only CPUs have."""
        assert isinstance(self.target, CpuTarget)
        return self.target

    def choose(self, node: Node, ways: Mapping[str, Way]) -> Way:
        """One of several ways to compute a node: the first unless another was picked for its layers."""
        names = tuple(ways)
        if len(names) > 1:
            self.choices.open[node.origin] = names
        picked = self.choices.picked.get(node.origin, names[0])
        return ways.get(picked, ways[names[0]])

    # -- buffers

    def new_buffer(self, name: str, dtype: DType | None, shape: Sequence[Dim] | None, kind: str,
                   data: np.ndarray | None = None, content: tuple[object, ...] = ()) -> int:  # type: ignore[type-arg]  # fmt: skip
        self.buffers.append(Buffer(name, dtype, None if shape is None else tuple(shape), kind, data, content))
        return len(self.buffers) - 1

    def temporary(self, name: str, dtype: DType, shape: Sequence[Dim]) -> int:
        """Working memory in the arena."""
        return self.new_buffer(name, dtype, shape, "temporary")

    def constant(self, data: np.ndarray, name: str, key: Hashable = None) -> int:  # type: ignore[type-arg]
        """A constant array, shared by `key` (the identity of the original weights and how they were packed).

        It starts a cache line and lies in memory: what happens to the model's files later does not matter to a program.
        """
        if key is not None and key in self.constants:
            return self.constants[key]
        data = _owned(data)
        number = self.new_buffer(name, dtype_of(data.dtype), data.shape, "constant", data)
        if key is not None:
            self.constants[key] = number
        return number

    def allocate(self, value: Value, kind: str = "temporary") -> int:
        """The array that a step about to be emitted writes `value` to."""
        if isinstance(value.type, OpaqueType) or value.type.shape is None:
            number = self.new_buffer(value.name, None if isinstance(value.type, OpaqueType) else value.type.dtype, None, "host")
        else:
            number = self.new_buffer(value.name, value.type.dtype, value.type.shape, kind)
        self.places[value] = number
        self.computed.add(value)
        return number

    def updates(self, source: Value, target: int) -> None:
        """Note that the first step that writes an array copies what is kept of a value, and that later ones write over it."""
        number = self.places.get(source)
        if number is not None and self.buffers[number].kind == "input":
            self.updated[target] = number

    def is_inline(self, value: Value) -> bool:
        """Whether readers compose this value instead of loading it: a view that has no array yet."""
        node = value.producer
        return node is not None and value not in self.places and is_view(node)

    def buffer(self, value: Value) -> int:
        """The contiguous array of a value, made now if it is a constant or a view without one."""
        if value in self.places:
            return self.places[value]
        if value.data is not None:
            number = self.constant(value.data, value.name, ("data", id(value.data), value.data.shape))
        elif value.content is not None and value.producer is None:
            tensor = value.tensor
            number = self.new_buffer(value.name, tensor.dtype, tensor.dims, "content", content=tuple(value.content.flat))
        elif value.producer is not None and is_view(value.producer):
            alias = self._alias(value)
            if alias is not None:
                number = alias
            else:
                self.emit_loops([value], self.composer(), value.producer.origin, f"copy_{value.producer.op.name.lower()}")
                return self.places[value]
        else:
            raise CodegenError(f"value {value.name} is read before it is computed",
                               where=value.producer.describe() if value.producer else "")  # fmt: skip
        self.places[value] = number
        return number

    def shaped_buffer(self, value: Value) -> int:
        """As `buffer`, but never an array under another shape: for steps that see arrays with their shapes."""
        number = self.buffer(value)
        found = self.buffers[number]
        if found.shape is None or not isinstance(value.type, TensorType) or found.shape == value.type.shape:
            return number
        copy = self.temporary(value.name, value.tensor.dtype, value.shape)
        offset = linearise([iteration(a) for a in range(len(value.shape))], value.shape)
        load = Expr("load", value.tensor.dtype, (offset,), number)
        self.emit_writes([Write(copy, value.tensor.dtype, offset, load)], value.shape, (), "copy_reshaped")
        self.places[value] = copy
        return copy

    def _alias(self, value: Value) -> int | None:
        """The array of a reshape's source, which holds the same bytes in the same order."""
        node = value.producer
        assert node is not None
        if node.op.name not in RESHAPES:
            return None
        source = node.inputs[0]
        assert source is not None
        # A view as the source is copied over its own shape, where positions need no division; the reshape is then free.
        return self.buffer(source)

    def composer(self, inside: Callable[[Value], bool] = lambda _: False, bound: Callable[[Value], Value] = lambda v: v,
                 given: Callable[[Value, tuple[Expr, ...]], Expr | None] = lambda _v, _i: None) -> Composer:  # fmt: skip
        """A composer that inlines the given values and every view without an array."""
        return Composer(lambda v: inside(v) or self.is_inline(v), bound, given)

    def view(self, value: Value, shape: Sequence[Dim]) -> tuple[int, Dim, tuple[Dim, ...]] | None:
        """(buffer, offset, strides over `shape`) when the value, broadcast to `shape`, is an affine view of an array."""
        index = [iteration(a) for a in range(len(shape))]
        expr = self.composer().element(value, broadcast_index(index, shape, value.shape))
        if expr.op != "load":
            return None
        form = affine(expr.args[0])
        if form.rest is not None:
            return None
        assert isinstance(expr.arg, Value)
        return self.buffer(expr.arg), form.constant, tuple(form.strides.get(a, 0) for a in range(len(shape)))

    # -- steps

    def emit_loops(self, outputs: Sequence[Value], composer: Composer, origin: tuple[str, ...], name: str,
                   sources: Sequence[Value] | None = None, note: str = "") -> None:  # fmt: skip
        """One generated kernel that computes `outputs` (equal shapes) element by element.

        sources: the values whose elements are stored, when they differ from `outputs` (results of a fused body).
        """
        shape = outputs[0].shape
        index = [iteration(a) for a in range(len(shape))]
        elements = [composer.element(v, index) for v in (sources or outputs)]
        # Arrays are made (and views copied) before this step is emitted, so reads always precede it.
        writes = []
        for value, element in zip(outputs, elements):
            writes.append(Write(value, value.tensor.dtype, linearise(index, shape), element))
        self.emit_writes(writes, shape, origin, name, allocate=outputs, note=note)

    def emit_writes(self, writes: Sequence[Write], shape: Sequence[Dim], origin: tuple[str, ...], name: str,
                    allocate: Sequence[Value] = (), note: str = "") -> None:  # fmt: skip
        """A generated kernel for explicit writes over a parallel space of the given shape."""

        def emit_parts(dtype: DType, extents: Sequence[Dim], value: Expr) -> int:
            array = self.temporary(f"{name}_parts", dtype, extents)
            place = linearise([iteration(axis) for axis in range(len(extents))], extents)
            self.emit_writes([Write(array, dtype, place, value)], extents, origin, f"{name}_parts")
            return array

        writes = split_reductions(writes, shape, emit_parts, isinstance(self.target, CudaTarget))
        normal = normalise(writes, shape, keep=isinstance(self.target, CpuTarget))
        kernel = LoopKernel(len(normal.extents), normal.body, name[:60], normal.short)
        for value in allocate:
            self.allocate(value)
        words = [Word(e) for e in normal.extents] + self.words(normal.words)
        units: Dim = 1
        if len(normal.extents) == 1:
            units = normal.extents[0]
        elif normal.extents:
            units = product(normal.extents[:-1])
        written = {self.array(w.array) for w in writes}
        touched = [w.buffer for w in words if w.buffer is not None]
        reads = tuple(dict.fromkeys(b for b in touched if b not in written))
        flops, cost = estimate(writes, shape)
        self.steps.append(KernelStep(
            self.kernels.number(kernel), tuple(words), units, reads, tuple(dict.fromkeys(written)), origin, cost,
            flops=flops, bytes=self.traffic([*reads, *written]), note=note,
        ))  # fmt: skip

    def words(self, words: Sequence[BodyWord]) -> list[Word]:
        """Body words with arrays turned into buffers."""
        return [Word(w.value, None if w.array is None else self.array(w.array)) for w in words]

    def array(self, key: Hashable) -> int:
        """The buffer of an array key: a value, or a buffer number given directly."""
        return key if isinstance(key, int) else self.buffer(key)  # type: ignore[arg-type]

    def traffic(self, buffers: Sequence[int]) -> Dim:
        """Bytes of distinct buffers, each touched once."""
        total: Dim = 0
        for number in dict.fromkeys(buffers):
            found = self.buffers[number]
            if found.shape is not None and found.dtype is not None:
                total = total + found.elements * found.dtype.bytes
        return total


def is_view(node: Node) -> bool:
    """Whether a node only renames positions of its first input."""
    if node.op.domain or node.op.name not in VIEWS or node.op.kind not in (Kind.INDEX, Kind.POINTWISE):
        return False
    known = all(isinstance(v.type, TensorType) and v.type.shape is not None for v in (node.inputs[0], *node.outputs) if v)
    return known and (node.op.refuse is None or node.op.refuse(node) is None)


def together(buffers: list[Buffer]) -> None:
    """Move small constants into one array, which numpy asks huge pages for: kernels that stream them miss fewer translations.

    Measured at 2 % of the time of convolutional networks (Zen 4). Nothing happens where they take less than such an array does.
    """
    small = {id(b.data): b.data for b in buffers if b.kind == "constant" and b.data is not None and _is_small(b.data)}
    size = sum(map(_room_of, small.values()))
    if size < HUGE_BYTES:
        return
    room, at = aligned_empty((size,), np.uint8), 0
    places: dict[int, np.ndarray] = {}  # type: ignore[type-arg]
    for number, buffer in enumerate(buffers):
        key = id(buffer.data)
        if buffer.kind != "constant" or not (key in small or key in places):
            continue
        if key not in places:
            data = small.pop(key)  # so that no array is held twice for long
            places[key] = room[at : at + data.nbytes].view(data.dtype).reshape(data.shape)
            places[key][...] = data
            at += _room_of(data)
        buffers[number] = replace(buffer, data=places[key])


def _room_of(data: np.ndarray) -> int:  # type: ignore[type-arg]
    """Bytes up to the next start of a cache line."""
    return -(-data.nbytes // CACHE_LINE) * CACHE_LINE


def _is_small(data: np.ndarray) -> bool:  # type: ignore[type-arg]
    return not data.dtype.hasobject and 0 < data.nbytes < HUGE_BYTES


def _owned(data: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """The array, or a copy where it is a strided view, lies in a mapped file, or its vectors would cross cache lines."""
    if data.dtype.hasobject:
        return data
    owner: object = data
    while isinstance(owner, np.ndarray):
        owner = owner.base
    mapped = isinstance(owner, memoryview) and isinstance(owner.obj, mmap)
    plain = data.flags.c_contiguous and data.flags.aligned and not mapped
    if plain and (data.nbytes < CACHE_LINE or data.ctypes.data % CACHE_LINE == 0):
        return data
    copy = aligned_empty(data.shape, data.dtype)
    copy[...] = data
    return copy
