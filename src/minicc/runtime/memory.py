"""Where temporaries live: lifetimes in, offsets in one arena out.

Which temporaries share one block (in-place steps) and which blocks are alive together follows from the steps alone and
is found once per program (`Layout`); offsets depend on the sizes and are found at each bind (`place`): largest block
first, into the tightest gap among the neighbours already placed, as in Pisarchyk and Lee, "Efficient Memory Management
for Deep Neural Net Inference" (2020). Nothing here allocates.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Interval:
    """The steps during which a temporary holds a value, both ends included."""

    first: int
    last: int


@dataclass(frozen=True)
class Layout:
    """What is known about the temporaries of a segment before their sizes are.

    blocks:     for each temporary, the block it lives in; those of one block share memory in place.
    intervals:  lifetime of each block.
    neighbours: for each block, the blocks alive at some step of its lifetime.
    """

    blocks: tuple[int, ...]
    intervals: tuple[Interval, ...]
    neighbours: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MemoryPlan:
    """Offsets of the temporaries, and how good the plan is, all in bytes.

    arena_bytes: size of the arena.
    lower_bound: most bytes alive at one step; no plan can be smaller.
    naive_bytes: what one allocation per temporary would take.
    """

    offsets: tuple[int, ...]
    arena_bytes: int
    lower_bound: int
    naive_bytes: int


def layout(intervals: Sequence[Interval], pairs: Sequence[tuple[int, int]] = ()) -> Layout:
    """Blocks and their neighbours.

    intervals: one per temporary. pairs: (result, operand) temporaries of equal size where the step that makes the
    result may write it over the operand; taken when the operand dies at exactly that step, refused otherwise.
    """
    block = list(range(len(intervals)))
    first = [i.first for i in intervals]
    last = [i.last for i in intervals]
    joined = [False] * len(intervals)
    for result, operand in sorted(pairs, key=lambda pair: first[pair[0]]):
        home = block[operand]
        made = intervals[result]
        if joined[result] or home == result or made.last == made.first or last[home] != made.first or first[home] >= made.first:
            continue
        block[result] = home
        last[home] = made.last
        joined[result] = True
    roots = [t for t in range(len(intervals)) if block[t] == t]
    number = {root: i for i, root in enumerate(roots)}
    spans = tuple(Interval(first[root], last[root]) for root in roots)
    return Layout(tuple(number[b] for b in block), spans, _neighbours(spans))


def _neighbours(spans: Sequence[Interval]) -> tuple[tuple[int, ...], ...]:
    """Sweep over the blocks by their first step, keeping those still alive."""
    found: list[list[int]] = [[] for _ in spans]
    alive: list[int] = []
    for block in sorted(range(len(spans)), key=lambda b: spans[b].first):
        alive = [other for other in alive if spans[other].last >= spans[block].first]
        found[block].extend(alive)
        for other in alive:
            found[other].append(block)
        alive.append(block)
    return tuple(map(tuple, found))


def place(plan: Layout, sizes: Sequence[int]) -> MemoryPlan:
    """Offsets for the given bytes per temporary; every offset is a multiple of 64."""
    bytes_of = [0] * len(plan.intervals)
    for temporary, size in enumerate(sizes):
        block = plan.blocks[temporary]
        bytes_of[block] = max(bytes_of[block], -(-size // ALIGNMENT) * ALIGNMENT)
    offsets = [-1] * len(bytes_of)
    for block in sorted(range(len(bytes_of)), key=lambda b: -bytes_of[b]):
        size = bytes_of[block]
        taken: list[tuple[int, int]] = []
        for other in plan.neighbours[block]:
            if offsets[other] >= 0 and bytes_of[other]:
                insort(taken, (offsets[other], offsets[other] + bytes_of[other]))
        offsets[block] = _tightest_gap(taken, size)
    arena = max((offsets[b] + bytes_of[b] for b in range(len(bytes_of))), default=0)
    naive = sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    return MemoryPlan(tuple(offsets[b] for b in plan.blocks), arena, _most_alive(plan, bytes_of), naive)


def _tightest_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """Start of the smallest gap that holds `size` between the taken ranges (sorted), else the end of them all."""
    best, best_size, end = -1, 0, 0
    for start, stop in taken:
        gap = start - end
        if gap >= size and (best < 0 or gap < best_size):
            best, best_size = end, gap
        end = max(end, stop)
    return best if best >= 0 else end


def _most_alive(plan: Layout, bytes_of: Sequence[int]) -> int:
    change: dict[int, int] = {}
    for interval, size in zip(plan.intervals, bytes_of):
        change[interval.first] = change.get(interval.first, 0) + size
        change[interval.last + 1] = change.get(interval.last + 1, 0) - size
    most = alive = 0
    for step in sorted(change):
        alive += change[step]
        most = max(most, alive)
    return most
