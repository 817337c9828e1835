"""CUDA convolutions whose operands the copy engine brings: results in the interpreter, mutations, modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

import minicc
from benchmarks.cuda_build import conv_text, machine_text
from minicc.codegen.cuda import compile_cubin, compile_ptx, find_tool
from minicc.kernels import cuda_tiles
from minicc.kernels.cuda_tiles import ALL_TILES, SIZES, TMA_TILES, Tile, launch_conv, pack_filters, takes_windows
from minicc.kernels.template import TEMPLATES
from tests.cuda import ptx_tma
from tests.cuda.modules import node_model, run_module
from tests.cuda.ptx_interpreter import Memory, PtxError, run
from tests.cuda.test_conv import convolve
from tests.cuda.test_gemm import HOPPER, draw, limit, multiplied, stored

Array = np.ndarray[Any, Any]
ONE_GROUP, TWO_BLOCKS = TMA_TILES[4], TMA_TILES[6]
# Of a spatial axis: input, taps, stride, dilation, padding before.
Axis = tuple[int, int, int, int, int]
AXIS = st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2))


@lru_cache(maxsize=16)
def ptx(element: str, tile: Tile) -> str:
    return compile_ptx(conv_text(element, tile), "kernel", HOPPER)


def difference(
    text: str,
    element: str,
    tile: Tile,
    images: int,
    filters: int,
    parts: int,
    axes: list[Axis],
    schedule: str = "together",
    blocks: int = 2,
) -> float:
    """Largest difference from numpy, relative to the largest result, over random operands.

    parts: channels in units of 128 bytes. axes: one or two. blocks: most blocks of the launch.
    """
    axes = [(1, 1, 1, 1, 0)] * (3 - len(axes)) + [(max(n, d * (k - 1) + 1 - 2 * p), k, s, d, p) for n, k, s, d, p in axes]
    extents, kernel, strides, dilations, pads = (list(column) for column in zip(*axes, strict=True))
    channels = parts * 128 // SIZES[element]
    rng = np.random.default_rng(filters)
    x, w = draw(rng, element, (images, *extents, channels), True), draw(rng, element, (filters, channels, *kernel), False)
    expected = convolve(multiplied(element, x), multiplied(element, w), 1, strides, dilations, pads)
    memory = Memory()
    result = np.full(expected.shape, 77, np.int32 if element == "s8" else np.float32)
    places = [memory.place(array) for array in (stored(element, x), pack_filters(stored(element, w), 1), result)]
    row, plane = extents[2] * channels, extents[1] * extents[2] * channels
    out = list(expected.shape[1:4])
    values = [*places[:2], images, 1, int(np.prod(out)), filters, channels, extents[0] * plane, plane, row, channels,
              *extents, *out, *kernel, *strides, *dilations, *pads, 0, 0, 0]  # fmt: skip
    words = dict(zip(TEMPLATES["conv"].words, values, strict=True))
    constants = {"ELEMENT": element, "TILE": ALL_TILES.index(tile), "SPLITS": 1, "PIECE": 16}
    launch = launch_conv(words, constants, replace(HOPPER, multiprocessors=blocks))
    given = [*words.values(), places[2]]
    for map_ in launch.maps:
        given[map_.word] = memory.place(np.frombuffer(ptx_tma.encode(map_), np.uint8))
    run(text, "kernel", launch.grid, launch.block, launch.shared_bytes, given, memory, schedule)
    found = memory.read(places[2], expected.shape, result.dtype)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-3))


@pytest.mark.parametrize(
    ("element", "tile"),
    [("f16", ONE_GROUP), ("bf16", TWO_BLOCKS), ("tf32", ONE_GROUP), pytest.param("s8", ONE_GROUP, marks=pytest.mark.slow)],
)
@given(images=st.integers(1, 3), filters=st.integers(1, 140), parts=st.integers(1, 2),
       axes=st.lists(AXIS, min_size=1, max_size=2), schedule=st.sampled_from(["together", "warps"]))  # fmt: skip
@settings(max_examples=4, deadline=None)
def test_convolutions(
    element: str, tile: Tile, images: int, filters: int, parts: int, axes: list[Axis], schedule: str
) -> None:
    assert difference(ptx(element, tile), element, tile, images, filters, parts, axes, schedule) <= limit(element)


@pytest.mark.parametrize("tile", [TMA_TILES[0], pytest.param(None, marks=pytest.mark.slow)])
def test_machine_code(tile: Tile | None) -> None:
    if find_tool("ptxas") is None or find_tool("cuobjdump") is None:
        pytest.skip("ptxas or cuobjdump is not installed")
    for one in TMA_TILES if tile is None else [tile]:
        built = compile_cubin(conv_text("bf16", one), "kernel", HOPPER)
        assert built.spills == 0 and built.registers * one.threads <= HOPPER.registers
        code = machine_text(built.data)
        assert f"HGMMA.64x{one.columns}x16.F32.BF16" in code and "UTMALDG.4D.IM2COL" in code


def _operand(pattern: str, change: str) -> Callable[[str], str]:
    """The operand that the pattern's group finds is replaced by a changed one."""

    def changed(text: str) -> str:
        place = re.search(pattern, text)
        assert place is not None
        before, inside, after = text[: place.start()], text[place.start() : place.start(1)], text[place.end(1) :]
        return f"{before}{change.replace('FROM', place[1])} {inside}%r99999{after}"

    return changed


IM2COL = r"cp\.async\.bulk[^;{]*im2col[^;{]*\{"
MUTATIONS: dict[str, Callable[[str], str]] = {
    "no wait for a full place": lambda text: re.sub(r"(selp\.u32 (%r\d+), 1, 0, p;)(?![\s\S]*selp\.u32 %r\d+, 1, 0, p;)",
                                                    r"\1 mov.u32 \2, 1;", text),
    "places are not given back": lambda text: re.sub(r"mbarrier\.arrive\.shared::cta\.b64 _[^;]*;", "", text),
    "another channel": _operand(IM2COL + r"(%r\d+)", "add.s32 %r99999, FROM, 1;"),
    "another column": _operand(IM2COL + r"%r\d+, (%r\d+)", "add.s32 %r99999, FROM, 1;"),
    "another line": _operand(IM2COL + r"%r\d+, %r\d+, (%r\d+)", "add.s32 %r99999, FROM, 1;"),
    "another image": _operand(IM2COL + r"%r\d+, %r\d+, %r\d+, (%r\d+)", "add.s32 %r99999, FROM, 1;"),
    "another tap": _operand(IM2COL + r"[^}]*\}\], \[%r\d+\], \{(%rs\d+)", "add.u16 %r99999, FROM, 1;"),
    "taps of other lines": _operand(IM2COL + r"[^}]*\}\], \[%r\d+\], \{%rs\d+, (%rs\d+)", "add.u16 %r99999, FROM, 1;"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", ["", *MUTATIONS])
def test_mutations_are_noticed(mutation: str) -> None:
    text = ptx("f16", ONE_GROUP)
    case: Any = ("f16", ONE_GROUP, 2, 70, 1, [(9, 3, 1, 1, 1), (9, 3, 1, 1, 1)])
    if not mutation:
        assert difference(text, *case) <= limit("f16")
        return
    changed = MUTATIONS[mutation](text)
    assert changed != text
    try:
        found = difference(changed, *case)
    except PtxError:
        return
    assert not found <= limit("f16")


@pytest.mark.parametrize("channels", [64, 40])
def test_a_module_with_such_a_convolution(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = cuda_tiles.tile_ways

    def ways(*sizes: Any, maps: bool = False) -> tuple[tuple[Tile, int], ...]:
        return ((ONE_GROUP, 1),) if maps else usual(*sizes)

    monkeypatch.setattr(cuda_tiles, "tile_ways", ways)
    rng = np.random.default_rng(1)
    x, w, b = (rng.standard_normal(s).astype(np.float16) for s in ((2, channels, 7, 9), (24, channels, 3, 3), (24,)))
    proto = node_model("Conv", {"x": x, "w": w, "b": b}, ["y"], ("w", "b"), pads=[1, 0, 1, 2], strides=[2, 1])
    module = minicc.compile(proto, target="cuda:sm_90", strict=True)
    units = {ALL_TILES[dict(k.constants)["TILE"]].unit for k in module.program.kernels if hasattr(k, "template")}
    assert (units == {"tma"}) == (channels == 64)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 2)))
    expected = convolve(padded.transpose(0, 2, 3, 1), w, 1, [2, 1], [1, 1], [0, 0]) + b
    found = run_module(module, {"x": x})[0].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-2)


def test_which_convolutions_fit_into_maps() -> None:
    given, axis = {"ELEMENT": "f16", "PIECE": 16}, (3, 1, 1, 1, 1)
    assert takes_windows(given, HOPPER, 64, [axis, axis])
    assert not takes_windows(given, HOPPER, 64, [axis] * 3) and not takes_windows(given, HOPPER, 72, [axis])
    assert not takes_windows({**given, "PIECE": 8}, HOPPER, 64, [axis])
    assert not takes_windows({**given, "ELEMENT": "f32"}, HOPPER, 64, [axis])
    for wrong in ((3, 9, 1, 1, 1), (3, 1, 64, 1, 1), (3, 1, 1, 128, 1), (3, 1, 1, -1, 0), (130, 1, 1, 0, 0)):
        assert not takes_windows(given, HOPPER, 64, [axis, wrong])
