"""Depthwise convolutions of expansions against shifted products in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minicc.kernels.domain import ACTIVATIONS as NAMES
from minicc.kernels.domain import UNBOUNDED, band_lines, panel_columns
from minicc.kernels.packing import pack_b, pack_narrow
from tests.kernels.template_harness import FLOAT_EPILOGUES, TARGETS, Array, aligned, check, expected_epilogue, run_fused
from tests.kernels.test_conv import convolution_words, output_extents, reference

ACTIVATIONS = ("none", "clip", "hard_swish", "silu")


def activated(x: Array, name: str) -> Array:
    if name == "clip":
        return np.clip(x, -0.5, 2.0)
    if name == "hard_swish":
        return x * np.clip(x / 6 + 0.5, 0, 1)
    return x / (1 + np.exp(-x)) if name == "silu" else x


def convolve(shape, depth: int, channels: int, kernel, strides, dilations, pads, *, activation: str = "none", images: int = 1,
             gap: int = 0, kind: str = "none", target: str = "cpu", **options: Any) -> None:  # fmt: skip
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, *shape, depth + gap)).astype(np.float32)[..., :depth]
    expansion = rng.standard_normal((depth, channels)).astype(np.float32)
    before = rng.standard_normal(channels).astype(np.float32)
    w = rng.standard_normal((channels, 1, *kernel)).astype(np.float32)
    facts = TARGETS[target]
    nr = panel_columns(facts, channels)
    assert band_lines((kernel[0] - 1) * dilations[0] + 1, strides[0], shape[1] * nr, facts) > 0
    filled = np.zeros(-(-channels // nr) * nr, np.float32)
    filled[:channels] = before
    words = convolution_words(x, np.empty((channels, depth, *kernel), np.float32), aligned(pack_narrow(w, nr)), strides,
                              dilations, pads, 1)  # fmt: skip
    words |= {"E": aligned(pack_b(expansion, nr)), "BIAS": aligned(filled)}
    low, high = (-50, 200) if activation == "clip" else (-UNBOUNDED, UNBOUNDED)
    constants = {"NR": nr, "LINE_TAPS": kernel[1], "STEP": strides[1], "APART": dilations[1], "LOW": low, "HIGH": high,
                 "ACTIVATION": NAMES.index("none" if activation == "clip" else activation)}  # fmt: skip
    extents = (images, 1, words["M"], channels)
    result, bias, rest = run_fused("conv_expand", constants, words, extents, kind, 0, target=target, **options)
    between = activated(x.astype(np.float64) @ expansion + before, activation)
    exact = reference(between, w, strides, dilations, pads, channels).reshape(extents)
    size = np.abs(x).astype(np.float64) @ np.abs(expansion) + np.abs(before)
    magnitude = reference(size, np.abs(w), strides, dilations, pads, channels).reshape(extents)
    magnitude = magnitude + np.abs(bias) + np.abs(rest)
    check(result, expected_epilogue(kind, exact, bias, rest), magnitude, 2 * depth + int(np.prod(kernel)) + 8)


@settings(max_examples=60, deadline=None)
@given(
    line=st.sampled_from([(3, 1, 1), (3, 2, 1), (5, 1, 1), (5, 2, 2)]),
    other=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 2)),
    shape=st.tuples(st.integers(1, 30), st.integers(1, 40)),
    pads=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=2),
    depth=st.sampled_from([1, 8, 19]),
    channels=st.sampled_from([3, 16, 40, 70]),
    activation=st.sampled_from(ACTIVATIONS),
    images=st.integers(1, 2),
    gap=st.sampled_from([0, 3]),
    kind=st.sampled_from(FLOAT_EPILOGUES),
    threads=st.sampled_from([1, 2, 5]),
    cuts=st.lists(st.floats(0, 1), max_size=2).map(tuple),
)
def test_expansions(line, other, shape, pads, depth, channels, activation, images, gap, kind, threads, cuts):
    kernel, strides, dilations = zip(other, line)
    out = output_extents(shape, kernel, strides, dilations, pads)
    assume(all(n > 0 for n in out))
    convolve(shape, depth, channels, kernel, strides, dilations, tuple(pads), activation=activation, images=images, gap=gap,
             kind=kind, threads=threads, cuts=cuts)  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_many_bands(stride, threads):
    convolve((112, 112), 16, 96, (3, 3), (stride, stride), (1, 1), ((1, 1), (1, 1)), activation="clip", threads=threads)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
@pytest.mark.parametrize("channels", [5, 24, 40])
def test_expansions_on_smaller_targets(target, channels):
    convolve((21, 33), 12, channels, (3, 3), (2, 2), (1, 1), ((1, 1), (0, 1)), activation="silu", kind="bias", target=target)
