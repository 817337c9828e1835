"""zero-points: integer products whose operands have zero points become products of the bare numbers, corrected afterwards.

    sum (x - p)(w - q) = sum x w  -  q * sum x  -  p * sum (w - q)

For targets whose units multiply 8-bit numbers as they are. With constant weights the last term is a vector, usually of
constants; the middle one is there only where weights have a zero point. Unsigned weights become signed ones, 128 less: then
the usual zero point of 128 is gone. What a convolution pads with counts as p, so where p is not 0 the padding is written out.
All of it is int32 arithmetic modulo 2**32, so the results are the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.types import f32, i8, i32, u8
from minicc.ops.norm import reshaped
from minicc.ops.spatial import channel_axis, spatial_axes, window
from minicc.passes.common import LARGEST_EXACT, replacement, visit_bodies
from minicc.passes.manager import PassContext

Array = np.ndarray[Any, Any]
NAME = "zero-points"


def zero_points(graph: Graph, context: PassContext) -> int:
    """Take the zero points off every integer product unless the target takes them; returns the number of products."""
    if context.zero_points:
        return 0
    changes = visit_bodies(graph, lambda body: zero_points(body, context))
    for node in list(graph.nodes):
        if node.op.domain or node.op.name not in ("ConvInteger", "MatMulInteger") or not _has_any(node):
            continue
        rewrite = _convolution if node.op.name == "ConvInteger" else _matrices
        new = rewrite(Builder(graph, node.origin), node)
        if isinstance(new, Value) and new.shape != node.output.shape:
            new = "sizes are not known to be those of the product"
        if isinstance(new, str):
            context.refusals[NAME, new] += 1
            continue
        graph.replace(node.output, replacement(graph, node.output, new, node.origin))
        context.rules[node.op.name] += 1
        changes += 1
    graph.tidy()
    return changes


def _has_any(node: Node) -> bool:
    """Whether there is something to take off: zero points, also those known to be 0, or unsigned weights."""
    weights = node.inputs[1]
    return any(v is not None for v in node.inputs[2:]) or (weights is not None and weights.tensor.dtype == u8)


# -- matrices


def _matrices(b: Builder, node: Node) -> Value | str:
    left, right, left_zero, right_zero = (*node.inputs, None, None)[:4]
    assert left is not None and right is not None
    if left.tensor.rank < 2 or right.tensor.rank < 2:
        return "an operand is a vector"
    for value, zero, axis in ((left, left_zero, -1), (right, right_zero, -2)):
        if zero is not None and zero.tensor.rank > 1 and (zero.tensor.rank != value.tensor.rank or zero.shape[axis] != 1):
            return "zero points that run along the sum"
    p = _wide(b, left_zero)
    if p is not None and p.tensor.rank == 1 and p.shape != (1,):
        p = reshaped(b, p, (p.shape[0], 1))
    right, q = _signed(b, right, right_zero)
    total = b.op("MatMulInteger", left, right)
    if q is not None:
        rows = b.op("ReduceSum", b.op("Cast", left, to=i32), b.constant(np.array([-1])), keepdims=1)
        total = b.op("Sub", total, b.op("Mul", rows, q))
    if p is not None:
        total = b.op("Sub", total, b.op("Mul", p, _column_sums(b, right, q)))
    return total


def _column_sums(b: Builder, right: Value, q: Value | None) -> Value:
    """The sums of a right operand less its zero points, with an axis of size 1 for the rows."""
    if right.data is None:
        wide = b.op("Cast", right, to=i32)
        return b.op("ReduceSum", wide if q is None else b.op("Sub", wide, q), b.constant(np.array([-2])), keepdims=1)
    sums = right.data.sum(-2, dtype=np.int32, keepdims=True)
    return _less(b, sums, right.data.shape[-2], q)


# -- convolutions


def _convolution(b: Builder, node: Node) -> Value | str:
    x, w, x_zero, w_zero = (*node.inputs, None, None)[:4]
    assert x is not None and w is not None
    if w.data is None:
        return "the weights are computed"
    groups, layout, rank = node.attrs["group"], node.attrs["layout"], w.data.ndim
    if groups > 1 and w.data.shape[1] == 1:
        return "a convolution with one channel per group"
    if (x_zero is not None and x_zero.tensor.size != 1) or (w_zero is not None and w_zero.tensor.rank > 1):
        return "several zero points of the activation, or one for each weight"
    if w.data[0].size * 255 > LARGEST_EXACT:
        return "sums of windows may not be exact"
    attrs = dict(node.attrs)
    p = _wide(b, None if x_zero is None else reshaped(b, x_zero, ()))
    w, q = _signed(b, w, w_zero)
    if p is not None:
        assert x_zero is not None
        x, w = _padded(b, x, reshaped(b, x_zero, ()), w, attrs)
    # A vector over the output's channels, made to broadcast against the result.
    spread = (-1,) if layout == "NHWC" else (-1, *(1,) * (rank - 2))
    if q is not None:
        q = reshaped(b, q, tuple(q.shape[0] if size == -1 else size for size in spread)) if q.tensor.size != 1 else q
        q = q if q.tensor.size != 1 else reshaped(b, q, ())
    assert w.data is not None
    total = b.op("ConvInteger", x, w, **attrs)
    if q is not None:
        total = b.op("Sub", total, b.op("Mul", _window_sums(b, x, w, attrs), q))
    if p is not None:
        sums = w.data.reshape(w.data.shape[0], -1).sum(1, dtype=np.int32).reshape(spread)
        total = b.op("Sub", total, b.op("Mul", p, _less(b, sums, w.data[0].size, q)))
    return total


def _padded(b: Builder, x: Value, zero: Value, w: Value, attrs: dict[str, Any]) -> tuple[Value, Value]:
    """The activation with its padding written out, which goes from the attributes, and the weights.

    The same copy gives channels the multiple of 4 that kernels copy them by; weights there are 0.
    """
    axes = spatial_axes(attrs["layout"], x.tensor.rank)
    geometry = window(attrs, w.shape[2:], [x.shape[a] for a in axes])
    attrs |= {"pads": (0,) * (2 * len(axes)), "auto_pad": "NOTSET"}
    if not any(geometry.padded(a) for a in range(len(axes))):
        return x, w
    before, after = [0] * x.tensor.rank, [0] * x.tensor.rank
    for axis, low, high in zip(axes, geometry.begin, geometry.end):
        before[axis], after[axis] = low, high
    assert w.data is not None
    more = -w.data.shape[1] % 4
    if more and attrs["group"] == 1:
        after[channel_axis(attrs["layout"], x.tensor.rank)] = more
        w = b.constant(np.pad(w.data, [(0, 0), (0, more), *[(0, 0)] * len(axes)]))
    return b.op("Pad", x, b.shape([*before, *after]), zero), w


def _window_sums(b: Builder, x: Value, w: Value, attrs: dict[str, Any]) -> Value:
    """The sum of each window and group of an activation, repeated for the output's channels unless there is one group."""
    groups, layout, rank = attrs["group"], attrs["layout"], x.tensor.rank
    assert w.data is not None
    filters, channels, *kernel = w.data.shape
    at = channel_axis(layout, rank)
    split = (*x.shape[:at], groups, channels, *x.shape[at + 1 :])
    # In float32, which holds these sums exactly, because there is a kernel for convolutions of single channels.
    numbers = b.op("Cast", reshaped(b, x, split), to=f32)
    sums = b.op("ReduceSum", numbers, b.constant(np.array([at + 1])), keepdims=0)
    ones = b.constant(np.ones((groups, 1, *kernel), np.float32))
    sums = b.op("Cast", b.op("Conv", sums, ones, **attrs), to=i32)
    if groups == 1:
        return sums
    shape = sums.shape
    each = reshaped(b, sums, (*shape[: at + 1], 1, *shape[at + 1 :]))
    each = b.op("Expand", each, b.shape([*shape[: at + 1], filters // groups, *shape[at + 1 :]]))
    return reshaped(b, each, (*shape[:at], filters, *shape[at + 1 :]))


# -- both


def _signed(b: Builder, w: Value, zero: Value | None) -> tuple[Value, Value | None]:
    """Weights as int8 and their zero points as int32, None when they are all 0."""
    if w.tensor.dtype == i8:
        return w, _wide(b, zero)
    if w.data is not None:
        w = b.constant((w.data ^ np.uint8(128)).view(np.int8))
    else:
        wide = b.op("Cast", w, to=i32)
        w = b.op("Cast", b.op("Sub", wide, b.scalar(128, wide)), to=i8)
    if zero is not None and zero.data is None:
        wide = b.op("Cast", zero, to=i32)
        return w, b.op("Sub", wide, b.scalar(128, wide))
    points = np.int32(-128) if zero is None or zero.data is None else zero.data.astype(np.int32) - 128
    return w, b.constant(np.asarray(points, np.int32)) if np.any(points) else None


def _wide(b: Builder, zero: Value | None) -> Value | None:
    """Zero points as int32; None when they are known to be 0."""
    if zero is None or (zero.data is not None and not zero.data.any()):
        return None
    return b.constant(zero.data.astype(np.int32)) if zero.data is not None else b.op("Cast", zero, to=i32)


def _less(b: Builder, sums: Array, terms: int, q: Value | None) -> Value:
    """Known sums of weights less their zero points, each of so many terms."""
    if q is None:
        return b.constant(sums)
    if q.data is not None:
        return b.constant((sums - np.int32(terms) * q.data).astype(np.int32))
    return b.op("Sub", b.constant(sums), b.op("Mul", q, b.constant(np.int32(terms))))
