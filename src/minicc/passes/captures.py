"""fold-captures: constants that a control-flow node captures move into its bodies, to be packed and folded there."""

from __future__ import annotations

from minicc.ir.graph import Graph, Node, Value
from minicc.passes.common import refresh, refresh_types, visit_bodies, visit_bodies_of
from minicc.passes.manager import PassContext


def fold_captures(graph: Graph, context: PassContext) -> int:
    """Replace captured constants by constants of the bodies; returns how many captures went."""
    changes = 0
    changed: set[Value] = set()
    for node in graph.nodes:
        first = _first_capture(node)
        if first is None:
            continue
        # Body inputs run parallel to the node's inputs, but the condition of an If is not among them.
        shift = 1 if node.op.name == "If" else 0
        constants = [i for i in range(first, len(node.inputs)) if (v := node.inputs[i]) is not None and v.is_constant]
        for position in reversed(constants):
            value = node.inputs[position]
            assert value is not None
            for body in (a for a in node.attrs.values() if isinstance(a, Graph)):
                _substitute(body, position - shift, value)
            _drop_input(node, position)
            changes += 1
        if constants:
            visit_bodies_of(node, _refresh)
            changed |= refresh(graph, node)
    refresh_types(graph, changed)
    return changes + visit_bodies(graph, lambda body: fold_captures(body, context))


def _refresh(body: Graph) -> int:
    """Infer all nodes of a body again: a constant has contents that a capture had not."""
    for node in body.nodes:
        body.refresh(node)
    return 0


def _first_capture(node: Node) -> int | None:
    """Position of the first captured input of a control-flow node, else None."""
    if node.op.domain:
        return None
    if node.op.name == "If":
        return 1
    if node.op.name == "Loop":
        return 2 + int(node.attrs["n_carried"])
    if node.op.name == "Scan":
        return int(node.attrs["n_state"]) + int(node.attrs["num_scan_inputs"])
    return None


def _substitute(body: Graph, position: int, value: Value) -> None:
    inner = body.inputs.pop(position)
    body.replace(inner, Value(value.name, value.type, data=value.data, content=value.content))


def _drop_input(node: Node, position: int) -> None:
    for value in node.inputs:
        if value is not None:
            value.uses[:] = [(n, p) for n, p in value.uses if n is not node]
    node.inputs = node.inputs[:position] + node.inputs[position + 1 :]
    for place, value in enumerate(node.inputs):
        if value is not None:
            value.uses.append((node, place))
