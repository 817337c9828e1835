"""Gathers and scatters: positions that come from data.

Kernels wrap negative positions and clamp the rest into the axis, so that no input makes them touch foreign
memory; `eval` raises for a position out of range. Searches and sorts are in search.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minicc.ir import expr
from minicc.ir.dims import Dim, SymbolicDim, maximum, minimum
from minicc.ir.expr import Expr, cast, equal, select
from minicc.ir.opdef import Content, Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, Type, i64
from minicc.ops.helpers import (
    Array,
    Contents,
    as_dim,
    computed_in_f32,
    default_refuse,
    propagate_by_eval,
    propagate_moves,
    require_same_dtype,
)

Indices = tuple[Expr, ...]


def safe_position(value: Expr, size: Dim) -> Expr:
    """A position read from data: negative ones count from the end, what is out of range is clamped."""
    position = cast(value, i64)
    if position.op == "const":  # a position that is the same for all elements stays affine
        known = int(position.arg)  # type: ignore[call-overload]
        return expr.dim(maximum(minimum(known + size if known < 0 else known, size - 1), 0) if known else 0)
    wrapped = select(position < 0, position + size, position)
    return expr.maximum(expr.minimum(wrapped, size - 1), 0)


def require_integers(n: Inference, position: int) -> None:
    """Raises ShapeError unless an input has a signed or unsigned integer type."""
    if not n.dtype(position).is_integer:
        raise n.error(f"input {position} must be integers, got {n.dtype(position)}")


# -- gathers


def _gather_infer(n: Inference) -> list[Type]:
    require_integers(n, 1)
    shape, indices = n.shape(0), n.shape(1)
    axis = n.axis(n.attr("axis"), len(shape))
    return [n.type(0).with_shape((*shape[:axis], *indices, *shape[axis + 1 :]))]


def _gather(c: Indexing, index: Indices, *, axis: int) -> Expr:
    dims, rank = c.type(0).dims, c.type(1).rank
    axis %= len(dims)
    picked = safe_position(c.load(1, index[axis : axis + rank]), dims[axis])
    return c.load(0, [*index[:axis], picked, *index[axis + rank :]])


register(OpDef(
    "Gather", Kind.INDEX, infer=_gather_infer, propagate=propagate_moves(0), refuse=default_refuse,
    eval=lambda x, indices, *, axis: np.asarray(np.take(x, indices, axis=axis)), compute=_gather,
    attrs={"axis": 0},
))  # fmt: skip


def _gather_elements_infer(n: Inference) -> list[Type]:
    require_integers(n, 1)
    n.axis(n.attr("axis"), n.rank(0))
    if n.rank(1) != n.rank(0):
        raise n.error("data and indices have different ranks")
    return [n.type(0).with_shape(n.shape(1))]


def _element_grid(indices: Array, axis: int) -> tuple[Array, ...]:
    """Where each element of `indices` points: its own position, but along `axis` its value."""
    grid: list[Array] = list(np.indices(indices.shape))
    grid[axis] = indices.astype(np.int64)
    return tuple(grid)


def _gather_elements(c: Indexing, index: Indices, *, axis: int) -> Expr:
    position = list(index)
    position[axis] = safe_position(c.load(1, index), c.type(0).dims[axis])
    return c.load(0, position)


register(OpDef(
    "GatherElements", Kind.INDEX, infer=_gather_elements_infer, propagate=propagate_moves(0),
    refuse=default_refuse,
    eval=lambda x, indices, *, axis: x[_element_grid(indices, axis)],
    compute=_gather_elements, attrs={"axis": 0},
))  # fmt: skip


def _gather_nd_infer(n: Inference) -> list[Type]:
    require_integers(n, 1)
    shape, indices, batch = n.shape(0), n.shape(1), n.attr("batch_dims")
    depth = indices[-1]
    if not isinstance(depth, int):
        return [n.type(0).with_shape(None)]
    if not 0 <= batch < min(len(shape), len(indices)) or not 1 <= depth <= len(shape) - batch:
        raise n.error(f"indices of {depth} axes after {batch} batch axes do not fit rank {len(shape)}")
    return [n.type(0).with_shape((*indices[:-1], *shape[batch + depth :]))]


def _gather_nd_eval(x: Array, indices: Array, *, batch_dims: int) -> Array:
    lead = indices.shape[:batch_dims]
    batches = np.indices(lead).reshape(batch_dims, *lead, *(1,) * (indices.ndim - 1 - batch_dims))
    return np.asarray(x[(*batches, *np.moveaxis(indices, -1, 0))])


def _gather_nd(c: Indexing, index: Indices, *, batch_dims: int) -> Expr:
    dims, indices = c.type(0).dims, c.type(1).dims
    depth = indices[-1]
    assert isinstance(depth, int)
    lead, rest = index[: len(indices) - 1], index[len(indices) - 1 :]
    picked = [safe_position(c.load(1, [*lead, k]), dims[batch_dims + k]) for k in range(depth)]
    return c.load(0, [*index[:batch_dims], *picked, *rest])


register(OpDef(
    "GatherND", Kind.INDEX, infer=_gather_nd_infer, propagate=propagate_moves(0), refuse=default_refuse,
    eval=_gather_nd_eval, compute=_gather_nd, attrs={"batch_dims": 0},
))  # fmt: skip


# -- scatters

REDUCTIONS: dict[str, Callable[..., None]] = {
    "add": np.add.at, "mul": np.multiply.at, "max": np.maximum.at, "min": np.minimum.at,
}  # fmt: skip


def _scatter(x: Array, where: tuple[Array, ...], updates: Array, reduction: str) -> Array:
    """A copy of x with updates stored, or combined by `reduction`, one after the other."""
    out = x.copy()
    if reduction == "none":
        out[where] = updates
    else:
        REDUCTIONS[reduction](out, where, updates)
    return out


def _scatter_infer(n: Inference) -> list[Type]:
    require_integers(n, 1)
    require_same_dtype(n, (0, 2))
    if n.attr("reduction") not in ("none", *REDUCTIONS):
        raise n.error(f"unknown reduction {n.attr('reduction')!r}, must be none, {', '.join(REDUCTIONS)}")
    return [n.type(0)]


def _scatter_elements_infer(n: Inference) -> list[Type]:
    n.axis(n.attr("axis"), n.rank(0))
    if not n.rank(0) == n.rank(1) == n.rank(2):
        raise n.error("data, indices and updates have different ranks")
    return _scatter_infer(n)


def _scatter_elements_eval(x: Array, indices: Array, updates: Array, *, axis: int, reduction: str) -> Array:
    return _scatter(x, _element_grid(indices, axis), updates[tuple(map(slice, indices.shape))], reduction)


def _scatter_content(n: Inference) -> Contents:
    return propagate_moves(0, 2)(n) if n.attr("reduction") == "none" else propagate_by_eval(n)


register(OpDef(
    "ScatterElements", Kind.TEMPLATE, infer=_scatter_elements_infer, propagate=_scatter_content,
    refuse=default_refuse, eval=computed_in_f32(_scatter_elements_eval), attrs={"axis": 0,
    "reduction": "none"},
))  # fmt: skip


def _scatter_nd_infer(n: Inference) -> list[Type]:
    depth, rank = n.shape(1)[-1], n.rank(0)
    if isinstance(depth, int) and (depth > rank or n.rank(2) != n.rank(1) - 1 + rank - depth):
        raise n.error("the ranks of data, indices and updates do not fit")
    return _scatter_infer(n)


def _scatter_nd_eval(x: Array, indices: Array, updates: Array, *, reduction: str) -> Array:
    return _scatter(x, tuple(np.moveaxis(indices, -1, 0)), updates, reduction)


register(OpDef(
    "ScatterND", Kind.TEMPLATE, infer=_scatter_nd_infer, propagate=_scatter_content, refuse=default_refuse,
    eval=computed_in_f32(_scatter_nd_eval), attrs={"reduction": "none"},
))  # fmt: skip


def _tensor_scatter_infer(n: Inference) -> list[Type]:
    require_same_dtype(n, (0, 1))
    if n.attr("mode") not in ("linear", "circular"):
        raise n.error(f"unknown mode {n.attr('mode')!r}, must be linear or circular")
    if n.axis(n.attr("axis"), n.rank(0)) == 0:
        raise n.error("the axis must not be the batch axis")
    return [n.type(0)]


def _tensor_scatter_eval(
    past: Array, update: Array, starts: Array | None = None, *, axis: int, mode: str
) -> Array:
    out, length = past.copy(), past.shape[axis]
    by_time, new = np.moveaxis(out, axis, 1), np.moveaxis(update, axis, 1)
    for row in range(past.shape[0]):
        where = np.arange(new.shape[1]) + (0 if starts is None else int(starts[row]))
        by_time[row, where % length if mode == "circular" else where] = new[row]
    return out


register(OpDef(
    "TensorScatter", Kind.TEMPLATE, infer=_tensor_scatter_infer, refuse=default_refuse, eval=_tensor_scatter_eval,
    attrs={"axis": -2, "mode": "linear"},
))  # fmt: skip


# -- one-hot


def _depth(content: Content) -> Dim:
    """The depth input of OneHot, a scalar or one element of any numeric type."""
    value = content.item()
    known = as_dim(value)
    return int(value) if known is None else known


def _one_hot_infer(n: Inference) -> list[Type]:
    indices, content = n.shape(0), n.content(1)
    axis = n.axis(n.attr("axis"), len(indices) + 1)
    depth = n.fresh("depth") if content is None else _depth(content)
    return [TensorType(n.dtype(2), (*indices[:axis], depth, *indices[axis:]))]


def _one_hot_eval(indices: Array, depth: Array, values: Array, *, axis: int) -> Array:
    count = int(depth.item())
    axis += indices.ndim + 1 if axis < 0 else 0
    wanted = indices.astype(np.int64)
    wanted = np.expand_dims(np.where(wanted < 0, wanted + count, wanted), axis)
    positions: Sequence[int] = [count if i == axis else 1 for i in range(indices.ndim + 1)]
    return np.asarray(np.where(wanted == np.arange(count).reshape(positions), values[1], values[0]))


def _one_hot(c: Indexing, index: Indices, *, axis: int) -> Expr:
    axis %= len(index)
    depth = _depth(c.content(1))
    wanted = cast(c.load(0, [*index[:axis], *index[axis + 1 :]]), i64)
    wanted = select(
        wanted < 0, wanted + (expr.dim(depth) if isinstance(depth, SymbolicDim) else depth), wanted
    )
    return select(equal(wanted, index[axis]), c.load(2, [1]), c.load(2, [0]))


register(OpDef(
    "OneHot", Kind.INDEX, infer=_one_hot_infer, propagate=propagate_by_eval, refuse=default_refuse,
    eval=_one_hot_eval, compute=_one_hot, attrs={"axis": -1}, static_inputs=(1,),
))  # fmt: skip
