"""Reductions over axes, and the positions of extrema.

Half types accumulate in float32 and are rounded once, at the end. Reductions of integers that need a root or
a logarithm compute in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from minicc.ir.dims import Dim, maximum, minimum, product
from minicc.ir.expr import Expr, cast, const, dim, select, unary
from minicc.ir.opdef import Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import DType, TensorType, Type, bf16, f16, f32, f64, i64
from minicc.ops.helpers import (
    Array,
    Contents,
    Shape,
    as_dim,
    axis_list,
    computed_in_f32,
    default_refuse,
    elements,
    propagate_by_eval,
    unknown_dims,
)

Indices = tuple[Expr, ...]


def reduced_axes(rank: int, axes: Sequence[int] | None, noop_with_empty_axes: int) -> list[int]:
    """The axes a reduction runs over; all of them when none are named, unless that is to do nothing."""
    if axes:
        return sorted(a % rank for a in axes)
    return [] if noop_with_empty_axes else list(range(rank))


def _reduce_infer(n: Inference) -> list[Type]:
    shape, keep = n.shape(0), n.attr("keepdims")
    axes = n.integers(1)
    if n.has(1) and axes is None:
        count = n.shape(1)[0]
        rank = len(shape) if keep else len(shape) - count if isinstance(count, int) and count else None
        return [n.type(0).with_shape(None if rank is None else unknown_dims(n, rank))]
    axis_list(n, axes or (), len(shape))
    gone = reduced_axes(len(shape), axes, n.attr("noop_with_empty_axes"))
    return [n.type(0).with_shape(_without(shape, gone, keep))]


def _without(shape: Shape, axes: Sequence[int], keepdims: int) -> Shape:
    if keepdims:
        return tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


Body = Callable[[Expr], Expr]
Fold = Callable[[str, Body], Expr]  # (kind, body of an element) -> the reduction


def _reducer(finish: Callable[[Fold, Expr], Expr], exact: bool) -> Callable[..., Expr]:
    """The `compute` of a reduction: `finish(fold, count)` combines reductions of the elements.

    exact: integers stay integers; otherwise they are computed in float64.
    """

    def compute(c: Indexing, index: Indices, *, keepdims: int, noop_with_empty_axes: int) -> Expr:
        dims, dtype = c.type(0).dims, c.type(0).dtype
        wide = _compute_type(dtype, exact)
        axes = reduced_axes(len(dims), elements(c.content(1)) if c.has(1) else None, noop_with_empty_axes)
        extents = [dims[axis] for axis in axes]

        def fold(kind: str, body: Body) -> Expr:
            def element(*inner: Expr) -> Expr:
                outer = iter(index)
                position = []
                for axis in range(len(dims)):
                    if keepdims or axis not in axes:
                        kept = next(outer)
                    position.append(inner[axes.index(axis)] if axis in axes else kept)
                return body(cast(c.load(0, position), wide))

            return c.reduce(kind, extents, element) if axes else element()

        return cast(finish(fold, cast(dim(product(extents)), wide)), dtype)

    return compute


def _compute_type(dtype: DType, exact: bool) -> DType:
    if dtype in (f16, bf16):
        return f32
    return dtype if exact or dtype.is_float else f64


def _reduction(name: str, evaluate: Callable[..., Any], finish: Callable[[Fold, Expr], Expr], *,
exact: bool = False,
               propagate: Callable[[Inference], Contents] = propagate_by_eval) -> None:  # fmt: skip
    """Register a reduction; `evaluate(x, axis=, keepdims=)` is numpy's, on float64 for inexact integers."""

    def eval_(x: Array, axes: Array | None = None, *, keepdims: int, noop_with_empty_axes: int) -> Any:
        where = reduced_axes(x.ndim, None if axes is None else axes.tolist(), noop_with_empty_axes)
        wide = x if exact or x.dtype.kind == "f" else x.astype(np.float64)
        return np.asarray(evaluate(wide, axis=tuple(where), keepdims=bool(keepdims))).astype(x.dtype)

    register(OpDef(
        name, Kind.REDUCE, infer=_reduce_infer, propagate=propagate, refuse=default_refuse,
        eval=computed_in_f32(eval_), compute=_reducer(finish, exact),
        attrs={"keepdims": 1, "noop_with_empty_axes": 0}, static_inputs=(1,),
    ))  # fmt: skip


def _propagate_fold(function: Callable[[Dim, Dim], Dim]) -> Callable[[Inference], Contents]:
    """`propagate` of a reduction of dimensions."""

    def propagate(n: Inference) -> Contents:
        known, content = propagate_by_eval(n), n.content(0)
        axes = n.integers(1)
        if known[0] is not None or content is None or content.size == 0 or (n.has(1) and axes is None):
            return known
        where = reduced_axes(content.ndim, axes, n.attr("noop_with_empty_axes"))
        dims = [as_dim(v) for v in content.flat]
        if any(d is None for d in dims):
            return known
        moved = np.moveaxis(content, where, range(len(where)))
        rest = moved.shape[len(where) :]
        columns = moved.reshape(-1, int(np.prod(rest, dtype=np.int64)))
        out = np.empty(columns.shape[1], dtype=object)
        for column in range(out.size):
            out[column] = reduce(function, [as_dim(v) for v in columns[:, column]])  # type: ignore[arg-type]
        shape = [int(d) for d in _without(content.shape, where, n.attr("keepdims"))]  # type: ignore[arg-type]
        return [out.reshape(shape)]

    return propagate


def _extremum_eval(function: Any, largest: bool) -> Callable[..., Any]:
    """np.max or np.min with the identity of the type for empty input."""

    def evaluate(x: Array, *, axis: tuple[int, ...], keepdims: bool) -> Any:
        if x.dtype.kind == "b":
            return (np.any if largest else np.all)(x, axis=axis, keepdims=keepdims)
        if x.dtype.kind == "f":
            initial: Any = -np.inf if largest else np.inf
        else:
            initial = np.iinfo(x.dtype).min if largest else np.iinfo(x.dtype).max
        return function(x, axis=axis, keepdims=keepdims, initial=initial)

    return evaluate


def _same(x: Expr) -> Expr:
    return x


def _square(x: Expr) -> Expr:
    return x * x


def _sum_eval(x: Array, **where: Any) -> Any:
    return np.sum(x, dtype=x.dtype, **where)


def _mean_eval(x: Array, *, axis: tuple[int, ...], keepdims: bool) -> Any:
    count = int(np.prod([x.shape[a] for a in axis], dtype=np.int64))
    total = np.sum(x, axis=axis, keepdims=keepdims, dtype=x.dtype)
    if x.dtype.kind == "f":
        return np.divide(total, x.dtype.type(count))
    return np.trunc(total / count)


_reduction("ReduceSum", _sum_eval, lambda fold, n: fold("sum", _same), exact=True,
           propagate=_propagate_fold(lambda x, y: x + y))  # fmt: skip
_reduction("ReduceProd", lambda x, **w: np.prod(x, dtype=x.dtype, **w), lambda fold, n: fold("prod", _same),
           exact=True, propagate=_propagate_fold(lambda x, y: x * y))  # fmt: skip
_reduction("ReduceMax", _extremum_eval(np.max, True), lambda fold, n: fold("max", _same), exact=True,
           propagate=_propagate_fold(maximum))  # fmt: skip
_reduction("ReduceMin", _extremum_eval(np.min, False), lambda fold, n: fold("min", _same), exact=True,
           propagate=_propagate_fold(minimum))  # fmt: skip
_reduction("ReduceMean", _mean_eval, lambda fold, n: fold("sum", _same) / n, exact=True)
_reduction(
    "ReduceSumSquare", lambda x, **w: _sum_eval(x * x, **w), lambda fold, n: fold("sum", _square), exact=True
)
_reduction("ReduceL1", lambda x, **w: _sum_eval(np.abs(x), **w),
           lambda fold, n: fold("sum", lambda x: unary("abs", x)), exact=True)  # fmt: skip
_reduction("ReduceL2", lambda x, **w: np.sqrt(_sum_eval(x * x, **w)),
           lambda fold, n: unary("sqrt", fold("sum", _square)))  # fmt: skip
_reduction("ReduceLogSum", lambda x, **w: np.log(_sum_eval(x, **w)),
           lambda fold, n: unary("log", fold("sum", _same)))  # fmt: skip


def _log_sum_exp_eval(x: Array, *, axis: tuple[int, ...], keepdims: bool) -> Any:
    top = np.max(x, axis=axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0).astype(x.dtype)
    out = np.log(np.sum(np.exp(x - top), axis=axis, keepdims=True)) + top
    return out if keepdims else np.squeeze(out, axis)


def _log_sum_exp(fold: Fold, count: Expr) -> Expr:
    """log(sum(exp(x - m))) + m with the maximum m, so that exp does not overflow; m = 0 if infinite."""
    top = fold("max", _same)
    shift = select(unary("abs", top) < float("inf"), top, const(0, top.dtype))
    return unary("log", fold("sum", lambda x: unary("exp", x - shift))) + shift


_reduction("ReduceLogSumExp", _log_sum_exp_eval, _log_sum_exp)


# -- positions of extrema


def _arg_infer(n: Inference) -> list[Type]:
    shape = n.shape(0)
    axis = n.axis(n.attr("axis"), len(shape))
    if shape[axis] == 0:
        raise n.error(f"axis {axis} is empty, it has no extremum")
    return [TensorType(i64, _without(shape, [axis], n.attr("keepdims")))]


def _arg_extremum(name: str, function: Any, kind: str) -> None:
    def eval_(x: Array, *, axis: int, keepdims: int, select_last_index: int) -> Array:
        if select_last_index:
            found = x.shape[axis] - 1 - function(np.flip(x, axis), axis=axis, keepdims=bool(keepdims))
        else:
            found = function(x, axis=axis, keepdims=bool(keepdims))
        return np.asarray(found, dtype=np.int64)

    def compute(c: Indexing, index: Indices, *, axis: int, keepdims: int, select_last_index: int) -> Expr:
        dims = c.type(0).dims
        axis %= len(dims)
        before, after = index[:axis], index[axis + 1 if keepdims else axis :]
        full = f"{kind}_last" if select_last_index else kind
        return c.reduce(full, [dims[axis]], lambda r: c.load(0, [*before, r, *after]))

    register(OpDef(
        name, Kind.REDUCE, infer=_arg_infer, propagate=propagate_by_eval, refuse=default_refuse,
        eval=computed_in_f32(eval_), compute=compute, attrs={"axis": 0, "keepdims": 1,
        "select_last_index": 0},
    ))  # fmt: skip


_arg_extremum("ArgMax", np.argmax, "argmax")
_arg_extremum("ArgMin", np.argmin, "argmin")
