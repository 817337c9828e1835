"""Reductions in two levels: whole modules for CUDA on the PTX interpreter, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

pytest.importorskip("numba.cuda.compiler", reason="numba-cuda is not installed (extra cuda)")

import minicc
from minicc.ir.expr import iteration, load, reduce, walk
from minicc.ir.types import f32
from minicc.lower.body import Write
from minicc.lower.split import split_reductions
from tests.cuda.loop_kernels import TARGET
from tests.cuda.modules import node_model, run_module


def test_a_long_sum_is_made_of_parts() -> None:
    x = np.random.default_rng(1).integers(-9, 9, (2, 3, 40000)).astype(np.float32)
    proto = node_model("ReduceSum", {"x": x, "axes": np.array([0, 2])}, ["y"], ("axes",), keepdims=0)
    module = minicc.compile(proto, target=TARGET.name, strict=True)
    assert len(module.program.steps) == 2
    np.testing.assert_array_equal(run_module(module, {"x": x})[0], x.sum((0, 2)))


def test_reductions_that_need_each_other() -> None:
    x = np.random.default_rng(2).standard_normal((1, 2, 200, 180)).astype(np.float32)
    ones = {"s": np.ones(2, np.float32), "b": np.zeros(2, np.float32)}
    proto = node_model("InstanceNormalization", {"x": x, **ones}, ["y"], ("s", "b"), epsilon=1e-5)
    proto.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))
    proto.graph.output[0].name = "z"
    wide = x.astype(np.float64)
    mean, variance = wide.mean((2, 3), keepdims=True), wide.var((2, 3), keepdims=True)
    module = minicc.compile(proto, target=TARGET.name, strict=True)
    assert len(module.program.steps) > 2
    expected = np.maximum((wide - mean) / np.sqrt(variance + 1e-5), 0)
    np.testing.assert_allclose(run_module(module, {"x": x})[0], expected, rtol=2e-5, atol=2e-6)


def test_sums_of_columns() -> None:
    """Neighbouring results lie side by side, as of a global pool over channels last; the batch is not known."""
    x = np.random.default_rng(3).integers(-9, 9, (2, 14, 12, 20)).astype(np.float32)
    proto = node_model("ReduceSum", {"x": x, "axes": np.array([1, 2])}, ["y"], ("axes",), keepdims=0)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    module = minicc.compile(proto, target=TARGET.name, strict=True)
    assert len(module.program.steps) == 2
    np.testing.assert_array_equal(run_module(module, {"x": x})[0], x.sum((1, 2)))


@pytest.mark.parametrize(("results", "length"), [(1, 1000), (100000, 65536), (1, 65537)])
def test_others_stay_whole(results: int, length: int) -> None:
    """Short ones, ones with many results, and lengths that have no divisor."""
    i, k = iteration(0), iteration(100)
    value = reduce("sum", (100,), (length,), load("x", f32, (i * length + k,)))
    writes = split_reductions([Write("y", f32, i, value)], (results,), lambda *_: pytest.fail("split"))
    assert [e.op for e in walk(writes[0].value)] == [e.op for e in walk(value)]


def test_products_stay_whole() -> None:
    i, j, k = iteration(0), iteration(1), iteration(100)
    value = reduce("sum", (100,), (65536,), load("a", f32, (i * 65536 + k,)) * load("b", f32, (k * 8 + j,)))
    split_reductions([Write("y", f32, i * 8 + j, value)], (4, 8), lambda *_: pytest.fail("split"))
