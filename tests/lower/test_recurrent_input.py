"""Recurrent layers behind a transposition, whose sequences lie apart in memory, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import minicc

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
INPUT, HIDDEN = 11, 20


def model(cell: str, directions: int, perm: list[int]) -> bytes:
    rng = np.random.default_rng(0)
    width = GATES[cell] * HIDDEN
    shapes = {"w": (directions, width, INPUT), "r": (directions, width, HIDDEN), "b": (directions, 2 * width)}
    weights = [numpy_helper.from_array(rng.uniform(-0.4, 0.4, s).astype(np.float32), n) for n, s in shapes.items()]
    direction = "bidirectional" if directions == 2 else "forward"
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=perm),
        helper.make_node(cell, ["t", "w", "r", "b"], ["y", "h"], direction=direction, hidden_size=HIDDEN),
    ]
    dims = [["steps", "batch", INPUT][perm.index(axis)] for axis in range(3)]
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)]
    ports += [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * rank) for n, rank in (("y", 4), ("h", 3))]
    graph = helper.make_graph(nodes, "recurrent", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


@pytest.mark.parametrize("perm", [[1, 0, 2], [0, 1, 2], [2, 0, 1]], ids=str)
@pytest.mark.parametrize(("cell", "directions"), [("LSTM", 2), ("GRU", 1), ("RNN", 2)])
def test_against_onnx_runtime(cell: str, directions: int, perm: list[int]) -> None:
    source = model(cell, directions, perm)
    module = minicc.compile(source, threads=2)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    for steps, batch in ((9, 1), (5, 3), (1, 8), (2, 1)):
        sizes = (steps, batch, INPUT)
        x = rng.standard_normal([sizes[perm.index(axis)] for axis in range(3)]).astype(np.float32)
        for found, wanted in zip(module.run(None, {"x": x}), session.run(None, {"x": x}), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
