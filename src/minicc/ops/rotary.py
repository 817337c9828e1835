"""Rotary position embedding (Su et al., 2021): ONNX's RotaryEmbedding and com.microsoft's.

They differ in the order of inputs and in how positions are given; both expand into slices, products and a
concatenation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import exact_quotient
from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, i64
from minicc.ops.attention import counted, head_axis_in, head_axis_out
from minicc.ops.helpers import Array, computed_in_f32, default_refuse
from minicc.ops.norm import as_type, optional, required, reshaped

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value


def _slice(b: Builder, x: Value, start: int, stop: int) -> Value:
    """Elements start..stop-1 of the last axis."""
    return b.op("Slice", x, b.shape([start]), b.shape([stop]), b.shape([x.tensor.rank - 1]))


def rotated(b: Builder, x: Value, cos: Value, sin: Value, half: int, interleaved: bool) -> Value:
    """x[B, H, S, D] with its first 2 * half elements rotated; cos and sin broadcast to [B, 1, S, half]."""
    size = x.shape[3]
    turned = x if size == 2 * half else _slice(b, x, 0, 2 * half)
    if interleaved:
        pairs = reshaped(b, turned, (*x.shape[:3], half, 2))
        first, second = (b.op("Gather", pairs, b.constant(np.int64(k)), axis=4) for k in (0, 1))
    else:
        first, second = _slice(b, turned, 0, half), _slice(b, turned, half, 2 * half)
    real = b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin))
    imaginary = b.op("Add", b.op("Mul", first, sin), b.op("Mul", second, cos))
    if interleaved:
        shape = (*real.shape, 1)
        out = reshaped(
            b, b.op("Concat", reshaped(b, real, shape), reshaped(b, imaginary, shape), axis=4), turned.shape
        )
    else:
        out = b.op("Concat", real, imaginary, axis=3)
    if turned is x:
        return out
    assert isinstance(size, int)
    return b.op("Concat", out, _slice(b, x, 2 * half, size), axis=3)


def rotate_array(x: Array, cos: Array, sin: Array, interleaved: int) -> Array:
    """As `rotated`; the number of rotated elements is twice the last size of cos."""
    half = cos.shape[-1]
    out = x.copy()
    places = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    first, second = x[..., places[0]], x[..., places[1]]
    out[..., places[0]] = first * cos - second * sin
    out[..., places[1]] = first * sin + second * cos
    return out


def _heads(x: Value | Array, attrs: Any) -> int | None:
    """Heads of a [B, S, H * D] input; None when it already is [B, H, S, D]."""
    return attrs["num_heads"] if len(x.shape) == 3 else None


def _infer(n: Inference) -> list[TensorType]:
    if n.rank(0) not in (3, 4) or (n.rank(0) == 3 and not n.attr("num_heads") and not n.op.domain):
        raise n.error("needs rank 4, or rank 3 with num_heads")
    return [n.type(0)]


def _refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is not None:
        return reason
    x = required(node, 0)
    cache = required(node, 2 if node.op.domain else 1)
    heads = _rotary_heads(node)
    size = x.shape[3] if x.tensor.rank == 4 else exact_quotient(x.shape[2], heads or 1)
    if heads is None or not isinstance(cache.shape[-1], int) or not isinstance(size, int):
        return "head sizes known only at run time"
    return None


def _rotary_heads(node: Node) -> int | None:
    """Heads; com.microsoft may leave them out, then a head is twice as large as the cache is wide."""
    x = required(node, 0)
    if x.tensor.rank == 4 or node.attrs["num_heads"]:
        return node.attrs["num_heads"] or 1
    width = required(node, 2 if node.op.domain else 1).shape[-1]
    heads = exact_quotient(x.shape[2], width * 2)
    return heads if isinstance(heads, int) else None


def _apply(b: Builder, node: Node, cos: Value, sin: Value) -> list[Value]:
    """cos and sin are [B or 1, S, half]."""
    x = required(node, 0)
    flat = x.tensor.rank == 3
    half = cos.shape[-1]
    assert isinstance(half, int)
    cos, sin = (as_type(b, reshaped(b, v, (v.shape[0], 1, *v.shape[1:])), x.tensor.dtype) for v in (cos, sin))
    y = head_axis_out(b, x, _rotary_heads(node) or 1) if flat else x
    y = rotated(b, y, cos, sin, half, bool(node.attrs["interleaved"]))
    return [head_axis_in(b, y) if flat else y]


def _expand(b: Builder, node: Node) -> list[Value]:
    cos, sin, positions = required(node, 1), required(node, 2), optional(node, 3)
    if positions is not None:
        cos, sin = (b.op("Gather", v, positions, axis=0) for v in (cos, sin))
    return _apply(b, node, cos, sin)


@computed_in_f32
def _eval(x: Array, cos: Array, sin: Array, positions: Array | None = None, **attrs: Any) -> Array:
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    return _eval_heads(x, cos[:, None], sin[:, None], attrs)


def _eval_heads(x: Array, cos: Array, sin: Array, attrs: Any) -> Array:
    if x.ndim == 4:
        return rotate_array(x, cos, sin, attrs["interleaved"])
    heads = attrs["num_heads"] or x.shape[2] // (2 * cos.shape[-1])
    split = x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    return rotate_array(split, cos, sin, attrs["interleaved"]).transpose(0, 2, 1, 3).reshape(x.shape)


register(OpDef(
    "RotaryEmbedding", Kind.EXPAND, infer=_infer, eval=_eval, expand=_expand, refuse=_refuse,
    attrs={"interleaved": 0, "num_heads": 0, "rotary_embedding_dim": 0},
))  # fmt: skip


def _microsoft_expand(b: Builder, node: Node) -> list[Value]:
    x, positions = required(node, 0), required(node, 1)
    if positions.tensor.rank == 1 or positions.shape == (1,):  # one offset for all
        length = x.shape[2] if x.tensor.rank == 4 else x.shape[1]
        positions = reshaped(b, b.op("Add", counted(b, length), as_type(b, positions, i64)), (1, length))
    cos, sin = (b.op("Gather", required(node, i), positions, axis=0) for i in (2, 3))
    return _apply(b, node, cos, sin)


@computed_in_f32
def _microsoft_eval(x: Array, positions: Array, cos: Array, sin: Array, **attrs: Any) -> Array:
    if positions.ndim == 1:
        positions = (positions + np.arange(x.shape[-2]))[None, :]
    return _eval_heads(x, cos[positions][:, None], sin[positions][:, None], attrs)


register(
    OpDef(
        "RotaryEmbedding",
        Kind.EXPAND,
        infer=_infer,
        eval=_microsoft_eval,
        expand=_microsoft_expand,
        refuse=_refuse,
        attrs={
            "interleaved": 0,
            "num_heads": 0,
            "rotary_embedding_dim": 0,
            "scale": 1.0,
            "is_packed_batching": 0,
        },
        domain="com.microsoft",
    )
)
