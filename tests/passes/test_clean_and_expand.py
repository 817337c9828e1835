"""dead-code, common-subexpressions and expand on small models."""

from __future__ import annotations

import numpy as np
import pytest

from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.ir.opdef import Kind
from minicc.ir.verify import Stage
from minicc.passes.clean import common_subexpressions, dead_code
from minicc.passes.expand import expand
from minicc.passes.manager import Pass, PassContext, random_feeds
from tests.passes.models import apply, graph_of, ops, parse, run_reference, walk

MERGE = Pass("common-subexpressions", common_subexpressions)
DEAD = Pass("dead-code", dead_code)
EXPAND = Pass("expand", expand, Stage.EXPANDED)
X = "(float[2,3] x) => (float[2,3] y)"


def test_equal_nodes_are_computed_once() -> None:
    graph = graph_of("a = Relu(x) b = Relu(x) c = Tanh(a) d = Tanh(b) y = Add(c, d)", X)
    report = apply(graph, MERGE)
    assert ops(graph) == {"Relu": 1, "Tanh": 1, "Add": 1}
    assert report.rows[0].changes == 2


def test_equal_constants_are_one_value() -> None:
    graph = graph_of(
        "a = Add(x, p) y = Add(a, q)", f"{X} <float[3] p = {{1, 2, 3}}, float[3] q = {{1, 2, 3}}>"
    )
    apply(graph, MERGE)
    assert len(graph.constants()) == 1


@pytest.mark.parametrize(
    "body",
    [
        "a = LeakyRelu<alpha=0.1>(x) b = LeakyRelu<alpha=0.2>(x) y = Add(a, b)",  # attributes differ
        "a = Sub(x, p) b = Sub(p, x) y = Add(a, b)",  # order of inputs differs
        "a = RandomNormalLike(x) b = RandomNormalLike(x) y = Add(a, b)",  # random
        "a = Cast<to=6>(x) b = Cast<to=7>(x) c = Cast<to=1>(a) d = Cast<to=1>(b) y = Add(c, d)",  # types
    ],
)
def test_different_nodes_are_not_merged(body: str) -> None:
    graph = graph_of(body, f"{X} <float[3] p = {{1, 2, 3}}>")
    before = len(graph.nodes)
    common_subexpressions(graph, PassContext())
    assert len(graph.nodes) == before


def test_two_outputs_stay_two_values() -> None:
    graph = graph_of("y = Relu(x) z = Relu(x)", "(float[2,3] x) => (float[2,3] y, float[2,3] z)")
    apply(graph, MERGE)
    assert [v.name for v in graph.outputs] == ["y", "z"]
    assert graph.outputs[0] is not graph.outputs[1]


def test_dead_nodes_disappear_also_in_bodies() -> None:
    body = """
      unused = Tanh(x)
      y = If (c) <
        then_branch = t () => (float[2,3] a) { dead = Neg(x) a = Relu(x) },
        else_branch = e () => (float[2,3] b) { b = Neg(x) }
      >
    """
    model = parse(body, "(bool c, float[2,3] x) => (float[2,3] y)")
    graph = load_model(model).graph
    apply(graph, DEAD)
    assert ops(graph) == {"If": 1, "Relu": 1, "Neg": 1}


def test_expanded_graphs_hold_no_composite_ops() -> None:
    body = """
      a = LayerNormalization<axis=-1>(x, w)
      b = Softmax<axis=-1>(a)
      y = Gemm<transB=1, alpha=0.5>(b, m)
    """
    signature = "(float[2,3] x, float[3] w, float[4,3] m) => (float[2,4] y)"
    model = parse(body, signature)
    graph = load_model(model).graph
    feeds = random_feeds(graph)
    assert feeds is not None
    expected = run_reference(model, {v.name: f for v, f in zip(graph.inputs, feeds)})
    report = apply(graph, EXPAND)
    assert all(node.op.kind is not Kind.EXPAND for node in walk(graph))
    assert report.rows[0].rules["LayerNormalization"] == 1
    np.testing.assert_allclose(evaluate(graph, feeds)[0], expected[0], rtol=1e-5, atol=1e-6)
    assert all(node.origin for node in graph.nodes)


def test_ops_a_target_keeps_stay_whole() -> None:
    graph = graph_of("y = LayerNormalization<axis=-1>(x, w)", "(float[2,3] x, float[3] w) => (float[2,3] y)")
    context = PassContext(keep=lambda node: node.op.name == "LayerNormalization")
    apply(graph, EXPAND, context=context)
    assert ops(graph) == {"LayerNormalization": 1}
