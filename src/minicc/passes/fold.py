"""Folding: what is known at compile time becomes a constant.

`fold_shape_values` turns values with known content (shape arithmetic, usually symbolic) into constants;
`fold_constants` runs ops whose inputs are all constants, and puts the taken branch in the place of an `If`.
Graph outputs stay computed values.
"""

from __future__ import annotations

from dataclasses import replace as with_fields
from typing import Any

import numpy as np

from minicc.errors import MiniccError
from minicc.ir.dims import SymbolicDim, symbols_of
from minicc.ir.evaluate import evaluate_node
from minicc.ir.graph import Graph, Node, Value
from minicc.ir.opdef import Kind
from minicc.ir.types import TensorType
from minicc.passes.common import (
    has_control,
    inline,
    nbytes,
    plain_symbols,
    refresh_types,
    replace,
    replacement,
    settle_sizes,
    visit_bodies,
)
from minicc.passes.manager import PassContext

SMALL_BYTES = 1 << 20  # results up to this size are always kept
REPEATED_BYTES = 64 << 10  # but those that only repeat their inputs, which readers can do as well
MAX_GROWTH = 4  # larger results may take this many times the bytes of the inputs


def fold_shape_values(graph: Graph, context: PassContext) -> int:
    """Replace values with known content by (symbolic) constants, so that shape arithmetic disappears.

    A content whose symbols are found only at run time (by a node such as NonZero) stays: the node must run
    first.
    """
    known = context.symbols | plain_symbols(graph.inputs)
    changes = 0
    for node in graph.nodes:
        for value in node.outputs:
            if (
                value.content is None
                or not isinstance(value.type, TensorType)
                or value in graph.outputs
                or not value.uses
            ):
                continue
            dims: list[Any] = [v for v in value.content.flat if isinstance(v, SymbolicDim)]
            names = {name for d in dims for name in symbols_of(d)}
            if not names <= known:
                context.refusals["fold-shape-values", "a size is known only at run time"] += 1
                continue
            graph.replace(value, _constant(graph, value))
            changes += 1
    inner = with_fields(context, symbols=known)
    changes += visit_bodies(graph, lambda body: fold_shape_values(body, inner))
    graph.tidy()
    return changes


def _constant(graph: Graph, value: Value) -> Value:
    assert value.content is not None
    if any(isinstance(v, SymbolicDim) for v in value.content.flat):
        return graph.symbolic_constant(value.content, value.tensor)
    array = np.array(value.content.tolist(), dtype=value.tensor.dtype.numpy).reshape(value.content.shape)
    return graph.constant(array)


def fold_constants(graph: Graph, context: PassContext) -> int:
    """Evaluate deterministic nodes whose inputs are all numeric constants, if the result is not much larger.

    A result may take 1 MiB (64 KiB where it repeats its input), or four times the bytes of the inputs, and never more than
    options.max_bytes.
    """
    changes = 0
    changed: set[Value] = set()
    types_may_change = not has_control(graph)
    for node in list(graph.nodes):
        if node.op.name == "If" and not node.op.domain:
            changes += _inline_if(graph, node, changed)
        elif _foldable(node, context):
            try:
                arrays = evaluate_node(
                    node,
                    [None if v is None else v.data for v in node.inputs],
                    max_bytes=context.options.max_bytes,
                )
            except (MiniccError, TypeError, ValueError):
                context.refusals["fold-constants", f"{node.op} cannot be evaluated"] += 1
                continue
            for value, array in zip(node.outputs, arrays):
                if not value.uses or value in graph.outputs or not isinstance(array, np.ndarray):
                    continue
                if array.nbytes > _cap(node):
                    context.refusals["fold-constants", "the result is too large"] += 1
                    continue
                if node.op.name != "Transpose":  # its result is a view, which takes no memory: packing reads any strides
                    array = np.ascontiguousarray(array).reshape(array.shape)
                constant = graph.constant(array)
                if constant.type != value.type and not types_may_change:
                    context.refusals["fold-constants", "a sub-graph depends on the type"] += 1
                    continue
                replace(graph, value, constant, changed)
                changes += 1
                context.rules[node.op.name] += 1
    refresh_types(graph, changed)
    changes += visit_bodies(graph, lambda body: fold_constants(body, context))
    graph.tidy()
    return changes


def _foldable(node: Node, context: PassContext) -> bool:
    if node.op.kind is Kind.CONTROL or not node.op.deterministic or node.op.eval is None:
        return False
    if not all(v is None or v.data is not None for v in node.inputs):
        return False
    sizes = [nbytes(v) for v in node.outputs if v.uses]
    if any(size is not None and size > _cap(node) for size in sizes):
        context.refusals["fold-constants", "the result is too large"] += 1
        return False
    return bool(sizes) and all(isinstance(v.type, TensorType) for v in node.outputs)


def _cap(node: Node) -> int:
    return max(
        REPEATED_BYTES if node.op.name in ("Expand", "Tile") else SMALL_BYTES,
        MAX_GROWTH * sum(v.data.nbytes for v in node.inputs if v is not None and v.data is not None),
    )


def _inline_if(graph: Graph, node: Node, changed: set[Value]) -> int:
    """Put the taken branch in the place of an `If` whose condition is known."""
    condition = node.inputs[0]
    if condition is None or condition.data is None or condition.data.size != 1:
        return 0
    branch = node.attrs["then_branch" if bool(condition.data.reshape(())) else "else_branch"]
    values = inline(graph, branch, node.inputs[1:], node.origin)
    changed |= settle_sizes(graph, node.symbols, [v.type for v in node.outputs], [v.type for v in values])
    for position, (old, new) in enumerate(zip(node.outputs, values)):
        values[position] = new = replacement(graph, old, new, node.origin)
        replace(graph, old, new, changed)
    graph.tidy()
    return 1
