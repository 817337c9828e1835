"""Older forms of ONNX operators, from opset 6 on, turned into the newest form.

`UPGRADES` is the whole knowledge: for each operator, functions and the opset below which they apply, run in
order. A function edits the node in place (attributes, inputs, operator) or returns the values that replace
it. They look at ranks but never at sizes, because a loop body may be given other sizes later. Operators
that only gained types or attributes with neutral defaults need no entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minicc.errors import InvalidModelError
from minicc.ir.graph import Builder, Value
from minicc.ir.types import TensorType

OLDEST_FORM = 6


@dataclass
class OnnxNode:
    """An ONNX node on its way into the graph: inputs are values (None: left out), attributes plain data."""

    op: str
    domain: str
    opset: int
    inputs: list[Value | None]
    attrs: dict[str, Any]
    n_outputs: int
    where: str

    def input(self, i: int) -> Value:
        """A required input. Raises InvalidModelError when it is missing."""
        value = self.inputs[i] if i < len(self.inputs) else None
        if value is None:
            raise InvalidModelError(f"{self.op}: input {i} is missing", where=self.where)
        return value

    def set_input(self, i: int, value: Value | None) -> None:
        self.inputs.extend([None] * (i + 1 - len(self.inputs)))
        self.inputs[i] = value


Upgrade = Callable[[OnnxNode, Builder], Sequence[Value] | None]


def upgrade(node: OnnxNode, b: Builder) -> Sequence[Value] | None:
    """Bring a node of ai.onnx to the newest form in place, or return the values that replace it."""
    for below, function in UPGRADES.get(node.op, ()):
        if node.opset < below:
            replaced = function(node, b)
            if replaced is not None:
                return replaced
    return None


def _int64(b: Builder, items: Any) -> Value:
    return b.constant(np.array(list(items) if isinstance(items, range) else items, dtype=np.int64))


def _attribute_to_input(name: str, position: int) -> Upgrade:
    """An attribute of integers that became an int64 input."""

    def apply(node: OnnxNode, b: Builder) -> None:
        if name in node.attrs:
            node.set_input(position, _int64(b, node.attrs.pop(name)))

    return apply


def _drop(*names: str) -> Upgrade:
    def apply(node: OnnxNode, b: Builder) -> None:  # noqa: ARG001
        for name in names:
            node.attrs.pop(name, None)

    return apply


def _rename_values(name: str, default: str, new_names: dict[str, str]) -> Upgrade:
    """A text attribute whose values got new names, or whose default changed."""

    def apply(node: OnnxNode, b: Builder) -> None:  # noqa: ARG001
        value = node.attrs.get(name, default)
        node.attrs[name] = new_names.get(value, value)

    return apply


def _softmax(node: OnnxNode, b: Builder) -> Sequence[Value] | None:
    """Below opset 13 Softmax, LogSoftmax and Hardmax worked on the input flattened to a matrix at `axis`."""
    x, axis = node.input(0), int(node.attrs.get("axis", 1))
    rank = len(x.tensor.shape) if x.tensor.shape is not None else None
    if rank is not None and axis in (rank - 1, -1):
        node.attrs["axis"] = -1
        return None
    flat = b.op("Flatten", x, axis=axis)
    return (b.op("Reshape", b.op(node.op, flat, axis=-1), b.op("Shape", x)),)


def _clip(node: OnnxNode, b: Builder) -> None:
    for position, name in ((1, "min"), (2, "max")):
        if name in node.attrs:
            node.set_input(position, b.scalar(node.attrs.pop(name), node.input(0)))


def _dropout(node: OnnxNode, b: Builder) -> Sequence[Value] | None:
    """Inference only before opset 12; before 10 the mask had the type of the data."""
    node.attrs.clear()
    if node.opset < 10 and node.n_outputs > 1:
        y, mask = b.ops("Dropout", node.input(0), outputs=2)
        return y, b.op("CastLike", mask, node.input(0))
    return None


def _batch_normalization(node: OnnxNode, b: Builder) -> Sequence[Value] | None:
    """Below opset 9 `spatial=0` gave every position its own statistics; extra outputs meant training."""
    spatial = node.attrs.pop("spatial", 1)
    if not spatial:
        x, scale, bias, mean, variance = (node.input(i) for i in range(5))
        epsilon = b.scalar(node.attrs.get("epsilon", 1e-5), x)
        normal = b.op("Div", b.op("Sub", x, mean), b.op("Sqrt", b.op("Add", variance, epsilon)))
        return (b.op("Add", b.op("Mul", normal, scale), bias),)
    return None


def _batch_normalization_outputs(node: OnnxNode, b: Builder) -> None:  # noqa: ARG001
    if node.n_outputs > 1:
        raise InvalidModelError(
            "BatchNormalization in training form", where=node.where, hint="export the model for inference"
        )


def _upsample(node: OnnxNode, b: Builder) -> None:
    """Upsample is Resize with asymmetric coordinates, taking the lower neighbour."""
    scales = node.attrs.pop("scales", None)
    given = b.constant(np.array(scales, dtype=np.float32)) if scales is not None else node.input(1)
    node.op, node.inputs = "Resize", [node.input(0), None, given]
    _old_resize(node)


def _resize_10(node: OnnxNode, b: Builder) -> None:  # noqa: ARG001
    node.inputs = [node.input(0), None, node.input(1)]
    _old_resize(node)


def _old_resize(node: OnnxNode) -> None:
    """Rounding as ONNX Runtime's: down when enlarging, up when shrinking."""
    scales = node.input(2).data
    shrinks = scales is not None and bool((scales < 1).any())
    node.attrs.update(
        coordinate_transformation_mode="asymmetric",
        nearest_mode="ceil" if shrinks else "floor",
        mode=node.attrs.get("mode", "nearest"),
    )


def _resize(node: OnnxNode, b: Builder) -> None:  # noqa: ARG001
    """Empty tensors stood for left-out inputs; `tf_half_pixel_for_nn` went away in opset 13."""
    for i in range(1, len(node.inputs)):
        value = node.inputs[i]
        if value is not None and isinstance(value.type, TensorType) and value.type.shape == (0,):
            node.inputs[i] = None
    while node.inputs and node.inputs[-1] is None:
        node.inputs.pop()
    if node.attrs.get("coordinate_transformation_mode") == "tf_half_pixel_for_nn":
        node.attrs.update(coordinate_transformation_mode="half_pixel", nearest_mode="round_prefer_ceil")


def _slice(node: OnnxNode, b: Builder) -> None:
    for position, name in ((1, "starts"), (2, "ends"), (3, "axes")):
        if name in node.attrs:
            node.set_input(position, _int64(b, node.attrs.pop(name)))
    node.input(2)


def _pad(node: OnnxNode, b: Builder) -> None:
    node.set_input(1, _int64(b, node.attrs.pop("pads", ())))
    value = node.attrs.pop("value", 0.0)
    if value:
        node.set_input(2, b.scalar(value, node.input(0)))


def _split(node: OnnxNode, b: Builder) -> None:  # noqa: ARG001
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attrs["num_outputs"] = node.n_outputs


def _scatter(node: OnnxNode, b: Builder) -> None:  # noqa: ARG001
    node.op = "ScatterElements"


def _top_k(node: OnnxNode, b: Builder) -> None:
    if "k" in node.attrs:
        node.set_input(1, _int64(b, [node.attrs.pop("k")]))


def _group_normalization(node: OnnxNode, b: Builder) -> None:
    """Below opset 21 scale and bias had one element per group, not per channel."""
    groups = _int64(b, [node.attrs.get("num_groups", 1)])
    channels = b.op("Shape", node.input(0), start=1, end=2)
    repeated = b.op("Concat", groups, b.op("Div", channels, groups), axis=0)
    for i in (1, 2):
        column = b.op("Unsqueeze", node.input(i), _int64(b, [1]))
        node.inputs[i] = b.op("Reshape", b.op("Expand", column, repeated), _int64(b, [-1]))


def _dft(node: OnnxNode, b: Builder) -> None:
    """Opset 17 had the axis as attribute, 1 by default; the newest form has an input, -2 by default."""
    node.set_input(2, _int64(b, node.attrs.pop("axis", 1)))


def _mean_variance(node: OnnxNode, b: Builder) -> None:  # noqa: ARG001
    """Below opset 9 `across_channels` and `normalize_variance` could be given."""
    if node.attrs.pop("across_channels", 0):
        node.attrs["axes"] = (0, 1, 2, 3)
    node.attrs.pop("normalize_variance", None)


def _axes(below: int) -> list[tuple[int, Upgrade]]:
    return [(below, _attribute_to_input("axes", 1))]


def _broadcast_6(node: OnnxNode, b: Builder) -> None:
    """Below opset 7 the second operand was aligned at `axis` of the first, by default at its end."""
    axis = node.attrs.pop("axis", None)
    if not node.attrs.pop("broadcast", 0) or axis is None:
        return
    ranks = [node.input(i).tensor.shape for i in (0, 1)]
    if ranks[0] is None or ranks[1] is None:
        raise InvalidModelError(f"{node.op} with axis needs inputs of known rank", where=node.where)
    rank, inner = len(ranks[0]), len(ranks[1])
    behind = rank - (axis + rank if axis < 0 else axis) - inner
    if behind > 0:
        node.inputs[1] = b.op("Unsqueeze", node.input(1), _int64(b, range(inner, inner + behind)))


def _prelu_6(node: OnnxNode, b: Builder) -> None:
    """Below opset 7 a slope of rank 1 belonged to the channels on axis 1."""
    x, slope = node.input(0).tensor, node.input(1).tensor
    if x.shape is not None and slope.shape is not None and len(slope.shape) == 1 and len(x.shape) > 2:
        node.inputs[1] = b.op("Unsqueeze", node.input(1), _int64(b, range(1, len(x.shape) - 1)))


_EVERY = 1 << 30

# operator -> (opset below which it applies, what to do), in order
UPGRADES: dict[str, list[tuple[int, Upgrade]]] = {
    "Softmax": [(13, _softmax)],
    "LogSoftmax": [(13, _softmax)],
    "Hardmax": [(13, _softmax)],
    "Clip": [(11, _clip)],
    "Dropout": [(12, _dropout), (_EVERY, _drop("seed"))],
    "BatchNormalization": [
        (7, _drop("is_test", "consumed_inputs")),
        (9, _batch_normalization),
        (14, _batch_normalization_outputs),
    ],
    **{
        name: [(7, _broadcast_6)]
        for name in (
            "Add",
            "Sub",
            "Mul",
            "Div",
            "Pow",
            "And",
            "Or",
            "Xor",
            "Equal",
            "Greater",
            "Less",
        )
    },
    "PRelu": [(7, _prelu_6)],
    "Gemm": [(7, _drop("broadcast"))],
    **{name: [(7, _drop("output_sequence"))] for name in ("GRU", "LSTM", "RNN")},
    "Upsample": [(10, _upsample)],
    "Resize": [(11, _resize_10), (_EVERY, _resize)],
    "Slice": [(10, _slice)],
    "Pad": [(11, _pad)],
    "Split": [(13, _attribute_to_input("split", 1)), (18, _split)],
    "Squeeze": _axes(13),
    "Unsqueeze": _axes(13),
    "ReduceSum": _axes(13),
    **{
        name: _axes(18)
        for name in (
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSumSquare",
        )
    },
    "Scatter": [(11, _scatter)],
    "TopK": [(10, _top_k)],
    "GroupNormalization": [(21, _group_normalization)],
    "RoiAlign": [(16, _rename_values("coordinate_transformation_mode", "output_half_pixel", {}))],
    "GridSample": [(20, _rename_values("mode", "bilinear", {"bilinear": "linear", "bicubic": "cubic"}))],
    "DFT": [(20, _dft)],
    "MeanVarianceNormalization": [(9, _mean_variance)],
}
