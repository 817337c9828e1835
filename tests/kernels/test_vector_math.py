"""Vector math against numpy in float64: error in units of the last place, special values, vector code."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.codegen.objects import assembly, compile_object
from minicc.runtime.objects import LoadedObjects, load_objects
from minicc.targets.cpu import host_target, parse_target

Entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, np.exp(-np.abs(x))) / (1 + np.exp(-np.abs(x)))


UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "softplus": lambda x: np.logaddexp(0, x),
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
}
VECTORISED = list(UNARY)
BINARY = {"pow": np.power, "atan2": np.arctan2}
ULPS = 4.0


def source(name: str, width: int, operands: int) -> str:
    loads = ", ".join(f"ld(ptr_f{width}(arg(args, {k + 1})), i)" for k in range(operands))
    return f"""
from minicc.kernels.cpu.intrinsics import *
from minicc.kernels.cpu.vector_math import {name}_f{width}
def kernel(args, begin, end):
    for i in range(begin, end):
        st(ptr_f{width}(arg(args, 0)), i, {name}_f{width}({loads}))
"""


@cache
def compiled(name: str, width: int, operands: int) -> LoadedObjects:
    return load_objects({"kernel": compile_object(source(name, width, operands), "kernel", host_target())})


def call(name: str, *operands: np.ndarray) -> np.ndarray:
    result = np.zeros_like(operands[0])
    args = np.array([result.ctypes.data, *(x.ctypes.data for x in operands)], np.int64)
    code = compiled(name, 8 * result.itemsize, len(operands))
    Entry(code.address("kernel"))(args.ctypes.data, 0, result.size)
    return result


def check(actual: np.ndarray, exact: np.ndarray, ulps: float = ULPS) -> None:
    """Equal special values, and finite ones within `ulps` units in the last place."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(actual.dtype)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(exact))
    finite = np.isfinite(rounded) & np.isfinite(actual)
    # A result next to the largest float may be infinity.
    other = ~finite & ~np.isnan(exact) & (np.abs(exact) != np.inf) & (np.abs(rounded) > 3.4028e38)
    special = ~finite & ~other
    np.testing.assert_array_equal(actual[special], rounded[special])
    error = np.abs(actual[finite].astype(np.float64) - exact[finite]) / np.spacing(np.abs(rounded[finite]))
    assert error.size == 0 or error.max() <= ulps, f"{error.max():.2f} ulp"


def samples() -> np.ndarray:
    """Bit patterns of every kind, the usual range densely, and the places where something changes."""
    rng = np.random.default_rng(0)
    edges = [0, 1, 0.5, 88.72283, 88.7229, 103.97, 104, 0.927734375, np.inf, np.nan]
    edges += [1e-45, 1.1754944e-38, 3.4028235e38]
    near = [np.pi / 4 * k for k in range(40)]
    places = np.array(edges + near, np.float32)
    with np.errstate(all="ignore"):
        places = np.concatenate(
            [np.nextafter(places, np.float32(side)) for side in (-np.inf, 0, np.inf)] + [places]
        )
    patterns = rng.integers(0, 1 << 32, 60_000, dtype=np.uint32).view(np.float32)
    dense = [rng.uniform(-limit, limit, 60_000).astype(np.float32) for limit in (1, 10, 110)]
    return np.concatenate([places, -places, patterns, *dense])


def meaningful(name: str, x: np.ndarray) -> np.ndarray:
    """The samples, without the angles that count as 0 and the sigmoids below the normal numbers."""
    if name == "sigmoid":
        return x[~(x < -87)]
    return x[~(np.isfinite(x) & (np.abs(x) >= 1e12))] if name in ("sin", "cos", "tan") else x


def test_small_sigmoids() -> None:
    x = np.array([-87.01, -87.5, -87.67, -87.7, -88.01, -90, -104, -1e30, -np.inf], np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(call("sigmoid", x), sigmoid(x.astype(np.float64)), rtol=0, atol=8.5e-39)


@pytest.mark.parametrize("name", UNARY)
def test_float32(name: str) -> None:
    x = meaningful(name, samples())
    with np.errstate(all="ignore"):
        check(call(name, x), UNARY[name](x.astype(np.float64)))


@pytest.mark.parametrize("name", UNARY)
def test_float64(name: str) -> None:
    x = np.concatenate([np.linspace(-30, 30, 2001), [0.0, np.inf, -np.inf, np.nan, 1e-310]])
    with np.errstate(all="ignore"):
        check(call(name, x), UNARY[name](x))


@pytest.mark.parametrize("name", BINARY)
def test_two_operands(name: str) -> None:
    rng = np.random.default_rng(0)
    special = [
        0,
        -0.0,
        1,
        -1,
        2,
        -2,
        0.5,
        -0.5,
        3,
        -3,
        np.inf,
        -np.inf,
        np.nan,
        1e-45,
        3e38,
        16777217,
        2.5,
        -2.5,
    ]
    pairs = np.array([(a, b) for a in special for b in special], np.float32)
    x = np.concatenate([pairs[:, 0], rng.uniform(0, 20, 50_000), np.exp(rng.uniform(-80, 80, 50_000))])
    y = np.concatenate([pairs[:, 1], rng.uniform(-20, 20, 50_000), rng.uniform(-2, 2, 50_000)])
    x, y = x.astype(np.float32), y.astype(np.float32)
    with np.errstate(all="ignore"):
        check(call(name, x, y), BINARY[name](x.astype(np.float64), y.astype(np.float64)))
        check(
            call(name, x.astype(np.float64), y.astype(np.float64)), BINARY[name](x.astype("d"), y.astype("d"))
        )


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "erf", "sigmoid", "sin"])
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_float(name: str, values: list[float]) -> None:
    x = meaningful(name, np.array(values, np.float32))
    with np.errstate(all="ignore"):
        check(call(name, x), UNARY[name](x.astype(np.float64)))


def test_meaningless_angles_stay_bounded() -> None:
    x = np.array([1e12, -3e38, 7e15], np.float32)
    np.testing.assert_array_equal(call("sin", x), [0, 0, 0])
    np.testing.assert_array_equal(call("cos", x), [1, 1, 1])


@pytest.mark.parametrize("target", ["cpu:avx2", "cpu:sse"])
@pytest.mark.parametrize("name", [*VECTORISED, "pow"])
def test_becomes_vector_code(name: str, target: str) -> None:
    """No call is left in the loop, and the arithmetic is on whole registers."""
    text = assembly(source(name, 32, 2 if name == "pow" else 1), "kernel", parse_target(target))
    assert "call" not in text
    if target == "cpu:avx2":
        assert text.count("ymm") > 40
    else:
        assert text.count("mulps") + text.count("mulpd") > 4
