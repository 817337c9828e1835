"""Convolutions of few input channels, in planes or channels last, against shifted matrix products in float64."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minicc.kernels.domain import panel_columns
from minicc.kernels.packing import pack_conv
from tests.kernels.template_harness import FLOAT_EPILOGUES, TARGETS, Array, aligned, check, expected_epilogue, run_fused
from tests.kernels.test_conv import convolution_words, reference


def image(images: int, shape: tuple[int, ...], channels: int, planes: bool, gap: int) -> Array:
    """[N, *spatial, C] over memory in planes or channels last, with gaps between lines."""
    memory = np.random.default_rng(0).standard_normal((images, channels, *shape[:-1], shape[-1] + gap)).astype(np.float32)
    if not planes:
        memory = np.ascontiguousarray(np.moveaxis(memory, 1, -1))
        return memory[..., : shape[-1], :]
    return np.moveaxis(memory[..., : shape[-1]], 1, -1)


def convolve(x: Array, filters: int, kernel, strides, dilations, pads, planes: bool, *, kind: str = "none",
             target: str = "cpu", **options: Any) -> None:  # fmt: skip
    channels = x.shape[-1]
    w = np.random.default_rng(1).standard_normal((filters, channels, *kernel)).astype(np.float32)
    nr = panel_columns(TARGETS[target], filters)
    words = convolution_words(x, w, aligned(pack_conv(w, 1, nr)), strides, dilations, pads, 1)
    words["X_C"] = x.strides[-1] // 4
    constants = {"NR": nr, "LINE_TAPS": kernel[-1], "STEP": strides[-1], "CHANNELS": channels, "PLANES": int(planes)}
    extents = (x.shape[0], 1, words["M"], filters)
    result, bias, rest = run_fused("conv_few", constants, words, extents, kind, 0, target=target, **options)
    exact = reference(x, w, strides, dilations, pads, 1).reshape(extents)
    magnitude = reference(np.abs(x), np.abs(w), strides, dilations, pads, 1).reshape(extents)
    magnitude = magnitude + np.abs(bias) + np.abs(rest)
    check(result, expected_epilogue(kind, exact, bias, rest), magnitude, channels * int(np.prod(kernel)))


@settings(max_examples=120, deadline=None)
@given(
    line=st.sampled_from([(1, 2), (2, 1), (3, 1), (3, 2), (5, 3), (7, 2)]),
    other=st.none() | st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2)),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 70)),
    pads=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=2),
    channels=st.sampled_from([1, 3, 4]),
    filters=st.sampled_from([3, 16, 24, 40]),
    planes=st.booleans(),
    images=st.integers(1, 2),
    kind=st.sampled_from(FLOAT_EPILOGUES),
    gap=st.sampled_from([0, 3]),
    threads=st.sampled_from([1, 2, 5]),
    cuts=st.lists(st.floats(0, 1), max_size=2).map(tuple),
)
def test_few_channels(line, other, shape, pads, channels, filters, planes, images, kind, gap, threads, cuts):
    (taps, step), *axes = line, *([other] if other else [])
    kernel, strides, dilations = zip(*[(k, s, d) for k, s, d in axes], (taps, step, 1))
    pads, shape = tuple(pads[-len(kernel):]), shape[-len(kernel):]
    assume(all(i + a + b >= (k - 1) * d + 1 for i, (a, b), k, d in zip(shape, pads, kernel, dilations)))
    x = image(images, shape, channels, planes, gap)
    convolve(x, filters, kernel, strides, dilations, pads, planes, kind=kind, threads=threads, cuts=cuts)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
@pytest.mark.parametrize("filters", [5, 8, 32])
@pytest.mark.parametrize("planes", [False, True])
def test_few_channels_on_smaller_targets(target, filters, planes):
    x = image(1, (9, 33), 3, planes, 0)
    convolve(x, filters, (3, 3), (2, 2), (1, 1), ((1, 1), (0, 1)), planes, kind="bias", target=target)


@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("at_end", [False, True])
def test_reads_stay_inside_the_image(planes, at_end):
    """The image begins or ends at a page that cannot be read."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for closed in (0, 2):
        assert libc.mprotect(ctypes.c_void_p(base + closed * page), ctypes.c_size_t(page), 0) == 0
    try:
        shape = (1, 3, 5, 37) if planes else (1, 5, 37, 3)
        count = int(np.prod(shape))
        start = base + (2 * page - 4 * count if at_end else page)
        x = np.frombuffer((ctypes.c_float * count).from_address(start), np.float32).reshape(shape)
        x[:] = np.random.default_rng(0).standard_normal(shape)
        x = np.moveaxis(x, 1, -1) if planes else x
        convolve(x, 16, (3, 3), (2, 2), (1, 1), ((1, 1), (1, 1)), planes)
    finally:
        for closed in (0, 2):
            libc.mprotect(ctypes.c_void_p(base + closed * page), ctypes.c_size_t(page), 3)
