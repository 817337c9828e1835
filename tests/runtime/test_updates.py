"""Caches updated in place: the numbers that copies give, in the caller's memory; refused where old elements are needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minicc
from minicc.errors import InputError
from minicc.lower.program import Update
from minicc.module import Module

CACHE = "float[b,h,s,d] cache, float[b,h,t,d] new, int64[b] at"
MODELS = {
    "linear": (CACHE, "y = TensorScatter(cache, new, at) z = Neg(y)"),
    "circular": (CACHE, 'y = TensorScatter<mode="circular">(cache, new, at) z = Neg(y)'),
    "from the start": (CACHE, "i = Neg(at) y = TensorScatter(cache, new) z = Neg(y)"),
    "another axis": (CACHE.replace("b,h,t,d", "b,t,s,d"), "y = TensorScatter<axis=1>(cache, new, at) z = Neg(y)"),
    "read before": (CACHE, "z = Neg(cache) y = TensorScatter(cache, new, at)"),
}


def module_of(signature: str, nodes: str) -> Module:
    text = f'<ir_version: 13, opset_import: ["" : 24]>\nmain ({signature}) => (float[b,h,s,d] y, float[b,h,s,d] z) {{ {nodes} }}'
    return minicc.compile(onnx.parser.parse_model(text), threads=2)


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return {name: module_of(*model) for name, model in MODELS.items()}


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 5))


@given(data=st.data(), name=st.sampled_from(sorted(MODELS)), sizes=SIZES)
def test_in_place_is_as_with_copies(modules: dict[str, Module], data: st.DataObject, name: str, sizes: tuple[int, ...]) -> None:
    module, rng = modules[name], np.random.default_rng(sum(sizes))
    axis = 1 if name == "another axis" else 2
    steps = data.draw(st.integers(1, sizes[axis]))
    free = sizes[axis] - (0 if name == "circular" else steps)
    at = np.array([data.draw(st.integers(0, max(0, free))) for _ in range(sizes[0])], np.int64)
    cache = rng.standard_normal(sizes).astype(np.float32)
    new = rng.standard_normal([steps if a == axis else size for a, size in enumerate(sizes)]).astype(np.float32)
    before = cache.copy()
    y, z = module(cache, new, at)
    np.testing.assert_array_equal(cache, before)
    again, negated = module(cache, new, at, out={"y": cache})
    assert again is cache
    np.testing.assert_array_equal(cache, y)
    np.testing.assert_array_equal(negated, z)
    expected = before.copy()  # numpy, one place after the other
    for row in range(sizes[0]):
        for step in range(steps):
            place = (step + (0 if name == "from the start" else int(at[row]))) % sizes[axis]
            target, source = (expected[row, place], new[row, step]) if axis == 1 else (expected[row, :, place], new[row, :, step])
            target[...] = source
    np.testing.assert_array_equal(y, expected)


def test_nothing_but_the_new_rows_is_written(modules: dict[str, Module]) -> None:
    """A copy onto itself would give the same numbers, so the calls of kernels are counted."""
    program = modules["linear"].program
    (update,) = program.updates
    assert "left out where 'cache' is given as out for 'y', too" in str(modules["linear"].explain())
    assert update == Update(0, 0, update.copy)
    copy = program.steps[update.copy]
    rows: list[Any] = []
    short = modules["linear"]._short
    assert short is not None
    cache, new, at = np.zeros((1, 2, 8, 4), np.float32), np.ones((1, 2, 1, 4), np.float32), np.array([3])
    usual = short.executor

    class Watched:
        def run(self, table: Any) -> None:
            rows.append(len(table))
            usual.run(table)

        def run_at(self, address: int, count: int) -> None:
            rows.append(count)
            usual.run_at(address, count)

    short.executor = Watched()  # type: ignore[assignment]
    try:
        modules["linear"](cache, new, at)
        modules["linear"](cache, new, at, out=(cache, None))
    finally:
        short.executor = usual
    assert rows[1] == rows[0] - 1 and copy.writes == (program.outputs[0],)  # type: ignore[union-attr]
    assert cache.sum() == 8


@pytest.mark.parametrize(
    "nodes",
    [
        "y = TensorScatter(cache, new, at) z = Sub(y, cache)",  # the old elements are read afterwards
        "y = Neg(cache) z = TensorScatter(y, new, at)",  # not an update of the input
    ],
)
def test_other_outputs_may_not_be_inputs(nodes: str) -> None:
    module = module_of(CACHE, nodes)
    cache, new, at = np.ones((1, 2, 8, 4), np.float32), np.ones((1, 2, 1, 4), np.float32), np.array([3])
    with pytest.raises(InputError, match="shares memory with input 'cache'"):
        module(cache, new, at, out=(cache, None))
    assert (cache == 1).all()


def test_only_the_whole_cache_is_its_own_result(modules: dict[str, Module]) -> None:
    memory = np.zeros((3, 2, 8, 4), np.float32)
    new, at = np.ones((2, 2, 1, 4), np.float32), np.array([3, 1])
    with pytest.raises(InputError, match="shares memory with input 'cache'"):
        modules["linear"](memory[:2], new, at, out=(memory[1:], None))
    with pytest.raises(InputError, match="shares memory with input 'cache'"):
        modules["linear"](memory[:2], new, at, out=(None, memory[:2]))
    with pytest.raises(InputError, match="shares memory"):
        modules["linear"](memory[:2], new, at, out=(memory[:2], memory[1:]))
    assert not memory.any()


def test_an_update_by_index_after_loading(tmp_path: Any) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
        main (float[n,3] cache, int64[m,1] i, float[m,3] new) => (float[n,3] y) { y = ScatterND(cache, i, new) }"""
    minicc.compile(onnx.parser.parse_model(text)).save(tmp_path / "m.minicc")
    module, cache = minicc.load(tmp_path / "m.minicc"), np.zeros((5, 3), np.float32)
    for place in (4, 0):
        assert module(cache, np.array([[place]]), np.full((1, 3), place + 1, np.float32), out=cache) is cache
    np.testing.assert_array_equal(cache[:, 0], [1, 0, 0, 0, 5])
