"""com.microsoft's fusions that optimisers of diffusion and language models write: a bias or a residual with what follows it.

Expanded into their parts again, which are then fused as any others are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.dims import Dim, product
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, f32
from minicc.ops.helpers import (
    Array,
    broadcast_shape,
    computed_in_f32,
    default_refuse,
    require_same_dtype,
    same_as_float_input,
    widen,
)
from minicc.ops.norm import as_type, optional, required, reshaped
from minicc.ops.softmax import softmax

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value

_DOMAIN = "com.microsoft"


# -- BiasAdd: X [N, S, C] with a bias over channels and a residual


def _bias_add_infer(n: Inference) -> list[TensorType]:
    require_same_dtype(n)
    if n.rank(1) != 1:
        raise n.error("the bias must be a vector")
    return same_as_float_input(n)  # type: ignore[return-value]


register(OpDef(
    "BiasAdd", Kind.EXPAND, infer=_bias_add_infer, refuse=default_refuse, domain=_DOMAIN,
    eval=computed_in_f32(lambda x, bias, skip: x + bias + skip),
    expand=lambda b, node: [b.op("Add", b.op("Add", node.inputs[0], node.inputs[1]), node.inputs[2])],
))  # fmt: skip


# -- BiasSplitGelu: X [N, S, 2 C] with a bias, its first half times Gelu of its second


def _split_gelu_infer(n: Inference) -> list[TensorType]:
    require_same_dtype(n)
    x = n.shape(0)
    if not x or (isinstance(x[-1], int) and x[-1] % 2):
        raise n.error("the last axis must have two halves")
    return [TensorType(n.dtype(0), (*x[:-1], x[-1] // 2))]


def _split_gelu_expand(b: Builder, node: Node) -> list[Value]:
    total = b.op("Add", required(node, 0), required(node, 1))
    width, axis = total.shape[-1], b.shape([total.tensor.rank - 1])
    left = b.op("Slice", total, b.shape([0]), b.shape([width // 2]), axis)
    right = b.op("Slice", total, b.shape([width // 2]), b.shape([width]), axis)
    return [b.op("Mul", left, b.op("Gelu", right))]


@computed_in_f32
def _split_gelu_eval(x: Array, bias: Array) -> Array:
    left, right = np.split(x + bias, 2, axis=-1)
    error_function = np.vectorize(math.erf, otypes=[np.float64])(right.astype(np.float64) / math.sqrt(2))
    return np.asarray(left * (0.5 * right * (1 + error_function))).astype(np.float32)


register(OpDef(
    "BiasSplitGelu", Kind.EXPAND, infer=_split_gelu_infer, eval=_split_gelu_eval, expand=_split_gelu_expand,
    refuse=default_refuse, domain=_DOMAIN,
))  # fmt: skip


# -- BiasSoftmax: softmax over all the axes from the given one


def _bias_softmax_infer(n: Inference) -> list[TensorType]:
    shape = n.shape(0)
    n.axis(n.attr("axis"), len(shape))
    found = broadcast_shape(n)
    assert found is not None
    grown = any(isinstance(a, int) and isinstance(d, int) and a != d for a, d in zip(found, shape))
    if len(found) != len(shape) or grown:
        raise n.error("the bias must broadcast to the data")
    return [TensorType(require_same_dtype(n), found)]


def _bias_softmax_expand(b: Builder, node: Node) -> list[Value]:
    total = b.op("Add", required(node, 0), required(node, 1))
    shape = total.shape
    axis = node.attrs["axis"] % len(shape)
    if axis == len(shape) - 1:
        return [softmax(b, total, axis)]
    rows = reshaped(b, total, (product(shape[:axis]), product(shape[axis:])))
    return [reshaped(b, softmax(b, rows, 1), shape)]


@computed_in_f32
def _bias_softmax_eval(x: Array, bias: Array, *, axis: int, is_inner_broadcast: int) -> Array:
    total = x + bias
    axes = tuple(range(axis % x.ndim, x.ndim))
    powers = np.exp(total - total.max(axis=axes, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axes, keepdims=True))


register(OpDef(
    "BiasSoftmax", Kind.EXPAND, infer=_bias_softmax_infer, eval=_bias_softmax_eval, expand=_bias_softmax_expand,
    refuse=default_refuse, attrs={"axis": 1, "is_inner_broadcast": REQUIRED}, domain=_DOMAIN,
))  # fmt: skip


# -- GroupNorm and SkipGroupNorm, with SiLU after them when asked for


def _group_infer(n: Inference) -> list[TensorType]:
    x, groups = n.shape(0), n.attr("groups")
    if len(x) < 3:
        raise n.error("needs a batch, channels and at least one axis more")
    channels = x[-1] if n.attr("channels_last") else x[1]
    if groups <= 0 or (isinstance(channels, int) and channels % groups):
        raise n.error(f"{channels} channels do not divide into {groups} groups")
    if n.attr("activation") not in (0, 1):
        raise n.error(f"activation {n.attr('activation')} is unknown")
    if any(n.rank(i) != 1 for i in (1, 2)):
        raise n.error("gamma and beta must be vectors over channels")
    return same_as_float_input(n)  # type: ignore[return-value]


def _skip_infer(n: Inference) -> list[TensorType]:
    return _group_infer(n) * 2


def _group_normalised(b: Builder, node: Node, x: Value) -> Value:
    """In the type of the node's first input."""
    attrs, rank = node.attrs, x.tensor.rank
    last = attrs["channels_last"]
    if last:
        x = b.op("Transpose", x, perm=[0, rank - 1, *range(1, rank - 1)])
    y = b.op("GroupNormalization", x, *(as_type(b, required(node, i), x.tensor.dtype) for i in (1, 2)),
             num_groups=attrs["groups"], epsilon=attrs["epsilon"])  # fmt: skip
    if last:
        y = b.op("Transpose", y, perm=[0, *range(2, rank), 1])
    if attrs["activation"]:
        y = b.op("Mul", y, b.op("Sigmoid", y))
    return as_type(b, y, node.output.tensor.dtype)


def _group_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    wide = as_type(b, x, f32) if node.attrs["activation"] else x
    return [_group_normalised(b, node, wide)]


def _per_channel(rank: int, channels: Dim, last: int) -> tuple[Dim, ...]:
    """The shape in which numbers for batch and channel broadcast to an activation."""
    return (*(1,) * (rank - 2), channels) if last else (channels, *(1,) * (rank - 2))


def _skip_expand(b: Builder, node: Node) -> list[Value]:
    x, skip, bias = required(node, 0), required(node, 3), optional(node, 4)
    rank, last = x.tensor.rank, node.attrs["channels_last"]
    wide = as_type(b, x, f32)
    if skip.tensor.rank == 2:
        skip = reshaped(b, skip, (skip.shape[0], *_per_channel(rank, skip.shape[1], last)))
    total = b.op("Add", wide, as_type(b, skip, f32))
    if bias is not None:
        total = b.op("Add", total, as_type(b, reshaped(b, bias, _per_channel(rank, bias.shape[0], last)), f32))
    return [_group_normalised(b, node, total), as_type(b, total, x.tensor.dtype)][: len(node.outputs)]


def _group_array(x: Array, gamma: Array, beta: Array, attrs: Any) -> Array:
    image = widen(x)
    image = np.moveaxis(image, -1, 1) if attrs["channels_last"] else image
    groups = image.reshape(len(image), attrs["groups"], -1).astype(np.float64)
    deviation = np.sqrt(groups.var(axis=2, keepdims=True) + attrs["epsilon"])
    y = ((groups - groups.mean(axis=2, keepdims=True)) / deviation).reshape(image.shape)
    shape = (-1, *(1,) * (image.ndim - 2))
    y = y * widen(gamma).reshape(shape) + widen(beta).reshape(shape)
    y = y / (1 + np.exp(-y)) if attrs["activation"] else y
    return np.ascontiguousarray(np.moveaxis(y, 1, -1) if attrs["channels_last"] else y).astype(x.dtype)


def _group_eval(x: Array, gamma: Array, beta: Array, **attrs: Any) -> Array:
    return _group_array(x, gamma, beta, attrs)


def _skip_eval(x: Array, gamma: Array, beta: Array, skip: Array, bias: Array | None = None,
               **attrs: Any) -> tuple[Array, Array]:  # fmt: skip
    last = attrs["channels_last"]
    if skip.ndim == 2:
        skip = np.expand_dims(skip, tuple(range(1, x.ndim - 1)) if last else tuple(range(2, x.ndim)))
    total = widen(x) + widen(skip)
    if bias is not None:
        total = total + (widen(bias) if last else widen(bias).reshape(-1, *(1,) * (x.ndim - 2)))
    return _group_array(total, gamma, beta, attrs).astype(x.dtype), total.astype(x.dtype)


_GROUP_ATTRS = {"activation": REQUIRED, "channels_last": 1, "epsilon": 1e-5, "groups": REQUIRED}
register(OpDef(
    "GroupNorm", Kind.EXPAND, infer=_group_infer, eval=_group_eval, expand=_group_expand, refuse=default_refuse,
    attrs=_GROUP_ATTRS, domain=_DOMAIN,
))  # fmt: skip
register(OpDef(
    "SkipGroupNorm", Kind.EXPAND, infer=_skip_infer, eval=_skip_eval, expand=_skip_expand, refuse=default_refuse,
    attrs=_GROUP_ATTRS, domain=_DOMAIN,
))  # fmt: skip


# -- GemmaRotaryEmbedding(angles [B, S, D], queries [B, H, S, D], the same rotated by half, keys, the same rotated by half)


def _gemma_infer(n: Inference) -> list[TensorType]:
    if n.rank(0) != 3 or any(n.rank(i) != 4 for i in range(1, 5)):
        raise n.error("needs angles of rank 3, and queries and keys of rank 4")
    require_same_dtype(n, (1, 2, 3, 4))
    return [n.type(1), n.type(3)]


def _gemma_expand(b: Builder, node: Node) -> list[Value]:
    angles, *sides = (required(node, i) for i in range(5))
    shape = angles.shape
    angles = reshaped(b, angles, (shape[0], 1, *shape[1:]))
    cos, sin = (as_type(b, b.op(name, angles), sides[0].tensor.dtype) for name in ("Cos", "Sin"))
    return [
        b.op("Add", b.op("Mul", sides[i], cos), b.op("Mul", sides[i + 1], sin)) for i in (0, 2)[: len(node.outputs)]
    ]


def _gemma_eval(angles: Array, q: Array, q_turned: Array, k: Array, k_turned: Array) -> tuple[Array, Array]:
    cos, sin = (widen(f(angles.astype(np.float32)).astype(q.dtype))[:, None] for f in (np.cos, np.sin))
    found = [widen(x) * cos + widen(turned) * sin for x, turned in ((q, q_turned), (k, k_turned))]
    return found[0].astype(q.dtype), found[1].astype(k.dtype)


register(OpDef(
    "GemmaRotaryEmbedding", Kind.EXPAND, infer=_gemma_infer, eval=_gemma_eval, expand=_gemma_expand, refuse=default_refuse,
    domain=_DOMAIN,
))  # fmt: skip
