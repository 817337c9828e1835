"""Mixtures of experts, against ONNX Runtime for what its CPU kernels compute, else against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minicc.errors import ShapeError
from tests.ops.microsoft import check, compiled
from tests.ops.test_matmul import integers, normal

TIGHT = {"rtol": 1e-4, "atol": 1e-4}


def experts(count: int, width: int, inner: int, *, fused: bool = False, biased: bool = True, third: bool = False) -> list[Any]:
    first = inner * (2 if fused else 1)
    found: list[Any] = [normal(count, first, width, seed=1), normal(count, first, seed=2) if biased else None]
    found += [normal(count, width, inner, seed=3), normal(count, width, seed=4) if biased else None]
    return found + ([normal(count, inner, width, seed=5), normal(count, inner, seed=6) if biased else None] if third else [])


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
@pytest.mark.parametrize("normalise", [0, 1])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_experts(activation: str, normalise: int, shape: tuple[int, ...]) -> None:
    rows = int(np.prod(shape[:-1]))
    attrs = {"activation_type": activation, "k": 2, "normalize_routing_weights": normalise}
    check("MoE", [normal(*shape), normal(rows, 4), *experts(4, 8, 6)], attrs, constants=range(2, 6), **TIGHT)


@pytest.mark.parametrize("limit", [{}, {"swiglu_limit": 0.7}])
@pytest.mark.parametrize("biased", [False, True])
def test_gated_experts(limit: dict[str, float], biased: bool) -> None:
    attrs = {"activation_type": "swiglu", "k": 2, "swiglu_fusion": 1, "activation_alpha": 1.702, "activation_beta": 1.0, **limit}
    inputs = [normal(5, 8), normal(5, 4), *experts(4, 8, 6, fused=True, biased=biased)]
    check("MoE", inputs, attrs, constants=range(2, 6), free=(0, 1), **TIGHT)


@pytest.mark.parametrize("attrs", [
    {"activation_type": "swiglu", "swiglu_fusion": 2}, {"activation_type": "geglu", "swiglu_fusion": 1},
    {"activation_type": "swiglu", "swiglu_fusion": 2, "swiglu_limit": 0.4, "swiglu_limit_after_activation": 1},
    {"activation_type": "swiglu"}, {"activation_type": "silu"}, {"activation_type": "relu2"},
])  # fmt: skip
def test_experts_of_other_devices(attrs: dict[str, Any]) -> None:
    fused, third = "swiglu_fusion" in attrs, "swiglu_fusion" not in attrs and attrs["activation_type"] != "relu2"
    inputs = [normal(5, 8), normal(5, 4), *experts(4, 8, 6, fused=fused, third=third)]
    check("MoE", inputs, {**attrs, "k": 2}, constants=range(2, 8), runtime=False, **TIGHT)


def test_few_of_many_experts_are_chosen_on_the_host() -> None:
    inputs = [normal(3, 8), normal(3, 16), *experts(16, 8, 6)]
    check("MoE", inputs, {"k": 2}, constants=range(2, 6), host=("MoE",), **TIGHT)


@pytest.mark.parametrize("attrs", [
    {"activation_type": "tanh"}, {"use_sparse_mixer": 1}, {"k": 5}, {"activation_type": "swiglu"}, {"swiglu_fusion": 3},
])  # fmt: skip
def test_experts_that_do_not_fit(attrs: dict[str, Any]) -> None:
    with pytest.raises(ShapeError):
        compiled("MoE", [normal(5, 8), normal(5, 4), *experts(4, 8, 6)], attrs)


def packed(count: int, outputs: int, inputs: int, bits: int, block: int | None, zero: bool) -> tuple[list[Any], Any]:
    """(weights and scales, zero points) of a layer."""
    blocks = (inputs // block,) if block else ()
    scales = np.abs(normal(count, outputs, *blocks)) * np.float32(0.02) + np.float32(0.01)
    shape = (outputs, -(-blocks[0] * bits // 8)) if blocks else (-(-outputs * bits // 8),)
    points = integers(np.uint8, count, *shape, seed=bits) if zero else None
    return [integers(np.uint8, count, outputs, inputs * bits // 8), scales], points


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (4, None), (8, None), (2, 16)])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_quantised_experts(bits: int, block: int | None, zero: bool, activation: str) -> None:
    inner, gated = 32, activation == "swiglu"
    first, first_zero = packed(4, inner * (2 if gated else 1), 64, bits, block, zero)
    second, second_zero = packed(4, 64, inner, bits, block, zero)
    bias = normal(4, inner * (2 if gated else 1), seed=8)
    inputs = [normal(5, 64), normal(5, 4), *first, bias, *second, None, None, None, None, first_zero, second_zero]
    attrs: dict[str, Any] = {"activation_type": activation, "k": 2, "expert_weight_bits": bits, "normalize_routing_weights": 1}
    attrs |= {"weights_prepacked": 0, "swiglu_fusion": 1} if gated else {"weights_prepacked": 0}
    attrs |= {"block_size": block} if block else {}
    check("QMoE", inputs, attrs, constants=(2, 3, 4, 5, 6, 11, 12), host=("QMoE",), **TIGHT)


def test_quantised_experts_weighed_by_other_numbers() -> None:
    (first, _), (second, _) = packed(4, 32, 64, 4, 16, False), packed(4, 64, 32, 4, 16, False)
    weights = np.abs(normal(5, 4, seed=3))  # ONNX Runtime skips experts of negative weights
    inputs = [normal(5, 64), normal(5, 4), *first, None, *second, *[None] * 7, weights]
    attrs = {"activation_type": "relu", "k": 2, "block_size": 16}
    check("QMoE", inputs, attrs, constants=(2, 3, 5, 6), host=("QMoE",), **TIGHT)


def test_quantised_experts_that_do_not_fit() -> None:
    (first, _), (second, _) = packed(4, 32, 64, 4, 16, False), packed(4, 64, 32, 4, 16, False)
    inputs = [normal(5, 64), normal(5, 4), *first, None, *second]
    for attrs in ({"quant_type": "fp8"}, {"weights_prepacked": 1}, {"expert_weight_bits": 3}):
        with pytest.raises(ShapeError, match="weights"):
            compiled("QMoE", inputs, attrs)
