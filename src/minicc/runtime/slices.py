"""Runs of some rows of a batch at a time, so that what kernels hand on stays in cache.

Where the work of a program falls apart along the first axis (lower/slices), a batch is run in turns: the segment is bound for
as many rows as the cache holds intermediate results of, and the executor goes through inputs and outputs by addresses, as in
a loop (runtime/turns). Where weights weigh more than intermediate results, reading them in every turn would cost more than it
saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from minicc.ir.types import leads_with
from minicc.lower.program import Program
from minicc.runtime.bind import Segment, address_of
from minicc.runtime.context import Array, Bound
from minicc.runtime.engine import Executes
from minicc.runtime.executor import TURNS_DONE
from minicc.runtime.outputs import Given
from minicc.runtime.turns import MOST_TURNS, Walk, describe

# Bytes of intermediate results from which a batch is run in turns, as no cache holds them, and those that a turn may have.
SPILLED_BYTES = 24 << 20
TURN_BYTES = 8 << 20
# How often weights may be as large as the intermediate results of a turn: each of these is written once and read several times.
WEIGHTS = 8


@dataclass(frozen=True)
class Sliced:
    """A segment bound for `rows` rows at a time, `turns` of them, and for the rows that are left (None where none are)."""

    program: Program
    segment: Segment
    executor: Executes
    part: Bound
    rest: Bound | None
    turns: int
    rows: int
    total: int

    @property
    def shapes(self) -> dict[int, tuple[int, ...]]:
        """Of the outputs for all rows, by buffer."""
        return {b: (self.total, *shape[1:]) for b, shape, _ in self.part.outputs}

    def parts(self, arrays: Sequence[Array]) -> list[list[Array]]:
        """The inputs of every turn, and of what is left."""
        cut = _sliced_inputs(self.program)
        starts = range(0, self.total, self.rows)
        return [[a[at : at + self.rows] if b in cut else a for b, a in zip(self.program.inputs, arrays)] for at in starts]

    def run(self, arrays: Sequence[Array], given: Given = ()) -> list[Any]:
        """The outputs for all rows. given: arrays of the caller's for them, None where there is none."""
        program, whole = self.program, self.shapes
        types = {b: dtype for b, _, dtype in self.part.outputs}
        wanted = dict(zip(program.outputs, given))
        outputs = {b: np.empty(whole[b], types[b]) if (a := wanted.get(b)) is None else a for b in program.outputs}
        sliced = _sliced_inputs(program)
        held = dict(zip(program.inputs, arrays)) | outputs
        steps = {b: a.nbytes // self.total if b in outputs or b in sliced else 0 for b, a in held.items()}
        starts = {b: address_of(a) for b, a in held.items()}
        self._run_turns({b: Walk(starts[b], (step * self.rows,) * 3) for b, step in steps.items()})
        if self.rest is not None:
            done = self.turns * self.rows
            context = self.rest.acquire()
            try:
                self.rest.patch(context, [starts[b] + done * steps[b] for b in self.segment.externals])
                self.executor.run_at(context.table, len(context.rows))
            finally:
                self.rest.release(context)
        return [outputs[b] for b in program.outputs]

    def _run_turns(self, walks: Mapping[int, Walk]) -> None:
        context = self.part.acquire()
        try:
            loop = describe(self.segment, self.part, context, walks, np.zeros(1, np.int64), None)
            while (done := int(loop.words[TURNS_DONE])) < self.turns:
                self.executor.turns_at(loop.words.ctypes.data, min(MOST_TURNS, self.turns - done))
        finally:
            self.part.release(context)


def sliced(program: Program, segment: Segment, executor: Executes, sizes: Mapping[str, int]) -> Sliced | None:
    """The program for these sizes, in turns; None where it does not fall apart or turns would not pay."""
    total = sizes.get(program.sliced, 0) if program.sliced else 0
    if total < 2 or program.sliced not in segment.symbols:
        return None
    one = segment.bound({**sizes, program.sliced: 1})
    arena = one.plan.arena_bytes
    most = max((total * prod(shape) * dtype.itemsize for _, shape, dtype in one.outputs), default=0)
    if arena * total < SPILLED_BYTES or most > segment.machine.max_bytes:
        return None
    rows = rows_of(total, arena, TURN_BYTES)
    turns, left = divmod(total, rows)
    if turns < 2 or segment.constant_bytes > WEIGHTS * rows * one.plan.naive_bytes:
        return None
    part = segment.bound({**sizes, program.sliced: rows}) if rows > 1 else one
    rest = segment.bound({**sizes, program.sliced: left}) if left else None
    return Sliced(program, segment, executor, part, rest, turns, rows, total)


def rows_of(total: int, each: int, most: int) -> int:
    """Rows of a turn, at least one and otherwise of at most `most` bytes where a row takes `each`; as even as can be."""
    turns = -(-total // max(1, most // max(1, each)))
    return -(-total // turns)


def _sliced_inputs(program: Program) -> set[int]:
    return {b for b, t in zip(program.inputs, program.input_types) if leads_with(t, program.sliced)}
