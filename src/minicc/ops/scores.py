"""What linear models, support vectors and trees of ai.onnx.ml share: transforms of scores, and labels of classes.

Formulas are those of ONNX Runtime's `ml_common.h`, also where the standard leaves them open. No operator is defined here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicc.ir.dims import Dim
from minicc.ir.graph import Builder, Node, Value
from minicc.ir.opdef import UnknownRank
from minicc.ir.types import KERNEL_DTYPES, TensorType, i64, string
from minicc.ops.helpers import Array
from minicc.ops.norm import axes_of

DOMAIN = "ai.onnx.ml"
TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")
# Of the approximation of the inverse error function (Winitzki, 2008) that PROBIT is computed with.
WINITZKI = 0.147
# Scores nearer to 0 than this count as 0 for SOFTMAX_ZERO.
ZERO = 1e-7


def transformed_scores(scores: Array, transform: str) -> Array:
    """The transform of scores [N, K] in numpy: the oracle."""
    if transform == "LOGISTIC":
        return np.asarray(1 / (1 + np.exp(-scores)))
    if transform in ("SOFTMAX", "SOFTMAX_ZERO"):
        most = scores.max(axis=1, keepdims=True)
        kept = np.exp(scores - most)
        if transform == "SOFTMAX_ZERO":
            kept = np.where(np.abs(scores) > ZERO, kept, scores * np.exp(-most))
        total = kept.sum(axis=1, keepdims=True)
        return np.asarray(kept / np.where(total == 0, 1, total))
    if transform == "PROBIT":
        x = 2 * scores - 1
        log = np.log((1 - x) * (1 + x))
        half = 2 / (np.pi * WINITZKI) + 0.5 * log
        return np.asarray(np.sqrt(2) * np.sign(x) * np.sqrt(np.sqrt(half * half - log / WINITZKI) - half))
    return scores


def transformed(b: Builder, scores: Value, transform: str) -> Value:
    """The transform of scores [N, K] as nodes."""

    def number(value: float) -> Value:
        return b.scalar(value, scores)

    if transform == "LOGISTIC":
        return b.op("Sigmoid", scores)
    if transform == "SOFTMAX":
        return b.op("Softmax", scores, axis=1)
    if transform == "SOFTMAX_ZERO":
        axes = axes_of(b, [1])
        most = b.op("ReduceMax", scores, axes, keepdims=1)
        far = b.op("Greater", b.op("Abs", scores), number(ZERO))
        near = b.op("Mul", scores, b.op("Exp", b.op("Neg", most)))
        kept = b.op("Where", far, b.op("Exp", b.op("Sub", scores, most)), near)
        total = b.op("ReduceSum", kept, axes, keepdims=1)
        return b.op("Div", kept, b.op("Where", b.op("Equal", total, number(0)), number(1), total))
    if transform == "PROBIT":
        x = b.op("Sub", b.op("Mul", scores, number(2)), number(1))
        log = b.op("Log", b.op("Mul", b.op("Sub", number(1), x), b.op("Add", number(1), x)))
        half = b.op("Add", b.op("Mul", log, number(0.5)), number(2 / (np.pi * WINITZKI)))
        root = b.op("Sqrt", b.op("Sub", b.op("Mul", half, half), b.op("Div", log, number(WINITZKI))))
        size = b.op("Sqrt", b.op("Sub", root, half))
        return b.op("Mul", b.op("Mul", b.op("Sign", x), size), number(np.sqrt(2)))
    return scores


def is_above(b: Builder, score: Value, limit: float) -> Value:
    """Whether each score [N, 1] is above a limit, as 1 and 0 [N]."""
    return b.op("Squeeze", b.op("Cast", b.op("Greater", score, b.scalar(limit, score)), to=i64), axes_of(b, [1]))


def paired(b: Builder, score: Value, transform: str, one_minus: bool) -> Value:
    """Scores [N, 2] of two classes from that of the second [N, 1]: the first is its opposite, or what it lacks to one.

    LOGISTIC takes the opposite in any case; the other transforms but PROBIT leave such scores as they are.
    """
    other = b.op("Neg", score)
    if one_minus and transform != "LOGISTIC":
        other = b.op("Add", other, b.scalar(1, score))
    pair = b.op("Concat", other, score, axis=1)
    return transformed(b, pair, transform) if transform in ("LOGISTIC", "PROBIT") else pair


def floats_of(attrs: Mapping[str, Any], name: str) -> Array:
    """An attribute as float32 numbers; none where it is left out."""
    return np.asarray(attrs[name] or (), np.float32)


def class_labels(attrs: Mapping[str, Any], numbers: str) -> tuple[Any, ...]:
    """The labels of a classifier: texts, or the attribute called `numbers`."""
    return tuple(attrs["classlabels_strings"] or attrs[numbers] or ())


def as_rows(b: Builder, x: Value) -> Value:
    """Features [F] as one row of [N, F]."""
    return x if len(x.shape) > 1 else b.op("Unsqueeze", x, axes_of(b, [0]))


def row_array(x: Array) -> Array:
    """The same in numpy."""
    return x if x.ndim > 1 else x[None]


def refuse_rows(node: Node) -> str | None:
    """Why the features of a node cannot be rows of numbers for kernels, or None."""
    x = node.inputs[0]
    if x is None or not isinstance(x.type, TensorType) or x.type.shape is None or len(x.type.shape) not in (1, 2):
        return "features of unknown rank, or not of rank 1 or 2"
    return None if x.type.dtype in KERNEL_DTYPES else f"no kernel for element type {x.type.dtype}"


def rows_of(x: TensorType) -> Dim:
    """How many rows features of rank 1 or 2 have."""
    if x.shape is None:
        raise UnknownRank
    return x.shape[0] if len(x.shape) > 1 else 1


def label_type(labels: Sequence[Any], rows: Dim) -> TensorType:
    """The type of one label for each row."""
    return TensorType(string if labels and isinstance(labels[0], str) else i64, (rows,))


def label_array(labels: Sequence[Any]) -> Array:
    return np.array(labels, object if labels and isinstance(labels[0], str) else np.int64)


def labelled(b: Builder, places: Value, labels: Sequence[Any]) -> Value:
    """The label at each place [N], counted from 0."""
    return b.op("Gather", b.constant(label_array(labels)), places, axis=0)
