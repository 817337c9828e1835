"""com.microsoft's plain operators, renamed ones and fusions: against ONNX Runtime where it has a kernel, else against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import minicc
from minicc.errors import MiniccError, ShapeError
from tests.ops.microsoft import MICROSOFT, by_numpy, check, compiled
from tests.ops.test_matmul import integers, normal

SEEDS = st.integers(0, 1 << 16)


def uniform(*shape: int, seed: int = 0, low: float = 0, high: float = 1) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).uniform(low, high, shape).astype(np.float32)


# -- renamed


@pytest.mark.parametrize("flags", range(4))
def test_transposed_product(flags: int) -> None:
    left, right = (2, 4, 3) if flags & 1 else (2, 3, 4), (5, 4) if flags & 2 else (4, 5)
    attrs = {"transA": flags & 1, "transB": flags >> 1, "alpha": 0.5}
    check("TransposeMatMul", [normal(*left), normal(*right)], attrs, free=(0,))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("indices", [[[0, 1], [2, -1]], [[[2]], [[0]]], [1, 0]])
def test_gather(dtype: type, indices: Any) -> None:
    check("GatherND", [normal(3, 4, 2), np.array(indices, dtype)], free=(0,))
    check("GatherND", [integers(np.int64, 3, 4, 2), np.array(indices, dtype)])


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [0, 1])
def test_grid_sample(mode: str, padding: str, align: int) -> None:
    attrs = {"mode": mode, "padding_mode": padding, "align_corners": align}
    check("GridSample", [normal(2, 3, 5, 6), uniform(2, 4, 3, 2, low=-1.2, high=1.2)], attrs, free=(0, 1), rtol=1e-4, atol=1e-4)


def test_grid_sample_of_an_unknown_mode() -> None:
    with pytest.raises(ShapeError, match="linear"):
        compiled("GridSample", [normal(1, 1, 2, 2), normal(1, 2, 2, 2)], {"mode": "linear"})


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize(("start", "limit", "step"), [(2, 9, 3), (9, 2, -2), (0, 4, None), (3, 3, 1)])
def test_range(dtype: type, start: int, limit: int, step: int | None) -> None:
    inputs = [None if v is None else dtype(v) for v in (start, limit, step)]
    check("Range", inputs, constants=(0, 1, 2))


def test_range_known_only_at_run_time() -> None:
    check("Range", [np.int64(1), np.int64(6), np.int64(2)], host=("Range",))


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_expand_dims(axis: int) -> None:
    check("ExpandDims", [normal(3, 4), np.int32(axis)], constants=(1,), free=(0,))


def test_expand_dims_out_of_range() -> None:
    with pytest.raises(ShapeError, match="axis 3"):
        compiled("ExpandDims", [normal(3, 4), np.int32(3)], {}, constants=(1,))


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
@pytest.mark.parametrize("row", [False, True])
@pytest.mark.parametrize("filler", [None, np.float32(2), np.array([2], np.float32)])
def test_pad(mode: str, row: bool, filler: Any) -> None:
    pads = np.array([1, 2, 0, 1], np.int64)
    check("Pad", [normal(3, 4), pads[None] if row else pads, filler], {"mode": mode}, constants=(1,), free=(0,))


def test_pad_that_cuts() -> None:
    check("Pad", [normal(3, 4), np.array([-1, 2, 0, -1], np.int64)], constants=(1,))


def channels_last(weight: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(weight, 1, -1))


@pytest.mark.parametrize("attrs", [{}, {"pads": [1, 0, 1, 2], "strides": [2, 1]}, {"group": 2, "auto_pad": "SAME_UPPER"}])
@pytest.mark.parametrize("biased", [False, True])
def test_convolution_with_channels_last(attrs: dict[str, Any], biased: bool) -> None:
    x, weight = normal(2, 7, 6, 4), normal(6, 4 // attrs.get("group", 1), 3, 2)
    bias = [normal(6)] if biased else []
    check("NhwcConv", [x, channels_last(weight), *bias], attrs, constants=(1, 2), runtime=False, free=(0,), rtol=1e-4)
    first = np.ascontiguousarray(np.moveaxis(x, -1, 1))
    found = compiled("NhwcConv", [x, channels_last(weight), *bias], attrs, constants=(1, 2))[0]
    same = by_numpy("FusedConv", [first, weight, *bias], attrs)[0]
    np.testing.assert_allclose(np.moveaxis(found, -1, 1), same, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["", "Relu", "LeakyRelu", "Clip"])
@pytest.mark.parametrize("residual", [False, True])
def test_fused_convolution_with_channels_last(activation: str, residual: bool) -> None:
    parameters: dict[str, Any] = {"LeakyRelu": [0.2], "Clip": [-0.5, 0.5]}
    attrs: dict[str, Any] = {"activation": activation, "pads": [1, 1, 1, 1], "kernel_shape": [3, 3]} if activation else {}
    if activation in parameters:
        attrs["activation_params"] = parameters[activation]
    x, weight, bias = normal(2, 7, 6, 4), normal(6, 4, 3, 3), normal(6)
    added = normal(2, 7, 6, 6) if activation else normal(2, 5, 4, 6)
    inputs = [x, weight, bias, *([added] if residual else [])]
    check("NhwcFusedConv", inputs, attrs, constants=(1, 2), runtime=False, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pads", [None, [0, 0, 0, 0], [1, 0, 1, 1]])
@pytest.mark.parametrize("attrs", [{}, {"strides": [2, 2], "output_padding": [1, 0]}, {"group": 2, "dilations": [2, 1]}])
def test_transposed_convolution(pads: list[int] | None, attrs: dict[str, Any]) -> None:
    given = None if pads is None else np.array(pads, np.int64)
    inputs = [normal(2, 4, 5, 6), normal(4, 3, 3, 2), given, normal(3 * attrs.get("group", 1))]
    attrs = {"kernel_shape": [3, 2], **attrs}
    known = pads is not None  # the schema lets the pads be left out, ONNX Runtime's kernel does not
    check("ConvTransposeWithDynamicPads", inputs, attrs, constants=(1, 2, 3), runtime=known, rtol=1e-4, atol=1e-4)
    if known:
        check("ConvTransposeWithDynamicPads", inputs, attrs, constants=(1, 3), host=("ConvTransposeWithDynamicPads",), rtol=1e-4,
              atol=1e-4)  # fmt: skip


def test_shapes_pass_through_range_and_expand_dims() -> None:
    """Positions counted up to a size known only at run time need no host."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], start=0, end=1),
        helper.make_node("Squeeze", ["shape"], ["rows"]),
        helper.make_node("Range", ["zero", "rows"], ["places"], domain=MICROSOFT),
        helper.make_node("ExpandDims", ["places", "axis"], ["column"], domain=MICROSOFT),
        helper.make_node("Cast", ["column"], ["real"], to=1),
        helper.make_node("Add", ["x", "real"], ["y"]),
    ]
    fixed = [onnx.numpy_helper.from_array(np.asarray(v), name) for v, name in ((np.int64(0), "zero"), (np.int32(1), "axis"))]
    info = helper.make_tensor_value_info("x", 1, ["n", 3])
    graph = helper.make_graph(nodes, "counting", [info], [onnx.ValueInfoProto(name="y")], fixed)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    module = minicc.compile(helper.make_model(graph, opset_imports=opsets, ir_version=10), threads=1)
    assert not module.stats()["host_nodes"]
    for rows in (1, 5):
        x = normal(rows, 3)
        np.testing.assert_array_equal(module.run(None, {"x": x})[0], x + np.arange(rows, dtype=np.float32)[:, None])


# -- plain


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_inverse(dtype: type) -> None:
    x = (normal(2, 4, 4) + 4 * np.eye(4)).astype(dtype)
    check("Inverse", [x], host=("Inverse",), rtol=1e-4, atol=1e-5)


def test_inverse_of_what_is_not_square() -> None:
    with pytest.raises(ShapeError, match="square"):
        compiled("Inverse", [normal(2, 3)], {})


@given(seed=SEEDS, metric=st.sampled_from(["euclidean", "sqeuclidean"]), double=st.booleans())
@settings(max_examples=20, deadline=None)
def test_distances(seed: int, metric: str, double: bool) -> None:
    rng = np.random.default_rng(seed)
    rows, others, columns = rng.integers(1, 9, 3).tolist()
    dtype = np.float64 if double else np.float32
    inputs = [normal(rows, columns, seed=seed).astype(dtype), normal(others, columns, seed=seed + 1).astype(dtype)]
    check("CDist", inputs, {"metric": metric}, free=(0,), rtol=1e-4, atol=1e-4)


def test_distances_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match="columns"):
        compiled("CDist", [normal(2, 3), normal(2, 4)], {})
    with pytest.raises(ShapeError, match="metric"):
        compiled("CDist", [normal(2, 3), normal(2, 3)], {"metric": "cosine"})


def test_small_distances_keep_their_digits() -> None:
    x = np.float32([[1000, 1000], [1000, 1000.0625]])
    found = compiled("CDist", [x, x], {"metric": "euclidean"})[0]
    np.testing.assert_array_equal(found, np.float32([[0, 0.0625], [0.0625, 0]]))


@pytest.mark.parametrize("op", ["ComplexMul", "ComplexMulConj"])
@pytest.mark.parametrize("shapes", [((3, 4, 2), (3, 4, 2)), ((3, 1, 2), (5, 2)), ((2,), (4, 2))])
def test_complex_products(op: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    check(op, [normal(*shapes[0]), normal(*shapes[1], seed=1)], runtime=False)


@pytest.mark.parametrize(("left", "right"), [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((4,), (2, 4, 3))])
def test_product_of_short_integers(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = integers(np.int16, *left) // np.int16(2), integers(np.int16, *right) // np.int16(2)
    check("MatMulInteger16", [a, b])
    check("MatMulInteger16", [a.astype(np.uint16) // np.uint16(4), b.astype(np.uint16) // np.uint16(4)], runtime=False)


@pytest.mark.parametrize("attrs", [{}, {"isinf_only": 1}, {"isnan_only": 1}])
@pytest.mark.parametrize("broken", [None, np.nan, np.inf, -np.inf])
def test_all_finite(attrs: dict[str, int], broken: Any) -> None:
    arrays = [normal(3, 4), normal(5), normal(1, 1)]
    if broken is not None:
        arrays[1][2] = broken
    check("IsAllFinite", arrays, attrs, runtime=False)
    check("IsAllFinite", [arrays[1].astype(np.float64)], attrs, runtime=False, free=(0,))


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(4, 5), (1, 3), (2, 1), (7, 2)])
def test_crop_and_resize(mode: str, size: tuple[int, int]) -> None:
    boxes = uniform(6, 4, low=-0.1, high=1.1)
    boxes[0], boxes[1] = [0, 0, 1, 1], [1, 1, 0, 0]
    images = np.array([0, 1, 1, 0, 1, 0], np.int32)
    inputs = [normal(2, 3, 6, 5), boxes, images, np.array(size, np.int32)]
    check("CropAndResize", inputs, {"mode": mode, "extrapolation_value": 2.5}, constants=(3,), free=(0,), atol=1e-5)


def test_crop_and_resize_to_a_size_known_only_at_run_time() -> None:
    inputs = [normal(2, 3, 6, 5), uniform(1, 4), np.array([1], np.int32), np.array([2, 3], np.int32)]
    check("CropAndResize", inputs, host=("CropAndResize",))


@given(seed=SEEDS, rank=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_masked_pool(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    shape = rng.integers(4, 7, rank).tolist()
    kernel = rng.integers(1, 4, rank).tolist()
    mask = (rng.random((1, 1, *shape)) < 0.8).astype(np.int32)
    attrs = {
        "kernel_shape": kernel, "strides": rng.integers(1, 3, rank).tolist(),
        "pads": [int(rng.integers(0, k)) for k in kernel * 2],
    }  # fmt: skip
    check("MaxpoolWithMask", [normal(2, 3, *shape, seed=seed), mask], attrs)


def test_masked_pool_of_a_mask_by_channel() -> None:
    with pytest.raises(ShapeError, match="channel"):
        compiled("MaxpoolWithMask", [normal(1, 3, 4), np.ones((1, 3, 4), np.int32)], {"kernel_shape": [2]})


def test_unique() -> None:
    x = np.array([2, 1, 1, 3, 4, 3, -1, 2], np.float32)
    check("Unique", [x], outputs=3, host=("Unique",))
    check("Unique", [np.zeros(1, np.float32)], outputs=3, host=("Unique",))


@given(seed=SEEDS, size=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_repeated_words(seed: int, size: int) -> None:
    words = np.random.default_rng(seed).integers(0, 3, (3, 7)).astype(np.int64)
    check("NGramRepeatBlock", [words, normal(3, 5, seed=seed)], {"ngram_size": size}, host=("NGramRepeatBlock",))


def test_repeated_words_outside_the_scores() -> None:
    with pytest.raises(MiniccError, match="word 7"):
        compiled("NGramRepeatBlock", [np.full((1, 4), 7), normal(1, 5)], {"ngram_size": 2}, host=("NGramRepeatBlock",))


# -- fusions


def halves(dtype: type, *arrays: np.ndarray) -> list[np.ndarray]:
    return [a.astype(dtype) for a in arrays]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bias_and_residual(dtype: type) -> None:
    check("BiasAdd", halves(dtype, normal(2, 3, 4), normal(4), normal(2, 3, 4, seed=1)), runtime=False, free=(0, 2))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_split_gelu(dtype: type) -> None:
    check("BiasSplitGelu", halves(dtype, normal(2, 3, 10), normal(10)), runtime=False, free=(0,))


def test_bias_and_softmax_of_a_larger_bias() -> None:
    with pytest.raises(ShapeError, match="broadcast"):
        compiled("BiasSoftmax", [normal(1, 6), normal(5, 6)], {"is_inner_broadcast": 0})


def test_complex_products_of_free_sizes_and_of_real_numbers() -> None:
    check("ComplexMul", [normal(2), normal(2, seed=1)], runtime=False, free=(0,))
    with pytest.raises(ShapeError, match="imaginary"):
        compiled("ComplexMul", [normal(4, 3), normal(4, 3)], {})


def test_split_gelu_of_an_odd_width() -> None:
    with pytest.raises(ShapeError, match="halves"):
        compiled("BiasSplitGelu", [normal(2, 3, 5), normal(5)], {})


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize(("bias", "inner"), [((2, 1, 1, 6), 1), ((1, 1, 5, 6), 0), ((5, 6), 0)])
def test_bias_and_softmax(axis: int, bias: tuple[int, ...], inner: int) -> None:
    check("BiasSoftmax", [normal(2, 3, 5, 6), normal(*bias)], {"axis": axis, "is_inner_broadcast": inner}, runtime=False)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_group_norm(last: int, activation: int, dtype: type) -> None:
    x = normal(2, 5, 4, 12) if last else normal(2, 12, 5, 4)
    attrs = {"activation": activation, "channels_last": last, "groups": 3, "epsilon": 1e-4}
    inputs = [x.astype(dtype), normal(12), normal(12, seed=1)]
    check("GroupNorm", inputs, attrs, runtime=False, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("skip", ["whole", "flat", "spread"])
@pytest.mark.parametrize("biased", [False, True])
def test_group_norm_of_a_sum(last: int, skip: str, biased: bool) -> None:
    shape = (2, 5, 4, 12) if last else (2, 12, 5, 4)
    spread = (2, 1, 1, 12) if last else (2, 12, 1, 1)
    other = normal(*{"whole": shape, "flat": (2, 12), "spread": spread}[skip], seed=1)
    attrs = {"activation": 1, "channels_last": last, "groups": 4}
    inputs = [normal(*shape), normal(12), normal(12, seed=1), other, *([normal(12, seed=2)] if biased else [])]
    check("SkipGroupNorm", inputs, attrs, outputs=2, runtime=False, rtol=1e-4, atol=1e-4)


def test_group_norm_that_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="groups"):
        compiled("GroupNorm", [normal(1, 2, 2, 4), normal(4), normal(4)], {"activation": 0, "groups": 3})


def test_rotation_of_queries_and_keys() -> None:
    sides = halves(np.float16, *(normal(2, 3, 5, 8, seed=s) for s in range(4)))
    check("GemmaRotaryEmbedding", [uniform(2, 5, 8, high=6), *sides], outputs=2, runtime=False)
