"""All turns of a Loop or Scan in one native call.

A body that is one segment runs the same table of rows in every turn; only addresses move: slices of scanned arrays go on
by one, carried values are read where the turn before wrote them. So the table is bound once, and the executor adds to
the arguments between the turns (see `turns` in kernels/cpu/executor.py). Carried values live in two places in turn, or
in the collected output where they are that as well. Control runs what does not fit here turn by turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minicc.ir.types import TensorType
from minicc.runtime.bind import Segment, address_of
from minicc.runtime.context import Array, Bound, Context, Words
from minicc.runtime.engine import Item, Runner
from minicc.runtime.executor import (
    CONDITION,
    MAX_ROWS,
    MOVE_WORDS,
    MOVES,
    MOVES_COUNT,
    TABLE,
    TABLE_ROWS,
    TURN_WORDS,
    TURNS_DONE,
)

# Turns per native call: in between Python can be interrupted.
MOST_TURNS = 1024


@dataclass(frozen=True)
class Walk:
    """Where a buffer of the body lies: in the first turn, and how far it moves before the next turns (the last two alternate)."""

    first: int
    steps: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Result:
    """What the turns gave.

    states: carried values after the last turn; collected: outputs along a new first axis, of the turns that were run.
    """

    turns: int
    going: bool
    states: list[Item]
    collected: list[Array]


def is_native(body: Runner) -> bool:
    """Whether the turns of a body can be one call: kernels only, which write every output into memory of its own."""
    program = body.program
    if not body.native_turns or body.executor is None or len(body.parts) != 1 or not body.segments:
        return False
    segment = body.segments[0]
    outside = {*program.inputs, *program.outputs}
    return (
        all(isinstance(t, TensorType) and t.shape is not None for t in program.input_types)
        and len(set(program.inputs)) == len(program.inputs)
        and all(b in segment.outputs for b in program.outputs)
        and all(b in outside for b in segment.externals)
        and len(segment.steps) <= MAX_ROWS
    )


def run_turns(
    body: Runner,
    most: int,
    head: Sequence[Array],
    states: Sequence[Item],
    scanned: Sequence[Array],
    captures: Sequence[Item],
    backwards: Sequence[Sequence[bool]],
    sizes: dict[str, int],
    most_bytes: int,
) -> Result | None:
    """Up to `most` turns (at least one) of a body that `is_native`; None where its sizes change from turn to turn.

    head: for a Loop the turn's number and the condition, which is the body's first output then; empty for a Scan.
    scanned: their slices along the first axis, in turns' order or (`backwards`, of these and of the collected outputs)
    from the last to the first. sizes: those known before; the body's are added. None, too, where the collected outputs
    would take more than `most_bytes`.
    """
    program = body.program
    items = [*head, *states, *(array[0, ...] for array in scanned), *captures]
    if not all(isinstance(item, np.ndarray) and item.flags.c_contiguous for item in items):
        return None
    body.shapes.learn(items, sizes)
    segment = body.segments[0]
    bound = segment.bound(sizes)
    leading = 1 if head else 0
    returned = program.outputs[leading : leading + len(states)]
    stacked = program.outputs[leading + len(states) :]
    specs = {b: (shape, dtype) for b, shape, dtype in bound.outputs}
    if any(specs[b] != (item.shape, item.dtype) for b, item in zip(returned, states)):
        return None
    if head and (program.outputs[0] in (*returned, *stacked) or not _is_flag(*specs[program.outputs[0]])):
        return None
    total = sum(int(np.prod(specs[b][0], dtype=np.int64)) * specs[b][1].itemsize for b in stacked) * most
    if total > most_bytes:
        return None

    stacks = {b: np.empty((most, *specs[b][0]), specs[b][1]) for b in stacked}
    pairs = {b: np.empty((2, *specs[b][0]), specs[b][1]) for b in returned if b not in stacks}
    turned = dict(zip(stacked[::-1], backwards[1][::-1]))  # of the first where an output is given twice
    walks = {b: _along(array, turned[b]) for b, array in stacks.items()}
    for b, pair in pairs.items():
        step = pair.nbytes // 2
        walks[b] = Walk(address_of(pair), (step, -step, step))
    for b, item in zip(program.inputs, items):
        walks[b] = Walk(address_of(item))
    first = len(head)
    for b, item, output in zip(program.inputs[first:], states, returned):
        walks[b] = _behind(address_of(item), walks[output])
    first += len(states)
    for b, array, reverse in zip(program.inputs[first:], scanned, backwards[0]):
        walks[b] = _along(array, reverse)
    number, flag = np.zeros(1, np.int64), np.zeros(8, np.uint8)
    if head:
        walks[program.outputs[0]] = Walk(address_of(flag))
        walks[program.inputs[0]] = Walk(address_of(number))

    context = bound.acquire()
    try:
        loop = describe(segment, bound, context, walks, number, flag if head else None)
        while True:
            before = int(loop.words[TURNS_DONE])
            body.executor.turns_at(loop.words.ctypes.data, min(MOST_TURNS, most - before))
            turns = int(loop.words[TURNS_DONE])
            going = not head or bool(flag[0])
            if turns == most or not going:
                break
    finally:
        bound.release(context)
    last = [stacks[b][most - turns if turned[b] else turns - 1] if b in stacks else pairs[b][(turns - 1) % 2] for b in returned]
    return Result(turns, going, [item.copy() for item in last], _collected(stacks, stacked, turned, backwards[1], turns))


def _is_flag(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    return shape in ((), (1,)) and dtype == np.bool_


@dataclass(frozen=True)
class _Description:
    """The words of a loop for the executor, and the moves they point at."""

    words: Words
    moves: Words


def describe(
    segment: Segment, bound: Bound, context: Context, walks: Mapping[int, Walk], number: NDArray[np.int64], flag: Array | None
) -> _Description:
    """Put the first turn's addresses into a context, and list what moves between the turns. To be kept until they are done."""
    bound.patch(context, [walks[b].first for b in segment.externals])
    steps = np.array([walks[b].steps for b in segment.externals], np.int64).reshape(-1, 3)[bound.external_base]
    moving = np.flatnonzero(steps.any(axis=1))
    moves = np.empty((len(moving) + 1, MOVE_WORDS), np.int64)
    moves[:-1, 0] = context.words.ctypes.data + 8 * bound.external_at[moving]
    moves[:-1, 1:] = steps[moving]
    moves[-1] = number.ctypes.data, 1, 1, 1
    words = np.zeros(TURN_WORDS, np.int64)
    words[TABLE], words[TABLE_ROWS] = context.table, len(context.rows)
    words[MOVES], words[MOVES_COUNT] = moves.ctypes.data, len(moves)
    words[CONDITION] = 0 if flag is None else flag.ctypes.data
    return _Description(words, moves)


def _along(array: Array, backwards: bool) -> Walk:
    """Slice after slice along the first axis."""
    step = array.nbytes // len(array)
    if backwards:
        return Walk(address_of(array) + array.nbytes - step, (-step, -step, -step))
    return Walk(address_of(array), (step, step, step))


def _behind(start: int, walk: Walk) -> Walk:
    """From `start` to where another walk began, and from there one turn behind it."""
    return Walk(start, (walk.first - start, walk.steps[0], walk.steps[1]))


def _collected(
    stacks: Mapping[int, Array], order: Sequence[int], turned: Mapping[int, bool], backwards: Sequence[bool], turns: int
) -> list[Array]:
    """The stacks in the order of the outputs, each its own array, cut to the turns that were run."""
    found: list[Array] = []
    given: set[int] = set()
    for b, reverse in zip(order, backwards):
        array: Any = stacks[b]
        if len(array) > turns:
            array = array[-turns:] if turned[b] else array[:turns]
        if reverse != turned[b]:
            array = array[::-1]
        if b in given or array is not stacks[b]:
            array = array.copy()
        given.add(b)
        found.append(array)
    return found
