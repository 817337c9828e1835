"""`minicc inspect`: facts about a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minicc.cli import common
from minicc.frontend.model import load_model
from minicc.ir.text import print_graph
from minicc.options import Options
from minicc.walk import optimise


def inspect(path: Path, passes: bool, as_json: bool) -> None:
    """Print a model's signature and operators, or what the passes make of it."""
    if common.is_saved(path):
        _inspect_saved(path, as_json)
        return
    options = Options.from_env()
    imported = load_model(path, options)
    operators = Counter(str(node.op) for node in imported.graph.nodes)
    weights = {id(v.data): v.data.nbytes for v in imported.graph.constants() if v.data is not None}
    data: dict[str, Any] = {
        "name": imported.name,
        "producer": imported.producer,
        "opsets": dict(imported.opsets),
        "inputs": [str(a) for a in imported.inputs],
        "outputs": [str(a) for a in imported.outputs],
        "nodes": sum(operators.values()),
        "operators": dict(operators.most_common()),
        "weights_bytes": sum(weights.values()),
        "warnings": list(imported.warnings),
    }
    rows = optimise(imported.graph, options) if passes else None
    text = print_graph(imported.graph)
    if rows is not None:
        data |= {"passes": [asdict(row) for row in rows.rows], "graph": text}
    if as_json:
        common.print_json(data)
        return
    for name, value in data.items():
        if name not in ("passes", "graph"):
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            shown = ", ".join(map(str, shown)) if isinstance(shown, list) else shown
            print(f"{name + ':':<15}{shown}")
    if rows is not None:
        print(f"\n{rows}\n\n{text}")


def _inspect_saved(path: Path, as_json: bool) -> None:
    module = common.open_model(path, "cpu", None)
    data = {
        "name": module.program.name,
        "target": module.target.name,
        "inputs": [str(p) for p in module.inputs],
        "outputs": [str(p) for p in module.outputs],
        **module.stats(),
    }
    if as_json:
        common.print_json(data)
    else:
        print("\n".join(f"{name + ':':<22}{value}" for name, value in data.items()))
