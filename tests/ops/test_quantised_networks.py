"""Small networks as ONNX Runtime's quantiser and optimiser write them: same numbers, and nothing on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import minicc
from tests.ops.microsoft import MICROSOFT
from tests.ops.test_matmul import normal

Array = np.ndarray[Any, Any]


def network(nodes: list[Any], inputs: list[Any], weights: dict[str, Array], output: list[Any]) -> onnx.ModelProto:
    fixed = [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "network", inputs, [helper.make_tensor_value_info("y", 1, output)], fixed)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)], ir_version=9)


def optimised(model: Path) -> tuple[onnx.ModelProto, onnxruntime.InferenceSession]:
    """The model as ONNX Runtime runs it, and the session."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(model.with_suffix(".optimised.onnx"))
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath), session


def operators(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node if node.domain == MICROSOFT}


class Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.images = iter([{"x": normal(1, 3, 16, 16, seed=s)} for s in range(8)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.images, None)


@pytest.mark.parametrize("activations", [QuantType.QUInt8, QuantType.QInt8])
@pytest.mark.parametrize("form", [QuantFormat.QOperator, QuantFormat.QDQ])
def test_convolutions(tmp_path: Path, activations: QuantType, form: QuantFormat) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("MaxPool", ["r1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p1", "w2", "b2"], ["c2"], pads=[1] * 4),
        helper.make_node("MaxPool", ["c2"], ["p2"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["p2"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["l"]),
        helper.make_node("Softmax", ["l"], ["y"]),
    ]
    shapes = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (32, 16, 3, 3), "b2": (32,), "w3": (32, 10), "b3": (10,)}
    weights = {name: normal(*shape) * np.float32(0.3) for name, shape in shapes.items()}
    inputs = [helper.make_tensor_value_info("x", 1, ["n", 3, 16, 16])]
    onnx.save(network(nodes, inputs, weights, ["n", 10]), tmp_path / "plain.onnx")
    # Weights of seven bits: without VNNI instructions ONNX Runtime's sums of eight saturate.
    quantize_static(tmp_path / "plain.onnx", tmp_path / "whole.onnx", Images(), quant_format=form, activation_type=activations,
                    weight_type=QuantType.QInt8, reduce_range=True)  # fmt: skip
    model, session = optimised(tmp_path / "whole.onnx")
    assert {"NhwcMaxPool", "QLinearSoftmax", "QLinearConv", "QGemm"} <= operators(model)
    module = minicc.compile(model, threads=1)
    assert not module.stats()["host_nodes"]
    x = normal(4, 3, 16, 16, seed=9)
    np.testing.assert_array_equal(module.run(None, {"x": x})[0], session.run(None, {"x": x})[0])


def test_attention(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("EmbedLayerNormalization", ["words", "", "table", "places", "", "gamma", "beta"], ["e", "counts"],
                         domain=MICROSOFT, epsilon=1e-6),
        helper.make_node("Attention", ["e", "w", "b", "mask"], ["y"], domain=MICROSOFT, num_heads=4),
    ]  # fmt: skip
    shapes = {"table": (50, 32), "places": (16, 32), "gamma": (32,), "beta": (32,), "w": (32, 96), "b": (96,)}
    weights = {name: normal(*shape) * np.float32(0.3) for name, shape in shapes.items()}
    inputs = [helper.make_tensor_value_info(name, 6, ["n", "s"]) for name in ("words", "mask")]
    onnx.save(network(nodes, inputs, weights, ["n", "s", 32]), tmp_path / "plain.onnx")
    quantize_dynamic(tmp_path / "plain.onnx", tmp_path / "whole.onnx", weight_type=QuantType.QUInt8, reduce_range=True)
    model, session = optimised(tmp_path / "whole.onnx")
    assert {"QAttention", "QEmbedLayerNormalization"} <= operators(model)
    module = minicc.compile(model, threads=1)
    assert not module.stats()["host_nodes"]
    rng = np.random.default_rng(0)
    for shape in ((2, 7), (1, 16)):
        feeds = {"words": rng.integers(0, 50, shape).astype(np.int32), "mask": (rng.random(shape) < 0.8).astype(np.int32)}
        np.testing.assert_allclose(module.run(None, feeds)[0], session.run(None, feeds)[0], rtol=1e-3, atol=1e-3)
