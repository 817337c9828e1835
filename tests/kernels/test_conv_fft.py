"""Convolution by Fourier transforms against a sum of shifted matrix products in float64, and how far it may be off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.kernels import domain
from minicc.kernels.cpu.fft_sizes import INPUTS, SIDES, frequencies, most_tiles
from minicc.kernels.cpu.fft_tiles import transform, transform_back
from minicc.kernels.packing import pack_fft
from minicc.targets.cpu import parse_target
from tests.kernels.template_harness import FLOAT_EPILOGUES, TARGETS, aligned, expected_epilogue, run_fused
from tests.kernels.test_conv import reference

# Largest error, in units of the largest input times the largest sum of a filter's magnitudes.
BOUND = 3e-7
# Largest error, relative to the largest output, for inputs and outputs of order one.
RELATIVE = 2e-6
Pair = tuple[int, int]


def convolve(
    sides: Pair,
    taps: Pair,
    shape: Pair,
    channels: Pair,
    pads: tuple[Pair, Pair],
    *,
    dilations: Pair = (1, 1),
    images: int = 1,
    kind: str = "none",
    target: str = "cpu",
    gap: int = 0,
    **options: Any,
) -> tuple[float, float]:
    """Run and compare; `gap` floats lie between pixels. Returns the largest error and the largest output."""
    rng = np.random.default_rng(0)
    c, n = channels
    x = rng.standard_normal((images, *shape, c + gap)).astype(np.float32)[..., :c]
    w = rng.standard_normal((n, c, *taps)).astype(np.float32)
    lanes = TARGETS[target].vector_width
    exact = reference(x, w, (1, 1), dilations, pads, 1)
    oh, ow = exact.shape[1:3]
    words = {
        "X": x, "W": aligned(pack_fft(w, sides, dilations, lanes)), "IMAGES": images, "N": n, "C": c,
        "X_IMAGE": x.strides[0] // 4, "X_H": x.strides[1] // 4, "X_W": x.strides[2] // 4, "IH": shape[0],
        "IW": shape[1], "OH": oh, "OW": ow, "PH": pads[0][0], "PW": pads[1][0],
    }  # fmt: skip
    out = [side - (size - 1) * apart for side, size, apart in zip(sides, taps, dilations)]
    constants = {"NR": lanes, "SIDE_H": sides[0], "SIDE_W": sides[1], "OUT_H": out[0], "OUT_W": out[1], "FEW": int(c < lanes)}
    extents = (images, 1, oh * ow, n)
    result, bias, rest = run_fused("conv_fft", constants, words, extents, kind, 0, target=target, **options)
    expected = expected_epilogue(kind, exact.reshape(extents), bias, rest)
    error = np.abs(result - expected).max()
    # An epilogue's derivative is at most 1 + |bias|.
    magnitude = np.abs(x).max() * np.abs(w).sum((1, 2, 3)).max() * (1 + np.abs(bias).max())
    assert error <= BOUND * magnitude, error / magnitude
    return error, np.abs(expected).max()


class Numbers:
    """What transforms are made of, for numpy's scalars."""

    def add(self, x, y):
        return x + y

    def sub(self, x, y):
        return x - y

    def negative(self, x):
        return -x

    def scale(self, factor, x):
        return factor * x

    def scale_add(self, factor, x, y):
        return factor * x + y


def test_a():
    on = Numbers()
    rng = np.random.default_rng(0)
    for size in (1, *SIDES, 2, 6, 10, 30, 15):
        x = rng.standard_normal(size) + 1j * rng.standard_normal(size)
        got = transform(on, [(v.real, v.imag) for v in x], False)
        np.testing.assert_allclose([complex(a or 0, b or 0) for a, b in got], np.fft.fft(x), atol=1e-12)
        back = transform_back(on, got, size, False)
        np.testing.assert_allclose([complex(a or 0, b or 0) for a, b in back], x * size, atol=1e-12)
        if size % 2 == 0 or size == 1:
            got = transform(on, [(v.real, None) for v in x], True)
            np.testing.assert_allclose([complex(a or 0, b or 0) for a, b in got], np.fft.rfft(x.real), atol=1e-12)
            back = transform_back(on, got, size, True)
            np.testing.assert_allclose([a for a, b in back], x.real * size, atol=1e-12)


def test_b():
    print(convolve((16, 16), (7, 7), (30, 33), (20, 37), ((3, 3), (3, 3))))
    print(convolve((16, 16), (7, 7), (30, 33), (3, 37), ((3, 3), (3, 3))))
    print(convolve((1, 32), (1, 7), (30, 33), (64, 37), ((0, 0), (3, 3))))
    print(convolve((32, 1), (7, 1), (30, 33), (64, 37), ((3,3), (0,0))))
    print(convolve((20, 20), (7, 7), (30, 33), (64, 37), ((3,3), (0,0))))
    print(convolve((32, 32), (9, 9), (30, 33), (64, 37), ((3,3), (0,0))))
