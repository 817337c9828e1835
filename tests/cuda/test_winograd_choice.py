"""Which convolutions have Winograd's form as a way on CUDA, which take it unasked, and a model that takes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

import minicc
from minicc import walk
from minicc.frontend.model import load_model
from minicc.ir.dims import symbol
from minicc.ir.graph import Graph
from minicc.ir.types import bf16, f16
from minicc.kernels.cuda_tiles import SIZES
from minicc.kernels.cuda_winograd import CLEARLY, tiles_of_elements
from minicc.kernels.template import TEMPLATES, bind
from minicc.lower.context import Choices
from minicc.lower.kernel import TemplateKernel
from minicc.lower.lower import lower
from minicc.lower.program import KernelStep
from minicc.lower.templates.cuda_winograd import DIRECT, expected_times
from minicc.module import Stages
from minicc.options import Options
from minicc.targets.cpu import parse_target
from minicc.targets.cuda import CudaTarget, parse_cuda_target
from tests.cuda.modules import reference, run_module
from tests.cuda.test_conv import convolve
from tests.cuda.test_models import DIGITS
from tests.lower.test_winograd import convolution

TARGET, AMPERE = parse_cuda_target("cuda:sm_90"), parse_cuda_target("cuda:sm_80")
KNOWN = (32, 14, 14)


def lowered(graph: Graph, picked: str = "", **options: Any) -> tuple[list[str], list[str]]:
    """Winograd's ways that are open for a graph of one convolution, and the templates of its steps when one of them is picked."""
    choices = Choices({(): picked} if picked else {})
    program = lower(graph, TARGET, Options.from_env().override(**options), choices=choices)
    kernels = [program.kernels[step.kernel] for step in program.steps if isinstance(step, KernelStep)]
    ways = [way for way in choices.open.get((), ()) if way.startswith("winograd")]
    return ways, [getattr(kernel, "template", "loops") for kernel in kernels]


STEPS = ["winograd_input", "gemm", "winograd_output"]
TWO, FOUR = "winograd 2x2", "winograd 4x4"


def test_large_gains_are_taken_unasked() -> None:
    """Of float32, for which FMA units are slow, and of many pixels."""
    assert lowered(convolution(256, 256, KNOWN)) == ([FOUR, TWO], STEPS)


@pytest.mark.parametrize(
    ("graph", "options", "ways"),
    [
        (lambda: convolution(256, 256, (symbol("n"), 14, 14)), {}, [TWO, FOUR]),
        (lambda: convolution(64, 64, (1, 56, 56)), {}, [FOUR, TWO]),
        (lambda: convolution(256, 256, KNOWN), {"precision": "tf32"}, [FOUR, TWO]),
        (lambda: convolution(256, 256, KNOWN, dtype=f16), {}, [TWO]),
        (lambda: convolution(256, 256, KNOWN, dtype=bf16), {}, [TWO]),
        (lambda: convolution(256, 256, KNOWN), {"winograd": False}, []),
    ],
    ids=["unknown batch", "one image", "tf32", "f16", "bf16", "switched off"],
)
def test_otherwise_a_direct_sum_stays(graph: Any, options: dict[str, Any], ways: list[str]) -> None:
    assert lowered(graph(), **options) == (ways, ["conv"])
    for way in ways:
        assert lowered(graph(), way, **options) == (ways, STEPS)


def test_timing_comes_to_them_early() -> None:
    """Behind the first way of the direct sum, before its others."""
    choices = Choices()
    lower(convolution(64, 64, (1, 56, 56)), TARGET, Options.from_env(), choices=choices)
    first, *others = choices.open[()]
    assert not first.startswith("winograd") and others[:2] == [FOUR, TWO] and len(others) > 2


@pytest.mark.parametrize(
    "attrs",
    [{"strides": [2, 2]}, {"dilations": [2, 2]}, {"groups": 2}, {"kernel": (3, 2)}, {"kernel": (5, 5)}, {"kernel": (1, 3)}],
    ids=str,
)
def test_other_convolutions_have_no_ways(attrs: dict[str, Any]) -> None:
    assert lowered(convolution(256, 256, KNOWN, **attrs)) == ([], ["conv"])


@settings(max_examples=60, deadline=None)
@given(
    target=st.sampled_from([TARGET, AMPERE]), element=st.sampled_from(["f32", "tf32", "f16", "bf16"]), images=st.integers(1, 64),
    extents=st.tuples(st.integers(1, 300), st.integers(1, 300)), channels=st.integers(1, 1000), filters=st.integers(1, 1000),
)  # fmt: skip
def test_the_estimates(
    target: CudaTarget, element: str, images: int, extents: tuple[int, int], channels: int, filters: int
) -> None:
    """They name every tile, and none beats the time in which its forms pass through memory."""
    times = expected_times(element, images, extents, channels, filters, target)
    assert set(times) == {DIRECT, *tiles_of_elements(element)}
    for out in tiles_of_elements(element):
        tiles = images * -(-extents[0] // out) * -(-extents[1] // out)
        forms = (out + 2) ** 2 * tiles * 2 * (SIZES[element] * channels + 4 * filters)
        assert times[out] > forms / 5e6  # bytes per microsecond of the fastest GPU that is known here


def test_the_estimates_of_a_residual_network() -> None:
    """Where the direct sum's time is that of the FMA units, so that it is worth while to go through memory."""
    for size, channels in ((56, 64), (28, 128), (14, 256), (7, 512)):
        for element, gain in (("f32", True), ("tf32", False), ("f16", False)):
            times = expected_times(element, 32, (size, size), channels, channels, TARGET)
            assert (times[DIRECT] > CLEARLY * min(times.values())) is gain


def test_only_gpus_have_these_templates() -> None:
    for name in (STEPS[0], STEPS[2]):
        with pytest.raises(KeyError, match="no form for CPUs"):
            bind(name, {}, [1] * len(TEMPLATES[name].words), parse_target("cpu:avx2"), 1)


RNG = np.random.default_rng(3)
X = RNG.standard_normal((2, 8, 5, 7)).astype(np.float32)
WEIGHTS = (RNG.standard_normal((8, 8, 3, 3)) / 8).astype(np.float32)


def network(*shape: int | str) -> onnx.ModelProto:
    """y = Relu(Conv(r) + r) with r = Relu(x)."""
    steps = [("Relu", "x", "r"), ("Conv", "r w", "c"), ("Add", "c r", "s"), ("Relu", "s", "y")]
    pads = {"Conv": {"pads": [1] * 4}}
    nodes = [helper.make_node(op, ins.split(), [out], out, **pads.get(op, {})) for op, ins, out in steps]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(WEIGHTS, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def by_way(model: onnx.ModelProto, way: str, precision: str = "fp32") -> minicc.Module:
    """The module in which all layers that have this way go it, as `tune` picks them; there is such a layer."""
    choices, options = Choices(), Options.from_env().override(keep_bytes=0, precision=precision)
    walk.build(load_model(model), TARGET, options, Stages(None), choices)
    picked = {layers: way for layers, ways in choices.open.items() if way in ways}
    assert picked
    return walk.build(load_model(model), TARGET, options, Stages(None), Choices(picked))


@pytest.mark.parametrize("way", [TWO, FOUR])
def test_a_residual_in_the_epilogue(way: str) -> None:
    module = by_way(network("n", *X.shape[1:]), way)
    templates = [kernel.template for kernel in module.program.kernels if isinstance(kernel, TemplateKernel)]
    assert templates == STEPS
    r = np.maximum(np.moveaxis(X, 1, -1), 0)
    want = np.maximum(convolve(r[:, None], WEIGHTS[:, :, None], 1, [1] * 3, [1] * 3, [0, 1, 1])[:, 0] + r, 0)
    (got,) = run_module(module, {"x": X})
    np.testing.assert_allclose(np.moveaxis(got, 1, -1), want, rtol=0, atol=3e-6 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "way", "limit"), [("fp32", FOUR, 1e-5), ("tf32", FOUR, 5e-3), ("fp16", TWO, 5e-3)])
def test_the_digits(precision: str, way: str, limit: float) -> None:
    """A trained network of six such convolutions, two of them with residuals, beside ONNX Runtime."""
    model = onnx.load(DIGITS)
    module = by_way(model, way, precision)
    assert sum(step.origin != () and "winograd_output" in module.program.kernels[step.kernel].name
               for step in module.program.steps if isinstance(step, KernelStep)) == 6  # fmt: skip
    (port,) = module.inputs
    feeds = {port.name: RNG.uniform(0, 1, [n if isinstance(n, int) else 2 for n in port.shape]).astype(np.float32)}
    (got, *_), (want, *_) = run_module(module, feeds), reference(model, feeds)
    assert np.abs(got - want).max() < limit * np.abs(want).max()
