"""Rules on values between Quantize and Dequantize nodes that give the same numbers with fewer steps on 8-bit integers.

Only one scale for the whole value, positive and neither too small nor too large for float32 to hold all products with it.
"""

from __future__ import annotations

import numpy as np

from minicc.ir.graph import Builder, Node, Value
from minicc.ir.rewrite import Result, op, refuse, rule
from minicc.ir.types import TensorType, f32, i8, u8
from minicc.passes.common import scalar_of

EIGHT_BITS = (i8, u8)
# Of scales: products with 255 and quotients by them stay normal numbers.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max) / 512


def _dequantised(value: Value | None) -> Node | None:
    """The DequantizeLinear of an 8-bit tensor to float32, with a known scale for all of it, that makes a value."""
    node = value.producer if value is not None else None
    if node is None or node.op.domain or node.op.name != "DequantizeLinear":
        return None
    x, scale = node.inputs[:2]
    if x is None or scale is None or not isinstance(x.type, TensorType) or x.type.dtype not in EIGHT_BITS:
        return None
    number = scalar_of(scale)
    known = number is not None and SMALLEST <= number <= LARGEST and scale.tensor.dtype == f32
    return node if known and node.output.tensor.dtype == f32 else None


def _zero_point(node: Node) -> float | None:
    """The zero point of a Quantize or Dequantize node, None where it is not known."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return 0.0 if zero is None else scalar_of(zero)


@rule("requantise-same", op("QuantizeLinear", name="node"))
def requantise_same(_: Builder, node: Node) -> Result:
    """quantise(dequantise(x, s, z), s, z) = x: x * s and its quotient by s are off by less than half a step."""
    source = _dequantised(node.inputs[0])
    if source is None:
        return None
    same_scale = scalar_of(node.inputs[1]) == scalar_of(source.inputs[1])
    zero = _zero_point(node)
    if not same_scale or zero is None or zero != _zero_point(source):
        return refuse("another scale or zero point")
    x = source.inputs[0]
    assert x is not None
    return x if x.type == node.output.type else refuse("another type")


@rule("maximum-before-dequantise", op("MaxPool", name="node"))
def maximum_before_dequantise(b: Builder, node: Node) -> Result:
    """maxpool(dequantise(x)) = dequantise(maxpool(x)), as dequantising keeps the order."""
    source = _dequantised(node.inputs[0])
    if source is None:
        return None
    if len(node.outputs) > 1:
        return refuse("the positions of the maxima are asked for")
    attrs = node.attrs
    extents = [
        (size - 1) * apart + 1
        for size, apart in zip(attrs["kernel_shape"], attrs["dilations"] or [1] * len(attrs["kernel_shape"]))
    ]
    pads = attrs["pads"] or [0] * (2 * len(extents))
    if attrs["ceil_mode"] or any(pad >= extent for pad, extent in zip(pads, extents * 2)):
        return refuse("a window may lie in the padding, whose maximum is minus infinity")
    return b.op("DequantizeLinear", b.op("MaxPool", source.inputs[0], **attrs), *source.inputs[1:], **source.attrs)


QUANTISED_RULES = (requantise_same, maximum_before_dequantise)
