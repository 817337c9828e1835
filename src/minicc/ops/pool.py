"""Pooling: MaxPool, AveragePool, LpPool, their global forms, MaxUnpool and MaxRoiPool.

Activations are [N, C, *spatial], or [N, *spatial, C] with layout="NHWC" for the windowed ops. RoiAlign is in
`resize`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.dims import Dim, product
from minicc.ir.expr import Expr, binary, cast, const, dim, select, unary
from minicc.ir.expr import maximum as expr_maximum
from minicc.ir.expr import minimum as expr_minimum
from minicc.ir.opdef import REQUIRED, Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import DType, TensorType, i64
from minicc.ops.conv import split_index, wide_dtype
from minicc.ops.helpers import Array, computed_in_f32, default_refuse
from minicc.ops.spatial import (
    Window,
    activation_shape,
    all_of,
    channel_axis,
    from_channels_first,
    spatial_axes,
    tap_position,
    to_channels_first,
    window,
    windows_view,
)

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

POOL_ATTRS: dict[str, Any] = {
    "auto_pad": "NOTSET",
    "ceil_mode": 0,
    "dilations": None,
    "kernel_shape": REQUIRED,
    "pads": None,
    "strides": None,
    "layout": "NCHW",
}


def pool_window(attrs: Mapping[str, Any], x: Sequence[Dim]) -> Window:
    """The window of a pooling op over an activation of shape `x`."""
    return window(attrs, attrs["kernel_shape"], [x[a] for a in spatial_axes(attrs["layout"], len(x))])


def pool_type(n: Inference) -> TensorType:
    """The result type of a windowed pooling op."""
    x, layout = n.shape(0), n.attr("layout")
    if len(x) < 3:
        raise n.error("needs a batch, a channel and at least one spatial axis")
    try:
        geometry = pool_window(n.attrs, x)
    except ShapeError as error:
        raise n.error(error.what) from error
    return TensorType(
        n.dtype(0), activation_shape(layout, x[0], x[channel_axis(layout, len(x))], geometry.output)
    )


def _needs_clamp(w: Window, attrs: Mapping[str, Any]) -> Window:
    """The window with padding marked where a rounded-up output size makes taps leave the input."""
    if not attrs["ceil_mode"]:
        return w
    return Window(
        w.kernel,
        w.strides,
        w.dilations,
        w.begin,
        tuple(e if e != 0 else w.strides[a] for a, e in enumerate(w.end)),
        w.output,
    )


def _tap(
    c: Indexing, index: tuple[Expr, ...], attrs: Mapping[str, Any], taps: Sequence[Expr]
) -> tuple[Expr, Expr | None, list[Expr]]:
    """(element under the taps, condition that it is inside, its spatial position) for an output index."""
    x, layout = c.type(0).dims, attrs["layout"]
    geometry = _needs_clamp(pool_window(attrs, x), attrs)
    batch, channel, positions = split_index(layout, index)
    sizes = [x[a] for a in spatial_axes(layout, len(x))]
    found = [tap_position(geometry, a, p, t, sizes[a]) for a, (p, t) in enumerate(zip(positions, taps))]
    where = [p for p, _ in found]
    return c.load(0, activation_shape(layout, batch, channel, where)), all_of([i for _, i in found]), where


# -- MaxPool


def _max_pool_infer(n: Inference) -> list[TensorType]:
    first = pool_type(n)
    return [first, TensorType(i64, first.shape)][: max(n.n_outputs, 1)]


def _lowest(dtype: DType) -> Any:
    if dtype.is_float:
        return -np.inf
    return int(np.iinfo(dtype.numpy).min)


def _max_pool_compute(c: Indexing, index: tuple[Expr, ...], *, storage_order: int, **attrs: Any) -> Expr:
    x, layout = c.type(0).dims, attrs["layout"]
    lowest = const(_lowest(c.type(0).dtype), c.type(0).dtype)

    def element(*taps: Expr) -> Expr:
        value, inside, _ = _tap(c, index, attrs, taps)
        return value if inside is None else select(inside, value, lowest)

    kernel = tuple(attrs["kernel_shape"])
    if c.output == 0:
        return c.reduce("max", kernel, element)

    def taps_of(number: Expr) -> list[Expr]:
        taps: list[Expr] = []
        for size in reversed(kernel):
            taps.insert(0, number % size)
            number = number // size
        return taps

    best = c.reduce("argmax", [int(np.prod(kernel))], lambda number: element(*taps_of(number)))
    where = _tap(c, index, attrs, taps_of(best))[2]
    sizes = [x[a] for a in spatial_axes(layout, len(x))]
    batch, channel, _ = split_index(layout, index)
    flat = batch * x[channel_axis(layout, len(x))] + channel
    flat = flat * product(sizes)
    step: Dim = 1
    order = range(len(sizes)) if storage_order else reversed(range(len(sizes)))
    for axis in order:
        flat = flat + where[axis] * step
        step = step * sizes[axis]
    return flat


@computed_in_f32
def _max_pool_eval(x: Array, *, storage_order: int, **attrs: Any) -> tuple[Array, Array]:
    layout = attrs["layout"]
    array = to_channels_first(x, layout)
    w = window(attrs, attrs["kernel_shape"], array.shape[2:])
    rank = w.rank
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    windows = windows_view(array, w, lowest)
    best = windows.max(axis=tuple(range(-rank, 0)))
    number = windows.reshape(*windows.shape[:-rank], -1).argmax(axis=-1)
    taps = np.unravel_index(number, w.kernel)
    flat: Any = 0
    axes = list(range(rank))
    for axis in reversed(axes) if storage_order else axes:
        start = (
            np.arange(w.output[axis]).reshape(-1, *(1,) * (rank - 1 - axis)) * w.strides[axis] - w.begin[axis]
        )
        where = np.clip(start + taps[axis] * w.dilations[axis], 0, array.shape[2 + axis] - 1)
        flat = flat * array.shape[2 + axis] + where
    planes = np.arange(array.shape[0] * array.shape[1]).reshape(*array.shape[:2], *(1,) * rank)
    flat = (flat + planes * int(np.prod(array.shape[2:]))).astype(np.int64)
    return from_channels_first(best, layout), from_channels_first(flat, layout)


MAX_POOL = register(
    OpDef(
        "MaxPool",
        Kind.REDUCE,
        infer=_max_pool_infer,
        eval=_max_pool_eval,
        compute=_max_pool_compute,
        refuse=default_refuse,
        attrs={**POOL_ATTRS, "storage_order": 0},
    )
)


# -- AveragePool


def _taps_inside(w: Window, axis: int, position: Expr, low: Dim, high: Dim) -> Expr:
    """How many taps of a window fall into input positions low..high-1."""
    start, step = position * w.strides[axis] - w.begin[axis], w.dilations[axis]
    first = -((start - low) // step)  # ceil((low - start) / step)
    last = (dim(high - 1) - start) // step
    first, last = expr_maximum(first, 0), expr_minimum(last, w.kernel[axis] - 1)
    return expr_maximum(last - first + 1, 1)


def _average_pool_compute(
    c: Indexing, index: tuple[Expr, ...], *, count_include_pad: int, **attrs: Any
) -> Expr:
    dtype = c.type(0).dtype
    wide = wide_dtype(dtype)
    x, layout = c.type(0).dims, attrs["layout"]
    geometry = pool_window(attrs, x)
    _, _, positions = split_index(layout, index)

    def element(*taps: Expr) -> Expr:
        value, inside, _ = _tap(c, index, attrs, taps)
        value = cast(value, wide)
        return value if inside is None else select(inside, value, const(0, wide))

    total = c.reduce("sum", geometry.kernel, element)
    fixed = attrs["ceil_mode"] == 0 and (
        count_include_pad or not any(map(geometry.padded, range(geometry.rank)))
    )
    if fixed:
        return cast(total / float(np.prod(attrs["kernel_shape"])), dtype)
    counts = []
    for axis, (position, a) in enumerate(zip(positions, spatial_axes(layout, len(x)))):
        low, high = (-geometry.begin[axis], x[a] + geometry.end[axis]) if count_include_pad else (0, x[a])
        counts.append(_taps_inside(geometry, axis, position, low, high))
    count = counts[0]
    for other in counts[1:]:
        count = count * other
    return cast(total / cast(count, wide), dtype)


@computed_in_f32
def average_pool_array(x: Array, *, count_include_pad: int, **attrs: Any) -> Array:
    """AveragePool of an array."""
    array = to_channels_first(x, attrs["layout"])
    w = window(attrs, attrs["kernel_shape"], array.shape[2:])
    axes = tuple(range(-w.rank, 0))
    counted = np.ones((1, 1, *array.shape[2:]), dtype=array.dtype)
    shifted = w
    if count_include_pad:
        counted = np.pad(counted, [(0, 0), (0, 0), *zip(w.begin, w.end)], constant_values=1)
        shifted = Window(w.kernel, w.strides, w.dilations, (0,) * w.rank, (0,) * w.rank, w.output)
    count = windows_view(counted, shifted, 0).sum(axis=axes)
    out = windows_view(array, w, 0).sum(axis=axes) / np.maximum(count, 1)
    return from_channels_first(out.astype(array.dtype), attrs["layout"])


AVERAGE_POOL = register(
    OpDef(
        "AveragePool",
        Kind.REDUCE,
        infer=lambda n: [pool_type(n)],
        eval=average_pool_array,
        compute=_average_pool_compute,
        refuse=default_refuse,
        attrs={**POOL_ATTRS, "count_include_pad": 0},
    )
)


# -- LpPool


def _lp_pool_compute(c: Indexing, index: tuple[Expr, ...], *, p: int, **attrs: Any) -> Expr:
    dtype = c.type(0).dtype
    wide = wide_dtype(dtype)

    def element(*taps: Expr) -> Expr:
        value, inside, _ = _tap(c, index, attrs, taps)
        value = unary("abs", cast(value, wide))
        value = value if p == 1 else value * value if p == 2 else binary("pow", value, float(p))
        return value if inside is None else select(inside, value, const(0, wide))

    total = c.reduce("sum", tuple(attrs["kernel_shape"]), element)
    root = total if p == 1 else unary("sqrt", total) if p == 2 else binary("pow", total, 1.0 / p)
    return cast(root, dtype)


@computed_in_f32
def _lp_pool_eval(x: Array, *, p: int, **attrs: Any) -> Array:
    array = to_channels_first(x, attrs["layout"])
    w = window(attrs, attrs["kernel_shape"], array.shape[2:])
    powers = np.power(np.abs(array), p)
    total = windows_view(powers, w, 0).sum(axis=tuple(range(-w.rank, 0)))
    return from_channels_first(np.power(total, 1.0 / p).astype(array.dtype), attrs["layout"])


register(OpDef(
    "LpPool", Kind.REDUCE, infer=lambda n: [pool_type(n)], eval=_lp_pool_eval, compute=_lp_pool_compute,
    refuse=default_refuse, attrs={**POOL_ATTRS, "p": 2},
))  # fmt: skip


# -- global pooling: reductions over all spatial axes


def _global_infer(n: Inference) -> list[TensorType]:
    x = n.shape(0)
    if len(x) < 2:
        raise n.error("needs a batch and a channel axis")
    return [TensorType(n.dtype(0), (*x[:2], *(1,) * (len(x) - 2)))]


def _spatial(b: Builder, x: Value) -> Value:
    return b.constant(np.arange(2, x.tensor.rank, dtype=np.int64))


def _global_expand(operator: str) -> Any:
    def expand(b: Builder, node: Node) -> list[Value]:
        x = node.inputs[0]
        assert x is not None
        if x.tensor.rank == 2:
            return [b.op("Identity", x)]
        return [b.op(operator, x, _spatial(b, x), keepdims=1)]

    return expand


def _global_lp_expand(b: Builder, node: Node) -> list[Value]:
    x, p = node.inputs[0], node.attrs["p"]
    assert x is not None
    if p in (1, 2):
        return [b.op(f"ReduceL{p}", x, _spatial(b, x), keepdims=1)]
    total = b.op("ReduceSum", b.op("Pow", b.op("Abs", x), b.scalar(p, x)), _spatial(b, x), keepdims=1)
    return [b.op("Pow", total, b.scalar(1.0 / p, x))]


def _over_spatial(function: Any) -> Any:
    @computed_in_f32
    def evaluate(x: Array, **attrs: Any) -> Array:
        out = function(x, tuple(range(2, x.ndim)), **attrs)
        return np.asarray(out).astype(x.dtype)

    return evaluate


register(
    OpDef(
        "GlobalAveragePool",
        Kind.EXPAND,
        infer=_global_infer,
        refuse=default_refuse,
        expand=_global_expand("ReduceMean"),
        eval=_over_spatial(lambda x, axes: x.mean(axis=axes, keepdims=True)),
    )
)
register(
    OpDef(
        "GlobalMaxPool",
        Kind.EXPAND,
        infer=_global_infer,
        refuse=default_refuse,
        expand=_global_expand("ReduceMax"),
        eval=_over_spatial(lambda x, axes: x.max(axis=axes, keepdims=True)),
    )
)
register(
    OpDef(
        "GlobalLpPool",
        Kind.EXPAND,
        infer=_global_infer,
        refuse=default_refuse,
        expand=_global_lp_expand,
        attrs={"p": 2},
        eval=_over_spatial(
            lambda x, axes, p: np.power(np.power(np.abs(x), p).sum(axis=axes, keepdims=True), 1.0 / p)
        ),
    )
)


# -- MaxUnpool: puts elements back where MaxPool found them


def _unpooled_shape(attrs: Mapping[str, Any], x: Sequence[Any]) -> tuple[Any, ...]:
    """The shape that the indices of MaxUnpool refer to."""
    kernel = attrs["kernel_shape"]
    rank = len(kernel)
    strides = tuple(attrs["strides"] or (1,) * rank)
    pads = tuple(attrs["pads"] or (0,) * (2 * rank))
    sizes = [(x[2 + a] - 1) * strides[a] - pads[a] - pads[rank + a] + kernel[a] for a in range(rank)]
    return (*x[:2], *sizes)


def _unpool_infer(n: Inference) -> list[TensorType]:
    x = n.shape(0)
    if n.has(2):
        content = n.content(2)
        shape: tuple[Dim, ...] = (*x[:2], *(n.fresh("d") for _ in x[2:]))
        shape = shape if content is None else tuple(content.reshape(-1).tolist())
        return [TensorType(n.dtype(0), shape)]
    return [TensorType(n.dtype(0), _unpooled_shape(n.attrs, x))]


def _unpool_expand(b: Builder, node: Node) -> list[Value]:
    x, positions = node.inputs[0], node.inputs[1]
    assert x is not None and positions is not None
    natural = _unpooled_shape(node.attrs, x.shape)
    minus_one = b.constant(np.array([-1], dtype=np.int64))
    zeros = b.op("Expand", b.scalar(0, x), b.shape([product(natural)]))
    flat = b.op(
        "ScatterElements", zeros, b.op("Reshape", positions, minus_one), b.op("Reshape", x, minus_one), axis=0
    )
    out = b.op("Reshape", flat, b.shape(natural))
    wanted = node.output.shape
    if wanted == natural:
        return [out]
    pads = b.shape([*(0 for _ in wanted), *(p - q for p, q in zip(wanted, natural))])
    return [b.op("Pad", out, pads)]


def _unpool_eval(x: Array, positions: Array, output_shape: Array | None = None, **attrs: Any) -> Array:
    natural = _unpooled_shape(attrs, x.shape)
    out = np.zeros(natural, dtype=x.dtype)
    out.reshape(-1)[positions.reshape(-1)] = x.reshape(-1)
    if output_shape is None:
        return out
    padded = np.zeros(tuple(output_shape), dtype=x.dtype)
    common = tuple(slice(0, min(p, q)) for p, q in zip(padded.shape, out.shape))
    padded[common] = out[common]
    return padded


register(
    OpDef(
        "MaxUnpool",
        Kind.EXPAND,
        infer=_unpool_infer,
        eval=_unpool_eval,
        expand=_unpool_expand,
        static_inputs=(2,),
        refuse=default_refuse,
        attrs={"kernel_shape": REQUIRED, "pads": None, "strides": None},
    )
)


# -- MaxRoiPool: window sizes depend on data, so it runs on the host


def _roi_pool_infer(n: Inference) -> list[TensorType]:
    return [TensorType(n.dtype(0), (n.shape(1)[0], n.shape(0)[1], *n.attr("pooled_shape")))]


@computed_in_f32
def _roi_pool_eval(x: Array, rois: Array, *, pooled_shape: Sequence[int], spatial_scale: float) -> Array:
    height, width = pooled_shape
    out = np.zeros((len(rois), x.shape[1], height, width), dtype=x.dtype)
    for number, (batch, *corners) in enumerate(rois.tolist()):
        left, top, right, bottom = (int(np.floor(v * spatial_scale + 0.5)) for v in corners)
        box = (max(bottom - top + 1, 1), max(right - left + 1, 1))
        for i in range(height):
            rows = _roi_range(i, box[0], height, top, x.shape[2])
            for j in range(width):
                columns = _roi_range(j, box[1], width, left, x.shape[3])
                patch = x[int(batch), :, rows, columns]
                if patch.size:
                    out[number, :, i, j] = patch.max(axis=(1, 2))
    return out


def _roi_range(i: int, size: int, bins: int, start: int, limit: int) -> slice:
    first, last = int(np.floor(i * size / bins)) + start, int(np.ceil((i + 1) * size / bins)) + start
    return slice(min(max(first, 0), limit), min(max(last, 0), limit))


register(OpDef(
    "MaxRoiPool", Kind.HOST, infer=_roi_pool_infer, eval=_roi_pool_eval,
    attrs={"pooled_shape": REQUIRED, "spatial_scale": 1.0},
))  # fmt: skip
