"""Long reductions to few results in two levels, where threads or a device would be left idle.

A reduction becomes a kernel that reduces equal parts of its longest axis, and a reduction of the parts. Its extents must
be known at compile time; nothing is split into unequal parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from minicc.ir.dims import Dim
from minicc.ir.expr import Expr, iteration, reduce, reduction, rewrite, walk
from minicc.ir.types import DType
from minicc.lower.affine import affine, linearise
from minicc.lower.body import Write

# (least elements of a reduction that is split, most results, least elements of a part) of reductions that walk memory
# contiguously, where the threads of a block share one, and of those whose neighbours lie side by side, where a thread
# does one alone.
SHARED, ALONE = (1 << 15, 256, 2048), (128, 8192, 8)
MOST_PARTS = 1024
# On a CPU a row of results is one thread's: the fewest rows that are left whole, and elements that are worth a second kernel.
ROWS, WORK = 8, 1 << 16
_KINDS = ("sum", "prod", "max", "min")
_TYPES = ("f32", "f64", "i32", "i64")

# Makes an array of a type and shape with one element expression over its axes, and returns its key.
Emit = Callable[[DType, Sequence[Dim], Expr], int]


def split_reductions(writes: Sequence[Write], shape: Sequence[Dim], emit: Emit, device: bool = True) -> list[Write]:
    """The writes with every long reduction in two levels; `emit` makes the arrays of parts.

    device: whether for a GPU, where the parts of a result lie side by side, or for a few threads, where results do.
    """

    def change(expr: Expr) -> Expr | None:
        if expr.op != "reduce":
            return None
        kind, axes, extents = reduction(expr)
        free = sorted(_free(expr))
        if any(axis >= len(shape) for axis in free):  # inside another reduction
            return None
        results = [shape[axis] for axis in free]
        walks = [affine(e.args[0]).strides for e in walk(expr.args[0]) if e.op == "load"]
        if not any(all(strides.get(axis, 0) != 0 for axis in (*free, *axes)) for strides in walks):
            return None  # a product: parts would take more memory than its operands
        side_by_side = bool(free) and any(strides.get(free[-1]) == 1 for strides in walks)
        if device:
            parts = _parts(results, extents, ALONE if side_by_side else SHARED)
        else:
            parts = _parts_of_rows(results, extents, side_by_side)
        if parts is None or kind not in _KINDS or expr.dtype.name not in _TYPES:
            return None
        place, count = parts
        axis, size = axes[place], extents[place] // count
        behind, split = (0, iteration(len(free))) if device else (1, iteration(0))
        moved = {old: iteration(new + behind) for new, old in enumerate(free)} | {axis: split * size + iteration(axis)}
        body = rewrite(expr.args[0], lambda e: moved.get(int(e.arg)) if e.op == "iter" else None)  # type: ignore[call-overload]
        inner = [size if at == place else extent for at, extent in enumerate(extents)]
        places, sizes = [*map(iteration, free)], [*results]
        at = len(free) if device else 0
        places.insert(at, iteration(axis))
        sizes.insert(at, count)
        array = emit(expr.dtype, sizes, reduce(kind, axes, inner, body))
        offset = linearise(places, sizes)
        return reduce(kind, (axis,), (count,), Expr("load", expr.dtype, (offset,), array))

    return [Write(w.array, w.dtype, w.offset, rewrite(w.value, change)) for w in writes]


def _parts(results: Sequence[Dim], extents: Sequence[Dim], limits: tuple[int, int, int]) -> tuple[int, int] | None:
    """(number of the axis to be cut, parts), or None where a reduction stays whole.

    Sizes of results that are not known are taken for 1: a part too many costs little.
    """
    least_length, most_results, least_part = limits
    lengths = [n for n in extents if isinstance(n, int)]
    length = prod(lengths)
    known = prod(n for n in results if isinstance(n, int))
    if len(lengths) < len(extents) or length < least_length or not 0 < known <= most_results:
        return None
    place = lengths.index(max(lengths))
    most = min(MOST_PARTS, length // least_part)
    count = max(n for n in range(1, most + 1) if lengths[place] % n == 0)
    return (place, count) if count > 1 else None


def _parts_of_rows(results: Sequence[Dim], extents: Sequence[Dim], side_by_side: bool) -> tuple[int, int] | None:
    """As `_parts`, for the threads of a CPU; of results that lie side by side the last axis is a row."""
    lengths = [n for n in extents if isinstance(n, int)]
    rows = prod(n for n in (results[:-1] if side_by_side else results) if isinstance(n, int))
    known = prod(n for n in results if isinstance(n, int))
    if len(lengths) < len(extents) or not 0 < rows < ROWS or prod(lengths) * known < WORK:
        return None
    counts = [max(n for n in range(1, ROWS // rows + 1) if length % n == 0) for length in lengths]
    place = counts.index(max(counts))  # the first of them: the axes behind it stay one run of memory
    return (place, counts[place]) if counts[place] > 1 else None


def _free(root: Expr) -> set[int]:
    """The axes an expression depends on that no reduction in it binds."""
    bound = {axis for e in walk(root) if e.op == "reduce" for axis in reduction(e)[1]}
    return {int(e.arg) for e in walk(root) if e.op == "iter"} - bound  # type: ignore[call-overload]
