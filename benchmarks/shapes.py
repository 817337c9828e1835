"""What a new shape costs: binding, and a decoding loop whose cache grows at every step.

    python -m benchmarks.shapes MODEL.onnx --dim seq=100,101,102 ...

A block of calls runs the model at one size after the other; then the block is repeated, with all its sizes bound. What a call
spends outside kernels at new sizes and at known ones differs by what new sizes cost. Nothing may compile and no pass may
run. Inputs are those of `benchmarks.inputs`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

import minicc
from benchmarks.inputs import case_at

BLOCK = 12  # fewer than the shapes that a module keeps bound


def measure(path: Path, sizes: dict[str, list[int]], threads: int) -> dict[str, float]:
    """Medians of what calls spend outside kernels at new sizes and again at the same ones, in us, and of whole calls in ms."""
    model = onnx.load(str(path))
    count = max(map(len, sizes.values()))
    steps = [{name: values[min(i, len(values) - 1)] for name, values in sizes.items()} for i in range(count)]
    feeds = [case_at(path.stem, model, step).feeds for step in steps]
    del model
    module = minicc.compile(path, threads=threads)
    module.run(None, feeds[0])  # threads start, memory is taken
    before, kernels = module.stats(), 0.0
    native = module.runner.executor.run_at

    def timed(address: int, rows: int) -> None:
        nonlocal kernels
        start = time.perf_counter()
        native(address, rows)
        kernels += time.perf_counter() - start

    module.runner.executor.run_at = timed  # type: ignore[method-assign]

    def call(given: dict[str, np.ndarray]) -> tuple[float, float]:
        nonlocal kernels
        kernels, start = 0.0, time.perf_counter()
        module.run(None, given)
        whole = time.perf_counter() - start
        return whole - kernels, whole

    new: list[tuple[float, float]] = []
    again: list[tuple[float, float]] = []
    for at in range(1, len(feeds), BLOCK):
        block = feeds[at : at + BLOCK]
        new += [call(given) for given in block]
        again += [call(given) for given in block]
    after = module.stats()
    for fact in ("compiles", "pass_runs"):
        if after[fact] != before[fact]:
            raise SystemExit(f"{path.name}: a new shape made {fact} go from {before[fact]} to {after[fact]}")
    outside = [median(o for o, _ in part) * 1e6 for part in (new, again)]
    return {"new": outside[0], "again": outside[1], "call": median(w for _, w in again) * 1e3, "sizes": len(new)}


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.shapes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dim", action="append", required=True, help="sizes in order, like seq=16,17,18 or past=0:64")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    found = measure(options.model, dict(map(_sizes, options.dim)), options.threads)
    table = Table("sizes", "outside kernels at new sizes, us", "at known sizes, us", "whole call, ms")
    table.add_row(f"{found['sizes']:.0f}", *(f"{found[key]:.0f}" for key in ("new", "again")), f"{found['call']:.2f}")
    Console().print(table)


def _sizes(text: str) -> tuple[str, list[int]]:
    name, _, values = text.partition("=")
    begin, colon, end = values.partition(":")
    return name, list(range(int(begin), int(end))) if colon else [int(v) for v in values.split(",")]


if __name__ == "__main__":
    main()
