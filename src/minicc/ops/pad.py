"""Ops that surround or repeat a tensor: Pad in all modes, CenterCropPad, Tile.

Pads may be symbolic, and negative to cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir import expr
from minicc.ir.dims import Dim, floor_divide, maximum
from minicc.ir.expr import Expr, const, select
from minicc.ir.opdef import Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import Type
from minicc.ops.helpers import (
    Array,
    Shape,
    axis_list,
    default_refuse,
    elements,
    propagate_moves,
    unknown_dims,
)

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

Indices = tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Margin:
    """Padding of one axis: `crop` are cut at the front, `before` added there; `inner` are left in between."""

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
    for margin in _margins(shape, elements(pads), axes):
        if isinstance(margin.size, int) and margin.size < 0:
            raise n.error(f"the pads cut more than axis {margin.axis} has")
        out[margin.axis] = margin.size
    return [n.type(0).with_shape(out)]


def _pad_eval(
    x: Array, pads: Array, value: Array | None = None, axes: Array | None = None, *, mode: str
) -> Array:
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


def _folds_once(m: Margin) -> bool:
    """Whether a reflection never comes back from the other end, as it nearly always does not: no division is needed then."""
    sizes = m.before, m.inner, m.size - m.before - m.inner
    if not all(isinstance(size, int) for size in sizes):
        return False
    before, inner, after = sizes
    return inner > 1 and max(before, after) < inner  # type: ignore[operator, type-var]


def _pad(c: Indexing, index: Indices, *, mode: str) -> Expr:
    axes = elements(c.content(3)) if c.has(3) else None
    position: list[Expr] = list(index)
    inside: Expr | None = None
    for m in _margins(c.type(0).dims, elements(c.content(1)), axes):
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
        elif _folds_once(m):
            place = expr.maximum(place, -place)
            place = expr.minimum(place, m.inner * 2 - 2 - place)
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
    return [n.type(0).with_shape(d * r for d, r in zip(shape, elements(repeats)))]


def _tile_expand(b: Builder, node: Node) -> list[Value]:
    """An axis that is repeated becomes two, of which the first has stride 0."""
    x, repeats = node.inputs
    assert x is not None and repeats is not None and repeats.content is not None
    apart: list[Dim] = []
    wide: list[Dim] = []
    for size, count in zip(x.shape, elements(repeats.content)):
        apart += [size] if count == 1 else [1, size]
        wide += [size] if count == 1 else [count, size]
    if len(apart) == len(x.shape):
        return [b.op("Identity", x)]
    split = b.op("Reshape", x, b.shape(apart), allowzero=1)
    return [b.op("Reshape", b.op("Expand", split, b.shape(wide)), b.shape(node.output.shape), allowzero=1)]


register(OpDef(
    "Tile", Kind.EXPAND, infer=_tile_infer, propagate=propagate_moves(0), refuse=default_refuse,
    eval=lambda x, repeats: np.tile(x, repeats.tolist()), expand=_tile_expand, static_inputs=(1,),
))  # fmt: skip


def _center_crop_pad_infer(n: Inference) -> list[Type]:
    shape, axes = list(n.shape(0)), n.attr("axes")
    where = range(len(shape)) if axes is None else axis_list(n, axes, len(shape))
    content = n.content(1)
    for position, axis in enumerate(where):
        shape[axis] = n.fresh() if content is None else elements(content)[position]
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
    "CenterCropPad", Kind.EXPAND, infer=_center_crop_pad_infer, eval=_center_crop_pad_eval,
    expand=_center_crop_pad,
    refuse=default_refuse, attrs={"axes": None}, static_inputs=(1,),
))  # fmt: skip
