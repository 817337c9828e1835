"""Numpy execution of a graph with each op's `eval`: constant folding, the oracle of the tests, and the host
tier.

Nodes run in the graph's order and arrays are dropped after their last use. Symbols are bound from the
shapes of inputs and of computed values, so that symbolic constants have numbers. Nothing here is fast, and
nothing here compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minicc.errors import InputError, MiniccError, ResourceLimitError, ShapeError, VerifyError
from minicc.ir.dims import Dim, SymbolicDim
from minicc.ir.dims import evaluate as evaluate_dim
from minicc.ir.graph import Graph, Node, Value, content_of
from minicc.ir.opdef import Inference, Kind
from minicc.ir.types import TensorType, dtype_of

# numpy arrays, or Python lists, dictionaries and None for sequences, maps and empty optionals
Item = Any
Observer = Callable[[Node, Sequence[Item]], None]

DEFAULT_MAX_BYTES = 16 << 30
DEFAULT_MAX_LOOP_ITERATIONS = 10_000_000


def evaluate(
    graph: Graph,
    feeds: Mapping[str, Item] | Sequence[Item],
    *,
    sizes: Mapping[str, int] | None = None,
    observe: Observer | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    max_loop_iterations: int = DEFAULT_MAX_LOOP_ITERATIONS,
) -> list[Item]:
    """The graph's outputs for the given inputs (by name or in order).

    sizes are symbols known beforehand (those of an enclosing graph); observe(node, outputs) sees every
    node's outputs, also inside bodies. Raises InputError (feeds do not fit), ShapeError (a node cannot be
    computed), ResourceLimitError.
    """
    arrays = _ordered_feeds(graph, feeds)
    run = Evaluation(dict(sizes or {}), observe, max_bytes, max_loop_iterations)
    with np.errstate(all="ignore"):
        return run(graph, arrays)


def evaluate_node(
    node: Node,
    arrays: Sequence[Item],
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    max_loop_iterations: int = DEFAULT_MAX_LOOP_ITERATIONS,
    sizes: Mapping[str, int] | None = None,
) -> tuple[Item, ...]:
    """The outputs of one node for the given inputs; left-out inputs are None. Raises as `evaluate`."""
    run = Evaluation(dict(sizes or {}), None, max_bytes, max_loop_iterations)
    with np.errstate(all="ignore"):
        return run.node(node, arrays)


@dataclass(frozen=True)
class Evaluation:
    """One run: `run(graph, arrays)` gives a graph's outputs. Control-flow ops get it to run their bodies."""

    sizes: dict[str, int]
    observe: Observer | None
    max_bytes: int
    max_loop_iterations: int
    last_uses: dict[Graph, dict[int, list[Value]]] = field(default_factory=dict)

    def __call__(self, graph: Graph, arrays: Sequence[Item]) -> list[Item]:
        inner = Evaluation(
            dict(self.sizes), self.observe, self.max_bytes, self.max_loop_iterations, self.last_uses
        )
        return inner._run(graph, arrays)

    def _run(self, graph: Graph, arrays: Sequence[Item]) -> list[Item]:
        if len(arrays) != len(graph.inputs):
            raise InputError(f"graph {graph.name!r} has {len(graph.inputs)} inputs, got {len(arrays)}")
        known: dict[Value, Item] = dict(zip(graph.inputs, arrays))
        for value, array in known.items():
            bind(value, array, self.sizes)
        dead_after = self.last_uses.get(graph)
        if dead_after is None:
            dead_after = self.last_uses[graph] = _last_uses(graph)
        for position, node in enumerate(graph.nodes):
            outputs = self.node(node, [None if v is None else self._array(v, known) for v in node.inputs])
            for value, array in zip(node.outputs, outputs):
                known[value] = array
                bind(value, array, self.sizes)
            if self.observe is not None:
                self.observe(node, outputs)
            for value in dead_after.get(position, ()):
                known.pop(value, None)
        return [self._array(v, known) for v in graph.outputs]

    def _array(self, value: Value, known: dict[Value, Item]) -> Item:
        if value.data is not None:
            return value.data
        if value in known:
            return known[value]
        if value.producer is None and value.content is not None:
            known[value] = materialise(value, self.sizes, self.max_bytes)
            return known[value]
        raise VerifyError(f"value {value.name!r} is read before it is computed")

    def node(self, node: Node, arrays: Sequence[Item]) -> tuple[Item, ...]:
        """The outputs of one node. Raises ShapeError or ResourceLimitError naming it."""
        op = node.op
        self._check_bytes(node, arrays)
        try:
            if op.kind is Kind.CONTROL and op.eval is not None:
                result = op.eval(self, *arrays, **node.attrs)
            elif op.eval is not None:
                result = op.eval(*arrays, **node.attrs)
            elif isinstance(node.attrs.get("body"), Graph):
                result = tuple(self(node.attrs["body"], list(arrays)))
            else:
                raise VerifyError(f"{op} cannot be evaluated", where=node.describe())
        except MiniccError:
            raise
        except MemoryError as error:
            raise ResourceLimitError(
                "not enough memory to compute a node", where=node.describe(), why=str(error)
            ) from error
        except Exception as error:
            raise ShapeError(
                f"{op.name} failed: {type(error).__name__}: {error}",
                where=node.describe(),
                why=f"inputs ({', '.join(map(_describe, arrays))})",
            ) from error
        outputs = result if isinstance(result, tuple) else (result,)
        if len(outputs) < len(node.outputs):
            raise VerifyError(
                f"{op} gave {len(outputs)} outputs, {len(node.outputs)} are used", where=node.describe()
            )
        return tuple(_normalised(item, value, node) for item, value in zip(outputs, node.outputs))

    def _check_bytes(self, node: Node, arrays: Sequence[Item]) -> None:
        """Refuse outputs above `max_bytes` before anything is allocated."""
        for value in node.outputs:
            if not isinstance(value.type, TensorType) or value.type.shape is None:
                continue
            shape: Sequence[Dim] = value.type.shape
            try:
                size = _size(shape, self.sizes)
            except KeyError:
                if not node.op.static_inputs:
                    continue  # sizes found by looking at data, bounded by the inputs
                size = _inferred_size(node, value.index, arrays)
            if size * value.type.dtype.bytes > self.max_bytes:
                raise ResourceLimitError(
                    f"output {value.name!r} would take {size * value.type.dtype.bytes} bytes",
                    where=node.describe(),
                    why=f"the limit is max_bytes={self.max_bytes}",
                    hint="raise max_bytes",
                )


def materialise(
    value: Value, sizes: Mapping[str, int], max_bytes: int = DEFAULT_MAX_BYTES
) -> np.ndarray[Any, Any]:
    """The array of a constant, numeric or symbolic, for given symbol sizes. Raises ShapeError for an
    unbound symbol.
    """
    if value.data is not None:
        return value.data
    assert value.content is not None
    try:
        numbers = [evaluate_dim(v, sizes) if isinstance(v, SymbolicDim) else v for v in value.content.flat]
    except KeyError as error:
        raise ShapeError(f"the size {error.args[0]!r} is not known when {value.name!r} is needed") from None
    if len(numbers) * 8 > max_bytes:
        raise ResourceLimitError(f"constant {value.name!r} has {len(numbers)} elements")
    return np.array(numbers, dtype=value.tensor.dtype.numpy).reshape(value.content.shape)


def bind(value: Value, array: Item, sizes: dict[str, int]) -> None:
    """Give the plain symbols of a value's shape the sizes of its array; symbols already known stay."""
    if (
        not isinstance(value.type, TensorType)
        or value.type.shape is None
        or not isinstance(array, np.ndarray)
    ):
        return
    if array.ndim != len(value.type.shape):
        raise ShapeError(f"value {value.name!r} has shape {array.shape}, expected {value.type}")
    for dim, size in zip(value.type.shape, array.shape):
        if isinstance(dim, SymbolicDim) and len(dim.terms) == 1:
            monomial, coefficient = dim.terms[0]
            if coefficient == 1 and len(monomial) == 1 and monomial[0].op == "symbol":
                sizes.setdefault(str(monomial[0].args[0]), size)


def _ordered_feeds(graph: Graph, feeds: Mapping[str, Item] | Sequence[Item]) -> list[Item]:
    names = [v.name for v in graph.inputs]
    if isinstance(feeds, Mapping):
        missing = [n for n in names if n not in feeds]
        unknown = [n for n in feeds if n not in names]
        if missing or unknown:
            raise InputError(
                "inputs do not fit the graph",
                why="; ".join(
                    f"{what} {', '.join(map(repr, which))}"
                    for what, which in (("missing", missing), ("unknown", unknown))
                    if which
                ),
                hint=f"the inputs are {', '.join(map(repr, names)) or 'none'}",
            )
        items = [feeds[n] for n in names]
    else:
        items = list(feeds)
    out: list[Item] = []
    for value, item in zip(graph.inputs, items):
        if isinstance(value.type, TensorType):
            array = np.asarray(item)
            if dtype_of(array.dtype) != value.type.dtype:
                raise InputError(f"input {value.name!r} has type {array.dtype}, expected {value.type}")
            shape = value.type.shape
            fits = shape is None or (
                len(shape) == array.ndim
                and all(d == n for d, n in zip(shape, array.shape) if isinstance(d, int))
            )
            if not fits:
                raise InputError(f"input {value.name!r} has shape {array.shape}, expected {value.type}")
            out.append(array)
        else:
            out.append(item)
    return out + items[len(out) :]


def _last_uses(graph: Graph) -> dict[int, list[Value]]:
    """For each node position, the values nobody reads after it."""
    last: dict[Value, int] = {}
    for position, node in enumerate(graph.nodes):
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.data is None:
                last[value] = position
    for value in graph.outputs:
        last.pop(value, None)
    dead: dict[int, list[Value]] = {}
    for value, position in last.items():
        dead.setdefault(position, []).append(value)
    return dead


def _size(shape: Sequence[Dim], sizes: Mapping[str, int]) -> int:
    total = 1
    for dim in shape:
        total *= max(evaluate_dim(dim, sizes), 0)
    return total


def _inferred_size(node: Node, index: int, arrays: Sequence[Item]) -> int:
    """Elements of an output, by inference again with the numbers at hand; 0 when that does not tell."""
    values: list[Value | None] = []
    for original, array in zip(node.inputs, arrays):
        if isinstance(array, np.ndarray):
            type_ = TensorType(dtype_of(array.dtype), array.shape)
            values.append(Value("x", type_, data=array, content=content_of(array)))
        else:
            values.append(original)
    unknown = SymbolicDim(())  # any size: bounded by the op's own evaluation
    inference = Inference(
        node.op, tuple(values), node.attrs, len(node.outputs), lambda _: unknown, node.describe()
    )
    try:
        found = list(node.op.infer(inference))[index]
        return _size(found.shape or (), {}) if isinstance(found, TensorType) else 0
    except Exception:  # the evaluation itself raises the proper error
        return 0


def _normalised(item: Item, value: Value, node: Node) -> Item:
    if not isinstance(value.type, TensorType) or item is None:
        return item
    array = item if isinstance(item, np.ndarray) else np.asarray(item)
    if array.dtype.kind in "UST":
        array = array.astype(object)
    if array.dtype != value.type.dtype.numpy:
        raise VerifyError(
            f"{node.op} gave {array.dtype}, its inferred type is {value.type}", where=node.describe()
        )
    shape = value.type.shape
    if shape is not None and len(shape) != array.ndim:
        raise VerifyError(
            f"{node.op} gave shape {array.shape}, its inferred type is {value.type}", where=node.describe()
        )
    return array


def _describe(item: Item) -> str:
    if isinstance(item, np.ndarray):
        return f"{item.dtype}{list(item.shape)}"
    return "-" if item is None else type(item).__name__
