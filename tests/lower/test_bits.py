"""Products with weights of few bits, as models: they stay packed, what follows is fused, and bad ones are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import minicc
from minicc.errors import MiniccError, ShapeError
from minicc.frontend.model import load_model
from minicc.ir.dims import SymbolicDim
from minicc.lower.kernel import TemplateKernel
from minicc.lower.program import KernelStep
from minicc.lower.slices import sliced_symbol
from minicc.options import Options
from minicc.targets.cpu import host_target

Array = np.ndarray[Any, Any]


def model(
    k: int, n: int, *, size: int = 32, bits: int = 4, zeros: str = "", bias: bool = False, then: str = "",
    dtype: str = "float32", shape: tuple[Any, ...] = ("b", "s", None), seed: int = 0, **changes: Any,
) -> tuple[Any, Array]:  # fmt: skip
    """(a model of one MatMulNBits node, perhaps with Relu behind it, its weights [K, N] taken apart one by one).

    zeros: "", "packed" or "float". changes: arrays instead of those made here, or attributes.
    """
    rng = np.random.default_rng(seed)
    blocks = -(-k // size)
    numbers = rng.integers(0, 1 << bits, (n, blocks * size))
    scales = rng.uniform(0.01, 0.1, (n, blocks)).astype(dtype)
    points = np.full((n, blocks), 1 << (bits - 1), np.float64)
    given: dict[str, Array] = {"packed": _bytes(numbers, bits).reshape(n, blocks, -1), "scales": scales.reshape(-1)}
    if zeros == "packed":
        drawn = rng.integers(0, 1 << bits, (n, blocks))
        per_byte = 8 // bits
        padded = np.concatenate([drawn, np.zeros((n, -blocks % per_byte), np.int64)], 1)
        given["zeros"], points = _bytes(padded, bits).reshape(-1), drawn.astype(np.float64)
    elif zeros == "float":
        given["zeros"] = rng.uniform(0, 1 << bits, (n, blocks)).astype(dtype)
        points = given["zeros"].astype(np.float64)
    names = ["x", "packed", "scales", "zeros" if zeros else "", "", "bias" if bias else ""]
    if bias:
        given["bias"] = rng.standard_normal(n).astype(dtype)
    attributes = {"K": k, "N": n, "bits": bits, "block_size": size}
    attributes |= {name: value for name, value in changes.items() if not isinstance(value, np.ndarray)}
    given |= {name: value for name, value in changes.items() if isinstance(value, np.ndarray)}
    while not names[-1]:
        names.pop()
    nodes = [helper.make_node("MatMulNBits", names, ["p" if then else "y"], name="bits", domain="com.microsoft", **attributes)]
    if then:
        nodes.append(helper.make_node(then, ["p"], ["y"]))
    type_ = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x = helper.make_tensor_value_info("x", type_, [k if d is None else d for d in shape])
    y = helper.make_tensor_value_info("y", type_, [*shape[:-1], n])
    graph = helper.make_graph(nodes, "bits", [x], [y], [numpy_helper.from_array(a, name) for name, a in given.items()])
    sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    weights = (numbers - np.repeat(points, size, 1)) * np.repeat(scales.astype(np.float64), size, 1)
    return helper.make_model(graph, opset_imports=sets, ir_version=9), weights[:, :k].T


def _bytes(numbers: Array, bits: int) -> Array:
    """Numbers side by side in bytes, the first one in the lowest bits."""
    per_byte = 8 // bits
    split = numbers.reshape(*numbers.shape[:-1], -1, per_byte)
    return np.sum(split << (bits * np.arange(per_byte)), -1).astype(np.uint8)


def templates(module: minicc.Module) -> list[str]:
    return [kernel.template for kernel in module.program.kernels if isinstance(kernel, TemplateKernel)]


@settings(max_examples=12, deadline=None)
@given(
    k=st.integers(1, 100), n=st.integers(1, 40), size=st.sampled_from([16, 32, 128]), bits=st.sampled_from([2, 4, 8]),
    zeros=st.sampled_from(["", "packed", "float"]), bias=st.booleans(), then=st.sampled_from(["", "Relu"]),
    rows=st.sampled_from([(1, 1), (1, 7), (3, 2), (2, 40)]), dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_model_computes_with_packed_weights(
    k: int, n: int, size: int, bits: int, zeros: str, bias: bool, then: str, rows: tuple[int, int], dtype: str, seed: int
) -> None:
    made, weights = model(k, n, size=size, bits=bits, zeros=zeros, bias=bias, then=then, dtype=dtype, seed=seed)
    module = minicc.compile(made, keep_bytes=0)
    assert templates(module) == ["gemm_bits"]
    x = np.random.default_rng(seed).standard_normal((*rows, k)).astype(dtype)
    exact = x.astype(np.float64) @ weights
    if bias:
        exact = exact + numpy_helper.to_array(made.graph.initializer[-1]).astype(np.float64)
    exact = np.maximum(exact, 0) if then else exact
    unit = 2.0**-23 * (k + 8) if dtype == "float32" else 2.0**-10
    largest = np.abs(x.astype(np.float64)) @ (np.abs(weights) + 0.1 * 2**bits) + 4
    assert (np.abs(module(x) - exact) <= unit * largest).all()


def test_what_follows_is_fused_and_weights_stay_packed() -> None:
    made, _ = model(256, 512, bias=True, then="Relu")
    module = minicc.compile(made, keep_bytes=0)
    assert module.stats()["kernel_calls"] == 1
    # Half a byte for a number and four for the scale of 32, where float32 weights take four bytes each.
    assert 256 * 512 * (1 / 2 + 4 / 32) <= module.stats()["weights_bytes"] < 256 * 512 * 0.7


ROUNDS = host_target().vector_width >= 8


@pytest.mark.skipif(not ROUNDS, reason="the processor has no byte products of 256 bits")
@settings(max_examples=8, deadline=None)
@given(
    k=st.integers(1, 100), n=st.integers(1, 40), size=st.sampled_from([16, 32, 128]),
    zeros=st.sampled_from(["", "packed", "float"]), bias=st.booleans(), rows=st.sampled_from([(1, 1), (3, 2), (2, 40)]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_rows_are_rounded_where_the_model_allows_it(
    k: int, n: int, size: int, zeros: str, bias: bool, rows: tuple[int, int], seed: int
) -> None:
    made, weights = model(k, n, size=size, zeros=zeros, bias=bias, seed=seed, accuracy_level=4)
    module = minicc.compile(made, keep_bytes=0)
    assert templates(module) == ["round_rows", "gemm_rounded"]
    x = np.random.default_rng(seed).standard_normal((*rows, k)).astype(np.float32)
    rounded = np.empty(x.shape)
    for first in range(0, k, size):
        part = x[..., first : first + size]
        largest = np.abs(part).max(-1, keepdims=True)
        rounded[..., first : first + size] = np.rint(part * (np.float32(127) / largest)) * (largest.astype(np.float64) / 127)
    offset = numpy_helper.to_array(made.graph.initializer[-1]).astype(np.float64) if bias else 0.0
    largest = np.abs(x.astype(np.float64)) @ (np.abs(weights) + 1.6) + 4
    assert (np.abs(module(x) - (rounded @ weights + offset)) <= 2.0**-23 * (k + 8) * largest).all()
    exact = minicc.compile(made, keep_bytes=0, rounding=False)
    assert templates(exact) == ["gemm_bits"]
    assert (np.abs(exact(x) - (x.astype(np.float64) @ weights + offset)) <= 2.0**-23 * (k + 8) * largest).all()


def test_rows_are_rounded_once_for_all_that_read_them() -> None:
    made, _ = model(64, 32, accuracy_level=4)
    second = helper.make_node("MatMulNBits", ["x", "packed", "scales"], ["z"], domain="com.microsoft", K=64, N=32, bits=4,
                              block_size=32, accuracy_level=4)  # fmt: skip
    made.graph.node.append(second)
    made.graph.node[1].input[1] = "packed2"
    made.graph.initializer.append(numpy_helper.from_array(np.zeros((32, 2, 16), np.uint8), "packed2"))
    made.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["b", "s", 32]))
    module = minicc.compile(made, "cpu:avx2", keep_bytes=0)
    steps = [step for step in module.program.steps if isinstance(step, KernelStep)]
    used = [module.program.kernels[step.kernel] for step in steps]
    assert [k.template for k in used if isinstance(k, TemplateKernel)] == ["round_rows", "gemm_rounded", "gemm_rounded"]


@pytest.mark.parametrize("target", ["cpu:sse", "cpu:neon"])
def test_targets_without_byte_products_do_not_round(target: str) -> None:
    made, _ = model(64, 32, accuracy_level=4)
    assert templates(minicc.compile(made, target, keep_bytes=0)) == ["gemm_bits"]


def test_batches_may_be_cut_by_rows() -> None:
    made, _ = model(64, 32, then="Relu")
    graph = load_model(made, Options()).graph
    assert isinstance(graph.inputs[0].shape[0], SymbolicDim) and sliced_symbol(graph) == str(graph.inputs[0].shape[0])


def test_other_forms_are_computed_without_the_template() -> None:
    """Blocks that are no whole words: with weights of float32."""
    made, weights = model(18, 5, size=18, bits=4)
    module = minicc.compile(made, keep_bytes=0)
    x = np.random.default_rng(1).standard_normal((2, 3, 18)).astype(np.float32)
    assert templates(module) == ["gemm"]
    np.testing.assert_allclose(module(x), x @ weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"packed": np.zeros((8, 2, 15), np.uint8)}, "input 1 must have 256 elements"),
        ({"scales": np.ones(15, np.float32)}, "input 2 must have 16 elements"),
        ({"zeros": "packed", "K": 64, "block_size": 64}, "input 1 must have 256|input 2 must have 8|input 3 must have"),
        ({"weight_prepacked": 1}, "another runtime's own"),
        ({"bits": 3}, "bits 1, 2, 4 or 8"),
        ({"block_size": 0}, "at least 1"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_node(changes: dict[str, Any], said: str) -> None:
    given = {name: changes.pop(name) for name in ("zeros",) if name in changes}
    made, _ = model(64, 8, **given)
    for name, value in changes.items():
        if isinstance(value, np.ndarray):
            at = next(i for i, tensor in enumerate(made.graph.initializer) if tensor.name == name)
            made.graph.initializer[at].CopyFrom(numpy_helper.from_array(value, name))
        else:
            old = [a for a in made.graph.node[0].attribute if a.name == name]
            for attribute in old:
                made.graph.node[0].attribute.remove(attribute)
            made.graph.node[0].attribute.append(helper.make_attribute(name, value))
    with pytest.raises(ShapeError, match=said) as caught:
        minicc.compile(made, keep_bytes=0)
    assert "bits" in str(caught.value)


def test_rows_of_another_length_are_refused_when_they_come() -> None:
    made, _ = model(64, 8, shape=("b", "k"))
    made.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "k"
    module = minicc.compile(made, keep_bytes=0)
    assert module(np.zeros((2, 64), np.float32)).shape == (2, 8)
    with pytest.raises(MiniccError, match=r"6[34]"):
        module(np.zeros((2, 63), np.float32))
