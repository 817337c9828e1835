"""widen-half: models of 16-bit floats compute in float32 on a CPU; borders, explicit casts, tables and caches stay."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minicc
from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.ir.types import f16
from minicc.options import Options
from minicc.passes.manager import Pass, PassContext, run_passes
from minicc.passes.widen import is_half, widen_half
from minicc.targets.parse import target_of
from minicc.walk import optimise
from tests.passes.models import Array, ops, parse, walk

WIDEN = Pass("widen-half", widen_half, rounds=True)


def feeds_of(graph: Graph, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal([int(d) for d in v.shape]).astype(v.tensor.dtype.numpy) for v in graph.inputs]


def widened(nodes: str, signature: str) -> Graph:
    """The graph after the pass: inputs and outputs have the types they had, numbers are as good as those of 16 bits."""
    model = parse(nodes, signature)
    before, graph = load_model(model).graph, load_model(model).graph
    run_passes(graph, (WIDEN,), Options(check=1))
    assert [v.type for v in (*graph.inputs, *graph.outputs)] == [v.type for v in (*before.inputs, *before.outputs)]
    feeds = feeds_of(graph)
    for got, want in zip(evaluate(graph, feeds), evaluate(before, feeds), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got.astype(np.float64), want.astype(np.float64), rtol=2e-2, atol=2e-2)
    return graph


def halves(graph: Graph) -> set[str]:
    """The ops that give tensors of 16 bits."""
    return {node.op.name for node in walk(graph) if any(map(is_half, node.outputs))}


X = "(float16[2,4,8] x, float16[8,8] w) => (float16[2,4,8] y)"


def test_what_is_computed_is_computed_in_float32():
    graph = widened("a = MatMul(x, w) b = Relu(a) c = Add(b, x) d = Softmax<axis=-1>(c) y = Mul(d, c)", X)
    assert halves(graph) == {"Cast"}
    assert ops(graph)["Cast"] == 3  # x, w and y


def test_results_are_nearer_to_the_exact_ones():
    nodes = "a = MatMul(x, w) b = Mul(a, a) c = MatMul(b, w) d = Add(c, a) y = MatMul(d, w)"
    model = parse(nodes, X)
    before, graph = load_model(model).graph, load_model(model).graph
    run_passes(graph, (WIDEN,), Options())
    x, w = feeds = feeds_of(graph)
    wide_x, wide_w = x.astype(np.float64), w.astype(np.float64)
    a = wide_x @ wide_w
    exact = ((a * a) @ wide_w + a) @ wide_w
    errors = [np.abs(evaluate(g, feeds)[0] - exact).max() for g in (graph, before)]
    assert errors[0] < errors[1]


def test_an_explicit_cast_rounds():
    nodes = "a = Relu(x) b = Cast<to=1>(a) c = Mul(b, s) d = Cast<to=10>(c) e = Cast<to=1>(d) f = Neg(e) y = Cast<to=10>(f)"
    graph = widened(nodes, "(float16[4] x) => (float16[4] y) <float s = {0.1}>")
    x = feeds_of(graph)[0]
    rounded = (np.maximum(x, 0).astype(np.float32) * np.float32(0.1)).astype(np.float16)
    np.testing.assert_array_equal(evaluate(graph, [x])[0], -rounded)


def test_tests_and_places_of_widened_values_are_widened():
    graph = widened("a = Mul(x, x) c = Greater(a, x) n = Not(c) y = Where(n, a, x) i = ArgMax<axis=-1>(a)",
                    "(float16[3,4] x) => (float16[3,4] y, int64[3,1] i)")  # fmt: skip
    assert halves(graph) == {"Cast"}


@pytest.mark.parametrize(
    ("nodes", "signature", "stays"),
    [
        ("g = Gather(t, i) y = Relu(g)", "(int64[3] i, float16[9,4] t) => (float16[3,4] y)", "Gather"),
        ("u = Relu(v) y = ScatterND(x, i, u)", "(float16[4,3] x, float16[2,3] v) => (float16[4,3] y) <int64[2,1] i = {1, 2}>",
         "ScatterND"),
        ("r = Relu(v) y = Concat<axis=0>(x, r)", "(float16[4,3] x, float16[2,3] v) => (float16[6,3] y)", "Concat"),
    ],
)  # fmt: skip
def test_tables_and_caches_stay(nodes, signature, stays):
    model = parse(nodes, signature)
    graph = load_model(model).graph
    run_passes(graph, (WIDEN,), Options(check=1))
    assert stays in halves(graph) and not {"Relu"} & halves(graph)


def test_what_is_all_float32_is_left_alone():
    graph = load_model(parse("a = Relu(x) y = Mul(a, x)", "(float[4] x) => (float[4] y)")).graph
    assert widen_half(graph, PassContext()) == 0


def test_bodies_are_widened():
    body = "<ir_version: 10, opset_import: [\"\" : 21]> main (float16[4] x, bool c) => (float16[4] y) {\n" \
           "y = If (c) <then_branch = g1 () => (float16[4] a) { b = Mul(x, x) a = Exp(b) }, " \
           "else_branch = g2 () => (float16[4] d) { d = Neg(x) }>\n}"  # fmt: skip
    graph = load_model(onnx.parser.parse_model(body)).graph
    run_passes(graph, (WIDEN,), Options(check=1))
    assert not {"Mul", "Exp", "Neg"} & halves(graph)


@pytest.mark.parametrize(("target", "wide"), [("cpu", True), ("cpu:avx2", True), ("cuda:sm_90", False)])
def test_only_where_kernels_compute_in_float32(target, wide):
    graph = load_model(parse("a = MatMul(x, w) y = Relu(a)", X)).graph
    optimise(graph, Options(check=1), target=target_of(target))
    (product,) = (n for n in walk(graph) if n.op.name == "MatMul")
    assert (product.output.tensor.dtype != f16) == wide


OPERATORS = ("Relu({a})", "Add({a}, {b})", "Mul({a}, {b})", "MatMul({a}, w)", "Softmax<axis=-1>({a})", "Tanh({a})",
             "Transpose<perm=[1,0,2]>({a})", "Cast<to=1>({a})", "Max({a}, {b})")  # fmt: skip


@settings(max_examples=25, deadline=None)
@example(picked=[("MatMul({a}, w)", 0, 0), ("Relu({a})", 0, 0), ("Relu({a})", 0, 0), ("Add({a}, {b})", 0, 7)])  # x read by both
@given(picked=st.lists(st.tuples(st.sampled_from(OPERATORS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7))
def test_random_graphs(picked):
    """The compiled module gives what the graph of 16 bits gives, as far as these go."""
    lines, values = [], ["x", "z"]
    for number, (form, a, b) in enumerate(picked):
        text = form.format(a=values[a % len(values)], b=values[b % len(values)])
        if "Cast" in form:
            lines.append(f"f{number} = {text} v{number} = Cast<to=10>(f{number})")
        else:
            lines.append(f"v{number} = {text}")
        values.append(f"v{number}")
    model = parse(" ".join(lines) + f" y = Identity({values[-1]})",
                  "(float16[3,3,8] x, float16[3,3,8] z, float16[8,8] w) => (float16[3,3,8] y)")  # fmt: skip
    graph = load_model(model).graph
    feeds: Mapping[str, Array] = {v.name: a / 4 for v, a in zip(graph.inputs, feeds_of(graph))}
    want = evaluate(graph, list(feeds.values()))[0].astype(np.float64)
    got = minicc.compile(model.SerializeToString(), threads=1).run(None, feeds)[0].astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=3e-2, atol=3e-2 * max(1.0, np.abs(want).max()))
