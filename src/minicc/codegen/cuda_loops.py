"""The loop frame of generated CUDA kernels around the body that `printer` prints.

Three frames. "elements": a thread per element; whatever is reduced is reduced by that thread. "rows": a block
per row, for kernels that reduce once per row (softmax, normalisation): its threads share the reductions
and then the row. "blocks": a block per element, whose threads share its reductions, where these walk
memory contiguously and neighbouring elements do not.
"""

from __future__ import annotations

from minicc.codegen.literals import identity, strip
from minicc.codegen.printer import NUMPY_CALLS, BodyPrinter, longest
from minicc.ir.expr import Expr, reduction, walk
from minicc.ir.types import compute_dtype_name
from minicc.kernels.cuda_launch import ELEMENT_THREADS, REDUCTION_THREADS
from minicc.lower.kernel import LoopKernel

# Types a block can reduce together (by shuffles), and how.
_SHARED_TYPES = ("f32", "f64", "i32", "i64")
_SHARED_KINDS = ("sum", "prod", "max", "min")


class CudaPrinter(BodyPrinter):
    """Prints a body for CUDA. together: the scopes that all threads of a block run in step."""

    def __init__(self, kernel: LoopKernel) -> None:
        super().__init__(kernel.body, kernel.rank, {axis: f"i{axis}" for axis in range(kernel.rank)})
        self.together = 0  # of the innermost scopes, how many from the outside

    def call_text(self, expr: Expr, args: list[str]) -> str:
        """As for the CPU, but with functions that CUDA has."""
        is_float = expr.args[0].dtype.is_float
        if expr.op in NUMPY_CALLS and is_float:
            return self.scalar_call(NUMPY_CALLS[expr.op].removeprefix("np."), args)
        if expr.op in ("min", "max") and is_float:  # CUDA's own drop a NaN
            return self.scalar_call(f"{expr.op}imum", args)
        return super().call_text(expr, args)

    def emit_reduce(self, expr: Expr) -> str:
        """As for the CPU; shared by the threads of a block where all of them come by."""
        kind, axes, extents = reduction(expr)
        body = expr.args[0]
        if len(self.scopes) > self.together or not shareable(expr):
            return super().emit_reduce(expr)
        acc, scope = self.fresh("r"), self.scopes[-1]
        scope.line(f"{acc} = {identity(kind, body.dtype)}")
        limits = [self.extent_text(e) for e in extents]
        for axis in axes:
            self.variables.setdefault(axis, f"k{axis}")
            self.open([axis])
        update = self.update(kind, acc, self.emit(body), body.dtype)
        self.scopes[-1].line(f"{acc} = {update}")
        shared = longest(extents)
        for place in reversed(range(len(axes))):
            span = f"thread(), {limits[place]}, threads()" if place == shared else limits[place]
            self.close(f"for {self.variables[axes[place]]} in range({span}):")
        self.imports |= {"thread", "threads"}
        scope.line(f"{acc} = {self.scalar_call(f'block_{kind}_{compute_dtype_name(body.dtype)}', [acc])}")
        return acc


def shareable(expr: Expr) -> bool:
    """Whether threads of a block can reduce this together."""
    dtype = expr.args[0].dtype
    return reduction(expr)[0] in _SHARED_KINDS and dtype.name in (*_SHARED_TYPES, "f16", "bf16")


def frame(kernel: LoopKernel) -> str:
    """The frame of a kernel: "elements", "rows" or "blocks"."""
    printer = CudaPrinter(kernel)
    reductions = [e for s in kernel.body.stores for e in walk(s.value) if e.op == "reduce" and shareable(e)]
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


def print_cuda_loops(kernel: LoopKernel) -> tuple[BodyPrinter, list[str]]:
    """The lines of `def kernel(args)` for generated loops, with what the compiler must know of it."""
    chosen, rank = frame(kernel), kernel.rank
    printer = CudaPrinter(kernel)
    top = printer.open([])
    printer.together = 1
    outer = rank - 1 if chosen == "rows" else rank
    for axis in range(rank):
        top.line(f"n{axis} = arg(args, {axis})")
    count = " * ".join(f"n{axis}" for axis in range(outer)) or "1"
    inner = printer.open(range(outer))
    rest = "at"
    for axis in range(outer - 1, 0, -1):
        inner.line(f"i{axis} = {rest} % n{axis}")
        inner.line(f"t{axis} = {rest} // n{axis}")
        rest = f"t{axis}"
    if outer:
        inner.line(f"i0 = {rest}")
    if chosen != "elements":
        printer.together = 2
        printer.open([rank - 1] if chosen == "rows" else [])
    for store in kernel.body.stores:
        printer.store(store.operand, store.value)
    if chosen == "rows":
        printer.close(f"for i{rank - 1} in range(thread(), n{rank - 1}, threads()):")
    elif chosen == "blocks":
        printer.close("if thread() == 0:")
    start, step = ("first_element()", "all_threads()") if chosen == "elements" else ("block()", "blocks()")
    printer.close(f"for at in range({start}, {strip(count)}, {step}):")
    text = "\n".join(top.lines)
    printer.imports |= {word for word in ("thread", "threads", "block", "blocks", "first_element", "all_threads")
                        if f"{word}()" in text}  # fmt: skip
    threads = ELEMENT_THREADS if chosen == "elements" else REDUCTION_THREADS
    head = [f"WORDS = {rank + kernel.body.n_words}", f"THREADS = {threads}", "", ""]
    return printer, [*head, "def kernel(args):", *top.lines]
