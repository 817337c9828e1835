"""Products with dequantised weights keep the weights as they are: MatMulNBits, where the target has a kernel for it.

    MatMul | Gemm (x, DequantizeLinear(constant w))                      w of 4 or 8 bits, also behind a Transpose
        -> MatMulNBits(x, packed w, scales, zero points) + bias

and where it has none, MatMulNBits becomes MatMul with float weights, before precisions are chosen.

Scales run along the columns of w or along its rows in blocks, or there is one. It must run before folding turns the weights
into floats. Only matrices that as floats no cache would hold: smaller ones are as fast that way. Operands that are quantised,
too, are integer products (quantise_integer.py). Nothing is quantised here that the model has not quantised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minicc.ir.dims import ceil_divide
from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.types import TensorType
from minicc.passes.common import replacement, visit_bodies
from minicc.passes.expand import must_expand
from minicc.passes.manager import PassContext

Array = np.ndarray[Any, Any]
NAME = "packed-weights"
BITS = {"i4": 4, "u4": 4, "i8": 8, "u8": 8}
WORD = 32  # bits
WORTH = 1 << 20  # numbers of a matrix


@dataclass(frozen=True)
class Packed:
    """A matrix [K, N] of unsigned numbers: (number - zero) * scale with one scale and zero point per column and block of K."""

    numbers: Array  # uint8 [K, N]
    scales: Array  # [blocks, N]
    zeros: Array | None  # float32 [blocks, N]; None: all are the middle of the range
    bits: int
    block: int


def pack_products(graph: Graph, context: PassContext) -> int:
    """Rewrite every product with constant dequantised weights that the target computes packed; returns their number."""
    changes = visit_bodies(graph, lambda body: pack_products(body, context))
    for node in list(graph.nodes):
        if (node.op.domain, node.op.name) == ("com.microsoft", "MatMulNBits") and must_expand(node, context.keep):
            assert node.op.expand is not None
            (new,) = node.op.expand(Builder(graph, node.origin), node)
            graph.replace(node.output, replacement(graph, node.output, new, node.origin))
            context.rules["weights as floats"] += 1
            changes += 1
            continue
        if node.op.domain or node.op.name not in ("MatMul", "Gemm") or node.inputs[0] is None:
            continue
        found = _weights(node)
        if found is None:
            continue
        b = Builder(graph, node.origin)
        product = _product(b, node.inputs[0], found)
        assert product.producer is not None
        if not context.keep(product.producer):
            context.refusals[NAME, "the target has no kernel for the product"] += 1
            break  # nor for the others
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        new = product if bias is None else b.op("Add", product, bias)
        graph.replace(node.output, replacement(graph, node.output, new, node.origin))
        context.rules[node.op.name] += 1
        changes += 1
    graph.tidy()
    return changes


def _weights(node: Node) -> Packed | None:
    """The right operand of a product as packed numbers; None where it is something else."""
    x, w = node.inputs[:2]
    if x is None or w is None or w.producer is None or not isinstance(x.type, TensorType) or not isinstance(w.type, TensorType):
        return None
    if x.type.shape is None or len(x.type.shape) < 2 or x.type.dtype != w.type.dtype:
        return None
    turned = False
    if node.op.name == "Gemm":
        if node.attrs["transA"] or node.attrs["alpha"] != 1 or node.attrs["beta"] != 1:
            return None
        turned = bool(node.attrs["transB"])
    maker = w.producer
    source: Node | None = maker
    if maker.op.name == "Transpose" and maker.inputs[0] is not None and w.type.shape is not None and len(w.type.shape) == 2:
        turned ^= list(maker.attrs["perm"] or (1, 0)) == [1, 0]
        source = maker.inputs[0].producer
    return _dequantised(source, turned) if source is not None and source.op.name == "DequantizeLinear" else None


def _dequantised(node: Node, turned: bool) -> Packed | None:
    """A DequantizeLinear of a constant matrix; turned: the product reads its transpose."""
    value, scale, zero = (*node.inputs, None)[:3]
    if value is None or scale is None or any(v is not None and v.data is None for v in (value, scale, zero)):
        return None
    assert value.data is not None and scale.data is not None
    bits, data = BITS.get(value.tensor.dtype.name, 0), value.data
    if not bits or data.ndim != 2 or data.size < WORTH:
        return None
    k, n = data.shape[::-1] if turned else data.shape
    offset = 1 << (bits - 1) if value.tensor.dtype.name.startswith("i") else 0  # from signed to unsigned numbers
    points = np.zeros(scale.data.shape, np.float32) if zero is None or zero.data is None else zero.data.astype(np.float32)
    axis, block = node.attrs["axis"] % 2, node.attrs["block_size"]
    if block % (WORD // bits):
        return None
    factors, zeros = (_by_block(array, k, n, int(turned), axis, block) for array in (scale.data, points + offset))
    if factors is None or zeros is None:
        return None
    numbers = (data.astype(np.int16) + offset).astype(np.uint8)
    size = block or ceil_divide(k, WORD // bits) * (WORD // bits)
    assert isinstance(size, int)
    centred = bool((zeros == 1 << (bits - 1)).all())
    return Packed(numbers.T if turned else numbers, factors, None if centred else zeros, bits, size)


def _by_block(array: Array, k: int, n: int, depth: int, axis: int, block: int) -> Array | None:
    """Scales or zero points as [blocks of K, N]; None where they run otherwise. depth: the axis of the matrix that is summed."""
    if array.size == 1:
        return None if block else np.full((1, n), array.reshape(()))
    if not block:
        return array.reshape(1, n) if array.shape == (n,) and axis != depth else None
    if axis != depth or array.ndim != 2:
        return None
    found = array.T if depth else array
    return found if found.shape == (-(-k // block), n) else None


def _product(b: Builder, x: Value, weights: Packed) -> Value:
    """MatMulNBits of a left operand."""
    k, n = weights.numbers.shape
    blocks = len(weights.scales)
    per_byte = 8 // weights.bits
    padded = np.zeros((n, blocks * weights.block), np.uint8)
    padded[:, :k] = weights.numbers.T
    packed = np.zeros((n, padded.shape[1] // per_byte), np.uint8)
    for position in range(per_byte):
        packed |= padded[:, position::per_byte] << np.uint8(weights.bits * position)
    operands = [b.constant(packed.reshape(n, blocks, -1)), b.constant(np.ascontiguousarray(weights.scales.T))]
    if weights.zeros is not None:
        operands.append(b.constant(np.ascontiguousarray(weights.zeros.T)))
    attrs = {"K": k, "N": n, "bits": weights.bits, "block_size": weights.block}
    return b.op("MatMulNBits", x, *operands, domain="com.microsoft", **attrs)
