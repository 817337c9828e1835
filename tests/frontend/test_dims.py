"""Sizes of symbolic input dimensions fixed at import: `Options.dims`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

import minicc
from minicc.errors import InputError, MiniccError
from minicc.frontend.model import load_model
from minicc.options import Options

Array = np.ndarray[Any, Any]


def model() -> ModelProto:
    """A sum over pairs of rows, which needs an even number of them."""
    nodes = [
        helper.make_node("Shape", ["a"], ["s"]),
        helper.make_node("Slice", ["s", "zero", "one"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["a", "shape"], ["pairs"]),
        helper.make_node("ReduceSum", ["pairs", "two"], ["sums"], keepdims=0),
        helper.make_node("Add", ["sums", "b"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", "row count", 3]),
        helper.make_tensor_value_info("b", TensorProto.FLOAT, ["batch", 1, None]),
    ]
    numbers = {"zero": [0], "one": [1], "two": [2], "rest": [-1, 2, 3]}
    weights = [helper.make_tensor(name, TensorProto.INT64, [len(v)], v) for name, v in numbers.items()]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def expected(a: Array, b: Array) -> Array:
    return a.reshape(a.shape[0], -1, 2, 3).sum(2) + b


rows = st.sampled_from([2, 4, 6])
sizes = {"batch": st.integers(1, 4), "row count": rows, "row_count": st.just(4), "b_d2": st.sampled_from([1, 3])}


@given(fixed=st.fixed_dictionaries({}, optional=sizes))
@settings(max_examples=40, deadline=None)
def test_only_the_named_dimensions_get_sizes(fixed: dict[str, int]) -> None:
    if "row count" in fixed and fixed["row count"] != fixed.get("row_count", fixed["row count"]):
        with pytest.raises(InputError, match="two sizes"):
            load_model(model(), Options(dims=fixed))
        return
    rows = fixed.get("row count", fixed.get("row_count", "row_count"))
    imported = load_model(model(), Options(dims=fixed))
    shown = [str(a) for a in imported.inputs]
    batch = fixed.get("batch", "batch")
    assert shown == [f"a: f32[{batch},{rows},3]", f"b: f32[{batch},1,{fixed.get('b_d2', 'b_d2')}]"]


@pytest.mark.parametrize("given_as", [{"batch": 2, "row count": 4}, "batch=2, row count=4"])
def test_a_module_of_fixed_sizes(given_as: Any) -> None:
    module = minicc.compile(model(), dims=given_as, strict=True)
    assert [str(port) for port in module.inputs] == ["a: f32[2,4,3]", "b: f32[2,1,b_d2]"]
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 4, 3), np.float32), rng.random((2, 1, 3), np.float32)
    np.testing.assert_allclose(module(a, b), expected(a, b), rtol=1e-6)
    with pytest.raises(MiniccError):
        module(rng.random((3, 4, 3), np.float32), rng.random((3, 1, 3), np.float32))


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ({"bacth": 1}, "did you mean 'batch'"),
        ({"a": 1}, "row_count"),
        ({"batch": -1}, "not negative"),
        ({"batch": True}, "not negative"),
        ({"batch": 1.5}, "not negative"),
        ("batch", "write batch=1"),
        ("batch=x", "write batch=1"),
        ("batch=1,batch=2", "two sizes"),
        ({"batch": 1, "row count": 3}, ""),  # the model itself needs pairs
    ],
)
def test_what_does_not_fit_says_why(dims: Any, words: str) -> None:
    with pytest.raises(MiniccError) as raised:
        minicc.compile(model(), dims=dims)
    assert words in str(raised.value)


def test_a_model_without_symbols_says_so() -> None:
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [info], [out])
    with pytest.raises(InputError, match="all their sizes are known"):
        load_model(helper.make_model(graph), Options(dims={"n": 1}))


def test_the_environment_gives_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICC_DIMS", "batch=7,b_d2=1")
    assert Options.from_env().dims == {"batch": 7, "b_d2": 1}
