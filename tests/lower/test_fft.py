"""Which convolutions go by Fourier transforms, and that they agree with `eval` whatever their sizes turn out to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc.ir.types import f16
from minicc.kernels.cpu.fft_sizes import INPUTS, frequencies
from minicc.lower.context import Choices
from minicc.lower.kernel import TemplateKernel
from minicc.lower.templates import winograd
from minicc.lower.templates.fft import MOST_BYTES, MOST_TIMES, fft_work
from minicc.ops.spatial import window
from minicc.targets.cpu import parse_target
from minicc.targets.rates import Rates
from tests.compiling import compile_graph, host_ops
from tests.lower.test_winograd import SYMBOLS, check, convolution

# Largest error, relative to the largest output.
BOUND = 2e-6


def sides_of(module: Any) -> list[tuple[int, int]]:
    """The tile of each kernel of Fourier transforms."""
    kernels = [k for k in module.program.kernels if isinstance(k, TemplateKernel) and k.template == "conv_fft"]
    constants = [dict(k.constants) for k in kernels]
    return [(int(c["SIDE_H"]), int(c["SIDE_W"])) for c in constants]


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_of_unknown_sizes(layout):
    graph = convolution(20, 24, SYMBOLS, layout, kernel=(11, 11), pads=[5, 5, 5, 5])
    module = compile_graph(graph, threads=2)
    assert sides_of(module) and not host_ops(module)
    for n, h, w in ((1, 8, 8), (3, 1, 1), (2, 13, 30), (1, 2, 57), (0, 8, 8)):
        check(module, graph, (n, h, w, 20) if layout == "NHWC" else (n, 20, h, w), BOUND)


def test_the_switch():
    graph = convolution(64, 40, (2, 40, 40), kernel=(7, 7), pads=[3, 3, 3, 3])
    on, off = compile_graph(graph), compile_graph(graph, fft=False)
    assert sides_of(on) and not sides_of(off)
    check(on, graph, (2, 40, 40, 64), BOUND)
    check(off, graph, (2, 40, 40, 64), 4e-6)


@pytest.mark.parametrize(
    "attrs",
    [{"strides": [2, 2]}, {"group": 2}, {"kernel": (3, 3)}, {"kernel": (1, 4)}, {"strides": [1, 2]}],
    ids=str,
)
def test_other_convolutions_do_not(attrs):
    graph = convolution(64, 64, (1, 30, 30), groups=attrs.get("group", 1), **{"kernel": (7, 7), **attrs})
    assert not sides_of(compile_graph(graph))


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.sampled_from([(7, 7), (9, 9), (1, 11), (5, 5)]), channels=st.sampled_from([1, 3, 16, 40]),
    filters=st.sampled_from([3, 24, 40]), images=st.integers(1, 2), sizes=st.tuples(st.integers(1, 40), st.integers(8, 40)),
    before=st.tuples(st.integers(0, 5), st.integers(0, 5)), layout=st.sampled_from(["NHWC", "NCHW"]),
    threads=st.sampled_from([1, 2]),
)  # fmt: skip
def test_every_way_by_fourier_transforms_is_right(kernel, channels, filters, images, sizes, before, layout, threads):
    """Also where the estimate would not go it: ways are picked by name, and programs saved and loaded."""
    after = [max(0, size - extent) for size, extent in zip(kernel, sizes)]
    graph = convolution(channels, filters, (images, *sizes), layout, kernel=kernel, pads=[*before, *after])
    choices = Choices()
    compile_graph(graph, choices, threads=threads)
    names = [(layers, way) for layers, ways in choices.open.items() for way in ways if way.startswith("fft ")]
    for layers, way in names:
        module = compile_graph(graph, Choices({layers: way}), threads=threads)
        assert sides_of(module)
        check(module, graph, (images, *sizes, channels) if layout == "NHWC" else (images, channels, *sizes), BOUND)


def test_of_dilated_taps():
    graph = convolution(64, 64, (1, 40, 40), kernel=(5, 5), dilations=[2, 2], pads=[4, 4, 4, 4])
    module = compile_graph(graph)
    assert sides_of(module)
    check(module, graph, (1, 40, 40, 64), BOUND)


def test_over_a_single_axis():
    graph = convolution(64, 64, (2, 100), kernel=(15,), pads=[7, 7])
    module = compile_graph(graph, threads=2)
    ((height, width),) = sides_of(module)
    assert height == 1 and width > 15
    check(module, graph, (2, 100, 64), BOUND)


def test_of_half_precision():
    graph = convolution(32, 32, (1, 40, 40), dtype=f16, kernel=(7, 7), pads=[3, 3, 3, 3])
    module = compile_graph(graph)
    assert sides_of(module)
    check(module, graph, (1, 40, 40, 32), 2e-3)


def test_a_saved_module_holds_it(tmp_path):
    rng = np.random.default_rng(3)
    weights = numpy_helper.from_array(rng.standard_normal((24, 32, 9, 9)).astype(np.float32) / 50, "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], pads=[4] * 4), helper.make_node("Sigmoid", ["c"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", c, 40, 40]) for name, c in (("x", 32), ("y", 24)))
    graph = helper.make_graph(nodes, "saved", [x], [y], [weights])
    module = minicc.compile(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), keep_bytes=0)
    assert any(kernel.name.startswith("fft_") for kernel in module.program.kernels)
    module.save(tmp_path / "saved.minicc")
    image = rng.standard_normal((2, 32, 40, 40)).astype(np.float32)
    np.testing.assert_array_equal(minicc.load(tmp_path / "saved.minicc")(image), module(image))


def work_of(name, shape, size, images=1):
    """The estimates (of the direct sum and Winograd's form, of Fourier transforms) for a machine with 1 MiB of L2."""
    target = replace(parse_target(name), l2_bytes=1 << 20)
    pads = [extent // 2 for extent in shape[2:]] * 2
    geometry = window({"pads": pads}, shape[2:], size)
    tiled = winograd.takes_winograd(geometry, 1)
    others = winograd.convolution_work(target, Rates(), shape, 1, images, geometry.output, tiled)
    return others, fft_work(target, Rates(), shape, geometry, images)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(["cpu:sse", "cpu:avx2", "cpu:avx512"]), filters=st.integers(1, 600), channels=st.integers(1, 2000),
    images=st.integers(1, 9), sizes=st.tuples(st.integers(40, 300), st.integers(40, 300)),
    kernel=st.tuples(st.integers(1, 33), st.integers(5, 33)),
)  # fmt: skip
def test_what_is_offered_fits(name, filters, channels, images, sizes, kernel):
    lanes = parse_target(name).vector_width
    _, found = work_of(name, (filters, channels, *kernel), sizes, images)
    for sides in found:
        count = 2 * frequencies(sides.height, sides.width)
        assert count * max(channels, lanes) <= INPUTS
        assert sides.width >= kernel[1] and (sides.height == 1 if kernel[0] == 1 else sides.height >= kernel[0])
        memory = 4 * count * channels * -(-filters // lanes) * lanes
        assert memory <= max(MOST_BYTES, MOST_TIMES * 4 * filters * channels * kernel[0] * kernel[1])
    assert not found or all(type(work) is int and work > 0 for work in found.values())


@pytest.mark.parametrize(
    ("shape", "size", "sides"),
    [
        ((64, 64, 7, 7), 56, 20),
        ((64, 64, 11, 11), 56, 24),
        ((32, 32, 9, 9), 112, 24),
        ((96, 96, 5, 5), 28, 12),
        ((192, 192, 1, 7), 17, 24),
        ((192, 192, 5, 5), 14, None),
        ((128, 48, 5, 5), 7, None),
        ((64, 64, 7, 7), 7, None),
        ((512, 512, 7, 7), 7, None),
    ],
)
def test_the_choice(shape, size, sides):
    """What was measured to be faster than the direct sum and Winograd's form, with 1 MiB of L2."""
    others, found = work_of("cpu:avx512", shape, (size, size))
    best = min(found, key=found.get, default=None)
    if best is not None and found[best] >= min(others.values()):
        best = None
    assert (best and best.width) == sides
