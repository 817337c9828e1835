"""Composes ops into one expression per output element: fusion is function composition.

A `Composer` answers "what is element `index` of this value": by the op's `compute` when the value belongs to what is
being fused (or is a view nobody has materialised), by a literal for scalar constants, else by a load from
the array that holds it. It serves as the `Indexing` handed to `compute`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minicc.ir.dims import Dim, minimum
from minicc.ir.expr import Expr, Index, as_index, cast, const, dim, iteration, load, reduce
from minicc.ir.graph import Node, Value
from minicc.ir.opdef import Content, Kind
from minicc.ir.types import KERNEL_DTYPES, TensorType, boolean, i64
from minicc.lower.affine import linearise, reshape_index

# Ops that only rename positions; they are composed into their readers unless somebody needs their array.
RESHAPES = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"))
VIEWS = RESHAPES | {"Transpose", "Slice", "Expand", "Split"}
MAX_DIGITS = 6  # longer constants are loaded rather than written into the code
# Loop variables of reductions start here, above any parallel axis.
FIRST_REDUCTION_AXIS = 100


class Composer:
    """Builds the element expressions of one kernel; equal requests give the same expression object.

    inline: whether a value is computed here rather than loaded.
    bound:  maps a value to the value it stands for (inputs of a `Fused` body to the outer values).
    given:  elements fixed from outside, such as a template's accumulator, as a function of the index.
    """

    def __init__(self, inline: Callable[[Value], bool], bound: Callable[[Value], Value] = lambda v: v,
                 given: Callable[[Value, tuple[Expr, ...]], Expr | None] = lambda _v, _i: None) -> None:  # fmt: skip
        self.inline, self.bound, self.given = inline, bound, given
        self.memo: dict[tuple[Value, tuple[Expr, ...]], Expr] = {}
        self.next_axis = FIRST_REDUCTION_AXIS

    def element(self, value: Value, index: Sequence[Index]) -> Expr:
        """Element `index` of a tensor value."""
        value = self.bound(value)
        position = tuple(as_index(i) for i in index)
        key = (value, position)
        if key not in self.memo:
            self.memo[key] = self._element(value, position)
        return self.memo[key]

    def _element(self, value: Value, index: tuple[Expr, ...]) -> Expr:
        given = self.given(value, index)
        if given is not None:
            return given
        scalar = scalar_constant(value)
        if scalar is not None:
            return scalar
        node = value.producer
        if node is None or not self.inline(value):
            return load(value, value.tensor.dtype, (linearise(index, value.shape),))
        if node.op.name in RESHAPES and not node.op.domain:
            return self._reshaped(node, value, index)
        view = NodeView(self, node, value.index)
        if node.op.kind is Kind.POINTWISE:
            operands = [None if v is None else self.element(v, broadcast_index(index, value.shape, self.bound(v).shape))
                        for v in node.inputs]  # fmt: skip
            assert node.op.compute is not None
            return node.op.compute(*operands, **node.attrs)
        assert node.op.compute is not None, node.op
        return node.op.compute(view, index, **node.attrs)

    def _reshaped(self, node: Node, value: Value, index: tuple[Expr, ...]) -> Expr:
        """Element of a reshape: of an array by its flat offset, of a computed value by matching axes.

        A chain of reshapes is one reshape of its first value.
        """
        source = self._reshape_source(node)
        if source.producer is None or not self.inline(source):
            at = tuple(reshape_index(index, value.shape, source.shape))
            fixed = self.given(source, at) or scalar_constant(source)
            return fixed or load(source, source.tensor.dtype, (linearise(index, value.shape),))
        return self.element(source, reshape_index(index, value.shape, source.shape))

    def _reshape_source(self, node: Node) -> Value:
        while True:
            source = node.inputs[0]
            assert source is not None
            source = self.bound(source)
            producer = source.producer
            if producer is None or not self.inline(source) or producer.op.domain or producer.op.name not in RESHAPES:
                return source
            node = producer

    def reduction(self, kind: str, extents: Sequence[Dim], body: Callable[..., Expr]) -> Expr:
        """A reduction over fresh loop variables."""
        axes = tuple(range(self.next_axis, self.next_axis + len(extents)))
        self.next_axis += len(extents)
        value = body(*(iteration(a) for a in axes))
        return reduce(kind, axes, extents, value) if axes else value


class NodeView:
    """A node as its `compute` sees it (the `Indexing` protocol)."""

    def __init__(self, composer: Composer, node: Node, output: int) -> None:
        self.composer, self.node, self.output = composer, node, output

    def _input(self, operand: int) -> Value:
        value = self.node.inputs[operand]
        assert value is not None, f"{self.node.op} reads a missing input {operand}"
        return self.composer.bound(value)

    def load(self, operand: int, index: Sequence[Index]) -> Expr:
        return self.composer.element(self._input(operand), index)

    def has(self, operand: int) -> bool:
        return operand < len(self.node.inputs) and self.node.inputs[operand] is not None

    def type(self, operand: int) -> TensorType:
        return self._input(operand).tensor

    def out_type(self, output: int = 0) -> TensorType:
        return self.node.outputs[output].tensor

    def content(self, operand: int) -> Content:
        content = self._input(operand).content
        assert content is not None, f"{self.node.op}: content of input {operand} is unknown"
        return content

    def reduce(self, kind: str, extents: Sequence[Dim], body: Callable[..., Expr]) -> Expr:
        return self.composer.reduction(kind, extents, body)


def broadcast_index(index: Sequence[Expr], shape: Sequence[Dim], operand: Sequence[Dim]) -> list[Expr]:
    """The index into an operand that is broadcast to `shape`; sizes that may be 1 only at run time get stride 0 then."""
    out: list[Expr] = []
    for position, full, size in zip(index[len(shape) - len(operand) :], shape[len(shape) - len(operand) :], operand):
        if size == 1:
            out.append(const(0, i64))
        elif size == full or isinstance(size, int):
            out.append(position)
        else:
            out.append(position * dim(minimum(size - 1, 1)))
    return out


def scalar_constant(value: Value) -> Expr | None:
    """A constant of one element as a literal (or a size), else None."""
    if value.producer is not None or not isinstance(value.type, TensorType):
        return None
    dtype = value.type.dtype
    if dtype not in KERNEL_DTYPES:
        return None
    if value.data is not None and value.data.size == 1:
        item: Any = value.data.reshape(-1)[0]
        if dtype.is_float and len(str(item)) > MAX_DIGITS:
            return None  # such a number (a quantisation scale) differs from layer to layer; loaded, layers share the kernel
        return const(bool(item) if dtype == boolean else int(item) if dtype.is_integer else float(item), dtype)
    if value.data is None and value.content is not None and value.content.size == 1:
        item = value.content.reshape(-1)[0]
        if isinstance(item, bool | float):
            return const(item, dtype)
        return const(item, dtype) if isinstance(item, int) else cast(dim(item), dtype)
    return None
