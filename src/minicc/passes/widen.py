"""widen-half: a model of 16-bit floats is computed in float32 on targets whose kernels compute in float32 anyway.

Results between two operators are then not rounded to 16 bits and taken apart again; what comes in, what goes out, and what an
explicit Cast makes are of the types the model says. So does ONNX Runtime on a CPU. Tables that are only looked up, caches
that may be updated in place, and operators that move memory into an output stay as they are.
"""

from __future__ import annotations

import numpy as np

from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.opdef import Kind
from minicc.ir.types import DType, TensorType, bf16, f16, f32
from minicc.passes.common import add_copies, replacement, visit_bodies
from minicc.passes.manager import PassContext

NAME = "widen-half"
HALF = (f16, bf16)
# Casts say what is rounded; quantised scales belong to their integers; the others write into caches.
EXPLICIT = frozenset((
    "Cast", "CastLike", "BitCast", "QuantizeLinear", "DequantizeLinear", "TensorScatter", "ScatterND", "ScatterElements",
    "GroupQueryAttention", "MultiHeadAttention", "Attention",
))  # fmt: skip
LOOKUPS = frozenset(("Gather", "GatherElements", "GatherND"))


def widen_half(graph: Graph, context: PassContext) -> int:
    """Widen what is computed, also in bodies; returns the number of nodes that compute on float32 now."""
    if not context.widen:
        return 0
    changes = visit_bodies(graph, lambda body: widen_half(body, context))
    wide: dict[Value, Value] = {}
    for node in list(graph.nodes):
        if _is_widening(node):
            source = wide.get(node.inputs[0])  # type: ignore[arg-type]
            if source is not None:
                graph.replace(node.output, replacement(graph, node.output, source, node.origin))
            continue
        reason = refuse_to_widen(graph, node, wide)
        if reason:
            context.refusals[NAME, reason] += 1
        elif _is_concerned(node, wide) and _widened(graph, node, wide):
            context.rules[node.op.name] += 1
            changes += 1
    for old, new in wide.items():
        if not old.is_constant and new.producer is not None and (old.uses or old in graph.outputs):
            if new.producer.inputs[0] is old:
                continue  # it comes in with 16 bits
            graph.replace(old, Builder(graph, new.producer.origin).op("Cast", new, to=old.tensor.dtype))
    graph.tidy()
    return changes


def is_half(value: Value | None) -> bool:
    """Whether a value is a tensor of 16-bit floats of known rank."""
    return value is not None and isinstance(value.type, TensorType) and value.type.shape is not None and value.type.dtype in HALF


def _is_widening(node: Node) -> bool:
    return node.op.name == "Cast" and not node.op.domain and is_half(node.inputs[0]) and node.attrs["to"] == f32


def _is_concerned(node: Node, wide: dict[Value, Value]) -> bool:
    """Whether a node computes a half value, or something else of values that are there in float32 already."""
    halves = [v for v in node.inputs if is_half(v)]
    return bool(halves) and (any(map(is_half, node.outputs)) or all(v in wide or v.is_constant for v in halves if v is not None))


def refuse_to_widen(graph: Graph, node: Node, wide: dict[Value, Value]) -> str:
    """Why a node with operands of 16 bits stays as it is; empty when it may be widened."""
    if not any(map(is_half, node.inputs)):
        return ""
    if node.op.kind in (Kind.CONTROL, Kind.HOST) or not node.op.deterministic or node.symbols:
        return "it runs on the host"
    if node.op.name in EXPLICIT or any(isinstance(a, DType) and a in HALF for a in node.attrs.values()):
        return "it says of which type its result is, or writes into a cache"
    first = node.inputs[0]
    if node.op.name in LOOKUPS and is_half(first) and first not in wide:
        return "it looks things up in a table"
    if node.op.kind is Kind.INDEX and any(v in graph.outputs for v in node.outputs) and not all(v in wide for v in node.inputs):
        return "it moves memory into an output"
    return ""


def _widened(graph: Graph, node: Node, wide: dict[Value, Value]) -> bool:
    """Add a copy of a node that computes on float32; False where such a node would give other types."""
    mapping: dict[Value, Value | None] = {}
    b = Builder(graph, node.origin)
    for value in node.inputs:
        if value is not None and value not in mapping:
            mapping[value] = _wide(b, value, wide) if is_half(value) else value
    add_copies(graph, [node], mapping)
    pairs = [(old, new) for old in node.outputs if (new := mapping[old]) is not None]
    for old, new in pairs:
        wanted = TensorType(f32, old.type.shape) if is_half(old) and isinstance(old.type, TensorType) else old.type
        if new.type != wanted:
            return False
    for old, new in pairs:
        if is_half(old):
            wide[old] = new
        else:
            graph.replace(old, replacement(graph, old, new, node.origin))
    return True


def _wide(b: Builder, value: Value, wide: dict[Value, Value]) -> Value:
    if value not in wide:
        data = value.data
        wide[value] = b.op("Cast", value, to=f32) if data is None else b.constant(data.astype(np.float32))
    return wide[value]
