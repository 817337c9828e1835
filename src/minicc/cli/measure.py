"""`minicc bench`: other runtimes on the same inputs.

Measurements are interleaved, a block of calls of each runtime in turn, so that a change of the machine's load
meets all of them. Before each block all threads may fall asleep, because those of several runtimes spin for a while after a
run and would take the cores from the next one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from minicc.module import Module, Progress
from minicc.peers import Call, peer

_BLOCK = 5  # counted calls of a runtime in turn
_PAUSE = 0.06  # seconds; ONNX Runtime's threads spin for about 35 ms


def bench(
    module: Module,
    path: Path,
    items: Sequence[Any],
    against: Sequence[str],
    seconds: float,
    progress: Progress,
) -> list[dict[str, Any]]:
    """One row per runtime: milliseconds (median, least, 90 %), runs per second, ratio to minicc's median."""
    threads = module.stats()["threads"]
    names = [p.name for p in module.inputs]
    calls: dict[str, Call] = {"minicc": lambda: module.run_items(items)}
    for other in against:
        calls[other] = peer(other, path, dict(zip(names, items)), threads)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or not times["minicc"]:
        progress("measuring, seconds", int(time.perf_counter() - begin), int(seconds))
        for name, call in calls.items():
            if against:
                time.sleep(_PAUSE)
                call()
            for _ in range(_BLOCK):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    base = median(times["minicc"])
    return [
        {
            "runtime": name,
            "median_ms": median(t) * 1e3,
            "min_ms": min(t) * 1e3,
            "p90_ms": float(np.quantile(t, 0.9)) * 1e3,
            "per_second": 1 / median(t),
            "runs": len(t),
            "times_minicc": median(t) / base,
        }
        for name, t in times.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of `bench` for a terminal."""
    made = Table()
    for title in ("runtime", "median ms", "min ms", "90 % ms", "runs/s", "time relative to minicc"):
        made.add_column(title, justify="left" if title == "runtime" else "right")
    for r in rows:
        numbers = (
            f"{r['median_ms']:.3f}",
            f"{r['min_ms']:.3f}",
            f"{r['p90_ms']:.3f}",
            f"{r['per_second']:.1f}",
        )
        made.add_row(r["runtime"], *numbers, f"{r['times_minicc']:.2f}")
    return made
