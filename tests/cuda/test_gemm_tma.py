"""CUDA products whose operands the copy engine brings: results in the interpreter, mutations that must be noticed, modules."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

import minicc
from benchmarks.cuda_build import gemm_text, machine_text
from minicc.codegen.cuda import compile_cubin, compile_ptx, find_tool
from minicc.errors import TargetError
from minicc.kernels import cuda_tiles
from minicc.kernels.cuda_launch import MAP_BYTES, Positions, TensorMap
from minicc.kernels.cuda_tiles import (
    ALL_TILES,
    SIZES,
    TMA_TILES,
    Tile,
    choose_product,
    launch_gemm,
    pack_right,
    product_ways,
    takes_maps,
)
from minicc.kernels.template import TEMPLATES
from minicc.runtime.cuda.maps import TILED, WINDOWS, encode
from tests.cuda import ptx_tma
from tests.cuda.modules import pretended, run_module
from tests.cuda.ptx_interpreter import Memory, PtxError, run
from tests.cuda.test_gemm import AMPERE, GROUP_INSTRUCTIONS, HOPPER, INTEGERS, draw, limit, multiplied, stored

Array = np.ndarray[Any, Any]
ONE_GROUP, TWO_GROUPS, TWO_BLOCKS = TMA_TILES[4], TMA_TILES[3], TMA_TILES[6]
ELEMENTS = ("f16", "bf16", "tf32", "s8", "u8")


@lru_cache(maxsize=16)
def ptx(element: str, tile: Tile) -> str:
    return compile_ptx(gemm_text(element, tile), "kernel", HOPPER)


def difference(
    text: str,
    element: str,
    tile: Tile,
    sizes: tuple[int, int, int],
    batches: tuple[int, int] = (1, 1),
    shared: tuple[bool, bool] = (False, False),
    extra: int = 0,
    schedule: str = "together",
    blocks: int = 2,
) -> float:
    """Largest difference from numpy, relative to the largest result, over random operands.

    shared: whether A has one matrix for all of the first batch axis, and B one for all of the second. extra: 16 bytes by which
    rows of A are longer. blocks: most blocks of the launch, which make several tiles each when there are more.
    """
    (m, n, k), each = sizes, 16 // SIZES[element]
    rng = np.random.default_rng(m * n + k)
    row = -(-k // each) * each + extra * each
    a = draw(rng, element, (1 if shared[0] else batches[0], batches[1], m, row), True)
    b = draw(rng, element, (batches[0], 1 if shared[1] else batches[1], k, n), False)
    packed = pack_right(stored(element, b))
    memory = Memory()
    result = np.full((*batches, m, n), 77, np.int32 if element in INTEGERS else np.float32)
    places = [memory.place(array) for array in (stored(element, a), packed, result)]
    strides = {"A_ROW": row, "A_B0": 0 if shared[0] else batches[1] * m * row, "A_B1": m * row}
    strides |= {"B_ROW": packed.shape[-1], "B_B0": packed[0].size, "B_B1": 0 if shared[1] else packed[0, 0].size}
    values = {"A": places[0], "B": places[1], "M": m, "N": n, "K": k, **strides, "B0": batches[0], "B1": batches[1]}
    words = {name: values.get(name, 0) for name in TEMPLATES["gemm"].words}
    constants = {"ELEMENT": element, "TILE": ALL_TILES.index(tile), "SPLITS": 1, "PIECE": 16, "B_PIECE": 16}
    launch = launch_gemm(words, constants, replace(HOPPER, multiprocessors=blocks))
    given = [*words.values(), places[2]]
    for map_ in launch.maps:
        given[map_.word] = memory.place(np.frombuffer(ptx_tma.encode(map_), np.uint8))
    run(text, "kernel", launch.grid, launch.block, launch.shared_bytes, given, memory, schedule)
    expected = multiplied(element, a[..., :k]) @ multiplied(element, b)
    return float(np.abs(memory.read(places[2], result.shape, result.dtype) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("element", ["bf16", "f16", "tf32", "s8", pytest.param("u8", marks=pytest.mark.slow)])
@given(m=st.integers(1, 150), n=st.integers(1, 300), k=st.integers(1, 700), extra=st.integers(0, 2),
       schedule=st.sampled_from(["together", "warps"]))  # fmt: skip
@settings(max_examples=4, deadline=None)
def test_ragged_shapes(element: str, m: int, n: int, k: int, extra: int, schedule: str) -> None:
    found = difference(ptx(element, ONE_GROUP), element, ONE_GROUP, (m, n, k), extra=extra, schedule=schedule)
    assert found <= limit(element)


@pytest.mark.parametrize("tile", [TWO_GROUPS, TWO_BLOCKS], ids=["two groups", "two blocks"])
@given(m=st.integers(1, 140), n=st.integers(1, 140), k=st.integers(1, 300), batches=st.tuples(*[st.integers(1, 2)] * 2),
       shared=st.tuples(st.booleans(), st.booleans()), blocks=st.integers(2, 9))  # fmt: skip
@settings(max_examples=4, deadline=None)
def test_batches(tile: Tile, m: int, n: int, k: int, batches: tuple[int, int], shared: tuple[bool, bool], blocks: int) -> None:
    found = difference(ptx("f16", tile), "f16", tile, (m, n, k), batches, shared, blocks=blocks)
    assert found <= limit("f16")


@pytest.mark.slow
@pytest.mark.parametrize("tile", TMA_TILES)
def test_every_tile(tile: Tile) -> None:
    sizes = (2 * tile.rows + 3, tile.columns + 5, 11 * 64)
    assert difference(ptx("bf16", tile), "bf16", tile, sizes, blocks=2 * tile.cluster) <= limit("bf16")


@pytest.mark.parametrize("element", ["bf16", pytest.param("", marks=pytest.mark.slow)])
def test_machine_code(element: str) -> None:
    if find_tool("ptxas") is None or find_tool("cuobjdump") is None:
        pytest.skip("ptxas or cuobjdump is not installed")
    kinds = [(element, TMA_TILES[0]), (element, TMA_TILES[5])] if element else [(e, t) for e in ELEMENTS for t in TMA_TILES]
    for name, tile in kinds:
        built = compile_cubin(gemm_text(name, tile), "kernel", HOPPER)
        assert built.spills == 0
        assert built.registers * tile.threads <= HOPPER.registers
        few, many = cuda_tiles.REGISTERS.get(tile.workers // 128, (0, 0))
        assert few * (tile.threads - tile.workers) + many * tile.workers <= built.registers * tile.threads
        code = machine_text(built.data)
        changes = len(re.findall(r"\bUSETMAXREG", code))
        assert changes == (2 if few else 0)
        for instruction in (GROUP_INSTRUCTIONS[name].replace("x256x", f"x{tile.columns}x"), "UTMALDG.4D", "SYNCS.PHASECHK"):
            assert instruction in code, instruction
        assert ("UTMALDG.4D.MULTICAST" in code) == (tile.cluster > 1)


def _without(start: str, which: int = 0) -> Callable[[str], str]:
    def change(text: str) -> str:
        place = list(re.finditer(rf"{re.escape(start)}[^;]*;", text))[which]
        return text[: place.start()] + text[place.end() :]

    return change


def _ended(text: str, which: int) -> str:
    """A wait that looks once and goes on whatever it sees."""
    place = list(re.finditer(r"mbarrier\.try_wait[^;]*; selp\.u32 (%r\d+), 1, 0, p;", text))[which]
    return text[: place.end()] + f" mov.u32 {place[1]}, 1;" + text[place.end() :]


MUTATIONS: dict[str, Callable[[str], str]] = {
    "no wait for an empty place": lambda text: _ended(text, 0),
    "no wait for a full place": lambda text: _ended(text, 1),
    "empty places of the wrong phase": lambda text: _flipped(text, 0),
    "full places of the wrong phase": lambda text: _flipped(text, 1),
    "places are not given back": _without("mbarrier.arrive.shared::cta.b64 _", 0),
    "the last place is not given back": _without("mbarrier.arrive.shared::cta.b64 _", 1),
    "bytes are not announced": _without("mbarrier.arrive.expect_tx"),
    "too few bytes": lambda text: re.sub(r"(expect_tx[^;]*, )%r\d+;", r"\g<1>16384;", text),
    "too many bytes": lambda text: re.sub(r"(expect_tx[^;]*, )%r\d+;", r"\g<1>24592;", text),
    "too few arrivals": lambda text: re.sub(r"(mbarrier\.init[^;]*, )%r\d+;", r"\g<1>1;", text),
    "too many arrivals": lambda text: re.sub(r"(mbarrier\.init[^;]*, )%r\d+;", r"\g<1>9;", text),
    "barriers are not published": _without("fence.mbarrier_init"),
    "maps are not fenced": _without("fence.proxy.tensormap", 1),
    "no barrier behind the beginning": _without("bar.sync"),
    "no fence before products": lambda text: text.replace("wgmma.fence.sync.aligned;", ""),
    "products are not committed": lambda text: text.replace("wgmma.commit_group.sync.aligned;", ""),
    "a place is given back too soon": lambda text: text.replace("wait_group.sync.aligned 1;", "wait_group.sync.aligned 2;"),
    "sums are not waited for": lambda text: text.replace("wgmma.wait_group.sync.aligned 0;", ""),
    "no barrier before sums are read": _without("bar.warp.sync", 0),
    "no barrier behind the reading of sums": _without("bar.warp.sync", 1),
    "another row of A": lambda text: _coordinate(text, 0),
    "another row of B": lambda text: _coordinate(text, 1),
}  # fmt: skip


ARRIVAL = "mbarrier.arrive.release.cluster"
CLUSTER_MUTATIONS: dict[str, Callable[[str], str]] = {
    "places are not given back": _without(ARRIVAL, 0),
    "places are given back to one block only": lambda text: re.sub(r"(mapa[^;]*, )%r\d+;", r"\g<1>0;", text),
    "the last place is given back to one block only": lambda text: _changed(text, r"mapa[^;]*, (%r\d+);", 1, "shr.u32"),
    "arrivals of one block": lambda text: re.sub(r"(mbarrier\.init[^;]*, )%r\d+;", r"\g<1>8;", text),
    "no meeting at the beginning": lambda text: _without("barrier.cluster.wait")(_without("barrier.cluster.arrive")(text)),
    "no meeting at the end": lambda text: _without("barrier.cluster.wait", 1)(_without("barrier.cluster.arrive", 1)(text)),
    "tiles for this block only": lambda text: re.sub(r"\.multicast::cluster ([^;]*), %rs\d+;", r" \g<1>;", text),
    "another row of B": lambda text: _changed(text, r"cp\.async\.bulk[^;{]*multicast[^;{]*\{%r\d+, (%r\d+)", 0, "add.s32"),
}  # fmt: skip


def _changed(text: str, pattern: str, which: int, change: str) -> str:
    """The operand that the pattern's group finds is replaced by a changed one."""
    place = list(re.finditer(pattern, text))[which]
    before, inside, after = text[: place.start()], text[place.start() : place.start(1)], text[place.end(1) :]
    return f"{before}{change} %r99999, {place[1]}, 1; {inside}%r99999{after}"


def _flipped(text: str, which: int) -> str:
    return _changed(text, r"mbarrier\.try_wait[^;]*, (%r\d+);", which, "xor.b32")


def _coordinate(text: str, which: int) -> str:
    return _changed(text, r"cp\.async\.bulk\.tensor[^;]*\{%r\d+, (%r\d+)", which, "add.s32")


# Several tiles for each block, and more steps than the ring has places.
MUTATED = {TWO_GROUPS: (131, 70, 600), TWO_BLOCKS: (131, 150, 600)}


@pytest.mark.parametrize("tile", MUTATED, ids=["two groups", "two blocks"])
@pytest.mark.parametrize("schedule", ["together", "warps"])
def test_what_is_mutated_is_right(tile: Tile, schedule: str) -> None:
    assert difference(ptx("f16", tile), "f16", tile, MUTATED[tile], schedule=schedule) <= limit("f16")


@pytest.mark.parametrize(
    ("tile", "mutation"), [(TWO_GROUPS, m) for m in MUTATIONS] + [(TWO_BLOCKS, m) for m in CLUSTER_MUTATIONS]
)
def test_mutations_are_noticed(tile: Tile, mutation: str) -> None:
    text = ptx("f16", tile)
    changed = (MUTATIONS if tile is TWO_GROUPS else CLUSTER_MUTATIONS)[mutation](text)
    assert changed != text
    for schedule in ("together", "warps"):
        try:
            found = difference(changed, "f16", tile, MUTATED[tile], schedule=schedule)
        except PtxError:
            return
        if not found <= limit("f16"):
            return
    raise AssertionError("the results are right")


# ------------------------------------------------------------------------------------------------ whole modules


def _model(rows: Any, depth: int, columns: int) -> tuple[Any, Array]:
    """relu(x w + b) of float16, and w with b below it."""
    weights = np.random.default_rng(5).standard_normal((depth + 1, columns)).astype(np.float16)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["a"]),
             helper.make_node("Relu", ["a"], ["y"])]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [rows, depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [rows, columns])],
        [numpy_helper.from_array(weights[:-1], "w"), numpy_helper.from_array(weights[-1], "b")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), weights


def _expected(x: Array, weights: Array) -> Array:
    exact = x.astype(np.float64) @ weights[:-1].astype(np.float64)
    return np.maximum(exact.astype(np.float16) + weights[-1], 0)


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products take a tile of the copy engine wherever it can bring their operands."""
    usual = cuda_tiles.product_ways

    def ways(*sizes: Any, maps: bool = False) -> tuple[tuple[Tile, int], ...]:
        return ((ONE_GROUP, 1),) if maps else usual(*sizes)

    monkeypatch.setattr(cuda_tiles, "product_ways", ways)


def _chosen(module: Any) -> set[str]:
    return {ALL_TILES[dict(k.constants)["TILE"]].unit for k in module.program.kernels if hasattr(k, "template")}


def test_a_module_places_its_maps(preferred: None, tmp_path: Path) -> None:
    """For each set of sizes, and where it was loaded from a file."""
    proto, weights = _model("n", 72, 40)
    module = minicc.compile(proto, target="cuda:sm_90", strict=True)
    assert _chosen(module) == {"tma"}
    module.save(tmp_path / "m.minicc")
    loaded = minicc.load(tmp_path / "m.minicc", trust=True)
    rng = np.random.default_rng(2)
    for one in (module, loaded):
        with pretended(module):
            one.prepare()
            for n in (70, 3, 70):
                x = rng.standard_normal((n, 72)).astype(np.float16)
                np.testing.assert_allclose(one(x), _expected(x, weights), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("depth", [72, 70])
def test_rows_that_are_not_aligned_keep_the_usual_form(preferred: None, depth: int) -> None:
    proto, weights = _model(20, depth, 24)
    module = minicc.compile(proto, target="cuda:sm_90", strict=True)
    assert (_chosen(module) == {"tma"}) == (depth % 8 == 0)
    x = np.random.default_rng(3).standard_normal((20, depth)).astype(np.float16)
    np.testing.assert_allclose(run_module(module, {"x": x})[0], _expected(x, weights), rtol=2e-3, atol=2e-3)


def test_rows_that_run_backwards_keep_the_usual_form(preferred: None) -> None:
    backwards = helper.make_node("Slice", ["x", "begin", "end", "axes", "steps"], ["r"])
    nodes = [backwards, helper.make_node("MatMul", ["r", "w"], ["y"])]
    one = {name: numpy_helper.from_array(np.array([v], np.int64), name) for name, v in
           (("begin", -1), ("end", -(1 << 40)), ("axes", 0), ("steps", -1))}  # fmt: skip
    w = np.random.default_rng(4).standard_normal((64, 24)).astype(np.float16)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [20, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [20, 24])], [*one.values(), numpy_helper.from_array(w, "w")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    module = minicc.compile(proto, target="cuda:sm_90", strict=True)
    assert _chosen(module) == {"mma"}
    x = np.random.default_rng(3).standard_normal((20, 64)).astype(np.float16)
    np.testing.assert_allclose(run_module(module, {"x": x})[0], x[::-1].astype(np.float32) @ w, rtol=2e-3, atol=2e-3)


def test_the_choice_of_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    aligned = {"ELEMENT": "bf16", "PIECE": 16, "B_PIECE": 16}
    assert takes_maps(aligned, HOPPER) and not takes_maps(aligned, AMPERE)
    for change in ({"ELEMENT": "f32"}, {"PIECE": 8}, {"B_PIECE": 4}):
        assert not takes_maps({**aligned, **change}, HOPPER)
    sizes = ("bf16", 4096, 4096, 4096, 1, HOPPER)
    assert choose_product(*sizes, maps=True)[0].unit == "wgmma"
    assert "tma" in {tile.unit for tile, _ in product_ways(*sizes, maps=True)}  # for timing to choose
    assert "tma" not in {tile.unit for tile, _ in product_ways(*sizes)}
    monkeypatch.setattr(cuda_tiles, "PREFER_TMA", True)
    assert choose_product(*sizes, maps=True)[0].unit == "tma" and choose_product(*sizes)[0].unit == "wgmma"
    assert choose_product("bf16", 1, 4096, 4096, 1, HOPPER, maps=True)[0].unit == "dot"


@pytest.mark.parametrize("change", [{"SPLITS": 2}, {"PIECE": 8}, {"B_PIECE": 8}, {"ELEMENT": "f32"}])
def test_constants_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    given = {"ELEMENT": "f16", "TILE": ALL_TILES.index(ONE_GROUP), "SPLITS": 1, "PIECE": 16, "B_PIECE": 16, "B_ROUNDS": 0}
    cuda_tiles.product_constants(given)
    with pytest.raises(LookupError):
        cuda_tiles.product_constants({**given, **change})


@given(m=st.integers(0, 10000), n=st.integers(1, 10000), k=st.integers(0, 5000), b0=st.integers(1, 4),
       tile=st.sampled_from(TMA_TILES), element=st.sampled_from(ELEMENTS))  # fmt: skip
def test_launches_cover_the_result_and_maps_are_valid(m: int, n: int, k: int, b0: int, tile: Tile, element: str) -> None:
    row = -(-k * SIZES[element] // 16) * 16 // SIZES[element]
    values = {"A": 4096, "B": 8192, "M": m, "N": n, "K": k, "A_ROW": row, "A_B0": m * row, "B_ROW": row, "B0": b0, "B1": 1}
    words = {name: values.get(name, 0) for name in TEMPLATES["gemm"].words}
    given = {"ELEMENT": element, "TILE": ALL_TILES.index(tile), "SPLITS": 1, "PIECE": 16, "B_PIECE": 16}
    launch = launch_gemm(words, given, HOPPER)
    rows = tile.rows * tile.cluster
    assert 0 <= words["ROW_TILES"] * rows - m < rows and 0 <= words["PANELS"] * tile.columns - n < tile.columns
    tiles = words["ROW_TILES"] * words["PANELS"] * b0 * tile.cluster
    assert launch.grid == (min(tiles, HOPPER.multiprocessors), 1, 1) and launch.block == tile.threads
    assert launch.shared_bytes <= HOPPER.shared_bytes
    a, b = (ptx_tma.decode(ptx_tma.encode(map_)) for map_ in launch.maps)
    assert [map_.word for map_ in launch.maps] == [0, 1]
    assert (a.address, a.extents[3], b.address, b.extents[2:]) == (4096, b0 if m * row else 1, 8192, (1, 1))


# --------------------------------------------------------------------------------------------- the driver's encoding


def driver_function(seen: list[Any], steps_last: bool) -> Any:
    """What stands for a function of the driver: it notes what it is given, and refuses addresses of 0."""
    array = ctypes.POINTER(ctypes.c_uint32)
    several = [array, array, *[ctypes.c_uint32] * 2, array] if steps_last else [array, array]
    wide = ctypes.POINTER(ctypes.c_uint64)
    kinds = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64, wide, wide, *several, *[ctypes.c_int] * 4]

    def function(target: int, kind: int, rank: int, address: int, extents: Any, strides: Any, *rest: Any) -> int:
        own = [item if isinstance(item, int) else np.array(item[:4], np.uint32).view(np.int32).tolist() for item in rest]
        seen.append([target % 64, kind, rank, address, extents[:rank], strides[: rank - 1], *own])
        ctypes.memset(target, 7, MAP_BYTES)
        return 0 if address else 1

    return ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(function)


def test_maps_are_given_to_the_driver() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    swizzle = int(driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B)
    promotion = int(driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B)
    kinds = driver.CUtensorMapDataType
    seen: list[Any] = []
    made = {TILED: driver_function(seen, False), WINDOWS: driver_function(seen, True)}

    def find(name: str, version: int) -> int:
        assert version == 12000
        return ctypes.cast(made[name], ctypes.c_void_p).value or 0

    tiled = TensorMap(0, 1 << 40, "tf32", (40, 5, 1, 2), (160, 16, 800), (32, 128, 1, 1))
    assert encode(tiled, find) == b"\7" * MAP_BYTES
    common = [0, int(kinds.CU_TENSOR_MAP_DATA_TYPE_TFLOAT32), 4, 1 << 40, [40, 5, 1, 2], [160, 16, 800]]
    assert seen.pop() == [*common, [32, 128, 1, 1], [1, 1, 1, 1], 0, swizzle, promotion, 0]
    windows = replace(tiled, element="bf16", box=(64, 128), positions=Positions((-1, -2), (-3, 4), (2, 5)))
    assert encode(windows, find) == b"\7" * MAP_BYTES
    common[1] = int(kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16)
    (*first, lower, upper, channels, pixels, steps), switches = seen[0][:-4], seen[0][-4:]
    assert (first, lower[:2], upper[:2], channels, pixels) == (common, [-1, -2], [-3, 4], 64, 128)
    assert (steps, switches) == ([1, 2, 5, 1], [0, swizzle, promotion, 0])
    with pytest.raises(TargetError, match="Tiled failed with code 1"):
        encode(replace(tiled, address=0), find)


def test_types_of_elements_in_maps() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    names = {"s8": "UINT8", "u8": "UINT8", "f16": "UINT16", "bf16": "UINT16", "tf32": "TFLOAT32"}
    from minicc.runtime.cuda import maps

    found = {e: int(getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{name}")) for e, name in names.items()}
    assert found == maps._TYPES
