"""Dimensions evaluated together against each by itself, and programs bound to one size after another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc.errors import InputError, ResourceLimitError
from minicc.ir.dims import Dim, evaluate, maximum, minimum, symbol
from minicc.ir.types import TensorType, f32
from minicc.runtime.signature import Signature, ports
from minicc.runtime.sizes import DimTable, ShapePattern

NAMES = ("a", "b", "c")
OPERATIONS = (
    lambda x, y: x + y,
    lambda x, y: x - y,
    lambda x, y: x * y,
    minimum,
    maximum,
    lambda x, y: x // (y * y + 1),
    lambda x, y: x % (y * y + 1),
)
dims = st.recursive(
    st.sampled_from(NAMES).map(symbol) | st.integers(-3, 1 << 20),
    lambda inner: st.builds(lambda f, x, y: f(x, y), st.sampled_from(OPERATIONS), inner, inner),
    max_leaves=8,
)


few_dims = st.sampled_from(NAMES).map(symbol) | st.integers(0, 3) | st.sampled_from([symbol("a") * 2, symbol("b") + symbol("a")])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_sizes_read_from_shapes(data: st.DataObject) -> None:
    """The pattern takes what the strict check takes, and reads the same sizes; that it refuses is told by the check's error."""
    declared = data.draw(st.lists(st.none() | st.lists(few_dims, max_size=3), min_size=1, max_size=4))
    sizes = {name: data.draw(st.integers(0, 3)) for name in NAMES}
    shapes = [tuple(evaluate(d, sizes) for d in shape or ()) for shape in declared]
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(shapes) - 1))
        shapes[at] = data.draw(st.lists(st.integers(0, 3), max_size=3).map(tuple))
    types = [TensorType(f32, None if shape is None else tuple(shape)) for shape in declared]
    signature = Signature("m", ports([f"x{i}" for i in range(len(types))], types))
    arrays = [np.empty(shape, np.float32) for shape in shapes]
    found = ShapePattern(declared).sizes(shapes)
    try:
        expected = signature.check(arrays)
    except InputError:
        assert found is None
        with pytest.raises(InputError):
            signature.sizes(arrays)
    else:
        assert found == expected == signature.sizes(arrays)


@given(st.lists(dims, max_size=12), st.lists(st.integers(0, 300) | st.integers(0, 1 << 40), min_size=3, max_size=3))
@settings(max_examples=150, deadline=None)
def test_all_dimensions_at_once(values: list[Dim], given_sizes: list[int]) -> None:
    sizes = dict(zip(NAMES, given_sizes))
    table = DimTable()
    numbers = [table.number(value) for value in values]
    exact = [evaluate(value, sizes) for value in values]
    if any(not -(1 << 63) <= value < 1 << 63 for value in exact):
        with pytest.raises(ResourceLimitError):
            table.evaluate(sizes)
        return
    found = table.evaluate(sizes)
    assert [int(found[number]) for number in numbers] == exact


def layers(matrices: list[np.ndarray]) -> bytes:
    """x + tanh(x @ w) of n rows, for one matrix after the other; the sum of all of them and x."""
    nodes, weights, names = [], [], ["x"]
    for i, matrix in enumerate(matrices):
        weights.append(numpy_helper.from_array(matrix, f"w{i}"))
        nodes += [
            helper.make_node("MatMul", [names[-1], f"w{i}"], [f"p{i}"]),
            helper.make_node("Tanh", [f"p{i}"], [f"t{i}"]),
            helper.make_node("Add", [f"t{i}", names[-1]], [f"x{i}"]),
        ]
        names.append(f"x{i}")
    nodes.append(helper.make_node("Sum", names, ["y"]))
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 24]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "layers", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def test_growing_sizes() -> None:
    """Places and blocks that sizes share are right for each; going back to a size changes nothing."""
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal((24, 24)).astype(np.float32) / 8 for _ in range(4)]
    module = minicc.compile(layers(matrices), threads=1)
    for n in [*range(1, 40), 300, 7, 1]:
        x = rng.standard_normal((n, 24)).astype(np.float32)
        values = [x.astype(np.float64)]
        for w in matrices:
            values.append(values[-1] + np.tanh(values[-1] @ w))
        np.testing.assert_allclose(module(x), np.sum(values, axis=0), rtol=1e-5, atol=1e-5)
