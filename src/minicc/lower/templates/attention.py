"""minicc's Attention onto the template of the same name: operands in place, the result as its reader wants it."""

from __future__ import annotations

import numpy as np

from minicc.ir.dims import Dim, product
from minicc.ir.graph import Node, Value
from minicc.ir.types import TensorType, f32
from minicc.kernels.domain import attention_size, panel_columns
from minicc.lower.affine import row_major
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common
from minicc.targets.cpu import CpuTarget


def takes_attention(node: Node, target: CpuTarget) -> bool:
    """Whether the template computes a node: float32, with heads that fit."""
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    if not all(isinstance(v.type, TensorType) and v.type.shape is not None and v.type.dtype == f32 for v in values):
        return False
    q, k, v = values[:3]
    heads, groups, sizes = q.shape[1], k.shape[1], (q.shape[3], v.shape[3])
    if not isinstance(heads, int) or not isinstance(groups, int) or groups == 0:
        return False
    if k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        return False  # broadcast, or compared at run time
    return all(isinstance(size, int) and size <= attention_size(target) for size in sizes)


def lower_attention(low: Lowering, node: Node, lead: Node | None) -> str:
    """Heads may lie in any order, such as [B, S, H, D]: only the last axes of k and v must be contiguous."""
    assert lead is None
    if not takes_attention(node, low.cpu):
        return "heads that are too large, known only at run time, or not float32"
    q, k, v, mask = (*node.inputs, None)[:4]
    assert q is not None and k is not None and v is not None
    batch, heads, length, size = q.shape
    groups, keys, width = k.shape[1], k.shape[2], v.shape[3]
    assert isinstance(heads, int) and isinstance(groups, int)
    sources = [common.operand_view(low, x, x.shape, axis) for x, axis in ((q, None), (k, 3), (v, 3))]
    words: dict[str, Word | Dim] = {}
    for name, (buffer, offset, strides), axes in zip("QKV", sources, ("B H ROW D", "B H ROW", "B H ROW")):
        words |= {name: Word(offset, buffer)} | {f"{name}_{a}": s for a, s in zip(axes.split(), strides)}
    reads = [buffer for buffer, _, _ in sources]
    if mask is not None:
        if low.view(mask, (batch, heads, length, keys)) is None:
            low.buffer(mask)
        found = low.view(mask, (batch, heads, length, keys))
        assert found is not None
        buffer, offset, strides = found
        words |= {"MASK": Word(offset, buffer)} | {f"M_{a}": s for a, s in zip(["B", "H", "ROW", "KEY"], strides)}
        reads.append(buffer)
    result, (y_batch, y_head, y_row) = _result(low, node)
    target = low.allocate(result)
    elements = product((batch, heads, length, keys))
    common.emit(
        low, node, "attention", {"NR": panel_columns(low.cpu, None)},
        {**words, "Y": Word(0, target), "B": batch, "GROUPS": groups, "GROUP": heads // groups, "S": length, "T": keys,
         "D": size, "DV": width, "SCALE": int(np.float32(node.attrs["scale"]).view(np.int32)),
         "CAUSAL": int(node.attrs["causal"]), "Y_B": y_batch, "Y_H": y_head, "Y_ROW": y_row},
        None, tuple(reads), elements * (size + width) * 2, writes=(target,), name="attention",
    )  # fmt: skip
    return ""


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
