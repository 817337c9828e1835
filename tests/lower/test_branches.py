"""If as guarded steps: both branches against ONNX Runtime, and what must stay control flow."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import minicc
from minicc.errors import ArtifactError
from minicc.lower.program import ControlStep, KernelStep
from minicc.lower.serialize import from_data, to_data
from minicc.lower.text import print_program
from minicc.runtime.module import CompiledModule, steps_of
from minicc.runtime.validate import check_program
from tests.passes.models import parse, run_reference

FIRST = ("x", "y")  # captured from around the If


@st.composite
def branches(draw: st.DrawFn, name: str, values: tuple[str, ...], depth: int) -> str:
    """The nodes of a branch with one output, `name`; it sees `values`, all of shape [N, 4]."""
    lines: list[str] = []
    seen = list(values)
    for step in range(draw(st.integers(0, 2))):
        new = f"{name}_{step}"
        a, b = draw(st.sampled_from(seen)), draw(st.sampled_from(seen))
        op = draw(st.sampled_from([f"Relu({a})", f"Add({a}, {b})", f"Mul({a}, {b})", f"MatMul({a}, w)", f"Softmax({a})"]))
        lines.append(f"{new} = {op}")
        seen.append(new)
    last = draw(st.sampled_from(seen))
    if depth > 0 and draw(st.booleans()):
        return "\n".join([*lines, *draw(choices(name, tuple(seen), depth - 1))])
    return "\n".join([*lines, f"{name} = Neg({last})"])


@st.composite
def choices(draw: st.DrawFn, name: str, values: tuple[str, ...], depth: int) -> list[str]:
    """An If whose output is `name`, on the sum of one of the values."""
    then, other = (draw(branches(f"{name}{letter}", values, depth)) for letter in "te")
    of = draw(st.sampled_from(values))
    return [
        f"{name}_sum = ReduceSum <keepdims: int = {draw(st.integers(0, 1))}> ({of})",
        f"{name}_c = Less({name}_sum, zero)",
        f"{name} = If({name}_c) <then_branch = then () => (float[N, 4] {name}t) {{ {then} }},"
        f" else_branch = other () => (float[N, 4] {name}e) {{ {other} }}>",
    ]


@st.composite
def nets(draw: st.DrawFn) -> onnx.ModelProto:
    body = [
        "zero = Constant <value_float: float = 0.0> ()",
        "y = Abs(x)",
        *draw(choices("z", FIRST, 1)),
        f"r = Add(z, {draw(st.sampled_from(['x', 'y', 'z']))})",
    ]
    return parse("\n".join(body), "(float[N, 4] x, float[4, 4] w) => (float[N, 4] r, float[N, 4] z)")


def guarded(module: CompiledModule) -> bool:
    steps = list(steps_of(module.program))
    return not any(isinstance(s, ControlStep) for s in steps) and any(isinstance(s, KernelStep) and s.guards for s in steps)


@settings(max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(nets(), st.integers(0, 99), st.sampled_from([1, 2]))
def test_random_branches(tmp_path_factory: pytest.TempPathFactory, model: onnx.ModelProto, seed: int, threads: int) -> None:
    module = minicc.compile(model, threads=threads)
    assert guarded(module)
    path = tmp_path_factory.mktemp("saved") / "net.minicc"
    module.save(path)
    loaded = minicc.load(path)
    rng = np.random.default_rng(seed)
    for n in (1, 3):
        for sign in (-1, 1, 0.1):
            x = (rng.standard_normal((n, 4)) + 2 * sign).astype(np.float32)
            feeds = {"x": x, "w": rng.standard_normal((4, 4)).astype(np.float32)}
            for a, b, e in zip(module.run(None, feeds), loaded.run(None, feeds), run_reference(model, feeds), strict=True):
                np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)
                np.testing.assert_array_equal(a, b)


SIMPLE = """
  y = If (c) <
    then_branch = t () => (float[N, 4] p) { p = Relu(x) },
    else_branch = e () => (float[N, 4] q) { q = Neg(x) }
  >
"""


def test_many_callers() -> None:
    module = minicc.compile(parse(SIMPLE, "(bool c, float[N, 4] x) => (float[N, 4] y)"), threads=2)
    assert guarded(module)
    wrong: list[int] = []

    def caller(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for turn in range(60):
            x = rng.standard_normal((int(rng.integers(1, 9)), 4)).astype(np.float32)
            expected = np.maximum(x, 0) if turn % 2 else -x
            if not np.array_equal(module(np.array(turn % 2 == 1), x), expected):
                wrong.append(seed)

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("then", "shape"),
    [
        ("p = Reshape(x, s)", "[2, M]"),  # only where the sizes fit
        ("n = NonZero(x)  p = Cast <to: int = 1> (n)", "[2, M]"),  # a size that only a run shows
    ],
)
def test_what_stays_control_flow(then: str, shape: str) -> None:
    body = f"""
      s = Constant <value_ints: ints = [2, -1]> ()
      y = If (c) <then_branch = t () => (float{shape} p) {{ {then} }}, else_branch = e () => (float[N, 4] q) {{ q = Neg(x) }}>
    """
    model = parse(body, "(bool c, float[N, 4] x) => (float[A, B] y)")
    module = minicc.compile(model)
    assert any(isinstance(step, ControlStep) for step in module.program.steps)
    for condition in (False, True):
        feeds = {"c": np.array(condition), "x": np.ones((3, 4), np.float32)}
        np.testing.assert_array_equal(module.run(None, feeds)[0], run_reference(model, feeds)[0])


def test_profile_and_text(tmp_path: Path) -> None:
    module = minicc.compile(parse(SIMPLE, "(bool c, float[N, 4] x) => (float[N, 4] y)"), threads=1)
    assert print_program(module.program).count("only where") == 2
    found = module.profile(np.array(True), np.ones((3, 4), np.float32))
    assert {row.calls for row in found.rows} == {1}


def test_guards_of_a_file_are_checked() -> None:
    module = minicc.compile(parse(SIMPLE, "(bool c, float[N, 4] x) => (float[N, 4] y)"), threads=1)
    data, arrays = to_data(module.program)
    back = from_data(data, lambda number, dtype, shape: arrays[number])
    assert [s.guards for s in back.steps] == [s.guards for s in module.program.steps]  # type: ignore[union-attr]
    check_program(back)
    first = back.steps[0]
    assert isinstance(first, KernelStep)
    for guard in ((back.inputs[1], True), (back.outputs[0], True)):
        odd = replace(back, steps=(replace(first, guards=(guard,)), *back.steps[1:]))
        with pytest.raises(ArtifactError):
            check_program(odd)
