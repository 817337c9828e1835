"""com.microsoft's quantised operators: element-wise, pooling, concatenation and products on 8-bit tensors.

Each expands in the order in which ONNX Runtime computes it: float arithmetic on dequantised numbers, or an
integer sum scaled once. Parameters are per tensor unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import Dim, ceil_divide, product
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, dtype_of, f32, i32, u8
from minicc.ops.helpers import Array, broadcast_shape, default_refuse
from minicc.ops.matmul import matmul_shape, unpack_bits
from minicc.ops.norm import as_type, axes_of, optional, required, reshaped
from minicc.ops.pool import POOL_ATTRS, average_pool_array, pool_type
from minicc.ops.quant import (
    centred,
    dequantise_array,
    dynamic_quantise_array,
    flat_scalar,
    integer_product,
    multiplier,
    quantise_array,
    quantised,
    requantise_array,
    spread,
)

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

_DOMAIN = "com.microsoft"


def tensor_scalar(b: Builder, x: Value | None) -> Value | None:
    """A per-tensor parameter as a scalar."""
    return None if x is None else reshaped(b, x, ())


def real_operand(b: Builder, node: Node, first: int) -> Value:
    """Inputs first..first+2 (numbers, scale, zero point) as float32."""
    scale = tensor_scalar(b, required(node, first + 1))
    assert scale is not None
    return b.op("Mul", centred(b, required(node, first), tensor_scalar(b, optional(node, first + 2))), scale)


def rounded_result(b: Builder, node: Node, real: Value, scale: int, *, zero_first: bool = False) -> Value:
    """A float32 value quantised with the parameters at inputs scale and scale + 1."""
    step = tensor_scalar(b, required(node, scale))
    assert step is not None
    ratio, zero = b.op("Div", real, step), tensor_scalar(b, optional(node, scale + 1))
    return quantised(b, ratio, zero, node.output.tensor.dtype, zero_first=zero_first)


def array_scalar(x: Array | None) -> Array | None:
    return None if x is None else x.reshape(())


# -- element-wise with two operands


def _pair_infer(n: Inference) -> list[TensorType]:
    return [TensorType(n.dtype(0), broadcast_shape(n, (0, 3)))]


def _pair_expand(operator: str) -> Callable[[Builder, Node], list[Value]]:
    def expand(b: Builder, node: Node) -> list[Value]:
        real = b.op(operator, real_operand(b, node, 0), real_operand(b, node, 3))
        return [rounded_result(b, node, real, 6, zero_first=True)]

    return expand


def _pair_eval(function: Any) -> Any:
    def evaluate(
        a: Array,
        a_scale: Array,
        a_zero: Array | None,
        b: Array,
        b_scale: Array,
        b_zero: Array | None,
        y_scale: Array,
        y_zero: Array | None = None,
    ) -> Array:
        real = function(dequantise_array(a, a_scale.reshape(()), array_scalar(a_zero)),
                        dequantise_array(b, b_scale.reshape(()), array_scalar(b_zero)))  # fmt: skip
        return quantise_array(real, y_scale.reshape(()), array_scalar(y_zero), dtype_of(a.dtype), zero_first=True)

    return evaluate


for _operator, _function in (("Add", np.add), ("Mul", np.multiply)):
    register(
        OpDef(
            f"QLinear{_operator}",
            Kind.EXPAND,
            infer=_pair_infer,
            eval=_pair_eval(_function),
            expand=_pair_expand(_operator),
            refuse=default_refuse,
            domain=_DOMAIN,
        )
    )


# -- functions of one operand (X, X_scale, X_zero_point, Y_scale, Y_zero_point)


def _same(n: Inference) -> list[TensorType]:
    return [n.type(0)]


def _single_expand(operator: str) -> Callable[[Builder, Node], list[Value]]:
    def expand(b: Builder, node: Node) -> list[Value]:
        return [rounded_result(b, node, b.op(operator, real_operand(b, node, 0), **node.attrs), 3)]

    return expand


def _single_eval(function: Any, *, zero_first: bool = False) -> Any:
    def evaluate(x: Array, x_scale: Array, x_zero: Array | None, y_scale: Array, y_zero: Array | None = None,
                 **attrs: Any) -> Array:  # fmt: skip
        real = function(dequantise_array(x, x_scale.reshape(()), array_scalar(x_zero)), **attrs)
        dtype = dtype_of(x.dtype)
        return quantise_array(real, y_scale.reshape(()), array_scalar(y_zero), dtype, zero_first=zero_first)

    return evaluate


register(OpDef(
    "QLinearSigmoid", Kind.EXPAND, infer=_same, eval=_single_eval(lambda x: 1 / (1 + np.exp(-x))),
    expand=_single_expand("Sigmoid"), refuse=default_refuse, domain=_DOMAIN,
))  # fmt: skip
register(
    OpDef(
        "QLinearLeakyRelu",
        Kind.EXPAND,
        infer=_same,
        eval=_single_eval(lambda x, alpha: np.where(x < 0, alpha * x, x)),
        expand=_single_expand("LeakyRelu"),
        refuse=default_refuse,
        attrs={"alpha": 0.01},
        domain=_DOMAIN,
    )
)


# -- pooling


def _pool_attrs(attrs: Any) -> dict[str, Any]:
    out = {k: v for k, v in attrs.items() if k != "channels_last"}
    return {**out, "layout": "NHWC"} if attrs["channels_last"] else out


def _average_pool_infer(n: Inference) -> list[TensorType]:
    return [pool_type(Inference(n.op, n.inputs, _pool_attrs(n.attrs), n.n_outputs, n.new_symbol, n.where))]


def _average_pool_expand(b: Builder, node: Node) -> list[Value]:
    real = b.op("AveragePool", real_operand(b, node, 0), **_pool_attrs(node.attrs))
    return [rounded_result(b, node, real, 3, zero_first=True)]


register(
    OpDef(
        "QLinearAveragePool",
        Kind.EXPAND,
        infer=_average_pool_infer,
        expand=_average_pool_expand,
        refuse=default_refuse,
        eval=_single_eval(lambda x, **attrs: average_pool_array(x, **_pool_attrs(attrs)), zero_first=True),
        domain=_DOMAIN,
        attrs={**POOL_ATTRS, "count_include_pad": 0, "channels_last": 0},
    )
)


def _global_axes(attrs: Any, rank: int) -> range:
    return range(1, rank - 1) if attrs["channels_last"] else range(2, rank)


def _global_infer(n: Inference) -> list[TensorType]:
    x = n.shape(0)
    return [
        TensorType(n.dtype(0), tuple(1 if a in _global_axes(n.attrs, len(x)) else d for a, d in enumerate(x)))
    ]


def _global_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    axes = _global_axes(node.attrs, x.tensor.rank)
    whole = as_type(b, x, i32)
    zero = optional(node, 2)
    if zero is not None:
        whole = b.op("Sub", whole, as_type(b, reshaped(b, zero, ()), i32))
    total = b.op("Cast", b.op("ReduceSum", whole, axes_of(b, axes), keepdims=1), to=f32)
    count = b.op("Cast", b.op("Reshape", b.shape([product(x.shape[a] for a in axes)]), b.shape([])), to=f32)
    steps = b.op("Mul", reshaped(b, required(node, 3), ()), count)
    ratio = b.op("Mul", total, b.op("Div", reshaped(b, required(node, 1), ()), steps))
    return [quantised(b, ratio, tensor_scalar(b, optional(node, 4)), node.output.tensor.dtype)]


def _global_eval(
    x: Array,
    x_scale: Array,
    x_zero: Array | None,
    y_scale: Array,
    y_zero: Array | None = None,
    *,
    channels_last: int,
) -> Array:
    axes = tuple(_global_axes({"channels_last": channels_last}, x.ndim))
    whole = x.astype(np.int32) - (0 if x_zero is None else np.int32(x_zero.reshape(())))
    count = np.float32(np.prod([x.shape[a] for a in axes]))
    total = whole.sum(axis=axes, keepdims=True).astype(np.float32)
    return requantise_array(
        total * (x_scale.reshape(()) / (y_scale.reshape(()) * count)), array_scalar(y_zero), dtype_of(x.dtype)
    )


register(OpDef(
    "QLinearGlobalAveragePool", Kind.EXPAND, infer=_global_infer, eval=_global_eval, expand=_global_expand,
    refuse=default_refuse, attrs={"channels_last": 0}, domain=_DOMAIN,
))  # fmt: skip


# -- QLinearConcat(Y_scale, Y_zero_point, then numbers, scale, zero point of each part)


def _concat_infer(n: Inference) -> list[TensorType]:
    shapes = [n.shape(i) for i in range(2, len(n.inputs), 3)]
    axis = n.axis(n.attr("axis"), len(shapes[0]))
    total = shapes[0][axis]
    for shape in shapes[1:]:
        total = total + shape[axis]
    return [TensorType(n.dtype(1), (*shapes[0][:axis], total, *shapes[0][axis + 1 :]))]


def _concat_expand(b: Builder, node: Node) -> list[Value]:
    parts = [rounded_result(b, node, real_operand(b, node, i), 0) for i in range(2, len(node.inputs), 3)]
    return [b.op("Concat", *parts, axis=node.attrs["axis"])]


def _concat_eval(y_scale: Array, y_zero: Array, *parts: Array, axis: int) -> Array:
    reals = [
        dequantise_array(parts[i], parts[i + 1].reshape(()), parts[i + 2].reshape(()))
        for i in range(0, len(parts), 3)
    ]
    return quantise_array(
        np.concatenate(reals, axis=axis), y_scale.reshape(()), y_zero.reshape(()), dtype_of(y_zero.dtype)
    )


register(
    OpDef(
        "QLinearConcat",
        Kind.EXPAND,
        infer=_concat_infer,
        eval=_concat_eval,
        expand=_concat_expand,
        refuse=default_refuse,
        attrs={"axis": REQUIRED},
        domain=_DOMAIN,
    )
)


# -- QGemm(A, a_scale, a_zero, B, b_scale, b_zero, C in int32, y_scale, y_zero); B per tensor or per column


def _qgemm_infer(n: Inference) -> list[TensorType]:
    a, w = n.shape(0), n.shape(3)
    shape = matmul_shape(n, a[::-1] if n.attr("transA") else a, w[::-1] if n.attr("transB") else w)
    return [TensorType(n.dtype(8) if n.has(8) else n.dtype(0) if n.has(7) else f32, shape)]


def _qgemm_expand(b: Builder, node: Node) -> list[Value]:
    a, w = required(node, 0), required(node, 3)
    a = b.op("Transpose", a, perm=[1, 0]) if node.attrs["transA"] else a
    w = b.op("Transpose", w, perm=[1, 0]) if node.attrs["transB"] else w
    total = b.op("MatMulInteger", a, w, tensor_scalar(b, optional(node, 2)), optional(node, 5))
    bias = optional(node, 6)
    if bias is not None:
        total = b.op("Add", total, bias)
    w_scale = required(node, 4)
    scale = multiplier(
        b, reshaped(b, required(node, 1), ()), reshaped(b, w_scale, flat_scalar(w_scale.shape)), None
    )
    if node.attrs["alpha"] != 1:
        scale = b.op("Mul", scale, b.scalar(node.attrs["alpha"], scale))
    out = optional(node, 7)
    if out is None:
        return [b.op("Mul", b.op("Cast", total, to=f32), scale)]
    ratio = b.op("Mul", b.op("Cast", total, to=f32), b.op("Div", scale, reshaped(b, out, ())))
    return [quantised(b, ratio, tensor_scalar(b, optional(node, 8)), node.output.tensor.dtype)]


def _qgemm_eval(
    a: Array,
    a_scale: Array,
    a_zero: Array | None,
    w: Array,
    w_scale: Array,
    w_zero: Array | None,
    c: Array | None = None,
    y_scale: Array | None = None,
    y_zero: Array | None = None,
    *,
    alpha: float,
    transA: int,
    transB: int,
) -> Array:
    total = integer_product(a.T if transA else a, w.T if transB else w, array_scalar(a_zero), w_zero)
    if c is not None:
        total = total + c
    scale = (np.float32(alpha) * a_scale.reshape(()) * w_scale).astype(np.float32)
    if y_scale is None:
        return np.asarray(total.astype(np.float32) * scale)
    dtype = dtype_of(a.dtype if y_zero is None else y_zero.dtype)
    return requantise_array(total.astype(np.float32) * (scale / y_scale.reshape(())), y_zero, dtype)


register(OpDef(
    "QGemm", Kind.EXPAND, infer=_qgemm_infer, eval=_qgemm_eval, expand=_qgemm_expand, refuse=default_refuse,
    attrs={"alpha": 1.0, "transA": 0, "transB": 0}, domain=_DOMAIN,
))  # fmt: skip


# -- MatMulIntegerToFloat, DynamicQuantizeMatMul


def _scaled_product(b: Builder, total: Value, a_scale: Value, w_scale: Value, bias: Value | None) -> Value:
    scale = b.op(
        "Mul",
        reshaped(b, a_scale, flat_scalar(a_scale.shape)),
        reshaped(b, w_scale, flat_scalar(w_scale.shape)),
    )
    out = b.op("Mul", as_type(b, total, f32), as_type(b, scale, f32))
    return out if bias is None else b.op("Add", out, as_type(b, bias, f32))


def _to_float_infer(n: Inference) -> list[TensorType]:
    return [TensorType(n.dtype(2), matmul_shape(n, n.shape(0), n.shape(1)))]


def _to_float_expand(b: Builder, node: Node) -> list[Value]:
    total = b.op("MatMulInteger", required(node, 0), required(node, 1), optional(node, 4), optional(node, 5))
    out = _scaled_product(b, total, required(node, 2), required(node, 3), optional(node, 6))
    return [as_type(b, out, node.output.tensor.dtype)]


def _to_float_eval(a: Array, w: Array, a_scale: Array, w_scale: Array, a_zero: Array | None = None,
                   w_zero: Array | None = None, bias: Array | None = None) -> Array:  # fmt: skip
    total = integer_product(a, w, a_zero, w_zero).astype(np.float32)
    out = total * (a_scale.astype(np.float32) * w_scale.astype(np.float32))
    return np.asarray(out if bias is None else out + bias).astype(a_scale.dtype)


register(OpDef(
    "MatMulIntegerToFloat", Kind.EXPAND, infer=_to_float_infer, eval=_to_float_eval, expand=_to_float_expand,
    refuse=default_refuse, domain=_DOMAIN,
))  # fmt: skip


def _dynamic_infer(n: Inference) -> list[TensorType]:
    return [TensorType(f32, matmul_shape(n, n.shape(0), n.shape(1)))]


def _dynamic_expand(b: Builder, node: Node) -> list[Value]:
    numbers, scale, zero = b.ops("DynamicQuantizeLinear", required(node, 0), outputs=3)
    total = b.op("MatMulInteger", numbers, required(node, 1), zero, optional(node, 3))
    return [_scaled_product(b, total, scale, required(node, 2), optional(node, 4))]


def _dynamic_eval(
    a: Array, w: Array, w_scale: Array, w_zero: Array | None = None, bias: Array | None = None
) -> Array:
    numbers, scale, zero = dynamic_quantise_array(a)
    return _to_float_eval(numbers, w, scale, w_scale, zero, w_zero, bias)


register(OpDef(
    "DynamicQuantizeMatMul", Kind.EXPAND, infer=_dynamic_infer, eval=_dynamic_eval, expand=_dynamic_expand,
    refuse=default_refuse, domain=_DOMAIN,
))  # fmt: skip


# -- GatherBlockQuantized: rows of a table of numbers of 4 or 8 bits, dequantised


def _packed_per_byte(n: Inference) -> int:
    """Numbers in an element of the table: bytes hold several."""
    return 8 // n.attr("bits") if n.dtype(0) == u8 else 1


def _gather_blocks_infer(n: Inference) -> list[TensorType]:
    table, scales = n.shape(0), n.shape(2)
    gathered, quantised_axis = n.axis(n.attr("gather_axis"), len(table)), n.axis(n.attr("quantize_axis"), len(table))
    if n.attr("bits") not in (4, 8) or n.attr("block_size") < 1:
        raise n.error("bits must be 4 or 8, and block_size at least 1")
    if gathered == quantised_axis:
        raise n.error("gather_axis and quantize_axis must differ")
    if _packed_per_byte(n) > 1 and quantised_axis != len(table) - 1:
        raise n.error("numbers packed into bytes must be quantised along the last axis")
    full = [*table[:-1], table[-1] * _packed_per_byte(n)]
    for axis, (size, known) in enumerate(zip(full, scales)):
        wanted = ceil_divide(size, n.attr("block_size")) if axis == quantised_axis else size
        if isinstance(wanted, int) and isinstance(known, int) and wanted != known:
            raise n.error(f"axis {axis} of the scales must be {wanted}, as block_size says")
    return [TensorType(n.dtype(2), (*full[:gathered], *n.shape(1), *full[gathered + 1 :]))]


def _gather_blocks_refuse(node: Node) -> str | None:
    table, rank = required(node, 0), required(node, 0).tensor.rank
    if table.tensor.dtype != u8:
        return "a table of 4-bit elements"
    if node.attrs["gather_axis"] % rank or node.attrs["quantize_axis"] % rank != rank - 1:
        return "rows that are not gathered along the first axis and quantised along the last"
    return default_refuse(node)


def _gather_blocks_expand(b: Builder, node: Node) -> list[Value]:
    table, indices, scales, zeros = required(node, 0), required(node, 1), required(node, 2), optional(node, 3)
    bits, block = node.attrs["bits"], node.attrs["block_size"]
    size = node.output.shape[-1]
    numbers = _unpacked(b, b.op("Gather", table, indices, axis=0), bits, size)
    factors = as_type(b, b.op("Gather", scales, indices, axis=0), f32)
    factors = spread(b, factors, numbers, -1, block)
    zero: Value = b.constant(np.float32(1 << (bits - 1)))
    if zeros is not None:
        points = _unpacked(b, b.op("Gather", zeros, indices, axis=0), bits, scales.shape[-1])
        zero = spread(b, points, numbers, -1, block)
    return [as_type(b, b.op("Mul", b.op("Sub", numbers, zero), factors), node.output.tensor.dtype)]


def _unpacked(b: Builder, packed: Value, bits: int, size: Dim) -> Value:
    """Bytes as `size` numbers along the last axis in float32, lowest bits first."""
    if bits == 8:
        return as_type(b, packed, f32)
    low = b.op("BitwiseAnd", packed, b.constant(np.uint8(15)))
    high = b.op("BitShift", packed, b.constant(np.uint8(4)), direction="RIGHT")
    axis, lead = b.shape([packed.tensor.rank]), packed.shape[:-1]
    pairs = b.op("Concat", b.op("Unsqueeze", low, axis), b.op("Unsqueeze", high, axis), axis=-1)
    whole = reshaped(b, pairs, (*lead, packed.shape[-1] * 2))
    if whole.shape[-1] != size:
        whole = b.op("Slice", whole, b.shape([0]), b.shape([size]), b.shape([packed.tensor.rank - 1]))
    return as_type(b, whole, f32)


def _gather_blocks_eval(
    table: Array, indices: Array, scales: Array, zeros: Array | None = None, *, bits: int, block_size: int, gather_axis: int,
    quantize_axis: int,
) -> Array:  # fmt: skip
    default = 0
    if table.dtype == np.uint8:
        default = 1 << (bits - 1)
        blocks = scales.shape[-1]
        table = unpack_bits(table, bits)
        zeros = None if zeros is None else unpack_bits(zeros, bits)[..., :blocks]
    axis = quantize_axis % table.ndim
    block_of = np.arange(table.shape[axis]) // block_size
    points = np.full(scales.shape, default) if zeros is None else zeros.astype(np.int64)
    wide = (table.astype(np.int64) - np.take(points, block_of, axis)).astype(np.float32)
    found = wide * np.take(scales, block_of, axis).astype(np.float32)
    return np.asarray(np.take(found, indices, gather_axis % table.ndim).astype(scales.dtype))


register(
    OpDef(
        "GatherBlockQuantized",
        Kind.EXPAND,
        infer=_gather_blocks_infer,
        eval=_gather_blocks_eval,
        expand=_gather_blocks_expand,
        refuse=_gather_blocks_refuse,
        domain=_DOMAIN,
        attrs={"bits": 4, "block_size": 128, "gather_axis": 0, "quantize_axis": 1},
    )
)
