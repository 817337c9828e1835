"""fuse: which ops become one kernel, seen in the groups it makes; numbers by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

import minicc
from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.ir.opdef import Kind
from minicc.lower.program import KernelStep
from minicc.options import Options
from minicc.walk import optimise
from tests.passes.models import parse, random_feeds, run_reference


def groups(nodes: str, signature: str) -> list[list[str]]:
    """The ops of each kernel-to-be but views, in order; the optimised graph gives the numbers of ONNX Runtime."""
    model = parse(nodes, signature)
    graph: Graph = load_model(model).graph
    feeds = random_feeds(graph)
    assert feeds is not None
    want = run_reference(model, dict(zip([v.name for v in graph.inputs], feeds)))
    optimise(graph, Options(check=1))
    np.testing.assert_allclose(evaluate(graph, feeds)[0], want[0], rtol=1e-4, atol=1e-4)
    found = []
    for node in graph.nodes:
        body = node.attrs["body"].nodes if node.op.name == "Fused" else [node]
        found.append([n.op.name for n in body if n.op.kind is not Kind.INDEX])
    return [names for names in found if names]


def test_a_reduction_of_reductions_is_a_kernel_of_its_own() -> None:
    """Global response normalisation (Woo et al., 2023): norms of channels over an image, divided by their mean."""
    found = groups(
        "n = ReduceL2<keepdims=1>(x, places) m = ReduceMean<keepdims=1>(n, channels) "
        "d = Add(m, tiny) r = Div(n, d) y = Mul(x, r)",
        "(float[2,5,6,8] x) => (float[2,5,6,8] y) <int64[2] places = {1, 2}, int64[1] channels = {3}, float tiny = {0.000001}>",
    )
    assert ["ReduceL2"] in found
    assert any("ReduceMean" in names and "ReduceL2" not in names for names in found)


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax"])
def test_statistics_of_a_row_stay_with_it(op: str) -> None:
    """The second reduction reads what is centred by the first one: one kernel, as a layer normalisation is."""
    found = groups(
        f"m = {op}<keepdims=1>(x, a) c = Sub(x, m) q = Mul(c, c) v = ReduceMean<keepdims=1>(q, a) s = Sqrt(v) y = Div(c, s)",
        "(float[3,4,9] x) => (float[3,4,9] y) <int64[1] a = {-1}>",
    )
    assert len(found) == 1


@pytest.mark.parametrize(("filters", "behind"), [(3, True), (64, False)])
def test_functions_behind_narrow_rows(filters: int, behind: bool) -> None:
    """A sigmoid of three channels is computed in vectors behind the convolution, of many within it."""
    signature = (f"(float[1,4,24,24] x) => (float[1,{filters},24,24] y) "
                 f"<float[{filters},4,1,1] w = {{{', '.join(['0.5'] * 4 * filters)}}}>")  # fmt: skip
    model = parse("c = Conv(x, w) y = Sigmoid(c)", signature)
    module = minicc.compile(model.SerializeToString(), target="cpu:avx512")
    kernels = [module.program.kernels[s.kernel].name for s in module.program.steps if isinstance(s, KernelStep)]
    assert any("sigmoid" in name for name in kernels) == behind
