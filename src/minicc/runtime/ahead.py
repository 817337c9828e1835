"""Binding ahead: where sizes grow evenly from call to call, the next ones are bound while the present call runs.

A decoder whose cache grows by a token at a time has new sizes at every step. Binding them is Python's work, kernels need
none of it, so a thread of the module does it beside them. A wrong guess costs that thread's time and nothing else; what fails
here is left to the call that needs it, which fails in its own words.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue

from minicc.errors import MiniccError

Key = tuple[int, ...]
Task = Callable[[], object]


class Ahead:
    """A thread that runs tasks one after the other; it begins with the first one and ends with this object."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._started = False

    def submit(self, task: Task) -> None:
        """Run a task soon. What it raises of ours is dropped."""
        with self._lock:
            if not self._started:
                self._started = True
                thread = threading.Thread(target=_serve, args=(self._tasks,), name="minicc bind", daemon=True)
                with suppress(RuntimeError):  # the system grants no more threads, or Python is shutting down
                    thread.start()
                    weakref.finalize(self, self._tasks.put, None)
        self._tasks.put(task)


def _serve(tasks: SimpleQueue[Task | None]) -> None:
    while (task := tasks.get()) is not None:
        with suppress(MiniccError):
            task()
        del task  # it holds the module


class Steps:
    """The sizes of calls in order, as tuples; `next` guesses those of the call to come."""

    def __init__(self) -> None:
        self._last: Key = ()
        self._step: Key = ()

    def next(self, key: Key) -> Key | None:
        """The next sizes where the last two steps to `key` were the same one, all sizes at least 1."""
        if key == self._last:
            return None
        step = tuple(b - a for a, b in zip(self._last, key)) if self._last else ()
        guess = tuple(a + b for a, b in zip(key, step)) if step and step == self._step else None
        self._last, self._step = key, step
        return guess if guess is not None and min(guess) > 0 else None
