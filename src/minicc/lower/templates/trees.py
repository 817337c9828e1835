"""TreeLeaves onto the template "trees"."""

from __future__ import annotations

import numpy as np

from minicc.ir.dims import product
from minicc.ir.graph import Node
from minicc.lower.context import Lowering
from minicc.lower.program import Word
from minicc.lower.templates import common, elements
from minicc.ops.trees import FEATURE, IS_EQUAL, NAN_BELOW

# What a step in a tree takes in ns, for estimates.
STEP_NS = 2


def lower_tree_leaves(low: Lowering, node: Node, lead: Node | None) -> str:  # noqa: ARG001
    """The table of nodes is a constant: whether one has marks decides which kernel reads it."""
    refusal = elements.refusal(node)
    if refusal:
        return refusal
    x, nodes, roots, numbers = node.inputs
    assert x is not None and nodes is not None and roots is not None and numbers is not None
    access = elements.access(x.tensor.dtype)
    marks = {
        name: nodes.data is None or bool(np.any(nodes.data[:, FEATURE] & mark))
        for name, mark in (("NANS", NAN_BELOW), ("EQUALS", IS_EQUAL))
    }
    constants = {"POINTER": access["POINTER"], "LOAD": access["LOAD"], **marks}
    sources = [low.buffer(v) for v in (x, nodes, roots, numbers)]
    found = low.allocate(node.output)
    words = dict(zip(("X", "NODES", "ROOTS", "NUMBERS", "Y"), (Word(0, b) for b in (*sources, found))))
    common.emit(
        low, node, "trees", constants,
        {**words, "ROWS": x.shape[0], "TREES": roots.shape[0], "WIDTH": x.shape[1], "NEEDED": node.attrs["features"],
         "DEPTH": node.attrs["depth"]},
        None, tuple(sources), 0, writes=(found,), cost=product(node.output.shape) * min(node.attrs["depth"], 12) * STEP_NS,
        name="trees", aside=(sources[1],),
    )  # fmt: skip
    return ""
