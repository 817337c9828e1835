"""`run`: does all jobs of a bundle within a time, whatever happens to single ones, and reports.

The order is: what the machine can do, every model compared and timed, launches that overlap, checks of the smallest models'
memory and barriers, ONNX Runtime, then `torch.compile`, which takes longest. Each part may take its share of the time; what one
leaves is the next one's, and the jobs that none reaches are named. Results are written after every job.
"""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from minicc.errors import TargetError
from minicc.targets.cuda import parse_cuda_target
from tools.gpu_check.bundle import Manifest, read_manifest, unpack
from tools.gpu_check.layers import LAYERS
from tools.gpu_check.table import table
from tools.gpu_check.worker import MARK, PRODUCTS

MEASURE_SECONDS = 0.4  # per measurement
CHECK_SECONDS = 45.0  # a job of these kinds is given up after so long
COMPILE_SECONDS = 120.0
SANITIZER_SECONDS = 60.0
SANITIZED = 2  # networks under compute-sanitizer, the smallest artifacts, and a ragged product in every precision
SANITIZED_LAYER = "layer_gemm_127x131x129"
SANITIZERS = ("memcheck", "racecheck", "synccheck")
# Where the time of each part ends, as a share of the whole.
SHARES = {"check": 0.6, "sanitizer": 0.7, "provider": 0.8, "compile": 1.0}
RESERVE_SECONDS = 5.0  # for the report
NO_TIME = "no time left"
# Whose replays are also timed with launches that overlap: many short kernels.
OVERLAPPED = ("layer_chain_32", "resnet50", "mobilenet_v2", "gpt2")
# Where a comparison with torch.compile says most, first.
COMPILED_FIRST = ("resnet50", "bert_base", "mobilenet_v2", "resnet18", "gpt2", "unet")
COMPILED_PRECISIONS = ("fp16", "tf32", "bf16", "fp32")


def run(path: Path, report: Path, seconds: float, only: str = "", rivals: bool = True) -> dict[str, Any]:
    """All results as plain data; written to `report` after every job.

    only: jobs whose name contains one of these parts, with commas between. Raises TargetError where no GPU can run the bundle.
    """
    start = time.monotonic()
    ends = {part: start + share * (seconds - RESERVE_SECONDS) for part, share in SHARES.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = unpack(path, Path(scratch))
        manifest = read_manifest(folder)
        missing = parse_cuda_target(manifest.target).missing_features() if manifest.on_gpu else ()
        if missing:
            why = f"it lacks {', '.join(missing)}"
            raise TargetError(f"no GPU to run a bundle for {manifest.target!r}", why=why, hint="run it where the GPU is")
        results = Results(report, manifest)
        jobs = [job for job in plan(manifest, rivals) if job == "machine:" or any(part in job for part in only.split(","))]
        for part, end in ends.items():
            if part != "sanitizer":
                supervise(folder, [job for job in jobs if part_of(job) == part], end, results)
            elif manifest.on_gpu:
                results.data["sanitizer"] = sanitize(folder, manifest, end)
        results.data["seconds"] = time.monotonic() - start
        results.write()
    print(table(results.data))
    return results.data


class Results:
    """What is known so far, and the file it goes to."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        cases = {case.name: {
            "model": case.model, "precision": case.precision, "build_error": case.error, "compile_s": case.compile_s,
            "bytes": case.bytes, "kernels": case.kernels, "host_nodes": list(case.host_nodes),
        } for case in manifest.cases}  # fmt: skip
        self.data: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "target": manifest.target, "made_by": dict(manifest.made_by),
            "machine": {}, **{kind: {} for kind in PRODUCTS}, "cases": cases,
        }  # fmt: skip

    def add(self, job: str, state: str, row: dict[str, Any]) -> None:
        """Keep what a job gave. States: done, error, skipped."""
        kind, _, name = job.partition(":")
        place = self.data[kind] if kind in ("machine", *PRODUCTS) else self.data["cases"][name].setdefault(kind, {})
        place.update(row | {"state": state})
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1))


def plan(manifest: Manifest, rivals: bool) -> list[str]:
    """All jobs in order; models that did not compile have none."""
    built = [case for case in manifest.cases if case.artifact]
    models = {name: number for number, name in enumerate(COMPILED_FIRST)}
    precisions = {name: number for number, name in enumerate(COMPILED_PRECISIONS)}
    compiled = [case for case in built if rivals and case.precision in precisions]
    compiled.sort(key=lambda case: (case.model not in models, precisions[case.precision], models.get(case.model, 0)))
    return [
        "machine:",
        *(f"{kind}:" for kind in PRODUCTS if manifest.on_gpu),
        *(f"check:{case.name}" for case in built),
        *(f"overlap:{case.name}" for case in built if manifest.on_gpu and case.model in OVERLAPPED),
        *(f"provider:{case.name}" for case in built if rivals and case.onnx),
        *(f"compile:{case.name}" for case in compiled),
    ]


def part_of(job: str) -> str:
    """The part of the run that does a job."""
    kind = job.partition(":")[0]
    return kind if kind in SHARES else "check"


def supervise(folder: Path, jobs: list[str], deadline: float, results: Results) -> None:
    """Do jobs in worker processes; one that dies or hangs costs its own job only. Jobs without time are marked skipped."""
    left = list(jobs)
    while left and time.monotonic() < deadline:
        left = _one_worker(folder, left, deadline, results)
    for job in left:
        results.add(job, "skipped", {"error": NO_TIME})


def _one_worker(folder: Path, jobs: list[str], deadline: float, results: Results) -> list[str]:
    """Run one worker over jobs; returns those it did not come to."""
    command = [sys.executable, "-m", "tools.gpu_check", "work", str(folder), "--seconds", str(MEASURE_SECONDS), *jobs]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    left, current, tail = list(jobs), jobs[0], [""]
    try:
        while left:
            limit = COMPILE_SECONDS if current.startswith("compile:") else CHECK_SECONDS
            try:
                line = lines.get(timeout=max(0.1, min(limit, deadline - time.monotonic())))
            except queue.Empty:
                late = time.monotonic() >= deadline
                why = NO_TIME if late else f"gave up after {limit:.0f} s"
                results.add(current, "skipped" if late else "error", {"error": why})
                return _without(left, current)
            if line is None:
                results.add(current, "error", {"error": f"the process ended: {' | '.join(tail[-4:])}"[:500]})
                return _without(left, current)
            if not line.startswith(MARK):
                tail.append(line.strip())
                continue
            said = json.loads(line[len(MARK) :])
            current = said["job"]
            if said["state"] != "begin":
                results.add(current, said["state"], said["row"])
                left = _without(left, current)
                current = left[0] if left else ""
    finally:
        process.kill()
        process.wait()
        reader.join(5)
        if not reader.is_alive():  # a grandchild may still hold the other end
            process.stdout.close()
    return left


def _without(jobs: list[str], job: str) -> list[str]:
    return [other for other in jobs if other != job]


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def sanitize(folder: Path, manifest: Manifest, deadline: float) -> dict[str, Any]:
    """What compute-sanitizer says about the smallest models, where it is installed, by its tools."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"state": "skipped", "error": "compute-sanitizer is not on the path"}
    built = [case for case in manifest.cases if case.artifact]
    small = sorted((case for case in built if case.model not in LAYERS), key=lambda case: case.bytes)[:SANITIZED]
    names = [case.name for case in (*small, *(case for case in built if case.model == SANITIZED_LAYER))]
    tools = {tool: _sanitize(program, tool, folder, names, deadline) for tool in SANITIZERS}
    states = [found["state"] for found in tools.values()]
    state = "error" if "error" in states else "done" if "done" in states else "skipped"
    errors = [f"{tool}: {found['error']}" for tool, found in tools.items() if found.get("error")]
    return {"state": state, "models": names, "tools": tools, "error": "; ".join(errors)}


def _sanitize(program: str, tool: str, folder: Path, names: list[str], deadline: float) -> dict[str, Any]:
    limit = min(SANITIZER_SECONDS, deadline - time.monotonic())
    if limit < 10:
        return {"state": "skipped", "error": NO_TIME}
    # Calls of the driver that fail are not errors of kernels: its Python bindings look for functions it may not have.
    checks = ["--tool", tool, "--error-exitcode", "9", *(["--report-api-errors", "no"] if tool == "memcheck" else [])]
    command = [program, *checks, sys.executable, "-m", "tools.gpu_check", "once", str(folder), *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"state": "error", "error": f"gave up after {limit:.0f} s"}
    kinds = Counter(re.findall(r"(?m)^========= +((?:Invalid|Program|Misaligned|Leaked|Error|Barrier|Race).*)$", done.stdout))
    return {
        "state": "done" if done.returncode == 0 else "error", "exit": done.returncode, "errors": dict(kinds.most_common(8)),
        "tail": done.stdout[-2000:], "error": f"exit {done.returncode}" if done.returncode else "",
    }  # fmt: skip
