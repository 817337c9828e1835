"""Turns of Scan and Loop in one native call, against numpy and against the same bodies run turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.ir.dims import symbol
from minicc.ir.types import boolean, f32, i64
from minicc.lower.program import ControlStep, Program
from minicc.runtime import turns as native
from minicc.runtime.control import ControlCall
from minicc.runtime.module import CompiledModule
from tests.runtime.programs import Sketch
from tests.runtime.test_module import module, number

Array = np.ndarray[Any, Any]
n = symbol("n")
WIDTH = 3


@dataclass(frozen=True)
class Body:
    """Each carried value becomes the sum of two of (carried values, scanned slices, one captured array), by number;
    outputs name the new carried values, which may be given again and again.
    """

    sums: tuple[tuple[int, int], ...]
    scanned: int
    states: tuple[int, ...]
    collected: tuple[int, ...]

    def turn(self, items: Sequence[Array]) -> list[Array]:
        return [items[a] + items[b] for a, b in self.sums]

    def sketch(self, counted: bool) -> Program:
        """The body's program; `counted`: with a turn's number and a condition, new[0] < the captured array's bound."""
        b = Sketch("body")
        head = (b.buffer("input", (), i64), b.buffer("input", (), boolean)) if counted else ()
        items = [b.buffer("input", (WIDTH,)) for _ in range(len(self.states) + self.scanned + 1)]
        limit = (b.buffer("input", (1,)),) if counted else ()
        new = []
        for x, y in self.sums:
            new.append(b.buffer("output", (WIDTH,)))
            b.call("add", (items[x], items[y]), new[-1])
        going = (b.buffer("output", (1,), boolean),) if counted else ()
        if counted:
            b.call("less", (new[0], *limit), going[0])
        outputs = (*going, *(new[i] for i in (*self.states, *self.collected)))
        return b.program((*head, *items, *limit), outputs, kernels=False)


@st.composite
def bodies(draw: st.DrawFn, scanned: st.SearchStrategy[int]) -> Body:
    count, scans = draw(st.integers(1, 3)), draw(scanned)
    operand = st.integers(0, count + scans)
    sums = draw(st.lists(st.tuples(operand, operand), min_size=1, max_size=3))
    result = st.integers(0, len(sums) - 1)
    states = tuple(draw(result) for _ in range(count))
    collected = (*draw(st.lists(result, max_size=3)), *(i for i in range(len(sums)) if i not in states))
    return Body(tuple(sums), scans, states, collected)


def control_of(m: CompiledModule) -> ControlCall:
    (call,) = [part[1] for part in m.runner.parts if isinstance(part, tuple)]
    assert isinstance(call, ControlCall)
    return call


def both_ways(m: CompiledModule, items: Sequence[Array], monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """The outputs of native turns, after making sure that there were such and that turns from Python give the same."""
    call = control_of(m)
    assert call.native
    with monkeypatch.context() as patch:
        patch.setattr(call.bodies[0], "run", None)
        outputs = m.run_items(list(items))
    call.native = False
    for a, b in zip(outputs, m.run_items(list(items)), strict=True):
        np.testing.assert_array_equal(a, b)
    call.native = True
    for a, b in zip(outputs, m.run_items(list(items)), strict=True):
        np.testing.assert_array_equal(a, b)
    return outputs


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scan(data: st.DataObject) -> None:
    body = data.draw(bodies(st.integers(1, 2)))
    count, outputs = len(body.states), len(body.collected)
    turns, threads = data.draw(st.integers(1, 7)), data.draw(st.sampled_from([1, 2]))
    flags = st.integers(0, 1)
    ways_in, ways_out = ([data.draw(flags) for _ in range(k)] for k in (body.scanned, outputs))
    axes_in, axes_out = [data.draw(flags) for _ in ways_in], [data.draw(st.sampled_from([0, 1, -1, -2])) for _ in ways_out]
    s = Sketch("scan")
    states = [s.buffer("input", (WIDTH,)) for _ in range(count)]
    scanned = [s.buffer("input", (n, WIDTH) if axis == 0 else (WIDTH, n)) for axis in axes_in]
    capture = s.buffer("input", (WIDTH,))
    shapes = [(WIDTH,)] * count + [(n, WIDTH) if axis in (0, -2) else (WIDTH, n) for axis in axes_out]
    results = tuple(s.buffer("host", shape) for shape in shapes)
    attrs = {
        "n_state": count,
        "num_scan_inputs": body.scanned,
        "scan_input_axes": axes_in,
        "scan_output_axes": axes_out,
        "scan_input_directions": ways_in,
        "scan_output_directions": ways_out,
    }
    inputs = (*states, *scanned, capture)
    types = tuple(number(shape) for shape in shapes)
    s.steps.append(ControlStep("Scan", attrs, inputs, results, types, (body.sketch(False),), ("scan",)))
    m = module(s.program(inputs, results), threads=threads)

    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    starts = [rng.integers(-3, 4, WIDTH).astype(f32.numpy) for _ in states]
    walks = [rng.integers(-3, 4, (turns, WIDTH)).astype(f32.numpy) for _ in scanned]
    captured = rng.integers(-3, 4, WIDTH).astype(f32.numpy)
    now, stacks = starts, [list[Array]() for _ in range(outputs)]
    for t in range(turns):
        new = body.turn([*now, *(w[t] for w in walks), captured])
        now = [new[i] for i in body.states]
        for stack, i in zip(stacks, body.collected):
            stack.append(new[i])
    given_walks = [np.ascontiguousarray(np.moveaxis(w[:: -1 if way else 1], 0, a)) for w, way, a in zip(walks, ways_in, axes_in)]
    expected = [*now, *(np.stack(k[:: -1 if way else 1], axis=a) for k, way, a in zip(stacks, ways_out, axes_out))]
    with pytest.MonkeyPatch.context() as patch:
        actual = both_ways(m, [*starts, *given_walks, captured], patch)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def loop(body: Body, **options: Any) -> CompiledModule:
    """Inputs: trips, carried values, the captured array, the bound of new[0][0]."""
    s = Sketch("loop")
    trips = s.buffer("input", (), i64)
    states = [s.buffer("input", (WIDTH,)) for _ in body.states]
    capture, limit = s.buffer("input", (WIDTH,)), s.buffer("input", (1,))
    shapes = [(WIDTH,)] * len(states) + [(n, WIDTH)] * len(body.collected)
    results = tuple(s.buffer("host", shape) for shape in shapes)
    given = (trips, None, *states, capture, limit)
    types = tuple(number(shape) for shape in shapes)
    s.steps.append(
        ControlStep("Loop", {"n_carried": len(states)}, given, results, types, (body.sketch(True),), ("loop",))
    )
    return module(s.program((trips, *states, capture, limit), results), **options)


@settings(max_examples=60, deadline=None)
@given(bodies(st.just(0)), st.integers(1, 9), st.integers(-5, 40), st.integers(0, 99), st.sampled_from([1, 2]))
def test_loop(body: Body, trips: int, limit: int, seed: int, threads: int) -> None:
    m = loop(body, threads=threads)
    rng = np.random.default_rng(seed)
    starts = [rng.integers(-1, 4, WIDTH).astype(np.float32) for _ in body.states]
    captured = rng.integers(-1, 4, WIDTH).astype(np.float32)
    now, stacks = starts, [list[Array]() for _ in body.collected]
    for _ in range(trips):
        new = body.turn([*now, captured])
        now = [new[i] for i in body.states]
        for stack, i in zip(stacks, body.collected):
            stack.append(new[i])
        if not new[0][0] < limit:
            break
    items = [np.array(trips), *starts, captured, np.array([limit], np.float32)]
    with pytest.MonkeyPatch.context() as patch:
        actual = both_ways(m, items, patch)
    for a, e in zip(actual, [*now, *map(np.array, stacks)], strict=True):
        np.testing.assert_array_equal(a, e)


def test_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than go into one native call."""
    m = loop(Body(((0, 1),), 0, (0,), (0,)))
    trips = 2 * native.MOST_TURNS + 1
    one, endless = np.ones(WIDTH, np.float32), np.array([np.inf], np.float32)
    final, collected = both_ways(m, [np.array(trips), one, one, endless], monkeypatch)
    assert final.tolist() == [1 + trips] * WIDTH
    np.testing.assert_array_equal(collected[:, 0], np.arange(2, trips + 2))


def test_outputs_are_the_callers_own() -> None:
    m = loop(Body(((0, 2),), 0, (0, 0), (0, 0)))
    one, endless = np.ones(WIDTH, np.float32), np.array([np.inf], np.float32)
    first = m(np.array(3), one, one, one, endless)
    for array in first:
        array[:] = -1
    counted = [[2] * WIDTH, [3] * WIDTH, [4] * WIDTH]
    second = [array.tolist() for array in m(np.array(3), one, one, one, endless)]
    assert second == [[4] * WIDTH, [4] * WIDTH, counted, counted]
