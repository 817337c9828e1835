"""Reductions against ONNX's cases."""

from __future__ import annotations

import pytest

from tests.ops.onnx_cases import Case, cases_of, check_case

OPS = [
    "ReduceSum",
    "ReduceProd",
    "ReduceMax",
    "ReduceMin",
    "ReduceMean",
    "ReduceSumSquare",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ArgMax",
    "ArgMin",
]


@pytest.mark.parametrize("case", cases_of(*OPS), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    check_case(case)
