"""Arithmetic, logic and comparison, element by element, with numpy broadcasting.

Activation functions are in activations, conversions in cast. `compute` sees operands of the node's own
element types; half types are printed in float32 and rounded where they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from minicc.ir import expr
from minicc.ir.dims import Dim, exact_quotient, floor_divide, maximum, minimum, modulo, product
from minicc.ir.expr import Expr, binary, cast, const, equal, isnan, select, unary
from minicc.ir.opdef import Content, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, Type, boolean, f64
from minicc.ops.helpers import (
    Array,
    Contents,
    broadcast_infer,
    broadcast_shape,
    certainly_non_negative,
    certainly_positive,
    computed_in_f32,
    default_refuse,
    propagate_by_eval,
    propagate_dims,
    propagate_elementwise,
    require_same_dtype,
    same_as_float_input,
    same_as_input,
)
from minicc.ops.ratios import Ratio, propagate_rounding


def _boolean_infer(n: Inference) -> list[Type]:
    require_same_dtype(n)
    return [TensorType(boolean, broadcast_shape(n))]


# -- functions of one argument


def _unary(name: str, evaluate: Callable[[Array], Any], scalar: str, *, only_float: bool = True,
           propagate: Callable[[Inference], Contents] = propagate_by_eval) -> None:  # fmt: skip
    """Register a function that the scalar expressions have by the name `scalar`."""
    register(OpDef(
        name, Kind.POINTWISE, infer=same_as_float_input if only_float else same_as_input, propagate=propagate,
        eval=computed_in_f32(evaluate), compute=lambda x: unary(scalar, x), refuse=default_refuse,
    ))  # fmt: skip


def erf(x: Array) -> Array:
    """The error function of each element, in float64."""
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), dtype=np.float64)


_unary("Exp", np.exp, "exp")
_unary("Log", np.log, "log")
_unary("Sqrt", np.sqrt, "sqrt")
_unary("Sin", np.sin, "sin")
_unary("Cos", np.cos, "cos")
_unary("Tan", np.tan, "tan")
_unary("Asin", np.arcsin, "asin")
_unary("Acos", np.arccos, "acos")
_unary("Atan", np.arctan, "atan")
_unary("Sinh", np.sinh, "sinh")
_unary("Cosh", np.cosh, "cosh")
_unary("Tanh", np.tanh, "tanh")
_unary("Asinh", np.arcsinh, "asinh")
_unary("Acosh", np.arccosh, "acosh")
_unary("Atanh", np.arctanh, "atanh")
_unary("Floor", np.floor, "floor", propagate=propagate_rounding(Ratio.floor))
_unary("Ceil", np.ceil, "ceil", propagate=propagate_rounding(Ratio.ceil))
_unary("Round", np.rint, "round", propagate=propagate_rounding(Ratio.whole))
_unary("Neg", np.negative, "neg", only_float=False, propagate=propagate_dims(lambda x: -x))
_unary("Sign", np.sign, "sign", only_float=False,
       propagate=propagate_dims(lambda x: 1 if certainly_positive(x) else None))  # fmt: skip
_unary("Abs", np.abs, "abs", only_float=False,
       propagate=propagate_dims(lambda x: x if certainly_non_negative(x) else None))  # fmt: skip
_unary("BitwiseNot", np.bitwise_not, "bitnot", only_float=False)
_unary("Not", np.logical_not, "not", only_float=False)

register(OpDef(
    "Erf", Kind.POINTWISE, infer=same_as_input, propagate=propagate_by_eval, refuse=default_refuse,
    eval=computed_in_f32(lambda x: erf(x).astype(x.dtype)),
    compute=lambda x: unary("erf", x) if x.dtype.is_float else cast(unary("erf", cast(x, f64)), x.dtype),
))  # fmt: skip

register(OpDef(
    "Reciprocal", Kind.POINTWISE, infer=same_as_float_input, propagate=propagate_by_eval,
    refuse=default_refuse,
    eval=computed_in_f32(lambda x: np.divide(np.ones((), x.dtype), x)),
    compute=lambda x: const(1, x.dtype) / x,
))  # fmt: skip


def _identity_content(n: Inference) -> list[Content | None]:
    return [n.content(0)]


register(OpDef(
    "Identity", Kind.POINTWISE, infer=same_as_input, propagate=_identity_content, refuse=default_refuse,
    eval=lambda x: x, compute=lambda x: x,
))  # fmt: skip


def _is_kind_infer(n: Inference) -> list[Type]:
    return [n.type(0).with_dtype(boolean)]


register(OpDef(
    "IsNaN", Kind.POINTWISE, infer=_is_kind_infer, propagate=propagate_by_eval, refuse=default_refuse,
    eval=computed_in_f32(np.isnan), compute=isnan,
))  # fmt: skip


def _is_inf_eval(x: Array, *, detect_negative: int, detect_positive: int) -> Any:
    return (np.isposinf(x) & bool(detect_positive)) | (np.isneginf(x) & bool(detect_negative))


def _is_inf(x: Expr, *, detect_negative: int, detect_positive: int) -> Expr:
    positive, negative = equal(x, math.inf), equal(x, -math.inf)
    if detect_positive and detect_negative:
        return positive | negative
    return positive if detect_positive else negative if detect_negative else const(False, boolean)


register(OpDef(
    "IsInf", Kind.POINTWISE, infer=_is_kind_infer, propagate=propagate_by_eval, refuse=default_refuse,
    eval=computed_in_f32(_is_inf_eval), compute=_is_inf, attrs={"detect_negative": 1, "detect_positive": 1},
))  # fmt: skip


# -- arithmetic of two arguments


def _binary(name: str, evaluate: Callable[[Array, Array], Any], scalar: str,
            rule: Callable[[Dim, Dim], Any] | None = None) -> None:  # fmt: skip
    """Register a function of two operands of one type that scalar expressions have by the name `scalar`."""
    register(OpDef(
        name, Kind.POINTWISE, infer=broadcast_infer, refuse=default_refuse,
        propagate=propagate_by_eval if rule is None else propagate_dims(rule),
        eval=computed_in_f32(evaluate), compute=lambda x, y: binary(scalar, x, y),
    ))  # fmt: skip


_binary("Add", np.add, "add", lambda x, y: x + y)
_binary("Sub", np.subtract, "sub", lambda x, y: x - y)
_binary("Mul", np.multiply, "mul", lambda x, y: x * y)
_binary("And", np.logical_and, "and")
_binary("Or", np.logical_or, "or")
_binary("Xor", np.logical_xor, "xor")
_binary("BitwiseAnd", np.bitwise_and, "bitand")
_binary("BitwiseOr", np.bitwise_or, "bitor")
_binary("BitwiseXor", np.bitwise_xor, "bitxor")


def _div_eval(x: Array, y: Array) -> Any:
    if x.dtype.kind not in "iu":
        return np.divide(x, y)
    quotient, rest = np.divmod(x, y)  # floored; 0 and 0 for a zero divisor
    return (quotient + ((rest != 0) & ((x < 0) != (y < 0)))).astype(x.dtype)


def _divide_content(n: Inference) -> Contents:
    """Integers truncate, which is flooring of what is not negative; floats divide when that is exact."""
    if n.dtype(0).is_float:
        return propagate_dims(exact_quotient)(n)
    return propagate_dims(_truncated)(n)


def _truncated(x: Dim, y: Dim) -> Dim | None:
    """x / y rounded towards zero, for a divisor that is certainly positive."""
    if not certainly_non_negative(y):
        return None
    if certainly_non_negative(x):
        return floor_divide(x, y)
    return floor_divide(maximum(x, 0), y) - floor_divide(maximum(-x, 0), y) if certainly_positive(y) else None


register(OpDef(
    "Div", Kind.POINTWISE, infer=broadcast_infer, propagate=_divide_content, refuse=default_refuse,
    eval=computed_in_f32(_div_eval), compute=lambda x, y: x / y,
))  # fmt: skip


def _mod_eval(x: Array, y: Array, *, fmod: int) -> Any:
    return np.fmod(x, y) if fmod else np.mod(x, y)


def _mod_content(n: Inference) -> Contents:
    same_sign = not n.attr("fmod")
    return propagate_dims(
        lambda x, y: (
            modulo(x, y) if certainly_positive(y) and (same_sign or certainly_non_negative(x)) else None
        )
    )(n)


register(OpDef(
    "Mod", Kind.POINTWISE, infer=broadcast_infer, propagate=_mod_content, refuse=default_refuse,
    eval=computed_in_f32(_mod_eval), attrs={"fmod": 0},
    compute=lambda x, y, *, fmod: binary("fmod" if fmod else "mod", x, y),
))  # fmt: skip


def _pow_infer(n: Inference) -> list[Type]:
    return [TensorType(n.dtype(0), broadcast_shape(n))]


def _pow_eval(x: Array, y: Array) -> Any:
    if x.dtype.kind == "f":
        return np.power(x, y.astype(x.dtype))
    if y.dtype.kind == "f":
        return np.power(x.astype(np.float64), y.astype(np.float64)).astype(x.dtype)
    power = np.power(x, np.maximum(y, 0).astype(x.dtype))
    # Negative exponents give 1 / x**n, cut to an integer: 0 unless x is 1 or -1.
    odd = (y & 1).astype(bool)
    inverse = np.where(
        x == 1, 1, np.where((x == -1) if x.dtype.kind == "i" else False, np.where(odd, -1, 1), 0)
    )
    return np.where(y < 0, inverse, power).astype(x.dtype)


# Exponents that are cheaper as something else.
_POWERS: dict[float, Callable[[Expr], Expr]] = {
    1.0: lambda x: x,
    2.0: lambda x: x * x,
    3.0: lambda x: x * x * x,
    -1.0: lambda x: const(1, x.dtype) / x,
    0.5: lambda x: unary("sqrt", x),
    -0.5: lambda x: const(1, x.dtype) / unary("sqrt", x),
}


def _pow(x: Expr, y: Expr) -> Expr:
    if x.dtype.is_float:
        exponent = cast(y, x.dtype)
        cheaper = _POWERS.get(exponent.arg) if exponent.op == "const" else None  # type: ignore[call-overload]
        return binary("pow", x, exponent) if cheaper is None else cheaper(x)
    if y.dtype.is_float:
        return cast(binary("pow", cast(x, f64), cast(y, f64)), x.dtype)
    wide = y.dtype if y.dtype.bits > x.dtype.bits else x.dtype
    return cast(binary("pow", cast(x, wide), cast(y, wide)), x.dtype)


def _pow_rule(x: Dim, y: Dim) -> Dim | None:
    return product([x] * y) if isinstance(y, int) and 0 <= y <= 4 else None


register(OpDef(
    "Pow", Kind.POINTWISE, infer=_pow_infer, propagate=propagate_dims(_pow_rule), refuse=default_refuse,
    eval=computed_in_f32(_pow_eval), compute=_pow,
))  # fmt: skip


def _shift_eval(x: Array, y: Array, *, direction: str) -> Any:
    return np.left_shift(x, y) if direction == "LEFT" else np.right_shift(x, y)


def _shift(x: Expr, y: Expr, *, direction: str) -> Expr:
    """A negative count, or one of the type's width or more, leaves sign bits or zeros; hardware wraps it."""
    bits = x.dtype.bits
    beyond = (y >= bits) | (y < 0) if y.dtype.kind == "i" else y >= bits
    shifted = binary("shl" if direction == "LEFT" else "shr", x, select(beyond, bits - 1, y))
    return shifted if direction == "RIGHT" and x.dtype.kind == "i" else select(beyond, 0, shifted)


def _shift_infer(n: Inference) -> list[Type]:
    if n.attr("direction") not in ("LEFT", "RIGHT"):
        raise n.error(f"direction must be LEFT or RIGHT, got {n.attr('direction')!r}")
    return broadcast_infer(n)


register(OpDef(
    "BitShift", Kind.POINTWISE, infer=_shift_infer, propagate=propagate_by_eval, refuse=default_refuse,
    eval=_shift_eval, compute=_shift, attrs={"direction": "LEFT"},
))  # fmt: skip


# -- any number of arguments


def _variadic(name: str, evaluate: Callable[[Array, Array], Array], scalar: Callable[[Any, Any], Any],
              rule: Callable[[Dim, Dim], Dim]) -> None:  # fmt: skip
    register(OpDef(
        name, Kind.POINTWISE, infer=broadcast_infer, refuse=default_refuse,
        propagate=propagate_dims(lambda *xs: reduce(rule, xs)),
        eval=computed_in_f32(lambda *xs: reduce(evaluate, xs)), compute=lambda *xs: reduce(scalar, xs),
    ))  # fmt: skip


_variadic("Max", np.maximum, expr.maximum, maximum)
_variadic("Min", np.minimum, expr.minimum, minimum)
_variadic("Sum", np.add, lambda x, y: x + y, lambda x, y: x + y)

register(OpDef(
    "Mean", Kind.POINTWISE, infer=broadcast_infer, propagate=propagate_by_eval, refuse=default_refuse,
    eval=computed_in_f32(lambda *xs: (reduce(np.add, xs) / len(xs)).astype(xs[0].dtype)),
    compute=lambda *xs: reduce(lambda x, y: x + y, xs) / len(xs),
))  # fmt: skip


# -- comparison and selection


def _equal_rule(x: Any, y: Any) -> bool | None:
    if x == y:
        return True
    return False if certainly_positive(x - y) or certainly_positive(y - x) else None


def _less_rule(x: Dim, y: Dim) -> bool | None:
    if certainly_positive(y - x):
        return True
    return False if certainly_non_negative(x - y) else None


def _less_or_equal_rule(x: Dim, y: Dim) -> bool | None:
    if certainly_non_negative(y - x):
        return True
    return False if certainly_positive(x - y) else None


def _comparison(name: str, evaluate: Callable[[Array, Array], Any], scalar: str,
                rule: Callable[[Any, Any], bool | None]) -> None:  # fmt: skip
    register(OpDef(
        name, Kind.POINTWISE, infer=_boolean_infer, propagate=propagate_dims(rule), refuse=default_refuse,
        eval=computed_in_f32(lambda x, y: np.asarray(evaluate(x, y), dtype=bool)),
        compute=lambda x, y: expr.compare(scalar, x, y),
    ))  # fmt: skip


_comparison("Equal", np.equal, "eq", _equal_rule)
_comparison("Less", np.less, "lt", _less_rule)
_comparison("LessOrEqual", np.less_equal, "le", _less_or_equal_rule)
_comparison("Greater", np.greater, "gt", lambda x, y: _less_rule(y, x))
_comparison("GreaterOrEqual", np.greater_equal, "ge", lambda x, y: _less_or_equal_rule(y, x))


def _where_infer(n: Inference) -> list[Type]:
    if n.dtype(0) != boolean:
        raise n.error(f"the condition must be bool, got {n.dtype(0)}")
    return [TensorType(require_same_dtype(n, (1, 2)), broadcast_shape(n))]


register(OpDef(
    "Where", Kind.POINTWISE, infer=_where_infer, refuse=default_refuse,
    propagate=propagate_elementwise(lambda condition, x, y: x if condition else y),
    eval=lambda condition, x, y: np.asarray(np.where(condition, x, y)),
    compute=lambda condition, x, y: select(condition, x, y),
))  # fmt: skip


def _clip_infer(n: Inference) -> list[Type]:
    require_same_dtype(n)
    return [n.type(0)]


def _clip_eval(x: Array, low: Array | None = None, high: Array | None = None) -> Any:
    out = x if low is None else np.maximum(x, low)
    return (out if high is None else np.minimum(out, high)).reshape(x.shape)


def _clip(x: Expr, low: Expr | None = None, high: Expr | None = None) -> Expr:
    out = x if low is None else expr.maximum(x, low)
    return out if high is None else expr.minimum(out, high)


def _clip_content(n: Inference) -> Contents:
    functions = [function for i, function in ((1, maximum), (2, minimum)) if n.has(i)]

    def rule(x: Dim, *bounds: Dim) -> Dim:
        for function, bound in zip(functions, bounds):
            x = function(x, bound)
        return x

    return propagate_dims(rule)(n)


register(OpDef(
    "Clip", Kind.POINTWISE, infer=_clip_infer, propagate=_clip_content, refuse=default_refuse,
    eval=computed_in_f32(_clip_eval), compute=_clip,
))  # fmt: skip
