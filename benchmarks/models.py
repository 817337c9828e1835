"""Every real model compiled, run at several shapes, compared with ONNX Runtime and timed beside it.

    python -m benchmarks.models [--only NAME,NAME] [--generated DIR] [--threads N] [--isolate] [--json FILE]

Models come from `benchmarks.fetch` and, with --generated, from a folder that `benchmarks.export` has filled.
Exit code 1 when a model is missing, fails, disagrees (the rule is in `benchmarks.compare`), or compiles or
runs a pass again for a later shape. Times here are indications; `benchmarks.latency` measures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

import minicc
from benchmarks.compare import Rule, difference, interleaved, milliseconds, rule, session
from benchmarks.fetch import BY_NAME, ModelUnavailable, fetch
from benchmarks.inputs import cases, declare


@dataclass
class CaseResult:
    """One shape of one model."""

    shapes: str
    error: float = 0.0
    problem: str = ""
    minicc_ms: float = 0.0
    ort_ms: float = 0.0


@dataclass
class Result:
    """One model: its cases, what stayed on the host, and what the later shapes cost."""

    name: str
    kind: str = ""
    problem: str = ""
    cases: list[CaseResult] = field(default_factory=list)
    host_nodes: list[list[str]] = field(default_factory=list)
    compile_s: float = 0.0
    first_run_s: float = 0.0
    later_compiles: int = 0
    later_passes: int = 0
    arena_bytes: int = 0
    weights_bytes: int = 0

    @property
    def agrees(self) -> bool:
        again = self.later_compiles or self.later_passes
        return not (self.problem or again or any(case.problem for case in self.cases))


def locate(name: str, generated: Path | None, models: Path | None) -> Path:
    """The file of a fetched or generated model; raises ModelUnavailable."""
    if generated and (path := generated / f"{name}.onnx").is_file():
        return path
    return fetch(name, models)


def load(name: str, path: Path) -> tuple[onnx.ModelProto, Path | bytes]:
    """The parsed model, and what to compile: the file, or its bytes where dimensions had to be declared."""
    model = onnx.load(path)
    return model, model.SerializeToString() if declare(name, model) else path


def check(name: str, path: Path, threads: int | None, seconds: float, limit: int | None = None) -> Result:
    """Compile and compare one model; failures become the result's problem text."""
    result = Result(name)
    model, source = load(name, path)
    equal = rule(model)
    result.kind = equal.kind
    outputs = [output.name for output in model.graph.output]
    inputs = cases(name, model)[:limit]
    del model
    competitor = session(source, threads)
    references = _references(source, competitor, equal)
    start = time.perf_counter()
    try:
        module = minicc.compile(source, threads=threads)
        result.compile_s = time.perf_counter() - start
        first: dict[str, Any] = {}
        for case in inputs:
            start = time.perf_counter()
            actual = module.run(None, case.feeds)
            row = CaseResult(case.label)
            result.cases.append(row)
            if not first:
                result.first_run_s = time.perf_counter() - start
                first = dict(module.stats())
            for reference in references:
                row.error, row.problem = _difference(equal, outputs, reference().run(None, case.feeds), actual)
                if not row.problem:
                    break
            if seconds:
                runs = [partial(each.run, None, case.feeds) for each in (module, competitor)]
                row.minicc_ms, row.ort_ms = map(milliseconds, interleaved(runs, seconds))
        stats = module.stats()
        result.later_compiles = stats["compiles"] - first["compiles"]
        result.later_passes = stats["pass_runs"] - first["pass_runs"]
        result.host_nodes = [[str(part) for part in node] for node in stats["host_nodes"]]
        result.arena_bytes, result.weights_bytes = stats["arena_bytes"], stats["weights_bytes"]
    except Exception as error:      # the table must show every model; the type tells a typed error from a bug
        result.problem = f"{type(error).__name__}: {error}"
    return result


def _references(source: Path | bytes, competitor: ort.InferenceSession, equal: Rule) -> list[Callable[[], ort.InferenceSession]]:
    """Sessions of ONNX Runtime of which one must be met: for quantised models the model's own arithmetic, else exact products.

    Quantised ones with one thread, since some of its kernels differ from themselves with several. Each is made when it is
    first needed, and once.
    """
    if equal.kind != "quantised":
        return [lambda: competitor]
    return [cache(partial(session, source, 1, plain=True)), cache(partial(session, source, 1, exact=True))]


def _difference(equal: Rule, names: list[str], expected: Sequence[Any], actual: Sequence[Any]) -> tuple[float, str]:
    """`difference` over all outputs: the largest, and the first problem."""
    found = [difference(equal, *each) for each in zip(names, expected, actual, strict=True)]
    return max((error for error, _ in found), default=0.0), next((problem for _, problem in found if problem), "")


def check_isolated(name: str, arguments: argparse.Namespace) -> Result:
    """`check` in a fresh process, so that a crash or a hang costs one row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.models", "--only", name, "--json", str(out), "--quiet"]
        command += ["--seconds", str(arguments.seconds)]
        for option in ("generated", "models", "threads", "limit"):
            if (value := getattr(arguments, option)) is not None:
                command += [f"--{option}", str(value)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=arguments.timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return Result(name, problem=f"no result within {arguments.timeout:g} s")
        if not out.is_file():
            tail = (done.stderr.strip().splitlines() or [""])[-1]
            return Result(name, problem=f"process ended with code {done.returncode}: {tail}")
        return _from_json(json.loads(out.read_text())[0])


def _from_json(row: dict[str, Any]) -> Result:
    known = {key: value for key, value in row.items() if key not in ("cases", "agrees")}
    return Result(**known, cases=[CaseResult(**case) for case in row["cases"]])


def table(results: list[Result]) -> Table:
    """One line per model and shape; "later c/p" counts compiles and pass runs after the first shape."""
    view = Table(title="minicc beside ONNX Runtime", header_style="bold")
    for title in ("model", "shapes"):
        view.add_column(title, no_wrap=True)
    for title in ("rel err", "host", "strict", "compile s", "later c/p", "minicc ms", "ORT ms", "ratio"):
        view.add_column(title, no_wrap=True, justify="right")
    for result in results:
        host = str(len(result.host_nodes))
        strict = "no" if result.host_nodes else "yes"
        again = f"{result.later_compiles}/{result.later_passes}"
        head = [host, strict, f"{result.compile_s:.2f}", again]
        for case in result.cases:
            mark = "green" if not case.problem else "red"
            ratio = f"{case.minicc_ms / case.ort_ms:.2f}" if case.ort_ms else ""
            times = [f"{ms:.3f}" if ms else "" for ms in (case.minicc_ms, case.ort_ms)] + [ratio]
            error = f"[{mark}]{case.error:.1e}[/]"
            view.add_row(result.name if case is result.cases[0] else "", case.shapes, error, *head, *times)
            head = ["", "", "", ""]
        if not result.cases:
            view.add_row(result.name, "", "[red]failed[/]", "", "", "", "", "", "", "")
    return view


def problems(result: Result) -> list[str]:
    """Lines that say what is wrong with one model, and which nodes stayed on the host."""
    lines = [f"{result.name}: {result.problem}"] if result.problem else []
    lines += [f"{result.name} [{case.shapes}]: {case.problem}" for case in result.cases if case.problem]
    if result.later_compiles or result.later_passes:
        lines.append(f"{result.name}: a later shape compiled or ran passes again")
    lines += [f"{result.name}: host node {' '.join(node)}" for node in result.host_nodes]
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="comma-separated model names; default all")
    parser.add_argument("--generated", type=Path, help="folder of .onnx files made by benchmarks/export.py")
    parser.add_argument("--models", type=Path, help="folder of the fetched models (default: user cache)")
    parser.add_argument("--threads", type=int, help="threads of both runtimes (default: each one's own)")
    parser.add_argument("--seconds", type=float, default=0.3, help="measuring time per shape; 0 for none")
    parser.add_argument("--limit", type=int, help="check only the first shapes of each model")
    parser.add_argument("--isolate", action="store_true", help="a fresh process per model")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per model with --isolate")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--quiet", action="store_true", help="no table")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> int:
    """Check the chosen models; 1 unless all of them agree."""
    console = Console(quiet=arguments.quiet, width=None if sys.stdout.isatty() else 160)
    generated = sorted(p.stem for p in arguments.generated.glob("*.onnx")) if arguments.generated else []
    names = arguments.only.split(",") if arguments.only else [*BY_NAME, *generated]
    results = []
    for name in names:
        try:
            path = locate(name, arguments.generated, arguments.models)
            if arguments.isolate:
                result = check_isolated(name, arguments)
            else:
                result = check(name, path, arguments.threads, arguments.seconds, arguments.limit)
        except ModelUnavailable as error:
            result = Result(name, problem=f"unavailable: {error.reason}")
        results.append(result)
        worst = max((case.error for case in result.cases), default=float("nan"))
        verdict = "agrees" if result.agrees else "FAILED"
        console.print(f"{name:32} {verdict}  max rel err {worst:.1e}  compile {result.compile_s:.2f} s")
        for line in problems(result):
            console.print(f"    {line}", markup=False, soft_wrap=True)
        if arguments.json:
            rows = [asdict(each) | {"agrees": each.agrees} for each in results]
            arguments.json.write_text(json.dumps(rows, indent=1))
    console.print(table(results))
    passed = sum(result.agrees for result in results)
    console.print(f"{passed} of {len(results)} models agree with ONNX Runtime")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(main(parse()))
