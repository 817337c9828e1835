"""Memory of running segments: arenas, private copies of words, and the segments that were bound last.

A context is one caller's copy of a bound segment's words, rows and external addresses. It has an arena while it is acquired:
contexts of all sizes share the arenas of their segment, so that memory does not grow with the number of shapes, and is warm.
Nothing is evaluated here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from minicc.runtime.memory import ALIGNMENT, MemoryPlan

if TYPE_CHECKING:
    from minicc.runtime.bind import Segment

Words = NDArray[np.int64]
Array = np.ndarray[Any, Any]
Sizes = Mapping[str, int]

# Idle contexts kept per bound shape, and idle arenas kept per segment.
KEPT_CONTEXTS = 8
# So many words are written faster one by one than by numpy.
FEW_WORDS = 32

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A mapping that keeps the values used last; `get` makes a missing value, once, and lets those pass who find theirs."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()  # of the mapping, held for a moment
        self._making = threading.Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        found = self.find(key)
        if found is not None:
            return found
        with self._making:
            found = self.find(key)  # another thread may have made it meanwhile
            if found is None:
                found = make()
                with self._lock:
                    self._values[key] = found
                    if len(self._values) > self._capacity:
                        self._values.popitem(last=False)
            return found

    def find(self, key: K) -> V | None:
        """The value, which is then the one used last; None where there is none."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def values(self) -> list[V]:
        with self._lock:
            return list(self._values.values())


class Arena:
    """Aligned memory for the temporaries of one run."""

    def __init__(self, size: int) -> None:
        memory = np.empty(size + ALIGNMENT, np.uint8)
        skip = -memory.ctypes.data % ALIGNMENT
        self.memory, self.size = memory[skip : skip + size], size
        self.address: int = self.memory.ctypes.data


class Arenas:
    """The idle arenas of a segment. A list's own operations are what makes it safe for several threads."""

    def __init__(self) -> None:
        self._idle: list[Arena] = []
        self.likely = 0  # the address of the arena that was taken last

    def take(self, size: int) -> Arena:
        """An arena of at least that size; where the idle one is too small, a new one with a quarter to spare."""
        try:
            arena = self._idle.pop()
        except IndexError:
            arena = Arena(size)
        if arena.size < size:
            arena = Arena(size + size // 4)
        self.likely = arena.address
        return arena

    def give(self, arena: Arena) -> None:
        """Keep an arena for the next run."""
        if len(self._idle) < KEPT_CONTEXTS:
            self._idle.append(arena)


_NONE = Arena(0)


@dataclass
class Context:
    """Memory for one run of a bound segment.

    words, rows: private copies, the rows pointing at the words; table is the address of the rows.
    cells:       the words, for quick writes of a few.
    base:        the address that the words of temporaries count from.
    arena:       where the temporaries are during a run.
    views:       arrays on the arena `viewed` of the temporaries that later parts read, by buffer.
    """

    words: Words
    rows: Words
    table: int
    cells: memoryview
    base: int = 0
    arena: Arena = _NONE
    views: tuple[tuple[int, Array], ...] = ()
    viewed: Arena | None = None


class Bound:
    """A segment for one set of sizes; `acquire` and `release` hand out contexts and keep a few idle ones.

    shapes:  of the buffers seen outside; exports: those of them in the arena, with offset, bytes, type and shape.
    outputs: buffer, shape and type of the outputs that the segment writes.
    """

    def __init__(
        self,
        segment: Segment,
        words: Words,
        rows: Words,
        steps: NDArray[np.intp],
        plan: MemoryPlan,
        contents: Mapping[int, Array],
        shapes: Mapping[int, tuple[int, ...]],
        types: Mapping[int, np.dtype[Any]],
        sizes: Sizes,
    ) -> None:
        self.segment, self.plan, self.contents, self.shapes = segment, plan, contents, shapes
        self.sizes = dict(sizes)
        self.words, self.rows, self.steps = words, rows, steps
        self.outputs = [(b, shapes[b], types[b]) for b in segment.outputs]
        self.exports = _exports(segment.exports, segment.temporaries, plan, shapes, types) if segment.exports else ()
        self.external_at = segment.external_at
        self.external_base = segment.external_base
        self.external_offset = words[segment.external_at]
        self._offsets = self.external_offset.tolist() if segment.few_words else ()
        self._idle: list[Context] = []
        self._without: dict[tuple[int, ...], NDArray[np.intp]] = {}

    def acquire(self) -> Context:
        """A context with an arena, the caller's until it is released."""
        try:
            context = self._idle.pop()
        except IndexError:
            context = self._new_context()
        arena = context.arena = self.segment.arenas.take(self.plan.arena_bytes)
        if context.base != arena.address:
            self._move(context, arena.address)
        if self.exports and context.viewed is not arena:
            context.viewed = arena
            memory = arena.memory
            context.views = tuple(
                (b, memory[at : at + size].view(dtype).reshape(shape)) for b, at, size, dtype, shape in self.exports
            )
        return context

    def release(self, context: Context) -> None:
        """Give a context back."""
        self.segment.arenas.give(context.arena)
        context.arena = _NONE
        if len(self._idle) < KEPT_CONTEXTS:
            self._idle.append(context)

    def rows_without(self, context: Context, dropped: tuple[int, ...]) -> Words:
        """The rows of a context but those of some steps."""
        kept = self._without.get(dropped)
        if kept is None:
            kept = self._without[dropped] = np.flatnonzero(~np.isin(self.steps, dropped))
        return context.rows[kept]

    def prepare(self) -> None:
        """Have a context ready for the next caller, whose arena will likely be the one that is used now."""
        if not self._idle:
            context = self._new_context()
            self._move(context, self.segment.arenas.likely)
            self._idle.append(context)

    def _move(self, context: Context, base: int) -> None:
        """Have the words of temporaries count from another address."""
        context.words[self.segment.temporary_at] += base - context.base
        context.base = base

    def _new_context(self) -> Context:
        words, rows = self.words.copy(), self.rows.copy()
        rows[:, 1] += words.ctypes.data
        return Context(words, rows, rows.ctypes.data, memoryview(words))  # type: ignore[arg-type]

    def patch(self, context: Context, addresses: Sequence[int]) -> None:
        """Write the addresses of external buffers, in the order of `Segment.externals`, into the words."""
        if self.segment.few_words:
            cells = context.cells
            for (at, buffer), offset in zip(self.segment.few_words, self._offsets):
                cells[at] = addresses[buffer] + offset
        elif len(self.external_at):
            context.words[self.external_at] = np.array(addresses, np.int64)[self.external_base] + self.external_offset


def _exports(
    exports: Sequence[int],
    temporaries: Sequence[int],
    plan: MemoryPlan,
    shapes: Mapping[int, tuple[int, ...]],
    types: Mapping[int, np.dtype[Any]],
) -> tuple[tuple[int, int, int, np.dtype[Any], tuple[int, ...]], ...]:
    """Of each exported temporary: the buffer, its offset and bytes in the arena, its type and shape."""
    offsets = dict(zip(temporaries, plan.offsets))
    sizes = {b: int(np.prod(shapes[b], dtype=np.int64)) * types[b].itemsize for b in exports}
    return tuple((b, offsets[b], sizes[b], types[b], shapes[b]) for b in exports)
