"""Pointwise ops against ONNX's cases, and their shape arithmetic."""

from __future__ import annotations

import pytest

from tests.ops.onnx_cases import Case, cases_of, check_case

OPS = [
    "Abs",
    "Neg",
    "Sign",
    "Floor",
    "Ceil",
    "Round",
    "Sqrt",
    "Reciprocal",
    "Exp",
    "Log",
    "Sin",
    "Cos",
    "Tan",
    "Asin",
    "Acos",
    "Atan",
    "Sinh",
    "Cosh",
    "Tanh",
    "Asinh",
    "Acosh",
    "Atanh",
    "Erf",
    "Not",
    "BitwiseNot",
    "IsNaN",
    "IsInf",
    "Identity",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Mod",
    "Pow",
    "Max",
    "Min",
    "Sum",
    "Mean",
    "And",
    "Or",
    "Xor",
    "BitShift",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Equal",
    "Less",
    "LessOrEqual",
    "Greater",
    "GreaterOrEqual",
    "Where",
    "Clip",
]


@pytest.mark.parametrize("case", cases_of(*OPS), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    check_case(case)
