"""Texts, placements and profiles of programs with bodies and host steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from minicc.debug import levels
from minicc.debug.dump import memory_text, recorded_calls, runnable
from minicc.debug.explain import explain
from minicc.debug.inputs import USUAL_SIZE, random_inputs, symbol_sizes
from minicc.debug.profile import profile
from minicc.errors import InputError
from minicc.ir.dims import symbol
from minicc.ir.types import OpaqueType, TensorType, f32, i64
from minicc.lower.program import KernelStep
from minicc.lower.prune import prune_kernels
from minicc.lower.text import print_program
from minicc.options import Options
from minicc.runtime.module import steps_of
from minicc.runtime.signature import ports
from tests.runtime.programs import NAMES, chain, module
from tests.runtime.test_module import if_program, loop_program, ones, with_host


def test_program_text_names_everything() -> None:
    text = print_program(with_host())
    for part in ("NonZero", "[host]", "reason: data-dependent", "temporary", "= [k + n]", "&%", "units k"):
        assert part in text, part
    body = print_program(loop_program())
    assert body.count("program body") == 1 and "[Loop]" in body and "less#3" in body


def test_explain_numbers_bodies_and_evaluates_work() -> None:
    m = module(if_program())
    rows = explain(m).rows
    assert [row.step for row in rows] == ["0", "1", "1.0.0", "1.1.0", "2"]
    assert [row.tier for row in rows] == ["loops", "If", "loops", "loops", "loops"]
    assert explain(m).source("add0").count("def kernel") == 1
    assert explain(m).source().count("def kernel") == 2
    with pytest.raises(InputError, match="no kernel computes"):
        explain(m).source("unknown")
    assert "loops" in str(explain(m))


def test_profile_counts_the_calls_of_bodies(tmp_path: Path) -> None:
    m = module(loop_program())
    items = [np.array(5), ones(1), ones(1), np.array([1e9], np.float32)]
    found = profile(m, items, repeats=3, warm=1)
    assert {row.name: row.calls for row in found.rows} == {"add": 5, "less": 5}
    assert len(found.events) == 10 and found.whole > 0
    starts = [event.start for event in found.events]
    assert starts == sorted(starts) and starts[0] >= 0
    found.to_chrome_trace(tmp_path / "t.json")
    assert len(json.loads((tmp_path / "t.json").read_text())["traceEvents"]) == 10
    with pytest.raises(InputError):
        found.to_chrome_trace(tmp_path / "no" / "folder")
    with pytest.raises(InputError):
        profile(m, [ones(1)] * 4)


def test_profile_leaves_the_module_alone() -> None:
    m = module(chain(3))
    x = ones(3, 4)
    before = m(x, x)
    profile(m, [x, x], repeats=2)
    np.testing.assert_array_equal(m(x, x), before)


def test_memory_text() -> None:
    m = module(chain(5))
    assert "steps" in memory_text(m)
    m(ones(3, 4), ones(3, 4))
    assert "alive at most" in memory_text(m) and " at 0" in memory_text(m)


def test_recorded_calls_are_complete() -> None:
    calls = recorded_calls(module(chain(3)))
    assert set(calls) == {"add", "double"}
    add = calls["add"]
    assert add["units"] == 4 and add["buffers"] == [16, 16, 16]
    assert add["addresses"] == [[0, 0], [1, 1], [2, 2]] and add["words"] == [0, 0, 0]
    assert 'bench_file(__file__, "add")' in runnable("add", "x = 1\n").replace("'", '"')


def test_random_inputs() -> None:
    n, m = symbol("n"), symbol("m")
    types = (TensorType(f32, (n, m, 2)), TensorType(i64, (m * 2,)), TensorType(f32, ()))
    given = ports(("a", "b", "c"), types)
    assert symbol_sizes(given) == {"n": 1, "m": USUAL_SIZE}
    a, b, c = random_inputs(given, {"m": 3})
    assert a.shape == (1, 3, 2) and b.shape == (6,) and c.shape == () and b.dtype == np.int64
    np.testing.assert_array_equal(random_inputs(given, {"m": 3})[0], a)
    with pytest.raises(InputError, match="no dimension is called k"):
        random_inputs(given, {"k": 3})
    with pytest.raises(InputError, match="give it"):
        random_inputs(ports(("s",), (OpaqueType("seq(tensor(float))"),)))


def test_unused_kernels_are_removed() -> None:
    program = chain(3)
    pruned = prune_kernels(program)
    assert [k.name for k in pruned.kernels] == ["add", "double"]
    assert [k.name for k in prune_kernels(if_program()).kernels] == ["add", "double"]
    names = [program.kernels[s.kernel].name for s in steps_of(program) if isinstance(s, KernelStep)]
    assert names == [pruned.kernels[s.kernel].name for s in steps_of(pruned) if isinstance(s, KernelStep)]
    assert prune_kernels(pruned) is pruned and len(program.kernels) == len(NAMES)


def test_levels(capsys: pytest.CaptureFixture[str]) -> None:
    levels.show(levels.RULES, Options(debug=2), "hidden")
    levels.show(levels.RULES, Options(debug=3), "shown")
    assert capsys.readouterr().err == "shown\n"
