"""Convolutions of few input channels in whole models: against ONNX Runtime, without a copy of the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import minicc
from tests.compiling import saved_and_loaded
from tests.passes.models import run_reference

ACTIVATIONS = ["", "Relu", "HardSwish", "Clip"]


def model(image: tuple[int | str, ...], filters: int, kernel: tuple[int, int], attributes: dict[str, Any], activation: str,
          before: list[Any] | None = None) -> Any:  # fmt: skip
    """Conv of a constant weight and bias, an activation and a pooling that makes channels last worth it."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((filters, image[1], *kernel)), "b": rng.standard_normal(filters),
        "low": np.array(0.0), "high": np.array(6.0),
    }  # fmt: skip
    nodes = list(before or [])
    nodes.append(helper.make_node("Conv", ["t" if before else "x", "w", "b"], ["c"], **attributes))
    extra = ["low", "high"] if activation == "Clip" else []
    nodes.append(helper.make_node(activation or "Identity", ["c", *extra], ["a"]))
    nodes.append(helper.make_node("Conv", ["a", "v"], ["y"]))
    constants["v"] = rng.standard_normal((8, filters, 1, 1))
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", image), ("y", None))]
    weights = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "few", ports[:1], ports[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def check(source: Any, shape: tuple[int, ...], **options: Any) -> Any:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    module = minicc.compile(source, **options)
    assert saved_and_loaded(module.program).kernels == module.program.kernels
    found, expected = module.run(None, {"x": x})[0], run_reference(source, {"x": x})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))
    return module


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.integers(5, 20), st.integers(5, 40)),
    channels=st.sampled_from([1, 3, 4]),
    filters=st.sampled_from([8, 16, 24]),
    kernel=st.tuples(st.integers(1, 3), st.sampled_from([2, 3, 5])),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    activation=st.sampled_from(ACTIVATIONS),
    symbolic=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_as_onnxruntime(sizes, channels, filters, kernel, strides, pads, activation, symbolic, threads):
    shape: tuple[int | str, ...] = ("n", channels, "h", "w") if symbolic else (2, channels, *sizes)
    source = model(shape, filters, kernel, {"strides": strides, "pads": pads}, activation)
    check(source, (2, channels, *sizes), threads=threads)


@pytest.mark.parametrize("opt_level", [0, 1, 2])
def test_the_image_is_read_as_it_lies(opt_level):
    source = model((1, 3, 32, 40), 16, (3, 3), {"strides": [2, 2], "pads": [1, 1, 1, 1]}, "HardSwish")
    module = check(source, (1, 3, 32, 40), threads=1, opt_level=opt_level)
    first = next(step for step in module.program.steps if module.program.kernels[step.kernel].name.startswith("conv_few"))
    assert set(module.program.inputs) & set(first.reads)


def test_an_image_with_other_gaps_is_still_right():
    """Every second column of planes: neither form of line is contiguous, so the image is copied."""
    before = [helper.make_node("Slice", ["x", "starts", "ends", "axes", "steps"], ["t"])]
    source = model((1, 3, 20, 40), 16, (3, 3), {"strides": [2, 2]}, "Relu", before)
    for name, value in (("starts", 0), ("ends", 40), ("axes", 3), ("steps", 2)):
        source.graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    check(source, (1, 3, 20, 40), threads=1)
