"""A short calibration: the `Rates` of this machine, measured once and kept in the store with the kernels.

What estimates need are ratios, so a slow clock or a busy neighbour changes little. Loops like the kernels' inner ones are
timed, not the kernels (see `probes.py`); factors between both were found on one machine. Targets that are not this machine
keep typical rates.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np

from minicc.kernels.packing import aligned_empty
from minicc.runtime.probes import CHAINS, SIDE, compile_probes
from minicc.runtime.store import Store
from minicc.targets.cpu import available_threads, host_identity
from minicc.targets.parse import Target
from minicc.targets.rates import Rates

# Kernels take so many times as long for a byte or a value as the loops here: typical rates over what was measured beside them.
MEMORY_FACTOR, CACHE_FACTOR, VALUE_FACTOR = 1.0, 2.4, 1.95
# A measurement further from typical rates than this is of something else: another program, an emulated machine.
FURTHEST = 4.0
# Bytes that every thread reads, more than its share of the last cache; the threads that do so at most.
READ, MOST_THREADS = 32 << 20, 4
AGAIN = 2 << 20  # bytes that one thread reads again and again, more than its first caches hold
# Sizes of the other loops, each about a tenth of a millisecond; how often everything is timed, in turns.
ROUNDS, PIXEL, TILES, FORMS = 50_000, 128, 16, 50
REPEATS = 25
STEPS = 2  # to a doubling: smaller differences were noise as often as not


def rates_of(target: Target, store: Store) -> Rates:
    """This machine's rates if it is the target, measured if the store has none; else typical ones."""
    if target.name != "cpu" or target.missing_features():
        return Rates()
    key = hashlib.sha256(f"rates\0{host_identity()}\0{available_threads()}".encode()).hexdigest()
    found = _parse(store.get(key))
    if found is None:
        found = _measured()
        store.put(key, json.dumps(asdict(found)).encode())
    return found


def _parse(data: bytes | None) -> Rates | None:
    try:
        values = json.loads(data or b"")
        found = Rates(**values)
    except (ValueError, TypeError):
        return None
    return found if found.are_valid() else None


@lru_cache(maxsize=1)
def _measured() -> Rates:
    return measure_rates(available_threads())


def measure_rates(threads: int) -> Rates:
    """Measure for about a quarter of a second, as many threads (up to a few) reading memory at once as kernels will use."""
    probes, threads = compile_probes(), min(threads, MOST_THREADS)
    data, sums = _ones((threads, READ // 4)), _ones((threads, probes.lanes * CHAINS))
    row, form = PIXEL * (2 * TILES + 2), PIXEL * TILES + probes.lanes  # positions do not lie a power of two apart
    image, forms = _ones((row * SIDE,)), _ones((form * SIDE * SIDE,))

    def read(thread: int, size: int, times: int = 1) -> None:
        for _ in range(times):
            probes.read(data[thread].ctypes.data, sums[thread].ctypes.data, size // (4 * sums.shape[1]))

    with ThreadPoolExecutor(threads) as pool:
        times = _times(
            lambda: probes.multiply(sums.ctypes.data, ROUNDS),
            lambda: list(pool.map(read, range(threads), [READ] * threads)),
            lambda: read(0, AGAIN, READ // AGAIN),
            lambda: probes.transform(image.ctypes.data, forms.ctypes.data, PIXEL, row, form, TILES, FORMS),
        )
    operation = min(times[0]) / (2 * sums.shape[1] * ROUNDS)
    # The least time of all threads together would be one when the others waited.
    memory, cache = median(times[1]) / READ, min(times[2]) / READ
    value = min(times[3]) / (FORMS * TILES * SIDE * SIDE * PIXEL)
    usual = Rates()
    return Rates(
        memory=_plausible(MEMORY_FACTOR * memory / operation, usual.memory),
        cache=_plausible(CACHE_FACTOR * cache / operation, usual.cache),
        value=_plausible(VALUE_FACTOR * value / operation, usual.value),
    )


def _ones(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Memory as kernels have it, from the start of a cache line, each page touched."""
    array = aligned_empty(shape, np.dtype(np.float32))
    array.fill(1)
    return array


def _plausible(rate: float, usual: float) -> float:
    """The rate in steps that noise seldom crosses, and within what machines can have."""
    bounded = min(max(rate, usual / FURTHEST), usual * FURTHEST)
    return usual * 2 ** (round(math.log2(bounded / usual) * STEPS) / STEPS)


def _times(*loops: Callable[[], object]) -> list[list[float]]:
    """Seconds of some runs of each loop, in turns, so that other programs' work falls on all of them."""
    times: list[list[float]] = [[] for _ in loops]
    for _ in range(REPEATS):
        for loop, own in zip(loops, times):
            start = time.perf_counter()
            loop()
            own.append(time.perf_counter() - start)
    return times
