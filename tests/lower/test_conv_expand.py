"""Expansion and depthwise convolution as one kernel in whole models: against ONNX Runtime; when it is legal and worth it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

import minicc
from minicc.lower.templates import expand
from tests.compiling import saved_and_loaded
from tests.passes.models import run_reference

ACTIVATIONS = ["", "Relu", "Clip", "HardSwish", "SiLU", "Elu"]


def model(shape: tuple[int | str, ...], channels: int, kernel: tuple[int, int], attributes: dict[str, Any], first: str, *,
          bias: bool = True, second: str = "Relu", squeeze: bool = False, extra: str = "") -> ModelProto:  # fmt: skip
    """1x1 Conv, an activation, depthwise Conv, an activation, 1x1 Conv. extra: "output" or "reader" of what lies between.

    squeeze: a pooled factor as in squeeze-and-excite networks.
    """
    rng = np.random.default_rng(0)
    depth = shape[1]
    constants = {
        "w": rng.standard_normal((channels, depth, 1, 1)), "b": rng.standard_normal(channels),
        "d": rng.standard_normal((channels, 1, *kernel)), "e": rng.standard_normal(channels), "low": np.array(-0.5),
        "high": np.array(2.25), "v": rng.standard_normal((8, channels, 1, 1)),
    }  # fmt: skip
    nodes: list[Any] = []

    def activation(name: str, x: str, y: str) -> None:
        if name == "SiLU":
            nodes.append(helper.make_node("Sigmoid", [x], [f"{y}_s"]))
            nodes.append(helper.make_node("Mul", [x, f"{y}_s"], [y]))
        else:
            nodes.append(helper.make_node(name or "Identity", [x, *(["low", "high"] if name == "Clip" else [])], [y]))

    nodes.append(helper.make_node("Conv", ["x", "w", *(["b"] if bias else [])], ["c"]))
    activation(first, "c", "a")
    nodes.append(helper.make_node("Conv", ["a", "d", *(["e"] if bias else [])], ["f"], group=channels, **attributes))
    activation(second, "f", "g")
    last = "g"
    if squeeze:
        nodes.append(helper.make_node("GlobalAveragePool", ["g"], ["p"]))
        nodes.append(helper.make_node("Mul", ["g", "p"], ["h"]))
        last = "h"
    nodes.append(helper.make_node("Conv", [last, "v"], ["y"]))
    outputs = ["y"]
    if extra == "output":
        outputs.append("a")
    elif extra == "reader":
        nodes.append(helper.make_node("GlobalAveragePool", ["a"], ["z"]))
        outputs.append("z")
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), *((o, None) for o in outputs))]
    weights = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "block", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def compile_and_check(source: ModelProto, shape: tuple[int, ...], **options: Any) -> bool:
    """Compare with ONNX Runtime; whether both convolutions became one kernel."""
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    module = minicc.compile(source, **options)
    assert saved_and_loaded(module.program).kernels == module.program.kernels
    for found, expected in zip(module.run(None, {"x": x}), run_reference(source, {"x": x})):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))
    return any(kernel.name.startswith("conv_expand") for kernel in module.program.kernels)


@pytest.fixture(autouse=True)
def _always_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expand, "WORTH_BYTES", 0)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(3, 24), st.integers(3, 24)),
    depth=st.sampled_from([1, 5, 16, 24]),
    channels=st.sampled_from([3, 16, 24, 40, 70]),
    kernel=st.sampled_from([(3, 3), (5, 5), (1, 3)]),
    step=st.sampled_from([1, 2]),
    pads=st.sampled_from([[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0], [2, 2, 2, 2]]),
    first=st.sampled_from(ACTIVATIONS),
    second=st.sampled_from(["", "Relu", "SiLU"]),
    bias=st.booleans(),
    squeeze=st.booleans(),
    batch=st.sampled_from([1, 2, "n"]),
    threads=st.sampled_from([1, 2]),
)
def test_as_onnxruntime(sizes, depth, channels, kernel, step, pads, first, second, bias, squeeze, batch, threads):
    attributes = {"strides": [step, step], "pads": pads}
    if any(n + 2 * pads[0] < k for n, k in zip(sizes, kernel)) or (pads == [0, 1, 1, 0] and min(sizes) < max(kernel)):
        return
    source = model((batch, depth, *sizes), channels, kernel, attributes, first, bias=bias, second=second, squeeze=squeeze)
    joined = compile_and_check(source, (2 if batch == "n" else batch, depth, *sizes), threads=threads)
    assert joined == (first != "Elu")


PADDED = {"pads": [1, 1, 1, 1]}


@pytest.mark.parametrize("extra", ["output", "reader"])
def test_not_when_something_else_reads_what_lies_between(extra):
    assert not compile_and_check(model((1, 8, 12, 12), 32, (3, 3), PADDED, "Relu", extra=extra), (1, 8, 12, 12), threads=1)


def test_not_when_the_image_is_symbolic():
    assert not compile_and_check(model((1, 8, "h", "w"), 32, (3, 3), PADDED, "Relu"), (1, 8, 12, 12), threads=1)


def test_not_when_it_stays_in_cache(monkeypatch):
    monkeypatch.setattr(expand, "WORTH_BYTES", 1 << 19)
    assert not compile_and_check(model((1, 8, 12, 12), 32, (3, 3), PADDED, "Relu"), (1, 8, 12, 12), threads=1)
    assert compile_and_check(model((1, 8, 80, 80), 32, (3, 3), PADDED, "Relu"), (1, 8, 80, 80), threads=1)


def test_not_when_lines_are_too_long():
    assert not compile_and_check(model((1, 2, 3, 9000), 32, (3, 3), PADDED, "Relu"), (1, 2, 3, 9000), threads=1)


def test_nan_passes_bounds():
    source = model((1, 4, 8, 8), 16, (3, 3), PADDED, "Clip")
    x = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)
    x[0, 1, 4, 4] = np.nan
    found = minicc.compile(source, threads=1).run(None, {"x": x})[0]
    plain = minicc.compile(source, threads=1, opt_level=0).run(None, {"x": x})[0]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(plain))
