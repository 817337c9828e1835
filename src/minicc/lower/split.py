"""Long reductions to few results in two levels, for targets whose parallelism that would leave idle.

A reduction becomes a kernel that reduces equal parts of its longest axis, and a reduction of the parts. Sizes must be
known at compile time; nothing is split into unequal parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from minicc.ir.dims import Dim
from minicc.ir.expr import Expr, iteration, reduce, reduction, rewrite, walk
from minicc.ir.types import DType
from minicc.lower.affine import linearise
from minicc.lower.body import Write

# Split are reductions of at least so many elements, for at most so many results, into at most so many parts.
LEAST_LENGTH, MOST_RESULTS, MOST_PARTS = 1 << 15, 256, 1024
# A part has at least so many elements.
LEAST_PART = 2048
_KINDS = ("sum", "prod", "max", "min")
_TYPES = ("f32", "f64", "i32", "i64")

# Makes an array of a type and shape with one element expression over its axes, and returns its key.
Emit = Callable[[DType, Sequence[Dim], Expr], int]


def split_reductions(writes: Sequence[Write], shape: Sequence[Dim], emit: Emit) -> list[Write]:
    """The writes with every long reduction in two levels; `emit` makes the arrays of parts."""

    def change(expr: Expr) -> Expr | None:
        if expr.op != "reduce":
            return None
        kind, axes, extents = reduction(expr)
        free = sorted(_free(expr))
        if any(axis >= len(shape) for axis in free):  # inside another reduction
            return None
        results = [shape[axis] for axis in free]
        parts = _parts(kind, expr.dtype, results, extents)
        if parts is None:
            return None
        place, count = parts
        axis, size = axes[place], extents[place] // count
        moved = {old: iteration(new) for new, old in enumerate(free)} | {axis: iteration(len(free)) * size + iteration(axis)}
        body = rewrite(expr.args[0], lambda e: moved.get(int(e.arg)) if e.op == "iter" else None)  # type: ignore[call-overload]
        inner = [size if at == place else extent for at, extent in enumerate(extents)]
        array = emit(expr.dtype, (*results, count), reduce(kind, axes, inner, body))
        offset = linearise([*(iteration(a) for a in free), iteration(axis)], (*results, count))
        return reduce(kind, (axis,), (count,), Expr("load", expr.dtype, (offset,), array))

    return [Write(w.array, w.dtype, w.offset, rewrite(w.value, change)) for w in writes]


def _parts(kind: str, dtype: DType, results: Sequence[Dim], extents: Sequence[Dim]) -> tuple[int, int] | None:
    """(number of the axis to be cut, parts), or None where a reduction stays whole."""
    known = [n for n in (*results, *extents) if isinstance(n, int)]
    if kind not in _KINDS or dtype.name not in _TYPES or len(known) < len(results) + len(extents):
        return None
    lengths = known[len(results) :]
    length = prod(lengths)
    if length < LEAST_LENGTH or not 0 < prod(known[: len(results)]) <= MOST_RESULTS:
        return None
    place = lengths.index(max(lengths))
    most = min(MOST_PARTS, length // LEAST_PART)
    count = max(n for n in range(1, most + 1) if lengths[place] % n == 0)
    return (place, count) if count > 1 else None


def _free(root: Expr) -> set[int]:
    """The axes an expression depends on that no reduction in it binds."""
    bound = {axis for e in walk(root) if e.op == "reduce" for axis in reduction(e)[1]}
    return {int(e.arg) for e in walk(root) if e.op == "iter"} - bound  # type: ignore[call-overload]
