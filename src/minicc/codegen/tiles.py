"""Prints generated loops that take several rows at once; lowering has decided which do (`lower/body.py`).

Tiles: an operand that lies along another axis than the result is read along its own, a tile at a time, and transposed into
scratch memory, from which the loops over the tile take it. That axis is the last but one, and the stride along it is 1.
Short rows: their length is part of the code, so that LLVM unrolls them and makes vectors of several rows.
"""

from __future__ import annotations

from minicc.codegen.printer import INDENT, BodyPrinter, print_places
from minicc.ir.expr import Expr, walk
from minicc.ir.types import f32
from minicc.lower.kernel import LoopKernel

LINES, COLUMNS = 64, 64  # of a tile: whole cache lines are read and written, and scratch memory stays in L1


def staged_loads(kernel: LoopKernel) -> list[Expr]:
    """The loads that are read in tiles: along the last axis but one, by a kernel that stores along the last."""
    last = kernel.rank - 1
    exprs = dict.fromkeys(e for s in kernel.body.stores for e in walk(s.value))
    found = []
    for e in exprs:
        if last > 0 and e.op == "load" and not e.args:
            strides = kernel.body.operands[int(e.arg)].strides  # type: ignore[call-overload]
            if strides[last - 1] == 1 and strides[last] is None:
                found.append(e)
    return found


def print_blocks(kernel: LoopKernel, lanes: int) -> tuple[BodyPrinter, list[str]]:
    """The lines of `def kernel(args, begin, end)`; its rows are those of the last axis but one, as of other loops.

    lanes: float32 in a vector register.
    """
    last, line = kernel.rank - 1, kernel.rank - 2
    printer = BodyPrinter(kernel.body, kernel.rank, {axis: f"i{axis}" for axis in range(line)} | {line: "i", last: "j"})
    top = printer.open([])
    outer = printer.open(range(line))
    print_places(top, outer, kernel.rank)
    outer.line(f"h = {f'min(n{line} - i{line}, end - row)' if line else 'end - row'}")
    if kernel.short:
        _print_lines(printer, kernel, "j", str(kernel.short))
    else:
        outer.line(f"h = min({LINES}, h)")
        top.line(f"n = arg(args, {last})")
        columns = printer.open([])
        columns.line(f"w = min({COLUMNS}, n - j0)")
        for load in staged_loads(kernel):
            printer.blocked[load] = _stage(printer, load, lanes, line)
        _print_lines(printer, kernel, "m", "w", "j = j0 + m")
        printer.close(f"for j0 in range(0, n, {COLUMNS}):")
    outer.line("row += h")
    printer.close("row = begin", "while row < end:")
    return printer, ["def kernel(args, begin, end):", *top.lines]


def _print_lines(printer: BodyPrinter, kernel: LoopKernel, variable: str, extent: str, *head: str) -> None:
    line = kernel.rank - 2
    printer.open([line]).line(f"i = i{line} + l")
    inner = printer.open([kernel.rank - 1])
    for text in head:
        inner.line(text)
    for store in kernel.body.stores:
        printer.store(store.operand, store.value)
    printer.close(f"for {variable} in range({extent}):")
    printer.close("for l in range(h):")


def _stage(printer: BodyPrinter, load: Expr, lanes: int, line: int) -> str:
    """Print the transposition of one load's tile into scratch memory; how its elements are read there."""
    number, last, scope = int(load.arg), line + 1, printer.scopes[-1]  # type: ignore[call-overload]
    name, dtype = f"tile{number}", load.dtype
    stack = printer.stack_of(dtype)
    printer.scopes[0].line(f"{name} = stack_{stack}({LINES * COLUMNS})")
    printer.imports |= {f"stack_{stack}", "ld_scratch"}
    named, whole = dict(printer.variables), dtype == f32
    printer.variables |= {line: f"i{line}", last: "j0"} if whole else {line: f"(i{line} + l)", last: "(j0 + m)"}
    printer.open([line, last])
    if whole:
        pointer, at, step = printer.pointer(number), printer.offset(number), printer.stride(number, last)
        source = f"off({pointer}, {at} + l + m * {step})"
        text = f"transpose_tile({lanes}, {source}, {step}, h - l, w - m, off({name}, l * {COLUMNS} + m), {COLUMNS})"
        printer.imports.add("off")
        printer.tiles.add("transpose_tile")
    else:
        value = printer.to_stack(printer.load_text(load), stack, dtype)
        text = f"st_scratch({name}, l * {COLUMNS} + m, {value})"
        printer.imports.add("st_scratch")
    printer.scopes.pop()
    printer.variables = named
    scope.line(f"for m in range(0, w, {lanes if whole else 1}):")
    scope.line(f"{INDENT}for l in range(0, h, {lanes if whole else 1}):")
    scope.line(f"{INDENT * 2}{text}")
    return printer.from_stack(f"ld_scratch({name}, l * {COLUMNS} + m)", stack, dtype)
