"""com.microsoft's plain operators: distances, complex products, crops of images, pooling under a mask, and a few on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product as cartesian
from typing import Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.dims import Dim, maximum, product
from minicc.ir.graph import Builder, Node, Value
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import DType, TensorType, boolean, f32, i16, i32, i64, u16, u32
from minicc.ops.helpers import (
    Array,
    as_dim,
    broadcast_shape,
    computed_in_f32,
    default_refuse,
    elements,
    require_same_dtype,
    same_as_float_input,
    unknown_dims,
)
from minicc.ops.matmul import matmul_shape
from minicc.ops.norm import axes_of, required, reshaped
from minicc.ops.pool import POOL_ATTRS, pool_type, pool_window

_DOMAIN = "com.microsoft"


# -- Inverse, on the host


def _inverse_infer(n: Inference) -> list[TensorType]:
    x = n.shape(0)
    if len(x) < 2 or (x[-1] != x[-2] and all(isinstance(d, int) for d in x[-2:])):
        raise n.error("needs square matrices")
    return same_as_float_input(n)  # type: ignore[return-value]


register(OpDef(
    "Inverse", Kind.HOST, infer=_inverse_infer, eval=computed_in_f32(lambda x: np.linalg.inv(x).astype(x.dtype)), domain=_DOMAIN,
))  # fmt: skip


# -- CDist: distances of all rows of one matrix from all rows of another


def _distance_infer(n: Inference) -> list[TensorType]:
    a, b = n.shape(0), n.shape(1)
    if n.attr("metric") not in ("euclidean", "sqeuclidean"):
        raise n.error(f"metric {n.attr('metric')!r} is unknown")
    if len(a) != 2 or len(b) != 2 or (a[1] != b[1] and isinstance(a[1], int) and isinstance(b[1], int)):
        raise n.error("needs two matrices with the same number of columns")
    return [TensorType(require_same_dtype(n), (a[0], b[0]))]


def _distance_expand(b: Builder, node: Node) -> list[Value]:
    """By differences: the product of the matrices, which would be faster, loses the digits of small distances."""
    left, right = required(node, 0), required(node, 1)
    apart = b.op("Sub", reshaped(b, left, (left.shape[0], 1, left.shape[1])), right)
    squares = b.op("ReduceSum", b.op("Mul", apart, apart), axes_of(b, [2]), keepdims=0)
    return [b.op("Sqrt", squares) if node.attrs["metric"] == "euclidean" else squares]


def _distance_eval(a: Array, b: Array, *, metric: str) -> Array:
    squares = np.stack([((row - b) ** 2).sum(axis=1) for row in a]) if len(a) else np.zeros((0, len(b)), a.dtype)
    return np.asarray(np.sqrt(squares) if metric == "euclidean" else squares).astype(a.dtype)


register(OpDef(
    "CDist", Kind.EXPAND, infer=_distance_infer, eval=_distance_eval, expand=_distance_expand, refuse=default_refuse,
    attrs={"metric": "sqeuclidean"}, domain=_DOMAIN,
))  # fmt: skip


# -- ComplexMul, ComplexMulConj: the last axis holds real and imaginary part


def _complex_infer(n: Inference) -> list[TensorType]:
    lasts = [n.shape(i)[-1:] for i in (0, 1)]
    if any(not last or (isinstance(last[0], int) and last[0] != 2) for last in lasts):
        raise n.error("the last axis must hold a real and an imaginary part")
    shape = broadcast_shape(n)
    assert shape is not None
    return [TensorType(require_same_dtype(n), (*shape[:-1], 2))]


def _complex_expand(b: Builder, node: Node) -> list[Value]:
    operands = [reshaped(b, required(node, i), (*required(node, i).shape[:-1], 2)) for i in (0, 1)]
    a_real, a_imaginary, b_real, b_imaginary = (
        b.op("Gather", x, b.constant(np.array([part])), axis=-1) for x in operands for part in (0, 1)
    )
    if node.op.name == "ComplexMulConj":
        b_imaginary = b.op("Neg", b_imaginary)
    real = b.op("Sub", b.op("Mul", a_real, b_real), b.op("Mul", a_imaginary, b_imaginary))
    imaginary = b.op("Add", b.op("Mul", a_real, b_imaginary), b.op("Mul", a_imaginary, b_real))
    return [b.op("Concat", real, imaginary, axis=-1)]


def _complex_product(a: Array, b: Array, *, conjugate: bool) -> Array:
    left, right = (x[..., 0].astype(np.float64) + 1j * x[..., 1] for x in (a, b))
    found = left * (right.conj() if conjugate else right)
    return np.stack([found.real, found.imag], axis=-1).astype(a.dtype)


register(OpDef(
    "ComplexMul", Kind.EXPAND, infer=_complex_infer, expand=_complex_expand, refuse=default_refuse, domain=_DOMAIN,
    eval=lambda a, b: _complex_product(a, b, conjugate=False),
))  # fmt: skip
register(OpDef(
    "ComplexMulConj", Kind.EXPAND, infer=_complex_infer, expand=_complex_expand, refuse=default_refuse, domain=_DOMAIN,
    eval=lambda a, b: _complex_product(a, b, conjugate=True),
))  # fmt: skip


# -- MatMulInteger16: sums of 32 bits, which may overflow


def _wide_integer(dtypes: Sequence[DType]) -> DType:
    return u32 if all(d == u16 for d in dtypes) else i32


def _integer_infer(n: Inference) -> list[TensorType]:
    dtypes = [n.dtype(0), n.dtype(1)]
    if any(d not in (i16, u16) for d in dtypes):
        raise n.error("needs integers of 16 bits")
    return [TensorType(_wide_integer(dtypes), matmul_shape(n, n.shape(0), n.shape(1)))]


def _integer_expand(b: Builder, node: Node) -> list[Value]:
    dtype = node.output.tensor.dtype
    return [b.op("MatMul", *(b.op("Cast", required(node, i), to=dtype) for i in (0, 1)))]


def _integer_eval(a: Array, b: Array) -> Array:
    total = np.matmul(a.astype(np.int64), b.astype(np.int64))
    return np.asarray(total).astype(np.uint32 if a.dtype == b.dtype == np.uint16 else np.int32)


register(OpDef(
    "MatMulInteger16", Kind.EXPAND, infer=_integer_infer, eval=_integer_eval, expand=_integer_expand, refuse=default_refuse,
    domain=_DOMAIN,
))  # fmt: skip


# -- IsAllFinite: one answer for all the inputs


def _finite_infer(n: Inference) -> list[TensorType]:
    if n.attr("isinf_only") and n.attr("isnan_only"):
        raise n.error("isinf_only and isnan_only exclude each other")
    if any(not n.dtype(i).is_float for i in range(len(n.inputs))):
        raise n.error("needs a float element type")
    return [TensorType(boolean, ())]


def _finite_expand(b: Builder, node: Node) -> list[Value]:
    answer: Value | None = None
    for x in node.inputs:
        assert x is not None
        found = [b.op(name, x) for name, other in (("IsNaN", "isinf_only"), ("IsInf", "isnan_only")) if not node.attrs[other]]
        bad = found[0] if len(found) == 1 else b.op("Or", *found)
        count = b.op("ReduceSum", b.op("Cast", bad, to=i64), keepdims=0)
        none = b.op("Equal", count, b.constant(np.int64(0)))
        answer = none if answer is None else b.op("And", answer, none)
    assert answer is not None
    return [answer]


def _finite_eval(*arrays: Array, isinf_only: int, isnan_only: int) -> Array:
    wide = [a.astype(np.float64) for a in arrays]
    nan, infinite = (any(bool(test(a).any()) for a in wide) for test in (np.isnan, np.isinf))
    return np.array(not ((nan and not isinf_only) or (infinite and not isnan_only)))


register(OpDef(
    "IsAllFinite", Kind.EXPAND, infer=_finite_infer, eval=_finite_eval, expand=_finite_expand, refuse=default_refuse,
    attrs={"isinf_only": 0, "isnan_only": 0}, domain=_DOMAIN,
))  # fmt: skip


# -- CropAndResize: boxes (top, left, bottom, right, from 0 to 1) of images, sampled at the corners of a grid


def _crop_infer(n: Inference) -> list[TensorType]:
    x, boxes = n.shape(0), n.shape(1)
    if len(x) != 4 or len(boxes) != 2 or (isinstance(boxes[1], int) and boxes[1] != 4):
        raise n.error("needs images of rank 4 and boxes of four numbers")
    if n.attr("mode") not in ("bilinear", "nearest"):
        raise n.error(f"mode {n.attr('mode')!r} is unknown")
    content = n.content(3)
    size: Sequence[Any] = unknown_dims(n, 2) if content is None else [as_dim(v) for v in elements(content)]
    if len(size) != 2 or any(d is None or (isinstance(d, int) and d < 1) for d in size):
        raise n.error("the size of a crop must be two positive numbers")
    return [TensorType(n.dtype(0), (boxes[0], x[1], *size))]


def _crop_positions(b: Builder, boxes: Value, axis: int, size: Dim, points: Dim) -> tuple[Value, Value]:
    """(positions in pixels [boxes, points], whether they lie inside) along one axis."""

    def number(dim: Dim) -> Value:
        return b.op("Cast", b.op("Reshape", b.shape([dim]), b.shape([])), to=f32)

    low, high = (b.op("Gather", boxes, b.constant(np.array([axis + 2 * i])), axis=1) for i in (0, 1))
    last = number(size - 1)
    if points == 1:
        where = b.op("Mul", b.op("Mul", b.op("Add", low, high), b.constant(np.float32(0.5))), last)
    else:
        ends = (b.constant(np.int64(0)), b.op("Reshape", b.shape([points]), b.shape([])), b.constant(np.int64(1)))
        steps = b.op("Cast", b.op("Range", *ends), to=f32)
        pace = b.op("Div", b.op("Mul", b.op("Sub", high, low), last), number(points - 1))
        where = b.op("Add", b.op("Mul", low, last), b.op("Mul", pace, steps))
        # The last point is the end itself, which the sum of the steps may miss by a rounding and so leave the image.
        where = b.op("Where", b.op("Equal", steps, number(points - 1)), b.op("Mul", high, last), where)
    inside = b.op("And", b.op("GreaterOrEqual", where, b.constant(np.float32(0))), b.op("LessOrEqual", where, last))
    return b.op("Clip", where, b.constant(np.float32(0)), last), inside


def _crop_expand(b: Builder, node: Node) -> list[Value]:
    """Corners are gathered by their indices: the coordinates of GridSample, from -1 to 1, would round the positions."""
    x, boxes, images = (required(node, i) for i in range(3))
    count, _, height, width = node.output.shape
    (y, y_inside), (z, z_inside) = (
        _crop_positions(b, boxes, axis, x.shape[2 + axis], points) for axis, points in enumerate((height, width))
    )
    rows = b.op("Transpose", x, perm=[0, 2, 3, 1])
    where = b.op("Cast", reshaped(b, images, (count, 1, 1, 1)), to=i64)
    y, y_inside = (reshaped(b, v, (count, height, 1, 1)) for v in (y, y_inside))
    z, z_inside = (reshaped(b, v, (count, 1, width, 1)) for v in (z, z_inside))

    def pixels(top: Value, left: Value) -> Value:
        shape = b.shape([count, height, width, 1])
        parts = [b.op("Expand", b.op("Cast", v, to=i64), shape) for v in (where, top, left)]
        return b.op("GatherND", rows, b.op("Concat", *parts, axis=3))

    if node.attrs["mode"] == "nearest":
        half = b.constant(np.float32(0.5))
        found = pixels(*(b.op("Floor", b.op("Add", v, half)) for v in (y, z)))
    else:
        top, bottom, left, right = (b.op(name, v) for v in (y, z) for name in ("Floor", "Ceil"))
        down, across = b.op("Sub", y, top), b.op("Sub", z, left)
        lines = []
        for line in (top, bottom):
            first = pixels(line, left)
            lines.append(b.op("Add", first, b.op("Mul", b.op("Sub", pixels(line, right), first), across)))
        found = b.op("Add", lines[0], b.op("Mul", b.op("Sub", lines[1], lines[0]), down))
    outside = b.constant(np.float32(node.attrs["extrapolation_value"]))
    return [b.op("Transpose", b.op("Where", b.op("And", y_inside, z_inside), found, outside), perm=[0, 3, 1, 2])]


def _crop_refuse(node: Node) -> str | None:
    return default_refuse(node) or (None if node.output.tensor.dtype == f32 else "element types other than float32")


def _crop_eval(
    x: Array, boxes: Array, images: Array, crop_size: Array, *, extrapolation_value: float, mode: str
) -> Array:
    height, width = (int(v) for v in crop_size)
    out = np.full((len(boxes), x.shape[1], height, width), extrapolation_value, x.dtype)
    for number, (top, left, bottom, right) in enumerate(boxes):
        image = x[images[number]]
        for i, j in np.ndindex(height, width):
            y, z = (
                _crop_position(*pair, step, points, size)
                for pair, step, points, size in (
                    ((top, bottom), i, height, x.shape[2]), ((left, right), j, width, x.shape[3]),
                )
            )  # fmt: skip
            if not (0 <= y <= x.shape[2] - 1 and 0 <= z <= x.shape[3] - 1):
                continue
            if mode == "nearest":
                out[number, :, i, j] = image[:, int(y + np.float32(0.5)), int(z + np.float32(0.5))]
                continue
            low, high, first, last = (int(f(v)) for v in (y, z) for f in (np.floor, np.ceil))
            above, below = (
                image[:, line, first] + (image[:, line, last] - image[:, line, first]) * (z - first) for line in (low, high)
            )
            out[number, :, i, j] = above + (below - above) * (y - low)
    return out


def _crop_position(start: Any, stop: Any, step: int, points: int, size: int) -> Any:
    if points == 1:
        return (start + stop) * start.dtype.type(0.5) * (size - 1)
    if step == points - 1:
        return stop * (size - 1)
    return start * (size - 1) + step * ((stop - start) * (size - 1) / (points - 1))


register(OpDef(
    "CropAndResize", Kind.EXPAND, infer=_crop_infer, eval=_crop_eval, expand=_crop_expand, refuse=_crop_refuse,
    attrs={"extrapolation_value": 0.0, "mode": "bilinear"}, static_inputs=(3,), domain=_DOMAIN,
))  # fmt: skip


# -- MaxpoolWithMask: along the last axis, a window ends at the first element that is masked

_MOST_TAPS = 64  # more would make too many operators of one
_LOWEST = np.finfo(np.float32).min  # the result of a window without elements


def _masked_pool_attrs(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {**attrs, "ceil_mode": 0, "dilations": None, "layout": "NCHW"}


def _masked_pool_infer(n: Inference) -> list[TensorType]:
    x, mask = n.shape(0), n.shape(1)
    if len(mask) != len(x) or any(isinstance(m, int) and isinstance(d, int) and m != d for m, d in zip(mask[2:], x[2:])):
        raise n.error("the mask must have the rank and the spatial sizes of the input")
    if any(isinstance(d, int) and d != 1 for d in mask[:2]):
        raise n.error("a mask that differs by image or channel is not supported")
    return [pool_type(replace(n, attrs=_masked_pool_attrs(n.attrs)))]


def _masked_pool_refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is None and int(np.prod(node.attrs["kernel_shape"])) > _MOST_TAPS:
        return f"a window of more than {_MOST_TAPS} elements"
    if reason is None and required(node, 1).shape[:2] != (1, 1):
        return "a mask that may differ by image or channel"
    return reason


def _first_allowed(b: Builder, mask: Value) -> Value:
    """ONNX Runtime never asks the mask about the first element, except over one axis."""
    if mask.tensor.rank == 3:
        return mask
    size = product(mask.shape)
    rest = b.op("Slice", reshaped(b, mask, (size,)), b.shape([1]), b.shape([size]), b.shape([0]))
    return reshaped(b, b.op("Concat", b.constant(np.ones(1, np.int32)), rest, axis=0), mask.shape)


def _masked_pool_expand(b: Builder, node: Node) -> list[Value]:
    x, mask = required(node, 0), required(node, 1)
    w = pool_window(_masked_pool_attrs(node.attrs), x.shape)
    allowed = b.op("Cast", b.op("Cast", _first_allowed(b, mask), to=boolean), to=i32)
    reach = [(w.output[a] - 1) * w.strides[a] + w.kernel[a] for a in range(w.rank)]
    ends = [maximum(reach[a] - x.shape[2 + a] - w.begin[a], 0) for a in range(w.rank)]
    pads = b.shape([0, 0, *w.begin, 0, 0, *ends])
    lowest = b.constant(_LOWEST)
    x, allowed = b.op("Pad", x, pads, lowest), b.op("Pad", allowed, pads, b.constant(np.int32(1)))

    def under(value: Value, taps: Sequence[int]) -> Value:
        stops = [tap + (w.output[a] - 1) * w.strides[a] + 1 for a, tap in enumerate(taps)]
        return b.op("Slice", value, b.shape(taps), b.shape(stops), b.shape(range(2, 2 + w.rank)), b.shape(w.strides))

    best: Value | None = None
    for line in cartesian(*map(range, w.kernel[:-1])):
        reached: Value | None = None
        for last in range(w.kernel[-1]):
            here = under(allowed, (*line, last))
            reached = here if reached is None else b.op("Min", reached, here)
            value = b.op("Where", b.op("Cast", reached, to=boolean), under(x, (*line, last)), lowest)
            best = value if best is None else b.op("Max", best, value)
    assert best is not None
    return [best]


def _masked_pool_eval(x: Array, mask: Array, **attrs: Any) -> Array:
    if mask.shape[:2] != (1, 1):
        raise ShapeError("MaxpoolWithMask: a mask that differs by image or channel is not supported")
    w = pool_window(_masked_pool_attrs(attrs), x.shape)
    out = np.full((*x.shape[:2], *w.output), _LOWEST, x.dtype)
    for position in np.ndindex(*w.output):
        starts = [p * s - begin for p, s, begin in zip(position, w.strides, w.begin)]
        spans = [range(max(s, 0), min(s + k, size)) for s, k, size in zip(starts, w.kernel, x.shape[2:])]
        for line in cartesian(*spans[:-1]):
            for last in spans[-1]:
                place = (*line, last)
                if mask[(0, 0, *place)] == 0 and (w.rank == 1 or any(place)):
                    break
                spot: tuple[Any, ...] = (..., *position)
                seen: tuple[Any, ...] = (..., *place)
                out[spot] = np.maximum(out[spot], x[seen])
    return out


register(OpDef(
    "MaxpoolWithMask", Kind.EXPAND, infer=_masked_pool_infer, eval=_masked_pool_eval, expand=_masked_pool_expand,
    refuse=_masked_pool_refuse, domain=_DOMAIN,
    attrs={**{k: v for k, v in POOL_ATTRS.items() if k not in ("ceil_mode", "dilations", "layout")}, "storage_order": 0},
))  # fmt: skip


# -- on the host: Unique, whose values keep the order in which they come first; NGramRepeatBlock


def _unique_infer(n: Inference) -> list[TensorType]:
    shape = n.shape(0)
    if len(shape) != 1:
        raise n.error("needs a vector")
    count = n.fresh("unique")
    return [n.type(0).with_shape((count,)), TensorType(i64, shape), TensorType(i64, (count,))]


def _unique_eval(x: Array) -> tuple[Array, Array, Array]:
    places: dict[Any, int] = {}
    where = np.array([places.setdefault(v, len(places)) for v in x.tolist()], np.int64)
    values = np.array(list(places), x.dtype)
    return values, where, np.bincount(where, minlength=len(places)).astype(np.int64)


register(OpDef("Unique", Kind.HOST, infer=_unique_infer, eval=_unique_eval, domain=_DOMAIN))


def _repeat_infer(n: Inference) -> list[TensorType]:
    if n.attr("ngram_size") < 1:
        raise n.error("ngram_size must be positive")
    if n.rank(0) != 2 or n.rank(1) != 2:
        raise n.error("needs words and scores of rank 2")
    return [n.type(1)]


def _repeat_eval(words: Array, scores: Array, *, ngram_size: int) -> Array:
    """A score becomes -inf where its word after the last ngram_size - 1 words would repeat ngram_size words."""
    out, length = scores.copy(), words.shape[1]
    head = ngram_size - 1
    for row in range(len(words)):
        for start in range(length - head):
            if np.array_equal(words[row, start : start + head], words[row, length - head :]):
                word = int(words[row, start + head])
                if not 0 <= word < scores.shape[1]:
                    raise ShapeError(f"NGramRepeatBlock: word {word} of {scores.shape[1]}")
                out[row, word] = -np.inf
    return out


register(OpDef(
    "NGramRepeatBlock", Kind.HOST, infer=_repeat_infer, eval=_repeat_eval, attrs={"ngram_size": REQUIRED}, domain=_DOMAIN,
))  # fmt: skip
