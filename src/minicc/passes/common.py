"""What several passes share: visiting bodies, replacing with new types, inlining a body, constants, quantised values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicc.errors import MiniccError, VerifyError
from minicc.ir.dims import Dim, SymbolicDim, bare_symbol, substitute
from minicc.ir.graph import Graph, Node, Value, object_array
from minicc.ir.opdef import Kind
from minicc.ir.types import TensorType, Type, f32, i8, u8
from minicc.ops.failure import failing_branch

# One family: their results hold the same elements in the same order.
RESHAPES = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten"))
EIGHT_BITS = (i8, u8)
LARGEST_EXACT = 2**24  # integers up to this are exact in float32


def visit_bodies(graph: Graph, visit: Callable[[Graph], int]) -> int:
    """The sum of `visit(body)` over all bodies. A branch of an If in which it meets types that do not fit can never be taken.

    Such a branch becomes an error that is raised if it is taken after all. Raises the error when the body is not a branch.
    """
    return sum(visit_bodies_of(node, visit) for node in graph.nodes if node.op.name != "Fused")


def visit_bodies_of(node: Node, visit: Callable[[Graph], int]) -> int:
    """As `visit_bodies`, for one node."""
    changes = 0
    for name, body in node.attrs.items():
        if not isinstance(body, Graph):
            continue
        try:
            changes += visit(body)
        except VerifyError:
            raise
        except MiniccError as error:
            if node.op.name != "If" or node.op.domain:
                raise
            node.attrs[name] = failing_branch(body, body.outputs, error.what)
            changes += 1
    return changes


def has_control(graph: Graph) -> bool:
    """Whether some node runs a sub-graph, whose input types would not follow a change of types outside."""
    return any(node.op.kind is Kind.CONTROL for node in graph.nodes)


def replacement(graph: Graph, old: Value, new: Value, origin: tuple[str, ...]) -> Value:
    """What may take the place of `old`: `new`, or a copy, as a graph output stays a value of its own, computed by a node."""
    if old not in graph.outputs or (new.producer is not None and new not in graph.outputs):
        return new
    return graph.add("Identity", [new], origin=origin).output


def replace(graph: Graph, old: Value, new: Value, changed: set[Value]) -> None:
    """Replace a value; when the type differs or the content is new, `new` is added to `changed` for `refresh_types`."""
    if old.type != new.type or (old.content is None and new.content is not None):
        changed.add(new)
    graph.replace(old, new)


def refresh(graph: Graph, node: Node) -> set[Value]:
    """Infer a node again whose bodies changed; its outputs whose types differ then, for `refresh_types`."""
    before = [v.type for v in node.outputs]
    graph.refresh(node)
    return {v for v, old in zip(node.outputs, before) if v.type != old}


def refresh_types(graph: Graph, changed: set[Value]) -> None:
    """Infer again everything downstream of values that replaced values of another type."""
    if not changed:
        return
    graph.tidy()
    for node in graph.nodes:
        if any(v in changed for v in node.inputs if v is not None):
            before = [(v.type, v.content is None) for v in node.outputs]
            symbols = node.symbols
            graph.refresh(node)
            if symbols != node.symbols:
                changed |= settle_sizes(graph, symbols, [t for t, _ in before], [v.type for v in node.outputs])
            changed.update(v for v, old in zip(node.outputs, before) if (v.type, v.content is None) != old)


def inline(
    graph: Graph, body: Graph, arguments: Sequence[Value | None], origin: tuple[str, ...]
) -> list[Value]:
    """Add the nodes of a body to a graph, its inputs being `arguments`; returns the values of its outputs."""
    mapping: dict[Value, Value | None] = dict(zip(body.inputs, arguments))
    mapped = add_copies(graph, body.nodes, mapping, origin)
    return [v for v in map(mapped, body.outputs) if v is not None]


def add_copies(
    graph: Graph, nodes: Sequence[Node], mapping: dict[Value, Value | None], origin: tuple[str, ...] = ()
) -> Callable[[Value | None], Value | None]:
    """Add copies of nodes to a graph, inferred anew; values in `mapping` have others in their place.

    Returns the function from old to new values; one without a producer and not in `mapping` is a constant. Symbols that
    an original made are its own, so constants and bodies get the copy's sizes for them.
    """
    sizes: dict[str, Dim] = {}

    def mapped(value: Value | None) -> Value | None:
        if value is None:
            return None
        if value not in mapping:
            new = mapping[value] = Value(value.name, value.type, data=value.data, content=value.content)
            _substitute(new, sizes)
        return mapping[value]

    for node in nodes:
        merged = tuple(dict.fromkeys((*node.origin, *origin)))
        attrs = {name: a.copy() if isinstance(a, Graph) else a for name, a in node.attrs.items()}
        for body in attrs.values():
            if isinstance(body, Graph) and sizes:
                _substitute_sizes(body, sizes)
        new = graph.add(node.op, [mapped(v) for v in node.inputs], attrs, origin=merged,
                        outputs=len(node.outputs), names=[v.name for v in node.outputs])  # fmt: skip
        mapping.update(zip(node.outputs, new.outputs))
        sizes |= _learned(node.symbols, [v.type for v in node.outputs], [v.type for v in new.outputs])
    return mapped


def plain_symbols(values: Iterable[Value]) -> set[str]:
    """Names of the symbols that stand alone as a size of some value's shape: those a caller's arrays bind."""
    tensors = (v.type for v in values if isinstance(v.type, TensorType))
    return {name for type_ in tensors for d in type_.shape or () if (name := bare_symbol(d)) is not None}


def settle_sizes(graph: Graph, symbols: Sequence[str], before: Sequence[Type], after: Sequence[Type]) -> set[Value]:
    """Types of a node's outputs came to say more: what was one of its `symbols` in the old shapes becomes the new size.

    Symbolic constants and bodies keep what they once took from a shape, so the symbol is replaced in every type and
    content. Returns the graph's own values that differ then, for `refresh_types`.
    """
    sizes = _learned(symbols, before, after)
    return _substitute_sizes(graph, sizes) if sizes else set()


def _learned(symbols: Sequence[str], before: Sequence[Type], after: Sequence[Type]) -> dict[str, Dim]:
    """What new types say about symbols that stood alone in the old ones."""
    sizes: dict[str, Dim] = {}
    for old, new in zip(before, after):
        if isinstance(old, TensorType) and isinstance(new, TensorType):
            for a, b in zip(old.shape or (), new.shape or ()):
                name = bare_symbol(a)
                if name in symbols and a != b:
                    sizes[str(name)] = b
    return sizes


def _substitute_sizes(graph: Graph, sizes: Mapping[str, Dim]) -> set[Value]:
    """Put sizes in the place of symbols, bodies included; returns the graph's own values that changed."""
    values = dict.fromkeys((*graph.inputs, *graph.outputs))
    for node in graph.nodes:
        values.update(dict.fromkeys(v for v in (*node.inputs, *node.outputs) if v is not None))
        for body in node.attrs.values():
            if isinstance(body, Graph):
                _substitute_sizes(body, sizes)
    return {value for value in values if _substitute(value, sizes)}


def _substitute(value: Value, sizes: Mapping[str, Dim]) -> bool:
    """Put sizes in the place of symbols in a value's type and content; whether there were any."""
    changed = False
    if isinstance(value.type, TensorType) and value.type.shape is not None:
        shape = tuple(substitute(d, sizes) for d in value.type.shape)
        changed = shape != value.type.shape
        value.type = TensorType(value.type.dtype, shape)
    if value.content is not None and any(isinstance(d, SymbolicDim) for d in value.content.flat):
        dims = [substitute(d, sizes) if isinstance(d, SymbolicDim) else d for d in value.content.flat]
        if dims != list(value.content.flat):
            value.content = object_array(dims).reshape(value.content.shape)
            changed = True
    return changed


def estimate(dims: Iterable[Dim], unknown: int = 16) -> int:
    """A rough number of elements: symbolic sizes count as `unknown`."""
    total = 1
    for d in dims:
        total *= d if isinstance(d, int) else unknown
    return total


def has_shape(value: Value | None) -> bool:
    """Whether a value is a tensor of known rank."""
    return value is not None and isinstance(value.type, TensorType) and value.type.shape is not None


def integers(value: Value | None) -> list[int] | None:
    """The known integers of a value, flattened; None when it is absent, unknown or symbolic."""
    if value is None or value.content is None or not all(isinstance(v, int) for v in value.content.flat):
        return None
    return [int(v) for v in value.content.flat]


def axes_of(node: Node, position: int, rank: int) -> list[int] | None:
    """The axes given by a constant input, non-negative; None when they are left out or unknown."""
    found = integers(node.inputs[position]) if position < len(node.inputs) else None
    return None if found is None else [a % rank for a in found]


def scalar_of(value: Value | None) -> float | None:
    """The number in a numeric constant of one element."""
    if value is None or value.data is None or value.data.size != 1 or value.data.dtype.kind not in "fiub":
        return None
    return float(value.data.reshape(())[()])


def is_uniform(value: Value | None, number: float) -> bool:
    """Whether a constant holds one number everywhere (any shape, not empty)."""
    if value is None or value.data is None or value.data.size == 0 or value.data.size > 1 << 20:
        return False
    dtype = value.data.dtype  # infinity has no integer, so integers are compared as they are
    return bool(np.all(value.data == (number if dtype.kind in "iub" else np.asarray(number).astype(dtype))))


def nbytes(value: Value) -> int | None:
    """Bytes of a tensor of static shape, else None."""
    if not isinstance(value.type, TensorType) or value.type.shape is None:
        return None
    total = value.type.dtype.bytes
    for d in value.type.shape:
        if not isinstance(d, int):
            return None
        total *= d
    return total


_PLAIN = {int, float, str, bool}


def frozen(attribute: Any) -> Any:
    """An attribute as a hashable key; graphs and arrays are compared by identity."""
    if isinstance(attribute, list | tuple):
        kinds = set(map(type, attribute))
        if len(kinds) == 1 and kinds <= _PLAIN:  # at once: trees have millions of them
            return (kinds.pop().__name__, tuple(attribute))
        return tuple(map(frozen, attribute))
    if isinstance(attribute, Graph | np.ndarray | dict):
        return id(attribute)
    return (type(attribute).__name__, attribute)


# -- quantised values


@dataclass(frozen=True)
class Dequantised:
    """An 8-bit value, its scale and its zero point, as a DequantizeLinear has them; `axis` for several scales."""

    value: Value
    scale: Value
    zero: Value | None
    axis: int | None


def dequantised(value: Value | None) -> Dequantised | None:
    """The DequantizeLinear of an 8-bit tensor to float32 that makes a value."""
    node = value.producer if value is not None else None
    if node is None or node.op.name != "DequantizeLinear":
        return None
    if not isinstance(node.output.type, TensorType) or node.output.type.dtype != f32:
        return None
    x, scale, zero = (*node.inputs, None)[:3]
    if x is None or scale is None or not isinstance(x.type, TensorType) or x.type.dtype not in EIGHT_BITS or x.type.shape is None:
        return None
    if scale.tensor.dtype != f32 or scale.type.shape is None:  # type: ignore[union-attr]
        return None
    axis = None if scale.tensor.size == 1 else node.attrs["axis"] % max(1, len(x.type.shape))
    return Dequantised(x, scale, zero, axis)
