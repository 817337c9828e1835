"""CUDA products of few rows: ragged shapes of every element type in the interpreter, machine code, and when they are chosen."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba.cuda.extending", reason="numba-cuda is not installed")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed")

import minicc
from benchmarks.cuda_build import gemm_text, machine_text
from minicc.codegen.cuda import compile_cubin, compile_ptx, find_tool
from minicc.kernels.cuda_tiles import (
    ALL_TILES,
    DOT_ELEMENTS,
    DOT_TILES,
    OTHER_DOT_TILES,
    SIZES,
    SPLITS,
    Tile,
    choose_product,
    choose_tile,
    conv_constants,
    launch_gemm,
    piece_of,
)
from tests.cuda.modules import node_model, run_module
from tests.cuda.ptx_interpreter import Memory, PtxError, run
from tests.cuda.test_gemm import AMPERE, HOPPER, draw, stored

RNG = np.random.default_rng(3)


@lru_cache(maxsize=64)
def ptx(element: str, tile: Tile, piece: int, splits: int, b_piece: int) -> str:
    return compile_ptx(gemm_text(element, tile, piece, splits, b_piece), "kernel", HOPPER)


def difference(text: str, element: str, tile: Tile, sizes: tuple[int, int, int], batches: int = 1, extra: int = 0,
               pieces: tuple[int, int] = (16, 16), splits: int = 1) -> float:  # fmt: skip
    """Largest difference from numpy relative to the largest sum of magnitudes; rows of A lie k + extra apart, B's are as short as
    their piece allows."""
    m, n, k = sizes
    rng = np.random.default_rng(m * n + k)
    a, b = draw(rng, element, (batches, m, k + extra), True), draw(rng, element, (batches, n, k), False)
    each = max(1, pieces[1] // SIZES[element])
    row = -(-k // each) * each
    packed = np.full((batches, n, row), np.nan, b.dtype)
    packed[..., :k] = b
    memory, result = Memory(), np.full((batches, m, n), 77, np.float32)
    places = [memory.place(stored(element, a), pieces[0] % 16), memory.place(stored(element, packed), pieces[1] % 16)]
    target = memory.place(result)
    words = {"A": places[0], "B": places[1], "M": m, "N": n, "K": k, "A_ROW": k + extra, "A_B0": m * (k + extra), "A_B1": 0,
             "B_ROW": row, "B_B0": n * row, "B_B1": 0, "B0": batches, "B1": 1}  # fmt: skip
    launch = launch_gemm(words, {"TILE": ALL_TILES.index(tile), "SPLITS": splits}, HOPPER)
    assert launch.grid == (words["ROW_TILES"] * words["PANELS"] * batches * splits, 1, 1)
    run(text, "kernel", launch.grid, launch.block, launch.shared_bytes, [*words.values(), target], memory, "together")
    left, right = a[..., :k].astype(np.float64), np.swapaxes(b, 1, 2).astype(np.float64)
    error = np.abs(memory.read(target, result.shape, result.dtype) - left @ right)
    return float(error.max() / (np.abs(left) @ np.abs(right)).max())


@pytest.mark.parametrize("tile", (*DOT_TILES, *OTHER_DOT_TILES), ids=lambda tile: f"{tile.rows} rows, {tile.columns} columns")
@given(
    element=st.sampled_from(DOT_ELEMENTS),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 700)),
    extra=st.integers(0, 9),
    batches=st.integers(1, 2),
    splits=st.sampled_from(SPLITS),
    b_piece=st.sampled_from([2, 4, 8, 16]),
)
@settings(max_examples=8, deadline=None)
def test_ragged_shapes(
    tile: Tile, element: str, sizes: tuple[int, int, int], extra: int, batches: int, splits: int, b_piece: int
) -> None:
    k = sizes[2]
    pieces = piece_of(SIZES[element] * (k + extra)), max(b_piece, SIZES[element])
    text = ptx(element, tile, pieces[0], splits, pieces[1])
    assert difference(text, element, tile, sizes, batches, extra, pieces, splits) < 4e-7


@pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=lambda target: target.arch)
@pytest.mark.parametrize("element", ["f32", "bf16", pytest.param("f16", marks=pytest.mark.slow)])
def test_machine_code(element: str, target: Any) -> None:
    """Every load of an operand is of 128 bits, as many on their way as a step has, and nothing is spilled."""
    if find_tool("ptxas") is None or find_tool("cuobjdump") is None:
        pytest.skip("ptxas or cuobjdump is not installed")
    for tile in (*DOT_TILES, *OTHER_DOT_TILES):
        built = compile_cubin(gemm_text(element, tile), "kernel", target)
        assert built.spills == 0 and built.registers <= 128
        code = machine_text(built.data)
        assert code.count("LDG.E.128") >= tile.stages * (tile.rows + tile.warp_columns)
        assert "FFMA" in code and "SHFL.BFLY" in code


@pytest.mark.parametrize("start", ["barrier.cluster.arrive", "barrier.cluster.wait"])
def test_a_missing_barrier_is_noticed(start: str) -> None:
    tile = DOT_TILES[0]
    text = ptx("f32", tile, 16, 2, 16)
    before, _, after = text.partition(start)
    changed = before + after.partition(";")[2]
    assert difference(text, "f32", tile, (1, 20, 1000), splits=2) < 4e-7
    try:
        found = difference(changed, "f32", tile, (1, 20, 1000), splits=2)
    except PtxError:
        return
    assert not found < 4e-7


@given(m=st.integers(1, 64), n=st.integers(1, 5000), k=st.integers(1, 5000), element=st.sampled_from(sorted(SIZES)))
def test_few_rows_of_floats_need_no_tiles(m: int, n: int, k: int, element: str) -> None:
    for target in (AMPERE, HOPPER):
        tile, splits = choose_product(element, m, n, k, 1, target)
        assert (tile.unit == "dot") == (m <= 8 and element in DOT_ELEMENTS)
        assert splits == 1 or target is HOPPER
        if tile.unit == "dot":
            assert m <= tile.rows < 2 * m
        else:
            assert (tile, splits) == choose_tile(element, m, n, k, 1, target)


def test_few_columns_share_out_the_depth() -> None:
    assert choose_product("f32", 1, 4096, 4096, 1, HOPPER)[1] == 1
    assert choose_product("f32", 1, 64, 8192, 1, HOPPER)[1] == 8
    assert choose_product("f32", 1, 64, 512, 1, HOPPER)[1] == 1


def test_convolutions_refuse_these_tiles() -> None:
    with pytest.raises(KeyError):
        conv_constants({"ELEMENT": "f32", "TILE": ALL_TILES.index(DOT_TILES[0]), "SPLITS": 1, "PIECE": 16})


def chosen(module: Any) -> Tile:
    (kernel,) = [k for k in module.program.kernels if getattr(k, "template", "") == "gemm"]
    return ALL_TILES[dict(kernel.constants)["TILE"]]


@pytest.mark.parametrize(("rows", "unit"), [(1, "dot"), (5, "dot"), (64, "fma"), ("rows", "fma")])
def test_rows_choose_the_form(rows: Any, unit: str) -> None:
    """A product with its bias; a number of rows that is not known takes tiles."""
    count = rows if isinstance(rows, int) else 3
    feeds = {"a": RNG.standard_normal((count, 75), np.float32), "b": RNG.standard_normal((75, 21), np.float32),
             "c": RNG.standard_normal(21).astype(np.float32)}  # fmt: skip
    proto = node_model("Gemm", feeds, ["y"], ("b", "c"))
    if rows != count:
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = rows
    module = minicc.compile(proto, target="cuda:sm_90", strict=True)
    assert chosen(module).unit == unit
    expected = feeds["a"].astype(np.float64) @ feeds["b"] + feeds["c"]
    np.testing.assert_allclose(run_module(module, feeds)[0], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-6), ("tf32", 1e-3), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_precisions_after_saving(precision: str, limit: float, tmp_path: Path) -> None:
    """Batches of one row by weights known and by computed ones, and a convolution of one pixel."""
    weights = RNG.standard_normal((130, 33), np.float32)
    for name, feeds, constants in (
        ("MatMul", {"a": RNG.standard_normal((1, 130), np.float32), "b": weights}, ("b",)),
        ("MatMul", {"a": RNG.standard_normal((3, 1, 130), np.float32), "b": np.stack([weights] * 3)}, ()),
        ("Conv", {"a": RNG.standard_normal((1, 130, 1, 1), np.float32), "b": weights.T[:, :, None, None].copy()}, ("b",)),
    ):
        module = minicc.compile(node_model(name, feeds, ["y"], constants), target="cuda:sm_90", precision=precision, strict=True)
        module.save(tmp_path / "m.minicc")
        loaded = minicc.load(tmp_path / "m.minicc")
        assert chosen(loaded).unit == "dot" and loaded.code.objects == module.code.objects
        wide = [array.astype(np.float64) for array in feeds.values()]
        expected = wide[0] @ wide[1] if name == "MatMul" else (wide[0][..., 0, 0] @ weights)[..., None, None]
        error = np.abs(run_module(module, feeds)[0] - expected).max() / np.abs(expected).max()
        assert error < limit
