"""`Raise`: what stands in a branch that cannot be valid, so that the error comes only if the branch is taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minicc.errors import ShapeError
from minicc.ir.graph import Graph, Value
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import BY_NAME, TensorType, Type


def _infer(n: Inference) -> Sequence[Type]:
    """Outputs as declared: element type names, and shapes (None for an unknown rank)."""
    return [TensorType(BY_NAME[name], shape) for name, shape in zip(n.attr("dtypes"), n.attr("shapes"))]


def _eval(*, message: str, dtypes: Any, shapes: Any) -> None:
    raise ShapeError(message, why="the model took a branch whose shapes do not fit together")


RAISE = register(OpDef(
    "Raise", Kind.HOST, infer=_infer, eval=_eval, attrs={"message": REQUIRED, "dtypes": REQUIRED, "shapes": REQUIRED},
    deterministic=False, domain="minicc",
))  # fmt: skip


def failing_branch(body: Graph, like: Sequence[Value], why: str) -> Graph:
    """A branch with the inputs of `body` that raises; its outputs have the types of `like`."""
    new = body.subgraph(body.name)
    for value in body.inputs:
        new.input(value.name, value.type)
    types = [v.tensor for v in like]
    attrs = {"message": why, "dtypes": tuple(t.dtype.name for t in types), "shapes": tuple(t.shape for t in types)}
    new.outputs = list(new.add(RAISE, [], attrs, outputs=len(types)).outputs)
    return new
