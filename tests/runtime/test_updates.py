"""Caches updated in place: the numbers that copies give, in the caller's memory; refused where old elements are needed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minicc
from minicc.errors import ArtifactError, InputError
from minicc.lower.program import Update
from minicc.lower.serialize import from_data, to_data
from minicc.module import Module
from minicc.runtime import slices
from minicc.runtime.context import Bound
from minicc.runtime.validate import check_program
from tests.ops import test_attention_group as group

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


SCATTER = "float[b,2,l,3] past, float[b,2,s,3] new, int64[b] at"
UPDATES = {
    "linear": (SCATTER, "present = TensorScatter(past, new, at)"),
    "circular": (SCATTER, 'present = TensorScatter<mode="circular">(past, new, at)'),
    "rows": ("float[l,3] past, float[s,3] new, int64[s,1] at", "present = ScatterND(past, at, new)"),
    "sums": ("float[l,3] past, float[s,3] new, int64[s,1] at", 'present = ScatterND<reduction="add">(past, at, new)'),
    "elements": ("float[l,3] past, float[s,3] new, int64[s,3] at", "present = ScatterElements<axis=0>(past, at, new)"),
    "read before": (SCATTER, "z = ReduceSum(past) present = TensorScatter(past, new, at)"),
}
REFUSED = {
    "read after": (SCATTER, "present = TensorScatter(past, new, at) z = Sub(present, past)", "reads the old contents"),
    "own rows": ("float[l,3] past, int64[l,1] at", "present = ScatterND(past, at, past) z = Relu(at)", "reads the old contents"),
    "computed": (SCATTER, "x = Relu(past) present = TensorScatter(x, new, at)", "not that input with some rows"),
    "host": (SCATTER, "present = TensorScatter(past, new, at) z = NonZero(new)", "not that input|kernel"),
}  # fmt: skip


@cache
def compiled(inputs: str, nodes: str) -> Module:
    z = ", int64[2,k] z" if "NonZero" in nodes else ", int64[l,m] z" if "Relu(at)" in nodes else ", float[a,b0,c,d] z"
    outputs = "float[p0,p1,p2,p3] present" if "[b,2" in inputs else "float[p0,p1] present"
    text = f'<ir_version: 11, opset_import: ["" : 24]>\nmain ({inputs}) => ({outputs}{z if "z =" in nodes else ""}) {{ {nodes} }}'
    return minicc.compile(onnx.parser.parse_model(text), threads=1)


def arrays(kind: str, batch: int, length: int, steps: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    past, new = (rng.standard_normal((batch, 2, n, 3)).astype(np.float32) for n in (length, steps))
    if kind not in ("rows", "sums", "elements"):
        return {"past": past, "new": new, "at": rng.integers(0, length - steps + 1, batch) + (kind == "circular") * steps}
    at = rng.permutation(length)[:steps]
    places = np.repeat(at[:, None], 3, 1) if kind == "elements" else at[:, None]
    return {"past": past[0, 0], "new": new[0, 0], "at": places}


def expected(kind: str, past: np.ndarray, new: np.ndarray, at: np.ndarray) -> np.ndarray:
    out = past.copy()
    if past.ndim == 2:
        for row, place in zip(new, at[:, 0]):
            out[place] = out[place] + row if kind == "sums" else row
        return out
    for b, start in enumerate(at):
        for s in range(new.shape[2]):
            out[b, :, (start + s) % past.shape[2]] = new[b, :, s]
    return out


@given(
    st.sampled_from(sorted(UPDATES)), st.integers(1, 3), st.integers(1, 9), st.integers(0, 9), st.integers(0, 99)
)  # fmt: skip
def test_an_update_in_place_is_that_of_a_fresh_array(kind: str, batch: int, length: int, steps: int, seed: int) -> None:
    module, feeds = compiled(*UPDATES[kind]), arrays(kind, batch, length, min(steps, length), seed)
    wanted, before = expected(kind, **feeds), feeds["past"].copy()
    results = module.run(None, feeds)
    np.testing.assert_array_equal(results[0], wanted)
    np.testing.assert_array_equal(feeds["past"], before)
    found = module.run(None, feeds, out={"present": feeds["past"]})
    assert found[0] is feeds["past"]
    np.testing.assert_array_equal(found[0], wanted)
    for a, b in zip(found[1:], results[1:]):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", sorted(UPDATES))
def test_the_copy_is_left_out(kind: str) -> None:
    module, feeds = compiled(*UPDATES[kind]), arrays(kind, 2, 8, 3, 1)
    module.run(None, feeds, out={"present": feeds["past"]})
    (pair,) = module.program.updates
    assert pair.reason == "" and "updated in place" in str(module.explain())
    assert module._short is not None
    entry = module._short.by_shapes[tuple(feeds[port.name].shape for port in module.inputs)]
    assert isinstance(entry, Bound)
    ((dropped, kept),) = entry._without.items()
    assert dropped == (pair.copy,) and pair.copy in entry.steps and pair.copy not in entry.steps[kept]
    assert len(kept) == len(entry.rows) - 1


@pytest.mark.filterwarnings("ignore::minicc.module.HostNodesWarning")
@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_cannot_be_in_place_is_an_error_and_nothing_is_written(kind: str) -> None:
    inputs, nodes, reason = REFUSED[kind]
    module = compiled(inputs, nodes)
    feeds = arrays("rows", 1, 4, 4, 1) if kind == "own rows" else arrays("linear", 2, 6, 2, 1)
    feeds = {port.name: feeds[port.name] for port in module.inputs}
    before = feeds["past"].copy()
    with pytest.raises(InputError, match=reason):
        module.run(None, feeds, out={"present": feeds["past"]})
    np.testing.assert_array_equal(feeds["past"], before)
    fresh = np.empty_like(before)
    assert module.run(None, feeds, out={"present": fresh})[0] is fresh
    np.testing.assert_array_equal(fresh, module.run(None, feeds)[0])


def test_other_memory_of_an_input_is_an_error() -> None:
    module, feeds = compiled(*UPDATES["linear"]), arrays("linear", 2, 6, 2, 1)
    whole = np.zeros((3, 2, 6, 3), np.float32)
    before = feeds["new"].copy()
    for past, out in ((whole[:2], whole[1:]), (whole[:2], whole[:1])):
        with pytest.raises(InputError, match="a part of it"):
            module.run(None, {**feeds, "past": past}, out=out)
    square = arrays("linear", 2, 2, 2, 1)
    with pytest.raises(InputError, match="not that input"):
        module.run(None, square, out=square["new"])
    with pytest.raises(InputError, match="input 'new'"):  # the cache, given as the new rows, too
        module.run(None, {**square, "new": square["past"]}, out=square["past"])
    np.testing.assert_array_equal(feeds["new"], before)
    assert not whole.any()


def test_a_batch_that_runs_in_turns_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = slices.Sliced
    module, feeds = compiled(*UPDATES["linear"]), arrays("linear", 3, 6, 2, 1)
    module.prepare()
    assert module._short is not None
    short = module._short
    made = lambda shapes, _: entry(  # noqa: E731
        module.program, short.segment, short.executor, short.segment.bound({"b": 1, "l": 6, "s": 2}), None, 3, 1, 3)  # fmt: skip
    monkeypatch.setattr(short, "bind", made)
    monkeypatch.setattr(short, "by_shapes", {})
    monkeypatch.setattr(module, "program", replace(module.program, sliced="b"))
    wanted = expected("linear", **feeds)
    module.run(None, feeds, out=feeds["past"])
    np.testing.assert_array_equal(feeds["past"], wanted)


@pytest.mark.parametrize("fills", [[5], [5, 2], [0, 0], [11]])
@pytest.mark.parametrize("threads", [1, 2])
def test_decoding_with_buffers_of_a_fixed_length(fills: list[int], threads: int) -> None:
    """Beside ONNX Runtime; behind its rows a cache keeps what it held, which a fresh one has as zeros."""
    proto = group.model(False, True, do_rotary=1)
    module = minicc.compile(proto, strict=True, threads=threads)
    feeds = group.feeds(proto, len(fills), 1, fills)
    rng = np.random.default_rng(5)
    for name in ("past_k", "past_v"):
        feeds[name] = rng.standard_normal((len(fills), group.GROUPS, 12, group.SIZE)).astype(np.float32)
    group.check(proto, module, feeds, fills, 1)
    fresh = module.run(None, feeds)
    old = {name: feeds[name].copy() for name in ("past_k", "past_v")}
    found = module.run(None, feeds, out=(None, feeds["past_k"], feeds["past_v"]))
    assert found[1] is feeds["past_k"] and found[2] is feeds["past_v"]
    np.testing.assert_array_equal(found[0], fresh[0])
    for name, present, cache_ in zip(old, fresh[1:], found[1:]):
        for row, fill in enumerate(fills):
            np.testing.assert_array_equal(cache_[row, :, : fill + 1], present[row, :, : fill + 1])
            np.testing.assert_array_equal(cache_[row, :, fill + 1 :], old[name][row, :, fill + 1 :])
            assert not present[row, :, fill + 1 :].any()


def test_buffers_that_are_too_short_or_swapped() -> None:
    proto = group.model(False, True)
    module = minicc.compile(proto, strict=True)
    feeds = group.feeds(proto, 1, 1, [5])  # as many rows as are filled
    with pytest.raises(InputError, match=r"has shape \[1, 2, 5, 16\]"):
        module.run(None, feeds, out=(None, feeds["past_k"], None))
    with pytest.raises(InputError, match="past_v"):
        module.run(None, feeds, out=(None, feeds["past_v"], None))


def test_saved_programs_keep_it(tmp_path: Path) -> None:
    module, feeds = compiled(*UPDATES["linear"]), arrays("linear", 2, 6, 2, 1)
    module.save(tmp_path / "a.minicc")
    loaded = minicc.load(tmp_path / "a.minicc")
    assert loaded.program.updates == module.program.updates
    wanted = expected("linear", **feeds)
    assert loaded.run(None, feeds, out=feeds["past"])[0] is feeds["past"]
    np.testing.assert_array_equal(feeds["past"], wanted)
    data, constants = to_data(module.program)
    del data["program"]["updates"]  # a file from before
    assert from_data(data, lambda number, *_: constants[number]).updates == ()


def test_pairs_of_files_are_checked() -> None:
    good = compiled(*UPDATES["linear"]).program
    (pair,) = good.updates
    late = compiled(*REFUSED["read after"][:2]).program
    check_program(good)
    check_program(late)
    for program, wrong in (
        (good, pair._replace(input=3)), (good, pair._replace(output=-1)), (good, pair._replace(input=2)),
        (good, pair._replace(copy=pair.copy + 1)), (late, late.updates[0]._replace(reason="")), (good, Update(0, 1, 0)),
    ):  # fmt: skip
        with pytest.raises(ArtifactError):
            check_program(replace(program, updates=(wrong,)))
    for broken in ([0, 0], [0, 0, "x", ""], [0, 0, True, ""], [0, 0, 0, 5], "abcd"):
        data, constants = to_data(good)
        data["program"]["updates"] = [broken]
        with pytest.raises(ArtifactError):
            from_data(data, lambda number, *_, constants=constants: constants[number])  # type: ignore[misc]
