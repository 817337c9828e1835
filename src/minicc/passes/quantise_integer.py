"""Products of dequantised operands become integer products, scaled afterwards.

    Conv | MatMul | Gemm (DequantizeLinear(x), DequantizeLinear(constant w))
        -> Cast(ConvInteger | MatMulInteger (x, w)) * (scale of x * scale of w) + bias

The integer sum is exact where the float sum rounds after every term, so this is the more precise of the two, and it moves a
quarter of the bytes. It must run before folding turns the dequantised weights into float constants. Only 8-bit operands
with one scale for x, one or one per output channel for w, and sums that fit 32 bits. Convolutions with one channel per group
have a kernel of their own in float: they stay there, and a ConvInteger of that kind goes there when its sums fit the 24 bits
that float32 holds exactly. Nothing is quantised here that the model has not quantised.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minicc.errors import MiniccError
from minicc.ir.evaluate import evaluate_node
from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.types import f32, i32
from minicc.passes.common import LARGEST_EXACT, Dequantised, dequantised, replacement, visit_bodies
from minicc.passes.manager import PassContext

Array = np.ndarray[Any, Any]
NAME = "integer-products"
LARGEST_SUM = 2**31 - 1


def integer_products(graph: Graph, context: PassContext) -> int:
    """Rewrite every product of an 8-bit activation with 8-bit constant weights; returns their number."""
    changes = visit_bodies(graph, lambda body: integer_products(body, context))
    for node in list(graph.nodes):
        if _is_exact_in_float(node):
            graph.replace(node.output, _in_float(Builder(graph, node.origin), node))
            context.rules["depthwise ConvInteger in float"] += 1
            changes += 1
            continue
        if node.op.domain or node.op.name not in ("Conv", "MatMul", "Gemm"):
            continue
        found = _operands(node)
        if found is None:
            continue
        refusal = _refuse(node, *found)
        if refusal:
            context.refusals[NAME, refusal] += 1
            continue
        new = _rewrite(Builder(graph, node.origin), node, *found)
        graph.replace(node.output, replacement(graph, node.output, new, node.origin))
        context.rules[node.op.name] += 1
        changes += 1
    graph.tidy()
    return changes


def _operands(node: Node) -> tuple[Dequantised, Dequantised, Array] | None:
    """The dequantised operands and the numbers of the right one; None when this is no quantised product."""
    left, right = (dequantised(v) for v in node.inputs[:2])
    if left is None or right is None:
        return None
    weights = _known(right.value)
    return None if weights is None or _known(left.value) is not None else (left, right, weights)


def _known(value: Value) -> Array | None:
    """The numbers of a constant, or of a node whose inputs are constants (weights that the graph itself quantises)."""
    if value.data is not None:
        return value.data
    node = value.producer
    if node is None or node.op.name != "QuantizeLinear" or any(v is not None and v.data is None for v in node.inputs):
        return None
    try:
        (array,) = evaluate_node(node, [None if v is None else v.data for v in node.inputs])
    except MiniccError:
        return None
    return np.asarray(array)


def _refuse(node: Node, left: Dequantised, right: Dequantised, weights: Array) -> str:
    """Why the product stays as it is; empty when it becomes an integer product."""
    zero = None if right.zero is None else _known(right.zero)
    if left.axis is not None:
        return "the activation has several scales"
    if right.zero is not None and zero is None:
        return "the zero point of the weights is computed"
    if right.axis is not None and (right.scale.tensor.rank != 1 or right.axis != _channel_axis(node, weights.ndim)):
        return "the scales of the weights do not run along output channels"
    if node.op.name == "Gemm" and (node.attrs["transA"] or node.attrs["alpha"] != 1 or node.attrs["beta"] != 1):
        return "Gemm with a transposed left operand, alpha or beta"
    if node.op.name == "Conv" and (not 3 <= weights.ndim <= 5 or (node.attrs["group"] > 1 and weights.shape[1] == 1)):
        return "a convolution with one channel per group"
    if node.op.name != "Conv" and (weights.ndim != 2 or left.value.tensor.rank < 2):
        return "the weights are not a matrix"
    if _depth(node, weights) * 255 * 255 > LARGEST_SUM:
        return "sums may not fit 32 bits"
    return ""


def _channel_axis(node: Node, rank: int) -> int:
    """The axis of output channels of the weights."""
    return 0 if node.op.name == "Conv" or (node.op.name == "Gemm" and node.attrs["transB"]) else rank - 1


def _depth(node: Node, weights: Array) -> int:
    """How many terms a sum has."""
    columns: int = weights.shape[_channel_axis(node, weights.ndim)]
    return weights.size // max(1, columns)


def _rewrite(b: Builder, node: Node, left: Dequantised, right: Dequantised, weights: Array) -> Value:
    rank = node.output.tensor.rank
    convolution = node.op.name == "Conv"
    if node.op.name == "Gemm" and node.attrs["transB"]:
        weights = np.ascontiguousarray(weights.T)
    # A vector over channels, made to broadcast against the result.
    spread = (-1, *(1,) * (rank - 2)) if convolution and node.attrs["layout"] == "NCHW" else (-1,)
    scale = b.op("Mul", _flat(b, left.scale, ()), _flat(b, right.scale, () if right.axis is None else spread))
    right_zero = None if right.zero is None else _known(right.zero)
    zero = None
    if right_zero is not None and right_zero.any():
        zero = b.constant(right_zero.reshape(() if right_zero.size == 1 else (-1,)))
    left_zero = None if left.zero is None else _flat(b, left.zero, ())
    operator = "ConvInteger" if convolution else "MatMulInteger"
    attrs = node.attrs if convolution else {}
    total = b.op(operator, left.value, b.constant(weights), left_zero, zero, **attrs)
    out = b.op("Mul", b.op("Cast", total, to=f32), scale)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return out
    return b.op("Add", out, _flat(b, bias, spread) if convolution else bias)


def _is_exact_in_float(node: Node) -> bool:
    """Whether this is a depthwise ConvInteger with constant weights whose sums float32 holds exactly."""
    if node.op.name != "ConvInteger" or node.op.domain or node.attrs["group"] == 1:
        return False
    x, w, zero = node.inputs[0], node.inputs[1], node.inputs[3] if len(node.inputs) > 3 else None
    if x is None or w is None or w.data is None or (zero is not None and zero.data is None):
        return False
    depthwise = w.data.ndim > 2 and w.data.shape[:2] == (node.attrs["group"], 1)
    return depthwise and w.data[0].size * 255 * 255 <= LARGEST_EXACT


def _in_float(b: Builder, node: Node) -> Value:
    """The same integers from a float convolution of operands without zero points."""
    x, w, x_zero, w_zero = (*node.inputs, None, None)[:4]
    assert x is not None and w is not None and w.data is not None
    weights = w.data.astype(np.float32)
    if w_zero is not None and w_zero.data is not None:
        weights = weights - w_zero.data.astype(np.float32).reshape(-1, *(1,) * (weights.ndim - 1))
    image = b.op("Cast", x, to=f32)
    if x_zero is not None:
        image = b.op("Sub", image, b.op("Cast", _flat(b, x_zero, ()), to=f32))
    return b.op("Cast", b.op("Conv", image, b.constant(weights), **node.attrs), to=i32)


def _flat(b: Builder, x: Value, shape: tuple[int, ...]) -> Value:
    """The value in another shape; -1 stands for its only axis."""
    wanted = tuple(x.tensor.size if size == -1 else size for size in shape)
    return x if x.shape == wanted else b.op("Reshape", x, b.shape(wanted))
