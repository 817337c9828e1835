"""Results as one table, for a terminal and for docs/cuda.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = (
    "model", "precision", "state", "difference", "minicc ms", "eager ms", "torch.compile ms", "vs eager", "vs compile", "MiB",
    "compile s", "load s",
)  # fmt: skip


def table(data: Mapping[str, Any]) -> str:
    """A Markdown table: one line a case, then what went wrong, in full."""
    machine = data["machine"]
    title = f"{data['date']}, {machine.get('device', machine.get('machine', 'unknown machine'))}, target {data['target']}"
    shown = [name for name in ("smallest_graph_ms", "copy_gb_per_s") if name in machine]
    facts = [f"{name.replace('_', ' ')}: {machine[name]:.4g}" for name in shown]
    lines = [title, *facts, "", _line(HEAD), _line(["---"] * len(HEAD))]
    lines += [_line(_cells(row)) for row in data["cases"].values()]
    problems = [f"{name}: {text}" for name, row in data["cases"].items() for text in _problems(row)]
    sanitizer = data.get("sanitizer")
    if sanitizer:
        problems.append(f"compute-sanitizer: {sanitizer['state']} {sanitizer.get('error', '')}".strip())
    return "\n".join([*lines, "", *problems])


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def state_of(row: Mapping[str, Any]) -> str:
    """One word: not built, not run, agrees, differs, error."""
    check = row.get("check", {})
    if row["build_error"]:
        return "not built"
    if check.get("state") != "done":
        return "error" if check.get("state") == "error" else "not run"
    return "agrees" if check["agrees"] else "DIFFERS"


def _cells(row: Mapping[str, Any]) -> list[str]:
    check, compiled = row.get("check", {}), row.get("compile", {})
    times, others = check.get("ms", {}), compiled.get("ms", {})
    own = times.get("minicc")
    eager = min((t for name, t in times.items() if name.startswith("eager")), default=None)
    rival, beside = others.get("torch.compile"), others.get("minicc")
    return [
        row["model"], row["precision"], state_of(row), _number(check.get("difference"), ".1e"), _number(own), _number(eager),
        _number(rival), _ratio(eager, own), _ratio(rival, beside), _number(row["bytes"] / 2**20 or None),
        _number(row["compile_s"]), _number(check.get("load_s")),
    ]  # fmt: skip


def _problems(row: Mapping[str, Any]) -> list[str]:
    check, compiled = row.get("check", {}), row.get("compile", {})
    found = [row["build_error"], *(part.get(key, "") for part in (check, compiled) for key in ("error", "problem", "rival"))]
    if check.get("repeatable") is False:
        found.append("two runs gave different bits")
    return [text for text in found if text]


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _ratio(other: float | None, own: float | None) -> str:
    """How many times as long the other takes."""
    return "" if not other or not own else f"{other / own:.2f}"
