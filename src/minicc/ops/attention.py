"""Scaled dot-product attention: ONNX's Attention, and our own minimal form that passes recognise and
templates take.

Both expand into two matrix products around a row softmax. Everywhere, a query that may attend no key gives
zeros. The operators of com.microsoft are in `attention_microsoft`, rotary embedding in `rotary`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import Dim, broadcast, exact_quotient
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, boolean, i64
from minicc.ops.helpers import Array, computed_in_f32, default_refuse, element_type, require_same_dtype, widen
from minicc.ops.matmul import scaled
from minicc.ops.norm import as_type, axes_of, optional, required, reshaped, widened

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value


# -- building blocks of expansions; heads are [B, H, S, D]


def head_axis_out(b: Builder, x: Value, heads: int) -> Value:
    """[B, S, H * D] as [B, H, S, D]."""
    batch, length, hidden = x.shape
    size = exact_quotient(hidden, heads)
    return b.op(
        "Transpose", reshaped(b, x, (batch, length, heads, -1 if size is None else size)), perm=[0, 2, 1, 3]
    )


def head_axis_in(b: Builder, x: Value) -> Value:
    """[B, H, S, D] as [B, S, H * D]."""
    batch, heads, length, size = x.shape
    return reshaped(b, b.op("Transpose", x, perm=[0, 2, 1, 3]), (batch, length, heads * size))


def counted(b: Builder, size: Dim) -> Value:
    """The vector 0, 1, ..., size - 1 in int64."""
    if isinstance(size, int):
        return b.constant(np.arange(size, dtype=np.int64))
    bounds = [b.graph.symbolic_constant(np.array(v, dtype=object)) for v in (0, size, 1)]
    return b.op("Range", *bounds)


def mask_bias(b: Builder, allowed: Value, like: Value, masked: float = -np.inf) -> Value:
    """0 where allowed, else `masked`, in the type of `like`."""
    return b.op("Where", allowed, b.scalar(0, like), b.scalar(masked, like))


def band(b: Builder, queries: Dim, keys: Dim, offset: Value, left: int, right: int) -> Value:
    """Whether query i at absolute position p = i + offset may attend key j: p - left <= j <= p + right; -1 is
    unbounded.

    offset broadcasts against [queries, keys].
    """
    position = b.op("Add", reshaped(b, counted(b, queries), (queries, 1)), offset)
    keys_at = counted(b, keys)
    out: Value | None = None
    if right >= 0:
        out = b.op(
            "LessOrEqual", keys_at, b.op("Add", position, b.constant(np.int64(right))) if right else position
        )
    if left >= 0:
        low = b.op("GreaterOrEqual", keys_at, b.op("Sub", position, b.constant(np.int64(left))))
        out = low if out is None else b.op("And", out, low)
    assert out is not None
    return out


def grouped_product(b: Builder, x: Value, y: Value) -> Value:
    """x[B, H, S, K] @ y[B, G, K, N] where each of the G heads of y serves H / G neighbouring heads of x."""
    batch, heads, rows, inner = x.shape
    if heads == y.shape[1]:
        return b.op("MatMul", x, y)
    each = exact_quotient(heads, y.shape[1])
    assert each is not None
    out = b.op("MatMul", reshaped(b, x, (batch, y.shape[1], each * rows, inner)), y)
    return reshaped(b, out, (batch, heads, rows, y.shape[3]))


def masked_softmax(b: Builder, x: Value) -> Value:
    """Softmax over the last axis in which a row of -inf gives zeros."""
    axes = axes_of(b, [x.tensor.rank - 1])
    zero = b.scalar(0, x)
    top = b.op("ReduceMax", x, axes, keepdims=1)
    top = b.op("Where", b.op("Equal", top, b.scalar(-np.inf, x)), zero, top)
    powers = b.op("Exp", b.op("Sub", x, top))
    total = b.op("ReduceSum", powers, axes, keepdims=1)
    return b.op("Div", powers, b.op("Where", b.op("Equal", total, zero), b.scalar(1, x), total))


def transposed_keys(b: Builder, k: Value) -> Value:
    return b.op("Transpose", k, perm=[0, 1, 3, 2])


# -- minicc Attention


def _heads_check(n: Inference, q: Sequence[Dim], k: Sequence[Dim], v: Sequence[Dim]) -> None:
    if not len(q) == len(k) == len(v) == 4:
        raise n.error("q, k and v must be [batch, heads, length, size]")
    for what, a, b in (
        ("head sizes of q and k", q[3], k[3]),
        ("lengths of k and v", k[2], v[2]),
        ("heads of k and v", k[1], v[1]),
    ):
        if isinstance(a, int) and isinstance(b, int) and a != b:
            raise n.error(f"{what} differ: {a} and {b}")
    if isinstance(q[1], int) and isinstance(k[1], int) and (k[1] == 0 or q[1] % k[1]):
        raise n.error(f"{q[1]} heads of q cannot be served by {k[1]} heads of k")


def _infer(n: Inference) -> list[TensorType]:
    q, k, v = n.shape(0), n.shape(1), n.shape(2)
    _heads_check(n, q, k, v)
    return [TensorType(require_same_dtype(n, (0, 1, 2)), (broadcast(q[0], k[0]), q[1], q[2], v[3]))]


def _expand(b: Builder, node: Node) -> list[Value]:
    q, k, v, mask = required(node, 0), required(node, 1), required(node, 2), optional(node, 3)
    scores = widened(b, scaled(b, grouped_product(b, q, transposed_keys(b, k)), node.attrs["scale"]))
    if mask is not None:
        scores = b.op("Add", scores, as_type(b, mask, scores.tensor.dtype))
    if node.attrs["causal"]:
        queries, keys = q.shape[2], k.shape[2]
        allowed = band(b, queries, keys, b.shape([keys - queries]), -1, 0)
        scores = b.op("Add", scores, mask_bias(b, allowed, scores))
    return [grouped_product(b, as_type(b, masked_softmax(b, scores), q.tensor.dtype), v)]


def attend(scores: Array) -> Array:
    """Softmax of scores over the last axis; rows of -inf, and rows without keys, give zeros."""
    if scores.size == 0:
        return scores
    top = scores.max(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        powers = np.exp(scores - np.where(np.isneginf(top), 0, top))
        total = powers.sum(axis=-1, keepdims=True)
        return np.asarray(powers / np.where(total == 0, 1, total))


def repeated_heads(x: Array, heads: int) -> Array:
    """[B, G, S, D] with each head repeated to make `heads`."""
    return x if x.shape[1] == heads else np.repeat(x, heads // x.shape[1], axis=1)


@computed_in_f32
def _eval(q: Array, k: Array, v: Array, mask: Array | None = None, *, scale: float, causal: bool) -> Array:
    scores = q @ repeated_heads(k, q.shape[1]).swapaxes(-1, -2) * q.dtype.type(scale)
    if mask is not None:
        scores = scores + mask
    if causal:
        allowed = np.tri(q.shape[2], k.shape[2], k.shape[2] - q.shape[2], dtype=bool)
        scores = np.where(allowed, scores, -np.inf).astype(q.dtype)
    return np.asarray(attend(scores) @ repeated_heads(v, q.shape[1]))


# causal: query i attends key j if j <= i + T - S, so the last query sees every key.
ATTENTION = register(
    OpDef(
        "Attention",
        Kind.EXPAND,
        infer=_infer,
        eval=_eval,
        expand=_expand,
        refuse=default_refuse,
        domain="minicc",
        attrs={"scale": REQUIRED, "causal": False},
    )
)


# -- ONNX Attention


@dataclass(frozen=True)
class _Shapes:
    """Sizes of an ONNX Attention: heads of queries and keys, and whether tensors are [B, S, H * D]."""

    query: tuple[Dim, Dim, Dim, Dim]
    key: tuple[Dim, Dim, Dim, Dim]
    value: tuple[Dim, Dim, Dim, Dim]
    flat: bool


def _split(n: Inference) -> _Shapes:
    shapes = [n.shape(i) for i in range(3)]
    ranks = {len(s) for s in shapes}
    if ranks == {4}:
        q, k, v = shapes
        return _Shapes(q, k, v, False)  # type: ignore[arg-type]
    heads, groups = n.attr("q_num_heads"), n.attr("kv_num_heads")
    if ranks != {3} or not heads or not groups:
        raise n.error("needs Q, K, V of rank 4, or of rank 3 with q_num_heads and kv_num_heads")
    out = [(s[0], h, s[1], s[2] // h) for s, h in zip(shapes, (heads, groups, groups))]
    return _Shapes(out[0], out[1], out[2], flat=True)


def _onnx_infer(n: Inference) -> list[TensorType]:
    s = _split(n)
    _heads_check(n, s.query, s.key, s.value)
    if n.has(4) != n.has(5):
        raise n.error("past_key and past_value must be given together")
    if n.has(4) and n.has(6):
        raise n.error("nonpad_kv_seqlen cannot be combined with a past")
    if n.attr("qk_matmul_output_mode") not in (0, 1, 2, 3):
        raise n.error("qk_matmul_output_mode must be 0, 1, 2 or 3")
    past = n.shape(4)[2] if n.has(4) else 0
    batch, heads, length, _ = s.query
    total, size = s.key[2] + past, s.value[3]
    y = (batch, length, heads * size) if s.flat else (batch, heads, length, size)
    q_type, v_type = n.dtype(0), n.dtype(2)
    return [
        TensorType(q_type, y), TensorType(n.dtype(1), (*s.key[:2], total, s.key[3])),
        TensorType(v_type, (*s.value[:2], total, size)), TensorType(q_type, (batch, heads, length, total)),
    ]  # fmt: skip


def _scale(attrs: Any, size: Dim) -> float | None:
    if attrs["scale"]:
        return float(attrs["scale"])
    return 1 / float(np.sqrt(size)) if isinstance(size, int) else None


def _onnx_refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is None and _scale(node.attrs, _head_size(node)) is None:
        return "a head size known only at run time"
    if reason is None and _mask_padding(node) is None:
        return "a mask whose length is compared with that of the keys at run time"
    return reason


def _head_size(node: Node) -> Dim:
    q = required(node, 0)
    return q.shape[3] if q.tensor.rank == 4 else q.shape[2] // node.attrs["q_num_heads"]


def _key_length(node: Node) -> Dim:
    past, k = optional(node, 4), required(node, 1)
    return k.shape[-2] + (past.shape[2] if past is not None else 0)


def _mask_padding(node: Node) -> Dim | None:
    """Keys that the mask does not cover; None when that is not known."""
    mask = optional(node, 3)
    if mask is None or mask.tensor.rank == 0 or mask.shape[-1] == 1:
        return 0
    missing = _key_length(node) - mask.shape[-1]
    return missing if isinstance(missing, int) and missing >= 0 else None


def _is_causal(node: Node) -> bool:
    """Whether the window of an ONNX Attention is what minicc's Attention calls causal: the last query sees every key."""
    q, past, attrs = required(node, 0), optional(node, 4), node.attrs
    ahead = 0 if attrs["is_causal"] else attrs["right_window_size"]
    if ahead != 0 or attrs["left_window_size"] >= 0 or optional(node, 6) is not None:
        return False
    return _key_length(node) - q.shape[-2] == (0 if past is None else past.shape[2])


def _onnx_bias(b: Builder, node: Node, like: Value, keys: Dim, window: bool = True) -> list[Value]:
    """The additive masks of an ONNX Attention in the type of `like`, if `window` that of its window too."""
    q, mask, past, lengths = required(node, 0), optional(node, 3), optional(node, 4), optional(node, 6)
    queries = q.shape[-2]
    out: list[Value] = []
    if mask is not None:
        missing = _mask_padding(node)
        bias = (
            mask_bias(b, mask, like) if mask.tensor.dtype == boolean else as_type(b, mask, like.tensor.dtype)
        )
        if missing:
            pads = [0] * (2 * mask.tensor.rank - 1) + [missing]
            bias = b.op("Pad", bias, b.shape(pads), b.scalar(-np.inf, like))
        out.append(bias)
    left, right = node.attrs["left_window_size"], node.attrs["right_window_size"]
    right = 0 if node.attrs["is_causal"] else right
    if window and (left >= 0 or right >= 0):
        offset = b.shape([0 if past is None else past.shape[2]])
        if past is None and lengths is not None:
            offset = b.op("Sub", as_type(b, lengths, i64), b.shape([queries]))
            offset = reshaped(b, offset, (lengths.shape[0], 1, 1, 1))
        out.append(mask_bias(b, band(b, queries, keys, offset, left, right), like))
    if lengths is not None:
        valid = b.op(
            "Less", counted(b, keys), reshaped(b, as_type(b, lengths, i64), (lengths.shape[0], 1, 1, 1))
        )
        out.append(mask_bias(b, valid, like))
    return out


def _onnx_expand(b: Builder, node: Node) -> list[Value]:
    q, k, v = (required(node, i) for i in range(3))
    attrs = node.attrs
    flat = q.tensor.rank == 3
    scale = _scale(attrs, _head_size(node))
    assert scale is not None
    if flat:
        q, k, v = (
            head_axis_out(b, x, attrs[h])
            for x, h in ((q, "q_num_heads"), (k, "kv_num_heads"), (v, "kv_num_heads"))
        )
    if optional(node, 4) is not None:
        k = b.op("Concat", required(node, 4), k, axis=2)
        v = b.op("Concat", required(node, 5), v, axis=2)
    probe = q if q.tensor.dtype.bits >= 32 else widened(b, q)
    plain = not attrs["softcap"] and len(node.outputs) < 4 and not attrs["softmax_precision"]
    causal = plain and _is_causal(node)
    bias = _onnx_bias(b, node, probe, k.shape[2], window=not causal)
    if plain:
        total: Value | None = None
        for part in bias:
            total = part if total is None else b.op("Add", total, part)
        inputs = [q, k, v] if total is None else [q, k, v, as_type(b, total, q.tensor.dtype)]
        y = b.op("Attention", *inputs, domain="minicc", scale=scale, causal=causal)
        return [head_axis_in(b, y) if flat else y, k, v][: len(node.outputs)]
    stages = []
    scores = widened(b, scaled(b, grouped_product(b, q, transposed_keys(b, k)), scale))
    stages.append(scores)
    if attrs["softcap"]:
        cap = b.scalar(attrs["softcap"], scores)
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, cap)), cap)
    stages.append(scores)
    for part in bias:
        scores = b.op("Add", scores, as_type(b, part, scores.tensor.dtype))
    stages.append(scores)
    if attrs["softmax_precision"]:
        scores = widened(b, as_type(b, scores, element_type(attrs["softmax_precision"])))
    weights = as_type(b, masked_softmax(b, scores), q.tensor.dtype)
    stages.append(weights)
    y = grouped_product(b, weights, v)
    shown = as_type(b, stages[attrs["qk_matmul_output_mode"]], q.tensor.dtype)
    return [head_axis_in(b, y) if flat else y, k, v, shown][: len(node.outputs)]


def _onnx_eval(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    past_key: Array | None = None,
    past_value: Array | None = None,
    lengths: Array | None = None,
    **attrs: Any,
) -> tuple[Array, ...]:
    dtype, flat = q.dtype, q.ndim == 3
    if flat:
        heads, groups = attrs["q_num_heads"], attrs["kv_num_heads"]
        q, k, v = (
            x.reshape(*x.shape[:2], h, -1).transpose(0, 2, 1, 3)
            for x, h in ((q, heads), (k, groups), (v, groups))
        )
    if past_key is not None and past_value is not None:
        k, v = np.concatenate([past_key, k], axis=2), np.concatenate([past_value, v], axis=2)
    present = (k, v)
    q, k, v = widen(q), repeated_heads(widen(k), q.shape[1]), repeated_heads(widen(v), q.shape[1])
    queries, keys = q.shape[2], k.shape[2]
    scores = q @ k.swapaxes(-1, -2) * q.dtype.type(attrs["scale"] or 1 / np.sqrt(q.shape[3]))
    stages = [scores]
    if attrs["softcap"]:
        scores = np.tanh(scores / attrs["softcap"]) * q.dtype.type(attrs["softcap"])
    stages.append(scores)
    if mask is not None:
        bias = np.where(mask, 0, -np.inf) if mask.dtype == np.bool_ else widen(mask)
        if 1 < bias.shape[-1] < keys:
            bias = np.pad(
                bias, [(0, 0)] * (bias.ndim - 1) + [(0, keys - bias.shape[-1])], constant_values=-np.inf
            )
        scores = scores + bias
    offset: Any = 0 if past_key is None else past_key.shape[2]
    if past_key is None and lengths is not None:
        offset = lengths.reshape(-1, 1, 1, 1) - queries
    ahead = (
        np.arange(keys)[None, :] - np.arange(queries)[:, None] - offset
    )  # how far a key lies after its query
    allowed = np.ones((queries, keys), dtype=bool) & (ahead == ahead)
    if attrs["is_causal"]:
        allowed = allowed & (ahead <= 0)
    if attrs["left_window_size"] >= 0:
        allowed = allowed & (-ahead <= attrs["left_window_size"])
    if attrs["right_window_size"] >= 0:
        allowed = allowed & (ahead <= attrs["right_window_size"])
    if lengths is not None:
        allowed = allowed & (np.arange(keys) < lengths.reshape(-1, 1, 1, 1))
    scores = np.where(allowed, scores, -np.inf).astype(q.dtype)
    stages.append(scores)
    if attrs["softmax_precision"]:
        scores = widen(scores.astype(element_type(attrs["softmax_precision"]).numpy))
    weights = attend(scores).astype(q.dtype)
    stages.append(weights)
    y = weights @ v
    if flat:
        y = y.transpose(0, 2, 1, 3).reshape(y.shape[0], queries, -1)
    return y.astype(dtype), *present, stages[attrs["qk_matmul_output_mode"]].astype(dtype)


register(
    OpDef(
        "Attention",
        Kind.EXPAND,
        infer=_onnx_infer,
        eval=_onnx_eval,
        expand=_onnx_expand,
        refuse=_onnx_refuse,
        attrs={
            "is_causal": 0,
            "kv_num_heads": None,
            "left_window_size": -1,
            "q_num_heads": None,
            "qk_matmul_output_mode": 0,
            "right_window_size": -1,
            "scale": None,
            "softcap": 0.0,
            "softmax_precision": None,
        },
    )
)
