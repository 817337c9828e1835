"""Matrix products: MatMul, Gemm, Einsum, MatMulInteger and com.microsoft's FusedMatMul, FusedGemm,
MatMulNBits.

Only MatMul and MatMulInteger compute; the others become them. Products of quantised operands with a quantised
result are in `quant`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.dims import Dim, product
from minicc.ir.expr import Expr, cast
from minicc.ir.opdef import REQUIRED, Indexing, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, bf16, broadcast_shapes, f16, f32, i32, u8
from minicc.ops.helpers import (
    Array,
    broadcast_index,
    computed_in_f32,
    default_refuse,
    kernel_dtypes,
    require_same_dtype,
)

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value


# -- MatMul


def matmul_shape(n: Inference, a: tuple[Dim, ...], b: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The shape of numpy's matmul of shapes `a` and `b`. Raises ShapeError when they do not fit."""
    if not a or not b:
        raise n.error("operands must not be scalars")
    inner_a, inner_b = a[-1], b[-2] if len(b) > 1 else b[0]
    if isinstance(inner_a, int) and isinstance(inner_b, int) and inner_a != inner_b:
        raise n.error(f"inner sizes differ: {inner_a} and {inner_b}")
    try:
        batch = broadcast_shapes(a[:-2], b[:-2])
    except ShapeError as error:
        raise n.error(error.what) from error
    return (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))


def _matmul_infer(n: Inference) -> list[TensorType]:
    return [TensorType(require_same_dtype(n), matmul_shape(n, n.shape(0), n.shape(1)))]


def _operand_indices(c: Indexing, index: Sequence[Expr], k: Expr) -> tuple[list[Any], list[Any]]:
    """Where the factors of output element `index` at inner position `k` lie."""
    a, b, out = c.type(0).dims, c.type(1).dims, c.out_type(0).dims
    row = len(a) > 1
    column = len(b) > 1
    rank = len(out) - row - column
    batch = index[:rank]
    left = [*broadcast_index(batch, a[:-2], out[:rank]), index[rank], k] if row else [k]
    right = [*broadcast_index(batch, b[:-2], out[:rank]), k, index[-1]] if column else [k]
    return left, right


def _inner(c: Indexing) -> Dim:
    a, b = c.type(0).dims[-1], c.type(1).dims
    other = b[-2] if len(b) > 1 else b[0]
    return a if isinstance(a, int) else other


def _matmul_compute(c: Indexing, index: tuple[Expr, ...]) -> Expr:
    dtype = c.type(0).dtype
    wide = f32 if dtype in (f16, bf16) else dtype

    def term(k: Expr) -> Expr:
        left, right = _operand_indices(c, index, k)
        return cast(c.load(0, left), wide) * cast(c.load(1, right), wide)

    return cast(c.reduce("sum", [_inner(c)], term), dtype)


@computed_in_f32
def _matmul_eval(a: Array, b: Array) -> Array:
    return np.asarray(np.matmul(a, b))


MATMUL = register(
    OpDef(
        "MatMul",
        Kind.CONTRACT,
        infer=_matmul_infer,
        eval=_matmul_eval,
        compute=_matmul_compute,
        refuse=default_refuse,
    )
)


# -- MatMulInteger


def _matmul_integer_infer(n: Inference) -> list[TensorType]:
    for i in (0, 1):
        if n.dtype(i).kind not in "iu" or n.dtype(i).bits != 8:
            raise n.error("needs 8-bit integers")
    return [TensorType(i32, matmul_shape(n, n.shape(0), n.shape(1)))]


def _zero_point_index(point: tuple[Dim, ...], operand: list[Any], axis: int) -> list[Any]:
    """Where the zero point of an operand's element lies; a vector runs along the operand's `axis`."""
    if len(point) < len(operand):
        return [] if not point else [0 if point[0] == 1 else operand[axis]]
    return [0 if size == 1 else i for size, i in zip(point, operand)]


def _matmul_integer_compute(c: Indexing, index: tuple[Expr, ...]) -> Expr:
    def element(k: int, where: list[Any], axis: int) -> Expr:
        value = cast(c.load(k, where), i32)
        if not c.has(k + 2):
            return value
        return value - cast(c.load(k + 2, _zero_point_index(c.type(k + 2).dims, where, axis)), i32)

    def term(k: Expr) -> Expr:
        left, right = _operand_indices(c, index, k)
        return element(0, left, -2 if len(left) > 1 else 0) * element(1, right, -1)

    return c.reduce("sum", [_inner(c)], term)


def _matmul_integer_refuse(node: Node) -> str | None:
    a, zero = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    reason = default_refuse(node)
    if reason is None and a is not None and zero is not None and a.tensor.rank == 1 and zero.tensor.size != 1:
        return "a zero point for each row of a vector"
    return reason


def _matmul_integer_eval(
    a: Array, b: Array, a_zero: Array | None = None, b_zero: Array | None = None
) -> Array:
    left, right = a.astype(np.int32), b.astype(np.int32)
    if a_zero is not None:
        zero = a_zero.astype(np.int32)
        left = left - (zero[:, None] if zero.ndim == 1 and zero.size > 1 else zero)
    if b_zero is not None:
        right = right - b_zero.astype(np.int32)
    return np.asarray(np.matmul(left, right))


MATMUL_INTEGER = register(OpDef(
    "MatMulInteger", Kind.CONTRACT, infer=_matmul_integer_infer, eval=_matmul_integer_eval,
    compute=_matmul_integer_compute, refuse=_matmul_integer_refuse,
))  # fmt: skip


# -- Gemm and FusedGemm


def _gemm_infer(n: Inference) -> list[TensorType]:
    a, b = n.shape(0), n.shape(1)
    if len(a) != 2 or len(b) != 2:
        raise n.error("operands must be matrices")
    left = a[::-1] if n.attr("transA") else a
    right = b[::-1] if n.attr("transB") else b
    shape = matmul_shape(n, left, right)
    if n.has(2):
        try:
            found = broadcast_shapes(n.shape(2), shape)
        except ShapeError as error:
            raise n.error(error.what) from error
        if len(n.shape(2)) > 2 or (found != shape and all(isinstance(d, int) for d in (*found, *shape))):
            raise n.error(f"C cannot be broadcast to [{shape[0]},{shape[1]}]")
    return [TensorType(require_same_dtype(n), shape)]


def scaled(b: Builder, x: Value, factor: float) -> Value:
    """x * factor, or x itself for a factor of 1."""
    return x if factor == 1 else b.op("Mul", x, b.scalar(factor, x))


def _gemm_expand(b: Builder, node: Node) -> list[Value]:
    x, y = node.inputs[0], node.inputs[1]
    assert x is not None and y is not None
    x = b.op("Transpose", x, perm=[1, 0]) if node.attrs["transA"] else x
    y = b.op("Transpose", y, perm=[1, 0]) if node.attrs["transB"] else y
    out = scaled(b, b.op("MatMul", x, y), node.attrs["alpha"])
    c = node.inputs[2] if len(node.inputs) > 2 else None
    if c is not None and node.attrs["beta"] != 0:
        out = b.op("Add", out, scaled(b, c, node.attrs["beta"]))
    return [out]


def _gemm_refuse(node: Node) -> str | None:
    if node.output.tensor.dtype.is_integer and not all(
        float(node.attrs[k]).is_integer() for k in ("alpha", "beta")
    ):
        return "fractional alpha or beta with integers"
    return default_refuse(node)


@computed_in_f32
def _gemm_eval(
    a: Array, b: Array, c: Array | None = None, *, alpha: float, beta: float, transA: int, transB: int
) -> Array:
    out = np.matmul(a.T if transA else a, b.T if transB else b)
    if alpha != 1:
        out = alpha * out
    if c is not None and beta != 0:
        out = out + (c if beta == 1 else beta * c)
    return np.asarray(out).astype(a.dtype)


_GEMM_ATTRS = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
GEMM = register(
    OpDef(
        "Gemm",
        Kind.EXPAND,
        infer=_gemm_infer,
        eval=_gemm_eval,
        expand=_gemm_expand,
        refuse=_gemm_refuse,
        attrs=_GEMM_ATTRS,
    )
)

# activation name of com.microsoft ops: (operator, {attribute: attribute of the fused op that gives it})
ACTIVATIONS: dict[str, tuple[str, dict[str, str]]] = {
    "Relu": ("Relu", {}),
    "Tanh": ("Tanh", {}),
    "Sigmoid": ("Sigmoid", {}),
    "LeakyRelu": ("LeakyRelu", {"alpha": "activation_alpha"}),
    "HardSigmoid": ("HardSigmoid", {"alpha": "activation_alpha", "beta": "activation_beta"}),
}


def _activation(attrs: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Operator and attributes of the `activation` attribute; None when there is none. Raises ShapeError when
    unknown.
    """
    name = attrs["activation"]
    if not name:
        return None
    if name not in ACTIVATIONS:
        raise ShapeError(f"activation {name!r} is unknown", hint=f"known: {', '.join(ACTIVATIONS)}")
    operator, names = ACTIVATIONS[name]
    return operator, {k: attrs[source] for k, source in names.items()}


def _fused_gemm_expand(b: Builder, node: Node) -> list[Value]:
    out = b.op("Gemm", *node.inputs, **{k: node.attrs[k] for k in _GEMM_ATTRS})
    activation = _activation(node.attrs)
    if activation is None:
        return [out]
    operator, parameters = activation
    return [b.op(operator, out, **parameters)]


def _fused_gemm_eval(a: Array, b: Array, c: Array | None = None, **attrs: Any) -> Array:
    out = _gemm_eval(a, b, c, **{k: attrs[k] for k in _GEMM_ATTRS}).astype(np.float32)
    activation = _activation(attrs)
    functions = {
        "Relu": lambda x: np.maximum(x, 0),
        "Tanh": np.tanh,
        "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "LeakyRelu": lambda x, alpha: np.where(x < 0, alpha * x, x),
        "HardSigmoid": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
    }
    result = out if activation is None else functions[activation[0]](out, **activation[1])  # type: ignore[operator]
    return np.asarray(result).astype(a.dtype)


register(
    OpDef(
        "FusedGemm",
        Kind.EXPAND,
        infer=_gemm_infer,
        eval=_fused_gemm_eval,
        expand=_fused_gemm_expand,
        refuse=_gemm_refuse,
        attrs={
            **_GEMM_ATTRS,
            "activation": "",
            "activation_alpha": 0.0,
            "activation_beta": 0.0,
            "activation_gamma": 0.0,
        },
        domain="com.microsoft",
    )
)


# -- com.microsoft FusedMatMul


def _operand_permutation(rank: int, transpose: int, batch: int) -> list[int]:
    """How an operand is permuted before the product; `batch` means that the row axis comes first."""
    perm = list(range(rank))
    if rank < 2:
        return perm
    if batch and rank > 2:
        perm = [*range(1, rank - 1), 0, rank - 1]
    if transpose:
        perm[-1], perm[-2] = perm[-2], perm[-1]
    return perm


def _fused_matmul_infer(n: Inference) -> list[TensorType]:
    shapes = []
    for i, side in enumerate("AB"):
        shape = n.shape(i)
        perm = _operand_permutation(len(shape), n.attr(f"trans{side}"), n.attr(f"transBatch{side}"))
        shapes.append(tuple(shape[p] for p in perm))
    return [TensorType(require_same_dtype(n), matmul_shape(n, *shapes))]


def _fused_matmul_expand(b: Builder, node: Node) -> list[Value]:
    operands = []
    for i, side in enumerate("AB"):
        x = node.inputs[i]
        assert x is not None
        perm = _operand_permutation(
            x.tensor.rank, node.attrs[f"trans{side}"], node.attrs[f"transBatch{side}"]
        )
        operands.append(x if perm == sorted(perm) else b.op("Transpose", x, perm=perm))
    return [scaled(b, b.op("MatMul", *operands), node.attrs["alpha"])]


@computed_in_f32
def _fused_matmul_eval(a: Array, b: Array, **attrs: Any) -> Array:
    a = a.transpose(_operand_permutation(a.ndim, attrs["transA"], attrs["transBatchA"]))
    b = b.transpose(_operand_permutation(b.ndim, attrs["transB"], attrs["transBatchB"]))
    return np.asarray(np.matmul(a, b) * a.dtype.type(attrs["alpha"]))


register(
    OpDef(
        "FusedMatMul",
        Kind.EXPAND,
        infer=_fused_matmul_infer,
        eval=_fused_matmul_eval,
        expand=_fused_matmul_expand,
        refuse=default_refuse,
        domain="com.microsoft",
        attrs={"alpha": 1.0, "transA": 0, "transB": 0, "transBatchA": 0, "transBatchB": 0},
    )
)


# -- com.microsoft MatMulNBits: weights of 2, 4 or 8 bits in blocks along the inner axis


def unpack_bits(packed: Array, bits: int) -> Array:
    """Unsigned numbers of `bits` bits packed into bytes along the last axis, lowest bits first."""
    if bits not in (1, 2, 4, 8):
        raise ShapeError(f"{bits}-bit weights are not supported", hint="1, 2, 4 or 8 bits")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    values = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(values.reshape(*packed.shape[:-1], -1))


def dequantise_blocks(b: Array, scales: Array, zero: Array | None, attrs: dict[str, Any]) -> Array:
    """The float32 weights [K, N] of MatMulNBits from its packed form."""
    k, n, bits, size = attrs["K"], attrs["N"], attrs["bits"], attrs["block_size"]
    blocks = -(-k // size)
    numbers = unpack_bits(b.reshape(n, blocks, -1), bits)[:, :, :size].astype(np.float32)
    if zero is None:
        offset: Array = np.float32(1 << (bits - 1))  # type: ignore[assignment]
    elif zero.dtype == np.uint8:
        offset = unpack_bits(zero.reshape(n, -1), bits)[:, :blocks].astype(np.float32)[:, :, None]
    else:
        offset = zero.reshape(n, blocks).astype(np.float32)[:, :, None]
    weights = (numbers - offset) * scales.reshape(n, blocks, 1).astype(np.float32)
    return np.ascontiguousarray(weights.reshape(n, blocks * size)[:, :k].T)


def _check_size(n: Inference, i: int, elements: int) -> None:
    """Raise ShapeError where input i of MatMulNBits is given with another number of elements, in whatever shape."""
    size = product(n.shape(i)) if n.has(i) else elements
    if isinstance(size, int) and size != elements:
        raise n.error(f"input {i} must have {elements} elements, as K, N, bits and block_size say")


def _matmul_nbits_infer(n: Inference) -> list[TensorType]:
    a = n.shape(0)
    if isinstance(a[-1], int) and a[-1] != n.attr("K"):
        raise n.error(f"the inner size {a[-1]} is not K = {n.attr('K')}")
    if min(n.attr("K"), n.attr("N"), n.attr("block_size")) < 1 or n.attr("bits") not in (1, 2, 4, 8):
        raise n.error("K, N and block_size must be at least 1, and bits 1, 2, 4 or 8")
    if n.attr("weight_prepacked"):
        raise n.error("the weights are in an order of another runtime's own (weight_prepacked)")
    blocks = -(-n.attr("K") // n.attr("block_size"))
    bits, columns = n.attr("bits"), n.attr("N")
    _check_size(n, 1, columns * blocks * -(-n.attr("block_size") * bits // 8))
    _check_size(n, 2, columns * blocks)
    _check_size(n, 3, columns * (-(-blocks * bits // 8) if n.has(3) and n.dtype(3) == u8 else blocks))
    return [TensorType(n.dtype(0), (*a[:-1], n.attr("N")))]


def _matmul_nbits_refuse(node: Node) -> str | None:
    if any(v is not None and v.data is None for v in node.inputs[1:4]):
        return "packed weights that are computed at run time"
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        return "weights whose groups are permuted (g_idx)"
    return kernel_dtypes(node)


def _matmul_nbits_expand(b: Builder, node: Node) -> list[Value]:
    packed, scales, zero, _, bias = (*node.inputs[1:], None, None, None)[:5]
    x = node.inputs[0]
    assert packed is not None and scales is not None and x is not None
    assert packed.data is not None and scales.data is not None
    weights = dequantise_blocks(packed.data, scales.data, None if zero is None else zero.data, node.attrs)
    out = b.op("MatMul", x, b.constant(weights.astype(x.tensor.dtype.numpy)))
    return [out if bias is None else b.op("Add", out, bias)]


@computed_in_f32
def _matmul_nbits_eval(
    a: Array,
    b: Array,
    scales: Array,
    zero: Array | None = None,
    g_idx: Array | None = None,
    bias: Array | None = None,
    **attrs: Any,
) -> Array:
    if g_idx is not None:
        raise ShapeError(
            "MatMulNBits with g_idx is not supported", hint="export the weights without act_order"
        )
    out = np.matmul(a, dequantise_blocks(b, scales, zero, attrs).astype(a.dtype))
    return np.asarray(out if bias is None else out + bias)


register(
    OpDef(
        "MatMulNBits",
        Kind.EXPAND,
        infer=_matmul_nbits_infer,
        eval=_matmul_nbits_eval,
        expand=_matmul_nbits_expand,
        refuse=_matmul_nbits_refuse,
        domain="com.microsoft",
        attrs={
            "K": REQUIRED,
            "N": REQUIRED,
            "bits": 4,
            "block_size": REQUIRED,
            "accuracy_level": 0,
            "weight_prepacked": 0,
        },
    )
)
