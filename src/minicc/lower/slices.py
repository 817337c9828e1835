"""Whether the work of a graph falls apart along the first axis of its inputs, as that of a network does along its batch.

Asked of each op by what its `compute` loads for one output element, of the smaller ops where it expands into some: an op is
independent along the first axis when element `(b, ...)` needs of its operands that have the axis their elements `(b, ...)`
only, and is computed the same way for all `b`. A program of such a graph may be run for some rows of its inputs at a time
(runtime/slices). Nothing is rewritten here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from minicc.ir.dims import Dim, SymbolicDim, bare_symbol, symbols_of
from minicc.ir.expr import Expr, Index, as_index, iteration, load, reduce, walk
from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.opdef import Content, Kind
from minicc.ir.types import TensorType, leads_with
from minicc.lower.compose import FIRST_REDUCTION_AXIS

_BATCH = 0


def sliced_symbol(graph: Graph) -> str:
    """The symbol of the first axis along which the graph falls apart; "" where it does not."""
    first = next((v.type.shape for v in graph.inputs if isinstance(v.type, TensorType) and v.type.shape), None)
    symbol = None if first is None or isinstance(first[0], int) else bare_symbol(first[0])
    if symbol is None:
        return ""
    carries: dict[Value, bool] = {}
    for value in graph.inputs:
        if not _is_plain(value, symbol):
            return ""
        carries[value] = _leads(value, symbol)
    if not _spreads(graph, carries, symbol):
        return ""
    whole = all(carries.get(v, False) and _leads(v, symbol) for v in graph.outputs)
    return symbol if whole else ""


def _spreads(graph: Graph, carries: dict[Value, bool], symbol: str) -> bool:
    """Whether all nodes are independent; adds which values have the axis to `carries`."""
    for node in graph.nodes:
        if not all(_is_plain(v, symbol) for v in node.outputs):
            return False
        having = [v is not None and carries.get(v, False) for v in node.inputs]
        leading = [_leads(v, symbol) for v in node.outputs]
        if any(having) or any(leading):
            if not all(leading) or not _is_independent(node, having, symbol):
                return False
        elif _reads_symbol(node, symbol):
            return False
        carries |= dict(zip(node.outputs, leading))
    return True


def _is_plain(value: Value, symbol: str) -> bool:
    """Whether it is a tensor of known rank with the symbol in no size but, alone, the first."""
    if not isinstance(value.type, TensorType) or value.type.shape is None:
        return False
    shape = value.type.shape
    return not any(_has(d, symbol) for d in (shape if not _leads(value, symbol) else shape[1:]))


def _leads(value: Value, symbol: str) -> bool:
    return leads_with(value.type, symbol)


def _has(dim: object, symbol: str) -> bool:
    return isinstance(dim, SymbolicDim) and symbol in symbols_of(dim)


def _reads_symbol(node: Node, symbol: str) -> bool:
    """Whether the node computes with the size of the axis."""
    for position, value in enumerate(node.inputs):
        content = None if value is None or position in node.op.static_inputs else value.content
        if content is not None and any(_has(item, symbol) for item in content.flat):
            return True
    return False


def _is_independent(node: Node, having: Sequence[bool], symbol: str) -> bool:
    op = node.op
    if _reads_symbol(node, symbol) or not op.deterministic or (op.refuse is not None and op.refuse(node) is not None):
        return False
    if op.name == "Fused":
        body: Graph = node.attrs["body"]
        inner = dict(zip(body.inputs, having))
        return _spreads(body, inner, symbol) and all(inner.get(v, False) for v in body.outputs)
    if op.kind is Kind.POINTWISE:
        rank = len(node.output.shape)
        return all(len(v.shape) == rank for v, has in zip(node.inputs, having) if has and v is not None)
    if op.compute is not None:
        return all(_loads_own_row(node, number, having, symbol) for number in range(len(node.outputs)))
    if (op.domain, op.name) == ("com.microsoft", "MatMulNBits"):  # rows by themselves; its expansion unpacks all weights
        return not any(having[1:]) and len(node.output.shape) > 1
    return op.expand is not None and _expands_independently(node, having, symbol)


def _expands_independently(node: Node, having: Sequence[bool], symbol: str) -> bool:
    """The same of the smaller ops that stand for a node, in a graph of their own."""
    inputs = [None if v is None else Value(v.name, v.type, data=v.data, content=v.content) for v in node.inputs]
    own = Node(node.op, inputs, node.attrs, node.origin)
    own.outputs = tuple(Value(v.name, v.type, own, i) for i, v in enumerate(node.outputs))
    graph = Graph(node.op.name)
    assert node.op.expand is not None
    made = list(node.op.expand(Builder(graph, node.origin), own))
    carries = {v: has for v, has in zip(inputs, having) if v is not None}
    return _spreads(graph, carries, symbol) and all(carries.get(v, False) and _leads(v, symbol) for v in made)


class _OtherRow(Exception):
    """An element of another row is loaded."""


class _Rows:
    """A node as its `compute` sees it: loads of operands that have the axis must be of the very row, which they then lose."""

    def __init__(self, node: Node, output: int, having: Sequence[bool]) -> None:
        self.node, self.output, self.having = node, output, having
        self.next_axis = FIRST_REDUCTION_AXIS

    def _input(self, operand: int) -> Value:
        value = self.node.inputs[operand]
        assert value is not None
        return value

    def load(self, operand: int, index: Sequence[Index]) -> Expr:
        value, at = self._input(operand), [as_index(i) for i in index]
        if self.having[operand]:
            if at[0] != iteration(_BATCH):
                raise _OtherRow
            at = at[1:]
        return load(value, value.tensor.dtype, at)

    def has(self, operand: int) -> bool:
        return operand < len(self.node.inputs) and self.node.inputs[operand] is not None

    def type(self, operand: int) -> TensorType:
        return self._input(operand).tensor

    def out_type(self, output: int = 0) -> TensorType:
        return self.node.outputs[output].tensor

    def content(self, operand: int) -> Content:
        content = self._input(operand).content
        assert content is not None
        return content

    def reduce(self, kind: str, extents: Sequence[Dim], body: Callable[..., Expr]) -> Expr:
        axes = tuple(range(self.next_axis, self.next_axis + len(extents)))
        self.next_axis += len(extents)
        value = body(*(iteration(a) for a in axes))
        return reduce(kind, axes, extents, value) if axes else value


def _loads_own_row(node: Node, output: int, having: Sequence[bool], symbol: str) -> bool:
    """Whether an element of an output loads of its own row only, and uses neither its number nor how many there are."""
    index = [iteration(axis) for axis in range(len(node.outputs[output].shape))]
    attributes: Mapping[str, object] = node.attrs
    assert node.op.compute is not None
    try:
        value = node.op.compute(_Rows(node, output, having), index, **attributes)
    except _OtherRow:
        return False
    for expr in walk(value):
        if expr.op == "iter" and expr.arg == _BATCH:
            return False
        sizes = [expr.arg] if expr.op == "dim" else expr.arg[2] if expr.op == "reduce" else []  # type: ignore[index]
        if any(_has(size, symbol) for size in sizes):
            return False
    return True
