"""The graph: what is computed.

Values, nodes and graphs, mutable, with exact use lists. Four verbs edit a graph: `add`, `replace`, `tidy`, `copy`;
order is restored by `tidy`, so a pass never worries about it. Identity is the object; names are for people. Bodies of
control-flow ops and of `Fused` nodes are graphs in attributes; what they capture from outside are explicit
inputs. Layout is physical (permuted shapes and explicit `Transpose` nodes): no hidden field can disagree with the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np

from minicc.errors import InvalidModelError, MiniccError, ShapeError
from minicc.ir.dims import Dim, SymbolicDim, symbol, symbols_of
from minicc.ir.opdef import REQUIRED, Content, Inference, Kind, OpDef, UnknownRank, get_op
from minicc.ir.types import TensorType, Type, dtype_of, i64

# Contents larger than this are not tracked: shape arithmetic works on a handful of numbers.
MAX_CONTENT = 256


class Value:
    """One tensor (or opaque object) of a graph.

    name:     for people.
    type:     TensorType or OpaqueType.
    producer: the node that computes it; None for a graph input or a constant.
    index:    which output of the producer.
    data:     the array, exactly when the value is a constant with known numbers.
    content:  small integer, float or bool arrays whose elements are known as dimensions (shape arithmetic), else None.
              A value with content but neither producer nor data is a *symbolic constant*.
    uses:     (node, input position) pairs, kept by Graph.
    """

    __slots__ = ("content", "data", "index", "name", "producer", "type", "uses")

    def __init__(self, name: str, type: Type, producer: Node | None = None, index: int = 0,
                 data: np.ndarray[Any, Any] | None = None, content: Content | None = None) -> None:  # fmt: skip
        self.name, self.type, self.producer, self.index = name, type, producer, index
        self.data, self.content = data, content
        self.uses: list[tuple[Node, int]] = []

    @property
    def is_constant(self) -> bool:
        """True for constants, numeric or symbolic."""
        return self.data is not None or (self.content is not None and self.producer is None)

    @property
    def tensor(self) -> TensorType:
        """The type of a value that must be a tensor. Raises ShapeError for sequences, optionals and maps."""
        if not isinstance(self.type, TensorType):
            raise ShapeError(f"value {self.name!r} must be a tensor, it is {self.type}")
        return self.type

    @property
    def shape(self) -> tuple[Dim, ...]:
        return self.tensor.dims

    def consumers(self) -> list[Node]:
        """Distinct nodes that read this value."""
        return list(dict.fromkeys(node for node, _ in self.uses))

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


class Node:
    """One application of an op; `origin` are the names of the ONNX nodes it comes from."""

    __slots__ = ("attrs", "inputs", "op", "origin", "outputs", "symbols")

    def __init__(self, op: OpDef, inputs: Sequence[Value | None], attrs: Mapping[str, Any],
                 origin: tuple[str, ...] = ()) -> None:  # fmt: skip
        self.op, self.inputs, self.attrs, self.origin = op, tuple(inputs), dict(attrs), origin
        self.outputs: tuple[Value, ...] = ()
        self.symbols: tuple[str, ...] = ()  # fresh symbols its inference made, in order

    @property
    def output(self) -> Value:
        """The first output."""
        return self.outputs[0]

    def describe(self) -> str:
        """For messages: op, origin and input types."""
        types = ", ".join("-" if v is None else str(v.type) for v in self.inputs)
        name = f" node '{', '.join(self.origin)}'" if self.origin else ""
        return f"{self.op}{name} ({types})"

    def __repr__(self) -> str:
        outs = ", ".join(f"%{v.name}" for v in self.outputs)
        ins = ", ".join("-" if v is None else f"%{v.name}" for v in self.inputs)
        return f"{outs} = {self.op}({ins})"


class Graph:
    """Inputs, outputs and nodes in a topological order (after `tidy`).

    The counter for value and symbol names is shared with sub-graphs made through `subgraph`.
    """

    def __init__(self, name: str = "graph", counter: Iterator[int] | None = None) -> None:
        self.name = name
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.nodes: list[Node] = []
        self.counter: Iterator[int] = counter if counter is not None else count()

    def subgraph(self, name: str) -> Graph:
        """An empty graph for a body; its fresh symbols never clash with this graph's."""
        return Graph(name, self.counter)

    def input(self, name: str, type: Type) -> Value:
        """A new graph input."""
        value = Value(name, type)
        self.inputs.append(value)
        return value

    def constant(self, data: np.ndarray[Any, Any] | Sequence[Any] | float, name: str = "") -> Value:
        """A constant value; plain Python integers become int64, floats float32."""
        array = np.asarray(data)
        if not isinstance(data, np.ndarray | np.generic) and array.dtype == np.float64:
            array = array.astype(np.float32)
        type_ = TensorType(dtype_of(array.dtype), array.shape)
        return Value(name or f"c{next(self.counter)}", type_, data=array, content=content_of(array))

    def symbolic_constant(self, content: Content | Sequence[Dim], type: TensorType | None = None, name: str = "") -> Value:
        """A constant whose elements are dimensions (int64 unless a type is given)."""
        array = object_array(content)
        if all(isinstance(v, int) for v in array.flat) and (type is None or type.dtype == i64):
            return self.constant(np.array(array.tolist(), dtype=np.int64).reshape(array.shape), name)
        type_ = type or TensorType(i64, array.shape)
        return Value(name or f"s{next(self.counter)}", type_, content=array)

    def add(self, op: OpDef | str, inputs: Sequence[Value | None] = (), attrs: Mapping[str, Any] | None = None,
            *, origin: tuple[str, ...] = (), outputs: int = 1, names: Sequence[str] = (), domain: str = "") -> Node:  # fmt: skip
        """Append a node: attributes are checked, types inferred, contents propagated.

        Raises ShapeError (types do not fit) or InvalidModelError (unknown or missing attribute), both naming the node.
        """
        op = get_op(op, domain) if isinstance(op, str) else op
        node = Node(op, inputs, _complete_attrs(op, attrs or {}, origin), origin)
        types, contents = infer(node, self, outputs)
        node.outputs = tuple(
            Value(names[i] if i < len(names) and names[i] else f"t{next(self.counter)}", type_, node, i, content=contents[i])
            for i, type_ in enumerate(types[:outputs])
        )
        for position, value in enumerate(node.inputs):
            if value is not None:
                value.uses.append((node, position))
        self.nodes.append(node)
        return node

    def replace(self, old: Value, new: Value) -> None:
        """Make every use of `old` (graph outputs too) read `new`; a graph output keeps its name."""
        if old is new:
            return
        for node, position in old.uses:
            inputs = list(node.inputs)
            inputs[position] = new
            node.inputs = tuple(inputs)
            new.uses.append((node, position))
        old.uses.clear()
        if old in self.outputs:
            if new.producer is not None and new not in self.outputs:
                old.name, new.name = new.name, old.name
            self.outputs = [new if v is old else v for v in self.outputs]

    def set_input(self, node: Node, position: int, new: Value | None) -> None:
        """Make one input of one node read another value."""
        old = node.inputs[position]
        if old is not None:
            old.uses.remove((node, position))
        if new is not None:
            new.uses.append((node, position))
        inputs = list(node.inputs)
        inputs[position] = new
        node.inputs = tuple(inputs)

    def refresh(self, node: Node) -> None:
        """Infer a node's types again after its inputs changed, keeping its fresh symbols."""
        types, contents = infer(node, self, len(node.outputs))
        for value, type_, content in zip(node.outputs, types, contents):
            value.type, value.content = type_, content

    def tidy(self) -> int:
        """Remove dead nodes, restore a stable topological order, make names unique; returns nodes removed.

        Raises InvalidModelError when the graph has a cycle.
        """
        before = len(self.nodes)
        alive = _alive(self.outputs)
        for node in self.nodes:
            if node not in alive:
                for position, value in enumerate(node.inputs):
                    if value is not None:
                        value.uses.remove((node, position))
                node.inputs = (None,) * len(node.inputs)  # so that weights need not wait for the garbage collector
        self.nodes = _topological([node for node in self.nodes if node in alive])
        self._unique_names()
        return before - len(self.nodes)

    def _unique_names(self) -> None:
        taken = {value.name for value in self.inputs}
        for node in self.nodes:
            for value in node.outputs:
                if value.name in taken:
                    value.name = f"{value.name}_{next(self.counter)}"
                taken.add(value.name)

    def copy(self) -> Graph:
        """A deep copy that shares constant arrays (and symbol names)."""
        other = Graph(self.name, self.counter)
        mapping: dict[Value, Value] = {}
        for value in self.inputs:
            mapping[value] = other.input(value.name, value.type)
            mapping[value].content = value.content

        def mapped(value: Value | None) -> Value | None:
            if value is None:
                return None
            if value not in mapping:
                mapping[value] = Value(value.name, value.type, data=value.data, content=value.content)
            return mapping[value]

        for node in self.nodes:
            attrs = {k: v.copy() if isinstance(v, Graph) else v for k, v in node.attrs.items()}
            new = Node(node.op, [mapped(v) for v in node.inputs], attrs, node.origin)
            new.symbols = node.symbols
            new.outputs = tuple(Value(v.name, v.type, new, v.index, v.data, v.content) for v in node.outputs)
            mapping.update(zip(node.outputs, new.outputs))
            for position, operand in enumerate(new.inputs):
                if operand is not None:
                    operand.uses.append((new, position))
            other.nodes.append(new)
        other.outputs = [v for v in map(mapped, self.outputs) if v is not None]
        return other

    def constants(self) -> list[Value]:
        """Distinct constants read by nodes or returned, in order of first use."""
        read = [v for node in self.nodes for v in node.inputs if v is not None] + self.outputs
        return list(dict.fromkeys(v for v in read if v.is_constant))


class Builder:
    """Adds nodes to a graph on behalf of one origin: `b.op("Mul", x, y)` returns the output value."""

    def __init__(self, graph: Graph, origin: tuple[str, ...] = ()) -> None:
        self.graph, self.origin = graph, origin

    def op(self, name: str, *inputs: Value | None, domain: str = "", **attrs: Any) -> Value:
        """Add a node with one output."""
        return self.graph.add(name, inputs, attrs, origin=self.origin, domain=domain).output

    def ops(self, name: str, *inputs: Value | None, outputs: int, domain: str = "", **attrs: Any) -> tuple[Value, ...]:
        """Add a node with several outputs."""
        return self.graph.add(name, inputs, attrs, origin=self.origin, outputs=outputs, domain=domain).outputs

    def constant(self, data: Any) -> Value:
        return self.graph.constant(data)

    def shape(self, dims: Sequence[Dim]) -> Value:
        """An int64 vector of dimensions as a (symbolic) constant."""
        return self.graph.symbolic_constant(object_array(list(dims)))

    def scalar(self, value: float, like: Value) -> Value:
        """A rank-0 constant of the element type of `like`."""
        return self.graph.constant(np.asarray(value, dtype=like.tensor.dtype.numpy))


def symbols_in(values: Iterable[Value]) -> set[str]:
    """Names of the symbols in types and contents."""
    found: set[str] = set()
    for value in values:
        shape = value.type.shape if isinstance(value.type, TensorType) else None
        content = value.content.ravel().tolist() if value.content is not None else ()
        found |= {name for dim in (*(shape or ()), *content) if isinstance(dim, SymbolicDim) for name in symbols_of(dim)}
    return found


def object_array(items: Any) -> Content:
    """An object array of dimensions from a (nested) sequence or array, keeping its shape."""
    if isinstance(items, np.ndarray):
        return items if items.dtype == object else items.astype(object)
    out = np.empty(len(items), dtype=object)
    out[:] = items
    return out


def content_of(array: np.ndarray[Any, Any]) -> Content | None:
    """The content of a constant: plain Python numbers, when small and numeric."""
    if array.size > MAX_CONTENT or array.dtype.kind not in "iufb" or array.dtype.name not in _PLAIN:
        return None
    out = np.empty(array.shape, dtype=object)
    out[...] = array
    if array.dtype.kind in "iu":
        flat = out.reshape(-1)
        for i, v in enumerate(flat):
            flat[i] = int(v)
    return out


_TRIED_RANKS = (2, 1, 3, 4, 5, 0)
_PLAIN = frozenset(("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64", "bool"))


def infer(node: Node, graph: Graph, outputs: int) -> tuple[list[Type], list[Content | None]]:
    """Types and contents of a node's outputs; fresh symbols of an earlier inference are used again in order."""
    recorded = iter(node.symbols)
    made: list[str] = []

    def new_symbol(hint: str) -> SymbolicDim:
        name = next(recorded, None) or f"{hint}_{next(graph.counter)}"
        made.append(name)
        return symbol(name)

    inference = Inference(node.op, node.inputs, node.attrs, outputs, new_symbol, node.describe())
    try:
        types = list(node.op.infer(inference))
    except UnknownRank:
        types = _without_ranks(inference, outputs)
    except MiniccError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InvalidModelError(
            f"{node.op.name}: inputs or attributes do not fit the operator ({error})", where=node.describe()
        ) from error
    if len(types) < outputs:
        raise inference.error(f"has {len(types)} outputs, {outputs} are used")
    contents: list[Content | None] = [None] * len(types)
    if node.op.propagate is not None:
        found = list(node.op.propagate(inference))
        contents[: len(found)] = [c if c is None or c.size <= MAX_CONTENT else None for c in found]
    node.symbols = tuple(made)
    return types, contents


def _without_ranks(inference: Inference, outputs: int) -> list[Type]:
    """Types of unknown rank, with the element types that the op would give for inputs of some rank."""
    dim = symbol("any")
    for rank in _TRIED_RANKS if inference.op.kind is not Kind.CONTROL else ():
        inputs = [
            Value(v.name, v.type.with_shape((dim,) * rank)) if v is not None and isinstance(v.type, TensorType)
            and v.type.shape is None else v for v in inference.inputs
        ]  # fmt: skip
        tried = replace(inference, inputs=tuple(inputs), new_symbol=lambda _: dim)
        try:
            types = list(inference.op.infer(tried))
        except (MiniccError, UnknownRank, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError):
            continue
        return [t.with_shape(None) if isinstance(t, TensorType) else t for t in types]
    known = [v.type for v in inference.inputs if v is not None and isinstance(v.type, TensorType)]
    return [TensorType(known[0].dtype, None)] * outputs


def _complete_attrs(op: OpDef, given: Mapping[str, Any], origin: tuple[str, ...]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(op.attrs))
    where = f"{op} node '{', '.join(origin)}'"
    if unknown:
        raise InvalidModelError(f"{op.name} has no attribute {', '.join(unknown)}", where=where,
                                hint=f"known: {', '.join(sorted(op.attrs)) or 'none'}")  # fmt: skip
    missing = sorted(name for name, default in op.attrs.items() if default is REQUIRED and name not in given)
    if missing:
        raise InvalidModelError(f"{op.name} needs attribute {', '.join(missing)}", where=where)
    return {**op.attrs, **given}


def _alive(outputs: Iterable[Value]) -> set[Node]:
    alive: set[Node] = set()
    stack = [v.producer for v in outputs if v.producer is not None]
    while stack:
        node = stack.pop()
        if node not in alive:
            alive.add(node)
            stack.extend(v.producer for v in node.inputs if v is not None and v.producer is not None)
    return alive


def _topological(nodes: list[Node]) -> list[Node]:
    """Stable order: each node as early as its inputs allow, else as given. Raises InvalidModelError on a cycle."""
    ordered: list[Node] = []
    state: dict[Node, int] = {}  # 1 while its inputs are being placed, 2 when placed
    members = set(nodes)
    for root in nodes:
        stack = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if ready:
                if state.get(node) != 2:
                    state[node] = 2
                    ordered.append(node)
                continue
            if state.get(node) == 2:
                continue
            if state.get(node) == 1:
                raise InvalidModelError("the graph has a cycle", where=node.describe())
            state[node] = 1
            stack.append((node, True))
            producers = [v.producer for v in node.inputs if v is not None and v.producer is not None]
            stack.extend((p, False) for p in reversed(producers) if p in members and state.get(p) != 2)
    return ordered
