"""Rules about ops that only rename positions: reshapes, transposes, slices, expansions.

Every op of the reshape family becomes one form (`Reshape` with a known shape, allowzero=1), so that chains
merge.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from minicc.ir.dims import Dim, SymbolicDim, symbols_of
from minicc.ir.graph import Builder, Node, Value
from minicc.ir.rewrite import Result, op, refuse, rule, var
from minicc.passes.common import has_shape, integers

RESHAPES = "Reshape Squeeze Unsqueeze Flatten"


def reshape_to(b: Builder, x: Value, shape: tuple[Dim, ...]) -> Value:
    """`x` as a value of `shape` (as it is when it has that shape)."""
    return x if x.shape == tuple(shape) else b.op("Reshape", x, b.shape(list(shape)), allowzero=1)


def _fresh(node: Node, shape: tuple[Dim, ...]) -> bool:
    """Whether the shape uses sizes that this very node finds out at run time."""
    return bool(set(node.symbols) & {n for d in shape if isinstance(d, SymbolicDim) for n in symbols_of(d)})


@rule("same-shape", op(f"{RESHAPES} Expand Slice", name="node"))
def same_shape(_: Builder, node: Node) -> Result:
    """A reshape, expansion or slice to the shape a value has (a slice only forwards) gives the value."""
    x = node.inputs[0]
    if x is None or not has_shape(x) or not has_shape(node.output) or x.shape != node.output.shape or node.symbols:
        return None
    if node.op.name == "Slice":
        steps = integers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else [1]
        if steps is None or any(s != 1 for s in steps):
            return refuse("it may reverse")
    return x


@rule("one-reshape", op(RESHAPES, name="node"))
def one_reshape(b: Builder, node: Node) -> Result:
    """Squeeze, Unsqueeze and Flatten are Reshapes; so are Reshapes with -1 or 0 once the shape is known."""
    x = node.inputs[0]
    if x is None or not has_shape(x) or not has_shape(node.output) or _fresh(node, node.output.shape):
        return None
    shape = node.output.shape
    if node.op.name == "Reshape":
        content = node.inputs[1].content if node.inputs[1] is not None else None
        if node.attrs["allowzero"] == 1 and content is not None and tuple(content.flat) == tuple(shape):
            return None
    return b.op("Reshape", x, b.shape(list(shape)), allowzero=1)


@rule("merge-reshapes", op(RESHAPES, name="node"))
def merge_reshapes(b: Builder, node: Node) -> Result:
    """reshape(reshape(x)) = reshape(x)."""
    value = node.inputs[0]
    inner = value.producer if value is not None else None
    if inner is None or inner.op.domain or inner.op.name not in RESHAPES.split():
        return None
    x = inner.inputs[0]
    if (
        x is None
        or not has_shape(x)
        or not has_shape(node.output)
        or _fresh(node, node.output.shape)
        or _fresh(inner, node.output.shape)
    ):
        return None
    return reshape_to(b, x, node.output.shape)


@rule("merge-transposes", op("Transpose", op("Transpose", var("x"), name="inner", shared=True), name="outer"))
def merge_transposes(b: Builder, x: Value, inner: Node, outer: Node) -> Result:
    """transpose(transpose(x)) is one transpose, or x."""
    perm = (
        [inner.attrs["perm"][a] for a in outer.attrs["perm"]]
        if inner.attrs["perm"] and outer.attrs["perm"]
        else None
    )
    if perm is None:
        return None
    return x if perm == sorted(perm) else b.op("Transpose", x, perm=perm)


@rule("free-transpose", op("Transpose", var("x"), name="node"))
def free_transpose(b: Builder, x: Value, node: Node) -> Result:
    """A transpose that only moves axes of size 1 is a reshape."""
    perm = node.attrs["perm"]
    if not perm or not has_shape(x):
        return None
    kept = [a for a in perm if x.shape[a] != 1]
    if kept != sorted(kept):
        return None
    return reshape_to(b, x, node.output.shape)


@rule("merge-expands", op("Expand", op("Expand", name="inner", shared=True), var("_"), name="outer"))
def merge_expands(b: Builder, inner: Node, outer: Node, _: Value) -> Result:
    """expand(expand(x)) = expand(x) when the outer shape is the final one."""
    x = inner.inputs[0]
    if x is None or not has_shape(outer.output) or outer.symbols or inner.symbols:
        return None
    return b.op("Expand", x, b.shape(list(outer.output.shape)))


def sliced(b: Builder, x: Value | None, bounds: Mapping[int, tuple[int, int, int]]) -> Value:
    """A slice with (start, end, step) by axis."""
    columns = zip(*((start, end, axis, step) for axis, (start, end, step) in sorted(bounds.items())))
    return b.op("Slice", x, *(b.constant(np.array(column, dtype=np.int64)) for column in columns))


@rule("slice-of-slice", op("Slice", name="outer"))
def slice_of_slice(b: Builder, outer: Node) -> Result:
    """Two slices of different axes with plain bounds are one."""
    inner = outer.inputs[0].producer if outer.inputs[0] is not None else None
    if inner is None or inner.op is not outer.op:
        return None
    first, second = _plain_slice(inner), _plain_slice(outer)
    if first is None or second is None or set(first) & set(second):
        return None
    return sliced(b, inner.inputs[0], {**first, **second})


@rule("slice-of-concat", op("Slice", name="outer"))
def slice_of_concat(b: Builder, outer: Node) -> Result:
    """A slice of several values side by side that lies within one of them is a slice of that one."""
    inner = outer.inputs[0].producer if outer.inputs[0] is not None else None
    bounds = _plain_slice(outer)
    if inner is None or inner.op.domain or inner.op.name != "Concat" or bounds is None:
        return None
    if not all(map(has_shape, (*inner.inputs, inner.output))):
        return None
    axis = inner.attrs["axis"] % inner.output.tensor.rank
    sizes = [v.shape[axis] for v in inner.inputs if v is not None]
    known = [size for size in sizes if isinstance(size, int)]
    if axis not in bounds or len(known) < len(sizes):
        return None
    start, end, step = bounds[axis]
    if step != 1:
        return None
    start, end, _ = slice(start, end).indices(sum(known))
    before = 0
    for value, size in zip(inner.inputs, known):
        if before <= start < end <= before + size:
            return sliced(b, value, {**bounds, axis: (start - before, end - before, 1)})
        before += size
    return None


def _plain_slice(node: Node) -> dict[int, tuple[int, int, int]] | None:
    """(start, end, step) by axis when all are known integers."""
    x = node.inputs[0]
    if x is None or not has_shape(x):
        return None
    rank = x.tensor.rank
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    axes, steps = ((*node.inputs[3:], None, None))[:2]
    if starts is None or ends is None:
        return None
    where = list(range(len(starts))) if axes is None else integers(axes)
    stride = [1] * len(starts) if steps is None else integers(steps)
    if where is None or stride is None or len({a % rank for a in where}) != len(where):
        return None
    return {a % rank: (s, e, t) for a, s, e, t in zip(where, starts, ends, stride)}


VIEW_RULES = (
    same_shape,
    one_reshape,
    merge_reshapes,
    merge_transposes,
    free_transpose,
    merge_expands,
    slice_of_slice,
    slice_of_concat,
)
