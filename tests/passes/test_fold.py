"""fold-shape-values and fold-constants: what becomes a constant, what stays, and what it must not cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minicc.ir.dims import symbol
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.ir.types import TensorType, f32
from minicc.options import Options
from minicc.passes.fold import fold_constants, fold_shape_values
from minicc.passes.manager import Pass, PassContext, run_passes
from tests.passes.models import apply, graph_of, ops

SHAPES = Pass("fold-shape-values", fold_shape_values)
CONSTANTS = Pass("fold-constants", fold_constants)


def test_shape_arithmetic_disappears() -> None:
    body = """
      s = Shape(x)
      n = Gather<axis=0>(s, zero)
      twice = Mul(n, two)
      size = Unsqueeze(twice, zero_vector)
      target = Concat<axis=0>(size, minus_one)
      y = Reshape(x, target)
    """
    signature = """(float[n,6] x) => (float[a,b] y)
        <int64 zero = {0}, int64 two = {2}, int64[1] zero_vector = {0}, int64[1] minus_one = {-1}>"""
    graph = graph_of(body, signature)
    report = apply(graph, SHAPES)
    assert ops(graph) == {"Reshape": 1}
    assert report.rows[0].changes > 0
    n = symbol("n")
    assert graph.outputs[0].tensor.shape == (2 * n, 3)
    assert [str(v) for v in graph.constants()[0].content.flat] == ["2*n", "-1"]  # type: ignore[union-attr]


def test_a_size_found_at_run_time_keeps_its_node() -> None:
    body = "i = NonZero(x) s = Shape(i) y = Cast<to=1>(s)"
    graph = graph_of(body, "(float[n] x) => (float[2] y)")
    context = PassContext()
    x = np.array([0, 1, 2, 0, 3], dtype=np.float32)
    apply(graph, SHAPES, context=context, feeds=[x])
    assert ops(graph) == {"NonZero": 1, "Shape": 1, "Cast": 1}
    assert evaluate(graph, [x])[0].tolist() == [1, 3]
    assert context.refusals == {("fold-shape-values", "a size is known only at run time"): 1}


def test_graph_outputs_stay_computed() -> None:
    graph = graph_of("y = Shape(x)", "(float[n,6] x) => (int64[2] y)")
    apply(graph, SHAPES, CONSTANTS)
    assert ops(graph) == {"Shape": 1}


def test_constants_are_evaluated_with_their_types() -> None:
    body = """
      t = Add(a, b)
      u = Cast<to=10>(t)
      v = Cast<to=1>(u)
      y = Mul(x, v)
    """
    graph = graph_of(body, "(float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {0.1, 0.2}>")
    report = apply(graph, CONSTANTS)
    assert ops(graph) == {"Mul": 1}
    assert report.rows[0].rules == {"Add": 1, "Cast": 2}
    folded = graph.nodes[0].inputs[1]
    assert folded is not None and folded.data is not None
    expected = np.array([1.1, 2.2], dtype=np.float32).astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(folded.data, expected)


def test_data_dependent_shapes_of_constants_become_known() -> None:
    body = "i = NonZero(a) s = Shape(i) c = Cast<to=1>(s) t = Add(c, x) y = Relu(t)"
    graph = graph_of(body, "(float[2] x) => (float[2] y) <float[3] a = {0, 1, 2}>")
    apply(graph, CONSTANTS)
    assert ops(graph) == {"Add": 1, "Relu": 1}


@pytest.mark.parametrize(("size", "folded"), [(16_000, True), (1_000_000, False)])
def test_large_results_are_not_stored(size: int, folded: bool) -> None:
    graph = Graph()
    x = graph.input("x", TensorType(f32, (size,)))
    big = graph.add(
        "Expand", [graph.constant(np.ones(1, np.float32)), graph.constant(np.array([size]))]
    ).output
    graph.outputs = [graph.add("Add", [x, big]).output]
    report = apply(graph, CONSTANTS)
    assert ("Expand" not in ops(graph)) is folded
    assert bool(report.rows[0].refusals) is not folded


def test_a_billion_elements_are_not_even_tried() -> None:
    graph = Graph()
    x = graph.input("x", TensorType(f32, (1,)))
    shape = graph.constant(np.array([1 << 20, 1 << 20]))
    big = graph.add("Expand", [graph.constant(np.ones(1, np.float32)), shape]).output
    corner = graph.add("Slice", [big, *(graph.constant(np.array(v)) for v in ([0, 0], [1, 1]))]).output
    graph.outputs = [graph.add("Add", [x, corner]).output]
    run_passes(graph, [CONSTANTS], Options())
    assert ops(graph)["Expand"] == 1


def test_random_nodes_are_not_folded() -> None:
    graph = graph_of("r = RandomUniform<shape=[3]>() y = Add(x, r)", "(float[3] x) => (float[3] y)")
    run_passes(graph, [CONSTANTS], Options())
    assert ops(graph) == {"RandomUniform": 1, "Add": 1}


def test_a_known_condition_takes_one_branch() -> None:
    body = """
      s = Size(x)
      c = Greater(s, three)
      y = If (c) <
        then_branch = t () => (float[2,3] a) { a = Relu(x) },
        else_branch = e () => (float[2,3] b) { b = Neg(x) }
      >
    """
    graph = graph_of(body, "(float[2,3] x) => (float[2,3] y) <int64 three = {3}>")
    apply(graph, SHAPES, CONSTANTS)
    assert ops(graph) == {"Relu": 1}


def test_a_branch_that_only_passes_on_keeps_the_output_a_value_of_its_own() -> None:
    body = """
      y = If (c) <
        then_branch = t () => (float[2,3] a) { a = Identity(x) },
        else_branch = e () => (float[2,3] b) { b = Neg(x) }
      >
    """
    graph = graph_of(body, "(float[2,3] x) => (float[2,3] y) <bool c = {1}>")
    apply(graph, CONSTANTS)
    assert graph.outputs[0].producer is not None
    assert set(ops(graph)) == {"Identity"}


def test_nothing_is_folded_in_a_graph_without_constants() -> None:
    graph = graph_of("t = Relu(x) y = Neg(t)", "(float[2,3] x) => (float[2,3] y)")
    rows: Any = apply(graph, SHAPES, CONSTANTS).rows
    assert [row.changes for row in rows] == [0, 0]
