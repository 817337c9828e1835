"""Rules on quantised values, and operands of epilogues that are read in their narrow type: the numbers stay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.ir.evaluate import evaluate
from minicc.lower.templates import is_anchor
from minicc.passes.fuse import fuse
from minicc.passes.manager import Pass
from minicc.passes.simplify import simplify
from tests.compiling import compile_graph
from tests.passes.models import apply, graph_of, ops

SIMPLIFY = Pass("simplify", simplify)
PLANES = "(uint8[2,3,6,7] x) => ({type}[2,3,{size}] y)"
SCALE = "float s = {0.037}, uint8 z = {113}"
WEIGHTS = "float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}, float s = {0.5}"
F32 = np.finfo(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(float(F32.tiny), float(F32.max) / 512, width=32), zero=st.integers(0, 255), signed=st.booleans(),
)  # fmt: skip
def test_the_same_scale_gives_the_same_numbers(scale: float, zero: int, signed: bool) -> None:
    """All 256 values come back from any scale that the rule takes."""
    kind, shift = ("int8", 128) if signed else ("uint8", 0)
    graph = graph_of("f = DequantizeLinear(x, s, z) q = QuantizeLinear(f, s, z) y = Cast<to=6>(q)",
                     f"({kind}[256] x) => (int32[256] y) <float s = {{{scale!r}}}, {kind} z = {{{zero - shift}}}>")  # fmt: skip
    x = (np.arange(256) - shift).astype(kind)
    np.testing.assert_array_equal(evaluate(graph, [x])[0], x)
    apply(graph, SIMPLIFY)
    assert set(ops(graph)) == {"Cast"}
    np.testing.assert_array_equal(evaluate(graph, [x])[0], x)


@pytest.mark.parametrize("other", ["float t = {0.038}, uint8 u = {113}", "float t = {0.037}, uint8 u = {112}"])
def test_another_scale_or_zero_point_stays(other: str) -> None:
    graph = graph_of("f = DequantizeLinear(x, s, z) y = QuantizeLinear(f, t, u)",
                     f"(uint8[9] x) => (uint8[9] y) <{SCALE}, {other}>")  # fmt: skip
    apply(graph, SIMPLIFY)
    assert ops(graph)["QuantizeLinear"] == 1


@pytest.mark.parametrize(
    ("attrs", "size"),
    [("kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]", "3,4"), ("kernel_shape=[2,3], dilations=[2,1]", "4,5")],
)
@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_maximum_before_dequantise(attrs: str, size: str, kind: str) -> None:
    signature = PLANES.format(type="float", size=size).replace("uint8", kind)
    graph = graph_of(f"f = DequantizeLinear(x, s, z) y = MaxPool<{attrs}>(f)",
                     f"{signature} <{SCALE.replace('uint8', kind)}>")  # fmt: skip
    x = np.random.default_rng(0).integers(np.iinfo(kind).min, np.iinfo(kind).max + 1, (2, 3, 6, 7), kind)
    (want,) = evaluate(graph, [x])
    apply(graph, SIMPLIFY)
    pool = next(node for node in graph.nodes if node.op.name == "MaxPool")
    assert pool.inputs[0] is graph.inputs[0]
    np.testing.assert_array_equal(evaluate(graph, [x])[0], want)
    np.testing.assert_array_equal(compile_graph(graph).run_items([x])[0], want)


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("f = DequantizeLinear(x, s, z) y = MaxPool<kernel_shape=[1,1], pads=[1,0,0,0]>(f)", SCALE),  # nothing but padding
        ("f = DequantizeLinear(x, s, z) y = MaxPool<kernel_shape=[2,2], ceil_mode=1>(f)", SCALE),
        ("f = DequantizeLinear(x, s, z) y = MaxPool<kernel_shape=[2,2]>(f)",
         "float[3] s = {0.1, 0.2, 0.3}, uint8[3] z = {1, 2, 3}"),
    ],
)  # fmt: skip
def test_maxima_stay_behind_dequantise(body: str, constants: str) -> None:
    graph = graph_of(body, f"(uint8[2,3,6,7] x) => (float[2,3,a,b] y) <{constants}>")
    apply(graph, SIMPLIFY)
    pool = next(node for node in graph.nodes if node.op.name == "MaxPool")
    assert pool.inputs[0] is not graph.inputs[0]


def test_an_epilogue_reads_a_narrow_operand() -> None:
    """A residual sum reads the 8-bit numbers that its operand is made of."""
    graph = graph_of("p = MatMul(a, w) c = Cast<to=1>(x) m = Mul(c, s) y = Add(p, m)",
                     f"(float[5,4] a, uint8[5,3] x) => (float[5,3] y) <{WEIGHTS}>")  # fmt: skip
    rng = np.random.default_rng(0)
    feeds = [rng.standard_normal((5, 4)).astype(np.float32), rng.integers(0, 256, (5, 3), np.uint8)]
    (want,) = evaluate(graph, feeds)
    fuse(graph, is_anchor)
    assert [node.op.name for node in graph.nodes] == ["Fused"]
    assert graph.nodes[0].attrs["lead"] == 0
    np.testing.assert_allclose(compile_graph(graph).run_items(feeds)[0], want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("body", [
    "p = MatMul(a, w) e = Exp(x) y = Add(p, e)",  # an expensive function, and no narrower
    "p = MatMul(a, w) m = Mul(x, s) y = Add(p, m)",
])  # fmt: skip
def test_other_operands_are_not_computed_in_an_epilogue(body: str) -> None:
    graph = graph_of(body, f"(float[5,4] a, float[5,3] x) => (float[5,3] y) <{WEIGHTS}>")
    fuse(graph, is_anchor)
    assert len(graph.nodes) == 2
