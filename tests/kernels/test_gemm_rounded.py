"""Products of rounded rows with weights of few bits: every rounded number against numpy, then the product in float64."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.kernels import domain
from minicc.kernels.domain import ceil_divide, panel_columns
from minicc.kernels.packing import pack_b
from minicc.targets.cpu import host_target
from tests.kernels.template_harness import EPS, FLOAT_EPILOGUES, TARGETS, aligned, call, expected_epilogue, run_fused

Array = np.ndarray[Any, Any]
HOST = host_target()
VNNI = "+avx512vnni" in HOST.features
# (target, VNNI): all ways that this machine can run.
WAYS = [("cpu", 1)] * VNNI + [(name, 0) for name, target in TARGETS.items() if target.vector_width >= 8]
pytestmark = pytest.mark.skipif(not WAYS, reason="the processor has no byte products of 256 bits")


def rounded(a: Array, size: int, bits: int, target: str) -> tuple[Array, Array, Array, Array]:
    """(words, scales, sums as the kernel makes them, rounded numbers [b0, b1, m, blocks * size] taken out of the words)."""
    b0, b1, m, k = a.shape
    blocks = ceil_divide(k, size)
    wide = np.concatenate([a, np.full((b0, b1, m, 3), np.nan, np.float32)], -1)  # a guard behind each row
    words = np.full((b0, b1, m, blocks * size // 4), 0x55555555, np.int32)
    scales, sums = (np.full((b0, b1, m, blocks), np.nan, np.float32) for _ in range(2))
    given = {
        "A": wide, "TARGET": words, "SCALES": scales, "SUMS": sums, "M": m, "K": k, "A_ROW": k + 3, "A_B0": wide.strides[0] // 4,
        "A_B1": wide.strides[1] // 4, "B0": b0, "B1": b1, "SIZE": size,
    }  # fmt: skip
    call("round_rows", {"BITS": bits}, given, target=target)
    lanes = 32 // bits
    order = [first + lanes // 4 * t for first in range(lanes // 4) for t in range(4)]
    found = words.view(np.int8).reshape(b0, b1, m, -1, lanes)
    numbers = np.empty_like(found)
    numbers[..., order] = found
    return words, scales, sums, numbers.reshape(b0, b1, m, -1)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 5), k=st.integers(1, 150), size=st.sampled_from([16, 32, 64, 128]), bits=st.sampled_from([2, 4]),
    scale=st.sampled_from([1e-20, 1.0, 1e20]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_rows_are_rounded(m: int, k: int, size: int, bits: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = (rng.standard_normal((1, 2, m, k)) * scale).astype(np.float32)
    a[0, 0, 0, : size // 2] = 0
    _, scales, sums, numbers = rounded(a, size, bits, "cpu")
    for block in range(ceil_divide(k, size)):
        part = a[..., block * size : (block + 1) * size].astype(np.float64)
        largest = np.abs(part).max(-1)
        np.testing.assert_allclose(scales[..., block], largest / 127, rtol=1e-6)
        own = numbers[..., block * size : block * size + part.shape[-1]].astype(np.float64)
        # Half a step from the exact place, and a little for its own rounding.
        assert (np.abs(own * (largest / 127)[..., None] - part) <= largest[..., None] * (0.5 + 1e-4) / 127).all()
        np.testing.assert_array_equal(sums[..., block], own.sum(-1))
        assert not numbers[..., block * size + part.shape[-1] : (block + 1) * size].any()


def test_what_is_not_finite_makes_its_block_so() -> None:
    a = np.ones((1, 1, 3, 32), np.float32)
    a[0, 0, 0, 3], a[0, 0, 1, 5] = np.nan, np.inf
    _, scales, _, _ = rounded(a, 16, 4, "cpu")
    assert np.isnan(scales[0, 0, 0, 0]) and np.isinf(scales[0, 0, 1, 0])
    np.testing.assert_allclose(scales[0, 0, :, 1], 1 / 127, rtol=1e-6)


def product(
    shape: tuple[int, int, int, int, int], bits: int, size: int, way: tuple[str, int], *, centred: bool = True,
    kind: str = "none", seed: int = 0, threads: int = 1, cuts: tuple[float, ...] = (0.4,),
) -> None:  # fmt: skip
    """Round the left operand of (b0, b1, m, k, n), run and compare with the rounded numbers' own product."""
    b0, b1, m, k, n = shape
    target, vnni = way
    rng = np.random.default_rng(seed)
    blocks, lanes = ceil_divide(k, size), 32 // bits
    a = rng.standard_normal((b0, b1, m, k)).astype(np.float32)
    words, x_scales, x_sums, x = rounded(a, size, bits, target)
    numbers = rng.integers(0, 1 << bits, (n, blocks * size)).astype(np.uint32)
    numbers[:, ::7] = (1 << bits) - 1
    scales = rng.uniform(-2, 2, (blocks, n)).astype(np.float32)
    zeros = np.full((blocks, n), 1 << (bits - 1), np.float32)
    if not centred:
        zeros = rng.integers(0, 1 << bits, (blocks, n)).astype(np.float32)
    packed = np.zeros((n, blocks * size // lanes), np.uint32)
    for position in range(lanes):
        packed |= numbers[:, position::lanes] << np.uint32(bits * position)
    nr = panel_columns(TARGETS[target], n)
    w, s, z = (aligned(pack_b(array, nr)) for array in (packed.T.view(np.int32), scales, zeros))
    given = {
        "X": words, "X_SCALES": x_scales, "X_SUMS": x_sums, "W": w, "S": s, "Z": 0 if centred else z, "M": m, "N": n, "K": k,
        "B0": b0, "B1": b1, "SIZE": size,
    }  # fmt: skip
    constants = {"NR": nr, "BITS": bits, "CENTRED": int(centred), "VNNI": vnni}
    options = {"target": target, "threads": threads, "cuts": cuts}
    result, bias, rest = run_fused("gemm_rounded", constants, given, (b0, b1, m, n), kind, seed, **options)
    exact, magnitude = np.zeros((b0, b1, m, n)), np.abs(bias) + np.abs(rest).astype(np.float64)
    for block in range(blocks):
        at = slice(block * size, (block + 1) * size)
        weights = (numbers[:, at].T.astype(np.float64) - zeros[block]) * scales[block].astype(np.float64)
        left = x[..., at].astype(np.float64) * x_scales[..., block, None].astype(np.float64)
        exact += left @ weights
        magnitude = magnitude + np.abs(left) @ (np.abs(scales[block].astype(np.float64)) * np.full((size, 1), float(2 << bits)))
    bound = EPS * (3 * blocks + 8) * (magnitude + 1)
    assert (np.abs(result - expected_epilogue(kind, exact, bias, rest)) <= bound).all()


@settings(max_examples=60, deadline=None)
@given(
    b0=st.integers(1, 2), b1=st.integers(1, 2), m=st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 130])),
    k=st.one_of(st.integers(1, 70), st.sampled_from([128, 300])), n=st.one_of(st.integers(1, 20), st.sampled_from([32, 33, 65])),
    bits=st.sampled_from([2, 4]), size=st.sampled_from([16, 32, 128]), centred=st.booleans(),
    kind=st.sampled_from(FLOAT_EPILOGUES), threads=st.sampled_from([1, 2, 7]),
    cuts=st.lists(st.floats(0, 1), max_size=3).map(tuple), seed=st.integers(0, 1000),
)  # fmt: skip
def test_product(b0, b1, m, k, n, bits, size, centred, kind, threads, cuts, seed):
    product((b0, b1, m, k, n), bits, size, WAYS[0], centred=centred, kind=kind, threads=threads, cuts=cuts, seed=seed)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("m", [1, 13])
def test_every_way(way: tuple[str, int], bits: int, m: int) -> None:
    for centred in (True, False):
        product((1, 2, m, 100, 37), bits, 32, way, centred=centred, kind="residual")


def test_constants_agree_with_the_domain() -> None:
    kernel = importlib.import_module("minicc.kernels.cpu.gemm_rounded")
    widest = max(2 * target.vector_width for target in TARGETS.values())
    assert kernel.ROWS == domain.BITS_ROWS and kernel.ROWS * widest <= kernel.SUMS
