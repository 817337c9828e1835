"""Pooling: ONNX's cases, and ONNX Runtime for random windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.onnx_cases import Case, cases_of, check_call, check_case
from tests.ops.runtime_oracle import check_against_onnxruntime
from tests.ops.test_conv import geometries
from tests.ops.test_matmul import integers, normal

OPS = ["MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "MaxUnpool"]


@pytest.mark.parametrize("case", cases_of(*OPS), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    check_case(case)


@given(geometries(), st.booleans(), st.booleans())
@settings(max_examples=50, deadline=None)
def test_windows_as_onnxruntime(
    geometry: tuple[list[int], dict[str, object]], ceil: bool, flag: bool
) -> None:
    sizes, attrs = geometry
    attrs = {**attrs, "ceil_mode": int(ceil)}
    x = normal(2, 3, *sizes)
    check_against_onnxruntime("MaxPool", [x], {**attrs, "storage_order": int(flag)}, outputs=2)
    check_against_onnxruntime("AveragePool", [x], {**attrs, "count_include_pad": int(flag)}, rtol=1e-4)
    check_against_onnxruntime("LpPool", [x], {**attrs, "p": 3 if flag else 2}, rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_max_pool_of_integers_ignores_padding(dtype: type) -> None:
    x = integers(dtype, 1, 2, 5, 5)
    check_against_onnxruntime(
        "MaxPool", [x], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    )


@pytest.mark.parametrize("p", [1, 2, 3])
def test_global_lp_pool(p: int) -> None:
    check_against_onnxruntime("GlobalLpPool", [normal(2, 3, 4, 5)], {"p": p})


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool"])
def test_global_pool_of_three_axes_in_half(op: str) -> None:
    x = normal(2, 3, 4, 5, 6).astype(np.float16)
    function = np.mean if op == "GlobalAveragePool" else np.max
    check_call(
        op, [x], {}, [function(x.astype(np.float64), axis=(2, 3, 4), keepdims=True).astype(np.float16)]
    )


def test_max_roi_pool() -> None:
    corners = np.sort(np.random.default_rng(0).random((5, 2, 2)) * 8, axis=1).reshape(5, 4)
    rois = np.concatenate([[[0], [1], [1], [0], [1]], corners], axis=1).astype(np.float32)
    check_against_onnxruntime(
        "MaxRoiPool", [normal(2, 3, 8, 9), rois], {"pooled_shape": [3, 2], "spatial_scale": 0.7}
    )
