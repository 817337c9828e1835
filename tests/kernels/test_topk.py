"""TopK against Python's sort, and against ONNX Runtime where both define the result."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info

from minicc.errors import ShapeError
from minicc.ir.dims import symbol
from minicc.ir.graph import Graph
from minicc.ir.types import TensorType, f32
from tests.compiling import Array, add_call, compile_graph, host_ops, run_call

TYPES = ["float32", "float16", "int8", "uint64"]


def top(x: Array, k: int, axis: int, largest: bool) -> tuple[Array, Array]:
    """Row by row, by a key that orders NaN above infinity and equals by position."""
    rows = np.moveaxis(x, axis, -1)
    out = np.empty((*rows.shape[:-1], k), np.int64)
    for place in np.ndindex(rows.shape[:-1]):
        row = [v.item() if v.dtype.kind in "iu" else float(v) for v in rows[place]]

        def key(i: int, row: list[float] = row) -> tuple[bool, float, int]:
            nan = isinstance(row[i], float) and math.isnan(row[i])
            value = 0 if nan else row[i]
            return (nan != largest, -value if largest else value, i)

        out[place] = sorted(range(len(row)), key=key)[:k]
    positions = np.moveaxis(out, -1, axis)
    return np.take_along_axis(x, positions, axis), positions


@settings(max_examples=60)
@given(
    name=st.sampled_from(TYPES),
    shape=st.lists(st.sampled_from([1, 2, 3, 8, 40]), min_size=1, max_size=3).map(tuple),
    data=st.data(),
    largest=st.booleans(),
    symbolic=st.booleans(),
    few=st.booleans(),
)
def test_topk(name, shape, data, largest, symbolic, few):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    k = data.draw(st.integers(0, shape[axis]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    if dtype.kind in "iu":
        x = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
        x = x % 4 if few else x  # many equals
    else:
        x = (rng.integers(-3, 4, shape) if few else rng.standard_normal(shape) * 100).astype(dtype)
        special = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0]).astype(dtype)
        x = np.where(rng.random(shape) < 0.2, rng.choice(special, shape), x)
    attrs = {"axis": axis, "largest": int(largest)}
    got, positions = run_call("TopK", (x, np.array([k])), attrs, outputs=2, symbolic=symbolic)
    want, places = top(x, k, axis, largest)
    np.testing.assert_array_equal(positions, places)
    assert positions.dtype == np.int64
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


@pytest.mark.parametrize("k", [1, 7, 100, 2000])
@pytest.mark.parametrize("largest", [0, 1])
def test_long_rows_as_onnx_runtime(k, largest):
    x = np.random.default_rng(k).integers(-500, 500, (3, 2000)).astype(np.float32)
    node = make_node("TopK", ["x", "k"], ["v", "i"], axis=-1, largest=largest)
    infos = [make_tensor_value_info(n, t, None) for n, t in (("x", 1), ("k", 7), ("v", 1), ("i", 7))]
    graph = make_graph([node], "g", infos[:2], infos[2:])
    model = make_model(graph, opset_imports=[make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(onnx.ModelProto.SerializeToString(model))
    want = session.run(None, {"x": x, "k": np.array([k])})
    got = run_call("TopK", (x, np.array([k])), {"largest": largest}, outputs=2)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])


def test_k_known_when_shapes_are_bound():
    """K as a size of an input: min(n, 3) and n itself run; more than there are elements is refused."""
    graph = Graph()
    n, m = symbol("n"), symbol("m")
    x, y = graph.input("x", TensorType(f32, (2, n))), graph.input("y", TensorType(f32, (m,)))
    k = graph.symbolic_constant([m])
    graph.outputs = list(graph.add("TopK", [x, k], outputs=2).outputs) + [graph.add("Neg", [y]).output]
    module = compile_graph(graph)
    assert not host_ops(module)
    data = np.array([[3, 1, 2], [0, 5, 4]], np.float32)
    values, positions, _ = module(data, np.zeros(2, np.float32))
    np.testing.assert_array_equal(values, [[3, 2], [5, 4]])
    np.testing.assert_array_equal(positions, [[0, 2], [1, 2]])
    with pytest.raises(ShapeError):
        module(data, np.zeros(4, np.float32))


def test_k_that_is_data_runs_on_the_host():
    graph = Graph()
    node, _ = add_call(graph, "Cast", [np.array([2], np.float32)], {"to": 7})
    x = graph.input("x", TensorType(f32, (4,)))
    graph.outputs = list(graph.add("TopK", [x, node.output], outputs=2).outputs)
    module = compile_graph(graph)
    assert [op for op, _ in host_ops(module)] == ["TopK"]
    values, _ = module(np.array([2], np.float32), np.array([1, 4, 2, 3], np.float32))
    np.testing.assert_array_equal(values, [4, 3])
