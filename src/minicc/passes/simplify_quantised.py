"""Rules on values between Quantize and Dequantize nodes that give the same numbers with fewer steps on 8-bit integers.

Only one scale for the whole value, positive and neither too small nor too large for float32 to hold all products with it.
"""

from __future__ import annotations

import numpy as np

from minicc.ir.graph import Builder, Node, Value
from minicc.ir.rewrite import Result, op, refuse, rule
from minicc.passes.common import Dequantised, dequantised, scalar_of

# Of scales: products with 255 and quotients by them stay normal numbers.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max) / 512


def _with_one_scale(value: Value | None) -> Dequantised | None:
    """What a value is dequantised from, with a known scale for all of it."""
    found = dequantised(value)
    number = None if found is None else scalar_of(found.scale)
    return found if number is not None and SMALLEST <= number <= LARGEST else None


def _zero_point(zero: Value | None) -> float | None:
    """The number of a zero point, None where it is not known."""
    return 0.0 if zero is None else scalar_of(zero)


@rule("requantise-same", op("QuantizeLinear", name="node"))
def requantise_same(_: Builder, node: Node) -> Result:
    """quantise(dequantise(x, s, z), s, z) = x: x * s and its quotient by s are off by less than half a step."""
    source = _with_one_scale(node.inputs[0])
    if source is None:
        return None
    same_scale = scalar_of(node.inputs[1]) == scalar_of(source.scale)
    zero = _zero_point(node.inputs[2] if len(node.inputs) > 2 else None)
    if not same_scale or zero is None or zero != _zero_point(source.zero):
        return refuse("another scale or zero point")
    return source.value if source.value.type == node.output.type else refuse("another type")


@rule("maximum-before-dequantise", op("MaxPool", name="node"))
def maximum_before_dequantise(b: Builder, node: Node) -> Result:
    """maxpool(dequantise(x)) = dequantise(maxpool(x)), as dequantising keeps the order."""
    source = _with_one_scale(node.inputs[0])
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
    return b.op("DequantizeLinear", b.op("MaxPool", source.value, **attrs), source.scale, source.zero)


QUANTISED_RULES = (requantise_same, maximum_before_dequantise)
