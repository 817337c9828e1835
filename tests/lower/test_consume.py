"""Lowering that consumes its graph: the same program, and no weights left behind."""

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings

from minicc.frontend.model import load_model
from minicc.ir.graph import Graph
from minicc.ir.types import TensorType, f32
from minicc.lower import lower as lowering
from minicc.lower.lower import lower
from minicc.lower.serialize import to_data
from minicc.options import Options
from minicc.targets.cpu import host_target
from minicc.walk import optimise
from tests.strategies import models

OPTIONS = Options()


def optimised(proto):
    graph = load_model(proto, OPTIONS).graph
    optimise(graph, OPTIONS)
    return graph


@settings(deadline=None, max_examples=40)
@given(models())
def test_gives_the_same_program(model):
    proto, _ = model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "RELEASED_BYTES", 1)  # the constants of random models are small
        consumed, arrays = to_data(lower(optimised(proto), host_target(), OPTIONS, consume=True))
    kept, expected = to_data(lower(optimised(proto), host_target(), OPTIONS))
    assert consumed == kept
    for array, wanted in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, wanted)


def product(weights, reader="MatMul"):
    """x @ weights, and weights themselves where they are also an output."""
    graph = Graph("product")
    x = graph.input("x", TensorType(f32, (3, weights.shape[0])))
    w = graph.constant(weights, "w")
    graph.outputs = [graph.add(reader, [x, w]).output]
    return graph, w


def test_packed_weights_leave_memory():
    weights = np.ones((80, 64), np.float32)
    gone = weakref.ref(weights)
    graph, w = product(weights)
    del weights
    program = lower(graph, host_target(), OPTIONS, consume=True)
    assert w.data is None and gone() is None
    assert sum(b.data.nbytes for b in program.buffers if b.data is not None) == 80 * 64 * 4


def test_weights_that_are_an_output_or_seen_through_a_view_stay():
    graph, w = product(np.ones((80, 64), np.float32))
    graph.outputs.append(w)
    lower(graph, host_target(), OPTIONS, consume=True)
    assert w.data is not None

    graph, w = product(np.ones((80, 64), np.float32))
    turned = graph.add("Transpose", [w], {"perm": [1, 0]})
    graph.outputs.append(graph.add("Relu", [turned.output]).output)
    lower(graph, host_target(), OPTIONS, consume=True)
    assert w.data is not None


def test_constants_of_a_program_are_aligned_and_contiguous():
    graph, _ = product(np.ones((64, 80), np.float32).T, "MatMul")
    program = lower(graph, host_target(), OPTIONS)
    arrays = [b.data for b in program.buffers if b.data is not None]
    assert arrays and all(a.ctypes.data % 64 == 0 and a.flags.c_contiguous for a in arrays)


def test_replaced_nodes_let_go_of_weights_without_the_garbage_collector():
    weights = np.ones((80, 64), np.float32)
    gone = weakref.ref(weights)
    graph, w = product(weights)
    other = graph.add("MatMul", [graph.inputs[0], graph.constant(np.zeros((80, 64), np.float32))])
    gc.disable()
    try:
        graph.replace(graph.outputs[0], other.output)
        graph.tidy()
        del weights, w
        assert gone() is None
    finally:
        gc.enable()
