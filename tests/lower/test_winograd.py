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
from minicc.lower.kernel import TemplateKernel
from minicc.lower.templates import is_anchor
from minicc.lower.templates.winograd import winograd_tile
from minicc.passes.fuse import fuse
from minicc.targets.cpu import parse_target
from tests.compiling import compile_graph, host_ops

SYMBOLS = (symbol("n"), symbol("h"), symbol("w"))


def convolution(channels: int, filters: int, sizes: tuple[Any, Any, Any], layout: str = "NHWC", dtype: Any = f32,
                groups: int = 1, kernel: tuple[int, int] = (3, 3), **attrs: Any) -> Graph:  # fmt: skip
    """Conv with a bias, Relu and a shift, fused; sizes are batch, height and width."""
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


def tiles_of(module: Any) -> list[int]:
    """OUT of each Winograd kernel."""
    kernels = [k for k in module.program.kernels if isinstance(k, TemplateKernel) and k.template == "winograd"]
    return [int(dict(k.constants)["OUT"]) for k in kernels]


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
    assert tiles_of(module) == [4] and not host_ops(module)
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
    [{"strides": [2, 1]}, {"dilations": [1, 2]}, {"groups": 2}, {"kernel": (1, 3), "pads": [0, 1, 0, 1]}, {"kernel": (5, 5)}],
    ids=str,
)
def test_other_convolutions_do_not(attrs):
    graph = convolution(64, 64, (1, 30, 30), **attrs)
    module = compile_graph(graph)
    assert not tiles_of(module)
    check(module, graph, (1, 30, 30, 64))


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
    channels=st.integers(1, 12000), images=st.integers(1, 9), sizes=st.tuples(st.integers(1, 300), st.integers(1, 300)),
)  # fmt: skip
def test_the_choice(target, filters, channels, images, sizes):
    machine = parse_target(target)
    tile = winograd_tile(machine, (filters, channels, 3, 3), images, sizes)
    if channels < machine.vector_width:
        assert tile == 0
    elif tile:  # its stack array holds at least one tile of every block
        assert (tile + 2) ** 2 * channels <= WINOGRAD_INPUTS
    # Caches decide about blocks, not about the tile.
    assert tile == winograd_tile(replace(machine, l2_bytes=8 << 20), (filters, channels, 3, 3), images, sizes)


@pytest.mark.parametrize(
    ("shape", "size", "tile"),
    [((64, 64), 56, 4), ((128, 128), 28, 4), ((256, 256), 14, 4), ((512, 512), 7, 2), ((512, 512), 2, 0)],
)
def test_the_choice_for_a_residual_network(shape, size, tile):
    """What was measured to be fastest where weights come from memory."""
    assert winograd_tile(parse_target("cpu:avx512"), (*shape, 3, 3), 1, (size, size)) == tile
