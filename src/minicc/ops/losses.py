"""Losses: NegativeLogLikelihoodLoss and SoftmaxCrossEntropyLoss, expanded into gathers and sums.

Labels equal to ignore_index count neither in the sum nor in the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.ir.opdef import Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, i64
from minicc.ops.helpers import Array, computed_in_f32, default_refuse
from minicc.ops.norm import as_type, axes_of, optional, required, reshaped, widened

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value


def _infer(n: Inference) -> list[TensorType]:
    scores, labels = n.shape(0), n.shape(1)
    if len(scores) < 2 or len(labels) != len(scores) - 1:
        raise n.error("labels must have the shape of the scores without the class axis")
    if n.attr("reduction") not in ("none", "sum", "mean"):
        raise n.error(f"reduction {n.attr('reduction')!r} is unknown", hint="none, sum or mean")
    return [TensorType(n.dtype(0), labels if n.attr("reduction") == "none" else ()), n.type(0)]


def _loss(b: Builder, node: Node, log_probabilities: Value) -> Value:
    """The reduced loss in the type of the log probabilities."""
    labels, weight = as_type(b, required(node, 1), i64), optional(node, 2)
    ignored = node.attrs["ignore_index"]
    keep: Value | None = None
    if ignored is not None:
        keep = b.op("Not", b.op("Equal", labels, b.constant(np.int64(ignored))))
        labels = b.op("Where", keep, labels, b.constant(np.int64(0)))
    shape = labels.shape
    picked = b.op("GatherElements", log_probabilities, reshaped(b, labels, (shape[0], 1, *shape[1:])), axis=1)
    loss = b.op("Neg", reshaped(b, picked, shape))
    weights: Value | None = None
    if weight is not None:
        weights = as_type(b, b.op("Gather", weight, labels, axis=0), loss.tensor.dtype)
    if keep is not None:
        counted = as_type(b, keep, loss.tensor.dtype)
        weights = counted if weights is None else b.op("Mul", weights, counted)
    if weights is not None:
        loss = b.op("Mul", loss, weights)
    if node.attrs["reduction"] == "none":
        return loss
    axes = axes_of(b, range(len(shape)))
    total = b.op("ReduceSum", loss, axes, keepdims=0)
    if node.attrs["reduction"] == "sum":
        return total
    if weights is None:
        return b.op("ReduceMean", loss, axes, keepdims=0)
    return b.op("Div", total, b.op("ReduceSum", weights, axes, keepdims=0))


def _nll_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    return [as_type(b, _loss(b, node, widened(b, x)), x.tensor.dtype)]


def _cross_entropy_expand(b: Builder, node: Node) -> list[Value]:
    x = required(node, 0)
    logs = b.op("LogSoftmax", widened(b, x), axis=1)
    return [as_type(b, v, x.tensor.dtype) for v in (_loss(b, node, logs), logs)][: len(node.outputs)]


@computed_in_f32
def _nll_eval(
    logs: Array, labels: Array, weight: Array | None = None, *, ignore_index: int | None, reduction: str
) -> Array:
    kept = np.ones(labels.shape, dtype=bool) if ignore_index is None else labels != ignore_index
    safe = np.where(kept, labels, 0).astype(np.int64)
    scale = np.where(kept, 1 if weight is None else weight[safe], 0).astype(logs.dtype)
    loss = -np.take_along_axis(logs, safe[:, None], axis=1)[:, 0] * scale
    if reduction == "none":
        return np.asarray(loss)
    total = loss.sum(dtype=logs.dtype)
    return np.asarray(total if reduction == "sum" else total / scale.sum(dtype=logs.dtype))


@computed_in_f32
def _cross_entropy_eval(
    x: Array, labels: Array, weight: Array | None = None, **attrs: Any
) -> tuple[Array, Array]:
    shifted = x - x.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return _nll_eval(logs, labels, weight, **attrs), logs


_ATTRS = {"ignore_index": None, "reduction": "mean"}
register(
    OpDef(
        "NegativeLogLikelihoodLoss",
        Kind.EXPAND,
        infer=_infer,
        eval=_nll_eval,
        expand=_nll_expand,
        refuse=default_refuse,
        attrs=_ATTRS,
    )
)
register(
    OpDef(
        "SoftmaxCrossEntropyLoss",
        Kind.EXPAND,
        infer=_infer,
        eval=_cross_entropy_eval,
        expand=_cross_entropy_expand,
        refuse=default_refuse,
        attrs=_ATTRS,
    )
)
