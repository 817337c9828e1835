"""Normalisations and softmax: ONNX's cases, and ONNX Runtime for com.microsoft."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.onnx_cases import Case, cases_of, check_call, check_case
from tests.ops.runtime_oracle import check_against_onnxruntime
from tests.ops.test_matmul import normal

OPS = [
    "BatchNormalization",
    "GroupNormalization",
    "Hardmax",
    "InstanceNormalization",
    "LRN",
    "LayerNormalization",
    "LogSoftmax",
    "LpNormalization",
    "MeanVarianceNormalization",
    "RMSNormalization",
    "Softmax",
]


@pytest.mark.parametrize("case", cases_of(*OPS), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    check_case(case)


def _float64_layer(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return (wide - wide.mean(axis=axes, keepdims=True)) / np.sqrt(
        wide.var(axis=axes, keepdims=True) + epsilon
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_layer_normalization_of_large_means(dtype: type) -> None:
    x = (normal(3, 64) + 100).astype(dtype)
    scale, bias = normal(64).astype(dtype), normal(64, seed=1).astype(dtype)
    expected = _float64_layer(x, (1,), 1e-5) * scale + bias
    check_call("LayerNormalization", [x, scale, bias], {}, [expected.astype(dtype)], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_softmax_does_not_overflow(dtype: type) -> None:
    x = np.array([[1e4, 1e4 - 8, -1e4], [-np.inf, 0, 1]], dtype=dtype)
    powers = np.exp(x.astype(np.float64) - x.astype(np.float64).max(axis=1, keepdims=True))
    check_call("Softmax", [x], {"axis": -1}, [(powers / powers.sum(axis=1, keepdims=True)).astype(dtype)])


def test_group_normalization_with_one_scale_for_each_group() -> None:
    x, scale, bias = normal(2, 6, 4), normal(3), normal(3, seed=1)
    rows = _float64_layer(x.reshape(2, 3, 8), (2,), 1e-5)
    expected = (rows * scale[:, None] + bias[:, None]).reshape(x.shape).astype(np.float32)
    check_call("GroupNormalization", [x, scale, bias], {"num_groups": 3}, [expected], rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3), groups=st.integers(1, 4), members=st.integers(1, 5),
    spatial=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99),
)  # fmt: skip
def test_group_normalization(batch, groups, members, spatial, seed) -> None:
    shape = (batch, groups * members, *spatial)
    x = (normal(*shape, seed=seed) + 3).astype(np.float32)
    scale, bias = normal(shape[1], seed=seed + 1), normal(shape[1], seed=seed + 2)
    vectors = [v.reshape(-1, *(1,) * len(spatial)) for v in (scale, bias)]
    rows = _float64_layer(x.reshape(batch, groups, -1), (2,), 1e-3).reshape(shape)
    expected = (rows * vectors[0] + vectors[1]).astype(np.float32)
    attrs = {"num_groups": groups, "epsilon": 1e-3}
    check_call("GroupNormalization", [x, scale, bias], attrs, [expected], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [0.75, 0.5, 1.3])
@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_lrn(beta: float, size: int) -> None:
    attrs = {"alpha": 0.3, "beta": beta, "bias": 2.0, "size": size}
    if size % 2:  # ONNX Runtime takes odd sizes only
        check_against_onnxruntime("LRN", [normal(2, 5, 3, 3)], attrs)
    check_call("LRN", [normal(2, 5, 3, 3)], attrs, None)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("p", [1, 2])
def test_lp_normalization_of_zeros(axis: int, p: int) -> None:
    x = normal(3, 4)
    x[1] = 0
    x[:, 2] = 0
    check_call("LpNormalization", [x], {"axis": axis, "p": p}, None)


def test_skip_layer_normalization() -> None:
    inputs = [normal(2, 3, 8), normal(2, 3, 8, seed=1), normal(8), normal(8, seed=1), normal(8, seed=2)]
    attrs = {"epsilon": 1e-5}
    check_against_onnxruntime(
        "SkipLayerNormalization", inputs, attrs, outputs=4, compared=(0, 3), domain="com.microsoft"
    )
    check_against_onnxruntime("SkipLayerNormalization", inputs[:3], attrs, domain="com.microsoft")
    four = [*inputs[:3], inputs[4]]
    check_against_onnxruntime(
        "SkipSimplifiedLayerNormalization", four, attrs, outputs=4, compared=(0, 3), domain="com.microsoft"
    )


def test_simplified_layer_normalization() -> None:
    attrs = {"epsilon": 1e-5, "axis": -1, "stash_type": 1}
    check_against_onnxruntime("SimplifiedLayerNormalization", [normal(2, 3, 8), normal(8)], attrs, outputs=2)


@pytest.mark.parametrize("with_segments", [False, True])
def test_embed_layer_normalization(with_segments: bool) -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 10, (2, 4)).astype(np.int32)
    segments = rng.integers(0, 2, (2, 4)).astype(np.int32) if with_segments else None
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32) if with_segments else None
    kinds = normal(2, 8) if with_segments else None
    inputs = [words, segments, normal(10, 8), normal(6, 8), kinds, normal(8), normal(8, seed=1), mask]
    outputs = 3 if with_segments else 2
    check_against_onnxruntime(
        "EmbedLayerNormalization", inputs, {"epsilon": 1e-5}, outputs=outputs, domain="com.microsoft"
    )
