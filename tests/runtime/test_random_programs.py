"""Random programs of several segments, with host steps between them and results written in place, against numpy."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.ir.dims import symbol
from minicc.ir.types import TensorType, f32
from minicc.lower.program import HostStep, Program
from tests.runtime.programs import Sketch, module

n = symbol("n")
Trace = list[tuple[str, tuple[int, ...], int]]  # operation, operands, result


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, Trace]:
    """A program, and its operations in order."""
    s = Sketch("random")
    live = [s.buffer("input", (n,)), s.buffer("input", (n,)), s.constant(np.arange(3, dtype=np.float32))]
    trace: Trace = []
    for _ in range(draw(st.integers(1, 14))):
        op = draw(st.sampled_from(["add", "add", "double", "double", "Neg"]))
        operands = tuple(draw(st.sampled_from(live)) for _ in range(2 if op == "add" else 1))
        if op == "Neg":
            result = s.buffer("host", (n,))
            type_ = TensorType(f32, (n,))
            s.steps.append(HostStep("", "Neg", {}, operands, (result,), (type_,), (f"neg{result}",)))
        else:
            inplace = op == "double" and s.buffers[operands[0]].kind == "temporary" and draw(st.booleans())
            result = operands[0] if inplace else s.buffer("temporary", (n,))
            s.call(op, operands, result)
        live += [] if result in live else [result]
        trace.append((op, operands, result))
    made = [b for b in live if s.buffers[b].kind in ("temporary", "host")]
    outputs = tuple(draw(st.lists(st.sampled_from(live + made), min_size=1, max_size=4)))
    if draw(st.booleans()):  # as lowering does: a returned temporary becomes an output
        for b in set(outputs):
            old = s.buffers[b]
            if old.kind == "temporary":
                s.buffers[b] = type(old)(old.name, old.dtype, old.shape, "output")
    return s.program((0, 1), outputs), trace


@settings(max_examples=150, deadline=None)
@given(programs(), st.integers(0, 2**32 - 1))
def test_random_programs(found: tuple[Program, Trace], seed: int) -> None:
    program, trace = found
    m = module(program, threads=1)
    rng = np.random.default_rng(seed)
    for size in (3, 3):  # the constant has three elements; the second run meets used memory
        x, y = (rng.integers(-4, 5, size).astype(np.float32) for _ in range(2))
        values = {0: x, 1: y, 2: np.arange(3, dtype=np.float32)}
        for op, operands, result in trace:
            a = [values[b] for b in operands]
            values[result] = a[0] + a[1] if op == "add" else 2 * a[0] if op == "double" else -a[0]
        outputs = m.run_items([x, y])
        for output, b in zip(outputs, program.outputs):
            np.testing.assert_array_equal(output, values[b])
        for i, output in enumerate(outputs):
            output[:] = np.nan  # must disturb nothing
            assert not any(np.shares_memory(output, other) for other in outputs[i + 1 :])
