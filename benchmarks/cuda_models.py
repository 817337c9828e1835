"""Every real model compiled for a GPU that need not be here: placement, kernels, size of the artifact, compile and load times.

    python -m benchmarks.cuda_models [NAME ...] [--generated DIR] [--target cuda:sm_90] [--precision fp32] [--json FILE]

Each model is compiled in a process of its own (imports of the compiler included), saved, and loaded in another process, which
must get along without the compiler and without onnx. The kernel store is empty at first and serves all models of a run: name one
model for its cold figures. Prints the table of docs/cuda.md. Exit code 1 when a model is missing, fails, spills registers, or
needs at its load what only compiling needs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import minicc
from benchmarks.fetch import BY_NAME, ModelUnavailable
from benchmarks.models import load, locate
from minicc.runtime.cuda.facts import kernel_facts

LOAD = """
import json, sys, time
import minicc
started = time.perf_counter()
minicc.load(sys.argv[1], trust=True)
seconds = time.perf_counter() - started
print(json.dumps([seconds, sorted({"numba", "llvmlite", "onnx", "onnxruntime"} & set(sys.modules))]))
"""
MIB = 1 << 20


@dataclass(frozen=True)
class Built:
    """One model: placement, distinct kernels and their registers, bytes of the artifact, seconds.

    host:    steps on the host, as "layers: why".
    spilled: kernels with registers in local memory. compile_cpu_s: processor time of `compile_s`, of all its processes.
    load_s:  in a fresh process, until the module is there; the upload comes with the first call.
    """

    name: str
    steps: int = 0
    kernels: int = 0
    registers: int = 0
    bytes: int = 0
    compile_s: float = 0.0
    compile_cpu_s: float = 0.0
    load_s: float = 0.0
    host: tuple[str, ...] = ()
    spilled: tuple[str, ...] = ()
    problem: str = ""


def compile_here(name: str, path: Path, target: str, precision: str, artifact: Path) -> Built:
    """Compile a model in this process and save it."""
    source = load(name, path)[1]
    started, used = time.perf_counter(), processor_seconds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", minicc.HostNodesWarning)
        module = minicc.compile(source, target, precision=precision)
    seconds, used = time.perf_counter() - started, processor_seconds() - used
    module.save(artifact)
    rows = module.explain().rows
    facts = {symbol: kernel_facts(cubin) for symbol, cubin in module.code.objects.items()}
    return Built(
        name, len(rows), len({row.kernel for row in rows if row.kernel}),
        max((fact.registers for fact in facts.values() if fact), default=0), artifact.stat().st_size, seconds, used,
        host=tuple(f"{', '.join(row.layers)}: {row.note}" for row in rows if row.tier == "host"),
        spilled=tuple(symbol for symbol, fact in facts.items() if fact is None or fact.stack_bytes),
    )  # fmt: skip


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(name: str, store: Path, options: argparse.Namespace) -> Built:
    """Compile and load one model, each in a process of its own; what goes wrong becomes the problem."""
    with tempfile.TemporaryDirectory() as folder:
        artifact, out = Path(folder, "model.minicc"), Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.cuda_models", name, "--here", str(artifact), "--json", str(out)]
        command += ["--target", options.target, "--precision", options.precision]
        command += ["--generated", str(options.generated)] if options.generated else []
        environment = dict(os.environ, MINICC_CACHE=str(store))
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode or not out.is_file():
            return Built(name, problem=(done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
        built = built_of(json.loads(out.read_text()))
        command = [sys.executable, "-c", LOAD, str(artifact)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            return built_of(asdict(built) | {"problem": f"load: {(done.stderr.strip().splitlines() or [''])[-1]}"})
        seconds, imported = json.loads(done.stdout)
        problem = f"load imports {', '.join(imported)}" if imported else ""
        return built_of(asdict(built) | {"load_s": seconds, "problem": problem})


def built_of(row: dict[str, object]) -> Built:
    """A record from its JSON form."""
    return Built(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()})  # type: ignore[arg-type]


def table(rows: Sequence[Built]) -> str:
    """Markdown: a line per model."""
    return "\n".join(_lines(rows))


def _lines(rows: Sequence[Built]) -> Iterator[str]:
    yield "| model | steps | on the host | kernels | most registers | compile s | of processors | MiB | load s |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        if row.kernels:
            counts = f"{row.steps} | {len(row.host) or ''} | {row.kernels} | {row.registers}"
            seconds = f"{row.compile_s:.1f} | {row.compile_cpu_s:.1f}"
            yield f"| {row.name} | {counts} | {seconds} | {row.bytes / MIB:.1f} | {row.load_s:.2f} |"
        else:
            yield f"| {row.name} | | | | | | | | |"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.cuda_models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--generated", type=Path, help="folder of .onnx files made by benchmarks/export.py")
    parser.add_argument("--target", default="cuda:sm_90")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--here", type=Path, help="compile in this process and save the artifact there")
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> int:
    """Measure the chosen models; 1 unless all of them compile, load and spill nothing."""
    generated = sorted(p.stem for p in options.generated.glob("*.onnx")) if options.generated else []
    rows: list[Built] = []
    with tempfile.TemporaryDirectory() as store:
        for name in options.names or [*BY_NAME, *generated]:
            rows.append(measure(name, Path(store), options))
            print(f"{name:<34} {rows[-1].compile_s:>6.1f} s  {rows[-1].problem}", flush=True)
            if options.json:
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(table(rows))
    for row in rows:
        for line in filter(None, (row.problem, *row.host, *(f"spills: {symbol}" for symbol in row.spilled))):
            print(f"{row.name}: {line}")
    return int(any(row.problem or row.spilled for row in rows))


def main_here(options: argparse.Namespace) -> int:
    """What `measure` starts: compile one model in this process."""
    name = options.names[0]
    try:
        path = locate(name, options.generated, None)
    except ModelUnavailable as error:
        raise SystemExit(f"unavailable: {error.reason}") from error
    built = compile_here(name, path, options.target, options.precision, options.here)
    options.json.write_text(json.dumps(asdict(built)))
    return 0


if __name__ == "__main__":
    given = parse()
    sys.exit(main_here(given) if given.here else main(given))
