"""`explain`: which layers became which kernel, on which tier, why not a faster one, and how much work it is.

Work and traffic are numbers for the sizes a module ran with last, else formulas in its symbols.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from minicc.errors import InputError, MiniccError
from minicc.ir.dims import Dim, evaluate
from minicc.lower.program import ControlStep, KernelStep, Program, Step
from minicc.lower.text import tier_of
from minicc.runtime.cuda.facts import kernel_facts
from minicc.runtime.module import CompiledModule
from minicc.targets.cuda import CudaTarget


@dataclass(frozen=True)
class Placement:
    """One step: its number, kernel symbol, tier, layers, work."""

    step: str
    kernel: str
    tier: str
    layers: tuple[str, ...]
    flops: int | str
    bytes: int | str
    note: str


@dataclass(frozen=True)
class Explanation:
    """The placement of a whole module; `str` gives a table."""

    name: str
    rows: tuple[Placement, ...]
    sources: Mapping[str, str]

    def source(self, layer: str = "") -> str:
        """The texts of a layer's kernels (of all for ""). Raises InputError for a layer that has none."""
        kernels = [r.kernel for r in self.rows if r.kernel and (not layer or layer in r.layers)]
        if not kernels:
            layers = [name for r in self.rows for name in r.layers]
            close = difflib.get_close_matches(layer, layers, n=3)
            inside = [name for name in layers if layer in name][:3]
            hint = ", ".join(dict.fromkeys(inside + close))
            raise InputError(
                f"no kernel computes a layer called {layer!r}", hint=f"did you mean {hint}?" if hint else ""
            )
        return "\n\n".join(
            f"# {k}\n{self.sources.get(k, '(its text was not saved)')}" for k in dict.fromkeys(kernels)
        )

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "steps": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        head = f"{'step':>6}  {'tier':<14} {'flop':>12} {'bytes':>12}  {'kernel':<36} layers"
        lines = [
            f"{self.name}: {len(self.rows)} steps, {len({r.kernel for r in self.rows if r.kernel})} kernels",
            head,
        ]
        for row in self.rows:
            layers = ", ".join(row.layers[:4]) + (
                f" and {len(row.layers) - 4} more" if len(row.layers) > 4 else ""
            )
            amount = f"{_amount(row.flops):>12} {_amount(row.bytes):>12}"
            lines.append(f"{row.step:>6}  {row.tier:<14} {amount}  {row.kernel[:36]:<36} {layers}")
            if row.note:
                lines.append(f"{'':>6}    {row.note}")
        return "\n".join(lines)


def explain(module: CompiledModule) -> Explanation:
    """The placement of every step of a module, bodies included."""
    rows = list(_rows(module.program, module, "", _sizes(module)))
    for update in module.program.updates:
        given, made = module.inputs[update.input].name, module.outputs[update.output].name
        note = f"left out where {given!r} is given as out for {made!r}, too: it is updated in place"
        if update not in module.updates:
            note = f"{made!r} cannot be {given!r} updated in place: {update.reason or 'only CPUs do that'}"
        at = next(i for i, row in enumerate(rows) if row.step == str(update.copy))
        rows[at] = replace(rows[at], note=note)
    return Explanation(module.program.name, tuple(rows), module.code.sources)


def _sizes(module: CompiledModule) -> Mapping[str, int]:
    """The sizes of the last run; none before the first."""
    segments = module.runner.segments if module.code.symbols and not module.target.missing_features() else []
    recent = [bound.sizes for segment in segments for bound in segment.recent.values()[-1:]]
    return {name: size for sizes in recent for name, size in sizes.items()}


def _rows(
    program: Program, module: CompiledModule, prefix: str, sizes: Mapping[str, int]
) -> Iterator[Placement]:
    for number, step in enumerate(program.steps):
        yield _placement(f"{prefix}{number}", step, module, sizes)
        if isinstance(step, ControlStep):
            for which, body in enumerate(step.bodies):
                inner = f"{prefix}{number}.{which}." if len(step.bodies) > 1 else f"{prefix}{number}."
                yield from _rows(body, module, inner, sizes)


def _placement(number: str, step: Step, module: CompiledModule, sizes: Mapping[str, int]) -> Placement:
    tier = tier_of(step, module.program.kernels)
    if isinstance(step, KernelStep):
        symbol = module.code.symbols[step.kernel]
        facts = kernel_facts(module.code.objects[symbol]) if isinstance(module.target, CudaTarget) else None
        note = "; ".join(filter(None, (step.note, str(facts or ""))))
        return Placement(number, symbol, tier, step.origin, _work(step.flops, sizes), _work(step.bytes, sizes), note)
    note = "" if isinstance(step, ControlStep) else f"{step.op}: {step.reason}"
    return Placement(number, "", tier, step.origin, 0, 0, note)


def _work(amount: Dim, sizes: Mapping[str, int]) -> int | str:
    try:
        return evaluate(amount, sizes)
    except (KeyError, MiniccError):
        return str(amount)


def _amount(value: int | str) -> str:
    if isinstance(value, str):
        return value if len(value) <= 12 else value[:9] + "..."
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return str(value)
