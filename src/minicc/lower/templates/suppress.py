"""SelectBoxes, the choosing half of NonMaxSuppression, onto the template "suppress"."""

from __future__ import annotations

from minicc.ir.dims import product
from minicc.ir.graph import Node
from minicc.ir.types import f32, i64
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common


def lower_select_boxes(low: Lowering, node: Node, lead: Node | None) -> str:  # noqa: ARG001
    """Scalars are read from memory when the kernel runs; one that is left out is address 0."""
    boxes, scores, *scalars = node.inputs
    assert boxes is not None and scores is not None
    batches, classes, count = scores.shape
    sources = [low.buffer(v) for v in (boxes, scores)]
    given = {
        name: low.buffer(v) for name, v in zip(("LIMIT", "OVERLAP", "LEAST"), scalars) if v is not None
    }
    chosen, counts = (low.allocate(v) for v in node.outputs)
    keys = low.temporary(f"{node.output.name}_keys", i64, scores.shape)
    kept = low.temporary(f"{node.output.name}_kept", f32, (batches, classes, 4, node.output.shape[2]))
    words = {name: Word(0, number) for name, number in given.items()}
    words |= {"BOXES": Word(0, sources[0]), "SCORES": Word(0, sources[1]), "CHOSEN": Word(0, chosen),
              "COUNTS": Word(0, counts), "KEYS": Word(0, keys), "KEPT": Word(0, kept)}  # fmt: skip
    common.emit(
        low, node, "suppress", {"CENTER": bool(node.attrs["center_point_box"])},
        {**words, "BATCHES": batches, "CLASSES": classes, "N": count, "MOST": node.output.shape[2]},
        None, (*sources, *given.values()), 0, writes=(chosen, counts, keys, kept), cost=product(scores.shape) * 2,
        name="suppress",
    )  # fmt: skip
    return ""
