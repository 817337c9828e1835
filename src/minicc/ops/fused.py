"""`Fused`: several ops that become one kernel; the result of the fusion pass.

Its body is a graph whose inputs are the node's inputs in order. After fusion the graph still verifies, prints,
evaluates and saves by the same code as before.
"""

from __future__ import annotations

from collections.abc import Sequence

from minicc.ir.opdef import REQUIRED, Content, Inference, Kind, OpDef, register
from minicc.ir.types import Type


def _infer(n: Inference) -> Sequence[Type]:
    return [value.type for value in n.attr("body").outputs]


def _propagate(n: Inference) -> Sequence[Content | None]:
    return [value.content for value in n.attr("body").outputs]


FUSED = register(OpDef(
    "Fused", Kind.CONTROL, infer=_infer, propagate=_propagate, attrs={"body": REQUIRED, "anchor": "", "lead": 0},
    domain="minicc",
))  # fmt: skip
