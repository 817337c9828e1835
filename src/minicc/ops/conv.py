"""Convolutions: Conv, ConvTranspose, ConvInteger, DeformConv and com.microsoft's FusedConv.

Activations are [N, C, *spatial], or [N, *spatial, C] with the attribute layout="NHWC"; weights keep ONNX's
order. The `compute` functions are the naive form for every type and rank; fast forms are templates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product as cartesian
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.dims import Dim
from minicc.ir.expr import Expr, cast, const, equal, select, unary
from minicc.ir.expr import maximum as expr_maximum
from minicc.ir.expr import minimum as expr_minimum
from minicc.ir.opdef import Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import DType, TensorType, bf16, f16, f32, i32, i64
from minicc.ops.helpers import Array, computed_in_f32, default_refuse, require_same_dtype
from minicc.ops.matmul import ACTIVATIONS
from minicc.ops.spatial import (
    Window,
    activation_shape,
    all_of,
    channel_axis,
    from_channels_first,
    spatial_axes,
    tap_position,
    to_channels_first,
    transposed_window,
    window,
    windows_view,
)

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

CONV_ATTRS: dict[str, Any] = {
    "auto_pad": "NOTSET", "dilations": None, "group": 1, "kernel_shape": None, "pads": None, "strides": None,
    "layout": "NCHW",
}  # fmt: skip


def wide_dtype(dtype: DType) -> DType:
    """The type in which sums of `dtype` are accumulated."""
    return f32 if dtype in (f16, bf16) else dtype


# -- Conv


def conv_window(attrs: Mapping[str, Any], x: Sequence[Dim], w: Sequence[Dim]) -> Window:
    """The window of a convolution of an activation of shape `x` with a weight of shape `w`."""
    return window(attrs, w[2:], [x[a] for a in spatial_axes(attrs["layout"], len(x))])


def _check_channels(n: Inference, x: tuple[Dim, ...], w: tuple[Dim, ...]) -> None:
    group, layout = n.attr("group"), n.attr("layout")
    if len(x) < 2 or len(w) != len(x):
        raise n.error(f"activation has rank {len(x)}, weight has rank {len(w)}")
    channels = x[channel_axis(layout, len(x))]
    known = isinstance(channels, int) and isinstance(w[1], int)
    if group <= 0 or (known and channels != w[1] * group) or (isinstance(w[0], int) and w[0] % group):
        raise n.error(f"{channels} channels in {group} groups do not fit a weight of shape {list(w)}")
    kernel = n.attr("kernel_shape")
    if kernel and any(isinstance(size, int) and size != k for size, k in zip(w[2:], kernel)):
        raise n.error(f"kernel_shape {list(kernel)} does not fit the weight")


def conv_type(n: Inference, x: int, w: int, dtype: DType) -> TensorType:
    """The result type of a convolution of the inputs at positions `x` and `w`."""
    activation, weight = n.shape(x), n.shape(w)
    _check_channels(n, activation, weight)
    try:
        geometry = conv_window({**n.attrs, "layout": n.attr("layout")}, activation, weight)
    except ShapeError as error:
        raise n.error(error.what) from error
    return TensorType(dtype, activation_shape(n.attr("layout"), activation[0], weight[0], geometry.output))


def _conv_infer(n: Inference) -> list[TensorType]:
    return [conv_type(n, 0, 1, require_same_dtype(n, (0, 1, 2)))]


def split_index(layout: str, index: Sequence[Expr]) -> tuple[Expr, Expr, tuple[Expr, ...]]:
    """(batch, channel, spatial) parts of an activation's index."""
    if layout == "NHWC":
        return index[0], index[-1], tuple(index[1:-1])
    return index[0], index[1], tuple(index[2:])


def conv_sum(c: Indexing, index: tuple[Expr, ...], attrs: Mapping[str, Any], dtype: DType,
             factors: Any, operands: tuple[int, int] = (0, 1)) -> Expr:  # fmt: skip
    """The sum of the products of `factors(x index, w index)` over a group's channels and taps, in `dtype`."""
    x, w = (c.type(k).dims for k in operands)
    layout, group = attrs["layout"], attrs["group"]
    geometry = conv_window(attrs, x, w)
    sizes = [x[a] for a in spatial_axes(layout, len(x))]
    batch, channel, positions = split_index(layout, index)
    first = 0 if group == 1 else (channel // (w[0] // group)) * w[1]

    def term(k: Expr, *taps: Expr) -> Expr:
        found = [tap_position(geometry, a, p, t, sizes[a]) for a, (p, t) in enumerate(zip(positions, taps))]
        inside = all_of([condition for _, condition in found])
        left, right = factors(
            activation_shape(layout, batch, k + first, [p for p, _ in found]), (channel, k, *taps)
        )
        value = left * right
        return value if inside is None else select(inside, value, const(0, dtype))

    return c.reduce("sum", [w[1], *w[2:]], term)


def _conv_compute(c: Indexing, index: tuple[Expr, ...], **attrs: Any) -> Expr:
    dtype = c.type(0).dtype
    wide = wide_dtype(dtype)
    total = conv_sum(c, index, attrs, wide, lambda x, w: (cast(c.load(0, x), wide), cast(c.load(1, w), wide)))
    if c.has(2):
        total = total + cast(c.load(2, [split_index(attrs["layout"], index)[1]]), wide)
    return cast(total, dtype)


def convolve(x: Array, w: Array, attrs: Mapping[str, Any]) -> Array:
    """Convolution of [N, C, *spatial] by matrix products over gathered windows."""
    geometry = window(attrs, w.shape[2:], x.shape[2:])
    group, depth = attrs["group"], int(np.prod(w.shape[1:]))
    rank = geometry.rank
    out = np.empty((x.shape[0], w.shape[0], *geometry.output), dtype=np.result_type(x, w))
    weights = w.reshape(group, w.shape[0] // group, depth)
    for image in range(x.shape[0]):
        windows = windows_view(x[image : image + 1], geometry, 0)[0]
        if group > 1 and w.shape[1] == 1:  # depthwise: a sum over taps moves less data than gathered windows
            taps = w.reshape(group, -1, 1, *w.shape[2:])
            total: Any = 0
            for tap in cartesian(*map(range, w.shape[2:])):
                at: tuple[Any, ...] = (slice(None), slice(None), 0, *tap)
                factor = taps[at]
                total = (
                    total
                    + windows[(slice(None), None, *(slice(None),) * rank, *tap)]
                    * factor[(..., *(None,) * rank)]
                )
            out[image] = total.reshape(out.shape[1:])
            continue
        columns = np.moveaxis(
            windows.reshape(group, w.shape[1], *windows.shape[1:]), range(2, 2 + rank), range(-rank, 0)
        )
        columns = columns.reshape(group, depth, -1)
        out[image] = np.matmul(weights, columns).reshape(out.shape[1:])
    return out


def _channel_vector(b: Array, rank: int) -> Array:
    return b.reshape(1, -1, *(1,) * rank)


@computed_in_f32
def _conv_eval(x: Array, w: Array, b: Array | None = None, **attrs: Any) -> Array:
    out = convolve(to_channels_first(x, attrs["layout"]), w, attrs)
    if b is not None:
        out = out + _channel_vector(b, out.ndim - 2)
    return from_channels_first(out, attrs["layout"])


CONV = register(OpDef(
    "Conv", Kind.CONTRACT, infer=_conv_infer, eval=_conv_eval, compute=_conv_compute, refuse=default_refuse,
    attrs=CONV_ATTRS,
))  # fmt: skip


def _fused_conv_expand(b: Builder, node: Node) -> list[Value]:
    attrs = dict(node.attrs)
    name, parameters = attrs.pop("activation"), attrs.pop("activation_params") or ()
    inputs = [*node.inputs, None, None][:4]
    out = b.op("Conv", *inputs[:3], **attrs)
    if inputs[3] is not None:
        out = b.op("Add", out, inputs[3])
    if not name:
        return [out]
    if name == "Clip":
        return [b.op("Clip", out, *(b.scalar(p, out) for p in parameters))]
    operator, names = ACTIVATIONS[name]
    return [b.op(operator, out, **dict(zip(names, parameters)))]


@computed_in_f32
def _fused_conv_eval(x: Array, w: Array, b: Array | None = None, z: Array | None = None, *, activation: str,
                     activation_params: Sequence[float] | None, **attrs: Any) -> Array:  # fmt: skip
    out = _conv_eval(x, w, b, **attrs) + (0 if z is None else z)
    p = tuple(activation_params or ())
    functions: dict[str, Any] = {
        "": lambda: out,
        "Relu": lambda: np.maximum(out, 0),
        "Tanh": lambda: np.tanh(out),
        "Sigmoid": lambda: 1 / (1 + np.exp(-out)),
        "LeakyRelu": lambda: np.where(out < 0, p[0] * out, out),
        "HardSigmoid": lambda: np.clip(p[0] * out + p[1], 0, 1),
        "Clip": lambda: np.clip(out, p[0], p[1]),
    }
    return np.asarray(functions[activation]()).astype(x.dtype)


def _fused_conv_infer(n: Inference) -> list[TensorType]:
    if n.attr("activation") not in ("", "Clip", *ACTIVATIONS):
        raise n.error(f"activation {n.attr('activation')!r} is unknown")
    return [conv_type(n, 0, 1, require_same_dtype(n))]


register(
    OpDef(
        "FusedConv",
        Kind.EXPAND,
        infer=_fused_conv_infer,
        eval=_fused_conv_eval,
        expand=_fused_conv_expand,
        refuse=default_refuse,
        attrs={**CONV_ATTRS, "activation": "", "activation_params": None},
        domain="com.microsoft",
    )
)


# -- ConvInteger


def _conv_integer_infer(n: Inference) -> list[TensorType]:
    if any(n.dtype(i).kind not in "iu" or n.dtype(i).bits != 8 for i in (0, 1)):
        raise n.error("needs 8-bit integers")
    return [conv_type(n, 0, 1, i32)]


def _conv_integer_compute(c: Indexing, index: tuple[Expr, ...], **attrs: Any) -> Expr:
    def factors(x: tuple[Any, ...], w: tuple[Any, ...]) -> tuple[Expr, Expr]:
        left, right = cast(c.load(0, x), i32), cast(c.load(1, w), i32)
        if c.has(2):
            left = left - cast(c.load(2, [0] * c.type(2).rank), i32)
        if c.has(3):
            point = c.type(3).dims
            right = right - cast(c.load(3, [] if not point else [0 if point[0] == 1 else w[0]]), i32)
        return left, right

    return conv_sum(c, index, attrs, i32, factors)


def _conv_integer_eval(
    x: Array, w: Array, x_zero: Array | None = None, w_zero: Array | None = None, **attrs: Any
) -> Array:
    left, right = x.astype(np.int32), w.astype(np.int32)
    if x_zero is not None:
        left = left - x_zero.astype(np.int32).reshape(-1)[0]
    if w_zero is not None:
        right = right - w_zero.astype(np.int32).reshape(-1, *(1,) * (w.ndim - 1))
    return from_channels_first(
        convolve(to_channels_first(left, attrs["layout"]), right, attrs), attrs["layout"]
    )


CONV_INTEGER = register(
    OpDef(
        "ConvInteger",
        Kind.CONTRACT,
        infer=_conv_integer_infer,
        eval=_conv_integer_eval,
        compute=_conv_integer_compute,
        refuse=default_refuse,
        attrs=CONV_ATTRS,
    )
)


# -- ConvTranspose


def conv_transpose_window(attrs: Mapping[str, Any], x: Sequence[Dim], w: Sequence[Dim]) -> Window:
    """The window of a transposed convolution; its `begin` and `end` are cut from the full output."""
    return transposed_window(attrs, w[2:], [x[a] for a in spatial_axes(attrs["layout"], len(x))])


def _conv_transpose_infer(n: Inference) -> list[TensorType]:
    x, w, group, layout = n.shape(0), n.shape(1), n.attr("group"), n.attr("layout")
    if len(x) < 3 or len(w) != len(x):
        raise n.error(f"activation has rank {len(x)}, weight has rank {len(w)}")
    channels = x[channel_axis(layout, len(x))]
    if isinstance(channels, int) and isinstance(w[0], int) and (channels != w[0] or channels % group):
        raise n.error(f"{channels} channels in {group} groups do not fit a weight of shape {list(w)}")
    try:
        geometry = conv_transpose_window(n.attrs, x, w)
    except ShapeError as error:
        raise n.error(error.what) from error
    shape = activation_shape(layout, x[0], w[1] * group, geometry.output)
    return [TensorType(require_same_dtype(n, (0, 1, 2)), shape)]


def _conv_transpose_compute(c: Indexing, index: tuple[Expr, ...], **attrs: Any) -> Expr:
    x, w = c.type(0).dims, c.type(1).dims
    dtype, layout, group = c.type(0).dtype, attrs["layout"], attrs["group"]
    wide = wide_dtype(dtype)
    geometry = conv_transpose_window(attrs, x, w)
    sizes = [x[a] for a in spatial_axes(layout, len(x))]
    batch, channel, positions = split_index(layout, index)
    depth = w[0] // group
    first = 0 if group == 1 else (channel // w[1]) * depth
    column = channel if group == 1 else channel % w[1]

    def term(k: Expr, *taps: Expr) -> Expr:
        where, conditions = [], []
        for axis, (position, tap) in enumerate(zip(positions, taps)):
            scaled = position + geometry.begin[axis] - tap * geometry.dilations[axis]
            source = scaled // geometry.strides[axis]
            conditions.append((source >= 0) & (source < sizes[axis]))
            if geometry.strides[axis] > 1:
                conditions.append(equal(source * geometry.strides[axis], scaled))
            where.append(expr_minimum(expr_maximum(source, 0), sizes[axis] - 1))
        inside = all_of(conditions)
        left = cast(c.load(0, activation_shape(layout, batch, k + first, where)), wide)
        value = left * cast(c.load(1, (k + first, column, *taps)), wide)
        return value if inside is None else select(inside, value, const(0, wide))

    total = c.reduce("sum", [depth, *w[2:]], term)
    if c.has(2):
        total = total + cast(c.load(2, [channel]), wide)
    return cast(total, dtype)


@computed_in_f32
def _conv_transpose_eval(x: Array, w: Array, b: Array | None = None, **attrs: Any) -> Array:
    x = to_channels_first(x, attrs["layout"])
    geometry = transposed_window(attrs, w.shape[2:], x.shape[2:])
    group, rank = attrs["group"], geometry.rank
    full = [
        max((size - 1) * s + (k - 1) * d + 1, low + out)
        for size, s, k, d, low, out in zip(x.shape[2:], geometry.strides, w.shape[2:], geometry.dilations,
                                           geometry.begin, geometry.output)
    ]  # fmt: skip
    grid = x.reshape(x.shape[0], group, x.shape[1] // group, -1)
    weights = w.reshape(group, w.shape[0] // group, -1)
    columns = np.matmul(weights.transpose(0, 2, 1), grid)
    columns = columns.reshape(x.shape[0], group, w.shape[1], int(np.prod(w.shape[2:])), *x.shape[2:])
    out = np.zeros((x.shape[0], group, w.shape[1], *full), dtype=x.dtype)
    for number, tap in enumerate(cartesian(*map(range, w.shape[2:]))):
        place: tuple[Any, ...] = tuple(
            slice(t * d, t * d + (size - 1) * s + 1, s)
            for t, d, size, s in zip(tap, geometry.dilations, x.shape[2:], geometry.strides)
        )
        full_place: tuple[Any, ...] = (..., *place)
        out[full_place] += columns[:, :, :, number]
    cut = tuple(slice(low, low + size) for low, size in zip(geometry.begin, geometry.output))
    kept: tuple[Any, ...] = (..., *cut)
    out = out[kept].reshape(x.shape[0], group * w.shape[1], *geometry.output)
    if b is not None:
        out = out + _channel_vector(b, rank)
    return from_channels_first(out, attrs["layout"])


CONV_TRANSPOSE = register(OpDef(
    "ConvTranspose", Kind.CONTRACT, infer=_conv_transpose_infer, eval=_conv_transpose_eval,
    compute=_conv_transpose_compute, refuse=default_refuse,
    attrs={**CONV_ATTRS, "output_padding": None, "output_shape": None},
))  # fmt: skip


# -- DeformConv: taps are moved by offsets computed in the model and sampled bilinearly (Dai et al., 2017)


def _deform_infer(n: Inference) -> list[TensorType]:
    if n.rank(0) != 4:
        raise n.error("only two spatial axes are supported")
    x, w = n.shape(0), n.shape(1)
    try:
        geometry = window(n.attrs, w[2:], x[2:])
    except ShapeError as error:
        raise n.error(error.what) from error
    return [TensorType(require_same_dtype(n), (x[0], w[0], *geometry.output))]


def _whole(x: Expr) -> Expr:
    """floor(x) as an index; far-away positions are brought near first, they are outside anyway."""
    bounded = expr_minimum(expr_maximum(x, -1.0e6), 1.0e6)
    return cast(unary("floor", bounded), i64)


def bilinear(load: Any, y: Expr, x: Expr, height: Dim, width: Dim) -> Expr:
    """The image sampled at (y, x), zero outside; `load(row, column)` gives a pixel in the type of y."""
    top, left = _whole(y), _whole(x)
    down, right = y - cast(top, y.dtype), x - cast(left, y.dtype)
    total = None
    for dy, dx, weight in ((0, 0, (1 - down) * (1 - right)), (0, 1, (1 - down) * right),
                           (1, 0, down * (1 - right)), (1, 1, down * right)):  # fmt: skip
        row, column = top + dy, left + dx
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        pixel = load(
            expr_minimum(expr_maximum(row, 0), height - 1), expr_minimum(expr_maximum(column, 0), width - 1)
        )
        part = select(inside, pixel * weight, const(0, y.dtype))
        total = part if total is None else total + part
    assert total is not None
    return total


def _deform_compute(c: Indexing, index: tuple[Expr, ...], **attrs: Any) -> Expr:
    x, w = c.type(0).dims, c.type(1).dims
    dtype = c.type(0).dtype
    wide = wide_dtype(dtype)
    geometry = window(attrs, w[2:], x[2:])
    batch, channel, row, column = index
    first = 0 if attrs["group"] == 1 else (channel // (w[0] // attrs["group"])) * w[1]

    def term(k: Expr, ky: Expr, kx: Expr) -> Expr:
        source = k + first
        part = source // (x[1] // attrs["offset_group"]) if attrs["offset_group"] > 1 else const(0, i64)
        tap = part * (w[2] * w[3]) + ky * w[3] + kx
        base = [p * geometry.strides[a] + t * geometry.dilations[a] - geometry.begin[a]
                for a, (p, t) in enumerate(((row, ky), (column, kx)))]  # fmt: skip
        at = [
            cast(p, wide) + cast(c.load(2, (batch, tap * 2 + a, row, column)), wide)
            for a, p in enumerate(base)
        ]
        value = bilinear(lambda i, j: cast(c.load(0, (batch, source, i, j)), wide), at[0], at[1], x[2], x[3])
        value = value * cast(c.load(1, (channel, k, ky, kx)), wide)
        return value * cast(c.load(4, (batch, tap, row, column)), wide) if c.has(4) else value

    total = c.reduce("sum", [w[1], w[2], w[3]], term)
    if c.has(3):
        total = total + cast(c.load(3, [channel]), wide)
    return cast(total, dtype)


def sample_bilinear(image: Array, y: Array, x: Array) -> Array:
    """Images [..., H, W] at positions y, x of shape [..., *points] (same leading axes), zero outside."""
    lead, (height, width) = image.ndim - 2, image.shape[-2:]
    grids = np.indices(image.shape[:-2], sparse=True)
    grids = tuple(g.reshape(*g.shape, *(1,) * (y.ndim - lead)) for g in grids)
    top, left = np.floor(y), np.floor(x)
    total = np.zeros(
        np.broadcast_shapes(y.shape, (*image.shape[:-2], *(1,) * (y.ndim - lead))), dtype=image.dtype
    )
    for dy, dx in cartesian((0, 1), (0, 1)):
        row, column = top + dy, left + dx
        weight = (1 - np.abs(y - row)) * (1 - np.abs(x - column))
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        pixel = image[(*grids, np.clip(np.nan_to_num(row), 0, height - 1).astype(np.int64),
                       np.clip(np.nan_to_num(column), 0, width - 1).astype(np.int64))]  # fmt: skip
        total += np.where(inside, pixel * weight, 0).astype(image.dtype)
    return total


@computed_in_f32
def _deform_eval(
    x: Array, w: Array, offset: Array, b: Array | None = None, mask: Array | None = None, **attrs: Any
) -> Array:
    geometry = window(attrs, w.shape[2:], x.shape[2:])
    (batch, channels), (kh, kw), (oh, ow) = x.shape[:2], w.shape[2:], geometry.output
    parts, group = attrs["offset_group"], attrs["group"]
    moved = offset.reshape(batch, parts, 1, kh, kw, 2, oh, ow)
    axes = [
        np.arange(o)[None] * s + np.arange(k)[:, None] * d - p
        for o, s, k, d, p in zip((oh, ow), geometry.strides, (kh, kw), geometry.dilations, geometry.begin)
    ]
    y = moved[..., 0, :, :] + axes[0].reshape(kh, 1, oh, 1).astype(x.dtype)
    z = moved[..., 1, :, :] + axes[1].reshape(1, kw, 1, ow).astype(x.dtype)
    image = x.reshape(batch, parts, channels // parts, *x.shape[2:])
    sampled = sample_bilinear(image, y, z)
    if mask is not None:
        sampled = sampled * mask.reshape(batch, parts, 1, kh, kw, oh, ow)
    columns = sampled.reshape(batch, group, channels // group * kh * kw, oh * ow)
    out = np.matmul(w.reshape(group, w.shape[0] // group, -1), columns).reshape(batch, w.shape[0], oh, ow)
    return np.asarray(out if b is None else out + _channel_vector(b, 2))


DEFORM_CONV = register(
    OpDef(
        "DeformConv",
        Kind.REDUCE,
        infer=_deform_infer,
        eval=_deform_eval,
        compute=_deform_compute,
        refuse=default_refuse,
        attrs={
            "dilations": None,
            "group": 1,
            "kernel_shape": None,
            "offset_group": 1,
            "pads": None,
            "strides": None,
        },
    )
)
