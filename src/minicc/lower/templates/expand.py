"""A depthwise convolution together with the 1x1 convolution and the activation that make its input: template `conv_expand`.

Fusion asks `expansion_refusal` whether it is worth it and within what the template does; then it is lowered as one step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minicc.ir.dims import Dim, product
from minicc.ir.graph import Graph, Node, Value
from minicc.ir.types import f32
from minicc.kernels.domain import ACTIVATIONS, UNBOUNDED, band_lines, panel_columns
from minicc.lower.context import Lowering
from minicc.lower.templates import common
from minicc.ops.spatial import window
from minicc.targets.cpu import CpuTarget
from minicc.targets.parse import Target

# Bytes of the expanded array from which on it does not stay in a core's cache beside what else passes through. Smaller ones
# gained little (measured: 1.16 at 600 KB, 0.95 to 1.08 at 300 to 450 KB), as a product over many channels has no part in it.
WORTH_BYTES = 1 << 19

Refusal = Callable[[Sequence[Node], Node], str]
Bounds = tuple[str, int, int]


def expansion_refusal(target: Target) -> Refusal:
    """Why a target does not compute a depthwise convolution together with the nodes that make its input; "" when it does."""

    def refusal(region: Sequence[Node], node: Node) -> str:
        if not isinstance(target, CpuTarget):
            return "the target has no kernel for both"
        return _legal(region, node) or _worth(region[0], node, target)

    return refusal


def _legal(region: Sequence[Node], node: Node) -> str:
    first = region[0]
    for conv in (first, node):
        values = [v for v in (*conv.inputs, conv.output) if v is not None]
        if conv.op.name != "Conv" or conv.op.domain or conv.attrs["layout"] != "NHWC":
            return "it is not two convolutions, channels last"
        if any(v.tensor.dtype != f32 for v in values) or any(v.data is None for v in values[1:-1]):
            return "the weights are not constant float32 values"
        if len(conv.output.shape) != 4 or not all(isinstance(d, int) for d in conv.output.shape[1:]):
            return "sizes of the image are not known at compile time"
    (x, weights, *_), (expanded, taps, *_) = first.inputs, node.inputs
    assert x is not None and weights is not None and expanded is not None and taps is not None
    point, own = window(first.attrs, weights.shape[2:], x.shape[1:3]), window(node.attrs, taps.shape[2:], expanded.shape[1:3])
    padded = any(point.padded(a) for a in range(2))
    if first.attrs["group"] != 1 or set(weights.shape[2:]) != {1} or set(point.strides) != {1} or padded:
        return "the first is not a plain 1x1 convolution"
    if node.attrs["group"] != taps.shape[0] or taps.shape[1] != 1 or taps.shape[0] != weights.shape[0]:
        return "the second is not depthwise"
    if not common.along_lines(own, taps.shape[2:]):
        return "taps along the line are too many or too far apart"
    return "" if activation_of(region) is not None else "what lies between is not an activation that the template knows"


def _worth(first: Node, node: Node, target: CpuTarget) -> str:
    _, height, width, channels = first.output.shape
    if 4 * height * width * channels < WORTH_BYTES:  # type: ignore[operator]
        return "the array between them stays in cache"
    own = window(node.attrs, node.inputs[1].shape[2:], (height, width))  # type: ignore[union-attr]
    line = width * panel_columns(target, channels)  # type: ignore[operator, arg-type]
    fits = band_lines(own.span(0), own.strides[0], line, target)  # type: ignore[arg-type]
    return "" if fits else "its lines are too long"


def activation_of(region: Sequence[Node]) -> Bounds | None:
    """(activation, lower bound, upper bound) as constants of the template for what follows the first node of a region."""
    if len(region) == 1:
        return "none", -UNBOUNDED, UNBOUNDED
    first, second, *rest = region
    if second.inputs[0] is not first.output:
        return None
    kind = second.op.name
    if kind == "Sigmoid" and len(rest) == 1 and rest[0].op.name == "Mul":
        return ("silu", -UNBOUNDED, UNBOUNDED) if set(rest[0].inputs) == {first.output, second.output} else None
    if rest:
        return None
    if kind == "Relu":
        return "none", 0, UNBOUNDED
    if kind == "HardSwish":
        return "hard_swish", -UNBOUNDED, UNBOUNDED
    if kind == "Swish" and second.attrs["alpha"] == 1:
        return "silu", -UNBOUNDED, UNBOUNDED
    return _clip(second) if kind == "Clip" else None


def _clip(node: Node) -> Bounds | None:
    found = []
    for value, missing in zip((*node.inputs[1:], None, None), (-UNBOUNDED, UNBOUNDED)):
        if value is None:
            found.append(missing)
            continue
        if value.data is None:
            return None
        bound = float(value.data.reshape(-1)[0]) * 100
        if not bound.is_integer() or abs(bound) >= UNBOUNDED:
            return None
        found.append(int(bound))
    return "none", found[0], found[1]


def expanding_nodes(node: Node, lead: Node | None) -> list[Node]:
    """The nodes of a fused body before its lead, which make the lead's input."""
    if lead is None:
        return []
    body: Graph = node.attrs["body"]
    return body.nodes[: body.nodes.index(lead)]


def expansion_constants(region: Sequence[Node]) -> dict[str, int]:
    """The template's constants about what makes its input."""
    found = activation_of(region)
    assert found is not None
    return {"ACTIVATION": ACTIVATIONS.index(found[0]), "LOW": found[1], "HIGH": found[2]}


def filled_bias(low: Lowering, first: Node, columns: int) -> int:
    """The bias of a 1x1 convolution as long as whole panels; zeros where it has none."""
    weights = first.inputs[1]
    bias = first.inputs[2] if len(first.inputs) > 2 else None
    assert weights is not None and weights.data is not None
    key = ("bias_panels", id(bias.data) if bias is not None else id(weights.data), columns)
    if key not in low.constants:
        channels = weights.data.shape[0]
        filled: np.ndarray[Any, Any] = np.zeros(-(-channels // columns) * columns, np.float32)
        if bias is not None and bias.data is not None:
            filled[:channels] = bias.data
        low.constant(filled, f"{(bias or weights).name}_panels", key)
    return low.constants[key]


def expansion_flops(first: Node) -> Dim:
    """Of a 1x1 convolution."""
    weights: Value | None = first.inputs[1]
    assert weights is not None
    return product(first.output.shape) * weights.shape[1] * 2
