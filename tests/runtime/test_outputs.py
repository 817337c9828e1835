"""Results in the caller's arrays: the same numbers, that very memory, and nothing written where something does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minicc
from minicc.errors import InputError, MiniccError
from minicc.module import Module
from minicc.runtime import slices

KINDS = {
    # kernels only; an output that is an input; one whose size is data; a branch
    "short": ("a = Relu(x) b = ReduceSum<keepdims=0>(x, i)", "float[n] b", "int64[1] i = {1}"),
    "passed": ("a = Relu(x) b = Identity(w)", "float[3] b", ""),
    "host": ("a = Relu(x) b = NonZero(x)", "int64[2,k] b", ""),
    "view": ("a = Relu(x) b = Reshape(x, s)", "float[m] b", "int64[1] s = {-1}"),
}


def module_of(kind: str) -> Module:
    nodes, second, constants = KINDS[kind]
    signature = f"(float[n,m0] x, float[3] w) => (float[n,m0] a, {second}) <{constants}>"
    text = f'<ir_version: 10, opset_import: ["" : 21]>\nmain {signature} {{\n{nodes}\n}}'
    return minicc.compile(onnx.parser.parse_model(text.replace("<>", "")), threads=1)


@pytest.fixture(scope="module")
def modules() -> Callable[[str], Module]:
    made: dict[str, Module] = {}

    def get(kind: str) -> Module:
        if kind not in made:
            made[kind] = module_of(kind)
        return made[kind]

    return get


@pytest.mark.filterwarnings("ignore::minicc.module.HostNodesWarning")
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)), rows=st.integers(0, 5), columns=st.integers(1, 40))
def test_results_are_the_usual_ones_in_the_given_arrays(
    modules: Callable[[str], Module], data: st.DataObject, kind: str, rows: int, columns: int
) -> None:
    module, rng = modules(kind), np.random.default_rng(rows * 41 + columns)
    x, w = rng.standard_normal((rows, columns)).astype(np.float32), np.arange(3, dtype=np.float32)
    expected = module(x, w)
    arrays = [np.full_like(e, 7) if data.draw(st.booleans()) else None for e in expected]
    form: Any = data.draw(st.sampled_from([tuple, list, dict]))
    out = {n: a for n, a in zip("ab", arrays) if a is not None} if form is dict else form(arrays)
    for found in (module(x, w, out=out), module.run(None, {"x": x, "w": w}, out=out)):
        for result, wanted, array in zip(found, expected, arrays):
            assert array is None or result is array
            np.testing.assert_array_equal(result, wanted, strict=True)
    assert not any(np.shares_memory(a, b) for a in (x, w) for b in module(x, w, out=out))


@pytest.mark.parametrize("rows", [4, 7])
def test_a_batch_in_turns_writes_there_too(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(slices, "SPILLED_BYTES", 1)
    monkeypatch.setattr(slices, "WEIGHTS", 1 << 20)
    monkeypatch.setattr(slices, "TURN_BYTES", 2 * 4 * 64)
    nodes = "a = Softmax(x) b = MatMul(a, w) y = Softmax(b)"
    text = f'<ir_version: 10, opset_import: ["" : 21]>\nmain (float[n,64] x) => (float[n,64] y) {{ {nodes} }}'
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "w"))
    module = minicc.compile(model, threads=1)
    x = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
    y = np.zeros_like(x)
    assert module(x, out=y) is y
    np.testing.assert_array_equal(y, module(x))
    assert module._short is not None and all(isinstance(b, slices.Sliced) for b in module._short.by_shapes.values())


def test_an_input_may_be_called_out() -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]>\nmain (float[n] out) => (float[n] y) { y = Relu(out) }'
    module = minicc.compile(onnx.parser.parse_model(text))
    x, y = np.array([-1, 2], np.float32), np.empty(2, np.float32)
    np.testing.assert_array_equal(module(out=x), [0, 2])
    assert module.run(None, {"out": x}, out=y)[0] is y
    np.testing.assert_array_equal(y, [0, 2])


def broken(case: str, x: np.ndarray, a: np.ndarray, b: np.ndarray) -> Any:
    read_only = a.copy()
    read_only.flags.writeable = False
    return {
        "type": (a.astype(np.float64), b), "shape": (a, np.empty(4, np.float32)), "rank": (a[None], b), "count": (a,),
        "strides": (np.empty((6, 8), np.float32)[:, ::2], b), "read-only": (read_only, b), "list": ([[1.0]], b),
        "name": {"c": a}, "input": (x, b), "part of an input": (a, x.reshape(-1)[:6]), "each other": (a, a.reshape(-1)[:6]),
        "swapped": np.empty(()).astype(">f4"), "no array": "a",
    }[case]  # fmt: skip


CASES = ("type", "shape", "rank", "count", "strides", "read-only", "list", "name", "input", "part of an input", "each other",
         "swapped", "no array")  # fmt: skip


@pytest.mark.filterwarnings("ignore::minicc.module.HostNodesWarning")
@pytest.mark.parametrize(
    ("kind", "case"),
    [("short", case) for case in CASES]
    + [("host", case) for case in CASES if case not in ("shape", "part of an input", "each other")],  # of the second output
)
def test_what_does_not_fit_is_an_error_and_nothing_is_written(modules: Callable[[str], Module], kind: str, case: str) -> None:
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    a, b = np.full((6, 4), 7, np.float32), np.full(6, 7, np.float32)
    out = broken(case, x, a, b if kind == "short" else None)
    before = x.copy()
    with pytest.raises(MiniccError) as caught:
        modules(kind)(x, np.zeros(3, np.float32), out=out)
    assert isinstance(caught.value, InputError)
    np.testing.assert_array_equal(x, before)
    assert (a == 7).all() and (b == 7).all()
