"""Ops that join, cut or reorder elements at positions known from shapes.

Pads are in pad, positions that come from data (gathers, scatters) in index. Slices may have symbolic bounds:
what cannot be decided at compile time becomes a minimum or maximum of sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minicc.ir import expr
from minicc.ir.dims import Dim, ceil_divide, floor_divide, maximum, minimum
from minicc.ir.expr import Expr, const, select
from minicc.ir.opdef import Content, Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import Type
from minicc.ops.helpers import (
    Array,
    Shape,
    axis_list,
    certainly_non_negative,
    certainly_positive,
    default_refuse,
    elements,
    propagate_moves,
    require_same_dtype,
    unknown_dims,
)

if TYPE_CHECKING:
    pass

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
    """Picks the part by position; each part is read at a clamped position, also where another is picked."""
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
    if not n.has(1) and n.attr("num_outputs") is None:
        raise n.error("needs the input split or the attribute num_outputs")
    if n.has(1):
        content = n.content(1)
        if content is None:
            return list(unknown_dims(n, n.n_outputs))
        total = sum(elements(content))
        if isinstance(total, int) and isinstance(size, int) and total != size:
            raise n.error(f"the parts sum up to {total}, the axis has {size}")
        return elements(content)
    parts = n.attr("num_outputs")
    chunk = ceil_divide(size, parts)
    if isinstance(size, int) and isinstance(chunk, int):  # the last chunks may be smaller, even empty
        return [max(min(chunk, size - i * chunk), 0) for i in range(parts)]
    return [chunk] * (parts - 1) + [size - chunk * (parts - 1)]


def _split_eval(
    x: Array, split: Array | None = None, *, axis: int, num_outputs: int | None
) -> tuple[Array, ...]:
    if split is None:
        assert num_outputs is not None
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
    "Split", Kind.INDEX, infer=_split_infer, propagate=propagate_moves(0), refuse=default_refuse,
    eval=_split_eval,
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
    """A slice bound counted from the front (negative ones count from the end); -1 is before the beginning."""
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


def _cuts(
    shape: Shape, starts: Content, ends: Content, axes: Content | None, steps: Content | None
) -> list[Cut]:
    where = range(starts.size) if axes is None else [a % len(shape) for a in elements(axes)]
    stride = [1] * starts.size if steps is None else elements(steps)
    return [cut(a, shape[a], s, e, t) for a, s, e, t in zip(where, elements(starts), elements(ends), stride)]


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


def _slice_eval(
    x: Array, starts: Array, ends: Array, axes: Array | None = None, steps: Array | None = None
) -> Array:
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
    "Slice", Kind.INDEX, infer=_slice_infer, propagate=propagate_moves(0), refuse=default_refuse,
    eval=_slice_eval,
    compute=_slice, static_inputs=(1, 2, 3, 4),
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
    "DepthToSpace", Kind.INDEX, infer=_depth_to_space_infer, eval=_depth_to_space_eval,
    compute=_depth_to_space,
    refuse=default_refuse, attrs={"blocksize": 1, "mode": "DCR"},
))  # fmt: skip


def _space_to_depth_infer(n: Inference) -> list[Type]:
    batch, channels, height, width = n.shape(0)
    b = n.attr("blocksize")
    if any(isinstance(d, int) and d % b for d in (height, width)):
        raise n.error(f"height and width must be multiples of the block size {b}")
    return [
        n.type(0).with_shape((batch, channels * (b * b), floor_divide(height, b), floor_divide(width, b)))
    ]


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
    "SpaceToDepth", Kind.INDEX, infer=_space_to_depth_infer, eval=_space_to_depth_eval,
    compute=_space_to_depth,
    refuse=default_refuse, attrs={"blocksize": 1, "mode": "DCR"},
))  # fmt: skip


# -- triangles and reversed sequences


def _trilu_infer(n: Inference) -> list[Type]:
    if n.rank(0) < 2:
        raise n.error("the input must have at least two axes")
    return [n.type(0)]


def _trilu_eval(x: Array, k: Array | None = None, *, upper: int) -> Array:
    diagonal = 0 if k is None else int(k.item())
    keep = (
        np.triu(np.ones(x.shape[-2:], bool), diagonal)
        if upper
        else np.tril(np.ones(x.shape[-2:], bool), diagonal)
    )
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
