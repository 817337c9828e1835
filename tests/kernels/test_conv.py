"""Convolution against a sum of shifted matrix products in float64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.kernels.domain import panel_columns
from minicc.kernels.packing import merge_groups, pack_conv, pack_conv_transpose
from tests.kernels.template_harness import FLOAT_EPILOGUES, TARGETS, Array, aligned, check, expected_epilogue, run_fused


def padded(values: tuple[int, ...], fill: int) -> list[int]:
    """Three axes, unused leading ones filled."""
    return [fill] * (3 - len(values)) + list(values)


def output_extents(extents, kernel, strides, dilations, pads) -> tuple[int, ...]:
    """pads: (before, after) per axis."""
    return tuple(
        (i + p[0] + p[1] - (k - 1) * d - 1) // s + 1
        for i, k, s, d, p in zip(extents, kernel, strides, dilations, pads)
    )


def reference(x: Array, w: Array, strides, dilations, pads, groups: int) -> Array:
    """x [N, *spatial, C], w [M, C / group, *kernel] -> float64 [N, *out, M]."""
    rank, kernel = x.ndim - 2, w.shape[2:]
    out = output_extents(x.shape[1:-1], kernel, strides, dilations, pads)
    wide = np.pad(x.astype(np.float64), [(0, 0), *pads, (0, 0)])
    m, c = w.shape[:2]
    result = np.zeros((x.shape[0], *out, m))
    for tap in itertools.product(*map(range, kernel)):
        window = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in zip(tap, dilations, out, strides)
        )
        part = wide[(slice(None), *window)]
        for g in range(groups):
            columns = slice(g * m // groups, (g + 1) * m // groups)
            matrix = w[(columns, slice(None), *tap)].T.astype(np.float64)
            result[..., columns] += part[..., g * c : (g + 1) * c] @ matrix
    assert rank == len(kernel)
    return result


def convolution_words(
    x: Array, w: Array, packed: Array, strides, dilations, pads, groups: int
) -> dict[str, Any]:
    extents, kernel = x.shape[1:-1], w.shape[2:]
    out = output_extents(extents, kernel, strides, dilations, pads)
    words: dict[str, Any] = {
        "X": x, "W": packed, "IMAGES": x.shape[0], "GROUPS": groups, "M": int(np.prod(out)),
        "N": w.shape[0] // groups, "C": w.shape[1], "X_IMAGE": x.strides[0] // 4,
    }  # fmt: skip
    axes = {
        "X_": ([s // 4 for s in x.strides[1:-1]], 0),
        "I": (extents, 1),
        "O": (out, 1),
        "K": (kernel, 1),
        "S": (strides, 1),
        "D": (dilations, 1),
        "P": ([p[0] for p in pads], 0),
    }
    for prefix, (values, fill) in axes.items():
        words |= dict(zip([f"{prefix}{axis}" for axis in "DHW"], padded(tuple(values), fill)))
    return words


def convolve(
    shape: tuple[int, ...],
    channels: tuple[int, int],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[tuple[int, int], ...],
    *,
    groups: int = 1,
    images: int = 1,
    kind: str = "none",
    target: str = "cpu",
    gap: int = 0,
    **options: Any,
) -> None:
    """Run and compare; channels are (in, out) per group, `gap` floats lie between pixels."""
    rng = np.random.default_rng(0)
    c, n = channels
    memory = rng.standard_normal((images, *shape, c * groups + gap)).astype(np.float32)
    x = memory[..., : c * groups]
    w = rng.standard_normal((n * groups, c, *kernel)).astype(np.float32)
    nr = panel_columns(TARGETS[target], n)
    packed = aligned(pack_conv(w, groups, nr))
    words = convolution_words(x, w, packed, strides, dilations, pads, groups)
    extents = (images, groups, words["M"], n)
    result, bias, rest = run_fused("conv", {"NR": nr}, words, extents, kind, 0, target=target, **options)

    def grouped(y: Array) -> Array:
        return y.reshape(images, words["M"], groups, n).swapaxes(1, 2)

    exact = grouped(reference(x, w, strides, dilations, pads, groups))
    magnitude = grouped(reference(np.abs(x), np.abs(w), strides, dilations, pads, groups))
    magnitude = magnitude + np.abs(bias) + np.abs(rest)
    check(result, expected_epilogue(kind, exact, bias, rest), magnitude, c * int(np.prod(kernel)))


@st.composite
def problems(draw):
    rank = draw(st.integers(1, 3))
    axis = {1: 40, 2: 11, 3: 6}[rank]
    each = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * rank))  # noqa: E731
    kernel, strides, dilations = each(1, 4), each(1, 3), each(1, 2)
    pads = draw(st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * rank))
    shape = tuple(
        draw(st.integers(max(1, (k - 1) * d + 1 - p[0] - p[1]), max(axis, (k - 1) * d + 1)))
        for k, d, p in zip(kernel, dilations, pads)
    )
    channels = draw(st.tuples(st.sampled_from([1, 2, 3, 5, 16, 33, 40]), st.sampled_from([1, 3, 16, 32, 47])))
    return shape, channels, kernel, strides, dilations, pads


@settings(max_examples=150, deadline=None)
@given(
    problem=problems(),
    groups=st.integers(1, 3),
    images=st.integers(1, 2),
    kind=st.sampled_from(FLOAT_EPILOGUES),
    gap=st.sampled_from([0, 0, 3]),
    threads=st.sampled_from([1, 2, 5]),
    cuts=st.lists(st.floats(0, 1), max_size=2).map(tuple),
)
def test_convolution(problem, groups, images, kind, gap, threads, cuts):
    convolve(*problem, groups=groups, images=images, kind=kind, gap=gap, threads=threads, cuts=cuts)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
@pytest.mark.parametrize("c", [3, 40])
def test_convolution_on_smaller_targets(target, c):
    convolve((9, 8), (c, 21), (3, 3), (2, 1), (1, 1), ((1, 1), (1, 1)), kind="bias", target=target)


@pytest.mark.parametrize(
    ("shape", "channels", "kernel", "stride"),
    [
        ((40, 44), (3, 64), (7, 7), 2),
        ((28, 28), (128, 130), (3, 3), 1),
        ((7, 7), (512, 64), (3, 3), 1),
        ((15, 15), (64, 256), (1, 1), 2),
        ((3000,), (1, 33), (400,), 160),
        (
            (1500,),
            (2, 5),
            (700,),
            3,
        ),  # too many taps for runs; dilation and channels below make tables in parts
        ((900,), (33, 5), (600,), 7),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_layers(shape, channels, kernel, stride, threads):
    rank = len(shape)
    pads = tuple((k // 2, k // 2) for k in kernel)
    convolve(shape, channels, kernel, (stride,) * rank, (1,) * rank, pads, kind="residual", threads=threads)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dilation", [(5, 5), (12, 13), (13, 36), (36, 36)])
@pytest.mark.parametrize("channels", [(3, 5), (40, 33)])
def test_far_taps(target, dilation, channels):
    """Filters that are spread so far that most taps lie in the padding of most pixels."""
    pads = tuple((d, d) for d in dilation)
    convolve((14, 14), channels, (3, 3), (1, 1), dilation, pads, kind="bias", target=target)


def test_taps_in_the_padding_are_left_out():
    """Only the tap in the middle ever lies in the image: the weights of the others may be anything."""
    x = np.random.default_rng(0).standard_normal((1, 14, 14, 24)).astype(np.float32)
    w = np.full((8, 24, 3, 3), np.nan, np.float32)
    w[:, :, 1, 1] = np.random.default_rng(1).standard_normal((8, 24))
    packed = aligned(pack_conv(w, 1, nr := panel_columns(TARGETS["cpu"], 8)))
    words = convolution_words(x, w, packed, (1, 1), (14, 20), ((14, 14), (20, 20)), 1)
    result, _, _ = run_fused("conv", {"NR": nr}, words, (1, 1, 14 * 14, 8), "none", 0)
    exact = x.reshape(-1, 24) @ w[:, :, 1, 1].T
    np.testing.assert_allclose(result.reshape(-1, 8), exact, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 9), st.sampled_from([4, 8, 16]))
def test_merged_groups_are_the_same_convolution(groups, c, n, lanes):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 5, groups * c))
    w = rng.standard_normal((groups * n, c, 2, 2))
    merged, fewer = merge_groups(w, groups, lanes)
    assert groups % fewer == 0 and merged.shape[0] // fewer <= max(lanes, n)
    arguments = (1, 1), (1, 1), ((0, 0), (0, 0))
    np.testing.assert_allclose(
        reference(x, merged, *arguments, fewer), reference(x, w, *arguments, groups), rtol=1e-12
    )


def transposed_reference(x: Array, w: Array, strides, dilations, pads, out, groups: int) -> Array:
    """x [N, *spatial, C], w [C, M / group, *kernel] -> float64 [N, *out, M]; each input scatters a window."""
    kernel, spatial = w.shape[2:], x.shape[1:-1]
    c, n = x.shape[-1] // groups, w.shape[1]
    whole = [(i - 1) * s + (k - 1) * d + 1 for i, s, k, d in zip(spatial, strides, kernel, dilations)]
    room = [max(f, p + o) for f, p, o in zip(whole, pads, out)]
    result = np.zeros((x.shape[0], *room, groups * n))
    for tap in itertools.product(*map(range, kernel)):
        at = tuple(
            slice(t * d, t * d + (i - 1) * s + 1, s) for t, d, i, s in zip(tap, dilations, spatial, strides)
        )
        for g in range(groups):
            part = (
                x[..., g * c : (g + 1) * c].astype(np.float64)
                @ w[(slice(g * c, (g + 1) * c), slice(None), *tap)]
            )
            result[(slice(None), *at, slice(g * n, (g + 1) * n))] += part
    return result[(slice(None), *(slice(p, p + o) for p, o in zip(pads, out)))]


def convolve_transposed(
    shape, channels, kernel, strides, dilations, pads, extra=0, *, groups=1, images=1, **options
):
    """Run and compare; pads as in convolve, `extra` is ONNX's output padding, cut to less than the stride."""
    rng = np.random.default_rng(0)
    c, n = channels
    x = rng.standard_normal((images, *shape, c * groups)).astype(np.float32)
    w = rng.standard_normal((c * groups, n, *kernel)).astype(np.float32)
    before = [p[0] for p in pads]
    out = tuple(
        (i - 1) * s + min(extra, s - 1) + (k - 1) * d + 1 - sum(p)
        for i, s, k, d, p in zip(shape, strides, kernel, dilations, pads)
    )
    if min(out) < 1:
        return
    nr = panel_columns(TARGETS[options.get("target", "cpu")], n)
    packed = aligned(pack_conv_transpose(w, groups, strides, dilations, before, nr))
    words = convolution_words(x, w, packed, strides, dilations, pads, groups)
    words |= {"M": int(np.prod(out)), "N": n, "C": c}
    words |= dict(zip(["OD", "OH", "OW"], padded(out, 1)))
    kind = options.pop("kind", "none")
    result, bias, rest = run_fused(
        "conv_transpose", {"NR": nr}, words, (images, groups, words["M"], n), kind, 0, **options
    )

    def grouped(y: Array) -> Array:
        return y.reshape(images, words["M"], groups, n).swapaxes(1, 2)

    exact = grouped(transposed_reference(x, w, strides, dilations, before, out, groups))
    magnitude = grouped(transposed_reference(np.abs(x), np.abs(w), strides, dilations, before, out, groups))
    magnitude = magnitude + np.abs(bias) + np.abs(rest)
    check(result, expected_epilogue(kind, exact, bias, rest), magnitude, c * int(np.prod(kernel)))


@settings(max_examples=120, deadline=None)
@given(
    problem=problems(),
    extra=st.integers(0, 2),
    groups=st.integers(1, 3),
    images=st.integers(1, 2),
    kind=st.sampled_from(FLOAT_EPILOGUES),
    threads=st.sampled_from([1, 2, 5]),
    cuts=st.lists(st.floats(0, 1), max_size=2).map(tuple),
)
def test_transposed_convolution(problem, extra, groups, images, kind, threads, cuts):
    convolve_transposed(*problem, extra, groups=groups, images=images, kind=kind, threads=threads, cuts=cuts)


def test_transposed_convolution_with_more_taps_than_the_table_holds():
    convolve_transposed((40,), (33, 5), (1100,), (2,), (1,), ((3, 4),), kind="residual")
