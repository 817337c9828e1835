"""Medians of several ways to do the same thing, measured in turn so that a change of clocks meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

BLOCK_SECONDS = 2e-3  # one sample lasts at least this long, so that its own overhead does not count


def medians(calls: Mapping[str, Callable[[], object]], synchronise: Callable[[], object], seconds: float) -> dict[str, float]:
    """Milliseconds per call of each, by the wall clock over blocks of calls that end in a synchronisation.

    Every call has been made before (compiled, captured, warmed up); three more are made here uncounted.
    """
    counts = {name: _calls_per_block(call, synchronise) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(s) < 3 for s in samples.values()):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(counts[name]):
                call()
            synchronise()
            samples[name].append((time.perf_counter() - started) / counts[name] * 1e3)
    return {name: median(s) for name, s in samples.items()}


def _calls_per_block(call: Callable[[], object], synchronise: Callable[[], object]) -> int:
    for _ in range(2):
        call()
    synchronise()
    started = time.perf_counter()
    call()
    synchronise()
    return max(1, min(1000, int(BLOCK_SECONDS / max(time.perf_counter() - started, 1e-7))))
