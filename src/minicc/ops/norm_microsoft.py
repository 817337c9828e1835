"""com.microsoft's normalisations with the residual addition or the embedding lookup before them.

SkipLayerNormalization, SkipSimplifiedLayerNormalization and EmbedLayerNormalization expand as plain forms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, f32, i32
from minicc.ops.helpers import Array, default_refuse, widen
from minicc.ops.norm import (
    as_type,
    axes_of,
    inverse_rms,
    layer_normalised,
    normalised,
    optional,
    required,
    rms_normalised,
    scaled_and_shifted,
    widened,
)

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value


def _skip_infer(n: Inference) -> list[TensorType]:
    shape = n.shape(0)
    statistics = TensorType(f32, (*shape[:-1], 1))
    return [n.type(0), statistics, statistics, n.type(0)]


def _skip_sum(b: Builder, node: Node, bias: int) -> Value:
    total = b.op("Add", widened(b, required(node, 0)), widened(b, required(node, 1)))
    extra = optional(node, bias)
    return total if extra is None else b.op("Add", total, widened(b, extra))


def _skip_layer_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    total = _skip_sum(b, node, 4)
    y, mean, inverse = normalised(b, total, [x.tensor.rank - 1], node.attrs["epsilon"])
    y = scaled_and_shifted(b, y, required(node, 2), optional(node, 3))
    dtype = x.tensor.dtype
    return [as_type(b, y, dtype), as_type(b, mean, f32), as_type(b, inverse, f32), as_type(b, total, dtype)][
        : len(node.outputs)
    ]


def _skip_layer_eval(
    x: Array,
    skip: Array,
    gamma: Array,
    beta: Array | None = None,
    bias: Array | None = None,
    *,
    epsilon: float,
) -> tuple[Array, ...]:
    total = widen(x) + widen(skip) + (0 if bias is None else widen(bias))
    y, mean, inverse = layer_normalised(
        total, widen(gamma), None if beta is None else widen(beta), axis=-1, epsilon=epsilon, stash_type=1
    )
    return y.astype(x.dtype), mean, inverse, total.astype(x.dtype)


def _skip_simplified_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    total = _skip_sum(b, node, 3)
    inverse = inverse_rms(b, total, [x.tensor.rank - 1], node.attrs["epsilon"])
    y = scaled_and_shifted(b, b.op("Mul", total, inverse), required(node, 2), None)
    out = [as_type(b, y, x.tensor.dtype)]
    if len(node.outputs) > 1:
        zero = b.op("Mul", inverse, b.scalar(0, inverse))  # there is no mean; its place is never read
        out += [as_type(b, zero, f32), as_type(b, inverse, f32), as_type(b, total, x.tensor.dtype)]
    return out[: len(node.outputs)]


def _skip_simplified_eval(
    x: Array, skip: Array, gamma: Array, bias: Array | None = None, *, epsilon: float
) -> tuple[Array, ...]:
    total = widen(x) + widen(skip) + (0 if bias is None else widen(bias))
    y, inverse = rms_normalised(total, widen(gamma), axis=-1, epsilon=epsilon, stash_type=1)
    return y.astype(x.dtype), np.zeros_like(inverse), inverse, total.astype(x.dtype)


register(
    OpDef(
        "SkipLayerNormalization",
        Kind.EXPAND,
        infer=_skip_infer,
        eval=_skip_layer_eval,
        expand=_skip_layer_expand,
        refuse=default_refuse,
        attrs={"epsilon": 1e-12},
        domain="com.microsoft",
    )
)
register(OpDef(
    "SkipSimplifiedLayerNormalization", Kind.EXPAND, infer=_skip_infer, eval=_skip_simplified_eval,
    expand=_skip_simplified_expand, refuse=default_refuse, attrs={"epsilon": 1e-12}, domain="com.microsoft",
))  # fmt: skip


def _embed_infer(n: Inference) -> list[TensorType]:
    batch, length = n.shape(0)
    out = TensorType(n.dtype(2), (batch, length, n.shape(2)[1]))
    return [out, TensorType(i32, (batch,)), out]


def _embed_expand(b: Builder, node: Node) -> list[Value]:
    words, segments, table, positions, kinds, gamma, beta, mask, where = (*node.inputs, *(None,) * 9)[:9]
    assert words is not None and table is not None and positions is not None
    length = words.shape[1]
    total = b.op("Gather", table, words, axis=0)
    if where is None:
        start, stop, axis = (b.shape([v]) for v in (0, length, 0))
        total = b.op("Add", total, b.op("Slice", positions, start, stop, axis))
    else:
        total = b.op("Add", total, b.op("Gather", positions, where, axis=0))
    if segments is not None:
        total = b.op("Add", total, b.op("Gather", kinds, segments, axis=0))
    y, _, _ = normalised(b, widened(b, total), [2], node.attrs["epsilon"])
    out = [as_type(b, scaled_and_shifted(b, y, gamma, beta), total.tensor.dtype)]
    if len(node.outputs) > 1:
        if mask is None:
            counted = b.op("Expand", b.constant(np.int32(0)), b.shape([words.shape[0]]))
        else:
            ones = as_type(b, b.op("Equal", mask, b.scalar(1, mask)), i32)
            counted = b.op("ReduceSum", ones, axes_of(b, [1]), keepdims=0)
        out += [counted, total]
    return out[: len(node.outputs)]


def _embed_eval(
    words: Array,
    segments: Array | None,
    table: Array,
    positions: Array,
    kinds: Array | None,
    gamma: Array,
    beta: Array,
    mask: Array | None = None,
    where: Array | None = None,
    *,
    epsilon: float,
    mask_index_type: int,
) -> tuple[Array, ...]:
    batch, length = words.shape
    total = table[words] + (positions[:length][None] if where is None else positions[where])
    if segments is not None and kinds is not None:
        total = total + kinds[segments]
    y = layer_normalised(total, gamma, beta, axis=-1, epsilon=epsilon, stash_type=1)[0]
    counted = np.zeros(batch, dtype=np.int32) if mask is None else (mask == 1).sum(axis=1).astype(np.int32)
    return y, counted, total


register(OpDef(
    "EmbedLayerNormalization", Kind.EXPAND, infer=_embed_infer, eval=_embed_eval, expand=_embed_expand,
    refuse=default_refuse, attrs={"epsilon": 1e-12, "mask_index_type": 0}, domain="com.microsoft",
))  # fmt: skip
