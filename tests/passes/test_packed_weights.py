"""Dequantised weights in the form of MatMulNBits, against ONNX Runtime, which computes with them as floats."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc.ir.graph import Node
from minicc.passes import packed_weights
from tests.lower.test_bits import model as packed_model
from tests.lower.test_bits import templates

Array = np.ndarray[Any, Any]
TYPES = {"i4": ml_dtypes.int4, "u4": ml_dtypes.uint4, "i8": np.int8, "u8": np.uint8}
K, N = 96, 40


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are worth it, too."""
    monkeypatch.setattr(packed_weights, "WORTH", 1)


def dequantised(
    kind: str, scales: str, *, product: str = "MatMul", turned: bool = False, transpose: bool = False, zero: bool = True,
    block: int = 32,
) -> Any:  # fmt: skip
    """A model y = x @ W (+ bias), W [K, N] or turned [N, K] behind a DequantizeLinear. scales: "one", "columns" or "blocks"."""
    rng = np.random.default_rng(len(kind + scales + product))
    low, high = {"i4": (-8, 8), "u4": (0, 16), "i8": (-128, 128), "u8": (0, 256)}[kind]
    shape, depth = ((N, K), 1) if turned else ((K, N), 0)
    blocks = -(-K // block)
    counted: tuple[int, ...] = {"one": (), "columns": (N,), "blocks": (N, blocks) if turned else (blocks, N)}[scales]
    given = {
        "w": rng.integers(low, high, shape).astype(TYPES[kind]),
        "scale": rng.uniform(0.01, 0.05, counted).astype(np.float32),
        "zero": rng.integers(low, high, counted).astype(TYPES[kind]),
    }
    if not zero:
        del given["zero"]
    attributes = {} if scales == "one" else {"axis": depth if scales == "blocks" else 1 - depth}
    if scales == "blocks":
        attributes["block_size"] = block
    nodes = [helper.make_node("DequantizeLinear", list(given), ["f"], name="weights", **attributes)]
    right = "f"
    if transpose:
        nodes.append(helper.make_node("Transpose", ["f"], ["t"], perm=[1, 0]))
        right = "t"
    if product == "Gemm":
        given["bias"] = rng.standard_normal(N).astype(np.float32)
        nodes.append(helper.make_node("Gemm", ["x", right, "bias"], ["y"], name="product", transB=int(turned and not transpose)))
    else:
        nodes.append(helper.make_node("MatMul", ["x", right], ["y"], name="product"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", K])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", N])
    constants = [numpy_helper.from_array(array, name) for name, array in given.items()]
    graph = helper.make_graph(nodes, "dequantised", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def reference(made: Any, x: Array) -> Array:
    """ONNX Runtime's result as the model says; its optimisations would round x to 8 bits for such products."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


CASES = [
    *({"kind": kind, "scales": scales} for kind in TYPES for scales in ("one", "columns", "blocks")),
    *({"kind": "i8", "scales": scales, "product": "Gemm", "turned": True} for scales in ("one", "columns", "blocks")),
    {"kind": "u4", "scales": "blocks", "product": "Gemm"},
    {"kind": "i4", "scales": "columns", "turned": True, "transpose": True},
    {"kind": "i4", "scales": "blocks", "turned": True, "transpose": True, "product": "Gemm", "zero": False},
    {"kind": "u8", "scales": "columns", "zero": False},
    {"kind": "i8", "scales": "blocks", "block": 16, "zero": False},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_dequantised_weights_stay_packed(case: dict[str, Any]) -> None:
    made = dequantised(**case)
    module = minicc.compile(made, keep_bytes=0)
    assert templates(module) == ["gemm_bits"]
    for rows in (1, 9):
        x = np.random.default_rng(rows).standard_normal((rows, K)).astype(np.float32)
        expected = reference(made, x)
        np.testing.assert_allclose(module(x), expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "case",
    [
        {"kind": "i8", "scales": "blocks", "block": 6},  # no whole words
        {"kind": "i8", "scales": "columns", "transpose": True, "turned": False},  # K x N read as N x K would not fit
    ],
)
def test_others_are_computed_as_floats(case: dict[str, Any]) -> None:
    if case.get("transpose"):
        made = dequantised("i8", "columns")
        node = next(n for n in made.graph.node if n.op_type == "DequantizeLinear")
        node.attribute[0].i = 0  # scales along the rows, one for each
        for tensor in made.graph.initializer:
            if tensor.name in ("scale", "zero"):
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.resize(array, K), tensor.name))
    else:
        made = dequantised(**case)
    module = minicc.compile(made, keep_bytes=0)
    assert templates(module) == ["gemm"]
    x = np.random.default_rng(0).standard_normal((3, K)).astype(np.float32)
    expected = reference(made, x)
    np.testing.assert_allclose(module(x), expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


def test_small_matrices_become_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "WORTH", K * N + 1)
    assert templates(minicc.compile(dequantised("i4", "blocks"), keep_bytes=0)) == ["gemm"]


def test_without_a_kernel_weights_become_floats_before_precisions_are_chosen() -> None:
    """So that on a GPU these products are computed in 16 bits like others."""
    from minicc.frontend.model import load_model
    from minicc.options import Options
    from minicc.targets.parse import target_of
    from minicc.walk import optimise

    for made in (packed_model(64, 32)[0], dequantised("i4", "blocks")):
        options = Options(precision="fp16")
        graph = load_model(made, options).graph
        optimise(graph, options, target=target_of("cuda:sm_90"))
        products = [node for node in _all(graph.nodes) if node.op.name == "MatMul"]
        assert [node.output.tensor.dtype.name for node in products] == ["f16"]


def _all(nodes: list[Node]) -> list[Node]:
    inner = [node.attrs["body"].nodes for node in nodes if node.op.name == "Fused"]
    return [*nodes, *(node for body in inner for node in _all(body))]
