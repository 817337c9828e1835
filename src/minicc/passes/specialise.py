"""specialise-ranks: an `If` whose branches give different ranks takes what follows it into its branches.

Exporters write `x.squeeze(d)` as If(size == 1, Squeeze, Identity). When the size is known only at run time, so is the rank of
everything after it, and nothing of that could be compiled. Inside each branch the rank is known: the nodes that depend on the
`If` are copied into both, where shape arithmetic usually decides the next such question. A branch in which they do not fit
together becomes an error that is raised only if it is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as with_fields

from minicc.errors import MiniccError
from minicc.ir.graph import Graph, Node, Value
from minicc.ir.types import TensorType
from minicc.ops.failure import failing_branch
from minicc.passes.common import add_copies, inline, plain_symbols, refresh, refresh_types, settle_sizes, visit_bodies_of
from minicc.passes.fold import fold_constants, fold_shape_values
from minicc.passes.manager import MAX_ROUNDS, PassContext

MAX_COPIED = 400  # nodes copied into both branches
MAX_BRANCHES = 16  # Ifs of unknown rank in one graph: each may double what follows


def specialise_ranks(graph: Graph, context: PassContext) -> int:
    """Move what follows an If of unknown rank into its branches; returns how many were moved."""
    changes = _visit(graph, context)
    for node in list(graph.nodes):
        if _decides_a_rank(node) and _specialise(graph, node, context):
            graph.tidy()
            return changes + 1  # positions have changed; the pipeline repeats this pass
    return changes


def _visit(graph: Graph, context: PassContext) -> int:
    """The pass in all bodies; what a body comes to return may tell more of the types outside."""
    changes = 0
    changed: set[Value] = set()
    for node in graph.nodes:
        done = visit_bodies_of(node, lambda body: specialise_ranks(body, context)) if node.op.name != "Fused" else 0
        if done:
            changed |= refresh(graph, node)
            changes += done
    refresh_types(graph, changed)
    return changes


def _decides_a_rank(node: Node) -> bool:
    if node.op.name != "If" or node.op.domain:
        return False
    branches = (node.attrs["then_branch"], node.attrs["else_branch"])
    for i, value in enumerate(node.outputs):
        types = [b.outputs[i].type for b in branches]
        if not isinstance(value.type, TensorType) or value.type.shape is not None or not value.uses:
            continue
        if all(isinstance(t, TensorType) and t.shape is not None for t in types):
            return True
    return False


def _specialise(graph: Graph, node: Node, context: PassContext) -> bool:
    after = _dependents(graph, node)
    controls = sum(n.op.name == "If" for n in after)
    if len(after) > MAX_COPIED or controls > MAX_BRANCHES:
        context.refusals["specialise-ranks", "too many nodes follow"] += 1
        return False
    moved = {node, *after}
    exported = [v for v in graph.outputs if v.producer in moved]
    captures = list(dict.fromkeys(v for v in node.inputs[1:] if v is not None))
    for n in after:
        captures += [v for v in n.inputs if v is not None and v.producer not in moved
                     and not v.is_constant and v not in captures]  # fmt: skip
    branches: list[Graph | None] = []
    problems: list[str] = []
    for name in ("then_branch", "else_branch"):
        try:
            body = _branch(graph, node, node.attrs[name], after, captures, exported)
            _settle(body, with_fields(context, symbols=context.symbols | plain_symbols(graph.inputs)))
            branches.append(body)
            problems.append("")
        except MiniccError as error:
            branches.append(None)
            problems.append(error.what)
    valid = next((b for b in branches if b is not None), None)
    if valid is None:
        return False
    filled = [b if b is not None else failing_branch(valid, valid.outputs, why) for b, why in zip(branches, problems)]
    origin = tuple(dict.fromkeys(name for n in (node, *after) for name in n.origin))
    attrs = {"then_branch": filled[0], "else_branch": filled[1]}
    new = graph.add(node.op, [node.inputs[0], *captures], attrs, origin=origin, outputs=len(exported),
                    names=[v.name for v in exported])  # fmt: skip
    for old, result in zip(exported, new.outputs):
        graph.replace(old, result)
    return True


def _dependents(graph: Graph, node: Node) -> list[Node]:
    """Nodes that depend on `node`, in order."""
    found: dict[Node, None] = {node: None}
    for n in graph.nodes:
        if any(v is not None and v.producer in found for v in n.inputs):
            found.setdefault(n)
    return [n for n in found if n is not node]


def _branch(graph: Graph, node: Node, branch: Graph, after: Sequence[Node], captures: Sequence[Value],
            exported: Sequence[Value]) -> Graph:  # fmt: skip
    """A branch followed by copies of the nodes after the If. Raises a MiniccError when they do not fit."""
    body = graph.subgraph(branch.name)
    mapping: dict[Value, Value | None] = {value: body.input(value.name, value.type) for value in captures}
    arguments = [None if v is None else mapping[v] for v in node.inputs[1:]]
    results = inline(body, branch, arguments, node.origin)
    mapping.update(zip(node.outputs, results))
    mapped = add_copies(body, after, mapping)
    body.outputs = [v for v in map(mapped, exported) if v is not None]
    settle_sizes(body, node.symbols, [v.type for v in node.outputs], [v.type for v in results])
    body.tidy()
    return body


def _settle(body: Graph, context: PassContext) -> None:
    """Fold a branch until nothing changes, so that an impossible one shows here. Raises a MiniccError when it does."""
    for _ in range(MAX_ROUNDS):
        if not fold_shape_values(body, context) + fold_constants(body, context) + specialise_ranks(body, context):
            return
