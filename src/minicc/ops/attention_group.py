"""com.microsoft's GroupQueryAttention: rotary positions, a cache whose fill differs for each sequence of a batch, attention.

It expands where the length of the cache after the step follows from sizes, as it does when the model takes it from the
shape of its mask; else it runs on the host. Quantised caches and softmaxes with a sink are not supported.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import Dim, compare, exact_quotient, maximum
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, i64
from minicc.ops.attention import attend, band, counted, head_axis_in, head_axis_out, mask_bias, repeated_heads
from minicc.ops.helpers import Array, computed_in_f32, default_refuse
from minicc.ops.norm import as_type, optional, required, reshaped
from minicc.ops.rotary import rotate_array, rotated

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

# query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos, sin, positions, bias, sink
_PAST, _LENGTHS, _TOTAL, _COS, _POSITIONS, _BIAS, _SINK = 3, 5, 6, 7, 9, 10, 11
_UNSUPPORTED = {"smooth_softmax": 0, "qk_output": 0, "k_quant_type": "NONE", "v_quant_type": "NONE", "kv_cache_bit_width": 0,
                "causal": 1, "sliding_window_cache": 0}  # fmt: skip
# Of the norms of queries and keys, whose weights are inputs that are refused.
_UNUSED = dict.fromkeys(("qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon"))


def _head_size(attrs: Any, query: TensorType, packed: bool) -> Dim:
    """Elements of a head; a packed query holds keys and values, too."""
    assert query.shape is not None
    heads = attrs["num_heads"] + (2 * attrs["kv_num_heads"] if packed else 0)
    size = exact_quotient(query.shape[2], heads)
    return query.shape[2] // heads if size is None else size


def _infer(n: Inference) -> list[TensorType]:
    q, groups, heads = n.shape(0), n.attr("kv_num_heads"), n.attr("num_heads")
    if len(q) != 3 or n.has(1) != n.has(2):
        raise n.error("needs query, key and value of rank 3, or a query that holds all")
    if heads < 1 or groups < 1 or heads % groups:
        raise n.error(f"{heads} heads cannot share {groups}")
    odd = [name for name, usual in _UNSUPPORTED.items() if n.attr(name) != usual]
    if odd or any(n.has(i) for i in range(_SINK, len(n.inputs))):
        raise n.error(f"{', '.join(odd) or 'a sink or a norm of queries and keys'} is not supported")
    if n.attr("do_rotary") and not (n.has(_COS) and n.has(_COS + 1)):
        raise n.error("do_rotary needs cos_cache and sin_cache")
    size = _head_size(n.attrs, n.type(0), not n.has(1))
    total = _total(n.value(_TOTAL))
    past = n.shape(_PAST)[2] if n.has(_PAST) else 0
    present = TensorType(n.dtype(0), (q[0], groups, n.fresh("total") if total is None else maximum(past, total), size))
    return [TensorType(n.dtype(0), (q[0], q[1], heads * size)), present, present]


def _total(value: Value) -> Dim | None:
    """The length of the longest sequence after this step, where it follows from sizes."""
    content = value.content
    if content is None and value.data is not None:
        content = value.data.astype(object)
    if content is None or content.size != 1:
        return None
    found: Dim = content.reshape(-1)[0]
    return found


def _refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is not None:
        return reason
    if _total(required(node, _TOTAL)) is None:
        return "the length of the cache is known only at run time"
    sizes = [_head_size(node.attrs, required(node, 0).tensor, optional(node, 1) is None)]
    sizes += [required(node, _COS).shape[1]] if node.attrs["do_rotary"] else []
    if not all(isinstance(size, int) for size in sizes):
        return "head sizes known only at run time"
    bias = optional(node, _BIAS)
    if bias is not None and bias.shape[3] != _total(required(node, _TOTAL)):
        return "a bias whose length is compared with that of the cache at run time"
    return None


def _expand(b: Builder, node: Node) -> list[Value]:
    q, attrs = required(node, 0), node.attrs
    heads, groups = attrs["num_heads"], attrs["kv_num_heads"]
    batch, steps, _ = q.shape
    size = _head_size(attrs, q.tensor, optional(node, 1) is None)
    assert isinstance(size, int)
    if optional(node, 1) is None:
        cuts = [0, heads * size, (heads + groups) * size, (heads + 2 * groups) * size]
        flat = [b.op("Slice", q, b.shape([low]), b.shape([high]), b.shape([2])) for low, high in pairwise(cuts)]
    else:
        flat = [required(node, i) for i in range(3)]
    query, key, value = (head_axis_out(b, x, count) for x, count in zip(flat, (heads, groups, groups)))
    before = _before(b, node, steps)
    if attrs["do_rotary"]:
        places = optional(node, _POSITIONS)
        if places is None:
            places = b.op("Add", reshaped(b, before, (batch, 1)), counted(b, steps))
        angles = [b.op("Gather", required(node, i), places, axis=0) for i in (_COS, _COS + 1)]
        half = angles[0].shape[2]
        assert isinstance(half, int)
        cos, sin = (as_type(b, reshaped(b, a, (batch, 1, steps, half)), q.tensor.dtype) for a in angles)
        query, key = (rotated(b, x, cos, sin, half, bool(attrs["rotary_interleaved"])) for x in (query, key))
    length, total = node.outputs[1].shape[2], _total(required(node, _TOTAL))
    assert total is not None
    present = [_present(b, optional(node, _PAST + i), new, before, length) for i, new in enumerate((key, value))]
    keys, values = (b.op("Slice", x, b.shape([0]), b.shape([total]), b.shape([2])) for x in present)  # a buffer may be longer
    window = attrs["local_window_size"]
    allowed = band(b, steps, total, reshaped(b, before, (batch, 1, 1, 1)), window - 1 if window >= 0 else -1, 0)
    mask, bias = mask_bias(b, allowed, query), optional(node, _BIAS)
    mask = mask if bias is None else b.op("Add", mask, as_type(b, bias, mask.tensor.dtype))
    y = b.op("Attention", query, keys, values, mask, scale=attrs["scale"] or float(1 / np.sqrt(size)), softcap=attrs["softcap"])
    return [head_axis_in(b, y), *present][: len(node.outputs)]


def _before(b: Builder, node: Node, steps: Dim) -> Value:
    """How many elements of each sequence are in the cache: [B] in int64. A first prompt is one that is as long as the total."""
    lengths = required(node, _LENGTHS)
    batch = required(node, 0).shape[0]
    used = b.op("Add", reshaped(b, as_type(b, lengths, i64), (batch,)), b.constant(np.array([1], np.int64)))
    before = b.op("Sub", used, b.shape([steps]))
    total = _total(required(node, _TOTAL))
    assert total is not None
    if isinstance(total, int) and isinstance(steps, int) and total != steps:
        return before
    zero = b.constant(np.array([0], np.int64))
    return b.op("Where", b.op("Equal", b.shape([total]), b.shape([steps])), zero, before)


def _present(b: Builder, past: Value | None, new: Value, before: Value, length: Dim) -> Value:
    """The cache [B, G, length, D]: of each sequence what was there before, then the new elements, then zeros."""
    batch, _, steps, _ = new.shape
    if past is not None:
        return b.op("CacheUpdate", past, new, before, b.shape([length]), domain="minicc")
    if compare(length, steps) == 0:
        return new
    at, start, zero = counted(b, length), reshaped(b, before, (batch, 1)), b.constant(np.int64(0))
    own = b.op("Sub", at, start)  # place among the new elements
    filled = b.op("And", b.op("Less", own, b.shape([steps])), b.op("GreaterOrEqual", own, zero))
    place = reshaped(b, b.op("Where", filled, own, zero), (batch, length, 1))
    rows = b.op("GatherND", b.op("Transpose", new, perm=[0, 2, 1, 3]), place, batch_dims=1)
    return b.op("Where", reshaped(b, filled, (batch, 1, length, 1)), b.op("Transpose", rows, perm=[0, 2, 1, 3]), b.scalar(0, new))


def _update_infer(n: Inference) -> list[TensorType]:
    past = n.shape(0)
    length: Dim = n.content(3).reshape(-1)[0]  # type: ignore[union-attr]
    return [TensorType(n.dtype(0), (*past[:2], length, past[3]))]


def _update_eval(past: Array, new: Array, before: Array, length: Array) -> Array:
    out = np.zeros((*past.shape[:2], int(length[0]), past.shape[3]), past.dtype)
    for row, start in enumerate(before.tolist()):
        out[row, :, : min(start, past.shape[2])] = past[row, :, :start]
        out[row, :, start : start + new.shape[2]] = new[row]
    return out


# past [B, G, P, D], new [B, G, S, D], elements before [B], length [1]: the cache after a step, [B, G, length, D].
register(OpDef(
    "CacheUpdate", Kind.TEMPLATE, infer=_update_infer, eval=_update_eval, static_inputs=(3,), refuse=default_refuse,
    domain="minicc",
))  # fmt: skip


@computed_in_f32
def _eval(
    q: Array,
    k: Array | None,
    v: Array | None,
    past_key: Array | None,
    past_value: Array | None,
    seqlens: Array,
    total: Array,
    cos: Array | None = None,
    sin: Array | None = None,
    positions: Array | None = None,
    bias: Array | None = None,
    sink: Array | None = None,
    **attrs: Any,
) -> tuple[Array, ...]:
    heads, groups = attrs["num_heads"], attrs["kv_num_heads"]
    batch, steps = q.shape[:2]
    if k is None or v is None:
        q, k, v = np.split(q, np.array([heads, heads + groups]) * (q.shape[2] // (heads + 2 * groups)), axis=2)
    query, key, value = (
        x.reshape(batch, steps, h, -1).transpose(0, 2, 1, 3)
        for x, h in ((q, heads), (k, groups), (v, groups))
    )
    kept = 0 if past_key is None else past_key.shape[2]
    length = max(kept, int(total.reshape(-1)[0]))
    present = [np.zeros((batch, groups, length, query.shape[3]), dtype=q.dtype) for _ in range(2)]
    out = np.zeros_like(query)
    first_prompt = int(total.reshape(-1)[0]) == steps
    for row in range(batch):
        used = int(seqlens.reshape(-1)[row]) + 1
        before = 0 if first_prompt else used - steps
        places = before + np.arange(steps) if positions is None else positions[row]
        turned = [query[row], key[row]]
        if attrs["do_rotary"] and cos is not None and sin is not None:
            turned = [rotate_array(x, cos[places], sin[places], attrs["rotary_interleaved"]) for x in turned]
        for buffer, old, new in zip(present, (past_key, past_value), (turned[1], value[row])):
            if old is not None and before:
                buffer[row, :, :before] = old[row, :, :before]
            buffer[row, :, before : before + steps] = new
        end = before + steps
        keys, values = (repeated_heads(p[row : row + 1, :, :end], heads)[0] for p in present)
        scores = (
            turned[0] @ keys.swapaxes(-1, -2) * q.dtype.type(attrs["scale"] or 1 / np.sqrt(query.shape[3]))
        )
        if attrs["softcap"]:
            scores = np.tanh(scores / attrs["softcap"]) * attrs["softcap"]
        if bias is not None:
            scores = scores + bias[min(row, len(bias) - 1), :, :, :end]
        ahead = np.arange(end)[None, :] - (before + np.arange(steps))[:, None]
        allowed = ahead <= 0
        if attrs["local_window_size"] >= 0:
            allowed &= -ahead < attrs["local_window_size"]
        out[row] = attend(np.where(allowed, scores, -np.inf).astype(q.dtype)) @ values
    return out.transpose(0, 2, 1, 3).reshape(q.shape), *present


register(OpDef(
    "GroupQueryAttention", Kind.EXPAND, infer=_infer, eval=_eval, expand=_expand, refuse=_refuse, domain="com.microsoft",
    attrs={
        "do_rotary": 0, "kv_num_heads": REQUIRED, "local_window_size": -1, "num_heads": REQUIRED, "rotary_interleaved": 0,
        "scale": 0.0, "softcap": 0.0, **_UNSUPPORTED, **_UNUSED,
    },
))  # fmt: skip
