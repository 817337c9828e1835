"""Stream-K on CUDA: shares of blocks, results in the interpreter in any order of blocks, faults, whole modules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

import minicc
from benchmarks.cuda_build import conv_text, gemm_text, machine_text
from minicc.codegen.cuda import compile_cubin, compile_ptx, find_tool
from minicc.kernels import cuda_tiles
from minicc.kernels.cuda_launch import COUNTER_BYTES, MOST_COUNTED
from minicc.kernels.cuda_tiles import (
    ALL_TILES,
    GROUP_TILES,
    ROW,
    SIZES,
    STREAM,
    TENSOR_TILES,
    Tile,
    choose_tile,
    launch_gemm,
    pack_filters,
    pack_right,
    tile_ways,
    tiles_of,
)
from minicc.kernels.template import TEMPLATES
from minicc.lower.kernel import TemplateKernel
from minicc.runtime.module import CompiledModule
from minicc.targets.cuda import CudaTarget
from tests.cuda.modules import pretended, reference
from tests.cuda.ptx_interpreter import Memory, PtxError, run
from tests.cuda.ptx_wait import check_wait
from tests.cuda.test_conv import convolve
from tests.cuda.test_gemm import AMPERE, GROUP, HOPPER, INTEGERS, SMALL, draw, limit, multiplied, stored

Array = np.ndarray[Any, Any]
THIN = TENSOR_TILES[-1]


@lru_cache(maxsize=32)
def ptx(element: str, tile: Tile, target: CudaTarget = HOPPER) -> str:
    return compile_ptx(gemm_text(element, tile, splits=STREAM), "kernel", target)


def workspace(memory: Memory, tile: Tile, blocks: int) -> int:
    """The address of counters that are zero, and of parts that are not."""
    empty = np.full(COUNTER_BYTES + 2 * blocks * 4 * tile.rows * tile.columns, 0xFF, np.uint8)
    empty[:COUNTER_BYTES] = 0
    return memory.place(empty)


def products(text: str, element: str, tile: Tile, sizes: tuple[int, int, int], blocks: int, batches: int = 1,
             schedule: str = "together", orders: Sequence[Sequence[int]] = ((),)) -> tuple[list[Array], Array]:  # fmt: skip
    """Results of launches one after another, each with its blocks in some order, and numpy's.

    Rows of A lie a multiple of 16 bytes apart, with NaN behind the last element.
    """
    m, n, k = sizes
    rng = np.random.default_rng(m * n + k)
    row = -(-k // 16) * 16
    a, b = draw(rng, element, (batches, m, k), True), draw(rng, element, (batches, k, n), False)
    padded = np.full((batches, m, row), 99 if element in INTEGERS else np.nan, a.dtype)
    padded[..., :k] = a
    packed, memory = pack_right(stored(element, b)), Memory()
    places = [memory.place(stored(element, padded)), memory.place(packed)]
    own, found = workspace(memory, tile, blocks), []
    rows, columns = -(-m // tile.rows), -(-n // tile.columns)
    for order in orders:
        result = memory.place(np.full((batches, m, n), 77, np.int32 if element in INTEGERS else np.float32))
        words = [*places, m, n, k, row, m * row, 0, packed.shape[-1], packed[0].size, 0, batches, 1, rows, columns, result, own]
        run(text, "kernel", (blocks, 1, 1), tile.threads, tile.shared_bytes, words, memory, schedule, order=order)
        found.append(memory.read(result, (batches, m, n), np.int32 if element in INTEGERS else np.float32))
    assert not memory.read(own, (COUNTER_BYTES,), np.uint8).any(), "counters are left as they are not found"
    return found, multiplied(element, a) @ multiplied(element, b)


def error(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


@pytest.mark.parametrize(("element", "tile"), [*SMALL.items(), *((e, GROUP) for e in ("bf16", "tf32", "s8"))])
@given(m=st.integers(1, 100), n=st.integers(1, 100), k=st.integers(0, 300), batches=st.integers(1, 2),
       blocks=st.integers(1, 9), seed=st.integers(0, 99))  # fmt: skip
@settings(max_examples=3, deadline=None)
def test_ragged_shapes_and_any_number_of_blocks(
    element: str, tile: Tile, m: int, n: int, k: int, batches: int, blocks: int, seed: int
) -> None:
    """More blocks than steps among them; tiles that are whole, and such as two or many blocks make."""
    order = np.random.default_rng(seed).permutation(blocks).tolist()
    (found,), expected = products(ptx(element, tile), element, tile, (m, n, k), blocks, batches, orders=[order])
    assert error(found, expected) <= limit(element)


@pytest.mark.parametrize(("element", "tile", "target"), [("f16", THIN, AMPERE), ("f32", SMALL["f32"], HOPPER)])
def test_bits_do_not_depend_on_who_comes_last(element: str, tile: Tile, target: CudaTarget) -> None:
    orders = [range(5), range(4, -1, -1), (2, 4, 0, 3, 1)]
    found, expected = products(ptx(element, tile, target), element, tile, (17, 70, 1100 // SIZES[element]), 5, orders=orders)
    assert error(found[0], expected) <= limit(element)
    assert all(other.tobytes() == found[0].tobytes() for other in found[1:])


# How a kernel may be wrong: each changes its text, and is noticed by the interpreter or in results of one of two launches.
COUNTS = "atom.acq_rel.gpu.global.inc.u32"
FAULTS = {
    "nothing is released": lambda text: text.replace(COUNTS, COUNTS.replace("acq_rel", "acquire")),
    "nothing is acquired": lambda text: text.replace(COUNTS, COUNTS.replace("acq_rel", "release")),
    "no order at all": lambda text: text.replace(COUNTS, COUNTS.replace("acq_rel", "relaxed")),
    "the counter is not set back": lambda text: re.sub(rf"({COUNTS} before, \[%rd\d+\]), %r\d+", r"\1, 99", text),
    "one block too few": lambda text: text.replace("setp.eq.u32 p, before,", "add.u32 before, before, 1; setp.eq.u32 p, before,"),
    "every thread counts": lambda text: re.sub(r"@p (atom)", r"\1", text),
    "no barrier before the block is counted": lambda text: re.sub(r"bar\.sync 0; @p", "@p", text),
    "only thread 0 hears": lambda text: text.replace("bar.red.or.pred q, 0, p;", "mov.pred q, p; bar.sync 0;"),
    "no barrier before the next tile": lambda text: _without_last_barrier(text),
}


def _without_last_barrier(text: str) -> str:
    """Without the barrier at the end of the loop over pieces."""
    *_, chosen = re.finditer(r"(?m)^\s*bar\.sync 0;$", text)
    return text[: chosen.start()] + "\n" + text[chosen.end() :]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(fault: str) -> None:
    text = ptx("f16", THIN)
    changed = FAULTS[fault](text)
    assert changed != text

    assert right(text)
    try:
        noticed = not right(changed)
    except (PtxError, AssertionError):
        noticed = True
    assert noticed


@lru_cache
def right(text: str) -> bool:
    """Whether both launches are; three blocks make each of two tiles, one of them the end of the first and then of the second."""
    found, expected = products(text, "f16", THIN, (16, 140, 300), 5, schedule="warps", orders=(range(5), range(4, -1, -1)))
    return all(error(each, expected) <= limit("f16") for each in found)


@pytest.mark.parametrize(("element", "tile"), [("f16", GROUP), ("f32", SMALL["f32"])])
@given(blocks=st.integers(1, 6), seed=st.integers(0, 99), images=st.integers(1, 2), groups=st.integers(1, 2))
@settings(max_examples=2, deadline=None)
def test_convolutions(element: str, tile: Tile, blocks: int, seed: int, images: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    size, channels, filters = 9, 16, 70
    x = draw(rng, element, (images, 1, size, size, groups * channels), True)
    w = draw(rng, element, (groups * filters, channels, 1, 3, 3), False)
    expected = convolve(x, w, groups, [1, 2, 1], [1, 1, 1], [0, 1, 1])
    memory, out = Memory(), list(expected.shape[1:4])
    places = [memory.place(array) for array in (x, pack_filters(w, groups), np.full(expected.shape, 77, np.float32))]
    pixels, step = int(np.prod(out)), groups * channels
    tiles = (-(-images * pixels // tile.rows), -(-filters // tile.columns))
    words = [*places[:2], images, groups, pixels, filters, channels, size * size * step, 0, size * step, step, 1, size, size,
             *out, 1, 3, 3, 1, 2, 1, 1, 1, 1, 0, 1, 1, 0, *tiles, places[2], workspace(memory, tile, blocks)]  # fmt: skip
    text = compile_conv(element, tile)
    order = rng.permutation(blocks).tolist()
    shared = cuda_tiles.conv_shared_bytes(tile)
    run(text, "kernel", (blocks, 1, 1), tile.threads, shared, words, memory, order=order)
    assert error(memory.read(places[2], expected.shape, np.float32), expected) <= limit(element)


@lru_cache
def compile_conv(element: str, tile: Tile) -> str:
    return compile_ptx(conv_text(element, tile, splits=STREAM), "kernel", HOPPER)


@pytest.mark.parametrize(("target", "element"), [
    (AMPERE, "f32"), (HOPPER, "f16"), *(pytest.param(target, "", marks=pytest.mark.slow) for target in (AMPERE, HOPPER)),
])  # fmt: skip
def test_machine_code(target: CudaTarget, element: str) -> None:
    """Of the largest tile, whose last block has most sums to add; or of all tiles of all elements, and of convolutions."""
    if find_tool("ptxas") is None:
        pytest.skip("ptxas is not installed")
    all_ = [(name, tile) for name in SIZES for tile in tiles_of(name, target)]
    for name, tile in [(element, tiles_of(element, target)[0])] if element else all_:
        for text in (gemm_text, conv_text)[: 1 if element else 2]:
            built = compile_cubin(text(name, tile, splits=STREAM), "kernel", target)
            assert built.spills == 0
            at_once = cuda_tiles.at_once_of(tile, STREAM, target) if text is gemm_text else 1  # by expected registers
            assert at_once > 0 and -(-built.registers // 8) * 8 * tile.threads * at_once <= target.registers


ORDER = r"STG\S*128 .*BAR\.SYNC.*MEMBAR\.ALL\.GPU.*ATOMG\S*INC\.STRONG\.GPU.*CCTL\.IVALL.*BAR\.RED\.OR.*LDG\.\S*128 "


@pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=lambda target: target.arch)
def test_the_assembler_keeps_the_order(target: CudaTarget) -> None:
    """What is stored, counted and read; loads of parts are not of the read-only kind, and all come behind."""
    if find_tool("ptxas") is None or find_tool("cuobjdump") is None:
        pytest.skip("ptxas or cuobjdump is not installed")
    code = machine_text(compile_cubin(gemm_text("f16", THIN, splits=STREAM), "kernel", target).data)
    assert re.search(ORDER, code, re.S) and "LDG.E.128.CONSTANT" not in code
    assert code.count("ATOMG") == 1 and not re.search(r"LDG\.\S*128 ", code[: code.index("ATOMG")])


def test_blocks_without_a_share_wait_for_the_kernel_before_too() -> None:
    check_wait(ptx("f16", THIN))


@given(m=st.integers(0, 3000), n=st.integers(1, 3000), k=st.integers(0, 9000), batches=st.integers(1, 4),
       target=st.sampled_from([AMPERE, HOPPER]), element=st.sampled_from(sorted(SIZES)), data=st.data())  # fmt: skip
def test_shares(m: int, n: int, k: int, batches: int, target: CudaTarget, element: str, data: st.DataObject) -> None:
    """The blocks of a launch, each with its share of steps as kernels find it: all steps once, and memory for all parts."""
    tile = data.draw(st.sampled_from(tiles_of(element, target)))
    words = {"M": m, "N": n, "K": k, "B0": batches, "B1": 1}
    launch = launch_gemm(words, {"ELEMENT": element, "TILE": ALL_TILES.index(tile), "SPLITS": STREAM}, target)
    steps = max(1, -(-k * SIZES[element] // ROW))
    total, blocks = steps * words["ROW_TILES"] * words["PANELS"] * batches, launch.grid[0]
    assert (blocks == 0) == (total == 0) and blocks <= MOST_COUNTED
    if total:
        share = -(-total // blocks)
        assert share > min(total - 1, cuda_tiles.LEAST_STEPS // 2) and share * blocks >= total
        assert blocks <= target.multiprocessors * cuda_tiles.at_once_of(tile, STREAM, target)
        cut = {at // steps for at in range(share, total, share) if at % steps}
        firsts = {number * steps // share for number in cut}
        assert len(firsts) == len(cut), "two tiles would have one counter"
    assert launch.workspace == COUNTER_BYTES + 2 * blocks * 4 * tile.rows * tile.columns


def test_nothing_is_cut_so_before_a_gpu_has_shown_that_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(16, 4096, 4096), (512, 768, 3072), (392, 2048, 512)]
    for target in (AMPERE, HOPPER):
        assert all(choose_tile("bf16", *shape, 1, target)[1] != STREAM for shape in shapes)
        assert all(STREAM in dict(map(reversed, tile_ways("bf16", *shape, 1, target))) for shape in shapes)
    monkeypatch.setattr(cuda_tiles, "PREFER_STREAM", True)
    assert any(choose_tile("bf16", *shape, 1, AMPERE)[1] == STREAM for shape in shapes)


def network() -> ModelProto:
    """A convolution and two products with functions behind them, of any number of rows."""
    rng = np.random.default_rng(5)
    shapes = {"k": (12, 8, 3, 3), "w": (12 * 36, 50), "v": (50, 9)}
    weights = [numpy_helper.from_array((rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32), n) for n, s in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Flatten", ["c"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "w"], ["p"], "product"),
        helper.make_node("Tanh", ["p"], ["t"], "tanh"),
        helper.make_node("MatMul", ["t", "v"], ["y"], "small"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 9])
    graph = helper.make_graph(nodes, "network", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_whole_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sizes known at run time only; launches of one plan share memory, and leave it fit for the next call."""
    monkeypatch.setattr(cuda_tiles, "LEAST_STEPS", 1)
    monkeypatch.setattr(cuda_tiles, "_leads", lambda way: way[1] == STREAM and way[0].rows <= 16)
    proto = network()
    compiled = minicc.compile(proto, target="cuda:sm_90", strict=True, winograd=False)
    compiled.save(tmp_path / "m.minicc")
    loaded = minicc.load(tmp_path / "m.minicc")
    for module in (compiled, loaded):
        assert isinstance(module, CompiledModule)
        kernels = [kernel for kernel in module.program.kernels if isinstance(kernel, TemplateKernel)]
        assert [dict(kernel.constants)["SPLITS"] for kernel in kernels] == [STREAM] * len(kernels) and len(kernels) >= 2
    with pretended(loaded):
        for rows in (2, 1, 2):
            x = np.random.default_rng(rows).standard_normal((rows, 8, 6, 6), np.float32)
            (want,) = reference(proto, {"x": x})
            np.testing.assert_allclose(loaded(x), want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_other_constants_are_refused() -> None:
    given = {"ELEMENT": "f16", "TILE": ALL_TILES.index(GROUP_TILES[0]), "SPLITS": STREAM, "PIECE": 16, "B_PIECE": 16,
             "B_ROUNDS": 0}  # fmt: skip
    cuda_tiles.product_constants(given)
    for number in (ALL_TILES.index(cuda_tiles.TMA_TILES[0]), ALL_TILES.index(cuda_tiles.DOT_TILES[0])):
        with pytest.raises(LookupError):
            cuda_tiles.product_constants({**given, "TILE": number})
    assert "COUNTERS" not in TEMPLATES["gemm"].words
