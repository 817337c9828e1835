"""The Python face of the native executor: pools of threads that run tables of kernel calls.

The work itself is `kernels/cpu/executor.py`, compiled to objects like any kernel, so a warm start needs no
Numba. Pools are shared by all executors of a process with the same number of threads; their threads start
with the first shared work, sleep when idle, end at exit, and are left behind by a fork. Where the system has
no futex, every table runs on the calling thread. Nothing here knows what a kernel does or who owns the
memory it works on.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from minicc.runtime.objects import LoadedObjects, load_objects
from minicc.targets.cpu import host_target

if TYPE_CHECKING:
    from minicc.codegen.build import ObjectStore

ROW_WORDS = 6
MAX_ROWS = 1 << 20
GUARD = -1  # as the number of chunks

# Sharing a row out costs less than a microsecond (0.2 for two chunks, 0.4 for twelve), so each chunk should be worth five.
MIN_CHUNK_NS = 5_000.0
# Those of the stages of one kernel follow each other so closely that no thread goes to sleep in between.
MIN_STAGE_NS = 1_500.0
CHUNKS_PER_THREAD = 6

# Of the description of a loop and of the native state, as laid out in kernels/cpu/executor.py (a test compares them).
TABLE, TABLE_ROWS, MOVES, MOVES_COUNT, CONDITION, TURNS_DONE, TURN_WORDS = range(7)
MOVE_WORDS = 4
TICKETS = 144
TICKET_WORDS = 16
WORKERS = 113

_HAS_POOL = sys.platform == "linux"
_ALONE = ("run_alone", "turns_alone")
_WORDS = ("run", "turns", "worker", "stop", *_ALONE) if _HAS_POOL else _ALONE
_Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def executor_sources() -> dict[str, str]:
    """The kernels the executor itself consists of, for `build_objects`: symbol -> module text."""
    text = "from minicc.kernels.cpu.executor import {} as kernel\n"
    return {f"minicc_executor_{word}": text.format(word) for word in _WORDS}


def chunking(n: int, cost_ns: float, threads: int, least_ns: float = MIN_CHUNK_NS) -> tuple[int, int]:
    """How to cut a row of n units: (units per chunk, number of chunks), with chunks = ceil(n / units).

    cost_ns: estimated time of the whole row on one thread. Rows below twice `least_ns` stay whole; long ones
    become several chunks per thread, so that a thread which is late or lost its core delays the row by one chunk only.
    """
    pieces = min(n, threads * CHUNKS_PER_THREAD, int(cost_ns / least_ns))
    if threads == 1 or pieces < 2:
        return max(n, 1), 1
    if pieces > threads:
        pieces -= pieces % threads  # equal shares
    chunk = -(-n // pieces)
    return chunk, -(-n // chunk)


class Executor:
    """Runs tables of kernel calls on `threads` threads, the caller's included.

    store: where its own objects are kept. objects: these ready-made (from an artifact), by the symbols of `executor_sources`.
    """

    def __init__(
        self, threads: int, store: ObjectStore | None, objects: Mapping[str, bytes] | None = None
    ) -> None:
        self.threads = threads if _HAS_POOL else 1
        self._pool = _shared_pool(self.threads, store, objects)

    def run(self, rows: NDArray[np.int64]) -> None:
        """Run a table of shape (k, 6): function, argument block, n, chunk, ceil(n / chunk), first unit; or guards.

        Blocks until every row is done, without the GIL. Any number of threads may call at once: one of them
        gets the pool, the others run alone. The caller keeps all memory the rows point to alive. ValueError
        when the table is not C-contiguous int64 of that shape.
        """
        if (
            rows.dtype != np.int64
            or rows.ndim != 2
            or rows.shape[1] != ROW_WORDS
            or not rows.flags.c_contiguous
        ):
            raise ValueError(f"not a table of rows: {rows.dtype} of shape {rows.shape}")
        self.run_at(rows.ctypes.data, len(rows))

    def run_at(self, address: int, count: int) -> None:
        """As `run`, for a table that was checked before, given by its address and number of rows."""
        while count > MAX_ROWS:
            self._pool.run(address, MAX_ROWS)
            address, count = address + 8 * ROW_WORDS * MAX_ROWS, count - MAX_ROWS
        self._pool.run(address, count)

    def turns_at(self, address: int, most: int) -> None:
        """Up to `most` turns of a loop, given by the address of its TURN_WORDS words; its table has at most MAX_ROWS rows."""
        self._pool.turns(address, most)


class _Pool:
    """The native state and the threads that serve it."""

    def __init__(self, threads: int, code: LoadedObjects) -> None:
        self._code = code
        self._size = threads
        if threads > 1:
            self._run = _Entry(code.address("minicc_executor_run"))
            self._turns = _Entry(code.address("minicc_executor_turns"))
            self._worker = _Entry(code.address("minicc_executor_worker"))
            self._stop = _Entry(code.address("minicc_executor_stop"))
        else:
            self._run = _Entry(code.address("minicc_executor_run_alone"))
            self._turns = _Entry(code.address("minicc_executor_turns_alone"))
        self.forget_threads()

    def forget_threads(self) -> None:
        """A new state without threads. After a fork the old ones exist in the parent only."""
        words = TICKETS + TICKET_WORDS * self._size
        memory = np.zeros(words + 16, np.int64)
        skip = (-memory.ctypes.data // 8) % 16  # 128-byte aligned
        self._memory, self._state = memory, memory[skip : skip + words]
        self._address = self._state.ctypes.data
        self._threads: list[threading.Thread] = []
        self._started = self._size == 1
        self._lock = threading.Lock()

    def run(self, rows: int, count: int) -> None:
        if not self._started:
            self._start()
        self._run(self._address, rows, count)

    def turns(self, words: int, most: int) -> None:
        if not self._started:
            self._start()
        self._turns(self._address, words, most)

    def _start(self) -> None:
        with self._lock:
            if self._started:
                return
            for number in range(1, self._size):
                arguments = (self._address, number, self._size)
                thread = threading.Thread(target=self._worker, args=arguments, name="minicc", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the system grants no more threads, or Python is shutting down
                    break
                self._threads.append(thread)
            self._state[WORKERS] = len(self._threads)
            self._started = True

    def stop(self) -> None:
        """End the threads. Later runs are alone."""
        with self._lock:
            if self._threads:
                self._stop(self._address, 0, len(self._threads))
            self._started = True
        for thread in self._threads:
            thread.join(timeout=1.0)


_pools: dict[int, _Pool] = {}
_pools_lock = threading.Lock()


def _shared_pool(threads: int, store: ObjectStore | None, objects: Mapping[str, bytes] | None) -> _Pool:
    with _pools_lock:
        if threads not in _pools:
            others = list(_pools.values())
            code = others[0]._code if others else _load(store, objects)
            _pools[threads] = _Pool(threads, code)
        return _pools[threads]


def _load(store: ObjectStore | None, objects: Mapping[str, bytes] | None) -> LoadedObjects:
    sources = executor_sources()
    if objects is None or any(symbol not in objects for symbol in sources):
        from minicc.codegen.build import build_objects

        objects = build_objects(sources, host_target(), store)
    return load_objects({symbol: objects[symbol] for symbol in sources})


def _stop_pools() -> None:
    for pool in list(_pools.values()):
        pool.stop()


def _after_fork_in_child() -> None:
    global _pools_lock
    _pools_lock = threading.Lock()
    for pool in _pools.values():
        pool.forget_threads()


atexit.register(_stop_pools)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
