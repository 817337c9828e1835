"""Affine folding: what scales, shifts or pads a convolution or a product goes into its weights, bias or pads.

    conv(x, w) * s + t = conv(x, w * s) + t            s, t per output channel
    conv(x * s, w)     = conv(x, w * s)                s per input channel
    conv(x + t, w)     = conv(x, w) + sum(w * t)       when nothing is padded

BatchNormalization is s = scale / sqrt(var + epsilon), t = bias - mean * s (Ioffe and Szegedy, 2015), also where an exporter wrote
it out as Mul and Add. New weights are computed in float64 and rounded once. A value somebody else reads stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minicc.ir.graph import Graph, Node, Value
from minicc.ir.types import TensorType
from minicc.passes.common import visit_bodies
from minicc.passes.manager import PassContext

Array = np.ndarray[Any, Any]
LINEAR = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def fold_affine(graph: Graph, context: PassContext) -> int:
    """Apply every fold until none applies, also in bodies of control flow; returns how many were applied."""
    changes = visit_bodies(graph, lambda body: fold_affine(body, context))
    again = True
    while again:
        again = False
        for node in list(graph.nodes):
            fold = _FOLDS.get(node.op.name) if not node.op.domain else None
            alive = bool(node.output.uses) or node.output in graph.outputs
            if fold is not None and alive and fold(graph, node):
                changes += 1
                again = True
        graph.tidy()
    return changes


def _only_read_here(graph: Graph, value: Value) -> bool:
    return len(value.uses) == 1 and value not in graph.outputs


def _linear_producer(graph: Graph, value: Value | None) -> Node | None:
    """The convolution or product that computes `value` for a single reader from constant float weights."""
    if value is None or value.producer is None or not _only_read_here(graph, value):
        return None
    node = value.producer
    if node.op.domain or node.op.name not in LINEAR or node.attrs.get("layout", "NCHW") != "NCHW":
        return None
    weights = node.inputs[1]
    if weights is None or weights.data is None or weights.data.dtype.kind != "f" or weights.data.ndim < 2:
        return None
    bias = _bias(node)
    if bias is not None and bias.data is None:
        return None
    return node if isinstance(value.type, TensorType) and value.type.shape is not None else None


def _bias(node: Node) -> Value | None:
    return node.inputs[2] if node.op.name != "MatMul" and len(node.inputs) > 2 else None


def _out_channels(node: Node) -> int:
    weights = node.inputs[1]
    assert weights is not None and weights.data is not None
    shape = weights.data.shape
    if node.op.name == "Conv":
        return int(shape[0])
    if node.op.name == "ConvTranspose":
        return int(shape[1] * node.attrs["group"])
    if node.op.name == "Gemm":
        return int(shape[0] if node.attrs["transB"] else shape[1])
    return int(shape[-1])


def _channel_vector(constant: Value | None, rank: int, axis: int, channels: int) -> Array | None:
    """A constant that varies along one axis of a value of `rank` dimensions only, as a float64 vector; else None."""
    if constant is None or constant.data is None or constant.data.dtype.kind != "f" or constant.data.ndim > rank:
        return None
    shape = (1,) * (rank - constant.data.ndim) + constant.data.shape
    if any(size != 1 for a, size in enumerate(shape) if a != axis) or shape[axis] not in (1, channels):
        return None
    return np.broadcast_to(constant.data.astype(np.float64).reshape(-1), (channels,))


def _channel_axis(node: Node) -> int:
    return 1 if node.op.name in ("Conv", "ConvTranspose") else len(node.output.shape) - 1


def _scaled_weights(node: Node, scale: Array) -> Array:
    """Weights whose output channels are multiplied by `scale`, in float64."""
    weights = node.inputs[1]
    assert weights is not None and weights.data is not None
    w = weights.data.astype(np.float64)
    if node.op.name == "Conv":
        return w * scale.reshape(-1, *([1] * (w.ndim - 1)))
    if node.op.name == "ConvTranspose":
        groups = node.attrs["group"]
        split = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
        return (split * scale.reshape(groups, 1, -1, *([1] * (w.ndim - 2)))).reshape(w.shape)
    if node.op.name == "Gemm" and node.attrs["transB"]:
        return w * scale[:, None]
    return w * scale


def _fold_after(graph: Graph, reader: Node, linear: Node, scale: Array | None, shift: Array | None) -> bool:
    """Replace linear -> reader by one linear node with scaled weights and shifted bias."""
    name, channels = linear.op.name, _out_channels(linear)
    if name == "MatMul" and shift is not None:
        return False  # a product has no bias input; the epilogue adds it
    weights, bias = linear.inputs[1], _bias(linear)
    assert weights is not None and weights.data is not None
    dtype = weights.data.dtype
    factor = np.ones(channels) if scale is None else scale
    inputs = list(linear.inputs[:2])
    if scale is not None:
        inputs[1] = graph.constant(_scaled_weights(linear, factor).astype(dtype), weights.name)
    if name != "MatMul":
        beta = linear.attrs["beta"] if name == "Gemm" else 1.0
        total = np.zeros(channels) if shift is None else shift.copy()
        if bias is not None and bias.data is not None:
            if name == "Gemm" and bias.data.size not in (1, channels):
                return False
            total = total + factor * beta * bias.data.astype(np.float64).reshape(-1)
        if bias is not None or shift is not None:
            inputs.append(graph.constant(total.astype(dtype), bias.name if bias is not None else ""))
    attrs = {**linear.attrs, "beta": 1.0} if name == "Gemm" else linear.attrs
    _replace(graph, reader, linear, inputs, attrs, (linear, reader))
    return True


def _replace(graph: Graph, old: Node, like: Node, inputs: Sequence[Value | None], attrs: dict[str, Any],
             origins: Sequence[Node]) -> None:  # fmt: skip
    """A node of the op of `like` in place of `old`."""
    origin = tuple(dict.fromkeys(name for node in origins for name in node.origin))
    new = graph.add(like.op, inputs, attrs, origin=origin, names=[old.output.name])
    graph.replace(old.output, new.output)


def _fold_batch_normalization(graph: Graph, node: Node) -> bool:
    if node.attrs.get("training_mode") or any(v.uses for v in node.outputs[1:]):
        return False
    arrays = [v.data if v is not None else None for v in node.inputs[1:5]]
    if any(a is None or a.dtype.kind != "f" for a in arrays):
        return False
    gamma, beta, mean, variance = (a.astype(np.float64) for a in arrays if a is not None)
    scale = gamma / np.sqrt(variance + node.attrs["epsilon"])
    shift = beta - mean * scale
    linear = _linear_producer(graph, node.inputs[0])
    if linear is not None and _out_channels(linear) == len(scale) and _channel_axis(linear) == 1:
        return _fold_after(graph, node, linear, scale, shift)
    return _fold_before(graph, node, scale, shift)


def _fold_scale(graph: Graph, node: Node) -> bool:
    """Mul or Div by a constant per channel."""
    divide = node.op.name == "Div"
    for position in (0,) if divide else (0, 1):
        value, constant = node.inputs[position], node.inputs[1 - position]
        linear = _linear_producer(graph, value)
        if linear is not None and value is not None and node.output.shape == value.shape:
            vector = _channel_vector(constant, len(value.shape), _channel_axis(linear), _out_channels(linear))
            if vector is not None and not (divide and not np.all(vector)):
                return _fold_after(graph, node, linear, 1.0 / vector if divide else vector, None)
        vector = _input_vector(node, value, constant)
        if vector is not None and not (divide and not np.all(vector)):
            return _fold_before(graph, node, 1.0 / vector if divide else vector, None, position)
    return False


def _fold_shift(graph: Graph, node: Node) -> bool:
    """Add or Sub of a constant per channel."""
    subtract = node.op.name == "Sub"
    for position in (0,) if subtract else (0, 1):
        value, constant = node.inputs[position], node.inputs[1 - position]
        linear = _linear_producer(graph, value)
        if linear is not None and value is not None and node.output.shape == value.shape:
            vector = _channel_vector(constant, len(value.shape), _channel_axis(linear), _out_channels(linear))
            if vector is not None:
                return _fold_after(graph, node, linear, None, -vector if subtract else vector)
        vector = _input_vector(node, value, constant)
        if vector is not None:
            return _fold_before(graph, node, None, -vector if subtract else vector, position)
    return False


def _input_vector(node: Node, value: Value | None, constant: Value | None) -> Array | None:
    """The constant per channel (axis 1) of an activation about to be convolved."""
    if value is None or not isinstance(value.type, TensorType) or value.type.shape is None or len(value.type.shape) < 3:
        return None
    channels = value.type.shape[1]
    if not isinstance(channels, int) or node.output.tensor.shape != value.type.shape:
        return None
    return _channel_vector(constant, len(value.type.shape), 1, channels)


def _fold_before(graph: Graph, node: Node, scale: Array | None, shift: Array | None, position: int = 0) -> bool:
    """Into the weights of the one convolution that reads the result."""
    if not _only_read_here(graph, node.output):
        return False
    reader, at = node.output.uses[0]
    if reader.op.domain or reader.op.name != "Conv" or at != 0 or reader.attrs["layout"] != "NCHW":
        return False
    weights = reader.inputs[1]
    bias = reader.inputs[2] if len(reader.inputs) > 2 else None
    if weights is None or weights.data is None or weights.data.dtype.kind != "f" or (bias is not None and bias.data is None):
        return False
    if shift is not None and np.any(shift) and not _unpadded(reader):
        return False  # the padding would have to hold -shift / scale
    groups = reader.attrs["group"]
    w = weights.data.astype(np.float64)
    split = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])

    def column(vector: Array) -> Array:
        return vector.reshape(groups, 1, -1, *([1] * (w.ndim - 2)))

    inputs = [node.inputs[position], weights, bias]
    if shift is not None and np.any(shift):
        added = (split * column(shift)).sum(axis=tuple(range(2, split.ndim))).reshape(-1)
        total = added if bias is None or bias.data is None else added + bias.data.astype(np.float64)
        inputs[2] = graph.constant(total.astype(weights.data.dtype))
    if scale is not None:
        inputs[1] = graph.constant((split * column(scale)).reshape(w.shape).astype(weights.data.dtype), weights.name)
    _replace(graph, reader, reader, inputs if inputs[2] is not None else inputs[:2], reader.attrs, (node, reader))
    return True


def _unpadded(conv: Node) -> bool:
    return conv.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID", "") and not any(conv.attrs.get("pads") or ())


def _fold_pad(graph: Graph, node: Node) -> bool:
    """Zero padding of spatial axes into the pads of a convolution or of an average that counts its padding."""
    source = node.inputs[0]
    if node.attrs.get("mode", "constant") != "constant" or not _only_read_here(graph, node.output) or source is None:
        return False
    reader, at = node.output.uses[0]
    if reader.op.domain or reader.op.name not in ("Conv", "AveragePool") or at != 0:
        return False
    if reader.attrs.get("layout", "NCHW") != "NCHW" or reader.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID", ""):
        return False
    if not isinstance(source.type, TensorType) or source.type.shape is None:
        return False
    pads = _pads_by_axis(node, len(source.type.shape))
    if pads is None or any(p != (0, 0) for p in pads[:2]) or any(p < 0 for pair in pads for p in pair):
        return False
    spatial = pads[2:]
    own = list(reader.attrs.get("pads") or [0] * (2 * len(spatial)))
    attrs = {**reader.attrs, "auto_pad": "NOTSET"}
    if reader.op.name == "AveragePool":
        if any(own) or reader.attrs.get("ceil_mode"):
            return False
        attrs["count_include_pad"] = 1
    attrs["pads"] = tuple(own[i] + p[0] for i, p in enumerate(spatial)) + tuple(
        own[len(spatial) + i] + p[1] for i, p in enumerate(spatial))  # fmt: skip
    _replace(graph, reader, reader, [source, *reader.inputs[1:]], attrs, (node, reader))
    return True


def _pads_by_axis(node: Node, rank: int) -> list[tuple[int, int]] | None:
    """(before, after) of every axis of a zero Pad with known pads, else None."""
    contents = [v.content if v is not None else None for v in node.inputs[1:4]]
    pads = contents[0] if contents else None
    if pads is None or not all(isinstance(p, int) for p in pads.flat):
        return None
    value = contents[1] if len(contents) > 1 else None
    if len(node.inputs) > 2 and node.inputs[2] is not None and (value is None or any(v != 0 for v in value.flat)):
        return None
    axes = list(range(rank))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        if contents[2] is None:
            return None
        axes = [int(a) % rank for a in contents[2].flat]
    numbers = [int(p) for p in pads.flat]
    out = [(0, 0)] * rank
    for i, axis in enumerate(axes):
        out[axis] = (numbers[i], numbers[len(axes) + i])
    return out


_FOLDS: dict[str, Callable[[Graph, Node], bool]] = {
    "BatchNormalization": _fold_batch_normalization,
    "Mul": _fold_scale,
    "Div": _fold_scale,
    "Add": _fold_shift,
    "Sub": _fold_shift,
    "Pad": _fold_pad,
}
