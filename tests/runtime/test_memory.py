"""The memory planner: blocks alive together never overlap."""

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
    plan = place(layout(spans), sizes)
    assert len(plan.offsets) == len(spans)
    # Simulated: every byte of the arena says who wrote it last.
    owner = np.full(max(plan.arena_bytes, 1), -1)
    for step in range(40):
        written = [i for i, span in enumerate(spans) if span.first == step]
        for i in written:
            owner[plan.offsets[i] : plan.offsets[i] + sizes[i]] = i
        for i, (span, size) in enumerate(zip(spans, sizes)):
            if span.first <= step <= span.last:  # all that is alive, operands and results of this step alike
                assert (owner[plan.offsets[i] : plan.offsets[i] + size] == i).all(), (
                    f"buffer {i}, step {step}"
                )
    assert all(offset % ALIGNMENT == 0 for offset in plan.offsets)
    assert plan.lower_bound <= plan.arena_bytes <= plan.naive_bytes


def test_chain_needs_two_blocks_and_little_time() -> None:
    spans = [Interval(i, i + 1) for i in range(600)]
    start = time.perf_counter()
    plan = place(layout(spans), [4096] * 600)
    assert plan.arena_bytes == 2 * 4096
    assert time.perf_counter() - start < 0.1
