"""The memory planner: blocks alive together never overlap, and in-place sharing is taken only when it is safe."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minicc.runtime.memory import ALIGNMENT, Interval, layout, place

intervals = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 8)).map(lambda p: Interval(p[0], p[0] + p[1])), max_size=25
)


@given(intervals, st.data())
def test_live_buffers_never_overlap(spans: list[Interval], data: st.DataObject) -> None:
    sizes = [data.draw(st.sampled_from([0, 1, 64, 100, 4096, 5000])) for _ in spans]
    numbers = st.integers(0, max(len(spans) - 1, 0))
    pairs = data.draw(st.lists(st.tuples(numbers, numbers), max_size=10)) if spans else []
    pairs = [(a, b) for a, b in pairs if sizes[a] == sizes[b] and a != b]
    plan = place(layout(spans, pairs), sizes)
    assert len(plan.offsets) == len(spans)
    # Simulated: every byte of the arena says who wrote it last; a value must survive from its first to its last step.
    owner = np.full(max(plan.arena_bytes, 1), -1)
    for step in range(40):
        for i, (span, size) in enumerate(zip(spans, sizes)):
            if span.first < step <= span.last:
                where = owner[plan.offsets[i] : plan.offsets[i] + size]
                assert (where == i).all(), f"buffer {i} was overwritten before step {step}"
        written = [i for i, span in enumerate(spans) if span.first == step]
        for i in written:
            owner[plan.offsets[i] : plan.offsets[i] + sizes[i]] = i
        for i in written:  # results of one step do not overlap each other
            assert (owner[plan.offsets[i] : plan.offsets[i] + sizes[i]] == i).all()
        for i in written:  # nor operands that the step reads, unless named as a pair
            for j, span in enumerate(spans):
                if j != i and span.first < step == span.last and (i, j) not in pairs and sizes[i] and sizes[j]:
                    apart = plan.offsets[i] + sizes[i] <= plan.offsets[j] or plan.offsets[j] + sizes[j] <= plan.offsets[i]
                    assert apart or any(p[0] == i for p in pairs)
    assert all(offset % ALIGNMENT == 0 for offset in plan.offsets)
    assert plan.lower_bound <= plan.arena_bytes <= plan.naive_bytes


def test_in_place_chain_is_one_block() -> None:
    spans = [Interval(0, 1), Interval(1, 2), Interval(2, 3)]
    plan = place(layout(spans, [(2, 1), (1, 0)]), [1000, 1000, 1000])
    assert plan.offsets == (0, 0, 0)
    assert plan.arena_bytes == plan.lower_bound == 1024


def test_in_place_refused_while_operand_is_needed() -> None:
    plan = place(layout([Interval(0, 2), Interval(1, 3)], [(1, 0)]), [64, 64])
    assert len(set(plan.offsets)) == 2


def test_two_results_do_not_take_one_operand() -> None:
    spans = [Interval(0, 1), Interval(1, 3), Interval(1, 2)]
    plan = place(layout(spans, [(1, 0), (2, 0)]), [64, 64, 64])
    assert plan.offsets[1] != plan.offsets[2]


def test_chain_needs_two_blocks_and_little_time() -> None:
    spans = [Interval(i, i + 1) for i in range(600)]
    start = time.perf_counter()
    plan = place(layout(spans), [4096] * 600)
    assert plan.arena_bytes == 2 * 4096
    assert time.perf_counter() - start < 0.1
