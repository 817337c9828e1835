"""The table of single operators: cases that say what they do, and what a time means."""

from __future__ import annotations

import numpy as np
import pytest

import minicc
from benchmarks.kernels import CASES, Case, conv, measure, product, result_of, row_op, table
from minicc.debug.peaks import Peaks


def test_a_share_is_of_the_tighter_peak() -> None:
    peaks = Peaks(1, gflops=100.0, gbytes=10.0)
    result = result_of(product(100, 100, 100), peaks, 40e-6)
    assert result.gflops == pytest.approx(50.0)
    assert result.gbytes == pytest.approx(3.0)
    assert result.share == pytest.approx(0.5)
    assert "| 40.0 | 50.0 | 3.0 | 50% |" in table([result])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case_is_a_valid_model_of_the_shape_it_says(case: Case) -> None:
    onnx = pytest.importorskip("onnx")
    model = case.model()
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert tuple(d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim) == case.y


@pytest.mark.parametrize(
    "case",
    [product(8, 16, 16), conv("3x3", 4, 8, 8, 3), row_op("ReduceSum", 4, 8, 1, kept=False, axes=[-1])],
    ids=lambda c: c.name,
)
def test_a_case_is_measured(case: Case) -> None:
    ort = pytest.importorskip("onnxruntime")
    result = measure(case, Peaks(1, 100.0, 10.0), repeats=2)
    assert result.seconds > 0
    assert result.share > 0
    x = np.random.default_rng(1).standard_normal(case.x).astype(np.float32)
    model = case.model()
    expected = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    found = minicc.compile(model, threads=1)(x)
    found = found[0] if isinstance(found, (list, tuple)) else found
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(np.abs(expected).max()))
