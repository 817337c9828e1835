"""sink-transposes: transposes move towards the outputs, meet their inverses and vanish.

    f(T(x), T(y)) = T(f(x, y))          f pointwise; constants are permuted once, at compile time
    reduce(T(x), axes) = T(reduce(x, perm[axes])), and so for Concat, Split, Pad, Slice, Resize, Quantize
    reshape(T(x)) = T'(reshape'(x))      when merged axes are neighbours in x
    T'(reshape(T(x))) = reshape'(T"(x))  when split axes stay neighbours (a channel shuffle)
    T(T(x)) = one transpose, or nothing

Each rule moves a transpose strictly downstream, so the pass ends. A transpose that only moves axes of size 1 is free;
to sink a real one, free ones may be put on the other operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minicc.ir.dims import Dim
from minicc.ir.graph import Graph, Node, Value, object_array
from minicc.ir.opdef import Content, Kind
from minicc.ir.types import TensorType
from minicc.passes.common import RESHAPES, estimate, visit_bodies
from minicc.passes.manager import PassContext

Perm = tuple[int, ...]


def sink_transposes(graph: Graph, context: PassContext) -> int:
    """Sink and cancel to a fixpoint, also in bodies of control flow; returns the number of rewrites."""
    changes = visit_bodies(graph, lambda body: sink_transposes(body, context))
    again = True
    while again:
        again = False
        for node in list(graph.nodes):
            if not any(v.uses or v in graph.outputs for v in node.outputs):
                continue
            if _rewrite(graph, node):
                changes += 1
                again = True
        graph.tidy()
    return changes


def _ranked(value: Value | None) -> bool:
    return value is None or not isinstance(value.type, TensorType) or value.type.shape is not None


def _rewrite(graph: Graph, node: Node) -> bool:
    if node.symbols or not all(_ranked(v) for v in (*node.inputs, *node.outputs)):
        return False  # sizes that this very node makes known would lose their origin
    if node.op.domain:
        return node.op.kind is Kind.POINTWISE and _pointwise(graph, node)
    if node.op.name == "Transpose":
        return _merge(graph, node)
    rule = _RULES.get(node.op.name)
    if rule is not None:
        perm = _perm_of(node.inputs[0])
        return perm is not None and rule(graph, node, perm)
    if node.op.kind is Kind.POINTWISE and len(node.outputs) == 1:
        return _pointwise(graph, node)
    return False


def _perm_of(value: Value | None) -> Perm | None:
    """The permutation when a value is a transpose, else None."""
    node = value.producer if value is not None else None
    if node is None or node.op.domain or node.op.name != "Transpose":
        return None
    perm = node.attrs["perm"]
    return tuple(perm) if perm else tuple(reversed(range(len(node.output.shape))))


def _source(value: Value | None) -> Value:
    """What a transposed value is the transpose of."""
    assert value is not None and value.producer is not None
    source = value.producer.inputs[0]
    assert source is not None
    return source


def inverse(perm: Sequence[int]) -> Perm:
    """The permutation that undoes another."""
    out = [0] * len(perm)
    for i, p in enumerate(perm):
        out[p] = i
    return tuple(out)


def is_free(perm: Sequence[int], shape: Sequence[Dim]) -> bool:
    """Whether permuting a value of `shape` keeps the order of its elements in memory."""
    moved = [p for p in perm if shape[p] != 1]
    return moved == sorted(moved)


def _finish(graph: Graph, node: Node, output: Value, result: Value, perm: Sequence[int]) -> None:
    """Put the transpose after the new op and let readers of the old output read it."""
    if list(perm) == sorted(perm):
        graph.replace(output, result)
        return
    back = graph.add("Transpose", [result], {"perm": tuple(perm)}, origin=node.origin, names=[output.name])
    graph.replace(output, back.output)


# -- transposes themselves


def _merge(graph: Graph, node: Node) -> bool:
    own = _perm_of(node.output)
    assert own is not None
    if list(own) == sorted(own):
        source = node.inputs[0]
        assert source is not None
        graph.replace(node.output, source)
        return True
    inner = _perm_of(node.inputs[0])
    if inner is None:
        return _merge_across_reshape(graph, node, own)
    _finish(graph, node, node.output, _source(node.inputs[0]), tuple(inner[p] for p in own))
    return True


def _merge_across_reshape(graph: Graph, node: Node, own: Perm) -> bool:
    """T(reshape(T(x))), a channel shuffle: the outer transpose moves first when axes the reshape made stay neighbours."""
    value = node.inputs[0]
    reshape = value.producer if value is not None else None
    if value is None or reshape is None or reshape.op.name not in RESHAPES or reshape.op.domain or reshape.symbols:
        return False
    source = reshape.inputs[0]
    if _perm_of(source) is None or source is None or len(value.uses) != 1 or value in graph.outputs:
        return False
    groups = axis_groups(source.shape, value.shape)
    if groups is None:
        return False
    order = []
    for group, (_, made) in enumerate(groups):
        places = [own.index(a) for a in made]
        if places and places != list(range(places[0], places[0] + len(places))):
            return False
        order.append((places[0] if places else -1, group))
    perm = tuple(a for _, group in sorted(order) for a in groups[group][0])
    moved = graph.add("Transpose", [source], {"perm": perm}, origin=node.origin).output
    shape = [value.shape[a] for a in own]
    result = graph.add("Reshape", [moved, _shape_value(graph, shape)], {"allowzero": 1}, origin=node.origin,
                       names=[node.output.name])  # fmt: skip
    graph.replace(node.output, result.output)
    return True


# -- pointwise ops


def _pointwise(graph: Graph, node: Node) -> bool:
    if not isinstance(node.output.type, TensorType) or node.output.type.shape is None:
        return False
    rank = len(node.output.type.shape)
    perms = [_perm_of(v) for v in node.inputs]
    real = [p for p, v in zip(perms, node.inputs) if p is not None and v is not None and len(p) == rank
            and not is_free(p, _source(v).shape)]  # fmt: skip
    candidates = list(dict.fromkeys(real)) or list(dict.fromkeys(p for p in perms if p is not None and len(p) == rank))
    for perm in candidates:
        inputs = [_unpermuted(graph, v, perm, bool(real)) for v in node.inputs]
        if all(ok for ok, _ in inputs):
            new = graph.add(node.op, [v for _, v in inputs], node.attrs, origin=node.origin)
            _finish(graph, node, node.output, new.output, perm)
            return True
    return False


def _unpermuted(graph: Graph, value: Value | None, perm: Perm, may_insert: bool) -> tuple[bool, Value | None]:
    """(whether it can be had cheaply, the operand before the transpose `perm`)."""
    if value is None:
        return True, None
    if not isinstance(value.type, TensorType) or value.type.shape is None:
        return False, None
    if _perm_of(value) == perm:
        return True, _source(value)
    shape = value.type.shape
    if all(d == 1 for d in shape):
        return True, value
    back = inverse(perm)
    if value.data is not None:
        full = value.data.reshape((1,) * (len(perm) - value.data.ndim) + value.data.shape)
        return True, graph.constant(np.ascontiguousarray(full.transpose(back)), value.name)
    if may_insert and len(shape) == len(perm) and is_free(back, shape):
        return True, graph.add("Transpose", [value], {"perm": back}).output
    return False, None


# -- ops with axes


def _reduce(graph: Graph, node: Node, perm: Perm) -> bool:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    numbers = _integers(axes)
    if axes is not None and numbers is None:
        return False
    rank = len(perm)
    if not numbers:
        if node.attrs.get("noop_with_empty_axes"):
            return False
        numbers = list(range(rank))
    outer = [a % rank for a in numbers]
    moved = sorted(perm[a] for a in outer)
    new = graph.add(node.op, [_source(node.inputs[0]), graph.constant(np.array(moved, dtype=np.int64))], node.attrs,
                    origin=node.origin)  # fmt: skip
    if node.attrs.get("keepdims", 1):
        _finish(graph, node, node.output, new.output, perm)
    else:
        left = [perm[a] for a in range(rank) if a not in outer]  # axes of the source, in output order
        order = sorted(left)
        _finish(graph, node, node.output, new.output, tuple(order.index(a) for a in left))
    return True


def _concat(graph: Graph, node: Node, perm: Perm) -> bool:
    inputs: list[Value] = []
    for value in node.inputs:
        ok, source = _unpermuted(graph, value, perm, False)
        if not ok or source is None or len(source.shape) != len(perm):
            return False
        inputs.append(source)
    axis = perm[node.attrs["axis"] % len(perm)]
    new = graph.add(node.op, inputs, {**node.attrs, "axis": axis}, origin=node.origin)
    _finish(graph, node, node.output, new.output, perm)
    return True


def _split(graph: Graph, node: Node, perm: Perm) -> bool:
    axis = perm[node.attrs["axis"] % len(perm)]
    new = graph.add(node.op, [_source(node.inputs[0]), *node.inputs[1:]], {**node.attrs, "axis": axis},
                    origin=node.origin, outputs=len(node.outputs))  # fmt: skip
    for old, result in zip(node.outputs, new.outputs):
        _finish(graph, node, old, result, perm)
    return True


def _with_axes_input(position: int, implied: Callable[[Node], int | None]) -> Callable[[Graph, Node, Perm], bool]:
    """A rule for ops whose per-axis operands name their axes in input `position`; left out, they are the first ones."""

    def rule(graph: Graph, node: Node, perm: Perm) -> bool:
        axes = node.inputs[position] if len(node.inputs) > position else None
        if axes is None:
            count = implied(node)
            if count is None:
                return False
            numbers = list(range(count))
        else:
            known = _integers(axes)
            if known is None:
                return False
            numbers = [a % len(perm) for a in known]
        inputs = list(node.inputs) + [None] * (position + 1 - len(node.inputs))
        inputs[0] = _source(node.inputs[0])
        inputs[position] = graph.constant(np.array([perm[a] for a in numbers], dtype=np.int64))
        new = graph.add(node.op, inputs, node.attrs, origin=node.origin)
        _finish(graph, node, node.output, new.output, perm)
        return True

    return rule


def _length(position: int, divisor: int = 1) -> Callable[[Node], int | None]:
    def implied(node: Node) -> int | None:
        value = node.inputs[position]
        size = value.tensor.size if value is not None and value.tensor.shape is not None else None
        return size // divisor if isinstance(size, int) else None

    return implied


def _resize(graph: Graph, node: Node, perm: Perm) -> bool:
    x = node.inputs[0]
    assert x is not None
    # A transpose of something larger is worth it only where it vanishes.
    vanishes = all(c.op.name == "Transpose" for c in node.output.consumers()) and node.output not in graph.outputs
    if not vanishes and estimate(node.output.shape) > estimate(x.shape):
        return False
    axes = node.attrs.get("axes")
    named = [a % len(perm) for a in axes] if axes else list(range(len(perm)))
    order = sorted(range(len(named)), key=lambda i: perm[named[i]])
    inputs = [_source(node.inputs[0])]
    for position, value in enumerate(node.inputs[1:], start=1):
        if value is None or value.tensor.size == 0:
            inputs.append(value)  # type: ignore[arg-type]
            continue
        if value.content is None:
            return False
        double = [*order, *(len(named) + i for i in order)] if position == 1 else order
        inputs.append(_reordered(graph, value, double))
    attrs: dict[str, Any] = dict(node.attrs)
    if axes:
        attrs["axes"] = tuple(perm[named[i]] for i in order)
    new = graph.add(node.op, inputs, attrs, origin=node.origin)
    _finish(graph, node, node.output, new.output, perm)
    return True


def _reordered(graph: Graph, value: Value, order: Sequence[int]) -> Value:
    if value.data is not None:
        return graph.constant(value.data[list(order)])
    content = value.content
    assert content is not None
    picked: Content = object_array([content[i] for i in order])
    return graph.symbolic_constant(picked, value.tensor)


def _quantize(graph: Graph, node: Node, perm: Perm) -> bool:
    scale = node.inputs[1]
    if scale is None or scale.tensor.shape is None or len(scale.tensor.shape) > 1 or node.attrs.get("block_size"):
        return False
    attrs = dict(node.attrs)
    if len(scale.tensor.shape) == 1 and "axis" in attrs:
        attrs["axis"] = perm[attrs["axis"] % len(perm)]
    new = graph.add(node.op, [_source(node.inputs[0]), *node.inputs[1:]], attrs, origin=node.origin)
    _finish(graph, node, node.output, new.output, perm)
    return True


# -- reshapes


def _reshape(graph: Graph, node: Node, perm: Perm) -> bool:
    """Reshape (any op of the family) after a transpose: regroup first when merged axes are neighbours in the source."""
    source = _source(node.inputs[0])
    if not isinstance(node.output.type, TensorType) or node.output.type.shape is None:
        return False
    outer, new_shape = [source.shape[p] for p in perm], list(node.output.type.shape)
    if is_free(perm, source.shape):
        result = graph.add("Reshape", [source, _shape_value(graph, new_shape)], {"allowzero": 1}, origin=node.origin)
        graph.replace(node.output, result.output)
        return True
    groups = axis_groups(outer, new_shape)
    if groups is None:
        return False
    blocks = [([perm[a] for a in old_axes], new_axes) for old_axes, new_axes in groups]
    blocks.sort(key=lambda block: min((a for a in block[0] if source.shape[a] != 1), default=-1))
    inner = tuple(a for mine, _ in blocks for a in mine)  # what has to happen before axes merge; often nothing
    axes = [a for _, made in blocks for a in made]  # axes of the result, in the order of the regrouped source
    outer_perm = tuple(axes.index(a) for a in range(len(new_shape)))
    if outer_perm == tuple(range(len(new_shape))):
        return False  # the whole transpose is needed before the reshape
    if not is_free(inner, source.shape):
        return False  # it would take a second transpose; _merge_across_reshape would take it back
    shape = _shape_value(graph, [new_shape[a] for a in axes])
    regrouped = graph.add("Reshape", [source, shape], {"allowzero": 1}, origin=node.origin)
    _finish(graph, node, node.output, regrouped.output, outer_perm)
    return True


def _shape_value(graph: Graph, shape: Sequence[Dim]) -> Value:
    return graph.symbolic_constant(object_array(list(shape)))


def axis_groups(old: Sequence[Dim], new: Sequence[Dim]) -> list[tuple[list[int], list[int]]] | None:
    """Shortest groups of neighbouring axes with equal products, from the left; None when they do not match up.

    Axes of size 1 join the group before them.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        mine: list[int] = []
        theirs: list[int] = []
        a: Dim = 1
        b: Dim = 1
        while not mine or not theirs or a != b:
            if i < len(old) and (not mine or ((b != a and _smaller(a, b, old[i])) or j >= len(new))):
                a = a * old[i]
                mine.append(i)
                i += 1
            elif j < len(new):
                b = b * new[j]
                theirs.append(j)
                j += 1
            else:
                return None
            if i >= len(old) and j >= len(new):
                break
        if a != b:
            return None
        while i < len(old) and old[i] == 1:
            mine.append(i)
            i += 1
        while j < len(new) and new[j] == 1:
            theirs.append(j)
            j += 1
        groups.append((mine, theirs))
    return groups


def _smaller(a: Dim, b: Dim, size: Dim) -> bool:
    """Whether the old side should grow: it is behind, or its next axis completes the match."""
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    return a * size == b


def _integers(value: Value | None) -> list[int] | None:
    if value is None or value.content is None or not all(isinstance(v, int) for v in value.content.flat):
        return None
    return [int(v) for v in value.content.flat]


_RULES: dict[str, Callable[[Graph, Node, Perm], bool]] = {
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"), _reduce),
    "Concat": _concat,
    "Split": _split,
    "Pad": _with_axes_input(3, _length(1, 2)),
    "Slice": _with_axes_input(3, _length(1)),
    "Resize": _resize,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _quantize,
    **dict.fromkeys(RESHAPES, _reshape),
}
