"""Binding ahead: where sizes grow evenly from call to call, the next ones are bound while the present call runs.

A decoder whose cache grows by a token at a time has new sizes at every step. Binding them is Python's work, kernels need
none of it, so a thread of the module does it beside them. A wrong guess costs that thread's time and nothing else; what fails
here is left to the call that needs it, which fails in its own words.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from queue import SimpleQueue

from minicc.errors import MiniccError

# After each task, for calls that wait for the interpreter; without a pause this thread would be the first to take it again.
PAUSE_S = 50e-6

Key = tuple[int, ...]
Task = Callable[[], object]


class Ahead:
    """A thread that runs tasks one after the other; it begins with the first one and ends with this object."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._started = False

    def submit(self, tasks: Iterable[Task]) -> None:
        """Run tasks soon. What they raise of ours is dropped."""
        with self._lock:
            if not self._started:
                self._started = True
                thread = threading.Thread(target=_serve, args=(self._tasks,), name="minicc bind", daemon=True)
                with suppress(RuntimeError):  # the system grants no more threads, or Python is shutting down
                    thread.start()
                    weakref.finalize(self, self._tasks.put, None)
        for task in tasks:
            self._tasks.put(task)


def _serve(tasks: SimpleQueue[Task | None]) -> None:
    while (task := tasks.get()) is not None:
        with suppress(MiniccError):
            task()
        del task  # it holds the module
        time.sleep(PAUSE_S)


class Steps:
    """The sizes of calls in order, as tuples; `next` guesses those of the call to come."""

    def __init__(self) -> None:
        self._last: Key = ()
        self._step: Key = ()

    def next(self, key: Key, count: int) -> list[Key]:
        """The next `count` sizes where the last two steps to `key` were the same one; only those of at least 1."""
        if key == self._last:
            return []
        step = tuple([b - a for a, b in zip(self._last, key)]) if self._last else ()
        even = bool(step) and step == self._step
        self._last, self._step = key, step
        guesses = [tuple([a + b * n for a, b in zip(key, step)]) for n in range(1, count + 1)] if even else []
        return [guess for guess in guesses if min(guess) > 0]
