"""Linear models and support vector machines of ai.onnx.ml against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicc
from minicc.errors import MiniccError
from minicc.ops.scores import TRANSFORMS
from tests.ops.classical import check, node_model

FEATURES = 3


def rows(rng: np.random.Generator, dtype: Any = np.float32) -> Any:
    return (rng.standard_normal((7, FEATURES)) * (1 if np.dtype(dtype).kind == "f" else 5)).astype(dtype)


def numbers(rng: np.random.Generator, count: int) -> list[float]:
    return rng.standard_normal(count).astype(np.float32).tolist()


@given(st.integers(0, 1 << 32), st.integers(1, 3), st.sampled_from(TRANSFORMS[:4]), st.booleans(),
       st.sampled_from([np.float32, np.float64, np.int64, np.int32]))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_linear_regressors(seed: int, targets: int, transform: str, intercepts: bool, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    attrs: dict[str, Any] = {"intercepts": numbers(rng, targets)} if intercepts else {}
    check("LinearRegressor", [rows(rng, dtype)], targets=targets, coefficients=numbers(rng, targets * FEATURES),
          post_transform=transform, runtime=dtype == np.float32, **attrs)  # fmt: skip


@given(st.integers(0, 1 << 32), st.integers(1, 4), st.sampled_from(TRANSFORMS[:4]), st.booleans(),
       st.sampled_from([np.float32, np.float64, np.int64, np.int32]))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_linear_classifiers(seed: int, scores: int, transform: str, texts: bool, dtype: Any) -> None:
    rng = np.random.default_rng(seed)
    count = max(2, scores)
    labels: dict[str, Any] = {"classlabels_ints": list(range(5, 5 + count))}
    if texts:
        labels = {"classlabels_strings": [f"c{i}" for i in range(count)]}
    check("LinearClassifier", [rows(rng, dtype)], 2, coefficients=numbers(rng, scores * FEATURES),
          intercepts=numbers(rng, scores), post_transform=transform, host=("Gather",), **labels)  # fmt: skip


def test_probit() -> None:
    x = np.linspace(0.05, 0.95, 9, dtype=np.float32)[:, None]
    check("LinearRegressor", [x], coefficients=[1.0], post_transform="PROBIT", tolerance=1e-4)


KERNELS = st.sampled_from(["LINEAR", "POLY", "RBF", "SIGMOID"])


@given(st.integers(0, 1 << 32), KERNELS, st.integers(1, 9), st.booleans())
@settings(max_examples=40, deadline=None)
def test_support_vector_regressors(seed: int, kernel: str, count: int, one_class: bool) -> None:
    rng = np.random.default_rng(seed)
    check("SVMRegressor", [rows(rng)], kernel_type=kernel, coefficients=numbers(rng, count), rho=numbers(rng, 1),
          n_supports=count, support_vectors=numbers(rng, count * FEATURES), kernel_params=[0.4, 0.3, 2.0],
          one_class=int(one_class))  # fmt: skip


@given(st.integers(0, 1 << 32), KERNELS, st.integers(2, 4), st.booleans(), st.sampled_from(["NONE", "LOGISTIC", "SOFTMAX"]),
       st.booleans())  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_support_vector_classifiers(
    seed: int, kernel: str, classes: int, chances: bool, transform: str, texts: bool
) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, classes).tolist()
    total, pairs = sum(sizes), classes * (classes - 1) // 2
    attrs: dict[str, Any] = {"classlabels_ints": list(range(3, 3 + classes))}
    if texts:
        attrs = {"classlabels_strings": [f"c{i}" for i in range(classes)]}
    if chances:
        attrs |= {"prob_a": (-np.abs(rng.standard_normal(pairs))).astype(np.float32).tolist(), "prob_b": numbers(rng, pairs)}
    check("SVMClassifier", [rows(rng)], 2, kernel_type=kernel, coefficients=numbers(rng, total * (classes - 1)),
          support_vectors=numbers(rng, total * FEATURES), rho=numbers(rng, pairs), vectors_per_class=sizes,
          kernel_params=[0.4, 0.3, 2.0], post_transform="NONE" if chances else transform, tolerance=5e-4,
          host=("Gather", "CoupledChances"), **attrs)  # fmt: skip


def test_a_linear_machine() -> None:
    rng = np.random.default_rng(1)
    check("SVMClassifier", [rows(rng)], 2, kernel_type="LINEAR", coefficients=numbers(rng, 2 * FEATURES), rho=[0.1],
          classlabels_ints=[4, 9], runtime=False)  # fmt: skip
    check("SVMRegressor", [rows(rng)], kernel_type="LINEAR", coefficients=numbers(rng, FEATURES), rho=[0.1], runtime=False)


@pytest.mark.parametrize(
    ("op", "outputs", "attrs"),
    [
        ("LinearRegressor", 1, {"coefficients": [1.0, 2.0], "targets": 3}),
        ("LinearRegressor", 1, {"coefficients": [1.0, 2.0], "targets": 1}),
        ("LinearClassifier", 2, {"coefficients": [1.0] * 6, "classlabels_ints": [1, 2, 3], "intercepts": [1.0, 2.0]}),
        ("SVMRegressor", 1, {"coefficients": [1.0, 2.0], "rho": [0.0], "n_supports": 3}),
        ("SVMClassifier", 2, {"coefficients": [1.0], "rho": [0.0], "vectors_per_class": [1, 1], "classlabels_ints": [1, 2],
                              "support_vectors": [0.0] * 6, "kernel_params": [1.0, 0.0, 0.0]}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(op: str, outputs: int, attrs: dict[str, Any]) -> None:
    with pytest.raises(MiniccError, match=op):
        minicc.compile(node_model(op, [np.zeros((2, FEATURES), np.float32)], outputs, **attrs))
