"""Convolutions: ONNX's cases, ONNX Runtime for random attributes, both layouts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minicc.errors import MiniccError
from minicc.ir.dims import evaluate, symbol
from minicc.ir.graph import Graph
from minicc.ir.opdef import get_op
from minicc.ir.types import TensorType, f32
from tests.ops.onnx_cases import Case, cases_of, check_call, check_case
from tests.ops.runtime_oracle import check_against_onnxruntime
from tests.ops.test_matmul import integers, normal

OPS = ["Conv", "ConvTranspose", "ConvInteger", "DeformConv"]


@pytest.mark.parametrize("case", cases_of(*OPS), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    check_case(case)


@st.composite
def geometries(draw: st.DrawFn, *, same_dilations: bool = False) -> tuple[list[int], dict[str, object]]:
    """Spatial sizes and window attributes that fit them."""
    rank = draw(st.sampled_from([1, 2, 2, 3]))
    each = {"min_size": rank, "max_size": rank}
    sizes = draw(st.lists(st.integers(3, 8), **each))
    kernel = draw(st.lists(st.integers(1, 3), **each))
    attrs: dict[str, object] = {"kernel_shape": kernel, "strides": draw(st.lists(st.integers(1, 3), **each))}
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    dilations = draw(st.lists(st.integers(1, 2), **each))
    # ONNX Runtime refuses (convolutions) or ignores (pooling) dilations together with SAME paddings.
    attrs["dilations"] = [1] * rank if auto.startswith("SAME") or same_dilations else dilations
    if auto == "NOTSET":
        attrs["pads"] = draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
        attrs["pads"] = [min(p, kernel[i % rank] - 1) for i, p in enumerate(attrs["pads"])]
    else:
        attrs["auto_pad"] = auto
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, attrs["dilations"])]
    assume(all(s <= n for s, n in zip(spans, sizes)))
    # A kernel smaller than its stride would need negative SAME paddings: ONNX Runtime crops or fails.
    assume(not auto.startswith("SAME") or all(k >= s for k, s in zip(kernel, attrs["strides"])))
    return sizes, attrs


@given(geometries(), st.sampled_from([(4, 4, 1), (4, 8, 2), (4, 4, 4), (2, 4, 2)]))
@settings(max_examples=60, deadline=None)
def test_conv_as_onnxruntime(
    geometry: tuple[list[int], dict[str, object]], channels: tuple[int, int, int]
) -> None:
    sizes, attrs = geometry
    c, m, group = channels
    inputs = [normal(2, c, *sizes), normal(m, c // group, *attrs["kernel_shape"]), normal(m)]
    check_against_onnxruntime("Conv", inputs, {**attrs, "group": group}, rtol=1e-4, atol=1e-4)


@given(geometries(), st.sampled_from([(4, 4, 1), (4, 8, 2), (4, 4, 4)]))
@settings(max_examples=40, deadline=None)
def test_conv_transpose_as_onnxruntime(
    geometry: tuple[list[int], dict[str, object]], channels: tuple[int, int, int]
) -> None:
    sizes, attrs = geometry
    c, m, group = channels
    inputs = [normal(2, c, *sizes), normal(c, m // group, *attrs["kernel_shape"]), normal(m)]
    check_against_onnxruntime("ConvTranspose", inputs, {**attrs, "group": group}, rtol=1e-4, atol=1e-4)


@given(geometries(), st.sampled_from(["Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"]))
@settings(max_examples=40, deadline=None)
def test_channels_last_is_a_permutation(geometry: tuple[list[int], dict[str, object]], op: str) -> None:
    sizes, attrs = geometry
    x = normal(2, 4, *sizes)
    weights = [normal(4, 4, *attrs["kernel_shape"]), normal(4)] if op.startswith("Conv") else []
    definition = get_op(op)
    expected = definition.eval(x, *weights, **{**definition.attrs, **attrs})
    expected = expected[0] if isinstance(expected, tuple) else expected
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    check_call(
        op,
        [last, *weights],
        {**attrs, "layout": "NHWC"},
        [np.ascontiguousarray(np.moveaxis(expected, 1, -1))],
        rtol=1e-4,
        atol=1e-4,
    )


def test_conv_integer_with_zero_points() -> None:
    inputs = [integers(np.uint8, 1, 4, 6, 6), integers(np.uint8, 4, 2, 3, 3), np.uint8(7), np.uint8(9)]
    check_against_onnxruntime("ConvInteger", inputs, {"group": 2, "pads": [1, 0, 1, 2]}, constants=(3,))


@pytest.mark.parametrize(
    "attrs", [{"activation": "Relu"}, {"activation": "Clip", "activation_params": [-0.5, 1.0]}]
)
def test_fused_conv(attrs: dict[str, object]) -> None:
    inputs = [normal(1, 4, 6, 6), normal(3, 4, 3, 3), normal(3), normal(1, 3, 4, 4)]
    check_against_onnxruntime("FusedConv", inputs, {**attrs, "kernel_shape": [3, 3]}, domain="com.microsoft")


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_symbolic_sizes_give_the_static_ones(auto_pad: str, stride: int) -> None:
    attrs = {"auto_pad": auto_pad, "strides": [stride, stride], "kernel_shape": [3, 3]}
    attrs |= {"pads": [1, 1, 0, 1]} if auto_pad == "NOTSET" else {}
    weight = TensorType(f32, (5, 4, 3, 3))
    graph = Graph()
    for op, w in (
        ("Conv", [graph.input("w", weight)]),
        ("MaxPool", []),
        ("ConvTranspose", [graph.input("v", TensorType(f32, (4, 5, 3, 3)))]),
    ):
        symbolic = graph.add(
            op, [graph.input("x", TensorType(f32, (symbol("n"), 4, symbol("h"), symbol("w")))), *w], attrs
        ).output
        for h, width in ((7, 12), (8, 9), (13, 5)):
            static = graph.add(op, [graph.input("y", TensorType(f32, (2, 4, h, width))), *w], attrs).output
            sizes = {"n": 2, "h": h, "w": width}
            assert tuple(evaluate(d, sizes) for d in symbolic.shape) == static.shape


@pytest.mark.parametrize(
    ("x", "w", "attrs"),
    [
        ((1, 3, 5, 5), (2, 4, 3, 3), {}),
        ((1, 4, 2, 2), (2, 4, 3, 3), {}),
        ((1, 4, 5, 5), (3, 2, 3, 3), {"group": 2}),
        ((1, 4, 5), (2, 4, 3, 3), {}),
        ((1, 4, 5, 5), (2, 4, 3, 3), {"strides": [0, 1]}),
        ((1, 4, 5, 5), (2, 4, 3, 3), {"pads": [1]}),
    ],
)
def test_conv_that_does_not_fit(x: tuple[int, ...], w: tuple[int, ...], attrs: dict[str, object]) -> None:
    graph = Graph()
    with pytest.raises(MiniccError, match="Conv"):
        graph.add("Conv", [graph.input("x", TensorType(f32, x)), graph.input("w", TensorType(f32, w))], attrs)
