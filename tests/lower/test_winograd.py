"""Which convolutions become Winograd's, and that they agree with `eval` whatever their sizes turn out to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.ir.dims import symbol
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Builder, Graph
from minicc.ir.types import TensorType, f16, f32
from minicc.kernels.domain import WINOGRAD_INPUTS
from minicc.kernels.winograd_axes import side
from minicc.lower.kernel import TemplateKernel
from minicc.lower.templates import is_anchor
from minicc.lower.templates.winograd import convolution_work
from minicc.passes.fuse import fuse
from minicc.targets.cpu import parse_target
from minicc.targets.rates import Rates
from tests.compiling import compile_graph, host_ops

SYMBOLS = (symbol("n"), symbol("h"), symbol("w"))


def convolution(channels: int, filters: int, sizes: tuple[Any, ...], layout: str = "NHWC", dtype: Any = f32,
                groups: int = 1, kernel: tuple[int, ...] = (3, 3), **attrs: Any) -> Graph:  # fmt: skip
    """Conv with a bias, Relu and a shift, fused; sizes are the batch and the spatial axes."""
    rng = np.random.default_rng(0)
    graph = Graph()
    b = Builder(graph)
    batch, *spatial = sizes
    shape = (batch, *spatial, channels) if layout == "NHWC" else (batch, channels, *spatial)
    x = graph.input("x", TensorType(dtype, shape))
    w = rng.standard_normal((filters, channels // groups, *kernel)) / np.sqrt(channels * 9)
    bias = rng.standard_normal(filters)
    constants = [b.constant(a.astype(dtype.numpy)) for a in (w, bias)]
    y = graph.add("Conv", [x, *constants], {"layout": layout, "group": groups, "pads": [1, 1, 1, 1], **attrs}).output
    y = b.op("Add", b.op("Relu", y), b.constant(np.array(0.25, dtype.numpy)))
    graph.outputs = [y]
    fuse(graph, is_anchor)
    return graph


def tiles_of(module: Any) -> list[tuple[int, int]]:
    """The tile of each Winograd kernel."""
    kernels = [k for k in module.program.kernels if isinstance(k, TemplateKernel) and k.template == "winograd"]
    constants = [dict(k.constants) for k in kernels]
    return [(int(c["OUT_H"]), int(c["OUT_W"])) for c in constants]


def check(module: Any, graph: Graph, shape: tuple[int, ...], bound: float = 6e-6) -> None:
    """Against `eval`, relative to the largest output."""
    dtype = graph.inputs[0].tensor.dtype.numpy
    x = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    (want,), (got,) = evaluate(graph, [x]), module.run_items([x])
    assert got.shape == want.shape
    if got.size:
        error = np.abs(got.astype(np.float64) - want).max() / np.abs(want).max()
        assert error <= bound, error


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_of_unknown_sizes(layout):
    graph = convolution(20, 24, SYMBOLS, layout)
    module = compile_graph(graph, threads=2)
    assert tiles_of(module) == [(4, 4)] and not host_ops(module)
    for n, h, w in ((1, 8, 8), (3, 1, 1), (2, 13, 30), (1, 2, 57), (0, 8, 8)):
        check(module, graph, (n, h, w, 20) if layout == "NHWC" else (n, 20, h, w))


@pytest.mark.parametrize("size", [7, 56])
def test_of_known_sizes_and_with_the_switch(size):
    graph = convolution(64, 40, (2, size, size))
    on, off = compile_graph(graph), compile_graph(graph, winograd=False)
    assert tiles_of(on) and not tiles_of(off)
    check(on, graph, (2, size, size, 64))
    check(off, graph, (2, size, size, 64), 2e-6)


@pytest.mark.parametrize(
    "attrs",
    [{"strides": [2, 1]}, {"dilations": [1, 2]}, {"groups": 2}, {"kernel": (1, 1)}, {"kernel": (3, 2)},
     {"kernel": (5, 3)}, {"kernel": (5, 5), "strides": [2, 2]}, {"kernel": (7, 7)}],
    ids=str,
)
def test_other_convolutions_do_not(attrs):
    graph = convolution(64, 64, (1, 30, 30), **attrs)
    module = compile_graph(graph)
    assert not tiles_of(module)
    check(module, graph, (1, 30, 30, 64))


def test_of_every_second_output():
    graph = convolution(40, 48, SYMBOLS, strides=[2, 2])
    module = compile_graph(graph, threads=2)
    assert tiles_of(module) == [(2, 2)]
    for n, h, w in ((1, 14, 14), (2, 1, 9), (1, 31, 8)):
        check(module, graph, (n, h, w, 40))


@pytest.mark.parametrize(("kernel", "tile"), [((1, 3), (1, 4)), ((3, 1), (4, 1)), ((1, 5), (1, 2)), ((5, 5), (2, 2))])
def test_of_other_taps(kernel, tile):
    height, width = kernel[0] // 2, kernel[1] // 2
    graph = convolution(24, 40, SYMBOLS, kernel=kernel, pads=[height, width, height, width])
    module = compile_graph(graph)
    assert tiles_of(module) == [tile]
    for n, h, w in ((1, 9, 8), (3, 5, 31)):
        check(module, graph, (n, h, w, 24))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_over_a_single_axis(layout):
    graph = convolution(24, 40, (symbol("n"), 100), layout, kernel=(3,), pads=[1, 1])
    module = compile_graph(graph, threads=2)
    assert tiles_of(module) == [(1, 4)]
    for n in (1, 3):
        check(module, graph, (n, 100, 24) if layout == "NHWC" else (n, 24, 100))


def test_of_half_precision():
    graph = convolution(32, 32, (1, 20, 20), dtype=f16)
    module = compile_graph(graph)
    assert tiles_of(module)
    check(module, graph, (1, 20, 20, 32), 2e-3)


def test_padding_of_its_own_on_every_side():
    graph = convolution(32, 16, (1, 21, 10), pads=[2, 0, 1, 3])
    module = compile_graph(graph)
    assert tiles_of(module)
    check(module, graph, (1, 21, 10, 32))


@settings(max_examples=100, deadline=None)
@given(
    target=st.sampled_from(["cpu:sse", "cpu:avx2", "cpu:avx512"]), filters=st.integers(1, 2000),
    channels=st.integers(1, 12000), stride=st.sampled_from([1, 2]),
    images=st.integers(1, 9), sizes=st.tuples(st.integers(1, 300), st.integers(1, 300)), taps=st.sampled_from([3, 5]),
)  # fmt: skip
def test_the_choice(target, filters, channels, stride, images, sizes, taps):
    machine, stride = parse_target(target), stride if taps == 3 else 1
    work = convolution_work(machine, Rates(), (filters, channels, taps, taps), stride, images, sizes)
    tile = min(work, key=work.get)
    if channels < machine.vector_width:
        assert tile is None
    for tile in filter(None, work):  # the stack array holds at least one tile
        assert side(tile[0], stride, taps) * side(tile[1], stride, taps) * channels <= WINOGRAD_INPUTS
    # Caches decide about blocks, not about the tile.
    other = replace(machine, l2_bytes=8 << 20)
    assert work == convolution_work(other, Rates(), (filters, channels, taps, taps), stride, images, sizes)


@pytest.mark.parametrize(
    ("shape", "size", "tile"),
    [((64, 64), 56, (4, 4)), ((256, 256), 14, (4, 4)), ((512, 512), 7, (2, 2)), ((512, 512), 2, None)],
)
def test_the_choice_for_a_residual_network(shape, size, tile):
    """What was measured to be fastest where weights come from memory."""
    work = convolution_work(parse_target("cpu:avx512"), Rates(), (*shape, 3, 3), 1, 1, (size, size))
    assert min(work, key=work.get) == tile
