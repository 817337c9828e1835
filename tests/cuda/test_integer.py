"""Integer products and quantised models compiled for CUDA: numbers in the interpreter, tensor cores in the machine code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("numba.cuda.compiler", reason="numba-cuda is not installed (extra cuda)")
pytest.importorskip("cuda.bindings.nvvm", reason="cuda-bindings is not installed (extra cuda)")

import minicc
from benchmarks.compare import difference, rule, session
from benchmarks.cuda_build import machine_text
from minicc.codegen.cuda import find_tool
from tests.cuda.loop_kernels import TARGET
from tests.cuda.modules import node_model, run_module
from tests.cuda.test_conv import convolve
from tests.models.test_quantised import QuantFormat, QuantType, convolutions, products, quantise_dynamic, quantise_static

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(5)


def numbers(dtype: Any, *shape: int) -> Array:
    info = np.iinfo(dtype)
    return np.asarray(RNG.integers(info.min, info.max + 1, shape)).astype(dtype)


def centred(array: Array, zero: Array | None) -> Array:
    return array.astype(np.int64) - (0 if zero is None else zero.astype(np.int64))


def names(module: Any) -> list[str]:
    return [row.kernel.rpartition("_")[0] for row in module.explain().rows]


@pytest.mark.parametrize(
    ("left", "right", "left_zero", "right_zero", "constants"),
    [
        (np.uint8, np.int8, None, None, ("b",)),
        (np.uint8, np.uint8, (), (), ("b", "q")),
        (np.int8, np.uint8, (5,), (19,), ("b", "q")),
        pytest.param(np.int8, np.int8, (2, 5, 1), (1, 19), (), marks=pytest.mark.slow),
        pytest.param(np.uint8, np.uint8, (), (19,), (), marks=pytest.mark.slow),
    ],
)
def test_matrix_products(left: Any, right: Any, left_zero: Any, right_zero: Any, constants: Any) -> None:
    feeds = {
        "a": numbers(left, 2, 5, 37),
        "b": numbers(right, 37, 19),
        "p": None if left_zero is None else numbers(left, *left_zero),
        "q": None if right_zero is None else numbers(right, *right_zero),
    }
    module = minicc.compile(node_model("MatMulInteger", feeds, ["y"], constants), target=TARGET.name, strict=True)
    assert "gemm" in names(module)
    p = feeds["p"] if left_zero != (5,) else feeds["p"].reshape(5, 1)  # type: ignore[union-attr]
    np.testing.assert_array_equal(run_module(module, feeds)[0], centred(feeds["a"], p) @ centred(feeds["b"], feeds["q"]))


@pytest.mark.parametrize(
    ("image", "weights", "zeros", "groups", "channels", "filters"),
    [
        (np.uint8, np.int8, (None, None), 1, 16, 9),
        (np.uint8, np.uint8, ((), (7,)), 1, 3, 7),
        pytest.param(np.int8, np.int8, ((), None), 1, 5, 70, marks=pytest.mark.slow),
        pytest.param(np.int8, np.uint8, ((), (10,)), 2, 6, 5, marks=pytest.mark.slow),
        pytest.param(np.uint8, np.uint8, (None, ()), 2, 4, 20, marks=pytest.mark.slow),
    ],
)
def test_convolutions(image: Any, weights: Any, zeros: Any, groups: int, channels: int, filters: int) -> None:
    """Padded on three sides; zero points of the activation are computed, those of the weights are not."""
    feeds = {
        "x": numbers(image, 2, groups * channels, 7, 8),
        "w": numbers(weights, groups * filters, channels, 3, 2),
        "p": None if zeros[0] is None else numbers(image, *zeros[0]),
        "q": None if zeros[1] is None else numbers(weights, *zeros[1]),
    }
    attributes = {"group": groups, "strides": [2, 1], "pads": [1, 1, 1, 0]}
    proto = node_model("ConvInteger", feeds, ["y"], ("w", "q"), **attributes)
    module = minicc.compile(proto, target=TARGET.name, strict=True)
    assert "conv" in names(module)
    q = None if feeds["q"] is None else feeds["q"].reshape(-1, 1, 1, 1)
    x = np.pad(centred(feeds["x"], feeds["p"]), [(0, 0), (0, 0), (1, 1), (1, 0)])
    # The oracle takes three spatial axes with equal pads.
    wanted = convolve(
        np.moveaxis(x, 1, -1)[:, None], centred(feeds["w"], q)[:, :, None], groups, [1, 2, 1], [1, 1, 1], [0, 0, 0]
    )
    np.testing.assert_array_equal(run_module(module, feeds)[0], np.moveaxis(wanted[:, 0], -1, 1))


def agrees(model: onnx.ModelProto, x: Array, kernels: set[str]) -> None:
    """Nothing on the host, integer products by tensor cores, and ONNX Runtime's numbers."""
    module = minicc.compile(model, target=TARGET.name, strict=True)
    assert kernels <= set(names(module))
    (got,) = run_module(module, {"x": x})
    (want,) = session(model.SerializeToString(), 1, plain=True).run(None, {"x": x})
    _, problem = difference(rule(model), "y", want, got)
    assert not problem, problem


@pytest.mark.parametrize(
    ("activations", "weights", "form"),
    [
        (QuantType.QUInt8, QuantType.QUInt8, QuantFormat.QOperator),
        pytest.param(QuantType.QUInt8, QuantType.QInt8, QuantFormat.QDQ, marks=pytest.mark.slow),
        pytest.param(QuantType.QInt8, QuantType.QInt8, QuantFormat.QDQ, marks=pytest.mark.slow),
    ],
    ids=["operators-u8u8", "qdq-u8s8", "qdq-s8s8"],
)
def test_quantised_convolutions(tmp_path: Path, activations: Any, weights: Any, form: Any) -> None:
    model, x = convolutions()
    agrees(quantise_static(model, x, tmp_path, activations, weights, form), x[:1], {"conv", "gemm"})


def test_quantised_products(tmp_path: Path) -> None:
    """Scales and zero points found at run time."""
    model, x = products()
    model = quantise_dynamic(model, tmp_path)
    agrees(model, x, {"gemm"})
    if find_tool("ptxas") is None or find_tool("cuobjdump") is None:
        pytest.skip("ptxas or cuobjdump is not installed")
    elsewhere = minicc.compile(model, target="cuda:sm_80")
    assert any("IMMA.16832.U8.S8" in machine_text(data) for data in elsewhere.code.objects.values())
