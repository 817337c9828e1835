"""Results as one table, for a terminal and for docs/cuda.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tools.gpu_check.worker import PRODUCTS

PARTS = ("check", "overlap", "provider", "compile")
HEAD = (
    "model", "precision", "state", "difference", "minicc ms", "replay ms", "overlap ms", "eager ms", "torch.compile ms",
    "ONNX Runtime ms", "vs replay", "vs eager", "vs compile", "vs ONNX Runtime", "MiB", "compile s", "load s",
)  # fmt: skip


def table(data: Mapping[str, Any]) -> str:
    """A Markdown table: one line a case, then what went wrong, in full."""
    machine = data["machine"]
    title = f"{data['date']}, {machine.get('device', machine.get('machine', 'unknown machine'))}, target {data['target']}"
    shown = [name for name in ("smallest_graph_ms", "copy_gb_per_s") if name in machine]
    facts = [f"{name.replace('_', ' ')}: {machine[name]:.4g}" for name in shown]
    lines = [title, *facts, "", _line(HEAD), _line(["---"] * len(HEAD))]
    lines += [_line(_cells(row)) for row in data["cases"].values()]
    problems = list(_problems(data["cases"]))
    products = {kind: data.get(kind, {}) for kind in PRODUCTS}
    problems += [f"{kind}: {found['error']}" for kind, found in products.items() if found.get("error")]
    sanitizer = data.get("sanitizer")
    if sanitizer:
        problems.append(f"compute-sanitizer: {sanitizer['state']} {sanitizer.get('error', '')}".strip())
    rows = [row for found in products.values() for row in found.get("rows", [])]
    return "\n".join([*lines, "", *_ways(data["cases"]), *_tiles(rows), *problems])


def _tiles(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table of products by tile, the one that would be chosen in bold."""
    if not rows:
        return
    yield from (_line(("case", "kernel", "us", "PyTorch us", "error")), _line(["---"] * 5))
    for row in rows:
        name = f"**{row['kernel']}**" if row["chosen"] else row["kernel"]
        theirs = row["torch_ms"] and row["torch_ms"] * 1e3
        error = f"{row['error']:.1e}{'' if row['right'] else ' WRONG'}"
        yield _line((row["case"], name, _number(row["ms"] * 1e3, ".1f"), _number(theirs, ".1f"), error))
    yield ""


def _ways(cases: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A table of layers that were computed in several ways."""
    checks = {name: row.get("check", {}) for name, row in cases.items()}
    if not any(check.get("ways") for check in checks.values()):
        return
    yield from (_line(("case", "way", "us", "difference")), _line(["---"] * 4))
    for name, check in checks.items():
        for way, found in check.get("ways", {}).items():
            difference = f"{found['difference']:.1e}{'' if found['agrees'] else ' WRONG'}"
            yield _line((name, way, _number(check["ms"][way] * 1e3, ".1f"), difference))
    yield ""


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
    check, times = row.get("check", {}), row.get("check", {}).get("ms", {})
    others, peers = (row.get(part, {}).get("ms", {}) for part in ("compile", "provider"))
    own = times.get("minicc")
    early, late = (row.get("overlap", {}).get("ms", {}).get(name) for name in ("overlap", "replay"))
    eager = min((t for name, t in times.items() if name.startswith("eager")), default=None)
    rival, beside = others.get("torch.compile"), others.get("minicc")
    peer, near = peers.get("onnxruntime"), peers.get("minicc")
    return [
        row["model"], row["precision"], state_of(row), _number(check.get("difference"), ".1e"), _number(own),
        _number(times.get("minicc replay")), _number(early), _number(eager), _number(rival), _number(peer),
        _ratio(late, early), _ratio(eager, own), _ratio(rival, beside), _ratio(peer, near), _number(row["bytes"] / 2**20 or None),
        _number(row["compile_s"]), _number(check.get("load_s")),
    ]  # fmt: skip


def _problems(cases: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What went wrong with single cases, then what several have in common: the same reason, and too little time."""
    shared: dict[str, list[str]] = {}
    for name, row in cases.items():
        if row["build_error"]:
            yield f"{name}: {row['build_error']}"
        for kind in PARTS:
            part = row.get(kind, {})
            if part.get("state") == "skipped":
                shared.setdefault(f"{kind}: {part['error']}", []).append(name)
                continue
            for text in filter(None, (part.get("error"), part.get("problem"))):
                yield f"{name}: {text}"
            if part.get("rival"):
                shared.setdefault(f"{kind}: {part['rival']}", []).append(name)
        if row.get("check", {}).get("repeatable") is False:
            yield f"{name}: two runs gave different bits"
        if row.get("overlap", {}).get("same") is False:
            yield f"{name}: launches that overlap gave other bits"
        if row.get("overlap", {}).get("overlaps") is False:
            yield f"{name}: its launches cannot overlap"
    for text, names in shared.items():
        yield f"{text}: {', '.join(names)}"


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def _ratio(other: float | None, own: float | None) -> str:
    """How many times as long the other takes."""
    return "" if not other or not own else f"{other / own:.2f}"
