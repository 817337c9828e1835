"""Ops that join, cut, repeat, pad or reorder elements at positions known from shapes.

Positions that come from data (gathers, scatters) are in index. Slices and pads may have symbolic bounds: what cannot be
decided at compile time becomes a minimum or maximum of sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir import expr
from minicc.ir.dims import Dim, ceil_divide, floor_divide, lower_bound, maximum, minimum
from minicc.ir.expr import Expr, const, select
from minicc.ir.graph import object_array
from minicc.ir.opdef import Content, Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import Type, boolean
from minicc.ops.helpers import (
    Array,
    Shape,
    axis_list,
    certainly_non_negative,
    certainly_positive,
    default_refuse,
    propagate_moves,
    require_same_dtype,
    unknown_dims,
)

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

Indices = tuple[Expr, ...]


# -- Concat and Split


def _concat_infer(n: Inference) -> list[Type]:
    dtype = require_same_dtype(n)
    shapes = [n.shape(i) for i in range(len(n.inputs))]
    axis = n.axis(n.attr("axis"), len(shapes[0]))
    out = list(shapes[0])
    for shape in shapes[1:]:
        if len(shape) != len(out):
            raise n.error("the inputs have different ranks")
        for i, size in enumerate(shape):
            if i == axis:
                out[i] = out[i] + size
            elif isinstance(out[i], int) and isinstance(size, int) and out[i] != size:
                raise n.error(f"the inputs differ along axis {i}, only axis {axis} may")
            elif isinstance(size, int):
                out[i] = size
    return [n.type(0).with_shape(out).with_dtype(dtype)]


def _concat(c: Indexing, index: Indices, *, axis: int) -> Expr:
    """Picks the part by position; each part is read at a clamped position, also where another one is picked."""
    axis %= len(index)
    parts: list[tuple[int, Dim, Dim]] = []  # operand, where it starts, its size
    start: Dim = 0
    operand = 0
    while c.has(operand):
        size = c.type(operand).dims[axis]
        if size != 0:
            parts.append((operand, start, size))
            start = start + size
        operand += 1
    out: Expr | None = None
    for operand, begin, size in reversed(parts):
        position = index[axis] - begin
        inside = position if len(parts) == 1 else expr.maximum(expr.minimum(position, size - 1), 0)
        element = c.load(operand, [*index[:axis], inside, *index[axis + 1 :]])
        out = element if out is None else select(index[axis] < begin + size, element, out)
    return const(0, c.out_type().dtype) if out is None else out


register(OpDef(
    "Concat", Kind.INDEX, infer=_concat_infer, propagate=propagate_moves(), refuse=default_refuse,
    eval=lambda *xs, axis: np.concatenate(xs, axis=axis), compute=_concat, attrs={"axis": 0},
))  # fmt: skip


def _split_infer(n: Inference) -> list[Type]:
    shape = n.shape(0)
    axis = n.axis(n.attr("axis"), len(shape))
    sizes = _split_sizes(n, shape[axis])
    if len(sizes) < n.n_outputs:
        raise n.error(f"splits into {len(sizes)}, {n.n_outputs} outputs are used")
    return [n.type(0).with_shape((*shape[:axis], size, *shape[axis + 1 :])) for size in sizes]


def _split_sizes(n: Inference, size: Dim) -> list[Dim]:
    if n.has(1):
        content = n.content(1)
        if content is None:
            return list(unknown_dims(n, n.n_outputs))
        total = sum(content.flat)
        if isinstance(total, int) and isinstance(size, int) and total != size:
            raise n.error(f"the parts sum up to {total}, the axis has {size}")
        return list(content.flat)
    parts = n.attr("num_outputs") or n.n_outputs
    chunk = ceil_divide(size, parts)
    if isinstance(size, int) and isinstance(chunk, int):  # the last chunks may be smaller, even empty
        return [max(min(chunk, size - i * chunk), 0) for i in range(parts)]
    return [chunk] * (parts - 1) + [size - chunk * (parts - 1)]


def _split_eval(x: Array, split: Array | None = None, *, axis: int, num_outputs: int | None) -> tuple[Array, ...]:
    if split is None:
        assert num_outputs is not None, "the frontend sets num_outputs"
        chunk = -(-x.shape[axis] // num_outputs)
        ends = [min(chunk * i, x.shape[axis]) for i in range(1, num_outputs)]
    else:
        ends = np.cumsum(split)[:-1].tolist()
    return tuple(np.split(x, ends, axis=axis))


def _split(c: Indexing, index: Indices, *, axis: int, num_outputs: int | None) -> Expr:
    axis %= len(index)
    start: Dim = 0
    for output in range(c.output):
        start = start + c.out_type(output).dims[axis]
    return c.load(0, [*index[:axis], index[axis] + start, *index[axis + 1 :]])


register(OpDef(
    "Split", Kind.INDEX, infer=_split_infer, propagate=propagate_moves(0), refuse=default_refuse, eval=_split_eval,
    compute=_split, attrs={"axis": 0, "num_outputs": None}, static_inputs=(1,),
))  # fmt: skip


# -- Slice


@dataclass(frozen=True, slots=True)
class Cut:
    """Positions start, start + step, ... of one axis, `size` of them."""

    axis: int
    start: Dim
    step: int
    size: Dim


_FAR = 2**31 - 1  # exporters write this or more for "to the end"


def _wrapped(position: Dim, size: Dim) -> Dim:
    """A slice bound counted from the front: negative ones count from the end; -1 for one before the beginning."""
    if isinstance(position, int):
        if position >= _FAR:
            return size
        return -1 if position <= -_FAR else position + size if position < 0 else position
    if certainly_non_negative(position) or size - position in (0, 1):
        return position
    if certainly_positive(-position):
        return position + size
    is_negative = minimum(maximum(-position, 0), 1)
    return position + size * is_negative


def cut(axis: int, size: Dim, start: Dim, end: Dim, step: int) -> Cut:
    """The positions that ONNX's Slice takes of an axis of a given size."""
    start, end = _wrapped(start, size), _wrapped(end, size)
    if step > 0:
        start = maximum(start, 0)
        count = ceil_divide(minimum(end, size) - start, step)
    else:
        start = minimum(start, size - 1)
        count = ceil_divide(start - maximum(end, -1), -step)
    return Cut(axis, start, step, maximum(count, 0))


def _cuts(shape: Shape, starts: Content, ends: Content, axes: Content | None, steps: Content | None) -> list[Cut]:
    where = range(starts.size) if axes is None else [int(a) % len(shape) for a in axes.flat]
    stride = [1] * starts.size if steps is None else [int(s) for s in steps.flat]
    return [cut(a, shape[a], s, e, t) for a, s, e, t in zip(where, starts.flat, ends.flat, stride)]


def _slice_infer(n: Inference) -> list[Type]:
    shape = n.shape(0)
    starts, ends = n.content(1), n.content(2)
    axes, steps = n.integers(3), n.integers(4)
    if axes is not None:
        axis_list(n, axes, len(shape))
    if steps is not None and 0 in steps:
        raise n.error("a step is 0")
    unknown = starts is None or ends is None or (n.has(3) and axes is None) or (n.has(4) and steps is None)
    out = list(shape)
    if unknown:
        count = starts.size if starts is not None else n.shape(1)[0]
        some = range(len(shape)) if n.has(3) or not isinstance(count, int) else range(count)
        for axis in [a % len(shape) for a in axes] if axes is not None else some:
            out[axis] = n.fresh("slice")
        return [n.type(0).with_shape(out)]
    assert starts is not None and ends is not None
    if not starts.size == ends.size == (starts.size if axes is None else len(axes)) <= len(shape):
        raise n.error("starts, ends and axes differ in length")
    for c in _cuts(shape, starts, ends, n.content(3), n.content(4)):
        out[c.axis] = c.size
    return [n.type(0).with_shape(out)]


def _slice_eval(x: Array, starts: Array, ends: Array, axes: Array | None = None, steps: Array | None = None) -> Array:
    where = range(len(starts)) if axes is None else axes.tolist()
    stride = [1] * len(starts) if steps is None else steps.tolist()
    slices = [slice(None)] * x.ndim
    for axis, start, end, step in zip(where, starts.tolist(), ends.tolist(), stride):
        slices[axis] = slice(start, end, step)
    return x[tuple(slices)].copy()


def _slice(c: Indexing, index: Indices) -> Expr:
    position: list[Expr] = list(index)
    contents = [c.content(i) if c.has(i) else None for i in range(1, 5)]
    assert contents[0] is not None and contents[1] is not None
    for part in _cuts(c.type(0).dims, contents[0], contents[1], contents[2], contents[3]):
        position[part.axis] = index[part.axis] * part.step + part.start
    return c.load(0, position)


register(OpDef(
    "Slice", Kind.INDEX, infer=_slice_infer, propagate=propagate_moves(0), refuse=default_refuse, eval=_slice_eval,
    compute=_slice, static_inputs=(1, 2, 3, 4),
))  # fmt: skip


# -- Pad and Tile


@dataclass(frozen=True, slots=True)
class Margin:
    """Padding of one axis: `crop` positions cut at the front, then `before` added; `inner` are left in between."""

    axis: int
    crop: Dim
    before: Dim
    inner: Dim
    size: Dim


PAD_MODES = ("constant", "edge", "reflect", "wrap")


def _margins(shape: Shape, pads: Sequence[Dim], axes: Sequence[int] | None) -> list[Margin]:
    """Negative pads cut first; the modes then see what is left."""
    where = list(range(len(shape))) if axes is None else [a % len(shape) for a in axes]
    out = []
    for axis, before, after in zip(where, pads[: len(where)], pads[len(where) :]):
        crop = maximum(-before, 0)
        inner = shape[axis] - crop - maximum(-after, 0)
        out.append(Margin(axis, crop, maximum(before, 0), inner, shape[axis] + before + after))
    return out


def _pad_infer(n: Inference) -> list[Type]:
    shape, pads, axes = n.shape(0), n.content(1), n.integers(3)
    if n.attr("mode") not in PAD_MODES:
        raise n.error(f"unknown mode {n.attr('mode')!r}, must be one of {', '.join(PAD_MODES)}")
    if axes is not None:
        axis_list(n, axes, len(shape))
    out = list(shape)
    if pads is None or (n.has(3) and axes is None):
        for axis in range(len(shape)) if axes is None else axes:
            out[axis] = n.fresh("pad")
        return [n.type(0).with_shape(out)]
    if pads.size != 2 * (len(shape) if axes is None else len(axes)):
        raise n.error(f"{pads.size} pads do not fit the axes")
    for margin in _margins(shape, list(pads.flat), axes):
        if isinstance(margin.size, int) and margin.size < 0:
            raise n.error(f"the pads cut more than axis {margin.axis} has")
        out[margin.axis] = margin.size
    return [n.type(0).with_shape(out)]


def _pad_eval(x: Array, pads: Array, value: Array | None = None, axes: Array | None = None, *, mode: str) -> Array:
    filler: Any = np.zeros((), x.dtype)[()] if value is None else value.reshape(())[()]
    for m in _margins(x.shape, pads.tolist(), None if axes is None else axes.tolist()):
        assert isinstance(m.crop, int) and isinstance(m.inner, int) and isinstance(m.before, int)
        assert isinstance(m.size, int)
        part = np.take(x, np.arange(m.crop, m.crop + m.inner), axis=m.axis)
        position = np.arange(m.size) - m.before
        if mode == "constant":
            x = np.full((*x.shape[: m.axis], m.size, *x.shape[m.axis + 1 :]), filler, dtype=x.dtype)
            x[(slice(None),) * m.axis + (slice(m.before, m.before + m.inner),)] = part
        elif mode == "edge":
            x = np.take(part, np.clip(position, 0, m.inner - 1), axis=m.axis)
        elif mode == "wrap":
            x = np.take(part, position % m.inner, axis=m.axis)
        else:
            period = max(2 * (m.inner - 1), 1)
            folded = position % period
            x = np.take(part, np.minimum(folded, period - folded) if m.inner > 1 else folded, axis=m.axis)
    return x


def _pad(c: Indexing, index: Indices, *, mode: str) -> Expr:
    axes = [int(a) for a in c.content(3).flat] if c.has(3) else None
    position: list[Expr] = list(index)
    inside: Expr | None = None
    for m in _margins(c.type(0).dims, list(c.content(1).flat), axes):
        if m.crop == 0 and m.inner == m.size:
            continue
        place = index[m.axis] - m.before
        if mode == "constant":
            for bound in () if m.before == 0 else (place >= 0,):
                inside = bound if inside is None else inside & bound
            if m.before + m.inner != m.size:
                bound = place < m.inner
                inside = bound if inside is None else inside & bound
        if mode in ("constant", "edge"):
            place = expr.maximum(expr.minimum(place, m.inner - 1), 0)
        elif mode == "wrap":
            place = place % m.inner
        else:
            period = maximum(m.inner * 2 - 2, 1)
            folded = place % period
            place = folded if m.inner == 1 else expr.minimum(folded, period - folded)
        position[m.axis] = place + m.crop
    element = c.load(0, position)
    if inside is None:
        return element
    filler = c.load(2, [0] * c.type(2).rank) if c.has(2) else const(0, element.dtype)
    return select(inside, element, filler)


register(OpDef(
    "Pad", Kind.INDEX, infer=_pad_infer, propagate=propagate_moves(0), refuse=default_refuse, eval=_pad_eval,
    compute=_pad, attrs={"mode": "constant"}, static_inputs=(1, 3),
))  # fmt: skip


def _tile_infer(n: Inference) -> list[Type]:
    shape, repeats = n.shape(0), n.content(1)
    if repeats is None:
        return [n.type(0).with_shape(unknown_dims(n, len(shape)))]
    if repeats.size != len(shape):
        raise n.error(f"{repeats.size} repeats for {len(shape)} axes")
    return [n.type(0).with_shape(d * r for d, r in zip(shape, repeats.flat))]


def _tile(c: Indexing, index: Indices) -> Expr:
    sizes, repeats = c.type(0).dims, c.content(1).flat
    return c.load(0, [i if r == 1 else i % d for i, d, r in zip(index, sizes, repeats)])


register(OpDef(
    "Tile", Kind.INDEX, infer=_tile_infer, propagate=propagate_moves(0), refuse=default_refuse,
    eval=lambda x, repeats: np.tile(x, repeats.tolist()), compute=_tile, static_inputs=(1,),
))  # fmt: skip


def _center_crop_pad_infer(n: Inference) -> list[Type]:
    shape, axes = list(n.shape(0)), n.attr("axes")
    where = range(len(shape)) if axes is None else axis_list(n, axes, len(shape))
    content = n.content(1)
    for position, axis in enumerate(where):
        shape[axis] = n.fresh() if content is None else content.flat[position]
    return [n.type(0).with_shape(shape)]


def _center_pads(size: Dim, target: Dim) -> tuple[Dim, Dim]:
    """Pads (negative to cut) that centre; the odd one goes to the end."""
    change = target - size
    before = floor_divide(maximum(change, 0), 2) - floor_divide(maximum(-change, 0), 2)
    return before, change - before


def _center_crop_pad(b: Builder, node: Node) -> list[Value]:
    x = node.inputs[0]
    assert x is not None
    pads = [_center_pads(size, target) for size, target in zip(x.shape, node.output.shape)]
    return [b.op("Pad", x, b.shape([p[0] for p in pads] + [p[1] for p in pads]))]


def _center_crop_pad_eval(x: Array, shape: Array, *, axes: Sequence[int] | None) -> Array:
    target = list(x.shape)
    for axis, size in zip(range(x.ndim) if axes is None else axes, shape.tolist()):
        target[axis] = size
    pads = [_center_pads(size, wanted) for size, wanted in zip(x.shape, target)]
    return _pad_eval(x, np.array([p[0] for p in pads] + [p[1] for p in pads]), mode="constant")


register(OpDef(
    "CenterCropPad", Kind.EXPAND, infer=_center_crop_pad_infer, eval=_center_crop_pad_eval, expand=_center_crop_pad,
    refuse=default_refuse, attrs={"axes": None}, static_inputs=(1,),
))  # fmt: skip


# -- blocks of space and depth


def _depth_to_space_infer(n: Inference) -> list[Type]:
    batch, channels, height, width = n.shape(0)
    b = n.attr("blocksize")
    if n.attr("mode") not in ("DCR", "CRD"):
        raise n.error(f"unknown mode {n.attr('mode')!r}, must be DCR or CRD")
    if isinstance(channels, int) and channels % (b * b):
        raise n.error(f"{channels} channels are no multiple of {b}**2")
    return [n.type(0).with_shape((batch, floor_divide(channels, b * b), height * b, width * b))]


def _depth_to_space_eval(x: Array, *, blocksize: int, mode: str) -> Array:
    n, c, h, w = x.shape
    b, depth = blocksize, c // blocksize**2
    if mode == "DCR":
        return x.reshape(n, b, b, depth, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, depth, h * b, w * b)
    return x.reshape(n, depth, b, b, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, depth, h * b, w * b)


def _depth_to_space(c: Indexing, index: Indices, *, blocksize: int, mode: str) -> Expr:
    batch, channel, row, column = index
    inside = row % blocksize * blocksize + column % blocksize
    if mode == "DCR":
        channel = inside * c.out_type().dims[1] + channel
    else:
        channel = channel * (blocksize * blocksize) + inside
    return c.load(0, [batch, channel, row // blocksize, column // blocksize])


register(OpDef(
    "DepthToSpace", Kind.INDEX, infer=_depth_to_space_infer, eval=_depth_to_space_eval, compute=_depth_to_space,
    refuse=default_refuse, attrs={"blocksize": 1, "mode": "DCR"},
))  # fmt: skip


def _space_to_depth_infer(n: Inference) -> list[Type]:
    batch, channels, height, width = n.shape(0)
    b = n.attr("blocksize")
    if any(isinstance(d, int) and d % b for d in (height, width)):
        raise n.error(f"height and width must be multiples of the block size {b}")
    return [n.type(0).with_shape((batch, channels * (b * b), floor_divide(height, b), floor_divide(width, b)))]


def _space_to_depth_eval(x: Array, *, blocksize: int, mode: str) -> Array:
    n, c, h, w = x.shape
    b = blocksize
    cut_up = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return cut_up.transpose(order).reshape(n, c * b * b, h // b, w // b)


def _space_to_depth(c: Indexing, index: Indices, *, blocksize: int, mode: str) -> Expr:
    batch, channel, row, column = index
    b, channels = blocksize, c.type(0).dims[1]
    if mode == "DCR":
        inside, channel = channel // channels, channel % channels
    else:
        inside, channel = channel % (b * b), channel // (b * b)
    return c.load(0, [batch, channel, row * b + inside // b, column * b + inside % b])


register(OpDef(
    "SpaceToDepth", Kind.INDEX, infer=_space_to_depth_infer, eval=_space_to_depth_eval, compute=_space_to_depth,
    refuse=default_refuse, attrs={"blocksize": 1, "mode": "DCR"},
))  # fmt: skip


# -- triangles and reversed sequences


def _trilu_infer(n: Inference) -> list[Type]:
    if n.rank(0) < 2:
        raise n.error("the input must have at least two axes")
    return [n.type(0)]


def _trilu_eval(x: Array, k: Array | None = None, *, upper: int) -> Array:
    diagonal = 0 if k is None else int(k.item())
    keep = np.triu(np.ones(x.shape[-2:], bool), diagonal) if upper else np.tril(np.ones(x.shape[-2:], bool), diagonal)
    return np.where(keep, x, np.zeros((), x.dtype))


def _trilu(c: Indexing, index: Indices, *, upper: int) -> Expr:
    distance = index[-1] - index[-2]
    k = c.content(1).item() if c.has(1) else 0
    element = c.load(0, index)
    keep = distance >= k if upper else distance <= k
    return select(keep, element, const(0, element.dtype))


for _domain in ("", "com.microsoft"):
    register(OpDef(
        "Trilu", Kind.INDEX, infer=_trilu_infer, eval=_trilu_eval, compute=_trilu, refuse=default_refuse,
        attrs={"upper": 1}, static_inputs=(1,), domain=_domain,
    ))  # fmt: skip


def _reverse_sequence_infer(n: Inference) -> list[Type]:
    if {n.attr("time_axis"), n.attr("batch_axis")} != {0, 1} or n.rank(0) < 2:
        raise n.error("time_axis and batch_axis must be 0 and 1, one each")
    return [n.type(0)]


def _reverse_sequence_eval(x: Array, lengths: Array, *, time_axis: int, batch_axis: int) -> Array:
    by_batch = x if batch_axis == 0 else np.swapaxes(x, 0, 1)
    out = by_batch.copy()
    for row, length in enumerate(lengths.tolist()):
        out[row, :length] = by_batch[row, :length][::-1]
    return out if batch_axis == 0 else np.swapaxes(out, 0, 1).copy()


def _reverse_sequence(c: Indexing, index: Indices, *, time_axis: int, batch_axis: int) -> Expr:
    time, size = index[time_axis], c.type(0).dims[time_axis]
    length = c.load(1, [index[batch_axis]])
    mirrored = expr.maximum(expr.minimum(length - 1 - time, size - 1), 0)
    position = list(index)
    position[time_axis] = select(time < length, mirrored, time)
    return c.load(0, position)


register(OpDef(
    "ReverseSequence", Kind.INDEX, infer=_reverse_sequence_infer, eval=_reverse_sequence_eval,
    compute=_reverse_sequence, refuse=default_refuse, attrs={"time_axis": 0, "batch_axis": 1},
))  # fmt: skip
