"""Integer convolutions and matrix products: exactly the sums of numpy in int64, modulo 2**32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.codegen.objects import assembly
from minicc.kernels import template
from minicc.kernels.domain import INTEGER_RUN, panel_columns
from minicc.kernels.packing import integer_totals, merge_taps, pack_conv_integer
from minicc.targets.cpu import parse_target
from tests.kernels.template_harness import TARGETS, aligned, run_fused
from tests.kernels.test_conv import convolution_words, problems, reference

POINTERS = {np.uint8: "ptr_u8", np.int8: "ptr_i8"}


def integers(rng, dtype, shape):
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max + 1, shape, dtype)


def convolve(shape, channels, kernel, strides, dilations, pads, *, groups=1, images=1, x_type=np.uint8,
             w_type=np.int8, per_channel=False, form="halves", target="cpu", **options):  # fmt: skip
    """form: "halves" for weights less their zero points, "bytes" for bytes beside them, "centred" for bytes less them."""
    rng = np.random.default_rng(0)
    c, n = channels
    x = integers(rng, x_type, (images, *shape, c * groups))
    w = integers(rng, w_type, (n * groups, c, *kernel))
    x_zero = integers(rng, x_type, (1,))
    w_zero = integers(rng, w_type, (n * groups if per_channel else 1,))
    zeros = np.broadcast_to(w_zero, n * groups).astype(np.int16)
    if form == "centred":
        w = (w.astype(np.int16) // 4 + zeros.reshape(-1, *[1] * (w.ndim - 1)) // 2).astype(w_type)
        w_zero, zeros = w_zero // 2, zeros // 2
    shift = np.int16(128 if form == "bytes" and w_type is np.uint8 else 0)
    stored = (w.astype(np.int16) - (shift if form == "bytes" else zeros.reshape(-1, *[1] * (w.ndim - 1)))).astype(
        np.int16 if form == "halves" else np.int8
    )
    nr = panel_columns(TARGETS[target], n)
    merged = groups == 1 and kernel[-1] > 1 and kernel[-1] * c <= INTEGER_RUN and dilations[-1] == 1
    if merged:
        stored = merge_taps(stored)
    packed = aligned(pack_conv_integer(stored, groups, nr))
    words = convolution_words(x, w, packed, strides, dilations, pads, groups)
    words |= {"X_IMAGE": x.strides[0], "X_ZERO": x_zero}
    words |= dict(zip(["X_W", "X_H", "X_D"], [*x.strides[-2:0:-1], 0, 0]))
    if form != "halves":
        words["TOTALS"] = aligned(integer_totals(stored, zeros - shift if form == "bytes" else None, groups, nr))
    extents = (images, groups, words["M"], n)
    constants = {
        "NR": nr, "POINTER": POINTERS[x_type], "NUMBERS": 2 if form == "halves" else 4, "SUMMED": int(form == "bytes"),
        "OFFSET": 128 if form != "halves" and x_type is np.int8 else 0, "MERGED": int(merged),
    }  # fmt: skip
    result, _, _ = run_fused("conv_integer", constants, words, extents, "bits", 0, target=target, **options)
    centred = x.astype(np.int64) - x_zero, w.astype(np.int64) - w_zero.reshape(-1, *[1] * (w.ndim - 1))
    exact = reference(*centred, strides, dilations, pads, groups).reshape(images, words["M"], groups, n)
    # Sums below 2**53 are exact in the reference's float64.
    np.testing.assert_array_equal(
        result.view(np.int32), exact.swapaxes(1, 2).astype(np.int64).astype(np.int32)
    )


FORMS = ["halves", *(["bytes", "centred"] if TARGETS["cpu"].multiplies_bytes else [])]
form_or_skip = pytest.mark.parametrize("form", [
    pytest.param(form, marks=pytest.mark.skipif(form not in FORMS, reason="this machine does not multiply bytes"))
    for form in ("halves", "bytes", "centred")
])  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    problem=problems(),
    groups=st.integers(1, 3),
    images=st.integers(1, 2),
    x_type=st.sampled_from([np.uint8, np.int8]),
    w_type=st.sampled_from([np.uint8, np.int8]),
    per_channel=st.booleans(),
    form=st.sampled_from(FORMS),
    threads=st.sampled_from([1, 2, 5]),
    cuts=st.lists(st.floats(0, 1), max_size=2).map(tuple),
)
def test_convolution(problem, groups, images, x_type, w_type, per_channel, form, threads, cuts):
    convolve(
        *problem, groups=groups, images=images, x_type=x_type, w_type=w_type, per_channel=per_channel, form=form,
        threads=threads, cuts=cuts,
    )  # fmt: skip


@pytest.mark.parametrize("k", [1, 2, 77, 5001])
@pytest.mark.parametrize("m", [1, 7, 30])
@form_or_skip
def test_matrix_product(m, k, form):
    convolve((m,), (k, 45), (1,), (1,), (1,), ((0, 0),), form=form)


@pytest.mark.parametrize(
    "case", [((1300,), (7, 5), (600,)), ((20,), (900, 3), (11,)), ((6,), (4099, 40), (3,)), ((9,), (8200, 40), (3,))]
)
@form_or_skip
def test_sums_in_several_passes(case, form):
    convolve(*case, (1,), (1,), ((1, 2),), threads=2, form=form)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "cpu"])
def test_smaller_targets(target):
    convolve((9, 8), (5, 21), (3, 3), (2, 1), (1, 1), ((1, 1), (1, 1)), target=target)


VNNI = [
    replace(parse_target("cpu:avx512"), features=parse_target("cpu:avx512").features + ",+avx512vnni"),
    replace(parse_target("cpu:avx2"), features=parse_target("cpu:avx2").features + ",+avxvnni"),
]


@pytest.mark.parametrize(
    ("target", "numbers", "instruction"),
    [(parse_target("cpu:avx2"), 2, "vpmaddwd"), (parse_target("cpu:avx512"), 2, "vpmaddwd"), *((t, 4, "vpdpbusd") for t in VNNI)],
)
def test_products_of_a_word_are_one_instruction(target, numbers, instruction):
    assert target.multiplies_bytes == (numbers == 4)
    constants = {"NR": 16, "POINTER": "ptr_u8", "NUMBERS": numbers, "OFFSET": 0, "SUMMED": 0, "MERGED": 0}
    source = template.render("conv_integer", constants, "", target)
    assert assembly(source, "k", target).count(instruction) >= 12
