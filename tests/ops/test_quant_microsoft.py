"""com.microsoft's quantised operators of transformers, softmax, choice, mean and pooling, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.errors import ShapeError
from tests.ops.microsoft import MICROSOFT, check, compiled
from tests.ops.onnx_cases import check_call
from tests.ops.test_matmul import integers, normal, weights

KINDS = pytest.mark.parametrize("dtype", [np.uint8, np.int8], ids=lambda d: d.__name__)
A, B, Y = np.float32(0.0301), np.float32(0.0217), np.float32(0.0523)


def zero_point(dtype: type) -> np.generic:
    return np.uint8(121) if dtype is np.uint8 else np.int8(-5)


# -- QLinearSoftmax: on int8 with shares below a half, since ONNX Runtime wraps larger ones


@pytest.mark.parametrize("opset", [12, 13])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("scale", [0.003, 0.05, 0.4])
def test_softmax_of_unsigned(opset: int, axis: int, scale: float) -> None:
    inputs = [integers(np.uint8, 3, 5, 9), np.float32(scale), np.uint8(7), np.float32(1 / 256), np.uint8(0)]
    check("QLinearSoftmax", inputs, {"axis": axis, "opset": opset}, constants=(1, 2, 3, 4), free=(0,) if opset > 12 else ())


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax_of_signed(axis: int) -> None:
    inputs = [integers(np.int8, 6, 5, 7), np.float32(0.003), np.int8(7), np.float32(1 / 200), np.int8(-20)]
    check("QLinearSoftmax", inputs, {"axis": axis, "opset": 13}, constants=(1, 2, 3, 4), free=(0,))


def test_softmax_without_zero_points_and_with_parameters_as_vectors() -> None:
    inputs = [integers(np.uint8, 4, 8), np.array([0.02], np.float32), None, np.array([1 / 256], np.float32), np.uint8([3])]
    check("QLinearSoftmax", inputs, {"opset": 13}, constants=(1, 3, 4))


def test_softmax_saturates() -> None:
    x = np.array([[127, -128, -128]], np.int8)
    inputs = [x, np.float32(0.5), np.int8(0), np.float32(1 / 256), np.int8(0)]
    check_call("QLinearSoftmax", inputs, {"opset": 13}, [np.array([[127, 0, 0]], np.int8)], domain=MICROSOFT)


# -- QLinearWhere, QLinearReduceMean, NhwcMaxPool


@KINDS
@pytest.mark.parametrize("shapes", [((3, 4), (3, 4), (3, 4)), ((3, 1), (4,), (2, 1, 4)), ((), (2, 3), (1,))])
def test_where(dtype: type, shapes: tuple[tuple[int, ...], ...]) -> None:
    condition = np.asarray(np.random.default_rng(0).random(shapes[0]) < 0.5)
    zero = zero_point(dtype)
    inputs = [condition, integers(dtype, *shapes[1]), A, zero, integers(dtype, *shapes[2], seed=1), B, dtype(3), Y, dtype(9)]
    check("QLinearWhere", inputs, constants=(2, 3, 5, 6, 7, 8))


@KINDS
def test_where_of_one_scale_keeps_the_numbers(dtype: type) -> None:
    zero = zero_point(dtype)
    condition = np.arange(256) % 3 == 0
    x, y = np.arange(256).astype(dtype), np.arange(256)[::-1].astype(dtype)
    check("QLinearWhere", [condition, x, A, zero, y, A, zero, A, zero], constants=(2, 3, 5, 6, 7, 8))


@KINDS
@pytest.mark.parametrize(("axes", "keepdims"), [([1], 1), ([0, -1], 0), ([0, 1, 2], 0)])
def test_mean(dtype: type, axes: list[int], keepdims: int) -> None:
    inputs = [integers(dtype, 3, 5, 7), A, zero_point(dtype), B, dtype(4)]
    check("QLinearReduceMean", inputs, {"axes": axes, "keepdims": keepdims}, constants=(1, 2, 3, 4), free=(0,), runtime=False)


@KINDS
@given(seed=st.integers(0, 1 << 16))
@settings(max_examples=12, deadline=None)
def test_pool_of_integers_with_channels_last(dtype: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernel = rng.integers(1, 4, 2).tolist()
    attrs: dict[str, Any] = {"kernel_shape": kernel, "strides": rng.integers(1, 3, 2).tolist()}
    if rng.random() < 0.3:
        attrs["auto_pad"] = "SAME_UPPER"
    else:
        attrs |= {"pads": [int(rng.integers(0, k)) for k in kernel * 2], "ceil_mode": int(rng.integers(0, 2))}
        attrs["dilations"] = rng.integers(1, 3, 2).tolist()
    check("NhwcMaxPool", [integers(dtype, 2, 8, 7, 5, seed=seed)], attrs)


@pytest.mark.parametrize("shape", [(2, 9, 4), (1, 5, 4, 6, 2)])
def test_pool_over_other_ranks(shape: tuple[int, ...]) -> None:
    attrs = {"kernel_shape": [3] * (len(shape) - 2), "strides": [2] * (len(shape) - 2)}
    check("NhwcMaxPool", [integers(np.uint8, *shape)], attrs, free=(0,), runtime=False)
    check("NhwcMaxPool", [integers(np.int8, *shape)], attrs, free=(0,))


# -- QAttention


def attention(
    batch: int, length: int, hidden: int, heads: int, past: int = 0, columns: bool = False
) -> tuple[list[Any], dict[str, Any]]:
    size = heads * 4
    scale = np.abs(normal(3 * size)) * np.float32(0.01) if columns else np.float32(0.02)
    zero = np.zeros(3 * size, np.int8) if columns else np.int8(2)
    given = [
        integers(np.uint8, batch, length, hidden), weights(hidden, 3 * size), normal(3 * size), np.float32(0.03), scale, None,
        np.uint8(120), zero, normal(2, batch, heads, past, 4) if past else None,
    ]  # fmt: skip
    return given, {"num_heads": heads}


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("attrs", [{}, {"unidirectional": 1}, {"scale": 0.3}])
def test_attention(columns: bool, attrs: dict[str, Any]) -> None:
    inputs, given_attrs = attention(2, 5, 12, 3, columns=columns)
    check("QAttention", inputs, {**given_attrs, **attrs}, constants=(1, 2, 3, 4, 6, 7), free=(0,), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", ["counts", "ends and starts", "rows", "all"])
def test_attention_with_a_mask(mask: str) -> None:
    inputs, attrs = attention(2, 5, 12, 3)
    inputs[5] = {
        "counts": np.array([3, 5], np.int32),
        "ends and starts": np.array([3, 5, 1, 2], np.int32),
        "rows": np.array([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], np.int32),
        "all": (np.random.default_rng(0).random((2, 5, 5)) < 0.7).astype(np.int32),
    }[mask]
    attrs["mask_filter_value"] = -5000.0
    check("QAttention", inputs, attrs, constants=(1, 2, 3, 4, 6, 7), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [0, 1])
def test_attention_with_a_past(causal: int) -> None:
    inputs, attrs = attention(2, 3, 8, 2, past=4)
    attrs["unidirectional"] = causal
    check("QAttention", inputs, attrs, outputs=2, constants=(1, 2, 3, 4, 6, 7), rtol=1e-4, atol=1e-4)


def test_attention_of_unsigned_weights_without_zero_points() -> None:
    inputs, attrs = attention(1, 4, 8, 2)
    inputs[1], inputs[6], inputs[7] = integers(np.uint8, 8, 24) // np.uint8(4), None, None
    inputs[0] = inputs[0] // np.uint8(8)
    check("QAttention", inputs, attrs, constants=(1, 2, 3, 4), rtol=1e-4, atol=1e-4)


def test_attention_that_does_not_fit() -> None:
    inputs, attrs = attention(1, 4, 8, 2)
    with pytest.raises(ShapeError, match="heads"):
        compiled("QAttention", inputs, {**attrs, "num_heads": 5})
    with pytest.raises(ShapeError, match="rotary"):
        compiled("QAttention", inputs, {**attrs, "do_rotary": 1})


# -- QEmbedLayerNormalization


@KINDS
@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_embedding(dtype: type, segments: bool, mask: bool) -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 9, (3, 5)).astype(np.int32)
    kinds = rng.integers(0, 2, (3, 5)).astype(np.int32) if segments else None
    tables = [integers(dtype, n, 8, seed=n) for n in (9, 7, 2)]
    vectors = [integers(dtype, 8, seed=s) for s in (3, 4)]
    scales: list[Any] = [np.float32(v) for v in (0.02, 0.01, 0.03, 0.015, 0.025)]
    zeros: list[Any] = [dtype(v) for v in (3, 5, 7, 9, 11)]
    if not segments:
        tables[2] = scales[2] = zeros[2] = None  # type: ignore[call-overload]
    covered = (rng.random((3, 5)) < 0.6).astype(np.int32) if mask else None
    inputs = [words, kinds, *tables, *vectors, covered, *scales, *zeros]
    check("QEmbedLayerNormalization", inputs, {"epsilon": 1e-6}, outputs=2, constants=(2, 3, 4, 5, 6, *range(8, 18)), free=(0,),
          rtol=1e-4, atol=1e-4)  # fmt: skip


def test_embedding_with_a_part_of_the_segments() -> None:
    words = np.zeros((1, 2), np.int32)
    table, vector = integers(np.uint8, 4, 8), integers(np.uint8, 8)
    inputs = [words, words, table, table, None, vector, vector, None, A, A, None, A, A, *[np.uint8(0)] * 5]
    with pytest.raises(ShapeError, match="segments"):
        compiled("QEmbedLayerNormalization", inputs, {}, 2)
