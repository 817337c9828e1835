"""What sizes must satisfy for a node to be computed safely, where inference could not decide.

Kernels trust sizes: a reshape to another number of elements, or operands that do not broadcast, would read
outside of an array. Each requirement is a dimension whose evaluation raises ShapeError when it is not met
(`dims.equal`, `dims.fits`); it travels with a kernel step and is evaluated when sizes are bound. Host steps
check for themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from minicc.ir.dims import Dim, SymbolicDim, equal, fits, product
from minicc.ir.graph import Graph, Node, Value
from minicc.ir.opdef import Kind
from minicc.ir.types import TensorType
from minicc.passes.common import RESHAPES


def requirements(node: Node) -> tuple[Dim, ...]:
    """The requirements of a node, and of the body of a `Fused` node; only those that depend on run-time
    sizes.
    """
    body = node.attrs.get("body")
    nodes = body.nodes if node.op.name == "Fused" and isinstance(body, Graph) else [node]
    found = [d for one in nodes if _ranked(one) for d in _of(one)]
    return tuple(dict.fromkeys(d for d in found if isinstance(d, SymbolicDim)))


def _ranked(node: Node) -> bool:
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    return all(isinstance(v.type, TensorType) and v.type.shape is not None for v in values)


def _of(node: Node) -> Iterator[Dim]:
    name, shapes = node.op.name, [None if v is None else v.shape for v in node.inputs]
    if node.op.kind is Kind.POINTWISE:
        for shape in shapes:
            yield from _broadcasts(shape, node.output.shape)
    elif (node.op.domain, name) == ("minicc", "Attention"):
        yield from _attention(node)
    elif (node.op.domain, name) == ("com.microsoft", "MatMulNBits"):
        yield from _same((shapes[0] or (0,))[-1], node.attrs["K"])
    elif node.op.domain or not shapes or shapes[0] is None:
        return
    elif name == "Expand":
        yield from _broadcasts(shapes[0], node.output.shape)
    elif name in RESHAPES:
        yield from _same(product(shapes[0]), product(node.output.shape))
    elif name == "MatMul":
        yield from _matmul(node)
    elif name == "Concat":
        axis = node.attrs["axis"] % len(shapes[0])
        for shape in shapes[1:]:
            for a, (d, e) in enumerate(zip(shapes[0], shape or ())):
                if a != axis:
                    yield from _same(d, e)
    elif name == "Split":
        axis = node.attrs["axis"] % len(shapes[0])
        yield from _at_most(node.outputs, axis, shapes[0][axis])
    elif name in ("Conv", "ConvInteger", "ConvTranspose"):
        weight = node.inputs[1]
        assert weight is not None
        channels = shapes[0][-1 if node.attrs["layout"] == "NHWC" else 1]
        wanted = weight.shape[0] if name == "ConvTranspose" else weight.shape[1] * node.attrs["group"]
        yield from _same(channels, wanted)
    elif name in ("LSTM", "GRU", "RNN"):
        weight = node.inputs[1]
        assert weight is not None
        yield from _same(shapes[0][-1], weight.shape[-1])


def _same(a: Dim, b: Dim) -> Iterator[Dim]:
    if a != b:
        yield equal(a, b)


def _broadcasts(shape: Sequence[Dim] | None, target: Sequence[Dim]) -> Iterator[Dim]:
    for d, e in zip(reversed(shape or ()), reversed(target)):
        if d not in (1, e):
            yield fits(d, e)


def _matmul(node: Node) -> Iterator[Dim]:
    a, b = (v.shape for v in node.inputs if v is not None)
    yield from _same(a[-1], b[-2] if len(b) > 1 else b[0])
    batch = node.output.shape[: -2 if len(a) > 1 and len(b) > 1 else -1]
    for operand in (a, b):
        yield from _broadcasts(operand[:-2], batch)


def _attention(node: Node) -> Iterator[Dim]:
    q, k, v, *mask = (x.shape for x in node.inputs if x is not None)
    yield from _same(k[2], v[2])
    for shape in mask:
        yield from _broadcasts(shape, (*q[:3], k[2]))


def _at_most(outputs: Sequence[Value], axis: int, size: Dim) -> Iterator[Dim]:
    total: Dim = 0
    for value in outputs:
        total = total + value.shape[axis]
    yield from _same(total, size)
