"""Shapes as values, tensors made from shapes, and ops that give the same elements another shape or axis
order.

Ops that pick, join or pad elements are in rearrange.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.dims import Dim, ceil_divide, exact_quotient, floor_divide, lower_bound, maximum, product
from minicc.ir.expr import Expr, cast, const, dim, equal, select
from minicc.ir.graph import MAX_CONTENT, object_array
from minicc.ir.opdef import Content, Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import DType, TensorType, Type, bf16, broadcast_shapes, dtype_of, f16, f32, i64
from minicc.ops.helpers import (
    Array,
    Contents,
    Shape,
    as_dim,
    axis_list,
    broadcast_index,
    default_refuse,
    described_shape,
    element_type,
    elements,
    is_half,
    propagate_by_eval,
    propagate_moves,
    unknown_dims,
)

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

Indices = tuple[Expr, ...]


# -- shapes as values


def _shape_infer(n: Inference) -> list[Type]:
    shape = n.type(0).shape
    return [TensorType(i64, (n.fresh("rank"),) if shape is None else (len(shape[_shape_slice(n.attrs)]),))]


def _shape_slice(attrs: Any) -> slice:
    return slice(attrs["start"], attrs["end"])


def _shape_content(n: Inference) -> Contents:
    shape = n.type(0).shape
    return [None if shape is None else object_array(list(shape[_shape_slice(n.attrs)]))]


def _shape_compute(c: Indexing, index: Indices, *, start: int, end: int | None) -> Expr:
    dims = c.type(0).dims[start:end]
    out = dim(dims[-1]) if dims else const(0, i64)
    for position in reversed(range(len(dims) - 1)):
        out = select(equal(index[0], position), dim(dims[position]), out)
    return out


register(OpDef(
    "Shape", Kind.INDEX, infer=_shape_infer, propagate=_shape_content, refuse=default_refuse,
    eval=lambda x, *, start, end: np.array(x.shape[start:end], dtype=np.int64),
    compute=_shape_compute, attrs={"start": 0, "end": None},
))  # fmt: skip


def _size_content(n: Inference) -> Contents:
    shape = n.type(0).shape
    if shape is None:
        return [None]
    out = np.empty((), dtype=object)
    out[()] = product(shape)
    return [out]


register(OpDef(
    "Size", Kind.INDEX, infer=lambda n: [TensorType(i64, ())], propagate=_size_content, refuse=default_refuse,
    eval=lambda x: np.array(x.size, dtype=np.int64), compute=lambda c, index: dim(c.type(0).size),
))  # fmt: skip


# -- tensors made from shapes


def _constant_eval(**attrs: Any) -> Array:
    ((name, value),) = [(k, v) for k, v in attrs.items() if v is not None]
    dtypes = {
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
    return np.asarray(value, dtype=dtypes.get(name, getattr(value, "dtype", object)))


def _constant_infer(n: Inference) -> list[Type]:
    given = [k for k, v in n.attrs.items() if v is not None]
    if len(given) != 1:
        raise n.error(f"needs exactly one value attribute, got {', '.join(given) or 'none'}")
    array = _constant_eval(**n.attrs)
    return [TensorType(dtype_of(array.dtype), array.shape)]


def _constant(b: Builder, node: Node) -> list[Value]:
    return [b.constant(_constant_eval(**node.attrs))]


register(OpDef(
    "Constant", Kind.EXPAND, infer=_constant_infer, propagate=propagate_by_eval, eval=_constant_eval,
    expand=_constant,
    attrs=dict.fromkeys(
        ("value", "value_float", "value_floats", "value_int", "value_ints", "value_string", "value_strings")),
))  # fmt: skip


def _filler(value: Array | None) -> Array:
    """The one element of ConstantOfShape as an array of rank 0."""
    return np.zeros((), np.float32) if value is None else np.asarray(value).reshape(())


def _constant_of_shape_infer(n: Inference) -> list[Type]:
    return [TensorType(dtype_of(_filler(n.attr("value")).dtype), described_shape(n, 0))]


def _constant_of_shape(c: Indexing, index: Indices, *, value: Array | None) -> Expr:
    return const(_filler(value).item(), c.out_type().dtype)


register(OpDef(
    "ConstantOfShape", Kind.INDEX, infer=_constant_of_shape_infer, propagate=propagate_by_eval,
    refuse=default_refuse,
    eval=lambda shape, *, value: np.full(shape.tolist(), _filler(value)),
    compute=_constant_of_shape, attrs={"value": None}, static_inputs=(0,),
))  # fmt: skip


def _range_count(start: Any, limit: Any, delta: Any) -> int:
    count: int = math.ceil((limit - start) / delta)
    return max(count, 0)


def _range_parts(contents: list[Content | None]) -> list[Any] | None:
    """Start, limit and delta as numbers or dimensions, None when one is not known."""
    parts = [None if c is None else c.item() for c in contents]
    return None if any(p is None for p in parts) else parts


def _range_size(n: Inference) -> Dim:
    parts = _range_parts([n.content(i) for i in range(3)])
    if parts is None:
        return n.fresh("range")
    if all(isinstance(p, int | float) for p in parts):
        if parts[2] == 0:
            raise n.error("the step must not be 0")
        return _range_count(*parts)
    start, limit, delta = map(as_dim, parts)
    if start is None or limit is None or not isinstance(delta, int) or delta == 0:
        return n.fresh("range")
    return maximum(ceil_divide(limit - start, delta) if delta > 0 else ceil_divide(start - limit, -delta), 0)


def _range_infer(n: Inference) -> list[Type]:
    return [TensorType(n.dtype(0), (_range_size(n),))]


def _range_content(n: Inference) -> Contents:
    known = propagate_by_eval(n)
    parts = _range_parts([n.content(i) for i in range(3)])
    if known[0] is not None or parts is None or n.dtype(0).is_float:
        return known
    size = _range_size(n)
    if not isinstance(size, int) or size > MAX_CONTENT:
        return [None]
    return [object_array([parts[0] + i * parts[2] for i in range(size)])]


def _range_eval(start: Array, limit: Array, delta: Array, *, stash_type: int) -> Array:
    count = _range_count(*(v.item() for v in (start, limit, delta)))
    if start.dtype.kind in "iu":
        return np.asarray(
            (start.item() + np.arange(count, dtype=np.int64) * delta.item()).astype(start.dtype)
        )
    wide = np.dtype(np.float32) if is_half(start.dtype) else start.dtype
    numbers = start.astype(wide) + np.arange(count).astype(wide) * delta.astype(wide)
    return np.asarray(numbers.astype(start.dtype))


def _range(c: Indexing, index: Indices, *, stash_type: int) -> Expr:
    dtype = c.out_type().dtype
    wide = f32 if dtype in (f16, bf16) else dtype

    def number(value: Any) -> Expr:
        return const(value, wide) if isinstance(value, int | float) else cast(dim(value), wide)

    start, delta = (number(c.content(i).item()) for i in (0, 2))
    return cast(start + cast(index[0], wide) * delta, dtype)


register(OpDef(
    "Range", Kind.INDEX, infer=_range_infer, propagate=_range_content, refuse=default_refuse,
    eval=_range_eval,
    compute=_range, attrs={"stash_type": 1}, static_inputs=(0, 1, 2),
))  # fmt: skip


def _eye_like_infer(n: Inference) -> list[Type]:
    dtype = n.dtype(0) if n.attr("dtype") is None else element_type(n.attr("dtype"))
    if n.rank(0) != 2:
        raise n.error("the input must be a matrix")
    return [TensorType(dtype, n.shape(0))]


def _eye_like_eval(x: Array, *, dtype: DType | int | None, k: int) -> Array:
    rows, columns = x.shape
    return np.eye(rows, columns, k=k).astype(x.dtype if dtype is None else element_type(dtype).numpy)


register(OpDef(
    "EyeLike", Kind.INDEX, infer=_eye_like_infer, eval=_eye_like_eval, refuse=default_refuse,
    compute=lambda c, index, *, dtype, k: cast(equal(index[1] - index[0], k), c.out_type().dtype),
    attrs={"dtype": None, "k": 0},
))  # fmt: skip


# -- the same elements in another shape


def reshape_index(index: Indices, target: Shape, source: Shape) -> list[Expr | int]:
    """Where the element `index` of a tensor of shape `target` lies in its reshape to `source`.

    Axes are matched in groups of equal size, so that only merged or split axes need arithmetic.
    """
    out: list[Expr | int] = [0] * len(source)
    if 0 in target or 0 in source:
        return out
    inner = [axis for axis, size in enumerate(source) if size != 1]
    outer = [axis for axis, size in enumerate(target) if size != 1]
    while inner and outer:
        taken, given = [inner.pop(0)], [outer.pop(0)]
        left, right = source[taken[0]], target[given[0]]
        while left != right and (inner or outer):
            if inner and (not outer or exact_quotient(left, right) is None):
                taken.append(inner.pop(0))
                left = left * source[taken[-1]]
            else:
                given.append(outer.pop(0))
                right = right * target[given[-1]]
        flat: Expr = index[given[0]]
        for axis in given[1:]:
            flat = flat * target[axis] + index[axis]
        for axis in reversed(taken[1:]):
            out[axis] = flat % source[axis]
            flat = flat // source[axis]
        out[taken[0]] = flat
    return out


def _view(c: Indexing, index: Indices, **_: Any) -> Expr:
    """The element of input 0 at the same position in row-major order."""
    return c.load(0, reshape_index(index, c.out_type().dims, c.type(0).dims))


def _reshape_infer(n: Inference) -> list[Type]:
    return [n.type(0).with_shape(_reshaped(n))]


def _reshaped(n: Inference) -> Shape | None:
    source, content = n.type(0).shape, n.content(1)
    if content is None:
        rank = n.shape(1)[0]
        return unknown_dims(n, rank) if isinstance(rank, int) else None
    dims: list[Dim] = []
    for axis, size in enumerate(elements(content)):
        if size == 0 and not n.attr("allowzero"):
            if source is not None and axis >= len(source):
                raise n.error(f"cannot copy axis {axis} of the input, it has rank {len(source)}")
            size = n.fresh() if source is None else source[axis]
        dims.append(size)
    if any(isinstance(d, int) and d < -1 for d in dims) or dims.count(-1) > 1:
        raise n.error(f"{list(content.flat)} is no shape to reshape to")
    if -1 in dims:
        free = dims.index(-1)
        dims[free] = (
            n.fresh()
            if source is None
            else _free_size(n, product(source), product([*dims[:free], *dims[free + 1 :]]))
        )
    elif source is not None:
        before, after = product(source), product(dims)
        if isinstance(before, int) and isinstance(after, int) and before != after:
            raise n.error(f"cannot reshape {before} elements to {tuple(dims)}")
    return tuple(dims)


def _free_size(n: Inference, total: Dim, rest: Dim) -> Dim:
    if rest == 0:
        return 0
    if isinstance(total, int) and isinstance(rest, int) and total % rest:
        raise n.error(f"cannot reshape {total} elements: {rest} does not divide them")
    return floor_divide(total, rest)


def _reshape_eval(x: Array, shape: Array, *, allowzero: int) -> Array:
    sizes = [x.shape[axis] if size == 0 and not allowzero else int(size) for axis, size in enumerate(shape)]
    if -1 in sizes and 0 in sizes:
        sizes[sizes.index(-1)] = 0
    return x.reshape(sizes)


register(OpDef(
    "Reshape", Kind.INDEX, infer=_reshape_infer, propagate=propagate_moves(0), refuse=default_refuse,
    eval=_reshape_eval, compute=_view, attrs={"allowzero": 0}, static_inputs=(1,),
))  # fmt: skip


def _flatten_infer(n: Inference) -> list[Type]:
    shape, axis = n.shape(0), n.attr("axis")
    if not -len(shape) <= axis <= len(shape):
        raise n.error(f"axis {axis} is out of range for rank {len(shape)}")
    axis += len(shape) if axis < 0 else 0
    return [n.type(0).with_shape((product(shape[:axis]), product(shape[axis:])))]


def _flatten_eval(x: Array, *, axis: int) -> Array:
    rows = math.prod(x.shape[:axis])
    return x.reshape(rows, math.prod(x.shape[axis:]))


register(OpDef(
    "Flatten", Kind.INDEX, infer=_flatten_infer, propagate=propagate_moves(0), refuse=default_refuse,
    eval=_flatten_eval, compute=_view, attrs={"axis": 1},
))  # fmt: skip


def certainly_above_one(size: Dim) -> bool:
    """Whether a size is at least 2 whatever its symbols are."""
    bound = lower_bound(size)
    return bound is not None and bound >= 2


def _squeeze_infer(n: Inference) -> list[Type]:
    shape = n.shape(0)
    if not n.has(1):
        if any(not isinstance(d, int) and not certainly_above_one(d) for d in shape):
            return [n.type(0).with_shape(None)]  # which axes go is known only at run time
        return [n.type(0).with_shape(d for d in shape if d != 1)]
    axes = n.integers(1)
    if axes is None:
        count = n.shape(1)[0]
        return [n.type(0).with_shape(unknown_dims(n, len(shape) - count) if isinstance(count, int) else None)]
    gone = axis_list(n, axes, len(shape))
    if any(isinstance(shape[axis], int) and shape[axis] != 1 for axis in gone):
        raise n.error(f"axes {axes} are not all of size 1")
    return [n.type(0).with_shape(d for axis, d in enumerate(shape) if axis not in gone)]


def _squeeze_eval(x: Array, axes: Array | None = None) -> Array:
    return np.squeeze(x) if axes is None else np.squeeze(x, axis=tuple(axes.tolist()))


register(OpDef(
    "Squeeze", Kind.INDEX, infer=_squeeze_infer, propagate=propagate_moves(0), refuse=default_refuse,
    eval=_squeeze_eval, compute=_view, static_inputs=(1,),
))  # fmt: skip


def _unsqueeze_infer(n: Inference) -> list[Type]:
    shape, axes = n.shape(0), n.integers(1)
    if axes is None:
        count = n.shape(1)[0]
        return [n.type(0).with_shape(unknown_dims(n, len(shape) + count) if isinstance(count, int) else None)]
    new = axis_list(n, axes, len(shape) + len(axes))
    rest = iter(shape)
    return [n.type(0).with_shape(1 if axis in new else next(rest) for axis in range(len(shape) + len(new)))]


register(OpDef(
    "Unsqueeze", Kind.INDEX, infer=_unsqueeze_infer, propagate=propagate_moves(0), refuse=default_refuse,
    eval=lambda x, axes: np.expand_dims(x, tuple(axes.reshape(-1).tolist())), compute=_view,
    static_inputs=(1,),
))  # fmt: skip


# -- another order of axes, more elements of the same


def permutation(perm: Any, rank: int) -> list[int]:
    """The `perm` of a Transpose, reversed axes by default."""
    return list(reversed(range(rank))) if perm is None else [p + rank if p < 0 else p for p in perm]


def _transpose_infer(n: Inference) -> list[Type]:
    shape = n.shape(0)
    perm = permutation(n.attr("perm"), len(shape))
    if sorted(perm) != list(range(len(shape))):
        raise n.error(f"perm {tuple(perm)} is no permutation of {len(shape)} axes")
    return [n.type(0).with_shape(shape[p] for p in perm)]


def _transpose(c: Indexing, index: Indices, *, perm: Any) -> Expr:
    source: list[Expr] = list(index)
    for axis, p in enumerate(permutation(perm, len(index))):
        source[p] = index[axis]
    return c.load(0, source)


register(OpDef(
    "Transpose", Kind.INDEX, infer=_transpose_infer, propagate=propagate_moves(0), refuse=default_refuse,
    eval=lambda x, *, perm: np.transpose(x, permutation(perm, x.ndim)), compute=_transpose,
    attrs={"perm": None},
))  # fmt: skip


def _expand_infer(n: Inference) -> list[Type]:
    if n.content(1) is None:
        rank = n.shape(1)[0]
        unknown = unknown_dims(n, max(n.rank(0), rank)) if isinstance(rank, int) else None
        return [n.type(0).with_shape(unknown)]
    try:
        return [n.type(0).with_shape(broadcast_shapes(n.shape(0), described_shape(n, 1) or ()))]
    except ShapeError as error:
        raise n.error(error.what) from error


register(OpDef(
    "Expand", Kind.INDEX, infer=_expand_infer, propagate=propagate_moves(0), refuse=default_refuse,
    eval=lambda x, shape: np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape.tolist()))).copy(),
    compute=lambda c, index: c.load(0, broadcast_index(index, c.type(0).dims, c.out_type().dims)),
    static_inputs=(1,),
))  # fmt: skip
