"""fold-captures and specialise-ranks: what moves into the branches of an If."""

from __future__ import annotations

import numpy as np
import onnx.backend.test.case.node as node_cases
import pytest

import minicc
from minicc.errors import MiniccError
from minicc.ir.evaluate import evaluate
from minicc.ir.types import TensorType
from minicc.options import Options
from minicc.passes import CAPTURES, FOLD_CONSTANTS, FOLD_SHAPES, MERGE, SIMPLIFY, SPECIALISE
from minicc.passes.manager import Repeat, run_passes
from tests.passes.models import apply, graph_of, ops, walk


def test_captured_constants_become_constants_of_the_bodies() -> None:
    body = """
      v = Neg(w)
      y = If (c) <
        then_branch = t () => (float[2,3] a) { a = Add(x, v) },
        else_branch = e () => (float[2,3] b) { b = Mul(x, v) }
      >
    """
    graph = graph_of(body, "(bool c, float[2,3] x) => (float[2,3] y) <float[3] w = {1, 2, 3}>")
    report = apply(graph, FOLD_CONSTANTS, CAPTURES)
    assert report.rows[1].changes == 1
    assert [v.name for v in graph.nodes[0].inputs if v is not None] == ["c", "x"]
    for node in walk(graph):
        if node.op.name in ("Add", "Mul"):
            assert node.inputs[1] is not None and node.inputs[1].data is not None


SQUEEZED = """
  s = Shape(x)
  n = Gather<axis=0>(s, last)
  c = Equal(n, one)
  t = If (c) <
    then_branch = t () => (float[p] a) { a = Squeeze(x, last_axis) },
    else_branch = e () => (float[p,q] b) { b = Identity(x) }
  >
  r = Relu(t)
  k = Size(r)
  f = Cast<to=1>(k)
  y = Add(r, f)
"""
SIGNATURE = "(float[4,n] x) => (float[] y) <int64 last = {1}, int64 one = {1}, int64[1] last_axis = {1}>"


def test_what_follows_an_undecided_rank_moves_into_the_branches() -> None:
    graph = graph_of(SQUEEZED, SIGNATURE)
    narrow, wide = (np.arange(4 * n, dtype=np.float32).reshape(4, n) for n in (1, 3))
    expected = [evaluate(graph, [x])[0] for x in (narrow, wide)]
    first = Repeat((FOLD_SHAPES, FOLD_CONSTANTS, SPECIALISE, CAPTURES, SIMPLIFY, MERGE))
    run_passes(graph, [first], Options(check=1))
    assert ops(graph)["Relu"] == 2
    for node in walk(graph):
        if node.op.name != "If":
            assert all(isinstance(v.type, TensorType) and v.type.shape is not None for v in node.outputs)
    for x, e in zip((narrow, wide), expected):
        np.testing.assert_array_equal(evaluate(graph, [x])[0], e)


def test_a_branch_that_cannot_work_fails_only_when_it_is_taken() -> None:
    body = SQUEEZED.replace("y = Add(r, f)", "g = Add(r, f) y = Concat<axis=1>(g, g)")
    graph = graph_of(body, SIGNATURE)
    first = Repeat((FOLD_SHAPES, FOLD_CONSTANTS, SPECIALISE, CAPTURES, SIMPLIFY, MERGE))
    run_passes(graph, [first], Options(check=1))
    assert evaluate(graph, [np.ones((4, 3), np.float32)])[0].shape == (4, 6)
    with pytest.raises(MiniccError):
        evaluate(graph, [np.ones((4, 1), np.float32)])


@pytest.mark.parametrize("case", ["test_affine_grid_2d_align_corners_expanded", "test_affine_grid_3d_expanded"])
def test_sizes_found_in_a_branch_survive_its_move_into_the_graph(case: str) -> None:
    """These models reshape by computed sizes inside nested Ifs, which fold one after the other."""
    (found,) = [c for c in node_cases.collect_testcases(None) if c.name == case]
    module = minicc.compile(found.model, threads=1)
    for inputs, expected in found.data_sets:
        results = module.run(None, dict(zip([port.name for port in module.inputs], inputs)))
        np.testing.assert_allclose(results[0], expected[0], rtol=1e-5, atol=1e-5)
