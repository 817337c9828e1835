"""Activations, conversions and Dropout against ONNX's cases; com.microsoft's against formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.ops.onnx_cases import Case, cases_of, check_call, check_case

OPS = [
    "Relu",
    "LeakyRelu",
    "Elu",
    "Celu",
    "Selu",
    "ThresholdedRelu",
    "PRelu",
    "HardSigmoid",
    "HardSwish",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "Mish",
    "Gelu",
    "Swish",
    "SwiGLU",
    "Shrink",
    "Cast",
    "CastLike",
    "BitCast",
]


@pytest.mark.parametrize("case", cases_of(*OPS), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    check_case(case)


def _is_inference(case: Case) -> bool:
    return len(case.inputs) < 3 or not case.inputs[2].item()


@pytest.mark.parametrize("case", list(filter(_is_inference, cases_of("Dropout"))), ids=lambda c: c.name)
def test_dropout_case(case: Case) -> None:
    check_case(case)


def _phi(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _tanh_phi(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


X = np.linspace(-9, 9, 24).reshape(2, 3, 4)
BIAS = np.array([0.5, -1.0, 2.0, 0.0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(("op", "inputs", "formula"), [
    ("Gelu", (X,), X * _phi(X)),
    ("BiasGelu", (X, BIAS), (X + BIAS) * _phi(X + BIAS)),
    ("FastGelu", (X,), X * _tanh_phi(X)),
    ("FastGelu", (X, BIAS), (X + BIAS) * _tanh_phi(X + BIAS)),
    ("QuickGelu", (X,), X / (1 + np.exp(-1.702 * X))),
])  # fmt: skip
def test_microsoft_gelu(op: str, inputs: tuple, formula: np.ndarray, dtype: type) -> None:
    check_call(op, [x.astype(dtype) for x in inputs], {}, [formula.astype(dtype)], domain="com.microsoft")


@pytest.mark.parametrize(
    "op", ["Sigmoid", "Softplus", "Mish", "Gelu", "Elu", "Selu", "Celu", "HardSwish", "Swish"]
)
def test_large_arguments_stay_finite(op: str) -> None:
    x = np.array([-1e4, -100, -1, 0, 1, 100, 1e4], dtype=np.float32)
    check_call(op, [x], {}, None)
    from minicc.ir.opdef import get_op

    definition = get_op(op)
    assert np.isfinite(definition.eval(x, **definition.attrs)).all()
