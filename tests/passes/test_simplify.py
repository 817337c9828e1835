"""simplify: each rule on a small model, with the numbers compared by ONNX Runtime and by evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.passes.fold import fold_constants, fold_shape_values
from minicc.passes.manager import Pass, random_feeds
from minicc.passes.simplify import RULES, simplify
from tests.passes.models import apply, graph_of, ops, parse, run_reference

SIMPLIFY = Pass("simplify", simplify)
SHAPES = Pass("fold-shape-values", fold_shape_values)
CONSTANTS = Pass("fold-constants", fold_constants)
X = "(float[2,3] x) => (float[2,3] y)"
VIEW = "(float[n,3,4] x) => (float[a,b] y)"

# name of the rule, nodes, signature, what is left
CASES = [
    ("drop-neutral", "z = Constant<value_float=1.0>() t = Mul(x, z) y = Relu(t)", X, {"Relu": 1}),
    ("drop-neutral", "z = Constant<value_float=0.0>() t = Sub(x, z) y = Relu(t)", X, {"Relu": 1}),
    ("drop-neutral", "z = Constant<value_float=-0.0>() t = Add(z, x) y = Relu(t)", X, {"Relu": 1}),
    ("drop-neutral", "z = Constant<value_float=1.0>() t = Div(x, z) y = Relu(t)", X, {"Relu": 1}),
    ("square", "z = Constant<value_float=2.0>() y = Pow(x, z)", X, {"Mul": 1}),
    ("square", "z = Constant<value_float=0.5>() t = Abs(x) y = Pow(t, z)", X, {"Abs": 1, "Sqrt": 1}),
    ("divide-by-power-of-two", "z = Constant<value_float=8.0>() y = Div(x, z)", X, {"Mul": 1}),
    ("subtract-constant", "z = Constant<value_float=8.0>() y = Sub(x, z)", X, {"Add": 1}),
    ("add-negative", "t = Neg(x) s = Relu(x) y = Add(t, s)", X, {"Relu": 1, "Sub": 1}),
    ("subtract-negative", "t = Neg(x) s = Relu(x) y = Sub(s, t)", X, {"Relu": 1, "Add": 1}),
    ("merge-constants", "a = Constant<value_float=0.7>() b = Constant<value_float=0.6>() t = Mul(a, x) y = "
     "Mul(t, b)", X,
     {"Mul": 1}),
    ("double", "t = Relu(x) y = Relu(t)", X, {"Relu": 1}),
    ("double", "t = Neg(x) s = Neg(t) y = Tanh(s)", X, {"Tanh": 1}),
    ("abs-of-relu", "t = Sigmoid(x) y = Relu(t)", X, {"Sigmoid": 1}),
    ("relu-into-clip", "a = Constant<value_float=-1.0>() b = Constant<value_float=0.6>() t = Relu(x) y = "
     "Clip(t, a, b)", X,
     {"Clip": 1}),
    ("clip-of-clip", "a = Constant<value_float=-1.0>() b = Constant<value_float=0.6>() c = "
     "Constant<value_float=0.2>() "
     "t = Clip(x, a, b) y = Clip(t, a, c)", X, {"Clip": 1}),
    ("unbounded", "t = Clip(x) y = Relu(t)", X, {"Relu": 1}),
    ("unbounded", "t = Max(x) y = Relu(t)", X, {"Relu": 1}),
    ("where-constant", "c = Constant<value=bool[1] {1}>() t = Neg(x) s = Where(c, x, t) y = Relu(s)", X,
     {"Relu": 1}),
    ("same-operands", "t = Max(x, x) y = Relu(t)", X, {"Relu": 1}),
    ("identity", "t = Identity(x) y = Relu(t)", X, {"Relu": 1}),
    ("cast-to-same", "t = Cast<to=1>(x) y = Relu(t)", X, {"Relu": 1}),
    ("cast-of-cast", "t = Cast<to=11>(x) s = Cast<to=1>(t) y = Relu(s)", X, {"Relu": 1}),
    ("dropout", "t = Dropout(x) y = Relu(t)", X, {"Relu": 1}),
    ("uniform-constant", "z = Constant<value=float[2,3] {7, 7, 7, 7, 7, 7}>() y = Mul(x, z)", X, {"Mul": 1}),
    ("same-shape", "s = Constant<value_ints=[2, 3]>() t = Expand(x, s) y = Relu(t)", X, {"Relu": 1}),
    ("merge-reshapes", "s = Constant<value_ints=[6]>() p = Constant<value_ints=[2, 3]>() t = Reshape(x, s) "
     "u = Reshape(t, p) "
     "y = Relu(u)", X, {"Relu": 1}),
    ("one-reshape", "y = Flatten<axis=1>(x)", VIEW, {"Reshape": 1}),
    ("merge-transposes", "t = Transpose<perm=[1, 0]>(x) s = Transpose<perm=[1, 0]>(t) y = Relu(s)", X,
     {"Relu": 1}),
    ("free-transpose", "y = Transpose<perm=[1, 0, 2]>(x)", "(float[1,3,4] x) => (float[3,1,4] y)",
     {"Reshape": 1}),
    ("expand-into-broadcast", "s = Constant<value_ints=[2, 3]>() t = Expand(b, s) y = Add(x, t)",
     "(float[2,3] x, float[3] b) => (float[2,3] y)", {"Add": 1}),
    ("merge-expands", "s = Constant<value_ints=[2, 1, 3]>() p = Constant<value_ints=[2, 4, 3]>() t = "
     "Expand(x, s) "
     "y = Expand(t, p)", "(float[1,3] x) => (float[2,4,3] y)", {"Expand": 1}),
    ("slice-of-slice", "a = Constant<value_ints=[1]>() z = Constant<value_ints=[0]>() e = "
     "Constant<value_ints=[3]>() "
     "t = Slice(x, a, e, z) y = Slice(t, a, e, a)", "(float[4,4] x) => (float[2,2] y)", {"Slice": 1}),
    ("gather-range", "i = Constant<value_ints=[1, 2]>() y = Gather<axis=1>(x, i)", "(float[2,3] x) => "
     "(float[2,2] y)", {"Slice": 1}),
    ("gather-range", "i = Constant<value_int=-2>() y = Gather<axis=1>(x, i)", "(float[2,3] x) => (float[2] y)",
     {"Slice": 1, "Reshape": 1}),
    ("scatter-range", "y = ScatterND(x, i, u)", "(float[4,3] x, float[2,3] u) => (float[4,3] y) <int64[2,1] i = {1, 2}>",
     {"Slice": 2, "Concat": 1}),
    ("slice-of-concat", "c = Concat<axis=1>(x, z, x) y = Slice(c, a, e, a)",
     "(float[2,3] x, float[2,4] z) => (float[2,2] y) <int64[1] a = {1}, int64[1] e = {3}>", {"Slice": 1}),
    ("concat-of-concat", "t = Relu(x) s = Concat<axis=0>(x, t) y = Concat<axis=0>(s, x)",
     "(float[2,3] x) => (float[6,3] y)", {"Relu": 1, "Concat": 1}),
    ("split-into-one", "t = Split<axis=0, num_outputs=1>(x) y = Relu(t)", X, {"Relu": 1}),
    ("pad-nothing", "p = Constant<value_ints=[0, 0, 0, 0]>() t = Pad(x, p) y = Relu(t)", X, {"Relu": 1}),
    ("pad-nothing", "p = Constant<value_ints=[1, 1]>() t = Tile(x, p) y = Relu(t)", X, {"Relu": 1}),
    ("boolean-constant", "c = Constant<value=bool[1] {1}>() z = Constant<value_float=0.0>() g = Greater(x, "
     "z) h = And(g, c) "
     "t = Neg(x) y = Where(h, x, t)", X, {"Greater": 1, "Neg": 1, "Where": 1}),
    ("product-before-reshape", "s = Constant<value_ints=[6, 4]>() t = Reshape(x, s) y = MatMul(t, w)",
     "(float[2,3,4] x, float[4,5] w) => (float[6,5] y)", {"MatMul": 1, "Reshape": 1}),
    ("pointwise-before-reshape", "s = Constant<value_ints=[6, 4]>() t = Reshape(x, s) u = Add(t, v) y = "
     "Reshape(u, p)",
     "(float[2,3,4] x, float[4] v) => (float[2,3,4] y) <int64[3] p = {2, 3, 4}>", {"Add": 1}),
    ("reshape-before-product", "s = Constant<value_ints=[6, 4]>() t = Reshape(x, s) u = MatMul(t, w) r = "
     "Relu(u) "
     "y = Reshape(r, p)", "(float[2,3,2,2] x, float[4,5] w) => (float[2,3,5] y) <int64[3] p = {2, 3, 5}>",
     {"Reshape": 1, "MatMul": 1, "Relu": 1}),
    ("gather-in-order", "y = Gather<axis=1>(x, i)", "(float[2,6] x) => (float[2,2,3] y) <int64[2,3] i = {0, 1, 2, 3, 4, 5}>",
     {"Reshape": 1}),
    ("gather-by-axes", "c = Concat<axis=2>(j, i) y = GatherND(x, c)", "(float[3,2] x) => (float[2,3] y) "
     "<int64[2,3,1] j = {0, 1, 2, 0, 1, 2}, int64[2,3,1] i = {0, 0, 0, 1, 1, 1}>", {"Transpose": 1}),
    ("requantise-same", "f = DequantizeLinear(x, s, z) q = QuantizeLinear(f, s, z) y = Cast<to=1>(q)",
     "(uint8[2,3] x) => (float[2,3] y) <float s = {0.1}, uint8 z = {7}>", {"Cast": 1}),
    ("maximum-before-dequantise", "f = DequantizeLinear(x, s, z) y = MaxPool<kernel_shape=[2,2]>(f)",
     "(uint8[1,2,3,4] x) => (float[1,2,2,3] y) <float s = {0.1}, uint8 z = {7}>", {"MaxPool": 1, "DequantizeLinear": 1}),
    ("known-size", "s = Shape(x) y = Cast<to=1>(s)", "(float[2,3] x) => (float[2] y)", {"Cast": 1}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "body", "signature", "left"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_rule_fires_and_keeps_the_numbers(rule: str, body: str, signature: str, left: dict[str, int]) -> None:
    model = parse(body, signature)
    graph = load_model(model).graph
    feeds = random_feeds(graph)
    assert feeds is not None
    expected = run_reference(model, {v.name: f for v, f in zip(graph.inputs, feeds)})
    report = apply(graph, SIMPLIFY)
    assert rule in report.rows[0].rules
    assert ops(graph) == left
    for a, e in zip(evaluate(graph, feeds), expected):
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6)


def test_every_rule_has_a_case() -> None:
    assert {r.name for r in RULES} == {case[0] for case in CASES}


REFUSED = [
    # x + 0.0 turns -0.0 into 0.0; x - (-0.0) too.
    ("z = Constant<value_float=0.0>() t = Add(x, z) y = Relu(t)", X, {"Add": 1, "Relu": 1}),
    # Not exact.
    ("z = Constant<value_float=3.0>() y = Div(x, z)", X, {"Div": 1}),
    # Loses digits on the way.
    ("t = Cast<to=10>(x) s = Cast<to=1>(t) y = Relu(s)", X, {"Cast": 2, "Relu": 1}),
    ("t = Cast<to=7>(x) y = Cast<to=1>(t)", X, {"Cast": 2}),
    # The ranges do not meet.
    ("a = Constant<value_float=-2.0>() b = Constant<value_float=-1.0>() c = Constant<value_float=2.0>() t "
     "= Clip(x, a, b) "
     "z = Constant<value_float=1.0>() y = Clip(t, z, c)", X, {"Clip": 2}),
    # Reverses.
    ("a = Constant<value_ints=[-1]>() e = Constant<value_ints=[-9]>() z = Constant<value_ints=[0]>() t = "
     "Slice(x, a, e, z, a) "
     "y = Relu(t)", X, {"Slice": 1, "Relu": 1}),
    # Not a range.
    ("i = Constant<value_ints=[1, 0]>() y = Gather<axis=1>(x, i)", "(float[2,3] x) => (float[2,2] y)",
     {"Gather": 1}),
    # Would move an element.
    ("y = Transpose<perm=[1, 0]>(x)", "(float[2,3] x) => (float[3,2] y)", {"Transpose": 1}),
    # The expansion gives the shape.
    ("s = Constant<value_ints=[2, 3]>() t = Expand(b, s) y = Add(x, t)", "(float[3] x, float[3] b) => "
     "(float[2,3] y)",
     {"Expand": 1, "Add": 1}),
    # The output is the input: a graph output has a node of its own.
    ("y = Identity(x)", X, {"Identity": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "signature", "left"), REFUSED)
def test_rules_do_not_fire_where_they_would_be_wrong(body: str, signature: str, left: dict[str, int]) -> None:
    graph = graph_of(body, signature)
    apply(graph, SIMPLIFY)
    assert ops(graph) == left


def test_negative_zero_keeps_its_sign() -> None:
    graph = graph_of("z = Constant<value_float=0.0>() y = Add(x, z)", X)
    feeds = [np.full((2, 3), -0.0, dtype=np.float32)]
    apply(graph, SIMPLIFY, feeds=feeds)
    assert not np.signbit(evaluate(graph, feeds)[0]).any()


def test_symbolic_reshapes_merge() -> None:
    body = """
      s = Shape(x)
      first = Slice(s, zero, one)
      rest = Constant<value_ints=[12]>()
      target = Concat<axis=0>(first, rest)
      flat = Reshape(x, target)
      last = Constant<value_ints=[-1, 3, 4]>()
      back = Reshape(flat, last)
      y = Relu(back)
    """
    signature = "(float[n,3,4] x) => (float[n,3,4] y) <int64[1] zero = {0}, int64[1] one = {1}>"
    graph = graph_of(body, signature)
    apply(graph, SHAPES, SIMPLIFY)
    assert ops(graph) == {"Relu": 1}


def test_bodies_are_simplified() -> None:
    body = """
      y = If (c) <
        then_branch = t () => (float[2,3] a) { i = Identity(x) j = Identity(i) a = Relu(j) },
        else_branch = e () => (float[2,3] b) { k = Neg(x) l = Neg(k) b = Tanh(l) }
      >
    """
    graph = graph_of(body, "(bool c, float[2,3] x) => (float[2,3] y)")
    report = apply(graph, SIMPLIFY)
    assert ops(graph) == {"If": 1, "Relu": 1, "Tanh": 1}
    assert report.rows[0].rules == {"identity": 2, "double": 1}
