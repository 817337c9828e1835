"""Conversions between element types.

Numbers convert as in C (floats truncate towards zero, integers keep their low bits); strings and the 8-bit
float formats are converted on the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import SymbolicDim, lower_bound
from minicc.ir.expr import Expr, cast
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import KERNEL_DTYPES, DType, Type, bf16, boolean, dtype_of, f16, string
from minicc.ops.helpers import (
    Array,
    Contents,
    certainly_positive,
    default_refuse,
    element_type,
    is_plain,
    propagate_by_eval,
)
from minicc.ops.ratios import Ratio, ratios

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

_FLOAT8 = ("f8e4m3fn", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz")


def convert(x: Array, to: DType, *, saturate: bool = True, round_mode: str = "up") -> Array:
    """An array converted to an element type by ONNX's rules.

    saturate: values beyond the range of an 8-bit float become its largest instead of NaN or infinity.
    round_mode: "up", "down" or "nearest", for the exponent-only type f8e8m0.
    """
    with np.errstate(all="ignore"):
        if to == string:
            return np.asarray(x.astype(np.str_)).astype(object)
        if x.dtype == object:
            return _from_strings(x, to)
        if to.name == "f8e8m0":
            return _to_exponent(x, saturate, round_mode).view(to.numpy)
        if to.name in _FLOAT8 and saturate:
            import ml_dtypes

            info = ml_dtypes.finfo(to.numpy)
            wide = x.astype(np.float64)
            return np.clip(wide, float(info.min), float(info.max)).astype(x.dtype).astype(to.numpy)
        return x.astype(to.numpy)


def _from_strings(x: Array, to: DType) -> Array:
    if to.is_integer:
        numbers: list[Any] = [int(v) if v.strip().lstrip("+-").isdigit() else int(float(v)) for v in x.flat]
        return np.array(numbers, dtype=to.numpy).reshape(x.shape)
    return np.array([float(v) for v in x.flat], dtype=np.float64).reshape(x.shape).astype(to.numpy)


def _to_exponent(x: Array, saturate: bool, round_mode: str) -> Array:
    """The biased exponents (uint8) of f8e8m0: powers of two from 2**-127 on, 255 for NaN and infinity."""
    bits = np.ascontiguousarray(x.astype(np.float32)).view(np.uint32)
    exponent = ((bits >> 23) & 0xFF).astype(np.int32)
    mantissa = bits & 0x7FFFFF
    above = {"up": mantissa > 0, "down": mantissa < 0}.get(round_mode)
    if above is None:  # nearest, ties up (the lowest bit of a power of two counts as odd)
        above = (mantissa > 0x400000) | ((mantissa == 0x400000) & (exponent > 0))
    limit = 254 if saturate else 255
    return np.where(exponent == 255, 255, np.minimum(exponent + above, limit)).astype(np.uint8)


def _cast_infer(n: Inference) -> list[Type]:
    return [n.type(0).with_dtype(element_type(n.attr("to")))]


def _cast_content(n: Inference) -> Contents:
    source, target = n.dtype(0), n.op.infer(n)[0].dtype  # type: ignore[union-attr]
    known = propagate_by_eval(n)
    content = n.content(0)
    if known[0] is not None or target not in KERNEL_DTYPES or target in (f16, bf16):
        return known
    if source.is_float and target.is_integer:
        return _truncated(n)
    if content is None or is_plain(content):
        return known
    out = content.copy()
    for position, value in enumerate(content.flat):
        if target == boolean and isinstance(value, SymbolicDim):
            if not certainly_positive(value):
                return known
            out.flat[position] = True
        elif isinstance(value, bool | np.bool_) and target != boolean:
            out.flat[position] = int(value)
    return [out]


def _truncated(n: Inference) -> Contents:
    """Float to integer: the whole part, which is the floor where nothing is negative."""
    found = ratios(n.inputs[0])
    if found is None:
        return [None]
    out = np.empty(found.shape, dtype=object)
    flat = out.reshape(-1)
    for position, ratio in enumerate(found.flat):
        assert isinstance(ratio, Ratio)
        low = lower_bound(ratio.numerator)
        whole = ratio.whole() if low is None or low < 0 else ratio.floor()
        if whole is None:
            return [None]
        flat[position] = whole
    return [out]


def _cast_eval(x: Array, *, to: DType | int, saturate: int, round_mode: str) -> Array:
    return convert(x, element_type(to), saturate=bool(saturate), round_mode=round_mode)


def _cast(x: Expr, *, to: DType | int, saturate: int, round_mode: str) -> Expr:
    return cast(x, element_type(to))


register(OpDef(
    "Cast", Kind.POINTWISE, infer=_cast_infer, propagate=_cast_content, refuse=default_refuse,
    eval=_cast_eval, compute=_cast, attrs={"to": REQUIRED, "saturate": 1, "round_mode": "up"},
))  # fmt: skip


def _cast_like_infer(n: Inference) -> list[Type]:
    return [n.type(0).with_dtype(n.dtype(1))]


def _cast_like_eval(x: Array, like: Array, *, saturate: int, round_mode: str) -> Array:
    return convert(x, dtype_of(like.dtype), saturate=bool(saturate), round_mode=round_mode)


def _cast_like(b: Builder, node: Node) -> list[Value]:
    x, like = node.inputs
    assert x is not None and like is not None
    return [b.op("Cast", x, to=like.tensor.dtype, **node.attrs)]


register(OpDef(
    "CastLike", Kind.EXPAND, infer=_cast_like_infer, eval=_cast_like_eval, expand=_cast_like,
    attrs={"saturate": 1, "round_mode": "up"},
))  # fmt: skip


def _bit_cast_infer(n: Inference) -> list[Type]:
    target = element_type(n.attr("to"))
    if target.bits != n.dtype(0).bits or string in (target, n.dtype(0)):
        raise n.error(f"cannot reinterpret {n.dtype(0)} as {target}: the widths differ")
    return [n.type(0).with_dtype(target)]


register(OpDef(
    "BitCast", Kind.HOST, infer=_bit_cast_infer, attrs={"to": REQUIRED},
    eval=lambda x, *, to: np.ascontiguousarray(x).view(element_type(to).numpy).reshape(x.shape),
))  # fmt: skip
