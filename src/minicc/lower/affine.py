"""Index arithmetic: which part of an element offset is affine in the loop variables, and row-major linearisation.

An offset is split as `sum(stride[axis] * axis) + constant + rest`, strides and constant being sizes known when shapes are
bound (`Dim`), `rest` whatever depends on loaded data or on division. This is what lets a transposed, sliced or
broadcast operand cost nothing: its strides are just other words of the same kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minicc.ir.dims import Dim, SymbolicDim, floor_divide, maximum, minimum, modulo, product
from minicc.ir.expr import Expr, as_index, const, dim
from minicc.ir.types import i64


@dataclass(frozen=True)
class Affine:
    """`sum(strides[axis] * axis) + constant + rest`; strides of zero are left out, rest is None when there is none."""

    strides: dict[int, Dim]
    constant: Dim
    rest: Expr | None


def as_dim(expr: Expr) -> Dim | None:
    """The expression as a size known at bind time, or None when it depends on loop variables or data."""
    if expr.dtype != i64:
        return None
    if expr.op == "const":
        return int(expr.arg)  # type: ignore[call-overload, no-any-return]
    if expr.op == "dim":
        assert isinstance(expr.arg, SymbolicDim | int)
        return expr.arg
    if expr.op in ("add", "sub", "mul", "min", "max", "floordiv", "mod") and len(expr.args) == 2:
        a, b = as_dim(expr.args[0]), as_dim(expr.args[1])
        if a is None or b is None:
            return None
        if expr.op in ("floordiv", "mod") and b == 0:
            return None
        found: Dim = _DIM_FUNCTIONS[expr.op](a, b)
        return found
    if expr.op == "neg":
        a = as_dim(expr.args[0])
        return None if a is None else -a
    return None


_DIM_FUNCTIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "min": minimum,
    "max": maximum,
    "floordiv": floor_divide,
    "mod": modulo,
}


def affine(expr: Expr) -> Affine:
    """Split an i64 expression into its affine part over loop variables and the rest."""
    strides: dict[int, Dim] = {}
    rest: list[Expr] = []
    constant: Dim = 0
    stack: list[tuple[Expr, Dim]] = [(expr, 1)]
    while stack:
        term, factor = stack.pop()
        size = as_dim(term)
        if size is not None:
            constant = constant + size * factor
        elif term.op == "iter":
            axis = int(term.arg)  # type: ignore[call-overload]
            strides[axis] = strides.get(axis, 0) + factor
        elif term.op in ("add", "sub"):
            a, b = term.args
            stack += [(b, factor if term.op == "add" else -factor), (a, factor)]
        elif term.op == "neg":
            stack.append((term.args[0], -factor))
        elif term.op == "mul" and as_dim(term.args[1]) is not None:
            stack.append((term.args[0], factor * as_dim(term.args[1])))  # type: ignore[operator]
        elif term.op == "mul" and as_dim(term.args[0]) is not None:
            stack.append((term.args[1], factor * as_dim(term.args[0])))  # type: ignore[operator]
        else:
            rest.append(term if factor == 1 else term * dim(factor))
    total = rest[0] if rest else None
    for term in rest[1:]:
        total = total + term  # type: ignore[operator]
    return Affine({a: s for a, s in strides.items() if s != 0}, constant, total)


def row_major(shape: Sequence[Dim]) -> tuple[Dim, ...]:
    """Strides, in elements, of a contiguous array."""
    return tuple(product(shape[axis + 1 :]) for axis in range(len(shape)))


def linearise(index: Sequence[Expr], shape: Sequence[Dim]) -> Expr:
    """The element offset of an index in a contiguous array."""
    total = const(0, i64)
    for position, stride in zip(index, row_major(shape)):
        total = total + position * dim(stride)
    return total


def delinearise(offset: Expr, shape: Sequence[Dim]) -> list[Expr]:
    """The index of an element offset in a contiguous array; axes of size 1 give 0."""
    out: list[Expr] = []
    strides = row_major(shape)
    outermost = next((axis for axis, size in enumerate(shape) if size != 1), 0)
    for axis, (size, stride) in enumerate(zip(shape, strides)):
        if size == 1:
            out.append(const(0, i64))
            continue
        position = offset if stride == 1 else offset // dim(stride)
        out.append(position if axis == outermost else position % dim(size))
    return out


def reshape_index(index: Sequence[Expr], new: Sequence[Dim], old: Sequence[Dim]) -> list[Expr]:
    """The index into shape `old` of the element at `index` of its reshape to `new`.

    Dimensions are matched in groups of equal product from the left, so that adding, removing or splitting axes stays
    affine and division appears only inside a group that merges axes.
    """
    out: list[Expr] = []
    a = b = 0  # positions in new and old
    while a < len(new) or b < len(old):
        group_new: list[int] = []
        group_old: list[int] = []
        size_new: Dim = 1
        size_old: Dim = 1
        while True:
            if a < len(new) and (not group_new or size_new != size_old) and _advance(size_new, size_old, old[b:]):
                size_new = size_new * new[a]
                group_new.append(a)
                a += 1
            elif b < len(old):
                size_old = size_old * old[b]
                group_old.append(b)
                b += 1
            elif a < len(new):
                size_new = size_new * new[a]
                group_new.append(a)
                a += 1
            if size_new == size_old or (a == len(new) and b == len(old)):
                break
        offset = linearise([as_index(index[k]) for k in group_new], [new[k] for k in group_new])
        sizes = [old[k] for k in group_old]
        if len([s for s in sizes if s != 1]) <= 1:
            out += [const(0, i64) if s == 1 else offset for s in sizes]
        else:
            out += delinearise(offset, sizes)
    return out


def _advance(size_new: Dim, size_old: Dim, rest_old: Sequence[Dim]) -> bool:
    """Whether the next axis of the new shape should join the group before one of the old shape."""
    if not rest_old or (size_new == 1 and size_old != 1):
        return True
    if size_old == 1 and size_new != 1:
        return False
    if isinstance(size_new, int) and isinstance(size_old, int) and size_new != size_old:
        return size_new < size_old
    # Symbolic: the side whose next size completes the other goes first.
    return size_old * rest_old[0] != size_new
