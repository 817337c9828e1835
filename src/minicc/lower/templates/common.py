"""What the template lowerings share: words by name, epilogues, float32 operands, packed constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from minicc.ir.dims import Dim
from minicc.ir.expr import Expr, accumulator, cast, iteration
from minicc.ir.graph import Graph, Node, Value
from minicc.ir.types import DType, bf16, f16, f32
from minicc.kernels.domain import panel_columns
from minicc.kernels.template import TEMPLATES
from minicc.lower.affine import linearise, row_major
from minicc.lower.body import Space, Write, normalise_epilogue
from minicc.lower.context import Lowering
from minicc.lower.kernel import Body, TemplateKernel
from minicc.lower.program import KernelStep, Word
from minicc.ops.spatial import Window

FLOATS = (f32, f16, bf16)  # element types that templates compute in float32
# Taps, stride and dilation along a line up to which kernels are compiled for them: so many weights stay in registers.
MOST_TAPS, MOST_STEP, MOST_APART = 7, 2, 4
OPERATIONS_PER_NS = 40  # of floats on one thread, for estimates of what a call costs
BYTES_PER_NS = 64  # to and from a cache
Constants = Mapping[str, int | float | str]


def anchor_of(node: Node, lead: Node | None) -> tuple[Node, tuple[Value | None, ...]]:
    """The op with the template, and its inputs as values of the outer graph."""
    if lead is None:
        return node, node.inputs
    body: Graph = node.attrs["body"]
    outer = dict(zip(body.inputs, node.inputs))
    return lead, tuple(None if v is None else outer.get(v, v) for v in lead.inputs)


def columns(low: Lowering, n: Dim, prefix: str = "") -> dict[str, int]:
    """Widths of the panels (NR) that a right operand of n columns may be packed in, by name, the usual one first."""
    width = low.cpu.vector_width
    usual = panel_columns(low.cpu, n if isinstance(n, int) else None)
    widths = [usual, *(w for w in (width, 2 * width) if w != usual and (not isinstance(n, int) or n > width))]
    return {f"{prefix}{w} columns": w for w in widths}


def along_lines(geometry: Window, kernel: Sequence[Dim]) -> bool:
    """Whether depthwise kernels along lines (`conv_line`, `conv_expand`) take these windows."""
    taps, step, apart = kernel[-1], geometry.strides[-1], geometry.dilations[-1]
    if geometry.rank > 2 or not isinstance(taps, int):
        return False
    return taps <= MOST_TAPS and step <= MOST_STEP and apart <= MOST_APART


def epilogue(low: Lowering, node: Node, lead: Node | None, operands: Sequence[dict[int, Dim]],
             axes: Sequence[Dim] | None = None, index: Sequence[Expr] | None = None,
             finish: Callable[[Expr, tuple[Expr, ...]], Expr] | None = None, dtype: DType = f32) -> Space | str:  # fmt: skip
    """The epilogue of a template over its output's axes: the fused ops, or just the store.

    operands: strides by logical axis of what the template reads. finish: what the anchor itself still does to the
    accumulator (its bias), given the accumulator and the output index. dtype: of the accumulator.
    axes, index: logical axes (b0, b1, rows..., column) when they are not the output's own, and the output index in them.
    """
    anchor = lead or node
    results = tuple(node.outputs)
    full = anchor.output.shape
    extents = tuple(axes) if axes is not None else full
    position = tuple(index) if index is not None else tuple(iteration(a) for a in range(len(full)))
    anchored = anchor.output

    def given(value: Value, at: tuple[Expr, ...]) -> Expr | None:
        if value is not anchored:
            return None
        total = accumulator(dtype)
        total = finish(total, at) if finish is not None else total
        return cast(total, anchored.tensor.dtype)

    if lead is None:
        composer = low.composer(given=given)
        sources: Sequence[Value] = [anchored]
        results = (anchored,)
    else:
        body: Graph = node.attrs["body"]
        outer = {b: v for b, v in zip(body.inputs, node.inputs) if v is not None}
        inside = {v for n in body.nodes for v in n.outputs}
        composer = low.composer(inside.__contains__, lambda v: outer.get(v, v), given)
        sources = body.outputs
    offset = linearise(position, full)
    writes = [Write(v, v.tensor.dtype, offset, composer.element(s, position)) for v, s in zip(results, sources)]
    return normalise_epilogue(writes, extents, operands, fixed=axes is not None)


def emit(low: Lowering, node: Node, template: str, constants: Constants, values: Mapping[str, Word | Dim],
         space: Space | None, reads: Sequence[int], flops: Dim, *, writes: Sequence[int] = (), cost: Dim = 0,
         results: Sequence[Value] = (), name: str = "", aside: Sequence[int] = ()) -> None:  # fmt: skip
    """One call of a template: its words by name (0 where bind fills them), then the epilogue's.

    aside: buffers that do not count as traffic, because a call uses as much of them as its sizes make it.
    """
    known = TEMPLATES[template]
    unknown = set(values) - set(known.words)
    assert not unknown, f"template {template} has no words {sorted(unknown)}"
    words = [v if isinstance(v, Word) else Word(v) for v in (values.get(word, 0) for word in known.words)]
    body: Body | None = None
    written = list(writes)
    if space is not None:
        written += [low.allocate(value) for value in results]
        words += low.words(space.normal.words)
        body = space.normal.body
    touched = [w.buffer for w in words if w.buffer is not None]
    all_reads = tuple(dict.fromkeys(b for b in (*reads, *touched) if b not in written))
    kernel = TemplateKernel(template, tuple(sorted(constants.items())), body, (name or f"{template}_{node.op.name}")[:60].lower())
    moved = low.traffic([b for b in (*all_reads, *written) if b not in aside])
    low.steps.append(KernelStep(
        low.kernels.number(kernel), tuple(words), 0, all_reads, tuple(dict.fromkeys(written)), node.origin,
        cost or flops // OPERATIONS_PER_NS + moved // BYTES_PER_NS, flops=flops, bytes=moved,
    ))  # fmt: skip


def float_view(low: Lowering, value: Value, shape: Sequence[Dim], contiguous: int | None) -> tuple[int, Dim, tuple[Dim, ...]]:
    """(buffer, offset, strides over `shape`) of a float32 operand broadcast to `shape`.

    contiguous: axis that must have stride 1 (or size 1); the operand is copied when it has not. Half types are
    copied to float32.
    """
    if value.tensor.dtype == f32:
        return operand_view(low, value, shape, contiguous)
    return as_float(low, value), 0, _broadcast_strides(value.shape, shape)


def operand_view(low: Lowering, value: Value, shape: Sequence[Dim], contiguous: int | None) -> tuple[int, Dim, tuple[Dim, ...]]:
    """As `float_view`, for an operand that is read in its own element type."""
    found = low.view(value, shape)
    if found is not None and (contiguous is None or found[2][contiguous] == 1 or shape[contiguous] == 1):
        return found
    return contiguous_view(low, value, shape)


def contiguous_view(low: Lowering, value: Value, shape: Sequence[Dim]) -> tuple[int, Dim, tuple[Dim, ...]]:
    """As `float_view`, of the operand's own contiguous array, which is made where it has none."""
    return low.buffer(value), 0, _broadcast_strides(value.shape, shape)


def rows_walk(strides: Sequence[Dim]) -> dict[int, Dim]:
    """The axes along which rows of a product's left operand move; its last axis, of the sum, is none."""
    return {axis: stride for axis, stride in enumerate(strides[:-1]) if stride != 0}


def _broadcast_strides(own: Sequence[Dim], shape: Sequence[Dim]) -> tuple[Dim, ...]:
    """Strides over `shape` of a contiguous array of shape `own` that is broadcast to it."""
    strides = list(row_major(own))
    full: list[Dim] = [0] * (len(shape) - len(own))
    for size, stride, wanted in zip(own, strides, shape[len(shape) - len(own) :]):
        full.append(0 if size == 1 and wanted != 1 else stride)
    return tuple(full)


def as_float(low: Lowering, value: Value) -> int:
    """A float32 copy of a half-precision value."""
    if value.data is not None:
        return low.constant(value.data.astype(np.float32), value.name, ("f32", id(value.data)))
    number = low.temporary(f"{value.name}_f32", f32, value.shape)
    index = [iteration(a) for a in range(len(value.shape))]
    element = cast(low.composer().element(value, index), f32)
    low.emit_writes([Write(number, f32, linearise(index, value.shape), element)], value.shape, (), "to_float")
    return number


def float_dtypes(*dtypes: DType) -> bool:
    """Whether templates compute all of these in float32."""
    return all(d in FLOATS for d in dtypes)
