"""phases-as-channels: a transposed convolution with few filters becomes a convolution whose filters are its phases.

Outputs whose positions are equal modulo the stride are a phase; all phases read the same few pixels around one input pixel.
With fewer filters than a vector has lanes, a kernel that computes phase after phase leaves most lanes idle. As filters of
one convolution the phases fill them, at the price of taps with weights of zero and of a move of the results to their places.
One pixel of input (the first layer of a generator) is a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from minicc.ir.dims import Dim
from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.types import TensorType
from minicc.ops.helpers import Array
from minicc.ops.spatial import Window, transposed_window
from minicc.passes.common import replacement, visit_bodies
from minicc.passes.manager import PassContext

NAME = "phases-as-channels"
LANES = 16  # of a vector of float32
# The convolution is taken where it needs at most so many multiplications for one of the phases by themselves.
WORTH = 0.6


@dataclass(frozen=True)
class Axis:
    """How one axis is computed: first and number of taps of the convolution, padding behind, outputs of a phase."""

    first: int
    taps: int
    end: int
    outputs: Dim


def phases_as_channels(graph: Graph, context: PassContext) -> int:
    """Rewrite every transposed convolution for which it is legal and worth it; returns their number."""
    changes = visit_bodies(graph, lambda body: phases_as_channels(body, context))
    for node in list(graph.nodes):
        if node.op.name != "ConvTranspose" or node.op.domain:
            continue
        b = Builder(graph, node.origin)
        new = _rewritten(b, node)
        if isinstance(new, str):
            context.refusals[NAME, new] += 1
            continue
        graph.replace(node.output, replacement(graph, node.output, new, node.origin))
        context.rules[NAME] += 1
        changes += 1
    graph.tidy()
    return changes


def _rewritten(b: Builder, node: Node) -> Value | str:
    """The result computed otherwise, or why it stays."""
    x, w, bias = (*node.inputs, None)[:3]
    if x is None or w is None or w.data is None or not isinstance(x.type, TensorType) or x.type.shape is None:
        return "the weights are computed, or the rank of the input is not known"
    if node.attrs["group"] != 1 or node.attrs["layout"] != "NCHW" or (bias is not None and bias.data is None):
        return "it has groups, or a computed bias"
    spatial, kernel = x.shape[2:], w.data.shape[2:]
    geometry = transposed_window(node.attrs, kernel, spatial)
    if set(geometry.dilations) != {1}:
        return "it is dilated"
    if all(size == 1 for size in spatial) and geometry.output == kernel and not any(geometry.begin):
        return _of_one_pixel(b, x, w.data, bias)
    axes = [_axis(geometry, axis, size) for axis, size in enumerate(spatial)]
    known = [a for a in axes if a is not None]
    if len(known) < len(axes):
        return "its padding is not known, or it leaves inputs out"
    if len(axes) > 3:
        return "it has more than three spatial axes"
    filters, strides = w.data.shape[1], geometry.strides
    together = prod(a.taps for a in known) * -(-filters * prod(strides) // LANES)
    if together > WORTH * prod(kernel) * -(-filters // LANES):
        return "its filters fill vectors"
    return _as_convolution(b, x, w.data, bias, geometry, known)


def _of_one_pixel(b: Builder, x: Value, w: Array, bias: Value | None) -> Value:
    """Every output is a product of the pixel with one tap."""
    channels, *shape = w.shape
    rows = b.op("Reshape", x, b.shape([x.shape[0], channels]), allowzero=1)
    product = b.op("MatMul", rows, b.constant(w.reshape(channels, -1)))
    result = b.op("Reshape", product, b.shape([x.shape[0], *shape]), allowzero=1)
    return result if bias is None or bias.data is None else b.op("Add", result, _per_channel(b, bias.data, len(shape) - 1))


def _per_channel(b: Builder, bias: Array, rank: int) -> Value:
    return b.constant(bias.reshape(-1, *(1,) * rank))


def _axis(geometry: Window, axis: int, size: Dim) -> Axis | None:
    """One axis: outputs q * stride + r read inputs q + t with the weight r + begin - t * stride, for t from `first` on."""
    begin, stride, kernel = geometry.begin[axis], geometry.strides[axis], geometry.kernel[axis]
    longer = geometry.output[axis] - size * stride
    if not isinstance(begin, int) or not isinstance(kernel, int) or not isinstance(longer, int):
        return None
    first, last = -(-(begin - kernel + 1) // stride), (stride - 1 + begin) // stride
    more = -(-longer // stride)
    end = more + last
    return None if first > 0 or end < 0 else Axis(first, last - first + 1, end, size + more)


def _as_convolution(b: Builder, x: Value, w: Array, bias: Value | None, geometry: Window, axes: list[Axis]) -> Value:
    rank, filters, strides = len(axes), w.shape[1], geometry.strides
    phases = np.zeros((*strides, filters, w.shape[0], *(a.taps for a in axes)), w.dtype)
    turned = np.moveaxis(w, 0, 1)
    for phase in np.ndindex(*strides):
        for tap in np.ndindex(*(a.taps for a in axes)):
            at = tuple(r + int(begin) - (a.first + t) * stride  # type: ignore[arg-type]
                       for r, t, a, begin, stride in zip(phase, tap, axes, geometry.begin, strides))  # fmt: skip
            if all(0 <= place < size for place, size in zip(at, w.shape[2:])):
                phases[(*phase, slice(None), slice(None), *tap)] = turned[(slice(None), slice(None), *at)]
    weights = b.constant(phases.reshape(-1, *phases.shape[rank + 1 :]))
    vector = None if bias is None or bias.data is None else b.constant(np.tile(bias.data, prod(strides)))
    pads = [*(-a.first for a in axes), *(a.end for a in axes)]
    wide = b.op("Conv", x, weights, vector, pads=tuple(pads), kernel_shape=tuple(a.taps for a in axes))
    outputs = [a.outputs for a in axes]
    split = b.op("Reshape", wide, b.shape([x.shape[0], *strides, filters, *outputs]), allowzero=1)
    order = [0, rank + 1, *(at for axis in range(rank) for at in (rank + 2 + axis, 1 + axis))]
    full = [size * stride for size, stride in zip(outputs, strides)]
    placed = b.op("Reshape", b.op("Transpose", split, perm=tuple(order)), b.shape([x.shape[0], filters, *full]), allowzero=1)
    if list(geometry.output) == full:
        return placed
    zeros, where = np.zeros(rank, np.int64), np.arange(2, 2 + rank)
    return b.op("Slice", placed, b.constant(zeros), b.shape(list(geometry.output)), b.constant(where))
