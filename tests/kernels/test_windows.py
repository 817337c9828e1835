"""Depthwise convolution and pooling against sums and extrema over shifted windows in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minicc.kernels.domain import panel_columns
from minicc.kernels.packing import pack_narrow
from tests.kernels.template_harness import FLOAT_EPILOGUES, TARGETS, Array, aligned, check, expected_epilogue, run_fused
from tests.kernels.test_conv import convolution_words, output_extents, problems, reference

CHANNELS = st.sampled_from([1, 3, 8, 16, 17, 32, 40, 70])


def window_words(x: Array, kernel, strides, dilations, pads) -> dict[str, Any]:
    """Words of a window over every channel by itself."""
    dummy = np.empty((x.shape[-1], 1, *kernel), np.float32)
    words = convolution_words(x, dummy, dummy, strides, dilations, pads, 1)
    return words | {"GROUPS": 1, "C": 1}


def depthwise(shape, channels, kernel, strides, dilations, pads, *, images=1, kind="none", gap=0, line=False, group=1,
              columns=None, **options):  # fmt: skip
    rng = np.random.default_rng(0)
    target = options.get("target", "cpu")
    x = rng.standard_normal((images, *shape, channels + gap)).astype(np.float32)[..., :channels]
    w = rng.standard_normal((channels, group, *kernel)).astype(np.float32)
    usual = panel_columns(TARGETS[target], channels) if group == 1 else TARGETS[target].vector_width
    nr = columns or usual
    words = window_words(x, kernel, strides, dilations, pads) | {"W": aligned(pack_narrow(w, nr))}
    extents = (images, 1, words["M"], channels)
    name, constants = "depthwise", {"NR": nr}
    if line:
        name = "conv_line"
        constants = {"NR": nr, "LINE_TAPS": kernel[-1], "STEP": strides[-1], "APART": dilations[-1], "GROUP": group}
    result, bias, rest = run_fused(name, constants, words, extents, kind, 0, **options)
    exact = reference(x, w, strides, dilations, pads, channels // group).reshape(extents)
    magnitude = reference(np.abs(x), np.abs(w), strides, dilations, pads, channels // group).reshape(extents)
    magnitude = magnitude + np.abs(bias) + np.abs(rest)
    check(result, expected_epilogue(kind, exact, bias, rest), magnitude, group * int(np.prod(kernel)))


@settings(max_examples=100, deadline=None)
@given(
    problem=problems(),
    channels=CHANNELS,
    images=st.integers(1, 2),
    kind=st.sampled_from(FLOAT_EPILOGUES),
    gap=st.sampled_from([0, 3]),
    threads=st.sampled_from([1, 2, 5]),
    cuts=st.lists(st.floats(0, 1), max_size=2).map(tuple),
)
def test_depthwise(problem, channels, images, kind, gap, threads, cuts):
    shape, _, *window = problem
    depthwise(shape, channels, *window, images=images, kind=kind, gap=gap, threads=threads, cuts=cuts)


# (taps, step, distance of taps, channels of a group, epilogue, columns of a panel): every two values of two of taps, step,
# channels and epilogue occur.
LINES = [
    (taps, 1 + (t + g // 2) % 2, (1, 1, 2, 3)[(t + g) % 4], group, FLOAT_EPILOGUES[(t + g) % len(FLOAT_EPILOGUES)],
     TARGETS["cpu"].vector_width * (2 if group == 1 and t % 2 else 1))
    for t, taps in enumerate([1, 2, 3, 5, 7]) for g, group in enumerate([1, 2, 4, 8])
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    variant=st.sampled_from(LINES),
    other=st.none() | st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2)),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 34)),
    pads=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=2),
    channels=CHANNELS | st.just(200),
    images=st.integers(1, 2),
    gap=st.sampled_from([0, 3]),
    threads=st.sampled_from([1, 2, 5]),
    cuts=st.lists(st.floats(0, 1), max_size=2).map(tuple),
)
def test_narrow_groups_along_lines(variant, other, shape, pads, channels, images, gap, threads, cuts):
    *line, group, kind, columns = variant
    kernel, strides, dilations = zip(*([other] if other else []), line)
    pads, shape = tuple(pads[-len(kernel):]), shape[-len(kernel):]
    assume(all(i + a + b >= (k - 1) * d + 1 for i, (a, b), k, d in zip(shape, pads, kernel, dilations)))
    depthwise(shape, -(-channels // group) * group, kernel, strides, dilations, pads, images=images, kind=kind, gap=gap,
              line=True, group=group, columns=columns, threads=threads, cuts=cuts)  # fmt: skip


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
@pytest.mark.parametrize("channels", [5, 24])
@pytest.mark.parametrize(("step", "group"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_narrow_groups_on_smaller_targets(target, channels, step, group):
    depthwise((9, 17), channels * group, (3, 3), (2, step), (1, 1), ((1, 1), (1, 1)), kind="bias", target=target, line=True,
              group=group)  # fmt: skip


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
@pytest.mark.parametrize("channels", [5, 24])
def test_depthwise_on_smaller_targets(target, channels):
    depthwise((9, 8), channels, (3, 3), (2, 1), (1, 1), ((1, 1), (1, 1)), kind="bias", target=target)


@pytest.mark.parametrize("threads", [1, 2])
def test_depthwise_with_more_taps_than_the_table_holds(threads):
    depthwise((1400,), 40, (700,), (3,), (1,), ((5, 350),), kind="residual", threads=threads)


def pool_reference(x: Array, kernel, strides, dilations, pads, average: bool, count_pad: bool) -> Array:
    """x [N, *spatial, C] -> float64 [N, *out, C]."""
    out = output_extents(x.shape[1:-1], kernel, strides, dilations, pads)
    outside = 0.0 if average else -np.inf
    wide = np.pad(x.astype(np.float64), [(0, 0), *pads, (0, 0)], constant_values=outside)
    here = np.pad(np.ones(x.shape[1:-1]), pads, constant_values=float(count_pad))
    windows, counts = [], np.zeros(out)
    for tap in itertools.product(*map(range, kernel)):
        at = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in zip(tap, dilations, out, strides)
        )
        windows.append(wide[(slice(None), *at)])
        counts += here[at]
    if average:
        return np.sum(windows, axis=0) / counts[..., None]
    return np.max(windows, axis=0)


def pool(shape, channels, kernel, strides, dilations, pads, *, average, count_pad=False, images=1,
         kind="none", gap=0, x=None, **options):  # fmt: skip
    rng = np.random.default_rng(0)
    target = options.get("target", "cpu")
    if x is None:
        x = rng.standard_normal((images, *shape, channels + gap)).astype(np.float32)[..., :channels]
    nr = panel_columns(TARGETS[target], channels)
    words = window_words(x, kernel, strides, dilations, pads)
    words["W"] = np.full(channels, 0 if average else -np.inf, np.float32)
    words |= dict(zip(["E_W", "E_H", "E_D"], [p[1] for p in reversed(pads)])) | {"COUNT_PAD": int(count_pad)}
    constants = {"NR": nr, "AVERAGE": int(average)}
    extents = (images, 1, words["M"], channels)
    result, bias, rest = run_fused("pool", constants, words, extents, kind, 0, **options)
    exact = pool_reference(x, kernel, strides, dilations, pads, average, count_pad).reshape(extents)
    if kind == "none" and not average:
        np.testing.assert_array_equal(result, exact)
    else:
        magnitude = np.abs(exact) + np.abs(bias) + np.abs(rest) + 10
        check(result, expected_epilogue(kind, exact, bias, rest), magnitude, int(np.prod(kernel)))


def short_pads(window):
    """Pads shorter than the window, as pooling requires."""
    kernel, strides, dilations, pads = window
    limits = [(k - 1) * d for k, d in zip(kernel, dilations)]
    return kernel, strides, dilations, tuple((min(a, m), min(b, m)) for (a, b), m in zip(pads, limits))


@settings(max_examples=120, deadline=None)
@given(
    problem=problems(),
    channels=CHANNELS,
    average=st.booleans(),
    count_pad=st.booleans(),
    images=st.integers(1, 2),
    kind=st.sampled_from(["none", "bias"]),
    gap=st.sampled_from([0, 3]),
    threads=st.sampled_from([1, 2, 5]),
    cuts=st.lists(st.floats(0, 1), max_size=2).map(tuple),
)
def test_pool(problem, channels, average, count_pad, images, kind, gap, threads, cuts):
    shape, _, *window = problem
    kernel, strides, dilations, pads = short_pads(window)
    shape = tuple(max(i, (k - 1) * d + 1) for i, k, d in zip(shape, kernel, dilations))
    if average and not count_pad and any(d > 1 for d in dilations):
        dilations = (1,) * len(
            dilations
        )  # else a window can hold padding only, and 0 / 0 is the reference's answer
        kernel, strides, dilations, pads = short_pads((kernel, strides, dilations, pads))
    pool(
        shape, channels, kernel, strides, dilations, pads,
        average=average, count_pad=count_pad, images=images, kind=kind, gap=gap, threads=threads, cuts=cuts,
    )  # fmt: skip


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
@pytest.mark.parametrize("average", [False, True])
def test_pool_on_smaller_targets(target, average):
    pool((9, 8), 21, (3, 3), (2, 2), (1, 1), ((1, 1), (1, 0)), average=average, target=target)


def test_max_pool_keeps_nan_and_infinity():
    x = np.random.default_rng(0).standard_normal((1, 6, 6, 5)).astype(np.float32)
    x[0, 2, 2, 1], x[0, 3, 3, 2], x[0, :, :, 3] = np.nan, np.inf, -np.inf
    pool((6, 6), 5, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), average=False, x=x)


def test_reads_stop_at_the_last_channel():
    """A masked load must not touch memory behind the input: here it ends at a page that cannot be read."""
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(base + page), ctypes.c_size_t(page), 0) == 0
    try:
        count = 3 * 3 * 5
        x = np.frombuffer((ctypes.c_float * count).from_address(base + page - 4 * count), np.float32)
        x[:] = np.arange(count)
        pool((3, 3), 5, (2, 2), (1, 1), (1, 1), ((0, 0), (0, 0)), average=False, x=x.reshape(1, 3, 3, 5))
    finally:
        libc.mprotect(ctypes.c_void_p(base + page), ctypes.c_size_t(page), 3)
