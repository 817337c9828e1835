"""Numpy execution: binding of symbols, observers, limits, errors."""

import numpy as np
import pytest

from minicc.errors import InputError, ResourceLimitError, ShapeError, VerifyError
from minicc.ir.dims import symbol
from minicc.ir.evaluate import evaluate, evaluate_node, materialise
from minicc.ir.graph import Builder, Graph
from minicc.ir.opdef import Kind, OpDef
from minicc.ir.types import OpaqueType, TensorType, f32, i64

N = symbol("n")


def same(n):
    return [n.type(0)]


def pointwise(name, function):
    return OpDef(name, Kind.HOST, same, function)


DOUBLE = pointwise("Double", lambda x: x + x)
FAIL = pointwise("Fail", lambda x: x.reshape(7, 7))
WRONG_TYPE = pointwise("WrongType", lambda x: x.astype(np.float64))
WRONG_RANK = pointwise("WrongRank", lambda x: x.reshape(-1))
NON_ZERO = OpDef(
    "NonZeroes", Kind.HOST, lambda n: [TensorType(i64, (n.fresh("found"),))], lambda x: np.flatnonzero(x)
)
TWO = OpDef("Two", Kind.HOST, lambda n: [n.type(0)] * 2, lambda x: (x, -x))
FILL = OpDef("Fill", Kind.HOST, lambda n: [TensorType(f32, tuple(n.content(0) if n.content(0) is not None else
                                                              [n.fresh("f") for _ in range(n.shape(0)[0])]))],
             lambda s: np.zeros(s, np.float32), static_inputs=(0,))  # fmt: skip
X = np.arange(6, dtype=np.float32).reshape(3, 2)


def graph_of(*ops):
    graph = Graph()
    value = graph.input("x", TensorType(f32, (N, 2)))
    for op in ops:
        value = graph.add(op, [value]).output
    graph.outputs = [value]
    return graph


def test_by_name_and_in_order():
    graph = graph_of(DOUBLE, DOUBLE)
    for feeds in ({"x": X}, [X]):
        np.testing.assert_array_equal(evaluate(graph, feeds)[0], 4 * X)


def test_symbolic_constants_get_numbers_from_input_shapes():
    graph = graph_of(DOUBLE)
    graph.outputs = [*graph.outputs, graph.symbolic_constant([N * 2 + 1, 7, N // 2])]
    _, sizes = evaluate(graph, [X])
    assert sizes.dtype == np.int64
    assert sizes.tolist() == [7, 7, 1]


def test_symbols_of_computed_values_are_bound():
    graph = graph_of(NON_ZERO)
    (found,) = graph.outputs[0].shape
    graph.outputs = [graph.symbolic_constant([found])]
    graph.outputs[0].name = "count"
    keep = graph.nodes[0]
    assert evaluate(graph, [X])[0].tolist() == [5]
    assert keep.output.uses == []


def test_unbound_symbol_is_an_error_unless_given():
    graph = Graph()
    graph.outputs = [graph.symbolic_constant([symbol("elsewhere")])]
    with pytest.raises(ShapeError, match="elsewhere"):
        evaluate(graph, [])
    assert evaluate(graph, [], sizes={"elsewhere": 4})[0].tolist() == [4]
    assert materialise(graph.outputs[0], {"elsewhere": 9}).tolist() == [9]


def test_observer_sees_all_outputs_in_order():
    graph = graph_of(DOUBLE, TWO, NON_ZERO)
    seen = []
    evaluate(graph, [X], observe=lambda node, outputs: seen.append((node.op.name, len(outputs))))
    assert seen == [("Double", 1), ("Two", 1), ("NonZeroes", 1)]


def test_fused_body_runs():
    graph = Graph()
    x = graph.input("x", TensorType(f32, (N, 2)))
    body = graph.subgraph("body")
    inner = body.input("x", x.type)
    body.outputs = [body.add(DOUBLE, [inner]).output]
    fused = OpDef(
        "Fused", Kind.CONTROL, lambda n: [v.type for v in n.attr("body").outputs], attrs={"body": None}
    )
    graph.outputs = [graph.add(fused, [x], {"body": body}).output]
    np.testing.assert_array_equal(evaluate(graph, [X])[0], 2 * X)


@pytest.mark.parametrize("feeds", [{}, [], {"y": X}, [X, X], [X.astype(np.float16)], [X[0]], [X[:, :1]]])
def test_feeds_that_do_not_fit(feeds):
    with pytest.raises(InputError):
        evaluate(graph_of(DOUBLE), feeds)


def test_opaque_values_pass_through():
    graph = Graph()
    x = graph.input("s", OpaqueType("seq(tensor(float))"))
    head = OpDef("Head", Kind.HOST, lambda n: [TensorType(f32, None)], lambda s: s[0])
    graph.outputs = [x, graph.add(head, [x]).output]
    sequence, first = evaluate(graph, [[X, -X]])
    assert len(sequence) == 2
    np.testing.assert_array_equal(first, X)


def test_failure_names_the_node():
    with pytest.raises(ShapeError, match=r"Fail \(f32\[n,2\]\)") as caught:
        evaluate(graph_of(FAIL), [X])
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("op", [WRONG_TYPE, WRONG_RANK])
def test_result_that_contradicts_inference_is_our_bug(op):
    with pytest.raises(VerifyError, match="inferred type"):
        evaluate(graph_of(op), [X])


def test_limit_is_met_before_allocation():
    graph = Graph()
    shape = graph.input("s", TensorType(i64, (2,)))
    graph.outputs = [graph.add(FILL, [shape]).output]
    assert evaluate(graph, [np.array([2, 3])])[0].shape == (2, 3)
    with pytest.raises(ResourceLimitError, match="max_bytes"):
        evaluate(graph, [np.array([1 << 40, 1 << 20])])


def test_limit_with_symbolic_sizes():
    with pytest.raises(ResourceLimitError):
        evaluate(graph_of(DOUBLE), [X], max_bytes=8)


def test_values_are_dropped_after_their_last_use():
    graph = Graph()
    b = Builder(graph)
    assert b.graph is graph
    value = graph.input("x", TensorType(f32, (N, 2)))
    for _ in range(4):
        value = graph.add(DOUBLE, [value]).output
    graph.outputs = [value]
    import weakref

    alive: list[weakref.ref] = []
    counts = []

    def observe(node, outputs):
        alive.append(weakref.ref(outputs[0]))
        counts.append(sum(r() is not None for r in alive))

    evaluate(graph, [X], observe=observe)
    assert max(counts) <= 2


def test_one_node():
    graph = graph_of(TWO)
    (node,) = graph.nodes
    (first,) = evaluate_node(node, [X])
    np.testing.assert_array_equal(first, X)
