"""CUDA's depthwise and transposed convolutions and pools, with a fused Relu, in the interpreter against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

pytest.importorskip("numba.cuda.compiler", reason="numba-cuda is not installed (extra cuda)")

import minicc
from tests.cuda.loop_kernels import TARGET
from tests.cuda.modules import node_model, reference, run_module

Array = np.ndarray[Any, Any]


def followed_by_relu(proto: Any) -> Any:
    """The model with a Relu on its only output."""
    proto.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))
    proto.graph.output[0].name = "z"
    return proto


def check(proto: Any, feeds: dict[str, Array | None], template: str) -> None:
    module = minicc.compile(proto, target=TARGET.name, strict=True)
    assert template in {getattr(kernel, "template", "") for kernel in module.program.kernels}
    found, expected = run_module(module, feeds)[0], reference(proto, feeds)[0]
    # A sum errs relative to its terms, which are about as large as the largest result.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * max(1.0, np.abs(expected).max(initial=0)))


@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_depthwise(data: st.DataObject) -> None:
    channels, kernel = data.draw(st.sampled_from([2, 5, 40])), data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    stride, dilation = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    pads = data.draw(st.tuples(*[st.integers(0, 2)] * 4))
    rng = np.random.default_rng(channels)
    feeds: dict[str, Array | None] = {
        "x": rng.standard_normal((2, channels, 7, 9)).astype(np.float32),
        "w": rng.standard_normal((channels, 1, *kernel)).astype(np.float32),
        "b": rng.standard_normal(channels).astype(np.float32),
    }
    proto = node_model("Conv", feeds, ["y"], ("w", "b"), group=channels, strides=[stride] * 2, dilations=[dilation] * 2,
                       pads=pads)  # fmt: skip
    check(followed_by_relu(proto), feeds, "depthwise")


@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_pools(data: st.DataObject) -> None:
    op, rank = data.draw(st.sampled_from(["MaxPool", "AveragePool"])), data.draw(st.integers(1, 3))
    kernel = data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    pads = [data.draw(st.integers(0, (k - 1) // 2)) for k in (*kernel, *kernel)]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "pads": pads, "strides": [data.draw(st.integers(1, 2))] * rank}
    if op == "AveragePool":
        attributes["count_include_pad"] = data.draw(st.integers(0, 1))
    shape = (2, 3, *[7, 5, 6][:rank])
    feeds: dict[str, Array | None] = {"x": np.random.default_rng(rank).standard_normal(shape).astype(np.float32)}
    check(followed_by_relu(node_model(op, feeds, ["y"], **attributes)), feeds, "pool")


@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_transposed_convolutions(data: st.DataObject) -> None:
    groups, rank = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    kernel = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    stride, dilation = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    rng = np.random.default_rng(rank)
    feeds: dict[str, Array | None] = {
        "x": rng.standard_normal((2, 4 * groups, *[5, 4, 6][:rank])).astype(np.float32),
        "w": rng.standard_normal((4 * groups, 3, *kernel)).astype(np.float32),
        "b": rng.standard_normal(3 * groups).astype(np.float32),
    }
    pads = [data.draw(st.integers(0, (k - 1) * dilation // 2)) for k in (*kernel, *kernel)]
    proto = node_model("ConvTranspose", feeds, ["y"], ("w", "b"), group=groups, strides=[stride] * rank,
                       dilations=[dilation] * rank, pads=pads)  # fmt: skip
    check(followed_by_relu(proto), feeds, "conv_transpose")


def test_a_maximum_keeps_a_nan() -> None:
    x = np.zeros((1, 1, 1, 6), np.float32)
    x[..., 2] = np.nan
    proto = node_model("MaxPool", {"x": x}, ["y"], kernel_shape=[1, 2])
    found = run_module(minicc.compile(proto, target=TARGET.name, strict=True), {"x": x})[0]
    np.testing.assert_array_equal(np.isnan(found[0, 0, 0]), [False, True, True, False, False])
