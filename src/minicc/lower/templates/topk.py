"""TopK onto the template of the same name; K may be a size known only when shapes are bound."""

from __future__ import annotations

from minicc.ir.dims import product
from minicc.ir.graph import Node
from minicc.ir.types import boolean, i64
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common, elements


def lower_topk(low: Lowering, node: Node, lead: Node | None) -> str:  # noqa: ARG001
    """Results are always sorted: ONNX leaves the order open when `sorted` is 0."""
    refusal = elements.refusal(node)
    if refusal:
        return refusal
    x = node.inputs[0]
    assert x is not None
    if not x.shape or x.tensor.dtype == boolean:
        return f"no order for {x.type}"
    axis = int(node.attrs["axis"]) % len(x.shape)
    constants = {**elements.access(x.tensor.dtype), "LARGEST": bool(node.attrs["largest"])}
    source = low.buffer(x)
    values = low.allocate(node.output)
    shape = node.output.shape
    if len(node.outputs) > 1:
        positions = low.allocate(node.outputs[1])
    else:
        positions = low.temporary(f"{node.output.name}_positions", i64, shape)
    common.emit(
        low, node, "topk", constants,
        {"X": Word(0, source), "VALUES": Word(0, values), "POSITIONS": Word(0, positions), "N": x.shape[axis],
         "K": shape[axis], "OUTER": product(shape[:axis]), "INNER": product(shape[axis + 1 :])},
        None, (source,), 0, writes=(values, positions), cost=product(x.shape) * 2, name="topk",
    )  # fmt: skip
    return ""
