"""`run`: does all jobs of a bundle within a time, whatever happens to single ones, and reports.

The order is: what the machine can do, every model compared and timed, memory checks of the smallest models, then
`torch.compile`, which takes longest. Results are written after every job.
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

from tools.gpu_check.bundle import Manifest, read_manifest, unpack
from tools.gpu_check.table import table
from tools.gpu_check.worker import MARK

MEASURE_SECONDS = 0.6  # per measurement
CHECK_SECONDS = 45.0  # a job of these kinds is given up after so long
COMPILE_SECONDS = 120.0
SANITIZER_SECONDS = 60.0
SANITIZED = 2  # models under compute-sanitizer, the smallest artifacts
RESERVE_SECONDS = 5.0  # for the report
# Where a comparison with torch.compile says most, first.
COMPILED_FIRST = ("resnet50", "bert_base", "mobilenet_v2", "resnet18", "gpt2", "unet")


def run(path: Path, report: Path, seconds: float, only: str = "", rivals: bool = True) -> dict[str, Any]:
    """All results as plain data; written to `report` after every job. `only`: jobs whose name contains it."""
    deadline = time.monotonic() + seconds - RESERVE_SECONDS
    with tempfile.TemporaryDirectory() as scratch:
        folder = unpack(path, Path(scratch))
        manifest = read_manifest(folder)
        results = Results(report, manifest)
        jobs = [job for job in plan(manifest, rivals) if only in job or job == "machine:"]
        checks = [job for job in jobs if not job.startswith("compile:")]
        supervise(folder, checks, deadline, results)
        if manifest.on_gpu:
            results.data["sanitizer"] = sanitize(folder, manifest, deadline)
        supervise(folder, [job for job in jobs if job.startswith("compile:")], deadline, results)
        results.data["seconds"] = time.monotonic() - (deadline - seconds + RESERVE_SECONDS)
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
            "machine": {}, "cases": cases,
        }  # fmt: skip

    def add(self, job: str, state: str, row: dict[str, Any]) -> None:
        """Keep what a job gave. States: done, error, skipped."""
        kind, _, name = job.partition(":")
        place = self.data["machine"] if kind == "machine" else self.data["cases"][name].setdefault(kind, {})
        place.update(row | {"state": state})
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1))


def plan(manifest: Manifest, rivals: bool) -> list[str]:
    """All jobs in order; models that did not compile have none."""
    built = [case for case in manifest.cases if case.artifact]
    rank = {name: number for number, name in enumerate(COMPILED_FIRST)}
    compiled = sorted(built, key=lambda case: rank.get(case.model, len(rank)))
    return [
        "machine:", *(f"check:{case.name}" for case in built),
        *(f"compile:{case.name}" for case in compiled if rivals and case.model in rank),
    ]  # fmt: skip


def supervise(folder: Path, jobs: list[str], deadline: float, results: Results) -> None:
    """Do jobs in worker processes; one that dies or hangs costs its own job only. Jobs without time are marked skipped."""
    left = list(jobs)
    while left and time.monotonic() < deadline:
        left = _one_worker(folder, left, deadline, results)
    for job in left:
        results.add(job, "skipped", {"error": "no time left"})


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
                why = f"gave up after {limit:.0f} s" if time.monotonic() < deadline else "no time left"
                results.add(current, "error", {"error": why})
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
    """What compute-sanitizer says about the smallest models, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"state": "skipped", "error": "compute-sanitizer is not on the path"}
    small = sorted((case for case in manifest.cases if case.artifact), key=lambda case: case.bytes)[:SANITIZED]
    # Calls of the driver that fail are not errors of kernels: its Python bindings look for functions it may not have.
    checks = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    command = [tool, *checks, sys.executable, "-m", "tools.gpu_check", "once", str(folder),
               *(case.name for case in small)]  # fmt: skip
    limit = min(SANITIZER_SECONDS, deadline - time.monotonic())
    if limit < 10:
        return {"state": "skipped", "error": "no time left"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"state": "error", "error": f"gave up after {limit:.0f} s"}
    state = "done" if done.returncode == 0 else "error"
    kinds = Counter(re.findall(r"(?m)^========= +((?:Invalid|Program|Misaligned|Leaked).*)$", done.stdout))
    return {
        "state": state, "models": [case.name for case in small], "exit": done.returncode, "errors": dict(kinds.most_common(8)),
        "tail": done.stdout[-2000:],
    }  # fmt: skip
