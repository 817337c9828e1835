"""Operators nobody knows: collected during the import and reported together.

A stand-in with outputs of unknown rank takes the place of each, so that the import goes on to the next one.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

import onnx

from minicc.errors import UnsupportedOpError
from minicc.frontend.upgrade import OnnxNode
from minicc.ir.opdef import Inference, Kind, OpDef, all_ops
from minicc.ir.types import TensorType, Type, f32

_SHOWN = 20


@dataclass
class Unsupported:
    """Operator to the first node that uses it and the number of uses."""

    found: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.found)

    def add(self, node: OnnxNode, where: str) -> OpDef:
        """Note a use; returns the stand-in."""
        types = ", ".join("-" if v is None else str(v.type) for v in node.inputs)
        first, uses = self.found.get((node.domain, node.op), (f"{where} ({types})", 0))
        self.found[node.domain, node.op] = (first, uses + 1)
        return OpDef(node.op, Kind.HOST, _unknown_rank, domain=node.domain)

    def error(self, name: str) -> UnsupportedOpError:
        """One error that lists every operator, its first use, and operators of similar names."""
        known = {op.name for op in all_ops()} | {schema.name for schema in onnx.defs.get_all_schemas()}
        lines = []
        for (domain, op), (first, uses) in list(self.found.items())[:_SHOWN]:
            close = difflib.get_close_matches(op, known, n=3)
            guess = f"; did you mean {', '.join(close)}?" if close and op not in known else ""
            lines.append(
                f"{domain or 'ai.onnx'}.{op}: {uses} use{'s' if uses > 1 else ''}, first {first}{guess}"
            )
        if len(self.found) > _SHOWN:
            lines.append(f"and {len(self.found) - _SHOWN} more")
        count = len(self.found)
        return UnsupportedOpError(
            f"{name} uses {count} operator{'s' if count > 1 else ''} that minicc does not know",
            why="\n       ".join(lines),
            hint="cut the graph before them, or define them in minicc.ops",
        )


def _unknown_rank(n: Inference) -> list[Type]:
    types = [v.type for v in n.inputs if v is not None and isinstance(v.type, TensorType)]
    return [TensorType(types[0].dtype if types else f32, None)] * n.n_outputs
