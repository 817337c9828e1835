"""Decoders as exporters for language models write them, against ONNX Runtime at the same accuracy level."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

import minicc
from benchmarks.decoder import Sizes, feeds, model
from minicc.lower.kernel import TemplateKernel
from minicc.targets.cpu import host_target

SMALL = Sizes(layers=2, width=128, heads=4, shared=2, inner=192, words=100)


@pytest.mark.parametrize("level", [0, pytest.param(4, marks=pytest.mark.skipif(
    host_target().vector_width < 8, reason="the processor has no byte products of 256 bits: rows are not rounded"))])  # fmt: skip
def test_a_decoder_with_weights_of_four_bits(level: int) -> None:
    """At level 4 both runtimes round the left operands of products to 8 bits."""
    made = model(SMALL, level)
    module = minicc.compile(made, keep_bytes=0)
    assert not module.stats()["host_nodes"]
    used = {kernel.template for kernel in module.program.kernels if isinstance(kernel, TemplateKernel)}
    assert {"gemm_rounded" if level else "gemm_bits", "attention"} <= used and "gemm" not in used
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    for past, new, batch in ((0, 5, 1), (5, 1, 1), (9, 1, 2)):
        given = feeds(SMALL, past, new, batch)
        for own, expected in zip(module.run(None, given), session.run(None, given), strict=True):
            np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
