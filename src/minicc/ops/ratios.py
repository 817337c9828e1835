"""Dimensions times simple fractions: `Cast -> Mul(0.5) -> Floor -> Cast` on sizes, as exporters write it.

A value that is no whole number never gets a content. The op that makes it whole again (Floor, Ceil, Round, a
cast to integers) looks back through the few element-wise ops before it instead. Only fractions whose float
arithmetic is exact are followed, so that the answer is what the model would have computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import Dim, SymbolicDim, ceil_divide, floor_divide
from minicc.ir.graph import MAX_CONTENT
from minicc.ir.opdef import Content, Inference
from minicc.ir.types import TensorType
from minicc.ops.helpers import Contents, propagate_by_eval

if TYPE_CHECKING:
    from minicc.ir.graph import Value

_MAX_DENOMINATOR = 256
_MAX_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Ratio:
    """numerator / denominator, the denominator positive."""

    numerator: Dim
    denominator: int = 1

    def floor(self) -> Dim | None:
        return floor_divide(self.numerator, self.denominator)

    def ceil(self) -> Dim | None:
        return ceil_divide(self.numerator, self.denominator)

    def whole(self) -> Dim | None:
        """The value when it is a whole number, else None."""
        return self.numerator if self.denominator == 1 else None

    @property
    def exact(self) -> bool:
        """True when floats hold it exactly, so that further arithmetic does not round."""
        return self.denominator & (self.denominator - 1) == 0


def ratio_of(value: Any) -> Ratio | None:
    """The element of a content as a Ratio, or None for a fraction that is not a simple one."""
    if isinstance(value, int | SymbolicDim) and not isinstance(value, bool):
        return Ratio(value)
    if not isinstance(value, float) or not np.isfinite(value):
        return None
    fraction = Fraction(value)
    return (
        Ratio(fraction.numerator, fraction.denominator) if fraction.denominator <= _MAX_DENOMINATOR else None
    )


def _combine(op: str, a: Ratio, b: Ratio) -> Ratio | None:
    if not (a.exact and b.exact):
        return None
    if op == "Mul":
        return Ratio(a.numerator * b.numerator, a.denominator * b.denominator)
    if op in ("Add", "Sub"):
        sign = 1 if op == "Add" else -1
        return Ratio(
            a.numerator * b.denominator + b.numerator * a.denominator * sign, a.denominator * b.denominator
        )
    if isinstance(b.numerator, int) and b.numerator > 0:
        return Ratio(a.numerator * b.denominator, a.denominator * b.numerator)
    return None


def ratios(value: Value | None, depth: int = 0) -> Content | None:
    """The elements of a value as Ratios, through its producers; None when one is not known to be one."""
    if value is None or depth > _MAX_DEPTH or not isinstance(value.type, TensorType):
        return None
    if value.content is not None:
        return _map(ratio_of, value.content)
    producer = value.producer
    if producer is None or producer.op.domain or not value.type.dtype.is_float:
        return None
    op = producer.op.name
    if op in ("Identity", "Cast"):
        return ratios(producer.inputs[0], depth + 1)
    if op not in ("Mul", "Div", "Add", "Sub"):
        return None
    a, b = (ratios(v, depth + 1) for v in producer.inputs)
    if a is None or b is None:
        return None
    return _map(lambda x, y: _combine(op, x, y), *np.broadcast_arrays(a, b))


def _map(function: Callable[..., Any], *arrays: Content) -> Content | None:
    """Element-wise; None as soon as one result is None."""
    out = np.empty(arrays[0].shape, dtype=object)
    if out.size > MAX_CONTENT:
        return None
    flat = out.reshape(-1)
    for position, elements in enumerate(zip(*(a.reshape(-1) for a in arrays))):
        flat[position] = function(*elements)
        if flat[position] is None:
            return None
    return out


def propagate_rounding(rounding: Callable[[Ratio], Dim | None]) -> Callable[[Inference], Contents]:
    """`propagate` of Floor, Ceil and Round."""

    def propagate(n: Inference) -> Contents:
        known = propagate_by_eval(n)
        if known[0] is not None:
            return known
        found = ratios(n.inputs[0])
        return [None if found is None else _map(rounding, found)]

    return propagate
