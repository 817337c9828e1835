"""Quantisation: ONNX's cases, and ONNX Runtime for com.microsoft and for granularities."""

from __future__ import annotations

import numpy as np
import pytest

from minicc.errors import ShapeError
from tests.ops.onnx_cases import Case, cases_of, check_call, check_case
from tests.ops.runtime_oracle import check_against_onnxruntime
from tests.ops.test_matmul import integers, normal, weights

OPS = ["QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"]
MICROSOFT = "com.microsoft"
KINDS = pytest.mark.parametrize("dtype", [np.uint8, np.int8], ids=lambda d: d.__name__)
# Scales whose ratios make no exact halves, so that the order of float operations cannot matter.
A, B, Y = np.float32(0.0301), np.float32(0.0217), np.float32(0.0523)


def zero_point(dtype: type) -> np.generic:
    return np.uint8(121) if dtype is np.uint8 else np.int8(-5)


@pytest.mark.parametrize("case", cases_of(*OPS), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    check_case(case)


def test_quantize_per_axis_and_blocked() -> None:
    scales = np.abs(normal(6)) + 0.1
    check_against_onnxruntime(
        "QuantizeLinear", [normal(2, 6) * 100, scales, integers(np.uint8, 6)], {"axis": -1}
    )
    blocks = [normal(4, 6) * 10, np.abs(normal(4, 2)) + 0.1, integers(np.int8, 4, 2)]
    check_against_onnxruntime("QuantizeLinear", blocks, {"axis": 1, "block_size": 3})
    blocks = [integers(np.int8, 4, 6), np.abs(normal(2, 6)) + 0.1, integers(np.int8, 2, 6)]
    check_against_onnxruntime("DequantizeLinear", blocks, {"axis": 0, "block_size": 2})


def test_rounds_half_to_even_and_saturates() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, np.inf, -np.inf], np.float32)
    check_call(
        "QuantizeLinear",
        [x, np.float32(1), np.int8(0)],
        {},
        [np.array([0, 2, 2, 0, -2, 127, -128, 127, -128], np.int8)],
    )


def test_dequantize_large_integers() -> None:
    x = np.array([2**31 - 1, -(2**31), 2**24 + 1], np.int32)
    check_against_onnxruntime("DequantizeLinear", [x, np.float32(0.3)])


def test_dynamic_quantize_of_zeros_and_of_one_sign() -> None:
    check_against_onnxruntime("DynamicQuantizeLinear", [np.zeros((2, 3), np.float32)], outputs=3)
    check_against_onnxruntime("DynamicQuantizeLinear", [-np.abs(normal(4, 5))], outputs=3)


@KINDS
@pytest.mark.parametrize("op", ["QLinearAdd", "QLinearMul"])
def test_two_operands(op: str, dtype: type) -> None:
    zero = zero_point(dtype)
    inputs = [integers(dtype, 2, 5, 64), A, zero, integers(dtype, 5, 64), B, zero, Y, zero]
    check_against_onnxruntime(op, inputs, domain=MICROSOFT, constants=(1, 2, 4, 5, 6, 7))


@KINDS
@pytest.mark.parametrize(("op", "attrs"), [("QLinearSigmoid", {}), ("QLinearLeakyRelu", {"alpha": 0.1})])
def test_function(op: str, attrs: dict[str, float], dtype: type) -> None:
    zero = zero_point(dtype)
    inputs = [np.arange(256).astype(dtype).reshape(2, 128), A, zero, np.float32(1 / 256), zero]
    check_against_onnxruntime(op, inputs, attrs, domain=MICROSOFT, constants=(1, 2, 3, 4))


@KINDS
@pytest.mark.parametrize("last", [0, 1])
def test_pools(dtype: type, last: int) -> None:
    zero = zero_point(dtype)
    inputs = [integers(dtype, 2, 5, 5, 5), A, zero, B, zero]
    fixed = {"domain": MICROSOFT, "constants": (1, 2, 3, 4)}
    check_against_onnxruntime("QLinearGlobalAveragePool", inputs, {"channels_last": last}, **fixed)
    attrs = {"channels_last": last, "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}
    check_against_onnxruntime("QLinearAveragePool", inputs, attrs, **fixed)


@KINDS
def test_concat(dtype: type) -> None:
    zero = zero_point(dtype)
    inputs = [B, zero, integers(dtype, 2, 3), A, zero, integers(dtype, 2, 5), B, zero]
    check_against_onnxruntime(
        "QLinearConcat", inputs, {"axis": 1}, domain=MICROSOFT, constants=(0, 1, 3, 4, 6, 7)
    )


@KINDS
@pytest.mark.parametrize("last", [0, 1])
def test_conv(dtype: type, last: int) -> None:
    zero = zero_point(dtype)
    shape = (1, 6, 6, 4) if last else (1, 4, 6, 6)
    scales, bias = np.abs(normal(3)) * 0.01, (normal(3) * 500).astype(np.int32)
    inputs = [
        integers(dtype, *shape),
        B,
        zero,
        weights(3, 4, 3, 3),
        scales,
        np.zeros(3, np.int8),
        np.float32(0.3),
        zero,
        bias,
    ]
    attrs = {"pads": [1, 1, 1, 1]}
    if last:
        check_against_onnxruntime(
            "QLinearConv", inputs, {**attrs, "channels_last": 1}, domain=MICROSOFT, constants=range(1, 9)
        )
    else:
        check_against_onnxruntime("QLinearConv", inputs, attrs, constants=range(1, 9))


@KINDS
def test_products(dtype: type) -> None:
    zero, w, scales = zero_point(dtype), weights(4, 5), np.abs(normal(5)) * 0.01
    zeros, bias = np.zeros(5, np.int8), (normal(5) * 500).astype(np.int32)
    left = [integers(dtype, 3, 4), B, zero]
    check_against_onnxruntime("QLinearMatMul", [*left, w, scales, zeros, A, zero], constants=range(1, 8))
    check_against_onnxruntime(
        "QGemm", [*left, w, scales, zeros, bias, A, zero], domain=MICROSOFT, constants=range(1, 9)
    )
    check_against_onnxruntime(
        "QGemm", [*left, w, A, np.int8(2), None], {"alpha": 0.5}, domain=MICROSOFT, constants=range(1, 9)
    )


def test_products_to_float() -> None:
    w, scales, zeros = weights(4, 5), np.abs(normal(5)) * 0.01, np.zeros(5, np.int8)
    inputs = [integers(np.uint8, 2, 3, 4), w, B, scales, np.uint8(100), zeros, normal(5)]
    check_against_onnxruntime("MatMulIntegerToFloat", inputs, domain=MICROSOFT, constants=range(1, 7))
    check_against_onnxruntime(
        "DynamicQuantizeMatMul",
        [normal(2, 3, 4), w, scales, zeros, normal(5)],
        domain=MICROSOFT,
        constants=range(1, 5),
    )
    unsigned = [normal(2, 3, 4), integers(np.uint8, 4, 5), B, np.uint8(100)]
    check_against_onnxruntime("DynamicQuantizeMatMul", unsigned, domain=MICROSOFT, constants=range(1, 5))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_zero", [False, True])
@pytest.mark.parametrize("size", [16, 32])
def test_gather_block_quantized(bits: int, with_zero: bool, size: int) -> None:
    """Tables of numbers packed into bytes; the last block is a part of one."""
    width, rows = 48, 7
    blocks = -(-width // size)
    table = integers(np.uint8, rows, width * bits // 8)
    indices = np.array([[0, 3, 6], [6, -1, 2]], np.int64)
    inputs = [table, indices, np.abs(normal(rows, blocks)) + np.float32(0.01)]
    inputs += [integers(np.uint8, rows, -(-blocks * bits // 8), seed=1)] if with_zero else []
    attrs = {"bits": bits, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
    check_against_onnxruntime("GatherBlockQuantized", inputs, attrs, domain=MICROSOFT, constants=(0, 2, 3), rtol=1e-6)


def test_gather_block_quantized_of_other_scales() -> None:
    given = [integers(np.uint8, 4, 8), np.array([1]), normal(4, 2)]
    attrs = {"bits": 4, "block_size": 16, "gather_axis": 0, "quantize_axis": 1}
    with pytest.raises(ShapeError, match="must be 1"):
        check_call("GatherBlockQuantized", given, attrs, [None], domain=MICROSOFT)
