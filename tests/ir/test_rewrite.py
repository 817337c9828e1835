"""The rewrite driver: matching, captures, sharing, origins, refusals, termination."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minicc.ops  # noqa: F401  registers the ops
from minicc.errors import VerifyError
from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.rewrite import any_of, const, match, op, refuse, rewrite, rule, scalar, var
from minicc.ir.types import TensorType, f32
from minicc.ir.verify import verify

X = TensorType(f32, (2, 3))


def chain(*names: str) -> Graph:
    """x through unary ops, each with its name as origin."""
    graph = Graph()
    value = graph.input("x", X)
    for i, name in enumerate(names):
        value = graph.add(name, [value], origin=(f"{name.lower()}{i}",)).output
    graph.outputs = [value]
    return graph


@rule("neg-of-neg", op("Neg", op("Neg", var("x"))))
def neg_of_neg(b: Builder, x: Value) -> Any:
    """-(-x) = x."""
    return x


@rule("relu-to-abs", op("Relu", op("Tanh", var("x"), name="inner"), name="outer"))
def relu_to_abs(b: Builder, x: Value, inner: Node, outer: Node) -> Any:
    """A made-up rule with a replacement of two nodes."""
    return b.op("Abs", b.op("Sin", x))


def names(graph: Graph) -> list[str]:
    return [node.op.name for node in graph.nodes]


def test_a_match_is_replaced_and_origins_are_merged() -> None:
    graph = chain("Tanh", "Relu", "Erf")
    found = rewrite(graph, [relu_to_abs])
    assert names(graph) == ["Sin", "Abs", "Erf"]
    assert [node.origin for node in graph.nodes] == [("tanh0", "relu1"), ("tanh0", "relu1"), ("erf2",)]
    assert found.applied == {"relu-to-abs": 1} and found.changes == 1
    verify(graph)


def test_rules_fire_again_on_what_rules_leave() -> None:
    graph = chain("Tanh", *["Neg"] * 7, "Relu")
    rewrite(graph, [neg_of_neg])
    assert names(graph) == ["Tanh", "Neg", "Relu"]


def test_an_inner_value_read_elsewhere_stops_the_match() -> None:
    graph = chain("Tanh", "Relu")
    graph.outputs.append(graph.nodes[0].output)
    assert rewrite(graph, [relu_to_abs]).changes == 0


def test_shared_allows_other_readers() -> None:
    @rule("shared", op("Relu", op("Tanh", var("x"), name="inner", shared=True)))
    def shared(b: Builder, x: Value, inner: Node) -> Any:
        return b.op("Abs", x)

    graph = chain("Tanh", "Relu")
    graph.outputs.append(graph.nodes[0].output)
    assert rewrite(graph, [shared]).changes == 1
    assert sorted(names(graph)) == ["Abs", "Tanh"]


def test_commutative_operands_match_both_ways() -> None:
    graph = Graph()
    x = graph.input("x", X)
    one = graph.constant(np.ones(3, np.float32))
    pattern = op("Mul", op("Tanh", var("x")), const("c"))
    for inputs in ((0, 1), (1, 0)):
        operands = (graph.add("Tanh", [x]).output, one)
        node = graph.add("Mul", [operands[i] for i in inputs])
        graph.outputs = [node.output]
        found = match(graph, pattern, node)
        assert found is not None and found[0] == {"x": x, "c": one}
    assert match(graph, op("Sub", op("Tanh", var("x")), const("c")), node) is None


def test_one_name_means_one_value() -> None:
    graph = Graph()
    x, y = graph.input("x", X), graph.input("y", X)
    pattern = op("Add", var("a"), var("a"))
    assert match(graph, pattern, graph.add("Add", [x, x])) is not None
    assert match(graph, pattern, graph.add("Add", [x, y])) is None


def test_scalars_match_by_value() -> None:
    graph = Graph()
    x = graph.input("x", X)
    node = graph.add("Mul", [x, graph.constant(np.array([[0.5]], np.float32))])
    assert match(graph, op("Mul", var("x"), scalar(0.5)), node) is not None
    assert match(graph, op("Mul", var("x"), scalar(0.25)), node) is None
    assert match(graph, op("Mul", var("x"), any_of(scalar(0.25), scalar(0.5))), node) is not None


def test_attributes_are_part_of_a_pattern() -> None:
    graph = chain()
    node = graph.add("LeakyRelu", [graph.inputs[0]], {"alpha": 0.5})
    assert match(graph, op("LeakyRelu", var("x"), alpha=0.5), node) is not None
    assert match(graph, op("LeakyRelu", var("x"), alpha=0.25), node) is None


def test_refusals_are_counted_and_leave_no_trace() -> None:
    @rule("hesitant", op("Relu", name="node"))
    def hesitant(b: Builder, node: Node) -> Any:
        b.op("Sin", node.inputs[0])
        return refuse("not today")

    graph = chain("Relu")
    found = rewrite(graph, [hesitant])
    assert found.refused == {("hesitant", "not today"): 1} and found.changes == 0
    assert names(graph) == ["Relu"] and len(graph.inputs[0].uses) == 1
    verify(graph)


def test_a_replacement_of_another_type_is_refused() -> None:
    @rule("wrong", op("Relu", var("x")))
    def wrong(b: Builder, x: Value) -> Any:
        return b.op("Transpose", x, perm=[1, 0])

    graph = chain("Relu")
    found = rewrite(graph, [wrong])
    assert found.changes == 0 and "the type would change" in next(iter(found.refused))[1]
    verify(graph)


def test_a_graph_output_keeps_a_node_and_its_name() -> None:
    graph = chain("Neg", "Neg")
    graph.outputs[0].name = "result"
    assert rewrite(graph, [neg_of_neg]).changes == 0
    graph = chain("Tanh", "Neg", "Neg")
    graph.outputs[0].name = "result"
    assert rewrite(graph, [neg_of_neg]).changes == 1
    assert graph.outputs[0].name == "result"


def test_rules_that_undo_each_other_are_named() -> None:
    @rule("there", op("Relu", var("x")))
    def there(b: Builder, x: Value) -> Any:
        return b.op("Tanh", x)

    @rule("back", op("Tanh", var("x")))
    def back(b: Builder, x: Value) -> Any:
        return b.op("Relu", x)

    with pytest.raises(VerifyError, match="there") as raised:
        rewrite(chain("Relu", "Erf"), [there, back])
    assert "back" in str(raised.value)
