"""Softmax-like rows: the terms of the sum are kept in the output, and only where that is right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import minicc

LAST = [-1]


def model(body: list[tuple[str, list[str], dict[str, object]]], rank: int) -> bytes:
    """Nodes (op, inputs, attributes), each with the output v0, v1, ...; the last one is the result."""
    nodes = [helper.make_node(op, names, [f"v{i}"], **attrs) for i, (op, names, attrs) in enumerate(body)]
    dims = [f"d{i}" for i in range(rank)]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n in ("x", f"v{len(body) - 1}")]
    axes = helper.make_tensor("last", TensorProto.INT64, [1], LAST)
    graph = helper.make_graph(nodes, "rows", ports[:1], ports[1:], [axes])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


SUM = ("ReduceSum", ["v0", "last"], {"keepdims": 1})
CASES = {
    "softmax": [("Softmax", ["x"], {"axis": -1})],
    "share of exponentials": [("Exp", ["x"], {}), SUM, ("Div", ["v0", "v1"], {})],
    "term used twice": [("Tanh", ["x"], {}), SUM, ("Sub", ["v0", "v1"], {}), ("Mul", ["v2", "v0"], {})],
    "input used again": [("Exp", ["x"], {}), SUM, ("Div", ["v0", "v1"], {}), ("Add", ["v2", "x"], {})],
}


def exact(name: str, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    if name == "softmax":
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)
    term = np.tanh(x) if name == "term used twice" else np.exp(x)
    total = term.sum(-1, keepdims=True)
    if name == "term used twice":
        return (term - total) * term
    return term / total + (x if name == "input used again" else 0)


@pytest.fixture(scope="module", params=CASES)
def compiled(request: pytest.FixtureRequest) -> tuple[str, minicc.CompiledModule]:
    return request.param, minicc.compile(model(CASES[request.param], 2), threads=2)


@given(st.integers(1, 40), st.integers(1, 130), st.integers(0, 1 << 20))
@settings(max_examples=40, deadline=None)
def test_rows(compiled: tuple[str, minicc.CompiledModule], rows: int, columns: int, seed: int) -> None:
    name, module = compiled
    x = np.random.default_rng(seed).uniform(-6, 6, (rows, columns)).astype(np.float32)
    np.testing.assert_allclose(module(x), exact(name, x), rtol=1e-5, atol=1e-5)


def test_each_exponential_is_computed_once() -> None:
    source = minicc.compile(model(CASES["softmax"], 2), threads=1).source()
    assert source.count("exp_f32(") == 1


@pytest.mark.parametrize("shape", [(64, 5000), (3, 20_000), (1, 1)])
def test_long_rows_and_one_row(shape: tuple[int, int], tmp_path) -> None:
    module = minicc.compile(model(CASES["softmax"], 2), threads=2)
    module.save(tmp_path / "rows.minicc")
    x = np.random.default_rng(0).uniform(-6, 6, shape).astype(np.float32)
    for each in (module, minicc.load(tmp_path / "rows.minicc")):
        np.testing.assert_allclose(each(x), exact("softmax", x), rtol=1e-5, atol=1e-9)
