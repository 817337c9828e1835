"""Simplifying: algebraic identities and redundant views, as rewrite rules.

Every rule gives exactly the same numbers for every input, NaN, infinities and the sign of zero included,
except reassociation of floating-point constants (`x + a + b`), which is allowed to round differently in the
last bit. Rules that need a global view (layout, fusion) are passes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minicc.errors import MiniccError
from minicc.ir.evaluate import evaluate_node
from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.rewrite import Result, Rule, const, op, refuse, rewrite, rule, var
from minicc.ir.types import TensorType, broadcast_shapes
from minicc.passes.common import integers, is_uniform, scalar_of
from minicc.passes.manager import PassContext
from minicc.passes.simplify_gathers import GATHER_RULES
from minicc.passes.simplify_moves import MOVE_RULES
from minicc.passes.simplify_quantised import QUANTISED_RULES
from minicc.passes.simplify_views import VIEW_RULES


def simplify(graph: Graph, context: PassContext) -> int:
    """Apply all rules until none applies, also in bodies; returns the number of applications."""
    return context.record(rewrite(graph, RULES))


def _same_type(a: Value, b: Value) -> bool:
    return a.type == b.type


def _is_float(value: Value) -> bool:
    return isinstance(value.type, TensorType) and value.type.dtype.kind == "f"


def _sign_bits(constant: Value) -> np.ndarray[Any, Any]:
    assert constant.data is not None
    return np.atleast_1d(np.signbit(constant.data))


# -- neutral elements: the result must have the shape and type of x, which the driver checks


@rule("drop-neutral", op("Add Sub Mul Div Pow", name="node"))
def drop_neutral(_: Builder, node: Node) -> Result:
    """x - 0, x * 1, x / 1, x ** 1; x + 0 of integers, and x + (-0.0) of floats (x + 0.0 changes the sign of
    -0.0).
    """
    x, y = node.inputs
    assert x is not None and y is not None
    name = node.op.name
    if name == "Add":
        for value, other in ((x, y), (y, x)):
            if is_uniform(other, 0) and (not _is_float(other) or _sign_bits(other).all()):
                return value
        return None
    if name == "Sub":
        return x if is_uniform(y, 0) and not (_is_float(y) and _sign_bits(y).any()) else None
    if name == "Mul" and is_uniform(x, 1):
        return y
    return x if is_uniform(y, 1) else None


@rule("square", op("Pow", var("x"), const("y")))
def square(b: Builder, x: Value, y: Value) -> Result:
    """x ** 2 = x * x and x ** 0.5 = sqrt(x) for x that is not -inf or -0.0 (a sum of squares or an Abs)."""
    exponent = scalar_of(y)
    if exponent == 2:
        return b.op("Mul", x, x)
    producer = x.producer
    if (
        exponent == 0.5
        and producer is not None
        and producer.op.name in ("Abs", "ReduceSumSquare", "ReduceL2", "ReduceL1")
    ):
        return b.op("Sqrt", x)
    return None


@rule("divide-by-power-of-two", op("Div", var("x"), const("y")))
def divide_by_power_of_two(b: Builder, x: Value, y: Value) -> Result:
    """x / c = x * (1 / c) exactly when c and 1 / c are powers of two in range."""
    assert y.data is not None
    if not _is_float(y) or y.data.size == 0 or y.data.dtype.itemsize < 4 or y.data.dtype.kind != "f":
        return None
    fraction, exponent = np.frexp(y.data)
    limit = 120 if y.data.dtype.itemsize == 4 else 1000
    if not bool(np.all(np.abs(fraction) == 0.5)) or int(np.abs(exponent).max()) > limit:
        return refuse("the divisor is not a power of two")
    return b.op("Mul", x, b.constant((1 / y.data).astype(y.data.dtype)))


@rule("subtract-constant", op("Sub", var("x"), const("y")))
def subtract_constant(b: Builder, x: Value, y: Value) -> Result:
    """x - c = x + (-c) for floats: one form for the rules about sums."""
    assert y.data is not None
    return b.op("Add", x, b.constant(-y.data)) if _is_float(y) else None


@rule("add-negative", op("Add", var("x"), op("Neg", var("y"))))
def add_negative(b: Builder, x: Value, y: Value) -> Result:
    """x + (-y) = x - y."""
    return b.op("Sub", x, y)


@rule("subtract-negative", op("Sub", var("x"), op("Neg", var("y"))))
def subtract_negative(b: Builder, x: Value, y: Value) -> Result:
    """x - (-y) = x + y."""
    return b.op("Add", x, y)


@rule("merge-constants", op("Add Mul", name="outer"))
def merge_constants(b: Builder, outer: Node) -> Result:
    """(x + a) + c = x + (a + c), and the same for products: one constant instead of two."""
    split = _constant_operand(outer)
    if split is None:
        return None
    inner_value, c = split
    inner = inner_value.producer
    if (
        inner is None
        or inner.op is not outer.op
        or len(inner_value.uses) != 1
        or inner_value in b.graph.outputs
    ):
        return None
    again = _constant_operand(inner)
    if again is None:
        return None
    x, a = again
    assert a.data is not None and c.data is not None
    if broadcast_shapes(a.data.shape, c.data.shape) not in (a.data.shape, c.data.shape):
        return refuse("the constants together are larger than each")
    if a.data.dtype.kind != "f":
        return None
    with np.errstate(all="ignore"):
        wide_a, wide_c = a.data.astype(np.float64), c.data.astype(np.float64)
        merged = (wide_a + wide_c if outer.op.name == "Add" else wide_a * wide_c).astype(a.data.dtype)
    if not bool(np.all(np.isfinite(merged))) or (
        outer.op.name == "Mul" and bool(np.any((merged == 0) & (wide_a * wide_c != 0)))
    ):
        return refuse("the merged constant leaves the range of the type")
    return b.op(outer.op.name, x, b.constant(merged))


def _constant_operand(node: Node) -> tuple[Value, Value] | None:
    """(the other operand, the numeric constant operand) of a commutative node with exactly one."""
    x, y = node.inputs
    assert x is not None and y is not None
    if (x.data is None) == (y.data is None):
        return None
    return (y, x) if x.data is not None else (x, y)


# -- involutions and idempotents


@rule("double", op("Relu Abs Ceil Floor Round Sign Neg Not BitwiseNot Reciprocal", name="node"))
def double(_: Builder, node: Node) -> Result:
    """f(f(x)) is f(x) for idempotents (Relu, Abs, rounding, Sign) and x for involutions (Neg, Not)."""
    x = node.inputs[0]
    inner = x.producer if x is not None else None
    if x is None or inner is None or inner.op is not node.op:
        return None
    if node.op.name in ("Neg", "Not", "BitwiseNot"):
        return inner.inputs[0]
    return x if node.op.name != "Reciprocal" else None


@rule("abs-of-relu", op("Abs Relu", op("Relu Abs Sigmoid Exp Sqrt Softplus", name="inner", shared=True)))
def non_negative(_: Builder, inner: Node) -> Result:
    """Abs and Relu do nothing to what is not negative."""
    return inner.output if inner.op.name != "Sqrt" else None


@rule("relu-into-clip", op("Clip", op("Relu", var("x")), const("low"), const("high")))
def relu_into_clip(b: Builder, x: Value, low: Value, high: Value) -> Result:
    """clip(max(x, 0), a, b) = clip(x, max(a, 0), b) when b is not below 0."""
    bottom, top = scalar_of(low), scalar_of(high)
    if bottom is None or top is None or top < 0 or bottom != bottom:
        return None
    return b.op("Clip", x, low if bottom >= 0 else b.scalar(0, low), high)


@rule("clip-of-clip", op("Clip", op("Clip", var("x"), const("a"), const("c")), const("d"), const("e")))
def clip_of_clip(b: Builder, x: Value, a: Value, c: Value, d: Value, e: Value) -> Result:
    """clip(clip(x, a, c), d, e) = clip(x, max(a, d), min(c, e)) when the ranges overlap."""
    bounds = [scalar_of(v) for v in (a, c, d, e)]
    if any(v is None or v != v for v in bounds):
        return None
    low_inner, high_inner, low_outer, high_outer = (float(v) for v in bounds if v is not None)
    low, high = max(low_inner, low_outer), min(high_inner, high_outer)
    if low > high or low_inner > high_inner or low_outer > high_outer:
        return refuse("the ranges do not overlap")
    return b.op("Clip", x, b.scalar(low, x), b.scalar(high, x))


@rule("unbounded", op("Clip Min Max", name="node"))
def unbounded(_: Builder, node: Node) -> Result:
    """Bounds of infinity do nothing: Clip(-inf, inf), Max(x, -inf), Min(x, inf)."""
    name = node.op.name
    if name == "Clip":
        low, high = (*node.inputs[1:], None, None)[:2]
        free_low = low is None or (is_uniform(low, -np.inf) and _is_float(low))
        free_high = high is None or (is_uniform(high, np.inf) and _is_float(high))
        return node.inputs[0] if free_low and free_high else None
    if len(node.inputs) == 1:
        return node.inputs[0]
    neutral = np.inf if name == "Min" else -np.inf
    rest = [v for v in node.inputs if v is not None and not (_is_float(v) and is_uniform(v, neutral))]
    return rest[0] if len(rest) == 1 and len(node.inputs) == 2 else None


@rule("where-constant", op("Where", const("condition"), var("x"), var("y")))
def where_constant(_: Builder, condition: Value, x: Value, y: Value) -> Result:
    """Where with a constant condition that is the same everywhere."""
    if is_uniform(condition, 1):
        return x
    return y if is_uniform(condition, 0) else None


@rule("same-operands", op("Where And Or Max Min", name="node"))
def same_operands(_: Builder, node: Node) -> Result:
    """x and x, x or x, max(x, x), min(x, x), where(c, x, x) are x."""
    values = node.inputs[1:] if node.op.name == "Where" else node.inputs
    return values[0] if len(values) == 2 and values[0] is values[1] else None


@rule("boolean-constant", op("And Or Xor", name="node"))
def boolean_constant(_: Builder, node: Node) -> Result:
    """x and true, x or false, x xor false are x."""
    neutral = 1 if node.op.name == "And" else 0
    x, y = node.inputs
    return x if is_uniform(y, neutral) else y if is_uniform(x, neutral) else None


# -- casts


@rule("identity", op("Identity", var("x")))
def identity(_: Builder, x: Value) -> Result:
    """Identity(x) = x."""
    return x


@rule("cast-to-same", op("Cast CastLike", name="node"))
def cast_to_same(_: Builder, node: Node) -> Result:
    """A cast to the type a value has."""
    x = node.inputs[0]
    return x if x is not None and _same_type(x, node.output) else None


@rule("cast-of-cast", op("Cast", op("Cast", var("x"), name="inner", shared=True), name="outer"))
def cast_of_cast(b: Builder, x: Value, inner: Node, outer: Node) -> Result:
    """cast(cast(x)) is one cast when the first loses nothing."""
    if not isinstance(x.type, TensorType) or not _widens(x.type, inner.output.tensor):
        return refuse("the inner cast may lose information")
    return x if _same_type(x, outer.output) else b.op("Cast", x, **outer.attrs)


def _widens(source: TensorType, target: TensorType) -> bool:
    """Whether every value of the source type is one of the target type, and casts on from either agree."""
    a, c = source.dtype, target.dtype
    if a.kind == "b":
        return c.kind in "iuf"
    if a.kind == "f" and c.kind == "f":
        return a.name in ("f16", "bf16", "f32") and c.name in ("f32", "f64") and c.bits >= a.bits
    if a.kind in "iu" and c.kind in "iu":
        return (a.kind == c.kind and c.bits >= a.bits) or (
            a.kind == "u" and c.kind == "i" and c.bits > a.bits
        )
    return False


@rule(
    "expand-into-broadcast",
    op("Add Sub Mul Div Pow Min Max Where Equal Less Greater And Or LessOrEqual GreaterOrEqual", name="node"),
)
def expand_into_broadcast(b: Builder, node: Node) -> Result:
    """f(expand(x), y) = f(x, y) when y alone already gives the shape."""
    for position, value in enumerate(node.inputs):
        if (
            value is None
            or value.producer is None
            or value.producer.op.name != "Expand"
            or value.producer.op.domain
        ):
            continue
        if any(
            v is None or v.tensor.shape is None for v in (*node.inputs, *value.producer.inputs, node.output)
        ):
            continue
        source = value.producer.inputs[0]
        others = [v.shape for i, v in enumerate(node.inputs) if i != position and v is not None]
        try:
            shape = broadcast_shapes(source.shape, *others)  # type: ignore[union-attr]
        except MiniccError:
            continue
        if shape == node.output.shape:
            inputs: list[Value | None] = list(node.inputs)
            inputs[position] = source
            return b.op(node.op.name, *inputs, **node.attrs)
    return None


@rule("uniform-constant", op("Add Sub Mul Div Max Min", name="node"))
def uniform_constant(b: Builder, node: Node) -> Result:
    """A large constant with one number everywhere becomes a scalar when the other operand gives the shape."""
    for position, value in enumerate(node.inputs):
        other = node.inputs[1 - position] if len(node.inputs) == 2 else None
        if (
            value is None
            or other is None
            or value.data is None
            or value.data.size < 2
            or other.type != node.output.type
        ):
            continue
        first = value.data.reshape(-1)[0]
        if is_uniform(value, first) and not np.isnan(first):
            inputs = [other, other]
            inputs[position] = b.constant(np.asarray(first, dtype=value.data.dtype))
            return b.op(node.op.name, *inputs)
    return None


@rule("dropout", op("Dropout", name="node"))
def dropout(b: Builder, node: Node) -> Result:
    """Dropout outside of training gives its input; the mask must be unused."""
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if (mode is not None and not is_uniform(mode, 0)) or any(
        v.uses or v in b.graph.outputs for v in node.outputs[1:]
    ):
        return refuse("it trains, or its mask is used")
    return node.inputs[0]


@rule("known-size", op("Shape Size", name="node"))
def fold_known_size(b: Builder, node: Node) -> Result:
    """The shape or size of a value of static shape."""
    x = node.inputs[0]
    if x is None or not isinstance(x.type, TensorType) or not x.type.is_static:
        return None
    placeholder = np.broadcast_to(np.zeros((), dtype=np.int8), [d for d in x.type.dims if isinstance(d, int)])
    return b.constant(np.asarray(evaluate_node(node, [placeholder])[0]))


@rule("concat-of-concat", op("Concat", name="node"))
def concat_of_concat(b: Builder, node: Node) -> Result:
    """Nested Concats along one axis are one; a Concat of one value is the value."""
    if len(node.inputs) == 1:
        return node.inputs[0]
    if any(
        not isinstance(v.type, TensorType) or v.type.shape is None
        for v in (*node.inputs, node.output)
        if v is not None
    ):
        return None
    rank, axis = node.output.tensor.rank, node.attrs["axis"]
    parts: list[Value | None] = []
    for value in node.inputs:
        inner = value.producer if value is not None else None
        same = inner is not None and inner.op is node.op and inner.attrs["axis"] % rank == axis % rank
        if same and value is not None and len(value.uses) == 1 and value not in b.graph.outputs:
            parts += inner.inputs  # type: ignore[union-attr]
        else:
            parts.append(value)
    empty = [v for v in parts if v is not None and v.shape[axis] == 0]
    kept = [v for v in parts if v not in empty] or parts[:1]
    if len(kept) == len(node.inputs):
        return None
    return kept[0] if len(kept) == 1 else b.op("Concat", *kept, axis=axis)


@rule("split-into-one", op("Split", name="node"))
def split_into_one(_: Builder, node: Node) -> Result:
    """A Split into one part is the value."""
    return (
        node.inputs[0]
        if len(node.outputs) == 1 and node.inputs[0] is not None and _same_type(node.inputs[0], node.output)
        else None
    )


@rule("pad-nothing", op("Pad Tile", name="node"))
def pad_nothing(_: Builder, node: Node) -> Result:
    """Padding by zero, repeating once."""
    counts = integers(node.inputs[1])
    neutral = 0 if node.op.name == "Pad" else 1
    return node.inputs[0] if counts is not None and all(c == neutral for c in counts) else None


RULES: Sequence[Rule] = (
    identity, dropout, drop_neutral, cast_to_same, cast_of_cast, *VIEW_RULES, *MOVE_RULES, *QUANTISED_RULES,
    square, divide_by_power_of_two,
    subtract_constant, add_negative, subtract_negative, merge_constants, double, non_negative, relu_into_clip,
    clip_of_clip, unbounded, where_constant, same_operands, boolean_constant, expand_into_broadcast,
    uniform_constant,
    fold_known_size, *GATHER_RULES, concat_of_concat, split_into_one, pad_nothing,
)  # fmt: skip
