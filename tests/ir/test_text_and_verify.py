"""The printed form of graphs, and the verifier: every broken invariant is named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import minicc.ops  # noqa: F401  registers the ops
from minicc.errors import VerifyError
from minicc.ir.dims import symbol
from minicc.ir.graph import Graph, Value
from minicc.ir.text import print_graph, print_node
from minicc.ir.types import TensorType, f32, f64, i64
from minicc.ir.verify import Stage, verify


def sample() -> Graph:
    """x -> Relu -> Reshape([n, 12]) -> Add(constant)."""
    graph = Graph("sample")
    n = symbol("n")
    x = graph.input("x", TensorType(f32, (n, 3, 4)))
    relu = graph.add("Relu", [x], origin=("layer1/relu",), names=["r"]).output
    shape = graph.symbolic_constant([n, 12])
    flat = graph.add("Reshape", [relu, shape], {"allowzero": 1}, origin=("flatten",), names=["flat"]).output
    weights = graph.constant(np.ones((12,), np.float32), "w")
    graph.outputs = [graph.add("Add", [flat, weights], origin=("add",), names=["y"]).output]
    return graph


def test_printed_form() -> None:
    assert print_graph(sample()) == (
        "graph sample(x: f32[n,3,4]) -> (y: f32[n,12])\n"
        "  r: f32[n,3,4]   = Relu(x)                          # layer1/relu\n"
        "  flat: f32[n,12] = Reshape(r, [n, 12]) allowzero=1  # flatten\n"
        "  y: f32[n,12]    = Add(flat, w:f32[12])             # add\n"
    )


def test_bodies_are_indented_and_small_constants_written_out() -> None:
    graph = Graph("outer")
    x = graph.input("x", TensorType(f32, (2,)))
    body = graph.subgraph("inner")
    inner = body.input("x", TensorType(f32, (2,)))
    two = body.constant(np.array(2, np.float32))
    body.outputs = [body.add("Mul", [inner, two], names=["m"]).output]
    graph.outputs = [graph.add("Fused", [x], {"body": body}, domain="minicc", names=["f"]).output]
    lines = print_graph(graph).splitlines()
    assert lines[1] == "  f: f32[2] = minicc.Fused(x)"
    assert lines[2] == "    body inner(x: f32[2]) -> (m: f32[2])"
    assert lines[3] == "      m: f32[2] = Mul(x, 2.0)"


def test_only_unusual_attributes_and_left_out_inputs_are_shown() -> None:
    graph = Graph()
    x = graph.input("x", TensorType(f32, (2, 3)))
    limit = graph.constant(np.array(1, np.float32))
    clip = graph.add("Clip", [x, None, limit], names=["c"])
    concat = graph.add("Concat", [x, x], {"axis": 1}, names=["d"])
    assert print_node(clip) == "c: f32[2,3] = Clip(x, -, 1.0)"
    assert print_node(concat) == "d: f32[2,6] = Concat(x, x) axis=1"


def test_a_good_graph_verifies() -> None:
    verify(sample(), Stage.EXPANDED)


def _wrong_type(graph: Graph) -> None:
    graph.nodes[0].output.type = TensorType(f32, (3, 3, 4))


def _wrong_order(graph: Graph) -> None:
    graph.nodes.reverse()


def _missing_use(graph: Graph) -> None:
    graph.inputs[0].uses.clear()


def _stale_use(graph: Graph) -> None:
    graph.inputs[0].uses.append((graph.nodes[2], 0))


def _same_name(graph: Graph) -> None:
    graph.nodes[1].output.name = "r"


def _unknown_attribute(graph: Graph) -> None:
    graph.nodes[0].attrs["colour"] = 1


def _wrong_constant(graph: Graph) -> None:
    value = graph.nodes[2].inputs[1]
    assert value is not None
    value.type = TensorType(f64, (12,))


def _wrong_producer(graph: Graph) -> None:
    graph.nodes[1].output.producer = graph.nodes[0]


def _lost_output(graph: Graph) -> None:
    graph.outputs = [Value("nowhere", TensorType(f32, (1,)))]


def _wrong_content(graph: Graph) -> None:
    graph.add("Shape", [graph.inputs[0]], names=["s"])
    graph.nodes[-1].output.content = np.array([1, 3, 4], dtype=object)


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (_wrong_type, "a type does not follow"),
        (_wrong_order, "not computed before it is read"),
        (_missing_use, "lacks input 0"),
        (_stale_use, "names a use that does not exist"),
        (_same_name, "belongs to 2 values"),
        (_unknown_attribute, "attributes differ"),
        (_wrong_constant, "holds float32"),
        (_wrong_producer, "another producer"),
        (_lost_output, "is not computed"),
        (_wrong_content, "known content"),
    ],
)
def test_damage_is_found_and_named(damage: Callable[[Graph], None], rule: str) -> None:
    graph = sample()
    damage(graph)
    with pytest.raises(VerifyError, match=rule) as raised:
        verify(graph, pass_name="some-pass")
    assert "some-pass" in str(raised.value)


def test_the_message_shows_the_neighbourhood() -> None:
    graph = sample()
    _wrong_type(graph)
    with pytest.raises(VerifyError) as raised:
        verify(graph)
    text = str(raised.value)
    assert "recorded f32[3,3,4], inferred f32[n,3,4]" in text
    assert ">   r: f32[3,3,4]" in text and "flat: f32[n,12]" in text


def test_composite_ops_are_errors_only_after_expansion() -> None:
    graph = Graph()
    x = graph.input("x", TensorType(f32, (2, 3)))
    scale = graph.input("w", TensorType(f32, (3,)))
    graph.outputs = [graph.add("LayerNormalization", [x, scale]).output]
    verify(graph, Stage.IMPORTED)
    verify(graph, Stage.EXPANDED, keep=lambda node: node.op.name == "LayerNormalization")
    with pytest.raises(VerifyError, match="should have been expanded"):
        verify(graph, Stage.EXPANDED)


def test_checking_does_not_change_names_made_later() -> None:
    graph = Graph()
    x = graph.input("x", TensorType(i64, (4,)))
    graph.outputs = [graph.add("NonZero", [x]).output]
    before = print_graph(graph)
    verify(graph)
    assert print_graph(graph) == before
    other = graph.copy()
    verify(graph)
    assert graph.constant(1).name == f"c{next(other.counter) - 1}"
