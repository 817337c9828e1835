"""Topological order of an ONNX node list, by names.

ONNX asks for sorted nodes; some exporters do not sort. The order given is kept where it is right. Names
that nested graphs read from outside count as reads of their node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import onnx

from minicc.errors import InvalidModelError, ResourceLimitError

MAX_NESTING = 64


def reads(node: onnx.NodeProto) -> list[str]:
    """Names a node reads: its inputs, and what its graphs take from outside."""
    names = [name for name in node.input if name]
    graphs = graphs_of(node)
    if graphs:
        names.extend(_free_names(graphs))
    return names


def graphs_of(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    found: list[onnx.GraphProto] = []
    for attribute in node.attribute:
        if attribute.HasField("g"):
            found.append(attribute.g)
        found.extend(attribute.graphs)
    return found


def _free_names(graphs: Iterable[onnx.GraphProto]) -> list[str]:
    """Names that graphs read and do not define, those of graphs within included (iterative, bounded depth).

    A name defined anywhere in an enclosing graph of the nest counts as defined: ONNX forbids shadowing.
    """
    free: dict[str, None] = {}
    stack: list[tuple[onnx.GraphProto, frozenset[str], int]] = [(g, frozenset(), 1) for g in graphs]
    while stack:
        graph, outer, depth = stack.pop()
        if depth > MAX_NESTING:
            raise ResourceLimitError(f"graphs are nested more than {MAX_NESTING} deep")
        defined = {v.name for v in graph.input} | {t.name for t in graph.initializer}
        defined |= {t.values.name for t in graph.sparse_initializer}
        for node in graph.node:
            defined.update(node.output)
        defined |= outer
        known = frozenset(defined)
        for node in graph.node:
            free.update((name, None) for name in node.input if name and name not in known)
            stack.extend((g, known, depth + 1) for g in graphs_of(node))
        free.update((v.name, None) for v in graph.output if v.name not in known)
    return list(free)


def sorted_nodes(
    nodes: Sequence[onnx.NodeProto],
    where: str,
) -> tuple[list[tuple[int, onnx.NodeProto]], frozenset[str]]:
    """The nodes with their places, each after those it reads, and all names read.

    Raises InvalidModelError on a cycle, and for a value with two producers.
    """
    for position, node in enumerate(nodes):
        texts = (node.op_type, node.domain, node.name, node.overload, *node.input, *node.output)
        if not all(isinstance(text, str) for text in texts):  # protobuf gives bytes
            raise InvalidModelError(f"a name in node {position} of {where} is no UTF-8 text")
    all_reads = [reads(node) for node in nodes]
    producers: dict[str, int] = {}
    for position, node in enumerate(nodes):
        for name in node.output:
            if name and producers.setdefault(name, position) != position:
                raise InvalidModelError(
                    f"value {name!r} is computed twice in {where}", where=describe(node, position)
                )
    if all(producers.get(name, -1) < i for i, names in enumerate(all_reads) for name in names):
        return list(enumerate(nodes)), frozenset(chain(*all_reads))
    order: list[int] = []
    state = [0] * len(nodes)  # 1 while its producers are being placed, 2 when placed
    for root in range(len(nodes)):
        stack = [(root, False)]
        while stack:
            position, ready = stack.pop()
            if ready:
                state[position] = 2
                order.append(position)
                continue
            if state[position] == 2:
                continue
            if state[position] == 1:
                raise InvalidModelError(f"{where} has a cycle", where=describe(nodes[position], position))
            state[position] = 1
            stack.append((position, True))
            for name in reversed(all_reads[position]):
                source = producers.get(name)
                if source is not None and state[source] != 2:
                    stack.append((source, False))
    return [(i, nodes[i]) for i in order], frozenset(chain(*all_reads))


def describe(node: onnx.NodeProto, position: int) -> str:
    """A node for messages, by its name or its place."""
    return f"{node.op_type} node {node_name(node, position)!r}"


def node_name(node: onnx.NodeProto, position: int) -> str:
    """A node's name, or one made from its operator and place."""
    return node.name or f"{node.op_type}_{position}"
