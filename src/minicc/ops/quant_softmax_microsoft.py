"""com.microsoft's quantised softmax, choice and mean.

Where ONNX Runtime lets a number of QLinearSoftmax that is above the range of int8 wrap around, it saturates here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import product
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, boolean, dtype_of
from minicc.ops.helpers import Array, axis_list, broadcast_shape, default_refuse, require_same_dtype
from minicc.ops.norm import axes_of, optional, required, reshaped
from minicc.ops.quant import dequantise_array, quantise_array, quantised
from minicc.ops.quant_microsoft import array_scalar, real_operand, rounded_result, tensor_scalar
from minicc.ops.softmax import softmax, softmax_array

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

_DOMAIN = "com.microsoft"
_COERCED_BEFORE = 13  # older softmaxes treat all the axes from the given one as one


# -- QLinearSoftmax(X, X_scale, X_zero_point, Y_scale, Y_zero_point)


def _softmax_infer(n: Inference) -> list[TensorType]:
    n.axis(n.attr("axis"), n.rank(0))
    return [n.type(0)]


def _softmax_expand(b: Builder, node: Node) -> list[Value]:
    """The result is counted in steps of which a whole number makes 1, as ONNX Runtime does."""
    x, shape = required(node, 0), required(node, 0).shape
    axis = node.attrs["axis"] % len(shape)
    scale, step = (tensor_scalar(b, required(node, i)) for i in (1, 3))
    assert scale is not None and step is not None
    real = b.op("Mul", b.op("Cast", x, to=scale.tensor.dtype), scale)  # softmax does not see the zero point
    if node.attrs["opset"] < _COERCED_BEFORE:
        rows = reshaped(b, real, (product(shape[:axis]), product(shape[axis:])))
        share = reshaped(b, softmax(b, rows, 1), shape)
    else:
        share = softmax(b, real, axis)
    ratio = b.op("Mul", share, b.op("Floor", b.op("Reciprocal", step)))
    return [quantised(b, ratio, tensor_scalar(b, optional(node, 4)), x.tensor.dtype)]


def _softmax_eval(
    x: Array, x_scale: Array, x_zero: Array | None, y_scale: Array, y_zero: Array | None = None, *, axis: int, opset: int
) -> Array:
    real = dequantise_array(x, x_scale.reshape(()), array_scalar(x_zero))
    rows = real.reshape(int(np.prod(x.shape[: axis % x.ndim])), -1) if opset < _COERCED_BEFORE else real
    share = softmax_array(rows, axis=1 if opset < _COERCED_BEFORE else axis).reshape(x.shape)
    steps = np.floor(np.float32(1) / y_scale.reshape(()))
    return quantise_array(share * steps, np.ones((), np.float32), array_scalar(y_zero), dtype_of(x.dtype))


register(OpDef(
    "QLinearSoftmax", Kind.EXPAND, infer=_softmax_infer, eval=_softmax_eval, expand=_softmax_expand, refuse=default_refuse,
    attrs={"axis": -1, "opset": REQUIRED}, domain=_DOMAIN,
))  # fmt: skip


# -- QLinearWhere(condition, then numbers, scale and zero point of both sides, then scale and zero point of the result)


def _where_infer(n: Inference) -> list[TensorType]:
    if n.dtype(0) != boolean:
        raise n.error("the condition must be bool")
    return [TensorType(require_same_dtype(n, (1, 4)), broadcast_shape(n, (0, 1, 4)))]


def _where_expand(b: Builder, node: Node) -> list[Value]:
    """Both sides are quantised before one is chosen, so that sides of the result's parameters stay as they are."""
    sides = [rounded_result(b, node, real_operand(b, node, i), 7) for i in (1, 4)]
    return [b.op("Where", required(node, 0), *sides)]


def _where_eval(condition: Array, x: Array, x_scale: Array, x_zero: Array, y: Array, y_scale: Array, y_zero: Array,
                z_scale: Array, z_zero: Array) -> Array:  # fmt: skip
    left, right = (
        dequantise_array(numbers, scale.reshape(()), array_scalar(zero))
        for numbers, scale, zero in ((x, x_scale, x_zero), (y, y_scale, y_zero))
    )
    chosen = np.where(condition, left, right)
    return quantise_array(chosen, z_scale.reshape(()), array_scalar(z_zero), dtype_of(x.dtype))


register(OpDef(
    "QLinearWhere", Kind.EXPAND, infer=_where_infer, eval=_where_eval, expand=_where_expand, refuse=default_refuse,
    domain=_DOMAIN,
))  # fmt: skip


# -- QLinearReduceMean(data, its scale and zero point, scale and zero point of the result)


def _mean_axes(attrs: Mapping[str, Any], rank: int) -> list[int]:
    return [a % rank for a in attrs["axes"]] if attrs["axes"] else list(range(rank))


def _mean_infer(n: Inference) -> list[TensorType]:
    x = n.shape(0)
    axes = axis_list(n, n.attr("axes") or range(len(x)), len(x))
    kept = n.attr("keepdims")
    return [TensorType(n.dtype(0), tuple(1 if a in axes else d for a, d in enumerate(x) if kept or a not in axes))]


def _mean_expand(b: Builder, node: Node) -> list[Value]:
    axes = axes_of(b, _mean_axes(node.attrs, required(node, 0).tensor.rank))
    mean = b.op("ReduceMean", real_operand(b, node, 0), axes, keepdims=node.attrs["keepdims"])
    return [rounded_result(b, node, mean, 3)]


def _mean_eval(x: Array, x_scale: Array, x_zero: Array | None, y_scale: Array, y_zero: Array | None = None,
               **attrs: Any) -> Array:  # fmt: skip
    real = dequantise_array(x, x_scale.reshape(()), array_scalar(x_zero))
    mean = real.mean(axis=tuple(_mean_axes(attrs, x.ndim)), keepdims=bool(attrs["keepdims"]), dtype=np.float32)
    return quantise_array(np.asarray(mean), y_scale.reshape(()), array_scalar(y_zero), dtype_of(x.dtype))


register(OpDef(
    "QLinearReduceMean", Kind.EXPAND, infer=_mean_infer, eval=_mean_eval, expand=_mean_expand, refuse=default_refuse,
    attrs={"axes": REQUIRED, "keepdims": REQUIRED}, domain=_DOMAIN,
))  # fmt: skip
