"""CumSum and CumProd onto the `scan` template."""

from __future__ import annotations

from minicc.ir.dims import product
from minicc.ir.graph import Node
from minicc.ir.types import f64
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common, elements

BLOCK = 64  # lanes of one unit, whose accumulators are on the stack


def lower_scan(low: Lowering, node: Node, lead: Node | None) -> str:  # noqa: ARG001
    """The axis must be known at compile time."""
    refusal = elements.refusal(node)
    if refusal:
        return refusal
    x, along = node.inputs
    assert x is not None and along is not None
    if along.content is None or not isinstance(along.content.flat[0], int):
        return "data-dependent: the axis is not known at compile time"
    if not x.shape:
        return "a scalar has no axis"
    axis = along.content.flat[0] % len(x.shape)
    outer, count, inner = product(x.shape[:axis]), x.shape[axis], product(x.shape[axis + 1 :])
    reverse = bool(node.attrs["reverse"])
    dtype = x.tensor.dtype
    product_of = node.op.name == "CumProd"
    kind = "f64" if dtype == f64 else "f32" if dtype.is_float else "i64"
    access = elements.access(dtype)
    access.pop("LOAD_OLD")
    constants: elements.Access = {
        **access, "TYPE": f"np.{_TYPES[kind]}", "LANES": f"stack_{kind}", "BLOCK": BLOCK,
        "COMBINE": "multiply" if product_of else "add", "INITIAL": int(product_of),
        "EXCLUSIVE": bool(node.attrs["exclusive"]),
    }  # fmt: skip
    source = low.buffer(x)
    target = low.allocate(node.output)
    common.emit(
        low, node, "scan", constants,
        {"X": Word(0, source), "Y": Word(0, target), "OUTER": outer, "COUNT": count, "INNER": inner,
         "START": (count - 1) * inner if reverse else 0, "STEP": -inner if reverse else inner},
        None, (source,), product(x.shape), writes=(target,), cost=product(x.shape), name=node.op.name,
    )  # fmt: skip
    return ""


_TYPES = {"f32": "float32", "f64": "float64", "i64": "int64"}
