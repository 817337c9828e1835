"""choose-layout: convolutions and pools read and write channels-last.

Layout is physical: the op gets `layout="NHWC"`, its activation is transposed before and its result transposed back, and
sink-transposes (transposes.py) removes what cancels. All templates are channels-last, so there is one choice to make per op and it is
always the same; the cost of the transposes that remain at the border of a region is a strided read of their neighbours.
"""

from __future__ import annotations

from minicc.ir.graph import Graph, Node
from minicc.ir.types import TensorType, bf16, f16, f32

SPATIAL = frozenset(("Conv", "ConvTranspose", "MaxPool", "AveragePool"))


def to_channels_last(rank: int) -> tuple[int, ...]:
    """Permutation from [N, C, *spatial] to [N, *spatial, C]."""
    return (0, *range(2, rank), 1)


def to_channels_first(rank: int) -> tuple[int, ...]:
    """Permutation from [N, *spatial, C] to [N, C, *spatial]."""
    return (0, rank - 1, *range(1, rank - 1))


def choose_layout(graph: Graph) -> int:
    """Turn every convolution and pool that has a channels-last kernel to that layout; returns how many."""
    changes = 0
    for node in list(graph.nodes):
        changes += sum(choose_layout(a) for a in node.attrs.values() if isinstance(a, Graph) and node.op.name != "Fused")
        if _wants_channels_last(node):
            _convert(graph, node)
            changes += 1
    graph.tidy()
    return changes


def _wants_channels_last(node: Node) -> bool:
    if node.op.domain or node.op.name not in SPATIAL or node.attrs.get("layout") != "NCHW":
        return False
    if any(v.uses for v in node.outputs[1:]):
        return False  # indices of a MaxPool count positions of the layout
    x = node.inputs[0]
    if x is None or not isinstance(x.type, TensorType) or x.type.shape is None:
        return False
    return 3 <= len(x.type.shape) <= 5 and x.type.dtype in (f32, f16, bf16)


def _convert(graph: Graph, node: Node) -> None:
    x = node.inputs[0]
    assert x is not None
    rank = len(x.shape)
    inside = graph.add("Transpose", [x], {"perm": to_channels_last(rank)}, origin=node.origin).output
    result = graph.add(node.op, [inside, *node.inputs[1:]], {**node.attrs, "layout": "NHWC"}, origin=node.origin).output
    back = graph.add("Transpose", [result], {"perm": to_channels_first(rank)}, origin=node.origin, names=[node.output.name])
    graph.replace(node.output, back.output)
