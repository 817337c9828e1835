"""integer-products: which products of dequantised operands become integer products, and that numbers stay."""

from __future__ import annotations

import numpy as np
import pytest

from minicc.ir.evaluate import evaluate
from minicc.options import Options
from minicc.passes import default_pipeline
from minicc.passes.manager import Pass, PassContext, run_passes
from minicc.passes.quantise_integer import integer_products
from tests.passes.models import apply, graph_of, ops

INTEGER = Pass("integer-products", integer_products)
DEQUANTISE = "f = DequantizeLinear(x, sx, zx) g = DequantizeLinear<axis={axis}>(w, sw, zw) "
SCALES = "float sx = {0.02}, uint8 zx = {7}"
MATRIX = "int8[3,2] w = {1, -2, 3, 100, -128, 6}"
VECTORS = "float[2] sw = {0.1, 0.3}, int8[2] zw = {0, 3}"
ONE = "float sw = {0.1}, int8 zw = {5}"
FILTERS = "int8[2,3,1,1] w = {1, -2, 3, 100, -128, 6}"
ROWS = "(uint8[n,3] x) => (float[n,2] y)"
IMAGES = "(uint8[n,3,4,5] x) => (float[n,2,4,5] y)"


@pytest.mark.parametrize(
    ("product", "signature", "constants", "axis", "operator"),
    [
        ("y = MatMul(f, g)", ROWS, f"{MATRIX}, {VECTORS}", 1, "MatMulInteger"),
        ("y = MatMul(f, g)", ROWS, f"{MATRIX}, {ONE}", 1, "MatMulInteger"),
        ("y = Gemm<transB=1>(f, g, b)", ROWS,
         f"{MATRIX.replace('3,2', '2,3')}, {VECTORS}, float[2] b = {{1, 2}}", 0, "MatMulInteger"),
        ("y = Conv(f, g, b)", IMAGES, f"{FILTERS}, {VECTORS}, float[2] b = {{1, 2}}", 0, "ConvInteger"),
        ("y = Conv(f, g)", IMAGES, f"{FILTERS}, {ONE}", 0, "ConvInteger"),
    ],
)  # fmt: skip
def test_becomes_an_integer_product(product: str, signature: str, constants: str, axis: int, operator: str) -> None:
    graph = graph_of(DEQUANTISE.format(axis=axis) + product, f"{signature} <{SCALES}, {constants}>")
    shape = [2 if not isinstance(size, int) else size for size in graph.inputs[0].shape]
    x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    (want,) = evaluate(graph, [x])
    assert apply(graph, INTEGER).rows[0].changes == 1
    assert ops(graph)[operator] == 1
    np.testing.assert_allclose(evaluate(graph, [x])[0], want, rtol=1e-5, atol=1e-5)
    assert integer_products(graph, PassContext()) == 0


@pytest.mark.parametrize(
    ("product", "signature", "constants", "axis"),
    [
        ("y = MatMul(f, g)", "(uint8[n,3] x, int8[3,2] w) => (float[n,2] y)", VECTORS, 1),  # weights given
        ("y = MatMul(f, g)", ROWS, f"{MATRIX}, float[3] sw = {{0.1, 0.2, 0.3}}, int8[3] zw = {{0, 0, 0}}", 0),  # scales along k
        ("y = Gemm<alpha=0.5>(f, g)", ROWS, f"{MATRIX}, {ONE}", 1),
        ("y = Conv<group=2>(f, g)", "(uint8[n,2,4,5] x) => (float[n,2,4,5] y)",
         f"int8[2,1,1,1] w = {{1, -2}}, {ONE}", 0),  # one channel per group
    ],
)  # fmt: skip
def test_stays_in_float(product: str, signature: str, constants: str, axis: int) -> None:
    graph = graph_of(DEQUANTISE.format(axis=axis) + product, f"{signature} <{SCALES}, {constants}>")
    assert integer_products(graph, PassContext()) == 0


def test_depthwise_integer_convolution_is_exact_in_float() -> None:
    weights = "int8[2,1,1,3] w = {1, -2, 127, 100, -128, -127}, int8[2] zw = {0, 3}"
    graph = graph_of("y = ConvInteger<group=2, pads=[0,1,0,1]>(x, w, zx, zw)",
                     f"(uint8[n,2,4,5] x) => (int32[n,2,4,5] y) <uint8 zx = {{7}}, {weights}>")  # fmt: skip
    x = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 5), np.uint8)
    (want,) = evaluate(graph, [x])
    assert apply(graph, INTEGER).rows[0].changes == 1
    assert ops(graph)["Conv"] == 1
    np.testing.assert_array_equal(evaluate(graph, [x])[0], want)


def test_weights_that_the_model_quantises_itself() -> None:
    """As exported from training with simulated quantisation: the weights are float constants."""
    body = "q = QuantizeLinear(v, sw, zw) f = DequantizeLinear(x, sx, zx) g = DequantizeLinear(q, sw, zw) y = MatMul(f, g)"
    graph = graph_of(body, f"{ROWS} <{SCALES}, {ONE}, float[3,2] v = {{0.1, 0.2, -0.3, 0.4, 5, 6}}>")
    assert integer_products(graph, PassContext()) == 1


def test_the_pipeline_folds_no_weights_to_float() -> None:
    graph = graph_of(DEQUANTISE.format(axis=1) + "y = MatMul(f, g)", f"{ROWS} <{SCALES}, {MATRIX}, {VECTORS}>")
    run_passes(graph, default_pipeline(Options()), Options())
    names = {node.op.name for node in graph.nodes} | {
        inner.op.name for node in graph.nodes if node.op.name == "Fused" for inner in node.attrs["body"].nodes
    }
    assert "MatMulInteger" in names
