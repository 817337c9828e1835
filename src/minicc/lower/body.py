"""From composed expressions to the normal form of a kernel.

Takes stores whose values load from named arrays at arbitrary offsets, over parallel axes of given extents. Axes of size
1 disappear, adjacent axes that every operand walks contiguously become one, offsets become operands with strides, and
sizes become words. What is left (`Body`) is free of shapes and names, so that equal computations share a kernel.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from minicc.ir.dims import Dim
from minicc.ir.expr import EXPENSIVE, Expr, const, iteration, reduction, rewrite, walk
from minicc.ir.types import DType, f32, f64, i64
from minicc.lower.affine import Affine, affine, as_dim
from minicc.lower.kernel import MOST_KNOWN, SHORT, Body, Operand, Store

MAX_LITERAL = 16
SHORT_ROW = 8  # elements
MOST_TILES = 4  # operands that lie along another axis than the result


@dataclass(frozen=True)
class Write:
    """`array[offset] = value` for every point of the iteration space; `offset` and loads count elements.

    Loads inside `value` have `arg` = the array's key and one argument, the element offset.
    """

    array: Hashable
    dtype: DType
    offset: Expr
    value: Expr


@dataclass(frozen=True)
class BodyWord:
    """A word of the body: the address of element `value` of an array, or a plain size (array None)."""

    value: Dim
    array: Hashable | None = None


@dataclass(frozen=True)
class Normalised:
    """The body, the words it needs, the extents of the parallel axes that are left, and the last one if it shapes the code."""

    body: Body
    words: tuple[BodyWord, ...]
    extents: tuple[Dim, ...]
    short: int = 0


def normalise(writes: Sequence[Write], extents: Sequence[Dim], keep: bool = False) -> Normalised:
    """The normal form of some writes over parallel axes 0..len(extents)-1; reductions use higher axis numbers.

    keep: whether rows are walked by one thread: then terms of a row's sum may be kept in the output until they are used again
          (see `keep_terms`), and copies to very short rows run along the source instead.
    """
    state = _State(list(writes), list(extents))
    state.drop_unit_axes()
    state.collapse([])
    if keep and len(state.axes) > 1 and len(writes) == 1:
        state.writes = [keep_terms(state.writes[0], state.axes[-1], state.extents[state.axes[-1]])]
        if _runs_along_source(state.writes[0], state.axes, state.extents):
            state.axes[-2:] = state.axes[:-3:-1]
    rank = len(state.axes)
    line = _axis_of_loads(state) if keep else None
    short = _short_row(state) if keep and line is None else 0
    if line is not None:
        state.axes.remove(line)
        state.axes.insert(rank - 2, line)
    number = {axis: i for i, axis in enumerate(state.axes)}
    known = Known(rank - 2, MOST_KNOWN) if short else Known(rank - (1 if line is None else 2), 1)
    return replace(state.finish(number, rank, known), short=short)


def _short_row(state: _State) -> int:
    """The extent of rows of a few elements of which nothing is reduced, in long lines of such rows; else 0."""
    if len(state.axes) < 2:
        return 0
    line, last = (state.extents[axis] for axis in state.axes[-2:])
    plain = not any(e.op in ("reduce", "keep") for w in state.writes for e in walk(w.value))
    return last if plain and isinstance(last, int) and 1 < last <= SHORT_ROW and not _is_short(line) else 0


def _axis_of_loads(state: _State) -> int | None:
    """The axis that loads run along while stores run along the last one: then loops go over tiles of both (codegen/tiles.py)."""
    if len(state.axes) < 2:
        return None
    last = state.axes[-1]
    stores = [affine(w.offset) for w in state.writes]
    inside = dict.fromkeys(e for w in state.writes for e in walk(w.value))
    if any(e.op in ("reduce", "keep") for e in inside) or any(s.rest is not None or s.strides.get(last) != 1 for s in stores):
        return None
    found = []
    for form in (affine(e.args[0]) for e in inside if e.op == "load"):
        if form.rest is None and form.strides.get(last, 0) not in (0, 1):
            found += [axis for axis, stride in form.strides.items() if stride == 1]
    axis = max(found, key=found.count, default=None)
    if axis is None or found.count(axis) > MOST_TILES or any(_is_short(state.extents[a]) for a in (axis, last)):
        return None
    return axis


def _is_short(extent: Dim) -> bool:
    return isinstance(extent, int) and extent <= SHORT_ROW


def _runs_along_source(write: Write, axes: Sequence[int], extents: Sequence[Dim]) -> bool:
    """Whether a copy writes rows of a few elements, such as pixels of three channels, and reads long ones."""
    if write.value.op != "load" or not _is_short(extents[axes[-1]]):
        return False
    source = affine(write.value.args[0])
    return source.rest is None and source.strides.get(axes[-1]) != 1 and source.strides.get(axes[-2]) == 1


def keep_terms(write: Write, axis: int, extent: Dim) -> Write:
    """The write, with the terms of a sum over a row stored to the output as they are summed, to be read when the row is.

    So a softmax computes each exponential once. It takes a value made of such a term and its sum, and nothing else
    that is loaded; terms must be of the output's type. axis: the row's own, its elements one after the other.
    """
    if affine(write.offset).strides.get(axis) != 1 or affine(write.offset).rest is not None:
        return write
    for total in (e for e in walk(write.value) if e.op == "reduce" and reduction(e)[0] == "sum"):
        _, axes, sizes = reduction(total)
        term = total.args[0]
        if len(axes) != 1 or sizes[0] != extent or term.dtype != write.dtype or term.dtype not in (f32, f64):
            continue
        own = _renamed(term, axes[0], axis)
        inside = list(walk(own))
        pays = any(e.op in EXPENSIVE and _varies(e, axis) for e in inside)
        if not pays or any(e.op == "reduce" and _varies(e, axis) for e in inside):
            continue
        kept = Expr("kept", term.dtype, (write.offset,), write.array)
        keep = Expr("keep", term.dtype, (term, _renamed(write.offset, axis, axes[0])), write.array)
        summed = Expr("reduce", total.dtype, (keep,), total.arg)
        hidden = rewrite(write.value, lambda e, own=own, kept=kept: kept if e == own else None)  # type: ignore[misc]
        rest = rewrite(hidden, lambda e, total=total: const(0, e.dtype) if e == total else None)  # type: ignore[misc]
        if kept in walk(rest) and not any(e.op in ("load", "reduce") for e in walk(rest)):
            value = rewrite(hidden, lambda e, total=total, summed=summed: summed if e == total else None)  # type: ignore[misc]
            return Write(write.array, write.dtype, write.offset, value)
    return write


def _renamed(expr: Expr, old: int, new: int) -> Expr:
    """The expression with one loop variable in the place of another."""
    return rewrite(expr, lambda e: iteration(new) if e.op == "iter" and e.arg == old else None)


def _varies(expr: Expr, axis: int) -> bool:
    return any(e.op == "iter" and e.arg == axis for e in walk(expr))


@dataclass(frozen=True)
class Space:
    """A template's output space (b0, b1, i, j): the epilogue over it, and how its own operands walk the batch and row axes.

    extents: of b0, b1, i, j. strides: per template operand, its strides over (b0, b1, i).
    """

    normal: Normalised
    extents: tuple[Dim, Dim, Dim, Dim]
    strides: tuple[tuple[Dim, Dim, Dim], ...]


def normalise_epilogue(writes: Sequence[Write], extents: Sequence[Dim], operands: Sequence[dict[int, Dim]],
                       fixed: bool = False) -> Space | str:  # fmt: skip
    """Fit writes over the logical axes of a template's output (the last two are row and column) to (b0, b1, i, j).

    operands: strides by logical axis of what the template itself reads, that which has rows first; axes merge only where
    these allow it.
    fixed: the first two axes are b0 and b1 and everything between them and the column must merge into the row.
    Returns a sentence when more than two batch axes remain.
    """
    state = _State(list(writes), list(extents))
    column, row = len(extents) - 1, len(extents) - 2
    for axis in range(row):
        if extents[axis] == 1:
            state.substitute(axis, const(0, i64))
            state.axes.remove(axis)
    if not fixed and extents[row] == 1:
        operands = state.find_rows(row, operands)
    state.collapse([Affine(dict(o), 0, None) for o in operands], keep=frozenset((column,)))
    batch = [a for a in state.axes if a < row]
    if len(batch) > 2 or (fixed and any(a > 1 for a in batch)):
        return "the axes of a fused operand do not merge into the rows of the template"
    number = {axis: axis if fixed else 2 - len(batch) + i for i, axis in enumerate(batch)} | {row: 2, column: 3}
    places: dict[int, int] = {n: a for a, n in number.items()}
    sizes = [state.extents[places[n]] if n in places else 1 for n in range(4)]
    strides = tuple(tuple(o.get(places[n], 0) if n in places else 0 for n in range(3)) for o in operands)
    return Space(state.finish(number, 4, Known(3, 1)), tuple(sizes), strides)  # type: ignore[arg-type]


class Known(NamedTuple):
    """Which strides shape the code: those along `axis` and later ones, from 0 to `most`. All others are words."""

    axis: int
    most: int


class _State:
    """The writes while axes are being removed and merged."""

    def __init__(self, writes: list[Write], extents: list[Dim]) -> None:
        self.writes, self.extents = writes, extents
        self.axes = list(range(len(extents)))  # parallel axes still there, by their number in the expressions

    def expressions(self) -> list[Expr]:
        return list(dict.fromkeys(e for w in self.writes for e in (*walk(w.value), *walk(w.offset))))

    def offsets(self) -> list[Affine]:
        """Affine forms of every store and load offset."""
        found = [affine(w.offset) for w in self.writes]
        loads = dict.fromkeys(e for w in self.writes for e in walk(w.value) if e.op == "load")
        return found + [affine(e.args[0]) for e in loads]

    def substitute(self, axis: int, replacement: Expr) -> None:
        def change(e: Expr) -> Expr | None:
            return replacement if e.op == "iter" and e.arg == axis else None

        self.writes = [Write(w.array, w.dtype, rewrite(w.offset, change), rewrite(w.value, change)) for w in self.writes]

    def find_rows(self, row: int, operands: Sequence[dict[int, Dim]]) -> Sequence[dict[int, Dim]]:
        """Make the innermost batch axis the rows in place of an axis `row` of size 1; the operands in these axes.

        Left alone when operands other than the first move along it. As batches they would all be read again for each row.
        """
        batch = [axis for axis in self.axes if axis < row]
        if not batch or any(operand.get(batch[-1], 0) != 0 for operand in operands[1:]):
            return operands
        self.substitute(row, const(0, i64))
        self.substitute(batch[-1], iteration(row))
        self.axes.remove(batch[-1])
        self.extents[row] = self.extents[batch[-1]]
        left = {axis: stride for axis, stride in operands[0].items() if axis != row}
        if batch[-1] in left:
            left[row] = left.pop(batch[-1])
        return [left, *operands[1:]]

    def drop_unit_axes(self) -> None:
        for axis in [a for a in self.axes if self.extents[a] == 1]:
            self.substitute(axis, const(0, i64))
            self.axes.remove(axis)
        for expr in self.expressions():
            if expr.op == "reduce" and 1 in reduction(expr)[2] and not reduction(expr)[0].startswith("arg"):
                self._drop_unit_reductions()
                break

    def _drop_unit_reductions(self) -> None:
        """Reduction axes of extent 1 read position 0; a reduction over nothing else is its body."""
        units: set[int] = set()
        for expr in self.expressions():
            if expr.op == "reduce" and not reduction(expr)[0].startswith("arg"):
                _, axes, sizes = reduction(expr)
                units |= {a for a, s in zip(axes, sizes) if s == 1}

        def change(e: Expr) -> Expr | None:
            if e.op == "iter" and e.arg in units:
                return const(0, i64)
            if e.op == "reduce" and not reduction(e)[0].startswith("arg"):
                kind, axes, sizes = reduction(e)
                kept = [(a, s) for a, s in zip(axes, sizes) if a not in units]
                if not kept:
                    return e.args[0]
                if len(kept) < len(axes):
                    return Expr("reduce", e.dtype, e.args, (kind, tuple(a for a, _ in kept), tuple(s for _, s in kept)))
            return None

        self.writes = [Write(w.array, w.dtype, rewrite(w.offset, change), rewrite(w.value, change)) for w in self.writes]

    def collapse(self, others: list[Affine], keep: frozenset[int] = frozenset()) -> None:
        """Merge neighbouring axes that all offsets (and `others`) walk contiguously and nothing else looks at."""
        offsets = self.offsets() + others
        named = self._axes_used_otherwise()
        merged = True
        while merged:
            merged = False
            for outer, inner in zip(self.axes, self.axes[1:]):
                if outer in named or inner in named or inner in keep:
                    continue
                extent = self.extents[inner]
                if all(a.strides.get(outer, 0) == a.strides.get(inner, 0) * extent for a in offsets):
                    # outer * extent + inner becomes inner: the outer variable's share is already in the inner stride.
                    self.substitute(outer, const(0, i64))
                    self.extents[inner] = self.extents[outer] * extent
                    self.axes.remove(outer)
                    offsets = self.offsets() + others
                    merged = True
                    break
        self._collapse_reductions(named)

    def _collapse_reductions(self, named: set[int]) -> None:
        while True:
            offsets = self.offsets()
            pair = self._mergeable_reduction(named, offsets)
            if pair is None:
                return
            outer, inner = pair

            def change(e: Expr, outer: int = outer, inner: int = inner) -> Expr | None:
                if e.op == "iter" and e.arg == outer:
                    return const(0, i64)
                if e.op == "reduce" and outer in reduction(e)[1]:
                    kind, axes, sizes = reduction(e)
                    total = sizes[axes.index(outer)] * sizes[axes.index(inner)]
                    kept = [(a, total if a == inner else s) for a, s in zip(axes, sizes) if a != outer]
                    return Expr("reduce", e.dtype, e.args, (kind, tuple(a for a, _ in kept), tuple(s for _, s in kept)))
                return None

            self.writes = [Write(w.array, w.dtype, rewrite(w.offset, change), rewrite(w.value, change)) for w in self.writes]

    def _mergeable_reduction(self, named: set[int], offsets: list[Affine]) -> tuple[int, int] | None:
        for expr in self.expressions():
            if expr.op != "reduce":
                continue
            _, axes, sizes = reduction(expr)
            for outer, inner, size in zip(axes, axes[1:], sizes[1:]):
                if outer not in named and inner not in named and all(
                    a.strides.get(outer, 0) == a.strides.get(inner, 0) * size for a in offsets
                ):
                    return outer, inner
        return None

    def _axes_used_otherwise(self) -> set[int]:
        """Axes whose variable appears anywhere but in the affine part of an offset."""
        used: set[int] = set()
        roots = [w.value for w in self.writes]
        roots += [a.rest for a in self.offsets() if a.rest is not None]
        seen: set[Expr] = set()
        stack = list(roots)
        while stack:
            expr = stack.pop()
            if expr in seen:
                continue
            seen.add(expr)
            if expr.op == "iter":
                used.add(int(expr.arg))  # type: ignore[call-overload]
            if expr.op != "load":  # a load's offset is looked at through its affine form
                stack.extend(expr.args)
        return used

    def finish(self, number: dict[int, int], rank: int, known: Known) -> Normalised:
        """Number the axes as given (reductions after `rank`), and turn offsets into operands, sizes into words."""
        number = dict(number)
        for expr in self.expressions():
            if expr.op == "reduce":
                for axis in reduction(expr)[1]:
                    number.setdefault(axis, rank + sum(1 for n in number.values() if n >= rank))
        table = _Table(number, max([rank, *(n + 1 for n in number.values())]))
        stores = [table.operand(w.array, w.dtype, affine(w.offset), output=True)[0] for w in self.writes]
        values = [table.convert(w.value) for w in self.writes]
        operands, words = [], []
        for array, dtype, strides, constant, output in table.entries:
            literal = tuple(_literal(s, axis, known) for axis, s in enumerate(strides))
            operands.append(Operand(dtype, literal, output))
            words.append(BodyWord(constant, array))
            words += [BodyWord(s) for s, known in zip(strides, literal) if known is None]
        words += [BodyWord(s) for s in table.sizes]
        body = Body(tuple(operands), tuple(Store(s, v) for s, v in zip(stores, values)), len(table.sizes))
        return Normalised(body, tuple(words), tuple(self.extents[a] for a in self.axes))


def _literal(stride: Dim, axis: int, known: Known) -> int | None:
    """The stride where it shapes the code, None where it is a word."""
    return stride if isinstance(stride, int) and 0 <= stride <= known.most and axis >= known.axis else None


class _Table:
    """Operands and size words while a body is numbered."""

    def __init__(self, number: dict[int, int], axes: int) -> None:
        self.number, self.axes = number, axes
        self.entries: list[tuple[Hashable, DType, tuple[Dim, ...], Dim, bool]] = []
        self.sizes: list[Dim] = []
        self.memo: dict[Expr, Expr] = {}

    def operand(self, array: Hashable, dtype: DType, form: Affine, *, output: bool = False) -> tuple[int, Expr | None]:
        strides: list[Dim] = [0] * self.axes
        for axis, stride in form.strides.items():
            strides[self.number[axis]] = stride
        entry = (array, dtype, tuple(strides), form.constant, output)
        if entry not in self.entries:
            self.entries.append(entry)
        return self.entries.index(entry), form.rest

    def size(self, value: Dim) -> int:
        if value not in self.sizes:
            self.sizes.append(value)
        return self.sizes.index(value)

    def extent(self, value: Dim) -> tuple[str, int]:
        """The extent of a reduction axis, in the form `Body` describes."""
        if isinstance(value, int) and value <= 4:
            return "literal", value
        return "short" if isinstance(value, int) and value <= SHORT else "word", self.size(value)

    def convert(self, expr: Expr) -> Expr:
        """The expression with numbered axes, operands and size words; recursion follows expression depth."""
        if expr in self.memo:
            return self.memo[expr]
        known = as_dim(expr)
        if known is not None:
            # Small numbers shape the code; sizes are words, so that layers of other sizes share the kernel.
            literal = isinstance(known, int) and abs(known) <= MAX_LITERAL
            out = const(known, i64) if literal else Expr("dim", i64, arg=self.size(known))  # type: ignore[arg-type]
        elif expr.op == "iter":
            out = iteration(self.number[int(expr.arg)])  # type: ignore[call-overload]
        elif expr.op == "load":
            operand, rest = self.operand(expr.arg, expr.dtype, affine(expr.args[0]))  # type: ignore[arg-type]
            out = Expr("load", expr.dtype, () if rest is None else (self.convert(rest),), operand)
        elif expr.op in ("keep", "kept"):
            operand, _ = self.operand(expr.arg, expr.dtype, affine(expr.args[-1]), output=True)  # type: ignore[arg-type]
            out = Expr(expr.op, expr.dtype, tuple(self.convert(a) for a in expr.args[:-1]), operand)
        elif expr.op == "reduce":
            kind, axes, sizes = reduction(expr)
            body = self.convert(expr.args[0])
            extents = tuple(self.extent(s) for s in sizes)
            out = Expr("reduce", expr.dtype, (body,), (kind, tuple(self.number[a] for a in axes), extents))
        else:
            out = Expr(expr.op, expr.dtype, tuple(self.convert(a) for a in expr.args), expr.arg)
        self.memo[expr] = out
        return out
