"""minicc's Attention onto the template of the same name: operands in place, the result as its reader wants it.

A CPU takes float32 and any axis of queries; CUDA 16-bit floats too, but rows of queries that are contiguous.
"""

from __future__ import annotations

import numpy as np

from minicc.ir.dims import Dim, exact_quotient, product
from minicc.ir.graph import Node, Value
from minicc.ir.types import TensorType, f32
from minicc.kernels.cuda_attention import (
    MOST,
    QUERIES,
    WARPS,
    choose_warps,
    join_constants,
    most_blocks,
    partial_size,
    shared_bytes,
)
from minicc.kernels.domain import attention_size, panel_columns
from minicc.lower.affine import row_major
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.lower.templates.cuda import ELEMENTS, piece
from minicc.targets.cuda import CudaTarget
from minicc.targets.parse import Target

View = tuple[int, Dim, tuple[Dim, ...]]


def takes_attention(node: Node, target: Target) -> bool:
    """Whether a target's template computes a node: of its element types, with heads that fit."""
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    if not all(isinstance(v.type, TensorType) and v.type.shape is not None for v in values):
        return False
    q, k, v = values[:3]
    cuda = isinstance(target, CudaTarget)
    floats = common.FLOATS if cuda else (f32,)
    if any(x is not None and x.tensor.dtype not in floats for x in (q, *node.inputs[3:])):
        return False
    if any(x.tensor.dtype != q.tensor.dtype for x in (k, v, node.output)):
        return False
    heads, groups, sizes = q.shape[1], k.shape[1], (q.shape[3], v.shape[3])
    if not isinstance(heads, int) or not isinstance(groups, int) or groups == 0:
        return False
    if k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return False  # broadcast, or compared at run time
    most = MOST if isinstance(target, CudaTarget) else attention_size(target)
    return all(isinstance(size, int) and (size > 0 or not cuda) and size <= most for size in sizes)


def lower_attention(low: Lowering, node: Node, lead: Node | None) -> str:
    """Heads may lie in any order, such as [B, S, H, D]: only the last axes of k and v, on CUDA of q too, must be contiguous."""
    assert lead is None
    if not takes_attention(node, low.target):
        return "heads that are too large, known only at run time, or of another element type"
    q, k, v, mask = (*node.inputs, None)[:4]
    assert q is not None and k is not None and v is not None
    batch, heads, length, size = q.shape
    groups, keys, width = k.shape[1], k.shape[2], v.shape[3]
    assert isinstance(heads, int) and isinstance(groups, int)
    cuda = isinstance(low.target, CudaTarget)
    sources = [common.operand_view(low, x, x.shape, axis) for x, axis in ((q, 3 if cuda else None), (k, 3), (v, 3))]
    words: dict[str, Word | Dim] = {}
    for name, (buffer, offset, strides), axes in zip("QKV", sources, ("B H ROW D", "B H ROW", "B H ROW")):
        words |= {name: Word(offset, buffer)} | {f"{name}_{a}": s for a, s in zip(axes.split(), strides)}
    reads = [buffer for buffer, _, _ in sources]
    if mask is not None:
        buffer, offset, strides = common.operand_view(low, mask, (batch, heads, length, keys), None)
        words |= {"MASK": Word(offset, buffer)} | {f"M_{a}": s for a, s in zip(["B", "H", "ROW", "KEY"], strides)}
        reads.append(buffer)
    result, (y_batch, y_head, y_row) = _result(low, node)
    target = low.allocate(result)
    shared: dict[str, Word | Dim] = {
        "Y": Word(0, target), "B": batch, "GROUPS": groups, "GROUP": heads // groups, "S": length, "T": keys, "D": size,
        "DV": width, "SCALE": int(np.float32(node.attrs["scale"]).view(np.int32)), "CAUSAL": int(node.attrs["causal"]),
        "Y_B": y_batch, "Y_H": y_head, "Y_ROW": y_row,
    }  # fmt: skip
    flops = product((batch, heads, length, keys)) * (size + width) * 2
    if not cuda:
        common.emit(low, node, "attention", {"NR": panel_columns(low.cpu, None)}, {**words, **shared}, None, tuple(reads), flops,
                    writes=(target,), name="attention")  # fmt: skip
        return ""
    constants = _cuda_constants(low, node, sources, (y_batch, y_head, y_row))
    partials: tuple[int, ...] = ()
    if constants["CUT"]:
        partials = (low.temporary("attention_parts", f32, (partial_size(int(constants["CUT"]), constants),)),)
        shared["PARTIALS"] = Word(0, partials[0])
    for form in (constants, {**constants, "SHARERS": constants["WARPS"], "FEW": 0}):
        if form is constants or constants["FEW"]:
            common.emit(low, node, "attention", form, {**words, **shared}, None, tuple(reads), flops,
                        writes=(target, *partials), name="attention", aside=partials)  # fmt: skip
    if partials:
        common.emit(low, node, "attention", join_constants(constants), shared, None, partials, 0,
                    writes=(target,), name="attention_join", aside=partials)  # fmt: skip
    return ""


def _cuda_constants(low: Lowering, node: Node, sources: list[View], result: tuple[Dim, ...]) -> common.Constants:
    """Constants of the CUDA form. result: strides of the result's rows."""
    assert isinstance(low.target, CudaTarget)
    q, k, v, mask = (*node.inputs, None)[:4]
    assert q is not None and k is not None and v is not None
    groups, width, size = k.shape[1], v.shape[3], q.shape[3]
    assert isinstance(size, int) and isinstance(width, int)
    sizes = product(k.shape[:2]), exact_quotient(product(q.shape[1:3]), groups), k.shape[2]
    heads, rows, keys = (n if isinstance(n, int) else None for n in sizes)
    warps, sharers = choose_warps(heads or 1, rows or QUERIES + 1, low.target)
    bytes_ = q.tensor.dtype.bytes
    pieces = {f"{name}_PIECE": piece(bytes_, offset, *strides[:3]) for name, (_, offset, strides) in zip("QKV", sources)}
    element = ELEMENTS[q.tensor.dtype]
    element = "tf32" if element == "f32" and low.precision == "tf32" else element
    constants: dict[str, int | float | str] = {
        "ELEMENT": element, "WARPS": warps, "SHARERS": sharers, "DEPTH": size, "WIDTH": width, **pieces,
        "MASK_TYPE": "none" if mask is None else ELEMENTS[mask.tensor.dtype],
        "PAIRS": int(piece(bytes_, width, *result) >= 2 * bytes_), "JOIN": 0,
    }  # fmt: skip
    shares = shared_bytes({**constants, "WARPS": WARPS[0], "SHARERS": WARPS[0]}) <= low.target.shared_bytes
    if not shares or shared_bytes(constants) > low.target.shared_bytes:
        constants |= {"WARPS": WARPS[0], "SHARERS": 1}
    # As many queries as keys are no decoder's.
    few = shares and rows is None and q.shape[2] != k.shape[2]
    return {**constants, "FEW": int(few), "CUT": most_blocks(heads, rows, keys, constants, low.target)}


def _result(low: Lowering, node: Node) -> tuple[Value, tuple[Dim, Dim, Dim]]:
    """The value to write, and its strides by batch, head and row: the [B, S, H, D] that alone is read, if so."""
    y = node.output
    readers = y.consumers()
    if len(readers) == 1 and y not in low.outputs:
        reader = readers[0]
        moved = not reader.op.domain and reader.op.name == "Transpose" and reader.attrs["perm"]
        if moved and tuple(moved) == (0, 2, 1, 3):
            batch, row, head, _ = row_major(reader.output.shape)
            return reader.output, (batch, head, row)
    return y, row_major(y.shape)[:3]  # type: ignore[return-value]
