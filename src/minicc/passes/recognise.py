"""Recognising: what exporters wrote out in small ops becomes the operator it stands for.

Normalisations, activations, softmax, and (in `recognise_attention`) attention. The canonical operator computes the same
function with the same special values, sometimes more exactly (no overflow in between); it expands again later where
the target has no kernel for it. Constants must be what the definition says, and no value in between may have another
reader. Nothing here guesses: a pattern that does not fit stays as it is.
"""

from __future__ import annotations

import math

import numpy as np

from minicc.ir.graph import Builder, Graph, Node, Value
from minicc.ir.rewrite import Pattern, Result, Rule, any_of, const, op, refuse, rewrite, rule, scalar, var
from minicc.passes.common import axes_of, integers, is_uniform, scalar_of
from minicc.passes.manager import PassContext
from minicc.passes.recognise_attention import attention

X = var("x")
CLOSE = 1e-6  # relative, for constants given as attributes


def recognise(graph: Graph, context: PassContext) -> int:
    """Apply the rules for small patterns until none applies, then that for attention; also in bodies.

    Returns the number of applications.
    """
    return context.record(rewrite(graph, RULES)) + context.record(rewrite(graph, (attention,)))


# -- building blocks of patterns


def times(a: Pattern, b: Pattern) -> Pattern:
    return op("Mul", a, b)


def times_number(a: Pattern, number: float) -> Pattern:
    """a * number, also written a / (1 / number)."""
    return any_of(op("Mul", a, scalar(number)), op("Div", a, scalar(1 / number)))


def square(a: Pattern) -> Pattern:
    return any_of(op("Mul", a, a), op("Pow", a, scalar(2)))


def clipped(a: Pattern, low: float, high: float) -> Pattern:
    """a between two numbers."""
    return any_of(
        op("Clip", a, scalar(low), scalar(high)),
        op("Min", op("Max", a, scalar(low)), scalar(high)), op("Max", op("Min", a, scalar(high)), scalar(low)),
    )  # fmt: skip


def _is_float(value: Value) -> bool:
    return value.tensor.dtype.is_float


# -- normalisation over trailing axes; scale and bias come as factors of a normalisation without them


def _trailing_axis(reduction: Node) -> int | None:
    """The first axis when a reduction with keepdims covers exactly the last axes of its input."""
    source = reduction.inputs[0]
    if source is None or not reduction.attrs.get("keepdims", 1):
        return None
    rank = source.tensor.rank
    axes = axes_of(reduction, 1, rank)
    if not axes or sorted(axes) != list(range(rank - len(axes), rank)):
        return None
    return min(axes)


def _normalisation(b: Builder, name: str, x: Value, reductions: tuple[Node, ...], epsilon: Value) -> Result:
    """The canonical operator with a scale of ones."""
    axes = {_trailing_axis(r) for r in reductions}
    axis = axes.pop()
    number = scalar_of(epsilon)
    if axes or axis is None or number is None:
        return refuse("not over the same trailing axes, or epsilon is no number")
    if not _is_float(x) or number < 0:
        return refuse("not a normalisation of floats with a positive epsilon")
    shape = x.shape[axis:]
    if not all(isinstance(d, int) for d in shape):
        return refuse("the normalised size is known only at run time")
    ones = b.constant(np.ones(shape, dtype=x.tensor.dtype.numpy))
    return b.op(name, x, ones, axis=axis - x.tensor.rank, epsilon=number)


def _over_root(numerator: Pattern, squares: Pattern) -> tuple[Pattern, ...]:
    """numerator / sqrt(squares + epsilon) as exporters write it."""
    total = op("Add", op("ReduceMean", squares, var("axes"), name="variance"), const("epsilon"))
    root = any_of(op("Sqrt", total), op("Pow", total, scalar(0.5)))
    return (
        op("Div", numerator, root),
        op("Mul", numerator, any_of(op("Reciprocal", root), op("Div", scalar(1), root), op("Pow", total, scalar(-0.5)))),
    )


CENTRED = op("Sub", X, op("ReduceMean", X, var("mean_axes"), name="mean"), name="centred")


def _layer_normalization(b: Builder, x: Value, mean: Node, variance: Node, epsilon: Value, **_: object) -> Result:
    """(x - mean) / sqrt(mean((x - mean) ** 2) + epsilon), over trailing axes (Ba et al., 2016)."""
    return _normalisation(b, "LayerNormalization", x, (mean, variance), epsilon)


def _rms_normalization(b: Builder, x: Value, variance: Node, epsilon: Value, **_: object) -> Result:
    """x / sqrt(mean(x ** 2) + epsilon), over trailing axes (Zhang and Sennrich, 2019)."""
    return _normalisation(b, "RMSNormalization", x, (variance,), epsilon)


NORMALISATIONS = (
    *(Rule("layer-normalization", p, _layer_normalization) for p in _over_root(CENTRED, square(CENTRED))),  # type: ignore[arg-type]
    *(Rule("rms-normalization", p, _rms_normalization) for p in _over_root(X, square(X))),  # type: ignore[arg-type]
)


def _per_element(b: Builder, vector: Value, node: Node) -> Value | None:
    """A factor or term in the normalised shape, or None when it varies along other axes."""
    x = node.inputs[0]
    assert x is not None
    shape = x.shape[node.attrs["axis"] % x.tensor.rank :]
    if vector.shape == shape:
        return vector
    sizes = [d for d in shape if isinstance(d, int)]
    if vector.data is None or len(sizes) != len(shape) or vector.data.ndim > x.tensor.rank:
        return None
    lead = vector.data.ndim - len(sizes)
    if lead > 0 and vector.data.shape[:lead] != (1,) * lead:
        return None
    data = vector.data.reshape(vector.data.shape[lead:]) if lead > 0 else vector.data
    if any(have not in (1, want) for have, want in zip(data.shape[::-1], sizes[::-1])):
        return None
    return b.constant(np.ascontiguousarray(np.broadcast_to(data, sizes)))


@rule("normalisation-scale", op("Mul", op("LayerNormalization RMSNormalization", name="node"), var("scale")))
def normalisation_scale(b: Builder, node: Node, scale: Value) -> Result:
    """A factor after a normalisation whose scale is one and that has no bias."""
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return None
    x, ones = node.inputs[:2]
    if not is_uniform(ones, 1) or scale is node.output or x is None:
        return None
    fitted = _per_element(b, scale, node)
    if fitted is None:
        return refuse("the factor is not per normalised element")
    return b.op(node.op.name, x, fitted, **node.attrs)


@rule("normalisation-bias", op("Add", op("LayerNormalization", name="node"), var("bias")))
def normalisation_bias(b: Builder, node: Node, bias: Value) -> Result:
    """A term after a layer normalisation without bias."""
    if (len(node.inputs) > 2 and node.inputs[2] is not None) or bias.data is None:
        return None  # a computed term is a residual connection, not a bias
    fitted = _per_element(b, bias, node)
    if fitted is None:
        return refuse("the term is not per normalised element")
    return b.op("LayerNormalization", node.inputs[0], node.inputs[1], fitted, **node.attrs)


@rule("normalisation-of-half", op("Cast", op("LayerNormalization RMSNormalization", name="node"), name="outer"))
def normalisation_of_half(b: Builder, node: Node, outer: Node) -> Result:
    """Cast(norm(Cast(x))) = norm(x) for half types: it computes in float32 anyway."""
    wide = node.inputs[0]
    cast = wide.producer if wide is not None else None
    if cast is None or cast.op.name != "Cast" or cast.op.domain or wide is None or wide.tensor.dtype.name != "f32":
        return None
    x = cast.inputs[0]
    if x is None or x.type != outer.output.type or x.tensor.dtype.name not in ("f16", "bf16"):
        return None
    if node.attrs["stash_type"] != 1:
        return None
    return b.op(node.op.name, x, *node.inputs[1:], **node.attrs)


@rule("group-normalization", op("InstanceNormalization", op("Reshape", X, var("_")), var("scale"), var("bias"), name="node"))
def group_normalization(b: Builder, x: Value, scale: Value, bias: Value, node: Node, **_: object) -> Result:
    """InstanceNormalization of [N, G, rest] is GroupNormalization of the [N, C, *spatial] it was made of (Wu and He, 2018)."""
    rows, shape = node.output.shape, x.shape
    if len(rows) != 3 or len(shape) < 3 or rows[0] != shape[0]:
        return None
    groups, channels = rows[1], shape[1]
    if not isinstance(groups, int) or not isinstance(channels, int) or groups == 0 or channels % groups:
        return refuse("the channels are not divided into groups")
    grouped = b.op("GroupNormalization", x, scale, bias, num_groups=groups, epsilon=node.attrs["epsilon"])
    return b.op("Reshape", grouped, b.shape(list(rows)), allowzero=1)


# -- Gelu (Hendrycks and Gimpel, 2016)


def _gelu_pattern(ramp: Pattern) -> tuple[Pattern, ...]:
    """x * 0.5 * (1 + ramp) in every order."""
    one_plus = op("Add", ramp, scalar(1))
    share = any_of(times_number(one_plus, 0.5), op("Add", times_number(ramp, 0.5), scalar(0.5)))
    return (
        op("Mul", X, share),
        op("Mul", times_number(X, 0.5), one_plus),
        op("Mul", op("Mul", X, one_plus), scalar(0.5)),
        op("Div", op("Mul", X, one_plus), scalar(2)),
    )


ERF = op("Erf", times_number(X, math.sqrt(0.5)))

C, A = math.sqrt(2 / math.pi), 0.044715
CURVED = any_of(  # 0.044715 * x ** 3
    op("Mul", any_of(op("Pow", X, scalar(3)), times(X, square(X))), scalar(A)),
    times(X, times(square(X), scalar(A))), times(X, times(X, times(X, scalar(A)))), times(times(X, scalar(A)), square(X)),
)  # fmt: skip
FACTOR = op("Add", times(square(X), scalar(A)), scalar(1))  # 1 + 0.044715 * x ** 2
TANH = op("Tanh", any_of(
    times(op("Add", X, CURVED), scalar(C)), times(X, times(FACTOR, scalar(C))), times(times(X, scalar(C)), FACTOR),
    times(times(X, FACTOR), scalar(C)), times(X, op("Add", times(square(X), scalar(C * A)), scalar(C))),
))  # fmt: skip


def _gelu(b: Builder, x: Value) -> Result:
    """x * (1 + erf(x / sqrt(2))) / 2."""
    return b.op("Gelu", x, approximate="none")


def _gelu_tanh(b: Builder, x: Value) -> Result:
    """x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))) / 2."""
    return b.op("Gelu", x, approximate="tanh")


GELU = (
    *(Rule("gelu", p, _gelu) for p in _gelu_pattern(ERF)),  # type: ignore[arg-type]
    *(Rule("gelu-tanh", p, _gelu_tanh) for p in _gelu_pattern(TANH)),  # type: ignore[arg-type]
)


# -- other activations


@rule("swish", op("Mul", X, op("Sigmoid", any_of(X, op("Mul", X, const("alpha"))))))
def swish(b: Builder, x: Value, alpha: Value | None = None) -> Result:
    """x * sigmoid(alpha * x)."""
    number = 1.0 if alpha is None else scalar_of(alpha)
    if number is None or not math.isfinite(number):
        return refuse("the factor is not one number")
    return b.op("Swish", x, alpha=number)


def _hard_sigmoid(b: Builder, x: Value, alpha: Value | None = None, beta: Value | None = None) -> Result:
    """clip(alpha * x + beta, 0, 1); without constants clip(x + 3, 0, 6) / 6."""
    if not _is_float(x):
        return None
    if alpha is None or beta is None:
        return b.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    a, c = scalar_of(alpha), scalar_of(beta)
    if a is None or c is None or not (math.isfinite(a) and math.isfinite(c)):
        return refuse("a constant is not one number")
    return b.op("HardSigmoid", x, alpha=a, beta=c)


RELU6 = clipped(op("Add", X, scalar(3)), 0, 6)
LINE = clipped(op("Add", op("Mul", X, const("alpha")), const("beta")), 0, 1)


def _hard_swish(b: Builder, x: Value, inner: Node | None = None) -> Result:
    """x * clip(x + 3, 0, 6) / 6 = x * hard_sigmoid(x) with slope 1/6 and offset 1/2 (Howard et al., 2019)."""
    if not _is_float(x):
        return None
    if inner is not None:
        slope, offset = inner.attrs["alpha"], inner.attrs["beta"]
        if not (math.isclose(slope, 1 / 6, rel_tol=CLOSE) and math.isclose(offset, 0.5, rel_tol=CLOSE)):
            return refuse("the slope is not 1/6 or the offset not 1/2")
    return b.op("HardSwish", x)


def _alternatives(name: str, pattern: Pattern, apply: object) -> tuple[Rule, ...]:
    """One rule for each alternative at the root: a rule's root is an op."""
    tops = getattr(pattern, "alternatives", (pattern,))
    return tuple(Rule(name, top, apply) for top in tops)  # type: ignore[arg-type]


HARD = (
    *_alternatives("hard-sigmoid", times_number(RELU6, 1 / 6), _hard_sigmoid),
    *_alternatives("hard-sigmoid", LINE, _hard_sigmoid),
    *_alternatives("hard-swish", times_number(times(X, RELU6), 1 / 6), _hard_swish),
    *_alternatives("hard-swish", times(times_number(X, 1 / 6), RELU6), _hard_swish),
    *_alternatives("hard-swish", times(X, op("HardSigmoid", X, name="inner")), _hard_swish),
)


@rule("softplus", op("Log", op("Add", op("Exp", X), scalar(1))))
def softplus(b: Builder, x: Value) -> Result:
    """log(exp(x) + 1), without overflow."""
    return b.op("Softplus", x)


@rule("softplus", op("Add", any_of(op("Relu", X), op("Max", X, scalar(0))), op("Softplus", op("Neg", op("Abs", X)))))
def stable_softplus(b: Builder, x: Value) -> Result:
    """max(x, 0) + log(exp(-|x|) + 1), whose second term is a softplus already."""
    return b.op("Softplus", x)


@rule("mish", op("Mul", X, op("Tanh", op("Softplus", X))))
def mish(b: Builder, x: Value) -> Result:
    """x * tanh(softplus(x)) (Misra, 2019)."""
    return b.op("Mish", x)


# -- Softmax

SHIFTED = op("Sub", X, op("ReduceMax", X, var("top_axes"), name="top"))
POWERS = tuple(op("Exp", inner, name="powers") for inner in (SHIFTED, X))


def _softmax(b: Builder, x: Value, total: Node, top: Node | None = None, **_: object) -> Result:
    """exp(x) / sum(exp(x)) along one axis, also with the maximum subtracted."""
    found = {_single_axis(node, x) for node in (total, top) if node is not None}
    axis = found.pop()
    if found or axis is None or not _is_float(x):
        return refuse("not along the same single axis")
    return b.op("Softmax", x, axis=axis - x.tensor.rank)


def _single_axis(reduction: Node, x: Value) -> int | None:
    axes = integers(reduction.inputs[1]) if reduction.attrs.get("keepdims", 1) else None
    return axes[0] % x.tensor.rank if axes is not None and len(axes) == 1 else None


SOFTMAX = tuple(
    Rule("softmax", root, _softmax)
    for powers in POWERS
    for total in (op("ReduceSum", powers, var("axes"), name="total"),)
    for root in (op("Div", powers, total), op("Mul", powers, op("Reciprocal", total)))
)

RULES: tuple[Rule, ...] = (
    *NORMALISATIONS, normalisation_scale, normalisation_bias, normalisation_of_half, group_normalization, *GELU, swish, *HARD,
    softplus, stable_softplus, mish, *SOFTMAX,
)  # fmt: skip
