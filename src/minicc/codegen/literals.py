"""Typed numbers in the text of kernels, and text without needless parentheses."""

from __future__ import annotations

from minicc.ir.types import DType, boolean, compute_dtype_name


def identity(kind: str, dtype: DType) -> str:
    """The neutral element of a reduction, as a typed literal."""
    if kind in ("sum", "prod"):
        return literal(0 if kind == "sum" else 1, dtype)
    if dtype.is_float:
        return literal(float("-inf") if kind == "max" else float("inf"), dtype)
    if dtype == boolean:
        return "False" if kind == "max" else "True"
    low = -(1 << (dtype.bits - 1)) if dtype.kind == "i" else 0
    high = (1 << (dtype.bits - (1 if dtype.kind == "i" else 0))) - 1
    return literal(low if kind == "max" else high, dtype)


def literal(value: object, dtype: DType) -> str:
    """A number with its type; half types compute in f32."""
    name = compute_dtype_name(dtype)
    if dtype == boolean:
        return "True" if value else "False"
    if dtype.is_float:
        number = float(value)  # type: ignore[arg-type]
        if number != number:
            return f"{name}(np.nan)"
        if number in (float("inf"), float("-inf")):
            return f"{name}({'-' if number < 0 else ''}np.inf)"
        return f"{name}({number!r})"
    if name == "i64":
        return str(value) if int(value) >= 0 else f"({value})"  # type: ignore[call-overload]
    return f"{name}({value})"


def strip(text: str) -> str:
    """Text without the parentheses that enclose all of it."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and position < len(text) - 1:
            return text
    return text[1:-1]
