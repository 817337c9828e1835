"""The loop frame of generated CUDA kernels around the body that `printer` prints, and how it is launched.

Three frames. "elements": a thread per element, or per vector of neighbours that are loaded and stored together, or a
block per tile where a load walks memory along another axis; whatever is reduced is reduced by one thread. "rows": a
team of threads per row, for kernels that reduce once per row (softmax, normalisation): its threads share the
reductions and then the row. "blocks": a team per element, whose threads share its reductions, where these walk memory
contiguously and neighbouring elements do not. A team is a warp or a block, as the launch says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from minicc.codegen.literals import identity, strip
from minicc.codegen.printer import INDENT, NUMPY_CALLS, BodyPrinter, Scope, longest, rounds_each
from minicc.ir.expr import Expr, binary, const, reduction, walk
from minicc.ir.types import bf16, boolean, compute_dtype_name, f16, f32
from minicc.kernels.cuda_launch import ELEMENT_THREADS, REDUCTION_THREADS, Launch, launch_elements, launch_rows, launch_tiles
from minicc.lower.kernel import Body, LoopKernel, Operand, Store
from minicc.targets.cuda import CudaTarget

# Types a team can reduce together (by shuffles), and how.
_SHARED_TYPES = ("f32", "f64", "i32", "i64")
_SHARED_KINDS = ("sum", "prod", "max", "min")
# The widest access, and the most elements in one: each is a copy of the body.
ACCESS_BYTES, MOST_LANES = 16, 8
# Row kernels with so few words have the registers for three blocks on a multiprocessor.
FEW_WORDS = 20
# Loads that a kernel passes through shared memory, and the extent from which on that pays.
MOST_TILES, LEAST_TILE = 4, 8


class CudaPrinter(BodyPrinter):
    """Prints a body for CUDA.

    together: how many scopes, from the outermost on, all threads of a team run in step.
    exact: whether every operation is rounded as it stands.
    """

    def __init__(self, body: Body, base: int, variables: dict[int, str]) -> None:
        super().__init__(body, base, variables)
        self.together, self.exact = 0, rounds_each(body)

    def call_text(self, expr: Expr, args: list[str]) -> str:
        """As for the CPU, but with functions that CUDA has."""
        is_float = expr.args[0].dtype.is_float
        if expr.op in NUMPY_CALLS and is_float:
            return self.scalar_call(NUMPY_CALLS[expr.op].removeprefix("np."), args)
        if expr.op in ("min", "max") and is_float:  # CUDA's own drop a NaN
            return self.scalar_call(f"{expr.op}imum", args)
        return super().call_text(expr, args)

    def text_of(self, expr: Expr) -> str:
        """As for the CPU; what a whole row is divided by is divided by once."""
        if expr.op == "div" and expr.dtype == f32 and not self.exact:
            a, b = expr.args
            if a.op != "const" and self.free_axes(b) < self.free_axes(a) and any(e.op == "reduce" for e in walk(b)):
                return self.emit(a * binary("div", const(1.0, f32), b))
        return super().text_of(expr)

    def emit_reduce(self, expr: Expr) -> str:
        """As for the CPU; shared by the threads of a team where all of them come by."""
        kind, axes, extents = reduction(expr)
        body = expr.args[0]
        if len(self.scopes) > self.together or not shareable(expr):
            return super().emit_reduce(expr)
        for inner in walk(body):  # reductions that this one needs come before its loops
            if inner.op == "reduce" and self.free_axes(inner) <= self.bound():
                self.emit(inner)
        acc, scope = self.fresh("r"), self.scopes[-1]
        scope.line(f"{acc} = {identity(kind, body.dtype)}")
        limits = [self.extent_text(e) for e in extents]
        shared = longest(extents)
        for axis in axes:
            self.variables.setdefault(axis, f"k{axis}")

        def step() -> None:
            update = self.update(kind, acc, self.emit(body), body.dtype)
            self.scopes[-1].line(f"{acc} = {update}")

        outer = list(range(len(axes))) if shared != len(axes) - 1 else list(range(len(axes) - 1))
        for place in outer:
            self.open([axes[place]])
        if shared == len(axes) - 1:
            self.team_loop(axes[shared], limits[shared], [e for e in walk(body) if e.op == "load"], step)
        else:
            step()
        for place in reversed(outer):
            name = self.variables[axes[place]]
            if place == shared:
                self.close_loop(name, "lane", limits[place], "team")
            else:
                self.close(f"for {name} in range({limits[place]}):")
        scope.line(f"{acc} = {self.scalar_call(f'team_{kind}_{compute_dtype_name(body.dtype)}', [acc, 'team'])}")
        return acc

    def team_loop(self, axis: int, limit: str, loads: Sequence[Expr], step: Callable[[], object],
                  stores: Sequence[int] = (), finish: Callable[[list[Any]], None] | None = None) -> None:  # fmt: skip
        """Loops in which a team shares out the positions of an axis: over whole vectors, then over what is left.

        step: prints the work at one position. stores: operands that `finish` stores, given what `step` returned for
        each position of a vector, or for a single one.
        """
        name, operands = self.variables[axis], self.body.operands
        known = self.bound() | {axis}
        direct = [e for e in loads if not e.args and self.free_axes(e) <= known]
        found = dict.fromkeys(e for e in direct if operands[int(e.arg)].strides[axis] == 1)  # type: ignore[call-overload]
        touched = list(dict.fromkeys(self.place(n) for n in (*(int(e.arg) for e in found), *stores)))  # type: ignore[call-overload]
        lanes = min([MOST_LANES, *(ACCESS_BYTES // operands[n].dtype.bytes for n in touched)])
        strided = any(operands[int(e.arg)].strides[axis] is None for e in loads)  # type: ignore[call-overload]
        vectors = bool(touched) and lanes > 1 and not strided and all(operands[n].strides[axis] == 1 for n in stores)
        if vectors:
            head, whole = self.heads(touched, lanes, limit)
            self.open([])
            self.part(axis)
            inputs = {e: self.fresh("x") for e in found}
            for load, x in inputs.items():
                verb = "ld_out_vector" if operands[int(load.arg)].shared else "ld_vector"  # type: ignore[call-overload]
                self.scopes[-1].line(f"{x} = {self.access(verb, int(load.arg), str(lanes))}")  # type: ignore[call-overload]
            self.close()
            before, results = dict(self.blocked), []
            for lane in range(lanes):
                self.part(axis)
                self.variables[axis] = f"({name} + {lane})" if lane else name
                self.blocked |= {e: f"({x}[{lane}] != 0)" if e.dtype == boolean else f"{x}[{lane}]" for e, x in inputs.items()}
                results.append(step())
                self.close()
            self.blocked, self.variables[axis] = before, name
            if finish is not None:
                self.part(axis)
                finish(results)
                self.close()
            self.close_loop(name, f"{head} + lane * {lanes}", whole, f"team * {lanes}")
        loop = self.open([])
        self.part(axis)
        if vectors:
            loop.line(f"{name} = left if left < {head} else left - {head} + {whole}")
        single = step()
        if finish is not None:
            finish([single])
        self.close()
        if vectors:
            self.close_loop("left", "lane", f"{limit} - {whole} + {head}", "team")
        else:
            self.close_loop(name, "lane", limit, "team")

    def heads(self, operands: Sequence[int], lanes: int, limit: str) -> tuple[str, str]:
        """Names of two positions of an axis: whole vectors lie from the first to the second one.

        Before the first vector come the elements up to a multiple of its size. Where operands reach that at different
        positions there are no vectors.
        """
        scope, head, whole = self.scopes[-1], self.fresh("head"), self.fresh("whole")
        places = []
        for number in operands:
            size = self.body.operands[number].dtype.bytes
            place, offset = self.fresh("e"), self.offset(number)
            scope.line(f"{place} = divide(arg(args, {self.addresses[number]}), {size}) + {offset}")
            places.append(place)
        scope.line(f"{head} = min(-{places[0]} & {lanes - 1}, {limit})")
        other = " | ".join(f"({places[0]} ^ {place})" for place in places[1:])
        vectors = f"divide({limit} - {head}, {lanes}) * {lanes}"
        scope.line(f"{whole} = {head} + ({vectors}" + (f" if ({other}) & {lanes - 1} == 0 else 0)" if other else ")"))
        self.imports.add("divide")
        return head, whole

    def bound(self) -> frozenset[int]:
        """The axes whose variables are known here."""
        return frozenset().union(*(scope.axes for scope in self.scopes))

    def part(self, axis: int) -> None:
        """Open a scope that knows an axis and stands as deep as the innermost one."""
        self.open([axis]).depth -= 1

    def close_loop(self, name: str, first: str, limit: str, step: str) -> None:
        """End the innermost scope as a loop over first, first + step, ...; a range would divide to count its turns."""
        self.scopes[-1].line(f"{name} += {step}")
        self.close(f"{name} = {first}", f"while {name} < {limit}:")

    def access(self, verb: str, number: int, *more: str) -> str:
        """The call of a load or store of an operand at this point."""
        dtype = self.body.operands[number].dtype
        verb = f"{verb}_{dtype.name}" if dtype in (f16, bf16) else verb
        self.imports.add(verb)
        return f"{verb}({', '.join([self.pointer(number), self.offset(number), *more])})"

    def word(self, name: str) -> str:
        """The call of a word without parameters."""
        self.imports.add(name)
        return f"{name}()"


def aligned(printer: CudaPrinter, operands: Sequence[int], counts: Sequence[int], lanes: int) -> str:
    """The condition under which vectors of operands lie at multiples of their size.

    counts: words that must be multiples of `lanes`.
    """
    terms: dict[int, list[int]] = {lanes: list(counts)}
    for number in operands:
        terms.setdefault(printer.body.operands[number].dtype.bytes * lanes, []).append(printer.addresses[number])
    texts = [f"(({' | '.join(f'arg(args, {w})' for w in words)}) & {size - 1})" for size, words in terms.items() if words]
    return " | ".join(texts) + " == 0"


def _printer(kernel: LoopKernel) -> CudaPrinter:
    return CudaPrinter(kernel.body, kernel.rank, {axis: f"i{axis}" for axis in range(kernel.rank)})


def shareable(expr: Expr) -> bool:
    """Whether threads of a team can reduce this together."""
    dtype = expr.args[0].dtype
    return reduction(expr)[0] in _SHARED_KINDS and dtype.name in (*_SHARED_TYPES, "f16", "bf16")


def _reductions(kernel: LoopKernel) -> list[Expr]:
    return [e for s in kernel.body.stores for e in walk(s.value) if e.op == "reduce" and shareable(e)]


def frame(kernel: LoopKernel) -> str:
    """The frame of a kernel: "elements", "rows" or "blocks"."""
    printer, reductions = _printer(kernel), _reductions(kernel)
    if not reductions:
        return "elements"
    vector = kernel.rank - 1
    if kernel.rank == 0:
        return "blocks"
    if kernel.rank > 1 and any(vector not in printer.free_axes(e) for e in reductions):
        return "rows"
    contiguous = any(_walks_contiguously(printer, e) for e in reductions)
    return "blocks" if contiguous and not any(printer.prefers_block(e, vector) for e in reductions) else "elements"


def _walks_contiguously(printer: BodyPrinter, expr: Expr) -> bool:
    """True when some load of the reduced expression is contiguous along the shared reduction axis."""
    _, axes, extents = reduction(expr)
    axis = axes[longest(extents)]
    loads = [e for e in walk(expr.args[0]) if e.op == "load"]
    return any(printer.body.operands[int(e.arg)].strides[axis] == 1 for e in loads)  # type: ignore[call-overload]


def launch_loops(kernel: LoopKernel, words: Sequence[int], target: CudaTarget) -> Launch:
    """The launch of generated loops with these words."""
    chosen, extents = frame(kernel), words[: kernel.rank]
    count = prod(extents)
    if chosen == "elements":
        tiles = bool(transposed_loads(kernel)) and min(extents[-2:]) >= LEAST_TILE
        if tiles and words[_inner_stride(_printer(kernel), kernel)] == 1:
            return launch_tiles(count // (extents[-1] * extents[-2]), extents[-2], extents[-1], target)
        return launch_elements(-(-count // vector_lanes(kernel)), target)
    if chosen == "rows":
        return launch_rows(count // extents[-1] if count else 0, extents[-1], target)
    sizes = kernel.rank + kernel.body.n_words - kernel.body.sizes
    terms = [prod(n if form == "literal" else words[sizes + n] for form, n in reduction(e)[2]) for e in _reductions(kernel)]
    return launch_rows(count, max(terms), target)


# ----------------------------------------------------------------------------------------------- vectors


def vector_loads(kernel: LoopKernel) -> list[Expr]:
    """The loads that are contiguous along the last axis and depend on nothing but the axes."""
    last = kernel.rank - 1
    found = dict.fromkeys(e for s in kernel.body.stores for e in walk(s.value) if e.op == "load" and not e.args)
    return [e for e in found if _operand(kernel, e).strides[last] == 1]


def _operand(kernel: LoopKernel, load: Expr) -> Operand:
    return kernel.body.operands[int(load.arg)]  # type: ignore[call-overload]


def vector_lanes(kernel: LoopKernel) -> int:
    """How many neighbours along the last axis a thread takes at once: 1 where memory is not walked contiguously."""
    last, body = kernel.rank - 1, kernel.body
    exprs = [e for s in body.stores for e in walk(s.value)]
    if kernel.rank == 0 or any(e.op == "reduce" for e in exprs):
        return 1
    stored = [body.operands[s.operand] for s in body.stores]
    if any(o.strides[last] != 1 for o in stored) or any(o.strides[last] is None for o in body.operands):
        return 1
    sizes = [o.dtype.bytes for o in (*stored, *(_operand(kernel, e) for e in vector_loads(kernel)))]
    return min(MOST_LANES, ACCESS_BYTES // max(sizes))


def _print_vectors(kernel: LoopKernel, lanes: int) -> tuple[BodyPrinter, list[str]]:
    """A function of one element, a loop over whole vectors where memory is aligned, and a loop over the other elements."""
    body, rank = kernel.body, kernel.rank
    loads, axes = vector_loads(kernel), range(rank)
    printer, last = _printer(kernel), rank - 1
    inputs, function = _element(printer, kernel, loads)
    top = printer.open([])
    for axis in axes:
        top.line(f"n{axis} = arg(args, {axis})")
    printer.imports.add("divide")
    top.line(f"columns = divide(n{last}, {lanes})")
    top.line("vectors = 0")
    touched = dict.fromkeys(printer.place(n) for n in [*(s.operand for s in body.stores), *(int(e.arg) for e in loads)])  # type: ignore[call-overload]
    strides = [word for (number, _), word in printer.stride_words.items() if number in touched]
    top.line(f"if {aligned(printer, list(touched), strides + [last] if last else [], lanes)}:")
    top.line(INDENT + f"vectors = {' * '.join([*(f'n{axis}' for axis in axes[:-1]), 'columns'])}")

    inner = printer.open(axes)
    _decode(inner, [f"n{axis}" for axis in axes[:-1]] + ["columns"], [f"i{axis}" for axis in axes[:-1]] + ["column"])
    inner.line(f"i{last} = column * {lanes}")
    for load, name in inputs.items():
        verb = "ld_out_vector" if _operand(kernel, load).shared else "ld_vector"
        inner.line(f"{name} = {printer.access(verb, int(load.arg), str(lanes))}")  # type: ignore[call-overload]
    for lane in range(lanes):
        place = [f"i{axis}" for axis in axes[:-1]] + [f"i{last} + {lane}" if lane else f"i{last}"]
        inner.line(f"y{lane} = element({', '.join(['args', *place, *(f'{name}[{lane}]' for name in inputs.values())])})")
    for number, store in enumerate(body.stores):
        part = f"[{number}]" if len(body.stores) > 1 else ""
        values = ", ".join(f"y{lane}{part}" for lane in range(lanes))
        inner.line(printer.access("st_vector", store.operand, f"({values})"))
    printer.close_loop("at", printer.word("first_element"), "vectors", printer.word("all_threads"))

    _print_singles(printer, kernel, loads, f"vectors * {lanes} + first_element()")
    return printer, [*_head(kernel, ELEMENT_THREADS), *function, "def kernel(args):", *top.lines]


def _element(printer: CudaPrinter, kernel: LoopKernel, loads: Sequence[Expr]) -> tuple[dict[Expr, str], list[str]]:
    """(the parameters that stand for loads, the lines of `def element`, the function of one element)."""
    axes = range(kernel.rank)
    inputs = {load: f"x{number}" for number, load in enumerate(loads)}
    element = _printer(kernel)
    scope = element.open(axes)
    element.blocked |= {e: f"({name} != 0)" if e.dtype == boolean else name for e, name in inputs.items()}
    scope.line(f"return {', '.join(_stored(element, store) for store in kernel.body.stores)}")
    names = ["args", *(f"i{axis}" for axis in axes), *inputs.values()]
    printer.imports |= {*element.imports, "helper"}
    printer.scalar |= element.scalar
    printer.math |= element.math
    return inputs, ["@helper", f"def element({', '.join(names)}):", *scope.lines, "", ""]


def _store_element(printer: CudaPrinter, kernel: LoopKernel, given: Sequence[str]) -> None:
    """The lines that compute and store one element."""
    scope, stores = printer.scopes[-1], kernel.body.stores
    scope.line(f"y = element({', '.join(['args', *(f'i{axis}' for axis in range(kernel.rank)), *given])})")
    for number, store in enumerate(stores):
        scope.line(printer.access("st", store.operand, f"y[{number}]" if len(stores) > 1 else "y"))


def _print_singles(printer: CudaPrinter, kernel: LoopKernel, loads: Sequence[Expr], first: str) -> None:
    """The loop over single elements from `first` on."""
    axes = range(kernel.rank)
    _decode(printer.open(axes), [f"n{axis}" for axis in axes], [f"i{axis}" for axis in axes])
    verbs = ["ld_out" if _operand(kernel, load).shared else "ld" for load in loads]
    _store_element(printer, kernel, [printer.access(v, int(e.arg)) for v, e in zip(verbs, loads)])  # type: ignore[call-overload]
    total = " * ".join(f"n{axis}" for axis in axes)
    printer.close_loop("at", first, total, printer.word("all_threads"))


def _stored(printer: CudaPrinter, store: Store) -> str:
    """The text of a stored value, in the type that memory holds."""
    text = strip(printer.emit(store.value))
    return f"u8({text})" if printer.body.operands[store.operand].dtype == boolean else text


# ------------------------------------------------------------------------------------------------- tiles


def transposed_loads(kernel: LoopKernel) -> list[Expr]:
    """The loads whose stride along the last axis is not known, of a kernel that stores contiguously; none of another."""
    last, body = kernel.rank - 1, kernel.body
    exprs = dict.fromkeys(e for s in body.stores for e in walk(s.value))
    if last < 1 or any(e.op == "reduce" for e in exprs) or any(body.operands[s.operand].strides[last] != 1 for s in body.stores):
        return []
    found = [e for e in exprs if e.op == "load" and not e.args and _operand(kernel, e).strides[last] is None]
    return found if len(found) <= MOST_TILES else []


def _inner_stride(printer: BodyPrinter, kernel: LoopKernel) -> int:
    """The word of the first transposed load's stride along the last axis but one: tiles are for 1."""
    return printer.stride_words[int(transposed_loads(kernel)[0].arg), kernel.rank - 2]  # type: ignore[call-overload]


def _print_tiles(kernel: LoopKernel) -> tuple[BodyPrinter, list[str]]:
    """A block per tile of 32 x 32: read along the last axis but one into shared memory, computed along the last one."""
    loads, axes = transposed_loads(kernel), range(kernel.rank)
    last, line = kernel.rank - 1, kernel.rank - 2
    printer = _printer(kernel)
    inputs, function = _element(printer, kernel, loads)
    top = printer.open([])
    for axis in axes:
        top.line(f"n{axis} = arg(args, {axis})")
    printer.imports |= {"divide", "barrier", "thread", "block", "blocks"}
    printer.scalar |= {"ld_tile", "st_tile"} | {f"tile_{compute_dtype_name(e.dtype)}" for e in loads}
    for load, name in inputs.items():
        top.line(f"tile_{name} = tile_{compute_dtype_name(load.dtype)}()")
    top.line("row = thread() >> 5")
    top.line("lane = thread() & 31")
    top.line(f"lines = divide(n{line} + 31, 32)")
    top.line(f"columns = divide(n{last} + 31, 32)")
    printer.open([])
    outer = printer.open(axes[:line])
    _decode(outer, [*(f"n{axis}" for axis in axes[:line]), "lines", "columns"], [*(f"i{axis}" for axis in axes[:line]), "i", "j"])
    for reading in (True, False):
        inner = printer.open([line, last])
        along, across = (line, last) if reading else (last, line)
        starts = {line: "i * 32", last: "j * 32"}
        inner.line(f"i{along} = {starts[along]} + lane")
        inner.line(f"i{across} = {starts[across]} + k")
        printer.open([]).depth = inner.depth + 1
        if reading:
            for load, name in inputs.items():
                value = printer.access("ld", int(load.arg))  # type: ignore[call-overload]
                printer.scopes[-1].line(f"st_tile(tile_{name}, k * 33 + lane, {value})")
        else:
            _store_element(printer, kernel, [f"ld_tile(tile_{name}, lane * 33 + k)" for name in inputs.values()])
        printer.close(f"if (i{line} < n{line}) & (i{last} < n{last}):")
        printer.close_loop("k", "row", "32", "8")
        outer.line("barrier()")
    total = " * ".join([*(f"n{axis}" for axis in axes[:line]), "lines", "columns"])
    printer.close_loop("at", "block()", total, "blocks()")
    printer.close(f"if (arg(args, {_inner_stride(printer, kernel)}) == 1) & (min(n{line}, n{last}) >= {LEAST_TILE}):")
    printer.open([])
    _print_singles(printer, kernel, loads, printer.word("first_element"))
    printer.close("else:")
    return printer, [*_head(kernel, ELEMENT_THREADS), *function, "def kernel(args):", *top.lines]


# ------------------------------------------------------------------------------------------------ frames


def print_cuda_loops(kernel: LoopKernel) -> tuple[BodyPrinter, list[str]]:
    """The lines of `def kernel(args)` for generated loops, with what the compiler must know of it."""
    chosen, lanes = frame(kernel), vector_lanes(kernel)
    if chosen == "elements":
        if transposed_loads(kernel):
            return _print_tiles(kernel)
        return _print_vectors(kernel, lanes) if lanes > 1 else _print_elements(kernel)
    return _print_teams(kernel, rows=chosen == "rows")


def _head(kernel: LoopKernel, threads: int, blocks: int = 1) -> list[str]:
    return [f"WORDS = {kernel.rank + kernel.body.n_words}", f"THREADS = {threads}", f"BLOCKS = {blocks}", "", ""]


def _decode(scope: Scope, extents: Sequence[str], names: Sequence[str]) -> None:
    """The positions on the axes of element `at`."""
    rest = "at"
    for axis in range(len(names) - 1, 0, -1):
        scope.line(f"t{axis} = divide({rest}, {extents[axis]})")
        scope.line(f"{names[axis]} = {rest} - t{axis} * {extents[axis]}")
        rest = f"t{axis}"
    if names:
        scope.line(f"{names[0]} = {rest}")


def _print_elements(kernel: LoopKernel) -> tuple[BodyPrinter, list[str]]:
    printer, axes = _printer(kernel), range(kernel.rank)
    top = printer.open([])
    for axis in axes:
        top.line(f"n{axis} = arg(args, {axis})")
    _decode(printer.open(axes), [f"n{axis}" for axis in axes], [f"i{axis}" for axis in axes])
    for store in kernel.body.stores:
        printer.store(store.operand, store.value)
    total = " * ".join(f"n{axis}" for axis in axes) or "1"
    printer.close_loop("at", printer.word("first_element"), total, printer.word("all_threads"))
    printer.imports |= {"divide"} if kernel.rank > 1 else set()
    return printer, [*_head(kernel, ELEMENT_THREADS), "def kernel(args):", *top.lines]


def _print_teams(kernel: LoopKernel, rows: bool) -> tuple[BodyPrinter, list[str]]:
    printer, rank = _printer(kernel), kernel.rank
    outer = range(rank - 1 if rows else rank)
    top = printer.open([])
    printer.together = 1
    for axis in range(rank):
        top.line(f"n{axis} = arg(args, {axis})")
    printer.scalar |= {"team_size", "team_lane", "first_team", "all_teams"}
    top.line("team = team_size()")
    top.line("lane = team_lane(team)")
    _decode(printer.open(outer), [f"n{axis}" for axis in outer], [f"i{axis}" for axis in outer])
    printer.together = 2
    if rows:
        _print_row(printer, kernel)
    else:
        printer.open([])
        for store in kernel.body.stores:
            printer.store(store.operand, store.value)
        printer.close("if lane == 0:")
    total = " * ".join(f"n{axis}" for axis in outer) or "1"
    printer.close_loop("at", "first_team(team)", total, "all_teams(team)")
    printer.imports |= {"divide"} if len(outer) > 1 else set()
    few = rows and kernel.rank + kernel.body.n_words <= FEW_WORDS
    return printer, [*_head(kernel, REDUCTION_THREADS, 3 if few else 1), "def kernel(args):", *top.lines]


def _print_row(printer: CudaPrinter, kernel: LoopKernel) -> None:
    """The row itself, after its reductions."""
    stores, last = kernel.body.stores, kernel.rank - 1
    for expr in dict.fromkeys(e for s in stores for e in walk(s.value)):
        if expr.op == "reduce" and printer.free_axes(expr) <= printer.bound():
            printer.emit(expr)

    def step() -> list[str]:
        names = []
        for store in stores:
            text = _stored(printer, store)
            names.append(printer.fresh("y"))
            printer.scopes[-1].line(f"{names[-1]} = {text}")
        return names

    def finish(values: list[list[str]]) -> None:
        verb = "st_vector" if len(values) > 1 else "st"
        for number, store in enumerate(stores):
            text = ", ".join(lane[number] for lane in values)
            printer.scopes[-1].line(printer.access(verb, store.operand, f"({text})" if len(values) > 1 else text))

    loads = [e for s in stores for e in _outside_reductions(s.value) if e.op == "load"]
    printer.team_loop(last, f"n{last}", loads, step, [s.operand for s in stores], finish)


def _outside_reductions(root: Expr) -> list[Expr]:
    """The expressions in a tree that are evaluated for every element of a row."""
    out, stack = [], [root]
    while stack:
        expr = stack.pop()
        out.append(expr)
        stack += () if expr.op == "reduce" else expr.args
    return out
