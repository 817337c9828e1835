"""Rules about gathers and scatters whose positions count evenly: they are views, or rows put between others.

Exporters write a mask's `mask[batch, key]` as GatherND over ranges of both axes, and a strided view of an array as Gather of
the flat array at sums of multiples of ranges, x[1:] = y as ScatterND of a range of rows. Here a tensor of positions is
understood where it is affine along its axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minicc.ir.dims import Dim, product
from minicc.ir.graph import Builder, Node, Value
from minicc.ir.rewrite import Result, const, op, refuse, rule, var
from minicc.passes.common import has_shape
from minicc.passes.simplify_views import RESHAPES, reshape_to, sliced

# Nodes that are looked through for one tensor of positions.
MOST_NODES = 64


@dataclass(frozen=True)
class Positions:
    """An integer tensor whose element at `index` is `start + sum(steps[axis] * index[axis])`; axes of size 1 have step 0."""

    start: Dim
    steps: tuple[Dim, ...]


def positions_of(value: Value | None) -> Positions | None:
    """How a value is affine along its axes, or None."""
    return _positions(value, MOST_NODES)


def _positions(value: Value | None, left: int) -> Positions | None:
    if value is None or not has_shape(value) or not value.tensor.dtype.is_integer or left <= 0:
        return None
    if value.data is not None:
        return _of_array(value.data)
    scalar = _scalar(value)
    if scalar is not None:
        return Positions(scalar, (0,) * len(value.shape))
    node = value.producer
    if node is None or node.op.domain or any(v is not None and not has_shape(v) for v in node.inputs):
        return None
    sources = [_positions(v, left // max(1, len(node.inputs)) - 1) for v in node.inputs[: _OPERANDS.get(node.op.name, 0)]]
    if node.op.name == "Range":
        start, _, step = (None if v is None else _scalar(v) for v in node.inputs)
        return None if start is None or step is None else _steps(value.shape, start, [step])
    if not sources or None in sources:
        return None
    found = _RULES[node.op.name](node, [s for s in sources if s is not None])
    return None if found is None else _steps(value.shape, found.start, found.steps)


def _steps(shape: Sequence[Dim], start: Dim, steps: Sequence[Dim]) -> Positions:
    return Positions(start, tuple(0 if size == 1 else step for size, step in zip(shape, steps)))


def _scalar(value: Value) -> Dim | None:
    """The only element of a value, if it is a known integer or size."""
    if value.content is None or value.content.size != 1:
        return None
    item = value.content.reshape(-1)[0]
    return None if isinstance(item, bool | float | np.floating | np.bool_) else item


def _of_array(data: np.ndarray) -> Positions | None:  # type: ignore[type-arg]
    if data.size == 0:
        return None
    start = int(data.reshape(-1)[0])
    steps = [int(np.take(data, 1, axis).reshape(-1)[0]) - start if size > 1 else 0 for axis, size in enumerate(data.shape)]
    line = start + sum((np.arange(size) * step).reshape([-1 if a == axis else 1 for a in range(data.ndim)])
                       for axis, (size, step) in enumerate(zip(data.shape, steps)))  # fmt: skip
    return Positions(start, tuple(steps)) if np.array_equal(np.broadcast_to(line, data.shape), data) else None


def _same(_: Node, sources: Sequence[Positions]) -> Positions | None:
    return sources[0]


def _reshaped(node: Node, sources: Sequence[Positions]) -> Positions | None:
    """Only axes of size 1 come or go."""
    (source,), x, out = sources, node.inputs[0], node.output
    assert x is not None
    if not has_shape(out) or [d for d in x.shape if d != 1] != [d for d in out.shape if d != 1]:
        return None
    steps = iter(step for size, step in zip(x.shape, source.steps) if size != 1)
    return Positions(source.start, tuple(0 if size == 1 else next(steps) for size in out.shape))


def _aligned(node: Node, number: int, source: Positions) -> tuple[Dim, ...] | None:
    """Steps of an operand along the axes of the output, to which it is broadcast."""
    x, out = node.inputs[number], node.output
    assert x is not None
    if not has_shape(out):
        return None
    lead = len(out.shape) - len(x.shape)
    if any(size not in (1, full) for size, full in zip(x.shape, out.shape[lead:])):
        return None  # whether it is broadcast is known at run time
    return (0,) * lead + source.steps


def _expanded(node: Node, sources: Sequence[Positions]) -> Positions | None:
    steps = _aligned(node, 0, sources[0])
    return None if steps is None else Positions(sources[0].start, steps)


def _combined(sign: int) -> Callable[[Node, Sequence[Positions]], Positions | None]:
    def combine(node: Node, sources: Sequence[Positions]) -> Positions | None:
        first, second = (_aligned(node, number, source) for number, source in enumerate(sources))
        if first is None or second is None:
            return None
        return Positions(sources[0].start + sources[1].start * sign, tuple(a + b * sign for a, b in zip(first, second)))

    return combine


def _multiplied(node: Node, sources: Sequence[Positions]) -> Positions | None:
    for number, other in ((0, 1), (1, 0)):
        steps, factor = _aligned(node, number, sources[number]), sources[other]
        if steps is not None and not any(step != 0 for step in factor.steps) and _aligned(node, other, factor) is not None:
            return Positions(sources[number].start * factor.start, tuple(step * factor.start for step in steps))
    return None


def _transposed(node: Node, sources: Sequence[Positions]) -> Positions | None:
    perm = node.attrs["perm"]
    return Positions(sources[0].start, tuple(sources[0].steps[axis] for axis in perm)) if perm else None


_RULES: dict[str, Callable[[Node, Sequence[Positions]], Positions | None]] = {
    **dict.fromkeys(RESHAPES.split(), _reshaped), "Identity": _same, "Expand": _expanded, "Transpose": _transposed,
    "Add": _combined(1), "Sub": _combined(-1), "Mul": _multiplied,
}  # fmt: skip
# How many operands of an op hold positions.
_OPERANDS = {name: 2 if name in ("Add", "Sub", "Mul") else 1 for name in _RULES}


@rule("gather-in-order", op("Gather", name="node"))
def gather_in_order(b: Builder, node: Node) -> Result:
    """Gathering every position of an axis in order, into any shape, is a reshape."""
    x, indices = node.inputs
    if x is None or indices is None or not has_shape(x) or not has_shape(indices):
        return None
    axis = node.attrs["axis"] % len(x.shape)
    if product(indices.shape) != x.shape[axis]:
        return None
    found = positions_of(indices)
    if found is None or found.start != 0:
        return None
    wanted: list[Dim] = []
    step: Dim = 1
    for size in reversed(indices.shape):
        wanted.append(0 if size == 1 else step)
        step = step * size
    if list(found.steps) != wanted[::-1]:
        return None
    return reshape_to(b, x, (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@rule("gather-by-axes", op("GatherND", name="node"))
def gather_by_axes(b: Builder, node: Node) -> Result:
    """GatherND whose columns of positions each count along an axis of the output is a transposed, expanded view."""
    x, indices = node.inputs
    if x is None or indices is None or not has_shape(x) or not has_shape(node.output) or node.attrs["batch_dims"] != 0:
        return None
    columns = _columns(indices)
    if columns is None:
        return None
    axes: list[int] = []
    for column, size in zip(columns, x.shape):
        counted = [axis for axis, step in enumerate(column.steps) if step != 0]
        if column.start != 0 or len(counted) != 1 or column.steps[counted[0]] != 1 or indices.shape[counted[0]] != size:
            return None  # positions that are left out, or outside
        axes += counted
    if len(set(axes)) != len(axes):
        return None
    order = sorted(range(len(axes)), key=axes.__getitem__)
    if order != sorted(order):
        x = b.op("Transpose", x, perm=[*order, *range(len(axes), len(x.shape))])
    lead = tuple(size if axis in axes else 1 for axis, size in enumerate(indices.shape[:-1]))
    view = reshape_to(b, x, (*lead, *x.shape[len(axes) :]))
    return view if view.shape == node.output.shape else b.op("Expand", view, b.shape(list(node.output.shape)))


def _columns(indices: Value) -> list[Positions] | None:
    """The positions along each axis of the data that GatherND's operand holds along its last axis."""
    if indices.data is not None:
        parts = np.split(indices.data, indices.data.shape[-1], -1) if indices.data.shape[-1] else []
        found = [_of_array(part) for part in parts]
    elif has_shape(indices) and indices.shape[-1:] == (1,):
        found = [positions_of(indices)]
    else:
        node = indices.producer
        if node is None or node.op.domain or node.op.name != "Concat" or not has_shape(indices):
            return None
        rank = len(indices.shape)
        if node.attrs["axis"] % rank != rank - 1 or any(v is None or not has_shape(v) or v.shape[-1] != 1 for v in node.inputs):
            return None
        found = [positions_of(v) for v in node.inputs]
    known = [positions for positions in found if positions is not None]
    return known if known and len(known) == len(found) else None


@rule("gather-range", op("Gather", var("x"), const("indices"), name="node"))
def gather_range(b: Builder, x: Value, indices: Value, node: Node) -> Result:
    """Gathering an ascending range of constant positions is a Slice, and so is gathering a single one of several axes."""
    assert indices.data is not None
    if not has_shape(x) or indices.data.ndim > 1 or indices.data.size == 0:
        return None
    axis, places = node.attrs["axis"] % len(x.shape), indices.data.reshape(-1).tolist()
    if len(places) > 1:
        step = places[1] - places[0]
        if step <= 0 or places[0] < 0 or places != list(range(places[0], places[-1] + 1, step)):
            return refuse("the positions are not a range")
        return sliced(b, x, {axis: (places[0], places[-1] + 1, step)})
    size, (place,) = x.shape[axis], places
    if len(x.shape) < 2 or not isinstance(size, int) or not -size <= place < size or not has_shape(node.output):
        return None  # of a vector there is nothing to be read in place
    return reshape_to(b, sliced(b, x, {axis: (place % size, place % size + 1, 1)}), node.output.shape)


@rule("scatter-range", op("ScatterND", var("x"), var("indices"), var("updates"), name="node"))
def scatter_range(b: Builder, x: Value, indices: Value, updates: Value, node: Node) -> Result:
    """Writing over a known range of rows, half of them or more, puts the new rows between the others."""
    if node.attrs["reduction"] != "none" or not all(map(has_shape, (x, indices, updates))):
        return None
    if len(indices.shape) != 2 or indices.shape[1] != 1 or not x.shape:
        return None
    columns, count, size = _columns(indices), indices.shape[0], x.shape[0]
    if columns is None or not isinstance(count, int) or not isinstance(size, int) or 2 * count < size:
        return None
    first, steps = columns[0].start, columns[0].steps
    if not isinstance(first, int) or first < 0 or first + count > size or (count > 1 and steps[0] != 1):
        return None
    parts = [sliced(b, x, {0: (0, first, 1)})] if first else []
    parts.append(updates)
    parts += [sliced(b, x, {0: (first + count, size, 1)})] if first + count < size else []
    return parts[0] if len(parts) == 1 else b.op("Concat", *parts, axis=0)


GATHER_RULES = (gather_in_order, gather_by_axes, gather_range, scatter_range)
