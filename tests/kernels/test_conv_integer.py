"""Integer convolutions and matrix products: exactly the sums of numpy in int64, modulo 2**32."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.codegen.objects import assembly
from minicc.kernels import template
from minicc.kernels.domain import panel_columns
from minicc.kernels.packing import pack_conv_integer
from minicc.targets.cpu import parse_target
from tests.kernels.template_harness import TARGETS, aligned, run_fused
from tests.kernels.test_conv import convolution_words, problems, reference

POINTERS = {np.uint8: "ptr_u8", np.int8: "ptr_i8"}


def integers(rng, dtype, shape):
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape, dtype)


def convolve(shape, channels, kernel, strides, dilations, pads, *, groups=1, images=1, x_type=np.uint8,
             w_type=np.int8, per_channel=False, target="cpu", **options):  # fmt: skip
    rng = np.random.default_rng(0)
    c, n = channels
    x = integers(rng, x_type, (images, *shape, c * groups))
    w = integers(rng, w_type, (n * groups, c, *kernel))
    x_zero = integers(rng, x_type, (1,))
    w_zero = integers(rng, w_type, (n * groups if per_channel else 1,))
    nr = panel_columns(TARGETS[target], n)
    packed = aligned(pack_conv_integer(w, w_zero, groups, nr))
    words = convolution_words(x, w, packed, strides, dilations, pads, groups)
    words |= {"X_IMAGE": x.strides[0], "X_ZERO": x_zero}
    words |= dict(zip(["X_W", "X_H", "X_D"], [*x.strides[-2:0:-1], 0, 0]))
    extents = (images, groups, words["M"], n)
    constants = {"NR": nr, "POINTER": POINTERS[x_type]}
    result, _, _ = run_fused("conv_integer", constants, words, extents, "bits", 0, target=target, **options)
    centred = x.astype(np.int64) - x_zero, w.astype(np.int64) - w_zero.reshape(-1, *[1] * (w.ndim - 1))
    exact = reference(*centred, strides, dilations, pads, groups).reshape(images, words["M"], groups, n)
    # Sums below 2**53 are exact in the reference's float64.
    np.testing.assert_array_equal(
        result.view(np.int32), exact.swapaxes(1, 2).astype(np.int64).astype(np.int32)
    )


@settings(max_examples=100, deadline=None)
@given(
    problem=problems(),
    groups=st.integers(1, 3),
    images=st.integers(1, 2),
    x_type=st.sampled_from([np.uint8, np.int8]),
    w_type=st.sampled_from([np.uint8, np.int8]),
    per_channel=st.booleans(),
    threads=st.sampled_from([1, 2, 5]),
    cuts=st.lists(st.floats(0, 1), max_size=2).map(tuple),
)
def test_convolution(problem, groups, images, x_type, w_type, per_channel, threads, cuts):
    convolve(
        *problem, groups=groups, images=images, x_type=x_type, w_type=w_type, per_channel=per_channel,
        threads=threads, cuts=cuts,
    )  # fmt: skip


@pytest.mark.parametrize("k", [1, 2, 77, 5001])
@pytest.mark.parametrize("m", [1, 7, 30])
def test_matrix_product(m, k):
    convolve((m,), (k, 45), (1,), (1,), (1,), ((0, 0),))


@pytest.mark.parametrize(
    "case", [((1300,), (7, 5), (600,)), ((20,), (900, 3), (11,)), ((6,), (4099, 40), (3,))]
)
def test_sums_in_several_passes(case):
    convolve(*case, (1,), (1,), ((1, 2),), threads=2)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
def test_smaller_targets(target):
    convolve((9, 8), (5, 21), (3, 3), (2, 1), (1, 1), ((1, 1), (1, 1)), target=target)


@pytest.mark.parametrize(("target", "instruction"), [("cpu:avx2", "vpmaddwd"), ("cpu:avx512", "vpmaddwd")])
def test_pairs_are_one_instruction(target, instruction):
    source = template.render("conv_integer", {"NR": 16, "POINTER": "ptr_u8"}, "", parse_target(target))
    assert assembly(source, "k", parse_target(target)).count(instruction) >= 12
