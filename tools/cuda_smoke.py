"""Runs saved CUDA modules on this machine's GPU: agreement with expected outputs, and time of a call.

    python tools/cuda_smoke.py FOLDER            run each FOLDER/NAME.minicc on the arrays of FOLDER/NAME.npz
    python tools/cuda_smoke.py --build FOLDER MODEL.onnx ...   make such a folder (needs the compiler, no GPU)

NAME.npz holds inputs by name and the CPU target's outputs as "expected:0" and so on.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

import minicc

CALLS = 20


def build(folder: Path, models: list[Path]) -> None:
    """Compile models for sm_90 and save them with inputs and the CPU's outputs."""
    import onnx  # the compiler's side only

    from benchmarks.inputs import cases

    folder.mkdir(parents=True, exist_ok=True)
    for path in models:
        feeds = cases(path.stem, onnx.load(path))[0].feeds
        expected = minicc.compile(path).run(None, feeds)
        minicc.compile(path, target="cuda:sm_90").save(folder / f"{path.stem}.minicc")
        arrays = {**feeds, **{f"expected:{i}": array for i, array in enumerate(expected)}}
        np.savez(folder / f"{path.stem}.npz", **arrays)


def run(folder: Path) -> None:
    """One line per module: largest difference over the largest value, milliseconds of a call."""
    for path in sorted(folder.glob("*.minicc")):
        arrays = dict(np.load(path.with_suffix(".npz")))
        expected = [arrays.pop(name) for name in sorted(n for n in arrays if n.startswith("expected:"))]
        started = time.perf_counter()
        try:
            module = minicc.load(path, trust=True)
            found = module.run(None, arrays)
        except Exception as error:  # the next module may work
            print(f"{path.stem:<32} {type(error).__name__}: {error}", flush=True)
            continue
        first = time.perf_counter() - started
        worst = max(
            float(np.abs(a.astype(np.float64) - b).max() / max(1e-30, np.abs(b).max())) if b.size else 0.0
            for a, b in zip(found, expected)
        )
        times = []
        for _ in range(CALLS):
            started = time.perf_counter()
            module.run(None, arrays)
            times.append(time.perf_counter() - started)
        call = sorted(times)[CALLS // 2] * 1e3
        print(f"{path.stem:<32} difference {worst:.1e}  first call {first:.2f} s  call {call:.3f} ms", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--build":
        build(Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
    else:
        run(Path(sys.argv[1]))
