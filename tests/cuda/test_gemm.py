"""CUDA matrix products: machine code without spills, results in the interpreter, and mutations that must be noticed."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

from benchmarks.cuda_build import gemm_text, machine_text
from minicc.codegen.cuda import compile_cubin, compile_ptx, find_tool
from minicc.kernels.cuda_tiles import (
    ALL_TILES,
    GROUP_TILES,
    SIZES,
    SPLITS,
    Tile,
    choose_tile,
    launch_conv,
    launch_gemm,
    pack_right,
    piece_of,
    tiles_of,
)
from minicc.targets.cuda import CudaTarget, parse_cuda_target
from tests.cuda.ptx_interpreter import Memory, PtxError, run

Array = np.ndarray[Any, Any]
HOPPER, AMPERE = parse_cuda_target("cuda:sm_90"), parse_cuda_target("cuda:sm_80")
# Shapes of the target, and of an element type one for a warp and one for four.
SMALL = {element: tiles_of(element, AMPERE)[-2] for element in SIZES}
GROUP, TWO_GROUPS = GROUP_TILES[-1], GROUP_TILES[3]
INTEGERS = ("s8", "u8")
# Instructions that a kernel must have; "f32" must not round.
INSTRUCTIONS = {
    "f32": ("FFMA", "LDGSTS", "LDS.128"), "tf32": ("HMMA.1688.F32.TF32", "LDGSTS", "LDSM"),
    "f16": ("HMMA.16816.F32 ", "LDGSTS", "LDSM"), "bf16": ("HMMA.16816.F32.BF16", "LDGSTS", "LDSM"),
    "s8": ("IMMA.16832.S8.S8", "LDGSTS", "LDSM"), "u8": ("IMMA.16832.U8.S8", "LDGSTS", "LDSM"),
}  # fmt: skip
GROUP_INSTRUCTIONS = {
    "tf32": "HGMMA.64x256x8.F32.TF32", "f16": "HGMMA.64x256x16.F32 ", "bf16": "HGMMA.64x256x16.F32.BF16",
    "s8": "IGMMA.64x256x32.S8.S8", "u8": "IGMMA.64x256x32.U8.S8",
}  # fmt: skip


@lru_cache(maxsize=64)
def ptx(element: str, tile: Tile, piece: int = 16, splits: int = 1) -> str:
    return compile_ptx(gemm_text(element, tile, piece, splits), "kernel", HOPPER)


def draw(rng: np.random.Generator, element: str, shape: tuple[int, ...], left: bool) -> Array:
    """Numbers that the element type represents; bf16 as float32 with 8 significant bits, tf32 with all of them."""
    if element in INTEGERS:
        signed = element == "s8" or not left
        return rng.integers(-128, 128, shape).astype(np.int8) if signed else rng.integers(0, 256, shape).astype(np.uint8)
    numbers = rng.standard_normal(shape, np.float32)
    if element == "f16":
        return numbers.astype(np.float16)
    bits = 16 if element == "bf16" else 0
    return (numbers.view(np.uint32) >> np.uint32(bits) << np.uint32(bits)).view(np.float32)


def multiplied(element: str, numbers: Array) -> Array:
    """What products see of numbers: those of tf32 rounded to 11 significant bits, halves away from zero."""
    if element == "tf32":
        numbers = ((numbers.view(np.uint32) + np.uint32(0x1000)) >> np.uint32(13) << np.uint32(13)).view(np.float32)
    return numbers.astype(np.float64)


def stored(element: str, numbers: Array) -> Array:
    return (numbers.view(np.uint32) >> np.uint32(16)).astype(np.uint16) if element == "bf16" else numbers


def difference(
    text: str,
    element: str,
    tile: Tile,
    sizes: tuple[int, int, int],
    extra: int = 0,
    batches: int = 1,
    schedule: str = "together",
    piece: int = 16,
    splits: int = 1,
) -> float:
    """Largest difference from numpy, relative to the largest result, over random operands; rows of A lie K + extra apart."""
    m, n, k = sizes
    rng = np.random.default_rng(m * n + k)
    a, b = draw(rng, element, (batches, m, k + extra), True), draw(rng, element, (batches, k, n), False)
    packed = pack_right(stored(element, b))
    memory = Memory()
    result = np.full((batches, m, n), 77, np.int32 if element in INTEGERS else np.float32)
    # The stride between batches covers whole rows; the array starts as unaligned as the kernel allows.
    places = [memory.place(stored(element, a), piece % 16), memory.place(packed), memory.place(result)]
    rows, columns = -(-m // tile.rows), -(-n // tile.columns)
    row, batch = packed.shape[-1], packed[0].size
    words = [*places[:2], m, n, k, k + extra, m * (k + extra), 0, row, batch, 0, batches, 1, rows, columns, places[2]]
    run(text, "kernel", (rows * columns * batches * splits, 1, 1), tile.threads, tile.shared_bytes, words, memory, schedule)
    expected = multiplied(element, a)[..., :k] @ multiplied(element, b)
    return float(np.abs(memory.read(places[2], result.shape, result.dtype) - expected).max() / np.abs(expected).max())


def limit(element: str) -> float:
    return 0.0 if element in INTEGERS else 2e-6


@pytest.mark.parametrize(("element", "tile"), [*SMALL.items(), *((e, GROUP) for e in ("f16", "tf32", "s8"))])
@given(m=st.integers(1, 100), n=st.integers(1, 100), k=st.integers(1, 150), extra=st.integers(0, 9), batches=st.integers(1, 2))
@settings(max_examples=4, deadline=None)
def test_ragged_shapes(element: str, tile: Tile, m: int, n: int, k: int, extra: int, batches: int) -> None:
    size = SIZES[element]
    piece = piece_of(size * (k + extra))
    found = difference(ptx(element, tile, piece), element, tile, (m, n, k), extra, batches, piece=piece)
    assert found <= limit(element)


@pytest.mark.parametrize(("element", "tile"), [("f16", GROUP), ("s8", SMALL["s8"]), ("f32", SMALL["f32"])])
@given(m=st.integers(1, 70), n=st.integers(1, 70), k=st.integers(1, 300), splits=st.sampled_from(SPLITS[1:]))
@settings(max_examples=3, deadline=None)
def test_shared_depths(element: str, tile: Tile, m: int, n: int, k: int, splits: int) -> None:
    piece = piece_of(SIZES[element] * k)
    found = difference(ptx(element, tile, piece, splits), element, tile, (m, n, k), piece=piece, splits=splits)
    assert found <= limit(element)


@pytest.mark.parametrize("which", range(4))
def test_a_cluster_without_one_of_its_barriers_is_noticed(which: int) -> None:
    """Each of two barriers is an arrival and a wait."""
    start = ("barrier.cluster.arrive", "barrier.cluster.wait")[which % 2]
    text = ptx("f16", GROUP, 16, 2)
    changed = _without(text, start, which // 2)
    assert difference(text, "f16", GROUP, (67, 70, 264), splits=2) <= limit("f16")
    try:
        found = difference(changed, "f16", GROUP, (67, 70, 264), splits=2)
    except PtxError:
        return
    assert not found <= limit("f16")


@pytest.mark.slow
@pytest.mark.parametrize(("element", "tile"), [(e, t) for e in ("f32", "f16") for t in tiles_of(e, HOPPER)])
def test_every_tile(element: str, tile: Tile) -> None:
    sizes = (tile.rows + 3, tile.columns + 5, 3 * 128 // SIZES[element])
    assert difference(ptx(element, tile), element, tile, sizes) <= limit(element)


@pytest.mark.parametrize("element", ["f32", "f16", pytest.param("", marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=lambda target: target.arch)
def test_machine_code(element: str, target: CudaTarget) -> None:
    if find_tool("ptxas") is None or find_tool("cuobjdump") is None:
        pytest.skip("ptxas or cuobjdump is not installed")
    tiles = [(element, tiles_of(element, target)[0])] if element else [(e, t) for e in SIZES for t in tiles_of(e, target)]
    for name, tile in tiles:
        built = compile_cubin(gemm_text(name, tile), "kernel", target)
        assert built.spills == 0
        assert built.registers * tile.threads <= 65536
        code = machine_text(built.data)
        wanted = INSTRUCTIONS[name]
        if tile.unit == "wgmma":
            wanted = ("LDGSTS", GROUP_INSTRUCTIONS[name].replace("x256x", f"x{tile.columns}x"))
        for instruction in wanted:
            assert instruction in code, instruction


MUTATIONS = {
    "no barrier between copy and product": lambda text: _without(text, "bar.sync", 0),
    "no barrier before the sums": lambda text: _without(text, "bar.sync", 1),
    "no barrier behind the sums": lambda text: _without(text, "bar.sync", 2),
    "a looser wait": lambda text: text.replace("cp.async.wait_group 2;", "cp.async.wait_group 3;"),
    "no wait": lambda text: re.sub(r"cp\.async\.wait_group \d;", "", text),
    "no zeros behind the depth": lambda text: re.sub(r"(cp\.async\.cg[^;]*), 16, %r\d+;", r"\1, 16, 16;", text),
    "no guard around stores": lambda text: _without(text, f"@%p{_guard(text)}", 0),
}
GROUP_MUTATIONS = {
    "a tile is not published": lambda text: text.replace("fence.proxy.async.shared::cta;", ""),
    "no fence before products": lambda text: text.replace("wgmma.fence.sync.aligned;", ""),
    "products are not committed": lambda text: text.replace("wgmma.commit_group.sync.aligned;", ""),
    "a tile is overwritten too soon": lambda text: text.replace("wait_group.sync.aligned 1", "wait_group.sync.aligned 2"),
    "sums are not waited for": lambda text: text.replace("wgmma.wait_group.sync.aligned 0;", ""),
    "no barrier": lambda text: _without(text, "bar.sync", 0),
    "a looser wait": lambda text: text.replace("cp.async.wait_group 1;", "cp.async.wait_group 2;"),
}  # fmt: skip


def _guard(text: str) -> str:
    """Number and target of the branch over all stores: the first one to the end."""
    end = re.search(r"(\$L\w+):\s*ret;", text)
    assert end is not None
    found = re.search(rf"@%p(\d+ bra \s*{re.escape(end[1])});", text)
    assert found is not None
    return found[1]


def _without(text: str, start: str, which: int) -> str:
    places = list(re.finditer(rf"(?m)^\s*{re.escape(start)}[^;]*;", text))
    chosen = places[which]
    return text[: chosen.start()] + "\n" + text[chosen.end() :]


@pytest.mark.parametrize(
    ("tile", "mutation"), [(SMALL["f16"], m) for m in MUTATIONS] + [(TWO_GROUPS, m) for m in GROUP_MUTATIONS]
)
def test_mutations_are_noticed(tile: Tile, mutation: str) -> None:
    text = ptx("f16", tile)
    changed = (GROUP_MUTATIONS if tile is TWO_GROUPS else MUTATIONS)[mutation](text)
    assert changed != text
    sizes = (tile.rows + 3, 70, 264 + 64)  # its last step reads the memory that sums are stored to
    assert difference(text, "f16", tile, sizes, schedule="warps") <= limit("f16")
    try:
        found = difference(changed, "f16", tile, sizes, schedule="warps")
    except PtxError:
        return
    assert not found <= limit("f16")


def test_the_choice_of_a_tile_follows_the_work() -> None:
    for target in (AMPERE, HOPPER):
        tile, splits = choose_tile("f16", 4096, 4096, 4096, 1, target)
        assert tile.rows >= 128 and splits == 1
        assert choose_tile("f16", 256, 256, 512, 1, target)[0].rows <= 64
        assert (choose_tile("f16", 49, 512, 4608, 1, target)[1] > 1) == (target is HOPPER)
    assert choose_tile("f32", 1, 4096, 4096, 1, HOPPER)[0].rows == 16
    assert choose_tile("f16", 4096, 4096, 4096, 1, HOPPER)[0].unit == "wgmma"


@given(m=st.integers(1, 1000), n=st.integers(1, 1000), batches=st.integers(1, 5))
def test_launches_cover_the_result_once(m: int, n: int, batches: int) -> None:
    tile, splits = choose_tile("f16", m, n, 256, batches, HOPPER)
    gemm = {"M": m, "N": n, "K": 256, "B0": batches, "B1": 1}
    conv = {"IMAGES": 1, "M": m, "N": n, "GROUPS": batches, "KD": 1, "KH": 1, "KW": 1, "C": 256}
    given = {"TILE": ALL_TILES.index(tile), "SPLITS": splits}
    for words, launch in ((gemm, launch_gemm(gemm, given, HOPPER)), (conv, launch_conv(conv, given, HOPPER))):
        assert 0 <= words["ROW_TILES"] * tile.rows - m < tile.rows
        assert 0 <= words["PANELS"] * tile.columns - n < tile.columns
        assert launch.grid == (words["ROW_TILES"] * words["PANELS"] * batches * splits, 1, 1)
        assert launch.block == tile.threads
        assert launch.shared_bytes <= 227 << 10
