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
from minicc.kernels.packing import fft_order, pack_fft
from minicc.targets.cpu import parse_target
from tests.kernels.template_harness import FLOAT_EPILOGUES, TARGETS, aligned, expected_epilogue, run_fused
from tests.kernels.test_conv import reference

# Largest error, in units of the largest input times the largest sum of a filter's magnitudes.
BOUND = 3e-7
# Largest error, relative to the largest output, for inputs and outputs of order one.
RELATIVE = 1e-6
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


def complexes(line: Any) -> list[complex]:
    return [complex(real or 0, imaginary or 0) for real, imaginary in line]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 10, 15, 25, 30, *SIDES])
def test_transforms_of_lines(size):
    """Against numpy; a real line of even size is known from the first half of its frequencies."""
    rng = np.random.default_rng(size)
    x = rng.standard_normal(size) + 1j * rng.standard_normal(size)
    found = transform(Numbers(), [(v.real, v.imag) for v in x], False)
    np.testing.assert_allclose(complexes(found), np.fft.fft(x), atol=1e-12)
    np.testing.assert_allclose(complexes(transform_back(Numbers(), found, size, False)), x * size, atol=1e-12)
    if size % 2 == 0 or size == 1:
        found = transform(Numbers(), [(v.real, None) for v in x], True)
        np.testing.assert_allclose(complexes(found), np.fft.rfft(x.real), atol=1e-12)
        back = transform_back(Numbers(), found, size, True)
        np.testing.assert_allclose(complexes(back), x.real * size, atol=1e-12)


# (sides, taps, dilations, epilogue): every side, and tiles along one axis only.
FORMS = [
    ((12, 12), (5, 5), (1, 1)), ((16, 16), (7, 7), (1, 1)), ((20, 20), (3, 3), (4, 2)), ((24, 24), (9, 6), (1, 1)),
    ((32, 32), (11, 11), (1, 1)), ((1, 16), (1, 7), (1, 1)), ((24, 1), (7, 1), (1, 1)), ((48, 48), (2, 23), (3, 2)),
    ((64, 64), (31, 31), (1, 1)), ((64, 64), (5, 64), (1, 1)),
]  # fmt: skip
VARIANTS = [(*form, FLOAT_EPILOGUES[n % len(FLOAT_EPILOGUES)]) for n, form in enumerate(FORMS)]


@st.composite
def problems(draw):
    sides, taps, dilations, kind = draw(st.sampled_from(VARIANTS))
    spans = [(size - 1) * apart + 1 for size, apart in zip(taps, dilations)]
    pads = tuple(draw(st.tuples(*[st.integers(0, span if span > 1 else 0)] * 2)) for span in spans)
    shape = tuple(draw(st.integers(max(1, span - sum(p)), 70 if span > 1 else 9)) for span, p in zip(spans, pads))
    channels = draw(st.sampled_from([1, 3, 8, 16, 17, 32, 40])), draw(st.sampled_from([1, 3, 16, 33]))
    return (sides, taps, shape, channels, pads), {"dilations": dilations, "kind": kind}


@settings(max_examples=100, deadline=None)
@given(
    problem=problems(),
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
    ("sides", "taps", "channels"), [((16, 16), (7, 7), (3, 9)), ((20, 20), (5, 5), (21, 20)), ((1, 24), (1, 9), (20, 3))]
)
def test_on_smaller_targets(sides, taps, channels, target):
    convolve(sides, taps, (19, 18), channels, ((taps[0] // 2, 1), (2, 0)) if taps[0] > 1 else ((0, 0), (2, 0)),
             kind="bias", target=target)  # fmt: skip


@pytest.mark.parametrize(
    ("side", "taps", "size", "channels", "images"),
    [(20, 7, 56, (64, 64), 1), (16, 7, 14, (256, 96), 1), (24, 9, 60, (3, 32), 2), (64, 31, 56, (16, 16), 1)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_layers(side, taps, size, channels, images, threads):
    pads = ((taps // 2, taps // 2),) * 2
    error, largest = convolve((side, side), (taps, taps), (size, size), channels, pads, images=images, threads=threads)
    assert error <= RELATIVE * largest


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.tuples(st.integers(0, 9), st.integers(0, 300), st.integers(0, 300)),
    st.tuples(st.integers(1, 1500), st.integers(1, 2000)),
    st.sampled_from(["cpu:sse", "cpu:avx2", "cpu:avx512"]),
    st.sampled_from([1, 2, 5, 64]),
)
def test_blocks_fit_the_stack_and_cover_everything(form, sizes, channels, name, threads):
    (height, width), taps, dilations = form
    target = parse_target(name)
    lanes = target.vector_width
    depth = 2 * frequencies(height, width) * max(channels[0], lanes)
    if depth > INPUTS:
        return
    words = dict(zip(("IMAGES", "OH", "OW", "C", "N"), (*sizes, *channels)))
    out = [side - (size - 1) * apart for side, size, apart in zip((height, width), taps, dilations)]
    constants = {"NR": lanes, "SIDE_H": height, "SIDE_W": width, "OUT_H": out[0], "OUT_W": out[1]}
    units = domain.fft_domain(words, constants, target, threads)
    tiles = sizes[0] * -(-sizes[1] // out[0]) * -(-sizes[2] // out[1])
    panels = -(-channels[1] // lanes)
    assert units == -(-tiles // words["TILES"]) * -(-panels // words["PANELS"])
    assert 1 <= words["TILES"] <= most_tiles(height, width, lanes) and words["TILES"] * depth <= INPUTS


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(8, 8), (12, 20), (1, 16), (10, 1)]), st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 3), st.integers(1, 9), st.sampled_from([4, 16]),
)  # fmt: skip
def test_packing_holds_every_frequency_of_every_filter(sides, taps, c, m, lanes):
    """From what is kept, and its mirror images, the filters come back; panels are filled with zeros."""
    taps = tuple(min(size, side) for size, side in zip(taps, sides))
    w = np.random.default_rng(0).standard_normal((m, c, *taps)).astype(np.float32)
    packed = pack_fft(w, sides, (1, 1), lanes)
    form = packed[:-c].reshape(-1, frequencies(*sides), c, 2, lanes)
    whole = np.zeros((c, len(form) * lanes, *sides), complex)
    for number, (row, column) in enumerate(zip(*fft_order(*sides))):
        value = np.moveaxis(form[:, number, :, 0] + 1j * form[:, number, :, 1], 0, 1).reshape(c, -1)
        whole[..., row, column] = value
        whole[..., -row % sides[0], -column % sides[1]] = value.conj()
    back = np.fft.fft2(whole)
    assert np.abs(back.imag).max() < 1e-5
    np.testing.assert_allclose(np.moveaxis(back.real, 1, 0)[:m, :, : taps[0], : taps[1]], w, atol=1e-5)
    assert not whole[:, m:].any() and not packed[-c:].any()
