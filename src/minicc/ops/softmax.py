"""Softmax, LogSoftmax and Hardmax, expanded into reductions over their axis and pointwise ops.

The maximum is subtracted first, so no input overflows. Half types are computed in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import TensorType
from minicc.ops.helpers import Array, computed_in_f32, default_refuse, same_as_float_input
from minicc.ops.norm import as_type, axes_of, required, widened

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value


def _infer(n: Inference) -> list[TensorType]:
    n.axis(n.attr("axis"), n.rank(0))
    return same_as_float_input(n)  # type: ignore[return-value]


def softmax(b: Builder, x: Value, axis: int) -> Value:
    """exp(x - max) / sum(exp(x - max)) over one axis, in the type of x."""
    wide = widened(b, x)
    axes = axes_of(b, [axis % x.tensor.rank])
    powers = b.op("Exp", b.op("Sub", wide, b.op("ReduceMax", wide, axes, keepdims=1)))
    return as_type(b, b.op("Div", powers, b.op("ReduceSum", powers, axes, keepdims=1)), x.tensor.dtype)


def _softmax_expand(b: Builder, node: Node) -> list[Value]:
    return [softmax(b, required(node, 0), node.attrs["axis"])]


@computed_in_f32
def softmax_array(x: Array, *, axis: int) -> Array:
    """Softmax of an array."""
    if x.size == 0:
        return x
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def _log_softmax_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    wide = widened(b, x)
    axes = axes_of(b, [node.attrs["axis"] % x.tensor.rank])
    shifted = b.op("Sub", wide, b.op("ReduceMax", wide, axes, keepdims=1))
    total = b.op("Log", b.op("ReduceSum", b.op("Exp", shifted), axes, keepdims=1))
    return [as_type(b, b.op("Sub", shifted, total), x.tensor.dtype)]


@computed_in_f32
def _log_softmax_eval(x: Array, *, axis: int) -> Array:
    if x.size == 0:
        return x
    shifted = x - x.max(axis=axis, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)))


def _hardmax_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    axis = node.attrs["axis"] % x.tensor.rank
    size = x.shape[axis]
    best = b.op("ArgMax", x, axis=axis, keepdims=1, select_last_index=0)
    bounds = [b.op("Reshape", b.shape([v]), b.constant(np.array([], dtype=np.int64))) for v in (0, size, 1)]
    places = b.constant(np.arange(size)) if isinstance(size, int) else b.op("Range", *bounds)
    places = b.op("Reshape", places, b.shape([size, *(1,) * (x.tensor.rank - axis - 1)]))
    return [b.op("Cast", b.op("Equal", places, best), to=x.tensor.dtype)]


def _hardmax_eval(x: Array, *, axis: int) -> Array:
    out = np.zeros(x.shape, dtype=x.dtype)
    if x.size:
        np.put_along_axis(out, np.expand_dims(x.astype(np.float64).argmax(axis=axis), axis), 1, axis=axis)
    return out


for _name, _expand, _eval in (
    ("Softmax", _softmax_expand, softmax_array),
    ("LogSoftmax", _log_softmax_expand, _log_softmax_eval),
    ("Hardmax", _hardmax_expand, _hardmax_eval),
):
    register(
        OpDef(
            _name,
            Kind.EXPAND,
            infer=_infer,
            eval=_eval,
            expand=_expand,
            refuse=default_refuse,
            attrs={"axis": -1},
        )
    )
