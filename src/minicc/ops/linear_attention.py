"""State-space building blocks of opset 27: LinearAttention and CausalConvWithState.

The convolution expands into a concatenation and a depthwise Conv, the recurrence into a Scan over tokens.
Chunk-parallel forms are not attempted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.graph import Builder
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType
from minicc.ops.helpers import Array, computed_in_f32, default_refuse, require_same_dtype
from minicc.ops.norm import as_type, optional, required, reshaped, widened

if TYPE_CHECKING:
    from minicc.ir.graph import Graph, Node, Value


# -- CausalConvWithState(input [B, C, L], weight [C, 1, K], bias [C], past_state [B, C, K - 1])


def _causal_infer(n: Inference) -> list[TensorType]:
    x, w = n.shape(0), n.shape(1)
    if len(x) != 3 or len(w) != 3:
        raise n.error("input and weight must have rank 3")
    if n.attr("activation") not in ("none", "silu", "swish"):
        raise n.error(f"activation {n.attr('activation')!r} is unknown", hint="none, silu or swish")
    return [n.type(0), TensorType(n.dtype(0), (*x[:2], w[2] - 1))]


def _causal_refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is None and not all(
        isinstance(d, int) for d in (*required(node, 1).shape, required(node, 0).shape[1])
    ):
        return "a kernel or channels known only at run time"
    return reason


def _causal_expand(b: Builder, node: Node) -> list[Value]:
    x, w, bias, past = required(node, 0), required(node, 1), optional(node, 2), optional(node, 3)
    batch, channels, length = x.shape
    carried = w.shape[2] - 1
    if past is None:
        past = b.op("Expand", b.scalar(0, x), b.shape([batch, channels, carried]))
    whole = b.op("Concat", past, x, axis=2) if carried != 0 else x
    y = b.op("Conv", whole, w, bias, group=channels)
    if node.attrs["activation"] != "none":
        y = b.op("Mul", y, b.op("Sigmoid", y))
    state = b.op("Slice", whole, b.shape([length]), b.shape([length + carried]), b.shape([2]))
    return [y, state][: len(node.outputs)]


@computed_in_f32
def _causal_eval(
    x: Array, w: Array, bias: Array | None = None, past: Array | None = None, *, activation: str
) -> tuple[Array, Array]:
    carried = w.shape[2] - 1
    before = np.zeros((*x.shape[:2], carried), dtype=x.dtype) if past is None else past
    whole = np.concatenate([before, x], axis=2)
    y = sum(whole[:, :, k : k + x.shape[2]] * w[:, 0, k, None] for k in range(w.shape[2]))
    y = np.asarray(y if bias is None else y + bias[:, None])
    y = y if activation == "none" else y / (1 + np.exp(-y))
    return y, np.ascontiguousarray(whole[:, :, x.shape[2] :])


register(
    OpDef(
        "CausalConvWithState",
        Kind.EXPAND,
        infer=_causal_infer,
        eval=_causal_eval,
        expand=_causal_expand,
        refuse=_causal_refuse,
        attrs={"activation": "none"},
    )
)


# -- LinearAttention(query, key, value [B, T, H * D], past_state [B, H, K, V], decay, beta)

RULES = ("linear", "gated", "delta", "gated_delta")


def _linear_infer(n: Inference) -> list[TensorType]:
    q, k, v = n.shape(0), n.shape(1), n.shape(2)
    heads, groups, rule = n.attr("q_num_heads"), n.attr("kv_num_heads"), n.attr("update_rule")
    if len(q) != 3 or len(k) != 3 or len(v) != 3 or heads <= 0 or groups <= 0 or heads % groups:
        raise n.error(
            "needs query, key and value of rank 3, and query heads that are a multiple of key heads"
        )
    if rule not in RULES:
        raise n.error(f"update_rule {rule!r} is unknown", hint=", ".join(RULES))
    if ("gated" in rule and not n.has(4)) or ("delta" in rule and not n.has(5)):
        raise n.error(f"update_rule {rule!r} needs decay (gated) and beta (delta)")
    require_same_dtype(n, (0, 1, 2))
    state = (q[0], groups, k[2] // groups, v[2] // groups)
    return [
        TensorType(n.dtype(0), (q[0], q[1], v[2] // groups * heads)),
        TensorType(n.dtype(3) if n.has(3) else n.dtype(0), state),
    ]


def _linear_refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is None and not all(isinstance(required(node, i).shape[2], int) for i in range(3)):
        return "head sizes known only at run time"
    return reason


def _linear_scale(attrs: Any, size: int) -> float:
    return float(attrs["scale"] or 1 / np.sqrt(size))


def _token(b: Builder, x: Value, heads: int, columns: bool) -> Value:
    """[B, H * D] of one token as [B, H, D, 1] (columns) or [B, H, 1, D]."""
    batch, width = x.shape
    assert isinstance(width, int)
    size = width // heads
    return reshaped(b, x, (batch, heads, size, 1) if columns else (batch, heads, 1, size))


def _linear_step(outer: Graph, values: list[Value], node: Node) -> Graph:
    """The body of the Scan: (state, q, k, v, decay, beta of one token) to (state, output)."""
    attrs, rule = node.attrs, node.attrs["update_rule"]
    body = outer.subgraph("linear_attention_step")
    names = ["state", "q", "k", "v"] + ["decay"] * ("gated" in rule) + ["beta"] * ("delta" in rule)
    inputs = {}
    for name, value in zip(names, values):
        shape = value.shape if name == "state" else (value.shape[0], value.shape[2])
        inputs[name] = body.input(name, TensorType(value.tensor.dtype, shape))
    b = Builder(body)
    heads, groups = attrs["q_num_heads"], attrs["kv_num_heads"]
    state, k = inputs["state"], _token(b, inputs["k"], groups, True)
    v = _token(b, inputs["v"], groups, False)
    if "gated" in rule:
        state = b.op("Mul", state, b.op("Exp", _token(b, inputs["decay"], groups, True)))
    if "delta" in rule:
        known = b.op("MatMul", b.op("Transpose", k, perm=[0, 1, 3, 2]), state)
        beta = inputs["beta"]
        beta = reshaped(b, beta, (beta.shape[0], beta.shape[1], 1, 1))
        v = b.op("Mul", beta, b.op("Sub", v, known))
    state = b.op("Add", state, b.op("Mul", k, v))
    batch, width = inputs["q"].shape
    assert isinstance(width, int)
    q = reshaped(b, inputs["q"], (batch, groups, heads // groups, width // heads))
    out = b.op("MatMul", b.op("Mul", q, b.scalar(_linear_scale(attrs, width // heads), q)), state)
    size = out.shape[3]
    body.outputs = [state, reshaped(b, out, (batch, heads * size))]
    return body


def _linear_expand(b: Builder, node: Node) -> list[Value]:
    attrs, rule = node.attrs, node.attrs["update_rule"]
    q, k, v = (widened(b, required(node, i)) for i in range(3))
    groups, past = attrs["kv_num_heads"], optional(node, 3)
    if past is None:
        assert isinstance(k.shape[2], int) and isinstance(v.shape[2], int)
        shape = (q.shape[0], groups, k.shape[2] // groups, v.shape[2] // groups)
        state = b.op("Expand", b.scalar(0, q), b.shape(shape))
    else:
        state = as_type(b, past, q.tensor.dtype)
    scanned = [q, k, v]
    scanned += [as_type(b, required(node, 4), q.tensor.dtype)] if "gated" in rule else []
    scanned += [as_type(b, required(node, 5), q.tensor.dtype)] if "delta" in rule else []
    count = len(scanned)
    final, y = b.ops(
        "Scan",
        state,
        *scanned,
        outputs=2,
        body=_linear_step(b.graph, [state, *scanned], node),
        n_state=1,
        num_scan_inputs=count,
        scan_input_axes=[1] * count,
        scan_output_axes=[1],
    )
    out = [as_type(b, value, result.tensor.dtype) for value, result in zip((y, final), node.outputs)]
    return out


def _linear_eval(q: Array, k: Array, v: Array, past: Array | None = None, decay: Array | None = None,
                 beta: Array | None = None, **attrs: Any) -> tuple[Array, Array]:  # fmt: skip
    heads, groups, rule = attrs["q_num_heads"], attrs["kv_num_heads"], attrs["update_rule"]
    wide: Any = np.float64 if q.dtype == np.float64 else np.float32
    batch, steps = q.shape[:2]
    query = q.reshape(batch, steps, groups, heads // groups, -1).astype(wide)
    key, value = (x.reshape(batch, steps, groups, -1).astype(wide) for x in (k, v))
    shape = (batch, groups, key.shape[-1], value.shape[-1])
    state: Array = np.zeros(shape, wide) if past is None else past.astype(wide)
    out = np.zeros((batch, steps, heads * value.shape[-1]), wide)
    scale = _linear_scale(attrs, query.shape[-1])
    for t in range(steps):
        new = value[:, t]
        if "gated" in rule and decay is not None:
            state = state * np.exp(decay[:, t].astype(wide)).reshape(batch, groups, -1, 1)
        if "delta" in rule and beta is not None:
            known = np.einsum("bgk,bgkv->bgv", key[:, t], state)
            new = beta[:, t].astype(wide).reshape(batch, -1, 1) * (new - known)
        state = state + key[:, t, :, :, None] * new[:, :, None, :]
        out[:, t] = np.einsum("bghk,bgkv->bghv", query[:, t] * scale, state).reshape(batch, -1)
    return out.astype(q.dtype), state.astype(q.dtype if past is None else past.dtype)


register(
    OpDef(
        "LinearAttention",
        Kind.EXPAND,
        infer=_linear_infer,
        eval=_linear_eval,
        expand=_linear_expand,
        refuse=_linear_refuse,
        attrs={
            "chunk_size": 64,
            "kv_num_heads": REQUIRED,
            "q_num_heads": REQUIRED,
            "scale": 0.0,
            "update_rule": "gated_delta",
        },
    )
)
