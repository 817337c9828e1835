"""The process that touches the device: does jobs one after another and prints one line of JSON for each.

A fault on a GPU spoils the process it happens in, and a compilation may hang, so the supervisor (`run`) watches a process of this
kind and starts another one with the jobs that are left.

Jobs are "machine:" (what the machine can do at best), "tiles:" (products with every tile, `benchmarks.cuda_kernels`), "tma:"
(with those that the copy engine fills: should they hang, no other job suffers) and "stream:" (thin products, their tiles cut by
stream-K and by clusters beside whole ones), "check:MODEL/PRECISION" (compare, time beside
eager PyTorch), "overlap:MODEL/PRECISION" (replays whose launches overlap beside those whose do not), "provider:MODEL/PRECISION"
(time beside ONNX Runtime's CUDA provider) and "compile:MODEL/PRECISION" (time
beside torch.compile).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import minicc
from benchmarks import cuda_kernels
from benchmarks.cuda_cases import Conv, Gemm
from tools.gpu_check import device
from tools.gpu_check.bundle import TOLERANCE, Array, Case, Manifest, largest_difference, read_arrays
from tools.gpu_check.layers import LAYERS
from tools.gpu_check.timing import medians

TILE_CASES = (
    Gemm(4096, 4096, 4096), Gemm(16, 4096, 4096), Gemm(1, 4096, 4096), Conv(32, 56, 64, 64, 3), Conv(32, 14, 256, 256, 3),
)  # fmt: skip
THIN_CASES = (Gemm(16, 4096, 4096), Gemm(512, 768, 3072), Gemm(392, 2048, 512))
# By job: the cases, and which kernels of `benchmarks.cuda_kernels` run them.
PRODUCTS = {"tiles": (TILE_CASES, ("tiles",)), "tma": (TILE_CASES, ("tma",)), "stream": (THIN_CASES, ("tiles", "stream"))}
PROFILED = 12
IN_A_ROW = 50  # replays before results are compared
MARK = "@gpu_check "  # starts the lines that the supervisor reads
Row = dict[str, Any]


def work(folder: Path, manifest: Manifest, jobs: list[str], seconds: float) -> None:
    """Do the jobs; `seconds` is how long each measurement lasts."""
    by_name = {case.name: case for case in manifest.cases}
    where = "cuda" if manifest.on_gpu else "cpu"
    for job in jobs:
        kind, _, name = job.partition(":")
        say(job, "begin", {})
        started = time.perf_counter()
        try:
            if kind == "machine":
                row = device.machine(where)
            elif kind in PRODUCTS:
                row = {"rows": cuda_kernels.run(folder / "tiles", *PRODUCTS[kind])}
            else:
                row = JOBS[kind](folder, by_name[name], where, seconds)
        except Exception as error:
            say(job, "error", {"error": describe(error), "took_s": time.perf_counter() - started})
            if not device.is_sound(where):
                raise SystemExit(3) from error
        else:
            say(job, "done", row | {"took_s": time.perf_counter() - started})


def say(job: str, state: str, row: Row) -> None:
    print(MARK + json.dumps({"job": job, "state": state, "row": row}), flush=True)


def describe(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[:3])}"[:500]


def check(folder: Path, case: Case, where: str, seconds: float) -> Row:
    """Compare with the expected outputs, and time beside PyTorch as it comes."""
    feeds, expected = read_arrays(folder / case.data)
    started = time.perf_counter()
    module = minicc.load(folder / case.artifact, trust=True)
    loaded = time.perf_counter()
    outputs = named(module, module.run(None, feeds))
    row: Row = {"load_s": loaded - started, "first_run_s": time.perf_counter() - loaded}
    row |= agreement(expected, outputs, tolerance(case))
    given, row["inputs"] = device.place(module, feeds, where)
    again = named(module, device.to_host(module.run(None, given)))
    row["repeatable"] = all(same_bits(outputs[name], again[name]) for name in outputs)
    calls: dict[str, Callable[[], object]] = {"minicc": lambda: module.run(None, given)}
    replay = device.replay_of(module, given)
    if replay is not None:
        calls["minicc replay"] = replay
    row |= slowest_kernels(module, given)
    row["ways"] = {}
    for way, artifact in case.ways.items():
        row["ways"][way], calls[way] = _way(folder / artifact, given, expected, tolerance(case))
    calls |= _rival(case, feeds, where, row, eager=True)
    row["ms"] = medians(calls, device.synchroniser(where), seconds)
    return row


def _way(artifact: Path, given: dict[str, Any], expected: dict[str, Array], allowed: float) -> tuple[Row, Callable[[], object]]:
    """Another way to compute a layer, compared, and a call of it."""
    module = minicc.load(artifact, trust=True)
    outputs = named(module, device.to_host(module.run(None, given)))
    row = agreement(expected, outputs, allowed) | slowest_kernels(module, given)
    return row, device.replay_of(module, given) or (lambda: module.run(None, given))


def slowest_kernels(module: minicc.Module, given: dict[str, Any]) -> Row:
    """Name, calls and milliseconds of the steps that take most, which tells a layer's kernel from copies around it."""
    try:
        rows = module.profile(**given).rows
    except Exception as error:  # must not hide the comparison
        return {"profile_error": describe(error)}
    return {"kernels": [[row.name, row.calls, row.seconds * 1e3] for row in rows[:PROFILED]]}


def overlap(folder: Path, case: Case, where: str, seconds: float) -> Row:  # noqa: ARG001
    """Replays with launches that overlap must give the bits of those without; both are timed in turn."""
    feeds, _ = read_arrays(folder / case.data)
    replays, bits, row = {}, [], Row()
    for name, asked in (("replay", False), ("overlap", True)):
        module = minicc.load(folder / case.artifact, trust=True, overlap=asked)
        replays[name] = module.replay(feeds)
        row["overlaps"] = module.runner.shared.overlap  # type: ignore[attr-defined]  # of a GPU's runner
        for _ in range(IN_A_ROW):
            replays[name]()
        bits.append([output.numpy() for output in replays[name].outputs])
    row["same"] = all(map(same_bits, *bits))
    row["ms"] = medians(replays, lambda: [replay.wait() for replay in replays.values()], seconds)
    return row


def compile_(folder: Path, case: Case, where: str, seconds: float) -> Row:
    """Time beside PyTorch's compiler."""
    feeds, _ = read_arrays(folder / case.data)
    row: Row = {}
    started = time.perf_counter()
    calls = _rival(case, feeds, where, row, eager=False)
    row["torch_compile_s"] = time.perf_counter() - started
    return row | beside(folder, case, feeds, where, seconds, calls)


def provider(folder: Path, case: Case, where: str, seconds: float) -> Row:
    """Time beside ONNX Runtime, which must agree with the expected outputs as we must."""
    try:
        from tools.gpu_check import provider as onnxruntime
    except ImportError as error:
        return {"rival": describe(error)}
    if reason := onnxruntime.missing(where):
        return {"rival": reason}
    feeds, expected = read_arrays(folder / case.data)
    started = time.perf_counter()
    call, read, form = onnxruntime.bound(folder / case.onnx, feeds, expected, case.precision, where)
    row: Row = {"onnxruntime_load_s": time.perf_counter() - started, "form": form}
    row["onnxruntime_difference"], _ = largest_difference(expected, dict(zip(expected, read(), strict=True)))
    return row | beside(folder, case, feeds, where, seconds, {"onnxruntime": call})


def beside(
    folder: Path, case: Case, feeds: dict[str, Array], where: str, seconds: float, calls: dict[str, Callable[[], object]]
) -> Row:
    """Our time and that of other calls, measured in turn; nothing when there are none."""
    if not calls:
        return {}
    module = minicc.load(folder / case.artifact, trust=True)
    given, inputs = device.place(module, feeds, where)
    module.run(None, given)
    ours: dict[str, Callable[[], object]] = {"minicc": lambda: module.run(None, given)}
    return {"inputs": inputs, "ms": medians(calls | ours, device.synchroniser(where), seconds)}


def same_bits(a: Array, b: Array) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def named(module: minicc.Module, outputs: list[Any]) -> dict[str, Array]:
    return {port.name: np.asarray(array) for port, array in zip(module.outputs, outputs)}


def tolerance(case: Case) -> float:
    """The difference allowed: none in products of integers, which are exact."""
    return 0.0 if case.model in LAYERS and case.precision == "int8" else TOLERANCE[case.precision]


def agreement(expected: dict[str, Array], outputs: dict[str, Array], allowed: float) -> Row:
    """The largest relative difference, and whether it is allowed."""
    error, problem = largest_difference(expected, outputs)
    return {"difference": error, "agrees": error <= allowed, "problem": problem}


def _rival(case: Case, feeds: dict[str, Array], where: str, row: Row, *, eager: bool) -> dict[str, Callable[[], object]]:
    """Calls of PyTorch's version of the model; none, with the reason in the row, where it cannot be had."""
    try:
        from tools.gpu_check import rivals

        rivals.set_precision(case.precision)
        module = rivals.network(case.model)
        if module is None:
            row["rival"] = "there is no PyTorch version"
            return {}
        arrays = [feeds[name] for name in case.inputs]
        if eager:
            return rivals.eager(module, arrays, case.precision, where)
        return {"torch.compile": rivals.compiled(module, arrays, case.precision, where)}
    except Exception as error:  # a rival that fails must not hide our own result
        row["rival"] = describe(error)
        return {}


JOBS: dict[str, Callable[[Path, Case, str, float], Row]] = {
    "check": check, "overlap": overlap, "provider": provider, "compile": compile_,
}  # fmt: skip
