"""Rules that move reshapes out of the way, so that a product, its bias and its residual sum have one shape.

Exporters flatten [batch, rows, k] to [batch * rows, k] around every product. A reshape that keeps the last
axis commutes with a product by a matrix and with pointwise ops; moved behind them it usually meets its
inverse. A reshape moves towards the outputs, except before a product whose operand is reshaped anyway, so the
rules end.
"""

from __future__ import annotations

from minicc.ir.dims import Dim
from minicc.ir.graph import Builder, Node, Value
from minicc.ir.opdef import Kind
from minicc.ir.rewrite import Result, op, rule
from minicc.passes.common import has_shape
from minicc.passes.simplify_views import RESHAPES, reshape_to

FAMILY = frozenset(RESHAPES.split())
POINTWISE = (
    "Add Sub Mul Div Relu Sigmoid Tanh Erf Gelu Swish HardSwish HardSigmoid LeakyRelu Clip Cast Neg Abs "
    "Sqrt Exp Pow Elu Softplus Mish Sin Cos Reciprocal"
)


def _reshape_of(value: Value | None) -> Value | None:
    """What a value is a reshape of, or None."""
    node = value.producer if value is not None else None
    if node is None or node.op.domain or node.op.name not in FAMILY or node.symbols:
        return None
    source = node.inputs[0]
    return source if has_shape(source) and has_shape(node.output) else None


def _fits_last_axis(value: Value | None, last: Dim) -> bool:
    """Whether an operand is one number, or a vector along the last axis."""
    if value is None:
        return True
    if not has_shape(value):
        return False
    return all(d == 1 for d in value.shape[:-1]) and (not value.shape or value.shape[-1] in (1, last))


def _vector(b: Builder, value: Value | None) -> Value | None:
    """The operand as a scalar or vector, which broadcasts to any rank."""
    if value is None or value.tensor.rank <= 1:
        return value
    if value.data is not None:
        return b.constant(value.data.reshape(value.data.shape[-1:]))
    return reshape_to(b, value, value.shape[-1:])


@rule("product-before-reshape", op("MatMul", name="node"))
def product_before_reshape(b: Builder, node: Node) -> Result:
    """reshape(x) @ w = reshape(x @ w) for a matrix w and a reshape that keeps the last axis."""
    left, w = node.inputs
    x = _reshape_of(left)
    if x is None or left is None or w is None or not has_shape(w) or len(w.shape) != 2:
        return None
    if len(x.shape) < 2 or len(left.shape) < 2 or x.shape[-1] != left.shape[-1]:
        return None
    return reshape_to(b, b.op("MatMul", x, w), node.output.shape)


@rule("pointwise-before-reshape", op(POINTWISE, name="node"))
def pointwise_before_reshape(b: Builder, node: Node) -> Result:
    """f(reshape(x), c) = reshape(f(x, c)) for c a number, a vector along a kept last axis, or reshaped the
    same way.
    """
    if (
        node.op.kind is not Kind.POINTWISE
        or len(node.outputs) != 1
        or not has_shape(node.output)
        or "axis" in node.attrs
    ):
        return None
    shape = node.output.shape
    sources = [_reshape_of(v) for v in node.inputs]
    x = next(
        (s for s, v in zip(sources, node.inputs) if s is not None and v is not None and v.shape == shape),
        None,
    )
    if x is None or not x.shape or not shape:
        return None
    kept = x.shape[-1] == shape[-1]
    inputs: list[Value | None] = []
    for source, value in zip(sources, node.inputs):
        if source is not None and value is not None and source.shape == x.shape and value.shape == shape:
            inputs.append(source)
        elif _fits_last_axis(value, shape[-1] if kept else 1):
            inputs.append(_vector(b, value))
        else:
            return None
    return reshape_to(b, b.op(node.op.name, *inputs, **node.attrs), shape)


@rule("reshape-before-product", op(RESHAPES, name="node"))
def reshape_before_product(b: Builder, node: Node) -> Result:
    """reshape(f(reshape(x) @ w)) = f(reshape'(x) @ w) when the outer reshape keeps the last axis and x has
    another one.
    """
    if not has_shape(node.output) or node.symbols:
        return None
    value, chain = node.inputs[0], []
    while value is not None and value.producer is not None and value.producer.op.name != "MatMul":
        step = value.producer
        if (
            step.op.name not in POINTWISE.split()
            or step.op.domain
            or "axis" in step.attrs
            or not _only_read_here(b, value)
        ):
            return None
        inner = [
            v for v in step.inputs if v is not None and v.producer is not None and v.shape == value.shape
        ]
        if len(inner) != 1 or not all(v in inner or _fits_last_axis(v, value.shape[-1]) for v in step.inputs):
            return None
        chain.append((step, inner[0]))
        value = inner[0]
    if value is None or value.producer is None or not _only_read_here(b, value) or value.producer.op.domain:
        return None
    product = value.producer
    left, w = product.inputs
    source = _reshape_of(left)
    shape = node.output.shape
    if source is None or left is None or w is None or not has_shape(w) or len(w.shape) != 2 or len(shape) < 2:
        return None
    if shape[-1] != value.shape[-1] or source.shape[-1] == left.shape[-1]:
        return None
    out = b.op("MatMul", reshape_to(b, source, (*shape[:-1], left.shape[-1])), w)
    for step, inside in reversed(chain):
        out = b.op(step.op.name, *(out if v is inside else _vector(b, v) for v in step.inputs), **step.attrs)
    return out


def _only_read_here(b: Builder, value: Value) -> bool:
    return len(value.uses) == 1 and value not in b.graph.outputs


MOVE_RULES = (product_before_reshape, pointwise_before_reshape, reshape_before_product)
