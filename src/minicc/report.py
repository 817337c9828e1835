"""What a compilation did, in numbers: plain records that travel with a saved module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PassRow:
    """What one pass did, over all its runs; `rules` counts changes by rule, `refusals` reasons of rules that
    did not apply.
    """

    name: str
    runs: int
    changes: int
    nodes_before: int
    nodes_after: int
    milliseconds: float
    rules: Mapping[str, int]
    refusals: Mapping[str, int]


@dataclass(frozen=True)
class CompileReport:
    """What compilation did: a row per pass, seconds per stage, and what the file says wrongly of itself.

    tuned: lines about what timing chose other than estimates (`Options.tune`).
    """

    passes: tuple[PassRow, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    tuned: tuple[str, ...] = ()

    @property
    def kept_in_fp32(self) -> tuple[str, ...]:
        """Nodes that a 16-bit precision leaves in float32, each with its reason; empty for "fp32" and "tf32"."""
        return tuple(line for row in self.passes if row.name == "reduced-precision" for line in row.refusals)

    def __str__(self) -> str:
        stages = ", ".join(f"{stage} {spent:.2f} s" for stage, spent in self.seconds.items())
        rows = [
            f"{r.name:<24}{r.changes:>6} changes {r.nodes_before:>6} -> {r.nodes_after} nodes"
            for r in self.passes
        ]
        kept = [f"kept in fp32: {line}" for line in self.kept_in_fp32]
        tuned = [f"tuned: {line}" for line in self.tuned]
        return "\n".join([*rows, *kept, *tuned, stages, *self.warnings])

    @classmethod
    def of_notes(cls, data: Any) -> CompileReport:
        """The report that a saved module's notes hold as plain data; what does not fit is left out."""
        try:
            rows = tuple(PassRow(**row) for row in data["passes"])
            return cls(rows, dict(data["seconds"]), tuple(data["warnings"]), tuple(data["tuned"]))
        except (KeyError, TypeError, ValueError):
            return cls()
