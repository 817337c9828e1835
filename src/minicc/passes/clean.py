"""Cleaning: nodes nobody reads disappear, and equal nodes are computed once."""

from __future__ import annotations

from collections.abc import Hashable

from minicc.ir.graph import Graph, Value
from minicc.ir.opdef import Kind
from minicc.passes.common import frozen, visit_bodies
from minicc.passes.manager import PassContext

MAX_COMPARED_BYTES = 64 << 10  # larger constants are equal only when they are the same array


def dead_code(graph: Graph, context: PassContext) -> int:
    """Remove nodes whose results are not used, also in bodies."""
    return graph.tidy() + visit_bodies(graph, lambda body: dead_code(body, context))


def common_subexpressions(graph: Graph, context: PassContext) -> int:
    """Compute equal nodes (same op, inputs and attributes) once; equal constants are one value.

    Random ops are never merged, nor nodes with bodies. The output of a graph keeps its own node.
    """
    graph.tidy()
    changes = 0
    constants: dict[Hashable, Value] = {}
    for value in graph.constants():
        first = constants.setdefault(_constant_key(value), value)
        if first is not value and value not in graph.outputs:
            graph.replace(value, first)
            changes += 1
    nodes: dict[Hashable, tuple[Value, ...]] = {}
    for node in graph.nodes:
        if not node.op.deterministic or node.op.kind is Kind.CONTROL or node.symbols:
            continue
        attrs = tuple((name, frozen(value)) for name, value in sorted(node.attrs.items()))
        key = (node.op.domain, node.op.name, tuple(map(id, node.inputs)), attrs, len(node.outputs))
        first_outputs = nodes.setdefault(key, node.outputs)
        if first_outputs is node.outputs or any(v in graph.outputs for v in node.outputs):
            continue
        for old, new in zip(node.outputs, first_outputs):
            graph.replace(old, new)
        origin = first_outputs[0].producer
        if origin is not None:
            origin.origin = tuple(dict.fromkeys((*origin.origin, *node.origin)))
        changes += 1
    graph.tidy()
    return changes + visit_bodies(graph, lambda body: common_subexpressions(body, context))


def _constant_key(value: Value) -> Hashable:
    if value.data is not None:
        small = value.data.nbytes <= MAX_COMPARED_BYTES and value.data.dtype.kind != "O"
        return (value.type, value.data.tobytes() if small else id(value.data))
    assert value.content is not None
    return (value.type, tuple(map(str, value.content.flat)))
