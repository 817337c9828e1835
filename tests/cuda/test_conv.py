"""CUDA convolutions in the interpreter, against numpy."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

from benchmarks.cuda_build import conv_text, machine_text
from minicc.codegen.cuda import compile_cubin, compile_ptx, find_tool
from minicc.kernels.cuda_tiles import (
    GROUP_TILES,
    SIZES,
    Tile,
    conv_shared_bytes,
    pack_filters,
    piece_of,
    tiles_of,
)
from minicc.targets.cuda import CudaTarget, parse_cuda_target
from tests.cuda.ptx_interpreter import Memory, run

Array = np.ndarray[Any, Any]
TARGET, AMPERE = parse_cuda_target("cuda:sm_90"), parse_cuda_target("cuda:sm_80")
TYPES = {"f32": np.float32, "f16": np.float16, "s8": np.int8}
axis = st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2))


@lru_cache(maxsize=32)
def ptx(element: str, tile: Tile, piece: int, splits: int) -> str:
    return compile_ptx(conv_text(element, tile, piece, splits), "kernel", TARGET)


def draw(rng: np.random.Generator, element: str, shape: tuple[int, ...]) -> Array:
    if element == "s8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    return rng.standard_normal(shape, np.float32).astype(TYPES[element])


def convolve(x: Array, w: Array, groups: int, strides: list[int], dilations: list[int], pads: list[int]) -> Array:
    """x [images, *spatial, channels], w as ONNX's: float64 [images, *output, filters]."""
    x = np.pad(x.astype(np.float64), [(0, 0), *((p, p) for p in pads), (0, 0)])
    x = x.reshape(*x.shape[:-1], groups, -1)
    kernel = w.shape[2:]
    filters = w.astype(np.float64).reshape(groups, -1, *w.shape[1:])
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[1:], kernel, strides, dilations, strict=False)]
    total: Any = 0
    for tap in np.ndindex(*kernel):
        cut = [slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in zip(tap, dilations, out, strides, strict=True)]
        total = total + np.einsum("n...gc,goc->n...go", x[:, *cut], filters[(slice(None),) * 3 + tap])
    return np.asarray(total).reshape(x.shape[0], *out, -1)


@pytest.mark.parametrize("unit", ["wgmma", ""])
@pytest.mark.parametrize("element", TYPES)
@given(
    images=st.integers(1, 2), groups=st.integers(1, 2), channels=st.sampled_from([1, 3, 4, 16]), filters=st.integers(1, 70),
    axes=st.lists(axis, min_size=1, max_size=3), seed=st.integers(0, 99), splits=st.sampled_from([1, 1, 2]),
)  # fmt: skip
@settings(max_examples=3, deadline=None)
def test_convolutions(
    element: str, unit: str, images: int, groups: int, channels: int, filters: int, axes: list[tuple[int, ...]], seed: int,
    splits: int,
) -> None:
    axes = [(1, 1, 1, 1, 0)] * (3 - len(axes)) + [(max(n, d * (k - 1) + 1 - 2 * p), k, s, d, p) for n, k, s, d, p in axes]
    extents, kernel, strides, dilations, pads = (list(column) for column in zip(*axes, strict=True))
    rng = np.random.default_rng(seed)
    x = draw(rng, element, (images, *extents, groups * channels))
    w = draw(rng, element, (groups * filters, channels, *kernel))
    expected = convolve(x, w, groups, strides, dilations, pads)

    tile, size = tiles_of(element, TARGET)[-2], SIZES[element]
    if unit == "wgmma" and element != "f32":
        tile = GROUP_TILES[-1]
    memory = Memory()
    result = np.full(expected.shape, 77, np.int32 if element == "s8" else np.float32)
    places = [memory.place(array) for array in (x, pack_filters(w, groups), result)]
    out = list(expected.shape[1:4])
    pixels, step = int(np.prod(out)), groups * channels
    row, plane = extents[2] * step, extents[1] * extents[2] * step
    tiles = (-(-images * pixels // tile.rows), -(-filters // tile.columns))
    words = [
        *places[:2], images, groups, pixels, filters, channels, extents[0] * plane, plane, row, step,
        *extents, *out, *kernel, *strides, *dilations, *pads, 0, *tiles, places[2],
    ]  # fmt: skip
    text = ptx(element, tile, piece_of(size * channels), splits)
    run(text, "kernel", (tiles[0] * tiles[1] * groups * splits, 1, 1), tile.threads, conv_shared_bytes(tile), words, memory)
    found = memory.read(places[2], expected.shape, result.dtype)
    scale = max(np.abs(expected).max(), 1e-3)
    assert np.abs(found - expected).max() <= (0 if element == "s8" else 2e-6 * scale)


@pytest.mark.parametrize("element", [*SIZES, pytest.param("", marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", [AMPERE, TARGET], ids=lambda target: target.arch)
def test_machine_code(element: str, target: CudaTarget) -> None:
    """Of one tile, or of all tiles of all elements."""
    if find_tool("ptxas") is None or find_tool("cuobjdump") is None:
        pytest.skip("ptxas or cuobjdump is not installed")
    tiles = [(element, tiles_of(element, target)[0])] if element else [(e, t) for e in SIZES for t in tiles_of(e, target)]
    for name, tile in tiles:
        built = compile_cubin(conv_text(name, tile), "kernel", target)
        assert built.spills == 0
        assert built.registers * tile.threads <= 65536
        code = machine_text(built.data)
        assert "LDGSTS" in code
        assert ("FFMA" if name == "f32" else "GMMA." if tile.unit == "wgmma" else "MMA.") in code
