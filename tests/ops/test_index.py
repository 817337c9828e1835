"""Gathers, scatters, sorts and searches against ONNX's cases."""

from __future__ import annotations

import pytest

from tests.ops.onnx_cases import Case, cases_of, check_case

OPS = [
    "Gather",
    "GatherElements",
    "GatherND",
    "ScatterElements",
    "ScatterND",
    "TensorScatter",
    "OneHot",
    "TopK",
    "CumSum",
    "CumProd",
    "NonZero",
    "Compress",
    "Unique",
    "NonMaxSuppression",
]


@pytest.mark.parametrize("case", cases_of(*OPS), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    check_case(case)
