"""Where temporaries live: lifetimes in, offsets in one arena out.

Which temporaries are alive together follows from the steps alone and is found once per program (`Layout`);
offsets depend on the sizes and are found at each bind (`place`): largest first, into the tightest gap among
the neighbours already placed, as in Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
Inference" (2020). Writing a result over an operand is lowering's decision. Nothing here allocates.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 64


class Interval(NamedTuple):
    """The steps during which a temporary holds a value, both ends included."""

    first: int
    last: int


class Layout(NamedTuple):
    """The temporaries of a segment before their sizes are known.

    neighbours: for each temporary, those alive at some step of its lifetime.
    """

    intervals: tuple[Interval, ...]
    neighbours: tuple[tuple[int, ...], ...]


class MemoryPlan(NamedTuple):
    """Offsets of the temporaries, and how good the plan is, all in bytes.

    arena_bytes: size of the arena.
    lower_bound: most bytes alive at one step; no plan can be smaller.
    naive_bytes: what one allocation per temporary would take.
    """

    offsets: tuple[int, ...]
    arena_bytes: int
    lower_bound: int
    naive_bytes: int


def layout(intervals: Sequence[Interval]) -> Layout:
    """Who is alive with whom: a sweep over the temporaries by their first step, keeping those still alive."""
    found: list[list[int]] = [[] for _ in intervals]
    alive: list[int] = []
    for one in sorted(range(len(intervals)), key=lambda i: intervals[i].first):
        alive = [other for other in alive if intervals[other].last >= intervals[one].first]
        found[one].extend(alive)
        for other in alive:
            found[other].append(one)
        alive.append(one)
    return Layout(tuple(intervals), tuple(map(tuple, found)))


def place(plan: Layout, sizes: Sequence[int]) -> MemoryPlan:
    """Offsets for the given bytes per temporary; every offset is a multiple of 64."""
    rounded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    offsets = [-1] * len(rounded)
    for one in sorted(range(len(rounded)), key=lambda i: -rounded[i]):
        taken: list[tuple[int, int]] = []
        for other in plan.neighbours[one]:
            if offsets[other] >= 0 and rounded[other]:
                insort(taken, (offsets[other], offsets[other] + rounded[other]))
        offsets[one] = _tightest_gap(taken, rounded[one])
    arena = max((offset + size for offset, size in zip(offsets, rounded)), default=0)
    return MemoryPlan(tuple(offsets), arena, _most_alive(plan, rounded), sum(rounded))


def _tightest_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Start of the smallest gap that holds `size` between the taken ranges (sorted), else where they end."""
    best, best_size, end = -1, 0, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best < 0 or gap < best_size):
            best, best_size = end, gap
        end = max(end, stop)
    return best if best >= 0 else end


def _most_alive(plan: Layout, sizes: Sequence[int]) -> int:
    change: dict[int, int] = {}
    for interval, size in zip(plan.intervals, sizes):
        change[interval.first] = change.get(interval.first, 0) + size
        change[interval.last + 1] = change.get(interval.last + 1, 0) - size
    most = alive = 0
    for step in sorted(change):
        alive += change[step]
        most = max(most, alive)
    return most
