"""Matrix products and Einsum: ONNX's cases, ONNX Runtime for com.microsoft, numpy for the rest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicc.errors import MiniccError
from minicc.ir.graph import Graph
from minicc.ir.types import TensorType, f32
from tests.ops.onnx_cases import Case, cases_of, check_call, check_case
from tests.ops.runtime_oracle import check_against_onnxruntime

MICROSOFT = "com.microsoft"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def integers(dtype: type, *shape: int, seed: int = 0) -> np.ndarray:
    info = np.iinfo(dtype)
    return (
        np.random.default_rng([seed, *shape]).integers(info.min, info.max, shape, endpoint=True).astype(dtype)
    )


def weights(*shape: int) -> np.ndarray:
    """int8 of seven bits, as quantisers write with reduce_range: on processors without VNNI instructions ONNX Runtime
    adds products of u8 and s8 in saturating 16 bits, exact only for these."""
    return integers(np.int8, *shape) // np.int8(2)


@pytest.mark.parametrize("case", cases_of("MatMul", "MatMulInteger", "Gemm", "Einsum"), ids=lambda c: c.name)
def test_onnx_case(case: Case) -> None:
    check_case(case)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((4,), (4,)),
        ((3, 4), (4,)),
        ((4,), (4, 5)),
        ((2, 3, 4), (4,)),
        ((4,), (2, 4, 5)),
        ((2, 1, 3, 4), (6, 4, 5)),
        ((0, 4), (4, 5)),
        ((3, 0), (0, 5)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.float16])
def test_matmul_shapes(a: tuple[int, ...], b: tuple[int, ...], dtype: type) -> None:
    x, y = (normal(*a) * 4).astype(dtype), (normal(*b) * 4).astype(dtype)
    wide = np.float64 if np.issubdtype(dtype, np.floating) else dtype
    check_call(
        "MatMul", [x, y], {}, [np.matmul(x.astype(wide), y.astype(wide)).astype(dtype)], rtol=1e-4, atol=1e-4
    )


EQUATIONS = [
    ("ij,jk->ik", (3, 4), (4, 5)),
    ("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
    ("bhid,bhjd->bhij", (2, 3, 4, 5), (2, 3, 6, 5)),
    ("...ij,...kj->...ik", (2, 3, 4), (2, 5, 4)),
    ("i,j->ij", (3,), (4,)),
    ("ij,ij->", (3, 4), (3, 4)),
    ("ij->", (3, 4), None),
    ("abcd->dbca", (2, 3, 4, 5), None),
    ("ab,bc,cd", None, None),
    ("ij,j", (3, 4), (4,)),
    ("bqc,bchw->bqhw", (2, 5, 3), (2, 3, 4, 6)),
    ("bhwc,hkc->bhwk", (2, 3, 4, 5), (3, 6, 5)),
    ("ijk,jl->ilk", (2, 3, 4), (3, 5)),
    ("abcxd,abcdy->abcxy", (2, 2, 2, 3, 4), (2, 2, 2, 4, 5)),
    ("...i,i->...", (2, 3, 4), (4,)),
    ("aB, Bc -> ac", (2, 3), (3, 4)),
    ("ij,kl->", (2, 3), (4, 5)),
    ("b...d,d...->b...", (2, 3, 4), (4, 3)),
]


@pytest.mark.parametrize(("equation", "first", "second"), EQUATIONS, ids=lambda v: str(v))
def test_einsum(equation: str, first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> None:
    arrays = [normal(*s) for s in (first, second) if s is not None] or [
        normal(2, 3),
        normal(3, 4),
        normal(4, 5),
    ]
    expected = np.einsum(equation.replace(" ", ""), *(a.astype(np.float64) for a in arrays)).astype(
        np.float32
    )
    check_call("Einsum", arrays, {"equation": equation}, [np.asarray(expected)], rtol=1e-4, atol=1e-5)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_einsum_of_random_labels(data: st.DataObject) -> None:
    sizes = {label: i % 3 + 1 for i, label in enumerate("abcdef")}
    operands = [
        data.draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=4))
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    used = sorted({label for o in operands for label in o})
    output = data.draw(st.lists(st.sampled_from(used), unique=True)) if used else []
    equation = ",".join(map("".join, operands)) + "->" + "".join(output)
    arrays = [normal(*(sizes[label] for label in o)) for o in operands]
    expected = np.einsum(equation, *(a.astype(np.float64) for a in arrays)).astype(np.float32)
    check_call("Einsum", arrays, {"equation": equation}, [np.asarray(expected)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shapes", [((3, 4), (5, 6)), ((), (3,)), ((2, 3, 4), (3, 4, 5))])
def test_matmul_that_does_not_fit(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    graph = Graph()
    values = [graph.input(f"x{i}", TensorType(f32, s)) for i, s in enumerate(shapes)]
    with pytest.raises(MiniccError, match="MatMul"):
        graph.add("MatMul", values)


@pytest.mark.parametrize("equation", ["ij,jk", "ij->ik", "i j k->i", "ij->ii", "...ij.->", "ij,jk,->ik"])
def test_malformed_equation(equation: str) -> None:
    graph = Graph()
    with pytest.raises(MiniccError):
        graph.add("Einsum", [graph.input("x", TensorType(f32, (2, 2)))], {"equation": equation})


@pytest.mark.parametrize("flags", range(16))
def test_fused_matmul(flags: int) -> None:
    sides = []
    for side, (rows, columns) in enumerate(((3, 4), (4, 5))):
        transpose, batch = flags >> side & 1, flags >> (2 + side) & 1
        shape = [2, columns, rows] if transpose else [2, rows, columns]
        sides.append([shape[1], shape[0], shape[2]] if batch else shape)
    attrs = {
        "alpha": 0.5,
        "transA": flags & 1,
        "transB": flags >> 1 & 1,
        "transBatchA": flags >> 2 & 1,
        "transBatchB": flags >> 3,
    }
    check_against_onnxruntime("FusedMatMul", [normal(*sides[0]), normal(*sides[1])], attrs, domain=MICROSOFT)


@pytest.mark.parametrize(
    "attrs", [{"activation": "Relu", "beta": 2.0}, {"activation": "LeakyRelu", "activation_alpha": 0.1}]
)
def test_fused_gemm(attrs: dict[str, object]) -> None:
    check_against_onnxruntime("FusedGemm", [normal(3, 4), normal(4, 5), normal(5)], attrs, domain=MICROSOFT)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("with_zero", [False, True])
def test_matmul_nbits(bits: int, with_zero: bool) -> None:
    k, n, size = 40, 6, 16
    inputs = [normal(2, 3, k), integers(np.uint8, n, 3, size * bits // 8), np.abs(normal(n * 3))]
    inputs += [integers(np.uint8, n * ((3 * bits + 7) // 8), seed=1)] if with_zero else []
    attrs = {"K": k, "N": n, "bits": bits, "block_size": size, "accuracy_level": 1}
    check_against_onnxruntime(
        "MatMulNBits", inputs, attrs, domain=MICROSOFT, constants=(1, 2, 3), rtol=1e-4, atol=1e-3
    )


def test_matmul_integer_with_column_zero_points() -> None:
    inputs = [integers(np.uint8, 3, 4), weights(4, 5), np.uint8(3), integers(np.int8, 5)]
    check_against_onnxruntime("MatMulInteger", inputs, constants=(1, 3))
