"""Sorting, running sums, and ops whose output size depends on the data.

TopK and the running ops have kernels of their own; the others run on the host, and their sizes are fresh
symbols.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minicc.ir.dims import product
from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, Type, i64
from minicc.ops.helpers import (
    Array,
    as_dim,
    computed_in_f32,
    default_refuse,
    is_half,
    propagate_by_eval,
    widen,
)

# -- TopK, CumSum, CumProd


def _top_k_infer(n: Inference) -> list[Type]:
    shape, content = n.shape(0), n.content(1)
    axis = n.axis(n.attr("axis"), len(shape))
    count = n.fresh("k") if content is None else as_dim(content.item())
    size = shape[axis]
    if count is None or (isinstance(count, int) and isinstance(size, int) and not 0 <= count <= size):
        raise n.error(f"cannot take {count} of {size}")
    out = (*shape[:axis], count, *shape[axis + 1 :])
    return [n.type(0).with_shape(out), TensorType(i64, out)]


def _top_k_eval(x: Array, k: Array, *, axis: int, largest: int, sorted: int) -> tuple[Array, Array]:
    """Equal values keep the order of their positions, which numpy's stable sort gives from either end."""
    if largest:
        backwards = np.argsort(np.flip(widen(x), axis), axis=axis, kind="stable")
        order = x.shape[axis] - 1 - np.flip(backwards, axis)
    else:
        order = np.argsort(widen(x), axis=axis, kind="stable")
    chosen = np.take(order, np.arange(int(k.item())), axis=axis)
    return np.take_along_axis(x, chosen, axis), chosen.astype(np.int64)


register(OpDef(
    "TopK", Kind.TEMPLATE, infer=_top_k_infer, propagate=propagate_by_eval, refuse=default_refuse,
    eval=_top_k_eval,
    attrs={"axis": -1, "largest": 1, "sorted": 1}, static_inputs=(1,),
))  # fmt: skip


def _running_infer(n: Inference) -> list[Type]:
    axis = n.integers(1)
    if axis is not None and n.type(0).shape is not None:
        n.axis(axis[0], n.rank(0))
    return [n.type(0)]


def _running_eval(accumulate: Any, neutral: int) -> Any:
    def evaluate(x: Array, axis: Array, *, exclusive: int, reverse: int) -> Array:
        along = int(axis.item())
        ordered = np.flip(x, along) if reverse else x
        out = accumulate(ordered, axis=along, dtype=x.dtype)
        if exclusive:
            first = np.full_like(np.take(out, [0], along), neutral) if x.shape[along] else out
            out = (
                np.concatenate([first, np.take(out, np.arange(x.shape[along] - 1), along)], along)
                if x.size
                else out
            )
        return np.flip(out, along).copy() if reverse else np.asarray(out)

    return computed_in_f32(evaluate)


for _name, _accumulate, _neutral in (("CumSum", np.cumsum, 0), ("CumProd", np.cumprod, 1)):
    register(OpDef(
        _name, Kind.TEMPLATE, infer=_running_infer, propagate=propagate_by_eval, refuse=default_refuse,
        eval=_running_eval(_accumulate, _neutral), attrs={"exclusive": 0, "reverse": 0}, static_inputs=(1,),
    ))  # fmt: skip


# -- sizes that depend on data


def _non_zero_infer(n: Inference) -> list[Type]:
    return [TensorType(i64, (max(n.rank(0), 1), n.fresh("nonzero")))]


register(OpDef(
    "NonZero", Kind.HOST, infer=_non_zero_infer,
    eval=lambda x: np.array(np.nonzero(np.atleast_1d(x)), dtype=np.int64).reshape(max(x.ndim, 1), -1),
))  # fmt: skip


def _compress_infer(n: Inference) -> list[Type]:
    axis = n.attr("axis")
    if axis is None:
        return [n.type(0).with_shape((n.fresh("kept"),))]
    shape = list(n.shape(0))
    shape[n.axis(axis, len(shape))] = n.fresh("kept")
    return [n.type(0).with_shape(shape)]


def _compress_eval(x: Array, condition: Array, *, axis: int | None) -> Array:
    data = x.reshape(-1) if axis is None else x
    along = 0 if axis is None else axis
    return np.take(data, np.flatnonzero(condition[: data.shape[along]]), axis=along)


register(OpDef("Compress", Kind.HOST, infer=_compress_infer, eval=_compress_eval, attrs={"axis": None}))


def _unique_infer(n: Inference) -> list[Type]:
    axis, count = n.attr("axis"), n.fresh("unique")
    if axis is None:
        shape = n.type(0).shape
        whole = n.fresh("size") if shape is None else product(shape)
        types: list[Type] = [
            n.type(0).with_shape((count,)),
            TensorType(i64, (count,)),
            TensorType(i64, (whole,)),
        ]
    else:
        dims = list(n.shape(0))
        axis = n.axis(axis, len(dims))
        whole, dims[axis] = dims[axis], count
        types = [n.type(0).with_shape(dims), TensorType(i64, (count,)), TensorType(i64, (whole,))]
    return [*types, TensorType(i64, (count,))]


def _unique_eval(x: Array, *, axis: int | None, sorted: int) -> tuple[Array, Array, Array, Array]:
    data = widen(x) if is_half(x.dtype) else x
    values, first, inverse, counts = np.unique(
        data, return_index=True, return_inverse=True, return_counts=True, axis=axis
    )
    inverse = inverse.reshape(-1)
    if not sorted:
        order = np.argsort(first, kind="stable")
        place = np.argsort(order, kind="stable")
        values = np.take(values, order, axis=0 if axis is None else axis)
        first, inverse, counts = first[order], place[inverse], counts[order]
    return values.astype(x.dtype), *(a.astype(np.int64) for a in (first, inverse, counts))  # type: ignore[return-value]


register(
    OpDef("Unique", Kind.HOST, infer=_unique_infer, eval=_unique_eval, attrs={"axis": None, "sorted": 1})
)
