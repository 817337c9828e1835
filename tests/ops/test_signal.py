"""Signal processing, losses and Col2Im: ONNX's cases, numpy's FFT and ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.ops.onnx_cases import Case, cases_of, check_call, check_case
from tests.ops.runtime_oracle import check_against_onnxruntime
from tests.ops.test_matmul import normal

OPS = [
    "DFT",
    "STFT",
    "HannWindow",
    "HammingWindow",
    "BlackmanWindow",
    "MelWeightMatrix",
    "Col2Im",
    "NegativeLogLikelihoodLoss",
    "SoftmaxCrossEntropyLoss",
]


@pytest.mark.parametrize("case", cases_of(*OPS), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    # The expected inverse transform is itself rounded to float32, so zeros there are 1e-7.
    check_case(replace(case, atol=max(case.atol, 1e-6)))


@pytest.mark.parametrize("length", [None, 5, 8, 12])
@pytest.mark.parametrize("axis", [-2, 1])
@pytest.mark.parametrize(
    ("components", "inverse", "onesided"),
    [(1, 0, 0), (2, 0, 0), (1, 1, 0), (2, 1, 0), (1, 0, 1), (2, 1, 1)],  # one-sided: real on exactly one side
)
def test_dft(length: int | None, axis: int, components: int, inverse: int, onesided: int) -> None:
    x = normal(2, 8, 6, components)
    given = [x, None if length is None else np.array(length), np.array(axis)]
    signal = x[..., 0].astype(np.complex128) + (1j * x[..., 1] if components == 2 else 0)
    where = axis % 4
    if onesided and inverse:
        out = np.fft.irfft(signal, n=length or 2 * (x.shape[where] - 1), axis=where)[..., None]
    else:
        function = np.fft.ifft if inverse else np.fft.fft
        out = function(signal, n=length, axis=where)
        out = np.take(out, range(out.shape[where] // 2 + 1), axis=where) if onesided else out
        out = np.stack([out.real, out.imag], axis=-1)
    attrs = {"inverse": inverse, "onesided": onesided}
    check_call("DFT", given, attrs, [out.astype(np.float32)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("onesided", [0, 1])
@pytest.mark.parametrize("with_window", [False, True])
def test_stft_as_onnxruntime(onesided: int, with_window: bool) -> None:
    window = np.hanning(16).astype(np.float32) if with_window else None
    inputs = [normal(2, 100, 1), np.int64(7), window, np.int64(16)]
    check_against_onnxruntime("STFT", inputs, {"onesided": onesided}, constants=(1, 3), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("op", ["HannWindow", "HammingWindow", "BlackmanWindow"])
@pytest.mark.parametrize("periodic", [0, 1])
def test_windows_as_onnxruntime(op: str, periodic: int) -> None:
    if op == "HannWindow" or periodic:
        check_against_onnxruntime(op, [np.int64(9)], {"periodic": periodic}, constants=(0,))
    check_call(op, [np.array(9)], {"periodic": periodic, "output_datatype": 11}, None)


@pytest.mark.parametrize("attrs", [{}, {"strides": (2, 1), "pads": (1, 0, 1, 2)}, {"dilations": (2, 1)}])
def test_col2im_is_the_transpose_of_windows(attrs: dict[str, object]) -> None:
    """<fold(x), y> = <x, unfold(y)>, with the unfolding by ONNX's Conv on an identity weight."""
    from minicc.ir.opdef import get_op

    image, block = (6, 5), (2, 3)
    y = normal(1, 2, *image)
    identity = np.tile(np.eye(6, dtype=np.float32).reshape(6, 1, *block), (2, 1, 1, 1))
    unfolded = (
        get_op("Conv").eval(y, identity, **{**get_op("Conv").attrs, **attrs, "group": 2}).reshape(1, 12, -1)
    )
    x = normal(*unfolded.shape)
    inputs = [x, np.array(image), np.array(block)]
    check_call("Col2Im", inputs, attrs, None)
    folded = get_op("Col2Im").eval(*inputs, **{**get_op("Col2Im").attrs, **attrs})
    assert np.isclose((folded * y).sum(), (x * unfolded).sum(), rtol=1e-4)
