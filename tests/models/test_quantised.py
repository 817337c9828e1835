"""The ways models are quantised with ONNX Runtime's own tools, each end to end beside ONNX Runtime.

Tiny networks, so that most of the time is spent compiling. Nothing may stay on the host.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import minicc
from benchmarks.compare import difference, rule, session

Array = np.ndarray[Any, Any]
quantization = pytest.importorskip("onnxruntime.quantization")
QuantType, QuantFormat = quantization.QuantType, quantization.QuantFormat


Shape = list[int | str]


def network(nodes: list[onnx.NodeProto], weights: dict[str, Array], shape: Shape, out: Shape) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "network", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples(*shape: int, seed: int = 0) -> Array:
    """Standard normal numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def convolutions() -> tuple[onnx.ModelProto, Array]:
    """A residual block with a depthwise convolution, then a classifier."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 16, 1, 1), "w3": (16, 1, 3, 3), "w4": (16, 10), "b4": (10,)}
    weights = {k: rng.normal(0, 0.3, s).astype(np.float32) for k, s in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["d"]),
        helper.make_node("Conv", ["d", "w3"], ["e"], pads=[1] * 4, group=16),
        helper.make_node("GlobalAveragePool", ["e"], ["f"]),
        helper.make_node("Flatten", ["f"], ["g"]),
        helper.make_node("Gemm", ["g", "w4", "b4"], ["y"]),
    ]
    return network(nodes, weights, ["n", 3, 16, 16], ["n", 10]), samples(2, 3, 16, 16)


def products() -> tuple[onnx.ModelProto, Array]:
    """A feed-forward block over a sequence."""
    rng = np.random.default_rng(0)
    weights = {k: rng.normal(0, 0.3, s).astype(np.float32) for k, s in {"w1": (32, 64), "b1": (64,), "w2": (64, 32)}.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"]),
        helper.make_node("Add", ["a", "b1"], ["b"]),
        helper.make_node("Tanh", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w2"], ["d"]),
        helper.make_node("Add", ["d", "x"], ["y"]),
    ]
    return network(nodes, weights, ["n", "s", 32], ["n", "s", 32]), samples(2, 5, 32)


class Samples(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
    """Random inputs for calibration."""

    def __init__(self, like: Array) -> None:
        self.feeds = iter([{"x": samples(*like.shape, seed=seed)} for seed in range(1, 5)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.feeds, None)


def quantise_static(model: onnx.ModelProto, x: Array, folder: Path, activations: Any, weights: Any, form: Any) -> onnx.ModelProto:
    """A model calibrated on inputs like `x`; scales per channel in the QDQ form."""
    symmetric = activations == QuantType.QInt8
    quantization.quantize_static(
        model, folder / "quantised.onnx", Samples(x), quant_format=form, activation_type=activations, weight_type=weights,
        per_channel=form == QuantFormat.QDQ, reduce_range=not symmetric,
        extra_options={"ActivationSymmetric": symmetric},
    )  # fmt: skip
    return onnx.load(folder / "quantised.onnx")


def quantise_dynamic(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A model that quantises activations when it runs."""
    # Without VNNI instructions ONNX Runtime saturates with weights of eight bits.
    quantization.quantize_dynamic(model, folder / "quantised.onnx", weight_type=QuantType.QInt8, reduce_range=True)
    return onnx.load(folder / "quantised.onnx")


def agrees(model: onnx.ModelProto, x: Array, expected_ops: set[str]) -> None:
    assert expected_ops <= {node.op_type for node in model.graph.node}
    data = model.SerializeToString()
    module = minicc.compile(data, strict=True)
    reference = session(data, 1, plain=True)
    for feed in (x, x[:1]):
        (want,) = reference.run(None, {"x": feed})
        (got,) = module.run(None, {"x": feed})
        _, problem = difference(rule(model), "y", want, got)
        assert not problem, problem


@pytest.mark.parametrize(
    ("activations", "weights", "form", "expected_ops"),
    [
        (QuantType.QUInt8, QuantType.QInt8, QuantFormat.QDQ, {"QuantizeLinear", "DequantizeLinear", "Conv"}),
        (QuantType.QInt8, QuantType.QInt8, QuantFormat.QDQ, {"QuantizeLinear", "DequantizeLinear", "Relu"}),
        (QuantType.QUInt8, QuantType.QUInt8, QuantFormat.QOperator, {"QLinearConv", "QLinearAdd", "QGemm"}),
    ],
    ids=["qdq-u8s8", "qdq-s8s8", "operators-u8u8"],
)
def test_static(tmp_path: Path, activations: Any, weights: Any, form: Any, expected_ops: set[str]) -> None:
    model, x = convolutions()
    agrees(quantise_static(model, x, tmp_path, activations, weights, form), x, expected_ops)


def test_static_products(tmp_path: Path) -> None:
    model, x = products()
    target = tmp_path / "quantised.onnx"
    quantization.quantize_static(model, target, Samples(x), per_channel=True, reduce_range=True)
    agrees(onnx.load(target), x, {"QuantizeLinear", "MatMul"})


def test_dynamic(tmp_path: Path) -> None:
    model, x = products()
    agrees(quantise_dynamic(model, tmp_path), x, {"DynamicQuantizeLinear", "MatMulInteger"})


def test_half_precision() -> None:
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    model, x = products()
    agrees(float16.convert_float_to_float16(model, keep_io_types=True), x, {"Cast", "MatMul"})


@pytest.mark.parametrize("zero_points", [False, True])
def test_four_bit_weights(zero_points: bool) -> None:
    """MatMulNBits with blocks of 16: as ONNX Runtime's quantiser writes it, which needs a package that may be missing."""
    rng = np.random.default_rng(0)
    k, n, block = 48, 24, 16
    weights: dict[str, Array] = {
        "packed": rng.integers(0, 256, (n, k // block, block // 2), np.uint8),
        "scales": rng.uniform(0.01, 0.1, n * k // block).astype(np.float32),
        "zeros": rng.integers(0, 256, n * ((k // block + 1) // 2), np.uint8),
    }
    if not zero_points:
        del weights["zeros"]
    attrs = {"K": k, "N": n, "bits": 4, "block_size": block}
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", **attrs)
    model = network([node], weights, ["n", "s", k], ["n", "s", n])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    agrees(model, samples(2, 5, k), {"MatMulNBits"})
