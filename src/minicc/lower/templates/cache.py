"""Caches of keys and values: the old contents are copied to the result, whose new rows the `scatter` template writes.

ONNX's TensorScatter and minicc's CacheUpdate. A caller who gives one array for both has only the rows written (lower/updates).
Rows that would lie outside are invalid; they are clamped, as kernels cannot raise.
"""

from __future__ import annotations

from minicc.ir import expr
from minicc.ir.dims import Dim, product
from minicc.ir.expr import Expr, cast, const, iteration, select
from minicc.ir.graph import Node, Value
from minicc.ir.types import i64
from minicc.lower.affine import linearise
from minicc.lower.body import Write
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import elements
from minicc.lower.templates.scatter import write_over


def lower_tensor_scatter(low: Lowering, node: Node, lead: Node | None) -> str:  # noqa: ARG001
    """Rows along any axis but the first, at a start for each entry of the first, or at 0."""
    refusal = elements.refusal(node)
    if refusal:
        return refusal
    past = node.inputs[0]
    assert past is not None
    starts = node.inputs[2] if len(node.inputs) > 2 else None
    old = low.composer().element(past, _positions(past.shape))
    axis = int(node.attrs["axis"]) % len(past.shape)
    _emit(low, node, starts, old, axis, node.attrs["mode"] == "circular")
    return ""


def lower_cache_update(low: Lowering, node: Node, lead: Node | None) -> str:  # noqa: ARG001
    """Rows along axis 2 behind those that are there; what lies behind the new ones is zero."""
    refusal = elements.refusal(node)
    if refusal:
        return refusal
    past, _, before = node.inputs[:3]
    assert past is not None and before is not None
    index = _positions(node.output.shape)
    start = low.composer().element(before, index[:1])
    kept = (index[2] < start) & (index[2] < past.shape[2])
    inside = expr.maximum(expr.minimum(index[2], past.shape[2] - 1), 0)
    old = low.composer().element(past, [*index[:2], inside, *index[3:]])
    _emit(low, node, before, select(kept, old, const(0, past.tensor.dtype)), 2, False)
    return ""


def _positions(shape: tuple[Dim, ...]) -> list[Expr]:
    return [iteration(a) for a in range(len(shape))]


def _emit(low: Lowering, node: Node, starts: Value | None, old: Expr, axis: int, circular: bool) -> None:
    """Steps that write `old` to the result, then the numbers of rows (all axes up to `axis` as one), then the rows."""
    past, update = node.inputs[:2]
    assert past is not None and update is not None
    shape = node.output.shape
    ahead = update.shape[: axis + 1]
    index = _positions(ahead)
    place = index[axis]
    if starts is not None:
        place = place + cast(low.composer().element(starts, index[:1]), i64)
    if circular:
        place = place % shape[axis]
    place = expr.maximum(expr.minimum(place, shape[axis] - 1), 0)
    row = linearise([*index[:axis], place], shape[: axis + 1])
    numbers = low.temporary("rows", i64, ahead)
    low.emit_writes([Write(numbers, i64, linearise(index, ahead), row)], ahead, node.origin, "rows")
    run = product(shape[axis + 1 :])
    values: dict[str, Word | Dim] = {
        "COUNT": product(ahead), "I_STEP": 1, "U_STEP": run, "RUN": run, "F_RUN": run, "DEPTH": 1,
        "N_0": product(shape[: axis + 1]), "M_0": run,
    }  # fmt: skip
    low.updates(past, write_over(low, node, old, numbers, update, values, shared=True))
