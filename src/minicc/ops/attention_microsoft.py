"""com.microsoft's attention: Attention, MultiHeadAttention and GroupQueryAttention.

All expand around `minicc` Attention. Packed inputs of MultiHeadAttention, relative positions and past buffers shared with
outputs are not supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import Dim
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, i32
from minicc.ops.attention import attend, head_axis_in, head_axis_out, mask_bias
from minicc.ops.helpers import Array, computed_in_f32, default_refuse
from minicc.ops.norm import optional, required, reshaped

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

_DOMAIN = "com.microsoft"


def _added(b: Builder, parts: Sequence[Value | None]) -> Value | None:
    total: Value | None = None
    for part in parts:
        if part is not None:
            total = part if total is None else b.op("Add", total, part)
    return total


def _key_mask(b: Builder, mask: Value | None, like: Value, keys: Dim, filler: float) -> Value | None:
    """The additive form of a mask over keys: [B] counts of valid keys, [2 B] ends and starts of the valid keys, [B, T], [B, S, T]
    or [B, 1, S, T] of 0 and 1.
    """
    if mask is None:
        return None
    if mask.tensor.rank == 1:
        places = b.op(
            "Range",
            b.constant(np.int32(0)),
            b.op("Cast", b.op("Reshape", b.shape([keys]), b.shape([])), to=i32),
            b.constant(np.int32(1)),
        )
        batch, (size,) = like.shape[0], mask.shape
        if size != batch * 2:
            return mask_bias(b, b.op("Less", places, reshaped(b, mask, (size, 1, 1, 1))), like, filler)
        cuts = [b.shape([v]) for v in (0, batch, size)]
        ends, starts = (
            reshaped(b, b.op("Slice", mask, cuts[i], cuts[i + 1], b.shape([0])), (batch, 1, 1, 1)) for i in (0, 1)
        )
        valid = b.op("And", b.op("Less", places, ends), b.op("GreaterOrEqual", places, starts))
        return mask_bias(b, valid, like, filler)
    shape = {2: (mask.shape[0], 1, 1, mask.shape[-1]), 3: (mask.shape[0], 1, *mask.shape[1:])}.get(
        mask.tensor.rank, mask.shape
    )
    return mask_bias(b, b.op("Greater", reshaped(b, mask, shape), b.scalar(0, mask)), like, filler)


def _mask_array(mask: Array | None, batch: int, keys: int, filler: float) -> Any:
    if mask is None:
        return 0
    if mask.ndim == 1:
        starts = mask[batch:, None] if len(mask) > batch else 0
        valid = (np.arange(keys) < mask[:batch, None]) & (np.arange(keys) >= starts)
        allowed = valid[:, None, None, :]
    else:
        allowed = {2: lambda: mask[:, None, None, :], 3: lambda: mask[:, None]}.get(
            mask.ndim, lambda: mask
        )() > 0
    return np.where(allowed, 0, filler)


def refuse_mask(mask: Value | None, batch: Dim) -> str | None:
    """Why `_key_mask` does not know what a vector means."""
    if mask is None or mask.tensor.rank != 1 or mask.shape[0] in (batch, batch * 2):
        return None
    return "a mask whose size does not follow from the batch"


def _filler(attrs: Any) -> float:
    return float(attrs["mask_filter_value"])


def _attend(b: Builder, q: Value, k: Value, v: Value, bias: Value | None, attrs: Any) -> Value:
    size = q.shape[3]
    assert isinstance(size, int)
    scale = attrs["scale"] or float(1 / np.sqrt(size))
    y = b.op("Attention", q, k, v, *([] if bias is None else [bias]), domain="minicc", scale=scale,
             causal=bool(attrs["unidirectional"]))  # fmt: skip
    return head_axis_in(b, y)


def _attend_arrays(q: Array, k: Array, v: Array, bias: Any, attrs: Any) -> Array:
    scores = q @ k.swapaxes(-1, -2) * (attrs["scale"] or 1 / np.sqrt(q.shape[3])) + bias
    if attrs["unidirectional"]:
        scores = np.where(
            np.tri(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], dtype=bool), scores, -np.inf
        )
    y = attend(scores.astype(q.dtype)) @ v
    return np.asarray(y.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1))


# -- MultiHeadAttention(query, key, value, bias, key_padding_mask, attention_bias, past_key, past_value)


def _multi_infer(n: Inference) -> list[TensorType]:
    q, heads = n.shape(0), n.attr("num_heads")
    if len(q) != 3 or not n.has(1) or not n.has(2):
        raise n.error("packed query, key and value are not supported", hint="export with separate tensors")
    k, v = n.shape(1), n.shape(2)
    past = n.shape(6)[2] if n.has(6) else 0
    # A key of rank 4 is a cached one of shape [B, H, T, D].
    total = (k[1] if len(k) == 3 else k[2]) + past
    hidden = v[2] if len(v) == 3 else v[1] * v[3]
    dtype = n.dtype(0)
    return [
        TensorType(dtype, (q[0], q[1], hidden)),
        TensorType(dtype, (q[0], heads, total, q[2] // heads)),
        TensorType(dtype, (q[0], heads, total, hidden // heads)),
    ]


def _multi_refuse(node: Node) -> str | None:
    if any(optional(node, i) is not None for i in (8, 9)):
        return "past buffers shared with outputs"
    reason = default_refuse(node)
    size = required(node, 0).shape[2] if reason is None else 1
    return reason or (None if isinstance(size, int) else "a head size known only at run time")


def _multi_expand(b: Builder, node: Node) -> list[Value]:
    heads = node.attrs["num_heads"]
    parts = [required(node, i) for i in range(3)]
    bias = optional(node, 3)
    if bias is not None:
        start: Dim = 0
        for i, part in enumerate(parts):
            if part.tensor.rank == 3:
                stop = start + part.shape[2]
                piece = b.op("Slice", bias, b.shape([start]), b.shape([stop]), b.shape([0]))
                parts[i], start = b.op("Add", part, piece), stop
    q, k, v = (head_axis_out(b, p, heads) if p.tensor.rank == 3 else p for p in parts)
    if optional(node, 6) is not None:
        k, v = b.op("Concat", required(node, 6), k, axis=2), b.op("Concat", required(node, 7), v, axis=2)
    mask = _key_mask(b, optional(node, 4), q, k.shape[2], _filler(node.attrs))
    y = _attend(b, q, k, v, _added(b, [mask, optional(node, 5)]), node.attrs)
    return [y, k, v][: len(node.outputs)]


@computed_in_f32
def _multi_eval(
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    attention_bias: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    **attrs: Any,
) -> tuple[Array, ...]:
    heads = attrs["num_heads"]
    parts, start = [], 0
    for part in (q, k, v):
        if part.ndim == 3:
            if bias is not None:
                part = part + bias[start : start + part.shape[2]]
                start += part.shape[2]
            part = part.reshape(*part.shape[:2], heads, -1).transpose(0, 2, 1, 3)
        parts.append(part)
    query, key, value = parts
    if past_key is not None and past_value is not None:
        key, value = np.concatenate([past_key, key], axis=2), np.concatenate([past_value, value], axis=2)
    total = _mask_array(mask, len(key), key.shape[2], _filler(attrs)) + (
        0 if attention_bias is None else attention_bias
    )
    return _attend_arrays(query, key, value, total, attrs), key, value


register(
    OpDef(
        "MultiHeadAttention",
        Kind.EXPAND,
        infer=_multi_infer,
        eval=_multi_eval,
        expand=_multi_expand,
        refuse=_multi_refuse,
        attrs={"mask_filter_value": -10000.0, "num_heads": REQUIRED, "scale": 0.0, "unidirectional": 0},
        domain=_DOMAIN,
    )
)


# -- Attention(input, weights, bias, mask_index, past, attention_bias)


def _hidden_sizes(attrs: Any, weights: Sequence[Dim]) -> list[Dim]:
    """Widths of query, key and value inside the weights."""
    given = attrs["qkv_hidden_sizes"]
    return list(given) if given else [weights[1] // 3] * 3


def _attention_infer(n: Inference) -> list[TensorType]:
    x, w, heads = n.shape(0), n.shape(1), n.attr("num_heads")
    if n.attr("do_rotary"):
        raise n.error("rotary embedding inside Attention is not supported")
    sizes = _hidden_sizes(n.attrs, w)
    past = n.shape(4)[3] if n.has(4) else 0
    present = (2, x[0], heads, x[1] + past, sizes[1] // heads)
    return [TensorType(n.dtype(0), (x[0], x[1], sizes[2])), TensorType(n.dtype(0), present)]


def _attention_refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is not None:
        return reason
    reason = refuse_mask(optional(node, 3), required(node, 0).shape[0])
    if reason is not None:
        return reason
    if not all(isinstance(s, int) for s in _hidden_sizes(node.attrs, required(node, 1).shape)):
        return "head sizes known only at run time"
    return None


def attention_of_projected(
    b: Builder, node: Node, projected: Value, sizes: Sequence[Dim], mask: Value | None, past: Value | None, bias: Value | None
) -> list[Value]:
    """Attention of queries, keys and values that lie next to each other in [B, S, sum(sizes)]; results as Attention's."""
    attrs = node.attrs
    heads, start = attrs["num_heads"], 0
    parts = []
    for size in sizes:
        assert isinstance(size, int)
        piece = b.op("Slice", projected, b.shape([start]), b.shape([start + size]), b.shape([2]))
        parts.append(head_axis_out(b, piece, heads))
        start += size
    q, k, v = parts
    if past is not None:
        old = [b.op("Gather", past, b.constant(np.int64(i)), axis=0) for i in (0, 1)]
        k, v = (b.op("Concat", o, n, axis=2) for o, n in zip(old, (k, v)))
    added = _added(b, [_key_mask(b, mask, q, k.shape[2], _filler(attrs)), bias])
    y = _attend(b, q, k, v, added, attrs)
    if len(node.outputs) == 1:
        return [y]
    return [y, b.op("Concat", *(reshaped(b, p, (1, *p.shape)) for p in (k, v)), axis=0)]


def _attention_expand(b: Builder, node: Node) -> list[Value]:
    x, w, bias, mask, past, attention_bias = (*node.inputs, *(None,) * 4)[:6]
    assert x is not None and w is not None
    projected = b.op("MatMul", x, w)
    projected = projected if bias is None else b.op("Add", projected, bias)
    return attention_of_projected(b, node, projected, _hidden_sizes(node.attrs, w.shape), mask, past, attention_bias)


def attention_of_projected_arrays(
    projected: Array, sizes: Sequence[int], mask: Array | None, past: Array | None, bias: Array | None, attrs: Any
) -> tuple[Array, Array]:
    """As `attention_of_projected`, in numpy."""
    q, k, v = (
        p.reshape(*projected.shape[:2], attrs["num_heads"], -1).transpose(0, 2, 1, 3)
        for p in np.split(projected, np.cumsum(sizes)[:2], axis=2)
    )
    if past is not None:
        k, v = np.concatenate([past[0], k], axis=2), np.concatenate([past[1], v], axis=2)
    total = _mask_array(mask, len(k), k.shape[2], _filler(attrs)) + (0 if bias is None else bias)
    y = _attend_arrays(q, k, v, total, attrs)
    return y, np.stack([k, v]) if k.shape == v.shape else np.zeros((2, 0))


@computed_in_f32
def _attention_eval(
    x: Array,
    w: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    past: Array | None = None,
    attention_bias: Array | None = None,
    **attrs: Any,
) -> tuple[Array, Array]:
    projected = x @ w + (0 if bias is None else bias)
    sizes: list[Any] = _hidden_sizes(attrs, w.shape)
    return attention_of_projected_arrays(projected, sizes, mask, past, attention_bias, attrs)


register(OpDef(
    "Attention", Kind.EXPAND, infer=_attention_infer, eval=_attention_eval, expand=_attention_expand,
    refuse=_attention_refuse, domain=_DOMAIN,
    attrs={
        "do_rotary": 0, "mask_filter_value": -10000.0, "num_heads": REQUIRED, "past_present_share_buffer": 0,
        "qkv_hidden_sizes": None, "rotary_embedding_dim": 0, "scale": 0.0, "unidirectional": 0,
    },
))  # fmt: skip
