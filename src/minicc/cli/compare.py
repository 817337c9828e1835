"""`minicc diff`: outputs against another runtime, and the first layer where they part.

A difference is followed to its layer by compiling ever shorter prefixes of the model, with all their
fusions, and comparing with numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minicc.errors import InputError, MiniccError
from minicc.frontend.model import Argument, load_model
from minicc.ir.evaluate import evaluate
from minicc.module import Module, Stages
from minicc.options import Options
from minicc.peers import peer
from minicc.targets.cpu import host_target
from minicc.walk import build


def diff(
    module: Module, path: Path, items: Sequence[Any], against: str, tolerance: float, level: int
) -> dict[str, Any]:
    """Differences per output relative to its largest element; where they begin when one is too large."""
    found = module.run_items(items)
    if against == "eval":
        expected: Sequence[Any] = _evaluated(path, items)
    else:
        names = [p.name for p in module.inputs]
        expected = peer(against, path, dict(zip(names, items)), module.stats()["threads"])()
    rows = []
    for port, ours, theirs in zip(module.outputs, found, expected):
        error, problem = relative_error(ours, theirs)
        agree = not problem and error <= tolerance
        rows.append({"output": port.name, "difference": error, "problem": problem, "agree": agree})
    result: dict[str, Any] = {"against": against, "agree": all(r["agree"] for r in rows), "outputs": rows}
    if not result["agree"]:
        result["first_diverging_layer"] = first_divergence(path, items, tolerance, level)
    return result


def diff_text(found: dict[str, Any]) -> str:
    """The result of `diff` as lines."""
    lines = [
        f"{'same' if r['agree'] else 'OTHER'} {r['output']}: {r['problem'] or format(r['difference'], '.2e')}"
        for r in found["outputs"]
    ]
    if "first_diverging_layer" in found:
        lines.append(f"first diverging layer: {found['first_diverging_layer']}")
    return "\n".join(lines)


def relative_error(ours: Any, theirs: Any) -> tuple[float, str]:
    """(largest difference relative to the largest finite element, what makes them incomparable)."""
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape or a.dtype.kind != b.dtype.kind:
        return float("inf"), f"{a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}"
    if a.dtype.kind not in "fciub" or not a.size:
        same = np.array_equal(a, b)
        return 0.0 if same else float("inf"), "" if same else "values differ"
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return float("inf"), "NaN or infinity on one side only"
    if not finite.any():
        return 0.0, ""
    scale = max(float(np.abs(y[finite]).max()), 1e-6)
    return float(np.abs(x - y)[finite].max()) / scale, ""


def _evaluated(path: Path, items: Sequence[Any]) -> list[Any]:
    return evaluate(load_model(path).graph, list(items))


def first_divergence(path: Path, items: Sequence[Any], tolerance: float, level: int) -> str:
    """The first layer, in the model's order, whose compiled result differs from numpy's.

    Binary search over prefixes of the model, each compiled with all its fusions; "" when no prefix differs.
    """
    options = Options.from_env().override(opt_level=level)
    imported = load_model(path, options)
    reference: list[Any] = []
    evaluate(
        imported.graph, list(items), observe=lambda node, outputs: reference.append((node, list(outputs)))
    )
    inside = set(imported.graph.nodes)  # the observer also sees the nodes of bodies
    seen = [
        (node, outputs)
        for node, outputs in reference
        if node in inside and isinstance(outputs[0], np.ndarray)
    ]

    def differs(index: int) -> bool:
        node, outputs = seen[index]
        graph = imported.graph.copy()
        where = imported.graph.nodes.index(node)
        graph.outputs = [graph.nodes[where].output]
        graph.tidy()
        cut = replace(imported, graph=graph, outputs=(Argument(node.output.name, node.output.type),))
        try:
            (ours,) = build(cut, host_target(), options, Stages(None)).run_items(items)
        except MiniccError as cause:
            what = "a part of the model cannot be compiled alone"
            raise InputError(what, where=node.describe(), why=str(cause)) from cause
        error, problem = relative_error(ours, outputs[0])
        return bool(problem) or error > tolerance

    low, high = 0, len(seen) - 1
    if high < 0 or not differs(high):
        return ""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if differs(middle) else (middle + 1, high)
    return str(seen[low][0].describe())
