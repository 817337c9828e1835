"""loop-values: what a Loop or Scan carries without changing it is captured; what nobody reads is neither carried nor collected.

Exporters hand weights and limits from turn to turn, though the body returns them as it got them. As captures they are read
where they lie, and constants among them are packed and folded in the body (fold-captures). Nothing moves out of a body here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from minicc.ir.graph import Graph, Node, Value, symbols_in
from minicc.passes.common import refresh_types, replace, replacement, settle_sizes, visit_bodies
from minicc.passes.manager import PassContext


class Layout(NamedTuple):
    """Where the values of a Loop or Scan are: node and body inputs are [head, carried, scanned, captures], body outputs are
    [returned, carried, collected]; the node has an output for each carried and collected value.
    """

    head: int
    carried: int
    scanned: int
    returned: int


def loop_values(graph: Graph, context: PassContext) -> int:
    """Rewrite loops that carry too much; returns how many values are no longer carried or collected."""
    changes = visit_bodies(graph, lambda body: loop_values(body, context))
    changed: set[Value] = set()
    for node in list(graph.nodes):
        layout = _layout(node)
        if layout is not None:
            changes += _rewrite(graph, node, layout, changed)
    refresh_types(graph, changed)
    return changes


def _layout(node: Node) -> Layout | None:
    if node.op.domain:
        return None
    if node.op.name == "Loop":
        return Layout(2, int(node.attrs["n_carried"]), 0, 1)
    if node.op.name == "Scan":
        return Layout(0, int(node.attrs["n_state"]), int(node.attrs["num_scan_inputs"]), 0)
    return None


def _rewrite(graph: Graph, node: Node, layout: Layout, changed: set[Value]) -> int:
    """Replace a loop by one that carries, collects and captures what is needed; returns the number of values left out."""
    body: Graph = node.attrs["body"]
    head, count, scanned, returned = layout
    needed = _needed(graph, node, body, layout)
    same = [k for k in needed if k < count and _source(body.outputs[returned + k]) is body.inputs[head + k]]
    carried = [k for k in needed if k < count and k not in same]
    collected = [k for k in needed if k >= count]
    read = _reached([*body.outputs[:returned], *(body.outputs[returned + k] for k in needed)])
    first = head + count + scanned
    captured = [i for i in range(first, len(body.inputs)) if body.inputs[i] in read]
    left_out = len(node.outputs) - len(carried) - len(collected) + len(body.inputs) - first - len(captured)
    if not left_out:
        return 0
    outputs = [node.outputs[k] for k in (*carried, *collected)]
    if outputs:
        order = [*range(head), *(head + k for k in carried), *range(head + count, first), *captured, *(head + k for k in same)]
        attrs = {**node.attrs, "n_carried" if node.op.name == "Loop" else "n_state": len(carried)}
        attrs["body"] = _cut(body, order, [*range(returned), *(returned + k for k in (*carried, *collected))])
        for name in ("scan_output_axes", "scan_output_directions"):
            if attrs.get(name):
                attrs[name] = tuple(attrs[name][k - count] for k in collected)
        new = graph.add(node.op, [node.inputs[i] for i in order], attrs, origin=node.origin, outputs=len(outputs),
                        names=[v.name for v in outputs])  # fmt: skip
        types = [v.type for v in outputs], [v.type for v in new.outputs]
        for old, value in zip(outputs, new.outputs):
            replace(graph, old, value, changed)
        changed |= settle_sizes(graph, node.symbols, *types)
    for k in same:
        initial, final = node.inputs[head + k], node.outputs[k]
        assert initial is not None
        if _is_read(graph, final):
            replace(graph, final, replacement(graph, final, initial, node.origin), changed)
    return left_out


def _needed(graph: Graph, node: Node, body: Graph, layout: Layout) -> list[int]:
    """Numbers of the node's outputs that are read, or that decide what is read or how long the loop runs."""
    needed = {k for k, value in enumerate(node.outputs) if _is_read(graph, value)}
    sizes = _sizes_known_elsewhere(graph, node)
    for k, value in enumerate(node.outputs):
        if symbols_in([value]) & sizes:
            needed.add(k)
            sizes -= symbols_in([value])
    while True:
        read = _reached([*body.outputs[: layout.returned], *(body.outputs[layout.returned + k] for k in needed)])
        more = {k for k in range(layout.carried) if body.inputs[layout.head + k] in read} - needed
        if not more:
            return sorted(needed)
        needed |= more


def _sizes_known_elsewhere(graph: Graph, node: Node) -> set[str]:
    """Sizes of its own that only the node's unread outputs show and that other values of the graph speak of."""
    read = [v for v in node.outputs if _is_read(graph, v)]
    own = (symbols_in(v for v in node.outputs if v not in read) & set(node.symbols)) - symbols_in(read)
    return own & symbols_in(_values(graph, node)) if own else own


def _values(graph: Graph, without: Node) -> Iterator[Value]:
    """All values of a graph and of the bodies in it, but the outputs of a node."""
    yield from graph.inputs
    for node in graph.nodes:
        yield from (v for v in node.inputs if v is not None and v.producer is not without)
        yield from node.outputs if node is not without else ()
        for body in node.attrs.values():
            if isinstance(body, Graph) and node is not without:
                yield from _values(body, without)


def _is_read(graph: Graph, value: Value) -> bool:
    return bool(value.uses) or value in graph.outputs


def _reached(values: list[Value]) -> set[Value]:
    """The values and all they are computed from."""
    found: set[Value] = set()
    while values:
        value = values.pop()
        if value not in found:
            found.add(value)
            values += [v for v in (value.producer.inputs if value.producer is not None else ()) if v is not None]
    return found


def _source(value: Value) -> Value:
    """What a value is a copy of."""
    while value.producer is not None and value.producer.op.name == "Identity" and value.producer.inputs[0] is not None:
        value = value.producer.inputs[0]
    return value


def _cut(body: Graph, inputs: list[int], outputs: list[int]) -> Graph:
    """A copy of a body with some of its inputs, in another order, and some of its outputs."""
    new = body.copy()
    new.outputs = [new.outputs[i] for i in outputs]
    new.tidy()
    new.inputs = [new.inputs[i] for i in inputs]
    return new
