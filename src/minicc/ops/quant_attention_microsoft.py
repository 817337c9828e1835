"""com.microsoft's quantised parts of transformers: QAttention and QEmbedLayerNormalization.

The projection is an integer product scaled once, rows of tables are dequantised when they have been looked up; the rest is as
in the operators of numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import Dim
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, f32, i32
from minicc.ops.attention_microsoft import attention_of_projected, attention_of_projected_arrays, refuse_mask
from minicc.ops.helpers import Array, default_refuse
from minicc.ops.matmul import matmul_shape
from minicc.ops.norm import as_type, axes_of, layer_normalised, normalised, optional, required, reshaped
from minicc.ops.quant import centred, dequantise_array, flat_scalar, integer_product, multiplier
from minicc.ops.quant_microsoft import array_scalar, tensor_scalar

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

_DOMAIN = "com.microsoft"


# -- QAttention(input, weight, bias, input_scale, weight_scale, mask_index, input_zero, weight_zero, past); the weight per
# tensor or per column


def _attention_infer(n: Inference) -> list[TensorType]:
    x, w, heads = n.shape(0), n.shape(1), n.attr("num_heads")
    if len(x) != 3 or len(w) != 2:
        raise n.error("needs an input of rank 3 and a weight of rank 2")
    if n.attr("do_rotary"):
        raise n.error("rotary embedding inside QAttention is not supported")
    if isinstance(w[1], int) and w[1] % (3 * heads):
        raise n.error(f"{w[1]} columns do not fit queries, keys and values of {heads} heads")
    matmul_shape(n, x, w)
    hidden = w[1] // 3
    total: Dim = x[1] + (n.shape(8)[3] if n.has(8) else 0)
    return [TensorType(f32, (x[0], x[1], hidden)), TensorType(f32, (2, x[0], heads, total, hidden // heads))]


def _attention_refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is not None:
        return reason
    reason = refuse_mask(optional(node, 5), required(node, 0).shape[0])
    if reason is not None:
        return reason
    return None if isinstance(required(node, 1).shape[1], int) else "head sizes known only at run time"


def _attention_expand(b: Builder, node: Node) -> list[Value]:
    x, w, bias, x_scale, w_scale = (required(node, i) for i in range(5))
    w_zero = optional(node, 7)
    w_zero = None if w_zero is None else reshaped(b, w_zero, flat_scalar(w_zero.shape))
    total = b.op("MatMulInteger", x, w, tensor_scalar(b, optional(node, 6)), w_zero)
    scale = multiplier(b, reshaped(b, x_scale, ()), reshaped(b, w_scale, flat_scalar(w_scale.shape)), None)
    projected = b.op("Add", b.op("Mul", b.op("Cast", total, to=f32), scale), bias)
    return attention_of_projected(b, node, projected, [w.shape[1] // 3] * 3, optional(node, 5), optional(node, 8), None)


def _attention_eval(
    x: Array,
    w: Array,
    bias: Array,
    x_scale: Array,
    w_scale: Array,
    mask: Array | None = None,
    x_zero: Array | None = None,
    w_zero: Array | None = None,
    past: Array | None = None,
    **attrs: Any,
) -> tuple[Array, Array]:
    total = integer_product(x, w, array_scalar(x_zero), w_zero).astype(np.float32)
    projected = total * (x_scale.reshape(()) * w_scale) + bias
    return attention_of_projected_arrays(projected, [w.shape[1] // 3] * 3, mask, past, None, attrs)


register(OpDef(
    "QAttention", Kind.EXPAND, infer=_attention_infer, eval=_attention_eval, expand=_attention_expand, refuse=_attention_refuse,
    attrs={"do_rotary": 0, "mask_filter_value": -10000.0, "num_heads": REQUIRED, "past_present_share_buffer": 0, "scale": 0.0,
           "unidirectional": 0}, domain=_DOMAIN,
))  # fmt: skip


# -- QEmbedLayerNormalization: words, segments, three tables, gamma, beta and mask, then the scales and the zero points

_WORDS, _SEGMENTS, _WORD_TABLE, _POSITION_TABLE, _SEGMENT_TABLE, _GAMMA, _BETA, _MASK = range(8)


def _scale_of(quantised: int) -> int:
    """The position of the scale of the quantised input at a position; its zero point comes five later."""
    return quantised - _WORD_TABLE + 8


def _embed_infer(n: Inference) -> list[TensorType]:
    words, table = n.shape(_WORDS), n.shape(_WORD_TABLE)
    if len(words) != 2 or len(table) != 2:
        raise n.error("needs words and a table of rank 2")
    given = [n.has(i) for i in (_SEGMENTS, _SEGMENT_TABLE, _scale_of(_SEGMENT_TABLE), _scale_of(_SEGMENT_TABLE) + 5)]
    if any(given) != all(given):
        raise n.error("segments, their table, its scale and its zero point must all be given or all be left out")
    return [TensorType(f32, (*words, table[1])), TensorType(i32, (words[0],))]


def _dequantised(b: Builder, node: Node, numbers: Value, position: int) -> Value:
    scale, zero = (tensor_scalar(b, required(node, _scale_of(position) + i)) for i in (0, 5))
    assert scale is not None
    return b.op("Mul", centred(b, numbers, zero), scale)


def _embed_expand(b: Builder, node: Node) -> list[Value]:
    words = required(node, _WORDS)
    rows = b.op("Gather", required(node, _WORD_TABLE), words, axis=0)
    total = _dequantised(b, node, rows, _WORD_TABLE)
    start, stop, axis = (b.shape([v]) for v in (0, words.shape[1], 0))
    first = b.op("Slice", required(node, _POSITION_TABLE), start, stop, axis)
    total = b.op("Add", total, _dequantised(b, node, first, _POSITION_TABLE))
    segments = optional(node, _SEGMENTS)
    if segments is not None:
        rows = b.op("Gather", required(node, _SEGMENT_TABLE), segments, axis=0)
        total = b.op("Add", total, _dequantised(b, node, rows, _SEGMENT_TABLE))
    y, _, _ = normalised(b, total, [2], node.attrs["epsilon"])
    gamma, beta = (_dequantised(b, node, required(node, i), i) for i in (_GAMMA, _BETA))
    out = [b.op("Add", b.op("Mul", y, gamma), beta)]
    if len(node.outputs) > 1:
        mask = optional(node, _MASK)
        if mask is None:
            out.append(b.op("Expand", b.constant(np.int32(0)), b.shape([words.shape[0]])))
        else:
            ones = as_type(b, b.op("Equal", mask, b.scalar(1, mask)), i32)
            out.append(b.op("ReduceSum", ones, axes_of(b, [1]), keepdims=0))
    return out


def _embed_eval(
    words: Array,
    segments: Array | None,
    word_table: Array,
    position_table: Array,
    segment_table: Array | None,
    gamma: Array,
    beta: Array,
    mask: Array | None,
    *parameters: Array | None,
    epsilon: float,
) -> tuple[Array, Array]:
    scales, zeros = parameters[:5], parameters[5:]
    tables: list[Any] = []
    for quantised, scale, zero in zip((word_table, position_table, segment_table, gamma, beta), scales, zeros):
        missing = quantised is None or scale is None
        tables.append(None if missing else dequantise_array(quantised, scale.reshape(()), array_scalar(zero)))  # type: ignore[arg-type, union-attr]
    total = tables[0][words] + tables[1][: words.shape[1]]
    if segments is not None:
        total = total + tables[2][segments]
    y = layer_normalised(total, tables[3], tables[4], axis=-1, epsilon=epsilon, stash_type=1)[0]
    counted = np.zeros(len(words), np.int32) if mask is None else (mask == 1).sum(axis=1).astype(np.int32)
    return y, counted


register(OpDef(
    "QEmbedLayerNormalization", Kind.EXPAND, infer=_embed_infer, eval=_embed_eval, expand=_embed_expand, refuse=default_refuse,
    attrs={"epsilon": 1e-12}, domain=_DOMAIN,
))  # fmt: skip
