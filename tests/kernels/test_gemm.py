"""The matrix product and its packing against numpy in float64."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.kernels import template
from minicc.kernels.domain import ceil_divide, panel_columns, product_blocks, tile_rows
from minicc.kernels.packing import pack_b
from minicc.targets.cpu import host_target
from tests.kernels.template_harness import FLOAT_EPILOGUES, TARGETS, aligned, call, check, expected_epilogue, run_fused

HOST = host_target()
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 47, 64, 65, 97]))


def product(
    shape: tuple[int, int, int, int, int],
    *,
    kind: str = "none",
    gap: int = 0,
    shared: bool = False,
    target: str = "cpu",
    columns: int | None = None,
    seed: int = 0,
    threads: int = 1,
    cuts: tuple[float, ...] = (0.4,),
) -> None:
    """Run (b0, b1, m, k, n) and compare."""
    b0, b1, m, k, n = shape
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((b0, b1, m, k + gap)).astype(np.float32)
    b = rng.standard_normal((1 if shared else b0, b1, k, n)).astype(np.float32)
    nr = columns or panel_columns(TARGETS[target], n)
    packed = aligned(pack_b(b, nr))
    whole = packed[0, 0].size if packed.size else 0
    words = {
        "A": a, "B": packed, "M": m, "N": n, "K": k, "A_ROW": k + gap,
        "A_B0": a.strides[0] // 4, "A_B1": a.strides[1] // 4,
        "B_B0": 0 if shared else b1 * whole, "B_B1": whole,
        "B0": b0, "B1": b1,
    }  # fmt: skip
    result, bias, rest = run_fused(
        "gemm", {"NR": nr}, words, (b0, b1, m, n), kind, seed, target=target, threads=threads, cuts=cuts
    )
    x, y = a[..., :k].astype(np.float64), b.astype(np.float64)
    magnitude = np.abs(x) @ np.abs(y) + np.abs(bias) + np.abs(rest)
    check(result, expected_epilogue(kind, x @ y, bias, rest), magnitude, k)


@settings(max_examples=120, deadline=None)
@given(
    b0=st.integers(1, 2),
    b1=st.integers(1, 3),
    m=SIZES,
    k=SIZES,
    n=SIZES,
    gap=st.sampled_from([0, 5]),
    shared=st.booleans(),
    kind=st.sampled_from(FLOAT_EPILOGUES),
    threads=st.sampled_from([1, 2, 7]),
    cuts=st.lists(st.floats(0, 1), max_size=3).map(tuple),
    seed=st.integers(0, 1000),
)
def test_product(b0, b1, m, k, n, gap, shared, kind, threads, cuts, seed):
    product((b0, b1, m, k, n), kind=kind, gap=gap, shared=shared, threads=threads, cuts=cuts, seed=seed)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 1, 13, 7, 35), (1, 2, 29, 66, 9)])
def test_product_on_smaller_targets(target, shape):
    product(shape, kind="residual", target=target)


@pytest.mark.parametrize(
    "shape", [(1, 1, 49, 1030, 70), (1, 1, 200, 64, 1000), (1, 1, 1, 2048, 1000), (3, 4, 60, 60, 33)]
)
@pytest.mark.parametrize("threads", [1, 2])
def test_large_products(shape, threads):
    product(shape, kind="bias", threads=threads)


@pytest.mark.parametrize("shape", [(1, 1, 0, 4, 5), (1, 1, 4, 5, 0), (0, 2, 3, 4, 5), (1, 1, 3, 0, 5)])
def test_empty_products(shape):
    product(shape, columns=2 * HOST.vector_width)


def test_nan_and_infinity_stay_in_their_rows():
    a = np.ones((9, 5), np.float32)
    a[3, 2], a[5, 1] = np.nan, np.inf
    packed = aligned(pack_b(np.ones((5, 3), np.float32), 2 * HOST.vector_width))
    words = {"A": a, "B": packed, "M": 9, "N": 3, "K": 5, "A_ROW": 5, "B0": 1, "B1": 1}
    result, _, _ = run_fused("gemm", {"NR": 2 * HOST.vector_width}, words, (1, 1, 9, 3), "none", 0)
    np.testing.assert_array_equal(result[0, 0], np.repeat(a.sum(1)[:, None], 3, 1))


@settings(max_examples=60, deadline=None)
@given(
    b0=st.integers(1, 2),
    b1=st.integers(1, 2),
    k=st.integers(1, 40),
    n=st.integers(1, 70),
    transposed=st.booleans(),
    tail=st.integers(0, 5),
    cut=st.floats(0, 1),
)
def test_pack_at_run_time(b0, b1, k, n, transposed, tail, cut):
    nr = 2 * HOST.vector_width
    memory = np.random.default_rng(k).standard_normal((b0, b1, n, k) if transposed else (b0, b1, k, n))
    memory = memory.astype(np.float32)
    b = memory.swapaxes(-1, -2) if transposed else memory
    expected = pack_b(b, nr)
    whole = expected[0, 0].size
    target = np.full((b0, b1, whole + tail + 2), np.nan, np.float32)
    words = {
        "SOURCE": memory, "TARGET": target, "N": n, "C": k, "TAPS": 1,
        "S_N": b.strides[3] // 4, "S_C": b.strides[2] // 4,
        "S_B0": b.strides[0] // 4, "S_B1": b.strides[1] // 4,
        "T_B0": target[0].size, "T_B1": target[0, 0].size, "B0": b0, "B1": b1, "TAIL": tail,
    }  # fmt: skip
    call("pack", {"NR": nr}, words, cuts=(cut,))
    np.testing.assert_array_equal(target[..., :whole], expected.reshape(b0, b1, -1))
    assert (target[..., whole : whole + tail] == 0).all()
    assert np.isnan(target[..., whole + tail :]).all()


@settings(max_examples=200, deadline=None)
@given(*[st.integers(1, 5000)] * 3, st.integers(1, 8), st.sampled_from([1, 2, 4, 16]))
def test_blocks_cover_the_product(m, n, k, batches, threads):
    rows, panels, units = product_blocks(m, n, k, batches, 32, HOST, threads)
    tiles = -(-m // tile_rows(HOST))
    row_blocks, panel_blocks = ceil_divide(tiles, rows), ceil_divide(ceil_divide(n, 32), panels)
    assert rows >= 1 and panels >= 1 and units == batches * row_blocks * panel_blocks
    if threads > 1 and m * n * k * batches > 10**8 and tiles * -(-n // 32) >= 2 * threads:
        assert units >= threads


@pytest.mark.parametrize("name", sorted(name for name, one in template.TEMPLATES.items() if one.domain is not None))
def test_template_files_declare_the_words_of_the_table(name):
    module = importlib.import_module(f"minicc.kernels.cpu.{name}")
    words = template.TEMPLATES[name].words
    declared = {word: getattr(module, word) for word in words if hasattr(module, word)}
    assert declared == {word: number for number, word in enumerate(words) if word in declared}
    assert declared
    assert getattr(module, "EPILOGUE", len(words)) == len(words)
    assert all(hasattr(module, constant) for constant in template.TEMPLATES[name].constants)


def test_render_refuses_unknown_and_missing_constants():
    with pytest.raises(KeyError, match="COLOUR"):
        template.render("gemm", {"NR": 16, "COLOUR": 1}, "", HOST)
    with pytest.raises(KeyError, match="NR"):
        template.render("gemm", {}, "", HOST)
