"""How much work generated loops are, from their expressions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from minicc.ir.dims import Dim, product
from minicc.ir.expr import EXPENSIVE, Expr, reduction, walk
from minicc.lower.body import Write

# Rough costs of one element on one core, in hundredths of nanoseconds, for cutting work into chunks; not for choosing kernels.
HUNDREDTHS_PER_LOAD, HUNDREDTHS_PER_FUNCTION, HUNDREDTHS_PER_SIMPLE = 15, 80, 3

Loops = tuple[tuple[int, Dim], ...]  # (axis, extent), the outermost first


def estimate(writes: Sequence[Write], shape: Sequence[Dim]) -> tuple[Dim, Dim]:
    """(operations, nanoseconds on one core) of some writes.

    What does not depend on the variable of a loop is taken to be done outside it, as a row's mean is.
    """
    operations: Counter[Loops] = Counter()
    hundredths: Counter[Loops] = Counter()  # of nanoseconds
    whole = tuple(enumerate(shape))
    for write in writes:
        hundredths[whole] += HUNDREDTHS_PER_LOAD
        axes = _axes_in(write.value)
        pending, seen = [(write.value, whole)], set()
        while pending:
            expr, loops = pending.pop()
            if expr in seen:
                continue
            seen.add(expr)
            while loops and loops[-1][0] not in axes[expr]:
                loops = loops[:-1]
            if expr.op == "load":
                hundredths[loops] += HUNDREDTHS_PER_LOAD
            elif expr.op not in ("const", "iter", "dim", "reduce"):
                operations[loops] += 1
                hundredths[loops] += HUNDREDTHS_PER_FUNCTION if expr.op in EXPENSIVE else HUNDREDTHS_PER_SIMPLE
            if expr.op == "reduce":
                loops = (*loops, *zip(*reduction(expr)[1:]))
            pending += [(argument, loops) for argument in expr.args]
    return _times(operations), _times(hundredths) // 100


def _times(counts: Mapping[Loops, int]) -> Dim:
    """How often something happens in all, given how often in every turn of some loops."""
    total: Dim = 0
    for loops, count in counts.items():
        total = total + product([extent for _, extent in loops]) * count
    return total


def _axes_in(root: Expr) -> dict[Expr, frozenset[int]]:
    """The loop variables every sub-expression depends on, other than those of its own reductions."""
    axes: dict[Expr, frozenset[int]] = {}
    for expr in walk(root):
        own = frozenset((int(expr.arg),)) if expr.op == "iter" else frozenset[int]()  # type: ignore[call-overload]
        axes[expr] = own.union(*(axes[argument] for argument in expr.args))
        if expr.op == "reduce":
            axes[expr] -= frozenset(reduction(expr)[1])
    return axes
