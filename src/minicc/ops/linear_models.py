"""Linear models and support vector machines of ai.onnx.ml, written as products and generated kernels.

Where the standard is silent (two classes with one score, transforms of a single score, which class votes choose) results are
those of ONNX Runtime. Probabilities of support vector machines are those of Wu, Lin and Weng, "Probability Estimates for
Multi-class Classification by Pairwise Coupling" (2004), by their second method and with libsvm's limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from minicc.ir.graph import Builder, Node, Value
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType, Type, f32
from minicc.ops.helpers import Array
from minicc.ops.norm import as_type, axes_of, required
from minicc.ops.scores import (
    DOMAIN,
    as_rows,
    class_labels,
    floats_of,
    is_above,
    label_array,
    label_type,
    labelled,
    paired,
    refuse_rows,
    row_array,
    rows_of,
    transformed,
    transformed_scores,
)

# -- LinearRegressor, LinearClassifier: X times the transpose of `coefficients` [K, F], plus `intercepts`


def _coefficients(attrs: Mapping[str, Any], count: int) -> Array:
    found = floats_of(attrs, "coefficients")
    if count < 1 or found.size % count:
        raise ValueError(f"{found.size} coefficients for {count} targets")
    return found.reshape(count, -1)


def _products(b: Builder, x: Value, coefficients: Array, intercepts: Array) -> Value:
    scores = b.op("MatMul", as_type(b, as_rows(b, x), f32), b.constant(np.ascontiguousarray(coefficients.T)))
    return b.op("Add", scores, b.constant(intercepts)) if intercepts.size else scores


def _check_features(n: Inference, count: int) -> None:
    x = n.shape(0)
    if isinstance(x[-1], int) and x[-1] != count:
        raise n.error(f"rows have {x[-1]} features, the model has {count}")


def _regressor_infer(n: Inference) -> list[Type]:
    targets = int(n.attr("targets"))
    _check_features(n, _coefficients(n.attrs, targets).shape[1])
    return [TensorType(f32, (rows_of(n.type(0)), targets))]


def _regressor_eval(x: Array, **attrs: Any) -> Array:
    targets = int(attrs["targets"])
    scores = row_array(x).astype(np.float32) @ _coefficients(attrs, targets).T
    if attrs["intercepts"]:
        scores = scores + floats_of(attrs, "intercepts")
    plain = targets == 1 and attrs["post_transform"] != "PROBIT"
    return np.asarray(scores if plain else transformed_scores(scores, attrs["post_transform"]), np.float32)


def _regressor_expand(b: Builder, node: Node) -> Sequence[Value]:
    targets, transform = int(node.attrs["targets"]), node.attrs["post_transform"]
    scores = _products(b, required(node, 0), _coefficients(node.attrs, targets), floats_of(node.attrs, "intercepts"))
    return [scores if targets == 1 and transform != "PROBIT" else transformed(b, scores, transform)]


register(OpDef(
    "LinearRegressor", Kind.EXPAND, infer=_regressor_infer, eval=_regressor_eval, expand=_regressor_expand, refuse=refuse_rows,
    attrs={"coefficients": REQUIRED, "intercepts": None, "targets": 1, "post_transform": "NONE"}, domain=DOMAIN,
))  # fmt: skip


def _classes(attrs: Mapping[str, Any]) -> int:
    """How many rows of coefficients there are: one for two classes, or one for each."""
    labels = len(class_labels(attrs, "classlabels_ints"))
    given = len(floats_of(attrs, "intercepts"))
    return given if given else labels


def _classifier_infer(n: Inference) -> list[Type]:
    labels, count, rows = class_labels(n.attrs, "classlabels_ints"), _classes(n.attrs), rows_of(n.type(0))
    _check_features(n, _coefficients(n.attrs, count).shape[1])
    if count not in (1, len(labels)) or (count == 1 and len(labels) != 2):
        raise n.error(f"{count} scores for {len(labels)} labels")
    return [label_type(labels, rows), TensorType(f32, (rows, len(labels)))]


def _classifier_eval(x: Array, **attrs: Any) -> tuple[Array, Array]:
    labels, count, transform = label_array(class_labels(attrs, "classlabels_ints")), _classes(attrs), attrs["post_transform"]
    scores = row_array(x).astype(np.float32) @ _coefficients(attrs, count).T
    if attrs["intercepts"]:
        scores = scores + floats_of(attrs, "intercepts")
    if count > 1:
        return labels[np.argmax(scores, axis=1)], np.asarray(transformed_scores(scores, transform), np.float32)
    score = scores[:, 0]
    pair = np.stack([-score if transform == "LOGISTIC" else 1 - score, score], 1)
    if transform in ("LOGISTIC", "PROBIT"):
        pair = transformed_scores(pair, transform)
    return labels[(score > 0).astype(np.int64)], np.asarray(pair, np.float32)


def _classifier_expand(b: Builder, node: Node) -> Sequence[Value]:
    labels, count, transform = class_labels(node.attrs, "classlabels_ints"), _classes(node.attrs), node.attrs["post_transform"]
    x = required(node, 0)
    scores = _products(b, x, _coefficients(node.attrs, count), floats_of(node.attrs, "intercepts"))
    if count > 1:
        places = b.op("ArgMax", scores, axis=1, keepdims=0)
        return [labelled(b, places, labels), transformed(b, scores, transform)][: len(node.outputs)]
    pair = paired(b, scores, transform, one_minus=True)
    return [labelled(b, is_above(b, scores, 0), labels), pair][: len(node.outputs)]


register(OpDef(
    "LinearClassifier", Kind.EXPAND, infer=_classifier_infer, eval=_classifier_eval, expand=_classifier_expand,
    refuse=refuse_rows, domain=DOMAIN,
    attrs={"coefficients": REQUIRED, "intercepts": None, "classlabels_ints": None, "classlabels_strings": None, "multi_class": 0,
           "post_transform": "NONE"},
))  # fmt: skip


# -- SVMRegressor, SVMClassifier


class Kernel(NamedTuple):
    """How rows are compared with support vectors; vectors [S, F]."""

    type: str
    gamma: float
    offset: float
    degree: float
    vectors: Array


def _kernel(attrs: Mapping[str, Any], count: int) -> Kernel:
    gamma, offset, degree = (*(attrs["kernel_params"] or ()), 0.0, 0.0, 0.0)[:3]
    vectors = floats_of(attrs, "support_vectors")
    if count < 1 or vectors.size % count or attrs["kernel_type"] not in ("LINEAR", "POLY", "RBF", "SIGMOID"):
        raise ValueError(f"{vectors.size} numbers for {count} support vectors, kernel {attrs['kernel_type']}")
    return Kernel(attrs["kernel_type"], float(gamma), float(offset), float(degree), vectors.reshape(count, -1))


def _similarity_eval(x: Array, kernel: Kernel) -> Array:
    """Each row of x with each support vector."""
    if kernel.type == "RBF":
        return np.asarray([[np.exp(-kernel.gamma * np.sum((row - v) ** 2)) for v in kernel.vectors] for row in x], x.dtype)
    dots = x @ kernel.vectors.T
    if kernel.type == "LINEAR":
        return np.asarray(dots)
    scaled = kernel.gamma * dots + kernel.offset
    return np.asarray(np.tanh(scaled) if kernel.type == "SIGMOID" else scaled**kernel.degree)


def _similarity(b: Builder, x: Value, kernel: Kernel) -> Value:
    x = as_type(b, as_rows(b, x), f32)
    if kernel.type == "RBF":  # by differences: the products of large features would cancel
        apart = b.op("Sub", b.op("Unsqueeze", x, axes_of(b, [1])), b.constant(kernel.vectors[None]))
        squares = b.op("ReduceSum", b.op("Mul", apart, apart), axes_of(b, [2]), keepdims=0)
        return b.op("Exp", b.op("Mul", squares, b.scalar(-kernel.gamma, squares)))
    dots = b.op("MatMul", x, b.constant(np.ascontiguousarray(kernel.vectors.T)))
    if kernel.type == "LINEAR":
        return dots
    scaled = b.op("Add", b.op("Mul", dots, b.scalar(kernel.gamma, dots)), b.scalar(kernel.offset, dots))
    return b.op("Tanh", scaled) if kernel.type == "SIGMOID" else b.op("Pow", scaled, b.scalar(kernel.degree, scaled))


def _machine_infer(n: Inference) -> list[Type]:
    _machine_parts(n.attrs)
    return [TensorType(f32, (rows_of(n.type(0)), 1))]


def _machine_parts(attrs: Mapping[str, Any]) -> tuple[Kernel | None, Array, Array]:
    """Kernel (None for a linear machine), coefficients and offset of an SVMRegressor."""
    count = int(attrs["n_supports"])
    coefficients, rho = floats_of(attrs, "coefficients"), floats_of(attrs, "rho")[:1]
    if count and len(coefficients) != count:
        raise ValueError(f"{len(coefficients)} coefficients for {count} support vectors")
    return _kernel(attrs, count) if count else None, coefficients, rho


def _machine_eval(x: Array, **attrs: Any) -> Array:
    kernel, coefficients, rho = _machine_parts(attrs)
    rows = row_array(x).astype(np.float32)
    scores = (rows if kernel is None else _similarity_eval(rows, kernel)) @ coefficients[:, None] + rho.sum()
    return np.asarray(np.where(scores > 0, 1, -1) if attrs["one_class"] else scores, np.float32)


def _machine_expand(b: Builder, node: Node) -> Sequence[Value]:
    kernel, coefficients, rho = _machine_parts(node.attrs)
    x = required(node, 0)
    similar = as_type(b, as_rows(b, x), f32) if kernel is None else _similarity(b, x, kernel)
    scores = b.op("Add", b.op("MatMul", similar, b.constant(coefficients[:, None])), b.scalar(float(rho.sum()), similar))
    if node.attrs["one_class"]:
        scores = b.op("Where", b.op("Greater", scores, b.scalar(0, scores)), b.scalar(1, scores), b.scalar(-1, scores))
    return [scores]


register(OpDef(
    "SVMRegressor", Kind.EXPAND, infer=_machine_infer, eval=_machine_eval, expand=_machine_expand, refuse=refuse_rows,
    attrs={"coefficients": REQUIRED, "kernel_params": None, "kernel_type": "LINEAR", "n_supports": 0, "one_class": 0,
           "post_transform": "NONE", "rho": REQUIRED, "support_vectors": None}, domain=DOMAIN,
))  # fmt: skip


class Machines(NamedTuple):
    """One machine for each pair of classes, in order (0, 1), (0, 2), ...: their decisions are similarity @ weights + rho.

    kernel: None for linear models, one for each class, which are compared with each other instead.
    """

    kernel: Kernel | None
    weights: Array
    rho: Array
    classes: int
    chances: tuple[Array, Array] | None


def _machines(attrs: Mapping[str, Any]) -> Machines:
    labels, sizes = class_labels(attrs, "classlabels_ints"), [int(v) for v in attrs["vectors_per_class"] or ()]
    coefficients, rho = floats_of(attrs, "coefficients"), floats_of(attrs, "rho")
    if not sum(sizes):
        rows = _coefficients(attrs, len(labels))
        return Machines(None, np.ascontiguousarray(rows.T), rho[:1], len(labels), None)
    classes, total = len(sizes), sum(sizes)
    pairs = list(combinations(range(classes), 2))
    if classes < 2 or len(labels) != classes or len(rho) != len(pairs) or coefficients.size != total * (classes - 1):
        raise ValueError(f"{classes} classes, {len(labels)} labels, {len(rho)} offsets, {coefficients.size} coefficients")
    start = np.concatenate([[0], np.cumsum(sizes)])
    table = coefficients.reshape(classes - 1, total)
    weights = np.zeros((total, len(pairs)), np.float32)
    for p, (i, j) in enumerate(pairs):
        weights[start[i] : start[i + 1], p] = table[j - 1, start[i] : start[i + 1]]
        weights[start[j] : start[j + 1], p] = table[i, start[j] : start[j + 1]]
    chances = (floats_of(attrs, "prob_a"), floats_of(attrs, "prob_b"))
    if len(chances[0]) not in (0, len(pairs)) or len(chances[1]) != len(chances[0]):
        raise ValueError("prob_a and prob_b need a number for each pair of classes")
    return Machines(_kernel(attrs, total), weights, rho, classes, chances if len(chances[0]) else None)


def _score_columns(machines: Machines) -> int:
    if machines.kernel is None or machines.chances is not None or machines.classes == 2:
        return machines.classes
    return int(machines.weights.shape[1])


def _votes_infer(n: Inference) -> list[Type]:
    machines, rows = _machines(n.attrs), rows_of(n.type(0))
    return [label_type(class_labels(n.attrs, "classlabels_ints"), rows), TensorType(f32, (rows, _score_columns(machines)))]


def _votes_eval(x: Array, **attrs: Any) -> tuple[Array, Array]:
    machines, transform = _machines(attrs), attrs["post_transform"]
    labels = label_array(class_labels(attrs, "classlabels_ints"))
    rows = row_array(x).astype(np.float32)
    if machines.kernel is None:
        scores = rows @ machines.weights + machines.rho.sum()
        return labels[np.argmax(scores, axis=1)], np.asarray(transformed_scores(scores, transform), np.float32)
    decisions = _similarity_eval(rows, machines.kernel) @ machines.weights + machines.rho
    votes = np.zeros((len(rows), machines.classes), np.int64)
    for p, (i, j) in enumerate(combinations(range(machines.classes), 2)):
        votes[:, i] += decisions[:, p] > 0
        votes[:, j] += decisions[:, p] <= 0
    found = labels[np.argmax(votes, axis=1)]
    if machines.chances is not None:
        return found, _couple_eval(decisions, *machines.chances, classes=machines.classes)
    if machines.classes > 2:
        return found, np.asarray(transformed_scores(decisions, transform), np.float32)
    if transform in ("NONE", "LOGISTIC", "PROBIT"):
        return found, np.asarray(transformed_scores(np.concatenate([-decisions, decisions], 1), transform), np.float32)
    return found, np.asarray(np.concatenate([1 - decisions, decisions], 1), np.float32)


def _votes_expand(b: Builder, node: Node) -> Sequence[Value]:
    machines, transform = _machines(node.attrs), node.attrs["post_transform"]
    labels = class_labels(node.attrs, "classlabels_ints")
    x = required(node, 0)
    similar = as_type(b, as_rows(b, x), f32) if machines.kernel is None else _similarity(b, x, machines.kernel)
    decisions = b.op("MatMul", similar, b.constant(machines.weights))
    decisions = b.op("Add", decisions, b.constant(machines.rho if machines.rho.size else np.zeros(1, np.float32)))
    if machines.kernel is None:
        places = b.op("ArgMax", decisions, axis=1, keepdims=0)
        return [labelled(b, places, labels), transformed(b, decisions, transform)][: len(node.outputs)]
    ballots = np.zeros((machines.weights.shape[1], machines.classes), np.float32)
    against = np.zeros(machines.classes, np.float32)
    for p, (i, j) in enumerate(combinations(range(machines.classes), 2)):
        ballots[p, i], ballots[p, j] = 1, -1
        against[j] += 1
    above = as_type(b, b.op("Greater", decisions, b.scalar(0, decisions)), f32)
    votes = b.op("Add", b.op("MatMul", above, b.constant(ballots)), b.constant(against))
    found = labelled(b, b.op("ArgMax", votes, axis=1, keepdims=0), labels)
    if machines.chances is not None:
        chances = [b.constant(a) for a in machines.chances]
        scores = b.op("CoupledChances", decisions, *chances, domain="minicc", classes=machines.classes)
    elif machines.classes > 2:
        scores = transformed(b, decisions, transform)
    else:
        scores = paired(b, decisions, transform, one_minus=transform in ("SOFTMAX", "SOFTMAX_ZERO"))
    return [found, scores][: len(node.outputs)]


register(OpDef(
    "SVMClassifier", Kind.EXPAND, infer=_votes_infer, eval=_votes_eval, expand=_votes_expand, refuse=refuse_rows,
    attrs={"classlabels_ints": None, "classlabels_strings": None, "coefficients": REQUIRED, "kernel_params": None,
           "kernel_type": "LINEAR", "post_transform": "NONE", "prob_a": None, "prob_b": None, "rho": REQUIRED,
           "support_vectors": None, "vectors_per_class": None}, domain=DOMAIN,
))  # fmt: skip


# -- minicc.CoupledChances(decisions [N, pairs], a, b) -> [N, classes]


def _couple_infer(n: Inference) -> list[Type]:
    return [TensorType(f32, (n.shape(0)[0], int(n.attr("classes"))))]


def _couple_eval(decisions: Array, a: Array, b: Array, *, classes: int) -> Array:
    """Chances of classes from those of pairs, which are 1 / (1 + exp(a d + b)); rows go on until each has converged."""
    with np.errstate(over="ignore"):
        chance = np.clip(1 / (1 + np.exp(decisions.astype(np.float64) * a + b)), 1e-7, 1 - 1e-7)
    r = np.zeros((len(decisions), classes, classes))
    for p, (i, j) in enumerate(combinations(range(classes), 2)):
        r[:, i, j], r[:, j, i] = chance[:, p], 1 - chance[:, p]
    q = -r.transpose(0, 2, 1) * r
    diagonal = np.arange(classes)
    q[:, diagonal, diagonal] = np.sum(r * r, axis=1)
    found = np.full((len(decisions), classes), 1 / classes)
    qp = np.einsum("nij,nj->ni", q, found)
    pqp = np.sum(found * qp, axis=1)
    for _ in range(max(100, classes)):
        going = np.abs(qp - pqp[:, None]).max(axis=1, initial=0) >= 0.005 / classes
        if not going.any():
            break
        for t in range(classes):
            change = np.where(going, (pqp - qp[:, t]) / q[:, t, t], 0)
            found[:, t] += change
            scale = 1 + change
            pqp = (pqp + change * (change * q[:, t, t] + 2 * qp[:, t])) / scale / scale
            qp = (qp + change[:, None] * q[:, t]) / scale[:, None]
            found /= scale[:, None]
    return found.astype(np.float32)


register(OpDef("CoupledChances", Kind.HOST, infer=_couple_infer, eval=_couple_eval, attrs={"classes": REQUIRED}, domain="minicc"))
