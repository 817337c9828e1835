"""Activation functions, of ONNX and of ONNX Runtime's com.microsoft domain, and Dropout.

Formulas are written so that no intermediate overflows where the result is finite. Softmax and its kin, which
normalise along an axis, are not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir import expr
from minicc.ir.expr import Expr, const, select, unary
from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, Type, boolean, f32
from minicc.ops.helpers import (
    Array,
    Contents,
    broadcast_infer,
    computed_in_f32,
    default_refuse,
    propagate_by_eval,
    require_same_dtype,
    same_as_float_input,
    same_as_input,
)
from minicc.ops.pointwise import erf

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value


def _activation(name: str, evaluate: Callable[..., Any], compute: Callable[..., Expr], *, domain: str = "",
                infer: Callable[[Inference], list[Type]] = same_as_float_input,
                **attrs: Any) -> None:  # fmt: skip
    register(OpDef(
        name, Kind.POINTWISE, infer=infer, eval=computed_in_f32(evaluate), compute=compute, attrs=attrs,
        propagate=propagate_by_eval, refuse=default_refuse, domain=domain,
    ))  # fmt: skip


def _sigmoid_eval(x: Array) -> Any:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e)).astype(x.dtype)


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + exp(-x))."""
    return unary("sigmoid", x)


_activation("Sigmoid", _sigmoid_eval, sigmoid)
_activation(
    "Relu", lambda x: np.maximum(x, np.zeros((), x.dtype)), lambda x: expr.maximum(x, 0), infer=same_as_input
)


# -- rectifiers


def _leaky_eval(x: Array, *, alpha: float) -> Any:
    return np.where(x < 0, x * x.dtype.type(alpha), x)


def _leaky(x: Expr, *, alpha: float) -> Expr:
    return select(x < 0, x * alpha, x)


_activation("LeakyRelu", _leaky_eval, _leaky, alpha=0.01)


def _prelu_infer(n: Inference) -> list[Type]:
    require_same_dtype(n)
    out = broadcast_infer(n)[0]
    assert isinstance(out, TensorType)
    if out.shape is not None and len(out.shape) != n.rank(0):
        raise n.error("the slope must be broadcastable to the input")
    return [n.type(0)]


_activation("PRelu", lambda x, slope: np.where(x < 0, x * slope, x), lambda x, slope: select(x < 0,
x * slope, x),
            infer=_prelu_infer)  # fmt: skip


def _thresholded_eval(x: Array, *, alpha: float) -> Any:
    return np.where(x > alpha, x, np.zeros((), x.dtype))


def _thresholded(x: Expr, *, alpha: float) -> Expr:
    return select(x > alpha, x, 0)


_activation("ThresholdedRelu", _thresholded_eval, _thresholded, alpha=1.0)


def _shrink_eval(x: Array, *, bias: float, lambd: float) -> Any:
    return np.where(x < -lambd, x + bias, np.where(x > lambd, x - bias, 0)).astype(x.dtype)


def _shrink(x: Expr, *, bias: float, lambd: float) -> Expr:
    if x.dtype.is_float:
        return select(x < -lambd, x + bias, select(x > lambd, x - bias, 0))
    # For integers x < -lambd is x <= ceil(-lambd) - 1, and the bias is added as a float.
    shifted = [expr.cast(expr.cast(x, f32) + b, x.dtype) for b in (bias, -bias)]
    below = const(False, boolean) if x.dtype.kind == "u" else x < math.ceil(-lambd)
    return select(below, shifted[0], select(x > math.floor(lambd), shifted[1], 0))


_activation("Shrink", _shrink_eval, _shrink, infer=same_as_input, bias=0.0, lambd=0.5)


# -- exponential units


def _expm1(x: Expr) -> Expr:
    """exp(x) - 1 for x at most 0, and 0 above."""
    return unary("exp", expr.minimum(x, 0)) - 1


def _elu_eval(x: Array, *, alpha: float) -> Any:
    return np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x).astype(x.dtype)


def _elu(x: Expr, *, alpha: float) -> Expr:
    return select(x < 0, _expm1(x) * alpha, x)


_activation("Elu", _elu_eval, _elu, alpha=1.0)


def _celu_eval(x: Array, *, alpha: float) -> Any:
    return (np.maximum(x, 0) + np.minimum(alpha * np.expm1(np.minimum(x / alpha, 0)), 0)).astype(x.dtype)


def _celu(x: Expr, *, alpha: float) -> Expr:
    if alpha < 0:  # min(0, alpha * (exp(x / alpha) - 1)) is the non-zero side for positive x
        return expr.maximum(x, 0) + expr.minimum((unary("exp", x / alpha) - 1) * alpha, 0)
    return expr.maximum(x, 0) + _expm1(x / alpha) * alpha


_activation("Celu", _celu_eval, _celu, alpha=1.0)


def _selu_eval(x: Array, *, alpha: float, gamma: float) -> Any:
    return (gamma * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))).astype(x.dtype)


def _selu(x: Expr, *, alpha: float, gamma: float) -> Expr:
    return select(x > 0, x * gamma, _expm1(x) * (alpha * gamma))


_activation("Selu", _selu_eval, _selu, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875)


# -- smooth and piecewise linear


def softplus(x: Expr) -> Expr:
    """log(1 + exp(x))."""
    return expr.maximum(x, 0) + unary("log", unary("exp", -unary("abs", x)) + 1)


def _softplus_eval(x: Array) -> Any:
    return np.logaddexp(x, np.zeros((), x.dtype))


def _mish_eval(x: Array) -> Any:
    return x * np.tanh(_softplus_eval(x))


def _mish(x: Expr) -> Expr:
    """x * tanh(log(1 + e^x)) = x * n / (n + 2) with n = e^x (e^x + 2); the fraction is 1 from x = 20 on."""
    e = unary("exp", expr.minimum(x, 20))
    n = e * (e + 2)
    return x * (n / (n + 2))


_activation("Softplus", _softplus_eval, softplus)
_activation("Softsign", lambda x: x / (1 + np.abs(x)), lambda x: x / (unary("abs", x) + 1))
_activation("Mish", _mish_eval, _mish)


def _hard_sigmoid_eval(x: Array, *, alpha: float, beta: float) -> Any:
    return np.maximum(0, np.minimum(1, alpha * x + beta)).astype(x.dtype)


def _hard_sigmoid(x: Expr, *, alpha: float, beta: float) -> Expr:
    return expr.maximum(expr.minimum(x * alpha + beta, 1), 0)


_activation("HardSigmoid", _hard_sigmoid_eval, _hard_sigmoid, alpha=0.2, beta=0.5)
_activation("HardSwish", lambda x: x * _hard_sigmoid_eval(x, alpha=1 / 6, beta=0.5),
            lambda x: x * _hard_sigmoid(x, alpha=1 / 6, beta=0.5))  # fmt: skip


def _swish_eval(x: Array, *, alpha: float) -> Any:
    return x * _sigmoid_eval((alpha * x).astype(x.dtype))


def _swish(x: Expr, *, alpha: float) -> Expr:
    return x * sigmoid(x if alpha == 1 else x * alpha)


_activation("Swish", _swish_eval, _swish, alpha=1.0)
_activation("SwiGLU", lambda x, y, *, alpha: _swish_eval(x, alpha=alpha) * y,
            lambda x, y, *, alpha: _swish(x, alpha=alpha) * y, infer=broadcast_infer, alpha=1.0)  # fmt: skip
_activation("QuickGelu", _swish_eval, _swish, domain="com.microsoft", alpha=1.702)


# -- the Gaussian error linear unit


def _gelu_eval(x: Array, *, approximate: str = "none") -> Any:
    if approximate == "tanh":
        return (0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))).astype(x.dtype)
    return (0.5 * x * (1 + erf(x / math.sqrt(2)))).astype(x.dtype)


def _gelu(x: Expr, *, approximate: str = "none") -> Expr:
    """x times the normal distribution function; (1 + tanh(z)) / 2 = sigmoid(2 z) in the approximation."""
    if approximate == "tanh":
        return x * sigmoid((x * x * 0.044715 + 1) * x * (2 * math.sqrt(2 / math.pi)))
    return x * 0.5 * (unary("erf", x * math.sqrt(0.5)) + 1)


def _gelu_infer(n: Inference) -> list[Type]:
    if n.attr("approximate") not in ("none", "tanh"):
        raise n.error(f"approximate must be none or tanh, got {n.attr('approximate')!r}")
    return same_as_float_input(n)


_activation("Gelu", _gelu_eval, _gelu, infer=_gelu_infer, approximate="none")
_activation("Gelu", _gelu_eval, _gelu, domain="com.microsoft")
_activation("BiasGelu", lambda x, bias: _gelu_eval(x + bias), lambda x, bias: _gelu(x + bias),
            domain="com.microsoft", infer=broadcast_infer)  # fmt: skip


def _fast_gelu_eval(x: Array, bias: Array | None = None) -> Any:
    return _gelu_eval(x if bias is None else x + bias, approximate="tanh")


def _fast_gelu(x: Expr, bias: Expr | None = None) -> Expr:
    return _gelu(x if bias is None else x + bias, approximate="tanh")


_activation("FastGelu", _fast_gelu_eval, _fast_gelu, domain="com.microsoft", infer=broadcast_infer)


# -- Dropout


def _dropout_infer(n: Inference) -> list[Type]:
    return [n.type(0), n.type(0).with_dtype(boolean)]


def _dropout_eval(x: Array, ratio: Array | None = None, training_mode: Array | None = None, *,
                  seed: int | None) -> tuple[Array, Array]:  # fmt: skip
    share = 0.5 if ratio is None else float(ratio.item())
    if training_mode is None or not training_mode.item() or share == 0:
        return x, np.ones(x.shape, dtype=bool)
    mask = np.asarray(np.random.default_rng(seed).random(x.shape) >= share)
    return (x * mask / (1 - share)).astype(x.dtype), mask


def _trains(inputs: tuple[Value | None, ...]) -> bool:
    """False when the training mode is known to be off."""
    mode = inputs[2] if len(inputs) > 2 else None
    return mode is not None and (mode.content is None or bool(mode.content.item()))


def _dropout_refuse(node: Node) -> str | None:
    return "dropout in training mode is random" if _trains(node.inputs) else None


def _dropout(b: Builder, node: Node) -> list[Value]:
    x = node.inputs[0]
    assert x is not None
    mask = b.op("Expand", b.constant(np.ones((), dtype=bool)), b.shape(x.shape))
    return [b.op("Identity", x), mask]


def _dropout_content(n: Inference) -> Contents:
    return [None if _trains(n.inputs) else n.content(0), None]


register(OpDef(
    "Dropout", Kind.EXPAND, infer=_dropout_infer, propagate=_dropout_content, refuse=_dropout_refuse,
    eval=_dropout_eval, expand=_dropout, attrs={"seed": None},
))  # fmt: skip
