"""Products with weights of few bits against numpy in float64, which takes the packed numbers apart one by one."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.kernels import domain
from minicc.kernels.domain import bits_domain, ceil_divide, panel_columns
from minicc.kernels.packing import pack_b
from minicc.targets.cpu import host_target
from tests.kernels.template_harness import FLOAT_EPILOGUES, TARGETS, aligned, check, expected_epilogue, run_fused

HOST = host_target()


def product(
    shape: tuple[int, int, int, int, int],
    bits: int,
    size: int,
    *,
    centred: bool = True,
    kind: str = "none",
    gap: int = 0,
    target: str = "cpu",
    columns: int | None = None,
    seed: int = 0,
    threads: int = 1,
    cuts: tuple[float, ...] = (0.4,),
) -> None:
    """Run (b0, b1, m, k, n) and compare. Rows of the left operand end where a guard of NaN begins."""
    b0, b1, m, k, n = shape
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((b0, b1, m, k + gap)).astype(np.float32)
    a[..., k:] = np.nan
    blocks, per_word = ceil_divide(k, size), 32 // bits
    numbers = rng.integers(0, 1 << bits, (n, ceil_divide(k, per_word) * per_word)).astype(np.uint32)
    scales = rng.uniform(0.5, 2, (blocks, n)).astype(np.float32) * rng.choice(np.float32([-1, 1]), (blocks, n))
    zeros = np.full((blocks, n), 1 << (bits - 1), np.float32)
    if not centred:
        zeros = rng.integers(0, 1 << bits, (blocks, n)).astype(np.float32)
    words = np.zeros((n, numbers.shape[1] // per_word), np.uint32)
    for position in range(per_word):
        words |= numbers[:, position::per_word] << np.uint32(bits * position)
    nr = columns or panel_columns(TARGETS[target], n)
    packed = [aligned(pack_b(array, nr)) for array in (words.T.view(np.int32), scales, zeros)]
    given = {
        "A": a, "W": packed[0], "S": packed[1], "Z": 0 if centred else packed[2], "M": m, "N": n, "K": k, "A_ROW": k + gap,
        "A_B0": a.strides[0] // 4, "A_B1": a.strides[1] // 4, "B0": b0, "B1": b1, "SIZE": size,
    }  # fmt: skip
    constants = {"NR": nr, "BITS": bits, "CENTRED": int(centred)}
    result, bias, rest = run_fused(
        "gemm_bits", constants, given, (b0, b1, m, n), kind, seed, target=target, threads=threads, cuts=cuts
    )
    weights = np.empty((k, n))
    for position in range(k):
        block = position // size
        weights[position] = (numbers[:, position].astype(np.float64) - zeros[block]) * scales[block].astype(np.float64)
    x = a[..., :k].astype(np.float64)
    # Numbers and zero points are summed apart where rows are few: both count for the rounding.
    largest = np.abs(np.repeat(scales, size, 0)[:k].astype(np.float64)) * (2 << bits)
    magnitude = np.abs(x) @ largest + np.abs(bias) + np.abs(rest)
    check(result, expected_epilogue(kind, x @ weights, bias, rest), magnitude, k)


@settings(max_examples=100, deadline=None)
@given(
    b0=st.integers(1, 2),
    b1=st.integers(1, 2),
    m=st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 130])),
    k=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 160, 300])),
    n=st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 65])),
    bits=st.sampled_from([2, 4, 8]),
    size=st.sampled_from([16, 32, 48, 128, 256, 512]),
    centred=st.booleans(),
    gap=st.sampled_from([0, 5]),
    kind=st.sampled_from(FLOAT_EPILOGUES),
    threads=st.sampled_from([1, 2, 7]),
    cuts=st.lists(st.floats(0, 1), max_size=3).map(tuple),
    seed=st.integers(0, 1000),
)
def test_product(b0, b1, m, k, n, bits, size, centred, gap, kind, threads, cuts, seed):
    shape = b0, b1, m, k, n
    product(shape, bits, size, centred=centred, kind=kind, gap=gap, threads=threads, cuts=cuts, seed=seed)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_few_rows_and_more(m, bits):
    """The two ways of the kernel, at the border between them."""
    for centred in (True, False):
        product((1, 1, m, 77, 37), bits, 32, centred=centred, kind="residual", gap=3)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 33, 1), (2, 1, 13, 70, 35), (1, 2, 3, 66, 9)])
def test_product_on_smaller_targets(target, shape):
    product(shape, 4, 32, kind="residual", target=target)


@pytest.mark.parametrize("columns", [HOST.vector_width, 2 * HOST.vector_width])
def test_either_width_of_panels(columns):
    product((1, 1, 9, 64, 50), 4, 32, columns=columns)


def test_constants_agree_with_the_domain():
    kernel = importlib.import_module("minicc.kernels.cpu.gemm_bits")
    assert kernel.ROWS == domain.BITS_ROWS
    widest = max(2 * target.vector_width for target in TARGETS.values())
    assert kernel.ROWS * widest <= kernel.SUMS and (kernel.DEPTH + 32 // 2) * widest <= kernel.PANEL


@settings(max_examples=200, deadline=None)
@given(
    m=st.integers(0, 2000), n=st.integers(0, 5000), k=st.integers(1, 5000), batches=st.integers(0, 3), threads=st.integers(1, 16)
)  # fmt: skip
def test_units_cover_everything(m, n, k, batches, threads):
    words = {"M": m, "N": n, "K": k, "B0": batches, "B1": 1, "HEIGHT": 0, "PANELS": 0}
    units = bits_domain(words, {"NR": 32}, HOST, threads)
    panels = ceil_divide(n, 32)
    assert 1 <= words["HEIGHT"] <= domain.BITS_ROWS and words["PANELS"] >= 1
    empty = 0 in (m, n, batches)
    assert units == (0 if empty else batches * ceil_divide(m, words["HEIGHT"]) * ceil_divide(panels, words["PANELS"]))
