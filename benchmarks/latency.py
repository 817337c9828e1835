"""Latency of minicc beside ONNX Runtime in one process, and cold and warm compile times in fresh processes.

    python -m benchmarks.latency [NAME ...] [--generated DIR] [--threads 1,2] [--seconds 5] [--json FILE]

Both runtimes get the same thread count and inputs (the first, nominal shape of `benchmarks.inputs`) and are
measured in alternating blocks; each block starts after a pause, in which ONNX Runtime's threads stop spinning (35 ms
were seen), and one uncounted call. Figures from a busy
machine are worth only their ratio. Cold compile: fresh process, empty cache; warm: the same again, where the module is kept;
kernels kept: the same without kept modules (keep_bytes=0), so that all but the compilation of kernels is done anew. All count
from `import minicc` to the end of `minicc.compile`; the first run is listed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import minicc
from benchmarks.compare import difference, interleaved, milliseconds, rule, session
from benchmarks.fetch import ModelUnavailable
from benchmarks.inputs import cases
from benchmarks.models import load, locate

DEFAULT = ("resnet50", "mobilenet_v2", "bert_base")

_COMPILE = """
import json, sys, time
start = time.perf_counter()
import minicc
imported = time.perf_counter()
module = minicc.compile(sys.argv[1], cache_dir=sys.argv[2], threads=int(sys.argv[3]), keep_bytes=int(sys.argv[5]))
compiled = time.perf_counter()
import numpy as np
with np.load(sys.argv[4], allow_pickle=False) as feeds:
    feeds = {name: feeds[name] for name in feeds.files}
begin = time.perf_counter()
module.run(None, feeds)
print(json.dumps({
    "import_s": imported - start, "compile_s": compiled - start, "first_run_s": time.perf_counter() - begin,
}))
"""


def measure(name: str, path: Path, threads: int, seconds: float) -> dict[str, Any]:
    """Medians and 10th and 90th percentiles in milliseconds of both runtimes at one thread count."""
    model, source = load(name, path)
    case = cases(name, model)[0]
    equal = rule(model)
    outputs = [output.name for output in model.graph.output]
    del model
    competitor = session(source, threads)
    module = minicc.compile(source, threads=threads)
    runs = [partial(each.run, None, case.feeds) for each in (module, competitor)]
    results = [[run() for run in runs] for _ in range(2)][-1]
    errors = [difference(equal, name, b, a) for name, a, b in zip(outputs, *results, strict=True)]
    ours, theirs = interleaved(runs, seconds, block=5, pause=0.06)
    row: dict[str, Any] = {"model": name, "shapes": case.label, "threads": threads}
    row |= {"error": max(error for error, _ in errors), "problem": "; ".join(p for _, p in errors if p)}
    for key, times in (("minicc", ours), ("ort", theirs)):
        tenths = quantiles(times, n=10)
        row[f"{key}_ms"] = milliseconds(times)
        row |= {f"{key}_p10_ms": tenths[0] * 1e3, f"{key}_p90_ms": tenths[-1] * 1e3}
    return row | {"ratio": row["minicc_ms"] / row["ort_ms"], "runs": len(ours)}


def compile_times(name: str, path: Path, threads: int) -> dict[str, Any]:
    """Seconds of import, compile and first run: with an empty cache, with the module kept, and with kernels only."""
    model, source = load(name, path)
    row: dict[str, Any] = {"model": name}
    with tempfile.TemporaryDirectory(prefix="minicc-latency-") as folder:
        root = Path(folder)
        file = root / "model.onnx" if isinstance(source, bytes) else path
        if isinstance(source, bytes):
            file.write_bytes(source)
        feeds = root / "feeds.npz"
        np.savez(feeds, **cases(name, model)[0].feeds)
        command = [sys.executable, "-c", _COMPILE, str(file), str(root / "cache"), str(threads), str(feeds)]
        usual = minicc.Options().keep_bytes
        for state, keep in (("cold", usual), ("warm", usual), ("kernels", 0)):
            done = subprocess.run([*command, str(keep)], capture_output=True, text=True, timeout=1800, check=False)
            if done.returncode:
                return row | {"problem": (done.stderr.strip().splitlines() or ["failed"])[-1]}
            row |= {f"{state}_{key}": value for key, value in json.loads(done.stdout).items()}
    return row


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    packages = {name: version(name) for name in ("numpy", "numba", "llvmlite", "onnxruntime")}
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **packages}


def latency_table(rows: list[dict[str, Any]]) -> Table:
    view = Table(title="latency, median ms [10th..90th percentile]")
    for title in ("model", "shapes", "threads", "minicc", "ONNX Runtime", "minicc/ORT", "rel err"):
        view.add_column(title, no_wrap=True)
    for row in rows:
        if "ratio" not in row:
            view.add_row(row["model"], "", str(row["threads"]), "[red]failed[/]", "", "", "")
            continue
        times = [
            f"{row[f'{key}_ms']:.2f} [dim]({row[f'{key}_p10_ms']:.2f}..{row[f'{key}_p90_ms']:.2f})[/]"
            for key in ("minicc", "ort")
        ]
        error = f"[{'red' if row['problem'] else 'green'}]{row['error']:.1e}[/]"
        view.add_row(row["model"], row["shapes"], str(row["threads"]), *times, f"{row['ratio']:.2f}", error)
    return view


def compile_table(rows: list[dict[str, Any]]) -> Table:
    view = Table(title="compile seconds in a fresh process")
    titles = ("import", "cold compile", "cold first run", "warm compile", "warm first run", "kernels kept")
    for title in ("model", *titles):
        view.add_column(title, no_wrap=True)
    for row in rows:
        keys = ("warm_import_s", "cold_compile_s", "cold_first_run_s", "warm_compile_s", "warm_first_run_s", "kernels_compile_s")
        figures = [f"{row[key]:.2f}" if key in row else "[red]failed[/]" for key in keys]
        view.add_row(row["model"], *figures)
    return view


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.latency", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=DEFAULT, help=f"models; default {' '.join(DEFAULT)}")
    parser.add_argument("--generated", type=Path, help="folder of .onnx files made by benchmarks/export.py")
    parser.add_argument("--models", type=Path, help="folder of the fetched models (default: user cache)")
    parser.add_argument("--threads", default="1,2", help="comma-separated thread counts")
    parser.add_argument("--seconds", type=float, default=5, help="measuring time per model and thread count")
    parser.add_argument("--no-compile", action="store_true", help="leave the compile times out")
    parser.add_argument("--no-latency", action="store_true", help="leave the latencies out")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> int:
    """Measure and print; 1 if a model is missing, fails or disagrees."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    threads = [int(text) for text in arguments.threads.split(",")]
    report: dict[str, Any] = {"machine": machine(), "latency": [], "compile": []}
    for name in arguments.names:
        try:
            path = locate(name, arguments.generated, arguments.models)
        except ModelUnavailable as error:
            report["compile"].append({"model": name, "problem": error.reason})
            continue
        if not arguments.no_compile:
            report["compile"].append(compile_times(name, path, threads[-1]))
        for count in [] if arguments.no_latency else threads:
            try:
                row = measure(name, path, count, arguments.seconds)
            except minicc.MiniccError as error:
                row = {"model": name, "threads": count, "problem": str(error)}
            report["latency"].append(row)
    for kind, view in (("latency", latency_table), ("compile", compile_table)):
        if report[kind]:
            console.print(view(report[kind]))
    problems = [row for kind in ("latency", "compile") for row in report[kind] if row.get("problem")]
    for row in problems:
        console.print(f"{row['model']}: {row['problem']}", markup=False, soft_wrap=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(parse()))
