"""Shape and rearranging ops against ONNX's cases, and shape arithmetic on symbols."""

from __future__ import annotations

import pytest

from tests.ops.onnx_cases import Case, cases_of, check_case

OPS = [
    "Shape",
    "Size",
    "Constant",
    "ConstantOfShape",
    "Range",
    "EyeLike",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Expand",
    "Concat",
    "Split",
    "Slice",
    "Pad",
    "Tile",
    "CenterCropPad",
    "DepthToSpace",
    "SpaceToDepth",
    "Trilu",
    "ReverseSequence",
]


@pytest.mark.parametrize("case", cases_of(*OPS), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    check_case(case)
