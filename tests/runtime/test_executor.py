"""The executor: every unit of every row runs exactly once and in row order, whoever runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.codegen.objects import compile_object
from minicc.kernels.cpu import executor as native
from minicc.runtime import executor as face
from minicc.runtime.executor import Executor, chunking
from minicc.runtime.objects import LoadedObjects, load_objects
from minicc.targets.cpu import host_target

# y[i] = 2 * y[i] + x[i]: tells apart any two orders of rows, and a unit that ran twice or never.
STEP = """
from minicc.kernels.cpu.intrinsics import arg, ld, ld_out, ptr_i64, st
def kernel(args, begin, end):
    x = ptr_i64(arg(args, 0)); y = ptr_i64(arg(args, 1))
    for i in range(begin, end):
        st(y, i, 2 * ld_out(y, i) + ld(x, i))
"""


@pytest.fixture(scope="module")
def step() -> LoadedObjects:
    return load_objects({"step": compile_object(STEP, "step", host_target())})


@pytest.fixture(scope="module", params=[1, 2, 5])
def executor(request: pytest.FixtureRequest) -> Executor:
    return Executor(request.param, None)


class Work:
    """A random table of rows on own memory, and what it must compute."""

    def __init__(self, rng: np.random.Generator, function: int, rows: int, size: int) -> None:
        self.x = rng.integers(0, 100, (rows, size))
        self.y = np.zeros(size, np.int64)
        self.args = np.array([[self.x[i].ctypes.data, self.y.ctypes.data] for i in range(rows)], np.int64)
        self.rows = np.zeros((rows, face.ROW_WORDS), np.int64)
        self.expected = np.zeros(size, np.int64)
        for i in range(rows):
            first = int(rng.integers(0, size + 1))
            n = int(rng.integers(0, size + 1 - first))
            chunk = int(rng.integers(1, size + 1))
            self.rows[i] = function, self.args[i].ctypes.data, n, chunk, -(-n // chunk), first
            part = slice(first, first + n)
            self.expected[part] = 2 * self.expected[part] + self.x[i, part]


def test_state_layout() -> None:
    assert (face.TICKETS, face.TICKET_WORDS, face.WORKERS) == (native.TICKETS, native.TICKET_WORDS, native.WORKERS)
    for name in ("TABLE", "TABLE_ROWS", "MOVES", "MOVES_COUNT", "CONDITION", "TURNS_DONE", "TURN_WORDS"):
        assert getattr(face, name) == getattr(native, name)
    assert 8 * face.MOVE_WORDS == native.MOVE_BYTES
    assert face.ROW_WORDS == native.ROW_WORDS
    assert face.MAX_ROWS <= native.MAX_ROWS


@pytest.mark.parametrize("size", [1, 7, 300])
def test_random_tables(executor: Executor, step: LoadedObjects, size: int) -> None:
    rng = np.random.default_rng(size)
    for _ in range(100):
        work = Work(rng, step.address("step"), rows=30, size=size)
        executor.run(work.rows)
        np.testing.assert_array_equal(work.y, work.expected)


def test_concurrent_callers(executor: Executor, step: LoadedObjects) -> None:
    wrong = []

    def caller(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            work = Work(rng, step.address("step"), rows=20, size=64)
            for _ in range(5):
                work.y[:] = 0
                executor.run(work.rows)
                if not np.array_equal(work.y, work.expected):
                    wrong.append(seed)

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_workers_take_part(step: LoadedObjects) -> None:
    """A long row ends on a thread other than the caller's at least once; sleeping workers are woken."""
    executor = Executor(2, None)
    size = 1 << 21
    x, y = np.ones(size, np.int64), np.zeros(size, np.int64)
    args = np.array([x.ctypes.data, y.ctypes.data], np.int64)
    rows = np.array([[step.address("step"), args.ctypes.data, size, size // 16, 16, 0]], np.int64)
    saved = []
    for _ in range(20):
        time.sleep(0.005)  # lets the worker fall asleep
        before_thread, before_process = time.thread_time_ns(), time.process_time_ns()
        executor.run(rows)
        mine, all_threads = time.thread_time_ns() - before_thread, time.process_time_ns() - before_process
        saved.append(all_threads - mine)
    assert max(saved) > 100_000  # ns
    assert (y == 2**20 - 1).all()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system tells no affinity")
def test_workers_stay_off_the_callers_core(step: LoadedObjects) -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("there is one core")
    executor = Executor(2, None)
    size = 1 << 20
    x, y = np.ones(size, np.int64), np.zeros(size, np.int64)
    args = np.array([x.ctypes.data, y.ctypes.data], np.int64)
    row = np.array([[step.address("step"), args.ctypes.data, size, size // 16, 16, 0]], np.int64)
    time.sleep(0.005)  # lets the worker fall asleep: it is moved when it is woken
    executor.run(np.tile(row, (20, 1)))
    (worker,) = executor._pool._threads
    assert worker.native_id is not None
    kept = os.sched_getaffinity(worker.native_id)
    assert kept < allowed and len(kept) == len(allowed) - 1
    assert os.sched_getaffinity(0) == allowed


def test_idle_threads_sleep(executor: Executor, step: LoadedObjects) -> None:
    executor.run(Work(np.random.default_rng(0), step.address("step"), rows=10, size=64).rows)
    time.sleep(0.02)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.06


def test_long_table_and_empty_table(executor: Executor, step: LoadedObjects) -> None:
    x, y = np.ones(2, np.int64), np.zeros(2, np.int64)
    args = np.array([x.ctypes.data, y.ctypes.data], np.int64)
    rows = np.tile(
        np.array([step.address("step"), args.ctypes.data, 2, 2, 1, 0], np.int64), (face.MAX_ROWS + 62, 1)
    )
    executor.run(rows)
    assert (y == -1).all()  # all 64 bits shifted in
    executor.run(rows[:0])


@pytest.mark.parametrize(
    "rows",
    [np.zeros((2, 5), np.int64), np.zeros(6, np.int64), np.zeros((2, 6)), np.zeros((4, 6), np.int64)[::2]],
)
def test_malformed_tables(executor: Executor, rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="table"):
        executor.run(rows)


@given(st.integers(1, 10**6), st.floats(0, 1e9), st.integers(1, 64))
@settings(max_examples=300, deadline=None)
def test_chunking(n: int, cost_ns: float, threads: int) -> None:
    chunk, chunks = chunking(n, cost_ns, threads)
    assert chunk >= 1 and chunks == -(-n // chunk)
    assert chunks <= threads * face.CHUNKS_PER_THREAD
    if cost_ns < 2 * face.MIN_CHUNK_NS or threads == 1:
        assert chunks == 1
    elif cost_ns > 1e7 and n >= 1000:
        assert chunks >= threads


def run_program(text: str) -> str:
    """Run a program that has `executor` and `check()` in a fresh process; gives what it prints."""
    prelude = f"""
import os, sys, threading, numpy as np
from minicc.runtime.executor import Executor
from minicc.runtime.objects import load_objects
from minicc.codegen.objects import compile_object
from minicc.targets.cpu import host_target
code = load_objects({{"step": compile_object('''{STEP}''', "step", host_target())}})
executor = Executor(3, None)
x, y = np.ones(1000, np.int64), np.zeros(1000, np.int64)
args = np.array([x.ctypes.data, y.ctypes.data], np.int64)
rows = np.array([[code.address("step"), args.ctypes.data, 1000, 10, 100, 0]] * 20, np.int64)
def check():
    y[:] = 0
    executor.run(rows)
    assert (y == 2**20 - 1).all()
"""
    done = subprocess.run(
        [sys.executable, "-c", prelude + text], capture_output=True, text=True, timeout=60, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_fork_and_exit() -> None:
    """Parent and child both keep computing after a fork, and both end by themselves."""
    text = """
for _ in range(50): check()
child = os.fork()
for _ in range(50): check()
if child == 0:
    assert threading.active_count() == 3
    print("child", flush=True)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
check()
print("parent", flush=True)
"""
    assert run_program(text).split() == ["child", "parent"]


def test_exit_while_another_thread_runs() -> None:
    text = """
def forever():
    while True: executor.run(rows)
threading.Thread(target=forever, daemon=True).start()
for _ in range(20): rows.sum()
print("done", flush=True)
"""
    assert run_program(text) == "done\n"


def looks(monkeypatch: pytest.MonkeyPatch, region_ms: float, switches: Sequence[int]) -> bool:
    """Whether the caller runs alone after looks at the preemption counter, each after as many shared rows of that time."""
    state, now, count = np.zeros(256, np.int64), [10**12], [0]
    for name, value in (("clock", lambda: now[0]), ("involuntary_switches", lambda: count[0])):
        monkeypatch.setattr(native, name, value)
    monkeypatch.setattr(native, "keep_apart", lambda *_: None)
    monkeypatch.setattr(native, "withdraw", native.withdraw.py_func)
    monkeypatch.setattr(native, "atomic_load", lambda args, at: args[at])
    for more in switches:
        count[0] += more
        for _ in range(native.LOOK_EVERY):
            now[0] += int(region_ms * 1e6)
            native.watch_preemption.py_func(state, int(region_ms * 1e6))
    return bool(state[native.ALONE_UNTIL] > now[0])


@pytest.mark.parametrize(
    "region_ms, switches, alone",
    [
        (0.5, [2, 2], True),  # a core shared with another process
        (0.5, [2, 0, 2], False),  # not twice in a row
        (0.05, [2, 2, 2], False),  # the system's own work
        (20, [3, 5, 2, 4], False),  # what 160 ms of any machine bring
        (20, [40, 40], True),
    ],
)
def test_the_caller_runs_alone_when_others_keep_taking_its_core(
    monkeypatch: pytest.MonkeyPatch, region_ms: float, switches: list[int], alone: bool
) -> None:
    assert looks(monkeypatch, region_ms, switches) is alone


def test_the_caller_runs_alone_for_longer_where_losses_follow_each_other() -> None:
    state, ms = np.zeros(256, np.int64), 10**6
    now, alone = 10**12, []
    for gap in [0, 5, 5, 5, 5, 5, 200, 5]:  # ms with the workers before each loss of 2 ms
        now = max(now, state[native.ALONE_UNTIL]) + gap * ms
        native.withdraw.py_func(state, now, 2 * ms)
        alone.append(int(state[native.ALONE_UNTIL] - now) // ms)
    assert alone == [2, 4, 8, 16, 20, 20, 2, 4]
