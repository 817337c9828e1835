"""Sampling at positions computed in the model: GridSample, AffineGrid, RoiAlign.

GridSample follows PyTorch: positions in [-1, 1], last coordinate first. Interpolation weights are float32 or
wider. Images are [N, C, *spatial], or [N, *spatial, C] with layout="NHWC", where a position is computed once for all channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product as cartesian
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import Dim, SymbolicDim
from minicc.ir.expr import Expr, cast, const, dim, equal, select, unary
from minicc.ir.expr import maximum as expr_maximum
from minicc.ir.expr import minimum as expr_minimum
from minicc.ir.opdef import Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, f32, i64
from minicc.ops.conv import split_index, wide_dtype
from minicc.ops.helpers import Array, computed_in_f32, default_refuse, unknown_dims
from minicc.ops.resize import cubic_weights
from minicc.ops.spatial import activation_shape, channel_axis, spatial_axes

if TYPE_CHECKING:
    from minicc.ir.graph import Node

_FAR = 1.0e6  # positions beyond are outside any image, but still fit an index


def _index(x: Expr) -> Expr:
    """A whole float as an index."""
    return cast(expr_minimum(expr_maximum(x, -_FAR), _FAR), i64)


def _clamp(index: Expr, size: Dim) -> Expr:
    return expr_minimum(expr_maximum(index, 0), size - 1)


# -- GridSample


def _grid_infer(n: Inference) -> list[TensorType]:
    x, grid = n.shape(0), n.shape(1)
    if len(x) < 3 or len(grid) != len(x) or (isinstance(grid[-1], int) and grid[-1] != len(x) - 2):
        raise n.error("the grid must hold one coordinate for each spatial axis in its last axis")
    if n.attr("mode") not in ("linear", "nearest", "cubic"):
        raise n.error(f"mode {n.attr('mode')!r} is unknown")
    if n.attr("padding_mode") not in ("zeros", "border", "reflection"):
        raise n.error(f"padding_mode {n.attr('padding_mode')!r} is unknown")
    layout = n.attr("layout")
    return [TensorType(n.dtype(0), activation_shape(layout, x[0], x[channel_axis(layout, len(x))], grid[1:-1]))]


def _grid_refuse(node: Node) -> str | None:
    if node.attrs["mode"] == "cubic" and node.output.tensor.shape is not None and node.output.tensor.rank > 4:
        return "cubic sampling over more than two axes"
    return default_refuse(node)


def _reflected(x: Expr, low: Any, high: Any) -> Expr:
    """x mirrored at low and high until it lies between them; low when they are equal."""
    extent = high - low
    safe = expr_maximum(extent, 1e-6) if isinstance(extent, Expr) else max(extent, 1e-6)
    distance = unary("abs", x - low)
    turns = unary("floor", distance / safe)
    rest = distance - turns * safe
    even = equal(turns - unary("floor", turns * 0.5) * 2.0, 0.0)
    return select(even, rest + low, (rest * -1.0) + high)


def _grid_taps(
    c: Indexing, g: Expr, size: Dim, attrs: Mapping[str, Any]
) -> list[tuple[Expr, Expr | None, Expr | None]]:
    """(position, weight, condition that it is inside) of every tap along one axis for a grid coordinate."""
    dtype = g.dtype
    length = const(size, dtype) if isinstance(size, int) else cast(dim(size), dtype)
    align, padding, mode = attrs["align_corners"], attrs["padding_mode"], attrs["mode"]
    x = (g + 1.0) * 0.5 * (length - 1.0) if align else ((g + 1.0) * length - 1.0) * 0.5
    if mode == "nearest":
        x = unary("round", x)
    low, high = (0.0, length - 1.0) if align else (-0.5, length - 0.5)
    outside = (x < low) | (x > high)
    if padding == "border" and mode != "cubic":  # as PyTorch: cubic clamps its taps only
        x = select(outside, expr_minimum(expr_maximum(x, 0.0), length - 1.0), x)
    elif padding == "reflection":
        x = select(outside, _reflected(x, low, high), x)
    base = x if mode == "nearest" else unary("floor", x)
    weights: list[Expr | None]
    if mode == "nearest":
        first, weights = 0, [None]
    elif mode == "linear":
        first, weights = 0, [1.0 - (x - base), x - base]
    else:
        first, weights = -1, list(cubic_weights(x - base, -0.75))
    taps = []
    for k, weight in enumerate(weights):
        where = base + float(first + k)
        if padding == "reflection":
            where = unary(
                "trunc", select((where < low) | (where > high), _reflected(where, low, high), where)
            )
        position = _index(where)
        inside = (position >= 0) & (position < size) if padding == "zeros" else None
        taps.append((_clamp(position, size), weight, inside))
    return taps


def _grid_compute(c: Indexing, index: tuple[Expr, ...], **attrs: Any) -> Expr:
    x, dtype, layout = c.type(0).dims, c.type(0).dtype, attrs["layout"]
    rank = len(x) - 2
    wide = f32 if dtype.is_integer else wide_dtype(dtype)
    batch, channel, point = split_index(layout, index)
    spatial = spatial_axes(layout, len(x))
    taps = []
    for axis in range(rank):
        g = cast(c.load(1, (batch, *point, rank - 1 - axis)), wide)
        taps.append(_grid_taps(c, g, x[spatial[axis]], attrs))
    total: Expr | None = None
    for chosen in cartesian(*taps):
        value = cast(c.load(0, activation_shape(layout, batch, channel, [where for where, _, _ in chosen])), wide)
        for _, weight, inside in chosen:
            value = value if weight is None else value * weight
            value = value if inside is None else select(inside, value, const(0, wide))
        total = value if total is None else total + value
    assert total is not None
    return cast(total, dtype)


def _reflect_array(x: Array, low: float, high: float) -> Array:
    extent = high - low
    if extent <= 0:
        return np.full_like(x, low)
    period = np.mod(x - low, 2 * extent)
    return np.where(period <= extent, period, 2 * extent - period) + low


@computed_in_f32
def _grid_eval(x: Array, grid: Array, *, align_corners: int, mode: str, padding_mode: str, layout: str) -> Array:
    x = x if layout == "NCHW" else np.moveaxis(x, -1, 1)
    rank = x.ndim - 2
    taps: list[list[tuple[Array, Any, Any]]] = []
    for axis in range(rank):
        size = x.shape[2 + axis]
        g = grid[..., rank - 1 - axis]
        position = (g + 1) / 2 * (size - 1) if align_corners else ((g + 1) * size - 1) / 2
        position = np.rint(position) if mode == "nearest" else position
        low, high = (0.0, size - 1.0) if align_corners else (-0.5, size - 0.5)
        outside = (position < low) | (position > high)
        if padding_mode == "border" and mode != "cubic":
            position = np.where(outside, np.clip(position, 0, size - 1), position)
        elif padding_mode == "reflection":
            position = np.where(outside, _reflect_array(position, low, high), position)
        base = np.floor(position)
        t = position - base
        weights = {"nearest": [1], "linear": [1 - t, t], "cubic": cubic_weights(t, -0.75)}[mode]
        found = []
        for k, factor in enumerate(weights):
            where = base + (k - 1 if mode == "cubic" else k)
            if padding_mode == "reflection":
                where = np.trunc(
                    np.where((where < low) | (where > high), _reflect_array(where, low, high), where)
                )
            inside = (where >= 0) & (where <= size - 1)
            clipped = np.clip(np.nan_to_num(where), 0, size - 1).astype(np.int64)
            found.append((clipped, factor, inside if padding_mode == "zeros" else True))
        taps.append(found)
    batch = np.arange(x.shape[0]).reshape(-1, *(1,) * rank)
    total = np.zeros((x.shape[0], *grid.shape[1:-1], x.shape[1]), dtype=np.float64)
    for chosen in cartesian(*taps):
        weight: Any = np.ones(grid.shape[:-1])
        for _, factor, inside in chosen:
            weight = np.where(inside, weight * factor, 0)
        at: tuple[Any, ...] = (batch, slice(None), *(where for where, _, _ in chosen))
        picked = x[at]
        total += np.where(weight[..., None] != 0, picked * weight[..., None], 0)
    return np.ascontiguousarray(np.moveaxis(total, -1, 1) if layout == "NCHW" else total).astype(x.dtype)


register(OpDef(
    "GridSample", Kind.INDEX, infer=_grid_infer, eval=_grid_eval, compute=_grid_compute, refuse=_grid_refuse,
    attrs={"align_corners": 0, "mode": "linear", "padding_mode": "zeros", "layout": "NCHW"},
))  # fmt: skip


# -- AffineGrid


def _affine_infer(n: Inference) -> list[TensorType]:
    content, theta = n.content(1), n.shape(0)
    rank = None if content is None else content.size - 2
    if rank is None:
        found = theta[1]
        rank = found if isinstance(found, int) else 2
        return [TensorType(n.dtype(0), (theta[0], *unknown_dims(n, rank), rank))]
    assert content is not None
    if rank not in (2, 3):
        raise n.error("only two or three spatial axes are supported")
    sizes: list[Dim] = [v if isinstance(v, SymbolicDim) else int(v) for v in content.reshape(-1)]
    return [TensorType(n.dtype(0), (theta[0], *sizes[2:], rank))]


def _affine_compute(c: Indexing, index: tuple[Expr, ...], *, align_corners: int) -> Expr:
    sizes, dtype = c.out_type(0).dims[1:-1], c.type(0).dtype
    wide = wide_dtype(dtype)
    rank = len(sizes)
    total = cast(c.load(0, (index[0], index[-1], rank)), wide)
    for axis in range(rank):
        length = cast(dim(sizes[axis]), wide)
        position = cast(index[1 + axis], wide)
        if align_corners:
            place = position * 2.0 / expr_maximum(length - 1.0, 1.0) - 1.0
        else:
            place = (position * 2.0 + 1.0) / length - 1.0
        total = total + cast(c.load(0, (index[0], index[-1], rank - 1 - axis)), wide) * place
    return cast(total, dtype)


@computed_in_f32
def _affine_eval(theta: Array, size: Array, *, align_corners: int) -> Array:
    sizes = [int(v) for v in size[2:]]
    axes = [np.linspace(-1, 1, s) if align_corners else (2 * np.arange(s) + 1) / s - 1 for s in sizes]
    planes = np.meshgrid(*axes, indexing="ij")
    base = np.stack([*reversed(planes), np.ones(sizes)], axis=-1)
    return np.asarray(np.einsum("...j,nij->n...i", base, theta)).astype(theta.dtype)


register(
    OpDef(
        "AffineGrid",
        Kind.INDEX,
        infer=_affine_infer,
        eval=_affine_eval,
        compute=_affine_compute,
        refuse=default_refuse,
        attrs={"align_corners": 0},
        static_inputs=(1,),
    )
)


# -- RoiAlign (He et al., 2017)


def _roi_infer(n: Inference) -> list[TensorType]:
    if n.rank(0) != 4 or n.rank(1) != 2 or n.attr("mode") not in ("avg", "max"):
        raise n.error("needs images of rank 4, a matrix of boxes, and mode avg or max")
    layout = n.attr("layout")
    bins = n.attr("output_height"), n.attr("output_width")
    return [TensorType(n.dtype(0), activation_shape(layout, n.shape(1)[0], n.shape(0)[channel_axis(layout, 4)], bins))]


def _roi_refuse(node: Node) -> str | None:
    if node.attrs["sampling_ratio"] <= 0:
        return "data-dependent: sampling_ratio 0 takes the number of samples from the boxes"
    return default_refuse(node)


def _border(x: Expr, size: Dim) -> tuple[Expr, Expr, Expr, Expr]:
    """(lower position, upper position, fraction, condition that x is near the image) along one axis."""
    length = const(size, x.dtype) if isinstance(size, int) else cast(dim(size), x.dtype)
    near = (x >= -1.0) & (x <= length)
    x = expr_minimum(expr_maximum(x, 0.0), length - 1.0)
    low = _clamp(_index(unary("floor", x)), size)
    return low, _clamp(low + 1, size), x - unary("floor", x), near


def _roi_compute(
    c: Indexing,
    index: tuple[Expr, ...],
    *,
    coordinate_transformation_mode: str,
    mode: str,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    spatial_scale: float,
    layout: str,
) -> Expr:
    x, dtype = c.type(0).dims, c.type(0).dtype
    wide = wide_dtype(dtype)
    roi, channel, (row, column) = split_index(layout, index)
    height, width = (x[a] for a in spatial_axes(layout, 4))
    half = coordinate_transformation_mode == "half_pixel"
    batch = _clamp(cast(c.load(2, (roi,)), i64), x[0])

    def corner(k: int) -> Expr:
        return cast(c.load(1, (roi, k)), wide) * spatial_scale - (0.5 if half else 0.0)

    def position(axis: int, bins: int, place: Expr, sample: Expr) -> Expr:
        start, extent = corner(1 - axis), corner(3 - axis) - corner(1 - axis)
        extent = extent if half else expr_maximum(extent, 1.0)
        step = extent / float(bins)
        return start + cast(place, wide) * step + (cast(sample, wide) + 0.5) * step / float(sampling_ratio)

    def sample(i: Expr, j: Expr) -> Expr:
        top, bottom, down, near_y = _border(position(0, output_height, row, i), height)
        left, right, along, near_x = _border(position(1, output_width, column, j), width)
        parts = [
            cast(c.load(0, activation_shape(layout, batch, channel, (y, z))), wide) * weight
            for y, z, weight in (
                (top, left, (1.0 - down) * (1.0 - along)),
                (top, right, (1.0 - down) * along),
                (bottom, left, down * (1.0 - along)),
                (bottom, right, down * along),
            )
        ]
        if mode == "avg":
            value = parts[0] + parts[1] + parts[2] + parts[3]
        else:
            value = expr_maximum(expr_maximum(parts[0], parts[1]), expr_maximum(parts[2], parts[3]))
        return select(near_y & near_x, value, const(0, wide))

    samples = [sampling_ratio, sampling_ratio]
    if mode == "max":
        return cast(c.reduce("max", samples, sample), dtype)
    return cast(c.reduce("sum", samples, sample) * (1.0 / sampling_ratio**2), dtype)


@computed_in_f32
def _roi_eval(
    x: Array,
    rois: Array,
    batches: Array,
    *,
    coordinate_transformation_mode: str,
    mode: str,
    output_height: int,
    output_width: int,
    sampling_ratio: int,
    spatial_scale: float,
    layout: str,
) -> Array:
    x = x if layout == "NCHW" else np.moveaxis(x, -1, 1)
    half = coordinate_transformation_mode == "half_pixel"
    out = np.zeros((len(rois), x.shape[1], output_height, output_width), dtype=x.dtype)
    for number, roi in enumerate(rois * spatial_scale - (0.5 if half else 0.0)):
        image = x[int(batches[number])]
        tables = []
        for axis, bins in enumerate((output_height, output_width)):
            start, extent = roi[1 - axis], roi[3 - axis] - roi[1 - axis]
            extent = extent if half else max(extent, 1.0)
            count = sampling_ratio if sampling_ratio > 0 else int(np.ceil(extent / bins))
            places = start + (
                np.arange(bins)[:, None] + (np.arange(count) + 0.5)[None, :] / max(count, 1)
            ) * (extent / bins)
            tables.append(_axis_table(places, image.shape[1 + axis]))
        (top, bottom, down, near_y), (left, right, along, near_x) = tables
        if not near_y.size or not near_x.size:
            continue
        parts = [
            image[:, ys[:, None, :, None], zs[None, :, None, :]]
            * (wy[:, None, :, None] * wx[None, :, None, :])
            for ys, wy in ((top, 1 - down), (bottom, down))
            for zs, wx in ((left, 1 - along), (right, along))
        ]
        value = sum(parts) if mode == "avg" else np.maximum.reduce(parts)
        value = np.where(near_y[:, None, :, None] & near_x[None, :, None, :], value, 0)
        out[number] = value.mean(axis=(3, 4)) if mode == "avg" else value.max(axis=(3, 4))
    return out if layout == "NCHW" else np.ascontiguousarray(np.moveaxis(out, 1, -1))


def _axis_table(places: Array, size: int) -> tuple[Array, Array, Array, Array]:
    near = (places >= -1) & (places <= size)
    inside = np.clip(places, 0, size - 1)
    low = np.floor(inside).astype(np.int64)
    return low, np.minimum(low + 1, size - 1), inside - low, near


register(OpDef(
    "RoiAlign", Kind.REDUCE, infer=_roi_infer, eval=_roi_eval, compute=_roi_compute, refuse=_roi_refuse,
    attrs={
        "coordinate_transformation_mode": "half_pixel", "mode": "avg", "output_height": 1, "output_width": 1,
        "sampling_ratio": 0, "spatial_scale": 1.0, "layout": "NCHW",
    },
))  # fmt: skip
