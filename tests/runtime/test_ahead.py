"""Binding ahead: guesses only for even steps, results as without, threads that end; arenas that shapes share."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.errors import ShapeError
from minicc.runtime.ahead import Ahead, Steps
from minicc.runtime.bind import STEPS_AHEAD
from tests.runtime.programs import chain, module


def guesses(sizes: list[int], count: int) -> list[list[tuple[int, int]]]:
    """What `Steps` must say, from the whole history."""
    seen: list[int] = []
    said: list[list[tuple[int, int]]] = []
    for size in sizes:
        repeated = seen[-1:] == [size]
        seen += [] if repeated else [size]
        even = len(seen) > 2 and seen[-1] - seen[-2] == seen[-2] - seen[-3] and not repeated
        later = range(1, count + 1) if even else ()
        said.append([(at, 7) for n in later if (at := seen[-1] + n * (seen[-1] - seen[-2])) > 0])
    return said


@given(st.lists(st.integers(1, 6), max_size=12), st.integers(1, 4))
def test_a_guess_goes_on_with_a_step_that_was_made_twice(sizes: list[int], count: int) -> None:
    steps = Steps()
    assert [steps.next((size, 7), count) for size in sizes] == guesses(sizes, count)


def test_the_next_sizes_are_bound_while_a_call_runs() -> None:
    m = module(chain(3))
    segment = m.runner.segments[0]
    for size in (3, 4, 5):
        x = np.full((size, 4), size, np.float32)
        np.testing.assert_array_equal(m(x, x), 8 * 2 * x)
    end = time.monotonic() + 5
    while len(segment.recent.values()) < 3 + STEPS_AHEAD and time.monotonic() < end:
        time.sleep(0.001)
    assert [bound.sizes["n"] for bound in segment.recent.values()] == list(range(3, 6 + STEPS_AHEAD))
    assert m.stats()["binds"] == 3 + STEPS_AHEAD
    x = np.ones((6, 4), np.float32)
    np.testing.assert_array_equal(m(x, x), 16 * x)
    assert m.stats()["binds"] == 3 + STEPS_AHEAD


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30))
def test_results_do_not_depend_on_guesses(sizes: list[int]) -> None:
    m = module(chain(4), threads=1)
    for number, size in enumerate(sizes):
        x = np.full((size, 4), number, np.float32)
        np.testing.assert_array_equal(m(x, x), 32 * x)


def test_tasks_run_in_order_and_our_errors_are_dropped() -> None:
    ahead, done, finished = Ahead(), [], threading.Event()

    def fail() -> None:
        done.append("failed")
        raise ShapeError("too large")

    ahead.submit([lambda: done.append(1), fail])
    ahead.submit([lambda: done.append(2), finished.set])
    assert finished.wait(5)
    assert done == [1, "failed", 2]


def test_the_thread_ends_with_its_module() -> None:
    others = set(threading.enumerate())
    m = module(chain(2))
    for size in (2, 3, 4, 5):
        m(np.ones((size, 4), np.float32), np.ones((size, 4), np.float32))
    machine = weakref.ref(m.machine)
    (own,) = [thread for thread in set(threading.enumerate()) - others if thread.name == "minicc bind"]
    del m
    end = time.monotonic() + 5
    while time.monotonic() < end and (machine() is not None or own.is_alive()):
        gc.collect()
        time.sleep(0.01)
    assert machine() is None and not own.is_alive()


@pytest.mark.parametrize("order", [range(1, 60), range(60, 1, -1), [1, 50, 2, 49, 3] * 8])
def test_shapes_share_one_arena(order: list[int]) -> None:
    m = module(chain(5))
    for size in order:
        x = np.ones((size, 4), np.float32)
        np.testing.assert_array_equal(m(x, x), 64 * x)
    idle = m.runner.segments[0].arenas._idle
    assert len(idle) == 1
    assert idle[0].size >= m.runner.segments[0].recent.values()[-1].plan.arena_bytes
