"""Integer products and convolutions with constant weights: exactly numpy's sums, also behind fused scaling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.ir.dims import symbol
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Builder, Graph, Value
from minicc.ir.types import TensorType, dtype_of, f32
from minicc.lower.kernel import TemplateKernel
from minicc.lower.templates import is_anchor
from minicc.passes.expand import expand
from minicc.passes.fold import fold_constants
from minicc.passes.fuse import fuse
from minicc.passes.manager import PassContext
from tests.compiling import Array, compile_graph, expected, host_ops

EIGHT_BITS = [np.uint8, np.int8]


def integers(rng: np.random.Generator, dtype: Any, shape: tuple[int, ...]) -> Array:
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape, dtype)


def uses_template(module: Any) -> bool:
    kernels = module.program.kernels
    return any(isinstance(k, TemplateKernel) and k.template == "conv_integer" for k in kernels)


def run(op: str, arrays: list[Array | None], given_: set[int], scaled: bool, symbolic: bool = False,
        attrs: dict[str, Any] | None = None) -> None:  # fmt: skip
    """Compare with `eval`; inputs in `given_` are fed, the others constants. scaled: a Cast, Mul and Add follow."""
    graph = Graph()
    feeds: list[Array] = []
    values: list[Value | None] = []
    for position, array in enumerate(arrays):
        if array is None or position not in given_:
            values.append(None if array is None else graph.constant(array))
            continue
        dims = tuple(symbol(f"n{k}") if symbolic and k == 0 else size for k, size in enumerate(array.shape))
        values.append(graph.input(f"x{position}", TensorType(dtype_of(array.dtype), dims)))
        feeds.append(array)
    result = graph.add(op, values, attrs or {}).output
    if scaled:
        b = Builder(graph)
        channels = (1, *result.shape[1:2], *(1,) * (result.tensor.rank - 2)) if op == "ConvInteger" else result.shape[-1:]
        rng = np.random.default_rng(1)
        scale, shift = (b.constant(rng.normal(size=channels).astype(np.float32)) for _ in range(2))
        result = b.op("Add", b.op("Mul", b.op("Cast", result, to=f32), scale), shift)
    graph.outputs = [result]
    (want,) = evaluate(graph, feeds)
    if not scaled:
        np.testing.assert_array_equal(want, expected(op, arrays, attrs)[0])
    fuse(graph, is_anchor)
    assert len(graph.nodes) == 1
    module = compile_graph(graph)
    assert not host_ops(module)
    assert uses_template(module)
    (got,) = module.run_items(feeds)
    assert got.dtype == want.dtype
    if scaled:  # the sums are exact, then two roundings, of which contraction may save one
        np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-6 * np.abs(want).max(initial=0))
    else:
        np.testing.assert_array_equal(got, want)


@settings(max_examples=8, deadline=None)
@given(
    batch=st.lists(st.integers(1, 4), max_size=2), m=st.integers(1, 9), k=st.integers(1, 40),
    n=st.sampled_from([3, 20]), x_type=st.sampled_from(EIGHT_BITS), w_type=st.sampled_from(EIGHT_BITS),
    zeros=st.sampled_from(["none", "constant", "given", "channels"]), scaled=st.booleans(), symbolic=st.booleans(),
)  # fmt: skip
def test_matmul_integer(batch, m, k, n, x_type, w_type, zeros, scaled, symbolic):
    rng = np.random.default_rng(0)
    arrays: list[Array | None] = [integers(rng, x_type, (*batch, m, k)), integers(rng, w_type, (k, n)), None, None]
    if zeros != "none":
        arrays[2] = integers(rng, x_type, ())
        arrays[3] = integers(rng, w_type, (n,) if zeros == "channels" else ())
    run("MatMulInteger", arrays, {0, 2} if zeros == "given" else {0}, scaled, symbolic)


@settings(max_examples=8, deadline=None)
@given(
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)), kernel=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    stride=st.integers(1, 2), pads=st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 1, 0)]),
    channels=st.sampled_from([(3, 8, 1), (4, 4, 4), (6, 4, 2)]), layout=st.sampled_from(["NCHW", "NHWC"]),
    x_type=st.sampled_from(EIGHT_BITS), w_type=st.sampled_from(EIGHT_BITS),
    zeros=st.sampled_from(["none", "constant", "given", "channels"]), scaled=st.booleans(), symbolic=st.booleans(),
)  # fmt: skip
def test_conv_integer(size, kernel, stride, pads, channels, layout, x_type, w_type, zeros, scaled, symbolic):
    rng = np.random.default_rng(0)
    c, filters, group = channels
    shape = (2, c, *size) if layout == "NCHW" else (2, *size, c)
    arrays: list[Array | None] = [integers(rng, x_type, shape), integers(rng, w_type, (filters, c // group, *kernel)), None, None]
    if zeros != "none":
        arrays[2] = integers(rng, x_type, ())
        arrays[3] = integers(rng, w_type, (filters,) if zeros == "channels" else ())
    attrs = {"strides": (stride, stride), "pads": pads, "group": group, "layout": layout}
    run("ConvInteger", arrays, {0, 2} if zeros == "given" else {0}, scaled and layout == "NCHW", symbolic, attrs)


@pytest.mark.parametrize("op", ["MatMulInteger", "ConvInteger"])
def test_what_the_template_refuses_is_computed_by_loops(op):
    rng = np.random.default_rng(0)
    spatial = (1, 1) if op == "ConvInteger" else ()
    arrays = [integers(rng, np.uint8, (4, 5, *spatial)), integers(rng, np.int8, (4, 5, *spatial) if spatial else (5, 4))]
    graph = Graph()
    values = [graph.input(f"x{k}", TensorType(dtype_of(a.dtype), a.shape)) for k, a in enumerate(arrays)]
    graph.outputs = [graph.add(op, values).output]
    module = compile_graph(graph)
    assert not host_ops(module)
    assert not uses_template(module)
    np.testing.assert_array_equal(module.run_items(arrays)[0], expected(op, arrays)[0])


@pytest.mark.parametrize("x_type", EIGHT_BITS)
def test_quantised_product_is_one_kernel(x_type):
    """QLinearMatMul: sum, scaling, rounding and saturation in one kernel."""
    rng = np.random.default_rng(0)
    x, w = integers(rng, x_type, (7, 30)), integers(rng, np.int8, (30, 20))
    graph = Graph()
    scale = rng.uniform(0.01, 0.02, 20).astype(np.float32)
    constants = [np.float32(0.01), x_type(9), w, scale, np.zeros(20, np.int8), np.float32(0.02), x_type(3)]
    value = graph.input("x", TensorType(dtype_of(x.dtype), (symbol("n"), 30)))
    graph.outputs = [graph.add("QLinearMatMul", [value, *(graph.constant(np.asarray(a)) for a in constants)]).output]
    (want,) = evaluate(graph, [x])
    expand(graph, PassContext())


    fold_constants(graph, PassContext())
    fuse(graph, is_anchor)
    assert len(graph.nodes) == 1
    module = compile_graph(graph)
    assert uses_template(module)
    np.testing.assert_array_equal(module.run_items([x])[0], want)
