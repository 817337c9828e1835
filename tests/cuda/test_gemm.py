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

from benchmarks.cuda_build import machine_text, render
from minicc.codegen.cuda import compile_cubin, compile_ptx, find_tool
from minicc.kernels.cuda_tiles import (
    SIZES,
    Tile,
    choose_tile,
    constants,
    launch_conv,
    launch_gemm,
    pack_right,
    piece_of,
    tiles_of,
)
from minicc.targets.cuda import parse_cuda_target
from tests.cuda.ptx_interpreter import Memory, PtxError, run

Array = np.ndarray[Any, Any]
SMALL = {element: tiles_of(element)[-2] for element in SIZES}
INTEGERS = ("s8", "u8")
# Instructions that a kernel must have; "f32" must not round.
INSTRUCTIONS = {
    "f32": ("FFMA", "LDGSTS", "LDS.128"), "tf32": ("HMMA.1688.F32.TF32", "LDGSTS", "LDSM"),
    "f16": ("HMMA.16816.F32 ", "LDGSTS", "LDSM"), "bf16": ("HMMA.16816.F32.BF16", "LDGSTS", "LDSM"),
    "s8": ("IMMA.16832.S8.S8", "LDGSTS", "LDSM"), "u8": ("IMMA.16832.U8.S8", "LDGSTS", "LDSM"),
}  # fmt: skip


@lru_cache(maxsize=64)
def ptx(element: str, tile: Tile, piece: int = 16) -> str:
    return compile_ptx(text_of(element, tile, piece), "kernel", parse_cuda_target("cuda:sm_90"))


def text_of(element: str, tile: Tile, piece: int = 16) -> str:
    changes = {"ptr_f32": "ptr_i32"} if element in INTEGERS else {}
    return render("gemm", constants(element, tile, piece), changes)


def draw(rng: np.random.Generator, element: str, shape: tuple[int, ...], left: bool) -> Array:
    """Numbers that the element type represents; bf16 and tf32 as float32 with 8 and 11 significant bits."""
    if element in INTEGERS:
        signed = element == "s8" or not left
        return rng.integers(-128, 128, shape).astype(np.int8) if signed else rng.integers(0, 256, shape).astype(np.uint8)
    numbers = rng.standard_normal(shape, np.float32)
    if element == "f16":
        return numbers.astype(np.float16)
    bits = {"f32": 0, "tf32": 13, "bf16": 16}[element]
    return (numbers.view(np.uint32) >> np.uint32(bits) << np.uint32(bits)).view(np.float32)


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
    words = [*places[:2], m, n, k, k + extra, m * (k + extra), 0, packed[0].size, 0, batches, 1, rows, columns, places[2]]
    run(text, "kernel", (rows * columns * batches, 1, 1), tile.threads, tile.shared_bytes, words, memory, schedule)
    expected = a[..., :k].astype(np.float64) @ b.astype(np.float64)
    return float(np.abs(memory.read(places[2], result.shape, result.dtype) - expected).max() / np.abs(expected).max())


def limit(element: str) -> float:
    return 0.0 if element in INTEGERS else 2e-6


@pytest.mark.parametrize("element", SIZES)
@given(m=st.integers(1, 100), n=st.integers(1, 100), k=st.integers(1, 150), extra=st.integers(0, 9), batches=st.integers(1, 2))
@settings(max_examples=4, deadline=None)
def test_ragged_shapes(element: str, m: int, n: int, k: int, extra: int, batches: int) -> None:
    size = SIZES[element]
    piece = piece_of(size * (k + extra), size * k)
    found = difference(ptx(element, SMALL[element], piece), element, SMALL[element], (m, n, k), extra, batches, piece=piece)
    assert found <= limit(element)


@pytest.mark.parametrize(("element", "tile"), [(e, t) for e in ("f32", "f16") for t in tiles_of(e)])
def test_every_tile(element: str, tile: Tile) -> None:
    sizes = (tile.rows + 3, tile.columns + 5, 3 * 128 // SIZES[element])
    assert difference(ptx(element, tile), element, tile, sizes) <= limit(element)


@pytest.mark.parametrize("model", ["sm_80", "sm_90"])
@pytest.mark.parametrize("element", SIZES)
def test_machine_code(element: str, model: str) -> None:
    if find_tool("ptxas") is None or find_tool("cuobjdump") is None:
        pytest.skip("ptxas or cuobjdump is not installed")
    every = model == "sm_90" and element in ("f32", "f16")
    for tile in tiles_of(element) if every else tiles_of(element)[:1]:
        built = compile_cubin(text_of(element, tile), "kernel", parse_cuda_target(f"cuda:{model}"))
        assert built.spills == 0
        assert built.registers * tile.threads <= 65536
        code = machine_text(built.data)
        for instruction in INSTRUCTIONS[element]:
            assert instruction in code, instruction


MUTATIONS = {
    "no barrier between copy and product": lambda text: _without(text, "bar.sync", 0),
    "no barrier before the sums": lambda text: _without(text, "bar.sync", 1),
    "no barrier behind the sums": lambda text: _without(text, "bar.sync", 2),
    "a looser wait": lambda text: text.replace("cp.async.wait_group 2;", "cp.async.wait_group 3;"),
    "no wait": lambda text: re.sub(r"cp\.async\.wait_group \d;", "", text),
    "no zeros behind the depth": lambda text: re.sub(r"(cp\.async\.cg[^;]*, 16), %r\d+;", r"\1;", text),
    "no guard around stores": lambda text: _without(text, "@%p", -1),
}  # fmt: skip


def _without(text: str, start: str, which: int) -> str:
    places = list(re.finditer(rf"(?m)^\s*{re.escape(start)}[^;]*;", text))
    chosen = places[which]
    return text[: chosen.start()] + "\n" + text[chosen.end() :]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_noticed(mutation: str) -> None:
    text = ptx("f16", SMALL["f16"])
    changed = MUTATIONS[mutation](text)
    assert changed != text
    sizes = (67, 70, 264)  # its last step reads the memory that sums are stored to
    assert difference(text, "f16", SMALL["f16"], sizes, schedule="warps") <= limit("f16")
    try:
        found = difference(changed, "f16", SMALL["f16"], sizes, schedule="warps")
    except PtxError:
        return
    assert not found <= limit("f16")


def test_the_choice_of_a_tile_follows_the_work() -> None:
    assert choose_tile("f16", 4096, 4096, 1, 132).rows >= 128
    assert choose_tile("f16", 1, 4096, 1, 132).rows == 16
    assert choose_tile("f16", 256, 256, 1, 132).rows <= 64


@given(m=st.integers(1, 1000), n=st.integers(1, 1000), batches=st.integers(1, 5))
def test_launches_cover_the_result_once(m: int, n: int, batches: int) -> None:
    tile = choose_tile("f16", m, n, batches, 132)
    gemm = {"M": m, "N": n, "B0": batches, "B1": 1}
    conv = {"IMAGES": 1, "M": m, "N": n, "GROUPS": batches}
    for words, launch in ((gemm, launch_gemm(gemm, tile)), (conv, launch_conv(conv, tile))):
        assert 0 <= words["ROW_TILES"] * tile.rows - m < tile.rows
        assert 0 <= words["PANELS"] * tile.columns - n < tile.columns
        assert launch.grid == (words["ROW_TILES"] * words["PANELS"] * batches, 1, 1)
        assert launch.block == tile.threads
        assert launch.shared_bytes <= 227 << 10
