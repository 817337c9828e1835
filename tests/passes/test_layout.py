"""choose-layout: how many transposes are left, and where; the numbers are those of the model."""

from __future__ import annotations

import numpy as np
import pytest

from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.passes import FOLD_SHAPES
from minicc.passes.expand import expand
from minicc.passes.fold import fold_constants
from minicc.passes.layout import choose_layout
from minicc.passes.manager import Pass, PassContext, random_feeds
from minicc.passes.simplify import simplify
from tests.passes.models import apply, ops, parse, run_reference

LAYOUT = Pass("choose-layout", choose_layout)
STEPS = (
    Pass("expand", expand),
    FOLD_SHAPES,
    LAYOUT,
    Pass("fold-constants", fold_constants),
    Pass("simplify", simplify),
)
IMAGE = "(float[n,4,6,5] x, float[4,4,3,3] w, float[4,4,1,1] k) => (float[a,b,c,d] y)"

# nodes, Transposes in the end
CASES = [
    ("y = Conv<pads=[1,1,1,1]>(x, w)", 2),
    ("t = Conv<pads=[1,1,1,1]>(x, w) r = Relu(t) y = Conv(r, k)", 2),
    # A residual block with a normalisation written out.
    ("t = Conv<pads=[1,1,1,1]>(x, w) s = Constant<value=float[4,1,1] {1, 2, 3, 4}>() u = Mul(t, s) v = "
     "Conv(u, k) y = Add(v, t)", 2),
    ("t = Conv(x, w) p = MaxPool<kernel_shape=[2,2]>(t) q = AveragePool<kernel_shape=[2,2]>(p) y = "
     "Relu(q)", 2),
    # A gate per channel: the mean over all positions.
    ("t = Conv(x, w) g = GlobalAveragePool(t) c = Conv(g, k) s = Sigmoid(c) y = Mul(t, s)", 2),
    # A classifier: nothing to transpose after the mean.
    ("t = Conv(x, w) g = GlobalAveragePool(t) y = Flatten(g)", 1),
    ("t = Conv(x, w) a = Constant<value_ints=[2, 3]>() y = ReduceMean<keepdims=0>(t, a)", 1),
    ("t = Conv(x, w) a, b = Split<axis=1, num_outputs=2>(t) c = Concat<axis=1>(b, a) y = Conv(c, k)", 2),
    ("t = Conv(x, w) p = Constant<value_ints=[0, 0, 1, 0, 0, 0, 0, 2]>() u = Pad(t, p) y = Conv(u, w)", 2),
    ("t = Conv(x, w) s = Constant<value_ints=[1]>() e = Constant<value_ints=[3]>() u = Slice(t, s, e, s) v "
     "= Concat<axis=1>(u, u) "
     "y = Conv(v, k)", 2),
    # The model's own transposes are free where they meet the right order.
    ("t = Conv(x, w) y = Transpose<perm=[0, 2, 3, 1]>(t)", 1),
    ("t = Conv(x, w) u = Transpose<perm=[0, 2, 3, 1]>(t) r = Tanh(u) v = Transpose<perm=[0, 3, 1, 2]>(r) y "
     "= Conv(v, k)", 2),
    # Softmax over an axis that only the model's order has at the end: a transpose is cheaper than none.
    ("t = Conv(x, w) u = Softmax<axis=3>(t) y = Conv(u, k)", 2),
    # A channel shuffle.
    ("t = Conv(x, w) s = Constant<value_ints=[0, 2, 2, 4, 3]>() r = Reshape(t, s) p = Transpose<perm=[0, "
     "2, 1, 3, 4]>(r) "
     "q = Constant<value_ints=[0, 4, 4, 3]>() u = Reshape(p, q) y = Conv(u, k)", 3),
    ("t = ConvTranspose<strides=[2,2]>(x, w) y = Relu(t)", 2),
]  # fmt: skip


def transposes(graph: Graph) -> int:
    return ops(graph).get("Transpose", 0)


@pytest.mark.parametrize(("body", "left"), CASES)
def test_transposes_that_are_left(body: str, left: int) -> None:
    model = parse(body, IMAGE)
    graph = load_model(model).graph
    feeds = random_feeds(graph)
    assert feeds is not None
    expected = run_reference(model, {v.name: f for v, f in zip(graph.inputs, feeds)})
    apply(graph, *STEPS)
    # The weights are inputs here, so that the kernels alone are looked at.
    assert transposes(graph) == left
    for node in graph.nodes:
        if node.op.name in ("Conv", "ConvTranspose"):
            assert node.attrs["layout"] == "NHWC"
    for a, e in zip(evaluate(graph, feeds), expected):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "kernel"), [("n,4,9", "4,4,3"), ("n,4,5,4,6", "4,4,2,2,2")])
def test_one_and_three_dimensional_convolutions(shape: str, kernel: str) -> None:
    model = parse(
        "t = Conv(x, w) r = Relu(t) y = Conv(r, w)", f"(float[{shape}] x, float[{kernel}] w) => (float[] y)"
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    graph = load_model(model).graph
    apply(graph, *STEPS)
    assert transposes(graph) == 2


def test_graphs_without_convolutions_are_left_alone() -> None:
    model = parse(
        "t = Relu(x) y = MaxPool<kernel_shape=[2,2]>(t)", "(float[2,4,6,5] x) => (float[2,4,5,4] y)"
    )
    graph = load_model(model).graph
    report = apply(graph, LAYOUT)
    assert report.rows[0].changes == 0 and transposes(graph) == 0


def test_parts_far_from_convolutions_keep_their_order() -> None:
    body = "t = Conv(x, w) y = Relu(t) a = Tanh(o) z = Relu(a)"
    signature = (
        "(float[2,4,6,5] x, float[4,4,3,3] w, float[2,3,4,5] o) => (float[2,4,4,3] y, float[2,3,4,5] z)"
    )
    graph = load_model(parse(body, signature)).graph
    apply(graph, LAYOUT)
    assert transposes(graph) == 2
    assert graph.outputs[1].name == "z" and graph.inputs[2].consumers()[0].op.name == "Tanh"


def test_a_target_may_want_channels_first() -> None:
    graph = load_model(
        parse("y = Conv(x, w)", "(float[2,4,6,5] x, float[4,4,3,3] w) => (float[2,4,4,3] y)")
    ).graph
    apply(graph, LAYOUT, context=PassContext(channels_last=False))
    assert ops(graph) == {"Conv": 1}


def test_integer_convolutions_too() -> None:
    body = """
      a, s, z = DynamicQuantizeLinear(x)
      t = ConvInteger<pads=[1,1,1,1]>(a, w, z)
      u = Cast<to=1>(t)
      v = Mul(u, s)
      b, p, q = DynamicQuantizeLinear(v)
      r = ConvInteger(b, w, q)
      y = Cast<to=1>(r)
    """
    model = parse(body, "(float[2,4,6,5] x, uint8[4,4,3,3] w) => (float[2,4,4,3] y)")
    graph = load_model(model).graph
    apply(graph, *STEPS)
    assert transposes(graph) == 2
    assert {n.attrs["layout"] for n in graph.nodes if n.op.name == "ConvInteger"} == {"NHWC"}
