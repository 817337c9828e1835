"""Expanding: ops that are defined by smaller ops are rewritten into them, until none is left.

Nodes that the target computes whole (`context.keep`) stay, and so do nodes whose op says why it has no compiled
form: those run on the host.
"""

from __future__ import annotations

from collections.abc import Callable

from minicc.errors import VerifyError
from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.opdef import Kind
from minicc.passes.common import refresh_types, replace, replacement, settle_sizes, visit_bodies
from minicc.passes.manager import PassContext

MAX_DEPTH = 20


def expand(graph: Graph, context: PassContext) -> int:
    """Rewrite every op of Kind.EXPAND that may be; also those that expansions bring in, and in bodies."""
    changes = 0
    for _ in range(MAX_DEPTH):
        pending = [node for node in graph.nodes if must_expand(node, context.keep)]
        if not pending:
            break
        changed: set[Value] = set()
        for node in pending:
            _expand(graph, node, changed)
            context.rules[str(node.op)] += 1
            changes += 1
        refresh_types(graph, changed)
        graph.tidy()
    else:
        raise VerifyError(
            f"expanding does not come to an end after {MAX_DEPTH} rounds", where=pending[0].describe()
        )
    return changes + visit_bodies(graph, lambda body: expand(body, context))


def must_expand(node: Node, keep: Callable[[Node], bool]) -> bool:
    """Whether the node is written in smaller ops before lowering."""
    if node.op.kind is not Kind.EXPAND or keep(node):
        return False
    return node.op.refuse is None or node.op.refuse(node) is None


def _expand(graph: Graph, node: Node, changed: set[Value]) -> None:
    assert node.op.expand is not None
    values = list(node.op.expand(Builder(graph, node.origin), node))
    changed |= settle_sizes(graph, node.symbols, [v.type for v in node.outputs], [v.type for v in values])
    for old, new in zip(node.outputs, values):
        replace(graph, old, replacement(graph, old, new, node.origin), changed)
