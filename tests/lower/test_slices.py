"""Which graphs fall apart along the first axis, and that runs in turns give what whole batches give.

The oracle for "falls apart" is numpy: the results of a batch are those of its rows, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicc
from minicc.errors import MiniccError
from minicc.frontend.model import load_model
from minicc.ir.evaluate import evaluate
from minicc.lower.slices import sliced_symbol
from minicc.runtime import slices
from minicc.runtime.validate import check_program

HEAD = '<ir_version: 9, opset_import: ["" : 21]>\n'
X = "float[n,3,8,8] x"
WEIGHTS = ",".join(f"{v:.4f}" for v in np.random.default_rng(0).standard_normal(108))

# Bodies of graphs from x to y, by what they are called; y leads with n.
FALL_APART = {
    "conv": "w = Constant <value = float[4,3,3,3] {WEIGHTS}> () y = Conv <pads=[1,1,1,1]> (x, w)",
    "pointwise": "y = Tanh (x)",
    "flatten": "s = Constant <value_ints=[0,-1]> () y = Reshape (x, s)",
    "pool": "y = GlobalAveragePool (x)",
    "channels": "y = Softmax <axis=1> (x)",
    "transpose": "y = Transpose <perm=[0,2,3,1]> (x)",
    "reduce": "a = Constant <value_ints=[1,2]> () y = ReduceMean <keepdims=0> (x, a)",
    "product": "s = Constant <value_ints=[0,24,8]> () r = Reshape (x, s) t = Transpose <perm=[0,2,1]> (r) y = MatMul (r, t)",
    "norm": "g = Constant <value_floats=[1.0,2.0,1.0,2.0,1.0,2.0,1.0,2.0]> () y = LayerNormalization (x, g)",
    "shuffle": "s = Constant <value_ints=[0,3,2,4,8]> () r = Reshape (x, s) t = Transpose <perm=[0,2,1,3,4]> (r) "
    "u = Constant <value_ints=[0,6,4,8]> () y = Reshape (t, u)",
    "halves": "k = Constant <value_ints=[1,2]> () a, b = Split <axis=1> (x, k) y = Concat <axis=1> (b, a)",
    "resize": "f = Constant <value_floats=[1.0,1.0,2.0,2.0]> () y = Resize <mode=\"linear\"> (x, , f)",
}
DO_NOT = {
    "batch_mean": "a = Constant <value_ints=[0]> () m = ReduceMean <keepdims=1> (x, a) y = Sub (x, m)",
    "batch_softmax": "y = Softmax <axis=0> (x)",
    "reversed": "b = Constant <value_ints=[-1]> () e = Constant <value_ints=[-9223372036854775807]> () "
    "a = Constant <value_ints=[0]> () y = Slice (x, b, e, a, b)",
    "cumulative": "a = Constant <value_int=0> () y = CumSum (x, a)",
    "counted": "s = Shape <start=0, end=1> (x) f = Cast <to=1> (s) y = Div (x, f)",
    "numbered": "s = Shape <start=0, end=1> (x) z = Constant <value_int=0> () o = Constant <value_int=1> () q = Squeeze (s) "
    "r = Range (z, q, o) f = Cast <to=1> (r) t = Constant <value_ints=[-1,1,1,1]> () g = Reshape (f, t) y = Add (x, g)",
    "across": "s = Constant <value_ints=[3,-1,8,8]> () r = Reshape (x, s) t = Transpose <perm=[1,0,2,3]> (r) y = Tanh (t)",
    "doubled": "y = Concat <axis=0> (x, x)",
    "moved": "y = Transpose <perm=[1,0,2,3]> (x)",
    "sorted": "k = Shape <start=0, end=1> (x) y, i = TopK <axis=0> (x, k)",
}


def model(body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{HEAD} g ({X}) => (float y) {{ {body.replace('WEIGHTS', WEIGHTS)} }}")


def graph_of(body: str) -> Any:
    made = model(body)
    made.graph.output[0].type.tensor_type.ClearField("shape")
    return load_model(made.SerializeToString()).graph


def batch(n: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(n).standard_normal((n, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("name", list(FALL_APART))
def test_a_graph_that_falls_apart_is_its_rows(name: str) -> None:
    graph, x = graph_of(FALL_APART[name]), batch(4)
    assert sliced_symbol(graph) == "n"
    (whole,) = evaluate(graph, [x])
    rows = [evaluate(graph, [x[i : i + 1]])[0] for i in range(4)]
    np.testing.assert_allclose(whole, np.concatenate(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(DO_NOT))
def test_a_graph_that_looks_at_other_rows_does_not(name: str) -> None:
    assert sliced_symbol(graph_of(DO_NOT[name])) == ""


NETWORK = (
    HEAD
    + """ net (float[n,3,8,8] x, float[4] b, float[n] scale) => (float[n,4] y, float[n,4,8,8] z) {
    w = Constant <value = float[4,3,3,3] {WEIGHTS}> ()
    z = Conv <pads=[1,1,1,1]> (x, w, b)
    r = Relu (z)
    p = GlobalAveragePool (r)
    s = Constant <value_ints=[0,-1]> ()
    f = Reshape (p, s)
    one = Constant <value_ints=[1]> ()
    c = Unsqueeze (scale, one)
    y = Mul (f, c)
}"""
).replace("WEIGHTS", WEIGHTS)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("slices") / "net.onnx"
    onnx.save(onnx.parser.parse_model(NETWORK), file)
    return file


def feeds(n: int) -> Mapping[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(n)
    return {
        "x": random.standard_normal((n, 3, 8, 8)).astype(np.float32),
        "b": random.standard_normal(4).astype(np.float32),
        "scale": random.standard_normal(n).astype(np.float32),
    }


@pytest.fixture
def everything_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if caches held two rows of the small network."""
    monkeypatch.setattr(slices, "SPILLED_BYTES", 1)
    monkeypatch.setattr(slices, "TURN_BYTES", 1)
    monkeypatch.setattr(slices, "WEIGHTS", 1000)


@pytest.mark.parametrize("threads", [1, 2])
def test_turns_give_what_a_whole_batch_gives(
    network: Path, tmp_path: Path, everything_in_turns: None, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    module = minicc.compile(network, threads=threads)
    assert module.program.sliced == "n"
    module.save(tmp_path / "net.minicc")
    loaded = minicc.load(tmp_path / "net.minicc", trust=True)
    for rows in (1, 2, 3):
        one = module.runner.segments[0].bound({"n": 1}).plan.arena_bytes
        monkeypatch.setattr(slices, "TURN_BYTES", rows * one)
        for n in (1, 2, 3, 5, 8, 9):
            given = feeds(n)
            graph = load_model(network).graph
            expected = evaluate(graph, list(given.values()))
            for made in (minicc.compile(network, threads=threads), loaded):
                found = made.run(None, dict(given))
                for ours, theirs in zip(found, expected):
                    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        # Profiles measure the same turns.
        profiled = minicc.compile(network, threads=threads).profile(*feeds(9).values(), repeats=2)
        assert {row.calls for row in profiled.rows} == {-(-9 // slices.rows_of(9, one, rows * one))}
    kinds = {type(entry) for entry in loaded._short.by_shapes.values()}  # type: ignore[union-attr]
    assert slices.Sliced in kinds


@settings(max_examples=40, deadline=None)
@given(total=st.integers(2, 200), arena=st.integers(1, 50), limit=st.integers(1, 100))
def test_turns_cover_all_rows(total: int, arena: int, limit: int) -> None:
    rows = slices.rows_of(total, arena, limit)
    assert 1 <= rows <= total
    assert rows == 1 or rows * arena <= max(limit, arena)
    turns, left = divmod(total, rows)
    assert turns * rows + left == total and left < rows


def test_a_program_that_claims_what_it_is_not_is_refused(network: Path) -> None:
    program = minicc.compile(network).program
    for symbol in ("m", "x_d1"):
        with pytest.raises(MiniccError):
            check_program(replace(program, sliced=symbol))
