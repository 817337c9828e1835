"""resize-by-axis: an interpolation that enlarges along several axes becomes one Resize for each, the innermost first.

The sums are the same in the same order, but a result reads two values instead of four (linear in two axes), and behind
the first Resize whole lines are computed from whole lines, without positions of their own. What lies between is at most
half as large as the result. Where many channels lie side by side positions cost little, and Resize stays whole.
"""

from __future__ import annotations

import numpy as np

from minicc.ir.dims import Dim, exact_quotient
from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.types import TensorType, f32
from minicc.ops.resize import AxisPlan, plan
from minicc.passes.common import estimate, replacement, visit_bodies
from minicc.passes.manager import PassContext

NAME = "resize-by-axis"
# Values side by side from which on computing their position once costs little.
LONG_RUN = 64


def resize_by_axis(graph: Graph, context: PassContext) -> int:
    """Split every Resize for which it is legal and worth it, unless the target does not want it; returns their number."""
    if not context.resize_by_axis:
        return 0
    changes = visit_bodies(graph, lambda body: resize_by_axis(body, context))
    for node in list(graph.nodes):
        if node.op.name != "Resize" or node.op.domain:
            continue
        plans = _interpolated(node)
        reason = "it is not an interpolation of known sizes" if plans is None else not_worth(node, plans)
        if plans is None or reason:
            context.refusals[NAME, reason] += 1
            continue
        new = _by_axis(Builder(graph, node.origin), node, plans)
        graph.replace(node.output, replacement(graph, node.output, new, node.origin))
        context.rules[NAME] += 1
        changes += 1
    graph.tidy()
    return changes


def _interpolated(node: Node) -> list[AxisPlan] | None:
    """The axes that change, when each may be resized by itself."""
    x, attrs = node.inputs[0], node.attrs
    if x is None or not isinstance(x.type, TensorType) or x.type.shape is None or x.type.dtype != f32 or node.symbols:
        return None
    whole = attrs["mode"] == "nearest" or attrs["antialias"] or attrs["keep_aspect_ratio_policy"] != "stretch"
    if whole or attrs["coordinate_transformation_mode"] == "tf_crop_and_resize":
        return None
    contents = [v.content if v is not None else None for v in (*node.inputs[1:], None, None, None)[:3]]
    plans = plan(attrs, x.shape, *contents)
    if plans is None or (not _by_size(node) and any(p.scale is None for p in plans)):
        return None
    return [p for p in plans if not p.unchanged]


def _by_size(node: Node) -> bool:
    sizes = node.inputs[3] if len(node.inputs) > 3 else None
    return sizes is not None and 0 not in sizes.shape


def not_worth(node: Node, plans: list[AxisPlan]) -> str:
    """Why splitting would cost more than it saves; empty when it pays."""
    if len(plans) < 2:
        return "one axis changes"
    if not all(_doubles(p) for p in plans):
        return "what lies between would be about as large as the result"
    if estimate(node.output.shape[max(p.axis for p in plans) + 1 :]) >= LONG_RUN:
        return "many values have one position"
    return ""


def _doubles(p: AxisPlan) -> bool:
    if p.scale is not None:
        return p.scale >= 2
    factor = exact_quotient(p.target, p.source)
    return isinstance(factor, int) and factor >= 2


def _by_axis(b: Builder, node: Node, plans: list[AxisPlan]) -> Value:
    value = node.inputs[0]
    assert value is not None
    attrs = {**node.attrs, "axes": None}
    for p in sorted(plans, key=lambda p: -p.axis):
        sizes: list[Dim] = list(value.shape)
        sizes[p.axis] = p.target
        if _by_size(node):
            value = b.op("Resize", value, None, None, b.shape(sizes), **attrs)
        else:
            scales = np.ones(len(sizes), np.float32)
            scales[p.axis] = p.scale
            value = b.op("Resize", value, None, b.constant(scales), **attrs)
    return value
