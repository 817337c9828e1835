"""zero-points: integer products keep their numbers, bit for bit, and what is left of them takes no zero points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph, Node
from minicc.ir.types import TensorType, dtype_of, i8
from minicc.options import Options
from minicc.passes.manager import Pass, PassContext, run_passes
from minicc.passes.zero_points import zero_points
from tests.passes.models import graph_of

Array = np.ndarray[Any, Any]
UNIT = PassContext(Options(check=2), zero_points=False)
ZERO_POINTS = Pass("zero-points", zero_points)
eight_bits = st.sampled_from([np.int8, np.uint8])


def numbers(rng: np.random.Generator, dtype: Any, shape: tuple[int, ...]) -> Array:
    info = np.iinfo(dtype)
    return np.asarray(rng.integers(info.min, info.max + 1, shape)).astype(dtype)


class Operands:
    """A graph with one product whose operands are constants or inputs."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng, self.graph, self.feeds = rng, Graph("g"), list[Array]()

    def give(self, dtype: Any, shape: tuple[int, ...] | None, constant: bool, array: Array | None = None) -> Any:
        if shape is None:
            return None
        array = numbers(self.rng, dtype, shape) if array is None else array
        if constant:
            return self.graph.constant(array)
        self.feeds.append(array)
        return self.graph.input(f"x{len(self.feeds)}", TensorType(dtype_of(array.dtype), array.shape))

    def check(self, op: str, inputs: list[Any], attrs: dict[str, Any], rewritten: bool = True) -> Node:
        """The product after the pass."""
        graph = self.graph
        graph.outputs = [graph.add(op, inputs, attrs).output]
        (want,) = evaluate(graph, self.feeds)
        report = run_passes(graph, (ZERO_POINTS,), UNIT.options, (), UNIT)
        assert report.rows[0].changes == rewritten
        (got,) = evaluate(graph, self.feeds)
        np.testing.assert_array_equal(got, want)
        assert zero_points(graph, UNIT) == 0
        return next(node for node in graph.nodes if node.op.name == op)


@given(
    types=st.tuples(eight_bits, eight_bits), sizes=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4)),
    left=st.sampled_from([None, (), (1,), "rows", "whole"]), right=st.sampled_from([None, (), (1,), "columns", "whole"]),
    constant=st.tuples(*[st.booleans()] * 3), batch=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_matrices(types: Any, sizes: Any, left: Any, right: Any, constant: Any, batch: bool, seed: int) -> None:
    m, k, n = sizes
    of = Operands(np.random.default_rng(seed))
    lead = (2,) if batch else ()
    shapes = {"rows": (m,), "columns": (n,), None: None}
    a = of.give(types[0], (*lead, m, k), False)
    b = of.give(types[1], (k, n), constant[0])
    a_zero = of.give(types[0], (*lead, m, 1) if left == "whole" else shapes.get(left, left), constant[1])
    b_zero = of.give(types[1], (1, n) if right == "whole" else shapes.get(right, right), constant[2])
    rewritten = left is not None or right is not None or types[1] is np.uint8
    product = of.check("MatMulInteger", [a, b, a_zero, b_zero], {}, rewritten)
    assert len([v for v in product.inputs if v is not None]) == 2 and product.inputs[1].tensor.dtype == i8


axis = st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2), st.integers(0, 2))


@given(
    types=st.tuples(eight_bits, eight_bits), groups=st.integers(1, 2), channels=st.integers(1, 3), filters=st.integers(1, 3),
    axes=st.lists(axis, min_size=1, max_size=3), points=st.tuples(st.booleans(), st.sampled_from([None, (), "filters"])),
    constant=st.tuples(*[st.booleans()] * 2), layout=st.sampled_from(["NCHW", "NHWC"]),
    pad=st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_convolutions(
    types: Any, groups: int, channels: int, filters: int, axes: Any, points: Any, constant: Any, layout: str, pad: str, seed: int
) -> None:
    axes = [(max(n, d * (k - 1) + 1), k, s, d, p, q) for n, k, s, d, p, q in axes]
    extents, kernel, strides, dilations, before, after = zip(*axes, strict=True)
    of = Operands(np.random.default_rng(seed))
    last = layout == "NHWC"
    shape = (2, *extents, groups * channels) if last else (2, groups * channels, *extents)
    x = of.give(types[0], shape, False)
    w = of.give(types[1], (groups * filters, channels, *kernel), True)
    x_zero = of.give(types[0], () if points[0] else None, constant[0])
    w_zero = of.give(types[1], (groups * filters,) if points[1] == "filters" else points[1], constant[1])
    attrs = {"group": groups, "strides": strides, "dilations": dilations, "layout": layout, "auto_pad": pad}
    if pad == "NOTSET":
        attrs["pads"] = (*before, *after)
    depthwise = groups > 1 and channels == 1
    rewritten = not depthwise and (points[0] or points[1] is not None or types[1] is np.uint8)
    product = of.check("ConvInteger", [x, w, x_zero, w_zero], attrs, rewritten)
    if not depthwise:
        assert len([v for v in product.inputs if v is not None]) == 2 and product.inputs[1].tensor.dtype == i8


def test_the_usual_zero_points_of_weights_cost_nothing() -> None:
    """Signed weights around 0 and unsigned ones around 128 need no sums of windows."""
    of = Operands(np.random.default_rng(0))
    x, w = of.give(np.uint8, (1, 4, 5, 5), False), of.give(np.uint8, (3, 4, 3, 3), True)
    of.check("ConvInteger", [x, w, None, of.graph.constant(np.array(128, np.uint8))], {"pads": (1, 1, 1, 1)})
    assert [node.op.name for node in of.graph.nodes] == ["ConvInteger"]


@pytest.mark.parametrize(
    "text",
    [
        "(uint8[n,3] x, int8[3,2] w, uint8[n] p) => (int32[n,2] y)|y = MatMulInteger(x, w, p)",
        "(uint8[n,c,h,v] x, uint8 p) => (int32[n,2,h,v] y) <int8[2,1,2,2] w = {1,2,3,4,5,6,7,8}>|"
        "y = ConvInteger<pads=[1,0,1,1], strides=[2,2]>(x, w, p)",
    ],
)
def test_sizes_that_are_not_known(text: str) -> None:
    signature, nodes = text.split("|")
    graph = graph_of(nodes, signature)
    assert zero_points(graph, UNIT) == 1


def test_targets_with_zero_points_keep_them() -> None:
    graph = graph_of("y = MatMulInteger(x, w, p)", "(uint8[n,3] x, int8[3,2] w, uint8 p) => (int32[n,2] y)")
    assert zero_points(graph, PassContext()) == 0
