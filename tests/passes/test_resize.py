"""resize-by-axis: the same numbers as the whole operator's, and only where it is legal and worth it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.options import Options
from minicc.passes.manager import Pass
from minicc.passes.resize import resize_by_axis
from tests.passes.models import apply, ops


def model(shape, factors, *, by_size=False, **attributes):
    """Resize of x by a factor for each axis."""
    name, values = "scales", np.array(factors, np.float32)
    if by_size:
        name, values = "sizes", np.array([round(n * f) for n, f in zip(shape, factors)], np.int64)
    inputs = ["x", "", name] if not by_size else ["x", "", "", name]
    node = helper.make_node("Resize", inputs, ["y"], **attributes)
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None))]
    graph = helper.make_graph([node], "resize", ports[:1], ports[1:], [numpy_helper.from_array(values, name)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def split(source) -> int:
    graph = load_model(source, Options()).graph
    apply(graph, Pass("resize-by-axis", resize_by_axis))
    return ops(graph)["Resize"]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 7), st.integers(1, 9)),
    factors=st.tuples(st.sampled_from([2.0, 3.0, 2.5]), st.sampled_from([2.0, 4.0, 2.2])),
    mode=st.sampled_from(["linear", "cubic"]),
    coordinates=st.sampled_from(["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]),
    by_size=st.booleans(),
)
def test_numbers(shape, factors, mode, coordinates, by_size):
    source = model(shape, (1.0, 1.0, *factors), by_size=by_size, mode=mode, coordinate_transformation_mode=coordinates)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = minicc.compile(source, threads=1).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, evaluate(load_model(source, Options()).graph, [x])[0], rtol=1e-4, atol=1e-5)


def test_one_resize_for_each_axis():
    assert split(model((1, 3, 8, 8), (1, 1, 2, 4), mode="linear")) == 2
    assert split(model((1, 3, 8, 8), (1, 1, 2, 4), mode="linear", by_size=True)) == 2


@pytest.mark.parametrize(
    ("shape", "factors", "attributes"),
    [
        ((1, 3, 8, 8), (1, 1, 1, 4), {"mode": "linear"}),  # one axis
        ((1, 3, 8, 8), (1, 1, 1.5, 4), {"mode": "linear"}),  # large between
        ((1, 8, 8, 64), (1, 2, 2, 1), {"mode": "linear"}),  # long runs
        ((1, 3, 8, 8), (1, 1, 2, 2), {"mode": "nearest"}),
    ],
)
def test_left_whole(shape, factors, attributes):
    assert split(model(shape, factors, **attributes)) == 1
