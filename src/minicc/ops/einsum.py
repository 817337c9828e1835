"""Einsum, rewritten into transpositions, matrix products, multiplications and sums.

Operands are contracted from left to right; no order of contraction is searched. Equations that name a label
twice in one operand (diagonals) run on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minicc.errors import ShapeError
from minicc.ir.dims import Dim, broadcast, product
from minicc.ir.opdef import REQUIRED, Inference, Kind, OpDef, register
from minicc.ir.types import TensorType
from minicc.ops.helpers import Array, computed_in_f32, default_refuse, require_same_dtype

if TYPE_CHECKING:
    from minicc.ir.graph import Builder, Node, Value


@dataclass(frozen=True)
class Equation:
    """Labels of every operand and of the output; an ellipsis became labels "0", "1", ... numbered from the
    right.
    """

    operands: tuple[tuple[str, ...], ...]
    output: tuple[str, ...]


def parse(equation: str, ranks: Sequence[int]) -> Equation:
    """The labels of an equation for operands of the given ranks. Raises ShapeError when it does not fit."""
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise ShapeError(f"Einsum equation {equation!r} has {len(terms)} operands, {len(ranks)} are given")
    covered = [rank - len(t.replace("...", "")) if "..." in t else 0 for t, rank in zip(terms, ranks)]
    widest = max(covered, default=0)
    operands = tuple(_labels(term, n, equation) for term, n in zip(terms, covered))
    for labels, rank in zip(operands, ranks):
        if len(labels) != rank:
            raise ShapeError(
                f"Einsum equation {equation!r} gives {len(labels)} labels to an operand of rank {rank}"
            )
    used = [label for labels in operands for label in labels]
    if arrow:
        output = _labels(right, widest if "..." in right else 0, equation)
    else:
        letters = sorted({label for label in used if label.isalpha() and used.count(label) == 1})
        output = (*_labels("..." if any("..." in t for t in terms) else "", widest, equation), *letters)
    if len(set(output)) < len(output) or not set(output) <= set(used):
        raise ShapeError(
            f"Einsum equation {equation!r} has an output label that is repeated or in no operand"
        )
    return Equation(operands, output)


def _labels(term: str, covered: int, equation: str) -> tuple[str, ...]:
    before, dots, after = term.partition("...")
    if covered < 0 or (not (before + after).isalpha() and before + after):
        raise ShapeError(
            f"Einsum equation {equation!r} is malformed or does not fit the ranks of its operands"
        )
    return (*before, *(str(i) for i in reversed(range(covered)) if dots), *after)


def _sizes(equation: Equation, shapes: Sequence[Sequence[Dim]]) -> dict[str, Dim]:
    sizes: dict[str, Dim] = {}
    for labels, shape in zip(equation.operands, shapes):
        for label, size in zip(labels, shape):
            sizes[label] = broadcast(sizes.get(label, 1), size)
    return sizes


def _infer(n: Inference) -> list[TensorType]:
    shapes = [n.shape(i) for i in range(len(n.inputs))]
    try:
        equation = parse(n.attr("equation"), [len(s) for s in shapes])
        sizes = _sizes(equation, shapes)
    except ShapeError as error:
        raise n.error(error.what) from error
    return [TensorType(require_same_dtype(n), tuple(sizes[label] for label in equation.output))]


def _refuse(node: Node) -> str | None:
    reason = default_refuse(node)
    if reason is not None:
        return reason
    shapes = [v.shape for v in node.inputs if v is not None]
    equation = parse(node.attrs["equation"], [len(s) for s in shapes])
    sizes: dict[str, Dim] = {}
    for labels, shape in zip(equation.operands, shapes):
        if len(set(labels)) < len(labels):
            return "Einsum over a diagonal (a label twice in one operand)"
        for label, size in zip(labels, shape):
            other = size if label in equation.output else sizes.setdefault(label, size)
            if other != size and 1 in (size, other):
                return "Einsum that sums over a broadcast size"
    return None


@dataclass
class _Term:
    """An intermediate tensor and the labels of its axes."""

    value: Value
    labels: tuple[str, ...]

    def size(self, label: str) -> Dim:
        return self.value.shape[self.labels.index(label)]


def _arranged(b: Builder, term: _Term, labels: Sequence[str]) -> Value:
    """The term with its axes in the order of `labels`, which are its own."""
    perm = [term.labels.index(label) for label in labels]
    return term.value if perm == sorted(perm) else b.op("Transpose", term.value, perm=perm)


def _without(b: Builder, term: _Term, wanted: set[str]) -> _Term:
    """The term summed over the labels that are not wanted."""
    axes = [i for i, label in enumerate(term.labels) if label not in wanted]
    if not axes:
        return term
    value = b.op("ReduceSum", term.value, b.constant(np.array(axes, dtype=np.int64)), keepdims=0)
    return _Term(value, tuple(label for label in term.labels if label in wanted))


def _reshaped(b: Builder, x: Value, shape: Sequence[Dim]) -> Value:
    return x if tuple(shape) == x.shape else b.op("Reshape", x, b.shape(shape))


def _multiplied(b: Builder, x: _Term, y: _Term) -> _Term:
    """The outer or element-wise product: nothing is summed."""
    labels = x.labels + tuple(label for label in y.labels if label not in x.labels)
    left = _reshaped(b, x.value, [x.size(label) if label in x.labels else 1 for label in labels])
    order = [label for label in labels if label in y.labels]
    right = _reshaped(
        b, _arranged(b, y, order), [y.size(label) if label in y.labels else 1 for label in labels]
    )
    return _Term(b.op("Mul", left, right), labels)


def _contracted(b: Builder, x: _Term, y: _Term, wanted: set[str]) -> _Term:
    """The product of two terms, summed over their common labels that are not wanted."""
    common = [label for label in x.labels if label in y.labels]
    inner = [label for label in common if label not in wanted]
    if not inner:
        return _multiplied(b, x, y)
    batch = [label for label in common if label in wanted]
    rows = [label for label in x.labels if label not in common]
    columns = [label for label in y.labels if label not in common]
    depth = product(x.size(label) for label in inner)
    left_batch, right_batch = [x.size(label) for label in batch], [y.size(label) for label in batch]
    out_batch = [broadcast(p, q) for p, q in zip(left_batch, right_batch)]
    if len(batch) > 2 and left_batch == right_batch:  # one batch axis serves products better than many
        left_batch = right_batch = [product(left_batch)]
    row_sizes, column_sizes = [x.size(label) for label in rows], [y.size(label) for label in columns]
    left = _reshaped(b, _arranged(b, x, batch + rows + inner), [*left_batch, product(row_sizes), depth])
    right = _reshaped(
        b, _arranged(b, y, batch + inner + columns), [*right_batch, depth, product(column_sizes)]
    )
    out = _reshaped(b, b.op("MatMul", left, right), [*out_batch, *row_sizes, *column_sizes])
    return _Term(out, tuple(batch + rows + columns))


def _expand(b: Builder, node: Node) -> list[Value]:
    inputs = [v for v in node.inputs if v is not None]
    equation = parse(node.attrs["equation"], [v.tensor.rank for v in inputs])
    terms = [_Term(v, labels) for v, labels in zip(inputs, equation.operands)]
    current = terms[0]
    for position, term in enumerate(terms):
        later = {label for t in terms[position + 1 :] for label in t.labels} | set(equation.output)
        if position == 0:
            current = _without(b, current, later)
            continue
        term = _without(b, term, later | set(current.labels))
        current = _without(b, _contracted(b, current, term, later), later)
    return [_arranged(b, current, equation.output)]


@computed_in_f32
def _eval(*arrays: Array, equation: str) -> Array:
    optimise: Any = len(arrays) > 1
    return np.asarray(np.einsum(equation.replace(" ", ""), *arrays, optimize=optimise)).astype(
        arrays[0].dtype
    )


EINSUM = register(
    OpDef(
        "Einsum",
        Kind.EXPAND,
        infer=_infer,
        eval=_eval,
        expand=_expand,
        refuse=_refuse,
        attrs={"equation": REQUIRED},
    )
)
