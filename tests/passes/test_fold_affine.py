"""Affine folding keeps values, folds what it should, and leaves the rest alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicc.ops  # noqa: F401
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph, Value
from minicc.ir.types import TensorType, f32
from minicc.passes.fold_affine import fold_affine
from minicc.passes.manager import PassContext


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def linear(graph: Graph, x: Value, op: str, channels: int, group: int, bias: bool) -> Value:
    """A Conv, ConvTranspose, Gemm or MatMul with random constant weights and `channels` outputs."""
    inputs = x.shape[1]
    assert isinstance(inputs, int)
    if op in ("Gemm", "MatMul"):
        weights = numbers(1, inputs, channels)
        tail = [graph.constant(numbers(2, channels))] if bias and op == "Gemm" else []
        return graph.add(op, [x, graph.constant(weights), *tail]).output
    shape = (channels, inputs // group) if op == "Conv" else (inputs, channels // group)
    extra = [graph.constant(numbers(2, channels))] if bias else []
    return graph.add(op, [x, graph.constant(numbers(1, *shape, 3, 3)), *extra], {"group": group, "pads": (1, 1, 1, 1)}).output


def batch_normalization(graph: Graph, x: Value) -> Value:
    c = x.shape[1]
    assert isinstance(c, int)
    arrays = [numbers(3, c), numbers(4, c), numbers(5, c), np.abs(numbers(6, c)) + 0.5]
    return graph.add("BatchNormalization", [x, *(graph.constant(a) for a in arrays)]).output


def per_channel(graph: Graph, x: Value, op: str, swap: bool) -> Value:
    constant = graph.constant(np.abs(numbers(7, int(x.shape[1]), *([1] * (len(x.shape) - 2)))) + 0.5)
    pair = [constant, x] if swap and op in ("Add", "Mul") else [x, constant]
    return graph.add(op, pair).output


def agree(graph: Graph, x: np.ndarray) -> int:
    before = evaluate(graph, [x])
    changes = fold_affine(graph, PassContext())
    for a, b in zip(before, evaluate(graph, [x]), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(a).max())))
    return changes


@settings(max_examples=60)
@given(
    op=st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul"]), group=st.sampled_from([1, 2, 4]), bias=st.booleans(),
    chain=st.lists(st.sampled_from(["BatchNormalization", "Mul", "Add", "Sub", "Div"]), min_size=1, max_size=4),
    swap=st.booleans(),
)  # fmt: skip
def test_chains_after_a_linear_op(op: str, group: int, bias: bool, chain: list[str], swap: bool) -> None:
    graph = Graph()
    flat = op in ("Gemm", "MatMul")
    shape = (3, 8) if flat else (2, 8, 5, 6)
    y = linear(graph, graph.input("x", TensorType(f32, shape)), op, 4, 1 if flat else group, bias)
    for step in chain:
        y = batch_normalization(graph, y) if step == "BatchNormalization" else per_channel(graph, y, step, swap)
    graph.outputs = [y]
    changes = agree(graph, numbers(0, *shape))
    if op != "MatMul":
        assert changes == len(chain)
        assert [n.op.name for n in graph.nodes] == [op]


@given(scale=st.booleans(), group=st.sampled_from([1, 2]), padded=st.booleans())
def test_before_a_convolution(scale: bool, group: int, padded: bool) -> None:
    graph = Graph()
    x = graph.input("x", TensorType(f32, (1, 4, 6, 6)))
    y = per_channel(graph, x, "Mul" if scale else "Add", False)
    pads = (1, 1, 1, 1) if padded else (0, 0, 0, 0)
    w = graph.constant(numbers(1, 6, 4 // group, 3, 3))
    graph.outputs = [graph.add("Conv", [y, w], {"group": group, "pads": pads}).output]
    assert agree(graph, numbers(0, 1, 4, 6, 6)) == (1 if scale or not padded else 0)


@pytest.mark.parametrize("op", ["Conv", "AveragePool"])
def test_zero_padding_joins_its_reader(op: str) -> None:
    graph = Graph()
    x = graph.input("x", TensorType(f32, (1, 3, 5, 5)))
    padded = graph.add("Pad", [x, graph.constant(np.array([0, 0, 1, 2, 0, 0, 0, 1]))]).output
    inputs = [padded, graph.constant(numbers(1, 2, 3, 3, 3))] if op == "Conv" else [padded]
    graph.outputs = [graph.add(op, inputs, {} if op == "Conv" else {"kernel_shape": (2, 2)}).output]
    assert agree(graph, numbers(0, 1, 3, 5, 5)) == 1
    assert [n.op.name for n in graph.nodes] == [op]


@pytest.mark.parametrize("value", [1.0, -2.0])
def test_other_padding_stays(value: float) -> None:
    graph = Graph()
    x = graph.input("x", TensorType(f32, (1, 3, 5, 5)))
    padded = graph.add("Pad", [x, graph.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])), graph.constant(np.float32(value))]).output
    graph.outputs = [graph.add("Conv", [padded, graph.constant(numbers(1, 2, 3, 3, 3))]).output]
    assert agree(graph, numbers(0, 1, 3, 5, 5)) == 0


def test_a_value_read_twice_stays() -> None:
    graph = Graph()
    y = linear(graph, graph.input("x", TensorType(f32, (1, 4, 5, 5))), "Conv", 4, 1, True)
    graph.outputs = [per_channel(graph, y, "Mul", False), y]
    assert agree(graph, numbers(0, 1, 4, 5, 5)) == 0
    assert Counter(n.op.name for n in graph.nodes) == {"Conv": 1, "Mul": 1}
