"""MatMul onto the `gemm` template: the left operand in place, the right one packed, everything after it fused."""

from __future__ import annotations

from itertools import pairwise

from minicc.ir.dims import Dim, ceil_divide, product
from minicc.ir.graph import Node, Value
from minicc.ir.types import f32
from minicc.kernels import packing
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common

# Rows up to which a right operand that is computed at run time is read as it lies, by generated loops.
FEW_ROWS = 4


def lower_matmul(low: Lowering, node: Node, lead: Node | None) -> str:
    """MatMul of numpy semantics; vectors and element types without a float kernel are refused."""
    anchor, (a, b) = common.anchor_of(node, lead)
    assert a is not None and b is not None
    if not common.float_dtypes(a.tensor.dtype, b.tensor.dtype):
        return f"no product kernel for {a.tensor.dtype}"
    if len(a.shape) < 2 or len(b.shape) < 2:
        return "an operand is a vector"
    shape = anchor.output.shape
    batch, m, n, k = shape[:-2], shape[-2], shape[-1], a.shape[-1]
    if b.data is None and isinstance(m, int) and m <= FEW_ROWS:
        return "packing a matrix that so few rows read takes longer than reading it for each"
    b_buffer, b_strides, nr = _right_operand(low, node, b, (*batch, k, n))
    b_walk: dict[int, Dim] = {axis: s for axis, s in enumerate(b_strides) if s != 0}
    a_buffer, a_offset, a_strides = common.float_view(low, a, (*batch, m, k), len(batch) + 1)
    space = common.epilogue(low, node, lead, [common.rows_walk(a_strides), b_walk])
    if isinstance(space, str) and low.is_inline(a):  # rows that lie too far apart, as those of windows of an image: copied
        a_buffer, a_offset, a_strides = common.contiguous_view(low, a, (*batch, m, k))
        space = common.epilogue(low, node, lead, [common.rows_walk(a_strides), b_walk])
    if isinstance(space, str):
        return space
    (a0, a1, a_row), (b0, b1, _) = space.strides
    e0, e1, em, en = space.extents
    common.emit(
        low, node, "gemm", {"NR": nr},
        {"A": Word(a_offset, a_buffer), "B": Word(0, b_buffer), "M": em, "N": en, "K": k, "A_ROW": a_row,
         "A_B0": a0, "A_B1": a1, "B_B0": b0, "B_B1": b1, "B0": e0, "B1": e1},
        space, (a_buffer, b_buffer), product(shape) * k * 2, results=(node.outputs if lead is not None else (anchor.output,)),
    )  # fmt: skip
    return ""


def _right_operand(low: Lowering, node: Node, b: Value, shape: tuple[Dim, ...]) -> tuple[int, tuple[Dim, ...], int]:
    """(buffer of panels, strides of its batches by output axis, NR) of the right operand, packed now or at run time."""
    nr = low.choose(node, common.columns(low, shape[-1]))
    *batch, k, n = shape
    own = b.shape[:-2]
    panels = ceil_divide(n, nr)
    whole = panels * k * nr
    lead = len(batch) - len(own)
    # Batch axes along which the operand really changes; the others share one packed copy.
    varying = [axis for axis in range(len(batch)) if axis >= lead and own[axis - lead] != 1]
    strides: list[Dim] = [0] * len(batch)
    step = whole
    for axis in reversed(varying):
        strides[axis] = step
        step = step * batch[axis]
    if b.data is not None:
        key = ("pack_b", id(b.data), nr)
        if key not in low.constants:
            low.constant(packing.pack_b(b.data.astype("float32", copy=False), nr), f"{b.name}_packed", key)
        return low.constants[key], tuple(strides), nr
    source, offset, view = common.float_view(low, b, shape, None)
    merged = [axis for axis in varying if batch[axis] != 1]
    while len(merged) > 2:  # merge neighbours that the source walks contiguously
        for x, y in pairwise(merged):
            if view[x] == view[y] * batch[y] and strides[x] == strides[y] * batch[y]:
                batch[y] = batch[x] * batch[y]
                merged.remove(x)
                break
        else:
            source, offset = low.buffer(b), 0
            total = product([batch[axis] for axis in merged])
            view = (*view[:-2], n, 1)
            batch[merged[-1]], view = total, (*view[: merged[-1]], k * n, *view[merged[-1] + 1 :])
            merged = merged[-1:]
    target = low.temporary(f"{b.name}_packed", f32, (product([batch[axis] for axis in merged]), panels, k, nr))
    first, second = ([None, None] + merged)[-2:]  # type: ignore[operator]
    common.emit(
        low, node, "pack", {"NR": nr},
        {"SOURCE": Word(offset, source), "TARGET": Word(0, target), "N": n, "C": k, "TAPS": 1,
         "S_N": view[-1], "S_C": view[-2], "S_TAP": 0,
         "S_B0": 0 if first is None else view[first], "S_B1": 0 if second is None else view[second],
         "T_B0": 0 if first is None else strides[first], "T_B1": 0 if second is None else strides[second],
         "B0": 1 if first is None else batch[first], "B1": 1 if second is None else batch[second]},
        None, (source,), 0, writes=(target,), cost=whole * product([batch[axis] for axis in merged]) // 4,
    )  # fmt: skip
    return target, tuple(strides), nr
