"""phases-as-channels: transposed convolutions with few filters as convolutions, against ONNX Runtime; others stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.ir.graph import Graph
from minicc.options import Options
from minicc.passes.manager import Pass, run_passes
from minicc.passes.transposed_convolutions import phases_as_channels
from tests.passes.models import ops, run_reference

PHASES = Pass("phases-as-channels", phases_as_channels)


def model(channels: int, filters: int, spatial: list[int], kernel: list[int], bias: bool, *, symbolic: bool = False,
          **attributes: Any) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:  # fmt: skip
    """A transposed convolution of random numbers, and its input."""
    rng = np.random.default_rng(len(spatial) + channels)
    x = rng.standard_normal((2, channels, *spatial)).astype(np.float32)
    weights = [rng.standard_normal((channels, filters, *kernel)).astype(np.float32)]
    weights += [rng.standard_normal(filters).astype(np.float32)] if bias else []
    tensors = [numpy_helper.from_array(w, name) for w, name in zip(weights, "wb")]
    node = helper.make_node("ConvTranspose", ["x", *(t.name for t in tensors)], ["y"], **attributes)
    shape = [f"s{axis}" for axis in range(x.ndim)] if symbolic else list(x.shape)
    shape[1] = channels
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in (("x", shape), ("y", None))]
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), {"x": x}


def rewritten(made: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> Graph:
    """The graph after the pass, whose numbers are those of ONNX Runtime."""
    graph = load_model(made).graph
    run_passes(graph, (PHASES,), Options(check=1))
    want = run_reference(made, feeds)[0]
    got = evaluate(graph, [feeds["x"]])[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(want).max(initial=0))), strict=True)
    return graph


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    rank = draw(st.integers(1, 3))
    each = lambda low, high: draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))  # noqa: E731
    strides = each(1, 4)
    return {
        "channels": draw(st.integers(1, 3)), "filters": draw(st.sampled_from([1, 2, 3, 17])),
        "spatial": each(1, 4), "kernel": each(1, 6 if rank < 3 else 4), "bias": draw(st.booleans()),
        "symbolic": draw(st.booleans()), "strides": strides, "pads": each(0, 3) + each(0, 3),
        "output_padding": [draw(st.integers(0, stride - 1)) for stride in strides],
    }  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(call=calls())
def test_any_call(call: dict[str, Any]) -> None:
    sizes = zip(call["spatial"], call["strides"], call["kernel"], call["output_padding"])
    full = [(n - 1) * s + k + extra for n, s, k, extra in sizes]
    rank = len(full)
    assume(all(f > a + b for f, a, b in zip(full, call["pads"][:rank], call["pads"][rank:])))
    rewritten(*model(**call))


# Layers of real models: generators, text detectors, super resolution, segmentation.
TAKEN = {
    "two by two": {"channels": 24, "filters": 1, "spatial": [5, 6], "kernel": [2, 2], "strides": [2, 2]},
    "four by four": {"channels": 8, "filters": 3, "spatial": [5, 6], "kernel": [4, 4], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    "three by three": {"channels": 8, "filters": 2, "spatial": [5, 6], "kernel": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1],
                           "output_padding": [1, 1]},
    "nine by nine": {"channels": 8, "filters": 1, "spatial": [5, 6], "kernel": [9, 9], "strides": [3, 3], "pads": [4, 4, 4, 4],
                         "output_padding": [2, 2]},
    "same": {"channels": 4, "filters": 1, "spatial": [5, 6], "kernel": [5, 5], "strides": [3, 3], "auto_pad": "SAME_UPPER"},
    "one axis": {"channels": 4, "filters": 1, "spatial": [9], "kernel": [8], "strides": [4], "pads": [2, 2]},
}  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("symbolic", [False, True])
@pytest.mark.parametrize("layer", TAKEN)
def test_few_filters_become_a_convolution(layer: str, symbolic: bool, bias: bool) -> None:
    if symbolic and "auto_pad" in TAKEN[layer]:
        pytest.skip("how much is cut depends on a size that is not known")
    made, feeds = model(**TAKEN[layer], symbolic=symbolic, bias=bias)
    found = ops(rewritten(made, feeds))
    assert found["Conv"] == 1 and "ConvTranspose" not in found
    module = minicc.compile(made.SerializeToString(), threads=2)
    want = run_reference(made, feeds)[0]
    np.testing.assert_allclose(module(feeds["x"]), want, rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_one_pixel_is_a_product(rank: int) -> None:
    found = ops(rewritten(*model(channels=5, filters=7, spatial=[1] * rank, kernel=[4] * rank, bias=True)))
    assert found["MatMul"] == 1 and "ConvTranspose" not in found


STAY = {
    "many filters": {"channels": 3, "filters": 32, "spatial": [5, 6], "kernel": [2, 2], "strides": [2, 2]},
    "eight filters of four taps": {"channels": 3, "filters": 8, "spatial": [5, 6], "kernel": [4, 4], "strides": [2, 2],
                                   "pads": [1, 1, 1, 1]},
    "no stride": {"channels": 3, "filters": 1, "spatial": [5, 6], "kernel": [3, 3]},
    "dilated": {"channels": 3, "filters": 1, "spatial": [5, 6], "kernel": [2, 2], "strides": [2, 2], "dilations": [2, 2]},
    "far beyond the edge": {"channels": 3, "filters": 1, "spatial": [5, 6], "kernel": [2, 2], "strides": [2, 2],
                            "pads": [2, 2, 2, 2]},
}  # fmt: skip


@pytest.mark.parametrize("layer", STAY)
def test_others_stay(layer: str) -> None:
    assert ops(rewritten(*model(**STAY[layer], bias=True)))["ConvTranspose"] == 1
