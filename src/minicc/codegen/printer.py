"""Prints the body of a kernel: generated loops, and the epilogues of templates, as Numba-able Python.

Every expression is printed at the outermost loop where its loop variables are known, so that a softmax or a layer
normalisation comes out as row loops by itself. Reductions along the vector axis keep scalar accumulators;
reductions along other axes keep a block of accumulators, so that both vectorise. The printer owns every literal
and its type; it knows nothing of graphs or shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from minicc.codegen.literals import identity, literal, strip
from minicc.ir.expr import Expr, reduction, walk
from minicc.ir.types import DType, bf16, boolean, compute_dtype_name, f16, i8, i16, i32, u8, u16
from minicc.lower.kernel import SHORT, Body, LoopKernel

INDENT = "    "
BLOCK = 256  # accumulators of a blocked reduction; shorter runs of memory are read slowly
# Sums of floats are made of partial sums of so many terms, which bounds the error of long ones: fewer where every
# lane adds its terms one by one, more where the vector's lanes (and unrolled vectors) share them.
LANE_TERMS, SHARED_TERMS = 64, SHORT
LINE = 96
QUANTISED = (i8, u8, i16, u16, i32)  # types of quantised values and of their sums

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
    "bitand": "&", "bitor": "|", "bitxor": "^", "and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>",
}  # fmt: skip
NUMPY_CALLS = {"floor": "np.floor", "ceil": "np.ceil", "round": "np.rint", "trunc": "np.trunc", "sqrt": "np.sqrt"}
# Scalar helpers of kernels/cpu/scalar.py, valid for every type they are printed for.
_SCALAR_CALLS = {"sign": "sign", "floordiv": "floor_divide", "mod": "floor_mod", "fmod": "fmod"}
_VECTOR_MATH = frozenset(
    (
        "exp", "log", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
        "erf", "sigmoid", "pow", "atan2",
    )
)


@dataclass
class Scope:
    """The inside of one loop (or of the function): its variables, its lines, and what has been named in it."""

    axes: frozenset[int]
    depth: int
    lines: list[str] = field(default_factory=list)
    names: dict[object, str] = field(default_factory=dict)

    def line(self, text: str) -> None:
        self.lines.append(INDENT * self.depth + text)


@dataclass(frozen=True)
class Part:
    """How a long sum is cut: its axis, the variables of a part's bounds, the text of the extent, the part's length."""

    axis: int
    first: str
    stop: str
    limit: str
    terms: int


class BodyPrinter:
    """Prints one body; `scopes` is the stack of open loops."""

    def __init__(self, body: Body, base: int, variables: dict[int, str]) -> None:
        self.body, self.variables = body, dict(variables)
        self.imports: set[str] = {"arg"}
        self.math: set[str] = set()
        self.scalar: set[str] = set()
        self.tiles: set[str] = set()
        self.scopes: list[Scope] = []
        self.counter = 0
        self.uses: dict[Expr, int] = {}
        self.blocked: dict[Expr, str] = {}  # reductions already in a block of accumulators
        for store in body.stores:
            self.count_uses(store.value)
        self.addresses, self.stride_words, self.size_base = _word_layout(body, base)
        self.free: dict[Expr, frozenset[int]] = {}

    def count_uses(self, root: Expr) -> None:
        for expr in walk(root):
            for a in expr.args:
                self.uses[a] = self.uses.get(a, 0) + 1

    # -- scopes

    def open(self, axes: Iterable[int]) -> Scope:
        depth = self.scopes[-1].depth + 1 if self.scopes else 1
        scope = Scope(frozenset(axes), depth)
        self.scopes.append(scope)
        return scope

    def close(self, *headers: str) -> None:
        """End the innermost scope: its header lines, then its lines, join the enclosing one."""
        scope = self.scopes.pop()
        outer = self.scopes[-1]
        for header in headers:
            outer.line(header)
        outer.lines += scope.lines

    def scope_of(self, axes: frozenset[int]) -> Scope:
        """The outermost open scope where all these loop variables are known."""
        missing = set(axes)
        for scope in self.scopes:
            missing -= scope.axes
            if not missing:
                return scope
        raise AssertionError(f"loop variables {missing} are not bound")

    def fresh(self, prefix: str) -> str:
        self.counter += 1
        return f"{prefix}{self.counter}"

    # -- analysis

    def free_axes(self, expr: Expr) -> frozenset[int]:
        """Loop variables an expression depends on."""
        if expr in self.free:
            return self.free[expr]
        for e in walk(expr):
            if e in self.free:
                continue
            axes: frozenset[int] = frozenset().union(*(self.free[a] for a in e.args))
            if e.op == "iter":
                axes |= {int(e.arg)}  # type: ignore[call-overload]
            elif e.op in ("load", "keep", "kept"):
                operand = self.body.operands[int(e.arg)]  # type: ignore[call-overload]
                axes |= {axis for axis, s in enumerate(operand.strides) if s != 0}
            elif e.op == "acc":
                axes |= {3}
            elif e.op == "reduce":
                axes -= frozenset(reduction(e)[1])
            self.free[e] = axes
        return self.free[expr]

    # -- expressions

    def emit(self, expr: Expr) -> str:
        """The text of an expression at this point, having printed whatever it needs before."""
        if expr in self.blocked:
            return self.blocked[expr]
        if expr.op == "const":
            return literal(expr.arg, expr.dtype)
        if expr.op == "iter":
            return self.variables[int(expr.arg)]  # type: ignore[call-overload]
        if expr.op == "acc":
            return "acc"
        scope = self.scope_of(self.free_axes(expr))
        for open_scope in self.scopes:
            if expr in open_scope.names:
                return open_scope.names[expr]
        here = scope is self.scopes[-1]
        saved, self.scopes = self.scopes, self.scopes[: self.scopes.index(scope) + 1]
        try:
            text = self.emit_reduce(expr) if expr.op == "reduce" else self.text_of(expr)
        finally:
            inner = saved[len(self.scopes) :]
            self.scopes += inner
        once = self.uses.get(expr, 0) <= 1
        if expr.op == "reduce" or (here and once and len(text) < LINE // 2 and expr.op not in ("load", "select")):
            if expr.op == "reduce":
                scope.names[expr] = text
            return text
        name = self.fresh("d" if expr.op == "dim" else "v")
        scope.line(f"{name} = {strip(text)}")
        scope.names[expr] = name
        return name

    def text_of(self, expr: Expr) -> str:
        if expr.op == "dim":
            return f"arg(args, {self.size_base + int(expr.arg)})"  # type: ignore[call-overload]
        if expr.op == "load":
            return self.load_text(expr)
        if expr.op in ("keep", "kept"):
            return self.kept_text(expr)
        args = [self.emit(a) for a in expr.args]
        if expr.op == "cast":
            return self.cast_text(args[0], expr.args[0].dtype, expr.dtype)
        if expr.op == "select":
            return f"({args[1]} if {strip(args[0])} else {args[2]})"
        return self.wrap(self.call_text(expr, args), expr)

    def call_text(self, expr: Expr, args: list[str]) -> str:
        op, dtype = expr.op, expr.args[0].dtype
        if op in _INFIX:
            return f"({args[0]} {_INFIX[op]} {args[1]})"
        if op == "neg":
            return f"(-{args[0]})"
        if op == "not":
            return f"(not {args[0]})"
        if op == "bitnot":
            return f"(~{args[0]})"
        if op == "abs":
            return f"abs({strip(args[0])})"
        if op == "div" and dtype.is_float:
            return f"({args[0]} / {args[1]})"
        if op == "div":
            return self.scalar_call("truncate_divide", args)
        if op in ("min", "max"):
            # A NaN in the second place must come out too, unless that place is a number of ours.
            plain = not dtype.is_float or expr.args[1].op == "const"
            return f"{op}({', '.join(map(strip, args))})" if plain else self.scalar_call(f"{op}imum", args)
        if op in NUMPY_CALLS:
            return f"{NUMPY_CALLS[op]}({strip(args[0])})" if dtype.is_float else args[0]
        if op in _VECTOR_MATH and dtype.is_float:
            name = f"{op}_{compute_dtype_name(dtype)}"
            self.math.add(name)
            return f"{name}({', '.join(map(strip, args))})"
        if op == "pow":
            return self.scalar_call("integer_power", args)
        if op in _SCALAR_CALLS:
            return self.scalar_call(_SCALAR_CALLS[op], args)
        raise AssertionError(f"no scalar code for {op} of {dtype}")

    def scalar_call(self, name: str, args: list[str]) -> str:
        self.scalar.add(name)
        return f"{name}({', '.join(map(strip, args))})"

    def wrap(self, text: str, expr: Expr) -> str:
        """Integer results narrower than int64 are cut back to their type: Numba computes them in 64 bits."""
        if expr.dtype.is_integer and expr.dtype.name != "i64":
            return f"{expr.dtype.name}({strip(text)})"
        return text

    def cast_text(self, text: str, source: DType, target: DType) -> str:
        if target == boolean:
            return f"({text} != {literal(0, source)})"
        if target in (f16, bf16):  # arithmetic is in f32; rounding to the type happens here
            inner = text if source in (f16, bf16) else f"f32({strip(text)})"
            return self.scalar_call(f"round_{target.name}", [inner])
        if target.is_integer and source.is_float and target.name in ("u64",):
            return self.scalar_call("float_to_u64", [text])
        return f"{compute_dtype_name(target)}({strip(text)})"

    # -- memory

    def pointer(self, operand: int) -> str:
        """The typed pointer of an operand, named once at the top of the function; shared ones use the output's."""
        operand = self.place(operand)
        top = self.scopes[0]
        key = ("pointer", operand)
        if key not in top.names:
            dtype = self.body.operands[operand].dtype
            self.imports.add(f"ptr_{dtype.name}")
            name = f"p{operand}"
            top.line(f"{name} = ptr_{dtype.name}(arg(args, {self.addresses[operand]}))")
            top.names[key] = name
        return top.names[key]

    def offset(self, operand: int) -> str:
        """The affine element offset of an operand at this point; the part of outer loops is named there."""
        operand = self.place(operand)
        strides = self.body.operands[operand].strides
        total = ""
        for depth, scope in enumerate(self.scopes):
            terms = [self.term(operand, axis) for axis in sorted(scope.axes) if axis < len(strides) and strides[axis] != 0]
            if not terms:
                continue
            text = " + ".join(([total] if total else []) + terms)
            if depth == len(self.scopes) - 1:
                return text
            key = ("offset", operand)
            if key not in scope.names:
                name = self.fresh("at")
                scope.line(f"{name} = {text}")
                scope.names[key] = name
            total = scope.names[key]
        return total or "0"

    def place(self, operand: int) -> int:
        """The operand whose memory this is: the output's when they share it."""
        return self.body.stores[0].operand if self.body.operands[operand].shared else operand

    def term(self, operand: int, axis: int) -> str:
        known = self.body.operands[operand].strides[axis]
        factor = "" if known == 1 else f" * {self.stride(operand, axis) if known is None else known}"
        return self.variables[axis] + factor

    def stride(self, operand: int, axis: int) -> str:
        top = self.scopes[0]
        key = ("stride", operand, axis)
        if key not in top.names:
            name = f"s{operand}_{axis}"
            top.line(f"{name} = arg(args, {self.stride_words[operand, axis]})")
            top.names[key] = name
        return top.names[key]

    def load_text(self, expr: Expr) -> str:
        number = int(expr.arg)  # type: ignore[call-overload]
        operand = self.body.operands[number]
        pointer, offset = self.pointer(number), self.offset(number)
        if expr.args:
            rest = strip(self.emit(expr.args[0]))
            offset = rest if offset == "0" else f"{offset} + {rest}"
        verb = "ld_out" if operand.shared else "ld"
        if operand.dtype in (f16, bf16):
            verb = f"{verb}_{operand.dtype.name}"
        self.imports.add(verb)
        text = f"{verb}({pointer}, {offset})"
        return f"({text} != 0)" if operand.dtype == boolean else text

    def kept_text(self, expr: Expr) -> str:
        """A term of a sum, stored to the output on the way; or read from there."""
        number = int(expr.arg)  # type: ignore[call-overload]
        if expr.op == "kept":
            self.imports.add("ld_out")
            return f"ld_out({self.pointer(number)}, {self.offset(number)})"
        self.imports.add("st")
        name, text = self.fresh("v"), strip(self.emit(expr.args[0]))
        self.scopes[-1].line(f"{name} = {text}")
        self.scopes[-1].line(f"st({self.pointer(number)}, {self.offset(number)}, {name})")
        return name

    def store(self, number: int, value: Expr) -> None:
        operand = self.body.operands[number]
        text = strip(self.emit(value))
        if operand.dtype == boolean:
            text = f"u8({text})"
        verb = f"st_{operand.dtype.name}" if operand.dtype in (f16, bf16) else "st"
        self.imports.add(verb)
        self.scopes[-1].line(f"{verb}({self.pointer(number)}, {self.offset(number)}, {text})")

    # -- reductions

    def extent_text(self, extent: tuple[str, int]) -> str:
        form, number = extent
        return str(number) if form == "literal" else f"arg(args, {self.size_base + number})"

    def emit_reduce(self, expr: Expr) -> str:
        """A reduction with scalar accumulators in the current (innermost) scope; returns the accumulator."""
        kind, axes, extents = reduction(expr)
        body = expr.args[0]
        acc = self.fresh("r")
        scope = self.scopes[-1]
        if kind.startswith("arg"):
            return self.emit_arg_reduce(kind, axes[0], extents[0], body, acc)
        start = identity(kind, body.dtype)
        scope.line(f"{acc} = {start}")
        terms = SHARED_TERMS if longest(extents) == len(axes) - 1 else LANE_TERMS
        part = self.part_of(expr, terms)
        into = self.fresh("r") if part else acc
        for axis in axes:
            self.variables.setdefault(axis, f"k{axis}")
            if part and axis == part.axis:
                self.open_part(part).line(f"{into} = {start}")
            self.open([axis])
        self.scopes[-1].line(f"{into} = {self.update(kind, into, self.emit(body), body.dtype)}")
        for axis, extent in reversed(list(zip(axes, extents))):
            if part and axis == part.axis:
                self.close(f"for {self.variables[axis]} in range({part.first}, {part.stop}):")
                self.scopes[-1].line(f"{acc} = {acc} + {into}")
                self.close_part(part)
            else:
                self.close(f"for {self.variables[axis]} in range({self.extent_text(extent)}):")
        return acc

    def part_of(self, expr: Expr, terms: int) -> Part | None:
        """How to sum in parts of `terms` terms; None for what is no sum of floats, or has no more terms than that."""
        kind, axes, extents = reduction(expr)
        place = longest(extents)
        form, number = extents[place]
        most = {"literal": number, "short": SHORT}.get(form)
        if kind != "sum" or not expr.dtype.is_float or (most is not None and most <= terms):
            return None
        return Part(axes[place], self.fresh("first"), self.fresh("stop"), self.extent_text(extents[place]), terms)

    def open_part(self, part: Part) -> Scope:
        scope = self.open([])
        scope.line(f"{part.stop} = min({part.first} + {part.terms}, {part.limit})")
        return scope

    def close_part(self, part: Part) -> None:
        self.scopes[-1].line(f"{part.first} = {part.stop}")
        self.close(f"{part.first} = 0", f"while {part.first} < {part.limit}:")  # costs less than a range with a step

    def emit_arg_reduce(self, kind: str, axis: int, extent: tuple[str, int], body: Expr, acc: str) -> str:
        """First (or last) position of the extremum; a NaN counts as the extremum, as in numpy."""
        best = self.fresh("b")
        scope = self.scopes[-1]
        scope.line(f"{acc} = 0")
        scope.line(f"{best} = {identity('max' if 'max' in kind else 'min', body.dtype)}")
        self.variables.setdefault(axis, f"k{axis}")
        inner = self.open([axis])
        value = strip(self.emit(body))
        name = self.fresh("v")
        inner.line(f"{name} = {value}")
        relation = (">" if "max" in kind else "<") + ("=" if kind.endswith("last") else "")
        is_nan = f" or ({name} != {name} and {best} == {best})" if body.dtype.is_float else ""
        inner.line(f"if {name} {relation} {best}{is_nan} or {self.variables[axis]} == 0:")
        inner.line(f"{INDENT}{best} = {name}")
        inner.line(f"{INDENT}{acc} = {self.variables[axis]}")
        self.close(f"for {self.variables[axis]} in range({self.extent_text(extent)}):")
        return acc

    def update(self, kind: str, acc: str, value: str, dtype: DType) -> str:
        if dtype == boolean:
            return f"{acc} {'|' if kind in ('max', 'sum') else '&'} {value}"
        if not dtype.is_float:
            text = {"sum": f"{acc} + {value}", "prod": f"{acc} * {value}"}.get(kind, f"{kind}({acc}, {strip(value)})")
            return f"{dtype.name}({text})" if dtype.is_integer and dtype.name != "i64" else text
        name = {"sum": "add_reassoc", "prod": "mul_reassoc", "max": "reduce_max", "min": "reduce_min"}[kind]
        self.scalar.add(name)
        return f"{name}({acc}, {strip(value)})"

    def blocked_reductions(self, axis: int) -> list[Expr]:
        """Reductions to be done for a block of the vector axis at once, dependencies first."""
        found: list[Expr] = []
        for store in self.body.stores:
            for expr in walk(store.value):
                blocked = expr.op == "reduce" and axis in self.free_axes(expr) and self.prefers_block(expr, axis)
                found += [expr] if blocked else []
        return list(dict.fromkeys(found))

    def prefers_block(self, expr: Expr, axis: int) -> bool:
        """True when some load of the reduced expression is contiguous along the vector axis."""
        kind = reduction(expr)[0]
        if kind.startswith("arg"):
            return False
        contiguous = False
        for e in walk(expr.args[0]):
            if e.op == "load":
                strides = self.body.operands[int(e.arg)].strides  # type: ignore[call-overload]
                contiguous |= strides[axis] == 1
        return contiguous

    def emit_blocked(self, expr: Expr, axis: int, width: str) -> None:
        """A reduction with one accumulator per lane of the block; afterwards it reads as that accumulator."""
        kind, axes, extents = reduction(expr)
        body = expr.args[0]
        stack = self.stack_of(body.dtype)
        part = self.part_of(expr, LANE_TERMS)
        acc = self.fresh("a")
        into = self.fresh("a") if part else acc
        self.imports |= {f"stack_{stack}", "ld_scratch", "st_scratch"}
        start = self.to_stack(identity(kind, body.dtype), stack, body.dtype)
        for name in dict.fromkeys((acc, into)):
            self.scopes[0].line(f"{name} = stack_{stack}({BLOCK})")

        def each_lane(scope: Scope, text: str) -> None:
            scope.line(f"for l in range({width}):")
            scope.line(f"{INDENT}{text}")

        each_lane(self.scopes[-1], f"st_scratch({acc}, l, {start})")
        for a in axes:
            self.variables.setdefault(a, f"k{a}")
            if part and a == part.axis:
                each_lane(self.open_part(part), f"st_scratch({into}, l, {start})")
            self.open([a])
        inner = self.open([axis])
        inner.line(f"{self.variables[axis]} = j0 + l")
        value = self.emit(body)
        current = self.from_stack(f"ld_scratch({into}, l)", stack, body.dtype)
        inner.line(f"st_scratch({into}, l, {self.to_stack(self.update(kind, current, value, body.dtype), stack, body.dtype)})")
        self.close(f"for l in range({width}):")
        for a, extent in reversed(list(zip(axes, extents))):
            if part and a == part.axis:
                self.close(f"for {self.variables[a]} in range({part.first}, {part.stop}):")
                each_lane(self.scopes[-1], f"st_scratch({acc}, l, ld_scratch({acc}, l) + ld_scratch({into}, l))")
                self.close_part(part)
            else:
                self.close(f"for {self.variables[a]} in range({self.extent_text(extent)}):")
        self.blocked[expr] = self.from_stack(f"ld_scratch({acc}, l)", stack, body.dtype)

    def stack_of(self, dtype: DType) -> str:
        """The type of scratch memory for values of a type."""
        if dtype.is_float:
            return "f64" if compute_dtype_name(dtype) == "f64" else "f32"
        return "i32" if dtype.bits <= 32 and dtype.name != "u32" else "i64"

    def to_stack(self, text: str, stack: str, dtype: DType) -> str:
        return text if stack == compute_dtype_name(dtype) else f"{stack}({text})"

    def from_stack(self, text: str, stack: str, dtype: DType) -> str:
        if dtype == boolean:
            return f"({text} != 0)"
        return text if stack == compute_dtype_name(dtype) else f"{compute_dtype_name(dtype)}({text})"


def _word_layout(body: Body, base: int) -> tuple[list[int], dict[tuple[int, int], int], int]:
    """Word numbers of addresses, of run-time strides by (operand, axis), and of the first size."""
    addresses, strides, word = [], {}, base
    for number, operand in enumerate(body.operands):
        addresses.append(word)
        word += 1
        for axis, stride in enumerate(operand.strides):
            if stride is None:
                strides[number, axis] = word
                word += 1
    return addresses, strides, word


def longest(extents: tuple[tuple[str, int], ...]) -> int:
    """The axis of a reduction to cut into parts: the last one of unknown extent, else of run-time extent, else the longest."""
    for wanted in ("word", "short"):
        found = [place for place, (form, _) in enumerate(extents) if form == wanted]
        if found:
            return found[-1]
    return max(range(len(extents)), key=lambda place: extents[place][1])


def rounds_each(body: Body) -> bool:
    """Whether every operation of a body must be rounded by itself: where values are quantised or dequantised.

    What is quantised next must be rounded as the model says: a last bit that differs there moves a quantised value by
    a whole step.
    """
    for expr in (e for store in body.stores for e in walk(store.value)):
        dequantises = expr.op == "cast" and expr.dtype.is_float and expr.args[0].dtype in QUANTISED
        if dequantises or expr.op == "round":
            return True
    return False


def print_loops(kernel: LoopKernel) -> tuple[BodyPrinter, list[str]]:
    """The lines of `def kernel(args, begin, end)` for generated loops."""
    rank, body = kernel.rank, kernel.body
    names = {axis: f"i{axis}" for axis in range(rank - 1)}
    names[rank - 1] = "j"
    printer = BodyPrinter(body, rank, names)
    top = printer.open([])
    reduced = any(e.op == "reduce" for s in body.stores for e in walk(s.value))
    vector = rank - 1
    if rank == 0:
        for store in body.stores:
            printer.store(store.operand, store.value)
    elif rank == 1 and not reduced:
        printer.open([0])
        for store in body.stores:
            printer.store(store.operand, store.value)
        printer.close("for j in range(begin, end):")
    else:
        _print_rows(printer, rank, vector)
    return printer, ["def kernel(args, begin, end):", *top.lines]


def print_places(top: Scope, row: Scope, rank: int) -> None:
    """The places i0, i1, ... of a row along all axes but the last, from its number."""
    rest = "row"
    for axis in range(rank - 2, 0, -1):
        top.line(f"n{axis} = arg(args, {axis})")
        row.line(f"i{axis} = {rest} % n{axis}")
        row.line(f"t{axis} = {rest} // n{axis}")
        rest = f"t{axis}"
    if rank > 1:
        row.line(f"i0 = {rest}")


def _print_rows(printer: BodyPrinter, rank: int, vector: int) -> None:
    """Rows of the domain, each with its inner loop, whole or in blocks."""
    top = printer.scopes[0]
    print_places(top, printer.open(range(rank - 1)), rank)
    top.line(f"n = arg(args, {vector})")
    blocked = printer.blocked_reductions(vector)
    begin, end = ("begin", "end") if rank == 1 else ("0", "n")
    if not blocked:
        printer.open([vector])
        for store in printer.body.stores:
            printer.store(store.operand, store.value)
        printer.close(f"for j in range({begin}, {end}):" if rank == 1 else "for j in range(n):")
    else:
        block = printer.open([])
        block.line(f"w = min({end} - j0, {BLOCK})")
        for expr in blocked:
            printer.emit_blocked(expr, vector, "w")
        inner = printer.open([vector])
        inner.line("j = j0 + l")
        for store in printer.body.stores:
            printer.store(store.operand, store.value)
        printer.close("for l in range(w):")
        printer.close(f"for j0 in range({begin}, {end}, {BLOCK}):")
    if rank == 1:
        scope = printer.scopes.pop()
        top.lines += [line[len(INDENT) :] for line in scope.lines]
    else:
        printer.close("for row in range(begin, end):")


def print_epilogue(body: Body, base: int, make: type[BodyPrinter] = BodyPrinter) -> tuple[BodyPrinter, list[str]]:
    """The lines of `def epilogue(args, b0, b1, i, j, acc)` that computes and stores one output element."""
    printer = make(body, base, {0: "b0", 1: "b1", 2: "i", 3: "j"})
    top = printer.open(range(4))
    for store in body.stores:
        printer.store(store.operand, store.value)
    return printer, ["def epilogue(args, b0, b1, i, j, acc):", *top.lines]

