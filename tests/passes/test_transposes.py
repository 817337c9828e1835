"""sink-transposes: where transposes end up, that the numbers stay, and that it always ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.ir.types import TensorType, f32
from minicc.options import Options
from minicc.passes.fold import fold_constants
from minicc.passes.manager import Pass, random_feeds, run_passes
from minicc.passes.simplify import simplify
from minicc.passes.transposes import axis_groups, sink_transposes
from tests.passes.models import apply, graph_of, ops

SINK = Pass("sink-transposes", sink_transposes)
REST = (Pass("fold-constants", fold_constants), Pass("simplify", simplify))
X = "(float[2,3,4,5] x) => (float[a,b,c,d] y)"
THERE, BACK = "Transpose<perm=[0, 2, 3, 1]>", "Transpose<perm=[0, 3, 1, 2]>"

# nodes between a transpose and its inverse, Transposes in the end
CASES = [
    (f"t = {THERE}(x) y = {BACK}(t)", 0),
    (f"t = {THERE}(x) r = Relu(t) y = {BACK}(r)", 0),
    (f"t = {THERE}(x) c = Constant<value=float[3] {{1, 2, 3}}>() r = Add(t, c) s = Tanh(r) y = {BACK}(s)", 0),
    (f"t = {THERE}(x) r = Relu(t) s = Add(r, t) y = {BACK}(s)", 0),
    (f"t = {THERE}(x) a = Constant<value_ints=[1, 2]>() r = ReduceMean<keepdims=1>(t, a) y = {BACK}(r)", 0),
    (f"t = {THERE}(x) r = Concat<axis=3>(t, t) y = {BACK}(r)", 0),
    (f"t = {THERE}(x) s = Constant<value_ints=[1, 2]>() a, b = Split<axis=3>(t, s) r = Concat<axis=3>(b, a) y = {BACK}(r)", 0),
    (f"t = {THERE}(x) p = Constant<value_ints=[0, 1, 0, 0, 0, 0, 2, 0]>() r = Pad(t, p) y = {BACK}(r)", 0),
    (f"t = {THERE}(x) s = Constant<value_ints=[1]>() e = Constant<value_ints=[3]>() r = Slice(t, s, e, s) y = {BACK}(r)", 0),
    # One stays, at the end.
    (f"t = {THERE}(x) y = Relu(t)", 1),
    (f"t = {THERE}(x) r = Tanh(x) u = {THERE}(r) y = Add(t, u)", 1),
]


@pytest.mark.parametrize(("body", "left"), CASES)
def test_transposes_meet_and_vanish(body: str, left: int) -> None:
    graph = graph_of(f"{body} z = Neg(y)", X.replace(" y)", " z)"))
    apply(graph, SINK, *REST)
    assert ops(graph).get("Transpose", 0) == left
    assert graph.nodes[-1].op.name in ("Neg", "Transpose")


def test_a_transpose_sinks_through_a_reshape_of_other_axes() -> None:
    graph = graph_of(
        f"t = {THERE}(x) s = Constant<value_ints=[2, 20, 3]>() r = Reshape(t, s) u = Relu(r) "
        "v = Transpose<perm=[0, 2, 1]>(u) y = Tanh(v)",
        "(float[2,3,4,5] x) => (float[2,3,20] y)",
    )
    apply(graph, SINK, *REST)
    assert ops(graph).get("Transpose", 0) == 0


@pytest.mark.parametrize(
    ("old", "new", "groups"),
    [
        ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
        ((6, 4), (2, 3, 4), [([0], [0, 1]), ([1], [2])]),
        ((2, 3), (2, 3), [([0], [0]), ([1], [1])]),
        ((2, 3), (3, 2), [([0, 1], [0, 1])]),
        ((4,), (5,), None),
    ],
)
def test_axis_groups(old: tuple[int, ...], new: tuple[int, ...], groups: object) -> None:
    assert axis_groups(old, new) == groups


@st.composite
def chains(draw: st.DrawFn) -> Graph:
    """A chain of transposes, reshapes, slices, reductions and pointwise ops."""
    graph = Graph()
    value = graph.input("x", TensorType(f32, tuple(draw(st.lists(st.sampled_from((1, 2, 3, 4)), min_size=2, max_size=4)))))
    for _ in range(draw(st.integers(2, 8))):
        shape = [int(d) for d in value.shape if isinstance(d, int)]
        kind = draw(st.sampled_from(("transpose", "transpose", "reshape", "pointwise", "add", "reduce", "concat")))
        if kind == "transpose":
            value = graph.add("Transpose", [value], {"perm": tuple(draw(st.permutations(range(len(shape)))))}).output
        elif kind == "reshape":
            at = draw(st.integers(0, len(shape) - 1))
            if at + 1 < len(shape) and draw(st.booleans()):
                shape[at : at + 2] = [shape[at] * shape[at + 1]]
            elif shape[at] % 2 == 0:
                shape[at : at + 1] = [2, shape[at] // 2]
            else:
                shape.insert(at, 1)
            value = graph.add("Reshape", [value, graph.constant(np.array(shape))]).output
        elif kind == "pointwise":
            value = graph.add("Sigmoid", [value]).output
        elif kind == "add":
            small = [d if draw(st.booleans()) else 1 for d in shape]
            value = graph.add("Add", [value, graph.constant(np.arange(np.prod(small), dtype=np.float32).reshape(small))]).output
        elif kind == "reduce":
            axis = graph.constant(np.array([draw(st.integers(0, len(shape) - 1))]))
            value = graph.add("ReduceSum", [value, axis]).output
        else:
            value = graph.add("Concat", [value, value], {"axis": draw(st.integers(0, len(shape) - 1))}).output
    graph.outputs = [value]
    return graph


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(chains())
def test_random_chains_keep_their_numbers(graph: Graph) -> None:
    feeds = random_feeds(graph)
    assert feeds is not None
    expected = evaluate(graph, feeds)[0]
    run_passes(graph, [SINK, *REST, SINK], Options(check=1))
    np.testing.assert_allclose(evaluate(graph, feeds)[0], expected, rtol=1e-5, atol=1e-5)
