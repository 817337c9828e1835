"""Winograd convolution against a sum of shifted matrix products in float64, and how far it may be off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.kernels import domain
from minicc.kernels.cpu import winograd
from minicc.kernels.packing import pack_winograd, winograd_filter
from minicc.kernels.winograd_axes import POINTS, side
from minicc.targets.cpu import parse_target
from tests.kernels.template_harness import FLOAT_EPILOGUES, TARGETS, aligned, expected_epilogue, run_fused
from tests.kernels.test_conv import reference

# (tile of outputs, taps, stride)
FORMS = [
    *((tile, 3, 1) for tile in ((2, 2), (4, 4), (1, 2), (1, 4), (2, 1), (4, 1))),
    *((tile, 5, 1) for tile in ((2, 2), (1, 2), (2, 1))),
    ((2, 2), 3, 2),
]
# Largest error by positions along an axis, in units of the largest input times the largest sum of a filter's magnitudes.
BOUND = {4: 5e-8, 5: 5e-8, 6: 3e-7}
# Largest error, relative to the largest output, for inputs and outputs of order one.
RELATIVE = {4: 2e-6, 6: 6e-6}


def convolve(
    tile: tuple[int, int],
    shape: tuple[int, int],
    channels: tuple[int, int],
    pads: tuple[tuple[int, int], tuple[int, int]],
    *,
    images: int = 1,
    kind: str = "none",
    target: str = "cpu",
    gap: int = 0,
    taps: int = 3,
    stride: int = 1,
    columns: int | None = None,
    **options: Any,
) -> tuple[float, float]:
    """Run and compare; `gap` floats lie between pixels. Returns the largest error and the largest output."""
    rng = np.random.default_rng(0)
    c, n = channels
    x = rng.standard_normal((images, *shape, c + gap)).astype(np.float32)[..., :c]
    w = rng.standard_normal((n, c, *(taps if out > 1 else 1 for out in tile))).astype(np.float32)
    nr = columns or domain.panel_columns(TARGETS[target], n)
    exact = reference(x, w, (stride, stride), (1, 1), pads, 1)
    oh, ow = exact.shape[1:3]
    words = {
        "X": x, "W": aligned(pack_winograd(w, tile, stride, nr)), "IMAGES": images, "N": n, "C": c,
        "X_IMAGE": x.strides[0] // 4, "X_H": x.strides[1] // 4, "X_W": x.strides[2] // 4, "IH": shape[0],
        "IW": shape[1], "OH": oh, "OW": ow, "PH": pads[0][0], "PW": pads[1][0],
    }  # fmt: skip
    extents = (images, 1, oh * ow, n)
    result, bias, rest = run_fused(
        "winograd",
        {"NR": nr, "OUT_H": tile[0], "OUT_W": tile[1], "STRIDE": stride, "TAPS": taps},
        words,
        extents,
        kind,
        0,
        target=target,
        **options,
    )
    expected = expected_epilogue(kind, exact.reshape(extents), bias, rest)
    error = np.abs(result - expected).max()
    # An epilogue's derivative is at most 1 + |bias|.
    magnitude = np.abs(x).max() * np.abs(w).sum((1, 2, 3)).max() * (1 + np.abs(bias).max())
    assert error <= BOUND[side(max(tile), stride, taps)] * magnitude, error
    return error, np.abs(expected).max()


# (form, vectors of a panel's columns): both widths where the tile has two axes, else each with some forms.
PANELS = [
    (form, vectors) for n, form in enumerate(FORMS) for vectors in ((1, 2) if min(form[0]) > 1 else (1 + n % 2,))
]  # fmt: skip
# (form, columns of a panel, epilogue): each width of panels with every epilogue.
VARIANTS = [
    (form, TARGETS["cpu"].vector_width * vectors, FLOAT_EPILOGUES[n // 2 % len(FLOAT_EPILOGUES)])
    for n, (form, vectors) in enumerate(PANELS)
]  # fmt: skip


@st.composite
def problems(draw, lanes):
    (tile, taps, stride), columns, kind = draw(st.sampled_from(VARIANTS))
    pads = tuple(draw(st.tuples(*[st.integers(0, taps if out > 1 else 0)] * 2)) for out in tile)
    shape = tuple(draw(st.integers(max(1, taps - sum(p) if out > 1 else 1), 19)) for out, p in zip(tile, pads))
    channels = draw(st.sampled_from([lanes, lanes + 1, 2 * lanes, 40, 67])), draw(st.sampled_from([1, 3, 16, 32, 47, 70]))
    return (tile, shape, channels, pads), {"taps": taps, "stride": stride, "columns": columns, "kind": kind}


@settings(max_examples=120, deadline=None)
@given(
    problem=problems(max(target.vector_width for target in TARGETS.values())),
    images=st.integers(1, 3),
    gap=st.sampled_from([0, 0, 3]),
    threads=st.sampled_from([1, 2, 5]),
    cuts=st.lists(st.floats(0, 1), max_size=2).map(tuple),
)
def test_convolution(problem, images, gap, threads, cuts):
    sizes, form = problem
    convolve(*sizes, **form, images=images, gap=gap, threads=threads, cuts=cuts)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
@pytest.mark.parametrize(
    ("tile", "taps", "stride"), [((2, 2), 3, 1), ((4, 4), 3, 1), ((1, 4), 3, 1), ((2, 2), 3, 2), ((2, 2), 5, 1)]
)
def test_on_smaller_targets(tile, taps, stride, target):
    convolve(tile, (9, 8), (20, 21), ((tile[0] > 1,) * 2, (1, 0)), kind="bias", taps=taps, stride=stride, target=target)


@pytest.mark.parametrize(("out", "taps"), [(2, 3), (4, 3), (2, 5)])
@pytest.mark.parametrize(
    ("shape", "channels", "images"),
    [((56, 56), (64, 64), 1), ((14, 14), (256, 96), 1), ((7, 7), (512, 64), 3), ((1, 1), (16, 8), 40)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_layers(out, taps, shape, channels, images, threads):
    pads = ((taps // 2, taps // 2),) * 2
    error, largest = convolve((out, out), shape, channels, pads, taps=taps, images=images, kind="residual", threads=threads)
    assert error <= RELATIVE[side(out, 1, taps)] * largest


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.tuples(st.integers(0, 9), st.integers(0, 300), st.integers(0, 300)),
    st.tuples(st.integers(16, 4000), st.integers(1, 2000)),
    st.sampled_from(["cpu:sse", "cpu:avx2", "cpu:avx512"]),
    st.sampled_from([1, 2, 5, 64]),
)
def test_blocks_fit_the_stack_and_cover_everything(form, sizes, channels, target, threads):
    tile, taps, stride = form
    words = dict(zip(("IMAGES", "OH", "OW", "C", "N"), (*sizes, *channels)))
    constants = {"NR": 16, "OUT_H": tile[0], "OUT_W": tile[1], "STRIDE": stride, "TAPS": taps}
    units = domain.winograd_domain(words, constants, parse_target(target), threads)
    tiles = sizes[0] * -(-sizes[1] // tile[0]) * -(-sizes[2] // tile[1])
    panels = -(-channels[1] // 16)
    assert units == -(-tiles // words["TILES"]) * -(-panels // words["PANELS"])
    assert 1 <= words["TILES"] <= winograd.BLOCK
    assert words["TILES"] * side(tile[0], stride, taps) * side(tile[1], stride, taps) * channels[0] <= winograd.INPUTS


def test_stack_sizes_agree():
    assert (domain.WINOGRAD_BLOCK, domain.WINOGRAD_INPUTS) == (winograd.BLOCK, winograd.INPUTS)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(2, 3), (4, 3), (2, 5)]), st.integers(0, 1000))
def test_filters_are_evaluated_at_the_points(form, seed):
    """Interpolation: the product of two polynomials is found again from its values at the points and at infinity."""
    out, size = form
    rng = np.random.default_rng(seed)
    taps, signal = rng.standard_normal(size), rng.standard_normal(out)
    points = POINTS[side(out, 1, size)]
    powers = np.vander(points, out + size - 1, increasing=True)
    values = winograd_filter(out, 1, size) @ taps
    product = np.polynomial.polynomial.polymul(taps, signal)
    for row, p in enumerate(points):
        divisor = np.prod([p - q for q in points if q != p])
        np.testing.assert_allclose(values[row] * divisor * (powers[row, :out] @ signal), powers[row] @ product, atol=1e-9)
    assert values[-1] == taps[-1]


@pytest.mark.parametrize(("out", "taps"), [(2, 3), (4, 3), (2, 5)])
def test_packing_transforms_every_filter_and_fills_panels_with_zeros(out, taps):
    rng = np.random.default_rng(1)
    w = rng.standard_normal((5, 3, taps, taps)).astype(np.float32)
    packed = pack_winograd(w, (out, out), 1, 4)
    positions = side(out, 1, taps)
    form = packed[:-3].reshape(2, positions, positions, 3, 4)
    matrix = winograd_filter(out, 1, taps)
    expected = np.einsum("ai,ncij,bj->abcn", matrix, w.astype(np.float64), matrix)
    got = np.moveaxis(form, 0, 3).reshape(*form.shape[1:4], 8)
    np.testing.assert_allclose(got[..., :5], expected, rtol=1e-6)
    assert not got[..., 5:].any() and not packed[-3:].any()
