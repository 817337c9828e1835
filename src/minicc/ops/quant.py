"""Quantisation: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear, QLinearConv, QLinearMatMul.

All expand: integer sums by MatMulInteger and ConvInteger, then float scaling, rounding half to even, and
saturation. Types below 8 bits and 8-bit floats have no kernels and run by `eval`. The operators of
com.microsoft are in `quant_microsoft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import Dim, ceil_divide
from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import DType, TensorType, dtype_of, f32, i8, i16, i32, u8, u16
from minicc.ops.cast import convert
from minicc.ops.conv import CONV_ATTRS, conv_type, convolve
from minicc.ops.helpers import Array, default_refuse, element_type, widen
from minicc.ops.matmul import matmul_shape
from minicc.ops.norm import as_type, axes_of, optional, required, reshaped
from minicc.ops.spatial import from_channels_first, to_channels_first

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

_RANGES = {"i2": (-2, 1), "u2": (0, 3), "i4": (-8, 7), "u4": (0, 15)}


def range_of(dtype: DType) -> tuple[int, int]:
    """The smallest and largest number of an integer type."""
    if dtype.name in _RANGES:
        return _RANGES[dtype.name]
    info = np.iinfo(dtype.numpy)
    return int(info.min), int(info.max)


# -- granularity: one scale for a tensor, for each position of an axis, or for blocks along an axis


def spread_shape(scale: Sequence[Dim], x: Sequence[Dim], axis: int) -> tuple[Dim, ...] | None:
    """The shape that lets a scale broadcast against x; None for blocks, which have the rank of x."""
    if len(scale) == 0 or (len(scale) == 1 and scale[0] == 1):
        return ()
    if len(scale) == 1:
        return (scale[0], *(1,) * (len(x) - 1 - axis % len(x)))
    return None


def _spread_array(scale: Array, x: Sequence[int], axis: int, block: int) -> Array:
    shape = spread_shape(scale.shape, x, axis)
    if shape is not None:
        return scale.reshape(shape)
    axis %= len(x)
    size = block or -(-x[axis] // scale.shape[axis])
    return np.repeat(scale, size, axis=axis)[(slice(None),) * axis + (slice(x[axis]),)]


def spread(b: Builder, scale: Value, x: Value, axis: int, block: int) -> Value:
    """A scale or zero point made to broadcast against x."""
    shape = spread_shape(scale.shape, x.shape, axis)
    if shape is not None:
        return reshaped(b, scale, shape)
    axis %= x.tensor.rank
    size: Dim = block or ceil_divide(x.shape[axis], scale.shape[axis])
    before, after = scale.shape[:axis], scale.shape[axis + 1 :]
    each = reshaped(b, scale, (*before, scale.shape[axis], 1, *after))
    each = b.op("Expand", each, b.shape([*before, scale.shape[axis], size, *after]))
    whole = reshaped(b, each, (*before, scale.shape[axis] * size, *after))
    if whole.shape[axis] == x.shape[axis]:
        return whole
    return b.op("Slice", whole, b.shape([0]), b.shape([x.shape[axis]]), b.shape([axis]))


def _check_granularity(n: Inference, scale: int, zero: int) -> None:
    x, s = n.shape(0), n.shape(scale)
    if n.has(zero) and len(n.shape(zero)) != len(s) and n.type(zero).size != n.type(scale).size:
        raise n.error("scale and zero point must have the same shape")
    if len(s) > 1 and len(s) != len(x):
        raise n.error("a scale must be a scalar, a vector, or have the rank of the input")
    if len(s) == 1 and s[0] != 1:
        size = x[n.axis(n.attr("axis"), len(x))]
        if isinstance(size, int) and isinstance(s[0], int) and size != s[0]:
            raise n.error(f"{s[0]} scales for an axis of size {size}")


# -- building blocks of expansions


def quantised(
    b: Builder, ratio: Value, zero: Value | None, dtype: DType, *, zero_first: bool = False
) -> Value:
    """saturate(round(ratio) + zero) as `dtype`; the ratio is a float.

    zero_first: round(ratio + zero) instead, which rounds halves the other way for odd zero points.
    """
    low, high = range_of(dtype)
    if zero is not None and zero_first:
        ratio = b.op("Add", ratio, as_type(b, zero, ratio.tensor.dtype))
    out = b.op("Round", ratio)
    if zero is not None and not zero_first:
        out = b.op("Add", out, as_type(b, zero, out.tensor.dtype))
    return b.op("Cast", b.op("Clip", out, b.scalar(low, out), b.scalar(high, out)), to=dtype)


def centred(b: Builder, x: Value, zero: Value | None) -> Value:
    """x - zero in float32; small integers are exact there, 32-bit ones are subtracted as integers first."""
    if zero is None:
        return as_type(b, x, f32)
    if x.tensor.dtype.bits > 16:
        return b.op("Cast", b.op("Sub", as_type(b, x, i32), as_type(b, zero, i32)), to=f32)
    return b.op("Sub", as_type(b, x, f32), as_type(b, zero, f32))


def quantise_array(
    x: Array, scale: Array, zero: Array | None, dtype: DType, *, zero_first: bool = False
) -> Array:
    """saturate(round(x / scale) + zero) of arrays that broadcast; zero_first as in `quantised`."""
    with np.errstate(all="ignore"):
        ratio = widen(x) / widen(scale)
        point = np.float32(0) if zero is None else zero.astype(np.int32).astype(ratio.dtype)
        rounded = np.rint(ratio + point) if zero_first else np.rint(ratio) + point
        low, high = range_of(dtype)
        return (
            np.asarray(np.clip(np.nan_to_num(rounded, nan=0.0), low, high))
            .astype(np.int64)
            .astype(dtype.numpy)
        )


def dequantise_array(x: Array, scale: Array, zero: Array | None) -> Array:
    """(x - zero) * scale in float32, of arrays that broadcast."""
    if x.dtype.kind not in "iu" and "int" not in x.dtype.name:
        number = x.astype(np.float32)
    else:
        wide = x.astype(np.int64)
        number = (wide if zero is None else wide - zero.astype(np.int64)).astype(np.float32)
    return np.asarray(number * scale.astype(np.float32))


# -- QuantizeLinear


def _quantise_infer(n: Inference) -> list[TensorType]:
    _check_granularity(n, 1, 2)
    attr = n.attr("output_dtype")
    given = element_type(attr) if attr else None
    if n.has(2) and given is not None and given != n.dtype(2):
        raise n.error(f"output_dtype is {given}, the zero point is {n.dtype(2)}")
    return [TensorType(n.dtype(2) if n.has(2) else given or u8, n.shape(0))]


def _quantise_refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is None and node.output.tensor.dtype not in (i8, u8, i16, u16):
        return f"no kernel for quantisation to {node.output.tensor.dtype}"
    return reason


def _quantise_expand(b: Builder, node: Node) -> list[Value]:
    x, scale, zero = required(node, 0), required(node, 1), optional(node, 2)
    axis, block = node.attrs["axis"], node.attrs["block_size"]
    spread_scale = as_type(b, spread(b, scale, x, axis, block), f32)
    spread_zero = None if zero is None else spread(b, zero, x, axis, block)
    return [
        quantised(b, b.op("Div", as_type(b, x, f32), spread_scale), spread_zero, node.output.tensor.dtype)
    ]


def _quantise_eval(
    x: Array,
    scale: Array,
    zero: Array | None = None,
    *,
    axis: int,
    block_size: int,
    output_dtype: int,
    precision: int,
    saturate: int,
) -> Array:
    dtype = dtype_of(zero.dtype) if zero is not None else element_type(output_dtype) if output_dtype else u8
    wide_scale = _spread_array(scale, x.shape, axis, block_size)
    wide_zero = None if zero is None else _spread_array(zero, x.shape, axis, block_size)
    if precision:
        compute = element_type(precision).numpy
        x, wide_scale = (
            (x.astype(compute) / wide_scale.astype(compute)).astype(np.float32),
            np.ones((), np.float32),
        )
    if dtype.is_float:
        with np.errstate(all="ignore"):
            number = widen(x) / widen(wide_scale)
            if wide_zero is not None:
                number = number + wide_zero.astype(np.float32)
        return convert(number.astype(np.float32), dtype, saturate=bool(saturate))
    return quantise_array(x, wide_scale, wide_zero, dtype)


# -- DequantizeLinear


def _dequantise_infer(n: Inference) -> list[TensorType]:
    _check_granularity(n, 1, 2)
    attr = n.attr("output_dtype")
    return [TensorType(element_type(attr) if attr else n.dtype(1), n.shape(0))]


def _dequantise_expand(b: Builder, node: Node) -> list[Value]:
    x, scale, zero = required(node, 0), required(node, 1), optional(node, 2)
    axis, block = node.attrs["axis"], node.attrs["block_size"]
    spread_scale = as_type(b, spread(b, scale, x, axis, block), f32)
    spread_zero = None if zero is None else spread(b, zero, x, axis, block)
    return [as_type(b, b.op("Mul", centred(b, x, spread_zero), spread_scale), node.output.tensor.dtype)]


def _dequantise_eval(
    x: Array, scale: Array, zero: Array | None = None, *, axis: int, block_size: int, output_dtype: int
) -> Array:
    wide_scale = _spread_array(scale, x.shape, axis, block_size)
    wide_zero = None if zero is None else _spread_array(zero, x.shape, axis, block_size)
    out = dequantise_array(x, wide_scale, wide_zero)
    return out.astype(element_type(output_dtype).numpy if output_dtype else scale.dtype)


for _domain in ("", "com.microsoft"):
    register(OpDef(
        "QuantizeLinear", Kind.EXPAND, infer=_quantise_infer, eval=_quantise_eval, expand=_quantise_expand,
        refuse=_quantise_refuse, domain=_domain,
        attrs={"axis": 1, "block_size": 0, "output_dtype": 0, "precision": 0, "saturate": 1},
    ))  # fmt: skip
    register(
        OpDef(
            "DequantizeLinear",
            Kind.EXPAND,
            infer=_dequantise_infer,
            eval=_dequantise_eval,
            expand=_dequantise_expand,
            refuse=default_refuse,
            attrs={"axis": 1, "block_size": 0, "output_dtype": 0},
            domain=_domain,
        )
    )


# -- DynamicQuantizeLinear


def _dynamic_infer(n: Inference) -> list[TensorType]:
    return [TensorType(u8, n.shape(0)), TensorType(f32, ()), TensorType(u8, ())]


def _dynamic_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    zero = b.scalar(0, x)
    axes = axes_of(b, range(x.tensor.rank))
    low = b.op("Min", b.op("ReduceMin", x, axes, keepdims=0), zero)
    high = b.op("Max", b.op("ReduceMax", x, axes, keepdims=0), zero)
    extent = b.op("Sub", high, low)
    scale = b.op("Where", b.op("Equal", extent, zero), b.scalar(1, x), b.op("Div", extent, b.scalar(255, x)))
    point = b.op("Clip", b.op("Div", b.op("Neg", low), scale), zero, b.scalar(255, x))
    point = b.op("Round", point)
    return [quantised(b, b.op("Div", x, scale), point, u8), scale, b.op("Cast", point, to=u8)][
        : len(node.outputs)
    ]


def dynamic_quantise_array(x: Array) -> tuple[Array, Array, Array]:
    """(numbers in u8, scale, zero point) of an array, by its range extended to include 0."""
    low, high = min(np.float32(0), x.min(initial=0)), max(np.float32(0), x.max(initial=0))
    scale = np.float32(1) if high == low else np.float32((high - low) / np.float32(255))
    zero = np.uint8(np.rint(np.clip(-low / scale, 0, 255)))
    return quantise_array(x, np.asarray(scale), np.asarray(zero), u8), np.asarray(scale), np.asarray(zero)


register(
    OpDef(
        "DynamicQuantizeLinear",
        Kind.EXPAND,
        infer=_dynamic_infer,
        eval=dynamic_quantise_array,
        expand=_dynamic_expand,
        refuse=default_refuse,
    )
)


# -- QLinearMatMul


def along_rows(scale: Sequence[Any]) -> tuple[Any, ...]:
    """The shape that makes the scale of a left operand broadcast against the product: a vector runs along
    rows.
    """
    return tuple(scale) if len(scale) != 1 else () if scale[0] == 1 else (scale[0], 1)


def flat_scalar(shape: Sequence[Any]) -> tuple[Any, ...]:
    """The shape of a per-tensor parameter given as a scalar or a vector of one; others stay."""
    return () if tuple(shape) == (1,) else tuple(shape)


def multiplier(b: Builder, left: Value, right: Value, out: Value | None) -> Value:
    """left * right / out in float32: what turns an integer sum into the result."""
    product = b.op("Mul", as_type(b, left, f32), as_type(b, right, f32))
    return (
        product
        if out is None
        else b.op("Div", product, as_type(b, reshaped(b, out, flat_scalar(out.shape)), f32))
    )


def _qlinear_matmul_infer(n: Inference) -> list[TensorType]:
    return [TensorType(n.dtype(7), matmul_shape(n, n.shape(0), n.shape(3)))]


def _qlinear_matmul_expand(b: Builder, node: Node) -> list[Value]:
    a, a_scale, a_zero, w, w_scale, w_zero, y_scale, y_zero = (required(node, i) for i in range(8))
    total = b.op("Cast", b.op("MatMulInteger", a, w, a_zero, w_zero), to=f32)
    left, right = (
        reshaped(b, a_scale, along_rows(a_scale.shape)),
        reshaped(b, w_scale, flat_scalar(w_scale.shape)),
    )
    ratio = b.op("Mul", total, multiplier(b, left, right, y_scale))
    return [quantised(b, ratio, reshaped(b, y_zero, flat_scalar(y_zero.shape)), node.output.tensor.dtype)]


def integer_product(a: Array, b: Array, a_zero: Array | None, b_zero: Array | None) -> Array:
    """(a - a_zero) @ (b - b_zero) in int32; a vector of zero points of a runs along rows."""
    left, right = a.astype(np.int32), b.astype(np.int32)
    if a_zero is not None:
        left = left - a_zero.astype(np.int32).reshape(along_rows(a_zero.shape))
    if b_zero is not None:
        right = right - b_zero.astype(np.int32).reshape(flat_scalar(b_zero.shape))
    return np.asarray(left @ right)


def _qlinear_matmul_eval(
    a: Array,
    a_scale: Array,
    a_zero: Array,
    b: Array,
    b_scale: Array,
    b_zero: Array,
    y_scale: Array,
    y_zero: Array,
) -> Array:
    total = integer_product(a, b, a_zero, b_zero).astype(np.float32)
    scale = a_scale.astype(np.float32).reshape(along_rows(a_scale.shape)) * b_scale.astype(np.float32)
    return requantise_array(total * (scale / y_scale.astype(np.float32)), y_zero, dtype_of(y_zero.dtype))


def requantise_array(ratio: Array, zero: Array | None, dtype: DType) -> Array:
    """saturate(round(ratio) + zero)."""
    point = None if zero is None else zero.reshape(flat_scalar(zero.shape))
    return quantise_array(ratio, np.ones((), np.float32), point, dtype)


register(
    OpDef(
        "QLinearMatMul",
        Kind.EXPAND,
        infer=_qlinear_matmul_infer,
        eval=_qlinear_matmul_eval,
        expand=_qlinear_matmul_expand,
        refuse=default_refuse,
    )
)


# -- QLinearConv


def _layout(attrs: Any) -> dict[str, Any]:
    """Attributes of a convolution; com.microsoft says channels_last where we say layout."""
    out = {k: attrs[k] for k in CONV_ATTRS}
    return {**out, "layout": "NHWC"} if attrs.get("channels_last") else out


def _qlinear_conv_infer(n: Inference) -> list[TensorType]:
    attrs = _layout(n.attrs)
    inner = Inference(n.op, n.inputs, attrs, n.n_outputs, n.new_symbol, n.where)
    return [conv_type(inner, 0, 3, n.dtype(7))]


def _per_channel(b: Builder, x: Value, rank: int, layout: str) -> Value:
    if x.tensor.rank == 0 or x.shape == (1,):
        return reshaped(b, x, ())
    return x if layout == "NHWC" else reshaped(b, x, (*x.shape, *(1,) * (rank - 2)))


def _qlinear_conv_expand(b: Builder, node: Node) -> list[Value]:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = (required(node, i) for i in range(8))
    attrs, rank = _layout(node.attrs), x.tensor.rank
    total = b.op("ConvInteger", x, w, x_zero, w_zero, **attrs)
    bias = optional(node, 8)
    if bias is not None:
        total = b.op("Add", total, _per_channel(b, bias, rank, attrs["layout"]))
    scale = multiplier(b, reshaped(b, x_scale, ()), _per_channel(b, w_scale, rank, attrs["layout"]), y_scale)
    ratio = b.op("Mul", b.op("Cast", total, to=f32), scale)
    return [quantised(b, ratio, reshaped(b, y_zero, flat_scalar(y_zero.shape)), node.output.tensor.dtype)]


def _qlinear_conv_eval(
    x: Array,
    x_scale: Array,
    x_zero: Array,
    w: Array,
    w_scale: Array,
    w_zero: Array,
    y_scale: Array,
    y_zero: Array,
    bias: Array | None = None,
    **attrs: Any,
) -> Array:
    attrs = _layout(attrs)
    channel = (-1, *(1,) * (w.ndim - 1))
    image = to_channels_first(x, attrs["layout"]).astype(np.int32) - np.int32(x_zero.reshape(-1)[0])
    total = convolve(image, w.astype(np.int32) - w_zero.astype(np.int32).reshape(channel), attrs)
    if bias is not None:
        total = total + bias.reshape(channel[:-1])
    scale = x_scale.reshape(()) * w_scale / y_scale.reshape(())
    out = requantise_array(
        total.astype(np.float32) * scale.astype(np.float32).reshape(channel[:-1]),
        y_zero,
        dtype_of(y_zero.dtype),
    )
    return from_channels_first(out, attrs["layout"])


register(
    OpDef(
        "QLinearConv",
        Kind.EXPAND,
        infer=_qlinear_conv_infer,
        eval=_qlinear_conv_eval,
        expand=_qlinear_conv_expand,
        refuse=default_refuse,
        attrs=CONV_ATTRS,
    )
)
register(
    OpDef(
        "QLinearConv",
        Kind.EXPAND,
        infer=_qlinear_conv_infer,
        eval=_qlinear_conv_eval,
        expand=_qlinear_conv_expand,
        refuse=default_refuse,
        attrs={**CONV_ATTRS, "channels_last": 0},
        domain="com.microsoft",
    )
)
