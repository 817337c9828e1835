"""Products whose matrices have one row each: the batch becomes the rows, so that shared weights are read once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

import minicc
from minicc.kernels.template import TEMPLATES

DEPTH, COLUMNS = 20, 35
Array = np.ndarray[Any, Any]


def model(batch: tuple[int | str, ...], right: tuple[int, ...], addend: tuple[int, ...], perm: list[int]) -> bytes:
    """y = transpose(x, perm) @ w + b, for x of the shape that `perm` makes (*batch, 1, DEPTH) of."""
    rng = np.random.default_rng(len(batch))
    dims = (*batch, 1, DEPTH)
    own = [dims[perm.index(axis)] for axis in range(len(perm))]
    weights = {"w": rng.standard_normal((*right, DEPTH, COLUMNS)), "b": rng.standard_normal(addend)}
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=perm),
        helper.make_node("MatMul", ["t", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", own), ("y", None))]
    constants = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "rows", ports[:1], ports[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def weights_of(source: bytes) -> tuple[Array, Array]:
    w, b = (numpy_helper.to_array(t).astype(np.float64) for t in ModelProto.FromString(source).graph.initializer)
    return w, b


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_against_numpy(data: st.DataObject) -> None:
    batch = tuple(data.draw(st.lists(st.sampled_from([1, 2, 3, 7]), min_size=1, max_size=3), label="batch"))
    right = tuple(data.draw(st.sampled_from([1, size]), label="right") for size in batch)
    addend = tuple(data.draw(st.sampled_from([1, size]), label="addend") for size in (*batch, 1, COLUMNS))
    perm = list(data.draw(st.permutations(range(len(batch) + 2)), label="perm"))
    source = model(batch, right, addend, perm)
    w, b = weights_of(source)
    dims = (*batch, 1, DEPTH)
    x = np.random.default_rng(1).standard_normal([dims[perm.index(a)] for a in range(len(perm))]).astype(np.float32)
    found = minicc.compile(source, threads=1).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, x.transpose(perm).astype(np.float64) @ w + b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("right", "rows"), [((), 9), ((1, 1), 9)])
def test_steps_of_one_sequence_are_rows(right: tuple[int, ...], rows: int) -> None:
    source = model(("steps", 1), right, (COLUMNS,), [0, 1, 2, 3])
    module = minicc.compile(source, threads=1)
    x = np.ones((rows, 1, 1, DEPTH), np.float32)
    assert module.run(None, {"x": x})[0].shape == (rows, 1, 1, COLUMNS)
    (step,) = [s for s in module.program.steps if getattr(s, "flops", 0)]
    words = dict(zip(TEMPLATES["gemm"].words, step.words))
    assert [words[name].value for name in ("B0", "B1")] == [1, 1]
